/* The program's commands, one a file. Each prints its results to standard output and errors to standard error, and
 * returns the exit code; only main exits. */
#ifndef XP_CMD_H
#define XP_CMD_H

#include "options.h"
#include "report.h"

int xp_cmd_check(const xp_options *o);
int xp_cmd_step(const xp_options *o);
int xp_cmd_plan(const xp_options *o);
int xp_cmd_list(const xp_options *o);
int xp_cmd_explain(const xp_options *o);
int xp_cmd_gen(const xp_options *o);
int xp_cmd_verify(const xp_options *o);
int xp_cmd_selftest(const xp_options *o);
int xp_cmd_version(const xp_options *o);

/* cmd.c: what the commands share. */
/* Prints "expar: <error text>" and returns the exit code that fits the status; what: an input file or an option is at
 * fault. */
int xp_cmd_fail(xp_status st);
/* The graver of two exit codes, by the documented precedence. */
int xp_exit_worse(int a, int b);
int xp_exit_of(xp_verdict v, int required);
/* Standard output as the options want it; fails over to exit code 11 through xp_cmd_flush(). */
xp_report_style xp_cmd_style(const xp_options *o);
int xp_cmd_flush(int code);
/* A whole file in memory; the caller frees. XP_E_FORMAT when empty, XP_E_IO naming the file. */
xp_status xp_cmd_read(const char *path, uint8_t **out, int64_t *out_bytes);
/* The model of --model with --layers, --shrink, --experts and --topk applied; its first `layers` MoE layers. */
xp_status xp_cmd_model(const xp_options *o, xp_model *out);
/* The folder of --dump or of gen, made when it is not there. Returns XP_EXIT_OK, or prints what is wrong and returns
 * XP_EXIT_USAGE for a folder that holds a set already, XP_EXIT_OUTPUT for one that cannot be written. NULL: nothing. */
int xp_cmd_dump_dir(const char *dir);
/* What the options say of a run: tokens, layers, shrink, seed, deterministic. */
void xp_cmd_run_options(const xp_options *o, xp_step_options *out);
/* impl and fault by name; the fault is NULL when none is asked for. */
xp_status xp_cmd_impl(const xp_options *o, const xp_backend **out_impl, const xp_fault **out_fault);
/* The mesh of --mesh, or the default. */
xp_status xp_cmd_mesh(const xp_options *o, const char *dflt, xp_mesh_spec *out);

#endif
