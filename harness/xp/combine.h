/* Stages combine and combine_bwd: bring the experts' output rows home (all-to-all-v over ep, splits swapped) and sum
 * them.
 *
 * y[t] = sum over slots k of p = w[t][k] * back[pos[t][k]], accumulated as the dialect's `accumulate` says (dialect.h).
 * Dialects that weigh the experts' input take w as 1 here. A slot without a row (pos -1) adds nothing, or w x where idx
 * is a null expert of kind identity (no dialect has both). With scale_at output, y = r(r(y) scale); with weight_div_k
 * scale is K.
 *
 * Wherever `accumulate` rounds (in every mode but slots_f32), p is first rounded to f32; scale is an f32 number, and
 * its product is rounded to f32 before r. f64 takes f32's place where act is f64. */
#ifndef XP_COMBINE_H
#define XP_COMBINE_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor out;          /* in  [C,H] act, from expert */
    xp_tensor recv_counts;  /* in  [P,L] i64 */
    xp_tensor recv_offsets; /* in  [L+1] i64 */
    xp_tensor counts;       /* in  [E] i64 */
    xp_tensor offsets;      /* in  [E+1] i64 */
    xp_tensor pos;          /* in  [T,K] i32 */
    xp_tensor idx;          /* in  [T,K] i32 (the order of experts, for the eager accumulations) */
    xp_tensor w;            /* in  [T,K] weight */
    xp_tensor back;         /* out [M,H] act rows at home, in permute's order; pad rows zero */
    xp_tensor y;            /* out [T,H] act */
    const xp_dialect *dialect;
    xp_tensor x; /* in  [T,H] act, the tokens' rows; absent unless identity experts may be chosen */
} xp_combine_args;
extern const xp_stage xp_stage_combine;

/* With g = r(dy scale), made as y's product is (dy itself without a scale): dw[t][k] = <g[t], back[pos[t][k]]>,
 * <g[t], x[t]> for an identity expert, 0 for any other slot without a row; each row's gradient r(w[t][k] g[t]) goes to
 * the expert's rank as dout; dx[t] = r(sum of w[t][k] g[t] over the identity slots). Pad rows zero. */
typedef struct {
    xp_tensor dy;           /* in  [T,H] act */
    xp_tensor back;         /* in  [M,H] act */
    xp_tensor w;            /* in  [T,K] weight */
    xp_tensor pos;          /* in  [T,K] i32 */
    xp_tensor counts;       /* in  [E] i64 */
    xp_tensor offsets;      /* in  [E+1] i64 */
    xp_tensor recv_counts;  /* in  [P,L] i64 */
    xp_tensor recv_offsets; /* in  [L+1] i64 */
    xp_tensor dw;           /* out [T,K] f32|f64 */
    xp_tensor dout;         /* out [C,H] act */
    const xp_dialect *dialect;
    xp_tensor x;   /* in  [T,H] act; x, idx and dx are absent unless identity experts may be chosen */
    xp_tensor idx; /* in  [T,K] i32 */
    xp_tensor dx;  /* out [T,H] act */
} xp_combine_bwd_args;
extern const xp_stage xp_stage_combine_bwd;

#ifdef __cplusplus
}
#endif
#endif
