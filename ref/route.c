/* Stages route, route_bwd and route_scale_bwd: see xp/route.h for the meaning, and routing.h for the arithmetic of one
 * token.
 *
 * The choice and the weights read the scores as stored, so that a choice can be verified from the outputs alone. With
 * nothing but -inf, or a +inf, among a token's numbers IEEE makes the scores of a softmax NaN; a NaN logit still scores
 * 0. Chosen scores that sum to 0, which only a replayed choice can have, are divided to NaN. */
#include "xp/route.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "routing.h"
#include "token.h"

/* ---- operands and parameters ---- */

#define XP_DT_BIAS (XP_DT_WIDE | XP_BIT(XP_BF16))

enum { BIAS = 1, SCORES, IDX, W, SCALE_E, TOKEN, TABLE, GAMMA };
static const xp_operand operands[] = {
    XP_OPERAND(xp_route_args, logits, "T,Z", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    [BIAS] = XP_OPTIONAL(xp_route_args, bias, "Z", XP_IN, XP_DT_BIAS, XP_UNCOMPARED, ""),
    [SCORES] = XP_OPERAND(xp_route_args, scores, "T,Z", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [IDX] = XP_OPERAND(xp_route_args, idx, "T,K", XP_OUT, XP_BIT(XP_I32), XP_SELECT, ""),
    [W] = XP_OPERAND(xp_route_args, w, "T,K", XP_OUT, XP_DT_ACT, XP_BOUND, "weight"),
    [SCALE_E] = XP_OPTIONAL(xp_route_args, scale_e, "W", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [TOKEN] = XP_OPTIONAL(xp_route_args, token, "T", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    [TABLE] = XP_OPTIONAL(xp_route_args, table, "V,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    [GAMMA] = XP_OPTIONAL(xp_route_args, gamma, "T,A", XP_OUT, XP_DT_ACT, XP_BOUND, "weight"),
};

enum { BWD_DAUX = 3, BWD_DLOGITS, BWD_LOGITS, BWD_BIAS, BWD_SCALE_E, BWD_DGAMMA };
static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_route_bwd_args, scores, "T,Z", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    XP_OPERAND(xp_route_bwd_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_route_bwd_args, dw, "T,K", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [BWD_DAUX] = XP_OPTIONAL(xp_route_bwd_args, daux, "T,Z", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [BWD_DLOGITS] = XP_OPERAND(xp_route_bwd_args, dlogits, "T,Z", XP_OUT, XP_DT_ACT, XP_BOUND, "logits"),
    [BWD_LOGITS] = XP_OPTIONAL(xp_route_bwd_args, logits, "T,Z", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    [BWD_BIAS] = XP_OPTIONAL(xp_route_bwd_args, bias, "Z", XP_IN, XP_DT_BIAS, XP_UNCOMPARED, ""),
    [BWD_SCALE_E] = XP_OPTIONAL(xp_route_bwd_args, scale_e, "W", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [BWD_DGAMMA] = XP_OPTIONAL(xp_route_bwd_args, dgamma, "T,A", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
};

enum { SCALE_DSCALE = 3, SCALE_LOGITS, SCALE_BIAS, SCALE_DGAMMA };
static const xp_operand scale_operands[] = {
    XP_OPERAND(xp_route_scale_bwd_args, scores, "T,Z", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    XP_OPERAND(xp_route_scale_bwd_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_route_scale_bwd_args, dw, "T,K", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [SCALE_DSCALE] = XP_OPERAND(xp_route_scale_bwd_args, dscale, "B,W", XP_OUT, XP_DT_ACT, XP_BOUND, "grad"),
    [SCALE_LOGITS] = XP_OPTIONAL(xp_route_scale_bwd_args, logits, "T,Z", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "logits"),
    [SCALE_BIAS] = XP_OPTIONAL(xp_route_scale_bwd_args, bias, "Z", XP_IN, XP_DT_BIAS, XP_UNCOMPARED, ""),
    [SCALE_DGAMMA] = XP_OPTIONAL(xp_route_scale_bwd_args, dgamma, "T,A", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
};

static const xp_param params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_route_args, dialect)},
    {"replay", "off|on", "off", XP_P_WORD, offsetof(xp_route_args, replay)},
    {"act", NULL, "f32", XP_P_DTYPE, offsetof(xp_route_args, act)},
};

static const xp_param bwd_params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_route_bwd_args, dialect)},
    {"act", NULL, "f32", XP_P_DTYPE, offsetof(xp_route_bwd_args, act)},
};

static const xp_param scale_params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_route_scale_bwd_args, dialect)},
    {"token0", NULL, "0", XP_P_I64, offsetof(xp_route_scale_bwd_args, token0)},
    {"block", NULL, "0", XP_P_I64, offsetof(xp_route_scale_bwd_args, block)},
    {"act", NULL, "f32", XP_P_DTYPE, offsetof(xp_route_scale_bwd_args, act)},
};

/* ---- check ---- */

static int wants(const void *args, int operand) {
    const xp_dialect *d = ((const xp_route_args *)args)->dialect;
    if (!d)
        return 0;
    return operand == BIAS      ? d->select_bias
           : operand == SCALE_E ? d->expert_scale != XP_FACTOR_NONE
           : operand == GAMMA   ? d->shared_rows > 0
                                : (operand == TOKEN || operand == TABLE) && d->select_on == XP_ON_TOKEN_TABLE;
}

static int bwd_wants(const void *args, int operand) {
    const xp_dialect *d = ((const xp_route_bwd_args *)args)->dialect;
    if (!d)
        return 0;
    return operand == BWD_LOGITS    ? xp_ref_routing_wants_logits(d)
           : operand == BWD_SCALE_E ? d->expert_scale != XP_FACTOR_NONE
           : operand == BWD_DGAMMA  ? d->shared_rows > 0
                                    : operand == BWD_BIAS && d->masked_weight && d->select_bias;
}

static int scale_wants(const void *args, int operand) {
    const xp_dialect *d = ((const xp_route_scale_bwd_args *)args)->dialect;
    if (!d)
        return 0;
    return operand == SCALE_LOGITS   ? xp_ref_routing_wants_logits(d) || d->score_dtype == XP_WIDE_ACT
           : operand == SCALE_DGAMMA ? d->shared_rows > 0
                                     : operand == SCALE_BIAS && d->masked_weight && d->select_bias;
}

static int64_t routed_of(const xp_dialect *d, int64_t Z) {
    return Z - d->shared_rows;
}

/* of_shared, of_factors: the operand's dimension that is A, or W. */
static xp_status dialect_check(const char *stage, const xp_dialect *d, const xp_ref_dims *dims, xp_dtype act,
                               const char *of_shared, const char *of_factors) {
    const int64_t Z = XP_REF_DIM(*dims, 'Z'), K = XP_REF_DIM(*dims, 'K');
    if (!d)
        return XP_FAIL(XP_E_ARG, "%s: dialect is absent, expected a record", stage);
    const int64_t E = routed_of(d, Z), A = XP_REF_DIM(*dims, 'A'), factors = XP_REF_DIM(*dims, 'W');
    if (K < 1 || K > E)
        return XP_FAIL(XP_E_ARG, "%s: idx dim 1 is %lld, but E is %lld (K must be in 1..E)", stage, (long long)K,
                       (long long)E);
    if (d->shared_rows > 0 && A >= 0 && A != d->shared_rows)
        return XP_FAIL(XP_E_ARG, "%s: %s is %lld, expected A = %d: dialect %s has shared_rows %d", stage, of_shared,
                       (long long)A, d->shared_rows, d->name ? d->name : "?", d->shared_rows);
    if (factors >= 0 && factors != (d->expert_scale == XP_FACTOR_ONE ? 1 : Z))
        return XP_FAIL(XP_E_ARG, "%s: %s is %lld, expected W = %lld: dialect %s has expert_scale %s", stage, of_factors,
                       (long long)factors, d->expert_scale == XP_FACTOR_ONE ? 1LL : (long long)Z,
                       d->name ? d->name : "?", d->expert_scale == XP_FACTOR_ONE ? "one" : "not one");
    if (d->score_dtype == XP_WIDE_ACT && d->logits_dtype != XP_WIDE_ACT && !(XP_DT_ACT & XP_BIT(act)))
        return XP_FAIL(XP_E_ARG, "%s: act is %s, expected f64, f32, bf16 or f16: dialect %s has score_dtype act", stage,
                       xp_dtype_name(act), d->name ? d->name : "?");
    return xp_dialect_check(d, Z - d->null_experts - d->shared_rows, K);
}

/* Ids that a choice is made of. */
static xp_status choice_check(const char *stage, const xp_dialect *d, const char *name, const xp_tensor *ids,
                              int64_t Z) {
    return xp_ref_ids_check(stage, name, ids, 0, routed_of(d, Z), "E");
}

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_route, args, &d));
    XP_TRY(dialect_check("route", a->dialect, &d, a->act, "gamma dim 1", "scale_e dim 0"));
    XP_TRY(xp_ref_wanted_check(&xp_stage_route, args, a->dialect, 0));
    if (a->replay != 0 && a->replay != 1)
        return XP_FAIL(XP_E_ARG, "route: replay is %d, expected 0 or 1", a->replay);
    if (a->table.data) {
        XP_TRY(xp_ref_ids_check("route", "token", &a->token, 0, XP_REF_DIM(d, 'V'), "V"));
        XP_TRY(choice_check("route", a->dialect, "table", &a->table, XP_REF_DIM(d, 'Z')));
    }
    return a->replay ? choice_check("route", a->dialect, "idx", &a->idx, XP_REF_DIM(d, 'Z')) : XP_OK;
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_bwd_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_route_bwd, args, &d));
    XP_TRY(dialect_check("route_bwd", a->dialect, &d, a->act, "dgamma dim 1", "scale_e dim 0"));
    XP_TRY(xp_ref_wanted_check(&xp_stage_route_bwd, args, a->dialect,
                               XP_BIT(BWD_DAUX) | XP_BIT(BWD_LOGITS) | XP_BIT(BWD_BIAS)));
    return choice_check("route_bwd", a->dialect, "idx", &a->idx, XP_REF_DIM(d, 'Z'));
}

static xp_status scale_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_route_scale_bwd_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_route_scale_bwd, args, &d));
    XP_TRY(dialect_check("route_scale_bwd", a->dialect, &d, a->act, "dgamma dim 1", "dscale dim 1"));
    XP_TRY(xp_ref_wanted_check(&xp_stage_route_scale_bwd, args, a->dialect, XP_BIT(SCALE_LOGITS) | XP_BIT(SCALE_BIAS)));
    XP_TRY(xp_ref_blocks_check("route_scale_bwd", a->token0, a->block, XP_REF_DIM(d, 'T')));
    const int64_t B = xp_ref_blocks(a->token0, a->block, XP_REF_DIM(d, 'T'));
    if (XP_REF_DIM(d, 'B') != B)
        return XP_FAIL(XP_E_ARG, "route_scale_bwd: dscale dim 0 is %lld, expected B = %lld blocks from token0 %lld",
                       (long long)XP_REF_DIM(d, 'B'), (long long)B, (long long)a->token0);
    return choice_check("route_scale_bwd", a->dialect, "idx", &a->idx, XP_REF_DIM(d, 'Z'));
}

/* ---- cost ---- */

/* Softmax: subtract, exp, add, divide; one comparison a score, a sum and a division a slot. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_route_args *a = args;
    const double T = (double)a->idx.dim[0], E = (double)a->scores.dim[1];
    const double K = (double)(a->idx.dim[1] + a->dialect->shared_rows);
    *out = (xp_cost){.flop = T * (5.0 * E + 2.0 * K), .mem_bytes = xp_ref_bytes(&xp_stage_route, args)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_route_bwd_args *a = args;
    const double T = (double)a->idx.dim[0], E = (double)a->scores.dim[1];
    const double K = (double)(a->idx.dim[1] + a->dialect->shared_rows);
    *out = (xp_cost){.flop = T * ((a->daux.data ? 3.0 : 2.0) * E + 8.0 * K),
                     .mem_bytes = xp_ref_bytes(&xp_stage_route_bwd, args)};
}

static void scale_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_route_scale_bwd_args *a = args;
    *out = (xp_cost){.flop = 5.0 * (double)(a->idx.dim[0] * (a->idx.dim[1] + a->dialect->shared_rows)),
                     .mem_bytes = xp_ref_bytes(&xp_stage_route_scale_bwd, args)};
}

/* ---- rows ---- */

static size_t plan(const xp_route_args *a, int bounds, void *ws, xp_ref_routing *r) {
    const int64_t Z = a->logits.dim[1], K = a->idx.dim[1];
    xp_ref_layout l = {ws, 0};
    xp_ref_routing_plan(&l, a->dialect, Z, K, a->logits.dtype, a->act, xp_ref_op(a->logits.dtype), bounds, r);
    r->bias = xp_ref_take_widened(&l, &a->bias);
    r->scale_e = xp_ref_take_widened(&l, &a->scale_e);
    return l.bytes;
}

/* bounds: the errors of what is made again of the logits. Keys have none: the stored scores are operands. */
static size_t bwd_plan(const xp_route_bwd_args *a, int bounds, void *ws, xp_ref_routing *r, double **out_dw,
                       double **out_g) {
    const int64_t Z = a->scores.dim[1], K = a->idx.dim[1];
    const xp_tensor *const all[] = {&a->scores, &a->dw, &a->daux, &a->dlogits};
    xp_ref_layout l = {ws, 0};
    /* A judge's dlogits are f64 whatever the logits were. */
    const xp_dtype logits = a->logits.data ? a->logits.dtype : a->dlogits.dtype;
    xp_ref_routing_plan(&l, a->dialect, Z, K, logits, a->act, xp_ref_op_of(all, 4), bounds, r);
    r->key_e = r->gscore_e = NULL;
    r->bias = xp_ref_take_widened(&l, &a->bias);
    r->scale_e = xp_ref_take_widened(&l, &a->scale_e);
    *out_dw = xp_ref_take(&l, (size_t)r->K * sizeof(double));
    *out_g = xp_ref_take(&l, (size_t)Z * sizeof(double));
    return l.bytes;
}

static size_t scale_plan(const xp_route_scale_bwd_args *a, int bounds, void *ws, xp_ref_routing *r, double **out_dw,
                         double **out_sum, double **out_err) {
    const int64_t Z = a->scores.dim[1], K = a->idx.dim[1];
    const xp_tensor *const all[] = {&a->scores, &a->dw};
    xp_ref_layout l = {ws, 0};
    xp_ref_routing_plan(&l, a->dialect, Z, K, a->logits.data ? a->logits.dtype : a->scores.dtype, a->act,
                        xp_ref_op_of(all, 2), bounds, r);
    r->bias = xp_ref_take_widened(&l, &a->bias);
    r->scale_e = NULL; /* the weights before their factors */
    *out_dw = xp_ref_take(&l, (size_t)r->K * sizeof(double));
    *out_sum = xp_ref_take(&l, (size_t)Z * sizeof(double));
    *out_err = bounds ? xp_ref_take(&l, (size_t)Z * sizeof(double)) : NULL;
    return l.bytes;
}

/* ---- bound ---- */

static size_t bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_routing r;
    return plan(args, 1, NULL, &r);
}

/* Scores: routing.c's error of the last step, then one rounding to the scores' dtype or, with score_dtype act, to the
 * activations'. */
static void scores_bound(const xp_route_args *a, xp_ref_routing *r, int64_t t, xp_tensor *tol) {
    const xp_ref_rule rule = xp_ref_rule_of(a->dialect->score_dtype == XP_WIDE_ACT ? r->act : r->op, r->op);
    xp_ref_out_errors(&rule, r->E, r->score, r->score_e);
    for (int64_t e = 0; e < r->E; e++) {
        if (isnan(r->l[e])) /* 0 by definition */
            r->score_e[e] = 0.0;
    }
    xp_ref_rows_store(tol, t, 1, r->score_e);
}

static const int32_t *slots_at(const xp_ref_routing *r, const xp_tensor *idx, int64_t t) {
    return xp_ref_routing_slots(r, xp_tensor_at(idx, t, 0, 0, 0));
}

/* Scores, then what routing.c says of the weights of the choice, and the rounding to their dtype. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    const xp_route_args *a = args;
    xp_ref_routing r;
    if (operand != SCORES && operand != W && operand != GAMMA)
        return XP_FAIL(XP_E_BUG, "route: operand %d has no bound", operand);
    plan(a, 1, ws, &r);
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        xp_ref_rows_load(&a->logits, t, 1, r.l);
        xp_ref_routing_scores(&r, NULL);
        if (operand == SCORES) {
            scores_bound(a, &r, t, tol);
            continue;
        }
        xp_ref_routing_store(&r, a->scores.dtype);
        xp_ref_routing_keys(&r);
        xp_ref_routing_weights(&r, slots_at(&r, &a->idx, t));
        const int64_t first = operand == GAMMA ? r.chosen : 0, end = operand == GAMMA ? r.K : r.chosen;
        for (int64_t k = first; k < end; k++) {
            xp_ref_val v = r.w[k];
            v.v = *(const double *)xp_tensor_at(ref, t, k - first, 0, 0);
            *(double *)xp_tensor_at(tol, t, k - first, 0, 0) =
                xp_ref_val_out(v, operand == GAMMA ? a->gamma.dtype : a->w.dtype, r.op);
        }
    }
    return XP_OK;
}

/* What the choice is judged on; a NaN logit ranks last, whatever its bias. A choice by table has no other right answer:
 * its experts' keys are K down to 1, all others' 0. */
static xp_status keys(const void *args, const xp_mesh *m, void *ws, xp_tensor *key, xp_tensor *tol) {
    (void)m;
    const xp_route_args *a = args;
    xp_ref_routing r;
    plan(a, 1, ws, &r);
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        if (a->table.data) {
            memset(r.key, 0, (size_t)r.E * sizeof *r.key);
            memset(r.key_e, 0, (size_t)r.E * sizeof *r.key_e);
            for (int64_t k = 0; k < r.chosen; k++)
                r.key[xp_ref_i32(&a->table, xp_ref_i32(&a->token, t, 0), k)] = (double)(r.chosen - k);
        } else {
            xp_ref_rows_load(&a->logits, t, 1, r.l);
            xp_ref_routing_scores(&r, NULL);
            xp_ref_routing_store(&r, a->scores.dtype);
            xp_ref_routing_keys(&r);
            for (int64_t e = 0; e < r.routed; e++)
                r.key[e] = isnan(r.l[e]) ? r.l[e] : r.key[e];
        }
        xp_ref_rows_store(key, t, 1, r.key);
        xp_ref_rows_store(tol, t, 1, r.key_e);
    }
    return XP_OK;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_routing r;
    double *dw, *g;
    return bwd_plan(args, 0, NULL, &r, &dw, &g);
}

static size_t bwd_bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_routing r;
    double *dw, *g;
    return bwd_plan(args, 1, NULL, &r, &dw, &g);
}

/* What the forward left of token t: the scores as stored, which have no error, logits and groups where they are needed.
 */
static void bwd_load(const xp_route_bwd_args *a, xp_ref_routing *r, int64_t t, double *dw) {
    if (a->logits.data) {
        xp_ref_rows_load(&a->logits, t, 1, r->l);
        xp_ref_routing_scores(r, NULL);
    } else {
        memset(r->l, 0, (size_t)r->E * sizeof *r->l);
        if (r->seen_e)
            memset(r->seen_e, 0, (size_t)r->E * sizeof *r->seen_e);
    }
    if (r->score_e)
        memset(r->score_e, 0, (size_t)r->E * sizeof *r->score_e);
    xp_ref_rows_load(&a->scores, t, 1, r->score);
    xp_ref_rows_load(&a->dw, t, 1, dw);
    for (int64_t k = 0; k < r->chosen; k++) {
        if (xp_ref_routing_skips(r, xp_ref_i32(&a->idx, t, k)))
            dw[k] = 0.0;
    }
    if (a->dgamma.data)
        xp_ref_rows_load(&a->dgamma, t, 1, dw + r->chosen);
    if (a->dialect->masked_weight)
        xp_ref_routing_keys(r);
}

/* 1: a weight's gradient that is no number reaches every logit of its token, as an infinity or, minus another one, as a
 * NaN: orders of operations differ in that. */
static int spreads_infinity(const xp_ref_routing *r, const double *dw) {
    const xp_dialect *d = r->d;
    const int alone =
        (d->score == XP_SCORE_SIGMOID || d->score == XP_SCORE_SQRT_SOFTPLUS) && d->renorm == XP_RENORM_NONE;
    int found = 0;
    for (int64_t k = 0; k < r->K; k++)
        found |= !isfinite(dw[k]);
    return found && !alone;
}

/* Gauge and units of routing.c; |daux| is one term more. Then one rounding. */
static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    const xp_route_bwd_args *a = args;
    xp_ref_routing r;
    double *dw, *e;
    if (operand != BWD_DLOGITS)
        return XP_FAIL(XP_E_BUG, "route_bwd: operand %d has no bound", operand);
    bwd_plan(a, 1, ws, &r, &dw, &e);
    const xp_ref_rule rule = xp_ref_rule_of(a->dlogits.dtype, r.op);
    for (int64_t t = 0; t < a->scores.dim[0]; t++) {
        bwd_load(a, &r, t, dw);
        const int fits = xp_ref_routing_back_gauge(&r, slots_at(&r, &a->idx, t), dw, e);
        for (int64_t i = 0; a->daux.data && i < r.E; i++)
            e[i] += fabs(xp_widen(xp_tensor_at(&a->daux, t, i, 0, 0), a->daux.dtype, 0));
        xp_ref_routing_back_errors(&r, fits, e);
        xp_ref_rows_load(ref, t, 1, r.score);
        const int open = spreads_infinity(&r, dw);
        for (int64_t i = 0; i < r.E; i++) {
            const xp_ref_val v = {r.score[i], e[i]};
            const int any = isnan(e[i]) || (open && isinf(e[i]));
            e[i] = !any ? xp_ref_rule_out(&rule, v) : isfinite(v.v) ? (double)INFINITY : (double)NAN;
        }
        xp_ref_rows_store(tol, t, 1, e);
    }
    return XP_OK;
}

static size_t scale_bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_routing r;
    double *dw, *sum, *err;
    return scale_plan(args, 1, NULL, &r, &dw, &sum, &err);
}

/* The weights of token t before their factors, from what the forward left. Its scores are operands: without error. */
static void scale_load(const xp_route_scale_bwd_args *a, xp_ref_routing *r, int64_t t, double *dw) {
    const xp_route_bwd_args b = {.scores = a->scores,
                                 .idx = a->idx,
                                 .dw = a->dw,
                                 .dialect = a->dialect,
                                 .logits = a->logits,
                                 .bias = a->bias,
                                 .dgamma = a->dgamma};
    bwd_load(&b, r, t, dw);
    xp_ref_routing_weights(r, slots_at(r, &a->idx, t));
}

/* Where slot k's part of a gradient of factors goes. */
static int64_t factor_of(const xp_ref_routing *r, const int32_t *slots, int64_t k) {
    return r->d->expert_scale == XP_FACTOR_ONE ? 0 : slots[k];
}

/* A sum of at most n = tokens x K products: gamma(n + 2) of the sum of |dw| (|w'| + e), which is what a partial sum may
 * reach, and |dw| e for the error e of a weight. */
static xp_status scale_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                             xp_tensor *tol) {
    (void)m;
    const xp_route_scale_bwd_args *a = args;
    xp_ref_routing r;
    double *dw, *gauge, *e;
    if (operand != SCALE_DSCALE)
        return XP_FAIL(XP_E_BUG, "route_scale_bwd: operand %d has no bound", operand);
    scale_plan(a, 1, ws, &r, &dw, &gauge, &e);
    const xp_ref_rule rule = xp_ref_rule_of(a->dscale.dtype, r.op);
    for (int64_t b = 0; b < a->dscale.dim[0]; b++) {
        int64_t lo, hi;
        xp_ref_block_tokens(a->token0, a->block, a->scores.dim[0], b, &lo, &hi);
        memset(gauge, 0, (size_t)r.E * sizeof *gauge);
        memset(e, 0, (size_t)r.E * sizeof *e);
        for (int64_t t = lo; t < hi; t++) {
            scale_load(a, &r, t, dw);
            const int32_t *slots = slots_at(&r, &a->idx, t);
            for (int64_t k = 0; k < r.K; k++) {
                const int64_t to = factor_of(&r, slots, k);
                gauge[to] += fabs(dw[k]) * (fabs(r.w[k].v) + r.w[k].e);
                e[to] += fabs(dw[k]) * r.w[k].e + 2.0 * xp_ref_least(r.op);
            }
        }
        const double g = xp_ref_both((hi - lo) * r.K + 2, r.op);
        for (int64_t i = 0; i < a->dscale.dim[1]; i++) {
            const double v = *(const double *)xp_tensor_at(ref, b, i, 0, 0);
            const double err = gauge[i] <= xp_ref_largest(r.op) / 4 ? g * gauge[i] + e[i] : (double)INFINITY;
            *(double *)xp_tensor_at(tol, b, i, 0, 0) = xp_ref_rule_out(&rule, (xp_ref_val){v, err});
        }
    }
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_routing r;
    return plan(args, 0, NULL, &r);
}

static void choose(const xp_route_args *a, const xp_ref_routing *r, int64_t t, int32_t *idx) {
    if (!a->table.data) {
        xp_ref_routing_choose(r, idx);
        return;
    }
    for (int64_t k = 0; k < r->chosen; k++)
        idx[k] = xp_ref_i32(&a->table, xp_ref_i32(&a->token, t, 0), k);
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_route_args *a = args;
    xp_ref_routing r;
    plan(a, 0, x->ws, &r);
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        xp_ref_rows_load(&a->logits, t, 1, r.l);
        xp_ref_routing_scores(&r, NULL);
        if (a->scores.dtype == XP_F64)
            xp_ref_rows_store(&a->scores, t, 1, r.score);
        xp_ref_routing_store(&r, a->scores.dtype);
        if (a->scores.dtype != XP_F64)
            xp_ref_rows_store(&a->scores, t, 1, r.score);
        xp_ref_routing_keys(&r);
        if (!a->replay)
            choose(a, &r, t, idx);
        xp_ref_routing_weights(&r, xp_ref_routing_slots(&r, idx));
        for (int64_t k = 0; k < r.chosen; k++)
            xp_ref_store(xp_tensor_at(&a->w, t, k, 0, 0), a->w.dtype, 0, r.w[k].v);
        for (int64_t k = r.chosen; k < r.K; k++)
            xp_ref_store(xp_tensor_at(&a->gamma, t, k - r.chosen, 0, 0), a->gamma.dtype, 0, r.w[k].v);
    }
    return XP_OK;
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_route_bwd_args *a = args;
    xp_ref_routing r;
    double *dw, *g;
    bwd_plan(a, 0, x->ws, &r, &dw, &g);
    for (int64_t t = 0; t < a->scores.dim[0]; t++) {
        bwd_load(a, &r, t, dw);
        xp_ref_routing_back(&r, slots_at(&r, &a->idx, t), dw, g);
        for (int64_t e = 0; a->daux.data && e < r.E; e++)
            g[e] += xp_widen(xp_tensor_at(&a->daux, t, e, 0, 0), a->daux.dtype, 0);
        xp_ref_rows_store(&a->dlogits, t, 1, g);
    }
    return XP_OK;
}

static size_t scale_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_routing r;
    double *dw, *sum, *err;
    return scale_plan(args, 0, NULL, &r, &dw, &sum, &err);
}

static xp_status scale_run(const xp_exec *x, const void *args) {
    const xp_route_scale_bwd_args *a = args;
    xp_ref_routing r;
    double *dw, *sum, *err;
    scale_plan(a, 0, x->ws, &r, &dw, &sum, &err);
    for (int64_t b = 0; b < a->dscale.dim[0]; b++) {
        int64_t lo, hi;
        xp_ref_block_tokens(a->token0, a->block, a->scores.dim[0], b, &lo, &hi);
        memset(sum, 0, (size_t)r.E * sizeof *sum);
        for (int64_t t = lo; t < hi; t++) {
            scale_load(a, &r, t, dw);
            const int32_t *slots = slots_at(&r, &a->idx, t);
            for (int64_t k = 0; k < r.K; k++)
                sum[factor_of(&r, slots, k)] += dw[k] * r.w[k].v;
        }
        xp_ref_rows_store(&a->dscale, b, 1, sum);
    }
    return XP_OK;
}

/* ---- data, slices ---- */

static double score_at(const xp_tensor *t, int64_t i, int64_t e) {
    return xp_widen(xp_tensor_at(t, i, e, 0, 0), t->dtype, 0);
}

/* A row of logits becomes its softmax, in place: there is no workspace here, and these need only be legal scores. */
static void fill_scores(const xp_tensor *s, int64_t t) {
    double most = -(double)INFINITY, sum = 0.0;
    for (int64_t e = 0; e < s->dim[1]; e++)
        most = score_at(s, t, e) > most ? score_at(s, t, e) : most;
    for (int64_t e = 0; e < s->dim[1]; e++) {
        const double l = score_at(s, t, e);
        xp_ref_store(xp_tensor_at(s, t, e, 0, 0), s->dtype, 0, isnan(l) ? 0.0 : xp_ref_exp(l - most));
        sum += score_at(s, t, e);
    }
    for (int64_t e = 0; e < s->dim[1]; e++)
        xp_ref_store(xp_tensor_at(s, t, e, 0, 0), s->dtype, 0, score_at(s, t, e) / sum);
}

/* The higher stored score first, then the lower index. */
static int score_before(const xp_tensor *s, int64_t t, int64_t a, int64_t b) {
    const double x = score_at(s, t, a), y = score_at(s, t, b);
    return x > y || (!(x < y) && a < b);
}

/* Scores that are no softmax stand alone: of the logits where there are any, else of the numbers that are there. */
static void fill_single(const xp_route_bwd_args *a, int64_t t) {
    const xp_tensor *const from = a->logits.data ? &a->logits : &a->scores;
    const int act = a->dialect->score_dtype == XP_WIDE_ACT, root = a->dialect->score == XP_SCORE_SQRT_SOFTPLUS;
    const xp_dtype in = a->dialect->logits_dtype == XP_WIDE_ACT ? a->dlogits.dtype : a->act;
    for (int64_t e = 0; e < a->scores.dim[1]; e++) {
        const double l = score_at(from, t, e), v = root ? xp_ref_sqrt(xp_ref_softplus(l)) : xp_ref_sigmoid(l);
        const double s = isnan(l) ? 0.0 : act ? xp_ref_round(v, in) : v;
        xp_ref_store(xp_tensor_at(&a->scores, t, e, 0, 0), a->scores.dtype, 0, s);
    }
}

/* Token ids and replayed choices from the logits' bits; an id's experts from the id: distinct, and the same on every
 * mesh. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    (void)m;
    (void)data;
    const xp_route_args *a = args;
    const uint64_t E = (uint64_t)routed_of(a->dialect, a->logits.dim[1]);
    for (int64_t t = 0; t < a->idx.dim[0] && a->replay; t++) {
        const int64_t Z = a->logits.dim[1];
        const uint64_t word = xp_ref_row_word(xp_tensor_at(&a->logits, t, 0, 0, 0), a->logits.dtype, Z, seed);
        for (int64_t k = 0; k < a->idx.dim[1]; k++)
            *(int32_t *)xp_tensor_at(&a->idx, t, k, 0, 0) = (int32_t)((word % E + (uint64_t)k) % E);
    }
    if (!a->table.data)
        return XP_OK;
    const int64_t V = a->table.dim[0], Z = a->logits.dim[1];
    for (int64_t t = 0; t < a->token.dim[0]; t++) {
        const uint64_t word = xp_ref_row_word(xp_tensor_at(&a->logits, t, 0, 0, 0), a->logits.dtype, Z, seed);
        *(int32_t *)xp_tensor_at(&a->token, t, 0, 0, 0) = (int32_t)(word % (uint64_t)V);
    }
    for (int64_t v = 0; v < V; v++) {
        const uint64_t word = xp_ref_row_word(&v, XP_I64, 1, seed);
        for (int64_t k = 0; k < a->table.dim[1]; k++)
            *(int32_t *)xp_tensor_at(&a->table, v, k, 0, 0) = (int32_t)((word % E + (uint64_t)k) % E);
    }
    return XP_OK;
}

/* A gradient that is not finite, or beyond what dlogits holds, leaves no result that every right order of operations
 * agrees on, sign included. */
static void fill_gradient(const xp_tensor *dw, int64_t t, double most) {
    for (int64_t k = 0; k < dw->dim[1]; k++) {
        const double v = score_at(dw, t, k);
        if (!(fabs(v) <= most))
            xp_ref_store(xp_tensor_at(dw, t, k, 0, 0), dw->dtype, 0, isnan(v) ? 0.0 : copysign(1.0, v));
    }
}

static xp_status bwd_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    (void)m;
    (void)data;
    (void)seed;
    const xp_route_bwd_args *a = args;
    for (int64_t t = 0; t < a->scores.dim[0]; t++) {
        int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        if (a->dialect->score == XP_SCORE_SIGMOID || a->dialect->score == XP_SCORE_SQRT_SOFTPLUS)
            fill_single(a, t);
        else
            fill_scores(&a->scores, t);
        fill_gradient(&a->dw, t, 0.125 * xp_ref_largest(a->dlogits.dtype));
        if (a->dgamma.data)
            fill_gradient(&a->dgamma, t, 0.125 * xp_ref_largest(a->dlogits.dtype));
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            int64_t best = -1;
            for (int64_t e = 0; e < routed_of(a->dialect, a->scores.dim[1]); e++) {
                if ((k == 0 || score_before(&a->scores, t, idx[k - 1], e)) &&
                    (best < 0 || score_before(&a->scores, t, e, best)))
                    best = e;
            }
            idx[k] = (int32_t)best;
        }
    }
    return XP_OK;
}

static xp_status scale_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    const xp_route_scale_bwd_args *a = args;
    const xp_tensor dlogits = {.dtype = a->logits.data ? a->logits.dtype : a->dscale.dtype};
    xp_route_bwd_args b = {.scores = a->scores,
                           .idx = a->idx,
                           .dw = a->dw,
                           .dlogits = dlogits,
                           .dialect = a->dialect,
                           .logits = a->logits,
                           .bias = a->bias,
                           .dgamma = a->dgamma,
                           .act = a->act};
    return bwd_fill(&b, m, data, seed);
}

static int64_t extent(const void *args) {
    return ((const xp_route_args *)args)->logits.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_route_args *a = args;
    xp_route_args *o = out;
    o->logits = xp_tensor_rows(&a->logits, 0, lo, hi);
    o->scores = xp_tensor_rows(&a->scores, 0, lo, hi);
    o->idx = xp_tensor_rows(&a->idx, 0, lo, hi);
    o->w = xp_tensor_rows(&a->w, 0, lo, hi);
    if (a->token.data)
        o->token = xp_tensor_rows(&a->token, 0, lo, hi);
    if (a->gamma.data)
        o->gamma = xp_tensor_rows(&a->gamma, 0, lo, hi);
}

static void replay(void *args, int on) {
    ((xp_route_args *)args)->replay = on != 0;
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_route_bwd_args *)args)->scores.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_route_bwd_args *a = args;
    xp_route_bwd_args *o = out;
    o->scores = xp_tensor_rows(&a->scores, 0, lo, hi);
    o->idx = xp_tensor_rows(&a->idx, 0, lo, hi);
    o->dw = xp_tensor_rows(&a->dw, 0, lo, hi);
    if (a->daux.data)
        o->daux = xp_tensor_rows(&a->daux, 0, lo, hi);
    o->dlogits = xp_tensor_rows(&a->dlogits, 0, lo, hi);
    if (a->logits.data)
        o->logits = xp_tensor_rows(&a->logits, 0, lo, hi);
    if (a->dgamma.data)
        o->dgamma = xp_tensor_rows(&a->dgamma, 0, lo, hi);
}

/* ---- properties ---- */

static double row_sum(const xp_tensor *t, int64_t i) {
    double sum = 0.0;
    for (int64_t j = 0; j < t->dim[1]; j++)
        sum += score_at(t, i, j);
    return sum;
}

static int all_finite(const xp_tensor *t, int64_t i) {
    for (int64_t j = 0; j < t->dim[1]; j++) {
        if (!isfinite(score_at(t, i, j)))
            return 0;
    }
    return 1;
}

static void worse(double residual, double *out) {
    if (!(residual <= *out) && !isnan(*out))
        *out = residual;
}

/* Of a softmax. Scores of finite logits sum to 1: each within gamma of xp_ref_softmax_units, or the smallest normal
 * number, and one rounding; E additions here. */
static xp_status scores_sum_to_one(const void *args, const xp_mesh *m, double *out) {
    (void)m;
    const xp_route_args *a = args;
    const int64_t E = a->scores.dim[1];
    const xp_dtype op = a->scores.dtype;
    const double unit = xp_ref_both(xp_ref_softmax_units(E, op) + 1 + E, op) + (double)E * 2.0 * xp_ref_least(op);
    *out = 0.0;
    const int softmax = a->dialect->score == XP_SCORE_SOFTMAX && a->dialect->score_dtype == XP_WIDE_F32;
    for (int64_t t = 0; softmax && t < a->scores.dim[0]; t++) {
        if (all_finite(&a->logits, t))
            worse(fabs(row_sum(&a->scores, t) - 1.0) / unit, out);
    }
    return XP_OK;
}

/* Renormalised f32 weights, those of shared experts among them, sum to the scale: K roundings of the sum, 8 of the
 * division, twice where it divides, 2 of the scale, 8 of a division by K; each weight is then rounded to its dtype. A
 * choice without a score above 0 has no weights. */
static xp_status weights_sum_to_one(const void *args, const xp_mesh *m, double *out) {
    (void)m;
    const xp_route_args *a = args;
    const xp_dialect *d = a->dialect;
    const int64_t K = a->idx.dim[1] + d->shared_rows, E = routed_of(d, a->scores.dim[1]);
    const int skips = d->null_experts > 0 && d->null_kind == XP_NULL_SKIP;
    const int sums =
        d->renorm == XP_RENORM_SUM && d->score_dtype == XP_WIDE_F32 && !d->expert_scale && !d->masked_weight && !skips;
    const double g = xp_ref_both(3 * K + (d->weight_div_k ? 18 : 10), a->scores.dtype);
    const double K_least = (double)K * xp_ref_room(a->w.dtype, 0.0);
    const double unit = g + xp_ref_unit(a->w.dtype) * (1.0 + g) + K_least + (double)K * xp_ref_least(a->scores.dtype);
    const double scale = xp_dialect_weight_factor(d, a->idx.dim[1]);
    *out = 0.0;
    for (int64_t t = 0; sums && t < a->w.dim[0]; t++) {
        const int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        double chosen = 0.0;
        for (int64_t k = 0; k < K; k++)
            chosen += score_at(&a->scores, t, k < a->idx.dim[1] ? idx[k] : E + k - a->idx.dim[1]);
        const double sum = row_sum(&a->w, t) + (a->gamma.data ? row_sum(&a->gamma, t) : 0.0);
        if (all_finite(&a->logits, t) && chosen > 0.0)
            worse(fabs(sum / scale - 1.0) / unit, out);
    }
    return XP_OK;
}

static const xp_property properties[] = {
    {"scores_sum_to_one", scores_sum_to_one},
    {"weights_sum_to_one", weights_sum_to_one},
};

/* ---- stages and rows ---- */

const xp_stage xp_stage_route = {
    .name = "route",
    .meaning = "K experts a token, lower index first among equals, and their weights, as the dialect says",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_route_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = bound_workspace,
    .fill = fill,
    .extent = extent,
    .slice = slice,
    .replay = replay,
    .keys = keys,
    .scores = "scores",
    .wants = wants,
    .property = properties,
    .properties = sizeof properties / sizeof *properties,
};

const xp_stage xp_stage_route_bwd = {
    .name = "route_bwd",
    .meaning = "gradient of the logits through weights, their division and the scores, plus the balance losses'",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_route_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .param = bwd_params,
    .params = sizeof bwd_params / sizeof *bwd_params,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_bound_workspace,
    .fill = bwd_fill,
    .extent = bwd_extent,
    .slice = bwd_slice,
    .wants = bwd_wants,
};

const xp_stage xp_stage_route_scale_bwd = {
    .name = "route_scale_bwd",
    .meaning = "gradient of the factors of the experts' weights, for each block of tokens",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_route_scale_bwd_args),
    .operand = scale_operands,
    .operands = sizeof scale_operands / sizeof *scale_operands,
    .param = scale_params,
    .params = sizeof scale_params / sizeof *scale_params,
    .check = scale_check,
    .cost = scale_cost,
    .bound = scale_bound,
    .bound_workspace = scale_bound_workspace,
    .fill = scale_fill,
    .wants = scale_wants,
};

const xp_kernel xp_ref_route = {
    .stage = &xp_stage_route,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_route_bwd = {
    .stage = &xp_stage_route_bwd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = bwd_workspace,
    .run = bwd_run,
};

const xp_kernel xp_ref_route_scale_bwd = {
    .stage = &xp_stage_route_scale_bwd,
    .name = "ref",
    .det = XP_DET_RUN,
    .workspace = scale_workspace,
    .run = scale_run,
};
