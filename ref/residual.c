/* Stage residual: see xp/residual.h for the meaning.
 *
 * One addition and one rounding an element. The only stage whose backward is itself. */
#include "xp/residual.h"

#include <math.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "token.h"

/* ---- operands ---- */

enum { Y = 2 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_residual_args, a, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_residual_args, b, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [Y] = XP_OPERAND(xp_residual_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_residual, args, &d);
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_residual_args *a = args;
    *out = (xp_cost){.flop = (double)(a->y.dim[0] * a->y.dim[1]), .mem_bytes = xp_ref_bytes(&xp_stage_residual, args)};
}

/* One addition in op on one side, in double on the other, then one rounding: err.h. Addition never underflows. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)ws;
    const xp_residual_args *a = args;
    const xp_tensor *const all[] = {&a->a, &a->b, &a->y};
    const xp_dtype op = xp_ref_op_of(all, 3);
    if (operand != Y)
        return XP_FAIL(XP_E_BUG, "residual: operand %d has no bound", operand);
    for (int64_t t = 0; t < tol->dim[0]; t++) {
        for (int64_t h = 0; h < tol->dim[1]; h++) {
            const double v = *(const double *)xp_tensor_at(ref, t, h, 0, 0);
            const xp_ref_val sum = {v, xp_ref_room(XP_F64, fabs(v))};
            *(double *)xp_tensor_at(tol, t, h, 0, 0) = xp_ref_val_out(sum, a->y.dtype, op);
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
    char *at = x->ws;
    double *row = xp_ref_carve(&at, (size_t)H * sizeof *row), *add = xp_ref_carve(&at, (size_t)H * sizeof *add);
    for (int64_t t = 0; t < T; t++) {
        xp_widen_row(a->a.data, a->a.dtype, t * a->a.stride[0], H, row);
        xp_widen_row(a->b.data, a->b.dtype, t * a->b.stride[0], H, add);
        for (int64_t h = 0; h < H; h++)
            row[h] += add[h];
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
    o->b = xp_tensor_rows(&a->b, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
}

/* ---- stage and row ---- */

const xp_stage xp_stage_residual = {
    .name = "residual",
    .meaning = "the sum of two rows, forward and backward",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_residual_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .check = check,
    .cost = cost,
    .bound = bound,
    .extent = extent,
    .slice = slice,
};

const xp_kernel xp_ref_residual = {
    .stage = &xp_stage_residual,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
