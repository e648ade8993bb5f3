/* The command line: one table of options, read the same way by every command.
 *
 * An unknown option, a value that is not understood and an option given twice are refused with the nearest known name;
 * nothing is abbreviated. Options that a command does not take are refused too. */
#ifndef XP_OPTIONS_H
#define XP_OPTIONS_H

#include <stdio.h>

#include "xp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_MAX_WORDS = 256 };

/* Exit codes; the same on every rank. Several at once: 10 > 9 > 8 > 3 > 2 > 4 > 12 > 11 > 1 > 13 > 7 > 6 > 5. */
enum {
    XP_EXIT_OK = 0,
    XP_EXIT_FAIL = 1,        /* a check failed, was vacuous or ended in an error */
    XP_EXIT_USAGE = 2,       /* an option, a mesh or a case line */
    XP_EXIT_LAUNCH = 3,      /* the launch environment contradicts itself */
    XP_EXIT_INPUT = 4,       /* a file's content */
    XP_EXIT_NOTHING = 5,     /* nothing ran */
    XP_EXIT_UNSUPPORTED = 6, /* everything that was required is unsupported or skipped */
    XP_EXIT_GATE = 7,        /* a performance gate */
    XP_EXIT_HANG = 8,
    XP_EXIT_PEER = 9,
    XP_EXIT_INTERNAL = 10,
    XP_EXIT_OUTPUT = 11, /* an output file or standard output cannot be written */
    XP_EXIT_PLUGIN = 12, /* a plugin broke the contract */
    XP_EXIT_WAIVER = 13
};

typedef struct {
    const char *command;
    const char *word[XP_MAX_WORDS]; /* what is no option */
    int words;
    const char *model, *mesh, *text, *impl, *fault, *json_file, *responses, *dump, *weights;
    long long layers, layer, shrink, tokens, steps, experts, topk, random, micro;
    unsigned long long seed;
    double lr;
    int deterministic, json, quiet, verbose;
    int color; /* 0 auto, 1 always, 2 never */
    int has_tokens, has_seed, has_steps, has_lr, has_layer;
} xp_options;

/* Reads argv[1] as the command (--version: the one that prints it) and the rest as its options and words. XP_E_ARG
 * naming the option and the value. */
xp_status xp_options_parse(int argc, char **argv, xp_options *out);
/* What the command does and which options it takes; command NULL: all commands. */
void xp_options_help(const char *command, FILE *f);
int xp_options_is_command(const char *name);

/* The launch environment (torchrun, Open MPI, PMI, Slurm): XP_OK and world 1 for a plain process. XP_E_ARG naming the
 * variable, its value and what was expected when the variables contradict themselves or each other; no rank is ever
 * guessed. */
xp_status xp_launch_check(int *out_rank, int *out_world);

#ifdef __cplusplus
}
#endif
#endif
