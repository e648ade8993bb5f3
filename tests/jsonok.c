/* Exit code 0 when standard input is one JSON value that has the member named by the argument. */
#include <jansson.h>
#include <stdio.h>

int main(int argc, char **argv) {
    json_error_t e;
    json_t *v = json_loadf(stdin, JSON_REJECT_DUPLICATES, &e);
    if (!v) {
        fprintf(stderr, "line %d: %s\n", e.line, e.text);
        return 1;
    }
    const int ok = argc < 2 || json_object_get(v, argv[1]) != NULL;
    json_decref(v);
    return ok ? 0 : 1;
}
