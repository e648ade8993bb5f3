/* Stages route, route_bwd and route_scale_bwd: choose K experts a token and weigh them, as the dialect record says.
 *
 * l = logits, scaled and soft-capped where the record says so. q = with score_dtype act rounding to the activation
 * dtype, which is the logits' where logits_dtype is act, else `act`; else none (f32 arithmetic is inside the bounds).
 *   scores   softmax, softmax_topk: q(softmax of all l); sigmoid: q(sigmoid l); sqrt_softplus: q(sqrt(q(softplus l)));
 *            sparsemixer: q(softmax of all l)
 *   keys     scores or l, plus the selection bias, f32; experts outside the kept groups 0 or -inf. A group's score is
 *            its largest key or the sum of its two largest; groups and experts of equal score: the lower index first.
 *            Shared experts have none
 *   idx      the K largest keys, descending; or table[token]; sparsemixer: the largest l, then the largest of the rest;
 *            first_score: the largest score, then the largest l of the rest
 *   w        scores[idx] (0 for an expert outside the kept groups with masked_weight); softmax_topk: softmax of l[idx];
 *            sparsemixer: slot k's softmax over the experts left whose (m - l) / max(|l|, m) <= 2 sparse_eps, m the
 *            largest left; then q(w / q(sum)), q(w / q(q(sum) + eps)) or q(w / max(q(sum), eps)), or with log_sum in
 *            place of all that the softmax of log sigmoid(l[idx]); q(w / K) with weight_div_k; q(w scale) with scale_at
 *            weight; q(w scale_e[idx]) or q(w scale_e); rounded to w's dtype. At last 0 for an id that adds nothing
 *            (null_kind skip), whose score the sum has counted
 *   gamma    the same for shared expert j, which is slot K + j with id Z - A + j: in every sum above are K + A slots
 * A NaN logit ranks last and scores 0 (NaN only if every logit of the token is NaN). idx is judged as a choice: on the
 * stage's keys with their errors, ties of equal inputs exactly, then replayed for everything after. Z counts the null
 * experts and the shared ones' rows, too; W is Z, or 1 with expert_scale one. */
#ifndef XP_ROUTE_H
#define XP_ROUTE_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor logits; /* in  [T,Z] logits */
    xp_tensor bias;   /* in  [Z] f32|f64|bf16 selection bias, not read behind the E experts that can be chosen; absent
                         when the dialect has none */
    xp_tensor scores; /* out [T,Z] f32|f64 */
    xp_tensor idx;    /* out [T,K] i32, by descending selection score; in when replay != 0 */
    xp_tensor w;      /* out [T,K] weight */
    const xp_dialect *dialect;
    int replay;        /* 1: idx is given, only scores and w are made */
    xp_tensor scale_e; /* in  [W] f32|f64 factors of the weights; absent unless expert_scale */
    xp_tensor token;   /* in  [T] i32 token ids; absent unless select_on token_table */
    xp_tensor table;   /* in  [V,K] i32 experts of each token id; absent unless select_on token_table */
    xp_tensor gamma;   /* out [T,A] weight; of the shared experts, absent unless shared_rows */
    xp_dtype act;      /* activation dtype: read with score_dtype act beside logits_dtype f32 */
} xp_route_args;
extern const xp_stage xp_stage_route;

/* Gradient through the weights, their division and factors, and the scores; choice, groups, bias, masks, the
 * sparsemixer's margin and the weight of an id that adds nothing have none. dlogits = r(J^T dw + daux). softmax_topk
 * goes back from the softmax of the chosen logits, rounded to the logits' dtype where weights or scores are in act, as
 * autograd does from a softmax of that dtype. sqrt_softplus, softmax_topk, sparsemixer, log_sum and a soft cap need the
 * logits. */
typedef struct {
    xp_tensor scores;  /* in  [T,Z] f32|f64, from the forward */
    xp_tensor idx;     /* in  [T,K] i32 */
    xp_tensor dw;      /* in  [T,K] f32|f64 */
    xp_tensor daux;    /* in  [T,Z] f32|f64 gradient of the balance losses; absent when there are none */
    xp_tensor dlogits; /* out [T,Z] logits */
    const xp_dialect *dialect;
    xp_tensor logits;  /* in  [T,Z] logits, the forward's; may be absent where nothing needs them */
    xp_tensor bias;    /* in  [Z] the forward's; absent unless masked_weight with a selection bias */
    xp_tensor scale_e; /* in  [W] f32|f64; absent unless expert_scale */
    xp_tensor dgamma;  /* in  [T,A] f32|f64; absent unless shared_rows */
    xp_dtype act;      /* as in route */
} xp_route_bwd_args;
extern const xp_stage xp_stage_route_bwd;

/* dscale[b][e] = sum over the block's tokens and the slots that chose e, or with expert_scale one over all slots, of
 * dw w', with w' the weight as it was before scale_e multiplied it: what autograd gives the factors. A record without
 * factors has one of 1 for each expert. */
typedef struct {
    xp_tensor scores; /* in  [T,Z] f32|f64, from the forward */
    xp_tensor idx;    /* in  [T,K] i32 */
    xp_tensor dw;     /* in  [T,K] f32|f64 */
    xp_tensor dscale; /* out [B,W] grad */
    const xp_dialect *dialect;
    xp_tensor logits;      /* in  [T,Z] logits; absent where route_bwd needs none and score_dtype is f32 */
    xp_tensor bias;        /* in  [Z] as in route_bwd */
    int64_t token0, block; /* as in embed.h */
    xp_tensor dgamma;      /* in  [T,A] f32|f64; absent unless shared_rows */
    xp_dtype act;          /* as in route */
} xp_route_scale_bwd_args;
extern const xp_stage xp_stage_route_scale_bwd;

#ifdef __cplusplus
}
#endif
#endif
