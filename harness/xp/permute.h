/* Stages permute and permute_bwd: sort a token's copies by expert.
 *
 * Row order inside an expert: slot_token (slot k, then token), or token (token, then slot). Each expert's segment
 * starts at a multiple of align and has at least `least` rows, which is how an expert is padded to its capacity; pad
 * rows are zero and have tok = src = -1. A token that names one expert twice has two rows. M is a capacity: rows at
 * offsets[E] and beyond are not written. Moves bits: judged bit for bit.
 *
 * A slot whose idx is -1 (dropped) or E and beyond (a null expert) has no row: pos is -1. With weight_at input a row is
 * r(w x), the product rounded to f32 first (not where act is f64). That, too, is judged bit for bit: f32 holds the
 * product of two numbers of act exactly, or rounds it so that r gives what one rounding would. Without a dialect
 * weights are on the output and there are no null experts. */
#ifndef XP_PERMUTE_H
#define XP_PERMUTE_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { XP_ORDER_SLOT_TOKEN = 0, XP_ORDER_TOKEN } xp_row_order;

typedef struct {
    xp_tensor x;       /* in  [T,H] act */
    xp_tensor idx;     /* in  [T,K] i32 expert of each slot, -1: none */
    xp_tensor rows;    /* out [M,H] act, M >= T*K + E*(least+align-1) */
    xp_tensor tok;     /* out [M] i64 global token number of each row */
    xp_tensor src;     /* out [M] i32 t*K + k of each row */
    xp_tensor pos;     /* out [T,K] i32 row of each slot */
    xp_tensor counts;  /* out [E] i64 rows of each expert, pads not counted */
    xp_tensor offsets; /* out [E+1] i64 first row of each expert; offsets[E] rows are in use */
    int order;         /* xp_row_order */
    int align;         /* 1, 16 or 128 */
    int64_t token0;
    xp_tensor w; /* in  [T,K] weight; absent unless the dialect says weight_at input */
    const xp_dialect *dialect;
    int64_t least; /* rows that every expert has, pads among them; 0 or more */
} xp_permute_args;
extern const xp_stage xp_stage_permute;

/* dx[t] = r(sum over slots k with a row, ascending, of drows[pos[t][k]]); with weight_at input of w[t][k] drows, and
 * with dx_sum act over rows ascending, dx = r(dx + r(p)), p rounded to f32 first (not where act is f64).
 * dw[t][k] = <drows[pos[t][k]], x[t]>, 0 without a row. */
typedef struct {
    xp_tensor drows; /* in  [M,H] act */
    xp_tensor pos;   /* in  [T,K] i32 */
    xp_tensor dx;    /* out [T,H] act */
    xp_tensor w;     /* in  [T,K] weight; w, x and dw are absent unless the dialect says weight_at input */
    xp_tensor x;     /* in  [T,H] act */
    xp_tensor dw;    /* out [T,K] f32|f64 */
    const xp_dialect *dialect;
} xp_permute_bwd_args;
extern const xp_stage xp_stage_permute_bwd;

#ifdef __cplusplus
}
#endif
#endif
