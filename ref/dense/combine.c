/* Second formulation of stages combine and combine_bwd: every rank shows its experts' outputs, and each token's home
 * picks its own, last slot first; backward, every home shows w dy in double, and the experts' ranks pick. */
#include <string.h>

#include "dense.h"
#include "num.h"
#include "travel.h"

typedef struct {
    const xp_combine_args *a;
    const xp_dense_home *home;
    double *wide; /* [H] */
} combining;

static void show_out(const void *ctx, int64_t row, void *dst) {
    const xp_tensor *out = &((const combining *)ctx)->a->out;
    memcpy(dst, xp_tensor_at(out, row, 0, 0, 0), xp_dtype_bytes(out->dtype, out->dim[1]));
}

static void see_out(const void *ctx, int from, int64_t row, const void *src) {
    const combining *c = ctx;
    const xp_tensor *back = &c->a->back;
    const int64_t m = xp_dense_home_place(c->home, &c->a->offsets, from, row);
    if (m < 0)
        return;
    xp_widen_row(src, c->a->out.dtype, 0, back->dim[1], c->wide);
    xp_dense_write(back, xp_dense_at(back, m, 0, 0, 0), back->dim[1], c->wide);
}

static const char *why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_sum_why_not(((const xp_combine_args *)args)->dialect);
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_combine_args *a = args;
    const int ranks = m->axis[XP_EP]->size;
    return xp_dense_home_ws(ranks, a->recv_counts.dim[1]) + 2 * xp_dense_room(a->y.dim[1], sizeof(double)) +
           xp_dense_share_ws(ranks, a->out.dtype, a->out.dim[1]);
}

/* Slots of token t from the last to the first. */
static void sum_token(const xp_combine_args *a, int64_t t, double *wide, double *sum) {
    const int64_t h_n = a->y.dim[1];
    memset(sum, 0, (size_t)h_n * sizeof *sum);
    for (int64_t k = a->pos.dim[1] - 1; k >= 0; k--) {
        const int64_t m = xp_dense_int(&a->pos, xp_dense_at(&a->pos, t, k, 0, 0));
        xp_dense_read(&a->back, xp_dense_at(&a->back, m, 0, 0, 0), h_n, wide);
        xp_dense_axpy(xp_dense_get(&a->w, xp_dense_at(&a->w, t, k, 0, 0)), wide, h_n, sum);
    }
    xp_dense_write(&a->y, xp_dense_at(&a->y, t, 0, 0, 0), h_n, sum);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_combine_args *a = args;
    const int64_t h_n = a->y.dim[1];
    char *ws = x->ws;
    xp_dense_home home;
    XP_TRY(xp_dense_home_open(x, &a->recv_counts, &a->recv_offsets, &ws, &home));
    for (int64_t m = 0; m < xp_dense_int(&a->offsets, a->counts.dim[0]); m++)
        xp_dense_zero(&a->back, xp_dense_at(&a->back, m, 0, 0, 0), h_n);
    double *wide = xp_dense_carve(&ws, h_n, sizeof *wide);
    double *sum = xp_dense_carve(&ws, h_n, sizeof *sum);
    const combining ctx = {.a = a, .home = &home, .wide = wide};
    const xp_dense_share s = {.comm = x->mesh->axis[XP_EP],
                              .q = x->q,
                              .dtype = a->out.dtype,
                              .width = h_n,
                              .rows = home.used,
                              .show = show_out,
                              .see = see_out,
                              .ctx = &ctx};
    XP_TRY(xp_dense_share_run(&s, ws));
    for (int64_t t = 0; t < a->y.dim[0]; t++)
        sum_token(a, t, wide, sum);
    return XP_OK;
}

typedef struct {
    const xp_combine_bwd_args *a;
    const xp_dense_away *away;
    const int64_t *slot; /* [M] t*K + k of each home row; -1: a pad */
    double *wide;        /* [H] */
} spreading;

static void show_gradient(const void *ctx, int64_t row, void *dst) {
    const spreading *s = ctx;
    const int64_t h_n = s->a->dy.dim[1], k_n = s->a->pos.dim[1];
    memset(s->wide, 0, (size_t)h_n * sizeof(double));
    if (s->slot[row] >= 0) {
        const int64_t t = s->slot[row] / k_n, k = s->slot[row] % k_n;
        const double w = xp_dense_get(&s->a->w, xp_dense_at(&s->a->w, t, k, 0, 0));
        xp_dense_read(&s->a->dy, xp_dense_at(&s->a->dy, t, 0, 0, 0), h_n, s->wide);
        for (int64_t h = 0; h < h_n; h++)
            s->wide[h] *= w;
    }
    memcpy(dst, s->wide, (size_t)h_n * sizeof(double));
}

static void see_gradient(const void *ctx, int from, int64_t row, const void *src) {
    const spreading *s = ctx;
    const xp_tensor *dout = &s->a->dout;
    const int64_t c = xp_dense_away_place(s->away, &s->a->recv_offsets, from, row);
    if (c >= 0)
        xp_dense_write(dout, xp_dense_at(dout, c, 0, 0, 0), dout->dim[1], src);
}

static const char *bwd_why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_sum_why_not(((const xp_combine_bwd_args *)args)->dialect);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_bwd_args *a = args;
    const int ranks = m->axis[XP_EP]->size;
    return xp_dense_away_ws(ranks, a->counts.dim[0]) + 2 * xp_dense_room(a->dy.dim[1], sizeof(double)) +
           xp_dense_room(a->back.dim[0], sizeof(int64_t)) + xp_dense_share_ws(ranks, XP_F64, a->dy.dim[1]);
}

static void weight_gradients(const xp_combine_bwd_args *a, double *dy, double *back) {
    const int64_t h_n = a->dy.dim[1], k_n = a->pos.dim[1];
    for (int64_t i = 0; i < a->dy.dim[0] * k_n; i++) {
        const int64_t t = i / k_n, k = i % k_n;
        const int64_t m = xp_dense_int(&a->pos, xp_dense_at(&a->pos, t, k, 0, 0));
        xp_dense_read(&a->dy, xp_dense_at(&a->dy, t, 0, 0, 0), h_n, dy);
        xp_dense_read(&a->back, xp_dense_at(&a->back, m, 0, 0, 0), h_n, back);
        xp_dense_put(&a->dw, xp_dense_at(&a->dw, t, k, 0, 0), xp_dense_dot(dy, back, h_n));
    }
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_combine_bwd_args *a = args;
    const int64_t h_n = a->dy.dim[1], k_n = a->pos.dim[1];
    char *ws = x->ws;
    xp_dense_away away;
    XP_TRY(xp_dense_away_open(x, &a->counts, &a->offsets, &ws, &away));
    double *wide = xp_dense_carve(&ws, h_n, sizeof *wide);
    double *other = xp_dense_carve(&ws, h_n, sizeof *other);
    int64_t *slot = xp_dense_carve(&ws, a->back.dim[0], sizeof *slot);
    for (int64_t m = 0; m < a->back.dim[0]; m++)
        slot[m] = -1;
    for (int64_t i = 0; i < a->dy.dim[0] * k_n; i++)
        slot[xp_dense_int(&a->pos, xp_dense_at(&a->pos, i / k_n, i % k_n, 0, 0))] = i;
    for (int64_t c = 0; c < xp_dense_int(&a->recv_offsets, away.l_n); c++)
        xp_dense_zero(&a->dout, xp_dense_at(&a->dout, c, 0, 0, 0), h_n);
    weight_gradients(a, wide, other);
    const spreading ctx = {.a = a, .away = &away, .slot = slot, .wide = wide};
    const xp_dense_share s = {.comm = x->mesh->axis[XP_EP],
                              .q = x->q,
                              .dtype = XP_F64,
                              .width = h_n,
                              .rows = away.used,
                              .show = show_gradient,
                              .see = see_gradient,
                              .ctx = &ctx};
    return xp_dense_share_run(&s, ws);
}

const xp_kernel xp_dense_combine = {
    .stage = &xp_stage_combine,
    .name = "dense",
    .det = XP_DET_RUN,
    .why_not = why_not,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_combine_bwd = {
    .stage = &xp_stage_combine_bwd,
    .name = "dense",
    .det = XP_DET_RUN,
    .why_not = bwd_why_not,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
