/* Stage gather: FSDP all-gather of one unevenly sharded parameter, cast to param_dtype on the way.
 *
 * The logical parameter is [G,R0,N]: G groups (local experts, or 1), R0 rows, N columns. Rank p of the axis holds rows
 * [start[p], start[p]+rows[p]) of every group; the ranges of all ranks tile [0,R0) in rank order and may be empty.
 * Each element is rounded once (nearest even) from the master copy. Moves bits: judged bit for bit.
 * Source: PyTorch FSDP2, fully_shard with MixedPrecisionPolicy(param_dtype). */
#ifndef XP_GATHER_H
#define XP_GATHER_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor shard;      /* in  [G,R,N]  f32|f64 this rank's rows of the master parameter, R = rows[rank] */
    xp_tensor full;       /* out [G,R0,N] param_dtype, on every rank of the axis */
    xp_axis axis;         /* fsdp for dense parameters, ep_fsdp for experts */
    const int64_t *start; /* host [P] first row of each rank */
    const int64_t *rows;  /* host [P] rows of each rank */
} xp_gather_args;
extern const xp_stage xp_stage_gather;

#ifdef __cplusplus
}
#endif
#endif
