/* The stages of a router that has an MLP and a state: gelu and carry with their gradients. The GELU against MPFR and
 * against what f32 code does, finite differences in f64, roundings by hand, blocks, and what check() refuses. */
#include <math.h>

#include <mpfr.h>

#include "dense/dense.h"
#include "ref.h"
#include "unit/slope.h"
#include "xp/carry.h"
#include "xp/gelu.h"

static void done(void) {
    assert_int_equal(pool_close(), XP_OK);
}

static void run_lone(const xp_kernel *k, const void *args) {
    const xp_mesh m = lone_mesh(1);
    assert_int_equal(run_kernel(k, &m, args), XP_OK);
}

static void draw(const xp_tensor *t, uint64_t seed) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++)
        xp_ref_store(t->data, t->dtype, xp_tensor_offset(t, n), real(seed, 1, (uint64_t)n));
}

/* ---- gelu against MPFR ---- */

enum { POINTS = 5001 };

/* Dense around 0, sparse out to +-45, where p(x) has left the doubles. */
static double point_of(int i) {
    const double u = (double)(2 * i) / (POINTS - 1) - 1.0;
    return 45.0 * u * u * u;
}

/* y = x P(x); d = P(x) + x p(x). */
static void exact(double x, mpfr_t y, mpfr_t d) {
    mpfr_t v, p;
    mpfr_inits2(256, v, p, (mpfr_ptr)0);
    mpfr_set_ui(v, 2, MPFR_RNDN);
    mpfr_sqrt(v, v, MPFR_RNDN);
    mpfr_d_div(v, -x, v, MPFR_RNDN);
    mpfr_erfc(v, v, MPFR_RNDN);
    mpfr_div_ui(v, v, 2, MPFR_RNDN);
    mpfr_mul_d(y, v, x, MPFR_RNDN);
    mpfr_set_d(d, x, MPFR_RNDN);
    mpfr_mul_d(d, d, -x / 2, MPFR_RNDN);
    mpfr_exp(d, d, MPFR_RNDN);
    mpfr_const_pi(p, MPFR_RNDN);
    mpfr_mul_ui(p, p, 2, MPFR_RNDN);
    mpfr_sqrt(p, p, MPFR_RNDN);
    mpfr_div(d, d, p, MPFR_RNDN);
    mpfr_mul_d(d, d, x, MPFR_RNDN);
    mpfr_add(d, d, v, MPFR_RNDN);
    mpfr_clears(v, p, (mpfr_ptr)0);
}

static double distance(double got, mpfr_t want) {
    mpfr_t e;
    mpfr_init2(e, 256);
    mpfr_d_sub(e, got, want, MPFR_RNDN);
    const double out = fabs(mpfr_get_d(e, MPFR_RNDU));
    mpfr_clear(e);
    return out;
}

/* The bounds of both stages at x, dy 1, whose gradient is then the slope. */
static void bounds_at(double x, xp_dtype d, double *out_y, double *out_dx) {
    const xp_mesh m = lone_mesh(1);
    double in = x, one = 1.0, ref = 0.0;
    float in32 = (float)x, one32 = 1.0f;
    const xp_tensor t = xp_tensor_2d(d == XP_F64 ? (void *)&in : &in32, d, 1, 1);
    const xp_tensor dy = xp_tensor_2d(d == XP_F64 ? (void *)&one : &one32, d, 1, 1);
    const xp_tensor value = xp_tensor_2d(&ref, XP_F64, 1, 1);
    xp_tensor tol_y = xp_tensor_2d(out_y, XP_F64, 1, 1), tol_dx = xp_tensor_2d(out_dx, XP_F64, 1, 1);
    const xp_gelu_args a = {.x = t, .y = t};
    const xp_gelu_bwd_args b = {.dy = dy, .x = t, .dx = t};
    assert_int_equal(xp_stage_gelu.bound(&a, &m, 1, &value, NULL, &tol_y), XP_OK);
    assert_int_equal(xp_stage_gelu_bwd.bound(&b, &m, 2, &value, NULL, &tol_dx), XP_OK);
}

/* Both formulations are within the bound in f64; the bound is no wider than 16 units of x, 25 for the slope. */
static void gelu_in_f64(void **state) {
    mpfr_t y, d;
    (void)state;
    mpfr_inits2(256, y, d, (mpfr_ptr)0);
    for (int i = 0; i < POINTS; i++) {
        double x = point_of(i), dy = 1.0, got, slope, tol, slope_tol;
        const xp_tensor in = xp_tensor_2d(&x, XP_F64, 1, 1), up = xp_tensor_2d(&dy, XP_F64, 1, 1);
        const xp_gelu_args a = {.x = in, .y = xp_tensor_2d(&got, XP_F64, 1, 1)};
        const xp_gelu_bwd_args b = {.dy = up, .x = in, .dx = xp_tensor_2d(&slope, XP_F64, 1, 1)};
        exact(x, y, d);
        bounds_at(x, XP_F64, &tol, &slope_tol);
        assert_true(tol <= 0x1p-53 * 16.0 * fabs(x) + 0x1p-1000 && slope_tol <= 0x1p-53 * 25.0 + 0x1p-1000);
        for (int dense = 0; dense < 2; dense++) {
            run_lone(dense ? &xp_dense_gelu : &xp_ref_gelu, &a);
            run_lone(dense ? &xp_dense_gelu_bwd : &xp_ref_gelu_bwd, &b);
            if (!(distance(got, y) <= tol) || !(distance(slope, d) <= slope_tol))
                fail_msg("%s at %a: off by %g of %g, slope by %g of %g", dense ? "dense" : "ref", x, distance(got, y),
                         tol, distance(slope, d), slope_tol);
        }
        done();
    }
    mpfr_clears(y, d, (mpfr_ptr)0);
}

/* What f32 code does, by erf and by erfc: within the f32 bound, and some of it beyond a sixteenth. */
static void gelu_in_f32(void **state) {
    const float root = (float)sqrt(0.5), density = (float)(1.0 / sqrt(2.0 * acos(-1.0)));
    double worst = 0.0, worst_slope = 0.0;
    mpfr_t y, d;
    (void)state;
    mpfr_inits2(256, y, d, (mpfr_ptr)0);
    for (int i = 0; i < POINTS; i++) {
        const float x = (float)point_of(i), square = x * x;
        double tol, slope_tol;
        exact((double)x, y, d);
        bounds_at((double)x, XP_F32, &tol, &slope_tol);
        for (int k = 0; k < 2; k++) {
            const float w = k ? erfcf(-x * root) : 1.0f + erff(x * root), half = 0.5f * w;
            const double off = distance((double)(x * half), y);
            const double slope_off = distance((double)(half + x * (expf(-0.5f * square) * density)), d);
            if (!(off <= tol) || !(slope_off <= slope_tol))
                fail_msg("form %d at %a: off by %g of %g, slope by %g of %g", k, (double)x, off, tol, slope_off,
                         slope_tol);
            worst = tol > 0.0 && off / tol > worst ? off / tol : worst;
            worst_slope = slope_off / slope_tol > worst_slope ? slope_off / slope_tol : worst_slope;
        }
    }
    assert_true(worst > 0.0625 && worst_slope > 0.0625);
    mpfr_clears(y, d, (mpfr_ptr)0);
}

/* Infinities and NaN as in torch 2.13, f32: gelu(inf) inf, gelu(-inf) NaN, the slopes of both NaN. */
static void gelu_edges(void **state) {
    const double inf = (double)INFINITY;
    double x[] = {inf, -inf, (double)NAN, 0.0, -0.0, -64.0}, dy[] = {1, 1, 1, 1, 1, 1}, y[6], dx[6];
    const xp_tensor in = xp_tensor_2d(x, XP_F64, 1, 6), up = xp_tensor_2d(dy, XP_F64, 1, 6);
    const xp_gelu_args a = {.x = in, .y = xp_tensor_2d(y, XP_F64, 1, 6)};
    const xp_gelu_bwd_args b = {.dy = up, .x = in, .dx = xp_tensor_2d(dx, XP_F64, 1, 6)};
    (void)state;
    for (int dense = 0; dense < 2; dense++) {
        run_lone(dense ? &xp_dense_gelu : &xp_ref_gelu, &a);
        run_lone(dense ? &xp_dense_gelu_bwd : &xp_ref_gelu_bwd, &b);
        assert_true(y[0] == inf && isnan(y[1]) && isnan(y[2]) && y[3] == 0.0 && y[4] == 0.0 && signbit(y[4]));
        assert_true(isnan(dx[0]) && isnan(dx[1]) && isnan(dx[2]) && dx[3] == 0.5 && dx[4] == 0.5);
        assert_true(fabs(y[5]) < 1e-300 && fabs(dx[5]) < 1e-300);
    }
    done();
}

/* ---- finite differences ---- */

enum { T = 7, H = 5 };

/* <g, output> of a row that runs again. */
typedef struct {
    const xp_kernel *row;
    const void *args;
    const xp_tensor *out, *g;
    xp_exec x;
} objective;

/* Outputs are within 2^-48 of their size: at most 16 units of x, and 4 of a sum. */
static double value(void *ctx, double *out_err) {
    const objective *o = ctx;
    double sum = 0.0, size = 0.0;
    assert_int_equal(o->row->run(&o->x, o->args), XP_OK);
    for (int64_t n = 0; n < xp_tensor_count(o->out); n++) {
        sum += *slope_at(o->g, n) * *slope_at(o->out, n);
        size += fabs(*slope_at(o->g, n)) * (1.0 + fabs(*slope_at(o->out, n)));
    }
    *out_err = 0x1p-48 * size;
    return sum;
}

static void gelu_slopes(void **state) {
    const xp_mesh m = lone_mesh(1);
    const xp_tensor dy = matrix(XP_F64, T, H), x = matrix(XP_F64, T, H), y = matrix(XP_F64, T, H);
    const xp_gelu_args a = {.x = x, .y = y};
    const xp_gelu_bwd_args b = {.dy = dy, .x = x, .dx = matrix(XP_F64, T, H)};
    (void)state;
    draw(&dy, 1);
    draw(&x, 2);
    run_lone(&xp_ref_gelu_bwd, &b);
    objective o = {&xp_ref_gelu, &a, &y, &dy, slope_exec(&xp_ref_gelu, &m, &a)};
    for (uint64_t seed = 0; seed < 3; seed++)
        slope_expect("gelu x", &x, &b.dx, seed, value, &o);
    done();
}

static void carry_slopes(void **state) {
    const xp_mesh m = lone_mesh(1);
    const xp_tensor dy = matrix(XP_F64, T, H), scale = vector(XP_F64, H), y = matrix(XP_F64, T, H);
    const xp_tensor in = matrix(XP_F64, T, H), before = matrix(XP_F64, T, H);
    const xp_carry_args a = {.a = in, .b = before, .scale = scale, .y = y};
    xp_carry_bwd_args b = {
        .dy = dy, .b = before, .scale = scale, .db = matrix(XP_F64, T, H), .dscale = matrix(XP_F64, 1, H)};
    (void)state;
    draw(&dy, 1);
    draw(&in, 2);
    draw(&before, 3);
    draw(&scale, 4);
    run_lone(&xp_ref_carry_bwd, &b);
    const xp_tensor whole = xp_tensor_1d(b.dscale.data, XP_F64, H);
    objective o = {&xp_ref_carry, &a, &y, &dy, slope_exec(&xp_ref_carry, &m, &a)};
    for (uint64_t seed = 0; seed < 3; seed++) {
        slope_expect("carry a", &in, &dy, seed, value, &o);
        slope_expect("carry b", &before, &b.db, seed, value, &o);
        slope_expect("carry scale", &scale, &whole, seed, value, &o);
    }
    b.token0 = 5; /* tokens 5, 6-8, 9-11 of the batch */
    b.block = 3;
    b.dscale = matrix(XP_F64, 3, H);
    run_lone(&xp_ref_carry_bwd, &b);
    for (int64_t h = 0; h < H; h++) {
        double hand[3] = {0.0};
        for (int64_t t = 0; t < T; t++)
            hand[(t + 2) / 3] += get(&dy, t, h) * get(&before, t, h);
        for (int64_t s = 0; s < 3; s++)
            assert_true(get(&b.dscale, s, h) == hand[s]);
    }
    done();
}

/* ---- roundings by hand ---- */

/* bf16 has steps of 2^-7 above 1. 1 + 3 2^-7 squared is 1 + 6 2^-7 + 9 2^-14 and rounds to 1 + 6 2^-7; with 2^-8 more
 * the exact sum would go up, and the rounded product's is a tie that goes to the even 1 + 6 2^-7. */
static void carry_by_hand(void **state) {
    const double v = 1.0 + 0x3p-7, square = 1.0 + 0x6p-7;
    (void)state;
    for (int dense = 0; dense < 2; dense++) {
        xp_carry_args a = {.a = matrix(XP_BF16, 1, 1),
                           .b = matrix(XP_BF16, 1, 1),
                           .scale = vector(XP_BF16, 1),
                           .y = matrix(XP_BF16, 1, 1)};
        set(&a.a, 0, 0, 0x1p-8);
        set(&a.b, 0, 0, v);
        set(&a.scale, 0, 0, v);
        run_lone(dense ? &xp_dense_carry : &xp_ref_carry, &a);
        assert_true(get(&a.y, 0, 0) == square);
        /* Two such products, each rounded, in f32. */
        xp_carry_bwd_args b = {.dy = matrix(XP_BF16, 2, 1),
                               .b = matrix(XP_BF16, 2, 1),
                               .scale = a.scale,
                               .db = matrix(XP_BF16, 2, 1),
                               .dscale = matrix(XP_F32, 1, 1)};
        for (int64_t t = 0; t < 2; t++) {
            set(&b.dy, t, 0, v);
            set(&b.b, t, 0, t ? v : -v);
        }
        set(&b.b, 0, 0, v);
        run_lone(dense ? &xp_dense_carry_bwd : &xp_ref_carry_bwd, &b);
        assert_true(get(&b.db, 1, 0) == square && get(&b.dscale, 0, 0) == 2.0 * square);
        done();
    }
}

/* ---- refusals ---- */

SPOIL(gelu_width, xp_gelu_args, a->y.dim[1] = 2)
SPOIL(gelu_type, xp_gelu_args, a->y.dtype = XP_BF16)
SPOIL(gelu_absent, xp_gelu_args, a->x.data = NULL)
SPOIL(gelu_bwd_tokens, xp_gelu_bwd_args, a->x.dim[0] = 1)
SPOIL(gelu_bwd_rank, xp_gelu_bwd_args, a->dx.ndim = 1)
SPOIL(carry_tokens, xp_carry_args, a->b.dim[0] = 1)
SPOIL(carry_scale, xp_carry_args, a->scale.dim[0] = 2)
SPOIL(carry_absent, xp_carry_args, a->scale.data = NULL)
SPOIL(carry_bwd_blocks, xp_carry_bwd_args, a->block = 1)
SPOIL(carry_bwd_first, xp_carry_bwd_args, a->token0 = -1)
SPOIL(carry_bwd_width, xp_carry_bwd_args, a->dscale.dim[1] = 4)

static void refusals(void **state) {
    static const refusal gelu[] = {
        {gelu_width, "gelu: y dim 1 is 2"}, {gelu_type, "gelu: y has dtype bf16"}, {gelu_absent, "gelu: x is absent"}};
    static const refusal gelu_bwd[] = {{gelu_bwd_tokens, "gelu_bwd: x dim 0 is 1"},
                                       {gelu_bwd_rank, "gelu_bwd: dx has 1 dimensions"}};
    static const refusal carry[] = {{carry_tokens, "carry: b dim 0 is 1"},
                                    {carry_scale, "carry: scale dim 0 is 2"},
                                    {carry_absent, "carry: scale is absent"}};
    static const refusal carry_bwd[] = {
        {carry_bwd_blocks, "carry_bwd: dscale dim 0 is 1, expected B = 2 blocks from token0 0"},
        {carry_bwd_first, "carry_bwd: token0 is -1"},
        {carry_bwd_width, "carry_bwd: dscale dim 1 is 4"}};
    const xp_mesh m = lone_mesh(1);
    const xp_tensor rows = matrix(XP_F32, 2, 3), v = vector(XP_F32, 3);
    const xp_gelu_args g = {.x = rows, .y = rows};
    const xp_gelu_bwd_args gb = {.dy = rows, .x = rows, .dx = rows};
    const xp_carry_args c = {.a = rows, .b = rows, .scale = v, .y = rows};
    const xp_carry_bwd_args cb = {.dy = rows, .b = rows, .scale = v, .db = rows, .dscale = matrix(XP_F32, 1, 3)};
    (void)state;
    REFUSE(xp_stage_gelu, m, g, gelu);
    REFUSE(xp_stage_gelu_bwd, m, gb, gelu_bwd);
    REFUSE(xp_stage_carry, m, c, carry);
    REFUSE(xp_stage_carry_bwd, m, cb, carry_bwd);
    done();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gelu_in_f64), cmocka_unit_test(gelu_in_f32),  cmocka_unit_test(gelu_edges),
        cmocka_unit_test(gelu_slopes), cmocka_unit_test(carry_slopes), cmocka_unit_test(carry_by_hand),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
