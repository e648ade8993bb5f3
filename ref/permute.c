/* Stages permute and permute_bwd: a token's K copies, sorted by expert, and the sum of their gradients.
 *
 * A counting sort: count, place the segments, then deal rows in the stated order, so equal experts keep that order and
 * a token that names an expert twice keeps both rows. Contract: xp/permute.h. Forward, bits are copied, or one product
 * is rounded as the header says. Must not write a row at offsets[E] or behind it. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "move.h"
#include "num.h"
#include "plane.h"
#include "ref.h"
#include "xp/permute.h"

/* ---- permute ---- */

enum { PERMUTE_W = 8 };
static const xp_operand permute_operand[] = {
    XP_OPERAND(xp_permute_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_permute_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_permute_args, rows, "M,H", XP_OUT, XP_DT_ACT, XP_BITS, "act"),
    XP_OPERAND(xp_permute_args, tok, "M", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, src, "M", XP_OUT, XP_BIT(XP_I32), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, pos, "T,K", XP_OUT, XP_BIT(XP_I32), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, counts, "E", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, offsets, "E+1", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    [PERMUTE_W] = XP_OPTIONAL(xp_permute_args, w, "T,K", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "weight"),
};

static const xp_param permute_param[] = {
    {"order", "slot_token|token", "slot_token", XP_P_WORD, offsetof(xp_permute_args, order)},
    {"align", NULL, "1", XP_P_INT, offsetof(xp_permute_args, align)},
    {"least", NULL, "0", XP_P_I64, offsetof(xp_permute_args, least)},
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_permute_args, dialect)},
};

static void i32_set(const xp_tensor *t, int64_t i, int64_t j, int64_t v) {
    *(int32_t *)xp_tensor_at(t, i, j, 0, 0) = (int32_t)v;
}

static void i64_set(const xp_tensor *t, int64_t i, int64_t v) {
    *(int64_t *)xp_tensor_at(t, i, 0, 0, 0) = v;
}

/* Without a record: weights belong to the experts' output, and there are no null experts. */
static int weighs_input(const xp_dialect *d) {
    return d && d->weight_at == XP_AT_INPUT;
}

static xp_status dialect_check(const xp_stage *s, const void *args, const xp_dialect *d, const xp_tensor *w,
                               xp_dtype act) {
    XP_TRY(xp_ref_wanted_check(s, args, d, 0));
    if (weighs_input(d) && w->dtype == XP_F64 && act != XP_F64)
        return XP_FAIL(XP_E_ARG, "%s: w has dtype f64, expected f32 or narrower beside rows of %s", s->name,
                       xp_dtype_name(act));
    return XP_OK;
}

static double weight_at(const xp_tensor *w, int64_t t, int64_t k) {
    return xp_widen(xp_tensor_at(w, t, k, 0, 0), w->dtype, 0);
}

static int permute_wants(const void *args, int operand) {
    return operand == PERMUTE_W && weighs_input(((const xp_permute_args *)args)->dialect);
}

static xp_status permute_idx_check(const xp_permute_args *a, int64_t experts) {
    const int64_t nulls = a->dialect ? a->dialect->null_experts : 0;
    for (int64_t t = 0; t < a->idx.dim[0] && xp_ref_readable(&a->idx); t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            const int32_t e = xp_ref_i32(&a->idx, t, k);
            if (e < -1 || e >= experts + nulls)
                return XP_FAIL(XP_E_ARG,
                               "permute: idx[%lld][%lld] is %d, expected -1 to %lld, the last of E = %lld and %lld "
                               "null experts",
                               (long long)t, (long long)k, e, (long long)(experts + nulls - 1), (long long)experts,
                               (long long)nulls);
        }
    }
    return XP_OK;
}

static xp_status permute_check(const void *args, const xp_mesh *m) {
    const xp_permute_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_permute, args, &d));
    const int64_t tokens = XP_REF_DIM(d, 'T'), slots = XP_REF_DIM(d, 'K'), experts = XP_REF_DIM(d, 'E');
    const int64_t room = XP_REF_DIM(d, 'M');
    if (a->order != XP_ORDER_SLOT_TOKEN && a->order != XP_ORDER_TOKEN)
        return XP_FAIL(XP_E_ARG, "permute: order is %d, expected 0 (slot_token) or 1 (token)", a->order);
    if (a->align != 1 && a->align != 16 && a->align != 128)
        return XP_FAIL(XP_E_ARG, "permute: align is %d, expected 1, 16 or 128", a->align);
    if (a->token0 < 0)
        return XP_FAIL(XP_E_ARG, "permute: token0 is %lld, expected >= 0", (long long)a->token0);
    if (a->least < 0 || a->least > INT32_MAX)
        return XP_FAIL(XP_E_ARG, "permute: least is %lld, expected 0 to %d", (long long)a->least, INT32_MAX);
    if (room > INT32_MAX)
        return XP_FAIL(XP_E_ARG, "permute: M is %lld, expected at most %d, the largest i32 row number", (long long)room,
                       INT32_MAX);
    if (room < tokens * slots + experts * (a->least + a->align - 1))
        return XP_FAIL(XP_E_ARG, "permute: M is %lld, expected at least T*K + E*(least+align-1) = %lld",
                       (long long)room, (long long)(tokens * slots + experts * (a->least + a->align - 1)));
    XP_TRY(dialect_check(&xp_stage_permute, args, a->dialect, &a->w, a->x.dtype));
    return permute_idx_check(a, experts);
}

/* 1: the slot names an expert that has rows. */
static int has_row(const xp_permute_args *a, int64_t t, int64_t k) {
    const int32_t e = xp_ref_i32(&a->idx, t, k);
    return e >= 0 && e < a->counts.dim[0];
}

static int64_t rows_count(const xp_permute_args *a) {
    int64_t n = 0;
    if (!xp_ref_readable(&a->idx))
        return a->idx.dim[0] * a->idx.dim[1];
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++)
            n += has_row(a, t, k);
    }
    return n;
}

static void permute_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_permute_args *a = args;
    const double slots = (double)(a->idx.dim[0] * a->idx.dim[1]), rows = (double)rows_count(a);
    const double row = (double)xp_dtype_bytes(a->x.dtype, a->x.dim[1]);
    const double w = weighs_input(a->dialect) ? (double)xp_dtype_bytes(a->w.dtype, 1) : 0.0;
    (void)m;
    /* each slot: its idx and pos (4 + 4); each copy: its row with tok and src (8 + 4); each expert: count and offset */
    *out = (xp_cost){.flop = weighs_input(a->dialect) ? rows * (double)a->x.dim[1] : 0.0,
                     .mem_bytes = (double)a->x.dim[0] * row + slots * (8.0 + w) + rows * (row + 12.0) +
                                  16.0 * (double)a->counts.dim[0],
                     .net_bytes = 0.0};
}

static size_t permute_workspace(const void *args, const xp_mesh *m) {
    const xp_permute_args *a = args;
    (void)m;
    return xp_ref_span((size_t)a->counts.dim[0] * sizeof(int64_t)) +
           (weighs_input(a->dialect) ? xp_ref_span((size_t)a->x.dim[1] * sizeof(double)) : 0);
}

/* Counts, offsets, and the row where each expert's next copy goes. */
static void segments_place(const xp_permute_args *a, int64_t *next) {
    const int64_t experts = a->counts.dim[0];
    int64_t row = 0;
    memset(next, 0, (size_t)experts * sizeof *next);
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            if (has_row(a, t, k))
                next[xp_ref_i32(&a->idx, t, k)]++;
        }
    }
    for (int64_t e = 0; e < experts; e++) {
        const int64_t n = next[e];
        i64_set(&a->counts, e, n);
        i64_set(&a->offsets, e, row);
        next[e] = row;
        row += xp_ref_segment_rows(n, a->least, a->align);
    }
    i64_set(&a->offsets, experts, row);
}

/* The row itself, or r(p) of p = w x in the accumulator's dtype. */
static void row_place(const xp_permute_args *a, int64_t t, int64_t k, int64_t row, double *wide) {
    const int64_t width = a->x.dim[1];
    void *out = xp_tensor_at(&a->rows, row, 0, 0, 0);
    if (width == 0)
        return;
    if (!weighs_input(a->dialect)) {
        memcpy(out, xp_tensor_at(&a->x, t, 0, 0, 0), xp_dtype_bytes(a->x.dtype, width));
        return;
    }
    const double w = weight_at(&a->w, t, k);
    xp_ref_rows_load(&a->x, t, 1, wide);
    for (int64_t h = 0; h < width; h++)
        wide[h] *= w;
    xp_ref_round_row(xp_ref_op(a->x.dtype), width, wide);
    xp_ref_store_row(out, a->rows.dtype, 0, width, wide);
}

static void copy_place(const xp_permute_args *a, int64_t t, int64_t k, int64_t *next, double *wide) {
    if (!has_row(a, t, k)) {
        i32_set(&a->pos, t, k, -1);
        return;
    }
    const int64_t row = next[xp_ref_i32(&a->idx, t, k)]++;
    row_place(a, t, k, row, wide);
    i64_set(&a->tok, row, a->token0 + t);
    i32_set(&a->src, row, 0, t * a->idx.dim[1] + k);
    i32_set(&a->pos, t, k, row);
}

static void pads_place(const xp_permute_args *a, const int64_t *next) {
    const size_t bytes = xp_dtype_bytes(a->rows.dtype, a->rows.dim[1]);
    for (int64_t e = 0; e < a->counts.dim[0]; e++) {
        for (int64_t row = next[e]; row < xp_ref_i64(&a->offsets, e + 1); row++) {
            if (bytes > 0)
                memset(xp_tensor_at(&a->rows, row, 0, 0, 0), 0, bytes);
            i64_set(&a->tok, row, -1);
            i32_set(&a->src, row, 0, -1);
        }
    }
}

static xp_status permute_run(const xp_exec *x, const void *args) {
    const xp_permute_args *a = args;
    const int64_t tokens = a->idx.dim[0], slots = a->idx.dim[1];
    char *at = x->ws;
    int64_t *next = xp_ref_carve(&at, (size_t)a->counts.dim[0] * sizeof *next);
    double *wide = (double *)(void *)at;
    segments_place(a, next);
    if (a->order == XP_ORDER_SLOT_TOKEN) {
        for (int64_t k = 0; k < slots; k++) {
            for (int64_t t = 0; t < tokens; t++)
                copy_place(a, t, k, next, wide);
        }
    } else {
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t k = 0; k < slots; k++)
                copy_place(a, t, k, next, wide);
        }
    }
    pads_place(a, next);
    return XP_OK;
}

/* Counts add up to the slots with a row; each segment starts where the one before, with its pads, ends. 2 for each
 * departure. */
static xp_status permute_segments(const void *args, const xp_mesh *m, double *out) {
    const xp_permute_args *a = args;
    int64_t sum = 0, row = 0, wrong = 0;
    (void)m;
    for (int64_t e = 0; e < a->counts.dim[0]; e++) {
        const int64_t n = xp_ref_i64(&a->counts, e);
        wrong += n < 0 || xp_ref_i64(&a->offsets, e) != row;
        sum += n;
        row += xp_ref_segment_rows(n, a->least, a->align);
    }
    wrong += sum != rows_count(a) || xp_ref_i64(&a->offsets, a->counts.dim[0]) != row;
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

/* pos and src undo one another, and a slot's row lies in the segment of the slot's expert, so that with the sum of the
 * counts the rows are a permutation of the slots that have one; the others' pos is -1. 2 for each departure. */
static xp_status permute_inverse(const void *args, const xp_mesh *m, double *out) {
    const xp_permute_args *a = args;
    int64_t wrong = 0;
    (void)m;
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            const int64_t row = xp_ref_i32(&a->pos, t, k), e = xp_ref_i32(&a->idx, t, k);
            if (!has_row(a, t, k)) {
                wrong += row != -1;
                continue;
            }
            const int64_t lo = xp_ref_i64(&a->offsets, e);
            if (row < lo || row >= lo + xp_ref_i64(&a->counts, e) || row >= a->tok.dim[0])
                wrong++;
            else
                wrong +=
                    xp_ref_i32(&a->src, row, 0) != t * a->idx.dim[1] + k || xp_ref_i64(&a->tok, row) != a->token0 + t;
        }
    }
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

static const xp_property permute_property[] = {{"segments", permute_segments}, {"inverse", permute_inverse}};

const xp_stage xp_stage_permute = {
    .name = "permute",
    .meaning = "a token's copies sorted by expert, with counts, offsets and both inverses",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_permute_args),
    .operand = permute_operand,
    .operands = sizeof permute_operand / sizeof *permute_operand,
    .param = permute_param,
    .params = sizeof permute_param / sizeof *permute_param,
    .check = permute_check,
    .cost = permute_cost,
    .chain = "layer",
    .wants = permute_wants,
    .property = permute_property,
    .properties = sizeof permute_property / sizeof *permute_property,
};

const xp_kernel xp_ref_permute = {
    .stage = &xp_stage_permute,
    .name = "counting_sort",
    .det = XP_DET_RUN,
    .workspace = permute_workspace,
    .run = permute_run,
};

/* ---- permute_bwd ---- */

enum { PERMUTE_BWD_DX = 2, PERMUTE_BWD_W, PERMUTE_BWD_X, PERMUTE_BWD_DW };
static const xp_operand permute_bwd_operand[] = {
    XP_OPERAND(xp_permute_bwd_args, drows, "M,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_permute_bwd_args, pos, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    [PERMUTE_BWD_DX] = XP_OPERAND(xp_permute_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    [PERMUTE_BWD_W] = XP_OPTIONAL(xp_permute_bwd_args, w, "T,K", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "weight"),
    [PERMUTE_BWD_X] = XP_OPTIONAL(xp_permute_bwd_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [PERMUTE_BWD_DW] = XP_OPTIONAL(xp_permute_bwd_args, dw, "T,K", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
};

static const xp_param permute_bwd_param[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_permute_bwd_args, dialect)},
};

static int permute_bwd_wants(const void *args, int operand) {
    return (operand == PERMUTE_BWD_W || operand == PERMUTE_BWD_X || operand == PERMUTE_BWD_DW) &&
           weighs_input(((const xp_permute_bwd_args *)args)->dialect);
}

static xp_status permute_bwd_check(const void *args, const xp_mesh *m) {
    const xp_permute_bwd_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_permute_bwd, args, &d));
    XP_TRY(dialect_check(&xp_stage_permute_bwd, args, a->dialect, &a->w, a->drows.dtype));
    for (int64_t t = 0; t < XP_REF_DIM(d, 'T') && xp_ref_readable(&a->pos); t++) {
        for (int64_t k = 0; k < XP_REF_DIM(d, 'K'); k++) {
            const int32_t row = xp_ref_i32(&a->pos, t, k);
            if (row < -1 || row >= XP_REF_DIM(d, 'M'))
                return XP_FAIL(XP_E_ARG, "permute_bwd: pos[%lld][%lld] is %d, expected -1 to M-1 = %lld", (long long)t,
                               (long long)k, row, (long long)XP_REF_DIM(d, 'M') - 1);
        }
    }
    return XP_OK;
}

/* The sum of a token's rows; with weights two products more an element, one of them summed. */
static void permute_bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_permute_bwd_args *a = args;
    const double tokens = (double)a->pos.dim[0], slots = (double)a->pos.dim[1], width = (double)a->drows.dim[1];
    const double row = (double)xp_dtype_bytes(a->drows.dtype, a->drows.dim[1]);
    double rows = 0.0, sums = 0.0;
    for (int64_t t = 0; t < a->pos.dim[0]; t++) {
        double n = xp_ref_readable(&a->pos) ? 0.0 : slots;
        for (int64_t k = 0; k < a->pos.dim[1] && xp_ref_readable(&a->pos); k++)
            n += xp_ref_i32(&a->pos, t, k) >= 0;
        rows += n;
        sums += n > 1.0 ? n - 1.0 : 0.0;
    }
    (void)m;
    *out = (xp_cost){.flop = sums * width, .mem_bytes = rows * row + tokens * (slots * 4.0 + row), .net_bytes = 0.0};
    if (!weighs_input(a->dialect))
        return;
    out->flop += 3.0 * rows * width;
    out->mem_bytes +=
        tokens * (row + slots * (double)(xp_dtype_bytes(a->w.dtype, 1) + xp_dtype_bytes(xp_ref_op(a->drows.dtype), 1)));
}

static size_t permute_bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_permute_bwd_args *a = args;
    (void)m;
    return 3 * xp_ref_span((size_t)a->drows.dim[1] * sizeof(double)) +
           xp_ref_span((size_t)a->pos.dim[1] * sizeof(int64_t));
}

typedef struct {
    double *sum, *row, *x; /* [H] */
    int64_t *order;        /* [K] slots with a row, in the order of the sum */
} bwd_rows;

static bwd_rows bwd_plan(const xp_permute_bwd_args *a, void *ws) {
    const size_t width = (size_t)a->drows.dim[1];
    char *at = ws;
    bwd_rows r;
    r.sum = xp_ref_carve(&at, width * sizeof *r.sum);
    r.row = xp_ref_carve(&at, width * sizeof *r.row);
    r.x = xp_ref_carve(&at, width * sizeof *r.x);
    r.order = xp_ref_carve(&at, (size_t)a->pos.dim[1] * sizeof *r.order);
    return r;
}

static int sums_in_act(const xp_dialect *d) {
    return d && d->dx_sum == XP_DX_ACT;
}

/* Slots with a row: ascending, or by row where sums are rounded on the way. Returns how many. */
static int64_t slots_order(const xp_permute_bwd_args *a, int64_t t, int64_t *order) {
    int64_t n = 0;
    for (int64_t k = 0; k < a->pos.dim[1]; k++) {
        if (xp_ref_i32(&a->pos, t, k) < 0)
            continue;
        int64_t i = n++;
        for (; sums_in_act(a->dialect) && i > 0 && xp_ref_i32(&a->pos, t, order[i - 1]) > xp_ref_i32(&a->pos, t, k);
             i--)
            order[i] = order[i - 1];
        order[i] = k;
    }
    return n;
}

/* row = p of a slot: [w] drows[pos[t][k]], in double. */
static void product_load(const xp_permute_bwd_args *a, int64_t t, int64_t k, double *row) {
    const double w = weighs_input(a->dialect) ? weight_at(&a->w, t, k) : 1.0;
    xp_ref_rows_load(&a->drows, xp_ref_i32(&a->pos, t, k), 1, row);
    for (int64_t h = 0; h < a->drows.dim[1]; h++)
        row[h] *= w;
}

/* sum[h] = sum of |p[h]|; returns how many terms it has. */
static int64_t slots_gauge(const xp_permute_bwd_args *a, int64_t t, const bwd_rows *r) {
    const int64_t width = a->drows.dim[1], n = slots_order(a, t, r->order);
    memset(r->sum, 0, (size_t)width * sizeof *r->sum);
    for (int64_t i = 0; i < n; i++) {
        product_load(a, t, r->order[i], r->row);
        for (int64_t h = 0; h < width; h++)
            r->sum[h] += fabs(r->row[h]);
    }
    return n;
}

/* The sum of p before its last rounding. */
static void slots_sum(const xp_permute_bwd_args *a, int64_t t, const bwd_rows *r) {
    const int64_t width = a->drows.dim[1], n = slots_order(a, t, r->order);
    const xp_dtype act = a->drows.dtype;
    memset(r->sum, 0, (size_t)width * sizeof *r->sum);
    for (int64_t i = 0; i < n; i++) {
        product_load(a, t, r->order[i], r->row);
        if (sums_in_act(a->dialect)) { /* dx = r(dx + r(p)): the last sum's rounding is the store's */
            xp_ref_round_row(xp_ref_op(act), width, r->row);
            xp_ref_round_row(act, width, r->row);
            xp_ref_round_row(act, width, r->sum);
        }
        for (int64_t h = 0; h < width; h++)
            r->sum[h] += r->row[h];
    }
}

/* <drows[pos[t][k]], x[t]>, h ascending, or the sum of magnitudes; 0 without a row. */
static double row_dot(const xp_permute_bwd_args *a, int64_t t, int64_t k, int absolute, const bwd_rows *r) {
    const int64_t width = a->drows.dim[1];
    double sum = 0.0;
    if (xp_ref_i32(&a->pos, t, k) < 0 || width == 0)
        return sum;
    xp_ref_rows_load(&a->drows, xp_ref_i32(&a->pos, t, k), 1, r->row);
    for (int64_t h = 0; h < width; h++)
        sum += absolute ? fabs(r->row[h] * r->x[h]) : r->row[h] * r->x[h];
    return sum;
}

static xp_status permute_bwd_run(const xp_exec *x, const void *args) {
    const xp_permute_bwd_args *a = args;
    const int64_t width = a->drows.dim[1];
    const bwd_rows r = bwd_plan(a, x->ws);
    for (int64_t t = 0; t < a->pos.dim[0]; t++) {
        if (width > 0) {
            slots_sum(a, t, &r);
            xp_ref_store_row(xp_tensor_at(&a->dx, t, 0, 0, 0), a->dx.dtype, 0, width, r.sum);
        }
        if (!weighs_input(a->dialect))
            continue;
        if (width > 0)
            xp_ref_rows_load(&a->x, t, 1, r.x);
        for (int64_t k = 0; k < a->pos.dim[1]; k++)
            xp_ref_store(xp_tensor_at(&a->dw, t, k, 0, 0), a->dw.dtype, 0, row_dot(a, t, k, 0, &r));
    }
    return XP_OK;
}

/* dx is a sum of n terms in the accumulator (f32, or f64 when act is f64), exact without weights: n-1 additions in any
 * order give gamma_(n-1) times the sum of magnitudes, with weights one rounding more a term, which may also lose half
 * the smallest value; the result is rounded once to act.
 *
 * With dx_sum act p sees one rounding in acc and one to act, and each of at most n additions one of each: with g =
 * (1 + gamma_(n+1)(acc))(1 + gamma_(n+1)(act)) - 1 a side is within g S of the exact sum, and may lose half the
 * smallest value of either dtype 2n times. The judge's side counts as well, and the last rounding is among these. */
static double act_tolerance(int64_t n, xp_dtype act, double gauge) {
    const xp_dtype acc = xp_ref_op(act);
    const double g_acc = xp_ref_gamma(n + 1, acc), g_act = xp_ref_gamma(n + 1, act), g = g_acc + g_act + g_acc * g_act;
    const double least = xp_ref_half_ulp_err(acc, 0.0) + xp_ref_half_ulp_err(act, 0.0);
    if (isinf(xp_ref_round((1.0 + g) * gauge, act)))
        return (double)INFINITY;
    return (2.0 * g * gauge + 4.0 * (double)n * least * (1.0 + g)) * (1.0 + 2.0 * xp_ref_gamma(n + 8, XP_F64));
}

static void dx_tolerance(const xp_permute_bwd_args *a, const bwd_rows *r, const xp_tensor *ref, xp_tensor *tol) {
    const int64_t width = a->drows.dim[1];
    const xp_dtype act = a->drows.dtype;
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        const double *value = xp_tensor_at(ref, t, 0, 0, 0);
        double *out = xp_tensor_at(tol, t, 0, 0, 0);
        const int64_t n = slots_gauge(a, t, r), weighed = weighs_input(a->dialect) ? n : 0;
        const int64_t roundings = weighed ? n : n > 0 ? n - 1 : 0;
        for (int64_t h = 0; h < width; h++)
            out[h] =
                sums_in_act(a->dialect)
                    ? act_tolerance(n, act, r->sum[h])
                    : xp_ref_round_err(act, value[h], xp_ref_sum_err(roundings, xp_ref_op(act), r->sum[h], weighed));
    }
}

/* dw: H products, each one rounding in the accumulator that may also lose half its smallest value, and H-1 additions in
 * any order: gamma_H sum |drows x|; stored in the accumulator's dtype, one more rounding. */
static void dw_tolerance(const xp_permute_bwd_args *a, const bwd_rows *r, const xp_tensor *ref, xp_tensor *tol) {
    const int64_t width = a->drows.dim[1];
    const xp_dtype acc = xp_ref_op(a->drows.dtype);
    for (int64_t t = 0; t < a->pos.dim[0]; t++) {
        if (width > 0)
            xp_ref_rows_load(&a->x, t, 1, r->x);
        for (int64_t k = 0; k < a->pos.dim[1]; k++) {
            const double gauge = row_dot(a, t, k, 1, r), value = *(const double *)xp_tensor_at(ref, t, k, 0, 0);
            const double e = xp_ref_i32(&a->pos, t, k) < 0 ? 0.0 : xp_ref_sum_err(width, acc, gauge, width);
            *(double *)xp_tensor_at(tol, t, k, 0, 0) = xp_ref_round_err(acc, value, e);
        }
    }
}

static xp_status permute_bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                                   xp_tensor *tol) {
    const xp_permute_bwd_args *a = args;
    const bwd_rows r = bwd_plan(a, ws);
    (void)m;
    if (operand == PERMUTE_BWD_DX)
        dx_tolerance(a, &r, ref, tol);
    else if (operand == PERMUTE_BWD_DW)
        dw_tolerance(a, &r, ref, tol);
    else
        return XP_FAIL(XP_E_BUG, "permute_bwd: operand %d has no bound", operand);
    return XP_OK;
}

static int64_t permute_bwd_extent(const void *args) {
    return ((const xp_permute_bwd_args *)args)->pos.dim[0];
}

static void permute_bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_permute_bwd_args *a = args;
    xp_permute_bwd_args *s = out;
    s->pos = xp_tensor_rows(&a->pos, 0, lo, hi);
    s->dx = xp_tensor_rows(&a->dx, 0, lo, hi);
    if (!weighs_input(a->dialect))
        return;
    s->w = xp_tensor_rows(&a->w, 0, lo, hi);
    s->x = xp_tensor_rows(&a->x, 0, lo, hi);
    s->dw = xp_tensor_rows(&a->dw, 0, lo, hi);
}

const xp_stage xp_stage_permute_bwd = {
    .name = "permute_bwd",
    .meaning = "a token's gradient: the sum of its copies' gradients, and that of weights on the experts' input",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_permute_bwd_args),
    .operand = permute_bwd_operand,
    .operands = sizeof permute_bwd_operand / sizeof *permute_bwd_operand,
    .param = permute_bwd_param,
    .params = sizeof permute_bwd_param / sizeof *permute_bwd_param,
    .check = permute_bwd_check,
    .cost = permute_bwd_cost,
    .bound = permute_bwd_bound,
    .bound_workspace = permute_bwd_workspace,
    .extent = permute_bwd_extent,
    .slice = permute_bwd_slice,
    .chain = "layer",
    .wants = permute_bwd_wants,
};

const xp_kernel xp_ref_permute_bwd = {
    .stage = &xp_stage_permute_bwd,
    .name = "slot_sum",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = permute_bwd_workspace,
    .run = permute_bwd_run,
};
