/* Stages router and router_bwd: gate logits = x . w^T (+ bias).
 *
 * Its own dtype rule: x is cast to w's dtype on the way in (exact when w is wider), products are summed wide, and one
 * rounding makes the logits' dtype (the activation dtype for dialects that route on r(.), f32 for those that widen
 * first). The bias is a term of the sum. */
#ifndef XP_ROUTER_H
#define XP_ROUTER_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;      /* in  [T,H] act */
    xp_tensor w;      /* in  [E,H] router */
    xp_tensor bias;   /* in  [E] router; absent when the dialect has none */
    xp_tensor logits; /* out [T,E] logits */
} xp_router_args;
extern const xp_stage xp_stage_router;

/* dx = r(dlogits . w); the weight's gradient is stage wgrad. */
typedef struct {
    xp_tensor dlogits; /* in  [T,E] logits */
    xp_tensor w;       /* in  [E,H] router */
    xp_tensor dx;      /* out [T,H] act */
} xp_router_bwd_args;
extern const xp_stage xp_stage_router_bwd;

#ifdef __cplusplus
}
#endif
#endif
