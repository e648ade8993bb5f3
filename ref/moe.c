/* Stage moe: see xp/moe.h for the meaning.
 *
 * The reference row is the layer's other reference rows, called in the order of the step on a mesh of one rank: it adds
 * no arithmetic of its own. Every intermediate has the dtype of x, or the one that the record names. Weight gradients
 * are sums over this rank's tokens, undivided. The bound is in moe_bound.c. */
#include "moe.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "check.h"
#include "mlp.h"
#include "move.h"
#include "num.h"
#include "plane.h"
#include "ref.h"
#include "token.h"
#include "xp/capacity.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/expert.h"
#include "xp/permute.h"
#include "xp/residual.h"
#include "xp/route.h"
#include "xp/router.h"
#include "xp/shared.h"
#include "xp/wgrad.h"

/* ---- operands and parameters ---- */

#define IN(field, shape, group) XP_OPERAND(xp_moe_args, field, shape, XP_IN, XP_DT_ACT, XP_UNCOMPARED, group)
#define OPT(field, shape, group) XP_OPTIONAL(xp_moe_args, field, shape, XP_IN, XP_DT_ACT, XP_UNCOMPARED, group)
#define OUT(field, shape, group) XP_OPERAND(xp_moe_args, field, shape, XP_OUT, XP_DT_ACT, XP_BOUND, group)
#define OPT_OUT(field, shape, group) XP_OPTIONAL(xp_moe_args, field, shape, XP_OUT, XP_DT_ACT, XP_BOUND, group)

static const xp_operand operands[] = {
    IN(x, "T,H", "act"),
    IN(dy, "T,H", "act"),
    IN(wr, "Z,H", "router"),
    IN(w1, "E,U,H", "act"),
    IN(w2, "E,H,F", "act"),
    [XP_REF_MOE_SW1] = OPT(sw1, "X,H", "act"),
    [XP_REF_MOE_SW2] = OPT(sw2, "H,S", "act"),
    [XP_REF_MOE_SGATE] = OPT(sgate, "1,H", "act"),
    XP_OPERAND(xp_moe_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    [XP_REF_MOE_Y] = OUT(y, "T,H", "act"),
    [XP_REF_MOE_DX] = OUT(dx, "T,H", "act"),
    [XP_REF_MOE_DWR] = OUT(dwr, "Z,H", "router"),
    [XP_REF_MOE_DW1] = OUT(dw1, "E,U,H", "act"),
    [XP_REF_MOE_DW2] = OUT(dw2, "E,H,F", "act"),
    [XP_REF_MOE_DSW1] = OPT_OUT(dsw1, "X,H", "act"),
    [XP_REF_MOE_DSW2] = OPT_OUT(dsw2, "H,S", "act"),
    [XP_REF_MOE_DSGATE] = OPT_OUT(dsgate, "1,H", "act"),
    [XP_REF_MOE_RBIAS] = OPT(rbias, "Z", "router"),
    [XP_REF_MOE_BIAS] = XP_OPTIONAL(xp_moe_args, bias, "Z", XP_IN, XP_DT_WIDE | XP_BIT(XP_BF16), XP_UNCOMPARED, "wide"),
    [XP_REF_MOE_B1] = OPT(b1, "E,U", "act"),
    [XP_REF_MOE_B2] = OPT(b2, "E,H", "act"),
    [XP_REF_MOE_SCALE_E] = XP_OPTIONAL(xp_moe_args, scale_e, "W", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [XP_REF_MOE_DRBIAS] = OPT_OUT(drbias, "Z", "router"),
    [XP_REF_MOE_DB1] = OPT_OUT(db1, "E,U", "act"),
    [XP_REF_MOE_DB2] = OPT_OUT(db2, "E,H", "act"),
};

static const xp_param params[] = {{"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_moe_args, dialect)}};

/* ---- check ---- */

/* A shared expert is there when sw1 is; the rest follows from the record. */
static int wants(const void *args, int i) {
    const xp_moe_args *a = args;
    const xp_dialect *d = a->dialect;
    if (!d)
        return 0;
    switch (i) {
    case XP_REF_MOE_RBIAS:
    case XP_REF_MOE_DRBIAS:
        return d->router_bias;
    case XP_REF_MOE_BIAS:
        return d->masked_weight && d->select_bias;
    case XP_REF_MOE_B1:
    case XP_REF_MOE_B2:
    case XP_REF_MOE_DB1:
    case XP_REF_MOE_DB2:
        return d->expert_bias;
    case XP_REF_MOE_SCALE_E:
        return d->expert_scale != XP_FACTOR_NONE;
    case XP_REF_MOE_SW1:
        return d->shared_rows > 0;
    case XP_REF_MOE_SW2:
    case XP_REF_MOE_DSW1:
    case XP_REF_MOE_DSW2:
        return a->sw1.data != NULL;
    case XP_REF_MOE_SGATE:
    case XP_REF_MOE_DSGATE:
        return a->sw1.data != NULL && d->shared_gate;
    default:
        return 0;
    }
}

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_moe_args *a = args;
    xp_ref_dims dims;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_moe, args, &dims));
    if (!a->dialect)
        return XP_FAIL(XP_E_ARG, "moe: dialect is absent, expected a record");
    XP_TRY(xp_ref_mlp_check("moe", a->dialect));
    XP_TRY(xp_ref_mlp_width_check("moe", a->dialect, "w1", XP_REF_DIM(dims, 'U'), 'F', XP_REF_DIM(dims, 'F')));
    XP_TRY(xp_ref_wanted_check(&xp_stage_moe, args, a->dialect,
                               (a->dialect->shared_rows > 0 ? 0 : XP_BIT(XP_REF_MOE_SW1)) | XP_BIT(XP_REF_MOE_BIAS)));
    if (a->sw1.data)
        XP_TRY(xp_ref_mlp_parts_check("moe", a->dialect, 'S', XP_REF_DIM(dims, 'S'), -1));
    if (a->sw1.data)
        XP_TRY(xp_ref_mlp_width_check("moe", a->dialect, "sw1", XP_REF_DIM(dims, 'X'), 'S', XP_REF_DIM(dims, 'S')));
    const int64_t Z = XP_REF_DIM(dims, 'Z'), K = XP_REF_DIM(dims, 'K');
    if (Z != xp_dialect_rows(a->dialect, XP_REF_DIM(dims, 'E')))
        return XP_FAIL(XP_E_ARG, "moe: wr dim 0 is %lld, expected E + %s = %lld", (long long)Z,
                       a->dialect->shared_rows > 0 ? "shared_rows" : "null_experts",
                       (long long)xp_dialect_rows(a->dialect, XP_REF_DIM(dims, 'E')));
    if (a->scale_e.data && a->scale_e.dim[0] != xp_dialect_factors(a->dialect, XP_REF_DIM(dims, 'E')))
        return XP_FAIL(XP_E_ARG, "moe: scale_e dim 0 is %lld, expected W = %lld", (long long)a->scale_e.dim[0],
                       (long long)xp_dialect_factors(a->dialect, XP_REF_DIM(dims, 'E')));
    const int64_t E = Z - a->dialect->shared_rows;
    if (K < 1 || K > E)
        return XP_FAIL(XP_E_ARG, "moe: idx dim 1 is %lld, expected 1 to E = %lld", (long long)K, (long long)E);
    XP_TRY(xp_dialect_check(a->dialect, XP_REF_DIM(dims, 'E'), K));
    if (xp_dialect_limits(a->dialect) && a->dialect->overflow == XP_OVERFLOW_PRIORITY)
        return XP_FAIL(XP_E_ARG, "moe: overflow is priority, expected order or slots: which slots a full expert drops "
                                 "would depend on weights that each side rounds its own way (stage capacity has it)");
    for (int64_t t = 0; t < a->idx.dim[0] && xp_ref_readable(&a->idx); t++) {
        for (int64_t k = 0; k < K; k++) {
            const int32_t e = xp_ref_i32(&a->idx, t, k);
            if (e < 0 || e >= E)
                return XP_FAIL(XP_E_ARG, "moe: idx[%lld][%lld] is %d, expected 0 to E-1 = %lld", (long long)t,
                               (long long)k, e, (long long)E - 1);
        }
    }
    return XP_OK;
}

/* ---- cost ---- */

/* Forward, gradient of the input and gradient of the weights: one product each of every row with every weight. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_moe_args *a = args;
    const double T = (double)a->x.dim[0], H = (double)a->x.dim[1], K = (double)a->idx.dim[1];
    const double F = (double)a->w2.dim[2] + (double)a->w1.dim[1];
    const double S = a->sw1.data ? (double)a->sw2.dim[1] + (double)a->sw1.dim[0] : 0.0;
    (void)m;
    *out = (xp_cost){.flop = 6.0 * T * H * (K * F + S + (double)a->wr.dim[0]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_moe, args)};
}

/* ---- bound ---- */

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    if (operands[operand].role != XP_OUT)
        return XP_FAIL(XP_E_BUG, "moe: operand %d has no bound", operand);
    xp_ref_moe_bound(args, operand, ref, ws, tol);
    return XP_OK;
}

static size_t bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_ref_moe_bound_ws(args);
}

/* ---- a mesh of one rank ---- */

static xp_status self_copy(const xp_tensor *src, xp_tensor *dst) {
    if (src->dtype != dst->dtype || xp_tensor_count(src) != xp_tensor_count(dst) || !xp_tensor_contiguous(src) ||
        !xp_tensor_contiguous(dst))
        return XP_FAIL(XP_E_COMM, "moe: one rank sends itself %lld elements and expects %lld",
                       (long long)xp_tensor_count(src), (long long)xp_tensor_count(dst));
    if (src->data != dst->data)
        memcpy(dst->data, src->data, xp_dtype_bytes(src->dtype, xp_tensor_count(src)));
    return XP_OK;
}

static xp_status self_gather(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst) {
    (void)c;
    (void)q;
    (void)rows;
    return self_copy(src, dst);
}

static xp_status self_scatter(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst,
                              xp_redop op) {
    (void)op;
    return self_gather(c, q, src, rows, dst);
}

static xp_status self_reduce(xp_comm *c, xp_queue *q, xp_tensor *buf, xp_redop op) {
    (void)c;
    (void)q;
    (void)buf;
    (void)op;
    return XP_OK;
}

static xp_status self_exchange(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *send_rows, xp_tensor *dst,
                               const int64_t *recv_rows) {
    (void)c;
    (void)q;
    if (send_rows[0] != recv_rows[0])
        return XP_FAIL(XP_E_COMM, "moe: one rank sends itself %lld rows and expects %lld", (long long)send_rows[0],
                       (long long)recv_rows[0]);
    return self_copy(src, dst);
}

static xp_status self_barrier(xp_comm *c, xp_queue *q) {
    (void)c;
    (void)q;
    return XP_OK;
}

static xp_status self_split(xp_comm *c, int color, int key, xp_comm **out) {
    (void)color;
    (void)key;
    *out = c;
    return XP_OK;
}

static void self_give_up(xp_comm *c, xp_status why) {
    (void)c;
    (void)why;
}

static const xp_mesh_ops self_ops = {
    .abi = XP_ABI,
    .size = sizeof(xp_mesh_ops),
    .name = "self",
    .mems = XP_BIT(XP_HOST) | XP_BIT(XP_PINNED),
    .det = XP_DET_RUN | XP_DET_MESH,
    .all_gather = self_gather,
    .reduce_scatter = self_scatter,
    .all_reduce = self_reduce,
    .all_to_all_v = self_exchange,
    .barrier = self_barrier,
    .split = self_split,
    .give_up = self_give_up,
};

typedef struct {
    xp_comm comm;
    xp_mesh mesh;
} self_mesh;

static void self_open(self_mesh *s) {
    s->comm = (xp_comm){&self_ops, 0, 1, NULL};
    for (int i = 0; i < XP_NAXIS; i++)
        s->mesh.axis[i] = &s->comm;
}

/* ---- reference: the parts in order ---- */

enum { CALLS = 29 }; /* the most that a record can ask for */

typedef struct {
    const xp_kernel *row;
    const void *args;
} part;

typedef struct {
    xp_router_args router;
    xp_route_args route;
    xp_capacity_args capacity;
    xp_permute_args permute;
    xp_dispatch_args dispatch;
    xp_expert_args expert;
    xp_combine_args combine;
    xp_shared_args shared;
    xp_residual_args sum;
    xp_combine_bwd_args combine_bwd;
    xp_expert_bwd_args expert_bwd;
    xp_wgrad_args w1, w2, wr, sw1, sw2, sgate, b1, b2, rbias;
    xp_dispatch_bwd_args dispatch_bwd;
    xp_permute_bwd_args permute_bwd;
    xp_route_bwd_args route_bwd;
    xp_router_bwd_args router_bwd;
    xp_shared_bwd_args shared_bwd;
    xp_residual_args dhalf, dnull, dsum, dtotal;
    xp_tensor span; /* [2] i64: 0, T - the one group of a dense weight gradient */
    xp_tensor ones; /* [max(T, M),1]: the input whose weight gradient is a bias's */
    xp_tensor dout; /* gradient of the sum of experts: dy, or half of it */
    part call[CALLS];
    int calls;
} layer;

static xp_tensor take(xp_ref_layout *l, xp_dtype d, int64_t n0, int64_t n1) {
    return xp_tensor_2d(xp_ref_take(l, xp_dtype_bytes(d, n0 * n1)), d, n0, n1);
}

static xp_tensor take1(xp_ref_layout *l, xp_dtype d, int64_t n0) {
    return xp_tensor_1d(xp_ref_take(l, xp_dtype_bytes(d, n0)), d, n0);
}

static void call(layer *y, const xp_kernel *row, const void *args) {
    assert(y->calls < CALLS);
    y->call[y->calls++] = (part){row, args};
}

/* A gradient [R,C] or [L,R,C] as wgrad's [1,L,R,C]. */
static xp_tensor one_block(const xp_tensor *t) {
    xp_tensor out = *t;
    const int lead = 4 - t->ndim;
    for (int d = 3; d >= 0; d--) {
        out.dim[d] = d >= lead ? t->dim[d - lead] : 1;
        out.stride[d] = d >= lead ? t->stride[d - lead] : xp_tensor_count(t);
    }
    out.ndim = 4;
    return out;
}

static xp_wgrad_args wgrad_of(const xp_tensor *dy, const xp_tensor *x, const xp_tensor *offsets, const xp_tensor *dw) {
    return (xp_wgrad_args){.dy = *dy, .x = *x, .offsets = *offsets, .dw = one_block(dw)};
}

/* A bias's gradient [R] or [L,R] as wgrad's [1,L,R,1]. */
static xp_tensor one_column(const xp_tensor *t) {
    xp_tensor out = *t;
    const int64_t rows = t->dim[t->ndim - 1], groups = t->ndim == 2 ? t->dim[0] : 1;
    const int64_t dim[4] = {1, groups, rows, 1}, stride[4] = {groups * rows, t->ndim == 2 ? t->stride[0] : rows, 1, 1};
    memcpy(out.dim, dim, sizeof dim);
    memcpy(out.stride, stride, sizeof stride);
    out.ndim = 4;
    return out;
}

static xp_wgrad_args bias_of(const layer *y, const xp_tensor *dy, const xp_tensor *offsets, const xp_tensor *db) {
    const xp_tensor x = xp_tensor_rows(&y->ones, 0, 0, dy->dim[0]);
    return (xp_wgrad_args){.dy = *dy, .x = x, .offsets = *offsets, .dw = one_column(db)};
}

static xp_dtype wide_of(const xp_moe_args *a) {
    return xp_ref_op(a->x.dtype);
}

static xp_dtype by_rule(const xp_moe_args *a, xp_wide rule) {
    return rule == XP_WIDE_ACT ? a->x.dtype : wide_of(a);
}

static int at_input(const xp_moe_args *a) {
    return a->dialect->weight_at == XP_AT_INPUT;
}

static int has_identity(const xp_moe_args *a) {
    return a->dialect->null_experts > 0 && a->dialect->null_kind == XP_NULL_IDENTITY;
}

static double shared_factor(const xp_moe_args *a) {
    return a->sw1.data && a->dialect->shared_combine == XP_COMBINE_AVERAGE ? 0.5 : 1.0;
}

/* The slots that have rows: those chosen, or with a capacity those kept. */
static xp_tensor plan_capacity(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    const int64_t T = a->x.dim[0], K = a->idx.dim[1];
    if (!xp_dialect_limits(a->dialect))
        return a->idx;
    y->capacity = (xp_capacity_args){.idx = a->idx,
                                     .w = y->route.w,
                                     .kept = take(l, XP_I32, T, K),
                                     .dropped = take1(l, XP_I64, a->w1.dim[0]),
                                     .dialect = a->dialect};
    call(y, &xp_ref_capacity, &y->capacity);
    return y->capacity.kept;
}

static void plan_routing(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    const int64_t T = a->x.dim[0], H = a->x.dim[1], E = a->w1.dim[0], Z = a->wr.dim[0], K = a->idx.dim[1], M = T * K;
    const xp_dtype d = a->x.dtype;
    y->router = (xp_router_args){
        .x = a->x, .w = a->wr, .bias = a->rbias, .logits = take(l, by_rule(a, a->dialect->logits_dtype), T, Z)};
    y->route = (xp_route_args){.logits = y->router.logits,
                               .bias = a->bias,
                               .scores = take(l, wide_of(a), T, Z),
                               .idx = a->idx,
                               .w = take(l, by_rule(a, a->dialect->weight_dtype), T, K),
                               .dialect = a->dialect,
                               .replay = 1,
                               .scale_e = a->scale_e,
                               .act = d};
    if (a->dialect->shared_rows > 0)
        y->route.gamma = take(l, y->route.w.dtype, T, a->dialect->shared_rows);
    call(y, &xp_ref_router, &y->router);
    call(y, &xp_ref_route, &y->route);
    y->permute = (xp_permute_args){.x = a->x,
                                   .idx = plan_capacity(a, l, y),
                                   .rows = take(l, d, M, H),
                                   .tok = take1(l, XP_I64, M),
                                   .src = take1(l, XP_I32, M),
                                   .pos = take(l, XP_I32, T, K),
                                   .counts = take1(l, XP_I64, E),
                                   .offsets = take1(l, XP_I64, E + 1),
                                   .order = XP_ORDER_SLOT_TOKEN,
                                   .align = 1,
                                   .dialect = a->dialect};
    if (at_input(a))
        y->permute.w = y->route.w;
    y->dispatch = (xp_dispatch_args){.rows = y->permute.rows,
                                     .tok = y->permute.tok,
                                     .counts = y->permute.counts,
                                     .offsets = y->permute.offsets,
                                     .recv = take(l, d, M, H),
                                     .recv_tok = take1(l, XP_I64, M),
                                     .recv_counts = take(l, XP_I64, 1, E),
                                     .recv_offsets = take1(l, XP_I64, E + 1),
                                     .align = 1};
    call(y, &xp_ref_permute, &y->permute);
    call(y, &xp_ref_dispatch, &y->dispatch);
}

static void plan_shared(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    const int64_t T = a->x.dim[0], H = a->x.dim[1], S = a->sw2.dim[1];
    const xp_dtype d = a->x.dtype;
    y->shared = (xp_shared_args){.x = a->x,
                                 .w1 = a->sw1,
                                 .w2 = a->sw2,
                                 .gate = a->sgate,
                                 .pre = take(l, d, T, a->sw1.dim[0]),
                                 .act = take(l, d, T, S),
                                 .mlp = take(l, d, T, H),
                                 .y = take(l, d, T, H),
                                 .dialect = a->dialect,
                                 .gamma = y->route.gamma};
    if (a->sgate.data)
        y->shared.sig = take(l, d, T, 1);
    y->sum = (xp_residual_args){.a = y->combine.y, .b = y->shared.y, .y = a->y, .factor = shared_factor(a)};
    call(y, &xp_ref_shared, &y->shared);
    call(y, &xp_ref_residual, &y->sum);
}

static void plan_forward(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    const int64_t T = a->x.dim[0], H = a->x.dim[1], M = T * a->idx.dim[1], F = a->w2.dim[2];
    const xp_dtype d = a->x.dtype;
    y->expert = (xp_expert_args){.x = y->dispatch.recv,
                                 .offsets = y->dispatch.recv_offsets,
                                 .w1 = a->w1,
                                 .w2 = a->w2,
                                 .pre = take(l, d, M, a->w1.dim[1]),
                                 .act = take(l, d, M, F),
                                 .y = take(l, d, M, H),
                                 .dialect = a->dialect,
                                 .b1 = a->b1,
                                 .b2 = a->b2};
    y->combine = (xp_combine_args){.out = y->expert.y,
                                   .recv_counts = y->dispatch.recv_counts,
                                   .recv_offsets = y->dispatch.recv_offsets,
                                   .counts = y->permute.counts,
                                   .offsets = y->permute.offsets,
                                   .pos = y->permute.pos,
                                   .idx = y->permute.idx,
                                   .w = y->route.w,
                                   .back = take(l, d, M, H),
                                   .y = a->sw1.data ? take(l, d, T, H) : a->y,
                                   .dialect = a->dialect};
    if (has_identity(a))
        y->combine.x = a->x;
    call(y, &xp_ref_expert, &y->expert);
    call(y, &xp_ref_combine, &y->combine);
    if (a->sw1.data)
        plan_shared(a, l, y);
}

/* dout: what the experts and the shared expert see of dy. */
static void plan_halves(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    y->dout = a->dy;
    if (shared_factor(a) == 1.0)
        return;
    y->dout = take(l, a->x.dtype, a->x.dim[0], a->x.dim[1]);
    y->dhalf = (xp_residual_args){.a = a->dy, .y = y->dout, .factor = shared_factor(a)};
    call(y, &xp_ref_residual, &y->dhalf);
}

static void plan_backward_combine(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    const int64_t T = a->x.dim[0], H = a->x.dim[1], K = a->idx.dim[1], M = T * K;
    const xp_dtype d = a->x.dtype;
    y->combine_bwd = (xp_combine_bwd_args){.dy = y->dout,
                                           .back = y->combine.back,
                                           .w = y->route.w,
                                           .pos = y->permute.pos,
                                           .counts = y->permute.counts,
                                           .offsets = y->permute.offsets,
                                           .recv_counts = y->dispatch.recv_counts,
                                           .recv_offsets = y->dispatch.recv_offsets,
                                           .dw = take(l, wide_of(a), T, K),
                                           .dout = take(l, d, M, H),
                                           .dialect = a->dialect};
    if (has_identity(a)) {
        y->combine_bwd.x = a->x;
        y->combine_bwd.idx = y->permute.idx;
        y->combine_bwd.dx = take(l, d, T, H);
    }
    call(y, &xp_ref_combine_bwd, &y->combine_bwd);
}

static void plan_backward_experts(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    const int64_t T = a->x.dim[0], H = a->x.dim[1], M = T * a->idx.dim[1];
    const xp_dtype d = a->x.dtype;
    const xp_tensor *offsets = &y->dispatch.recv_offsets;
    y->expert_bwd = (xp_expert_bwd_args){.dy = y->combine_bwd.dout,
                                         .pre = y->expert.pre,
                                         .offsets = *offsets,
                                         .w1 = a->w1,
                                         .w2 = a->w2,
                                         .dpre = take(l, d, M, a->w1.dim[1]),
                                         .dx = take(l, d, M, H),
                                         .dialect = a->dialect};
    call(y, &xp_ref_expert_bwd, &y->expert_bwd);
    y->w1 = wgrad_of(&y->expert_bwd.dpre, &y->dispatch.recv, offsets, &a->dw1);
    y->w2 = wgrad_of(&y->combine_bwd.dout, &y->expert.act, offsets, &a->dw2);
    call(y, &xp_ref_wgrad, &y->w1);
    call(y, &xp_ref_wgrad, &y->w2);
    if (a->b1.data) {
        y->b1 = bias_of(y, &y->expert_bwd.dpre, offsets, &a->db1);
        y->b2 = bias_of(y, &y->combine_bwd.dout, offsets, &a->db2);
        call(y, &xp_ref_wgrad, &y->b1);
        call(y, &xp_ref_wgrad, &y->b2);
    }
    y->dispatch_bwd = (xp_dispatch_bwd_args){.drecv = y->expert_bwd.dx,
                                             .recv_counts = y->dispatch.recv_counts,
                                             .recv_offsets = *offsets,
                                             .counts = y->permute.counts,
                                             .offsets = y->permute.offsets,
                                             .drows = take(l, d, M, H)};
    y->permute_bwd = (xp_permute_bwd_args){
        .drows = y->dispatch_bwd.drows, .pos = y->permute.pos, .dx = take(l, d, T, H), .dialect = a->dialect};
    if (at_input(a)) {
        y->permute_bwd.w = y->route.w;
        y->permute_bwd.x = a->x;
        y->permute_bwd.dw = y->combine_bwd.dw;
    }
    call(y, &xp_ref_dispatch_bwd, &y->dispatch_bwd);
    call(y, &xp_ref_permute_bwd, &y->permute_bwd);
    y->dnull.y = y->permute_bwd.dx;
    if (has_identity(a)) {
        y->dnull = (xp_residual_args){.a = y->permute_bwd.dx, .b = y->combine_bwd.dx, .y = take(l, d, T, H)};
        call(y, &xp_ref_residual, &y->dnull);
    }
}

static void plan_backward_router(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    const int64_t T = a->x.dim[0], H = a->x.dim[1], Z = a->wr.dim[0];
    const xp_dtype d = a->x.dtype;
    const int has = a->sw1.data != NULL;
    y->route_bwd = (xp_route_bwd_args){.scores = y->route.scores,
                                       .idx = a->idx,
                                       .dw = y->combine_bwd.dw,
                                       .dlogits = take(l, y->router.logits.dtype, T, Z),
                                       .dialect = a->dialect,
                                       .logits = y->router.logits,
                                       .bias = a->bias,
                                       .scale_e = a->scale_e,
                                       .dgamma = y->shared_bwd.dgamma,
                                       .act = d};
    y->router_bwd = (xp_router_bwd_args){.dlogits = y->route_bwd.dlogits, .w = a->wr, .dx = take(l, d, T, H)};
    y->wr = wgrad_of(&y->route_bwd.dlogits, &a->x, &y->span, &a->dwr);
    y->dsum = (xp_residual_args){.a = y->dnull.y, .b = y->router_bwd.dx, .y = has ? take(l, d, T, H) : a->dx};
    call(y, &xp_ref_route_bwd, &y->route_bwd);
    call(y, &xp_ref_router_bwd, &y->router_bwd);
    call(y, &xp_ref_wgrad, &y->wr);
    if (a->rbias.data) {
        y->rbias = bias_of(y, &y->route_bwd.dlogits, &y->span, &a->drbias);
        call(y, &xp_ref_wgrad, &y->rbias);
    }
    call(y, &xp_ref_residual, &y->dsum);
    if (!has)
        return;
    y->dtotal = (xp_residual_args){.a = y->dsum.y, .b = y->shared_bwd.dx, .y = a->dx};
    call(y, &xp_ref_residual, &y->dtotal);
}

/* Before the router's, whose shared rows it has gradients of. */
static void plan_backward_shared(const xp_moe_args *a, xp_ref_layout *l, layer *y) {
    if (!a->sw1.data)
        return;
    const int64_t T = a->x.dim[0], H = a->x.dim[1];
    const xp_dtype d = a->x.dtype;
    y->shared_bwd = (xp_shared_bwd_args){.dy = y->dout,
                                         .pre = y->shared.pre,
                                         .w1 = a->sw1,
                                         .w2 = a->sw2,
                                         .gate = a->sgate,
                                         .dmlp = take(l, d, T, H),
                                         .dpre = take(l, d, T, a->sw1.dim[0]),
                                         .dx = take(l, d, T, H),
                                         .dialect = a->dialect,
                                         .gamma = y->route.gamma};
    if (a->dialect->shared_rows > 0)
        y->shared_bwd.dgamma = take(l, wide_of(a), T, a->dialect->shared_rows);
    if (a->sgate.data) {
        y->shared_bwd.mlp = y->shared.mlp;
        y->shared_bwd.sig = y->shared.sig;
        y->shared_bwd.dz = take(l, d, T, 1);
    }
    y->sw1 = wgrad_of(&y->shared_bwd.dpre, &a->x, &y->span, &a->dsw1);
    y->sw2 = wgrad_of(&y->shared_bwd.dmlp, &y->shared.act, &y->span, &a->dsw2);
    call(y, &xp_ref_shared_bwd, &y->shared_bwd);
    call(y, &xp_ref_wgrad, &y->sw1);
    call(y, &xp_ref_wgrad, &y->sw2);
    if (a->sgate.data) {
        y->sgate = wgrad_of(&y->shared_bwd.dz, &a->x, &y->span, &a->dsgate);
        call(y, &xp_ref_wgrad, &y->sgate);
    }
}

/* Lays out the intermediates in ws and lists the calls; returns the bytes of the intermediates. */
static size_t plan(const xp_moe_args *a, void *ws, layer *y) {
    xp_ref_layout l = {ws, 0};
    memset(y, 0, sizeof *y);
    y->span = take1(&l, XP_I64, 2);
    y->ones = take(&l, a->x.dtype, a->x.dim[0] * a->idx.dim[1], 1);
    plan_routing(a, &l, y);
    plan_forward(a, &l, y);
    plan_halves(a, &l, y);
    plan_backward_combine(a, &l, y);
    plan_backward_experts(a, &l, y);
    plan_backward_shared(a, &l, y);
    plan_backward_router(a, &l, y);
    return l.bytes;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    self_mesh self;
    layer y;
    size_t most = 0;
    (void)m;
    self_open(&self);
    const size_t bytes = plan(args, NULL, &y);
    for (int i = 0; i < y.calls; i++) {
        const part *p = &y.call[i];
        const size_t need = p->row->workspace ? p->row->workspace(p->args, &self.mesh) : 0;
        most = need > most ? need : most;
    }
    return bytes + most;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_moe_args *a = args;
    self_mesh self;
    layer y;
    self_open(&self);
    const size_t bytes = plan(a, x->ws, &y);
    const xp_exec each = {x->dev, x->q, &self.mesh, (char *)x->ws + bytes, x->ws_bytes - bytes};
    int64_t *span = y.span.data;
    span[0] = 0;
    span[1] = a->x.dim[0];
    for (int64_t i = 0; i < y.ones.dim[0]; i++)
        xp_ref_store(y.ones.data, y.ones.dtype, i, 1.0);
    for (int i = 0; i < y.calls; i++)
        XP_TRY(y.call[i].row->run(&each, y.call[i].args));
    return XP_OK;
}

/* ---- fill ---- */

/* Generated weights have variance 1: an exact power of two near 1/sqrt(width) keeps the logits, and the softmax, alive.
 */
static void shrink(xp_tensor *t, int64_t width) {
    double factor = 1.0;
    for (int64_t n = width; n > 1; n /= 4)
        factor *= 0.5;
    for (int64_t i = 0; t->data && i < xp_tensor_count(t); i++) {
        const int64_t at = xp_tensor_offset(t, i);
        xp_ref_store(t->data, t->dtype, at, factor * xp_widen(t->data, t->dtype, at));
    }
}

/* One NaN, or one overflow, would make nearly every output NaN or infinite, and which of the two is no property of the
 * block. Extreme here: subnormals, zeros of both signs, and magnitudes up to 2^8, which leave the softmax a meaning in
 * f32. */
static void tame(xp_tensor *t) {
    for (int64_t i = 0; t->data && i < xp_tensor_count(t); i++) {
        const int64_t at = xp_tensor_offset(t, i);
        const double v = xp_widen(t->data, t->dtype, at);
        int exponent;
        if (!(fabs(v) < 0x1p8))
            xp_ref_store(t->data, t->dtype, at, isfinite(v) ? ldexp(frexp(v, &exponent), 8) : copysign(0x1p8, v));
    }
}

/* One factor for all: where it is no number, or far from 1, so is every weight. */
static void tame_factor(const xp_moe_args *a) {
    const double v = xp_widen(a->scale_e.data, a->scale_e.dtype, 0);
    if (!(fabs(v) >= 0x1p-4 && fabs(v) <= 0x1p4))
        xp_ref_store(a->scale_e.data, a->scale_e.dtype, 0, copysign(1.25, v));
}

static double logit(const xp_moe_args *a, int64_t t, int64_t e) {
    double s = 0.0;
    for (int64_t h = 0; h < a->x.dim[1]; h++)
        s += xp_widen(xp_tensor_at(&a->x, t, h, 0, 0), a->x.dtype, 0) *
             xp_widen(xp_tensor_at(&a->wr, e, h, 0, 0), a->wr.dtype, 0);
    return s;
}

static int is_chosen(const int32_t *idx, int64_t k, int64_t e) {
    for (int64_t i = 0; i < k; i++) {
        if (idx[i] == e)
            return 1;
    }
    return 0;
}

/* The K experts of largest logit, lower numbers first among equals: what the layer itself would choose, up to rounding.
 * A function of the token's row alone, so it is the same on every mesh. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_moe_args *a = args;
    const int64_t Z = a->wr.dim[0] - a->dialect->shared_rows;
    (void)m;
    (void)seed;
    for (int i = 0; i < XP_REF_MOE_Y && strcmp(data, "extreme") == 0; i++) {
        if (operands[i].dtypes == XP_DT_ACT)
            tame(xp_stage_tensor(&xp_stage_moe, a, i));
    }
    if (a->dialect->expert_scale == XP_FACTOR_ONE)
        tame_factor(a);
    if (strcmp(data, "real") == 0) {
        shrink(&a->wr, a->x.dim[1]);
        shrink(&a->w1, a->x.dim[1]);
        shrink(&a->w2, a->w2.dim[2]);
        shrink(&a->sw1, a->x.dim[1]);
        shrink(&a->sw2, a->sw2.data ? a->sw2.dim[1] : 1);
        shrink(&a->sgate, a->x.dim[1]);
    }
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            int64_t best = -1;
            double value = 0.0;
            for (int64_t e = 0; e < Z; e++) {
                const double l = is_chosen(idx, k, e) ? (double)NAN : logit(a, t, e);
                if (l > value || (best < 0 && l == l)) {
                    best = e;
                    value = l;
                }
            }
            for (int64_t e = 0; best < 0 && e < Z; e++) {
                if (!is_chosen(idx, k, e))
                    best = e; /* nothing but NaN is left */
            }
            idx[k] = (int32_t)(best < 0 ? 0 : best); /* K > E is check's to refuse */
        }
    }
    return XP_OK;
}

/* ---- stage and row ---- */

const xp_stage xp_stage_moe = {
    .name = "moe",
    .meaning = "one whole MoE block, forward and backward, with its experts given",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_moe_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = bound_workspace,
    .fill = fill,
    .wants = wants,
};

const xp_kernel xp_ref_moe = {
    .stage = &xp_stage_moe,
    .name = "parts",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
