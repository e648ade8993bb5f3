/* Backend ref: host memory and the list of reference rows. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ref.h"

/* The host device does everything at once; a queue only keeps its time marks. */
struct xp_device {
    int open;
};
struct xp_queue {
    double mark[64];
};

static struct xp_device host;

static xp_status host_open(int index, xp_device **out) {
    *out = NULL;
    if (index != 0)
        return XP_FAIL(XP_E_DEVICE, "device: the host has index 0 only, got %d", index);
    *out = &host;
    return XP_OK;
}

static void host_close(xp_device *dev) {
    (void)dev;
}

static xp_status host_alloc(xp_device *dev, size_t bytes, size_t align, void **out) {
    (void)dev;
    *out = NULL;
    if (align < sizeof(void *))
        align = sizeof(void *);
    if (posix_memalign(out, align, bytes ? bytes : 1) != 0) {
        *out = NULL;
        return XP_FAIL(XP_E_NOMEM, "alloc: %zu bytes of host memory", bytes);
    }
    return XP_OK;
}

static void host_release(xp_device *dev, void *p) {
    (void)dev;
    free(p);
}

static xp_status host_queue_open(xp_device *dev, xp_queue **out) {
    (void)dev;
    *out = calloc(1, sizeof **out);
    return *out ? XP_OK : XP_FAIL(XP_E_NOMEM, "queue: %zu bytes", sizeof **out);
}

static void host_queue_close(xp_queue *q) {
    free(q);
}

static xp_status host_copy(xp_queue *q, void *dst, xp_mem to, const void *src, xp_mem from, size_t bytes) {
    (void)q;
    if (to != XP_HOST || from != XP_HOST)
        return XP_FAIL(XP_E_DEVICE, "copy: the host device copies host memory only");
    memcpy(dst, src, bytes);
    return XP_OK;
}

static xp_status host_fill(xp_queue *q, void *dst, uint8_t byte, size_t bytes) {
    (void)q;
    memset(dst, byte, bytes);
    return XP_OK;
}

static xp_status host_sync(xp_queue *q) {
    (void)q;
    return XP_OK;
}

static xp_status host_mark(xp_queue *q, int slot) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    q->mark[slot & 63] = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    return XP_OK;
}

static xp_status host_elapsed(xp_queue *q, int from, int to, double *out_seconds) {
    *out_seconds = q->mark[to & 63] - q->mark[from & 63];
    return XP_OK;
}

const xp_device_ops xp_ref_device = {
    .abi = XP_ABI,
    .size = sizeof(xp_device_ops),
    .name = "host",
    .mem = XP_HOST,
    .open = host_open,
    .close = host_close,
    .alloc = host_alloc,
    .release = host_release,
    .queue_open = host_queue_open,
    .queue_close = host_queue_close,
    .copy = host_copy,
    .fill = host_fill,
    .sync = host_sync,
    .mark = host_mark,
    .elapsed = host_elapsed,
};

static const xp_kernel *const rows[] = {
    &xp_ref_cast,
    &xp_ref_quant,
    &xp_ref_dequant,
    &xp_ref_gather,
    &xp_ref_embed,
    &xp_ref_rmsnorm,
    &xp_ref_carry,
    &xp_ref_gelu,
    &xp_ref_router,
    &xp_ref_route,
    &xp_ref_balance,
    &xp_ref_capacity,
    &xp_ref_permute,
    &xp_ref_dispatch,
    &xp_ref_expert,
    &xp_ref_combine,
    &xp_ref_shared,
    &xp_ref_residual,
    &xp_ref_head,
    &xp_ref_xent,
    &xp_ref_xent_bwd,
    &xp_ref_head_bwd,
    &xp_ref_rmsnorm_bwd,
    &xp_ref_shared_bwd,
    &xp_ref_combine_bwd,
    &xp_ref_expert_bwd,
    &xp_ref_wgrad,
    &xp_ref_dispatch_bwd,
    &xp_ref_permute_bwd,
    &xp_ref_balance_bwd,
    &xp_ref_route_bwd,
    &xp_ref_route_scale_bwd,
    &xp_ref_router_bwd,
    &xp_ref_gelu_bwd,
    &xp_ref_carry_bwd,
    &xp_ref_embed_bwd,
    &xp_ref_moe,
    &xp_ref_scatter,
    &xp_ref_gradnorm,
    &xp_ref_clip,
    &xp_ref_adamw,
    &xp_ref_sgd,
    NULL,
};

const xp_backend xp_ref_backend = {
    .abi = XP_ABI,
    .size = sizeof(xp_backend),
    .name = "ref",
    .meaning = "the reference: plain C, double between the declared rounding points",
    .device = &xp_ref_device,
    .kernel = rows,
};
