/* Reads vector sets.
 *
 * The order is: the manifest, the SHA-256 of everything that it lists, what lies in the folder and is not listed, the
 * groups, and last the counts and uses between them. Every file is read through xp_file_load_in, which leaves no way
 * out of the folder, and hashed again from the bytes that are parsed. It must not run a case or know a stage's
 * operands. */
#include "vectors.h"

#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "file.h"
#include "hash.h"

enum { MAX_DEPTH = 8, MAX_LINE = 2048, WHERE = 640, GOT = 96 };

struct xp_vectors {
    char *dir;
    json_t *manifest, *files; /* files is the manifest's */
    json_t *groups;           /* by path, as parsed */
    xp_vectors_test *test;
    int64_t tests, cap;
};

static const char *const results[] = {"valid", "invalid", "acceptable"};
static const char *const compares[] = {"bits", "bound", "classes"};

const char *xp_vectors_result_name(xp_vectors_result r) {
    return results[r];
}

const char *xp_vectors_compare_name(xp_vectors_compare c) {
    return compares[c];
}

/* ---- JSON with places ---- */

/* A value as it stands in the file, cut to fit a message. */
static const char *show(const json_t *v, char *buf, size_t bytes) {
    char *text = v ? json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII) : NULL;
    snprintf(buf, bytes, "%s", text ? text : "absent");
    if (text && strlen(text) >= bytes)
        memcpy(buf + bytes - 4, "...", 4);
    free(text);
    return buf;
}

static xp_status wrong(const char *where, const char *key, const json_t *v, const char *want) {
    char got[GOT];
    return XP_FAIL(XP_E_FORMAT, "%s: field '%s' is %s, expected %s", where, key, show(v, got, sizeof got), want);
}

static xp_status parse_json(const void *text, size_t bytes, const char *name, json_t **out) {
    json_error_t e;
    *out = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &e);
    if (!*out)
        return XP_FAIL(XP_E_FORMAT, "%s:%d:%d: %s; expected one JSON object (RFC 8259, no duplicate keys)", name,
                       e.line, e.column, e.text);
    return XP_OK;
}

/* keys: names with '|' around each. */
static xp_status only_keys(const char *where, json_t *v, const char *what, const char *keys) {
    char got[GOT], bounded[GOT];
    const char *key;
    json_t *value;
    if (!json_is_object(v))
        return XP_FAIL(XP_E_FORMAT, "%s: %s is %s, expected an object", where, what, show(v, got, sizeof got));
    json_object_foreach(v, key, value) {
        snprintf(bounded, sizeof bounded, "|%s|", key);
        if (strlen(key) + 3 > sizeof bounded || strchr(key, '|') || !strstr(keys, bounded))
            return XP_FAIL(XP_E_FORMAT, "%s: %s has an unknown key '%.64s' (%s); known are %s", where, what, key,
                           show(value, got, sizeof got), keys);
    }
    return XP_OK;
}

static xp_status text_of(const char *where, const json_t *object, const char *key, const char **out) {
    const json_t *v = json_object_get(object, key);
    *out = json_string_value(v);
    return *out ? XP_OK : wrong(where, key, v, "a text");
}

static xp_status word_of(const char *where, const json_t *object, const char *key, const char **out) {
    XP_TRY(text_of(where, object, key, out));
    return **out ? XP_OK : wrong(where, key, json_object_get(object, key), "a text that is not empty");
}

static xp_status maybe_text_of(const char *where, const json_t *object, const char *key, const char **out) {
    *out = NULL;
    return json_object_get(object, key) ? text_of(where, object, key, out) : XP_OK;
}

static xp_status integer_of(const char *where, const json_t *object, const char *key, int64_t lo, int64_t *out) {
    const json_t *v = json_object_get(object, key);
    char want[64];
    snprintf(want, sizeof want, "an integer from %lld to 9007199254740992", (long long)lo);
    *out = json_integer_value(v);
    return json_is_integer(v) && *out >= lo && *out <= (int64_t)1 << 53 ? XP_OK : wrong(where, key, v, want);
}

/* The number of one of n names. */
static xp_status name_of(const char *where, const json_t *object, const char *key, const char *const *name, int n,
                         const char *want, int *out) {
    const json_t *v = json_object_get(object, key);
    const char *text = json_string_value(v);
    for (*out = 0; text && *out < n; ++*out) {
        if (strcmp(text, name[*out]) == 0)
            return XP_OK;
    }
    return wrong(where, key, v, want);
}

static xp_status words_of(const char *where, const json_t *object, const char *key, const char **out, int *out_n) {
    const json_t *v = json_object_get(object, key);
    *out_n = 0;
    if (!json_is_array(v) || json_array_size(v) > XP_VECTORS_WORDS)
        return wrong(where, key, v, "a list of at most 16 texts");
    for (size_t i = 0; i < json_array_size(v); i++) {
        const char *text = json_string_value(json_array_get(v, i));
        if (!text || !*text)
            return wrong(where, key, v, "a list of texts that are not empty");
        for (int j = 0; j < *out_n; j++) {
            if (strcmp(out[j], text) == 0)
                return wrong(where, key, v, "each text once");
        }
        out[(*out_n)++] = text;
    }
    return XP_OK;
}

static xp_status schema_of(const char *where, const json_t *root, const char *want) {
    char quoted[64];
    const char *text;
    XP_TRY(text_of(where, root, "schema", &text));
    snprintf(quoted, sizeof quoted, "\"%s\"", want);
    return strcmp(text, want) == 0 ? XP_OK : wrong(where, "schema", json_object_get(root, "schema"), quoted);
}

static int ends_in(const char *text, const char *end) {
    const size_t n = strlen(text), m = strlen(end);
    return n > m && strcmp(text + n - m, end) == 0;
}

/* ---- the manifest ---- */

static int is_group(const char *path) {
    return strncmp(path, "groups/", 7) == 0 && strlen(path) > 12 && ends_in(path, ".json") && !strchr(path + 7, '/');
}

static int is_data(const char *path) {
    return strncmp(path, "data/", 5) == 0 && strlen(path) > 17 && ends_in(path, ".safetensors");
}

static xp_status check_listed(const char *where, const char *path, const json_t *v) {
    const char *sum = json_string_value(v);
    if (strlen(path) >= XP_PATH || !xp_file_plain(path) || (!is_group(path) && !is_data(path)))
        return XP_FAIL(XP_E_FORMAT,
                       "%s: files: the path '%.200s' is not taken, expected groups/NAME.json or data/NAME.safetensors "
                       "with letters, digits and . _ - + in parts that do not begin with a dot",
                       where, path);
    if (!sum || strlen(sum) != 64 || strspn(sum, "0123456789abcdef") != 64)
        return wrong(where, path, v, "a SHA-256 of 64 lower-case hexadecimal digits");
    return XP_OK;
}

static xp_status check_texts(const char *where, json_t *object, const char *key) {
    json_t *v = json_object_get(object, key), *value;
    const char *name;
    if (v && !json_is_object(v))
        return wrong(where, key, v, "an object of texts");
    json_object_foreach(v, name, value) {
        if (!json_is_string(value))
            return wrong(where, name, value, "a text");
    }
    return XP_OK;
}

static xp_status check_generator(const char *where, json_t *v) {
    const char *text;
    int64_t n;
    XP_TRY(only_keys(where, v, "generator", "|name|version|packages|python|environment|seed|"));
    XP_TRY(word_of(where, v, "name", &text));
    XP_TRY(integer_of(where, v, "version", 1, &n));
    XP_TRY(check_texts(where, v, "packages"));
    XP_TRY(check_texts(where, v, "environment"));
    XP_TRY(maybe_text_of(where, v, "python", &text));
    return json_object_get(v, "seed") ? integer_of(where, v, "seed", 0, &n) : XP_OK;
}

static xp_status check_manifest(const char *where, json_t *root) {
    const char *path, *text;
    json_t *v;
    int64_t n;
    XP_TRY(only_keys(where, root, "the manifest", "|schema|name|version|generator|tests|files|"));
    XP_TRY(schema_of(where, root, XP_VECTORS_SCHEMA));
    XP_TRY(word_of(where, root, "name", &text));
    XP_TRY(integer_of(where, root, "version", 1, &n));
    XP_TRY(check_generator(where, json_object_get(root, "generator")));
    XP_TRY(integer_of(where, root, "tests", 1, &n));
    json_t *files = json_object_get(root, "files");
    if (!json_is_object(files))
        return wrong(where, "files", files, "an object: path to SHA-256");
    json_object_foreach(files, path, v) {
        XP_TRY(check_listed(where, path, v));
    }
    return XP_OK;
}

xp_status xp_vectors_check_manifest(const void *text, size_t bytes, const char *name) {
    json_t *root;
    XP_TRY(parse_json(text, bytes, name, &root));
    const xp_status st = check_manifest(name, root);
    json_decref(root);
    return st;
}

/* ---- a group ---- */

static xp_status check_line(const char *where, const char *line) {
    static const char *const kept[] = {"data=", "seed=", "mesh="};
    size_t n = strlen(line);
    int plain = n > 0 && n < MAX_LINE && *line != ' ';
    for (const char *p = line; *p; p++)
        plain &= *p >= 0x20 && *p < 0x7f;
    if (!plain)
        return XP_FAIL(XP_E_FORMAT,
                       "%s: field 'case' is '%.80s', expected a case line: a stage and its keys, printable "
                       "ASCII of at most %d bytes",
                       where, line, MAX_LINE - 1);
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        for (const char *p = line; (p = strchr(p, ' ')) != NULL;) {
            p++;
            if (strncmp(p, kept[i], 5) == 0)
                return XP_FAIL(XP_E_FORMAT,
                               "%s: field 'case' has '%.40s', expected no data, seed or mesh: the data is in the "
                               "files and the mesh is the reader's to choose",
                               where, p);
        }
    }
    return XP_OK;
}

static xp_status data_path_of(const char *where, const json_t *v, const char *key, const char **out) {
    XP_TRY(text_of(where, v, key, out));
    if (strlen(*out) >= XP_PATH || !xp_file_plain(*out) || !is_data(*out))
        return wrong(where, key, json_object_get(v, key), "a path data/NAME.safetensors of the set");
    return XP_OK;
}

/* What is there only with some results. */
static xp_status read_outcome(const char *where, const json_t *v, xp_vectors_test *t) {
    static const char *const outcome[] = {"expected", "unchecked"};
    int n;
    XP_TRY(name_of(where, v, "result", results, 3, "\"valid\", \"invalid\" or \"acceptable\"", &n));
    t->result = (xp_vectors_result)n;
    if (t->result != XP_VECTORS_INVALID || json_object_get(v, "compare")) {
        XP_TRY(name_of(where, v, "compare", compares, 3, "\"bits\", \"bound\" or \"classes\"", &n));
        t->compare = (xp_vectors_compare)n;
    }
    if (t->result == XP_VECTORS_INVALID) {
        for (int i = 0; i < 2; i++) {
            if (json_object_get(v, outcome[i]))
                return wrong(where, outcome[i], json_object_get(v, outcome[i]), "no such field in an invalid test");
        }
        return word_of(where, v, "refusal", &t->refusal);
    }
    if (json_object_get(v, "refusal"))
        return wrong(where, "refusal", json_object_get(v, "refusal"), "it only in an invalid test");
    XP_TRY(data_path_of(where, v, "expected", &t->expected));
    return json_object_get(v, "unchecked") ? words_of(where, v, "unchecked", t->unchecks, &t->unchecked) : XP_OK;
}

/* last_id: of the test before; 0 for the first. */
static xp_status read_test(const char *name, json_t *v, int64_t last_id, xp_vectors_test *t) {
    char where[WHERE], got[GOT];
    snprintf(where, sizeof where, "%.400s: a test after tcId %lld", name, (long long)last_id);
    XP_TRY(
        only_keys(where, v, "the test", "|tcId|comment|flags|result|case|prompt|expected|compare|refusal|unchecked|"));
    XP_TRY(integer_of(where, v, "tcId", 1, &t->id));
    if (t->id <= last_id || (last_id == 0 && t->id != 1))
        return XP_FAIL(XP_E_FORMAT, "%s: field 'tcId' is %s, expected numbers that ascend from 1", where,
                       show(json_object_get(v, "tcId"), got, sizeof got));
    snprintf(where, sizeof where, "%.400s: tcId %lld", name, (long long)t->id);
    XP_TRY(text_of(where, v, "comment", &t->comment));
    XP_TRY(words_of(where, v, "flags", t->flag, &t->flags));
    XP_TRY(word_of(where, v, "case", &t->line));
    XP_TRY(check_line(where, t->line));
    XP_TRY(data_path_of(where, v, "prompt", &t->prompt));
    return read_outcome(where, v, t);
}

static xp_status read_note(const char *where, const char *flag, json_t *v, xp_vectors_note *out) {
    char at[WHERE];
    memset(out, 0, sizeof *out);
    out->flag = flag;
    snprintf(at, sizeof at, "%.400s: note '%.64s'", where, flag);
    XP_TRY(only_keys(at, v, "it", "|bugType|description|effect|links|"));
    XP_TRY(word_of(at, v, "bugType", &out->bug_type));
    XP_TRY(word_of(at, v, "description", &out->description));
    XP_TRY(maybe_text_of(at, v, "effect", &out->effect));
    const json_t *links = json_object_get(v, "links");
    if (links && !json_is_array(links))
        return wrong(at, "links", links, "a list of texts");
    for (size_t i = 0; i < json_array_size(links); i++) {
        if (!json_is_string(json_array_get(links, i)))
            return wrong(at, "links", links, "a list of texts");
    }
    out->link = json_string_value(json_array_get(links, 0));
    return XP_OK;
}

/* Every flag has a note and every note is a flag's. */
static xp_status check_notes(const char *where, json_t *root, const xp_vectors_test *test, int64_t tests) {
    json_t *notes = json_object_get(root, "notes"), *v;
    const char *flag;
    xp_vectors_note note;
    if (!json_is_object(notes))
        return wrong(where, "notes", notes, "an object: flag to note");
    json_t *used = json_object(); /* its keys */
    xp_status st = used ? XP_OK : XP_FAIL(XP_E_NOMEM, "%s: no memory for its flags", where);
    for (int64_t i = 0; st == XP_OK && i < tests; i++) {
        for (int f = 0; st == XP_OK && f < test[i].flags; f++) {
            if (!json_object_get(notes, test[i].flag[f]))
                st = XP_FAIL(XP_E_FORMAT, "%s: tcId %lld: flag '%.64s' has no note", where, (long long)test[i].id,
                             test[i].flag[f]);
            else if (json_object_set_new(used, test[i].flag[f], json_true()) != 0)
                st = XP_FAIL(XP_E_NOMEM, "%s: no memory for its flags", where);
        }
    }
    json_object_foreach(notes, flag, v) {
        if (st == XP_OK)
            st = read_note(where, flag, v, &note);
        if (st == XP_OK && !json_object_get(used, flag))
            st = XP_FAIL(XP_E_FORMAT, "%s: note '%.64s' is of no test's flag", where, flag);
    }
    json_decref(used);
    return st;
}

static xp_status add_test(const char *where, json_t *v, const char *group, const char *source, int64_t last_id,
                          xp_vectors *out) {
    if (out->tests == out->cap) {
        const int64_t cap = out->cap ? out->cap * 2 : 64;
        xp_vectors_test *more = realloc(out->test, (size_t)cap * sizeof *more);
        if (!more)
            return XP_FAIL(XP_E_NOMEM, "%s: no memory for %lld tests", where, (long long)cap);
        out->test = more;
        out->cap = cap;
    }
    xp_vectors_test *t = &out->test[out->tests];
    memset(t, 0, sizeof *t);
    t->group = group;
    t->source = source;
    XP_TRY(read_test(where, v, last_id, t));
    out->tests++;
    return XP_OK;
}

static xp_status read_source(const char *where, json_t *v, const char *group, int64_t first, xp_vectors *out) {
    const char *source;
    XP_TRY(only_keys(where, v, "an element of testGroups", "|source|tests|"));
    XP_TRY(word_of(where, v, "source", &source));
    const json_t *tests = json_object_get(v, "tests");
    if (!json_is_array(tests) || json_array_size(tests) == 0)
        return wrong(where, "tests", tests, "a list of tests that is not empty");
    for (size_t i = 0; i < json_array_size(tests); i++)
        XP_TRY(add_test(where, json_array_get(tests, i), group, source,
                        out->tests > first ? out->test[out->tests - 1].id : 0, out));
    return XP_OK;
}

/* Appends the group's tests. */
static xp_status read_group(const char *where, json_t *root, xp_vectors *out) {
    const int64_t first = out->tests;
    const char *name;
    XP_TRY(only_keys(where, root, "the group", "|schema|name|notes|testGroups|"));
    XP_TRY(schema_of(where, root, XP_VECTORS_GROUP_SCHEMA));
    XP_TRY(word_of(where, root, "name", &name));
    const json_t *sources = json_object_get(root, "testGroups");
    if (!json_is_array(sources) || json_array_size(sources) == 0)
        return wrong(where, "testGroups", sources, "a list that is not empty");
    for (size_t i = 0; i < json_array_size(sources); i++)
        XP_TRY(read_source(where, json_array_get(sources, i), name, first, out));
    return check_notes(where, root, out->test + first, out->tests - first);
}

xp_status xp_vectors_check_group(const void *text, size_t bytes, const char *name) {
    xp_vectors v;
    json_t *root;
    memset(&v, 0, sizeof v);
    XP_TRY(parse_json(text, bytes, name, &root));
    const xp_status st = read_group(name, root, &v);
    free(v.test);
    json_decref(root);
    return st;
}

/* ---- the folder ---- */

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static void free_names(char **name, size_t names) {
    for (size_t i = 0; i < names; i++)
        free(name[i]);
    free(name);
}

/* The folder's entries but . and .., by name. */
static xp_status read_names(const char *dir, char ***out, size_t *out_names) {
    DIR *d = opendir(dir);
    size_t cap = 0;
    xp_status st = XP_OK;
    *out = NULL;
    *out_names = 0;
    if (!d)
        return XP_FAIL(XP_E_IO, "%s: cannot open the folder: %s", dir, strerror(errno));
    for (struct dirent *e; st == XP_OK && (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        if (*out_names == cap) {
            cap = cap ? cap * 2 : 64;
            char **more = realloc(*out, cap * sizeof *more);
            if (more)
                *out = more;
            else
                st = XP_FAIL(XP_E_NOMEM, "%s: no memory for %zu names", dir, cap);
        }
        char *copy = st == XP_OK ? malloc(strlen(e->d_name) + 1) : NULL;
        if (st == XP_OK && !copy)
            st = XP_FAIL(XP_E_NOMEM, "%s: no memory for a name", dir);
        if (copy)
            (*out)[(*out_names)++] = strcpy(copy, e->d_name);
    }
    closedir(d);
    if (*out_names)
        qsort(*out, *out_names, sizeof **out, by_text);
    if (st != XP_OK) {
        free_names(*out, *out_names);
        *out = NULL;
        *out_names = 0;
    }
    return st;
}

static xp_status join(const char *dir, const char *name, char *out, size_t bytes) {
    const int n = snprintf(out, bytes, "%s%s%s", dir, *dir ? "/" : "", name);
    return n >= 0 && (size_t)n < bytes ? XP_OK
                                       : XP_FAIL(XP_E_IO, "%.200s...: a path of more than %zu bytes", dir, bytes - 1);
}

static xp_status check_folder(const xp_vectors *v, const char *path, int depth);

static xp_status check_entry(const xp_vectors *v, const char *folder, const char *name, int depth) {
    char path[XP_PATH], whole[XP_PATH];
    struct stat s;
    XP_TRY(join(folder, name, path, sizeof path));
    XP_TRY(join(v->dir, path, whole, sizeof whole));
    if (lstat(whole, &s) != 0)
        return XP_FAIL(XP_E_IO, "%s: cannot examine", whole);
    if (S_ISDIR(s.st_mode))
        return check_folder(v, path, depth + 1);
    if (!S_ISREG(s.st_mode))
        return XP_FAIL(XP_E_FORMAT, "%s: is %s, expected only regular files in a set", whole,
                       S_ISLNK(s.st_mode) ? "a symbolic link" : "no regular file");
    if (strcmp(path, "manifest.json") != 0 && !json_object_get(v->files, path))
        return XP_FAIL(XP_E_FORMAT, "%s: is not listed in %s/manifest.json", whole, v->dir);
    return XP_OK;
}

/* Nothing lies below the folder that the manifest does not list. path: in the set, "" for the set itself. */
static xp_status check_folder(const xp_vectors *v, const char *path, int depth) {
    char whole[XP_PATH], **name;
    size_t names;
    XP_TRY(join(v->dir, path, whole, sizeof whole));
    if (depth > MAX_DEPTH)
        return XP_FAIL(XP_E_FORMAT, "%s: lies more than %d folders deep", whole, MAX_DEPTH);
    XP_TRY(read_names(whole, &name, &names));
    xp_status st = XP_OK;
    for (size_t i = 0; i < names && st == XP_OK; i++)
        st = check_entry(v, path, name[i], depth);
    free_names(name, names);
    return st;
}

static xp_status check_sum(const xp_vectors *v, const char *path, const char *got) {
    const char *want = json_string_value(json_object_get(v->files, path));
    if (!want)
        return XP_FAIL(XP_E_FORMAT, "%s/%s: is not listed in manifest.json", v->dir, path);
    if (strcmp(got, want) != 0)
        return XP_FAIL(XP_E_FORMAT, "%s/%s: SHA-256 is %s, expected %s of manifest.json", v->dir, path, got, want);
    return XP_OK;
}

/* sealed 0: a data file of another sum is left to whoever reads it. */
static xp_status check_sums(const xp_vectors *v, int sealed) {
    const char *path;
    char hex[65];
    json_t *sum;
    json_object_foreach(v->files, path, sum) {
        const xp_status st = xp_file_sha256_in(v->dir, path, hex);
        if (st != XP_OK)
            return XP_FAIL(st, "%s (listed in manifest.json)", xp_error_text());
        if (sealed || !is_data(path))
            XP_TRY(check_sum(v, path, hex));
    }
    return XP_OK;
}

/* A listed file's bytes, which are the ones that were hashed; damaged 1: of any sum. */
static xp_status load(const xp_vectors *v, const char *path, int64_t max, int damaged, void **out, size_t *out_bytes) {
    uint8_t digest[32];
    xp_sha256 sum;
    char hex[65];
    XP_TRY(xp_file_load_in(v->dir, path, max, out, out_bytes));
    if (damaged)
        return XP_OK;
    xp_sha256_begin(&sum);
    xp_sha256_add(&sum, *out, *out_bytes);
    xp_sha256_end(&sum, digest);
    xp_sha256_hex(digest, hex);
    const xp_status st = check_sum(v, path, hex);
    if (st != XP_OK) {
        free(*out);
        *out = NULL;
    }
    return st;
}

/* ---- the whole ---- */

static xp_status open_manifest(xp_vectors *v) {
    char name[XP_PATH];
    void *text;
    size_t bytes;
    XP_TRY(join(v->dir, "manifest.json", name, sizeof name));
    XP_TRY(xp_file_load_in(v->dir, "manifest.json", XP_VECTORS_MAX_JSON, &text, &bytes));
    xp_status st = parse_json(text, bytes, name, &v->manifest);
    free(text);
    if (st == XP_OK)
        st = check_manifest(name, v->manifest);
    if (st == XP_OK)
        v->files = json_object_get(v->manifest, "files");
    return st;
}

static xp_status open_group(xp_vectors *v, const char *path) {
    char where[XP_PATH], stem[XP_PATH];
    void *text;
    size_t bytes;
    json_t *root;
    XP_TRY(join(v->dir, path, where, sizeof where));
    XP_TRY(load(v, path, XP_VECTORS_MAX_JSON, 0, &text, &bytes));
    const xp_status st = parse_json(text, bytes, where, &root);
    free(text);
    XP_TRY(st);
    if (json_object_set_new(v->groups, path, root) != 0)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory", where);
    XP_TRY(read_group(where, root, v));
    snprintf(stem, sizeof stem, "%.*s", (int)(strlen(path) - 12), path + 7);
    return strcmp(json_string_value(json_object_get(root, "name")), stem) == 0
               ? XP_OK
               : wrong(where, "name", json_object_get(root, "name"), "the file's name without .json");
}

static xp_status open_groups(xp_vectors *v) {
    const size_t n = json_object_size(v->files);
    const char **path = malloc((n + 1) * sizeof *path), *key;
    size_t groups = 0;
    json_t *sum;
    xp_status st = XP_OK;
    v->groups = json_object();
    if (!path || !v->groups)
        st = XP_FAIL(XP_E_NOMEM, "%s: no memory for %zu paths", v->dir, n);
    if (st == XP_OK) {
        json_object_foreach(v->files, key, sum) {
            if (is_group(key))
                path[groups++] = key;
        }
        qsort(path, groups, sizeof *path, by_text);
    }
    for (size_t i = 0; i < groups && st == XP_OK; i++)
        st = open_group(v, path[i]);
    free(path);
    return st;
}

/* Every file that a test names is listed, every data file is named by one, and the count is the manifest's. */
static xp_status check_uses(const xp_vectors *v) {
    json_t *used = json_object(), *sum;
    const char *path;
    const int64_t want = json_integer_value(json_object_get(v->manifest, "tests"));
    xp_status st = XP_OK;
    if (!used)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory", v->dir);
    for (int64_t i = 0; i < v->tests && st == XP_OK; i++) {
        const xp_vectors_test *t = &v->test[i];
        const char *const named[] = {t->prompt, t->expected};
        for (int k = 0; k < 2 && st == XP_OK; k++) {
            if (!named[k])
                continue;
            if (!json_object_get(v->files, named[k]))
                st = XP_FAIL(XP_E_FORMAT, "%s/groups/%s.json: tcId %lld: %s is not listed in manifest.json", v->dir,
                             t->group, (long long)t->id, named[k]);
            else if (json_object_set_new(used, named[k], json_true()) != 0)
                st = XP_FAIL(XP_E_NOMEM, "%s: no memory", v->dir);
        }
    }
    if (st == XP_OK) {
        json_object_foreach(v->files, path, sum) {
            if (st == XP_OK && is_data(path) && !json_object_get(used, path))
                st = XP_FAIL(XP_E_FORMAT, "%s/%s: no test names it", v->dir, path);
        }
    }
    json_decref(used);
    if (st == XP_OK && v->tests != want)
        st = XP_FAIL(XP_E_FORMAT, "%s/manifest.json: field 'tests' is %lld, but the groups hold %lld", v->dir,
                     (long long)want, (long long)v->tests);
    return st;
}

static xp_status open_set(xp_vectors *v, int sealed) {
    XP_TRY(open_manifest(v));
    XP_TRY(check_sums(v, sealed));
    XP_TRY(check_folder(v, "", 0));
    XP_TRY(open_groups(v));
    return check_uses(v);
}

static xp_status open_dir(const char *dir, int sealed, xp_vectors **out) {
    xp_vectors *v = calloc(1, sizeof *v);
    *out = NULL;
    if (v)
        v->dir = malloc(strlen(dir) + 1);
    if (!v || !v->dir) {
        free(v);
        return XP_FAIL(XP_E_NOMEM, "%s: no memory", dir);
    }
    memcpy(v->dir, dir, strlen(dir) + 1);
    for (size_t n = strlen(dir); n > 1 && v->dir[n - 1] == '/'; n--)
        v->dir[n - 1] = '\0';
    const xp_status st = open_set(v, sealed);
    if (st != XP_OK) {
        xp_vectors_close(v);
        return st;
    }
    *out = v;
    return XP_OK;
}

xp_status xp_vectors_open(const char *dir, xp_vectors **out) {
    return open_dir(dir, 1, out);
}

xp_status xp_vectors_open_loose(const char *dir, xp_vectors **out) {
    return open_dir(dir, 0, out);
}

void xp_vectors_close(xp_vectors *v) {
    if (!v)
        return;
    json_decref(v->groups);
    json_decref(v->manifest);
    free(v->test);
    free(v->dir);
    free(v);
}

const char *xp_vectors_dir(const xp_vectors *v) {
    return v->dir;
}

const char *xp_vectors_name(const xp_vectors *v) {
    return json_string_value(json_object_get(v->manifest, "name"));
}

int64_t xp_vectors_count(const xp_vectors *v) {
    return v->tests;
}

const xp_vectors_test *xp_vectors_at(const xp_vectors *v, int64_t i) {
    return &v->test[i];
}

xp_status xp_vectors_note_of(const xp_vectors *v, const xp_vectors_test *t, const char *flag, xp_vectors_note *out) {
    char path[XP_PATH];
    snprintf(path, sizeof path, "groups/%s.json", t->group);
    json_t *note = json_object_get(json_object_get(json_object_get(v->groups, path), "notes"), flag);
    memset(out, 0, sizeof *out);
    if (!note)
        return XP_FAIL(XP_E_ARG, "%s/%s: flag '%.64s' has no note", v->dir, path, flag);
    return read_note(path, flag, note, out);
}

/* ---- tensors ---- */

static xp_status check_metadata(const char *where, const xp_safetensors *st, const char *line) {
    static const char known[] = "|expar.schema|expar.stage|expar.rank|expar.mesh|expar.global_shape|expar.slice|";
    const char *schema = xp_safetensors_metadata(st, "expar.schema"),
               *stage = xp_safetensors_metadata(st, "expar.stage");
    const char *key, *value;
    const size_t n = strcspn(line, " ");
    if (!schema || strcmp(schema, XP_VECTORS_TENSORS_SCHEMA) != 0)
        return XP_FAIL(XP_E_FORMAT, "%s: __metadata__: expar.schema is '%.64s', expected '%s'", where,
                       schema ? schema : "", XP_VECTORS_TENSORS_SCHEMA);
    if (!stage || strlen(stage) != n || strncmp(stage, line, n) != 0)
        return XP_FAIL(XP_E_FORMAT, "%s: __metadata__: expar.stage is '%.64s', expected '%.*s' as in the case line",
                       where, stage ? stage : "", (int)n, line);
    for (int64_t i = 0; xp_safetensors_pair(st, i, &key, &value); i++) {
        char bounded[64];
        snprintf(bounded, sizeof bounded, "|%.60s|", key);
        if (strncmp(key, "expar.", 6) == 0 && (strlen(key) > 60 || !strstr(known, bounded)))
            return XP_FAIL(XP_E_FORMAT, "%s: __metadata__ has an unknown key '%.64s'; known are %s", where, key, known);
    }
    return XP_OK;
}

/* bound.<operand> is F64 and has the shape of exp.<operand>. */
static xp_status check_bound(const char *where, const xp_safetensors *st, const xp_safetensors_info *bound) {
    char name[XP_SAFETENSORS_MAX_NAME + 8];
    snprintf(name, sizeof name, "exp.%s", bound->name + strlen("bound."));
    const int64_t i = xp_safetensors_find(st, name);
    if (i < 0)
        return XP_FAIL(XP_E_FORMAT, "%s: tensor '%.96s': there is no '%.96s'", where, bound->name, name);
    const xp_safetensors_info *t = xp_safetensors_at(st, i);
    int same = t->ndim == bound->ndim;
    for (int64_t d = 0; same && d < t->ndim; d++)
        same = t->dim[d] == bound->dim[d];
    if (!same || bound->dtype != XP_F64)
        return XP_FAIL(XP_E_FORMAT, "%s: tensor '%.96s': dtype is %s, expected F64 of the shape of '%.96s'", where,
                       bound->name, bound->spell, name);
    return XP_OK;
}

static xp_status check_names(const char *where, const xp_safetensors *st, int prompt) {
    for (int64_t i = 0; i < xp_safetensors_count(st); i++) {
        const xp_safetensors_info *t = xp_safetensors_at(st, i);
        const int in = strncmp(t->name, "in.", 3) == 0 && t->name[3];
        const int exp = strncmp(t->name, "exp.", 4) == 0 && t->name[4];
        const int bound = strncmp(t->name, "bound.", 6) == 0 && t->name[6];
        if (prompt ? !in : !(exp || bound))
            return XP_FAIL(XP_E_FORMAT, "%s: tensor '%.96s': the name is unknown, expected %s", where, t->name,
                           prompt ? "in.<operand>" : "exp.<operand> or bound.<operand>");
        if (bound)
            XP_TRY(check_bound(where, st, t));
    }
    return XP_OK;
}

static xp_status tensors(const xp_vectors *v, const xp_vectors_test *t, int prompt, int damaged, xp_safetensors **out) {
    const char *path = prompt ? t->prompt : t->expected;
    char where[XP_PATH];
    void *bytes;
    size_t n;
    *out = NULL;
    if (!path)
        return XP_FAIL(XP_E_ARG, "%s/groups/%s.json: tcId %lld: an invalid test has no expected file", v->dir, t->group,
                       (long long)t->id);
    XP_TRY(join(v->dir, path, where, sizeof where));
    XP_TRY(load(v, path, INT64_MAX - 1, damaged, &bytes, &n));
    XP_TRY(xp_safetensors_adopt(bytes, n, where, out));
    xp_status st = check_metadata(where, *out, t->line);
    if (st == XP_OK)
        st = check_names(where, *out, prompt);
    if (st != XP_OK) {
        xp_safetensors_close(*out);
        *out = NULL;
    }
    return st;
}

xp_status xp_vectors_prompt(const xp_vectors *v, const xp_vectors_test *t, xp_safetensors **out) {
    return tensors(v, t, 1, 0, out);
}

xp_status xp_vectors_expected(const xp_vectors *v, const xp_vectors_test *t, xp_safetensors **out) {
    return tensors(v, t, 0, 0, out);
}

xp_status xp_vectors_expected_damaged(const xp_vectors *v, const xp_vectors_test *t, xp_safetensors **out) {
    return tensors(v, t, 0, 1, out);
}

/* ---- several sets ---- */

static xp_status each(const char *dir, int depth, xp_vectors_fn fn, void *arg, int64_t *found) {
    char path[XP_PATH], **name;
    struct stat s;
    size_t names;
    XP_TRY(join(dir, "manifest.json", path, sizeof path));
    if (lstat(path, &s) == 0) {
        ++*found;
        return fn(dir, arg);
    }
    XP_TRY(read_names(dir, &name, &names));
    xp_status st = XP_OK;
    for (size_t i = 0; i < names && st == XP_OK && depth < MAX_DEPTH; i++) {
        st = join(dir, name[i], path, sizeof path);
        if (st == XP_OK && lstat(path, &s) == 0 && S_ISDIR(s.st_mode))
            st = each(path, depth + 1, fn, arg, found);
    }
    free_names(name, names);
    return st;
}

xp_status xp_vectors_each(const char *dir, xp_vectors_fn fn, void *arg) {
    char plain[XP_PATH] = "";
    int64_t found = 0;
    XP_TRY(join("", dir, plain, sizeof plain));
    for (size_t n = strlen(plain); n > 1 && plain[n - 1] == '/'; n--)
        plain[n - 1] = '\0';
    XP_TRY(each(plain, 0, fn, arg, &found));
    return found ? XP_OK : XP_FAIL(XP_E_IO, "%s: no manifest.json in it, nor in a folder below it", plain);
}
