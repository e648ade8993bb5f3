/* Relations: what a change of the numbers must do to the results, whatever the results are. They need no reference:
 * each runs the chain of one MoE block (chain.h) twice and compares.
 *
 * - ranks: the same numbers on a mesh, the blocks of tokens dealt to its ranks in another order.
 *
 * - tokens: tokens in another order, their ids with them.
 *
 * - experts: experts in another order, with all that belongs to one: rows of the router, biases, factors, weights,
 *   entries of a token table. Groups stay groups; null experts stay at the end.
 *
 * - ties: experts in another order, some of equal score: the lower index wins wherever they lie. Choices alone.
 *
 * - split: the batch in two, weight gradients summed.
 *
 * - scale: the gradient of the loss times 2^7; gradients before any norm or clip.
 *
 * Not here, because they do not have these symmetries: balance losses (of the whole batch, not linear in it) and
 * capacity, which drops by token order.
 *
 * Exact numbers: every element of a sum over tokens, experts or widths has at most two terms that are not 0 or not
 * exact, products are exact, and no two scores that matter are equal. Then no order of summation shows, and every
 * relation holds to the bit. Real numbers: ranks to the bit; tokens to the bit but for weight gradients; scale to the
 * bit; the rest within the stages' bounds. Of real numbers a backend owes bits only where its rows promise them
 * (XP_DET_MESH; XP_DET_RUN for scale), and the bounds elsewhere. */
#ifndef XP_RELATIONS_H
#define XP_RELATIONS_H

#include "xp/backend.h"
#include "xp/dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    XP_REL_RANKS = 0,
    XP_REL_TOKENS,
    XP_REL_EXPERTS,
    XP_REL_TIES,
    XP_REL_SPLIT,
    XP_REL_SCALE,
    XP_RELATIONS
} xp_relation;
const char *xp_relation_name(xp_relation r); /* "ranks", ... */

typedef enum {
    XP_HELD_BITS = 0,    /* to the bit */
    XP_HELD_BOUND,       /* some elements only within the bounds */
    XP_HELD_NA,          /* the block has no such symmetry here: why */
    XP_HELD_UNSUPPORTED, /* the block cannot run: why */
    XP_HELD_NOT          /* where */
} xp_held;
const char *xp_held_mark(xp_held h); /* "=", "<", "n/a", "-", "FAIL" */

typedef struct {
    xp_held held;
    int64_t elements; /* compared */
    int64_t by_bound; /* of them, not equal to the bit */
    double ratio;     /* largest |difference| / bound */
    char text[320];   /* why, or where: output, row, values */
} xp_relation_result;

/* What the relations are run on, and in which dtype. */
typedef enum { XP_NUMBERS_EXACT = 0, XP_NUMBERS_REAL, XP_NUMBERS_REAL_F32, XP_NUMBERS_TIES } xp_numbers;
enum { XP_NUMBERS = XP_NUMBERS_REAL_F32 + 1 }; /* ties have a relation of their own, with the exact ones */
const char *xp_numbers_name(xp_numbers n);     /* "exact bf16", ... */

typedef struct {
    xp_relation_result on[XP_NUMBERS][XP_RELATIONS];
    uint32_t own, lent; /* stages of xp_chain_stages run by the backend's rows,
                           and by ref's in their place */
} xp_relations;

/* Every relation on the backend's rows with this record. A row that fails is a
 * result (XP_HELD_NOT), no error. XP_E_NOMEM; XP_E_DEVICE when the backend's
 * memory is not the host's; XP_E_HANG. */
xp_status xp_relations_run(const xp_backend *impl, const xp_dialect *d, xp_relations *out);

#ifdef __cplusplus
}
#endif
#endif
