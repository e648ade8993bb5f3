/* xp_dense_share: rounds of all-gather over rows that two functions pack and unpack.
 *
 * The number of rounds follows from the longest rank alone, which every rank knows: nobody can leave early. */
#include "share.h"
#include "num.h"

size_t xp_dense_share_ws(int ranks, xp_dtype d, int64_t width) {
    const size_t row = xp_dtype_bytes(d, width);
    return xp_dense_room(ranks, sizeof(int64_t)) + xp_dense_room(XP_DENSE_SHARE_ROWS, row) +
           xp_dense_room((int64_t)ranks * XP_DENSE_SHARE_ROWS, row);
}

static int64_t rows_in_round(int64_t rows, int64_t lo) {
    const int64_t left = rows - lo;
    return left < 0 ? 0 : (left < XP_DENSE_SHARE_ROWS ? left : XP_DENSE_SHARE_ROWS);
}

xp_status xp_dense_share_run(const xp_dense_share *s, void *ws) {
    const int ranks = s->comm->size, me = s->comm->rank;
    const size_t row = xp_dtype_bytes(s->dtype, s->width);
    char *at = ws;
    int64_t *n = xp_dense_carve(&at, ranks, sizeof *n);
    char *mine = xp_dense_carve(&at, XP_DENSE_SHARE_ROWS, row);
    char *all = xp_dense_carve(&at, (int64_t)ranks * XP_DENSE_SHARE_ROWS, row);
    int64_t longest = 0;
    for (int r = 0; r < ranks; r++)
        longest = s->rows[r] > longest ? s->rows[r] : longest;
    for (int64_t lo = 0; lo < longest; lo += XP_DENSE_SHARE_ROWS) {
        int64_t total = 0;
        for (int r = 0; r < ranks; r++)
            total += n[r] = rows_in_round(s->rows[r], lo);
        for (int64_t i = 0; i < n[me]; i++)
            s->show(s->ctx, lo + i, mine + (size_t)i * row);
        const xp_tensor src = xp_tensor_2d(mine, s->dtype, n[me], s->width);
        xp_tensor dst = xp_tensor_2d(all, s->dtype, total, s->width);
        XP_TRY(s->comm->ops->all_gather(s->comm, s->q, &src, n, &dst));
        const char *p = all;
        for (int r = 0; r < ranks; r++) {
            for (int64_t i = 0; i < n[r]; i++, p += row)
                s->see(s->ctx, r, lo + i, p);
        }
    }
    return XP_OK;
}

xp_status xp_dense_all(const xp_exec *x, xp_comm *c, xp_dtype d, void *mine, int64_t n, void *out, int64_t *ones) {
    for (int r = 0; r < c->size; r++)
        ones[r] = 1;
    const xp_tensor src = xp_tensor_2d(mine, d, 1, n);
    xp_tensor dst = xp_tensor_2d(out, d, c->size, n);
    return c->ops->all_gather(c, x->q, &src, ones, &dst);
}
