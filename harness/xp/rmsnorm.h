/* Stages rmsnorm and rmsnorm_bwd: y = r(w * r(x * rstd)), rstd = 1 / sqrt(mean(x^2) + eps) over H.
 *
 * The normalised row is rounded to the activation dtype before the weight multiplies it, as the Llama-style norms do.
 * With weight_first the weight multiplies the row before it is normalised: y = r(u * rstd), u = r(w * x), rstd of u.
 * Source: Zhang and Sennrich 2019; LlamaRMSNorm for the rounding points, MuseSparkTextInputScaledRMSNorm for those with
 * the weight first. */
#ifndef XP_RMSNORM_H
#define XP_RMSNORM_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;    /* in  [T,H] act */
    xp_tensor w;    /* in  [H] param */
    xp_tensor y;    /* out [T,H] act */
    xp_tensor rstd; /* out [T] f32 (f64 when act is f64) */
    double eps;     /* > 0 */
    int weight_first;
} xp_rmsnorm_args;
extern const xp_stage xp_stage_rmsnorm;

/* With n = x rstd and u = r(dy w): dx = rstd (u - n mean(u n)); dw[b] = sum over the block's tokens of dy r(n). The
 * product with w is a step of its own in the activation dtype, forward and backward. With weight_first, u = r(w x),
 * n = u rstd and du = r(rstd (dy - n mean(dy n))): dx = r(w du); dw[b] = sum of du x. */
typedef struct {
    xp_tensor dy;          /* in  [T,H] act */
    xp_tensor x;           /* in  [T,H] act */
    xp_tensor w;           /* in  [H] param */
    xp_tensor rstd;        /* in  [T] f32|f64, from the forward */
    xp_tensor dx;          /* out [T,H] act */
    xp_tensor dw;          /* out [B,H] grad */
    int64_t token0, block; /* as in embed.h */
    int weight_first;
    xp_tensor part; /* in  [T] i64 of each row the b that it adds to, -1: none; absent: the blocks of token0. With it B
                       is any number and block is 0 */
} xp_rmsnorm_bwd_args;
extern const xp_stage xp_stage_rmsnorm_bwd;

#ifdef __cplusplus
}
#endif
#endif
