/* Second formulation of stage wgrad: for each block and group, outer products of every row that belongs there, found by
 * asking every row; a stripe of the gradient at a time. */
#include <string.h>

#include "dense.h"
#include "num.h"

enum { STRIPE = 32 }; /* rows of dw that share one pass over x */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const int64_t r_n = ((const xp_wgrad_args *)args)->x.dim[1];
    return xp_dense_room(STRIPE * r_n, sizeof(double)) + xp_dense_room(r_n, sizeof(double)) +
           xp_dense_room(STRIPE, sizeof(double));
}

/* Whether row c counts in slot b of the blocks. With fold, one slot takes the tokens of all blocks. */
static int in_block(const xp_wgrad_args *a, int64_t c, int64_t b) {
    if (a->block <= 0)
        return 1;
    const int64_t tok = xp_dense_int(&a->tok, c);
    if (tok < 0)
        return 0;
    return a->fold ? 1 : tok / a->block == xp_dense_int(&a->blocks, b);
}

/* sum [n,R] = outer products of columns [lo, lo+n) of dy with x. */
static void stripe(const xp_wgrad_args *a, int64_t b, int64_t l, int64_t lo, int64_t n, double *sum, double *x,
                   double *dy) {
    const int64_t r_n = a->x.dim[1];
    memset(sum, 0, (size_t)(n * r_n) * sizeof *sum);
    for (int64_t c = 0; c < a->x.dim[0]; c++) {
        if (c < xp_dense_int(&a->offsets, l) || c >= xp_dense_int(&a->offsets, l + 1) || !in_block(a, c, b))
            continue;
        xp_dense_read(&a->x, xp_dense_at(&a->x, c, 0, 0, 0), r_n, x);
        xp_dense_read(&a->dy, xp_dense_at(&a->dy, c, lo, 0, 0), n, dy);
        for (int64_t i = 0; i < n; i++)
            xp_dense_axpy(dy[i], x, r_n, sum + i * r_n);
    }
}

static xp_status run(const xp_exec *e, const void *args) {
    const xp_wgrad_args *a = args;
    const int64_t n_n = a->dw.dim[2], r_n = a->x.dim[1], l_n = a->dw.dim[1];
    char *ws = e->ws;
    double *sum = xp_dense_carve(&ws, STRIPE * r_n, sizeof *sum);
    double *x = xp_dense_carve(&ws, r_n, sizeof *x);
    double *dy = xp_dense_carve(&ws, STRIPE, sizeof *dy);
    for (int64_t i = 0; i < a->dw.dim[0] * l_n; i++) {
        const int64_t b = i / l_n, l = i % l_n;
        for (int64_t lo = 0; lo < n_n; lo += STRIPE) {
            const int64_t n = n_n - lo < STRIPE ? n_n - lo : STRIPE;
            stripe(a, b, l, lo, n, sum, x, dy);
            for (int64_t j = 0; j < n; j++)
                xp_dense_write(&a->dw, xp_dense_at(&a->dw, b, l, lo + j, 0), r_n, sum + j * r_n);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_wgrad = {
    .stage = &xp_stage_wgrad,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
