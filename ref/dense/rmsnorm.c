/* Second formulation of stages rmsnorm and rmsnorm_bwd: the row divided by its root mean square; the gradient as dy w
 * with its component along the row taken out. With the weight first the row that is divided is w x, the gradient that
 * of the row without a weight, times w for x and times x for w. */
#include <math.h>
#include <string.h>

#include "dense.h"
#include "num.h"

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_rmsnorm_args *a = args;
    return 2 * xp_dense_room(a->x.dim[1], sizeof(double));
}

static xp_status run(const xp_exec *e, const void *args) {
    const xp_rmsnorm_args *a = args;
    const int64_t h_n = a->x.dim[1];
    char *ws = e->ws;
    double *x = xp_dense_carve(&ws, h_n, sizeof *x);
    double *w = xp_dense_carve(&ws, h_n, sizeof *w);
    xp_dense_read(&a->w, 0, h_n, w);
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        xp_dense_read(&a->x, xp_dense_at(&a->x, t, 0, 0, 0), h_n, x);
        for (int64_t h = 0; h < h_n && a->weight_first; h++)
            x[h] *= w[h];
        const double rms = sqrt(xp_dense_dot(x, x, h_n) / (double)h_n + a->eps);
        for (int64_t h = 0; h < h_n; h++)
            x[h] = a->weight_first ? x[h] / rms : w[h] * (x[h] / rms);
        xp_dense_write(&a->y, xp_dense_at(&a->y, t, 0, 0, 0), h_n, x);
        xp_dense_put(&a->rstd, xp_dense_at(&a->rstd, t, 0, 0, 0), 1 / rms);
    }
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_rmsnorm_bwd_args *a = args;
    return 4 * xp_dense_room(a->x.dim[1], sizeof(double));
}

/* n = x rstd and u = dy w of token t; with the weight first n = x w rstd and u = dy. u may be NULL. */
static void load(const xp_rmsnorm_bwd_args *a, int64_t t, const double *w, double *n, double *dy, double *u) {
    const int64_t h_n = a->x.dim[1];
    const double rstd = xp_dense_get(&a->rstd, xp_dense_at(&a->rstd, t, 0, 0, 0));
    xp_dense_read(&a->x, xp_dense_at(&a->x, t, 0, 0, 0), h_n, n);
    xp_dense_read(&a->dy, xp_dense_at(&a->dy, t, 0, 0, 0), h_n, dy);
    for (int64_t h = 0; h < h_n; h++) {
        n[h] *= a->weight_first ? w[h] * rstd : rstd;
        if (u)
            u[h] = a->weight_first ? dy[h] : dy[h] * w[h];
    }
}

/* u becomes its part across the row, over the root. */
static void across(const xp_rmsnorm_bwd_args *a, int64_t t, const double *n, double *u) {
    const int64_t h_n = a->x.dim[1];
    const double rstd = xp_dense_get(&a->rstd, xp_dense_at(&a->rstd, t, 0, 0, 0));
    const double along = xp_dense_dot(n, u, h_n) / (double)h_n;
    for (int64_t h = 0; h < h_n; h++)
        u[h] = (u[h] - along * n[h]) * rstd;
}

static void dx_token(const xp_rmsnorm_bwd_args *a, int64_t t, const double *w, double *n, double *dy, double *u) {
    const int64_t h_n = a->x.dim[1];
    load(a, t, w, n, dy, u);
    across(a, t, n, u);
    for (int64_t h = 0; h < h_n && a->weight_first; h++)
        u[h] *= w[h];
    xp_dense_write(&a->dx, xp_dense_at(&a->dx, t, 0, 0, 0), h_n, u);
}

static int64_t slot_of(const xp_rmsnorm_bwd_args *a, int64_t t) {
    return a->part.data ? xp_dense_int(&a->part, xp_dense_at(&a->part, t, 0, 0, 0))
                        : xp_dense_slot(a->token0, t, a->block);
}

static xp_status bwd_run(const xp_exec *e, const void *args) {
    const xp_rmsnorm_bwd_args *a = args;
    const int64_t t_n = a->x.dim[0], h_n = a->x.dim[1];
    char *ws = e->ws;
    double *w = xp_dense_carve(&ws, h_n, sizeof *w);
    double *n = xp_dense_carve(&ws, h_n, sizeof *n);
    double *dy = xp_dense_carve(&ws, h_n, sizeof *dy);
    double *u = xp_dense_carve(&ws, h_n, sizeof *u);
    xp_dense_read(&a->w, 0, h_n, w);
    for (int64_t t = 0; t < t_n; t++)
        dx_token(a, t, w, n, dy, u);
    double *sum = u;
    for (int64_t b = 0; b < a->dw.dim[0]; b++) {
        memset(sum, 0, (size_t)h_n * sizeof *sum);
        for (int64_t t = 0; t < t_n; t++) {
            if (slot_of(a, t) != b)
                continue;
            load(a, t, w, n, dy, NULL);
            if (a->weight_first) {
                across(a, t, n, dy);
                xp_dense_read(&a->x, xp_dense_at(&a->x, t, 0, 0, 0), h_n, n);
            }
            for (int64_t h = 0; h < h_n; h++)
                sum[h] += dy[h] * n[h];
        }
        xp_dense_write(&a->dw, xp_dense_at(&a->dw, b, 0, 0, 0), h_n, sum);
    }
    return XP_OK;
}

const xp_kernel xp_dense_rmsnorm = {
    .stage = &xp_stage_rmsnorm,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_rmsnorm_bwd = {
    .stage = &xp_stage_rmsnorm_bwd,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
