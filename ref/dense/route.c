/* Second formulation of stages route and route_bwd: an expert's place is the number of experts that beat it; the
 * gradient goes through whole Jacobian matrices.
 *
 * Experts are ranked by logit, which softmax keeps in order: higher first, then lower number, NaN last. */
#include <math.h>
#include <string.h>

#include "dense.h"
#include "num.h"

static const char *why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_route_why_not(((const xp_route_args *)args)->dialect);
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_args *a = args;
    return 2 * xp_dense_room(a->logits.dim[1], sizeof(double)) + xp_dense_room(a->idx.dim[1], sizeof(double));
}

/* 1: expert i comes before expert j. */
static int beats(const double *l, int64_t i, int64_t j) {
    if (isnan(l[i]) || isnan(l[j]))
        return isnan(l[i]) == isnan(l[j]) ? i < j : isnan(l[j]);
    return l[i] > l[j] || (l[i] == l[j] && i < j);
}

static void choose(const xp_route_args *a, int64_t t, const double *l) {
    const int64_t e_n = a->logits.dim[1], k_n = a->idx.dim[1];
    for (int64_t e = 0; e < e_n; e++) {
        int64_t place = 0;
        for (int64_t i = 0; i < e_n; i++)
            place += i != e && beats(l, i, e);
        if (place < k_n)
            xp_dense_put_int(&a->idx, xp_dense_at(&a->idx, t, place, 0, 0), e);
    }
}

void xp_dense_score(const double *l, int64_t e_n, double *p) {
    int numbers = 0;
    for (int64_t e = 0; e < e_n; e++) {
        numbers |= !isnan(l[e]);
        p[e] = isnan(l[e]) ? -HUGE_VAL : l[e];
    }
    xp_dense_softmax(p, e_n, p);
    for (int64_t e = 0; e < e_n; e++) {
        if (isnan(l[e]))
            p[e] = numbers ? 0 : (double)NAN;
    }
}

static void weigh(const xp_route_args *a, int64_t t, const double *p, double *w) {
    const int64_t k_n = a->idx.dim[1];
    double sum = 0;
    for (int64_t k = 0; k < k_n; k++)
        sum += w[k] = p[xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0))];
    for (int64_t k = 0; k < k_n; k++)
        w[k] = a->dialect->scale * (a->dialect->renorm == XP_RENORM_SUM ? w[k] / sum : w[k]);
    xp_dense_write(&a->w, xp_dense_at(&a->w, t, 0, 0, 0), k_n, w);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_route_args *a = args;
    const int64_t e_n = a->logits.dim[1];
    char *ws = x->ws;
    double *l = xp_dense_carve(&ws, e_n, sizeof *l);
    double *p = xp_dense_carve(&ws, e_n, sizeof *p);
    double *w = xp_dense_carve(&ws, a->idx.dim[1], sizeof *w);
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        xp_dense_read(&a->logits, xp_dense_at(&a->logits, t, 0, 0, 0), e_n, l);
        xp_dense_score(l, e_n, p);
        if (!a->replay)
            choose(a, t, l);
        weigh(a, t, p, w);
        xp_dense_write(&a->scores, xp_dense_at(&a->scores, t, 0, 0, 0), e_n, p);
    }
    return XP_OK;
}

static const char *bwd_why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_route_why_not(((const xp_route_bwd_args *)args)->dialect);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_bwd_args *a = args;
    return 3 * xp_dense_room(a->scores.dim[1], sizeof(double)) + xp_dense_room(a->idx.dim[1], sizeof(double));
}

/* dw[m] ds[e]: w[m] = s[m] or s[m] / sum over slots; a slot counts as often as it is named. */
static void to_scores(const xp_route_bwd_args *a, int64_t t, const double *p, const double *dw, double *ds) {
    const int64_t k_n = a->idx.dim[1];
    double sum = 0;
    for (int64_t k = 0; k < k_n; k++)
        sum += p[xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0))];
    for (int64_t m = 0; m < k_n; m++) {
        const int64_t em = xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, m, 0, 0));
        for (int64_t k = 0; k < k_n; k++) {
            const int64_t ek = xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0));
            double j = k == m ? 1 : 0;
            if (a->dialect->renorm == XP_RENORM_SUM)
                j = (j - p[em] / sum) / sum;
            ds[ek] += dw[m] * (a->dialect->scale * j);
        }
    }
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_route_bwd_args *a = args;
    const int64_t e_n = a->scores.dim[1], k_n = a->idx.dim[1];
    char *ws = x->ws;
    double *p = xp_dense_carve(&ws, e_n, sizeof *p);
    double *ds = xp_dense_carve(&ws, e_n, sizeof *ds);
    double *dl = xp_dense_carve(&ws, e_n, sizeof *dl);
    double *dw = xp_dense_carve(&ws, k_n, sizeof *dw);
    for (int64_t t = 0; t < a->scores.dim[0]; t++) {
        xp_dense_read(&a->scores, xp_dense_at(&a->scores, t, 0, 0, 0), e_n, p);
        xp_dense_read(&a->dw, xp_dense_at(&a->dw, t, 0, 0, 0), k_n, dw);
        memset(ds, 0, (size_t)e_n * sizeof *ds);
        to_scores(a, t, p, dw, ds);
        for (int64_t j = 0; j < e_n; j++) {
            dl[j] = a->daux.data ? xp_dense_get(&a->daux, xp_dense_at(&a->daux, t, j, 0, 0)) : 0;
            for (int64_t e = 0; e < e_n; e++)
                dl[j] += ds[e] * (p[e] * ((e == j ? 1 : 0) - p[j]));
        }
        xp_dense_write(&a->dlogits, xp_dense_at(&a->dlogits, t, 0, 0, 0), e_n, dl);
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
