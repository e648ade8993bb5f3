/* What the stages that move rows share: workspace carving, the path of rows between their home and their expert's rank,
 * and two formulas of the bounds.
 *
 * dispatch, combine and their gradients are one movement in two directions, stated here once. It must know nothing of
 * what the rows mean. */
#ifndef XP_REF_MOVE_H
#define XP_REF_MOVE_H

#include "xp/kernel.h"

/* ---- workspace ---- */

/* Bytes that a block takes when blocks start at multiples of 64; and the next block of a workspace. */
size_t xp_ref_span(size_t bytes);
void *xp_ref_carve(char **at, size_t bytes);

/* ---- integers of index tensors ---- */

/* 1 when the host can read the tensor's data: checks of contents are for these only. */
int xp_ref_readable(const xp_tensor *t);
/* Element i of an i64 vector; element (i, j) of an i64 matrix. */
int64_t xp_ref_i64(const xp_tensor *t, int64_t i);
int64_t xp_ref_i64_2d(const xp_tensor *t, int64_t i, int64_t j);
/* Element (i, j) of an i32 matrix (j 0: of a vector); element i of a u8 vector. */
int32_t xp_ref_i32(const xp_tensor *t, int64_t i, int64_t j);
int xp_ref_u8(const xp_tensor *t, int64_t i);

/* Rows of an expert's segment with n in use: at least `least`, a multiple of align. */
int64_t xp_ref_segment_rows(int64_t n, int64_t least, int align);

/* ---- the path of rows over ep ---- */

/* Experts are split over P ranks in contiguous blocks of L. At home, expert e's rows lie at offsets[e]; at its rank,
 * the rows of local expert l lie at recv_offsets[l], by source rank and then in the source's order. Behind the rows of
 * each segment come pads up to the next offset; pads never travel. */
typedef struct {
    const xp_tensor *counts, *offsets;           /* [E], [E+1] i64 */
    const xp_tensor *recv_counts, *recv_offsets; /* [P,L], [L+1] i64 */
} xp_ref_path;

/* P is the size of ep, E is P*L, counts are not negative, offsets ascend and leave room for the counts, all inside
 * home_rows and away_rows (below 0: what recv_* hold is not known yet). XP_E_ARG naming stage, tensor and value.
 * Contents are looked at where the host can read them. */
xp_status xp_ref_path_check(const char *stage, const xp_ref_path *p, const xp_comm *ep, int64_t home_rows,
                            int64_t away_rows);

/* Bytes of `ws` below for rows of home [M] or [M,H] and away [C] or [C,H], both of one dtype. */
size_t xp_ref_path_ws(const xp_tensor *home, const xp_tensor *away, int ranks);
/* Rows go from home to their expert's rank, or back; bits are kept. Every byte of a pad row of the destination becomes
 * `pad`; rows behind the last offset are not touched. Every rank of ep calls these alike, with or without rows. */
xp_status xp_ref_path_away(const xp_exec *x, const xp_ref_path *p, const xp_tensor *home, const xp_tensor *away,
                           int pad, void *ws);
xp_status xp_ref_path_home(const xp_exec *x, const xp_ref_path *p, const xp_tensor *away, const xp_tensor *home,
                           int pad, void *ws);

/* Rows without pads at this rank's home (away 0) or at its experts (away 1), and how many of them belong to other
 * ranks; 0 when the counts are not readable. */
double xp_ref_path_rows(const xp_ref_path *p, int away);
double xp_ref_path_remote(const xp_ref_path *p, const xp_comm *ep, int away);

/* A property of both directions: as many rows lie at the experts as at home over all of ep, and their bits are the same
 * up to order (wrapping sums of row hashes). Communicates: every rank of ep calls it. out is 0, or 2 when they differ.
 */
xp_status xp_ref_path_conserved(const xp_ref_path *p, xp_comm *ep, const xp_tensor *home, const xp_tensor *away,
                                double *out);

/* FNV-1a over the codes of n elements from base[0], chained from h (0 to start). */
uint64_t xp_ref_hash(const void *base, xp_dtype d, int64_t n, uint64_t h);

/* ---- bounds ---- */

/* Distance of two sums of the same terms, each term and the sum touched by at most n roundings: one in acc in any order
 * (gamma_n in acc), one in double as the reference has it. gauge is the sum of magnitudes as computed in double, with n
 * roundings too few at most; each product may also lose half the smallest value of acc, `products` times. */
double xp_ref_sum_err(int64_t n, xp_dtype acc, double gauge, int64_t products);
/* What one rounding to d adds for a value that lies within e of v, e included: infinite when it may overflow. */
double xp_ref_round_err(xp_dtype d, double v, double e);

#endif
