/* Second formulation of stage sgd: the new buffer and the new parameter, each from one expression in double. */
#include "dense.h"
#include "num.h"

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_sgd_args *a = args;
    for (int64_t q = 0; q < a->decay.dim[0]; q++) {
        const int decayed = xp_dense_int(&a->decay, q) && a->weight_decay != 0; /* 0 * inf would be NaN */
        for (int64_t i = xp_dense_int(&a->seg, q); i < xp_dense_int(&a->seg, q + 1); i++) {
            const double p = xp_dense_get(&a->param, i);
            double d = xp_dense_get(&a->grad, i) + (decayed ? a->weight_decay * p : 0);
            if (a->momentum != 0) {
                if (a->step > 1)
                    d += a->momentum * xp_dense_get(&a->buf, i);
                xp_dense_put(&a->buf, i, d);
            }
            xp_dense_put(&a->param, i, p - a->lr * d);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_sgd = {
    .stage = &xp_stage_sgd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
