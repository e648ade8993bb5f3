/* What the fuzz targets share: one entry a file, checks that end the process, and what every refusal must look like.
 *
 * A target is one function of bytes. It is linked with libFuzzer (a clang build with XP_FUZZ) and, in every build, with
 * replay.c, which runs the committed seeds. A target must hold nothing when it returns and depend on nothing but its
 * bytes. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

#include "xp/status.h"

/* libFuzzer's name for a target; returns 0. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* Prints where and what, then aborts: libFuzzer keeps the input, a test fails. */
void fuzz_fail(const char *file, int line, const char *what, const char *fmt, ...) XP_PRINTF(4, 5);
#define FUZZ_CHECK(ok, ...) ((ok) ? (void)0 : fuzz_fail(__FILE__, __LINE__, #ok, __VA_ARGS__))

/* The bytes up to the first NUL, terminated, in a block of exactly that size (so that ASan sees every byte read past
 * the end). The caller frees it. */
char *fuzz_text(const uint8_t *data, size_t bytes);
/* The call was refused as it should be: with status `as`, in one line of printable ASCII that says more than its
 * subject, and the subject begins with a word of `subjects` (words separated by blanks) or stands in the input. */
void fuzz_refused(xp_status st, xp_status as, const char *subjects, const char *input);

#endif
