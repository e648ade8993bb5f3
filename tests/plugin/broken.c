/* Plugins that break the contract, one for each refusal: built with BROKEN_ABI, BROKEN_SIZE, BROKEN_NULL, BROKEN_ROW,
 * BROKEN_NAME, BROKEN_DEVICE, BROKEN_LINK or BROKEN_SYMBOL. */
#include "xp/backend.h"

#ifndef BROKEN_SYMBOL
static const xp_stage foreign = {.name = "foreign"};
static const xp_device_ops device = {.abi = XP_ABI, .size = sizeof(xp_device_ops) + 8, .name = "foreign"};
#ifdef BROKEN_LINK
xp_status xp_not_in_the_contract(void);
#endif
static xp_status run(const xp_exec *x, const void *args) {
    (void)x;
    (void)args;
#ifdef BROKEN_LINK
    return xp_not_in_the_contract();
#else
    return XP_OK;
#endif
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
#ifdef BROKEN_NAME
        .name = "ref",
#else
        .name = "broken",
#endif
#ifdef BROKEN_DEVICE
        .device = &device,
#endif
        .meaning = "breaks the contract",
        .kernel = rows,
    };
    (void)device;
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
