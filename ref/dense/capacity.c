/* Second formulation of stage capacity: a slot is kept when fewer slots of its expert come before it than the expert
 * takes, counted one by one. Nothing is sorted; quadratic in the slots. */
#include <math.h>

#include "dense.h"
#include "num.h"

static int64_t expert_at(const xp_capacity_args *a, int64_t t, int64_t k) {
    return xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0));
}

/* 1: tokens t and u are counted together. */
static int together(const xp_capacity_args *a, int64_t t, int64_t u) {
    return a->sequence == 0 || (a->token0 + t) / a->sequence == (a->token0 + u) / a->sequence;
}

/* 1: n slots are as many as an expert takes of `tokens` tokens. */
static int fills(const xp_capacity_args *a, int64_t n, int64_t tokens) {
    const xp_dialect *d = a->dialect;
    if (d->capacity > 0)
        return n >= d->capacity;
    const double even = (double)(tokens * a->idx.dim[1]) / (double)a->dropped.dim[0];
    return d->capacity_factor > 0 && (double)n >= even * d->capacity_factor;
}

/* As a number: the larger, the earlier. */
static double rank_of(const xp_capacity_args *a, int64_t t, int64_t k) {
    if (a->dialect->overflow == XP_OVERFLOW_SLOTS)
        return (double)-k;
    if (a->dialect->overflow != XP_OVERFLOW_PRIORITY)
        return 0;
    return xp_dense_get(&a->w, xp_dense_at(&a->w, t, k, 0, 0));
}

static int before(const xp_capacity_args *a, int64_t u, int64_t j, int64_t t, int64_t k) {
    const double mine = rank_of(a, t, k), other = rank_of(a, u, j);
    const int lower = u < t || (u == t && j < k);
    if (isnan(mine) || isnan(other))
        return isnan(mine) && isnan(other) ? lower : isnan(mine);
    return other > mine || (other == mine && lower);
}

int xp_dense_capacity_keeps(const xp_capacity_args *a, int64_t t, int64_t k) {
    const int64_t e = expert_at(a, t, k);
    int64_t earlier = 0, tokens = 0;
    if (e < 0 || e >= a->dropped.dim[0])
        return 1;
    for (int64_t u = 0; u < a->idx.dim[0]; u++) {
        tokens += together(a, t, u);
        for (int64_t j = 0; j < a->idx.dim[1]; j++)
            earlier += together(a, t, u) && expert_at(a, u, j) == e && before(a, u, j, t, k);
    }
    return !fills(a, earlier, tokens);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_capacity_args *a = args;
    (void)x;
    for (int64_t e = 0; e < a->dropped.dim[0]; e++)
        xp_dense_put_int(&a->dropped, xp_dense_at(&a->dropped, e, 0, 0, 0), 0);
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            const int64_t e = expert_at(a, t, k), keeps = xp_dense_capacity_keeps(a, t, k);
            xp_dense_put_int(&a->kept, xp_dense_at(&a->kept, t, k, 0, 0), keeps ? e : -1);
            if (keeps)
                continue;
            const int64_t at = xp_dense_at(&a->dropped, e, 0, 0, 0);
            xp_dense_put_int(&a->dropped, at, xp_dense_int(&a->dropped, at) + 1);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_capacity = {
    .stage = &xp_stage_capacity,
    .name = "dense",
    .det = XP_DET_RUN,
    .run = run,
};
