/* One token's routing, from logits to weights: see routing.h.
 *
 * Everything is double between declared rounding points; q is the one of score_dtype act. Must not look at an operand
 * or know who calls. */
#include "routing.h"

#include <math.h>

#include "routing_steps.h"

#define INF ((double)INFINITY)

void xp_ref_routing_plan(xp_ref_layout *l, const xp_dialect *d, int64_t E, int64_t K, xp_dtype logits, xp_dtype act,
                         xp_dtype op, int bounds, xp_ref_routing *out) {
    const int64_t all = K + d->shared_rows;
    const size_t row = (size_t)E * sizeof(double), slots = (size_t)all * sizeof(double);
    const size_t groups = d->group_reduce != XP_GROUP_NONE && d->n_group > 0 ? (size_t)d->n_group : 0;
    *out = (xp_ref_routing){
        .d = d, .E = E, .K = all, .routed = E - d->shared_rows, .chosen = K, .logits = logits, .op = op};
    out->act = d->logits_dtype == XP_WIDE_ACT ? logits : act;
    out->l = xp_ref_take(l, row);
    out->seen = xp_ref_take(l, row);
    out->score = xp_ref_take(l, row);
    out->key = xp_ref_take(l, row);
    out->row = xp_ref_take(l, row > slots ? row : slots);
    out->sub = xp_ref_take(l, slots);
    out->share = xp_ref_take(l, slots);
    out->kept = xp_ref_take(l, groups * sizeof(int64_t));
    out->gscore = xp_ref_take(l, groups * sizeof(double));
    out->w = xp_ref_take(l, (size_t)all * sizeof(xp_ref_val));
    out->slots = d->shared_rows > 0 ? xp_ref_take(l, (size_t)all * sizeof(int32_t)) : NULL;
    if (bounds) {
        out->seen_e = xp_ref_take(l, row);
        out->score_e = xp_ref_take(l, row);
        out->score_a = xp_ref_take(l, row);
        out->key_e = xp_ref_take(l, row);
        out->gscore_e = xp_ref_take(l, groups * sizeof(double));
    }
}

/* ---- rounding points ---- */

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

/* ---- scores ---- */

/* l scaled and capped, with the error of one argument: tanh has slope 1 at most and is within 4 ulp. */
static xp_ref_val see(const xp_ref_routing *r, double l, double le) {
    const double scale = number(r, r->d->logit_scale), cap = number(r, r->d->logit_softcap);
    xp_ref_val v = {l, le};
    if (scale != 1.0 && isinf(l)) /* exact */
        v.v = l * scale;
    else if (scale != 1.0)
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
    if (r->d->score == XP_SCORE_SQRT_SOFTPLUS && seen.v == INF)
        return seen;
    if (r->d->score == XP_SCORE_SQRT_SOFTPLUS)
        return root(r, step(r, softplus(r, seen)));
    const xp_ref_rule rule = xp_ref_rule_of(r->op, r->op);
    return xp_ref_val_sigmoid(&rule, seen);
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
        if (r->score_e && !isnan(r->l[e]) && !(isinf(v) && r->score_e[e] == 0.0)) {
            const double stored = fabs(v - r->score[e]);
            r->score_e[e] = xp_ref_rule_out(&rule, (xp_ref_val){v, r->score_e[e]}) + stored;
            r->score_a[e] = xp_ref_rule_out(&rule, (xp_ref_val){v, r->score_a[e]}) + stored;
        }
    }
}

/* ---- keys ---- */

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
    const double hi = reduce(r, g, 1.0), lo = reduce(r, g, -1.0), up = hi == v ? 0.0 : hi - v;
    const double down = lo == v ? 0.0 : v - lo, e = up > down ? up : down;
    const int sum = r->d->group_reduce == XP_GROUP_TOP2SUM && !(isinf(v) && e == 0.0);
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

/* The first expert goes by score, and who may have the largest is a tie that no logit decides; a larger score has the
 * larger logit, so that all of them come before the rest. */
static void merge_first(xp_ref_routing *r) {
    double least = -INF, most = -INF, most_e = 0.0;
    for (int64_t e = 0; e < r->routed; e++) {
        least = fmax(least, r->key[e] - r->key_e[e]);
        if (r->seen[e] > most) {
            most = r->seen[e];
            most_e = r->seen_e[e];
        }
    }
    for (int64_t e = 0; e < r->routed; e++) {
        const int first = r->key[e] + r->key_e[e] >= least;
        r->key[e] = first ? most : r->seen[e];
        r->key_e[e] = first ? most_e : r->seen_e[e];
    }
}

void xp_ref_routing_keys(xp_ref_routing *r) {
    const int on_score = r->d->select_on != XP_ON_LOGIT;
    for (int64_t e = r->routed; e < r->E; e++) { /* no number: behind every expert that can be chosen */
        r->key[e] = (double)NAN;
        if (r->key_e)
            r->key_e[e] = 0.0;
    }
    for (int64_t e = 0; e < r->routed; e++) {
        xp_ref_val v = {on_score ? r->score[e] : r->seen[e], 0.0};
        if (r->key_e)
            v.e = on_score ? r->score_e[e] : r->seen_e[e];
        if (r->bias) {
            /* Beside an infinity nothing is rounded. */
            const int sure = !r->key_e || (!(isfinite(v.v) && isfinite(r->bias[e])) && isfinite(v.e));
            const double exact = v.v + r->bias[e];
            v.v = xp_ref_round(exact, r->op);
            v.e = sure ? 0.0 : v.e + fabs(exact - v.v) + xp_ref_room(r->op, fabs(exact) + v.e);
        }
        r->key[e] = v.v;
        if (r->key_e)
            r->key_e[e] = v.e;
    }
    if (r->key_e && r->d->select_on == XP_ON_FIRST_SCORE)
        merge_first(r);
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

/* NaN logits come last, whatever their keys. Where infinite logits make the keys NaN, the logits themselves decide. */
static int before(const xp_ref_routing *r, const double *keys, int64_t a, int64_t b) {
    if (isnan(r->l[a]) || isnan(r->l[b]))
        return isnan(r->l[a]) == isnan(r->l[b]) ? a < b : isnan(r->l[b]);
    if (isnan(keys[a]) != isnan(keys[b]))
        return isnan(keys[b]);
    const double *key = isnan(keys[a]) ? r->seen : keys;
    if (key[a] > key[b] || key[a] < key[b])
        return key[a] > key[b];
    return a < b;
}

/* The best of those behind `last` (-1: of all) but `without`. */
static int64_t best_behind(const xp_ref_routing *r, const double *keys, int64_t last, int64_t without) {
    int64_t best = -1;
    for (int64_t e = 0; e < r->routed; e++) {
        if (e != without && (last < 0 || before(r, keys, last, e)) && (best < 0 || before(r, keys, e, best)))
            best = e;
    }
    return best;
}

/* The order is total, so what is left after a slot is what comes behind it. */
void xp_ref_routing_choose(const xp_ref_routing *r, int32_t *idx) {
    const int apart = r->d->select_on == XP_ON_FIRST_SCORE;
    idx[0] = (int32_t)best_behind(r, r->key, -1, -1);
    for (int64_t k = 1; k < r->chosen; k++) {
        if (apart)
            idx[k] = (int32_t)best_behind(r, r->seen, k == 1 ? -1 : idx[k - 1], idx[0]);
        else
            idx[k] = (int32_t)best_behind(r, r->key, idx[k - 1], -1);
    }
}

/* ---- weights ---- */

const int32_t *xp_ref_routing_slots(const xp_ref_routing *r, const int32_t *idx) {
    if (!r->slots)
        return idx;
    for (int64_t k = 0; k < r->K; k++)
        r->slots[k] = k < r->chosen ? idx[k] : (int32_t)(r->routed + k - r->chosen);
    return r->slots;
}

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

double xp_ref_routing_sparse_row(const xp_ref_routing *r, const int32_t *idx, int64_t k, double *out_open) {
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
    const double sum = xp_ref_routing_sparse_row(r, idx, k, &open), v = r->row[idx[k]] / sum;
    const int64_t n = xp_ref_softmax_units(r->E, r->op);
    xp_ref_val w = {v, 0.0};
    if (r->score_e)
        w.e = (xp_ref_both(n, r->op) + xp_ref_expm1(2.0 * largest(r->seen_e, r->E))) * v + xp_ref_least(r->op) +
              (open > 0.0 ? r->row[idx[k]] * (1.0 / (sum - open) - 1.0 / (sum + open)) : 0.0);
    return step(r, w);
}

/* log sigmoid. */
static xp_ref_val log_score(const xp_ref_routing *r, int64_t e, double le) {
    const xp_ref_val v = softplus(r, (xp_ref_val){-r->seen[e], le});
    return (xp_ref_val){-v.v, isinf(v.v) && le == 0.0 ? 0.0 : v.e};
}

/* exp(a_k - log sum exp a_j), a_j within e_j: the logarithm of the sum moves by the largest of them. In op the sum is n
 * exponentials (8 units each, and one for a difference: x exp(-x) < 1), n additions and a logarithm of at most n (8
 * units), to which the largest a is added; then a difference and an exponential. A difference of size |a| + |log sum|
 * is off by units of that, and so is its exponential: what a quotient of scores does not have. */
static void log_share_errors(const xp_ref_routing *r, int64_t n, const xp_ref_val *a, double *e) {
    const double u = xp_ref_unit(r->op) + xp_ref_unit(XP_F64);
    double most = -INF, moved = 0.0;
    for (int64_t k = 0; k < n; k++) {
        most = a[k].v > most ? a[k].v : most;
        moved = a[k].e > moved ? a[k].e : moved;
    }
    const double sum = fabs(most) + (double)n + moved, lse = moved + xp_ref_both(9 * n + 9, r->op) + u * sum;
    for (int64_t k = 0; k < n; k++) {
        const double out = a[k].e + lse + u * (fabs(a[k].v) + a[k].e + sum + lse);
        const double far = isinf(a[k].v) && a[k].e == 0.0 ? 0.0 : xp_ref_expm1(out) * (1.0 + 8.0 * u) + 8.0 * u;
        e[k] = isinf(far) ? INF : far * r->share[k] + (far > 0.0 ? xp_ref_least(r->op) : 0.0);
    }
}

/* r->share from r->w, which holds the log scores, and the errors into e. */
static void log_shares(xp_ref_routing *r, double *e) {
    for (int64_t k = 0; k < r->K; k++)
        r->sub[k] = r->w[k].v;
    xp_ref_softmax(r->sub, r->K, r->share);
    if (e)
        log_share_errors(r, r->K, r->w, e);
}

void xp_ref_routing_log_shares(xp_ref_routing *r, const int32_t *idx, double *e) {
    for (int64_t k = 0; k < r->K; k++)
        r->w[k] = log_score(r, idx[k], 0.0);
    log_shares(r, e);
}

void xp_ref_routing_shares(xp_ref_routing *r, const int32_t *idx) {
    if (r->d->renorm == XP_RENORM_LOG_SUM) {
        for (int64_t k = 0; k < r->K; k++)
            r->w[k] = log_score(r, idx[k], r->score_e ? r->seen_e[idx[k]] : 0.0);
        log_shares(r, r->score_e ? r->row : NULL);
        for (int64_t k = 0; k < r->K; k++)
            r->w[k] = (xp_ref_val){r->share[k], r->score_e ? r->row[k] : 0.0};
        return;
    }
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
    if (has_shares(r->d)) {
        xp_ref_routing_shares(r, idx);
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

int xp_ref_routing_skips(const xp_ref_routing *r, int64_t e) {
    return r->d->null_kind == XP_NULL_SKIP && e >= r->routed - r->d->null_experts && e < r->routed;
}

void xp_ref_routing_weights(xp_ref_routing *r, const int32_t *idx) {
    base_weights(r, idx);
    if (r->d->renorm != XP_RENORM_NONE && r->d->renorm != XP_RENORM_LOG_SUM)
        divide_all(r, idx);
    const double scale = r->d->scale_at == XP_SCALE_WEIGHT ? number(r, r->d->scale) : 1.0;
    for (int64_t k = 0; k < r->K; k++) {
        if (r->d->weight_div_k)
            r->w[k] = step(r, divide(r, r->w[k], (xp_ref_val){(double)r->K, 0.0}));
        if (scale != 1.0)
            r->w[k] = step(r, xp_ref_val_mul(r->w[k], (xp_ref_val){scale, 0.0}));
        if (r->scale_e)
            r->w[k] = step(r, xp_ref_val_mul(r->w[k], (xp_ref_val){factor_at(r, idx[k]), 0.0}));
        if (xp_ref_routing_skips(r, idx[k]))
            r->w[k] = (xp_ref_val){0.0, 0.0};
    }
}
