/* Stages quant and dequant: block-scaled codes of 8 and 4 bits, and back.
 *
 * Contract: xp/quant.h, which numbers every rounding. An f32 quotient or product of f32 numbers is computed in double
 * and rounded: the double keeps 53 bits and two f32 numbers' quotient is never nearer than 2^-49 of itself to a tie, so
 * the second rounding sees the right side of every tie, subnormal results included (Figueroa 1995). Powers of two come
 * from exponents, never from a logarithm. Must not flush, and must not look beyond a block for its scale but for the
 * tensor's own. */
#include "xp/quant.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "flat.h"
#include "move.h"
#include "num.h"
#include "ref.h"
#include "token.h"

enum { CHUNK = 256 };
#define NARROW (XP_BIT(XP_F32) | XP_BIT(XP_BF16) | XP_BIT(XP_F16))
#define CODES (XP_DT_FP8 | XP_BIT(XP_E4M3FNUZ) | XP_BIT(XP_E5M2FNUZ) | XP_BIT(XP_E2M1))
#define SCALES (XP_BIT(XP_F32) | XP_BIT(XP_E8M0) | XP_BIT(XP_E4M3))

/* ---- blocks ---- */

static int64_t blocks_count(int64_t n, int64_t block) {
    if (n == 0 || block == 0)
        return n > 0;
    return (n - 1) / block + 1;
}

/* Rows [r0, r1) and columns [c0, c1). */
typedef struct {
    int64_t r0, r1, c0, c1;
} block;

static int64_t block_end(int64_t n, int64_t each, int64_t i) {
    return each == 0 || each > n - i * each ? n : (i + 1) * each;
}

static block block_at(const xp_tensor *x, int64_t rows, int64_t cols, int64_t i, int64_t j) {
    return (block){i * rows, block_end(x->dim[0], rows, i), j * cols, block_end(x->dim[1], cols, j)};
}

/* Codes are packed in E2M1, so an element is its number from data on, never an address. */
static int64_t element(const xp_tensor *t, int64_t r, int64_t c) {
    return r * t->stride[0] + c;
}

/* What both stages have in common. */
static xp_status grid_check(const char *stage, const xp_tensor *x, const xp_tensor *scales, const xp_tensor *second,
                            int64_t rows, int64_t cols) {
    const int64_t size[2] = {rows, cols};
    static const char *const name[2] = {"rows", "cols"};
    for (int d = 0; d < 2; d++) {
        if (size[d] < 0)
            return XP_FAIL(XP_E_ARG, "%s: %s is %lld, expected 0 (the whole dimension) or more", stage, name[d],
                           (long long)size[d]);
        if (scales->dim[d] != blocks_count(x->dim[d], size[d]))
            return XP_FAIL(XP_E_ARG, "%s: scales dim %d is %lld, expected %lld, the blocks of %lld in %lld", stage, d,
                           (long long)scales->dim[d], (long long)blocks_count(x->dim[d], size[d]), (long long)size[d],
                           (long long)x->dim[d]);
    }
    if (second->data && scales->dtype != XP_E4M3)
        return XP_FAIL(XP_E_ARG, "%s: scales has dtype %s, expected e4m3, as tensor_scale is present", stage,
                       xp_dtype_name(scales->dtype));
    return XP_OK;
}

/* Row blocks are independent, unless the tensor has a scale of its own or a view cannot start at a row of codes. */
static int64_t grid_extent(const xp_tensor *q, const xp_tensor *scales, const xp_tensor *second) {
    return q->dtype == XP_E2M1 || second->data ? 1 : scales->dim[0];
}

/* The rows of row blocks [lo, hi); 0 when there is only the whole. */
static int grid_slice(const xp_tensor *q, const xp_tensor *second, int64_t rows, int64_t lo, int64_t hi, block *out) {
    if (q->dtype == XP_E2M1 || second->data)
        return 0;
    *out = (block){lo * rows, hi > lo ? block_end(q->dim[0], rows, hi - 1) : lo * rows, 0, 0};
    return 1;
}

/* ---- f32 arithmetic ---- */

static double divide(double a, double b) {
    return (double)(float)(a / b);
}

static double multiply(double a, double b) {
    return (double)(float)(a * b);
}

/* ---- quant ---- */

static const xp_operand quant_operand[] = {
    XP_OPERAND(xp_quant_args, x, "T,H", XP_IN, NARROW, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_quant_args, q, "T,H", XP_OUT, CODES, XP_BITS, "code"),
    XP_OPERAND(xp_quant_args, scales, "I,J", XP_OUT, SCALES, XP_BITS, "scale"),
    XP_OPTIONAL(xp_quant_args, tensor_scale, "1", XP_OUT, XP_BIT(XP_F32), XP_BITS, ""),
};

static const xp_param quant_param[] = {
    {"rows", NULL, "1", XP_P_I64, offsetof(xp_quant_args, rows)},
    {"cols", NULL, "128", XP_P_I64, offsetof(xp_quant_args, cols)},
    {"rule", "amax|pow2|mx", "amax", XP_P_WORD, offsetof(xp_quant_args, rule)},
    {"nonfinite", "nan|one", "nan", XP_P_WORD, offsetof(xp_quant_args, nonfinite)},
    {"eps", NULL, "0", XP_P_F32, offsetof(xp_quant_args, eps)},
};

static xp_status quant_check(const void *args, const xp_mesh *m) {
    const xp_quant_args *a = args;
    xp_ref_dims dims;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_quant, args, &dims));
    XP_TRY(grid_check("quant", &a->x, &a->scales, &a->tensor_scale, a->rows, a->cols));
    if (a->rule < XP_SCALE_AMAX || a->rule > XP_SCALE_MX)
        return XP_FAIL(XP_E_ARG, "quant: rule is %d, expected 0 to 2 (amax, pow2, mx)", a->rule);
    if (a->rule != XP_SCALE_AMAX && a->scales.dtype == XP_E4M3)
        return XP_FAIL(XP_E_ARG, "quant: scales has dtype e4m3, expected f32 or e8m0 for powers of two (rule %d)",
                       a->rule);
    if (a->nonfinite != XP_BLOCK_NAN && a->nonfinite != XP_BLOCK_ONE)
        return XP_FAIL(XP_E_ARG, "quant: nonfinite is %d, expected 0 or 1 (nan, one)", a->nonfinite);
    if (!(a->eps >= 0.0f && isfinite(a->eps)))
        return XP_FAIL(XP_E_ARG, "quant: eps is %g, expected 0 or more", (double)a->eps);
    return XP_OK;
}

static void quant_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_quant_args *a = args;
    (void)m;
    *out = (xp_cost){.flop = 2.0 * (double)xp_tensor_count(&a->x), .mem_bytes = xp_ref_bytes(&xp_stage_quant, args)};
}

/* Blocks of very different sizes, some empty of anything but zeros: a scale in a wrong place cannot hide. */
static xp_status quant_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    const xp_quant_args *a = args;
    const xp_tensor *x = &a->x;
    (void)m;
    if (strcmp(data, "real") != 0)
        return XP_OK;
    for (int64_t i = 0; i < a->scales.dim[0]; i++) {
        for (int64_t j = 0; j < a->scales.dim[1]; j++) {
            const block b = block_at(x, a->rows, a->cols, i, j);
            const uint64_t h = xp_ref_flat_mix(seed, (uint64_t)(i * a->scales.dim[1] + j));
            const double by = h % 16 == 0 ? 0.0 : ldexp(1.0, (int)(h / 16 % 13) - 6);
            for (int64_t r = b.r0; r < b.r1; r++) {
                for (int64_t c = b.c0; c < b.c1; c++)
                    xp_ref_store(x->data, x->dtype, element(x, r, c),
                                 by * xp_widen(x->data, x->dtype, element(x, r, c)));
            }
        }
    }
    return XP_OK;
}

static int64_t quant_extent(const void *args) {
    const xp_quant_args *a = args;
    return grid_extent(&a->q, &a->scales, &a->tensor_scale);
}

static void quant_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_quant_args *a = args;
    xp_quant_args *o = out;
    block b;
    if (!grid_slice(&a->q, &a->tensor_scale, a->rows, lo, hi, &b))
        return;
    o->x = xp_tensor_rows(&a->x, 0, b.r0, b.r1);
    o->q = xp_tensor_rows(&a->q, 0, b.r0, b.r1);
    o->scales = xp_tensor_rows(&a->scales, 0, lo, hi);
}

/* The largest magnitude of a block; NaN when an element is not finite. */
static double largest(const xp_tensor *x, const block *b) {
    double v[CHUNK], top = 0.0;
    int finite = 1;
    for (int64_t r = b->r0; r < b->r1; r++) {
        for (int64_t c = b->c0; c < b->c1; c += CHUNK) {
            const int64_t n = b->c1 - c < CHUNK ? b->c1 - c : CHUNK;
            xp_widen_row(x->data, x->dtype, element(x, r, c), n, v);
            for (int64_t k = 0; k < n; k++) {
                finite &= isfinite(v[k]) != 0;
                top = fabs(v[k]) > top ? fabs(v[k]) : top;
            }
        }
    }
    return finite ? top : (double)NAN;
}

/* The smallest k with 2^k >= amax / max: both are m 2^e with m in [1/2, 1). */
static int exponent_above(double amax, double max) {
    int ea, em;
    const double ma = frexp(amax, &ea), mm = frexp(max, &em);
    return ea - em + (ma > mm);
}

/* floor(log2 amax) - EMAX. */
static int exponent_mx(double amax, double max) {
    int ea, em;
    (void)frexp(amax, &ea);
    (void)frexp(max, &em);
    return ea - em;
}

static double power(int k) {
    return ldexp(1.0, k < -127 ? -127 : k > 127 ? 127 : k);
}

/* amax / most, no smaller than the smallest f32: rounding points (1) and (5). */
static double quotient(double amax, double most) {
    const double s = divide(amax, most);
    return s < 0x1p-149 ? 0x1p-149 : s;
}

static double floored(const xp_quant_args *a, double amax) {
    return amax < (double)a->eps ? (double)a->eps : amax; /* a NaN stays */
}

static double tensor_scale_of(const xp_quant_args *a) {
    const block all = {0, a->x.dim[0], 0, a->x.dim[1]};
    const double amax = floored(a, largest(&a->x, &all));
    if (isnan(amax))
        return a->nonfinite == XP_BLOCK_ONE ? 1.0 : amax;
    return amax == 0.0 ? 1.0 : quotient(amax, xp_ref_largest(a->q.dtype) * xp_ref_largest(XP_E4M3));
}

/* The scale before it is rounded to its format: second is the tensor's, 1 when there is none. */
static double scale_of(const xp_quant_args *a, double amax, double second) {
    const double max = xp_ref_largest(a->q.dtype);
    if (isnan(amax))
        return a->nonfinite == XP_BLOCK_ONE ? 1.0 : amax;
    if (amax == 0.0)
        return a->scales.dtype == XP_F32 ? 1.0 : a->scales.dtype == XP_E8M0 ? 0x1p-127 : divide(0.0, second);
    switch (a->rule) {
    case XP_SCALE_POW2:
        return power(exponent_above(amax, max));
    case XP_SCALE_MX:
        return power(exponent_mx(amax, max));
    default:
        return divide(quotient(amax, max), second);
    }
}

static void codes_store(const xp_quant_args *a, const block *b, double scale) {
    double v[CHUNK];
    for (int64_t r = b->r0; r < b->r1; r++) {
        for (int64_t c = b->c0; c < b->c1; c += CHUNK) {
            const int64_t n = b->c1 - c < CHUNK ? b->c1 - c : CHUNK;
            xp_widen_row(a->x.data, a->x.dtype, element(&a->x, r, c), n, v);
            for (int64_t k = 0; k < n; k++) {
                const double t = scale == 0.0 ? copysign(0.0, v[k]) : divide(v[k], scale);
                xp_ref_put(a->q.data, a->q.dtype, element(&a->q, r, c) + k, xp_ref_narrow(t, a->q.dtype, 1));
            }
        }
    }
}

static xp_status quant_run(const xp_exec *x, const void *args) {
    const xp_quant_args *a = args;
    const xp_tensor *s = &a->scales;
    double second = 1.0;
    (void)x;
    if (a->tensor_scale.data) {
        second = tensor_scale_of(a);
        xp_ref_store(a->tensor_scale.data, XP_F32, 0, second);
    }
    for (int64_t i = 0; i < s->dim[0]; i++) {
        for (int64_t j = 0; j < s->dim[1]; j++) {
            const block b = block_at(&a->x, a->rows, a->cols, i, j);
            const double scale = scale_of(a, floored(a, largest(&a->x, &b)), second);
            xp_ref_put(s->data, s->dtype, element(s, i, j), xp_ref_narrow(scale, s->dtype, 1));
            codes_store(a, &b, multiply(xp_widen(s->data, s->dtype, element(s, i, j)), second));
        }
    }
    return XP_OK;
}

/* No code is further from its quotient than half a unit, unless it saturated; none saturates where s was rounded up,
 * but where an infinity or a NaN left the block its own values. */
static xp_status quant_nearest(const void *args, const xp_mesh *m, double *out) {
    const xp_quant_args *a = args;
    const double max = xp_ref_largest(a->q.dtype);
    const double second = a->tensor_scale.data ? xp_widen(a->tensor_scale.data, XP_F32, 0) : 1.0;
    (void)m;
    *out = 0.0;
    for (int64_t r = 0; r < a->x.dim[0]; r++) {
        for (int64_t c = 0; c < a->x.dim[1]; c++) {
            const int64_t i = a->rows ? r / a->rows : 0, j = a->cols ? c / a->cols : 0;
            const double s = xp_widen(a->scales.data, a->scales.dtype, element(&a->scales, i, j));
            const double t = xp_widen(a->x.data, a->x.dtype, element(&a->x, r, c)) / multiply(s, second);
            const double q = xp_widen(a->q.data, a->q.dtype, element(&a->q, r, c));
            if (!isfinite(t) || s == 0.0)
                continue;
            double e = fabs(q - t) / (xp_ref_half_ulp_err(a->q.dtype, t) + 0x1p-23 * fabs(t));
            if (fabs(t) > max)
                e = fabs(q) == max && (a->rule != XP_SCALE_POW2 || a->nonfinite == XP_BLOCK_ONE) ? 0.0 : 2.0;
            *out = e > *out ? e : *out;
        }
    }
    return XP_OK;
}

static const xp_property quant_property[] = {{"nearest", quant_nearest}};

const xp_stage xp_stage_quant = {
    .name = "quant",
    .meaning = "a matrix to 8- or 4-bit codes with a scale for each block, and one for the tensor if asked",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_quant_args),
    .operand = quant_operand,
    .operands = sizeof quant_operand / sizeof *quant_operand,
    .param = quant_param,
    .params = sizeof quant_param / sizeof *quant_param,
    .check = quant_check,
    .cost = quant_cost,
    .fill = quant_fill,
    .extent = quant_extent,
    .slice = quant_slice,
    .property = quant_property,
    .properties = sizeof quant_property / sizeof *quant_property,
};

const xp_kernel xp_ref_quant = {
    .stage = &xp_stage_quant,
    .name = "block_by_block",
    .det = XP_DET_RUN,
    .run = quant_run,
};

/* ---- dequant ---- */

static const xp_operand dequant_operand[] = {
    XP_OPERAND(xp_dequant_args, q, "T,H", XP_IN, CODES, XP_UNCOMPARED, "code"),
    XP_OPERAND(xp_dequant_args, scales, "I,J", XP_IN, SCALES, XP_UNCOMPARED, "scale"),
    XP_OPTIONAL(xp_dequant_args, tensor_scale, "1", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dequant_args, y, "T,H", XP_OUT, NARROW, XP_BITS, "act"),
};

static const xp_param dequant_param[] = {
    {"rows", NULL, "1", XP_P_I64, offsetof(xp_dequant_args, rows)},
    {"cols", NULL, "128", XP_P_I64, offsetof(xp_dequant_args, cols)},
};

static xp_status dequant_check(const void *args, const xp_mesh *m) {
    const xp_dequant_args *a = args;
    xp_ref_dims dims;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_dequant, args, &dims));
    return grid_check("dequant", &a->q, &a->scales, &a->tensor_scale, a->rows, a->cols);
}

static void dequant_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_dequant_args *a = args;
    (void)m;
    *out = (xp_cost){.flop = (double)xp_tensor_count(&a->y), .mem_bytes = xp_ref_bytes(&xp_stage_dequant, args)};
}

/* Any code at all; without NaN unless the data are extreme. E8M0 scales lie around 1. */
static void codes_fill(const xp_tensor *t, int extreme, uint64_t seed) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++) {
        const int64_t at = xp_tensor_offset(t, n);
        uint64_t code = xp_ref_flat_mix(seed, (uint64_t)n) & (t->dtype == XP_E2M1 ? 0xFu : 0xFFu);
        if (t->dtype == XP_E8M0 && !extreme)
            code = 119 + code % 17;
        xp_ref_put(t->data, t->dtype, at, code);
        if (!extreme && !isfinite(xp_widen(t->data, t->dtype, at)))
            xp_ref_put(t->data, t->dtype, at, 1);
    }
}

static xp_status dequant_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    const xp_dequant_args *a = args;
    const int extreme = strcmp(data, "extreme") == 0;
    (void)m;
    codes_fill(&a->q, extreme, seed);
    if (a->scales.dtype != XP_F32)
        codes_fill(&a->scales, extreme, seed + 1);
    return XP_OK;
}

static int64_t dequant_extent(const void *args) {
    const xp_dequant_args *a = args;
    return grid_extent(&a->q, &a->scales, &a->tensor_scale);
}

static void dequant_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_dequant_args *a = args;
    xp_dequant_args *o = out;
    block b;
    if (!grid_slice(&a->q, &a->tensor_scale, a->rows, lo, hi, &b))
        return;
    o->q = xp_tensor_rows(&a->q, 0, b.r0, b.r1);
    o->scales = xp_tensor_rows(&a->scales, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, b.r0, b.r1);
}

static void values_store(const xp_dequant_args *a, const block *b, double scale) {
    double v[CHUNK];
    for (int64_t r = b->r0; r < b->r1; r++) {
        for (int64_t c = b->c0; c < b->c1; c += CHUNK) {
            const int64_t n = b->c1 - c < CHUNK ? b->c1 - c : CHUNK;
            xp_widen_row(a->q.data, a->q.dtype, element(&a->q, r, c), n, v);
            for (int64_t k = 0; k < n; k++)
                v[k] = multiply(v[k], scale);
            xp_ref_store_row(a->y.data, a->y.dtype, element(&a->y, r, c), n, v);
        }
    }
}

static xp_status dequant_run(const xp_exec *x, const void *args) {
    const xp_dequant_args *a = args;
    const xp_tensor *s = &a->scales;
    const double second = a->tensor_scale.data ? xp_widen(a->tensor_scale.data, XP_F32, 0) : 1.0;
    (void)x;
    for (int64_t i = 0; i < s->dim[0]; i++) {
        for (int64_t j = 0; j < s->dim[1]; j++) {
            const block b = block_at(&a->q, a->rows, a->cols, i, j);
            values_store(a, &b, multiply(xp_widen(s->data, s->dtype, element(s, i, j)), second));
        }
    }
    return XP_OK;
}

const xp_stage xp_stage_dequant = {
    .name = "dequant",
    .meaning = "8- or 4-bit codes times the scale of their block, rounded to the activations' type",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_dequant_args),
    .operand = dequant_operand,
    .operands = sizeof dequant_operand / sizeof *dequant_operand,
    .param = dequant_param,
    .params = sizeof dequant_param / sizeof *dequant_param,
    .check = dequant_check,
    .cost = dequant_cost,
    .fill = dequant_fill,
    .extent = dequant_extent,
    .slice = dequant_slice,
};

const xp_kernel xp_ref_dequant = {
    .stage = &xp_stage_dequant,
    .name = "block_by_block",
    .det = XP_DET_RUN,
    .run = dequant_run,
};
