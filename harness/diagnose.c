/* Known mistakes of a whole MoE block, tried on somebody's answer: see diagnose.h. Each trial is a run of the reference
 * with the mistake made on purpose; names are those of `expar list faults`. */
#include "diagnose.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "registry.h"
#include "xp/moe.h"
#include "xp/route.h"
#include "xp/router.h"

static xp_status run_row(xp_rank *r, const xp_stage *s, const void *args) {
    const char *why = "";
    const xp_kernel *k = xp_rank_row(xp_backend_ref(), s, args, r->mesh, &why);
    void *ws = NULL;
    if (!k)
        return XP_FAIL(XP_E_BUG, "diagnose: no reference row of %s: %s", s->name, why);
    const size_t bytes = k->workspace ? k->workspace(args, r->mesh) : 0;
    XP_TRY(xp_rank_alloc(r, XP_KIND_JUDGE, bytes, &ws));
    const xp_exec x = {.dev = r->dev, .q = r->q, .mesh = r->mesh, .ws = ws, .ws_bytes = bytes};
    const xp_status st = k->run(&x, args);
    xp_rank_release(r, ws);
    return st;
}

/* Every output of args points to memory of its own, so that the answer stays. */
static xp_status own_outputs(xp_rank *r, xp_moe_args *a) {
    for (int i = 0; i < xp_stage_moe.operands; i++) {
        xp_tensor *t = xp_stage_tensor(&xp_stage_moe, a, i);
        const xp_tensor like = *t;
        if (xp_stage_moe.operand[i].role == XP_OUT && like.data)
            XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, like.dtype, like.ndim, like.dim, t));
    }
    return XP_OK;
}

static void drop_outputs(xp_rank *r, xp_moe_args *a) {
    for (int i = 0; i < xp_stage_moe.operands; i++) {
        if (xp_stage_moe.operand[i].role == XP_OUT)
            xp_rank_drop(r, xp_stage_tensor(&xp_stage_moe, a, i));
    }
}

/* 1 when every element of got is factor * (a's output `operand`), within four times the stage's bound: the trial and
 * the answer each have theirs, and the mistake may have been made before or after a rounding. */
static xp_status explains(xp_rank *r, const xp_moe_args *a, const char *operand, const xp_tensor *got, double factor,
                          int *out) {
    const int i = xp_stage_operand(&xp_stage_moe, operand);
    const xp_tensor *mine = xp_stage_ctensor(&xp_stage_moe, a, i);
    xp_tensor ref, tol;
    void *ws = NULL;
    XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, XP_F64, mine->ndim, mine->dim, &ref));
    XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, XP_F64, mine->ndim, mine->dim, &tol));
    for (int64_t n = 0; n < xp_tensor_count(mine); n++)
        ((double *)ref.data)[n] = xp_widen(mine->data, mine->dtype, xp_tensor_offset(mine, n));
    XP_TRY(xp_rank_alloc(r, XP_KIND_JUDGE, xp_stage_moe.bound_workspace(a, r->mesh), &ws));
    XP_TRY(xp_stage_moe.bound(a, r->mesh, i, &ref, ws, &tol));
    *out = 1;
    for (int64_t n = 0; n < xp_tensor_count(mine); n++) {
        const double v = xp_widen(got->data, got->dtype, xp_tensor_offset(got, n));
        const double err = fabs(v - factor * ((const double *)ref.data)[n]);
        *out &= err <= 4.0 * fabs(factor) * ((const double *)tol.data)[n];
    }
    xp_rank_release(r, ws);
    xp_rank_drop(r, &ref);
    xp_rank_drop(r, &tol);
    return XP_OK;
}

/* The factor of the experts' gradients when it is one number above 1, else 1. */
static double gradient_factor(const xp_tensor *got, const xp_tensor *mine) {
    double most = 0.0, factor = 1.0;
    for (int64_t n = 0; n < xp_tensor_count(mine); n++) {
        const double v = xp_widen(mine->data, mine->dtype, xp_tensor_offset(mine, n));
        if (fabs(v) > most) {
            most = fabs(v);
            factor = xp_widen(got->data, got->dtype, xp_tensor_offset(got, n)) / v;
        }
    }
    const double whole = round(factor);
    return whole > 1.0 && fabs(factor - whole) < 1e-3 * whole ? whole : 1.0;
}

static xp_status try_gradients(xp_rank *r, const xp_moe_args *a, char *text) {
    xp_moe_args b = *a;
    int y = 0, w1 = 0, w2 = 0;
    XP_TRY(own_outputs(r, &b));
    XP_TRY(run_row(r, &xp_stage_moe, &b));
    const double factor = gradient_factor(&a->dw1, &b.dw1);
    XP_TRY(explains(r, &b, "y", &a->y, 1.0, &y));
    XP_TRY(explains(r, &b, "dw1", &a->dw1, factor, &w1));
    XP_TRY(explains(r, &b, "dw2", &a->dw2, factor, &w2));
    if (factor > 1.0 && y && w1 && w2)
        snprintf(text, XP_DIAGNOSIS, "grad-times-ep: gradients of the experts are exactly %.0f x, all else is right",
                 factor);
    drop_outputs(r, &b);
    return XP_OK;
}

static xp_status try_shared(xp_rank *r, const xp_moe_args *a, char *text) {
    xp_moe_args b = *a;
    xp_tensor *const shared[] = {&b.sw1, &b.sw2, &b.sgate, &b.dsw1, &b.dsw2, &b.dsgate};
    const int weighed = a->dialect->shared_rows > 0;
    xp_tensor nothing = {0};
    int y = 0;
    if (!a->sw1.data)
        return XP_OK;
    if (weighed) { /* its rows are the router's, too: it stays, and gives 0 */
        XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, a->sw2.dtype, 2, a->sw2.dim, &nothing));
        memset(nothing.data, 0, xp_dtype_bytes(nothing.dtype, xp_tensor_count(&nothing)));
        b.sw2 = nothing;
    }
    for (size_t i = 0; i < sizeof shared / sizeof *shared && !weighed; i++)
        shared[i]->data = NULL;
    XP_TRY(own_outputs(r, &b));
    XP_TRY(run_row(r, &xp_stage_moe, &b));
    XP_TRY(explains(r, &b, "y", &a->y, 1.0, &y));
    if (y)
        snprintf(text, XP_DIAGNOSIS, "shared-missing: the output is the routed experts' alone");
    drop_outputs(r, &b);
    xp_rank_drop(r, &nothing);
    return XP_OK;
}

/* The weights of the given choice, [T,K] f64. */
static xp_status weights_of(xp_rank *r, const xp_moe_args *a, xp_tensor *w) {
    const int64_t logits[2] = {a->x.dim[0], a->wr.dim[0]}, slots[2] = {a->x.dim[0], a->idx.dim[1]};
    const xp_dtype wide = a->x.dtype == XP_F64 ? XP_F64 : XP_F32;
    xp_router_args g = {.x = a->x, .w = a->wr, .bias = a->rbias};
    xp_route_args route = {
        .bias = a->bias, .idx = a->idx, .dialect = a->dialect, .replay = 1, .scale_e = a->scale_e, .act = a->x.dtype};
    XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, a->dialect->logits_dtype == XP_WIDE_ACT ? a->x.dtype : wide, 2, logits,
                          &g.logits));
    XP_TRY(run_row(r, &xp_stage_router, &g));
    route.logits = g.logits;
    XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, XP_F64, 2, logits, &route.scores));
    XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, XP_F64, 2, slots, w));
    route.w = *w;
    if (a->dialect->shared_rows > 0) {
        const int64_t rest[2] = {a->x.dim[0], a->dialect->shared_rows};
        XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, XP_F64, 2, rest, &route.gamma));
    }
    XP_TRY(run_row(r, &xp_stage_route, &route));
    xp_rank_drop(r, &g.logits);
    xp_rank_drop(r, &route.scores);
    xp_rank_drop(r, &route.gamma);
    return XP_OK;
}

/* Token t alone, each chosen expert with the weight of the slot `by` further on: a factor an expert does it. */
static xp_status try_token(xp_rank *r, const xp_moe_args *a, const xp_tensor *w, int64_t t, int64_t by, int *out) {
    const int64_t Z = a->wr.dim[0], K = a->idx.dim[1];
    xp_moe_args b = *a;
    xp_dialect d = *a->dialect;
    xp_tensor factor;
    XP_TRY(xp_rank_tensor(r, XP_KIND_JUDGE, XP_F64, 1, &Z, &factor));
    const double *weight = xp_tensor_at(w, t, 0, 0, 0);
    const int32_t *id = xp_tensor_at(&a->idx, t, 0, 0, 0);
    const double all = d.expert_scale == XP_FACTOR_ONE ? xp_widen(a->scale_e.data, a->scale_e.dtype, 0) : 1.0;
    for (int64_t e = 0; e < Z; e++)
        ((double *)factor.data)[e] = all;
    for (int64_t k = 0; k < K; k++)
        ((double *)factor.data)[id[k]] = all * weight[(k + by) % K] / weight[k];
    d.expert_scale = XP_FACTOR_EACH;
    b.dialect = &d;
    b.scale_e = factor;
    b.x = xp_tensor_rows(&a->x, 0, t, t + 1);
    b.dy = xp_tensor_rows(&a->dy, 0, t, t + 1);
    b.idx = xp_tensor_rows(&a->idx, 0, t, t + 1);
    b.y = xp_tensor_rows(&a->y, 0, t, t + 1);
    b.dx = xp_tensor_rows(&a->dx, 0, t, t + 1);
    const xp_tensor got = b.y;
    XP_TRY(own_outputs(r, &b));
    XP_TRY(run_row(r, &xp_stage_moe, &b));
    XP_TRY(explains(r, &b, "y", &got, 1.0, out));
    drop_outputs(r, &b);
    xp_rank_drop(r, &factor);
    return XP_OK;
}

static xp_status try_slots(xp_rank *r, const xp_moe_args *a, char *text) {
    xp_tensor w;
    const int64_t K = a->idx.dim[1];
    if (K < 2 || a->dialect->expert_scale == XP_FACTOR_EACH || a->dialect->score == XP_SCORE_SPARSEMIXER)
        return XP_OK;
    XP_TRY(weights_of(r, a, &w));
    for (int64_t by = 1; by < K && !text[0]; by++) {
        int all = 1;
        for (int64_t t = 0; t < a->x.dim[0] && all; t++)
            XP_TRY(try_token(r, a, &w, t, by, &all));
        if (all)
            snprintf(text, XP_DIAGNOSIS, "weight-slot: every expert has the weight of the slot %lld further on",
                     (long long)by);
    }
    xp_rank_drop(r, &w);
    return XP_OK;
}

xp_status xp_diagnose(xp_rank *r, const xp_stage *s, const void *args, char *text) {
    static xp_status (*const trial[])(xp_rank *, const xp_moe_args *, char *) = {try_gradients, try_shared, try_slots};
    text[0] = '\0';
    if (s != &xp_stage_moe)
        return XP_OK;
    for (size_t i = 0; i < sizeof trial / sizeof *trial && !text[0]; i++)
        XP_TRY(trial[i](r, args, text));
    return XP_OK;
}
