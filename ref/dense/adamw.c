/* Second formulation of stage adamw: decay first, then the moments' ratio with both bias corrections moved out of it
 * (1 - b^t through expm1 and log), all in double. */
#include <math.h>

#include "dense.h"
#include "num.h"

/* 1 - b^t without cancellation; b = 0 gives 1. */
static double correction(double b, int64_t t) {
    return -expm1((double)t * log(b));
}

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_adamw_args *a = args;
    const double rate = a->lr / correction(a->beta1, a->step), root2 = sqrt(correction(a->beta2, a->step));
    for (int64_t q = 0; q < a->decay.dim[0]; q++) {
        const double keep = xp_dense_int(&a->decay, q) ? 1 - a->lr * a->weight_decay : 1;
        for (int64_t i = xp_dense_int(&a->seg, q); i < xp_dense_int(&a->seg, q + 1); i++) {
            const double g = xp_dense_get(&a->grad, i);
            const double m = (1 - a->beta1) * g + a->beta1 * xp_dense_get(&a->m, i);
            const double v = (1 - a->beta2) * (g * g) + a->beta2 * xp_dense_get(&a->v, i);
            const double p = keep * xp_dense_get(&a->param, i) - rate * (m / (sqrt(v) / root2 + a->eps));
            xp_dense_put(&a->m, i, m);
            xp_dense_put(&a->v, i, v);
            xp_dense_put(&a->param, i, p);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_adamw = {
    .stage = &xp_stage_adamw,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
