/* Stages embed and embed_bwd: see xp/embed.h for the meaning.
 *
 * Forward: one addition and one rounding an element. Backward: rows of the table that no token of a block named are
 * zeros, never left unwritten. Must not sum across blocks. */
#include "xp/embed.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "token.h"

/* ---- operands and parameters ---- */

enum { EMBED_Y = 3, BWD_DTABLE = 2 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_embed_args, token, "T", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_embed_args, table, "V,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    XP_OPERAND(xp_embed_args, pos, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [EMBED_Y] = XP_OPERAND(xp_embed_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_embed_bwd_args, token, "T", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_embed_bwd_args, dy, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    [BWD_DTABLE] = XP_OPERAND(xp_embed_bwd_args, dtable, "B,V,H", XP_OUT, XP_DT_ACT, XP_BOUND, "grad"),
};

static const xp_param bwd_params[] = {
    {"token0", NULL, "0", XP_P_I64, offsetof(xp_embed_bwd_args, token0)},
    {"block", NULL, "0", XP_P_I64, offsetof(xp_embed_bwd_args, block)},
};

/* ---- check ---- */

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_embed_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_embed, args, &d));
    return xp_ref_ids_check("embed", "token", &a->token, 0, XP_REF_DIM(d, 'V'), "V");
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_embed_bwd_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_embed_bwd, args, &d));
    XP_TRY(xp_ref_blocks_check("embed_bwd", a->token0, a->block, XP_REF_DIM(d, 'T')));
    const int64_t B = xp_ref_blocks(a->token0, a->block, XP_REF_DIM(d, 'T'));
    if (XP_REF_DIM(d, 'B') != B)
        return XP_FAIL(XP_E_ARG, "embed_bwd: dtable dim 0 is %lld, expected B = %lld blocks from token0 %lld",
                       (long long)XP_REF_DIM(d, 'B'), (long long)B, (long long)a->token0);
    return xp_ref_ids_check("embed_bwd", "token", &a->token, 0, XP_REF_DIM(d, 'V'), "V");
}

/* ---- cost ---- */

/* Rows of the table that are read: one a token. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_embed_args *a = args;
    const int64_t T = a->y.dim[0], H = a->y.dim[1];
    *out = (xp_cost){.flop = (double)(T * H),
                     .mem_bytes = (double)xp_dtype_bytes(XP_I32, T) + (double)xp_dtype_bytes(a->table.dtype, T * H) +
                                  2.0 * (double)xp_dtype_bytes(a->y.dtype, T * H)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_embed_bwd_args *a = args;
    *out =
        (xp_cost){.flop = (double)(a->dy.dim[0] * a->dy.dim[1]), .mem_bytes = xp_ref_bytes(&xp_stage_embed_bwd, args)};
}

/* ---- bound ---- */

/* One addition in op on one side, in double on the other, then one rounding: err.h. Addition never underflows. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)ws;
    const xp_embed_args *a = args;
    const xp_tensor *const all[] = {&a->table, &a->pos, &a->y};
    const xp_dtype op = xp_ref_op_of(all, 3);
    if (operand != EMBED_Y)
        return XP_FAIL(XP_E_BUG, "embed: operand %d has no bound", operand);
    for (int64_t t = 0; t < tol->dim[0]; t++) {
        for (int64_t h = 0; h < tol->dim[1]; h++) {
            const double v = *(const double *)xp_tensor_at(ref, t, h, 0, 0);
            const xp_ref_val sum = {v, xp_ref_room(XP_F64, fabs(v))};
            *(double *)xp_tensor_at(tol, t, h, 0, 0) = xp_ref_val_out(sum, a->y.dtype, op);
        }
    }
    return XP_OK;
}

/* 1 when no token of [lo, lead) is the token of lead: it is the first of its kind in its block. */
static int is_lead(const xp_tensor *token, int64_t lo, int64_t lead) {
    for (int64_t t = lo; t < lead; t++) {
        if (xp_ref_i32(token, t, 0) == xp_ref_i32(token, lead, 0))
            return 0;
    }
    return 1;
}

/* sum = the block's rows of dy (or their magnitudes) with lead's token, ascending; returns how many. */
static int64_t rows_sum(const xp_embed_bwd_args *a, int64_t lead, int64_t hi, int absolute, double *row, double *sum) {
    const int64_t H = a->dy.dim[1];
    int64_t n = 0;
    memset(sum, 0, (size_t)H * sizeof *sum);
    for (int64_t t = lead; t < hi; t++) {
        if (xp_ref_i32(&a->token, t, 0) != xp_ref_i32(&a->token, lead, 0))
            continue;
        xp_widen_row(a->dy.data, a->dy.dtype, t * a->dy.stride[0], H, row);
        for (int64_t h = 0; h < H; h++)
            sum[h] += absolute ? fabs(row[h]) : row[h];
        n++;
    }
    return n;
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_embed_bwd_args *a = args;
    return 2 * xp_ref_span((size_t)a->dy.dim[1] * sizeof(double));
}

static void rows_clear(const xp_tensor *t) {
    for (int64_t b = 0; b < t->dim[0]; b++) {
        for (int64_t v = 0; v < t->dim[1] && t->dim[2] > 0; v++)
            memset(xp_tensor_at(t, b, v, 0, 0), 0, xp_dtype_bytes(t->dtype, t->dim[2]));
    }
}

/* n rows in one sum: gamma_(n-1) of the gauge sum |dy| in op, and in double, then one rounding. A row of the table that
 * no token names is exactly 0. */
static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    const xp_embed_bwd_args *a = args;
    const int64_t T = a->dy.dim[0], H = a->dy.dim[1];
    const xp_tensor *const all[] = {&a->dy, &a->dtable};
    const xp_dtype op = xp_ref_op_of(all, 2);
    char *at = ws;
    double *row = xp_ref_carve(&at, (size_t)H * sizeof *row), *gauge = xp_ref_carve(&at, (size_t)H * sizeof *gauge);
    if (operand != BWD_DTABLE)
        return XP_FAIL(XP_E_BUG, "embed_bwd: operand %d has no bound", operand);
    rows_clear(tol);
    for (int64_t b = 0; b < tol->dim[0]; b++) {
        int64_t lo, hi;
        xp_ref_block_tokens(a->token0, a->block, T, b, &lo, &hi);
        for (int64_t t = lo; t < hi; t++) {
            if (!is_lead(&a->token, lo, t))
                continue;
            const int64_t n = rows_sum(a, t, hi, 1, row, gauge), v = xp_ref_i32(&a->token, t, 0);
            for (int64_t h = 0; h < H; h++) {
                const double value = *(const double *)xp_tensor_at(ref, b, v, h, 0);
                const double e =
                    isinf(xp_ref_round(gauge[h], op)) ? (double)INFINITY : xp_ref_sum_err(n - 1, op, gauge[h], 0);
                *(double *)xp_tensor_at(tol, b, v, h, 0) = xp_ref_val_out((xp_ref_val){value, e}, a->dtable.dtype, op);
            }
        }
    }
    return XP_OK;
}

/* ---- reference ---- */

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_embed_args *a = args;
    return 2 * xp_ref_span((size_t)a->y.dim[1] * sizeof(double));
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_embed_args *a = args;
    const int64_t T = a->y.dim[0], H = a->y.dim[1];
    char *at = x->ws;
    double *row = xp_ref_carve(&at, (size_t)H * sizeof *row), *pos = xp_ref_carve(&at, (size_t)H * sizeof *pos);
    for (int64_t t = 0; t < T; t++) {
        xp_widen_row(a->table.data, a->table.dtype, xp_ref_i32(&a->token, t, 0) * a->table.stride[0], H, row);
        xp_widen_row(a->pos.data, a->pos.dtype, t * a->pos.stride[0], H, pos);
        for (int64_t h = 0; h < H; h++)
            row[h] += pos[h];
        xp_ref_store_row(a->y.data, a->y.dtype, t * a->y.stride[0], H, row);
    }
    return XP_OK;
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_embed_bwd_args *a = args;
    const int64_t T = a->dy.dim[0], H = a->dy.dim[1];
    char *at = x->ws;
    double *row = xp_ref_carve(&at, (size_t)H * sizeof *row), *sum = xp_ref_carve(&at, (size_t)H * sizeof *sum);
    rows_clear(&a->dtable);
    for (int64_t b = 0; b < a->dtable.dim[0]; b++) {
        int64_t lo, hi;
        xp_ref_block_tokens(a->token0, a->block, T, b, &lo, &hi);
        for (int64_t t = lo; t < hi; t++) {
            if (!is_lead(&a->token, lo, t))
                continue;
            rows_sum(a, t, hi, 0, row, sum);
            const int64_t v = xp_ref_i32(&a->token, t, 0);
            xp_ref_store_row(a->dtable.data, a->dtable.dtype, b * a->dtable.stride[0] + v * a->dtable.stride[1], H,
                             sum);
        }
    }
    return XP_OK;
}

/* ---- data, slices ---- */

static void tokens_fill(const xp_tensor *token, const xp_tensor *like, int64_t V, uint64_t seed) {
    for (int64_t t = 0; t < token->dim[0] && V > 0; t++)
        *(int32_t *)xp_tensor_at(token, t, 0, 0, 0) =
            (int32_t)(xp_ref_row_word(xp_tensor_at(like, t, 0, 0, 0), like->dtype, like->dim[1], seed) % (uint64_t)V);
}

static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    (void)m;
    (void)data;
    const xp_embed_args *a = args;
    tokens_fill(&a->token, &a->pos, a->table.dim[0], seed);
    return XP_OK;
}

static xp_status bwd_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    (void)m;
    (void)data;
    const xp_embed_bwd_args *a = args;
    tokens_fill(&a->token, &a->dy, a->dtable.dim[1], seed);
    return XP_OK;
}

static int64_t extent(const void *args) {
    return ((const xp_embed_args *)args)->y.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_embed_args *a = args;
    xp_embed_args *o = out;
    o->token = xp_tensor_rows(&a->token, 0, lo, hi);
    o->pos = xp_tensor_rows(&a->pos, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
}

/* Columns: every token may reach every row of the table, but no column reaches another. */
static int64_t bwd_extent(const void *args) {
    return ((const xp_embed_bwd_args *)args)->dy.dim[1];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_embed_bwd_args *a = args;
    xp_embed_bwd_args *o = out;
    o->dy = xp_tensor_rows(&a->dy, 1, lo, hi);
    o->dtable = xp_tensor_rows(&a->dtable, 2, lo, hi);
}

/* ---- stages and rows ---- */

const xp_stage xp_stage_embed = {
    .name = "embed",
    .meaning = "input rows: the token's row of the table plus its position's row",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_embed_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .check = check,
    .cost = cost,
    .bound = bound,
    .fill = fill,
    .extent = extent,
    .slice = slice,
};

const xp_stage xp_stage_embed_bwd = {
    .name = "embed_bwd",
    .meaning = "gradient of the table: rows of dy summed by token, a sum a block",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_embed_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .param = bwd_params,
    .params = sizeof bwd_params / sizeof *bwd_params,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_workspace,
    .fill = bwd_fill,
    .extent = bwd_extent,
    .slice = bwd_slice,
};

const xp_kernel xp_ref_embed = {
    .stage = &xp_stage_embed,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_embed_bwd = {
    .stage = &xp_stage_embed_bwd,
    .name = "ref",
    .det = XP_DET_RUN,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
