/* Stages expert and expert_bwd: grouped gated MLP, y = (act(x W1g^T) * (x W1u^T)) W2^T for each row with its expert's
 * weights.
 *
 * An expert computes in its parameters' dtype: x is cast on the way in, y to the activation dtype on the way out.
 * Rounding points, silu gate (r = round to param dtype): pre = r(x W1^T), gate columns first; act = r(r(silu g) u); y =
 * r(act W2^T). Dot products are summed wide, k ascending. Pad rows are zero and stay zero. Rows at offsets[L] and
 * beyond are not touched. row0: x holds rows [row0, row0 + dim0) of the grouped order; 0 except when a judge works on a
 * slice. Source: Shazeer 2020 (SwiGLU); rounding points of transformers' experts. */
#ifndef XP_EXPERT_H
#define XP_EXPERT_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;       /* in  [C,H] act */
    xp_tensor offsets; /* in  [L+1] i64 */
    xp_tensor w1;      /* in  [L,2*F,H] param, gate rows then up rows */
    xp_tensor w2;      /* in  [L,H,F] param */
    xp_tensor pre;     /* out [C,2*F] param */
    xp_tensor act;     /* out [C,F] param */
    xp_tensor y;       /* out [C,H] act */
    const xp_dialect *dialect;
    int64_t row0;
} xp_expert_args;
extern const xp_stage xp_stage_expert;

/* With s = r(silu g): da = r(dy W2), ds = r(da u), du = r(da s), dg = r(ds silu'(g)); dx = r(dpre W1), dpre = (dg, du).
 * Weight gradients are stage wgrad on (dpre, x) and (dy, act). */
typedef struct {
    xp_tensor dy;      /* in  [C,H] act */
    xp_tensor pre;     /* in  [C,2*F] param */
    xp_tensor offsets; /* in  [L+1] i64 */
    xp_tensor w1;      /* in  [L,2*F,H] param */
    xp_tensor w2;      /* in  [L,H,F] param */
    xp_tensor dpre;    /* out [C,2*F] param */
    xp_tensor dx;      /* out [C,H] act */
    const xp_dialect *dialect;
    int64_t row0;
} xp_expert_bwd_args;
extern const xp_stage xp_stage_expert_bwd;

#ifdef __cplusplus
}
#endif
#endif
