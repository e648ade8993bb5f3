/* Stage clip: scale a gradient by one coefficient so that its norm becomes at most max_norm.
 *
 * Contract, semantics exact: coef = min(1, RN32(max_norm / RN32(norm + eps))), two f32 operations on the one norm that
 * all ranks hold, so every rank has the same bits. coef = 1 touches no bit of grad (not even a NaN's payload);
 * otherwise each element becomes RN32(g * coef), once.
 *   - A NaN or infinite norm, nonfinite skip: coef is NaN and grad keeps its bits; the caller skips the step.
 *     propagate: the formula as it stands, as torch: a NaN norm turns every gradient NaN; an infinite one gives coef
 *     0, which turns finite gradients into 0 without a word and infinite ones into NaN. error: XP_E_ARG on every rank
 *     alike, coef NaN, grad keeps its bits (torch: error_if_nonfinite).
 *   - max_norm 0 gives coef 0 and a zero gradient of the same signs. norm 0 with eps 0 gives coef 1: 0/0 and x/0 ask
 *     for no clipping.
 * In f32 eps = 1e-6 is absorbed once norm >= 32. Must not be applied twice, and not through a narrower coefficient.
 *
 * Contract, semantics torch, with d = grad's dtype and each operation rounded to f32 and then to d: sum = norm + eps;
 * inverse = 1 / sum; coef = min(1, inverse * max_norm), a NaN staying NaN; g = g * coef, always, though coef be 1.
 *   - max_norm / tensor is a reciprocal and a product in Python: two roundings, which differ from the quotient's one
 *     for about one norm in ten.
 *   - max_norm 0 zeroes; a negative max_norm turns signs and scales by |max_norm|; a NaN max_norm poisons.
 *   - norm 0 with eps 0: 1/0 is infinite; times max_norm 0 it is NaN.
 *   - nonfinite skip is no choice of torch's: it is as in exact.
 * Source: torch.nn.utils.clip_grads_with_norm_ (2.13), which exact leaves in the non-finite rule, the quotient and the
 * untouched case. */
#include "xp/clip.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "num.h"
#include "ref.h"

#define FLOATS (XP_BIT(XP_F32) | XP_BIT(XP_BF16) | XP_BIT(XP_F16))

static const xp_operand operands[] = {
    XP_OPERAND(xp_clip_args, grad, "N", XP_INOUT, FLOATS, XP_BITS, "grad"),
    XP_OPERAND(xp_clip_args, norm, "1", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_clip_args, coef, "1", XP_OUT, XP_BIT(XP_F32), XP_BITS, ""),
};

static const xp_param params[] = {
    {"max_norm", NULL, "1", XP_P_F32, offsetof(xp_clip_args, max_norm)},
    {"eps", NULL, "1e-6", XP_P_F32, offsetof(xp_clip_args, eps)},
    {"nonfinite", "skip|propagate|error", "skip", XP_P_WORD, offsetof(xp_clip_args, nonfinite)},
    {"semantics", "exact|torch", "exact", XP_P_WORD, offsetof(xp_clip_args, semantics)},
};

static xp_status check_words(const xp_clip_args *a) {
    if ((unsigned)a->nonfinite > XP_NONFINITE_ERROR)
        return XP_FAIL(XP_E_ARG, "clip: nonfinite is %d, expected skip, propagate or error", a->nonfinite);
    if (a->semantics != XP_EXACT && a->semantics != XP_TORCH)
        return XP_FAIL(XP_E_ARG, "clip: semantics is %d, expected exact or torch", a->semantics);
    if (a->semantics == XP_EXACT && a->grad.dtype != XP_F32)
        return XP_FAIL(XP_E_ARG, "clip: grad has dtype %s, expected f32 (only semantics torch scales in fewer bits)",
                       xp_dtype_name(a->grad.dtype));
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_clip_args *a = args;
    xp_ref_dims dims;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_clip, args, &dims));
    XP_TRY(check_words(a));
    if (a->semantics == XP_EXACT && !(a->max_norm >= 0.0f && isfinite(a->max_norm)))
        return XP_FAIL(XP_E_ARG, "clip: max_norm is %g, expected a finite number >= 0", (double)a->max_norm);
    if (!(a->eps >= 0.0f && isfinite(a->eps)))
        return XP_FAIL(XP_E_ARG, "clip: eps is %g, expected a finite number >= 0", (double)a->eps);
    return XP_OK;
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_tensor *g = &((const xp_clip_args *)args)->grad;
    const double n = (double)g->dim[0];
    (void)m;
    *out = (xp_cost){.flop = n, .mem_bytes = 2.0 * (double)xp_dtype_bytes(g->dtype, 1) * n + 8.0};
}

/* A norm is not negative, and torch's is a value of grad's dtype. One element of extreme data is neither a NaN nor
 * infinite, so every third seed makes it the one, every third one the other. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_clip_args *a = args;
    float *norm = a->norm.data;
    (void)m;
    *norm = (float)xp_ref_round(fabs((double)*norm), a->grad.dtype);
    if (strcmp(data, "extreme") == 0 && seed % 3 != 0)
        *norm = seed % 3 == 1 ? NAN : INFINITY;
    return XP_OK;
}

static int64_t extent(const void *args) {
    return ((const xp_clip_args *)args)->grad.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    ((xp_clip_args *)out)->grad = xp_tensor_rows(&((const xp_clip_args *)args)->grad, 0, lo, hi);
}

static float exact_coefficient(float norm, float max_norm, float eps) {
    const float padded = norm + eps;
    const float c = max_norm / padded;
    if (norm != norm)
        return NAN;
    return c < 1.0f ? c : 1.0f; /* false for the NaN of 0/0 too */
}

/* An operation's f32 result, kept in d. */
static float kept(float v, xp_dtype d) {
    return (float)xp_ref_round((double)v, d);
}

static float torch_coefficient(const xp_clip_args *a, float norm) {
    const xp_dtype d = a->grad.dtype;
    const float inverse = kept(1.0f / kept(norm + a->eps, d), d);
    const float c = kept(inverse * a->max_norm, d);
    return c > 1.0f ? 1.0f : c; /* a NaN stays */
}

static void scale(const xp_tensor *grad, float c) {
    if (grad->dtype == XP_F32) {
        float *g = grad->data;
        for (int64_t i = 0; i < grad->dim[0]; i++)
            g[i] = g[i] * c;
        return;
    }
    for (int64_t i = 0; i < grad->dim[0]; i++)
        xp_ref_store(grad->data, grad->dtype, i, (double)((float)xp_widen(grad->data, grad->dtype, i) * c));
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_clip_args *a = args;
    const float norm = *(const float *)a->norm.data;
    float *coef = a->coef.data;
    (void)x;
    *coef = NAN;
    if (!isfinite(norm) && a->nonfinite == XP_NONFINITE_ERROR)
        return XP_FAIL(XP_E_ARG, "clip: the norm is %g, expected a finite one (nonfinite is error)", (double)norm);
    if (!isfinite(norm) && a->nonfinite == XP_NONFINITE_SKIP)
        return XP_OK;
    *coef = a->semantics == XP_TORCH ? torch_coefficient(a, norm) : exact_coefficient(norm, a->max_norm, a->eps);
    if (a->semantics == XP_TORCH || *coef != 1.0f)
        scale(&a->grad, *coef);
    return XP_OK;
}

/* Exact: 0 <= coef <= 1 and coef * norm <= max_norm (1 + u): dividing by norm + eps >= norm, then one rounding. In
 * units of that limit; a coefficient below the normal numbers may be half the smallest subnormal too large. */
static xp_status within(const void *args, const xp_mesh *m, double *out) {
    const xp_clip_args *a = args;
    const double norm = (double)*(const float *)a->norm.data, c = (double)*(const float *)a->coef.data;
    (void)m;
    *out = 0.0;
    if (a->semantics == XP_TORCH)
        return XP_OK;
    if (!isfinite(norm)) {
        const int right = a->nonfinite == XP_NONFINITE_PROPAGATE && norm == norm ? c == 0.0 : c != c;
        *out = right ? 0.0 : (double)INFINITY;
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
