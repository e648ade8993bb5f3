/* All ranks' findings as one table and one verdict.
 *
 * A pure function of the findings: the order in which ranks ran or failed changes nothing. It decides what no rank can
 * decide alone: whether the data showed anything, and whether undecided choices are as rare as they must be. */
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "judge_call.h"

const char *xp_verdict_name(xp_verdict v) {
    static const char *const name[XP_V_HANG + 1] = {"PASS", "SKIP", "UNSUPPORTED", "VACUOUS", "ERROR", "FAIL", "HANG"};
    return (unsigned)v <= XP_V_HANG ? name[v] : "UNKNOWN";
}

static const char *const expect_name[] = {"none", "local", "zero", "one_expert"};

const char *xp_expect_name(xp_expect e) {
    return (unsigned)e <= XP_EXPECT_ONE_EXPERT ? expect_name[e] : "unknown";
}

xp_status xp_expect_parse(const char *text, xp_expect *out) {
    *out = XP_EXPECT_NONE;
    for (int e = 0; e <= XP_EXPECT_ONE_EXPERT; e++) {
        if (strcmp(text, expect_name[e]) == 0) {
            *out = (xp_expect)e;
            return XP_OK;
        }
    }
    return XP_FAIL(XP_E_ARG, "expect: '%s' is none of none, local, zero, one_expert", text);
}

/* ---- one line out of the ranks' findings ---- */

static int same_key(const xp_finding *a, const xp_finding *b) {
    return strcmp(a->stage, b->stage) == 0 && strcmp(a->site, b->site) == 0 && strcmp(a->operand, b->operand) == 0;
}

static void merge_pattern(xp_diff *a, const xp_diff *b) {
    if (a->eligible == 0)
        a->factor = b->factor;
    if (a->factor == b->factor)
        a->same += b->same;
    a->eligible += b->eligible;
}

static void merge_diff(xp_diff *a, const xp_diff *b) {
    merge_pattern(a, b);
    a->elements += b->elements;
    a->unbounded += b->unbounded;
    a->untouched += b->untouched;
    a->wrong += b->wrong;
    a->bits += b->bits;
    a->bound += b->bound;
    a->nan += b->nan;
    a->unwritten += b->unwritten;
    a->stray += b->stray;
    a->zeros += b->zeros;
    a->inexact += b->inexact;
    if (b->ratio > a->ratio)
        a->ratio = b->ratio;
}

static void merge_bias(xp_finding *a, const xp_finding *b) {
    if (!b->bias_state)
        return;
    if (!a->bias_state || fabs(b->bias_mean) * a->bias_limit > fabs(a->bias_mean) * b->bias_limit) {
        a->bias_mean = b->bias_mean;
        a->bias_limit = b->bias_limit;
        a->bias_n = b->bias_n;
    }
    a->bias_state = 1;
}

/* The earlier failure tells the story; of two in the same call, the lower rank's, which is already there. */
static void merge_failure(xp_finding *a, const xp_finding *b) {
    const int a_failed = a->verdict >= XP_V_ERROR;
    const int earlier = a_failed && b->verdict >= XP_V_ERROR && b->fail_call < a->fail_call;
    const int graver = !a_failed && b->verdict > a->verdict;
    a->classes |= b->classes;
    if (earlier || graver) {
        a->cls = b->cls;
        a->first = b->first;
        a->fail_call = b->fail_call;
        a->rank = b->rank;
        memcpy(a->text, b->text, sizeof a->text);
    }
    if (b->verdict > a->verdict)
        a->verdict = b->verdict;
}

static void merge(xp_finding *a, const xp_finding *b) {
    if (b->worst.set && (!a->worst.set || b->diff.ratio > a->diff.ratio))
        a->worst = b->worst;
    merge_diff(&a->diff, &b->diff);
    merge_bias(a, b);
    merge_failure(a, b);
    a->calls = b->calls > a->calls ? b->calls : a->calls;
    a->total += b->total;
    a->remote += b->remote;
    a->chosen += b->chosen;
    a->undecided += b->undecided;
    a->reordered += b->reordered;
    a->experts = b->experts > a->experts ? b->experts : a->experts;
    a->compares |= b->compares;
    a->is_float |= b->is_float;
    if (!a->row[0])
        memcpy(a->row, b->row, sizeof a->row);
    if (!a->judge[0])
        memcpy(a->judge, b->judge, sizeof a->judge);
}

/* Adds one rank's findings. A line that is new comes behind the one that precedes it on its own rank. */
static xp_status add_rank(xp_judgement *g, int *room, const xp_finding *f, int n) {
    int after = -1;
    for (int i = 0; i < n; i++) {
        int at = 0;
        while (at < g->lines && !same_key(&g->line[at], &f[i]))
            at++;
        if (at < g->lines) {
            merge(&g->line[at], &f[i]);
            after = at;
            continue;
        }
        if (g->lines == *room) {
            const int more = *room ? 2 * *room : 64;
            xp_finding *p = realloc(g->line, (size_t)more * sizeof *p);
            if (!p)
                return XP_FAIL(XP_E_NOMEM, "judgement: %d lines", more);
            g->line = p;
            *room = more;
        }
        after++;
        memmove(g->line + after + 1, g->line + after, (size_t)(g->lines - after) * sizeof *f);
        g->line[after] = f[i];
        g->lines++;
    }
    return XP_OK;
}

/* ---- what the data could show ---- */

/* Lines of the same stage and site as line i follow one another from the first of them. */
static int same_site(const xp_finding *a, const xp_finding *b) {
    return strcmp(a->stage, b->stage) == 0 && strcmp(a->site, b->site) == 0;
}

typedef struct {
    int64_t elements, zeros, float_elements, float_zeros;
    int compares;
} shown;

static shown shown_at(const xp_judgement *g, int i) {
    shown s = {0};
    for (int k = 0; k < g->lines; k++) {
        const xp_finding *f = &g->line[k];
        if (!same_site(f, &g->line[i]) || !f->compares)
            continue;
        s.compares = 1;
        s.elements += f->diff.elements;
        s.zeros += f->diff.zeros;
        s.float_elements += f->is_float ? f->diff.elements : 0;
        s.float_zeros += f->is_float ? f->diff.zeros : 0;
    }
    return s;
}

static int all_zero(const shown *s) {
    return s->float_elements > 0 ? s->float_zeros == s->float_elements : s->elements > 0 && s->zeros == s->elements;
}

static void set_vacuous(xp_finding *f, const char *why) {
    if (f->verdict >= XP_V_VACUOUS)
        return;
    f->verdict = XP_V_VACUOUS;
    snprintf(f->text, sizeof f->text, "%s", why);
}

/* Marks stages that compared nothing but zeros, or nothing at all. */
static void mark_vacuous(xp_judgement *g, xp_expect expect) {
    for (int i = 0; i < g->lines; i++) {
        const shown s = shown_at(g, i);
        xp_finding *f = &g->line[i];
        if (!s.compares || !f->compares)
            continue;
        if (s.elements == 0 && expect == XP_EXPECT_ZERO)
            g->zero = 1; /* a case without tokens or elements: nothing to compare is what it declares */
        else if (s.elements == 0)
            set_vacuous(f, "nothing was compared");
        else if (all_zero(&s)) {
            g->zero = 1;
            if (expect != XP_EXPECT_ZERO)
                set_vacuous(f, "every compared element of the stage is 0");
        }
    }
}

/* Chance that two right paths choose different sets, for iid N(0,1) logits and 0.2 % of independent noise, by the
 * number of experts: measured over independent draws. A bound that leaves more undecided hides more than bf16 rounding.
 */
static double undecided_rate(int64_t experts) {
    static const struct {
        int64_t experts;
        double rate;
    } law[] = {{8, 0.0017}, {64, 0.0155}, {128, 0.0278}, {256, 0.0369}, {INT64_MAX, 0.0448}};
    int i = 0;
    while (experts > law[i].experts)
        i++;
    return law[i].rate;
}

/* The number that a binomial count of n trials exceeds with a chance below 1e-9; at least 2. */
static int64_t undecided_cap(int64_t n, double p) {
    double log_term = (double)n * log1p(-p), cdf = exp(log_term);
    int64_t k = 0;
    while (k < n && ((double)k < (double)n * p || 1.0 - cdf > 1e-9)) {
        log_term += log((double)(n - k) / (double)(k + 1)) + log(p / (1.0 - p));
        cdf += exp(log_term);
        k++;
    }
    return k < 2 ? 2 : k;
}

static void cap_undecided(xp_judgement *g) {
    for (int i = 0; i < g->lines; i++) {
        xp_finding *f = &g->line[i];
        const int64_t cap = f->chosen ? undecided_cap(f->chosen, undecided_rate(f->experts)) : 0;
        if (f->undecided <= cap || f->verdict >= XP_V_ERROR)
            continue;
        f->verdict = XP_V_FAIL;
        f->cls = XP_C_CAP;
        f->classes |= XP_BIT(XP_C_CAP);
        f->fail_call = f->first_call;
        snprintf(f->text, sizeof f->text,
                 "%lld of %lld tokens are undecided, at most %lld can be by chance among %lld experts",
                 (long long)f->undecided, (long long)f->chosen, (long long)cap, (long long)f->experts);
    }
}

/* ---- the verdict ---- */

static void see(xp_seen *all, const xp_seen *s) {
    if (s->ep > all->ep)
        all->ep = s->ep;
    all->sent += s->sent;
    all->sent_away += s->sent_away;
    if (s->tokens > 0) {
        all->choices_differ |= s->choices_differ || (all->tokens > 0 && s->choice != all->choice);
        all->choice = s->choice;
        all->tokens += s->tokens;
    }
}

static void sum_up(xp_judgement *g) {
    for (int i = 0; i < g->lines; i++) {
        const xp_finding *f = &g->line[i];
        g->count[f->verdict]++;
        g->elements += f->diff.elements;
        g->remote += f->remote;
        g->wrong += f->diff.wrong;
        g->undecided += f->undecided;
        if (f->verdict > g->verdict)
            g->verdict = f->verdict;
        if (f->verdict < XP_V_ERROR)
            continue;
        if (g->first < 0 || f->fail_call < g->line[g->first].fail_call)
            g->first = i;
    }
    for (int i = 0; i < g->lines; i++)
        g->line[i].seq = i;
}

static void raise_to(xp_judgement *g, xp_verdict v, const char *fmt, ...) XP_PRINTF(3, 4);
static void raise_to(xp_judgement *g, xp_verdict v, const char *fmt, ...) {
    if (g->verdict >= v)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(g->text, sizeof g->text, fmt, ap);
    va_end(ap);
    g->verdict = v;
}

/* How the ranks ended, when not all is well. */
static void raise_ends(xp_judgement *g, const xp_mesh_report *end) {
    if (!end || end->status == XP_OK)
        return;
    if (end->world == 0) {
        raise_to(g, XP_V_SKIP, "%s", xp_error_text());
        return;
    }
    const int r = end->first >= 0 ? end->first : 0;
    const char *text = end->end[r].text;
    if (strncmp(text, "unsupported: ", 13) == 0)
        raise_to(g, XP_V_UNSUPPORTED, "%.200s", text + 13);
    else
        raise_to(g, end->status == XP_E_HANG ? XP_V_HANG : XP_V_ERROR, "rank %d: %.240s", r, text);
}

/* The line to quote for a verdict: the culprit, else the first with that verdict. */
static void quote(xp_judgement *g) {
    int i = g->first >= 0 && g->line[g->first].verdict >= XP_V_ERROR ? g->first : -1;
    for (int k = 0; k < g->lines && i < 0; k++) {
        if (g->line[k].verdict == g->verdict && g->verdict != XP_V_PASS)
            i = k;
    }
    if (i < 0)
        return;
    const xp_finding *f = &g->line[i];
    char who[24] = "", site[56] = "";
    if (f->rank >= 0 && f->verdict >= XP_V_ERROR)
        snprintf(who, sizeof who, "rank %d: ", f->rank);
    if (strcmp(f->site, f->stage) != 0)
        snprintf(site, sizeof site, " (%s)", f->site);
    snprintf(g->text, sizeof g->text, "%s%s%s%s%s %s%s%s", who, f->stage, site, f->operand[0] ? " " : "", f->operand,
             f->cls ? xp_class_name(f->cls) : xp_verdict_name(f->verdict), f->text[0] ? ": " : "", f->text);
}

/* Which vacuous results hold, against the one that the case declares. */
static void weigh_expectation(xp_judgement *g, xp_expect expect) {
    const int holds[] = {0, g->local, g->zero, g->one_expert};
    static const char *const why[] = {"", "no row left its rank", "a stage compares nothing, or only zeros",
                                      "all tokens took the same experts"};
    for (int e = XP_EXPECT_LOCAL; e <= XP_EXPECT_ONE_EXPERT; e++) {
        if (holds[e] && e != (int)expect)
            raise_to(g, XP_V_VACUOUS, "%s", why[e]);
        else if (!holds[e] && e == (int)expect)
            raise_to(g, XP_V_FAIL, "the case expects %s, but it does not hold that %s", xp_expect_name(expect), why[e]);
    }
}

static xp_status collect(xp_judge *const *judge, int ranks, const xp_mesh_report *end, xp_judgement *g, xp_seen *seen,
                         int *out_capped) {
    int room = 0;
    for (int r = 0; r < ranks; r++) {
        const xp_finding *f;
        if (!judge[r] || (end && r < end->world && end->end[r].stuck))
            continue;
        const int n = xp_judge_findings(judge[r], &f);
        const xp_data data = xp_judge_get_options(judge[r])->data;
        *out_capped = data == XP_DATA_REAL || data == XP_DATA_TEXT;
        see(seen, xp_judge_seen(judge[r]));
        XP_TRY(add_rank(g, &room, f, n));
    }
    return XP_OK;
}

xp_status xp_judgement_make(xp_judge *const *judge, int ranks, const xp_mesh_report *end, xp_expect expect,
                            xp_judgement *out) {
    xp_seen seen = {0};
    int capped = 0;
    memset(out, 0, sizeof *out);
    out->first = -1;
    const xp_status st = collect(judge, ranks, end, out, &seen, &capped);
    if (st != XP_OK) {
        xp_judgement_close(out);
        return st;
    }
    if (capped)
        cap_undecided(out);
    out->local = seen.ep > 1 && seen.sent > 0 && seen.sent_away == 0;
    out->one_expert = seen.tokens > 1 && !seen.choices_differ;
    mark_vacuous(out, expect);
    sum_up(out);
    if (out->verdict != XP_V_PASS)
        quote(out);
    raise_ends(out, end);
    if (out->verdict == XP_V_SKIP || out->verdict == XP_V_UNSUPPORTED)
        return XP_OK; /* it claims nothing */
    weigh_expectation(out, expect);
    if (out->elements == 0 && !(expect == XP_EXPECT_ZERO && out->zero))
        raise_to(out, XP_V_VACUOUS, "nothing was compared");
    return XP_OK;
}

void xp_judgement_close(xp_judgement *g) {
    free(g->line);
    memset(g, 0, sizeof *g);
    g->first = -1;
}

/* ---- the block of a failed line ---- */

void xp_finding_print(FILE *out, const xp_finding *f, const char *said) {
    char text[320];
    const xp_place *p = f->first.set ? &f->first : NULL;
    fprintf(out, "  stage  %s%s%s%s%s%s\n", f->stage, strcmp(f->site, f->stage) ? " (" : "",
            strcmp(f->site, f->stage) ? f->site : "", strcmp(f->site, f->stage) ? ")" : "",
            f->operand[0] ? ", operand " : "", f->operand);
    fprintf(out, "  rows   %s judged by %s\n", f->row[0] ? f->row : "-", f->judge[0] ? f->judge : "-");
    if (p) {
        xp_place_print(p, text, sizeof text);
        fprintf(out, "  where  %s\n", text);
        xp_place_values(p, text, sizeof text);
        fprintf(out, "  values %s\n", text);
    } else if (f->rank >= 0) {
        fprintf(out, "  where  rank %d\n", f->rank);
    }
    if (!strstr(said, f->text))
        fprintf(out, "  what   %s\n", f->text);
    if (xp_diff_pattern(&f->diff))
        fprintf(out, "  factor got = %.6g x expected on %lld of %lld elements, all ranks together\n", f->diff.factor,
                (long long)f->diff.same, (long long)f->diff.eligible);
    if (f->cls)
        fprintf(out, "  class  %s: %s\n", xp_class_name(f->cls), xp_class_meaning(f->cls));
}
