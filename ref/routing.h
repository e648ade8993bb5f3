/* One token's routing as the dialect record says: from logits to scores, keys, choice and weights, and back, with the
 * errors that another implementation's values may have. Formulas are those of xp/route.h.
 *
 * route and moe share this, so that they cannot mean different dialects. It knows no stage and no tensor. */
#ifndef XP_REF_ROUTING_H
#define XP_REF_ROUTING_H

#include "err.h"
#include "plane.h"
#include "xp/dialect.h"

typedef struct {
    const xp_dialect *d;
    int64_t E, K;                 /* rows of the router; slots, those of shared experts behind the rest */
    int64_t routed, chosen;       /* those of E and K that a choice is made of */
    xp_dtype act, logits, op;     /* what score_dtype act rounds to; the logits'; what others may compute in */
    const double *bias, *scale_e; /* [E], [E] or one; NULL: none */
    int32_t *slots;               /* [K]; NULL: no shared experts */
    double *l;                    /* [E] logits as they came */
    double *seen;                 /* [E] scaled and capped; -inf for NaN */
    double *score;                /* [E] before or after xp_ref_routing_store() */
    double *key;                  /* [E] what the choice looks at */
    int64_t *kept;                /* [groups] 1: stays, 0: masked, -1: the errors leave it open */
    double *gscore;               /* [groups] */
    double *row, *sub, *share;    /* [max(E, K)] scratch, [K], [K] */
    xp_ref_val *w;                /* [K] */
    double *seen_e, *score_e, *key_e, *gscore_e; /* errors; NULL without bounds */
    double *score_a;                             /* of a softmax: score_e were the logits exact */
} xp_ref_routing;

/* Takes the rows out of a workspace; K: slots of a choice, to which the record's shared experts add theirs. act: the
 * activation dtype, read where logits are not in it. bounds: the errors' rows, too. */
void xp_ref_routing_plan(xp_ref_layout *l, const xp_dialect *d, int64_t E, int64_t K, xp_dtype logits, xp_dtype act,
                         xp_dtype op, int bounds, xp_ref_routing *out);
/* seen and score from l; score is its last step's value, unrounded. With bounds also their errors; le: those of the
 * logits, NULL: exact. */
void xp_ref_routing_scores(xp_ref_routing *r, const double *le);
/* score as what follows reads it: q(score), or as a tensor of dtype d holds it. With bounds score_e becomes that of the
 * stored score. */
void xp_ref_routing_store(xp_ref_routing *r, xp_dtype d);
/* key and kept from score and seen. With bounds also key_e: +inf where it is open whether the expert's group stays; and
 * of select_on first_score the keys are logits, but the largest for everyone who may have the largest score. */
void xp_ref_routing_keys(xp_ref_routing *r);
/* The best keys: numbers before NaN logits, then the higher key, then the lower index. */
void xp_ref_routing_choose(const xp_ref_routing *r, int32_t *idx);
/* A choice with the shared experts' rows behind it, which is what the functions below take: [K]; idx itself where there
 * are none. */
const int32_t *xp_ref_routing_slots(const xp_ref_routing *r, const int32_t *idx);
/* w[k] of a choice: value and, with bounds, error, before the rounding to the weight's dtype. Needs scores and, with
 * masked_weight, keys. */
void xp_ref_routing_weights(xp_ref_routing *r, const int32_t *idx);
/* 1: the id weighs 0 and adds nothing, whatever it scores. */
int xp_ref_routing_skips(const xp_ref_routing *r, int64_t e);
/* dl [E] from dw [K]: through weights and scores, not rounded. r->score holds the stored scores; l and seen are used
 * where xp_ref_routing_wants_logits(). */
void xp_ref_routing_back(xp_ref_routing *r, const int32_t *idx, const double *dw, double *dl);
int xp_ref_routing_wants_logits(const xp_dialect *d);
/* The same with magnitudes: gauge [E] of sums and products on the way. 0: an intermediate may leave op's range. */
int xp_ref_routing_back_gauge(xp_ref_routing *r, const int32_t *idx, const double *dw, double *gauge);
/* The gauge becomes the error of dl before it is rounded. fits: what the gauge's maker said; r->row is still as it left
 * it: the roundings to the activation dtype. */
void xp_ref_routing_back_errors(const xp_ref_routing *r, int fits, double *gauge);

/* What xp_ref_routing_back() gives, with the errors of everything that enters: scores and logits as a plan with bounds
 * holds them (after xp_ref_routing_store()), dw [K]. g [E]: scratch; dl [E]: values and errors, not rounded. */
void xp_ref_routing_back_vals(xp_ref_routing *r, const int32_t *idx, const xp_ref_val *dw, xp_ref_val *g,
                              xp_ref_val *dl);

#endif
