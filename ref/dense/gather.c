/* Second formulation of stage gather: every rank shows its rows of the master copy as they are, and each rank rounds
 * what it sees into its own full parameter. No rank relies on another's rounding. */
#include <string.h>

#include "dense.h"
#include "num.h"
#include "share.h"

typedef struct {
    const xp_gather_args *a;
    double *wide; /* [N] */
    int me;
} gathering;

/* Row number i of a rank that holds n rows of every group: group i / n, row i % n. */
static void show(const void *ctx, int64_t row, void *dst) {
    const gathering *g = ctx;
    const int64_t n = g->a->rows[g->me];
    const void *src = xp_tensor_at(&g->a->shard, row / n, row % n, 0, 0);
    memcpy(dst, src, xp_dtype_bytes(g->a->shard.dtype, g->a->shard.dim[2]));
}

static void see(const void *ctx, int from, int64_t row, const void *src) {
    const gathering *g = ctx;
    const xp_tensor *full = &g->a->full;
    const int64_t n = g->a->rows[from];
    xp_widen_row(src, g->a->shard.dtype, 0, full->dim[2], g->wide);
    xp_dense_write(full, xp_dense_at(full, row / n, g->a->start[from] + row % n, 0, 0), full->dim[2], g->wide);
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_gather_args *a = args;
    const int ranks = m->axis[a->axis]->size;
    return xp_dense_room(a->full.dim[2], sizeof(double)) + xp_dense_room(ranks, sizeof(int64_t)) +
           xp_dense_share_ws(ranks, a->shard.dtype, a->full.dim[2]);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_gather_args *a = args;
    xp_comm *c = x->mesh->axis[a->axis];
    char *ws = x->ws;
    double *wide = xp_dense_carve(&ws, a->full.dim[2], sizeof *wide);
    int64_t *rows = xp_dense_carve(&ws, c->size, sizeof *rows);
    for (int r = 0; r < c->size; r++)
        rows[r] = a->full.dim[0] * a->rows[r];
    const gathering ctx = {.a = a, .wide = wide, .me = c->rank};
    const xp_dense_share s = {.comm = c,
                              .q = x->q,
                              .dtype = a->shard.dtype,
                              .width = a->full.dim[2],
                              .rows = rows,
                              .show = show,
                              .see = see,
                              .ctx = &ctx};
    return xp_dense_share_run(&s, ws);
}

const xp_kernel xp_dense_gather = {
    .stage = &xp_stage_gather,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
