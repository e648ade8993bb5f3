/* Linear maps of whole tensors, a few rows at a time. Nobody outside ref/dense/ includes it. */
#ifndef XP_DENSE_LINEAR_H
#define XP_DENSE_LINEAR_H

#include "xp/tensor.h"

enum { XP_DENSE_ROWS = 16 }; /* rows that share one pass over a weight */

/* y [T,N] = x [T,K] w [N,K]^T (+ bias [N], may be absent); dx [T,K] = dy [T,N] w. ws: xp_dense_linear_ws bytes. */
size_t xp_dense_linear_ws(const xp_tensor *w);
void xp_dense_linear(const xp_tensor *x, const xp_tensor *w, const xp_tensor *bias, const xp_tensor *y, void *ws);
void xp_dense_linear_back(const xp_tensor *dy, const xp_tensor *w, const xp_tensor *dx, void *ws);

#endif
