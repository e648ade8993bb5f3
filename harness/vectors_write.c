/* Writes vector sets: what `expar gen` and --dump make.
 *
 * Tensors are written as they come, groups and manifest are kept in memory until the end; the manifest comes last, so a
 * folder that was left half-way is no set. The finished set is read back by the reader that everybody's sets must pass.
 * The same calls give the same bytes. It must not overwrite a set. */
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"
#include "vectors.h"

struct xp_vectors_writer {
    char *dir;
    json_t *manifest, *files, *groups; /* groups by name */
    int64_t tests;
};

static xp_status no_memory(const char *dir) {
    return XP_FAIL(XP_E_NOMEM, "%s: no memory, or a text that is not UTF-8", dir);
}

static xp_status join(const char *dir, const char *name, char *out, size_t bytes) {
    const int n = snprintf(out, bytes, "%s/%s", dir, name);
    return n >= 0 && (size_t)n < bytes ? XP_OK
                                       : XP_FAIL(XP_E_IO, "%.200s...: a path of more than %zu bytes", dir, bytes - 1);
}

static xp_status make_folder(const char *path) {
    struct stat s;
    if (mkdir(path, 0777) == 0 || (errno == EEXIST && stat(path, &s) == 0 && S_ISDIR(s.st_mode)))
        return XP_OK;
    char why[128];
    if (strerror_r(errno, why, sizeof why) != 0)
        snprintf(why, sizeof why, "error %d", errno);
    return XP_FAIL(XP_E_IO, "%s: cannot make the folder: %s", path, why);
}

/* Every folder of a path of the set. */
static xp_status make_folders(const char *dir, const char *path) {
    char whole[XP_PATH];
    XP_TRY(join(dir, path, whole, sizeof whole));
    for (char *p = whole + strlen(dir) + 1; (p = strchr(p, '/')) != NULL; *p++ = '/') {
        *p = '\0';
        XP_TRY(make_folder(whole));
    }
    return XP_OK;
}

static xp_status start(xp_vectors_writer *w, const char *name, const char *generator, int64_t version, int64_t seed) {
    char path[XP_PATH];
    struct stat s;
    w->files = json_object();
    w->groups = json_object();
    w->manifest = json_pack("{s:s,s:s,s:i,s:{s:s,s:I,s:I}}", "schema", XP_VECTORS_SCHEMA, "name", name, "version", 1,
                            "generator", "name", generator, "version", (json_int_t)version, "seed", (json_int_t)seed);
    if (!w->files || !w->groups || !w->manifest)
        return no_memory(w->dir);
    XP_TRY(make_folder(w->dir));
    XP_TRY(join(w->dir, "manifest.json", path, sizeof path));
    if (lstat(path, &s) == 0)
        return XP_FAIL(XP_E_ARG, "%s: holds a set already (manifest.json), expected a new folder", w->dir);
    return XP_OK;
}

xp_status xp_vectors_create(const char *dir, const char *name, const char *generator, int64_t version, int64_t seed,
                            xp_vectors_writer **out) {
    *out = NULL;
    if (!*dir || !*name || !*generator || version < 1 || seed < 0 || version > (int64_t)1 << 53 ||
        seed > (int64_t)1 << 53)
        return XP_FAIL(XP_E_ARG,
                       "vectors: dir '%.200s', name '%.64s', generator '%.64s' %lld, seed %lld: expected texts, a "
                       "version from 1 and a seed from 0 to 9007199254740992",
                       dir, name, generator, (long long)version, (long long)seed);
    xp_vectors_writer *w = calloc(1, sizeof *w);
    if (w)
        w->dir = malloc(strlen(dir) + 1);
    if (!w || !w->dir) {
        free(w);
        return no_memory(dir);
    }
    memcpy(w->dir, dir, strlen(dir) + 1);
    const xp_status st = start(w, name, generator, version, seed);
    if (st != XP_OK) {
        xp_vectors_writer_close(w);
        return st;
    }
    *out = w;
    return XP_OK;
}

void xp_vectors_writer_close(xp_vectors_writer *w) {
    if (!w)
        return;
    json_decref(w->files);
    json_decref(w->groups);
    json_decref(w->manifest);
    free(w->dir);
    free(w);
}

/* The file at path is the set's from now on. */
static xp_status list_file(xp_vectors_writer *w, const char *path) {
    char hex[65];
    XP_TRY(xp_file_sha256_in(w->dir, path, hex));
    return json_object_set_new(w->files, path, json_string(hex)) == 0 ? XP_OK : no_memory(w->dir);
}

xp_status xp_vectors_put(xp_vectors_writer *w, const char *stem, const char *stage, const xp_safetensors_item *item,
                         int64_t items, char *path) {
    const xp_safetensors_text text[] = {{"expar.schema", XP_VECTORS_TENSORS_SCHEMA}, {"expar.stage", stage}};
    char whole[XP_PATH];
    const int n = snprintf(path, XP_PATH, "data/%s.safetensors", stem);
    if (n < 0 || n >= XP_PATH || !xp_file_plain(path))
        return XP_FAIL(XP_E_ARG,
                       "%s: the name '%.200s' is not taken, expected letters, digits and . _ - + in parts that "
                       "do not begin with a dot",
                       w->dir, stem);
    if (json_object_get(w->files, path))
        return XP_FAIL(XP_E_ARG, "%s/%s is written twice", w->dir, path);
    XP_TRY(join(w->dir, path, whole, sizeof whole));
    XP_TRY(make_folders(w->dir, path));
    XP_TRY(xp_safetensors_write(whole, item, items, text, 2));
    return list_file(w, path);
}

/* ---- groups ---- */

/* The group's object, made when it is new; NULL when there is no memory. */
static json_t *group_of(xp_vectors_writer *w, const char *name) {
    json_t *group = json_object_get(w->groups, name);
    if (group)
        return group;
    group = json_pack("{s:s,s:s,s:{},s:[]}", "schema", XP_VECTORS_GROUP_SCHEMA, "name", name, "notes", "testGroups");
    return group && json_object_set_new(w->groups, name, group) == 0 ? group : NULL;
}

static xp_status check_group_name(const xp_vectors_writer *w, const char *name) {
    if (xp_file_plain(name) && !strchr(name, '/') && strlen(name) < 200)
        return XP_OK;
    return XP_FAIL(XP_E_ARG, "%s: group '%.64s': expected letters, digits and . _ - +, not a dot first", w->dir, name);
}

xp_status xp_vectors_put_note(xp_vectors_writer *w, const char *group, const xp_vectors_note *note) {
    XP_TRY(check_group_name(w, group));
    json_t *g = group_of(w, group);
    json_t *n = json_pack("{s:s,s:s}", "bugType", note->bug_type, "description", note->description);
    int bad = !g || !n;
    if (!bad && note->effect)
        bad |= json_object_set_new(n, "effect", json_string(note->effect)) != 0;
    if (!bad && note->link)
        bad |= json_object_set_new(n, "links", json_pack("[s]", note->link)) != 0;
    if (bad) {
        json_decref(n);
        return no_memory(w->dir);
    }
    return json_object_set_new(json_object_get(g, "notes"), note->flag, n) == 0 ? XP_OK : no_memory(w->dir);
}

static json_t *list_of(const char *const *word, int n) {
    json_t *list = json_array();
    for (int i = 0; list && i < n; i++) {
        if (json_array_append_new(list, json_string(word[i])) != 0) {
            json_decref(list);
            list = NULL;
        }
    }
    return list;
}

static json_t *test_of(const xp_vectors_test *t, int64_t id) {
    const int invalid = t->result == XP_VECTORS_INVALID;
    json_t *v = json_pack("{s:I,s:s,s:o,s:s,s:s,s:s}", "tcId", (json_int_t)id, "comment", t->comment, "flags",
                          list_of(t->flag, t->flags), "result", xp_vectors_result_name(t->result), "case", t->line,
                          "prompt", t->prompt);
    int bad = !v;
    if (!bad && invalid) {
        bad |= json_object_set_new(v, "refusal", json_string(t->refusal)) != 0;
    } else if (!bad) {
        bad |= json_object_set_new(v, "expected", json_string(t->expected)) != 0;
        bad |= json_object_set_new(v, "compare", json_string(xp_vectors_compare_name(t->compare))) != 0;
        if (t->unchecked)
            bad |= json_object_set_new(v, "unchecked", list_of(t->unchecks, t->unchecked)) != 0;
    }
    if (bad) {
        json_decref(v);
        return NULL;
    }
    return v;
}

/* The list of tests of the source, at the end of the group: a source that comes again gets a new one, so that the ids
 * ascend in the file. */
static json_t *tests_of(json_t *group, const char *source) {
    json_t *list = json_object_get(group, "testGroups");
    json_t *last = json_array_size(list) ? json_array_get(list, json_array_size(list) - 1) : NULL;
    if (last && strcmp(json_string_value(json_object_get(last, "source")), source) == 0)
        return json_object_get(last, "tests");
    last = json_pack("{s:s,s:[]}", "source", source, "tests");
    return last && json_array_append_new(list, last) == 0 ? json_object_get(last, "tests") : NULL;
}

static int64_t count_tests(const json_t *group) {
    const json_t *list = json_object_get(group, "testGroups");
    int64_t n = 0;
    for (size_t i = 0; i < json_array_size(list); i++)
        n += (int64_t)json_array_size(json_object_get(json_array_get(list, i), "tests"));
    return n;
}

xp_status xp_vectors_add(xp_vectors_writer *w, const xp_vectors_test *t) {
    const int invalid = t->result == XP_VECTORS_INVALID;
    XP_TRY(check_group_name(w, t->group));
    if (!t->source || !t->comment || !t->line || !t->prompt || (invalid ? !t->refusal || t->expected : !t->expected) ||
        t->flags > XP_VECTORS_WORDS || t->unchecked > XP_VECTORS_WORDS)
        return XP_FAIL(XP_E_ARG,
                       "%s: a test of group '%s': expected source, comment, line, prompt, at most %d flags, and %s",
                       w->dir, t->group, XP_VECTORS_WORDS, invalid ? "refusal but not expected" : "expected");
    json_t *group = group_of(w, t->group);
    json_t *test = group ? test_of(t, count_tests(group) + 1) : NULL;
    json_t *tests = test ? tests_of(group, t->source) : NULL;
    if (!tests) {
        json_decref(test);
        return no_memory(w->dir);
    }
    if (json_array_append_new(tests, test) != 0)
        return no_memory(w->dir);
    w->tests++;
    return XP_OK;
}

/* ---- the end ---- */

static xp_status write_json(const xp_vectors_writer *w, const char *path, const json_t *v) {
    char whole[XP_PATH];
    xp_file_out out;
    XP_TRY(join(w->dir, path, whole, sizeof whole));
    XP_TRY(make_folders(w->dir, path));
    XP_TRY(xp_file_create(whole, &out));
    if (json_dumpf(v, out.f, JSON_INDENT(1)) != 0) {
        xp_file_discard(&out);
        return XP_FAIL(XP_E_IO, "%s: cannot write", whole);
    }
    fputc('\n', out.f);
    return xp_file_keep(&out);
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The same pairs by ascending key. */
static json_t *sorted(json_t *object) {
    const char **key = malloc((json_object_size(object) + 1) * sizeof *key), *k;
    json_t *out = json_object(), *v;
    size_t n = 0;
    int bad = !key || !out;
    if (!bad) {
        json_object_foreach(object, k, v) {
            key[n++] = k;
        }
        qsort(key, n, sizeof *key, by_text);
        for (size_t i = 0; i < n; i++)
            bad |= json_object_set(out, key[i], json_object_get(object, key[i])) != 0;
    }
    free(key);
    if (bad) {
        json_decref(out);
        return NULL;
    }
    return out;
}

static xp_status write_groups(xp_vectors_writer *w) {
    const char *name;
    json_t *group;
    xp_status st = XP_OK;
    json_object_foreach(w->groups, name, group) {
        char path[XP_PATH];
        snprintf(path, sizeof path, "groups/%s.json", name);
        if (st == XP_OK)
            st = write_json(w, path, group);
        if (st == XP_OK)
            st = list_file(w, path);
    }
    return st;
}

xp_status xp_vectors_finish(xp_vectors_writer *w) {
    xp_vectors *back;
    char path[XP_PATH];
    if (w->tests == 0)
        return XP_FAIL(XP_E_ARG, "%s: the set has no tests", w->dir);
    XP_TRY(write_groups(w));
    json_t *files = sorted(w->files);
    if (!files || json_object_set_new(w->manifest, "tests", json_integer(w->tests)) != 0 ||
        json_object_set(w->manifest, "files", files) != 0) {
        json_decref(files);
        return no_memory(w->dir);
    }
    json_decref(files);
    XP_TRY(join(w->dir, "manifest.json", path, sizeof path));
    XP_TRY(write_json(w, "manifest.json", w->manifest));
    const xp_status st = xp_vectors_open(w->dir, &back);
    xp_vectors_close(back);
    if (st != XP_OK)
        unlink(path);
    return st;
}
