/* Stage moe: one whole MoE block on one rank, forward and backward, for the comparison of two formulations in f64.
 *
 * The reference row calls the parts in order (router, route, permute, expert, combine, shared and their gradients); a
 * second formulation computes every expert over every token, masked. idx is given (replay), so both sides take the same
 * choice; a capacity counts all T tokens together, with overflow order or slots, which idx alone decides. dx and the
 * weight gradients are those of <dy, y>. */
#ifndef XP_MOE_H
#define XP_MOE_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;      /* in  [T,H] f32|f64 */
    xp_tensor dy;     /* in  [T,H] */
    xp_tensor wr;     /* in  [Z,H] router */
    xp_tensor w1;     /* in  [E,U,H] */
    xp_tensor w2;     /* in  [E,H,F] */
    xp_tensor sw1;    /* in  [X,H]; absent without a shared expert (not with shared_rows), as are sw2, sgate, dsw1,
                         dsw2, dsgate */
    xp_tensor sw2;    /* in  [H,S] */
    xp_tensor sgate;  /* in  [1,H]; absent without a gate */
    xp_tensor idx;    /* in  [T,K] i32 */
    xp_tensor y;      /* out [T,H] */
    xp_tensor dx;     /* out [T,H] */
    xp_tensor dwr;    /* out [Z,H] */
    xp_tensor dw1;    /* out [E,U,H] */
    xp_tensor dw2;    /* out [E,H,F] */
    xp_tensor dsw1;   /* out [X,H] */
    xp_tensor dsw2;   /* out [H,S] */
    xp_tensor dsgate; /* out [1,H] */
    const xp_dialect *dialect;
    xp_tensor rbias;   /* in  [Z] router bias; absent unless router_bias, as is drbias */
    xp_tensor bias;    /* in  [Z] f32|f64 selection bias; absent unless masked_weight needs it */
    xp_tensor b1;      /* in  [E,U]; absent unless expert_bias, as are b2, db1, db2 */
    xp_tensor b2;      /* in  [E,H] */
    xp_tensor scale_e; /* in  [W] f32|f64; absent unless expert_scale */
    xp_tensor drbias;  /* out [Z] */
    xp_tensor db1;     /* out [E,U] */
    xp_tensor db2;     /* out [E,H] */
} xp_moe_args;
extern const xp_stage xp_stage_moe;

#ifdef __cplusplus
}
#endif
#endif
