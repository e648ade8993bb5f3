/* Stages carry and carry_bwd: y = r(a + r(b scale)), scale a number a column.
 *
 * What a router takes over from the router of the block before: a is its own state, b that one's. The product is a
 * rounding point of its own, forward and backward, as two operations in the activation dtype have it.
 * Source: ZayaRouter, transformers 5.24. */
#ifndef XP_CARRY_H
#define XP_CARRY_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor a;     /* in  [T,H] act */
    xp_tensor b;     /* in  [T,H] act */
    xp_tensor scale; /* in  [H] param */
    xp_tensor y;     /* out [T,H] act */
} xp_carry_args;
extern const xp_stage xp_stage_carry;

/* da is dy; db = r(dy scale); dscale[s] = sum over the tokens of block s of r(dy b). */
typedef struct {
    xp_tensor dy;          /* in  [T,H] act */
    xp_tensor b;           /* in  [T,H] act */
    xp_tensor scale;       /* in  [H] param */
    xp_tensor db;          /* out [T,H] act */
    xp_tensor dscale;      /* out [B,H] grad */
    int64_t token0, block; /* as in embed.h */
} xp_carry_bwd_args;
extern const xp_stage xp_stage_carry_bwd;

#ifdef __cplusplus
}
#endif
#endif
