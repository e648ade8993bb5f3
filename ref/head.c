/* Stages head and head_bwd: see xp/head.h for the meaning.
 *
 * One rounding each, from a double sum over the ascending index. Must not cast x to the weight's dtype: only the router
 * has that rule. */
#include "xp/head.h"

#include "check.h"
#include "ref.h"
#include "token.h"

/* ---- operands ---- */

enum { LOGITS = 2, BWD_DX = 2 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_head_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_head_args, w, "V,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    [LOGITS] = XP_OPERAND(xp_head_args, logits, "T,V", XP_OUT, XP_DT_ACT, XP_BOUND, "logits"),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_head_bwd_args, dlogits, "T,V", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    XP_OPERAND(xp_head_bwd_args, w, "V,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    [BWD_DX] = XP_OPERAND(xp_head_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

/* ---- check ---- */

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_head, args, &d);
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_head_bwd, args, &d);
}

/* ---- cost ---- */

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_head_args *a = args;
    *out = (xp_cost){.flop = 2.0 * (double)a->x.dim[0] * (double)a->w.dim[0] * (double)a->w.dim[1],
                     .mem_bytes = xp_ref_bytes(&xp_stage_head, args)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_head_bwd_args *a = args;
    *out = (xp_cost){.flop = 2.0 * (double)a->dx.dim[0] * (double)a->w.dim[0] * (double)a->w.dim[1],
                     .mem_bytes = xp_ref_bytes(&xp_stage_head_bwd, args)};
}

/* ---- bound ---- */

/* A dot product of H terms (V in the backward) of exact inputs, gamma times the gauge sum |x| |w|, and one rounding:
 * token.h, err.h. */
static xp_ref_map map_of(const xp_head_args *a) {
    return (xp_ref_map){.x = &a->x, .w = &a->w, .y = &a->logits};
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    const xp_ref_map f = map_of(args);
    if (operand != LOGITS)
        return XP_FAIL(XP_E_BUG, "head: operand %d has no bound", operand);
    xp_ref_map_bound(&f, ref, ws, tol);
    return XP_OK;
}

static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    const xp_head_bwd_args *a = args;
    if (operand != BWD_DX)
        return XP_FAIL(XP_E_BUG, "head_bwd: operand %d has no bound", operand);
    xp_ref_map_back_bound(&a->dlogits, &a->w, &a->dx, ref, ws, tol);
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_ref_map_ws(&((const xp_head_args *)args)->w);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_ref_map f = map_of(args);
    xp_ref_map_run(&f, x->ws);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_ref_map_ws(&((const xp_head_bwd_args *)args)->w);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_head_bwd_args *a = args;
    xp_ref_map_back_run(&a->dlogits, &a->w, &a->dx, x->ws);
    return XP_OK;
}

/* ---- slices ---- */

static int64_t extent(const void *args) {
    return ((const xp_head_args *)args)->x.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_head_args *a = args;
    xp_head_args *o = out;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->logits = xp_tensor_rows(&a->logits, 0, lo, hi);
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_head_bwd_args *)args)->dx.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_head_bwd_args *a = args;
    xp_head_bwd_args *o = out;
    o->dlogits = xp_tensor_rows(&a->dlogits, 0, lo, hi);
    o->dx = xp_tensor_rows(&a->dx, 0, lo, hi);
}

/* ---- stages and rows ---- */

const xp_stage xp_stage_head = {
    .name = "head",
    .meaning = "vocabulary logits of every token",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_head_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = workspace,
    .extent = extent,
    .slice = slice,
};

const xp_stage xp_stage_head_bwd = {
    .name = "head_bwd",
    .meaning = "gradient of the vocabulary logits' input",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_head_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_workspace,
    .extent = bwd_extent,
    .slice = bwd_slice,
};

const xp_kernel xp_ref_head = {
    .stage = &xp_stage_head,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_head_bwd = {
    .stage = &xp_stage_head_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
