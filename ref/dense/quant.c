/* Second formulation of stages quant and dequant: float arithmetic of the language, powers of two by trying one after
 * the other, each element's block looked up by division. It shares nothing with the reference but the contract. */
#include <math.h>

#include "dense.h"
#include "num.h"

/* Largest finite code value, and the exponent of its leading bit. */
typedef struct {
    float max;
    int emax;
} range;

static range range_of(xp_dtype d) {
    switch (d) {
    case XP_E4M3:
        return (range){448.0f, 8};
    case XP_E4M3FNUZ:
        return (range){240.0f, 7};
    case XP_E2M1:
        return (range){6.0f, 2};
    default:
        return (range){57344.0f, 15};
    }
}

static int64_t place(const xp_tensor *t, int64_t r, int64_t c) {
    return xp_dense_at(t, r, c, 0, 0);
}

static int64_t index_of(int64_t at, int64_t each) {
    return each == 0 ? 0 : at / each;
}

/* ---- quant ---- */

/* Where a is not finite, inf: one flag for both kinds. */
static float amax_of(const xp_quant_args *a, int64_t i, int64_t j, int everywhere) {
    float top = 0.0f;
    for (int64_t r = 0; r < a->x.dim[0]; r++) {
        if (!everywhere && index_of(r, a->rows) != i)
            continue;
        for (int64_t c = everywhere || a->cols == 0 ? 0 : j * a->cols; c < a->x.dim[1]; c++) {
            if (!everywhere && index_of(c, a->cols) != j)
                break;
            const float v = fabsf((float)xp_dense_get(&a->x, place(&a->x, r, c)));
            if (!isfinite(v))
                return HUGE_VALF;
            top = fmaxf(top, v);
        }
    }
    return fmaxf(top, a->eps);
}

/* What stands for a scale when an element is not finite. */
static float instead(const xp_quant_args *a) {
    return a->nonfinite == XP_BLOCK_ONE ? 1.0f : (float)NAN;
}

static float over(float amax, float most) {
    return fmaxf(amax / most, 0x1p-149f);
}

static float tensor_scale_of(const xp_quant_args *a) {
    const float amax = amax_of(a, 0, 0, 1);
    if (isinf(amax))
        return instead(a);
    return amax == 0.0f ? 1.0f : over(amax, range_of(a->q.dtype).max * 448.0f);
}

/* Tries every power of two: the first whose largest code reaches amax, or the last that is not above it. */
static float power_of(const xp_quant_args *a, float amax) {
    const range g = range_of(a->q.dtype);
    int k = -127;
    if (a->rule == XP_SCALE_POW2) {
        while (k < 127 && ldexp((double)g.max, k) < (double)amax)
            k++;
    } else {
        while (k < 127 && ldexp(1.0, k + 1 + g.emax) <= (double)amax)
            k++;
    }
    return (float)ldexp(1.0, k);
}

static float scale_of(const xp_quant_args *a, int64_t i, int64_t j, float second) {
    const float amax = amax_of(a, i, j, 0);
    if (isinf(amax))
        return instead(a);
    if (amax == 0.0f && a->scales.dtype == XP_F32)
        return 1.0f;
    if (amax == 0.0f)
        return a->scales.dtype == XP_E8M0 ? 0x1p-127f : 0.0f * second;
    if (a->rule != XP_SCALE_AMAX)
        return power_of(a, amax);
    return over(amax, range_of(a->q.dtype).max) / second;
}

/* Scales first, then each element by the scale of the block that it lies in. */
static xp_status quant_run(const xp_exec *x, const void *args) {
    const xp_quant_args *a = args;
    float second = 1.0f;
    (void)x;
    if (a->tensor_scale.data) {
        second = tensor_scale_of(a);
        xp_dense_put(&a->tensor_scale, 0, (double)second);
    }
    for (int64_t i = 0; i < a->scales.dim[0]; i++) {
        for (int64_t j = 0; j < a->scales.dim[1]; j++) {
            const double s = (double)scale_of(a, i, j, second);
            xp_dense_put_code(&a->scales, place(&a->scales, i, j), xp_dense_narrow(s, a->scales.dtype, 1));
        }
    }
    for (int64_t r = 0; r < a->x.dim[0]; r++) {
        for (int64_t c = 0; c < a->x.dim[1]; c++) {
            const int64_t at = place(&a->scales, index_of(r, a->rows), index_of(c, a->cols));
            const float s = (float)xp_dense_get(&a->scales, at) * second;
            const float v = (float)xp_dense_get(&a->x, place(&a->x, r, c));
            const float t = s == 0.0f ? 0.0f * (signbit(v) ? -1.0f : 1.0f) : v / s;
            xp_dense_put_code(&a->q, place(&a->q, r, c), xp_dense_narrow((double)t, a->q.dtype, 1));
        }
    }
    return XP_OK;
}

/* ---- dequant ---- */

static xp_status dequant_run(const xp_exec *x, const void *args) {
    const xp_dequant_args *a = args;
    const float second = a->tensor_scale.data ? (float)xp_dense_get(&a->tensor_scale, 0) : 1.0f;
    (void)x;
    for (int64_t r = 0; r < a->q.dim[0]; r++) {
        for (int64_t c = 0; c < a->q.dim[1]; c++) {
            const int64_t at = place(&a->scales, index_of(r, a->rows), index_of(c, a->cols));
            const float s = (float)xp_dense_get(&a->scales, at) * second;
            const float v = (float)xp_dense_get(&a->q, place(&a->q, r, c)) * s;
            xp_dense_put(&a->y, place(&a->y, r, c), (double)v);
        }
    }
    return XP_OK;
}

const xp_kernel xp_dense_quant = {
    .stage = &xp_stage_quant,
    .name = "dense",
    .det = XP_DET_RUN,
    .run = quant_run,
};
const xp_kernel xp_dense_dequant = {
    .stage = &xp_stage_dequant,
    .name = "dense",
    .det = XP_DET_RUN,
    .run = dequant_run,
};
