/* Stages xent and xent_bwd: cross-entropy as sums over valid tokens; the caller divides, once, by the global count.
 *
 * A target below 0 is ignored: loss 0, no gradient, not counted. total folds f32 block sums of all ranks left in block
 * order (block 0: one block a rank, in rank order); count is the number of valid tokens in the world. A row of logits
 * with a NaN, with +inf or with nothing but -inf has lse NaN, as torch's log_softmax. */
#ifndef XP_XENT_H
#define XP_XENT_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor logits;      /* in  [T,V] f32|f64|act */
    xp_tensor target;      /* in  [T] i32, < V; < 0: ignored */
    xp_tensor lse;         /* out [T] f32|f64 log sum exp of the row */
    xp_tensor loss;        /* out [T] f32|f64 lse - logits[target] */
    xp_tensor total;       /* out [1] f32|f64 sum of loss over the world */
    xp_tensor count;       /* out [1] i64 */
    int64_t token0, block; /* as in embed.h */
} xp_xent_args;
extern const xp_stage xp_stage_xent;

/* dlogits = r(exp(logits - lse) - onehot(target)): the gradient of the sum. */
typedef struct {
    xp_tensor logits;  /* in  [T,V] f32|f64|act */
    xp_tensor target;  /* in  [T] i32 */
    xp_tensor lse;     /* in  [T] f32|f64 */
    xp_tensor dlogits; /* out [T,V] f32|f64|act */
} xp_xent_bwd_args;
extern const xp_stage xp_stage_xent_bwd;

#ifdef __cplusplus
}
#endif
#endif
