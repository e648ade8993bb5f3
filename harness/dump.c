/* Stage calls to vector sets: see dump.h. One dump belongs to one rank. */
#include "dump.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vectors.h"
#include "xp/dialect.h"
#include "xp/gather.h"
#include "xp/permute.h"
#include "xp/scatter.h"

enum { OPERANDS = 32, LINE = 1600 };

struct xp_dump {
    xp_vectors_writer *w;
    const char *only;
    int world;
    int64_t tests, left;
    void *saved[OPERANDS]; /* in-out operands before the call */
};

xp_status xp_dump_check(const char *dir) {
    static const char *const made[] = {"manifest.json", "rank0"};
    char path[4096];
    struct stat s;
    for (size_t i = 0; dir && i < sizeof made / sizeof *made; i++) {
        if (snprintf(path, sizeof path, "%s/%s", dir, made[i]) >= (int)sizeof path)
            return XP_FAIL(XP_E_ARG, "'%.60s...': the path is longer than %zu characters", dir, sizeof path - 8);
        if (stat(path, &s) == 0)
            return XP_FAIL(XP_E_ARG, "'%s' holds a set already (%s), expected a new folder", dir, made[i]);
    }
    if (dir && mkdir(dir, 0777) != 0 && errno != EEXIST)
        return XP_FAIL(XP_E_IO, "'%s': cannot make the folder: %s", dir, strerror(errno));
    if (dir && (stat(dir, &s) != 0 || !S_ISDIR(s.st_mode) || access(dir, W_OK | X_OK) != 0))
        return XP_FAIL(XP_E_IO, "'%s': not a folder that can be written", dir);
    return XP_OK;
}

xp_status xp_dump_open(const char *dir, int rank, int world, uint64_t seed, const char *only, xp_dump **out) {
    char path[4096];
    *out = calloc(1, sizeof **out);
    if (!*out)
        return XP_FAIL(XP_E_NOMEM, "dump: %zu bytes", sizeof **out);
    (*out)->only = only;
    (*out)->world = world;
    snprintf(path, sizeof path, "%s", dir);
    if (world > 1) {
        /* Every rank makes the folder around its own; whoever comes first does. */
        if (mkdir(dir, 0777) != 0 && errno != EEXIST) {
            xp_dump_close(*out);
            *out = NULL;
            return XP_FAIL(XP_E_IO, "--dump: %s: cannot make the folder", dir);
        }
        snprintf(path, sizeof path, "%s/rank%d", dir, rank);
    }
    const int64_t most = INT64_C(1) << 53;
    const xp_status st =
        xp_vectors_create(path, "dump", "expar", 1, seed < (uint64_t)most ? (int64_t)seed : most, &(*out)->w);
    if (st != XP_OK) {
        xp_dump_close(*out);
        *out = NULL;
    }
    return st;
}

void xp_dump_close(xp_dump *d) {
    if (!d)
        return;
    for (int i = 0; i < OPERANDS; i++)
        free(d->saved[i]);
    xp_vectors_writer_close(d->w);
    free(d);
}

/* ---- the case line ---- */

static xp_status put(char *buf, size_t bytes, const char *key, const char *value) {
    const size_t at = strlen(buf);
    const int n = snprintf(buf + at, bytes - at, " %s=%s", key, value);
    return n > 0 && (size_t)n < bytes - at ? XP_OK
                                           : XP_FAIL(XP_E_ARG, "case: a line of more than %zu characters", bytes);
}

static xp_status put_dialect(char *buf, size_t bytes, const xp_dialect *d) {
    char now[64], was[64];
    const xp_dialect *preset = d && d->name ? xp_dialect_find(d->name) : NULL;
    if (!preset)
        return d ? XP_FAIL(XP_E_ARG, "dialect: '%s' is no preset", d->name ? d->name : "?") : XP_OK;
    XP_TRY(put(buf, bytes, "dialect", d->name));
    for (const xp_dialect_field *f = xp_dialect_fields; f->name; f++) {
        xp_dialect_print(d, f, now, sizeof now);
        xp_dialect_print(preset, f, was, sizeof was);
        if (strcmp(now, was) != 0)
            XP_TRY(put(buf, bytes, f->name, now));
    }
    return XP_OK;
}

static xp_status put_param(char *buf, size_t bytes, const xp_param *p, const void *args) {
    const void *at = (const char *)args + p->at;
    char text[64] = "";
    switch (p->type) {
    case XP_P_DIALECT:
        return put_dialect(buf, bytes, *(const xp_dialect *const *)at);
    case XP_P_WORD: {
        const char *w = p->words;
        for (int n = *(const int *)at; n > 0; n--)
            w += strcspn(w, "|") + 1;
        snprintf(text, sizeof text, "%.*s", (int)strcspn(w, "|"), w);
        break;
    }
    case XP_P_DTYPE:
        snprintf(text, sizeof text, "%s", xp_dtype_name(*(const xp_dtype *)at));
        break;
    case XP_P_INT:
        snprintf(text, sizeof text, "%d", *(const int *)at);
        break;
    case XP_P_I64:
        if (strcmp(p->name, "token0") == 0)
            return XP_OK; /* follows from the rank: see is_a_test() */
        snprintf(text, sizeof text, "%" PRId64, *(const int64_t *)at);
        break;
    case XP_P_F32:
        snprintf(text, sizeof text, "%.9g", (double)*(const float *)at);
        break;
    case XP_P_F64:
        snprintf(text, sizeof text, "%.17g", *(const double *)at);
        break;
    }
    return put(buf, bytes, p->name, text);
}

/* The dtype of each group, of its first operand. */
static xp_status put_dtypes(char *buf, size_t bytes, const xp_stage *s, const void *args) {
    static const char *const group[] = {"act", "param", "router", "logits", "weight", "grad", "reduce"};
    for (size_t g = 0; g < sizeof group / sizeof *group; g++) {
        for (int i = 0; i < s->operands; i++) {
            const xp_tensor *t = xp_stage_ctensor(s, args, i);
            if (!t->data || strcmp(s->operand[i].group, group[g]) != 0)
                continue;
            XP_TRY(put(buf, bytes, group[g], xp_dtype_name(t->dtype)));
            break;
        }
    }
    return XP_OK;
}

/* The case line of a call that has these args: stage, dtypes and every scalar. XP_E_ARG when it is too long. */
static xp_status line_of(const xp_stage *s, const void *args, char *buf, size_t bytes) {
    snprintf(buf, bytes, "%s", s->name);
    XP_TRY(put_dtypes(buf, bytes, s, args));
    for (int i = 0; i < s->params; i++)
        XP_TRY(put_param(buf, bytes, &s->param[i], args));
    return XP_OK;
}

/* ---- calls ---- */

static int is_a_test(const xp_dump *d, const xp_stage *s, const void *args) {
    if (s == &xp_stage_gather || s == &xp_stage_scatter || s->operands > OPERANDS)
        return 0;
    if (s == &xp_stage_permute && ((const xp_permute_args *)args)->token0 != 0)
        return 0; /* global token numbers that a set of its own does not have */
    for (int i = 0; i < s->params; i++) {
        const void *at = (const char *)args + s->param[i].at;
        if (strcmp(s->param[i].name, "token0") == 0 && *(const int64_t *)at != 0)
            return 0;
    }
    return d->world == 1 || s->axis == XP_LOCAL;
}

static int wanted(const xp_dump *d, const xp_stage *s) {
    return !d->only || strcmp(d->only, s->name) == 0;
}

xp_status xp_dump_before(xp_dump *d, const xp_rank *r, const xp_stage *s, const void *args) {
    (void)r;
    if (!wanted(d, s) || !is_a_test(d, s, args))
        return XP_OK;
    for (int i = 0; i < s->operands; i++) {
        const xp_tensor *t = xp_stage_ctensor(s, args, i);
        if (s->operand[i].role != XP_INOUT || !t->data)
            continue;
        if (!xp_tensor_contiguous(t) || t->mem != XP_HOST)
            return XP_FAIL(XP_E_ARG, "--dump: %s of %s is not contiguous host memory", s->operand[i].name, s->name);
        const size_t n = xp_dtype_bytes(t->dtype, xp_tensor_count(t));
        free(d->saved[i]);
        d->saved[i] = malloc(n + 1);
        if (!d->saved[i])
            return XP_FAIL(XP_E_NOMEM, "dump: %zu bytes", n);
        memcpy(d->saved[i], t->data, n);
    }
    return XP_OK;
}

typedef struct {
    xp_safetensors_item item[OPERANDS];
    char name[OPERANDS][64];
    int n;
} items;

static void add_item(items *to, const char *prefix, const char *operand, const xp_tensor *t, void *data) {
    snprintf(to->name[to->n], sizeof to->name[0], "%s%s", prefix, operand);
    to->item[to->n] = (xp_safetensors_item){to->name[to->n], *t};
    if (data)
        to->item[to->n].tensor.data = data;
    to->n++;
}

static xp_status write_test(xp_dump *d, const xp_rank *r, const xp_stage *s, const char *site, const void *args) {
    items in = {.n = 0}, out = {.n = 0};
    char line[LINE], stem[96], comment[160], prompt[4096], expected[4096];
    for (int i = 0; i < s->operands; i++) {
        const xp_operand *o = &s->operand[i];
        const xp_tensor *t = xp_stage_ctensor(s, args, i);
        if (!t->data)
            continue;
        if (o->role & XP_IN)
            add_item(&in, "in.", o->name, t, o->role == XP_INOUT ? d->saved[i] : NULL);
        if (o->role & XP_OUT)
            add_item(&out, "exp.", o->name, t, NULL);
    }
    XP_TRY(line_of(s, args, line, sizeof line));
    snprintf(stem, sizeof stem, "%s-%" PRId64 ".prompt", s->name, d->tests);
    XP_TRY(xp_vectors_put(d->w, stem, s->name, in.item, in.n, prompt));
    snprintf(stem, sizeof stem, "%s-%" PRId64 ".expected", s->name, d->tests);
    XP_TRY(xp_vectors_put(d->w, stem, s->name, out.item, out.n, expected));
    snprintf(comment, sizeof comment, "step %d, layer %d, %s", r->step, r->layer, site);
    const xp_vectors_test t = {.group = s->name,
                               .source = "expar",
                               .comment = comment,
                               .line = line,
                               .prompt = prompt,
                               .expected = expected,
                               .compare = XP_VECTORS_BOUND};
    d->tests++;
    return xp_vectors_add(d->w, &t);
}

xp_status xp_dump_after(xp_dump *d, const xp_rank *r, const xp_stage *s, const char *site, const void *args) {
    if (!wanted(d, s))
        return XP_OK;
    if (is_a_test(d, s, args))
        return write_test(d, r, s, site, args);
    d->left++;
    return XP_OK;
}

xp_status xp_dump_finish(xp_dump *d, int64_t *out_tests, int64_t *out_left) {
    if (!d)
        return XP_OK;
    if (out_tests)
        *out_tests += d->tests;
    if (out_left)
        *out_left += d->left;
    return d->tests > 0 ? xp_vectors_finish(d->w) : XP_OK;
}
