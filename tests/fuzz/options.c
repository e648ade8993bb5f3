/* Whole command lines, one word a line of the input: what is accepted can be written again from what was read.
 *
 * The written line has every option as --name=value in a fixed order and the other words after "--"; it must read back
 * to the same values. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "options.h"

enum { MAX_ARGS = XP_MAX_WORDS + 64, BYTES = 16384 };

typedef struct {
    int argc;
    char *argv[MAX_ARGS];
    char bytes[BYTES];
    size_t used;
} line;

/* Put at the end of every written line: an option's name, but after "--" it is a word. */
static const char last_word[] = "--model=x";

static void add(line *l, const char *name, const char *value) {
    const size_t left = sizeof l->bytes - l->used;
    const int n = snprintf(l->bytes + l->used, left, "%s%s%s", name, value ? "=" : "", value ? value : "");
    FUZZ_CHECK(n >= 0 && (size_t)n < left && l->argc < MAX_ARGS - 1, "%d words", l->argc);
    l->argv[l->argc++] = l->bytes + l->used;
    l->argv[l->argc] = NULL;
    l->used += (size_t)n + 1;
}

static void add_number(line *l, const char *name, int given, unsigned long long v) {
    char text[24];
    snprintf(text, sizeof text, "%llu", v);
    if (given)
        add(l, name, text);
}

static void add_text(line *l, const char *name, const char *v) {
    if (v)
        add(l, name, v);
}

static void add_flag(line *l, const char *name, int v) {
    if (v)
        add(l, name, NULL);
}

static void write_line(const xp_options *o, line *l) {
    static const char *const color[] = {"auto", "always", "never"};
    char lr[32];
    memset(l, 0, sizeof *l);
    add(l, "expar", NULL);
    add(l, o->command, NULL);
    add_text(l, "--model", o->model);
    add_text(l, "--mesh", o->mesh);
    add_text(l, "--text", o->text);
    add_text(l, "--impl", o->impl);
    add_text(l, "--fault", o->fault);
    add_text(l, "-J", o->json_file);
    add_number(l, "--layers", o->layers != 0, (unsigned long long)o->layers);
    add_number(l, "--shrink", o->shrink != 1, (unsigned long long)o->shrink);
    add_number(l, "--tokens", o->has_tokens, (unsigned long long)o->tokens);
    add_number(l, "--steps", o->has_steps, (unsigned long long)o->steps);
    add_number(l, "--experts", o->experts != 0, (unsigned long long)o->experts);
    add_number(l, "--topk", o->topk != 0, (unsigned long long)o->topk);
    add_number(l, "--micro-batches", o->micro != 0, (unsigned long long)o->micro);
    add_number(l, "--random", o->random != 0, (unsigned long long)o->random);
    add_number(l, "--seed", o->has_seed, o->seed);
    snprintf(lr, sizeof lr, "%.17g", o->lr);
    add_text(l, "--lr", o->has_lr ? lr : NULL);
    add_flag(l, "--deterministic", o->deterministic);
    add_flag(l, "--json", o->json);
    add_flag(l, "-q", o->quiet);
    add_flag(l, "-v", o->verbose);
    FUZZ_CHECK(o->color >= 0 && o->color <= 2, "color %d", o->color);
    add_text(l, "--color", o->color ? color[o->color] : NULL);
    add(l, "--", NULL);
    for (int i = 0; i < o->words; i++)
        add(l, o->word[i], NULL);
    if (o->words < XP_MAX_WORDS)
        add(l, last_word, NULL);
}

static int same_text(const char *a, const char *b) {
    return a && b ? strcmp(a, b) == 0 : a == b;
}

static void check_same(const xp_options *a, const xp_options *b) {
    FUZZ_CHECK(same_text(a->command, b->command), "'%s' and '%s'", a->command, b->command);
    FUZZ_CHECK(same_text(a->model, b->model) && same_text(a->mesh, b->mesh), "%s", a->command);
    FUZZ_CHECK(same_text(a->text, b->text) && same_text(a->impl, b->impl), "%s", a->command);
    FUZZ_CHECK(same_text(a->fault, b->fault) && same_text(a->json_file, b->json_file), "%s", a->command);
    FUZZ_CHECK(a->layers == b->layers && a->shrink == b->shrink && a->tokens == b->tokens, "%s", a->command);
    FUZZ_CHECK(a->steps == b->steps && a->experts == b->experts && a->topk == b->topk, "%s", a->command);
    FUZZ_CHECK(a->micro == b->micro && a->random == b->random && a->seed == b->seed, "%s", a->command);
    FUZZ_CHECK(memcmp(&a->lr, &b->lr, sizeof a->lr) == 0, "lr %.17g and %.17g", a->lr, b->lr);
    FUZZ_CHECK(a->deterministic == b->deterministic && a->json == b->json, "%s", a->command);
    FUZZ_CHECK(a->quiet == b->quiet && a->verbose == b->verbose && a->color == b->color, "%s", a->command);
    FUZZ_CHECK(a->has_tokens == b->has_tokens && a->has_seed == b->has_seed, "%s", a->command);
    FUZZ_CHECK(a->has_steps == b->has_steps && a->has_lr == b->has_lr, "%s", a->command);
    const int more = a->words < XP_MAX_WORDS;
    FUZZ_CHECK(a->words + more == b->words, "%d and %d words", a->words, b->words);
    FUZZ_CHECK(!more || same_text(b->word[a->words], last_word), "the last word is '%s'", b->word[a->words]);
    for (int i = 0; i < a->words; i++)
        FUZZ_CHECK(same_text(a->word[i], b->word[i]), "word %d: '%s' and '%s'", i, a->word[i], b->word[i]);
}

/* Splits at line ends; an empty line is an empty word. Returns the number of words, 0 when there are too many. */
static int split(char *text, char **argv) {
    int argc = 0;
    for (char *p = text;; p++) {
        char *end = strchr(p, '\n');
        if (argc == MAX_ARGS - 1)
            return 0;
        argv[argc++] = p;
        argv[argc] = NULL;
        if (!end)
            return argc;
        *end = '\0';
        p = end;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    static char program[] = "expar";
    static line again;
    char *argv[MAX_ARGS + 1] = {program};
    xp_options o, second;
    if (bytes > BYTES / 4)
        return 0;
    char *text = fuzz_text(data, bytes), *whole = fuzz_text(data, bytes);
    const int words = split(text, argv + 1);
    memset(&o, 0xa5, sizeof o);
    const xp_status st = words ? xp_options_parse(words + 1, argv, &o) : XP_E_ARG;
    if (st == XP_OK) {
        write_line(&o, &again);
        FUZZ_CHECK(xp_options_parse(again.argc, again.argv, &second) == XP_OK, "%s", xp_error_text());
        check_same(&o, &second);
    } else if (words) {
        fuzz_refused(st, XP_E_ARG, "command arguments", whole);
    }
    free(text);
    free(whole);
    return 0;
}
