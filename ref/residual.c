/* Stage residual: see xp/residual.h for the meaning.
 *
 * One addition, one product with the factor, and a rounding after each. The only stage whose backward is itself. */
#include "xp/residual.h"

#include <math.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "token.h"

/* ---- operands ---- */

enum { B = 1, Y };

static const xp_operand operands[] = {
    XP_OPERAND(xp_residual_args, a, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [B] = XP_OPTIONAL(xp_residual_args, b, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [Y] = XP_OPERAND(xp_residual_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static const xp_param params[] = {
    {"factor", NULL, "1", XP_P_F64, offsetof(xp_residual_args, factor)},
};

/* A sum without a factor, or a factor without a sum; whoever wants both names b. */
static int wants(const void *args, int operand) {
    const double f = ((const xp_residual_args *)args)->factor;
    return operand == B && (f == 0.0 || f == 1.0);
}

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_residual_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_residual, args, &d));
    if (!isfinite(a->factor))
        return XP_FAIL(XP_E_ARG, "residual: factor is %g, expected a finite number (0 counts as 1)", a->factor);
    return XP_OK;
}

/* The number that multiplies in arithmetic of acc, f32 or f64. */
static double factor_in(const xp_residual_args *a, xp_dtype acc) {
    return a->factor == 0.0 ? 1.0 : xp_ref_round(a->factor, acc);
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_residual_args *a = args;
    const double ops = (a->b.data ? 1.0 : 0.0) + (factor_in(a, XP_F64) != 1.0 ? 1.0 : 0.0);
    *out = (xp_cost){.flop = ops * (double)(a->y.dim[0] * a->y.dim[1]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_residual, args)};
}

/* One element before its last rounding, with its error: err.h. Addition never underflows. The rounding of the sum is a
 * rounding point; the product, made in op, is one more where the reference rounds what another may leave. */
static xp_ref_val value_of(const xp_residual_args *a, double x, double add, double factor, xp_dtype op) {
    xp_ref_val v = {x, 0.0};
    if (a->b.data)
        v = (xp_ref_val){x + add, xp_ref_room(XP_F64, fabs(x + add))};
    if (factor == 1.0)
        return v;
    if (a->b.data)
        v = xp_ref_val_round(v, a->a.dtype, op);
    v = xp_ref_val_mul(v, (xp_ref_val){factor, 0.0});
    const double rounded = xp_ref_round(v.v, op);
    return (xp_ref_val){rounded, v.e + fabs(v.v - rounded)};
}

/* A plain copy is exact. The judge's value is recomputed from the inputs: the error of a product needs its factors. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)ref;
    (void)ws;
    const xp_residual_args *a = args;
    const xp_dtype op = xp_ref_op(a->a.dtype);
    const double factor = factor_in(a, op);
    const int sum = a->b.data != NULL, exact = !sum && factor == 1.0;
    if (operand != Y)
        return XP_FAIL(XP_E_BUG, "residual: operand %d has no bound", operand);
    for (int64_t t = 0; t < tol->dim[0]; t++) {
        for (int64_t h = 0; h < tol->dim[1]; h++) {
            const double x = xp_widen(xp_tensor_at(&a->a, t, h, 0, 0), a->a.dtype, 0);
            const double add = sum ? xp_widen(xp_tensor_at(&a->b, t, h, 0, 0), a->b.dtype, 0) : 0.0;
            *(double *)xp_tensor_at(tol, t, h, 0, 0) =
                exact ? 0.0 : xp_ref_val_out(value_of(a, x, add, factor, op), a->a.dtype, op);
        }
    }
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return 2 * xp_ref_span((size_t)((const xp_residual_args *)args)->y.dim[1] * sizeof(double));
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_residual_args *a = args;
    const int64_t T = a->y.dim[0], H = a->y.dim[1];
    const xp_dtype acc = xp_ref_op(a->a.dtype);
    const double factor = factor_in(a, acc);
    char *at = x->ws;
    double *row = xp_ref_carve(&at, (size_t)H * sizeof *row), *add = xp_ref_carve(&at, (size_t)H * sizeof *add);
    for (int64_t t = 0; t < T; t++) {
        xp_widen_row(a->a.data, a->a.dtype, t * a->a.stride[0], H, row);
        if (a->b.data) {
            xp_widen_row(a->b.data, a->b.dtype, t * a->b.stride[0], H, add);
            for (int64_t h = 0; h < H; h++)
                row[h] += add[h];
        }
        if (factor != 1.0) {
            xp_ref_round_row(a->a.dtype, H, row);
            for (int64_t h = 0; h < H; h++)
                row[h] *= factor;
            xp_ref_round_row(acc, H, row);
        }
        xp_ref_store_row(a->y.data, a->y.dtype, t * a->y.stride[0], H, row);
    }
    return XP_OK;
}

static int64_t extent(const void *args) {
    return ((const xp_residual_args *)args)->y.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_residual_args *a = args;
    xp_residual_args *o = out;
    o->a = xp_tensor_rows(&a->a, 0, lo, hi);
    if (a->b.data)
        o->b = xp_tensor_rows(&a->b, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
}

/* ---- stage and row ---- */

const xp_stage xp_stage_residual = {
    .name = "residual",
    .meaning = "the sum of two rows, or a row, times a factor: forward and backward",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_residual_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .extent = extent,
    .slice = slice,
    .wants = wants,
};

const xp_kernel xp_ref_residual = {
    .stage = &xp_stage_residual,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
