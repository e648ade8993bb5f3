/* Vector sets: what the writer makes the reader reads, and each rule broken once is refused by the name of file, test
 * and rule. The texts are broken in memory, the folders on disk. */
#include "vectors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "file.h"

static char folder[] = "/tmp/expar-vectors-XXXXXX";

static const char *in_folder(const char *name) {
    static char path[4][512];
    static int next;
    char *p = path[next++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void has(const char *part) {
    if (!strstr(xp_error_text(), part))
        fail_msg("expected '%s' in: %s", part, xp_error_text());
}

/* ---- texts ---- */

static const char group[] =
    "{\"schema\":\"expar.group/1\",\"name\":\"g\","
    "\"notes\":{\"Ties\":{\"bugType\":\"order\",\"description\":\"equal scores\",\"effect\":\"e\",\"links\":[\"l\"]}},"
    "\"testGroups\":[{\"source\":\"torch\",\"tests\":["
    "{\"tcId\":1,\"comment\":\"\",\"flags\":[\"Ties\"],\"result\":\"valid\",\"case\":\"route E=8 K=2\","
    "\"prompt\":\"data/a.safetensors\",\"expected\":\"data/b.safetensors\",\"compare\":\"classes\"},"
    "{\"tcId\":3,\"comment\":\"c\",\"flags\":[],\"result\":\"invalid\",\"case\":\"route\","
    "\"prompt\":\"data/a.safetensors\",\"refusal\":\"K must be\"}]}]}";

static const char manifest[] =
    "{\"schema\":\"expar.vectors/1\",\"name\":\"core\",\"version\":1,"
    "\"generator\":{\"name\":\"g\",\"version\":2,\"packages\":{\"torch\":\"2\"},\"python\":\"3\",\"environment\":{},"
    "\"seed\":0},\"tests\":2,\"files\":{"
    "\"groups/g.json\":\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"}}";

/* The text with its only `from` replaced. */
static char *with(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    if (!at || strstr(at + 1, from))
        fail_msg("'%s' is not there once", from);
    char *out = malloc(strlen(text) + strlen(to) + 1);
    assert_non_null(out);
    sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return out;
}

typedef xp_status (*check_fn)(const void *text, size_t bytes, const char *name);

static void broken(check_fn check, const char *good, const char *from, const char *to, const char *why) {
    char *text = with(good, from, to);
    if (check(text, strlen(text), "dir/f.json") != XP_E_FORMAT)
        fail_msg("not refused: %s", text);
    has("dir/f.json");
    has(why);
    free(text);
}

static void bad_group(const char *from, const char *to, const char *why) {
    broken(xp_vectors_check_group, group, from, to, why);
}

static void bad_manifest(const char *from, const char *to, const char *why) {
    broken(xp_vectors_check_manifest, manifest, from, to, why);
}

static void good_texts(void **state) {
    (void)state;
    if (xp_vectors_check_group(group, strlen(group), "f") != XP_OK)
        fail_msg("%s", xp_error_text());
    if (xp_vectors_check_manifest(manifest, strlen(manifest), "f") != XP_OK)
        fail_msg("%s", xp_error_text());
    /* what may be left out */
    static const char *const optional[] = {",\"effect\":\"e\"", ",\"links\":[\"l\"]"};
    for (size_t i = 0; i < sizeof optional / sizeof *optional; i++) {
        char *text = with(group, optional[i], "");
        assert_int_equal(xp_vectors_check_group(text, strlen(text), "f"), XP_OK);
        free(text);
    }
    char *text = with(manifest, ",\"packages\":{\"torch\":\"2\"},\"python\":\"3\",\"environment\":{},\"seed\":0", "");
    assert_int_equal(xp_vectors_check_manifest(text, strlen(text), "f"), XP_OK);
    free(text);
    text = with(group, "\"compare\":\"classes\"", "\"compare\":\"bits\",\"unchecked\":[\"rstd\",\"lse\"]");
    assert_int_equal(xp_vectors_check_group(text, strlen(text), "f"), XP_OK);
    free(text);
}

static void cut_texts(void **state) {
    (void)state;
    for (size_t n = 0; n < strlen(group); n++) {
        char *text = malloc(n + 1); /* of exactly that size, for the sanitizers */
        assert_non_null(text);
        memcpy(text, group, n);
        assert_int_equal(xp_vectors_check_group(text, n, "f"), XP_E_FORMAT);
        free(text);
    }
    for (size_t n = 0; n < strlen(manifest); n++) {
        char *text = malloc(n + 1);
        assert_non_null(text);
        memcpy(text, manifest, n);
        assert_int_equal(xp_vectors_check_manifest(text, n, "f"), XP_E_FORMAT);
        free(text);
    }
    assert_int_equal(xp_vectors_check_group("[]", 2, "f"), XP_E_FORMAT);
    has("f: the group is [], expected an object");
}

static void group_rules(void **state) {
    (void)state;
    bad_group("expar.group/1", "expar.group/2", "field 'schema' is \"expar.group/2\", expected \"expar.group/1\"");
    bad_group("{\"schema\"", "{\"more\":1,\"schema\"", "the group has an unknown key 'more' (1)");
    bad_group("{\"schema\"", "{\"schema|name\":1,\"schema\"", "the group has an unknown key 'schema|name'");
    bad_group("\"name\":\"g\"", "\"name\":\"\"", "field 'name' is \"\", expected a text that is not empty");
    bad_group("\"name\":\"g\",", "\"name\":\"g\",\"name\":\"g\",", "duplicate object key");
    bad_group("\"source\":\"torch\"", "\"source\":\"torch\",\"x\":[]",
              "an element of testGroups has an unknown key 'x'");
    bad_group("\"source\":\"torch\",", "", "field 'source' is absent, expected a text");
    bad_group("\"testGroups\"", "\"testGroup\"", "unknown key 'testGroup'");
    /* flags and notes */
    bad_group("\"notes\":{\"Ties\"", "\"notes\":{\"Tied\"", "tcId 1: flag 'Ties' has no note");
    bad_group("\"notes\":{", "\"notes\":{\"More\":{\"bugType\":\"b\",\"description\":\"d\"},",
              "note 'More' is of no test's flag");
    bad_group("\"bugType\":\"order\",", "", "note 'Ties': field 'bugType' is absent");
    bad_group("\"equal scores\"", "7", "note 'Ties': field 'description' is 7, expected a text");
    bad_group("\"effect\":\"e\"", "\"effect\":null", "note 'Ties': field 'effect' is null, expected a text");
    bad_group("\"effect\"", "\"effects\"", "note 'Ties': it has an unknown key 'effects'");
    bad_group("[\"l\"]", "[1]", "note 'Ties': field 'links' is [1], expected a list of texts");
    bad_group("[\"l\"]", "\"l\"", "note 'Ties': field 'links' is \"l\", expected a list of texts");
    bad_group("[\"Ties\"]", "[\"Ties\",\"Ties\"]",
              "tcId 1: field 'flags' is [\"Ties\",\"Ties\"], expected each text once");
    bad_group("[\"Ties\"]", "[\"\"]", "tcId 1: field 'flags' is [\"\"], expected a list of texts that are not empty");
    bad_group("[\"Ties\"]", "\"Ties\"", "tcId 1: field 'flags' is \"Ties\", expected a list");
    bad_group(
        "[\"Ties\"]",
        "[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"10\",\"11\",\"12\",\"13\",\"14\",\"15\",\"16\",\"17\"]",
        "expected a list of at most 16 texts");
    bad_group("\"flags\":[],", "", "tcId 3: field 'flags' is absent");
}

static void test_rules(void **state) {
    (void)state;
    bad_group("\"tcId\":1,", "\"tcId\":1,\"note\":\"\",", "the test has an unknown key 'note'");
    bad_group("\"tcId\":1,", "\"tcId\":2,", "field 'tcId' is 2, expected numbers that ascend from 1");
    bad_group("\"tcId\":1,", "\"tcId\":0,", "field 'tcId' is 0, expected an integer from 1");
    bad_group("\"tcId\":1,", "\"tcId\":1.0,", "field 'tcId' is 1.0, expected an integer from 1");
    bad_group("\"tcId\":3", "\"tcId\":1", "a test after tcId 1: field 'tcId' is 1, expected numbers that ascend");
    bad_group("\"comment\":\"\",", "", "tcId 1: field 'comment' is absent");
    bad_group("\"valid\"", "\"maybe\"",
              "tcId 1: field 'result' is \"maybe\", expected \"valid\", \"invalid\" or \"acceptable\"");
    bad_group("\"classes\"", "\"close\"",
              "tcId 1: field 'compare' is \"close\", expected \"bits\", \"bound\" or \"classes\"");
    bad_group(",\"compare\":\"classes\"", "", "tcId 1: field 'compare' is absent");
    bad_group("\"expected\":\"data/b.safetensors\",", "", "tcId 1: field 'expected' is absent");
    bad_group("\"compare\"", "\"refusal\":\"r\",\"compare\"",
              "tcId 1: field 'refusal' is \"r\", expected it only in an invalid test");
    bad_group("\"refusal\":\"K must be\"", "\"refusal\":\"\"",
              "tcId 3: field 'refusal' is \"\", expected a text that is not empty");
    bad_group(",\"refusal\":\"K must be\"", "", "tcId 3: field 'refusal' is absent");
    bad_group("\"refusal\"", "\"expected\":\"data/b.safetensors\",\"refusal\"",
              "tcId 3: field 'expected' is \"data/b.safetensors\", expected no such field in an invalid test");
    bad_group("\"refusal\"", "\"unchecked\":[\"y\"],\"refusal\"",
              "tcId 3: field 'unchecked' is [\"y\"], expected no such field in an invalid test");
    bad_group("\"classes\"", "\"classes\",\"unchecked\":\"y\"", "tcId 1: field 'unchecked' is \"y\", expected a list");
    /* case lines */
    bad_group("route E=8 K=2", "", "tcId 1: field 'case' is \"\", expected a text that is not empty");
    bad_group("route E=8 K=2", "route data=exact",
              "tcId 1: field 'case' has 'data=exact', expected no data, seed or mesh");
    bad_group("route E=8 K=2", "route E=8 seed=1", "'seed=1', expected no data, seed or mesh");
    bad_group("route E=8 K=2", "route mesh=one", "'mesh=one', expected no data, seed or mesh");
    bad_group("route E=8 K=2", " route", "tcId 1: field 'case' is ' route', expected a case line");
    bad_group("route E=8 K=2", "route\\nE=8", "expected a case line");
    bad_group("route E=8 K=2", "rout\\u00e9", "expected a case line");
}

static void path_rules(void **state) {
    (void)state;
    static const char *const bad[] = {"/data/b.safetensors",
                                      "../b.safetensors",
                                      "data/../b.safetensors",
                                      "data//b.safetensors",
                                      "data/./b.safetensors",
                                      "data/.b.safetensors",
                                      "data/b",
                                      "data/.safetensors",
                                      "groups/g.json",
                                      "data/b c.safetensors",
                                      "data/b\\\\c.safetensors",
                                      "data/b.safetensors/",
                                      "manifest.json",
                                      "data/b.safetensors\\u0001",
                                      ""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[128];
        bad_group("data/b.safetensors", bad[i], "tcId 1: field 'expected' is ");
        has("expected a path data/NAME.safetensors of the set");
        if (strcmp(bad[i], "groups/g.json") == 0)
            continue;
        bad_manifest("groups/g.json", bad[i], "files: the path '");
        has("is not taken, expected groups/NAME.json or data/NAME.safetensors");
        snprintf(text, sizeof text, "groups/%s.json", bad[i]);
        if (strchr(bad[i], '/'))
            bad_manifest("groups/g.json", text, "is not taken");
    }
    bad_group("\"prompt\":\"data/a.safetensors\",\"expected\"", "\"prompt\":\"/etc/a.safetensors\",\"expected\"",
              "tcId 1: field 'prompt' is \"/etc/a.safetensors\", expected a path");
}

static void manifest_rules(void **state) {
    (void)state;
    bad_manifest("expar.vectors/1", "expar.vectors/9",
                 "field 'schema' is \"expar.vectors/9\", expected \"expar.vectors/1\"");
    bad_manifest("{\"schema\"", "{\"date\":\"\",\"schema\"", "the manifest has an unknown key 'date'");
    bad_manifest("\"name\":\"core\"", "\"name\":[]", "field 'name' is [], expected a text");
    bad_manifest("\"version\":1", "\"version\":\"1\"", "field 'version' is \"1\", expected an integer from 1");
    bad_manifest("\"version\":2", "\"version\":0", "field 'version' is 0, expected an integer from 1");
    bad_manifest("\"python\"", "\"perl\"", "generator has an unknown key 'perl'");
    bad_manifest("{\"torch\":\"2\"}", "{\"torch\":2}", "field 'torch' is 2, expected a text");
    bad_manifest("{\"torch\":\"2\"}", "[]", "field 'packages' is [], expected an object of texts");
    bad_manifest("\"environment\":{}", "\"environment\":{\"A\":null}", "field 'A' is null, expected a text");
    bad_manifest("\"python\":\"3\"", "\"python\":3", "field 'python' is 3, expected a text");
    bad_manifest("\"seed\":0", "\"seed\":0.5", "field 'seed' is 0.5, expected an integer from 0");
    bad_manifest("\"seed\":0", "\"seed\":-1", "field 'seed' is -1, expected an integer from 0");
    bad_manifest("\"seed\":0", "\"seed\":9007199254740993", "field 'seed' is 9007199254740993, expected an integer");
    bad_manifest("\"tests\":2", "\"tests\":0", "field 'tests' is 0, expected an integer from 1");
    bad_manifest("\"tests\":2,", "", "field 'tests' is absent");
    bad_manifest("\"files\":{", "\"files\":[{", "dir/f.json:1:");
    bad_manifest("e3b0c4", "E3b0c4", "field 'groups/g.json' is \"E3b0c4");
    bad_manifest("52b855", "52b855g", "expected a SHA-256 of 64 lower-case hexadecimal digits");
    bad_manifest("e3b0c4", "e3b0c", "expected a SHA-256 of 64 lower-case hexadecimal digits");
}

/* ---- folders ---- */

static float four[4] = {1, 2, 3, 4};
static double bounds[4] = {0.5, 0, 0, 0};

static xp_vectors_test test_of(const char *prompt, const char *expected) {
    xp_vectors_test t;
    memset(&t, 0, sizeof t);
    t.group = "g";
    t.source = "torch";
    t.comment = "a comment";
    t.line = "cast T=4";
    t.prompt = prompt;
    t.expected = expected;
    t.compare = XP_VECTORS_BOUND;
    return t;
}

/* A set of two groups and three tests in folder/set. */
static void write_set(void) {
    const xp_safetensors_item in = {"in.x", xp_tensor_1d(four, XP_F32, 4)};
    const xp_safetensors_item out[] = {{"exp.y", xp_tensor_1d(four, XP_F32, 4)},
                                       {"bound.y", xp_tensor_1d(bounds, XP_F64, 4)}};
    const xp_vectors_note note = {"Ties", "order", "equal scores", "a wrong choice", "https://example.org"};
    char prompt[XP_PATH], expected[XP_PATH];
    xp_vectors_writer *w;
    assert_int_equal(xp_vectors_create(in_folder("set"), "core", "a test", 3, 7, &w), XP_OK);
    assert_int_equal(xp_vectors_put(w, "a.prompt", "cast", &in, 1, prompt), XP_OK);
    assert_string_equal(prompt, "data/a.prompt.safetensors");
    assert_int_equal(xp_vectors_put(w, "deep/a.expected", "cast", out, 2, expected), XP_OK);
    xp_vectors_test t = test_of(prompt, expected);
    t.flags = 1;
    t.flag[0] = "Ties";
    t.unchecked = 1;
    t.unchecks[0] = "z";
    assert_int_equal(xp_vectors_add(w, &t), XP_OK);
    t = test_of(prompt, NULL);
    t.source = "by hand";
    t.result = XP_VECTORS_INVALID;
    t.refusal = "T must be";
    assert_int_equal(xp_vectors_add(w, &t), XP_OK);
    assert_int_equal(xp_vectors_put_note(w, "g", &note), XP_OK);
    t = test_of(prompt, expected);
    t.group = "a";
    t.result = XP_VECTORS_ACCEPTABLE;
    t.compare = XP_VECTORS_BITS;
    assert_int_equal(xp_vectors_add(w, &t), XP_OK);
    if (xp_vectors_finish(w) != XP_OK)
        fail_msg("%s", xp_error_text());
    xp_vectors_writer_close(w);
}

static char *slurp(const char *path) {
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    char *text = calloc(1, 65536);
    assert_non_null(text);
    assert_true(fread(text, 1, 65535, f) > 0);
    fclose(f);
    return text;
}

static void put(const char *path, const char *text) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* Changes a file of the set: its text from..to, or its whole content when from is NULL. sum: the manifest follows. */
static void edit(const char *path, const char *from, const char *to, int sum) {
    char whole[256], before[65], after[65];
    snprintf(whole, sizeof whole, "%s/set/%s", folder, path);
    assert_int_equal(xp_file_sha256_in(in_folder("set"), path, before), XP_OK);
    char *old = from ? slurp(whole) : NULL, *new = from ? with(old, from, to) : NULL;
    put(whole, new ? new : to);
    free(old);
    free(new);
    assert_int_equal(xp_file_sha256_in(in_folder("set"), path, after), XP_OK);
    assert_string_not_equal(before, after);
    if (sum)
        edit("manifest.json", before, after, 0);
}

static void run(const char *command) {
    char line[600];
    snprintf(line, sizeof line, "cd %s && %s", folder, command);
    assert_int_equal(system(line), 0);
}

static int fresh(void **state) {
    (void)state;
    run("rm -rf set more");
    write_set();
    return 0;
}

static void refused(const char *why) {
    xp_vectors *v = (xp_vectors *)(void *)folder;
    const xp_status st = xp_vectors_open(in_folder("set"), &v);
    if (st == XP_OK)
        fail_msg("not refused: %s", why);
    assert_null(v);
    assert_true(st == XP_E_FORMAT || st == XP_E_IO);
    has(folder);
    has(why);
}

static void round_trip(void **state) {
    (void)state;
    xp_vectors *v;
    xp_vectors_note n;
    xp_safetensors *st;
    xp_tensor t;
    assert_int_equal(xp_vectors_open(in_folder("set/"), &v), XP_OK);
    assert_string_equal(xp_vectors_dir(v), in_folder("set"));
    assert_string_equal(xp_vectors_name(v), "core");
    assert_int_equal(xp_vectors_count(v), 3);
    const xp_vectors_test *a = xp_vectors_at(v, 0), *g = xp_vectors_at(v, 1), *bad = xp_vectors_at(v, 2);
    assert_string_equal(a->group, "a");
    assert_int_equal(a->id, 1);
    assert_int_equal(a->result, XP_VECTORS_ACCEPTABLE);
    assert_int_equal(a->compare, XP_VECTORS_BITS);
    assert_string_equal(g->group, "g");
    assert_string_equal(g->source, "torch");
    assert_int_equal(g->id, 1);
    assert_string_equal(g->comment, "a comment");
    assert_string_equal(g->line, "cast T=4");
    assert_string_equal(g->expected, "data/deep/a.expected.safetensors");
    assert_null(g->refusal);
    assert_int_equal(g->result, XP_VECTORS_VALID);
    assert_int_equal(g->compare, XP_VECTORS_BOUND);
    assert_int_equal(g->flags, 1);
    assert_string_equal(g->flag[0], "Ties");
    assert_int_equal(g->unchecked, 1);
    assert_string_equal(g->unchecks[0], "z");
    assert_string_equal(bad->source, "by hand");
    assert_int_equal(bad->id, 2);
    assert_int_equal(bad->result, XP_VECTORS_INVALID);
    assert_string_equal(bad->refusal, "T must be");
    assert_null(bad->expected);
    assert_int_equal(xp_vectors_note_of(v, g, "Ties", &n), XP_OK);
    assert_string_equal(n.bug_type, "order");
    assert_string_equal(n.description, "equal scores");
    assert_string_equal(n.effect, "a wrong choice");
    assert_string_equal(n.link, "https://example.org");
    assert_int_equal(xp_vectors_note_of(v, g, "Other", &n), XP_E_ARG);
    assert_int_equal(xp_vectors_prompt(v, g, &st), XP_OK);
    assert_string_equal(xp_safetensors_metadata(st, "expar.stage"), "cast");
    assert_int_equal(xp_safetensors_view(st, xp_safetensors_find(st, "in.x"), &t), XP_OK);
    assert_memory_equal(t.data, four, sizeof four);
    xp_safetensors_close(st);
    assert_int_equal(xp_vectors_expected(v, g, &st), XP_OK);
    assert_int_equal(xp_safetensors_count(st), 2);
    xp_safetensors_close(st);
    assert_int_equal(xp_vectors_expected(v, bad, &st), XP_E_ARG);
    has("tcId 2: an invalid test has no expected file");
    xp_vectors_close(v);
    xp_vectors_close(NULL);
    assert_string_equal(xp_vectors_result_name(XP_VECTORS_ACCEPTABLE), "acceptable");
    assert_string_equal(xp_vectors_compare_name(XP_VECTORS_CLASSES), "classes");
}

/* The same calls give the same bytes. */
static void same_bytes(void **state) {
    (void)state;
    run("mv set first");
    write_set();
    run("diff -r first set && rm -r first");
}

/* The manifest lists by path; a reader takes groups by name however they are listed. */
static void order_of_files(void **state) {
    (void)state;
    char *text = slurp(in_folder("set/manifest.json")), hex[65], line[128], tail[256];
    const char *const path[] = {"\"data/a.prompt", "\"data/deep/a.expected", "\"groups/a.json", "\"groups/g.json"};
    for (int i = 0; i < 4; i++) {
        assert_non_null(strstr(text, path[i]));
        assert_true(i == 0 || strstr(text, path[i - 1]) < strstr(text, path[i]));
    }
    free(text);
    xp_vectors *v;
    assert_int_equal(xp_file_sha256_in(in_folder("set"), "groups/a.json", hex), XP_OK);
    snprintf(line, sizeof line, "\"groups/a.json\": \"%s\",", hex);
    edit("manifest.json", line, "", 0);
    snprintf(tail, sizeof tail, "\"groups/a.json\": \"%s\"", hex);
    assert_int_equal(xp_file_sha256_in(in_folder("set"), "groups/g.json", hex), XP_OK);
    snprintf(line, sizeof line, "%s\"", hex);
    char both[400];
    snprintf(both, sizeof both, "%s, %s", line, tail);
    edit("manifest.json", line, both, 0);
    if (xp_vectors_open(in_folder("set"), &v) != XP_OK)
        fail_msg("%s", xp_error_text());
    assert_string_equal(xp_vectors_at(v, 0)->group, "a");
    assert_string_equal(xp_vectors_at(v, 1)->group, "g");
    xp_vectors_close(v);
}

static void every_flipped_bit_is_seen(void **state) {
    (void)state;
    static const char *const path[] = {"groups/a.json", "groups/g.json", "data/a.prompt.safetensors",
                                       "data/deep/a.expected.safetensors"};
    for (size_t i = 0; i < 4; i++) {
        char whole[256], why[160];
        snprintf(whole, sizeof whole, "%s/set/%s", folder, path[i]);
        snprintf(why, sizeof why, "/set/%s: SHA-256 is ", path[i]);
        FILE *f = fopen(whole, "r+b");
        assert_non_null(f);
        fseek(f, 0, SEEK_END);
        const long n = ftell(f);
        for (long at = 0; at < n; at += 29) {
            for (int undo = 0; undo < 2; undo++) {
                fseek(f, at, SEEK_SET);
                const int c = fgetc(f);
                fseek(f, at, SEEK_SET);
                fputc(c ^ 1 << at % 8, f);
                fflush(f);
                if (!undo) {
                    refused(why);
                    has("of manifest.json");
                }
            }
        }
        fclose(f);
    }
    xp_vectors *v;
    assert_int_equal(xp_vectors_open(in_folder("set"), &v), XP_OK);
    /* also after the set was opened */
    edit("data/a.prompt.safetensors", NULL, "changed", 0);
    xp_safetensors *st;
    assert_int_equal(xp_vectors_prompt(v, xp_vectors_at(v, 0), &st), XP_E_FORMAT);
    has("data/a.prompt.safetensors: SHA-256 is ");
    assert_null(st);
    xp_vectors_close(v);
}

/* The sums come first: a group that is no JSON is not even looked at when it is not the one that was listed. */
static void sums_come_first(void **state) {
    edit("groups/g.json", NULL, "no json", 0);
    refused("groups/g.json: SHA-256 is ");
    fresh(state);
    edit("groups/g.json", NULL, "no json", 1);
    refused("/set/groups/g.json:1:");
}

static void listed_and_there(void **state) {
    (void)state;
    run("mv set/data/a.prompt.safetensors kept");
    refused("set/data/a.prompt.safetensors: cannot open: No such file or directory (listed in manifest.json)");
    run("mv kept set/data/a.prompt.safetensors && echo x >set/data/more.safetensors");
    refused("set/data/more.safetensors: is not listed in");
    run("rm set/data/more.safetensors && echo x >set/README");
    refused("set/README: is not listed in");
    run("rm set/README && echo x >set/groups/.hidden");
    refused("set/groups/.hidden: is not listed in");
    run("rm set/groups/.hidden && mkdir -p set/1/2/3/4/5/6/7/8/9");
    refused("lies more than 8 folders deep");
    run("rm -r set/1 && rm set/manifest.json");
    refused("set/manifest.json: cannot open: ");
}

static void links_and_pipes(void **state) {
    (void)state;
    run("mv set/data/a.prompt.safetensors kept && ln -s ../../kept set/data/a.prompt.safetensors");
    refused("'a.prompt.safetensors' is a symbolic link, which is not followed");
    run("rm set/data/a.prompt.safetensors && mv kept set/data/a.prompt.safetensors && mv set/data/deep kept && ln -s ../../kept set/data/deep");
    refused("'deep' is a symbolic link, which is not followed");
    run("rm set/data/deep && mv kept set/data/deep && ln -s manifest.json set/link");
    refused("set/link: is a symbolic link, expected only regular files");
    run("rm set/link && mkfifo set/fifo");
    refused("set/fifo: is no regular file");
    run("rm set/fifo && mv set/manifest.json kept && ln -s ../kept set/manifest.json");
    refused("'manifest.json' is a symbolic link, which is not followed");
    run("rm set/manifest.json && mkfifo set/manifest.json");
    refused("is a FIFO, a socket or a device, expected a regular file");
    run("rm set/manifest.json && mv kept set/manifest.json");
    xp_vectors *v;
    assert_int_equal(xp_vectors_open(in_folder("set"), &v), XP_OK);
    xp_vectors_close(v);
}

static void between_files(void **state) {
    edit("manifest.json", "\"tests\": 3", "\"tests\": 4", 0);
    refused("set/manifest.json: field 'tests' is 4, but the groups hold 3");
    fresh(state);
    edit("groups/g.json", "\"name\": \"g\"", "\"name\": \"h\"", 1);
    refused("set/groups/g.json: field 'name' is \"h\", expected the file's name without .json");
    fresh(state);
    edit("groups/a.json", "data/deep/a.expected.safetensors", "data/other.safetensors", 1);
    refused("set/groups/a.json: tcId 1: data/other.safetensors is not listed in manifest.json");
    fresh(state);
    run("cp set/data/a.prompt.safetensors set/data/b.safetensors");
    char hex[65], line[256];
    assert_int_equal(xp_file_sha256_in(in_folder("set"), "data/b.safetensors", hex), XP_OK);
    snprintf(line, sizeof line, "\"files\": {\"data/b.safetensors\":\"%s\",", hex);
    edit("manifest.json", "\"files\": {", line, 0);
    refused("set/data/b.safetensors: no test names it");
    fresh(state);
    assert_int_equal(truncate(in_folder("set/manifest.json"), XP_VECTORS_MAX_JSON + 1), 0);
    refused("set/manifest.json: is 16777217 bytes, expected at most 16777216");
}

/* One expected or prompt file of other tensors or other metadata, in the set and hashed. */
static void tensors_refused(int prompt, const xp_safetensors_item *item, int64_t items, const xp_safetensors_text *text,
                            int64_t texts, const char *why) {
    const char *path = prompt ? "data/a.prompt.safetensors" : "data/deep/a.expected.safetensors";
    char whole[256], before[65], after[65];
    xp_vectors *v;
    xp_safetensors *st;
    snprintf(whole, sizeof whole, "%s/set/%s", folder, path);
    assert_int_equal(xp_file_sha256_in(in_folder("set"), path, before), XP_OK);
    assert_int_equal(xp_safetensors_write(whole, item, items, text, texts), XP_OK);
    assert_int_equal(xp_file_sha256_in(in_folder("set"), path, after), XP_OK);
    edit("manifest.json", before, after, 0);
    assert_int_equal(xp_vectors_open(in_folder("set"), &v), XP_OK);
    const xp_vectors_test *t = xp_vectors_at(v, 0);
    assert_int_equal(prompt ? xp_vectors_prompt(v, t, &st) : xp_vectors_expected(v, t, &st), XP_E_FORMAT);
    assert_null(st);
    has(path);
    has(why);
    xp_vectors_close(v);
}

static void tensor_rules(void **state) {
    (void)state;
    const xp_safetensors_text good[] = {{"expar.schema", "expar.tensors/1"}, {"expar.stage", "cast"}, {"format", "pt"}};
    const xp_safetensors_text schema[] = {{"expar.schema", "expar.tensors/2"}, {"expar.stage", "cast"}};
    const xp_safetensors_text stage[] = {{"expar.schema", "expar.tensors/1"}, {"expar.stage", "cas"}};
    const xp_safetensors_text longer[] = {{"expar.schema", "expar.tensors/1"}, {"expar.stage", "casts"}};
    const xp_safetensors_text more[] = {
        {"expar.schema", "expar.tensors/1"}, {"expar.stage", "cast"}, {"expar.ranks", "1"}};
    const xp_tensor x = xp_tensor_1d(four, XP_F32, 4), b = xp_tensor_1d(bounds, XP_F64, 4);
    const xp_safetensors_item in = {"in.x", x}, out = {"exp.x", x}, bare = {"in.", x}, other = {"x", x};
    const xp_safetensors_item lone = {"bound.y", b};
    const xp_safetensors_item shape[] = {{"exp.y", x}, {"bound.y", xp_tensor_1d(bounds, XP_F64, 3)}};
    const xp_safetensors_item rank[] = {{"exp.y", x}, {"bound.y", xp_tensor_2d(bounds, XP_F64, 4, 1)}};
    const xp_safetensors_item type[] = {{"exp.y", x}, {"bound.y", x}};
    tensors_refused(1, &in, 1, NULL, 0, "__metadata__: expar.schema is '', expected 'expar.tensors/1'");
    tensors_refused(1, &in, 1, schema, 2, "__metadata__: expar.schema is 'expar.tensors/2', expected");
    tensors_refused(1, &in, 1, stage, 2, "__metadata__: expar.stage is 'cas', expected 'cast' as in the case line");
    tensors_refused(1, &in, 1, longer, 2, "__metadata__: expar.stage is 'casts', expected 'cast' as in the case line");
    tensors_refused(1, &in, 1, good, 1, "__metadata__: expar.stage is '', expected 'cast'");
    tensors_refused(1, &in, 1, more, 3, "__metadata__ has an unknown key 'expar.ranks'");
    tensors_refused(1, &out, 1, good, 3, "tensor 'exp.x': the name is unknown, expected in.<operand>");
    tensors_refused(1, &bare, 1, good, 3, "tensor 'in.': the name is unknown, expected in.<operand>");
    tensors_refused(0, &in, 1, good, 3,
                    "tensor 'in.x': the name is unknown, expected exp.<operand> or bound.<operand>");
    tensors_refused(0, &other, 1, good, 3, "tensor 'x': the name is unknown");
    tensors_refused(0, &lone, 1, good, 3, "tensor 'bound.y': there is no 'exp.y'");
    tensors_refused(0, shape, 2, good, 3, "tensor 'bound.y': dtype is F64, expected F64 of the shape of 'exp.y'");
    tensors_refused(0, rank, 2, good, 3, "expected F64 of the shape of 'exp.y'");
    tensors_refused(0, type, 2, good, 3, "tensor 'bound.y': dtype is F32, expected F64 of the shape of 'exp.y'");
}

/* ---- several sets ---- */

static char seen[256];

static xp_status note_dir(const char *dir, void *arg) {
    (void)arg;
    snprintf(seen + strlen(seen), sizeof seen - strlen(seen), "%s ", dir + strlen(folder));
    return strstr(dir, "stop") ? XP_FAIL(XP_E_ARG, "stopped") : XP_OK;
}

static void each_set(void **state) {
    (void)state;
    seen[0] = '\0';
    run("mkdir -p more/b more/a/inner more/c more/z && cp set/manifest.json more/b && cp set/manifest.json more/a/inner && ln -s ../set more/link");
    assert_int_equal(xp_vectors_each(in_folder("set/"), note_dir, NULL), XP_OK);
    assert_int_equal(xp_vectors_each(in_folder("more"), note_dir, NULL), XP_OK);
    assert_string_equal(seen, "/set /more/a/inner /more/b ");
    assert_int_equal(xp_vectors_each(in_folder("more/c"), note_dir, NULL), XP_E_IO);
    has("more/c: no manifest.json in it, nor in a folder below it");
    assert_int_equal(xp_vectors_each(in_folder("none"), note_dir, NULL), XP_E_IO);
    has("none: cannot open the folder");
    run("mkdir more/aa_stop && cp set/manifest.json more/aa_stop");
    seen[0] = '\0';
    assert_int_equal(xp_vectors_each(in_folder("more"), note_dir, NULL), XP_E_ARG);
    assert_string_equal(seen, "/more/a/inner /more/aa_stop ");
}

/* ---- the writer ---- */

static void writer_refuses(void **state) {
    (void)state;
    xp_vectors_writer *w = (xp_vectors_writer *)(void *)folder;
    const xp_safetensors_item in = {"in.x", xp_tensor_1d(four, XP_F32, 4)};
    const xp_vectors_note bad = {"F", "b", "\xff", NULL, NULL};
    char path[XP_PATH];
    assert_int_equal(xp_vectors_create(in_folder("set"), "core", "t", 1, 0, &w), XP_E_ARG);
    has("set: holds a set already");
    assert_null(w);
    assert_int_equal(xp_vectors_create(in_folder("no/set"), "core", "t", 1, 0, &w), XP_E_IO);
    has("no/set: cannot make the folder");
    assert_int_equal(xp_vectors_create(in_folder("more"), "", "t", 1, 0, &w), XP_E_ARG);
    assert_int_equal(xp_vectors_create(in_folder("more"), "n", "t", 0, 0, &w), XP_E_ARG);
    assert_int_equal(xp_vectors_create(in_folder("more"), "n", "t", 1, -1, &w), XP_E_ARG);
    has("a seed from 0");
    assert_int_equal(xp_vectors_create(in_folder("more"), "n", "t", 1, 0, &w), XP_OK);
    assert_int_equal(xp_vectors_finish(w), XP_E_ARG);
    has("more: the set has no tests");
    assert_int_equal(xp_vectors_put(w, "../x", "cast", &in, 1, path), XP_E_ARG);
    has("the name '../x' is not taken");
    assert_int_equal(xp_vectors_put(w, "x", "cast", &in, 1, path), XP_OK);
    assert_int_equal(xp_vectors_put(w, "x", "cast", &in, 1, path), XP_E_ARG);
    has("more/data/x.safetensors is written twice");
    assert_int_equal(xp_vectors_put_note(w, "a/b", &bad), XP_E_ARG);
    has("group 'a/b': expected letters");
    assert_int_equal(xp_vectors_put_note(w, "g", &bad), XP_E_NOMEM);
    has("a text that is not UTF-8");
    xp_vectors_test t = test_of(path, NULL);
    assert_int_equal(xp_vectors_add(w, &t), XP_E_ARG);
    has("a test of group 'g': expected source");
    t.result = XP_VECTORS_INVALID;
    assert_int_equal(xp_vectors_add(w, &t), XP_E_ARG);
    has("and refusal but not expected");
    /* what the reader would refuse is no set */
    t = test_of(path, "data/not-there.safetensors");
    assert_int_equal(xp_vectors_add(w, &t), XP_OK);
    assert_int_equal(xp_vectors_finish(w), XP_E_FORMAT);
    has("data/not-there.safetensors is not listed in manifest.json");
    assert_int_equal(access(in_folder("more/manifest.json"), F_OK), -1);
    xp_vectors_writer_close(w);
    xp_vectors_writer_close(NULL);
}

/* A source that comes again gets ids that ascend in the file. */
static void sources_in_turn(void **state) {
    (void)state;
    const xp_safetensors_item in = {"in.x", xp_tensor_1d(four, XP_F32, 4)}, out = {"exp.x", in.tensor};
    char prompt[XP_PATH], expected[XP_PATH];
    xp_vectors_writer *w;
    xp_vectors *v;
    assert_int_equal(xp_vectors_create(in_folder("more"), "n", "t", 1, 0, &w), XP_OK);
    assert_int_equal(xp_vectors_put(w, "x", "cast", &in, 1, prompt), XP_OK);
    assert_int_equal(xp_vectors_put(w, "y", "cast", &out, 1, expected), XP_OK);
    xp_vectors_test t = test_of(prompt, expected);
    static const char *const source[] = {"a", "b", "a", "a"};
    for (int i = 0; i < 4; i++) {
        t.source = source[i];
        assert_int_equal(xp_vectors_add(w, &t), XP_OK);
    }
    assert_int_equal(xp_vectors_finish(w), XP_OK);
    xp_vectors_writer_close(w);
    assert_int_equal(xp_vectors_open(in_folder("more"), &v), XP_OK);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(xp_vectors_at(v, i)->id, i + 1);
        assert_string_equal(xp_vectors_at(v, i)->source, source[i]);
    }
    xp_vectors_close(v);
}

static int open_folder(void **state) {
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int close_folder(void **state) {
    (void)state;
    run("rm -rf set more");
    return rmdir(folder);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_texts),
        cmocka_unit_test(cut_texts),
        cmocka_unit_test(group_rules),
        cmocka_unit_test(test_rules),
        cmocka_unit_test(path_rules),
        cmocka_unit_test(manifest_rules),
        cmocka_unit_test_setup(round_trip, fresh),
        cmocka_unit_test_setup(same_bytes, fresh),
        cmocka_unit_test_setup(order_of_files, fresh),
        cmocka_unit_test_setup(every_flipped_bit_is_seen, fresh),
        cmocka_unit_test_setup(sums_come_first, fresh),
        cmocka_unit_test_setup(listed_and_there, fresh),
        cmocka_unit_test_setup(links_and_pipes, fresh),
        cmocka_unit_test_setup(between_files, fresh),
        cmocka_unit_test_setup(tensor_rules, fresh),
        cmocka_unit_test_setup(each_set, fresh),
        cmocka_unit_test_setup(writer_refuses, fresh),
        cmocka_unit_test_setup(sources_in_turn, fresh),
    };
    return cmocka_run_group_tests(tests, open_folder, close_folder);
}
