/* What stands between an expert's two matrices: act(g) u, or act(g) without a gate, in every form that a dialect can
 * ask for (xp/expert.h), one element at a time; and its bounds.
 *
 * Everything is double between the rounding points. It must not know rows, matrices or workspaces: mlp.c does. */
#ifndef XP_REF_GLU_H
#define XP_REF_GLU_H

#include "err.h"
#include "xp/dialect.h"

/* The record's fields that count here, its numbers rounded as an implementation holds them. */
typedef struct {
    xp_act act;
    xp_dtype param;
    int gated, each;      /* each: every operation is a rounding point */
    int parts;            /* silu is written g sigmoid(alpha g), with rounding points inside */
    int before, after;    /* where g meets the limit, if there is one */
    xp_ref_val limit;     /* rounded to param; e: by how much it then differs from the record's */
    double alpha, offset; /* rounded to the arithmetic that param allows, as are the caps */
    double gate_cap, up_cap;
} xp_ref_glu;

/* limit: the record's, or 0 where it does not hold. */
xp_ref_glu xp_ref_glu_of(const xp_dialect *d, double limit, xp_dtype param);

/* act(g) u, its last rounding left out; g and u are rounded. u is not read without a gate. */
double xp_ref_glu_forward(const xp_ref_glu *a, double g, double u);
/* The gradients of g and u, their last roundings left out, from da, the rounded gradient of act. *out_du is 0 without a
 * gate. */
void xp_ref_glu_backward(const xp_ref_glu *a, double g, double u, double da, double *out_dg, double *out_du);

/* The same with errors. r: the rule of the parameters' dtype. */
xp_ref_val xp_ref_glu_forward_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g, xp_ref_val u);
void xp_ref_glu_backward_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g, xp_ref_val u, xp_ref_val da,
                             xp_ref_val *out_dg, xp_ref_val *out_du);

#endif
