/* Guarded allocations of one rank, see arena.h.
 *
 * Blocks are kept apart from the memory they describe, because that may be a device's. The bands hold a word that is
 * different for each block, so that copying one band over another shows. */
#include "arena.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGN = 64, MOST_GUARD = 1024, BAND_ROOM = MOST_GUARD + ALIGN };

typedef struct node node;
struct node {
    node *next;
    char *base;         /* what the device gave */
    size_t front, back; /* bytes of the bands; back fills up to ALIGN */
    xp_block block;
};

struct xp_arena {
    const xp_device_ops *ops;
    xp_device *dev;
    xp_queue *q;
    node *head; /* newest first */
    int serial;
    size_t live[XP_NKIND], peak[XP_NKIND], live_total, peak_total;
};

const char *xp_kind_name(xp_kind k) {
    static const char *const name[XP_NKIND] = {"param", "grad", "optim", "act", "buffer", "judge"};
    return (unsigned)k < XP_NKIND ? name[k] : "unknown";
}

xp_status xp_arena_open(const xp_device_ops *ops, xp_device *dev, xp_queue *q, xp_arena **out) {
    xp_arena *a = calloc(1, sizeof *a);
    *out = a;
    if (!a)
        return XP_FAIL(XP_E_NOMEM, "arena: %zu bytes", sizeof *a);
    a->ops = ops;
    a->dev = dev;
    a->q = q;
    return XP_OK;
}

void xp_arena_close(xp_arena *a) {
    if (!a)
        return;
    while (a->head)
        xp_arena_release(a, a->head->block.data);
    free(a);
}

/* ---- guard bands ---- */

static uint64_t band_word(const node *n) {
    return 0xdb5e2d96c3a8714bu * (2 * (uint64_t)n->block.serial + 1);
}

static void band_make(const node *n, size_t bytes, unsigned char *out) {
    const uint64_t w = band_word(n);
    for (size_t i = 0; i < bytes; i += sizeof w)
        memcpy(out + i, &w, bytes - i < sizeof w ? bytes - i : sizeof w);
}

static xp_status band_write(xp_arena *a, const node *n, char *at, size_t bytes) {
    unsigned char band[BAND_ROOM];
    band_make(n, bytes, band);
    if (a->ops->mem == XP_HOST) {
        memcpy(at, band, bytes);
        return XP_OK;
    }
    XP_TRY(a->ops->copy(a->q, at, a->ops->mem, band, XP_HOST, bytes));
    return a->ops->sync(a->q);
}

/* Looks at one band; a damaged one is described, counted and made whole. `front`: the band before the data. */
static xp_status band_check(xp_arena *a, const node *n, int front, xp_damage *out, int *out_damaged) {
    unsigned char want[BAND_ROOM], copy[BAND_ROOM];
    char *at = front ? n->base : n->block.data + n->block.bytes;
    const size_t bytes = front ? n->front : n->back;
    const unsigned char *have = (const unsigned char *)at;
    *out_damaged = 0;
    band_make(n, bytes, want);
    if (a->ops->mem != XP_HOST) {
        XP_TRY(a->ops->copy(a->q, copy, XP_HOST, at, a->ops->mem, bytes));
        XP_TRY(a->ops->sync(a->q));
        have = copy;
    }
    if (memcmp(have, want, bytes) == 0)
        return XP_OK;
    *out = (xp_damage){.block = n->block};
    for (size_t i = 0; i < bytes; i++) {
        if (have[i] == want[i])
            continue;
        if (front || out->damaged == 0)
            out->offset = front ? (int64_t)i - (int64_t)bytes : (int64_t)(n->block.bytes + i);
        out->damaged++;
    }
    *out_damaged = 1;
    return band_write(a, n, at, bytes);
}

int xp_arena_check(xp_arena *a, xp_damage *out, int n, xp_status *out_status) {
    int found = 0;
    *out_status = XP_OK;
    for (const node *b = a->head; b; b = b->next) {
        for (int front = 0; front < 2; front++) {
            xp_damage d;
            int damaged;
            *out_status = band_check(a, b, front, &d, &damaged);
            if (*out_status != XP_OK)
                return found;
            if (damaged && found < n)
                out[found] = d;
            found += damaged;
        }
    }
    return found;
}

/* ---- blocks ---- */

static size_t guard_bytes(size_t bytes) {
    return bytes >= 65536 ? MOST_GUARD : bytes >= 4096 ? 256 : ALIGN;
}

static void account(xp_arena *a, xp_kind kind, size_t bytes) {
    a->live[kind] += bytes;
    a->live_total += bytes;
    if (a->live[kind] > a->peak[kind])
        a->peak[kind] = a->live[kind];
    if (a->live_total > a->peak_total)
        a->peak_total = a->live_total;
}

xp_status xp_arena_alloc(xp_arena *a, xp_kind kind, size_t bytes, void **out) {
    xp_status st;
    void *base = NULL;
    *out = NULL;
    if (bytes > SIZE_MAX / 2)
        return XP_FAIL(XP_E_NOMEM, "%s memory: %zu bytes", xp_kind_name(kind), bytes);
    node *n = calloc(1, sizeof *n);
    if (!n)
        return XP_FAIL(XP_E_NOMEM, "%s memory: %zu bytes", xp_kind_name(kind), sizeof *n);
    n->front = guard_bytes(bytes);
    n->back = n->front + (ALIGN - bytes % ALIGN) % ALIGN;
    XP_GOTO(out, a->ops->alloc(a->dev, n->front + bytes + n->back, ALIGN, &base));
    n->base = base;
    n->block = (xp_block){n->base + n->front, bytes, kind, a->serial++};
    XP_GOTO(out, band_write(a, n, n->base, n->front));
    XP_GOTO(out, band_write(a, n, n->block.data + bytes, n->back));
    n->next = a->head;
    a->head = n;
    account(a, kind, bytes);
    *out = n->block.data;
    return XP_OK;
out:
    if (base)
        a->ops->release(a->dev, base);
    free(n);
    return st;
}

void xp_arena_release(xp_arena *a, void *p) {
    if (!p)
        return;
    node **link = &a->head;
    while (*link && (*link)->block.data != (char *)p)
        link = &(*link)->next;
    node *n = *link;
    assert(n && "released memory that this arena did not give");
    *link = n->next;
    a->live[n->block.kind] -= n->block.bytes;
    a->live_total -= n->block.bytes;
    a->ops->release(a->dev, n->base);
    free(n);
}

int xp_arena_find(const xp_arena *a, const void *p, xp_block *out) {
    const uintptr_t at = (uintptr_t)p;
    for (const node *n = a->head; n; n = n->next) {
        const uintptr_t lo = (uintptr_t)n->block.data;
        if (at >= lo && at <= lo + n->block.bytes) {
            *out = n->block;
            return 1;
        }
    }
    return 0;
}

void xp_arena_memory(const xp_arena *a, size_t live[XP_NKIND], size_t peak[XP_NKIND], size_t *out_peak_total) {
    memcpy(live, a->live, sizeof a->live);
    memcpy(peak, a->peak, sizeof a->peak);
    *out_peak_total = a->peak_total;
}
