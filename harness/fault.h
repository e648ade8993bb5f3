/* Fault: a row wrapped on purpose, to show that the judge sees a mistake that real programs made.
 *
 * It takes the place of its stage's row in a run and is judged like any other row; nothing else knows about it. */
#ifndef XP_FAULT_H
#define XP_FAULT_H

#include "xp/kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct xp_fault xp_fault;
struct xp_fault {
    const char *name;
    const char *stage;     /* the stage whose row it wraps */
    const char *meaning;   /* one line: what goes wrong */
    const char *source;    /* the public report of the real bug */
    const char *caught_by; /* the class that must name it: xp_class_name() */
    /* Runs the wrong thing, with or without the row it wraps. Same rules as xp_kernel.run; the workspace is inner's. */
    xp_status (*run)(const xp_fault *self, const xp_kernel *inner, const xp_exec *x, const void *args);
};

/* The catalogue, ends with NULL; and one by name (NULL when there is none). */
extern const xp_fault *const xp_faults[];
const xp_fault *xp_fault_find(const char *name);

#ifdef __cplusplus
}
#endif
#endif
