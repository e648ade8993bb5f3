/* Numbers of the second formulation: narrowing, elements and rows of tensors, dot products, softmax.
 *
 * Written on its own, from the formats' definitions: the reference's casts and functions are judged by these. Nobody
 * outside ref/dense/ includes it. Values travel as double; an F64 tensor takes them as they are, a narrower one rounds
 * once, to nearest even, overflow as the format says. */
#ifndef XP_DENSE_NUM_H
#define XP_DENSE_NUM_H

#include "xp/tensor.h"

/* Code of v in format d, exact ties to the even code (E8M0: upwards, as is all between 2^-127 and 2^-126). saturate:
 * beyond the largest finite value (infinities too) becomes it. E2M1 always saturates and takes NaN as +6, as PTX cvt
 * does. E8M0 has neither sign nor zero: 2^-127 for what is positive and smaller, NaN for what is not positive, but
 * 2^-127 for a zero that saturates. */
uint64_t xp_dense_narrow(double v, xp_dtype d, int saturate);

/* Offset in elements of (i, j, k, l); indices beyond ndim are ignored. */
int64_t xp_dense_at(const xp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l);
/* The plane i of the first dimension, as a tensor of one dimension less. */
xp_tensor xp_dense_plane(const xp_tensor *t, int64_t i);

/* One element, or n of them that lie one after another, at an offset. */
double xp_dense_get(const xp_tensor *t, int64_t at);
void xp_dense_put(const xp_tensor *t, int64_t at, double v);
void xp_dense_read(const xp_tensor *t, int64_t at, int64_t n, double *out);
void xp_dense_write(const xp_tensor *t, int64_t at, int64_t n, const double *v);
/* Rows [lo, lo + m) of a matrix. */
void xp_dense_read_rows(const xp_tensor *t, int64_t lo, int64_t m, double *out);
void xp_dense_write_rows(const xp_tensor *t, int64_t lo, int64_t m, const double *v);
void xp_dense_put_code(const xp_tensor *t, int64_t at, uint64_t code);
/* a + b, rounded once from the exact sum whatever the tensor's format. */
void xp_dense_put_sum(const xp_tensor *t, int64_t at, double a, double b);
/* v as format d holds it. */
double xp_dense_round(xp_dtype d, double v);
void xp_dense_round_all(xp_dtype d, int64_t n, double *v);
/* w v by the machine's own f32 arithmetic, or in f64 where act is f64. */
double xp_dense_product(xp_dtype act, double w, double v);
/* Integers of I64, I32 and U8 tensors. */
int64_t xp_dense_int(const xp_tensor *t, int64_t at);
void xp_dense_put_int(const xp_tensor *t, int64_t at, int64_t v);
/* Row (i, j) of the last dimension: its n elements become +0. */
void xp_dense_zero(const xp_tensor *t, int64_t at, int64_t n);

double xp_dense_dot(const double *a, const double *b, int64_t n);
void xp_dense_axpy(double s, const double *x, int64_t n, double *y);
/* y[i][n] = <x[i], w[n]> for m rows of x; dx[i] += sum_n dy[i][n] w[n]. w [N,K]; wide: K doubles. */
void xp_dense_map(const double *x, int64_t m, const xp_tensor *w, double *y, double *wide);
void xp_dense_map_back(const double *dy, int64_t m, const xp_tensor *w, double *dx, double *wide);

double xp_dense_sigmoid(double z);
/* log sum exp; -inf when n is 0; NaN when an element is NaN or +inf, or all are -inf. */
double xp_dense_lse(const double *l, int64_t n);
/* p = softmax(l), also in place. NaN where IEEE arithmetic on exp(l - max) gives NaN. */
void xp_dense_softmax(const double *l, int64_t n, double *p);

/* Slot of token t among the blocks that a rank's tokens touch; 0 when block is 0. */
int64_t xp_dense_slot(int64_t token0, int64_t t, int64_t block);

/* Workspace: bytes that n items of `each` bytes take, and the next such piece of it. */
size_t xp_dense_room(int64_t n, size_t each);
void *xp_dense_carve(char **ws, int64_t n, size_t each);

#endif
