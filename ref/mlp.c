/* The gated MLP and its bounds: see mlp.h.
 *
 * Contract of xp/expert.h, r = round to param: pre = r(r(x) W1^T); s = r(silu g); act = r(s u); y = r(act W2^T), then
 * the activation dtype. Backward: da = r(r(dy) W2), ds = r(da u), dpre = (r(ds silu'(g)), r(da s)), dx = dpre W1. */
#include "mlp.h"

#include <math.h>
#include <string.h>

#include "linear.h"

void xp_ref_mlp_plan(xp_ref_layout *l, int64_t rows, int64_t H, int64_t F, int bounds, xp_dtype param, xp_dtype act,
                     xp_ref_mlp *out) {
    const size_t m = (size_t)(rows < XP_REF_MLP_ROWS ? rows : XP_REF_MLP_ROWS) * sizeof(double);
    const size_t h = m * (size_t)H, f = m * (size_t)F;
    *out = (xp_ref_mlp){.H = H, .F = F, .param = param, .act = act};
    out->x = xp_ref_take(l, h);
    out->pre = xp_ref_take(l, 2 * f);
    out->mid = xp_ref_take(l, f);
    out->y = xp_ref_take(l, h);
    if (bounds) {
        out->xe = xp_ref_take(l, h);
        out->pree = xp_ref_take(l, 2 * f);
        out->mide = xp_ref_take(l, f);
        out->ye = xp_ref_take(l, h);
    }
    out->tile = xp_ref_take(l, xp_ref_linear_ws());
}

xp_status xp_ref_mlp_check(const char *stage, const xp_dialect *d) {
    if (!d)
        return XP_FAIL(XP_E_ARG, "%s: dialect is absent, expected a record", stage);
    const struct {
        const char *field;
        int value, expected;
        const char *meaning;
    } field[] = {
        {"gated", d->gated, 1, "a gate"},
        {"act", (int)d->act, XP_ACT_SILU, "silu"},
        {"act_rounding", (int)d->act_rounding, XP_ROUND_EACH, "each operation rounded"},
        {"gate_layout", (int)d->gate_layout, XP_GATE_CONCAT, "gate rows, then up rows"},
        {"orient", (int)d->orient, XP_EOI, "[out,in] weights"},
        {"expert_bias", d->expert_bias, 0, "no bias"},
        {"weight_at", (int)d->weight_at, XP_AT_OUTPUT, "weights on the experts' output"},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        if (field[i].value != field[i].expected)
            return XP_FAIL(XP_E_ARG, "%s: dialect %s has %s %d, expected %d (%s)", stage, d->name ? d->name : "?",
                           field[i].field, field[i].value, field[i].expected, field[i].meaning);
    }
    if (!(d->limit == 0.0))
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has limit %g, expected 0 (none)", stage, d->name ? d->name : "?",
                       d->limit);
    if (!(d->up_offset == 0.0))
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has up_offset %g, expected 0", stage, d->name ? d->name : "?",
                       d->up_offset);
    return XP_OK;
}

/* ---- reference ---- */

/* mid = r(silu g) u of rows of (g, u). */
static void gate_up(const xp_ref_mlp *p, int64_t m) {
    for (int64_t i = 0; i < m; i++) {
        const double *g = p->pre + i * 2 * p->F, *u = g + p->F;
        double *a = p->mid + i * p->F;
        for (int64_t j = 0; j < p->F; j++)
            a[j] = xp_ref_silu(g[j]);
        xp_ref_round_row(p->param, p->F, a);
        for (int64_t j = 0; j < p->F; j++)
            a[j] *= u[j];
    }
}

void xp_ref_mlp_forward(xp_ref_mlp *p, int64_t m, int64_t row, const xp_tensor *pre, const xp_tensor *act) {
    xp_ref_round_row(p->param, m * p->H, p->x);
    xp_ref_linear_nt(p->x, m, p->H, p->w1, 0, p->pre, 2 * p->F, p->tile);
    xp_ref_rows_store(pre, row, m, p->pre);
    xp_ref_round_row(p->param, m * 2 * p->F, p->pre);
    gate_up(p, m);
    xp_ref_rows_store(act, row, m, p->mid);
    xp_ref_round_row(p->param, m * p->F, p->mid);
    xp_ref_linear_nt(p->mid, m, p->F, p->w2, 0, p->y, p->H, p->tile);
    xp_ref_mlp_finish(p, m * p->H, p->y);
}

/* (g, u) becomes (dg, du), the last rounding left out. mid is da. */
static void gate_up_backward(const xp_ref_mlp *p, int64_t m) {
    for (int64_t i = 0; i < m; i++) {
        double *g = p->pre + i * 2 * p->F, *u = g + p->F;
        const double *da = p->mid + i * p->F;
        for (int64_t j = 0; j < p->F; j++) {
            const double s = xp_ref_round(xp_ref_silu(g[j]), p->param), ds = xp_ref_round(da[j] * u[j], p->param);
            u[j] = da[j] * s;
            g[j] = ds * xp_ref_dsilu(g[j]);
        }
    }
}

void xp_ref_mlp_backward(xp_ref_mlp *p, int64_t m, int64_t row, const xp_tensor *dpre) {
    xp_ref_round_row(p->param, m * p->H, p->y);
    xp_ref_linear_nn(p->y, m, p->H, p->w2, 0, p->mid, p->F, p->tile);
    xp_ref_round_row(p->param, m * p->F, p->mid);
    gate_up_backward(p, m);
    xp_ref_rows_store(dpre, row, m, p->pre);
    xp_ref_round_row(p->param, m * 2 * p->F, p->pre);
    xp_ref_linear_nn(p->pre, m, 2 * p->F, p->w1, 0, p->x, p->H, p->tile);
}

void xp_ref_mlp_finish(const xp_ref_mlp *p, int64_t n, double *v) {
    if (p->param != p->act)
        xp_ref_round_row(p->param, n, v);
}

/* ---- bounds ---- */

static void round_error(const xp_ref_mlp *p, int64_t n, double *v, double *e) {
    const xp_ref_rule rule = xp_ref_rule_of(p->param, xp_ref_op(p->param));
    for (int64_t i = 0; i < n; i++) {
        const xp_ref_val r = xp_ref_rule_round(&rule, (xp_ref_val){v[i], e[i]});
        v[i] = r.v;
        e[i] = r.e;
    }
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

void xp_ref_mlp_forward_error(xp_ref_mlp *p, int64_t m, xp_ref_mlp_stop stop) {
    const xp_dtype op = xp_ref_op(p->param);
    const xp_ref_rule rule = xp_ref_rule_of(p->param, op);
    const int64_t H = p->H, F = p->F;
    cast_error(p, m * H, p->x, p->xe);
    xp_ref_linear_nt(p->x, m, H, p->w1, 0, p->pre, 2 * F, p->tile);
    xp_ref_dot_inputs(H, op, m * H, p->x, p->xe);
    xp_ref_linear_nt(p->xe, m, H, p->w1, 1, p->pree, 2 * F, p->tile);
    xp_ref_dot_outputs(H, op, m * 2 * F, p->pree);
    if (stop == XP_REF_MLP_PRE) {
        xp_ref_out_errors(&rule, m * 2 * F, p->pre, p->pree);
        return;
    }
    round_error(p, m * 2 * F, p->pre, p->pree);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < F; j++) {
            const int64_t g = i * 2 * F + j, u = g + F, at = i * F + j;
            const xp_ref_val s = xp_ref_val_silu(&rule, (xp_ref_val){p->pre[g], p->pree[g]});
            const xp_ref_val a = xp_ref_val_mul(xp_ref_rule_round(&rule, s), (xp_ref_val){p->pre[u], p->pree[u]});
            p->mid[at] = a.v;
            p->mide[at] = a.e;
        }
    }
    if (stop == XP_REF_MLP_ACT) {
        xp_ref_out_errors(&rule, m * F, p->mid, p->mide);
        return;
    }
    round_error(p, m * F, p->mid, p->mide);
    if (p->acte)
        memcpy(p->acte, p->mide, (size_t)(m * F) * sizeof(double));
    xp_ref_linear_nt(p->mid, m, F, p->w2, 0, p->y, H, p->tile);
    xp_ref_dot_inputs(F, op, m * F, p->mid, p->mide);
    xp_ref_linear_nt(p->mide, m, F, p->w2, 1, p->ye, H, p->tile);
    xp_ref_dot_outputs(F, op, m * H, p->ye);
}

/* (g, u) becomes (dg, du), both unrounded with their errors; mid is da. */
static void gate_up_error(const xp_ref_mlp *p, int64_t m) {
    const xp_ref_rule rule = xp_ref_rule_of(p->param, xp_ref_op(p->param));
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < p->F; j++) {
            const int64_t at = i * 2 * p->F + j, up = at + p->F;
            const xp_ref_val g = {p->pre[at], p->pree[at]}, u = {p->pre[up], p->pree[up]};
            const xp_ref_val da = {p->mid[i * p->F + j], p->mide[i * p->F + j]};
            const xp_ref_val s = xp_ref_rule_round(&rule, xp_ref_val_silu(&rule, g));
            const xp_ref_val ds = xp_ref_rule_round(&rule, xp_ref_val_mul(da, u));
            const xp_ref_val dg = xp_ref_val_mul(ds, xp_ref_val_dsilu(&rule, g)), du = xp_ref_val_mul(da, s);
            p->pre[at] = dg.v;
            p->pree[at] = dg.e;
            p->pre[up] = du.v;
            p->pree[up] = du.e;
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
    gate_up_error(p, m);
    if (stop == XP_REF_MLP_DPRE) {
        xp_ref_out_errors(&rule, m * 2 * F, p->pre, p->pree);
        return;
    }
    round_error(p, m * 2 * F, p->pre, p->pree);
    if (p->dpree)
        memcpy(p->dpree, p->pree, (size_t)(m * 2 * F) * sizeof(double));
    xp_ref_linear_nn(p->pre, m, 2 * F, p->w1, 0, p->x, H, p->tile);
    xp_ref_dot_inputs(2 * F + more, op, m * 2 * F, p->pre, p->pree);
    xp_ref_linear_nn(p->pree, m, 2 * F, p->w1, 1, p->xe, H, p->tile);
    xp_ref_dot_outputs(2 * F + more, op, m * H, p->xe);
}
