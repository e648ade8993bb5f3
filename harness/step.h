/* The whole training step as plain SPMD C: every stage goes through xp_call(), so the same program is the thing that
 * trains, the thing that is judged and, wrapped in a fault, the thing that must be caught.
 *
 * gather -> embed -> L x [rmsnorm -> router -> route -> permute -> dispatch -> expert -> combine (+ shared) ->
 * residual] -> final norm
 * -> head -> xent, balance -> backward -> scatter -> gradnorm -> clip -> adamw or sgd. */
#ifndef XP_STEP_H
#define XP_STEP_H

#include "checkpoint.h"
#include "fill.h"
#include "parity.h"
#include "plan.h"
#include "rank.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What runs. */
typedef enum {
    XP_RUN_TRAIN = 0, /* whole steps with the optimizer; parameters, gradients and moments stay in flat f32 shards */
    XP_RUN_GRADS, /* forward and backward only; a shard of a parameter or of a gradient lives as long as its collective
                   */
    XP_RUN_LAYER  /* the layers alone, on generated input rows and output gradients */
} xp_run_mode;

/* Where the tokens come from. text NULL: seeded bytes. */
typedef struct {
    const uint8_t *text;
    int64_t text_bytes;
    xp_data data;
    xp_run_mode mode;
    xp_parity *parity;         /* NULL: nothing is recorded or compared */
    int order, align;          /* permute's row order and both alignments */
    const xp_weights *weights; /* of the MoE blocks, whole; NULL: seeded */
} xp_step_source;

typedef struct {
    double loss;    /* cross-entropy a valid token, in nats */
    double balance; /* load-balancing loss, without its coefficient; K when balanced */
    double zloss;
    int64_t tokens; /* valid tokens in the world */
    float norm;     /* correctly rounded norm of the logical gradient */
    float coef;     /* clip coefficient; 1: untouched; NaN: norm not finite, step skipped */
    double seconds; /* wall clock of this rank */
} xp_step_result;

typedef struct xp_step xp_step;

/* Generates this rank's parameters. plan and source outlive the step. XP_E_NOMEM, or what the first collective finds.
 */
xp_status xp_step_open(xp_rank *r, const xp_plan *plan, const xp_step_source *src, xp_step **out);
/* Step number s, from 0: bytes [s N, (s+1) N) of the text. Collective over the world. */
xp_status xp_step_run(xp_step *st, int64_t s, xp_step_result *out);
/* SHA-256 over (name, shape, f32 bytes) of the logical parameters in name order, as 64 hex digits; the same on every
 * rank. Collective. XP_RUN_TRAIN only. */
xp_status xp_step_digest(xp_step *st, char out_hex[65]);
void xp_step_close(xp_step *st);

#ifdef __cplusplus
}
#endif
#endif
