/* The program: reads the command line, refuses a launch environment that contradicts itself, and runs one command. */
#include <signal.h>
#include <string.h>

#include "cmd.h"

static int is_help(const char *s) {
    return strcmp(s, "--help") == 0 || strcmp(s, "-h") == 0;
}

/* 1: help is asked for, of one command or (out_command NULL) of all. A word that is no command gets none. */
static int wants_help(int argc, char **argv, const char **out_command) {
    const int word = argc > 1 && strcmp(argv[1], "help") == 0;
    *out_command = word && argc > 2 ? argv[2] : argc > 1 && !word && !is_help(argv[1]) ? argv[1] : NULL;
    if (*out_command && !xp_options_is_command(*out_command))
        return 0;
    if (word)
        return 1;
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (is_help(argv[i]))
            return 1;
    }
    return 0;
}

static int run(const xp_options *o) {
    static const struct {
        const char *name;
        int (*run)(const xp_options *o);
    } commands[] = {
        {"check", xp_cmd_check},   {"step", xp_cmd_step},         {"plan", xp_cmd_plan},
        {"list", xp_cmd_list},     {"explain", xp_cmd_explain},   {"gen", xp_cmd_gen},
        {"verify", xp_cmd_verify}, {"selftest", xp_cmd_selftest}, {"version", xp_cmd_version},
    };
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(o->command, commands[i].name) == 0)
            return commands[i].run(o);
    }
    return XP_EXIT_INTERNAL;
}

int main(int argc, char **argv) {
    xp_options o;
    int rank, world;
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is an error of the write, with exit code 11 */
    const char *of;
    if (wants_help(argc, argv, &of)) {
        xp_options_help(of, stdout);
        return xp_cmd_flush(XP_EXIT_OK);
    }
    xp_status st = xp_launch_check(&rank, &world);
    if (st == XP_OK && world > 1)
        st =
            XP_FAIL(XP_E_ARG,
                    "WORLD_SIZE: the launcher started %d processes, but every mesh of this build lives in one process; "
                    "run expar alone",
                    world);
    if (st != XP_OK) {
        (void)xp_cmd_fail(st);
        return XP_EXIT_LAUNCH;
    }
    st = xp_options_parse(argc, argv, &o);
    if (st != XP_OK) {
        const int code = xp_cmd_fail(st);
        fprintf(stderr, "expar: try `expar --help`\n");
        return code;
    }
    return xp_cmd_flush(run(&o));
}
