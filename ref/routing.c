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
        out->score_a = xp_ref_take(l, row);
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
        if (r->score_e) {
            xp_ref_softmax_error(r->seen, largest(r->seen_e, r->E), r->score, r->E, r->op, r->score_e);
            xp_ref_softmax_error(r->seen, 0.0, r->score, r->E, r->op, r->score_a);
        }
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
        if (r->score_e && !isnan(r->l[e])) {
            const double stored = fabs(v - r->score[e]);
            r->score_e[e] = xp_ref_rule_out(&rule, (xp_ref_val){v, r->score_e[e]}) + stored;
            r->score_a[e] = xp_ref_rule_out(&rule, (xp_ref_val){v, r->score_a[e]}) + stored;
        }
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

/* 1: out of the margin of the largest, 0: inside, -1: roundings or the logits' errors decide. q is on the difference
 * and on the quotient; the margin is compared in the same dtype. (max - l) / mag of numbers within e of theirs moves by
 * (2 e + far e) / (mag - e). */
static int out_of_margin(const xp_ref_routing *r, double l, double max) {
    const double mag = fabs(l) > max ? fabs(l) : max, margin = q(r, number(r, 2.0 * r->d->sparse_eps));
    const double far = q(r, q(r, max - l) / mag), unit = xp_ref_unit(in_act(r) ? r->act : r->op);
    if (!r->score_e)
        return far > margin;
    const double e = largest(r->seen_e, r->E), moved = e > 0.0 ? e * (2.0 + fabs(far)) / (mag - e) : 0.0;
    if (!(e > 0.0 && e >= mag) && !(fabs(far - margin) <= 4.0 * unit * (fabs(far) + margin) + moved))
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
        w.e = (xp_ref_both(n, r->op) + xp_ref_expm1(2.0 * largest(r->seen_e, r->E))) * v + xp_ref_least(r->op) +
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

/* Bounds of s'_j / s'_i, scores of two experts as an implementation has them. Those of a softmax share their divisor,
 * so that only the two logits' errors enter, and what is left of each score's own, a (at exp(2 ve) times the score). 0:
 * s_i may vanish. */
static int ratio_bounds(const xp_ref_routing *r, int64_t i, int64_t j, double *out_lo, double *out_hi) {
    *out_lo = *out_hi = 1.0;
    if (i == j)
        return 1;
    const double si = r->score[i], sj = r->score[j];
    if (!is_softmax(r->d)) {
        *out_lo = fmax(sj - r->score_e[j], 0.0) / (si + r->score_e[i]);
        *out_hi = (sj + r->score_e[j]) / (si - r->score_e[i]);
        return si > r->score_e[i];
    }
    const double wider = xp_ref_exp(2.0 * largest(r->seen_e, r->E)), apart = xp_ref_exp(r->seen_e[i] + r->seen_e[j]);
    const double ai = r->score_a[i] * wider, aj = r->score_a[j] * wider, low = (si - ai) / wider;
    *out_lo = fmax((sj - aj) / (si + ai) / apart - aj / low, 0.0) / (1.0 + ai / low);
    *out_hi = ((sj + aj) / (si - ai) * apart + aj / low) / (1.0 - ai / low);
    return low > ai;
}

/* How far w[k] / sum moves by the errors of the scores, which divide together: 1 / (1 + sum of ratios); -1: unknown.
 * Scores in act round on their own, and are left to the rule for quotients, as are masks that are open. */
static double moved_together(const xp_ref_routing *r, const int32_t *idx, int64_t k) {
    double lo = 1.0, hi = 1.0, sum = r->w[k].v;
    if (in_act(r) || r->d->renorm == XP_RENORM_MAX_EPS || (r->d->masked_weight && has_groups(r)) || !(r->w[k].v > 0.0))
        return -1.0;
    for (int64_t j = 0; j < r->K; j++) {
        double least, most;
        if (j == k)
            continue;
        if (!ratio_bounds(r, idx[k], idx[j], &least, &most))
            return -1.0;
        sum += r->w[j].v;
        lo += least;
        hi += most;
    }
    if (r->d->renorm == XP_RENORM_SUM_PLUS_EPS) {
        const double eps = number(r, r->d->renorm_eps);
        if (!(r->w[k].v > r->w[k].e))
            return -1.0;
        sum += eps;
        lo += eps / (r->w[k].v + r->w[k].e);
        hi += eps / (r->w[k].v - r->w[k].e);
    }
    return fmax(1.0 / lo - r->w[k].v / sum, r->w[k].v / sum - 1.0 / hi) * (1.0 + 0x1p-45);
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

/* Of two errors that both hold the smaller: the quotient's, or the scores' together and then the arithmetic's, which is
 * relative to what they may have become. */
static void divide_all(xp_ref_routing *r, const int32_t *idx) {
    const xp_ref_val sum = divisor(r);
    for (int64_t k = 0; k < r->K && r->score_e; k++)
        r->sub[k] = moved_together(r, idx, k);
    for (int64_t k = 0; k < r->K; k++)
        r->share[k] = r->w[k].v;
    for (int64_t k = 0; k < r->K; k++)
        r->w[k] = divide(r, r->w[k], sum);
    if (r->score_e) {
        xp_ref_val exact = {sum.v, 0.0};
        exact.e = xp_ref_both(r->K, r->op) * fabs(sum.v) + 2.0 * xp_ref_room(r->op, fabs(sum.v));
        for (int64_t k = 0; k < r->K; k++) {
            const double by = r->sub[k];
            const xp_ref_val own = divide(r, (xp_ref_val){r->share[k], 0.0}, exact);
            if (by >= 0.0 && own.v > 0.0)
                r->w[k].e = fmin(r->w[k].e, by + (1.0 + by / own.v) * own.e);
        }
    }
    for (int64_t k = 0; k < r->K; k++)
        r->w[k] = step(r, r->w[k]);
}

void xp_ref_routing_weights(xp_ref_routing *r, const int32_t *idx) {
    base_weights(r, idx);
    if (r->d->renorm != XP_RENORM_NONE)
        divide_all(r, idx);
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
    return d->score == XP_SCORE_SQRT_SOFTPLUS || d->score == XP_SCORE_SPARSEMIXER ||
           d->score == XP_SCORE_SOFTMAX_TOPK || d->logit_softcap > 0.0;
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
    *out_constant = r->d->renorm == XP_RENORM_NONE;
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
    return in_act(r) || r->d->weight_dtype == XP_WIDE_ACT;
}

/* softmax over the chosen logits, p_k: dl_k = p_k (dw_k - sum_j dw_j p_j). */
static void topk_back(xp_ref_routing *r, const int32_t *idx, const double *dw, int gauge, double *dl) {
    double mean = 0.0;
    for (int64_t k = 0; k < r->K; k++)
        r->sub[k] = r->seen[idx[k]];
    xp_ref_softmax(r->sub, r->K, r->share);
    if (shares_in_act(r))
        xp_ref_round_row(r->act, r->K, r->share);
    for (int64_t k = 0; k < r->K; k++) {
        const double u = dw[k] * factor_of(r, idx[k]);
        mean += (gauge ? fabs(u) : u) * r->share[k];
    }
    memset(dl, 0, (size_t)r->E * sizeof *dl);
    for (int64_t k = 0; k < r->K; k++) {
        const double u = dw[k] * factor_of(r, idx[k]);
        dl[idx[k]] += r->share[k] * (gauge ? fabs(u) + mean : u - mean);
    }
}

/* What shares that lie one rounding apart move dl by, if both sides round, or one does. */
static void topk_moved(const xp_ref_routing *r, const int32_t *idx, const double *dw, double *e) {
    double mean = 0.0, moved = 0.0;
    for (int64_t k = 0; k < r->K; k++) {
        const double u = fabs(dw[k] * factor_of(r, idx[k]));
        mean += u * r->share[k];
        moved += u * 2.0 * xp_ref_room(r->act, r->share[k]);
    }
    for (int64_t k = 0; k < r->K && shares_in_act(r); k++) {
        const double u = fabs(dw[k] * factor_of(r, idx[k])), room = 2.0 * xp_ref_room(r->act, r->share[k]);
        e[idx[k]] += room * (u + mean + moved) + r->share[k] * moved;
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
    if (r->d->score == XP_SCORE_SOFTMAX_TOPK) {
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
 * to it, through the gauge; and a floor for each of the K + 4 roundings before the division and of those behind it. */
static double act_floor(const xp_ref_routing *r, const int32_t *idx, int64_t e, double gauge) {
    int constant;
    const double D = fabs(back_divisor(r, idx, &constant)), h = xp_ref_half_ulp_err(r->act, 0.0);
    const double off = constant ? 0.0 : 2.0 * xp_ref_room(r->act, D) / D;
    const int own = r->d->score == XP_SCORE_SIGMOID || r->d->score == XP_SCORE_SQRT_SOFTPLUS;
    const double slope = own && r->score[e] > 0.0 ? fabs(score_slope(r, e)) : 1.0;
    if (off >= 1.0)
        return (double)NAN;
    return 2.0 * off * (1.0 + off) * gauge + h * ((double)(r->K + 4) * slope / D + 4.0);
}

int xp_ref_routing_back_gauge(xp_ref_routing *r, const int32_t *idx, const double *dw, double *gauge) {
    const double act = in_act(r) ? xp_ref_gamma(ACT_ROUNDINGS, r->act) : 0.0;
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
    for (int64_t e = 0; e < r->E; e++) {
        gauge[e] *= see_slope(r, e, 1);
        r->row[e] *= see_slope(r, e, 1);
    }
    return most + sum <= 0.5 * xp_ref_largest(r->op);
}

/* K for the divisor, twice where it divides; w (8 units: 4 ulp), its product and the mean's K; factors and the
 * difference; the division; K slots of one expert; the product with the score's slope, or E terms of the sum over
 * experts; difference, product, slope of the cap (16: tanh and the square), addition: at most 6 K + E + 48, and what a
 * softmax of the sparsemixer's rows or a sigmoid needs. */
void xp_ref_routing_back_errors(const xp_ref_routing *r, int fits, double *gauge) {
    const int own = r->d->score == XP_SCORE_SPARSEMIXER || r->d->score == XP_SCORE_SOFTMAX_TOPK;
    const int64_t again = own ? 2 * xp_ref_softmax_units(r->E, r->op) : 0;
    xp_ref_dot_errors(6 * r->K + r->E + 48 + again, r->op, r->E, gauge);
    for (int64_t e = 0; e < r->E; e++)
        gauge[e] = fits || isnan(r->row[e]) ? gauge[e] + r->row[e] : INF;
}

/* ---- backward, with errors on entry ---- */

/* An operation's result: rounded in op, and to the logits' dtype where an implementation of score_dtype act may. The
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
    return (xp_ref_val){f, xp_ref_unit(r->op) * fabs(f)};
}

static xp_ref_val divisor_val(const xp_ref_routing *r, const int32_t *idx, int *out_constant) {
    const double eps = number(r, r->d->renorm_eps);
    xp_ref_val sum = {0.0, 0.0};
    *out_constant = r->d->renorm == XP_RENORM_NONE;
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

/* The shares with their errors, as the forward has them. */
static void topk_vals(xp_ref_routing *r, const int32_t *idx, const xp_ref_val *dw, xp_ref_val *dl) {
    xp_ref_val mean = {0.0, 0.0};
    chosen_softmax(r, idx);
    for (int64_t k = 0; k < r->K; k++) {
        if (shares_in_act(r))
            r->w[k] = xp_ref_val_round(r->w[k], r->act, r->op);
        mean = done(r, xp_ref_val_add(mean, times(r, times(r, dw[k], factor_val(r, idx[k])), r->w[k])));
    }
    for (int64_t e = 0; e < r->E; e++)
        dl[e] = (xp_ref_val){0.0, 0.0};
    for (int64_t k = 0; k < r->K; k++) {
        const xp_ref_val u = minus(r, times(r, dw[k], factor_val(r, idx[k])), mean);
        dl[idx[k]] = done(r, xp_ref_val_add(dl[idx[k]], times(r, r->w[k], u)));
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
        const double sum = sparse_row(r, idx, k, &open), least = xp_ref_least(r->op);
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
    } else if (r->d->score == XP_SCORE_SOFTMAX_TOPK) {
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
