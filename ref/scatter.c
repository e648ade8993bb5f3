/* Stage scatter: sum a gradient over an axis and leave each rank its rows, divided once.
 *
 * Row ranges may tile the parameter (reduce-scatter), be the whole of it on every rank (all-reduce) or anything between
 * (HSDP), so the ranks exchange raw partial sums and every rank folds its own rows in the stated order. A round moves
 * one part from each sending rank: all ranks at once by default, one block at a time in deterministic mode, where the
 * next block is the lowest that any rank still has. Contract: xp/scatter.h. Must not round where the contract does not,
 * skip a round on a rank without rows, or add to a shard that holds nothing yet. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "move.h"
#include "num.h"
#include "ref.h"
#include "xp/scatter.h"

enum { SCATTER_SHARD = 2 };
static const xp_operand scatter_operand[] = {
    XP_OPERAND(xp_scatter_args, grad, "B,G,R0,N", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "grad"),
    XP_OPTIONAL(xp_scatter_args, blocks, "B", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    [SCATTER_SHARD] = XP_OPERAND(xp_scatter_args, shard, "G,R,N", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    XP_OPTIONAL(xp_scatter_args, base, "G,R,N", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
};

static const xp_param scatter_param[] = {
    {"axis", "dp|fsdp|ep|ep_fsdp|ep_dp|edp|world", "world", XP_P_WORD, offsetof(xp_scatter_args, axis)},
    {"reduce_dtype", NULL, "f32", XP_P_DTYPE, offsetof(xp_scatter_args, reduce_dtype)},
    {"divisor", NULL, "1", XP_P_F64, offsetof(xp_scatter_args, divisor)},
    {"pre", NULL, "1", XP_P_F64, offsetof(xp_scatter_args, pre)},
    {"fold_blocks", "off|on", "off", XP_P_WORD, offsetof(xp_scatter_args, fold_blocks)},
};

/* What the contract calls f32, or f64 when grad is f64. */
static xp_dtype fold_dtype(const xp_scatter_args *a) {
    return xp_ref_op(a->grad.dtype);
}

/* What each part is multiplied by before the fold. */
static double factor_of(const xp_scatter_args *a) {
    return a->pre == 0.0 || a->pre == 1.0 ? 1.0 : xp_ref_round(1.0 / a->pre, a->reduce_dtype);
}

/* ---- check ---- */

static xp_status ranges_check(const xp_scatter_args *a, const xp_comm *c) {
    const int64_t rows0 = a->grad.dim[2];
    for (int r = 0; r < c->size; r++) {
        if (a->rows[r] < 0 || a->rows[r] > rows0)
            return XP_FAIL(XP_E_ARG, "scatter: rows[%d] is %lld, expected 0 to R0 = %lld", r, (long long)a->rows[r],
                           (long long)rows0);
        if (a->start[r] < 0 || a->start[r] > rows0 - a->rows[r])
            return XP_FAIL(XP_E_ARG, "scatter: start[%d] is %lld, expected 0 to R0 - rows[%d] = %lld", r,
                           (long long)a->start[r], r, (long long)(rows0 - a->rows[r]));
    }
    for (int64_t next = 0, end = 0; next < rows0; next = end) {
        for (int r = 0; r < c->size; r++) {
            if (a->start[r] <= next && a->start[r] + a->rows[r] > end)
                end = a->start[r] + a->rows[r];
        }
        if (end == next)
            return XP_FAIL(XP_E_ARG,
                           "scatter: row %lld of grad belongs to no rank, expected start and rows to cover %lld",
                           (long long)next, (long long)rows0);
    }
    return XP_OK;
}

static xp_status dtypes_check(const xp_scatter_args *a) {
    const xp_dtype wide = fold_dtype(a), r = a->reduce_dtype;
    const int narrow = wide == XP_F32 && !a->fold_blocks && (r == XP_BF16 || r == XP_F16);
    const char *name = xp_dtype_name(r);
    if (r != wide && !narrow)
        return XP_FAIL(XP_E_ARG, "scatter: reduce_dtype is %s, expected %s with grad %s%s", name ? name : "?",
                       wide == XP_F64 ? "f64" : (a->fold_blocks ? "f32" : "f32, bf16 or f16"),
                       xp_dtype_name(a->grad.dtype), a->fold_blocks ? " and fold_blocks" : "");
    if (a->shard.dtype != wide)
        return XP_FAIL(XP_E_ARG, "scatter: shard has dtype %s, expected %s with grad %s", xp_dtype_name(a->shard.dtype),
                       xp_dtype_name(wide), xp_dtype_name(a->grad.dtype));
    return XP_OK;
}

static xp_status blocks_check(const xp_scatter_args *a) {
    const int64_t blocks = a->grad.dim[0];
    if (a->fold_blocks != 0 && a->fold_blocks != 1)
        return XP_FAIL(XP_E_ARG, "scatter: fold_blocks is %d, expected 0 or 1", a->fold_blocks);
    if (!a->fold_blocks && blocks != 1)
        return XP_FAIL(XP_E_ARG, "scatter: grad dim 0 is %lld, expected B = 1 without fold_blocks", (long long)blocks);
    if (a->fold_blocks && !a->blocks.data && blocks > 0)
        return XP_FAIL(XP_E_ARG, "scatter: blocks is absent, expected [B] with fold_blocks");
    if (!a->fold_blocks && a->blocks.data)
        return XP_FAIL(XP_E_ARG, "scatter: blocks is present, expected none without fold_blocks");
    for (int64_t b = 0; a->fold_blocks && b < blocks && xp_ref_readable(&a->blocks); b++) {
        const int64_t n = xp_ref_i64(&a->blocks, b), last = b > 0 ? xp_ref_i64(&a->blocks, b - 1) : -1;
        if (n <= last || n == INT64_MAX)
            return XP_FAIL(XP_E_ARG, "scatter: blocks[%lld] is %lld, expected more than %lld (ascending, from 0)",
                           (long long)b, (long long)n, (long long)last);
    }
    return XP_OK;
}

static xp_status scatter_check(const void *args, const xp_mesh *m) {
    const xp_scatter_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_scatter, args, &d));
    if (a->axis < 0 || a->axis >= XP_NAXIS)
        return XP_FAIL(XP_E_ARG, "scatter: axis is %d, expected an axis of the mesh (0 to %d)", (int)a->axis,
                       XP_NAXIS - 1);
    const xp_comm *c = m->axis[a->axis];
    if (!a->start || !a->rows)
        return XP_FAIL(XP_E_ARG, "scatter: %s is absent, expected %d row numbers", a->start ? "rows" : "start",
                       c->size);
    XP_TRY(ranges_check(a, c));
    if (XP_REF_DIM(d, 'R') != a->rows[c->rank])
        return XP_FAIL(XP_E_ARG, "scatter: shard dim 1 is %lld, expected rows[%d] = %lld",
                       (long long)XP_REF_DIM(d, 'R'), c->rank, (long long)a->rows[c->rank]);
    if (!(a->divisor > 0.0) || !isfinite((float)a->divisor) || !((float)a->divisor > 0.0f))
        return XP_FAIL(XP_E_ARG, "scatter: divisor is %g, expected > 0 and finite as f32", a->divisor);
    XP_TRY(dtypes_check(a));
    if (!(a->pre >= 0.0) || !(factor_of(a) > 0.0) || !isfinite(factor_of(a)))
        return XP_FAIL(XP_E_ARG,
                       "scatter: pre is %g, expected 0, or a number whose inverse is above 0 and finite in %s", a->pre,
                       xp_dtype_name(a->reduce_dtype));
    if (factor_of(a) != 1.0 && a->fold_blocks)
        return XP_FAIL(XP_E_ARG, "scatter: pre is %g, expected 1 with fold_blocks", a->pre);
    return blocks_check(a);
}

/* ---- cost ---- */

static int64_t rows_sum(const xp_scatter_args *a, const xp_comm *c) {
    int64_t sum = 0;
    for (int r = 0; r < c->size; r++)
        sum += a->rows[r];
    return sum;
}

static void scatter_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_scatter_args *a = args;
    const xp_comm *c = m->axis[a->axis];
    const double each = (double)xp_dtype_bytes(a->grad.dtype, 1), parts = (double)(a->grad.dim[0] * a->grad.dim[1]);
    const double columns = (double)a->grad.dim[3], own = (double)a->rows[c->rank];
    const double groups = (double)a->grad.dim[1];
    *out = (xp_cost){.flop = groups * own * columns * (a->fold_blocks ? (double)a->grad.dim[0] + 1.0 : c->size),
                     .mem_bytes =
                         parts * (double)a->grad.dim[2] * columns * each +
                         groups * own * columns * (a->base.data ? 2.0 : 1.0) * (double)xp_dtype_bytes(fold_dtype(a), 1),
                     .net_bytes = parts * ((double)rows_sum(a, c) - own) * columns * each};
}

/* ---- rounds ---- */

/* Groups that travel together: about 8 MiB, at least one. The same on every rank of the axis. */
static int64_t chunk_groups(const xp_scatter_args *a, const xp_comm *c) {
    const int64_t most = (int64_t)8 << 20, groups = a->grad.dim[1];
    const int64_t bytes = (int64_t)xp_dtype_bytes(a->grad.dtype, rows_sum(a, c) * a->grad.dim[3]);
    const int64_t n = bytes > 0 ? most / bytes : groups;
    return n < 1 ? 1 : (n < groups ? n : groups);
}

/* Rows arrive from as many ranks as send at once: all of them, or one in deterministic mode. */
static int64_t arriving_rows(const xp_scatter_args *a, const xp_comm *c) {
    return chunk_groups(a, c) * a->rows[c->rank] * (a->fold_blocks ? 1 : c->size);
}

static size_t scatter_workspace(const void *args, const xp_mesh *m) {
    const xp_scatter_args *a = args;
    const xp_comm *c = m->axis[a->axis];
    const size_t columns = (size_t)a->grad.dim[3];
    return 3 * xp_ref_span((size_t)c->size * sizeof(int64_t)) + 2 * xp_ref_span(columns * sizeof(double)) +
           xp_ref_span(xp_dtype_bytes(a->grad.dtype, chunk_groups(a, c) * rows_sum(a, c) * a->grad.dim[3])) +
           xp_ref_span(xp_dtype_bytes(a->grad.dtype, arriving_rows(a, c) * a->grad.dim[3]));
}

/* A fold under way. `acc` is [G,R,N] f32 or f64 and always holds values of `wide`. */
typedef struct {
    const xp_scatter_args *a;
    xp_comm *c;
    xp_queue *q;
    const xp_tensor *acc;
    xp_dtype wide;
    double factor; /* of a part on its way in */
    int absolute;  /* 1: magnitudes are summed (for the bound) */
    int64_t parts; /* folded so far */
    int64_t *send_rows, *recv_rows, *heads;
    double *sum, *row;
    char *sent, *got;
} fold;

static fold fold_of(const xp_scatter_args *a, const xp_mesh *m, xp_queue *q, void *ws, const xp_tensor *acc,
                    xp_dtype wide, int absolute) {
    xp_comm *c = m->axis[a->axis];
    const size_t ranks = (size_t)c->size * sizeof(int64_t), columns = (size_t)a->grad.dim[3] * sizeof(double);
    fold f = {.a = a, .c = c, .q = q, .acc = acc, .wide = wide, .absolute = absolute};
    f.factor = factor_of(a);
    char *at = ws;
    f.send_rows = xp_ref_carve(&at, ranks);
    f.recv_rows = xp_ref_carve(&at, ranks);
    f.heads = xp_ref_carve(&at, ranks);
    f.sum = xp_ref_carve(&at, columns);
    f.row = xp_ref_carve(&at, columns);
    f.sent = xp_ref_carve(&at, xp_dtype_bytes(a->grad.dtype, chunk_groups(a, c) * rows_sum(a, c) * a->grad.dim[3]));
    f.got = at;
    return f;
}

/* Rows of groups [g0, g1) of block b, as rank 0 wants them, then rank 1, ... */
static void part_pack(const fold *f, int64_t b, int64_t g0, int64_t g1) {
    const xp_scatter_args *a = f->a;
    const size_t bytes = xp_dtype_bytes(a->grad.dtype, a->grad.dim[3]);
    char *to = f->sent;
    for (int q = 0; q < f->c->size && bytes > 0; q++) {
        for (int64_t g = g0; g < g1; g++) {
            for (int64_t r = a->start[q]; r < a->start[q] + a->rows[q]; r++, to += bytes)
                memcpy(to, xp_tensor_at(&a->grad, b, g, r, 0), bytes);
        }
    }
}

/* row = r(row factor); magnitudes are not rounded. */
static void part_scale(const fold *f, int64_t columns) {
    for (int64_t n = 0; n < columns; n++)
        f->row[n] *= f->factor;
    if (!f->absolute)
        xp_ref_round_row(f->a->reduce_dtype, columns, f->row);
}

/* acc = v for the first part, else acc + v, rounded to wide. Blocks are added to +0: such a sum has no -0, whether or
 * not a block of zeros takes part. */
static void part_add(const fold *f, int64_t g0, int64_t g1, const char *part, int first) {
    const int64_t columns = f->a->grad.dim[3];
    const size_t bytes = xp_dtype_bytes(f->a->grad.dtype, columns);
    for (int64_t g = g0; g < g1; g++) {
        for (int64_t r = 0; r < f->acc->dim[1]; r++, part += bytes) {
            void *acc = xp_tensor_at(f->acc, g, r, 0, 0);
            xp_widen_row(part, f->a->grad.dtype, 0, columns, f->row);
            for (int64_t n = 0; n < columns && f->absolute; n++)
                f->row[n] = fabs(f->row[n]);
            if (f->factor != 1.0)
                part_scale(f, columns);
            if (!first) {
                xp_widen_row(acc, f->acc->dtype, 0, columns, f->sum);
                for (int64_t n = 0; n < columns; n++)
                    f->row[n] = f->sum[n] + f->row[n];
                xp_ref_round_row(f->wide, columns, f->row);
            }
            for (int64_t n = 0; n < columns && first && f->a->fold_blocks; n++)
                f->row[n] = 0.0 + f->row[n];
            xp_ref_store_row(acc, f->acc->dtype, 0, columns, f->row);
        }
    }
}

/* One part from `sender` (-1: from every rank), which is its block b; folded in rank order. */
static xp_status round_run(fold *f, int sender, int64_t b) {
    const xp_scatter_args *a = f->a;
    const int64_t columns = a->grad.dim[3], groups = a->grad.dim[1], step = chunk_groups(a, f->c);
    const int sends = sender < 0 || sender == f->c->rank;
    for (int64_t g0 = 0; g0 < groups; g0 += step) {
        const int64_t g1 = g0 + step < groups ? g0 + step : groups;
        int64_t out = 0, in = 0;
        for (int r = 0; r < f->c->size; r++) {
            f->send_rows[r] = sends ? (g1 - g0) * a->rows[r] : 0;
            f->recv_rows[r] = sender < 0 || sender == r ? (g1 - g0) * f->acc->dim[1] : 0;
            out += f->send_rows[r];
            in += f->recv_rows[r];
        }
        if (sends)
            part_pack(f, b, g0, g1);
        const xp_tensor src = xp_tensor_2d(f->sent, a->grad.dtype, out, columns);
        xp_tensor dst = xp_tensor_2d(f->got, a->grad.dtype, in, columns);
        XP_TRY(f->c->ops->all_to_all_v(f->c, f->q, &src, f->send_rows, &dst, f->recv_rows));
        const int64_t part_bytes = (int64_t)xp_dtype_bytes(a->grad.dtype, (g1 - g0) * f->acc->dim[1] * columns);
        const int parts = sender < 0 ? f->c->size : 1;
        for (int i = 0; i < parts && columns > 0; i++)
            part_add(f, g0, g1, f->got + i * part_bytes, f->parts + i == 0);
    }
    f->parts += sender < 0 ? f->c->size : 1;
    return XP_OK;
}

/* Every rank's lowest block that is not folded yet (INT64_MAX: none). */
static xp_status heads_exchange(fold *f, int64_t mine) {
    for (int r = 0; r < f->c->size; r++)
        f->recv_rows[r] = 1;
    const xp_tensor src = xp_tensor_1d(&mine, XP_I64, 1);
    xp_tensor dst = xp_tensor_1d(f->heads, XP_I64, f->c->size);
    return f->c->ops->all_gather(f->c, f->q, &src, f->recv_rows, &dst);
}

/* All blocks of all ranks in ascending number. Blocks ascend on each rank, so a number that two ranks have comes up as
 * the lowest of both at once, and every rank sees it. */
static xp_status blocks_fold(fold *f) {
    const int64_t blocks = f->a->grad.dim[0];
    for (int64_t b = 0;;) {
        int low = 0;
        XP_TRY(heads_exchange(f, b < blocks ? xp_ref_i64(&f->a->blocks, b) : INT64_MAX));
        for (int r = 1; r < f->c->size; r++) {
            if (f->heads[r] == f->heads[low] && f->heads[r] != INT64_MAX)
                return XP_FAIL(XP_E_ARG, "scatter: ranks %d and %d of %s both bring block %lld, expected one owner",
                               low, r, xp_axis_name(f->a->axis), (long long)f->heads[r]);
            if (f->heads[r] < f->heads[low])
                low = r;
        }
        if (f->heads[low] == INT64_MAX)
            return XP_OK;
        XP_TRY(round_run(f, low, b));
        b += low == f->c->rank;
    }
}

static void acc_clear(const fold *f) {
    for (int64_t g = 0; g < f->acc->dim[0]; g++) {
        for (int64_t r = 0; r < f->acc->dim[1] && f->acc->dim[2] > 0; r++)
            memset(xp_tensor_at(f->acc, g, r, 0, 0), 0, xp_dtype_bytes(f->acc->dtype, f->acc->dim[2]));
    }
}

/* acc = base, which counts as a part. */
static void base_take(fold *f) {
    const xp_tensor *base = &f->a->base;
    const int64_t columns = f->acc->dim[2];
    for (int64_t g = 0; g < f->acc->dim[0]; g++) {
        for (int64_t r = 0; r < f->acc->dim[1] && columns > 0; r++) {
            xp_widen_row(xp_tensor_at(base, g, r, 0, 0), base->dtype, 0, columns, f->row);
            for (int64_t n = 0; n < columns && f->absolute; n++)
                f->row[n] = fabs(f->row[n]);
            xp_ref_store_row(xp_tensor_at(f->acc, g, r, 0, 0), f->acc->dtype, 0, columns, f->row);
        }
    }
    f->parts++;
}

static xp_status parts_fold(fold *f) {
    if (f->a->base.data && (f->a->fold_blocks || f->absolute))
        base_take(f);
    XP_TRY(f->a->fold_blocks ? blocks_fold(f) : round_run(f, -1, 0));
    if (f->parts == 0)
        acc_clear(f);
    return XP_OK;
}

/* ---- kernel ---- */

/* The divisor as it is used: in f32, or as it is when grad is f64. */
static double divisor_of(const xp_scatter_args *a) {
    return fold_dtype(a) == XP_F64 ? a->divisor : (double)(float)a->divisor;
}

/* The quotient of two f32 values in double, rounded to f32 by the store, is the f32 division: 53 >= 2 * 24 + 2. */
static void shard_finish(const xp_scatter_args *a, double *row, double *base) {
    const double divisor = divisor_of(a);
    const int64_t columns = a->shard.dim[2];
    for (int64_t g = 0; g < a->shard.dim[0]; g++) {
        for (int64_t r = 0; r < a->shard.dim[1] && columns > 0; r++) {
            void *shard = xp_tensor_at(&a->shard, g, r, 0, 0);
            xp_widen_row(shard, a->shard.dtype, 0, columns, row);
            xp_ref_round_row(a->reduce_dtype, columns, row);
            if (a->base.data && !a->fold_blocks) {
                xp_widen_row(xp_tensor_at(&a->base, g, r, 0, 0), a->base.dtype, 0, columns, base);
                for (int64_t n = 0; n < columns; n++)
                    row[n] += base[n];
                xp_ref_round_row(fold_dtype(a), columns, row);
            }
            for (int64_t n = 0; n < columns; n++)
                row[n] /= divisor;
            xp_ref_store_row(shard, a->shard.dtype, 0, columns, row);
        }
    }
}

static xp_status scatter_run(const xp_exec *x, const void *args) {
    const xp_scatter_args *a = args;
    fold f = fold_of(a, x->mesh, x->q, x->ws, &a->shard, fold_dtype(a), 0);
    XP_TRY(parts_fold(&f));
    shard_finish(a, f.row, f.sum);
    return XP_OK;
}

/* ---- bound ---- */

/* n parts, S = sum over parts of |grad|, s the folded sum, d the divisor, u of f32 (f64 when grad is f64).
 * The reference folds in f32 too, so both it and an implementation are within gamma_(n-1) S of the exact sum: e = 2
 * gamma_(n-1) S apart (xp_ref_sum_err adds one in double for S's own rounding). Rounding to reduce_dtype happens on
 * either side, or on neither: twice half a unit of |s| + e, where |s| <= (|ref| d + half the smallest value) / (1 -
 * u_reduce), and |base| more. A base is one more part, and |base| belongs to S. With a factor S is that of |grad| c; a
 * term sees one rounding in f32 and one to reduce_dtype, or none, on either side, and may lose half the smallest value
 * of each: 2 (((1 + u)(1 + u_reduce) - 1) S + n lost), by half of which S grows for the fold. Division and store: at
 * most 4 ulp = 8 u of the quotient, or half the smallest value. */
static double shard_tolerance(const xp_scatter_args *a, int64_t parts, double value, double gauge, double base) {
    const xp_dtype wide = fold_dtype(a), reduce = a->reduce_dtype;
    const double d = divisor_of(a), u = xp_ref_unit(wide);
    double terms = 0.0;
    if (factor_of(a) != 1.0) {
        const double lost = xp_ref_half_ulp_err(reduce, 0.0) + xp_ref_half_ulp_err(wide, 0.0), ur = xp_ref_unit(reduce);
        terms = ((u + ur + u * ur) * gauge + (double)parts * lost) * (1.0 + 0x1p-50);
        gauge += terms;
        if (isinf(xp_ref_round(gauge, reduce)))
            return (double)INFINITY;
    }
    double e = 2.0 * (terms + xp_ref_sum_err(parts > 0 ? parts - 1 : 0, wide, gauge, 0)) * (1.0 + 0x1p-50);
    if (reduce != wide) {
        const double s = (fabs(value) * d + xp_ref_half_ulp_err(reduce, 0.0)) / (1.0 - xp_ref_unit(reduce)) + base;
        if (isinf(xp_ref_round((s + e) * (1.0 + 0x1p-50), reduce)))
            return (double)INFINITY;
        e += 2.0 * xp_ref_half_ulp_err(reduce, (s + e) * (1.0 + 0x1p-50));
    }
    const double q = e / d; /* distance of the two exact quotients */
    const double divided = d != 1.0 ? 8.0 * u * (fabs(value) + q) + xp_ref_half_ulp_err(wide, 0.0) : 0.0;
    if (isinf(xp_ref_round((fabs(value) + q + divided) * (1.0 + 0x1p-50), wide)) || isinf(xp_ref_round(gauge, wide)))
        return (double)INFINITY;
    return (q + divided) * (1.0 + 0x1p-50);
}

/* Communicates, since S needs every rank's part: all ranks of the axis call it alike, with the args of the judged run.
 */
static xp_status scatter_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                               xp_tensor *tol) {
    const xp_scatter_args *a = args;
    fold f = fold_of(a, m, NULL, ws, tol, XP_F64, 1);
    if (operand != SCATTER_SHARD)
        return XP_FAIL(XP_E_BUG, "scatter: operand %d has no bound", operand);
    XP_TRY(parts_fold(&f));
    for (int64_t g = 0; g < tol->dim[0]; g++) {
        for (int64_t r = 0; r < tol->dim[1]; r++) {
            for (int64_t n = 0; n < tol->dim[2]; n++) {
                double *t = xp_tensor_at(tol, g, r, n, 0);
                const double *v = xp_tensor_at(ref, g, r, n, 0);
                const void *b = a->base.data ? xp_tensor_at(&a->base, g, r, n, 0) : NULL;
                *t = shard_tolerance(a, f.parts, *v, *t, b ? fabs(xp_widen(b, a->base.dtype, 0)) : 0.0);
            }
        }
    }
    return XP_OK;
}

/* ---- fill and properties ---- */

/* Block numbers dealt in turn over the axis, so that no two ranks share one and neighbours never lie on one rank. */
static xp_status scatter_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    const xp_scatter_args *a = args;
    const xp_comm *c = m->axis[a->axis];
    (void)data;
    (void)seed;
    for (int64_t b = 0; a->blocks.data && b < a->blocks.dim[0]; b++)
        *(int64_t *)xp_tensor_at(&a->blocks, b, 0, 0, 0) = b * c->size + c->rank;
    return XP_OK;
}

/* Ranks with the same rows have the same bits: replicas that differ drift apart. Compares hashes, by an all-gather over
 * the axis: every rank calls it. 2 for each rank that differs from the first with its range. */
static xp_status scatter_replicas(const void *args, const xp_mesh *m, double *out) {
    const xp_scatter_args *a = args;
    xp_comm *c = m->axis[a->axis];
    enum { MOST = 1024 }; /* ranks whose hashes fit the stack */
    uint64_t hash = 0, all[MOST];
    int64_t each[MOST], wrong = 0;
    if (c->size > MOST)
        return XP_FAIL(XP_E_ARG, "scatter: axis has %d ranks, expected at most %d for this property", c->size, MOST);
    for (int64_t g = 0; g < a->shard.dim[0]; g++) {
        for (int64_t r = 0; r < a->shard.dim[1] && a->shard.dim[2] > 0; r++)
            hash = xp_ref_hash(xp_tensor_at(&a->shard, g, r, 0, 0), a->shard.dtype, a->shard.dim[2], hash);
    }
    for (int r = 0; r < c->size; r++)
        each[r] = 1;
    const xp_tensor src = xp_tensor_1d(&hash, XP_U64, 1);
    xp_tensor dst = xp_tensor_1d(all, XP_U64, c->size);
    XP_TRY(c->ops->all_gather(c, NULL, &src, each, &dst));
    for (int r = 1; r < c->size; r++) {
        int first = 0;
        while (a->rows[first] != a->rows[r] || (a->rows[r] > 0 && a->start[first] != a->start[r]))
            first++;
        wrong += all[first] != all[r];
    }
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

static const xp_property scatter_property[] = {{"replicas", scatter_replicas}};

const xp_stage xp_stage_scatter = {
    .name = "scatter",
    .meaning = "a gradient summed over an axis, each rank left its rows, divided once",
    .axis = XP_WORLD,
    .args_size = sizeof(xp_scatter_args),
    .operand = scatter_operand,
    .operands = sizeof scatter_operand / sizeof *scatter_operand,
    .param = scatter_param,
    .params = sizeof scatter_param / sizeof *scatter_param,
    .check = scatter_check,
    .cost = scatter_cost,
    .bound = scatter_bound,
    .bound_workspace = scatter_workspace,
    .fill = scatter_fill,
    .property = scatter_property,
    .properties = sizeof scatter_property / sizeof *scatter_property,
};

const xp_kernel xp_ref_scatter = {
    .stage = &xp_stage_scatter,
    .name = "exchange_fold",
    .det = XP_DET_RUN,
    .workspace = scatter_workspace,
    .run = scatter_run,
};
