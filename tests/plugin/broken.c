/* Plugins that break the contract, one for each refusal: built with BROKEN_ABI, BROKEN_SIZE, BROKEN_NULL, BROKEN_ROW or
 * BROKEN_SYMBOL. */
#include "xp/backend.h"

#ifndef BROKEN_SYMBOL
static const xp_stage foreign = {.name = "foreign"};
static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    (void)args;
    return XP_OK;
}
static const xp_kernel row = {.stage = &foreign, .name = "row", .run = run};
static const xp_kernel *const rows[] = {&row, NULL};

const xp_backend *xp_plugin(void) {
    static const xp_backend backend = {
#ifdef BROKEN_ABI
        .abi = XP_ABI + 1,
#else
        .abi = XP_ABI,
#endif
#ifdef BROKEN_SIZE
        .size = sizeof(xp_backend) - 8,
#else
        .size = sizeof(xp_backend),
#endif
        .name = "broken",
        .meaning = "breaks the contract",
        .kernel = rows,
    };
#ifdef BROKEN_NULL
    return (void)backend, (const xp_backend *)0;
#else
    return &backend;
#endif
}
#else
int xp_not_a_plugin(void);
int xp_not_a_plugin(void) {
    return 0;
}
#endif
