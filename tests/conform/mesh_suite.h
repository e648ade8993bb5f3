/* What the mesh suites share: the mesh under test is named by its sizes, its kind comes from EXPAR_MESH (default sim),
 * and a kind that is not available here skips the test. Ranks must not use cmocka's asserts (they jump): they return
 * MUST's error. */
#ifndef XP_TESTS_MESH_SUITE_H
#define XP_TESTS_MESH_SUITE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mesh.h"

#define MUST(cond, ...)                            \
    do {                                           \
        if (!(cond))                               \
            return XP_FAIL(XP_E_BUG, __VA_ARGS__); \
    } while (0)

static inline const char *suite_kind(void) {
    const char *kind = getenv("EXPAR_MESH");
    return kind ? kind : "sim";
}

static inline void suite_spec(const char *sizes, xp_mesh_spec *out) {
    char text[2 * XP_MESH_TEXT];
    snprintf(text, sizeof text, "%s:%s", suite_kind(), sizes);
    if (xp_mesh_spec_parse(text, out) != XP_OK)
        fail_msg("%s: %s", text, xp_error_text());
}

/* Runs, or skips the whole test. The report's status is the caller's to judge. */
static inline void suite_run(const char *sizes, xp_rank_fn fn, void *arg, xp_mesh_report *out) {
    xp_mesh_spec s;
    suite_spec(sizes, &s);
    xp_mesh_run(&s, fn, arg, out);
    if (out->status == XP_E_DEVICE && out->world == 0)
        skip();
}

static inline void suite_expect_ok(const char *sizes, const xp_mesh_report *r) {
    if (r->status != XP_OK)
        fail_msg("%s: rank %d: %s: %s", sizes, r->first, xp_status_name(r->status), r->end[r->first].text);
}

#endif
