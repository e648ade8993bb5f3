/* Random right cases: what `expar check --random N` draws. A draw is a pure function of (seed, number). */
#ifndef XP_RANDOM_H
#define XP_RANDOM_H

#include "case.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Draw number n under the seed; redraw > 0 gives another draw in its place (for one that turned out vacuous). Stages
 * and whole steps; world 1 to 8, half of them above 1; T 0 to 96, E 1 to 32, K 1 to 8, H and F 1 to 96; every dtype and
 * fill kind; one pass at most 20 MFLOP. The case passes xp_case_check(). */
void xp_random_case(uint64_t seed, uint64_t n, int redraw, xp_case *out);

#ifdef __cplusplus
}
#endif
#endif
