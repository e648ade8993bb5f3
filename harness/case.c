/* Case lines: parsing, the product of lists, printing back, and the files they come from.
 *
 * Nothing is defaulted for a value that was given and not understood. What keys mean: case_keys.c. */
#include "case.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bind.h"
#include "xp/permute.h"

enum { MAX_KEYS = 40, MAX_VALUES = 64, MAX_VALUE = 160, MAX_FILES = 256, LINE_BYTES = XP_CASE_LINE };
enum { MAX_PRODUCT = 1 << 16 }; /* cases of one line: more is a slip, and checking them all would never end */

static const char *const group_names[XP_NGROUP] = {"act",    "param",  "router", "logits",       "weight",
                                                   "grad",   "reduce", "code",   "scale",        "master",
                                                   "moment", "shared", "gate",   "expert_reduce"};

const char *xp_group_name(xp_group g) {
    return group_names[g];
}

static const char *const order_names[] = {"slot_token", "token"};
static const char *const divide_names[] = {"once", "world"};

/* ---- values ---- */

static xp_status parse_int(const char *key, const char *text, int64_t lo, int64_t hi, int64_t *out) {
    char *end = NULL;
    errno = 0;
    const long long v = strtoll(text, &end, 10);
    *out = v;
    const int starts = isdigit((unsigned char)text[text[0] == '-']);
    if (!starts || *end != '\0' || errno != 0 || v < lo || v > hi)
        return XP_FAIL(XP_E_ARG, "%s: '%s' is not a whole number from %lld to %lld", key, text, (long long)lo,
                       (long long)hi);
    return XP_OK;
}

static xp_status parse_word(const char *key, const char *text, const char *const *word, int words, int *out) {
    char all[128] = "";
    for (int i = 0; i < words; i++) {
        if (strcmp(text, word[i]) == 0) {
            *out = i;
            return XP_OK;
        }
        strncat(all, i ? ", " : "", sizeof all - strlen(all) - 1);
        strncat(all, word[i], sizeof all - strlen(all) - 1);
    }
    return XP_FAIL(XP_E_ARG, "%s: '%s' is none of %s", key, text, all);
}

static int stage_param(const xp_case *c, const char *key) {
    for (int i = 0; c->stage && i < c->stage->params; i++) {
        if (strcmp(c->stage->param[i].name, key) == 0)
            return i;
    }
    return -1;
}

static xp_status add_param(xp_case *c, const char *key, const char *value) {
    if (c->params == XP_CASE_PARAMS)
        return XP_FAIL(XP_E_ARG, "%s: a line takes at most %d scalars", key, XP_CASE_PARAMS);
    if (strlen(value) >= sizeof c->param[0].value)
        return XP_FAIL(XP_E_ARG, "%s: '%s' is too long", key, value);
    strcpy(c->param[c->params].name, key);
    strcpy(c->param[c->params].value, value);
    c->params++;
    return XP_OK;
}

/* The value is read here once for its errors, and again where the arguments are bound. */
static xp_status set_param(xp_case *c, const xp_param *p, const char *value) {
    union {
        double real;
        int64_t whole;
        const xp_dialect *dialect;
    } unused;
    const char *key = p->name;
    XP_TRY(xp_bind_scalar(p, value, &unused));
    if (strcmp(key, "token0") == 0)
        return XP_FAIL(XP_E_ARG, "%s: '%s', but it follows from T and the mesh", key, value);
    return add_param(c, key, value);
}

static xp_status set_dtype(xp_case *c, const char *key, const char *value) {
    xp_dtype d;
    if (xp_dtype_parse(value, &d) != XP_OK || !xp_dtype_is_float(d))
        return XP_FAIL(XP_E_ARG, "%s: '%s' is no float type (f64 f32 bf16 f16 e4m3 e5m2 ...)", key, value);
    if (strcmp(key, "dtype") == 0) {
        c->dtype[XP_G_ACT] = d;
        return XP_OK;
    }
    for (int g = 0; g < XP_NGROUP; g++) {
        if (strcmp(key, group_names[g]) == 0)
            c->dtype[g] = d;
    }
    return XP_OK;
}

/* A case with arguments of its own, not taken from the run of a layer. */
static int is_generated(const xp_case *c) {
    return c->kind == XP_CASE_STAGE && !c->stage->chain;
}

/* act always has a meaning: the other groups follow from it. */
static int is_dtype_key(const xp_case *c, const char *key) {
    static const char *const flow[] = {"act", "param", "router", "grad", "reduce", "shared", "gate", "expert_reduce"};
    if (strcmp(key, "dtype") == 0 || strcmp(key, "act") == 0)
        return 1;
    for (size_t i = 0; !is_generated(c) && i < sizeof flow / sizeof *flow; i++) {
        if (strcmp(key, flow[i]) == 0)
            return 1;
    }
    for (int i = 0; c->kind == XP_CASE_STAGE && i < c->stage->operands; i++) {
        if (key[0] && strcmp(key, c->stage->operand[i].group) == 0 && strcmp(key, "wide") != 0)
            return 1;
    }
    return 0;
}

int xp_case_takes(const xp_case *c, char letter) {
    if (!letter || !strchr("TEKHFSDVNGRQY", letter))
        return 0;
    if (!is_generated(c))
        return strchr("TEKHFSDR", letter) != NULL;
    /* What a dialect's own letter stands for: ids of experts, rows of the first matrices. */
    const char from = letter == 'E' ? 'Z' : letter == 'F' ? 'U' : letter == 'S' ? 'X' : letter;
    for (int i = 0; i < c->stage->operands; i++) {
        if (strchr(c->stage->operand[i].shape, letter) || strchr(c->stage->operand[i].shape, from))
            return 1;
    }
    return 0;
}

static const char *param_value(const xp_case *c, const char *name) {
    for (int i = 0; i < c->params; i++) {
        if (strcmp(c->param[i].name, name) == 0)
            return c->param[i].value;
    }
    return NULL;
}

/* The default of the case's kind; NULL for a stage that has no dialect. */
static const char *default_dialect(const xp_case *c) {
    if (!is_generated(c))
        return c->dim['S' - 'A'] > 0 ? "hf-5.24/qwen2_moe" : "hf-5.24/qwen3_moe";
    const int p = stage_param(c, "dialect");
    return p < 0 ? NULL : c->stage->param[p].dflt;
}

xp_status xp_case_dialect(const xp_case *c, xp_dialect *out) {
    const char *given = c->dialect[0] ? c->dialect : param_value(c, "dialect");
    const char *name = given ? given : default_dialect(c);
    const xp_dialect *d = name ? xp_dialect_find(name) : NULL;
    if (!d)
        return XP_FAIL(XP_E_ARG, "dialect: '%s' is no preset (see `expar list dialects`)", name ? name : "");
    *out = *d;
    for (int i = 0; i < c->params; i++) {
        if (xp_dialect_has(c->param[i].name) && (!is_generated(c) || stage_param(c, c->param[i].name) < 0))
            XP_TRY(xp_dialect_set(out, c->param[i].name, c->param[i].value));
    }
    return XP_OK;
}

xp_status xp_case_of_chain(const xp_case *c) {
    for (int i = 0; c->kind == XP_CASE_STAGE && i < c->params; i++) {
        if (stage_param(c, c->param[i].name) >= 0)
            return XP_FAIL(XP_E_ARG, "%s: %s gets its operands from a layer, which sets this; only a vector set can",
                           c->param[i].name, c->stage->name);
    }
    for (int g = XP_G_LOGITS; g <= XP_G_WEIGHT; g++) {
        if (c->dtype[g] != XP_NDTYPE)
            return XP_FAIL(XP_E_ARG, "%s: %s gets its operands from a layer, whose dialect sets this", group_names[g],
                           c->stage ? c->stage->name : "the case");
    }
    return XP_OK;
}

static xp_status set_field(xp_case *c, const char *key, const char *value) {
    xp_dialect unused = {0};
    XP_TRY(xp_dialect_set(&unused, key, value));
    return add_param(c, key, value);
}

static xp_status set_text(const char *key, const char *value, char *out, size_t bytes) {
    if (strlen(value) >= bytes || value[0] == '\0')
        return XP_FAIL(XP_E_ARG, "%s: '%s' is empty or longer than %zu characters", key, value, bytes - 1);
    strcpy(out, value);
    return XP_OK;
}

/* Names of optional operands, joined by '+'. */
static xp_status set_with(xp_case *c, const char *value) {
    char name[64];
    for (const char *p = value;; p++) {
        const size_t n = strcspn(p, "+");
        snprintf(name, sizeof name, "%.*s", (int)(n < sizeof name ? n : sizeof name - 1), p);
        const int i = xp_stage_operand(c->stage, name);
        if (i < 0 || !c->stage->operand[i].optional)
            return XP_FAIL(XP_E_ARG, "with: '%s' is no optional operand of %s", name, c->stage->name);
        p += n;
        if (!*p)
            return set_text("with", value, c->with, sizeof c->with);
    }
}

static xp_status set_int(const char *key, const char *value, int64_t lo, int64_t hi, int *out) {
    int64_t v;
    XP_TRY(parse_int(key, value, lo, hi, &v));
    *out = (int)v;
    return XP_OK;
}

static xp_status set_seed(const char *value, uint64_t *out) {
    char *end = NULL;
    errno = 0;
    *out = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)value[0]) || *end || errno)
        return XP_FAIL(XP_E_ARG, "seed: '%s' is not a whole number from 0 to 2^64-1", value);
    return XP_OK;
}

/* Keys of every case; XP_E_ARG also says which case knows the key. */
static xp_status set_common(xp_case *c, const char *key, const char *value, int *out_known) {
    *out_known = 1;
    if (strcmp(key, "mesh") == 0)
        return xp_mesh_spec_parse(value, &c->mesh);
    if (strcmp(key, "data") == 0)
        return xp_data_parse(value, &c->data);
    if (strcmp(key, "seed") == 0)
        return set_seed(value, &c->seed);
    if (strcmp(key, "name") == 0)
        return set_text(key, value, c->name, XP_CASE_OWN_NAME);
    if (strcmp(key, "expect") == 0)
        return xp_expect_parse(value, &c->expect);
    *out_known = 0;
    return XP_OK;
}

static xp_status set_step_key(xp_case *c, const char *key, const char *value, int *out_known) {
    *out_known = 1;
    if (strcmp(key, "model") == 0)
        return set_text(key, value, c->model, sizeof c->model);
    if (strcmp(key, "dialect") == 0)
        return set_text(key, value, c->dialect, sizeof c->dialect);
    if (strcmp(key, "shrink") == 0)
        return set_int(key, value, 1, 4096, &c->shrink);
    if (strcmp(key, "layers") == 0)
        return set_int(key, value, 1, XP_MAX_LAYERS, &c->layers);
    if (strcmp(key, "steps") == 0)
        return set_int(key, value, 1, 1000000, &c->steps);
    if (strcmp(key, "deterministic") == 0)
        return set_int(key, value, 0, 1, &c->deterministic);
    if (strcmp(key, "micro") == 0 && c->kind == XP_CASE_STEP)
        return set_int(key, value, 1, 1 << 20, &c->micro);
    if (strcmp(key, "order") == 0)
        return parse_word(key, value, order_names, 2, &c->order);
    if (strcmp(key, "divide") == 0)
        return parse_word(key, value, divide_names, 2, &c->divide);
    if (strcmp(key, "align") == 0)
        return set_int(key, value, 1, 128, &c->align);
    if (strcmp(key, "around") == 0)
        return xp_around_parse(value, &c->around);
    *out_known = 0;
    return XP_OK;
}

static xp_status set_key(xp_case *c, const char *key, const char *value) {
    int known = 0;
    XP_TRY(set_common(c, key, value, &known));
    if (known)
        return XP_OK;
    if (is_dtype_key(c, key))
        return set_dtype(c, key, value);
    if (key[1] == '\0' && xp_case_takes(c, key[0])) {
        XP_TRY(parse_int(key, value, 0, INT64_C(1) << 40, &c->dim[key[0] - 'A']));
        c->dim_set[key[0] - 'A'] = 1;
        return XP_OK;
    }
    if (is_generated(c)) {
        const int p = stage_param(c, key);
        if (p >= 0)
            return set_param(c, &c->stage->param[p], value);
        if (strcmp(key, "with") == 0)
            return set_with(c, value);
    } else {
        XP_TRY(set_step_key(c, key, value, &known));
        if (known)
            return XP_OK;
        const int p = c->kind == XP_CASE_STAGE ? stage_param(c, key) : -1;
        if (p >= 0) /* of a vector set, whose operands are given: see xp_case_of_chain() */
            return set_param(c, &c->stage->param[p], value);
    }
    if (xp_dialect_has(key) && default_dialect(c))
        return set_field(c, key, value);
    return XP_FAIL(XP_E_ARG, "%s: %s has no such key", key,
                   c->kind == XP_CASE_STAGE   ? c->stage->name
                   : c->kind == XP_CASE_LAYER ? "layer"
                                              : "step");
}

void xp_case_defaults(xp_case_kind kind, const xp_stage *stage, xp_case *out) {
    static const char letters[] = "TEKHFSDVNGRQY";
    static const int64_t size[] = {24, 8, 2, 16, 12, 0, 0, 32, 100, 1, 8, 3, 1};
    memset(out, 0, sizeof *out);
    out->kind = kind;
    out->stage = stage;
    for (int i = 0; letters[i]; i++)
        out->dim[letters[i] - 'A'] = size[i];
    for (int g = 0; g < XP_NGROUP; g++)
        out->dtype[g] = XP_NDTYPE;
    out->dtype[XP_G_ACT] = XP_F32;
    /* A stage of the shared expert needs a layer that has one. */
    for (int i = 0; stage && stage->chain && i < stage->operands; i++) {
        if (strchr(stage->operand[i].shape, 'S'))
            out->dim['S' - 'A'] = 8;
    }
    out->shrink = out->layers = out->steps = out->align = out->micro = 1;
    out->seed = 1;
    (void)xp_mesh_spec_parse("sim:fsdp=1", &out->mesh);
}

/* ---- lines and their product ---- */

typedef struct {
    char key[24];
    int values;
    char value[MAX_VALUES][MAX_VALUE];
} list;

static xp_status list_add(list *l, const char *value) {
    if (l->values == MAX_VALUES)
        return XP_FAIL(XP_E_ARG, "%s: more than %d values", l->key, MAX_VALUES);
    if (strlen(value) >= MAX_VALUE)
        return XP_FAIL(XP_E_ARG, "%s: a value is longer than %d characters", l->key, MAX_VALUE - 1);
    strcpy(l->value[l->values++], value);
    return XP_OK;
}

/* Splits at commas; no value is empty. */
static xp_status split(const char *text, list *l) {
    char word[MAX_VALUE];
    for (const char *p = text;; p++) {
        const size_t n = strcspn(p, ",");
        if (n == 0 || n >= sizeof word)
            return XP_FAIL(XP_E_ARG, "%s: '%s' has an empty or overlong value", l->key, text);
        memcpy(word, p, n);
        word[n] = '\0';
        XP_TRY(list_add(l, word));
        p += n;
        if (!*p)
            return XP_OK;
    }
}

/* Appends ",item" (or ":item" at the start) to every one of the specs [from, to). */
static xp_status mesh_extend(list *l, int from, const list *alt, const char *key) {
    const int base = l->values;
    char joined[MAX_VALUE];
    list *made = calloc(1, sizeof *made);
    if (!made)
        return XP_FAIL(XP_E_NOMEM, "mesh: %zu bytes", sizeof *made);
    strcpy(made->key, l->key);
    xp_status st = XP_OK;
    for (int i = from; i < base && st == XP_OK; i++) {
        for (int a = 0; a < alt->values && st == XP_OK; a++) {
            const int first = l->value[i][strlen(l->value[i]) - 1] == ':';
            const int n =
                snprintf(joined, sizeof joined, "%s%s%s=%s", l->value[i], first ? "" : ",", key, alt->value[a]);
            st = n < (int)sizeof joined ? list_add(made, joined) : XP_FAIL(XP_E_ARG, "mesh: '%s' is too long", joined);
        }
    }
    l->values = from;
    for (int i = 0; i < made->values && st == XP_OK; i++)
        st = list_add(l, made->value[i]);
    free(made);
    return st;
}

/* "sim:fsdp=1,2,ep=2,sim:ep=4": keys inside a mesh are separated by the same comma; a word with ':' starts another
 * mesh. */
static xp_status split_mesh(const char *text, list *l) {
    list *word = calloc(2, sizeof *word), *alt = word + 1;
    char key[24] = "";
    int from = 0;
    xp_status st = XP_OK;
    if (!word)
        return XP_FAIL(XP_E_NOMEM, "mesh: %zu bytes", 2 * sizeof *word);
    strcpy(word->key, "mesh");
    XP_GOTO(out, split(text, word));
    if (!strchr(word->value[0], ':')) {
        st = XP_FAIL(XP_E_ARG, "mesh: '%s' names no kind, expected KIND:key=value,..., for example sim:fsdp=8", text);
        goto out;
    }
    for (int i = 0; i <= word->values; i++) {
        char *w = i < word->values ? word->value[i] : NULL;
        char *colon = w ? strchr(w, ':') : NULL, *item = colon ? colon + 1 : w, *eq = item ? strchr(item, '=') : NULL;
        if ((!w || eq || colon) && key[0]) {
            XP_GOTO(out, mesh_extend(l, from, alt, key));
            key[0] = '\0';
        }
        if (!w)
            break;
        if (colon) {
            const char after = colon[1];
            from = l->values;
            colon[1] = '\0';
            XP_GOTO(out, list_add(l, w));
            colon[1] = after;
        }
        if (eq && eq != item && (size_t)(eq - item) < sizeof key) {
            *eq = '\0';
            strcpy(key, item);
            alt->values = 0;
            XP_GOTO(out, list_add(alt, eq + 1));
        } else if (key[0] && !colon) {
            XP_GOTO(out, list_add(alt, w));
        } else if (*item || !colon) {
            st = XP_FAIL(XP_E_ARG, "mesh: '%s' in '%s' is not key=value", item, text);
            goto out;
        }
    }
out:
    free(word);
    return st;
}

static xp_status parse_key(const char *word, list *l) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz0123456789";
    const char *eq = strchr(word, '=');
    if (!eq || eq == word || (size_t)(eq - word) >= sizeof l->key || strspn(word, letters) != (size_t)(eq - word))
        return XP_FAIL(XP_E_ARG, "case: '%s' is not key=value", word);
    memcpy(l->key, word, (size_t)(eq - word));
    l->key[eq - word] = '\0';
    l->values = 0;
    return strcmp(l->key, "mesh") == 0 ? split_mesh(eq + 1, l) : split(eq + 1, l);
}

typedef struct {
    const list *lists;
    int keys;
    const char *from;
    int *number;
    xp_case_fn fn;
    void *arg;
} product;

static xp_status name_case(xp_case *c, const product *p) {
    char own[XP_CASE_OWN_NAME];
    if (!p->from)
        return XP_OK;
    if (strlen(p->from) >= sizeof c->name - sizeof own)
        return XP_FAIL(XP_E_ARG, "name: the file name '%s' is longer than %zu characters", p->from,
                       sizeof c->name - sizeof own - 1);
    ++*p->number;
    if (c->name[0])
        memcpy(own, c->name, sizeof own);
    else
        snprintf(own, sizeof own, "%d", *p->number);
    snprintf(c->name, sizeof c->name, "%s/%s", p->from, own);
    return XP_OK;
}

static xp_status emit(const product *p, const xp_case *base, int key) {
    if (key == p->keys) {
        xp_case c = *base;
        XP_TRY(xp_case_check(&c));
        XP_TRY(name_case(&c, p));
        return p->fn ? p->fn(&c, p->arg) : XP_OK;
    }
    for (int v = 0; v < p->lists[key].values; v++) {
        xp_case c = *base;
        XP_TRY(set_key(&c, p->lists[key].key, p->lists[key].value[v]));
        XP_TRY(emit(p, &c, key + 1));
    }
    return XP_OK;
}

static xp_status head(const char *word, xp_case *out) {
    if (strcmp(word, "layer") == 0 || strcmp(word, "step") == 0) {
        xp_case_defaults(word[0] == 'l' ? XP_CASE_LAYER : XP_CASE_STEP, NULL, out);
        return XP_OK;
    }
    const xp_stage *s = xp_stage_find(word);
    if (!s)
        return XP_FAIL(XP_E_ARG, "case: '%s' is neither a stage nor 'layer' nor 'step' (see `expar list stages`)",
                       word);
    xp_case_defaults(XP_CASE_STAGE, s, out);
    return XP_OK;
}

/* Names and lines go into reports and results files: ASCII only. */
static xp_status printable(const char *what, const char *text) {
    for (const char *p = text; *p; p++) {
        const unsigned char c = (unsigned char)*p;
        if (c != '\t' && (c < 0x20 || c > 0x7e))
            return XP_FAIL(XP_E_ARG, "%s: byte 0x%02x at column %d, expected ASCII text", what, c, (int)(p - text) + 1);
    }
    return XP_OK;
}

/* The first value of the key, or NULL. */
static const char *find_key(const list *lists, int keys, const char *key) {
    for (int i = 0; i < keys; i++) {
        if (strcmp(lists[i].key, key) == 0)
            return lists[i].value[0];
    }
    return NULL;
}

/* Names the longest list. */
static xp_status check_product(const list *lists, int keys) {
    int64_t cases = 1;
    int most = 0;
    for (int i = 0; i < keys; i++) {
        most = lists[i].values > lists[most].values ? i : most;
        if (cases <= MAX_PRODUCT)
            cases *= lists[i].values;
    }
    if (cases > MAX_PRODUCT)
        return XP_FAIL(XP_E_ARG, "%s: %d values, and with those of the other keys more than %d cases in one line",
                       lists[most].key, lists[most].values, MAX_PRODUCT);
    return XP_OK;
}

xp_status xp_case_expand(const char *line, const char *from, int *number, xp_case_fn fn, void *arg) {
    char text[LINE_BYTES], *save = NULL;
    int unused = 0, keys = 0;
    xp_case base;
    number = number ? number : &unused;
    if (strlen(line) >= sizeof text)
        return XP_FAIL(XP_E_ARG, "case: a line is longer than %d characters", LINE_BYTES - 1);
    XP_TRY(printable("case", line));
    XP_TRY(printable("name", from ? from : ""));
    strcpy(text, line);
    const char *word = strtok_r(text, " \t", &save);
    if (!word)
        return XP_FAIL(XP_E_ARG, "case: the line is empty");
    XP_TRY(head(word, &base));
    list *lists = calloc(MAX_KEYS, sizeof *lists);
    if (!lists)
        return XP_FAIL(XP_E_NOMEM, "case: %zu bytes", MAX_KEYS * sizeof *lists);
    xp_status st = XP_OK;
    while ((word = strtok_r(NULL, " \t", &save)) != NULL) {
        if (keys == MAX_KEYS) {
            st = XP_FAIL(XP_E_ARG, "case: more than %d keys", MAX_KEYS);
            goto out;
        }
        XP_GOTO(out, parse_key(word, &lists[keys]));
        for (int i = 0; i < keys; i++) {
            if (strcmp(lists[i].key, lists[keys].key) == 0) {
                st = XP_FAIL(XP_E_ARG, "%s: given twice", lists[i].key);
                goto out;
            }
        }
        keys++;
    }
    if (find_key(lists, keys, "dtype") && find_key(lists, keys, "act")) {
        st = XP_FAIL(XP_E_ARG, "act: '%s' with dtype '%s': dtype sets act too", find_key(lists, keys, "act"),
                     find_key(lists, keys, "dtype"));
        goto out;
    }
    XP_GOTO(out, check_product(lists, keys));
    /* The whole product is checked before the first of its cases is handed on. */
    int counted = *number;
    product p = {lists, keys, from, &counted, NULL, NULL};
    XP_GOTO(out, emit(&p, &base, 0));
    p = (product){lists, keys, from, number, fn, arg};
    if (fn)
        st = emit(&p, &base, 0);
    else
        *number = counted;
out:
    free(lists);
    return st;
}

/* ---- printing ---- */

static void put(char *buf, size_t bytes, const char *key, const char *value) {
    const size_t n = strlen(buf);
    snprintf(buf + n, bytes - n, " %s=%s", key, value);
}

static void put_int(char *buf, size_t bytes, const char *key, int64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)value);
    put(buf, bytes, key, text);
}

void xp_case_print(const xp_case *c, char *buf, size_t bytes) {
    xp_case d;
    char mesh[XP_MESH_TEXT], seed[24];
    xp_case_defaults(c->kind, c->stage, &d);
    snprintf(buf, bytes, "%s", c->kind == XP_CASE_STAGE ? c->stage->name : c->kind == XP_CASE_LAYER ? "layer" : "step");
    if (c->model[0])
        put(buf, bytes, "model", c->model);
    if (c->dialect[0])
        put(buf, bytes, "dialect", c->dialect);
    for (int i = 0; i < 26; i++) {
        const char key[2] = {(char)('A' + i), '\0'};
        if (c->dim_set[i])
            put_int(buf, bytes, key, c->dim[i]);
    }
    for (int g = 0; g < XP_NGROUP; g++) {
        if (c->dtype[g] != d.dtype[g])
            put(buf, bytes, group_names[g], xp_dtype_name(c->dtype[g]));
    }
    for (int i = 0; i < c->params; i++)
        put(buf, bytes, c->param[i].name, c->param[i].value);
    if (c->with[0])
        put(buf, bytes, "with", c->with);
    const struct {
        const char *key;
        int value, dflt;
    } ints[] = {{"shrink", c->shrink, 1},
                {"layers", c->layers, 1},
                {"steps", c->steps, 1},
                {"micro", c->micro, 1},
                {"deterministic", c->deterministic, 0},
                {"align", c->align, 1}};
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) {
        if (ints[i].value != ints[i].dflt)
            put_int(buf, bytes, ints[i].key, ints[i].value);
    }
    if (c->around) {
        char around[XP_AROUND_TEXT];
        xp_around_print(c->around, around, sizeof around);
        put(buf, bytes, "around", around);
    }
    if (c->order)
        put(buf, bytes, "order", order_names[c->order]);
    if (c->divide)
        put(buf, bytes, "divide", divide_names[c->divide]);
    put(buf, bytes, "data", xp_data_name(c->data));
    if (xp_mesh_spec_print(&c->mesh, mesh, sizeof mesh) == XP_OK)
        put(buf, bytes, "mesh", mesh);
    if (c->expect)
        put(buf, bytes, "expect", xp_expect_name(c->expect));
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)c->seed);
    put(buf, bytes, "seed", seed);
}

/* ---- refusing what cannot run ---- */

xp_status xp_case_check(const xp_case *c) {
    const int64_t E = c->dim['E' - 'A'], K = c->dim['K' - 'A'], S = c->dim['S' - 'A'];
    const int routed = c->kind != XP_CASE_STAGE || c->stage->chain;
    int chooses = routed;
    for (int i = 0; !chooses && i < c->stage->operands; i++)
        chooses = strchr(c->stage->operand[i].shape, 'K') != NULL;
    if (chooses && K > E && !c->model[0])
        return XP_FAIL(XP_E_ARG, "K: %lld slots a token, but E is %lld experts; K must not exceed E", (long long)K,
                       (long long)E);
    if (routed && !c->model[0] && (E < 1 || E % c->mesh.ep != 0))
        return XP_FAIL(XP_E_ARG, "E: %lld experts cannot be split over ep %d", (long long)E, c->mesh.ep);
    for (const char *width = "HFSD"; *width && c->model[0]; width++) {
        if (c->dim_set[*width - 'A'])
            return XP_FAIL(XP_E_ARG, "%c: %lld, expected none beside model=%s, which has its own (shrink=N divides it)",
                           *width, (long long)c->dim[*width - 'A'], c->model);
    }
    if (c->model[0] && routed && c->dim_set['R' - 'A'])
        return XP_FAIL(XP_E_ARG, "R: %lld, expected none beside model=%s, whose router has its own width",
                       (long long)c->dim['R' - 'A'], c->model);
    const unsigned of_shared = XP_SHARED_NORM | XP_SHARED_IN_NORM;
    const char *why = !c->around                                         ? NULL
                      : c->model[0]                                      ? "none beside model=, which has its own"
                      : c->around & XP_LATENT_NORM && !c->dim['D' - 'A'] ? "no latent_norm without a width D="
                      : c->around & of_shared && !S ? "no norm of a shared expert without a width S="
                                                    : NULL;
    if (why) {
        char around[XP_AROUND_TEXT];
        xp_around_print(c->around, around, sizeof around);
        return XP_FAIL(XP_E_ARG, "around: %s, expected %s", around, why);
    }
    /* A line for a vector set has no sizes: they are the tensors'. */
    const int sized = c->kind != XP_CASE_STAGE || c->dim_set['E' - 'A'] || c->dim_set['K' - 'A'];
    if (sized && ((routed && !c->model[0]) || (chooses && stage_param(c, "dialect") >= 0))) {
        xp_dialect d;
        XP_TRY(xp_case_dialect(c, &d));
        XP_TRY(xp_dialect_check(&d, E, K));
        if (d.shared_rows > 0 && xp_case_takes(c, 'S') && (S < d.shared_rows || S % d.shared_rows != 0))
            return XP_FAIL(XP_E_ARG, "S: %lld, expected a multiple of shared_rows %d", (long long)S, d.shared_rows);
        if (routed && c->dim_set['R' - 'A'] && d.router_in != XP_ROUTER_RECURRENT_MLP)
            return XP_FAIL(XP_E_ARG, "R: %lld, expected none where router_in is not recurrent_mlp",
                           (long long)c->dim['R' - 'A']);
    }
    if (c->align != 1 && c->align != 16 && c->align != 128)
        return XP_FAIL(XP_E_ARG, "align: %d is none of 1, 16, 128", c->align);
    return XP_OK;
}

/* ---- files ---- */

const char *xp_case_dir(void) {
    const char *dir = getenv("EXPAR_CASES");
    return dir && *dir ? dir : XP_CASES_DIR;
}

static void stem_of(const char *path, char *out, size_t bytes) {
    const char *base = strrchr(path, '/');
    snprintf(out, bytes, "%s", base ? base + 1 : path);
    char *dot = strrchr(out, '.');
    if (dot)
        *dot = '\0';
}

/* Tells a refusal of the line from a failure of what the caller does with its cases. */
typedef struct {
    xp_case_fn fn;
    void *arg;
    int failed;
} relay;

static xp_status pass_on(const xp_case *c, void *arg) {
    relay *r = arg;
    const xp_status st = r->fn(c, r->arg);
    r->failed = st != XP_OK;
    return st;
}

/* fn NULL: the lines are only checked. */
static xp_status read_cases(FILE *f, const char *path, xp_case_fn fn, void *arg) {
    relay to = {fn, arg, 0};
    char line[LINE_BYTES], stem[256];
    int number = 0;
    xp_status st = XP_OK;
    stem_of(path, stem, sizeof stem);
    for (int n = 1; st == XP_OK && fgets(line, sizeof line, f); n++) {
        if (!strchr(line, '\n') && !feof(f))
            return XP_FAIL(XP_E_FORMAT, "cases: %s:%d: longer than %d characters, or a zero byte", path, n,
                           LINE_BYTES - 2);
        line[strcspn(line, "#\r\n")] = '\0';
        if (line[strspn(line, " \t")] == '\0')
            continue;
        st = xp_case_expand(line, stem, &number, fn ? pass_on : NULL, &to);
        if (st == XP_E_ARG && !to.failed)
            st = XP_FAIL(XP_E_FORMAT, "cases: %s:%d: %s", path, n, xp_error_text());
    }
    if (st == XP_OK && ferror(f))
        st = XP_FAIL(XP_E_IO, "cases: %s: %s", path, strerror(errno));
    return st;
}

/* A wrong line is refused before the first case of the file runs. */
xp_status xp_case_file(const char *path, xp_case_fn fn, void *arg) {
    FILE *f = fopen(path, "r");
    if (!f)
        return XP_FAIL(XP_E_IO, "cases: %s: %s", path, strerror(errno));
    xp_status st = read_cases(f, path, NULL, NULL);
    if (st == XP_OK && fn) {
        rewind(f);
        st = read_cases(f, path, fn, arg);
    }
    fclose(f);
    return st;
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int is_case_file(const char *name) {
    const size_t n = strlen(name);
    return n > 4 && strcmp(name + n - 4, ".txt") == 0 && name[0] != '.';
}

/* The case files of the directory in name order; the caller frees each. */
static xp_status file_names(char **name, int *out_names) {
    DIR *d = opendir(xp_case_dir());
    *out_names = 0;
    if (!d)
        return XP_FAIL(XP_E_IO, "cases: %s: %s", xp_case_dir(), strerror(errno));
    xp_status st = XP_OK;
    for (struct dirent *e; st == XP_OK && (e = readdir(d)) != NULL;) {
        if (!is_case_file(e->d_name))
            continue;
        if (*out_names == MAX_FILES)
            st = XP_FAIL(XP_E_IO, "cases: %s holds more than %d files", xp_case_dir(), MAX_FILES);
        else if (!(name[*out_names] = malloc(strlen(e->d_name) + 1)))
            st = XP_FAIL(XP_E_NOMEM, "cases: a file name");
        else
            strcpy(name[(*out_names)++], e->d_name);
    }
    closedir(d);
    qsort(name, (size_t)*out_names, sizeof *name, by_name);
    return st;
}

static xp_status file_in_dir(const char *name, xp_case_fn fn, void *arg) {
    char path[1024];
    if (snprintf(path, sizeof path, "%s/%s", xp_case_dir(), name) >= (int)sizeof path)
        return XP_FAIL(XP_E_IO, "cases: %s/%s: the path is longer than %zu characters", xp_case_dir(), name,
                       sizeof path - 1);
    return xp_case_file(path, fn, arg);
}

xp_status xp_case_all(xp_case_fn fn, void *arg) {
    char *name[MAX_FILES];
    int names;
    xp_status st = file_names(name, &names);
    for (int i = 0; st == XP_OK && i < names; i++)
        st = file_in_dir(name[i], NULL, NULL);
    for (int i = 0; i < names; i++) {
        if (st == XP_OK)
            st = file_in_dir(name[i], fn, arg);
        free(name[i]);
    }
    return st;
}

int xp_glob(const char *pattern, const char *name) {
    /* Backtracks to the latest star only: linear in practice, no recursion. */
    const char *star = NULL, *mark = NULL;
    while (*name) {
        if (*pattern == '*') {
            star = pattern++;
            mark = name;
        } else if (*pattern == '?' || *pattern == *name) {
            pattern++;
            name++;
        } else if (star) {
            pattern = star + 1;
            name = ++mark;
        } else {
            return 0;
        }
    }
    while (*pattern == '*')
        pattern++;
    return *pattern == '\0';
}
