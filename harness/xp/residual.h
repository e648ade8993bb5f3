/* Stage residual: y = r(a + b), forward and backward (the sum of two gradients is the same operation). With a factor
 * that is not 1, y = r(r(a + b) factor); without b, y = r(a factor). The factor is an f32 number and its product is
 * rounded to f32 before r (f64 where act is f64). */
#ifndef XP_RESIDUAL_H
#define XP_RESIDUAL_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor a;   /* in  [T,H] act */
    xp_tensor b;   /* in  [T,H] act; may be absent */
    xp_tensor y;   /* out [T,H] act */
    double factor; /* 0 counts as 1 */
} xp_residual_args;
extern const xp_stage xp_stage_residual;

#ifdef __cplusplus
}
#endif
#endif
