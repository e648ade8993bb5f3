/* Stages combine and combine_bwd: the experts' rows come home and are summed with their weights, and the gradients of
 * rows and weights.
 *
 * `back` is a stage output of its own, since the backward needs it and it is exact while y is not. Contract:
 * xp/combine.h; where products and sums are rounded is the dialect's `accumulate`. Must not add in another order than
 * stated, write a row behind the last offset, or skip a collective on a rank without rows. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "move.h"
#include "num.h"
#include "ref.h"
#include "xp/combine.h"

static int32_t i32_at(const xp_tensor *t, int64_t i, int64_t j) {
    return *(const int32_t *)xp_tensor_at(t, i, j, 0, 0);
}

/* The weight of a slot; 1 where the dialect has weighed the experts' input or hidden row already. */
static double weight_at(const xp_dialect *d, const xp_tensor *w, int64_t t, int64_t k) {
    return d->weight_at == XP_AT_OUTPUT ? xp_widen(xp_tensor_at(w, t, k, 0, 0), w->dtype, 0) : 1.0;
}

static xp_status dialect_check(const char *stage, const xp_dialect *d, const xp_tensor *w, xp_dtype act) {
    static const char *const accumulate[] = {"slots_f32", "eager_act", "eager_f32", "products_act_f32"};
    if (!d)
        return XP_FAIL(XP_E_ARG, "%s: dialect is absent, expected a record", stage);
    if (d->accumulate != XP_ACC_SLOTS_F32 && d->accumulate != XP_ACC_EAGER_ACT)
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has accumulate %s, expected slots_f32 or eager_act", stage, d->name,
                       (unsigned)d->accumulate < 4 ? accumulate[d->accumulate] : "?");
    if (d->scale_at == XP_SCALE_OUTPUT && d->scale != 1.0)
        return XP_FAIL(XP_E_ARG, "%s: dialect %s has scale_at output with scale %g, expected scale_at weight", stage,
                       d->name, d->scale);
    if (w->dtype == XP_F64 && act != XP_F64)
        return XP_FAIL(XP_E_ARG, "%s: w has dtype f64, expected f32 or narrower beside rows of %s", stage,
                       xp_dtype_name(act));
    return XP_OK;
}

/* Rows named by slots: inside [0, M), and as many slots as rows. */
static xp_status slots_check(const char *stage, const xp_tensor *pos, const xp_ref_path *p, int64_t home_rows) {
    if (xp_ref_readable(p->counts) && xp_ref_path_rows(p, 0) != (double)(pos->dim[0] * pos->dim[1]))
        return XP_FAIL(XP_E_ARG, "%s: counts add up to %.0f, expected T*K = %lld", stage, xp_ref_path_rows(p, 0),
                       (long long)(pos->dim[0] * pos->dim[1]));
    for (int64_t t = 0; t < pos->dim[0] && xp_ref_readable(pos); t++) {
        for (int64_t k = 0; k < pos->dim[1]; k++) {
            const int32_t row = i32_at(pos, t, k);
            if (row < 0 || row >= home_rows)
                return XP_FAIL(XP_E_ARG, "%s: pos[%lld][%lld] is %d, expected 0 to M-1 = %lld", stage, (long long)t,
                               (long long)k, row, (long long)home_rows - 1);
        }
    }
    return XP_OK;
}

/* ---- combine ---- */

enum { COMBINE_Y = 9 };
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
};

static const xp_param combine_param[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_combine_args, dialect)},
};

static xp_ref_path combine_path(const xp_combine_args *a) {
    return (xp_ref_path){&a->counts, &a->offsets, &a->recv_counts, &a->recv_offsets};
}

static xp_status combine_check(const void *args, const xp_mesh *m) {
    const xp_combine_args *a = args;
    const xp_ref_path path = combine_path(a);
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_combine, args, &d));
    XP_TRY(dialect_check("combine", a->dialect, &a->w, a->out.dtype));
    XP_TRY(xp_ref_path_check("combine", &path, m->axis[XP_EP], XP_REF_DIM(d, 'M'), XP_REF_DIM(d, 'C')));
    XP_TRY(slots_check("combine", &a->pos, &path, XP_REF_DIM(d, 'M')));
    for (int64_t t = 0; t < XP_REF_DIM(d, 'T') && xp_ref_readable(&a->idx); t++) {
        for (int64_t k = 0; k < XP_REF_DIM(d, 'K'); k++) {
            const int32_t e = i32_at(&a->idx, t, k);
            if (e < 0 || e >= XP_REF_DIM(d, 'E'))
                return XP_FAIL(XP_E_ARG, "combine: idx[%lld][%lld] is %d, expected 0 to E-1 = %lld", (long long)t,
                               (long long)k, e, (long long)XP_REF_DIM(d, 'E') - 1);
        }
    }
    return XP_OK;
}

static void combine_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_combine_args *a = args;
    const xp_ref_path p = combine_path(a);
    const double row = (double)xp_dtype_bytes(a->out.dtype, a->out.dim[1]), tokens = (double)a->pos.dim[0];
    const double slots = (double)(a->pos.dim[0] * a->pos.dim[1]);
    *out = (xp_cost){.flop = 2.0 * slots * (double)a->out.dim[1],
                     .mem_bytes = (xp_ref_path_rows(&p, 1) + xp_ref_path_rows(&p, 0) + tokens) * row +
                                  slots * (8.0 + (double)xp_dtype_bytes(a->w.dtype, 1)),
                     .net_bytes = xp_ref_path_remote(&p, m->axis[XP_EP], 1) * row};
}

static size_t combine_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_args *a = args;
    const size_t sums = 2 * xp_ref_span((size_t)a->out.dim[1] * sizeof(double));
    const size_t rows = xp_ref_path_ws(&a->back, &a->out, m->axis[XP_EP]->size);
    return rows > sums ? rows : sums;
}

static void row_widen(const xp_tensor *t, int64_t i, int64_t width, double *out) {
    xp_widen_row(xp_tensor_at(t, i, 0, 0, 0), t->dtype, 0, width, out);
}

/* sum[h] = sum over slots of w * back, or of its magnitude; slots ascending, products and sum in double. */
static void slots_sum(const xp_combine_args *a, int64_t t, int absolute, double *sum, double *row) {
    const int64_t width = a->back.dim[1];
    memset(sum, 0, (size_t)width * sizeof *sum);
    for (int64_t k = 0; k < a->pos.dim[1]; k++) {
        const double w = weight_at(a->dialect, &a->w, t, k);
        row_widen(&a->back, i32_at(&a->pos, t, k), width, row);
        for (int64_t h = 0; h < width; h++)
            sum[h] += absolute ? fabs(w * row[h]) : w * row[h];
    }
}

/* The slot that comes after `last` when slots are ordered by (expert, slot); -1 when there is none. last -1: the first.
 */
static int64_t slot_after(const xp_tensor *idx, int64_t t, int64_t last) {
    const int64_t slots = idx->dim[1];
    const int64_t floor = last < 0 ? -1 : (int64_t)i32_at(idx, t, last) * slots + last;
    int64_t best = -1, best_key = INT64_MAX;
    for (int64_t k = 0; k < slots; k++) {
        const int64_t key = (int64_t)i32_at(idx, t, k) * slots + k;
        if (key > floor && key < best_key) {
            best = k;
            best_key = key;
        }
    }
    return best;
}

/* y = r(y + r(w * back)), experts ascending: every product and every partial sum is rounded to act, but for the last
 * sum, which the store rounds. */
static void experts_sum(const xp_combine_args *a, int64_t t, double *sum, double *row) {
    const int64_t width = a->back.dim[1];
    const xp_dtype act = a->back.dtype;
    memset(sum, 0, (size_t)width * sizeof *sum);
    for (int64_t k = slot_after(&a->idx, t, -1); k >= 0; k = slot_after(&a->idx, t, k)) {
        const double w = weight_at(a->dialect, &a->w, t, k);
        row_widen(&a->back, i32_at(&a->pos, t, k), width, row);
        for (int64_t h = 0; h < width; h++)
            row[h] *= w;
        xp_ref_round_row(act, width, row);
        xp_ref_round_row(act, width, sum);
        for (int64_t h = 0; h < width; h++)
            sum[h] += row[h];
    }
}

static xp_status combine_run(const xp_exec *x, const void *args) {
    const xp_combine_args *a = args;
    const xp_ref_path path = combine_path(a);
    const int64_t width = a->out.dim[1];
    XP_TRY(xp_ref_path_home(x, &path, &a->out, &a->back, 0, x->ws));
    char *at = x->ws; /* the exchange is over: its buffers are free */
    double *sum = xp_ref_carve(&at, (size_t)width * sizeof *sum), *row = (double *)(void *)at;
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        if (a->dialect->accumulate == XP_ACC_EAGER_ACT)
            experts_sum(a, t, sum, row);
        else
            slots_sum(a, t, 0, sum, row);
        xp_ref_store_row(xp_tensor_at(&a->y, t, 0, 0, 0), a->y.dtype, 0, width, sum);
    }
    return XP_OK;
}

/* With p = w * back and S = sum |p|; acc is f32, or f64 when act is f64.
 * slots_f32: a product is one rounding in acc (and may lose half the smallest value), K-1 additions in any order:
 * gamma_K S; then one rounding to act.
 * eager_act: each p sees one rounding in acc and one to act, then at most K additions, each rounded in acc and to act,
 * so at most K+1 roundings of either kind: (1 + gamma_K+1(acc))(1 + gamma_K+1(act)) - 1, in units of S. The reference
 * makes the same roundings to act and can be off the other way, so both count; each rounding to act may also lose half
 * its smallest value, 2K times on either side. S is read from back, an output: it is compared by bits beside y, so a
 * row that is wrong there fails there. */
static double y_tolerance(const xp_dialect *d, int64_t slots, xp_dtype act, double value, double gauge) {
    const xp_dtype acc = xp_ref_acc(act);
    const double e = xp_ref_sum_err(slots, acc, gauge, slots);
    if (d->accumulate == XP_ACC_SLOTS_F32)
        return xp_ref_round_err(act, value, e);
    const double g_acc = xp_ref_gamma(slots + 1, acc), g_act = xp_ref_gamma(slots + 1, act);
    const double g = g_acc + g_act + g_acc * g_act;
    const double lost = 4.0 * (double)slots * xp_ref_half_ulp_err(act, 0.0) * (1.0 + g);
    if (isinf(xp_ref_round((1.0 + g) * gauge, act)))
        return (double)INFINITY;
    return (2.0 * g * gauge + e + lost) * (1.0 + 2.0 * xp_ref_gamma(slots + 8, XP_F64));
}

static xp_status combine_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                               xp_tensor *tol) {
    const xp_combine_args *a = args;
    const int64_t width = a->back.dim[1];
    char *at = ws;
    double *gauge = xp_ref_carve(&at, (size_t)width * sizeof *gauge), *row = (double *)(void *)at;
    (void)m;
    if (operand != COMBINE_Y)
        return XP_FAIL(XP_E_BUG, "combine: operand %d has no bound", operand);
    for (int64_t t = 0; t < a->pos.dim[0] && width > 0; t++) {
        const double *value = xp_tensor_at(ref, t, 0, 0, 0);
        double *out = xp_tensor_at(tol, t, 0, 0, 0);
        slots_sum(a, t, 1, gauge, row);
        for (int64_t h = 0; h < width; h++)
            out[h] = y_tolerance(a->dialect, a->pos.dim[1], a->back.dtype, value[h], gauge[h]);
    }
    return XP_OK;
}

static size_t combine_bound_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_args *a = args;
    (void)m;
    return 2 * xp_ref_span((size_t)a->back.dim[1] * sizeof(double));
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

enum { COMBINE_BWD_DW = 8, COMBINE_BWD_DOUT = 9 };
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
};

static const xp_param combine_bwd_param[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_combine_bwd_args, dialect)},
};

static xp_ref_path combine_bwd_path(const xp_combine_bwd_args *a) {
    return (xp_ref_path){&a->counts, &a->offsets, &a->recv_counts, &a->recv_offsets};
}

static xp_status combine_bwd_check(const void *args, const xp_mesh *m) {
    const xp_combine_bwd_args *a = args;
    const xp_ref_path path = combine_bwd_path(a);
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_combine_bwd, args, &d));
    XP_TRY(dialect_check("combine_bwd", a->dialect, &a->w, a->dy.dtype));
    XP_TRY(xp_ref_path_check("combine_bwd", &path, m->axis[XP_EP], XP_REF_DIM(d, 'M'), XP_REF_DIM(d, 'C')));
    return slots_check("combine_bwd", &a->pos, &path, XP_REF_DIM(d, 'M'));
}

static void combine_bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_combine_bwd_args *a = args;
    const xp_ref_path p = combine_bwd_path(a);
    const double row = (double)xp_dtype_bytes(a->dy.dtype, a->dy.dim[1]), tokens = (double)a->pos.dim[0];
    const double slots = (double)(a->pos.dim[0] * a->pos.dim[1]);
    *out = (xp_cost){.flop = 3.0 * slots * (double)a->dy.dim[1],
                     .mem_bytes = (tokens + xp_ref_path_rows(&p, 0) + xp_ref_path_rows(&p, 1)) * row +
                                  slots * (4.0 + (double)xp_dtype_bytes(a->w.dtype, 1) +
                                           (double)xp_dtype_bytes(xp_ref_acc(a->dy.dtype), 1)),
                     .net_bytes = xp_ref_path_remote(&p, m->axis[XP_EP], 0) * row};
}

/* The rows that leave home, in dout's dtype (a judge's is wider than act). */
static xp_tensor staged_rows(const xp_combine_bwd_args *a, void *data) {
    return xp_tensor_2d(data, a->dout.dtype, a->back.dim[0], a->back.dim[1]);
}

static size_t combine_bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_bwd_args *a = args;
    const xp_tensor staged = staged_rows(a, NULL);
    return 2 * xp_ref_span((size_t)a->dy.dim[1] * sizeof(double)) +
           xp_ref_span(xp_dtype_bytes(staged.dtype, staged.dim[0] * staged.dim[1])) +
           xp_ref_path_ws(&staged, &a->dout, m->axis[XP_EP]->size);
}

/* <dy[t], back[pos[t][k]]>, h ascending, or the sum of magnitudes; back's row is left in `row`. */
static double row_dot(const xp_combine_bwd_args *a, int64_t t, int64_t k, int absolute, const double *dy, double *row) {
    const int64_t width = a->dy.dim[1];
    double sum = 0.0;
    row_widen(&a->back, i32_at(&a->pos, t, k), width, row);
    for (int64_t h = 0; h < width; h++)
        sum += absolute ? fabs(dy[h] * row[h]) : dy[h] * row[h];
    return sum;
}

static void token_backward(const xp_combine_bwd_args *a, int64_t t, const xp_tensor *staged, double *dy, double *row) {
    const int64_t width = a->dy.dim[1];
    if (width > 0)
        row_widen(&a->dy, t, width, dy);
    for (int64_t k = 0; k < a->pos.dim[1]; k++) {
        const double w = weight_at(a->dialect, &a->w, t, k);
        /* y does not depend on a weight that was applied before the exchange */
        const double dw = width > 0 && a->dialect->weight_at == XP_AT_OUTPUT ? row_dot(a, t, k, 0, dy, row) : 0.0;
        xp_ref_store(xp_tensor_at(&a->dw, t, k, 0, 0), a->dw.dtype, 0, dw);
        for (int64_t h = 0; h < width; h++)
            row[h] = w * dy[h];
        if (width > 0)
            xp_ref_store_row(xp_tensor_at(staged, i32_at(&a->pos, t, k), 0, 0, 0), staged->dtype, 0, width, row);
    }
}

static xp_status combine_bwd_run(const xp_exec *x, const void *args) {
    const xp_combine_bwd_args *a = args;
    const xp_ref_path path = combine_bwd_path(a);
    const size_t width = (size_t)a->dy.dim[1];
    char *at = x->ws;
    double *dy = xp_ref_carve(&at, width * sizeof *dy), *row = xp_ref_carve(&at, width * sizeof *row);
    const xp_tensor staged =
        staged_rows(a, xp_ref_carve(&at, xp_dtype_bytes(a->dout.dtype, a->back.dim[0] * a->back.dim[1])));
    for (int64_t t = 0; t < a->pos.dim[0]; t++)
        token_backward(a, t, &staged, dy, row);
    return xp_ref_path_away(x, &path, &staged, &a->dout, 0, at);
}

/* dw: H products, each one rounding in acc (f32, or f64 when act is f64) that may also lose half acc's smallest value,
 * and H-1 additions in any order: gamma_H sum |dy back|; stored in acc's dtype, one more rounding. */
static void dw_tolerance(const xp_combine_bwd_args *a, const xp_tensor *ref, void *ws, xp_tensor *tol) {
    const int64_t width = a->dy.dim[1];
    const xp_dtype acc = xp_ref_acc(a->dy.dtype);
    char *at = ws;
    double *dy = xp_ref_carve(&at, (size_t)width * sizeof *dy), *row = (double *)(void *)at;
    for (int64_t t = 0; t < a->pos.dim[0]; t++) {
        if (width > 0)
            row_widen(&a->dy, t, width, dy);
        for (int64_t k = 0; k < a->pos.dim[1]; k++) {
            const int used = width > 0 && a->dialect->weight_at == XP_AT_OUTPUT;
            const double gauge = used ? row_dot(a, t, k, 1, dy, row) : 0.0;
            const double e = used ? xp_ref_sum_err(width, acc, gauge, width) : 0.0;
            *(double *)xp_tensor_at(tol, t, k, 0, 0) =
                xp_ref_round_err(acc, *(const double *)xp_tensor_at(ref, t, k, 0, 0), e);
        }
    }
}

/* dout: one product, rounded in acc (or lost below half its smallest value), then to act. A pad's 0 stays exact: both
 * losses together are below act's smallest value (f64: at most it). Only the rows in use have a tolerance. */
static void dout_tolerance(const xp_combine_bwd_args *a, const xp_tensor *ref, xp_tensor *tol) {
    const xp_dtype act = a->dy.dtype, acc = xp_ref_acc(act);
    const int64_t used =
        xp_ref_readable(&a->recv_offsets) ? xp_ref_i64(&a->recv_offsets, a->recv_counts.dim[1]) : a->dout.dim[0];
    for (int64_t i = 0; i < used; i++) {
        for (int64_t h = 0; h < a->dout.dim[1]; h++) {
            const double value = *(const double *)xp_tensor_at(ref, i, h, 0, 0);
            /* the reference's own product is within one rounding of ref, so |ref| serves as the gauge of one term */
            *(double *)xp_tensor_at(tol, i, h, 0, 0) =
                xp_ref_round_err(act, value, value == 0.0 ? 0.0 : xp_ref_sum_err(1, acc, fabs(value), 1));
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
    else
        return XP_FAIL(XP_E_BUG, "combine_bwd: operand %d has no bound", operand);
    return XP_OK;
}

static size_t combine_bwd_bound_workspace(const void *args, const xp_mesh *m) {
    const xp_combine_bwd_args *a = args;
    (void)m;
    return 2 * xp_ref_span((size_t)a->dy.dim[1] * sizeof(double));
}

const xp_stage xp_stage_combine_bwd = {
    .name = "combine_bwd",
    .meaning = "gradients of the combine weights, and of each expert row, sent to the expert's rank",
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
};

const xp_kernel xp_ref_combine_bwd = {
    .stage = &xp_stage_combine_bwd,
    .name = "product_exchange",
    .det = XP_DET_RUN,
    .workspace = combine_bwd_workspace,
    .run = combine_bwd_run,
};
