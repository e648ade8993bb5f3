/* Reads one layer's MoE block from a checkpoint.
 *
 * The catalogue is every tensor's name and the file that has it: of one file its own header, of several the index. The
 * names of one layer's block are picked from it (the scope), each part takes the tensors that its row of names asks
 * for, and what nobody took is refused. A matrix is copied tensor by tensor, so a layer is held once, and a file's
 * bytes only as long as their copy takes. It must not branch on a family. */
#include "checkpoint.h"

#include <assert.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"
#include "fill.h"
#include "safetensors.h"

enum { MAX_INDEX = 256 << 20, NAME = 512, SHAPE = 128 };
#define SINGLE "model.safetensors"
#define INDEX SINGLE ".index.json"

typedef struct {
    char *path;
    const char *file; /* as the index has it */
    xp_safetensors *st;
} shard;

typedef struct {
    const char *name;
    int shard;
} listed;

struct xp_checkpoint {
    char *path;  /* of the file or the index */
    json_t *map; /* of the index; NULL: one file */
    shard *shard;
    int shards;
    listed *name;
    int64_t names;
};

/* ---- open ---- */

static char *copy_text(const char *text) {
    char *copy = malloc(strlen(text) + 1);
    if (copy)
        strcpy(copy, text);
    return copy;
}

static xp_status no_memory(const char *path, int64_t n, const char *what) {
    return XP_FAIL(XP_E_NOMEM, "%s: no memory for %" PRId64 " %s", path, n, what);
}

static xp_status open_shard(xp_checkpoint *ck, int i) {
    return ck->shard[i].st ? XP_OK : xp_safetensors_open(ck->shard[i].path, &ck->shard[i].st);
}

static xp_status list_file(xp_checkpoint *ck) {
    ck->shard = calloc(1, sizeof *ck->shard);
    if (!ck->shard || !(ck->shard[0].path = copy_text(ck->path)))
        return no_memory(ck->path, 1, "file");
    ck->shards = 1;
    ck->shard[0].file = ck->shard[0].path;
    XP_TRY(open_shard(ck, 0));
    ck->names = xp_safetensors_count(ck->shard[0].st);
    ck->name = calloc((size_t)ck->names + 1, sizeof *ck->name);
    if (!ck->name)
        return no_memory(ck->path, ck->names, "names");
    for (int64_t i = 0; i < ck->names; i++)
        ck->name[i].name = xp_safetensors_at(ck->shard[0].st, i)->name;
    return XP_OK;
}

static xp_status read_index(xp_checkpoint *ck) {
    char *text = NULL;
    json_error_t e;
    int fd;
    int64_t bytes;
    XP_TRY(xp_file_open(ck->path, &fd, &bytes));
    xp_status st = XP_OK;
    if (bytes > MAX_INDEX)
        st = XP_FAIL(XP_E_FORMAT, "%s: is %" PRId64 " bytes, expected at most %d", ck->path, bytes, MAX_INDEX);
    else if (!(text = malloc((size_t)bytes + 1)))
        st = no_memory(ck->path, bytes, "bytes");
    else
        st = xp_file_read(ck->path, fd, 0, text, (size_t)bytes);
    close(fd);
    json_t *root = st == XP_OK ? json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, &e) : NULL;
    free(text);
    XP_TRY(st);
    if (!root)
        return XP_FAIL(XP_E_FORMAT, "%s:%d:%d: %.100s; expected one JSON object without duplicate keys", ck->path,
                       e.line, e.column, e.text);
    ck->map = json_incref(json_object_get(root, "weight_map"));
    json_decref(root);
    if (!json_is_object(ck->map))
        return XP_FAIL(XP_E_FORMAT, "%s: weight_map is %s, expected an object from tensor names to files", ck->path,
                       ck->map ? "no object" : "missing");
    return XP_OK;
}

/* The number of a file, which is new or one of those that came before. */
static xp_status shard_of(xp_checkpoint *ck, const char *tensor, const json_t *value, int *out) {
    const char *file = json_string_value(value);
    if (!file || !xp_file_plain(file) || strchr(file, '/'))
        return XP_FAIL(XP_E_FORMAT,
                       "%s: weight_map['%.200s'] is %s%.80s%s, expected the name of a file beside the index", ck->path,
                       tensor, file ? "'" : "", file ? file : "no text", file ? "'" : "");
    for (*out = ck->shards - 1; *out >= 0; --*out) {
        if (strcmp(ck->shard[*out].file, file) == 0)
            return XP_OK;
    }
    const char *slash = strrchr(ck->path, '/');
    const int folder = slash ? (int)(slash - ck->path) + 1 : 0;
    const size_t bytes = (size_t)folder + strlen(file) + 1;
    char *path = malloc(bytes);
    shard *more = realloc(ck->shard, (size_t)(ck->shards + 1) * sizeof *more);
    if (more)
        ck->shard = more;
    if (!path || !more) {
        free(path);
        return no_memory(ck->path, ck->shards + 1, "files");
    }
    snprintf(path, bytes, "%.*s%s", folder, ck->path, file);
    ck->shard[ck->shards] = (shard){.path = path, .file = file};
    *out = ck->shards++;
    return XP_OK;
}

static xp_status list_index(xp_checkpoint *ck) {
    const char *key;
    json_t *value;
    XP_TRY(read_index(ck));
    ck->name = calloc(json_object_size(ck->map) + 1, sizeof *ck->name);
    if (!ck->name)
        return no_memory(ck->path, (int64_t)json_object_size(ck->map), "names");
    json_object_foreach(ck->map, key, value) {
        listed *l = &ck->name[ck->names++];
        l->name = key;
        XP_TRY(shard_of(ck, key, value, &l->shard));
    }
    return XP_OK;
}

static int is_regular(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISREG(s.st_mode);
}

/* A folder becomes the one file of the two names that is in it. */
static xp_status resolve(const char *path, char **out) {
    struct stat s;
    const size_t bytes = strlen(path) + sizeof "/" INDEX;
    *out = malloc(bytes);
    if (!*out)
        return no_memory(path, (int64_t)bytes, "bytes");
    strcpy(*out, path);
    if (stat(path, &s) != 0 || !S_ISDIR(s.st_mode))
        return XP_OK;
    snprintf(*out, bytes, "%s/" INDEX, path);
    const int several = is_regular(*out);
    snprintf(*out, bytes, "%s/" SINGLE, path);
    const int single = is_regular(*out);
    if (several && single)
        return XP_FAIL(XP_E_FORMAT, "%s: holds both " SINGLE " and " INDEX "; give the one that is meant", path);
    if (!several && !single)
        return XP_FAIL(XP_E_IO, "%s: holds neither " SINGLE " nor " INDEX, path);
    if (several)
        snprintf(*out, bytes, "%s/" INDEX, path);
    return XP_OK;
}

xp_status xp_checkpoint_open(const char *path, xp_checkpoint **out) {
    xp_checkpoint *ck = calloc(1, sizeof *ck);
    *out = NULL;
    if (!ck)
        return no_memory(path, 1, "checkpoint");
    xp_status st = resolve(path, &ck->path);
    const size_t n = ck->path ? strlen(ck->path) : 0;
    if (st == XP_OK)
        st = n > 5 && strcmp(ck->path + n - 5, ".json") == 0 ? list_index(ck) : list_file(ck);
    if (st != XP_OK) {
        xp_checkpoint_close(ck);
        return st;
    }
    *out = ck;
    return XP_OK;
}

void xp_checkpoint_close(xp_checkpoint *ck) {
    if (!ck)
        return;
    for (int i = 0; i < ck->shards; i++) {
        xp_safetensors_close(ck->shard[i].st);
        free(ck->shard[i].path);
    }
    free(ck->shard);
    free(ck->name);
    json_decref(ck->map);
    free(ck->path);
    free(ck);
}

/* ---- the names of one block ---- */

typedef struct {
    const char *name;
    int shard;
    int used;
} slot;

typedef struct {
    xp_checkpoint *ck;
    const xp_tensor_names *names;
    const xp_model *m;
    int layer;
    char prefix[NAME]; /* of the layer */
    slot *slot;        /* the block's tensors, by name */
    int64_t slots;
} reader;

/* A pattern with its numbers; bytes of it, so that one of a list can be given. */
static void expand(const char *pattern, size_t bytes, int64_t layer, int64_t expert, char *out, size_t room) {
    size_t used = 0;
    out[0] = '\0';
    for (size_t i = 0; i < bytes && used + 1 < room;) {
        if (bytes - i >= 3 && pattern[i] == '{' && pattern[i + 2] == '}') {
            used += (size_t)snprintf(out + used, room - used, "%" PRId64, pattern[i + 1] == 'L' ? layer : expert);
            i += 3;
        } else {
            out[used++] = pattern[i++];
            out[used] = '\0';
        }
    }
    assert(used < room);
}

/* The next of a list with '|' between its words; NULL at the end. */
static const char *next_word(const char **list, size_t *out_bytes) {
    const char *word = *list;
    if (!*word)
        return NULL;
    *out_bytes = strcspn(word, "|");
    *list = word + *out_bytes + (word[*out_bytes] == '|');
    return word;
}

static int in_scope(const reader *r, const char *name) {
    const size_t before = strlen(r->prefix);
    const char *list = r->names->scope;
    size_t bytes;
    if (strncmp(name, r->prefix, before) != 0)
        return 0;
    for (const char *word; (word = next_word(&list, &bytes)) != NULL;) {
        if (strncmp(name + before, word, bytes) == 0)
            return 1;
    }
    return 0;
}

static int64_t count_in_scope(const reader *r) {
    int64_t n = 0;
    for (int64_t i = 0; i < r->ck->names; i++)
        n += in_scope(r, r->ck->name[i].name);
    return n;
}

/* Sets prefix to the one of the family's under which the layer has tensors of the block. */
static xp_status choose_prefix(reader *r) {
    const char *list = r->names->prefix;
    char found[NAME] = "", tried[4 * NAME] = "";
    size_t bytes;
    for (const char *word; (word = next_word(&list, &bytes)) != NULL;) {
        expand(word, bytes, r->layer, 0, r->prefix, sizeof r->prefix);
        const size_t used = strlen(tried);
        snprintf(tried + used, sizeof tried - used, "%s'%s'", used ? " or " : "", r->prefix);
        if (!count_in_scope(r))
            continue;
        if (found[0])
            return XP_FAIL(XP_E_FORMAT,
                           "%s: layer %d has tensors under '%s' and under '%s': they contradict one another",
                           r->ck->path, r->layer, found, r->prefix);
        memcpy(found, r->prefix, sizeof found);
    }
    if (!found[0])
        return XP_FAIL(XP_E_FORMAT,
                       "%s: no tensor of layer %d's MoE block, expected names that begin with %s and then %s (%s)",
                       r->ck->path, r->layer, tried, r->names->scope, r->names->model_type);
    memcpy(r->prefix, found, sizeof found);
    return XP_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const slot *)a)->name, ((const slot *)b)->name);
}

static xp_status open_scope(xp_checkpoint *ck, const xp_tensor_names *names, const xp_model *m, int layer,
                            reader *out) {
    *out = (reader){.ck = ck, .names = names, .m = m, .layer = layer};
    XP_TRY(choose_prefix(out));
    out->slot = calloc((size_t)count_in_scope(out), sizeof *out->slot);
    if (!out->slot)
        return no_memory(ck->path, count_in_scope(out), "names");
    for (int64_t i = 0; i < ck->names; i++) {
        if (in_scope(out, ck->name[i].name))
            out->slot[out->slots++] = (slot){.name = ck->name[i].name, .shard = ck->name[i].shard};
    }
    qsort(out->slot, (size_t)out->slots, sizeof *out->slot, by_name);
    return XP_OK;
}

static slot *find(const reader *r, const char *name) {
    const slot want = {.name = name};
    return bsearch(&want, r->slot, (size_t)r->slots, sizeof want, by_name);
}

static slot *find_pattern(const reader *r, const char *pattern, int64_t expert, char name[NAME]) {
    snprintf(name, NAME, "%s", r->prefix);
    const size_t used = strlen(name);
    expand(pattern, strlen(pattern), r->layer, expert, name + used, NAME - used);
    return find(r, name);
}

/* ---- one tensor ---- */

static void show_shape(int64_t ndim, const int64_t *dim, char *buf, size_t bytes) {
    size_t used = (size_t)snprintf(buf, bytes, "[");
    for (int64_t i = 0; i < ndim && used < bytes; i++)
        used += (size_t)snprintf(buf + used, bytes - used, "%s%" PRId64, i ? "," : "", dim[i]);
    if (used < bytes)
        snprintf(buf + used, bytes - used, "]");
}

/* What a part wants of one tensor: [lead, out, in], without the leading dimension when lead is 0, and without the last
 * one when in is 0. */
typedef struct {
    const char *what;
    int64_t lead, out, in;
    xp_orient orient;
    int either, flat; /* flat: lead and the dimension behind it are one */
} want;

static int shape_of(const want *w, xp_orient orient, int64_t dim[3]) {
    int n = 0;
    if (w->lead)
        dim[n++] = w->lead;
    dim[n++] = orient == XP_EIO && w->in ? w->in : w->out;
    if (w->in)
        dim[n++] = orient == XP_EIO ? w->out : w->in;
    if (w->flat && w->lead) {
        dim[0] *= dim[1];
        dim[1] = dim[2];
        n--;
    }
    return n;
}

static int has_shape(const xp_safetensors_info *t, const want *w, xp_orient orient) {
    int64_t dim[3] = {0};
    const int n = shape_of(w, orient, dim);
    return t->ndim == n && memcmp(t->dim, dim, (size_t)n * sizeof *dim) == 0;
}

static void show_want(const want *w, char *buf, size_t bytes) {
    int64_t dim[3] = {0};
    int n = shape_of(w, w->orient, dim);
    show_shape(n, dim, buf, bytes);
    if (!w->either)
        return;
    n = shape_of(w, XP_EIO, dim);
    const size_t used = strlen(buf);
    snprintf(buf + used, bytes - used, " or ");
    show_shape(n, dim, buf + used + 4, bytes - used - 4);
}

static xp_status missing(const reader *r, const char *name, const want *w) {
    char shape[SHAPE];
    show_want(w, shape, sizeof shape);
    for (int64_t i = 0; i < r->slots; i++) {
        if (strncmp(r->slot[i].name, name, strlen(name)) == 0)
            return XP_FAIL(XP_E_FORMAT, "%s: no tensor '%s' (%s), expected one of shape %s; there is '%.300s'",
                           r->ck->path, name, w->what, shape, r->slot[i].name);
    }
    return XP_FAIL(XP_E_FORMAT, "%s: no tensor '%s' (%s), expected one of shape %s", r->ck->path, name, w->what, shape);
}

static int is_wide(xp_dtype d) {
    return d == XP_F64 || d == XP_F32 || d == XP_BF16 || d == XP_F16;
}

/* Which way round the tensor lies; XP_E_FORMAT when its shape fits neither or, where both occur, fits both. */
static xp_status check_shape(const char *path, const xp_safetensors_info *t, const want *w, xp_orient *out) {
    const int other = w->either && has_shape(t, w, XP_EIO);
    char got[SHAPE], expected[SHAPE];
    *out = other ? XP_EIO : w->orient;
    if (has_shape(t, w, w->orient)) {
        if (other)
            return XP_FAIL(XP_E_FORMAT,
                           "%s: tensor '%s' (%s): %" PRId64 " x %" PRId64
                           " fits [out,in] and [in,out], and files of this family have either",
                           path, t->name, w->what, w->out, w->in);
        *out = w->orient;
        return XP_OK;
    }
    if (other)
        return XP_OK;
    show_shape(t->ndim, t->dim, got, sizeof got);
    show_want(w, expected, sizeof expected);
    return XP_FAIL(XP_E_FORMAT, "%s: tensor '%s' (%s): shape is %s, expected %s", path, t->name, w->what, got,
                   expected);
}

/* The tensor's place in its file, checked but for its dtype. */
static xp_status take(reader *r, slot *s, const want *w, xp_safetensors **out, int64_t *out_at, xp_orient *out_orient) {
    const shard *f = &r->ck->shard[s->shard];
    XP_TRY(open_shard(r->ck, s->shard));
    *out = f->st;
    *out_at = xp_safetensors_find(f->st, s->name);
    if (*out_at < 0)
        return XP_FAIL(XP_E_FORMAT, "%s: says that '%s' is in %s, which does not have it", r->ck->path, s->name,
                       f->file);
    s->used = 1;
    return check_shape(f->path, xp_safetensors_at(f->st, *out_at), w, out_orient);
}

/* One part's dtype is that of its first tensor. */
static xp_status check_dtype(const char *path, const xp_safetensors_info *t, const want *w, const xp_tensor *part) {
    if (!is_wide(t->dtype))
        return XP_FAIL(XP_E_FORMAT,
                       "%s: tensor '%s' (%s): dtype is %s, expected F32, BF16, F16 or F64 (quantised weights are not "
                       "turned back)",
                       path, t->name, w->what, t->spell);
    if (part->data && part->dtype != t->dtype)
        return XP_FAIL(XP_E_FORMAT,
                       "%s: tensor '%s' (%s): dtype is %s, but the tensors before it are %s: they contradict "
                       "one another",
                       path, t->name, w->what, t->spell, xp_dtype_name(part->dtype));
    return XP_OK;
}

static xp_status new_part(const char *path, xp_dtype d, int ndim, const int64_t *dim, xp_tensor *out) {
    const xp_tensor t = xp_tensor_of(NULL, d, ndim, dim);
    int64_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= dim[i];
    void *data = malloc(xp_dtype_bytes(d, n ? n : 1));
    if (!data)
        return no_memory(path, n, "weights");
    *out = t;
    out->data = data;
    return XP_OK;
}

/* ---- parts that are one tensor ---- */

static int64_t rows_of(const xp_model *m) {
    return xp_dialect_rows(&m->dialect, m->E);
}

/* Ids that a choice is made of. */
static int64_t ids_of(const xp_model *m) {
    return rows_of(m) - m->dialect.shared_rows;
}

static xp_status missing_names(const reader *r, const char *what) {
    return XP_FAIL(XP_E_ARG, "%s: the dialect %s has a part '%s', for which the names of %s have no tensor", r->m->name,
                   r->m->dialect.name, what, r->names->model_type);
}

/* Reads the tensor as it is; dim is the part's own shape, of as many elements or the first of them. */
static xp_status read_plain(reader *r, const char *pattern, const want *w, int ndim, const int64_t *dim,
                            xp_tensor *out) {
    char name[NAME];
    xp_safetensors *st;
    int64_t at;
    xp_orient orient;
    void *data;
    if (!pattern)
        return missing_names(r, w->what);
    slot *s = find_pattern(r, pattern, 0, name);
    if (!s)
        return missing(r, name, w);
    XP_TRY(take(r, s, w, &st, &at, &orient));
    const xp_safetensors_info *t = xp_safetensors_at(st, at);
    XP_TRY(check_dtype(r->ck->shard[s->shard].path, t, w, out));
    XP_TRY(xp_safetensors_data(st, at, &data));
    XP_TRY(new_part(r->ck->path, t->dtype, ndim, dim, out));
    memcpy(out->data, data, xp_dtype_bytes(out->dtype, xp_tensor_count(out)));
    xp_safetensors_forget(st, at);
    return XP_OK;
}

/* rows: 0: [n]; else the first of as many. */
static xp_status read_vector(reader *r, const char *pattern, xp_part p, int64_t n, int rows, xp_tensor *out) {
    const want w = {.what = xp_part_name(p), .lead = rows, .out = n};
    return read_plain(r, pattern, &w, 1, &n, out);
}

static xp_status check_table(const reader *r, const char *path, const xp_safetensors_info *t, const void *data) {
    for (int64_t i = 0; i < t->count; i++) {
        const double v = xp_widen(data, t->dtype, i);
        if (!(v >= 0 && v < (double)ids_of(r->m)))
            return XP_FAIL(XP_E_FORMAT,
                           "%s: tensor '%s': token id %" PRId64 ", slot %" PRId64
                           " is expert %.0f, expected 0 to %" PRId64,
                           path, t->name, i / r->m->K, i % r->m->K, v, ids_of(r->m) - 1);
    }
    return XP_OK;
}

/* The file's selection bias has the ids of a choice; shared rows behind them have 0, which nobody reads. */
static xp_status read_select_bias(reader *r, const char *pattern, int as_row, xp_tensor *out) {
    const int64_t ids = ids_of(r->m), rows = rows_of(r->m);
    xp_tensor given = {0};
    XP_TRY(read_vector(r, pattern, XP_PART_SELECT_BIAS, ids, as_row, rows > ids ? &given : out));
    if (rows == ids)
        return XP_OK;
    const size_t bytes = xp_dtype_bytes(given.dtype, ids);
    const xp_status st = new_part(r->ck->path, given.dtype, 1, &rows, out);
    if (st == XP_OK) {
        memcpy(out->data, given.data, bytes);
        memset((char *)out->data + bytes, 0, xp_dtype_bytes(given.dtype, rows) - bytes);
    }
    free(given.data);
    return st;
}

static xp_status read_table(reader *r, xp_tensor *out) {
    const want w = {.what = xp_part_name(XP_PART_TABLE), .out = r->m->vocab, .in = r->m->K};
    const int64_t dim[2] = {r->m->vocab, r->m->K};
    char name[NAME];
    xp_safetensors *st;
    int64_t at;
    xp_orient orient;
    void *data;
    if (!r->names->table)
        return missing_names(r, w.what);
    slot *s = find_pattern(r, r->names->table, 0, name);
    if (!s)
        return missing(r, name, &w);
    XP_TRY(take(r, s, &w, &st, &at, &orient));
    const xp_safetensors_info *t = xp_safetensors_at(st, at);
    const char *path = r->ck->shard[s->shard].path;
    if (t->dtype != XP_I64 && t->dtype != XP_I32)
        return XP_FAIL(XP_E_FORMAT, "%s: tensor '%s' (%s): dtype is %s, expected I64 or I32", path, t->name, w.what,
                       t->spell);
    XP_TRY(xp_safetensors_data(st, at, &data));
    XP_TRY(check_table(r, path, t, data));
    XP_TRY(new_part(r->ck->path, t->dtype, 2, dim, out));
    memcpy(out->data, data, (size_t)(t->end - t->begin));
    xp_safetensors_forget(st, at);
    return XP_OK;
}

/* ---- matrices ---- */

/* A part of several tensors: rows of one or more matrices [out,in] go to rows of the part. */
typedef struct {
    xp_tensor *part; /* [groups, rows, in] or [rows, in] */
    int64_t groups;  /* 0: the part has no leading dimension */
    int64_t rows, in;
} target;

/* Row i of a tensor's own becomes row `first + step * i`; of a tensor with two kinds of rows see the callers. */
typedef struct {
    int64_t first, step;
} placing;

static void copy_row(char *dst, const char *src, int64_t n, int64_t step, size_t size) {
    if (step == 1) {
        memcpy(dst, src, (size_t)n * size);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        memcpy(dst + (size_t)i * size, src + (size_t)(i * step) * size, size);
}

/* Rows [lo, lo + n * by) in steps of by of group g of the tensor, placed in group `to` of the part. */
static void place_rows(const target *d, int64_t to, const char *data, int64_t g, int64_t all, xp_orient orient,
                       int64_t lo, int64_t by, int64_t n, placing at) {
    const size_t size = xp_dtype_bytes(d->part->dtype, 1);
    const int64_t row = orient == XP_EIO ? 1 : d->in, column = orient == XP_EIO ? all : 1;
    char *out = d->part->data;
    for (int64_t i = 0; i < n; i++)
        copy_row(out + (size_t)((to * d->rows + at.first + at.step * i) * d->in) * size,
                 data + (size_t)(g * all * d->in + (lo + by * i) * row) * size, d->in, column, size);
}

/* What a tensor's rows are: all of one kind, or gate's and up's in one of two orders. */
typedef struct {
    int kinds;
    xp_gate_layout order; /* of two kinds in the tensor */
    placing place[2];
} rows_of_tensor;

static void place_tensor(const target *d, int64_t to, const char *data, int64_t g, int64_t all, xp_orient orient,
                         const rows_of_tensor *k) {
    const int64_t n = all / k->kinds;
    for (int i = 0; i < k->kinds; i++) {
        const int in_turn = k->kinds > 1 && k->order == XP_GATE_INTERLEAVED;
        place_rows(d, to, data, g, all, orient, in_turn ? i : i * n, in_turn ? k->kinds : 1, n, k->place[i]);
    }
}

/* Reads one tensor of `lead` groups (0: one, without the dimension) and `all` rows into groups from `to` on. */
static xp_status read_piece(reader *r, slot *s, const want *w, const target *d, int64_t to, const rows_of_tensor *k) {
    xp_safetensors *st;
    int64_t at;
    xp_orient orient;
    void *data;
    XP_TRY(take(r, s, w, &st, &at, &orient));
    const xp_safetensors_info *t = xp_safetensors_at(st, at);
    XP_TRY(check_dtype(r->ck->shard[s->shard].path, t, w, d->part));
    if (!d->part->data) {
        const int64_t dim[3] = {d->groups, d->rows, d->in};
        const int skip = d->groups == 0;
        XP_TRY(new_part(r->ck->path, t->dtype, (w->in ? 3 : 2) - skip, dim + skip, d->part));
    }
    XP_TRY(xp_safetensors_data(st, at, &data));
    for (int64_t g = 0; g < (w->lead ? w->lead : 1); g++)
        place_tensor(d, to + g, data, g, w->out, orient, k);
    xp_safetensors_forget(st, at);
    return XP_OK;
}

/* Every tensor of a pattern: one, or one an expert. */
static xp_status read_pattern(reader *r, const char *pattern, const want *whole, const target *d,
                              const rows_of_tensor *k) {
    const int each = strstr(pattern, "{E}") != NULL;
    want w = *whole;
    w.lead = each ? 0 : d->groups;
    for (int64_t e = 0; e < (each ? d->groups : 1); e++) {
        char name[NAME];
        slot *s = find_pattern(r, pattern, e, name);
        if (!s)
            return missing(r, name, &w);
        XP_TRY(read_piece(r, s, &w, d, e, k));
    }
    return XP_OK;
}

/* Where the dialect wants gate's rows and up's, of n each. */
static void place_gate(const xp_dialect *d, int64_t n, placing out[2]) {
    const int in_turn = d->gate_layout == XP_GATE_INTERLEAVED;
    out[0] = (placing){0, in_turn ? 2 : 1};
    out[1] = in_turn ? (placing){1, 2} : (placing){n, 1};
}

/* The first matrix: width rows of gate and of up. in 0: its bias. */
static xp_status read_up(reader *r, const xp_matrix_names *n, const char *fused, xp_part p, int64_t groups,
                         int64_t width, int64_t in, xp_tensor *out) {
    const xp_dialect *d = &r->m->dialect;
    const int maps = d->gated ? 2 : 1;
    const target to = {.part = out, .groups = groups, .rows = maps * width, .in = in ? in : 1};
    want w = {
        .what = xp_part_name(p), .out = width, .in = in, .orient = n->orient, .either = n->either, .flat = n->flat};
    rows_of_tensor k = {.kinds = 1, .order = n->rows};
    place_gate(d, width, k.place);
    if (!d->gated) {
        k.place[0] = (placing){0, 1};
        return read_pattern(r, fused, &w, &to, &k);
    }
    if (!n->gate) {
        k.kinds = 2;
        w.out = 2 * width;
        return read_pattern(r, fused, &w, &to, &k);
    }
    const rows_of_tensor up = {.kinds = 1, .place = {k.place[1]}};
    XP_TRY(read_pattern(r, n->gate, &w, &to, &k));
    return read_pattern(r, fused, &w, &to, &up);
}

static xp_status read_down(reader *r, const xp_matrix_names *n, const char *name, xp_part p, int64_t groups,
                           int64_t rows, int64_t in, xp_tensor *out) {
    const target to = {.part = out, .groups = groups, .rows = rows, .in = in ? in : 1};
    const want w = {.what = xp_part_name(p),
                    .out = rows,
                    .in = in,
                    .orient = n->flat ? XP_EIO : n->orient,
                    .either = n->either,
                    .flat = n->flat};
    const rows_of_tensor k = {.kinds = 1, .place = {{0, 1}}};
    return read_pattern(r, name, &w, &to, &k);
}

/* The first layout of which a tensor of the first matrix is there; the first of all when there is none. */
static const xp_matrix_names *choose_layout(const reader *r) {
    char name[NAME];
    for (int i = 0; i < XP_LAYOUTS && r->names->expert[i].up; i++) {
        const xp_matrix_names *n = &r->names->expert[i];
        if (find_pattern(r, n->up, 0, name) || (n->gate && find_pattern(r, n->gate, 0, name)))
            return n;
    }
    return &r->names->expert[0];
}

static xp_status read_latent(reader *r, xp_tensor *part) {
    const int64_t D = r->m->latent, H = r->m->H, down[2] = {D, H}, up[2] = {H, D};
    const want w = {.what = xp_part_name(XP_PART_LATENT_DOWN), .out = D, .in = H};
    const want v = {.what = xp_part_name(XP_PART_LATENT_UP), .out = H, .in = D};
    XP_TRY(read_plain(r, r->names->latent_down, &w, 2, down, &part[XP_PART_LATENT_DOWN]));
    return read_plain(r, r->names->latent_up, &v, 2, up, &part[XP_PART_LATENT_UP]);
}

/* A norm that is stored less 1 becomes f32, where 1 + w rounds to what the class's own sum does in any narrower type.
 */
static xp_status center(const reader *r, xp_tensor *part) {
    xp_tensor whole;
    XP_TRY(new_part(r->ck->path, part->dtype == XP_F64 ? XP_F64 : XP_F32, 1, part->dim, &whole));
    for (int64_t i = 0; i < part->dim[0]; i++)
        xp_fill_store(&whole, i, 1.0 + xp_widen(part->data, part->dtype, i));
    free(part->data);
    *part = whole;
    return XP_OK;
}

static xp_status read_around(reader *r, xp_tensor *part) {
    const xp_model *m = r->m;
    const xp_tensor_names *n = r->names;
    const struct {
        unsigned what;
        const char *name;
        xp_part part;
        int64_t width;
    } row[] = {{XP_LATENT_NORM, n->latent_norm, XP_PART_LATENT_NORM, m->latent},
               {XP_EXPERT_NORM, n->expert_norm, XP_PART_EXPERT_NORM, xp_model_expert_width(m)},
               {XP_OUT_BIAS, n->out_bias, XP_PART_OUT_BIAS, m->H},
               {XP_BLOCK_NORM, n->block_norm, XP_PART_BLOCK_NORM, m->H},
               {XP_ROUTED_NORM, n->routed_norm, XP_PART_ROUTED_NORM, m->H},
               {XP_SHARED_NORM, n->shared_norm, XP_PART_SHARED_NORM, m->H},
               {XP_SHARED_IN_NORM, n->shared_in_norm, XP_PART_SHARED_IN_NORM, m->H}};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        if (!(m->around & row[i].what))
            continue;
        XP_TRY(read_vector(r, row[i].name, row[i].part, row[i].width, 0, &part[row[i].part]));
        if (n->centered && row[i].what != XP_OUT_BIAS)
            XP_TRY(center(r, &part[row[i].part]));
    }
    return XP_OK;
}

static xp_status read_experts(reader *r, xp_tensor *part) {
    const xp_matrix_names *n = choose_layout(r);
    const xp_model *m = r->m;
    const int64_t D = xp_model_expert_width(m);
    XP_TRY(read_up(r, n, n->up, XP_PART_UP, m->E, m->F, D, &part[XP_PART_UP]));
    XP_TRY(read_down(r, n, n->down, XP_PART_DOWN, m->E, D, m->F, &part[XP_PART_DOWN]));
    if (!m->dialect.expert_bias)
        return XP_OK;
    if (!n->up_bias || !n->down_bias)
        return missing_names(r, xp_part_name(XP_PART_UP_BIAS));
    XP_TRY(read_up(r, n, n->up_bias, XP_PART_UP_BIAS, m->E, m->F, 0, &part[XP_PART_UP_BIAS]));
    return read_down(r, n, n->down_bias, XP_PART_DOWN_BIAS, m->E, D, 0, &part[XP_PART_DOWN_BIAS]);
}

/* Rows [lo, lo + n) of expert g go to row `to` of a part whose rows are `in` long. */
static void join_rows(const xp_tensor *from, int64_t g, int64_t lo, int64_t n, int64_t to, const xp_tensor *part) {
    const int64_t in = from->dim[2];
    memcpy((char *)part->data + xp_dtype_bytes(part->dtype, to * in),
           (const char *)from->data + xp_dtype_bytes(from->dtype, (g * from->dim[1] + lo) * in),
           xp_dtype_bytes(part->dtype, n * in));
}

/* Columns of an expert's second matrix [H,width], beside those of the others. */
static void join_columns(const xp_tensor *from, int64_t g, const xp_tensor *part) {
    const int64_t rows = from->dim[1], width = from->dim[2];
    for (int64_t i = 0; i < rows; i++)
        memcpy((char *)part->data + xp_dtype_bytes(part->dtype, i * part->dim[1] + g * width),
               (const char *)from->data + xp_dtype_bytes(from->dtype, (g * rows + i) * width),
               xp_dtype_bytes(part->dtype, width));
}

/* Experts that the router weighs, of equal widths: one matrix of all, the gates' rows before the others. */
static xp_status read_weighed(reader *r, const xp_matrix_names *n, xp_tensor *part) {
    const xp_model *m = r->m;
    const int64_t all = m->dialect.shared_rows, width = m->S / all, maps = m->dialect.gated ? 2 : 1;
    const int64_t up_dim[2] = {maps * m->S, m->H}, down_dim[2] = {m->H, m->S};
    const int apart = maps == 2 && m->dialect.gate_layout == XP_GATE_CONCAT;
    xp_tensor up = {0}, down = {0};
    xp_status st = XP_OK;
    XP_GOTO(out, read_up(r, n, n->up, XP_PART_SHARED_UP, all, width, m->H, &up));
    XP_GOTO(out, read_down(r, n, n->down, XP_PART_SHARED_DOWN, all, m->H, width, &down));
    XP_GOTO(out, new_part(r->ck->path, up.dtype, 2, up_dim, &part[XP_PART_SHARED_UP]));
    XP_GOTO(out, new_part(r->ck->path, down.dtype, 2, down_dim, &part[XP_PART_SHARED_DOWN]));
    for (int64_t g = 0; g < all; g++) {
        for (int64_t i = 0; i < maps && apart; i++)
            join_rows(&up, g, i * width, width, i * m->S + g * width, &part[XP_PART_SHARED_UP]);
        if (!apart)
            join_rows(&up, g, 0, maps * width, g * maps * width, &part[XP_PART_SHARED_UP]);
        join_columns(&down, g, &part[XP_PART_SHARED_DOWN]);
    }
out:
    free(up.data);
    free(down.data);
    return st;
}

static xp_status read_shared(reader *r, xp_tensor *part) {
    const xp_matrix_names *n = &r->names->shared;
    const xp_model *m = r->m;
    if (!n->up)
        return missing_names(r, xp_part_name(XP_PART_SHARED_UP));
    if (m->dialect.shared_rows > 0)
        return read_weighed(r, n, part);
    XP_TRY(read_up(r, n, n->up, XP_PART_SHARED_UP, 0, m->S, m->H, &part[XP_PART_SHARED_UP]));
    XP_TRY(read_down(r, n, n->down, XP_PART_SHARED_DOWN, 0, m->H, m->S, &part[XP_PART_SHARED_DOWN]));
    if (!m->dialect.shared_gate)
        return XP_OK;
    const want w = {.what = xp_part_name(XP_PART_SHARED_GATE), .out = 1, .in = m->H};
    const int64_t dim[2] = {1, m->H};
    return read_plain(r, r->names->shared_gate, &w, 2, dim, &part[XP_PART_SHARED_GATE]);
}

/* What the router's matrix multiplies has so many columns. */
static int64_t router_columns(const xp_model *m) {
    return m->router_width ? m->router_width : m->H;
}

/* Rows of part n of the router's MLP or norm, and columns, 0: a vector. No rows: the layer has no such part. A layer
 * behind the first one has factors of a state, whether or not this run has a block before it. */
static void router_mlp_size(const xp_model *m, int layer, int n, int64_t *out_rows, int64_t *out_columns) {
    const xp_part p = XP_PART_ROUTER_DOWN + (xp_part)n;
    const int norm = p == XP_PART_ROUTER_NORM && m->dialect.router_in == XP_ROUTER_RMSNORM_SCALED;
    *out_rows = norm ? m->H : p == XP_PART_ROUTER_STATE && layer == 0 ? 0 : m->router_width;
    *out_columns = p == XP_PART_ROUTER_DOWN                             ? m->H
                   : p == XP_PART_ROUTER_FC1 || p == XP_PART_ROUTER_FC2 ? m->router_width
                                                                        : 0;
}

static xp_status read_router_mlp(reader *r, xp_tensor *part) {
    for (int n = 0; n < XP_ROUTER_MLP_NAMES; n++) {
        const xp_part p = XP_PART_ROUTER_DOWN + (xp_part)n;
        int64_t dim[2];
        router_mlp_size(r->m, r->layer, n, &dim[0], &dim[1]);
        const want w = {.what = xp_part_name(p), .out = dim[0], .in = dim[1]};
        if (dim[0] > 0)
            XP_TRY(read_plain(r, r->names->router_mlp[n], &w, dim[1] ? 2 : 1, dim, &part[p]));
    }
    return XP_OK;
}

static xp_status read_router(reader *r, xp_tensor *part) {
    const int64_t Z = rows_of(r->m), columns = router_columns(r->m), dim[2] = {Z, columns};
    const want w = {.what = xp_part_name(XP_PART_ROUTER), .out = Z, .in = columns};
    const xp_dialect *d = xp_model_dialect(r->m, r->layer);
    const xp_tensor_names *n = r->names;
    if (n->router_orient == XP_EOI)
        XP_TRY(read_plain(r, n->router, &w, 2, dim, &part[XP_PART_ROUTER]));
    else
        XP_TRY(read_down(r, &(xp_matrix_names){.orient = n->router_orient}, n->router, XP_PART_ROUTER, 0, Z, r->m->H,
                         &part[XP_PART_ROUTER]));
    XP_TRY(read_router_mlp(r, part));
    if (d->router_bias)
        XP_TRY(read_vector(r, n->router_bias, XP_PART_ROUTER_BIAS, Z, 0, &part[XP_PART_ROUTER_BIAS]));
    if (d->select_bias)
        XP_TRY(read_select_bias(r, n->select_bias, n->select_row, &part[XP_PART_SELECT_BIAS]));
    if (d->expert_scale)
        XP_TRY(read_vector(r, n->expert_scale, XP_PART_EXPERT_SCALE, xp_dialect_factors(d, r->m->E), 0,
                           &part[XP_PART_EXPERT_SCALE]));
    return d->select_on == XP_ON_TOKEN_TABLE ? read_table(r, &part[XP_PART_TABLE]) : XP_OK;
}

/* ---- what is left over ---- */

/* Of experts without weights that anything reads, or of a second set, which has as many as the first. */
static void skip_unread(reader *r) {
    const int64_t end = r->m->dialect.null_experts ? rows_of(r->m) : 2 * r->m->E;
    for (const char *p = r->names->unread; p && *p; p += strspn(p, "|")) {
        char pattern[NAME], name[NAME];
        const size_t n = strcspn(p, "|");
        snprintf(pattern, sizeof pattern, "%.*s", (int)n, p);
        const int each = strstr(pattern, "{E}") != NULL;
        for (int64_t e = each ? r->m->E : end - 1; e < end; e++) {
            slot *s = find_pattern(r, pattern, e, name);
            if (s)
                s->used = 1;
        }
        p += n;
    }
}

static xp_status check_unused(const reader *r) {
    const slot *first = NULL;
    int64_t more = 0;
    for (int64_t i = 0; i < r->slots; i++) {
        if (r->slot[i].used)
            continue;
        more += first != NULL;
        first = first ? first : &r->slot[i];
    }
    if (!first)
        return XP_OK;
    char others[64] = "";
    if (more)
        snprintf(others, sizeof others, " and %" PRId64 " more", more);
    return XP_FAIL(XP_E_FORMAT,
                   "%s: tensor '%.300s'%s: nothing of %s (%s, E %" PRId64 ", dialect %s) asks for it; a tensor that is "
                   "not used would be a block that is not the model's",
                   r->ck->path, first->name, others, r->m->name, r->names->model_type, r->m->E,
                   xp_model_dialect(r->m, r->layer)->name);
}

/* A file may not have a tensor of the block that the index does not place there. */
static xp_status check_index(const reader *r) {
    for (int f = 0; r->ck->map && f < r->ck->shards; f++) {
        const xp_safetensors *st = r->ck->shard[f].st;
        for (int64_t i = 0; st && i < xp_safetensors_count(st); i++) {
            const char *name = xp_safetensors_at(st, i)->name;
            const slot *s = in_scope(r, name) ? find(r, name) : NULL;
            if (in_scope(r, name) && (!s || s->shard != f))
                return XP_FAIL(XP_E_FORMAT, "%s: has '%.300s', which the index %s%s", r->ck->shard[f].path, name,
                               s ? "places in " : "does not list", s ? r->ck->shard[s->shard].file : "");
        }
    }
    return XP_OK;
}

/* ---- one block ---- */

static xp_status check_model(const xp_model *m, int layer) {
    if (!xp_model_is_moe(m, layer))
        return XP_FAIL(XP_E_ARG, "layer: %d, expected a MoE block of %s (%d layers)", layer, m->name, m->layers);
    if (m->shrink != 1)
        return XP_FAIL(XP_E_ARG, "shrink: %d, expected 1: weights of a file have the published widths", m->shrink);
    return XP_OK;
}

static xp_status names_for(const xp_model *m, const xp_tensor_names **out) {
    *out = xp_tensor_names_find(m->model_type);
    if (*out)
        return XP_OK;
    return XP_FAIL(XP_E_ARG, "%s: no names of tensors are known for model_type '%s'", m->name, m->model_type);
}

static xp_status read_block(reader *r, xp_layer_weights *out) {
    XP_TRY(read_router(r, out->part));
    if (r->m->latent)
        XP_TRY(read_latent(r, out->part));
    XP_TRY(read_around(r, out->part));
    XP_TRY(read_experts(r, out->part));
    if (r->m->S > 0)
        XP_TRY(read_shared(r, out->part));
    skip_unread(r);
    XP_TRY(check_unused(r));
    return check_index(r);
}

xp_status xp_checkpoint_read_as(xp_checkpoint *ck, const xp_tensor_names *names, const xp_model *m, int layer,
                                xp_layer_weights *out) {
    reader r;
    memset(out, 0, sizeof *out);
    out->layer = layer;
    XP_TRY(check_model(m, layer));
    xp_status st = open_scope(ck, names, m, layer, &r);
    if (st == XP_OK)
        st = read_block(&r, out);
    free(r.slot);
    if (st != XP_OK)
        xp_layer_weights_close(out);
    return st;
}

xp_status xp_checkpoint_read(xp_checkpoint *ck, const xp_model *m, int layer, xp_layer_weights *out) {
    const xp_tensor_names *names;
    memset(out, 0, sizeof *out);
    XP_TRY(names_for(m, &names));
    return xp_checkpoint_read_as(ck, names, m, layer, out);
}

void xp_layer_weights_close(xp_layer_weights *w) {
    for (int i = 0; i < XP_NPART; i++)
        free(w->part[i].data);
    memset(w, 0, sizeof *w);
}

xp_status xp_checkpoint_dialect(xp_checkpoint *ck, const xp_model *m, int layer, xp_dialect *io) {
    const xp_tensor_names *names;
    char name[NAME];
    reader r;
    XP_TRY(names_for(m, &names));
    if (!names->table)
        return XP_OK;
    const xp_status st = open_scope(ck, names, m, layer, &r);
    if (st == XP_OK && find_pattern(&r, names->table, 0, name)) {
        io->select_on = XP_ON_TOKEN_TABLE;
        io->select_bias = 0;
    }
    free(r.slot);
    return st;
}

void xp_layer_weights_copy(const xp_layer_weights *w, xp_part p, int64_t g0, int64_t r0, const xp_tensor *t) {
    const xp_tensor *part = &w->part[p];
    const int64_t n = t->dim[2], rows = t->dim[1];
    const int64_t all = xp_tensor_count(part);
    const int experts = p == XP_PART_UP || p == XP_PART_DOWN || p == XP_PART_UP_BIAS || p == XP_PART_DOWN_BIAS;
    const int64_t each = experts ? all / part->dim[0] : all;
    for (int64_t g = 0; g < t->dim[0]; g++) {
        const int64_t from = (g0 + g) * each + r0 * n;
        assert(r0 + rows <= each / n && from + rows * n <= all);
        for (int64_t i = 0; i < rows * n; i++) {
            const double v = xp_widen(part->data, part->dtype, from + i);
            const int64_t to = g * rows * n + i;
            if (t->dtype == XP_I32)
                ((int32_t *)t->data)[to] = (int32_t)v; /* an expert's number */
            else
                xp_fill_store(t, to, v);
        }
    }
}

/* ---- several blocks ---- */

xp_status xp_weights_load(xp_checkpoint *ck, const xp_model *m, xp_weights *out) {
    xp_status st = XP_OK;
    memset(out, 0, sizeof *out);
    for (int i = 0; i < m->layers && st == XP_OK; i++) {
        if (!m->moe[i])
            continue;
        out->layer[i] = calloc(1, sizeof *out->layer[i]);
        st = out->layer[i] ? xp_checkpoint_read(ck, m, i, out->layer[i]) : no_memory(ck->path, 1, "block");
    }
    if (st != XP_OK)
        xp_weights_close(out);
    return st;
}

void xp_weights_close(xp_weights *w) {
    for (int i = 0; i < XP_MAX_LAYERS; i++) {
        if (w->layer[i])
            xp_layer_weights_close(w->layer[i]);
        free(w->layer[i]);
        w->layer[i] = NULL;
    }
}

const char *xp_part_name(xp_part p) {
    static const char *const name[XP_NPART] = {
        [XP_PART_ROUTER] = "router",
        [XP_PART_ROUTER_BIAS] = "router bias",
        [XP_PART_ROUTER_DOWN] = "map into the router's width",
        [XP_PART_ROUTER_DOWN_BIAS] = "bias of the map into the router's width",
        [XP_PART_ROUTER_STATE] = "factors of the router's state",
        [XP_PART_ROUTER_NORM] = "norm of the router's rows",
        [XP_PART_ROUTER_FC1] = "router's first map",
        [XP_PART_ROUTER_FC1_BIAS] = "bias of the router's first map",
        [XP_PART_ROUTER_FC2] = "router's second map",
        [XP_PART_ROUTER_FC2_BIAS] = "bias of the router's second map",
        [XP_PART_SELECT_BIAS] = "selection bias",
        [XP_PART_TABLE] = "table from token id to experts",
        [XP_PART_EXPERT_SCALE] = "factor of an expert's weight",
        [XP_PART_LATENT_DOWN] = "map into the experts' width",
        [XP_PART_LATENT_UP] = "map back from the experts' width",
        [XP_PART_LATENT_NORM] = "norm of the experts' input",
        [XP_PART_EXPERT_NORM] = "norm of the experts' output",
        [XP_PART_OUT_BIAS] = "bias of the block's output",
        [XP_PART_BLOCK_NORM] = "norm of the block's output",
        [XP_PART_ROUTED_NORM] = "norm of the experts' sum",
        [XP_PART_SHARED_NORM] = "norm of the shared expert's output",
        [XP_PART_SHARED_IN_NORM] = "norm of the shared expert's input",
        [XP_PART_UP] = "experts' first matrix",
        [XP_PART_UP_BIAS] = "experts' first bias",
        [XP_PART_DOWN] = "experts' second matrix",
        [XP_PART_DOWN_BIAS] = "experts' second bias",
        [XP_PART_SHARED_UP] = "shared expert's first matrix",
        [XP_PART_SHARED_DOWN] = "shared expert's second matrix",
        [XP_PART_SHARED_GATE] = "shared expert's gate",
    };
    return name[p];
}

/* ---- what a block must have ---- */

typedef struct {
    const xp_tensor_names *names;
    const xp_model *m;
    int layer;
    xp_expected_fn fn;
    void *arg;
} telling;

/* One name, with {E} left in it. */
static void tell(const telling *t, const char *pattern, xp_part p, int64_t lead, int64_t out, int64_t in,
                 const xp_matrix_names *n) {
    char name[NAME], shape[SHAPE];
    const char *prefix = t->names->prefix;
    want w = {.out = out, .in = in, .lead = lead};
    if (n) {
        w.orient = n->flat && pattern == n->down ? XP_EIO : n->orient;
        w.either = n->either;
        w.flat = n->flat;
    }
    if (!pattern)
        return;
    if (strstr(pattern, "{E}"))
        w.lead = 0;
    expand(prefix, strcspn(prefix, "|"), t->layer, 0, name, sizeof name);
    const size_t used = strlen(name);
    snprintf(name + used, sizeof name - used, "%s", pattern);
    show_want(&w, shape, sizeof shape);
    t->fn(name, shape, xp_part_name(p), t->arg);
}

static void tell_mlp(const telling *t, const xp_matrix_names *n, xp_part up, xp_part down, int64_t groups,
                     int64_t width) {
    const int64_t H = up == XP_PART_UP ? xp_model_expert_width(t->m) : t->m->H,
                  fused = t->m->dialect.gated && !n->gate ? 2 * width : width;
    if (t->m->dialect.gated)
        tell(t, n->gate, up, groups, width, H, n);
    tell(t, n->up, up, groups, fused, H, n);
    tell(t, n->down, down, groups, H, width, n);
}

xp_status xp_checkpoint_expect(const xp_model *m, int layer, xp_expected_fn fn, void *arg) {
    telling t = {.m = m, .layer = layer, .fn = fn, .arg = arg};
    const xp_dialect *d = xp_model_dialect(m, layer);
    const int64_t Z = rows_of(m);
    XP_TRY(names_for(m, &t.names));
    const xp_tensor_names *n = t.names;
    tell(&t, n->router, XP_PART_ROUTER, 0, Z, router_columns(m), &(xp_matrix_names){.orient = n->router_orient});
    for (int i = 0; i < XP_ROUTER_MLP_NAMES; i++) {
        int64_t rows, columns;
        router_mlp_size(m, layer, i, &rows, &columns);
        if (rows > 0)
            tell(&t, n->router_mlp[i], XP_PART_ROUTER_DOWN + (xp_part)i, 0, rows, columns, NULL);
    }
    if (d->router_bias)
        tell(&t, n->router_bias, XP_PART_ROUTER_BIAS, 0, Z, 0, NULL);
    if (d->select_bias)
        tell(&t, n->select_bias, XP_PART_SELECT_BIAS, n->select_row, ids_of(m), 0, NULL);
    if (d->select_on == XP_ON_TOKEN_TABLE)
        tell(&t, n->table, XP_PART_TABLE, 0, m->vocab, m->K, NULL);
    if (d->expert_scale)
        tell(&t, n->expert_scale, XP_PART_EXPERT_SCALE, 0, xp_dialect_factors(d, m->E), 0, NULL);
    if (m->latent) {
        tell(&t, n->latent_down, XP_PART_LATENT_DOWN, 0, m->latent, m->H, NULL);
        tell(&t, n->latent_up, XP_PART_LATENT_UP, 0, m->H, m->latent, NULL);
    }
    if (m->around & XP_LATENT_NORM)
        tell(&t, n->latent_norm, XP_PART_LATENT_NORM, 0, m->latent, 0, NULL);
    if (m->around & XP_EXPERT_NORM)
        tell(&t, n->expert_norm, XP_PART_EXPERT_NORM, 0, xp_model_expert_width(m), 0, NULL);
    if (m->around & XP_OUT_BIAS)
        tell(&t, n->out_bias, XP_PART_OUT_BIAS, 0, m->H, 0, NULL);
    if (m->around & XP_BLOCK_NORM)
        tell(&t, n->block_norm, XP_PART_BLOCK_NORM, 0, m->H, 0, NULL);
    if (m->around & XP_ROUTED_NORM)
        tell(&t, n->routed_norm, XP_PART_ROUTED_NORM, 0, m->H, 0, NULL);
    if (m->around & XP_SHARED_NORM)
        tell(&t, n->shared_norm, XP_PART_SHARED_NORM, 0, m->H, 0, NULL);
    if (m->around & XP_SHARED_IN_NORM)
        tell(&t, n->shared_in_norm, XP_PART_SHARED_IN_NORM, 0, m->H, 0, NULL);
    tell_mlp(&t, &n->expert[0], XP_PART_UP, XP_PART_DOWN, m->E, m->F);
    if (d->expert_bias) {
        tell(&t, n->expert[0].up_bias, XP_PART_UP_BIAS, m->E, d->gated ? 2 * m->F : m->F, 0, NULL);
        tell(&t, n->expert[0].down_bias, XP_PART_DOWN_BIAS, m->E, xp_model_expert_width(m), 0, NULL);
    }
    if (m->S == 0)
        return XP_OK;
    const int64_t weighed = d->shared_rows;
    tell_mlp(&t, &n->shared, XP_PART_SHARED_UP, XP_PART_SHARED_DOWN, weighed, weighed ? m->S / weighed : m->S);
    if (d->shared_gate)
        tell(&t, n->shared_gate, XP_PART_SHARED_GATE, 0, 1, m->H, NULL);
    return XP_OK;
}
