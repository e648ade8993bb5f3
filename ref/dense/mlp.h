/* The gated MLP of experts and the shared expert, on a few rows in double. Nobody outside ref/dense/ includes it. */
#ifndef XP_DENSE_MLP_H
#define XP_DENSE_MLP_H

#include "linear.h"

/* Buffers for XP_DENSE_ROWS rows of width H through an MLP of width F. */
typedef struct {
    int64_t h_n, f_n;
    double *x, *y;   /* [ROWS,H] */
    double *pre;     /* [ROWS,2*F] gate, then up */
    double *act;     /* [ROWS,F] */
    double *wide;    /* [max(H,F)] */
    int64_t *member; /* [ROWS] which rows these are */
} xp_dense_mlp;

size_t xp_dense_mlp_ws(int64_t h_n, int64_t f_n);
xp_dense_mlp xp_dense_mlp_carve(int64_t h_n, int64_t f_n, char **ws);

/* act[i] = silu(g) u of m rows of pre. */
void xp_dense_gate(const double *pre, int64_t m, int64_t f_n, double *act);
/* pre becomes its own gradient, da being the activation's. */
void xp_dense_gate_back(const double *da, int64_t m, int64_t f_n, double *pre);

/* x -> pre, act, y of the first m rows; w1 [2*F,H], w2 [H,F]. */
void xp_dense_mlp_run(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1, const xp_tensor *w2);
/* y holds dy, pre what it was: act becomes da, pre dpre, x dx. */
void xp_dense_mlp_back(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1, const xp_tensor *w2);

#endif
