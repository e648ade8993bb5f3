/* Reads and writes safetensors files.
 *
 * The header is parsed by hand: the order of the tensors, a number's spelling and a key given twice are all things that
 * the format has rules about and that a general JSON tree forgets. The grammar has three levels and no recursion. What
 * is allocated is bounded by the header's length, which is checked against the file's size first; no tensor's bytes are
 * read before the whole header has passed. It must not print or keep a tensor's dtype that it does not know. */
#include "safetensors.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "file.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors are read as they lie in the file, which is little-endian"
#endif

enum { SHOWN = 96 /* bytes of a name or a value that a message repeats */ };
static const int64_t largest = (int64_t)1 << 53; /* the largest integer that every JSON reader takes exactly */

/* safetensors' own list; files are written from its end. */
static const struct {
    const char *spell;
    int bits;
    xp_dtype ours;
} types[] = {
    {"BOOL", 8, XP_NDTYPE},
    {"F4", 4, XP_E2M1},
    {"F6_E2M3", 6, XP_NDTYPE},
    {"F6_E3M2", 6, XP_NDTYPE},
    {"U8", 8, XP_U8},
    {"I8", 8, XP_NDTYPE},
    {"F8_E5M2", 8, XP_E5M2},
    {"F8_E4M3", 8, XP_E4M3},
    {"F8_E8M0", 8, XP_E8M0},
    {"F8_E4M3FNUZ", 8, XP_E4M3FNUZ},
    {"F8_E5M2FNUZ", 8, XP_E5M2FNUZ},
    {"I16", 16, XP_NDTYPE},
    {"U16", 16, XP_NDTYPE},
    {"F16", 16, XP_F16},
    {"BF16", 16, XP_BF16},
    {"I32", 32, XP_I32},
    {"U32", 32, XP_NDTYPE},
    {"F32", 32, XP_F32},
    {"C64", 64, XP_NDTYPE},
    {"F64", 64, XP_F64},
    {"I64", 64, XP_I64},
    {"U64", 64, XP_U64},
};
enum { TYPES = sizeof types / sizeof *types };
static const char all_types[] = "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 "
                                "F16 BF16 I32 U32 F32 C64 F64 I64 U64";

typedef struct {
    xp_safetensors_info info;
    size_t dims_at; /* where its dims begin in the list: the list may still move */
    void *data;
} entry;

struct xp_safetensors {
    char *name;
    int fd; /* -1: bytes */
    const unsigned char *bytes;
    void *owned;
    int64_t data_at; /* of the file's first tensor byte */
    char *text;      /* every name and text, each with its zero */
    int64_t *dims;
    entry *tensor; /* by offset */
    int64_t tensors;
    entry **by_name;
    xp_safetensors_text *pair; /* by key */
    int64_t pairs;
};

/* ---- the scanner ---- */

typedef struct {
    xp_safetensors *st;
    const unsigned char *p; /* the header, n bytes */
    size_t n, at, text_used, dims_used, dims_cap;
    int64_t tensors_cap, pairs_cap;
    const char *tensor; /* whose value is being read; NULL: none */
    int has_metadata;
} scan;

/* "FILE: " or "FILE: tensor 'NAME': ". */
static const char *place(const scan *in, char *buf, size_t bytes) {
    if (in->tensor)
        snprintf(buf, bytes, "%.400s: tensor '%.*s'", in->st->name, SHOWN, in->tensor);
    else
        snprintf(buf, bytes, "%.400s", in->st->name);
    return buf;
}
enum { PLACE = 512 };

static xp_status expected(const scan *in, const char *what) {
    char where[PLACE], got[24];
    if (in->at >= in->n)
        snprintf(got, sizeof got, "the header's end");
    else if (in->p[in->at] >= 0x20 && in->p[in->at] < 0x7f)
        snprintf(got, sizeof got, "'%c'", in->p[in->at]);
    else
        snprintf(got, sizeof got, "byte 0x%02x", (unsigned)in->p[in->at]);
    return XP_FAIL(XP_E_FORMAT, "%s: header byte %zu: %s, expected %s", place(in, where, sizeof where), in->at, got,
                   what);
}

static xp_status refused(const scan *in, const char *what) {
    char where[PLACE];
    return XP_FAIL(XP_E_FORMAT, "%s: header byte %zu: before it stands %s, which is refused",
                   place(in, where, sizeof where), in->at, what);
}

static void skip_space(scan *in) {
    while (in->at < in->n && in->p[in->at] && strchr(" \t\n\r", in->p[in->at]))
        in->at++;
}

static int next_is(scan *in, char c) {
    skip_space(in);
    return in->at < in->n && in->p[in->at] == (unsigned char)c;
}

static xp_status take(scan *in, char c, const char *what) {
    if (!next_is(in, c))
        return expected(in, what);
    in->at++;
    return XP_OK;
}

/* After an element of a list or an object: 1 in *out_more when a ',' follows, 0 when `end` did. */
static xp_status take_more(scan *in, char end, const char *what, int *out_more) {
    *out_more = next_is(in, ',');
    if (*out_more) {
        in->at++;
        return XP_OK;
    }
    return take(in, end, what);
}

/* The bytes of the UTF-8 sequence at p (Unicode 15, table 3-7: no overlong form, no surrogate, up to U+10FFFF); 0 when
 * there is none. */
static size_t utf8_length(const unsigned char *p, size_t n) {
    const unsigned char c = p[0];
    const size_t length = c < 0x80                ? 1
                          : c >= 0xc2 && c < 0xe0 ? 2
                          : c >= 0xe0 && c < 0xf0 ? 3
                          : c >= 0xf0 && c < 0xf5 ? 4
                                                  : 0;
    if (length > n)
        return 0;
    for (size_t i = 1; i < length; i++) {
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    }
    if ((c == 0xe0 && p[1] < 0xa0) || (c == 0xed && p[1] > 0x9f) || (c == 0xf0 && p[1] < 0x90) ||
        (c == 0xf4 && p[1] > 0x8f))
        return 0;
    return length;
}

static size_t utf8_put(unsigned code, char *out) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    const size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = n - 1; i > 0; i--, code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)(lead[n] | code);
    return n;
}

/* The four digits of \uXXXX, at the first of them. */
static xp_status hex4(scan *in, unsigned *out) {
    *out = 0;
    for (int i = 0; i < 4; i++, in->at++) {
        static const char digits[] = "0123456789abcdef";
        const int c = in->at < in->n ? in->p[in->at] : 0;
        const char *d = c ? strchr(digits, c >= 'A' && c <= 'F' ? c + 32 : c) : NULL;
        if (!d)
            return expected(in, "four hexadecimal digits after \\u");
        *out = *out * 16 + (unsigned)(d - digits);
    }
    return XP_OK;
}

/* One escape, at the byte after the backslash, appended to out: at most 4 bytes, always fewer than it was written in.
 */
static xp_status escape(scan *in, char *out, size_t *out_bytes) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const int c = in->at < in->n ? in->p[in->at] : 0;
    const char *simple = c ? strchr(from, c) : NULL;
    unsigned code, low;
    if (simple) {
        in->at++;
        out[0] = to[simple - from];
        *out_bytes = 1;
        return XP_OK;
    }
    if (c != 'u')
        return expected(in, "one of \" \\ / b f n r t u after a backslash");
    in->at++;
    XP_TRY(hex4(in, &code));
    if (code == 0)
        return refused(in, "NUL (\\u0000) in a text");
    if (code >= 0xd800 && code < 0xe000) {
        if (code >= 0xdc00 || in->at + 1 >= in->n || in->p[in->at] != '\\' || in->p[in->at + 1] != 'u')
            return refused(in, "half of a surrogate pair");
        in->at += 2;
        XP_TRY(hex4(in, &low));
        if (low < 0xdc00 || low >= 0xe000)
            return refused(in, "the high half of a surrogate pair without its low half");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    *out_bytes = utf8_put(code, out);
    return XP_OK;
}

/* A JSON text, unescaped and terminated. Two quotes pay for the zero, so the header's length is room for all of them.
 */
static xp_status take_text(scan *in, const char *what, const char **out, size_t *out_bytes) {
    XP_TRY(take(in, '"', what));
    char *to = in->st->text + in->text_used;
    size_t used = 0, more = 0;
    while (in->at < in->n && in->p[in->at] != '"') {
        const unsigned char c = in->p[in->at];
        if (c < 0x20)
            return expected(in, "no control character in a text: they are written as \\u00XX");
        if (c == '\\') {
            in->at++;
            XP_TRY(escape(in, to + used, &more));
        } else {
            more = utf8_length(in->p + in->at, in->n - in->at);
            if (more == 0)
                return expected(in, "UTF-8");
            memcpy(to + used, in->p + in->at, more);
            in->at += more;
        }
        used += more;
    }
    XP_TRY(take(in, '"', "'\"' at the end of a text"));
    to[used] = '\0';
    in->text_used += used + 1;
    *out = to;
    *out_bytes = used;
    return XP_OK;
}

/* The value as it is written, cut for a message. */
static void show(const scan *in, size_t from, char *buf, size_t bytes) {
    size_t n = 0;
    while (from + n < in->n && n < 40 && !strchr(",]}: \t\n\r", in->p[from + n]))
        n++;
    snprintf(buf, bytes, "%.*s", (int)n, (const char *)in->p + from);
}

/* A whole number as digits alone, from 0 to 2^53. i: its place in the field's list. */
static xp_status take_integer(scan *in, const char *field, int64_t i, int64_t *out) {
    char where[PLACE], got[48];
    skip_space(in);
    const size_t from = in->at;
    int64_t v = 0;
    int digits = 0;
    for (; in->at < in->n && in->p[in->at] >= '0' && in->p[in->at] <= '9'; in->at++, digits++) {
        if (v <= largest)
            v = v * 10 + (in->p[in->at] - '0');
    }
    const int ends = in->at < in->n && in->p[in->at] && strchr(",] \t\n\r", in->p[in->at]) != NULL;
    if (digits > 0 && ends && v <= largest && !(digits > 1 && in->p[from] == '0')) {
        *out = v;
        return XP_OK;
    }
    show(in, from, got, sizeof got);
    return XP_FAIL(XP_E_FORMAT, "%s: %s[%lld] is %s, expected digits alone, a number from 0 to 9007199254740992",
                   place(in, where, sizeof where), field, (long long)i, got);
}

/* ---- lists that grow with what was read ---- */

static xp_status grow(const scan *in, void **list, int64_t used, int64_t *cap, size_t bytes) {
    if (used < *cap)
        return XP_OK;
    const int64_t want = *cap ? *cap * 2 : 16;
    void *more = realloc(*list, (size_t)want * bytes);
    if (!more)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory for %lld bytes of header", in->st->name,
                       (long long)want * (long long)bytes);
    *list = more;
    *cap = want;
    return XP_OK;
}

static xp_status add_dim(scan *in, int64_t v) {
    void *list = in->st->dims;
    int64_t cap = (int64_t)in->dims_cap;
    XP_TRY(grow(in, &list, (int64_t)in->dims_used, &cap, sizeof v));
    in->st->dims = list;
    in->dims_cap = (size_t)cap;
    in->st->dims[in->dims_used++] = v;
    return XP_OK;
}

/* ---- __metadata__ ---- */

static int by_key(const void *a, const void *b) {
    return strcmp(((const xp_safetensors_text *)a)->key, ((const xp_safetensors_text *)b)->key);
}

static xp_status take_pair(scan *in) {
    xp_safetensors *st = in->st;
    xp_safetensors_text pair;
    char what[SHOWN + 64];
    size_t bytes;
    XP_TRY(take_text(in, "a key of __metadata__ ('\"')", &pair.key, &bytes));
    XP_TRY(take(in, ':', "':' after a key of __metadata__"));
    snprintf(what, sizeof what, "a text ('\"') as the value of __metadata__'s '%.*s'", SHOWN, pair.key);
    XP_TRY(take_text(in, what, &pair.value, &bytes));
    void *list = st->pair;
    XP_TRY(grow(in, &list, st->pairs, &in->pairs_cap, sizeof pair));
    st->pair = list;
    st->pair[st->pairs++] = pair;
    return XP_OK;
}

static xp_status take_metadata(scan *in) {
    int more = 1;
    if (in->has_metadata)
        return XP_FAIL(XP_E_FORMAT, "%s: __metadata__ is given twice", in->st->name);
    in->has_metadata = 1;
    XP_TRY(take(in, '{', "'{' of __metadata__"));
    if (next_is(in, '}')) {
        in->at++;
        return XP_OK;
    }
    while (more) {
        XP_TRY(take_pair(in));
        XP_TRY(take_more(in, '}', "',' or '}' in __metadata__", &more));
    }
    qsort(in->st->pair, (size_t)in->st->pairs, sizeof *in->st->pair, by_key);
    for (int64_t i = 1; i < in->st->pairs; i++) {
        if (strcmp(in->st->pair[i - 1].key, in->st->pair[i].key) == 0)
            return XP_FAIL(XP_E_FORMAT, "%s: __metadata__: key '%.*s' is given twice", in->st->name, SHOWN,
                           in->st->pair[i].key);
    }
    return XP_OK;
}

/* ---- one tensor ---- */

static xp_status take_dtype(scan *in, xp_safetensors_info *t, int *out_bits) {
    char where[PLACE];
    const char *spell;
    size_t bytes;
    XP_TRY(take_text(in, "dtype, a text ('\"')", &spell, &bytes));
    for (int i = 0; i < TYPES; i++) {
        if (strcmp(types[i].spell, spell) == 0) {
            t->spell = types[i].spell;
            t->dtype = types[i].ours;
            *out_bits = types[i].bits;
            return XP_OK;
        }
    }
    return XP_FAIL(XP_E_FORMAT, "%s: dtype is '%.*s', expected one of %s", place(in, where, sizeof where), SHOWN, spell,
                   all_types);
}

static xp_status take_shape(scan *in, xp_safetensors_info *t) {
    int more = 1;
    XP_TRY(take(in, '[', "'[' of shape"));
    if (next_is(in, ']')) {
        in->at++;
        return XP_OK;
    }
    while (more) {
        int64_t v = 0;
        XP_TRY(take_integer(in, "shape", t->ndim, &v));
        XP_TRY(add_dim(in, v));
        t->ndim++;
        XP_TRY(take_more(in, ']', "',' or ']' in shape", &more));
    }
    return XP_OK;
}

static xp_status take_offsets(scan *in, xp_safetensors_info *t) {
    XP_TRY(take(in, '[', "'[' of data_offsets"));
    XP_TRY(take_integer(in, "data_offsets", 0, &t->begin));
    XP_TRY(take(in, ',', "',' between the two numbers of data_offsets"));
    XP_TRY(take_integer(in, "data_offsets", 1, &t->end));
    return take(in, ']', "']' after the two numbers of data_offsets");
}

/* The bytes that dtype and shape ask for. Zeros are left out of the overflow check's product, so that the strides of an
 * empty tensor can be computed too. */
static xp_status measure(const scan *in, const entry *e, int bits, int64_t *out_count, int64_t *out_bytes) {
    char where[PLACE];
    const int64_t *dim = in->st->dims + e->dims_at;
    int64_t room = INT64_MAX / bits, product = 1;
    int empty = 0;
    for (int64_t i = 0; i < e->info.ndim; i++) {
        empty |= dim[i] == 0;
        const int64_t d = dim[i] ? dim[i] : 1;
        if (d > room / product)
            return XP_FAIL(XP_E_FORMAT,
                           "%s: shape[%lld] is %lld: the product of the shape overflows, expected at most "
                           "%lld elements of %s",
                           place(in, where, sizeof where), (long long)i, (long long)dim[i], (long long)room,
                           e->info.spell);
        product *= d;
    }
    *out_count = empty ? 0 : product;
    if (*out_count * bits % 8 != 0)
        return XP_FAIL(XP_E_FORMAT, "%s: shape has %lld elements of %d bits (%s), expected a whole number of bytes",
                       place(in, where, sizeof where), (long long)*out_count, bits, e->info.spell);
    *out_bytes = *out_count * bits / 8;
    return XP_OK;
}

static xp_status check_tensor(const scan *in, entry *e, int bits, int64_t data_bytes) {
    char where[PLACE];
    xp_safetensors_info *t = &e->info;
    int64_t bytes = 0;
    XP_TRY(measure(in, e, bits, &t->count, &bytes));
    if (t->end < t->begin)
        return XP_FAIL(XP_E_FORMAT, "%s: data_offsets are [%lld,%lld], expected an end that is not before the begin",
                       place(in, where, sizeof where), (long long)t->begin, (long long)t->end);
    if (t->end - t->begin != bytes)
        return XP_FAIL(XP_E_FORMAT,
                       "%s: data_offsets are [%lld,%lld], %lld bytes, expected %lld for %lld elements of %s",
                       place(in, where, sizeof where), (long long)t->begin, (long long)t->end,
                       (long long)(t->end - t->begin), (long long)bytes, (long long)t->count, t->spell);
    if (t->end > data_bytes)
        return XP_FAIL(XP_E_FORMAT, "%s: data_offsets are [%lld,%lld], but %lld bytes follow the header",
                       place(in, where, sizeof where), (long long)t->begin, (long long)t->end, (long long)data_bytes);
    return XP_OK;
}

/* The three fields, each once, in any order. */
static xp_status take_fields(scan *in, entry *e, int *out_bits) {
    static const char *const field[] = {"dtype", "shape", "data_offsets"};
    char where[PLACE];
    unsigned seen = 0;
    int more = 1;
    XP_TRY(take(in, '{', "'{' of a tensor's dtype, shape and data_offsets"));
    while (more) {
        const char *key;
        size_t bytes;
        unsigned f = 0;
        XP_TRY(take_text(in, "a field's name ('\"'): dtype, shape or data_offsets", &key, &bytes));
        while (f < 3 && strcmp(field[f], key) != 0)
            f++;
        if (f == 3 || (seen & (1u << f)))
            return XP_FAIL(XP_E_FORMAT, "%s: field '%.*s' is %s, expected dtype, shape and data_offsets, each once",
                           place(in, where, sizeof where), SHOWN, key, f == 3 ? "unknown" : "given twice");
        seen |= 1u << f;
        XP_TRY(take(in, ':', "':' after a field's name"));
        XP_TRY(f == 0   ? take_dtype(in, &e->info, out_bits)
               : f == 1 ? take_shape(in, &e->info)
                        : take_offsets(in, &e->info));
        XP_TRY(take_more(in, '}', "',' or '}' in a tensor", &more));
    }
    for (unsigned f = 0; f < 3; f++) {
        if (!(seen & (1u << f)))
            return XP_FAIL(XP_E_FORMAT, "%s: no field '%s'", place(in, where, sizeof where), field[f]);
    }
    return XP_OK;
}

static xp_status take_tensor(scan *in, const char *name, size_t name_bytes, int64_t data_bytes) {
    xp_safetensors *st = in->st;
    entry e;
    int bits = 8;
    memset(&e, 0, sizeof e);
    if (name_bytes > XP_SAFETENSORS_MAX_NAME)
        return XP_FAIL(XP_E_FORMAT, "%s: the name of tensor '%.*s...' has %zu bytes, expected at most %d", st->name,
                       SHOWN, name, name_bytes, XP_SAFETENSORS_MAX_NAME);
    if (st->tensors == XP_SAFETENSORS_MAX_TENSORS)
        return XP_FAIL(XP_E_FORMAT, "%s: tensor '%.*s' is one more than the %d that are taken", st->name, SHOWN, name,
                       XP_SAFETENSORS_MAX_TENSORS);
    e.info.name = name;
    e.dims_at = in->dims_used;
    in->tensor = name;
    XP_TRY(take_fields(in, &e, &bits));
    XP_TRY(check_tensor(in, &e, bits, data_bytes));
    in->tensor = NULL;
    void *list = st->tensor;
    XP_TRY(grow(in, &list, st->tensors, &in->tensors_cap, sizeof e));
    st->tensor = list;
    st->tensor[st->tensors++] = e;
    return XP_OK;
}

/* ---- the header ---- */

static xp_status take_header(scan *in, int64_t data_bytes) {
    int more = 1;
    if (in->n == 0 || in->p[0] != '{')
        return expected(in, "'{': the header begins with its object, with no space or byte order mark before it");
    in->at = 1;
    if (next_is(in, '}')) {
        in->at++;
        more = 0;
    }
    while (more) {
        const char *key;
        size_t bytes;
        XP_TRY(take_text(in, "the name of a tensor ('\"')", &key, &bytes));
        XP_TRY(take(in, ':', "':' after a tensor's name"));
        if (strcmp(key, "__metadata__") == 0)
            XP_TRY(take_metadata(in));
        else
            XP_TRY(take_tensor(in, key, bytes, data_bytes));
        XP_TRY(take_more(in, '}', "',' or '}' after a tensor", &more));
    }
    while (in->at < in->n && in->p[in->at] == ' ')
        in->at++;
    return in->at == in->n ? XP_OK : expected(in, "nothing but spaces after the object");
}

static int by_offset(const void *a, const void *b) {
    const xp_safetensors_info *x = &((const entry *)a)->info, *y = &((const entry *)b)->info;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end)
        return x->end < y->end ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(entry *const *)a)->info.name, (*(entry *const *)b)->info.name);
}

static xp_status check_names(xp_safetensors *st) {
    st->by_name = malloc(((size_t)st->tensors + 1) * sizeof(entry *));
    if (!st->by_name)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory for %lld names", st->name, (long long)st->tensors);
    for (int64_t i = 0; i < st->tensors; i++)
        st->by_name[i] = &st->tensor[i];
    qsort(st->by_name, (size_t)st->tensors, sizeof *st->by_name, by_name);
    for (int64_t i = 1; i < st->tensors; i++) {
        const char *name = st->by_name[i]->info.name;
        if (strcmp(st->by_name[i - 1]->info.name, name) == 0)
            return XP_FAIL(XP_E_FORMAT, "%s: tensor '%.*s' is given twice", st->name, SHOWN, name);
    }
    return XP_OK;
}

/* The tensors in order of offset cover the data: no hole, no overlap, nothing after the last. */
static xp_status check_cover(const xp_safetensors *st, int64_t data_bytes) {
    int64_t end = 0;
    const char *before = "the header";
    for (int64_t i = 0; i < st->tensors; i++) {
        const xp_safetensors_info *t = &st->tensor[i].info;
        if (t->begin != end)
            return XP_FAIL(XP_E_FORMAT,
                           "%s: tensor '%.*s': data_offsets are [%lld,%lld], expected to begin at %lld where '%.*s' "
                           "ends (%s)",
                           st->name, SHOWN, t->name, (long long)t->begin, (long long)t->end, (long long)end, SHOWN,
                           before, t->begin > end ? "no holes" : "no overlap");
        end = t->end;
        before = t->name;
    }
    if (end != data_bytes)
        return XP_FAIL(XP_E_FORMAT,
                       "%s: %lld bytes follow the header, expected %lld, where the last tensor '%.*s' ends", st->name,
                       (long long)data_bytes, (long long)end, SHOWN, before);
    return XP_OK;
}

/* header: the bytes after the length, n of them, in a file of file_bytes. */
static xp_status read_header(xp_safetensors *st, const unsigned char *header, size_t n, int64_t file_bytes) {
    scan in = {.st = st, .p = header, .n = n};
    const int64_t data_bytes = file_bytes - 8 - (int64_t)n;
    st->data_at = 8 + (int64_t)n;
    st->text = malloc(n + 1);
    /* Never NULL: the dims of a scalar are none, but they are somewhere. */
    in.dims_cap = 16;
    st->dims = malloc(in.dims_cap * sizeof *st->dims);
    if (!st->text || !st->dims)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory for %zu bytes of header", st->name, n);
    XP_TRY(take_header(&in, data_bytes));
    for (int64_t i = 0; i < st->tensors; i++)
        st->tensor[i].info.dim = st->dims + st->tensor[i].dims_at;
    if (st->tensors)
        qsort(st->tensor, (size_t)st->tensors, sizeof *st->tensor, by_offset);
    XP_TRY(check_names(st));
    return check_cover(st, data_bytes);
}

/* The header's length, checked against the file's. */
static xp_status read_length(const char *name, const unsigned char first[8], int64_t file_bytes, size_t *out) {
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--)
        n = n << 8 | first[i];
    if (n > XP_SAFETENSORS_MAX_HEADER)
        return XP_FAIL(XP_E_FORMAT, "%s: header length is %llu, expected at most %d", name, (unsigned long long)n,
                       XP_SAFETENSORS_MAX_HEADER);
    if ((int64_t)n > file_bytes - 8)
        return XP_FAIL(XP_E_FORMAT, "%s: header length is %llu, but %lld bytes follow it", name, (unsigned long long)n,
                       (long long)(file_bytes - 8));
    *out = (size_t)n;
    return XP_OK;
}

static xp_status too_short(const char *name, int64_t bytes) {
    return XP_FAIL(XP_E_FORMAT, "%s: is %lld bytes, expected at least the 8 of the header's length", name,
                   (long long)bytes);
}

static xp_status create(const char *name, xp_safetensors **out) {
    *out = calloc(1, sizeof **out);
    char *copy = malloc(strlen(name) + 1);
    if (!*out || !copy) {
        free(*out);
        free(copy);
        *out = NULL;
        return XP_FAIL(XP_E_NOMEM, "%s: no memory", name);
    }
    memcpy(copy, name, strlen(name) + 1);
    (*out)->name = copy;
    (*out)->fd = -1;
    return XP_OK;
}

/* Hands the error up with nothing left behind. */
static xp_status finish(xp_status st, xp_safetensors **out) {
    if (st != XP_OK) {
        xp_safetensors_close(*out);
        *out = NULL;
    }
    return st;
}

/* ---- opening and asking ---- */

static xp_status open_header(xp_safetensors *st, int64_t file_bytes) {
    unsigned char first[8];
    size_t n;
    if (file_bytes < 8)
        return too_short(st->name, file_bytes);
    XP_TRY(xp_file_read(st->name, st->fd, 0, first, sizeof first));
    XP_TRY(read_length(st->name, first, file_bytes, &n));
    unsigned char *header = malloc(n + 1);
    if (!header)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory for %zu bytes of header", st->name, n);
    xp_status status = xp_file_read(st->name, st->fd, 8, header, n);
    if (status == XP_OK)
        status = read_header(st, header, n, file_bytes);
    free(header);
    return status;
}

xp_status xp_safetensors_open(const char *path, xp_safetensors **out) {
    int fd;
    int64_t bytes;
    *out = NULL;
    XP_TRY(xp_file_open(path, &fd, &bytes));
    const xp_status st = create(path, out);
    if (st != XP_OK) {
        close(fd);
        return st;
    }
    (*out)->fd = fd;
    return finish(open_header(*out, bytes), out);
}

static xp_status parse(xp_safetensors *st, size_t n) {
    size_t header;
    if (n < 8)
        return too_short(st->name, (int64_t)n);
    XP_TRY(read_length(st->name, st->bytes, (int64_t)n, &header));
    return read_header(st, st->bytes + 8, header, (int64_t)n);
}

xp_status xp_safetensors_parse(const void *bytes, size_t n, const char *name, xp_safetensors **out) {
    XP_TRY(create(name, out));
    (*out)->bytes = bytes;
    return finish(parse(*out, n), out);
}

xp_status xp_safetensors_adopt(void *bytes, size_t n, const char *name, xp_safetensors **out) {
    const xp_status st = create(name, out);
    if (st != XP_OK) {
        free(bytes);
        return st;
    }
    (*out)->bytes = (*out)->owned = bytes;
    return finish(parse(*out, n), out);
}

void xp_safetensors_close(xp_safetensors *st) {
    if (!st)
        return;
    for (int64_t i = 0; i < st->tensors; i++)
        free(st->tensor[i].data);
    if (st->fd >= 0)
        close(st->fd);
    free(st->owned);
    free(st->pair);
    free(st->by_name);
    free(st->tensor);
    free(st->dims);
    free(st->text);
    free(st->name);
    free(st);
}

int64_t xp_safetensors_count(const xp_safetensors *st) {
    return st->tensors;
}

const xp_safetensors_info *xp_safetensors_at(const xp_safetensors *st, int64_t i) {
    return &st->tensor[i].info;
}

int64_t xp_safetensors_find(const xp_safetensors *st, const char *name) {
    int64_t lo = 0, hi = st->tensors;
    while (lo < hi) {
        const int64_t mid = lo + (hi - lo) / 2;
        const int c = strcmp(name, st->by_name[mid]->info.name);
        if (c == 0)
            return st->by_name[mid] - st->tensor;
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return -1;
}

int xp_safetensors_pair(const xp_safetensors *st, int64_t i, const char **out_key, const char **out_value) {
    if (i < 0 || i >= st->pairs)
        return 0;
    *out_key = st->pair[i].key;
    *out_value = st->pair[i].value;
    return 1;
}

const char *xp_safetensors_metadata(const xp_safetensors *st, const char *key) {
    const xp_safetensors_text want = {key, NULL};
    const xp_safetensors_text *pair =
        st->pairs ? bsearch(&want, st->pair, (size_t)st->pairs, sizeof want, by_key) : NULL;
    return pair ? pair->value : NULL;
}

xp_status xp_safetensors_data(xp_safetensors *st, int64_t i, void **out) {
    entry *e = &st->tensor[i];
    const size_t bytes = (size_t)(e->info.end - e->info.begin);
    const int64_t at = st->data_at + e->info.begin;
    *out = e->data;
    if (e->data)
        return XP_OK;
    void *data = malloc(bytes ? bytes : 1);
    if (!data)
        return XP_FAIL(XP_E_NOMEM, "%s: tensor '%.*s': no memory for %zu bytes", st->name, SHOWN, e->info.name, bytes);
    if (st->bytes && bytes) {
        memcpy(data, st->bytes + at, bytes);
    } else if (bytes) {
        const xp_status status = xp_file_read(st->name, st->fd, at, data, bytes);
        if (status != XP_OK) {
            free(data);
            return status;
        }
    }
    *out = e->data = data;
    return XP_OK;
}

void xp_safetensors_forget(xp_safetensors *st, int64_t i) {
    free(st->tensor[i].data);
    st->tensor[i].data = NULL;
}

xp_status xp_safetensors_view(xp_safetensors *st, int64_t i, xp_tensor *out) {
    const xp_safetensors_info *t = &st->tensor[i].info;
    void *data;
    memset(out, 0, sizeof *out);
    if (t->dtype == XP_NDTYPE)
        return XP_FAIL(XP_E_FORMAT,
                       "%s: tensor '%.*s': dtype is %s, expected one of F64 F32 BF16 F16 F8_E4M3 F8_E5M2 F8_E4M3FNUZ "
                       "F8_E5M2FNUZ F8_E8M0 F4 I64 I32 U64 U8",
                       st->name, SHOWN, t->name, t->spell);
    if (t->ndim > XP_MAXDIM)
        return XP_FAIL(XP_E_FORMAT, "%s: tensor '%.*s': shape has %lld dimensions, expected at most %d", st->name,
                       SHOWN, t->name, (long long)t->ndim, XP_MAXDIM);
    XP_TRY(xp_safetensors_data(st, i, &data));
    *out = xp_tensor_of(data, t->dtype, (int)t->ndim, t->dim);
    return XP_OK;
}

/* ---- the writer ---- */

static int rank_of(xp_dtype d) {
    for (int i = 0; i < TYPES; i++) {
        if (types[i].ours == d)
            return i;
    }
    return -1;
}

static int by_canon(const void *a, const void *b) {
    const xp_safetensors_item *x = *(const xp_safetensors_item *const *)a, *y = *(const xp_safetensors_item *const *)b;
    const int rx = rank_of(x->tensor.dtype), ry = rank_of(y->tensor.dtype);
    return rx != ry ? ry - rx : strcmp(x->name, y->name);
}

static int by_item_name(const void *a, const void *b) {
    return strcmp((*(const xp_safetensors_item *const *)a)->name, (*(const xp_safetensors_item *const *)b)->name);
}

static int is_utf8(const char *text) {
    const unsigned char *p = (const unsigned char *)text;
    size_t left = strlen(text);
    while (left) {
        const size_t n = utf8_length(p, left);
        if (n == 0)
            return 0;
        p += n;
        left -= n;
    }
    return 1;
}

static xp_status check_item(const xp_safetensors_item *x) {
    const xp_tensor *t = &x->tensor;
    if (!is_utf8(x->name) || strlen(x->name) > XP_SAFETENSORS_MAX_NAME || strcmp(x->name, "__metadata__") == 0)
        return XP_FAIL(XP_E_ARG,
                       "tensor '%.*s': the name has %zu bytes, expected UTF-8 of at most %d and not "
                       "__metadata__",
                       SHOWN, x->name, strlen(x->name), XP_SAFETENSORS_MAX_NAME);
    if (!t->data || t->mem == XP_CUDA)
        return XP_FAIL(XP_E_ARG, "tensor '%.*s': %s, expected host memory", SHOWN, x->name,
                       t->data ? "lies on a device" : "has no data");
    if ((unsigned)t->dtype >= XP_NDTYPE || t->ndim < 0 || t->ndim > XP_MAXDIM)
        return XP_FAIL(XP_E_ARG, "tensor '%.*s': dtype %d, %d dimensions, expected a dtype and at most %d", SHOWN,
                       x->name, (int)t->dtype, t->ndim, XP_MAXDIM);
    int64_t room = INT64_MAX / 64; /* elements of any dtype */
    for (int d = 0; d < t->ndim; d++) {
        if (t->dim[d] < 0 || t->dim[d] > largest || t->dim[d] > room)
            return XP_FAIL(XP_E_ARG,
                           "tensor '%.*s': dim %d is %lld, expected 0 to 9007199254740992 and a product below 2^57",
                           SHOWN, x->name, d, (long long)t->dim[d]);
        room /= t->dim[d] ? t->dim[d] : 1;
    }
    if (t->dtype == XP_E2M1 && (!xp_tensor_contiguous(t) || xp_tensor_count(t) % 2 != 0))
        return XP_FAIL(XP_E_ARG, "tensor '%.*s': %lld codes of 4 bits%s, expected a contiguous even number", SHOWN,
                       x->name, (long long)xp_tensor_count(t), xp_tensor_contiguous(t) ? "" : " with gaps");
    return XP_OK;
}

/* A JSON text as serde_json writes it: only what must be escaped is. */
static void put_text(FILE *f, const char *text) {
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    fputc('"', f);
    for (const char *p = text; *p; p++) {
        const char *simple = strchr(from, *p);
        if (simple)
            fprintf(f, "\\%c", to[simple - from]);
        else if ((unsigned char)*p < 0x20)
            fprintf(f, "\\u%04x", (unsigned)(unsigned char)*p);
        else
            fputc(*p, f);
    }
    fputc('"', f);
}

static void put_header(FILE *f, const xp_safetensors_item *const *item, int64_t items, const xp_safetensors_text *text,
                       int64_t texts) {
    const char *between = "";
    int64_t at = 0;
    fputc('{', f);
    for (int64_t i = 0; i < texts; i++) {
        fputs(i ? "," : "\"__metadata__\":{", f);
        put_text(f, text[i].key);
        fputc(':', f);
        put_text(f, text[i].value);
        between = i == texts - 1 ? "}," : "";
    }
    for (int64_t i = 0; i < items; i++) {
        const xp_tensor *t = &item[i]->tensor;
        const int64_t end = at + (int64_t)xp_dtype_bytes(t->dtype, xp_tensor_count(t));
        fputs(between, f);
        put_text(f, item[i]->name);
        fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", types[rank_of(t->dtype)].spell);
        for (int d = 0; d < t->ndim; d++)
            fprintf(f, "%s%lld", d ? "," : "", (long long)t->dim[d]);
        fprintf(f, "],\"data_offsets\":[%lld,%lld]}", (long long)at, (long long)end);
        at = end;
        between = ",";
    }
    fputs(texts && !items ? "}}" : "}", f);
}

/* Row-major, whatever the strides. */
static void put_data(FILE *f, const xp_tensor *t) {
    const int64_t count = xp_tensor_count(t);
    if (count == 0)
        return;
    if (xp_tensor_contiguous(t)) {
        fwrite(t->data, 1, xp_dtype_bytes(t->dtype, count), f);
        return;
    }
    const size_t bytes = xp_dtype_bytes(t->dtype, 1);
    for (int64_t n = 0; n < count; n++)
        fwrite((const char *)t->data + xp_tensor_offset(t, n) * (int64_t)bytes, 1, bytes, f);
}

/* Copies of the arguments in canonical order, so that the caller's stay as they are. */
typedef struct {
    const xp_safetensors_item **item;
    xp_safetensors_text *text;
} order;

static xp_status check_order(const order *o, int64_t items, int64_t texts) {
    qsort(o->item, (size_t)items, sizeof *o->item, by_item_name);
    for (int64_t i = 1; i < items; i++) {
        if (strcmp(o->item[i - 1]->name, o->item[i]->name) == 0)
            return XP_FAIL(XP_E_ARG, "tensor '%.*s' is given twice", SHOWN, o->item[i]->name);
    }
    qsort(o->item, (size_t)items, sizeof *o->item, by_canon);
    qsort(o->text, (size_t)texts, sizeof *o->text, by_key);
    for (int64_t i = 0; i < texts; i++) {
        if (!is_utf8(o->text[i].key) || !is_utf8(o->text[i].value))
            return XP_FAIL(XP_E_ARG, "metadata '%.*s': expected UTF-8", SHOWN, o->text[i].key);
        if (i && strcmp(o->text[i - 1].key, o->text[i].key) == 0)
            return XP_FAIL(XP_E_ARG, "metadata '%.*s' is given twice", SHOWN, o->text[i].key);
    }
    return XP_OK;
}

static xp_status put_file(const char *path, const order *o, int64_t items, int64_t texts) {
    char *header = NULL;
    size_t n = 0;
    FILE *m = open_memstream(&header, &n);
    if (!m)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory for a header", path);
    put_header(m, o->item, items, o->text, texts);
    const int bad = ferror(m);
    if (fclose(m) != 0 || bad) {
        free(header);
        return XP_FAIL(XP_E_NOMEM, "%s: no memory for a header of %zu bytes", path, n);
    }
    const size_t padded = (n + 7) / 8 * 8;
    xp_file_out out;
    xp_status st = padded > XP_SAFETENSORS_MAX_HEADER
                       ? XP_FAIL(XP_E_ARG, "%s: the header has %zu bytes, expected at most %d", path, padded,
                                 XP_SAFETENSORS_MAX_HEADER)
                       : xp_file_create(path, &out);
    if (st == XP_OK) {
        for (int i = 0; i < 8; i++)
            fputc((int)((uint64_t)padded >> (8 * i) & 0xff), out.f);
        fwrite(header, 1, n, out.f);
        fprintf(out.f, "%*s", (int)(padded - n), "");
        for (int64_t i = 0; i < items; i++)
            put_data(out.f, &o->item[i]->tensor);
        st = xp_file_keep(&out);
    }
    free(header);
    return st;
}

xp_status xp_safetensors_write(const char *path, const xp_safetensors_item *item, int64_t items,
                               const xp_safetensors_text *text, int64_t texts) {
    if (items < 0 || items > XP_SAFETENSORS_MAX_TENSORS || texts < 0)
        return XP_FAIL(XP_E_ARG, "%s: %lld tensors and %lld texts, expected 0 to %d tensors", path, (long long)items,
                       (long long)texts, XP_SAFETENSORS_MAX_TENSORS);
    for (int64_t i = 0; i < items; i++)
        XP_TRY(check_item(&item[i]));
    order o = {malloc(((size_t)items + 1) * sizeof *o.item), malloc(((size_t)texts + 1) * sizeof *o.text)};
    xp_status st = XP_OK;
    if (!o.item || !o.text) {
        st = XP_FAIL(XP_E_NOMEM, "%s: no memory for %lld names", path, (long long)(items + texts));
    } else {
        for (int64_t i = 0; i < items; i++)
            o.item[i] = &item[i];
        for (int64_t i = 0; i < texts; i++)
            o.text[i] = text[i];
        st = check_order(&o, items, texts);
        if (st == XP_OK)
            st = put_file(path, &o, items, texts);
    }
    free(o.item);
    free(o.text);
    return st;
}
