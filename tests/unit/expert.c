/* The experts' stages: products, expert, wgrad, shared, and their bounds.
 *
 * Expected numbers are found by hand, or by loops here that know nothing of chunks, tiles or rounding points; gradients
 * are held against finite differences of the forward row. Data are multiples of 2^-10 or 24-bit fractions. */
#include <math.h>

#include "err.h"
#include "linear.h"
#include "ref.h"
#include "unit/slope.h"
#include "unit/stage_suite.h"
#include "xp/expert.h"
#include "xp/shared.h"
#include "xp/wgrad.h"

#define A_DIALECT xp_dialect_find("hf-5.24/qwen3_moe")
#define GATED_DIALECT xp_dialect_find("hf-5.24/qwen2_moe")

static void randomise(const xp_tensor *t, uint64_t seed, double scale) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++)
        xp_ref_store(t->data, t->dtype, xp_tensor_offset(t, n), scale * real(seed, 5, (uint64_t)n));
}

static double value(const xp_tensor *t, int64_t n) {
    return xp_widen(t->data, t->dtype, xp_tensor_offset(t, n));
}

static int same_bits(const xp_tensor *a, const xp_tensor *b) {
    for (int64_t n = 0; n < xp_tensor_count(a); n++) {
        if (xp_code(a->data, a->dtype, xp_tensor_offset(a, n)) != xp_code(b->data, b->dtype, xp_tensor_offset(b, n)))
            return 0;
    }
    return xp_tensor_count(a) == xp_tensor_count(b);
}

/* ---- products ---- */

static double at_weight(const xp_tensor *w, int64_t n, int64_t k, int absolute) {
    const double v = get(w, n, k);
    return absolute ? fabs(v) : v;
}

static void products_one(xp_dtype d, int64_t m, int64_t n, int64_t k, int absolute) {
    const xp_tensor w = matrix(d, n, k);
    double *x = take((size_t)(m * (k + 1)) * 8), *y = take((size_t)(m * (n + 2)) * 8);
    double *dy = take((size_t)(m * (n + 2)) * 8), *dx = take((size_t)(m * (k + 1)) * 8);
    void *ws = take(xp_ref_linear_ws());
    randomise(&w, (uint64_t)(m + 10 * n + 100 * k), 1.0);
    for (int64_t i = 0; i < m * (k + 1); i++)
        x[i] = real(1, 2, (uint64_t)i) * (absolute ? 0.0 : 1.0) + (absolute ? fabs(real(1, 2, (uint64_t)i)) : 0.0);
    for (int64_t i = 0; i < m * (n + 2); i++)
        dy[i] = real(3, 4, (uint64_t)i);
    xp_ref_linear_nt(x, m, k + 1, &w, absolute, y, n + 2, ws);
    xp_ref_linear_nn(dy, m, n + 2, &w, absolute, dx, k + 1, ws);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double s = 0.0;
            for (int64_t c = 0; c < k; c++)
                s += x[i * (k + 1) + c] * at_weight(&w, j, c, absolute);
            assert_memory_equal(&s, &y[i * (n + 2) + j], sizeof s);
        }
        for (int64_t c = 0; c < k; c++) {
            double s = 0.0;
            for (int64_t j = 0; j < n; j++)
                s += dy[i * (n + 2) + j] * at_weight(&w, j, c, absolute);
            assert_memory_equal(&s, &dx[i * (k + 1) + c], sizeof s);
        }
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* Every output is one ascending chain, whatever the blocking: bit for bit the plain loop. */
static void products(void **state) {
    static const int64_t size[][3] = {{1, 1, 1}, {3, 5, 2}, {4, 4, 4}, {5, 33, 65}, {17, 70, 131}, {2, 3, 0}, {66, 7, 9}};
    static const xp_dtype dtype[] = {XP_F64, XP_F32, XP_BF16, XP_F16, XP_E4M3};
    (void)state;
    for (size_t i = 0; i < sizeof size / sizeof *size; i++) {
        for (size_t d = 0; d < sizeof dtype / sizeof *dtype; d++) {
            for (int absolute = 0; absolute < 2; absolute++)
                products_one(dtype[d], size[i][0], size[i][1], size[i][2], absolute);
        }
    }
}

/* ---- expert: cases ---- */

typedef struct {
    xp_expert_args f;
    xp_expert_bwd_args b;
} expert_case;

static xp_tensor offsets_of(const int64_t *border, int64_t n) {
    const xp_tensor t = vector(XP_I64, n);
    for (int64_t i = 0; i < n; i++)
        set(&t, i, 0, (double)border[i]);
    return t;
}

/* C rows, of which the first border[L] belong to experts. */
static expert_case expert_make(xp_dtype act, xp_dtype param, int64_t H, int64_t F, int64_t C, const int64_t *border,
                               int64_t L) {
    expert_case c;
    memset(&c, 0, sizeof c);
    c.f.x = matrix(act, C, H);
    c.f.offsets = offsets_of(border, L + 1);
    c.f.w1 = cube(param, L, 2 * F, H);
    c.f.w2 = cube(param, L, H, F);
    c.f.pre = matrix(param, C, 2 * F);
    c.f.act = matrix(param, C, F);
    c.f.y = matrix(act, C, H);
    c.f.dialect = A_DIALECT;
    c.b = (xp_expert_bwd_args){.dy = matrix(act, C, H),
                               .pre = c.f.pre,
                               .offsets = c.f.offsets,
                               .w1 = c.f.w1,
                               .w2 = c.f.w2,
                               .dpre = matrix(param, C, 2 * F),
                               .dx = matrix(act, C, H),
                               .dialect = A_DIALECT};
    randomise(&c.f.x, 1, 1.0);
    randomise(&c.f.w1, 2, 1.0);
    randomise(&c.f.w2, 3, 1.0);
    randomise(&c.b.dy, 4, 1.0);
    return c;
}

static void run_expert(expert_case *c) {
    assert_int_equal(run_kernel(&xp_ref_expert, NULL, &c->f), XP_OK);
    assert_int_equal(run_kernel(&xp_ref_expert_bwd, NULL, &c->b), XP_OK);
}

static void put(const xp_tensor *t, const double *v) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++) {
        xp_ref_store(t->data, t->dtype, xp_tensor_offset(t, n), v[n]);
        assert_true(value(t, n) == v[n]); /* the test's own numbers fit their dtype */
    }
}

static void expect(const xp_tensor *t, const double *v) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++) {
        if (value(t, n) != v[n])
            fail_msg("element %lld is %.17g, expected %.17g", (long long)n, value(t, n), v[n]);
    }
}

/* bf16 has 8 significant bits. x = (43/64, 3/4); g = 0.86328125 * 0.671875 + 1.6171875 * 0.75 = 1.79290... -> 1.7890625
 * and so on; every rounding point, left out, makes y's first element -1.578125. */
static void expert_rounds_bf16(void **state) {
    static const int64_t border[] = {0, 1};
    static const double x[] = {0.671875, 0.75}, w1[] = {0.86328125, 1.6171875, 0.65234375, -1.8671875};
    static const double w2[] = {1.0703125, 1.0}, pre[] = {1.7890625, -0.9609375};
    static const double act[] = {-1.46875}, y[] = {-1.5703125, -1.46875};
    /* the last step, unrounded: s u with s = 1.53125, and w2 act */
    static const double wide_act[] = {1.53125 * -0.9609375}, wide_y[] = {1.0703125 * -1.46875, -1.46875};
    (void)state;
    expert_case c = expert_make(XP_BF16, XP_BF16, 2, 1, 1, border, 1);
    put(&c.f.x, x);
    put(&c.f.w1, w1);
    put(&c.f.w2, w2);
    assert_int_equal(run_kernel(&xp_ref_expert, NULL, &c.f), XP_OK);
    expect(&c.f.pre, pre);
    expect(&c.f.act, act);
    expect(&c.f.y, y);
    c.f.act = matrix(XP_F64, 1, 1);
    c.f.y = matrix(XP_F64, 1, 2);
    c.f.pre = matrix(XP_F64, 1, 2);
    assert_int_equal(run_unchecked(&xp_ref_expert, NULL, &c.f), XP_OK);
    expect(&c.f.act, wide_act);
    expect(&c.f.y, wide_y);
    assert_true(value(&c.f.pre, 0) == 0.86328125 * 0.671875 + 1.6171875 * 0.75);
    assert_int_equal(pool_close(), XP_OK);
}

/* s = r(silu(1.78125)) = 1.5234375, da = 0.65234375, ds = r(da u) = 0.64453125, du = 0.9921875, dg = 0.69140625. */
static void expert_bwd_rounds_bf16(void **state) {
    static const int64_t border[] = {0, 1};
    static const double dy[] = {1.7890625, 1.4609375}, pre[] = {1.78125, 0.98828125};
    static const double w1[] = {1.484375, 1.0, 1.4140625, 0.0}, w2[] = {0.859375, -0.60546875};
    static const double dpre[] = {0.69140625, 0.9921875}, dx[] = {2.421875, 0.69140625};
    (void)state;
    expert_case c = expert_make(XP_BF16, XP_BF16, 2, 1, 1, border, 1);
    put(&c.b.dy, dy);
    put(&c.b.pre, pre);
    put(&c.b.w1, w1);
    put(&c.b.w2, w2);
    assert_int_equal(run_kernel(&xp_ref_expert_bwd, NULL, &c.b), XP_OK);
    expect(&c.b.dpre, dpre);
    expect(&c.b.dx, dx);
    assert_int_equal(pool_close(), XP_OK);
}

/* An expert computes in its parameters' dtype: x is cast to bf16 on the way in, y comes out as f32 but holds bf16. */
static void expert_casts(void **state) {
    static const int64_t border[] = {0, 3};
    (void)state;
    expert_case wide = expert_make(XP_F32, XP_BF16, 5, 3, 3, border, 1);
    expert_case narrow = expert_make(XP_BF16, XP_BF16, 5, 3, 3, border, 1);
    run_expert(&wide);
    run_expert(&narrow);
    assert_true(same_bits(&wide.f.pre, &narrow.f.pre) && same_bits(&wide.f.act, &narrow.f.act));
    assert_true(same_bits(&wide.b.dpre, &narrow.b.dpre));
    for (int64_t n = 0; n < 15; n++) {
        assert_true(value(&wide.f.y, n) == value(&narrow.f.y, n));
        assert_true(value(&wide.b.dx, n) == value(&narrow.b.dx, n));
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* Experts 0 and 3 have no rows, expert 1 ends in two pads; two rows lie beyond the last border. */
static const int64_t some_border[] = {0, 0, 71, 74, 74};
enum { SOME_L = 4, SOME_C = 76 };

static expert_case expert_some(xp_dtype act, xp_dtype param) {
    expert_case c = expert_make(act, param, 9, 6, SOME_C, some_border, SOME_L);
    for (int64_t i = 69; i < 71; i++) {
        for (int64_t h = 0; h < 9; h++) {
            set(&c.f.x, i, h, 0.0);
            set(&c.b.dy, i, h, 0.0);
        }
    }
    return c;
}

static void expert_rows(void **state) {
    (void)state;
    expert_case c = expert_some(XP_F32, XP_F32);
    c.b.pre = matrix(XP_F32, SOME_C, 12);
    assert_int_equal(run_kernel(&xp_ref_expert, NULL, &c.f), XP_OK);
    for (int64_t n = 0; n < 74 * 12; n++)
        xp_ref_store(c.b.pre.data, XP_F32, xp_tensor_offset(&c.b.pre, n), value(&c.f.pre, n));
    assert_int_equal(run_kernel(&xp_ref_expert_bwd, NULL, &c.b), XP_OK);
    const xp_tensor *const out[] = {&c.f.pre, &c.f.act, &c.f.y, &c.b.dpre, &c.b.dx};
    for (size_t i = 0; i < sizeof out / sizeof *out; i++) {
        assert_true(untouched(out[i], 74));
        for (int64_t row = 69; row < 71; row++) {
            for (int64_t j = 0; j < out[i]->dim[1]; j++)
                assert_true(get(out[i], row, j) == 0.0); /* pads stay zero */
        }
        assert_true(get(out[i], 68, 0) != 0.0 && get(out[i], 73, 0) != 0.0);
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* Any cut into slices gives the bits of the whole. */
static void expert_slices(void **state) {
    static const int64_t cut[] = {0, 1, 64, 70, 75, 76};
    (void)state;
    expert_case whole = expert_some(XP_BF16, XP_F32), parts = expert_some(XP_BF16, XP_F32);
    run_expert(&whole);
    assert_int_equal(xp_stage_expert.extent(&whole.f), SOME_C);
    assert_int_equal(xp_stage_expert_bwd.extent(&whole.b), SOME_C);
    for (size_t i = 0; i + 1 < sizeof cut / sizeof *cut; i++) {
        xp_expert_args f = parts.f;
        xp_stage_expert.slice(&parts.f, cut[i], cut[i + 1], &f);
        assert_int_equal(run_kernel(&xp_ref_expert, NULL, &f), XP_OK);
    }
    for (size_t i = 0; i + 1 < sizeof cut / sizeof *cut; i++) {
        xp_expert_bwd_args b = parts.b;
        xp_stage_expert_bwd.slice(&parts.b, cut[i], cut[i + 1], &b);
        assert_int_equal(run_kernel(&xp_ref_expert_bwd, NULL, &b), XP_OK);
    }
    assert_true(same_bits(&whole.f.pre, &parts.f.pre) && same_bits(&whole.f.act, &parts.f.act));
    assert_true(same_bits(&whole.f.y, &parts.f.y));
    assert_true(same_bits(&whole.b.dpre, &parts.b.dpre) && same_bits(&whole.b.dx, &parts.b.dx));
    assert_int_equal(pool_close(), XP_OK);
}

static void expert_nothing(void **state) {
    static const int64_t border[] = {0, 0, 0};
    (void)state;
    expert_case c = expert_make(XP_BF16, XP_BF16, 4, 2, 0, border, 2), none = expert_make(XP_F32, XP_F32, 4, 2, 3, border, 0);
    run_expert(&c);
    run_expert(&none); /* no expert here: all rows are nobody's */
    assert_true(untouched(&none.f.y, 0) && untouched(&none.b.dx, 0));
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- expert: gradients ---- */

typedef struct {
    expert_case *c;
    xp_tensor weight, tol; /* of the objective sum weight * y */
} expert_objective;

static double expert_value(void *ctx, double *out_err) {
    expert_objective *o = ctx;
    double s = 0.0, e = 0.0, size = 0.0;
    assert_int_equal(run_kernel(&xp_ref_expert, NULL, &o->c->f), XP_OK);
    assert_int_equal(bound_of(&xp_stage_expert, NULL, &o->c->f, "y", &o->c->f.y, &o->tol), XP_OK);
    for (int64_t n = 0; n < 5 * 7; n++) {
        const double w = value(&o->weight, n), v = value(&o->c->f.y, n);
        s += w * v;
        e += fabs(w) * value(&o->tol, n);
        size += fabs(w * v);
    }
    *out_err = e + xp_ref_gamma(35, XP_F64) * size;
    return s;
}

static void expert_slopes(void **state) {
    static const int64_t border[] = {0, 2, 2, 5};
    static const int64_t L = 3, F = 4, H = 7, C = 5;
    (void)state;
    expert_case c = expert_make(XP_F64, XP_F64, H, F, C, border, L);
    expert_objective o = {&c, c.b.dy, matrix(XP_F64, C, H)};
    run_expert(&c);
    xp_wgrad_args w1 = {.dy = c.b.dpre, .x = c.f.x, .offsets = c.f.offsets};
    xp_wgrad_args w2 = {.dy = c.b.dy, .x = c.f.act, .offsets = c.f.offsets};
    const int64_t dim1[] = {1, L, 2 * F, H}, dim2[] = {1, L, H, F};
    w1.dw = xp_tensor_of(take((size_t)(L * 2 * F * H) * 8), XP_F64, 4, dim1);
    w2.dw = xp_tensor_of(take((size_t)(L * H * F) * 8), XP_F64, 4, dim2);
    assert_int_equal(run_kernel(&xp_ref_wgrad, NULL, &w1), XP_OK);
    assert_int_equal(run_kernel(&xp_ref_wgrad, NULL, &w2), XP_OK);
    for (int64_t i = 0; i < 2 * F * H; i++)
        assert_true(value(&w1.dw, 2 * F * H + i) == 0.0); /* expert 1 has no rows: zeros, not nothing */
    for (uint64_t seed = 0; seed < 3; seed++) {
        slope_expect("x", &c.f.x, &c.b.dx, seed, expert_value, &o);
        slope_expect("w1", &c.f.w1, &w1.dw, seed, expert_value, &o);
        slope_expect("w2", &c.f.w2, &w2.dw, seed, expert_value, &o);
        assert_int_equal(pool.n < BLOCKS, 1);
    }
    assert_int_equal(pool_close(), XP_OK);
}
