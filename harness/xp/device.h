/* Device: memory, order and time, as a table that a backend supplies. The harness allocates everything through it. */
#ifndef XP_DEVICE_H
#define XP_DEVICE_H

#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_ABI = 1 }; /* first field of every exported table; a different number is refused */

typedef struct xp_device xp_device;
typedef struct xp_queue xp_queue;

/* All calls on one queue take effect in call order. A host device may do everything at once. */
typedef struct {
    uint32_t abi, size; /* XP_ABI, sizeof(xp_device_ops) */
    const char *name;
    xp_mem mem;                                    /* what alloc returns */
    xp_status (*open)(int index, xp_device **out); /* XP_E_DEVICE when absent: the harness SKIPs on that */
    void (*close)(xp_device *dev);
    xp_status (*alloc)(xp_device *dev, size_t bytes, size_t align, void **out); /* bytes 0: a valid pointer */
    void (*release)(xp_device *dev, void *p);
    xp_status (*queue_open)(xp_device *dev, xp_queue **out);
    void (*queue_close)(xp_queue *q);
    xp_status (*copy)(xp_queue *q, void *dst, xp_mem to, const void *src, xp_mem from, size_t bytes);
    xp_status (*fill)(xp_queue *q, void *dst, uint8_t byte, size_t bytes);
    xp_status (*sync)(xp_queue *q);           /* also returns the errors of earlier asynchronous work */
    xp_status (*mark)(xp_queue *q, int slot); /* time stamp in queue order, slot 0..63 */
    xp_status (*elapsed)(xp_queue *q, int from, int to, double *out_seconds);
} xp_device_ops;

#ifdef __cplusplus
}
#endif
#endif
