/* The option table and its reader. */
#include "options.h"

#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum {
    CHECK = 1,
    STEP = 2,
    PLAN = 4,
    LIST = 8,
    EXPLAIN = 16,
    VERSION = 32,
    VERIFY = 64,
    GEN = 128,
    SELFTEST = 256,
    ALL = 511
};

static const struct {
    const char *name, *words, *meaning;
    int bit;
} commands[] = {
    {"check", "[GLOB | FILE.txt | 'case line'] ...",
     "run cases, judge every stage they call, and print each verdict; with --model, check that model's layers", CHECK},
    {"step", "", "train a model of seeded weights for some steps and print loss, gradient norm and clip coefficient",
     STEP},
    {"plan", "", "print who holds, sends and computes what, and which optimizer path is legal", PLAN},
    {"list", "[stages | kernels | backends | meshes | models | dialects | cases | faults | data]",
     "print what there is, one line each", LIST},
    {"explain", "NAME",
     "explain whatever `list` names, a verdict, a class of failure, `exit` or a code of it, or the keys of a case line:\n"
     "      `layer`, `step`, or a stage",
     EXPLAIN},
    {"gen", "'case line' DIR", "write a vector set: the inputs of the case's stages and what the backend made of them",
     GEN},
    {"verify", "DIR ...",
     "check vector sets: run a backend on their prompts, or judge somebody's responses, against what they expect",
     VERIFY},
    {"selftest", "dialects | relations",
     "show which dialects the bounds tell apart, or what of a backend's results survives a change of the numbers",
     SELFTEST},
    {"version", "", "print the version", VERSION},
};

typedef enum { FLAG, TEXT, COUNT, SEED, REAL, COLOR } option_type;
typedef struct {
    const char *name, *value, *meaning;
    option_type type;
    int commands;
    size_t at, has; /* has 0: nothing to note */
    long long lo, hi;
} option;

#define AT(field) offsetof(xp_options, field)
static const option table[] = {
    {"--model", "NAME|FILE", "a config.json, or a name of `expar list models`", TEXT, CHECK | STEP | PLAN, AT(model), 0,
     0, 0},
    {"--layers", "N", "only the model's first N layers", COUNT, CHECK | STEP | PLAN, AT(layers), 0, 1, 1024},
    {"--layer", "N", "only the model's layer N, counted from 0", COUNT, CHECK, AT(layer), AT(has_layer), 0, 1023},
    {"--weights", "FILE|DIR", "MoE weights: a safetensors file, an index of several, or a folder with either", TEXT,
     CHECK, AT(weights), 0, 0, 0},
    {"--shrink", "N", "divide hidden, expert and shared widths by N", COUNT, CHECK | STEP | PLAN, AT(shrink), 0, 1,
     4096},
    {"--experts", "N", "replace the model's number of experts", COUNT, CHECK | STEP | PLAN, AT(experts), 0, 1, 65536},
    {"--topk", "K", "replace the model's slots a token", COUNT, CHECK | STEP | PLAN, AT(topk), 0, 1, 65536},
    {"--tokens", "N", "tokens of the global batch", COUNT, CHECK | STEP | PLAN, AT(tokens), AT(has_tokens), 1,
     1LL << 40},
    {"--steps", "N", "training steps", COUNT, STEP, AT(steps), AT(has_steps), 1, 1000000},
    {"--micro-batches", "N", "cut the global batch into N, whose gradients are summed before the norm", COUNT,
     STEP | PLAN, AT(micro), 0, 1, 1LL << 20},
    {"--lr", "X", "learning rate", REAL, STEP | PLAN, AT(lr), AT(has_lr), 0, 0},
    {"--mesh", "SPEC|KIND", "the mesh, as sim:dp=2,fsdp=4,ep=4; in check a bare kind replaces that of each case", TEXT,
     CHECK | STEP | PLAN, AT(mesh), 0, 0, 0},
    {"--seed", "N", "seed of all generated data", SEED, CHECK | STEP | PLAN, AT(seed), AT(has_seed), 0, 0},
    {"--text", "FILE", "bytes to train on or to check with", TEXT, CHECK | STEP, AT(text), 0, 0, 0},
    {"--impl", "NAME", "backend under test: ref, dense, or plugin:PATH", TEXT, CHECK | STEP | VERIFY | GEN | SELFTEST,
     AT(impl), 0, 0, 0},
    {"--deterministic", NULL, "fold by global blocks of 16 tokens: the same bits on every mesh", FLAG,
     CHECK | STEP | PLAN, AT(deterministic), 0, 0, 0},
    {"--fault", "NAME", "switch one fault of `expar list faults` on", TEXT, CHECK | STEP, AT(fault), 0, 0, 0},
    {"--dump", "DIR", "write every stage call as a test of a vector set", TEXT, CHECK | STEP, AT(dump), 0, 0, 0},
    {"--responses", "DIR", "judge the answers in DIR, files named as the expected ones", TEXT, VERIFY, AT(responses), 0,
     0, 0},
    {"--random", "N", "draw N random right cases from --seed and check them", COUNT, CHECK, AT(random), 0, 1,
     100000000},
    {"--json", NULL, "print JSON instead of a table", FLAG, PLAN | LIST | EXPLAIN, AT(json), 0, 0, 0},
    {"-J", "FILE", "write the results as JSON too", TEXT, CHECK | STEP, AT(json_file), 0, 0, 0},
    {"--color", "auto|always|never", "colour of the verdicts", COLOR, ALL, AT(color), 0, 0, 0},
    {"-q", NULL, "print failures and the summary only", FLAG, CHECK | VERIFY, AT(quiet), 0, 0, 0},
    {"-v", NULL, "print more: every stage of a case, every test of a set, every reason", FLAG,
     CHECK | VERIFY | SELFTEST, AT(verbose), 0, 0, 0},
};
enum { OPTIONS = sizeof table / sizeof *table, COMMANDS = sizeof commands / sizeof *commands };

static int edit_distance(const char *a, const char *b) {
    int row[64];
    const int nb = (int)strlen(b);
    if (nb > 62 || strlen(a) > 62)
        return 99;
    for (int j = 0; j <= nb; j++)
        row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= nb; j++) {
            const int up = row[j], swap = diagonal + (a[i - 1] != b[j - 1]);
            const int least = up < row[j - 1] ? up + 1 : row[j - 1] + 1;
            row[j] = swap < least ? swap : least;
            diagonal = up;
        }
    }
    return row[nb];
}

/* Of the options that the command takes; there is always one. */
static const char *nearest_option(const char *word, int bit) {
    int best = -1;
    for (int i = 0; i < OPTIONS; i++) {
        if (table[i].commands & bit &&
            (best < 0 || edit_distance(word, table[i].name) < edit_distance(word, table[best].name)))
            best = i;
    }
    return table[best].name;
}

static const option *find_option(const char *word) {
    for (int i = 0; i < OPTIONS; i++) {
        if (strcmp(word, table[i].name) == 0)
            return &table[i];
    }
    return NULL;
}

static xp_status set_count(const option *o, const char *text, void *at) {
    char *end = NULL;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    const int starts = text[0] >= '0' && text[0] <= '9';
    if (starts && (*end == 'K' || *end == 'M')) {
        const long long unit = *end == 'K' ? 1024 : 1024 * 1024;
        v = v > o->hi / unit ? o->hi + 1 : v * unit;
        end++;
    }
    if (!starts || *end || errno || v < o->lo || v > o->hi)
        return XP_FAIL(XP_E_ARG, "%s: '%s' is not a whole number from %lld to %lld", o->name, text, o->lo, o->hi);
    *(long long *)at = v;
    return XP_OK;
}

static xp_status set_seed(const option *o, const char *text, void *at) {
    char *end = NULL;
    errno = 0;
    const unsigned long long v = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno)
        return XP_FAIL(XP_E_ARG, "%s: '%s' is not a whole number from 0 to 2^64-1", o->name, text);
    *(unsigned long long *)at = v;
    return XP_OK;
}

static xp_status set_real(const option *o, const char *text, void *at) {
    char *end = NULL;
    const double v = strtod(text, &end);
    const int starts = (text[0] >= '0' && text[0] <= '9') || text[0] == '.';
    if (!starts || *end || !isfinite(v))
        return XP_FAIL(XP_E_ARG, "%s: '%s' is not a finite number from 0", o->name, text);
    *(double *)at = v;
    return XP_OK;
}

static xp_status set_color(const option *o, const char *text, void *at) {
    static const char *const word[] = {"auto", "always", "never"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, word[i]) == 0) {
            *(int *)at = i;
            return XP_OK;
        }
    }
    return XP_FAIL(XP_E_ARG, "%s: '%s' is none of auto, always, never", o->name, text);
}

static xp_status set_value(const option *o, const char *text, xp_options *out) {
    void *at = (char *)out + o->at;
    if (o->has)
        *(int *)(void *)((char *)out + o->has) = 1;
    switch (o->type) {
    case FLAG:
        *(int *)at = 1;
        return XP_OK;
    case TEXT:
        if (!*text)
            return XP_FAIL(XP_E_ARG, "%s: the value is empty, expected %s", o->name, o->value);
        *(const char **)at = text;
        return XP_OK;
    case COUNT:
        return set_count(o, text, at);
    case SEED:
        return set_seed(o, text, at);
    case REAL:
        return set_real(o, text, at);
    case COLOR:
        return set_color(o, text, at);
    }
    return XP_FAIL(XP_E_BUG, "%s: no reader", o->name);
}

static int command_bit(const char *name) {
    for (int i = 0; i < COMMANDS; i++) {
        if (strcmp(commands[i].name, name) == 0)
            return commands[i].bit;
    }
    return 0;
}

int xp_options_is_command(const char *name) {
    return command_bit(name) != 0;
}

/* No command, or none of that name. */
static xp_status no_command(const char *name) {
    char all[160] = "";
    for (int i = 0; i < COMMANDS; i++) {
        const size_t used = strlen(all);
        snprintf(all + used, sizeof all - used, "%s%s", i ? ", " : "", commands[i].name);
    }
    return name ? XP_FAIL(XP_E_ARG, "command: '%s' is none of %s", name, all)
                : XP_FAIL(XP_E_ARG, "command: none given, expected one of %s", all);
}

/* One option at argv[*i]; "--name=value" and "--name value" are the same. */
static xp_status take_option(int argc, char **argv, int *i, int bit, int *seen, xp_options *out) {
    char name[64];
    char *eq = strchr(argv[*i], '=');
    const size_t n = eq ? (size_t)(eq - argv[*i]) : strlen(argv[*i]);
    snprintf(name, sizeof name, "%.*s", (int)(n < sizeof name ? n : sizeof name - 1), argv[*i]);
    const option *o = find_option(name);
    if (!o)
        return XP_FAIL(XP_E_ARG, "%s: no such option; the nearest is %s", name, nearest_option(name, bit));
    if (!(o->commands & bit))
        return XP_FAIL(XP_E_ARG, "%s: `expar %s` does not take it", name, out->command);
    if (seen[o - table]++)
        return XP_FAIL(XP_E_ARG, "%s: given twice", name);
    if (o->type == FLAG)
        return eq ? XP_FAIL(XP_E_ARG, "%s: takes no value, got '%s'", name, eq + 1) : set_value(o, "", out);
    if (!eq && (*i + 1 == argc || find_option(argv[*i + 1])))
        return XP_FAIL(XP_E_ARG, "%s: the value is missing, expected %s", name, o->value);
    return set_value(o, eq ? eq + 1 : argv[++*i], out);
}

xp_status xp_options_parse(int argc, char **argv, xp_options *out) {
    int seen[OPTIONS] = {0}, words_only = 0;
    memset(out, 0, sizeof *out);
    out->shrink = 1;
    out->seed = 1;
    if (argc < 2)
        return no_command(NULL);
    out->command = strcmp(argv[1], "--version") == 0 ? "version" : argv[1];
    const int bit = command_bit(out->command);
    if (!bit)
        return no_command(argv[1]);
    for (int i = 2; i < argc; i++) {
        if (!words_only && strcmp(argv[i], "--") == 0) {
            words_only = 1;
        } else if (!words_only && argv[i][0] == '-' && argv[i][1]) {
            XP_TRY(take_option(argc, argv, &i, bit, seen, out));
        } else if (out->words == XP_MAX_WORDS) {
            return XP_FAIL(XP_E_ARG, "arguments: more than %d", XP_MAX_WORDS);
        } else {
            out->word[out->words++] = argv[i];
        }
    }
    return XP_OK;
}

void xp_options_help(const char *command, FILE *f) {
    const int known = command ? command_bit(command) : 0, bit = known ? known : ALL;
    fprintf(f, "expar proves that a distributed mixture-of-experts training step computes what it should.\n\nusage:\n");
    for (int i = 0; i < COMMANDS; i++) {
        if (commands[i].bit & bit)
            fprintf(f, "  expar %s%s%s\n      %s\n", commands[i].name, commands[i].words[0] ? " " : "",
                    commands[i].words, commands[i].meaning);
    }
    fprintf(f, "\noptions:\n");
    for (int i = 0; i < OPTIONS; i++) {
        if (table[i].commands & bit)
            fprintf(f, "  %-16s %-18s %s\n", table[i].name, table[i].value ? table[i].value : "", table[i].meaning);
    }
    fprintf(f, "  %-16s %-18s %s\n", "--help, -h", "", "print this, of one command or of all");
    fprintf(f, "\nexit codes: 0 pass, 1 a check failed, 2 usage, 3 launch environment, 4 input file, 5 nothing ran,\n"
               "  6 unsupported, 8 hang, 9 peer lost, 10 internal, 11 output, 12 plugin (`expar explain exit` says "
               "more)\n");
}
