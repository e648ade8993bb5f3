/* Runs a case: opens a judge on every rank, runs the stage, the layers or the step, and makes one judgement of what the
 * ranks found.
 *
 * A stage with a chain gets its inputs from that chain's run, in which it alone is judged; any other stage gets
 * generated ones (bind.c). */
#include "run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bind.h"
#include "dump.h"
#include "registry.h"

typedef struct {
    const xp_case *c;
    const xp_run_options *o;
    const xp_plan *plan;
    xp_parity *parity;
    xp_judge *judge[XP_MESH_MAX_RANKS];
    size_t peak[XP_MESH_MAX_RANKS];
    xp_step_result result[XP_MESH_MAX_RANKS];
    int64_t dumped[XP_MESH_MAX_RANKS], dump_left[XP_MESH_MAX_RANKS];
    int judged; /* 0: the run only records for the parity store */
} job;

static int is_chain(const xp_case *c) {
    return c->kind != XP_CASE_STAGE || c->stage->chain != NULL;
}

xp_status xp_case_model(const xp_case *c, xp_model *out) {
    if (c->model[0]) {
        XP_TRY(xp_model_open(c->model, out));
        XP_TRY(xp_model_override(out, 0, c->dim_set['E' - 'A'] ? c->dim['E' - 'A'] : 0,
                                 c->dim_set['K' - 'A'] ? c->dim['K' - 'A'] : 0));
        return XP_OK;
    }
    xp_dialect d;
    XP_TRY(xp_case_dialect(c, &d));
    XP_TRY(xp_model_of("case", &d, c->layers, c->dim['H' - 'A'], c->dim['F' - 'A'], c->dim['E' - 'A'],
                       c->dim['K' - 'A'], c->dim['S' - 'A'], out));
    XP_TRY(xp_model_set_router_width(out, d.router_in == XP_ROUTER_RECURRENT_MLP ? c->dim['R' - 'A'] : 0));
    XP_TRY(xp_model_set_latent(out, c->dim['D' - 'A']));
    return xp_model_set_around(out, c->around);
}

/* The options that a layer or step case stands for. */
static xp_status options_of(const xp_case *c, xp_step_options *out) {
    *out = xp_step_defaults();
    out->tokens = c->dim['T' - 'A'];
    out->layers = c->layers;
    out->shrink = c->shrink;
    out->act = c->dtype[XP_G_ACT];
    out->param = c->dtype[XP_G_PARAM] != XP_NDTYPE ? c->dtype[XP_G_PARAM] : out->act;
    /* A whole step keeps f32 masters and gradients whatever it computes in; the layers alone can be f64 throughout. */
    const xp_dtype wide = out->act == XP_F64 && c->kind != XP_CASE_STEP ? XP_F64 : XP_F32;
    out->grad = c->dtype[XP_G_GRAD] != XP_NDTYPE ? c->dtype[XP_G_GRAD] : wide;
    out->reduce = c->dtype[XP_G_REDUCE] != XP_NDTYPE ? c->dtype[XP_G_REDUCE] : wide;
    out->router = c->dtype[XP_G_ROUTER] != XP_NDTYPE ? c->dtype[XP_G_ROUTER] : out->act == XP_F64 ? XP_F64 : XP_F32;
    out->shared = c->dtype[XP_G_SHARED];
    out->gate = c->dtype[XP_G_GATE];
    out->expert_reduce = c->dtype[XP_G_EXPERT_REDUCE];
    out->deterministic = c->deterministic;
    out->micro = c->micro;
    out->average = c->divide;
    out->seed = c->seed;
    return XP_OK;
}

static xp_status open_judge(job *j, xp_rank *r) {
    const xp_judge_options o = {
        .ref = xp_backend_ref(),
        .dense = j->o->impl == xp_backend_ref() ? xp_backend_judge(xp_backend_ref()) : NULL,
        .stage = j->c->kind == XP_CASE_STAGE ? j->c->stage->name : NULL,
        .data = j->c->data,
        .calls = j->o->calls,
        .sample_units = j->o->sample_units,
        .seed = j->c->seed,
        .twice = XP_TWICE_FIRST,
    };
    XP_TRY(xp_judge_open(&o, &j->judge[r->rank]));
    r->judge = j->judge[r->rank];
    r->fault = j->o->fault;
    r->only = o.stage;
    return XP_OK;
}

static xp_status run_chain(job *j, xp_rank *r) {
    const xp_step_source src = {
        .text = j->c->data == XP_DATA_TEXT ? j->o->text : NULL,
        .text_bytes = j->o->text_bytes,
        .data = j->c->data,
        .mode = j->c->kind == XP_CASE_STEP   ? XP_RUN_TRAIN
                : j->c->data == XP_DATA_TEXT ? XP_RUN_GRADS
                                             : XP_RUN_LAYER,
        .parity = j->parity,
        .order = j->c->order,
        .align = j->c->align,
        .weights = j->o->weights,
    };
    xp_step *st = NULL;
    XP_TRY(xp_step_open(r, j->plan, &src, &st));
    xp_status status = XP_OK;
    for (int s = 0; s < j->c->steps && status == XP_OK; s++)
        status = xp_step_run(st, s, &j->result[r->rank]);
    xp_step_close(st);
    return status;
}

static xp_status rank_main(const xp_mesh *mesh, int rank, void *arg) {
    job *j = arg;
    xp_rank r;
    size_t live[XP_NKIND], peak[XP_NKIND];
    XP_TRY(xp_rank_open(mesh, j->judged ? j->o->impl : xp_backend_ref(), xp_backend_ref(), &r));
    xp_status st = j->judged ? open_judge(j, &r) : XP_OK;
    if (st == XP_OK && j->judged && j->o->dump)
        st = xp_dump_open(j->o->dump, rank, r.world, j->c->seed, j->c->kind == XP_CASE_STAGE ? j->c->stage->name : NULL,
                          &r.dump);
    if (st == XP_OK)
        st = is_chain(j->c) ? run_chain(j, &r) : xp_bind_run(j->c, &r);
    if (st == XP_OK)
        st = xp_dump_finish(r.dump, &j->dumped[rank], &j->dump_left[rank]);
    xp_dump_close(r.dump);
    xp_rank_memory(&r, live, peak, &j->peak[rank]);
    xp_rank_close(&r);
    return st;
}

static void close_judges(job *j) {
    for (int i = 0; i < XP_MESH_MAX_RANKS; i++) {
        xp_judge_close(j->judge[i]);
        j->judge[i] = NULL;
    }
}

/* The one-rank run whose rows the mesh must reproduce; one that fails ends the case as the mesh's own run would. Where
 * micro-batches owe the bits of one batch, it takes one: deterministic, and no loss that is not linear in the batch. */
static xp_status record(job *j, const xp_model *model, const xp_step_options *options, xp_mesh_report *out) {
    xp_mesh_spec one;
    xp_plan p1;
    xp_step_options opt_one = *options;
    const xp_step_options *opt = &opt_one;
    if (options->deterministic && (isnan(options->aux_coef) ? model->dialect.aux_coef : options->aux_coef) == 0)
        opt_one.micro = 1;
    XP_TRY(xp_mesh_spec_parse("sim:fsdp=1", &one));
    XP_TRY(xp_plan_make(model, &one, opt, &p1));
    j->plan = &p1;
    j->judged = 0;
    const xp_status st = xp_mesh_run(&one, rank_main, j, out);
    xp_plan_close(&p1);
    j->judged = 1;
    xp_parity_compare(j->parity);
    return st;
}

static xp_status run_planned(job *j, xp_run_result *out) {
    xp_model model;
    xp_step_options opt;
    xp_plan plan;
    xp_status st = XP_OK;
    XP_TRY(xp_case_of_chain(j->c));
    if (j->o->model)
        model = *j->o->model;
    else
        XP_TRY(xp_case_model(j->c, &model));
    XP_TRY(options_of(j->c, &opt));
    XP_TRY(xp_plan_make(&model, &j->c->mesh, &opt, &plan));
    /* The one-rank run is the reference's: no other backend owes its bits. */
    const int against = j->o->against_one_rank && (j->c->mesh.world > 1 || j->c->micro > 1);
    if (against && j->o->impl == xp_backend_ref()) {
        XP_GOTO(out, xp_parity_open(&out->parity));
        j->parity = out->parity;
        XP_GOTO(out, record(j, &model, &opt, &out->end));
    }
    j->plan = &plan;
    j->judged = 1;
    st = xp_mesh_run(&j->c->mesh, rank_main, j, &out->end);
out:
    xp_plan_close(&plan);
    return st;
}

/* A row that differs from the one-rank run fails the case; where the stages found nothing, it is the reason. */
static void weigh_parity(xp_run_result *r) {
    xp_parity_line l, worst = {.first = -1};
    for (int i = 0; r->parity && xp_parity_result(r->parity, i, &l); i++) {
        r->parity_rows += l.rows;
        r->parity_wrong += l.different + l.missing;
        if (worst.first < 0 && l.different + l.missing > 0)
            worst = l;
    }
    xp_judgement *g = &r->judgement;
    if (r->parity_wrong == 0 || g->verdict >= XP_V_ERROR)
        return;
    g->verdict = XP_V_FAIL;
    snprintf(g->text, sizeof g->text,
             "against one rank: %s layer %d step %d: %lld rows %s, %lld are missing; the first is row %lld, rank %d",
             worst.site, worst.layer, worst.step, (long long)worst.different,
             worst.by_bound ? "out of bounds" : "differ", (long long)worst.missing, (long long)worst.first, worst.rank);
}

xp_status xp_case_run(const xp_case *c, const xp_run_options *o, xp_run_result *out) {
    struct timespec t0, t1;
    memset(out, 0, sizeof *out);
    job *j = calloc(1, sizeof *j);
    if (!j)
        return XP_FAIL(XP_E_NOMEM, "case: %zu bytes", sizeof *j);
    j->c = c;
    j->o = o;
    j->judged = 1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    xp_status st = is_chain(c) ? run_planned(j, out) : xp_mesh_run(&c->mesh, rank_main, j, &out->end);
    if (out->end.world > 0)
        st = xp_judgement_make(j->judge, out->end.world, &out->end, c->expect, &out->judgement);
    if (st == XP_OK && out->end.status == XP_OK)
        weigh_parity(out);
    clock_gettime(CLOCK_MONOTONIC, &t1);
    out->seconds = (double)(t1.tv_sec - t0.tv_sec) + 1e-9 * (double)(t1.tv_nsec - t0.tv_nsec);
    for (int i = 0; i < XP_MESH_MAX_RANKS && o->dump; i++) {
        *o->dumped += j->dumped[i];
        *o->dump_left += j->dump_left[i];
    }
    out->result = j->result[0];
    for (int i = 0; i < XP_MESH_MAX_RANKS; i++)
        out->peak_bytes += j->peak[i];
    if (out->end.stuck)
        return st; /* ranks that never returned may still touch their judges */
    close_judges(j);
    free(j);
    return st;
}

void xp_run_result_close(xp_run_result *r) {
    xp_judgement_close(&r->judgement);
    xp_parity_close(r->parity);
    r->parity = NULL;
}
