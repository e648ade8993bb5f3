/* Responses put together: whole files, and one file a rank with its layout; everything that does not fit is refused by
 * file, tensor and element. */
#include "responses.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { ROWS = 5, COLS = 4 };

static char dir[] = "/tmp/responses.XXXXXX";
static float whole[ROWS * COLS];
static int ranks; /* files written so far */

static int setup(void **state) {
    (void)state;
    for (int i = 0; i < ROWS * COLS; i++)
        whole[i] = (float)(i + 1);
    return mkdtemp(dir) ? 0 : 1;
}

static int fresh(void **state) {
    char path[128];
    (void)state;
    for (int r = 0; r < ranks; r++) {
        snprintf(path, sizeof path, "%s/t-1.expected.rank%d.safetensors", dir, r);
        (void)remove(path);
    }
    snprintf(path, sizeof path, "%s/t-1.expected.safetensors", dir);
    (void)remove(path);
    ranks = 0;
    return 0;
}

static int teardown(void **state) {
    (void)fresh(state);
    return rmdir(dir);
}

/* The next rank's file: rows [r0, r1) and columns [c0, c1) of exp.y, with the metadata that say so or others. */
static void write_rank(int r0, int r1, int c0, int c1, const char *rank, const char *shape, const char *slice,
                       float change) {
    float part[ROWS * COLS];
    char path[128], own_rank[16], own_slice[128];
    int n = 0;
    for (int r = r0; r < r1; r++) {
        for (int c = c0; c < c1; c++)
            part[n++] = whole[r * COLS + c];
    }
    part[0] += change;
    snprintf(own_rank, sizeof own_rank, "%d", ranks);
    snprintf(own_slice, sizeof own_slice, "{\"exp.y\": [[%d, %d], [%d, %d]]}", r0, r1, c0, c1);
    const xp_safetensors_item item = {"exp.y", xp_tensor_2d(part, XP_F32, r1 - r0, c1 - c0)};
    const xp_safetensors_text text[] = {{"expar.rank", rank ? rank : own_rank},
                                        {"expar.global_shape", shape ? shape : "{\"exp.y\": [5, 4]}"},
                                        {"expar.slice", slice ? slice : own_slice}};
    snprintf(path, sizeof path, "%s/t-1.expected.rank%d.safetensors", dir, ranks++);
    if (xp_safetensors_write(path, &item, 1, text, 3) != XP_OK)
        fail_msg("%s", xp_error_text());
}

static void expect_whole(void) {
    xp_responses *r = NULL;
    const char *name;
    xp_tensor t;
    if (xp_responses_open(dir, "data/t-1.expected.safetensors", &r) != XP_OK)
        fail_msg("%s", xp_error_text());
    assert_int_equal(xp_responses_at(r, 0, &name, &t), 1);
    assert_string_equal(name, "exp.y");
    assert_true(t.ndim == 2 && t.dim[0] == ROWS && t.dim[1] == COLS && t.dtype == XP_F32);
    assert_memory_equal(t.data, whole, sizeof whole);
    assert_int_equal(xp_responses_at(r, 1, &name, &t), 0);
    assert_int_equal(xp_responses_at(r, -1, &name, &t), 0);
    xp_responses_close(r);
}

static void refused(xp_status want, const char *message) {
    xp_responses *r = NULL;
    assert_int_equal(xp_responses_open(dir, "data/t-1.expected.safetensors", &r), want);
    assert_null(r);
    if (!strstr(xp_error_text(), message))
        fail_msg("expected '%s' in: %s", message, xp_error_text());
}

static void one_file(void **state) {
    char path[128];
    (void)state;
    const xp_safetensors_item item = {"exp.y", xp_tensor_2d(whole, XP_F32, ROWS, COLS)};
    snprintf(path, sizeof path, "%s/t-1.expected.safetensors", dir);
    assert_int_equal(xp_safetensors_write(path, &item, 1, NULL, 0), XP_OK);
    expect_whole();
}

static void no_file(void **state) {
    (void)state;
    refused(XP_E_IO, "t-1.expected.safetensors: no response, whole or by ranks");
}

/* Rows, columns, tiles, an empty rank, and copies. */
static void shards(void **state) {
    (void)state;
    write_rank(0, 2, 0, 4, NULL, NULL, NULL, 0);
    write_rank(2, 5, 0, 4, NULL, NULL, NULL, 0);
    expect_whole();
    (void)fresh(NULL);
    write_rank(0, 5, 3, 4, NULL, NULL, NULL, 0);
    write_rank(0, 5, 0, 3, NULL, NULL, NULL, 0);
    expect_whole();
    (void)fresh(NULL);
    write_rank(3, 5, 0, 4, NULL, NULL, NULL, 0);
    write_rank(0, 3, 0, 2, NULL, NULL, NULL, 0);
    write_rank(5, 5, 0, 4, NULL, NULL, NULL, 0);
    write_rank(0, 4, 1, 4, NULL, NULL, NULL, 0); /* overlaps the first two, with the same bits */
    expect_whole();
}

/* A tensor without a slice is whole on every rank. */
static void replicas(void **state) {
    (void)state;
    write_rank(0, 5, 0, 4, NULL, "{}", "{}", 0);
    write_rank(0, 5, 0, 4, NULL, "{}", "{}", 0);
    expect_whole();
    write_rank(0, 5, 0, 4, NULL, "{}", "{}", 1);
    refused(XP_E_FORMAT, "rank2.safetensors: element 0 of 'exp.y' has other bits than another rank's");
}

static void holes_and_overlaps(void **state) {
    (void)state;
    write_rank(0, 2, 0, 4, NULL, NULL, NULL, 0);
    write_rank(3, 5, 0, 4, NULL, NULL, NULL, 0);
    refused(XP_E_FORMAT, "element 8 of 'exp.y' is in no rank's file");
    write_rank(1, 3, 0, 4, NULL, NULL, NULL, 0.5F);
    refused(XP_E_FORMAT, "rank2.safetensors: element 4 of 'exp.y' has other bits");
}

static void layouts(void **state) {
    static const struct {
        const char *rank, *shape, *slice, *message;
    } bad[] = {
        {"1", NULL, NULL, "expar.rank is '1', expected 0"},
        {"00", NULL, NULL, "expar.rank is '00', expected 0"},
        {NULL, "[5, 4]", NULL, "expar.global_shape is no JSON object"},
        {NULL, NULL, "{\"exp.y\": [[0, 2], [0, 4]]", "expar.slice is no JSON object"},
        {NULL, NULL, "{\"exp.y\": [[0, 2]]}", "expar.slice of 'exp.y' is no list of 2 dimensions"},
        {NULL, NULL, "{\"exp.y\": [[0, 2], [0, 4.0]]}", "expar.slice of 'exp.y', dimension 1: expected whole numbers"},
        {NULL, "{}", NULL, "expar.global_shape of 'exp.y' is no list"},
        {NULL, NULL, "{\"exp.y\": [[0, 3], [0, 4]]}", "dimension 0: [0, 3) of 5 does not fit its 2 elements"},
        {NULL, NULL, "{\"exp.y\": [[-1, 1], [0, 4]]}", "dimension 0: [-1, 1) of 5 does not fit"},
        {NULL, NULL, "{\"exp.y\": [[4, 6], [0, 4]]}", "dimension 0: [4, 6) of 5 does not fit"},
        {NULL, "{\"exp.y\": [5, 3]}", NULL, "dimension 1: [0, 4) of 3 does not fit"},
        {NULL, "{\"exp.y\": [-5, 4]}", NULL, "the whole shape of 'exp.y' is out of range"},
        {NULL, "{\"exp.y\": [1099511627776, 1099511627776]}", NULL, "the whole shape of 'exp.y' is out of range"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_rank(0, 2, 0, 4, bad[i].rank, bad[i].shape, bad[i].slice, 0);
        refused(XP_E_FORMAT, bad[i].message);
        (void)fresh(NULL);
    }
    write_rank(0, 2, 0, 4, NULL, NULL, NULL, 0);
    write_rank(2, 5, 0, 4, NULL, "{\"exp.y\": [6, 4]}", NULL, 0);
    refused(XP_E_FORMAT, "rank1.safetensors: 'exp.y', dimension 0: [2, 5) of 6 does not fit");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(one_file, fresh),
        cmocka_unit_test_setup(no_file, fresh),
        cmocka_unit_test_setup(shards, fresh),
        cmocka_unit_test_setup(replicas, fresh),
        cmocka_unit_test_setup(holes_and_overlaps, fresh),
        cmocka_unit_test_setup(layouts, fresh),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
