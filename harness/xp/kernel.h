/* Kernel row: one way to run one stage. A fault, a plugin and the reference are this same type. */
#ifndef XP_KERNEL_H
#define XP_KERNEL_H

#include "stage.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_device *dev;
    xp_queue *q;
    const xp_mesh *mesh;
    void *ws; /* workspace() bytes, aligned to 64, poisoned before every run */
    size_t ws_bytes;
} xp_exec;

typedef struct {
    const xp_stage *stage;
    const char *name;
    uint32_t det; /* XP_DET_* */
    /* NULL, or a function: NULL from it means "can run", else a short static reason. */
    const char *(*why_not)(const void *args, const xp_mesh *m);
    size_t (*workspace)(const void *args, const xp_mesh *m); /* NULL: none */
    /* Enqueues and does not synchronise; args already passed stage->check. Never allocates. */
    xp_status (*run)(const xp_exec *x, const void *args);
} xp_kernel;

#ifdef __cplusplus
}
#endif
#endif
