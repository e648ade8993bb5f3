/* Generated arguments for one stage on one rank: sizes from the case's letters, dtypes from its groups, data from its
 * fill kind. */
#ifndef XP_BIND_H
#define XP_BIND_H

#include "case.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Binds the case's stage on this rank and calls it through xp_call(). XP_E_ARG naming what the case cannot give. */
xp_status xp_bind_run(const xp_case *c, xp_rank *r);
/* Reads a stage's scalar into the field at `at`. XP_E_ARG naming the scalar, the text and what was expected. */
xp_status xp_bind_scalar(const xp_param *p, const char *text, void *at);

#ifdef __cplusplus
}
#endif
#endif
