/* What a run prints, and the same as JSON: verdicts, the place of a failure, the line that repeats it. */
#ifndef XP_REPORT_H
#define XP_REPORT_H

#include <jansson.h>
#include <stdio.h>

#include "run.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    FILE *out;
    int color;          /* 1: ANSI colours */
    int progress;       /* 1: a line that is overwritten, on a terminal only */
    int quiet, verbose; /* failures and summary only; every stage of every case */
} xp_report_style;

/* One line a case; a failed case is followed by its block: where, values, pattern, class, repro. verbose: a table of
 * its stages. */
void xp_report_case(const xp_report_style *s, const xp_case *c, const xp_run_options *o, const xp_run_result *r);
/* The table of stages: verdict, err/bound, elements, remote rows, undecided. */
void xp_report_stages(const xp_report_style *s, const xp_judgement *g);
/* The comparison with the one-rank run; returns the number of rows that differ or are missing. */
int64_t xp_report_parity(const xp_report_style *s, const xp_parity *p);
/* One entry of cases[] of schema "expar.results/1"; NULL without memory. */
json_t *xp_report_json(const xp_case *c, const xp_run_result *r);
/* {"schema": ..., "tool": ..., "run": {...}, "cases": [...]} to a file, through a temporary beside it. XP_E_IO naming
 * the file. */
xp_status xp_report_write(const char *path, json_t *root);
json_t *xp_report_root(const char *command, uint64_t seed, const char *impl, int exit_code, json_t *cases);
/* "12,345" into buf (at least 32 bytes); returns buf. */
const char *xp_report_count(int64_t n, char *buf);

#ifdef __cplusplus
}
#endif
#endif
