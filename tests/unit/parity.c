/* The parity store: rows that agree, differ, are missing or never came; and the fault catalogue's own consistency. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "fault.h"
#include "judge.h"
#include "parity.h"

enum { ROWS = 6, COLS = 5 };

static void fill(float *v) {
    for (int i = 0; i < ROWS * COLS; i++)
        v[i] = (float)i + 0.25f;
}

static xp_parity *recorded(float *v) {
    xp_parity *p;
    assert_int_equal(xp_parity_open(&p), XP_OK);
    const xp_tensor t = xp_tensor_2d(v, XP_F32, ROWS, COLS);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &t, 0, ROWS), XP_OK);
    xp_parity_compare(p);
    return p;
}

/* Two shards of the same rows, in the other order. */
static void same_bits(void **state) {
    (void)state;
    float v[ROWS * COLS];
    xp_parity_line l;
    fill(v);
    xp_parity *p = recorded(v);
    const xp_tensor t = xp_tensor_2d(v, XP_F32, ROWS, COLS);
    const xp_tensor low = xp_tensor_rows(&t, 0, 0, 4), high = xp_tensor_rows(&t, 0, 4, ROWS);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 1, &high, 4, ROWS), XP_OK);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &low, 0, ROWS), XP_OK);
    assert_int_equal(xp_parity_result(p, 0, &l), 1);
    assert_int_equal(l.rows, ROWS);
    assert_int_equal(l.elements, ROWS * COLS);
    assert_int_equal(l.different, 0);
    assert_int_equal(l.missing, 0);
    assert_int_equal(xp_parity_result(p, 1, &l), 0);
    xp_parity_close(p);
}

static void one_bit(void **state) {
    (void)state;
    float v[ROWS * COLS];
    xp_parity_line l;
    fill(v);
    xp_parity *p = recorded(v);
    v[3 * COLS + 2] = nextafterf(v[3 * COLS + 2], 100.0f);
    const xp_tensor t = xp_tensor_2d(v, XP_F32, ROWS, COLS);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 2, &t, 0, ROWS), XP_OK);
    assert_int_equal(xp_parity_result(p, 0, &l), 1);
    assert_int_equal(l.different, 1);
    assert_int_equal(l.first, 3);
    assert_int_equal(l.rank, 2);
    xp_parity_close(p);
}

/* NaN is NaN in every dtype, whatever its sign and payload; what stands beside it still counts. */
static void nan_rows(void **state) {
    static const struct {
        xp_dtype d;
        uint64_t one, other, infinity;
    } of[] = {{XP_F64, UINT64_C(0x7ff8000000000000), UINT64_C(0xfff0000000000001), UINT64_C(0x7ff0000000000000)},
              {XP_F32, 0x7fc00000, 0xff800001, 0x7f800000},
              {XP_BF16, 0x7fc0, 0xff81, 0x7f80},
              {XP_F16, 0x7e00, 0xfc01, 0x7c00}};
    (void)state;
    for (size_t k = 0; k < sizeof of / sizeof *of; k++) {
        for (int change = 0; change < 3; change++) { /* another NaN; infinity for NaN; another number beside it */
            enum { WIDE = 150 };
            uint64_t words[WIDE] = {0};
            const size_t bytes = xp_dtype_bytes(of[k].d, 1);
            unsigned char *v = (unsigned char *)words;
            xp_parity *p;
            xp_parity_line l;
            const xp_tensor t = xp_tensor_2d(v, of[k].d, 1, WIDE);
            memcpy(v + 77 * bytes, &of[k].one, bytes);
            assert_int_equal(xp_parity_open(&p), XP_OK);
            assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &t, 0, 1), XP_OK);
            xp_parity_compare(p);
            memcpy(v + 77 * bytes, change == 1 ? &of[k].infinity : &of[k].other, bytes);
            v[149 * bytes] = change == 2;
            assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &t, 0, 1), XP_OK);
            assert_int_equal(xp_parity_result(p, 0, &l), 1);
            assert_int_equal(l.different, change > 0);
            xp_parity_close(p);
        }
    }
}

/* Rows that only one side has are differences: missing ones, and ones that were never recorded. */
static void one_sided(void **state) {
    (void)state;
    float v[ROWS * COLS];
    xp_parity_line l;
    fill(v);
    xp_parity *p = recorded(v);
    const xp_tensor t = xp_tensor_2d(v, XP_F32, ROWS, COLS), part = xp_tensor_rows(&t, 0, 0, 2);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &part, 0, ROWS), XP_OK);
    assert_int_equal(xp_parity_rows(p, "z", 0, 0, 0, &part, 0, ROWS), XP_OK);
    assert_int_equal(xp_parity_result(p, 0, &l), 1);
    assert_int_equal(l.missing, ROWS - 2);
    assert_int_equal(xp_parity_result(p, 1, &l), 1);
    assert_string_equal(l.site, "z");
    assert_int_equal(l.different, 2);
    xp_parity_close(p);
}

/* Rows of more than one dimension are compared whole: the last element counts. */
static void deep_rows(void **state) {
    (void)state;
    float v[2 * 3 * 4] = {0};
    xp_parity *p;
    xp_parity_line l;
    const xp_tensor t = xp_tensor_3d(v, XP_F32, 2, 3, 4), part = xp_tensor_rows(&t, 2, 0, 2);
    assert_int_equal(xp_parity_open(&p), XP_OK);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &t, 0, 2), XP_OK);
    xp_parity_compare(p);
    v[23] = 1.0f;
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &t, 0, 2), XP_OK);
    assert_int_equal(xp_parity_result(p, 0, &l), 1);
    assert_int_equal(l.elements, 24);
    assert_int_equal(l.different, 1);
    assert_int_equal(l.first, 1);
    /* Rows with gaps, and names that would not fit, would be compared wrongly: refused. */
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &part, 0, 2), XP_E_BUG);
    char site[sizeof l.site + 1];
    memset(site, 's', sizeof site - 1);
    site[sizeof site - 1] = '\0';
    assert_int_equal(xp_parity_rows(p, site, 0, 0, 0, &t, 0, 2), XP_E_BUG);
    site[sizeof site - 2] = '\0';
    assert_int_equal(xp_parity_rows(p, site, 0, 0, 0, &t, 0, 2), XP_OK);
    assert_int_equal(xp_parity_result(p, 1, &l), 1);
    assert_string_equal(l.site, site);
    assert_int_equal(xp_parity_result(p, 2, &l), 0);
    assert_int_equal(xp_parity_result(p, -1, &l), 0);
    xp_parity_close(p);
}

/* Sites, layers and steps are told apart; -0 and 0 are different bits; no rows and no store are no error. */
static void kept_apart(void **state) {
    (void)state;
    float a[2] = {0.0f, 1.0f}, b[2] = {-0.0f, 1.0f};
    xp_parity *p;
    xp_parity_line l;
    const xp_tensor ta = xp_tensor_1d(a, XP_F32, 2), tb = xp_tensor_1d(b, XP_F32, 2), none = xp_tensor_1d(a, XP_F32, 0);
    assert_int_equal(xp_parity_open(&p), XP_OK);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &ta, 0, 2), XP_OK);
    assert_int_equal(xp_parity_rows(p, "y", 1, 0, 0, &tb, 0, 2), XP_OK);
    assert_int_equal(xp_parity_rows(p, "y", 0, 1, 0, &tb, 0, 2), XP_OK);
    assert_int_equal(xp_parity_rows(p, "z", 0, 0, 0, &none, 0, 0), XP_OK);
    assert_int_equal(xp_parity_rows(NULL, "y", 0, 0, 0, &ta, 0, 2), XP_OK);
    xp_parity_compare(p);
    for (int i = 0; i < 3; i++)
        assert_int_equal(xp_parity_rows(p, "y", i == 1, i == 2, 4, &ta, 0, 2), XP_OK);
    const int64_t different[3] = {0, 1, 1};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(xp_parity_result(p, i, &l), 1);
        assert_int_equal(l.different, different[i]);
        assert_int_equal(l.layer, i == 1);
        assert_int_equal(l.step, i == 2);
        assert_int_equal(l.first, different[i] ? 0 : -1);
        assert_int_equal(l.rank, different[i] ? 4 : -1);
    }
    assert_int_equal(xp_parity_result(p, 3, &l), 0);
    xp_parity_close(p);
    xp_parity_close(NULL);
}

static void out_of_range(void **state) {
    (void)state;
    float v[ROWS * COLS];
    fill(v);
    xp_parity *p = recorded(v);
    const xp_tensor t = xp_tensor_2d(v, XP_F32, ROWS, COLS);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &t, 1, ROWS), XP_E_BUG);
    assert_int_equal(xp_parity_rows(p, "y", 0, 0, 0, &t, 0, ROWS + 1), XP_E_BUG);
    xp_parity_close(p);
}

/* Every fault wraps a stage that exists, cites a source, and promises a class that exists. */
static void faults(void **state) {
    (void)state;
    int n = 0;
    for (; xp_faults[n]; n++) {
        const xp_fault *f = xp_faults[n];
        int class = 0;
        for (int c = XP_C_BITS; c < XP_NCLASS; c++)
            class += strcmp(f->caught_by, xp_class_name((xp_class)c)) == 0;
        if (!xp_stage_find(f->stage) || class != 1 || !strpbrk(f->source, "#0123456789") || !f->meaning[0])
            fail_msg("%s: stage '%s', class '%s', source '%s'", f->name, f->stage, f->caught_by, f->source);
        assert_ptr_equal(xp_fault_find(f->name), f);
    }
    assert_true(n >= 16);
    assert_null(xp_fault_find("nosuch"));
}

/* Values are compared within both runs' tolerances together; equality needs none; NaN and a missing row are
 * differences. */
static void values_by_bound(void **state) {
    (void)state;
    float a[4] = {1.0f, 2.0f, NAN, INFINITY}, b[4] = {1.25f, 2.0f, NAN, INFINITY};
    double ta[4] = {0.125, 0, 0, 0}, tb[4] = {0.125, 0, 0, 0};
    xp_parity_line l;
    for (int wrong = 0; wrong < 4; wrong++) {
        xp_parity *p;
        xp_tensor t = xp_tensor_2d(a, XP_F32, 2, 2), tol = xp_tensor_2d(ta, XP_F64, 2, 2);
        assert_int_equal(xp_parity_open(&p), XP_OK);
        assert_int_equal(xp_parity_values(p, "g", 1, 0, 0, &t, &tol, 0, 2), XP_OK);
        xp_parity_compare(p);
        float c[4] = {b[0], b[1], b[2], b[3]};
        c[0] += wrong == 1 ? 0.0001f : 0.0f; /* a little more than 1/8 + 1/8 away */
        c[1] = wrong == 2 ? nextafterf(2.0f, 3.0f) : c[1];
        c[3] = wrong == 3 ? 1.0f : c[3];
        t.data = c;
        tol.data = tb;
        assert_int_equal(xp_parity_values(p, "g", 1, 0, 5, &t, &tol, 0, 2), XP_OK);
        assert_int_equal(xp_parity_result(p, 0, &l), 1);
        assert_int_equal(l.by_bound, 1);
        assert_int_equal(l.rows, 2);
        assert_int_equal(l.elements, 4);
        assert_int_equal(l.missing, 0);
        assert_int_equal(l.different, wrong > 0);
        assert_int_equal(l.first, wrong == 0 ? -1 : wrong == 3 ? 1 : 0);
        assert_int_equal(l.rank, wrong ? 5 : -1);
        assert_true(wrong > 0 ? l.ratio > 1.0 : l.ratio <= 1.0 && l.ratio > 0.999);
        xp_parity_close(p);
    }
}

/* Where a sum may overflow nothing is promised, neither a number nor a NaN; a NaN within a finite tolerance differs. */
static void values_without_a_bound(void **state) {
    (void)state;
    float one[3] = {605.0f, INFINITY, 1.0f}, many[3] = {NAN, NAN, 1.0f};
    double far[3] = {(double)INFINITY, 0, 0.5}, near[3] = {0.25, (double)INFINITY, 0.25};
    xp_parity_line l;
    for (int wrong = 0; wrong < 2; wrong++) {
        xp_parity *p;
        xp_tensor t = xp_tensor_2d(one, XP_F32, 3, 1), tol = xp_tensor_2d(far, XP_F64, 3, 1);
        assert_int_equal(xp_parity_open(&p), XP_OK);
        assert_int_equal(xp_parity_values(p, "g", 1, 0, 0, &t, &tol, 0, 3), XP_OK);
        xp_parity_compare(p);
        t.data = many;
        tol.data = near;
        many[2] = wrong ? NAN : 1.0f;
        assert_int_equal(xp_parity_values(p, "g", 1, 0, 0, &t, &tol, 0, 3), XP_OK);
        assert_int_equal(xp_parity_result(p, 0, &l), 1);
        assert_true(l.rows == 3 && l.different == wrong && l.first == (wrong ? 2 : -1));
        xp_parity_close(p);
    }
}

static void values_missing_or_misplaced(void **state) {
    (void)state;
    float a[4] = {1, 2, 3, 4};
    double none[4] = {0};
    xp_parity *p;
    xp_parity_line l;
    const xp_tensor t = xp_tensor_2d(a, XP_F32, 2, 2), tol = xp_tensor_2d(none, XP_F64, 2, 2);
    const xp_tensor t1 = xp_tensor_rows(&t, 0, 0, 1), tol1 = xp_tensor_rows(&tol, 0, 0, 1);
    assert_int_equal(xp_parity_open(&p), XP_OK);
    assert_int_equal(xp_parity_values(p, "g", 1, 0, 0, &t1, &tol1, 0, 2), XP_OK);
    xp_parity_compare(p);
    /* Row 1 was never recorded, and row 0 never comes. */
    assert_int_equal(xp_parity_values(p, "g", 1, 0, 0, &t1, &tol1, 1, 2), XP_OK);
    assert_int_equal(xp_parity_result(p, 0, &l), 1);
    assert_int_equal(l.different, 1);
    assert_int_equal(l.first, 1);
    assert_int_equal(l.missing, 1);
    assert_int_equal(xp_parity_values(p, "g", 1, 0, 0, &t, &tol, 1, 2), XP_E_BUG);
    assert_int_equal(xp_parity_values(p, "g", 1, 0, 0, &t, &tol, 0, 3), XP_E_BUG);
    assert_int_equal(xp_parity_rows(p, "g", 1, 0, 0, &t, 0, 2), XP_E_BUG);
    xp_parity_close(p);
}

/* Of a set beyond its room an odd step's rows are kept: those and no others are compared. */
static void values_sampled(void **state) {
    (void)state;
    enum { TALL = 5000, WIDE = 1024 };
    static float a[TALL * WIDE];
    static double none[TALL * WIDE];
    xp_parity *p;
    xp_parity_line l;
    const xp_tensor t = xp_tensor_2d(a, XP_F32, TALL, WIDE), tol = xp_tensor_2d(none, XP_F64, TALL, WIDE);
    assert_int_equal(xp_parity_open(&p), XP_OK);
    assert_int_equal(xp_parity_values(p, "g", 0, 0, 0, &t, &tol, 0, TALL), XP_OK);
    xp_parity_compare(p);
    a[1 * WIDE] = 1.0f; /* not kept */
    a[4998 * WIDE + 1023] = 1.0f;
    assert_int_equal(xp_parity_values(p, "g", 0, 0, 0, &t, &tol, 0, TALL), XP_OK);
    assert_int_equal(xp_parity_result(p, 0, &l), 1);
    assert_int_equal(l.rows, 1667); /* every third */
    assert_int_equal(l.elements, 1667 * WIDE);
    assert_int_equal(l.missing, 0);
    assert_int_equal(l.different, 1);
    assert_int_equal(l.first, 4998);
    xp_parity_close(p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_bits),
        cmocka_unit_test(one_bit),
        cmocka_unit_test(nan_rows),
        cmocka_unit_test(one_sided),
        cmocka_unit_test(deep_rows),
        cmocka_unit_test(kept_apart),
        cmocka_unit_test(out_of_range),
        cmocka_unit_test(faults),
        cmocka_unit_test(values_by_bound),
        cmocka_unit_test(values_without_a_bound),
        cmocka_unit_test(values_missing_or_misplaced),
        cmocka_unit_test(values_sampled),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
