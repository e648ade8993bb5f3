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

enum { KEY = 16, WIDTH = 110 };

/* Words up to the margin; the lines after the first are indented. A line break of the text stays one. */
static void put_words(int column, const char *text) {
    while (*text) {
        const int gap = (int)strspn(text, " "), n = (int)strcspn(text + gap, " \n");
        const int over = column > KEY + 1 && column + gap + n > WIDTH;
        column = over ? printf("\n%*s ", KEY, "") - 1 : column + printf("%*s", gap, "");
        column += printf("%.*s", n, text + gap);
        text += gap + n;
        if (*text == '\n') {
            column = printf("\n%*s ", KEY, "") - 1;
            text++;
        }
    }
    printf("\n");
}

static void say(sink *s, const char *key, const char *text) {
    if (s->object)
        json_object_set_new(s->object, key, json_string(text));
    else
        put_words(printf("%-*s ", KEY, key), text);
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

/* Lines of names become one list in print. */
static void say_list(sink *s, const char *key, const char *lines) {
    int column = s->object ? 0 : printf("%-*s ", KEY, key);
    if (s->object) {
        say(s, key, lines);
        return;
    }
    for (const char *p = lines; *p; p += strspn(p, "\n")) {
        const int n = (int)strcspn(p, "\n"), more = p[n] && p[n + 1];
        if (column > KEY + 1 && column + 2 + n > WIDTH)
            column = printf("\n%*s ", KEY, "") - 1;
        column += printf("%.*s%s", n, p, more ? "," : "");
        p += n;
        if (more && column < WIDTH)
            column += printf(" ");
    }
    printf("\n");
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

static void say_key(const xp_case_key *key, void *arg) {
    char text[160];
    snprintf(text, sizeof text, "%-13s %s", key->value, key->meaning);
    say_in(arg, "keys", key->name, text);
}

/* What a case line of a layer or a step can say. */
static int explain_head(sink *s, const char *name) {
    const int layer = strcmp(name, "layer") == 0;
    if (!layer && strcmp(name, "step") != 0)
        return 0;
    say(s, "case", name);
    say(s, "meaning",
        layer ? "every stage of MoE layers, forward and backward, judged one by one"
              : "the same, then the optimizer: whole training steps");
    say(s, "example",
        layer ? "layer T=64 E=12 K=3 H=24 F=16 dtype=bf16 mesh=sim:fsdp=6,ep=2"
              : "step T=70 E=12 K=3 H=24 F=16 steps=2 mesh=sim:fsdp=6,ep=2");
    xp_case_keys(name, say_key, s);
    return 1;
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
        snprintf(line, sizeof line, "%-5s [%s] %s%s%s%s", role_name(o->role), o->shape, types,
                 o->optional ? ", optional" : "", o->role == XP_IN ? "" : "  ", cmp_name(o));
        say_in(s, "operands", o->name, line);
    }
    for (int i = 0; i < st->params; i++) {
        snprintf(line, sizeof line, "scalar, default %s%s%s", st->param[i].dflt ? st->param[i].dflt : "by the harness",
                 st->param[i].words ? ", one of " : "", st->param[i].words ? st->param[i].words : "");
        say_in(s, "scalars", st->param[i].name, line);
    }
    for (int i = 0; i < st->properties; i++)
        say_in(s, "properties", st->property[i].name, "an identity, which holds without a reference");
    if (!s->object)
        say(s, "", "keys of its case lines, beside the scalars:");
    xp_case_keys(st->name, say_key, s);
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
    double all, active;
    char text[200];
    const xp_status st = xp_model_open(name, &m);
    if (st != XP_OK)
        return strchr(name, '/') ? st
                                 : XP_FAIL(XP_E_ARG,
                                           "explain: '%s' is nothing that `expar list` names, no verdict, class of "
                                           "failure or exit code, and neither 'layer' nor 'step'",
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
    if (m.latent) {
        snprintf(text, sizeof text, "the experts read and write width %" PRId64 ", between two maps of the block",
                 m.latent);
        say(s, "latent", text);
    }
    if (m.router_width) {
        snprintf(text, sizeof text, "an MLP of width %" PRId64 " makes what the router's matrix multiplies",
                 m.router_width);
        say(s, "router", text);
    }
    xp_around_print(m.around, text, sizeof text);
    if (m.around)
        say(s, "around", text);
    xp_model_moe_params(&m, &all, &active);
    snprintf(text, sizeof text, "%.1f B in MoE blocks, %.2f B of them active for a token", all / 1e9, active / 1e9);
    say(s, "parameters", text);
    if (m.unread[0])
        say_list(s, "not read", m.unread);
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

/* A backend, a row of one, or a mesh. */
static int explain_place(sink *s, const char *name) {
    for (int i = 0; xp_mesh_kinds[i].name; i++) {
        if (strcmp(name, xp_mesh_kinds[i].name) == 0) {
            say(s, "mesh", name);
            say(s, "meaning", xp_mesh_kinds[i].meaning);
            say(s, "here", xp_mesh_kinds[i].why_not ? xp_mesh_kinds[i].why_not : "yes");
            return 1;
        }
    }
    for (int i = 0; xp_backends[i]; i++) {
        const xp_backend *b = xp_backends[i];
        const size_t n = strlen(b->name);
        const int whole = strcmp(name, b->name) == 0, of = strncmp(name, b->name, n) == 0 && name[n] == ':';
        for (int k = 0; b->kernel[k] && of; k++) {
            if (strcmp(name + n + 1, b->kernel[k]->stage->name) == 0) {
                say(s, "kernel", name);
                say(s, "row", b->kernel[k]->name);
                say(s, "backend", b->meaning);
                return explain_stage(s, b->kernel[k]->stage->name);
            }
        }
        if (whole) {
            say(s, "backend", name);
            say(s, "meaning", b->meaning);
            return 1;
        }
    }
    return 0;
}

typedef struct {
    sink *to;
    const char *name;
    int found;
} searching;

static xp_status match_case(const xp_case *c, void *arg) {
    searching *q = arg;
    char line[XP_CASE_LINE];
    if (q->found || strcmp(c->name, q->name) != 0)
        return XP_OK;
    q->found = 1;
    xp_case_print(c, line, sizeof line);
    say(q->to, "case", c->name);
    say(q->to, "line", line);
    return XP_OK;
}

/* Of the case directory: its names are a file's, a slash, and a number or a word. */
static int explain_case(sink *s, const char *name) {
    searching q = {s, name, 0};
    if (name[0] == '.' || name[0] == '/' || !strchr(name, '/'))
        return 0;
    return xp_case_all(match_case, &q) == XP_OK && q.found;
}

static int explain_exit(sink *s, const char *name) {
    /* 7 and 13 are kept for a performance gate and a stale waiver: no command returns them. */
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
    say(s, "order", "of several the first of 10, 9, 8, 3, 2, 4, 12, 11, 1, 6, 5");
    return 1;
}

int xp_cmd_explain(const xp_options *o) {
    sink s = {.object = o->json ? json_object() : NULL};
    if (o->words != 1) {
        json_decref(s.object);
        return xp_cmd_fail(XP_FAIL(XP_E_ARG, "explain: expected one name, got %d", o->words));
    }
    const char *name = o->word[0];
    const int known = explain_stage(&s, name) || explain_head(&s, name) || explain_fault(&s, name) ||
                      explain_dialect(&s, name) || explain_exit(&s, name) || explain_word(&s, name) ||
                      explain_place(&s, name) || explain_case(&s, name);
    const xp_status st = known ? XP_OK : explain_model(&s, name);
    if (st == XP_OK && s.object) {
        json_dumpf(s.object, stdout, JSON_INDENT(1));
        fputc('\n', stdout);
    }
    json_decref(s.object);
    return st == XP_OK ? XP_EXIT_OK : xp_cmd_fail(st);
}
