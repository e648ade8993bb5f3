/* The judge of one rank: which row runs, which row judges it, and the list of findings. See judge.h. */
#include "judge.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fault.h"
#include "judge_call.h"

/* ---- open, close ---- */

xp_status xp_judge_open(const xp_judge_options *o, xp_judge **out) {
    xp_status st;
    *out = NULL;
    if (!o->ref || o->ref->device->mem != XP_HOST)
        return XP_FAIL(XP_E_ARG, "judge: it needs a reference backend that works in host memory");
    xp_judge *j = calloc(1, sizeof *j);
    if (!j)
        return XP_FAIL(XP_E_NOMEM, "judge: %zu bytes", sizeof *j);
    j->o = *o;
    if (j->o.slice_bytes == 0)
        j->o.slice_bytes = (size_t)64 << 20;
    XP_GOTO(out, o->ref->device->open(0, &j->dev));
    XP_GOTO(out, o->ref->device->queue_open(j->dev, &j->q));
    XP_GOTO(out, xp_arena_open(o->ref->device, j->dev, j->q, &j->own));
    *out = j;
    return XP_OK;
out:
    xp_judge_close(j);
    return st;
}

void xp_judge_close(xp_judge *j) {
    if (!j)
        return;
    for (int i = 0; i < j->findings; i++)
        xp_bias_close(&j->bias[i]);
    xp_arena_close(j->own);
    if (j->q)
        j->o.ref->device->queue_close(j->q);
    if (j->dev)
        j->o.ref->device->close(j->dev);
    free(j->arrived.counts);
    free(j->finding);
    free(j->bias);
    free(j->site);
    free(j);
}

const xp_seen *xp_judge_seen(const xp_judge *j) {
    return &j->seen;
}

const xp_judge_options *xp_judge_get_options(const xp_judge *j) {
    return &j->o;
}

/* ---- findings ---- */

static int findings_grow(xp_judge *j) {
    const int room = j->room ? 2 * j->room : 32;
    xp_finding *f = realloc(j->finding, (size_t)room * sizeof *f);
    if (f)
        j->finding = f;
    xp_bias *b = realloc(j->bias, (size_t)room * sizeof *b);
    if (b)
        j->bias = b;
    if (f && b)
        j->room = room;
    return f && b;
}

static const xp_backend *judge_backend(const xp_judge *j, const xp_backend *judged) {
    return judged == j->o.ref ? j->o.dense : j->o.ref;
}

static void name_rows(const xp_judged *c, xp_finding *f) {
    const xp_fault *fault = c->r->fault;
    const int faulty = c->row && fault && xp_rank_tests(c->r, c->s) && strcmp(fault->stage, c->s->name) == 0;
    if (c->row)
        snprintf(f->row, sizeof f->row, "%s:%s%s", c->backend->name, c->row->name, faulty ? " (fault)" : "");
    if (c->judge)
        snprintf(f->judge, sizeof f->judge, "%s:%s", judge_backend(c->j, c->backend)->name, c->judge->name);
}

xp_finding *xp_judged_finding(xp_judged *c, int operand) {
    xp_judge *j = c->j;
    const char *name = operand >= 0 ? c->s->operand[operand].name : "";
    for (int i = 0; i < j->findings; i++) {
        xp_finding *f = &j->finding[i];
        if (strcmp(f->stage, c->s->name) == 0 && strncmp(f->site, c->site, sizeof f->site - 1) == 0 &&
            strcmp(f->operand, name) == 0)
            return f;
    }
    if (j->findings == j->room && !findings_grow(j))
        return NULL;
    xp_finding *f = &j->finding[j->findings];
    memset(f, 0, sizeof *f);
    memset(&j->bias[j->findings], 0, sizeof *j->bias);
    snprintf(f->stage, sizeof f->stage, "%s", c->s->name);
    snprintf(f->site, sizeof f->site, "%s", c->site);
    snprintf(f->operand, sizeof f->operand, "%s", name);
    f->seq = j->findings++;
    f->fail_call = f->rank = -1;
    f->first_call = j->calls;
    f->is_float =
        operand >= 0 && c->role[operand] && xp_dtype_is_float(xp_stage_ctensor(c->s, c->args, operand)->dtype);
    name_rows(c, f);
    return f;
}

xp_bias *xp_judged_bias(xp_judged *c, const xp_finding *f) {
    return &c->j->bias[f - c->j->finding];
}

void xp_judged_fail(xp_judged *c, int operand, xp_class cls, const xp_place *first, const char *fmt, ...) {
    xp_finding *f = xp_judged_finding(c, operand);
    c->failures++;
    if (!f)
        return;
    f->classes |= XP_BIT(cls);
    if (f->cls != XP_C_NONE)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(f->text, sizeof f->text, fmt, ap);
    va_end(ap);
    const int error = cls == XP_C_ARG || cls == XP_C_COMM || cls == XP_C_STATUS;
    f->cls = cls;
    f->verdict = cls == XP_C_HANG ? XP_V_HANG : error ? XP_V_ERROR : XP_V_FAIL;
    f->fail_call = c->j->calls;
    f->rank = c->r->rank;
    if (first && !f->first.set)
        f->first = *first;
}

/* Something that is neither right nor wrong; a failure outweighs it. */
static void note(xp_judged *c, int operand, xp_verdict v, const char *text) {
    xp_finding *f = xp_judged_finding(c, operand);
    if (!f || f->verdict >= v)
        return;
    f->verdict = v;
    f->rank = c->r->rank;
    f->fail_call = c->j->calls;
    snprintf(f->text, sizeof f->text, "%s", text);
}

static void settle_bias(xp_finding *f, const xp_bias *b, int rank) {
    if (b->n < XP_BIAS_LEAST)
        return;
    const double n = (double)b->n, limit = xp_bias_limit(b);
    const double mean = fabs(b->sum) >= fabs(b->sum_away) ? b->sum / n : b->sum_away / n;
    f->bias_state = 1;
    f->bias_n = b->n;
    f->bias_mean = mean;
    f->bias_limit = limit;
    if (fabs(mean) <= limit)
        return;
    f->classes |= XP_BIT(XP_C_BIAS);
    if (f->cls != XP_C_NONE)
        return;
    f->cls = XP_C_BIAS;
    f->verdict = XP_V_FAIL;
    f->rank = rank;
    f->fail_call = f->first_call;
    f->first = f->worst;
    snprintf(f->text, sizeof f->text,
             "errors lean %s: mean %+.4f units in the last place over %lld distinct values, limit %.4f",
             fabs(b->sum) >= fabs(b->sum_away) ? "one way" : (mean < 0.0 ? "towards zero" : "away from zero"), mean,
             (long long)b->n, limit);
}

int xp_judge_findings(xp_judge *j, const xp_finding **out) {
    for (int i = 0; i < j->findings; i++)
        settle_bias(&j->finding[i], &j->bias[i], j->rank);
    *out = j->finding;
    return j->findings;
}

/* ---- memory of a call ---- */

xp_status xp_judged_alloc(xp_judged *c, size_t bytes, void **out) {
    return xp_arena_alloc(c->mem, XP_KIND_JUDGE, bytes, out);
}

xp_status xp_judged_like(xp_judged *c, const xp_tensor *t, xp_dtype d, xp_tensor *out) {
    void *data;
    memset(out, 0, sizeof *out);
    XP_TRY(xp_judged_alloc(c, xp_dtype_bytes(d, xp_tensor_count(t)), &data));
    *out = xp_tensor_of(data, d, t->ndim, t->dim);
    return XP_OK;
}

static int64_t count_call(xp_judge *j, const xp_stage *s, const char *site, xp_status *out_status) {
    *out_status = XP_OK;
    for (int i = 0; i < j->sites; i++) {
        if (j->site[i].stage == s && strncmp(j->site[i].site, site, XP_SITE_BYTES - 1) == 0)
            return j->site[i].calls++;
    }
    if (j->sites == j->site_room) {
        const int room = j->site_room ? 2 * j->site_room : 32;
        xp_site_count *p = realloc(j->site, (size_t)room * sizeof *p);
        if (!p) {
            *out_status = XP_FAIL(XP_E_NOMEM, "judge: %d sites", room);
            return 0;
        }
        j->site = p;
        j->site_room = room;
    }
    xp_site_count *n = &j->site[j->sites++];
    memset(n, 0, sizeof *n);
    n->stage = s;
    snprintf(n->site, sizeof n->site, "%s", site);
    n->calls = 1;
    return 0;
}

/* A stage under replay takes its choice as an input. */
static int is_replaying(const xp_judged *c) {
    if (!c->s->replay)
        return 0;
    memcpy(c->slice[0], c->args, c->s->args_size);
    memcpy(c->slice[1], c->args, c->s->args_size);
    c->s->replay(c->slice[1], 1);
    return memcmp(c->slice[0], c->slice[1], c->s->args_size) == 0;
}

static void find_roles(xp_judged *c) {
    const int replaying = is_replaying(c);
    c->select = -1;
    for (int i = 0; i < c->s->operands; i++) {
        const xp_operand *o = &c->s->operand[i];
        const xp_tensor *t = xp_stage_ctensor(c->s, c->args, i);
        c->role[i] = t->data ? o->role : (xp_role)0;
        if (o->cmp != XP_SELECT || !t->data || o->role == XP_IN)
            continue;
        if (replaying)
            c->role[i] = XP_IN;
        else
            c->select = i;
    }
}

static xp_status call_open(xp_judged *c, xp_judge *j, xp_rank *r, const xp_stage *s, const char *site, void *args) {
    xp_status st;
    memset(c, 0, sizeof *c);
    c->j = j;
    c->r = r;
    c->s = s;
    c->site = site;
    c->args = args;
    c->select = -1;
    c->mem = r->impl->device->mem == XP_HOST ? r->arena : j->own;
    j->calls++;
    j->rank = r->rank;
    c->nth = count_call(j, s, site, &st);
    XP_TRY(st);
    if (s->operands > XP_CALL_OPERANDS)
        return XP_FAIL(XP_E_BUG, "stage %s: %d operands, the judge holds %d", s->name, s->operands, XP_CALL_OPERANDS);
    c->judging = (!j->o.stage || strcmp(j->o.stage, s->name) == 0) && (j->o.calls == 0 || c->nth < j->o.calls);
    XP_TRY(xp_judged_alloc(c, s->args_size, &c->host));
    memcpy(c->host, args, s->args_size);
    XP_TRY(xp_judged_alloc(c, s->args_size, &c->in));
    for (int i = 0; i < 3; i++)
        XP_TRY(xp_judged_alloc(c, s->args_size, &c->slice[i]));
    find_roles(c);
    return XP_OK;
}

static void call_close(xp_judged *c) {
    if (c->host) {
        for (int i = 0; i < c->s->operands; i++) {
            const xp_tensor *t = xp_stage_ctensor(c->s, c->host, i);
            if (t->data != xp_stage_ctensor(c->s, c->args, i)->data)
                xp_arena_release(c->mem, t->data);
            xp_arena_release(c->mem, c->saved[i].data);
        }
    }
    for (int i = 0; i < 3; i++)
        xp_arena_release(c->mem, c->slice[i]);
    xp_arena_release(c->mem, c->in);
    xp_arena_release(c->mem, c->host);
}

/* ---- rows ---- */

static int may_refuse(const xp_backend *b, const xp_stage *s) {
    for (const xp_kernel *const *k = b->kernel; *k; k++) {
        if (strcmp((*k)->stage->name, s->name) == 0 && (*k)->why_not)
            return 1;
    }
    return 0;
}

/* The largest value of all ranks. Collective over the world. */
static xp_status vote(xp_rank *r, int value, int *out) {
    const xp_device_ops *d = r->impl->device;
    const int64_t one = 1;
    int32_t v = value;
    xp_status st;
    xp_tensor t;
    *out = value;
    XP_TRY(xp_rank_tensor(r, XP_KIND_BUFFER, XP_I32, 1, &one, &t));
    xp_comm *world = r->mesh->axis[XP_WORLD];
    XP_GOTO(out, d->copy(r->q, t.data, d->mem, &v, XP_HOST, sizeof v));
    XP_GOTO(out, world->ops->all_reduce(world, r->q, &t, XP_MAX));
    XP_GOTO(out, d->copy(r->q, &v, XP_HOST, t.data, d->mem, sizeof v));
    XP_GOTO(out, d->sync(r->q));
    *out = (int)v;
    st = XP_OK;
out:
    xp_rank_drop(r, &t);
    return st;
}

/* Ranks of one collective must not run different backends: when one lacks the row, none uses it. */
static xp_status agree_on_row(xp_judged *c, const char **why) {
    int missing = c->row == NULL;
    if (c->s->axis == XP_LOCAL || c->r->world == 1 || !may_refuse(c->r->impl, c->s))
        return XP_OK;
    XP_TRY(vote(c->r, missing, &missing));
    if (missing && c->row) {
        c->row = NULL;
        *why = "another rank cannot";
    }
    return XP_OK;
}

static xp_status choose_row(xp_judged *c) {
    const int tested = xp_rank_tests(c->r, c->s);
    const char *why;
    char text[200];
    c->backend = tested ? c->r->impl : c->r->base;
    c->row = xp_rank_row(c->backend, c->s, c->args, c->r->mesh, &why);
    if (tested)
        XP_TRY(agree_on_row(c, &why));
    if (!c->row && tested) {
        snprintf(text, sizeof text, "backend %s cannot run it: %s", c->backend->name, why);
        note(c, -1, XP_V_UNSUPPORTED, text);
        c->judging = 0;
        if (c->r->base != c->r->impl) {
            c->backend = c->r->base;
            c->row = xp_rank_row(c->backend, c->s, c->args, c->r->mesh, &why);
        }
    }
    if (!c->row || c->backend->device->mem != c->r->impl->device->mem)
        return XP_FAIL(XP_E_ARG, "unsupported: backend %s cannot run stage %s (%s): %s", c->backend->name, c->s->name,
                       c->site, c->row ? "it works in another memory" : why);
    return XP_OK;
}

static void choose_judge(xp_judged *c) {
    const xp_backend *b = judge_backend(c->j, c->backend);
    const char *why;
    c->judge = b ? xp_rank_row(b, c->s, c->args, c->r->mesh, &why) : NULL;
    if (c->judge == c->row)
        c->judge = NULL;
    if (!c->judge)
        note(c, -1, XP_V_VACUOUS,
             b ? "the backend that judges this one has no row for the stage" : "nothing judges this backend");
}

/* ---- the call ---- */

static xp_status judge_call(xp_judged *c) {
    XP_TRY(c->s->check(c->args, c->r->mesh));
    c->checked = 1;
    XP_TRY(choose_row(c));
    if (!c->judging) {
        XP_TRY(xp_rank_exec(c->r, c->row, c->args));
        XP_TRY(xp_judged_enter(c));
        return xp_judged_observe(c);
    }
    choose_judge(c);
    XP_TRY(xp_judged_enter(c));
    XP_TRY(xp_judged_run(c));
    XP_TRY(xp_judged_observe(c));
    return xp_judged_compare(c);
}

static void record_status(xp_judged *c, xp_status st) {
    const xp_class cls = st == XP_E_HANG                 ? XP_C_HANG
                         : st == XP_E_COMM               ? XP_C_COMM
                         : st == XP_E_ARG && !c->checked ? XP_C_ARG
                                                         : XP_C_STATUS;
    xp_finding *f;
    if (st == XP_E_PEER)
        return; /* another rank has the reason */
    if (st == XP_E_ARG && (f = xp_judged_finding(c, -1)) != NULL && f->verdict == XP_V_UNSUPPORTED)
        return;
    xp_judged_fail(c, -1, cls, NULL, "%s", xp_error_text());
}

xp_status xp_judge_call(xp_judge *j, xp_rank *r, const xp_stage *stage, const char *site, void *args) {
    xp_judged c;
    xp_status st = call_open(&c, j, r, stage, site, args);
    if (st == XP_OK)
        st = judge_call(&c);
    if (st != XP_OK)
        record_status(&c, st);
    call_close(&c);
    return xp_rank_give_up(r, st);
}
