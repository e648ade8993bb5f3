/* expar explain NAME: what a name of this program means. The texts come from the tables that the program runs on. */
#include <inttypes.h>
#include <string.h>

#include "checkpoint.h"
#include "cmd.h"
#include "dialect_text.h"
#include "registry.h"

/* Lines of an explanation: key and text, printed or collected. */
typedef struct {
    json_t *object; /* NULL: print */
} sink;

static void say(sink *s, const char *key, const char *text) {
    if (s->object)
        json_object_set_new(s->object, key, json_string(text));
    else
        printf("%-12s %s\n", key, text);
}

/* The same line in print; in JSON a member of the object `group`, where a name cannot hide a key of the explanation. */
static void say_in(sink *s, const char *group, const char *key, const char *text) {
    if (!s->object) {
        say(s, key, text);
        return;
    }
    json_t *in = json_object_get(s->object, group);
    if (!in) {
        in = json_object();
        json_object_set_new(s->object, group, in);
    }
    json_object_set_new(in, key, json_string(text));
}

static const char *role_name(xp_role r) {
    return r == XP_IN ? "in" : r == XP_OUT ? "out" : "inout";
}

static const char *cmp_name(const xp_operand *o) {
    static const char *const name[] = {"bit for bit", "derived bound", "choice", "not compared"};
    return o->role == XP_IN ? "" : name[o->cmp];
}

static void dtype_names(uint32_t set, char *buf, size_t bytes) {
    buf[0] = '\0';
    for (int d = 0; d < XP_NDTYPE; d++) {
        if (set & XP_BIT(d))
            snprintf(buf + strlen(buf), bytes - strlen(buf), "%s%s", buf[0] ? "|" : "", xp_dtype_name((xp_dtype)d));
    }
}

static int explain_stage(sink *s, const char *name) {
    const xp_stage *st = xp_stage_find(name);
    char types[160], line[320];
    if (!st)
        return 0;
    say(s, "stage", st->name);
    say(s, "meaning", st->meaning);
    say(s, "axis", st->axis == XP_LOCAL ? "none: it does not communicate" : xp_axis_name(st->axis));
    say(s, "inputs", st->chain ? "from the run of a whole layer" : "generated");
    for (int i = 0; i < st->operands; i++) {
        const xp_operand *o = &st->operand[i];
        dtype_names(o->dtypes, types, sizeof types);
        snprintf(line, sizeof line, "%-5s [%s] %s%s  %s", role_name(o->role), o->shape, types,
                 o->optional ? ", optional" : "", cmp_name(o));
        say_in(s, "operands", o->name, line);
    }
    for (int i = 0; i < st->params; i++) {
        snprintf(line, sizeof line, "scalar, default %s%s%s", st->param[i].dflt ? st->param[i].dflt : "by the harness",
                 st->param[i].words ? ", one of " : "", st->param[i].words ? st->param[i].words : "");
        say_in(s, "scalars", st->param[i].name, line);
    }
    for (int i = 0; i < st->properties; i++)
        say_in(s, "properties", st->property[i].name, "holds without a reference");
    return 1;
}

static int explain_fault(sink *s, const char *name) {
    const xp_fault *f = xp_fault_find(name);
    if (!f)
        return 0;
    say(s, "fault", f->name);
    say(s, "stage", f->stage);
    say(s, "meaning", f->meaning);
    say(s, "source", f->source);
    say(s, "caught by", f->caught_by);
    return 1;
}

/* The formula, every field, and what the three nearest presets do otherwise. */
static int explain_dialect(sink *s, const char *name) {
    const xp_dialect *d = xp_dialect_find(name);
    char text[XP_FORMULA_TEXT + 64], value[64];
    const char *key;
    if (!d)
        return 0;
    say(s, "dialect", d->name);
    say(s, "meaning", d->meaning);
    say(s, "source", d->source);
    snprintf(text, sizeof text, "%c", d->letter);
    say(s, "family", text);
    for (int i = 0; xp_dialect_formula(d, i, &key, text); i++)
        say_in(s, "formula", key, text);
    if (!s->object)
        say(s, "", "r = round to the activation dtype");
    for (int n = 0; n < 3; n++) {
        const xp_dialect *o = xp_dialect_neighbour(d, n);
        if (!o)
            break;
        const int at = s->object ? 0 : snprintf(text, sizeof text, "%s: ", o->name);
        xp_dialect_differences(d, o, 0, text + at, sizeof text - (size_t)at);
        say_in(s, "neighbours", s->object ? o->name : "beside", text);
    }
    for (const xp_dialect_field *f = xp_dialect_fields; f->name; f++) {
        xp_dialect_print(d, f, value, sizeof value);
        snprintf(text, sizeof text, "%-12s %s", value, f->meaning);
        say_in(s, "fields", f->name, s->object ? value : text);
    }
    return 1;
}

static void say_tensor(const char *name, const char *shape, const char *part, void *arg) {
    char text[256];
    snprintf(text, sizeof text, "%s  %s", shape, part);
    say_in(arg, "tensors", name, text);
}

/* What `check --weights` reads of the first MoE block. */
static void explain_tensors(sink *s, const xp_model *m) {
    int layer = 0;
    while (layer < m->layers && !m->moe[layer])
        layer++;
    (void)xp_checkpoint_expect(m, layer, say_tensor, s);
}

/* A path is a model or nothing: what is wrong with the file says more than that the name is unknown. */
static xp_status explain_model(sink *s, const char *name) {
    xp_model m;
    char text[200];
    const xp_status st = xp_model_open(name, &m);
    if (st != XP_OK)
        return strchr(name, '/') ? st
                                 : XP_FAIL(XP_E_ARG,
                                           "explain: '%s' is no stage, fault, dialect, model, data kind, verdict, "
                                           "class of failure or exit code (see `expar list`)",
                                           name);
    say(s, "model", m.name);
    say(s, "type", m.model_type);
    say(s, "dialect", m.dialect.name);
    for (int n = 1; n <= m.others; n++) {
        char layers[64], record[XP_FORMULA_TEXT];
        xp_model_record_layers(&m, n, layers, sizeof layers);
        xp_model_record_text(&m, n, record, sizeof record);
        say_in(s, "records", s->object ? layers : "beside", record);
    }
    snprintf(text, sizeof text, "%d layers, %d of them MoE blocks", m.layers, xp_model_moe_layers(&m));
    say(s, "layers", text);
    snprintf(text, sizeof text, "H %" PRId64 ", F %" PRId64 ", E %" PRId64 ", k %" PRId64 ", shared %" PRId64, m.H, m.F,
             m.E, m.K, m.S);
    say(s, "sizes", text);
    if (m.unread[0])
        say(s, "not read", m.unread);
    if (m.assumed[0])
        say(s, "assumed", m.assumed);
    explain_tensors(s, &m);
    return XP_OK;
}

static int explain_word(sink *s, const char *name) {
    static const char *const verdict[][2] = {
        {"PASS", "every compared element is inside its bound, and something was compared"},
        {"FAIL", "an element is outside its bound, or bits differ that must not"},
        {"UNSUPPORTED", "the backend has no row for it; nothing else runs in its place"},
        {"SKIP", "it cannot run here, for the reason given"},
        {"VACUOUS",
         "nothing was shown: nothing compared, only zeros, no row left its rank, one set of experts for all tokens, or no judge"},
        {"ERROR", "a rank failed: a refused argument, a collective that ranks entered differently"},
        {"HANG", "a collective's peers never came"},
    };
    for (size_t i = 0; i < sizeof verdict / sizeof *verdict; i++) {
        if (strcmp(name, verdict[i][0]) == 0) {
            say(s, "verdict", name);
            say(s, "meaning", verdict[i][1]);
            return 1;
        }
    }
    for (int c = XP_C_BITS; c < XP_NCLASS; c++) {
        if (strcmp(name, xp_class_name((xp_class)c)) == 0) {
            say(s, "class", name);
            say(s, "meaning", xp_class_meaning((xp_class)c));
            return 1;
        }
    }
    for (int k = 0; k < XP_NDATA; k++) {
        if (strcmp(name, xp_data_name((xp_data)k)) == 0) {
            say(s, "data", name);
            say(s, "meaning", xp_data_meaning((xp_data)k));
            return 1;
        }
    }
    return 0;
}

static int explain_exit(sink *s, const char *name) {
    static const char *const code[][2] = {
        {"0", "everything passed"},
        {"1", "a check failed, was vacuous or ended in an error"},
        {"2", "an option, a mesh or a case line is wrong"},
        {"3", "the launch environment contradicts itself (WORLD_SIZE without RANK)"},
        {"4", "an input file is missing or its content is wrong"},
        {"5", "nothing ran: no case matched, or all were unsupported or skipped"},
        {"6", "what was required is unsupported here"},
        {"8", "a hang"},
        {"9", "a peer was lost"},
        {"10", "a bug of this program, or no memory"},
        {"11", "an output file or standard output cannot be written"},
        {"12", "a plugin does not keep the contract"},
    };
    const int all = strcmp(name, "exit") == 0;
    int said = 0;
    for (size_t i = 0; i < sizeof code / sizeof *code; i++) {
        if (all || strcmp(name, code[i][0]) == 0) {
            say(s, code[i][0], code[i][1]);
            said = 1;
        }
    }
    if (!said)
        return 0;
    say(s, "order", "several at once: 10 > 9 > 8 > 3 > 2 > 4 > 12 > 11 > 1 > 13 > 7 > 6 > 5");
    return 1;
}

int xp_cmd_explain(const xp_options *o) {
    sink s = {.object = o->json ? json_object() : NULL};
    if (o->words != 1) {
        json_decref(s.object);
        return xp_cmd_fail(XP_FAIL(XP_E_ARG, "explain: expected one name, got %d", o->words));
    }
    const char *name = o->word[0];
    const int known = explain_stage(&s, name) || explain_fault(&s, name) || explain_dialect(&s, name) ||
                      explain_exit(&s, name) || explain_word(&s, name);
    const xp_status st = known ? XP_OK : explain_model(&s, name);
    if (st == XP_OK && s.object) {
        json_dumpf(s.object, stdout, JSON_INDENT(1));
        fputc('\n', stdout);
    }
    json_decref(s.object);
    return st == XP_OK ? XP_EXIT_OK : xp_cmd_fail(st);
}
