/* What the stages on tokens share: blocks of tokens and the fold of their sums over the world, softmax of a row with
 * the errors that its bound needs, linear maps of rows, ids.
 *
 * Formulas live here once, so that route, balance and xent cannot mean different softmaxes. It must know no stage. */
#ifndef XP_REF_TOKEN_H
#define XP_REF_TOKEN_H

#include "err.h"
#include "xp/stage.h"

/* ---- operands ---- */

/* Bytes of all operands that are present: each is touched once by the ideal algorithm. */
double xp_ref_bytes(const xp_stage *s, const void *args);
/* f64 when all n tensors that are present are f64, else f32: what an implementation may compute in. */
xp_dtype xp_ref_op_of(const xp_tensor *const *t, int n);
/* XP_E_ARG naming the first element of an i32 tensor (u8 for flags) that is not in [lo, hi). below: what hi is. Looked
 * at only where the host can read it. */
xp_status xp_ref_ids_check(const char *stage, const char *name, const xp_tensor *t, int64_t lo, int64_t hi,
                           const char *below);
/* A well mixed word of (seed, the bits of a row of n elements): generated rows differ by global index, so ids made from
 * it are the same on every mesh. */
uint64_t xp_ref_row_word(const void *row, xp_dtype d, int64_t n, uint64_t seed);

/* ---- blocks of tokens: see xp/embed.h ---- */

/* XP_E_ARG unless token0 and block are not negative and their sums fit. */
xp_status xp_ref_blocks_check(const char *stage, int64_t token0, int64_t block, int64_t T);
/* B; and the local tokens [lo, hi) of slot b. */
int64_t xp_ref_blocks(int64_t token0, int64_t block, int64_t T);
void xp_ref_block_tokens(int64_t token0, int64_t block, int64_t T, int64_t b, int64_t *out_lo, int64_t *out_hi);

/* Bytes of ws below for rows of `width` sums. */
size_t xp_ref_fold_ws(const xp_comm *c, int64_t width, xp_dtype d);
/* out[width] = the left fold, each addition rounded to the sums' dtype, from +0 over the rows of sums [B,width]
 * (contiguous) of rank 0, then rank 1, ...: the order of blocks, which ascend with the rank. c NULL: this rank's alone.
 * first: number of this rank's first block. Every rank calls it, with or without rows. XP_E_ARG on every rank when
 * blocks do not ascend with the rank. */
xp_status xp_ref_fold(const char *stage, xp_comm *c, xp_queue *q, const xp_tensor *sums, int64_t first, void *ws,
                      double *out);

/* ---- softmax of one row ---- */

/* p[i] = exp(v[i] - max) / sum, over ascending i in double; returns log sum exp = max + log(sum). IEEE all the way: a
 * NaN anywhere, +inf, or nothing but -inf makes NaN. n >= 1. */
double xp_ref_softmax(const double *v, int64_t n, double *p);
/* An implementation subtracts the largest in op or the row's own dtype, whichever is wider, one rounding to op; exp,
 * log and division within 4 ulp of op, or within its smallest normal number; n additions in any order. Its v[i] may be
 * off by ve. e[i]: how far
 * its p[i] may be from p[i] before it is stored; returns how far its log sum exp may be. The reference's own errors in
 * double are counted in. */
double xp_ref_softmax_error(const double *v, double ve, const double *p, int64_t n, xp_dtype op, double *e);
/* How far an implementation's exp of an argument within err of d, and not above most, may be from exp(d). */
double xp_ref_exp_error(double d, double err, double most, xp_dtype op);
/* Roundings (in units of op) of an element of any softmax of n elements: an upper limit that needs no row, for elements
 * above xp_ref_least. */
int64_t xp_ref_softmax_units(int64_t n, xp_dtype op);

/* ---- linear maps of token rows: y = r(x' . w^T + bias), dx = r(dy . w) ---- */

typedef struct {
    const xp_tensor *x, *w, *bias; /* [T,I], [O,I], [O]; bias NULL or absent: none */
    const xp_tensor *y;            /* [T,O] */
    int cast;                      /* 1: x is rounded to w's dtype first */
} xp_ref_map;

size_t xp_ref_map_ws(const xp_tensor *w);
void xp_ref_map_run(const xp_ref_map *f, void *ws);
/* ref holds y unrounded. op f64 when x, w, bias and y are f64. Error of a sum: err.h; each rounding point one room. */
void xp_ref_map_bound(const xp_ref_map *f, const xp_tensor *ref, void *ws, xp_tensor *tol);
/* dy [T,O], w [O,I], dx [T,I]. */
void xp_ref_map_back_run(const xp_tensor *dy, const xp_tensor *w, const xp_tensor *dx, void *ws);
void xp_ref_map_back_bound(const xp_tensor *dy, const xp_tensor *w, const xp_tensor *dx, const xp_tensor *ref, void *ws,
                           xp_tensor *tol);

#endif
