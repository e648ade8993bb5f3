/* Stage scatter: sum a gradient over an axis and leave each rank its rows. FSDP's reduce-scatter, all-reduce and HSDP
 * are one definition, because the row ranges of the ranks may tile the parameter or overlap.
 *
 * Rank q receives rows [start[q], start[q]+rows[q]) of every group, summed over all ranks of the axis:
 *   default (fold_blocks 0; B is 1): widened to f32, left fold over rank 0..P-1 in f32, rounded once to reduce_dtype,
 * widened to f32, then one f32 division by the divisor (none when the divisor is 1); fold_blocks 1 (deterministic
 * mode): blocks[b] is the global number of block b, ascending; the left fold runs in f32 from +0 over all blocks of all
 * ranks in ascending global number (a number that two ranks bring is an error), then one f32 division. The bits depend
 * on no mesh. reduce_dtype must be f32. A rank whose gradient is missing passes zeros (default) or B = 0
 * (deterministic): it still joins. base: what earlier micro-batches left in the shard with divisor 1. With fold_blocks
 * the fold starts from it; by default it is added, in f32, to the rounded sum before the division. When grad is f64
 * every f32 above reads f64. pre: a divisor on the way in, as FSDP2 hands it to the collective: each rank's partial sum
 * g becomes r(g c) with c = r(1 / pre), r to reduce_dtype, and then joins the fold. Source: FSDP2 reduce-scatter for
 * the collective; order, rounding and divisor are stated here. */
#ifndef XP_SCATTER_H
#define XP_SCATTER_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor grad;        /* in  [B,G,R0,N] f64|f32|bf16|f16 this rank's partial sums of the whole parameter */
    xp_tensor blocks;      /* in  [B] i64 global block numbers, ascending; absent unless fold_blocks */
    xp_tensor shard;       /* out [G,R,N] f32|f64, R = rows[rank] */
    xp_axis axis;          /* world for dense parameters, edp for experts */
    const int64_t *start;  /* host [P] */
    const int64_t *rows;   /* host [P] */
    xp_dtype reduce_dtype; /* f32|bf16|f16; f64 when grad is f64 */
    double divisor;        /* > 0: the global count of valid tokens; used as f32 */
    int fold_blocks;
    double pre;     /* not with fold_blocks; 0 counts as 1, which is none */
    xp_tensor base; /* in  [G,R,N] f32|f64 a sum to go on from; absent: none. Must not overlap shard */
} xp_scatter_args;
extern const xp_stage xp_stage_scatter;

#ifdef __cplusplus
}
#endif
#endif
