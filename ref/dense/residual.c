/* Second formulation of stage residual: the exact sum, rounded once; a product with the factor by the machine's own
 * f32 arithmetic, where act is not f64. */
#include "dense.h"
#include "num.h"

/* a + b, or a, as a number of act. */
static double sum_in(xp_dtype act, double a, double b, int both) {
    uint64_t cell = 0;
    const xp_tensor t = xp_tensor_1d(&cell, act, 1);
    if (!both)
        return a;
    xp_dense_put_sum(&t, 0, a, b);
    return xp_dense_get(&t, 0);
}

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_residual_args *r = args;
    const xp_dtype act = r->a.dtype;
    const int both = r->b.data != NULL;
    const double factor = r->factor == 0 ? 1 : r->factor;
    const int plain = act == XP_F64 ? factor == 1 : (float)factor == 1.0f;
    for (int64_t i = 0; i < r->y.dim[0] * r->y.dim[1]; i++) {
        const int64_t t = i / r->y.dim[1], h = i % r->y.dim[1], y = xp_dense_at(&r->y, t, h, 0, 0);
        const double a = xp_dense_get(&r->a, xp_dense_at(&r->a, t, h, 0, 0));
        const double b = both ? xp_dense_get(&r->b, xp_dense_at(&r->b, t, h, 0, 0)) : 0;
        if (plain && both) {
            xp_dense_put_sum(&r->y, y, a, b);
        } else if (plain) {
            xp_dense_put(&r->y, y, a);
        } else {
            const double s = sum_in(act, a, b, both);
            xp_dense_put(&r->y, y, xp_dense_product(act, s, factor));
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_residual = {
    .stage = &xp_stage_residual,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
