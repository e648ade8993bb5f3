/* Second formulation of stages route, route_bwd and route_scale_bwd: an expert's place is the number of experts that
 * beat it; the gradient goes through whole Jacobian matrices, slots x slots for the division and slots x experts for
 * the scores. */
#include <math.h>
#include <string.h>

#include "dense.h"
#include "num.h"
#include "scores.h"

static const char *why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_route_why_not(((const xp_route_args *)args)->dialect);
}

/* One token. exact: before a value's last rounding, which is what an F64 output takes. */
typedef struct {
    double *l, *s, *exact_s, *key, *kept, *p; /* [Z] */
    double *w, *exact_w, *slot;               /* [K] */
    xp_dtype q;
} token;

static size_t token_ws(int64_t z_n, int64_t k_n) {
    return 6 * xp_dense_room(z_n, sizeof(double)) + 3 * xp_dense_room(k_n, sizeof(double));
}

static token token_carve(int64_t z_n, int64_t k_n, char *ws) {
    token r;
    double **const wide[6] = {&r.l, &r.s, &r.exact_s, &r.key, &r.kept, &r.p};
    double **const narrow[3] = {&r.w, &r.exact_w, &r.slot};
    for (int i = 0; i < 6; i++)
        *wide[i] = xp_dense_carve(&ws, z_n, sizeof(double));
    for (int i = 0; i < 3; i++)
        *narrow[i] = xp_dense_carve(&ws, k_n, sizeof(double));
    r.q = XP_F64;
    return r;
}

static int64_t chosen(const xp_tensor *idx, int64_t t, int64_t k) {
    return xp_dense_int(idx, xp_dense_at(idx, t, k, 0, 0));
}

/* The row of the router that slot k of a token is: behind the choice come the shared experts. */
static int64_t row_of(const xp_dialect *d, const xp_tensor *idx, int64_t z_n, int64_t t, int64_t k) {
    return k < idx->dim[1] ? chosen(idx, t, k) : z_n - d->shared_rows + k - idx->dim[1];
}

static int64_t slots_of(const xp_dialect *d, const xp_tensor *idx) {
    return idx->dim[1] + d->shared_rows;
}

static double scale_of(const xp_tensor *scale_e, int64_t e) {
    return xp_dense_get(scale_e, xp_dense_at(scale_e, scale_e->dim[0] == 1 ? 0 : e, 0, 0, 0));
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_args *a = args;
    return token_ws(a->logits.dim[1], slots_of(a->dialect, &a->idx));
}

/* ---- choice ---- */

/* 1: expert i comes before expert j. A NaN logit comes last, before it keys that are no numbers, those by logit. */
static int beats(const double *l, const double *key, int64_t i, int64_t j) {
    if (isnan(l[i]) || isnan(l[j]))
        return isnan(l[i]) == isnan(l[j]) ? i < j : isnan(l[j]);
    if (isnan(key[i]) != isnan(key[j]))
        return isnan(key[j]);
    const double a = isnan(key[i]) ? l[i] : key[i], b = isnan(key[j]) ? l[j] : key[j];
    return a > b || (a == b && i < j);
}

/* With first_score the expert that none beats by score has its place; the logits order the others behind it. */
static void choose(const xp_route_args *a, int64_t t, const token *r) {
    const int64_t z_n = a->logits.dim[1] - a->dialect->shared_rows, k_n = a->idx.dim[1];
    const int first_apart = a->dialect->select_on == XP_ON_FIRST_SCORE;
    const double *key = a->dialect->score == XP_SCORE_SPARSEMIXER ? r->l : r->key;
    int64_t first = -1;
    for (int64_t e = 0; e < z_n && first_apart; e++) {
        int64_t better = 0;
        for (int64_t i = 0; i < z_n; i++)
            better += i != e && beats(r->l, key, i, e);
        first = better == 0 ? e : first;
    }
    for (int64_t e = 0; e < z_n; e++) {
        int64_t place = first_apart && e != first;
        for (int64_t i = 0; i < z_n && e != first; i++)
            place += i != e && i != first && beats(r->l, first_apart ? r->l : key, i, e);
        if (place < k_n)
            xp_dense_put_int(&a->idx, xp_dense_at(&a->idx, t, place, 0, 0), e);
    }
}

static void look_up(const xp_route_args *a, int64_t t) {
    const int64_t id = xp_dense_int(&a->token, xp_dense_at(&a->token, t, 0, 0, 0));
    for (int64_t k = 0; k < a->idx.dim[1]; k++)
        xp_dense_put_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0), chosen(&a->table, id, k));
}

/* ---- weights ---- */

static void put_step(const token *r, int64_t k, double v) {
    r->exact_w[k] = v;
    r->w[k] = xp_dense_round(r->q, v);
}

/* Weights before they are divided. */
static void first_weights(const xp_route_args *a, int64_t t, const token *r) {
    const xp_dialect *d = a->dialect;
    const int64_t z_n = a->logits.dim[1], k_n = slots_of(d, &a->idx);
    for (int64_t k = 0; k < k_n && xp_dense_shares(d); k++)
        r->w[k] = xp_dense_share_base(d, r->l[row_of(d, &a->idx, z_n, t, k)]);
    if (xp_dense_shares(d))
        xp_dense_share_out(r->w, k_n, r->slot);
    double *gone = r->key; /* the choice has been made */
    memset(gone, 0, (size_t)z_n * sizeof *gone);
    for (int64_t k = 0; k < k_n; k++) {
        const int64_t e = row_of(d, &a->idx, z_n, t, k);
        double v = r->exact_s[e];
        if (xp_dense_shares(d)) {
            v = r->slot[k];
        } else if (d->score == XP_SCORE_SPARSEMIXER) {
            xp_dense_sparse(d, r->q, r->l, gone, z_n, r->p);
            v = r->p[e];
            gone[e] = 1;
        } else if (d->masked_weight && r->kept[e] == 0) {
            v = 0;
        }
        put_step(r, k, v);
    }
}

/* 1: slot k's id is one of those behind the experts, and they add nothing. */
static int adds_nothing(const xp_dialect *d, const xp_tensor *idx, int64_t z_n, int64_t t, int64_t k) {
    return d->null_kind == XP_NULL_SKIP && d->null_experts > 0 && k < idx->dim[1] &&
           chosen(idx, t, k) + d->null_experts + d->shared_rows >= z_n;
}

/* Weights before the factors of their experts. */
static void divided_weights(const xp_route_args *a, int64_t t, const token *r) {
    const xp_dialect *d = a->dialect;
    const int64_t k_n = slots_of(d, &a->idx);
    first_weights(a, t, r);
    double sum = 0;
    for (int64_t k = 0; k < k_n; k++)
        sum += r->w[k];
    for (int64_t k = 0; k < k_n; k++) {
        if (d->renorm != XP_RENORM_NONE)
            put_step(r, k, r->w[k] / xp_dense_divisor(d, r->q, sum));
        if (d->weight_div_k)
            put_step(r, k, r->w[k] / (double)k_n);
        if (d->scale_at == XP_SCALE_WEIGHT && d->scale != 1)
            put_step(r, k, r->w[k] * d->scale);
        if (adds_nothing(d, &a->idx, a->logits.dim[1], t, k))
            put_step(r, k, 0);
    }
}

static void weigh(const xp_route_args *a, int64_t t, const token *r) {
    const xp_dialect *d = a->dialect;
    const int64_t k_n = a->idx.dim[1], z_n = a->logits.dim[1];
    divided_weights(a, t, r);
    for (int64_t k = 0; k < slots_of(d, &a->idx) && d->expert_scale; k++)
        put_step(r, k, r->w[k] * scale_of(&a->scale_e, row_of(d, &a->idx, z_n, t, k)));
    xp_dense_write(&a->w, xp_dense_at(&a->w, t, 0, 0, 0), k_n, a->w.dtype == XP_F64 ? r->exact_w : r->w);
    if (a->gamma.data)
        xp_dense_write(&a->gamma, xp_dense_at(&a->gamma, t, 0, 0, 0), d->shared_rows,
                       (a->gamma.dtype == XP_F64 ? r->exact_w : r->w) + k_n);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_route_args *a = args;
    const xp_dialect *d = a->dialect;
    const int64_t z_n = a->logits.dim[1];
    token r = token_carve(z_n, slots_of(d, &a->idx), x->ws);
    r.q = xp_dense_step(d, a->logits.dtype, a->act);
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        xp_dense_read(&a->logits, xp_dense_at(&a->logits, t, 0, 0, 0), z_n, r.l);
        xp_dense_logits(d, z_n, r.l);
        xp_dense_scores(d, r.q, r.l, z_n, r.exact_s);
        memcpy(r.s, r.exact_s, (size_t)z_n * sizeof *r.s);
        xp_dense_round_all(r.q, z_n, r.s);
        xp_dense_keys(d, r.l, r.s, &a->bias, z_n, r.p, r.key, r.kept);
        if (!a->replay && d->select_on == XP_ON_TOKEN_TABLE)
            look_up(a, t);
        else if (!a->replay)
            choose(a, t, &r);
        weigh(a, t, &r);
        xp_dense_write(&a->scores, xp_dense_at(&a->scores, t, 0, 0, 0), z_n,
                       a->scores.dtype == XP_F64 ? r.exact_s : r.s);
    }
    return XP_OK;
}

/* ---- gradient ---- */

static const char *bwd_why_not(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_bwd_args *a = args;
    const char *why = xp_dense_route_why_not(a->dialect);
    if (why || a->logits.data)
        return why;
    const xp_dialect *d = a->dialect;
    return d->score == XP_SCORE_SQRT_SOFTPLUS || d->score == XP_SCORE_SPARSEMIXER || xp_dense_shares(d) ||
                   d->logit_softcap > 0 ||
                   (d->masked_weight && d->group_reduce != XP_GROUP_NONE && d->select_on == XP_ON_LOGIT)
               ? "not without the logits"
               : NULL;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_bwd_args *a = args;
    const int64_t z_n = a->scores.dim[1], k_n = slots_of(a->dialect, &a->idx);
    return token_ws(z_n, k_n) + xp_dense_room(k_n * z_n, sizeof(double));
}

/* A weight before it is divided depends on its own logit alone. */
static int pointwise(const xp_dialect *d) {
    return !xp_dense_shares(d) && (d->score == XP_SCORE_SIGMOID || d->score == XP_SCORE_SQRT_SOFTPLUS);
}

/* v [K], weights before they are divided, into r->w; J [K,Z] = dv / dl, or what v is multiplied by for that unless a
 * weight depends on its own logit alone: two small numbers that are multiplied first lose bits that a large gradient
 * shows. r->key counts the experts that are gone. */
static void slots_by_logits(const xp_route_bwd_args *a, int64_t t, const token *r, double *j) {
    const xp_dialect *d = a->dialect;
    const int64_t z_n = a->scores.dim[1], k_n = slots_of(d, &a->idx);
    memset(r->key, 0, (size_t)z_n * sizeof *r->key);
    memset(r->p, 0, (size_t)z_n * sizeof *r->p);
    if (xp_dense_shares(d)) {
        for (int64_t k = 0; k < k_n; k++)
            r->slot[k] = xp_dense_share_base(d, r->l[row_of(d, &a->idx, z_n, t, k)]);
        xp_dense_share_out(r->slot, k_n, r->w);
        if (d->score == XP_SCORE_SOFTMAX_TOPK && (d->weight_dtype == XP_WIDE_ACT || d->score_dtype == XP_WIDE_ACT))
            xp_dense_round_all(a->logits.dtype, k_n, r->w);
        for (int64_t k = 0; k < k_n; k++)
            r->p[row_of(d, &a->idx, z_n, t, k)] += r->w[k];
    }
    for (int64_t k = 0; k < k_n; k++) {
        const int64_t e = row_of(d, &a->idx, z_n, t, k);
        const double part = d->masked_weight ? r->kept[e] : 1;
        const double *p = d->score == XP_SCORE_SOFTMAX ? r->s : r->p; /* of dv / dl = v (delta - p) */
        if (!xp_dense_shares(d))
            r->w[k] = part * r->s[e];
        if (d->score == XP_SCORE_SPARSEMIXER) {
            xp_dense_sparse(d, r->q, r->l, r->key, z_n, r->p);
            r->w[k] = r->p[e];
            r->key[e] = 1;
        }
        for (int64_t z = 0; z < z_n; z++) {
            const double same = z == e;
            if (pointwise(d))
                j[k * z_n + z] = z == e ? part * xp_dense_score_slope(d, r->l[z], r->s[z]) : 0;
            else
                j[k * z_n + z] = (same - p[z]) * xp_dense_share_slope(d, r->l[z]);
        }
    }
}

/* Through w[m] = f[m] v[m] / D(sum v): the slots' dw becomes dv, in r->slot. */
static void through_division(const xp_route_bwd_args *a, int64_t t, const token *r, const double *dw) {
    const xp_dialect *d = a->dialect;
    const int64_t k_n = slots_of(d, &a->idx), z_n = a->scores.dim[1];
    double sum = 0;
    for (int64_t k = 0; k < k_n; k++)
        sum += r->w[k];
    const double by = xp_dense_divisor(d, r->q, sum), slope = xp_dense_divisor_slope(d, sum);
    memset(r->slot, 0, (size_t)k_n * sizeof *r->slot);
    for (int64_t m = 0; m < k_n; m++) {
        double f = xp_dialect_weight_factor(d, k_n);
        f *= d->expert_scale ? scale_of(&a->scale_e, row_of(d, &a->idx, z_n, t, m)) : 1;
        for (int64_t k = 0; k < k_n; k++) {
            if (k == m || slope != 0) /* without a division a weight is its own slot's alone */
                r->slot[k] += dw[m] * (f * (((k == m) - slope * (r->w[m] / by)) / by));
        }
    }
}

/* 1: slot k's weight depends on logit z. An infinity times a zero that nothing led to is not a gradient. */
static int depends(const xp_route_bwd_args *a, int64_t t, int64_t k, int64_t z) {
    const xp_dialect *d = a->dialect;
    const int among = xp_dense_shares(d);
    int found = !among && !pointwise(d);
    for (int64_t i = among ? 0 : k; i < (among ? slots_of(d, &a->idx) : k + 1); i++)
        found |= row_of(d, &a->idx, a->scores.dim[1], t, i) == z;
    return found;
}

static void token_gradient(const xp_route_bwd_args *a, int64_t t, const token *r, double *j) {
    const xp_dialect *d = a->dialect;
    const int64_t z_n = a->scores.dim[1], k_n = slots_of(d, &a->idx);
    xp_dense_read(&a->scores, xp_dense_at(&a->scores, t, 0, 0, 0), z_n, r->s);
    memset(r->l, 0, (size_t)z_n * sizeof *r->l);
    if (a->logits.data)
        xp_dense_read(&a->logits, xp_dense_at(&a->logits, t, 0, 0, 0), z_n, r->l);
    memcpy(r->exact_s, r->l, (size_t)z_n * sizeof *r->l); /* raw logits */
    xp_dense_logits(d, z_n, r->l);
    xp_dense_keys(d, r->l, r->s, &a->bias, z_n, r->p, r->key, r->kept);
    slots_by_logits(a, t, r, j);
    xp_dense_read(&a->dw, xp_dense_at(&a->dw, t, 0, 0, 0), a->idx.dim[1], r->exact_w);
    for (int64_t k = 0; k < a->idx.dim[1]; k++)
        r->exact_w[k] = adds_nothing(d, &a->idx, z_n, t, k) ? 0 : r->exact_w[k];
    if (a->dgamma.data)
        xp_dense_read(&a->dgamma, xp_dense_at(&a->dgamma, t, 0, 0, 0), d->shared_rows, r->exact_w + a->idx.dim[1]);
    through_division(a, t, r, r->exact_w);
    for (int64_t z = 0; z < z_n; z++) {
        double g = 0;
        for (int64_t k = 0; k < k_n; k++) {
            if (depends(a, t, k, z))
                g += (pointwise(d) ? r->slot[k] : r->slot[k] * r->w[k]) * j[k * z_n + z];
        }
        r->p[z] = g == 0 ? 0 : g * xp_dense_logit_slope(d, r->exact_s[z]);
        if (a->daux.data)
            r->p[z] += xp_dense_get(&a->daux, xp_dense_at(&a->daux, t, z, 0, 0));
    }
    xp_dense_write(&a->dlogits, xp_dense_at(&a->dlogits, t, 0, 0, 0), z_n, r->p);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_route_bwd_args *a = args;
    const int64_t z_n = a->scores.dim[1], k_n = slots_of(a->dialect, &a->idx);
    char *ws = x->ws;
    double *j = xp_dense_carve(&ws, k_n * z_n, sizeof *j);
    token r = token_carve(z_n, k_n, ws);
    r.q = xp_dense_step(a->dialect, a->logits.data ? a->logits.dtype : XP_F64, a->act);
    for (int64_t t = 0; t < a->scores.dim[0]; t++)
        token_gradient(a, t, &r, j);
    return XP_OK;
}

/* ---- gradient of the factors ---- */

static const char *scale_why_not(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_scale_bwd_args *a = args;
    const xp_dialect *d = a->dialect;
    const char *why = xp_dense_route_why_not(d);
    if (why || a->logits.data)
        return why;
    return d->score == XP_SCORE_SPARSEMIXER || xp_dense_shares(d) || d->score_dtype == XP_WIDE_ACT ||
                   (d->masked_weight && d->group_reduce != XP_GROUP_NONE && d->select_on == XP_ON_LOGIT)
               ? "not without the logits"
               : NULL;
}

static size_t scale_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_scale_bwd_args *a = args;
    const int64_t k_n = slots_of(a->dialect, &a->idx);
    return token_ws(a->scores.dim[1], k_n) + xp_dense_room(a->scores.dim[1], sizeof(double)) +
           xp_dense_room(k_n, sizeof(double));
}

/* Expert by expert: the tokens of the block that chose it. */
static xp_status scale_run(const xp_exec *x, const void *args) {
    const xp_route_scale_bwd_args *a = args;
    const xp_dialect *d = a->dialect;
    const int64_t z_n = a->scores.dim[1], k_n = slots_of(d, &a->idx), one = d->expert_scale == XP_FACTOR_ONE;
    const xp_route_args forward = {.logits = a->scores, .idx = a->idx, .dialect = d, .act = a->act};
    char *ws = x->ws;
    double *sum = xp_dense_carve(&ws, z_n, sizeof *sum), *dw = xp_dense_carve(&ws, k_n, sizeof *dw);
    token r = token_carve(z_n, k_n, ws);
    r.q = xp_dense_step(d, a->logits.data ? a->logits.dtype : XP_F64, a->act);
    for (int64_t b = 0; b < a->dscale.dim[0]; b++) {
        memset(sum, 0, (size_t)z_n * sizeof *sum);
        for (int64_t t = 0; t < a->scores.dim[0]; t++) {
            if (xp_dense_slot(a->token0, t, a->block) != b)
                continue;
            memset(r.l, 0, (size_t)z_n * sizeof *r.l);
            if (a->logits.data)
                xp_dense_read(&a->logits, xp_dense_at(&a->logits, t, 0, 0, 0), z_n, r.l);
            xp_dense_logits(d, z_n, r.l);
            xp_dense_read(&a->scores, xp_dense_at(&a->scores, t, 0, 0, 0), z_n, r.s);
            memcpy(r.exact_s, r.s, (size_t)z_n * sizeof *r.s);
            xp_dense_keys(d, r.l, r.s, &a->bias, z_n, r.p, r.key, r.kept);
            divided_weights(&forward, t, &r);
            xp_dense_read(&a->dw, xp_dense_at(&a->dw, t, 0, 0, 0), a->idx.dim[1], dw);
            if (a->dgamma.data)
                xp_dense_read(&a->dgamma, xp_dense_at(&a->dgamma, t, 0, 0, 0), d->shared_rows, dw + a->idx.dim[1]);
            for (int64_t k = 0; k < k_n; k++)
                sum[one ? 0 : row_of(d, &a->idx, z_n, t, k)] += r.w[k] * dw[k];
        }
        xp_dense_write(&a->dscale, xp_dense_at(&a->dscale, b, 0, 0, 0), a->dscale.dim[1], sum);
    }
    return XP_OK;
}

const xp_kernel xp_dense_route = {
    .stage = &xp_stage_route,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .why_not = why_not,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_route_bwd = {
    .stage = &xp_stage_route_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .why_not = bwd_why_not,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
const xp_kernel xp_dense_route_scale_bwd = {
    .stage = &xp_stage_route_scale_bwd,
    .name = "dense",
    .det = XP_DET_RUN,
    .why_not = scale_why_not,
    .workspace = scale_workspace,
    .run = scale_run,
};
