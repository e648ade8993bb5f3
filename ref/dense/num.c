/* xp_dense numbers: rounding by integer arithmetic on the bits of a double, and the few sums and functions that the
 * rows share.
 *
 * A double is an integer times a power of two; a format is a grid of powers of two. Narrowing shifts the integer to the
 * grid's unit and decides by the bits that fall off, so no floating-point operation, and no rounding mode, takes part.
 * It must not share a line with the reference. */
#include <math.h>
#include <string.h>

#include "num.h"

/* man: stored mantissa bits; max: code of the largest finite value; over, nan: codes of an overflow and of NaN. */
typedef struct {
    int man, bias, sign_at, signed_over;
    uint64_t max, over, nan;
} format;

static const format F32 = {23, 127, 31, 1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000};
static const format BF16 = {7, 127, 15, 1, 0x7F7F, 0x7F80, 0x7FC0};
static const format F16 = {10, 15, 15, 1, 0x7BFF, 0x7C00, 0x7E00};
static const format E4M3 = {3, 7, 7, 1, 0x7E, 0x7F, 0x7F};
static const format E5M2 = {2, 15, 7, 1, 0x7B, 0x7C, 0x7E};
static const format E4M3FNUZ = {3, 8, 7, 0, 0x7F, 0x80, 0x80};
static const format E5M2FNUZ = {2, 16, 7, 0, 0x7F, 0x80, 0x80};
static const format E2M1 = {1, 1, 3, 1, 7, 7, 7};

static const uint64_t HIDDEN = (uint64_t)1 << 52;
static const uint64_t INF_BITS = (uint64_t)0x7FF << 52;

static uint64_t bits_of(double v) {
    uint64_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

/* The magnitude's code on the unbounded grid: codes go on counting beyond the largest finite one. a: bits of |v|,
 * finite. */
static inline uint64_t magnitude(uint64_t a, const format *f) {
    const int field = (int)(a >> 52);
    const uint64_t m = field ? (a & (HIDDEN - 1)) | HIDDEN : a;
    const int e = (field ? field : 1) - 1023; /* v = m * 2^(e-52) */
    const int emin = 1 - f->bias;
    const int under = e < emin ? emin - e : 0;
    const int drop = 52 - f->man + under; /* bits of m below the grid's unit: at least 29 */
    if (drop > 54)
        return 0; /* m < 2^53 is less than half a unit */
    const uint64_t rest = m & (((uint64_t)1 << drop) - 1), half = (uint64_t)1 << (drop - 1);
    uint64_t keep = m >> drop;
    keep += (uint64_t)(rest > half) | ((uint64_t)(rest == half) & keep & 1u);
    return under ? keep : ((uint64_t)(e - emin) << f->man) + keep; /* a carry runs into the exponent by itself */
}

static inline uint64_t narrow(double v, const format *f, int saturate) {
    const uint64_t u = bits_of(v), a = u << 1 >> 1;
    const uint64_t sign = (u >> 63) << f->sign_at;
    if (a > INF_BITS) /* where no code is left for NaN, its sign goes too */
        return f->signed_over && f->nan > f->max ? f->nan | sign : f->nan;
    const uint64_t c = a == INF_BITS ? f->max + 1 : magnitude(a, f);
    if (c > f->max)
        return saturate ? f->max | sign : (f->signed_over ? f->over | sign : f->over);
    return f->signed_over || c ? c | sign : 0; /* a format without -0 has NaN in its place */
}

/* Powers of two only: from the middle of 2^e and 2^(e+1), 1.5 * 2^e, on it is the upper one; right above 2^-127, the
 * least, already. */
static uint64_t narrow_e8m0(double v, int saturate) {
    const uint64_t u = bits_of(v), a = u << 1 >> 1;
    if (a == 0)
        return saturate ? 0 : 0xFF;
    if (u > INF_BITS) /* any negative value (the sign bit is on top), NaN */
        return 0xFF;
    if (u == INF_BITS)
        return saturate ? 0xFE : 0xFF;
    int64_t code = (int64_t)(u >> 52) - 1023 + 127;
    const uint64_t rest = u & (HIDDEN - 1), half = HIDDEN >> 1;
    code += rest >= half || (code == 0 && rest > 0);
    if (code > 0xFE)
        return saturate ? 0xFE : 0xFF;
    return code < 0 ? 0 : (uint64_t)code;
}

uint64_t xp_dense_narrow(double v, xp_dtype d, int saturate) {
    switch (d) {
    case XP_F64:
        return bits_of(v) - (saturate && isinf(v)); /* the largest finite double lies just below infinity */
    case XP_F32:
        return narrow(v, &F32, saturate);
    case XP_BF16:
        return narrow(v, &BF16, saturate);
    case XP_F16:
        return narrow(v, &F16, saturate);
    case XP_E4M3:
        return narrow(v, &E4M3, saturate);
    case XP_E5M2:
        return narrow(v, &E5M2, saturate);
    case XP_E4M3FNUZ:
        return narrow(v, &E4M3FNUZ, saturate);
    case XP_E5M2FNUZ:
        return narrow(v, &E5M2FNUZ, saturate);
    case XP_E8M0:
        return narrow_e8m0(v, saturate);
    case XP_E2M1:
        return narrow(v, &E2M1, 1);
    default:
        return 0; /* not a float: no stage asks for it */
    }
}

int64_t xp_dense_at(const xp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l) {
    const int64_t at[XP_MAXDIM] = {i, j, k, l};
    int64_t off = 0;
    for (int d = 0; d < t->ndim; d++)
        off += at[d] * t->stride[d];
    return off;
}

xp_tensor xp_dense_plane(const xp_tensor *t, int64_t i) {
    xp_tensor v = xp_tensor_rows(t, 0, i, i + 1);
    for (int d = 1; d < t->ndim; d++) {
        v.dim[d - 1] = t->dim[d];
        v.stride[d - 1] = t->stride[d];
    }
    v.ndim = t->ndim - 1;
    return v;
}

double xp_dense_get(const xp_tensor *t, int64_t at) {
    return xp_widen(t->data, t->dtype, at);
}

void xp_dense_put_code(const xp_tensor *t, int64_t at, uint64_t code) {
    if (t->dtype == XP_E2M1) { /* two codes a byte, the even one low: the other half stays */
        uint8_t *p = (uint8_t *)t->data + at / 2;
        *p = (uint8_t)((at & 1) ? (*p & 0x0Fu) | (code << 4) : (*p & 0xF0u) | code);
        return;
    }
    const uint32_t code32 = (uint32_t)code;
    const uint16_t code16 = (uint16_t)code;
    const uint8_t code8 = (uint8_t)code;
    const size_t bytes = (size_t)xp_dtype_bits(t->dtype) / 8;
    const void *from = bytes == 8 ? (const void *)&code : bytes == 4 ? (const void *)&code32 : (const void *)&code16;
    memcpy((char *)t->data + (size_t)at * bytes, bytes == 1 ? (const void *)&code8 : from, bytes);
}

void xp_dense_put(const xp_tensor *t, int64_t at, double v) {
    xp_dense_put_code(t, at, xp_dense_narrow(v, t->dtype, 0));
}

void xp_dense_read(const xp_tensor *t, int64_t at, int64_t n, double *out) {
    xp_widen_row(t->data, t->dtype, at, n, out);
}

void xp_dense_write(const xp_tensor *t, int64_t at, int64_t n, const double *v) {
    if (t->dtype == XP_F64) {
        memcpy((double *)t->data + at, v, (size_t)n * sizeof *v);
    } else if (t->dtype == XP_F32) {
        for (int64_t i = 0; i < n; i++) {
            const uint32_t c = (uint32_t)narrow(v[i], &F32, 0);
            memcpy((char *)t->data + (size_t)(at + i) * sizeof c, &c, sizeof c);
        }
    } else if (t->dtype == XP_BF16) {
        for (int64_t i = 0; i < n; i++) {
            const uint16_t c = (uint16_t)narrow(v[i], &BF16, 0);
            memcpy((char *)t->data + (size_t)(at + i) * sizeof c, &c, sizeof c);
        }
    } else {
        for (int64_t i = 0; i < n; i++)
            xp_dense_put(t, at + i, v[i]);
    }
}

void xp_dense_read_rows(const xp_tensor *t, int64_t lo, int64_t m, double *out) {
    for (int64_t i = 0; i < m; i++)
        xp_dense_read(t, xp_dense_at(t, lo + i, 0, 0, 0), t->dim[1], out + i * t->dim[1]);
}

void xp_dense_write_rows(const xp_tensor *t, int64_t lo, int64_t m, const double *v) {
    for (int64_t i = 0; i < m; i++)
        xp_dense_write(t, xp_dense_at(t, lo + i, 0, 0, 0), t->dim[1], v + i * t->dim[1]);
}

/* Rounding twice is harmless when the first rounding never lands on a value that the second takes for a tie: s is moved
 * to its neighbour with an odd last bit on the side of what was lost ("round to odd", Boldo and Melquiond 2008). */
void xp_dense_put_sum(const xp_tensor *t, int64_t at, double a, double b) {
    double s = a + b;
    if (t->dtype != XP_F64 && isfinite(s)) {
        const double b1 = s - a;
        const double lost = (a - (s - b1)) + (b - b1); /* exact: Knuth's two-sum */
        uint64_t u = bits_of(s);
        if (lost != 0 && !(u & 1)) {
            u = (lost > 0) == (s > 0) ? u + 1 : u - 1;
            memcpy(&s, &u, sizeof s);
        }
    }
    xp_dense_put(t, at, s);
}

double xp_dense_round(xp_dtype d, double v) {
    if (d == XP_F64)
        return v;
    uint64_t cell = 0;
    const xp_tensor t = xp_tensor_1d(&cell, d, 1);
    xp_dense_put(&t, 0, v);
    return xp_dense_get(&t, 0);
}

void xp_dense_round_all(xp_dtype d, int64_t n, double *v) {
    for (int64_t i = 0; i < n && d != XP_F64; i++)
        v[i] = xp_dense_round(d, v[i]);
}

double xp_dense_product(xp_dtype act, double w, double v) {
    return act == XP_F64 ? w * v : (double)((float)w * (float)v);
}

int64_t xp_dense_int(const xp_tensor *t, int64_t at) {
    switch (t->dtype) {
    case XP_I64:
        return ((const int64_t *)t->data)[at];
    case XP_I32:
        return ((const int32_t *)t->data)[at];
    default:
        return ((const uint8_t *)t->data)[at];
    }
}

void xp_dense_put_int(const xp_tensor *t, int64_t at, int64_t v) {
    if (t->dtype == XP_I64)
        ((int64_t *)t->data)[at] = v;
    else if (t->dtype == XP_I32)
        ((int32_t *)t->data)[at] = (int32_t)v;
    else
        ((uint8_t *)t->data)[at] = (uint8_t)v;
}

void xp_dense_zero(const xp_tensor *t, int64_t at, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        xp_dense_put_code(t, at + i, 0);
}

/* Eight partial sums: no order is promised, and the error is that of sums an eighth as long. */
double xp_dense_dot(const double *a, const double *b, int64_t n) {
    double s[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; j++)
            s[j] += a[i + j] * b[i + j];
    }
    for (; i < n; i++)
        s[i & 7] += a[i] * b[i];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

void xp_dense_axpy(double s, const double *x, int64_t n, double *y) {
    for (int64_t i = 0; i < n; i++)
        y[i] += s * x[i];
}

void xp_dense_map(const double *x, int64_t m, const xp_tensor *w, double *y, double *wide) {
    const int64_t n_out = w->dim[0], n_in = w->dim[1];
    for (int64_t n = 0; n < n_out; n++) {
        xp_dense_read(w, xp_dense_at(w, n, 0, 0, 0), n_in, wide);
        for (int64_t i = 0; i < m; i++)
            y[i * n_out + n] = xp_dense_dot(x + i * n_in, wide, n_in);
    }
}

void xp_dense_map_back(const double *dy, int64_t m, const xp_tensor *w, double *dx, double *wide) {
    const int64_t n_out = w->dim[0], n_in = w->dim[1];
    for (int64_t n = 0; n < n_out; n++) {
        xp_dense_read(w, xp_dense_at(w, n, 0, 0, 0), n_in, wide);
        for (int64_t i = 0; i < m; i++)
            xp_dense_axpy(dy[i * n_out + n], wide, n_in, dx + i * n_in);
    }
}

/* exp is only taken of what is not positive: no overflow, and full relative precision on both sides. */
double xp_dense_sigmoid(double z) {
    const double e = exp(-fabs(z));
    return z < 0 ? e / (1 + e) : 1 / (1 + e);
}

static int64_t largest(const double *l, int64_t n) {
    int64_t top = 0;
    for (int64_t i = 1; i < n; i++) {
        if (l[i] > l[top] || isnan(l[i]))
            top = isnan(l[top]) ? top : i;
    }
    return top;
}

/* log(sum exp(l - max)): the largest term is exactly 1 and left to log1p. */
static double lse_over_max(const double *l, int64_t n, int64_t top) {
    double rest = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i != top)
            rest += exp(l[i] - l[top]);
    }
    return log1p(rest);
}

double xp_dense_lse(const double *l, int64_t n) {
    if (n == 0)
        return -HUGE_VAL;
    const int64_t top = largest(l, n);
    return isfinite(l[top]) ? l[top] + lse_over_max(l, n, top) : (double)NAN;
}

void xp_dense_softmax(const double *l, int64_t n, double *p) {
    if (n == 0)
        return;
    const int64_t top = largest(l, n);
    const double max = l[top], over = lse_over_max(l, n, top);
    for (int64_t i = 0; i < n; i++)
        p[i] = isfinite(max) ? exp((l[i] - max) - over) : (double)NAN;
}

int64_t xp_dense_slot(int64_t token0, int64_t t, int64_t block) {
    return block > 0 ? (token0 + t) / block - token0 / block : 0;
}

size_t xp_dense_room(int64_t n, size_t each) {
    return ((size_t)n * each + 63) / 64 * 64;
}

void *xp_dense_carve(char **ws, int64_t n, size_t each) {
    void *p = *ws;
    *ws += xp_dense_room(n, each);
    return p;
}
