/* Stage sgd: one step of SGD with momentum on flat f32 shards.
 *
 *   g += wd p (decayed segments);  buf = g on the first step, else momentum buf + g;  p -= lr buf
 * Momentum 0 leaves buf alone and takes p -= lr g.
 * Source: torch.optim.SGD (dampening 0, nesterov off). */
#ifndef XP_SGD_H
#define XP_SGD_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor param; /* inout [N] f32 */
    xp_tensor buf;   /* inout [N] f32 momentum buffer; absent when momentum is 0 */
    xp_tensor grad;  /* in  [N] f32 */
    xp_tensor seg;   /* in  [Q+1] i64 */
    xp_tensor decay; /* in  [Q] u8 */
    double lr, momentum, weight_decay;
    int64_t step; /* 1 for the first step */
} xp_sgd_args;
extern const xp_stage xp_stage_sgd;

#ifdef __cplusplus
}
#endif
#endif
