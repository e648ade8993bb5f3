/* Generated data: the same logical tensor under any sharding, distributions, and right rounding in every dtype. */
/* cmocka.h wants these four before it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <math.h>
#include <string.h>

#include "fill.h"
#include "num.h"

enum { ROWS = 37, COLS = 19 };

/* Rows filled one shard at a time equal the rows of the whole, for every kind and dtype. */
static void sharded_is_whole(void **state) {
    (void)state;
    static const xp_dtype types[] = {XP_F64, XP_F32, XP_BF16, XP_F16, XP_E4M3, XP_E5M2};
    static double whole[ROWS * COLS], part[ROWS * COLS];
    const int64_t full[2] = {ROWS, COLS};
    for (size_t d = 0; d < sizeof types / sizeof *types; d++) {
        for (int k = 0; k < XP_NDATA; k++) {
            const int64_t zero[2] = {0, 0};
            const xp_tensor w = xp_tensor_2d(whole, types[d], ROWS, COLS);
            memset(whole, 0, sizeof whole);
            memset(part, 0, sizeof part);
            assert_int_equal(xp_fill_tensor(&w, (xp_data)k, 5, "x", zero, full, 0.5), XP_OK);
            const xp_tensor p = xp_tensor_2d(part, types[d], ROWS, COLS);
            for (int64_t lo = 0; lo < ROWS; lo += 10) {
                const int64_t hi = lo + 10 < ROWS ? lo + 10 : ROWS, base[2] = {lo, 0};
                const xp_tensor rows = xp_tensor_rows(&p, 0, lo, hi);
                assert_int_equal(xp_fill_tensor(&rows, (xp_data)k, 5, "x", base, full, 0.5), XP_OK);
            }
            assert_memory_equal(whole, part, sizeof whole);
        }
    }
}

static void names_and_seeds_differ(void **state) {
    (void)state;
    float a[64], b[64];
    const int64_t zero = 0, n = 64;
    const xp_tensor ta = xp_tensor_1d(a, XP_F32, n), tb = xp_tensor_1d(b, XP_F32, n);
    assert_int_equal(xp_fill_tensor(&ta, XP_DATA_REAL, 1, "x", &zero, &n, 1), XP_OK);
    assert_int_equal(xp_fill_tensor(&tb, XP_DATA_REAL, 1, "y", &zero, &n, 1), XP_OK);
    assert_memory_not_equal(a, b, sizeof a);
    assert_int_equal(xp_fill_tensor(&tb, XP_DATA_REAL, 2, "x", &zero, &n, 1), XP_OK);
    assert_memory_not_equal(a, b, sizeof a);
}

/* Mean 0 and variance 1 within five standard errors of n draws. */
static void normal_moments(void **state) {
    (void)state;
    enum { N = 200000 };
    double sum = 0, square = 0, most = 0;
    for (uint64_t i = 0; i < N; i++) {
        const double v = xp_rng_normal(9, 4, i);
        sum += v;
        square += v * v;
        most = fmax(most, fabs(v));
    }
    assert_true(fabs(sum / N) < 5 / sqrt((double)N));
    assert_true(fabs(square / N - 1) < 5 * sqrt(2.0 / N));
    assert_true(most <= 3.5);
}

static void identity_is_distinct(void **state) {
    (void)state;
    static uint16_t v[4096];
    static uint8_t seen[65536];
    const int64_t zero = 0, n = 4096;
    const xp_tensor t = xp_tensor_1d(v, XP_BF16, n);
    assert_int_equal(xp_fill_tensor(&t, XP_DATA_IDENTITY, 1, "x", &zero, &n, 1), XP_OK);
    for (int i = 0; i < 4096; i++)
        assert_int_equal(seen[v[i]]++, 0);
}

static void extreme_has_one_of_each(void **state) {
    (void)state;
    static float v[1000];
    const int64_t zero = 0, n = 1000;
    const xp_tensor t = xp_tensor_1d(v, XP_F32, n);
    int nans = 0, infs = 0, tiny = 0, minus_zero = 0;
    assert_int_equal(xp_fill_tensor(&t, XP_DATA_EXTREME, 1, "x", &zero, &n, 1), XP_OK);
    for (int i = 0; i < n; i++) {
        nans += isnan(v[i]) != 0;
        infs += isinf(v[i]) != 0;
        tiny += v[i] != 0 && fabsf(v[i]) < 0x1p-126f;
        minus_zero += v[i] == 0 && signbit(v[i]) != 0;
    }
    assert_int_equal(nans, 1);
    assert_int_equal(infs, 1);
    assert_true(tiny > 10 && minus_zero > 10);
}

static void exact_is_small_integers(void **state) {
    (void)state;
    float v[512];
    int seen[5] = {0};
    const int64_t zero = 0, n = 512;
    const xp_tensor t = xp_tensor_1d(v, XP_F32, n);
    assert_int_equal(xp_fill_tensor(&t, XP_DATA_EXACT, 1, "x", &zero, &n, 1), XP_OK);
    for (int i = 0; i < n; i++) {
        assert_true(v[i] == (float)(int)v[i] && fabsf(v[i]) <= 2);
        seen[(int)v[i] + 2]++;
    }
    for (int i = 0; i < 5; i++)
        assert_true(seen[i] > 50);
}

/* Stores round as the reference's own narrowing does, over magnitudes from below the subnormals to overflow. */
static void stores_round(void **state) {
    (void)state;
    static const xp_dtype types[] = {XP_F32, XP_BF16, XP_F16, XP_E4M3, XP_E5M2};
    for (size_t d = 0; d < sizeof types / sizeof *types; d++) {
        for (uint64_t i = 0; i < 40000; i++) {
            const double v = ldexp(xp_rng_normal(3, d, i), (int)(xp_rng(4, d, i) % 300) - 150);
            uint64_t code = 0;
            const xp_tensor t = xp_tensor_1d(&code, types[d], 1);
            xp_fill_store(&t, 0, v);
            assert_int_equal(code, xp_ref_narrow(v, types[d], 0));
        }
    }
}

static void refusals(void **state) {
    (void)state;
    xp_data k;
    int32_t v[2];
    const int64_t zero = 0, n = 2;
    const xp_tensor t = xp_tensor_1d(v, XP_I32, n);
    assert_int_equal(xp_data_parse("rael", &k), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "'rael'"));
    assert_int_equal(xp_fill_tensor(&t, XP_DATA_REAL, 1, "ids", &zero, &n, 1), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "'ids'"));
    for (int i = 0; i < XP_NDATA; i++) {
        assert_int_equal(xp_data_parse(xp_data_name((xp_data)i), &k), XP_OK);
        assert_int_equal(k, i);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sharded_is_whole),
        cmocka_unit_test(names_and_seeds_differ),
        cmocka_unit_test(normal_moments),
        cmocka_unit_test(identity_is_distinct),
        cmocka_unit_test(extreme_has_one_of_each),
        cmocka_unit_test(exact_is_small_integers),
        cmocka_unit_test(stores_round),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
