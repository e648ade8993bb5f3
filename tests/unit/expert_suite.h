/* What the tests of the experts' stages and of the whole layer share: data, comparisons in tolerances, and the gated
 * MLP as plain loops without rounding points.
 *
 * It shares no formula with ref/: what agrees with it agrees with a second writing of the same mathematics. */
#ifndef XP_TESTS_EXPERT_SUITE_H
#define XP_TESTS_EXPERT_SUITE_H

#include <math.h>

#include "unit/slope.h"
#include "unit/stage_suite.h"

static inline void randomise(const xp_tensor *t, uint64_t seed, double scale) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++)
        xp_ref_store(t->data, t->dtype, xp_tensor_offset(t, n), scale * real(seed, 5, (uint64_t)n));
}

static inline double value(const xp_tensor *t, int64_t n) {
    return xp_widen(t->data, t->dtype, xp_tensor_offset(t, n));
}

static inline int same_bits(const xp_tensor *a, const xp_tensor *b) {
    for (int64_t n = 0; n < xp_tensor_count(a); n++) {
        if (xp_code(a->data, a->dtype, xp_tensor_offset(a, n)) != xp_code(b->data, b->dtype, xp_tensor_offset(b, n)))
            return 0;
    }
    return xp_tensor_count(a) == xp_tensor_count(b);
}

static inline xp_tensor offsets_of(const int64_t *border, int64_t n) {
    const xp_tensor t = vector(XP_I64, n);
    for (int64_t i = 0; i < n; i++)
        set(&t, i, 0, (double)border[i]);
    return t;
}

/* sum weight * y, and what the tolerance of y and this sum can make of it. */
static inline double weighted(const xp_tensor *weight, const xp_tensor *y, const xp_tensor *tol, double *out_err) {
    double s = 0.0, e = 0.0, size = 0.0;
    for (int64_t n = 0; n < xp_tensor_count(y); n++) {
        const double w = value(weight, n), v = value(y, n);
        s += w * v;
        e += fabs(w) * value(tol, n);
        size += fabs(w * v);
    }
    *out_err = e + xp_ref_gamma(xp_tensor_count(y), XP_F64) * size;
    return s;
}

/* A gradient [R,C] or [L,R,C] as wgrad writes it. */
static inline xp_tensor gradient(xp_dtype d, int64_t B, int64_t L, int64_t N, int64_t R) {
    const int64_t dim[] = {B, L, N, R};
    return xp_tensor_of(take(xp_dtype_bytes(d, B * L * N * R)), d, 4, dim);
}

/* How a set of values compares with the reference's, in tolerances. */
typedef struct {
    double most;     /* largest |got - ref| / tol */
    int64_t over, n; /* elements beyond their tolerance, and all */
} verdict;

static inline verdict compare(const xp_tensor *got, const xp_tensor *ref, const xp_tensor *tol, int64_t rows) {
    verdict v = {0.0, 0, 0};
    for (int64_t n = 0; n < rows * ref->dim[ref->ndim - 1]; n++) {
        const double err = fabs(value(got, n) - value(ref, n)), t = value(tol, n);
        v.over += !(err <= t);
        v.most = err / t > v.most ? err / t : v.most;
        v.n++;
    }
    return v;
}

static inline double sigmoid(double v) {
    return 1.0 / (1.0 + exp(-v));
}

/* The chain of expert.h for one row with no rounding but that of the arithmetic; narrow: every operation in float.
 * upside_down: gate and up rows change places, a real layout mistake. */
static inline double dot_of(const xp_tensor *w, int64_t row, const double *v, int64_t n, int narrow) {
    float f = 0.0F;
    double s = 0.0;
    for (int64_t k = 0; k < n; k++) {
        f += (float)v[k] * (float)get(w, row, k);
        s += v[k] * get(w, row, k);
    }
    return narrow ? (double)f : s;
}

static inline double op(double v, int narrow) {
    return narrow ? (double)(float)v : v;
}

typedef struct {
    int narrow, upside_down;
} way;

static inline void plain_row(const xp_tensor *w1, const xp_tensor *w2, const double *x, way o, double *pre, double *act,
                             double *y) {
    const int64_t H = w2->dim[0], F = w2->dim[1];
    for (int64_t j = 0; j < 2 * F; j++)
        pre[j] = dot_of(w1, j, x, H, o.narrow);
    for (int64_t j = 0; j < F; j++) {
        const double g = pre[o.upside_down ? j + F : j], u = pre[o.upside_down ? j : j + F];
        act[j] = op(op(g * op(sigmoid(g), o.narrow), o.narrow) * u, o.narrow);
    }
    for (int64_t h = 0; h < H; h++)
        y[h] = dot_of(w2, h, act, F, o.narrow);
}

static inline double column_dot(const xp_tensor *w, int64_t col, const double *v, int64_t n, int narrow) {
    double s = 0.0;
    for (int64_t k = 0; k < n; k++)
        s = op(s + op(v[k] * get(w, k, col), narrow), narrow);
    return s;
}

static inline void plain_back(const xp_tensor *w1, const xp_tensor *w2, const double *dy, const double *pre, way o,
                              double *dpre, double *dx) {
    const int64_t H = w2->dim[0], F = w2->dim[1];
    for (int64_t j = 0; j < F; j++) {
        const double g = pre[o.upside_down ? j + F : j], u = pre[o.upside_down ? j : j + F];
        const double da = column_dot(w2, j, dy, H, o.narrow), s = op(sigmoid(g), o.narrow);
        const double slope = op(s * op(1.0 + op(g * op(1.0 - s, o.narrow), o.narrow), o.narrow), o.narrow);
        dpre[j] = op(op(da * u, o.narrow) * slope, o.narrow);
        dpre[j + F] = op(da * op(g * s, o.narrow), o.narrow);
    }
    for (int64_t h = 0; h < H; h++)
        dx[h] = column_dot(w1, h, dpre, 2 * F, o.narrow);
}

static inline xp_tensor plane(const xp_tensor *t, int64_t l) {
    xp_tensor out = xp_tensor_2d(xp_tensor_at(t, l, 0, 0, 0), t->dtype, t->dim[1], t->dim[2]);
    out.stride[0] = t->stride[1];
    return out;
}

enum { WIDEST = 128 };

#endif
