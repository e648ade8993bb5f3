/* Stage adamw: one step of AdamW on flat shards, in one pass.
 *
 * Contract, semantics exact, element by element, with t = step counted from 1:
 *     m' = beta1 m + (1 - beta1) g
 *     v' = beta2 v + (1 - beta2) g^2
 *     p' = p (1 - lr wd) - lr (m' / (1 - beta1^t)) / (sqrt(v' / (1 - beta2^t)) + eps)
 * wd is weight_decay where the segment's decay flag is 1, else 0: the decay is decoupled, it never enters m or v.
 * Rounding points: m', v' and p' are rounded once, to nearest, to their tensors' dtype when they are stored, nothing
 * else is; p' uses m' and v' as they were before that rounding. An implementation in f32 may round every operation and
 * every scalar (computed in double, rounded once: 1 - beta2 from a rounded beta2 is another optimizer), in torch's
 * order or this one. A zero gradient still decays the parameter and the moments. NaN and infinities of g reach m, v and
 * p. v < 0 is an error of the caller and gives NaN. bf16 masters lose updates below half a unit (stochastic rounding,
 * the usual answer, is left out on purpose). Must not keep state of its own.
 *
 * Contract, semantics torch, with d the one dtype of all four tensors and every scalar computed in double and rounded
 * to f32: the sequence of torch's for-loop code (2.13), each line's operations rounded to f32 one by one and its
 * result to d:
 *     p = p * (1 - lr wd), in decayed segments when wd is not 0
 *     m = m + (1 - beta1) * (g - m), or, when 1 - beta1 >= 1/2, g - (g - m) * (1 - (1 - beta1))
 *     v = v * beta2;  v = v + ((1 - beta2) * g) * g
 *     r = sqrt(v);  r = r / sqrt(1 - beta2^t);  r = r + eps
 *     p = p + (-lr / (1 - beta1^t) * m) / r
 * One pass over all lines and one pass a line give the same bits: that is what fused = unfused means here. torch's own
 * paths are not so: foreach=True has these bits in f32 but not always in bf16, fused=True orders the operations
 * otherwise and differs in the last place, and vectorised CPU code fuses some products with sums (seen with 2.13; with
 * ATEN_CPU_CAPABILITY=default its for-loop has these bits).
 *
 * Source: Loshchilov and Hutter 2019, algorithm 2; torch.optim.AdamW (amsgrad and maximize off). */
#include "xp/adamw.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "flat.h"
#include "num.h"
#include "ref.h"

enum { PARAM, M, V }; /* the compared operands, by their place in the table */

#define FLOATS (XP_BIT(XP_F32) | XP_BIT(XP_BF16))

static const xp_operand operands[] = {
    XP_OPERAND(xp_adamw_args, param, "N", XP_INOUT, FLOATS, XP_BOUND, "master"),
    XP_OPERAND(xp_adamw_args, m, "N", XP_INOUT, FLOATS, XP_BOUND, "moment"),
    XP_OPERAND(xp_adamw_args, v, "N", XP_INOUT, FLOATS, XP_BOUND, "moment"),
    XP_OPERAND(xp_adamw_args, grad, "N", XP_IN, FLOATS, XP_UNCOMPARED, "grad"),
    XP_OPERAND(xp_adamw_args, seg, "Q+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_adamw_args, decay, "Q", XP_IN, XP_BIT(XP_U8), XP_UNCOMPARED, ""),
};

static const xp_param params[] = {
    {"lr", NULL, "1e-3", XP_P_F64, offsetof(xp_adamw_args, lr)},
    {"beta1", NULL, "0.9", XP_P_F64, offsetof(xp_adamw_args, beta1)},
    {"beta2", NULL, "0.999", XP_P_F64, offsetof(xp_adamw_args, beta2)},
    {"eps", NULL, "1e-8", XP_P_F64, offsetof(xp_adamw_args, eps)},
    {"weight_decay", NULL, "0.01", XP_P_F64, offsetof(xp_adamw_args, weight_decay)},
    {"step", NULL, "1", XP_P_I64, offsetof(xp_adamw_args, step)},
    {"semantics", "exact|torch", "exact", XP_P_WORD, offsetof(xp_adamw_args, semantics)},
};

static xp_status check_scalar(const char *name, double x, double below) {
    if (!(x >= 0.0 && x < below))
        return XP_FAIL(XP_E_ARG, "adamw: %s is %g, expected 0 <= %s < %g", name, x, name, below);
    return XP_OK;
}

static xp_status check_semantics(const xp_adamw_args *a) {
    const xp_tensor *const t[] = {&a->param, &a->m, &a->v};
    static const char *const name[] = {"param", "m", "v"};
    if (a->semantics != XP_EXACT && a->semantics != XP_TORCH)
        return XP_FAIL(XP_E_ARG, "adamw: semantics is %d, expected exact or torch", a->semantics);
    for (int i = 0; i < 3 && a->semantics == XP_TORCH; i++) {
        if (t[i]->dtype != a->grad.dtype)
            return XP_FAIL(XP_E_ARG, "adamw: %s has dtype %s, expected grad's %s with semantics torch", name[i],
                           xp_dtype_name(t[i]->dtype), xp_dtype_name(a->grad.dtype));
    }
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_adamw_args *a = args;
    const double inf = (double)INFINITY;
    xp_adamw_args shapes = *a;
    xp_ref_dims dims;
    (void)m;
    shapes.param = xp_ref_flat_narrow(&a->param);
    shapes.m = xp_ref_flat_narrow(&a->m);
    shapes.v = xp_ref_flat_narrow(&a->v);
    XP_TRY(xp_ref_check(&xp_stage_adamw, &shapes, &dims));
    XP_TRY(check_semantics(a));
    XP_TRY(check_scalar("lr", a->lr, inf));
    XP_TRY(check_scalar("beta1", a->beta1, 1.0));
    XP_TRY(check_scalar("beta2", a->beta2, 1.0));
    XP_TRY(check_scalar("eps", a->eps, inf));
    XP_TRY(check_scalar("weight_decay", a->weight_decay, inf));
    if (a->step < 1)
        return XP_FAIL(XP_E_ARG, "adamw: step is %lld, expected 1 for the first step", (long long)a->step);
    return xp_ref_flat_check("adamw", &a->seg, &a->decay, "decay", a->param.dim[0]);
}

static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_adamw_args *a = args;
    const double n = (double)a->param.dim[0];
    (void)m;
    /* products, sums, quotients and the root of the three formulas; four arrays read, three written */
    const double state = (double)(xp_dtype_bytes(a->param.dtype, 2) + xp_dtype_bytes(a->m.dtype, 2) +
                                  xp_dtype_bytes(a->v.dtype, 2) + xp_dtype_bytes(a->grad.dtype, 1));
    *out = (xp_cost){.flop = 15.0 * n, .mem_bytes = state * n + 9.0 * (double)a->decay.dim[0] + 8.0};
}

/* A second moment is not negative; a random half of the segments is decayed. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_adamw_args *a = args;
    (void)m, (void)data;
    xp_ref_flat_abs(&a->v);
    xp_ref_flat_borders(&a->seg, a->param.dim[0], seed);
    for (int64_t q = 0; q < a->decay.dim[0]; q++)
        ((uint8_t *)a->decay.data)[q] = xp_ref_flat_mix(seed, (uint64_t)~q) & 1u;
    return XP_OK;
}

/* What a step needs besides the element: every scalar once, in double. */
typedef struct {
    double b1, c1, b2, c2; /* beta and 1 - beta */
    double bias1, bias2;   /* 1 - beta^t */
    double lr, eps;
} scalars;

/* 1 - beta^t = -expm1(t log beta), within a few units for every beta and t, where a power would lose them at beta^t
 * near 1. beta 0: log gives -inf, the correction is 1. */
static double bias(double beta, int64_t step) {
    return -xp_ref_expm1((double)step * xp_ref_log(beta));
}

static scalars scalars_of(const xp_adamw_args *a) {
    return (scalars){
        .b1 = a->beta1,
        .c1 = 1.0 - a->beta1,
        .b2 = a->beta2,
        .c2 = 1.0 - a->beta2,
        .bias1 = bias(a->beta1, a->step),
        .bias2 = bias(a->beta2, a->step),
        .lr = a->lr,
        .eps = a->eps,
    };
}

/* The three numbers of one element, in double. keep: 1 - lr wd of its segment. */
typedef struct {
    double p, m, v;
} state;

static state advance(const scalars *s, double keep, state old, double g) {
    const double m = s->b1 * old.m + s->c1 * g;
    const double v = s->b2 * old.v + s->c2 * (g * g);
    const double update = s->lr * (m / s->bias1) / (xp_ref_sqrt(v / s->bias2) + s->eps);
    return (state){old.p * keep - update, m, v};
}

/* Torch's scalars, each rounded to f32, and one element through its lines. */
typedef struct {
    float keep, c1, rest1, b2, c2, root2, eps, step;
    int near_m; /* lerp's first form */
} torch_scalars;

static torch_scalars torch_scalars_of(const xp_adamw_args *a) {
    const float c1 = (float)(1.0 - a->beta1);
    return (torch_scalars){
        .keep = (float)(1.0 - a->lr * a->weight_decay),
        .c1 = c1,
        .rest1 = 1.0f - c1,
        .b2 = (float)a->beta2,
        .c2 = (float)(1.0 - a->beta2),
        .root2 = (float)xp_ref_sqrt(bias(a->beta2, a->step)),
        .eps = (float)a->eps,
        .step = (float)(-(a->lr / bias(a->beta1, a->step))),
        .near_m = c1 < 0.5f,
    };
}

static float kept(float v, xp_dtype d) {
    return d == XP_F32 ? v : (float)xp_ref_round((double)v, d);
}

static state torch_advance(const torch_scalars *s, xp_dtype d, int decay, state old, double grad) {
    const float g = (float)grad, was = (float)old.m;
    float p = (float)old.p;
    if (decay)
        p = kept(p * s->keep, d);
    const float m = kept(s->near_m ? was + s->c1 * (g - was) : g - (g - was) * s->rest1, d);
    float v = kept((float)old.v * s->b2, d);
    v = kept(v + s->c2 * g * g, d);
    float r = kept((float)xp_ref_sqrt((double)v), d);
    r = kept(r / s->root2, d);
    r = kept(r + s->eps, d);
    return (state){(double)kept(p + s->step * m / r, d), (double)m, (double)v};
}

/* Elements [lo, hi) of one segment, a chunk at a time so that the loop in the middle is plain arrays of doubles. */
static void run_segment(const xp_adamw_args *a, const scalars *s, const torch_scalars *f, int decay, int64_t lo,
                        int64_t hi) {
    const double keep = decay ? 1.0 - a->lr * a->weight_decay : 1.0;
    const int torch = a->semantics == XP_TORCH, torch_decay = decay && a->weight_decay != 0.0;
    enum { CHUNK = 256 };
    double p[CHUNK], m[CHUNK], v[CHUNK], g[CHUNK];
    for (int64_t i = lo; i < hi; i += CHUNK) {
        const int64_t n = hi - i < CHUNK ? hi - i : CHUNK;
        xp_widen_row(a->param.data, a->param.dtype, i, n, p);
        xp_widen_row(a->m.data, a->m.dtype, i, n, m);
        xp_widen_row(a->v.data, a->v.dtype, i, n, v);
        xp_widen_row(a->grad.data, a->grad.dtype, i, n, g);
        for (int64_t j = 0; j < n; j++) {
            const state old = {p[j], m[j], v[j]};
            const state next =
                torch ? torch_advance(f, a->grad.dtype, torch_decay, old, g[j]) : advance(s, keep, old, g[j]);
            p[j] = next.p;
            m[j] = next.m;
            v[j] = next.v;
        }
        xp_ref_store_row(a->param.data, a->param.dtype, i, n, p);
        xp_ref_store_row(a->m.data, a->m.dtype, i, n, m);
        xp_ref_store_row(a->v.data, a->v.dtype, i, n, v);
    }
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_adamw_args *a = args;
    const scalars s = scalars_of(a);
    const torch_scalars f = torch_scalars_of(a);
    const int64_t *seg = a->seg.data;
    (void)x;
    for (int64_t q = 0; q < a->decay.dim[0]; q++)
        run_segment(a, &s, &f, ((const uint8_t *)a->decay.data)[q], seg[q], seg[q + 1]);
    return XP_OK;
}

/* ---- bound ----
 *
 * Roundings in f32 (u = 2^-24, gamma_n as Higham 2002, 3.1), the larger of the two orders allowed:
 *   m'      a scalar, its product and the sum, or torch's m + (1 - beta1)(g - m): 4, on max(beta1, 1-beta1)|m| +
 *           (1-beta1)|g|
 *   v'      a scalar, the square, its product, the sum: 4, all terms positive
 *   update  lr, bias1 and their quotient 3, product 1, root 1, bias2 and its quotient 2, eps and its sum 2, division 1,
 *           and its part of the last subtraction 1: 11, beside the errors of m' and v' carried through
 *   p'      1 - lr wd, its product, the subtraction: 3, on |p| (1 + lr wd), which covers p - (lr wd) p as well
 * The double arithmetic of the judge has at most 16 of its own. Each product may lose half the smallest subnormal.
 * A tensor in bf16 rounds once more when it is stored. Semantics torch: 0, every rounding is stated. */
#define TINY 0x1p-150
#define F32_MAX 0x1.fffffep127

static double roundings(int n) {
    return xp_ref_gamma(n, XP_F32) + xp_ref_gamma(24, XP_F64);
}

/* NaN, and what f32 cannot hold: no statement. */
static double unless_over(double tol, double magnitude) {
    return magnitude <= F32_MAX && tol == tol ? tol : (double)INFINITY;
}

static double m_error(const scalars *s, double m, double g) {
    const double weight = s->b1 > s->c1 ? s->b1 : s->c1;
    return unless_over(roundings(4) * (weight * fabs(m) + s->c1 * fabs(g)) + 3.0 * TINY, fabs(m) + fabs(g));
}

static double v_error(const scalars *s, double v, double g) {
    return roundings(4) * (s->b2 * v + s->c2 * (g * g)) + 3.0 * TINY;
}

/* An f32 square may overflow where the moment itself would not. */
static int v_over(double v, double g) {
    return !(v <= F32_MAX && g * g <= F32_MAX);
}

/* Largest distance of the update when m' and v' move by their errors and everything is then rounded 11 times. */
static double update_error(const scalars *s, double m, double m_err, double v, double v_err) {
    const double step = s->lr / s->bias1, mag = fabs(m), g = roundings(11);
    const double exact = step * mag / (sqrt(v / s->bias2) + s->eps);
    const double low = v > v_err ? sqrt((v - v_err) / s->bias2) + s->eps : s->eps;
    const double high = sqrt((v + v_err) / s->bias2) + s->eps;
    const double most = step * (mag + m_err) / low * (1.0 + g);
    const double least = step * (mag - m_err) / (mag > m_err ? high : low) * (mag > m_err ? 1.0 - g : 1.0 + g);
    const double lost = TINY * (1.0 + step + 1.0 / low); /* the quotient, or the product before it, underflows */
    return fmax(most - exact, exact - least) + lost;
}

static double p_error(const scalars *s, double decay, state old, double g) {
    const double kept = fabs(old.p) * (1.0 + decay);
    const double m = s->b1 * old.m + s->c1 * g, v = s->b2 * old.v + s->c2 * (g * g);
    const double update = s->lr / s->bias1 * fabs(m) / (sqrt(v / s->bias2) + s->eps);
    double u = 0.0;
    if (s->lr > 0.0 && !(isinf(v) && isfinite(m)))
        u = update_error(s, m, m_error(s, old.m, g), v, v_error(s, old.v, g));
    if (v_over(old.v, g))
        u = fmax(u, update); /* an f32 second moment that overflowed makes the update 0, and no more than that */
    return unless_over(roundings(3) * kept + 2.0 * TINY + u, fmax(kept + update + u, fabs(m) / s->bias1));
}

/* f32's last rounding is among those above. */
static double stored(double tol, xp_dtype d, double ref) {
    return d == XP_BF16 ? tol + xp_ref_room(d, fabs(ref) + tol) : tol;
}

static state load(const xp_adamw_args *a, int64_t i) {
    return (state){
        xp_widen(a->param.data, a->param.dtype, i),
        xp_widen(a->m.data, a->m.dtype, i),
        xp_widen(a->v.data, a->v.dtype, i),
    };
}

static xp_status bound(const void *args, const xp_mesh *mesh, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    const xp_adamw_args *a = args;
    const scalars s = scalars_of(a);
    const int64_t *seg = a->seg.data;
    const xp_dtype d = operand == M ? a->m.dtype : operand == V ? a->v.dtype : a->param.dtype;
    double *out = tol->data;
    (void)mesh, (void)ws;
    memset(out, 0, (size_t)tol->dim[0] * sizeof *out);
    for (int64_t q = 0; q < a->decay.dim[0] && a->semantics == XP_EXACT; q++) {
        const double decay = ((const uint8_t *)a->decay.data)[q] ? a->lr * a->weight_decay : 0.0;
        for (int64_t i = seg[q]; i < seg[q + 1]; i++) {
            const state old = load(a, i);
            const double g = xp_widen(a->grad.data, a->grad.dtype, i);
            const double off = operand == M ? m_error(&s, old.m, g)
                               : operand == V
                                   ? unless_over(v_error(&s, old.v, g), v_over(old.v, g) ? (double)INFINITY : 0.0)
                                   : p_error(&s, decay, old, g);
            out[i] = stored(off, d, xp_widen(ref->data, ref->dtype, i));
        }
    }
    return XP_OK;
}

/* A second moment never turns negative. */
static xp_status positive(const void *args, const xp_mesh *mesh, double *out) {
    const xp_adamw_args *a = args;
    (void)mesh;
    *out = 0.0;
    for (int64_t i = 0; i < a->v.dim[0]; i++) {
        if (xp_widen(a->v.data, a->v.dtype, i) < 0.0)
            *out = (double)INFINITY;
    }
    return XP_OK;
}

static const xp_property properties[] = {{"positive", positive}};

const xp_stage xp_stage_adamw = {
    .name = "adamw",
    .meaning = "one AdamW step: moments, bias correction, decoupled decay by segment; rounded once, or as torch",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_adamw_args),
    .operand = operands,
    .operands = sizeof operands / sizeof operands[0],
    .param = params,
    .params = sizeof params / sizeof params[0],
    .check = check,
    .cost = cost,
    .bound = bound,
    .fill = fill,
    .property = properties,
    .properties = sizeof properties / sizeof properties[0],
};

const xp_kernel xp_ref_adamw = {
    .stage = &xp_stage_adamw,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
