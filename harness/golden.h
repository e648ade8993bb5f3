/* Which dialect presets the vector sets of golden/ cover. */
#ifndef XP_GOLDEN_H
#define XP_GOLDEN_H

#include "xp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* 1 when a test of a set in the golden folder (compiled in; EXPAR_GOLDEN overrides it) names the preset in its case
 * line. Sets are read at the first call; without sets, or with a set that cannot be read, nothing is covered. Not for
 * two threads at a time. */
int xp_golden_covers(const char *preset);

#ifdef __cplusplus
}
#endif
#endif
