/* Case lines: products, names, refusals, and the round trip of printing and parsing over random cases. */
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

#include <stdio.h>
#include <string.h>

#include "case.h"
#include "random.h"

typedef struct {
    int n;
    xp_case last, first;
} seen;

static xp_status note(const xp_case *c, void *arg) {
    seen *s = arg;
    if (s->n++ == 0)
        s->first = *c;
    s->last = *c;
    return XP_OK;
}

static int count(const char *line) {
    seen s = {0};
    assert_int_equal(xp_case_expand(line, NULL, NULL, note, &s), XP_OK);
    return s.n;
}

static void products(void **state) {
    (void)state;
    assert_int_equal(count("residual"), 1);
    assert_int_equal(count("residual T=1,2,3 H=4,5 dtype=f32,bf16"), 12);
    assert_int_equal(count("residual mesh=sim:fsdp=1,2,4"), 3);
    assert_int_equal(count("layer E=8 K=2 mesh=sim:dp=2,fsdp=4,ep=1,2,4"), 3);
    assert_int_equal(count("layer E=8 K=2 mesh=sim:fsdp=2,4,ep=1,2"), 4);
    assert_int_equal(count("layer E=8 K=2 mesh=sim:fsdp=1,2,sim:ep=4"), 3);
}

static void order_and_names(void **state) {
    (void)state;
    seen s = {0};
    int number = 0;
    assert_int_equal(xp_case_expand("residual T=1,2 H=4", "file", &number, note, &s), XP_OK);
    assert_string_equal(s.first.name, "file/1");
    assert_string_equal(s.last.name, "file/2");
    assert_int_equal(s.first.dim['T' - 'A'], 1);
    assert_int_equal(s.last.dim['T' - 'A'], 2);
    assert_int_equal(xp_case_expand("residual T=3 name=mine", "file", &number, note, &s), XP_OK);
    assert_string_equal(s.last.name, "file/mine");
    assert_int_equal(number, 3);
}

static void refusals(void **state) {
    (void)state;
    static const char *const bad[][2] = {
        {"", "empty"},
        {"expret T=4", "'expret'"},
        {"residual T", "'T'"},
        {"residual =4", "'=4'"},
        {"residual T=", "T: ''"},
        {"residual T=1,,2", "T:"},
        {"residual T=x", "T: 'x'"},
        {"residual T=-1", "T: '-1'"},
        {"residual T=99999999999999999999", "T:"},
        {"residual T=4 T=5", "T: given twice"},
        {"residual zeta=1", "zeta"},
        {"residual layers=2", "layers"},
        {"residual dtype=bf17", "bf17"},
        {"residual dtype=i32", "i32"},
        {"residual data=rael", "rael"},
        {"residual seed=-1", "seed: '-1'"},
        {"residual expect=nothing", "nothing"},
        {"residual mesh=sim", "sim"},
        {"residual mesh=mehs:fsdp=2", "mehs"},
        {"residual mesh=sim:fsdp=2,fsdp=3", "fsdp"},
        {"layer E=8 K=9", "K: 9"},
        {"layer E=9 mesh=sim:ep=2", "E: 9"},
        {"layer align=3", "align: 3"},
        {"layer order=up", "order: 'up'"},
        {"layer shrink=0", "shrink: '0'"},
        {"route K=9 E=8", "K: 9"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        seen s = {0};
        if (xp_case_expand(bad[i][0], NULL, NULL, note, &s) != XP_E_ARG)
            fail_msg("accepted: '%s'", bad[i][0]);
        if (!strstr(xp_error_text(), bad[i][1]))
            fail_msg("'%s' is refused with '%s', which does not name '%s'", bad[i][0], xp_error_text(), bad[i][1]);
        assert_int_equal(s.n, 0);
    }
}

static void same_case(const xp_case *a, const xp_case *b, const char *line) {
    if (a->kind != b->kind || a->stage != b->stage || memcmp(a->dim, b->dim, sizeof a->dim) || a->data != b->data ||
        memcmp(a->dtype, b->dtype, sizeof a->dtype) || a->seed != b->seed || a->expect != b->expect ||
        strcmp(a->model, b->model) || strcmp(a->dialect, b->dialect) || strcmp(a->with, b->with) ||
        a->shrink != b->shrink || a->layers != b->layers || a->steps != b->steps ||
        a->deterministic != b->deterministic || a->order != b->order || a->align != b->align || a->params != b->params)
        fail_msg("not the same case after reading '%s' back", line);
    assert_int_equal(a->mesh.world, b->mesh.world);
    assert_int_equal(a->mesh.ep, b->mesh.ep);
    assert_int_equal(a->mesh.ep_fsdp, b->mesh.ep_fsdp);
    assert_int_equal(a->mesh.has_jitter, b->mesh.has_jitter);
}

static void round_trip(void **state) {
    (void)state;
    char line[XP_CASE_LINE];
    for (uint64_t n = 0; n < 3000; n++) {
        xp_case c;
        seen s = {0};
        xp_random_case(7, n, 0, &c);
        xp_case_print(&c, line, sizeof line);
        if (xp_case_expand(line, NULL, NULL, note, &s) != XP_OK)
            fail_msg("'%s': %s", line, xp_error_text());
        assert_int_equal(s.n, 1);
        same_case(&c, &s.last, line);
    }
}

/* What the draws promise: sizes, worlds, half of them above 1, and that every kind comes up. */
static void draws(void **state) {
    (void)state;
    int above = 0, kinds[3] = {0}, data[XP_NDATA] = {0}, act[XP_NDTYPE] = {0};
    enum { N = 4000 };
    for (uint64_t n = 0; n < N; n++) {
        xp_case c;
        xp_random_case(3, n, 0, &c);
        assert_int_equal(xp_case_check(&c), XP_OK);
        assert_in_range(c.mesh.world, 1, 8);
        assert_true(c.dim['T' - 'A'] <= 96 && c.dim['H' - 'A'] <= 96 && c.dim['F' - 'A'] <= 96 &&
                    c.dim['K' - 'A'] <= 8);
        assert_true(c.dim['E' - 'A'] <= 32 + c.mesh.ep);
        above += c.mesh.world > 1;
        kinds[c.kind]++;
        data[c.data]++;
        act[c.dtype[XP_G_ACT]]++;
    }
    assert_in_range(above, N * 2 / 5, N * 3 / 5);
    assert_true(kinds[XP_CASE_STAGE] && kinds[XP_CASE_LAYER] && kinds[XP_CASE_STEP]);
    for (int k = 0; k < XP_NDATA; k++)
        assert_true(k == XP_DATA_TEXT || data[k] > 0);
    assert_true(act[XP_F32] && act[XP_BF16] && act[XP_F16] && act[XP_F64]);
}

static void globs(void **state) {
    (void)state;
    assert_true(xp_glob("smoke*", "smoke/12"));
    assert_true(xp_glob("*", ""));
    assert_true(xp_glob("s?oke/*2", "smoke/12"));
    assert_true(xp_glob("*a*b*c", "xxaxxbxxabc"));
    assert_false(xp_glob("smoke", "smoke/12"));
    assert_false(xp_glob("smoke/?", "smoke/12"));
    assert_false(xp_glob("", "x"));
    assert_false(xp_glob("*a*b*c", "xxaxxbxxab"));
}

static xp_status refuse(const xp_case *c, void *arg) {
    (void)c;
    (void)arg;
    return XP_FAIL(XP_E_ARG, "the caller's own refusal");
}

static void files(void **state) {
    (void)state;
    seen s = {0};
    assert_int_equal(xp_case_file(XP_SOURCE_DIR "/tests/cases/smoke.txt", note, &s), XP_OK);
    assert_true(s.n > 20);
    assert_string_equal(s.first.name, "smoke/1");
    assert_int_equal(xp_case_file(XP_SOURCE_DIR "/tests/cases/nosuch.txt", note, &s), XP_E_IO);
    assert_non_null(strstr(xp_error_text(), "nosuch.txt"));
    /* A caller's refusal is no fault of the file. */
    assert_int_equal(xp_case_file(XP_SOURCE_DIR "/tests/cases/smoke.txt", refuse, NULL), XP_E_ARG);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products),   cmocka_unit_test(order_and_names), cmocka_unit_test(refusals),
        cmocka_unit_test(round_trip), cmocka_unit_test(draws),           cmocka_unit_test(globs),
        cmocka_unit_test(files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
