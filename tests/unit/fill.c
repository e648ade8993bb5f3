/* Generated data: the same logical tensor under any sharding, distributions, and right rounding in every dtype. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

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

/* Blocks cut along every dimension of a tensor of three, one of them a view with strides of its own. */
static void blocks_are_whole(void **state) {
    enum { A = 5, B = 6, C = 7 };
    static double whole[A * B * C], part[A * B * C];
    const int64_t full[3] = {A, B, C}, zero[3] = {0, 0, 0};
    (void)state;
    for (int k = 0; k < XP_NDATA; k++) {
        const xp_tensor w = xp_tensor_3d(whole, XP_F32, A, B, C), p = xp_tensor_3d(part, XP_F32, A, B, C);
        memset(part, 0, sizeof part);
        assert_int_equal(xp_fill_tensor(&w, (xp_data)k, 11, "w", zero, full, 2.0), XP_OK);
        for (int cut = 0; cut < 8; cut++) {
            xp_tensor t = p;
            int64_t base[3];
            for (int d = 0; d < 3; d++) {
                const int64_t at = full[d] / 2, lo = cut >> d & 1 ? at : 0, hi = cut >> d & 1 ? full[d] : at;
                t = xp_tensor_rows(&t, d, lo, hi);
                base[d] = lo;
            }
            assert_int_equal(xp_fill_tensor(&t, (xp_data)k, 11, "w", base, full, 2.0), XP_OK);
        }
        assert_memory_equal(whole, part, A * B * C * sizeof(float));
    }
}

/* Nothing is written outside the view, and an empty or absent one is no error. */
static void views_keep_their_edges(void **state) {
    float v[6 * 5];
    const int64_t full[2] = {4, 3}, zero[2] = {0, 0}, none[2] = {0, 3};
    (void)state;
    for (int i = 0; i < 30; i++)
        v[i] = 77.0f;
    const xp_tensor t = xp_tensor_2d(v, XP_F32, 6, 5), rows = xp_tensor_rows(&t, 0, 1, 5);
    const xp_tensor inner = xp_tensor_rows(&rows, 1, 1, 4), empty = xp_tensor_rows(&inner, 0, 2, 2);
    const xp_tensor absent = xp_tensor_2d(NULL, XP_F32, 4, 3), flat = xp_tensor_rows(&inner, 1, 1, 1);
    assert_int_equal(xp_fill_tensor(&inner, XP_DATA_IDENTITY, 1, "x", zero, full, 1), XP_OK);
    for (int i = 0; i < 30; i++)
        assert_int_equal(fabsf(v[i] - 77.0f) > 0, i / 5 >= 1 && i / 5 < 5 && i % 5 >= 1 && i % 5 < 4);
    assert_int_equal(xp_fill_tensor(&empty, XP_DATA_REAL, 1, "x", zero, none, 1), XP_OK);
    assert_int_equal(xp_fill_tensor(&flat, XP_DATA_REAL, 1, "x", zero, none, 1), XP_OK);
    assert_int_equal(xp_fill_tensor(&absent, XP_DATA_REAL, 1, "x", zero, full, 1), XP_OK);
    float one = 0;
    const xp_tensor scalar = xp_tensor_of(&one, XP_F32, 0, NULL);
    assert_int_equal(xp_fill_tensor(&scalar, XP_DATA_REAL, 1, "x", zero, full, 1), XP_OK);
    assert_true(fabsf(one) > 0);
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

/* Uniform over [0, 1), every bit of the words even, within five standard errors. */
static void uniform_and_bits(void **state) {
    enum { N = 40000 };
    int ones[64] = {0}, tenth[10] = {0};
    double sum = 0;
    (void)state;
    for (uint64_t i = 0; i < N; i++) {
        const double v = xp_rng_uniform(2, 8, i);
        const uint64_t u = xp_rng(2, 9, i);
        assert_true(v >= 0 && v < 1);
        sum += v;
        tenth[(int)(10 * v)]++;
        for (int b = 0; b < 64; b++)
            ones[b] += (int)(u >> b & 1);
    }
    assert_true(fabs(sum / N - 0.5) < 5 * sqrt(1.0 / 12 / N));
    for (int b = 0; b < 64; b++)
        assert_true(fabs(ones[b] - N / 2.0) < 5 * sqrt(N / 4.0));
    for (int t = 0; t < 10; t++)
        assert_true(fabs(tenth[t] - N / 10.0) < 5 * sqrt(N * 0.09));
    /* Neighbours in any of the three arguments have nothing in common. */
    int same = 0;
    for (uint64_t i = 0; i < N; i++)
        same += (xp_rng(2, 9, i) ^ xp_rng(3, 9, i)) >> 56 == 0 || (xp_rng(2, 9, i) ^ xp_rng(2, 10, i)) >> 56 == 0 ||
                (xp_rng(2, 9, i) ^ xp_rng(2, 9, i + 1)) >> 56 == 0;
    assert_true(same < 3 * N / 256 + 5 * sqrt(3.0 * N / 256));
    assert_true(xp_rng_stream("a.b") != xp_rng_stream("a.c") && xp_rng_stream("") != xp_rng_stream("a"));
}

/* real: scale is the standard deviation. */
static void real_is_scaled(void **state) {
    static float v[40000];
    const int64_t zero = 0, n = 40000;
    double square = 0;
    (void)state;
    const xp_tensor t = xp_tensor_1d(v, XP_F32, n);
    assert_int_equal(xp_fill_tensor(&t, XP_DATA_REAL, 4, "x", &zero, &n, 0.125), XP_OK);
    for (int i = 0; i < n; i++)
        square += (double)v[i] * (double)v[i];
    assert_true(fabs(64 * square / (double)n - 1) < 5 * sqrt(2.0 / (double)n));
}

/* Columns of a row differ, and so do rows in every single column, at any width: no row can stand in for another. */
static void identity_is_distinct(void **state) {
    static const int64_t width[] = {1, 3, 16, 2048, 4096};
    static uint16_t v[64 * 4096];
    static uint8_t seen[65536];
    (void)state;
    for (size_t w = 0; w < sizeof width / sizeof *width; w++) {
        const int64_t zero[2] = {0, 0}, full[2] = {64, width[w]};
        const xp_tensor t = xp_tensor_2d(v, XP_BF16, 64, width[w]);
        assert_int_equal(xp_fill_tensor(&t, XP_DATA_IDENTITY, 1, "x", zero, full, 1), XP_OK);
        for (int64_t r = 0; r < 64; r++) {
            memset(seen, 0, sizeof seen);
            for (int64_t c = 0; c < width[w]; c++)
                assert_int_equal(seen[v[r * width[w] + c]]++, 0);
        }
        for (int64_t c = 0; c < width[w]; c++) {
            memset(seen, 0, sizeof seen);
            for (int64_t r = 0; r < 64; r++)
                assert_int_equal(seen[v[r * width[w] + c]]++, 0);
        }
    }
    /* A flat tensor has columns only. */
    const int64_t zero = 0, n = 4096;
    const xp_tensor flat = xp_tensor_1d(v, XP_BF16, n);
    assert_int_equal(xp_fill_tensor(&flat, XP_DATA_IDENTITY, 1, "x", &zero, &n, 1), XP_OK);
    memset(seen, 0, sizeof seen);
    for (int i = 0; i < 4096; i++)
        assert_int_equal(seen[v[i]]++, 0);
}

/* One NaN and one infinity in the whole logical tensor (a format without infinity has two NaN), some subnormals, some
 * -0, some values within a factor of 16 of overflow; the rest is ordinary. */
static void extreme_has_one_of_each(void **state) {
    static const struct {
        xp_dtype d;
        int nans, infs;
        double normal, largest; /* the least normal value, the largest */
    } types[] = {{XP_F64, 1, 1, 0x1p-1022, 0x1p910}, {XP_F32, 1, 1, 0x1p-126, 0x1p128},
                 {XP_BF16, 1, 1, 0x1p-126, 0x1p128}, {XP_F16, 1, 1, 0x1p-14, 65504},
                 {XP_E4M3, 2, 0, 0x1p-6, 448},       {XP_E5M2, 1, 1, 0x1p-14, 57344}};
    static double v[2000];
    const int64_t zero = 0, n = 2000;
    (void)state;
    for (size_t k = 0; k < sizeof types / sizeof *types; k++) {
        int nans = 0, infs = 0, tiny = 0, minus_zero = 0, most = 0;
        const xp_tensor t = xp_tensor_1d(v, types[k].d, n);
        assert_int_equal(xp_fill_tensor(&t, XP_DATA_EXTREME, 1, "x", &zero, &n, 1), XP_OK);
        for (int i = 0; i < n; i++) {
            const double x = xp_widen(v, types[k].d, i);
            nans += isnan(x) != 0;
            infs += isinf(x) != 0;
            tiny += fabs(x) > 0 && fabs(x) < types[k].normal;
            minus_zero += !(fabs(x) > 0) && signbit(x) != 0;
            most += isfinite(x) && fabs(x) > types[k].largest / 4096;
        }
        if (nans != types[k].nans || infs != types[k].infs || tiny < 10 || minus_zero < 50 || most < 20)
            fail_msg("%s: %d NaN, %d infinities, %d subnormals, %d -0, %d huge", xp_dtype_name(types[k].d), nans, infs,
                     tiny, minus_zero, most);
    }
}

/* Half of the values are equal, and no NaN hides among them. */
static void ties_tie(void **state) {
    float v[400];
    const int64_t zero = 0, n = 400;
    int half = 0;
    (void)state;
    const xp_tensor t = xp_tensor_1d(v, XP_F32, n);
    assert_int_equal(xp_fill_tensor(&t, XP_DATA_TIES, 1, "x", &zero, &n, 1), XP_OK);
    for (int i = 0; i < n; i++) {
        assert_true(fabsf(v[i]) <= 1 && fabsf(v[i]) >= 0.5f);
        half += v[i] <= 0.5f && v[i] >= 0.5f;
    }
    assert_in_range(half, 150, 250);
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

static void store_one(xp_dtype d, double v) {
    uint64_t code = 0;
    const uint64_t want = xp_ref_narrow(v, d, 0);
    const xp_tensor t = xp_tensor_1d(&code, d, 1);
    xp_fill_store(&t, 0, v);
    if (code != want)
        fail_msg("%a in %s is %#llx, expected %#llx", v, xp_dtype_name(d), (unsigned long long)code,
                 (unsigned long long)want);
}

/* Every finite value of the narrow formats, every midpoint of neighbours, and what lies just beside it. */
static void stores_round_midpoints(void **state) {
    static const xp_dtype types[] = {XP_BF16, XP_F16, XP_E4M3, XP_E5M2};
    (void)state;
    for (size_t k = 0; k < sizeof types / sizeof *types; k++) {
        const uint64_t half = UINT64_C(1) << (xp_dtype_bits(types[k]) - 1);
        for (uint64_t c = 0; c + 1 < half; c++) {
            const uint64_t next = c + 1;
            const double a = xp_widen(&c, types[k], 0), b = xp_widen(&next, types[k], 0);
            /* Past the largest value the next step of the grid takes the place of infinity. */
            const double middle = isfinite(b) ? a + (b - a) / 2 : a + (a - xp_ref_round(a * 0.99, types[k])) / 2;
            if (!isfinite(a))
                break;
            const double v[] = {a, middle, nextafter(middle, 0), nextafter(middle, (double)INFINITY)};
            for (int i = 0; i < 4; i++) {
                store_one(types[k], v[i]);
                store_one(types[k], -v[i]);
            }
        }
        store_one(types[k], (double)INFINITY);
        store_one(types[k], -(double)INFINITY);
        store_one(types[k], 0x1p1000);
        store_one(types[k], 0x1p-1074);
        uint64_t code = 0;
        const xp_tensor t = xp_tensor_1d(&code, types[k], 1);
        xp_fill_store(&t, 0, (double)NAN);
        assert_true(isnan(xp_widen(&code, types[k], 0)));
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
        cmocka_unit_test(sharded_is_whole),        cmocka_unit_test(blocks_are_whole),
        cmocka_unit_test(views_keep_their_edges),  cmocka_unit_test(names_and_seeds_differ),
        cmocka_unit_test(normal_moments),          cmocka_unit_test(uniform_and_bits),
        cmocka_unit_test(real_is_scaled),          cmocka_unit_test(identity_is_distinct),
        cmocka_unit_test(extreme_has_one_of_each), cmocka_unit_test(ties_tie),
        cmocka_unit_test(exact_is_small_integers), cmocka_unit_test(stores_round),
        cmocka_unit_test(stores_round_midpoints),  cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
