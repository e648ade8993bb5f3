/* Stages dispatch and dispatch_bwd: send each row to the rank that owns its expert (all-to-all-v over ep) and back.
 *
 * Experts are split over ep in contiguous blocks of L. After dispatch the rows lie by (local expert, source rank, order
 * at the source); each local expert's segment starts at a multiple of align and has at least `least` rows, pad rows are
 * zero with recv_tok = -1. Pad rows of the sender are not sent. C is a capacity: rows at recv_offsets[L] and beyond are
 * not written. Moves bits: judged bit for bit.
 *
 * Rows may be 8-bit codes (see xp/quant.h) whose scales travel with them, J to a row: ceil(H/128) f32 as DeepEP sends
 * them, or ceil(H/32) e8m0. dispatch looks at neither: what a code means is its quantiser's business. The scales of a
 * pad row are zero bytes. All ranks pass scales or none does; a rank without rows passes a pointer too. */
#ifndef XP_DISPATCH_H
#define XP_DISPATCH_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor rows;         /* in  [M,H] act, or 8-bit codes, from permute */
    xp_tensor tok;          /* in  [M] i64 */
    xp_tensor counts;       /* in  [E] i64 */
    xp_tensor offsets;      /* in  [E+1] i64 */
    xp_tensor recv;         /* out [C,H], of rows' dtype */
    xp_tensor recv_tok;     /* out [C] i64 */
    xp_tensor recv_counts;  /* out [P,L] i64 rows from each ep rank for each local expert */
    xp_tensor recv_offsets; /* out [L+1] i64 */
    int align;              /* 1, 16 or 128 */
    xp_tensor scales;       /* in, optional [M,J] f32|e8m0; only with 8-bit rows */
    xp_tensor recv_scales;  /* out, with scales [C,J] */
    int64_t least;          /* rows that every local expert has, pads among them; the same on all ranks, as align is */
} xp_dispatch_args;
extern const xp_stage xp_stage_dispatch;

/* The gradient of each received row goes back to the row it came from: the same all-to-all with the splits swapped. Pad
 * rows of drows are zero; rows at offsets[E] and beyond are not written. */
typedef struct {
    xp_tensor drecv;        /* in  [C,H] act */
    xp_tensor recv_counts;  /* in  [P,L] i64 */
    xp_tensor recv_offsets; /* in  [L+1] i64 */
    xp_tensor counts;       /* in  [E] i64 */
    xp_tensor offsets;      /* in  [E+1] i64 */
    xp_tensor drows;        /* out [M,H] act */
} xp_dispatch_bwd_args;
extern const xp_stage xp_stage_dispatch_bwd;

#ifdef __cplusplus
}
#endif
#endif
