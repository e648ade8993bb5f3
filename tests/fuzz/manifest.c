/* The JSON files of vector sets, manifests and groups: the verdict depends on what the JSON says, not on how it is
 * written, and what is accepted keeps the rules that protect whoever opens the set.
 *
 * Both readers get every input. Of an accepted file no top-level field may be missing and none may be added. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "vectors.h"

static const char name[] = "set/fuzzed.json";

typedef xp_status (*reader)(const void *text, size_t bytes, const char *name);

static xp_status parse(reader read, const char *text, size_t bytes) {
    const xp_status st = read(text, bytes, name);
    if (st != XP_OK)
        fuzz_refused(st, XP_E_FORMAT, name, "");
    return st;
}

static xp_status parse_json(reader read, const json_t *root, size_t flags) {
    char *text = json_dumps(root, flags | JSON_ENCODE_ANY);
    FUZZ_CHECK(text != NULL, "jansson cannot write what it read");
    const xp_status st = parse(read, text, strlen(text));
    free(text);
    return st;
}

/* Without any one of its fields, or with one more, an accepted object is refused. */
static void check_fields(reader read, json_t *root) {
    const char *key;
    json_t *v, *copy = json_copy(root);
    json_object_foreach(root, key, v) {
        json_object_del(copy, key);
        FUZZ_CHECK(parse_json(read, copy, 0) != XP_OK, "accepted without '%s'", key);
        json_object_set(copy, key, v);
    }
    json_object_set_new(copy, "sha256", json_string(""));
    FUZZ_CHECK(parse_json(read, copy, 0) != XP_OK, "accepted with an unknown field");
    json_decref(copy);
}

/* A path of plain components, none of which leaves its folder or hides, below one of the two folders of a set. */
static void check_path(const char *path) {
    FUZZ_CHECK(strncmp(path, "groups/", 7) == 0 || strncmp(path, "data/", 5) == 0, "path '%s'", path);
    FUZZ_CHECK(!strstr(path, "/.") && !strstr(path, "//") && path[strlen(path) - 1] != '/', "path '%s'", path);
    for (const char *p = path; *p; p++)
        FUZZ_CHECK(*p > 0x20 && *p < 0x7f && !strchr("\\\"'$`*?~&;|<>(){}[]!#", *p), "path '%s'", path);
}

static void check_manifest(json_t *root) {
    const char *path;
    json_t *v;
    FUZZ_CHECK(json_integer_value(json_object_get(root, "tests")) >= 1, "a set of no tests");
    json_object_foreach(json_object_get(root, "files"), path, v) {
        const char *sum = json_string_value(v);
        check_path(path);
        FUZZ_CHECK(sum && strlen(sum) == 64 && strspn(sum, "0123456789abcdef") == 64, "'%s': no SHA-256", path);
    }
}

static void check_test(const json_t *test, json_t *notes, json_int_t *id) {
    const char *result = json_string_value(json_object_get(test, "result"));
    const json_t *flags = json_object_get(test, "flags");
    const json_int_t this_id = json_integer_value(json_object_get(test, "tcId"));
    FUZZ_CHECK(this_id > *id && (*id > 0 || this_id == 1), "tcId %lld after %lld", (long long)this_id, (long long)*id);
    *id = this_id;
    check_path(json_string_value(json_object_get(test, "prompt")));
    const int invalid = result && strcmp(result, "invalid") == 0;
    FUZZ_CHECK(invalid == !json_object_get(test, "expected"), "tcId %lld: %s", (long long)*id, result);
    FUZZ_CHECK(invalid == (json_object_get(test, "refusal") != NULL), "tcId %lld: %s", (long long)*id, result);
    if (!invalid)
        check_path(json_string_value(json_object_get(test, "expected")));
    for (size_t f = 0; f < json_array_size(flags); f++)
        FUZZ_CHECK(json_object_get(notes, json_string_value(json_array_get(flags, f))), "a flag without a note");
}

static void check_group(json_t *root) {
    const json_t *sources = json_object_get(root, "testGroups");
    json_int_t id = 0;
    for (size_t i = 0; i < json_array_size(sources); i++) {
        const json_t *tests = json_object_get(json_array_get(sources, i), "tests");
        for (size_t t = 0; t < json_array_size(tests); t++)
            check_test(json_array_get(tests, t), json_object_get(root, "notes"), &id);
    }
    FUZZ_CHECK(id >= 1, "a group of no tests");
}

static void check_reader(reader read, void (*check)(json_t *), json_t *root, const char *text, size_t bytes) {
    const xp_status st = parse(read, text, bytes);
    if (!root) {
        FUZZ_CHECK(st != XP_OK, "accepted, but no JSON");
        return;
    }
    FUZZ_CHECK(parse_json(read, root, JSON_INDENT(2) | JSON_ENSURE_ASCII) == st, "another verdict of the same JSON");
    FUZZ_CHECK(parse_json(read, root, JSON_SORT_KEYS | JSON_COMPACT) == st, "another verdict of the same JSON, sorted");
    if (st == XP_OK) {
        check(root);
        check_fields(read, root);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    char *text = malloc(bytes ? bytes : 1);
    FUZZ_CHECK(text != NULL, "%zu bytes", bytes);
    if (bytes)
        memcpy(text, data, bytes);
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, NULL);
    check_reader(xp_vectors_check_manifest, check_manifest, root, text, bytes);
    check_reader(xp_vectors_check_group, check_group, root, text, bytes);
    json_decref(root);
    free(text);
    return 0;
}
