/* The store behind parity.h: for each (site, layer, step) one array of 64-bit row hashes, and where the comparison is
 * by bound the values and tolerances of the kept rows, filled by one run and compared by the next. One lock guards the
 * list of arrays; rows of an array belong to the rank that brings them.
 */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"
#include "parity.h"

typedef struct {
    xp_parity_line line;
    int64_t total;
    uint64_t *hash; /* [total], 0: never recorded */
    uint8_t *seen;  /* [total], 1: compared */
    /* By bound: every stride-th row is kept, [kept, columns]. */
    int64_t stride, columns;
    double *value, *tol;
} row_set;

enum { KEPT = 1 << 21 }; /* elements kept of one set */

struct xp_parity {
    pthread_mutex_t lock;
    row_set *set;
    int sets, room;
    int comparing;
    int64_t dropped; /* slots without rows */
};

xp_status xp_parity_open(xp_parity **out) {
    *out = calloc(1, sizeof **out);
    if (!*out)
        return XP_FAIL(XP_E_NOMEM, "parity: %zu bytes", sizeof **out);
    if (pthread_mutex_init(&(*out)->lock, NULL) != 0) {
        free(*out);
        *out = NULL;
        return XP_FAIL(XP_E_BUG, "parity: no mutex");
    }
    return XP_OK;
}

static void free_set(row_set *s) {
    free(s->hash);
    free(s->seen);
    free(s->value);
    free(s->tol);
}

void xp_parity_close(xp_parity *p) {
    if (!p)
        return;
    for (int i = 0; i < p->sets; i++) {
        free_set(&p->set[i]);
    }
    free(p->set);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

void xp_parity_compare(xp_parity *p) {
    p->comparing = 1;
}

static int make_values(row_set *s, int64_t columns) {
    const int64_t rows = columns > 0 && KEPT / columns > 0 ? KEPT / columns : 1;
    s->line.by_bound = 1;
    s->columns = columns;
    s->stride = (s->total + rows - 1) / rows;
    /* Odd, so that a power of two of rows an expert does not keep the same ones of each. */
    s->stride = s->stride > 1 ? s->stride | 1 : 1;
    const size_t kept = (size_t)((s->total / s->stride + 1) * columns) + 1;
    s->value = calloc(kept, sizeof *s->value);
    s->tol = calloc(kept, sizeof *s->tol);
    return s->value && s->tol;
}

/* The set of (site, layer, step), made when it is new; NULL without memory. columns 0: by bits. Called under the lock.
 */
static row_set *set_of(xp_parity *p, const char *site, int layer, int step, int64_t total, int64_t columns) {
    for (int i = 0; i < p->sets; i++) {
        if (p->set[i].line.layer == layer && p->set[i].line.step == step && strcmp(p->set[i].line.site, site) == 0)
            return &p->set[i];
    }
    if (p->sets == p->room) {
        const int room = p->room ? 2 * p->room : 64;
        row_set *more = realloc(p->set, (size_t)room * sizeof *more);
        if (!more)
            return NULL;
        p->set = more;
        p->room = room;
    }
    row_set *s = &p->set[p->sets];
    memset(s, 0, sizeof *s);
    s->hash = calloc((size_t)total + 1, sizeof *s->hash);
    s->seen = calloc((size_t)total + 1, 1);
    s->total = total;
    if (!s->hash || !s->seen || (columns > 0 && !make_values(s, columns))) {
        free_set(s);
        return NULL;
    }
    strcpy(s->line.site, site);
    s->line.layer = layer;
    s->line.step = step;
    s->line.first = -1;
    s->line.rank = -1;
    p->sets++;
    return s;
}

static int64_t row_elements(const xp_tensor *t) {
    int64_t n = 1;
    for (int d = 1; d < t->ndim; d++)
        n *= t->dim[d];
    return n;
}

/* Where a dtype's NaN codes begin once the sign is off, and what is left of a code then; 0: it has none. */
static uint64_t nan_above(xp_dtype d, uint64_t *out_mask) {
    static const struct {
        uint64_t infinity, mask;
    } of[XP_NDTYPE] = {[XP_F64] = {UINT64_C(0x7ff) << 52, UINT64_MAX >> 1},
                       [XP_F32] = {0x7f800000, 0x7fffffff},
                       [XP_BF16] = {0x7f80, 0x7fff},
                       [XP_F16] = {0x7c00, 0x7fff}};
    *out_mask = of[d].mask;
    return of[d].infinity;
}

/* NaN is NaN: which payload and sign it has depends on the order in which operands met. */
static uint64_t hash_with_nans(const void *base, xp_dtype d, int64_t n, uint64_t infinity, uint64_t mask) {
    enum { CHUNK = 64 };
    uint64_t code[CHUNK], h = (uint64_t)d;
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t m = n - at < CHUNK ? n - at : CHUNK;
        for (int64_t i = 0; i < m; i++) {
            code[i] = xp_code(base, d, at + i);
            code[i] = (code[i] & mask) > infinity ? UINT64_MAX : code[i];
        }
        h = xp_hash64(code, (size_t)m * sizeof *code, h);
    }
    return h;
}

static uint64_t row_hash(const xp_tensor *t, int64_t row) {
    const void *base = xp_tensor_at(t, row, 0, 0, 0);
    const int64_t n = row_elements(t);
    uint64_t mask;
    const uint64_t infinity = nan_above(t->dtype, &mask);
    int64_t at = infinity ? 0 : n;
    while (at < n && (xp_code(base, t->dtype, at) & mask) <= infinity)
        at++;
    const uint64_t h = at < n ? hash_with_nans(base, t->dtype, n, infinity, mask)
                              : xp_hash64(base, xp_dtype_bytes(t->dtype, n), (uint64_t)t->dtype);
    return h ? h : 1;
}

/* A row is hashed as one run of bytes. */
static int rows_contiguous(const xp_tensor *t) {
    const xp_tensor row = xp_tensor_rows(t, 0, 0, 1);
    return xp_tensor_contiguous(&row);
}

static void count_row(row_set *s, int64_t row, int64_t elements, int same, int rank) {
    s->line.rows++;
    s->line.elements += elements;
    s->seen[row] = 1;
    s->line.different += !same;
    if (!same && (s->line.first < 0 || row < s->line.first)) {
        s->line.first = row;
        s->line.rank = rank;
    }
}

static xp_status check_rows(const char *site, const xp_tensor *t, int64_t row0, int64_t rows_total) {
    const size_t most = sizeof((xp_parity_line *)0)->site - 1;
    if (strlen(site) > most || !rows_contiguous(t))
        return XP_FAIL(XP_E_BUG, "parity: '%s' is longer than %zu characters, or its rows are not contiguous", site,
                       most);
    if (row0 < 0 || row0 + t->dim[0] > rows_total)
        return XP_FAIL(XP_E_BUG, "parity: rows %lld to %lld of '%s', which has %lld", (long long)row0,
                       (long long)(row0 + t->dim[0]), site, (long long)rows_total);
    return XP_OK;
}

/* The set, with the shape that these rows say. Takes the lock. */
static xp_status take_set(xp_parity *p, const char *site, int layer, int step, int64_t total, int64_t columns) {
    pthread_mutex_lock(&p->lock);
    const row_set *s = set_of(p, site, layer, step, total, columns);
    const int64_t had = s ? s->total : -1, wide = s ? s->columns : -1;
    pthread_mutex_unlock(&p->lock);
    if (had < 0)
        return XP_FAIL(XP_E_NOMEM, "parity: %lld rows of '%s'", (long long)total, site);
    if (had != total || wide != columns)
        return XP_FAIL(XP_E_BUG, "parity: '%s' has %lld rows of %lld here and had %lld of %lld", site, (long long)total,
                       (long long)columns, (long long)had, (long long)wide);
    return XP_OK;
}

xp_status xp_parity_rows(xp_parity *p, const char *site, int layer, int step, int rank, const xp_tensor *t,
                         int64_t row0, int64_t rows_total) {
    if (!p || t->dim[0] == 0)
        return XP_OK;
    XP_TRY(check_rows(site, t, row0, rows_total));
    XP_TRY(take_set(p, site, layer, step, rows_total, 0));
    for (int64_t i = 0; i < t->dim[0]; i++) {
        const uint64_t h = row_hash(t, i);
        pthread_mutex_lock(&p->lock);
        row_set *s = set_of(p, site, layer, step, rows_total, 0);
        if (p->comparing)
            count_row(s, row0 + i, row_elements(t), s->hash[row0 + i] == h, rank);
        else
            s->hash[row0 + i] = h;
        pthread_mutex_unlock(&p->lock);
    }
    return XP_OK;
}

/* 1 when |a - b| <= tol; equal infinities are equal, NaN equals NaN. An infinite tolerance promises nothing, as in
 * compare.c: where the exact sum is beyond a format, one run's parts may be infinities of both signs, whose sum is NaN.
 */
static int near(double a, double b, double tol, double *ratio) {
    if (a == b || (isnan(a) && isnan(b)) || (isinf(tol) && tol > 0.0))
        return 1;
    const double err = fabs(a - b), r = tol > 0 ? err / tol : (double)INFINITY;
    *ratio = !(r <= *ratio) ? r : *ratio;
    return err <= tol;
}

static void value_row(const xp_parity *p, row_set *s, const xp_tensor *t, const xp_tensor *tol, int64_t i, int64_t row,
                      int rank) {
    double *value = s->value + row / s->stride * s->columns, *bound = s->tol + row / s->stride * s->columns;
    const double *mine = xp_tensor_at(tol, i, 0, 0, 0);
    int same = p->comparing && s->hash[row] != 0;
    for (int64_t n = 0; n < s->columns; n++) {
        const double v = xp_widen(xp_tensor_at(t, i, 0, 0, 0), t->dtype, n);
        if (p->comparing) {
            /* The sum of the tolerances and the difference are rounded, too. */
            same &= near(v, value[n], (bound[n] + mine[n]) * (1.0 + 0x1p-50), &s->line.ratio);
        } else {
            value[n] = v;
            bound[n] = mine[n];
        }
    }
    if (p->comparing)
        count_row(s, row, s->columns, same, rank);
    else
        s->hash[row] = 1;
}

xp_status xp_parity_values(xp_parity *p, const char *site, int layer, int step, int rank, const xp_tensor *t,
                           const xp_tensor *tol, int64_t row0, int64_t rows_total) {
    const int64_t columns = row_elements(t);
    if (!p || t->dim[0] == 0 || columns == 0)
        return XP_OK;
    XP_TRY(check_rows(site, t, row0, rows_total));
    XP_TRY(take_set(p, site, layer, step, rows_total, columns));
    pthread_mutex_lock(&p->lock);
    row_set *s = set_of(p, site, layer, step, rows_total, columns);
    for (int64_t i = 0; i < t->dim[0]; i++) {
        if ((row0 + i) % s->stride == 0)
            value_row(p, s, t, tol, i, row0 + i, rank);
    }
    pthread_mutex_unlock(&p->lock);
    return XP_OK;
}

void xp_parity_dropped(xp_parity *p, int64_t slots) {
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    p->dropped += slots;
    pthread_mutex_unlock(&p->lock);
}

int64_t xp_parity_slots(const xp_parity *p) {
    return p->dropped;
}

int xp_parity_result(const xp_parity *p, int i, xp_parity_line *out) {
    if (i < 0 || i >= p->sets || p->dropped > 0)
        return 0;
    *out = p->set[i].line;
    for (int64_t r = 0; r < p->set[i].total; r++)
        out->missing += p->set[i].hash[r] != 0 && !p->set[i].seen[r];
    return 1;
}
