/* Relations of one backend and one record: see relations.h. The numbers and their changes are in relation_data.c, the
 * bounds in relation_bound.c; here they are run and compared. */
#include "relations.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "relation_bound.h"
#include "relation_data.h"

enum { SCALE = 7, PARTS = 2 };

const char *xp_relation_name(xp_relation r) {
    static const char *const name[] = {"ranks", "tokens", "experts", "ties", "split", "scale"};
    return name[r];
}

const char *xp_numbers_name(xp_numbers n) {
    static const char *const name[] = {"exact bf16", "real bf16", "real f32", "ties bf16"};
    return name[n];
}

const char *xp_held_mark(xp_held h) {
    static const char *const mark[] = {"=", "<", "n/a", "-", "FAIL"};
    return mark[h];
}

/* ---- what one comparison needs ---- */

typedef struct {
    const xp_backend *impl;
    xp_relations *all;
    xp_numbers numbers;
    xp_relation_data data;
    xp_chain_run run; /* of data, on one rank */
    xp_relation_bound *bound;
} bench;

/* One side: runs that together hold what the other side's one run holds. factor undoes a scaled loss. */
typedef struct {
    xp_chain_run run[PARTS];
    xp_relation_map map[PARTS]; /* rows and experts of the run, as of the changed numbers */
    int runs;
    double factor;
} side;

typedef enum { BY_BITS, BY_BOUND, NOT_AT_ALL } demand;

static const xp_relation_map as_they_are;

static void close_side(side *s) {
    for (int i = 0; i < s->runs; i++)
        xp_chain_close(&s->run[i]);
    s->runs = 0;
}

static void say(xp_relation_result *r, xp_held held, const char *text) {
    r->held = held;
    snprintf(r->text, sizeof r->text, "%s", text);
}

/* A run's own error is a result, unless the process cannot go on. */
static xp_status weigh(xp_status st, xp_relation_result *r) {
    if (st == XP_OK || st == XP_E_NOMEM || st == XP_E_DEVICE || st == XP_E_HANG || st == XP_E_BUG)
        return st;
    say(r, XP_HELD_NOT, xp_error_text());
    return XP_OK;
}

static xp_status run_part(bench *b, const xp_chain_in *in, const xp_chain_how *how, const xp_relation_map *m, side *s,
                          xp_relation_result *r) {
    xp_chain_run *run = &s->run[s->runs];
    s->map[s->runs++] = *m;
    const xp_status st = xp_chain(b->impl, in, how, run);
    b->all->own |= run->own;
    b->all->lent |= run->lent;
    return weigh(st, r);
}

/* ---- outputs as numbers ---- */

static int is_token(xp_chain_out o) {
    return o <= XP_CHAIN_DX;
}

static int by_expert(xp_chain_out o) {
    return o >= XP_CHAIN_DWR && o <= XP_CHAIN_DB2;
}

static double number(const xp_tensor *t, int64_t i) {
    return xp_widen(t->data, t->dtype, i);
}

/* Tokens' rows go to their places in the unchanged numbers; columns of logits and ids of experts to theirs. */
static void collect_tokens(const xp_chain_in *in, const xp_tensor *t, xp_chain_out o, const xp_relation_map *m,
                           double factor, double *into) {
    const int64_t width = t->dim[1];
    for (int64_t i = 0; i < t->dim[0]; i++) {
        double *row = into + (m->token ? m->token[i] : i) * width;
        for (int64_t j = 0; j < width; j++) {
            const int64_t from = o == XP_CHAIN_LOGITS && m->expert ? m->expert[j] : j;
            double v = number(t, i * width + from) * (o == XP_CHAIN_DX ? factor : 1.0);
            for (int64_t e = 0; o == XP_CHAIN_IDX && m->expert && e < in->Z; e++) {
                if (m->expert[e] == ((const int32_t *)t->data)[i * width + from])
                    v = (double)e;
            }
            row[j] = v;
        }
    }
}

/* Weight gradients are added to what other parts left. */
static void collect_sums(const xp_tensor *t, xp_chain_out o, const int *expert, double factor, double *into) {
    const int64_t n = xp_tensor_count(t), rows = o == XP_CHAIN_DWR || o == XP_CHAIN_DRBIAS ? t->dim[2] : t->dim[1];
    const int64_t width = n / rows;
    for (int64_t i = 0; i < n; i++) {
        const int64_t from = expert && by_expert(o) ? expert[i / width] * width + i % width : i;
        into[i] += number(t, from) * factor;
    }
}

static double *collect(const bench *b, const xp_chain_run *run, const xp_relation_map *map, int runs,
                       const xp_tensor *like, xp_chain_out o, double factor) {
    double *into = calloc((size_t)xp_tensor_count(like) + 1, sizeof *into);
    for (int i = 0; into && i < runs; i++) {
        if (is_token(o))
            collect_tokens(&b->data.in, &run[i].out[o], o, &map[i], factor, into);
        else
            collect_sums(&run[i].out[o], o, map[i].expert, factor, into);
    }
    for (int64_t i = 0; into && runs > 1 && like->dtype == XP_F32 && i < xp_tensor_count(like); i++)
        into[i] = (double)(float)into[i]; /* what one run would have stored */
    return into;
}

/* ---- bounds ---- */

static xp_status add_bound(bench *b, xp_chain_out o, int64_t lo, int64_t hi, double times, double *into) {
    const double *tol;
    int64_t n;
    XP_TRY(xp_relation_bound_of(b->bound, o, lo, hi, &tol, &n));
    for (int64_t i = 0; i < n; i++)
        into[i] += times * tol[i];
    return XP_OK;
}

/* How far two runs may be apart: both distances from the exact values, and of sums those of every part. The changed
 * numbers' bounds are the unchanged ones' in another order, equal but for the rounding of their own sums. */
static xp_status tolerance(bench *b, xp_relation rel, xp_chain_out o, const xp_tensor *like, double *out) {
    const double both = 2.0 * (1.0 + 0x1p-30), one = both / 2.0;
    const int64_t T = b->data.in.T, each = T / b->data.ranks;
    if (is_token(o) || (rel != XP_REL_SPLIT && rel != XP_REL_RANKS))
        return add_bound(b, o, 0, T, both, out);
    if (rel == XP_REL_SPLIT) {
        XP_TRY(add_bound(b, o, 0, T, one, out));
        XP_TRY(add_bound(b, o, 0, T / 2, one, out));
        return add_bound(b, o, T / 2, T, one, out);
    }
    const int parted = like->dim[0] > 1; /* a part for each block of tokens, or the fold of them */
    for (int64_t i = 0; i < b->data.ranks; i++)
        XP_TRY(add_bound(b, o, i * each, (i + 1) * each, both,
                         out + (parted ? i * (xp_tensor_count(like) / like->dim[0]) : 0)));
    return XP_OK;
}

/* ---- comparing ---- */

static int same(double want, double got, int sign) {
    return want == got && (!sign || signbit(want) == signbit(got));
}

static void put_where(xp_relation_result *r, xp_chain_out o, const xp_tensor *like, int64_t i, double want, double got,
                      double tol) {
    const int64_t width = like->dim[like->ndim - 1] > 1 ? like->dim[like->ndim - 1] : 1;
    char bound[48] = "to the bit";
    if (tol >= 0)
        snprintf(bound, sizeof bound, "bound %.9g", tol);
    r->held = XP_HELD_NOT;
    snprintf(r->text, sizeof r->text, "%s[%lld][%lld]: %.9g here, %.9g with the change undone, %s", xp_chain_name(o),
             (long long)(i / width), (long long)(i % width), want, got, bound);
}

static void compare_values(xp_relation_result *r, xp_chain_out o, const xp_tensor *like, const double *want,
                           const double *got, const double *tol) {
    for (int64_t i = 0; i < xp_tensor_count(like) && r->held != XP_HELD_NOT; i++) {
        r->elements++;
        if (same(want[i], got[i], is_token(o)))
            continue;
        const double apart = fabs(want[i] - got[i]);
        if (!tol || !(apart <= tol[i])) {
            put_where(r, o, like, i, want[i], got[i], tol ? tol[i] : -1.0);
            return;
        }
        if (apart > 0)
            r->ratio = fmax(r->ratio, apart / tol[i]);
        r->by_bound++;
        r->held = XP_HELD_BOUND;
    }
}

static int all_same(const double *want, const double *got, int64_t n, int sign) {
    for (int64_t i = 0; i < n; i++) {
        if (!same(want[i], got[i], sign))
            return 0;
    }
    return 1;
}

/* One output of both sides. base: the run that the change is of. */
static xp_status compare(bench *b, xp_relation rel, const xp_chain_run *base, const side *s, xp_chain_out o, demand d,
                         xp_relation_result *r) {
    const xp_tensor *like = &base->out[o];
    if (!like->data || d == NOT_AT_ALL || r->held == XP_HELD_NOT)
        return XP_OK;
    const int64_t n = xp_tensor_count(like);
    double *want = collect(b, base, &as_they_are, 1, like, o, 1.0);
    double *got = collect(b, s->run, s->map, s->runs, like, o, s->factor), *tol = NULL;
    xp_status st = want && got ? XP_OK : XP_FAIL(XP_E_NOMEM, "relations: %lld values", (long long)n);
    if (st == XP_OK && d == BY_BOUND && !all_same(want, got, n, is_token(o))) {
        tol = calloc((size_t)n + 1, sizeof *tol);
        st = tol ? tolerance(b, rel, o, like, tol) : XP_FAIL(XP_E_NOMEM, "relations: %lld bounds", (long long)n);
    }
    if (st == XP_OK)
        compare_values(r, o, like, want, got, tol);
    free(want);
    free(got);
    free(tol);
    return st;
}

/* Every token whose choice differs was given one that its own logits leave open, on both sides. */
static xp_status weigh_choices(bench *b, const side *s, xp_relation_result *r, int *out_differ) {
    const xp_chain_in *in = &b->data.in;
    const xp_relation_map *m = s->map;
    const xp_tensor *mine = &b->run.out[XP_CHAIN_IDX];
    double *want = collect(b, &b->run, &as_they_are, 1, mine, XP_CHAIN_IDX, 1.0);
    double *got = collect(b, s->run, m, s->runs, mine, XP_CHAIN_IDX, 1.0);
    double *logits = collect(b, s->run, m, s->runs, &b->run.out[XP_CHAIN_LOGITS], XP_CHAIN_LOGITS, 1.0);
    const int64_t dim[] = {in->T, in->Z};
    const xp_tensor theirs = xp_tensor_of(logits, XP_F64, 2, dim);
    xp_status st = want && got && logits ? XP_OK : XP_FAIL(XP_E_NOMEM, "relations: choices");
    for (int64_t t = 0; t < in->T && st == XP_OK && r->held != XP_HELD_NOT; t++) {
        int32_t choice[XP_RELATION_EXPERTS];
        int open = 1;
        for (int64_t k = 0; k < in->K; k++)
            choice[k] = (int32_t)got[t * in->K + k];
        if (all_same(want + t * in->K, got + t * in->K, in->K, 0))
            continue;
        *out_differ = 1;
        st = xp_relation_choice(in, &b->run.out[XP_CHAIN_LOGITS], t, (const int32_t *)mine->data + t * in->K, &open);
        if (st == XP_OK && open)
            st = xp_relation_choice(in, &theirs, t, choice, &open);
        if (st == XP_OK && !open)
            put_where(r, XP_CHAIN_IDX, mine, t * in->K, want[t * in->K], got[t * in->K], -1.0);
    }
    free(want);
    free(got);
    free(logits);
    return st;
}

/* What each output owes. */
static demand owed(const bench *b, xp_relation rel, xp_chain_out o, const xp_chain_run *base, const side *s) {
    int steady = base->steady, sums = base->steady_sums, repeats = base->repeats;
    for (int i = 0; i < s->runs; i++) {
        steady &= s->run[i].steady;
        sums &= s->run[i].steady_sums;
        repeats &= s->run[i].repeats;
    }
    const int bits = b->numbers == XP_NUMBERS_EXACT || (rel == XP_REL_SCALE && repeats) ||
                     (rel == XP_REL_RANKS && steady && (is_token(o) || sums)) ||
                     (rel == XP_REL_TOKENS && steady && is_token(o));
    if (bits)
        return BY_BITS;
    return o == XP_CHAIN_W ? NOT_AT_ALL : BY_BOUND; /* the block's bound has no weights: their
                                                       effects are judged */
}

static xp_status compare_all(bench *b, xp_relation rel, const xp_chain_run *base, const side *s,
                             xp_relation_result *r) {
    for (xp_chain_out o = XP_CHAIN_LOGITS; o < XP_CHAIN_OUTS; o++) {
        const demand d = owed(b, rel, o, base, s);
        if (o == XP_CHAIN_IDX && d == BY_BOUND)
            continue; /* weigh_choices() did */
        XP_TRY(compare(b, rel, base, s, o, d, r));
    }
    return XP_OK;
}

/* ---- relations ---- */

static xp_chain_how alone(const bench *b) {
    return (xp_chain_how){.ranks = 1, .align = b->numbers == XP_NUMBERS_EXACT ? 1 : 16};
}

static xp_status ranks(bench *b, xp_relation_result *r) {
    side one = {.factor = 1.0}, mesh = {.factor = 1.0};
    xp_chain_how how = alone(b);
    how.block = b->data.in.T / b->data.ranks;
    xp_status st = run_part(b, &b->data.in, &how, &as_they_are, &one, r);
    how.ranks = b->data.ranks;
    for (int i = 0; i < how.ranks; i++)
        how.deal[i] = (i + 1) % how.ranks;
    if (st == XP_OK && r->held != XP_HELD_NOT)
        st = run_part(b, &b->data.in, &how, &as_they_are, &mesh, r);
    if (st == XP_OK && r->held != XP_HELD_NOT)
        st = compare_all(b, XP_REL_RANKS, &one.run[0], &mesh, r);
    close_side(&one);
    close_side(&mesh);
    return st;
}

/* Runs the changed numbers; with given, under the choice of the unchanged ones.
 * */
static xp_status run_changed(bench *b, const xp_relation_map *m, int maps, int given, side *s, xp_relation_result *r) {
    const xp_chain_how how = alone(b);
    xp_relation_data from = b->data, changed;
    if (given)
        from.in.replay = b->run.out[XP_CHAIN_IDX];
    for (int i = 0; i < maps && r->held != XP_HELD_NOT; i++) {
        xp_status st = xp_relation_data_copy(&from, &m[i], &changed);
        if (st == XP_OK)
            st = run_part(b, &changed.in, &how, &m[i], s, r);
        xp_relation_data_close(&changed);
        XP_TRY(st);
    }
    return XP_OK;
}

/* Where no bit is owed a choice may differ that the numbers leave open; the rest is then compared under one choice. */
static xp_status changed(bench *b, xp_relation rel, const xp_relation_map *m, int maps, xp_relation_result *r) {
    side s = {.factor = 1.0};
    int differ = 0;
    xp_status st = run_changed(b, m, maps, 0, &s, r);
    if (st == XP_OK && r->held != XP_HELD_NOT && owed(b, rel, XP_CHAIN_IDX, &b->run, &s) == BY_BOUND)
        st = weigh_choices(b, &s, r, &differ);
    if (st == XP_OK && differ && r->held != XP_HELD_NOT) {
        close_side(&s);
        st = run_changed(b, m, maps, 1, &s, r);
        r->held = r->held == XP_HELD_BITS ? XP_HELD_BOUND : r->held;
    }
    if (st == XP_OK && r->held != XP_HELD_NOT)
        st = compare_all(b, rel, &b->run, &s, r);
    close_side(&s);
    return st;
}

static xp_status tokens(bench *b, xp_relation_result *r) {
    int order[XP_RELATION_TOKENS];
    xp_relation_shuffle(b->data.in.T, 1, order);
    return changed(b, XP_REL_TOKENS, &(xp_relation_map){.token = order, .tokens = b->data.in.T}, 1, r);
}

static xp_status experts(bench *b, xp_relation_result *r) {
    int order[XP_RELATION_EXPERTS];
    xp_relation_experts(&b->data.in, order);
    return changed(b, XP_REL_EXPERTS, &(xp_relation_map){.expert = order}, 1, r);
}

static xp_status split(bench *b, xp_relation_result *r) {
    int order[XP_RELATION_TOKENS];
    const int64_t T = b->data.in.T;
    for (int64_t t = 0; t < T; t++)
        order[t] = (int)t;
    const xp_relation_map half[] = {{.token = order, .tokens = T / 2}, {.token = order + T / 2, .tokens = T - T / 2}};
    return changed(b, XP_REL_SPLIT, half, 2, r);
}

static xp_status scale(bench *b, xp_relation_result *r) {
    const xp_chain_how how = alone(b);
    side s = {.factor = ldexp(1.0, -SCALE)};
    xp_relation_data big;
    xp_status st = xp_relation_data_copy(&b->data, &as_they_are, &big);
    if (st == XP_OK)
        xp_relation_data_scale(&big, ldexp(1.0, SCALE));
    if (st == XP_OK)
        st = run_part(b, &big.in, &how, &as_they_are, &s, r);
    if (st == XP_OK && r->held != XP_HELD_NOT)
        st = compare_all(b, XP_REL_SCALE, &b->run, &s, r);
    xp_relation_data_close(&big);
    close_side(&s);
    return st;
}

/* What slot k of the changed numbers must hold: of twins that fill one slot the lower in the new order; of twins that
 * fill two the lower first. */
static int expect_slot(const xp_chain_in *in, int64_t t, const int *order, const int32_t *choice, int64_t k) {
    const int twin = xp_relation_twin(in, t, choice[k]), a = order[choice[k]], b = order[twin];
    const int second = k > 0 && choice[k - 1] == twin && twin != choice[k];
    return (a < b) != second ? a : b;
}

/* 1: the unchanged numbers' own choice puts the higher of two equal ones first. */
static int breaks_rule(const xp_chain_in *in, int64_t t, const int32_t *choice, int64_t k) {
    const int twin = xp_relation_twin(in, t, choice[k]);
    return twin < choice[k] && (k == 0 || choice[k - 1] != twin);
}

static void compare_ties(const xp_chain_in *in, int64_t t, const int *order, const int32_t *before,
                         const int32_t *after, xp_relation_result *r) {
    for (int64_t k = 0; k < in->K && r->held != XP_HELD_NOT; k++) {
        r->elements++;
        if (before[k] < 0 || before[k] >= in->Z) {
            r->held = XP_HELD_NOT;
            snprintf(r->text, sizeof r->text, "idx[%lld][%lld]: %d is no expert", (long long)t, (long long)k,
                     before[k]);
        } else if (breaks_rule(in, t, before, k)) {
            r->held = XP_HELD_NOT;
            snprintf(r->text, sizeof r->text, "idx[%lld][%lld]: %d, and %d of equal score is the lower index",
                     (long long)t, (long long)k, before[k], xp_relation_twin(in, t, before[k]));
        } else if (after[k] != expect_slot(in, t, order, before, k)) {
            r->held = XP_HELD_NOT;
            snprintf(r->text, sizeof r->text, "idx[%lld][%lld]: %d here, %d with experts in another order, expected %d",
                     (long long)t, (long long)k, before[k], after[k], expect_slot(in, t, order, before, k));
        }
    }
}

static xp_status run_ties(bench *b, const xp_relation_data *x, const xp_relation_data *y, const int *order,
                          xp_relation_result *r) {
    side s = {.factor = 1.0};
    xp_chain_how how = alone(b);
    how.route_only = 1;
    xp_status st = run_part(b, &x->in, &how, &as_they_are, &s, r);
    if (st == XP_OK && r->held != XP_HELD_NOT)
        st = run_part(b, &y->in, &how, &as_they_are, &s, r);
    const int32_t *before = s.run[0].out[XP_CHAIN_IDX].data, *after = s.run[1].out[XP_CHAIN_IDX].data;
    for (int64_t t = 0; t < x->in.T && st == XP_OK; t++) {
        if (r->held != XP_HELD_NOT)
            compare_ties(&x->in, t, order, before + t * x->in.K, after + t * x->in.K, r);
    }
    close_side(&s);
    return st;
}

static xp_status ties(bench *b, xp_relation_result *r) {
    int order[XP_RELATION_EXPERTS];
    xp_relation_data x, y = {0};
    if (b->data.in.d->select_on == XP_ON_TOKEN_TABLE) {
        say(r, XP_HELD_NA, "a table chooses the experts: no scores are compared");
        return XP_OK;
    }
    xp_status st = xp_relation_data_open(b->data.in.d, XP_NUMBERS_TIES, &x);
    if (st == XP_OK) {
        xp_relation_experts(&x.in, order);
        st = xp_relation_data_copy(&x, &(xp_relation_map){.expert = order}, &y);
    }
    if (st == XP_OK)
        st = run_ties(b, &x, &y, order, r);
    xp_relation_data_close(&y);
    xp_relation_data_close(&x);
    return st;
}

/* ---- all of them ---- */

/* A relation between zeros, or between numbers that nobody wrote, shows nothing. */
static int nothing_in(const xp_chain_run *run, char *text, size_t bytes) {
    for (int o = 0; o < XP_CHAIN_OUTS; o++) {
        const xp_tensor *t = &run->out[o];
        int64_t zeros = 0;
        for (int64_t i = 0; t->data && i < xp_tensor_count(t); i++) {
            const double v = number(t, i);
            zeros += v == 0;
            if (!isfinite(v)) {
                snprintf(text, bytes, "%s: element %lld is not written, or not finite", xp_chain_name((xp_chain_out)o),
                         (long long)i);
                return 1;
            }
        }
        if (t->data && zeros == xp_tensor_count(t)) {
            snprintf(text, bytes, "%s: nothing but zeros", xp_chain_name((xp_chain_out)o));
            return 1;
        }
    }
    return 0;
}

static void say_all(xp_relation_result *r, xp_held held, const char *text) {
    for (int i = 0; i < XP_RELATIONS; i++)
        say(&r[i], held, text);
}

static xp_status run_relations(bench *b, xp_relation_result *r) {
    static xp_status (*const run[])(bench *, xp_relation_result *) = {
        [XP_REL_RANKS] = ranks, [XP_REL_TOKENS] = tokens, [XP_REL_EXPERTS] = experts,
        [XP_REL_TIES] = ties,   [XP_REL_SPLIT] = split,   [XP_REL_SCALE] = scale};
    XP_TRY(xp_relation_bound_open(&b->data.in, &b->run.out[XP_CHAIN_IDX], &b->bound));
    for (int i = 0; i < XP_RELATIONS; i++) {
        if (i == XP_REL_TIES && b->numbers != XP_NUMBERS_EXACT)
            say(&r[i], XP_HELD_NA, "real numbers have no ties");
        else
            XP_TRY(run[i](b, &r[i]));
    }
    return XP_OK;
}

static xp_status run_numbers(bench *b, const xp_dialect *d, xp_relation_result *r) {
    char text[160];
    const xp_chain_how how = alone(b);
    xp_status st = xp_relation_data_open(d, b->numbers, &b->data);
    if (st == XP_E_ARG) {
        say_all(r, XP_HELD_UNSUPPORTED, xp_error_text());
        return XP_OK;
    }
    XP_TRY(st);
    st = xp_chain(b->impl, &b->data.in, &how, &b->run);
    b->all->own |= b->run.own;
    b->all->lent |= b->run.lent;
    if (st == XP_E_NOMEM || st == XP_E_DEVICE || st == XP_E_HANG || st == XP_E_BUG)
        return st;
    if (st != XP_OK)
        say_all(r, b->run.unsupported ? XP_HELD_UNSUPPORTED : XP_HELD_NOT, xp_error_text());
    else if (b->run.own == 0)
        say_all(r, XP_HELD_UNSUPPORTED, "no stage of the block has a row of this backend");
    else if (nothing_in(&b->run, text, sizeof text))
        say_all(r, XP_HELD_NOT, text);
    else
        return run_relations(b, r);
    return XP_OK;
}

xp_status xp_relations_run(const xp_backend *impl, const xp_dialect *d, xp_relations *out) {
    xp_status st = XP_OK;
    memset(out, 0, sizeof *out);
    for (int n = 0; n < XP_NUMBERS && st == XP_OK; n++) {
        bench b = {.impl = impl, .all = out, .numbers = (xp_numbers)n};
        st = run_numbers(&b, d, out->on[n]);
        xp_relation_bound_close(b.bound);
        xp_chain_close(&b.run);
        xp_relation_data_close(&b.data);
    }
    return st;
}
