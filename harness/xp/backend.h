/* Backend: a device and its kernel rows, best first. A plugin is a shared object that exports xp_plugin(). */
#ifndef XP_BACKEND_H
#define XP_BACKEND_H

#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    uint32_t abi, size; /* XP_ABI, sizeof(xp_backend): another value is refused with exit code 12 */
    const char *name, *meaning;
    const xp_device_ops *device;
    const xp_kernel *const *kernel; /* ends with NULL */
} xp_backend;

/* The list of stages, ends with NULL; and a stage by name (NULL when there is none). A plugin finds its stages here. */
extern const xp_stage *const xp_stages[];
const xp_stage *xp_stage_find(const char *name);

/* The one symbol that a third party's shared object exports. */
const xp_backend *xp_plugin(void);

#ifdef __cplusplus
}
#endif
#endif
