/* The expert's activation as plain formulas, for the tests of the stages that contain it: every form of xp/expert.h
 * without its rounding points, in double or with every operation in float.
 *
 * It shares no formula with ref/ where there is a choice: derivatives are written another way, functions are libm's. */
#ifndef XP_TESTS_GLU_SUITE_H
#define XP_TESTS_GLU_SUITE_H

#include "unit/expert_suite.h"
#include "xp/dialect.h"

typedef struct {
    const xp_dialect *d;
    double limit; /* as it holds here */
    int narrow;   /* every operation in float */
    int wide;     /* the record's numbers are doubles, not floats */
} plain_glu;

static inline plain_glu plain_of(const xp_dialect *d, xp_dtype param, int narrow) {
    return (plain_glu){d, d->limit, narrow, param == XP_F64};
}

static inline double plain_number(const plain_glu *o, double v) {
    return o->wide ? v : (double)(float)v;
}

static inline double plain_tanh(const plain_glu *o, double v) {
    return o->narrow ? (double)tanhf((float)v) : tanh(v);
}

static inline double plain_sigmoid(const plain_glu *o, double v) {
    return o->narrow ? (double)(1.0F / (1.0F + expf((float)-v))) : sigmoid(v);
}

static inline double plain_relu(double v) {
    return v > 0.0 ? v : 0.0;
}

#define DO(v) op((v), o->narrow)

static inline double plain_gelu_inner(const plain_glu *o, double g) {
    const double k = plain_number(o, 0.79788456080286535588), c = plain_number(o, 0.044715);
    return DO(k * DO(g + DO(c * DO(DO(g * g) * g))));
}

/* act(g), and its derivative. */
static inline double plain_gate(const plain_glu *o, double g) {
    const double alpha = plain_number(o, o->d->act_alpha), cap = plain_number(o, o->d->gate_cap);
    switch (o->d->act) {
    case XP_ACT_SILU:
        return DO(g * plain_sigmoid(o, DO(alpha * g)));
    case XP_ACT_GELU_TANH:
        return DO(DO(0.5 * g) * DO(1.0 + plain_tanh(o, plain_gelu_inner(o, g))));
    case XP_ACT_RELU:
        return plain_relu(g);
    case XP_ACT_RELU2:
        return DO(plain_relu(g) * plain_relu(g));
    case XP_ACT_SOFTCAP:
        return DO(DO(plain_tanh(o, DO(g / cap)) * cap) * plain_sigmoid(o, g));
    }
    abort();
}

static inline double plain_slope(const plain_glu *o, double g) {
    const double alpha = plain_number(o, o->d->act_alpha), cap = plain_number(o, o->d->gate_cap);
    switch (o->d->act) {
    case XP_ACT_SILU: { /* s + alpha f (1 - s) */
        const double s = plain_sigmoid(o, DO(alpha * g)), f = DO(g * s);
        return DO(s + DO(DO(alpha * f) * DO(1.0 - s)));
    }
    case XP_ACT_GELU_TANH: {
        const double k = plain_number(o, 0.79788456080286535588), c3 = plain_number(o, 3.0 * 0.044715);
        const double t = plain_tanh(o, plain_gelu_inner(o, g));
        const double inner = DO(k * DO(1.0 + DO(c3 * DO(g * g))));
        return DO(DO(0.5 * DO(1.0 + t)) + DO(DO(DO(0.5 * g) * DO(1.0 - DO(t * t))) * inner));
    }
    case XP_ACT_RELU:
        return g > 0.0 ? 1.0 : 0.0;
    case XP_ACT_RELU2:
        return 2.0 * plain_relu(g);
    case XP_ACT_SOFTCAP: {
        const double t = plain_tanh(o, DO(g / cap)), s = plain_sigmoid(o, g);
        return DO(s * DO(DO(1.0 - DO(t * t)) + DO(DO(cap * t) * DO(1.0 - s))));
    }
    }
    abort();
}

static inline double plain_clamp(const plain_glu *o, double u) {
    return o->limit > 0.0 ? fmin(fmax(u, -o->limit), o->limit) : u;
}

static inline double plain_up(const plain_glu *o, double u) {
    const double cap = plain_number(o, o->d->up_cap);
    const double v = o->d->act == XP_ACT_SOFTCAP ? DO(plain_tanh(o, DO(u / cap)) * cap) : u;
    return DO(v + plain_number(o, o->d->up_offset));
}

static inline int plain_limits(const plain_glu *o, xp_limit_when when) {
    return o->limit > 0.0 && o->d->limit_when == when;
}

static inline double plain_act(const plain_glu *o, double g, double u) {
    const double s = plain_gate(o, plain_limits(o, XP_LIMIT_BEFORE) ? fmin(g, o->limit) : g);
    if (!o->d->gated)
        return s;
    return DO((plain_limits(o, XP_LIMIT_AFTER) ? fmin(s, o->limit) : s) * plain_up(o, plain_clamp(o, u)));
}

static inline void plain_act_back(const plain_glu *o, double g, double u, double da, double *dg, double *du) {
    const int before = plain_limits(o, XP_LIMIT_BEFORE), after = plain_limits(o, XP_LIMIT_AFTER);
    const double low = before ? fmin(g, o->limit) : g, s = plain_gate(o, low), v = plain_clamp(o, u);
    const int closed = (before && g > o->limit) || (after && s > o->limit);
    const double ds = o->d->gated ? DO(da * plain_up(o, v)) : da;
    *dg = closed ? 0.0 : DO(ds * plain_slope(o, low));
    *du = DO(da * (after ? fmin(s, o->limit) : s));
    if (o->d->act == XP_ACT_SOFTCAP) {
        const double t = plain_tanh(o, DO(v / plain_number(o, o->d->up_cap)));
        *du = DO(*du * DO(1.0 - DO(t * t)));
    }
    if (o->limit > 0.0 && fabs(u) > o->limit)
        *du = 0.0;
}

#undef DO

/* Columns of gate and up j in a row of U. */
static inline int64_t gate_column(const xp_dialect *d, int64_t j) {
    return d->gated && d->gate_layout == XP_GATE_INTERLEAVED ? 2 * j : j;
}
static inline int64_t up_column(const xp_dialect *d, int64_t F, int64_t j) {
    return !d->gated ? j : d->gate_layout == XP_GATE_INTERLEAVED ? 2 * j + 1 : F + j;
}

/* <w[row], v> + bias, from the last term down; narrow: in float. bias NULL: none. */
static inline double plain_dot(const xp_tensor *w, int64_t row, const double *v, int64_t n, const double *bias,
                               int narrow) {
    double s = bias ? bias[row] : 0.0;
    for (int64_t k = n - 1; k >= 0; k--)
        s = op(s + op(v[k] * get(w, row, k), narrow), narrow);
    return s;
}

/* One row of an expert, b1 and b2 as doubles or NULL. */
static inline void plain_forward(const plain_glu *o, const xp_tensor *w1, const xp_tensor *w2, const double *b1,
                                 const double *b2, const double *x, double *pre, double *act, double *y) {
    const int64_t H = w2->dim[0], F = w2->dim[1];
    for (int64_t j = 0; j < w1->dim[0]; j++)
        pre[j] = plain_dot(w1, j, x, H, b1, o->narrow);
    for (int64_t j = 0; j < F; j++)
        act[j] = plain_act(o, pre[gate_column(o->d, j)], pre[up_column(o->d, F, j)]);
    for (int64_t h = 0; h < H; h++)
        y[h] = plain_dot(w2, h, act, F, b2, o->narrow);
}

static inline void plain_backward(const plain_glu *o, const xp_tensor *w1, const xp_tensor *w2, const double *dy,
                                  const double *pre, double *dpre, double *dx) {
    const int64_t H = w2->dim[0], F = w2->dim[1];
    for (int64_t j = 0; j < F; j++) {
        const int64_t g = gate_column(o->d, j), u = up_column(o->d, F, j);
        double dg, du;
        plain_act_back(o, pre[g], pre[u], column_dot(w2, j, dy, H, o->narrow), &dg, &du);
        dpre[u] = du;
        dpre[g] = dg;
    }
    for (int64_t h = 0; h < H; h++)
        dx[h] = column_dot(w1, h, dpre, w1->dim[0], o->narrow);
}

#endif
