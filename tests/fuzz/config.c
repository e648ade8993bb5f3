/* config.json: what is accepted is a model that can be built, means the same however its JSON is written, and had no
 * silent default.
 *
 * The same object is written again by jansson (other blanks, other escapes, keys sorted) and must give the same model.
 * One key, chosen by the input, is taken away: then the file is refused, or says what it assumed, or the key was one
 * that nothing reads. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "fuzz.h"

static const char path[] = "folder/fuzzed.json";

/* Everything but the two lists of notes. */
static int same_model(const xp_model *a, const xp_model *b) {
    return strcmp(a->name, b->name) == 0 && strcmp(a->model_type, b->model_type) == 0 &&
           strcmp(a->torch_dtype, b->torch_dtype) == 0 && a->layers == b->layers &&
           memcmp(a->moe, b->moe, sizeof a->moe) == 0 && a->H == b->H && a->F == b->F && a->E == b->E && a->K == b->K &&
           a->S == b->S && a->dense_F == b->dense_F && a->vocab == b->vocab &&
           memcmp(&a->norm_eps, &b->norm_eps, sizeof a->norm_eps) == 0 && a->latent == b->latent &&
           a->around == b->around && memcmp(&a->expert_eps, &b->expert_eps, sizeof a->expert_eps) == 0 &&
           a->shrink == b->shrink && memcmp(&a->dialect, &b->dialect, sizeof a->dialect) == 0;
}

static void check_range(const char *name, int64_t v, int64_t lo, int64_t hi) {
    FUZZ_CHECK(v >= lo && v <= hi, "%s is %lld", name, (long long)v);
}

static void check_model(const xp_model *m) {
    check_range("layers", m->layers, 1, XP_MAX_LAYERS);
    check_range("H", m->H, 1, XP_MAX_WIDTH);
    check_range("F", m->F, 1, XP_MAX_WIDTH);
    check_range("S", m->S, 0, XP_MAX_WIDTH);
    check_range("dense_F", m->dense_F, 0, XP_MAX_WIDTH);
    check_range("E", m->E, 1, XP_MAX_EXPERTS);
    check_range("K", m->K, 1, m->E);
    check_range("vocab", m->vocab, 0, 2147483647);
    FUZZ_CHECK(m->norm_eps >= 0.0 && m->norm_eps <= 1.0, "norm_eps %g", m->norm_eps);
    FUZZ_CHECK(m->expert_eps > 0.0 && m->expert_eps <= 1.0, "expert_eps %g", m->expert_eps);
    check_range("latent", m->latent, 0, XP_MAX_WIDTH);
    check_range("around", m->around, 0, 127);
    FUZZ_CHECK(m->latent || !(m->around & XP_LATENT_NORM), "a norm of rows that are not there: %u", m->around);
    FUZZ_CHECK(m->S || !(m->around & (XP_SHARED_NORM | XP_SHARED_IN_NORM)), "of a shared expert: %u", m->around);
    FUZZ_CHECK(strcmp(m->name, "fuzzed") == 0 && m->model_type[0] && m->shrink == 1, "'%s'", m->name);
    FUZZ_CHECK(xp_model_moe_layers(m) >= 1, "%d layers, none a MoE block", m->layers);
    for (int i = 0; i < XP_MAX_LAYERS; i++)
        FUZZ_CHECK(m->moe[i] == 0 || (m->moe[i] == 1 && i < m->layers), "layer %d of %d: %d", i, m->layers, m->moe[i]);
    for (const char *p = m->unread; *p; p++)
        FUZZ_CHECK((unsigned char)*p >= 0x20 || *p == '\n', "byte 0x%02x in the unread names", (unsigned char)*p);
    FUZZ_CHECK(memchr(m->unread, '\0', sizeof m->unread) && memchr(m->assumed, '\0', sizeof m->assumed), "notes");
}

/* The whole of a parse: what it refuses must be refused well and leave nothing behind. */
static xp_status parse(const char *text, size_t bytes, xp_model *out) {
    static const xp_model nothing;
    memset(out, 0xa5, sizeof *out);
    const xp_status st = xp_config_parse(text, bytes, path, out);
    if (st != XP_OK) {
        fuzz_refused(st, XP_E_FORMAT, path, "");
        FUZZ_CHECK(memcmp(out, &nothing, sizeof *out) == 0, "refused, and something is left behind");
    }
    return st;
}

static xp_status parse_json(const json_t *root, size_t flags, xp_model *out) {
    char *text = json_dumps(root, flags);
    FUZZ_CHECK(text != NULL, "jansson cannot write what it read");
    const xp_status st = parse(text, strlen(text), out);
    free(text);
    return st;
}

/* How often the '\n'-separated list has that line. */
static int lines(const char *list, const char *line) {
    const size_t n = strlen(line);
    int found = 0;
    for (const char *p = list; p; p = strchr(p, '\n'), p = p ? p + 1 : NULL)
        found += strncmp(p, line, n) == 0 && (p[n] == '\0' || p[n] == '\n');
    return found;
}

/* A number that any change of the input changes (FNV-1a). */
static size_t choice(const uint8_t *data, size_t bytes) {
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < bytes; i++)
        h = (h ^ data[i]) * UINT64_C(0x100000001b3);
    return (size_t)(h >> 16);
}

/* Key number `which` of the file's object and of the objects in it, and the object that holds it. */
static json_t *pick(json_t *root, size_t which, const char **out_key) {
    const char *key, *inner;
    json_t *v, *w;
    json_object_foreach(root, key, v) {
        *out_key = key;
        if (which-- == 0)
            return root;
        json_object_foreach(v, inner, w) {
            *out_key = inner;
            if (which-- == 0)
                return v;
        }
    }
    return NULL;
}

static size_t keys_in(json_t *root) {
    const char *key;
    json_t *v;
    size_t n = json_object_size(root);
    json_object_foreach(root, key, v) {
        n += json_object_size(v);
    }
    return n;
}

static void check_without(json_t *root, size_t which, const xp_model *m) {
    static xp_model less;
    const char *key = NULL;
    json_t *copy = json_deep_copy(root), *holder = pick(copy, which % keys_in(root), &key);
    FUZZ_CHECK(holder && key, "key %zu", which % keys_in(root));
    char *name = fuzz_text((const uint8_t *)key, strlen(key));
    json_object_del(holder, name);
    if (parse_json(copy, 0, &less) == XP_OK) {
        const int was = lines(m->unread, name), is = lines(less.unread, name);
        const int told = strcmp(m->assumed, less.assumed) != 0;
        FUZZ_CHECK(same_model(m, &less) || (told && !was), "without '%s' it is another model, and nothing says so",
                   name);
        FUZZ_CHECK(is <= was, "'%s' is taken away and listed as unread", name);
    }
    free(name);
    json_decref(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    static xp_model m, again;
    char *text = malloc(bytes ? bytes : 1);
    FUZZ_CHECK(text != NULL, "%zu bytes", bytes);
    if (bytes)
        memcpy(text, data, bytes);
    if (parse(text, bytes, &m) == XP_OK) {
        check_model(&m);
        json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, NULL);
        FUZZ_CHECK(json_is_object(root), "accepted, but no JSON object");
        FUZZ_CHECK(parse_json(root, JSON_INDENT(3) | JSON_ENSURE_ASCII, &again) == XP_OK, "%s", xp_error_text());
        FUZZ_CHECK(memcmp(&m, &again, sizeof m) == 0, "another model when it is written otherwise");
        FUZZ_CHECK(parse_json(root, JSON_SORT_KEYS | JSON_COMPACT, &again) == XP_OK, "%s", xp_error_text());
        FUZZ_CHECK(same_model(&m, &again) && strcmp(m.assumed, again.assumed) == 0, "another model in another order");
        FUZZ_CHECK(strlen(m.unread) == strlen(again.unread), "'%s' and '%s'", m.unread, again.unread);
        check_without(root, choice(data, bytes), &m);
        json_decref(root);
    }
    free(text);
    return 0;
}
