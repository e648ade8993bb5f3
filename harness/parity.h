/* A mesh against one rank: the bits of every logical row of a one-rank run are kept as hashes, and the same rows of a
 * run on a mesh are compared against them. A token's rows have the same bits on every mesh; a gradient's rows have in
 * deterministic mode. Outside it a gradient's values are kept, each with a tolerance: how far it may be from the exact
 * sum; two runs may differ by both tolerances together.
 *
 * A row is a token's row of an activation or a row of a parameter's gradient, named by (site, layer, step, global row).
 * A row that one side has and the other has not is a difference. */
#ifndef XP_PARITY_H
#define XP_PARITY_H

#include <stdio.h>

#include "xp/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct xp_parity xp_parity;

xp_status xp_parity_open(xp_parity **out);
void xp_parity_close(xp_parity *p);
/* From now on rows are compared with what was recorded, instead of recorded. */
void xp_parity_compare(xp_parity *p);
/* Rows [0, dim0) of t are the global rows row0, row0 + 1, ... of (site, layer, step); rows_total is the number of rows
 * of the whole logical tensor. Safe to call from every rank's thread. XP_E_NOMEM. */
xp_status xp_parity_rows(xp_parity *p, const char *site, int layer, int step, int rank, const xp_tensor *t,
                         int64_t row0, int64_t rows_total);

/* As xp_parity_rows, by bound: t and tol (f64, the shape of t) are this run's values and their distances from the exact
 * ones. Of a tensor of many elements every n-th row is kept, n odd, so that a set stays below 32 MiB; the other rows
 * are not counted as compared. */
xp_status xp_parity_values(xp_parity *p, const char *site, int layer, int step, int rank, const xp_tensor *t,
                           const xp_tensor *tol, int64_t row0, int64_t rows_total);

/* Adds the slots that a rank's experts dropped. Each rank counts its own tokens against an expert's capacity, so once a
 * slot was dropped, in either run, nothing is compared: xp_parity_result has no line. p may be NULL. */
void xp_parity_dropped(xp_parity *p, int64_t slots);
int64_t xp_parity_slots(const xp_parity *p);

typedef struct {
    char site[80];
    int layer, step;
    int64_t rows, elements; /* compared */
    int64_t different;      /* rows whose bits differ, or that are out of bounds */
    int64_t missing;        /* recorded rows that never came */
    int64_t first;          /* the first different global row, -1 */
    int rank;               /* the rank that held it */
    int by_bound;           /* 0: by bits */
    double ratio;           /* by bound: the largest |here - there| / (both tolerances) */
} xp_parity_line;
/* Line i of the result in order of first recording; 0 when there is no line i. */
int xp_parity_result(const xp_parity *p, int i, xp_parity_line *out);

#ifdef __cplusplus
}
#endif
#endif
