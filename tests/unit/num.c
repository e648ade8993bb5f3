/* Tests of ref/num.c: every code and every rounding midpoint of every narrow format, the elementary functions and the
 * exact sums against MPFR. Expected values are written here as numbers or computed by other means, never by the code
 * under test. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <mpfr.h>

#include "num.h"

static uint64_t rng_state;

static uint64_t rng(void) { /* splitmix64 */
    uint64_t z = (rng_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static double uniform(double lo, double hi) {
    return lo + (hi - lo) * ((double)(rng() >> 11) * 0x1p-53);
}

static uint64_t bits_of(double v) {
    uint64_t b;
    memcpy(&b, &v, sizeof b);
    return b;
}

static double of_bits(uint64_t b) {
    double v;
    memcpy(&v, &b, sizeof v);
    return v;
}

static float float_of_bits(uint32_t b) {
    float v;
    memcpy(&v, &b, sizeof v);
    return v;
}

static double value_of(uint64_t code, xp_dtype d) {
    return xp_widen(&code, d, 0); /* little endian; e2m1 code in the low half */
}

/* ---- formats ---- */

/* What each standard says, as numbers. max/tie: largest finite value; the midpoint beyond it and the code it gives
 * without saturation; over: the code of anything larger; sign: code of -0, or 0. */
typedef struct {
    xp_dtype d;
    int codes;
    uint64_t max_code;
    double max, tie;
    uint64_t at_tie, over, over_sat, nan;
    uint64_t sign;
    int nan_keeps_sign;
} fact;

static const fact facts[] = {
    {XP_BF16, 65536, 0x7F7F, 0x1.FEp127, 0x1.FFp127, 0x7F80, 0x7F80, 0x7F7F, 0x7FC0, 0x8000, 1},
    {XP_F16, 65536, 0x7BFF, 65504.0, 65520.0, 0x7C00, 0x7C00, 0x7BFF, 0x7E00, 0x8000, 1},
    {XP_E4M3, 256, 0x7E, 448.0, 464.0, 0x7E, 0x7F, 0x7E, 0x7F, 0x80, 1},
    {XP_E5M2, 256, 0x7B, 57344.0, 61440.0, 0x7C, 0x7C, 0x7B, 0x7E, 0x80, 1},
    {XP_E4M3FNUZ, 256, 0x7F, 240.0, 248.0, 0x80, 0x80, 0x7F, 0x80, 0, 0},
    {XP_E5M2FNUZ, 256, 0x7F, 57344.0, 61440.0, 0x80, 0x80, 0x7F, 0x80, 0, 0},
    {XP_E8M0, 256, 0xFE, 0x1p127, 0x1.8p127, 0xFF, 0xFF, 0xFE, 0xFF, 0, 0},
    {XP_E2M1, 16, 0x7, 6.0, 7.0, 0x7, 0x7, 0x7, 0x7, 0x8, 0},
};
enum { FACTS = sizeof facts / sizeof facts[0] };

/* All the ways to round agree with xp_ref_narrow. */
static void check_stores(double v, xp_dtype d, uint64_t code) {
    uint64_t word[4] = {0, 0, 0, 0};
    const double row[3] = {1.0, v, 2.0};
    xp_ref_store(word, d, 5, v);
    assert_int_equal(xp_code(word, d, 5), code);
    xp_ref_store_row(word, d, 1, 3, row);
    assert_int_equal(xp_code(word, d, 2), code);
    assert_int_equal(xp_code(word, d, 1), xp_ref_narrow(1.0, d, 0));
    assert_int_equal(xp_code(word, d, 3), xp_ref_narrow(2.0, d, 0));
    double r[2] = {v, v};
    xp_ref_round_row(d, 2, r);
    const double want = value_of(code, d), got = xp_ref_round(v, d);
    assert_true(bits_of(got) == bits_of(want) || (got != got && want != want));
    assert_true(bits_of(r[1]) == bits_of(want) || (r[1] != r[1] && want != want));
}

static void expect(const fact *f, double v, int saturate, uint64_t code) {
    const uint64_t got = xp_ref_narrow(v, f->d, saturate);
    if (got != code)
        fail_msg("%s: %a (saturate %d) gave 0x%llX, not 0x%llX", xp_dtype_name(f->d), v, saturate,
                 (unsigned long long)got, (unsigned long long)code);
    if (!saturate)
        check_stores(v, f->d, code);
}

static void test_round_trip(void **state) {
    (void)state;
    int finite = 0, nans = 0;
    for (int i = 0; i < FACTS; i++) {
        const fact *f = &facts[i];
        for (uint64_t c = 0; c < (uint64_t)f->codes; c++) {
            const double v = value_of(c, f->d);
            if (v != v) {
                nans++;
                const double back = value_of(xp_ref_narrow(v, f->d, 0), f->d);
                assert_true(back != back);
            } else {
                finite++;
                expect(f, v, 0, c);
                if (!isinf(v))
                    expect(f, v, 1, c);
            }
        }
        assert_true(value_of(f->max_code, f->d) == f->max);
    }
    /* nans: 2*127 bf16, 2*1023 f16, 2 e4m3, 6 e5m2, 1 each fnuz, 1 e8m0 */
    assert_int_equal(nans, 254 + 2046 + 2 + 6 + 1 + 1 + 1);
    assert_int_equal(finite + nans, 2 * 65536 + 5 * 256 + 16);
}

static void test_midpoints(void **state) {
    (void)state;
    int seen = 0;
    for (int i = 0; i < FACTS; i++) {
        const fact *f = &facts[i];
        for (uint64_t c = 0; c < f->max_code; c++, seen++) {
            const double a = value_of(c, f->d), b = value_of(c + 1, f->d), mid = a / 2.0 + b / 2.0;
            const uint64_t even = f->d == XP_E8M0 ? c + 1 : c + (c & 1); /* e8m0: ties go up */
            assert_true(a < mid && mid < b && mid - a == b - mid);
            for (int sat = 0; sat < 2; sat++) {
                const uint64_t lower = c + (f->d == XP_E8M0 && c == 0); /* all above 2^-127 is 2^-126 */
                expect(f, mid, sat, even);
                expect(f, nextafter(mid, a), sat, lower);
                expect(f, nextafter(mid, b), sat, c + 1);
                expect(f, nextafter(b, a), sat, c + 1);
                expect(f, nextafter(a, b), sat, lower);
                if (f->d == XP_E8M0)
                    continue;
                /* fnuz: the code of a negative zero would be the NaN, so small negative values give +0 */
                const int one_zero = f->sign == 0;
                const uint64_t s = one_zero ? 0x80 : f->sign;
                expect(f, -mid, sat, one_zero && even == 0 ? 0 : even | s);
                expect(f, -nextafter(mid, a), sat, one_zero && c == 0 ? 0 : c | s);
                expect(f, -nextafter(mid, b), sat, (c + 1) | s);
            }
        }
    }
    assert_int_equal(seen, 0x7F7F + 0x7BFF + 0x7E + 0x7B + 0x7F + 0x7F + 0xFE + 0x7);
}

static void test_edges(void **state) {
    (void)state;
    const double inf = (double)INFINITY, nan = (double)NAN;
    for (int i = 0; i < FACTS; i++) {
        const fact *f = &facts[i];
        const uint64_t s = f->d == XP_E8M0 ? 0 : f->sign ? f->sign : 0x80;
        expect(f, f->tie, 0, f->at_tie);
        expect(f, nextafter(f->tie, 0.0), 0, f->max_code);
        const double past[] = {nextafter(f->tie, inf), 2.0 * f->tie, 0x1.fffp1000, DBL_MAX, inf};
        for (int k = 0; k < 5; k++) {
            expect(f, past[k], 0, f->over);
            expect(f, past[k], 1, f->over_sat);
            if (f->d != XP_E8M0) {
                expect(f, -past[k], 0, f->over | s);
                expect(f, -past[k], 1, f->over_sat | s);
            }
        }
        expect(f, f->tie, 1, f->over_sat);
        for (int sat = 0; sat < 2; sat++) {
            const uint64_t ns = f->nan_keeps_sign ? f->sign : 0;
            expect(f, fabs(nan), sat, f->nan);
            expect(f, -fabs(nan), sat, f->nan | ns);
            expect(f, of_bits(0x7FF0000000000001u), sat, f->nan); /* a signalling NaN with the smallest payload */
            if (f->d == XP_E8M0)
                continue;
            expect(f, 0.0, sat, 0);
            expect(f, -0.0, sat, f->sign);
            expect(f, 5e-324, sat, 0);
            expect(f, -5e-324, sat, f->sign);
            expect(f, DBL_MIN, sat, 0);
        }
    }
    /* e8m0 has neither zero nor sign */
    const fact *e = &facts[6];
    expect(e, 0.0, 0, 0xFF);
    expect(e, -0.0, 0, 0xFF);
    expect(e, 0.0, 1, 0x00);
    expect(e, -0.0, 1, 0x00);
    expect(e, -1.0, 0, 0xFF);
    expect(e, -1.0, 1, 0xFF);
    expect(e, -inf, 1, 0xFF);
    expect(e, 5e-324, 0, 0x00);
    expect(e, 0x1p-1000, 1, 0x00);
    /* numerics of OFP8: the values that tables quote */
    const fact *q = &facts[2];
    expect(q, 0x1p-10, 0, 0x00);
    expect(q, 0x1.8p-10, 0, 0x01);
    expect(q, 0x1.8p-9, 0, 0x02);
    expect(&facts[7], 0.25, 0, 0x0);
    expect(&facts[7], 0.75, 0, 0x2);
    expect(&facts[7], 1.25, 0, 0x2);
    expect(&facts[7], 1.75, 0, 0x4);
    expect(&facts[7], 2.5, 0, 0x4);
    expect(&facts[7], 3.5, 0, 0x6);
    expect(&facts[7], 5.0, 0, 0x6);
}

/* A value that float would round onto a midpoint: rounding twice picks the even side, rounding once the nearer one. */
static void test_single_rounding(void **state) {
    (void)state;
    const double mid = 1.0 + 0x1p-8;
    assert_int_equal(xp_ref_narrow(mid, XP_BF16, 0), 0x3F80);
    assert_int_equal(xp_ref_narrow(mid + 0x1p-40, XP_BF16, 0), 0x3F81);
    assert_true(xp_ref_round(mid + 0x1p-40, XP_BF16) == 1.0 + 0x1p-7);
    assert_int_equal(xp_ref_narrow(1.0 + 0x1p-11 + 0x1p-40, XP_F16, 0), 0x3C01);
    assert_int_equal(xp_ref_narrow(1.0 + 0x1p-4 + 0x1p-40, XP_E4M3, 0), 0x39);
    assert_int_equal(xp_ref_narrow(1.0 + 0x1p-3 + 0x1p-40, XP_E5M2, 0), 0x3D);
}

/* f32 has 2^32 codes: random ones, their midpoints, and random doubles against the compiler's conversion. */
static void test_f32(void **state) {
    (void)state;
    rng_state = 11;
    for (int i = 0; i < 400000; i++) {
        uint32_t c = (uint32_t)rng() & 0x7FFFFFFFu;
        if (i % 8 == 0)
            c &= 0x00FFFFFFu; /* subnormals */
        if (c >= 0x7F7FFFFFu)
            continue;
        const double a = (double)float_of_bits(c), b = (double)float_of_bits(c + 1), mid = (a + b) / 2.0;
        assert_int_equal(xp_ref_narrow(a, XP_F32, 0), c);
        assert_int_equal(xp_ref_narrow(mid, XP_F32, 0), c + (c & 1));
        assert_int_equal(xp_ref_narrow(-nextafter(mid, a), XP_F32, 1), c | 0x80000000u);
        assert_int_equal(xp_ref_narrow(nextafter(mid, b), XP_F32, 0), c + 1);
    }
    for (int i = 0; i < 400000; i++) {
        double v = of_bits(rng());
        if (i & 1)
            v = ldexp(uniform(-2.0, 2.0), (int)(rng() % 300) - 160);
        const float f = (float)v;
        uint32_t want;
        memcpy(&want, &f, sizeof want);
        if (v == v)
            assert_int_equal(xp_ref_narrow(v, XP_F32, 0), want);
        float out[2];
        xp_ref_store(out, XP_F32, 1, v);
        assert_true(out[1] == f || v != v);
    }
    assert_int_equal(xp_ref_narrow(0x1.ffffffp127, XP_F32, 0), 0x7F800000);
    assert_int_equal(xp_ref_narrow(nextafter(0x1.ffffffp127, 0.0), XP_F32, 0), 0x7F7FFFFF);
    assert_int_equal(xp_ref_narrow(0x1.ffffffp127, XP_F32, 1), 0x7F7FFFFF);
    assert_int_equal(xp_ref_narrow(-(double)INFINITY, XP_F32, 1), 0xFF7FFFFF);
    assert_int_equal(xp_ref_narrow((double)INFINITY, XP_F64, 1), 0x7FEFFFFFFFFFFFFF);
    assert_int_equal(xp_ref_narrow(-(double)INFINITY, XP_F64, 1), 0xFFEFFFFFFFFFFFFF);
    assert_int_equal(xp_ref_narrow(-(double)INFINITY, XP_F64, 0), 0xFFF0000000000000);
    assert_true(isnan(xp_ref_round((double)NAN, XP_F32)));
}

/* Stores touch their own element only. */
static void test_neighbours(void **state) {
    (void)state;
    static const xp_dtype all[] = {XP_F64, XP_F32, XP_BF16, XP_F16, XP_E4M3, XP_E5M2, XP_E8M0, XP_E2M1};
    for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) {
        for (int i = 0; i < 8; i++) {
            uint64_t buf[10], before[10];
            memset(buf, 0xA5, sizeof buf);
            memcpy(before, buf, sizeof buf);
            xp_ref_store(buf, all[k], i, 2.0);
            assert_true(xp_widen(buf, all[k], i) == 2.0);
            for (int j = 0; j < 9; j++) {
                if (j != i)
                    assert_int_equal(xp_code(buf, all[k], j), xp_code(before, all[k], j));
            }
        }
    }
}

/* The stated error of a store is never exceeded and is reached. */
static void test_units(void **state) {
    (void)state;
    static const xp_dtype all[] = {XP_F32,      XP_BF16,     XP_F16,  XP_E4M3, XP_E5M2,
                                   XP_E4M3FNUZ, XP_E5M2FNUZ, XP_E8M0, XP_E2M1};
    static const double unit[] = {0x1p-24, 0x1p-8, 0x1p-11, 0x1p-4, 0x1p-3, 0x1p-4, 0x1p-3, 0x1p-1, 0x1p-2};
    static const double least[] = {0x1p-150, 0x1p-134, 0x1p-25, 0x1p-10, 0x1p-17, 0x1p-11, 0x1p-18, 0x1p-127, 0.25};
    static const double most[] = {0x1p127, 0x1p127, 65504.0, 448.0, 57344.0, 240.0, 57344.0, 0x1p127, 6.0};
    rng_state = 5;
    for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) {
        assert_true(xp_ref_unit(all[k]) == unit[k]);
        assert_true(xp_ref_half_ulp_err(all[k], 0.0) == least[k]);
        assert_true(xp_ref_half_ulp_err(all[k], -most[k]) == unit[k] * most[k]);
        double worst = 0.0;
        for (int i = 0; i < 20000; i++) {
            const double x = most[k] * ldexp(uniform(0.5, 1.0), -(int)(rng() % 12) * (i & 1 ? 1 : 23));
            const double err = fabs(xp_ref_round(x, all[k]) - x), bound = xp_ref_half_ulp_err(all[k], x);
            assert_true(err <= bound);
            worst = err / bound > worst ? err / bound : worst;
        }
        assert_true(worst > 0.95 / (1.0 + unit[k])); /* a midpoint just above a power of two: u / (1 + u) of it */
    }
    assert_true(xp_ref_unit(XP_F64) == 0x1p-53 && xp_ref_unit(XP_I32) == 0.0);
    assert_true(xp_ref_gamma(0, XP_F32) == 0.0);
    assert_true(xp_ref_gamma(1 << 22, XP_F32) == 0.25 / 0.75);
    assert_true(isinf(xp_ref_gamma(1 << 24, XP_F32)));
    assert_true(xp_ref_gamma(1, XP_F64) > 0x1p-53);
}

/* ---- elementary functions ---- */

static void m_sigmoid(mpfr_t y, mpfr_t x) {
    mpfr_neg(y, x, MPFR_RNDN);
    mpfr_exp(y, y, MPFR_RNDN);
    mpfr_add_ui(y, y, 1, MPFR_RNDN);
    mpfr_ui_div(y, 1, y, MPFR_RNDN);
}
static void m_silu(mpfr_t y, mpfr_t x) {
    m_sigmoid(y, x);
    mpfr_mul(y, y, x, MPFR_RNDN);
}
static void m_softplus(mpfr_t y, mpfr_t x) {
    if (mpfr_cmp_d(x, 1e6) > 0) { /* e^x may overflow even here; the 160 bits end long before */
        mpfr_set(y, x, MPFR_RNDN);
        return;
    }
    mpfr_exp(y, x, MPFR_RNDN);
    mpfr_log1p(y, y, MPFR_RNDN);
}
static void m_exp(mpfr_t y, mpfr_t x) {
    mpfr_exp(y, x, MPFR_RNDN);
}
static void m_expm1(mpfr_t y, mpfr_t x) {
    mpfr_expm1(y, x, MPFR_RNDN);
}
static void m_log(mpfr_t y, mpfr_t x) {
    mpfr_log(y, x, MPFR_RNDN);
}
static void m_log1p(mpfr_t y, mpfr_t x) {
    mpfr_log1p(y, x, MPFR_RNDN);
}
static void m_tanh(mpfr_t y, mpfr_t x) {
    mpfr_tanh(y, x, MPFR_RNDN);
}
static void m_erf(mpfr_t y, mpfr_t x) {
    mpfr_erf(y, x, MPFR_RNDN);
}

/* lo, hi: where the function is dense; edge: beyond |edge| nothing new happens. digest: FNV-1a of the results' bits on
 * the same points, the same for every host and compiler. */
typedef struct {
    const char *name;
    double (*f)(double);
    void (*exact)(mpfr_t, mpfr_t);
    double lo, hi, edge;
    int points;
    uint64_t digest;
} function;

static const function functions[] = {
    {"exp", xp_ref_exp, m_exp, -3.0, 3.0, 760.0, 60000, 0x001E7BD20D29842Au},
    {"expm1", xp_ref_expm1, m_expm1, -3.0, 3.0, 760.0, 60000, 0x545108E4010F1F83u},
    {"log", xp_ref_log, m_log, 0.4, 2.5, 0.0, 60000, 0xBF93009157CF2202u},
    {"log1p", xp_ref_log1p, m_log1p, -0.999, 3.0, 0.0, 60000, 0xD15C4DB3D8CDFFA2u},
    {"sigmoid", xp_ref_sigmoid, m_sigmoid, -6.0, 6.0, 760.0, 60000, 0xB3B9F7E8DDC0DCBBu},
    {"silu", xp_ref_silu, m_silu, -6.0, 6.0, 770.0, 60000, 0xFE1F30151DE63F48u},
    {"softplus", xp_ref_softplus, m_softplus, -6.0, 6.0, 760.0, 40000, 0x5A5F73E464E4B828u},
    {"tanh", xp_ref_tanh, m_tanh, -3.0, 3.0, 30.0, 60000, 0xD70AD2A3155A3F3Cu},
    {"erf", xp_ref_erf, m_erf, -3.0, 3.0, 8.0, 20000, 0x3C04F6FBC7832C6Eu},
};
enum { FUNCTIONS = sizeof functions / sizeof functions[0] };

/* Points: dense part, whole range, magnitudes over all exponents, and any bits at all. */
static double point(const function *f, int i) {
    switch (i % 4) {
    case 0:
        return uniform(f->lo, f->hi);
    case 1:
        return f->edge != 0.0 ? uniform(-f->edge, f->edge) : of_bits(rng());
    case 2: {
        const int e = (int)(rng() % 80) - 70; /* drawn first: the order of a call's arguments is the compiler's */
        return ldexp(uniform(f->edge != 0.0 || f->lo < 0.0 ? -1.0 : 0.0, 1.0), e);
    }
    default:
        return of_bits(rng());
    }
}

/* Error of y in units of the exact value's last place; in smallest subnormals where that is below a normal double. */
static double error_ulp(double y, mpfr_t exact, mpfr_t tmp) {
    const double e = mpfr_get_d(exact, MPFR_RNDN);
    if (isinf(e) || isinf(y))
        return e == y || (isinf(e) && y == (e > 0 ? DBL_MAX : -DBL_MAX)) || (isinf(y) && fabs(e) == DBL_MAX) ? 0.0
                                                                                                             : 1e30;
    const double least = 0x1p-1022, mag = fabs(e) > least ? fabs(e) : least;
    mpfr_d_sub(tmp, y, exact, MPFR_RNDN);
    mpfr_mul_2si(tmp, tmp, 52 - ilogb(mag), MPFR_RNDN);
    return fabs(mpfr_get_d(tmp, MPFR_RNDN));
}

static void test_functions(void **state) {
    (void)state;
    mpfr_t x, y, tmp;
    mpfr_inits2(160, x, y, tmp, (mpfr_ptr)0);
    for (int k = 0; k < FUNCTIONS; k++) {
        const function *f = &functions[k];
        double worst = 0.0, at = 0.0, worst_sub = 0.0;
        uint64_t digest = 0xCBF29CE484222325u;
        rng_state = 99;
        for (int i = 0; i < f->points; i++) {
            const double v = point(f, i), got = f->f(v);
            digest = (digest ^ (got == got ? bits_of(got) : 1)) * 0x100000001B3u;
            if (v != v) {
                assert_true(got != got);
                continue;
            }
            mpfr_set_d(x, v, MPFR_RNDN);
            f->exact(y, x);
            if (mpfr_nan_p(y)) {
                assert_true(got != got);
                continue;
            }
            assert_true(got == got);
            const double err = error_ulp(got, y, tmp);
            if (fabs(got) < DBL_MIN) {
                worst_sub = err > worst_sub ? err : worst_sub;
            } else if (!(err <= worst)) {
                worst = err;
                at = v;
            }
        }
        if (!(worst <= XP_REF_FN_ULP) || !(worst_sub <= 1.0))
            fail_msg("%s: %.3f ulp at %a, %.3f subnormals", f->name, worst, at, worst_sub);
        if (digest != f->digest)
            fail_msg("%s: digest 0x%016llX: the bits differ from those of other hosts", f->name,
                     (unsigned long long)digest);
    }
    mpfr_clears(x, y, tmp, (mpfr_ptr)0);
}

static void test_function_edges(void **state) {
    (void)state;
    const double inf = (double)INFINITY;
    assert_true(xp_ref_exp(0.0) == 1.0 && xp_ref_exp(-0.0) == 1.0);
    assert_true(xp_ref_exp(inf) == inf && bits_of(xp_ref_exp(-inf)) == 0);
    assert_true(isfinite(xp_ref_exp(0x1.62e42fefa39efp+9)) && isinf(xp_ref_exp(0x1.62e42fefa39f0p+9)));
    assert_true(xp_ref_exp(-745.0) == 0x1p-1074 && xp_ref_exp(-745.2) == 0.0);
    assert_true(xp_ref_expm1(inf) == inf && xp_ref_expm1(-inf) == -1.0);
    assert_true(bits_of(xp_ref_expm1(-0.0)) == bits_of(-0.0) && xp_ref_expm1(5e-324) == 5e-324);
    assert_true(xp_ref_log(1.0) == 0.0 && xp_ref_log(inf) == inf && xp_ref_log(0.0) == -inf &&
                xp_ref_log(-0.0) == -inf);
    assert_true(isnan(xp_ref_log(-1.0)) && isnan(xp_ref_log(-inf)));
    assert_true(xp_ref_log1p(-1.0) == -inf && isnan(xp_ref_log1p(-1.5)) && xp_ref_log1p(inf) == inf);
    assert_true(bits_of(xp_ref_log1p(-0.0)) == bits_of(-0.0));
    assert_true(xp_ref_sigmoid(0.0) == 0.5 && xp_ref_sigmoid(inf) == 1.0 && xp_ref_sigmoid(-inf) == 0.0);
    assert_true(xp_ref_silu(0.0) == 0.0 && xp_ref_silu(inf) == inf && isnan(xp_ref_silu(-inf)));
    assert_true(bits_of(xp_ref_silu(-1e4)) == bits_of(-0.0));
    assert_true(xp_ref_softplus(inf) == inf && xp_ref_softplus(-inf) == 0.0);
    assert_true(xp_ref_tanh(inf) == 1.0 && xp_ref_tanh(-inf) == -1.0 && bits_of(xp_ref_tanh(-0.0)) == bits_of(-0.0));
    assert_true(xp_ref_erf(inf) == 1.0 && xp_ref_erf(-inf) == -1.0 && bits_of(xp_ref_erf(-0.0)) == bits_of(-0.0));
    assert_true(xp_ref_sqrt(2.0) == 0x1.6a09e667f3bcdp+0 && isnan(xp_ref_sqrt(-1.0)));
}

/* ---- exact sums ---- */

/* The correctly rounded norm by MPFR: 700 bits hold any sum of squares of f32 values exactly, so that the only
 * rounding is the last one, in f32's exponent range. */
typedef struct {
    mpfr_t sum, term, out;
} oracle;

static float oracle_norm(oracle *o, xp_ref_power p, const float *g, int n) {
    float top = 0.0f;
    int nans = 0, infs = 0;
    mpfr_set_zero(o->sum, 1);
    for (int i = 0; i < n; i++) {
        const float a = fabsf(g[i]);
        nans += a != a;
        infs += isinf(a) != 0;
        if (!isfinite(a))
            continue;
        top = a > top ? a : top;
        mpfr_set_flt(o->term, a, MPFR_RNDN);
        if (p == XP_REF_SQUARE)
            mpfr_sqr(o->term, o->term, MPFR_RNDN);
        assert_int_equal(mpfr_add(o->sum, o->sum, o->term, MPFR_RNDN), 0); /* exact */
    }
    if (nans)
        return NAN;
    if (infs)
        return INFINITY;
    if (p == XP_REF_TOP)
        return top;
    const mpfr_exp_t emin = mpfr_get_emin(), emax = mpfr_get_emax();
    mpfr_set_emin(-148);
    mpfr_set_emax(128);
    int t = p == XP_REF_SQUARE ? mpfr_sqrt(o->out, o->sum, MPFR_RNDN) : mpfr_set(o->out, o->sum, MPFR_RNDN);
    t = mpfr_check_range(o->out, t, MPFR_RNDN);
    mpfr_subnormalize(o->out, t, MPFR_RNDN);
    const float y = mpfr_get_flt(o->out, MPFR_RNDN);
    mpfr_set_emin(emin);
    mpfr_set_emax(emax);
    return y;
}

static float gradient_value(int kind) {
    const float sign = (rng() & 1) ? -1.0f : 1.0f;
    switch (kind) {
    case 0:
        return sign * (float)uniform(0.0, 1.0);
    case 1: /* subnormals */
        return sign * float_of_bits((uint32_t)rng() & 0x7FFFFFu);
    case 2:
        return sign * (float)(1e20 * uniform(0.5, 2.0));
    case 3:
        return sign * (float)(1e-30 * uniform(0.5, 2.0));
    case 4: /* powers of two: exact ties are common */
        return sign * (float)ldexp(1.0, (int)(rng() % 50) - 25);
    case 5: /* small integers around 2^12 and 2^24 */
        return sign * (float)((rng() & 1) ? rng() % 4097 : 0x1000000u - rng() % 3);
    case 6: /* near the largest */
        return sign * float_of_bits(0x7F7FFFFFu - (uint32_t)(rng() % 4));
    case 7:
        return sign * 0.0f;
    default: { /* any finite bits */
        const uint32_t u = (uint32_t)rng();
        return (u & 0x7F800000u) == 0x7F800000u ? 0.0f : float_of_bits(u);
    }
    }
}

/* s = s + other word by word, or the larger of each, as a mesh reduces them; then the carry. */
static void reduce_words(xp_ref_exact *s, const xp_ref_exact *other, xp_ref_power p) {
    uint64_t a[XP_REF_EXACT_WORDS], b[XP_REF_EXACT_WORDS];
    memcpy(a, s, sizeof a);
    memcpy(b, other, sizeof b);
    for (int i = 0; i < XP_REF_EXACT_WORDS; i++)
        a[i] = p != XP_REF_TOP ? a[i] + b[i] : a[i] > b[i] ? a[i] : b[i];
    memcpy(s, a, sizeof *s);
    xp_ref_exact_carry(s);
}

/* Deals g to up to 8 ranks in random pieces (empty shards too), adds the ranks' words in random order and by random
 * grouping, as a mesh might. */
static float placed_norm(xp_ref_power p, const float *g, int n) {
    xp_ref_exact rank[8];
    const int ranks = 1 + (int)(rng() % 8);
    for (int r = 0; r < ranks; r++)
        xp_ref_exact_clear(&rank[r]);
    for (int i = 0; i < n;) {
        const int take = 1 + (int)(rng() % 9);
        const int end = i + take < n ? i + take : n;
        xp_ref_exact_add(&rank[rng() % (uint64_t)ranks], p, g, XP_F32, i, end - i);
        i = end;
    }
    for (int left = ranks; left > 1; left--) {
        const int a = (int)(rng() % (uint64_t)left);
        const xp_ref_exact out = rank[a];
        rank[a] = rank[left - 1];
        reduce_words(&rank[rng() % (uint64_t)(left - 1)], &out, p);
    }
    return xp_ref_exact_norm(&rank[0], p);
}

static uint32_t f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static void same_norm(float got, float want, const char *what, int i) {
    if (f32_bits(got) != f32_bits(want) && !(got != got && want != want))
        fail_msg("%s %d: %a, MPFR says %a", what, i, (double)got, (double)want);
}

static void oracle_open(oracle *o) {
    mpfr_init2(o->sum, 700);
    mpfr_init2(o->term, 64);
    mpfr_init2(o->out, 24);
}

static void oracle_close(oracle *o) {
    mpfr_clears(o->sum, o->term, o->out, (mpfr_ptr)0);
}

static void test_placements(void **state) {
    (void)state;
    oracle o;
    oracle_open(&o);
    rng_state = 2024;
    int overflowed = 0, subnormal = 0, special = 0;
    for (int i = 0; i < 12000; i++) {
        float g[96];
        const int n = (int)(rng() % 96), kind = (int)(rng() % 10); /* 9: a mixture */
        for (int k = 0; k < n; k++)
            g[k] = gradient_value(kind == 9 ? (int)(rng() % 9) : kind);
        if (n && i % 16 == 0)
            g[rng() % (uint64_t)n] = (rng() & 1) ? NAN : -INFINITY;
        if (n > 1 && i % 64 == 0)
            g[0] = INFINITY, g[n - 1] = -NAN;
        for (xp_ref_power p = XP_REF_ABS; p <= XP_REF_TOP; p++) {
            const float want = oracle_norm(&o, p, g, n);
            same_norm(placed_norm(p, g, n), want, "placement", i);
            same_norm(placed_norm(p, g, n), want, "placement again", i);
            special += !isfinite(want) && i % 16 == 0;
            overflowed += isinf(want) && i % 16 != 0;
            subnormal += want > 0.0f && want < FLT_MIN;
        }
    }
    assert_true(overflowed > 100 && subnormal > 1000 && special > 1000); /* the draws reach every case */
    oracle_close(&o);
}

/* Sums whose root, or value, is exactly a midpoint of two floats, and the same one atom aside. */
static void test_exact_midpoints(void **state) {
    (void)state;
    oracle o;
    oracle_open(&o);
    rng_state = 8;
    int ties = 0;
    for (int i = 0; i < 3000; i++) {
        /* X = 2 M + 1 with 25 bits lies halfway between two floats; X^2 as a sum of squares of halves of 12 bits:
         * X = 2^12 a + b: X^2 = (2^12 a)^2 + 2^13 a b + b^2, and 2^13 a b as ab times (2^6)^2 * 2 */
        const uint64_t m = 0x800000u + rng() % 0x800000u, x = 2 * m + 1, a = x >> 12, b = x & 4095;
        const float scale = (float)ldexp(1.0, (int)(rng() % 120) - 60);
        float g[70];
        int n = 0;
        g[n++] = scale * (float)(a << 12);
        g[n++] = scale * (float)b;
        for (int bit = 0; bit < 26; bit++) { /* ab 2^13 in squares of powers of two: 2^k = one square, or two */
            if (!(a * b >> bit & 1))
                continue;
            const int k = bit + 13;
            g[n++] = scale * (float)ldexp(1.0, k / 2);
            if (k & 1)
                g[n++] = scale * (float)ldexp(1.0, k / 2);
        }
        const float low = scale * (float)(2 * m), high = scale * (float)(2 * m + 2);
        const float even = (m & 1) ? high : low;
        same_norm(placed_norm(XP_REF_SQUARE, g, n), even, "root tie", i);
        same_norm(oracle_norm(&o, XP_REF_SQUARE, g, n), even, "oracle's root tie", i);
        ties++;
        g[n] = float_of_bits(1); /* 2^-298 more */
        same_norm(placed_norm(XP_REF_SQUARE, g, n + 1), high, "above a root tie", i);
        const float one[] = {low, scale, float_of_bits(1)};
        same_norm(placed_norm(XP_REF_ABS, one, 2), even, "tie", i);
        same_norm(placed_norm(XP_REF_ABS, one, 3), high, "above a tie", i);
        g[0] = nextafterf(g[0], 0.0f);
        same_norm(placed_norm(XP_REF_SQUARE, g, n), oracle_norm(&o, XP_REF_SQUARE, g, n), "below a root tie", i);
    }
    assert_int_equal(ties, 3000);
    /* the largest float: its midpoint to 2^128 goes up, to infinity; half of that unit does not */
    const float big[] = {FLT_MAX, 0x1p103f, 0x1p102f};
    same_norm(placed_norm(XP_REF_ABS, big, 2), INFINITY, "overflow", 0);
    same_norm(placed_norm(XP_REF_ABS, big + 2, 1), 0x1p102f, "one", 0);
    const float less[] = {FLT_MAX, 0x1p102f};
    same_norm(placed_norm(XP_REF_ABS, less, 2), FLT_MAX, "no overflow", 0);
    const float four[] = {1e20f, -1e20f, 1e20f, 1e20f}, small[] = {1e-30f, 1e-30f, -1e-30f, 1e-30f};
    same_norm(placed_norm(XP_REF_SQUARE, four, 4), 2e20f, "1e20", 0);
    same_norm(placed_norm(XP_REF_SQUARE, small, 4), 2e-30f, "1e-30", 0);
    oracle_close(&o);
}

/* Blocks: more values than one flush holds, every narrow type, an offset start; and headroom before a carry. */
static void test_long_sums(void **state) {
    (void)state;
    enum { N = 200003 };
    static float g[N];
    static uint16_t h[N];
    oracle o;
    oracle_open(&o);
    rng_state = 77;
    for (int i = 0; i < N; i++) {
        g[i] = i < 140000 ? 0x1.fffffep100f : gradient_value((int)(rng() % 2));
        h[i] = (uint16_t)(rng() & 0xBFFF);
    }
    xp_ref_exact s;
    for (xp_ref_power p = XP_REF_ABS; p <= XP_REF_TOP; p++) {
        xp_ref_exact_clear(&s);
        xp_ref_exact_add(&s, p, g, XP_F32, 1, N - 1);
        same_norm(xp_ref_exact_norm(&s, p), oracle_norm(&o, p, g + 1, N - 1), "long", (int)p);
        xp_ref_exact_clear(&s);
        xp_ref_exact_add(&s, p, g, XP_F32, 140000, N - 140000);
        same_norm(xp_ref_exact_norm(&s, p), oracle_norm(&o, p, g + 140000, N - 140000), "long, small", (int)p);
        for (int t = 0; t < 2; t++) {
            const xp_dtype d = t ? XP_F16 : XP_BF16;
            static float wide[N];
            for (int i = 0; i < N; i++)
                wide[i] = (float)xp_widen(h, d, i);
            xp_ref_exact_clear(&s);
            xp_ref_exact_add(&s, p, h, d, 3, N - 3);
            same_norm(xp_ref_exact_norm(&s, p), oracle_norm(&o, p, wide + 3, N - 3), "narrow type", (int)d);
        }
    }
    /* 2^31 ranks with full limbs stay below 2^64 in each limb, and the carry then moves everything up */
    xp_ref_exact_clear(&s);
    for (int i = 0; i < 17; i++)
        s.limb[i] = 0xFFFFFFFFu * (uint64_t)0x80000000u;
    xp_ref_exact_carry(&s);
    /* (2^544 - 1) 2^31 2^-298 = 2^277: its root is 2^138.5, beyond f32 */
    assert_true(isinf(xp_ref_exact_norm(&s, XP_REF_SQUARE)));
    xp_ref_exact_clear(&s);
    for (int i = 0; i < 9; i++)
        s.limb[i] = 0xFFFFFFFFu * (uint64_t)0x80000000u;
    xp_ref_exact_carry(&s);
    same_norm(xp_ref_exact_norm(&s, XP_REF_SQUARE), 0x1.6a09e6p10f, "headroom", 0); /* sqrt(2^(288+31-298)) */
    oracle_close(&o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_midpoints),
        cmocka_unit_test(test_edges),
        cmocka_unit_test(test_single_rounding),
        cmocka_unit_test(test_f32),
        cmocka_unit_test(test_neighbours),
        cmocka_unit_test(test_units),
        cmocka_unit_test(test_functions),
        cmocka_unit_test(test_function_edges),
        cmocka_unit_test(test_placements),
        cmocka_unit_test(test_exact_midpoints),
        cmocka_unit_test(test_long_sums),
    };
    const int failed = cmocka_run_group_tests_name("num", tests, NULL, NULL);
    mpfr_free_cache();
    return failed;
}
