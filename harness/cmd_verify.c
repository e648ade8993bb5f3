/* expar verify DIR [--impl NAME | --responses DIR2]: checks vector sets, one line a set, and a block for each test that
 * fails. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "cmd.h"
#include "registry.h"
#include "verify.h"

typedef struct {
    const xp_options *o;
    xp_verify_options v;
    xp_report_style style;
    int64_t tests, passed, elements, bits, sets;
    int exit_code;
} verifying;

static void put_failure(const verifying *s, const xp_vectors *v, const xp_vectors_test *t, const xp_verify_result *r) {
    FILE *out = s->style.out;
    fprintf(out, "%s %s/%s tc %" PRId64 "\n", xp_verdict_name(r->verdict), xp_vectors_name(v), t->group, t->id);
    fprintf(out, "  test   %s\n  from   %s\n  case   %s\n", t->comment, t->source, t->line);
    fprintf(out, "  files  %s/%s", xp_vectors_dir(v), t->prompt);
    if (t->expected)
        fprintf(out, " %s/%s", xp_vectors_dir(v), t->expected);
    fputc('\n', out);
    for (int i = 0; i < t->flags; i++) {
        xp_vectors_note n;
        if (xp_vectors_note_of(v, t, t->flag[i], &n) == XP_OK)
            fprintf(out, "  flag   %s: %s\n", n.flag, n.description);
    }
    fprintf(out, "  why    %s\n", r->text);
    if (r->diagnosis[0])
        fprintf(out, "  known  %s (expar explain %.*s)\n", r->diagnosis, (int)strcspn(r->diagnosis, ":"), r->diagnosis);
    for (int i = 0; i < r->judgements; i++) {
        const xp_judgement *g = &r->judged[i];
        if (g->first >= 0 && g->line[g->first].verdict == XP_V_FAIL)
            xp_finding_print(out, &g->line[g->first], r->text);
    }
    if (r->first.diff.wrong)
        xp_finding_print(out, &r->first, r->text);
}

static xp_status verify_set(const char *dir, void *arg) {
    verifying *s = arg;
    xp_vectors *v = NULL;
    int64_t passed = 0, elements = 0, bits = 0;
    XP_TRY(xp_vectors_open_loose(dir, &v));
    const int64_t n = xp_vectors_count(v);
    for (int64_t i = 0; i < n; i++) {
        const xp_vectors_test *t = xp_vectors_at(v, i);
        xp_verify_result r;
        const xp_status st = xp_verify_run(v, t, &s->v, &r);
        if (st != XP_OK) {
            xp_vectors_close(v);
            return st;
        }
        elements += r.elements;
        bits += r.bits;
        passed += r.verdict == XP_V_PASS;
        s->exit_code = xp_exit_worse(s->exit_code, xp_exit_of(r.verdict, 1));
        if (r.verdict != XP_V_PASS)
            put_failure(s, v, t, &r);
        else if (s->style.verbose)
            fprintf(s->style.out, "PASS %s/%s tc %" PRId64 "  %" PRId64 " elements  %s\n", xp_vectors_name(v), t->group,
                    t->id, r.elements, t->comment);
        xp_verify_close(&r);
    }
    if (!s->style.quiet || passed != n)
        fprintf(s->style.out,
                "%s %s (%s): %" PRId64 " of %" PRId64 " tests, %" PRId64 " elements compared, %" PRId64
                " of them bit for bit\n",
                passed == n ? "PASS" : "FAIL", xp_vectors_name(v), xp_vectors_dir(v), passed, n, elements, bits);
    s->tests += n;
    s->passed += passed;
    s->elements += elements;
    s->bits += bits;
    s->sets++;
    xp_vectors_close(v);
    return XP_OK;
}

/* A mistyped folder would else be a missing answer to every test. */
static xp_status check_responses(const char *dir) {
    struct stat s;
    if (!dir)
        return XP_OK;
    if (stat(dir, &s) != 0)
        return XP_FAIL(XP_E_IO, "--responses: %s: cannot open the folder: %s", dir, strerror(errno));
    return S_ISDIR(s.st_mode) ? XP_OK : XP_FAIL(XP_E_IO, "--responses: %s: not a folder", dir);
}

int xp_cmd_verify(const xp_options *o) {
    const xp_fault *fault;
    verifying s = {.o = o, .v = {.responses = o->responses}, .style = xp_cmd_style(o), .exit_code = XP_EXIT_OK};
    xp_status st = xp_cmd_impl(o, &s.v.impl, &fault);
    if (st == XP_OK && o->words == 0)
        st = XP_FAIL(XP_E_ARG, "verify: no folder is named; expected a vector set, or a folder of sets");
    if (st == XP_OK && o->responses && o->impl)
        st = XP_FAIL(XP_E_ARG, "--impl: nothing runs when --responses are judged");
    if (st == XP_OK)
        st = check_responses(o->responses);
    for (int i = 0; i < o->words && st == XP_OK; i++)
        st = xp_vectors_each(o->word[i], verify_set, &s);
    if (st != XP_OK)
        return xp_exit_worse(s.exit_code, xp_cmd_fail(st));
    fprintf(s.style.out,
            "PASS %" PRId64 "  FAIL %" PRId64 "  in %" PRId64 " sets, %" PRId64 " elements compared, %" PRId64
            " of them bit for bit\n",
            s.passed, s.tests - s.passed, s.sets, s.elements, s.bits);
    return s.exit_code;
}
