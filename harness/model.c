/* Models by name, from numbers, shrunk and overridden. The checks on numbers are stated once here for models that do
 * not come from a file; files have their own wording and limits in config.c. */
#include "model.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"

int xp_model_is_moe(const xp_model *m, int layer) {
    return layer >= 0 && layer < m->layers && m->moe[layer];
}

int xp_model_moe_layers(const xp_model *m) {
    int n = 0;
    for (int i = 0; i < m->layers; i++)
        n += m->moe[i];
    return n;
}

/* ---- records ---- */

const xp_dialect *xp_model_dialect(const xp_model *m, int layer) {
    return layer >= 0 && layer < m->layers && m->record[layer] ? &m->other[m->record[layer] - 1] : &m->dialect;
}

/* What decides which parameters and tensors there are is the same in all blocks. */
static xp_status check_shared_fields(const xp_model *m, int layer, const xp_dialect *d) {
    static const char *const same[] = {"router_in",       "logits_dtype",    "router_bias", "expert_scale",
                                       "weight_dtype",    "null_experts",    "gated",       "expert_bias",
                                       "shared_gate",     "aux_coef",        "z_coef",      "capacity",
                                       "capacity_factor", "pad_to_capacity", "shared_rows"};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        const xp_dialect_field *f = xp_dialect_fields;
        char is[64], was[64];
        while (f->name && strcmp(f->name, same[i]) != 0)
            f++;
        xp_dialect_print(d, f, is, sizeof is);
        xp_dialect_print(&m->dialect, f, was, sizeof was);
        if (strcmp(is, was) != 0)
            return XP_FAIL(XP_E_ARG, "%s: %s in layer %d of %s, expected %s as in its other MoE blocks", same[i], is,
                           layer, m->name, was);
    }
    return XP_OK;
}

xp_status xp_model_set_dialect(xp_model *m, int layer, const xp_dialect *d) {
    int n = 0;
    XP_TRY(check_shared_fields(m, layer, d));
    while (n <= m->others && !xp_dialect_equal(d, n ? &m->other[n - 1] : &m->dialect))
        n++;
    if (n == XP_MAX_RECORDS)
        return XP_FAIL(XP_E_ARG, "layer %d of %s: its dialect record would be the %dth, expected at most %d", layer,
                       m->name, n + 1, (int)XP_MAX_RECORDS);
    if (n > m->others)
        m->other[m->others++] = *d;
    m->record[layer] = (uint8_t)n;
    return XP_OK;
}

void xp_model_settle(xp_model *m) {
    const xp_model was = *m;
    int blocks[XP_MAX_RECORDS] = {0}, at[XP_MAX_RECORDS] = {0}, most = 0;
    for (int i = 0; i < was.layers; i++)
        blocks[was.record[i]] += was.moe[i];
    for (int n = 1; n <= was.others; n++)
        most = blocks[n] > blocks[most] ? n : most;
    m->dialect = most ? was.other[most - 1] : was.dialect;
    m->others = 0;
    memset(m->other, 0, sizeof m->other);
    for (int n = 0; n <= was.others; n++) {
        if (n == most || blocks[n] == 0)
            continue;
        m->other[m->others] = n ? was.other[n - 1] : was.dialect;
        at[n] = ++m->others;
    }
    memset(m->record, 0, sizeof m->record);
    for (int i = 0; i < was.layers; i++)
        m->record[i] = (uint8_t)(was.moe[i] ? at[was.record[i]] : 0);
}

void xp_model_record_layers(const xp_model *m, int n, char *buf, size_t bytes) {
    size_t used = 0;
    buf[0] = 0;
    for (int i = 0, last; i < m->layers; i = last + 1) {
        char run[32];
        last = i;
        if (!m->moe[i] || m->record[i] != n)
            continue;
        while (last + 1 < m->layers && m->moe[last + 1] && m->record[last + 1] == n)
            last++;
        if (last > i)
            snprintf(run, sizeof run, "%s%d-%d", used ? "," : "", i, last);
        else
            snprintf(run, sizeof run, "%s%d", used ? "," : "", i);
        if (used + strlen(run) + 4 > bytes) {
            snprintf(buf + used, bytes - used, "...");
            return;
        }
        used += (size_t)snprintf(buf + used, bytes - used, "%s", run);
    }
}

void xp_model_moe_params(const xp_model *m, double *out_all, double *out_active) {
    const double H = (double)m->H, layers = (double)xp_model_moe_layers(m);
    const double maps = m->dialect.gated ? 3.0 : 2.0;
    const double D = (double)xp_model_expert_width(m), expert = maps * D * (double)m->F;
    const double of_latent = m->around & XP_LATENT_NORM ? D : 0.0, of_experts = m->around & XP_EXPERT_NORM ? D : 0.0;
    double of_sum = m->dialect.router_in == XP_ROUTER_RMSNORM_SCALED ? H : 0.0;
    for (unsigned bit = XP_OUT_BIAS; bit <= XP_SHARED_IN_NORM; bit <<= 1)
        of_sum += m->around & bit ? H : 0.0;
    const double Z = (double)xp_dialect_rows(&m->dialect, m->E), R = (double)m->router_width;
    const double router = (R > 0.0 ? (Z + H + 2.0 * R + 5.0) * R : Z * H) + (m->latent ? 2.0 * D * H : 0.0) +
                          of_latent + of_experts + of_sum;
    const double shared = maps * H * (double)m->S + (m->S && m->dialect.shared_gate ? H : 0.0);
    /* The first block has no state before it to weigh. */
    *out_all = layers * ((double)m->E * expert + router + shared) - (layers > 0.0 ? R : 0.0);
    *out_active = layers * ((double)m->K * expert + router + shared) - (layers > 0.0 ? R : 0.0);
}

static xp_status in_range(const char *field, int64_t value, int64_t lo, int64_t hi) {
    if (value < lo || value > hi)
        return XP_FAIL(XP_E_ARG, "%s: %lld, expected %lld to %lld", field, (long long)value, (long long)lo,
                       (long long)hi);
    return XP_OK;
}

static xp_status check_topk(int64_t E, int64_t K) {
    if (K > E)
        return XP_FAIL(XP_E_ARG, "k: %lld slots a token, more than E %lld experts", (long long)K, (long long)E);
    return XP_OK;
}

xp_status xp_model_of(const char *name, const xp_dialect *d, int layers, int64_t H, int64_t F, int64_t E, int64_t K,
                      int64_t S, xp_model *out) {
    memset(out, 0, sizeof *out);
    XP_TRY(in_range("layers", layers, 1, XP_MAX_LAYERS));
    XP_TRY(in_range("H", H, 1, XP_MAX_WIDTH));
    XP_TRY(in_range("F", F, 1, XP_MAX_WIDTH));
    XP_TRY(in_range("E", E, 1, XP_MAX_EXPERTS));
    XP_TRY(in_range("k", K, 1, XP_MAX_EXPERTS));
    XP_TRY(in_range("S", S, 0, XP_MAX_WIDTH));
    XP_TRY(check_topk(E, K));
    snprintf(out->name, sizeof out->name, "%s", name);
    out->layers = layers;
    memset(out->moe, 1, (size_t)layers);
    out->H = H;
    out->F = F;
    out->E = E;
    out->K = K;
    out->S = S;
    out->vocab = XP_VOCAB;
    out->norm_eps = 1e-6;
    out->expert_eps = 1e-6;
    out->shrink = 1;
    out->dialect = *d;
    return XP_OK;
}

int64_t xp_model_expert_width(const xp_model *m) {
    return m->latent ? m->latent : m->H;
}

xp_status xp_model_set_latent(xp_model *m, int64_t width) {
    XP_TRY(in_range("latent width D", width, 0, XP_MAX_WIDTH));
    if (width && m->dialect.null_experts > 0 && m->dialect.null_kind == XP_NULL_IDENTITY)
        return XP_FAIL(XP_E_ARG, "latent width D: %lld, expected none beside experts that return the block's input",
                       (long long)width);
    m->latent = width;
    return XP_OK;
}

xp_status xp_model_set_router_width(xp_model *m, int64_t width) {
    const int has = m->dialect.router_in == XP_ROUTER_RECURRENT_MLP;
    if (has)
        XP_TRY(in_range("router's width R", width, 1, XP_MAX_WIDTH));
    else if (width != 0)
        return XP_FAIL(XP_E_ARG, "router's width R: %lld, expected none where router_in is not recurrent_mlp",
                       (long long)width);
    m->router_width = width;
    return XP_OK;
}

/* ---- what is around the experts ---- */

static const char *const around_names[] = {"latent_norm", "expert_norm", "out_bias",      "block_norm",
                                           "routed_norm", "shared_norm", "shared_in_norm"};
enum { AROUND = sizeof around_names / sizeof *around_names };

xp_status xp_model_set_around(xp_model *m, unsigned around) {
    if (around >> AROUND)
        return XP_FAIL(XP_E_ARG, "around: %u, expected bits below %u", around, 1u << AROUND);
    if ((around & XP_LATENT_NORM) && !m->latent)
        return XP_FAIL(XP_E_ARG, "around: latent_norm, expected it beside a latent width D alone");
    if ((around & (XP_SHARED_NORM | XP_SHARED_IN_NORM)) && !m->S)
        return XP_FAIL(XP_E_ARG, "around: %s, expected it beside a shared expert alone",
                       around & XP_SHARED_NORM ? "shared_norm" : "shared_in_norm");
    m->around = around;
    return XP_OK;
}

void xp_around_print(unsigned around, char *buf, size_t bytes) {
    size_t used = 0;
    buf[0] = '\0';
    for (int i = 0; i < AROUND; i++) {
        if ((around >> i & 1u) && used < bytes)
            used += (size_t)snprintf(buf + used, bytes - used, "%s%s", used ? "+" : "", around_names[i]);
    }
}

xp_status xp_around_parse(const char *text, unsigned *out) {
    *out = 0;
    for (const char *p = text;; p++) {
        const size_t n = strcspn(p, "+");
        int i = 0;
        while (i < AROUND && (strlen(around_names[i]) != n || strncmp(p, around_names[i], n) != 0))
            i++;
        if (i == AROUND || (*out >> i & 1u))
            return XP_FAIL(XP_E_ARG, "around: '%.*s' %s, expected names of " XP_AROUND_NAMES " with + between them",
                           (int)n, p, i == AROUND ? "is unknown" : "is given twice");
        *out |= 1u << i;
        p += n;
        if (!*p)
            return XP_OK;
    }
}

xp_status xp_model_shrink(xp_model *m, int n) {
    const struct {
        const char *what;
        int64_t value;
    } width[] = {{"hidden width H", m->H},
                 {"expert width F", m->F},
                 {"shared expert's width S", m->S},
                 {"latent width D", m->latent},
                 {"router's width R", m->router_width}};
    if (n < 1)
        return XP_FAIL(XP_E_ARG, "shrink: %d, expected 1 or more", n);
    for (size_t i = 0; i < sizeof width / sizeof width[0]; i++) {
        if (width[i].value % n != 0)
            return XP_FAIL(XP_E_ARG, "shrink: %d does not divide the %s %lld of %s", n, width[i].what,
                           (long long)width[i].value, m->name);
    }
    m->H /= n;
    m->F /= n;
    m->S /= n;
    m->latent /= n;
    m->router_width /= n;
    m->shrink *= n;
    return XP_OK;
}

xp_status xp_model_override(xp_model *m, int layers, int64_t experts, int64_t topk) {
    const int64_t E = experts ? experts : m->E, K = topk ? topk : m->K;
    XP_TRY(in_range("layers", layers ? layers : m->layers, 1, m->layers));
    XP_TRY(in_range("experts", E, 1, XP_MAX_EXPERTS));
    XP_TRY(in_range("k", K, 1, XP_MAX_EXPERTS));
    XP_TRY(check_topk(E, K));
    m->layers = layers ? layers : m->layers;
    m->E = E;
    m->K = K;
    xp_model_settle(m);
    return XP_OK;
}

/* ---- by name ---- */

static const char *model_dir(void) {
    const char *dir = getenv("EXPAR_MODELS");
    return dir && *dir ? dir : XP_MODELS_DIR;
}

static int ends_in_json(const char *name, size_t n) {
    return n > 5 && strcmp(name + n - 5, ".json") == 0;
}

xp_status xp_model_open(const char *name_or_path, xp_model *out) {
    memset(out, 0, sizeof *out);
    if (strchr(name_or_path, '/') || ends_in_json(name_or_path, strlen(name_or_path)))
        return xp_config_read(name_or_path, out);
    if (!*name_or_path)
        return XP_FAIL(XP_E_ARG, "model: an empty name");
    char path[4096];
    const int n = snprintf(path, sizeof path, "%s/%s.json", model_dir(), name_or_path);
    if (n < 0 || (size_t)n >= sizeof path)
        return XP_FAIL(XP_E_ARG, "model: the name '%.60s...' is too long", name_or_path);
    const xp_status st = xp_config_read(path, out);
    if (st == XP_E_IO)
        return XP_FAIL(st, "model '%s': %s", name_or_path, xp_error_text());
    return st;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

typedef struct {
    char **name;
    size_t count, room;
} name_list;

static xp_status add_name(name_list *l, const char *file, size_t bytes) {
    if (l->count == l->room) {
        const size_t room = l->room ? 2 * l->room : 64;
        char **bigger = realloc(l->name, room * sizeof *bigger);
        if (!bigger)
            return XP_FAIL(XP_E_NOMEM, "models: no memory for %zu names", room);
        l->name = bigger;
        l->room = room;
    }
    char *copy = malloc(bytes + 1);
    if (!copy)
        return XP_FAIL(XP_E_NOMEM, "models: no memory for a name of %zu bytes", bytes);
    memcpy(copy, file, bytes);
    copy[bytes] = 0;
    l->name[l->count++] = copy;
    return XP_OK;
}

static xp_status read_names(DIR *d, name_list *l) {
    for (const struct dirent *e; (e = readdir(d)) != NULL;) {
        const size_t n = strlen(e->d_name);
        if (ends_in_json(e->d_name, n) && e->d_name[0] != '.')
            XP_TRY(add_name(l, e->d_name, n - 5));
    }
    return XP_OK;
}

xp_status xp_model_list(xp_status (*fn)(const char *name, void *arg), void *arg) {
    name_list l = {NULL, 0, 0};
    DIR *d = opendir(model_dir());
    if (!d)
        return XP_FAIL(XP_E_IO, "%s: cannot open the model directory (error %d)", model_dir(), errno);
    xp_status st = read_names(d, &l);
    closedir(d);
    if (st == XP_OK && l.count)
        qsort(l.name, l.count, sizeof *l.name, by_text);
    for (size_t i = 0; i < l.count; i++) {
        if (st == XP_OK)
            st = fn(l.name[i], arg);
        free(l.name[i]);
    }
    free(l.name);
    return st;
}
