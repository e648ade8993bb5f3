/* The judge's side of a call: its row on views of a few units, the stage's bound, and the comparison.
 *
 * Expected values and bounds exist for one slice at a time. A stage that communicates is never cut and never left
 * early: every rank makes the same collective calls whatever it has found. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "judge_call.h"

enum { GOT = 0, IN = 1, JUDGE = 2 };

typedef struct {
    int64_t lo, hi;
    int whole; /* not cut: lo and hi mean nothing */
} units;

static xp_tensor *tensor(xp_judged *c, int which, int i) {
    return xp_stage_tensor(c->s, c->slice[which], i);
}

static int is_output(const xp_judged *c, int i) {
    return (c->role[i] & XP_OUT) != 0;
}

static int compares(const xp_judged *c, int i) {
    const xp_cmp m = c->s->operand[i].cmp;
    return is_output(c, i) && (m == XP_BITS || m == XP_BOUND);
}

/* ---- memory of a slice ---- */

static void views(xp_judged *c, const units *u) {
    const void *from[2] = {c->host, c->in};
    for (int k = 0; k < 2; k++) {
        memcpy(c->slice[k], from[k], c->s->args_size);
        if (!u->whole)
            c->s->slice(from[k], u->lo, u->hi, c->slice[k]);
    }
    memcpy(c->slice[JUDGE], c->slice[IN], c->s->args_size);
}

static xp_dtype judge_dtype(const xp_judged *c, int i) {
    return c->s->operand[i].cmp == XP_BOUND ? XP_F64 : xp_stage_ctensor(c->s, c->host, i)->dtype;
}

static void drop_outputs(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        xp_arena_release(c->mem, c->output[i]);
        c->output[i] = NULL;
    }
}

static xp_status make_outputs(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        xp_tensor t;
        if (!is_output(c, i))
            continue;
        XP_TRY(xp_judged_like(c, tensor(c, IN, i), judge_dtype(c, i), &t));
        c->output[i] = t.data;
        if (c->role[i] == XP_INOUT)
            xp_judged_copy(tensor(c, IN, i), &t);
        else
            xp_poison_fill(&t);
        *tensor(c, JUDGE, i) = t;
    }
    return XP_OK;
}

/* ---- the judge's row and the stage's bound ---- */

/* A judge that writes beside its operands is our own bug; it must not be blamed on the next row. */
static xp_status judge_guards(xp_judged *c) {
    xp_damage d;
    xp_status st;
    const int found = xp_arena_check(c->mem, &d, 1, &st);
    if (st == XP_OK && found > 0)
        return XP_FAIL(XP_E_BUG,
                       "the judge's row %s wrote outside its operands (%lld bytes, offset %lld of a block of "
                       "%zu)",
                       c->judge->name, (long long)d.damaged, (long long)d.offset, d.block.bytes);
    return st;
}

static xp_status run_judge(xp_judged *c) {
    const void *args = c->slice[JUDGE];
    const size_t need = c->judge->workspace ? c->judge->workspace(args, c->r->mesh) : 0;
    void *ws;
    XP_TRY(xp_judged_alloc(c, need, &ws));
    xp_poison_bytes(ws, need);
    const xp_exec x = {c->j->dev, c->j->q, c->r->mesh, ws, need};
    xp_status st = c->judge->run(&x, args);
    if (st == XP_OK)
        st = c->j->o.ref->device->sync(c->j->q);
    else if (st == XP_E_ARG)
        st = XP_FAIL(XP_E_BUG, "the judge's row %s: %s", c->judge->name, xp_error_text());
    if (st == XP_OK)
        st = judge_guards(c);
    xp_arena_release(c->mem, ws);
    return st;
}

/* A new tensor of tolerances for output i of the slice. */
static xp_status make_bound(xp_judged *c, int i, xp_tensor *out) {
    const size_t need = c->s->bound_workspace ? c->s->bound_workspace(c->slice[IN], c->r->mesh) : 0;
    void *ws;
    xp_status st = XP_OK;
    memset(out, 0, sizeof *out);
    if (!c->s->bound)
        return XP_FAIL(XP_E_BUG, "stage %s: operand %s is compared by bound and the stage has none", c->s->name,
                       c->s->operand[i].name);
    XP_TRY(xp_judged_alloc(c, need, &ws));
    XP_GOTO(out, xp_judged_like(c, tensor(c, JUDGE, i), XP_F64, out));
    XP_GOTO(out, c->s->bound(c->slice[IN], c->r->mesh, i, tensor(c, JUDGE, i), ws, out));
out:
    xp_arena_release(c->mem, ws);
    if (st != XP_OK) {
        xp_arena_release(c->mem, out->data);
        memset(out, 0, sizeof *out);
    }
    return st;
}

/* ---- a choice of experts ---- */

static const xp_tensor *input_named(xp_judged *c, const char *name) {
    const int i = xp_stage_operand(c->s, name);
    return i >= 0 && c->role[i] == XP_IN ? tensor(c, IN, i) : NULL;
}

/* The stage's keys and their errors, or the judge's scores (key stays absent) and their bound. */
static xp_status make_keys(xp_judged *c, int scores, xp_tensor *key, xp_tensor *tol) {
    if (!c->s->keys)
        return make_bound(c, scores, tol);
    void *ws = NULL;
    xp_status st = XP_OK;
    XP_TRY(xp_arena_alloc(c->mem, XP_KIND_JUDGE, c->s->bound_workspace(c->slice[IN], c->r->mesh), &ws));
    XP_GOTO(out, xp_judged_like(c, tensor(c, JUDGE, scores), XP_F64, key));
    XP_GOTO(out, xp_judged_like(c, tensor(c, JUDGE, scores), XP_F64, tol));
    st = c->s->keys(c->slice[IN], c->r->mesh, ws, key, tol);
out:
    xp_arena_release(c->mem, ws);
    return st;
}

/* Judges the choice, then has everything else judged under it. The buffer of the judge's own choice becomes the choice
 * that is replayed. */
static xp_status judge_choice(xp_judged *c) {
    const int sel = c->select, scores = c->s->scores ? xp_stage_operand(c->s, c->s->scores) : -1;
    xp_tensor tol = {0}, use = {0}, key = {0};
    xp_status st;
    if (!c->s->replay || scores < 0 || !compares(c, scores) || tensor(c, GOT, sel)->dtype != XP_I32)
        return XP_FAIL(XP_E_BUG, "stage %s: a choice needs replay, i32 ids and scores by bound", c->s->name);
    XP_TRY(run_judge(c));
    XP_GOTO(out, make_keys(c, scores, &key, &tol));
    XP_GOTO(out, xp_judged_like(c, tensor(c, JUDGE, sel), XP_I32, &use));
    const xp_choice v = {.idx = tensor(c, GOT, sel),
                         .mine = tensor(c, JUDGE, sel),
                         .score = key.data ? &key : tensor(c, JUDGE, scores),
                         .tol = &tol,
                         .logits = input_named(c, "logits"),
                         .bias = input_named(c, "bias"),
                         .use = &use};
    xp_judged_select(c, &v);
    xp_judged_copy(&use, tensor(c, JUDGE, sel));
    *tensor(c, IN, sel) = *tensor(c, JUDGE, sel);
    c->s->replay(c->slice[JUDGE], 1);
    c->s->replay(c->slice[IN], 1);
    for (int i = 0; i < c->s->operands; i++) {
        if (i != sel && c->role[i] == XP_OUT)
            xp_poison_fill(tensor(c, JUDGE, i));
    }
    st = run_judge(c);
out:
    xp_arena_release(c->mem, use.data);
    xp_arena_release(c->mem, tol.data);
    xp_arena_release(c->mem, key.data);
    return st;
}

/* ---- comparison ---- */

/* Fills the values of a place from the slice that it was found in. */
static void place_values(xp_judged *c, int i, const xp_tensor *tol, int64_t n, xp_place *p) {
    const xp_tensor *ref = tensor(c, JUDGE, i);
    xp_judged_place(c, i, tensor(c, GOT, i), n, p);
    p->expected = xp_widen(ref->data, ref->dtype, xp_tensor_offset(ref, n));
    p->bound = tol ? ((const double *)tol->data)[xp_tensor_offset(tol, n)] : 0.0;
    const double err = fabs(p->got - p->expected);
    p->ratio = err == 0.0 ? 0.0 : p->bound > 0.0 ? err / p->bound : (double)INFINITY;
}

/* A narrow output with one element a row (a rounded gate) is a factor that the row's elements share: an implementation
 * that does not round it leans by rows, and no test that takes elements one by one may look. */
static int shares_a_factor(const xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        const xp_tensor *t = xp_stage_ctensor(c->s, c->host, i);
        if (is_output(c, i) && t->ndim == 2 && t->dim[1] == 1 && xp_dtype_bits(t->dtype) <= 16)
            return 1;
    }
    return 0;
}

static int wants_bias(const xp_judged *c, const xp_finding *f) {
    return f->is_float && c->j->o.data == XP_DATA_REAL && !shares_a_factor(c);
}

static xp_status compare_operand(xp_judged *c, int i) {
    const int by_bound = c->s->operand[i].cmp == XP_BOUND;
    xp_finding *f = xp_judged_finding(c, i);
    xp_tensor tol = {0};
    if (!f)
        return XP_FAIL(XP_E_NOMEM, "judge: a finding");
    if (by_bound)
        XP_TRY(make_bound(c, i, &tol));
    xp_bias *bias = by_bound && wants_bias(c, f) ? xp_judged_bias(c, f) : NULL;
    const xp_status st = xp_compare(tensor(c, GOT, i), tensor(c, JUDGE, i), by_bound ? &tol : NULL, bias, &f->diff);
    if (st == XP_OK && f->diff.worst_at >= 0)
        place_values(c, i, by_bound ? &tol : NULL, f->diff.worst_at, &f->worst);
    if (st == XP_OK && f->diff.first_at >= 0 && !f->first.set)
        place_values(c, i, by_bound ? &tol : NULL, f->diff.first_at, &f->first);
    if (xp_judged_by_rows(c, i))
        f->remote += xp_judged_remote(c, i, tensor(c, GOT, i));
    xp_arena_release(c->mem, tol.data);
    return st;
}

/* Compares all outputs of one slice. A stage that communicates may do so in its bound: no output is passed over. */
static xp_status compare_slice(xp_judged *c, const units *u) {
    xp_status st;
    views(c, u);
    XP_GOTO(out, make_outputs(c));
    if (c->select >= 0)
        XP_GOTO(out, judge_choice(c));
    else
        XP_GOTO(out, run_judge(c));
    for (int i = 0; i < c->s->operands; i++) {
        if (compares(c, i))
            XP_GOTO(out, compare_operand(c, i));
    }
    st = XP_OK;
out:
    drop_outputs(c);
    return st;
}

/* ---- units ---- */

/* Units whose expected values and largest bound fit into the memory for a slice. */
static int64_t units_a_slice(xp_judged *c, int64_t extent) {
    const units one = {0, 1, 0};
    int64_t sum = 0, most = 0;
    views(c, &one);
    for (int i = 0; i < c->s->operands; i++) {
        if (!is_output(c, i))
            continue;
        const int64_t n = 8 * xp_tensor_count(tensor(c, GOT, i));
        sum += n;
        most = n > most ? n : most;
    }
    const int64_t fit = (int64_t)c->j->o.slice_bytes / (sum + most > 0 ? sum + most : 1);
    return fit < 1 ? 1 : fit < extent ? fit : extent;
}

/* One unit out of each of `strata` equal parts of the extent, the same for the same seed, site, rank and call. */
static int64_t draw(const xp_judged *c, int64_t stratum, int64_t strata, int64_t extent) {
    const int64_t key[4] = {(int64_t)c->j->o.seed, c->r->rank, c->nth, stratum};
    const uint64_t site = xp_hash_bytes(c->site, strlen(c->site), 0).lo;
    const int64_t lo = extent * stratum / strata, hi = extent * (stratum + 1) / strata;
    return lo + (int64_t)(xp_hash_bytes(key, sizeof key, site).lo % (uint64_t)(hi - lo));
}

/* Units to draw: as many as asked for, and at least 1024 elements where a unit is a single number. */
static int64_t sample_size(xp_judged *c) {
    const units one = {0, 1, 0};
    int64_t most = 1;
    views(c, &one);
    for (int i = 0; i < c->s->operands; i++) {
        const int64_t n = compares(c, i) ? xp_tensor_count(tensor(c, GOT, i)) : 0;
        most = n > most ? n : most;
    }
    const int64_t least = (1024 + most - 1) / most;
    return c->j->o.sample_units > least ? c->j->o.sample_units : least;
}

static xp_status compare_sample(xp_judged *c, int64_t extent, int64_t n, int64_t most) {
    units u = {0, 0, 0};
    for (int64_t s = 0; s < n; s++) {
        const int64_t at = draw(c, s, n, extent);
        if (at == u.hi && u.hi - u.lo < most && u.hi > u.lo) {
            u.hi++;
            continue;
        }
        if (u.hi > u.lo)
            XP_TRY(compare_slice(c, &u));
        u = (units){at, at + 1, 0};
    }
    return compare_slice(c, &u);
}

static xp_status compare_units(xp_judged *c) {
    const units whole = {0, 0, 1};
    if (!c->s->extent || !c->s->slice || c->s->axis != XP_LOCAL)
        return compare_slice(c, &whole);
    const int64_t extent = c->s->extent(c->host);
    if (extent <= 0)
        return compare_slice(c, &whole);
    const int64_t most = units_a_slice(c, extent);
    const int64_t sample = c->j->o.sample_units > 0 ? sample_size(c) : extent;
    int64_t used = extent;
    if (sample < extent && xp_judged_rows_in_use(c, extent, &used) && used == 0)
        used = extent;
    if (sample < used)
        return compare_sample(c, used, sample, most);
    if (most >= extent)
        return compare_slice(c, &whole);
    for (int64_t lo = 0; lo < extent; lo += most) {
        const units u = {lo, lo + most < extent ? lo + most : extent, 0};
        XP_TRY(compare_slice(c, &u));
    }
    return XP_OK;
}

/* ---- what was found ---- */

static void conclude(xp_judged *c, int i, int64_t wrong_before) {
    xp_finding *f = xp_judged_finding(c, i);
    const xp_diff *d = f ? &f->diff : NULL;
    const xp_class cls = d ? xp_diff_class(d) : XP_C_NONE;
    char pattern[96] = "";
    if (!f || d->wrong == wrong_before)
        return;
    if (xp_diff_pattern(d))
        snprintf(pattern, sizeof pattern, "; got = %.6g x expected on %lld of %lld", d->factor, (long long)d->same,
                 (long long)d->eligible);
    if (cls == XP_C_UNWRITTEN)
        xp_judged_fail(c, i, cls, NULL, "%lld of %lld elements were never written", (long long)d->unwritten,
                       (long long)d->elements);
    else if (cls == XP_C_POISON)
        xp_judged_fail(c, i, cls, NULL, "%lld elements beyond those in use were written", (long long)d->stray);
    else if (cls == XP_C_NAN)
        xp_judged_fail(c, i, cls, NULL, "%lld of %lld elements are NaN or infinite on one side only", (long long)d->nan,
                       (long long)d->elements);
    else if (cls == XP_C_BITS)
        xp_judged_fail(c, i, cls, NULL, "%lld of %lld elements have other bits%s", (long long)d->bits,
                       (long long)d->elements, pattern);
    else
        xp_judged_fail(c, i, cls, NULL, "%lld of %lld elements are out of bounds, the worst by %.3g times its bound%s",
                       (long long)d->bound, (long long)d->elements, d->ratio, pattern);
}

/* An identity is evaluated on outputs that passed, so that it may use them as indices. */
static xp_status check_properties(xp_judged *c) {
    if (c->failures > 0 || c->s->axis != XP_LOCAL || c->j->o.data == XP_DATA_EXTREME)
        return XP_OK;
    for (int i = 0; i < c->s->properties; i++) {
        double residual = (double)NAN;
        XP_TRY(c->s->property[i].residual(c->host, c->r->mesh, &residual));
        if (!(residual <= 1.0))
            xp_judged_fail(c, -1, XP_C_PROPERTY, NULL, "property %s: residual %.3g, expected at most 1",
                           c->s->property[i].name, residual);
    }
    return XP_OK;
}

xp_status xp_judged_compare(xp_judged *c) {
    int64_t wrong[XP_CALL_OPERANDS] = {0};
    if (!c->judge)
        return XP_OK;
    for (int i = 0; i < c->s->operands; i++) {
        xp_finding *f = compares(c, i) || i == c->select ? xp_judged_finding(c, i) : NULL;
        if (!f)
            continue;
        wrong[i] = f->diff.wrong;
        f->compares = 1;
        f->calls++;
        f->total += xp_tensor_count(xp_stage_ctensor(c->s, c->host, i));
        if (!xp_judged_by_rows(c, i))
            f->remote += xp_judged_remote(c, i, xp_stage_ctensor(c->s, c->host, i));
    }
    XP_TRY(compare_units(c));
    for (int i = 0; i < c->s->operands; i++) {
        if (compares(c, i))
            conclude(c, i, wrong[i]);
    }
    return check_properties(c);
}
