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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_bits),    cmocka_unit_test(one_bit), cmocka_unit_test(one_sided),
        cmocka_unit_test(out_of_range), cmocka_unit_test(faults),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
