/* The part of every stage's check() that its operand table already says: presence, rank, shape, dtype, stride.
 *
 * A stage adds its own rules (ranges of scalars, contents of index tensors) after this one. It must not read data: an
 * operand may live where the host cannot. */
#ifndef XP_REF_CHECK_H
#define XP_REF_CHECK_H

#include "xp/dialect.h"
#include "xp/stage.h"

/* Sizes that the shapes named, by letter; R0 (a letter with a digit is a name of its own) is apart. -1: not named. */
typedef struct {
    int64_t letter[26], r0;
} xp_ref_dims;

#define XP_REF_DIM(dims, c) ((dims).letter[(c) - 'A'])

/* Reads s->operand in order. The first operand that names a letter sets it; every later one must agree. Operands of one
 * group have one dtype. An absent operand (data NULL) is skipped when it is optional or has no elements. XP_E_ARG
 * naming stage, operand, dimension, value and expectation. */
xp_status xp_ref_check(const xp_stage *s, const void *args, xp_ref_dims *out);

/* Every optional operand that the stage's wants() names, and none of the others but those in `free`, a set of XP_BIT()
 * of their places. One without elements may be without memory; its dimensions then say that it is there. dialect: the
 * record that wants() asked, or NULL. XP_E_ARG naming stage, operand and dialect. */
xp_status xp_ref_wanted_check(const xp_stage *s, const void *args, const xp_dialect *dialect, uint32_t free);

#endif
