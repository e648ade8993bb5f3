/* Reads a config.json into an xp_model by the family's record.
 *
 * The order is: the whole file into memory (regular, bounded), JSON (no duplicate keys, nothing after the object),
 * model_type, one value for each slot of the record, the checks between fields, and last the keys that nobody read. It
 * must not branch on a family's name and must not invent a value that the record does not state. */
#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "families.h"

typedef enum { KIND_INT = 0, KIND_REAL, KIND_FLAG, KIND_TEXT, KIND_LIST } kind;

/* What a slot's value must look like, whatever key it comes from. */
typedef struct {
    const char *what;
    kind type;
    double lo, hi;
} slot_rule;

static const slot_rule rules[XP_NSLOT] = {
    [XP_SLOT_HIDDEN] = {"hidden width", KIND_INT, 1, XP_MAX_WIDTH},
    [XP_SLOT_LAYERS] = {"layers", KIND_INT, 1, XP_MAX_LAYERS},
    [XP_SLOT_EXPERTS] = {"experts", KIND_INT, 1, XP_MAX_EXPERTS},
    [XP_SLOT_TOPK] = {"experts a token takes", KIND_INT, 1, XP_MAX_EXPERTS},
    [XP_SLOT_WIDTH] = {"width of an expert", KIND_INT, 1, XP_MAX_WIDTH},
    [XP_SLOT_SHARED] = {"width of the shared expert", KIND_INT, 0, XP_MAX_WIDTH},
    [XP_SLOT_SHARED_COUNT] = {"shared experts", KIND_INT, 0, 1024},
    [XP_SLOT_LATENT] = {"latent width of the experts", KIND_INT, 1, XP_MAX_WIDTH},
    [XP_SLOT_ROUTER_WIDTH] = {"width of the router", KIND_INT, 1, XP_MAX_WIDTH},
    [XP_SLOT_AROUND] = {"what is around the experts", KIND_TEXT, 0, 0},
    [XP_SLOT_DENSE] = {"width of the layers without experts", KIND_INT, 1, XP_MAX_WIDTH},
    [XP_SLOT_STEP] = {"every how many layers a MoE block comes", KIND_INT, 1, XP_MAX_LAYERS},
    [XP_SLOT_DENSE_LAYERS] = {"layers without experts", KIND_LIST, 0, XP_MAX_LAYERS - 1},
    [XP_SLOT_FIRST] = {"first layers without experts", KIND_INT, 0, XP_MAX_LAYERS},
    [XP_SLOT_LAST] = {"last layer with experts", KIND_INT, -1, XP_MAX_LAYERS},
    [XP_SLOT_PERIOD] = {"every how many layers a MoE block comes", KIND_INT, 1, XP_MAX_LAYERS},
    [XP_SLOT_OFFSET] = {"place of the MoE block in a period", KIND_INT, 0, XP_MAX_LAYERS},
    [XP_SLOT_LIST] = {"layers with experts", KIND_LIST, 0, XP_MAX_LAYERS - 1},
    [XP_SLOT_TYPES] = {"a word a layer", KIND_LIST, 0, 0},
    [XP_SLOT_METHOD] = {"how experts are chosen", KIND_TEXT, 0, 0},
    [XP_SLOT_PRESET] = {"dialect of the MoE blocks", KIND_TEXT, 0, 0},
    [XP_SLOT_GROUPS] = {"groups of experts", KIND_INT, 1, XP_MAX_EXPERTS},
    [XP_SLOT_TOPK_GROUPS] = {"groups that are kept", KIND_INT, 1, XP_MAX_EXPERTS},
    [XP_SLOT_SCALE] = {"factor of the weights", KIND_REAL, 1e-6, 1e6},
    [XP_SLOT_NULLS] = {"experts without weights", KIND_INT, 0, XP_MAX_EXPERTS},
    [XP_SLOT_LIMIT] = {"limit of the activation", KIND_REAL, 0, 1e6},
    [XP_SLOT_LIMITS] = {"limits of the activation", KIND_LIST, 0, 1e6},
    [XP_SLOT_LIMITS_SHARED] = {"limits in the shared expert", KIND_LIST, 0, 1e6},
    [XP_SLOT_FURTHER] = {"layers that predict further tokens", KIND_INT, 0, XP_MAX_LAYERS},
    [XP_SLOT_HASH] = {"layers that choose by the token id", KIND_INT, 0, XP_MAX_LAYERS},
    [XP_SLOT_ALPHA] = {"alpha of the activation", KIND_REAL, 1e-6, 1e6},
    [XP_SLOT_LOGIT_SCALE] = {"factor of the router's logits", KIND_REAL, 1e-6, 1e6},
    [XP_SLOT_SOFTCAP] = {"soft cap of the router's logits", KIND_REAL, 0, 1e6},
    [XP_SLOT_GATE_CAP] = {"soft cap of the gate", KIND_REAL, 1e-6, 1e6},
    [XP_SLOT_UP_CAP] = {"soft cap of the rows that the gate multiplies", KIND_REAL, 1e-6, 1e6},
    [XP_SLOT_COMBINE] = {"how routed and shared outputs are combined", KIND_TEXT, 0, 0},
    [XP_SLOT_SUM_EPS] = {"smallest sum of weights", KIND_REAL, 1e-30, 1},
    [XP_SLOT_MARGIN] = {"margin of the sparsemixer", KIND_REAL, 0, 1e6},
    [XP_SLOT_CAPACITY] = {"tokens that an expert takes", KIND_INT, 1, 1000000},
    [XP_SLOT_ROUTER_BIAS] = {"whether the router has a bias", KIND_FLAG, 0, 1},
    [XP_SLOT_SELECT_BIAS] = {"whether the choice has a bias", KIND_FLAG, 0, 1},
    [XP_SLOT_NORM] = {"whether weights are divided by their sum", KIND_FLAG, 0, 1},
    [XP_SLOT_ACT] = {"activation", KIND_TEXT, 0, 0},
    [XP_SLOT_JITTER] = {"noise on the router's input", KIND_REAL, 0, 0},
    [XP_SLOT_EPS] = {"epsilon of the norms", KIND_REAL, 1e-30, 1},
    [XP_SLOT_EXPERT_EPS] = {"epsilon of the norm of the experts' rows", KIND_REAL, 1e-30, 1},
    [XP_SLOT_AUX] = {"coefficient of the balance loss", KIND_REAL, 0, 1e6},
    [XP_SLOT_Z] = {"coefficient of the z loss", KIND_REAL, 0, 1e6},
    [XP_SLOT_VOCAB] = {"vocabulary", KIND_INT, 1, 2147483647},
    [XP_SLOT_DTYPE] = {"dtype of the published weights", KIND_TEXT, 0, 0},
};

typedef struct {
    const char *path;
    json_t *root;    /* the object that holds the fields */
    json_t *file;    /* the whole file: root itself, or an object around it */
    char inside[64]; /* the path from file to root; empty when they are the same */
    int alone;       /* 1: the file is the object that holds the family's fields in others */
    const xp_family *family;
    const char *key[XP_NSLOT];  /* the name under which the slot was found; NULL: no key */
    json_t *json[XP_NSLOT];     /* borrowed from root */
    double value[XP_NSLOT];     /* numbers and flags: every integer in range is exact */
    const char *text[XP_NSLOT]; /* KIND_TEXT */
    size_t key_bytes[XP_NSLOT]; /* key is not terminated: it points into the list of names */
    char width_names[160];      /* of an expert's width, where the file has the record's dense_instead */
} reader;

/* ---- lists of names with '|' between them ---- */

/* The next name of *list and its length; NULL at the end. */
static const char *next_name(const char **list, size_t *out_bytes) {
    const char *name = *list;
    if (!name || !*name)
        return NULL;
    *out_bytes = strcspn(name, "|");
    *list = name + *out_bytes + (name[*out_bytes] == '|');
    return name;
}

static int list_has(const char *list, const char *key) {
    size_t bytes;
    for (const char *name; (name = next_name(&list, &bytes)) != NULL;) {
        if (strlen(key) == bytes && memcmp(name, key, bytes) == 0)
            return 1;
    }
    return 0;
}

/* Appends a line to a '\n'-separated text of fixed size; 0 when it does not fit. */
static int add_line(char *text, size_t bytes, const char *line) {
    const size_t used = strlen(text), more = strlen(line);
    if (used + more + 2 > bytes)
        return 0;
    if (used)
        text[used] = '\n';
    memcpy(text + used + (used != 0), line, more + 1);
    return 1;
}

/* 1 when the text has no control characters, so that a message or a report may print it. */
static int is_plain(const char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            return 0;
    }
    return 1;
}

/* ---- one value ---- */

/* A value as it stands in the file, cut to fit a message. */
static void show(const json_t *v, char *buf, size_t bytes) {
    char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(15));
    snprintf(buf, bytes, "%s", text ? text : "(a value)");
    if (text && strlen(text) >= bytes && bytes > 4)
        memcpy(buf + bytes - 4, "...", 4);
    free(text);
}

static const char *act_of(const reader *in) {
    return in->family->act ? in->family->act : "silu";
}

static void expectation(const reader *in, xp_slot s, char *buf, size_t bytes) {
    const slot_rule *r = &rules[s];
    if (r->type == KIND_FLAG)
        snprintf(buf, bytes, "true or false");
    else if (s == XP_SLOT_ACT && strchr(act_of(in), '|'))
        snprintf(buf, bytes, "one of %s, the only activation of this family that is built", act_of(in));
    else if (s == XP_SLOT_ACT)
        snprintf(buf, bytes, "\"%s\", the only activation of this family that is built", act_of(in));
    else if (s == XP_SLOT_METHOD)
        snprintf(buf, bytes, "one of %s", in->family->methods);
    else if (s == XP_SLOT_COMBINE)
        snprintf(buf, bytes, "one of sum|average");
    else if (s == XP_SLOT_AROUND)
        snprintf(buf, bytes, "names of " XP_AROUND_NAMES " with + between them");
    else if (s == XP_SLOT_PRESET)
        snprintf(buf, bytes, "a name of `expar list dialects`");
    else if (s == XP_SLOT_TYPES)
        snprintf(buf, bytes, "a list of words, one a layer");
    else if (s == XP_SLOT_LIMITS || s == XP_SLOT_LIMITS_SHARED)
        snprintf(buf, bytes, "a list of numbers from 0 to %.15g, or null, one a layer", r->hi);
    else if (r->type == KIND_TEXT)
        snprintf(buf, bytes, "a text");
    else if (r->type == KIND_LIST)
        snprintf(buf, bytes, "a list of layer numbers");
    else if (r->lo >= r->hi)
        snprintf(buf, bytes, "%.15g, anything else is not built", r->lo);
    else
        snprintf(buf, bytes, "%s from %.15g to %.15g", r->type == KIND_INT ? "an integer" : "a number", r->lo, r->hi);
}

static xp_status wrong(const reader *in, xp_slot s, const json_t *v) {
    char got[96], want[160];
    show(v, got, sizeof got);
    expectation(in, s, want, sizeof want);
    return XP_FAIL(XP_E_FORMAT, "%s: %.*s is %s, expected %s (%s)", in->path, (int)in->key_bytes[s], in->key[s], got,
                   want, rules[s].what);
}

static xp_status take_number(reader *in, xp_slot s, const json_t *v) {
    const slot_rule *r = &rules[s];
    const int ok = r->type == KIND_INT ? json_is_integer(v) : json_is_number(v);
    if (!ok)
        return wrong(in, s, v);
    const double x = json_number_value(v);
    if (!(x >= r->lo && x <= r->hi))
        return wrong(in, s, v);
    in->value[s] = x;
    return XP_OK;
}

/* The place of a word in the family's list of methods, or -1. */
static int method_of(const reader *in, const char *word) {
    const char *list = in->family->methods;
    size_t bytes;
    int at = 0;
    for (const char *name; (name = next_name(&list, &bytes)) != NULL; at++) {
        if (strlen(word) == bytes && memcmp(name, word, bytes) == 0)
            return at;
    }
    return -1;
}

/* 1 when one of the words has one letter: the family's files may have a text with a letter a layer. */
static int has_letter(const char *words) {
    size_t bytes;
    for (const char *word; (word = next_name(&words, &bytes)) != NULL;) {
        if (bytes == 1 && *word != '1')
            return 1;
    }
    return 0;
}

static xp_status take(reader *in, xp_slot s, const json_t *v) {
    const slot_rule *r = &rules[s];
    switch (r->type) {
    case KIND_INT:
    case KIND_REAL:
        return take_number(in, s, v);
    case KIND_FLAG:
        if (!json_is_boolean(v))
            return wrong(in, s, v);
        in->value[s] = json_is_true(v) ? 1.0 : 0.0;
        return XP_OK;
    case KIND_TEXT:
        if (!json_is_string(v) || !is_plain(json_string_value(v)))
            return wrong(in, s, v);
        if (s == XP_SLOT_ACT && !list_has(act_of(in), json_string_value(v)))
            return wrong(in, s, v);
        if (s == XP_SLOT_METHOD && method_of(in, json_string_value(v)) < 0)
            return wrong(in, s, v);
        if (s == XP_SLOT_COMBINE && !list_has("sum|average", json_string_value(v)))
            return wrong(in, s, v);
        if (s == XP_SLOT_PRESET && !xp_dialect_find(json_string_value(v)))
            return wrong(in, s, v);
        if (s == XP_SLOT_AROUND && xp_around_parse(json_string_value(v), &(unsigned){0}) != XP_OK)
            return wrong(in, s, v);
        in->text[s] = json_string_value(v);
        return XP_OK;
    case KIND_LIST:
        if (!json_is_array(v) && !(s == XP_SLOT_TYPES && json_is_string(v) && has_letter(in->family->sparse)) &&
            !(s == XP_SLOT_LIST && json_is_string(v) && in->family->list_text))
            return wrong(in, s, v);
        return XP_OK;
    }
    return XP_FAIL(XP_E_BUG, "config: a slot without a kind");
}

/* ---- one slot ---- */

/* The value at a path "a.b" of objects, or "a.0" of a list in one; NULL when there is none. */
static json_t *at_path(json_t *v, const char *path) {
    while (v && *path) {
        char name[64];
        const size_t n = strcspn(path, ".");
        snprintf(name, sizeof name, "%.*s", (int)n, path);
        v = json_is_array(v) ? json_array_get(v, (size_t)strtol(name, NULL, 10)) : json_object_get(v, name);
        path += n + (path[n] == '.');
    }
    return v;
}

/* The names of a slot in this file. */
static const char *names_of(const reader *in, xp_slot s) {
    if (in->width_names[0] && s == XP_SLOT_DENSE)
        return in->family->dense_instead;
    return in->width_names[0] && s == XP_SLOT_WIDTH ? in->width_names : in->family->slot[s].keys;
}

static void choose_names(reader *in) {
    const xp_slot_source *slot = in->family->slot;
    const json_t *v = in->family->dense_instead ? json_object_get(in->root, in->family->dense_instead) : NULL;
    if (v && !json_is_null(v))
        snprintf(in->width_names, sizeof in->width_names, "%s|%s", slot[XP_SLOT_DENSE].keys, slot[XP_SLOT_WIDTH].keys);
}

/* Finds the slot under any of its names. Two names with different values contradict one another; but a layer's kind may
 * be told in two ways, of which the classes take the first that is given. */
static xp_status find(reader *in, xp_slot s) {
    const char *list = names_of(in, s);
    size_t bytes;
    for (const char *name; (name = next_name(&list, &bytes)) != NULL;) {
        char key[64];
        snprintf(key, sizeof key, "%.*s", (int)bytes, name);
        json_t *v = at_path(in->root, key);
        if (!v || (s == XP_SLOT_TYPES && (in->json[s] || json_is_null(v))))
            continue;
        if (in->json[s] && !json_equal(in->json[s], v)) {
            char a[48], b[48];
            show(in->json[s], a, sizeof a);
            show(v, b, sizeof b);
            return XP_FAIL(XP_E_FORMAT, "%s: %.*s %s and %s %s contradict one another (both name the %s of a %s)",
                           in->path, (int)in->key_bytes[s], in->key[s], a, key, b, rules[s].what,
                           in->family->model_type);
        }
        if (!in->json[s]) {
            in->key[s] = name;
            in->key_bytes[s] = bytes;
            in->json[s] = v;
        }
    }
    return XP_OK;
}

static xp_status missing(const reader *in, xp_slot s) {
    char tried[160] = "";
    const char *list = names_of(in, s), *names = list;
    size_t bytes;
    for (const char *name; (name = next_name(&list, &bytes)) != NULL;) {
        const size_t used = strlen(tried);
        snprintf(tried + used, sizeof tried - used, "%s%.*s", used ? ", " : "", (int)bytes, name);
    }
    const size_t first = strcspn(names, "|");
    return XP_FAIL(XP_E_FORMAT, "%s: no field '%.*s' (%s); a %s must state it, no default is taken; names tried: %s",
                   in->path, (int)first, names, rules[s].what, in->family->model_type, tried);
}

static xp_status assume(const reader *in, xp_slot s, xp_model *m) {
    const xp_slot_source *src = &in->family->slot[s];
    char line[224], value[32];
    if (rules[s].type == KIND_LIST || rules[s].type == KIND_TEXT)
        snprintf(value, sizeof value, "%s", rules[s].type == KIND_LIST ? "[]" : "\"\"");
    else
        snprintf(value, sizeof value, "%.15g", src->value);
    snprintf(line, sizeof line, "%.*s absent, taken as %s: %s", (int)strcspn(src->keys, "|"), src->keys, value,
             src->why);
    if (!add_line(m->assumed, sizeof m->assumed, line))
        return XP_FAIL(XP_E_BUG, "config: the record of %s has too many optional fields", in->family->model_type);
    return XP_OK;
}

static xp_status read_slot(reader *in, xp_slot s, xp_model *m) {
    const xp_slot_source *src = &in->family->slot[s];
    in->value[s] = src->value;
    if (src->from == XP_SLOT_NONE || src->from == XP_SLOT_FIXED)
        return XP_OK;
    XP_TRY(find(in, s));
    if (in->json[s] && !(src->from == XP_SLOT_OPTIONAL && json_is_null(in->json[s])))
        return take(in, s, in->json[s]);
    in->json[s] = NULL;
    return src->from == XP_SLOT_OPTIONAL ? assume(in, s, m) : missing(in, s);
}

/* ---- checks between fields ---- */

/* The name under which a slot was read, for messages. */
#define NAME(in, s) (int)(in)->key_bytes[s], (in)->key[s]

static xp_status check_topk(const reader *in) {
    const double e = in->value[XP_SLOT_EXPERTS] + in->value[XP_SLOT_NULLS], k = in->value[XP_SLOT_TOPK];
    if (k > e)
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s is %.0f, more than %.*s %.0f: k > E", in->path, NAME(in, XP_SLOT_TOPK), k,
                       NAME(in, XP_SLOT_EXPERTS), e);
    return XP_OK;
}

/* Groups and how many of them stay are said together, and must be where the method is that of groups. */
static xp_status check_groups(const reader *in) {
    const xp_slot_source *slot = in->family->slot;
    const int all = in->json[XP_SLOT_GROUPS] != NULL, kept = in->json[XP_SLOT_TOPK_GROUPS] != NULL;
    const int grouped = in->family->methods && method_of(in, in->text[XP_SLOT_METHOD]) == 1;
    if (!in->family->groups_or_none || (all == kept && (all || !grouped)))
        return XP_OK;
    if (all == kept)
        return XP_FAIL(XP_E_FORMAT, "%s: no field '%s': %.*s is \"%s\", which needs it", in->path,
                       slot[XP_SLOT_GROUPS].keys, NAME(in, XP_SLOT_METHOD), in->text[XP_SLOT_METHOD]);
    return XP_FAIL(XP_E_FORMAT, "%s: %.*s is given and '%s' is not: a %s has groups by both or by neither", in->path,
                   NAME(in, all ? XP_SLOT_GROUPS : XP_SLOT_TOPK_GROUPS),
                   slot[all ? XP_SLOT_TOPK_GROUPS : XP_SLOT_GROUPS].keys, in->family->model_type);
}

/* Layers as a text, "3,4,5". */
static xp_status read_text_list(const reader *in, xp_slot s, int layers, uint8_t *named) {
    const char *p = json_string_value(in->json[s]);
    do {
        char *end;
        const long n = *p >= '0' && *p <= '9' ? strtol(p, &end, 10) : -1;
        if (n < 0 || n >= layers || (*end && *end != ',')) {
            char got[64];
            show(in->json[s], got, sizeof got);
            return XP_FAIL(XP_E_FORMAT, "%s: %.*s is %s, expected layer numbers from 0 to %d with commas between them",
                           in->path, NAME(in, s), got, layers - 1);
        }
        named[n] = 1;
        p = end + (*end == ',');
    } while (*p);
    return XP_OK;
}

/* named[i] = 1 for every layer that the list of slot s names. */
static xp_status read_list(const reader *in, xp_slot s, int layers, uint8_t *named) {
    const json_t *list = in->json[s];
    memset(named, 0, (size_t)layers);
    if (json_is_string(list))
        return read_text_list(in, s, layers, named);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        char got[48];
        show(v, got, sizeof got);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= layers)
            return XP_FAIL(XP_E_FORMAT, "%s: %.*s[%zu] is %s, expected a layer number from 0 to %d", in->path,
                           NAME(in, s), i, got, layers - 1);
        named[json_integer_value(v)] = 1;
    }
    return XP_OK;
}

/* The word of layer i as text in buf: an item of the list, or a letter of the text. */
static xp_status type_of(const reader *in, int i, char *buf, size_t bytes) {
    const json_t *list = in->json[XP_SLOT_TYPES];
    if (json_is_string(list)) {
        snprintf(buf, bytes, "%c", json_string_value(list)[i]);
        return XP_OK;
    }
    const json_t *v = json_array_get(list, (size_t)i);
    char got[48];
    show(v, got, sizeof got);
    const int numbers = list_has(in->family->sparse, "1");
    if (json_is_string(v))
        snprintf(buf, bytes, "%s", json_string_value(v));
    else if (numbers && json_is_integer(v) && (json_integer_value(v) == 0 || json_integer_value(v) == 1))
        snprintf(buf, bytes, "%s", got);
    else
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s[%d] is %s, expected a word%s", in->path, NAME(in, XP_SLOT_TYPES), i, got,
                       numbers ? ", 0 or 1" : "");
    return XP_OK;
}

/* named[i] = 1 where layer i's word is one of the family's for a MoE block. */
static xp_status read_types(const reader *in, int layers, uint8_t *named) {
    const json_t *list = in->json[XP_SLOT_TYPES];
    const size_t words = json_is_string(list) ? json_string_length(list) : json_array_size(list);
    const size_t further = (size_t)in->value[XP_SLOT_FURTHER];
    if (words != (size_t)layers && words != (size_t)layers + further)
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s has %zu %s, expected one for each of the %d layers", in->path,
                       NAME(in, XP_SLOT_TYPES), words, json_is_string(list) ? "letters" : "words", layers);
    for (int i = 0; i < layers; i++) {
        char word[48];
        XP_TRY(type_of(in, i, word, sizeof word));
        named[i] = (uint8_t)list_has(in->family->sparse, word);
    }
    return XP_OK;
}

/* Layer i is a MoE block when every rule that the family has says so: see families.h. */
static xp_status read_layers(const reader *in, xp_model *m) {
    uint8_t named[XP_MAX_LAYERS];
    const int step = (int)in->value[XP_SLOT_STEP], first = (int)in->value[XP_SLOT_FIRST];
    const int last = in->family->slot[XP_SLOT_LAST].from == XP_SLOT_NONE ? -1 : (int)in->value[XP_SLOT_LAST];
    const int period = (int)in->value[XP_SLOT_PERIOD], offset = (int)in->value[XP_SLOT_OFFSET];
    for (int i = 0; i < m->layers; i++)
        m->moe[i] = (i + 1) % step == 0 && (last < 0 || i <= last) && (period < 1 || i % period == offset % period);
    for (int i = 0; i < m->layers && i < first && !in->json[XP_SLOT_TYPES]; i++)
        m->moe[i] = 0;
    XP_TRY(read_list(in, XP_SLOT_DENSE_LAYERS, m->layers, named));
    for (int i = 0; i < m->layers; i++)
        m->moe[i] = m->moe[i] && !named[i];
    if (in->json[XP_SLOT_LIST]) {
        XP_TRY(read_list(in, XP_SLOT_LIST, m->layers, named));
        memcpy(m->moe, named, (size_t)m->layers);
    }
    if (in->json[XP_SLOT_TYPES]) {
        XP_TRY(read_types(in, m->layers, named));
        memcpy(m->moe, named, (size_t)m->layers);
    }
    if (xp_model_moe_layers(m) > 0)
        return XP_OK;
    if (!in->key[XP_SLOT_STEP] || !in->key[XP_SLOT_DENSE_LAYERS])
        return XP_FAIL(XP_E_FORMAT, "%s: none of the %d layers is a MoE block", in->path, m->layers);
    if (step > m->layers)
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s is %d with %d layers: no layer is a MoE block", in->path,
                       NAME(in, XP_SLOT_STEP), step, m->layers);
    return XP_FAIL(XP_E_FORMAT, "%s: %.*s leaves none of the %d layers a MoE block", in->path,
                   NAME(in, XP_SLOT_DENSE_LAYERS), m->layers);
}

static int counts_shared(const reader *in) {
    return in->family->slot[XP_SLOT_SHARED_COUNT].from != XP_SLOT_NONE;
}

/* Numbers of the record that the family's files state. */
static void take_numbers(const reader *in, xp_dialect *d) {
    const struct {
        xp_slot slot;
        int *whole;
        double *real;
    } field[] = {
        {XP_SLOT_GROUPS, &d->n_group, NULL},
        {XP_SLOT_TOPK_GROUPS, &d->topk_group, NULL},
        {XP_SLOT_NULLS, &d->null_experts, NULL},
        {XP_SLOT_SELECT_BIAS, &d->select_bias, NULL},
        {XP_SLOT_SCALE, NULL, &d->scale},
        {XP_SLOT_LIMIT, NULL, &d->limit},
        {XP_SLOT_ALPHA, NULL, &d->act_alpha},
        {XP_SLOT_SUM_EPS, NULL, &d->renorm_eps},
        {XP_SLOT_LOGIT_SCALE, NULL, &d->logit_scale},
        {XP_SLOT_SOFTCAP, NULL, &d->logit_softcap},
        {XP_SLOT_GATE_CAP, NULL, &d->gate_cap},
        {XP_SLOT_UP_CAP, NULL, &d->up_cap},
        {XP_SLOT_MARGIN, NULL, &d->sparse_eps},
        {XP_SLOT_Z, NULL, &d->z_coef},
        {XP_SLOT_CAPACITY, &d->capacity, NULL},
        {XP_SLOT_ROUTER_BIAS, &d->router_bias, NULL},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        const xp_slot s = field[i].slot;
        if (in->family->slot[s].from == XP_SLOT_NONE)
            continue;
        if (field[i].whole)
            *field[i].whole = (int)in->value[s];
        else
            *field[i].real = in->value[s];
    }
    if (d->group_reduce == XP_GROUP_NONE)
        d->n_group = d->topk_group = 1;
    if (d->shared_rows > 0 && counts_shared(in))
        d->shared_rows = (int)in->value[XP_SLOT_SHARED_COUNT];
    if (in->text[XP_SLOT_COMBINE])
        d->shared_combine = strcmp(in->text[XP_SLOT_COMBINE], "average") == 0 ? XP_COMBINE_AVERAGE : XP_COMBINE_ADD;
    /* A class that divides by flag keeps its eps for the case that it does. */
    if (in->family->slot[XP_SLOT_NORM].from == XP_SLOT_KEY && in->value[XP_SLOT_NORM] == 0.0)
        d->renorm = XP_RENORM_NONE;
}

/* ---- layers that differ ---- */

/* Element `layer` of a list of limits; an absent list has none. */
static xp_status limit_of(const reader *in, xp_slot s, const xp_model *m, int layer, double *out) {
    const json_t *list = in->json[s];
    const size_t n = json_array_size(list), layers = (size_t)m->layers;
    *out = 0;
    if (n == 0)
        return XP_OK;
    if (n != layers && n != layers + (size_t)in->value[XP_SLOT_FURTHER])
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s has %zu numbers, expected one for each of the %d layers", in->path,
                       NAME(in, s), n, m->layers);
    const json_t *v = json_array_get(list, (size_t)layer);
    if (json_is_null(v))
        return XP_OK;
    *out = json_number_value(v);
    if (json_is_number(v) && *out >= rules[s].lo && *out <= rules[s].hi)
        return XP_OK;
    char got[48];
    show(v, got, sizeof got);
    return XP_FAIL(XP_E_FORMAT, "%s: %.*s[%d] is %s, expected null or a number from %.15g to %.15g (%s)", in->path,
                   NAME(in, s), layer, got, rules[s].lo, rules[s].hi, rules[s].what);
}

static xp_status limit_layer(const reader *in, const xp_model *m, int layer, xp_dialect *d) {
    double shared;
    XP_TRY(limit_of(in, XP_SLOT_LIMITS, m, layer, &d->limit));
    XP_TRY(limit_of(in, XP_SLOT_LIMITS_SHARED, m, layer, &shared));
    d->shared_limit = shared > 0;
    d->limit_shared = shared > 0 && shared != d->limit ? shared : 0;
    return XP_OK;
}

/* 1 for the layers that have the family's other preset. A word a layer and a number of first layers may not differ. */
static xp_status read_other(const reader *in, const xp_model *m, uint8_t *other) {
    const int first = (int)in->value[XP_SLOT_HASH];
    for (int i = 0; i < m->layers; i++) {
        char word[48] = "";
        if (in->json[XP_SLOT_TYPES])
            XP_TRY(type_of(in, i, word, sizeof word));
        other[i] = in->json[XP_SLOT_TYPES] ? strcmp(word, in->family->other_word) == 0 : i < first;
        if (in->json[XP_SLOT_TYPES] && in->json[XP_SLOT_HASH] && other[i] != (i < first))
            return XP_FAIL(XP_E_FORMAT, "%s: %.*s %d and %.*s[%d] \"%s\" contradict one another", in->path,
                           NAME(in, XP_SLOT_HASH), first, NAME(in, XP_SLOT_TYPES), i, word);
    }
    return XP_OK;
}

static xp_status set_record(const reader *in, xp_model *m, int layer, const xp_dialect *d) {
    const xp_status st = xp_model_set_dialect(m, layer, d);
    return st == XP_OK ? XP_OK : XP_FAIL(XP_E_FORMAT, "%s: %s", in->path, xp_error_text());
}

static xp_status read_records(const reader *in, xp_model *m) {
    const int limits = in->family->slot[XP_SLOT_LIMITS].from != XP_SLOT_NONE;
    const xp_dialect first = m->dialect;
    uint8_t other[XP_MAX_LAYERS] = {0};
    xp_dialect second = {0};
    int blocks = 0;
    if (in->family->other) {
        const xp_dialect *d = xp_dialect_find(in->family->other);
        if (!d)
            return XP_FAIL(XP_E_BUG, "config: the record of %s names no preset that exists", in->family->model_type);
        second = *d;
        second.aux_coef = m->dialect.aux_coef;
        take_numbers(in, &second);
        XP_TRY(read_other(in, m, other));
    }
    for (int i = 0; i < m->layers; i++) {
        xp_dialect d = other[i] ? second : first;
        if (!m->moe[i])
            continue;
        if (limits)
            XP_TRY(limit_layer(in, m, i, &d));
        if (blocks++ == 0)
            m->dialect = d;
        XP_TRY(set_record(in, m, i, &d));
    }
    xp_model_settle(m);
    return XP_OK;
}

static xp_status read_dialect(const reader *in, xp_model *m) {
    const int method = in->family->methods ? method_of(in, in->text[XP_SLOT_METHOD]) : -1;
    const char *preset = in->text[XP_SLOT_PRESET]
                             ? in->text[XP_SLOT_PRESET]
                             : in->family->preset[method >= 0 ? method : in->value[XP_SLOT_NORM] > 0.0];
    const xp_dialect *d = preset ? xp_dialect_find(preset) : NULL;
    if (!d)
        return XP_FAIL(XP_E_BUG, "config: the record of %s names no preset that exists", in->family->model_type);
    m->dialect = *d;
    if (in->family->slot[XP_SLOT_AUX].from != XP_SLOT_NONE)
        m->dialect.aux_coef = in->value[XP_SLOT_AUX];
    if (d->shared_rows > 0 && counts_shared(in) && in->value[XP_SLOT_SHARED_COUNT] < 1)
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s is 0, expected an integer from 1: the router of a %s weighs them",
                       in->path, NAME(in, XP_SLOT_SHARED_COUNT), in->family->model_type);
    take_numbers(in, &m->dialect);
    XP_TRY(read_records(in, m));
    xp_status st = xp_dialect_check(&m->dialect, m->E, m->K);
    for (int n = 0; n < m->others && st == XP_OK; n++)
        st = xp_dialect_check(&m->other[n], m->E, m->K);
    return st == XP_OK ? XP_OK : XP_FAIL(XP_E_FORMAT, "%s: %s", in->path, xp_error_text());
}

/* ---- keys that may have certain values only ---- */

/* 1 when the JSON text `bytes` long at `text` says the same as v. */
static int says(const char *text, size_t bytes, const json_t *v) {
    json_t *want = json_loadb(text, bytes, JSON_DECODE_ANY, NULL);
    const int same = want && json_equal(want, v);
    json_decref(want);
    return same;
}

/* One entry of the record's list, "key=1,null"; "+key=1": it must be there. */
static xp_status check_only_key(const reader *in, const char *entry, size_t bytes) {
    const int needed = entry[0] == '+';
    entry += needed;
    bytes -= (size_t)needed;
    const size_t n = strcspn(entry, "=");
    char key[64], got[48];
    snprintf(key, sizeof key, "%.*s", (int)n, entry);
    const json_t *v = at_path(in->root, key);
    if (!v && needed)
        return XP_FAIL(XP_E_FORMAT, "%s: %s is missing, expected %.*s for a %s with experts", in->path, key,
                       (int)(bytes - n - 1), entry + n + 1, in->family->model_type);
    if (!v)
        return XP_OK;
    for (size_t at = n + 1; at < bytes;) {
        const size_t one = strcspn(entry + at, ",|");
        if (says(entry + at, one, v))
            return XP_OK;
        at += one + 1;
    }
    show(v, got, sizeof got);
    return XP_FAIL(XP_E_FORMAT, "%s: %s is %s, expected %s%.*s: anything else is not built for a %s", in->path, key,
                   got, memchr(entry, ',', bytes) ? "one of " : "", (int)(bytes - n - 1), entry + n + 1,
                   in->family->model_type);
}

static xp_status check_only(const reader *in) {
    const char *list = in->family->only;
    size_t bytes;
    for (const char *entry; (entry = next_name(&list, &bytes)) != NULL;)
        XP_TRY(check_only_key(in, entry, bytes));
    return XP_OK;
}

/* 1 when the record's list has the key. */
static int only_has(const reader *in, const char *key) {
    const char *list = in->family->only;
    const size_t n = strlen(key);
    size_t bytes;
    for (const char *entry; (entry = next_name(&list, &bytes)) != NULL;) {
        const size_t mark = entry[0] == '+';
        if (bytes > n + mark && memcmp(entry + mark, key, n) == 0 && entry[mark + n] == '=')
            return 1;
    }
    return 0;
}

/* `architectures`, when given, must be of the family: a file whose two names of one thing differ is a wrong file. */
static int begins_with_one(const char *name, const char *list) {
    size_t bytes;
    for (const char *word; (word = next_name(&list, &bytes)) != NULL;) {
        if (strncmp(name, word, bytes) == 0)
            return 1;
    }
    return 0;
}

static xp_status check_architectures(const reader *in) {
    const json_t *list = json_object_get(in->file, "architectures");
    if (!list || json_is_null(list))
        return XP_OK;
    char got[96];
    show(list, got, sizeof got);
    if (!json_is_array(list))
        return XP_FAIL(XP_E_FORMAT, "%s: architectures is %s, expected a list of class names", in->path, got);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (!name || !begins_with_one(name, in->family->arch))
            return XP_FAIL(XP_E_FORMAT,
                           "%s: architectures is %s and model_type \"%s\": they contradict one another "
                           "(expected names that begin with %s)",
                           in->path, got, in->family->model_type, in->family->arch);
    }
    return XP_OK;
}

/* ---- keys that nobody read ---- */

int xp_config_speaks(const char *key) {
    static const char *const word[] = {"expert", "moe",   "rout",  "gate",    "gating",  "topk", "top_k",
                                       "top-k",  "group", "share", "sharing", "capacit", "scal"};
    char low[256];
    size_t n = strlen(key);
    if (n >= sizeof low)
        return 1; /* no field has such a name: let it be looked at */
    for (size_t i = 0; i <= n; i++)
        low[i] = (char)(key[i] >= 'A' && key[i] <= 'Z' ? key[i] - 'A' + 'a' : key[i]);
    for (size_t i = 0; i < sizeof word / sizeof word[0]; i++) {
        if (strstr(low, word[i]))
            return 1;
    }
    return 0;
}

/* The first key inside v, at any depth, whose name speaks of routing; NULL when there is none. */
static const char *speaks_inside(json_t *v) {
    const char *key;
    json_t *item;
    json_object_foreach(v, key, item) {
        if (xp_config_speaks(key))
            return key;
        const char *inner = speaks_inside(item);
        if (inner)
            return inner;
    }
    for (size_t i = 0; i < json_array_size(v); i++) {
        const char *inner = speaks_inside(json_array_get(v, i));
        if (inner)
            return inner;
    }
    return NULL;
}

static int is_read(const reader *in, const char *key) {
    if (strcmp(key, "model_type") == 0 || strcmp(key, "architectures") == 0)
        return 1;
    for (int s = 0; s < XP_NSLOT; s++) {
        if (in->family->slot[s].keys && list_has(in->family->slot[s].keys, key))
            return 1;
    }
    return only_has(in, key) || (in->family->dense_instead && strcmp(in->family->dense_instead, key) == 0);
}

static xp_status refuse_key(const reader *in, const char *key, const char *inner, const json_t *v) {
    char got[48];
    show(v, got, sizeof got);
    return XP_FAIL(XP_E_FORMAT,
                   "%s: key '%s'%s%s%s (%s) speaks of experts or routing and a %s has no such field: what "
                   "it would change is unknown",
                   in->path, key, inner ? " holds '" : "", inner ? inner : "", inner ? "'" : "", got,
                   in->family->model_type);
}

/* 1 when a name of the list is a path that begins with path and goes on. */
static int list_enters(const char *list, const char *path) {
    const size_t n = strlen(path);
    size_t bytes;
    for (const char *name; (name = next_name(&list, &bytes)) != NULL;) {
        if (bytes > n && strncmp(name, path, n) == 0 && name[n] == '.')
            return 1;
    }
    return 0;
}

/* 1 when fields of the family lie in the object there. */
static int enters(const reader *in, const char *path) {
    int any = list_enters(in->family->only, path);
    for (int s = 0; s < XP_NSLOT; s++)
        any |= list_enters(in->family->slot[s].keys, path);
    return any;
}

/* The keys of an object that no slot took; before: its path with a '.', "" for the fields' own object. */
static xp_status read_rest(const reader *in, json_t *object, const char *before, xp_model *m) {
    const char *name;
    json_t *v;
    json_object_foreach(object, name, v) {
        char key[XP_MODEL_NOTES];
        if (!*name || !is_plain(name))
            return XP_FAIL(XP_E_FORMAT, "%s: a key has an empty name, or control characters in it: '%s'", in->path,
                           name);
        if (snprintf(key, sizeof key - 1, "%s%s", before, name) >= (int)sizeof key - 1)
            return XP_FAIL(XP_E_FORMAT, "%s: key '%.60s': the names of the keys that are not read exceed %d bytes",
                           in->path, name, XP_MODEL_NOTES);
        if (is_read(in, key))
            continue;
        if (enters(in, key)) { /* of a list what is not taken stays unread */
            strcat(key, ".");
            XP_TRY(read_rest(in, v, key, m));
            continue;
        }
        if (!list_has(in->family->unread, key)) {
            if (xp_config_speaks(key))
                return refuse_key(in, key, NULL, v);
            const char *inner = speaks_inside(v);
            if (inner)
                return refuse_key(in, key, inner, v);
        }
        if (!add_line(m->unread, sizeof m->unread, key))
            return XP_FAIL(XP_E_FORMAT, "%s: key '%.60s': the names of the keys that are not read exceed %d bytes",
                           in->path, key, XP_MODEL_NOTES);
    }
    return XP_OK;
}

/* 1 for the name of an object that configures another part of the model: a tower, a tokenizer. */
static int is_part(const char *key, const json_t *v) {
    const size_t n = strlen(key);
    return json_is_object(v) && n > 7 && strcmp(key + n - 7, "_config") == 0;
}

static xp_status read_beside_key(const reader *in, const char *key, json_t *v, xp_model *m) {
    const json_t *within = json_object_get(in->root, key);
    if (!*key || !is_plain(key))
        return XP_FAIL(XP_E_FORMAT, "%s: a key has an empty name, or control characters in it: '%s'", in->path, key);
    if (is_read(in, key)) {
        char got[48];
        show(v, got, sizeof got);
        if (list_has(in->family->slot[XP_SLOT_DTYPE].keys, key) || (within && json_equal(within, v)))
            return XP_OK;
        return XP_FAIL(XP_E_FORMAT, "%s: key '%s' (%s) lies beside '%s', where a %s reads it; there it is %s", in->path,
                       key, got, in->inside, in->family->model_type, within ? "another value" : "absent");
    }
    if (!list_has(in->family->unread, key)) {
        if (xp_config_speaks(key))
            return refuse_key(in, key, NULL, v);
        const char *inner = is_part(key, v) ? NULL : speaks_inside(v);
        if (inner)
            return refuse_key(in, key, inner, v);
    }
    if (!add_line(m->unread, sizeof m->unread, key))
        return XP_FAIL(XP_E_FORMAT, "%s: key '%.60s': the names of the keys that are not read exceed %d bytes",
                       in->path, key, XP_MODEL_NOTES);
    return XP_OK;
}

/* The keys beside the object that holds the fields, in the file and in every object on the way. */
static xp_status read_beside(const reader *in, xp_model *m) {
    const char *key, *part = in->inside;
    json_t *v, *around = in->file;
    while (*part) {
        char name[64];
        const size_t n = strcspn(part, ".");
        snprintf(name, sizeof name, "%.*s", (int)n, part);
        json_object_foreach(around, key, v) {
            if (strcmp(key, name) != 0 && strcmp(key, "model_type") != 0 && strcmp(key, "architectures") != 0)
                XP_TRY(read_beside_key(in, key, v, m));
        }
        around = json_object_get(around, name);
        part += n + (part[n] == '.');
    }
    return XP_OK;
}

/* ---- the whole ---- */

/* The families whose files are read, as many as fit. */
static void known_families(char *buf, size_t bytes) {
    size_t used = 0;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        const size_t more = strlen(f->model_type) + (used ? 2 : 0);
        if (f->refused)
            continue;
        if (used + more + 6 > bytes) {
            snprintf(buf + used, bytes - used, ", ...");
            return;
        }
        snprintf(buf + used, bytes - used, "%s%s", used ? ", " : "", f->model_type);
        used += more;
    }
}

static xp_status find_family(reader *in) {
    const json_t *v = json_object_get(in->file, "model_type");
    char got[96], known[800];
    const char *type = json_string_value(v);
    for (const xp_family *f = xp_families; f->model_type && type; f++) {
        in->alone = f->text && strcmp(type, f->text) == 0;
        if (in->alone || strcmp(type, f->model_type) == 0) {
            in->family = f;
            return XP_OK;
        }
    }
    known_families(known, sizeof known);
    if (!v)
        return XP_FAIL(XP_E_FORMAT, "%s: no field 'model_type'; expected one of %s", in->path, known);
    show(v, got, sizeof got);
    return XP_FAIL(XP_E_FORMAT, "%s: model_type is %s, expected one of %s", in->path, got, known);
}

/* The file's name without folders and .json; a plain config.json is called after its folder. */
static void name_after(const char *path, char *out, size_t bytes) {
    const char *base = strrchr(path, '/');
    const char *from = base ? base + 1 : path;
    size_t n = strlen(from);
    if (base && base != path && strcmp(from, "config.json") == 0) {
        const char *p = base;
        while (p > path && p[-1] != '/')
            p--;
        from = p;
        n = (size_t)(base - p);
    } else if (n > 5 && strcmp(from + n - 5, ".json") == 0) {
        n -= 5;
    }
    snprintf(out, bytes, "%.*s", (int)(n < bytes ? n : bytes - 1), from);
}

/* Goes down a path "a.b", `bytes` long; *out NULL when there is none. */
static xp_status descend(const reader *in, const char *path, size_t bytes, json_t **out) {
    json_t *v = in->file;
    for (size_t at = 0; at < bytes && v;) {
        char name[64], got[96];
        const size_t n = strcspn(path + at, ".|");
        snprintf(name, sizeof name, "%.*s", (int)n, path + at);
        v = json_object_get(v, name);
        if (v && !json_is_object(v)) {
            show(v, got, sizeof got);
            return XP_FAIL(XP_E_FORMAT, "%s: %s is %s, expected an object", in->path, name, got);
        }
        at += n + 1;
    }
    *out = v;
    return XP_OK;
}

/* The fields of some families lie in an object of the file: the first of the record's that is there. */
static xp_status go_inside(reader *in) {
    const char *list = in->family->inside;
    size_t bytes;
    for (const char *path; (path = next_name(&list, &bytes)) != NULL;) {
        json_t *v = NULL;
        if (bytes == 1 && *path == '.')
            return XP_OK;
        XP_TRY(descend(in, path, bytes, &v));
        if (!v)
            continue;
        in->root = v;
        snprintf(in->inside, sizeof in->inside, "%.*s", (int)bytes, path);
        return XP_OK;
    }
    return XP_FAIL(XP_E_FORMAT, "%s: no field '%.*s': a %s has its fields inside it", in->path,
                   (int)strcspn(in->family->inside, "|"), in->family->inside, in->family->model_type);
}

/* Some classes take their number of layers from the list of words. */
static xp_status count_layers(const reader *in, xp_model *m) {
    const json_t *words = in->json[XP_SLOT_TYPES];
    const size_t n = json_is_string(words) ? json_string_length(words) : json_array_size(words);
    if (n < 1 || n > XP_MAX_LAYERS)
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s names %zu layers, expected 1 to %d", in->path, NAME(in, XP_SLOT_TYPES), n,
                       XP_MAX_LAYERS);
    m->layers = (int)n;
    return XP_OK;
}

/* The width of the experts' rows, and what is around them. */
static xp_status read_around(const reader *in, xp_model *m) {
    unsigned around = in->family->around;
    xp_status st = xp_model_set_latent(m, (int64_t)in->value[XP_SLOT_LATENT]);
    if (st == XP_OK && in->text[XP_SLOT_AROUND])
        st = xp_around_parse(in->text[XP_SLOT_AROUND], &around);
    if (st == XP_OK)
        st = xp_model_set_around(m, around);
    if (st != XP_OK)
        return XP_FAIL(XP_E_FORMAT, "%s: %s", in->path, xp_error_text());
    m->expert_eps =
        in->family->slot[XP_SLOT_EXPERT_EPS].from != XP_SLOT_NONE ? in->value[XP_SLOT_EXPERT_EPS] : m->norm_eps;
    return XP_OK;
}

static xp_status fill(reader *in, xp_model *m) {
    XP_TRY(find_family(in));
    if (in->family->refused)
        return XP_FAIL(XP_E_FORMAT, "%s: model_type is \"%s\", which is not built: %s", in->path,
                       in->family->model_type, in->family->refused);
    XP_TRY(check_architectures(in));
    if (in->family->inside && !in->alone)
        XP_TRY(go_inside(in));
    choose_names(in);
    for (int s = 0; s < XP_NSLOT; s++)
        XP_TRY(read_slot(in, (xp_slot)s, m));
    XP_TRY(check_topk(in));
    XP_TRY(check_groups(in));
    XP_TRY(check_only(in));
    name_after(in->path, m->name, sizeof m->name);
    snprintf(m->model_type, sizeof m->model_type, "%s", in->family->model_type);
    if (in->text[XP_SLOT_DTYPE])
        snprintf(m->torch_dtype, sizeof m->torch_dtype, "%s", in->text[XP_SLOT_DTYPE]);
    m->layers = (int)in->value[XP_SLOT_LAYERS];
    if (m->layers == 0)
        XP_TRY(count_layers(in, m));
    m->H = (int64_t)in->value[XP_SLOT_HIDDEN];
    m->F = (int64_t)in->value[XP_SLOT_WIDTH];
    m->E = (int64_t)in->value[XP_SLOT_EXPERTS];
    m->K = (int64_t)in->value[XP_SLOT_TOPK];
    m->S = (int64_t)in->value[XP_SLOT_SHARED];
    const int64_t one = in->family->slot[XP_SLOT_SHARED].from != XP_SLOT_NONE ? m->S : m->F;
    if (in->family->slot[XP_SLOT_SHARED_COUNT].from != XP_SLOT_NONE)
        m->S = (int64_t)in->value[XP_SLOT_SHARED_COUNT] * one;
    if (m->S > XP_MAX_WIDTH)
        return XP_FAIL(XP_E_FORMAT, "%s: %.*s is %.0f: shared experts of %lld together are wider than %d", in->path,
                       NAME(in, XP_SLOT_SHARED_COUNT), in->value[XP_SLOT_SHARED_COUNT], (long long)one, XP_MAX_WIDTH);
    if (in->family->note && !add_line(m->assumed, sizeof m->assumed, in->family->note))
        return XP_FAIL(XP_E_BUG, "config: the record of %s has too many notes", in->family->model_type);
    m->dense_F = (int64_t)in->value[XP_SLOT_DENSE];
    m->vocab = (int64_t)in->value[XP_SLOT_VOCAB];
    m->norm_eps = in->value[XP_SLOT_EPS];
    m->shrink = 1;
    XP_TRY(read_layers(in, m));
    XP_TRY(read_dialect(in, m));
    if (m->dialect.shared_rows > 0 && (m->S == 0 || m->S % m->dialect.shared_rows != 0))
        return XP_FAIL(XP_E_FORMAT,
                       "%s: the shared width is %lld, expected a multiple of the %d experts that %s weighs", in->path,
                       (long long)m->S, m->dialect.shared_rows, m->dialect.name);
    XP_TRY(read_around(in, m));
    const xp_status st = xp_model_set_router_width(m, (int64_t)in->value[XP_SLOT_ROUTER_WIDTH]);
    if (st != XP_OK)
        return XP_FAIL(XP_E_FORMAT, "%s: %s", in->path, xp_error_text());
    XP_TRY(read_rest(in, in->root, "", m));
    return read_beside(in, m);
}

/* The key whose value begins before byte `at`: the last "..." that a ':' follows. Empty when there is none. */
static void key_before(const char *text, size_t at, char *out, size_t bytes) {
    out[0] = 0;
    while (at > 0 && text[at - 1] != ':')
        at--;
    size_t end = at;
    while (end > 0 && text[end - 1] != '"')
        end--;
    if (end < 2)
        return;
    size_t begin = end - 1;
    while (begin > 0 && text[begin - 1] != '"')
        begin--;
    if (begin > 0)
        snprintf(out, bytes, "%.*s", (int)(end - 1 - begin < bytes ? end - 1 - begin : bytes - 1), text + begin);
}

static xp_status json_error(const char *path, const char *text, size_t bytes, const json_error_t *e) {
    char key[64], what[256];
    const size_t at = e->position > 0 && (size_t)e->position < bytes ? (size_t)e->position : bytes;
    key_before(text, at, key, sizeof key);
    snprintf(what, sizeof what, "%s%s%s%s", e->text, key[0] ? " (at field '" : "", key, key[0] ? "')" : "");
    for (char *p = what; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = '?';
    }
    return XP_FAIL(XP_E_FORMAT,
                   "%s:%d:%d: %s; expected one JSON object (RFC 8259: no NaN, no Infinity, no duplicate "
                   "keys, nothing after it)",
                   path, e->line, e->column, what);
}

xp_status xp_config_parse(const char *text, size_t bytes, const char *path, xp_model *out) {
    memset(out, 0, sizeof *out);
    json_error_t e;
    reader in = {.path = path};
    in.root = in.file = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &e);
    if (!in.file)
        return json_error(path, text, bytes, &e);
    xp_status st;
    if (json_is_object(in.file))
        st = fill(&in, out);
    else
        st = XP_FAIL(XP_E_FORMAT, "%s: the file holds a list, expected one JSON object", path);
    json_decref(in.file);
    if (st != XP_OK)
        memset(out, 0, sizeof *out);
    return st;
}

/* ---- the file ---- */

static xp_status io_error(const char *path, const char *verb) {
    char why[128];
    if (strerror_r(errno, why, sizeof why) != 0)
        snprintf(why, sizeof why, "error %d", errno);
    return XP_FAIL(XP_E_IO, "%s: cannot %s: %s", path, verb, why);
}

/* Reads fd to its end; st_size bounds it, so a file that grows meanwhile is refused instead of followed. */
static xp_status read_all(const char *path, int fd, char *buf, size_t bytes) {
    size_t got = 0;
    while (got < bytes) {
        const ssize_t n = read(fd, buf + got, bytes - got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return io_error(path, "read");
        if (n == 0)
            return XP_FAIL(XP_E_IO, "%s: ends after %zu of %zu bytes: it changed while it was read", path, got, bytes);
        got += (size_t)n;
    }
    return XP_OK;
}

static xp_status slurp(const char *path, int fd, char **out, size_t *out_bytes) {
    struct stat s;
    *out = NULL;
    if (fstat(fd, &s) != 0)
        return io_error(path, "examine");
    if (S_ISDIR(s.st_mode))
        return XP_FAIL(XP_E_IO, "%s: is a folder, expected a config.json file", path);
    if (!S_ISREG(s.st_mode))
        return XP_FAIL(XP_E_IO, "%s: is not a regular file", path);
    if (s.st_size > XP_CONFIG_MAX_BYTES)
        return XP_FAIL(XP_E_FORMAT, "%s: is %lld bytes, expected at most %d", path, (long long)s.st_size,
                       XP_CONFIG_MAX_BYTES);
    *out_bytes = (size_t)s.st_size;
    *out = malloc(*out_bytes + 1);
    if (!*out)
        return XP_FAIL(XP_E_NOMEM, "%s: no memory for %zu bytes", path, *out_bytes + 1);
    return read_all(path, fd, *out, *out_bytes);
}

xp_status xp_config_read(const char *path, xp_model *out) {
    memset(out, 0, sizeof *out);
    /* Not blocking: opening a FIFO must fail as "not a regular file", not wait for a writer. */
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return io_error(path, "open");
    char *text;
    size_t bytes = 0;
    xp_status st = slurp(path, fd, &text, &bytes);
    close(fd);
    if (st == XP_OK)
        st = xp_config_parse(text, bytes, path, out);
    free(text);
    return st;
}
