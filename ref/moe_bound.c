/* The bound of stage moe: errors carried through the whole layer, forward and backward.
 *
 * Both sides compute in D, the operands' dtype (f32 or f64), which is also what every intermediate is rounded to; each
 * declared rounding costs both sides one. A value is a pair (v, e): the reference's, and how far another implementation
 * may be. g_n = gamma_n(D) + gamma_n(f64). Sums are in any order. With err.h's rules for products, roundings,
 * functions:
 *
 * - logits: e = g_H sum |x| |wr|, with a bias one term more, rounded.
 *
 * - scores, weights and their way back: routing.c, with the logits' errors on entry.
 *
 * - experts: the chain of expert.c with errors on entry. y: e(w out) by the product rule, g_K for the sum.
 *
 * - dw = <dy, W2 act> or <W2^T dy, act>: sum |dy| |W2| (e(act) + g_(F+H) (|act| + e(act))), and W2 act's rounding.
 *
 * - identity experts: w x, its gradients w dy and <dy, x>. Weights at the input: rows r(w x), dw = <d row, x>.
 *
 * - dx: expert.c's backward with errors of dout = w dy and of pre on entry, dlogits wr, the shared expert's part; one
 *   chain may run through all slots and parts, 2 F K + E + 2 S + 1 long, or parts are summed and rounded: g_K, g_2.
 *
 * - the router's weights of shared experts enter the hidden rows by the product rule; their gradients are <W2^T dy,
 * act> part by part, and go back with the dw of the token's slots.
 *
 * - weight gradients over n rows: sum of (|a| + e_a)(|b| + e_b) (1 + g_n) - |a| |b|. */
#include "moe.h"

#include <math.h>
#include <string.h>

#include "err.h"
#include "linear.h"
#include "mlp.h"
#include "plane.h"
#include "ref.h"
#include "routing.h"
#include "token.h"
#include "xp/capacity.h"

enum { CHUNK = XP_REF_MLP_ROWS };

typedef struct {
    const xp_moe_args *a;
    xp_dtype op, weight_dtype;
    xp_ref_rule rule, wide, logits_rule; /* of the operands' dtype, of f32 (f64), of the logits */
    int64_t T, Z, E, K, H, F, U, S, X;
    int64_t A, N;              /* shared rows; K + A slots that weights are divided among */
    xp_ref_routing r;          /* of one token */
    xp_ref_val *logit;         /* [T,Z] */
    xp_ref_val *used, *dw;     /* [T,K] the weights, and their gradients */
    xp_ref_val *gamma, *dslot; /* [T,A] those of the shared rows; [N] dw of one token, and behind it dgamma */
    xp_ref_val *dgamma;        /* [T,A] */
    xp_ref_val *g, *dl;        /* [Z] scratch */
    xp_ref_val *gr, *gs;       /* [T,H] what the routed experts and the shared expert see of dy */
    xp_ref_val *y, *dx;        /* [T,H]: sums over the parts so far */
    double *dxe;               /* [T,H]: sum of |part| + e, for the sum of the parts */
    double *lv, *le;           /* a chunk of rows of Z */
    double *left, *right;      /* factors of a sum over rows */
    double *wide_e;            /* a chunk of rows of H: errors of <dy, out> for each unit of dy */
    double *gate, *z, *ze;     /* a row of H; two numbers for each row of a chunk */
    double *ones;              /* [CHUNK] of 1 */
    int64_t *tok, *slot;       /* of a chunk of expert rows */
    xp_capacity_args capacity; /* kept [T,K]: the slots that have rows; idx itself without a capacity */
    void *capacity_ws;
    xp_ref_mlp expert, shared; /* their planes share memory: one is done before the other starts */
} work;

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static void plan_mlp(xp_ref_layout *l, const work *w, int64_t width, xp_ref_mlp_kind kind, xp_ref_mlp *out) {
    xp_ref_mlp_plan(l, CHUNK, w->H, width, 1, w->a->dialect, kind, w->a->x.dtype, w->a->x.dtype, out);
    out->acte = xp_ref_take(l, (size_t)(CHUNK * width) * sizeof(double));
    out->dpree = xp_ref_take(l, (size_t)(CHUNK * 2 * width) * sizeof(double));
}

static void plan_routing(xp_ref_layout *l, work *w) {
    const xp_moe_args *a = w->a;
    const xp_dtype wide = a->x.dtype == XP_F64 ? XP_F64 : XP_F32;
    const xp_dtype logits = a->dialect->logits_dtype == XP_WIDE_ACT ? a->x.dtype : wide;
    w->wide = xp_ref_rule_of(wide, w->op);
    w->logits_rule = xp_ref_rule_of(logits, w->op);
    w->weight_dtype = a->dialect->weight_dtype == XP_WIDE_ACT ? a->x.dtype : wide;
    xp_ref_routing_plan(l, a->dialect, w->Z, w->K, logits, a->x.dtype, w->op, 1, &w->r);
    w->r.bias = xp_ref_take_widened(l, &a->bias);
    w->r.scale_e = xp_ref_take_widened(l, &a->scale_e);
    w->logit = xp_ref_take(l, (size_t)(w->T * w->Z) * sizeof *w->logit);
    w->g = xp_ref_take(l, (size_t)w->Z * sizeof *w->g);
    w->dl = xp_ref_take(l, (size_t)w->Z * sizeof *w->dl);
    w->used = xp_ref_take(l, (size_t)(w->T * w->K) * sizeof *w->used);
    w->dw = xp_ref_take(l, (size_t)(w->T * w->K) * sizeof *w->dw);
    w->gamma = xp_ref_take(l, (size_t)(w->T * w->A) * sizeof *w->gamma);
    w->dgamma = xp_ref_take(l, (size_t)(w->T * w->A) * sizeof *w->dgamma);
    w->dslot = xp_ref_take(l, (size_t)w->N * sizeof *w->dslot);
}

static void plan_capacity(xp_ref_layout *l, work *w) {
    const xp_moe_args *a = w->a;
    w->capacity = (xp_capacity_args){.idx = a->idx, .kept = a->idx, .dialect = a->dialect};
    if (!xp_dialect_limits(a->dialect))
        return;
    w->capacity.dropped = xp_tensor_1d(xp_ref_take(l, (size_t)w->E * sizeof(int64_t)), XP_I64, w->E);
    w->capacity.kept = xp_tensor_2d(xp_ref_take(l, (size_t)(w->T * w->K) * sizeof(int32_t)), XP_I32, w->T, w->K);
    w->capacity_ws = xp_ref_take(l, xp_ref_capacity.workspace(&w->capacity, NULL));
}

/* Which slots a full expert drops depends on idx alone: see check(). */
static void keep_slots(const work *w) {
    const xp_exec x = {.ws = w->capacity_ws};
    if (xp_dialect_limits(w->a->dialect))
        (void)xp_ref_capacity.run(&x, &w->capacity); /* it has no way to fail */
}

static size_t plan(const xp_moe_args *a, void *ws, work *w) {
    *w = (work){.a = a, .op = xp_ref_op(a->x.dtype), .rule = xp_ref_rule_of(a->x.dtype, xp_ref_op(a->x.dtype))};
    w->T = a->x.dim[0];
    w->Z = a->wr.dim[0];
    w->E = a->w1.dim[0];
    w->K = a->idx.dim[1];
    w->A = a->dialect->shared_rows;
    w->N = w->K + w->A;
    w->H = a->x.dim[1];
    w->F = a->w2.dim[2];
    w->U = a->w1.dim[1];
    w->S = a->sw2.data ? a->sw2.dim[1] : 0;
    w->X = a->sw1.data ? a->sw1.dim[0] : 0;
    const size_t number = sizeof(double), chunk = CHUNK * sizeof(double), rows = (size_t)(w->T * w->H);
    const int64_t widest = most(most(w->Z, w->H), most(w->U, w->X));
    xp_ref_layout l = {ws, 0};
    plan_routing(&l, w);
    plan_capacity(&l, w);
    w->gr = xp_ref_take(&l, rows * sizeof *w->gr);
    w->gs = xp_ref_take(&l, rows * sizeof *w->gs);
    w->y = xp_ref_take(&l, rows * sizeof *w->y);
    w->dx = xp_ref_take(&l, rows * sizeof *w->dx);
    w->dxe = xp_ref_take(&l, rows * number);
    w->lv = xp_ref_take(&l, chunk * (size_t)w->Z);
    w->le = xp_ref_take(&l, chunk * (size_t)w->Z);
    w->left = xp_ref_take(&l, chunk * (size_t)widest);
    w->right = xp_ref_take(&l, chunk * (size_t)most(w->H, most(w->F, w->S)));
    w->wide_e = xp_ref_take(&l, chunk * (size_t)w->H);
    w->gate = xp_ref_take(&l, number * (size_t)w->H);
    w->z = xp_ref_take(&l, chunk);
    w->ze = xp_ref_take(&l, chunk);
    w->ones = xp_ref_take(&l, chunk);
    w->tok = xp_ref_take(&l, CHUNK * sizeof(int64_t));
    w->slot = xp_ref_take(&l, CHUNK * sizeof(int64_t));
    xp_ref_layout other = l;
    plan_mlp(&l, w, w->F, XP_REF_MLP_EXPERT, &w->expert);
    plan_mlp(&other, w, w->S, XP_REF_MLP_SHARED, &w->shared);
    w->shared.weight = w->weight_dtype;
    return l.bytes > other.bytes ? l.bytes : other.bytes;
}

size_t xp_ref_moe_bound_ws(const xp_moe_args *a) {
    work w;
    return plan(a, NULL, &w);
}

/* ---- small things ---- */

static int64_t expert_at(const work *w, int64_t t, int64_t k) {
    return *(const int32_t *)xp_tensor_at(&w->capacity.kept, t, k, 0, 0);
}

static xp_ref_val rounded(const work *w, double v, double e) {
    return xp_ref_rule_round(&w->rule, (xp_ref_val){v, e});
}

static int of_router(int operand) {
    return operand == XP_REF_MOE_DWR || operand == XP_REF_MOE_DRBIAS;
}

static int at_input(const work *w) {
    return w->a->dialect->weight_at == XP_AT_INPUT;
}

static int is_identity(const work *w, int64_t e) {
    return e >= w->E && w->a->dialect->null_kind == XP_NULL_IDENTITY;
}

static double out_scale(const work *w) {
    const double scale = xp_dialect_output_factor(w->a->dialect, w->K);
    return w->op == XP_F64 ? scale : (double)(float)scale;
}

static int averages(const work *w) {
    return w->S > 0 && w->a->dialect->shared_combine == XP_COMBINE_AVERAGE;
}

/* One term of a sum of n: its own error and its part of the sum's. */
static void accumulate(const work *w, int64_t n, xp_ref_val term, xp_ref_val *sum) {
    sum->v += term.v;
    sum->e += term.e + xp_ref_both(n, w->op) * (fabs(term.v) + term.e);
}

/* One slot's part of y. Where the record rounds a product or each sum to the activation dtype, either side may. */
static void accumulate_y(const work *w, xp_ref_val term, xp_ref_val *sum) {
    const xp_accumulate how = w->a->dialect->accumulate;
    if (how == XP_ACC_EAGER_ACT || how == XP_ACC_PRODUCTS_ACT_F32)
        term = rounded(w, term.v, term.e);
    accumulate(w, w->K, term, sum);
    if (how == XP_ACC_EAGER_ACT)
        sum->e += 2.0 * (xp_ref_gamma(w->K, w->a->x.dtype) * (fabs(term.v) + term.e) +
                         (double)w->K * xp_ref_half_ulp_err(w->a->x.dtype, 0.0));
}

/* One row's part of dx: with dx_sum act each sum may be rounded to the activation dtype on either side. */
static void accumulate_dx(const work *w, xp_ref_val term, xp_ref_val *sum) {
    if (w->a->dialect->dx_sum == XP_DX_ACT)
        term = rounded(w, term.v, term.e);
    accumulate(w, w->K, term, sum);
    if (w->a->dialect->dx_sum == XP_DX_ACT)
        sum->e += 2.0 * (xp_ref_gamma(w->K, w->a->x.dtype) * (fabs(term.v) + term.e) +
                         (double)w->K * xp_ref_half_ulp_err(w->a->x.dtype, 0.0));
}

/* Sums of dx are U K + Z + X + K + 1 long when all parts share one chain. */
static int64_t dx_terms(const work *w) {
    return w->U * w->K + w->Z + w->X + w->K + 1;
}

/* An MLP output's rounding, in y and ye; `wide` gets what <dy, y> loses for each unit of dy, whether it is summed as
 * dy . (W2 act) or as (W2^T dy) . act: a chain of F + H over |W2| |act|, and the rounding of y. */
static void round_outputs(const work *w, const xp_ref_mlp *p, int64_t m) {
    const int64_t n = p->F + w->H;
    memcpy(p->mide, p->acte, (size_t)(m * p->F) * sizeof(double));
    xp_ref_dot_inputs(n, w->op, m * p->F, p->mid, p->mide);
    xp_ref_linear_nt(p->mide, m, p->F, p->w2, 1, w->wide_e, w->H, p->tile);
    xp_ref_dot_outputs(n, w->op, m * w->H, w->wide_e);
    for (int64_t i = 0; i < m * w->H; i++) {
        const xp_ref_val out = rounded(w, p->y[i], p->ye[i]);
        w->wide_e[i] += (1.0 + xp_ref_both(w->H, w->op)) * (out.e - p->ye[i]);
        p->y[i] = out.v;
        p->ye[i] = out.e;
    }
}

/* <dy, y> of one row of a chunk. */
static xp_ref_val dot_dy(const work *w, const xp_ref_val *dy, const double *y, const double *wide) {
    xp_ref_val s = {0.0, 0.0};
    for (int64_t h = 0; h < w->H; h++) {
        s.v += dy[h].v * y[h];
        s.e += fabs(dy[h].v) * wide[h] + dy[h].e * (fabs(y[h]) + wide[h]);
    }
    xp_ref_dot_outputs(w->H, w->op, 1, &s.e);
    return s;
}

/* The tolerance of dw[i][j] = sum over `rows` rows of a[r][i] b[r][j] grows by m of them. be NULL: b is exact. */
static void outer_errors(const work *w, int64_t rows, int64_t m, int64_t ni, const double *av, const double *ae,
                         int64_t nj, const double *bv, const double *be, const xp_tensor *tol) {
    const double g = xp_ref_both(rows, w->op);
    double *out = tol->data;
    for (int64_t i = 0; i < m * ni; i++)
        w->left[i] = ae[i] + g * (fabs(av[i]) + ae[i]);
    for (int64_t j = 0; j < m * nj; j++)
        w->right[j] = fabs(bv[j]) + (be ? be[j] : 0.0);
    xp_ref_linear_add(w->left, 1, ni, w->right, nj, ni, nj, m, out, tol->stride[0]);
    for (int64_t i = 0; i < m * ni && be; i++)
        w->left[i] = fabs(av[i]);
    if (be)
        xp_ref_linear_add(w->left, 1, ni, be, nj, ni, nj, m, out, tol->stride[0]);
}

/* Sums of errors over n rows become tolerances of rows of a matrix that holds ref. */
static void finish(const work *w, int64_t n, const xp_tensor *ref, xp_tensor *tol) {
    for (int64_t i = 0; i < tol->dim[0]; i++) {
        double *e = xp_tensor_at(tol, i, 0, 0, 0);
        xp_ref_dot_outputs(n, w->op, tol->dim[1], e);
        xp_ref_out_errors(&w->rule, tol->dim[1], xp_tensor_at(ref, i, 0, 0, 0), e);
    }
}

static void clear(double *e, int64_t n) {
    memset(e, 0, (size_t)n * sizeof *e);
}

static void clear_rows(xp_tensor *t) {
    for (int64_t i = 0; i < t->dim[0]; i++)
        clear(xp_tensor_at(t, i, 0, 0, 0), t->dim[1]);
}

/* ---- routing ---- */

/* Scores, and where weights depend on them groups, of token t, from its logits and their errors. The reference stores
 * the scores, one rounding more than routing.c counts. */
static void token_scores(work *w, int64_t t) {
    for (int64_t e = 0; e < w->Z; e++) {
        const xp_ref_val l = w->logit[t * w->Z + e];
        w->r.l[e] = l.v;
        w->left[e] = l.v == l.v ? l.e : 0.0; /* a NaN logit scores 0 by definition */
    }
    xp_ref_routing_scores(&w->r, w->left);
    xp_ref_routing_store(&w->r, w->wide.d);
    for (int64_t e = 0; e < w->Z; e++)
        w->r.score_e[e] += xp_ref_room(w->wide.d, fabs(w->r.score[e]));
    if (w->a->dialect->masked_weight)
        xp_ref_routing_keys(&w->r);
}

static void token_weights(work *w, int64_t t) {
    xp_ref_routing_weights(&w->r, xp_ref_routing_slots(&w->r, xp_tensor_at(&w->a->idx, t, 0, 0, 0)));
    for (int64_t k = 0; k < w->K; k++)
        w->used[t * w->K + k] = xp_ref_val_round(w->r.w[k], w->weight_dtype, w->op);
    for (int64_t j = 0; j < w->A; j++)
        w->gamma[t * w->A + j] = xp_ref_val_round(w->r.w[w->K + j], w->weight_dtype, w->op);
}

static xp_ref_val logit_of(const work *w, int64_t e, double v, double err) {
    if (w->a->rbias.data) {
        const double b = xp_widen(w->a->rbias.data, w->a->rbias.dtype, e);
        v += b;
        err += xp_ref_both(w->H + 1, w->op) * fabs(b);
    }
    return xp_ref_rule_round(&w->logits_rule, (xp_ref_val){v, err});
}

static void route(work *w) {
    const xp_ref_mlp *p = &w->expert; /* only its planes of H */
    const int64_t terms = w->H + (w->a->rbias.data != NULL);
    for (int64_t row = 0; row < w->T; row += CHUNK) {
        const int64_t m = least(CHUNK, w->T - row);
        xp_ref_rows_load(&w->a->x, row, m, p->x);
        clear(p->xe, m * w->H);
        xp_ref_linear_nt(p->x, m, w->H, &w->a->wr, 0, w->lv, w->Z, p->tile);
        xp_ref_dot_inputs(terms, w->op, m * w->H, p->x, p->xe);
        xp_ref_linear_nt(p->xe, m, w->H, &w->a->wr, 1, w->le, w->Z, p->tile);
        xp_ref_dot_outputs(terms, w->op, m * w->Z, w->le);
        for (int64_t i = 0; i < m * w->Z; i++)
            w->logit[row * w->Z + i] = logit_of(w, i % w->Z, w->lv[i], w->le[i]);
        for (int64_t t = row; t < row + m; t++) {
            token_scores(w, t);
            token_weights(w, t);
        }
    }
}

static void token_dlogits(work *w, int64_t t, double *lv, double *le) {
    token_scores(w, t);
    memcpy(w->dslot, w->dw + t * w->K, (size_t)w->K * sizeof *w->dslot);
    memcpy(w->dslot + w->K, w->dgamma + t * w->A, (size_t)w->A * sizeof *w->dslot);
    xp_ref_routing_back_vals(&w->r, xp_ref_routing_slots(&w->r, xp_tensor_at(&w->a->idx, t, 0, 0, 0)), w->dslot, w->g,
                             w->dl);
    for (int64_t e = 0; e < w->Z; e++) {
        const xp_ref_val d = xp_ref_rule_round(&w->logits_rule, w->dl[e]);
        lv[e] = d.v;
        le[e] = d.e;
    }
}

/* What the parts see of dy: half of it with an average, times the output's scale for the routed experts. */
static void load_dy(work *w) {
    for (int64_t t = 0; t < w->T; t++) {
        for (int64_t h = 0; h < w->H; h++) {
            xp_ref_val v = {xp_widen(xp_tensor_at(&w->a->dy, t, h, 0, 0), w->a->dy.dtype, 0), 0.0};
            if (averages(w)) {
                v = xp_ref_val_mul(v, (xp_ref_val){0.5, 0.0});
                v = rounded(w, v.v, v.e);
            }
            w->gs[t * w->H + h] = v;
            if (out_scale(w) != 1.0) {
                v = xp_ref_val_mul(v, (xp_ref_val){out_scale(w), 0.0});
                v = rounded(w, v.v, v.e);
            }
            w->gr[t * w->H + h] = v;
        }
    }
}

/* ---- experts ---- */

/* Rows of expert e from slot number `from` (t K + k) on, at most CHUNK; returns where to go on. */
static int64_t rows_of(const work *w, int64_t e, int64_t from, int64_t *out_m) {
    *out_m = 0;
    for (; from < w->T * w->K && *out_m < CHUNK; from++) {
        if (expert_at(w, from / w->K, from % w->K) == e) {
            w->tok[*out_m] = from / w->K;
            w->slot[(*out_m)++] = from;
        }
    }
    return from;
}

static int64_t count_rows(const work *w, int64_t e) {
    int64_t n = 0;
    for (int64_t i = 0; i < w->T * w->K; i++)
        n += expert_at(w, i / w->K, i % w->K) == e;
    return n;
}

static xp_ref_val x_of(const work *w, int64_t t, int64_t h) {
    return (xp_ref_val){xp_widen(xp_tensor_at(&w->a->x, t, h, 0, 0), w->a->x.dtype, 0), 0.0};
}

/* The rows that the experts read: x, or r(w x). */
static void load_inputs(const work *w, int64_t m, double *v, double *e) {
    for (int64_t i = 0; i < m; i++) {
        for (int64_t h = 0; h < w->H; h++) {
            xp_ref_val x = x_of(w, w->tok[i], h);
            if (at_input(w)) {
                x = xp_ref_val_mul(w->used[w->slot[i]], x);
                x = rounded(w, x.v, x.e);
            }
            v[i * w->H + h] = x.v;
            e[i * w->H + h] = x.e;
        }
    }
}

/* The weight that multiplies an output row. */
static xp_ref_val out_weight(const work *w, int64_t slot) {
    return at_input(w) ? (xp_ref_val){1.0, 0.0} : w->used[slot];
}

/* The rows' outputs go into y and, dotted with dy, into dw. */
static void expert_outputs(const work *w, int64_t m) {
    const xp_ref_mlp *p = &w->expert;
    round_outputs(w, p, m);
    for (int64_t i = 0; i < m; i++) {
        const double *v = p->y + i * w->H, *e = p->ye + i * w->H;
        for (int64_t h = 0; h < w->H; h++) {
            const xp_ref_val out = {v[h], e[h]};
            accumulate_y(w, xp_ref_val_mul(out_weight(w, w->slot[i]), out), &w->y[w->tok[i] * w->H + h]);
        }
        if (at_input(w))
            continue;
        const xp_ref_val d = dot_dy(w, w->gr + w->tok[i] * w->H, v, w->wide_e + i * w->H);
        w->dw[w->slot[i]] = xp_ref_rule_round(&w->wide, d);
    }
}

/* y and ye become dout. */
static void expert_douts(const work *w, int64_t m) {
    const xp_ref_mlp *p = &w->expert;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t h = 0; h < w->H; h++) {
            const xp_ref_val d = xp_ref_val_mul(out_weight(w, w->slot[i]), w->gr[w->tok[i] * w->H + h]);
            const xp_ref_val r = rounded(w, d.v, d.e);
            p->y[i * w->H + h] = r.v;
            p->ye[i * w->H + h] = r.e;
        }
    }
}

/* Rows of dx: into the tokens' sums, and where weights are at the input into dw. A product with the weight may be
 * rounded to the activation dtype. */
static void expert_dx(const work *w, int64_t m) {
    const xp_ref_mlp *p = &w->expert;
    for (int64_t i = 0; i < m; i++) {
        xp_ref_val dot = {0.0, 0.0};
        for (int64_t h = 0; h < w->H; h++) {
            xp_ref_val d = rounded(w, p->x[i * w->H + h], p->xe[i * w->H + h]);
            accumulate(w, w->H, xp_ref_val_mul(d, x_of(w, w->tok[i], h)), &dot);
            if (at_input(w)) {
                d = xp_ref_val_mul(w->used[w->slot[i]], d);
                d.e += xp_ref_room(w->a->x.dtype, fabs(d.v) + d.e);
            }
            accumulate_dx(w, d, &w->dx[w->tok[i] * w->H + h]);
        }
        if (at_input(w))
            w->dw[w->slot[i]] = xp_ref_rule_round(&w->wide, dot);
    }
}

static void expert_chunk(work *w, int64_t m, int64_t rows, int operand, const xp_tensor *tol) {
    xp_ref_mlp *p = &w->expert;
    load_inputs(w, m, p->x, p->xe);
    xp_ref_mlp_forward_error(p, m, XP_REF_MLP_END);
    expert_outputs(w, m);
    if (operand == XP_REF_MOE_Y || (of_router(operand) && !at_input(w)))
        return;
    expert_douts(w, m);
    if (operand == XP_REF_MOE_DW2) {
        outer_errors(w, rows, m, w->H, p->y, p->ye, w->F, p->mid, p->acte, tol);
        return;
    }
    if (operand == XP_REF_MOE_DB2) {
        outer_errors(w, rows, m, w->H, p->y, p->ye, 1, w->ones, NULL, tol);
        return;
    }
    xp_ref_mlp_backward_error(p, m, dx_terms(w) - w->U, XP_REF_MLP_END);
    if (operand == XP_REF_MOE_DW1) {
        load_inputs(w, m, p->y, p->ye);
        outer_errors(w, rows, m, w->U, p->pre, p->dpree, w->H, p->y, p->ye, tol);
        return;
    }
    if (operand == XP_REF_MOE_DB1) {
        outer_errors(w, rows, m, w->U, p->pre, p->dpree, 1, w->ones, NULL, tol);
        return;
    }
    expert_dx(w, m);
}

/* An expert's part of a gradient's tolerance, as a matrix: of a bias one column. */
static xp_tensor part_of(const xp_tensor *t, int64_t e) {
    if (t->ndim == 3)
        return xp_ref_matrix(t, e);
    xp_tensor out = xp_tensor_rows(t, 0, e, e + 1);
    out.dim[0] = t->dim[1];
    out.dim[1] = 1;
    out.stride[0] = 1;
    out.stride[1] = 1;
    return out;
}

/* Identity experts: y += w x, dw = <dy, x>, dx += w dy. */
static void nulls(work *w) {
    for (int64_t s = 0; s < w->T * w->K; s++) {
        const int64_t t = s / w->K;
        w->dw[s] = expert_at(w, t, s % w->K) < w->E ? w->dw[s] : (xp_ref_val){0.0, 0.0};
        if (!is_identity(w, expert_at(w, t, s % w->K)))
            continue;
        xp_ref_val dot = {0.0, 0.0};
        for (int64_t h = 0; h < w->H; h++) {
            const xp_ref_val x = x_of(w, t, h), g = w->gr[t * w->H + h];
            accumulate(w, w->H, xp_ref_val_mul(g, x), &dot);
            accumulate_y(w, xp_ref_val_mul(w->used[s], x), &w->y[t * w->H + h]);
            xp_ref_val d = xp_ref_val_mul(w->used[s], g);
            d.e += xp_ref_room(w->a->x.dtype, fabs(d.v) + d.e);
            accumulate(w, w->K, d, &w->dx[t * w->H + h]);
        }
        w->dw[s] = xp_ref_rule_round(&w->wide, dot);
    }
}

/* y of the routed experts is done: the output's scale. dx gets one rounding more where two parts are added. */
static void finish_routed(work *w) {
    const double scale = out_scale(w);
    for (int64_t i = 0; i < w->T * w->H; i++) {
        if (scale != 1.0)
            w->y[i] = xp_ref_val_mul(rounded(w, w->y[i].v, w->y[i].e), (xp_ref_val){scale, 0.0});
        if (w->a->dialect->null_experts > 0)
            w->dx[i] = rounded(w, w->dx[i].v, w->dx[i].e + xp_ref_both(2, w->op) * (fabs(w->dx[i].v) + w->dx[i].e));
    }
}

static void experts(work *w, int operand, const xp_tensor *ref, const xp_tensor *tol) {
    const int each = operand == XP_REF_MOE_DW1 || operand == XP_REF_MOE_DW2 || operand == XP_REF_MOE_DB1 ||
                     operand == XP_REF_MOE_DB2;
    for (int64_t e = 0; e < w->E; e++) {
        const xp_tensor w1 = xp_ref_matrix(&w->a->w1, e), w2 = xp_ref_matrix(&w->a->w2, e);
        const int biased = w->a->b1.data != NULL;
        const xp_tensor b1 = biased ? xp_ref_vector(&w->a->b1, e) : w1, b2 = biased ? xp_ref_vector(&w->a->b2, e) : w2;
        const int64_t rows = count_rows(w, e);
        xp_tensor part = *tol;
        w->expert.w1 = &w1;
        w->expert.w2 = &w2;
        w->expert.b1 = biased ? &b1 : NULL;
        w->expert.b2 = biased ? &b2 : NULL;
        if (each) {
            part = part_of(tol, e);
            clear_rows(&part);
        }
        for (int64_t at = 0, m; at < w->T * w->K;) {
            at = rows_of(w, e, at, &m);
            if (m > 0)
                expert_chunk(w, m, rows, operand, &part);
        }
        if (each) {
            const xp_tensor part_ref = part_of(ref, e);
            finish(w, rows, &part_ref, &part);
        }
    }
}

/* ---- the router's gradients ---- */

/* A finished part of dx. */
static void add_part(const work *w, int64_t at, xp_ref_val part) {
    const xp_ref_val d = rounded(w, part.v, part.e);
    w->dx[at].v += d.v;
    w->dx[at].e += d.e;
    w->dxe[at] += fabs(d.v) + d.e;
}

static void router_gradients(work *w, int operand, const xp_tensor *tol) {
    const xp_ref_mlp *p = &w->expert;
    for (int64_t row = 0; row < w->T; row += CHUNK) {
        const int64_t m = least(CHUNK, w->T - row);
        for (int64_t i = 0; i < m; i++)
            token_dlogits(w, row + i, w->lv + i * w->Z, w->le + i * w->Z);
        if (operand == XP_REF_MOE_DWR) {
            xp_ref_rows_load(&w->a->x, row, m, p->x);
            outer_errors(w, w->T, m, w->Z, w->lv, w->le, w->H, p->x, NULL, tol);
            continue;
        }
        if (operand == XP_REF_MOE_DRBIAS) {
            outer_errors(w, w->T, m, w->Z, w->lv, w->le, 1, w->ones, NULL, tol);
            continue;
        }
        xp_ref_linear_nn(w->lv, m, w->Z, &w->a->wr, 0, p->x, w->H, p->tile);
        xp_ref_dot_inputs(dx_terms(w), w->op, m * w->Z, w->lv, w->le);
        xp_ref_linear_nn(w->le, m, w->Z, &w->a->wr, 1, p->xe, w->H, p->tile);
        xp_ref_dot_outputs(dx_terms(w), w->op, m * w->H, p->xe);
        for (int64_t i = 0; i < m * w->H; i++)
            add_part(w, row * w->H + i, (xp_ref_val){p->x[i], p->xe[i]});
    }
}

/* ---- the shared expert ---- */

/* z, ze: the gate's sigmoid of each row, 1 without a gate. x and xe as the MLP's forward left them. */
static void shared_gate(const work *w, int64_t m) {
    const xp_ref_mlp *p = &w->shared;
    for (int64_t i = 0; i < m; i++) {
        xp_ref_val s = {0.0, 0.0}, sig = {1.0, 0.0};
        for (int64_t h = 0; h < w->H && w->a->sgate.data; h++) {
            s.v += p->x[i * w->H + h] * w->gate[h];
            s.e += p->xe[i * w->H + h] * fabs(w->gate[h]);
        }
        if (w->a->sgate.data) {
            xp_ref_dot_outputs(w->H, w->op, 1, &s.e);
            sig = xp_ref_val_sigmoid(&w->rule, rounded(w, s.v, s.e));
            sig = rounded(w, sig.v, sig.e);
        }
        w->z[i] = sig.v;
        w->ze[i] = sig.e;
    }
}

/* The rows' part of y. */
static void shared_outputs(const work *w, int64_t row, int64_t m) {
    const xp_ref_mlp *p = &w->shared;
    round_outputs(w, p, m);
    for (int64_t i = 0; i < m * w->H; i++) {
        const xp_ref_val out = {p->y[i], p->ye[i]}, sig = {w->z[i / w->H], w->ze[i / w->H]};
        const xp_ref_val part = xp_ref_val_mul(sig, out);
        const xp_ref_val done = w->a->sgate.data ? rounded(w, part.v, part.e) : out;
        xp_ref_val *y = &w->y[row * w->H + i];
        *y = xp_ref_val_add(rounded(w, y->v, y->e), done);
        if (averages(w))
            *y = xp_ref_val_mul(rounded(w, y->v, y->e), (xp_ref_val){0.5, 0.0});
    }
}

/* z, ze become dz; y, ye become dmlp. */
static void shared_ungate(const work *w, int64_t row, int64_t m) {
    const xp_ref_mlp *p = &w->shared;
    for (int64_t i = 0; i < m; i++) {
        double *v = p->y + i * w->H, *e = p->ye + i * w->H;
        const xp_ref_val *dy = w->gs + (row + i) * w->H;
        const xp_ref_val sig = {w->z[i], w->ze[i]}, rest = {1.0 - sig.v, sig.e};
        xp_ref_val d = xp_ref_val_mul(dot_dy(w, dy, v, w->wide_e + i * w->H), xp_ref_val_mul(sig, rest));
        d.e += xp_ref_both(3, w->op) * (fabs(d.v) + d.e);
        d = rounded(w, d.v, d.e);
        for (int64_t h = 0; h < w->H; h++) {
            const xp_ref_val dmlp = xp_ref_val_mul(sig, dy[h]);
            const xp_ref_val r = w->a->sgate.data ? rounded(w, dmlp.v, dmlp.e) : dy[h];
            v[h] = r.v;
            e[h] = r.e;
        }
        w->z[i] = d.v;
        w->ze[i] = d.e;
    }
}

/* The gate's term joins the sums of dx. */
static void shared_dx(const work *w, int64_t row, int64_t m) {
    const xp_ref_mlp *p = &w->shared;
    for (int64_t i = 0; i < m; i++) {
        double t = w->ze[i];
        xp_ref_dot_inputs(dx_terms(w), w->op, 1, w->z + i, &t);
        for (int64_t h = 0; h < w->H; h++) {
            xp_ref_val d = {p->x[i * w->H + h], p->xe[i * w->H + h]};
            if (w->a->sgate.data) {
                d.v += w->z[i] * w->gate[h];
                d.e += t * fabs(w->gate[h]);
            }
            add_part(w, (row + i) * w->H + h, d);
        }
    }
}

/* The router's weights of the rows; and what the MLP's backward leaves of their gradients. */
static void load_gamma(const work *w, int64_t row, int64_t m) {
    for (int64_t i = 0; i < m * w->A; i++) {
        w->shared.gamma[i] = w->gamma[row * w->A + i].v;
        w->shared.gammae[i] = w->gamma[row * w->A + i].e;
    }
}

static void keep_dgamma(const work *w, int64_t row, int64_t m) {
    for (int64_t i = 0; i < m * w->A; i++) {
        const xp_ref_val d = {w->shared.dgamma[i], w->shared.dgammae[i]};
        w->dgamma[row * w->A + i] = xp_ref_rule_round(&w->wide, d);
    }
}

static void shared_chunk(work *w, int64_t row, int64_t m, int operand, const xp_tensor *tol) {
    xp_ref_mlp *p = &w->shared;
    xp_ref_rows_load(&w->a->x, row, m, p->x);
    clear(p->xe, m * w->H);
    load_gamma(w, row, m);
    xp_ref_mlp_forward_error(p, m, XP_REF_MLP_END);
    shared_gate(w, m);
    shared_outputs(w, row, m);
    if (operand == XP_REF_MOE_Y)
        return;
    shared_ungate(w, row, m);
    if (operand == XP_REF_MOE_DSGATE) {
        xp_ref_rows_load(&w->a->x, row, m, p->x);
        outer_errors(w, w->T, m, 1, w->z, w->ze, w->H, p->x, NULL, tol);
        return;
    }
    if (operand == XP_REF_MOE_DSW2) {
        outer_errors(w, w->T, m, w->H, p->y, p->ye, w->S, p->mid, p->acte, tol);
        return;
    }
    load_gamma(w, row, m);
    xp_ref_mlp_backward_error(p, m, dx_terms(w) - w->X, XP_REF_MLP_END);
    keep_dgamma(w, row, m);
    if (of_router(operand))
        return;
    if (operand == XP_REF_MOE_DSW1) {
        xp_ref_rows_load(&w->a->x, row, m, p->y);
        outer_errors(w, w->T, m, w->X, p->pre, p->dpree, w->H, p->y, NULL, tol);
        return;
    }
    shared_dx(w, row, m);
}

static void shared(work *w, int operand, const xp_tensor *tol) {
    w->shared.w1 = &w->a->sw1;
    w->shared.w2 = &w->a->sw2;
    if (w->a->sgate.data)
        xp_ref_rows_load(&w->a->sgate, 0, 1, w->gate);
    for (int64_t row = 0; row < w->T; row += CHUNK)
        shared_chunk(w, row, least(CHUNK, w->T - row), operand, tol);
}

/* ---- outputs ---- */

static void token_outputs(const work *w, int operand, const xp_tensor *ref, xp_tensor *tol) {
    for (int64_t t = 0; t < w->T; t++) {
        const double *value = xp_tensor_at(ref, t, 0, 0, 0);
        double *out = xp_tensor_at(tol, t, 0, 0, 0);
        for (int64_t h = 0, at = t * w->H; h < w->H; h++, at++) {
            const double e = operand == XP_REF_MOE_Y ? w->y[at].e : w->dx[at].e + xp_ref_both(2, w->op) * w->dxe[at];
            out[h] = xp_ref_rule_out(&w->rule, (xp_ref_val){value[h], e});
        }
    }
}

static int of_shared(int operand) {
    return operand == XP_REF_MOE_DSW1 || operand == XP_REF_MOE_DSW2 || operand == XP_REF_MOE_DSGATE;
}

/* dx so far becomes its first part. */
static void first_part(work *w) {
    for (int64_t i = 0; i < w->T * w->H; i++) {
        const xp_ref_val part = w->dx[i];
        w->dx[i] = (xp_ref_val){0.0, 0.0};
        add_part(w, i, part);
    }
}

void xp_ref_moe_bound(const xp_moe_args *a, int operand, const xp_tensor *ref, void *ws, xp_tensor *tol) {
    const int tokens = operand == XP_REF_MOE_Y || operand == XP_REF_MOE_DX;
    const int matrix = of_shared(operand) || of_router(operand);
    /* drbias as a matrix of one column */
    xp_tensor out = *tol, value = *ref;
    if (operand == XP_REF_MOE_DRBIAS) {
        out.ndim = value.ndim = 2;
        out.dim[1] = value.dim[1] = 1;
        out.stride[1] = value.stride[1] = 1;
    }
    work w;
    plan(a, ws, &w);
    memset(w.y, 0, (size_t)(w.T * w.H) * sizeof *w.y);
    memset(w.dx, 0, (size_t)(w.T * w.H) * sizeof *w.dx);
    memset(w.dw, 0, (size_t)(w.T * w.K) * sizeof *w.dw);
    clear(w.dxe, w.T * w.H);
    for (int64_t i = 0; i < CHUNK; i++)
        w.ones[i] = 1.0;
    load_dy(&w);
    keep_slots(&w);
    if (matrix)
        clear_rows(&out);
    if (!of_shared(operand) || w.A > 0)
        route(&w);
    if (!of_shared(operand)) {
        experts(&w, operand, ref, tol);
        nulls(&w);
        finish_routed(&w);
    }
    if (operand == XP_REF_MOE_DX)
        first_part(&w);
    if (w.S > 0 && (of_shared(operand) || tokens || w.A > 0))
        shared(&w, operand, tol);
    if (operand == XP_REF_MOE_DX || of_router(operand))
        router_gradients(&w, operand, &out);
    if (tokens)
        token_outputs(&w, operand, ref, tol);
    else if (matrix)
        finish(&w, w.T, &value, &out);
}
