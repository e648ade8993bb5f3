/* Second formulation of stages permute and permute_bwd: the place of a copy is the number of copies that come before
 * it, counted one by one. Quadratic in the copies, and nothing is sorted or summed along the way. Products of a weight
 * and a row are the machine's own f32 ones, where act is not f64. */
#include <string.h>

#include "dense.h"
#include "num.h"

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_permute_args *a = args;
    return xp_dense_room(a->idx.dim[0] * a->idx.dim[1], sizeof(int32_t)) + xp_dense_room(a->x.dim[1], sizeof(double));
}

static int on_input(const xp_dialect *d) {
    return d && d->weight_at == XP_AT_INPUT;
}

/* expert[i]: of the copies in the order that the rows of one expert keep, token by token or slot by slot. */
static void in_order(const xp_permute_args *a, int32_t *expert) {
    const int64_t t_n = a->idx.dim[0], k_n = a->idx.dim[1];
    for (int64_t i = 0; i < t_n * k_n; i++) {
        const int64_t t = a->order == XP_ORDER_TOKEN ? i / k_n : i % t_n;
        const int64_t k = a->order == XP_ORDER_TOKEN ? i % k_n : i / t_n;
        expert[i] = (int32_t)xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0));
    }
}

static int64_t number_of(const int32_t *expert, int64_t n, int32_t e) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++)
        found += expert[i] == e;
    return found;
}

static void borders(const xp_permute_args *a, const int32_t *expert, int64_t n) {
    int64_t at = 0;
    for (int64_t e = 0; e < a->counts.dim[0]; e++) {
        const int64_t count = number_of(expert, n, (int32_t)e);
        xp_dense_put_int(&a->counts, e, count);
        xp_dense_put_int(&a->offsets, e, at);
        for (at += count > a->least ? count : a->least; at % a->align != 0;)
            at++;
    }
    xp_dense_put_int(&a->offsets, a->counts.dim[0], at);
}

static void clear(const xp_permute_args *a) {
    for (int64_t m = 0; m < xp_dense_int(&a->offsets, a->counts.dim[0]); m++) {
        xp_dense_zero(&a->rows, xp_dense_at(&a->rows, m, 0, 0, 0), a->rows.dim[1]);
        xp_dense_put_int(&a->tok, m, -1);
        xp_dense_put_int(&a->src, m, -1);
    }
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_permute_args *a = args;
    const int64_t t_n = a->idx.dim[0], k_n = a->idx.dim[1], h_n = a->x.dim[1];
    char *ws = x->ws;
    int32_t *expert = xp_dense_carve(&ws, t_n * k_n, sizeof *expert);
    double *row = xp_dense_carve(&ws, h_n, sizeof *row);
    in_order(a, expert);
    borders(a, expert, t_n * k_n);
    clear(a);
    for (int64_t i = 0; i < t_n * k_n; i++) {
        const int64_t t = a->order == XP_ORDER_TOKEN ? i / k_n : i % t_n;
        const int64_t k = a->order == XP_ORDER_TOKEN ? i % k_n : i / t_n;
        const int64_t at = xp_dense_at(&a->pos, t, k, 0, 0);
        if (expert[i] < 0 || expert[i] >= a->counts.dim[0]) {
            xp_dense_put_int(&a->pos, at, -1);
            continue;
        }
        const int64_t m = xp_dense_int(&a->offsets, expert[i]) + number_of(expert, i, expert[i]);
        xp_dense_read(&a->x, xp_dense_at(&a->x, t, 0, 0, 0), h_n, row);
        for (int64_t h = 0; h < h_n && on_input(a->dialect); h++)
            row[h] = xp_dense_product(a->x.dtype, xp_dense_get(&a->w, xp_dense_at(&a->w, t, k, 0, 0)), row[h]);
        xp_dense_write(&a->rows, xp_dense_at(&a->rows, m, 0, 0, 0), h_n, row);
        xp_dense_put_int(&a->tok, m, a->token0 + t);
        xp_dense_put_int(&a->src, m, t * k_n + k);
        xp_dense_put_int(&a->pos, at, m);
    }
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return 2 * xp_dense_room(((const xp_permute_bwd_args *)args)->dx.dim[1], sizeof(double));
}

/* The row of slot k's place in the order of rows: how many slots of the token have a lower row. */
static int64_t rank_of(const xp_permute_bwd_args *a, int64_t t, int64_t k) {
    const int64_t mine = xp_dense_int(&a->pos, xp_dense_at(&a->pos, t, k, 0, 0));
    int64_t lower = 0;
    for (int64_t j = 0; j < a->pos.dim[1]; j++) {
        const int64_t other = xp_dense_int(&a->pos, xp_dense_at(&a->pos, t, j, 0, 0));
        lower += other >= 0 && other < mine;
    }
    return mine < 0 ? -1 : lower;
}

/* Each element for itself, every sum put into act and read back; the last one is left as it is. */
static void add_in_act(const xp_permute_bwd_args *a, int64_t t, double *row, double *sum) {
    const int64_t h_n = a->dx.dim[1], k_n = a->pos.dim[1];
    memset(sum, 0, (size_t)h_n * sizeof *sum);
    for (int64_t place = 0; place < k_n; place++) {
        for (int64_t k = 0; k < k_n; k++) {
            if (rank_of(a, t, k) != place)
                continue;
            const int64_t m = xp_dense_int(&a->pos, xp_dense_at(&a->pos, t, k, 0, 0));
            const double w = on_input(a->dialect) ? xp_dense_get(&a->w, xp_dense_at(&a->w, t, k, 0, 0)) : 1;
            xp_dense_read(&a->drows, xp_dense_at(&a->drows, m, 0, 0, 0), h_n, row);
            for (int64_t h = 0; h < h_n; h++)
                sum[h] = xp_dense_round(a->drows.dtype, sum[h]) +
                         xp_dense_round(a->drows.dtype, xp_dense_product(a->drows.dtype, w, row[h]));
        }
    }
}

/* The last slot first. */
static void add_rows(const xp_permute_bwd_args *a, int64_t t, double *row, double *sum) {
    const int64_t h_n = a->dx.dim[1];
    memset(sum, 0, (size_t)h_n * sizeof *sum);
    for (int64_t k = a->pos.dim[1] - 1; k >= 0; k--) {
        const int64_t m = xp_dense_int(&a->pos, xp_dense_at(&a->pos, t, k, 0, 0));
        if (m < 0)
            continue;
        xp_dense_read(&a->drows, xp_dense_at(&a->drows, m, 0, 0, 0), h_n, row);
        xp_dense_axpy(on_input(a->dialect) ? xp_dense_get(&a->w, xp_dense_at(&a->w, t, k, 0, 0)) : 1, row, h_n, sum);
    }
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_permute_bwd_args *a = args;
    const int64_t h_n = a->dx.dim[1], k_n = a->pos.dim[1];
    char *ws = x->ws;
    double *sum = xp_dense_carve(&ws, h_n, sizeof *sum);
    double *row = xp_dense_carve(&ws, h_n, sizeof *row);
    for (int64_t t = 0; t < a->dx.dim[0]; t++) {
        if (a->dialect && a->dialect->dx_sum == XP_DX_ACT)
            add_in_act(a, t, row, sum);
        else
            add_rows(a, t, row, sum);
        xp_dense_write(&a->dx, xp_dense_at(&a->dx, t, 0, 0, 0), h_n, sum);
    }
    for (int64_t i = 0; i < a->dx.dim[0] * k_n && on_input(a->dialect); i++) {
        const int64_t m = xp_dense_int(&a->pos, xp_dense_at(&a->pos, i / k_n, i % k_n, 0, 0));
        double dw = 0;
        if (m >= 0) {
            xp_dense_read(&a->drows, xp_dense_at(&a->drows, m, 0, 0, 0), h_n, row);
            xp_dense_read(&a->x, xp_dense_at(&a->x, i / k_n, 0, 0, 0), h_n, sum);
            dw = xp_dense_dot(row, sum, h_n);
        }
        xp_dense_put(&a->dw, xp_dense_at(&a->dw, i / k_n, i % k_n, 0, 0), dw);
    }
    return XP_OK;
}

const xp_kernel xp_dense_permute = {
    .stage = &xp_stage_permute,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_permute_bwd = {
    .stage = &xp_stage_permute_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
