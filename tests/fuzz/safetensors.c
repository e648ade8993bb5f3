/* Safetensors files: what is accepted keeps every rule of the format as a second reader (jansson and a few lines of
 * arithmetic) sees it, gives the bytes that lie in it, and is written again as canonical bytes.
 *
 * Canonical bytes read back to the same tensors and texts, and written once more are the same bytes. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fuzz.h"
#include "safetensors.h"

enum { MOST = 256 /* tensors or texts of a file that is written again */ };
static const char name[] = "fuzzed.safetensors";

/* The format's table of types (tensor.rs), in bits. */
static const struct {
    const char *spell;
    int bits;
} types[] = {{"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
             {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
             {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
             {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};

static int bits_of(const char *spell) {
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (strcmp(types[i].spell, spell) == 0)
            return types[i].bits;
    }
    return 0;
}

static json_int_t integer_at(const json_t *list, int64_t i) {
    const json_t *v = json_array_get(list, (size_t)i);
    FUZZ_CHECK(json_is_integer(v) && json_integer_value(v) >= 0, "place %lld holds no whole number", (long long)i);
    return json_integer_value(v);
}

/* One tensor against the header's JSON. */
static void check_tensor(const xp_safetensors *st, int64_t i, json_t *root) {
    const xp_safetensors_info *t = xp_safetensors_at(st, i);
    const json_t *v = json_object_get(root, t->name);
    const json_t *shape = json_object_get(v, "shape"), *offsets = json_object_get(v, "data_offsets");
    const char *spell = json_string_value(json_object_get(v, "dtype"));
    const int bits = bits_of(t->spell);
    double elements = 1.0; /* exact up to 2^53, and more than every file beyond */
    FUZZ_CHECK(json_object_size(v) == 3 && spell && json_is_array(shape) && json_is_array(offsets), "'%s'", t->name);
    FUZZ_CHECK(strcmp(spell, t->spell) == 0 && bits > 0, "'%s' is %s", t->name, t->spell);
    FUZZ_CHECK(strlen(t->name) <= XP_SAFETENSORS_MAX_NAME, "a name of %zu bytes", strlen(t->name));
    FUZZ_CHECK(xp_safetensors_find(st, t->name) == i, "'%s' is found as %lld, not %lld", t->name,
               (long long)xp_safetensors_find(st, t->name), (long long)i);
    FUZZ_CHECK((size_t)t->ndim == json_array_size(shape) && json_array_size(offsets) == 2, "'%s'", t->name);
    for (int64_t d = 0; d < t->ndim; d++) {
        FUZZ_CHECK(integer_at(shape, d) == t->dim[d], "'%s': dim %lld", t->name, (long long)d);
        elements *= (double)t->dim[d];
    }
    FUZZ_CHECK(integer_at(offsets, 0) == t->begin && integer_at(offsets, 1) == t->end, "'%s'", t->name);
    FUZZ_CHECK(elements * bits < (double)(t->end - t->begin) * 8 + 0.5 &&
                   elements * bits > (double)(t->end - t->begin) * 8 - 0.5,
               "'%s': %g elements of %d bits in %lld bytes", t->name, elements, bits, (long long)(t->end - t->begin));
    FUZZ_CHECK((double)t->count < elements + 0.5 && (double)t->count > elements - 0.5, "'%s'", t->name);
}

static void check_texts(const xp_safetensors *st, json_t *metadata) {
    const char *key, *text, *before = NULL;
    int64_t n = 0;
    for (; xp_safetensors_pair(st, n, &key, &text); n++) {
        const char *want = json_string_value(json_object_get(metadata, key));
        FUZZ_CHECK(want && strcmp(want, text) == 0, "metadata '%s' is '%s'", key, text);
        FUZZ_CHECK(xp_safetensors_metadata(st, key) == text, "metadata '%s' is not found", key);
        FUZZ_CHECK(!before || strcmp(before, key) < 0, "metadata '%s' before '%s'", before, key);
        before = key;
    }
    FUZZ_CHECK((size_t)n == json_object_size(metadata), "%lld texts", (long long)n);
}

/* The rules of the whole file. */
static void check_file(const xp_safetensors *st, const uint8_t *data, size_t bytes) {
    uint64_t n = 0;
    int64_t end = 0;
    FUZZ_CHECK(bytes >= 8, "%zu bytes", bytes);
    for (int i = 0; i < 8; i++)
        n |= (uint64_t)data[i] << (8 * i);
    FUZZ_CHECK(n <= 100000000 && n <= bytes - 8 && data[8] == '{', "header of %llu bytes", (unsigned long long)n);
    size_t object = (size_t)n;
    while (data[8 + object - 1] == ' ')
        object--;
    json_error_t e;
    json_t *root = json_loadb((const char *)data + 8, object, JSON_REJECT_DUPLICATES, &e);
    FUZZ_CHECK(json_is_object(root), "the header is no JSON object: %s", e.text);
    FUZZ_CHECK(data[8 + object - 1] == '}', "byte 0x%02x after the object", data[8 + object - 1]);
    json_t *metadata = json_object_get(root, "__metadata__");
    FUZZ_CHECK(!metadata || json_is_object(metadata), "__metadata__ is no object");
    check_texts(st, metadata);
    const int64_t tensors = xp_safetensors_count(st);
    FUZZ_CHECK((size_t)tensors + (metadata != NULL) == json_object_size(root), "%lld tensors", (long long)tensors);
    for (int64_t i = 0; i < tensors; i++) {
        check_tensor(st, i, root);
        FUZZ_CHECK(xp_safetensors_at(st, i)->begin == end, "tensor %lld begins at %lld, not %lld", (long long)i,
                   (long long)xp_safetensors_at(st, i)->begin, (long long)end);
        end = xp_safetensors_at(st, i)->end;
    }
    FUZZ_CHECK((uint64_t)end + 8 + n == bytes, "%lld bytes of data in a file of %zu", (long long)end, bytes);
    FUZZ_CHECK(xp_safetensors_find(st, "__metadata__") < 0, "__metadata__ is a tensor");
    json_decref(root);
}

/* Elements, were no dim 0: what the writer bounds, so that strides can be computed. */
static int is_vast(const xp_safetensors_info *t) {
    double elements = 1.0;
    for (int64_t d = 0; d < t->ndim; d++)
        elements *= t->dim[d] ? (double)t->dim[d] : 1.0;
    return elements > 0x1p56;
}

/* The tensors as items, their bytes compared with the file's; 0 when one is of a type or rank that xp_tensor has not,
 * or so vast (and empty) that the writer may refuse it. */
static int take_items(xp_safetensors *st, const uint8_t *tensors, xp_safetensors_item *item) {
    int all = 1;
    for (int64_t i = 0; i < xp_safetensors_count(st); i++) {
        const xp_safetensors_info *t = xp_safetensors_at(st, i);
        void *data;
        FUZZ_CHECK(xp_safetensors_data(st, i, &data) == XP_OK && data, "%s", xp_error_text());
        FUZZ_CHECK(!tensors || memcmp(data, tensors + t->begin, (size_t)(t->end - t->begin)) == 0, "'%s'", t->name);
        item[i].name = t->name;
        const xp_status status = xp_safetensors_view(st, i, &item[i].tensor);
        if (t->dtype == XP_NDTYPE || t->ndim > XP_MAXDIM) {
            fuzz_refused(status, XP_E_FORMAT, name, "");
            all = 0;
        } else {
            FUZZ_CHECK(status == XP_OK && item[i].tensor.data == data, "'%s': %s", t->name, xp_error_text());
            FUZZ_CHECK(xp_tensor_count(&item[i].tensor) == t->count, "'%s'", t->name);
            all = all && !is_vast(t);
        }
    }
    return all;
}

static const char *path(int which) {
    static char text[2][64];
    snprintf(text[which], sizeof text[which], "/tmp/expar-fuzz-%ld-%d", (long)getpid(), which);
    return text[which];
}

static xp_safetensors *write_again(xp_safetensors *st, const xp_safetensors_item *item, int which) {
    xp_safetensors_text text[MOST];
    xp_safetensors *again;
    int64_t texts = 0;
    while (xp_safetensors_pair(st, texts, &text[texts].key, &text[texts].value))
        texts++;
    FUZZ_CHECK(xp_safetensors_write(path(which), item, xp_safetensors_count(st), text, texts) == XP_OK, "%s",
               xp_error_text());
    FUZZ_CHECK(xp_safetensors_open(path(which), &again) == XP_OK, "%s", xp_error_text());
    return again;
}

static void check_same(xp_safetensors *a, const xp_safetensors_item *x, xp_safetensors *b) {
    const char *key, *text;
    FUZZ_CHECK(xp_safetensors_count(a) == xp_safetensors_count(b), "%lld tensors", (long long)xp_safetensors_count(b));
    for (int64_t i = 0; i < xp_safetensors_count(a); i++) {
        const xp_safetensors_info *t = xp_safetensors_at(a, i);
        const int64_t j = xp_safetensors_find(b, t->name);
        void *data;
        FUZZ_CHECK(j >= 0, "'%s' is not written", t->name);
        const xp_safetensors_info *u = xp_safetensors_at(b, j);
        FUZZ_CHECK(t->dtype == u->dtype && t->ndim == u->ndim && t->count == u->count, "'%s'", t->name);
        FUZZ_CHECK(t->ndim == 0 || memcmp(t->dim, u->dim, (size_t)t->ndim * sizeof *t->dim) == 0, "'%s'", t->name);
        FUZZ_CHECK(xp_safetensors_data(b, j, &data) == XP_OK, "%s", xp_error_text());
        FUZZ_CHECK(memcmp(x[i].tensor.data, data, (size_t)(t->end - t->begin)) == 0, "'%s'", t->name);
    }
    for (int64_t i = 0; xp_safetensors_pair(a, i, &key, &text); i++) {
        const char *got = xp_safetensors_metadata(b, key);
        FUZZ_CHECK(got && strcmp(got, text) == 0, "metadata '%s'", key);
    }
}

/* The file's bytes; the caller frees them. */
static uint8_t *load(const char *file, size_t *out) {
    FILE *f = fopen(file, "rb");
    FUZZ_CHECK(f && fseek(f, 0, SEEK_END) == 0, "%s", file);
    const long n = ftell(f);
    uint8_t *bytes = malloc((size_t)n + 1);
    FUZZ_CHECK(bytes && fseek(f, 0, SEEK_SET) == 0 && fread(bytes, 1, (size_t)n, f) == (size_t)n, "%s", file);
    fclose(f);
    *out = (size_t)n;
    return bytes;
}

static void check_round_trip(xp_safetensors *st, const xp_safetensors_item *item) {
    xp_safetensors_item again_item[MOST];
    size_t n[2];
    xp_safetensors *again = write_again(st, item, 0);
    check_same(st, item, again);
    uint8_t *first = load(path(0), &n[0]);
    FUZZ_CHECK(n[0] >= 8 && first[0] % 8 == 0, "a header of no whole number of 8 bytes");
    check_file(again, first, n[0]);
    FUZZ_CHECK(take_items(again, NULL, again_item), "'%s' cannot be written twice", path(0));
    xp_safetensors_close(write_again(again, again_item, 1));
    uint8_t *second = load(path(1), &n[1]);
    FUZZ_CHECK(n[0] == n[1] && memcmp(first, second, n[0]) == 0, "written twice, %zu and %zu bytes differ", n[0], n[1]);
    xp_safetensors_close(again);
    unlink(path(0));
    unlink(path(1));
    free(first);
    free(second);
}

static void check(const uint8_t *data, size_t bytes) {
    int mark;
    xp_safetensors *st = (xp_safetensors *)(void *)&mark; /* not NULL: a refusal must make it so */
    const xp_status status = xp_safetensors_parse(data, bytes, name, &st);
    if (status != XP_OK) {
        fuzz_refused(status, XP_E_FORMAT, name, "");
        FUZZ_CHECK(st == NULL, "refused, and something is handed out");
        return;
    }
    xp_safetensors_item item[MOST];
    const char *key, *text;
    check_file(st, data, bytes);
    if (xp_safetensors_count(st) <= MOST && !xp_safetensors_pair(st, MOST - 1, &key, &text)) {
        const size_t tensors = 8 + (size_t)data[0] + ((size_t)data[1] << 8) + ((size_t)data[2] << 16);
        if (take_items(st, data + tensors, item))
            check_round_trip(st, item);
    }
    xp_safetensors_close(st);
}

/* Once as it is, and once as a file that is all header: a length that is wrong would hide every rule behind it. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    check(data, bytes);
    if (bytes < 8)
        return 0;
    uint8_t *header = malloc(bytes);
    FUZZ_CHECK(header != NULL, "%zu bytes", bytes);
    memcpy(header, data, bytes);
    for (int i = 0; i < 8; i++)
        header[i] = (uint8_t)((uint64_t)(bytes - 8) >> (8 * i));
    check(header, bytes);
    free(header);
    return 0;
}
