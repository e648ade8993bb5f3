/* Stages rmsnorm and rmsnorm_bwd: see xp/rmsnorm.h for the meaning.
 *
 * Sums run over ascending columns in double; the normalised row is rounded to the activation dtype before the weight
 * multiplies it, or with the weight first their product before it is normalised. Must not sum across blocks. */
#include "xp/rmsnorm.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "move.h"
#include "plane.h"
#include "ref.h"
#include "token.h"

/* ---- operands and parameters ---- */

enum { NORM_Y = 2, NORM_RSTD = 3, BWD_DX = 4, BWD_DW = 5, BWD_PART = 6 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_rmsnorm_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_rmsnorm_args, w, "H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    [NORM_Y] = XP_OPERAND(xp_rmsnorm_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    [NORM_RSTD] = XP_OPERAND(xp_rmsnorm_args, rstd, "T", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_rmsnorm_bwd_args, dy, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_rmsnorm_bwd_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_rmsnorm_bwd_args, w, "H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_rmsnorm_bwd_args, rstd, "T", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [BWD_DX] = XP_OPERAND(xp_rmsnorm_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    [BWD_DW] = XP_OPERAND(xp_rmsnorm_bwd_args, dw, "B,H", XP_OUT, XP_DT_ACT, XP_BOUND, "grad"),
    [BWD_PART] = XP_OPTIONAL(xp_rmsnorm_bwd_args, part, "T", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
};

static const xp_param params[] = {
    {"eps", NULL, "1e-6", XP_P_F64, offsetof(xp_rmsnorm_args, eps)},
    {"weight_first", "off|on", "off", XP_P_WORD, offsetof(xp_rmsnorm_args, weight_first)},
};

static const xp_param bwd_params[] = {
    {"token0", NULL, "0", XP_P_I64, offsetof(xp_rmsnorm_bwd_args, token0)},
    {"block", NULL, "0", XP_P_I64, offsetof(xp_rmsnorm_bwd_args, block)},
    {"weight_first", "off|on", "off", XP_P_WORD, offsetof(xp_rmsnorm_bwd_args, weight_first)},
};

/* ---- check ---- */

static xp_status first_check(const char *stage, int first) {
    if (first != 0 && first != 1)
        return XP_FAIL(XP_E_ARG, "%s: weight_first is %d, expected 0 or 1", stage, first);
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_rmsnorm_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_rmsnorm, args, &d));
    if (!(a->eps > 0) || !isfinite(a->eps))
        return XP_FAIL(XP_E_ARG, "rmsnorm: eps is %g, expected a finite number above 0", a->eps);
    if (XP_REF_DIM(d, 'H') < 1)
        return XP_FAIL(XP_E_ARG, "rmsnorm: x dim 1 is %lld, expected H >= 1", (long long)XP_REF_DIM(d, 'H'));
    return first_check("rmsnorm", a->weight_first);
}

static xp_status part_check(const xp_rmsnorm_bwd_args *a) {
    if (a->block != 0)
        return XP_FAIL(XP_E_ARG, "rmsnorm_bwd: block is %lld, expected 0 with part", (long long)a->block);
    for (int64_t t = 0; t < a->part.dim[0] && xp_ref_readable(&a->part); t++) {
        const int64_t b = xp_ref_i64(&a->part, t);
        if (b < -1 || b >= a->dw.dim[0])
            return XP_FAIL(XP_E_ARG, "rmsnorm_bwd: part[%lld] is %lld, expected -1 to %lld", (long long)t, (long long)b,
                           (long long)a->dw.dim[0] - 1);
    }
    return XP_OK;
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    const xp_rmsnorm_bwd_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_rmsnorm_bwd, args, &d));
    XP_TRY(xp_ref_blocks_check("rmsnorm_bwd", a->token0, a->block, XP_REF_DIM(d, 'T')));
    const int64_t B = xp_ref_blocks(a->token0, a->block, XP_REF_DIM(d, 'T'));
    if (!a->part.data && XP_REF_DIM(d, 'B') != B)
        return XP_FAIL(XP_E_ARG, "rmsnorm_bwd: dw dim 0 is %lld, expected B = %lld blocks from token0 %lld",
                       (long long)XP_REF_DIM(d, 'B'), (long long)B, (long long)a->token0);
    if (XP_REF_DIM(d, 'H') < 1)
        return XP_FAIL(XP_E_ARG, "rmsnorm_bwd: x dim 1 is %lld, expected H >= 1", (long long)XP_REF_DIM(d, 'H'));
    XP_TRY(first_check("rmsnorm_bwd", a->weight_first));
    return a->part.data ? part_check(a) : XP_OK;
}

/* ---- cost ---- */

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_rmsnorm_args *a = args;
    (void)m;
    *out = (xp_cost){.flop = 4.0 * (double)(a->x.dim[0] * a->x.dim[1]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_rmsnorm, args)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_rmsnorm_bwd_args *a = args;
    (void)m;
    *out = (xp_cost){.flop = 9.0 * (double)(a->x.dim[0] * a->x.dim[1]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_rmsnorm_bwd, args)};
}

/* ---- workspace ---- */

enum { PLANES = 7 };
typedef struct {
    double *plane[PLANES]; /* [H] each */
} work;

static size_t lay(int64_t H, void *ws, work *out) {
    xp_ref_layout l = {.base = ws};
    for (int i = 0; i < PLANES; i++)
        out->plane[i] = xp_ref_take(&l, (size_t)H * sizeof(double));
    return l.bytes;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    work w;
    (void)m;
    return lay(((const xp_rmsnorm_args *)args)->x.dim[1], NULL, &w);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    work w;
    (void)m;
    return lay(((const xp_rmsnorm_bwd_args *)args)->x.dim[1], NULL, &w);
}

static void load_vector(const xp_tensor *t, double *out) {
    xp_widen_row(t->data, t->dtype, 0, t->dim[0], out);
}

static double inverse_root(const double *x, int64_t H, double eps) {
    double sum = 0;
    for (int64_t h = 0; h < H; h++)
        sum += x[h] * x[h];
    return 1.0 / xp_ref_sqrt(sum / (double)H + eps);
}

/* u = r(w x), in place. */
static void scale_row(const double *w, xp_dtype d, int64_t H, double *x) {
    for (int64_t h = 0; h < H; h++)
        x[h] *= w[h];
    xp_ref_round_row(d, H, x);
}

/* Rows of sum b: all of [lo, hi), or with part those that say so. */
static int adds_to(const xp_rmsnorm_bwd_args *a, int64_t t, int64_t b) {
    return !a->part.data || xp_ref_i64(&a->part, t) == b;
}

static void rows_of(const xp_rmsnorm_bwd_args *a, int64_t b, int64_t *lo, int64_t *hi) {
    *lo = 0;
    *hi = a->x.dim[0];
    if (!a->part.data)
        xp_ref_block_tokens(a->token0, a->block, a->x.dim[0], b, lo, hi);
}

/* ---- bound ---- */

/* Relative error of rstd, one side in op and one in double: a sum of H squares in any order, a division, the addition
 * of eps, a root and a division within 4 ulp each (the root halves what is before it). A square that underflows in op
 * loses at most the smallest subnormal, which eps makes relative; where squares may overflow in op nothing is promised.
 */
static double rstd_error(const double *x, int64_t H, double eps, xp_dtype op) {
    double sum = 0;
    for (int64_t h = 0; h < H; h++)
        sum += x[h] * x[h];
    if (!(sum <= xp_ref_largest(op) / 4))
        return (double)INFINITY;
    return xp_ref_both(H + 20, op) + 2.0 * (double)H * xp_ref_format_of(op).least / eps;
}

/* y = r(w r(n)), n = x rstd: the inner rounding and rstd's error times |w|, then the product and the outer rounding. */
static void bound_y(const xp_rmsnorm_args *a, const work *k, int64_t t, xp_dtype op, double rel, xp_tensor *tol) {
    const xp_ref_rule inner = xp_ref_rule_of(a->x.dtype, op), outer = xp_ref_rule_of(a->y.dtype, op);
    const double *x = k->plane[0], *w = k->plane[1];
    const double rstd = inverse_root(x, a->x.dim[1], a->eps);
    double *e = k->plane[2];
    for (int64_t h = 0; h < a->x.dim[1]; h++) {
        const double n = x[h] * rstd;
        const xp_ref_val rounded = xp_ref_rule_round(&inner, (xp_ref_val){n, fabs(n) * rel});
        e[h] = xp_ref_rule_out(&outer, xp_ref_val_mul(rounded, (xp_ref_val){w[h], 0}));
        if (isinf(w[h]) && fabs(n) <= rounded.e)
            e[h] = (double)NAN; /* r(n) may be 0: an infinity or a NaN */
    }
    xp_ref_rows_store(tol, t, 1, e);
}

/* Relative error of the root where each u[h] is within e[h]: the sum of squares S moves by d <= sum e (2 |u| + e),
 * which is q = d / (S + H eps) of what is under the root; 1 / sqrt(1 - q) - 1 <= q (1/2 + q) up to q = 1/2, and more is
 * not promised. */
static double root_moved(const double *u, const double *e, int64_t H, double eps) {
    double sum = (double)H * eps, moved = 0;
    for (int64_t h = 0; h < H; h++) {
        sum += u[h] * u[h];
        moved += e[h] * (2.0 * fabs(u[h]) + e[h]);
    }
    const double q = moved / sum * (1.0 + 0x1p-20);
    return q <= 0.5 ? q * (0.5 + q) : (double)INFINITY;
}

/* u = r(w x) into x, its errors into e: a rounding point. */
static void round_product(const xp_ref_rule *rule, const double *w, int64_t H, double *x, double *e) {
    for (int64_t h = 0; h < H; h++) {
        const xp_ref_val u = xp_ref_rule_round(rule, xp_ref_val_mul((xp_ref_val){x[h], 0}, (xp_ref_val){w[h], 0}));
        x[h] = u.v;
        e[h] = u.e;
    }
}

/* y = r(u rstd), with the errors of u in plane 3. */
static void bound_y_first(const xp_rmsnorm_args *a, const work *k, int64_t t, xp_dtype op, double rel, xp_tensor *tol) {
    const xp_ref_rule outer = xp_ref_rule_of(a->y.dtype, op);
    const double *u = k->plane[0], rstd = inverse_root(u, a->x.dim[1], a->eps);
    double *e = k->plane[3];
    for (int64_t h = 0; h < a->x.dim[1]; h++) {
        const xp_ref_val n = xp_ref_val_mul((xp_ref_val){u[h], e[h]}, (xp_ref_val){rstd, rstd * rel});
        e[h] = xp_ref_rule_out(&outer, n);
    }
    xp_ref_rows_store(tol, t, 1, e);
}

static xp_dtype op_of(const xp_rmsnorm_args *a) {
    const xp_tensor *const t[] = {&a->x, &a->w, &a->y, &a->rstd};
    return xp_ref_op_of(t, 4);
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    const xp_rmsnorm_args *a = args;
    const xp_dtype op = op_of(a);
    const xp_ref_rule rule = xp_ref_rule_of(a->rstd.dtype, op), inner = xp_ref_rule_of(a->x.dtype, op);
    work k;
    (void)m;
    lay(a->x.dim[1], ws, &k);
    load_vector(&a->w, k.plane[1]);
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        xp_ref_rows_load(&a->x, t, 1, k.plane[0]);
        if (a->weight_first)
            round_product(&inner, k.plane[1], a->x.dim[1], k.plane[0], k.plane[3]);
        double rel = rstd_error(k.plane[0], a->x.dim[1], a->eps, op);
        if (a->weight_first)
            rel += root_moved(k.plane[0], k.plane[3], a->x.dim[1], a->eps);
        if (operand == NORM_Y && a->weight_first) {
            bound_y_first(a, &k, t, op, rel, tol);
        } else if (operand == NORM_Y) {
            bound_y(a, &k, t, op, rel, tol);
        } else {
            const double v = xp_widen(ref->data, ref->dtype, xp_tensor_offset(ref, t));
            ((double *)tol->data)[xp_tensor_offset(tol, t)] = xp_ref_rule_out(&rule, (xp_ref_val){v, fabs(v) * rel});
        }
    }
    return XP_OK;
}

static xp_dtype bwd_op_of(const xp_rmsnorm_bwd_args *a) {
    const xp_tensor *const t[] = {&a->dy, &a->x, &a->w, &a->rstd};
    return xp_ref_op_of(t, 4);
}

/* dx = rstd (u - n mean(u n)): every term of it, with absolute values, times gamma of the H terms of the mean and the
 * few operations around them, and u's own rounding, which either side may do, through the same terms; r(n) is not
 * rounded here. */
static void bound_dx(const xp_rmsnorm_bwd_args *a, const work *k, int64_t t, xp_dtype op, xp_tensor *tol) {
    const int64_t H = a->x.dim[1];
    const xp_ref_rule rule = xp_ref_rule_of(a->dx.dtype, op), product = xp_ref_rule_of(a->dy.dtype, op);
    const double rstd = xp_widen(a->rstd.data, a->rstd.dtype, xp_tensor_offset(&a->rstd, t));
    const double *dy = k->plane[0], *x = k->plane[1], *w = k->plane[2], g = xp_ref_both(H + 16, op);
    double mean = 0, signed_mean = 0, moved = 0, *e = k->plane[3], *v = k->plane[4];
    for (int64_t h = 0; h < H; h++) {
        const xp_ref_val u = xp_ref_rule_round(&product, (xp_ref_val){dy[h] * w[h], 0.0});
        const double n = x[h] * rstd;
        v[h] = u.v;
        e[h] = u.e;
        mean += (fabs(u.v) + u.e) * fabs(n) / (double)H;
        signed_mean += u.v * n / (double)H;
        moved += u.e * fabs(n) / (double)H;
    }
    for (int64_t h = 0; h < H; h++) {
        const double u = fabs(v[h]) + e[h], n = x[h] * rstd, gauge = fabs(rstd) * (fabs(u) + fabs(n) * mean);
        const double least = 8.0 * xp_ref_format_of(op).least * (1.0 + fabs(rstd) * (1.0 + fabs(n)));
        const double safe = gauge <= xp_ref_largest(op) / 4 && mean <= xp_ref_largest(op) / 4 / (double)H
                                ? g * gauge + least + fabs(rstd) * (e[h] + fabs(n) * moved)
                                : (double)INFINITY;
        e[h] = xp_ref_rule_out(&rule, (xp_ref_val){rstd * (v[h] - n * signed_mean), safe});
    }
    xp_ref_rows_store(tol, t, 1, e);
}

/* du = r(rstd (dy - n mean(dy n))) of a row, n = u rstd, u = r(w x): as dx above with dy for u's part, and u's rounding
 * through n; then a rounding point of its own. Values into v, errors into e; x becomes u. */
static void bound_du(const xp_rmsnorm_bwd_args *a, const work *k, int64_t t, xp_dtype op, double *v, double *e) {
    const int64_t H = a->x.dim[1];
    const xp_ref_rule inner = xp_ref_rule_of(a->x.dtype, op), middle = xp_ref_rule_of(a->dx.dtype, op);
    const double rstd = xp_widen(a->rstd.data, a->rstd.dtype, xp_tensor_offset(&a->rstd, t)), root = fabs(rstd);
    const double *dy = k->plane[0], g = xp_ref_both(H + 16, op), largest = xp_ref_largest(op) / 4;
    double *u = k->plane[1], mean = 0, signed_mean = 0, moved = 0;
    round_product(&inner, k->plane[2], H, u, e);
    for (int64_t h = 0; h < H; h++) {
        mean += fabs(dy[h]) * (fabs(u[h]) + e[h]) * root / (double)H;
        signed_mean += dy[h] * (u[h] * rstd) / (double)H;
        moved += fabs(dy[h]) * e[h] * root / (double)H;
    }
    for (int64_t h = 0; h < H; h++) {
        const double n = u[h] * rstd, most = fabs(n) + e[h] * root, gauge = root * (fabs(dy[h]) + most * mean);
        const double least = 8.0 * xp_ref_format_of(op).least * (1.0 + root * (1.0 + most));
        const double err = gauge <= largest && mean <= largest / (double)H
                               ? g * gauge + least + root * (fabs(n) * moved + e[h] * root * mean)
                               : (double)INFINITY;
        const xp_ref_val du = xp_ref_rule_round(&middle, (xp_ref_val){rstd * (dy[h] - n * signed_mean), err});
        v[h] = du.v;
        e[h] = du.e;
    }
}

/* dx = r(w du). */
static void bound_dx_first(const xp_rmsnorm_bwd_args *a, const work *k, int64_t t, xp_dtype op, xp_tensor *tol) {
    const xp_ref_rule rule = xp_ref_rule_of(a->dx.dtype, op);
    double *e = k->plane[3], *v = k->plane[4];
    bound_du(a, k, t, op, v, e);
    for (int64_t h = 0; h < a->x.dim[1]; h++)
        e[h] = xp_ref_rule_out(&rule, xp_ref_val_mul((xp_ref_val){v[h], e[h]}, (xp_ref_val){k->plane[2][h], 0}));
    xp_ref_rows_store(tol, t, 1, e);
}

/* dw = sum of du x over the rows of b: gamma of the terms times the gauge, and each du's error times |x|. */
static void bound_dw_first(const xp_rmsnorm_bwd_args *a, const work *k, int64_t b, xp_dtype op, const xp_tensor *ref,
                           xp_tensor *tol) {
    const int64_t H = a->x.dim[1];
    const xp_ref_rule rule = xp_ref_rule_of(a->dw.dtype, op);
    double *sum = k->plane[5], *v = k->plane[4], *e = k->plane[3], *x = k->plane[6];
    int64_t lo, hi;
    rows_of(a, b, &lo, &hi);
    for (int64_t h = 0; h < H; h++)
        sum[h] = 0;
    const double g = xp_ref_both(hi - lo + 8, op), least = xp_ref_format_of(op).least;
    for (int64_t t = lo; t < hi; t++) {
        if (!adds_to(a, t, b))
            continue;
        xp_ref_rows_load(&a->dy, t, 1, k->plane[0]);
        xp_ref_rows_load(&a->x, t, 1, k->plane[1]);
        xp_ref_rows_load(&a->x, t, 1, x);
        bound_du(a, k, t, op, v, e);
        for (int64_t h = 0; h < H; h++)
            sum[h] += fabs(x[h]) * (e[h] + g * (fabs(v[h]) + e[h])) + 2.0 * least;
    }
    xp_ref_rows_load(ref, b, 1, v);
    for (int64_t h = 0; h < H; h++)
        sum[h] = xp_ref_rule_out(&rule, (xp_ref_val){v[h], sum[h]});
    xp_ref_rows_store(tol, b, 1, sum);
}

/* dw = sum of dy r(n) over the block's tokens: gamma of the terms times the gauge, and each r(n)'s rounding times |dy|.
 * Where r(n) is infinite or 0 and n is not, infinity and NaN are one: a judge may not round n. */
static void bound_dw(const xp_rmsnorm_bwd_args *a, const work *k, int64_t b, xp_dtype op, const xp_tensor *ref,
                     xp_tensor *tol) {
    const int64_t H = a->x.dim[1];
    const xp_ref_rule rule = xp_ref_rule_of(a->dw.dtype, op), inner = xp_ref_rule_of(a->x.dtype, op);
    double *e = k->plane[3], *v = k->plane[4], *lost = k->plane[5];
    int64_t lo, hi;
    rows_of(a, b, &lo, &hi);
    for (int64_t h = 0; h < H; h++)
        e[h] = lost[h] = 0;
    const double g = xp_ref_both(hi - lo + 8, op), least = xp_ref_format_of(op).least;
    for (int64_t t = lo; t < hi; t++) {
        if (!adds_to(a, t, b))
            continue;
        const double rstd = xp_widen(a->rstd.data, a->rstd.dtype, xp_tensor_offset(&a->rstd, t));
        xp_ref_rows_load(&a->dy, t, 1, k->plane[0]);
        xp_ref_rows_load(&a->x, t, 1, k->plane[1]);
        for (int64_t h = 0; h < H; h++) {
            const double n = k->plane[1][h] * rstd, dy = fabs(k->plane[0][h]);
            const xp_ref_val r = xp_ref_rule_round(&inner, (xp_ref_val){n, 0});
            e[h] += dy * (r.e + g * (fabs(n) + r.e)) + 2.0 * least;
            lost[h] += (isfinite(n) && isinf(r.v)) || (n != 0 && r.v == 0);
        }
    }
    xp_ref_rows_load(ref, b, 1, v);
    for (int64_t h = 0; h < H; h++)
        e[h] = lost[h] > 0 && !isfinite(v[h]) ? (double)NAN : xp_ref_rule_out(&rule, (xp_ref_val){v[h], e[h]});
    xp_ref_rows_store(tol, b, 1, e);
}

static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    const xp_rmsnorm_bwd_args *a = args;
    const xp_dtype op = bwd_op_of(a);
    work k;
    (void)m;
    lay(a->x.dim[1], ws, &k);
    load_vector(&a->w, k.plane[2]);
    for (int64_t b = 0; operand == BWD_DW && b < a->dw.dim[0]; b++)
        (a->weight_first ? bound_dw_first : bound_dw)(a, &k, b, op, ref, tol);
    for (int64_t t = 0; operand == BWD_DX && t < a->x.dim[0]; t++) {
        xp_ref_rows_load(&a->dy, t, 1, k.plane[0]);
        xp_ref_rows_load(&a->x, t, 1, k.plane[1]);
        (a->weight_first ? bound_dx_first : bound_dx)(a, &k, t, op, tol);
    }
    return XP_OK;
}

/* ---- reference kernels ---- */

static xp_status run(const xp_exec *ex, const void *args) {
    const xp_rmsnorm_args *a = args;
    const int64_t H = a->x.dim[1];
    work k;
    lay(H, ex->ws, &k);
    double *x = k.plane[0], *w = k.plane[1];
    load_vector(&a->w, w);
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        xp_ref_rows_load(&a->x, t, 1, x);
        if (a->weight_first)
            scale_row(w, a->x.dtype, H, x);
        const double rstd = inverse_root(x, H, a->eps);
        for (int64_t h = 0; h < H; h++)
            x[h] *= rstd;
        if (!a->weight_first) {
            xp_ref_round_row(a->x.dtype, H, x);
            for (int64_t h = 0; h < H; h++)
                x[h] *= w[h];
        }
        xp_ref_rows_store(&a->y, t, 1, x);
        xp_ref_store(a->rstd.data, a->rstd.dtype, xp_tensor_offset(&a->rstd, t), rstd);
    }
    return XP_OK;
}

/* The row's normalised values n into x; u = r(dy w) into plane 5. */
static void bwd_row(const xp_rmsnorm_bwd_args *a, const work *k, int64_t t) {
    const int64_t H = a->x.dim[1];
    const double rstd = xp_widen(a->rstd.data, a->rstd.dtype, xp_tensor_offset(&a->rstd, t));
    double *n = k->plane[1], *out = k->plane[3], *u = k->plane[5], mean = 0;
    const double *dy = k->plane[0], *w = k->plane[2];
    for (int64_t h = 0; h < H; h++) {
        n[h] *= rstd;
        u[h] = xp_ref_round(dy[h] * w[h], a->dy.dtype);
        mean += u[h] * n[h];
    }
    mean /= (double)H;
    for (int64_t h = 0; h < H; h++)
        out[h] = rstd * (u[h] - n[h] * mean);
    xp_ref_rows_store(&a->dx, t, 1, out);
}

/* With the weight first: du into plane 0. */
static void bwd_row_first(const xp_rmsnorm_bwd_args *a, const work *k, int64_t t) {
    const int64_t H = a->x.dim[1];
    const double rstd = xp_widen(a->rstd.data, a->rstd.dtype, xp_tensor_offset(&a->rstd, t));
    double *du = k->plane[0], *n = k->plane[5], *out = k->plane[3], mean = 0;
    memcpy(n, k->plane[1], (size_t)H * sizeof *n);
    scale_row(k->plane[2], a->x.dtype, H, n);
    for (int64_t h = 0; h < H; h++) {
        n[h] *= rstd;
        mean += du[h] * n[h];
    }
    mean /= (double)H;
    for (int64_t h = 0; h < H; h++)
        du[h] = rstd * (du[h] - n[h] * mean);
    xp_ref_round_row(a->dx.dtype, H, du);
    for (int64_t h = 0; h < H; h++)
        out[h] = k->plane[2][h] * du[h];
    xp_ref_rows_store(&a->dx, t, 1, out);
}

/* dx of a row; planes 0 and 1 become the factors of what it adds to dw. */
static void back_row(const xp_rmsnorm_bwd_args *a, const work *k, int64_t t) {
    xp_ref_rows_load(&a->dy, t, 1, k->plane[0]);
    xp_ref_rows_load(&a->x, t, 1, k->plane[1]);
    if (a->weight_first) {
        bwd_row_first(a, k, t);
    } else {
        bwd_row(a, k, t);
        xp_ref_round_row(a->x.dtype, a->x.dim[1], k->plane[1]);
    }
}

static xp_status bwd_run(const xp_exec *ex, const void *args) {
    const xp_rmsnorm_bwd_args *a = args;
    const int64_t H = a->x.dim[1];
    work k;
    lay(H, ex->ws, &k);
    load_vector(&a->w, k.plane[2]);
    for (int64_t b = 0; b < a->dw.dim[0]; b++) {
        int64_t lo, hi;
        double *sum = k.plane[4];
        rows_of(a, b, &lo, &hi);
        for (int64_t h = 0; h < H; h++)
            sum[h] = 0;
        for (int64_t t = lo; t < hi; t++) {
            if (!adds_to(a, t, b))
                continue;
            back_row(a, &k, t);
            for (int64_t h = 0; h < H; h++)
                sum[h] += k.plane[0][h] * k.plane[1][h];
        }
        xp_ref_rows_store(&a->dw, b, 1, sum);
    }
    for (int64_t t = 0; a->part.data && t < a->x.dim[0]; t++) {
        if (adds_to(a, t, -1))
            back_row(a, &k, t);
    }
    return XP_OK;
}

/* ---- fill, slices ---- */

/* rstd as the forward would leave it for x; every fourth row adds to no sum. */
static xp_status bwd_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_rmsnorm_bwd_args *a = args;
    (void)m;
    (void)data;
    (void)seed;
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        double sum = 0;
        if (a->part.data)
            ((int64_t *)a->part.data)[t] = t % 4 == 3 || a->dw.dim[0] == 0 ? -1 : t * 5 % a->dw.dim[0];
        for (int64_t h = 0; h < a->x.dim[1]; h++) {
            double v = xp_widen(xp_tensor_at(&a->x, t, h, 0, 0), a->x.dtype, 0);
            if (a->weight_first)
                v = xp_ref_round(v * xp_widen(a->w.data, a->w.dtype, h), a->x.dtype);
            sum += v * v;
        }
        xp_ref_store(a->rstd.data, a->rstd.dtype, xp_tensor_offset(&a->rstd, t),
                     1.0 / xp_ref_sqrt(sum / (double)a->x.dim[1] + 1e-6));
    }
    return XP_OK;
}

static int64_t extent(const void *args) {
    return ((const xp_rmsnorm_args *)args)->x.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_rmsnorm_args *a = args;
    xp_rmsnorm_args *o = out;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
    o->rstd = xp_tensor_rows(&a->rstd, 0, lo, hi);
}

const xp_stage xp_stage_rmsnorm = {
    .name = "rmsnorm",
    .meaning = "root mean square normalisation of token rows, times a weight",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_rmsnorm_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = workspace,
    .extent = extent,
    .slice = slice,
};

const xp_stage xp_stage_rmsnorm_bwd = {
    .name = "rmsnorm_bwd",
    .meaning = "gradients of rmsnorm: of the rows, and of the weight for each block of tokens",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_rmsnorm_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .param = bwd_params,
    .params = sizeof bwd_params / sizeof *bwd_params,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_workspace,
    .fill = bwd_fill,
};

const xp_kernel xp_ref_rmsnorm = {
    .stage = &xp_stage_rmsnorm, .name = "row", .det = XP_DET_RUN | XP_DET_MESH, .workspace = workspace, .run = run};

const xp_kernel xp_ref_rmsnorm_bwd = {
    .stage = &xp_stage_rmsnorm_bwd, .name = "row", .det = XP_DET_RUN, .workspace = bwd_workspace, .run = bwd_run};
