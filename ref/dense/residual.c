/* Second formulation of stage residual: the exact sum, rounded once. */
#include "dense.h"
#include "num.h"

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_residual_args *r = args;
    for (int64_t t = 0; t < r->y.dim[0]; t++) {
        const int64_t a = xp_dense_at(&r->a, t, 0, 0, 0), b = xp_dense_at(&r->b, t, 0, 0, 0);
        const int64_t y = xp_dense_at(&r->y, t, 0, 0, 0);
        for (int64_t h = 0; h < r->y.dim[1]; h++)
            xp_dense_put_sum(&r->y, y + h, xp_dense_get(&r->a, a + h), xp_dense_get(&r->b, b + h));
    }
    return XP_OK;
}

const xp_kernel xp_dense_residual = {
    .stage = &xp_stage_residual,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
