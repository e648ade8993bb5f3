/* From a case's letters to a stage's argument struct: the operand and scalar tables say everything. */
#include "bind.h"

#include <ctype.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"
#include "xp/gather.h"
#include "xp/scatter.h"

typedef struct {
    const xp_case *c;
    xp_rank *r;
    void *args;
    int64_t local[26], full[26], base[26]; /* by letter */
    int64_t start[XP_MESH_MAX_RANKS], rows[XP_MESH_MAX_RANKS];
    xp_dialect dialect; /* where a stage's args point to */
} binding;

static int64_t *slot(int64_t *table, char letter) {
    return &table[letter - 'A'];
}

static void split_letter(binding *b, char letter) {
    const int world = b->r->world;
    *slot(b->full, letter) = *slot(b->local, letter);
    xp_plan_chunk(*slot(b->full, letter), world, b->r->rank, slot(b->base, letter), slot(b->local, letter));
}

/* Tokens are dealt as the plan deals them: as equal as possible, earlier ranks take the surplus. */
static void deal_tokens(binding *b) {
    const int64_t n = *slot(b->local, 'T'), each = n / b->r->world, more = n % b->r->world, rank = b->r->rank;
    *slot(b->full, 'T') = n;
    *slot(b->local, 'T') = each + (rank < more);
    *slot(b->base, 'T') = rank * each + (rank < more ? rank : more);
    b->r->token0 = *slot(b->base, 'T');
}

static const char *case_value(const xp_case *c, const char *name) {
    for (int i = 0; i < c->params; i++) {
        if (strcmp(c->param[i].name, name) == 0)
            return c->param[i].value;
    }
    return NULL;
}

static int64_t block_of(const binding *b) {
    const char *text = case_value(b->c, "block");
    return text ? strtoll(text, NULL, 10) : 0;
}

static int names_letter(const xp_stage *s, char letter) {
    for (int i = 0; i < s->operands; i++) {
        if (strchr(s->operand[i].shape, letter))
            return 1;
    }
    return 0;
}

static void take_letters(binding *b) {
    memcpy(b->local, b->c->dim, sizeof b->local);
    memcpy(b->full, b->c->dim, sizeof b->full);
    deal_tokens(b);
    /* A flat stage is cut along N; where rows are cut, N counts columns. */
    split_letter(b, names_letter(b->c->stage, 'R') ? 'R' : 'N');
    const int ep = b->r->mesh->axis[XP_EP]->size;
    *slot(b->local, 'L') = *slot(b->local, 'E') / ep;
    *slot(b->full, 'L') = *slot(b->local, 'E');
    *slot(b->base, 'L') = *slot(b->local, 'L') * b->r->mesh->axis[XP_EP]->rank;
    *slot(b->local, 'P') = *slot(b->full, 'P') = b->r->world;
    const int64_t block = block_of(b), t0 = *slot(b->base, 'T'), t = *slot(b->local, 'T');
    *slot(b->local, 'B') = block > 0 ? (t ? (t0 + t - 1) / block - t0 / block + 1 : 0) : 1;
    *slot(b->full, 'B') = *slot(b->local, 'B');
}

/* ---- shapes ---- */

/* One dimension, "2*F", "E+1", "R0" (the whole of R): its local size, logical size and start. */
static xp_status parse_dim(binding *b, const char **text, int64_t *out_local, int64_t *out_full, int64_t *out_base) {
    const char *p = *text;
    int64_t local = 1, full = 1, base = 0;
    int add = 0;
    for (;; p++) {
        int64_t l, f, s = 0;
        if (isdigit((unsigned char)*p)) {
            char *end;
            l = f = strtoll(p, &end, 10);
            p = end;
        } else if (isupper((unsigned char)*p)) {
            const char letter = *p++;
            l = *slot(b->local, letter);
            f = *slot(b->full, letter);
            s = *slot(b->base, letter);
            if (*p == '0') {
                l = f;
                s = 0;
                p++;
            }
        } else {
            return XP_FAIL(XP_E_BUG, "shape: cannot read '%s'", *text);
        }
        local = add ? local + l : local * l;
        full = add ? full + f : full * f;
        base = add ? base : base * l + s; /* split letters stand alone in their dimension */
        if (*p != '*' && *p != '+')
            break;
        add = *p == '+';
    }
    *out_local = local;
    *out_full = full;
    *out_base = base;
    *text = *p == ',' ? p + 1 : p;
    return XP_OK;
}

static xp_status parse_shape(binding *b, const char *shape, int *out_ndim, int64_t *local, int64_t *full,
                             int64_t *base) {
    *out_ndim = 0;
    for (const char *p = shape; *p;) {
        if (*out_ndim == XP_MAXDIM)
            return XP_FAIL(XP_E_BUG, "shape: '%s' has more than %d dimensions", shape, XP_MAXDIM);
        XP_TRY(parse_dim(b, &p, &local[*out_ndim], &full[*out_ndim], &base[*out_ndim]));
        ++*out_ndim;
    }
    return XP_OK;
}

/* ---- dtypes ---- */

static int has_dialect(const xp_stage *s) {
    for (int i = 0; i < s->params; i++) {
        if (s->param[i].type == XP_P_DIALECT)
            return 1;
    }
    return 0;
}

static xp_dtype group_dtype(const binding *b, const char *group, uint32_t allowed) {
    const xp_case *c = b->c;
    const xp_dtype act = c->dtype[XP_G_ACT], wide = act == XP_F64 ? XP_F64 : XP_F32;
    if (strcmp(group, "wide") == 0)
        return allowed & XP_BIT(wide) ? wide : XP_F32;
    for (int g = 0; g < XP_NGROUP; g++) {
        if (strcmp(group, xp_group_name((xp_group)g)) == 0 && c->dtype[g] != XP_NDTYPE)
            return c->dtype[g];
    }
    /* Unless the line says otherwise, the dialect's own rules hold. */
    if (has_dialect(c->stage) && strcmp(group, "logits") == 0)
        return b->dialect.logits_dtype == XP_WIDE_ACT ? act : wide;
    if (has_dialect(c->stage) && strcmp(group, "weight") == 0)
        return b->dialect.weight_dtype == XP_WIDE_ACT ? act : wide;
    if (strcmp(group, "act") == 0 || strcmp(group, "param") == 0 || strcmp(group, "router") == 0 ||
        strcmp(group, "logits") == 0)
        return act;
    if (group[0] && allowed & XP_BIT(wide))
        return wide;
    for (int d = 0; d < XP_NDTYPE; d++) {
        if (allowed & XP_BIT(d))
            return (xp_dtype)d;
    }
    return XP_F32;
}

static int named_in(const char *names, const char *name) {
    const size_t n = strlen(name);
    for (const char *p = names; *p;) {
        const size_t len = strcspn(p, "+");
        if (len == n && strncmp(p, name, n) == 0)
            return 1;
        p += len + (p[len] == '+');
    }
    return 0;
}

/* The size of a case line that a letter comes from. */
static char line_letter(char letter) {
    return letter == 'X' ? 'S' : letter == 'U' ? 'F' : letter == 'Z' || letter == 'W' ? 'E' : letter;
}

static int shape_names(const char *shape, char letter) {
    for (const char *p = shape; *p; p++) {
        if (isupper((unsigned char)*p) && line_letter(*p) == letter)
            return 1;
    }
    return 0;
}

/* A size that no required operand has asks for the optional ones that have it: S=16 for a shared expert. */
static int asked_by_size(const xp_case *c, const xp_operand *o) {
    for (const char *p = o->shape; *p; p++) {
        const char letter = isupper((unsigned char)*p) ? line_letter(*p) : 'A';
        int needed = !c->dim_set[letter - 'A'];
        for (int i = 0; i < c->stage->operands && !needed; i++)
            needed = !c->stage->operand[i].optional && shape_names(c->stage->operand[i].shape, letter);
        if (!needed && isupper((unsigned char)*p))
            return 1;
    }
    return 0;
}

static xp_status bind_operand(binding *b, const xp_operand *o) {
    int ndim;
    int64_t local[XP_MAXDIM], full[XP_MAXDIM], base[XP_MAXDIM];
    char name[64];
    xp_tensor *t = (xp_tensor *)(void *)((char *)b->args + o->at);
    const xp_stage *s = b->c->stage;
    if (o->optional && !named_in(b->c->with, o->name) && !asked_by_size(b->c, o) &&
        !(s->wants && s->wants(b->args, (int)(o - s->operand))))
        return XP_OK;
    const xp_dtype d = group_dtype(b, o->group, o->dtypes);
    if (!(o->dtypes & XP_BIT(d)))
        return XP_FAIL(XP_E_ARG, "%s: %s cannot be %s (group %s)", b->c->stage->name, o->name, xp_dtype_name(d),
                       o->group);
    XP_TRY(parse_shape(b, o->shape, &ndim, local, full, base));
    XP_TRY(xp_rank_tensor(b->r, XP_KIND_ACT, d, ndim, local, t));
    if (!(o->role & XP_IN))
        return XP_OK;
    memset(t->data, 0, xp_dtype_bytes(d, xp_tensor_count(t)));
    if (d != XP_F64 && d != XP_F32 && d != XP_BF16 && d != XP_F16 && d != XP_E4M3 && d != XP_E5M2)
        return XP_OK; /* integers and scales are their stage's to fill */
    snprintf(name, sizeof name, "%s.%s", b->c->stage->name, o->name);
    return xp_fill_tensor(t, b->c->data, b->c->seed, name, base, full, 1.0);
}

/* ---- scalars ---- */

static xp_status bind_word(const xp_param *p, const char *text, int *out) {
    int word = 0;
    for (const char *w = p->words; *w; word++) {
        const size_t n = strcspn(w, "|");
        if (strlen(text) == n && strncmp(w, text, n) == 0) {
            *out = word;
            return XP_OK;
        }
        w += n + (w[n] == '|');
    }
    return XP_FAIL(XP_E_ARG, "%s: '%s' is none of %s", p->name, text, p->words);
}

static xp_status bind_number(const xp_param *p, const char *text, void *at) {
    char *end = NULL;
    const double v = strtod(text, &end);
    const int whole = p->type == XP_P_I64 || p->type == XP_P_INT;
    if (end == text || *end || isspace((unsigned char)text[0]) || isnan(v))
        return XP_FAIL(XP_E_ARG, "%s: '%s' is no number", p->name, text);
    if (whole && (v != floor(v) || fabs(v) > (p->type == XP_P_INT ? (double)INT_MAX : 0x1p53)))
        return XP_FAIL(XP_E_ARG, "%s: '%s' is no whole number, or too large", p->name, text);
    if (p->type == XP_P_F32 && isfinite(v) && fabs(v) > (double)FLT_MAX)
        return XP_FAIL(XP_E_ARG, "%s: '%s' is too large for f32", p->name, text);
    if (p->type == XP_P_F32)
        *(float *)at = (float)v;
    else if (p->type == XP_P_F64)
        *(double *)at = v;
    else if (p->type == XP_P_I64)
        *(int64_t *)at = (int64_t)v;
    else
        *(int *)at = (int)v;
    return XP_OK;
}

xp_status xp_bind_scalar(const xp_param *p, const char *text, void *at) {
    switch (p->type) {
    case XP_P_WORD:
        return bind_word(p, text, at);
    case XP_P_DTYPE:
        if (xp_dtype_parse(text, at) != XP_OK)
            return XP_FAIL(XP_E_ARG, "%s: '%s' is no dtype", p->name, text);
        return XP_OK;
    case XP_P_DIALECT:
        *(const xp_dialect **)at = xp_dialect_find(text);
        if (!*(const xp_dialect **)at)
            return XP_FAIL(XP_E_ARG, "%s: '%s' is no preset (see `expar list dialects`)", p->name, text);
        return XP_OK;
    default:
        return bind_number(p, text, at);
    }
}

static xp_status bind_param(binding *b, const xp_param *p) {
    void *at = (char *)b->args + p->at;
    const char *given = case_value(b->c, p->name), *text = given ? given : p->dflt;
    if (b->c->stage->chain && (strcmp(p->name, "order") == 0 || strcmp(p->name, "align") == 0)) {
        *(int *)at = p->name[0] == 'o' ? b->c->order : b->c->align;
        return XP_OK;
    }
    if (p->type == XP_P_DIALECT) {
        XP_TRY(xp_case_dialect(b->c, &b->dialect));
        *(const xp_dialect **)at = &b->dialect;
        return XP_OK;
    }
    if (p->type == XP_P_DTYPE && strcmp(p->name, "act") == 0) {
        *(xp_dtype *)at = b->c->dtype[XP_G_ACT];
        return XP_OK;
    }
    if (strcmp(p->name, "token0") == 0) {
        *(int64_t *)at = *slot(b->base, 'T');
        return XP_OK;
    }
    return text ? xp_bind_scalar(p, text, at) : XP_OK;
}

/* The two stages with host arrays: rows cut over their axis as the plan cuts them. */
static void bind_ranges(binding *b) {
    xp_gather_args *g = b->c->stage == &xp_stage_gather ? b->args : NULL;
    xp_scatter_args *s = b->c->stage == &xp_stage_scatter ? b->args : NULL;
    if (!g && !s)
        return;
    const xp_comm *axis = b->r->mesh->axis[g ? g->axis : s->axis];
    for (int q = 0; q < axis->size; q++)
        xp_plan_chunk(*slot(b->full, 'R'), axis->size, q, &b->start[q], &b->rows[q]);
    *slot(b->local, 'R') = b->rows[axis->rank];
    *slot(b->base, 'R') = b->start[axis->rank];
    if (g) {
        g->start = b->start;
        g->rows = b->rows;
    } else {
        s->start = b->start;
        s->rows = b->rows;
    }
}

/* Sizes that follow from the dialect: see xp/stage.h. */
static void take_dialect_letters(binding *b) {
    const int64_t maps = b->dialect.gated ? 2 : 1;
    const int one = b->dialect.expert_scale == XP_FACTOR_ONE;
    const struct {
        char letter, from;
        int64_t times, plus;
    } rule[] = {{'U', 'F', maps, 0},
                {'X', 'S', maps, 0},
                {'Z', 'E', 1, xp_dialect_rows(&b->dialect, 0)},
                {'A', 'E', 0, b->dialect.shared_rows},
                {'W', 'E', one ? 0 : 1, one ? 1 : xp_dialect_rows(&b->dialect, 0)}};
    for (size_t i = 0; i < sizeof rule / sizeof *rule; i++) {
        const int64_t n = rule[i].times * *slot(b->local, rule[i].from) + rule[i].plus;
        *slot(b->local, rule[i].letter) = *slot(b->full, rule[i].letter) = n;
    }
}

/* The scalars of a quantised matrix say into how many blocks its T and H are cut. */
static void take_block_letters(binding *b) {
    static const struct {
        const char *param;
        char from, to;
    } rule[] = {{"rows", 'T', 'I'}, {"cols", 'H', 'J'}};
    for (size_t i = 0; i < sizeof rule / sizeof *rule; i++) {
        for (int k = 0; k < b->c->stage->params; k++) {
            const xp_param *p = &b->c->stage->param[k];
            if (p->type != XP_P_I64 || strcmp(p->name, rule[i].param) != 0)
                continue;
            const int64_t each = *(const int64_t *)(const void *)((const char *)b->args + p->at);
            const int64_t n = *slot(b->local, rule[i].from);
            const int64_t blocks = n == 0 ? 0 : each <= 0 ? 1 : (n - 1) / each + 1;
            *slot(b->local, rule[i].to) = *slot(b->full, rule[i].to) = blocks;
        }
    }
}

static xp_status bind_all(binding *b) {
    const xp_stage *s = b->c->stage;
    take_letters(b);
    for (int i = 0; i < s->params; i++)
        XP_TRY(bind_param(b, &s->param[i]));
    bind_ranges(b);
    take_dialect_letters(b);
    take_block_letters(b);
    for (int i = 0; i < s->operands; i++)
        XP_TRY(bind_operand(b, &s->operand[i]));
    return s->fill ? s->fill(b->args, b->r->mesh, xp_data_name(b->c->data), b->c->seed) : XP_OK;
}

xp_status xp_bind_run(const xp_case *c, xp_rank *r) {
    binding *b = calloc(1, sizeof *b);
    xp_status st = XP_OK;
    if (!b || !(b->args = calloc(1, c->stage->args_size))) {
        free(b);
        return XP_FAIL(XP_E_NOMEM, "case: the arguments of %s", c->stage->name);
    }
    b->c = c;
    b->r = r;
    r->layer = -1;
    XP_GOTO(out, bind_all(b));
    st = xp_call(r, c->stage, c->stage->name, b->args);
out:
    free(b->args);
    free(b);
    return st;
}

/* ---- given operands ---- */

/* Sizes of letters that stand alone in a dimension of a given operand. */
static xp_status take_given_letters(binding *b, const xp_operand *o, const xp_tensor *t) {
    int d = 0;
    for (const char *p = o->shape; *p && t->data; d++) {
        const size_t n = strcspn(p, ",");
        if (d >= t->ndim)
            break;
        if (n == 1 && isupper((unsigned char)*p)) {
            int64_t *size = slot(b->local, *p);
            if (*size >= 0 && *size != t->dim[d])
                return XP_FAIL(XP_E_ARG, "%s: %s dim %d is %lld, expected %c = %lld", b->c->stage->name, o->name, d,
                               (long long)t->dim[d], *p, (long long)*size);
            *size = *slot(b->full, *p) = t->dim[d];
        }
        p += n + (p[n] == ',');
    }
    if (t->data && d != t->ndim)
        return XP_FAIL(XP_E_ARG, "%s: %s has %d dimensions, expected [%s]", b->c->stage->name, o->name, t->ndim,
                       o->shape);
    return XP_OK;
}

static xp_status take_given_sizes(binding *b, const xp_given *g) {
    const xp_stage *s = b->c->stage;
    for (int i = 0; i < 26; i++)
        b->local[i] = b->full[i] = -1;
    for (int i = 0; i < s->operands; i++) {
        XP_TRY(take_given_letters(b, &s->operand[i], &g->in[i]));
        XP_TRY(take_given_letters(b, &s->operand[i], &g->out[i]));
    }
    for (int i = 0; i < 26; i++) {
        if (b->local[i] < 0 && b->c->dim_set[i])
            b->local[i] = b->full[i] = b->c->dim[i];
    }
    const struct {
        char letter;
        int64_t size;
    } other[] = {{'P', 1}, {'B', 1}, {'G', 1}};
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        if (*slot(b->local, other[i].letter) < 0)
            *slot(b->local, other[i].letter) = *slot(b->full, other[i].letter) = other[i].size;
    }
    return XP_OK;
}

/* The dtype of a group: what another operand of it has, or what the line says. */
static xp_dtype given_dtype(const binding *b, const xp_given *g, const xp_operand *o) {
    const xp_stage *s = b->c->stage;
    for (int i = 0; i < s->operands && o->group[0]; i++) {
        if (strcmp(s->operand[i].group, o->group) == 0 && g->in[i].data)
            return g->in[i].dtype;
    }
    return group_dtype(b, o->group, o->dtypes);
}

static xp_status bind_given_operand(binding *b, const xp_given *g, int i) {
    const xp_operand *o = &b->c->stage->operand[i];
    const xp_tensor *in = &g->in[i], *out = &g->out[i];
    xp_tensor *t = (xp_tensor *)(void *)((char *)b->args + o->at);
    int64_t full[XP_MAXDIM], base[XP_MAXDIM], dim[XP_MAXDIM];
    int ndim;
    if (o->role & XP_IN && !in->data) {
        if (o->optional)
            return XP_OK;
        return XP_FAIL(XP_E_ARG, "%s: in.%s is missing", b->c->stage->name, o->name);
    }
    const xp_stage *s = b->c->stage;
    if (!(o->role & XP_IN) && !out->data && o->optional && !(s->wants && s->wants(b->args, i)))
        return XP_OK;
    if (in->data || out->data) {
        const xp_tensor *like = in->data ? in : out;
        XP_TRY(xp_rank_tensor(b->r, XP_KIND_ACT, like->dtype, like->ndim, like->dim, t));
    } else {
        XP_TRY(parse_shape(b, o->shape, &ndim, dim, full, base));
        XP_TRY(xp_rank_tensor(b->r, XP_KIND_ACT, given_dtype(b, g, o), ndim, dim, t));
    }
    if (in->data)
        memcpy(t->data, in->data, xp_dtype_bytes(in->dtype, xp_tensor_count(in)));
    return XP_OK;
}

static xp_status bind_given_all(binding *b, const xp_given *g) {
    const xp_stage *s = b->c->stage;
    XP_TRY(take_given_sizes(b, g));
    for (int i = 0; i < s->params; i++)
        XP_TRY(bind_param(b, &s->param[i]));
    bind_ranges(b);
    /* Inputs before outputs: what a scalar asks for may depend on them. */
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < s->operands; i++) {
            if (((s->operand[i].role & XP_IN) != 0) == (pass == 0))
                XP_TRY(bind_given_operand(b, g, i));
        }
    }
    return XP_OK;
}

xp_status xp_bind_given(const xp_case *c, xp_rank *r, const xp_given *g, xp_bind_fn fn, void *arg) {
    binding *b = calloc(1, sizeof *b);
    xp_status st = XP_OK;
    if (!b || !(b->args = calloc(1, c->stage->args_size))) {
        free(b);
        return XP_FAIL(XP_E_NOMEM, "case: the arguments of %s", c->stage->name);
    }
    b->c = c;
    b->r = r;
    r->layer = -1;
    XP_GOTO(out, bind_given_all(b, g));
    st = fn(r, c->stage, b->args, arg);
out:
    free(b->args);
    free(b);
    return st;
}
