/* The comparator's truth table: what must fail fails, for every format and both kinds of comparison, and what is right
 * passes up to the last unit. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "compare.h"
#include "num.h"

static double bits64(uint64_t c) {
    double v;
    memcpy(&v, &c, sizeof v);
    return v;
}

static const xp_dtype floats[] = {XP_F64, XP_F32, XP_BF16, XP_F16, XP_E4M3, XP_E5M2, XP_E4M3FNUZ, XP_E5M2FNUZ};
enum { FLOATS = sizeof floats / sizeof *floats };

/* ---- one element by bound ---- */

static xp_diff one(xp_dtype d, double got, double ref, double tol) {
    unsigned char g[8] = {0};
    xp_diff diff = {0};
    xp_ref_store(g, d, 0, got);
    const xp_tensor tg = xp_tensor_1d(g, d, 1), tr = xp_tensor_1d(&ref, XP_F64, 1), tt = xp_tensor_1d(&tol, XP_F64, 1);
    assert_int_equal(xp_compare(&tg, &tr, &tt, NULL, &diff), XP_OK);
    return diff;
}

static xp_class class_of(xp_dtype d, double got, double ref, double tol) {
    const xp_diff diff = one(d, got, ref, tol);
    assert_int_equal(diff.elements, 1);
    assert_int_equal(diff.wrong, diff.bits + diff.bound + diff.nan + diff.unwritten + diff.stray);
    assert_int_equal(diff.first_at, diff.wrong ? 0 : -1);
    return xp_diff_class(&diff);
}

static void bound_finite(void **state) {
    (void)state;
    for (int i = 0; i < FLOATS; i++) {
        const xp_dtype d = floats[i];
        assert_int_equal(class_of(d, 1.5, 1.5, 0.0), XP_C_NONE);
        assert_int_equal(class_of(d, 1.5, 1.25, 0.25), XP_C_NONE); /* exactly at the bound */
        assert_int_equal(class_of(d, 1.5, 1.25, nextafter(0.25, 0.0)), XP_C_BOUND);
        assert_int_equal(class_of(d, 1.5, -1.5, 1.0), XP_C_BOUND);
        assert_int_equal(class_of(d, 0.0, 1.5, 1.0), XP_C_BOUND); /* zeros for values */
        assert_int_equal(class_of(d, 1.5, 1.25, 0.0), XP_C_BOUND);
        assert_int_equal(class_of(d, 0.0, -0.0, 0.0), XP_C_NONE); /* the sign of zero is no error */
    }
}

static void bound_that_is_no_number(void **state) {
    (void)state;
    assert_int_equal(class_of(XP_F32, 1.5, 1.5, (double)NAN), XP_C_BOUND);
    assert_int_equal(class_of(XP_F32, 1.5, 1.25, (double)NAN), XP_C_BOUND);
    assert_int_equal(class_of(XP_F32, 1.5, 1.5, -1.0), XP_C_BOUND);
}

/* Nothing is promised: nothing is compared, and a tensor of such elements is vacuous. Poison still shows. */
static void bound_that_is_infinite(void **state) {
    (void)state;
    const double got[] = {1.25, 1e30, (double)NAN, (double)INFINITY};
    for (int i = 0; i < 4; i++) {
        const xp_diff d = one(XP_F32, got[i], 1.25, (double)INFINITY);
        assert_int_equal(d.unbounded, 1);
        assert_int_equal(d.elements, 0);
        assert_int_equal(d.wrong, 0);
        assert_true(d.ratio == 0.0);
    }
    uint32_t poison = (uint32_t)xp_poison_code(XP_F32);
    double ref = 1.25, tol = (double)INFINITY;
    xp_diff d = {0};
    const xp_tensor tg = xp_tensor_1d(&poison, XP_F32, 1), tr = xp_tensor_1d(&ref, XP_F64, 1),
                    tt = xp_tensor_1d(&tol, XP_F64, 1);
    assert_int_equal(xp_compare(&tg, &tr, &tt, NULL, &d), XP_OK);
    assert_int_equal(xp_diff_class(&d), XP_C_UNWRITTEN);
    assert_int_equal(d.unbounded, 0);
}

static void bound_not_finite(void **state) {
    (void)state;
    const double inf = (double)INFINITY, nan = (double)NAN;
    const xp_dtype ieee[] = {XP_F64, XP_F32, XP_BF16, XP_F16, XP_E5M2};
    for (int i = 0; i < 5; i++) {
        const xp_dtype d = ieee[i];
        assert_int_equal(class_of(d, nan, 1.0, 1e300), XP_C_NAN);
        assert_int_equal(class_of(d, 1.0, nan, inf), XP_C_NAN);
        assert_int_equal(class_of(d, nan, nan, nan), XP_C_NONE);
        assert_int_equal(class_of(d, nan, inf, inf), XP_C_NAN);
        assert_int_equal(class_of(d, inf, nan, inf), XP_C_NAN);
        assert_int_equal(class_of(d, inf, inf, nan), XP_C_NONE);
        assert_int_equal(class_of(d, nan, inf, nan),
                         XP_C_NONE); /* a bound that is NaN: infinity or NaN, but not finite */
        assert_int_equal(class_of(d, 1.0, inf, nan), XP_C_NAN);
        assert_int_equal(class_of(d, nan, 1.0, nan), XP_C_NAN);
        assert_int_equal(class_of(d, -inf, inf, inf), XP_C_NAN);
        assert_int_equal(class_of(d, inf, -inf, inf), XP_C_NAN);
        assert_int_equal(class_of(d, 1.0, inf, inf), XP_C_NAN);
        assert_int_equal(class_of(d, inf, 1.0, 1.0), XP_C_NAN);
        assert_true(isinf(one(d, nan, 1.0, 1.0).ratio));
    }
    assert_int_equal(class_of(XP_E4M3, nan, 1.0, 1.0), XP_C_NAN);
    assert_int_equal(class_of(XP_E4M3, nan, nan, 1.0), XP_C_NONE);
}

/* A finite value that rounds to infinity in the output's type is right as infinity, and only there. */
static void bound_overflow(void **state) {
    (void)state;
    const double inf = (double)INFINITY;
    assert_int_equal(class_of(XP_F16, inf, 65520.0, 0.0), XP_C_NONE); /* half a unit past the largest */
    assert_int_equal(class_of(XP_F16, inf, 65519.0, 0.5), XP_C_NAN);
    assert_int_equal(class_of(XP_F16, inf, 65519.0, 1.0), XP_C_NONE);
    assert_int_equal(class_of(XP_F16, -inf, 65520.0, 0.0), XP_C_NAN);
    assert_int_equal(class_of(XP_F16, inf, 60000.0, 10.0), XP_C_NAN);
    assert_int_equal(class_of(XP_BF16, -inf, -0x1.ffp127, 0.0), XP_C_NONE);
    assert_int_equal(class_of(XP_F32, inf, 0x1.fffffep127, 0x1p102), XP_C_NAN);
    assert_int_equal(class_of(XP_F32, inf, 0x1.fffffep127, 0x1p103), XP_C_NONE);
    assert_int_equal(class_of(XP_E4M3, (double)NAN, 470.0, 0.0), XP_C_NONE); /* e4m3 has no infinity: NaN */
    assert_int_equal(class_of(XP_E4M3, (double)NAN, 440.0, 1.0), XP_C_NAN);
}

static void bound_ratio(void **state) {
    (void)state;
    assert_true(one(XP_F32, 1.5, 1.25, 0.5).ratio == 0.5);
    assert_true(one(XP_F32, 1.5, 1.5, 0.0).ratio == 0.0);
    assert_true(one(XP_F32, 1.5, 1.25, 0.125).ratio == 2.0);
    assert_true(isinf(one(XP_F32, 1.5, 1.25, 0.0).ratio));
}

/* ---- poison ---- */

static void poison_is_nan(void **state) {
    (void)state;
    for (int i = 0; i < FLOATS; i++) {
        const uint64_t c = xp_poison_code(floats[i]);
        assert_true(isnan(xp_widen(&c, floats[i], 0)));
    }
    unsigned char ws[64];
    xp_poison_bytes(ws, sizeof ws);
    const xp_dtype wide[] = {XP_F64, XP_F32, XP_BF16, XP_F16};
    for (int i = 0; i < 4; i++)
        assert_true(isnan(xp_widen(ws, wide[i], 3)));
    assert_int_equal(xp_poison_bytes_left(ws, 64), 64);
    ws[17] ^= 1;
    assert_int_equal(xp_poison_bytes_left(ws, 64), 17);
}

static xp_diff one_code(xp_dtype d, uint64_t got, double ref) {
    const double tol = 1.0;
    xp_diff diff = {0};
    const xp_tensor tg = xp_tensor_1d(&got, d, 1), tr = xp_tensor_1d(&ref, XP_F64, 1);
    xp_tensor tt = xp_tensor_1d(NULL, XP_F64, 1);
    double t = tol;
    tt.data = &t;
    assert_int_equal(xp_compare(&tg, &tr, &tt, NULL, &diff), XP_OK);
    return diff;
}

static void poison_by_bound(void **state) {
    (void)state;
    const double untouched = bits64(xp_poison_code(XP_F64));
    for (int i = 0; i < FLOATS; i++) {
        const xp_dtype d = floats[i];
        const uint64_t p = xp_poison_code(d);
        xp_diff diff = one_code(d, p, 1.0); /* never written */
        assert_int_equal(xp_diff_class(&diff), xp_poison_is_sure(d) ? XP_C_UNWRITTEN : XP_C_NAN);
        if (xp_poison_is_sure(d)) { /* not even where NaN is expected */
            diff = one_code(d, p, (double)NAN);
            assert_int_equal(xp_diff_class(&diff), XP_C_UNWRITTEN);
        }
        diff = one_code(d, p, untouched); /* left alone, as it must be */
        assert_int_equal(diff.wrong, 0);
        assert_int_equal(diff.elements, 0);
        assert_int_equal(diff.untouched, 1);
        diff = one_code(d, 0, untouched); /* written where it must not be */
        assert_int_equal(xp_diff_class(&diff), XP_C_POISON);
    }
}

/* ---- bit for bit ---- */

static xp_diff bits_of(xp_dtype d, uint64_t got, uint64_t ref) {
    xp_diff diff = {0};
    const xp_tensor tg = xp_tensor_1d(&got, d, 1), tr = xp_tensor_1d(&ref, d, 1);
    assert_int_equal(xp_compare(&tg, &tr, NULL, NULL, &diff), XP_OK);
    return diff;
}

static xp_class bits_class(xp_dtype d, uint64_t got, uint64_t ref) {
    const xp_diff diff = bits_of(d, got, ref);
    return xp_diff_class(&diff);
}

static void bits_every_code(void **state) {
    (void)state;
    const xp_dtype small[] = {XP_E4M3, XP_E5M2, XP_E4M3FNUZ, XP_E5M2FNUZ, XP_E8M0, XP_U8};
    for (int i = 0; i < 6; i++) {
        for (uint64_t a = 0; a < 256; a++) {
            for (uint64_t b = 0; b < 256; b++) {
                const double x = xp_widen(&a, small[i], 0), y = xp_widen(&b, small[i], 0);
                const int same = a == b || (isnan(x) && isnan(y));
                assert_int_equal(bits_class(small[i], a, b) == XP_C_NONE, same);
            }
        }
    }
    for (uint64_t a = 0; a < 65536; a++) {
        const uint64_t p = xp_poison_code(XP_BF16);
        assert_int_equal(bits_of(XP_BF16, a, a).wrong, 0);
        assert_int_equal(bits_class(XP_BF16, a, a ^ 1) == XP_C_NONE,
                         isnan(xp_widen(&a, XP_BF16, 0)) && isnan(xp_widen(&(uint64_t){a ^ 1}, XP_BF16, 0)) && a != p &&
                             (a ^ 1) != p);
    }
}

static void bits_special(void **state) {
    (void)state;
    assert_int_equal(bits_class(XP_F32, 0x80000000u, 0), XP_C_BITS); /* -0 is not +0 here */
    assert_int_equal(bits_class(XP_F32, 0x7fc00000u, 0x7f800001u), XP_C_NONE);
    assert_int_equal(bits_class(XP_F32, 0x7fc00000u, 0x7f800000u), XP_C_NAN);
    assert_int_equal(bits_class(XP_F32, 0x3f800000u, 0x7fc00000u), XP_C_NAN);
    assert_int_equal(bits_class(XP_F32, 0x3f800000u, 0x3f800001u), XP_C_BITS);
    assert_int_equal(bits_class(XP_I64, 1, 2), XP_C_BITS);
    assert_int_equal(bits_class(XP_I64, (uint64_t)1 << 60, ((uint64_t)1 << 60) + 1), XP_C_BITS); /* beyond 2^53 */
    const xp_dtype sure[] = {XP_F64, XP_F32, XP_BF16, XP_F16, XP_I64, XP_I32, XP_U64};
    for (int i = 0; i < 7; i++) {
        const uint64_t p = xp_poison_code(sure[i]);
        assert_int_equal(bits_class(sure[i], p, 1), XP_C_UNWRITTEN);
        assert_int_equal(bits_class(sure[i], 1, p), XP_C_POISON);
        assert_int_equal(bits_of(sure[i], p, p).untouched, 1);
        assert_int_equal(bits_of(sure[i], p, p).elements, 0);
    }
}

static void bits_packed(void **state) {
    (void)state;
    uint8_t a[4] = {0x21, 0x43, 0x65, 0x07}, b[4] = {0x21, 0x43, 0x65, 0x07};
    xp_diff diff = {0};
    const xp_tensor ta = xp_tensor_1d(a, XP_E2M1, 7), tb = xp_tensor_1d(b, XP_E2M1, 7);
    assert_int_equal(xp_compare(&ta, &tb, NULL, NULL, &diff), XP_OK);
    assert_int_equal(diff.elements, 7);
    assert_int_equal(diff.wrong, 0);
    b[2] = 0x75; /* elements 4 and 5 are 5 and 6; now 5 and 7 */
    assert_int_equal(xp_compare(&ta, &tb, NULL, NULL, &diff), XP_OK);
    assert_int_equal(diff.wrong, 1);
    assert_int_equal(diff.first_at, 5);
}

/* ---- whole tensors ---- */

static void strided_views(void **state) {
    (void)state;
    float g[6 * 10];
    double r[6 * 7], t[6 * 7];
    for (int i = 0; i < 6; i++) {
        for (int k = 0; k < 10; k++)
            g[i * 10 + k] = k < 7 ? (float)(i * 7 + k + 1) : (float)NAN; /* gaps are not looked at */
        for (int k = 0; k < 7; k++) {
            r[i * 7 + k] = i * 7 + k + 1;
            t[i * 7 + k] = 0.25;
        }
    }
    xp_tensor tg = xp_tensor_2d(g, XP_F32, 6, 7);
    tg.stride[0] = 10;
    const xp_tensor tr = xp_tensor_2d(r, XP_F64, 6, 7), tt = xp_tensor_2d(t, XP_F64, 6, 7);
    xp_diff diff = {0};
    assert_int_equal(xp_compare(&tg, &tr, &tt, NULL, &diff), XP_OK);
    assert_int_equal(diff.elements, 42);
    assert_int_equal(diff.wrong, 0);
    g[3 * 10 + 2] += 0.5f;
    g[5 * 10 + 6] += 0.125f;
    assert_int_equal(xp_compare(&tg, &tr, &tt, NULL, &diff), XP_OK);
    assert_int_equal(diff.wrong, 1);
    assert_int_equal(diff.first_at, 3 * 7 + 2);
    assert_int_equal(diff.worst_at, 3 * 7 + 2);
    assert_true(diff.ratio == 2.0);
    for (int k = 0; k < 7; k++) { /* two rows exchanged */
        const float x = g[k];
        g[k] = g[10 + k];
        g[10 + k] = x;
    }
    memset(&diff, 0, sizeof diff);
    assert_int_equal(xp_compare(&tg, &tr, &tt, NULL, &diff), XP_OK);
    assert_int_equal(diff.wrong, 15);
}

static void shapes_that_do_not_fit(void **state) {
    (void)state;
    double x[4] = {0}, y[4] = {0};
    xp_diff diff = {0};
    const xp_tensor a = xp_tensor_1d(x, XP_F64, 4), b = xp_tensor_1d(y, XP_F64, 3), c = xp_tensor_2d(y, XP_F64, 2, 2),
                    d = xp_tensor_1d(y, XP_F32, 4);
    assert_int_equal(xp_compare(&a, &b, NULL, NULL, &diff), XP_E_BUG);
    assert_int_equal(xp_compare(&a, &c, NULL, NULL, &diff), XP_E_BUG);
    assert_int_equal(xp_compare(&a, &d, NULL, NULL, &diff), XP_E_BUG);
    assert_int_equal(xp_compare(&d, &d, &a, NULL, &diff), XP_E_BUG);
    assert_int_equal(xp_compare(&a, &a, &b, NULL, &diff), XP_E_BUG);
}

static void empty(void **state) {
    (void)state;
    double x = 1.0;
    xp_diff diff = {0};
    const xp_tensor a = xp_tensor_2d(&x, XP_F64, 0, 5), b = xp_tensor_2d(&x, XP_F64, 5, 0);
    assert_int_equal(xp_compare(&a, &a, NULL, NULL, &diff), XP_OK);
    assert_int_equal(xp_compare(&b, &b, &b, NULL, &diff), XP_OK);
    assert_int_equal(diff.elements, 0);
}

/* ---- the common factor ---- */

static xp_diff pattern(double factor, int odd_one_out) {
    double g[100], r[100], t[100];
    xp_diff diff = {0};
    for (int i = 0; i < 100; i++) {
        r[i] = 1.0 + i * 0.37;
        t[i] = r[i] * 0x1p-20;
        g[i] = r[i] * factor * (1.0 + 0x1p-22 * (i % 3));
    }
    if (odd_one_out)
        g[50] *= 1.7;
    const xp_tensor tg = xp_tensor_1d(g, XP_F64, 100), tr = xp_tensor_1d(r, XP_F64, 100),
                    tt = xp_tensor_1d(t, XP_F64, 100);
    assert_int_equal(xp_compare(&tg, &tr, &tt, NULL, &diff), XP_OK);
    return diff;
}

static void common_factor(void **state) {
    (void)state;
    const double f[] = {4.0, 0.25, 1.0 / 3.0, -1.0, 0.0, 2.0};
    for (int i = 0; i < 6; i++) {
        xp_diff d = pattern(f[i], 0);
        assert_true(xp_diff_pattern(&d));
        assert_true(d.factor == f[i]);
        assert_int_equal(d.same, 100);
        d = pattern(f[i], 1);
        assert_int_equal(xp_diff_pattern(&d), f[i] == 0.0); /* 1.7 times nothing is nothing */
    }
    const xp_diff near = pattern(1.001, 0); /* wrong everywhere, but no factor */
    assert_int_equal(near.wrong, 100);
    assert_false(xp_diff_pattern(&near));
    const xp_diff d = pattern(1.0, 0);
    assert_int_equal(d.wrong, 0);
    assert_false(xp_diff_pattern(&d));
}

/* ---- units and bias ---- */

static void units(void **state) {
    (void)state;
    assert_true(xp_ulp(XP_F32, 1.0) == 0x1p-23);
    assert_true(xp_ulp(XP_F32, -1.5) == 0x1p-23);
    assert_true(xp_ulp(XP_F32, 0x1.fffffep0) == 0x1p-23);
    assert_true(xp_ulp(XP_F32, 2.0) == 0x1p-22);
    assert_true(xp_ulp(XP_F32, 0.0) == 0x1p-149);
    assert_true(xp_ulp(XP_F32, 0x1p-140) == 0x1p-149);
    assert_true(xp_ulp(XP_F32, 1e300) == 0x1p104);
    assert_true(xp_ulp(XP_BF16, 1.0) == 0x1p-7);
    assert_true(xp_ulp(XP_F16, 0x1p-20) == 0x1p-24);
    assert_true(xp_ulp(XP_E4M3, 448.0) == 32.0);
    assert_true(xp_ulp(XP_F64, 1.0) == 0x1p-52);
    assert_true(xp_ulp(XP_I32, 7.0) == 0.0);
    for (uint64_t c = 1; c < 0x7f00; c++) { /* the gap between neighbours, for every positive bf16 */
        const uint64_t up = c + 1;
        const double x = xp_widen(&c, XP_BF16, 0);
        assert_true(xp_ulp(XP_BF16, x) == xp_widen(&up, XP_BF16, 0) - x);
    }
}

typedef enum { NEAREST, TOWARDS_ZERO, DOWN, AWAY } rounding;

static double round_to(xp_dtype d, double v, rounding how) {
    const double ulp = xp_ulp(d, v), q = v / ulp;
    switch (how) {
    case NEAREST:
        return xp_ref_round(v, d);
    case TOWARDS_ZERO:
        return trunc(q) * ulp;
    case DOWN:
        return floor(q) * ulp;
    default:
        return (v < 0 ? floor(q) : ceil(q)) * ulp;
    }
}

/* n values, both signs, all bits in use; bound in units of the last place. */
static void lean(int64_t n, int64_t repeat, rounding how, double units_bound, xp_bias *b, xp_diff *diff) {
    uint16_t *g = malloc((size_t)n * sizeof *g);
    double *r = malloc((size_t)n * sizeof *r), *t = malloc((size_t)n * sizeof *t);
    assert_non_null(g);
    assert_non_null(r);
    assert_non_null(t);
    uint64_t s = 12345;
    for (int64_t i = 0; i < n; i++) {
        s = s * 6364136223846793005u + 1442695040888963407u;
        r[i] = i >= repeat ? r[i % repeat] : ((double)(s >> 11) * 0x1p-53 + 0.25) * ((s >> 7 & 1) ? -1.0 : 1.0);
        t[i] = units_bound * xp_ulp(XP_BF16, r[i]);
        xp_ref_store(g, XP_BF16, i, round_to(XP_BF16, r[i], how));
    }
    const xp_tensor tg = xp_tensor_1d(g, XP_BF16, n), tr = xp_tensor_1d(r, XP_F64, n), tt = xp_tensor_1d(t, XP_F64, n);
    assert_int_equal(xp_compare(&tg, &tr, &tt, b, diff), XP_OK);
    free(g);
    free(r);
    free(t);
}

static int leans(int64_t n, int64_t repeat, rounding how, double units_bound, int64_t *out_n) {
    xp_bias b = {0};
    xp_diff diff = {0};
    lean(n, repeat, how, units_bound, &b, &diff);
    const double limit = xp_bias_limit(&b), m = (double)b.n;
    const int yes = fabs(b.sum) / m > limit || fabs(b.sum_away) / m > limit;
    *out_n = b.n;
    xp_bias_close(&b);
    return yes;
}

static void bias_found(void **state) {
    (void)state;
    int64_t n;
    assert_false(leans(5000, 5000, NEAREST, 0.5, &n));
    assert_int_equal(n, 5000);
    assert_false(leans(50000, 50000, NEAREST, 0.5, &n));
    assert_int_equal(n, XP_BIAS_MOST);
    /* A truncating cast is out of a bound of half a unit; inside wider ones only its lean gives it away. */
    const double wide[] = {1.0, 1.5, 2.0};
    for (int i = 0; i < 3; i++) {
        assert_true(leans(5000, 5000, TOWARDS_ZERO, wide[i], &n));
        assert_true(leans(5000, 5000, AWAY, wide[i], &n));
        assert_true(leans(5000, 5000, DOWN, wide[i], &n));
        assert_false(leans(5000, 5000, NEAREST, wide[i], &n));
    }
    /* Too few distinct values, or a bound beside which a rounding is nothing: not judged. */
    assert_false(leans(4000, 4000, TOWARDS_ZERO, 1.0, &n));
    assert_int_equal(n, 4000);
    assert_false(leans(20000, 100, TOWARDS_ZERO, 1.0, &n));
    assert_int_equal(n, 100);
    assert_false(leans(5000, 5000, TOWARDS_ZERO, 2.5, &n));
    assert_int_equal(n, 0);
}

/* f32 outputs are computed in f32: a factor that they share may lean. */
static void bias_only_narrow(void **state) {
    (void)state;
    static float g[5000];
    static double r[5000], t[5000];
    xp_bias b = {0};
    xp_diff diff = {0};
    for (int i = 0; i < 5000; i++) {
        r[i] = 1.0 + i * 0x1.123456789p-13;
        g[i] = (float)(floor(r[i] * 0x1p23) * 0x1p-23);
        t[i] = 0x1p-23;
    }
    const xp_tensor tg = xp_tensor_1d(g, XP_F32, 5000), tr = xp_tensor_1d(r, XP_F64, 5000),
                    tt = xp_tensor_1d(t, XP_F64, 5000);
    assert_int_equal(xp_compare(&tg, &tr, &tt, &b, &diff), XP_OK);
    assert_int_equal(diff.wrong, 0);
    assert_int_equal(b.n, 0);
}

/* Numbers below the smallest of a format can only be rounded towards zero: right roundings of 5000 of them would lean,
 * and are not counted. Between it and twice it both sides are open. */
static void bias_not_below_the_smallest(void **state) {
    (void)state;
    static uint16_t g[5000];
    static double r[5000], t[5000];
    for (int above = 0; above < 2; above++) {
        xp_bias b = {0};
        xp_diff diff = {0};
        for (int i = 0; i < 5000; i++) {
            r[i] = (above + (i + 0.5) / 10000) * 0x1p-24;
            t[i] = 0x1p-24;
            xp_ref_store(g, XP_F16, i, xp_ref_round(r[i], XP_F16));
        }
        const xp_tensor tg = xp_tensor_1d(g, XP_F16, 5000), tr = xp_tensor_1d(r, XP_F64, 5000),
                        tt = xp_tensor_1d(t, XP_F64, 5000);
        assert_int_equal(xp_compare(&tg, &tr, &tt, &b, &diff), XP_OK);
        assert_int_equal(diff.wrong, 0);
        assert_int_equal(b.n, above ? 5000 : 0);
        xp_bias_close(&b);
    }
}

static void bias_limit_is_hoeffdings(void **state) {
    (void)state;
    xp_bias b = {.n = 4096, .sum_range2 = 4096.0};
    assert_true(fabs(xp_bias_limit(&b) - 0x1p-8 - sqrt(log(2e12) / (2.0 * 4096.0))) < 1e-12);
    b.n = 4095;
    assert_true(isinf(xp_bias_limit(&b)));
    xp_bias wide = {0}; /* a bound of 2 units lets an error range over 4 */
    xp_diff diff = {0};
    lean(5000, 5000, NEAREST, 2.0, &wide, &diff);
    assert_true(wide.sum_range2 == 16.0 * 5000.0);
    xp_bias_close(&wide);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bound_finite),
        cmocka_unit_test(bound_that_is_no_number),
        cmocka_unit_test(bound_that_is_infinite),
        cmocka_unit_test(bound_not_finite),
        cmocka_unit_test(bound_overflow),
        cmocka_unit_test(bound_ratio),
        cmocka_unit_test(poison_is_nan),
        cmocka_unit_test(poison_by_bound),
        cmocka_unit_test(bits_every_code),
        cmocka_unit_test(bits_special),
        cmocka_unit_test(bits_packed),
        cmocka_unit_test(strided_views),
        cmocka_unit_test(shapes_that_do_not_fit),
        cmocka_unit_test(empty),
        cmocka_unit_test(common_factor),
        cmocka_unit_test(units),
        cmocka_unit_test(bias_found),
        cmocka_unit_test(bias_only_narrow),
        cmocka_unit_test(bias_not_below_the_smallest),
        cmocka_unit_test(bias_limit_is_hoeffdings),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
