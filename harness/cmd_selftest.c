/* expar selftest: what the bounds tell apart, and what a backend's rows keep. dialects: which preset a case tells from
 * which, one row and one column a preset. relations: what a change of the numbers must do to the results, one line a
 * preset. */
#include <stdlib.h>
#include <string.h>

#include "apart.h"
#include "chain.h"
#include "cmd.h"
#include "dialect_text.h"
#include "relations.h"

/* A row's own number, then a letter for each column. */
static void put_heads(FILE *out, int n) {
    fprintf(out, "%*s", 36, "");
    for (int i = 0; i < n; i++)
        fprintf(out, "%3d", i + 1);
    fputc('\n', out);
}

static xp_status judge_all(int n, xp_apart *cell) {
    for (int a = 0; a < n; a++) {
        for (int b = 0; b < n; b++) {
            if (a != b)
                XP_TRY(xp_apart_judge(&xp_dialects[a], &xp_dialects[b], &cell[a * n + b]));
        }
    }
    return XP_OK;
}

/* Pairs that no case tells apart in either direction; returns their number. */
static int put_missing(FILE *out, int n, const xp_apart *cell) {
    char text[600];
    int missing = 0;
    for (int a = 0; a < n; a++) {
        for (int b = a + 1; b < n; b++) {
            if (cell[a * n + b] != XP_APART_NOT || cell[b * n + a] != XP_APART_NOT)
                continue;
            (void)xp_dialect_differences(&xp_dialects[a], &xp_dialects[b], 1, text, sizeof text);
            fprintf(out, "no case tells %s from %s: %s\n", xp_dialects[a].name, xp_dialects[b].name, text);
            missing++;
        }
    }
    return missing;
}

static int dialects(const xp_options *o) {
    FILE *out = xp_cmd_style(o).out;
    int n = 0, count[XP_APART_ROUNDING + 1] = {0};
    while (xp_dialects[n].name)
        n++;
    xp_apart *cell = calloc((size_t)n * (size_t)n, sizeof *cell);
    xp_status st = cell ? judge_all(n, cell) : XP_FAIL(XP_E_NOMEM, "selftest: %d x %d cells", n, n);
    if (st != XP_OK) {
        free(cell);
        return xp_cmd_fail(st);
    }
    fprintf(out, "What the bounds of the row's dialect refuse of the column's, on the same numbers:\n");
    for (int i = XP_APART_CHOICE; i <= XP_APART_ROUNDING; i++)
        fprintf(out, "%s%c %s", i == XP_APART_CHOICE ? "" : ", ", xp_apart_letter((xp_apart)i),
                xp_apart_name((xp_apart)i));
    fprintf(out, "; < the other row's bounds alone; - nothing\n");
    put_heads(out, n);
    for (int a = 0; a < n; a++) {
        fprintf(out, "%2d %c %-31s", a + 1, xp_dialects[a].letter, xp_dialects[a].name);
        for (int b = 0; b < n; b++) {
            const xp_apart is = cell[a * n + b], back = cell[b * n + a];
            count[is] += a != b;
            fprintf(out, "  %c", a == b ? '=' : is == XP_APART_NOT && back != XP_APART_NOT ? '<' : xp_apart_letter(is));
        }
        fputc('\n', out);
    }
    const int missing = put_missing(out, n, cell);
    fprintf(out, "%s %d dialects: %d pairs, %d told apart in neither direction, %d in one only\n",
            missing ? "FAIL" : "PASS", n, n * (n - 1) / 2, missing, count[XP_APART_NOT] - 2 * missing);
    free(cell);
    return missing ? XP_EXIT_FAIL : XP_EXIT_OK;
}

/* ---- relations ---- */

static void put_marks(FILE *out, const xp_dialect *d, const xp_relations *x) {
    fprintf(out, "%c %-31s", d->letter, d->name);
    for (int i = 0; i < XP_RELATIONS; i++) {
        char text[64] = "";
        for (int n = 0; n < (i == XP_REL_TIES ? 1 : XP_NUMBERS); n++)
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", n ? " " : "",
                     xp_held_mark(x->on[n][i].held));
        fprintf(out, " %-8s", text);
    }
    fputc('\n', out);
}

/* The reasons behind the marks: always of failures, of the rest when asked for. */
static void put_reasons(FILE *out, const xp_relation_result *r, const char *numbers, int verbose) {
    for (int i = 0; i < XP_RELATIONS; i++) {
        if (r[i].held == XP_HELD_NOT || (verbose && r[i].text[0]))
            fprintf(out, "      %s, %s: %s\n", xp_relation_name((xp_relation)i), numbers, r[i].text);
        else if (verbose)
            fprintf(out, "      %s, %s: %lld elements, %lld of them not to the bit, at %.2g of the bound at most\n",
                    xp_relation_name((xp_relation)i), numbers, (long long)r[i].elements, (long long)r[i].by_bound,
                    r[i].ratio);
    }
}

static void put_stages(FILE *out, const char *what, uint32_t stages) {
    fprintf(out, "%s", what);
    for (int i = 0; xp_chain_stages[i]; i++) {
        if (stages & XP_BIT(i))
            fprintf(out, " %s", xp_chain_stages[i]->name);
    }
    fputc('\n', out);
}

static int put_dialect(FILE *out, const xp_dialect *d, const xp_relations *x, int verbose, int *count) {
    int failed = 0, unable = 0;
    for (int n = 0; n < XP_NUMBERS; n++) {
        for (int i = 0; i < XP_RELATIONS; i++) {
            const xp_held held = x->on[n][i].held;
            count[held] += i != XP_REL_TIES || n == XP_NUMBERS_EXACT;
            failed |= held == XP_HELD_NOT;
            unable += held == XP_HELD_UNSUPPORTED;
        }
    }
    if (unable == XP_NUMBERS * XP_RELATIONS) {
        fprintf(out, "%c %-31s UNSUPPORTED: %s\n", d->letter, d->name, x->on[0][0].text);
        return 0;
    }
    put_marks(out, d, x);
    for (int n = 0; n < XP_NUMBERS; n++)
        put_reasons(out, x->on[n], xp_numbers_name((xp_numbers)n), verbose);
    return failed;
}

static void put_relation_heads(FILE *out, const char *impl) {
    fprintf(out, "What a change of the numbers must do to the results of %s, on", impl);
    for (int i = 0; i < XP_NUMBERS; i++)
        fprintf(out, "%s %s", i ? "," : "", xp_numbers_name((xp_numbers)i));
    fputc('\n', out);
    fprintf(out, "= to the bit; < within the stages' bounds; n/a no such symmetry; - cannot run (-v says why)\n%-34s",
            "");
    for (int i = 0; i < XP_RELATIONS; i++)
        fprintf(out, "%-9s", xp_relation_name((xp_relation)i));
    fputc('\n', out);
}

static int relations(const xp_options *o) {
    FILE *out = xp_cmd_style(o).out;
    const xp_backend *impl;
    const xp_fault *none;
    xp_relations x;
    uint32_t own = 0, lent = 0;
    int failed = 0, n = 0, count[XP_HELD_NOT + 1] = {0};
    xp_status st = xp_cmd_impl(o, &impl, &none);
    if (st != XP_OK)
        return xp_cmd_fail(st);
    put_relation_heads(out, impl->name);
    for (const xp_dialect *d = xp_dialects; d->name; d++, n++) {
        st = xp_relations_run(impl, d, &x);
        if (st != XP_OK)
            return xp_cmd_fail(st);
        failed += put_dialect(out, d, &x, o->verbose, count);
        own |= x.own;
        lent |= x.lent;
    }
    if (lent)
        put_stages(out, "run by ref, for want of a row:", lent);
    const int held = count[XP_HELD_BITS] + count[XP_HELD_BOUND];
    const char *verdict = failed ? "FAIL" : held && own ? "PASS" : "UNSUPPORTED";
    fprintf(out,
            "%s %d dialects, %d failed: %d relations to the bit, %d within bounds, %d do not hold, %d have no such "
            "symmetry, %d cannot run\n",
            verdict, n, failed, count[XP_HELD_BITS], count[XP_HELD_BOUND], count[XP_HELD_NOT], count[XP_HELD_NA],
            count[XP_HELD_UNSUPPORTED]);
    return failed ? XP_EXIT_FAIL : held && own ? XP_EXIT_OK : XP_EXIT_NOTHING;
}

int xp_cmd_selftest(const xp_options *o) {
    if (o->words != 1)
        return xp_cmd_fail(XP_FAIL(XP_E_ARG, "selftest: %d words, expected one of dialects, relations", o->words));
    const char *word = o->word[0];
    if (strcmp(word, "relations") == 0)
        return relations(o);
    if (strcmp(word, "dialects") != 0)
        return xp_cmd_fail(XP_FAIL(XP_E_ARG, "selftest: '%s', expected dialects or relations", word));
    if (o->impl)
        return xp_cmd_fail(XP_FAIL(XP_E_ARG, "--impl: selftest dialects runs the reference alone"));
    return dialects(o);
}
