/* Second formulation of stages expert and expert_bwd: every expert looks at every row and computes those that are its
 * own, rounded where xp/expert.h says so. */
#include "dense.h"
#include "mlp.h"
#include "num.h"

/* Of the rows from *at on, the next that belong to expert l, at most XP_DENSE_ROWS; moves *at behind them. */
static int64_t members(const xp_tensor *offsets, int64_t l, int64_t row0, int64_t rows, int64_t *at, int64_t *out) {
    int64_t m = 0;
    for (; *at < rows && m < XP_DENSE_ROWS; ++*at) {
        const int64_t row = row0 + *at;
        if (row >= xp_dense_int(offsets, l) && row < xp_dense_int(offsets, l + 1))
            out[m++] = *at;
    }
    return m;
}

static void read_members(const xp_tensor *t, const int64_t *member, int64_t m, double *out) {
    for (int64_t i = 0; i < m; i++)
        xp_dense_read(t, xp_dense_at(t, member[i], 0, 0, 0), t->dim[1], out + i * t->dim[1]);
}

static void write_members(const xp_tensor *t, const int64_t *member, int64_t m, const double *v) {
    for (int64_t i = 0; i < m; i++)
        xp_dense_write(t, xp_dense_at(t, member[i], 0, 0, 0), t->dim[1], v + i * t->dim[1]);
}

/* Row l, or an absent tensor. */
static xp_tensor bias_of(const xp_tensor *b, int64_t l) {
    return b->data ? xp_dense_plane(b, l) : (xp_tensor){.data = NULL};
}

static const char *why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_mlp_why_not(((const xp_expert_args *)args)->dialect);
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_expert_args *a = args;
    return xp_dense_mlp_ws(&a->w1, &a->w2);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_expert_args *a = args;
    char *ws = x->ws;
    const xp_dense_mlp b = xp_dense_mlp_carve(a->dialect, a->x.dtype, &a->w1, &a->w2, &ws);
    for (int64_t l = 0; l < a->w1.dim[0]; l++) {
        const xp_tensor w1 = xp_dense_plane(&a->w1, l), w2 = xp_dense_plane(&a->w2, l);
        const xp_tensor b1 = bias_of(&a->b1, l), b2 = bias_of(&a->b2, l);
        int64_t at = 0, m;
        while ((m = members(&a->offsets, l, a->row0, a->x.dim[0], &at, b.member)) > 0) {
            read_members(&a->x, b.member, m, b.x);
            xp_dense_mlp_in(&b, m, &w1, &b1);
            write_members(&a->pre, b.member, m, b.pre);
            xp_dense_mlp_act(&b, m);
            write_members(&a->act, b.member, m, b.act);
            xp_dense_mlp_out(&b, m, &w2, &b2);
            xp_dense_mlp_leave(&b, m * b.h_n, b.y);
            write_members(&a->y, b.member, m, b.y);
        }
    }
    return XP_OK;
}

static const char *bwd_why_not(const void *args, const xp_mesh *m) {
    (void)m;
    return xp_dense_mlp_why_not(((const xp_expert_bwd_args *)args)->dialect);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_expert_bwd_args *a = args;
    return xp_dense_mlp_ws(&a->w1, &a->w2);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_expert_bwd_args *a = args;
    char *ws = x->ws;
    const xp_dense_mlp b = xp_dense_mlp_carve(a->dialect, a->dy.dtype, &a->w1, &a->w2, &ws);
    for (int64_t l = 0; l < a->w1.dim[0]; l++) {
        const xp_tensor w1 = xp_dense_plane(&a->w1, l), w2 = xp_dense_plane(&a->w2, l);
        int64_t at = 0, m;
        while ((m = members(&a->offsets, l, a->row0, a->dy.dim[0], &at, b.member)) > 0) {
            read_members(&a->dy, b.member, m, b.y);
            read_members(&a->pre, b.member, m, b.pre);
            xp_dense_mlp_dpre(&b, m, &w2);
            write_members(&a->dpre, b.member, m, b.pre);
            xp_dense_mlp_dx(&b, m, &w1);
            xp_dense_mlp_leave(&b, m * b.h_n, b.x);
            write_members(&a->dx, b.member, m, b.x);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_expert = {
    .stage = &xp_stage_expert,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .why_not = why_not,
    .workspace = workspace,
    .run = run,
};
const xp_kernel xp_dense_expert_bwd = {
    .stage = &xp_stage_expert_bwd,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .why_not = bwd_why_not,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
