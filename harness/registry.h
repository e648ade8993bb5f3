/* The backends that are built in, and the door through which others come. */
#ifndef XP_REGISTRY_H
#define XP_REGISTRY_H

#include "xp/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Ends with NULL: ref, dense. */
extern const xp_backend *const xp_backends[];

/* "ref", "dense" or "plugin:PATH". PATH must contain a '/': nothing is searched for. XP_E_ARG for an unknown name,
 * XP_E_IO when there is no such file, XP_E_PLUGIN when it cannot be loaded or breaks the contract (symbol, abi, size, a
 * name that is taken, a row without a stage or a run function). A plugin stays loaded. It is code that runs in this
 * process. */
xp_status xp_backend_open(const char *name, const xp_backend **out);
/* Who judges b: ref's rows are judged by dense, everybody else's by ref. */
const xp_backend *xp_backend_judge(const xp_backend *b);
const xp_backend *xp_backend_ref(void);

#ifdef __cplusplus
}
#endif
#endif
