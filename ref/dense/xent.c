/* Second formulation of stages xent and xent_bwd: log-sum-exp through log1p, the target's gradient through expm1, the
 * total as a sum of what every rank shows. */
#include <math.h>

#include "dense.h"
#include "num.h"
#include "share.h"

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_xent_args *a = args;
    const int ranks = m->axis[XP_WORLD]->size;
    return xp_dense_room(a->logits.dim[1], sizeof(double)) + xp_dense_room(2 * (int64_t)ranks, sizeof(double)) +
           xp_dense_room(ranks, sizeof(int64_t));
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_xent_args *a = args;
    const int64_t v_n = a->logits.dim[1];
    xp_comm *world = x->mesh->axis[XP_WORLD];
    char *ws = x->ws;
    double *l = xp_dense_carve(&ws, v_n, sizeof *l);
    double *all = xp_dense_carve(&ws, 2 * (int64_t)world->size, sizeof *all);
    int64_t *ones = xp_dense_carve(&ws, world->size, sizeof *ones);
    double mine[2] = {0, 0}; /* loss, tokens */
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        const int64_t target = xp_dense_int(&a->target, t);
        xp_dense_read(&a->logits, xp_dense_at(&a->logits, t, 0, 0, 0), v_n, l);
        const double lse = xp_dense_lse(l, v_n);
        const double loss = target < 0 ? 0 : lse - l[target];
        xp_dense_put(&a->lse, t, lse);
        xp_dense_put(&a->loss, t, loss);
        mine[0] += loss;
        mine[1] += target >= 0;
    }
    XP_TRY(xp_dense_all(x, world, XP_F64, mine, 2, all, ones));
    double total = 0, count = 0;
    for (int r = 0; r < world->size; r++) {
        total += all[2 * r];
        count += all[2 * r + 1];
    }
    xp_dense_put(&a->total, 0, total);
    xp_dense_put_int(&a->count, 0, (int64_t)count);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_room(((const xp_xent_bwd_args *)args)->logits.dim[1], sizeof(double));
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_xent_bwd_args *a = args;
    const int64_t v_n = a->logits.dim[1];
    double *d = x->ws;
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        const int64_t target = xp_dense_int(&a->target, t);
        const double lse = xp_dense_get(&a->lse, t);
        xp_dense_read(&a->logits, xp_dense_at(&a->logits, t, 0, 0, 0), v_n, d);
        for (int64_t v = 0; v < v_n; v++)
            d[v] = target < 0 ? 0 : (v == target ? expm1(d[v] - lse) : exp(d[v] - lse));
        xp_dense_write(&a->dlogits, xp_dense_at(&a->dlogits, t, 0, 0, 0), v_n, d);
    }
    return XP_OK;
}

const xp_kernel xp_dense_xent = {
    .stage = &xp_stage_xent,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_xent_bwd = {
    .stage = &xp_stage_xent_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
