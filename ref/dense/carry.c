/* Second formulation of stages carry and carry_bwd: column by column, products rounded by the format's own rule and
 * sums from the exact sum of two numbers. */
#include "dense.h"
#include "num.h"

static double cell(const xp_tensor *t, int64_t i, int64_t j) {
    return xp_dense_get(t, xp_dense_at(t, i, j, 0, 0));
}

static xp_status run(const xp_exec *e, const void *args) {
    (void)e;
    const xp_carry_args *c = args;
    for (int64_t h = 0; h < c->y.dim[1]; h++) {
        const double scale = cell(&c->scale, h, 0);
        for (int64_t t = 0; t < c->y.dim[0]; t++) {
            const double over = xp_dense_round(c->a.dtype, cell(&c->b, t, h) * scale);
            xp_dense_put_sum(&c->y, xp_dense_at(&c->y, t, h, 0, 0), over, cell(&c->a, t, h));
        }
    }
    return XP_OK;
}

static xp_status bwd_run(const xp_exec *e, const void *args) {
    (void)e;
    const xp_carry_bwd_args *c = args;
    for (int64_t h = 0; h < c->db.dim[1]; h++) {
        const double scale = cell(&c->scale, h, 0);
        for (int64_t s = 0; s < c->dscale.dim[0]; s++) {
            double sum = 0;
            for (int64_t t = 0; t < c->db.dim[0]; t++) {
                if (xp_dense_slot(c->token0, t, c->block) == s)
                    sum += xp_dense_round(c->dy.dtype, cell(&c->b, t, h) * cell(&c->dy, t, h));
            }
            xp_dense_put(&c->dscale, xp_dense_at(&c->dscale, s, h, 0, 0), sum);
        }
        for (int64_t t = 0; t < c->db.dim[0]; t++)
            xp_dense_put(&c->db, xp_dense_at(&c->db, t, h, 0, 0), scale * cell(&c->dy, t, h));
    }
    return XP_OK;
}

const xp_kernel xp_dense_carry = {
    .stage = &xp_stage_carry,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
const xp_kernel xp_dense_carry_bwd = {
    .stage = &xp_stage_carry_bwd,
    .name = "dense",
    .det = XP_DET_RUN,
    .run = bwd_run,
};
