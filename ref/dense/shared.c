/* Second formulation of stages shared and shared_bwd: one expert for all tokens, scaled by a sigmoid where there is a
 * gate, or as many as the router weighs, each hidden unit by its expert's weight; rounded where xp/shared.h says so. */
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

/* The router's weight of row i for hidden unit f, as the parameters' dtype holds it. */
static double gamma_at(const xp_tensor *gamma, const xp_dense_mlp *b, int64_t i, int64_t f) {
    const int64_t expert = f * gamma->dim[1] / b->f_n;
    return xp_dense_round(b->unit.r, xp_dense_get(gamma, xp_dense_at(gamma, i, expert, 0, 0)));
}

static void weigh_rows(const xp_tensor *gamma, int64_t lo, int64_t m, const xp_dense_mlp *b) {
    xp_dense_round_all(b->unit.r, m * b->f_n, b->act);
    for (int64_t i = 0; i < m * b->f_n; i++)
        b->act[i] *= gamma_at(gamma, b, lo + i / b->f_n, i % b->f_n);
}

/* Column h of every expert's output, rounded one by one, and their sum. */
static void sum_experts(const xp_shared_args *a, int64_t m, const xp_dense_mlp *b) {
    const int64_t experts = a->gamma.dim[1], width = b->f_n / experts;
    xp_dense_round_all(b->unit.r, m * b->f_n, b->act);
    for (int64_t h = 0; h < b->h_n; h++) {
        xp_dense_read(&a->w2, xp_dense_at(&a->w2, h, 0, 0, 0), b->f_n, b->wide);
        for (int64_t i = 0; i < m; i++) {
            double sum = 0;
            for (int64_t e = 0; e < experts; e++) {
                const double out = xp_dense_dot(b->act + i * b->f_n + e * width, b->wide + e * width, width);
                sum += experts == 1 ? out : xp_dense_round(b->unit.r, out);
            }
            b->y[i * b->h_n + h] = sum;
        }
    }
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
        if (a->gamma.data)
            weigh_rows(&a->gamma, lo, m, &b);
        xp_dense_write_rows(&a->act, lo, m, b.act);
        if (a->gamma.data)
            sum_experts(a, m, &b);
        else
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

/* dgamma, expert by expert, from the rows' own activations; then act, the weighed one's gradient, loses the weight. */
static void weigh_rows_back(const xp_shared_bwd_args *a, int64_t lo, int64_t m, const xp_dense_mlp *b) {
    const int64_t experts = a->gamma.dim[1], width = b->f_n / experts;
    const xp_dialect *d = a->dialect;
    for (int64_t n = 0; n < m * experts; n++) {
        const int64_t i = n / experts, e = n % experts;
        const double *pre = b->pre + i * b->u_n;
        double sum = 0;
        for (int64_t f = e * width; f < (e + 1) * width; f++) {
            const int64_t up = xp_dense_up_at(d, b->f_n, f);
            const double unit = xp_dense_unit_run(&b->unit, pre[xp_dense_gate_at(d, f)], up < 0 ? 0 : pre[up]);
            sum += xp_dense_round(b->unit.r, unit) * b->act[i * b->f_n + f];
        }
        xp_dense_put(&a->dgamma, xp_dense_at(&a->dgamma, lo + i, e, 0, 0), sum);
    }
    weigh_rows(&a->gamma, lo, m, b);
    xp_dense_round_all(b->unit.r, m * b->f_n, b->act);
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
        xp_dense_mlp_dact(&b, m, &a->w2);
        if (a->gamma.data)
            weigh_rows_back(a, lo, m, &b);
        xp_dense_mlp_dunit(&b, m);
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
