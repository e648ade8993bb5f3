/* Stages expert and expert_bwd: see xp/expert.h for the meaning and the rounding points.
 *
 * Rows of one expert go through the MLP (mlp.c, glu.c) in chunks; a row's bits depend on nothing but the row and its
 * expert's weights. The rows at and beyond offsets[L], and groups without rows, are not touched. */
#include "xp/expert.h"

#include <string.h>

#include "check.h"
#include "mlp.h"
#include "move.h"
#include "ref.h"

/* ---- operands and parameters ---- */

static const xp_operand operands[] = {
    XP_OPERAND(xp_expert_args, x, "C,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_expert_args, offsets, "L+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_expert_args, w1, "L,U,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_expert_args, w2, "L,H,F", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_expert_args, pre, "C,U", XP_OUT, XP_DT_ACT, XP_BOUND, "param"),
    XP_OPERAND(xp_expert_args, act, "C,F", XP_OUT, XP_DT_ACT, XP_BOUND, "param"),
    XP_OPERAND(xp_expert_args, y, "C,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPTIONAL(xp_expert_args, b1, "L,U", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPTIONAL(xp_expert_args, b2, "L,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
};
enum { PRE = 4, ACT = 5, B1 = 7, B2 = 8 };

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_expert_bwd_args, dy, "C,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_expert_bwd_args, pre, "C,U", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_expert_bwd_args, offsets, "L+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_expert_bwd_args, w1, "L,U,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_expert_bwd_args, w2, "L,H,F", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_expert_bwd_args, dpre, "C,U", XP_OUT, XP_DT_ACT, XP_BOUND, "param"),
    XP_OPERAND(xp_expert_bwd_args, dx, "C,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};
enum { DPRE = 5 };

static const xp_param params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_expert_args, dialect)}};
static const xp_param bwd_params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_expert_bwd_args, dialect)}};

/* ---- check ---- */

static int wants(const void *args, int operand) {
    const xp_dialect *d = ((const xp_expert_args *)args)->dialect;
    return d && d->expert_bias && (operand == B1 || operand == B2);
}

static xp_status check_rows(const char *stage, const xp_tensor *offsets, int64_t row0) {
    if (row0 < 0)
        return XP_FAIL(XP_E_ARG, "%s: row0 is %lld, expected >= 0", stage, (long long)row0);
    if (!xp_ref_readable(offsets))
        return XP_OK;
    for (int64_t l = 0; l < offsets->dim[0]; l++) {
        const int64_t least = l > 0 ? xp_ref_i64(offsets, l - 1) : 0, at = xp_ref_i64(offsets, l);
        if (at < least)
            return XP_FAIL(XP_E_ARG, "%s: offsets[%lld] is %lld, expected >= %lld (borders ascend from 0)", stage,
                           (long long)l, (long long)at, (long long)least);
    }
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_expert_args *a = args;
    xp_ref_dims dims;
    XP_TRY(xp_ref_check(&xp_stage_expert, args, &dims));
    XP_TRY(xp_ref_mlp_check("expert", a->dialect));
    XP_TRY(xp_ref_mlp_width_check("expert", a->dialect, "w1", XP_REF_DIM(dims, 'U'), 'F', XP_REF_DIM(dims, 'F')));
    XP_TRY(xp_ref_wanted_check(&xp_stage_expert, args, a->dialect, 0));
    return check_rows("expert", &a->offsets, a->row0);
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_expert_bwd_args *a = args;
    xp_ref_dims dims;
    XP_TRY(xp_ref_check(&xp_stage_expert_bwd, args, &dims));
    XP_TRY(xp_ref_mlp_check("expert_bwd", a->dialect));
    XP_TRY(xp_ref_mlp_width_check("expert_bwd", a->dialect, "w1", XP_REF_DIM(dims, 'U'), 'F', XP_REF_DIM(dims, 'F')));
    return check_rows("expert_bwd", &a->offsets, a->row0);
}

/* ---- cost ---- */

static double bytes_of(const xp_tensor *t, double share) {
    return share * (double)xp_dtype_bytes(t->dtype, xp_tensor_count(t));
}

/* Rows [row0, row0 + C) that belong to an expert, and how many experts have one of them; all when the borders are out
 * of the host's reach. */
static void used(const xp_tensor *offsets, int64_t row0, int64_t C, double *out_rows, double *out_experts) {
    const int64_t L = offsets->dim[0] - 1;
    *out_rows = (double)C;
    *out_experts = (double)L;
    if (!xp_ref_readable(offsets))
        return;
    *out_rows = *out_experts = 0.0;
    for (int64_t l = 0; l < L; l++) {
        int64_t lo = xp_ref_i64(offsets, l) - row0, hi = xp_ref_i64(offsets, l + 1) - row0;
        lo = lo > 0 ? lo : 0;
        hi = hi < C ? hi : C;
        if (hi > lo) {
            *out_rows += (double)(hi - lo);
            *out_experts += 1.0;
        }
    }
}

/* Two products of rows by weights, (U + F) H multiply-adds a row in each direction; weights and biases of experts with
 * rows once. */
static xp_cost cost_of(const xp_tensor *x, const xp_tensor *offsets, int64_t row0, const xp_tensor *const *weights,
                       int n_weights, const xp_tensor *const *rows, int n_rows) {
    const xp_tensor *w1 = weights[0], *w2 = weights[1];
    double count, experts;
    used(offsets, row0, x->dim[0], &count, &experts);
    const double share = x->dim[0] > 0 ? count / (double)x->dim[0] : 0.0;
    const double part = w1->dim[0] > 0 ? experts / (double)w1->dim[0] : 0.0;
    xp_cost out = {.flop = 2.0 * count * (double)w2->dim[1] * (double)(w1->dim[1] + w2->dim[2]),
                   .mem_bytes = bytes_of(x, share)};
    for (int i = 0; i < n_weights; i++)
        out.mem_bytes += weights[i]->data ? bytes_of(weights[i], part) : 0.0;
    for (int i = 0; i < n_rows; i++)
        out.mem_bytes += bytes_of(rows[i], share);
    return out;
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_expert_args *a = args;
    const xp_tensor *const weights[] = {&a->w1, &a->w2, &a->b1, &a->b2}, *const rows[] = {&a->pre, &a->act, &a->y};
    *out = cost_of(&a->x, &a->offsets, a->row0, weights, 4, rows, 3);
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_expert_bwd_args *a = args;
    const xp_tensor *const weights[] = {&a->w1, &a->w2}, *const rows[] = {&a->pre, &a->dpre, &a->dx};
    *out = cost_of(&a->dy, &a->offsets, a->row0, weights, 2, rows, 3);
}

/* ---- the walk: rows of one expert, a chunk at a time ---- */

typedef struct {
    const xp_tensor *offsets, *w1, *w2, *b1, *b2; /* b1, b2: NULL where they take no part */
    int64_t row0, C;
} groups;
/* The chunk is rows [row, row + m) of the tensors at hand. */
typedef void chunk_fn(xp_ref_mlp *p, int64_t row, int64_t m, const void *args, const void *more);

static void walk(const groups *g, xp_ref_mlp *p, chunk_fn *fn, const void *args, const void *more) {
    const int64_t L = g->offsets->dim[0] - 1;
    for (int64_t l = 0; l < L; l++) {
        const int64_t begin = xp_ref_i64(g->offsets, l) - g->row0, stop = xp_ref_i64(g->offsets, l + 1) - g->row0;
        const int64_t end = stop < g->C ? stop : g->C;
        const xp_tensor w1 = xp_ref_matrix(g->w1, l), w2 = xp_ref_matrix(g->w2, l);
        const xp_tensor b1 = g->b1 ? xp_ref_vector(g->b1, l) : w1, b2 = g->b2 ? xp_ref_vector(g->b2, l) : w2;
        p->w1 = &w1;
        p->w2 = &w2;
        p->b1 = g->b1 ? &b1 : NULL;
        p->b2 = g->b2 ? &b2 : NULL;
        for (int64_t row = begin > 0 ? begin : 0; row < end; row += XP_REF_MLP_ROWS)
            fn(p, row, end - row < XP_REF_MLP_ROWS ? end - row : XP_REF_MLP_ROWS, args, more);
    }
}

static size_t plan(const xp_expert_args *a, int bounds, void *ws, xp_ref_mlp *out) {
    xp_ref_layout l = {ws, 0};
    xp_ref_mlp_plan(&l, a->x.dim[0], a->w2.dim[1], a->w2.dim[2], bounds, a->dialect, XP_REF_MLP_EXPERT, a->w1.dtype,
                    a->x.dtype, out);
    return l.bytes;
}

static size_t bwd_plan(const xp_expert_bwd_args *a, int bounds, void *ws, xp_ref_mlp *out) {
    xp_ref_layout l = {ws, 0};
    xp_ref_mlp_plan(&l, a->dy.dim[0], a->w2.dim[1], a->w2.dim[2], bounds, a->dialect, XP_REF_MLP_EXPERT, a->w1.dtype,
                    a->dy.dtype, out);
    return l.bytes;
}

static groups groups_of(const xp_expert_args *a) {
    return (groups){.offsets = &a->offsets,
                    .w1 = &a->w1,
                    .w2 = &a->w2,
                    .b1 = a->b1.data ? &a->b1 : NULL,
                    .b2 = a->b2.data ? &a->b2 : NULL,
                    .row0 = a->row0,
                    .C = a->x.dim[0]};
}

static groups bwd_groups_of(const xp_expert_bwd_args *a) {
    return (groups){.offsets = &a->offsets, .w1 = &a->w1, .w2 = &a->w2, .row0 = a->row0, .C = a->dy.dim[0]};
}

/* ---- bounds ---- */

/* Forward, r^ the implementation's rounding, op its arithmetic (f32, or f64 with f64 parameters), E an error:
 *   E(r x) = |x - r(x)|                                     one side may not cast
 *   E(pre) = sum |w1| (E + g (|x| + E)), g = gamma_H(op) + gamma_H(f64); with a bias rounded, + g |b1|, of H + 1 terms
 *   E(r v) = E(v) + |v - r(v)| + room(|v| + E(v))           every rounding point below, both sides' errors
 *   E(act) = by glu.c's chain of the activation's operations, from rounded pre, with err.h's rules; those of silu:
 *            E(s) = |silu'(g)| E(g) + E(g)^2 / 4 + 10 u(op) |silu|, E(act) = |s| E(u) + |u| E(s) + E(s) E(u)
 *   E(y)   = sum |w2| (E + g (|act| + E))                    from rounded act; a bias as above
 * An output's tolerance is its E and the implementation's own rounding of it. Backward likewise: da from dy through
 * W2^T, glu.c's chain, dx through W1^T; g and u are inputs there, so E(g) = E(u) = 0. Where an inexact value is
 * compared with a limit or with 0 and may lie on either side, what depends on it may be there or not. */
typedef struct {
    int operand;
    xp_tensor *tol;
} request;

static void zero(xp_tensor *tol) {
    for (int64_t i = 0; i < tol->dim[0]; i++)
        memset(xp_tensor_at(tol, i, 0, 0, 0), 0, (size_t)tol->dim[1] * sizeof(double));
}

static void clear(double *e, int64_t n) {
    memset(e, 0, (size_t)n * sizeof *e);
}

static void bound_chunk(xp_ref_mlp *p, int64_t row, int64_t m, const void *args, const void *more) {
    const xp_expert_args *a = args;
    const request *want = more;
    xp_ref_rows_load(&a->x, row, m, p->x);
    clear(p->xe, m * p->H);
    if (want->operand == PRE) {
        xp_ref_mlp_forward_error(p, m, XP_REF_MLP_PRE);
        xp_ref_rows_store(want->tol, row, m, p->pree);
    } else if (want->operand == ACT) {
        xp_ref_mlp_forward_error(p, m, XP_REF_MLP_ACT);
        xp_ref_rows_store(want->tol, row, m, p->mide);
    } else {
        xp_ref_mlp_forward_error(p, m, XP_REF_MLP_END);
        xp_ref_mlp_out_error(p, m * p->H, p->y, p->ye);
        xp_ref_rows_store(want->tol, row, m, p->ye);
    }
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)ref;
    const xp_expert_args *a = args;
    const groups g = groups_of(a);
    const request want = {operand, tol};
    xp_ref_mlp p;
    plan(a, 1, ws, &p);
    zero(tol);
    walk(&g, &p, bound_chunk, a, &want);
    return XP_OK;
}

static size_t bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_mlp p;
    return plan(args, 1, NULL, &p);
}

static void bwd_bound_chunk(xp_ref_mlp *p, int64_t row, int64_t m, const void *args, const void *more) {
    const xp_expert_bwd_args *a = args;
    const request *want = more;
    xp_ref_rows_load(&a->dy, row, m, p->y);
    xp_ref_rows_load(&a->pre, row, m, p->pre);
    clear(p->ye, m * p->H);
    clear(p->pree, m * p->U);
    if (want->operand == DPRE) {
        xp_ref_mlp_backward_error(p, m, 0, XP_REF_MLP_DPRE);
        xp_ref_rows_store(want->tol, row, m, p->pree);
    } else {
        xp_ref_mlp_backward_error(p, m, 0, XP_REF_MLP_END);
        xp_ref_mlp_out_error(p, m * p->H, p->x, p->xe);
        xp_ref_rows_store(want->tol, row, m, p->xe);
    }
}

static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    (void)ref;
    const xp_expert_bwd_args *a = args;
    const groups g = bwd_groups_of(a);
    const request want = {operand, tol};
    xp_ref_mlp p;
    bwd_plan(a, 1, ws, &p);
    zero(tol);
    walk(&g, &p, bwd_bound_chunk, a, &want);
    return XP_OK;
}

static size_t bwd_bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_mlp p;
    return bwd_plan(args, 1, NULL, &p);
}

/* ---- reference ---- */

static void forward_chunk(xp_ref_mlp *p, int64_t row, int64_t m, const void *args, const void *more) {
    (void)more;
    const xp_expert_args *a = args;
    xp_ref_rows_load(&a->x, row, m, p->x);
    xp_ref_mlp_forward(p, m, row, &a->pre, &a->act);
    xp_ref_rows_store(&a->y, row, m, p->y);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_expert_args *a = args;
    const groups g = groups_of(a);
    xp_ref_mlp p;
    plan(a, 0, x->ws, &p);
    walk(&g, &p, forward_chunk, a, NULL);
    return XP_OK;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_mlp p;
    return plan(args, 0, NULL, &p);
}

static void backward_chunk(xp_ref_mlp *p, int64_t row, int64_t m, const void *args, const void *more) {
    (void)more;
    const xp_expert_bwd_args *a = args;
    xp_ref_rows_load(&a->dy, row, m, p->y);
    xp_ref_rows_load(&a->pre, row, m, p->pre);
    xp_ref_mlp_backward(p, m, row, &a->dpre);
    xp_ref_mlp_finish(p, m * p->H, p->x);
    xp_ref_rows_store(&a->dx, row, m, p->x);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_expert_bwd_args *a = args;
    const groups g = bwd_groups_of(a);
    xp_ref_mlp p;
    bwd_plan(a, 0, x->ws, &p);
    walk(&g, &p, backward_chunk, a, NULL);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_mlp p;
    return bwd_plan(args, 0, NULL, &p);
}

/* ---- rows a few at a time ---- */

static int64_t extent(const void *args) {
    return ((const xp_expert_args *)args)->x.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_expert_args *a = args;
    xp_expert_args *o = out;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->pre = xp_tensor_rows(&a->pre, 0, lo, hi);
    o->act = xp_tensor_rows(&a->act, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
    o->row0 = a->row0 + lo;
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_expert_bwd_args *)args)->dy.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_expert_bwd_args *a = args;
    xp_expert_bwd_args *o = out;
    o->dy = xp_tensor_rows(&a->dy, 0, lo, hi);
    o->pre = xp_tensor_rows(&a->pre, 0, lo, hi);
    o->dpre = xp_tensor_rows(&a->dpre, 0, lo, hi);
    o->dx = xp_tensor_rows(&a->dx, 0, lo, hi);
    o->row0 = a->row0 + lo;
}

/* ---- stages and rows ---- */

const xp_stage xp_stage_expert = {
    .name = "expert",
    .meaning = "grouped MLP, every row with its expert's weights",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_expert_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = bound_workspace,
    .extent = extent,
    .slice = slice,
    .chain = "layer",
    .wants = wants,
};

const xp_stage xp_stage_expert_bwd = {
    .name = "expert_bwd",
    .meaning = "gradients of the grouped MLP with respect to its input and its two linear maps' outputs",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_expert_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .param = bwd_params,
    .params = sizeof bwd_params / sizeof *bwd_params,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_bound_workspace,
    .extent = bwd_extent,
    .slice = bwd_slice,
    .chain = "layer",
};

const xp_kernel xp_ref_expert = {
    .stage = &xp_stage_expert,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_expert_bwd = {
    .stage = &xp_stage_expert_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
