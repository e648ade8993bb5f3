/* Second formulation of stages embed and embed_bwd. The gradient is asked for, not pushed: each table row looks for the
 * tokens that name it. */
#include <string.h>

#include "dense.h"
#include "num.h"

static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    const xp_embed_args *a = args;
    for (int64_t t = 0; t < a->token.dim[0]; t++) {
        const int64_t row = xp_dense_at(&a->table, xp_dense_int(&a->token, t), 0, 0, 0);
        const int64_t pos = xp_dense_at(&a->pos, t, 0, 0, 0), y = xp_dense_at(&a->y, t, 0, 0, 0);
        for (int64_t h = 0; h < a->y.dim[1]; h++)
            xp_dense_put_sum(&a->y, y + h, xp_dense_get(&a->table, row + h), xp_dense_get(&a->pos, pos + h));
    }
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_embed_bwd_args *a = args;
    return 2 * xp_dense_room(a->dtable.dim[2], sizeof(double));
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_embed_bwd_args *a = args;
    const xp_tensor *d = &a->dtable;
    char *ws = x->ws;
    double *sum = xp_dense_carve(&ws, d->dim[2], sizeof *sum);
    double *dy = xp_dense_carve(&ws, d->dim[2], sizeof *dy);
    for (int64_t i = 0; i < d->dim[0] * d->dim[1]; i++) {
        const int64_t b = i / d->dim[1], v = i % d->dim[1];
        memset(sum, 0, (size_t)d->dim[2] * sizeof *sum);
        for (int64_t t = 0; t < a->token.dim[0]; t++) {
            if (xp_dense_int(&a->token, t) != v || xp_dense_slot(a->token0, t, a->block) != b)
                continue;
            xp_dense_read(&a->dy, xp_dense_at(&a->dy, t, 0, 0, 0), d->dim[2], dy);
            xp_dense_axpy(1, dy, d->dim[2], sum);
        }
        xp_dense_write(d, xp_dense_at(d, b, v, 0, 0), d->dim[2], sum);
    }
    return XP_OK;
}

const xp_kernel xp_dense_embed = {
    .stage = &xp_stage_embed,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
const xp_kernel xp_dense_embed_bwd = {
    .stage = &xp_stage_embed_bwd,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
