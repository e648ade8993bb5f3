/* xp_dense scores: see scores.h. Softmax and sigmoid come from the same few functions of num.c; places are counted, no
 * list is ever sorted. */
#include "scores.h"

#include <math.h>

#include "num.h"

xp_dtype xp_dense_step(const xp_dialect *d, xp_dtype logits, xp_dtype act) {
    if (d->score_dtype != XP_WIDE_ACT)
        return XP_F64;
    return d->logits_dtype == XP_WIDE_ACT ? logits : act;
}

void xp_dense_logits(const xp_dialect *d, int64_t z_n, double *l) {
    for (int64_t z = 0; z < z_n; z++) {
        l[z] *= d->logit_scale;
        if (d->logit_softcap > 0)
            l[z] = d->logit_softcap * tanh(l[z] / d->logit_softcap);
    }
}

/* 1 - tanh(x)^2 = 4 sigmoid(2x) sigmoid(-2x). */
double xp_dense_logit_slope(const xp_dialect *d, double raw) {
    if (!(d->logit_softcap > 0))
        return d->logit_scale;
    const double twice = 2 * (d->logit_scale * raw / d->logit_softcap);
    return d->logit_scale * (4 * xp_dense_sigmoid(twice) * xp_dense_sigmoid(-twice));
}

void xp_dense_share_out(const double *l, int64_t n, double *p) {
    int numbers = 0;
    for (int64_t i = 0; i < n; i++) {
        numbers |= !isnan(l[i]);
        p[i] = isnan(l[i]) ? -HUGE_VAL : l[i];
    }
    xp_dense_softmax(p, n, p);
    for (int64_t i = 0; i < n; i++) {
        if (isnan(l[i]))
            p[i] = numbers ? 0 : (double)NAN;
    }
}

static double softplus(double l) {
    return log1p(exp(-fabs(l))) + (l > 0 ? l : 0);
}

void xp_dense_scores(const xp_dialect *d, xp_dtype q, const double *l, int64_t z_n, double *exact) {
    if (d->score != XP_SCORE_SIGMOID && d->score != XP_SCORE_SQRT_SOFTPLUS) {
        xp_dense_share_out(l, z_n, exact);
        return;
    }
    int numbers = 0;
    for (int64_t z = 0; z < z_n; z++)
        numbers |= !isnan(l[z]);
    for (int64_t z = 0; z < z_n; z++) {
        if (isnan(l[z]))
            exact[z] = numbers ? 0 : (double)NAN;
        else
            exact[z] = d->score == XP_SCORE_SIGMOID ? xp_dense_sigmoid(l[z]) : sqrt(xp_dense_round(q, softplus(l[z])));
    }
}

/* s = sqrt(softplus(l)) vanishes as exp(l/2), and so does its slope. */
double xp_dense_score_slope(const xp_dialect *d, double l, double s) {
    if (d->score == XP_SCORE_SIGMOID)
        return s * (1 - s);
    return s == 0 ? 0 : xp_dense_sigmoid(l) / (2 * s);
}

/* Out where (m - l) / max(|l|, m) > 2 eps: a quotient 0 / 0 is no number, and in. */
void xp_dense_sparse(const xp_dialect *d, xp_dtype q, const double *l, const double *gone, int64_t z_n, double *p) {
    const double margin = xp_dense_round(q, 2 * d->sparse_eps);
    double m = -HUGE_VAL;
    for (int64_t z = 0; z < z_n; z++)
        m = gone[z] == 0 && l[z] > m ? l[z] : m;
    for (int64_t z = 0; z < z_n; z++) {
        const double size = fabs(l[z]) > m ? fabs(l[z]) : m;
        const int out = xp_dense_round(q, xp_dense_round(q, m - l[z]) / size) > margin;
        p[z] = gone[z] != 0 || out || isnan(l[z]) ? -HUGE_VAL : l[z];
    }
    xp_dense_softmax(p, z_n, p);
}

/* How many of v[lo, hi) come before v[at]: larger, or equal and further left; what is no number comes last. */
static int64_t place_of(const double *v, int64_t lo, int64_t hi, int64_t at) {
    int64_t place = 0;
    for (int64_t i = lo; i < hi; i++) {
        if (isnan(v[i]) || isnan(v[at]))
            place += isnan(v[i]) == isnan(v[at]) ? i < at : isnan(v[at]);
        else
            place += v[i] > v[at] || (v[i] == v[at] && i < at);
    }
    return place;
}

/* Sum of the n first of key[lo, hi). */
static double sum_of_first(const double *key, int64_t lo, int64_t hi, int64_t n) {
    double sum = 0;
    for (int64_t z = lo; z < hi; z++)
        sum += place_of(key, lo, hi, z) < n ? key[z] : 0;
    return sum;
}

static void keep_groups(const xp_dialect *d, const double *key, int64_t z_n, double *group, double *kept) {
    const int64_t size = z_n / d->n_group;
    for (int64_t g = 0; g < d->n_group; g++)
        group[g] = sum_of_first(key, g * size, (g + 1) * size, d->group_reduce == XP_GROUP_MAX ? 1 : 2);
    for (int64_t z = 0; z < size * d->n_group; z++)
        kept[z] = place_of(group, 0, d->n_group, z / size) < d->topk_group;
}

void xp_dense_keys(const xp_dialect *d, const double *l, const double *s, const xp_tensor *bias, int64_t z_n,
                   double *group, double *key, double *kept) {
    for (int64_t z = 0; z < z_n; z++) {
        key[z] = d->select_on == XP_ON_LOGIT ? l[z] : s[z];
        if (d->select_bias && bias && bias->data)
            key[z] += xp_dense_get(bias, xp_dense_at(bias, z, 0, 0, 0));
        if (isnan(l[z]) && d->select_on == XP_ON_LOGIT)
            key[z] = -HUGE_VAL; /* of a score it is the score of 0 */
        kept[z] = 1;
    }
    if (d->group_reduce == XP_GROUP_NONE)
        return;
    keep_groups(d, key, z_n, group, kept);
    for (int64_t z = 0; z < z_n; z++) {
        if (kept[z] == 0)
            key[z] = d->group_mask == XP_MASK_ZERO ? 0 : -HUGE_VAL;
    }
}

int xp_dense_shares(const xp_dialect *d) {
    return d->score == XP_SCORE_SOFTMAX_TOPK || d->renorm == XP_RENORM_LOG_SUM;
}

double xp_dense_share_base(const xp_dialect *d, double l) {
    return d->renorm == XP_RENORM_LOG_SUM ? -softplus(-l) : l;
}

double xp_dense_share_slope(const xp_dialect *d, double l) {
    return d->renorm == XP_RENORM_LOG_SUM && !isnan(l) ? xp_dense_sigmoid(-l) : 1; /* a NaN has no share to move */
}

double xp_dense_divisor(const xp_dialect *d, xp_dtype q, double sum) {
    const double s = xp_dense_round(q, sum);
    switch (d->renorm) {
    case XP_RENORM_SUM:
        return s;
    case XP_RENORM_SUM_PLUS_EPS:
        return xp_dense_round(q, s + d->renorm_eps);
    case XP_RENORM_MAX_EPS:
        return s < d->renorm_eps ? d->renorm_eps : s;
    default:
        return 1;
    }
}

double xp_dense_divisor_slope(const xp_dialect *d, double sum) {
    return d->renorm == XP_RENORM_SUM || d->renorm == XP_RENORM_SUM_PLUS_EPS ||
           (d->renorm == XP_RENORM_MAX_EPS && sum >= d->renorm_eps);
}
