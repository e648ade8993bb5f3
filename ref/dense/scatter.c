/* Second formulation of stage scatter: every rank shows its whole gradient, a few rows of one block at a time, and each
 * rank adds up the rows that it is to hold, in double; one division, no rounding in between. */
#include <string.h>

#include "dense.h"
#include "num.h"
#include "share.h"

enum { WINDOW = 32 }; /* rows of the parameter in one round */

typedef struct {
    const xp_scatter_args *a;
    xp_comm *comm;
    int64_t *blocks; /* [P] blocks that each rank brings */
    int64_t *word;   /* [P] */
    int64_t *ones;   /* [P] */
    int64_t longest; /* the most blocks of a rank */
    int64_t *n;      /* [P] rows of one round */
    double *sum;     /* [WINDOW,N] */
    double *wide;    /* [N] */
    char *mine;      /* [WINDOW,N] grad */
    char *all;       /* [P*WINDOW,N] grad */
} scattering;

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_scatter_args *a = args;
    const int64_t ranks = m->axis[a->axis]->size, n = a->grad.dim[3];
    const size_t row = xp_dtype_bytes(a->grad.dtype, n);
    return 4 * xp_dense_room(ranks, sizeof(int64_t)) + xp_dense_room(WINDOW * n, sizeof(double)) +
           xp_dense_room(n, sizeof(double)) + xp_dense_room(WINDOW, row) + xp_dense_room(ranks * WINDOW, row);
}

static scattering carve(const xp_exec *x, const xp_scatter_args *a) {
    scattering s = {.a = a, .comm = x->mesh->axis[a->axis]};
    const int64_t ranks = s.comm->size, n = a->grad.dim[3];
    const size_t row = xp_dtype_bytes(a->grad.dtype, n);
    char *ws = x->ws;
    s.blocks = xp_dense_carve(&ws, ranks, sizeof *s.blocks);
    s.word = xp_dense_carve(&ws, ranks, sizeof *s.word);
    s.ones = xp_dense_carve(&ws, ranks, sizeof *s.ones);
    s.n = xp_dense_carve(&ws, ranks, sizeof *s.n);
    s.sum = xp_dense_carve(&ws, WINDOW * n, sizeof *s.sum);
    s.wide = xp_dense_carve(&ws, n, sizeof *s.wide);
    s.mine = xp_dense_carve(&ws, WINDOW, row);
    s.all = xp_dense_carve(&ws, ranks * WINDOW, row);
    return s;
}

/* Block numbers are shown one from each rank at a time; one of ours that another rank shows is the error. All ranks
 * learn of it, so that all leave together. */
static xp_status no_shared_block(const scattering *s, const xp_exec *x) {
    const xp_scatter_args *a = s->a;
    int64_t found = -1;
    for (int64_t j = 0; j < s->longest; j++) {
        int64_t mine = j < a->grad.dim[0] ? xp_dense_int(&a->blocks, j) : -1;
        XP_TRY(xp_dense_all(x, s->comm, XP_I64, &mine, 1, s->word, s->ones));
        for (int64_t i = 0; i < s->comm->size * a->grad.dim[0]; i++) {
            const int64_t from = i / a->grad.dim[0], block = xp_dense_int(&a->blocks, i % a->grad.dim[0]);
            if (from != s->comm->rank && s->word[from] == block)
                found = block;
        }
    }
    XP_TRY(xp_dense_all(x, s->comm, XP_I64, &found, 1, s->word, s->ones));
    for (int r = 0; r < s->comm->size; r++) {
        if (s->word[r] >= 0)
            return XP_FAIL(XP_E_ARG, "scatter: blocks: number %lld comes from more than one rank, expected one",
                           (long long)s->word[r]);
    }
    return XP_OK;
}

/* Adds block j's rows [lo, lo+n) of group g of every rank that has such a block. */
static xp_status add_block(const scattering *s, xp_queue *q, int64_t j, int64_t g, int64_t lo, int64_t n) {
    const xp_tensor *grad = &s->a->grad;
    const int64_t n_n = grad->dim[3];
    const size_t row = xp_dtype_bytes(grad->dtype, n_n);
    int64_t total = 0;
    for (int r = 0; r < s->comm->size; r++)
        total += s->n[r] = j < s->blocks[r] ? n : 0;
    for (int64_t i = 0; i < s->n[s->comm->rank]; i++)
        memcpy(s->mine + (size_t)i * row, xp_tensor_at(grad, j, g, lo + i, 0), row);
    const xp_tensor src = xp_tensor_2d(s->mine, grad->dtype, s->n[s->comm->rank], n_n);
    xp_tensor dst = xp_tensor_2d(s->all, grad->dtype, total, n_n);
    XP_TRY(s->comm->ops->all_gather(s->comm, q, &src, s->n, &dst));
    for (int64_t i = 0; i < total; i++) {
        xp_widen_row(s->all + (size_t)i * row, grad->dtype, 0, n_n, s->wide);
        xp_dense_axpy(1, s->wide, n_n, s->sum + i % n * n_n);
    }
    return XP_OK;
}

/* c = r(1 / pre). */
static double factor_of(const xp_scatter_args *a) {
    return a->pre == 0 || a->pre == 1 ? 1 : xp_dense_round(a->reduce_dtype, 1 / a->pre);
}

static double base_of(const xp_scatter_args *a, int64_t g, int64_t r, int64_t k) {
    return a->base.data ? xp_dense_get(&a->base, xp_dense_at(&a->base, g, r, k, 0)) : 0;
}

/* The divisor is used as f32, unless the gradient is f64. */
static void put_window(const scattering *s, int64_t g, int64_t lo, int64_t n) {
    const xp_scatter_args *a = s->a;
    const int64_t n_n = a->grad.dim[3], first = a->start[s->comm->rank];
    const double divisor = a->grad.dtype == XP_F64 ? a->divisor : (double)(float)a->divisor;
    const double factor = factor_of(a);
    for (int64_t i = 0; i < n; i++) {
        const int64_t r = lo + i - first;
        if (r < 0 || r >= a->rows[s->comm->rank])
            continue;
        for (int64_t k = 0; k < n_n; k++)
            s->sum[i * n_n + k] = (s->sum[i * n_n + k] * factor + base_of(a, g, r, k)) / divisor;
        xp_dense_write(&a->shard, xp_dense_at(&a->shard, g, r, 0, 0), n_n, s->sum + i * n_n);
    }
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_scatter_args *a = args;
    scattering s = carve(x, a);
    int64_t mine = a->grad.data ? a->grad.dim[0] : 0;
    XP_TRY(xp_dense_all(x, s.comm, XP_I64, &mine, 1, s.blocks, s.ones));
    for (int r = 0; r < s.comm->size; r++)
        s.longest = s.blocks[r] > s.longest ? s.blocks[r] : s.longest;
    if (a->fold_blocks)
        XP_TRY(no_shared_block(&s, x));
    for (int64_t g = 0; g < a->grad.dim[1]; g++) {
        for (int64_t lo = 0; lo < a->grad.dim[2]; lo += WINDOW) {
            const int64_t n = a->grad.dim[2] - lo < WINDOW ? a->grad.dim[2] - lo : WINDOW;
            memset(s.sum, 0, (size_t)(n * a->grad.dim[3]) * sizeof *s.sum);
            for (int64_t j = 0; j < s.longest; j++)
                XP_TRY(add_block(&s, x->q, j, g, lo, n));
            put_window(&s, g, lo, n);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_scatter = {
    .stage = &xp_stage_scatter,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
