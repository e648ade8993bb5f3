/* The number of an option, with its K or M, against a second reading of the same text that shares no code with it.
 *
 * The first byte chooses the option; the rest is the value. What is accepted has exactly the value that the text says.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "options.h"

static const struct {
    const char *name, *command;
    size_t at;
    unsigned long long lo, hi;
    int suffix;
} options[] = {
    {"--tokens", "check", offsetof(xp_options, tokens), 1, 1ull << 40, 1},
    {"--layers", "step", offsetof(xp_options, layers), 1, 1024, 1},
    {"--random", "check", offsetof(xp_options, random), 1, 100000000, 1},
    {"--seed", "plan", offsetof(xp_options, seed), 0, ~0ull, 0},
};
enum { OPTIONS = sizeof options / sizeof *options };

/* Digits, then at most one K (2^10) or M (2^20); 0 when the text is no such number or the number is past 2^64 - 1. */
static int read_number(const char *text, int suffix, unsigned long long *out) {
    const size_t digits = strspn(text, "0123456789");
    unsigned long long v = 0;
    if (digits == 0)
        return 0;
    for (size_t i = 0; i < digits; i++) {
        const unsigned d = (unsigned)(text[i] - '0');
        if (v > (~0ull - d) / 10)
            return 0;
        v = v * 10 + d;
    }
    const char *rest = text + digits;
    if (suffix && (*rest == 'K' || *rest == 'M')) {
        const unsigned shift = *rest == 'K' ? 10 : 20;
        if (v > ~0ull >> shift)
            return 0;
        v <<= shift;
        rest++;
    }
    *out = v;
    return *rest == '\0';
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    if (bytes < 1 || bytes > 400)
        return 0;
    const size_t o = data[0] % OPTIONS;
    char *text = fuzz_text(data + 1, bytes - 1), program[] = "expar", command[16], word[480];
    snprintf(command, sizeof command, "%s", options[o].command);
    snprintf(word, sizeof word, "%s=%s", options[o].name, text);
    char *argv[] = {program, command, word, NULL};
    unsigned long long want = 0, got;
    xp_options read;
    const int ok = read_number(text, options[o].suffix, &want) && want >= options[o].lo && want <= options[o].hi;
    const xp_status st = xp_options_parse(3, argv, &read);
    if (st != XP_OK) {
        fuzz_refused(st, XP_E_ARG, "--", word);
        FUZZ_CHECK(strncmp(xp_error_text(), options[o].name, strlen(options[o].name)) == 0, "'%s'", xp_error_text());
        FUZZ_CHECK(!ok, "'%s' is refused: %s", word, xp_error_text());
    } else {
        FUZZ_CHECK(ok, "'%s' is accepted", word);
        memcpy(&got, (const char *)&read + options[o].at, sizeof got);
        FUZZ_CHECK(got == want, "'%s' is read as %llu", word, got);
    }
    free(text);
    return 0;
}
