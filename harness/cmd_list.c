/* expar list: what there is, one line of meaning each; and expar version. */
#include <string.h>

#include "cmd.h"
#include "golden.h"
#include "registry.h"

/* Lines go through one function, so that text and JSON list the same things. */
typedef struct {
    json_t *array; /* NULL: print */
    int left_out;  /* names that JSON cannot hold */
} sink;

static void emit(sink *s, const char *name, const char *meaning) {
    if (s->array)
        s->left_out += json_array_append_new(s->array, json_pack("{s:s,s:s}", "name", name, "meaning", meaning)) != 0;
    else
        printf("  %-26s %s\n", name, meaning);
}

static xp_status list_stages(sink *s) {
    for (int i = 0; xp_stages[i]; i++)
        emit(s, xp_stages[i]->name, xp_stages[i]->meaning);
    return XP_OK;
}

static xp_status list_backends(sink *s) {
    for (int i = 0; xp_backends[i]; i++)
        emit(s, xp_backends[i]->name, xp_backends[i]->meaning);
    return XP_OK;
}

static xp_status list_kernels(sink *s) {
    char name[80], text[200];
    for (int i = 0; xp_backends[i]; i++) {
        for (int k = 0; xp_backends[i]->kernel[k]; k++) {
            const xp_kernel *row = xp_backends[i]->kernel[k];
            snprintf(name, sizeof name, "%s:%s", xp_backends[i]->name, row->stage->name);
            snprintf(text, sizeof text, "row '%s'%s%s", row->name, row->det & XP_DET_RUN ? ", the same bits twice" : "",
                     row->det & XP_DET_MESH ? ", the same bits on every mesh" : "");
            emit(s, name, text);
        }
    }
    return XP_OK;
}

static xp_status list_meshes(sink *s) {
    char text[200];
    for (int i = 0; xp_mesh_kinds[i].name; i++) {
        const xp_mesh_kind *k = &xp_mesh_kinds[i];
        snprintf(text, sizeof text, "%s%s%s", k->meaning, k->why_not ? "; not here: " : "",
                 k->why_not ? k->why_not : "");
        emit(s, k->name, text);
    }
    return XP_OK;
}

static void put_model(const char *name, const xp_model *m, double all, double active, const char *dialects) {
    printf("  %-24s %3d/%-3d %5lld %5lld %4lld %3lld %6lld %7.1fB %6.2fB %6.1f  %s\n", name, xp_model_moe_layers(m),
           m->layers, (long long)m->H, (long long)m->F, (long long)m->E, (long long)m->K, (long long)m->S, all / 1e9,
           active / 1e9, 2.0 * (double)m->K * (double)xp_model_expert_width(m) / 1024, dialects);
}

/* In print a table, whose columns are named in the list's own first line. */
static xp_status model_line(const char *name, void *arg) {
    sink *s = arg;
    xp_model m;
    char text[900], others[500] = "", dialects[600];
    double all, active;
    XP_TRY(xp_model_open(name, &m));
    for (int n = 1; n <= m.others; n++) {
        const size_t used = strlen(others);
        char layers[32];
        xp_model_record_layers(&m, n, layers, sizeof layers);
        snprintf(others + used, sizeof others - used, " and %s in %s%s", m.other[n - 1].name, layers,
                 xp_golden_covers(m.other[n - 1].name) ? "" : " (no vector covers it)");
    }
    xp_model_moe_params(&m, &all, &active);
    snprintf(dialects, sizeof dialects, "%s%s%s", m.dialect.name,
             xp_golden_covers(m.dialect.name) ? "" : " (no vector covers it)", others);
    if (!s->array) {
        put_model(name, &m, all, active, dialects);
        return XP_OK;
    }
    snprintf(text, sizeof text,
             "%s, %d layers, %d MoE, H %lld, F %lld, E %lld, k %lld, shared %lld, dialect %s, %.1f B parameters in MoE "
             "blocks, %.2f B active, %.1f KiB dispatched a token",
             m.model_type, m.layers, xp_model_moe_layers(&m), (long long)m.H, (long long)m.F, (long long)m.E,
             (long long)m.K, (long long)m.S, dialects, all / 1e9, active / 1e9,
             2.0 * (double)m.K * (double)xp_model_expert_width(&m) / 1024);
    emit(s, name, text);
    return XP_OK;
}

static xp_status list_models(sink *s) {
    return xp_model_list(model_line, s);
}

static xp_status list_dialects(sink *s) {
    char text[400];
    for (int i = 0; xp_dialects[i].name; i++) {
        snprintf(text, sizeof text, "%c: %s%s", xp_dialects[i].letter, xp_dialects[i].meaning,
                 xp_golden_covers(xp_dialects[i].name) ? "" : " (no vector covers it)");
        emit(s, xp_dialects[i].name, text);
    }
    return XP_OK;
}

static xp_status case_line(const xp_case *c, void *arg) {
    char line[XP_CASE_LINE];
    xp_case_print(c, line, sizeof line);
    emit(arg, c->name, line);
    return XP_OK;
}

static xp_status list_cases(sink *s) {
    return xp_case_all(case_line, s);
}

static xp_status list_faults(sink *s) {
    char text[400];
    for (int i = 0; xp_faults[i]; i++) {
        snprintf(text, sizeof text, "%s: %s [%s]", xp_faults[i]->stage, xp_faults[i]->meaning, xp_faults[i]->source);
        emit(s, xp_faults[i]->name, text);
    }
    return XP_OK;
}

static xp_status list_data(sink *s) {
    for (int k = 0; k < XP_NDATA; k++)
        emit(s, xp_data_name((xp_data)k), xp_data_meaning((xp_data)k));
    return XP_OK;
}

static const struct {
    const char *name;
    xp_status (*list)(sink *s);
    const char *columns; /* behind the name, NULL: none */
} lists[] = {
    {"stages", list_stages, NULL},
    {"kernels", list_kernels, NULL},
    {"backends", list_backends, NULL},
    {"meshes", list_meshes, NULL},
    {"models", list_models, "                    MoE/all     H     F    E   k shared  params  active  KiB/t  dialect"},
    {"dialects", list_dialects, NULL},
    {"cases", list_cases, NULL},
    {"faults", list_faults, NULL},
    {"data", list_data, NULL},
};

static xp_status list_one(int i, json_t *root) {
    sink s = {.array = root ? json_array() : NULL};
    if (!root)
        printf("%s%s\n", lists[i].name, lists[i].columns ? lists[i].columns : "");
    const xp_status st = lists[i].list(&s);
    if (root)
        json_object_set_new(root, lists[i].name, s.array);
    if (st == XP_OK && s.left_out)
        return XP_FAIL(XP_E_IO, "list: %d of the %s have names that are not UTF-8", s.left_out, lists[i].name);
    return st;
}

static xp_status no_list(const char *word) {
    char all[160] = "";
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        const size_t used = strlen(all);
        snprintf(all + used, sizeof all - used, "%s%s", i ? ", " : "", lists[i].name);
    }
    return XP_FAIL(XP_E_ARG, "list: '%s' is none of %s", word, all);
}

int xp_cmd_list(const xp_options *o) {
    const int n = (int)(sizeof lists / sizeof *lists);
    json_t *root = o->json ? json_object() : NULL;
    xp_status st = XP_OK;
    for (int w = 0; w < o->words; w++) {
        int i = 0;
        while (i < n && strcmp(o->word[w], lists[i].name) != 0)
            i++;
        if (i == n)
            return xp_cmd_fail(no_list(o->word[w]));
    }
    for (int i = 0; i < n && st == XP_OK; i++) {
        int wanted = o->words == 0;
        for (int w = 0; w < o->words; w++)
            wanted |= strcmp(o->word[w], lists[i].name) == 0;
        if (wanted)
            st = list_one(i, root);
    }
    if (root && st == XP_OK) {
        json_dumpf(root, stdout, JSON_INDENT(1));
        fputc('\n', stdout);
    }
    json_decref(root);
    return st == XP_OK ? XP_EXIT_OK : xp_cmd_fail(st);
}

int xp_cmd_version(const xp_options *o) {
    if (o->words)
        return xp_cmd_fail(XP_FAIL(XP_E_ARG, "version: takes no arguments, got '%s'", o->word[0]));
    printf("expar %s (plugin abi %d)\n", XP_VERSION, XP_ABI);
    return XP_EXIT_OK;
}
