/* Second formulation of stages balance and balance_bwd: every rank shows its sums in double, each rank adds them up;
 * the gradient goes through the whole Jacobian of the softmax. */
#include <math.h>
#include <string.h>

#include "dense.h"
#include "num.h"
#include "share.h"

/* Of the sums that a rank shows: choices [E], probabilities [E], squared log-sum-exps, tokens x layers. */
static int64_t shown(int64_t e_n) {
    return 2 * e_n + 2;
}

static int ranks_of(const xp_balance_args *a, const xp_mesh *m) {
    return a->scope_world ? m->axis[XP_WORLD]->size : 1;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_balance_args *a = args;
    const int64_t e_n = a->logits.dim[2], ranks = ranks_of(a, m);
    return 2 * xp_dense_room(e_n, sizeof(double)) + xp_dense_room(shown(e_n), sizeof(double)) +
           xp_dense_room(ranks * shown(e_n), sizeof(double)) + xp_dense_room(ranks, sizeof(int64_t));
}

static void add_token(const xp_balance_args *a, int64_t y, int64_t t, double *l, double *p, double *sum) {
    const int64_t e_n = a->logits.dim[2];
    xp_dense_read(&a->logits, xp_dense_at(&a->logits, y, t, 0, 0), e_n, l);
    xp_dense_softmax(l, e_n, p);
    const double lse = xp_dense_lse(l, e_n);
    for (int64_t k = 0; k < a->idx.dim[2]; k++)
        sum[xp_dense_int(&a->idx, xp_dense_at(&a->idx, y, t, k, 0))] += 1;
    for (int64_t e = 0; e < e_n; e++)
        sum[e_n + e] += p[e];
    sum[2 * e_n] += lse * lse;
    sum[2 * e_n + 1] += 1;
}

static void put_results(const xp_balance_args *a, const double *sum, double *freq, double *prob) {
    const int64_t e_n = a->logits.dim[2];
    const double n = sum[2 * e_n + 1];
    for (int64_t e = 0; e < e_n; e++) {
        freq[e] = n > 0 ? sum[e] / n : 0;
        prob[e] = n > 0 ? sum[e_n + e] / n : 0;
    }
    xp_dense_write(&a->freq, 0, e_n, freq);
    xp_dense_write(&a->prob, 0, e_n, prob);
    xp_dense_put(&a->loss, 0, (double)e_n * xp_dense_dot(freq, prob, e_n));
    xp_dense_put(&a->loss, 1, n > 0 ? sum[2 * e_n] / n : 0);
    xp_dense_put_int(&a->count, 0, (int64_t)n);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_balance_args *a = args;
    const int64_t e_n = a->logits.dim[2], width = shown(e_n);
    const int ranks = ranks_of(a, x->mesh);
    char *ws = x->ws;
    double *l = xp_dense_carve(&ws, e_n, sizeof *l);
    double *p = xp_dense_carve(&ws, e_n, sizeof *p);
    double *sum = xp_dense_carve(&ws, width, sizeof *sum);
    double *all = xp_dense_carve(&ws, ranks * width, sizeof *all);
    int64_t *ones = xp_dense_carve(&ws, ranks, sizeof *ones);
    memset(sum, 0, (size_t)width * sizeof *sum);
    for (int64_t y = 0; y < a->logits.dim[0]; y++) {
        for (int64_t t = 0; t < a->logits.dim[1]; t++) {
            if (xp_dense_int(&a->valid, t))
                add_token(a, y, t, l, p, sum);
        }
    }
    if (a->scope_world) {
        XP_TRY(xp_dense_all(x, x->mesh->axis[XP_WORLD], XP_F64, sum, width, all, ones));
        memset(sum, 0, (size_t)width * sizeof *sum);
        for (int r = 0; r < ranks; r++)
            xp_dense_axpy(1, all + r * width, width, sum);
    }
    put_results(a, sum, l, p);
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_balance_bwd_args *a = args;
    return 4 * xp_dense_room(a->logits.dim[2], sizeof(double));
}

/* d[j] = scale / n (aux E sum_e freq[e] P[e] (delta_ej - P[j]) + 2 z lse P[j]). */
static void token_gradient(const xp_balance_bwd_args *a, const double *l, const double *freq, double *p, double *d) {
    const int64_t e_n = a->logits.dim[2];
    const double per = a->scale / (double)xp_dense_int(&a->count, 0);
    const double lse = a->z_coef != 0 ? xp_dense_lse(l, e_n) : 0;
    xp_dense_softmax(l, e_n, p);
    for (int64_t j = 0; j < e_n; j++) {
        double s = 0;
        for (int64_t e = 0; e < e_n; e++)
            s += freq[e] * (p[e] * ((e == j ? 1 : 0) - p[j]));
        d[j] = per * (a->aux_coef * (double)e_n * s + 2 * a->z_coef * (lse * p[j]));
    }
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_balance_bwd_args *a = args;
    const int64_t e_n = a->logits.dim[2], t_n = a->logits.dim[1];
    char *ws = x->ws;
    double *l = xp_dense_carve(&ws, e_n, sizeof *l);
    double *p = xp_dense_carve(&ws, e_n, sizeof *p);
    double *freq = xp_dense_carve(&ws, e_n, sizeof *freq);
    double *d = xp_dense_carve(&ws, e_n, sizeof *d);
    xp_dense_read(&a->freq, 0, e_n, freq);
    for (int64_t i = 0; i < a->logits.dim[0] * t_n; i++) {
        const int64_t y = i / t_n, t = i % t_n;
        memset(d, 0, (size_t)e_n * sizeof *d);
        if (xp_dense_int(&a->valid, t) && xp_dense_int(&a->count, 0) > 0) {
            xp_dense_read(&a->logits, xp_dense_at(&a->logits, y, t, 0, 0), e_n, l);
            token_gradient(a, l, freq, p, d);
        }
        xp_dense_write(&a->daux, xp_dense_at(&a->daux, y, t, 0, 0), e_n, d);
    }
    return XP_OK;
}

const xp_kernel xp_dense_balance = {
    .stage = &xp_stage_balance,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_balance_bwd = {
    .stage = &xp_stage_balance_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
