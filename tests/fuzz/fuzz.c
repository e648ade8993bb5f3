/* The checks that every fuzz target makes of a refusal, and the copy of the input that it parses.
 *
 * Nothing here may be lenient: a message that names nothing is as wrong as a crash, only quieter. */
#include "fuzz.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void fuzz_fail(const char *file, int line, const char *what, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "%s:%d: not so: %s: ", file, line, what);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    abort();
}

char *fuzz_text(const uint8_t *data, size_t bytes) {
    const uint8_t *nul = bytes ? memchr(data, 0, bytes) : NULL;
    const size_t n = nul ? (size_t)(nul - data) : bytes;
    char *text = malloc(n + 1);
    FUZZ_CHECK(text != NULL, "%zu bytes", n + 1);
    if (n)
        memcpy(text, data, n);
    text[n] = '\0';
    return text;
}

/* 1 when text begins with one of the words. */
static int begins(const char *text, const char *words) {
    for (const char *p = words; *p; p += strspn(p, " ")) {
        const size_t n = strcspn(p, " ");
        if (n && strncmp(text, p, n) == 0)
            return 1;
        p += n;
    }
    return 0;
}

/* 1 when the first n bytes of text stand somewhere in input; bytes that the message had to escape match anything. */
static int stands_in(const char *text, size_t n, const char *input) {
    const char *escape = memchr(text, '\\', n);
    n = escape ? (size_t)(escape - text) : n;
    for (; *input || n == 0; input++) {
        if (strncmp(input, text, n) == 0)
            return 1;
    }
    return 0;
}

void fuzz_refused(xp_status st, xp_status as, const char *subjects, const char *input) {
    const char *text = xp_error_text();
    FUZZ_CHECK(st == as, "status %s, expected %s: '%s'", xp_status_name(st), xp_status_name(as), text);
    for (const char *p = text; *p; p++)
        FUZZ_CHECK(*p >= 0x20 && *p <= 0x7e, "byte 0x%02x in '%s'", (unsigned)(unsigned char)*p, text);
    const size_t subject = strcspn(text, ":");
    FUZZ_CHECK(subject > 0 && text[subject] == ':', "'%s' has no subject", text);
    FUZZ_CHECK(strlen(text + subject) > 3, "'%s' says nothing of its subject", text);
    FUZZ_CHECK(begins(text, subjects) || stands_in(text, subject, input), "'%s' speaks of nothing that was given",
               text);
}
