/* expar step: trains a model of seeded weights on a mesh and prints what each step gives. Nothing is judged here; a
 * fault that is switched on shows what it does to the numbers. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cmd.h"
#include "dump.h"
#include "registry.h"

typedef struct {
    const xp_options *o;
    const xp_plan *plan;
    const xp_backend *impl;
    const xp_fault *fault;
    xp_step_source src;
    int64_t steps;
    FILE *out;
    json_t *rows; /* rank 0 only; NULL: no -J */
    int lost;     /* a row found no memory */
    char digest[65];
    size_t peak[XP_MESH_MAX_RANKS][XP_NKIND], peak_total[XP_MESH_MAX_RANKS];
} training;

/* JSON has no NaN and no infinity. */
static json_t *number(double v) {
    return v - v == 0 ? json_real(v) : json_string(v != v ? "nan" : v > 0 ? "inf" : "-inf");
}

static void print_step(training *t, int64_t s, const xp_step_result *r) {
    fprintf(t->out, "%6" PRId64 "  %10.6f  %9.5f  %14.8g  %10.7f%s  %8.0f tok/s\n", s + 1, r->loss, r->balance,
            (double)r->norm, (double)r->coef,
            r->coef != r->coef ? " skipped"
            : r->coef == 1.0f  ? " untouched"
                               : " clipped  ",
            r->seconds > 0 ? (double)r->tokens / r->seconds : 0.0);
    fflush(t->out);
    if (t->rows)
        t->lost |= json_array_append_new(
            t->rows, json_pack("{s:I,s:o,s:o,s:o,s:o,s:I,s:f}", "step", (json_int_t)(s + 1), "loss", number(r->loss),
                               "balance", number(r->balance), "norm", number((double)r->norm), "coef",
                               number((double)r->coef), "tokens", (json_int_t)r->tokens, "seconds", r->seconds));
}

static xp_status train(training *t, xp_rank *r) {
    xp_step *st = NULL;
    xp_step_result res;
    char digest[65];
    r->fault = t->fault;
    if (t->o->dump)
        XP_TRY(xp_dump_open(t->o->dump, r->rank, r->world, t->plan->opt.seed, NULL, &r->dump));
    XP_TRY(xp_step_open(r, t->plan, &t->src, &st));
    xp_status status = XP_OK;
    for (int64_t s = 0; s < t->steps && status == XP_OK; s++) {
        status = xp_step_run(st, s, &res);
        if (status == XP_OK && r->rank == 0)
            print_step(t, s, &res);
    }
    if (status == XP_OK)
        status = xp_step_digest(st, digest);
    if (status == XP_OK && r->rank == 0)
        memcpy(t->digest, digest, sizeof digest);
    xp_step_close(st);
    return status;
}

static xp_status rank_main(const xp_mesh *mesh, int rank, void *arg) {
    training *t = arg;
    xp_rank r;
    size_t live[XP_NKIND];
    XP_TRY(xp_rank_open(mesh, t->impl, xp_backend_ref(), &r));
    xp_status st = train(t, &r);
    if (st == XP_OK)
        st = xp_dump_finish(r.dump, NULL, NULL);
    xp_dump_close(r.dump);
    xp_rank_memory(&r, live, t->peak[rank], &t->peak_total[rank]);
    xp_rank_close(&r);
    return st;
}

static void print_head(const training *t) {
    char mesh[XP_MESH_TEXT];
    const xp_plan *p = t->plan;
    (void)xp_mesh_spec_print(&p->mesh, mesh, sizeof mesh);
    fprintf(t->out,
            "# expar %s  impl=%s%s%s  model=%s  mesh=%s  world=%d  tokens=%" PRId64 " (global batch)  seed=%" PRIu64
            "%s\n",
            XP_VERSION, t->impl->name, t->fault ? "  fault=" : "", t->fault ? t->fault->name : "", p->model.name, mesh,
            p->mesh.world, p->opt.tokens, p->opt.seed, p->opt.deterministic ? "  deterministic" : "");
    fprintf(t->out,
            "# E %" PRId64 ", k %" PRId64 ", H %" PRId64 ", F %" PRId64 ", shared %" PRId64 ", %d MoE layers; %" PRId64
            " seeded parameters (not published weights); bytes of %s, vocabulary 256\n",
            p->model.E, p->model.K, p->model.H, p->model.F, p->model.S, p->blocks, p->elements,
            t->o->text ? t->o->text : "a seeded stream");
    if (p->opt.micro > 1)
        fprintf(t->out, "# %d micro-batches of %" PRId64 " tokens, gradients summed before the norm\n", p->opt.micro,
                xp_plan_micro_tokens(p));
    fprintf(t->out, "# %s; %s\n", xp_optimizer_name(p->opt.optimizer), p->path_why);
    fprintf(t->out, "%6s  %10s  %9s  %14s  %20s\n", "step", "loss/token", "balance", "gradient norm",
            "clip coefficient");
}

/* Measured bytes beside the plan's, for the rank with the most. */
static void print_memory(const training *t) {
    xp_plan_cost cost;
    int worst = 0;
    for (int i = 1; i < t->plan->mesh.world; i++) {
        if (t->peak_total[i] > t->peak_total[worst])
            worst = i;
    }
    xp_plan_cost_of(t->plan, worst, &cost);
    fprintf(
        t->out,
        "memory of rank %d, peak of each kind, KiB (plan in brackets; buffers hold workspace, which it leaves out):",
        worst);
    for (int k = 0; k < XP_KIND_JUDGE; k++)
        fprintf(t->out, " %s %.0f (%.0f)", xp_kind_name((xp_kind)k), (double)t->peak[worst][k] / 1024,
                cost.bytes[k] / 1024);
    fprintf(t->out, "; at once %.0f\n", (double)t->peak_total[worst] / 1024);
}

static xp_status write_json(training *t, int code) {
    json_t *root = xp_report_root("step", t->plan->opt.seed, t->impl->name, code, json_array());
    const int bad = t->lost || (root && (json_object_set(root, "steps", t->rows) != 0 ||
                                         json_object_set_new(root, "digest", json_string(t->digest)) != 0));
    const xp_status st =
        bad ? XP_FAIL(XP_E_NOMEM, "-J: no memory for the steps") : xp_report_write(t->o->json_file, root);
    json_decref(root);
    return st;
}

static int run(training *t, int *out_stuck) {
    xp_mesh_report end;
    int code = XP_EXIT_OK;
    print_head(t);
    const xp_status st = xp_mesh_run(&t->plan->mesh, rank_main, t, &end);
    *out_stuck = end.stuck;
    if (st == XP_OK) {
        print_memory(t);
        fprintf(t->out, "parameters sha256 %s\n", t->digest);
    } else {
        code = xp_cmd_fail(st);
    }
    if (t->rows && write_json(t, code) != XP_OK) {
        (void)xp_cmd_fail(XP_E_IO);
        code = xp_exit_worse(code, XP_EXIT_OUTPUT);
    }
    return code;
}

int xp_cmd_step(const xp_options *o) {
    xp_model model;
    xp_mesh_spec mesh;
    xp_step_options opt;
    xp_plan plan = {0};
    uint8_t *text = NULL;
    training *t = calloc(1, sizeof *t);
    xp_status st = t ? XP_OK : XP_FAIL(XP_E_NOMEM, "step: %zu bytes", sizeof *t);
    if (st == XP_OK && o->words)
        st = XP_FAIL(XP_E_ARG, "step: '%s' is no option; the model is --model NAME", o->word[0]);
    XP_GOTO(out, st);
    XP_GOTO(out, xp_cmd_impl(o, &t->impl, &t->fault));
    XP_GOTO(out, xp_cmd_model(o, &model));
    XP_GOTO(out, xp_cmd_mesh(o, "sim:fsdp=1", &mesh));
    xp_cmd_run_options(o, &opt);
    XP_GOTO(out, xp_plan_make(&model, &mesh, &opt, &plan));
    t->o = o;
    t->plan = &plan;
    t->steps = o->has_steps ? o->steps : 10;
    t->out = stdout;
    t->rows = o->json_file ? json_array() : NULL;
    t->src = (xp_step_source){.data = XP_DATA_REAL, .mode = XP_RUN_TRAIN, .align = 1};
    if (o->text) {
        XP_GOTO(out, xp_cmd_read(o->text, &text, &t->src.text_bytes));
        t->src.text = text;
        t->src.data = XP_DATA_TEXT;
    }
    int stuck = 0, code = xp_cmd_dump_dir(o->dump);
    if (code == XP_EXIT_OK)
        code = run(t, &stuck);
    if (stuck)
        return code; /* ranks that never returned still read what they were given */
    json_decref(t->rows);
    free(text);
    free(t);
    xp_plan_close(&plan);
    return code;
out:
    free(text);
    free(t);
    xp_plan_close(&plan);
    return xp_cmd_fail(st);
}
