/* Stages route and route_bwd: see xp/route.h for the meaning.
 *
 * Only dialect A: check() names what a record has beyond it. Rounding points: the scores, then the weights. The choice
 * and the weights read the scores as stored, so that a choice can be verified from the outputs alone. With nothing but
 * -inf, or a +inf, among a token's numbers IEEE makes the scores NaN; a NaN logit still scores 0. Chosen scores that
 * sum to 0, which only a replayed choice can have, are renormalised to NaN. */
#include "xp/route.h"

#include <math.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "token.h"

/* ---- operands and parameters ---- */

enum { SCORES = 2, IDX, W, BWD_DLOGITS = 4 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_route_args, logits, "T,E", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    XP_OPTIONAL(xp_route_args, bias, "E", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    [SCORES] = XP_OPERAND(xp_route_args, scores, "T,E", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [IDX] = XP_OPERAND(xp_route_args, idx, "T,K", XP_OUT, XP_BIT(XP_I32), XP_SELECT, ""),
    [W] = XP_OPERAND(xp_route_args, w, "T,K", XP_OUT, XP_DT_ACT, XP_BOUND, "weight"),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_route_bwd_args, scores, "T,E", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    XP_OPERAND(xp_route_bwd_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_route_bwd_args, dw, "T,K", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    XP_OPTIONAL(xp_route_bwd_args, daux, "T,E", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [BWD_DLOGITS] = XP_OPERAND(xp_route_bwd_args, dlogits, "T,E", XP_OUT, XP_DT_ACT, XP_BOUND, "logits"),
};

static const xp_param params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_route_args, dialect)},
};

static const xp_param bwd_params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_route_bwd_args, dialect)},
};

/* ---- check ---- */

static xp_status numbers_check(const char *stage, const xp_dialect *d, const char *name) {
    if (d->scale != 1.0)
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has scale %g, expected 1", stage, name, d->scale);
    if (d->logit_scale != 1.0)
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has logit_scale %g, expected 1", stage, name, d->logit_scale);
    if (d->logit_softcap != 0.0)
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has logit_softcap %g, expected 0 (none)", stage, name,
                       d->logit_softcap);
    return XP_OK;
}

/* Dialect A leaves free whether weights are renormalised; everything else that routing reads has one value. */
static xp_status dialect_check(const char *stage, const xp_dialect *d) {
    if (!d)
        return XP_FAIL(XP_E_ARG, "%s: dialect is absent, expected a record", stage);
    const struct {
        const char *field;
        int value, expected;
        const char *meaning;
    } field[] = {
        {"score", (int)d->score, XP_SCORE_SOFTMAX, "softmax"},
        {"score_dtype", (int)d->score_dtype, XP_WIDE_F32, "f32"},
        {"select_on", (int)d->select_on, XP_ON_SCORE, "score"},
        {"group_reduce", (int)d->group_reduce, XP_GROUP_NONE, "no groups"},
        {"scale_at", (int)d->scale_at, XP_SCALE_WEIGHT, "weight"},
        {"select_bias", d->select_bias, 0, "none"},
        {"expert_scale", d->expert_scale, 0, "none"},
    };
    const char *name = d->name ? d->name : "?";
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        if (field[i].value != field[i].expected)
            return XP_FAIL(XP_E_ARG, "%s: dialect %s has %s %d, expected %d (%s)", stage, name, field[i].field,
                           field[i].value, field[i].expected, field[i].meaning);
    }
    if (d->renorm != XP_RENORM_NONE && d->renorm != XP_RENORM_SUM)
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has renorm %d, expected 0 (none) or 1 (sum)", stage, name,
                       (int)d->renorm);
    return numbers_check(stage, d, name);
}

static xp_status slots_check(const char *stage, const xp_ref_dims *d) {
    const int64_t E = XP_REF_DIM(*d, 'E'), K = XP_REF_DIM(*d, 'K');
    if (K < 1 || K > E)
        return XP_FAIL(XP_E_ARG, "%s: idx dim 1 is %lld, but E is %lld (K must be in 1..E)", stage, (long long)K,
                       (long long)E);
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_route, args, &d));
    XP_TRY(slots_check("route", &d));
    XP_TRY(dialect_check("route", a->dialect));
    if (a->bias.data)
        return XP_FAIL(XP_E_ARG, "route: bias is present, expected none: dialect %s has select_bias 0",
                       a->dialect->name ? a->dialect->name : "?");
    if (a->replay != 0 && a->replay != 1)
        return XP_FAIL(XP_E_ARG, "route: replay is %d, expected 0 or 1", a->replay);
    return a->replay ? xp_ref_ids_check("route", "idx", &a->idx, 0, XP_REF_DIM(d, 'E'), "E") : XP_OK;
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_bwd_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_route_bwd, args, &d));
    XP_TRY(slots_check("route_bwd", &d));
    XP_TRY(dialect_check("route_bwd", a->dialect));
    return xp_ref_ids_check("route_bwd", "idx", &a->idx, 0, XP_REF_DIM(d, 'E'), "E");
}

/* ---- cost ---- */

/* Softmax: subtract, exp, add, divide; one comparison a score, a sum and a division a slot. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_route_args *a = args;
    const double T = (double)a->idx.dim[0], E = (double)a->scores.dim[1], K = (double)a->idx.dim[1];
    *out = (xp_cost){.flop = T * (5.0 * E + 2.0 * K), .mem_bytes = xp_ref_bytes(&xp_stage_route, args)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_route_bwd_args *a = args;
    const double T = (double)a->idx.dim[0], E = (double)a->scores.dim[1], K = (double)a->idx.dim[1];
    *out = (xp_cost){.flop = T * ((a->daux.data ? 3.0 : 2.0) * E + 8.0 * K),
                     .mem_bytes = xp_ref_bytes(&xp_stage_route_bwd, args)};
}

/* ---- rows ---- */

static void row_load(const xp_tensor *t, int64_t i, double *out) {
    xp_widen_row(xp_tensor_at(t, i, 0, 0, 0), t->dtype, 0, t->dim[1], out);
}

static void row_store(const xp_tensor *t, int64_t i, const double *v) {
    xp_ref_store_row(xp_tensor_at(t, i, 0, 0, 0), t->dtype, 0, t->dim[1], v);
}

/* seen = what the softmax sees of logits l, p = the scores, unrounded. Returns how many logits are numbers. */
static int64_t row_scores(const double *l, int64_t E, double *seen, double *p) {
    int64_t numbers = 0;
    for (int64_t e = 0; e < E; e++) {
        numbers += !isnan(l[e]);
        seen[e] = isnan(l[e]) ? -(double)INFINITY : l[e];
    }
    xp_ref_softmax(seen, E, p);
    for (int64_t e = 0; e < E; e++) {
        if (isnan(l[e]))
            p[e] = numbers > 0 ? 0.0 : (double)NAN;
    }
    return numbers;
}

/* The order of choice: numbers before NaN logits, higher scores first, then the lower index. Where infinite logits make
 * the scores NaN, the logits themselves decide. */
static int before(const double *l, const double *p, int64_t a, int64_t b) {
    if (isnan(l[a]) != isnan(l[b]))
        return isnan(l[b]);
    if (isnan(p[a]) != isnan(p[b]))
        return isnan(p[b]);
    const double *key = isnan(p[a]) ? l : p;
    if (key[a] > key[b] || key[a] < key[b])
        return key[a] > key[b];
    return a < b;
}

/* The order is total, so what is left after a slot is what comes behind it. */
static void row_choose(const double *l, const double *p, int64_t E, int32_t *idx, int64_t K) {
    for (int64_t k = 0; k < K; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++) {
            if ((k == 0 || before(l, p, idx[k - 1], e)) && (best < 0 || before(l, p, e, best)))
                best = e;
        }
        idx[k] = (int32_t)best;
    }
}

static double slots_sum(const double *p, const int32_t *idx, int64_t K) {
    double sum = 0.0;
    for (int64_t k = 0; k < K; k++)
        sum += p[idx[k]];
    return sum;
}

/* ---- bound ---- */

static size_t bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return 4 * xp_ref_span((size_t)((const xp_route_args *)args)->logits.dim[1] * sizeof(double));
}

/* The value of slot k and its error. S = the chosen scores' sum, s the error of each score as stored, g = gamma_K:
 *   b = sum s + g (S + sum s) is how far S' may be; |p'/S' - p/S| <= (s + p/S b) / (S - b); division within 4 ulp of
 *   op, or within its smallest normal number. */
static xp_ref_val slot_value(const xp_dialect *d, const double *p, const double *s, const int32_t *idx, int64_t K,
                             int64_t k, xp_dtype op) {
    const int64_t at = idx[k];
    if (d->renorm != XP_RENORM_SUM)
        return (xp_ref_val){p[at], s[at]};
    const double u = xp_ref_unit(op) + xp_ref_unit(XP_F64), S = slots_sum(p, idx, K), off = slots_sum(s, idx, K);
    const double b = off + xp_ref_both(K, op) * (S + off), q = p[at] / S;
    if (!(b < S))
        return (xp_ref_val){q, (double)INFINITY};
    const double moved = (s[at] + q * b) / (S - b);
    return (xp_ref_val){q, moved + 8.0 * u * (q + moved) + xp_ref_least(op)};
}

/* Scores: xp_ref_softmax_error, in the scores' dtype, then one rounding. Weights: of scores that are rounded or not,
 * which is one more room; then slot_value and the rounding to the weight's dtype. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    const xp_route_args *a = args;
    const int64_t T = a->logits.dim[0], E = a->logits.dim[1], K = a->idx.dim[1];
    const xp_dtype op = a->scores.dtype;
    char *at = ws;
    double *l = xp_ref_carve(&at, (size_t)E * sizeof *l), *seen = xp_ref_carve(&at, (size_t)E * sizeof *seen);
    double *p = xp_ref_carve(&at, (size_t)E * sizeof *p), *e = xp_ref_carve(&at, (size_t)E * sizeof *e);
    if (operand != SCORES && operand != W)
        return XP_FAIL(XP_E_BUG, "route: operand %d has no bound", operand);
    const xp_ref_rule rule = xp_ref_rule_of(op, op);
    for (int64_t t = 0; t < T; t++) {
        row_load(&a->logits, t, l);
        row_scores(l, E, seen, p);
        xp_ref_softmax_error(seen, p, E, op, e);
        for (int64_t i = 0; i < E; i++) {
            if (isnan(l[i])) /* 0 by definition */
                e[i] = 0.0;
        }
        xp_ref_out_errors(&rule, E, p, e);
        if (operand == SCORES) {
            row_store(tol, t, e);
            continue;
        }
        const int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        for (int64_t k = 0; k < K; k++) {
            xp_ref_val v = slot_value(a->dialect, p, e, idx, K, k, op);
            v.v = *(const double *)xp_tensor_at(ref, t, k, 0, 0);
            *(double *)xp_tensor_at(tol, t, k, 0, 0) = xp_ref_val_out(v, a->w.dtype, op);
        }
    }
    return XP_OK;
}

/* Gauge of one token. M = sum |w dw| is that of the mean, D_k = |dw_k| + M of a slot's difference (just |dw_k| without
 * renormalisation, where S counts as 1), G_e = sum of D_k / S over the slots of e, Q = sum P_e G_e:
 *   P_e (G_e + Q) + |daux|.
 * Returns 0 when an intermediate value may leave op's range. */
static int bwd_gauge(const xp_route_bwd_args *a, int64_t t, xp_dtype op, const double *p, const double *dw,
                     double *gauge) {
    const int64_t E = a->scores.dim[1], K = a->idx.dim[1];
    const int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
    const int renorm = a->dialect->renorm == XP_RENORM_SUM;
    const double S = renorm ? slots_sum(p, idx, K) : 1.0;
    double M = 0.0, Q = 0.0, most = 0.0;
    for (int64_t k = 0; renorm && k < K; k++)
        M += fabs(p[idx[k]] * dw[k] / S);
    for (int64_t e = 0; e < E; e++)
        gauge[e] = 0.0;
    for (int64_t k = 0; k < K; k++)
        gauge[idx[k]] += (fabs(dw[k]) + M) / S;
    for (int64_t e = 0; e < E; e++) {
        Q += fabs(p[e]) * gauge[e];
        most = gauge[e] > most ? gauge[e] : most;
    }
    for (int64_t e = 0; e < E; e++) {
        gauge[e] = fabs(p[e]) * (gauge[e] + Q);
        if (a->daux.data)
            gauge[e] += fabs(xp_widen(xp_tensor_at(&a->daux, t, e, 0, 0), a->daux.dtype, 0));
    }
    return most + Q <= 0.5 * xp_ref_largest(op);
}

/* Roundings on the way to dlogits: K for the sum S, twice where it divides; w (8 units: 4 ulp), its product and the
 * mean's K; the difference; the division by S; K slots of one expert; the product with P and E terms of the sum over
 * experts; difference, product, addition: at most 6 K + E + 24. Their gamma times the gauge (err.h), then one rounding.
 * The short form of the renormalised gradient, w_k (dw_k - mean) and 0 elsewhere, has fewer and is covered. */
static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    const xp_route_bwd_args *a = args;
    const int64_t T = a->scores.dim[0], E = a->scores.dim[1], K = a->idx.dim[1], n = 6 * K + E + 24;
    const xp_tensor *const all[] = {&a->scores, &a->dw, &a->daux, &a->dlogits};
    const xp_dtype op = xp_ref_op_of(all, 4);
    char *at = ws;
    double *p = xp_ref_carve(&at, (size_t)E * sizeof *p), *e = xp_ref_carve(&at, (size_t)E * sizeof *e);
    double *dw = xp_ref_carve(&at, (size_t)K * sizeof *dw);
    if (operand != BWD_DLOGITS)
        return XP_FAIL(XP_E_BUG, "route_bwd: operand %d has no bound", operand);
    const xp_ref_rule rule = xp_ref_rule_of(a->dlogits.dtype, op);
    for (int64_t t = 0; t < T; t++) {
        row_load(&a->scores, t, p);
        row_load(&a->dw, t, dw);
        const int fits = bwd_gauge(a, t, op, p, dw, e);
        xp_ref_dot_errors(n, op, E, e);
        for (int64_t i = 0; i < E && !fits; i++)
            e[i] = (double)INFINITY;
        row_load(ref, t, p);
        xp_ref_out_errors(&rule, E, p, e);
        row_store(tol, t, e);
    }
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_args *a = args;
    return 3 * xp_ref_span((size_t)a->logits.dim[1] * sizeof(double)) +
           xp_ref_span((size_t)a->idx.dim[1] * sizeof(double));
}

static void row_weigh(const xp_route_args *a, int64_t t, const double *p, double *w) {
    const int64_t K = a->idx.dim[1];
    const int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
    const double sum = a->dialect->renorm == XP_RENORM_SUM ? slots_sum(p, idx, K) : 1.0;
    for (int64_t k = 0; k < K; k++)
        w[k] = p[idx[k]] / sum;
    row_store(&a->w, t, w);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_route_args *a = args;
    const int64_t T = a->logits.dim[0], E = a->logits.dim[1], K = a->idx.dim[1];
    char *at = x->ws;
    double *l = xp_ref_carve(&at, (size_t)E * sizeof *l), *seen = xp_ref_carve(&at, (size_t)E * sizeof *seen);
    double *p = xp_ref_carve(&at, (size_t)E * sizeof *p), *w = xp_ref_carve(&at, (size_t)K * sizeof *w);
    for (int64_t t = 0; t < T; t++) {
        row_load(&a->logits, t, l);
        row_scores(l, E, seen, p);
        row_store(&a->scores, t, p);
        xp_ref_round_row(a->scores.dtype, E, p);
        if (!a->replay)
            row_choose(l, p, E, xp_tensor_at(&a->idx, t, 0, 0, 0), K);
        row_weigh(a, t, p, w);
    }
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_bwd_args *a = args;
    return 2 * xp_ref_span((size_t)a->scores.dim[1] * sizeof(double)) +
           xp_ref_span((size_t)a->idx.dim[1] * sizeof(double));
}

/* g = gradient of the scores. With S = sum s, w = s / S: ds_k = (dw_k - sum_j dw_j w_j) / S. */
static void row_to_scores(const xp_route_bwd_args *a, int64_t t, const double *p, const double *dw, double *g) {
    const int64_t E = a->scores.dim[1], K = a->idx.dim[1];
    const int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
    double sum = 1.0, mean = 0.0;
    if (a->dialect->renorm == XP_RENORM_SUM) {
        sum = slots_sum(p, idx, K);
        for (int64_t k = 0; k < K; k++)
            mean += dw[k] * (p[idx[k]] / sum);
    }
    for (int64_t e = 0; e < E; e++)
        g[e] = 0.0;
    for (int64_t k = 0; k < K; k++)
        g[idx[k]] += (dw[k] - mean) / sum;
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_route_bwd_args *a = args;
    const int64_t T = a->scores.dim[0], E = a->scores.dim[1], K = a->idx.dim[1];
    char *at = x->ws;
    double *p = xp_ref_carve(&at, (size_t)E * sizeof *p), *g = xp_ref_carve(&at, (size_t)E * sizeof *g);
    double *dw = xp_ref_carve(&at, (size_t)K * sizeof *dw);
    for (int64_t t = 0; t < T; t++) {
        double dot = 0.0;
        row_load(&a->scores, t, p);
        row_load(&a->dw, t, dw);
        row_to_scores(a, t, p, dw, g);
        for (int64_t e = 0; e < E; e++)
            dot += g[e] * p[e];
        for (int64_t e = 0; e < E; e++)
            g[e] = p[e] * (g[e] - dot);
        if (a->daux.data) {
            row_load(&a->daux, t, p);
            for (int64_t e = 0; e < E; e++)
                g[e] += p[e];
        }
        row_store(&a->dlogits, t, g);
    }
    return XP_OK;
}

/* ---- data, slices ---- */

static double score_at(const xp_tensor *t, int64_t i, int64_t e) {
    return xp_widen(xp_tensor_at(t, i, e, 0, 0), t->dtype, 0);
}

/* A row of logits becomes its softmax, in place: there is no workspace here, and these need only be legal scores. */
static void fill_scores(const xp_tensor *s, int64_t t) {
    double most = -(double)INFINITY, sum = 0.0;
    for (int64_t e = 0; e < s->dim[1]; e++)
        most = score_at(s, t, e) > most ? score_at(s, t, e) : most;
    for (int64_t e = 0; e < s->dim[1]; e++) {
        const double l = score_at(s, t, e);
        xp_ref_store(xp_tensor_at(s, t, e, 0, 0), s->dtype, 0, isnan(l) ? 0.0 : xp_ref_exp(l - most));
        sum += score_at(s, t, e);
    }
    for (int64_t e = 0; e < s->dim[1]; e++)
        xp_ref_store(xp_tensor_at(s, t, e, 0, 0), s->dtype, 0, score_at(s, t, e) / sum);
}

/* As before(), for experts a < b or a > b of a stored row. */
static int score_before(const xp_tensor *s, int64_t t, int64_t a, int64_t b) {
    const double l[2] = {0.0, 0.0};
    const int64_t low = a < b ? a : b, high = a < b ? b : a;
    const double p[2] = {score_at(s, t, low), score_at(s, t, high)};
    return a != b && before(l, p, a != low, a == low);
}

/* A gradient that is not finite, or beyond what dlogits holds, leaves no result that every right order of operations
 * agrees on, sign included. */
static void fill_gradient(const xp_tensor *dw, int64_t t, double most) {
    for (int64_t k = 0; k < dw->dim[1]; k++) {
        const double v = score_at(dw, t, k);
        if (!(fabs(v) <= most))
            xp_ref_store(xp_tensor_at(dw, t, k, 0, 0), dw->dtype, 0, isnan(v) ? 0.0 : copysign(1.0, v));
    }
}

static xp_status bwd_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    (void)m;
    (void)data;
    (void)seed;
    const xp_route_bwd_args *a = args;
    for (int64_t t = 0; t < a->scores.dim[0]; t++) {
        int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        fill_scores(&a->scores, t);
        fill_gradient(&a->dw, t, 0.125 * xp_ref_largest(a->dlogits.dtype));
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            int64_t best = -1;
            for (int64_t e = 0; e < a->scores.dim[1]; e++) {
                if ((k == 0 || score_before(&a->scores, t, idx[k - 1], e)) &&
                    (best < 0 || score_before(&a->scores, t, e, best)))
                    best = e;
            }
            idx[k] = (int32_t)best;
        }
    }
    return XP_OK;
}

static int64_t extent(const void *args) {
    return ((const xp_route_args *)args)->logits.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_route_args *a = args;
    xp_route_args *o = out;
    o->logits = xp_tensor_rows(&a->logits, 0, lo, hi);
    o->scores = xp_tensor_rows(&a->scores, 0, lo, hi);
    o->idx = xp_tensor_rows(&a->idx, 0, lo, hi);
    o->w = xp_tensor_rows(&a->w, 0, lo, hi);
}

static void replay(void *args, int on) {
    ((xp_route_args *)args)->replay = on != 0;
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_route_bwd_args *)args)->scores.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_route_bwd_args *a = args;
    xp_route_bwd_args *o = out;
    o->scores = xp_tensor_rows(&a->scores, 0, lo, hi);
    o->idx = xp_tensor_rows(&a->idx, 0, lo, hi);
    o->dw = xp_tensor_rows(&a->dw, 0, lo, hi);
    if (a->daux.data)
        o->daux = xp_tensor_rows(&a->daux, 0, lo, hi);
    o->dlogits = xp_tensor_rows(&a->dlogits, 0, lo, hi);
}

/* ---- properties ---- */

static double row_sum(const xp_tensor *t, int64_t i) {
    double sum = 0.0;
    for (int64_t j = 0; j < t->dim[1]; j++)
        sum += score_at(t, i, j);
    return sum;
}

static int all_finite(const xp_tensor *t, int64_t i) {
    for (int64_t j = 0; j < t->dim[1]; j++) {
        if (!isfinite(score_at(t, i, j)))
            return 0;
    }
    return 1;
}

static void worse(double residual, double *out) {
    if (!(residual <= *out) && !isnan(*out))
        *out = residual;
}

/* Scores of finite logits sum to 1: each within gamma of xp_ref_softmax_units, or the smallest normal number, and one
 * rounding; E additions here. */
static xp_status scores_sum_to_one(const void *args, const xp_mesh *m, double *out) {
    (void)m;
    const xp_route_args *a = args;
    const int64_t E = a->scores.dim[1];
    const xp_dtype op = a->scores.dtype;
    const double unit = xp_ref_both(xp_ref_softmax_units(E, op) + 1 + E, op) + (double)E * 2.0 * xp_ref_least(op);
    *out = 0.0;
    for (int64_t t = 0; t < a->scores.dim[0]; t++) {
        if (all_finite(&a->logits, t))
            worse(fabs(row_sum(&a->scores, t) - 1.0) / unit, out);
    }
    return XP_OK;
}

/* Renormalised weights sum to 1: K roundings of the sum, 8 of the division, twice where it divides; each weight is then
 * rounded to its dtype. A choice without a score above 0 has no weights. */
static xp_status weights_sum_to_one(const void *args, const xp_mesh *m, double *out) {
    (void)m;
    const xp_route_args *a = args;
    const int64_t K = a->idx.dim[1];
    const double g = xp_ref_both(3 * K + 8, a->scores.dtype), K_least = (double)K * xp_ref_room(a->w.dtype, 0.0);
    const double unit = g + xp_ref_unit(a->w.dtype) * (1.0 + g) + K_least + (double)K * xp_ref_least(a->scores.dtype);
    *out = 0.0;
    for (int64_t t = 0; a->dialect->renorm == XP_RENORM_SUM && t < a->w.dim[0]; t++) {
        const int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        double chosen = 0.0;
        for (int64_t k = 0; k < K; k++)
            chosen += score_at(&a->scores, t, idx[k]);
        if (all_finite(&a->logits, t) && chosen > 0.0)
            worse(fabs(row_sum(&a->w, t) - 1.0) / unit, out);
    }
    return XP_OK;
}

static const xp_property properties[] = {
    {"scores_sum_to_one", scores_sum_to_one},
    {"weights_sum_to_one", weights_sum_to_one},
};

/* ---- stages and rows ---- */

const xp_stage xp_stage_route = {
    .name = "route",
    .meaning = "K experts a token by score, lower index first among equals, and their weights",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_route_args),
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
    .replay = replay,
    .scores = "scores",
    .property = properties,
    .properties = sizeof properties / sizeof *properties,
};

const xp_stage xp_stage_route_bwd = {
    .name = "route_bwd",
    .meaning = "gradient of the logits through weights, renormalisation and softmax, plus the balance losses'",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_route_bwd_args),
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

const xp_kernel xp_ref_route = {
    .stage = &xp_stage_route,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_route_bwd = {
    .stage = &xp_stage_route_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
