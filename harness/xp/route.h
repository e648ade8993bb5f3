/* Stages route and route_bwd: choose K experts a token and weigh them, as the dialect record says.
 *
 * Dialect A: scores = softmax(logits) in f32; idx = the K largest, descending; w = scores[idx], divided by their sum
 * when the record renormalises; w is rounded to its dtype. Ties go to the lower expert index; a NaN logit ranks last
 * (its score is NaN only if every logit of the token is NaN: NaN logits count as -inf in the softmax, and score 0). idx
 * is judged as a choice: on the judge's scores with their bound, ties of equal logits exactly, then replayed for
 * everything after. */
#ifndef XP_ROUTE_H
#define XP_ROUTE_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor logits; /* in  [T,E] logits */
    xp_tensor bias;   /* in  [E] f32 selection bias; absent when the dialect has none */
    xp_tensor scores; /* out [T,E] f32|f64 */
    xp_tensor idx;    /* out [T,K] i32, by descending selection score; in when replay != 0 */
    xp_tensor w;      /* out [T,K] weight */
    const xp_dialect *dialect;
    int replay; /* 1: idx is given, only scores and w are made */
} xp_route_args;
extern const xp_stage xp_stage_route;

/* Gradient through the weights, the renormalisation and the softmax; the choice itself has none.
 * dlogits = r(J^T dw + daux). */
typedef struct {
    xp_tensor scores;  /* in  [T,E] f32|f64, from the forward */
    xp_tensor idx;     /* in  [T,K] i32 */
    xp_tensor dw;      /* in  [T,K] f32|f64 */
    xp_tensor daux;    /* in  [T,E] f32|f64 gradient of the balance losses; absent when there are none */
    xp_tensor dlogits; /* out [T,E] logits */
    const xp_dialect *dialect;
} xp_route_bwd_args;
extern const xp_stage xp_stage_route_bwd;

#ifdef __cplusplus
}
#endif
#endif
