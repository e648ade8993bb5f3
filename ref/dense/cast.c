/* Second formulation of stage cast: each element is a pair of integers, shifted to the target's grid. See num.c. */
#include "dense.h"
#include "num.h"

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_cast_args *a = args;
    for (int64_t i = 0; i < a->x.dim[0]; i++)
        xp_dense_put_code(&a->y, i, xp_dense_narrow(xp_dense_get(&a->x, i), a->y.dtype, a->saturate));
    return XP_OK;
}

const xp_kernel xp_dense_cast = {
    .stage = &xp_stage_cast,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
