/* Two dialects on the same numbers: see apart.h.
 *
 * The numbers are small multiples of powers of two, so that logits are exact before their rounding and a bound is as
 * narrow as the arithmetic behind it. The cases differ in where they put the numbers: a record that adds 1e-20 to a sum
 * is only told from one that does not where sums vanish, a limit only where something exceeds it. */
#include "apart.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fill.h"
#include "registry.h"
#include "xp/balance.h"
#include "xp/capacity.h"
#include "xp/moe.h"
#include "xp/permute.h"
#include "xp/route.h"
#include "xp/router.h"

enum { T = 24, E = 16, NULLS = 16, MOST = 3, H = 32, F = 16, S = 8, V = 8, BLOCKS = 160 };

/* Steps of x, of the router's rows and of the experts' weights, which are up to 8 of them; offset is added to every
 * logit, bias to every selection bias. */
static const struct {
    double x, router, offset, bias, expert;
} places[XP_APART_CASES] = {
    {0.125, 1.0 / 64, 0, 0, 1.0 / 16},      /* ordinary */
    {0.125, 1.0 / 64, -60, -0.5, 1.0 / 16}, /* sigmoids far below every eps, keys below 0 */
    {0.125, 1.0 / 64, -160, 0, 1.0 / 16},   /* sigmoids that are 0 in f32 */
    {0.125, 8, 0, 0, 1.0 / 16},             /* saturated */
    {0.125, 512, 0, 0, 1.0 / 16},           /* softmax of one expert, the others 0 even in f64 */
    {1.0, 1.0 / 512, 0, 0, 1.0 / 4}         /* beyond every limit of an activation */
};

char xp_apart_letter(xp_apart a) {
    return "-cwpybr"[a];
}

const char *xp_apart_name(xp_apart a) {
    static const char *const name[] = {"nothing", "choice", "weight", "places", "output", "balance", "rounding"};
    return name[a];
}

/* ---- memory and rows ---- */

typedef struct {
    void *block[BLOCKS];
    int blocks;
    int failed;
    xp_comm alone;
    xp_mesh mesh; /* of one rank: none of these stages sends anything */
    int place;
    int64_t k; /* slots a token: the sparsemixer has two */
} bench;

static void *take(bench *b, size_t bytes) {
    void *p = b->blocks < BLOCKS ? aligned_alloc(64, (bytes + 64) / 64 * 64) : NULL;
    if (p)
        b->block[b->blocks++] = p;
    else
        b->failed = 1;
    return p;
}

static xp_tensor tensor(bench *b, xp_dtype d, int ndim, int64_t n0, int64_t n1, int64_t n2) {
    const int64_t dim[] = {n0, n1, n2};
    return xp_tensor_of(take(b, xp_dtype_bytes(d, n0 * n1 * n2)), d, ndim, dim);
}

static const xp_kernel *row_of(const xp_stage *s) {
    for (const xp_kernel *const *k = xp_backend_ref()->kernel; *k; k++) {
        if ((*k)->stage == s)
            return *k;
    }
    return NULL;
}

static xp_status run_as_judge(bench *b, const xp_stage *s, const void *args) {
    const xp_kernel *k = row_of(s);
    if (!k || b->failed)
        return b->failed ? XP_FAIL(XP_E_NOMEM, "selftest: %s", s->name)
                         : XP_FAIL(XP_E_BUG, "selftest: %s has no row", s->name);
    const size_t bytes = k->workspace ? k->workspace(args, &b->mesh) : 0;
    const xp_exec x = {.mesh = &b->mesh, .ws = take(b, bytes), .ws_bytes = bytes};
    return b->failed ? XP_FAIL(XP_E_NOMEM, "selftest: %s: %zu bytes", s->name, bytes) : k->run(&x, args);
}

static xp_status run(bench *b, const xp_stage *s, const void *args) {
    if (!b->failed)
        XP_TRY(s->check(args, &b->mesh));
    return run_as_judge(b, s, args);
}

static double value(const xp_tensor *t, int64_t i) {
    return xp_widen(t->data, t->dtype, xp_tensor_offset(t, i));
}

/* Multiples of step up to 8 of them. The same name gives the same numbers whatever the dtype. */
static xp_tensor numbers(bench *b, xp_dtype d, const char *name, double step, int ndim, int64_t n0, int64_t n1,
                         int64_t n2) {
    const xp_tensor t = tensor(b, d, ndim, n0, n1, n2);
    for (int64_t i = 0; t.data && i < xp_tensor_count(&t); i++)
        xp_fill_store(&t, i, (floor(xp_rng_uniform(1, xp_rng_stream(name), (uint64_t)i) * 17.0) - 8.0) * step);
    return t;
}

/* ---- one record's routing ---- */

typedef struct {
    const xp_dialect *d;
    int64_t experts, ids; /* rows of the router; those that a choice is made of: with null experts, without shared */
    xp_tensor x, router, rbias, bias, scale_e, logits;
    xp_route_args route;
} side;

static xp_dtype wide(xp_wide rule) {
    return rule == XP_WIDE_ACT ? XP_BF16 : XP_F32;
}

static xp_status routed(bench *b, const xp_dialect *d, side *out) {
    const double offset = places[b->place].offset;
    memset(out, 0, sizeof *out);
    if (d->null_experts > NULLS)
        return XP_FAIL(XP_E_ARG, "null_experts: %d, expected at most %d", d->null_experts, NULLS);
    out->d = d;
    out->experts = xp_dialect_rows(d, E);
    out->ids = out->experts - d->shared_rows;
    out->x = numbers(b, XP_BF16, "x", places[b->place].x, 2, T, H, 1);
    out->router = numbers(b, XP_BF16, "router", places[b->place].router, 2, out->experts, H, 1);
    for (int64_t t = 0; out->x.data && t < T; t++)
        xp_fill_store(&out->x, t * H, 1.0);
    for (int64_t e = 0; out->router.data && e < out->experts; e++)
        xp_fill_store(&out->router, e * H, offset + 0.5 * value(&out->router, e * H));
    out->logits = tensor(b, wide(d->logits_dtype), 2, T, out->experts, 1);
    if (d->router_bias)
        out->rbias = numbers(b, XP_BF16, "router bias", 1.0 / 16, 1, out->experts, 1, 1);
    if (d->select_bias)
        out->bias = numbers(b, XP_F32, "selection bias", 1.0 / 32, 1, out->experts, 1, 1);
    for (int64_t e = 0; out->bias.data && e < out->experts; e++)
        xp_fill_store(&out->bias, e,
                      value(&out->bias, e) + places[b->place].bias + (double)(e * e) / 4096); /* no ties */
    if (d->expert_scale)
        out->scale_e = numbers(b, XP_F32, "expert scale", 1.0 / 4, 1, xp_dialect_factors(d, E), 1, 1);
    const xp_router_args gate = {.x = out->x, .w = out->router, .bias = out->rbias, .logits = out->logits};
    XP_TRY(run(b, &xp_stage_router, &gate));
    out->route = (xp_route_args){.logits = out->logits,
                                 .bias = out->bias,
                                 .scores = tensor(b, XP_F32, 2, T, out->experts, 1),
                                 .idx = tensor(b, XP_I32, 2, T, b->k, 1),
                                 .w = tensor(b, wide(d->weight_dtype), 2, T, b->k, 1),
                                 .dialect = d,
                                 .scale_e = out->scale_e,
                                 .act = XP_BF16};
    if (d->shared_rows > 0)
        out->route.gamma = tensor(b, wide(d->weight_dtype), 2, T, d->shared_rows, 1);
    if (d->select_on == XP_ON_TOKEN_TABLE) {
        out->route.token = tensor(b, XP_I32, 1, T, 1, 1);
        out->route.table = tensor(b, XP_I32, 2, V, b->k, 1);
        for (int64_t i = 0; !b->failed && i < T; i++)
            *(int32_t *)xp_tensor_at(&out->route.token, i, 0, 0, 0) = (int32_t)(i % V);
        for (int64_t i = 0; !b->failed && i < V * b->k; i++)
            *(int32_t *)xp_tensor_at(&out->route.table, i / b->k, i % b->k, 0, 0) = (int32_t)(5 * i % E);
    }
    return run(b, &xp_stage_route, &out->route);
}

static int32_t expert_of(const xp_tensor *idx, int64_t t, int64_t k) {
    return *(const int32_t *)xp_tensor_at(idx, t, k, 0, 0);
}

/* ---- choice ---- */

/* 1: an expert that `idx` leaves out beats one of its choice by more than both tolerances. */
static int choice_refused(const xp_tensor *key, const xp_tensor *tol, int64_t ids, const xp_tensor *idx, int64_t t) {
    const int64_t experts = key->dim[1], k_n = idx->dim[1];
    for (int64_t k = 0; k < k_n; k++) {
        const int64_t mine = expert_of(idx, t, k);
        if (mine >= ids)
            return 1;
        for (int64_t e = 0; e < ids; e++) {
            const double gap = value(key, t * experts + e) - value(key, t * experts + mine);
            int64_t slot = 0;
            while (slot < k_n && expert_of(idx, t, slot) != e)
                slot++;
            if (slot == k_n && gap > value(tol, t * experts + e) + value(tol, t * experts + mine))
                return 1;
        }
    }
    return 0;
}

/* A table decides alone; everything else goes by the stage's keys. */
static xp_status choice_apart(bench *b, const side *right, const side *wrong, int *out) {
    xp_tensor keys = tensor(b, XP_F64, 2, T, right->experts, 1), tol = tensor(b, XP_F64, 2, T, right->experts, 1);
    void *ws = take(b, xp_stage_route.bound_workspace(&right->route, &b->mesh));
    *out = 0;
    if (b->failed)
        return XP_FAIL(XP_E_NOMEM, "selftest: keys");
    XP_TRY(xp_stage_route.keys(&right->route, &b->mesh, ws, &keys, &tol));
    for (int64_t t = 0; t < T && !*out; t++)
        *out = choice_refused(&keys, &tol, right->ids, &wrong->route.idx, t);
    return XP_OK;
}

/* ---- values ---- */

/* 1: an element of got lies outside the tolerance around ref. */
static int outside(const xp_tensor *got, const xp_tensor *ref, const xp_tensor *tol) {
    for (int64_t i = 0; i < xp_tensor_count(ref); i++) {
        const double g = value(got, i), r = value(ref, i);
        if (isnan(g) != isnan(r) || (!isnan(r) && g != r && !(fabs(g - r) <= value(tol, i))))
            return 1;
    }
    return 0;
}

/* Output `name` of a stage: `wrong` as it is, `right` with that output in f64, judged by the stage's bound. */
static xp_status judged(bench *b, const xp_stage *s, void *right, void *wrong, const char *name, int *out) {
    const int i = xp_stage_operand(s, name);
    xp_tensor *mine = xp_stage_tensor(s, right, i);
    const xp_tensor typed = *mine;
    XP_TRY(run(b, s, wrong));
    *mine = xp_tensor_of(take(b, sizeof(double) * (size_t)xp_tensor_count(&typed)), XP_F64, typed.ndim, typed.dim);
    const xp_tensor ref = *mine;
    xp_tensor tol =
        xp_tensor_of(take(b, sizeof(double) * (size_t)xp_tensor_count(&typed)), XP_F64, typed.ndim, typed.dim);
    XP_TRY(run_as_judge(b, s, right)); /* the typed call is known to be good: its outputs alone may be f64 */
    *mine = typed;
    void *ws = take(b, s->bound_workspace(right, &b->mesh));
    if (b->failed)
        return XP_FAIL(XP_E_NOMEM, "selftest: bound of %s", name);
    XP_TRY(s->bound(right, &b->mesh, i, &ref, ws, &tol));
    *out = outside(xp_stage_ctensor(s, wrong, i), &ref, &tol);
    return XP_OK;
}

/* Both with the choice of the one that has fewer ids. */
static const xp_tensor *common_choice(const side *a, const side *b) {
    return a->ids <= b->ids ? &a->route.idx : &b->route.idx;
}

static xp_status weight_apart(bench *b, const side *right, const side *wrong, int *out) {
    xp_route_args r = right->route, w = wrong->route;
    r.idx = w.idx = *common_choice(right, wrong);
    r.replay = w.replay = 1;
    return judged(b, &xp_stage_route, &r, &w, "w", out);
}

/* Stages capacity and permute of record d, on the choice and the weights of `s`. */
static xp_status placed(bench *b, const side *s, const xp_tensor *idx, const xp_dialect *d, xp_tensor *out_kept,
                        xp_tensor *out_offsets) {
    const int64_t least = d->pad_to_capacity ? xp_dialect_capacity(d, T, E, b->k) : 0;
    const int64_t rows = T * b->k + E * least;
    *out_kept = tensor(b, XP_I32, 2, T, b->k, 1);
    *out_offsets = tensor(b, XP_I64, 1, E + 1, 1, 1);
    const xp_capacity_args take_slots = {
        .idx = *idx, .w = s->route.w, .kept = *out_kept, .dropped = tensor(b, XP_I64, 1, E, 1, 1), .dialect = d};
    XP_TRY(run(b, &xp_stage_capacity, &take_slots));
    xp_permute_args place = {.x = s->x,
                             .idx = *out_kept,
                             .rows = tensor(b, XP_BF16, 2, rows, H, 1),
                             .tok = tensor(b, XP_I64, 1, rows, 1, 1),
                             .src = tensor(b, XP_I32, 1, rows, 1, 1),
                             .pos = tensor(b, XP_I32, 2, T, b->k, 1),
                             .counts = tensor(b, XP_I64, 1, E, 1, 1),
                             .offsets = *out_offsets,
                             .align = 1,
                             .dialect = d,
                             .least = least};
    if (d->weight_at == XP_AT_INPUT)
        place.w = s->route.w;
    return run(b, &xp_stage_permute, &place);
}

static xp_status places_apart(bench *b, const side *right, const side *wrong, int *out) {
    const xp_tensor *idx = common_choice(right, wrong);
    xp_tensor kept[2], offsets[2];
    XP_TRY(placed(b, right, idx, right->d, &kept[0], &offsets[0]));
    XP_TRY(placed(b, right, idx, wrong->d, &kept[1], &offsets[1]));
    *out = memcmp(kept[0].data, kept[1].data, xp_dtype_bytes(XP_I32, T * b->k)) != 0 ||
           memcmp(offsets[0].data, offsets[1].data, xp_dtype_bytes(XP_I64, E + 1)) != 0;
    return XP_OK;
}

static xp_moe_args block_of(bench *b, const side *s, const xp_tensor *idx) {
    const int64_t U = s->d->gated ? 2 * F : F, X = s->d->gated ? 2 * S : S;
    const double step = places[b->place].expert;
    const xp_dialect *d = s->d;
    xp_moe_args a = {.x = s->x,
                     .dy = numbers(b, XP_BF16, "dy", 0.125, 2, T, H, 1),
                     .wr = s->router,
                     .w1 = numbers(b, XP_BF16, "w1", step, 3, E, U, H),
                     .w2 = numbers(b, XP_BF16, "w2", step, 3, E, H, F),
                     .sw1 = numbers(b, XP_BF16, "sw1", step, 2, X, H, 1),
                     .sw2 = numbers(b, XP_BF16, "sw2", step, 2, H, S, 1),
                     .idx = *idx,
                     .y = tensor(b, XP_BF16, 2, T, H, 1),
                     .dx = tensor(b, XP_BF16, 2, T, H, 1),
                     .dwr = tensor(b, XP_BF16, 2, s->experts, H, 1),
                     .dw1 = tensor(b, XP_BF16, 3, E, U, H),
                     .dw2 = tensor(b, XP_BF16, 3, E, H, F),
                     .dsw1 = tensor(b, XP_BF16, 2, X, H, 1),
                     .dsw2 = tensor(b, XP_BF16, 2, H, S, 1),
                     .dialect = d,
                     .rbias = s->rbias,
                     .scale_e = s->scale_e};
    if (d->shared_gate) {
        a.sgate = numbers(b, XP_BF16, "sgate", step, 2, 1, H, 1);
        a.dsgate = tensor(b, XP_BF16, 2, 1, H, 1);
    }
    if (d->masked_weight && d->select_bias)
        a.bias = s->bias;
    if (d->router_bias)
        a.drbias = tensor(b, XP_BF16, 1, s->experts, 1, 1);
    if (d->expert_bias) {
        a.b1 = numbers(b, XP_BF16, "b1", step, 2, E, U, 1);
        a.b2 = numbers(b, XP_BF16, "b2", step, 2, E, H, 1);
        a.db1 = tensor(b, XP_BF16, 2, E, U, 1);
        a.db2 = tensor(b, XP_BF16, 2, E, H, 1);
    }
    return a;
}

static xp_status output_apart(bench *b, const side *right, const side *wrong, int *out) {
    const xp_tensor *idx = common_choice(right, wrong);
    xp_moe_args r = block_of(b, right, idx), w = block_of(b, wrong, idx);
    return judged(b, &xp_stage_moe, &r, &w, "y", out);
}

/* Sums of such numbers leave nothing to the order: other bits are another rounding. */
static xp_status rounding_apart(bench *b, const side *right, const side *wrong, int *out) {
    const xp_tensor *idx = common_choice(right, wrong);
    xp_moe_args r = block_of(b, right, idx), w = block_of(b, wrong, idx);
    XP_TRY(run(b, &xp_stage_moe, &r));
    XP_TRY(run(b, &xp_stage_moe, &w));
    *out = memcmp(r.y.data, w.y.data, xp_dtype_bytes(XP_BF16, T * H)) != 0 ||
           memcmp(r.dx.data, w.dx.data, xp_dtype_bytes(XP_BF16, T * H)) != 0;
    return XP_OK;
}

static xp_status balance_apart(bench *b, const side *right, const side *wrong, int *out) {
    const int64_t dim[] = {1, T, E}, chosen[] = {1, T, b->k};
    const xp_tensor logits = numbers(b, XP_BF16, "balance", 0.25, 3, 1, T, E);
    xp_tensor valid = tensor(b, XP_U8, 1, T, 1, 1), count = tensor(b, XP_I64, 1, 1, 1, 1);
    xp_tensor idx = tensor(b, XP_I32, 3, 1, T, b->k);
    if (b->failed)
        return XP_FAIL(XP_E_NOMEM, "selftest: balance");
    memset(valid.data, 1, T);
    for (int64_t i = 0; i < T * b->k; i++)
        ((int32_t *)idx.data)[i] = (int32_t)(i * i % E); /* not balanced */
    const xp_balance_args fwd = {.logits = logits,
                                 .idx = xp_tensor_of(idx.data, XP_I32, 3, chosen),
                                 .valid = valid,
                                 .freq = tensor(b, XP_F32, 1, E, 1, 1),
                                 .prob = tensor(b, XP_F32, 1, E, 1, 1),
                                 .loss = tensor(b, XP_F32, 1, 2, 1, 1),
                                 .count = count};
    XP_TRY(run(b, &xp_stage_balance, &fwd));
    xp_balance_bwd_args r = {.logits = logits, .valid = valid, .freq = fwd.freq, .count = count, .scale = 1.0}, w;
    r.daux = xp_tensor_of(take(b, T * E * sizeof(float)), XP_F32, 3, dim);
    w = r;
    w.daux.data = take(b, T * E * sizeof(float));
    r.aux_coef = right->d->aux_coef;
    r.z_coef = right->d->z_coef;
    w.aux_coef = wrong->d->aux_coef;
    w.z_coef = wrong->d->z_coef;
    return judged(b, &xp_stage_balance_bwd, &r, &w, "daux", out);
}

/* ---- all of it ---- */

static xp_status judge_place(bench *b, const xp_dialect *right, const xp_dialect *wrong, xp_apart what, int *out) {
    static xp_status (*const ways[])(bench *, const side *, const side *, int *) = {
        [XP_APART_CHOICE] = choice_apart, [XP_APART_WEIGHT] = weight_apart,   [XP_APART_PLACES] = places_apart,
        [XP_APART_OUTPUT] = output_apart, [XP_APART_BALANCE] = balance_apart, [XP_APART_ROUNDING] = rounding_apart};
    side r, w;
    XP_TRY(routed(b, right, &r));
    XP_TRY(routed(b, wrong, &w));
    return ways[what](b, &r, &w, out);
}

/* The whole block drops no slots by their weights; which ones that drops, its places have told already. */
static xp_dialect for_block(const xp_dialect *d, xp_apart what) {
    xp_dialect out = *d;
    if (what > XP_APART_PLACES && d->overflow == XP_OVERFLOW_PRIORITY)
        out.overflow = XP_OVERFLOW_ORDER;
    return out;
}

xp_status xp_apart_judge(const xp_dialect *right, const xp_dialect *wrong, xp_apart *out) {
    const int mixer = right->score == XP_SCORE_SPARSEMIXER || wrong->score == XP_SCORE_SPARSEMIXER;
    *out = XP_APART_NOT;
    for (xp_apart what = XP_APART_CHOICE; what <= XP_APART_ROUNDING; what++) {
        const xp_dialect r = for_block(right, what), w = for_block(wrong, what);
        for (int place = 0; place < XP_APART_CASES; place++) {
            bench b = {.place = place, .alone = {.size = 1}, .k = mixer ? 2 : MOST};
            int apart = 0;
            for (int i = 0; i < XP_NAXIS; i++)
                b.mesh.axis[i] = &b.alone;
            const xp_status st = judge_place(&b, &r, &w, what, &apart);
            for (int i = 0; i < b.blocks; i++)
                free(b.block[i]);
            XP_TRY(st);
            if (apart) {
                *out = what;
                return XP_OK;
            }
        }
    }
    return XP_OK;
}
