/* Writes every stage call of a rank as a test of a vector set: inputs as they were, outputs as they came.
 *
 * A world of one rank gives one set, DIR; several ranks give DIR/rank0, DIR/rank1, ..., each a set that can be verified
 * by itself. Calls that communicate among several ranks, and stages whose arguments are not all tensors and scalars
 * (gather, scatter), are no tests: they are counted, not written. */
#ifndef XP_DUMP_H
#define XP_DUMP_H

#include "rank.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Makes the folder, before anything runs. XP_E_ARG naming dir when it holds a set already, XP_E_IO when it cannot be
 * made or written. NULL: nothing. */
xp_status xp_dump_check(const char *dir);
/* only: NULL, or the one stage that is written. XP_E_IO, XP_E_ARG (a set is there already). */
xp_status xp_dump_open(const char *dir, int rank, int world, uint64_t seed, const char *only, xp_dump **out);
/* Around a call: before() keeps what the call will change, after() writes. */
xp_status xp_dump_before(xp_dump *d, const xp_rank *r, const xp_stage *s, const void *args);
xp_status xp_dump_after(xp_dump *d, const xp_rank *r, const xp_stage *s, const char *site, const void *args);
/* Ends the set. NULL: nothing. out_tests, out_left: written, and left out; NULL-safe. */
xp_status xp_dump_finish(xp_dump *d, int64_t *out_tests, int64_t *out_left);
void xp_dump_close(xp_dump *d); /* NULL: nothing */

#ifdef __cplusplus
}
#endif
#endif
