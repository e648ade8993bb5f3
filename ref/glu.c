/* The activations between an expert's two matrices: see glu.h.
 *
 * R = a rounding point where every operation is one, else nothing. The order is that of xp/expert.h; each function
 * leaves its last rounding to the caller, because an output in f64 shows the value before it. */
#include "glu.h"

#include <math.h>

xp_ref_glu xp_ref_glu_of(const xp_dialect *d, double limit, xp_dtype param) {
    const xp_dtype op = xp_ref_op(param);
    const double most = xp_ref_round(limit, param);
    const int clamps = limit > 0.0 && most <= xp_ref_largest(param); /* no value is beyond a limit that overflows */
    return (xp_ref_glu){.act = d->act,
                        .param = param,
                        .gated = d->gated,
                        .each = d->act_rounding == XP_ROUND_EACH && d->act != XP_ACT_SOFTCAP,
                        .parts = d->act_alpha != 1.0 || d->up_offset != 0.0,
                        .before = clamps && d->limit_when == XP_LIMIT_BEFORE,
                        .after = clamps && d->limit_when == XP_LIMIT_AFTER,
                        .limit = {most, fabs(limit - most)},
                        .alpha = xp_ref_round(d->act_alpha, op),
                        .offset = xp_ref_round(d->up_offset, op),
                        .gate_cap = xp_ref_round(d->gate_cap, op),
                        .up_cap = xp_ref_round(d->up_cap, op)};
}

/* ---- values ---- */

static double point(const xp_ref_glu *a, double v) {
    return a->each ? xp_ref_round(v, a->param) : v;
}

/* NaN stays. */
static double at_most(double v, double limit) {
    return v > limit ? limit : v;
}

static double within(double v, double limit) {
    return v < -limit ? -limit : at_most(v, limit);
}

static double relu(double g) {
    return g <= 0.0 ? 0.0 : g;
}

/* act(g) of the clamped g. */
static double gate_of(const xp_ref_glu *a, double g) {
    switch (a->act) {
    case XP_ACT_SILU:
        return a->parts ? g * point(a, xp_ref_sigmoid(point(a, a->alpha * g))) : xp_ref_silu(g);
    case XP_ACT_GELU_TANH:
        return xp_ref_gelu_tanh(g);
    case XP_ACT_RELU:
        return relu(g);
    case XP_ACT_RELU2:
        return relu(g) * relu(g);
    case XP_ACT_SOFTCAP:
        return a->gate_cap * xp_ref_tanh(g / a->gate_cap) * xp_ref_sigmoid(g);
    }
    return (double)NAN; /* check() refuses other values */
}

/* ds act'(g), likewise. */
static double gate_back(const xp_ref_glu *a, double g, double ds) {
    switch (a->act) {
    case XP_ACT_SILU: {
        if (!a->parts)
            return ds * xp_ref_dsilu(g);
        const double t = point(a, a->alpha * g);
        if (!a->each)
            return ds * xp_ref_dsilu(t);
        const double q = point(a, xp_ref_sigmoid(t)), dt = point(a, point(a, ds * g) * (q * (1.0 - q)));
        return point(a, ds * q) + point(a, a->alpha * dt);
    }
    case XP_ACT_GELU_TANH:
        return ds * xp_ref_dgelu_tanh(g);
    case XP_ACT_RELU:
        return g <= 0.0 ? 0.0 : ds;
    case XP_ACT_RELU2:
        return g <= 0.0 ? 0.0 : ds * (2.0 * g);
    case XP_ACT_SOFTCAP: {
        const double z = g / a->gate_cap, s = xp_ref_sigmoid(g);
        return ds * (xp_ref_dtanh(z) * s + a->gate_cap * xp_ref_tanh(z) * (s * xp_ref_sigmoid(-g)));
    }
    }
    return (double)NAN; /* check() refuses other values */
}

/* What act(g) is multiplied with, from the clamped u. */
static double up_of(const xp_ref_glu *a, double u) {
    const double o = a->act == XP_ACT_SOFTCAP ? a->up_cap * xp_ref_tanh(u / a->up_cap) : u;
    return a->offset != 0.0 ? point(a, o + a->offset) : o;
}

static double clamped_up(const xp_ref_glu *a, double u) {
    return a->before || a->after ? within(u, a->limit.v) : u;
}

double xp_ref_glu_forward(const xp_ref_glu *a, double g, double u) {
    const double s = gate_of(a, a->before ? at_most(g, a->limit.v) : g);
    if (!a->gated)
        return s;
    const double top = point(a, s);
    return (a->after ? at_most(top, a->limit.v) : top) * up_of(a, clamped_up(a, u));
}

void xp_ref_glu_backward(const xp_ref_glu *a, double g, double u, double da, double *out_dg, double *out_du) {
    const double limit = a->limit.v, low = a->before ? at_most(g, limit) : g;
    double ds = da, du = 0.0;
    if (a->gated) {
        const double s = point(a, gate_of(a, low)), v = clamped_up(a, u);
        ds = point(a, da * up_of(a, v));
        du = da * (a->after ? at_most(s, limit) : s);
        if (a->act == XP_ACT_SOFTCAP)
            du *= xp_ref_dtanh(v / a->up_cap);
        if ((a->before || a->after) && !(fabs(u) <= limit))
            du = 0.0;
        if (a->after && !(s <= limit))
            ds = 0.0;
    }
    *out_dg = a->before && !(g <= limit) ? 0.0 : gate_back(a, low, ds);
    *out_du = du;
}

/* ---- errors ---- */

static xp_ref_val exactly(double v) {
    return (xp_ref_val){v, 0.0};
}

/* Where nothing is declared, the arithmetic still rounds. */
static xp_ref_val point_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val v) {
    return a->each ? xp_ref_rule_round(r, v) : xp_ref_val_op(r, v);
}

/* The product of two results of the arithmetic, itself one. */
static xp_ref_val product(const xp_ref_rule *r, xp_ref_val a, xp_ref_val b) {
    return xp_ref_val_op(r, xp_ref_val_mul(a, b));
}

static xp_ref_val sigmoid_part(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g) {
    const xp_ref_val t = point_val(a, r, xp_ref_val_mul(exactly(a->alpha), g));
    return point_val(a, r, xp_ref_val_sigmoid(r, t));
}

/* cap tanh(x / cap) */
static xp_ref_val capped(const xp_ref_rule *r, xp_ref_val x, double cap) {
    return product(r, exactly(cap), xp_ref_val_tanh(r, xp_ref_val_div(r, x, cap)));
}

static xp_ref_val gate_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g) {
    switch (a->act) {
    case XP_ACT_SILU:
        return a->parts ? xp_ref_val_mul(g, sigmoid_part(a, r, g)) : xp_ref_val_silu(r, g);
    case XP_ACT_GELU_TANH:
        return xp_ref_val_gelu_tanh(r, g);
    case XP_ACT_RELU:
        return xp_ref_val_relu(g);
    case XP_ACT_RELU2:
        return xp_ref_val_mul(xp_ref_val_relu(g), xp_ref_val_relu(g));
    case XP_ACT_SOFTCAP:
        return xp_ref_val_mul(capped(r, g, a->gate_cap), xp_ref_val_sigmoid(r, g));
    }
    return exactly((double)NAN);
}

/* ds d/dg (g q), q = sigmoid(alpha g), as the chain of its operations and as one formula: who leaves out the roundings
 * between may take either, and neither formula's own error covers the other's. */
static xp_ref_val parts_back_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g, xp_ref_val ds) {
    const xp_ref_val alpha = exactly(a->alpha), q = sigmoid_part(a, r, g);
    const xp_ref_val whole = xp_ref_val_mul(ds, xp_ref_val_dsilu(r, xp_ref_val_op(r, xp_ref_val_mul(alpha, g))));
    if (!a->each)
        return whole;
    /* q (1 - q): three roundings with the product that follows */
    xp_ref_val slope = {q.v * (1.0 - q.v), fabs(1.0 - 2.0 * q.v) * q.e + q.e * q.e};
    slope = xp_ref_val_op(r, xp_ref_val_op(r, slope));
    const xp_ref_val dq = xp_ref_rule_round(r, xp_ref_val_mul(ds, g));
    const xp_ref_val dt = xp_ref_rule_round(r, product(r, dq, slope));
    const xp_ref_val one = xp_ref_rule_round(r, xp_ref_val_mul(ds, q));
    xp_ref_val sum = xp_ref_val_add(one, xp_ref_rule_round(r, xp_ref_val_mul(alpha, dt)));
    const double other = fabs(sum.v - whole.v) + whole.e;
    if (!(sum.e >= other))
        sum.e = other;
    return sum;
}

/* G = C T s, T = tanh(g/C), s = sigmoid(g): G' = T' s + C T s (1 - s). 1 - s may be made from s. */
static xp_ref_val softcap_slope(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g) {
    const xp_ref_val s = xp_ref_val_sigmoid(r, g), z = xp_ref_val_div(r, g, a->gate_cap);
    const xp_ref_val rest = {xp_ref_sigmoid(-g.v), s.e + 2.0 * r->op.unit};
    const xp_ref_val first = product(r, xp_ref_val_dtanh(r, z), s);
    const xp_ref_val second = product(r, capped(r, g, a->gate_cap), product(r, s, rest));
    return xp_ref_val_op(r, xp_ref_val_add(first, second));
}

static xp_ref_val gate_back_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g, xp_ref_val ds) {
    switch (a->act) {
    case XP_ACT_SILU:
        return a->parts ? parts_back_val(a, r, g, ds) : xp_ref_val_mul(ds, xp_ref_val_dsilu(r, g));
    case XP_ACT_GELU_TANH:
        return xp_ref_val_mul(ds, xp_ref_val_dgelu_tanh(r, g));
    case XP_ACT_RELU:
        return xp_ref_val_unless(xp_ref_val_le(g, exactly(0.0)), ds);
    case XP_ACT_RELU2:
        return xp_ref_val_mul(ds, xp_ref_val_mul(exactly(2.0), xp_ref_val_relu(g)));
    case XP_ACT_SOFTCAP:
        return xp_ref_val_mul(ds, softcap_slope(a, r, g));
    }
    return exactly((double)NAN);
}

static xp_ref_val up_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val u) {
    const xp_ref_val o = a->act == XP_ACT_SOFTCAP ? capped(r, u, a->up_cap) : u;
    return a->offset != 0.0 ? point_val(a, r, xp_ref_val_add(o, exactly(a->offset))) : o;
}

static xp_ref_val clamped_up_val(const xp_ref_glu *a, xp_ref_val u) {
    return a->before || a->after ? xp_ref_val_clamp(u, a->limit) : u;
}

xp_ref_val xp_ref_glu_forward_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g, xp_ref_val u) {
    const xp_ref_val s = gate_val(a, r, a->before ? xp_ref_val_min(g, a->limit) : g);
    if (!a->gated)
        return s;
    const xp_ref_val top = point_val(a, r, s);
    return xp_ref_val_mul(a->after ? xp_ref_val_min(top, a->limit) : top, up_val(a, r, clamped_up_val(a, u)));
}

void xp_ref_glu_backward_val(const xp_ref_glu *a, const xp_ref_rule *r, xp_ref_val g, xp_ref_val u, xp_ref_val da,
                             xp_ref_val *out_dg, xp_ref_val *out_du) {
    const xp_ref_val low = a->before ? xp_ref_val_min(g, a->limit) : g;
    xp_ref_val ds = da, du = {0.0, 0.0};
    if (a->gated) {
        const xp_ref_val s = point_val(a, r, gate_val(a, r, low)), v = clamped_up_val(a, u);
        ds = point_val(a, r, xp_ref_val_mul(da, up_val(a, r, v)));
        du = xp_ref_val_mul(da, a->after ? xp_ref_val_min(s, a->limit) : s);
        if (a->act == XP_ACT_SOFTCAP)
            du = xp_ref_val_mul(xp_ref_val_op(r, du), xp_ref_val_dtanh(r, xp_ref_val_div(r, v, a->up_cap)));
        if (a->before || a->after)
            du = xp_ref_val_if(xp_ref_val_le((xp_ref_val){fabs(u.v), u.e}, a->limit), du);
        if (a->after)
            ds = xp_ref_val_if(xp_ref_val_le(s, a->limit), ds);
    }
    const xp_ref_val dg = gate_back_val(a, r, low, ds);
    *out_dg = a->before ? xp_ref_val_if(xp_ref_val_le(g, a->limit), dg) : dg;
    *out_du = du;
}
