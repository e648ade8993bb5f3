/* A backend to copy: every stage unsupported but one.
 *
 * Build it against the contract alone, without any part of expar:
 *     gcc -std=c11 -O2 -shared -fPIC -Iharness -o mine.so tests/plugin/null.c
 * and let every case of the stages that it has rows for judge it:
 *     expar check 'residual T=33 H=97 dtype=f32,bf16' --impl plugin:./mine.so
 *
 * What it calls (xp_widen, xp_fail, ...) and the stages it names are the program's: they resolve when it is loaded. A
 * row must not allocate, print or exit; memory comes from workspace(), errors go out as a status. */
#include <string.h>

#include "xp/backend.h"
#include "xp/residual.h"

/* y = r(a + b). The arguments have passed the stage's check(): shapes agree, the last stride is 1. */
static xp_status residual(const xp_exec *x, const void *args) {
    const xp_residual_args *a = args;
    (void)x;
    for (int64_t t = 0; t < a->y.dim[0]; t++) {
        for (int64_t h = 0; h < a->y.dim[1]; h++) {
            const float sum = (float)xp_widen(xp_tensor_at(&a->a, t, h, 0, 0), a->a.dtype, 0) +
                              (float)xp_widen(xp_tensor_at(&a->b, t, h, 0, 0), a->b.dtype, 0);
            *(float *)xp_tensor_at(&a->y, t, h, 0, 0) = sum;
        }
    }
    return XP_OK;
}

/* A row says what it cannot do, with the reason that the report shows; nothing else runs in its place. */
static const char *residual_why_not(const void *args, const xp_mesh *m) {
    const xp_residual_args *a = args;
    (void)m;
    if (!a->b.data || (a->factor != 0 && a->factor != 1))
        return "it adds two tensors, without a factor";
    return a->y.dtype == XP_F32 ? NULL : "it computes f32 only";
}

static const xp_kernel row_residual = {
    .stage = &xp_stage_residual, .name = "loop", .det = XP_DET_RUN, .why_not = residual_why_not, .run = residual};

static const xp_kernel *const rows[] = {&row_residual, NULL};

const xp_backend *xp_plugin(void) {
    static const xp_backend backend = {
        .abi = XP_ABI,
        .size = sizeof(xp_backend),
        .name = "null",
        .meaning = "the template: residual in f32, nothing else",
        .device = NULL, /* host memory: the host's device is lent */
        .kernel = rows,
    };
    return &backend;
}
