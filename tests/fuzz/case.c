/* Case lines: every case of an accepted line prints as a line that reads back to that one case and prints the same.
 *
 * A line that is refused hands no case on. A report's "repro" line is this round trip, so what it loses, a user loses.
 */
#include <stdlib.h>
#include <string.h>

#include "case.h"
#include "fuzz.h"

/* A product of more cases than SLOW costs more than it finds; one of more than REFUSED is refused before it is made. */
enum { SLOW = 2048, REFUSED = 1 << 22, LONGEST = 4 * XP_CASE_LINE };

typedef struct {
    const char *line;
    int cases;
    xp_case *again;
} seen;

static xp_status keep(const xp_case *c, void *arg) {
    seen *s = arg;
    s->cases++;
    *s->again = *c;
    return XP_OK;
}

/* All but the name, which a canonical line does not carry; scalars in the order of the line. */
static void check_same(const xp_case *a, const xp_case *b, const char *line) {
    FUZZ_CHECK(a->kind == b->kind && a->stage == b->stage, "'%s'", line);
    FUZZ_CHECK(memcmp(a->dim, b->dim, sizeof a->dim) == 0, "'%s'", line);
    FUZZ_CHECK(memcmp(a->dim_set, b->dim_set, sizeof a->dim_set) == 0, "'%s'", line);
    FUZZ_CHECK(memcmp(a->dtype, b->dtype, sizeof a->dtype) == 0, "'%s'", line);
    FUZZ_CHECK(a->data == b->data && a->seed == b->seed && a->expect == b->expect, "'%s'", line);
    FUZZ_CHECK(a->mesh.world == b->mesh.world && a->mesh.ep == b->mesh.ep && a->mesh.dp == b->mesh.dp, "'%s'", line);
    FUZZ_CHECK(a->mesh.ep_fsdp == b->mesh.ep_fsdp && a->mesh.jitter == b->mesh.jitter, "'%s'", line);
    FUZZ_CHECK(strcmp(a->mesh.kind, b->mesh.kind) == 0, "'%s'", line);
    FUZZ_CHECK(strcmp(a->model, b->model) == 0 && strcmp(a->dialect, b->dialect) == 0, "'%s'", line);
    FUZZ_CHECK(strcmp(a->with, b->with) == 0, "'%s'", line);
    FUZZ_CHECK(a->shrink == b->shrink && a->layers == b->layers && a->steps == b->steps, "'%s'", line);
    FUZZ_CHECK(a->deterministic == b->deterministic && a->order == b->order && a->align == b->align, "'%s'", line);
    FUZZ_CHECK(a->micro == b->micro && a->around == b->around, "'%s'", line);
    FUZZ_CHECK(a->params == b->params, "'%s': %d and %d scalars", line, a->params, b->params);
    for (int i = 0; i < a->params; i++) {
        FUZZ_CHECK(strcmp(a->param[i].name, b->param[i].name) == 0, "'%s'", line);
        FUZZ_CHECK(strcmp(a->param[i].value, b->param[i].value) == 0, "'%s'", line);
    }
}

static xp_status check_case(const xp_case *c, void *arg) {
    const seen *from = arg;
    char first[LONGEST], second[LONGEST];
    xp_case again;
    seen s = {from->line, 0, &again};
    FUZZ_CHECK(xp_case_check(c) == XP_OK, "'%s': %s", from->line, xp_error_text());
    FUZZ_CHECK(memchr(c->name, '\0', sizeof c->name) && strncmp(c->name, "seed/", 5) == 0, "'%s'", from->line);
    xp_case_print(c, first, sizeof first);
    FUZZ_CHECK(strlen(first) < XP_CASE_LINE, "'%s' from '%s' is too long a line", first, from->line);
    FUZZ_CHECK(xp_case_expand(first, NULL, NULL, keep, &s) == XP_OK, "'%s' from '%s': %s", first, from->line,
               xp_error_text());
    FUZZ_CHECK(s.cases == 1, "'%s' from '%s' is %d cases", first, from->line, s.cases);
    check_same(c, &again, from->line);
    xp_case_print(&again, second, sizeof second);
    FUZZ_CHECK(strcmp(first, second) == 0, "'%s' prints as '%s'", first, second);
    ((seen *)arg)->cases++;
    return XP_OK;
}

/* At least the number of cases, but for meshes, whose list is bounded by itself. */
static double product(const char *line) {
    double cases = 1.0, values = 1.0;
    for (const char *p = line; *p; p++) {
        values += *p == ',';
        if (*p == ' ' || *p == '\t' || p[1] == '\0') {
            cases *= values;
            values = 1.0;
        }
    }
    return cases;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    char *line = fuzz_text(data, bytes);
    const double cases = product(line);
    if (cases <= SLOW || cases > REFUSED) {
        seen s = {line, 0, NULL};
        int number = 0, checked = 0;
        const xp_status st = xp_case_expand(line, "seed", &number, check_case, &s);
        if (st != XP_OK) {
            fuzz_refused(st, XP_E_ARG, "case name mesh data expect seed E K align with", line);
            FUZZ_CHECK(s.cases == 0 && number == 0, "'%s' is refused after %d cases", line, s.cases);
        } else {
            FUZZ_CHECK(number == s.cases && number > 0, "'%s': %d cases, %d counted", line, s.cases, number);
        }
        /* Checking alone says the same. */
        FUZZ_CHECK(xp_case_expand(line, "seed", &checked, NULL, NULL) == st && checked == number, "'%s'", line);
    }
    free(line);
    return 0;
}
