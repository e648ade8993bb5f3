/* Second formulation of stage clip. The coefficient's roundings are part of its definition, so they are made here too;
 * a product is rounded once, to the gradient's dtype (of two values of 11 bits it is exact in f32).
 *
 * A sum or quotient of two floats, rounded to double and then to float, is rounded rightly: double has more than twice
 * the digits and two (Figueroa 1995). */
#include <math.h>

#include "dense.h"
#include "num.h"

static double to_f32(double v) {
    return xp_dense_round(XP_F32, v);
}

static double exact_coefficient(const xp_clip_args *a, double norm) {
    const double c = to_f32((double)a->max_norm / to_f32(norm + (double)a->eps));
    if (isnan(norm))
        return (double)NAN;
    return c <= 1 ? c : 1; /* a zero limit for a zero norm too, 0/0: there is nothing to clip */
}

/* One operation on f32 values, kept in d. */
static double kept(double v, xp_dtype d) {
    return xp_dense_round(d, to_f32(v));
}

static double torch_coefficient(const xp_clip_args *a, double norm) {
    const xp_dtype d = a->grad.dtype;
    const double inverse = kept(1 / kept(norm + (double)a->eps, d), d);
    const double c = kept(inverse * (double)a->max_norm, d);
    return c > 1 ? 1 : c;
}

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_clip_args *a = args;
    const double norm = xp_dense_get(&a->norm, 0);
    xp_dense_put(&a->coef, 0, (double)NAN);
    if (!isfinite(norm) && a->nonfinite != XP_NONFINITE_PROPAGATE)
        return a->nonfinite == XP_NONFINITE_SKIP ? XP_OK : XP_FAIL(XP_E_ARG, "clip: the norm is %g", norm);
    const double c = a->semantics == XP_TORCH ? torch_coefficient(a, norm) : exact_coefficient(a, norm);
    xp_dense_put(&a->coef, 0, c);
    if (c == 1 && a->semantics == XP_EXACT)
        return XP_OK;
    for (int64_t i = 0; i < a->grad.dim[0]; i++)
        xp_dense_put(&a->grad, i, xp_dense_get(&a->grad, i) * c);
    return XP_OK;
}

const xp_kernel xp_dense_clip = {
    .stage = &xp_stage_clip,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
