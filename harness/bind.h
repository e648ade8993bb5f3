/* Generated arguments for one stage on one rank: sizes from the case's letters, dtypes from its groups, data from its
 * fill kind. */
#ifndef XP_BIND_H
#define XP_BIND_H

#include "case.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_BIND_OPERANDS = 32 };

/* Binds the case's stage on this rank and calls it through xp_call(). XP_E_ARG naming what the case cannot give. */
xp_status xp_bind_run(const xp_case *c, xp_rank *r);
/* Operands that are given instead of generated, by their number in the stage's table; data NULL: absent. in: values of
 * inputs, and of in-out operands before the run; out: dtype and shape of outputs where somebody states them. */
typedef struct {
    xp_tensor in[XP_BIND_OPERANDS], out[XP_BIND_OPERANDS];
} xp_given;
/* Makes the args of the case's stage on this rank from given operands and hands them to fn; sizes are those of the
 * inputs. XP_E_ARG naming the operand that is missing, or does not fit. */
typedef xp_status (*xp_bind_fn)(xp_rank *r, const xp_stage *s, void *args, void *arg);
xp_status xp_bind_given(const xp_case *c, xp_rank *r, const xp_given *g, xp_bind_fn fn, void *arg);
/* Reads a stage's scalar into the field at `at`. XP_E_ARG naming the scalar, the text and what was expected. */
xp_status xp_bind_scalar(const xp_param *p, const char *text, void *at);

#ifdef __cplusplus
}
#endif
#endif
