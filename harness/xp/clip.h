/* Stage clip: scale a gradient by one coefficient, c = min(1, RN32(max_norm / RN32(norm + eps))).
 *
 * c == 1 touches no bit; otherwise each element becomes RN32(g * c), once. A NaN or infinite norm never changes the
 * gradient silently: coef is NaN and grad keeps its bits, so that the caller decides about the step. Source:
 * torch.nn.utils.clip_grads_with_norm_ (eps 1e-6, clamp at 1), except for the non-finite rule above. */
#ifndef XP_CLIP_H
#define XP_CLIP_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor grad; /* inout [N] f32 */
    xp_tensor norm; /* in  [1] f32, the norm of the logical gradient */
    xp_tensor coef; /* out [1] f32 */
    float max_norm; /* >= 0, finite */
    float eps;      /* >= 0, finite; 1e-6 as in torch */
} xp_clip_args;
extern const xp_stage xp_stage_clip;

#ifdef __cplusplus
}
#endif
#endif
