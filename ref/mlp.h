/* The MLP that the experts and the shared expert have in common, a chunk of rows at a time, and its bounds.
 *
 * Everything is double between the declared rounding points (xp/expert.h). Rows come in and leave through the planes
 * below, which live in the caller's workspace. It must not know which rows belong to which expert. */
#ifndef XP_REF_MLP_H
#define XP_REF_MLP_H

#include "glu.h"
#include "plane.h"

/* Rows of a chunk: a tile of weights is widened once for all of them. */
enum { XP_REF_MLP_ROWS = 64 };

typedef struct {
    int64_t H, F, U; /* U: 2 F with a gate, F without */
    xp_dtype param, act;
    xp_ref_glu glu;
    int interleaved;               /* gate and up rows in turn */
    const xp_tensor *w1, *w2;      /* [U,H], [H,F] of the rows at hand; set by the caller, as are the next two */
    const xp_tensor *b1, *b2;      /* [U], [H]; NULL: no bias, as they are after planning */
    double *x, *pre, *mid, *y;     /* rows of H, U, F, H */
    double *bias;                  /* one row */
    double *xe, *pree, *mide, *ye; /* what another implementation's values may differ by; NULL without bounds */
    /* parts > 0: the width is so many equal parts, a number of gamma [rows, parts] for each. It multiplies the rounded
     * activation, and each part has an output of its own, rounded before they are summed. The caller loads gamma (and
     * gammae); backward leaves dgamma (and dgammae) */
    int64_t parts;
    xp_dtype weight;               /* of gamma, which is cast on the way in */
    double *gamma, *dgamma, *part; /* [rows,parts], [rows,parts], rows of H; NULL without parts */
    double *gammae, *dgammae, *parte;
    double *acte, *dpree; /* NULL, or where E of the rounded act and dpre goes, for sums over rows */
    void *tile;
} xp_ref_mlp;

/* Which of the record's fields do not hold everywhere. */
typedef enum { XP_REF_MLP_EXPERT, XP_REF_MLP_SHARED } xp_ref_mlp_kind; /* shared: its own limit */

/* Takes the planes for chunks of at most XP_REF_MLP_ROWS rows out of `rows`. */
void xp_ref_mlp_plan(xp_ref_layout *l, int64_t rows, int64_t H, int64_t F, int bounds, const xp_dialect *d,
                     xp_ref_mlp_kind kind, xp_dtype param, xp_dtype act, xp_ref_mlp *out);
/* XP_E_ARG when the shared expert's width, named by its letter, does not fall into the record's equal parts, or when
 * there are `weights` numbers a token for another number of parts (-1: not given). */
xp_status xp_ref_mlp_parts_check(const char *stage, const xp_dialect *d, char letter, int64_t width, int64_t weights);
/* XP_E_ARG naming a field of the record that is out of range or contradicts another. */
xp_status xp_ref_mlp_check(const char *stage, const xp_dialect *d);
/* XP_E_ARG when the first matrix, an operand of that name, has another number of rows than the record makes of width,
 * which is named by its letter. */
xp_status xp_ref_mlp_width_check(const char *stage, const xp_dialect *d, const char *name, int64_t rows, char letter,
                                 int64_t width);

/* In: x, not yet cast. Writes rows [row, row+m) of pre and act; leaves in y the output, rounded to param where that is
 * not the activation dtype. */
void xp_ref_mlp_forward(xp_ref_mlp *p, int64_t m, int64_t row, const xp_tensor *pre, const xp_tensor *act);
/* In: y = gradient of the output, not yet cast; pre. Writes rows of dpre; leaves dpre W1, unrounded, in x. */
void xp_ref_mlp_backward(xp_ref_mlp *p, int64_t m, int64_t row, const xp_tensor *dpre);

/* The same chains with errors. In: x and xe (y and ye, pre and pree). Stop at an output to have its tolerance in the
 * error plane: *_PRE, *_ACT (mide), *_DPRE (pree). At the end: unrounded values and errors, in y, ye (x, xe). */
typedef enum { XP_REF_MLP_PRE, XP_REF_MLP_ACT, XP_REF_MLP_DPRE, XP_REF_MLP_END } xp_ref_mlp_stop;
void xp_ref_mlp_forward_error(xp_ref_mlp *p, int64_t m, xp_ref_mlp_stop stop);
/* more: further terms that the caller adds to the sums of dx. */
void xp_ref_mlp_backward_error(xp_ref_mlp *p, int64_t m, int64_t more, xp_ref_mlp_stop stop);
/* What xp_ref_mlp_finish does to values, with errors. */
void xp_ref_mlp_finish_error(const xp_ref_mlp *p, int64_t n, double *v, double *e);
/* e[i] becomes the tolerance of an output in the activation dtype that holds v[i] within e[i]; v is finished. */
void xp_ref_mlp_out_error(const xp_ref_mlp *p, int64_t n, double *v, double *e);

/* v[i] rounded to the parameters' dtype, where the activation dtype is another one. */
void xp_ref_mlp_finish(const xp_ref_mlp *p, int64_t n, double *v);

#endif
