/* One token's routing: see routing.h.
 *
 * Everything is double between declared rounding points; q is the one of score_dtype act. Must not look at an operand
 * or know who calls. */
#include "routing.h"

#include <math.h>
#include <string.h>

#include "token.h"

#define INF ((double)INFINITY)

/* Operations of the backward that an implementation with score_dtype act may round to it: dw, factors, division,
 * mean, difference, derivative (3), the product, scale and cap. */
enum { ACT_ROUNDINGS = 12 };

void xp_ref_routing_plan(xp_ref_layout *l, const xp_dialect *d, int64_t E, int64_t K, xp_dtype act, xp_dtype op,
                         int bounds, xp_ref_routing *out) {
    const size_t row = (size_t)E * sizeof(double), slots = (size_t)K * sizeof(double);
    const size_t groups = d->group_reduce != XP_GROUP_NONE && d->n_group > 0 ? (size_t)d->n_group : 0;
    *out = (xp_ref_routing){.d = d, .E = E, .K = K, .act = act, .op = op};
    out->l = xp_ref_take(l, row);
    out->seen = xp_ref_take(l, row);
    out->score = xp_ref_take(l, row);
    out->key = xp_ref_take(l, row);
    out->row = xp_ref_take(l, row);
    out->sub = xp_ref_take(l, slots);
    out->share = xp_ref_take(l, slots);
    out->kept = xp_ref_take(l, groups * sizeof(int64_t));
    out->gscore = xp_ref_take(l, groups * sizeof(double));
    out->w = xp_ref_take(l, (size_t)K * sizeof(xp_ref_val));
    if (bounds) {
        out->seen_e = xp_ref_take(l, row);
        out->score_e = xp_ref_take(l, row);
        out->key_e = xp_ref_take(l, row);
        out->gscore_e = xp_ref_take(l, groups * sizeof(double));
    }
}

/* ---- rounding points ---- */

static int in_act(const xp_ref_routing *r) {
    return r->d->score_dtype == XP_WIDE_ACT;
}

static double q(const xp_ref_routing *r, double v) {
    return in_act(r) ? xp_ref_round(v, r->act) : v;
}

/* A step's value with its error: q, or whatever op does to it. */
static xp_ref_val step(const xp_ref_routing *r, xp_ref_val a) {
    if (in_act(r))
        return xp_ref_val_round(a, r->act, r->op);
    a.e += xp_ref_room(r->op, fabs(a.v) + a.e);
    return a;
}

/* Numbers of the record are f32 in an f32 implementation. */
static double number(const xp_ref_routing *r, double v) {
    return r->op == XP_F64 ? v : (double)(float)v;
}

/* b stays away from 0, or nothing is known. Division within 4 ulp of op, or within its smallest normal number. */
static xp_ref_val divide(const xp_ref_routing *r, xp_ref_val a, xp_ref_val b) {
    const double v = a.v / b.v, u = xp_ref_unit(r->op) + xp_ref_unit(XP_F64);
    if (!(b.e < fabs(b.v)))
        return (xp_ref_val){v, INF};
    const double moved = (a.e + fabs(v) * b.e) / (fabs(b.v) - b.e);
    return (xp_ref_val){v, moved + 8.0 * u * (fabs(v) + moved) + xp_ref_least(r->op)};
}

/* ---- scores ---- */

/* l scaled and capped, with the error of one argument: tanh has slope 1 at most and is within 4 ulp. */
static xp_ref_val see(const xp_ref_routing *r, double l, double le) {
    const double scale = number(r, r->d->logit_scale), cap = number(r, r->d->logit_softcap);
    xp_ref_val v = {l, le};
    if (scale != 1.0)
        v = step(r, xp_ref_val_mul(v, (xp_ref_val){scale, 0.0}));
    if (cap > 0.0) {
        const double u = xp_ref_unit(r->op) + xp_ref_unit(XP_F64), y = cap * xp_ref_tanh(v.v / cap);
        v = step(r, (xp_ref_val){y, v.e + 12.0 * u * fabs(y) + cap * xp_ref_least(r->op)});
    }
    return v;
}

/* |sqrt a' - sqrt a| is at most e / sqrt a, and sqrt e. */
static xp_ref_val root(const xp_ref_routing *r, xp_ref_val a) {
    const double v = sqrt(a.v), far = sqrt(a.e), near = v > 0.0 ? a.e / v : far;
    const double moved = near < far ? near : far;
    return (xp_ref_val){v, moved + 8.0 * xp_ref_unit(r->op) * (v + moved)};
}

/* softplus has slope 1 at most. log1p of exp: 4 ulp each, and exp's move the logarithm by less than as much of it; an
 * implementation may return x itself above 20, which f32 does not tell. */
static xp_ref_val softplus(const xp_ref_routing *r, xp_ref_val x) {
    const double v = xp_ref_softplus(x.v), u = xp_ref_unit(r->op) + xp_ref_unit(XP_F64);
    return (xp_ref_val){v, x.e + 18.0 * u * (v + x.e) + xp_ref_least(r->op)};
}

static xp_ref_val score_of(const xp_ref_routing *r, xp_ref_val seen) {
    if (r->d->score == XP_SCORE_SQRT_SOFTPLUS)
        return root(r, step(r, softplus(r, seen)));
    const xp_ref_rule rule = xp_ref_rule_of(r->op, r->op);
    return xp_ref_val_sigmoid(&rule, seen);
}

static int is_softmax(const xp_dialect *d) {
    return d->score != XP_SCORE_SIGMOID && d->score != XP_SCORE_SQRT_SOFTPLUS;
}

static double largest(const double *v, int64_t n) {
    double most = 0.0;
    for (int64_t i = 0; i < n; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

void xp_ref_routing_scores(xp_ref_routing *r, const double *le) {
    int64_t numbers = 0;
    for (int64_t e = 0; e < r->E; e++) {
        const int nan = isnan(r->l[e]);
        const xp_ref_val s = nan ? (xp_ref_val){-INF, 0.0} : see(r, r->l[e], le ? le[e] : 0.0);
        numbers += !nan;
        r->seen[e] = s.v;
        if (r->seen_e)
            r->seen_e[e] = s.e;
    }
    if (is_softmax(r->d)) {
        xp_ref_softmax(r->seen, r->E, r->score);
        if (r->score_e)
            xp_ref_softmax_error(r->seen, largest(r->seen_e, r->E), r->score, r->E, r->op, r->score_e);
    }
    for (int64_t e = 0; e < r->E; e++) {
        if (!is_softmax(r->d)) {
            const xp_ref_val s = score_of(r, (xp_ref_val){r->seen[e], r->score_e ? r->seen_e[e] : 0.0});
            r->score[e] = s.v;
            if (r->score_e)
                r->score_e[e] = s.e;
        }
        if (isnan(r->l[e])) { /* by definition */
            r->score[e] = numbers > 0 ? 0.0 : (double)NAN;
            if (r->score_e)
                r->score_e[e] = 0.0;
        }
    }
}

void xp_ref_routing_store(xp_ref_routing *r, xp_dtype d) {
    const xp_ref_rule rule = xp_ref_rule_of(in_act(r) ? r->act : r->op, r->op);
    /* With bounds the values stay those of a judge, which only q rounds. */
    const xp_dtype read = in_act(r) ? r->act : r->score_e ? XP_F64 : d;
    for (int64_t e = 0; e < r->E; e++) {
        const double v = r->score[e];
        r->score[e] = xp_ref_round(v, read);
        if (r->score_e && !isnan(r->l[e]))
            r->score_e[e] = xp_ref_rule_out(&rule, (xp_ref_val){v, r->score_e[e]}) + fabs(v - r->score[e]);
    }
}

/* ---- keys ---- */

static int has_groups(const xp_ref_routing *r) {
    return r->d->group_reduce != XP_GROUP_NONE;
}

static int64_t group_of(const xp_ref_routing *r, int64_t e) {
    return e / (r->E / r->d->n_group);
}

/* The largest, or the sum of the two largest, of v + sign * err over one group; NaN counts as nothing. */
static double reduce(const xp_ref_routing *r, int64_t g, double sign) {
    const int64_t n = r->E / r->d->n_group;
    double first = -INF, second = -INF;
    for (int64_t e = g * n; e < (g + 1) * n; e++) {
        const double v = r->key[e] + (sign != 0.0 ? sign * r->key_e[e] : 0.0);
        if (v > first) {
            second = first;
            first = v;
        } else if (v > second) {
            second = v;
        }
    }
    return r->d->group_reduce == XP_GROUP_MAX ? first : first + second;
}

static void score_group(xp_ref_routing *r, int64_t g) {
    const double v = reduce(r, g, 0.0);
    r->gscore[g] = xp_ref_round(v, r->op);
    if (!r->key_e)
        return;
    const double up = reduce(r, g, 1.0) - v, down = v - reduce(r, g, -1.0), e = up > down ? up : down;
    const int sum = r->d->group_reduce == XP_GROUP_TOP2SUM;
    r->gscore_e[g] = e > 0.0 || sum ? e + (sum ? 2.0 * xp_ref_room(r->op, fabs(v) + e) : 0.0) : 0.0;
}

/* 1: group a comes before b for certain. Exact scores decide ties by the lower index. */
static int group_beats(const xp_ref_routing *r, int64_t a, int64_t b) {
    const double ea = r->key_e ? r->gscore_e[a] : 0.0, eb = r->key_e ? r->gscore_e[b] : 0.0;
    if (ea == 0.0 && eb == 0.0)
        return r->gscore[a] > r->gscore[b] || (r->gscore[a] == r->gscore[b] && a < b);
    return r->gscore[a] - ea > r->gscore[b] + eb;
}

static void keep_groups(xp_ref_routing *r) {
    const int64_t n = r->d->n_group;
    for (int64_t g = 0; g < n; g++)
        score_group(r, g);
    for (int64_t g = 0; g < n; g++) {
        int64_t ahead = 0, behind = 0;
        for (int64_t h = 0; h < n; h++) {
            ahead += h != g && group_beats(r, h, g);
            behind += h != g && group_beats(r, g, h);
        }
        r->kept[g] = ahead >= r->d->topk_group ? 0 : n - 1 - behind < r->d->topk_group ? 1 : -1;
    }
}

void xp_ref_routing_keys(xp_ref_routing *r) {
    const int on_score = r->d->select_on != XP_ON_LOGIT;
    for (int64_t e = 0; e < r->E; e++) {
        xp_ref_val v = {on_score ? r->score[e] : r->seen[e], 0.0};
        if (r->key_e)
            v.e = on_score ? r->score_e[e] : r->seen_e[e];
        if (r->bias) {
            v.v += r->bias[e];
            const double exact = v.v;
            v.v = xp_ref_round(exact, r->op);
            v.e = r->key_e ? v.e + fabs(exact - v.v) + xp_ref_room(r->op, fabs(exact) + v.e) : 0.0;
        }
        r->key[e] = v.v;
        if (r->key_e)
            r->key_e[e] = v.e;
    }
    if (!has_groups(r))
        return;
    keep_groups(r);
    for (int64_t e = 0; e < r->E; e++) {
        const int64_t kept = r->kept[group_of(r, e)];
        if (kept == 0)
            r->key[e] = r->d->group_mask == XP_MASK_ZERO ? 0.0 : -INF;
        if (r->key_e)
            r->key_e[e] = kept < 0 ? INF : kept == 0 ? 0.0 : r->key_e[e];
    }
}

/* ---- choice ---- */

/* Where infinite logits make the keys NaN, the logits themselves decide. */
static int before(const xp_ref_routing *r, int64_t a, int64_t b) {
    if (isnan(r->l[a]) != isnan(r->l[b]))
        return isnan(r->l[b]);
    if (isnan(r->key[a]) != isnan(r->key[b]))
        return isnan(r->key[b]);
    const double *key = isnan(r->key[a]) ? r->seen : r->key;
    if (key[a] > key[b] || key[a] < key[b])
        return key[a] > key[b];
    return a < b;
}

/* The order is total, so what is left after a slot is what comes behind it. */
void xp_ref_routing_choose(const xp_ref_routing *r, int32_t *idx) {
    for (int64_t k = 0; k < r->K; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < r->E; e++) {
            if ((k == 0 || before(r, idx[k - 1], e)) && (best < 0 || before(r, e, best)))
                best = e;
        }
        idx[k] = (int32_t)best;
    }
}

/* ---- weights ---- */

/* 1: out of the margin of the largest, 0: inside, -1: roundings decide. q is on the difference and on the quotient;
 * the margin is compared in the same dtype. */
static int out_of_margin(const xp_ref_routing *r, double l, double max) {
    const double mag = fabs(l) > max ? fabs(l) : max, margin = q(r, number(r, 2.0 * r->d->sparse_eps));
    const double far = q(r, q(r, max - l) / mag), unit = xp_ref_unit(in_act(r) ? r->act : r->op);
    if (!r->score_e || !(fabs(far - margin) <= 4.0 * unit * (fabs(far) + margin)))
        return far > margin;
    return -1;
}

/* p of slot k over the experts left, into row: exp(l - max) of those inside the margin, 0 elsewhere. Returns the sum;
 * out_open: how much of it is not decided. */
static double sparse_row(const xp_ref_routing *r, const int32_t *idx, int64_t k, double *out_open) {
    double max = -INF, sum = 0.0;
    *out_open = 0.0;
    for (int64_t e = 0; e < r->E; e++) {
        if ((k == 0 || e != idx[0]) && r->seen[e] > max)
            max = r->seen[e];
    }
    for (int64_t e = 0; e < r->E; e++) {
        const int out = (k > 0 && e == idx[0]) || isnan(r->l[e]) ? 1 : out_of_margin(r, r->seen[e], max);
        r->row[e] = out == 1 ? 0.0 : xp_ref_exp(r->seen[e] - max);
        sum += r->row[e];
        *out_open += out < 0 ? r->row[e] : 0.0;
    }
    return sum;
}

static xp_ref_val sparse_weight(const xp_ref_routing *r, const int32_t *idx, int64_t k) {
    double open;
    const double sum = sparse_row(r, idx, k, &open), v = r->row[idx[k]] / sum;
    const int64_t n = xp_ref_softmax_units(r->E, r->op);
    xp_ref_val w = {v, 0.0};
    if (r->score_e)
        w.e = xp_ref_both(n, r->op) * v + xp_ref_least(r->op) +
              (open > 0.0 ? r->row[idx[k]] * (1.0 / (sum - open) - 1.0 / (sum + open)) : 0.0);
    return step(r, w);
}

static void chosen_softmax(xp_ref_routing *r, const int32_t *idx) {
    for (int64_t k = 0; k < r->K; k++)
        r->sub[k] = r->seen[idx[k]];
    xp_ref_softmax(r->sub, r->K, r->share);
    for (int64_t k = 0; k < r->K; k++)
        r->w[k] = (xp_ref_val){r->share[k], 0.0};
    if (!r->score_e)
        return;
    double most = 0.0;
    for (int64_t k = 0; k < r->K; k++)
        most = r->seen_e[idx[k]] > most ? r->seen_e[idx[k]] : most;
    xp_ref_softmax_error(r->sub, most, r->share, r->K, r->op, r->row);
    for (int64_t k = 0; k < r->K; k++)
        r->w[k].e = r->row[k];
}

static void base_weights(xp_ref_routing *r, const int32_t *idx) {
    if (r->d->score == XP_SCORE_SOFTMAX_TOPK) {
        chosen_softmax(r, idx);
        for (int64_t k = 0; k < r->K; k++)
            r->w[k] = step(r, r->w[k]);
        return;
    }
    for (int64_t k = 0; k < r->K; k++) {
        const int64_t e = idx[k];
        if (r->d->score == XP_SCORE_SPARSEMIXER) {
            r->w[k] = sparse_weight(r, idx, k);
            continue;
        }
        r->w[k] = (xp_ref_val){r->score[e], r->score_e ? r->score_e[e] : 0.0};
        if (r->d->masked_weight && has_groups(r)) {
            const int64_t kept = r->kept[group_of(r, e)];
            r->w[k] = kept == 1  ? r->w[k]
                      : kept < 0 ? (xp_ref_val){r->w[k].v, fabs(r->w[k].v) + r->w[k].e}
                                 : (xp_ref_val){0.0, 0.0};
        }
    }
}

static xp_ref_val divisor(const xp_ref_routing *r) {
    const double eps = number(r, r->d->renorm_eps);
    xp_ref_val sum = {0.0, 0.0};
    double gauge = 0.0;
    for (int64_t k = 0; k < r->K; k++) {
        sum.v += r->w[k].v;
        sum.e += r->w[k].e;
        gauge += fabs(r->w[k].v) + r->w[k].e;
    }
    sum.e += r->score_e ? xp_ref_both(r->K, r->op) * gauge : 0.0;
    sum = step(r, sum);
    if (r->d->renorm == XP_RENORM_SUM_PLUS_EPS)
        sum = step(r, xp_ref_val_add(sum, (xp_ref_val){eps, 0.0}));
    if (r->d->renorm == XP_RENORM_MAX_EPS && sum.v < eps)
        sum.v = eps;
    return sum;
}

void xp_ref_routing_weights(xp_ref_routing *r, const int32_t *idx) {
    base_weights(r, idx);
    if (r->d->renorm != XP_RENORM_NONE) {
        const xp_ref_val sum = divisor(r);
        for (int64_t k = 0; k < r->K; k++)
            r->w[k] = step(r, divide(r, r->w[k], sum));
    }
    const double scale = r->d->scale_at == XP_SCALE_WEIGHT ? number(r, r->d->scale) : 1.0;
    for (int64_t k = 0; k < r->K; k++) {
        if (scale != 1.0)
            r->w[k] = step(r, xp_ref_val_mul(r->w[k], (xp_ref_val){scale, 0.0}));
        if (r->scale_e)
            r->w[k] = step(r, xp_ref_val_mul(r->w[k], (xp_ref_val){r->scale_e[idx[k]], 0.0}));
    }
}

/* ---- backward ---- */

int xp_ref_routing_wants_logits(const xp_dialect *d) {
    return d->score == XP_SCORE_SQRT_SOFTPLUS || d->score == XP_SCORE_SPARSEMIXER || d->logit_softcap > 0.0;
}

static int is_masked(const xp_ref_routing *r, int64_t e) {
    return r->d->masked_weight && has_groups(r) && r->kept[group_of(r, e)] == 0;
}

static double factor_of(const xp_ref_routing *r, int64_t e) {
    const double scale = r->d->scale_at == XP_SCALE_WEIGHT ? number(r, r->d->scale) : 1.0;
    return scale * (r->scale_e ? r->scale_e[e] : 1.0);
}

/* What the chosen scores are divided by; *out_constant 1: it does not depend on them. */
static double back_divisor(const xp_ref_routing *r, const int32_t *idx, int *out_constant) {
    const double eps = number(r, r->d->renorm_eps);
    double sum = 0.0;
    *out_constant = r->d->renorm == XP_RENORM_NONE && r->d->score != XP_SCORE_SOFTMAX_TOPK;
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

static void sparse_back(xp_ref_routing *r, const int32_t *idx, const double *dw, int gauge, double *dl) {
    memset(dl, 0, (size_t)r->E * sizeof *dl);
    for (int64_t k = 0; k < r->K; k++) {
        double open;
        const double sum = sparse_row(r, idx, k, &open), mine = r->row[idx[k]] / sum;
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

int xp_ref_routing_back_gauge(xp_ref_routing *r, const int32_t *idx, const double *dw, double *gauge) {
    double most = 0.0, sum = 0.0;
    to_scores(r, idx, dw, 1, gauge);
    for (int64_t e = 0; e < r->E; e++) {
        most = gauge[e] > most ? gauge[e] : most;
        sum += fabs(r->score[e]) * gauge[e];
    }
    through_scores(r, idx, dw, 1, gauge);
    for (int64_t e = 0; e < r->E; e++)
        gauge[e] *= see_slope(r, e, 1);
    return most + sum <= 0.5 * xp_ref_largest(r->op);
}

/* K for the divisor, twice where it divides; w (8 units: 4 ulp), its product and the mean's K; factors and the
 * difference; the division; K slots of one expert; the product with the score's slope, or E terms of the sum over
 * experts; difference, product, slope of the cap (16: tanh and the square), addition: at most 6 K + E + 48, and what a
 * softmax of the sparsemixer's rows or a sigmoid needs. */
void xp_ref_routing_back_errors(const xp_ref_routing *r, int fits, double *gauge) {
    const int64_t again = r->d->score == XP_SCORE_SPARSEMIXER ? 2 * xp_ref_softmax_units(r->E, r->op) : 0;
    const double act = in_act(r) ? xp_ref_gamma(ACT_ROUNDINGS, r->act) : 0.0;
    for (int64_t e = 0; e < r->E; e++)
        r->row[e] = act * gauge[e];
    xp_ref_dot_errors(6 * r->K + r->E + 48 + again, r->op, r->E, gauge);
    for (int64_t e = 0; e < r->E; e++)
        gauge[e] = fits ? gauge[e] + r->row[e] : INF;
}
