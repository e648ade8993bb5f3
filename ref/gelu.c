/* Stages gelu and gelu_bwd: see xp/gelu.h for the meaning.
 *
 * Elements are independent; everything is double up to the one rounding. */
#include "xp/gelu.h"

#include <math.h>

#include "check.h"
#include "plane.h"
#include "ref.h"
#include "token.h"

#define ROOT_HALF 0x1.6a09e667f3bcdp-1 /* sqrt(1/2) */
#define DENSITY 0x1.9884533d43651p-2   /* 1 / sqrt(2 pi) */

/* ---- operands ---- */

enum { GELU_Y = 1, BWD_DX = 2 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_gelu_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [GELU_Y] = XP_OPERAND(xp_gelu_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_gelu_bwd_args, dy, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_gelu_bwd_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [BWD_DX] = XP_OPERAND(xp_gelu_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

/* ---- check ---- */

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_gelu, args, &d);
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_gelu_bwd, args, &d);
}

/* ---- cost: a function counts as one operation ---- */

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_gelu_args *a = args;
    *out =
        (xp_cost){.flop = 5.0 * (double)(a->x.dim[0] * a->x.dim[1]), .mem_bytes = xp_ref_bytes(&xp_stage_gelu, args)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_gelu_bwd_args *a = args;
    *out = (xp_cost){.flop = 11.0 * (double)(a->x.dim[0] * a->x.dim[1]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_gelu_bwd, args)};
}

/* ---- values ---- */

/* 2 P(x) */
static double twice_p(double x) {
    return 1.0 + xp_ref_erf(x * ROOT_HALF);
}

static double gelu(double x) {
    return 0.5 * x * twice_p(x);
}

/* x p(x) */
static double moment(double x) {
    return x * (DENSITY * xp_ref_exp(-0.5 * x * x));
}

static double slope(double x) {
    return 0.5 * twice_p(x) + moment(x);
}

/* ---- bound ---- */

/* W = 1 + erf(x / sqrt 2) = 2 P, in units u of op: the argument t is off by 2 u |t| (a product, a rounded constant),
 * which moves erf by at most 2 u max(|t| erf'(t)) = 2 u 2/sqrt(pi) e^(-1/2)/sqrt 2 < 0.97 u; erf is within 4 ulp,
 * 8 u |erf|, and the sum rounds by u W. Two products: |x| / 2 (0.97 + 8 + 2 W) u, W <= 2: 6.5 u |x|, 7 with the cross
 * terms. erfc(-x / sqrt 2) for W is off by no more. The reference makes the same operations in double, with erf within
 * 3 ulp. Where erf or a product underflows, |x| times the smallest normal number more. */
static double gelu_error(double x, xp_dtype op) {
    return fabs(x) * (7.0 * (xp_ref_unit(op) + xp_ref_unit(XP_F64)) + xp_ref_least(op));
}

/* d = W / 2 + x p. W / 2 is off by (0.97 + 8 + W) / 2 < 5.5 u. The exponent x^2 / 2 is off by u x^2 / 2, which moves p
 * as much relatively: |x|^3 / 2 p < 0.24 u at its largest; exp within 8 u, its factor and two products: 11 u |x| p <
 * 2.7 u. The sum: |d| < 1.13. In all below 9.6 u, 11 with the cross terms. What underflows: 3 and |x| times the
 * smallest normal number. The product with dy is one more rounding, part of the last one's in op. */
static xp_ref_val slope_val(double x, xp_dtype op) {
    const double e = 11.0 * (xp_ref_unit(op) + xp_ref_unit(XP_F64)) + (3.0 + fabs(x)) * xp_ref_least(op);
    return (xp_ref_val){slope(x), e};
}

static double at(const xp_tensor *t, int64_t i, int64_t j) {
    return xp_widen(xp_tensor_at(t, i, j, 0, 0), t->dtype, 0);
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)ref;
    (void)ws;
    const xp_gelu_args *a = args;
    const xp_dtype op = xp_ref_op(a->x.dtype);
    const xp_ref_rule rule = xp_ref_rule_of(a->y.dtype, op);
    if (operand != GELU_Y)
        return XP_FAIL(XP_E_BUG, "gelu: operand %d has no bound", operand);
    for (int64_t t = 0; t < tol->dim[0]; t++) {
        for (int64_t h = 0; h < tol->dim[1]; h++) {
            const double x = at(&a->x, t, h);
            *(double *)xp_tensor_at(tol, t, h, 0, 0) = xp_ref_rule_out(&rule, (xp_ref_val){gelu(x), gelu_error(x, op)});
        }
    }
    return XP_OK;
}

static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    (void)ref;
    (void)ws;
    const xp_gelu_bwd_args *a = args;
    const xp_dtype op = xp_ref_op(a->x.dtype);
    const xp_ref_rule rule = xp_ref_rule_of(a->dx.dtype, op);
    if (operand != BWD_DX)
        return XP_FAIL(XP_E_BUG, "gelu_bwd: operand %d has no bound", operand);
    for (int64_t t = 0; t < tol->dim[0]; t++) {
        for (int64_t h = 0; h < tol->dim[1]; h++) {
            const xp_ref_val dy = {at(&a->dy, t, h), 0.0};
            *(double *)xp_tensor_at(tol, t, h, 0, 0) =
                xp_ref_rule_out(&rule, xp_ref_val_mul(dy, slope_val(at(&a->x, t, h), op)));
        }
    }
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_layout l = {0};
    (void)xp_ref_take(&l, (size_t)((const xp_gelu_args *)args)->x.dim[1] * sizeof(double));
    return l.bytes;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_gelu_args *a = args;
    double *row = x->ws;
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        xp_ref_rows_load(&a->x, t, 1, row);
        for (int64_t h = 0; h < a->x.dim[1]; h++)
            row[h] = gelu(row[h]);
        xp_ref_rows_store(&a->y, t, 1, row);
    }
    return XP_OK;
}

static size_t bwd_lay(const xp_gelu_bwd_args *a, void *ws, double **out_x, double **out_dy) {
    xp_ref_layout l = {.base = ws};
    *out_x = xp_ref_take(&l, (size_t)a->x.dim[1] * sizeof(double));
    *out_dy = xp_ref_take(&l, (size_t)a->x.dim[1] * sizeof(double));
    return l.bytes;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    double *row, *dy;
    return bwd_lay(args, NULL, &row, &dy);
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_gelu_bwd_args *a = args;
    double *row, *dy;
    bwd_lay(a, x->ws, &row, &dy);
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        xp_ref_rows_load(&a->x, t, 1, row);
        xp_ref_rows_load(&a->dy, t, 1, dy);
        for (int64_t h = 0; h < a->x.dim[1]; h++)
            row[h] = dy[h] * slope(row[h]);
        xp_ref_rows_store(&a->dx, t, 1, row);
    }
    return XP_OK;
}

/* ---- slices ---- */

static int64_t extent(const void *args) {
    return ((const xp_gelu_args *)args)->x.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_gelu_args *a = args;
    xp_gelu_args *o = out;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_gelu_bwd_args *)args)->x.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_gelu_bwd_args *a = args;
    xp_gelu_bwd_args *o = out;
    o->dy = xp_tensor_rows(&a->dy, 0, lo, hi);
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->dx = xp_tensor_rows(&a->dx, 0, lo, hi);
}

/* ---- properties ---- */

/* gelu(x) is between x and 0, or just below: its least value is above -0.17. Its error is the bound's. */
static xp_status between(const void *args, const xp_mesh *m, double *out) {
    (void)m;
    const xp_gelu_args *a = args;
    const xp_dtype op = xp_ref_op(a->x.dtype);
    *out = 0.0;
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        for (int64_t h = 0; h < a->x.dim[1]; h++) {
            const double x = at(&a->x, t, h), y = at(&a->y, t, h), most = x > 0.0 ? x : 0.0,
                         least = x > 0.0 ? 0.0 : -0.17;
            const double off = y > most ? y - most : y < least ? least - y : 0.0;
            const double tol = gelu_error(x, op) + xp_ref_room(a->y.dtype, fabs(x)) + xp_ref_room(op, fabs(x));
            if (isfinite(x) && !(off <= tol * *out))
                *out = off / tol;
        }
    }
    return XP_OK;
}

static const xp_property properties[] = {{"between", between}};

/* ---- stages and rows ---- */

const xp_stage xp_stage_gelu = {
    .name = "gelu",
    .meaning = "the exact GELU of token rows",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_gelu_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .check = check,
    .cost = cost,
    .bound = bound,
    .extent = extent,
    .slice = slice,
    .property = properties,
    .properties = sizeof properties / sizeof *properties,
};

const xp_stage xp_stage_gelu_bwd = {
    .name = "gelu_bwd",
    .meaning = "gradient of gelu's input",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_gelu_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .extent = bwd_extent,
    .slice = bwd_slice,
};

const xp_kernel xp_ref_gelu = {
    .stage = &xp_stage_gelu,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_gelu_bwd = {
    .stage = &xp_stage_gelu_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
