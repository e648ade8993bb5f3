/* Stages rmsnorm, rmsnorm_bwd, xent and xent_bwd of the reference: results by hand, finite differences in f64, blocks,
 * ignored targets, and what check() refuses. The judge's comparison with the second formulation lies elsewhere. */
#include "ref.h"
#include "unit/slope.h"
#include "xp/rmsnorm.h"
#include "xp/xent.h"

static void done(void) {
    if (pool_close() != XP_OK)
        fail_msg("%s", xp_error_text());
}

static void expect_near(const char *what, double got, double want, double tol) {
    if (!(fabs(got - want) <= tol))
        fail_msg("%s: got %.17g, expected %.17g within %g", what, got, want, tol);
}

/* A multiple of 2^-24 below 2 in magnitude, as the slopes want. */
static void scatter_values(const xp_tensor *t, uint64_t seed) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++)
        *slope_at(t, n) = real(seed, 5, (uint64_t)n);
}

/* ---- rmsnorm ---- */

/* 3, 4 with eps 12.5 has mean square 12.5, so rstd = 1/5; bf16 has r(3/5) = 0.6015625 before the weight 3 makes
 * 1.8046875 of it; without that rounding it would be 1.796875. */
static void norm_by_hand(void **state) {
    (void)state;
    const xp_mesh m = lone_mesh(1);
    for (int narrow = 0; narrow < 2; narrow++) {
        const xp_dtype d = narrow ? XP_BF16 : XP_F32;
        xp_rmsnorm_args a = {
            .x = matrix(d, 1, 2), .w = vector(d, 2), .y = matrix(d, 1, 2), .rstd = vector(XP_F32, 1), .eps = 12.5};
        set(&a.x, 0, 0, 3);
        set(&a.x, 0, 1, 4);
        set(&a.w, 0, 0, 3);
        set(&a.w, 1, 0, -1);
        assert_int_equal(run_kernel(&xp_ref_rmsnorm, &m, &a), XP_OK);
        assert_true(xp_widen(a.rstd.data, XP_F32, 0) == (double)0.2f);
        assert_true(get(&a.y, 0, 0) == (narrow ? 1.8046875 : (double)(float)(3 * (double)0.6f)));
        assert_true(get(&a.y, 0, 1) == (narrow ? -0.80078125 : (double)-0.8f));
        done();
    }
}

/* r(3 (1 + 2^-7)) = 3.03125 in bf16, whose square and eps are 16; the product itself would make 0.2504 of the root. */
static void weight_first_by_hand(void **state) {
    (void)state;
    const xp_mesh m = lone_mesh(1);
    xp_rmsnorm_args a = {.x = matrix(XP_BF16, 1, 1),
                         .w = vector(XP_BF16, 1),
                         .y = matrix(XP_BF16, 1, 1),
                         .rstd = vector(XP_F32, 1),
                         .eps = 16 - 3.03125 * 3.03125,
                         .weight_first = 1};
    set(&a.x, 0, 0, 3);
    set(&a.w, 0, 0, 1.0078125);
    assert_int_equal(run_kernel(&xp_ref_rmsnorm, &m, &a), XP_OK);
    assert_true(xp_widen(a.rstd.data, XP_F32, 0) == 0.25);
    assert_true(get(&a.y, 0, 0) == 0.7578125);
    done();
}

typedef struct {
    const xp_rmsnorm_args *a;
    const xp_tensor *dy;
    xp_exec x;
} norm_objective;

/* sum of dy y; the reference's own error in f64 is some units of the sum of magnitudes. */
static double norm_value(void *ctx, double *out_err) {
    norm_objective *o = ctx;
    double sum = 0, size = 0;
    assert_int_equal(xp_ref_rmsnorm.run(&o->x, o->a), XP_OK);
    for (int64_t n = 0; n < xp_tensor_count(&o->a->y); n++) {
        sum += *slope_at(o->dy, n) * *slope_at(&o->a->y, n);
        size += fabs(*slope_at(o->dy, n) * *slope_at(&o->a->y, n));
    }
    *out_err = 256 * 0x1p-53 * size;
    return sum;
}

static void norm_slopes_of(int weight_first) {
    enum { T = 4, H = 7 };
    const xp_mesh m = lone_mesh(1);
    xp_rmsnorm_args a = {.x = matrix(XP_F64, T, H),
                         .w = vector(XP_F64, H),
                         .y = matrix(XP_F64, T, H),
                         .rstd = vector(XP_F64, T),
                         .eps = 0.5,
                         .weight_first = weight_first};
    const xp_tensor dy = matrix(XP_F64, T, H);
    scatter_values(&a.x, 1);
    scatter_values(&a.w, 2);
    scatter_values(&dy, 3);
    assert_int_equal(run_kernel(&xp_ref_rmsnorm, &m, &a), XP_OK);
    xp_rmsnorm_bwd_args b = {.dy = dy,
                             .x = a.x,
                             .w = a.w,
                             .rstd = vector(XP_F64, T),
                             .dx = matrix(XP_F64, T, H),
                             .dw = matrix(XP_F64, 1, H),
                             .weight_first = weight_first};
    memcpy(b.rstd.data, a.rstd.data, T * sizeof(double));
    assert_int_equal(run_kernel(&xp_ref_rmsnorm_bwd, &m, &b), XP_OK);
    norm_objective o = {&a, &dy, slope_exec(&xp_ref_rmsnorm, &m, &a)};
    const xp_tensor dw = xp_tensor_1d(b.dw.data, XP_F64, H);
    for (uint64_t seed = 0; seed < 3; seed++) {
        slope_expect("x", &a.x, &b.dx, seed, norm_value, &o);
        slope_expect("w", &a.w, &dw, seed, norm_value, &o);
    }
    done();
}

static void norm_slopes(void **state) {
    (void)state;
    norm_slopes_of(0);
    norm_slopes_of(1);
}

/* Rows 0 and 3 add to sum 1, rows 2 and 4 to sum 0, row 1 to none; nothing adds to sum 2. */
static void norm_parts_of(int weight_first) {
    enum { T = 5, H = 4, B = 3 };
    static const int64_t part[T] = {1, -1, 0, 1, 0};
    const xp_mesh m = lone_mesh(1);
    xp_rmsnorm_bwd_args b = {.dy = matrix(XP_F64, T, H),
                             .x = matrix(XP_F64, T, H),
                             .w = vector(XP_F64, H),
                             .rstd = vector(XP_F64, T),
                             .dx = matrix(XP_F64, T, H),
                             .dw = matrix(XP_F64, B, H),
                             .weight_first = weight_first,
                             .part = vector(XP_I64, T)};
    scatter_values(&b.dy, 1);
    scatter_values(&b.x, 2);
    scatter_values(&b.w, 3);
    scatter_values(&b.rstd, 4);
    memcpy(b.part.data, part, sizeof part);
    assert_int_equal(run_kernel(&xp_ref_rmsnorm_bwd, &m, &b), XP_OK);
    double sum[B][H] = {{0}};
    for (int64_t t = 0; t < T; t++) {
        xp_rmsnorm_bwd_args row = b;
        row.dy = xp_tensor_rows(&b.dy, 0, t, t + 1);
        row.x = xp_tensor_rows(&b.x, 0, t, t + 1);
        row.rstd = xp_tensor_rows(&b.rstd, 0, t, t + 1);
        row.dx = matrix(XP_F64, 1, H);
        row.dw = matrix(XP_F64, 1, H);
        row.part.data = NULL;
        assert_int_equal(run_kernel(&xp_ref_rmsnorm_bwd, &m, &row), XP_OK);
        for (int64_t h = 0; h < H; h++) {
            assert_true(get(&b.dx, t, h) == get(&row.dx, 0, h));
            if (part[t] >= 0)
                sum[part[t]][h] += get(&row.dw, 0, h);
        }
    }
    for (int64_t i = 0; i < B * H; i++)
        assert_true(get(&b.dw, i / H, i % H) == sum[i / H][i % H]);
    done();
}

static void norm_parts(void **state) {
    (void)state;
    norm_parts_of(0);
    norm_parts_of(1);
}

/* Blocks of 3 tokens from token 4 on: borders at 6 and 9; the blocks' sums add up to the single one. */
static void norm_blocks(void **state) {
    enum { T = 6, H = 5 };
    (void)state;
    const xp_mesh m = lone_mesh(1);
    xp_rmsnorm_bwd_args b = {.dy = matrix(XP_F64, T, H),
                             .x = matrix(XP_F64, T, H),
                             .w = vector(XP_F64, H),
                             .rstd = vector(XP_F64, T),
                             .dx = matrix(XP_F64, T, H),
                             .dw = matrix(XP_F64, 1, H),
                             .token0 = 4};
    scatter_values(&b.dy, 1);
    scatter_values(&b.x, 2);
    scatter_values(&b.w, 3);
    scatter_values(&b.rstd, 4);
    assert_int_equal(run_kernel(&xp_ref_rmsnorm_bwd, &m, &b), XP_OK);
    xp_rmsnorm_bwd_args c = b;
    c.block = 3;
    c.dx = matrix(XP_F64, T, H);
    c.dw = matrix(XP_F64, 3, H);
    assert_int_equal(run_kernel(&xp_ref_rmsnorm_bwd, &m, &c), XP_OK);
    for (int64_t h = 0; h < H; h++) {
        /* The last block is token 9 alone. */
        const double last = get(&b.dy, 5, h) * (get(&b.x, 5, h) * xp_widen(b.rstd.data, XP_F64, 5));
        expect_near("sum of blocks", get(&c.dw, 0, h) + get(&c.dw, 1, h) + get(&c.dw, 2, h), get(&b.dw, 0, h), 0x1p-45);
        expect_near("last block", get(&c.dw, 2, h), last, 0x1p-48);
    }
    done();
}

static void norm_refusals(void **state) {
    (void)state;
    const xp_mesh m = lone_mesh(1);
    xp_rmsnorm_args a = {
        .x = matrix(XP_F32, 2, 3), .w = vector(XP_F32, 3), .y = matrix(XP_F32, 2, 3), .rstd = vector(XP_F32, 2)};
    a.eps = 1e-6;
    assert_int_equal(xp_stage_rmsnorm.check(&a, &m), XP_OK);
    a.eps = 0;
    assert_int_equal(xp_stage_rmsnorm.check(&a, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "eps is 0"));
    a.eps = 1e-6;
    a.w = vector(XP_F32, 4);
    assert_int_equal(xp_stage_rmsnorm.check(&a, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "w dim 0 is 4"));
    xp_rmsnorm_bwd_args b = {.dy = a.x,
                             .x = a.x,
                             .w = vector(XP_F32, 3),
                             .rstd = a.rstd,
                             .dx = a.y,
                             .dw = matrix(XP_F32, 2, 3),
                             .token0 = 0,
                             .block = 16};
    assert_int_equal(xp_stage_rmsnorm_bwd.check(&b, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "expected B = 1"));
    a.w = vector(XP_F32, 3);
    a.weight_first = 2;
    assert_int_equal(xp_stage_rmsnorm.check(&a, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "weight_first is 2, expected 0 or 1"));
    b.part = vector(XP_I64, 2);
    memset(b.part.data, 0, 2 * sizeof(int64_t));
    assert_int_equal(xp_stage_rmsnorm_bwd.check(&b, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "block is 16, expected 0 with part"));
    b.block = 0;
    assert_int_equal(xp_stage_rmsnorm_bwd.check(&b, &m), XP_OK);
    ((int64_t *)b.part.data)[1] = 2;
    assert_int_equal(xp_stage_rmsnorm_bwd.check(&b, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "part[1] is 2, expected -1 to 1"));
    ((int64_t *)b.part.data)[1] = -1;
    b.weight_first = -1;
    assert_int_equal(xp_stage_rmsnorm_bwd.check(&b, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "weight_first is -1"));
    done();
}

/* ---- xent ---- */

static xp_xent_args xent_make(int64_t T, int64_t V) {
    return (xp_xent_args){.logits = matrix(XP_F64, T, V),
                          .target = xp_tensor_1d(take((size_t)T * sizeof(int32_t)), XP_I32, T),
                          .lse = vector(XP_F64, T),
                          .loss = vector(XP_F64, T),
                          .total = vector(XP_F64, 1),
                          .count = vector(XP_I64, 1)};
}

/* Logits 0, log 3 with target 1 lose log 4/3; an ignored target loses nothing and is not counted. */
static void loss_by_hand(void **state) {
    (void)state;
    const xp_mesh m = lone_mesh(1);
    const xp_xent_args a = xent_make(2, 2);
    set(&a.logits, 0, 1, 1.0986122886681098);
    set(&a.logits, 1, 0, 5.0);
    ((int32_t *)a.target.data)[0] = 1;
    ((int32_t *)a.target.data)[1] = -1;
    assert_int_equal(run_unchecked(&xp_ref_xent, &m, &a), XP_OK);
    expect_near("loss", *slope_at(&a.loss, 0), 0.28768207245178085, 0x1p-50);
    expect_near("lse", *slope_at(&a.lse, 0), 1.3862943611198906, 0x1p-50);
    assert_true(*slope_at(&a.loss, 1) == 0.0);
    expect_near("total", *slope_at(&a.total, 0), 0.28768207245178085, 0x1p-50);
    assert_int_equal(get_i64(&a.count, 0), 1);
    done();
}

typedef struct {
    const xp_xent_args *a;
    const xp_mesh *m;
} loss_objective;

static double loss_value(void *ctx, double *out_err) {
    loss_objective *o = ctx;
    double size = 0;
    assert_int_equal(run_unchecked(&xp_ref_xent, o->m, o->a), XP_OK);
    for (int64_t t = 0; t < o->a->loss.dim[0]; t++)
        size += fabs(*slope_at(&o->a->loss, t)) + fabs(*slope_at(&o->a->lse, t));
    *out_err = 64 * 0x1p-53 * size;
    return *slope_at(&o->a->total, 0);
}

static void loss_slopes(void **state) {
    enum { T = 5, V = 6 };
    (void)state;
    const xp_mesh m = lone_mesh(1);
    const xp_xent_args a = xent_make(T, V);
    scatter_values(&a.logits, 1);
    for (int t = 0; t < T; t++)
        ((int32_t *)a.target.data)[t] = t == 2 ? -1 : (t * 4 + 1) % V;
    assert_int_equal(run_unchecked(&xp_ref_xent, &m, &a), XP_OK);
    xp_xent_bwd_args b = {
        .logits = a.logits, .target = a.target, .lse = vector(XP_F64, T), .dlogits = matrix(XP_F64, T, V)};
    memcpy(b.lse.data, a.lse.data, T * sizeof(double));
    assert_int_equal(run_kernel(&xp_ref_xent_bwd, &m, &b), XP_OK);
    for (int64_t j = 0; j < V; j++)
        assert_true(get(&b.dlogits, 2, j) == 0.0);
    loss_objective o = {&a, &m};
    for (uint64_t seed = 0; seed < 3; seed++)
        slope_expect("logits", &a.logits, &b.dlogits, seed, loss_value, &o);
    done();
}

static void loss_refusals(void **state) {
    (void)state;
    const xp_mesh m = lone_mesh(1);
    xp_xent_args a = xent_make(2, 3);
    ((int32_t *)a.target.data)[0] = 0;
    ((int32_t *)a.target.data)[1] = 3;
    assert_int_equal(xp_stage_xent.check(&a, &m), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "target"));
    ((int32_t *)a.target.data)[1] = 2;
    assert_int_equal(xp_stage_xent.check(&a, &m), XP_OK);
    a.block = -1;
    assert_int_equal(xp_stage_xent.check(&a, &m), XP_E_ARG);
    done();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_by_hand), cmocka_unit_test(weight_first_by_hand), cmocka_unit_test(norm_slopes),
        cmocka_unit_test(norm_parts),   cmocka_unit_test(norm_blocks),          cmocka_unit_test(norm_refusals),
        cmocka_unit_test(loss_by_hand), cmocka_unit_test(loss_slopes),          cmocka_unit_test(loss_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
