/* Second formulation of stages dispatch and dispatch_bwd: no splits and no all-to-all. Every rank shows all its rows,
 * and each rank keeps those that it has a place for. */
#include <string.h>

#include "dense.h"
#include "num.h"
#include "travel.h"

typedef struct {
    const xp_dispatch_args *a;
    const xp_dense_away *away;
} dispatching;

static void show_row(const void *ctx, int64_t row, void *dst) {
    const xp_dispatch_args *a = ((const dispatching *)ctx)->a;
    memcpy(dst, xp_tensor_at(&a->rows, row, 0, 0, 0), xp_dtype_bytes(a->rows.dtype, a->rows.dim[1]));
}

static void see_row(const void *ctx, int from, int64_t row, const void *src) {
    const dispatching *d = ctx;
    const xp_tensor *recv = &d->a->recv;
    const int64_t c = xp_dense_away_place(d->away, &d->a->recv_offsets, from, row);
    if (c < 0 || c >= recv->dim[0])
        return;
    memcpy(xp_tensor_at(recv, c, 0, 0, 0), src, xp_dtype_bytes(recv->dtype, recv->dim[1]));
}

static void show_tok(const void *ctx, int64_t row, void *dst) {
    const int64_t tok = xp_dense_int(&((const dispatching *)ctx)->a->tok, row);
    memcpy(dst, &tok, sizeof tok);
}

static void see_tok(const void *ctx, int from, int64_t row, const void *src) {
    const dispatching *d = ctx;
    const int64_t c = xp_dense_away_place(d->away, &d->a->recv_offsets, from, row);
    int64_t tok;
    memcpy(&tok, src, sizeof tok);
    if (c >= 0 && c < d->a->recv.dim[0])
        xp_dense_put_int(&d->a->recv_tok, c, tok);
}

static void show_scales(const void *ctx, int64_t row, void *dst) {
    const xp_tensor *s = &((const dispatching *)ctx)->a->scales;
    memcpy(dst, xp_tensor_at(s, row, 0, 0, 0), xp_dtype_bytes(s->dtype, s->dim[1]));
}

static void see_scales(const void *ctx, int from, int64_t row, const void *src) {
    const dispatching *d = ctx;
    const xp_tensor *to = &d->a->recv_scales;
    const int64_t c = xp_dense_away_place(d->away, &d->a->recv_offsets, from, row);
    for (int64_t j = 0; c >= 0 && c < to->dim[0] && j < to->dim[1]; j++)
        xp_dense_put_code(to, xp_dense_at(to, c, j, 0, 0), xp_code(src, to->dtype, j));
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_dispatch_args *a = args;
    const int ranks = m->axis[XP_EP]->size;
    const size_t rows = xp_dense_share_ws(ranks, a->rows.dtype, a->rows.dim[1]);
    const size_t scales = a->scales.data ? xp_dense_share_ws(ranks, a->scales.dtype, a->scales.dim[1]) : 0;
    size_t most = xp_dense_share_ws(ranks, XP_I64, 1);
    most = rows > most ? rows : most;
    most = scales > most ? scales : most;
    return xp_dense_away_ws(ranks, a->counts.dim[0]) + most;
}

/* Counts, borders, and every row in use as a pad row; returns how many those are. */
static int64_t lay_out(const xp_dispatch_args *a, const xp_dense_away *w, int ranks) {
    int64_t at = 0;
    for (int64_t l = 0; l < w->l_n; l++) {
        const int64_t from = at;
        xp_dense_put_int(&a->recv_offsets, l, at);
        for (int r = 0; r < ranks; r++) {
            const int64_t n = w->counts[r * w->e_n + w->me * w->l_n + l];
            xp_dense_put_int(&a->recv_counts, xp_dense_at(&a->recv_counts, r, l, 0, 0), n);
            at += n;
        }
        at = at < from + a->least ? from + a->least : at;
        at = (at + a->align - 1) / a->align * a->align;
    }
    xp_dense_put_int(&a->recv_offsets, w->l_n, at);
    for (int64_t c = 0; c < at && c < a->recv.dim[0]; c++) {
        xp_dense_zero(&a->recv, xp_dense_at(&a->recv, c, 0, 0, 0), a->recv.dim[1]);
        if (a->recv_scales.data)
            xp_dense_zero(&a->recv_scales, xp_dense_at(&a->recv_scales, c, 0, 0, 0), a->recv_scales.dim[1]);
        xp_dense_put_int(&a->recv_tok, c, -1);
    }
    return at;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_dispatch_args *a = args;
    xp_comm *ep = x->mesh->axis[XP_EP];
    char *ws = x->ws;
    xp_dense_away away;
    XP_TRY(xp_dense_away_open(x, &a->counts, &a->offsets, &ws, &away));
    const int64_t used = lay_out(a, &away, ep->size);
    const dispatching ctx = {.a = a, .away = &away};
    xp_dense_share s = {.comm = ep, .q = x->q, .rows = away.used, .ctx = &ctx};
    s.dtype = a->rows.dtype;
    s.width = a->rows.dim[1];
    s.show = show_row;
    s.see = see_row;
    XP_TRY(xp_dense_share_run(&s, ws));
    if (a->scales.data) {
        s.dtype = a->scales.dtype;
        s.width = a->scales.dim[1];
        s.show = show_scales;
        s.see = see_scales;
        XP_TRY(xp_dense_share_run(&s, ws));
    }
    s.dtype = XP_I64;
    s.width = 1;
    s.show = show_tok;
    s.see = see_tok;
    XP_TRY(xp_dense_share_run(&s, ws));
    if (used > a->recv.dim[0])
        return XP_FAIL(XP_E_ARG, "dispatch: recv dim 0 (C) is %lld, but %lld rows arrived", (long long)a->recv.dim[0],
                       (long long)used);
    return XP_OK;
}

typedef struct {
    const xp_dispatch_bwd_args *a;
    const xp_dense_home *home;
    double *wide; /* [H] */
} returning;

static void show_drecv(const void *ctx, int64_t row, void *dst) {
    const xp_tensor *d = &((const returning *)ctx)->a->drecv;
    memcpy(dst, xp_tensor_at(d, row, 0, 0, 0), xp_dtype_bytes(d->dtype, d->dim[1]));
}

static void see_drecv(const void *ctx, int from, int64_t row, const void *src) {
    const returning *r = ctx;
    const xp_tensor *drows = &r->a->drows;
    const int64_t m = xp_dense_home_place(r->home, &r->a->offsets, from, row);
    if (m < 0)
        return;
    xp_widen_row(src, r->a->drecv.dtype, 0, drows->dim[1], r->wide);
    xp_dense_write(drows, xp_dense_at(drows, m, 0, 0, 0), drows->dim[1], r->wide);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_dispatch_bwd_args *a = args;
    const int ranks = m->axis[XP_EP]->size;
    return xp_dense_home_ws(ranks, a->recv_counts.dim[1]) + xp_dense_room(a->drecv.dim[1], sizeof(double)) +
           xp_dense_share_ws(ranks, a->drecv.dtype, a->drecv.dim[1]);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_dispatch_bwd_args *a = args;
    const int64_t h_n = a->drows.dim[1];
    char *ws = x->ws;
    xp_dense_home home;
    XP_TRY(xp_dense_home_open(x, &a->recv_counts, &a->recv_offsets, &ws, &home));
    for (int64_t m = 0; m < xp_dense_int(&a->offsets, a->counts.dim[0]); m++)
        xp_dense_zero(&a->drows, xp_dense_at(&a->drows, m, 0, 0, 0), h_n);
    const returning ctx = {.a = a, .home = &home, .wide = xp_dense_carve(&ws, h_n, sizeof(double))};
    const xp_dense_share s = {.comm = x->mesh->axis[XP_EP],
                              .q = x->q,
                              .dtype = a->drecv.dtype,
                              .width = h_n,
                              .rows = home.used,
                              .show = show_drecv,
                              .see = see_drecv,
                              .ctx = &ctx};
    return xp_dense_share_run(&s, ws);
}

const xp_kernel xp_dense_dispatch = {
    .stage = &xp_stage_dispatch,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_dispatch_bwd = {
    .stage = &xp_stage_dispatch_bwd,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
