/* The MLP of experts and the shared expert, on a few rows in double. Nobody outside ref/dense/ includes it. */
#ifndef XP_DENSE_MLP_H
#define XP_DENSE_MLP_H

#include "linear.h"
#include "xp/dialect.h"

/* Between the two matrices: what the record says, where rounded to (F64: nowhere), the limit (0: none). */
typedef struct {
    const xp_dialect *d;
    xp_dtype r;
    double limit;
} xp_dense_unit;

/* Columns of gate and up of unit f among the f_n of them; up is -1 without a gate. */
int64_t xp_dense_gate_at(const xp_dialect *d, int64_t f);
int64_t xp_dense_up_at(const xp_dialect *d, int64_t f_n, int64_t f);
/* The activation, before its last rounding; u is not looked at without a gate. */
double xp_dense_unit_run(const xp_dense_unit *a, double g, double u);
/* g and u become gradients (before their last rounding), da being the activation's. */
void xp_dense_unit_back(const xp_dense_unit *a, double da, double *g, double *u);

/* Buffers for XP_DENSE_ROWS rows of width H through an MLP of width F with U rows in its first matrix. */
typedef struct {
    xp_dense_unit unit;
    xp_dtype outside; /* of the rows that come and go */
    int64_t h_n, u_n, f_n;
    double *x, *y;   /* [ROWS,H] */
    double *pre;     /* [ROWS,U] */
    double *act;     /* [ROWS,F] */
    double *wide;    /* [max(H,F)] */
    int64_t *member; /* [ROWS] which rows these are */
} xp_dense_mlp;

/* w1 [..,U,H], w2 [..,H,F]: their last two dimensions count. */
size_t xp_dense_mlp_ws(const xp_tensor *w1, const xp_tensor *w2);
xp_dense_mlp xp_dense_mlp_carve(const xp_dialect *d, xp_dtype outside, const xp_tensor *w1, const xp_tensor *w2,
                                char **ws);

/* One step each, for the first m rows. What a step makes is not rounded yet; what it takes from the step before is
 * rounded in place first. Biases may be absent.
 * x -> pre; pre -> act; act -> y. */
void xp_dense_mlp_in(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1, const xp_tensor *b1);
void xp_dense_mlp_act(const xp_dense_mlp *b, int64_t m);
void xp_dense_mlp_out(const xp_dense_mlp *b, int64_t m, const xp_tensor *w2, const xp_tensor *b2);
/* y, which holds dy, and pre -> pre, which becomes dpre; dpre -> x, which becomes dx. */
void xp_dense_mlp_dpre(const xp_dense_mlp *b, int64_t m, const xp_tensor *w2);
/* The same in two: act, which becomes its own gradient, rounded; and from there pre. */
void xp_dense_mlp_dact(const xp_dense_mlp *b, int64_t m, const xp_tensor *w2);
void xp_dense_mlp_dunit(const xp_dense_mlp *b, int64_t m);
void xp_dense_mlp_dx(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1);
/* A row leaves the parameters' dtype: v is rounded to that when the dtype outside is another one. */
void xp_dense_mlp_leave(const xp_dense_mlp *b, int64_t n, double *v);

#endif
