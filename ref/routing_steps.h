/* What the two halves of routing share: small rules of the record, one step's arithmetic with errors, and the two rows
 * of numbers that forward and backward make alike. Nobody but routing.c and routing_back.c includes it. */
#ifndef XP_REF_ROUTING_STEPS_H
#define XP_REF_ROUTING_STEPS_H

#include <math.h>

#include "routing.h"
#include "token.h"

static inline int in_act(const xp_ref_routing *r) {
    return r->d->score_dtype == XP_WIDE_ACT;
}

/* Numbers of the record are f32 in an f32 implementation. */
static inline double number(const xp_ref_routing *r, double v) {
    return r->op == XP_F64 ? v : (double)(float)v;
}

/* b stays away from 0, or nothing is known. Division within 4 ulp of op, or within its smallest normal number. */
static inline xp_ref_val divide(const xp_ref_routing *r, xp_ref_val a, xp_ref_val b) {
    const double v = a.v / b.v, u = xp_ref_unit(r->op) + xp_ref_unit(XP_F64);
    if (!(b.e < fabs(b.v)))
        return (xp_ref_val){v, (double)INFINITY};
    const double moved = (a.e + fabs(v) * b.e) / (fabs(b.v) - b.e);
    return (xp_ref_val){v, moved + 8.0 * u * (fabs(v) + moved) + xp_ref_least(r->op)};
}

static inline int is_softmax(const xp_dialect *d) {
    return d->score != XP_SCORE_SIGMOID && d->score != XP_SCORE_SQRT_SOFTPLUS;
}

/* Renormalised among themselves, from the logits: no division by a sum follows. */
static inline int has_shares(const xp_dialect *d) {
    return d->score == XP_SCORE_SOFTMAX_TOPK || d->renorm == XP_RENORM_LOG_SUM;
}

static inline double factor_at(const xp_ref_routing *r, int64_t e) {
    return r->scale_e[r->d->expert_scale == XP_FACTOR_ONE ? 0 : e];
}

static inline double largest(const double *v, int64_t n) {
    double most = 0.0;
    for (int64_t i = 0; i < n; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

static inline int has_groups(const xp_ref_routing *r) {
    return r->d->group_reduce != XP_GROUP_NONE;
}

static inline int64_t group_of(const xp_ref_routing *r, int64_t e) {
    return e / (r->E / r->d->n_group);
}

/* p of slot k over the experts left, into r->row: exp(l - max) of those inside the margin, 0 elsewhere. Returns the
 * sum; out_open: how much of it is not decided. */
double xp_ref_routing_sparse_row(const xp_ref_routing *r, const int32_t *idx, int64_t k, double *out_open);
/* r->share [K] = softmax of the chosen logits, or with renorm log_sum of log s, r->w the same with errors; r->row and
 * r->sub are used. */
void xp_ref_routing_shares(xp_ref_routing *r, const int32_t *idx);
/* The weights of renorm log_sum were the logits exact: r->share, and what an implementation's may differ by, e [K]. */
void xp_ref_routing_log_shares(xp_ref_routing *r, const int32_t *idx, double *e);

#endif
