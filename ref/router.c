/* Stages router and router_bwd: see xp/router.h for the meaning.
 *
 * Rounding points: x to the weight's dtype (exact when that is wider), and the sum, bias included, to the logits'
 * dtype. The backward rounds once. The selection bias of some dialects is not this bias: stage route has it. */
#include "xp/router.h"

#include "check.h"
#include "ref.h"
#include "token.h"

/* ---- operands ---- */

enum { LOGITS = 3, BWD_DX = 2 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_router_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_router_args, w, "E,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "router"),
    XP_OPTIONAL(xp_router_args, bias, "E", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "router"),
    [LOGITS] = XP_OPERAND(xp_router_args, logits, "T,E", XP_OUT, XP_DT_ACT, XP_BOUND, "logits"),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_router_bwd_args, dlogits, "T,E", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    XP_OPERAND(xp_router_bwd_args, w, "E,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "router"),
    [BWD_DX] = XP_OPERAND(xp_router_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

/* ---- check ---- */

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_router, args, &d);
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_router_bwd, args, &d);
}

/* ---- cost ---- */

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_router_args *a = args;
    *out = (xp_cost){.flop = 2.0 * (double)a->x.dim[0] * (double)a->w.dim[0] * (double)a->w.dim[1],
                     .mem_bytes = xp_ref_bytes(&xp_stage_router, args)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_router_bwd_args *a = args;
    *out = (xp_cost){.flop = 2.0 * (double)a->dx.dim[0] * (double)a->w.dim[0] * (double)a->w.dim[1],
                     .mem_bytes = xp_ref_bytes(&xp_stage_router_bwd, args)};
}

/* ---- bound ---- */

/* x' = x cast to w's dtype, which one side may skip: |x - x'|. A dot product of H terms, one more with a bias (E in the
 * backward): gamma times the gauge sum |x'| |w| + |bias|, and the cast's error through |w|; then a rounding: token.h,
 * err.h. */
static xp_ref_map map_of(const xp_router_args *a) {
    return (xp_ref_map){.x = &a->x, .w = &a->w, .bias = &a->bias, .y = &a->logits, .cast = 1};
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    const xp_ref_map f = map_of(args);
    if (operand != LOGITS)
        return XP_FAIL(XP_E_BUG, "router: operand %d has no bound", operand);
    xp_ref_map_bound(&f, ref, ws, tol);
    return XP_OK;
}

static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    const xp_router_bwd_args *a = args;
    if (operand != BWD_DX)
        return XP_FAIL(XP_E_BUG, "router_bwd: operand %d has no bound", operand);
    xp_ref_map_back_bound(&a->dlogits, &a->w, &a->dx, ref, ws, tol);
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_ref_map_ws(&((const xp_router_args *)args)->w);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_ref_map f = map_of(args);
    xp_ref_map_run(&f, x->ws);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_ref_map_ws(&((const xp_router_bwd_args *)args)->w);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_router_bwd_args *a = args;
    xp_ref_map_back_run(&a->dlogits, &a->w, &a->dx, x->ws);
    return XP_OK;
}

/* ---- slices ---- */

static int64_t extent(const void *args) {
    return ((const xp_router_args *)args)->x.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_router_args *a = args;
    xp_router_args *o = out;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->logits = xp_tensor_rows(&a->logits, 0, lo, hi);
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_router_bwd_args *)args)->dx.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_router_bwd_args *a = args;
    xp_router_bwd_args *o = out;
    o->dlogits = xp_tensor_rows(&a->dlogits, 0, lo, hi);
    o->dx = xp_tensor_rows(&a->dx, 0, lo, hi);
}

/* ---- stages and rows ---- */

const xp_stage xp_stage_router = {
    .name = "router",
    .meaning = "gate logits of every token, in the router's own dtype",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_router_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = workspace,
    .extent = extent,
    .slice = slice,
};

const xp_stage xp_stage_router_bwd = {
    .name = "router_bwd",
    .meaning = "gradient of the gate logits' input",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_router_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_workspace,
    .extent = bwd_extent,
    .slice = bwd_slice,
};

const xp_kernel xp_ref_router = {
    .stage = &xp_stage_router,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_router_bwd = {
    .stage = &xp_stage_router_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
