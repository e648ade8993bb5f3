/* Values that carry a bound: see err.h.
 *
 * Only the stages' bound() functions call this. It must stay independent of how the reference rows compute. */
#include "err.h"

#include <math.h>

#define OWN 0x1p-53 /* unit of the reference's own arithmetic */
#define INF ((double)INFINITY)

xp_dtype xp_ref_op(xp_dtype d) {
    return d == XP_F64 ? XP_F64 : XP_F32;
}

double xp_ref_largest(xp_dtype d) {
    static const double largest[XP_NDTYPE] = {
        [XP_F64] = 0x1.fffffffffffffp1023,
        [XP_F32] = 0x1.fffffep127,
        [XP_BF16] = 0x1.fep127,
        [XP_F16] = 65504.0,
        [XP_E4M3] = 448.0,
        [XP_E5M2] = 57344.0,
        [XP_E4M3FNUZ] = 240.0,
        [XP_E5M2FNUZ] = 57344.0,
        [XP_E8M0] = 0x1p127,
        [XP_E2M1] = 6.0,
    };
    return largest[d];
}

double xp_ref_least(xp_dtype op) {
    return op == XP_F64 ? 0x1p-1022 : 0x1p-126;
}

double xp_ref_both(int64_t n, xp_dtype op) {
    return xp_ref_gamma(n, op) + xp_ref_gamma(n, XP_F64);
}

xp_ref_format xp_ref_format_of(xp_dtype d) {
    return (xp_ref_format){xp_ref_unit(d), xp_ref_half_ulp_err(d, 0.0), xp_ref_largest(d)};
}

xp_ref_rule xp_ref_rule_of(xp_dtype d, xp_dtype op) {
    const xp_ref_rule r = {.d = d,
                           .op = xp_ref_format_of(op),
                           .to = xp_ref_format_of(d),
                           .flush = xp_ref_least(op),
                           .narrows = xp_ref_unit(d) > xp_ref_unit(op)};
    return r;
}

/* Largest error of rounding a value of magnitude at most mag. */
static double room(const xp_ref_format *f, double mag) {
    const double rel = f->unit * mag, abs = rel > f->least ? rel : f->least;
    return mag <= f->largest ? abs : INF;
}

double xp_ref_room(xp_dtype d, double mag) {
    const xp_ref_format f = xp_ref_format_of(d);
    return room(&f, mag);
}

/* What an implementation's value of magnitude up to mag may lose by rounding to op and then to d. */
static double rounding(const xp_ref_rule *r, double mag) {
    const double first = room(&r->op, mag);
    return r->narrows ? first + room(&r->to, mag + first) : first;
}

xp_ref_val xp_ref_val_mul(xp_ref_val a, xp_ref_val b) {
    const double v = a.v * b.v;
    return (xp_ref_val){v, fabs(a.v) * b.e + fabs(b.v) * a.e + a.e * b.e + OWN * fabs(v) + 0x1p-1074};
}

xp_ref_val xp_ref_val_add(xp_ref_val a, xp_ref_val b) {
    const double v = a.v + b.v;
    return (xp_ref_val){v, a.e + b.e + OWN * fabs(v)};
}

xp_ref_val xp_ref_val_op(const xp_ref_rule *r, xp_ref_val a) {
    return (xp_ref_val){a.v, a.e + room(&r->op, fabs(a.v) + a.e)};
}

/* 4 ulp are 8 units; a reciprocal within 4 ulp, and the product with it, 9 and their cross term. */
xp_ref_val xp_ref_val_div(const xp_ref_rule *r, xp_ref_val a, double b) {
    const double v = a.v / b, moved = a.e / fabs(b);
    return (xp_ref_val){v, moved + 10.0 * room(&r->op, fabs(v) + moved) + OWN * (fabs(v) + moved) + 0x1p-1074};
}

xp_ref_val xp_ref_rule_round(const xp_ref_rule *r, xp_ref_val a) {
    const double v = xp_ref_round(a.v, r->d);
    return (xp_ref_val){v, a.e + fabs(a.v - v) + rounding(r, fabs(a.v) + a.e)};
}

/* Fewer than 128 operations lead from a dot product or an input to an output. */
static double tolerance(const xp_ref_rule *r, double v, double e) {
    const double tol = (e + rounding(r, fabs(v) + e)) * (1.0 + 0x1p-45);
    return tol <= INF ? tol : INF;
}

double xp_ref_rule_out(const xp_ref_rule *r, xp_ref_val a) {
    return tolerance(r, a.v, a.e);
}

xp_ref_val xp_ref_val_round(xp_ref_val a, xp_dtype d, xp_dtype op) {
    const xp_ref_rule r = xp_ref_rule_of(d, op);
    return xp_ref_rule_round(&r, a);
}

double xp_ref_val_out(xp_ref_val a, xp_dtype d, xp_dtype op) {
    const xp_ref_rule r = xp_ref_rule_of(d, op);
    return xp_ref_rule_out(&r, a);
}

void xp_ref_round_errors(const xp_ref_rule *r, int64_t n, double *v, double *e) {
    for (int64_t i = 0; i < n; i++) {
        const xp_ref_val a = xp_ref_rule_round(r, (xp_ref_val){v[i], e[i]});
        v[i] = a.v;
        e[i] = a.e;
    }
}

void xp_ref_out_errors(const xp_ref_rule *r, int64_t n, const double *v, double *e) {
    const xp_ref_rule rule = *r;
    for (int64_t i = 0; i < n; i++)
        e[i] = tolerance(&rule, v[i], e[i]);
}

/* sigmoid'(x) = s (1 - s); |sigmoid''| <= 1/10. */
xp_ref_val xp_ref_val_sigmoid(const xp_ref_rule *r, xp_ref_val x) {
    const double s = xp_ref_sigmoid(x.v), slope = s * xp_ref_sigmoid(-x.v) * x.e + 0.05 * x.e * x.e;
    const double moved = slope > 1.0 && isfinite(x.e) ? 1.0 : slope; /* a number's sigmoid is between 0 and 1 */
    return (xp_ref_val){s, moved + 8.0 * r->op.unit * (s + moved) + r->flush + XP_REF_FN_REL * s};
}

/* |silu''| <= 1/2. The product is one more rounding: 8 + 1 units, 10 with their cross term. */
xp_ref_val xp_ref_val_silu(const xp_ref_rule *r, xp_ref_val x) {
    const double v = xp_ref_silu(x.v), moved = fabs(xp_ref_dsilu(x.v)) * x.e + 0.25 * x.e * x.e;
    const double other = 10.0 * r->op.unit * (fabs(v) + moved) + (fabs(x.v) + x.e) * r->flush;
    return (xp_ref_val){v, moved + other + 10.0 * OWN * fabs(v)};
}

double xp_ref_dsilu(double x) {
    return xp_ref_sigmoid(x) * (1.0 + x * xp_ref_sigmoid(-x));
}

/* d = s (1 + x q), q = 1 - s. In units u of op: s^ = s (1 + 8u), q^ = q + 8u s + u, so x q^ is off by
 * |x| (8 s + 2 q) u, the sum by another (1 + |x| q) u, the outer product by 9 (1 + |x| q) u: in all
 * s (8 |x| s + 12 |x| q + 10) u <= s (12 |x| + 10) u, and 13, 11 with the cross terms. The other usual form,
 * silu + s (1 - silu), has no larger ones. The reference: both sigmoids within 6 u, three operations: 15 |x| q + 8.
 * |silu''| <= 1/2 and |sigmoid'| <= 1/4. */
xp_ref_val xp_ref_val_dsilu(const xp_ref_rule *r, xp_ref_val x) {
    const double mag = fabs(x.v) + x.e, s = xp_ref_sigmoid(x.v) + 0.25 * x.e;
    const double other = r->op.unit * s * (13.0 * mag + 11.0), own = OWN * s * (16.0 * mag + 11.0);
    return (xp_ref_val){xp_ref_dsilu(x.v), 0.5 * x.e + other + own + (1.0 + mag) * r->flush};
}

double xp_ref_dtanh(double x) {
    return 4.0 * xp_ref_sigmoid(2.0 * x) * xp_ref_sigmoid(-2.0 * x);
}

/* tanh' = 1 - tanh^2; |tanh''| <= 4 / (3 sqrt 3) < 0.77. */
xp_ref_val xp_ref_val_tanh(const xp_ref_rule *r, xp_ref_val x) {
    const double v = xp_ref_tanh(x.v), moved = xp_ref_dtanh(x.v) * x.e + 0.385 * x.e * x.e;
    return (xp_ref_val){v, moved + 8.0 * r->op.unit * (fabs(v) + moved) + r->flush + XP_REF_FN_REL * fabs(v)};
}

/* 1 - T T from T within 8 u: 16 u T^2, the square's rounding u T^2, the difference's u (1 - T^2): 17 u in all, 18 with
 * the cross terms. The reference's two sigmoids and two products: within 16 units of its own. |tanh''| < 0.77. */
xp_ref_val xp_ref_val_dtanh(const xp_ref_rule *r, xp_ref_val x) {
    const double v = xp_ref_dtanh(x.v);
    return (xp_ref_val){v, 0.77 * x.e + 18.0 * r->op.unit + 2.0 * r->flush + 16.0 * OWN * v};
}

/* ---- gelu_tanh: x W / 2, W = 1 + tanh t = 2 sigmoid(2 t), t = k (x + c x^3) ----
 *
 * In units u of op: t is made with five roundings and two rounded constants, so it is off by 7 u |t|, which moves tanh
 * by at most 7 u max(|t| (1 - tanh^2 t)) < 3.2 u; tanh itself is within 8 u, the sum rounds u W. Two products by then,
 * for 0.5 is exact: |x| / 2 (11.2 + 3 W) u. As x sigmoid(2 t): |x| / 2 (3.2 + 9 W) u, which is no more than
 * |x| / 2 (11.2 + 5 W) u since W <= 2. Cross terms are within 0.8 of it: 11 u |x|. |gelu_tanh''| is largest at 0, where
 * it is k < 0.8. The reference computes the second form, within as many units of its own. */
#define GELU_K 0x1.9884533d43651p-1 /* sqrt(2/pi) */
#define GELU_C 0.044715

static double gelu_argument(double x) {
    return 2.0 * GELU_K * (x * (1.0 + GELU_C * x * x));
}

double xp_ref_gelu_tanh(double x) {
    return x * xp_ref_sigmoid(gelu_argument(x));
}

/* W / 2 + x / 2 (1 - tanh^2 t) t' with 1 - tanh^2 = 4 s (1 - s), s = W / 2. */
double xp_ref_dgelu_tanh(double x) {
    if (fabs(x) > 64.0) /* 1 - tanh^2 is below the least double there, and must not meet an infinite t' */
        return x > 0.0 ? 1.0 : 0.0;
    const double t = gelu_argument(x), s = xp_ref_sigmoid(t);
    return s + 2.0 * GELU_K * x * (1.0 + 3.0 * GELU_C * x * x) * s * xp_ref_sigmoid(-t);
}

xp_ref_val xp_ref_val_gelu_tanh(const xp_ref_rule *r, xp_ref_val x) {
    const double v = xp_ref_gelu_tanh(x.v), mag = fabs(x.v) + x.e;
    const double moved = fabs(xp_ref_dgelu_tanh(x.v)) * x.e + 0.4 * x.e * x.e;
    return (xp_ref_val){v, moved + 11.0 * (r->op.unit + OWN) * mag + mag * r->flush};
}

/* d = W / 2 + A D with A = |x| / 2 t', D = 1 - tanh^2 t. From tanh with its 11.2 u: the first term is off by 5.6 u and
 * the roundings of two sums; D by 17 u and 14 u |t| D < 6.3 u, the product by 10 units: A (24 + 10 D) u. From sigmoids:
 * 1.6 u + 4 u W, and A (25 D + 6.3) u. Both are within (12 + 35 A) u, cross terms included, as is the reference in its
 * own units. A must not overflow on its way: +inf then. */
xp_ref_val xp_ref_val_dgelu_tanh(const xp_ref_rule *r, xp_ref_val x) {
    const double mag = fabs(x.v) + x.e, a = 0.5 * GELU_K * mag * (1.0 + 3.0 * GELU_C * mag * mag);
    const double other = (12.0 + 35.0 * a) * (r->op.unit + OWN) + (1.0 + 4.0 * a) * r->flush;
    return (xp_ref_val){xp_ref_dgelu_tanh(x.v), 2.0 * a <= r->op.largest ? 0.8 * x.e + other : INF};
}

/* ---- kinks ---- */

/* The errors and the difference were themselves rounded. */
xp_ref_truth xp_ref_val_le(xp_ref_val a, xp_ref_val b) {
    const double e = a.e + b.e;
    return (xp_ref_truth){a.v <= b.v, e == 0.0 || fabs(a.v - b.v) > e * (1.0 + 0x1p-50)};
}

xp_ref_val xp_ref_val_if(xp_ref_truth t, xp_ref_val a) {
    const double size = fabs(a.v);
    if (t.sure)
        return t.holds ? a : (xp_ref_val){0.0, 0.0};
    if (!t.holds)
        return (xp_ref_val){0.0, size + a.e};
    return (xp_ref_val){a.v, size > a.e ? size : a.e};
}

xp_ref_val xp_ref_val_unless(xp_ref_truth t, xp_ref_val a) {
    t.holds = !t.holds;
    return xp_ref_val_if(t, a);
}

/* max(x, 0) moves no farther than x; below 0, by no more than what reaches beyond 0. */
xp_ref_val xp_ref_val_relu(xp_ref_val x) {
    if (!(x.v <= 0.0))
        return x;
    return (xp_ref_val){0.0, x.e > -x.v ? x.e + x.v : 0.0};
}

/* |min(a, b) - min(a', b')| <= max(|a - a'|, |b - b'|), and only the smaller counts when it is surely so. */
xp_ref_val xp_ref_val_min(xp_ref_val x, xp_ref_val limit) {
    const xp_ref_truth under = xp_ref_val_le(x, limit);
    const double more = x.e > limit.e ? x.e : limit.e;
    const double v = x.v > limit.v ? limit.v : x.v;
    return (xp_ref_val){v, !under.sure ? more : under.holds ? x.e : limit.e};
}

xp_ref_val xp_ref_val_clamp(xp_ref_val x, xp_ref_val limit) {
    const xp_ref_val top = xp_ref_val_min(x, limit), low = xp_ref_val_min((xp_ref_val){-top.v, top.e}, limit);
    return (xp_ref_val){-low.v, low.e};
}

void xp_ref_dot_inputs(int64_t n, xp_dtype op, int64_t count, const double *v, double *e) {
    const double g = xp_ref_both(n, op);
    for (int64_t i = 0; i < count; i++)
        e[i] += g * (fabs(v[i]) + e[i]);
}

/* A product may underflow, and the gauge was itself summed in double: it may be too small by gamma_n(f64). */
static void complete(int64_t n, xp_dtype op, int64_t count, double limit, double factor, double *e) {
    const double under = (double)n * (op == XP_F64 ? 0x1p-1074 : 0x1p-149);
    const double scale = factor * (1.0 + 2.0 * xp_ref_gamma(n, XP_F64));
    for (int64_t i = 0; i < count; i++)
        e[i] = e[i] <= limit ? scale * e[i] + under : INF;
}

void xp_ref_dot_outputs(int64_t n, xp_dtype op, int64_t count, double *e) {
    const double g = xp_ref_both(n, op);
    complete(n, op, count, g * xp_ref_largest(op), 1.0, e);
}

void xp_ref_dot_errors(int64_t n, xp_dtype op, int64_t count, double *gauge) {
    const double g = xp_ref_both(n, op);
    complete(n, op, count, xp_ref_largest(op), g, gauge);
}
