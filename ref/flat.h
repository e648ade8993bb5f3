/* What the stages on flat f32 buffers share: segments, the generated data that a generic filler cannot know, and the
 * check of a judge's f64 outputs. gradnorm, adamw and sgd use it; it knows nothing of what they compute. */
#ifndef XP_REF_FLAT_H
#define XP_REF_FLAT_H

#include "xp/stage.h"

/* seg [Q+1] i64 must be 0 = seg[0] <= seg[1] <= ... <= seg[Q] = n, and every flag [Q] u8 must be 0 or 1. XP_E_ARG
 * naming stage, index and value. Contents are looked at only where the host can read them. */
xp_status xp_ref_flat_check(const char *stage, const xp_tensor *seg, const xp_tensor *flag, const char *flag_name,
                            int64_t n);
/* Borders for n elements: about equal segments, shifted by the seed; some are empty when n is small. */
void xp_ref_flat_borders(const xp_tensor *seg, int64_t n, uint64_t seed);
/* A well mixed word of (seed, i). */
uint64_t xp_ref_flat_mix(uint64_t seed, uint64_t i);
/* x[i] = |x[i]|. */
void xp_ref_flat_abs(const xp_tensor *x);
/* A judge may hold this output in f64: the view as the operand table would have it. */
xp_tensor xp_ref_flat_narrow(const xp_tensor *t);

#endif
