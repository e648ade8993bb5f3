/* Stages shared and shared_bwd: the expert that every token passes, y = gate(x) * MLP(x).
 *
 * MLP as in expert.h with one weight set of width S, no biases, and the limit as xp_dialect_shared_limit() says; it
 * computes in its own parameters' dtype. With a gate (Qwen2-MoE): sig = r(sigmoid(r(x . v))), y = r(sig * mlp); without
 * one y = mlp and sig is absent. */
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
    xp_tensor act;  /* out [T,S] param */
    xp_tensor mlp;  /* out [T,H] act */
    xp_tensor sig;  /* out [T,1] act; absent without a gate */
    xp_tensor y;    /* out [T,H] act */
    const xp_dialect *dialect;
} xp_shared_args;
extern const xp_stage xp_stage_shared;

/* dmlp = r(dy sig); dz = r(<dy, mlp> sig (1 - sig)); dx = r(dpre W1 + dz v). Weight gradients: wgrad on (dpre, x),
 * (dmlp, act), (dz, x). */
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
} xp_shared_bwd_args;
extern const xp_stage xp_stage_shared_bwd;

#ifdef __cplusplus
}
#endif
#endif
