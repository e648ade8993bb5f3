/* Arena: one rank's memory, every block between two guard bands, every byte accounted by kind.
 *
 * Only rank.c and the judge include this. A guard is found damaged when somebody looks, so the judge looks after every
 * call. */
#ifndef XP_ARENA_H
#define XP_ARENA_H

#include "rank.h"

#ifdef __cplusplus
extern "C" {
#endif

xp_status xp_arena_open(const xp_device_ops *ops, xp_device *dev, xp_queue *q, xp_arena **out);
void xp_arena_close(xp_arena *a); /* releases every block that is left; NULL-safe */
xp_status xp_arena_alloc(xp_arena *a, xp_kind kind, size_t bytes, void **out);
void xp_arena_release(xp_arena *a, void *p); /* NULL-safe */
void xp_arena_memory(const xp_arena *a, size_t live[XP_NKIND], size_t peak[XP_NKIND], size_t *out_peak_total);

/* A block: data [bytes]. */
typedef struct {
    char *data;
    size_t bytes;
    xp_kind kind;
    int serial; /* order of allocation */
} xp_block;
/* The block that holds address p (its end included, so that an empty view has one); 0 when there is none. */
int xp_arena_find(const xp_arena *a, const void *p, xp_block *out);

/* A damaged guard byte: before the block (offset < 0 from data) or after it (offset >= bytes). */
typedef struct {
    xp_block block;
    int64_t offset;  /* of the damaged byte nearest to the block */
    int64_t damaged; /* bytes */
} xp_damage;
/* Looks at the guards of every block (device memory is copied to look), repairs them, and fills up to n records;
 * returns the number of damaged bands, or XP_E_* through out_status when the memory could not be read. */
int xp_arena_check(xp_arena *a, xp_damage *out, int n, xp_status *out_status);

#ifdef __cplusplus
}
#endif
#endif
