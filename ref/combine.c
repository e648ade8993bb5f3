/* Stages combine and combine_bwd: the experts' rows come home and are summed with their weights, and the gradients of
 * rows and weights.
 *
 * `back` is a stage output of its own, since the backward needs it and it is exact while y is not. Contract:
 * xp/combine.h; where products and sums are rounded is the dialect's `accumulate`. Must not add in another order than
 * stated, write a row behind the last offset, or skip a collective on a rank without rows. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "linear.h"
#include "move.h"
#include "num.h"
#include "plane.h"
#include "ref.h"
#include "xp/combine.h"

/* The weight of a slot; 1 where the dialect has weighed the experts' input already. */
static double weight_at(const xp_dialect *d, const xp_tensor *w, int64_t t, int64_t k) {
    return d->weight_at == XP_AT_OUTPUT ? xp_widen(xp_tensor_at(w, t, k, 0, 0), w->dtype, 0) : 1.0;
}

static int has_identity(const xp_dialect *d) {
    return d && d->null_experts > 0 && d->null_kind == XP_NULL_IDENTITY;
}

/* The factor of the output in arithmetic of acc, f32 or f64; 1: none. */
static double scale_in(const xp_dialect *d, int64_t K, xp_dtype acc) {
    return xp_ref_round(xp_dialect_output_factor(d, K), acc);
}

/* What a slot adds: its row, its token's own row, or nothing. */
typedef enum { SLOT_NOTHING, SLOT_ROW, SLOT_IDENTITY } slot_kind;
static slot_kind slot_of(const xp_dialect *d, const xp_tensor *pos, const xp_tensor *idx, int64_t experts, int64_t t,
                         int64_t k) {
    if (xp_ref_i32(pos, t, k) >= 0)
        return SLOT_ROW;
    return has_identity(d) && xp_ref_i32(idx, t, k) >= experts ? SLOT_IDENTITY : SLOT_NOTHING;
}

static xp_status dialect_check(const xp_stage *s, const void *args, const xp_dialect *d, const xp_tensor *w,
                               xp_dtype act) {
    if (!d)
        return XP_FAIL(XP_E_ARG, "%s: dialect is absent, expected a record", s->name);
    const char *name = d->name ? d->name : "?";
    if ((unsigned)d->accumulate > XP_ACC_PRODUCTS_ACT_F32)
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has accumulate %d, expected 0 to %d", s->name, name,
                       (int)d->accumulate, XP_ACC_PRODUCTS_ACT_F32);
    if (d->scale_at == XP_SCALE_OUTPUT && !isfinite(d->scale))
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has scale %g, expected a finite number", s->name, name, d->scale);
    if (d->weight_at == XP_AT_INPUT && has_identity(d))
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has weight_at input and null_kind identity, expected one of them",
                       s->name, name);
    XP_TRY(xp_ref_wanted_check(s, args, d, 0));
    if (w->dtype == XP_F64 && act != XP_F64)
        return XP_FAIL(XP_E_ARG, "%s: w has dtype f64, expected f32 or narrower beside rows of %s", s->name,
                       xp_dtype_name(act));
    return XP_OK;
}

/* Rows named by slots: -1 or inside [0, M), and as many of them as rows. */
static xp_status slots_check(const char *stage, const xp_tensor *pos, const xp_ref_path *p, int64_t home_rows) {
    int64_t rows = 0;
    if (!xp_ref_readable(pos))
        return XP_OK;
    for (int64_t t = 0; t < pos->dim[0]; t++) {
        for (int64_t k = 0; k < pos->dim[1]; k++) {
            const int32_t row = xp_ref_i32(pos, t, k);
            if (row < -1 || row >= home_rows)
                return XP_FAIL(XP_E_ARG, "%s: pos[%lld][%lld] is %d, expected -1 to M-1 = %lld", stage, (long long)t,
                               (long long)k, row, (long long)home_rows - 1);
            rows += row >= 0;
        }
    }
    if (xp_ref_readable(p->counts) && xp_ref_path_rows(p, 0) != (double)rows)
        return XP_FAIL(XP_E_ARG, "%s: counts add up to %.0f, expected %lld, the slots whose pos is not -1", stage,
                       xp_ref_path_rows(p, 0), (long long)rows);
    return XP_OK;
}

/* -1, an expert or a null expert; only an expert has a row. */
static xp_status idx_check(const char *stage, const xp_dialect *d, const xp_tensor *idx, const xp_tensor *pos,
                           int64_t experts) {
    for (int64_t t = 0; t < idx->dim[0] && xp_ref_readable(idx) && xp_ref_readable(pos); t++) {
        for (int64_t k = 0; k < idx->dim[1]; k++) {
            const int32_t e = xp_ref_i32(idx, t, k), row = xp_ref_i32(pos, t, k);
            if (e < -1 || e >= experts + d->null_experts)
                return XP_FAIL(XP_E_ARG,
                               "%s: idx[%lld][%lld] is %d, expected -1 to %lld, the last of E = %lld and %d null "
                               "experts",
                               stage, (long long)t, (long long)k, e, (long long)(experts + d->null_experts - 1),
                               (long long)experts, d->null_experts);
            if (row >= 0 && (e < 0 || e >= experts))
                return XP_FAIL(XP_E_ARG, "%s: pos[%lld][%lld] is %d, expected -1 beside idx %d, which has no row",
                               stage, (long long)t, (long long)k, row, e);
        }
    }
    return XP_OK;
}

/* How many slots add their token's own row, and how many tokens have such a slot. */
static double identity_count(const xp_dialect *d, const xp_tensor *pos, const xp_tensor *idx, int64_t experts,
                             double *out_tokens) {
    double slots = 0.0;
    *out_tokens = 0.0;
    for (int64_t t = 0; t < pos->dim[0] && has_identity(d) && xp_ref_readable(pos) && xp_ref_readable(idx); t++) {
        const double before = slots;
        for (int64_t k = 0; k < pos->dim[1]; k++)
            slots += slot_of(d, pos, idx, experts, t, k) == SLOT_IDENTITY;
        *out_tokens += slots > before;
    }
    return slots;
}

/* ---- combine ---- */

enum { COMBINE_Y = 9, COMBINE_X };
static const xp_operand combine_operand[] = {
    XP_OPERAND(xp_combine_args, out, "C,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_combine_args, recv_counts, "P,L", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_args, recv_offsets, "L+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_args, counts, "E", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_args, offsets, "E+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_args, pos, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_args, w, "T,K", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "weight"),
    XP_OPERAND(xp_combine_args, back, "M,H", XP_OUT, XP_DT_ACT, XP_BITS, "act"),
    [COMBINE_Y] = XP_OPERAND(xp_combine_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    [COMBINE_X] = XP_OPTIONAL(xp_combine_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
};

static const xp_param combine_param[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_combine_args, dialect)},
};

static xp_ref_path combine_path(const xp_combine_args *a) {
    return (xp_ref_path){&a->counts, &a->offsets, &a->recv_counts, &a->recv_offsets};
}

static int combine_wants(const void *args, int operand) {
    return operand == COMBINE_X && has_identity(((const xp_combine_args *)args)->dialect);
}

static xp_status combine_check(const void *args, const xp_mesh *m) {
    const xp_combine_args *a = args;
    const xp_ref_path path = combine_path(a);
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_combine, args, &d));
    XP_TRY(dialect_check(&xp_stage_combine, args, a->dialect, &a->w, a->out.dtype));
    XP_TRY(xp_ref_path_check("combine", &path, m->axis[XP_EP], XP_REF_DIM(d, 'M'), XP_REF_DIM(d, 'C')));
    XP_TRY(slots_check("combine", &a->pos, &path, XP_REF_DIM(d, 'M')));
    return idx_check("combine", a->dialect, &a->idx, &a->pos, XP_REF_DIM(d, 'E'));
}

static void combine_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_combine_args *a = args;
    const xp_ref_path p = combine_path(a);
    const double row = (double)xp_dtype_bytes(a->out.dtype, a->out.dim[1]), tokens = (double)a->pos.dim[0];
    const double slots = (double)(a->pos.dim[0] * a->pos.dim[1]), rows = xp_ref_path_rows(&p, 0);
    double own;
    const double identities = identity_count(a->dialect, &a->pos, &a->idx, a->counts.dim[0], &own);
    const double scaled = scale_in(a->dialect, a->pos.dim[1], XP_F64) != 1.0 ? tokens : 0.0;
    *out = (xp_cost){.flop = (2.0 * (rows + identities) + scaled) * (double)a->out.dim[1],
                     .mem_bytes = (xp_ref_path_rows(&p, 1) + rows + tokens + own) * row +
                                  slots * (8.0 + (double)xp_dtype_bytes(a->w.dtype, 1)),
                     .net_bytes = xp_ref_path_remote(&p, m->axis[XP_EP], 1) * row};
}

/* What the sum of one token needs. */
typedef struct {
    double *sum, *row; /* [H] */
    int64_t *order;    /* [K] slots that add something, in the order of the sum */
} summing;

static size_t summing_ws(const xp_combine_args *a) {
    return 2 * xp_ref_span((size_t)a->back.dim[1] * sizeof(double)) +
           xp_ref_span((size_t)a->pos.dim[1] * sizeof(int64_t));
}

static summing summing_plan(const xp_combine_args *a, void *ws) {
    const size_t width = (size_t)a->back.dim[1];
    char *at = ws;
    summing s;
    s.sum = xp_ref_carve(&at, width * sizeof *s.sum);
    s.row = xp_ref_carve(&at, width * sizeof *s.row);
    s.order = xp_ref_carve(&at, (size_t)a->pos.dim[1] * sizeof *s.order);
    return s;
}

static size_t combine_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_args *a = args;
    const size_t rows = xp_ref_path_ws(&a->back, &a->out, m->axis[XP_EP]->size);
    return rows > summing_ws(a) ? rows : summing_ws(a);
}

/* Slots that add something: ascending, or by (expert, slot) for the eager sums, null experts last. Returns how many. */
static int64_t slots_order(const xp_combine_args *a, int64_t t, int64_t *order) {
    const int eager = a->dialect->accumulate == XP_ACC_EAGER_ACT || a->dialect->accumulate == XP_ACC_EAGER_F32;
    int64_t n = 0;
    for (int64_t k = 0; k < a->pos.dim[1]; k++) {
        if (slot_of(a->dialect, &a->pos, &a->idx, a->counts.dim[0], t, k) == SLOT_NOTHING)
            continue;
        int64_t i = n++;
        for (; eager && i > 0 && xp_ref_i32(&a->idx, t, order[i - 1]) > xp_ref_i32(&a->idx, t, k); i--)
            order[i] = order[i - 1];
        order[i] = k;
    }
    return n;
}

/* row = p of a slot, w times its row or its token's own, in double. */
static void product_load(const xp_combine_args *a, int64_t t, int64_t k, double *row) {
    const int64_t width = a->back.dim[1], place = xp_ref_i32(&a->pos, t, k);
    const double w = weight_at(a->dialect, &a->w, t, k);
    xp_ref_rows_load(place < 0 ? &a->x : &a->back, place < 0 ? t : place, 1, row);
    for (int64_t h = 0; h < width; h++)
        row[h] *= w;
}

/* The sum of a token before its last rounding. Where `accumulate` rounds, p is first a number of acc, as w * row is in
 * the wider dtype of the two; slots_f32 has neither. */
static void token_sum(const xp_combine_args *a, int64_t t, const summing *s) {
    const int64_t width = a->back.dim[1], n = slots_order(a, t, s->order);
    const xp_dtype act = a->back.dtype, acc = xp_ref_op(act);
    const xp_accumulate how = a->dialect->accumulate;
    memset(s->sum, 0, (size_t)width * sizeof *s->sum);
    for (int64_t i = 0; i < n; i++) {
        product_load(a, t, s->order[i], s->row);
        if (how != XP_ACC_SLOTS_F32)
            xp_ref_round_row(acc, width, s->row);
        if (how == XP_ACC_EAGER_ACT || how == XP_ACC_PRODUCTS_ACT_F32)
            xp_ref_round_row(act, width, s->row);
        if (how == XP_ACC_EAGER_ACT) /* y = r(y + r(p)): the last sum's rounding is the store's */
            xp_ref_round_row(act, width, s->sum);
        for (int64_t h = 0; h < width; h++)
            s->sum[h] += s->row[h];
        if (how == XP_ACC_EAGER_F32)
            xp_ref_round_row(acc, width, s->sum);
    }
    const double scale = scale_in(a->dialect, a->pos.dim[1], acc);
    if (scale == 1.0)
        return;
    xp_ref_round_row(act, width, s->sum);
    for (int64_t h = 0; h < width; h++)
        s->sum[h] *= scale;
    xp_ref_round_row(acc, width, s->sum);
}

static xp_status combine_run(const xp_exec *x, const void *args) {
    const xp_combine_args *a = args;
    const xp_ref_path path = combine_path(a);
    const int64_t width = a->out.dim[1];
    XP_TRY(xp_ref_path_home(x, &path, &a->out, &a->back, 0, x->ws));
    const summing s = summing_plan(a, x->ws); /* the exchange is over: its buffers are free */
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        token_sum(a, t, &s);
        xp_ref_store_row(xp_tensor_at(&a->y, t, 0, 0, 0), a->y.dtype, 0, width, s.sum);
    }
    return XP_OK;
}

/* sum[h] = sum |p| over the slots that add something; returns how many those are. */
static int64_t token_gauge(const xp_combine_args *a, int64_t t, const summing *s) {
    const int64_t width = a->back.dim[1], n = slots_order(a, t, s->order);
    memset(s->sum, 0, (size_t)width * sizeof *s->sum);
    for (int64_t i = 0; i < n; i++) {
        product_load(a, t, s->order[i], s->row);
        for (int64_t h = 0; h < width; h++)
            s->sum[h] += fabs(s->row[h]);
    }
    return n;
}

/* With S = sum |p| over n slots; acc is f32, or f64 when act is f64. Distance of y, rounded to act, from the judge's
 * sum before its last rounding.
 * slots_f32: a product is one rounding in acc (and may lose half the smallest value), n-1 additions in any order:
 * gamma_n S; then one rounding to act.
 * The other modes: a product sees one rounding in acc and, but in eager_f32, one to act; then at most n additions, each
 * rounded in acc, in eager_act to act as well. So at most n+1 roundings in acc and a = n+1, 1 or 0 to act on the way:
 * g = (1 + gamma_(n+1)(acc))(1 + gamma_a(act)) - 1 in units of S. The judge makes the same roundings and can be off the
 * other way, so both count; each rounding may also lose half the smallest value of its dtype, 2n times on either side.
 * Then one rounding to act, which eager_act has counted. S is read from back, an output: it is compared by bits beside
 * y, so a row that is wrong there fails there. */
static double y_tolerance(const xp_dialect *d, int64_t n, xp_dtype act, double value, double gauge) {
    const xp_dtype acc = xp_ref_op(act);
    const double e = xp_ref_sum_err(n, acc, gauge, n);
    if (d->accumulate == XP_ACC_SLOTS_F32)
        return xp_ref_round_err(act, value, e);
    const int to_act = d->accumulate != XP_ACC_EAGER_F32, eager = d->accumulate == XP_ACC_EAGER_ACT;
    const double g_acc = xp_ref_gamma(n + 1, acc), g_act = eager ? xp_ref_gamma(n + 1, act) : xp_ref_gamma(to_act, act);
    const double g = g_acc + g_act + g_acc * g_act;
    const double least = xp_ref_half_ulp_err(acc, 0.0) + (to_act ? xp_ref_half_ulp_err(act, 0.0) : 0.0);
    const double lost = 4.0 * (double)n * least * (1.0 + g);
    if (isinf(xp_ref_round((1.0 + g) * gauge, to_act ? act : acc)))
        return (double)INFINITY;
    const double all = (2.0 * g * gauge + e + lost) * (1.0 + 2.0 * xp_ref_gamma(n + 8, XP_F64));
    return eager ? all : xp_ref_round_err(act, value, all);
}

/* y = r(r(sum) scale): value / scale is the judge's r(sum), half a unit of act from its sum. What another has for it is
 * within the sum's tolerance; the product is rounded in acc on either side, and last to act. */
static double scaled_tolerance(const xp_combine_args *a, int64_t n, double value, double gauge) {
    const xp_dialect *d = a->dialect;
    const xp_dtype act = a->back.dtype, acc = xp_ref_op(act);
    const double scale = scale_in(d, a->pos.dim[1], acc);
    if (scale == 1.0)
        return y_tolerance(d, n, act, value, gauge);
    const double seen = fabs(value) * (1.0 + 2.0 * xp_ref_unit(acc)) + 2.0 * xp_ref_half_ulp_err(acc, 0.0);
    const double sum = scale == 0.0 ? gauge : seen / fabs(scale);
    const double half = xp_ref_half_ulp_err(act, sum);
    const double e = (y_tolerance(d, n, act, sum + half, gauge) + half) * fabs(scale);
    const double product = 2.0 * xp_ref_half_ulp_err(acc, (sum * fabs(scale) + e) * (1.0 + 2.0 * xp_ref_unit(acc)));
    return xp_ref_round_err(act, value, (e + product) * (1.0 + xp_ref_gamma(8, XP_F64)));
}

static xp_status combine_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                               xp_tensor *tol) {
    const xp_combine_args *a = args;
    const int64_t width = a->back.dim[1];
    const summing s = summing_plan(a, ws);
    (void)m;
    if (operand != COMBINE_Y)
        return XP_FAIL(XP_E_BUG, "combine: operand %d has no bound", operand);
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        const double *value = xp_tensor_at(ref, t, 0, 0, 0);
        double *out = xp_tensor_at(tol, t, 0, 0, 0);
        const int64_t n = token_gauge(a, t, &s);
        for (int64_t h = 0; h < width; h++)
            out[h] = scaled_tolerance(a, n, value[h], s.sum[h]);
    }
    return XP_OK;
}

static size_t combine_bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return summing_ws(args);
}

static xp_status combine_conserved(const void *args, const xp_mesh *m, double *out) {
    const xp_combine_args *a = args;
    const xp_ref_path p = combine_path(a);
    return xp_ref_path_conserved(&p, m->axis[XP_EP], &a->back, &a->out, out);
}

static const xp_property combine_property[] = {{"rows_conserved", combine_conserved}};

const xp_stage xp_stage_combine = {
    .name = "combine",
    .meaning = "the experts' rows back home over ep, and their weighted sum for each token",
    .axis = XP_EP,
    .args_size = sizeof(xp_combine_args),
    .operand = combine_operand,
    .operands = sizeof combine_operand / sizeof *combine_operand,
    .param = combine_param,
    .params = sizeof combine_param / sizeof *combine_param,
    .check = combine_check,
    .cost = combine_cost,
    .bound = combine_bound,
    .bound_workspace = combine_bound_workspace,
    .chain = "layer",
    .wants = combine_wants,
    .property = combine_property,
    .properties = sizeof combine_property / sizeof *combine_property,
};

const xp_kernel xp_ref_combine = {
    .stage = &xp_stage_combine,
    .name = "exchange_sum",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = combine_workspace,
    .run = combine_run,
};

/* ---- combine_bwd ---- */

enum { COMBINE_BWD_DW = 8, COMBINE_BWD_DOUT, COMBINE_BWD_X, COMBINE_BWD_IDX, COMBINE_BWD_DX };
static const xp_operand combine_bwd_operand[] = {
    XP_OPERAND(xp_combine_bwd_args, dy, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_combine_bwd_args, back, "M,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_combine_bwd_args, w, "T,K", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "weight"),
    XP_OPERAND(xp_combine_bwd_args, pos, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_bwd_args, counts, "E", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_bwd_args, offsets, "E+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_bwd_args, recv_counts, "P,L", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_combine_bwd_args, recv_offsets, "L+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    [COMBINE_BWD_DW] = XP_OPERAND(xp_combine_bwd_args, dw, "T,K", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [COMBINE_BWD_DOUT] = XP_OPERAND(xp_combine_bwd_args, dout, "C,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    [COMBINE_BWD_X] = XP_OPTIONAL(xp_combine_bwd_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [COMBINE_BWD_IDX] = XP_OPTIONAL(xp_combine_bwd_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    [COMBINE_BWD_DX] = XP_OPTIONAL(xp_combine_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static const xp_param combine_bwd_param[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_combine_bwd_args, dialect)},
};

static xp_ref_path combine_bwd_path(const xp_combine_bwd_args *a) {
    return (xp_ref_path){&a->counts, &a->offsets, &a->recv_counts, &a->recv_offsets};
}

static int combine_bwd_wants(const void *args, int operand) {
    return (operand == COMBINE_BWD_X || operand == COMBINE_BWD_IDX || operand == COMBINE_BWD_DX) &&
           has_identity(((const xp_combine_bwd_args *)args)->dialect);
}

static xp_status combine_bwd_check(const void *args, const xp_mesh *m) {
    const xp_combine_bwd_args *a = args;
    const xp_ref_path path = combine_bwd_path(a);
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_combine_bwd, args, &d));
    XP_TRY(dialect_check(&xp_stage_combine_bwd, args, a->dialect, &a->w, a->dy.dtype));
    XP_TRY(xp_ref_path_check("combine_bwd", &path, m->axis[XP_EP], XP_REF_DIM(d, 'M'), XP_REF_DIM(d, 'C')));
    XP_TRY(slots_check("combine_bwd", &a->pos, &path, XP_REF_DIM(d, 'M')));
    if (!has_identity(a->dialect))
        return XP_OK;
    return idx_check("combine_bwd", a->dialect, &a->idx, &a->pos, XP_REF_DIM(d, 'E'));
}

static void combine_bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_combine_bwd_args *a = args;
    const xp_ref_path p = combine_bwd_path(a);
    const double row = (double)xp_dtype_bytes(a->dy.dtype, a->dy.dim[1]), tokens = (double)a->pos.dim[0];
    const double slots = (double)(a->pos.dim[0] * a->pos.dim[1]), rows = xp_ref_path_rows(&p, 0);
    double own;
    const double identities = identity_count(a->dialect, &a->pos, &a->idx, a->counts.dim[0], &own);
    const double scaled = scale_in(a->dialect, a->pos.dim[1], XP_F64) != 1.0 ? tokens : 0.0;
    *out = (xp_cost){.flop = (3.0 * rows + 4.0 * identities + scaled) * (double)a->dy.dim[1],
                     .mem_bytes = (tokens + rows + xp_ref_path_rows(&p, 1) + own) * row +
                                  slots * (4.0 + (double)xp_dtype_bytes(a->w.dtype, 1) +
                                           (double)xp_dtype_bytes(xp_ref_op(a->dy.dtype), 1)),
                     .net_bytes = xp_ref_path_remote(&p, m->axis[XP_EP], 0) * row};
    if (has_identity(a->dialect))
        out->mem_bytes += tokens * row + slots * 4.0;
}

/* The rows that leave home, in dout's dtype (a judge's is wider than act). */
static xp_tensor staged_rows(const xp_combine_bwd_args *a, void *data) {
    return xp_tensor_2d(data, a->dout.dtype, a->back.dim[0], a->back.dim[1]);
}

/* Rows of one token: its gradient g, a row of it or of back, the sum that becomes dx. [H] */
typedef struct {
    double *g, *row, *sum;
} gradients;

static size_t gradients_ws(const xp_combine_bwd_args *a) {
    return 3 * xp_ref_span((size_t)a->dy.dim[1] * sizeof(double));
}

static gradients gradients_plan(const xp_combine_bwd_args *a, char **at) {
    const size_t bytes = (size_t)a->dy.dim[1] * sizeof(double);
    gradients r;
    r.g = xp_ref_carve(at, bytes);
    r.row = xp_ref_carve(at, bytes);
    r.sum = xp_ref_carve(at, bytes);
    return r;
}

static size_t combine_bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_bwd_args *a = args;
    const xp_tensor staged = staged_rows(a, NULL);
    return gradients_ws(a) + xp_ref_span(xp_dtype_bytes(staged.dtype, staged.dim[0] * staged.dim[1])) +
           xp_ref_path_ws(&staged, &a->dout, m->axis[XP_EP]->size);
}

/* g = r(dy scale), the product made in acc; dy itself without a factor. */
static void gradient_load(const xp_combine_bwd_args *a, int64_t t, double *g) {
    const int64_t width = a->dy.dim[1];
    const xp_dtype act = a->dy.dtype, acc = xp_ref_op(act);
    const double scale = scale_in(a->dialect, a->pos.dim[1], acc);
    if (width > 0)
        xp_ref_rows_load(&a->dy, t, 1, g);
    if (scale == 1.0)
        return;
    for (int64_t h = 0; h < width; h++)
        g[h] *= scale;
    xp_ref_round_row(acc, width, g);
    xp_ref_round_row(act, width, g);
}

static slot_kind bwd_slot(const xp_combine_bwd_args *a, int64_t t, int64_t k) {
    return slot_of(a->dialect, &a->pos, &a->idx, a->counts.dim[0], t, k);
}

/* What dw[t][k] is the product of g with, in r->row; 0 where dw is 0: y does not depend on the weight of a slot that
 * adds nothing, or that was applied before the exchange. */
static int partner_load(const xp_combine_bwd_args *a, int64_t t, int64_t k, double *row) {
    const slot_kind kind = bwd_slot(a, t, k);
    const int64_t width = a->dy.dim[1];
    if (kind == SLOT_NOTHING || width == 0 || a->dialect->weight_at != XP_AT_OUTPUT)
        return 0;
    xp_ref_rows_load(kind == SLOT_ROW ? &a->back : &a->x, kind == SLOT_ROW ? xp_ref_i32(&a->pos, t, k) : t, 1, row);
    return 1;
}

static void token_backward(const xp_combine_bwd_args *a, int64_t t, const xp_tensor *staged, const gradients *r) {
    const int64_t width = a->dy.dim[1];
    gradient_load(a, t, r->g);
    memset(r->sum, 0, (size_t)width * sizeof *r->sum);
    for (int64_t k = 0; k < a->pos.dim[1]; k++) {
        const double w = weight_at(a->dialect, &a->w, t, k);
        const double dw = partner_load(a, t, k, r->row) ? xp_ref_dot(r->g, r->row, width) : 0.0;
        const slot_kind kind = bwd_slot(a, t, k);
        xp_ref_store(xp_tensor_at(&a->dw, t, k, 0, 0), a->dw.dtype, 0, dw);
        for (int64_t h = 0; h < width; h++)
            r->row[h] = w * r->g[h];
        if (kind == SLOT_ROW && width > 0)
            xp_ref_store_row(xp_tensor_at(staged, xp_ref_i32(&a->pos, t, k), 0, 0, 0), staged->dtype, 0, width, r->row);
        for (int64_t h = 0; h < width && kind == SLOT_IDENTITY; h++)
            r->sum[h] += r->row[h];
    }
    if (has_identity(a->dialect) && width > 0)
        xp_ref_store_row(xp_tensor_at(&a->dx, t, 0, 0, 0), a->dx.dtype, 0, width, r->sum);
}

static xp_status combine_bwd_run(const xp_exec *x, const void *args) {
    const xp_combine_bwd_args *a = args;
    const xp_ref_path path = combine_bwd_path(a);
    char *at = x->ws;
    const gradients r = gradients_plan(a, &at);
    const xp_tensor staged =
        staged_rows(a, xp_ref_carve(&at, xp_dtype_bytes(a->dout.dtype, a->back.dim[0] * a->back.dim[1])));
    for (int64_t t = 0; t < a->pos.dim[0]; t++)
        token_backward(a, t, &staged, &r);
    return xp_ref_path_away(x, &path, &staged, &a->dout, 0, at);
}

/* g = r(dy scale) on either side is off by d = (1 + gamma_2(acc))(1 + u(act)) - 1 of the exact product q (2: the factor
 * may meet another one first), or by half the smallest value of both dtypes; |q| is at most (|g| + that) / (1 - d). So
 * two of them differ by at most rel |g| + least. */
typedef struct {
    double rel, least;
} g_error;

static g_error g_error_of(const xp_combine_bwd_args *a) {
    const xp_dtype act = a->dy.dtype, acc = xp_ref_op(act);
    if (scale_in(a->dialect, a->pos.dim[1], acc) == 1.0)
        return (g_error){0.0, 0.0};
    const double u = xp_ref_unit(act), g2 = xp_ref_gamma(2, acc), off = u + g2 + u * g2;
    const double least = xp_ref_half_ulp_err(act, 0.0) + xp_ref_half_ulp_err(acc, 0.0);
    return (g_error){2.0 * off / (1.0 - off) * (1.0 + 0x1p-50), (2.0 + 2.0 * off / (1.0 - off)) * least};
}

/* g[h] becomes the largest magnitude that another's may have; its error goes to e[h]: infinite where it may overflow.
 */
static void gradient_gauge(const g_error *err, xp_dtype act, int64_t width, double *g, double *e) {
    for (int64_t h = 0; h < width; h++) {
        e[h] = err->rel > 0.0 ? err->rel * fabs(g[h]) + err->least : 0.0;
        g[h] = fabs(g[h]) + e[h];
        if (e[h] > 0.0 && isinf(xp_ref_round(g[h], act)))
            e[h] = g[h] = (double)INFINITY;
    }
}

/* An infinite error that meets a zero. */
static double or_infinite(double e) {
    return isnan(e) ? (double)INFINITY : e;
}

/* dw: H products, each one rounding in acc (f32, or f64 when act is f64) that may also lose half acc's smallest value,
 * and H-1 additions in any order: gamma_H sum |g back|; what g itself may be off by, e |back|; stored in acc's dtype,
 * one more rounding. */
static void dw_tolerance(const xp_combine_bwd_args *a, const xp_tensor *ref, void *ws, xp_tensor *tol) {
    const int64_t width = a->dy.dim[1];
    const xp_dtype act = a->dy.dtype, acc = xp_ref_op(act);
    const g_error err = g_error_of(a);
    char *at = ws;
    const gradients r = gradients_plan(a, &at);
    for (int64_t t = 0; t < a->pos.dim[0]; t++) {
        gradient_load(a, t, r.g);
        gradient_gauge(&err, act, width, r.g, r.sum);
        for (int64_t k = 0; k < a->pos.dim[1]; k++) {
            double e = 0.0;
            if (partner_load(a, t, k, r.row)) {
                for (int64_t h = 0; h < width; h++)
                    r.row[h] = fabs(r.row[h]);
                e = xp_ref_sum_err(width, acc, xp_ref_dot(r.g, r.row, width), width) +
                    xp_ref_dot(r.sum, r.row, width) * (1.0 + xp_ref_gamma(width, XP_F64));
            }
            *(double *)xp_tensor_at(tol, t, k, 0, 0) =
                xp_ref_round_err(acc, *(const double *)xp_tensor_at(ref, t, k, 0, 0), or_infinite(e));
        }
    }
}

/* dx: n products w g and n-1 additions, gamma_n sum |w g|, and e |w| each; then one rounding to act. */
static void dx_tolerance(const xp_combine_bwd_args *a, const xp_tensor *ref, void *ws, xp_tensor *tol) {
    const int64_t width = a->dy.dim[1];
    const xp_dtype act = a->dy.dtype, acc = xp_ref_op(act);
    const g_error err = g_error_of(a);
    char *at = ws;
    const gradients r = gradients_plan(a, &at);
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        double weights = 0.0;
        int64_t n = 0;
        for (int64_t k = 0; k < a->pos.dim[1]; k++) {
            if (bwd_slot(a, t, k) != SLOT_IDENTITY)
                continue;
            weights += fabs(weight_at(a->dialect, &a->w, t, k));
            n++;
        }
        gradient_load(a, t, r.g);
        gradient_gauge(&err, act, width, r.g, r.sum);
        const double *value = xp_tensor_at(ref, t, 0, 0, 0);
        double *out = xp_tensor_at(tol, t, 0, 0, 0);
        for (int64_t h = 0; h < width; h++) {
            const double e = xp_ref_sum_err(n, acc, weights * r.g[h], n);
            const double off = weights * r.sum[h] * (1.0 + xp_ref_gamma(n + 2, XP_F64));
            out[h] = xp_ref_round_err(act, value[h], n == 0 ? 0.0 : or_infinite(e + off));
        }
    }
}

static double weights_most(const xp_combine_bwd_args *a) {
    double most = 1.0;
    for (int64_t t = 0; t < a->w.dim[0]; t++) {
        for (int64_t k = 0; k < a->w.dim[1]; k++) {
            const double w = fabs(weight_at(a->dialect, &a->w, t, k));
            most = w > most ? w : most;
        }
    }
    return most;
}

/* dout: one product, rounded in acc (or lost below half its smallest value), then to act; g itself may be off by
 * rel |g| + least. The weights of a row from another rank are not here: `least` is counted with the largest of this
 * rank, at least 1. A pad's 0 stays exact: both losses together are below act's smallest value (f64: at most it). Only
 * the rows in use have a tolerance. */
static void dout_tolerance(const xp_combine_bwd_args *a, const xp_tensor *ref, xp_tensor *tol) {
    const xp_dtype act = a->dy.dtype, acc = xp_ref_op(act);
    const int64_t ranks = a->recv_counts.dim[0], local = a->recv_counts.dim[1];
    const g_error err = g_error_of(a);
    const double least = err.least > 0.0 ? err.least * weights_most(a) : 0.0;
    for (int64_t l = 0; l < local; l++) {
        int64_t pads = xp_ref_i64(&a->recv_offsets, l);
        for (int64_t r = 0; r < ranks; r++)
            pads += xp_ref_i64_2d(&a->recv_counts, r, l);
        for (int64_t i = xp_ref_i64(&a->recv_offsets, l); i < xp_ref_i64(&a->recv_offsets, l + 1); i++) {
            for (int64_t h = 0; h < a->dout.dim[1]; h++) {
                const double value = *(const double *)xp_tensor_at(ref, i, h, 0, 0), mag = fabs(value);
                /* the reference's own product is within one rounding of ref, so |ref| serves as the gauge of one term
                 */
                const double off = i < pads ? err.rel * mag + least : 0.0;
                const double e = mag + off == 0.0 ? 0.0 : off + xp_ref_sum_err(1, acc, mag + off, 1);
                *(double *)xp_tensor_at(tol, i, h, 0, 0) = xp_ref_round_err(act, value, e);
            }
        }
    }
}

static xp_status combine_bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                                   xp_tensor *tol) {
    const xp_combine_bwd_args *a = args;
    (void)m;
    if (operand == COMBINE_BWD_DW)
        dw_tolerance(a, ref, ws, tol);
    else if (operand == COMBINE_BWD_DOUT)
        dout_tolerance(a, ref, tol);
    else if (operand == COMBINE_BWD_DX)
        dx_tolerance(a, ref, ws, tol);
    else
        return XP_FAIL(XP_E_BUG, "combine_bwd: operand %d has no bound", operand);
    return XP_OK;
}

static size_t combine_bwd_bound_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return gradients_ws(args);
}

const xp_stage xp_stage_combine_bwd = {
    .name = "combine_bwd",
    .meaning =
        "gradients of the combine weights and of identity experts' rows, and of each expert row, sent to its rank",
    .axis = XP_EP,
    .args_size = sizeof(xp_combine_bwd_args),
    .operand = combine_bwd_operand,
    .operands = sizeof combine_bwd_operand / sizeof *combine_bwd_operand,
    .param = combine_bwd_param,
    .params = sizeof combine_bwd_param / sizeof *combine_bwd_param,
    .check = combine_bwd_check,
    .cost = combine_bwd_cost,
    .bound = combine_bwd_bound,
    .bound_workspace = combine_bwd_bound_workspace,
    .chain = "layer",
    .wants = combine_bwd_wants,
};

const xp_kernel xp_ref_combine_bwd = {
    .stage = &xp_stage_combine_bwd,
    .name = "product_exchange",
    .det = XP_DET_RUN,
    .workspace = combine_bwd_workspace,
    .run = combine_bwd_run,
};
