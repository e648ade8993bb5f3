/* Second formulation of stage clip. The coefficient's two roundings to f32 are part of its definition, so they are made
 * here too; the products are left unrounded.
 *
 * A sum or quotient of two floats, rounded to double and then to float, is rounded rightly: double has more than twice
 * the digits and two (Figueroa 1995). */
#include <math.h>

#include "dense.h"
#include "num.h"

static double to_f32(double v) {
    const uint32_t code = (uint32_t)xp_dense_narrow(v, XP_F32, 0);
    return xp_widen(&code, XP_F32, 0);
}

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_clip_args *a = args;
    const double norm = xp_dense_get(&a->norm, 0);
    double c = to_f32((double)a->max_norm / to_f32(norm + (double)a->eps));
    if (!isfinite(norm))
        c = (double)NAN;
    else if (!(c <= 1)) /* a zero limit for a zero norm too, 0/0: there is nothing to clip */
        c = 1;
    xp_dense_put(&a->coef, 0, c);
    if (isnan(c) || c == 1)
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
