/* Stages carry and carry_bwd: see xp/carry.h for the meaning.
 *
 * A product, rounded, and a sum, rounded; the gradient of the scale is a sum over tokens, ascending, in double. Must
 * not sum across blocks. */
#include "xp/carry.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "plane.h"
#include "ref.h"
#include "token.h"

/* ---- operands and parameters ---- */

enum { CARRY_Y = 3, BWD_DB = 3, BWD_DSCALE = 4 };

static const xp_operand operands[] = {
    XP_OPERAND(xp_carry_args, a, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_carry_args, b, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_carry_args, scale, "H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    [CARRY_Y] = XP_OPERAND(xp_carry_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
};

static const xp_operand bwd_operands[] = {
    XP_OPERAND(xp_carry_bwd_args, dy, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_carry_bwd_args, b, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_carry_bwd_args, scale, "H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "param"),
    [BWD_DB] = XP_OPERAND(xp_carry_bwd_args, db, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    [BWD_DSCALE] = XP_OPERAND(xp_carry_bwd_args, dscale, "B,H", XP_OUT, XP_DT_ACT, XP_BOUND, "grad"),
};

static const xp_param bwd_params[] = {
    {"token0", NULL, "0", XP_P_I64, offsetof(xp_carry_bwd_args, token0)},
    {"block", NULL, "0", XP_P_I64, offsetof(xp_carry_bwd_args, block)},
};

/* ---- check ---- */

static xp_status check(const void *args, const xp_mesh *m) {
    (void)m;
    xp_ref_dims d;
    return xp_ref_check(&xp_stage_carry, args, &d);
}

static xp_status bwd_check(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_carry_bwd_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_carry_bwd, args, &d));
    XP_TRY(xp_ref_blocks_check("carry_bwd", a->token0, a->block, XP_REF_DIM(d, 'T')));
    const int64_t B = xp_ref_blocks(a->token0, a->block, XP_REF_DIM(d, 'T'));
    if (XP_REF_DIM(d, 'B') != B)
        return XP_FAIL(XP_E_ARG, "carry_bwd: dscale dim 0 is %lld, expected B = %lld blocks from token0 %lld",
                       (long long)XP_REF_DIM(d, 'B'), (long long)B, (long long)a->token0);
    return XP_OK;
}

/* ---- cost ---- */

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_carry_args *a = args;
    *out =
        (xp_cost){.flop = 2.0 * (double)(a->y.dim[0] * a->y.dim[1]), .mem_bytes = xp_ref_bytes(&xp_stage_carry, args)};
}

static void bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    (void)m;
    const xp_carry_bwd_args *a = args;
    *out = (xp_cost){.flop = 3.0 * (double)(a->db.dim[0] * a->db.dim[1]),
                     .mem_bytes = xp_ref_bytes(&xp_stage_carry_bwd, args)};
}

/* ---- workspace ---- */

enum { PLANES = 4 };
typedef struct {
    double *plane[PLANES]; /* [H] each */
} work;

static size_t lay(int64_t H, void *ws, work *out) {
    xp_ref_layout l = {.base = ws};
    for (int i = 0; i < PLANES; i++)
        out->plane[i] = xp_ref_take(&l, (size_t)H * sizeof(double));
    return l.bytes;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    work w;
    return lay(((const xp_carry_args *)args)->y.dim[1], NULL, &w);
}

static size_t bwd_workspace(const void *args, const xp_mesh *m) {
    (void)m;
    work w;
    return lay(((const xp_carry_bwd_args *)args)->db.dim[1], NULL, &w);
}

static void load_vector(const xp_tensor *t, double *out) {
    xp_widen_row(t->data, t->dtype, 0, t->dim[0], out);
}

/* ---- bound ---- */

static xp_ref_val product(double x, double y) {
    return xp_ref_val_mul((xp_ref_val){x, 0.0}, (xp_ref_val){y, 0.0});
}

/* A product of exact inputs, its rounding point, an addition and the last rounding: err.h. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    (void)m;
    (void)ref;
    const xp_carry_args *p = args;
    const xp_tensor *const in[] = {&p->a, &p->b, &p->scale, &p->y};
    const xp_ref_rule rule = xp_ref_rule_of(p->a.dtype, xp_ref_op_of(in, 4));
    work k;
    if (operand != CARRY_Y)
        return XP_FAIL(XP_E_BUG, "carry: operand %d has no bound", operand);
    lay(p->y.dim[1], ws, &k);
    double *a = k.plane[0], *b = k.plane[1], *scale = k.plane[2];
    load_vector(&p->scale, scale);
    for (int64_t t = 0; t < p->y.dim[0]; t++) {
        xp_ref_rows_load(&p->a, t, 1, a);
        xp_ref_rows_load(&p->b, t, 1, b);
        for (int64_t h = 0; h < p->y.dim[1]; h++) {
            const xp_ref_val added = xp_ref_rule_round(&rule, product(b[h], scale[h]));
            b[h] = xp_ref_rule_out(&rule, xp_ref_val_add((xp_ref_val){a[h], 0.0}, added));
        }
        xp_ref_rows_store(tol, t, 1, b);
    }
    return XP_OK;
}

static xp_dtype bwd_op(const xp_carry_bwd_args *a) {
    const xp_tensor *const in[] = {&a->dy, &a->b, &a->scale};
    return xp_ref_op_of(in, 3);
}

static void bound_db(const xp_carry_bwd_args *a, const work *k, xp_tensor *tol) {
    const xp_ref_rule rule = xp_ref_rule_of(a->db.dtype, bwd_op(a));
    double *dy = k->plane[0], *scale = k->plane[2];
    load_vector(&a->scale, scale);
    for (int64_t t = 0; t < a->db.dim[0]; t++) {
        xp_ref_rows_load(&a->dy, t, 1, dy);
        for (int64_t h = 0; h < a->db.dim[1]; h++)
            dy[h] = xp_ref_rule_out(&rule, product(dy[h], scale[h]));
        xp_ref_rows_store(tol, t, 1, dy);
    }
}

/* A sum of n products, each within e of r(dy b): sum of e, and gamma(n) in either arithmetic of the sum of what a
 * product may be. +inf where a partial sum may leave op's range. */
static void bound_dscale(const xp_carry_bwd_args *a, const work *k, int64_t s, const xp_tensor *ref, xp_tensor *tol) {
    const xp_dtype op = bwd_op(a);
    const xp_ref_rule inner = xp_ref_rule_of(a->dy.dtype, op), outer = xp_ref_rule_of(a->dscale.dtype, op);
    const int64_t H = a->db.dim[1];
    double *dy = k->plane[0], *b = k->plane[1], *gauge = k->plane[2], *e = k->plane[3];
    int64_t lo, hi;
    xp_ref_block_tokens(a->token0, a->block, a->db.dim[0], s, &lo, &hi);
    memset(gauge, 0, (size_t)H * sizeof *gauge);
    memset(e, 0, (size_t)H * sizeof *e);
    for (int64_t t = lo; t < hi; t++) {
        xp_ref_rows_load(&a->dy, t, 1, dy);
        xp_ref_rows_load(&a->b, t, 1, b);
        for (int64_t h = 0; h < H; h++) {
            const xp_ref_val v = xp_ref_rule_round(&inner, product(dy[h], b[h]));
            gauge[h] += fabs(v.v) + v.e;
            e[h] += v.e;
        }
    }
    const double g = xp_ref_both(hi - lo, op);
    xp_ref_rows_load(ref, s, 1, b);
    for (int64_t h = 0; h < H; h++) {
        const double err = gauge[h] <= xp_ref_largest(op) / 4 ? e[h] + g * gauge[h] : (double)INFINITY;
        b[h] = xp_ref_rule_out(&outer, (xp_ref_val){b[h], err});
    }
    xp_ref_rows_store(tol, s, 1, b);
}

static xp_status bwd_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    (void)m;
    const xp_carry_bwd_args *a = args;
    work k;
    lay(a->db.dim[1], ws, &k);
    if (operand == BWD_DB)
        bound_db(a, &k, tol);
    else if (operand != BWD_DSCALE)
        return XP_FAIL(XP_E_BUG, "carry_bwd: operand %d has no bound", operand);
    for (int64_t s = 0; operand == BWD_DSCALE && s < a->dscale.dim[0]; s++)
        bound_dscale(a, &k, s, ref, tol);
    return XP_OK;
}

/* ---- reference ---- */

static xp_status run(const xp_exec *x, const void *args) {
    const xp_carry_args *p = args;
    const int64_t H = p->y.dim[1];
    work k;
    lay(H, x->ws, &k);
    double *a = k.plane[0], *b = k.plane[1], *scale = k.plane[2];
    load_vector(&p->scale, scale);
    for (int64_t t = 0; t < p->y.dim[0]; t++) {
        xp_ref_rows_load(&p->a, t, 1, a);
        xp_ref_rows_load(&p->b, t, 1, b);
        for (int64_t h = 0; h < H; h++)
            b[h] *= scale[h];
        xp_ref_round_row(p->a.dtype, H, b);
        for (int64_t h = 0; h < H; h++)
            a[h] += b[h];
        xp_ref_rows_store(&p->y, t, 1, a);
    }
    return XP_OK;
}

/* Token t: db, and r(dy b) added to sum. */
static void bwd_row(const xp_carry_bwd_args *a, const work *k, int64_t t, const double *scale, double *sum) {
    const int64_t H = a->db.dim[1];
    double *dy = k->plane[0], *b = k->plane[1];
    xp_ref_rows_load(&a->dy, t, 1, dy);
    xp_ref_rows_load(&a->b, t, 1, b);
    for (int64_t h = 0; h < H; h++) {
        b[h] *= dy[h];
        dy[h] *= scale[h];
    }
    xp_ref_rows_store(&a->db, t, 1, dy);
    xp_ref_round_row(a->dy.dtype, H, b);
    for (int64_t h = 0; h < H; h++)
        sum[h] += b[h];
}

static xp_status bwd_run(const xp_exec *x, const void *args) {
    const xp_carry_bwd_args *a = args;
    const int64_t H = a->db.dim[1];
    work k;
    lay(H, x->ws, &k);
    double *scale = k.plane[2], *sum = k.plane[3];
    load_vector(&a->scale, scale);
    for (int64_t s = 0; s < a->dscale.dim[0]; s++) {
        int64_t lo, hi;
        xp_ref_block_tokens(a->token0, a->block, a->db.dim[0], s, &lo, &hi);
        memset(sum, 0, (size_t)H * sizeof *sum);
        for (int64_t t = lo; t < hi; t++)
            bwd_row(a, &k, t, scale, sum);
        xp_ref_rows_store(&a->dscale, s, 1, sum);
    }
    return XP_OK;
}

/* ---- slices ---- */

static int64_t extent(const void *args) {
    return ((const xp_carry_args *)args)->y.dim[0];
}

static void slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const xp_carry_args *p = args;
    xp_carry_args *o = out;
    o->a = xp_tensor_rows(&p->a, 0, lo, hi);
    o->b = xp_tensor_rows(&p->b, 0, lo, hi);
    o->y = xp_tensor_rows(&p->y, 0, lo, hi);
}

/* ---- stages and rows ---- */

const xp_stage xp_stage_carry = {
    .name = "carry",
    .meaning = "rows plus rows of the block before times a number a column: the state of a router",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_carry_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = workspace,
    .extent = extent,
    .slice = slice,
};

const xp_stage xp_stage_carry_bwd = {
    .name = "carry_bwd",
    .meaning = "gradients of carry: of the rows of the block before, and of the numbers for each block of tokens",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_carry_bwd_args),
    .operand = bwd_operands,
    .operands = sizeof bwd_operands / sizeof *bwd_operands,
    .param = bwd_params,
    .params = sizeof bwd_params / sizeof *bwd_params,
    .check = bwd_check,
    .cost = bwd_cost,
    .bound = bwd_bound,
    .bound_workspace = bwd_workspace,
};

const xp_kernel xp_ref_carry = {
    .stage = &xp_stage_carry,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};

const xp_kernel xp_ref_carry_bwd = {
    .stage = &xp_stage_carry_bwd,
    .name = "ref",
    .det = XP_DET_RUN,
    .workspace = bwd_workspace,
    .run = bwd_run,
};
