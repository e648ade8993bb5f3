/* Meshes as text: parser, printer, coordinates, and the dispatch to the kind that runs them.
 *
 * A wrong mesh must be refused before any work, with the key, the value and what was expected: a silently corrected
 * layout would measure and judge something that nobody asked for. This file must not know how ranks exchange bytes. */
#include "mesh.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mesh_sim.h"

/* Deadlocks are found at once; this is for a rank that computes and never comes, so it must outlast a slow machine. */
static const double default_timeout_s = 300.0;

const xp_mesh_kind xp_mesh_kinds[] = {
    {"sim", "ranks are threads of this process, 1 to 64, deterministic", XP_MESH_MAX_RANKS, NULL, xp_sim_run},
    {"mpi", "ranks are MPI processes", XP_MESH_MAX_WORLD, "this build has no MPI mesh module", NULL},
    {"tcp", "ranks are processes joined by sockets", XP_MESH_MAX_WORLD, "this build has no TCP mesh module", NULL},
    {"nccl", "one GPU a rank, NCCL", XP_MESH_MAX_WORLD, "this build has no NCCL mesh module", NULL},
    {"cuda", "virtual ranks on one GPU", XP_MESH_MAX_RANKS, "this build has no CUDA mesh module", NULL},
    {NULL, NULL, 0, NULL, NULL},
};

typedef enum { KEY_DP, KEY_FSDP, KEY_EP, KEY_EP_FSDP, KEY_JITTER, KEY_TIMEOUT, KEYS } key;
static const char *const key_name[KEYS] = {"dp", "fsdp", "ep", "ep_fsdp", "jitter", "timeout"};
static const char *const all_keys = "dp, fsdp, ep, ep_fsdp, jitter, timeout";

/* What the text gave, before defaults. */
typedef struct {
    int given[KEYS];
    int size[KEY_EP_FSDP + 1];
    uint64_t jitter;
    double timeout_s;
} fields;

/* ---- names ---- */

static int min3(int a, int b, int c) {
    const int m = a < b ? a : b;
    return m < c ? m : c;
}

/* Edits (insert, delete, replace) between two short words; a long word is far from everything. */
static int edits(const char *a, size_t na, const char *b) {
    enum { LONGEST = 31 };
    int row[LONGEST + 1];
    const size_t nb = strlen(b);
    if (na > LONGEST || nb > LONGEST)
        return LONGEST;
    for (size_t j = 0; j <= nb; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            const int up = row[j];
            row[j] = min3(up + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = up;
        }
    }
    return row[nb];
}

/* The name nearest to a word when it is near enough to be a slip of the hand, else NULL. */
static const char *nearest(const char *word, size_t n, const char *const *name, int names) {
    const char *best = NULL;
    int fewest = 3;
    for (int i = 0; i < names; i++) {
        const int d = edits(word, n, name[i]);
        if (d < fewest && (size_t)d < n) {
            fewest = d;
            best = name[i];
        }
    }
    return best;
}

static const xp_mesh_kind *kind_find(const char *word, size_t n) {
    for (const xp_mesh_kind *k = xp_mesh_kinds; k->name; k++) {
        if (strlen(k->name) == n && memcmp(k->name, word, n) == 0)
            return k;
    }
    return NULL;
}

static xp_status kind_unknown(const char *word, size_t n) {
    enum { KINDS = sizeof xp_mesh_kinds / sizeof *xp_mesh_kinds - 1 };
    const char *name[KINDS];
    char known[XP_MESH_TEXT] = "";
    size_t at = 0;
    for (size_t i = 0; i < KINDS; i++) {
        name[i] = xp_mesh_kinds[i].name;
        at += (size_t)snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", name[i]);
    }
    const char *near = nearest(word, n, name, KINDS);
    return XP_FAIL(XP_E_ARG, "mesh kind: no mesh is called '%.*s'%s%s%s (known: %s)", (int)(n < 40 ? n : 40), word,
                   near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "", known);
}

/* The key of that name, or -1. */
static int key_find(const char *word, size_t n) {
    for (int k = 0; k < KEYS; k++) {
        if (strlen(key_name[k]) == n && memcmp(key_name[k], word, n) == 0)
            return k;
    }
    return -1;
}

static xp_status key_unknown(const char *word, size_t n) {
    const char *near = nearest(word, n, key_name, KEYS);
    return XP_FAIL(XP_E_ARG, "mesh: unknown key '%.*s'%s%s%s (keys: %s)", (int)(n < 40 ? n : 40), word,
                   near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "", all_keys);
}

/* ---- values ---- */

static int all_digits(const char *v, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (v[i] < '0' || v[i] > '9')
            return 0;
    }
    return n > 0;
}

/* Decimal digits only, so no sign, no blank, no hexadecimal. 0 when the value is past 2^64 - 1. */
static int digits_u64(const char *v, size_t n, uint64_t *out) {
    uint64_t x = 0;
    for (size_t i = 0; i < n; i++) {
        const uint64_t d = (uint64_t)(v[i] - '0');
        if (x > (UINT64_MAX - d) / 10)
            return 0;
        x = x * 10 + d;
    }
    *out = x;
    return 1;
}

static xp_status value_bad(key k, const char *v, size_t n, const char *expected) {
    return XP_FAIL(XP_E_ARG, "mesh key %s: '%.*s' is not %s", key_name[k], (int)(n < 60 ? n : 60), v, expected);
}

static xp_status parse_size(key k, const char *v, size_t n, int *out) {
    static const char *const expected = "a whole number from 1 to 65536";
    uint64_t x;
    if (!all_digits(v, n) || !digits_u64(v, n, &x) || x < 1 || x > XP_MESH_MAX_WORLD)
        return value_bad(k, v, n, expected);
    *out = (int)x;
    return XP_OK;
}

static xp_status parse_jitter(const char *v, size_t n, uint64_t *out) {
    if (!all_digits(v, n) || !digits_u64(v, n, out))
        return value_bad(KEY_JITTER, v, n, "a seed from 0 to 18446744073709551615");
    return XP_OK;
}

static xp_status parse_timeout(const char *v, size_t n, double *out) {
    static const char *const expected = "a number of seconds from 0.001 to 86400";
    char text[64];
    size_t point = 0;
    while (point < n && v[point] != '.')
        point++;
    const int whole_ok = all_digits(v, point);
    const int rest_ok = point == n || all_digits(v + point + 1, n - point - 1);
    if (!whole_ok || !rest_ok || n >= sizeof text)
        return value_bad(KEY_TIMEOUT, v, n, expected);
    memcpy(text, v, n);
    text[n] = '\0';
    *out = strtod(text, NULL);
    if (!(*out >= 0.001 && *out <= 86400.0))
        return value_bad(KEY_TIMEOUT, v, n, expected);
    return XP_OK;
}

/* One "key=value". */
static xp_status parse_item(const char *item, size_t n, fields *f) {
    const char *eq = memchr(item, '=', n);
    if (!eq)
        return XP_FAIL(XP_E_ARG, "mesh: '%.*s' is not key=value (keys: %s)", (int)(n < 60 ? n : 60), item, all_keys);
    const size_t name_n = (size_t)(eq - item), value_n = n - name_n - 1;
    const char *value = eq + 1;
    const int found = key_find(item, name_n);
    if (found < 0)
        return key_unknown(item, name_n);
    const key k = (key)found;
    if (f->given[k])
        return XP_FAIL(XP_E_ARG, "mesh key %s: given twice, the second time as '%.*s'", key_name[k],
                       (int)(value_n < 60 ? value_n : 60), value);
    f->given[k] = 1;
    if (value_n == 0)
        return XP_FAIL(XP_E_ARG, "mesh key %s: the value is empty", key_name[k]);
    if (k == KEY_JITTER)
        return parse_jitter(value, value_n, &f->jitter);
    if (k == KEY_TIMEOUT)
        return parse_timeout(value, value_n, &f->timeout_s);
    return parse_size(k, value, value_n, &f->size[k]);
}

static xp_status parse_items(const char *text, fields *f) {
    for (const char *at = text;;) {
        const char *comma = strchr(at, ',');
        const size_t n = comma ? (size_t)(comma - at) : strlen(at);
        if (n == 0)
            return XP_FAIL(XP_E_ARG, "mesh: an empty item where key=value is expected, before '%.60s' (keys: %s)", at,
                           all_keys);
        XP_TRY(parse_item(at, n, f));
        if (!comma)
            return XP_OK;
        at = comma + 1;
    }
}

/* ---- the whole spec ---- */

/* Derives world and ep_dp, or says why the sizes do not fit one another. ep_fsdp 0 means world / ep. */
static xp_status derive(xp_mesh_spec *s, const xp_mesh_kind *kind) {
    const int64_t world = (int64_t)s->dp * s->fsdp;
    if (world > kind->max_world)
        return XP_FAIL(XP_E_ARG, "mesh: dp %d x fsdp %d is a world of %lld, but %s holds at most %d ranks", s->dp,
                       s->fsdp, (long long)world, kind->name, kind->max_world);
    if (world % s->ep != 0)
        return XP_FAIL(XP_E_ARG, "mesh key ep: ep %d does not divide world %d (dp %d x fsdp %d)", s->ep, (int)world,
                       s->dp, s->fsdp);
    s->world = (int)world;
    if (s->ep_fsdp == 0)
        s->ep_fsdp = s->world / s->ep;
    const int64_t share = (int64_t)s->ep * s->ep_fsdp;
    if (world % share != 0)
        return XP_FAIL(XP_E_ARG, "mesh key ep_fsdp: ep %d x ep_fsdp %d = %lld does not divide world %d", s->ep,
                       s->ep_fsdp, (long long)share, s->world);
    s->ep_dp = (int)(world / share);
    return XP_OK;
}

/* A spec that a caller built or changed by hand must obey the same rules as text. */
static xp_status recheck(const xp_mesh_spec *s, const xp_mesh_kind **out_kind) {
    xp_mesh_spec again = *s;
    *out_kind = memchr(s->kind, '\0', sizeof s->kind) ? kind_find(s->kind, strlen(s->kind)) : NULL;
    if (!*out_kind)
        return kind_unknown(s->kind, strnlen(s->kind, sizeof s->kind));
    if (s->dp < 1 || s->fsdp < 1 || s->ep < 1 || s->ep_fsdp < 1)
        return XP_FAIL(XP_E_ARG, "mesh: dp %d, fsdp %d, ep %d, ep_fsdp %d must all be at least 1", s->dp, s->fsdp,
                       s->ep, s->ep_fsdp);
    if (!(s->timeout_s >= 0.001 && s->timeout_s <= 86400.0))
        return XP_FAIL(XP_E_ARG, "mesh key timeout: %g is not a number of seconds from 0.001 to 86400", s->timeout_s);
    XP_TRY(derive(&again, *out_kind));
    if (again.world != s->world || again.ep_dp != s->ep_dp)
        return XP_FAIL(XP_E_ARG, "mesh: world %d and ep_dp %d do not follow from the sizes, which give %d and %d",
                       s->world, s->ep_dp, again.world, again.ep_dp);
    return XP_OK;
}

static xp_status parse(const char *text, xp_mesh_spec *out) {
    static const char *const example = "KIND:key=value,..., for example sim:fsdp=8,ep=8";
    fields f;
    memset(&f, 0, sizeof f);
    const size_t clean = strcspn(text, " \t\r\n\v\f");
    if (text[clean])
        return XP_FAIL(XP_E_ARG, "mesh '%.80s': a blank at column %zu; expected %s", text, clean + 1, example);
    const char *colon = strchr(text, ':');
    const size_t kind_n = colon ? (size_t)(colon - text) : strcspn(text, ":=,");
    const xp_mesh_kind *kind = kind_find(text, kind_n);
    if (!kind && kind_n > 0)
        return kind_unknown(text, kind_n);
    if (!kind || !colon || colon[1] == '\0')
        return XP_FAIL(XP_E_ARG, "mesh '%.80s': expected %s", text, example);
    XP_TRY(parse_items(colon + 1, &f));

    memcpy(out->kind, kind->name, strlen(kind->name) + 1);
    out->dp = f.given[KEY_DP] ? f.size[KEY_DP] : 1;
    out->ep = f.given[KEY_EP] ? f.size[KEY_EP] : 1;
    out->fsdp = f.given[KEY_FSDP] ? f.size[KEY_FSDP] : f.given[KEY_DP] ? 1 : out->ep;
    out->ep_fsdp = f.given[KEY_EP_FSDP] ? f.size[KEY_EP_FSDP] : 0;
    out->has_jitter = f.given[KEY_JITTER];
    out->jitter = f.jitter;
    out->timeout_s = f.given[KEY_TIMEOUT] ? f.timeout_s : default_timeout_s;
    return derive(out, kind);
}

xp_status xp_mesh_spec_parse(const char *text, xp_mesh_spec *out) {
    memset(out, 0, sizeof *out);
    const xp_status st = parse(text, out);
    if (st != XP_OK)
        memset(out, 0, sizeof *out);
    return st;
}

/* The fewest decimals that read back to the same number. */
static void print_seconds(double s, char *buf, size_t bytes) {
    for (int decimals = 0; decimals <= 24; decimals++) {
        snprintf(buf, bytes, "%.*f", decimals, s);
        if (!(strtod(buf, NULL) < s) && !(strtod(buf, NULL) > s))
            return;
    }
}

xp_status xp_mesh_spec_print(const xp_mesh_spec *s, char *buf, size_t bytes) {
    const xp_mesh_kind *kind;
    char text[XP_MESH_TEXT], seconds[40];
    size_t at = 0;
    XP_TRY(recheck(s, &kind));
    at += (size_t)snprintf(text, sizeof text, "%s:", s->kind);
    if (s->dp != 1)
        at += (size_t)snprintf(text + at, sizeof text - at, "dp=%d,", s->dp);
    if (s->fsdp != 1 || s->dp == 1)
        at += (size_t)snprintf(text + at, sizeof text - at, "fsdp=%d,", s->fsdp);
    if (s->ep != 1)
        at += (size_t)snprintf(text + at, sizeof text - at, "ep=%d,", s->ep);
    if (s->ep_fsdp != s->world / s->ep)
        at += (size_t)snprintf(text + at, sizeof text - at, "ep_fsdp=%d,", s->ep_fsdp);
    if (s->has_jitter)
        at += (size_t)snprintf(text + at, sizeof text - at, "jitter=%llu,", (unsigned long long)s->jitter);
    if (s->timeout_s < default_timeout_s || s->timeout_s > default_timeout_s) {
        print_seconds(s->timeout_s, seconds, sizeof seconds);
        at += (size_t)snprintf(text + at, sizeof text - at, "timeout=%s,", seconds);
    }
    text[--at] = '\0'; /* the last comma */
    if (at >= bytes)
        return XP_FAIL(XP_E_ARG, "mesh: '%s' needs %zu bytes, the buffer has %zu", text, at + 1, bytes);
    memcpy(buf, text, at + 1);
    return XP_OK;
}

xp_status xp_mesh_spec_rekind(const xp_mesh_spec *s, const char *kind, xp_mesh_spec *out) {
    const xp_mesh_kind *k = kind_find(kind, strlen(kind));
    xp_mesh_spec changed = *s;
    memset(out, 0, sizeof *out);
    if (!k)
        return kind_unknown(kind, strlen(kind));
    memset(changed.kind, 0, sizeof changed.kind);
    memcpy(changed.kind, k->name, strlen(k->name));
    XP_TRY(recheck(&changed, &k));
    *out = changed;
    return XP_OK;
}

/* ---- coordinates ---- */

void xp_mesh_coords(const xp_mesh_spec *s, int rank, xp_mesh_coord *out) {
    const int block = rank / s->ep_fsdp;
    out->dp = rank / s->fsdp;
    out->fsdp = rank % s->fsdp;
    out->ep_fsdp = rank % s->ep_fsdp;
    out->ep = block % s->ep;
    out->ep_dp = block / s->ep;
    out->edp = out->ep_dp * s->ep_fsdp + out->ep_fsdp;
}

int xp_mesh_axis_size(const xp_mesh_spec *s, xp_axis a) {
    switch (a) {
    case XP_DP:
        return s->dp;
    case XP_FSDP:
        return s->fsdp;
    case XP_EP:
        return s->ep;
    case XP_EP_FSDP:
        return s->ep_fsdp;
    case XP_EP_DP:
        return s->ep_dp;
    case XP_EDP:
        return s->ep_dp * s->ep_fsdp;
    case XP_WORLD:
        return s->world;
    default:
        return 1;
    }
}

int xp_mesh_axis_index(const xp_mesh_spec *s, xp_axis a, int rank) {
    xp_mesh_coord c;
    xp_mesh_coords(s, rank, &c);
    switch (a) {
    case XP_DP:
        return c.dp;
    case XP_FSDP:
        return c.fsdp;
    case XP_EP:
        return c.ep;
    case XP_EP_FSDP:
        return c.ep_fsdp;
    case XP_EP_DP:
        return c.ep_dp;
    case XP_EDP:
        return c.edp;
    case XP_WORLD:
        return rank;
    default:
        return 0;
    }
}

/* Distance in ranks between two neighbours of a group; for edp, between two replicas. */
static int axis_step(const xp_mesh_spec *s, xp_axis a) {
    switch (a) {
    case XP_DP:
        return s->fsdp;
    case XP_EP:
        return s->ep_fsdp;
    case XP_EP_DP:
    case XP_EDP:
        return s->ep * s->ep_fsdp;
    default:
        return 1;
    }
}

int xp_mesh_axis_ranks(const xp_mesh_spec *s, xp_axis a, int rank, int *out) {
    const int size = xp_mesh_axis_size(s, a), index = xp_mesh_axis_index(s, a, rank), step = axis_step(s, a);
    /* edp is two nested axes, ep_fsdp inside ep_dp; every other axis is one. */
    const int inner = a == XP_EDP ? s->ep_fsdp : 1;
    const int base = rank - index / inner * step - index % inner;
    for (int i = 0; i < size; i++)
        out[i] = base + i / inner * step + i % inner;
    return size;
}

/* ---- running ---- */

/* Worse errors are higher: what says the most about the program, or about the run as a whole, wins. */
static int severity(xp_status st) {
    static const xp_status by_weight[] = {XP_OK,       XP_E_PEER,  XP_E_ARG,  XP_E_FORMAT, XP_E_IO,
                                          XP_E_DEVICE, XP_E_NOMEM, XP_E_COMM, XP_E_HANG,   XP_E_BUG};
    for (int i = 0; i < (int)(sizeof by_weight / sizeof *by_weight); i++) {
        if (by_weight[i] == st)
            return i;
    }
    return severity(XP_E_BUG);
}

static void agree(xp_mesh_report *r) {
    r->status = XP_OK;
    r->first = -1;
    for (int i = 0; i < r->world; i++) {
        const xp_mesh_end *e = &r->end[i];
        const int worse = severity(e->status) - severity(r->status);
        r->stuck += e->stuck;
        if (e->status != XP_OK && (worse > 0 || (worse == 0 && e->order < r->end[r->first].order))) {
            r->status = e->status;
            r->first = i;
        }
    }
}

xp_status xp_mesh_run(const xp_mesh_spec *s, xp_rank_fn fn, void *arg, xp_mesh_report *out) {
    const xp_mesh_kind *kind;
    memset(out, 0, sizeof *out);
    out->first = -1;
    out->status = recheck(s, &kind);
    if (out->status != XP_OK)
        return out->status;
    if (kind->why_not)
        return out->status = XP_FAIL(XP_E_DEVICE, "mesh %s: %s", kind->name, kind->why_not);
    out->status = kind->run(s, fn, arg, out);
    if (out->status != XP_OK)
        return out->status;
    agree(out);
    if (out->status != XP_OK)
        return XP_FAIL(out->status, "rank %d: %s", out->first, out->end[out->first].text);
    return XP_OK;
}
