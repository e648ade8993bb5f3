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

xp_ref_format xp_ref_format_of(xp_dtype d) {
    return (xp_ref_format){xp_ref_unit(d), xp_ref_half_ulp_err(d, 0.0), xp_ref_largest(d)};
}

xp_ref_rule xp_ref_rule_of(xp_dtype d, xp_dtype op) {
    const xp_ref_rule r = {.d = d,
                           .op = xp_ref_format_of(op),
                           .to = xp_ref_format_of(d),
                           .flush = op == XP_F64 ? 0x1p-1022 : 0x1p-126,
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

void xp_ref_out_errors(const xp_ref_rule *r, int64_t n, const double *v, double *e) {
    const xp_ref_rule rule = *r;
    for (int64_t i = 0; i < n; i++)
        e[i] = tolerance(&rule, v[i], e[i]);
}

/* sigmoid'(x) = s (1 - s); |sigmoid''| <= 1/10. */
xp_ref_val xp_ref_val_sigmoid(const xp_ref_rule *r, xp_ref_val x) {
    const double s = xp_ref_sigmoid(x.v), moved = s * xp_ref_sigmoid(-x.v) * x.e + 0.05 * x.e * x.e;
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

void xp_ref_dot_inputs(int64_t n, xp_dtype op, int64_t count, const double *v, double *e) {
    const double g = xp_ref_gamma(n, op) + xp_ref_gamma(n, XP_F64);
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
    const double g = xp_ref_gamma(n, op) + xp_ref_gamma(n, XP_F64);
    complete(n, op, count, g * xp_ref_largest(op), 1.0, e);
}

void xp_ref_dot_errors(int64_t n, xp_dtype op, int64_t count, double *gauge) {
    const double g = xp_ref_gamma(n, op) + xp_ref_gamma(n, XP_F64);
    complete(n, op, count, xp_ref_largest(op), g, gauge);
}
