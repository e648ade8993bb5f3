/* Stage gradnorm: the correctly rounded p-norm of the logical gradient, the same bits for every mesh, order and
 * placement.
 *
 * Every logical element counts once: a segment whose owner flag is 0 is a replica that another rank counts. Sums are
 * exact integers (windows of 32 bits in u64 limbs), reduced over the world as integers; the root is rounded once to
 * f32. NaN and infinities travel as flags: any NaN makes the norm NaN, else any infinity makes it +inf, on every rank
 * alike. A norm beyond f32 is +inf. An empty gradient has norm 0; a rank without elements joins all the same. Source:
 * meaning as torch.nn.utils.get_total_norm; exact sums as Neal 2015 (small superaccumulators). */
#ifndef XP_GRADNORM_H
#define XP_GRADNORM_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_NORM_LIMBS = 24 }; /* 20 windows of 32 bits for p = 2, and carry room; p = 1 uses fewer */

typedef struct {
    xp_tensor grad;  /* in  [N] f32 this rank's gradient shards, one after another */
    xp_tensor seg;   /* in  [Q+1] i64 segment borders in grad: seg[0] = 0, ascending, seg[Q] = N */
    xp_tensor owner; /* in  [Q] u8 1: this rank counts the segment; 0: another replica does */
    xp_tensor norm;  /* out [1] f32 */
    double p;        /* 1, 2 or infinity */
} xp_gradnorm_args;
extern const xp_stage xp_stage_gradnorm;

#ifdef __cplusplus
}
#endif
#endif
