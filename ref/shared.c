/* Stages shared and shared_bwd: see xp/shared.h for the meaning.
 *
 * Rounding points: the MLP's as in expert.c (r_p = to the parameters' dtype), mlp to the activation dtype (r_a); with a
 * gate z = r_p(r_p(x) . v), sig = r_a(r_p(sigmoid z)), y = r_a(sig mlp). Backward: dmlp = r_a(dy sig),
 * dz = r_a(<dy, mlp> sig (1 - sig)), the MLP's from r_p(dmlp), dx = r_p(dpre W1 + r_p(dz) v), then r_a. Where both
 * dtypes are one, two roundings in a row are one. Without a gate y = mlp and dmlp = dy. With the router's weights the
 * MLP has parts (mlp.h). Tokens are independent. */
#include "xp/shared.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "linear.h"
#include "mlp.h"
#include "ref.h"
#include "token.h"

/* ---- operands and parameters ---- */

static const xp_operand operands[] = {
    XP_OPERAND(xp_shared_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_shared_args, w1, "X,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_shared_args, w2, "H,S", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPTIONAL(xp_shared_args, gate, "1,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_shared_args, pre, "T,X", XP_OUT, XP_DT_ACT, XP_BOUND, "param"),
    XP_OPERAND(xp_shared_args, act, "T,S", XP_OUT, XP_DT_ACT, XP_BOUND, "param"),
    XP_OPERAND(xp_shared_args, mlp, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPTIONAL(xp_shared_args, sig, "T,1", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPERAND(xp_shared_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPTIONAL(xp_shared_args, gamma, "T,A", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "weight"),
};
enum { PRE = 4, ACT, MLP, SIG, Y, GAMMA };

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_shared_bwd_args, dy, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_shared_bwd_args, pre, "T,X", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPTIONAL(xp_shared_bwd_args, mlp, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPTIONAL(xp_shared_bwd_args, sig, "T,1", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_shared_bwd_args, w1, "X,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_shared_bwd_args, w2, "H,S", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPTIONAL(xp_shared_bwd_args, gate, "1,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_shared_bwd_args, dmlp, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPERAND(xp_shared_bwd_args, dpre, "T,X", XP_OUT, XP_DT_ACT, XP_BOUND, "param"),
    XP_OPTIONAL(xp_shared_bwd_args, dz, "T,1", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPERAND(xp_shared_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPTIONAL(xp_shared_bwd_args, gamma, "T,A", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "weight"),
    XP_OPTIONAL(xp_shared_bwd_args, dgamma, "T,A", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
};
enum { DMLP = 7, DPRE, DZ, DX, BWD_GAMMA, DGAMMA };

static const xp_param params[] = {
    {"dialect", NULL, "hf-5.24/qwen2_moe", XP_P_DIALECT, offsetof(xp_shared_args, dialect)}};
static const xp_param bwd_params[] = {
    {"dialect", NULL, "hf-5.24/qwen2_moe", XP_P_DIALECT, offsetof(xp_shared_bwd_args, dialect)}};

/* ---- check ---- */

/* All that is optional comes with the gate, or with the router's weights. */
static int wants(const void *args, int operand) {
    const xp_dialect *d = ((const xp_shared_args *)args)->dialect;
    return operands[operand].optional && d && (operand == GAMMA ? d->shared_rows > 0 : d->shared_gate);
}

static int bwd_wants(const void *args, int operand) {
    const xp_dialect *d = ((const xp_shared_bwd_args *)args)->dialect;
    return bwd_operands[operand].optional && d && (operand >= BWD_GAMMA ? d->shared_rows > 0 : d->shared_gate);
}

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_args *a = args;
    xp_ref_dims dims;
    XP_TRY(xp_ref_check(&xp_stage_shared, args, &dims));
    XP_TRY(xp_ref_mlp_check("shared", a->dialect));
    XP_TRY(xp_ref_mlp_width_check("shared", a->dialect, "w1", XP_REF_DIM(dims, 'X'), 'S', XP_REF_DIM(dims, 'S')));
    XP_TRY(xp_ref_mlp_parts_check("shared", a->dialect, 'S', XP_REF_DIM(dims, 'S'), XP_REF_DIM(dims, 'A')));
    return xp_ref_wanted_check(&xp_stage_shared, args, a->dialect, 0);
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_bwd_args *a = args;
    xp_ref_dims dims;
    XP_TRY(xp_ref_check(&xp_stage_shared_bwd, args, &dims));
    XP_TRY(xp_ref_mlp_check("shared_bwd", a->dialect));
    XP_TRY(xp_ref_mlp_width_check("shared_bwd", a->dialect, "w1", XP_REF_DIM(dims, 'X'), 'S', XP_REF_DIM(dims, 'S')));
    XP_TRY(xp_ref_mlp_parts_check("shared_bwd", a->dialect, 'S', XP_REF_DIM(dims, 'S'), XP_REF_DIM(dims, 'A')));
    return xp_ref_wanted_check(&xp_stage_shared_bwd, args, a->dialect, 0);
}

/* ---- cost ---- */

static xp_cost cost_of(const xp_stage *s, const void *args, int64_t T, const xp_tensor *w1, const xp_tensor *w2) {
    return (xp_cost){.flop = 2.0 * (double)T * (double)w2->dim[0] * (double)(w1->dim[0] + w2->dim[1]),
                     .mem_bytes = xp_ref_bytes(s, args)};
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_shared_args *a = args;
    *out = cost_of(&xp_stage_shared, args, a->x.dim[0], &a->w1, &a->w2);
    if (a->gate.data) /* the gate's dot product, and its factor */
        out->flop += 3.0 * (double)a->x.dim[0] * (double)a->w2.dim[0];
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_shared_bwd_args *a = args;
    *out = cost_of(&xp_stage_shared_bwd, args, a->dy.dim[0], &a->w1, &a->w2);
    if (a->gate.data)
        out->flop += 5.0 * (double)a->dy.dim[0] * (double)a->w2.dim[0];
}

/* ---- the walk: a chunk of tokens at a time ---- */

/* The MLP's planes, a row of the gate's weights, and one number a token with its error. */
typedef struct {
    xp_ref_mlp p;
    double *gate, *z, *ze;
} work;

static size_t plan(const xp_dialect *d, const xp_tensor *x, const xp_tensor *w1, const xp_tensor *w2,
                   const xp_tensor *gamma, int bounds, void *ws, work *out) {
    xp_ref_layout l = {ws, 0};
    xp_ref_mlp_plan(&l, x->dim[0], w2->dim[0], w2->dim[1], bounds, d, XP_REF_MLP_SHARED, w1->dtype, x->dtype, &out->p);
    out->p.w1 = w1;
    out->p.w2 = w2;
    out->p.weight = gamma->dtype;
    out->gate = xp_ref_take(&l, (size_t)w2->dim[0] * sizeof(double));
    out->z = xp_ref_take(&l, XP_REF_MLP_ROWS * sizeof(double));
    out->ze = xp_ref_take(&l, XP_REF_MLP_ROWS * sizeof(double));
    return l.bytes;
}

typedef struct {
    int operand;
    xp_tensor *tol;
} request;
typedef void chunk_fn(work *w, int64_t row, int64_t m, const void *args, const request *want);

static void walk(int64_t T, work *w, const xp_tensor *gate, chunk_fn *fn, const void *args, const request *want) {
    if (gate->data)
        xp_ref_rows_load(gate, 0, 1, w->gate);
    for (int64_t row = 0; row < T; row += XP_REF_MLP_ROWS)
        fn(w, row, T - row < XP_REF_MLP_ROWS ? T - row : XP_REF_MLP_ROWS, args, want);
}

static void load_gamma(const xp_ref_mlp *p, const xp_tensor *gamma, int64_t row, int64_t m) {
    if (!p->parts)
        return;
    xp_ref_rows_load(gamma, row, m, p->gamma);
    if (p->gammae)
        memset(p->gammae, 0, (size_t)(m * p->parts) * sizeof *p->gammae);
}

static double dot_abs(const double *a, const double *b, int64_t n) {
    double s = 0.0;
    for (int64_t i = 0; i < n; i++)
        s += fabs(a[i]) * fabs(b[i]);
    return s;
}

/* ---- bounds ---- */

/* The MLP's errors are those of expert.c. On top of them, E an error, v the gate's weights, u, g and room as there:
 *   E(z)   = sum |v| (E(x) + g (|x| + E(x)));  E(sig) = sig (1 - sig) E(z) + E(z)^2 / 20 + 8 u(op) sig
 *   E(y)   = |sig| E(mlp) + |mlp| E(sig) + E(sig) E(mlp), from rounded sig and mlp
 * Backward, where dy, mlp, sig and pre are inputs: dmlp has only its rounding (none without a gate: a copy);
 *   E(dz)  = q E(d) + gamma_3 q (|d| + E(d)), d = <dy, mlp>, q = sig (1 - sig): three operations follow the sum
 *   E(dx)  = expert.c's with one more term in its sums, |v| (E(dz) + g (|dz| + E(dz))), from rounded dz
 * The gate's arithmetic is f64 only when both dtypes are. */
static xp_dtype gate_op(const xp_ref_mlp *p) {
    return p->param == XP_F64 && p->act == XP_F64 ? XP_F64 : XP_F32;
}

static xp_ref_rule act_rule(const xp_ref_mlp *p) {
    return xp_ref_rule_of(p->act, gate_op(p));
}

static void clear(double *e, int64_t n) {
    memset(e, 0, (size_t)n * sizeof *e);
}

/* sig, finished but not yet in the activation dtype. x and xe hold the cast input and its E + g (|x| + E), as the MLP
 * leaves them. */
static void gate_error(work *w, int64_t m) {
    const xp_ref_mlp *p = &w->p;
    const xp_dtype op = xp_ref_op(p->param);
    const xp_ref_rule rule = xp_ref_rule_of(p->param, op);
    for (int64_t i = 0; i < m; i++) {
        xp_ref_val z = {xp_ref_dot(p->x + i * p->H, w->gate, p->H), dot_abs(p->xe + i * p->H, w->gate, p->H)};
        xp_ref_dot_outputs(p->H, op, 1, &z.e);
        const xp_ref_val sig = xp_ref_val_sigmoid(&rule, xp_ref_rule_round(&rule, z));
        w->z[i] = sig.v;
        w->ze[i] = sig.e;
    }
    xp_ref_mlp_finish_error(p, m, w->z, w->ze);
}

/* y and ye become the gated output and its tolerance. */
static void gated_error(work *w, int64_t m) {
    const xp_ref_mlp *p = &w->p;
    const xp_ref_rule rule = act_rule(p);
    xp_ref_mlp_finish_error(p, m * p->H, p->y, p->ye);
    for (int64_t i = 0; i < m; i++) {
        const xp_ref_val sig = xp_ref_rule_round(&rule, (xp_ref_val){w->z[i], w->ze[i]});
        for (int64_t j = i * p->H; j < (i + 1) * p->H; j++) {
            const xp_ref_val y = xp_ref_val_mul(sig, xp_ref_rule_round(&rule, (xp_ref_val){p->y[j], p->ye[j]}));
            p->y[j] = y.v;
            p->ye[j] = y.e;
        }
    }
    xp_ref_out_errors(&rule, m * p->H, p->y, p->ye);
}

static void bound_chunk(work *w, int64_t row, int64_t m, const void *args, const request *want) {
    const xp_shared_args *a = args;
    xp_ref_mlp *p = &w->p;
    xp_ref_rows_load(&a->x, row, m, p->x);
    load_gamma(p, &a->gamma, row, m);
    clear(p->xe, m * p->H);
    if (want->operand == PRE || want->operand == SIG) {
        const xp_ref_rule rule = xp_ref_rule_of(p->act, xp_ref_op(p->param));
        xp_ref_mlp_forward_error(p, m, XP_REF_MLP_PRE);
        if (want->operand == PRE) {
            xp_ref_rows_store(want->tol, row, m, p->pree);
            return;
        }
        gate_error(w, m);
        xp_ref_out_errors(&rule, m, w->z, w->ze);
        xp_ref_rows_store(want->tol, row, m, w->ze);
    } else if (want->operand == ACT) {
        xp_ref_mlp_forward_error(p, m, XP_REF_MLP_ACT);
        xp_ref_rows_store(want->tol, row, m, p->mide);
    } else {
        xp_ref_mlp_forward_error(p, m, XP_REF_MLP_END);
        if (want->operand == Y && a->gate.data) {
            gate_error(w, m);
            gated_error(w, m);
        } else {
            xp_ref_mlp_out_error(p, m * p->H, p->y, p->ye);
        }
        xp_ref_rows_store(want->tol, row, m, p->ye);
    }
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)ref;
    const xp_shared_args *a = args;
    const request want = {operand, tol};
    work w;
    plan(a->dialect, &a->x, &a->w1, &a->w2, &a->gamma, 1, ws, &w);
    walk(a->x.dim[0], &w, &a->gate, bound_chunk, a, &want);
    return XP_OK;
}

static size_t bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_args *a = args;
    work w;
    return plan(a->dialect, &a->x, &a->w1, &a->w2, &a->gamma, 1, NULL, &w);
}

/* y = dmlp and ye, before its rounding; z = dz and ze likewise. */
static void ungate_error(work *w, const xp_shared_bwd_args *a, int64_t row, int64_t m) {
    const xp_ref_mlp *p = &w->p;
    const double g3 = xp_ref_both(3, gate_op(p));
    for (int64_t i = 0; i < m; i++) {
        double *dy = p->y + i * p->H, *mlp = p->x; /* one row of x, which is free until dx */
        const double sig = xp_widen(a->sig.data, a->sig.dtype, (row + i) * a->sig.stride[0]);
        const double q = sig * (1.0 - sig);
        xp_ref_rows_load(&a->mlp, row + i, 1, mlp);
        xp_ref_val d = {xp_ref_dot(dy, mlp, p->H), dot_abs(dy, mlp, p->H)};
        xp_ref_dot_errors(p->H, gate_op(p), 1, &d.e);
        w->z[i] = d.v * q;
        w->ze[i] = fabs(q) * (d.e + g3 * (fabs(d.v) + d.e));
        for (int64_t j = 0; j < p->H; j++) {
            const xp_ref_val dmlp = xp_ref_val_mul((xp_ref_val){dy[j], 0.0}, (xp_ref_val){sig, 0.0});
            dy[j] = dmlp.v;
            p->ye[i * p->H + j] = dmlp.e;
        }
    }
}

/* x and xe gain the gate's part of dx. */
static void gate_dx_error(work *w, int64_t m) {
    const xp_ref_mlp *p = &w->p;
    const xp_ref_rule rule = act_rule(p);
    xp_ref_round_errors(&rule, m, w->z, w->ze);
    xp_ref_mlp_finish_error(p, m, w->z, w->ze);
    const int64_t n = p->U + 1;
    for (int64_t i = 0; i < m; i++) {
        double t = w->ze[i];
        xp_ref_dot_inputs(n, xp_ref_op(p->param), 1, w->z + i, &t);
        for (int64_t j = 0; j < p->H; j++) {
            p->x[i * p->H + j] += w->z[i] * w->gate[j];
            p->xe[i * p->H + j] += t * fabs(w->gate[j]);
        }
    }
}

static void bwd_bound_chunk(work *w, int64_t row, int64_t m, const void *args, const request *want) {
    const xp_shared_bwd_args *a = args;
    xp_ref_mlp *p = &w->p;
    const xp_ref_rule rule = act_rule(p);
    const int gated = a->gate.data != NULL;
    xp_ref_rows_load(&a->dy, row, m, p->y);
    clear(p->ye, m * p->H);
    if (gated)
        ungate_error(w, a, row, m);
    if (want->operand == DMLP) {
        if (gated)
            xp_ref_out_errors(&rule, m * p->H, p->y, p->ye);
        xp_ref_rows_store(want->tol, row, m, p->ye);
        return;
    }
    if (want->operand == DZ) {
        xp_ref_out_errors(&rule, m, w->z, w->ze);
        xp_ref_rows_store(want->tol, row, m, w->ze);
        return;
    }
    if (gated)
        xp_ref_round_errors(&rule, m * p->H, p->y, p->ye);
    xp_ref_rows_load(&a->pre, row, m, p->pre);
    clear(p->pree, m * p->U);
    load_gamma(p, &a->gamma, row, m);
    if (want->operand == DGAMMA) {
        const xp_ref_rule wide = xp_ref_rule_of(a->dgamma.dtype, xp_ref_op(p->param));
        xp_ref_mlp_backward_error(p, m, 0, XP_REF_MLP_DPRE);
        xp_ref_out_errors(&wide, m * p->parts, p->dgamma, p->dgammae);
        xp_ref_rows_store(want->tol, row, m, p->dgammae);
        return;
    }
    if (want->operand == DPRE) {
        xp_ref_mlp_backward_error(p, m, 0, XP_REF_MLP_DPRE);
        xp_ref_rows_store(want->tol, row, m, p->pree);
        return;
    }
    xp_ref_mlp_backward_error(p, m, gated, XP_REF_MLP_END);
    if (gated)
        gate_dx_error(w, m);
    xp_ref_mlp_out_error(p, m * p->H, p->x, p->xe);
    xp_ref_rows_store(want->tol, row, m, p->xe);
}

static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    (void)ref;
    const xp_shared_bwd_args *a = args;
    const request want = {operand, tol};
    work w;
    plan(a->dialect, &a->dy, &a->w1, &a->w2, &a->gamma, 1, ws, &w);
    walk(a->dy.dim[0], &w, &a->gate, bwd_bound_chunk, a, &want);
    return XP_OK;
}

static size_t bwd_bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_bwd_args *a = args;
    work w;
    return plan(a->dialect, &a->dy, &a->w1, &a->w2, &a->gamma, 1, NULL, &w);
}

/* ---- reference ---- */

static void forward_chunk(work *w, int64_t row, int64_t m, const void *args, const request *want) {
    (void)want;
    const xp_shared_args *a = args;
    xp_ref_mlp *p = &w->p;
    xp_ref_rows_load(&a->x, row, m, p->x);
    load_gamma(p, &a->gamma, row, m);
    xp_ref_mlp_forward(p, m, row, &a->pre, &a->act); /* leaves x cast */
    xp_ref_rows_store(&a->mlp, row, m, p->y);
    if (a->gate.data) {
        xp_ref_round_row(p->act, m * p->H, p->y);
        for (int64_t i = 0; i < m; i++)
            w->z[i] = xp_ref_sigmoid(xp_ref_round(xp_ref_dot(p->x + i * p->H, w->gate, p->H), p->param));
        xp_ref_mlp_finish(p, m, w->z);
        xp_ref_rows_store(&a->sig, row, m, w->z);
        xp_ref_round_row(p->act, m, w->z);
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = i * p->H; j < (i + 1) * p->H; j++)
                p->y[j] *= w->z[i];
        }
    }
    xp_ref_rows_store(&a->y, row, m, p->y);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_shared_args *a = args;
    work w;
    plan(a->dialect, &a->x, &a->w1, &a->w2, &a->gamma, 0, x->ws, &w);
    walk(a->x.dim[0], &w, &a->gate, forward_chunk, a, NULL);
    return XP_OK;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_args *a = args;
    work w;
    return plan(a->dialect, &a->x, &a->w1, &a->w2, &a->gamma, 0, NULL, &w);
}

/* y = dy becomes dmlp, z dz; both are stored, and rounded for what follows. */
static void ungate(work *w, const xp_shared_bwd_args *a, int64_t row, int64_t m) {
    const xp_ref_mlp *p = &w->p;
    for (int64_t i = 0; i < m; i++) {
        double *dy = p->y + i * p->H, *mlp = p->x; /* one row of x, which is free until dx */
        const double sig = xp_widen(a->sig.data, a->sig.dtype, (row + i) * a->sig.stride[0]);
        xp_ref_rows_load(&a->mlp, row + i, 1, mlp);
        w->z[i] = xp_ref_dot(dy, mlp, p->H) * (sig * (1.0 - sig));
        for (int64_t j = 0; j < p->H; j++)
            dy[j] *= sig;
    }
    xp_ref_rows_store(&a->dz, row, m, w->z);
    xp_ref_round_row(p->act, m, w->z);
}

static void backward_chunk(work *w, int64_t row, int64_t m, const void *args, const request *want) {
    (void)want;
    const xp_shared_bwd_args *a = args;
    xp_ref_mlp *p = &w->p;
    xp_ref_rows_load(&a->dy, row, m, p->y);
    if (a->gate.data)
        ungate(w, a, row, m);
    xp_ref_rows_store(&a->dmlp, row, m, p->y);
    xp_ref_round_row(p->act, m * p->H, p->y);
    xp_ref_rows_load(&a->pre, row, m, p->pre);
    load_gamma(p, &a->gamma, row, m);
    xp_ref_mlp_backward(p, m, row, &a->dpre);
    if (p->parts)
        xp_ref_rows_store(&a->dgamma, row, m, p->dgamma);
    if (a->gate.data) {
        xp_ref_mlp_finish(p, m, w->z);
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < p->H; j++)
                p->x[i * p->H + j] += w->z[i] * w->gate[j];
        }
    }
    xp_ref_mlp_finish(p, m * p->H, p->x);
    xp_ref_rows_store(&a->dx, row, m, p->x);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_shared_bwd_args *a = args;
    work w;
    plan(a->dialect, &a->dy, &a->w1, &a->w2, &a->gamma, 0, x->ws, &w);
    walk(a->dy.dim[0], &w, &a->gate, backward_chunk, a, NULL);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_bwd_args *a = args;
    work w;
    return plan(a->dialect, &a->dy, &a->w1, &a->w2, &a->gamma, 0, NULL, &w);
}

/* ---- tokens a few at a time ---- */

static xp_tensor rows_of(const xp_tensor *t, int64_t lo, int64_t hi) {
    return t->data ? xp_tensor_rows(t, 0, lo, hi) : *t;
}

static int64_t extent(const void *args) {
    return ((const xp_shared_args *)args)->x.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_shared_args *a = args;
    xp_shared_args *o = out;
    o->x = rows_of(&a->x, lo, hi);
    o->pre = rows_of(&a->pre, lo, hi);
    o->act = rows_of(&a->act, lo, hi);
    o->mlp = rows_of(&a->mlp, lo, hi);
    o->sig = rows_of(&a->sig, lo, hi);
    o->y = rows_of(&a->y, lo, hi);
    o->gamma = rows_of(&a->gamma, lo, hi);
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_shared_bwd_args *)args)->dy.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_shared_bwd_args *a = args;
    xp_shared_bwd_args *o = out;
    o->dy = rows_of(&a->dy, lo, hi);
    o->pre = rows_of(&a->pre, lo, hi);
    o->mlp = rows_of(&a->mlp, lo, hi);
    o->sig = rows_of(&a->sig, lo, hi);
    o->dmlp = rows_of(&a->dmlp, lo, hi);
    o->dpre = rows_of(&a->dpre, lo, hi);
    o->dz = rows_of(&a->dz, lo, hi);
    o->dx = rows_of(&a->dx, lo, hi);
    o->gamma = rows_of(&a->gamma, lo, hi);
    o->dgamma = rows_of(&a->dgamma, lo, hi);
}

/* ---- stages and rows ---- */

const xp_stage xp_stage_shared = {
    .name = "shared",
    .meaning = "the expert that every token passes, with or without a sigmoid gate",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_shared_args),
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

const xp_stage xp_stage_shared_bwd = {
    .name = "shared_bwd",
    .meaning = "gradients of the shared expert with respect to its input, its linear maps' outputs and its gate",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_shared_bwd_args),
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
    .wants = bwd_wants,
};

const xp_kernel xp_ref_shared = {
    .stage = &xp_stage_shared,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_shared_bwd = {
    .stage = &xp_stage_shared_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
