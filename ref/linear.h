/* Dense products of the reference: double inputs against a weight matrix of any float dtype, sums in double.
 *
 * Every output is one chain of additions over the ascending reduction index, starting at +0, each product rounded
 * before it is added: the bits depend neither on blocking nor on m nor on the host. Weights are widened exactly, a tile
 * at a time, into the caller's workspace. Nothing here allocates. */
#ifndef XP_REF_LINEAR_H
#define XP_REF_LINEAR_H

#include "xp/tensor.h"

/* Bytes of `ws` below, aligned to 64. */
size_t xp_ref_linear_ws(void);

/* y[i][n] = sum over k < K of x[i][k] * w[n][k], i < m. x has rows of ldx doubles, w is [N,K], y has rows of ldy.
 * absolute != 0 reads |w| (x is then given as |x|). K = 0 gives zeros. */
void xp_ref_linear_nt(const double *x, int64_t m, int64_t ldx, const xp_tensor *w, int absolute, double *y, int64_t ldy,
                      void *ws);

/* dx[i][k] = sum over n < N of dy[i][n] * w[n][k], i < m, with w [N,K] as above. N = 0 gives zeros. */
void xp_ref_linear_nn(const double *dy, int64_t m, int64_t lddy, const xp_tensor *w, int absolute, double *dx,
                      int64_t lddx, void *ws);

/* y[i][j] += sum over r < depth of a[i*si + r*sr] * b[r*ldb + j], i < m, j < n: r ascending, added to what y holds. */
void xp_ref_linear_add(const double *a, int64_t si, int64_t sr, const double *b, int64_t ldb, int64_t m, int64_t n,
                       int64_t depth, double *y, int64_t ldy);

/* sum of a[i] * b[i], i < n, ascending. */
double xp_ref_dot(const double *a, const double *b, int64_t n);

#endif
