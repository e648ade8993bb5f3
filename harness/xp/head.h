/* Stages head and head_bwd: vocabulary logits = x . w^T, one rounding to the logits' dtype; dx = r(dlogits . w).
 * The weight's gradient is stage wgrad. */
#ifndef XP_HEAD_H
#define XP_HEAD_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;      /* in  [T,H] act */
    xp_tensor w;      /* in  [V,H] param */
    xp_tensor logits; /* out [T,V] f32|f64|act */
} xp_head_args;
extern const xp_stage xp_stage_head;

typedef struct {
    xp_tensor dlogits; /* in  [T,V] f32|f64|act */
    xp_tensor w;       /* in  [V,H] param */
    xp_tensor dx;      /* out [T,H] act */
} xp_head_bwd_args;
extern const xp_stage xp_stage_head_bwd;

#ifdef __cplusplus
}
#endif
#endif
