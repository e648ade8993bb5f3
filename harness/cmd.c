/* What the commands share: errors to exit codes, the model and the mesh that options name, files in memory. */
#include "cmd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dump.h"
#include "registry.h"

static int exit_of_status(xp_status st) {
    switch (st) {
    case XP_OK:
        return XP_EXIT_OK;
    case XP_E_ARG:
        return XP_EXIT_USAGE;
    case XP_E_IO:
    case XP_E_FORMAT:
        return XP_EXIT_INPUT;
    case XP_E_HANG:
        return XP_EXIT_HANG;
    case XP_E_PEER:
        return XP_EXIT_PEER;
    case XP_E_PLUGIN:
        return XP_EXIT_PLUGIN;
    case XP_E_DEVICE:
        return XP_EXIT_UNSUPPORTED;
    case XP_E_COMM:
        return XP_EXIT_FAIL;
    case XP_E_NOMEM:
    case XP_E_BUG:
        break;
    }
    return XP_EXIT_INTERNAL;
}

int xp_cmd_fail(xp_status st) {
    fflush(stdout);
    fprintf(stderr, "expar: %s\n", xp_error_text());
    return exit_of_status(st);
}

int xp_exit_worse(int a, int b) {
    static const int order[] = {10, 9, 8, 3, 2, 4, 12, 11, 1, 13, 7, 6, 5, 0};
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        if (a == order[i] || b == order[i])
            return order[i];
    }
    return XP_EXIT_INTERNAL;
}

int xp_exit_of(xp_verdict v, int required) {
    switch (v) {
    case XP_V_PASS:
        return XP_EXIT_OK;
    case XP_V_SKIP:
    case XP_V_UNSUPPORTED:
        return required ? XP_EXIT_UNSUPPORTED : XP_EXIT_NOTHING;
    case XP_V_HANG:
        return XP_EXIT_HANG;
    case XP_V_VACUOUS:
    case XP_V_ERROR:
    case XP_V_FAIL:
        break;
    }
    return XP_EXIT_FAIL;
}

xp_report_style xp_cmd_style(const xp_options *o) {
    const char *no = getenv("NO_COLOR");
    const int tty = isatty(STDOUT_FILENO), no_color = no && *no;
    return (xp_report_style){.out = stdout,
                             .color = o->color == 1 || (o->color == 0 && tty && !no_color),
                             .progress = tty && isatty(STDERR_FILENO),
                             .quiet = o->quiet,
                             .verbose = o->verbose};
}

int xp_cmd_flush(int code) {
    errno = 0;
    if (fflush(stdout) == 0 && !ferror(stdout))
        return code;
    fprintf(stderr, "expar: standard output: %s\n", errno ? strerror(errno) : "cannot be written");
    return xp_exit_worse(code, XP_EXIT_OUTPUT);
}

xp_status xp_cmd_read(const char *path, uint8_t **out, int64_t *out_bytes) {
    struct stat s;
    errno = 0;
    *out = NULL;
    *out_bytes = 0;
    /* Asked before it is opened: opening a pipe would wait for a writer. */
    FILE *f = stat(path, &s) == 0 && S_ISREG(s.st_mode) ? fopen(path, "rb") : NULL;
    if (!f)
        return XP_FAIL(XP_E_IO, "--text: %s: %s", path, errno ? strerror(errno) : "no regular file");
    xp_status st = XP_OK;
    if (s.st_size < 2 || s.st_size > INT64_C(1) << 32)
        st = XP_FAIL(XP_E_FORMAT, "--text: %s has %lld bytes, expected 2 to 2^32", path, (long long)s.st_size);
    else if (!(*out = malloc((size_t)s.st_size)))
        st = XP_FAIL(XP_E_NOMEM, "--text: %lld bytes for %s", (long long)s.st_size, path);
    else if (fread(*out, 1, (size_t)s.st_size, f) != (size_t)s.st_size)
        st = XP_FAIL(XP_E_IO, "--text: %s: cannot be read", path);
    *out_bytes = st == XP_OK ? (int64_t)s.st_size : 0;
    if (st != XP_OK) {
        free(*out);
        *out = NULL;
    }
    fclose(f);
    return st;
}

int xp_cmd_dump_dir(const char *dir) {
    const xp_status st = xp_dump_check(dir);
    if (st == XP_OK)
        return XP_EXIT_OK;
    const int code = xp_cmd_fail(st);
    return st == XP_E_IO ? XP_EXIT_OUTPUT : code;
}

xp_status xp_cmd_model(const xp_options *o, xp_model *out) {
    if (!o->model)
        return XP_FAIL(XP_E_ARG, "--model: missing; a config.json or a name of `expar list models`");
    XP_TRY(xp_model_open(o->model, out));
    return xp_model_override(out, 0, o->experts, o->topk);
}

void xp_cmd_run_options(const xp_options *o, xp_step_options *out) {
    *out = xp_step_defaults();
    if (o->has_tokens)
        out->tokens = o->tokens;
    if (o->has_lr)
        out->lr = o->lr;
    out->layers = (int)o->layers;
    out->shrink = (int)o->shrink;
    out->deterministic = o->deterministic;
    if (o->micro)
        out->micro = (int)o->micro;
    out->seed = o->seed;
}

xp_status xp_cmd_impl(const xp_options *o, const xp_backend **out_impl, const xp_fault **out_fault) {
    *out_fault = NULL;
    XP_TRY(xp_backend_open(o->impl ? o->impl : "ref", out_impl));
    if (!o->fault)
        return XP_OK;
    *out_fault = xp_fault_find(o->fault);
    return *out_fault ? XP_OK : XP_FAIL(XP_E_ARG, "--fault: '%s' is no fault (see `expar list faults`)", o->fault);
}

xp_status xp_cmd_mesh(const xp_options *o, const char *dflt, xp_mesh_spec *out) {
    return xp_mesh_spec_parse(o->mesh ? o->mesh : dflt, out);
}
