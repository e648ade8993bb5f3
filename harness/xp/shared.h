/* Stages shared and shared_bwd: the expert that every token passes, y = gate(x) * MLP(x).
 *
 * MLP as in expert.h with one weight set of width S, no biases, and the limit as xp_dialect_shared_limit() says; it
 * computes in its own parameters' dtype. With a gate (Qwen2-MoE): sig = r(sigmoid(r(x . v))), y = r(sig * mlp); without
 * one y = mlp and sig is absent.
 *
 * With shared_rows (Inkling) S is A equal parts, one expert each, and the router's weight of expert j multiplies its
 * hidden rows: act = r(r(act) r(gamma_j)), which is the input of the second matrix; mlp = the sum over parts of
 * r(act W2^T) over the part's columns, summed wide and rounded once. */
#ifndef XP_SHARED_H
#define XP_SHARED_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;    /* in  [T,H] act */
    xp_tensor w1;   /* in  [X,H] param */
    xp_tensor w2;   /* in  [H,S] param */
    xp_tensor gate; /* in  [1,H] param; absent: no gate */
    xp_tensor pre;  /* out [T,X] param */
    xp_tensor act;  /* out [T,S] param; what W2 multiplies */
    xp_tensor mlp;  /* out [T,H] act */
    xp_tensor sig;  /* out [T,1] act; absent without a gate */
    xp_tensor y;    /* out [T,H] act */
    const xp_dialect *dialect;
    xp_tensor gamma; /* in  [T,A] weight; absent unless shared_rows */
} xp_shared_args;
extern const xp_stage xp_stage_shared;

/* dmlp = r(dy sig); dz = r(<dy, mlp> sig (1 - sig)); dx = r(dpre W1 + dz v). Weight gradients: wgrad on (dpre, x),
 * (dmlp, act), (dz, x). With shared_rows dact = r(dmlp W2), dgamma_j = <dact, r(act as expert.h has it)> over part j,
 * and r(dact r(gamma_j)) goes back through the activation. */
typedef struct {
    xp_tensor dy;   /* in  [T,H] act */
    xp_tensor pre;  /* in  [T,X] param */
    xp_tensor mlp;  /* in  [T,H] act; absent without a gate */
    xp_tensor sig;  /* in  [T,1] act; absent without a gate */
    xp_tensor w1;   /* in  [X,H] param */
    xp_tensor w2;   /* in  [H,S] param */
    xp_tensor gate; /* in  [1,H] param; absent: no gate */
    xp_tensor dmlp; /* out [T,H] act */
    xp_tensor dpre; /* out [T,X] param */
    xp_tensor dz;   /* out [T,1] act; absent without a gate */
    xp_tensor dx;   /* out [T,H] act */
    const xp_dialect *dialect;
    xp_tensor gamma;  /* in  [T,A] weight; absent unless shared_rows */
    xp_tensor dgamma; /* out [T,A] f32|f64; absent unless shared_rows */
} xp_shared_bwd_args;
extern const xp_stage xp_stage_shared_bwd;

#ifdef __cplusplus
}
#endif
#endif
