/* Norms and linear maps of rows of tokens, forward and backward, as lists of stage calls: what blocks, their routers
 * and the top of the model share. No arithmetic happens here. */
#include "flow.h"
#include "xp/rmsnorm.h"
#include "xp/router.h"

xp_status rows_norm(xp_flow *f, const char *site, int i, const xp_tensor *x, xp_tensor *out, xp_tensor *out_rstd) {
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, x->dim[1], out));
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, f->T, out_rstd));
    xp_rmsnorm_args a = {
        .x = *x, .w = params_vector(f, i), .y = *out, .rstd = *out_rstd, .eps = f->plan->model.norm_eps};
    return xp_call(f->r, &xp_stage_rmsnorm, site, &a);
}

xp_status rows_norm_back(xp_flow *f, const char *site, int i, const xp_tensor *dy, const xp_tensor *x,
                         const xp_tensor *rstd, xp_tensor *out) {
    xp_tensor dw;
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, x->dim[1], out));
    XP_TRY(flow_new2(f, XP_KIND_GRAD, f->grad, f->block ? f->blocks.dim[0] : 1, x->dim[1], &dw));
    xp_rmsnorm_bwd_args a = {.dy = *dy,
                             .x = *x,
                             .w = params_vector(f, i),
                             .rstd = *rstd,
                             .dx = *out,
                             .dw = dw,
                             .token0 = f->token0,
                             .block = f->block};
    XP_TRY(xp_call(f->r, &xp_stage_rmsnorm_bwd, site, &a));
    XP_TRY(params_scatter_vector(f, i, &dw, &(flow_made){&xp_stage_rmsnorm_bwd, &a, "dw"}));
    flow_drop(f, &dw);
    return XP_OK;
}

xp_status rows_map(xp_flow *f, const char *site, int i, int bias, const xp_tensor *x, xp_tensor *out) {
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, f->plan->param[i].R, out));
    xp_router_args a = {.x = *x, .w = params_matrix(f, i), .logits = *out};
    if (bias >= 0)
        a.bias = params_vector(f, bias);
    return xp_call(f->r, &xp_stage_router, site, &a);
}

xp_status rows_map_back(xp_flow *f, const char *site, const char *wsite, int i, const xp_tensor *dy, const xp_tensor *x,
                        xp_tensor *out) {
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, f->plan->param[i].N, out));
    xp_router_bwd_args a = {.dlogits = *dy, .w = params_matrix(f, i), .dx = *out};
    XP_TRY(xp_call(f->r, &xp_stage_router_bwd, site, &a));
    return params_wgrad(f, i, wsite, dy, x);
}
