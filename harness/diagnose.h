/* What a wrong answer looks like: known mistakes, tried one by one on the operands at hand.
 *
 * Says something only when the mistake explains the answer within the stage's own bound; it judges nothing. */
#ifndef XP_DIAGNOSE_H
#define XP_DIAGNOSE_H

#include "rank.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_DIAGNOSIS = 160 };

/* args: a call of stage s whose outputs are somebody's answer. text (XP_DIAGNOSIS bytes) becomes the name and meaning
 * of the mistake, or "". It knows stage moe alone. */
xp_status xp_diagnose(xp_rank *r, const xp_stage *s, const void *args, char *text);

#ifdef __cplusplus
}
#endif
#endif
