/* Second formulation of stages head and head_bwd: plain products in double. */
#include "dense.h"
#include "linear.h"

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_linear_ws(&((const xp_head_args *)args)->w);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_head_args *a = args;
    xp_dense_linear(&a->x, &a->w, NULL, &a->logits, x->ws);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_linear_ws(&((const xp_head_bwd_args *)args)->w);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_head_bwd_args *a = args;
    xp_dense_linear_back(&a->dlogits, &a->w, &a->dx, x->ws);
    return XP_OK;
}

const xp_kernel xp_dense_head = {
    .stage = &xp_stage_head,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_head_bwd = {
    .stage = &xp_stage_head_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
