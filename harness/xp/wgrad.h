/* Stage wgrad: grouped weight gradient, dw[b][l] = sum over the rows r of group l and block b of dy[r] (x) x[r].
 *
 * One stage for every linear map: experts (L groups), router, head, shared expert (L = 1). Inside a block the products
 * are summed wide over ascending rows and rounded once to dw's dtype. A group without rows gives zeros: a missing
 * gradient is a zero. block > 0: blocks[b] is the global number of block b, tok[r] / block chooses it, tok -1 (pads)
 * belongs to none. fold 1 (with block > 0): B is 1 and dw = the left fold in dw's dtype of the block sums in ascending
 * block number; blocks of the whole batch must be here (an expert whose rows all lie on this rank). */
#ifndef XP_WGRAD_H
#define XP_WGRAD_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor dy;      /* in  [C,N] act or param or f32 */
    xp_tensor x;       /* in  [C,R] act or param */
    xp_tensor offsets; /* in  [L+1] i64 row borders of the groups */
    xp_tensor tok;     /* in  [C] i64 global token of each row; absent when block is 0 */
    xp_tensor blocks;  /* in  [B] i64 ascending; absent when block is 0 or fold is 1 */
    xp_tensor dw;      /* out [B,L,N,R] grad */
    int64_t block;
    int fold;
} xp_wgrad_args;
extern const xp_stage xp_stage_wgrad;

#ifdef __cplusplus
}
#endif
#endif
