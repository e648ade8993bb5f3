/* Communication of the second formulation: everybody shows everything, and each rank picks what is its own.
 *
 * Rows are shown a few at a time, so that workspace depends on no other rank's sizes. Only mesh operations; all ranks
 * of the communicator make the same calls, those without rows too. Nobody outside ref/dense/ includes it. */
#ifndef XP_DENSE_SHARE_H
#define XP_DENSE_SHARE_H

#include "xp/kernel.h"

enum { XP_DENSE_SHARE_ROWS = 32 }; /* rows of each rank in one round */

typedef struct {
    xp_comm *comm;
    xp_queue *q;
    xp_dtype dtype;
    int64_t width;
    const int64_t *rows; /* [P] rows that each rank shows, the same on all ranks */
    /* Writes this rank's row number `row`, width elements, to dst. */
    void (*show)(const void *ctx, int64_t row, void *dst);
    /* Sees row number `row` of rank `from`. */
    void (*see)(const void *ctx, int from, int64_t row, const void *src);
    const void *ctx;
} xp_dense_share;

size_t xp_dense_share_ws(int ranks, xp_dtype d, int64_t width);
xp_status xp_dense_share_run(const xp_dense_share *s, void *ws);

/* out [P,n] = every rank's n values of dtype d (I64, U64 or F64), in rank order. ones: room for P counts. */
xp_status xp_dense_all(const xp_exec *x, xp_comm *c, xp_dtype d, void *mine, int64_t n, void *out, int64_t *ones);

#endif
