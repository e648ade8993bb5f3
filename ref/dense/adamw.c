/* Second formulation of stage adamw. exact: decay first, then the moments' ratio with both bias corrections moved out
 * of it (1 - b^t through expm1 and log), all in double. torch: unfused, one pass over the whole tensor for each of its
 * operations, every result stored before the next; the judged row fuses them, and owes the same bits. */
#include <math.h>

#include "dense.h"
#include "num.h"

/* 1 - b^t without cancellation; b = 0 gives 1. */
static double correction(double b, int64_t t) {
    return -expm1((double)t * log(b));
}

static void exact(const xp_adamw_args *a) {
    const double rate = a->lr / correction(a->beta1, a->step), root2 = sqrt(correction(a->beta2, a->step));
    for (int64_t q = 0; q < a->decay.dim[0]; q++) {
        const double keep = xp_dense_int(&a->decay, q) ? 1 - a->lr * a->weight_decay : 1;
        for (int64_t i = xp_dense_int(&a->seg, q); i < xp_dense_int(&a->seg, q + 1); i++) {
            const double g = xp_dense_get(&a->grad, i);
            const double m = (1 - a->beta1) * g + a->beta1 * xp_dense_get(&a->m, i);
            const double v = (1 - a->beta2) * (g * g) + a->beta2 * xp_dense_get(&a->v, i);
            const double p = keep * xp_dense_get(&a->param, i) - rate * (m / (sqrt(v) / root2 + a->eps));
            xp_dense_put(&a->m, i, m);
            xp_dense_put(&a->v, i, v);
            xp_dense_put(&a->param, i, p);
        }
    }
}

/* ---- torch, unfused ---- */

/* One rounding to f32 of a double that came from one operation on floats: double has more than twice the digits and
 * two, so this is the float operation (Figueroa 1995). */
static double f(double v) {
    return xp_dense_round(XP_F32, v);
}

typedef enum { SCALE, LERP, ADD_PRODUCT, ROOT, DIVIDE, ADD, ADD_QUOTIENT } op;

static double apply(op o, double x, double y, double z, double s) {
    switch (o) {
    case SCALE:
        return f(x * s);
    case LERP: /* from x towards y */
        return s < 0.5 ? f(x + f(s * f(y - x))) : f(y - f(f(y - x) * f(1 - s)));
    case ADD_PRODUCT:
        return f(x + f(f(s * y) * z));
    case ROOT:
        return f(sqrt(x));
    case DIVIDE:
        return f(x / s);
    case ADD:
        return f(x + s);
    default:
        return f(x + f(f(s * y) / z));
    }
}

/* x = o(x, y, z; s) for n elements from lo on, each kept in d. */
static void pass(op o, xp_dtype d, const xp_tensor *x, const xp_tensor *y, const xp_tensor *z, double s, int64_t lo,
                 int64_t n) {
    for (int64_t i = lo; i < lo + n; i++) {
        const double v = apply(o, xp_dense_get(x, i), y ? xp_dense_get(y, i) : 0, z ? xp_dense_get(z, i) : 0, f(s));
        xp_dense_put(x, i, xp_dense_round(d, v));
    }
}

static void torch(const xp_adamw_args *a, double *room) {
    const int64_t n = a->param.dim[0];
    const xp_dtype d = a->grad.dtype;
    const double rate = a->lr / correction(a->beta1, a->step), root2 = sqrt(correction(a->beta2, a->step));
    const xp_tensor r = xp_tensor_1d(room, XP_F64, n);
    for (int64_t q = 0; q < a->decay.dim[0] && a->weight_decay != 0; q++) {
        const int64_t lo = xp_dense_int(&a->seg, q), hi = xp_dense_int(&a->seg, q + 1);
        if (xp_dense_int(&a->decay, q))
            pass(SCALE, d, &a->param, NULL, NULL, 1 - a->lr * a->weight_decay, lo, hi - lo);
    }
    pass(LERP, d, &a->m, &a->grad, NULL, 1 - a->beta1, 0, n);
    pass(SCALE, d, &a->v, NULL, NULL, a->beta2, 0, n);
    pass(ADD_PRODUCT, d, &a->v, &a->grad, &a->grad, 1 - a->beta2, 0, n);
    for (int64_t i = 0; i < n; i++)
        xp_dense_put(&r, i, xp_dense_get(&a->v, i));
    pass(ROOT, d, &r, NULL, NULL, 0, 0, n);
    pass(DIVIDE, d, &r, NULL, NULL, root2, 0, n);
    pass(ADD, d, &r, NULL, NULL, a->eps, 0, n);
    pass(ADD_QUOTIENT, d, &a->param, &a->m, &r, -rate, 0, n);
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_adamw_args *a = args;
    (void)m;
    return a->semantics == XP_TORCH ? xp_dense_room(a->param.dim[0], sizeof(double)) : 0;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_adamw_args *a = args;
    if (a->semantics == XP_TORCH)
        torch(a, x->ws);
    else
        exact(a);
    return XP_OK;
}

const xp_kernel xp_dense_adamw = {
    .stage = &xp_stage_adamw,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
