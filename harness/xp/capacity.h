/* Stage capacity: an expert takes so many slots and no more; those beyond are dropped.
 *
 * Tokens that are counted together: with sequence > 0 those of this rank with the same (token0 + t) / sequence, so a
 * sequence that two ranks share has its capacity on each; with sequence 0 all tokens of this rank. Of n such tokens an
 * expert takes C = xp_dialect_capacity(n) slots: the record's `capacity`, or ceil((n K / E) capacity_factor) in f64,
 * or all. E: experts with rows; null experts have no capacity and drop nothing. A slot with idx -1 stays -1 and counts
 * for nobody. A token that names one expert twice takes two of its slots.
 *
 * overflow says in which order the slots of one expert come, the first C of which are kept:
 *   order     by (token, slot). Source: Megatron-LM's policy "position"
 *   priority  by descending w, then (token, slot); NaN last; the two zeros are equal. Source: Megatron-LM's "probs"
 *   slots     by (slot, token): every first choice before any second. Source: GShard, Switch Transformer, NLLB
 *
 * kept is idx where a slot is kept. Weights stay as they are: permute gives a dropped slot no row, combine then adds
 * nothing for it and makes its dw 0. The balance loss and route_bwd see idx, not kept. Judged bit for bit. */
#ifndef XP_CAPACITY_H
#define XP_CAPACITY_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor idx;     /* in  [T,K] i32 expert of each slot, -1: none */
    xp_tensor w;       /* in  [T,K] weight; only overflow priority looks at it */
    xp_tensor kept;    /* out [T,K] i32 idx, -1 where the slot is dropped */
    xp_tensor dropped; /* out [E] i64 dropped slots of each expert */
    const xp_dialect *dialect;
    int64_t token0;   /* as in embed.h */
    int64_t sequence; /* tokens of a sequence; 0: all of this rank's tokens are one */
} xp_capacity_args;
extern const xp_stage xp_stage_capacity;

#ifdef __cplusplus
}
#endif
#endif
