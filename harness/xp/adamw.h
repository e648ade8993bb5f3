/* Stage adamw: one AdamW step on flat shards, in one pass.
 *
 *   m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g g;  p = p (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
 * Segments with decay 0 skip the factor 1 - lr wd. The order of operations and the rounding points are stated in
 * ref/adamw.c; semantics torch is torch's sequence of single operations, to the bit. Masters and moments in bf16 round
 * to nearest; stochastic rounding is left out on purpose, since no two implementations draw the same numbers. Source:
 * Loshchilov and Hutter 2019; torch.optim.AdamW. */
#ifndef XP_ADAMW_H
#define XP_ADAMW_H

#include "gradnorm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor param; /* inout [N] f32 or bf16 master parameters */
    xp_tensor m;     /* inout [N] f32 or bf16 first moment */
    xp_tensor v;     /* inout [N] f32 or bf16 second moment */
    xp_tensor grad;  /* in  [N] f32 or bf16; with semantics torch one dtype for all four */
    xp_tensor seg;   /* in  [Q+1] i64 segment borders */
    xp_tensor decay; /* in  [Q] u8 1: the segment is decayed */
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step;  /* 1 for the first step */
    int semantics; /* xp_semantics */
} xp_adamw_args;
extern const xp_stage xp_stage_adamw;

#ifdef __cplusplus
}
#endif
#endif
