/* The family records, all of them: what each class writes is read as the class builds it; of files made from the record
 * itself every key is missed, mistyped, called by its other names and contradicted by them; and the fields that look
 * like others' and are not. */
#include "families.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "config.h"
#include "config_saved.h"

static xp_model model, other;

static void has(const char *about, const char *part) {
    if (!strstr(xp_error_text(), part))
        fail_msg("%s: expected '%s' in: %s", about, part, xp_error_text());
}

static xp_status parse(const json_t *root, xp_model *m) {
    char *text = json_dumps(root, 0);
    assert_non_null(text);
    const xp_status st = xp_config_parse(text, strlen(text), "f.json", m);
    free(text);
    return st;
}

static void accept(const char *about, const json_t *root, xp_model *m) {
    if (parse(root, m) != XP_OK)
        fail_msg("%s: %s", about, xp_error_text());
}

static void refuse(const char *about, const json_t *root, const char *part) {
    if (parse(root, &other) != XP_E_FORMAT)
        fail_msg("%s: taken, expected '%s'", about, part);
    has(about, part);
}

static const xp_family *family_of(const char *type) {
    for (const xp_family *f = xp_families; f->model_type; f++) {
        if (strcmp(f->model_type, type) == 0)
            return f;
    }
    fail_msg("no family %s", type);
    return NULL;
}

/* ---- what the classes write ---- */

static json_t *saved_root(size_t i) {
    char text[1200];
    assert_true(strlen(saved_config[i].json) < sizeof text);
    snprintf(text, sizeof text, "%s", saved_config[i].json);
    for (char *p = text; *p; p++) {
        if (*p == '\'')
            *p = '"';
    }
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(root);
    return root;
}

static void files_of_the_classes(void **state) {
    (void)state;
    for (size_t i = 0; i < SAVED_CONFIGS; i++) {
        json_t *root = saved_root(i);
        const char *type = json_string_value(json_object_get(root, "model_type"));
        accept(type, root, &model);
        if (model.H != 64 || model.layers != 4 || model.vocab != 1000)
            fail_msg("%s: H %d, %d layers, vocabulary %d", type, (int)model.H, model.layers, (int)model.vocab);
        if (xp_model_moe_layers(&model) != saved_config[i].moe || model.E != saved_config[i].E ||
            model.K != saved_config[i].K || model.F != saved_config[i].F || model.S != saved_config[i].S)
            fail_msg("%s: %d blocks, E %d, K %d, F %d, S %d", type, xp_model_moe_layers(&model), (int)model.E,
                     (int)model.K, (int)model.F, (int)model.S);
        if (model.dialect.letter != saved_config[i].letter || model.dialect.scale != saved_config[i].scale ||
            model.dialect.aux_coef != saved_config[i].aux)
            fail_msg("%s: dialect %c, scale %g, balance %g", type, model.dialect.letter, model.dialect.scale,
                     model.dialect.aux_coef);
        json_decref(root);
    }
}

/* The object of the fields is a file of its own where the family says so: the same model. */
static void text_alone(void **state) {
    int files = 0;
    (void)state;
    for (size_t i = 0; i < SAVED_CONFIGS; i++) {
        json_t *root = saved_root(i), *fields = json_object_get(root, "text_config");
        const xp_family *f = family_of(json_string_value(json_object_get(root, "model_type")));
        if (f->text) {
            accept(f->model_type, root, &model);
            json_object_set_new(fields, "model_type", json_string(f->text));
            accept(f->text, fields, &other);
            memset(model.unread, 0, sizeof model.unread);
            memset(other.unread, 0, sizeof other.unread);
            assert_memory_equal(&model, &other, sizeof model);
            json_object_set_new(fields, "text_config", json_pack("{si}", "num_experts", 8));
            refuse(f->text, fields, "num_experts");
            files++;
        }
        json_decref(root);
    }
    for (const xp_family *f = xp_families; f->model_type; f++)
        files -= f->text != NULL;
    assert_int_equal(files, 0);
}

/* The words that a class writes are those it takes when there are none. */
static void words_by_default(void **state) {
    int lists = 0;
    (void)state;
    for (size_t i = 0; i < SAVED_CONFIGS; i++) {
        json_t *root = saved_root(i), *fields = json_object_get(root, "text_config");
        const char *type = json_string_value(json_object_get(root, "model_type"));
        fields = fields ? fields : root;
        accept(type, root, &model);
        if (family_of(type)->slot[XP_SLOT_TYPES].from != XP_SLOT_KEY && json_object_get(fields, "mlp_layer_types")) {
            json_object_del(fields, "mlp_layer_types");
            accept(type, root, &other);
            for (int n = 0; n < model.layers; n++) {
                if (model.moe[n] != other.moe[n])
                    fail_msg("%s: layer %d", type, n);
            }
            lists++;
        }
        json_decref(root);
    }
    assert_true(lists > 15);
}

/* Every family whose files are read has one of them, or says here why not. */
static void no_family_is_left_out(void **state) {
    (void)state;
    static const char *const without[] = {"kimi_k2" /* deepseek_v3's class */, "switch_transformers", "expar"};
    for (const xp_family *f = xp_families; f->model_type; f++) {
        int found = f->refused != NULL;
        for (size_t i = 0; i < sizeof without / sizeof *without; i++)
            found |= strcmp(without[i], f->model_type) == 0;
        for (size_t i = 0; i < SAVED_CONFIGS && !found; i++) {
            json_t *root = saved_root(i);
            found = strcmp(json_string_value(json_object_get(root, "model_type")), f->model_type) == 0;
            json_decref(root);
        }
        if (!found)
            fail_msg("%s: no file", f->model_type);
    }
    for (const xp_family *f = xp_families; f->model_type; f++) {
        for (const xp_family *g = xp_families; g != f; g++)
            assert_string_not_equal(f->model_type, g->model_type);
    }
}

/* ---- files made from the records ---- */

/* Name n of a list with '|' between them, in buf; NULL past the end. */
static const char *name_of(const char *list, int n, char *buf, size_t bytes) {
    for (; n > 0 && list; n--) {
        list = strchr(list, '|');
        list = list ? list + 1 : NULL;
    }
    if (!list)
        return NULL;
    snprintf(buf, bytes, "%.*s", (int)strcspn(list, "|"), list);
    return buf;
}

/* A value that the slot takes. */
static json_t *good_value(const xp_family *f, xp_slot s) {
    static const double number[XP_NSLOT] = {
        [XP_SLOT_HIDDEN] = 64, [XP_SLOT_LAYERS] = 6,        [XP_SLOT_EXPERTS] = 16,     [XP_SLOT_TOPK] = 2,
        [XP_SLOT_WIDTH] = 48,  [XP_SLOT_SHARED] = 40,       [XP_SLOT_SHARED_COUNT] = 2, [XP_SLOT_DENSE] = 96,
        [XP_SLOT_STEP] = 1,    [XP_SLOT_FIRST] = 1,         [XP_SLOT_LAST] = 4,         [XP_SLOT_PERIOD] = 2,
        [XP_SLOT_OFFSET] = 1,  [XP_SLOT_GROUPS] = 4,        [XP_SLOT_TOPK_GROUPS] = 3,  [XP_SLOT_NULLS] = 4,
        [XP_SLOT_LATENT] = 32, [XP_SLOT_VOCAB] = 1000,      [XP_SLOT_HASH] = 2,         [XP_SLOT_CAPACITY] = 64,
        [XP_SLOT_FURTHER] = 0, [XP_SLOT_ROUTER_WIDTH] = 40,
    };
    static const double real[XP_NSLOT] = {
        [XP_SLOT_SCALE] = 1.75,        [XP_SLOT_LIMIT] = 6.5,   [XP_SLOT_ALPHA] = 1.5,    [XP_SLOT_SOFTCAP] = 30.5,
        [XP_SLOT_GATE_CAP] = 3.5,      [XP_SLOT_UP_CAP] = 20.5, [XP_SLOT_SUM_EPS] = 1e-9, [XP_SLOT_MARGIN] = 0.25,
        [XP_SLOT_EPS] = 3e-6,          [XP_SLOT_AUX] = 0.125,   [XP_SLOT_Z] = 0.375,      [XP_SLOT_EXPERT_EPS] = 5e-8,
        [XP_SLOT_LOGIT_SCALE] = 0.625,
    };
    char word[64];
    switch (s) {
    case XP_SLOT_NORM:
    case XP_SLOT_SELECT_BIAS:
        return json_true();
    case XP_SLOT_ROUTER_BIAS:
        return json_false();
    case XP_SLOT_METHOD:
        return json_string(name_of(f->methods, 0, word, sizeof word));
    case XP_SLOT_PRESET:
        return json_string("hf-5.24/mixtral");
    case XP_SLOT_ACT:
        return json_string(name_of(f->act ? f->act : "silu", 0, word, sizeof word));
    case XP_SLOT_COMBINE:
        return json_string("sum");
    case XP_SLOT_DTYPE:
        return json_string("bfloat16");
    case XP_SLOT_JITTER:
        return json_integer(0);
    case XP_SLOT_DENSE_LAYERS:
    case XP_SLOT_LIMITS:
    case XP_SLOT_LIMITS_SHARED:
        return json_array();
    case XP_SLOT_LIST:
        return json_pack("[ii]", 1, 2);
    case XP_SLOT_TYPES:
        name_of(f->sparse, 0, word, sizeof word);
        return json_pack("[ssssss]", "dense", word, word, "dense", word, word);
    default:
        return real[s] > 0 ? json_real(real[s]) : json_integer((json_int_t)number[s]);
    }
}

/* The object that holds a family's fields, made in root. */
static json_t *fields_of(const xp_family *f, json_t *root) {
    char path[64];
    if (!f->inside || strcmp(f->inside, ".") == 0)
        return root;
    snprintf(path, sizeof path, "%.*s", (int)strcspn(f->inside, "|"), f->inside);
    char *save = NULL;
    for (char *part = strtok_r(path, ".", &save); part; part = strtok_r(NULL, ".", &save)) {
        json_t *inner = json_object();
        assert_int_equal(json_object_set_new(root, part, inner), 0);
        root = inner;
    }
    return root;
}

/* The object or list of fields in which a key lies, made if need be; *key becomes its name there. */
static json_t *holder(json_t *fields, const char **key) {
    for (const char *dot; (dot = strchr(*key, '.')) != NULL; *key = dot + 1) {
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)(dot - *key), *key);
        json_t *inner = json_object_get(fields, name);
        if (!inner)
            json_object_set_new(fields, name, inner = strcmp(dot, ".0") == 0 ? json_pack("[n]") : json_object());
        fields = inner;
    }
    return fields;
}

static void put(json_t *fields, const char *key, json_t *v) {
    json_t *in = holder(fields, &key);
    if (json_is_array(in) && json_array_size(in) == 0)
        assert_int_equal(json_array_append_new(in, v), 0);
    else if (json_is_array(in))
        assert_int_equal(json_array_set_new(in, 0, v), 0);
    else
        assert_int_equal(json_object_set_new(in, key, v), 0);
}

static void drop(json_t *fields, const char *key) {
    json_t *in = holder(fields, &key);
    if (json_is_array(in))
        json_array_clear(in);
    json_object_del(in, key);
}

/* A file with every key that the record must have, under its first name; *fields is borrowed. */
static json_t *made_file(const xp_family *f, json_t **fields) {
    json_t *root = json_object();
    json_object_set_new(root, "model_type", json_string(f->model_type));
    *fields = fields_of(f, root);
    for (int s = 0; s < XP_NSLOT; s++) {
        char key[64];
        if (f->slot[s].from == XP_SLOT_KEY)
            put(*fields, name_of(f->slot[s].keys, 0, key, sizeof key), good_value(f, (xp_slot)s));
    }
    char entry[128];
    for (int n = 0; f->only && name_of(f->only, n, entry, sizeof entry); n++) {
        char *eq = strchr(entry, '=');
        if (entry[0] != '+')
            continue;
        *eq = '\0';
        put(*fields, entry + 1, json_loads(eq + 1, JSON_DECODE_ANY, NULL));
    }
    return root;
}

/* The numbers of the model that the file's own slots give. */
static void numbers_arrive(const xp_family *f) {
    const xp_slot_source *slot = f->slot;
    const struct {
        xp_slot s;
        double got;
    } field[] = {
        {XP_SLOT_HIDDEN, (double)model.H},
        {XP_SLOT_EXPERTS, (double)model.E},
        {XP_SLOT_TOPK, (double)model.K},
        {XP_SLOT_WIDTH, (double)model.F},
        {XP_SLOT_DENSE, (double)model.dense_F},
        {XP_SLOT_VOCAB, (double)model.vocab},
        {XP_SLOT_ROUTER_WIDTH, (double)model.router_width},
        {XP_SLOT_EPS, model.norm_eps},
        {XP_SLOT_EXPERT_EPS, model.expert_eps},
        {XP_SLOT_LATENT, (double)model.latent},
        {XP_SLOT_LOGIT_SCALE, model.dialect.logit_scale},
        {XP_SLOT_SCALE, model.dialect.scale},
        {XP_SLOT_LIMIT, model.dialect.limit},
        {XP_SLOT_ALPHA, model.dialect.act_alpha},
        {XP_SLOT_SOFTCAP, model.dialect.logit_softcap},
        {XP_SLOT_GATE_CAP, model.dialect.gate_cap},
        {XP_SLOT_UP_CAP, model.dialect.up_cap},
        {XP_SLOT_NULLS, model.dialect.null_experts},
        {XP_SLOT_AUX, model.dialect.aux_coef},
        {XP_SLOT_Z, model.dialect.z_coef},
        {XP_SLOT_MARGIN, model.dialect.sparse_eps},
        {XP_SLOT_CAPACITY, model.dialect.capacity},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        const xp_slot s = field[i].s;
        json_t *v = good_value(f, s);
        const double want = slot[s].from == XP_SLOT_KEY ? json_number_value(v) : slot[s].value;
        json_decref(v);
        if (slot[s].from == XP_SLOT_KEY && field[i].got != want)
            fail_msg("%s: %s gives %g, expected %g", f->model_type, slot[s].keys, field[i].got, want);
        if (slot[s].from == XP_SLOT_OPTIONAL && field[i].got != want)
            fail_msg("%s: %s absent gives %g, expected %g", f->model_type, slot[s].keys, field[i].got, want);
    }
    assert_true(slot[XP_SLOT_AROUND].from != XP_SLOT_NONE || model.around == f->around);
    if (slot[XP_SLOT_GROUPS].from == XP_SLOT_KEY && model.dialect.group_reduce != XP_GROUP_NONE)
        assert_true(model.dialect.n_group == 4 && model.dialect.topk_group == 3);
}

static void made_files_are_taken(void **state) {
    (void)state;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        json_t *fields;
        if (f->refused)
            continue;
        json_t *root = made_file(f, &fields);
        accept(f->model_type, root, &model);
        assert_string_equal(model.model_type, f->model_type);
        numbers_arrive(f);
        for (int s = 0; s < XP_NSLOT; s++) {
            char key[64], line[96];
            if (f->slot[s].from != XP_SLOT_OPTIONAL)
                continue;
            snprintf(line, sizeof line, "%s absent, taken as ", name_of(f->slot[s].keys, 0, key, sizeof key));
            if (!strstr(model.assumed, line))
                fail_msg("%s: '%s' is not told", f->model_type, line);
        }
        json_decref(root);
    }
}

/* Each key that must be there: absent, null, an object. */
static void keys_are_missed(void **state) {
    int keys = 0;
    (void)state;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        for (int s = 0; s < XP_NSLOT && !f->refused; s++) {
            json_t *fields;
            char key[64], about[128], want[160];
            if (f->slot[s].from != XP_SLOT_KEY)
                continue;
            json_t *root = made_file(f, &fields);
            name_of(f->slot[s].keys, 0, key, sizeof key);
            snprintf(about, sizeof about, "%s without %s", f->model_type, key);
            drop(fields, key);
            snprintf(want, sizeof want, "no field '%s'", key);
            refuse(about, root, want);
            put(fields, key, json_null());
            if (s == XP_SLOT_TYPES)
                refuse(about, root, want); /* the classes take the other way to say it then */
            else
                refuse(about, root, (snprintf(want, sizeof want, "f.json: %s is null, expected", key), want));
            put(fields, key, json_object());
            refuse(about, root, (snprintf(want, sizeof want, "f.json: %s is {}, expected", key), want));
            json_decref(root);
            keys++;
        }
    }
    assert_true(keys > 500);
}

/* A value that is not good_value's and that the slot's kind admits. */
static json_t *second_value(const xp_family *f, xp_slot s) {
    json_t *v = good_value(f, s), *out;
    if (json_is_integer(v))
        out = json_integer(json_integer_value(v) + 1);
    else if (json_is_real(v))
        out = json_real(json_real_value(v) * 2);
    else if (json_is_boolean(v))
        out = json_boolean(!json_is_true(v));
    else
        out = json_string("another");
    json_decref(v);
    return out;
}

/* Every other name of a key says the same, and contradicts the first where it says something else. */
static void other_names(void **state) {
    int names = 0;
    (void)state;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        for (int s = 0; s < XP_NSLOT && !f->refused; s++) {
            char first[64], alias[64], about[160];
            if (f->slot[s].from != XP_SLOT_KEY)
                continue;
            name_of(f->slot[s].keys, 0, first, sizeof first);
            for (int n = 1; name_of(f->slot[s].keys, n, alias, sizeof alias); n++) {
                json_t *fields, *root = made_file(f, &fields);
                accept(f->model_type, root, &model);
                snprintf(about, sizeof about, "%s with %s for %s", f->model_type, alias, first);
                drop(fields, first);
                put(fields, alias, good_value(f, (xp_slot)s));
                accept(about, root, &other);
                if (memcmp(&model, &other, sizeof model) != 0)
                    fail_msg("%s: another model", about);
                put(fields, first, good_value(f, (xp_slot)s));
                accept(about, root, &other);
                put(fields, alias, second_value(f, (xp_slot)s));
                if (s != XP_SLOT_TYPES)
                    refuse(about, root, "contradict one another");
                json_decref(root);
                names++;
            }
        }
    }
    assert_true(names > 50);
}

/* A key that no slot has, in every object on the way to the fields; an absent object. */
static void strangers(void **state) {
    (void)state;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        json_t *fields;
        char path[64];
        if (f->refused)
            continue;
        json_t *root = made_file(f, &fields);
        put(fields, "num_fancy_experts", json_integer(3));
        refuse(f->model_type, root, "key 'num_fancy_experts' (3) speaks of experts or routing");
        drop(fields, "num_fancy_experts");
        json_object_set_new(root, "num_fancy_experts", json_integer(3));
        refuse(f->model_type, root, "key 'num_fancy_experts' (3) speaks of experts or routing");
        json_object_del(root, "num_fancy_experts");
        json_object_set_new(root, "architectures", json_pack("[s]", "FancyForCausalLM"));
        refuse(f->model_type, root, "they contradict one another (expected names that begin with");
        json_object_del(root, "architectures");
        if (fields != root) {
            json_object_set_new(root, "a_stranger", json_integer(1));
            accept(f->model_type, root, &model);
            assert_non_null(strstr(model.unread, "a_stranger"));
            json_object_del(root, name_of(f->inside, 0, path, sizeof path));
            path[strcspn(path, ".")] = '\0';
            json_object_set_new(root, path, json_integer(1));
            refuse(f->model_type, root, "is 1, expected an object");
            json_object_del(root, path);
            refuse(f->model_type, root,
                   strstr(f->inside, "|.") ? "no field 'hidden_size'" : "has its fields inside it");
        }
        json_decref(root);
    }
}

/* Keys that may say certain things only. */
static void only_what_is_built(void **state) {
    int entries = 0;
    (void)state;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        char entry[128], want[192];
        for (int n = 0; f->only && name_of(f->only, n, entry, sizeof entry); n++) {
            json_t *fields, *root = made_file(f, &fields);
            char *eq = strchr(entry, '=');
            assert_non_null(eq);
            *eq = '\0';
            char *save = NULL;
            const char *key = entry + (entry[0] == '+');
            for (char *v = strtok_r(eq + 1, ",", &save); v; v = strtok_r(NULL, ",", &save)) {
                put(fields, key, json_loads(v, JSON_DECODE_ANY, NULL));
                accept(f->model_type, root, &model);
            }
            put(fields, key, json_integer(3));
            snprintf(want, sizeof want, "%s is 3, expected", key);
            refuse(f->model_type, root, want);
            has(f->model_type, "anything else is not built for a");
            if (entry[0] == '+') {
                drop(fields, key);
                snprintf(want, sizeof want, "%s is missing, expected ", key);
                refuse(f->model_type, root, want);
            }
            json_decref(root);
            entries++;
        }
    }
    assert_true(entries >= 9);
}

static void what_is_not_built_says_so(void **state) {
    static const char *const expected[][2] = {
        {"doge", "is_moe"},
        {"nllb-moe", "num_experts"},
    };
    int refused = 0;
    (void)state;
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        char want[96];
        json_t *root = json_pack("{ss}", "model_type", expected[i][0]);
        snprintf(want, sizeof want, "model_type is \"%s\", which is not built: ", expected[i][0]);
        refuse(expected[i][0], root, want);
        has(expected[i][0], expected[i][1]);
        json_decref(root);
    }
    for (const xp_family *f = xp_families; f->model_type; f++)
        refused += f->refused != NULL;
    assert_int_equal(refused, sizeof expected / sizeof *expected);
    json_t *root = json_pack("{ss}", "model_type", "no_such");
    refuse("no_such", root, "expected one of qwen3_moe, qwen2_moe, mixtral");
    assert_null(strstr(xp_error_text(), "doge")); /* nor a list of what is refused anyway */
    json_decref(root);
}

/* ---- fields that are not what they look like ---- */

/* A file made for the family with one key more, or another value of it. */
static xp_status with(const char *type, const char *key, const char *value, xp_model *m) {
    json_t *fields, *root = made_file(family_of(type), &fields);
    if (value)
        put(fields, key, json_loads(value, JSON_DECODE_ANY, NULL));
    const xp_status st = parse(root, m);
    json_decref(root);
    return st;
}

/* The class reads none of these: another value is another text, and the same model. */
static void unread_by_the_class(void **state) {
    static const struct {
        const char *type, *key, *value[2];
    } row[] = {
        {"deepseek_v2", "norm_topk_prob", {"true", "false"}},
        {"deepseek_v4", "norm_topk_prob", {"true", "false"}},
        {"deepseek_v4", "n_shared_experts", {"1", "5"}},
        {"nemotron_h", "n_shared_experts", {"1", "5"}},
        {"longcat_flash", "router_bias", {"true", "false"}},
        {"longcat_flash", "norm_topk_prob", {"true", "false"}},
        {"deepseek_v3", "moe_layer_freq", {"1", "3"}},
        {"deepseek_v32", "moe_layer_freq", {"1", "3"}},
        {"kimi_linear", "moe_layer_freq", {"1", "3"}},
        {"mimo_v2_flash", "moe_layer_freq", {"1", "[0, 1, 1, 1, 1, 1]"}},
        {"glm4_moe_lite", "first_k_dense_replace", {"1", "3"}},
        {"hy_v3", "first_k_dense_replace", {"1", "3"}},
        {"hy_v4", "first_k_dense_replace", {"1", "3"}},
        {"solar_open", "first_k_dense_replace", {"1", "3"}},
        {"hy_v3", "enable_moe_fp32_combine", {"true", "false"}},
        {"deepseek_v3", "aux_loss_alpha", {"0.001", "0.5"}},
        {"deepseek_v3", "scoring_func", {"\"sigmoid\"", "\"softmax\""}},
        {"qwen3_vl_moe", "norm_topk_prob", {"true", "false"}},
        {"llama4", "router_aux_loss_coef", {"0.001", "0.5"}},
        {"minimax_m3_vl", "n_shared_experts", {"1", "5"}},
        {"inkling_mm_model", "shared_expert_sink", {"true", "false"}},
        {"inkling_mm_model", "rms_norm_eps_moe_gate", {"1e-6", "0.5"}},
        {"jetmoe", "rms_norm_eps", {"1e-5", "0.5"}},
        {"muse_spark", "qk_scale_factor", {"1", "5.5"}},
    };
    (void)state;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        for (int n = 0; n < 2; n++) {
            xp_model *m = n ? &other : &model;
            if (with(row[i].type, row[i].key, row[i].value[n], m) != XP_OK)
                fail_msg("%s with %s: %s", row[i].type, row[i].key, xp_error_text());
            if (!strstr(m->unread, row[i].key))
                fail_msg("%s: %s is not told", row[i].type, row[i].key);
        }
        if (memcmp(&model, &other, sizeof model) != 0)
            fail_msg("%s: %s changes something", row[i].type, row[i].key);
    }
}

/* Two ways to say the widths of an Inkling: where a file has dense_intermediate_size, intermediate_size is that of an
 * expert. */
static void widths_of_inkling(void **state) {
    json_t *fields, *root = made_file(family_of("inkling_mm_model"), &fields);
    (void)state;
    accept("as the class saves it", root, &model);
    assert_true(model.F == 48 && model.dense_F == 96 && model.S == 2 * 48 && model.dialect.shared_rows == 2);
    assert_true(xp_model_moe_layers(&model) == 6);
    json_object_set_new(fields, "dense_intermediate_size", json_null());
    accept("with null", root, &model);
    assert_true(model.F == 48 && model.dense_F == 96);
    json_object_set_new(fields, "dense_intermediate_size", json_integer(200));
    refuse("both", root, "intermediate_size 96 and moe_intermediate_size 48 contradict one another");
    json_object_del(fields, "moe_intermediate_size");
    accept("as it is published", root, &model);
    assert_true(model.F == 96 && model.dense_F == 200 && model.S == 2 * 96);
    json_object_set_new(fields, "dense_intermediate_size", json_integer(0));
    refuse("a width of 0", root, "dense_intermediate_size is 0, expected an integer from 1");
    json_object_set_new(fields, "dense_intermediate_size", json_integer(200));
    json_object_del(fields, "intermediate_size");
    refuse("no width", root, "no field 'intermediate_size'");
    json_object_set_new(fields, "intermediate_size", json_integer(96));
    json_object_set_new(fields, "n_shared_experts", json_integer(0));
    refuse("none", root, "n_shared_experts is 0, expected an integer from 1: the router of a inkling_mm_model");
    json_object_set_new(fields, "n_shared_experts", json_integer(3));
    json_object_set_new(fields, "dense_mlp_idx", json_integer(4));
    accept("dense first", root, &model);
    assert_true(xp_model_moe_layers(&model) == 2 && model.dialect.shared_rows == 3 && model.S == 3 * 96);
    json_decref(root);
}

/* And the same names where they are read: another value is another model. */
static void read_by_the_class(void **state) {
    static const struct {
        const char *type, *key, *value[2];
    } row[] = {
        {"deepseek_v3", "norm_topk_prob", {"true", "false"}},
        {"mistral4", "norm_topk_prob", {"true", "false"}},
        {"flint", "norm_topk_prob", {"true", "false"}},
        {"kolibri1", "norm_topk_prob", {"true", "false"}},
        {"lara_mini", "norm_topk_prob", {"true", "false"}},
        {"deepseek_v3", "n_shared_experts", {"1", "5"}},
        {"switch_transformers", "router_bias", {"true", "false"}},
        {"axk1", "moe_layer_freq", {"1", "3"}},
        {"axk2", "moe_layer_freq", {"1", "3"}},
        {"dots3_note", "moe_layer_freq", {"1", "3"}},
        {"deepseek_v3", "first_k_dense_replace", {"1", "3"}},
        {"glm_moe_dsa", "first_k_dense_replace", {"1", "3"}},
        {"axk2", "first_k_dense_replace", {"1", "3"}},
        {"mistral_large4", "first_k_dense_replace", {"1", "3"}},
        {"glm4v_moe", "router_aux_loss_coef", {"0.001", "0.5"}},
        {"laguna", "moe_router_logit_softcapping", {"0", "30"}},
        {"laguna", "moe_routed_scaling_factor", {"1", "2.5"}},
        {"inkling2", "mlp_gate_softcap", {"4", "2"}},
        {"inkling_mm_model", "n_shared_experts", {"1", "2"}},
        {"inkling_mm_model", "dense_mlp_idx", {"0", "2"}},
        {"inkling_mm_model", "route_scale", {"8", "1"}},
        {"hy_v4", "swiglu_limit", {"10", "7"}},
        {"cohere2_moe", "shared_expert_combination_strategy", {"\"sum\"", "\"average\""}},
        {"dots3_note", "shared_experts_intermediate_size", {"40", "80"}},
        {"zaya", "router_hidden_size", {"40", "80"}},
        {"muse_spark", "moe_hidden_size", {"40", "64"}}, /* as wide as the block, and two maps all the same */
        {"muse_spark", "output_multiplier", {"1", "0.5"}},
        {"muse_spark", "post_norm_eps", {"1e-8", "1e-5"}},
        {"muse_spark", "routed_scaling_factor", {"1", "2.5"}},
        {"jetmoe", "aux_loss_coef", {"0", "0.01"}},
        {"expar", "moe_around", {"\"expert_norm\"", "\"out_bias+expert_norm\""}},
    };
    (void)state;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        for (int n = 0; n < 2; n++) {
            if (with(row[i].type, row[i].key, row[i].value[n], n ? &other : &model) != XP_OK)
                fail_msg("%s with %s: %s", row[i].type, row[i].key, xp_error_text());
        }
        memset(model.unread, 0, sizeof model.unread);
        memset(other.unread, 0, sizeof other.unread);
        if (memcmp(&model, &other, sizeof model) == 0)
            fail_msg("%s: %s changes nothing", row[i].type, row[i].key);
    }
}

/* A name of one family that is none in another, though the same thing is meant: the class would go on with its
 * default. */
static void names_that_are_no_aliases(void **state) {
    static const char *const row[][2] = {
        {"deepseek_v3", "num_experts"},
        {"dots1", "num_experts"},
        {"solar_open", "num_experts"},
        {"step3p7", "num_experts"},
        {"axk1", "num_experts"},
        {"axk2", "num_experts"},
        {"hy_v4", "num_experts"},
        {"glm5_next", "num_experts"},
        {"exaone_moe", "n_routed_experts"},
        {"kimi_linear", "n_routed_experts"},
        {"bailing_hybrid", "n_routed_experts"},
        {"beam", "n_routed_experts"},
        {"qwen2_moe", "num_local_experts"},
        {"flint", "num_local_experts"},
        {"laguna", "num_local_experts"},
        {"lara_mini", "num_local_experts"},
        {"aria", "num_experts"},
        {"granitemoehybrid", "num_experts"},
        {"laguna", "routed_scaling_factor"},
        {"inkling2", "num_experts"},
        {"inkling_mm_model", "num_experts"},
        {"deepseek_ocr2", "num_local_experts"},
        {"zaya", "num_local_experts"},
        {"zaya", "n_routed_experts"},
        {"jetmoe", "num_experts"},
        {"jetmoe", "router_aux_loss_coef"},
        {"muse_spark", "num_experts"},
        {"muse_spark", "n_routed_experts"},
    };
    static const char *const taken[][2] = {
        {"deepseek_v32", "num_experts"},
        {"glm_moe_dsa", "num_experts"},
        {"sarvam_mla", "num_experts"},
        {"sarvam_moe", "num_experts"},
        {"mistral_large4", "num_experts"},
        {"deepseek_ocr2", "num_experts"},
        {"mellum", "num_local_experts"},
        {"kolibri1", "num_local_experts"},
        {"openai_privacy_filter", "num_experts"},
        {"bailing_hybrid", "num_local_experts"},
        {"minimax", "num_experts"},
        {"inkling_mm_model", "num_local_experts"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        char want[96];
        if (with(row[i][0], row[i][1], "16", &model) != XP_E_FORMAT)
            fail_msg("%s takes %s", row[i][0], row[i][1]);
        snprintf(want, sizeof want, "key '%s' (16) speaks of experts or routing", row[i][1]);
        has(row[i][0], want);
    }
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) {
        if (with(taken[i][0], taken[i][1], "16", &model) != XP_OK) /* said twice, and alike */
            fail_msg("%s does not take %s: %s", taken[i][0], taken[i][1], xp_error_text());
        assert_int_equal(with(taken[i][0], taken[i][1], "17", &model), XP_E_FORMAT);
        has(taken[i][0], "contradict one another");
    }
}

/* The coefficient of the balance loss is the file's, or none where the class has no such loss; whether the class
 * reports the router's logits, without which it adds no loss, is not looked at. */
static void balance_losses(void **state) {
    (void)state;
    for (int n = 0; n < 2; n++) {
        assert_int_equal(with("mixtral", "output_router_logits", n ? "true" : "false", &model), XP_OK);
        assert_true(model.dialect.aux_coef == 0.125);
        assert_non_null(strstr(model.unread, "output_router_logits"));
    }
    for (const xp_family *f = xp_families; f->model_type; f++) {
        json_t *fields;
        if (f->refused || f->slot[XP_SLOT_AUX].from != XP_SLOT_FIXED)
            continue;
        json_t *root = made_file(f, &fields);
        accept(f->model_type, root, &model);
        for (int i = 0; i < model.layers; i++)
            assert_true(xp_model_dialect(&model, i)->aux_coef == 0);
        json_decref(root);
    }
}

/* zaya: one expert a token, whether the file says so or not, of E and one class that skips. */
static void one_of_experts_and_none(void **state) {
    (void)state;
    for (int n = 0; n < 2; n++) {
        assert_int_equal(with("zaya", "num_experts_per_tok", n ? "1" : NULL, &model), XP_OK);
        assert_true(model.K == 1 && model.E == 16 && model.router_width == 40 && xp_model_moe_layers(&model) == 6);
        assert_true(model.dialect.null_experts == 1 && model.dialect.null_kind == XP_NULL_SKIP);
    }
    assert_int_equal(with("zaya", "num_experts_per_tok", "2", &model), XP_E_FORMAT);
    has("zaya", "num_experts_per_tok is 2, expected 1: anything else is not built for a zaya");
    assert_int_equal(with("zaya", "router_hidden_size", "0", &model), XP_E_FORMAT);
    has("zaya", "router_hidden_size is 0, expected an integer from 1");
}

/* Groups by both fields or by neither; of at least two experts; k may not exceed E, but may exceed what groups keep. */
static void groups(void **state) {
    (void)state;
    assert_int_equal(with("axk2", "x", NULL, &model), XP_OK);
    assert_true(model.dialect.n_group == 1 && model.dialect.topk_group == 1);
    assert_int_equal(with("axk2", "n_group", "4", &model), XP_E_FORMAT);
    has("axk2", "n_group is given and 'topk_group' is not: a axk2 has groups by both or by neither");
    assert_int_equal(with("axk2", "topk_group", "1", &model), XP_E_FORMAT);
    has("axk2", "topk_group is given and 'n_group' is not");
    assert_int_equal(with("deepseek_ocr2", "topk_method", "\"group_limited_greedy\"", &model), XP_E_FORMAT);
    has("deepseek_ocr2", "no field 'n_group': topk_method is \"group_limited_greedy\", which needs it");
    assert_int_equal(with("deepseek_v3", "n_group", "16", &model), XP_E_FORMAT);
    has("deepseek_v3", "expected groups of at least 2");
    assert_int_equal(with("deepseek_v3", "topk_group", "null", &model), XP_E_FORMAT);
    assert_int_equal(with("deepseek_v3", "num_experts_per_tok", "16", &model), XP_OK);
    assert_int_equal(with("deepseek_v3", "num_experts_per_tok", "17", &model), XP_E_FORMAT);
    has("deepseek_v3", "k > E");
}

/* Fields that lie beside one another in some files of a family and one in the other in its others. */
static void two_places(void **state) {
    static const char *const flat[] = {"dots3_note", "glm5_next"};
    json_t *fields, *root;
    (void)state;
    for (size_t i = 0; i < sizeof flat / sizeof *flat; i++) {
        root = made_file(family_of(flat[i]), &fields);
        accept(flat[i], root, &model);
        json_t *inner = json_deep_copy(fields);
        json_object_del(root, "text_config");
        json_object_update(root, inner);
        json_object_set_new(root, "vision_config", json_pack("{sisi}", "hidden_size", 7, "num_experts", 9));
        json_decref(inner);
        refuse(flat[i], root, "key 'vision_config' holds 'num_experts'");
        json_object_set_new(root, "vision_config", json_pack("{si}", "hidden_size", 7));
        accept(flat[i], root, &other);
        assert_true(other.E == model.E && other.H == 64 && other.S == model.S);
        assert_memory_equal(&other.dialect, &model.dialect, sizeof model.dialect);
        json_decref(root);
    }
    root = made_file(family_of("unlimited_ocr"), &fields);
    json_object_set(root, "language_config", fields);
    json_object_del(root, "text_config");
    accept("unlimited_ocr", root, &model);
    assert_int_equal(model.E, 16);
    json_object_del(root, "language_config");
    refuse("unlimited_ocr", root, "no field 'text_config': a unlimited_ocr has its fields inside it");
    json_decref(root);
    /* Every object on the way is looked at. */
    root = made_file(family_of("qwen3_omni_moe"), &fields);
    json_object_set_new(json_object_get(root, "thinker_config"), "num_experts", json_integer(8));
    refuse("qwen3_omni_moe", root, "key 'num_experts' (8) lies beside 'thinker_config.text_config'");
    json_object_set_new(json_object_get(root, "thinker_config"), "num_experts", json_integer(16));
    json_object_set_new(root, "talker_config", json_pack("{s{si}}", "text_config", "num_experts", 64));
    accept("qwen3_omni_moe", root, &model); /* the talker's */
    assert_int_equal(model.E, 16);
    json_decref(root);
}

/* A width of its own times a count; a number of layers that is the list's; any k where weights are divided by it. */
static void odd_rules(void **state) {
    json_t *fields, *root;
    (void)state;
    assert_int_equal(with("dots3_note", "moe_shared_expert_intermediate_size", "30", &model), XP_OK);
    assert_int_equal(model.S, 60);
    assert_int_equal(with("dots3_note", "x", NULL, &model), XP_OK);
    assert_int_equal(model.S, 2 * 1536);
    assert_int_equal(with("dots3_note", "moe_shared_expert_intermediate_size", "600000", &model), XP_E_FORMAT);
    has("dots3_note", "n_shared_experts is 2: shared experts of 600000 together are wider than 1048576");
    assert_int_equal(with("nemotron_h", "x", NULL, &model), XP_OK);
    assert_int_equal(model.layers, 6);
    assert_int_equal(with("nemotron_h", "num_hidden_layers", "5", &model), XP_E_FORMAT);
    has("nemotron_h", "layers_block_type has 6 words, expected one for each of the 5 layers");
    assert_int_equal(with("nemotron_h", "layers_block_type", "[]", &model), XP_E_FORMAT);
    has("nemotron_h", "layers_block_type names 0 layers");
    assert_int_equal(with("nemotron_h", "moe_latent_size", "32", &model), XP_OK);
    assert_int_equal(model.latent, 32);
    assert_int_equal(with("openai_privacy_filter", "num_experts_per_tok", "6", &model), XP_OK);
    assert_true(model.K == 6 && model.dialect.weight_div_k);
    assert_int_equal(with("flint", "mlp_only_layers", "null", &model), XP_E_FORMAT); /* the class takes [0, 1] then */
    assert_int_equal(with("mimo_v2_flash", "routed_scaling_factor", "null", &model), XP_OK);
    assert_true(model.dialect.scale == 1.0);
    assert_int_equal(with("cohere2_moe", "shared_expert_combination_strategy", "\"mean\"", &model), XP_E_FORMAT);
    has("cohere2_moe", "shared_expert_combination_strategy is \"mean\", expected one of sum|average");
    root = made_file(family_of("cohere2_moe"), &fields);
    put(fields, "expert_selection_fn", json_string("sigmoid"));
    accept("cohere2_moe", root, &model);
    assert_true(model.dialect.renorm == XP_RENORM_SUM && model.dialect.shared_combine == XP_COMBINE_ADD);
    put(fields, "norm_topk_prob", json_false());
    accept("cohere2_moe", root, &model);
    assert_int_equal(model.dialect.renorm, XP_RENORM_NONE);
    put(fields, "expert_selection_fn", json_string("softmax")); /* and there the flag does nothing */
    accept("cohere2_moe", root, &model);
    put(fields, "norm_topk_prob", json_true());
    accept("cohere2_moe", root, &other);
    assert_memory_equal(&model.dialect, &other.dialect, sizeof model.dialect);
    json_decref(root);
}

/* What lies around the experts: fixed by the class, or the word of a file of our own. */
static void around_the_experts(void **state) {
    json_t *fields, *root;
    (void)state;
    assert_int_equal(with("axk1", "x", NULL, &model), XP_OK);
    assert_true(model.around == XP_BLOCK_NORM && model.latent == 0 && model.expert_eps == model.norm_eps);
    assert_null(strstr(model.assumed, "post_mlp_layernorm"));
    assert_int_equal(with("jetmoe", "rms_norm_eps", "1e-5", &model), XP_OK);
    assert_true(model.around == XP_OUT_BIAS && model.norm_eps == 1e-6);
    assert_non_null(strstr(model.assumed, "the class's attention has experts of its own"));
    assert_int_equal(with("muse_spark", "post_norm_eps", "1e-8", &model), XP_OK);
    assert_true(model.around == (XP_LATENT_NORM | XP_EXPERT_NORM) && model.latent == 32);
    assert_true(model.expert_eps == 1e-8 && model.norm_eps == 3e-6 && model.dialect.logit_scale == 0.625);
    assert_non_null(strstr(model.assumed, "post_feedforward_layernorm"));
    assert_int_equal(with("gemma4", "intermediate_size", "40", &model), XP_OK);
    assert_true(model.around == (XP_BLOCK_NORM | XP_ROUTED_NORM | XP_SHARED_NORM | XP_SHARED_IN_NORM) && model.S == 40);
    assert_true(model.dialect.router_in == XP_ROUTER_RMSNORM_SCALED && model.router_width == 0);
    assert_int_equal(with("gemma4", "intermediate_size", "0", &model), XP_E_FORMAT);
    has("gemma4", "around: shared_norm, expected it beside a shared expert alone");
    assert_int_equal(with("muse_spark", "moe_hidden_size", "null", &model), XP_E_FORMAT);
    has("muse_spark", "moe_hidden_size is null, expected an integer from 1");
    root = made_file(family_of("muse_spark"), &fields);
    json_object_set_new(root, "moe_hidden_size", json_integer(40));
    refuse("muse_spark", root, "key 'moe_hidden_size' (40) lies beside 'text_config'");
    json_decref(root);
    assert_int_equal(with("expar", "moe_around", "\"block_norm+out_bias\"", &model), XP_OK);
    assert_true(model.around == (XP_BLOCK_NORM | XP_OUT_BIAS));
    assert_int_equal(with("expar", "moe_around", "\"latent_norm\"", &model), XP_E_FORMAT);
    has("expar", "around: latent_norm, expected it beside a latent width D alone");
    assert_int_equal(with("expar", "moe_around", "\"block_norm+norm\"", &model), XP_E_FORMAT);
    has("expar", "moe_around is \"block_norm+norm\", expected names of latent_norm, expert_norm, out_bias, block_norm");
    has("expar", "routed_norm, shared_norm, shared_in_norm");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(files_of_the_classes),
        cmocka_unit_test(text_alone),
        cmocka_unit_test(words_by_default),
        cmocka_unit_test(no_family_is_left_out),
        cmocka_unit_test(made_files_are_taken),
        cmocka_unit_test(keys_are_missed),
        cmocka_unit_test(other_names),
        cmocka_unit_test(strangers),
        cmocka_unit_test(only_what_is_built),
        cmocka_unit_test(what_is_not_built_says_so),
        cmocka_unit_test(unread_by_the_class),
        cmocka_unit_test(widths_of_inkling),
        cmocka_unit_test(read_by_the_class),
        cmocka_unit_test(names_that_are_no_aliases),
        cmocka_unit_test(balance_losses),
        cmocka_unit_test(one_of_experts_and_none),
        cmocka_unit_test(groups),
        cmocka_unit_test(two_places),
        cmocka_unit_test(odd_rules),
        cmocka_unit_test(around_the_experts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
