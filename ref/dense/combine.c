/* Second formulation of stages combine and combine_bwd: every rank shows its experts' outputs, and each token's home
 * picks its own; backward, every home shows w g in double, and the experts' ranks pick. Where a mode of the sum is
 * about f32, the machine's own f32 arithmetic makes it. */
#include <string.h>

#include "dense.h"
#include "num.h"
#include "travel.h"

/* ---- numbers ---- */

/* The sum after one more slot; y holds what it was before. */
static double added(xp_accumulate how, xp_dtype act, double y, double w, double v) {
    const double p = xp_dense_product(act, w, v);
    if (how == XP_ACC_EAGER_F32)
        return act == XP_F64 ? y + p : (double)((float)y + (float)p);
    if (how == XP_ACC_PRODUCTS_ACT_F32)
        return y + xp_dense_round(act, p);
    return how == XP_ACC_EAGER_ACT ? xp_dense_round(act, y) + xp_dense_round(act, p) : y + w * v;
}

/* v times the dialect's factor of the output, if it has one there. */
static double scaled(const xp_dialect *d, int64_t k_n, xp_dtype act, double v) {
    const double by = xp_dialect_output_factor(d, k_n);
    const int none = act == XP_F64 ? by == 1 : (float)by == 1.0f;
    return none ? v : xp_dense_product(act, by, xp_dense_round(act, v));
}

/* ---- slots ---- */

static int is_identity(const xp_dialect *d) {
    return d->null_experts > 0 && d->null_kind == XP_NULL_IDENTITY;
}

/* What a slot's product is made of: a row of back, or of x for an identity expert; NULL: nothing is added. */
typedef struct {
    const xp_tensor *from;
    int64_t row;
} source;

static source source_of(const xp_dialect *d, const xp_tensor *pos, const xp_tensor *idx, int64_t e_n, int64_t t,
                        int64_t k, const xp_tensor *back, const xp_tensor *x) {
    const int64_t m = xp_dense_int(pos, xp_dense_at(pos, t, k, 0, 0));
    if (m >= 0)
        return (source){back, m};
    if (is_identity(d) && xp_dense_int(idx, xp_dense_at(idx, t, k, 0, 0)) >= e_n)
        return (source){x, t};
    return (source){NULL, -1};
}

static double weight_of(const xp_dialect *d, const xp_tensor *w, int64_t t, int64_t k) {
    return d->weight_at == XP_AT_INPUT ? 1 : xp_dense_get(w, xp_dense_at(w, t, k, 0, 0));
}

/* ---- combine ---- */

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

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_combine_args *a = args;
    const int ranks = m->axis[XP_EP]->size;
    return xp_dense_home_ws(ranks, a->recv_counts.dim[1]) + 2 * xp_dense_room(a->y.dim[1], sizeof(double)) +
           xp_dense_room(a->pos.dim[1], sizeof(int64_t)) + xp_dense_share_ws(ranks, a->out.dtype, a->out.dim[1]);
}

/* The turn of slot k in the sum of its token: how many slots come before it. The plain sums take the last slot first.
 */
static int64_t turn_of(const xp_combine_args *a, int64_t t, int64_t k) {
    const int by_expert = a->dialect->accumulate == XP_ACC_EAGER_ACT || a->dialect->accumulate == XP_ACC_EAGER_F32;
    const int64_t k_n = a->idx.dim[1], mine = xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0));
    int64_t before = 0;
    for (int64_t j = 0; j < k_n && by_expert; j++) {
        const int64_t other = xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, j, 0, 0));
        before += other < mine || (other == mine && j < k);
    }
    return by_expert ? before : k_n - 1 - k;
}

static void sum_token(const xp_combine_args *a, int64_t t, int64_t *slot, double *wide, double *sum) {
    const int64_t h_n = a->y.dim[1], k_n = a->pos.dim[1];
    const xp_dtype act = a->out.dtype;
    for (int64_t k = 0; k < k_n; k++)
        slot[turn_of(a, t, k)] = k;
    memset(sum, 0, (size_t)h_n * sizeof *sum);
    for (int64_t i = 0; i < k_n; i++) {
        const int64_t k = slot[i];
        const source s = source_of(a->dialect, &a->pos, &a->idx, a->counts.dim[0], t, k, &a->back, &a->x);
        const double w = weight_of(a->dialect, &a->w, t, k);
        if (!s.from)
            continue;
        xp_dense_read(s.from, xp_dense_at(s.from, s.row, 0, 0, 0), h_n, wide);
        for (int64_t h = 0; h < h_n; h++)
            sum[h] = added(a->dialect->accumulate, act, sum[h], w, wide[h]);
    }
    for (int64_t h = 0; h < h_n; h++)
        sum[h] = scaled(a->dialect, a->pos.dim[1], act, sum[h]);
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
    int64_t *slot = xp_dense_carve(&ws, a->pos.dim[1], sizeof *slot);
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
        sum_token(a, t, slot, wide, sum);
    return XP_OK;
}

/* ---- combine_bwd ---- */

/* g of token t: the gradient of the sum before it was scaled. */
static void gradient(const xp_combine_bwd_args *a, int64_t t, double *g) {
    const int64_t h_n = a->dy.dim[1];
    const xp_dtype act = a->dy.dtype;
    xp_dense_read(&a->dy, xp_dense_at(&a->dy, t, 0, 0, 0), h_n, g);
    for (int64_t h = 0; h < h_n; h++)
        g[h] = xp_dense_round(act, scaled(a->dialect, a->pos.dim[1], act, g[h]));
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
        const double w = weight_of(s->a->dialect, &s->a->w, t, k);
        gradient(s->a, t, s->wide);
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

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_bwd_args *a = args;
    const int ranks = m->axis[XP_EP]->size;
    return xp_dense_away_ws(ranks, a->counts.dim[0]) + 2 * xp_dense_room(a->dy.dim[1], sizeof(double)) +
           xp_dense_room(a->back.dim[0], sizeof(int64_t)) + xp_dense_share_ws(ranks, XP_F64, a->dy.dim[1]);
}

static void weight_gradients(const xp_combine_bwd_args *a, double *g, double *other) {
    const int64_t h_n = a->dy.dim[1], k_n = a->pos.dim[1];
    for (int64_t i = 0; i < a->dy.dim[0] * k_n; i++) {
        const int64_t t = i / k_n, k = i % k_n;
        const source s = source_of(a->dialect, &a->pos, &a->idx, a->counts.dim[0], t, k, &a->back, &a->x);
        double dw = 0;
        if (s.from && a->dialect->weight_at == XP_AT_OUTPUT) {
            gradient(a, t, g);
            xp_dense_read(s.from, xp_dense_at(s.from, s.row, 0, 0, 0), h_n, other);
            dw = xp_dense_dot(g, other, h_n);
        }
        xp_dense_put(&a->dw, xp_dense_at(&a->dw, t, k, 0, 0), dw);
    }
}

/* All identity slots of a token multiply one row: their weights add up first. Without one it is 0, whatever dy is. */
static void token_gradients(const xp_combine_bwd_args *a, double *g) {
    const int64_t h_n = a->dy.dim[1];
    for (int64_t t = 0; t < a->dy.dim[0]; t++) {
        double w = 0;
        int slots = 0;
        for (int64_t k = 0; k < a->pos.dim[1]; k++) {
            if (!source_of(a->dialect, &a->pos, &a->idx, a->counts.dim[0], t, k, NULL, &a->x).from)
                continue;
            w += weight_of(a->dialect, &a->w, t, k);
            slots++;
        }
        gradient(a, t, g);
        for (int64_t h = 0; h < h_n; h++)
            g[h] = slots ? g[h] * w : 0;
        xp_dense_write(&a->dx, xp_dense_at(&a->dx, t, 0, 0, 0), h_n, g);
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
    for (int64_t i = 0; i < a->dy.dim[0] * k_n; i++) {
        const int64_t m = xp_dense_int(&a->pos, xp_dense_at(&a->pos, i / k_n, i % k_n, 0, 0));
        if (m >= 0)
            slot[m] = i;
    }
    for (int64_t c = 0; c < xp_dense_int(&a->recv_offsets, away.l_n); c++)
        xp_dense_zero(&a->dout, xp_dense_at(&a->dout, c, 0, 0, 0), h_n);
    weight_gradients(a, wide, other);
    if (is_identity(a->dialect))
        token_gradients(a, wide);
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
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_combine_bwd = {
    .stage = &xp_stage_combine_bwd,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
