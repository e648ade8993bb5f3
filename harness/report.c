/* Reports: text for people, JSON for programs. Reads judgements, decides nothing. */
#include "report.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

static const char *paint(const xp_report_style *s, xp_verdict v) {
    if (!s->color)
        return "";
    return v == XP_V_PASS ? "\033[32m" : v <= XP_V_UNSUPPORTED ? "\033[33m" : "\033[31m";
}

static const char *plain(const xp_report_style *s) {
    return s->color ? "\033[0m" : "";
}

const char *xp_report_count(int64_t n, char *buf) {
    char digits[32];
    const int len = snprintf(digits, sizeof digits, "%" PRId64, n);
    int at = 0;
    for (int i = 0; i < len; i++) {
        buf[at++] = digits[i];
        if (digits[i] != '-' && (len - 1 - i) % 3 == 0 && i + 1 < len)
            buf[at++] = ',';
    }
    buf[at] = '\0';
    return buf;
}

static int is_bare(const char *s) {
    return *s && strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=,+") == strlen(s);
}

static void put_word(FILE *f, const char *s) {
    if (is_bare(s)) {
        fputs(s, f);
        return;
    }
    fputc('\'', f);
    for (; *s; s++) {
        if (*s == '\'')
            fputs("'\\''", f);
        else
            fputc(*s, f);
    }
    fputc('\'', f);
}

/* A run that no case line can say: one layer of a model, or weights of a file. */
static void put_model_run(FILE *f, const xp_case *c, const xp_run_options *o) {
    char mesh[XP_MESH_TEXT];
    (void)xp_mesh_spec_print(&c->mesh, mesh, sizeof mesh);
    fputs("--model ", f);
    put_word(f, c->model);
    fprintf(f, " --layer%s %d", o->one_layer ? "" : "s", c->layers - o->one_layer);
    if (o->weights_given) {
        fputs(" --weights ", f);
        put_word(f, o->weights_given);
    }
    if (c->shrink != 1)
        fprintf(f, " --shrink %d", c->shrink);
    if (c->dim_set['E' - 'A'])
        fprintf(f, " --experts %lld", (long long)c->dim['E' - 'A']);
    if (c->dim_set['K' - 'A'])
        fprintf(f, " --topk %lld", (long long)c->dim['K' - 'A']);
    fprintf(f, " --tokens %lld --mesh %s --seed %llu", (long long)c->dim['T' - 'A'], mesh, (unsigned long long)c->seed);
}

/* The command that runs this one case again. */
static void put_repro(FILE *f, const xp_case *c, const xp_run_options *o) {
    char line[XP_CASE_LINE];
    fputs("expar check ", f);
    if (o->weights_given || o->one_layer) {
        put_model_run(f, c, o);
    } else {
        xp_case_print(c, line, sizeof line);
        put_word(f, line);
    }
    if (o->fault)
        fprintf(f, " --fault %s", o->fault->name);
    if (o->impl_given) {
        fputs(" --impl ", f);
        put_word(f, o->impl_given);
    } else if (strcmp(o->impl->name, "ref") != 0) {
        fprintf(f, " --impl %s", o->impl->name);
    }
    if (o->text_given) {
        fputs(" --text ", f);
        put_word(f, o->text_given);
    }
    fputc('\n', f);
}

/* The line with the largest err/bound, or -1. */
static int tightest(const xp_judgement *g) {
    int best = -1;
    for (int i = 0; i < g->lines; i++) {
        if (g->line[i].compares && (best < 0 || g->line[i].diff.ratio > g->line[best].diff.ratio))
            best = i;
    }
    return best;
}

static void put_ratio(FILE *f, const xp_finding *l) {
    if (!l->compares)
        fprintf(f, "%9s", "-");
    else if (l->diff.ratio == 0)
        fprintf(f, "%9s", "0");
    else if (l->diff.ratio < 1e-3 || l->diff.ratio >= 1e4)
        fprintf(f, "%9.2e", l->diff.ratio);
    else
        fprintf(f, "%9.4f", l->diff.ratio);
}

void xp_report_stages(const xp_report_style *s, const xp_judgement *g) {
    char n[32], m[32], name[112];
    fprintf(s->out, "  %-66s %-11s %9s %14s %12s  %s\n", "stage operand", "verdict", "err/bound", "elements",
            "remote rows", "judge");
    for (int i = 0; i < g->lines; i++) {
        const xp_finding *l = &g->line[i];
        if (strcmp(l->stage, l->site) == 0)
            snprintf(name, sizeof name, "%s %s", l->stage, l->operand);
        else
            snprintf(name, sizeof name, "%s (%s) %s", l->stage, l->site, l->operand);
        fprintf(s->out, "  %-66.66s %s%-11s%s ", name, paint(s, l->verdict), xp_verdict_name(l->verdict), plain(s));
        put_ratio(s->out, l);
        fprintf(s->out, " %14s %12s  %s", xp_report_count(l->diff.elements, n),
                l->remote ? xp_report_count(l->remote, m) : "-", l->judge);
        if (l->undecided)
            fprintf(s->out, "  %" PRId64 " of %" PRId64 " undecided", l->undecided, l->chosen);
        if (l->bias_state)
            fprintf(s->out, "  bias %.1e of %.1e", fabs(l->bias_mean), l->bias_limit);
        fputc('\n', s->out);
    }
}

static void put_failure(const xp_report_style *s, const xp_case *c, const xp_run_options *o, const xp_run_result *r) {
    char line[XP_CASE_LINE];
    const xp_judgement *g = &r->judgement;
    xp_case_print(c, line, sizeof line);
    fprintf(s->out, "  case   %s\n", line);
    if (g->text[0])
        fprintf(s->out, "  why    %s\n", g->text);
    if (g->first >= 0)
        xp_finding_print(s->out, &g->line[g->first], g->text);
    fputs("  repro  ", s->out);
    put_repro(s->out, c, o);
}

void xp_report_case(const xp_report_style *s, const xp_case *c, const xp_run_options *o, const xp_run_result *r) {
    char n[32], m[32], line[XP_CASE_LINE];
    const xp_judgement *g = &r->judgement;
    const int t = tightest(g);
    if (s->quiet && g->verdict == XP_V_PASS)
        return;
    xp_case_print(c, line, sizeof line);
    fprintf(s->out, "%s%-11s%s %-22s ", paint(s, g->verdict), xp_verdict_name(g->verdict), plain(s),
            c->name[0] ? c->name : "-");
    put_ratio(s->out, t >= 0 ? &g->line[t] : &(xp_finding){.compares = 0});
    fprintf(s->out, " %12s %9s remote  %6.2f s  %s\n", xp_report_count(g->elements, n), xp_report_count(g->remote, m),
            r->seconds, line);
    if (s->verbose)
        xp_report_stages(s, g);
    if (s->verbose && r->parity)
        xp_report_parity(s, r->parity);
    if (g->verdict != XP_V_PASS)
        put_failure(s, c, o, r);
}

int64_t xp_report_parity(const xp_report_style *s, const xp_parity *p) {
    xp_parity_line l;
    char n[32], m[32];
    int64_t bad = 0, rows = 0, elements = 0, bounded = 0;
    int lines = 0;
    double ratio = 0;
    if (xp_parity_slots(p) > 0) {
        fprintf(
            s->out,
            "  not compared with one rank: experts were full and dropped %s slots (both runs); each rank counts its "
            "own tokens\n",
            xp_report_count(xp_parity_slots(p), n));
        return 0;
    }
    for (int i = 0; xp_parity_result(p, i, &l); i++, lines++) {
        rows += l.rows;
        elements += l.elements;
        bounded += l.by_bound ? l.elements : 0;
        ratio = l.by_bound && !(l.ratio <= ratio) ? l.ratio : ratio;
        bad += l.different + l.missing;
        if (l.different + l.missing)
            fprintf(s->out,
                    "  %sDIFFERS%s %s layer %d: %" PRId64 " of %" PRId64 " rows differ, %" PRId64
                    " missing; first row %" PRId64 " on rank %d\n",
                    paint(s, XP_V_FAIL), plain(s), l.site, l.layer, l.different, l.rows, l.missing, l.first, l.rank);
    }
    if (rows == 0) {
        fprintf(s->out, "  %sVACUOUS%s no row was compared with the one-rank run\n", paint(s, XP_V_FAIL), plain(s));
        return 1;
    }
    fprintf(s->out, "  %s%s%s against one rank: %d tensors, %s rows, %s elements, ",
            paint(s, bad ? XP_V_FAIL : XP_V_PASS), bad ? "FAIL" : "PASS", plain(s), lines, xp_report_count(rows, n),
            xp_report_count(elements, m));
    if (bounded)
        fprintf(s->out, "%s of them by bound (at most %.3f of it), ", xp_report_count(bounded, n), ratio);
    fprintf(s->out, "%s\n", bad ? "not the same" : bounded ? "the others the same bits" : "every bit the same");
    return bad;
}

/* ---- JSON ---- */

/* JSON has no NaN and no infinity: {"f": "nan"}. */
static json_t *number(double v) {
    if (isfinite(v))
        return json_real(v);
    return json_pack("{s:s}", "f", isnan(v) ? "nan" : v > 0 ? "inf" : "-inf");
}

static json_t *place(const xp_place *p) {
    char got[40], expected[40];
    if (!p->set)
        return json_null();
    snprintf(got, sizeof got, "%a", p->got);
    snprintf(expected, sizeof expected, "%a", p->expected);
    return json_pack("{s:i,s:i,s:i,s:I,s:I,s:I,s:s,s:s,s:o}", "rank", p->rank, "layer", p->layer, "step", p->step,
                     "token", (json_int_t)p->token, "expert", (json_int_t)p->expert, "slot", (json_int_t)p->slot,
                     "got_hex", got, "expected_hex", expected, "ratio", number(p->ratio));
}

static json_t *stage_line(const xp_finding *l) {
    return json_pack("{s:s,s:s,s:s,s:s,s:s,s:I,s:I,s:I,s:I,s:o,s:s,s:s,s:o}", "stage", l->stage, "site", l->site,
                     "operand", l->operand, "status", xp_verdict_name(l->verdict), "class",
                     l->cls ? xp_class_name(l->cls) : "", "compared", (json_int_t)l->diff.elements, "mismatched",
                     (json_int_t)l->diff.wrong, "remote", (json_int_t)l->remote, "undecided", (json_int_t)l->undecided,
                     "bound_use", number(l->diff.ratio), "row", l->row, "judge", l->judge, "worst", place(&l->worst));
}

json_t *xp_report_json(const xp_case *c, const xp_run_result *r) {
    char line[XP_CASE_LINE];
    json_t *stages = json_array();
    xp_case_print(c, line, sizeof line);
    for (int i = 0; i < r->judgement.lines; i++)
        json_array_append_new(stages, stage_line(&r->judgement.line[i]));
    return json_pack("{s:s,s:s,s:s,s:s,s:f,s:I,s:I,s:o}", "id", c->name, "line", line, "status",
                     xp_verdict_name(r->judgement.verdict), "reason", r->judgement.text, "dur_s", r->seconds,
                     "compared", (json_int_t)r->judgement.elements, "remote", (json_int_t)r->judgement.remote, "stages",
                     stages);
}

json_t *xp_report_root(const char *command, uint64_t seed, const char *impl, int exit_code, json_t *cases) {
    char text[24];
    snprintf(text, sizeof text, "%" PRIu64, seed);
    /* Beyond the integers of JSON's readers it is a text, as in a plan. */
    json_t *as = seed <= UINT64_C(1) << 53 ? json_integer((json_int_t)seed) : json_string(text);
    return json_pack("{s:s,s:{s:s,s:s},s:{s:s,s:s,s:o,s:i},s:o}", "schema", "expar.results/1", "tool", "name", "expar",
                     "version", XP_VERSION, "run", "command", command, "impl", impl, "seed", as, "exit", exit_code,
                     "cases", cases);
}

xp_status xp_report_write(const char *path, json_t *root) {
    char temp[4096];
    if (!root)
        return XP_FAIL(XP_E_NOMEM, "-J: no memory for %s", path);
    if (snprintf(temp, sizeof temp, "%s.tmp", path) >= (int)sizeof temp)
        return XP_FAIL(XP_E_IO, "-J: '%.60s...': the path is longer than %zu characters", path, sizeof temp - 5);
    FILE *f = fopen(temp, "w");
    if (!f)
        return XP_FAIL(XP_E_IO, "-J: %s: %s", path, strerror(errno));
    int bad =
        json_dumpf(root, f, JSON_INDENT(1)) != 0 || fputc('\n', f) == EOF || fflush(f) != 0 || fsync(fileno(f)) != 0;
    bad |= fclose(f) != 0;
    if (bad || rename(temp, path) != 0) {
        const int err = errno;
        remove(temp);
        return XP_FAIL(XP_E_IO, "-J: %s: %s", path, strerror(err));
    }
    return XP_OK;
}
