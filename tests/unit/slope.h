/* Finite differences of a stage's scalar objective along a random direction, with an error that is derived.
 *
 * Central differences at h, 2h and 4h give two Richardson values, R(h) and R(2h), each off by a multiple of h^4: their
 * distance bounds the truncation of R(h). The objective's own error (from the stage's bound) is divided by h. */
#ifndef XP_TESTS_SLOPE_H
#define XP_TESTS_SLOPE_H

#include <math.h>

#include "unit/stage_suite.h"

/* A row run again and again in one workspace, unchecked. */
static inline xp_exec slope_exec(const xp_kernel *k, const xp_mesh *m, const void *args) {
    const size_t bytes = k->workspace ? k->workspace(args, m) : 0;
    return (xp_exec){.mesh = m, .ws = take(bytes), .ws_bytes = bytes};
}

/* The objective with the operands as they are now, and how far it may be from the exact one. */
typedef double (*slope_fn)(void *ctx, double *out_err);

/* Element n of a tensor of up to four dimensions, f64. */
static inline double *slope_at(const xp_tensor *t, int64_t n) {
    return (double *)t->data + xp_tensor_offset(t, n);
}

/* The direction: 24 random bits for each element. */
static inline double slope_direction(uint64_t seed, int64_t n) {
    return real(seed, 77, (uint64_t)n);
}

static inline void slope_move(const xp_tensor *t, uint64_t seed, double by) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++)
        *slope_at(t, n) += by * slope_direction(seed, n);
}

/* t must hold multiples of 2^-24 below 2 in magnitude, so that moving there and back is exact. */
static inline double slope_difference(const xp_tensor *t, uint64_t seed, double h, slope_fn f, void *ctx,
                                      double *out_err) {
    double above, below, err[2];
    slope_move(t, seed, h);
    above = f(ctx, &err[0]);
    slope_move(t, seed, -2.0 * h);
    below = f(ctx, &err[1]);
    slope_move(t, seed, h);
    *out_err = (err[0] + err[1]) / (2.0 * h);
    return (above - below) / (2.0 * h);
}

/* Compares <grad, direction> with the slope of f; the tolerance must itself be below 1e-8 of the gradient's size. */
static inline void slope_expect(const char *what, const xp_tensor *t, const xp_tensor *grad, uint64_t seed, slope_fn f,
                                void *ctx) {
    const double h = 0x1p-7;
    double d[3], err[3], inner = 0.0, size = 0.0;
    for (int i = 0; i < 3; i++)
        d[i] = slope_difference(t, seed, h * (double)(1 << i), f, ctx, &err[i]);
    for (int64_t n = 0; n < xp_tensor_count(t); n++) {
        inner += *slope_at(grad, n) * slope_direction(seed, n);
        size += fabs(*slope_at(grad, n) * slope_direction(seed, n));
    }
    const double fine = (4.0 * d[0] - d[1]) / 3.0, coarse = (4.0 * d[1] - d[2]) / 3.0;
    const double tol = fabs(fine - coarse) + (4.0 * err[0] + err[1]) / 3.0 + 0x1p-45 * size;
    if (!(fabs(fine - inner) <= tol) || !(tol < 1e-5 * size))
        fail_msg("%s: slope %.17g, gradient %.17g, tolerance %g, size %g", what, fine, inner, tol, size);
}

#endif
