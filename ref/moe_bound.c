/* The bound of stage moe: errors carried through the whole layer, forward and backward.
 *
 * Both sides compute in D, the operands' dtype (f32 or f64), which is also what every intermediate is rounded to. Each
 * value is a pair (v, e): the reference's, and how far another implementation may be. g_n = gamma_n(D) + gamma_n(f64).
 *   logits  e = g_H sum |x| |wr|
 *   softmax in the log domain, where errors add: an implementation's P_j is P_j exp(+-L_j) with
 *           L_j = e_j + sum_i P_i expm1(e_i) + r_j: the logit's own error, the normaliser's (Jensen), and evaluation,
 *           r_j = g_(2E+24) + 2 (u(D) + u(f64)) (|l_j - m| + sum_i P_i |l_i - m| + |m|): exp and division within 4 ulp, E
 *           additions, a rounded argument (with or without subtracting the largest, m). e(P_j) = P_j expm1(L_j).
 *   weights with renormalisation a softmax over the chosen: the same with W for P, and the sums of r, since the common
 *           factor of all P cancels. Without: P itself.
 *   experts the chain of expert.c, each row with its errors; combine: e(w out) by the product rule, g_K for its sum.
 *   dw      sum |dy| (e(out) + g_H (|out| + e(out)));  dout = w dy by the product rule
 *   dlogits W_k (dw_k - sum_i W_i dw_i), P_j for W_k without renormalisation: errors of W and dw by the product rule;
 *           evaluation: g_(2K+E+16) times the absolute Jacobian, which for renormalised weights is
 *           W_k (|dw_k| + s) + 2 P_j s, s = sum_i W_i |dw_i| (it bounds the path over the derivative of the quotient,
 *           with P, and the short one, with W)
 *   rows    expert.c's backward with errors of dout and pre on entry; sums over slots g_K; sums of parts g_2
 *   weight gradients over n rows: sum of products of (|a| + e_a)(|b| + e_b) - |a| |b| + g_n (|a| + e_a)(|b| + e_b)
 * Every declared rounding to D costs both sides one. A sum is taken over the terms of its own part, in any order. The
 * rules for products, roundings and functions are those of err.h; no term is dropped. */
#include "moe.h"

#include <math.h>
#include <string.h>

#include "err.h"
#include "linear.h"
#include "mlp.h"
#include "move.h"
#include "token.h"

enum { CHUNK = XP_REF_MLP_ROWS };

typedef struct {
    const xp_moe_args *a;
    xp_dtype op;
    xp_ref_rule rule;
    int64_t T, E, K, H, F, S;
    xp_ref_val *score, *weight, *used, *dw, *dlogit; /* [T,E], [T,K] before and after the scale, [T,K], [T,E] */
    xp_ref_val *y, *dx;                              /* [T,H]: the experts' part, then all parts */
    double *lv, *le;                                 /* a chunk of rows of E */
    double *left, *right;                            /* operands of a sum over rows */
    double *doute, *gate;                            /* a chunk of rows of H; one row */
    double *z, *ze;                                  /* a chunk */
    int64_t *tok, *slot;                             /* a chunk of expert rows */
    char *planes;                                    /* the MLP's */
} work;

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t shared_width(const xp_moe_args *a) {
    return a->sw2.data ? a->sw2.dim[1] : 0;
}

/* The MLP's planes for the experts (width F) or the shared expert (S), with errors kept for sums over rows. */
static size_t planes(const xp_moe_args *a, int64_t width, char *ws, xp_ref_mlp *out) {
    const size_t f = (size_t)(CHUNK * width) * sizeof(double);
    const size_t bytes =
        xp_ref_span(xp_ref_mlp_plan(CHUNK, a->x.dim[1], width, 1, a->x.dtype, a->x.dtype, ws, out));
    if (ws) {
        char *at = ws + bytes;
        out->acte = xp_ref_carve(&at, f);
        out->dpree = xp_ref_carve(&at, 2 * f);
    }
    return bytes + xp_ref_span(f) + xp_ref_span(2 * f);
}

static size_t plan(const xp_moe_args *a, void *ws, work *w) {
    const int64_t T = a->x.dim[0], E = a->wr.dim[0], K = a->idx.dim[1], H = a->x.dim[1], F = a->w2.dim[2];
    const int64_t S = shared_width(a), wide = most(most(E, H), 2 * most(F, S));
    const struct {
        void **at;
        size_t bytes;
    } block[] = {
        {(void **)&w->score, (size_t)(T * E) * sizeof(xp_ref_val)},
        {(void **)&w->weight, (size_t)(T * K) * sizeof(xp_ref_val)},
        {(void **)&w->used, (size_t)(T * K) * sizeof(xp_ref_val)},
        {(void **)&w->dw, (size_t)(T * K) * sizeof(xp_ref_val)},
        {(void **)&w->dlogit, (size_t)(T * E) * sizeof(xp_ref_val)},
        {(void **)&w->y, (size_t)(T * H) * sizeof(xp_ref_val)},
        {(void **)&w->dx, (size_t)(T * H) * sizeof(xp_ref_val)},
    };
    (void)block;
    (void)wide;
    return 0;
}
