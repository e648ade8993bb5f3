/* Dense products of the reference: see linear.h.
 *
 * The loops are plain C in a shape that compilers turn into vectors along the output columns: a few rows by a few
 * columns of accumulators stay in registers while one tile of widened weights streams from the first-level cache.
 * Must not reassociate a sum: the order of additions is the definition. */
#include "linear.h"

#include <math.h>
#include <string.h>

enum {
    COLS = 4, /* output columns of the inner kernel; COLS x COLS accumulators fit the 16 registers of baseline x86-64 */
    DEEP = 64, /* reduction indices of a tile */
    WIDE = 32, /* output columns of a tile: DEEP x WIDE doubles are half of a 32 KiB cache */
    GROUP = 4  /* rows of w that are transposed together */
};

size_t xp_ref_linear_ws(void) {
    return (size_t)(DEEP * WIDE + GROUP * DEEP) * sizeof(double);
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Four rows of y by COLS columns. */
static void add_4(const double *restrict a, int64_t si, int64_t sr, const double *restrict b, int64_t ldb,
                  int64_t depth, double *restrict y, int64_t ldy) {
    double acc[4][COLS];
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < COLS; j++)
            acc[i][j] = y[i * ldy + j];
    }
    for (int64_t r = 0; r < depth; r++) {
        const double *row = b + r * ldb;
        for (int i = 0; i < 4; i++) {
            const double v = a[i * si + r * sr];
            for (int j = 0; j < COLS; j++)
                acc[i][j] += v * row[j];
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < COLS; j++)
            y[i * ldy + j] = acc[i][j];
    }
}

/* One row of y by COLS columns. */
static void add_1(const double *restrict a, int64_t sr, const double *restrict b, int64_t ldb, int64_t depth,
                  double *restrict y) {
    double acc[COLS];
    for (int j = 0; j < COLS; j++)
        acc[j] = y[j];
    for (int64_t r = 0; r < depth; r++) {
        const double v = a[r * sr];
        for (int j = 0; j < COLS; j++)
            acc[j] += v * b[r * ldb + j];
    }
    for (int j = 0; j < COLS; j++)
        y[j] = acc[j];
}

/* One element: the ragged right edge. */
static double add_scalar(const double *a, int64_t sr, const double *b, int64_t ldb, int64_t depth, double acc) {
    for (int64_t r = 0; r < depth; r++)
        acc += a[r * sr] * b[r * ldb];
    return acc;
}

void xp_ref_linear_add(const double *a, int64_t si, int64_t sr, const double *b, int64_t ldb, int64_t m, int64_t n,
                       int64_t depth, double *y, int64_t ldy) {
    int64_t j = 0;
    for (; j + COLS <= n; j += COLS) {
        int64_t i = 0;
        for (; i + 4 <= m; i += 4)
            add_4(a + i * si, si, sr, b + j, ldb, depth, y + i * ldy + j, ldy);
        for (; i < m; i++)
            add_1(a + i * si, sr, b + j, ldb, depth, y + i * ldy + j);
    }
    for (; j < n; j++) {
        for (int64_t i = 0; i < m; i++)
            y[i * ldy + j] = add_scalar(a + i * si, sr, b + j, ldb, depth, y[i * ldy + j]);
    }
}

double xp_ref_dot(const double *a, const double *b, int64_t n) {
    return add_scalar(a, 1, b, 1, n, 0.0);
}

static void clear(double *y, int64_t m, int64_t n, int64_t ldy) {
    for (int64_t i = 0; i < m && n > 0; i++)
        memset(y + i * ldy, 0, (size_t)n * sizeof *y);
}

static void widen(const xp_tensor *w, int64_t row, int64_t col, int64_t n, int absolute, double *out) {
    xp_widen_row(w->data, w->dtype, row * w->stride[0] + col, n, out);
    if (absolute) {
        for (int64_t i = 0; i < n; i++)
            out[i] = fabs(out[i]);
    }
}

/* tile[k - k0][n - n0] = w[n][k]: GROUP rows at a time, so that writes are as contiguous as reads. */
static void widen_transposed(const xp_tensor *w, int64_t n0, int64_t nn, int64_t k0, int64_t kn, int absolute,
                             double *tile, double *rows) {
    for (int64_t n = 0; n < nn; n += GROUP) {
        const int64_t some = min64(GROUP, nn - n);
        for (int64_t g = 0; g < some; g++)
            widen(w, n0 + n + g, k0, kn, absolute, rows + g * DEEP);
        for (int64_t k = 0; k < kn; k++) {
            for (int64_t g = 0; g < some; g++)
                tile[k * WIDE + n + g] = rows[g * DEEP + k];
        }
    }
}

void xp_ref_linear_nt(const double *x, int64_t m, int64_t ldx, const xp_tensor *w, int absolute, double *y, int64_t ldy,
                      void *ws) {
    const int64_t N = w->dim[0], K = w->dim[1];
    double *tile = ws, *rows = tile + DEEP * WIDE;
    clear(y, m, N, ldy);
    for (int64_t n = 0; n < N && m > 0; n += WIDE) {
        const int64_t nn = min64(WIDE, N - n);
        for (int64_t k = 0; k < K; k += DEEP) {
            const int64_t kn = min64(DEEP, K - k);
            widen_transposed(w, n, nn, k, kn, absolute, tile, rows);
            xp_ref_linear_add(x + k, ldx, 1, tile, WIDE, m, nn, kn, y + n, ldy);
        }
    }
}

void xp_ref_linear_nn(const double *dy, int64_t m, int64_t lddy, const xp_tensor *w, int absolute, double *dx,
                      int64_t lddx, void *ws) {
    const int64_t N = w->dim[0], K = w->dim[1];
    double *tile = ws;
    clear(dx, m, K, lddx);
    for (int64_t k = 0; k < K && m > 0; k += WIDE) {
        const int64_t kn = min64(WIDE, K - k);
        for (int64_t n = 0; n < N; n += DEEP) {
            const int64_t nn = min64(DEEP, N - n);
            for (int64_t r = 0; r < nn; r++)
                widen(w, n + r, k, kn, absolute, tile + r * WIDE);
            xp_ref_linear_add(dy + n, lddy, 1, tile, WIDE, m, kn, nn, dx + k, lddx);
        }
    }
}
