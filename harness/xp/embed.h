/* Stages embed and embed_bwd: the model's input rows, y[t] = r(table[token[t]] + pos[t]).
 *
 * pos is a seeded row for each global position, so that equal bytes do not make equal rows; it is not trained.
 * Blocks (here and in every stage with a B dimension): block > 0 cuts tokens by global number into blocks of that many;
 * B is the number of blocks that this rank's tokens touch, and slot b holds the b-th of them in ascending order. block
 * 0: B = 1, one sum. */
#ifndef XP_EMBED_H
#define XP_EMBED_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor token; /* in  [T] i32, 0 <= token < V */
    xp_tensor table; /* in  [V,H] param */
    xp_tensor pos;   /* in  [T,H] act */
    xp_tensor y;     /* out [T,H] act */
} xp_embed_args;
extern const xp_stage xp_stage_embed;

/* dtable[b][v] = sum over this rank's tokens t of block b with token v, ascending t, of dy[t]; one rounding a block. */
typedef struct {
    xp_tensor token;  /* in  [T] i32 */
    xp_tensor dy;     /* in  [T,H] act */
    xp_tensor dtable; /* out [B,V,H] grad */
    int64_t token0;   /* global number of this rank's first token */
    int64_t block;    /* tokens a block, 0: one sum */
} xp_embed_bwd_args;
extern const xp_stage xp_stage_embed_bwd;

#ifdef __cplusplus
}
#endif
#endif
