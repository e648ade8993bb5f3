/* Stages gelu and gelu_bwd: y = r(x P(x)), P(x) = (1 + erf(x / sqrt 2)) / 2: the exact GELU.
 *
 * One rounding, at the end. -inf gives NaN, as in torch (an infinity times 0). Source: Hendrycks and Gimpel 2016;
 * torch.nn.GELU for the rounding point. */
#ifndef XP_GELU_H
#define XP_GELU_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x; /* in  [T,H] act */
    xp_tensor y; /* out [T,H] act */
} xp_gelu_args;
extern const xp_stage xp_stage_gelu;

/* dx = r(dy (P(x) + x p(x))), p(x) = exp(-x^2 / 2) / sqrt(2 pi). */
typedef struct {
    xp_tensor dy; /* in  [T,H] act */
    xp_tensor x;  /* in  [T,H] act */
    xp_tensor dx; /* out [T,H] act */
} xp_gelu_bwd_args;
extern const xp_stage xp_stage_gelu_bwd;

#ifdef __cplusplus
}
#endif
#endif
