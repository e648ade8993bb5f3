/* The presets that golden/ covers: read once from the case lines of its sets. */
#include "golden.h"

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

enum { PRESETS = 128, NAME = 64 };

static struct {
    char name[PRESETS][NAME];
    int n, read;
} covered;

static const char *golden_dir(void) {
    const char *dir = getenv("EXPAR_GOLDEN");
    return dir && *dir ? dir : XP_GOLDEN_DIR;
}

static void add(const char *name, size_t bytes) {
    if (bytes >= NAME || covered.n == PRESETS)
        return;
    for (int i = 0; i < covered.n; i++) {
        if (strlen(covered.name[i]) == bytes && memcmp(covered.name[i], name, bytes) == 0)
            return;
    }
    memcpy(covered.name[covered.n], name, bytes);
    covered.name[covered.n++][bytes] = '\0';
}

static xp_status read_set(const char *dir, void *arg) {
    static const char key[] = "dialect=";
    xp_vectors *v;
    (void)arg;
    if (xp_vectors_open(dir, &v) != XP_OK)
        return XP_OK; /* verify says what is wrong with it */
    for (int64_t i = 0; i < xp_vectors_count(v); i++) {
        const xp_vectors_test *t = xp_vectors_at(v, i);
        const char *at = t->result == XP_VECTORS_VALID ? strstr(t->line, key) : NULL;
        if (at)
            add(at + sizeof key - 1, strcspn(at + sizeof key - 1, " "));
    }
    xp_vectors_close(v);
    return XP_OK;
}

int xp_golden_covers(const char *preset) {
    if (!covered.read) {
        covered.read = 1;
        (void)xp_vectors_each(golden_dir(), read_set, NULL);
    }
    for (int i = 0; i < covered.n; i++) {
        if (strcmp(covered.name[i], preset) == 0)
            return 1;
    }
    return 0;
}
