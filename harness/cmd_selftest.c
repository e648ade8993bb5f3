/* expar selftest dialects: which preset a case tells from which, one row and one column a preset. */
#include <stdlib.h>
#include <string.h>

#include "apart.h"
#include "cmd.h"
#include "dialect_text.h"

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

int xp_cmd_selftest(const xp_options *o) {
    if (o->words != 1 || strcmp(o->word[0], "dialects") != 0)
        return xp_cmd_fail(XP_FAIL(XP_E_ARG, "selftest: '%s', expected dialects", o->words ? o->word[0] : ""));
    return dialects(o);
}
