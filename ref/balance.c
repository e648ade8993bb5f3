/* Stages balance and balance_bwd: see xp/balance.h for the meaning.
 *
 * Choices are counted in integers; sums of probabilities and of squared log-sum-exps are double within a block, rounded
 * once a block to f32 (f64 when the logits are f64), and folded over the world block by block. Softmax is IEEE all the
 * way: a NaN logit of a token that counts makes every sum NaN. Tokens that do not count are never read. A rank without
 * tokens still takes part in every collective. */
#include "xp/balance.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "token.h"

/* ---- operands and parameters ---- */

enum { FREQ = 3, PROB, LOSS, BWD_DAUX = 4 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_balance_args, logits, "Y,T,E", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    XP_OPERAND(xp_balance_args, idx, "Y,T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_balance_args, valid, "T", XP_IN, XP_BIT(XP_U8), XP_UNCOMPARED, ""),
    [FREQ] = XP_OPERAND(xp_balance_args, freq, "E", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [PROB] = XP_OPERAND(xp_balance_args, prob, "E", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [LOSS] = XP_OPERAND(xp_balance_args, loss, "2", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    XP_OPERAND(xp_balance_args, count, "1", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_balance_bwd_args, logits, "Y,T,E", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    XP_OPERAND(xp_balance_bwd_args, valid, "T", XP_IN, XP_BIT(XP_U8), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_balance_bwd_args, freq, "E", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    XP_OPERAND(xp_balance_bwd_args, count, "1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    [BWD_DAUX] = XP_OPERAND(xp_balance_bwd_args, daux, "Y,T,E", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
};

static const xp_param params[] = {
    {"token0", NULL, "0", XP_P_I64, offsetof(xp_balance_args, token0)},
    {"block", NULL, "0", XP_P_I64, offsetof(xp_balance_args, block)},
    {"scope_world", NULL, "1", XP_P_INT, offsetof(xp_balance_args, scope_world)},
};

static const xp_param bwd_params[] = {
    {"aux_coef", NULL, "0.01", XP_P_F64, offsetof(xp_balance_bwd_args, aux_coef)},
    {"z_coef", NULL, "0.001", XP_P_F64, offsetof(xp_balance_bwd_args, z_coef)},
    {"scale", NULL, "1", XP_P_F64, offsetof(xp_balance_bwd_args, scale)},
};

/* ---- check ---- */

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_balance_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_balance, args, &d));
    const int64_t E = XP_REF_DIM(d, 'E'), K = XP_REF_DIM(d, 'K');
    if (K < 1 || K > E)
        return XP_FAIL(XP_E_ARG, "balance: idx dim 2 is %lld, but E is %lld (K must be in 1..E)", (long long)K,
                       (long long)E);
    XP_TRY(xp_ref_blocks_check("balance", a->token0, a->block, XP_REF_DIM(d, 'T')));
    if (a->scope_world != 0 && a->scope_world != 1)
        return XP_FAIL(XP_E_ARG, "balance: scope_world is %d, expected 0 or 1", a->scope_world);
    XP_TRY(xp_ref_ids_check("balance", "idx", &a->idx, 0, E, "E"));
    return xp_ref_ids_check("balance", "valid", &a->valid, 0, 2, "2");
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_balance_bwd_args *a = args;
    const struct {
        const char *name;
        double value;
    } scalar[] = {{"aux_coef", a->aux_coef}, {"z_coef", a->z_coef}, {"scale", a->scale}};
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_balance_bwd, args, &d));
    if (XP_REF_DIM(d, 'E') < 1)
        return XP_FAIL(XP_E_ARG, "balance_bwd: logits dim 2 is %lld, expected E >= 1", (long long)XP_REF_DIM(d, 'E'));
    for (size_t i = 0; i < sizeof scalar / sizeof *scalar; i++) {
        if (!isfinite((float)scalar[i].value))
            return XP_FAIL(XP_E_ARG, "balance_bwd: %s is %g, expected finite as f32", scalar[i].name, scalar[i].value);
    }
    if (xp_ref_readable(&a->count) && xp_ref_i64(&a->count, 0) < 0)
        return XP_FAIL(XP_E_ARG, "balance_bwd: count is %lld, expected 0 or more", (long long)xp_ref_i64(&a->count, 0));
    return xp_ref_ids_check("balance_bwd", "valid", &a->valid, 0, 2, "2");
}

/* ---- cost ---- */

static xp_comm *comm_of(const xp_balance_args *a, const xp_mesh *m) {
    return a->scope_world ? m->axis[XP_WORLD] : NULL;
}

static int64_t ranks_of(const xp_balance_args *a, const xp_mesh *m) {
    return a->scope_world ? m->axis[XP_WORLD]->size : 1;
}

static int64_t blocks_of(const xp_balance_args *a) {
    return xp_ref_blocks(a->token0, a->block, a->logits.dim[1]);
}

/* Softmax and its sums: 6 an expert. A block's sums and a rank's counts go to every other rank. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_balance_args *a = args;
    const int64_t E = a->logits.dim[2];
    const double sums = (double)xp_dtype_bytes(xp_ref_op(a->logits.dtype), blocks_of(a) * (E + 1));
    const double counts = (double)xp_dtype_bytes(XP_I64, E + 1);
    *out = (xp_cost){.flop = 6.0 * (double)xp_tensor_count(&a->logits),
                     .mem_bytes = xp_ref_bytes(&xp_stage_balance, args),
                     .net_bytes = (double)(ranks_of(a, m) - 1) * (sums + counts)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_balance_bwd_args *a = args;
    *out = (xp_cost){.flop = 10.0 * (double)xp_tensor_count(&a->logits),
                     .mem_bytes = xp_ref_bytes(&xp_stage_balance_bwd, args)};
}

/* ---- counts ---- */

/* Exact integers of all ranks, one after another: choices of every expert, n, blocks. */
enum { COUNT_N = 0, COUNT_BLOCKS = 1, COUNTS = 2 };

static size_t counts_ws(const xp_balance_args *a, const xp_mesh *m) {
    const size_t width = (size_t)(a->logits.dim[2] + COUNTS) * sizeof(int64_t), ranks = (size_t)ranks_of(a, m);
    return xp_ref_span(width) + xp_ref_span(ranks * width) + xp_ref_span(ranks * sizeof(int64_t));
}

static void counts_own(const xp_balance_args *a, int64_t *count) {
    const int64_t E = a->logits.dim[2], K = a->idx.dim[2];
    memset(count, 0, (size_t)(E + COUNTS) * sizeof *count);
    count[E + COUNT_BLOCKS] = blocks_of(a);
    for (int64_t y = 0; y < a->logits.dim[0]; y++) {
        for (int64_t t = 0; t < a->logits.dim[1]; t++) {
            if (!xp_ref_u8(&a->valid, t))
                continue;
            const int32_t *idx = xp_tensor_at(&a->idx, y, t, 0, 0);
            for (int64_t k = 0; k < K; k++)
                count[idx[k]]++;
            count[E + COUNT_N]++;
        }
    }
}

/* out: where in ws the sums over the ranks lie. */
static xp_status counts_all(const xp_balance_args *a, const xp_mesh *m, xp_queue *q, char *ws, int64_t **out) {
    const int64_t width = a->logits.dim[2] + COUNTS, ranks = ranks_of(a, m);
    xp_comm *c = comm_of(a, m);
    int64_t *own = xp_ref_carve(&ws, (size_t)width * sizeof *own);
    int64_t *all = xp_ref_carve(&ws, (size_t)(ranks * width) * sizeof *all);
    int64_t *each = xp_ref_carve(&ws, (size_t)ranks * sizeof *each);
    counts_own(a, own);
    *out = own;
    if (!c)
        return XP_OK;
    for (int64_t r = 0; r < ranks; r++)
        each[r] = 1;
    const xp_tensor src = xp_tensor_2d(own, XP_I64, 1, width);
    xp_tensor dst = xp_tensor_2d(all, XP_I64, ranks, width);
    XP_TRY(c->ops->all_gather(c, q, &src, each, &dst));
    memset(own, 0, (size_t)width * sizeof *own);
    for (int64_t i = 0; i < ranks * width; i++)
        own[i % width] += all[i];
    return XP_OK;
}

/* ---- bound ---- */

/* Over all tokens that count, of all ranks: sums of P, of its error, of lse^2, of its error. */
static size_t bound_workspace(const void *args, const xp_mesh *m) {
    const xp_balance_args *a = args;
    const size_t E = (size_t)a->logits.dim[2], width = 2 * E + 2;
    return counts_ws(a, m) + 3 * xp_ref_span(E * sizeof(double)) + 2 * xp_ref_span(width * sizeof(double)) +
           xp_ref_fold_ws(comm_of(a, m), (int64_t)width, XP_F64);
}

static xp_dtype op_of(const xp_balance_args *a) {
    const xp_tensor *const all[] = {&a->logits, &a->freq, &a->prob, &a->loss};
    return xp_ref_op_of(all, 4);
}

/* P is kept in op: one rounding. |lse'^2 - lse^2| <= (2 |lse| + e) e, and one rounding. */
static void gauge_own(const xp_balance_args *a, double *l, double *p, double *e, double *sum) {
    const int64_t E = a->logits.dim[2];
    const xp_dtype op = op_of(a);
    memset(sum, 0, (size_t)(2 * E + 2) * sizeof *sum);
    for (int64_t y = 0; y < a->logits.dim[0]; y++) {
        for (int64_t t = 0; t < a->logits.dim[1]; t++) {
            if (!xp_ref_u8(&a->valid, t))
                continue;
            xp_widen_row(xp_tensor_at(&a->logits, y, t, 0, 0), a->logits.dtype, 0, E, l);
            const double lse = xp_ref_softmax(l, E, p), off = xp_ref_softmax_error(l, 0.0, p, E, op, e);
            for (int64_t i = 0; i < E; i++) {
                sum[i] += p[i];
                sum[E + i] += e[i] + xp_ref_room(op, p[i] + e[i]);
            }
            const double square = lse * lse, apart = (2.0 * fabs(lse) + off) * off;
            sum[2 * E] += square;
            sum[2 * E + 1] += apart + xp_ref_room(op, square + apart);
        }
    }
}

/* What is known of all ranks' sums: n tokens x layers in `blocks` sums. */
typedef struct {
    xp_dtype op, acc;
    double n;
    int64_t adds, folds;
} world;

/* A mean of n values that sum to S, each within its share of `apart`. The implementation adds them in op, one rounding
 * a value and a block at most; the reference rounds once a block, and once an addition of blocks, in acc. n is rounded
 * to op, division within 4 ulp: 10 units with the cross term. */
static xp_ref_val mean_of(const world *w, double value, double S, double apart) {
    const double u = xp_ref_unit(w->op) + xp_ref_unit(XP_F64);
    const double g = xp_ref_both(w->adds, w->op) + xp_ref_gamma(w->folds, w->acc);
    const double off = apart + g * (S + apart), most = fabs(S) + off;
    if (!(most <= xp_ref_largest(w->op)) || !(most <= xp_ref_largest(w->acc)))
        return (xp_ref_val){value, (double)INFINITY};
    return (xp_ref_val){value, off / w->n + 10.0 * u * (most / w->n) + xp_ref_least(w->op)};
}

/* Whole numbers, exact on both sides until they are rounded to op and divided. */
static xp_ref_val freq_of(const world *w, int64_t choices) {
    const double v = (double)choices / w->n, u = xp_ref_unit(w->op) + xp_ref_unit(XP_F64);
    return (xp_ref_val){v, choices > 0 ? 11.0 * u * v : 0.0};
}

/* E sum f P: products and E additions, E itself, and dividing late (sums of choices times P by n twice) cost fewer than
 * E + 32 roundings, of terms that are not negative. f and P may be rounded to their dtype before. */
static xp_ref_val loss_of(const world *w, const xp_balance_args *a, const int64_t *count, const double *sum,
                          double value) {
    const int64_t E = a->logits.dim[2];
    double apart = 0.0, size = 0.0;
    for (int64_t e = 0; e < E; e++) {
        const xp_ref_val f = xp_ref_val_round(freq_of(w, count[e]), a->freq.dtype, w->op);
        const xp_ref_val p = xp_ref_val_round(mean_of(w, sum[e] / w->n, sum[e], sum[E + e]), a->prob.dtype, w->op);
        apart += f.v * p.e + f.e * p.v + f.e * p.e;
        size += (f.v + f.e) * (p.v + p.e);
    }
    return (xp_ref_val){value, (double)E * (apart + xp_ref_both(E + 32, w->op) * size + xp_ref_least(w->op))};
}

/* Communicates: every rank calls it for every operand alike. Sums over all ranks, then mean_of, freq_of, loss_of and
 * the rounding of the output. With n = 0 everything is 0. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    const xp_balance_args *a = args;
    const int64_t E = a->logits.dim[2], width = 2 * E + 2;
    xp_comm *c = comm_of(a, m);
    int64_t *count;
    char *at = ws;
    void *counts = xp_ref_carve(&at, counts_ws(a, m));
    double *l = xp_ref_carve(&at, (size_t)E * sizeof *l), *p = xp_ref_carve(&at, (size_t)E * sizeof *p);
    double *e = xp_ref_carve(&at, (size_t)E * sizeof *e), *own = xp_ref_carve(&at, (size_t)width * sizeof *own);
    double *sum = xp_ref_carve(&at, (size_t)width * sizeof *sum);
    if (operand != FREQ && operand != PROB && operand != LOSS)
        return XP_FAIL(XP_E_BUG, "balance: operand %d has no bound", operand);
    XP_TRY(counts_all(a, m, NULL, counts, &count));
    gauge_own(a, l, p, e, own);
    const xp_tensor row = xp_tensor_2d(own, XP_F64, 1, width);
    XP_TRY(xp_ref_fold("balance", c, NULL, &row, c ? c->rank : 0, at, sum));
    const int64_t n = count[E + COUNT_N], blocks = count[E + COUNT_BLOCKS];
    const world w = {op_of(a), xp_ref_op(a->logits.dtype), (double)n, n + blocks + 1, blocks + 1};
    for (int64_t i = 0; i < tol->dim[0]; i++) {
        const double v = *(const double *)xp_tensor_at(ref, i, 0, 0, 0);
        xp_ref_val out = {0.0, 0.0};
        if (n > 0 && operand == FREQ)
            out = freq_of(&w, count[i]);
        else if (n > 0 && operand == PROB)
            out = mean_of(&w, v, sum[i], sum[E + i]);
        else if (n > 0)
            out = i == 0 ? loss_of(&w, a, count, sum, v) : mean_of(&w, v, sum[2 * E], sum[2 * E + 1]);
        const xp_dtype d = operand == FREQ ? a->freq.dtype : operand == PROB ? a->prob.dtype : a->loss.dtype;
        *(double *)xp_tensor_at(tol, i, 0, 0, 0) = n > 0 ? xp_ref_val_out(out, d, w.op) : 0.0;
    }
    return XP_OK;
}

/* One token's gradient: c1 (P_j (f_j - D)) + c2 (lse P_j), D = sum f P, with c1 = scale aux E / n, c2 = scale z 2 / n.
 */
typedef struct {
    double c1, c2;
} coefs;

static coefs coefs_of(const xp_balance_bwd_args *a) {
    const double per = a->scale / (double)xp_ref_i64(&a->count, 0);
    return (coefs){per * a->aux_coef * (double)a->logits.dim[2], per * a->z_coef * 2.0};
}

/* P with the error of xp_ref_softmax_error and one rounding, lse likewise. D: E additions and products. Each of the two
 * terms: four factors rounded to op, three divisions or products each of 4 ulp, and the operations above, fewer than 64
 * roundings of magnitudes that bound every way to expand it. Underflow: a smallest number an operation, times what may
 * follow it. */
static void token_errors(const xp_balance_bwd_args *a, xp_dtype op, double *l, double *p, const double *f, double *e) {
    const int64_t E = a->logits.dim[2];
    const coefs c = coefs_of(a);
    const double c1 = fabs(c.c1), c2 = fabs(c.c2), g = xp_ref_both(64, op);
    const double lse = xp_ref_softmax(l, E, p), off = xp_ref_softmax_error(l, 0.0, p, E, op, e);
    double D = 0.0, apart = 0.0, size = 0.0;
    for (int64_t i = 0; i < E; i++) {
        e[i] += xp_ref_room(op, p[i] + e[i]);
        D += f[i] * p[i];
        apart += fabs(f[i]) * e[i];
        size += fabs(f[i]) * (p[i] + e[i]);
    }
    apart += xp_ref_both(E + 1, op) * size;
    for (int64_t i = 0; i < E; i++) {
        const xp_ref_val P = {p[i], e[i]}, inner = {f[i] - D, apart}, z = {lse, off};
        const double first = xp_ref_val_mul(P, inner).e + g * (p[i] + e[i]) * (fabs(f[i]) + size + apart);
        const double second = xp_ref_val_mul(P, z).e + g * (p[i] + e[i]) * (fabs(lse) + off);
        const double under = 64.0 * xp_ref_room(op, 0.0) * (1.0 + c1 + c2) * (2.0 + size + fabs(lse));
        e[i] = c1 * first + c2 * second + under;
    }
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return 4 * xp_ref_span((size_t)((const xp_balance_bwd_args *)args)->logits.dim[2] * sizeof(double));
}

static int counts_token(const xp_balance_bwd_args *a, int64_t t) {
    return xp_ref_i64(&a->count, 0) > 0 && xp_ref_u8(&a->valid, t);
}

/* A token that does not count is exactly 0; else token_errors and the output's rounding. */
static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    const xp_balance_bwd_args *a = args;
    const int64_t E = a->logits.dim[2];
    const xp_tensor *const all[] = {&a->logits, &a->freq, &a->daux};
    const xp_dtype op = xp_ref_op_of(all, 3);
    const xp_ref_rule rule = xp_ref_rule_of(a->daux.dtype, op);
    char *at = ws;
    double *l = xp_ref_carve(&at, (size_t)E * sizeof *l), *p = xp_ref_carve(&at, (size_t)E * sizeof *p);
    double *f = xp_ref_carve(&at, (size_t)E * sizeof *f), *e = xp_ref_carve(&at, (size_t)E * sizeof *e);
    if (operand != BWD_DAUX)
        return XP_FAIL(XP_E_BUG, "balance_bwd: operand %d has no bound", operand);
    xp_widen_row(a->freq.data, a->freq.dtype, 0, E, f);
    for (int64_t y = 0; y < a->logits.dim[0]; y++) {
        for (int64_t t = 0; t < a->logits.dim[1]; t++) {
            memset(e, 0, (size_t)E * sizeof *e);
            if (counts_token(a, t)) {
                xp_widen_row(xp_tensor_at(&a->logits, y, t, 0, 0), a->logits.dtype, 0, E, l);
                token_errors(a, op, l, p, f, e);
                xp_widen_row(xp_tensor_at(ref, y, t, 0, 0), XP_F64, 0, E, l);
                xp_ref_out_errors(&rule, E, l, e);
            }
            memcpy(xp_tensor_at(tol, y, t, 0, 0), e, (size_t)E * sizeof *e);
        }
    }
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_balance_args *a = args;
    const int64_t E = a->logits.dim[2], width = E + 1;
    const xp_dtype acc = xp_ref_op(a->logits.dtype);
    return counts_ws(a, m) + 2 * xp_ref_span((size_t)E * sizeof(double)) +
           2 * xp_ref_span((size_t)width * sizeof(double)) + xp_ref_span(xp_dtype_bytes(acc, blocks_of(a) * width)) +
           xp_ref_fold_ws(comm_of(a, m), width, acc);
}

/* sum[E+1] = sums of P and of lse^2 over tokens [lo, hi) of every layer. */
static void block_sum(const xp_balance_args *a, int64_t lo, int64_t hi, double *l, double *p, double *sum) {
    const int64_t E = a->logits.dim[2];
    memset(sum, 0, (size_t)(E + 1) * sizeof *sum);
    for (int64_t y = 0; y < a->logits.dim[0]; y++) {
        for (int64_t t = lo; t < hi; t++) {
            if (!xp_ref_u8(&a->valid, t))
                continue;
            xp_widen_row(xp_tensor_at(&a->logits, y, t, 0, 0), a->logits.dtype, 0, E, l);
            const double lse = xp_ref_softmax(l, E, p);
            for (int64_t e = 0; e < E; e++)
                sum[e] += p[e];
            sum[E] += lse * lse;
        }
    }
}

/* From the sums over the world; p is room for E values. */
static void results_store(const xp_balance_args *a, const int64_t *count, const double *sum, double *p) {
    const int64_t E = a->logits.dim[2], n = count[E + COUNT_N];
    const double per = n > 0 ? (double)n : 1.0; /* n = 0: every sum is 0 */
    double loss[2] = {0.0, sum[E] / per};
    for (int64_t e = 0; e < E; e++) {
        p[e] = sum[e] / per;
        loss[0] += (double)count[e] / per * p[e];
    }
    loss[0] *= (double)E;
    xp_ref_store_row(a->prob.data, a->prob.dtype, 0, E, p);
    for (int64_t e = 0; e < E; e++)
        p[e] = (double)count[e] / per;
    xp_ref_store_row(a->freq.data, a->freq.dtype, 0, E, p);
    xp_ref_store_row(a->loss.data, a->loss.dtype, 0, 2, loss);
    *(int64_t *)a->count.data = n;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_balance_args *a = args;
    const int64_t E = a->logits.dim[2], width = E + 1, blocks = blocks_of(a), T = a->logits.dim[1];
    const xp_dtype acc = xp_ref_op(a->logits.dtype);
    int64_t *count;
    char *at = x->ws;
    void *counts = xp_ref_carve(&at, counts_ws(a, x->mesh));
    double *l = xp_ref_carve(&at, (size_t)E * sizeof *l), *p = xp_ref_carve(&at, (size_t)E * sizeof *p);
    double *own = xp_ref_carve(&at, (size_t)width * sizeof *own), *sum = xp_ref_carve(&at, (size_t)width * sizeof *sum);
    void *rows = xp_ref_carve(&at, xp_dtype_bytes(acc, blocks * width));
    XP_TRY(counts_all(a, x->mesh, x->q, counts, &count));
    for (int64_t b = 0; b < blocks; b++) {
        int64_t lo, hi;
        xp_ref_block_tokens(a->token0, a->block, T, b, &lo, &hi);
        block_sum(a, lo, hi, l, p, own);
        xp_ref_store_row(rows, acc, b * width, width, own);
    }
    xp_comm *c = comm_of(a, x->mesh);
    const int64_t first = a->block > 0 ? a->token0 / a->block : c ? c->rank : 0;
    const xp_tensor sums = xp_tensor_2d(rows, acc, blocks, width);
    XP_TRY(xp_ref_fold("balance", c, x->q, &sums, first, at, sum));
    results_store(a, count, sum, p);
    return XP_OK;
}

static void token_gradient(const xp_balance_bwd_args *a, const double *l, const double *f, double *p, double *d) {
    const int64_t E = a->logits.dim[2];
    const coefs c = coefs_of(a);
    const double lse = xp_ref_softmax(l, E, p);
    double D = 0.0;
    for (int64_t e = 0; e < E; e++)
        D += f[e] * p[e];
    for (int64_t e = 0; e < E; e++)
        d[e] = c.c1 * (p[e] * (f[e] - D)) + c.c2 * (lse * p[e]);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_balance_bwd_args *a = args;
    const int64_t E = a->logits.dim[2];
    char *at = x->ws;
    double *l = xp_ref_carve(&at, (size_t)E * sizeof *l), *p = xp_ref_carve(&at, (size_t)E * sizeof *p);
    double *f = xp_ref_carve(&at, (size_t)E * sizeof *f), *d = xp_ref_carve(&at, (size_t)E * sizeof *d);
    xp_widen_row(a->freq.data, a->freq.dtype, 0, E, f);
    for (int64_t y = 0; y < a->logits.dim[0]; y++) {
        for (int64_t t = 0; t < a->logits.dim[1]; t++) {
            memset(d, 0, (size_t)E * sizeof *d);
            if (counts_token(a, t)) {
                xp_widen_row(xp_tensor_at(&a->logits, y, t, 0, 0), a->logits.dtype, 0, E, l);
                token_gradient(a, l, f, p, d);
            }
            xp_ref_store_row(xp_tensor_at(&a->daux, y, t, 0, 0), a->daux.dtype, 0, E, d);
        }
    }
    return XP_OK;
}

/* ---- data, slices ---- */

/* About one token in eight does not count; which is a function of its logits in the first layer. */
static void fill_valid(const xp_tensor *valid, const xp_tensor *logits, uint64_t seed) {
    for (int64_t t = 0; t < valid->dim[0]; t++) {
        const uint64_t word =
            logits->dim[0] > 0 ? xp_ref_row_word(xp_tensor_at(logits, 0, t, 0, 0), logits->dtype, logits->dim[2], seed)
                               : 1;
        *(uint8_t *)xp_tensor_at(valid, t, 0, 0, 0) = (word & 7) != 0;
    }
}

static double logit_at(const xp_tensor *l, int64_t y, int64_t t, int64_t e) {
    return xp_widen(xp_tensor_at(l, y, t, e, 0), l->dtype, 0);
}

/* The order in which experts are chosen by logit: larger first, NaN last, then the lower index. */
static int before(const xp_tensor *l, int64_t y, int64_t t, int64_t i, int64_t j) {
    const double a = logit_at(l, y, t, i), b = logit_at(l, y, t, j);
    if (isnan(a) != isnan(b))
        return isnan(b);
    return a > b || (!(a < b) && i < j);
}

static void fill_choice(const xp_tensor *l, int64_t y, int64_t t, int32_t *idx, int64_t K) {
    for (int64_t k = 0; k < K; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < l->dim[2]; e++) {
            if ((k == 0 || before(l, y, t, idx[k - 1], e)) && (best < 0 || before(l, y, t, e, best)))
                best = e;
        }
        idx[k] = (int32_t)best;
    }
}

static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    (void)m;
    (void)data;
    const xp_balance_args *a = args;
    fill_valid(&a->valid, &a->logits, seed);
    for (int64_t y = 0; y < a->logits.dim[0]; y++) {
        for (int64_t t = 0; t < a->logits.dim[1]; t++)
            fill_choice(&a->logits, y, t, xp_tensor_at(&a->idx, y, t, 0, 0), a->idx.dim[2]);
    }
    return XP_OK;
}

/* Any frequencies from 0 to 1, and a count of 1 to 4096 that every rank knows alike. */
static xp_status bwd_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    (void)m;
    (void)data;
    const xp_balance_bwd_args *a = args;
    fill_valid(&a->valid, &a->logits, seed);
    *(int64_t *)a->count.data =
        1 + (int64_t)(xp_ref_row_word(a->freq.data, a->freq.dtype, a->freq.dim[0], seed) % 4096);
    for (int64_t e = 0; e < a->freq.dim[0]; e++) {
        const double f = fabs(xp_widen(a->freq.data, a->freq.dtype, e));
        xp_ref_store(a->freq.data, a->freq.dtype, e, isfinite(f) ? f / (1.0 + f) : 1.0);
    }
    return XP_OK;
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_balance_bwd_args *)args)->logits.dim[1];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_balance_bwd_args *a = args;
    xp_balance_bwd_args *o = out;
    o->logits = xp_tensor_rows(&a->logits, 1, lo, hi);
    o->valid = xp_tensor_rows(&a->valid, 0, lo, hi);
    o->daux = xp_tensor_rows(&a->daux, 1, lo, hi);
}

/* ---- stages and rows ---- */

const xp_stage xp_stage_balance = {
    .name = "balance",
    .meaning = "load-balancing loss and z-loss over all layers, with their means over the world",
    .axis = XP_WORLD,
    .args_size = sizeof(xp_balance_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = bound_workspace,
    .fill = fill,
};

const xp_stage xp_stage_balance_bwd = {
    .name = "balance_bwd",
    .meaning = "gradient of both balance losses with respect to the logits of every layer",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_balance_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .param = bwd_params,
    .params = sizeof bwd_params / sizeof *bwd_params,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_workspace,
    .fill = bwd_fill,
    .extent = bwd_extent,
    .slice = bwd_slice,
};

const xp_kernel xp_ref_balance = {
    .stage = &xp_stage_balance,
    .name = "ref",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_balance_bwd = {
    .stage = &xp_stage_balance_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
