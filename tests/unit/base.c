/* The base that every judge reads through: error text, the dtype table, exact widening over every code of every narrow
 * format against a formula of its own, and tensor arithmetic. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "xp/backend.h"

/* ---- error text ---- */

static void texts(void **state) {
    char longer[3000];
    (void)state;
    assert_int_equal(xp_fail(XP_E_IO, "/a/b/c.c", 7, "file '%s': %d", "x", 3), XP_E_IO);
    assert_string_equal(xp_error_text(), "file 'x': 3");
    assert_string_equal(xp_error_where(), "c.c:7");
    /* An error that quotes the error before it. */
    assert_int_equal(xp_fail(XP_E_FORMAT, "d.c", 1, "line 4: %s", xp_error_text()), XP_E_FORMAT);
    assert_string_equal(xp_error_text(), "line 4: file 'x': 3");
    assert_string_equal(xp_error_where(), "d.c:1");
    memset(longer, 'q', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    (void)XP_FAIL(XP_E_BUG, "%s", longer);
    assert_int_equal(strlen(xp_error_text()), 1023);
    assert_non_null(strstr(xp_error_where(), "base.c:"));
    (void)xp_fail(XP_E_BUG, longer, 1, "short");
    assert_string_equal(xp_error_text(), "short");
}

/* Whatever a file or a command line holds, a text is one line of printable ASCII, and quoting it changes nothing. */
static void texts_are_ascii(void **state) {
    char every[256], high[400];
    (void)state;
    (void)XP_FAIL(XP_E_ARG, "k: '%s'", "a\x1b[2J\n\xc3\xa9\x7f~ \\");
    assert_string_equal(xp_error_text(), "k: 'a\\x1b[2J\\x0a\\xc3\\xa9\\x7f~ \\'");
    (void)XP_FAIL(XP_E_ARG, "%s", xp_error_text());
    assert_string_equal(xp_error_text(), "k: 'a\\x1b[2J\\x0a\\xc3\\xa9\\x7f~ \\'");
    for (int i = 0; i < 255; i++)
        every[i] = (char)(i + 1);
    every[255] = '\0';
    (void)XP_FAIL(XP_E_ARG, "%s", every);
    assert_int_equal(strlen(xp_error_text()), 95 + 4 * 160);
    for (const char *p = xp_error_text(); *p; p++)
        assert_true(*p >= 0x20 && *p < 0x7f);
    /* The cut never splits an escaped byte. */
    memset(high, 0xff, sizeof high - 1);
    high[sizeof high - 1] = '\0';
    for (int before = 0; before < 8; before++) {
        (void)XP_FAIL(XP_E_ARG, "%.*s%s", before, "12345678", high);
        const size_t n = strlen(xp_error_text());
        assert_true(n >= 1020 && n <= 1023);
        assert_string_equal(xp_error_text() + n - 4, "\\xff");
    }
}

static xp_status fails(int *calls) {
    ++*calls;
    return XP_FAIL(XP_E_NOMEM, "no %s", "memory");
}

static xp_status tries(int *calls) {
    XP_TRY(fails(calls));
    XP_TRY(fails(calls));
    return XP_OK;
}

static xp_status jumps(int *calls) {
    xp_status st = XP_OK;
    XP_GOTO(out, fails(calls));
    XP_GOTO(out, fails(calls));
out:
    ++*calls;
    return st;
}

static void macros(void **state) {
    int calls = 0;
    (void)state;
    assert_int_equal(tries(&calls), XP_E_NOMEM);
    assert_int_equal(calls, 1);
    assert_int_equal(jumps(&calls), XP_E_NOMEM);
    assert_int_equal(calls, 3);
}

/* Distinct words, never NULL, for values outside the enum too. */
static void status_names(void **state) {
    (void)state;
    for (int a = XP_OK; a <= XP_E_PLUGIN; a++) {
        assert_true(xp_status_name((xp_status)a)[0] != '\0');
        assert_string_not_equal(xp_status_name((xp_status)a), "unknown");
        for (int b = XP_OK; b < a; b++)
            assert_string_not_equal(xp_status_name((xp_status)a), xp_status_name((xp_status)b));
    }
    assert_string_equal(xp_status_name((xp_status)(XP_E_PLUGIN + 1)), "unknown");
    assert_string_equal(xp_status_name((xp_status)-1), "unknown");
}

/* ---- the table ---- */

static const struct {
    xp_dtype d;
    const char *name;
    int bits, is_float;
} table[] = {
    {XP_F64, "f64", 64, 1},  {XP_F32, "f32", 32, 1},  {XP_BF16, "bf16", 16, 1},        {XP_F16, "f16", 16, 1},
    {XP_E4M3, "e4m3", 8, 1}, {XP_E5M2, "e5m2", 8, 1}, {XP_E4M3FNUZ, "e4m3fnuz", 8, 1}, {XP_E5M2FNUZ, "e5m2fnuz", 8, 1},
    {XP_E8M0, "e8m0", 8, 1}, {XP_E2M1, "e2m1", 4, 1}, {XP_I64, "i64", 64, 0},          {XP_I32, "i32", 32, 0},
    {XP_U64, "u64", 64, 0},  {XP_U8, "u8", 8, 0}};

static void dtypes(void **state) {
    xp_dtype d;
    (void)state;
    assert_int_equal(sizeof table / sizeof *table, XP_NDTYPE);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        assert_string_equal(xp_dtype_name(table[i].d), table[i].name);
        assert_int_equal(xp_dtype_bits(table[i].d), table[i].bits);
        assert_int_equal(xp_dtype_is_float(table[i].d), table[i].is_float);
        assert_int_equal(xp_dtype_parse(table[i].name, &d), XP_OK);
        assert_int_equal(d, table[i].d);
        assert_int_equal(xp_dtype_bytes(table[i].d, 0), 0);
        assert_int_equal(xp_dtype_bytes(table[i].d, 10), 10 * table[i].bits / 8);
    }
    assert_int_equal(xp_dtype_bytes(XP_E2M1, 7), 4);
    assert_int_equal(xp_dtype_bytes(XP_F64, INT64_C(1) << 40), INT64_C(1) << 43);
    assert_null(xp_dtype_name(XP_NDTYPE));
    assert_null(xp_dtype_name((xp_dtype)-1));
    static const char *const bad[] = {"", "F32", "f32 ", "bf1", "bf166", "float"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char quoted[40];
        assert_int_equal(xp_dtype_parse(bad[i], &d), XP_E_ARG);
        snprintf(quoted, sizeof quoted, "'%s'", bad[i]);
        assert_non_null(strstr(xp_error_text(), quoted));
        assert_int_equal(d, XP_NDTYPE);
    }
}

/* ---- widening ---- */

/* What the standards say of a format, in words of their own: powers are made by repeated doubling and halving, and the
 * specials are listed by code. */
typedef struct {
    xp_dtype d;
    int exponent_bits, mantissa_bits, bias;
    uint64_t inf;              /* the code of +infinity, or ~0 */
    uint64_t nan_from, nan_to; /* positive NaN codes, inclusive; from > to: none */
    uint64_t nan_alone;        /* the only NaN of a format without a negative zero, or ~0 */
    double largest, least;     /* the largest finite value and the smallest positive one */
} format;

static const format formats[] = {
    {XP_BF16, 8, 7, 127, 0x7f80, 0x7f81, 0x7fff, ~UINT64_C(0), 0x1.fep127, 0x1p-133},
    {XP_F16, 5, 10, 15, 0x7c00, 0x7c01, 0x7fff, ~UINT64_C(0), 65504.0, 0x1p-24},
    {XP_E4M3, 4, 3, 7, ~UINT64_C(0), 0x7f, 0x7f, ~UINT64_C(0), 448.0, 0x1p-9},
    {XP_E5M2, 5, 2, 15, 0x7c, 0x7d, 0x7f, ~UINT64_C(0), 57344.0, 0x1p-16},
    {XP_E4M3FNUZ, 4, 3, 8, ~UINT64_C(0), 1, 0, 0x80, 240.0, 0x1p-10},
    {XP_E5M2FNUZ, 5, 2, 16, ~UINT64_C(0), 1, 0, 0x80, 57344.0, 0x1p-17},
    {XP_E2M1, 2, 1, 1, ~UINT64_C(0), 1, 0, ~UINT64_C(0), 6.0, 0.5},
};

static double power_of_two(int e) {
    double v = 1;
    for (; e > 0; e--)
        v *= 2;
    for (; e < 0; e++)
        v /= 2;
    return v;
}

/* Bits are weighed one by one: 1/2, 1/4, ... behind the point. */
static double by_formula(const format *f, uint64_t code) {
    const int bits = 1 + f->exponent_bits + f->mantissa_bits;
    const uint64_t sign = code >> (bits - 1), rest = code - (sign << (bits - 1));
    double fraction = 0, weight = 0.5;
    int exponent = 0;
    if (code == f->nan_alone || (rest >= f->nan_from && rest <= f->nan_to))
        return (double)NAN;
    if (rest == f->inf)
        return sign ? -(double)INFINITY : (double)INFINITY;
    for (int b = f->mantissa_bits - 1; b >= 0; b--, weight /= 2)
        fraction += (rest >> b & 1) ? weight : 0;
    for (int b = 0; b < f->exponent_bits; b++)
        exponent += (rest >> (f->mantissa_bits + b) & 1) ? 1 << b : 0;
    const double v =
        exponent ? (1 + fraction) * power_of_two(exponent - f->bias) : fraction * power_of_two(1 - f->bias);
    return sign ? -v : v;
}

static int same(double a, double b) {
    return (isnan(a) && isnan(b)) || memcmp(&a, &b, sizeof a) == 0;
}

static void every_code(const format *f) {
    static uint16_t wide[65536];
    static uint8_t narrow[256];
    static double row[65536];
    const int bits = xp_dtype_bits(f->d), codes = 1 << bits;
    const void *base = bits == 16 ? (const void *)wide : narrow;
    double largest = 0, least = (double)INFINITY;
    for (int c = 0; c < codes; c++) {
        if (bits == 16)
            wide[c] = (uint16_t)c;
        else if (bits == 8)
            narrow[c] = (uint8_t)c;
        else
            narrow[c / 2] = (uint8_t)(c & 1 ? narrow[c / 2] | c << 4 : c);
    }
    xp_widen_row(base, f->d, 0, codes, row);
    for (int c = 0; c < codes; c++) {
        const double v = xp_widen(base, f->d, c);
        if (!same(v, by_formula(f, (uint64_t)c)) || !same(v, row[c]) || xp_code(base, f->d, c) != (uint64_t)c)
            fail_msg("%s code %#x: widened to %a, as a row %a, expected %a", xp_dtype_name(f->d), (unsigned)c, v,
                     row[c], by_formula(f, (uint64_t)c));
        largest = isfinite(v) && v > largest ? v : largest;
        least = v > 0 && v < least ? v : least;
    }
    assert_true(same(largest, f->largest));
    assert_true(same(least, f->least));
    /* A row that starts at an odd element. */
    xp_widen_row(base, f->d, 3, 5, row);
    for (int i = 0; i < 5; i++)
        assert_true(same(row[i], by_formula(f, (uint64_t)i + 3)));
}

static void narrow_formats(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        every_code(&formats[i]);
}

static void scales(void **state) {
    uint8_t code[256];
    (void)state;
    for (int c = 0; c < 256; c++) {
        code[c] = (uint8_t)c;
        assert_true(same(xp_widen(code, XP_E8M0, c), c == 255 ? (double)NAN : power_of_two(c - 127)));
        assert_int_equal(xp_code(code, XP_E8M0, c), c);
    }
}

static void wide_formats(void **state) {
    static const float f[] = {0.0f, -0.0f, 1.5f, -0x1p-149f, 0x1.fffffep127f, INFINITY, -INFINITY, NAN};
    static const int32_t i32[] = {0, -1, INT32_MIN, INT32_MAX};
    static const uint8_t u8[] = {0, 1, 255};
    static const int64_t i64[] = {0, -1, INT64_C(1) << 53, -(INT64_C(1) << 53)};
    static const uint64_t u64[] = {0, UINT64_C(1) << 63, UINT64_C(1) << 53};
    double row[8];
    (void)state;
    xp_widen_row(f, XP_F32, 0, 8, row);
    for (int i = 0; i < 8; i++) {
        assert_true(same(xp_widen(f, XP_F32, i), (double)f[i]));
        assert_true(same(row[i], (double)f[i]));
        const double d = (double)f[i] / 3;
        assert_true(same(xp_widen(&d, XP_F64, 0), d));
        xp_widen_row(&d, XP_F64, 0, 1, row + i);
        assert_true(same(row[i], d));
    }
    for (int i = 0; i < 4; i++)
        assert_true(same(xp_widen(i32, XP_I32, i), (double)i32[i]) && same(xp_widen(i64, XP_I64, i), (double)i64[i]));
    for (int i = 0; i < 3; i++)
        assert_true(same(xp_widen(u8, XP_U8, i), (double)u8[i]) && same(xp_widen(u64, XP_U64, i), (double)u64[i]));
    xp_widen_row(i32, XP_I32, 1, 3, row);
    assert_true(same(row[1], -0x1p31));
    assert_int_equal(xp_code(i64, XP_I64, 1), UINT64_MAX);
    assert_int_equal(xp_code(i32, XP_I32, 1), UINT32_MAX);
}

/* ---- tensors ---- */

static void views(void **state) {
    static float data[2 * 3 * 5];
    (void)state;
    const xp_tensor t = xp_tensor_3d(data, XP_F32, 2, 3, 5);
    assert_int_equal(t.ndim, 3);
    assert_int_equal(t.mem, XP_HOST);
    assert_int_equal(t.stride[0], 15);
    assert_int_equal(t.stride[1], 5);
    assert_int_equal(t.stride[2], 1);
    assert_int_equal(xp_tensor_count(&t), 30);
    assert_ptr_equal(xp_tensor_at(&t, 1, 2, 3, 99), &data[15 + 10 + 3]);
    const xp_tensor two = xp_tensor_2d(data, XP_BF16, 3, 5), one = xp_tensor_1d(data, XP_U8, 4);
    assert_ptr_equal(xp_tensor_at(&two, 2, 1, 0, 0), (char *)data + 2 * 11);
    assert_ptr_equal(xp_tensor_at(&one, 3, 0, 0, 0), (char *)data + 3);
    const xp_tensor scalar = xp_tensor_of(data, XP_F64, 0, NULL), absent = xp_tensor_1d(NULL, XP_F64, 9);
    assert_int_equal(xp_tensor_count(&scalar), 1);
    assert_ptr_equal(xp_tensor_at(&scalar, 7, 7, 7, 7), data);
    assert_int_equal(xp_tensor_count(&absent), 0);
    const int64_t four[4] = {2, 1, 3, 5};
    const xp_tensor deep = xp_tensor_of(data, XP_F32, 4, four);
    assert_int_equal(xp_tensor_count(&deep), 30);
    assert_ptr_equal(xp_tensor_at(&deep, 1, 0, 2, 4), &data[15 + 10 + 4]);
    const xp_tensor none = xp_tensor_3d(data, XP_F32, 2, 0, 5);
    assert_int_equal(xp_tensor_count(&none), 0);
    assert_true(xp_tensor_contiguous(&none));
    const xp_tensor large = xp_tensor_2d(data, XP_F32, INT64_C(1) << 31, INT64_C(1) << 20);
    assert_int_equal(xp_tensor_count(&large), INT64_C(1) << 51);
}

/* Every element of a cut view is found by coordinates, by number and through its strides alike. */
static void cuts(void **state) {
    static int32_t data[4 * 6 * 5];
    (void)state;
    for (int i = 0; i < 4 * 6 * 5; i++)
        data[i] = i;
    const xp_tensor t = xp_tensor_3d(data, XP_I32, 4, 6, 5);
    const xp_tensor middle = xp_tensor_rows(&t, 1, 2, 5), outer = xp_tensor_rows(&middle, 0, 1, 4);
    const xp_tensor inner = xp_tensor_rows(&outer, 2, 1, 3), empty = xp_tensor_rows(&t, 0, 4, 4);
    assert_true(xp_tensor_contiguous(&t));
    assert_false(xp_tensor_contiguous(&middle));
    assert_false(xp_tensor_contiguous(&inner));
    assert_int_equal(xp_tensor_count(&empty), 0);
    assert_int_equal(xp_tensor_count(&inner), 3 * 3 * 2);
    int64_t n = 0;
    for (int64_t i = 0; i < 3; i++) {
        for (int64_t j = 0; j < 3; j++) {
            for (int64_t k = 0; k < 2; k++, n++) {
                const int32_t want = (int32_t)((i + 1) * 30 + (j + 2) * 5 + k + 1);
                assert_int_equal(*(int32_t *)xp_tensor_at(&inner, i, j, k, 0), want);
                assert_int_equal(((int32_t *)inner.data)[xp_tensor_offset(&inner, n)], want);
            }
        }
    }
    /* One row of it, and a dimension of one element whose stride says nothing. */
    const xp_tensor row = xp_tensor_rows(&t, 0, 2, 3), column = xp_tensor_rows(&t, 2, 4, 5);
    assert_true(xp_tensor_contiguous(&row));
    assert_false(xp_tensor_contiguous(&column));
    xp_tensor odd = xp_tensor_2d(data, XP_I32, 1, 5);
    odd.stride[0] = 77;
    assert_true(xp_tensor_contiguous(&odd));
    const xp_tensor absent = xp_tensor_2d(NULL, XP_I32, 4, 6), part = xp_tensor_rows(&absent, 0, 1, 3);
    assert_null(part.data);
    assert_int_equal(part.dim[0], 2);
}

/* ---- stages ---- */

static void stages(void **state) {
    (void)state;
    for (int i = 0; xp_stages[i]; i++) {
        const xp_stage *s = xp_stages[i];
        assert_ptr_equal(xp_stage_find(s->name), s);
        for (int o = 0; o < s->operands; o++) {
            assert_int_equal(xp_stage_operand(s, s->operand[o].name), o);
            assert_true(s->operand[o].at + sizeof(xp_tensor) <= s->args_size);
        }
        for (int p = 0; p < s->params; p++)
            assert_true(s->param[p].at < s->args_size);
        assert_int_equal(xp_stage_operand(s, "nosuch"), -1);
    }
    assert_null(xp_stage_find("nosuch"));
    for (int a = XP_DP; a < XP_NAXIS; a++)
        assert_string_not_equal(xp_axis_name((xp_axis)a), "local");
    assert_string_equal(xp_axis_name(XP_LOCAL), "local");
    assert_string_equal(xp_axis_name(XP_NAXIS), "local");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(texts),        cmocka_unit_test(texts_are_ascii), cmocka_unit_test(macros),
        cmocka_unit_test(status_names), cmocka_unit_test(dtypes),          cmocka_unit_test(narrow_formats),
        cmocka_unit_test(scales),       cmocka_unit_test(wide_formats),    cmocka_unit_test(views),
        cmocka_unit_test(cuts),         cmocka_unit_test(stages),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
