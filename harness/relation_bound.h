/* How far an answer to the relations' numbers may be from the exact one: the bounds of the stages moe and router, asked
 * for the tokens and outputs that a comparison needs. Only relations.c includes this. */
#ifndef XP_RELATION_BOUND_H
#define XP_RELATION_BOUND_H

#include "chain.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct xp_relation_bound xp_relation_bound;

/* in and idx (the choice, [T,K]) outlive it. */
xp_status xp_relation_bound_open(const xp_chain_in *in, const xp_tensor *idx, xp_relation_bound **out);
void xp_relation_bound_close(xp_relation_bound *b);

/* Tolerances of output o for the batch of tokens [lo, hi): as many as o has elements there, in its order; weight
 * gradients in one block. They live as long as b. XP_E_ARG: o has no bound (idx, w). */
xp_status xp_relation_bound_of(xp_relation_bound *b, xp_chain_out o, int64_t lo, int64_t hi, const double **out,
                               int64_t *out_n);
/* 1 in out: by the logits of this run and the stage's own keys, token t may have been given this choice [K]. */
xp_status xp_relation_choice(const xp_chain_in *in, const xp_tensor *logits, int64_t t, const int32_t *choice,
                             int *out);

#ifdef __cplusplus
}
#endif
#endif
