/* Second formulation of stages router and router_bwd: plain products in double; no rounding of x to the weight's dtype,
 * which the stage's bound covers. */
#include "dense.h"
#include "linear.h"

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_linear_ws(&((const xp_router_args *)args)->w);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_router_args *a = args;
    xp_dense_linear(&a->x, &a->w, &a->bias, &a->logits, x->ws);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_linear_ws(&((const xp_router_bwd_args *)args)->w);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_router_bwd_args *a = args;
    xp_dense_linear_back(&a->dlogits, &a->w, &a->dx, x->ws);
    return XP_OK;
}

const xp_kernel xp_dense_router = {
    .stage = &xp_stage_router,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_router_bwd = {
    .stage = &xp_stage_router_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
