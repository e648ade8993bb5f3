/* Responses: see responses.h. A rank's slice is copied into a tensor of the whole shape; every element must come from
 * somebody. */
#include "responses.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "file.h"

enum { MOST = 64, RANKS = 1024 };

typedef struct {
    char name[XP_SAFETENSORS_MAX_NAME + 1];
    xp_tensor tensor;
    uint8_t *covered; /* one byte an element; NULL for a tensor of a whole file */
} piece;

struct xp_responses {
    xp_safetensors *whole; /* of a response in one file */
    piece piece[MOST];
    int pieces;
};

static int exists(const char *path) {
    struct stat s;
    return stat(path, &s) == 0;
}

void xp_responses_close(xp_responses *r) {
    if (!r)
        return;
    for (int i = 0; i < r->pieces; i++) {
        if (r->piece[i].covered)
            free(r->piece[i].tensor.data);
        free(r->piece[i].covered);
    }
    xp_safetensors_close(r->whole);
    free(r);
}

int xp_responses_at(const xp_responses *r, int i, const char **out_name, xp_tensor *out) {
    if (i < 0 || i >= r->pieces)
        return 0;
    *out_name = r->piece[i].name;
    *out = r->piece[i].tensor;
    return 1;
}

static xp_status add_piece(xp_responses *r, const char *path, const char *name, piece **out) {
    if (r->pieces == MOST)
        return XP_FAIL(XP_E_FORMAT, "%s: more than %d tensors", path, MOST);
    *out = &r->piece[r->pieces++];
    memset(*out, 0, sizeof **out);
    snprintf((*out)->name, sizeof(*out)->name, "%s", name);
    return XP_OK;
}

static xp_status take_whole(xp_responses *r, const char *path) {
    XP_TRY(xp_safetensors_open(path, &r->whole));
    for (int64_t i = 0; i < xp_safetensors_count(r->whole); i++) {
        piece *p = NULL;
        XP_TRY(add_piece(r, path, xp_safetensors_at(r->whole, i)->name, &p));
        XP_TRY(xp_safetensors_view(r->whole, i, &p->tensor));
    }
    return XP_OK;
}

/* ---- one file a rank ---- */

static piece *find_piece(xp_responses *r, const char *name) {
    for (int i = 0; i < r->pieces; i++) {
        if (strcmp(r->piece[i].name, name) == 0)
            return &r->piece[i];
    }
    return NULL;
}

static xp_status parse(const char *path, const xp_safetensors *st, const char *key, json_t **out) {
    const char *text = xp_safetensors_metadata(st, key);
    *out = text ? json_loads(text, JSON_REJECT_DUPLICATES, NULL) : json_object();
    if (!*out || !json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        return XP_FAIL(XP_E_FORMAT, "%s: %s is no JSON object", path, key);
    }
    return XP_OK;
}

/* A list of ndim whole numbers, or of pairs of them; lo and hi are equal for a single number. */
static xp_status numbers(const char *path, const char *name, const char *key, const json_t *v, int ndim, int64_t *lo,
                         int64_t *hi) {
    if (!json_is_array(v) || json_array_size(v) != (size_t)ndim)
        return XP_FAIL(XP_E_FORMAT, "%s: %s of '%s' is no list of %d dimensions", path, key, name, ndim);
    for (int d = 0; d < ndim; d++) {
        const json_t *e = json_array_get(v, (size_t)d), *a = json_array_get(e, 0), *b = json_array_get(e, 1);
        const int pair = json_is_array(e) && json_array_size(e) == 2 && json_is_integer(a) && json_is_integer(b);
        if (!pair && !json_is_integer(e))
            return XP_FAIL(XP_E_FORMAT, "%s: %s of '%s', dimension %d: expected whole numbers", path, key, name, d);
        lo[d] = pair ? json_integer_value(a) : json_integer_value(e);
        hi[d] = pair ? json_integer_value(b) : lo[d];
    }
    return XP_OK;
}

static xp_status make_piece(xp_responses *r, const char *path, const xp_tensor *t, const int64_t *dim, const char *name,
                            piece **out) {
    int64_t count = 1;
    for (int d = 0; d < t->ndim; d++) {
        if (dim[d] < 0 || (dim[d] > 0 && count > (INT64_C(1) << 40) / dim[d]))
            return XP_FAIL(XP_E_FORMAT, "%s: the whole shape of '%s' is out of range", path, name);
        count *= dim[d];
    }
    XP_TRY(add_piece(r, path, name, out));
    void *data = calloc(xp_dtype_bytes(t->dtype, count) + 1, 1);
    (*out)->covered = calloc((size_t)count + 1, 1);
    if (!data || !(*out)->covered) {
        free(data);
        free((*out)->covered);
        (*out)->covered = NULL;
        return XP_FAIL(XP_E_NOMEM, "%s: '%s' of %lld elements", path, name, (long long)count);
    }
    (*out)->tensor = xp_tensor_of(data, t->dtype, t->ndim, dim);
    return XP_OK;
}

static xp_status copy_slice(const char *path, piece *p, const xp_tensor *t, const int64_t *lo) {
    const size_t bytes = xp_dtype_bytes(t->dtype, 1);
    for (int64_t n = 0; n < xp_tensor_count(t); n++) {
        int64_t at[XP_MAXDIM] = {0}, left = n;
        for (int d = t->ndim - 1; d >= 0; d--) {
            at[d] = left % t->dim[d] + lo[d];
            left /= t->dim[d];
        }
        const int64_t whole =
            (int64_t)(((char *)xp_tensor_at(&p->tensor, at[0], at[1], at[2], at[3]) - (char *)p->tensor.data) /
                      (int64_t)bytes);
        char *to = (char *)p->tensor.data + (size_t)whole * bytes;
        const char *from = (const char *)t->data + (size_t)n * bytes;
        if (p->covered[whole] && memcmp(to, from, bytes) != 0)
            return XP_FAIL(XP_E_FORMAT, "%s: element %lld of '%s' has other bits than another rank's", path,
                           (long long)whole, p->name);
        memcpy(to, from, bytes);
        p->covered[whole] = 1;
    }
    return XP_OK;
}

static xp_status take_tensor(xp_responses *r, const char *path, xp_safetensors *st, int64_t i, const json_t *shapes,
                             const json_t *slices) {
    const char *name = xp_safetensors_at(st, i)->name;
    int64_t lo[XP_MAXDIM] = {0}, hi[XP_MAXDIM] = {0}, dim[XP_MAXDIM], unused[XP_MAXDIM];
    xp_tensor t;
    XP_TRY(xp_safetensors_view(st, i, &t));
    if (t.dtype == XP_E2M1)
        return XP_FAIL(XP_E_FORMAT, "%s: '%s': slices of F4 are not taken", path, name);
    memcpy(dim, t.dim, sizeof dim);
    memcpy(hi, t.dim, sizeof hi);
    if (json_object_get(slices, name)) {
        XP_TRY(numbers(path, name, "expar.slice", json_object_get(slices, name), t.ndim, lo, hi));
        XP_TRY(numbers(path, name, "expar.global_shape", json_object_get(shapes, name), t.ndim, dim, unused));
    }
    piece *p = find_piece(r, name);
    if (!p)
        XP_TRY(make_piece(r, path, &t, dim, name, &p));
    for (int d = 0; d < t.ndim; d++) {
        if (p->tensor.ndim != t.ndim || p->tensor.dtype != t.dtype || p->tensor.dim[d] != dim[d] || lo[d] < 0 ||
            hi[d] - lo[d] != t.dim[d] || hi[d] > dim[d])
            return XP_FAIL(XP_E_FORMAT, "%s: '%s', dimension %d: [%lld, %lld) of %lld does not fit its %lld elements",
                           path, name, d, (long long)lo[d], (long long)hi[d], (long long)dim[d], (long long)t.dim[d]);
    }
    return copy_slice(path, p, &t, lo);
}

static xp_status take_rank(xp_responses *r, const char *path, int rank) {
    xp_safetensors *st = NULL;
    json_t *shapes = NULL, *slices = NULL;
    char number[16];
    xp_status status = XP_OK;
    snprintf(number, sizeof number, "%d", rank);
    XP_TRY(xp_safetensors_open(path, &st));
    const char *says = xp_safetensors_metadata(st, "expar.rank");
    if (!says || strcmp(says, number) != 0) {
        status = XP_FAIL(XP_E_FORMAT, "%s: expar.rank is '%s', expected %s", path, says ? says : "absent", number);
        goto out;
    }
    if ((status = parse(path, st, "expar.global_shape", &shapes)) != XP_OK ||
        (status = parse(path, st, "expar.slice", &slices)) != XP_OK)
        goto out;
    for (int64_t i = 0; i < xp_safetensors_count(st) && status == XP_OK; i++)
        status = take_tensor(r, path, st, i, shapes, slices);
out:
    json_decref(shapes);
    json_decref(slices);
    xp_safetensors_close(st);
    return status;
}

static xp_status check_covered(const xp_responses *r, const char *path) {
    for (int i = 0; i < r->pieces; i++) {
        const piece *p = &r->piece[i];
        for (int64_t n = 0; n < xp_tensor_count(&p->tensor); n++) {
            if (!p->covered[n])
                return XP_FAIL(XP_E_FORMAT, "%s: element %lld of '%s' is in no rank's file", path, (long long)n,
                               p->name);
        }
    }
    return XP_OK;
}

static xp_status take_ranks(xp_responses *r, const char *stem) {
    char path[XP_PATH];
    for (int rank = 0; rank < RANKS; rank++) {
        snprintf(path, sizeof path, "%s.rank%d.safetensors", stem, rank);
        if (!exists(path))
            return rank == 0 ? XP_FAIL(XP_E_IO, "%s.safetensors: no response, whole or by ranks", stem)
                             : check_covered(r, stem);
        XP_TRY(take_rank(r, path, rank));
    }
    return XP_FAIL(XP_E_FORMAT, "%s: more than %d ranks", stem, RANKS);
}

xp_status xp_responses_open(const char *dir, const char *expected, xp_responses **out) {
    char path[XP_PATH], stem[XP_PATH - 64];
    const char *last = strrchr(expected, '/') ? strrchr(expected, '/') + 1 : expected;
    xp_responses *r = calloc(1, sizeof *r);
    *out = NULL;
    if (!r)
        return XP_FAIL(XP_E_NOMEM, "responses: %zu bytes", sizeof *r);
    int n = snprintf(path, sizeof path, "%s/%s", dir, expected);
    if (n < (int)sizeof stem && !exists(path))
        n = snprintf(path, sizeof path, "%s/%s", dir, last);
    if (n >= (int)sizeof stem) {
        xp_responses_close(r);
        return XP_FAIL(XP_E_ARG, "responses: the path '%.60s...' is longer than %zu characters", dir, sizeof stem - 1);
    }
    xp_status st;
    if (exists(path)) {
        st = take_whole(r, path);
    } else {
        const size_t all = strlen(last), tail = strlen(".safetensors");
        snprintf(stem, sizeof stem, "%s/%.*s", dir, (int)(all > tail ? all - tail : all), last);
        st = take_ranks(r, stem);
    }
    if (st != XP_OK) {
        xp_responses_close(r);
        return st;
    }
    *out = r;
    return XP_OK;
}
