/* The MLP and its bounds: see mlp.h.
 *
 * Contract of xp/expert.h, r = round to param: pre = r(r(x) W1^T), with a bias r(pre + b1); act as glu.c says;
 * y = r(act W2^T), with a bias r(y + b2), then the activation dtype. Backward: da = r(r(dy) W2), dpre as glu.c says,
 * dx = dpre W1. With weighed parts act = r(r(act as glu.c says) r(gamma)), y = sum over parts of r(act W2^T); backward
 * dgamma = <da, act as glu.c says>, and da = r(da r(gamma)) goes on. */
#include "mlp.h"

#include <math.h>
#include <string.h>

#include "linear.h"

void xp_ref_mlp_plan(xp_ref_layout *l, int64_t rows, int64_t H, int64_t F, int bounds, const xp_dialect *d,
                     xp_ref_mlp_kind kind, xp_dtype param, xp_dtype act, xp_ref_mlp *out) {
    const double limit = kind == XP_REF_MLP_EXPERT ? d->limit : xp_dialect_shared_limit(d);
    const int64_t U = d->gated ? 2 * F : F;
    const size_t m = (size_t)(rows < XP_REF_MLP_ROWS ? rows : XP_REF_MLP_ROWS) * sizeof(double);
    const size_t h = m * (size_t)H, f = m * (size_t)F, u = m * (size_t)U;
    *out = (xp_ref_mlp){.H = H,
                        .F = F,
                        .U = U,
                        .param = param,
                        .act = act,
                        .glu = xp_ref_glu_of(d, limit, param),
                        .interleaved = d->gate_layout == XP_GATE_INTERLEAVED};
    out->x = xp_ref_take(l, h);
    out->pre = xp_ref_take(l, u);
    out->mid = xp_ref_take(l, f);
    out->y = xp_ref_take(l, h);
    out->bias = xp_ref_take(l, (size_t)(U > H ? U : H) * sizeof(double));
    if (bounds) {
        out->xe = xp_ref_take(l, h);
        out->pree = xp_ref_take(l, u);
        out->mide = xp_ref_take(l, f);
        out->ye = xp_ref_take(l, h);
    }
    if (kind == XP_REF_MLP_SHARED && d->shared_rows > 0) {
        const size_t weights = m * (size_t)d->shared_rows;
        out->parts = d->shared_rows;
        out->weight = act;
        out->gamma = xp_ref_take(l, weights);
        out->dgamma = xp_ref_take(l, weights);
        out->part = xp_ref_take(l, h);
        out->gammae = bounds ? xp_ref_take(l, weights) : NULL;
        out->dgammae = bounds ? xp_ref_take(l, weights) : NULL;
        out->parte = bounds ? xp_ref_take(l, h) : NULL;
    }
    out->tile = xp_ref_take(l, xp_ref_linear_ws());
}

/* ---- check ---- */

static xp_status words_check(const char *stage, const xp_dialect *d) {
    const struct {
        const char *field;
        int value, most;
    } word[] = {
        {"gated", d->gated, 1},
        {"act", (int)d->act, XP_ACT_SOFTCAP},
        {"limit_when", (int)d->limit_when, XP_LIMIT_AFTER},
        {"act_rounding", (int)d->act_rounding, XP_ROUND_ONCE},
        {"gate_layout", (int)d->gate_layout, XP_GATE_INTERLEAVED},
        {"expert_bias", d->expert_bias, 1},
        {"shared_limit", d->shared_limit, 1},
        {"shared_gate", d->shared_gate, 1},
    };
    for (size_t i = 0; i < sizeof word / sizeof *word; i++) {
        if (word[i].value < 0 || word[i].value > word[i].most)
            return XP_FAIL(XP_E_ARG, "%s: dialect %s has %s %d, expected 0 to %d", stage, d->name ? d->name : "?",
                           word[i].field, word[i].value, word[i].most);
    }
    return XP_OK;
}

xp_status xp_ref_mlp_check(const char *stage, const xp_dialect *d) {
    if (!d)
        return XP_FAIL(XP_E_ARG, "%s: dialect is absent, expected a record", stage);
    XP_TRY(words_check(stage, d));
    const int caps = d->act == XP_ACT_SOFTCAP;
    const struct {
        const char *field, *expected;
        double value;
        int ok;
    } number[] = {
        {"act_alpha", "> 0", d->act_alpha, d->act != XP_ACT_SILU || d->act_alpha > 0.0},
        {"limit", ">= 0 (0: none)", d->limit, d->limit >= 0.0},
        {"limit", "0 without a gate", d->limit, d->gated || d->limit == 0.0},
        {"limit_shared", ">= 0, 0 without a gate", d->limit_shared,
         d->limit_shared >= 0.0 && (d->gated || d->limit_shared == 0.0)},
        {"up_offset", "a number", d->up_offset, 1},
        {"up_offset", "0 without a gate", d->up_offset, d->gated || d->up_offset == 0.0},
        {"gate_cap", "> 0 with act softcap", d->gate_cap, !caps || d->gate_cap > 0.0},
        {"up_cap", "> 0 with act softcap", d->up_cap, !caps || d->up_cap > 0.0},
        {"act", "another one than softcap (4) without a gate", (double)d->act, d->gated || !caps},
    };
    for (size_t i = 0; i < sizeof number / sizeof *number; i++) {
        if (!number[i].ok || !isfinite(number[i].value))
            return XP_FAIL(XP_E_ARG, "%s: dialect %s has %s %g, expected %s", stage, d->name ? d->name : "?",
                           number[i].field, number[i].value, number[i].expected);
    }
    return XP_OK;
}

xp_status xp_ref_mlp_width_check(const char *stage, const xp_dialect *d, const char *name, int64_t rows, char letter,
                                 int64_t width) {
    const int64_t expected = d->gated ? 2 * width : width;
    if (rows != expected)
        return XP_FAIL(XP_E_ARG, "%s: %s has %lld rows, expected %s%c = %lld: dialect %s has gated %d", stage, name,
                       (long long)rows, d->gated ? "2 " : "", letter, (long long)expected, d->name ? d->name : "?",
                       d->gated);
    return XP_OK;
}

xp_status xp_ref_mlp_parts_check(const char *stage, const xp_dialect *d, char letter, int64_t width, int64_t weights) {
    if (d->shared_rows <= 0)
        return XP_OK;
    if (weights >= 0 && weights != d->shared_rows)
        return XP_FAIL(XP_E_ARG, "%s: gamma dim 1 is %lld, expected A = %d: dialect %s has shared_rows %d", stage,
                       (long long)weights, d->shared_rows, d->name ? d->name : "?", d->shared_rows);
    if (width % d->shared_rows != 0)
        return XP_FAIL(XP_E_ARG, "%s: %c is %lld, expected a multiple of the dialect's shared_rows %d", stage, letter,
                       (long long)width, d->shared_rows);
    return XP_OK;
}

/* ---- reference ---- */

/* Where element j of a row's gate and up lie in its U columns. */
static int64_t gate_at(const xp_ref_mlp *p, int64_t j) {
    return p->interleaved && p->glu.gated ? 2 * j : j;
}

static int64_t up_at(const xp_ref_mlp *p, int64_t j) {
    if (!p->glu.gated)
        return j; /* read, but not used */
    return p->interleaved ? 2 * j + 1 : p->F + j;
}

/* v += b, once v is rounded. */
static void add_bias(const xp_ref_mlp *p, const xp_tensor *b, int64_t m, int64_t n, double *v) {
    if (!b)
        return;
    xp_widen_row(b->data, b->dtype, 0, n, p->bias);
    xp_ref_round_row(p->param, m * n, v);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++)
            v[i * n + j] += p->bias[j];
    }
}

static void activate(const xp_ref_mlp *p, int64_t m) {
    for (int64_t i = 0; i < m; i++) {
        const double *row = p->pre + i * p->U;
        for (int64_t j = 0; j < p->F; j++)
            p->mid[i * p->F + j] = xp_ref_glu_forward(&p->glu, row[gate_at(p, j)], row[up_at(p, j)]);
    }
}

/* Columns of w2 that belong to part j. */
static xp_tensor columns_of(const xp_ref_mlp *p, int64_t j) {
    xp_tensor out = *p->w2;
    const int64_t width = p->F / p->parts;
    out.dim[1] = width;
    out.data = (char *)out.data + xp_dtype_bytes(out.dtype, j * width);
    return out;
}

static double *weight_of(double *gamma, const xp_ref_mlp *p, int64_t at) {
    return gamma + at / p->F * p->parts + at % p->F / (p->F / p->parts);
}

static void weigh(const xp_ref_mlp *p, int64_t m) {
    xp_ref_round_row(p->param, m * p->F, p->mid);
    xp_ref_round_row(p->param, m * p->parts, p->gamma);
    for (int64_t i = 0; i < m * p->F; i++)
        p->mid[i] *= *weight_of(p->gamma, p, i);
}

/* One part's sum is rounded with the output. */
static void sum_parts(const xp_ref_mlp *p, int64_t m) {
    memset(p->y, 0, (size_t)(m * p->H) * sizeof *p->y);
    for (int64_t j = 0; j < p->parts; j++) {
        const xp_tensor w2 = columns_of(p, j);
        xp_ref_linear_nt(p->mid + j * (p->F / p->parts), m, p->F, &w2, 0, p->part, p->H, p->tile);
        if (p->parts > 1)
            xp_ref_round_row(p->param, m * p->H, p->part);
        for (int64_t i = 0; i < m * p->H; i++)
            p->y[i] += p->part[i];
    }
}

void xp_ref_mlp_forward(xp_ref_mlp *p, int64_t m, int64_t row, const xp_tensor *pre, const xp_tensor *act) {
    xp_ref_round_row(p->param, m * p->H, p->x);
    xp_ref_linear_nt(p->x, m, p->H, p->w1, 0, p->pre, p->U, p->tile);
    add_bias(p, p->b1, m, p->U, p->pre);
    xp_ref_rows_store(pre, row, m, p->pre);
    xp_ref_round_row(p->param, m * p->U, p->pre);
    activate(p, m);
    if (p->parts)
        weigh(p, m);
    xp_ref_rows_store(act, row, m, p->mid);
    xp_ref_round_row(p->param, m * p->F, p->mid);
    if (p->parts)
        sum_parts(p, m);
    else
        xp_ref_linear_nt(p->mid, m, p->F, p->w2, 0, p->y, p->H, p->tile);
    add_bias(p, p->b2, m, p->H, p->y);
    xp_ref_mlp_finish(p, m * p->H, p->y);
}

/* mid, the gradient of the weighed activation, becomes that of the activation. */
static void weigh_backward(const xp_ref_mlp *p, int64_t m) {
    xp_ref_round_row(p->param, m * p->parts, p->gamma);
    memset(p->dgamma, 0, (size_t)(m * p->parts) * sizeof *p->dgamma);
    for (int64_t i = 0; i < m * p->F; i++) {
        const double *row = p->pre + i / p->F * p->U;
        const double a = xp_ref_glu_forward(&p->glu, row[gate_at(p, i % p->F)], row[up_at(p, i % p->F)]);
        *weight_of(p->dgamma, p, i) += p->mid[i] * xp_ref_round(a, p->param);
        p->mid[i] *= *weight_of(p->gamma, p, i);
    }
    xp_ref_round_row(p->param, m * p->F, p->mid);
}

/* pre becomes dpre, the last rounding left out. mid is da. */
static void activate_backward(const xp_ref_mlp *p, int64_t m) {
    for (int64_t i = 0; i < m; i++) {
        double *row = p->pre + i * p->U;
        for (int64_t j = 0; j < p->F; j++) {
            double *g = row + gate_at(p, j), *u = row + up_at(p, j), dg, du;
            xp_ref_glu_backward(&p->glu, *g, *u, p->mid[i * p->F + j], &dg, &du);
            *u = du;
            *g = dg; /* without a gate u is g */
        }
    }
}

void xp_ref_mlp_backward(xp_ref_mlp *p, int64_t m, int64_t row, const xp_tensor *dpre) {
    xp_ref_round_row(p->param, m * p->H, p->y);
    xp_ref_linear_nn(p->y, m, p->H, p->w2, 0, p->mid, p->F, p->tile);
    xp_ref_round_row(p->param, m * p->F, p->mid);
    if (p->parts)
        weigh_backward(p, m);
    activate_backward(p, m);
    xp_ref_rows_store(dpre, row, m, p->pre);
    xp_ref_round_row(p->param, m * p->U, p->pre);
    xp_ref_linear_nn(p->pre, m, p->U, p->w1, 0, p->x, p->H, p->tile);
}

void xp_ref_mlp_finish(const xp_ref_mlp *p, int64_t n, double *v) {
    if (p->param != p->act)
        xp_ref_round_row(p->param, n, v);
}

/* ---- bounds ---- */

static void round_error(const xp_ref_mlp *p, int64_t n, double *v, double *e) {
    const xp_ref_rule rule = xp_ref_rule_of(p->param, xp_ref_op(p->param));
    xp_ref_round_errors(&rule, n, v, e);
}

/* The cast on the way in: the reference rounds; another implementation rounds the same value, or leaves it. A value
 * that is itself inexact may round elsewhere. */
static void cast_error(const xp_ref_mlp *p, int64_t n, double *v, double *e) {
    const xp_ref_rule rule = xp_ref_rule_of(p->param, xp_ref_op(p->param));
    if (p->param == p->act)
        return; /* nothing to cast */
    for (int64_t i = 0; i < n; i++) {
        const double r = xp_ref_round(v[i], p->param);
        e[i] = e[i] > 0.0 ? xp_ref_rule_round(&rule, (xp_ref_val){v[i], e[i]}).e : fabs(v[i] - r);
        v[i] = r;
    }
}

void xp_ref_mlp_finish_error(const xp_ref_mlp *p, int64_t n, double *v, double *e) {
    if (p->param != p->act)
        round_error(p, n, v, e);
}

void xp_ref_mlp_out_error(const xp_ref_mlp *p, int64_t n, double *v, double *e) {
    const xp_ref_rule rule = xp_ref_rule_of(p->act, xp_ref_op(p->param));
    xp_ref_mlp_finish_error(p, n, v, e);
    xp_ref_out_errors(&rule, n, v, e);
}

/* n columns of sums gain their bias, one of `terms` wherever an implementation adds it. */
static void bias_error(const xp_ref_mlp *p, const xp_tensor *b, int64_t terms, int64_t m, int64_t n, double *v,
                       double *e) {
    const xp_dtype op = xp_ref_op(p->param);
    const xp_ref_rule rule = xp_ref_rule_of(p->param, op);
    const double g = xp_ref_both(terms, op);
    if (!b)
        return;
    xp_widen_row(b->data, b->dtype, 0, n, p->bias);
    for (int64_t i = 0; i < m * n; i++) {
        const xp_ref_val term = {p->bias[i % n], g * fabs(p->bias[i % n])};
        const xp_ref_val sum = xp_ref_val_add(xp_ref_rule_round(&rule, (xp_ref_val){v[i], e[i]}), term);
        v[i] = sum.v;
        e[i] = sum.e;
    }
}

/* pre, unrounded. */
static void pre_error(xp_ref_mlp *p, int64_t m) {
    const xp_dtype op = xp_ref_op(p->param);
    const int64_t H = p->H, U = p->U, terms = H + (p->b1 != NULL);
    cast_error(p, m * H, p->x, p->xe);
    xp_ref_linear_nt(p->x, m, H, p->w1, 0, p->pre, U, p->tile);
    xp_ref_dot_inputs(terms, op, m * H, p->x, p->xe);
    xp_ref_linear_nt(p->xe, m, H, p->w1, 1, p->pree, U, p->tile);
    xp_ref_dot_outputs(terms, op, m * U, p->pree);
    bias_error(p, p->b1, terms, m, U, p->pre, p->pree);
}

static void activate_error(const xp_ref_mlp *p, int64_t m) {
    const xp_ref_rule rule = xp_ref_rule_of(p->param, xp_ref_op(p->param));
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < p->F; j++) {
            const int64_t g = i * p->U + gate_at(p, j), u = i * p->U + up_at(p, j), at = i * p->F + j;
            const xp_ref_val a = xp_ref_glu_forward_val(&p->glu, &rule, (xp_ref_val){p->pre[g], p->pree[g]},
                                                        (xp_ref_val){p->pre[u], p->pree[u]});
            p->mid[at] = a.v;
            p->mide[at] = a.e;
        }
    }
}

/* gamma as the parameters' dtype holds it. */
static void cast_gamma(const xp_ref_mlp *p, int64_t m) {
    const xp_ref_rule rule = xp_ref_rule_of(p->param, xp_ref_op(p->param));
    for (int64_t i = 0; i < m * p->parts && p->weight != p->param; i++) {
        const double v = p->gamma[i], r = xp_ref_round(v, p->param);
        p->gammae[i] = p->gammae[i] > 0.0 ? xp_ref_rule_round(&rule, (xp_ref_val){v, p->gammae[i]}).e : fabs(v - r);
        p->gamma[i] = r;
    }
}

static xp_ref_val gamma_val(const xp_ref_mlp *p, int64_t at) {
    return (xp_ref_val){*weight_of(p->gamma, p, at), *weight_of(p->gammae, p, at)};
}

static void weigh_error(const xp_ref_mlp *p, int64_t m) {
    round_error(p, m * p->F, p->mid, p->mide);
    cast_gamma(p, m);
    for (int64_t i = 0; i < m * p->F; i++) {
        const xp_ref_val a = xp_ref_val_mul((xp_ref_val){p->mid[i], p->mide[i]}, gamma_val(p, i));
        p->mid[i] = a.v;
        p->mide[i] = a.e;
    }
}

/* Each part's sum, rounded or not, and then the parts; or one chain through all of them. mide is t of the whole. */
static void sum_parts_error(const xp_ref_mlp *p, int64_t m) {
    const xp_dtype op = xp_ref_op(p->param);
    const int64_t width = p->F / p->parts, n = m * p->H;
    const double g = xp_ref_both(p->parts, op);
    memset(p->y, 0, (size_t)n * sizeof *p->y);
    memset(p->ye, 0, (size_t)n * sizeof *p->ye);
    for (int64_t j = 0; j < p->parts; j++) {
        const xp_tensor w2 = columns_of(p, j);
        xp_ref_linear_nt(p->mid + j * width, m, p->F, &w2, 0, p->part, p->H, p->tile);
        xp_ref_linear_nt(p->mide + j * width, m, p->F, &w2, 1, p->parte, p->H, p->tile);
        xp_ref_dot_outputs(p->F, op, n, p->parte);
        if (p->parts > 1)
            round_error(p, n, p->part, p->parte);
        for (int64_t i = 0; i < n; i++) {
            p->y[i] += p->part[i];
            p->ye[i] += p->parte[i] + (p->parts > 1 ? g * (fabs(p->part[i]) + p->parte[i]) : 0.0);
        }
    }
}

void xp_ref_mlp_forward_error(xp_ref_mlp *p, int64_t m, xp_ref_mlp_stop stop) {
    const xp_dtype op = xp_ref_op(p->param);
    const xp_ref_rule rule = xp_ref_rule_of(p->param, op);
    const int64_t H = p->H, F = p->F, terms = F + (p->b2 != NULL);
    pre_error(p, m);
    if (stop == XP_REF_MLP_PRE) {
        xp_ref_out_errors(&rule, m * p->U, p->pre, p->pree);
        return;
    }
    round_error(p, m * p->U, p->pre, p->pree);
    activate_error(p, m);
    if (p->parts)
        weigh_error(p, m);
    if (stop == XP_REF_MLP_ACT) {
        xp_ref_out_errors(&rule, m * F, p->mid, p->mide);
        return;
    }
    round_error(p, m * F, p->mid, p->mide);
    if (p->acte)
        memcpy(p->acte, p->mide, (size_t)(m * F) * sizeof(double));
    if (p->parts) {
        xp_ref_dot_inputs(F, op, m * F, p->mid, p->mide);
        sum_parts_error(p, m);
        return;
    }
    xp_ref_linear_nt(p->mid, m, F, p->w2, 0, p->y, H, p->tile);
    xp_ref_dot_inputs(terms, op, m * F, p->mid, p->mide);
    xp_ref_linear_nt(p->mide, m, F, p->w2, 1, p->ye, H, p->tile);
    xp_ref_dot_outputs(terms, op, m * H, p->ye);
    bias_error(p, p->b2, terms, m, H, p->y, p->ye);
}

/* A dot product of da with the activation, both within their errors, for each part. */
static void weigh_backward_error(const xp_ref_mlp *p, int64_t m) {
    const xp_dtype op = xp_ref_op(p->param);
    const xp_ref_rule rule = xp_ref_rule_of(p->param, op);
    const int64_t n = m * p->parts;
    const double g = xp_ref_both(p->F / p->parts, op);
    cast_gamma(p, m);
    memset(p->dgamma, 0, (size_t)n * sizeof *p->dgamma);
    memset(p->dgammae, 0, (size_t)n * sizeof *p->dgammae);
    for (int64_t i = 0; i < m * p->F; i++) {
        const int64_t at = i / p->F * p->U + gate_at(p, i % p->F), up = i / p->F * p->U + up_at(p, i % p->F);
        const xp_ref_val da = {p->mid[i], p->mide[i]};
        const xp_ref_val a =
            xp_ref_rule_round(&rule, xp_ref_glu_forward_val(&p->glu, &rule, (xp_ref_val){p->pre[at], p->pree[at]},
                                                            (xp_ref_val){p->pre[up], p->pree[up]}));
        const xp_ref_val term = xp_ref_val_mul(da, a), on = xp_ref_val_mul(da, gamma_val(p, i));
        *weight_of(p->dgamma, p, i) += term.v;
        *weight_of(p->dgammae, p, i) += term.e + g * (fabs(term.v) + term.e);
        p->mid[i] = on.v;
        p->mide[i] = on.e;
    }
    xp_ref_dot_outputs(p->F / p->parts, op, n, p->dgammae);
    round_error(p, m * p->F, p->mid, p->mide);
}

/* pre becomes dpre, unrounded with its errors; mid is da. */
static void activate_backward_error(const xp_ref_mlp *p, int64_t m) {
    const xp_ref_rule rule = xp_ref_rule_of(p->param, xp_ref_op(p->param));
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < p->F; j++) {
            const int64_t at = i * p->U + gate_at(p, j), up = i * p->U + up_at(p, j), mid = i * p->F + j;
            const xp_ref_val g = {p->pre[at], p->pree[at]}, u = {p->pre[up], p->pree[up]};
            xp_ref_val dg, du;
            xp_ref_glu_backward_val(&p->glu, &rule, g, u, (xp_ref_val){p->mid[mid], p->mide[mid]}, &dg, &du);
            p->pre[up] = du.v;
            p->pree[up] = du.e;
            p->pre[at] = dg.v; /* without a gate u is g */
            p->pree[at] = dg.e;
        }
    }
}

void xp_ref_mlp_backward_error(xp_ref_mlp *p, int64_t m, int64_t more, xp_ref_mlp_stop stop) {
    const xp_dtype op = xp_ref_op(p->param);
    const xp_ref_rule rule = xp_ref_rule_of(p->param, op);
    const int64_t H = p->H, F = p->F;
    cast_error(p, m * H, p->y, p->ye);
    xp_ref_linear_nn(p->y, m, H, p->w2, 0, p->mid, F, p->tile);
    xp_ref_dot_inputs(H, op, m * H, p->y, p->ye);
    xp_ref_linear_nn(p->ye, m, H, p->w2, 1, p->mide, F, p->tile);
    xp_ref_dot_outputs(H, op, m * F, p->mide);
    round_error(p, m * F, p->mid, p->mide);
    if (p->parts)
        weigh_backward_error(p, m);
    activate_backward_error(p, m);
    if (stop == XP_REF_MLP_DPRE) {
        xp_ref_out_errors(&rule, m * p->U, p->pre, p->pree);
        return;
    }
    round_error(p, m * p->U, p->pre, p->pree);
    if (p->dpree)
        memcpy(p->dpree, p->pree, (size_t)(m * p->U) * sizeof(double));
    xp_ref_linear_nn(p->pre, m, p->U, p->w1, 0, p->x, H, p->tile);
    xp_ref_dot_inputs(p->U + more, op, m * p->U, p->pre, p->pree);
    xp_ref_linear_nn(p->pree, m, p->U, p->w1, 1, p->xe, H, p->tile);
    xp_ref_dot_outputs(p->U + more, op, m * H, p->xe);
}
