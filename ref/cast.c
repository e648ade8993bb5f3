/* Stage cast: narrow or widen a flat array.
 *
 * Contract: y[i] is x[i] rounded once to y's format, to nearest, ties to even (e8m0: up). A value beyond the largest
 * finite one follows the format: infinity where it has one (f32, bf16, f16, e5m2), else NaN (e4m3, fnuz, e8m0); with
 * saturate it becomes the largest finite value of its sign. NaN stays NaN, whatever its payload; -0 keeps its sign
 * where the format has two zeros; subnormals are kept on both sides. ref/num.h has the table of every code. Must not
 * flush, and must not round twice (f64 to f32 to bf16 is another function). Source: IEEE 754-2019 4.3.1, OCP OFP8 1.0,
 * OCP MX 1.0. */
#include "xp/cast.h"

#include <math.h>

#include "check.h"
#include "flat.h"
#include "num.h"
#include "ref.h"

enum { CHUNK = 256 };
#define FLOATS (XP_DT_FLOAT | XP_BIT(XP_E4M3FNUZ) | XP_BIT(XP_E5M2FNUZ) | XP_BIT(XP_E8M0) | XP_BIT(XP_E2M1))

static const xp_operand operands[] = {
    XP_OPERAND(xp_cast_args, x, "N", XP_IN, FLOATS, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_cast_args, y, "N", XP_OUT, FLOATS, XP_BITS, "param"),
};

static const xp_param params[] = {
    {"saturate", NULL, "0", XP_P_INT, offsetof(xp_cast_args, saturate)},
};

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_cast_args *a = args;
    xp_ref_dims dims;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_cast, args, &dims));
    if (a->saturate != 0 && a->saturate != 1)
        return XP_FAIL(XP_E_ARG, "cast: saturate is %d, expected 0 or 1", a->saturate);
    return XP_OK;
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_cast_args *a = args;
    const int64_t n = a->x.dim[0];
    (void)m;
    *out = (xp_cost){.mem_bytes = (double)xp_dtype_bytes(a->x.dtype, n) + (double)xp_dtype_bytes(a->y.dtype, n)};
}

/* Any code at all in the formats that the generic generator does not write: scales, fp4 and fnuz. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    const xp_cast_args *a = args;
    const xp_dtype d = a->x.dtype;
    (void)m, (void)data;
    if (d != XP_E4M3FNUZ && d != XP_E5M2FNUZ && d != XP_E8M0 && d != XP_E2M1)
        return XP_OK;
    for (int64_t i = 0; i < a->x.dim[0]; i++)
        xp_ref_put(a->x.data, d, i, xp_ref_flat_mix(seed, (uint64_t)i) & (d == XP_E2M1 ? 0xFu : 0xFFu));
    return XP_OK;
}

/* Elements; one unit in all when a byte holds two of them, because a view cannot start inside a byte. */
static int64_t extent(const void *args) {
    const xp_cast_args *a = args;
    return a->x.dtype == XP_E2M1 || a->y.dtype == XP_E2M1 ? 1 : a->x.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_cast_args *a = args;
    xp_cast_args *o = out;
    if (a->x.dtype == XP_E2M1 || a->y.dtype == XP_E2M1)
        return;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_cast_args *a = args;
    const int64_t n = xp_tensor_count(&a->x);
    double v[CHUNK];
    (void)x;
    for (int64_t i = 0; i < n; i += CHUNK) {
        const int64_t take = n - i < CHUNK ? n - i : CHUNK;
        xp_widen_row(a->x.data, a->x.dtype, i, take, v);
        if (!a->saturate) {
            xp_ref_store_row(a->y.data, a->y.dtype, i, take, v);
            continue;
        }
        for (int64_t j = 0; j < take; j++)
            xp_ref_put(a->y.data, a->y.dtype, i + j, xp_ref_narrow(v[j], a->y.dtype, 1));
    }
    return XP_OK;
}

/* No element is further from its source than half a unit of its format, unless it left the format's range. */
static xp_status nearest(const void *args, const xp_mesh *m, double *out) {
    const xp_cast_args *a = args;
    (void)m;
    *out = 0.0;
    for (int64_t i = 0; i < xp_tensor_count(&a->x); i++) {
        const double x = xp_widen(a->x.data, a->x.dtype, i), y = xp_widen(a->y.data, a->y.dtype, i);
        const double sat = xp_ref_round(x, a->y.dtype);
        if (!isfinite(x) || !isfinite(sat) || !isfinite(y) || (a->y.dtype == XP_E2M1 && fabs(x) > 6.0))
            continue;
        const double r = fabs(y - x) / xp_ref_half_ulp_err(a->y.dtype, x);
        *out = r > *out ? r : *out;
    }
    return XP_OK;
}

static const xp_property properties[] = {{"nearest", nearest}};

const xp_stage xp_stage_cast = {
    .name = "cast",
    .meaning = "a flat array rounded to another float format, to nearest even, saturating or not",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_cast_args),
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

const xp_kernel xp_ref_cast = {
    .stage = &xp_stage_cast,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
