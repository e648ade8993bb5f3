/* Stage residual: y = r(a + b), forward and backward (the sum of two gradients is the same operation). */
#ifndef XP_RESIDUAL_H
#define XP_RESIDUAL_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor a; /* in  [T,H] act */
    xp_tensor b; /* in  [T,H] act */
    xp_tensor y; /* out [T,H] act */
} xp_residual_args;
extern const xp_stage xp_stage_residual;

#ifdef __cplusplus
}
#endif
#endif
