/* Stage sgd: one step of SGD with momentum on flat f32 shards, in one pass.
 *
 * Contract, element by element: d = g + wd p, where wd is weight_decay in segments whose decay flag is 1, else 0; then
 *     buf' = d on step 1, momentum buf + d later;  p' = p - lr buf'
 * with momentum 0: p' = p - lr d, and buf is neither read nor written (it may be absent). On step 1 buf is not read.
 * Rounding points: buf' and p' are rounded once to f32 when they are stored, nothing else is; p' uses buf' as it was
 * before that rounding. An implementation in f32 may round every operation and every scalar. Unlike AdamW this
 * is not scale invariant: a gradient off by a constant shows. Must not keep state of its own.
 * Source: torch.optim.SGD (dampening 0, nesterov and maximize off). */
#include "xp/sgd.h"

#include <math.h>

#include "check.h"
#include "flat.h"
#include "num.h"
#include "ref.h"

enum { PARAM, BUF };

static const xp_operand operands[] = {
    XP_OPERAND(xp_sgd_args, param, "N", XP_INOUT, XP_BIT(XP_F32), XP_BOUND, ""),
    XP_OPTIONAL(xp_sgd_args, buf, "N", XP_INOUT, XP_BIT(XP_F32), XP_BOUND, ""),
    XP_OPERAND(xp_sgd_args, grad, "N", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_sgd_args, seg, "Q+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_sgd_args, decay, "Q", XP_IN, XP_BIT(XP_U8), XP_UNCOMPARED, ""),
};

static const xp_param params[] = {
    {"lr", NULL, "1e-2", XP_P_F64, offsetof(xp_sgd_args, lr)},
    {"momentum", NULL, "0", XP_P_F64, offsetof(xp_sgd_args, momentum)},
    {"weight_decay", NULL, "1e-4", XP_P_F64, offsetof(xp_sgd_args, weight_decay)},
    {"step", NULL, "1", XP_P_I64, offsetof(xp_sgd_args, step)},
};

static xp_status check_scalar(const char *name, double x) {
    if (!(x >= 0.0 && isfinite(x)))
        return XP_FAIL(XP_E_ARG, "sgd: %s is %g, expected a finite number >= 0", name, x);
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_sgd_args *a = args;
    xp_sgd_args shapes = *a;
    xp_ref_dims dims;
    (void)m;
    shapes.param = xp_ref_flat_narrow(&a->param);
    shapes.buf = xp_ref_flat_narrow(&a->buf);
    XP_TRY(xp_ref_check(&xp_stage_sgd, &shapes, &dims));
    XP_TRY(check_scalar("lr", a->lr));
    XP_TRY(check_scalar("momentum", a->momentum));
    XP_TRY(check_scalar("weight_decay", a->weight_decay));
    if (a->step < 1)
        return XP_FAIL(XP_E_ARG, "sgd: step is %lld, expected 1 for the first step", (long long)a->step);
    if (a->momentum != 0.0 && !a->buf.data && a->param.dim[0] > 0)
        return XP_FAIL(XP_E_ARG, "sgd: buf is absent with momentum %g, expected [%lld]", a->momentum,
                       (long long)a->param.dim[0]);
    return xp_ref_flat_check("sgd", &a->seg, &a->decay, "decay", a->param.dim[0]);
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_sgd_args *a = args;
    const double n = (double)a->param.dim[0];
    const int moves = a->momentum == 0.0 ? 3 : a->step == 1 ? 4 : 5; /* arrays read or written */
    (void)m;
    *out = (xp_cost){
        .flop = (a->momentum == 0.0 ? 4.0 : 6.0) * n,
        .mem_bytes = 4.0 * moves * n + 9.0 * (double)a->decay.dim[0] + 8.0,
    };
}

static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_sgd_args *a = args;
    (void)m, (void)data;
    xp_ref_flat_borders(&a->seg, a->param.dim[0], seed);
    for (int64_t q = 0; q < a->decay.dim[0]; q++)
        ((uint8_t *)a->decay.data)[q] = xp_ref_flat_mix(seed, (uint64_t)~q) & 1u;
    return XP_OK;
}

static double decay_of(const xp_sgd_args *a, int64_t q) {
    return ((const uint8_t *)a->decay.data)[q] ? a->weight_decay : 0.0;
}

/* Elements [lo, hi) of one segment, a chunk at a time. b starts as d and becomes the direction. */
static void run_segment(const xp_sgd_args *a, double decay, int64_t lo, int64_t hi) {
    enum { CHUNK = 256 };
    double p[CHUNK], b[CHUNK], past[CHUNK];
    for (int64_t i = lo; i < hi; i += CHUNK) {
        const int64_t n = hi - i < CHUNK ? hi - i : CHUNK;
        xp_widen_row(a->param.data, a->param.dtype, i, n, p);
        xp_widen_row(a->grad.data, a->grad.dtype, i, n, b);
        for (int64_t j = 0; j < n && decay != 0.0; j++) /* an infinite p of a segment without decay stays out */
            b[j] += decay * p[j];
        if (a->momentum != 0.0 && a->step > 1) {
            xp_widen_row(a->buf.data, a->buf.dtype, i, n, past);
            for (int64_t j = 0; j < n; j++)
                b[j] += a->momentum * past[j];
        }
        if (a->momentum != 0.0)
            xp_ref_store_row(a->buf.data, a->buf.dtype, i, n, b);
        for (int64_t j = 0; j < n; j++)
            p[j] -= a->lr * b[j];
        xp_ref_store_row(a->param.data, a->param.dtype, i, n, p);
    }
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_sgd_args *a = args;
    const int64_t *seg = a->seg.data;
    (void)x;
    for (int64_t q = 0; q < a->decay.dim[0]; q++)
        run_segment(a, decay_of(a, q), seg[q], seg[q + 1]);
    return XP_OK;
}

/* ---- bound ----
 *
 * Roundings in f32, with S = |momentum buf| + |g| + |wd p|: a scalar, its product and two sums for buf', 4 on S; for p'
 * lr, its product and the subtraction after those, 7 on lr S, and the subtraction on |p|, 1. The double arithmetic of
 * the judge has at most 8 of its own. Each product may lose half the smallest subnormal. */
#define TINY 0x1p-150

static double roundings(int n) {
    return xp_ref_gamma(n, XP_F32) + xp_ref_gamma(8, XP_F64);
}

static double unless_over(double tol, double magnitude) {
    return magnitude <= 0x1.fffffep127 && tol == tol ? tol : (double)INFINITY;
}

static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    const xp_sgd_args *a = args;
    const int64_t *seg = a->seg.data;
    const int past = a->momentum != 0.0 && a->step > 1;
    double *out = tol->data;
    (void)m, (void)ref, (void)ws;
    for (int64_t q = 0; q < a->decay.dim[0]; q++) {
        for (int64_t i = seg[q]; i < seg[q + 1]; i++) {
            const double p = fabs(xp_widen(a->param.data, a->param.dtype, i));
            const double g = fabs((double)((const float *)a->grad.data)[i]);
            const double buf = past ? fabs(a->momentum * xp_widen(a->buf.data, a->buf.dtype, i)) : 0.0;
            const double sum = buf + g + decay_of(a, q) * p;
            if (operand == BUF && a->momentum == 0.0)
                out[i] = 0.0;
            else if (operand == BUF)
                out[i] = unless_over(roundings(4) * sum + 2.0 * TINY, sum);
            else
                out[i] = unless_over(roundings(1) * p + roundings(7) * a->lr * sum + (1.0 + 2.0 * a->lr) * TINY,
                                     p + fmax(1.0, a->lr) * sum);
        }
    }
    return XP_OK;
}

const xp_stage xp_stage_sgd = {
    .name = "sgd",
    .meaning = "one SGD step with momentum; decay by segment",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_sgd_args),
    .operand = operands,
    .operands = sizeof operands / sizeof operands[0],
    .param = params,
    .params = sizeof params / sizeof params[0],
    .check = check,
    .cost = cost,
    .bound = bound,
    .fill = fill,
};

const xp_kernel xp_ref_sgd = {
    .stage = &xp_stage_sgd,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
