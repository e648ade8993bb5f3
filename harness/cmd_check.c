/* expar check: runs cases, prints their verdicts and one summary. Cases come from the case directory by name, from
 * files, from lines, from --random, or from --model. */
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "cmd.h"
#include "random.h"

enum { SAMPLE_UNITS = 16, REDRAWS = 20 };

typedef struct {
    const xp_options *o;
    xp_run_options run;
    int64_t dumped, dump_left;
    xp_report_style style;
    json_t *cases; /* NULL: no -J */
    int64_t count[XP_V_HANG + 1], ran, redrawn;
    int64_t elements, remote, parity_rows;
    int exit_code;
    /* of the pattern that is being matched */
    const char *pattern;
    int64_t matched;
    uint8_t *text;
    xp_model model;
    xp_weights weights;
} checking;

static void progress(const checking *s, const char *name) {
    if (s->style.progress)
        fprintf(stderr, "\r\033[K%" PRId64 " done, running %s", s->ran, name);
}

static void progress_end(const checking *s) {
    if (s->style.progress)
        fputs("\r\033[K", stderr);
}

/* A stage whose generated arguments are refused has a wrong case line, not a wrong kernel. */
static int line_is_wrong(const xp_case *c, const xp_run_result *r) {
    const xp_judgement *g = &r->judgement;
    if (g->verdict != XP_V_ERROR || c->kind != XP_CASE_STAGE || c->stage->chain)
        return 0;
    return g->first >= 0 ? g->line[g->first].cls == XP_C_ARG : r->end.status == XP_E_ARG;
}

static void tally(checking *s, const xp_case *c, const xp_run_result *r) {
    const xp_judgement *g = &r->judgement;
    s->ran++;
    s->count[g->verdict]++;
    s->elements += g->elements;
    s->remote += g->remote;
    s->parity_rows += r->parity_rows;
    if (g->verdict != XP_V_PASS && g->verdict != XP_V_SKIP && g->verdict != XP_V_UNSUPPORTED)
        s->exit_code = xp_exit_worse(s->exit_code, line_is_wrong(c, r) ? XP_EXIT_USAGE : xp_exit_of(g->verdict, 0));
    if (s->cases && json_array_append_new(s->cases, xp_report_json(c, r)) != 0) {
        fprintf(stderr, "expar: -J: the result of case '%s' cannot be written as JSON\n", c->name);
        s->exit_code = xp_exit_worse(s->exit_code, XP_EXIT_OUTPUT);
    }
}

/* A mesh that is not to be had here is a SKIP with its reason, not an error. */
static xp_status skip(checking *s, const xp_case *c) {
    char line[XP_CASE_LINE];
    xp_case_print(c, line, sizeof line);
    s->ran++;
    s->count[XP_V_SKIP]++;
    fprintf(s->style.out, "SKIP        %-22s %s (%s)\n", c->name[0] ? c->name : "-", line, xp_error_text());
    return XP_OK;
}

static xp_status adjust(const checking *s, xp_case *c) {
    if (s->o->has_seed)
        c->seed = s->o->seed;
    if (s->o->deterministic && c->kind != XP_CASE_STAGE)
        c->deterministic = 1;
    if (!s->o->mesh)
        return XP_OK;
    const xp_mesh_spec old = c->mesh;
    return strchr(s->o->mesh, ':') ? xp_mesh_spec_parse(s->o->mesh, &c->mesh)
                                   : xp_mesh_spec_rekind(&old, s->o->mesh, &c->mesh);
}

static xp_status run_case(checking *s, const xp_case *given) {
    xp_run_result r;
    xp_case c = *given;
    XP_TRY(adjust(s, &c));
    XP_TRY(xp_case_check(&c));
    progress(s, c.name);
    const xp_status st = xp_case_run(&c, &s->run, &r);
    progress_end(s);
    if (st == XP_E_DEVICE && r.end.world == 0)
        return skip(s, &c);
    if (st == XP_OK) {
        tally(s, &c, &r);
        xp_report_case(&s->style, &c, &s->run, &r);
        if (r.end.stuck)
            s->exit_code = xp_exit_worse(s->exit_code, XP_EXIT_HANG);
    }
    xp_run_result_close(&r);
    return st;
}

static xp_status match(const xp_case *c, void *arg) {
    checking *s = arg;
    if (s->pattern && !xp_glob(s->pattern, c->name))
        return XP_OK;
    s->matched++;
    return run_case(s, c);
}

static int ends_with(const char *s, const char *end) {
    const size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

/* One argument: a case line, a file of them, or a glob over names. */
static xp_status run_word(checking *s, const char *word) {
    s->matched = 0;
    s->pattern = NULL;
    if (strpbrk(word, " \t")) {
        XP_TRY(xp_case_expand(word, NULL, NULL, match, s));
    } else if (ends_with(word, ".txt")) {
        XP_TRY(xp_case_file(word, match, s));
    } else {
        s->pattern = word;
        XP_TRY(xp_case_all(match, s));
    }
    if (s->matched == 0) {
        fflush(stdout);
        fprintf(stderr, "expar: check: nothing matches '%s' (see `expar list cases`)\n", word);
        s->exit_code = xp_exit_worse(s->exit_code, XP_EXIT_NOTHING);
    }
    return XP_OK;
}

/* ---- random cases ---- */

/* Draws are independent, so a few run side by side; they are reported in the order of their numbers. */
enum { BATCH = 32, MAX_WORKERS = 8 };

typedef struct {
    xp_case c;
    xp_run_result r;
    xp_status status;
    char error[256];
    int redrawn;
} draw;

typedef struct {
    const checking *s;
    long long first;
    int draws;
    atomic_int next;
    draw *item;
} batch;

static void run_draw(const checking *s, uint64_t number, draw *d) {
    for (d->redrawn = 0;; d->redrawn++) {
        xp_random_case(s->o->seed, number, d->redrawn, &d->c);
        d->status = xp_case_run(&d->c, &s->run, &d->r);
        if (d->status != XP_OK) {
            snprintf(d->error, sizeof d->error, "%s", xp_error_text());
            return;
        }
        if (d->r.judgement.verdict != XP_V_VACUOUS || d->redrawn == REDRAWS)
            return;
        xp_run_result_close(&d->r);
    }
}

static void *work(void *arg) {
    batch *b = arg;
    for (int i; (i = atomic_fetch_add(&b->next, 1)) < b->draws;)
        run_draw(b->s, (uint64_t)(b->first + i), &b->item[i]);
    return NULL;
}

static void run_batch(batch *b) {
    pthread_t worker[MAX_WORKERS];
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int workers = 0;
    atomic_init(&b->next, 0);
    while (workers < MAX_WORKERS && workers + 1 < cores && pthread_create(&worker[workers], NULL, work, b) == 0)
        workers++;
    work(b);
    while (workers > 0)
        pthread_join(worker[--workers], NULL);
}

static xp_status report_draw(checking *s, draw *d) {
    xp_status st = XP_OK;
    if (d->status != XP_OK) {
        char line[XP_CASE_LINE];
        xp_case_print(&d->c, line, sizeof line);
        st = XP_FAIL(d->status, "%s: %s: %s", d->c.name, line, d->error);
    } else {
        s->redrawn += d->redrawn;
        tally(s, &d->c, &d->r);
        if (d->r.judgement.verdict != XP_V_PASS || s->style.verbose)
            xp_report_case(&s->style, &d->c, &s->run, &d->r);
        if (d->r.end.stuck)
            s->exit_code = xp_exit_worse(s->exit_code, XP_EXIT_HANG);
    }
    xp_run_result_close(&d->r);
    return st;
}

static xp_status run_random(checking *s) {
    draw *item = calloc(BATCH, sizeof *item);
    xp_status st = item ? XP_OK : XP_FAIL(XP_E_NOMEM, "check: %zu bytes", BATCH * sizeof *item);
    for (long long n = 0; n < s->o->random && st == XP_OK; n += BATCH) {
        batch b = {
            .s = s, .first = n, .draws = s->o->random - n < BATCH ? (int)(s->o->random - n) : BATCH, .item = item};
        progress(s, "random cases");
        memset(item, 0, BATCH * sizeof *item);
        run_batch(&b);
        progress_end(s);
        for (int i = 0; i < b.draws; i++) {
            const xp_status one = report_draw(s, &item[i]);
            st = st == XP_OK ? one : st;
        }
    }
    free(item);
    return st;
}

/* ---- one model's layers ---- */

static xp_status model_case(const xp_options *o, xp_case *out) {
    xp_case_defaults(XP_CASE_LAYER, NULL, out);
    if (strlen(o->model) >= sizeof out->model)
        return XP_FAIL(XP_E_ARG, "--model: longer than %zu characters", sizeof out->model - 1);
    strcpy(out->model, o->model);
    strcpy(out->name, "model");
    out->dim['T' - 'A'] = o->has_tokens ? o->tokens : 256;
    out->dim_set['T' - 'A'] = 1;
    if (o->experts) {
        out->dim['E' - 'A'] = o->experts;
        out->dim_set['E' - 'A'] = 1;
    }
    if (o->topk) {
        out->dim['K' - 'A'] = o->topk;
        out->dim_set['K' - 'A'] = 1;
    }
    out->layers = o->has_layer ? (int)o->layer + 1 : o->layers ? (int)o->layers : 1;
    out->shrink = (int)o->shrink;
    out->seed = o->seed;
    out->deterministic = 1;
    out->data = XP_DATA_TEXT;
    out->dtype[XP_G_ACT] = XP_BF16;
    return xp_cmd_mesh(o, "sim:fsdp=1", &out->mesh);
}

/* With --layer the other layers are no MoE blocks to this run. */
static xp_status choose_layer(const xp_options *o, xp_model *m) {
    if (!o->has_layer)
        return XP_OK;
    const int layer = (int)o->layer;
    if (!xp_model_is_moe(m, layer))
        return XP_FAIL(XP_E_ARG, "--layer: %d is no MoE block of %s, which has %d layers, %d of them MoE blocks", layer,
                       m->name, m->layers, xp_model_moe_layers(m));
    memset(m->moe, 0, sizeof m->moe);
    m->moe[layer] = 1;
    xp_model_settle(m);
    return XP_OK;
}

/* The records as the layers' tensors complete them. */
static xp_status complete_dialects(xp_checkpoint *ck, xp_model *m) {
    for (int i = 0; i < m->layers; i++) {
        xp_dialect d = *xp_model_dialect(m, i);
        if (!m->moe[i])
            continue;
        XP_TRY(xp_checkpoint_dialect(ck, m, i, &d));
        XP_TRY(xp_model_set_dialect(m, i, &d));
    }
    xp_model_settle(m);
    return XP_OK;
}

static xp_status check_tables(const xp_weights *w) {
    for (int i = 0; i < XP_MAX_LAYERS; i++) {
        const xp_tensor *t = w->layer[i] ? &w->layer[i]->part[XP_PART_TABLE] : NULL;
        if (t && t->data && t->dim[0] < XP_VOCAB)
            return XP_FAIL(XP_E_FORMAT,
                           "--weights: layer %d's table has %" PRId64 " token ids, expected %d: tokens are bytes", i,
                           t->dim[0], (int)XP_VOCAB);
    }
    return XP_OK;
}

static xp_status load_weights(checking *s, int layers) {
    xp_checkpoint *ck;
    if (s->o->shrink != 1 || s->o->experts)
        return XP_FAIL(XP_E_ARG, "--weights: the file has the published sizes, %s excludes it",
                       s->o->experts ? "--experts" : "--shrink");
    XP_TRY(xp_model_override(&s->model, layers, 0, 0));
    XP_TRY(xp_checkpoint_open(s->o->weights, &ck));
    xp_status st = complete_dialects(ck, &s->model);
    if (st == XP_OK)
        st = xp_weights_load(ck, &s->model, &s->weights);
    xp_checkpoint_close(ck);
    XP_TRY(st);
    s->run.weights = &s->weights;
    return check_tables(&s->weights);
}

static void print_layers(const checking *s, const xp_case *c, const xp_model *m) {
    if (s->o->has_layer)
        fprintf(s->style.out, "layer %lld of %d layers; ", s->o->layer, m->layers);
    else
        fprintf(s->style.out, "%d of %d layers; ", c->layers, m->layers);
    int tables = 0;
    for (int i = 0; i < s->model.layers; i++)
        tables |= s->model.moe[i] && xp_model_dialect(&s->model, i)->select_on == XP_ON_TOKEN_TABLE;
    if (s->o->weights)
        fprintf(s->style.out, "MoE weights of %s%s, seeded norms and embedding\n", s->o->weights,
                tables ? " (experts by its tables)" : "");
    else
        fputs("seeded weights, not the published ones\n", s->style.out);
}

static void print_model(const checking *s, const xp_case *c, const xp_model *m) {
    char mesh[XP_MESH_TEXT];
    (void)xp_mesh_spec_print(&c->mesh, mesh, sizeof mesh);
    fprintf(s->style.out,
            "model %s (%s, dialect %s): E %" PRId64 ", k %" PRId64 ", H %" PRId64 ", F %" PRId64 ", shared %" PRId64
            "; ",
            m->name, m->model_type, m->dialect.name, m->E, m->K, m->H / c->shrink, m->F / c->shrink, m->S / c->shrink);
    print_layers(s, c, m);
    fprintf(s->style.out,
            "mesh %s: world %d; %" PRId64 " tokens of the global batch, bytes of %s (vocabulary 256); bf16 compute, "
            "f32 gradients, deterministic\n",
            mesh, c->mesh.world, c->dim['T' - 'A'], s->o->text ? s->o->text : "a seeded stream");
}

static xp_status run_model(checking *s) {
    struct rusage usage;
    xp_run_result r;
    xp_case c;
    XP_TRY(model_case(s->o, &c));
    XP_TRY(xp_case_model(&c, &s->model));
    XP_TRY(choose_layer(s->o, &s->model));
    const xp_model published = s->model;
    if (s->o->weights)
        XP_TRY(load_weights(s, c.layers));
    s->run.model = &s->model;
    s->run.sample_units = SAMPLE_UNITS;
    s->run.calls = 1; /* of each site: the first chunk of a parameter; every row is compared with the one-rank run */
    print_model(s, &c, &published);
    const xp_status st = xp_case_run(&c, &s->run, &r);
    if (st == XP_OK) {
        tally(s, &c, &r);
        xp_report_stages(&s->style, &r.judgement);
        s->style.verbose = 0;
        xp_report_case(&s->style, &c, &s->run, &r);
        if (r.parity && xp_report_parity(&s->style, r.parity) != 0)
            s->exit_code = xp_exit_worse(s->exit_code, XP_EXIT_FAIL);
        getrusage(RUSAGE_SELF, &usage);
        fprintf(s->style.out, "  guarded memory of all ranks at their peaks %.2f GiB; peak resident %.2f GiB; %.1f s\n",
                (double)r.peak_bytes / 0x1p30, (double)usage.ru_maxrss / 0x1p20, r.seconds);
    }
    xp_run_result_close(&r);
    return st;
}

/* ---- the command ---- */

static void summary(checking *s, double seconds) {
    char n[32], m[32];
    static const xp_verdict rest[] = {XP_V_VACUOUS, XP_V_ERROR, XP_V_HANG, XP_V_UNSUPPORTED, XP_V_SKIP};
    fprintf(s->style.out, "PASS %" PRId64 "  FAIL %" PRId64, s->count[XP_V_PASS], s->count[XP_V_FAIL]);
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        if (s->count[rest[i]])
            fprintf(s->style.out, "  %s %" PRId64, xp_verdict_name(rest[i]), s->count[rest[i]]);
    }
    if (s->redrawn)
        fprintf(s->style.out, "  (%" PRId64 " vacuous draws redrawn)", s->redrawn);
    fprintf(s->style.out, "  %s elements, %s remote rows compared", xp_report_count(s->elements, n),
            xp_report_count(s->remote, m));
    if (s->parity_rows)
        fprintf(s->style.out, ", %s rows against one rank", xp_report_count(s->parity_rows, n));
    if (s->run.dump)
        fprintf(s->style.out, ", %" PRId64 " calls written (%" PRId64 " that communicate are not)", s->dumped,
                s->dump_left);
    fprintf(s->style.out, "  %.1f s\n", seconds);
    const int64_t shown = s->ran - s->count[XP_V_SKIP] - s->count[XP_V_UNSUPPORTED];
    if (shown == 0)
        s->exit_code = xp_exit_worse(s->exit_code, XP_EXIT_NOTHING);
}

static xp_status run_all(checking *s) {
    if (s->o->random)
        return run_random(s);
    if (s->o->model)
        return run_model(s);
    if (s->o->words == 0)
        return run_word(s, "*");
    for (int i = 0; i < s->o->words; i++)
        XP_TRY(run_word(s, s->o->word[i]));
    return XP_OK;
}

/* Whether the mesh can be had at all, before the first case. */
static xp_status check_mesh(const xp_options *o) {
    xp_mesh_spec one, out;
    if (!o->mesh)
        return XP_OK;
    if (strchr(o->mesh, ':') || o->model)
        return xp_mesh_spec_parse(o->mesh, &out);
    XP_TRY(xp_mesh_spec_parse("sim:fsdp=1", &one));
    return xp_mesh_spec_rekind(&one, o->mesh, &out);
}

static xp_status count(const xp_case *c, void *arg) {
    (void)c;
    ++*(int *)arg;
    return XP_OK;
}

/* Wrong lines and files among the arguments are refused before the first of them runs. */
static xp_status check_words(const xp_options *o) {
    for (int i = 0; i < o->words; i++) {
        int cases = 0;
        if (strpbrk(o->word[i], " \t"))
            XP_TRY(xp_case_expand(o->word[i], NULL, NULL, count, &cases));
        else if (ends_with(o->word[i], ".txt"))
            XP_TRY(xp_case_file(o->word[i], NULL, NULL));
        if (o->dump && cases > 1)
            return XP_FAIL(XP_E_ARG, "--dump: the line stands for %d cases, a set holds one case", cases);
    }
    return XP_OK;
}

static xp_status open_checking(checking *s) {
    const xp_options *o = s->o;
    if (o->words && (o->model || o->random))
        return XP_FAIL(XP_E_ARG, "check: '%s' and %s exclude each other", o->word[0],
                       o->model ? "--model" : "--random");
    if (o->dump && (o->random || (!o->model && (o->words != 1 || !strpbrk(o->word[0], " \t")))))
        return XP_FAIL(XP_E_ARG, "--dump: one case line or --model, a set holds one case");
    if (o->random && (o->model || o->mesh || o->deterministic))
        return XP_FAIL(XP_E_ARG, "check: --random draws its own cases, %s excludes it",
                       o->model  ? "--model"
                       : o->mesh ? "--mesh"
                                 : "--deterministic");
    if (!o->model && (o->weights || o->has_layer))
        return XP_FAIL(XP_E_ARG, "check: %s needs --model", o->weights ? "--weights" : "--layer");
    if (o->layers && o->has_layer)
        return XP_FAIL(XP_E_ARG, "check: --layers and --layer exclude each other");
    if (!o->model && (o->has_tokens || o->layers || o->shrink != 1 || o->experts || o->topk))
        return XP_FAIL(XP_E_ARG, "check: --tokens, --layers, --shrink, --experts and --topk need --model");
    XP_TRY(check_mesh(o));
    XP_TRY(check_words(o));
    XP_TRY(xp_cmd_impl(o, &s->run.impl, &s->run.fault));
    s->run.impl_given = o->impl;
    s->run.text_given = o->text;
    s->run.weights_given = o->weights;
    s->run.one_layer = o->has_layer;
    s->run.against_one_rank = 1;
    s->run.dump = o->dump;
    s->run.dumped = &s->dumped;
    s->run.dump_left = &s->dump_left;
    if (o->text) {
        XP_TRY(xp_cmd_read(o->text, &s->text, &s->run.text_bytes));
        s->run.text = s->text;
    }
    s->style = xp_cmd_style(o);
    s->cases = o->json_file ? json_array() : NULL;
    return XP_OK;
}

int xp_cmd_check(const xp_options *o) {
    checking s = {.o = o};
    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    xp_status st = open_checking(&s);
    const int unwritable = st == XP_OK ? xp_cmd_dump_dir(o->dump) : XP_EXIT_OK;
    if (unwritable) {
        json_decref(s.cases);
        free(s.text);
        return unwritable;
    }
    if (st == XP_OK) {
        if (!s.style.quiet)
            fprintf(s.style.out, "# expar %s  impl=%s%s%s  seed=%llu\n", XP_VERSION, s.run.impl->name,
                    s.run.fault ? "  fault=" : "", s.run.fault ? s.run.fault->name : "", o->seed);
        st = run_all(&s);
    }
    if (st != XP_OK)
        s.exit_code = xp_exit_worse(s.exit_code, xp_cmd_fail(st));
    clock_gettime(CLOCK_MONOTONIC, &t1);
    if (st == XP_OK && (s.ran || s.exit_code == XP_EXIT_OK))
        summary(&s, (double)(t1.tv_sec - t0.tv_sec) + 1e-9 * (double)(t1.tv_nsec - t0.tv_nsec));
    if (s.cases && st == XP_OK) {
        json_t *root = xp_report_root("check", o->seed, s.run.impl->name, s.exit_code, s.cases);
        st = xp_report_write(o->json_file, root);
        json_decref(root);
        if (st != XP_OK) {
            (void)xp_cmd_fail(st);
            s.exit_code = xp_exit_worse(s.exit_code, XP_EXIT_OUTPUT);
        }
    }
    free(s.text);
    xp_weights_close(&s.weights);
    return s.exit_code;
}
