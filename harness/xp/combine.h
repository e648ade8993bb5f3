/* Stages combine and combine_bwd: bring the experts' output rows home (all-to-all-v over ep, splits swapped) and sum
 * them.
 *
 * y[t] = sum over slots k of w[t][k] * back[pos[t][k]], accumulated as the dialect's `accumulate` says; slots_f32:
 * products and the sum wide, slots ascending, one rounding. Dialects that weigh the experts' input take w as 1 here. */
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
} xp_combine_args;
extern const xp_stage xp_stage_combine;

/* dw[t][k] = <dy[t], back[pos[t][k]]>; each row's gradient r(w[t][k] dy[t]) goes to the expert's rank as dout. Pad rows
 * zero. */
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
} xp_combine_bwd_args;
extern const xp_stage xp_stage_combine_bwd;

#ifdef __cplusplus
}
#endif
#endif
