/* Planes of doubles in a workspace: where they lie, and rows of operands in and out of them.
 *
 * The stages of the experts work on chunks of rows that are widened once; this is all that widening and narrowing
 * takes. It must not round but in xp_ref_rows_store, to the operand's own dtype. */
#ifndef XP_REF_PLANE_H
#define XP_REF_PLANE_H

#include "xp/tensor.h"

/* A workspace that is laid out, or only measured (base NULL): one function states a layout for both. */
typedef struct {
    char *base;
    size_t bytes;
} xp_ref_layout;
/* The next block, at a multiple of 64; NULL when measuring. */
void *xp_ref_take(xp_ref_layout *l, size_t bytes);
/* A vector widened into the next block; NULL when it is absent (it takes no block) or when measuring. */
const double *xp_ref_take_widened(xp_ref_layout *l, const xp_tensor *t);

/* Rows [row, row+m) of a matrix from and to n doubles a row. */
void xp_ref_rows_load(const xp_tensor *t, int64_t row, int64_t m, double *out);
void xp_ref_rows_store(const xp_tensor *t, int64_t row, int64_t m, const double *v);
/* Matrix l of [L,R,C]; row l of [L,N] as a vector. */
xp_tensor xp_ref_matrix(const xp_tensor *t, int64_t l);
xp_tensor xp_ref_vector(const xp_tensor *t, int64_t l);

#endif
