/* Second formulation of stages shared and shared_bwd: one expert for all tokens, scaled by a sigmoid where there is a
 * gate, rounded where xp/shared.h says so. */
#include "dense.h"
#include "mlp.h"
#include "num.h"

static int64_t group_of(int64_t t_n, int64_t lo) {
    return t_n - lo < XP_DENSE_ROWS ? t_n - lo : XP_DENSE_ROWS;
}

static const char *why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_mlp_why_not(((const xp_shared_args *)args)->dialect);
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_args *a = args;
    return xp_dense_mlp_ws(&a->w1, &a->w2);
}

/* mlp, rounded in place, times the sigmoid of <x, gate>; x is rounded already. */
static void gate_rows(const xp_shared_args *a, int64_t lo, int64_t m, const xp_dense_mlp *b) {
    const xp_dtype r = b->unit.r;
    xp_dense_read(&a->gate, 0, b->h_n, b->wide);
    xp_dense_round_all(b->outside, m * b->h_n, b->y);
    for (int64_t i = 0; i < m; i++) {
        double sig = xp_dense_sigmoid(xp_dense_round(r, xp_dense_dot(b->x + i * b->h_n, b->wide, b->h_n)));
        xp_dense_mlp_leave(b, 1, &sig);
        xp_dense_put(&a->sig, xp_dense_at(&a->sig, lo + i, 0, 0, 0), sig);
        sig = xp_dense_round(b->outside, sig);
        for (int64_t h = 0; h < b->h_n; h++)
            b->y[i * b->h_n + h] *= sig;
    }
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_shared_args *a = args;
    char *ws = x->ws;
    xp_dense_mlp b = xp_dense_mlp_carve(a->dialect, a->x.dtype, &a->w1, &a->w2, &ws);
    b.unit.limit = xp_dialect_shared_limit(a->dialect);
    const int64_t t_n = a->x.dim[0];
    for (int64_t lo = 0; lo < t_n; lo += XP_DENSE_ROWS) {
        const int64_t m = group_of(t_n, lo);
        xp_dense_read_rows(&a->x, lo, m, b.x);
        xp_dense_mlp_in(&b, m, &a->w1, NULL);
        xp_dense_write_rows(&a->pre, lo, m, b.pre);
        xp_dense_mlp_act(&b, m);
        xp_dense_write_rows(&a->act, lo, m, b.act);
        xp_dense_mlp_out(&b, m, &a->w2, NULL);
        xp_dense_mlp_leave(&b, m * b.h_n, b.y);
        xp_dense_write_rows(&a->mlp, lo, m, b.y);
        if (a->gate.data)
            gate_rows(a, lo, m, &b);
        xp_dense_write_rows(&a->y, lo, m, b.y);
    }
    return XP_OK;
}

static const char *bwd_why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_mlp_why_not(((const xp_shared_bwd_args *)args)->dialect);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_shared_bwd_args *a = args;
    return xp_dense_mlp_ws(&a->w1, &a->w2);
}

/* Through y = sig mlp: the m rows of b->y turn from dy to dmlp, and dz is written. */
static void gate_rows_back(const xp_shared_bwd_args *a, int64_t lo, int64_t m, const xp_dense_mlp *b) {
    for (int64_t i = 0; i < m; i++) {
        double *dy = b->y + i * b->h_n;
        const double sig = xp_dense_get(&a->sig, xp_dense_at(&a->sig, lo + i, 0, 0, 0));
        xp_dense_read(&a->mlp, xp_dense_at(&a->mlp, lo + i, 0, 0, 0), b->h_n, b->wide);
        const double along = xp_dense_dot(dy, b->wide, b->h_n);
        xp_dense_put(&a->dz, xp_dense_at(&a->dz, lo + i, 0, 0, 0), along * (sig * (1 - sig)));
        for (int64_t h = 0; h < b->h_n; h++)
            dy[h] *= sig;
    }
}

/* dx += dz v: dy is read again. */
static void gate_rows_dx(const xp_shared_bwd_args *a, int64_t lo, int64_t m, const xp_dense_mlp *b) {
    for (int64_t i = 0; i < m; i++) {
        const double sig = xp_dense_get(&a->sig, xp_dense_at(&a->sig, lo + i, 0, 0, 0));
        double *dy = b->y;
        xp_dense_read(&a->dy, xp_dense_at(&a->dy, lo + i, 0, 0, 0), b->h_n, dy);
        xp_dense_read(&a->mlp, xp_dense_at(&a->mlp, lo + i, 0, 0, 0), b->h_n, b->wide);
        const double dz = xp_dense_round(b->outside, xp_dense_dot(dy, b->wide, b->h_n) * (sig * (1 - sig)));
        xp_dense_read(&a->gate, 0, b->h_n, b->wide);
        xp_dense_axpy(dz, b->wide, b->h_n, b->x + i * b->h_n);
    }
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_shared_bwd_args *a = args;
    char *ws = x->ws;
    xp_dense_mlp b = xp_dense_mlp_carve(a->dialect, a->dy.dtype, &a->w1, &a->w2, &ws);
    b.unit.limit = xp_dialect_shared_limit(a->dialect);
    const int64_t t_n = a->dy.dim[0];
    for (int64_t lo = 0; lo < t_n; lo += XP_DENSE_ROWS) {
        const int64_t m = group_of(t_n, lo);
        xp_dense_read_rows(&a->dy, lo, m, b.y);
        xp_dense_read_rows(&a->pre, lo, m, b.pre);
        if (a->gate.data)
            gate_rows_back(a, lo, m, &b);
        xp_dense_write_rows(&a->dmlp, lo, m, b.y);
        xp_dense_round_all(b.outside, m * b.h_n, b.y);
        xp_dense_mlp_dpre(&b, m, &a->w2);
        xp_dense_write_rows(&a->dpre, lo, m, b.pre);
        xp_dense_mlp_dx(&b, m, &a->w1);
        if (a->gate.data)
            gate_rows_dx(a, lo, m, &b);
        xp_dense_mlp_leave(&b, m * b.h_n, b.x);
        xp_dense_write_rows(&a->dx, lo, m, b.x);
    }
    return XP_OK;
}

const xp_kernel xp_dense_shared = {
    .stage = &xp_stage_shared,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .why_not = why_not,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_shared_bwd = {
    .stage = &xp_stage_shared_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .why_not = bwd_why_not,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
