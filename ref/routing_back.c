/* One token's routing, from the weights' gradient to the logits': see routing.h.
 *
 * Three times the same way: values, the gauge of magnitudes for a bound with exact inputs, and values with errors on
 * entry for the bound of a whole block. Must not look at an operand or know who calls. */
#include <math.h>
#include <string.h>

#include "routing_steps.h"

#define INF ((double)INFINITY)

/* Operations of the backward that an implementation with score_dtype act may round to it: dw, factors, division,
 * mean, difference, derivative (3), the product, scale and cap; and a division by K. */
enum { ACT_ROUNDINGS = 12 };

int xp_ref_routing_wants_logits(const xp_dialect *d) {
    return d->score == XP_SCORE_SQRT_SOFTPLUS || d->score == XP_SCORE_SPARSEMIXER || has_shares(d) ||
           d->logit_softcap > 0.0;
}

static int is_masked(const xp_ref_routing *r, int64_t e) {
    return r->d->masked_weight && has_groups(r) && r->kept[group_of(r, e)] == 0;
}

static double factor_of(const xp_ref_routing *r, int64_t e) {
    const double scale = r->d->scale_at == XP_SCALE_WEIGHT ? number(r, r->d->scale) : 1.0;
    return scale * (r->scale_e ? factor_at(r, e) : 1.0) / (r->d->weight_div_k ? (double)r->K : 1.0);
}

/* What the chosen scores are divided by; *out_constant 1: it does not depend on them. */
static double back_divisor(const xp_ref_routing *r, const int32_t *idx, int *out_constant) {
    const double eps = number(r, r->d->renorm_eps);
    double sum = 0.0;
    *out_constant = r->d->renorm == XP_RENORM_NONE || r->d->renorm == XP_RENORM_LOG_SUM;
    if (*out_constant)
        return 1.0;
    for (int64_t k = 0; k < r->K; k++)
        sum += is_masked(r, idx[k]) ? 0.0 : r->score[idx[k]];
    if (r->d->renorm == XP_RENORM_SUM_PLUS_EPS)
        sum += eps;
    if (r->d->renorm == XP_RENORM_MAX_EPS && sum < eps) {
        *out_constant = 1;
        sum = eps;
    }
    return sum;
}

/* g [E]: gradient of the scores, or its gauge. D = divisor, w = s / D: ds_k = (dw_k - sum_j dw_j w_j) / D. */
static void to_scores(const xp_ref_routing *r, const int32_t *idx, const double *dw, int gauge, double *g) {
    int constant;
    const double D = back_divisor(r, idx, &constant);
    double mean = 0.0;
    for (int64_t k = 0; !constant && k < r->K; k++) {
        const double s = is_masked(r, idx[k]) ? 0.0 : r->score[idx[k]];
        const double term = dw[k] * factor_of(r, idx[k]) * (s / D);
        mean += gauge ? fabs(term) : term;
    }
    memset(g, 0, (size_t)r->E * sizeof *g);
    for (int64_t k = 0; k < r->K; k++) {
        const double u = dw[k] * factor_of(r, idx[k]);
        if (!is_masked(r, idx[k]))
            g[idx[k]] += gauge ? (fabs(u) + mean) / fabs(D) : (u - mean) / D;
    }
}

/* 1: the softmax over the chosen is kept in the activation dtype, and the way back begins there. */
static int shares_in_act(const xp_ref_routing *r) {
    return r->d->score == XP_SCORE_SOFTMAX_TOPK && (in_act(r) || r->d->weight_dtype == XP_WIDE_ACT);
}

/* d a / d l of what a softmax over the chosen is made of: 1 of the logits, sigmoid(-l) of log sigmoid(l). */
static double share_slope(const xp_ref_routing *r, int64_t e) {
    return r->d->renorm == XP_RENORM_LOG_SUM ? xp_ref_sigmoid(-r->seen[e]) : 1.0;
}

/* softmax over the chosen, p_k: dl_k = p_k (dw_k - sum_j dw_j p_j), times the slope. */
static void topk_back(xp_ref_routing *r, const int32_t *idx, const double *dw, int gauge, double *dl) {
    double mean = 0.0;
    if (r->d->renorm == XP_RENORM_LOG_SUM) {
        xp_ref_routing_log_shares(r, idx, NULL);
    } else {
        for (int64_t k = 0; k < r->K; k++)
            r->sub[k] = r->seen[idx[k]];
        xp_ref_softmax(r->sub, r->K, r->share);
    }
    if (shares_in_act(r))
        xp_ref_round_row(r->logits, r->K, r->share);
    for (int64_t k = 0; k < r->K; k++) {
        const double u = dw[k] * factor_of(r, idx[k]);
        mean += (gauge ? fabs(u) : u) * r->share[k];
    }
    memset(dl, 0, (size_t)r->E * sizeof *dl);
    for (int64_t k = 0; k < r->K; k++) {
        const double u = dw[k] * factor_of(r, idx[k]);
        dl[idx[k]] += r->share[k] * (gauge ? fabs(u) + mean : u - mean) * share_slope(r, idx[k]);
    }
}

/* What shares that lie one rounding apart move dl by, if both sides round, or one does. */
static void topk_moved(const xp_ref_routing *r, const int32_t *idx, const double *dw, double *e) {
    double mean = 0.0, moved = 0.0;
    for (int64_t k = 0; k < r->K; k++) {
        const double u = fabs(dw[k] * factor_of(r, idx[k]));
        mean += u * r->share[k];
        moved += u * 2.0 * xp_ref_room(r->logits, r->share[k]);
    }
    for (int64_t k = 0; k < r->K && shares_in_act(r); k++) {
        const double u = fabs(dw[k] * factor_of(r, idx[k])), room = 2.0 * xp_ref_room(r->logits, r->share[k]);
        e[idx[k]] += room * (u + mean + moved) + r->share[k] * moved;
    }
}

/* What the errors of shares made of log scores move dl by, as two sides have them. */
static void log_moved(xp_ref_routing *r, const int32_t *idx, const double *dw, double *e) {
    double mean = 0.0, moved = 0.0;
    xp_ref_routing_log_shares(r, idx, r->sub);
    for (int64_t k = 0; k < r->K; k++) {
        const double u = fabs(dw[k] * factor_of(r, idx[k]));
        mean += u * r->share[k];
        moved += u * r->sub[k];
    }
    for (int64_t k = 0; k < r->K; k++) {
        const double u = fabs(dw[k] * factor_of(r, idx[k])), slope = share_slope(r, idx[k]);
        e[idx[k]] += (r->sub[k] * (u + mean + moved) + r->share[k] * moved) * slope;
    }
}

static void sparse_back(xp_ref_routing *r, const int32_t *idx, const double *dw, int gauge, double *dl) {
    memset(dl, 0, (size_t)r->E * sizeof *dl);
    for (int64_t k = 0; k < r->K; k++) {
        double open;
        const double sum = xp_ref_routing_sparse_row(r, idx, k, &open), mine = r->row[idx[k]] / sum;
        const double u = dw[k] * factor_of(r, idx[k]) * mine;
        for (int64_t e = 0; e < r->E; e++) {
            const double p = r->row[e] / sum, one = e == idx[k] ? 1.0 : 0.0;
            dl[e] += gauge ? fabs(u) * (one + p) * (open > 0.0 ? INF : 1.0) : u * (one - p);
        }
    }
}

/* d seen / d l; its gauge counts 1 + t^2 for 1 - t^2, t = tanh. */
static double see_slope(const xp_ref_routing *r, int64_t e, int gauge) {
    const double cap = number(r, r->d->logit_softcap), scale = number(r, r->d->logit_scale);
    const double t = cap > 0.0 ? r->seen[e] / cap : 0.0;
    return isnan(r->l[e]) ? 0.0 : gauge ? fabs(scale) * (1.0 + t * t) : scale * (1.0 - t * t);
}

/* One score's slope. sqrt(softplus): sigmoid(l) / (2 s). */
static double score_slope(const xp_ref_routing *r, int64_t e) {
    const double s = r->score[e];
    if (r->d->score == XP_SCORE_SIGMOID)
        return s * (1.0 - s);
    return xp_ref_sigmoid(r->seen[e]) / (2.0 * s);
}

static void through_scores(xp_ref_routing *r, const int32_t *idx, const double *dw, int gauge, double *dl) {
    if (r->d->score == XP_SCORE_SPARSEMIXER) {
        sparse_back(r, idx, dw, gauge, dl);
        return;
    }
    if (has_shares(r->d)) {
        topk_back(r, idx, dw, gauge, dl);
        return;
    }
    to_scores(r, idx, dw, gauge, dl);
    double dot = 0.0;
    for (int64_t e = 0; e < r->E && is_softmax(r->d); e++)
        dot += dl[e] * (gauge ? fabs(r->score[e]) : r->score[e]);
    for (int64_t e = 0; e < r->E; e++) {
        if (is_softmax(r->d))
            dl[e] = gauge ? fabs(r->score[e]) * (dl[e] + dot) : r->score[e] * (dl[e] - dot);
        else if (dl[e] != 0.0)
            dl[e] *= gauge ? fabs(score_slope(r, e)) : score_slope(r, e);
    }
}

void xp_ref_routing_back(xp_ref_routing *r, const int32_t *idx, const double *dw, double *dl) {
    through_scores(r, idx, dw, 0, dl);
    for (int64_t e = 0; e < r->E; e++)
        dl[e] *= see_slope(r, e, 0);
}

/* NaN where the divisor may round to 0, so that what is not finite may be an infinity or a NaN. Below the normal
 * numbers of the activation dtype a rounding is no longer small beside the value: the divisor's two roundings, relative
 * to it, through the gauge; and a floor for each of the K + 4 roundings (and a division by K) before the division and
 * of those behind it. */
static double act_floor(const xp_ref_routing *r, const int32_t *idx, int64_t e, double gauge) {
    int constant;
    const double D = fabs(back_divisor(r, idx, &constant)), h = xp_ref_half_ulp_err(r->act, 0.0);
    const double off = constant ? 0.0 : 2.0 * xp_ref_room(r->act, D) / D;
    const int own = r->d->score == XP_SCORE_SIGMOID || r->d->score == XP_SCORE_SQRT_SOFTPLUS;
    const double slope = own && r->score[e] > 0.0 ? fabs(score_slope(r, e)) : 1.0;
    if (off >= 1.0)
        return (double)NAN;
    return 2.0 * off * (1.0 + off) * gauge + h * ((double)(r->K + 4 + r->d->weight_div_k) * slope / D + 4.0);
}

int xp_ref_routing_back_gauge(xp_ref_routing *r, const int32_t *idx, const double *dw, double *gauge) {
    const double act = in_act(r) ? xp_ref_gamma(ACT_ROUNDINGS + r->d->weight_div_k, r->act) : 0.0;
    double most = 0.0, sum = 0.0;
    to_scores(r, idx, dw, 1, gauge); /* softmax_topk: no larger than the chosen's dw */
    for (int64_t e = 0; e < r->E; e++) {
        most = gauge[e] > most ? gauge[e] : most;
        sum += fabs(r->score[e]) * gauge[e];
    }
    through_scores(r, idx, dw, 1, gauge);
    for (int64_t e = 0; e < r->E; e++)
        r->row[e] = act * gauge[e] + (in_act(r) ? act_floor(r, idx, e, gauge[e]) : 0.0);
    if (r->d->score == XP_SCORE_SOFTMAX_TOPK)
        topk_moved(r, idx, dw, r->row);
    if (r->d->renorm == XP_RENORM_LOG_SUM)
        log_moved(r, idx, dw, r->row);
    for (int64_t e = 0; e < r->E; e++) {
        gauge[e] *= see_slope(r, e, 1);
        r->row[e] *= see_slope(r, e, 1);
    }
    return most + sum <= 0.5 * xp_ref_largest(r->op);
}

/* K for the divisor, twice where it divides; w (8 units: 4 ulp), its product and the mean's K; factors and the
 * difference; the division; K slots of one expert; the product with the score's slope, or E terms of the sum over
 * experts; difference, product, slope of the cap (16: tanh and the square), addition: at most 6 K + E + 48, and what a
 * softmax of the sparsemixer's rows, a sigmoid or the slope of log sigmoid (9) needs. */
void xp_ref_routing_back_errors(const xp_ref_routing *r, int fits, double *gauge) {
    const int own = r->d->score == XP_SCORE_SPARSEMIXER || has_shares(r->d);
    const int64_t slope = r->d->renorm == XP_RENORM_LOG_SUM ? 9 : 0;
    const int64_t parts = r->d->weight_div_k ? 8 : 0; /* a division by K */
    const int64_t again = slope + parts + (own ? 2 * xp_ref_softmax_units(r->E, r->op) : 0);
    xp_ref_dot_errors(6 * r->K + r->E + 48 + again, r->op, r->E, gauge);
    for (int64_t e = 0; e < r->E; e++)
        gauge[e] = fits || isnan(r->row[e]) ? gauge[e] + r->row[e] : INF;
}

/* ---- with errors on entry ---- */

/* An operation's result: rounded in op, and to the activation dtype where an implementation of score_dtype act may. The
 * value stays the reference's. */
static xp_ref_val done(const xp_ref_routing *r, xp_ref_val a) {
    a.e += xp_ref_room(r->op, fabs(a.v) + a.e);
    if (in_act(r))
        a.e += xp_ref_room(r->act, fabs(a.v) + a.e);
    return a;
}

static xp_ref_val times(const xp_ref_routing *r, xp_ref_val a, xp_ref_val b) {
    return done(r, xp_ref_val_mul(a, b));
}

static xp_ref_val minus(const xp_ref_routing *r, xp_ref_val a, xp_ref_val b) {
    return done(r, xp_ref_val_add(a, (xp_ref_val){-b.v, b.e}));
}

static xp_ref_val score_val(const xp_ref_routing *r, int64_t e) {
    return (xp_ref_val){r->score[e], r->score_e[e]};
}

/* The chosen score, 0 when it is masked; either when that is open. */
static xp_ref_val base_val(const xp_ref_routing *r, int64_t e) {
    const xp_ref_val s = score_val(r, e);
    if (!r->d->masked_weight || !has_groups(r) || r->kept[group_of(r, e)] == 1)
        return s;
    return r->kept[group_of(r, e)] == 0 ? (xp_ref_val){0.0, 0.0} : (xp_ref_val){s.v, fabs(s.v) + s.e};
}

static xp_ref_val factor_val(const xp_ref_routing *r, int64_t e) {
    const double f = factor_of(r, e);
    return (xp_ref_val){f, (r->d->weight_div_k ? 9.0 : 1.0) * xp_ref_unit(r->op) * fabs(f)};
}

static xp_ref_val divisor_val(const xp_ref_routing *r, const int32_t *idx, int *out_constant) {
    const double eps = number(r, r->d->renorm_eps);
    xp_ref_val sum = {0.0, 0.0};
    *out_constant = r->d->renorm == XP_RENORM_NONE || r->d->renorm == XP_RENORM_LOG_SUM;
    if (*out_constant)
        return (xp_ref_val){1.0, 0.0};
    for (int64_t k = 0; k < r->K; k++)
        sum = done(r, xp_ref_val_add(sum, base_val(r, idx[k])));
    if (r->d->renorm == XP_RENORM_SUM_PLUS_EPS)
        sum = done(r, xp_ref_val_add(sum, (xp_ref_val){eps, 0.0}));
    if (r->d->renorm == XP_RENORM_MAX_EPS && sum.v < eps) {
        *out_constant = 1;
        sum.v = eps;
        /* Near eps another implementation may take the other branch: nothing is known then. */
        sum.e = sum.v + sum.e >= eps ? INF : 0.0;
    }
    return sum;
}

static void to_score_vals(const xp_ref_routing *r, const int32_t *idx, const xp_ref_val *dw, xp_ref_val *g) {
    int constant;
    const xp_ref_val D = divisor_val(r, idx, &constant);
    xp_ref_val mean = {0.0, 0.0};
    for (int64_t k = 0; !constant && k < r->K; k++) {
        const xp_ref_val w = divide(r, base_val(r, idx[k]), D), u = times(r, dw[k], factor_val(r, idx[k]));
        mean = done(r, xp_ref_val_add(mean, times(r, u, w)));
    }
    for (int64_t e = 0; e < r->E; e++)
        g[e] = (xp_ref_val){0.0, 0.0};
    for (int64_t k = 0; k < r->K; k++) {
        const xp_ref_val u = minus(r, times(r, dw[k], factor_val(r, idx[k])), mean);
        const xp_ref_val ds = divide(r, u, D);
        const int masked = is_masked(r, idx[k]);
        if (!masked)
            g[idx[k]] = done(r, xp_ref_val_add(g[idx[k]], ds));
        if (r->d->masked_weight && has_groups(r) && r->kept[group_of(r, idx[k])] < 0)
            g[idx[k]].e += fabs(ds.v) + ds.e;
    }
}

static xp_ref_val share_slope_val(const xp_ref_routing *r, int64_t e) {
    const xp_ref_rule rule = xp_ref_rule_of(r->op, r->op);
    return done(r, xp_ref_val_sigmoid(&rule, (xp_ref_val){-r->seen[e], r->seen_e[e]}));
}

/* The shares with their errors, as the forward has them. */
static void topk_vals(xp_ref_routing *r, const int32_t *idx, const xp_ref_val *dw, xp_ref_val *dl) {
    const int log_sum = r->d->renorm == XP_RENORM_LOG_SUM;
    xp_ref_val mean = {0.0, 0.0};
    xp_ref_routing_shares(r, idx);
    for (int64_t k = 0; k < r->K; k++) {
        if (shares_in_act(r))
            r->w[k] = xp_ref_val_round(r->w[k], r->logits, r->op);
        mean = done(r, xp_ref_val_add(mean, times(r, times(r, dw[k], factor_val(r, idx[k])), r->w[k])));
    }
    for (int64_t e = 0; e < r->E; e++)
        dl[e] = (xp_ref_val){0.0, 0.0};
    for (int64_t k = 0; k < r->K; k++) {
        const xp_ref_val u = minus(r, times(r, dw[k], factor_val(r, idx[k])), mean);
        const xp_ref_val part = times(r, r->w[k], u);
        dl[idx[k]] = done(r, xp_ref_val_add(dl[idx[k]], log_sum ? times(r, part, share_slope_val(r, idx[k])) : part));
    }
}

/* One row of the sparsemixer: p of each expert, its logits within le. */
static void sparse_vals(xp_ref_routing *r, const int32_t *idx, const xp_ref_val *dw, xp_ref_val *dl) {
    const double moved =
        xp_ref_expm1(2.0 * largest(r->seen_e, r->E)) + xp_ref_both(xp_ref_softmax_units(r->E, r->op), r->op);
    for (int64_t e = 0; e < r->E; e++)
        dl[e] = (xp_ref_val){0.0, 0.0};
    for (int64_t k = 0; k < r->K; k++) {
        double open;
        const double sum = xp_ref_routing_sparse_row(r, idx, k, &open), least = xp_ref_least(r->op);
        const double p = r->row[idx[k]] / sum, rest = open > 0.0 ? INF : 0.0;
        const xp_ref_val mine = {p, p * moved + least + rest}, u = times(r, dw[k], factor_val(r, idx[k]));
        for (int64_t e = 0; e < r->E; e++) {
            const double q_e = r->row[e] / sum;
            const xp_ref_val other = {q_e, q_e * moved + (q_e > 0.0 ? least : 0.0)};
            const xp_ref_val one = {e == idx[k] ? 1.0 : 0.0, 0.0};
            if (q_e > 0.0 || e == idx[k])
                dl[e] = done(r, xp_ref_val_add(dl[e], times(r, times(r, u, mine), minus(r, one, other))));
        }
    }
}

static xp_ref_val slope_val(const xp_ref_routing *r, int64_t e) {
    const xp_ref_val s = score_val(r, e), one = {1.0, 0.0};
    const xp_ref_rule rule = xp_ref_rule_of(r->op, r->op);
    if (r->d->score == XP_SCORE_SIGMOID)
        return times(r, s, minus(r, one, s));
    return divide(r, done(r, xp_ref_val_sigmoid(&rule, (xp_ref_val){r->seen[e], r->seen_e[e]})),
                  (xp_ref_val){2.0 * s.v, 2.0 * s.e});
}

/* d seen / d l: scale (1 - t^2), t = tanh = seen / cap. */
static xp_ref_val see_val(const xp_ref_routing *r, int64_t e) {
    const double cap = number(r, r->d->logit_softcap);
    xp_ref_val v = {number(r, r->d->logit_scale), 0.0};
    if (cap > 0.0) {
        const xp_ref_val t = divide(r, (xp_ref_val){r->seen[e], r->seen_e[e]}, (xp_ref_val){cap, 0.0});
        v = times(r, v, minus(r, (xp_ref_val){1.0, 0.0}, times(r, t, t)));
    }
    return isnan(r->l[e]) ? (xp_ref_val){0.0, 0.0} : v;
}

void xp_ref_routing_back_vals(xp_ref_routing *r, const int32_t *idx, const xp_ref_val *dw, xp_ref_val *g,
                              xp_ref_val *dl) {
    xp_ref_val dot = {0.0, 0.0};
    if (r->d->score == XP_SCORE_SPARSEMIXER) {
        sparse_vals(r, idx, dw, dl);
    } else if (has_shares(r->d)) {
        topk_vals(r, idx, dw, dl);
    } else {
        to_score_vals(r, idx, dw, g);
        for (int64_t e = 0; e < r->E && is_softmax(r->d); e++)
            dot = done(r, xp_ref_val_add(dot, times(r, g[e], score_val(r, e))));
        for (int64_t e = 0; e < r->E; e++) {
            if (is_softmax(r->d))
                dl[e] = times(r, score_val(r, e), minus(r, g[e], dot));
            else
                dl[e] = g[e].v == 0.0 && g[e].e == 0.0 ? g[e] : times(r, g[e], slope_val(r, e));
        }
    }
    for (int64_t e = 0; e < r->E; e++) {
        const xp_ref_val slope = see_val(r, e);
        dl[e] = slope.v == 1.0 && slope.e == 0.0 ? dl[e] : times(r, dl[e], slope);
    }
}
