/* Second formulation of stages gelu and gelu_bwd: by erfc, which keeps the digits of the left tail. */
#include <math.h>

#include "dense.h"
#include "num.h"

/* P(x), of which 2 P(x) = erfc(-x / sqrt 2). */
static double share(double x) {
    return erfc(-x / sqrt(2.0)) / 2;
}

static xp_status run(const xp_exec *e, const void *args) {
    (void)e;
    const xp_gelu_args *a = args;
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        for (int64_t h = 0; h < a->x.dim[1]; h++) {
            const double x = xp_dense_get(&a->x, xp_dense_at(&a->x, t, h, 0, 0));
            xp_dense_put(&a->y, xp_dense_at(&a->y, t, h, 0, 0), share(x) * x);
        }
    }
    return XP_OK;
}

static xp_status bwd_run(const xp_exec *e, const void *args) {
    (void)e;
    const xp_gelu_bwd_args *a = args;
    const double pi = acos(-1.0);
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        for (int64_t h = 0; h < a->x.dim[1]; h++) {
            const double x = xp_dense_get(&a->x, xp_dense_at(&a->x, t, h, 0, 0));
            const double dy = xp_dense_get(&a->dy, xp_dense_at(&a->dy, t, h, 0, 0));
            const double bend = x * (exp(-(x / 2) * x) / sqrt(2 * pi));
            xp_dense_put(&a->dx, xp_dense_at(&a->dx, t, h, 0, 0), (share(x) + bend) * dy);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_gelu = {
    .stage = &xp_stage_gelu,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
const xp_kernel xp_dense_gelu_bwd = {
    .stage = &xp_stage_gelu_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = bwd_run,
};
