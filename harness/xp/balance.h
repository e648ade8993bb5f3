/* Stages balance and balance_bwd: the load-balancing loss and the z-loss over all MoE layers together.
 *
 * n = valid tokens x layers, over the world (scope_world 1) or this rank. With P = softmax(logits) in f32:
 *   freq[e] = (choices of e) / n, prob[e] = (sum of P[e]) / n, loss[0] = E sum_e freq[e] prob[e], loss[1] = (sum of
 * lse^2) / n. Balanced routing gives loss[0] = K. Sums of P and lse^2 are kept in f32 for each block of tokens (all
 * layers of a block in one sum), exchanged, and folded left in block order (block 0: one block a rank, in rank order).
 * n = 0 gives zeros. A row of logits with a NaN, with +inf or with nothing but -inf has P and lse NaN, as torch's
 * softmax.
 *
 * Source: Switch Transformer eq. 4 as transformers' load_balancing_loss_func pools it; ST-MoE eq. 5 for the z-loss. */
#ifndef XP_BALANCE_H
#define XP_BALANCE_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor logits;      /* in  [Y,T,E] logits */
    xp_tensor idx;         /* in  [Y,T,K] i32 */
    xp_tensor valid;       /* in  [T] u8 1: the token counts */
    xp_tensor freq;        /* out [E] f32|f64 */
    xp_tensor prob;        /* out [E] f32|f64 */
    xp_tensor loss;        /* out [2] f32|f64: balance, z; without coefficients */
    xp_tensor count;       /* out [1] i64: n */
    int64_t token0, block; /* as in embed.h */
    int scope_world;
} xp_balance_args;
extern const xp_stage xp_stage_balance;

/* daux[y][t][j] = scale (aux_coef E/n P_j (freq_j - sum_e freq_e P_e) + z_coef 2 lse/n P_j); 0 for tokens that do not
 * count. freq carries no gradient. scale is what the gradients are divided by later (the global count of valid tokens).
 */
typedef struct {
    xp_tensor logits; /* in  [Y,T,E] logits */
    xp_tensor valid;  /* in  [T] u8 */
    xp_tensor freq;   /* in  [E] f32|f64, from the forward */
    xp_tensor count;  /* in  [1] i64, from the forward */
    xp_tensor daux;   /* out [Y,T,E] f32|f64 */
    double aux_coef, z_coef, scale;
} xp_balance_bwd_args;
extern const xp_stage xp_stage_balance_bwd;

#ifdef __cplusplus
}
#endif
#endif
