/* Stage clip: scale a gradient by one coefficient so that its norm becomes at most max_norm.
 *
 * Contract: coef = min(1, RN32(max_norm / RN32(norm + eps))), two f32 operations on the one norm that all ranks hold,
 * so every rank has the same bits. coef = 1 touches no bit of grad (not even a NaN's payload); otherwise each element
 * becomes RN32(g * coef), once.
 *   - A NaN or infinite norm: coef is NaN and grad keeps its bits. The caller skips the step. (torch would turn every
 *     gradient NaN, or, for an infinite norm, finite gradients into 0 without a word.)
 *   - max_norm 0 gives coef 0 and a zero gradient of the same signs. norm 0 with eps 0 gives coef 1: 0/0 and x/0 ask
 *     for no clipping.
 * In f32 eps = 1e-6 is absorbed once norm >= 32. Must not be applied twice, and not through a narrower coefficient.
 * Source: torch.nn.utils.clip_grads_with_norm_, except for the non-finite rule and the untouched case. */
#include "xp/clip.h"

#include <math.h>

#include "check.h"
#include "flat.h"
#include "ref.h"

static const xp_operand operands[] = {
    XP_OPERAND(xp_clip_args, grad, "N", XP_INOUT, XP_BIT(XP_F32), XP_BITS, ""),
    XP_OPERAND(xp_clip_args, norm, "1", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_clip_args, coef, "1", XP_OUT, XP_BIT(XP_F32), XP_BITS, ""),
};

static const xp_param params[] = {
    {"max_norm", NULL, "1", XP_P_F32, offsetof(xp_clip_args, max_norm)},
    {"eps", NULL, "1e-6", XP_P_F32, offsetof(xp_clip_args, eps)},
};

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_clip_args *a = args;
    xp_ref_dims dims;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_clip, args, &dims));
    if (!(a->max_norm >= 0.0f && isfinite(a->max_norm)))
        return XP_FAIL(XP_E_ARG, "clip: max_norm is %g, expected a finite number >= 0", (double)a->max_norm);
    if (!(a->eps >= 0.0f && isfinite(a->eps)))
        return XP_FAIL(XP_E_ARG, "clip: eps is %g, expected a finite number >= 0", (double)a->eps);
    return XP_OK;
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const double n = (double)((const xp_clip_args *)args)->grad.dim[0];
    (void)m;
    *out = (xp_cost){.flop = n, .mem_bytes = 8.0 * n + 8.0};
}

/* A norm is not negative. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_clip_args *a = args;
    (void)m, (void)data, (void)seed;
    xp_ref_flat_abs(&a->norm);
    return XP_OK;
}

static int64_t extent(const void *args) {
    return ((const xp_clip_args *)args)->grad.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    ((xp_clip_args *)out)->grad = xp_tensor_rows(&((const xp_clip_args *)args)->grad, 0, lo, hi);
}

static float coefficient(float norm, float max_norm, float eps) {
    if (!isfinite(norm))
        return NAN;
    const float padded = norm + eps;
    const float c = max_norm / padded;
    return c < 1.0f ? c : 1.0f; /* false for the NaN of 0/0 too */
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_clip_args *a = args;
    const float c = coefficient(*(const float *)a->norm.data, a->max_norm, a->eps);
    float *g = a->grad.data;
    (void)x;
    *(float *)a->coef.data = c;
    if (!(c < 1.0f)) /* 1, or NaN */
        return XP_OK;
    for (int64_t i = 0; i < a->grad.dim[0]; i++)
        g[i] = g[i] * c;
    return XP_OK;
}

/* 0 <= coef <= 1 and coef * norm <= max_norm (1 + u): dividing by norm + eps >= norm, then one rounding. In units of
 * that limit; a coefficient below the normal numbers may be half the smallest subnormal too large. */
static xp_status within(const void *args, const xp_mesh *m, double *out) {
    const xp_clip_args *a = args;
    const double norm = (double)*(const float *)a->norm.data, c = (double)*(const float *)a->coef.data;
    (void)m;
    *out = 0.0;
    if (!isfinite(norm)) {
        *out = c != c ? 0.0 : (double)INFINITY;
    } else if (!(c >= 0.0 && c <= 1.0)) {
        *out = (double)INFINITY;
    } else if (norm > 0.0) {
        const double limit = (double)a->max_norm * (1.0 + 0x1p-24) + 0x1p-150 * norm;
        *out = c * norm / (limit * (1.0 + 0x1p-50)); /* the products above are in double */
    }
    return XP_OK;
}

static const xp_property properties[] = {{"within", within}};

const xp_stage xp_stage_clip = {
    .name = "clip",
    .meaning = "the gradient times min(1, max_norm / (norm + eps)); a coefficient of 1 touches no bit",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_clip_args),
    .operand = operands,
    .operands = sizeof operands / sizeof operands[0],
    .param = params,
    .params = sizeof params / sizeof params[0],
    .check = check,
    .cost = cost,
    .fill = fill,
    .extent = extent,
    .slice = slice,
    .property = properties,
    .properties = sizeof properties / sizeof properties[0],
};

const xp_kernel xp_ref_clip = {
    .stage = &xp_stage_clip,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
