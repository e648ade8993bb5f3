/* xp_dense MLP. silu and gelu_tanh are one function here, g sigmoid(phi(g)), with phi = alpha g or 2 sqrt(2/pi) (g +
 * 0.044715 g^3), as (1 + tanh z) / 2 = sigmoid(2 z); its slope is sigmoid(phi) + g phi' sigmoid(phi) sigmoid(-phi). */
#include "mlp.h"

#include <math.h>
#include <string.h>

#include "num.h"

int64_t xp_dense_gate_at(const xp_dialect *d, int64_t f) {
    return d->gated && d->gate_layout == XP_GATE_INTERLEAVED ? 2 * f : f;
}

int64_t xp_dense_up_at(const xp_dialect *d, int64_t f_n, int64_t f) {
    if (!d->gated)
        return -1;
    return d->gate_layout == XP_GATE_INTERLEAVED ? 2 * f + 1 : f_n + f;
}

/* ---- one unit ---- */

static int rounds_each(const xp_dialect *d) {
    return d->act_rounding == XP_ROUND_EACH && d->act != XP_ACT_SOFTCAP;
}

/* r where every operation rounds. */
static double each(const xp_dense_unit *a, double v) {
    return rounds_each(a->d) ? xp_dense_round(a->r, v) : v;
}

static double clamp_gate(const xp_dense_unit *a, xp_limit_when when, double g) {
    return a->limit > 0 && a->d->limit_when == when && g > a->limit ? a->limit : g;
}

static double clamp_up(const xp_dense_unit *a, double u) {
    if (a->limit > 0 && fabs(u) > a->limit)
        return copysign(a->limit, u);
    return u;
}

static const double GELU = 1.59576912160573071176; /* 2 sqrt(2 / pi) */

static double phi(const xp_dialect *d, double g) {
    return d->act == XP_ACT_SILU ? d->act_alpha * g : GELU * (g + 0.044715 * g * g * g);
}

static double phi_slope(const xp_dialect *d, double g) {
    return d->act == XP_ACT_SILU ? d->act_alpha : GELU * (1 + 3 * 0.044715 * g * g);
}

/* act(g) as the last of its own operations leaves it, unrounded; g is clamped already. */
static double gate_value(const xp_dense_unit *a, double g) {
    const xp_dialect *d = a->d;
    const double positive = g <= 0 ? 0 : g;
    switch (d->act) {
    case XP_ACT_RELU:
        return positive;
    case XP_ACT_RELU2:
        return positive * positive;
    case XP_ACT_SOFTCAP:
        return d->gate_cap * tanh(g / d->gate_cap) * xp_dense_sigmoid(g);
    default:
        if (d->act == XP_ACT_SILU && (d->act_alpha != 1 || d->up_offset != 0))
            return g * each(a, xp_dense_sigmoid(each(a, phi(d, g))));
        return g * xp_dense_sigmoid(phi(d, g));
    }
}

/* Of g that stops() lets pass. */
static double gate_slope(const xp_dialect *d, double g) {
    switch (d->act) {
    case XP_ACT_RELU:
        return 1;
    case XP_ACT_RELU2:
        return 2 * g;
    case XP_ACT_SOFTCAP: {
        const double s = xp_dense_sigmoid(g), twice = 2 * g / d->gate_cap;
        const double bend = 4 * xp_dense_sigmoid(twice) * xp_dense_sigmoid(-twice); /* 1 - tanh^2 */
        return s * (bend + d->gate_cap * tanh(g / d->gate_cap) * xp_dense_sigmoid(-g));
    }
    default: {
        const double s = xp_dense_sigmoid(phi(d, g)), tail = s * xp_dense_sigmoid(-phi(d, g));
        return tail == 0 ? s : s + g * phi_slope(d, g) * tail; /* not inf times 0 */
    }
    }
}

/* What multiplies act(g). */
static double up_value(const xp_dense_unit *a, double u) {
    const xp_dialect *d = a->d;
    const double v = clamp_up(a, u);
    if (d->act == XP_ACT_SOFTCAP)
        return d->up_cap * tanh(v / d->up_cap);
    return d->up_offset != 0 ? each(a, v + d->up_offset) : v;
}

static double up_slope(const xp_dense_unit *a, double u) {
    if (a->d->act != XP_ACT_SOFTCAP)
        return 1;
    const double twice = 2 * u / a->d->up_cap;
    return 4 * xp_dense_sigmoid(twice) * xp_dense_sigmoid(-twice);
}

/* act(g), rounded, limited. */
static double gate_factor(const xp_dense_unit *a, double g) {
    return clamp_gate(a, XP_LIMIT_AFTER, each(a, gate_value(a, clamp_gate(a, XP_LIMIT_BEFORE, g))));
}

double xp_dense_unit_run(const xp_dense_unit *a, double g, double u) {
    if (a->d->gated)
        return gate_factor(a, g) * up_value(a, u);
    return gate_value(a, g);
}

/* 1: no gradient passes to g: a relu's negative side; a clamp beyond its limit, and at a NaN. What is stopped is 0,
 * whatever came: not NaN times 0. A clamp behind the activation stops what reaches that, whose slope is NaN at a NaN.
 */
static int stops(const xp_dense_unit *a, double g) {
    if ((a->d->act == XP_ACT_RELU || a->d->act == XP_ACT_RELU2) && g <= 0)
        return 1;
    if (a->limit <= 0)
        return 0;
    if (a->d->limit_when == XP_LIMIT_BEFORE)
        return !(g <= a->limit);
    return !isnan(g) && !(each(a, gate_value(a, g)) <= a->limit);
}

void xp_dense_unit_back(const xp_dense_unit *a, double da, double *g, double *u) {
    const double v = *g, factor = a->d->gated ? gate_factor(a, v) : 1;
    const double ds = a->d->gated ? each(a, da * up_value(a, *u)) : da;
    *g = stops(a, v) ? 0 : ds * gate_slope(a->d, v);
    if (a->d->gated)
        *u = a->limit > 0 && !(fabs(*u) <= a->limit) ? 0 : da * factor * up_slope(a, *u);
}

/* ---- rows ---- */

static int64_t last_but(const xp_tensor *t, int from_end) {
    return t->dim[t->ndim - from_end];
}

static int64_t wider(const xp_tensor *w2) {
    return last_but(w2, 1) > last_but(w2, 2) ? last_but(w2, 1) : last_but(w2, 2);
}

size_t xp_dense_mlp_ws(const xp_tensor *w1, const xp_tensor *w2) {
    return 2 * xp_dense_room(XP_DENSE_ROWS * last_but(w2, 2), sizeof(double)) +
           xp_dense_room(XP_DENSE_ROWS * last_but(w1, 2), sizeof(double)) +
           xp_dense_room(XP_DENSE_ROWS * last_but(w2, 1), sizeof(double)) + xp_dense_room(wider(w2), sizeof(double)) +
           xp_dense_room(XP_DENSE_ROWS, sizeof(int64_t));
}

xp_dense_mlp xp_dense_mlp_carve(const xp_dialect *d, xp_dtype outside, const xp_tensor *w1, const xp_tensor *w2,
                                char **ws) {
    xp_dense_mlp b = {.unit = {.d = d, .r = w1->dtype, .limit = d->limit},
                      .outside = outside,
                      .h_n = last_but(w2, 2),
                      .u_n = last_but(w1, 2),
                      .f_n = last_but(w2, 1)};
    b.x = xp_dense_carve(ws, XP_DENSE_ROWS * b.h_n, sizeof *b.x);
    b.y = xp_dense_carve(ws, XP_DENSE_ROWS * b.h_n, sizeof *b.y);
    b.pre = xp_dense_carve(ws, XP_DENSE_ROWS * b.u_n, sizeof *b.pre);
    b.act = xp_dense_carve(ws, XP_DENSE_ROWS * b.f_n, sizeof *b.act);
    b.wide = xp_dense_carve(ws, wider(w2), sizeof *b.wide);
    b.member = xp_dense_carve(ws, XP_DENSE_ROWS, sizeof *b.member);
    return b;
}

/* One more rounding, then the bias. */
static void add_bias(const xp_dense_mlp *b, int64_t m, const xp_tensor *bias, int64_t n, double *v) {
    if (!bias || !bias->data)
        return;
    xp_dense_round_all(b->unit.r, m * n, v);
    for (int64_t i = 0; i < m * n; i++)
        v[i] += xp_dense_get(bias, xp_dense_at(bias, i % n, 0, 0, 0));
}

void xp_dense_mlp_in(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1, const xp_tensor *b1) {
    xp_dense_round_all(b->unit.r, m * b->h_n, b->x);
    xp_dense_map(b->x, m, w1, b->pre, b->wide);
    add_bias(b, m, b1, b->u_n, b->pre);
}

void xp_dense_mlp_act(const xp_dense_mlp *b, int64_t m) {
    xp_dense_round_all(b->unit.r, m * b->u_n, b->pre);
    for (int64_t i = 0; i < m * b->f_n; i++) {
        const double *row = b->pre + i / b->f_n * b->u_n;
        const int64_t up = xp_dense_up_at(b->unit.d, b->f_n, i % b->f_n);
        b->act[i] = xp_dense_unit_run(&b->unit, row[xp_dense_gate_at(b->unit.d, i % b->f_n)], up < 0 ? 0 : row[up]);
    }
}

void xp_dense_mlp_out(const xp_dense_mlp *b, int64_t m, const xp_tensor *w2, const xp_tensor *b2) {
    xp_dense_round_all(b->unit.r, m * b->f_n, b->act);
    xp_dense_map(b->act, m, w2, b->y, b->wide);
    add_bias(b, m, b2, b->h_n, b->y);
}

void xp_dense_mlp_dact(const xp_dense_mlp *b, int64_t m, const xp_tensor *w2) {
    xp_dense_round_all(b->unit.r, m * b->h_n, b->y);
    memset(b->act, 0, (size_t)(m * b->f_n) * sizeof *b->act);
    xp_dense_map_back(b->y, m, w2, b->act, b->wide);
    xp_dense_round_all(b->unit.r, m * b->f_n, b->act);
}

void xp_dense_mlp_dunit(const xp_dense_mlp *b, int64_t m) {
    for (int64_t i = 0; i < m * b->f_n; i++) {
        double *row = b->pre + i / b->f_n * b->u_n, none = 0;
        const int64_t up = xp_dense_up_at(b->unit.d, b->f_n, i % b->f_n);
        xp_dense_unit_back(&b->unit, b->act[i], row + xp_dense_gate_at(b->unit.d, i % b->f_n),
                           up < 0 ? &none : row + up);
    }
}

void xp_dense_mlp_dpre(const xp_dense_mlp *b, int64_t m, const xp_tensor *w2) {
    xp_dense_mlp_dact(b, m, w2);
    xp_dense_mlp_dunit(b, m);
}

void xp_dense_mlp_dx(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1) {
    xp_dense_round_all(b->unit.r, m * b->u_n, b->pre);
    memset(b->x, 0, (size_t)(m * b->h_n) * sizeof *b->x);
    xp_dense_map_back(b->pre, m, w1, b->x, b->wide);
}

void xp_dense_mlp_leave(const xp_dense_mlp *b, int64_t n, double *v) {
    if (b->outside != b->unit.r)
        xp_dense_round_all(b->unit.r, n, v);
}
