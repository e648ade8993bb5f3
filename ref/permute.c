/* Stages permute and permute_bwd: a token's K copies, sorted by expert, and the sum of their gradients.
 *
 * A counting sort: count, place the segments, then deal rows in the stated order, so equal experts keep that order and
 * a token that names an expert twice keeps both rows. Contract: xp/permute.h. No arithmetic forward: bits are copied.
 * Must not write a row at offsets[E] or behind it. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "move.h"
#include "num.h"
#include "ref.h"
#include "xp/permute.h"

/* ---- permute ---- */

static const xp_operand permute_operand[] = {
    XP_OPERAND(xp_permute_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_permute_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_permute_args, rows, "M,H", XP_OUT, XP_DT_ACT, XP_BITS, "act"),
    XP_OPERAND(xp_permute_args, tok, "M", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, src, "M", XP_OUT, XP_BIT(XP_I32), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, pos, "T,K", XP_OUT, XP_BIT(XP_I32), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, counts, "E", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPERAND(xp_permute_args, offsets, "E+1", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
};

static const xp_param permute_param[] = {
    {"order", "slot_token|token", "slot_token", XP_P_WORD, offsetof(xp_permute_args, order)},
    {"align", NULL, "1", XP_P_INT, offsetof(xp_permute_args, align)},
};

static int32_t i32_at(const xp_tensor *t, int64_t i, int64_t j) {
    return *(const int32_t *)xp_tensor_at(t, i, j, 0, 0);
}

static void i32_set(const xp_tensor *t, int64_t i, int64_t j, int64_t v) {
    *(int32_t *)xp_tensor_at(t, i, j, 0, 0) = (int32_t)v;
}

static void i64_set(const xp_tensor *t, int64_t i, int64_t v) {
    *(int64_t *)xp_tensor_at(t, i, 0, 0, 0) = v;
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
    if (room > INT32_MAX)
        return XP_FAIL(XP_E_ARG, "permute: M is %lld, expected at most %d, the largest i32 row number", (long long)room,
                       INT32_MAX);
    if (room < tokens * slots + experts * (a->align - 1))
        return XP_FAIL(XP_E_ARG, "permute: M is %lld, expected at least T*K + E*(align-1) = %lld", (long long)room,
                       (long long)(tokens * slots + experts * (a->align - 1)));
    for (int64_t t = 0; t < tokens && xp_ref_readable(&a->idx); t++) {
        for (int64_t k = 0; k < slots; k++) {
            const int32_t e = i32_at(&a->idx, t, k);
            if (e < 0 || e >= experts)
                return XP_FAIL(XP_E_ARG, "permute: idx[%lld][%lld] is %d, expected 0 to E-1 = %lld", (long long)t,
                               (long long)k, e, (long long)experts - 1);
        }
    }
    return XP_OK;
}

static void permute_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_permute_args *a = args;
    const double copies = (double)(a->idx.dim[0] * a->idx.dim[1]);
    const double row = (double)xp_dtype_bytes(a->x.dtype, a->x.dim[1]);
    (void)m;
    /* each copy: its idx and pos (4 + 4), its row with tok and src (8 + 4); each expert: count and offset */
    *out = (xp_cost){.flop = 0.0,
                     .mem_bytes = (double)a->x.dim[0] * row + copies * (row + 20.0) + 16.0 * (double)a->counts.dim[0],
                     .net_bytes = 0.0};
}

static size_t permute_workspace(const void *args, const xp_mesh *m) {
    const xp_permute_args *a = args;
    (void)m;
    return (size_t)a->counts.dim[0] * sizeof(int64_t);
}

/* Counts, offsets, and the row where each expert's next copy goes. */
static void segments_place(const xp_permute_args *a, int64_t *next) {
    const int64_t experts = a->counts.dim[0];
    int64_t row = 0;
    memset(next, 0, (size_t)experts * sizeof *next);
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++)
            next[i32_at(&a->idx, t, k)]++;
    }
    for (int64_t e = 0; e < experts; e++) {
        const int64_t n = next[e];
        i64_set(&a->counts, e, n);
        i64_set(&a->offsets, e, row);
        next[e] = row;
        row += (n + a->align - 1) / a->align * a->align;
    }
    i64_set(&a->offsets, experts, row);
}

static void copy_place(const xp_permute_args *a, int64_t t, int64_t k, int64_t *next) {
    const int64_t row = next[i32_at(&a->idx, t, k)]++;
    const size_t bytes = xp_dtype_bytes(a->x.dtype, a->x.dim[1]);
    if (bytes > 0)
        memcpy(xp_tensor_at(&a->rows, row, 0, 0, 0), xp_tensor_at(&a->x, t, 0, 0, 0), bytes);
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
    int64_t *next = x->ws;
    segments_place(a, next);
    if (a->order == XP_ORDER_SLOT_TOKEN) {
        for (int64_t k = 0; k < slots; k++) {
            for (int64_t t = 0; t < tokens; t++)
                copy_place(a, t, k, next);
        }
    } else {
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t k = 0; k < slots; k++)
                copy_place(a, t, k, next);
        }
    }
    pads_place(a, next);
    return XP_OK;
}

/* Counts add up to T*K; each segment starts where the one before, rounded up, ends. 2 for each departure. */
static xp_status permute_segments(const void *args, const xp_mesh *m, double *out) {
    const xp_permute_args *a = args;
    int64_t sum = 0, row = 0, wrong = 0;
    (void)m;
    for (int64_t e = 0; e < a->counts.dim[0]; e++) {
        const int64_t n = xp_ref_i64(&a->counts, e);
        wrong += n < 0 || xp_ref_i64(&a->offsets, e) != row;
        sum += n;
        row += (n + a->align - 1) / a->align * a->align;
    }
    wrong += sum != a->idx.dim[0] * a->idx.dim[1] || xp_ref_i64(&a->offsets, a->counts.dim[0]) != row;
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

/* pos and src undo one another, and a slot's row lies in the segment of the slot's expert, so that with the sum of the
 * counts the rows are a permutation of the slots. 2 for each departure. */
static xp_status permute_inverse(const void *args, const xp_mesh *m, double *out) {
    const xp_permute_args *a = args;
    int64_t wrong = 0;
    (void)m;
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            const int64_t row = i32_at(&a->pos, t, k), e = i32_at(&a->idx, t, k), lo = xp_ref_i64(&a->offsets, e);
            if (row < lo || row >= lo + xp_ref_i64(&a->counts, e) || row >= a->tok.dim[0])
                wrong++;
            else
                wrong += i32_at(&a->src, row, 0) != t * a->idx.dim[1] + k || xp_ref_i64(&a->tok, row) != a->token0 + t;
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

static const xp_operand permute_bwd_operand[] = {
    XP_OPERAND(xp_permute_bwd_args, drows, "M,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_permute_bwd_args, pos, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_permute_bwd_args, dx, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static xp_status permute_bwd_check(const void *args, const xp_mesh *m) {
    const xp_permute_bwd_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_permute_bwd, args, &d));
    for (int64_t t = 0; t < XP_REF_DIM(d, 'T') && xp_ref_readable(&a->pos); t++) {
        for (int64_t k = 0; k < XP_REF_DIM(d, 'K'); k++) {
            const int32_t row = i32_at(&a->pos, t, k);
            if (row < 0 || row >= XP_REF_DIM(d, 'M'))
                return XP_FAIL(XP_E_ARG, "permute_bwd: pos[%lld][%lld] is %d, expected 0 to M-1 = %lld", (long long)t,
                               (long long)k, row, (long long)XP_REF_DIM(d, 'M') - 1);
        }
    }
    return XP_OK;
}

static void permute_bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_permute_bwd_args *a = args;
    const double tokens = (double)a->pos.dim[0], slots = (double)a->pos.dim[1], width = (double)a->drows.dim[1];
    const double row = (double)xp_dtype_bytes(a->drows.dtype, a->drows.dim[1]);
    (void)m;
    *out = (xp_cost){.flop = slots > 1.0 ? tokens * (slots - 1.0) * width : 0.0,
                     .mem_bytes = tokens * (slots * (row + 4.0) + row),
                     .net_bytes = 0.0};
}

static size_t permute_bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_permute_bwd_args *a = args;
    (void)m;
    return 2 * xp_ref_span((size_t)a->drows.dim[1] * sizeof(double));
}

/* sum[h] = sum over slots of drows[pos[t][k]][h], or of its magnitude. */
static void slots_sum(const xp_permute_bwd_args *a, int64_t t, int absolute, double *sum, double *row) {
    const int64_t width = a->drows.dim[1];
    memset(sum, 0, (size_t)width * sizeof *sum);
    for (int64_t k = 0; k < a->pos.dim[1]; k++) {
        xp_widen_row(xp_tensor_at(&a->drows, i32_at(&a->pos, t, k), 0, 0, 0), a->drows.dtype, 0, width, row);
        for (int64_t h = 0; h < width; h++)
            sum[h] += absolute ? fabs(row[h]) : row[h];
    }
}

static xp_status permute_bwd_run(const xp_exec *x, const void *args) {
    const xp_permute_bwd_args *a = args;
    const int64_t width = a->drows.dim[1];
    char *at = x->ws;
    double *sum = xp_ref_carve(&at, (size_t)width * sizeof *sum), *row = (double *)(void *)at;
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        slots_sum(a, t, 0, sum, row);
        xp_ref_store_row(xp_tensor_at(&a->dx, t, 0, 0, 0), a->dx.dtype, 0, width, sum);
    }
    return XP_OK;
}

/* dx is a sum of K terms that are exact in the accumulator (f32, or f64 when act is f64): K-1 additions in any order
 * give gamma_(K-1) times the sum of magnitudes, and the result is rounded once to act. */
static xp_status permute_bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                                   xp_tensor *tol) {
    const xp_permute_bwd_args *a = args;
    const int64_t width = a->drows.dim[1], slots = a->pos.dim[1];
    const xp_dtype act = a->drows.dtype;
    char *at = ws;
    double *gauge = xp_ref_carve(&at, (size_t)width * sizeof *gauge), *row = (double *)(void *)at;
    (void)m;
    (void)operand;
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        const double *value = xp_tensor_at(ref, t, 0, 0, 0);
        double *out = xp_tensor_at(tol, t, 0, 0, 0);
        slots_sum(a, t, 1, gauge, row);
        for (int64_t h = 0; h < width; h++) {
            const double e = xp_ref_sum_err(slots > 0 ? slots - 1 : 0, xp_ref_acc(act), gauge[h], 0);
            out[h] = xp_ref_round_err(act, value[h], e);
        }
    }
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
}

const xp_stage xp_stage_permute_bwd = {
    .name = "permute_bwd",
    .meaning = "a token's gradient: the sum of its copies' gradients",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_permute_bwd_args),
    .operand = permute_bwd_operand,
    .operands = sizeof permute_bwd_operand / sizeof *permute_bwd_operand,
    .check = permute_bwd_check,
    .cost = permute_bwd_cost,
    .bound = permute_bwd_bound,
    .bound_workspace = permute_bwd_workspace,
    .extent = permute_bwd_extent,
    .slice = permute_bwd_slice,
    .chain = "layer",
};

const xp_kernel xp_ref_permute_bwd = {
    .stage = &xp_stage_permute_bwd,
    .name = "slot_sum",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = permute_bwd_workspace,
    .run = permute_bwd_run,
};
