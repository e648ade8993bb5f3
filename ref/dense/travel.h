/* Where a row belongs after it was shown to everybody: on the rank of its expert, or back at home. Nobody outside
 * ref/dense/ includes it. */
#ifndef XP_DENSE_TRAVEL_H
#define XP_DENSE_TRAVEL_H

#include "share.h"

/* Home rows seen from an expert's rank. */
typedef struct {
    int me;
    int64_t e_n, l_n;
    int64_t *counts;  /* [P,E] rows of each rank for each expert */
    int64_t *offsets; /* [P,E+1] their first rows */
    int64_t *used;    /* [P] rows in use at home */
} xp_dense_away;

/* counts [E], offsets [E+1] of this rank. Collective over ep; ws moves on by xp_dense_away_ws bytes. */
size_t xp_dense_away_ws(int ranks, int64_t e_n);
xp_status xp_dense_away_open(const xp_exec *x, const xp_tensor *counts, const xp_tensor *offsets, char **ws,
                             xp_dense_away *out);
/* The row here of row `row` of rank `from`, by (local expert, source rank, order at the source); -1: not for us. */
int64_t xp_dense_away_place(const xp_dense_away *w, const xp_tensor *recv_offsets, int from, int64_t row);

/* Experts' rows seen from home. */
typedef struct {
    int me, ranks;
    int64_t l_n;
    int64_t *counts;  /* [P,P,L] rows that each expert rank has from each rank for each of its experts */
    int64_t *offsets; /* [P,L+1] their first rows */
    int64_t *used;    /* [P] rows in use there */
} xp_dense_home;

/* recv_counts [P,L], recv_offsets [L+1] of this rank. */
size_t xp_dense_home_ws(int ranks, int64_t l_n);
xp_status xp_dense_home_open(const xp_exec *x, const xp_tensor *recv_counts, const xp_tensor *recv_offsets, char **ws,
                             xp_dense_home *out);
/* The home row of row `row` of expert rank `from`; -1: not ours. */
int64_t xp_dense_home_place(const xp_dense_home *h, const xp_tensor *offsets, int from, int64_t row);

#endif
