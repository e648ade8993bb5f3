/* Stage wgrad: see xp/wgrad.h for the meaning.
 *
 * dw[b][l] = sum over the rows r of group l and block b of dy[r] (x) x[r]: one double chain for each element over
 * ascending rows from +0, one rounding to dw's dtype. fold: the block sums, each rounded, are added in dw's dtype in
 * ascending block number, from +0; a block without rows adds nothing, which is what adding its zeros would do. Rows
 * with tok -1 belong to no block. A group or block without rows gives zeros. */
#include "xp/wgrad.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "linear.h"
#include "move.h"
#include "plane.h"
#include "ref.h"

/* ---- operands and parameters ---- */

static const xp_operand operands[] = {
    XP_OPERAND(xp_wgrad_args, dy, "C,N", XP_IN, XP_DT_ACT, XP_UNCOMPARED, ""),
    XP_OPERAND(xp_wgrad_args, x, "C,R", XP_IN, XP_DT_ACT, XP_UNCOMPARED, ""),
    XP_OPERAND(xp_wgrad_args, offsets, "L+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPTIONAL(xp_wgrad_args, tok, "C", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPTIONAL(xp_wgrad_args, blocks, "B", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_wgrad_args, dw, "B,L,N,R", XP_OUT, XP_DT_ACT, XP_BOUND, "grad"),
};

static const xp_param params[] = {
    {"block", NULL, "0", XP_P_I64, offsetof(xp_wgrad_args, block)},
    {"fold", NULL, "0", XP_P_INT, offsetof(xp_wgrad_args, fold)},
};

/* ---- check ---- */

static xp_status check_presence(const xp_wgrad_args *a) {
    if (a->block < 0)
        return XP_FAIL(XP_E_ARG, "wgrad: block is %lld, expected >= 0", (long long)a->block);
    if (a->fold != 0 && a->fold != 1)
        return XP_FAIL(XP_E_ARG, "wgrad: fold is %d, expected 0 or 1", a->fold);
    if (a->fold && a->block == 0)
        return XP_FAIL(XP_E_ARG, "wgrad: fold is 1 and block is 0, expected block > 0");
    if (a->block == 0 && a->tok.data)
        return XP_FAIL(XP_E_ARG, "wgrad: tok is present and block is 0, expected no tok");
    if (a->block > 0 && !a->tok.data && a->dy.dim[0] > 0)
        return XP_FAIL(XP_E_ARG, "wgrad: tok is absent and block is %lld, expected [C]", (long long)a->block);
    const int listed = a->block > 0 && !a->fold;
    if (!listed && a->blocks.data)
        return XP_FAIL(XP_E_ARG, "wgrad: blocks is present with block %lld and fold %d, expected none",
                       (long long)a->block, a->fold);
    if (listed && !a->blocks.data && a->dw.dim[0] > 0)
        return XP_FAIL(XP_E_ARG, "wgrad: blocks is absent, expected the numbers of the %lld blocks of dw",
                       (long long)a->dw.dim[0]);
    if (!listed && a->dw.dim[0] != 1)
        return XP_FAIL(XP_E_ARG, "wgrad: dw dim 0 is %lld, expected 1 with block %lld and fold %d",
                       (long long)a->dw.dim[0], (long long)a->block, a->fold);
    return XP_OK;
}

static xp_status check_offsets(const xp_wgrad_args *a) {
    const int64_t C = a->dy.dim[0], borders = a->offsets.dim[0];
    for (int64_t l = 0; l < borders; l++) {
        const int64_t least = l > 0 ? xp_ref_i64(&a->offsets, l - 1) : 0, at = xp_ref_i64(&a->offsets, l);
        if (at < least || at > C)
            return XP_FAIL(XP_E_ARG, "wgrad: offsets[%lld] is %lld, expected %lld to C = %lld", (long long)l,
                           (long long)at, (long long)least, (long long)C);
    }
    return XP_OK;
}

/* Place of a block's number in blocks, or -1. */
static int64_t block_find(const xp_tensor *blocks, int64_t number) {
    int64_t lo = 0, hi = blocks->dim[0];
    while (lo < hi) {
        const int64_t mid = lo + (hi - lo) / 2, at = xp_ref_i64(blocks, mid);
        if (at == number)
            return mid;
        if (at < number)
            lo = mid + 1;
        else
            hi = mid;
    }
    return -1;
}

static xp_status check_blocks(const xp_wgrad_args *a) {
    for (int64_t b = 0; a->blocks.data && b < a->blocks.dim[0]; b++) {
        const int64_t least = b > 0 ? xp_ref_i64(&a->blocks, b - 1) + 1 : 0, at = xp_ref_i64(&a->blocks, b);
        if (at < least)
            return XP_FAIL(XP_E_ARG, "wgrad: blocks[%lld] is %lld, expected >= %lld (ascending)", (long long)b,
                           (long long)at, (long long)least);
    }
    const int64_t borders = a->offsets.dim[0];
    for (int64_t r = xp_ref_i64(&a->offsets, 0); r < xp_ref_i64(&a->offsets, borders - 1); r++) {
        const int64_t tok = xp_ref_i64(&a->tok, r);
        if (tok < -1)
            return XP_FAIL(XP_E_ARG, "wgrad: tok[%lld] is %lld, expected >= -1", (long long)r, (long long)tok);
        if (tok >= 0 && !a->fold && (!a->blocks.data || block_find(&a->blocks, tok / a->block) < 0))
            return XP_FAIL(XP_E_ARG, "wgrad: tok[%lld] is %lld, of block %lld, which blocks does not list",
                           (long long)r, (long long)tok, (long long)(tok / a->block));
    }
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_wgrad_args *a = args;
    xp_ref_dims dims;
    XP_TRY(xp_ref_check(&xp_stage_wgrad, args, &dims));
    XP_TRY(check_presence(a));
    if (!xp_ref_readable(&a->offsets))
        return XP_OK;
    XP_TRY(check_offsets(a));
    if (a->block > 0 && a->tok.data && xp_ref_readable(&a->tok) && (!a->blocks.data || xp_ref_readable(&a->blocks)))
        return check_blocks(a);
    return XP_OK;
}

/* ---- cost ---- */

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_wgrad_args *a = args;
    const int64_t L = a->offsets.dim[0] - 1, N = a->dy.dim[1], R = a->x.dim[1];
    double rows = (double)a->dy.dim[0];
    if (xp_ref_readable(&a->offsets))
        rows = (double)(xp_ref_i64(&a->offsets, L) - xp_ref_i64(&a->offsets, 0));
    *out = (xp_cost){.flop = 2.0 * rows * (double)N * (double)R,
                     .mem_bytes = rows * (double)(xp_dtype_bytes(a->dy.dtype, N) + xp_dtype_bytes(a->x.dtype, R)) +
                                  (double)xp_dtype_bytes(a->dw.dtype, xp_tensor_count(&a->dw))};
}

/* ---- rows of a group in the order of their blocks ---- */

enum {
    ROWS = 16,         /* rows of dw in a tile */
    COLS = 256,        /* columns of dw in a tile: the sums of a tile are 32 KiB */
    STRIDE = COLS + 8, /* of the rows of a tile: a power of two would map all of them to the same cache lines */
    DEEP = 64          /* rows of dy and x that are widened together */
};

/* order[first[s] .. first[s+1]) are the rows of segment s: one block's, ascending. Without blocks there is one segment.
 * sum and fold are tiles of ROWS x STRIDE doubles, as are gauge and err for bounds; dy is DEEP x ROWS, x DEEP x STRIDE.
 */
typedef struct {
    int64_t *order, *first, *number;
    int64_t segments;
    double *sum, *fold, *gauge, *err, *dy, *x, *dy_abs, *x_abs;
} work;

static size_t plan(const xp_wgrad_args *a, void *ws, work *out) {
    const size_t index = sizeof(int64_t) * ((size_t)a->dy.dim[0] + 1), tile = sizeof(double) * ROWS * STRIDE;
    xp_ref_layout l = {ws, 0};
    out->order = xp_ref_take(&l, index);
    out->first = xp_ref_take(&l, index);
    out->number = xp_ref_take(&l, index);
    out->sum = xp_ref_take(&l, tile);
    out->fold = xp_ref_take(&l, tile);
    out->gauge = xp_ref_take(&l, tile);
    out->err = xp_ref_take(&l, tile);
    out->dy = xp_ref_take(&l, sizeof(double) * DEEP * ROWS);
    out->x = xp_ref_take(&l, sizeof(double) * DEEP * STRIDE);
    out->dy_abs = xp_ref_take(&l, sizeof(double) * DEEP * ROWS);
    out->x_abs = xp_ref_take(&l, sizeof(double) * DEEP * STRIDE);
    return l.bytes;
}

/* The smallest block number above `above` among rows [lo, hi), -1 when there is none. */
static int64_t block_next(const xp_wgrad_args *a, int64_t lo, int64_t hi, int64_t above) {
    int64_t next = -1;
    for (int64_t r = lo; r < hi; r++) {
        const int64_t tok = xp_ref_i64(&a->tok, r), b = tok < 0 ? -1 : tok / a->block;
        if (b > above && (next < 0 || b < next))
            next = b;
    }
    return next;
}

static void order_rows(const xp_wgrad_args *a, int64_t l, work *w) {
    const int64_t lo = xp_ref_i64(&a->offsets, l), hi = xp_ref_i64(&a->offsets, l + 1);
    int64_t n = 0;
    w->segments = 0;
    w->first[0] = 0;
    if (a->block == 0) {
        for (int64_t r = lo; r < hi; r++)
            w->order[n++] = r;
        w->number[0] = 0;
        w->segments = n > 0;
        w->first[w->segments] = n;
        return;
    }
    for (int64_t b = block_next(a, lo, hi, -1); b >= 0; b = block_next(a, lo, hi, b)) {
        for (int64_t r = lo; r < hi; r++) {
            const int64_t tok = xp_ref_i64(&a->tok, r);
            if (tok >= 0 && tok / a->block == b)
                w->order[n++] = r;
        }
        w->number[w->segments++] = b;
        w->first[w->segments] = n;
    }
}

/* ---- tiles ---- */

/* Rows [n0, n0 + n) and columns [r0, r0 + r) of dw[b][l]. */
typedef struct {
    int64_t l, n0, n, r0, r;
} place;

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static void tile_clear(double *t, const place *p) {
    for (int64_t i = 0; i < p->n; i++)
        memset(t + i * STRIDE, 0, (size_t)p->r * sizeof *t);
}

static void absolute(const double *v, int64_t n, double *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = fabs(v[i]);
}

/* sum = the products of segment s; gauge, when not NULL, the same with magnitudes. */
static void tile_sum(const xp_wgrad_args *a, const work *w, const place *p, int64_t s, double *gauge) {
    tile_clear(w->sum, p);
    if (gauge)
        tile_clear(gauge, p);
    for (int64_t at = w->first[s]; at < w->first[s + 1]; at += DEEP) {
        const int64_t deep = least(DEEP, w->first[s + 1] - at);
        for (int64_t i = 0; i < deep; i++) {
            const int64_t row = w->order[at + i];
            xp_widen_row(a->dy.data, a->dy.dtype, row * a->dy.stride[0] + p->n0, p->n, w->dy + i * ROWS);
            xp_widen_row(a->x.data, a->x.dtype, row * a->x.stride[0] + p->r0, p->r, w->x + i * STRIDE);
        }
        xp_ref_linear_add(w->dy, 1, ROWS, w->x, STRIDE, p->n, p->r, deep, w->sum, STRIDE);
        if (gauge) {
            for (int64_t i = 0; i < deep; i++) {
                absolute(w->dy + i * ROWS, p->n, w->dy_abs + i * ROWS);
                absolute(w->x + i * STRIDE, p->r, w->x_abs + i * STRIDE);
            }
            xp_ref_linear_add(w->dy_abs, 1, ROWS, w->x_abs, STRIDE, p->n, p->r, deep, gauge, STRIDE);
        }
    }
}

static void tile_store(const xp_tensor *t, int64_t b, const place *p, const double *v) {
    for (int64_t i = 0; i < p->n; i++) {
        const int64_t at = b * t->stride[0] + p->l * t->stride[1] + (p->n0 + i) * t->stride[2] + p->r0;
        xp_ref_store_row(t->data, t->dtype, at, p->r, v + i * STRIDE);
    }
}

/* fold = r(fold + r(sum)). In f32 both roundings are those of the machine's own float operations: the double sum of two
 * floats, rounded, is their float sum. */
static void tile_fold(xp_dtype d, const place *p, const double *sum, double *fold) {
    for (int64_t i = 0; i < p->n; i++) {
        const double *s = sum + i * STRIDE;
        double *f = fold + i * STRIDE;
        if (d == XP_F32) {
            for (int64_t j = 0; j < p->r; j++)
                f[j] = (double)((float)f[j] + (float)s[j]);
        } else {
            for (int64_t j = 0; j < p->r; j++)
                f[j] = xp_ref_round(f[j] + xp_ref_round(s[j], d), d);
        }
    }
}

typedef void tile_fn(const xp_wgrad_args *a, const work *w, const place *p, const void *more);

static void walk(const xp_wgrad_args *a, work *w, tile_fn *fn, const void *more) {
    const int64_t L = a->offsets.dim[0] - 1, N = a->dy.dim[1], R = a->x.dim[1];
    for (int64_t l = 0; l < L; l++) {
        order_rows(a, l, w);
        for (int64_t r = 0; r < R; r += COLS) {
            for (int64_t n = 0; n < N; n += ROWS) {
                const place p = {l, n, least(ROWS, N - n), r, least(COLS, R - r)};
                fn(a, w, &p, more);
            }
        }
    }
}

/* The segment of block b of dw, -1 when no row has it. */
static int64_t segment_of(const xp_wgrad_args *a, const work *w, int64_t b) {
    if (a->block == 0)
        return w->segments - 1;
    const int64_t number = xp_ref_i64(&a->blocks, b);
    for (int64_t s = 0; s < w->segments; s++) {
        if (w->number[s] == number)
            return s;
    }
    return -1;
}

/* ---- bound ---- */

/* A block's sum of n products: E = g G, g = gamma_n(op) + gamma_n(f64), G = sum |dy| |x|, op = f64 when dy, x and dw
 * are f64, else f32; underflow n times the smallest value of op. Its rounding to dw's dtype: room(|S| + E). Each step
 * of the fold rounds once more on either side: room(|v| + E) with v the partial fold. The reference's values are those
 * of the judge, unrounded: both sides' errors are counted. */
static xp_dtype op_of(const xp_wgrad_args *a) {
    return a->dy.dtype == XP_F64 && a->x.dtype == XP_F64 && a->dw.dtype == XP_F64 ? XP_F64 : XP_F32;
}

/* One block more: the fold's values and errors, from the block's sums and errors. */
static void bound_fold_row(const xp_ref_rule *rule, int first, int64_t n, const double *sum, double *e, double *fold,
                           double *total) {
    xp_ref_out_errors(rule, n, sum, e);
    for (int64_t j = 0; j < n; j++) {
        fold[j] += sum[j];
        total[j] += e[j] + 0x1p-53 * fabs(fold[j]);
    }
    if (!first)
        xp_ref_out_errors(rule, n, fold, total);
}

static void bound_fold(const xp_wgrad_args *a, const work *w, const place *p) {
    const xp_ref_rule rule = xp_ref_rule_of(a->dw.dtype, op_of(a));
    tile_clear(w->fold, p);
    tile_clear(w->err, p);
    for (int64_t s = 0; s < w->segments; s++) {
        tile_sum(a, w, p, s, w->gauge);
        for (int64_t i = 0, at = 0; i < p->n; i++, at += STRIDE) {
            xp_ref_dot_errors(w->first[s + 1] - w->first[s], op_of(a), p->r, w->gauge + at);
            bound_fold_row(&rule, s == 0, p->r, w->sum + at, w->gauge + at, w->fold + at, w->err + at);
        }
    }
}

static void bound_block(const xp_wgrad_args *a, const work *w, const place *p, int64_t s) {
    const xp_ref_rule rule = xp_ref_rule_of(a->dw.dtype, op_of(a));
    tile_sum(a, w, p, s, w->err);
    for (int64_t i = 0, at = 0; i < p->n; i++, at += STRIDE) {
        xp_ref_dot_errors(w->first[s + 1] - w->first[s], op_of(a), p->r, w->err + at);
        xp_ref_out_errors(&rule, p->r, w->sum + at, w->err + at);
    }
}

static void bound_tile(const xp_wgrad_args *a, const work *w, const place *p, const void *more) {
    const xp_tensor *tol = more;
    if (a->fold) {
        bound_fold(a, w, p);
        tile_store(tol, 0, p, w->err);
        return;
    }
    for (int64_t b = 0; b < a->dw.dim[0]; b++) {
        const int64_t s = segment_of(a, w, b);
        if (s >= 0)
            bound_block(a, w, p, s);
        else
            tile_clear(w->err, p);
        tile_store(tol, b, p, w->err);
    }
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)operand;
    (void)ref;
    work w;
    plan(args, ws, &w);
    walk(args, &w, bound_tile, tol);
    return XP_OK;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    work w;
    return plan(args, NULL, &w);
}

/* ---- reference ---- */

static void run_tile(const xp_wgrad_args *a, const work *w, const place *p, const void *more) {
    (void)more;
    if (a->fold) {
        tile_clear(w->fold, p);
        for (int64_t s = 0; s < w->segments; s++) {
            tile_sum(a, w, p, s, NULL);
            tile_fold(a->dw.dtype, p, w->sum, w->fold);
        }
        tile_store(&a->dw, 0, p, w->fold);
        return;
    }
    for (int64_t b = 0; b < a->dw.dim[0]; b++) {
        const int64_t s = segment_of(a, w, b);
        if (s >= 0)
            tile_sum(a, w, p, s, NULL);
        else
            tile_clear(w->sum, p);
        tile_store(&a->dw, b, p, w->sum);
    }
}

static xp_status run(const xp_exec *x, const void *args) {
    work w;
    plan(args, x->ws, &w);
    walk(args, &w, run_tile, NULL);
    return XP_OK;
}

/* ---- columns of dy a few at a time ---- */

static int64_t extent(const void *args) {
    return ((const xp_wgrad_args *)args)->dy.dim[1];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_wgrad_args *a = args;
    xp_wgrad_args *o = out;
    o->dy = xp_tensor_rows(&a->dy, 1, lo, hi);
    o->dw = xp_tensor_rows(&a->dw, 2, lo, hi);
}

/* ---- properties ---- */

/* Sum and sum of magnitudes of n elements from base[at]. */
static void row_sums(const xp_tensor *t, int64_t row, double *out_sum, double *out_abs) {
    *out_sum = *out_abs = 0.0;
    for (int64_t i = 0; i < t->dim[1]; i++) {
        const double v = xp_widen(t->data, t->dtype, row * t->stride[0] + i);
        *out_sum += v;
        *out_abs += fabs(v);
    }
}

/* The sum of all elements of dw is sum over rows of (sum of dy) (sum of x): a checksum that needs no reference. Its
 * error: the products' (as in bound), the roundings to dw's dtype (one, or two for each of at most k blocks of a fold
 * of k rows), each at most a unit of the gauge, and the sums here. Says nothing (0) where a sum may overflow. */
static double group_residual(const xp_wgrad_args *a, int64_t l) {
    const int64_t lo = xp_ref_i64(&a->offsets, l), hi = xp_ref_i64(&a->offsets, l + 1), rows = hi - lo;
    const int64_t elements = a->dw.dim[0] * a->dy.dim[1] * a->x.dim[1];
    double right = 0.0, gauge = 0.0, left = 0.0;
    for (int64_t r = lo; r < hi; r++) {
        double dy, x, dy_abs, x_abs;
        if (a->block > 0 && xp_ref_i64(&a->tok, r) < 0)
            continue;
        row_sums(&a->dy, r, &dy, &dy_abs);
        row_sums(&a->x, r, &x, &x_abs);
        right += dy * x;
        gauge += dy_abs * x_abs;
    }
    for (int64_t b = 0; b < a->dw.dim[0]; b++) {
        for (int64_t i = 0; i < a->dy.dim[1]; i++) {
            for (int64_t j = 0; j < a->x.dim[1]; j++)
                left += xp_widen(xp_tensor_at(&a->dw, b, l, i, j), a->dw.dtype, 0);
        }
    }
    const xp_dtype op = op_of(a);
    const double roundings = (double)(a->fold ? 2 * rows : 1), ru = roundings * xp_ref_unit(a->dw.dtype);
    if (elements == 0 || ru >= 1.0 || !(gauge <= xp_ref_largest(op)) || !(gauge <= xp_ref_largest(a->dw.dtype)))
        return 0.0;
    const double unit = ru / (1.0 - ru) + xp_ref_gamma(rows, op);
    const double sums = xp_ref_gamma(rows + elements + a->dy.dim[1] + a->x.dim[1] + 4, XP_F64);
    const double least_of = xp_ref_half_ulp_err(a->dw.dtype, 0.0) + xp_ref_half_ulp_err(op, 0.0);
    return fabs(left - right) / ((unit + 2.0 * sums * (1.0 + unit)) * gauge +
                                 (double)elements * (roundings + (double)rows + 1.0) * least_of);
}

static xp_status checksum(const void *args, const xp_mesh *m, double *out) {
    (void)m;
    const xp_wgrad_args *a = args;
    const int64_t L = a->offsets.dim[0] - 1;
    *out = 0.0;
    for (int64_t l = 0; l < L; l++) {
        const double residual = group_residual(a, l);
        if (!(residual <= *out))
            *out = residual;
    }
    return XP_OK;
}

static const xp_property properties[] = {{"checksum", checksum}};

/* ---- stage and row ---- */

const xp_stage xp_stage_wgrad = {
    .name = "wgrad",
    .meaning = "grouped weight gradient: sums of outer products over each group's rows",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_wgrad_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = workspace,
    .extent = extent,
    .slice = slice,
    .chain = "layer",
    .property = properties,
    .properties = sizeof properties / sizeof *properties,
};

const xp_kernel xp_ref_wgrad = {
    .stage = &xp_stage_wgrad,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
