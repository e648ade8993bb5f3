/* Stages xent and xent_bwd: see xp/xent.h for the meaning.
 *
 * Losses are per token and local; total and count are of the world. Must not divide: the caller does, once. */
#include "xp/xent.h"

#include <math.h>

#include "check.h"
#include "move.h"
#include "plane.h"
#include "ref.h"
#include "token.h"

/* ---- operands and parameters ---- */

enum { XENT_LSE = 2, XENT_LOSS = 3, XENT_TOTAL = 4, XENT_COUNT = 5, BWD_DLOGITS = 3 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_xent_args, logits, "T,V", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_xent_args, target, "T", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    [XENT_LSE] = XP_OPERAND(xp_xent_args, lse, "T", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [XENT_LOSS] = XP_OPERAND(xp_xent_args, loss, "T", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [XENT_TOTAL] = XP_OPERAND(xp_xent_args, total, "1", XP_OUT, XP_DT_WIDE, XP_BOUND, "wide"),
    [XENT_COUNT] = XP_OPERAND(xp_xent_args, count, "1", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_xent_bwd_args, logits, "T,V", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_xent_bwd_args, target, "T", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_xent_bwd_args, lse, "T", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    [BWD_DLOGITS] = XP_OPERAND(xp_xent_bwd_args, dlogits, "T,V", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static const xp_param params[] = {
    {"token0", NULL, "0", XP_P_I64, offsetof(xp_xent_args, token0)},
    {"block", NULL, "0", XP_P_I64, offsetof(xp_xent_args, block)},
};

/* ---- check ---- */

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_xent_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_xent, args, &d));
    if (XP_REF_DIM(d, 'V') < 1)
        return XP_FAIL(XP_E_ARG, "xent: logits dim 1 is %lld, expected V >= 1", (long long)XP_REF_DIM(d, 'V'));
    XP_TRY(xp_ref_blocks_check("xent", a->token0, a->block, XP_REF_DIM(d, 'T')));
    return xp_ref_ids_check("xent", "target", &a->target, INT32_MIN, XP_REF_DIM(d, 'V'), "V");
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    const xp_xent_bwd_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_xent_bwd, args, &d));
    return xp_ref_ids_check("xent_bwd", "target", &a->target, INT32_MIN, XP_REF_DIM(d, 'V'), "V");
}

/* ---- cost ---- */

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_xent_args *a = args;
    const double peers = (double)m->axis[XP_WORLD]->size - 1.0;
    *out = (xp_cost){.flop = 4.0 * (double)(a->logits.dim[0] * a->logits.dim[1]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_xent, args),
                     .net_bytes = peers * 16.0};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_xent_bwd_args *a = args;
    (void)m;
    *out = (xp_cost){.flop = 3.0 * (double)(a->logits.dim[0] * a->logits.dim[1]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_xent_bwd, args)};
}

/* ---- workspace: rows of V doubles, one sum a block, the fold's own ---- */

typedef struct {
    double *v, *p, *sums, *scratch;
    void *fold;
} work;

static size_t lay(const xp_xent_args *a, const xp_mesh *m, void *ws, work *out) {
    xp_ref_layout l = {.base = ws};
    const size_t row = (size_t)a->logits.dim[1] * sizeof(double);
    const int64_t B = xp_ref_blocks(a->token0, a->block, a->logits.dim[0]);
    out->v = xp_ref_take(&l, row);
    out->p = xp_ref_take(&l, row);
    out->scratch = xp_ref_take(&l, row);
    out->sums = xp_ref_take(&l, (size_t)(B > 0 ? B : 1) * sizeof(double));
    out->fold = xp_ref_take(&l, xp_ref_fold_ws(m->axis[XP_WORLD], 1, XP_F64));
    return l.bytes;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    work w;
    return lay(args, m, NULL, &w);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    return 2 * (size_t)((const xp_xent_bwd_args *)args)->logits.dim[1] * sizeof(double); /* the bound's two rows */
}

static xp_dtype op_of(const xp_xent_args *a) {
    const xp_tensor *const t[] = {&a->logits, &a->lse};
    return xp_ref_op_of(t, 2);
}

/* ---- bound ---- */

/* A token's log sum exp and loss, and how far an implementation's may be before they are stored. */
static void token_values(const xp_xent_args *a, const work *k, int64_t t, xp_dtype op, xp_ref_val *out_lse,
                         xp_ref_val *out_loss) {
    const int64_t V = a->logits.dim[1];
    const int32_t target = xp_ref_i32(&a->target, t, 0);
    xp_ref_rows_load(&a->logits, t, 1, k->v);
    out_lse->v = xp_ref_softmax(k->v, V, k->p);
    out_lse->e = xp_ref_softmax_error(k->v, 0.0, k->p, V, op, k->scratch);
    *out_loss = (xp_ref_val){0, 0};
    if (target >= 0)
        *out_loss = xp_ref_val_round(xp_ref_val_add(*out_lse, (xp_ref_val){-k->v[target], 0}), op, op);
}

/* total: every token's error, stored or not, and gamma of the world's additions times the sum of magnitudes.
 * Communicates: every rank of the world calls it alike. */
static xp_status bound_total(const xp_xent_args *a, const xp_mesh *m, const work *k, xp_dtype op, const xp_tensor *ref,
                             xp_tensor *tol) {
    const xp_ref_rule rule = xp_ref_rule_of(a->total.dtype, op);
    const xp_dtype sums = a->lse.dtype;
    xp_comm *world = m->axis[XP_WORLD];
    double all[3] = {0, 0, (double)a->logits.dim[0]};
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        xp_ref_val lse, loss;
        token_values(a, k, t, op, &lse, &loss);
        loss = xp_ref_rule_round(&rule, loss);
        all[0] += loss.e;
        all[1] += fabs(loss.v);
    }
    xp_tensor view = xp_tensor_1d(all, XP_F64, 3);
    if (world->size > 1)
        XP_TRY(world->ops->all_reduce(world, NULL, &view, XP_SUM));
    /* Each block's sum is stored once more than it is added. */
    const double g = xp_ref_both(2 * (int64_t)all[2] + world->size + 8, sums);
    const double v = xp_widen(ref->data, ref->dtype, 0);
    ((double *)tol->data)[0] = xp_ref_rule_out(&rule, (xp_ref_val){v, all[0] + g * (all[0] + all[1])});
    return XP_OK;
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    const xp_xent_args *a = args;
    const xp_dtype op = op_of(a);
    const xp_ref_rule rule = xp_ref_rule_of(a->lse.dtype, op);
    work k;
    lay(a, m, ws, &k);
    if (operand == XENT_TOTAL)
        return bound_total(a, m, &k, op, ref, tol);
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        xp_ref_val lse, loss;
        token_values(a, &k, t, op, &lse, &loss);
        ((double *)tol->data)[xp_tensor_offset(tol, t)] = xp_ref_rule_out(&rule, operand == XENT_LSE ? lse : loss);
    }
    return XP_OK;
}

/* exp(logits - lse) - onehot: the difference and the subtraction round once each in op. */
static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    const xp_xent_bwd_args *a = args;
    const xp_tensor *const t3[] = {&a->logits, &a->lse};
    const xp_dtype op = xp_ref_op_of(t3, 2);
    const xp_ref_rule rule = xp_ref_rule_of(a->dlogits.dtype, op);
    const int64_t V = a->logits.dim[1];
    double *v = ws, *e = v + V;
    (void)m;
    (void)operand;
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        const int32_t target = xp_ref_i32(&a->target, t, 0);
        const double lse = xp_widen(a->lse.data, a->lse.dtype, xp_tensor_offset(&a->lse, t));
        xp_ref_rows_load(&a->logits, t, 1, v);
        for (int64_t j = 0; j < V; j++) {
            const double d = v[j] - lse;
            const double p = xp_ref_exp(d), hot = j == target ? 1.0 : 0.0;
            const xp_ref_val exp_d = {
                p, xp_ref_exp_error(d, xp_ref_room(op, fabs(v[j]) + fabs(lse)), (double)INFINITY, op)};
            const xp_ref_val diff = xp_ref_val_round(xp_ref_val_add(exp_d, (xp_ref_val){-hot, 0}), op, op);
            e[j] = target < 0 ? 0 : xp_ref_rule_out(&rule, diff);
        }
        xp_ref_rows_store(tol, t, 1, e);
    }
    (void)ref;
    return XP_OK;
}

/* ---- reference kernels ---- */

static double token_loss(const xp_xent_args *a, const work *k, int64_t t) {
    const int32_t target = xp_ref_i32(&a->target, t, 0);
    xp_ref_rows_load(&a->logits, t, 1, k->v);
    const double lse = xp_ref_softmax(k->v, a->logits.dim[1], k->p);
    const double loss = target >= 0 ? lse - k->v[target] : 0.0;
    xp_ref_store(a->lse.data, a->lse.dtype, xp_tensor_offset(&a->lse, t), lse);
    xp_ref_store(a->loss.data, a->loss.dtype, xp_tensor_offset(&a->loss, t), loss);
    return xp_widen(a->loss.data, a->loss.dtype, xp_tensor_offset(&a->loss, t));
}

static xp_status run(const xp_exec *ex, const void *args) {
    const xp_xent_args *a = args;
    xp_comm *world = ex->mesh->axis[XP_WORLD];
    const int64_t T = a->logits.dim[0], B = xp_ref_blocks(a->token0, a->block, T);
    int64_t count = 0;
    double total;
    work k;
    lay(a, ex->mesh, ex->ws, &k);
    for (int64_t b = 0; b < B; b++) {
        int64_t lo, hi;
        double sum = 0;
        xp_ref_block_tokens(a->token0, a->block, T, b, &lo, &hi);
        for (int64_t t = lo; t < hi; t++) {
            sum += token_loss(a, &k, t);
            count += xp_ref_i32(&a->target, t, 0) >= 0;
        }
        xp_ref_store(k.sums, a->total.dtype, b, sum);
    }
    const xp_tensor sums = xp_tensor_2d(k.sums, a->total.dtype, B, 1);
    /* A lone rank folds its own sums: it has nobody to talk to. */
    XP_TRY(xp_ref_fold("xent", world->size > 1 ? world : NULL, ex->q, &sums,
                       a->block > 0 ? a->token0 / a->block : world->rank, k.fold, &total));
    xp_ref_store(a->total.data, a->total.dtype, 0, total);
    xp_tensor n = xp_tensor_1d(&count, XP_I64, 1);
    if (world->size > 1)
        XP_TRY(world->ops->all_reduce(world, ex->q, &n, XP_SUM));
    ((int64_t *)a->count.data)[0] = count;
    return XP_OK;
}

static xp_status bwd_run(const xp_exec *ex, const void *args) {
    const xp_xent_bwd_args *a = args;
    const int64_t V = a->logits.dim[1];
    double *v = ex->ws;
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        const int32_t target = xp_ref_i32(&a->target, t, 0);
        const double lse = xp_widen(a->lse.data, a->lse.dtype, xp_tensor_offset(&a->lse, t));
        xp_ref_rows_load(&a->logits, t, 1, v);
        for (int64_t j = 0; j < V; j++)
            v[j] = target < 0 ? 0.0 : xp_ref_exp(v[j] - lse) - (j == target ? 1.0 : 0.0);
        xp_ref_rows_store(&a->dlogits, t, 1, v);
    }
    return XP_OK;
}

/* ---- fill, slices ---- */

/* About one target in eight is ignored; the others are any id. */
static void fill_targets(const xp_tensor *logits, const xp_tensor *target, uint64_t seed) {
    for (int64_t t = 0; t < logits->dim[0]; t++) {
        const uint64_t u = xp_ref_row_word(xp_tensor_at(logits, t, 0, 0, 0), logits->dtype, logits->dim[1], seed);
        ((int32_t *)target->data)[xp_tensor_offset(target, t)] =
            u >> 61 == 0 ? -1 : (int32_t)(u % (uint64_t)logits->dim[1]);
    }
}

static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_xent_args *a = args;
    (void)m;
    (void)data;
    fill_targets(&a->logits, &a->target, seed);
    return XP_OK;
}

static xp_status bwd_fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_xent_bwd_args *a = args;
    (void)m;
    (void)data;
    fill_targets(&a->logits, &a->target, seed);
    for (int64_t t = 0; t < a->logits.dim[0]; t++) {
        double top = -(double)INFINITY, sum = 0;
        for (int64_t j = 0; j < a->logits.dim[1]; j++) {
            const double v = xp_widen(xp_tensor_at(&a->logits, t, j, 0, 0), a->logits.dtype, 0);
            top = v > top ? v : top;
        }
        for (int64_t j = 0; j < a->logits.dim[1]; j++)
            sum += xp_ref_exp(xp_widen(xp_tensor_at(&a->logits, t, j, 0, 0), a->logits.dtype, 0) - top);
        xp_ref_store(a->lse.data, a->lse.dtype, xp_tensor_offset(&a->lse, t), top + xp_ref_log(sum));
    }
    return XP_OK;
}

static int64_t bwd_extent(const void *args) {
    return ((const xp_xent_bwd_args *)args)->logits.dim[0];
}

static void bwd_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_xent_bwd_args *a = args;
    xp_xent_bwd_args *o = out;
    o->logits = xp_tensor_rows(&a->logits, 0, lo, hi);
    o->target = xp_tensor_rows(&a->target, 0, lo, hi);
    o->lse = xp_tensor_rows(&a->lse, 0, lo, hi);
    o->dlogits = xp_tensor_rows(&a->dlogits, 0, lo, hi);
}

const xp_stage xp_stage_xent = {
    .name = "xent",
    .meaning = "cross-entropy as a sum over valid tokens, and their number, over the world",
    .axis = XP_WORLD,
    .args_size = sizeof(xp_xent_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = workspace,
    .fill = fill,
};

const xp_stage xp_stage_xent_bwd = {
    .name = "xent_bwd",
    .meaning = "gradient of the cross-entropy's sum with respect to the logits",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_xent_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_workspace,
    .fill = bwd_fill,
    .extent = bwd_extent,
    .slice = bwd_slice,
};

const xp_kernel xp_ref_xent = {
    .stage = &xp_stage_xent, .name = "row_fold", .det = XP_DET_RUN, .workspace = workspace, .run = run};

const xp_kernel xp_ref_xent_bwd = {.stage = &xp_stage_xent_bwd,
                                   .name = "row",
                                   .det = XP_DET_RUN | XP_DET_MESH,
                                   .workspace = bwd_workspace,
                                   .run = bwd_run};
