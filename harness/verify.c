/* Verifies one test of a vector set.
 *
 * Outputs that are in a file are judged like any implementation's: a backend whose rows copy them into place runs
 * under the judge, with the reference behind it, so places, patterns, choices and replay are the same code for a file
 * and for a kernel. Where a set says bits, outputs are also compared with the expected ones bit for bit. It must not
 * take an expected value into what judges it. */
#include "verify.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bind.h"
#include "diagnose.h"
#include "registry.h"
#include "responses.h"

typedef struct {
    const xp_vectors_test *t;
    const xp_backend *impl; /* what runs: the files' backend, or a real one */
    xp_case c;
    xp_given given;
    xp_tensor expected[XP_BIND_OPERANDS]; /* data NULL: not stated */
    xp_judge *judge;
    xp_verify_result *out;
    char damage[320]; /* the expected file is not the one that the set was made with; "": it is */
    int compare_bits, any_tie, diagnose;
} job;

/* ---- the backend of files ---- */

/* What its rows copy: one test at a time, on one rank. */
static struct {
    const xp_stage *stage;
    const xp_tensor *answer;
} current;

static const xp_kernel *ref_row(const void *args, const xp_mesh *m) {
    const char *why;
    return xp_rank_row(xp_backend_ref(), current.stage, args, m, &why);
}

static size_t file_workspace(const void *args, const xp_mesh *m) {
    const xp_kernel *k = ref_row(args, m);
    return k && k->workspace ? k->workspace(args, m) : 0;
}

/* 1: a comes before b by key, then by lower id. */
static int key_before(const double *key, int32_t a, int32_t b) {
    return key[a] > key[b] || (key[a] == key[b] && a < b);
}

/* Whose answer leaves the order of slots open gets the stage's: descending keys. Every output of [T,K] moves along. */
static void sort_slots(const xp_stage *s, const void *args, const xp_tensor *key, int select) {
    const xp_tensor *idx = xp_stage_ctensor(s, args, select);
    for (int64_t t = 0; t < idx->dim[0]; t++) {
        int32_t *id = xp_tensor_at(idx, t, 0, 0, 0);
        const double *k = xp_tensor_at(key, t, 0, 0, 0);
        for (int64_t i = 1; i < idx->dim[1]; i++) {
            for (int64_t j = i; j > 0 && key_before(k, id[j], id[j - 1]); j--) {
                for (int o = 0; o < s->operands; o++) {
                    const xp_tensor *x = xp_stage_ctensor(s, args, o);
                    if (!(s->operand[o].role & XP_OUT) || strcmp(s->operand[o].shape, "T,K") != 0 || !x->data)
                        continue;
                    char swap[8], *a = xp_tensor_at(x, t, j, 0, 0), *b = xp_tensor_at(x, t, j - 1, 0, 0);
                    const size_t bytes = xp_dtype_bytes(x->dtype, 1);
                    memcpy(swap, a, bytes);
                    memcpy(a, b, bytes);
                    memcpy(b, swap, bytes);
                }
            }
        }
    }
}

static xp_status order_slots(const xp_exec *x, const xp_stage *s, const void *args) {
    const int select = xp_stage_operand(s, "idx"), scores = s->scores ? xp_stage_operand(s, s->scores) : -1;
    if (!s->keys || select < 0 || scores < 0 || s->operand[select].cmp != XP_SELECT)
        return XP_OK;
    const xp_tensor *like = xp_stage_ctensor(s, args, scores);
    const xp_tensor *idx = xp_stage_ctensor(s, args, select);
    for (int64_t n = 0; n < xp_tensor_count(idx); n++) {
        const int32_t id = ((const int32_t *)idx->data)[xp_tensor_offset(idx, n)];
        if (id < 0 || id >= like->dim[1])
            return XP_OK; /* the judge will say so */
    }
    double *v = calloc(2 * (size_t)xp_tensor_count(like) + 1, sizeof *v);
    void *ws = calloc(s->bound_workspace(args, x->mesh) + 64, 1);
    xp_status st = v && ws ? XP_OK : XP_FAIL(XP_E_NOMEM, "verify: keys");
    if (st == XP_OK) {
        xp_tensor key = xp_tensor_2d(v, XP_F64, like->dim[0], like->dim[1]), tol = key;
        tol.data = v + xp_tensor_count(like);
        st = s->keys(args, x->mesh, ws, &key, &tol);
        if (st == XP_OK)
            sort_slots(s, args, &key, select);
    }
    free(v);
    free(ws);
    return st;
}

/* Outputs that the file does not state are the reference's. */
static xp_status file_run(const xp_exec *x, const void *args) {
    const xp_stage *s = current.stage;
    const xp_kernel *k = ref_row(args, x->mesh);
    if (k)
        XP_TRY(k->run(x, args));
    for (int i = 0; i < s->operands; i++) {
        const xp_tensor *to = xp_stage_ctensor(s, args, i), *from = &current.answer[i];
        if (from->data && to->data)
            memcpy(to->data, from->data, xp_dtype_bytes(to->dtype, xp_tensor_count(to)));
    }
    return order_slots(x, s, args);
}

static const xp_backend *file_backend(const xp_stage *s, const xp_tensor *answer) {
    static xp_kernel row;
    static const xp_kernel *const rows[] = {&row, NULL};
    static xp_backend backend;
    current.stage = s;
    current.answer = answer;
    row = (xp_kernel){.stage = s, .name = "file", .det = 0, .workspace = file_workspace, .run = file_run};
    backend = *xp_backend_ref();
    backend.name = "file";
    backend.kernel = rows;
    return &backend;
}

/* ---- tensors of a test ---- */

/* in.x and exp.y -> the operand's number. XP_E_FORMAT for a name that the stage does not have. */
static xp_status operand_of(const xp_stage *s, const char *name, const char *prefix, int *out) {
    const size_t n = strlen(prefix);
    const int o = strncmp(name, prefix, n) == 0 ? xp_stage_operand(s, name + n) : -1;
    const int role = o < 0 ? 0 : (int)s->operand[o].role, want = prefix[0] == 'i' ? XP_IN : XP_OUT;
    if (!(role & want))
        return XP_FAIL(XP_E_FORMAT, "tensor '%s': stage %s has no such %s (expected %s<operand>)", name, s->name,
                       want == XP_IN ? "input" : "output", prefix);
    *out = o;
    return XP_OK;
}

/* Tensors of the prefix; others (bounds) are left. */
static xp_status place_file(const xp_stage *s, xp_safetensors *st, const char *prefix, xp_tensor *to) {
    for (int64_t i = 0; i < xp_safetensors_count(st); i++) {
        const char *name = xp_safetensors_at(st, i)->name;
        int o;
        if (strncmp(name, "bound.", 6) == 0)
            continue;
        XP_TRY(operand_of(s, name, prefix, &o));
        XP_TRY(xp_safetensors_view(st, i, &to[o]));
    }
    return XP_OK;
}

static xp_status place_response(const xp_stage *s, const xp_responses *r, xp_tensor *to) {
    const char *name;
    xp_tensor t;
    for (int i = 0; xp_responses_at(r, i, &name, &t); i++) {
        int o;
        XP_TRY(operand_of(s, name, "exp.", &o));
        to[o] = t;
    }
    return XP_OK;
}

/* Where element n (row-major) of operand i lies. */
static void place_of(const xp_stage *s, const xp_tensor *got, const xp_tensor *want, int operand, int64_t n,
                     xp_place *out) {
    int64_t left = n;
    int d = 0;
    *out = (xp_place){.set = 1, .rank = 0, .layer = -1, .step = -1, .token = -1, .expert = -1, .slot = -1};
    out->ndim = got->ndim;
    for (int i = got->ndim - 1; i >= 0; i--) {
        out->index[i] = left % got->dim[i];
        left /= got->dim[i];
    }
    for (const char *p = s->operand[operand].shape; *p && d < got->ndim; d++) {
        const size_t len = strcspn(p, ",");
        if (len == 1 && *p == 'T')
            out->token = out->index[d];
        else if (len == 1 && strchr("ELZ", *p))
            out->expert = out->index[d];
        else if (len == 1 && *p == 'K')
            out->slot = out->index[d];
        p += len + (p[len] == ',');
    }
    const int64_t at = xp_tensor_offset(got, n);
    out->dtype = (int)got->dtype;
    out->code = xp_code(got->data, got->dtype, at);
    out->got = xp_widen(got->data, got->dtype, at);
    out->expected = xp_widen(want->data, want->dtype, xp_tensor_offset(want, n));
    out->ratio = (double)INFINITY;
}

static int is_unchecked(const xp_vectors_test *t, const char *operand) {
    for (int i = 0; i < t->unchecked; i++) {
        if (strcmp(t->unchecks[i], operand) == 0)
            return 1;
    }
    return 0;
}

/* Every output is stated, but for those that the test lists. */
static xp_status check_complete(const job *j, const xp_tensor *answer, const char *whose) {
    const xp_stage *s = j->c.stage;
    for (int i = 0; i < s->operands; i++) {
        const xp_operand *o = &s->operand[i];
        if (o->role & XP_OUT && !o->optional && !answer[i].data && !is_unchecked(j->t, o->name) &&
            j->t->result != XP_VECTORS_ACCEPTABLE)
            return XP_FAIL(XP_E_FORMAT, "tensor 'exp.%s' is missing from the %s", o->name, whose);
        if (answer[i].data && j->expected[i].data && answer != j->expected) {
            const xp_tensor *a = &answer[i], *b = &j->expected[i];
            int same = a->ndim == b->ndim && a->dtype == b->dtype;
            for (int d = 0; same && d < a->ndim; d++)
                same = a->dim[d] == b->dim[d];
            if (!same)
                return XP_FAIL(XP_E_FORMAT,
                               "tensor 'exp.%s' of the %s has another dtype or shape than the expected one", o->name,
                               whose);
        }
    }
    return XP_OK;
}

/* ---- running ---- */

static xp_status compare_bits(job *j, const xp_stage *s, const void *args) {
    for (int i = 0; i < s->operands; i++) {
        const xp_tensor *got = xp_stage_ctensor(s, args, i), *want = &j->expected[i];
        xp_finding *f = &j->out->first;
        xp_diff d = {0};
        if (!want->data || !got->data)
            continue;
        XP_TRY(xp_compare(got, want, NULL, NULL, &d));
        j->out->elements += d.elements;
        j->out->bits += d.elements;
        if (d.wrong == 0 || f->diff.wrong)
            continue;
        f->diff = d;
        f->cls = XP_C_BITS;
        snprintf(f->stage, sizeof f->stage, "%s", s->name);
        snprintf(f->operand, sizeof f->operand, "%s", s->operand[i].name);
        place_of(s, got, want, i, d.first_at, &f->first);
        j->out->verdict = XP_V_FAIL;
    }
    return XP_OK;
}

static xp_status call_bound(xp_rank *r, const xp_stage *s, void *args, void *arg) {
    job *j = arg;
    XP_TRY(xp_call(r, s, s->name, args));
    if (j->diagnose)
        XP_TRY(xp_diagnose(r, s, args, j->out->diagnosis));
    return j->compare_bits ? compare_bits(j, s, args) : XP_OK;
}

static xp_status rank_main(const xp_mesh *mesh, int rank, void *arg) {
    job *j = arg;
    xp_rank r;
    (void)rank;
    XP_TRY(xp_rank_open(mesh, j->impl, xp_backend_ref(), &r));
    xp_status st = XP_OK;
    if (j->t->result != XP_VECTORS_INVALID) {
        const xp_judge_options o = {.ref = xp_backend_ref(),
                                    .dense = j->impl == xp_backend_ref() ? xp_backend_judge(xp_backend_ref()) : NULL,
                                    .stage = j->c.stage->name,
                                    .data = XP_DATA_EXACT, /* no bias test: values are few */
                                    .any_tie = j->any_tie,
                                    .seed = 1};
        st = xp_judge_open(&o, &j->judge);
    }
    r.judge = j->judge;
    if (st == XP_OK)
        st = xp_bind_given(&j->c, &r, &j->given, call_bound, j);
    xp_rank_close(&r);
    return st;
}

/* One run of j->impl under the judge. */
static xp_status run_once(job *j) {
    xp_mesh_spec one;
    xp_mesh_report end;
    xp_verify_result *out = j->out;
    XP_TRY(xp_mesh_spec_parse("sim:fsdp=1", &one));
    j->judge = NULL;
    xp_status st = xp_mesh_run(&one, rank_main, j, &end);
    if (j->judge && end.status == XP_OK) {
        xp_judgement *g = &out->judged[out->judgements++];
        st = xp_judgement_make(&j->judge, 1, &end, XP_EXPECT_NONE, g);
        out->elements += g->elements;
        const int vacuous = g->verdict == XP_V_VACUOUS; /* one rank claims no remote rows; zeros are what is expected */
        if (g->verdict > out->verdict && !(vacuous && g->elements > 0)) {
            out->verdict = g->verdict;
            snprintf(out->text, sizeof out->text, "%s: %s", j->impl->name, g->text);
        }
    }
    xp_judge_close(j->judge);
    j->judge = NULL;
    return end.status != XP_OK ? end.status : st;
}

static void failed(job *j, xp_verdict verdict, const char *why) {
    j->out->verdict = verdict;
    snprintf(j->out->text, sizeof j->out->text, "%s", why);
}

/* A prompt that must be refused, by the case line or by the stage, with a text that names what is wrong. */
static void judge_refusal(job *j, xp_status st) {
    char why[320];
    if (st == XP_OK) {
        failed(j, XP_V_FAIL, "an invalid prompt was accepted");
    } else if (!strstr(xp_error_text(), j->t->refusal)) {
        snprintf(why, sizeof why, "refused, but the text does not name '%s': %.200s", j->t->refusal, xp_error_text());
        failed(j, XP_V_FAIL, why);
    } else {
        j->out->elements++; /* the refusal is what was compared */
    }
}

static xp_status take_case(const xp_case *c, void *arg) {
    ((job *)arg)->c = *c;
    return XP_OK;
}

static xp_status run_valid(job *j, const xp_verify_options *o, xp_tensor *response) {
    j->compare_bits = j->t->compare == XP_VECTORS_BITS;
    j->impl = file_backend(j->c.stage, response ? response : j->expected);
    if (!response)
        j->compare_bits = 0; /* the expected outputs are themselves */
    j->any_tie = j->t->compare == XP_VECTORS_CLASSES;
    j->diagnose = response != NULL;
    XP_TRY(run_once(j));
    j->any_tie = 0;
    if (response)
        return XP_OK;
    j->compare_bits = j->t->compare == XP_VECTORS_BITS;
    j->impl = o->impl;
    return run_once(j);
}

static xp_status open_and_run(job *j, const xp_vectors *v, const xp_verify_options *o) {
    xp_safetensors *prompt = NULL, *expected = NULL;
    xp_responses *answer = NULL;
    xp_tensor response[XP_BIND_OPERANDS];
    xp_status st = XP_OK;
    int number = 0;
    memset(response, 0, sizeof response);
    XP_GOTO(out, xp_case_expand(j->t->line, NULL, &number, take_case, j));
    if (j->c.kind != XP_CASE_STAGE || j->c.stage->operands > XP_BIND_OPERANDS)
        XP_GOTO(out, XP_FAIL(XP_E_ARG, "case '%s': a vector's case is one stage", j->t->line));
    XP_GOTO(out, xp_vectors_prompt(v, j->t, &prompt));
    XP_GOTO(out, place_file(j->c.stage, prompt, "in.", j->given.in));
    if (j->t->result == XP_VECTORS_INVALID) {
        j->impl = o->impl;
        st = run_once(j);
        goto out;
    }
    st = xp_vectors_expected(v, j->t, &expected);
    if (st == XP_E_FORMAT) {
        snprintf(j->damage, sizeof j->damage, "%s", xp_error_text());
        st = xp_vectors_expected_damaged(v, j->t, &expected);
    }
    XP_GOTO(out, st);
    XP_GOTO(out, place_file(j->c.stage, expected, "exp.", j->expected));
    memcpy(j->given.out, j->expected, sizeof j->given.out);
    XP_GOTO(out, check_complete(j, j->expected, "expected file"));
    if (o->responses) {
        XP_GOTO(out, xp_responses_open(o->responses, j->t->expected, &answer));
        XP_GOTO(out, place_response(j->c.stage, answer, response));
        XP_GOTO(out, check_complete(j, response, "response"));
    }
    st = run_valid(j, o, o->responses ? response : NULL);
out:
    xp_safetensors_close(prompt);
    xp_safetensors_close(expected);
    xp_responses_close(answer);
    return st;
}

xp_status xp_verify_run(const xp_vectors *v, const xp_vectors_test *t, const xp_verify_options *o,
                        xp_verify_result *out) {
    memset(out, 0, sizeof *out);
    job *j = calloc(1, sizeof *j);
    if (!j)
        return XP_FAIL(XP_E_NOMEM, "verify: %zu bytes", sizeof *j);
    j->t = t;
    j->out = out;
    xp_status st = open_and_run(j, v, o);
    if (st != XP_E_NOMEM && st != XP_E_BUG) {
        if (t->result == XP_VECTORS_INVALID)
            judge_refusal(j, st);
        else if (st != XP_OK)
            failed(j, XP_V_ERROR, xp_error_text());
        else if (out->verdict == XP_V_FAIL && out->first.diff.wrong && !out->text[0])
            snprintf(out->text, sizeof out->text, "%lld of %lld elements of %s have other bits than expected",
                     (long long)out->first.diff.wrong, (long long)out->first.diff.elements, out->first.operand);
        if (out->verdict == XP_V_PASS && out->elements == 0)
            failed(j, XP_V_VACUOUS, "nothing was compared");
        if (j->damage[0]) {
            char found[sizeof out->text];
            snprintf(found, sizeof found, "%s", out->text[0] ? out->text : "no bound is exceeded");
            snprintf(out->text, sizeof out->text, "%s; %.300s", j->damage, found);
            out->verdict = XP_V_FAIL;
        }
        st = XP_OK;
    }
    free(j);
    return st;
}

void xp_verify_close(xp_verify_result *r) {
    for (int i = 0; i < r->judgements; i++)
        xp_judgement_close(&r->judged[i]);
}
