/* Stage gradnorm: the p-norm of the logical gradient, the same bits for every mesh, order and placement.
 *
 * Every logical element counts once: a segment whose owner flag is 0 is counted by another rank, another segment or
 * nobody. Where `place` is given, it says how each segment lies on the mesh; owner must be what follows from it, and a
 * partial sum is refused. Norms: p = 0 counts the elements that are not zero, 1 and 2 and other p > 0 are
 * (sum |g|^p)^(1/p), inf and -inf the largest and least magnitude. p in {0, 1, 2, inf, -inf} is rounded once from the
 * exact value; a real p is within the stage's bound. A NaN makes every norm NaN, on every rank alike; else an infinity
 * makes it +inf, but for p = 0 (one element) and -inf (never the least). A norm beyond f32 is +inf. An empty gradient
 * has norm 0, or +inf with p = -inf; a rank without elements joins all the same.
 *
 * semantics torch: what torch.nn.utils.get_total_norm gives, placement and all; see ref/gradnorm.c. Source: meaning as
 * torch.nn.utils.get_total_norm; exact sums as Neal 2015 (small superaccumulators). */
#ifndef XP_GRADNORM_H
#define XP_GRADNORM_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whose rules a stage of the optimizer follows. exact: the ones of its contract. torch: those of torch 2.13's CPU code,
 * roundings and hazards included. */
typedef enum { XP_EXACT = 0, XP_TORCH } xp_semantics;

/* How one segment lies on the mesh. 0: no other rank holds any of it (sharded over the world, in whatever rows,
 * columns or strides; an empty shard too). Sharded over some axes and copied over the others: the axes of the copies.
 *   DDP, a norm or a router      XP_PLACE_COPIES(XP_WORLD)
 *   HSDP                         XP_PLACE_COPIES(XP_DP)
 *   experts over ep and ep_fsdp  XP_PLACE_COPIES(XP_EP_DP), once their copies are reduced
 *   experts over ep alone        XP_PLACE_COPIES(XP_EDP)
 * A gradient that is still a sum or a mean of parts over an axis has no norm: reduce it first, then it is sharded or
 * copied. UNCOUNTED: padding, or a second name of a tensor that another segment counts (a tied embedding). */
enum { XP_PLACE_UNCOUNTED = 1 << 16 };
#define XP_PLACE_COPIES(axis) (1 << (axis))
#define XP_PLACE_PARTIAL(axis) (1 << (8 + (axis)))

typedef struct {
    xp_tensor grad;  /* in  [N] f32, bf16 or f16: this rank's gradient shards, one after another */
    xp_tensor seg;   /* in  [Q+1] i64 segment borders in grad: seg[0] = 0, ascending, seg[Q] = N */
    xp_tensor owner; /* in  [Q] u8 1: this rank counts the segment; 0: another one does, or nobody */
    xp_tensor norm;  /* out [1] f32 */
    double p;        /* 0, any number above 0, inf or -inf */
    xp_tensor place; /* in  [Q] i32 XP_PLACE_*; absent: owner says all */
    int semantics;   /* xp_semantics */
} xp_gradnorm_args;
extern const xp_stage xp_stage_gradnorm;

/* The owner flag that follows from a place: 1 on the ranks with place 0 on every axis of copies. */
int xp_place_owner(int32_t place, const xp_mesh *m);

#ifdef __cplusplus
}
#endif
#endif
