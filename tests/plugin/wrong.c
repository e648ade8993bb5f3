/* A backend whose one row is wrong: it adds two tensors, but looks at where a token lies. Relations must see it. */
#include "xp/backend.h"
#include "xp/residual.h"

static xp_status residual(const xp_exec *x, const void *args) {
    const xp_residual_args *a = args;
    (void)x;
    for (int64_t t = 0; t < a->y.dim[0]; t++) {
        for (int64_t h = 0; h < a->y.dim[1]; h++) {
            const float p = *(const float *)xp_tensor_at(&a->a, t, h, 0, 0);
            const float q = *(const float *)xp_tensor_at(&a->b, t, h, 0, 0);
            *(float *)xp_tensor_at(&a->y, t, h, 0, 0) = t % 3 == 2 ? p + 1.0625f * q : p + q;
        }
    }
    return XP_OK;
}

static const char *residual_why_not(const void *args, const xp_mesh *m) {
    const xp_residual_args *a = args;
    (void)m;
    if (!a->b.data || (a->factor != 0 && a->factor != 1))
        return "it adds two tensors, without a factor";
    return a->y.dtype == XP_F32 && a->a.dtype == XP_F32 && a->b.dtype == XP_F32 ? NULL : "it computes f32 only";
}

static const xp_kernel row_residual = {.stage = &xp_stage_residual,
                                       .name = "loop",
                                       .det = XP_DET_RUN | XP_DET_MESH,
                                       .why_not = residual_why_not,
                                       .run = residual};

static const xp_kernel *const rows[] = {&row_residual, NULL};

const xp_backend *xp_plugin(void) {
    static const xp_backend backend = {
        .abi = XP_ABI,
        .size = sizeof(xp_backend),
        .name = "wrong",
        .meaning = "residual in f32, wrong for every third token",
        .device = NULL,
        .kernel = rows,
    };
    return &backend;
}
