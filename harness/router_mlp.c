/* The MLP of a router (router_in recurrent_mlp), forward and backward, as a list of stage calls.
 *
 * Its state goes on from MoE block to MoE block, and the state's gradient back: what a block adds to its own state is
 * the one before's, which therefore stays until both backwards are done. No arithmetic happens here. */
#include "flow.h"
#include "xp/carry.h"
#include "xp/gelu.h"
#include "xp/residual.h"

static int param(const xp_flow *f, int y, xp_weight w) {
    return f->lp[y].mlp[w - XP_W_ROUTER_DOWN];
}

static xp_status rows(xp_flow *f, xp_tensor *out) {
    return flow_new2(f, XP_KIND_ACT, f->act, f->T, f->R, out);
}

/* The bias follows the matrix in the list of weights. */
static xp_status map(xp_flow *f, int y, const char *site, xp_weight w, const xp_tensor *x, xp_tensor *out) {
    return rows_map(f, site, param(f, y, w), param(f, y, w + 1), x, out);
}

static xp_status gelu(xp_flow *f, const char *site, const xp_tensor *x, xp_tensor *out) {
    XP_TRY(rows(f, out));
    xp_gelu_args a = {.x = *x, .y = *out};
    return xp_call(f->r, &xp_stage_gelu, site, &a);
}

static xp_status forward_state(xp_flow *f, int y) {
    layer_state *s = &f->ls[y];
    const int scale = param(f, y, XP_W_ROUTER_STATE);
    xp_tensor own;
    if (scale < 0)
        return map(f, y, "router down", XP_W_ROUTER_DOWN, &s->xn, &s->state);
    XP_TRY(map(f, y, "router down", XP_W_ROUTER_DOWN, &s->xn, &own));
    XP_TRY(rows(f, &s->state));
    xp_carry_args a = {.a = own, .b = f->ls[y - 1].state, .scale = params_vector(f, scale), .y = s->state};
    XP_TRY(xp_call(f->r, &xp_stage_carry, "carry", &a));
    flow_drop(f, &own);
    return XP_OK;
}

xp_status router_mlp_forward(xp_flow *f, int y) {
    layer_state *s = &f->ls[y];
    XP_TRY(forward_state(f, y));
    XP_TRY(flow_trace(f, "router state", y, &s->state));
    XP_TRY(rows_norm(f, "router rmsnorm", param(f, y, XP_W_ROUTER_NORM), &s->state, &s->mnorm, &s->mrstd));
    XP_TRY(map(f, y, "router fc1", XP_W_ROUTER_FC1, &s->mnorm, &s->fc1));
    XP_TRY(gelu(f, "router gelu 1", &s->fc1, &s->act1));
    XP_TRY(map(f, y, "router fc2", XP_W_ROUTER_FC2, &s->act1, &s->fc2));
    return gelu(f, "router gelu 2", &s->fc2, &s->act2);
}

/* And the gradient of the map's bias. */
static xp_status map_back(xp_flow *f, int y, const char *site, const char *wsite, const char *bsite, xp_weight w,
                          const xp_tensor *dy, const xp_tensor *x, xp_tensor *out) {
    const xp_tensor ones = xp_tensor_rows(&f->ones, 0, 0, f->T);
    XP_TRY(rows_map_back(f, site, wsite, param(f, y, w), dy, x, out));
    return params_wgrad(f, param(f, y, w + 1), bsite, dy, &ones);
}

static xp_status gelu_back(xp_flow *f, const char *site, const xp_tensor *dy, const xp_tensor *x, xp_tensor *out) {
    XP_TRY(rows(f, out));
    xp_gelu_bwd_args a = {.dy = *dy, .x = *x, .dx = *out};
    return xp_call(f->r, &xp_stage_gelu_bwd, site, &a);
}

/* The state of the block before gets its gradient, f->dstate, and so do the factors. */
static xp_status carry_back(xp_flow *f, int y, const xp_tensor *dstate) {
    const int i = param(f, y, XP_W_ROUTER_STATE);
    xp_tensor dscale;
    XP_TRY(rows(f, &f->dstate));
    XP_TRY(flow_new2(f, XP_KIND_GRAD, f->grad, f->block ? f->blocks.dim[0] : 1, f->R, &dscale));
    xp_carry_bwd_args a = {.dy = *dstate,
                           .b = f->ls[y - 1].state,
                           .scale = params_vector(f, i),
                           .db = f->dstate,
                           .dscale = dscale,
                           .token0 = f->token0,
                           .block = f->block};
    XP_TRY(xp_call(f->r, &xp_stage_carry_bwd, "carry_bwd", &a));
    XP_TRY(params_scatter_vector(f, i, &dscale, &(flow_made){&xp_stage_carry_bwd, &a, "dscale"}));
    flow_drop(f, &dscale);
    return XP_OK;
}

/* *io becomes r(*io + f->dstate), which is dropped. */
static xp_status add_state(xp_flow *f, xp_tensor *io) {
    xp_tensor sum;
    if (!f->dstate.data)
        return XP_OK;
    XP_TRY(rows(f, &sum));
    xp_residual_args a = {.a = *io, .b = f->dstate, .y = sum};
    XP_TRY(xp_call(f->r, &xp_stage_residual, "residual d state", &a));
    flow_drop(f, &f->dstate);
    flow_drop(f, io);
    *io = sum;
    return XP_OK;
}

xp_status router_mlp_backward(xp_flow *f, int y, const xp_tensor *da, xp_tensor *out) {
    const layer_state *s = &f->ls[y];
    xp_tensor dfc2, dact1, dfc1, dnorm, dstate;
    XP_TRY(gelu_back(f, "router gelu_bwd 2", da, &s->fc2, &dfc2));
    XP_TRY(map_back(f, y, "router fc2", "wgrad router fc2", "wgrad router fc2 bias", XP_W_ROUTER_FC2, &dfc2, &s->act1,
                    &dact1));
    flow_drop(f, &dfc2);
    XP_TRY(gelu_back(f, "router gelu_bwd 1", &dact1, &s->fc1, &dfc1));
    flow_drop(f, &dact1);
    XP_TRY(map_back(f, y, "router fc1", "wgrad router fc1", "wgrad router fc1 bias", XP_W_ROUTER_FC1, &dfc1, &s->mnorm,
                    &dnorm));
    flow_drop(f, &dfc1);
    XP_TRY(
        rows_norm_back(f, "router rmsnorm_bwd", param(f, y, XP_W_ROUTER_NORM), &dnorm, &s->state, &s->mrstd, &dstate));
    flow_drop(f, &dnorm);
    XP_TRY(add_state(f, &dstate));
    XP_TRY(flow_trace(f, "router d state", y, &dstate));
    if (param(f, y, XP_W_ROUTER_STATE) >= 0)
        XP_TRY(carry_back(f, y, &dstate));
    XP_TRY(map_back(f, y, "router down", "wgrad router down", "wgrad router down bias", XP_W_ROUTER_DOWN, &dstate,
                    &s->xn, out));
    flow_drop(f, &dstate);
    return XP_OK;
}

void router_mlp_drop(xp_flow *f, int y) {
    layer_state *s = &f->ls[y];
    xp_tensor *const all[] = {&s->state, &s->mnorm, &s->mrstd, &s->fc1, &s->act1, &s->fc2, &s->act2};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        flow_drop(f, all[i]);
}
