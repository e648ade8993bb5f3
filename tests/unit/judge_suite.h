/* What the judge's own tests share: a mesh of one rank, and running one call under a judge to a judgement.
 *
 * The stages that these tests judge are toys, so that every expected finding can be stated by hand. */
#ifndef XP_TESTS_JUDGE_SUITE_H
#define XP_TESTS_JUDGE_SUITE_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "judge.h"
#include "num.h"
#include "ref.h"

/* A rank alone in the world; ep_size only says how many ranks the ep axis would have. */
typedef struct {
    xp_comm one, ep;
    xp_mesh mesh;
} lone;

static inline void lone_open(lone *l, int ep_size) {
    memset(l, 0, sizeof *l);
    l->one.size = 1;
    l->ep.size = ep_size;
    for (int a = 0; a < XP_NAXIS; a++)
        l->mesh.axis[a] = a == XP_EP ? &l->ep : &l->one;
}

/* A backend of one row, or of none, on the host. */
typedef struct {
    const xp_kernel *row[2];
    xp_backend b;
} small_backend;

static inline void backend_of(small_backend *s, const char *name, const xp_kernel *row) {
    s->row[0] = row;
    s->row[1] = NULL;
    s->b = (xp_backend){.abi = XP_ABI, .size = sizeof s->b, .name = name, .device = &xp_ref_device, .kernel = s->row};
}

/* The line of an operand ("" for the call itself), or NULL. */
static inline const xp_finding *line_of(const xp_judgement *g, const char *operand) {
    for (int i = 0; i < g->lines; i++) {
        if (strcmp(g->line[i].operand, operand) == 0)
            return &g->line[i];
    }
    return NULL;
}

#endif
