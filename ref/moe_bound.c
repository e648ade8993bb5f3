/* The bound of stage moe: errors carried through the whole layer, forward and backward.
 *
 * Both sides compute in D, the operands' dtype (f32 or f64), which is also what every intermediate is rounded to; each
 * declared rounding costs both sides one. A value is a pair (v, e): the reference's, and how far another implementation
 * may be. g_n = gamma_n(D) + gamma_n(f64). Sums are in any order. With err.h's rules for products, roundings,
 * functions:
 *
 * - logits: e = g_H sum |x| |wr|.
 *
 * - scores, in the log domain where errors add: an implementation's P_j is P_j exp(+-L_j) with L_j = e_j +
 *   sum_i P_i expm1(e_i) + r_j: the logit's own error, the normaliser's (Jensen), and evaluation, r_j = g_(2E+24) +
 *   2 (u(D) + u(f64)) (|l_j - m| + sum_i P_i |l_i - m| + |m|): exp and division within 4 ulp, E additions, a rounded
 *   argument, with or without the largest, m, taken off. e(P_j) = P_j expm1(L_j).
 *
 * - weights, renormalised: a softmax over the chosen alone, the same with W for P; the factor that all P share cancels.
 *   Not renormalised: P itself.
 *
 * - experts: the chain of expert.c with errors on entry. y: e(w out) by the product rule, g_K for the sum.
 *
 * - dw = <dy, W2 act> or <W2^T dy, act>: sum |dy| |W2| (e(act) + g_(F+H) (|act| + e(act))), and W2 act's rounding.
 *
 * - dlogits = W_k (dw_k - sum_i W_i dw_i), without renormalisation P_j for W_k: errors of W and dw by the product rule;
 *   evaluation g_(2K+E+16) times the absolute Jacobian, W_k (|dw_k| + s) + 2 P_j s with s = sum_i W_i |dw_i|: that is
 *   enough for the way through the derivative of the quotient, too.
 *
 * - dx: expert.c's backward with errors of dout = w dy and of pre on entry, dlogits wr, the shared expert's part; one
 *   chain may run through all slots and parts, 2 F K + E + 2 S + 1 long, or parts are summed and rounded: g_K, g_2.
 *
 * - weight gradients over n rows: sum of (|a| + e_a)(|b| + e_b) (1 + g_n) - |a| |b|. */
#include "moe.h"

#include <math.h>
#include <string.h>

#include "err.h"
#include "linear.h"
#include "mlp.h"
#include "plane.h"

enum { CHUNK = XP_REF_MLP_ROWS };

typedef struct {
    const xp_moe_args *a;
    xp_dtype op;
    xp_ref_rule rule;
    int64_t T, E, K, H, F, S;
    xp_ref_val *score, *weight, *used, *dw; /* [T,E], [T,K] before and after the scale, [T,K] */
    xp_ref_val *y, *dx;                     /* [T,H]: sums over the parts so far */
    double *dxe;                            /* [T,H]: sum of |part| + e, for the sum of the parts */
    double *lv, *le;                        /* a chunk of rows of E */
    double *left, *right;                   /* factors of a sum over rows */
    double *wide;                           /* a chunk of rows of H: errors of <dy, out> for each unit of dy */
    double *gate, *z, *ze;                  /* a row of H; two numbers for each row of a chunk */
    int64_t *tok, *slot;                    /* of a chunk of expert rows */
    xp_ref_mlp expert, shared;              /* their planes share memory: one is done before the other starts */
} work;

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static void plan_mlp(xp_ref_layout *l, const work *w, int64_t width, xp_ref_mlp *out) {
    xp_ref_mlp_plan(l, CHUNK, w->H, width, 1, w->a->x.dtype, w->a->x.dtype, out);
    out->acte = xp_ref_take(l, (size_t)(CHUNK * width) * sizeof(double));
    out->dpree = xp_ref_take(l, (size_t)(CHUNK * 2 * width) * sizeof(double));
}

static size_t plan(const xp_moe_args *a, void *ws, work *w) {
    *w = (work){.a = a, .op = xp_ref_op(a->x.dtype), .rule = xp_ref_rule_of(a->x.dtype, xp_ref_op(a->x.dtype))};
    w->T = a->x.dim[0];
    w->E = a->wr.dim[0];
    w->K = a->idx.dim[1];
    w->H = a->x.dim[1];
    w->F = a->w2.dim[2];
    w->S = a->sw2.data ? a->sw2.dim[1] : 0;
    const size_t val = sizeof(xp_ref_val), number = sizeof(double), chunk = CHUNK * sizeof(double);
    const size_t H = (size_t)w->H, E = (size_t)w->E, TH = (size_t)w->T * H, TK = (size_t)(w->T * w->K);
    const size_t wide = (size_t)most(most(w->E, w->H), 2 * most(w->F, w->S));
    xp_ref_layout l = {ws, 0};
    w->score = xp_ref_take(&l, (size_t)w->T * E * val);
    w->weight = xp_ref_take(&l, TK * val);
    w->used = xp_ref_take(&l, TK * val);
    w->dw = xp_ref_take(&l, TK * val);
    w->y = xp_ref_take(&l, TH * val);
    w->dx = xp_ref_take(&l, TH * val);
    w->dxe = xp_ref_take(&l, TH * number);
    w->lv = xp_ref_take(&l, E * chunk);
    w->le = xp_ref_take(&l, E * chunk);
    w->left = xp_ref_take(&l, wide * chunk);
    w->right = xp_ref_take(&l, wide * chunk);
    w->wide = xp_ref_take(&l, H * chunk);
    w->gate = xp_ref_take(&l, H * number);
    w->z = xp_ref_take(&l, chunk);
    w->ze = xp_ref_take(&l, chunk);
    w->tok = xp_ref_take(&l, CHUNK * sizeof(int64_t));
    w->slot = xp_ref_take(&l, CHUNK * sizeof(int64_t));
    xp_ref_layout other = l;
    plan_mlp(&l, w, w->F, &w->expert);
    plan_mlp(&other, w, w->S, &w->shared);
    return l.bytes > other.bytes ? l.bytes : other.bytes;
}

size_t xp_ref_moe_bound_ws(const xp_moe_args *a) {
    work w;
    return plan(a, NULL, &w);
}

/* ---- small things ---- */

static double both(int64_t n, xp_dtype op) {
    return xp_ref_gamma(n, op) + xp_ref_gamma(n, XP_F64);
}

static int64_t expert_at(const work *w, int64_t t, int64_t k) {
    return *(const int32_t *)xp_tensor_at(&w->a->idx, t, k, 0, 0);
}

static xp_ref_val rounded(const work *w, double v, double e) {
    return xp_ref_rule_round(&w->rule, (xp_ref_val){v, e});
}

/* One term of a sum of n: its own error and its part of the sum's. */
static void accumulate(const work *w, int64_t n, xp_ref_val term, xp_ref_val *sum) {
    sum->v += term.v;
    sum->e += term.e + both(n, w->op) * (fabs(term.v) + term.e);
}

/* Sums of dx are 2 F K + E + 2 S + 1 long when all parts share one chain. */
static int64_t dx_terms(const work *w) {
    return 2 * w->F * w->K + w->E + 2 * w->S + 1;
}

/* An MLP output's rounding, in y and ye; `wide` gets what <dy, y> loses for each unit of dy, whether it is summed as
 * dy . (W2 act) or as (W2^T dy) . act: a chain of F + H over |W2| |act|, and the rounding of y. */
static void round_outputs(const work *w, const xp_ref_mlp *p, int64_t m) {
    const int64_t n = p->F + w->H;
    memcpy(p->mide, p->acte, (size_t)(m * p->F) * sizeof(double));
    xp_ref_dot_inputs(n, w->op, m * p->F, p->mid, p->mide);
    xp_ref_linear_nt(p->mide, m, p->F, p->w2, 1, w->wide, w->H, p->tile);
    xp_ref_dot_outputs(n, w->op, m * w->H, w->wide);
    for (int64_t i = 0; i < m * w->H; i++) {
        const xp_ref_val out = rounded(w, p->y[i], p->ye[i]);
        w->wide[i] += (1.0 + both(w->H, w->op)) * (out.e - p->ye[i]);
        p->y[i] = out.v;
        p->ye[i] = out.e;
    }
}

/* <dy, y> of one row of a chunk. */
static xp_ref_val dot_dy(const work *w, const double *dy, const double *y, const double *wide) {
    xp_ref_val s = {0.0, 0.0};
    for (int64_t h = 0; h < w->H; h++) {
        s.v += dy[h] * y[h];
        s.e += fabs(dy[h]) * wide[h];
    }
    xp_ref_dot_outputs(w->H, w->op, 1, &s.e);
    return s;
}

/* The tolerance of dw[i][j] = sum over `rows` rows of a[r][i] b[r][j] grows by m of them. be NULL: b is exact. */
static void outer_errors(const work *w, int64_t rows, int64_t m, int64_t ni, const double *av, const double *ae,
                         int64_t nj, const double *bv, const double *be, const xp_tensor *tol) {
    const double g = both(rows, w->op);
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

/* What evaluating one score costs in the log domain. */
static double score_cost(const work *w, double logit, double max, double spread) {
    const double unit = xp_ref_unit(w->op) + xp_ref_unit(XP_F64);
    return both(2 * w->E + 24, w->op) + 2.0 * unit * (fabs(logit - max) + spread + fabs(max));
}

/* v, a share of a sum, is off by v expm1(log_off), plus what may flush; but no two shares are further apart than 1,
 * give or take their evaluation, if both can be computed at all: sure. */
static double share_error(const work *w, double v, double log_off, double flush, int sure) {
    const double e = (v > 0.0 ? v * xp_ref_expm1(log_off) : 0.0) + flush, cap = 1.0 + both(2 * w->E + 24, w->op);
    return sure && e > cap ? cap : e;
}

static int all_finite(const double *v, int64_t n) {
    int finite = 1;
    for (int64_t i = 0; i < n; i++)
        finite &= isfinite(v[i]) != 0;
    return finite;
}

/* Scores from logits and their errors, which become those of the rounded logits. A NaN logit counts as -inf: it scores
 * 0 (xp/route.h). cost[e]: score_cost. */
static void token_scores(const work *w, double *lv, double *le, double *cost, xp_ref_val *score) {
    double max = -(double)INFINITY, sum = 0.0, spread = 0.0, common = 0.0;
    for (int64_t e = 0; e < w->E; e++) {
        const xp_ref_val l = rounded(w, lv[e], le[e]);
        lv[e] = l.v == l.v ? l.v : -(double)INFINITY;
        le[e] = l.v == l.v ? l.e : 0.0;
        max = lv[e] > max ? lv[e] : max;
    }
    for (int64_t e = 0; e < w->E; e++)
        sum += score[e].v = xp_ref_exp(lv[e] - max);
    for (int64_t e = 0; e < w->E; e++) {
        score[e].v /= sum;
        if (score[e].v > 0.0) {
            spread += score[e].v * (max - lv[e]);
            common += score[e].v * xp_ref_expm1(le[e]);
        }
    }
    const int sure = all_finite(le, w->E);
    for (int64_t e = 0; e < w->E; e++) {
        const double v = score[e].v;
        cost[e] = score_cost(w, lv[e], max, spread);
        score[e] = rounded(w, v, share_error(w, v, le[e] + common + cost[e], w->rule.flush, sure));
    }
}

/* The chosen scores divided by their sum: 2 K + 8 roundings beside the scores' own. Sure as long as the other side's
 * sum cannot be zero. */
static void renormalise(const work *w, int64_t t, const double *le, const double *cost, xp_ref_val *weight) {
    double sum = 0.0, common = 0.0, apart = 0.0;
    for (int64_t k = 0; k < w->K; k++)
        sum += weight[k].v;
    for (int64_t k = 0; k < w->K; k++) {
        const int64_t e = expert_at(w, t, k);
        weight[k].v /= sum;
        common += weight[k].v * (xp_ref_expm1(le[e]) + cost[e]);
    }
    for (int64_t e = 0; e < w->E; e++)
        apart = le[e] <= apart ? apart : le[e];
    const int sure = sum * xp_ref_exp(-2.0 * apart) > 2.0 * (double)w->K * w->rule.flush;
    for (int64_t k = 0; k < w->K; k++) {
        const int64_t e = expert_at(w, t, k);
        const double off = le[e] + common + cost[e] + both(2 * w->K + 8, w->op);
        weight[k].e = share_error(w, weight[k].v, off, w->rule.flush / sum, sure);
    }
}

static void token_weights(const work *w, int64_t t, const double *le, const double *cost) {
    xp_ref_val *weight = w->weight + t * w->K;
    for (int64_t k = 0; k < w->K; k++)
        weight[k] = w->score[t * w->E + expert_at(w, t, k)];
    if (w->a->dialect->renorm == XP_RENORM_SUM)
        renormalise(w, t, le, cost, weight);
    for (int64_t k = 0; k < w->K; k++) {
        const xp_ref_val v = xp_ref_val_mul(weight[k], (xp_ref_val){w->a->dialect->scale, 0.0});
        w->used[t * w->K + k] = rounded(w, v.v, v.e);
    }
}

static void route(work *w) {
    const xp_ref_mlp *p = &w->expert; /* only its planes of H */
    for (int64_t row = 0; row < w->T; row += CHUNK) {
        const int64_t m = least(CHUNK, w->T - row);
        xp_ref_rows_load(&w->a->x, row, m, p->x);
        clear(p->xe, m * w->H);
        xp_ref_linear_nt(p->x, m, w->H, &w->a->wr, 0, w->lv, w->E, p->tile);
        xp_ref_dot_inputs(w->H, w->op, m * w->H, p->x, p->xe);
        xp_ref_linear_nt(p->xe, m, w->H, &w->a->wr, 1, w->le, w->E, p->tile);
        xp_ref_dot_outputs(w->H, w->op, m * w->E, w->le);
        for (int64_t i = 0; i < m; i++) {
            token_scores(w, w->lv + i * w->E, w->le + i * w->E, w->left, w->score + (row + i) * w->E);
            token_weights(w, row + i, w->le + i * w->E, w->left);
        }
    }
}

/* dlogits of token t: W_k (dw_k - sum W dw) in each slot, or P (g - sum P g) with g the sum of an expert's dw. */
static void token_dlogits(const work *w, int64_t t, double *lv, double *le) {
    const int renorm = w->a->dialect->renorm == XP_RENORM_SUM;
    const xp_ref_val *weight = w->weight + t * w->K, *dw = w->dw + t * w->K, *score = w->score + t * w->E;
    const xp_ref_val scale = {w->a->dialect->scale, 0.0};
    const double g = both(2 * w->K + w->E + 16, w->op);
    xp_ref_val mean = {0.0, 0.0};
    double size = 0.0; /* of mean's terms */
    for (int64_t k = 0; k < w->K; k++) {
        mean = xp_ref_val_add(mean, xp_ref_val_mul(weight[k], dw[k]));
        size += (fabs(weight[k].v) + weight[k].e) * (fabs(dw[k].v) + dw[k].e);
    }
    const xp_ref_val minus = {-mean.v, mean.e};
    for (int64_t e = 0; e < w->E; e++) {
        xp_ref_val d = renorm ? (xp_ref_val){0.0, 0.0} : xp_ref_val_mul(score[e], minus);
        double gauge = 2.0 * (score[e].v + score[e].e) * size;
        for (int64_t k = 0; k < w->K; k++) {
            if (expert_at(w, t, k) != e)
                continue;
            d = xp_ref_val_add(d, xp_ref_val_mul(weight[k], renorm ? xp_ref_val_add(dw[k], minus) : dw[k]));
            gauge += (fabs(weight[k].v) + weight[k].e) * (fabs(dw[k].v) + dw[k].e + size);
        }
        d.e += g * gauge;
        d = xp_ref_val_mul(d, scale);
        d = rounded(w, d.v, d.e);
        lv[e] = d.v;
        le[e] = d.e;
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

static void load_tokens(const work *w, const xp_tensor *t, int64_t m, double *out) {
    for (int64_t i = 0; i < m; i++)
        xp_ref_rows_load(t, w->tok[i], 1, out + i * w->H);
}

/* The rows' outputs go into y and, dotted with dy, into dw. */
static void expert_outputs(const work *w, int64_t m) {
    const xp_ref_mlp *p = &w->expert;
    round_outputs(w, p, m);
    for (int64_t i = 0; i < m; i++) {
        const double *v = p->y + i * w->H, *e = p->ye + i * w->H;
        for (int64_t h = 0; h < w->H; h++) {
            const xp_ref_val out = {v[h], e[h]};
            accumulate(w, w->K, xp_ref_val_mul(w->used[w->slot[i]], out), &w->y[w->tok[i] * w->H + h]);
        }
        xp_ref_rows_load(&w->a->dy, w->tok[i], 1, w->gate);
        const xp_ref_val d = dot_dy(w, w->gate, v, w->wide + i * w->H);
        w->dw[w->slot[i]] = rounded(w, d.v, d.e);
    }
}

/* y and ye become dout. */
static void expert_douts(const work *w, int64_t m) {
    const xp_ref_mlp *p = &w->expert;
    load_tokens(w, &w->a->dy, m, p->y);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t h = i * w->H; h < (i + 1) * w->H; h++) {
            const xp_ref_val d = xp_ref_val_mul(w->used[w->slot[i]], (xp_ref_val){p->y[h], 0.0});
            const xp_ref_val r = rounded(w, d.v, d.e);
            p->y[h] = r.v;
            p->ye[h] = r.e;
        }
    }
}

static void expert_chunk(work *w, int64_t m, int64_t rows, int operand, const xp_tensor *tol) {
    xp_ref_mlp *p = &w->expert;
    load_tokens(w, &w->a->x, m, p->x);
    clear(p->xe, m * w->H);
    xp_ref_mlp_forward_error(p, m, XP_REF_MLP_END);
    expert_outputs(w, m);
    if (operand == XP_REF_MOE_Y || operand == XP_REF_MOE_DWR)
        return;
    expert_douts(w, m);
    if (operand == XP_REF_MOE_DW2) {
        outer_errors(w, rows, m, w->H, p->y, p->ye, w->F, p->mid, p->acte, tol);
        return;
    }
    xp_ref_mlp_backward_error(p, m, dx_terms(w) - 2 * w->F, XP_REF_MLP_END);
    if (operand == XP_REF_MOE_DW1) {
        load_tokens(w, &w->a->x, m, p->y);
        outer_errors(w, rows, m, 2 * w->F, p->pre, p->dpree, w->H, p->y, NULL, tol);
        return;
    }
    for (int64_t i = 0; i < m * w->H; i++) {
        const xp_ref_val d = rounded(w, p->x[i], p->xe[i]);
        accumulate(w, w->K, d, &w->dx[w->tok[i / w->H] * w->H + i % w->H]);
    }
}

static void experts(work *w, int operand, const xp_tensor *ref, const xp_tensor *tol) {
    for (int64_t e = 0; e < w->E; e++) {
        const xp_tensor w1 = xp_ref_matrix(&w->a->w1, e), w2 = xp_ref_matrix(&w->a->w2, e);
        const int64_t rows = count_rows(w, e);
        xp_tensor part = *tol;
        w->expert.w1 = &w1;
        w->expert.w2 = &w2;
        if (operand == XP_REF_MOE_DW1 || operand == XP_REF_MOE_DW2) {
            part = xp_ref_matrix(tol, e);
            clear_rows(&part);
        }
        for (int64_t at = 0, m; at < w->T * w->K;) {
            at = rows_of(w, e, at, &m);
            if (m > 0)
                expert_chunk(w, m, rows, operand, &part);
        }
        if (operand == XP_REF_MOE_DW1 || operand == XP_REF_MOE_DW2) {
            const xp_tensor part_ref = xp_ref_matrix(ref, e);
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
            token_dlogits(w, row + i, w->lv + i * w->E, w->le + i * w->E);
        if (operand == XP_REF_MOE_DWR) {
            xp_ref_rows_load(&w->a->x, row, m, p->x);
            outer_errors(w, w->T, m, w->E, w->lv, w->le, w->H, p->x, NULL, tol);
            continue;
        }
        xp_ref_linear_nn(w->lv, m, w->E, &w->a->wr, 0, p->x, w->H, p->tile);
        xp_ref_dot_inputs(dx_terms(w), w->op, m * w->E, w->lv, w->le);
        xp_ref_linear_nn(w->le, m, w->E, &w->a->wr, 1, p->xe, w->H, p->tile);
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
    }
}

/* z, ze become dz; y, ye become dmlp. */
static void shared_ungate(const work *w, int64_t row, int64_t m) {
    const xp_ref_mlp *p = &w->shared;
    for (int64_t i = 0; i < m; i++) {
        double *v = p->y + i * w->H, *e = p->ye + i * w->H, *dy = w->left;
        const xp_ref_val sig = {w->z[i], w->ze[i]}, rest = {1.0 - sig.v, sig.e};
        xp_ref_rows_load(&w->a->dy, row + i, 1, dy);
        xp_ref_val d = xp_ref_val_mul(dot_dy(w, dy, v, w->wide + i * w->H), xp_ref_val_mul(sig, rest));
        d.e += both(3, w->op) * (fabs(d.v) + d.e);
        d = rounded(w, d.v, d.e);
        for (int64_t h = 0; h < w->H; h++) {
            const xp_ref_val dmlp = xp_ref_val_mul(sig, (xp_ref_val){dy[h], 0.0});
            const xp_ref_val r = w->a->sgate.data ? rounded(w, dmlp.v, dmlp.e) : (xp_ref_val){dy[h], 0.0};
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

static void shared_chunk(work *w, int64_t row, int64_t m, int operand, const xp_tensor *tol) {
    xp_ref_mlp *p = &w->shared;
    xp_ref_rows_load(&w->a->x, row, m, p->x);
    clear(p->xe, m * w->H);
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
    xp_ref_mlp_backward_error(p, m, dx_terms(w) - 2 * w->S, XP_REF_MLP_END);
    if (operand == XP_REF_MOE_DSW1) {
        xp_ref_rows_load(&w->a->x, row, m, p->y);
        outer_errors(w, w->T, m, 2 * w->S, p->pre, p->dpree, w->H, p->y, NULL, tol);
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
            const double e = operand == XP_REF_MOE_Y ? w->y[at].e : w->dx[at].e + both(2, w->op) * w->dxe[at];
            out[h] = xp_ref_rule_out(&w->rule, (xp_ref_val){value[h], e});
        }
    }
}

void xp_ref_moe_bound(const xp_moe_args *a, int operand, const xp_tensor *ref, void *ws, xp_tensor *tol) {
    const int of_experts = operand <= XP_REF_MOE_DW2, of_shared = operand >= XP_REF_MOE_DSW1;
    const int matrix = of_shared || operand == XP_REF_MOE_DWR;
    work w;
    plan(a, ws, &w);
    memset(w.y, 0, (size_t)(w.T * w.H) * sizeof *w.y);
    memset(w.dx, 0, (size_t)(w.T * w.H) * sizeof *w.dx);
    clear(w.dxe, w.T * w.H);
    if (matrix)
        clear_rows(tol);
    if (of_experts) {
        route(&w);
        experts(&w, operand, ref, tol);
    }
    if (operand == XP_REF_MOE_DX) {
        for (int64_t i = 0; i < w.T * w.H; i++) {
            const xp_ref_val part = w.dx[i];
            w.dx[i] = (xp_ref_val){0.0, 0.0};
            add_part(&w, i, part);
        }
    }
    if (operand == XP_REF_MOE_DX || operand == XP_REF_MOE_DWR)
        router_gradients(&w, operand, tol);
    if (w.S > 0 && (of_shared || operand == XP_REF_MOE_Y || operand == XP_REF_MOE_DX))
        shared(&w, operand, tol);
    if (operand == XP_REF_MOE_Y || operand == XP_REF_MOE_DX)
        token_outputs(&w, operand, ref, tol);
    else if (matrix)
        finish(&w, w.T, ref, tol);
}
