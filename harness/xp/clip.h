/* Stage clip: scale a gradient by one coefficient, c = min(1, RN32(max_norm / RN32(norm + eps))).
 *
 * c == 1 touches no bit; otherwise each element becomes RN32(g * c), once. What a NaN or infinite norm does is a
 * choice: skip (coef is NaN, grad keeps its bits, the caller leaves the step out), propagate (as torch by default) or
 * error (no rank returns XP_OK). semantics torch: the operations of torch.nn.utils.clip_grads_with_norm_, one by one;
 * see ref/clip.c. Source: torch.nn.utils.clip_grads_with_norm_ (eps 1e-6, clamp at 1), except for skip and the
 * untouched case. */
#ifndef XP_CLIP_H
#define XP_CLIP_H

#include "gradnorm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { XP_NONFINITE_SKIP = 0, XP_NONFINITE_PROPAGATE, XP_NONFINITE_ERROR } xp_nonfinite;

typedef struct {
    xp_tensor grad; /* inout [N] f32; with semantics torch also bf16 or f16 */
    xp_tensor norm; /* in  [1] f32, the norm of the logical gradient; with semantics torch a value of grad's dtype */
    xp_tensor coef; /* out [1] f32 */
    float max_norm; /* >= 0, finite; with semantics torch any value */
    float eps;      /* >= 0, finite; 1e-6 as in torch */
    int nonfinite;  /* xp_nonfinite */
    int semantics;  /* xp_semantics */
} xp_clip_args;
extern const xp_stage xp_stage_clip;

#ifdef __cplusplus
}
#endif
#endif
