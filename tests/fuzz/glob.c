/* The glob of case names against a second matcher: a table over both texts, with no search and no shortcut.
 *
 * The input is the pattern, a line end, and the name. */
#include <stdlib.h>
#include <string.h>

#include "case.h"
#include "fuzz.h"

enum { LONGEST = 200 };

/* row[j] says whether the pattern read so far matches the first j bytes of the name. */
static int matches(const char *pattern, const char *name) {
    unsigned char row[LONGEST + 1] = {1};
    const size_t n = strlen(name);
    for (const char *p = pattern; *p; p++) {
        unsigned char diagonal = row[0];
        row[0] = row[0] && *p == '*';
        for (size_t j = 1; j <= n; j++) {
            const unsigned char up = row[j];
            if (*p == '*')
                row[j] = row[j - 1] || up;
            else
                row[j] = diagonal && (*p == '?' || *p == name[j - 1]);
            diagonal = up;
        }
    }
    return row[n];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    const uint8_t *end = bytes ? memchr(data, '\n', bytes) : NULL;
    if (!end || bytes > LONGEST)
        return 0;
    char *pattern = fuzz_text(data, (size_t)(end - data));
    char *name = fuzz_text(end + 1, bytes - (size_t)(end - data) - 1);
    FUZZ_CHECK(xp_glob(pattern, name) == matches(pattern, name), "'%s' on '%s': %d", pattern, name,
               xp_glob(pattern, name));
    free(pattern);
    free(name);
    return 0;
}
