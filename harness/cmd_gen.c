/* expar gen 'case line' DIR: runs one case and writes the calls of its stage, or of all its stages, as a vector set. */
#include <inttypes.h>
#include <string.h>

#include "cmd.h"
#include "registry.h"

typedef struct {
    xp_run_options run;
    xp_report_style style;
    int cases, code;
    int64_t tests, left;
} generating;

static xp_status count(const xp_case *c, void *arg) {
    generating *g = arg;
    (void)c;
    g->cases++;
    return XP_OK;
}

static xp_status take(const xp_case *c, void *arg) {
    generating *g = arg;
    xp_run_result r;
    XP_TRY(xp_case_run(c, &g->run, &r));
    if (r.judgement.verdict != XP_V_PASS)
        xp_report_case(&g->style, c, &g->run, &r);
    g->code = xp_exit_of(r.judgement.verdict, 1);
    xp_run_result_close(&r);
    return XP_OK;
}

int xp_cmd_gen(const xp_options *o) {
    const xp_fault *fault;
    int number = 0;
    generating g = {.style = xp_cmd_style(o)};
    g.run = (xp_run_options){.dumped = &g.tests, .dump_left = &g.left};
    xp_status st = xp_cmd_impl(o, &g.run.impl, &fault);
    if (st == XP_OK && (o->words != 2 || !strpbrk(o->word[0], " \t")))
        st = XP_FAIL(XP_E_ARG, "gen: expected a case line and a folder, as in: gen 'rmsnorm T=8 H=32' vectors");
    g.run.dump = o->words == 2 ? o->word[1] : NULL;
    if (st == XP_OK)
        st = xp_case_expand(o->word[0], NULL, &number, count, &g);
    if (st == XP_OK && g.cases != 1)
        st = XP_FAIL(XP_E_ARG, "gen: the line stands for %d cases, expected one", g.cases);
    if (st != XP_OK)
        return xp_cmd_fail(st);
    const int code = xp_cmd_dump_dir(g.run.dump);
    if (code != XP_EXIT_OK)
        return code;
    st = xp_case_expand(o->word[0], NULL, &number, take, &g);
    if (st != XP_OK)
        return xp_cmd_fail(st);
    fprintf(g.style.out, "%s: %" PRId64 " test%s of %s (%" PRId64 " calls that communicate are not written)\n",
            o->word[1], g.tests, g.tests == 1 ? "" : "s", g.run.impl->name, g.left);
    return g.tests > 0 ? g.code : xp_exit_worse(g.code, XP_EXIT_NOTHING);
}
