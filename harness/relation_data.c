/* Numbers with the properties that relations.h states, and changed copies of them.
 *
 * Exact: token t is 1 in column t of x, so column t of the router holds t's logits: two experts that count, powers of
 * two (but for the sparsemixer), all others at -256, where every score is 0 in f32. Any other column of x, and of dy,
 * has two tokens; the experts' matrices have one or two numbers in a row or column. An expert is chosen by two tokens
 * at most. So a sum over tokens, experts or widths has two terms that are not exact, at most, and a sum of two does not
 * hang on their order. The experts' biases alone fill whole rows, and no sum runs along those. */
#include "relation_data.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fill.h"

enum {
    H = 32,
    F = 16,       /* of exact numbers, also S */
    EXACT_T = 16, /* also E, and the period of columns */
    EXACT_RANKS = 4,
    REAL_T = 24,
    REAL_E = 24,
    REAL_F = 8, /* also S */
    REAL_RANKS = 3,
    REAL_IDS = 8
};

/* ---- memory ---- */

static xp_status take(xp_relation_data *x, xp_dtype d, int ndim, const int64_t *dim, xp_tensor *out) {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= dim[i];
    const size_t bytes = (xp_dtype_bytes(d, n) + 64) / 64 * 64;
    void *p = x->blocks < (int)(sizeof x->block / sizeof *x->block) ? aligned_alloc(64, bytes) : NULL;
    if (!p)
        return XP_FAIL(XP_E_NOMEM, "relations: %zu bytes", bytes);
    memset(p, 0, bytes);
    x->block[x->blocks++] = p;
    *out = xp_tensor_of(p, d, ndim, dim);
    return XP_OK;
}

static xp_status take3(xp_relation_data *x, xp_dtype d, int ndim, int64_t n0, int64_t n1, int64_t n2, xp_tensor *out) {
    const int64_t dim[] = {n0, n1, n2};
    return take(x, d, ndim, dim, out);
}

void xp_relation_data_close(xp_relation_data *x) {
    for (int i = 0; i < x->blocks; i++)
        free(x->block[i]);
    x->blocks = 0;
}

/* ---- sizes ---- */

static xp_status open_tensors(xp_relation_data *x, xp_dtype act) {
    xp_chain_in *in = &x->in;
    const xp_dialect *d = in->d;
    const int64_t U = d->gated ? 2 * in->F : in->F, X = d->gated ? 2 * in->S : in->S;
    XP_TRY(take3(x, act, 2, in->T, H, 1, &in->x));
    XP_TRY(take3(x, act, 2, in->T, H, 1, &in->dy));
    XP_TRY(take3(x, act, 2, in->Z, H, 1, &in->wr));
    XP_TRY(take3(x, act, 3, in->E, U, H, &in->w1));
    XP_TRY(take3(x, act, 3, in->E, H, in->F, &in->w2));
    XP_TRY(take3(x, act, 2, X, H, 1, &in->sw1));
    XP_TRY(take3(x, act, 2, H, in->S, 1, &in->sw2));
    if (d->shared_gate)
        XP_TRY(take3(x, act, 2, 1, H, 1, &in->sgate));
    if (d->router_bias)
        XP_TRY(take3(x, act, 1, in->Z, 1, 1, &in->rbias));
    if (d->select_bias)
        XP_TRY(take3(x, XP_F32, 1, in->Z, 1, 1, &in->bias));
    if (d->expert_scale)
        XP_TRY(take3(x, XP_F32, 1, xp_dialect_factors(d, in->E), 1, 1, &in->scale_e));
    if (d->expert_bias) {
        XP_TRY(take3(x, act, 2, in->E, U, 1, &in->b1));
        XP_TRY(take3(x, act, 2, in->E, H, 1, &in->b2));
    }
    if (d->select_on == XP_ON_TOKEN_TABLE) {
        XP_TRY(take3(x, XP_I32, 1, in->T, 1, 1, &in->token));
        XP_TRY(take3(x, XP_I32, 2, in->T, in->K, 1, &in->table));
    }
    return XP_OK;
}

/* ---- exact numbers ---- */

static void put(const xp_tensor *t, int64_t i, int64_t j, double v) {
    xp_fill_store(t, i * t->dim[t->ndim - 1] + j, v);
}

static uint64_t noise(const char *name, int64_t i) {
    return xp_rng(1, xp_rng_stream(name), (uint64_t)i) >> 11;
}

/* A power of two from 1/4 to 1, of either sign. */
static double power(const char *name, int64_t i) {
    const uint64_t n = noise(name, i);
    return ldexp(n & 1 ? 1.0 : -1.0, -(int)(n / 2 % 3));
}

/* 1 to 8 steps, of either sign. */
static double number(const char *name, int64_t i, double step) {
    const uint64_t n = noise(name, i);
    return step * (double)(1 + n / 2 % 8) * (n & 1 ? 1.0 : -1.0);
}

/* The two experts that count for token t. */
static void exact_pair(const xp_chain_in *in, int64_t t, int64_t *first, int64_t *second) {
    *first = t;
    *second = (t + 5) % in->E;
    if (in->d->null_experts > 0 && t % 4 == 3)
        *second = in->E + t / 4 % in->d->null_experts;
}

static double upper(const xp_chain_in *in, int64_t t) {
    return in->d->score == XP_SCORE_SPARSEMIXER ? 8.0 : t % 2 ? 1.0 : 0.5;
}

/* The sparsemixer leaves an expert in when it is 2 % below the best: every other token has one. */
static double lower(const xp_chain_in *in, int64_t t) {
    if (in->d->score == XP_SCORE_SPARSEMIXER)
        return t % 2 ? 7.0 : 7.875;
    return t % 3 ? -0.25 : -0.5;
}

/* Shared experts count for every token, behind the two: their terms of a sum come last, in one order. */
static void shared_logits(xp_chain_in *in, int64_t t) {
    for (int64_t j = 0; j < in->d->shared_rows; j++)
        put(&in->wr, in->Z - in->d->shared_rows + j, t, (t + j) % 2 ? 0.25 : -0.5);
}

static void exact_router(xp_chain_in *in) {
    for (int64_t t = 0; t < in->T; t++) {
        int64_t first, second;
        exact_pair(in, t, &first, &second);
        for (int64_t e = 0; e < in->Z; e++)
            put(&in->wr, e, t, -256.0);
        put(&in->wr, first, t, upper(in, t));
        put(&in->wr, second, t, lower(in, t));
        shared_logits(in, t);
        for (int64_t k = 0; in->table.data && k < in->K; k++)
            ((int32_t *)in->table.data)[t * in->K + k] = (int32_t)(k ? second : first);
    }
    for (int64_t e = 0; e < in->Z; e++) {
        for (int64_t h = EXACT_T; h < H; h++)
            put(&in->wr, e, h, noise("router", e * H + h) & 1 ? 0x1p-7 : -0x1p-7);
    }
}

/* The first of the two experts of equal score for token t. */
static int64_t twins_of(const xp_chain_in *in, int64_t t) {
    return 2 * (t % (in->E / 2));
}

/* Tokens of the first half have twins as their two experts, the others one expert and a pair of twins below it. */
static void ties_router(xp_chain_in *in) {
    for (int64_t t = 0; t < in->T; t++) {
        const int64_t twins = twins_of(in, t), best = (twins + 6) % in->E;
        const int both = t < in->T / 2;
        for (int64_t e = 0; e < in->Z; e++)
            put(&in->wr, e, t, -256.0);
        put(&in->wr, twins, t, both ? upper(in, t) : lower(in, t));
        put(&in->wr, twins + 1, t, both ? upper(in, t) : lower(in, t));
        if (!both)
            put(&in->wr, best, t, upper(in, t));
        shared_logits(in, t);
    }
}

/* Twins have the same biases. */
static void exact_vectors(xp_chain_in *in, int twins) {
    for (int64_t e = 0; e < in->Z; e++) {
        const int64_t i = twins ? e / 2 : e;
        if (in->rbias.data)
            put(&in->rbias, 0, e, noise("router bias", i) & 1 ? 0x1p-6 : -0x1p-6);
        if (in->bias.data)
            put(&in->bias, 0, e, (double)(noise("bias", i) % 5) * 0x1p-8 - 0x1p-7);
        if (in->scale_e.data && e < in->scale_e.dim[0])
            put(&in->scale_e, 0, e, fabs(power("expert scale", i)));
    }
}

static void exact_tokens(xp_chain_in *in) {
    for (int64_t t = 0; t < in->T; t++) {
        const int64_t c = (t + 5) % EXACT_T;
        put(&in->x, t, t, 1.0);
        put(&in->x, t, EXACT_T + t, power("x", t));
        put(&in->x, t, EXACT_T + (t + 13) % EXACT_T, power("x", EXACT_T + t));
        put(&in->dy, t, t + t % 2 * EXACT_T, number("dy", t, 0.125));
        put(&in->dy, t, c + c % 2 * EXACT_T, number("dy", EXACT_T + t, 0.125));
        if (in->token.data)
            ((int32_t *)in->token.data)[t] = (int32_t)t;
    }
}

/* Column of the activation that row u of a first matrix belongs to. */
static int64_t column_of(const xp_dialect *d, int64_t u, int64_t width) {
    return d->gated && d->gate_layout == XP_GATE_INTERLEAVED ? u / 2 : u % width;
}

/* w1 meets activation f in columns f and f + 16 (those below `columns`), w2 row h in activations h and h + 1. */
static void exact_expert(const xp_dialect *d, const char *name, int64_t e, const xp_tensor *w1, int64_t columns,
                         const xp_tensor *w2) {
    for (int64_t u = 0; u < w1->dim[w1->ndim - 2]; u++) {
        const int64_t row = e * w1->dim[w1->ndim - 2] + u;
        for (int64_t h = column_of(d, u, F); h < columns; h += F)
            put(w1, row, h, number(name, row * H + h, 0.25));
    }
    for (int64_t h = 0; h < H; h++) {
        const int64_t row = e * H + h;
        put(w2, row, h % F, number(name, -1 - 2 * row, 0.125));
        put(w2, row, (h + 1) % F, number(name, -2 - 2 * row, 0.125));
    }
}

static void exact_weights(xp_chain_in *in) {
    for (int64_t e = 0; e < in->E; e++)
        exact_expert(in->d, "experts", e, &in->w1, H, &in->w2);
    exact_expert(in->d, "shared", 0, &in->sw1, F, &in->sw2);
    for (int64_t h = F; in->sgate.data && h < H; h++)
        put(&in->sgate, 0, h, number("shared gate", h, 0.125));
    for (int64_t i = 0; in->b1.data && i < xp_tensor_count(&in->b1); i++)
        xp_fill_store(&in->b1, i, number("b1", i, 1.0 / 16));
    for (int64_t i = 0; in->b2.data && i < xp_tensor_count(&in->b2); i++)
        xp_fill_store(&in->b2, i, number("b2", i, 1.0 / 16));
}

static void exact_fill(xp_chain_in *in, int twins) {
    exact_tokens(in);
    exact_vectors(in, twins);
    exact_weights(in);
    if (twins)
        ties_router(in);
    else
        exact_router(in);
}

/* ---- real numbers ---- */

static xp_status real(const xp_tensor *t, const char *name, double scale) {
    static const int64_t base[XP_MAXDIM] = {0};
    return t->data ? xp_fill_tensor(t, XP_DATA_REAL, 1, name, base, t->dim, scale) : XP_OK;
}

static xp_status real_fill(xp_chain_in *in) {
    const double per_h = 1.0 / sqrt(H), per_f = 1.0 / sqrt(REAL_F);
    XP_TRY(real(&in->x, "x", 1.0));
    XP_TRY(real(&in->dy, "dy", 1.0));
    XP_TRY(real(&in->wr, "router", 1.5 * per_h));
    XP_TRY(real(&in->rbias, "router bias", 0.25));
    XP_TRY(real(&in->bias, "bias", 0.05));
    XP_TRY(real(&in->scale_e, "expert scale", 1.0));
    XP_TRY(real(&in->w1, "w1", 2.5 * per_h));
    XP_TRY(real(&in->w2, "w2", per_f));
    XP_TRY(real(&in->b1, "b1", 0.5));
    XP_TRY(real(&in->b2, "b2", 0.5));
    XP_TRY(real(&in->sw1, "sw1", 2.5 * per_h));
    XP_TRY(real(&in->sw2, "sw2", per_f));
    XP_TRY(real(&in->sgate, "sgate", per_h));
    for (int64_t t = 0; in->token.data && t < in->T; t++)
        ((int32_t *)in->token.data)[t] = (int32_t)(t * 5 % REAL_IDS);
    for (int64_t i = 0; in->table.data && i < xp_tensor_count(&in->table); i++)
        ((int32_t *)in->table.data)[i] = (int32_t)(i * 7 % in->E);
    return XP_OK;
}

/* ---- all of it ---- */

xp_status xp_relation_data_open(const xp_dialect *d, xp_numbers kind, xp_relation_data *out) {
    const int is_real = kind == XP_NUMBERS_REAL || kind == XP_NUMBERS_REAL_F32;
    memset(out, 0, sizeof *out);
    out->ranks = is_real ? REAL_RANKS : EXACT_RANKS;
    out->in = (xp_chain_in){.d = d, .T = EXACT_T, .H = H, .E = EXACT_T, .K = 2, .F = F, .S = F};
    if (is_real) {
        out->in.T = REAL_T;
        out->in.E = REAL_E;
        out->in.F = out->in.S = REAL_F;
        out->in.K = d->score == XP_SCORE_SPARSEMIXER ? 2 : 4;
    }
    out->in.Z = xp_dialect_rows(d, out->in.E);
    if (out->in.Z > XP_RELATION_EXPERTS)
        return XP_FAIL(XP_E_ARG, "%s: %d, expected at most %lld here",
                       d->shared_rows > 0 ? "shared_rows" : "null_experts", d->null_experts + d->shared_rows,
                       (long long)(XP_RELATION_EXPERTS - out->in.E));
    XP_TRY(xp_dialect_check(d, out->in.E, out->in.K));
    XP_TRY(open_tensors(out, kind == XP_NUMBERS_REAL_F32 ? XP_F32 : XP_BF16));
    if (is_real)
        return real_fill(&out->in);
    exact_fill(&out->in, kind == XP_NUMBERS_TIES);
    return XP_OK;
}

/* ---- changes ---- */

static int32_t mapped(const xp_relation_map *m, int32_t e) {
    return m->expert ? m->expert[e] : e;
}

/* Rows of t, of dimension 0, to the places that the map gives them. */
static xp_status copy_rows(xp_relation_data *x, const xp_tensor *t, const int *at, int64_t rows, int gather,
                           xp_tensor *out) {
    int64_t dim[XP_MAXDIM];
    if (!t->data)
        return XP_OK;
    memcpy(dim, t->dim, sizeof dim);
    dim[0] = rows;
    const size_t row = xp_dtype_bytes(t->dtype, xp_tensor_count(t) / t->dim[0]);
    XP_TRY(take(x, t->dtype, t->ndim, dim, out));
    for (int64_t i = 0; i < rows; i++) {
        const int64_t other = at ? at[i] : i, from = gather ? other : i, to = gather ? i : other;
        memcpy((char *)out->data + (size_t)to * row, (const char *)t->data + (size_t)from * row, row);
    }
    return XP_OK;
}

static xp_status copy_ids(xp_relation_data *x, const xp_tensor *t, const xp_relation_map *m, const int *rows, int64_t n,
                          xp_tensor *out) {
    XP_TRY(copy_rows(x, t, rows, n, 1, out));
    for (int64_t i = 0; t->data && i < xp_tensor_count(out); i++)
        ((int32_t *)out->data)[i] = mapped(m, ((int32_t *)out->data)[i]);
    return XP_OK;
}

xp_status xp_relation_data_copy(const xp_relation_data *from, const xp_relation_map *m, xp_relation_data *out) {
    const xp_chain_in *in = &from->in;
    memset(out, 0, sizeof *out);
    out->in = *in; /* what is not copied below is shared: from outlives the copy */
    out->ranks = from->ranks;
    out->in.T = m->token ? m->tokens : in->T;
    XP_TRY(copy_rows(out, &in->x, m->token, out->in.T, 1, &out->in.x));
    XP_TRY(copy_rows(out, &in->dy, m->token, out->in.T, 1, &out->in.dy));
    XP_TRY(copy_rows(out, &in->token, m->token, out->in.T, 1, &out->in.token));
    XP_TRY(copy_ids(out, &in->replay, m, m->token, out->in.T, &out->in.replay));
    XP_TRY(copy_ids(out, &in->table, m, NULL, in->table.dim[0], &out->in.table));
    XP_TRY(copy_rows(out, &in->wr, m->expert, in->Z, 0, &out->in.wr));
    XP_TRY(copy_rows(out, &in->rbias, m->expert, in->Z, 0, &out->in.rbias));
    XP_TRY(copy_rows(out, &in->bias, m->expert, in->Z, 0, &out->in.bias));
    if (in->d->expert_scale == XP_FACTOR_EACH)
        XP_TRY(copy_rows(out, &in->scale_e, m->expert, in->Z, 0, &out->in.scale_e));
    XP_TRY(copy_rows(out, &in->w1, m->expert, in->E, 0, &out->in.w1));
    XP_TRY(copy_rows(out, &in->w2, m->expert, in->E, 0, &out->in.w2));
    XP_TRY(copy_rows(out, &in->b1, m->expert, in->E, 0, &out->in.b1));
    return copy_rows(out, &in->b2, m->expert, in->E, 0, &out->in.b2);
}

void xp_relation_data_scale(xp_relation_data *x, double factor) {
    const xp_tensor *dy = &x->in.dy;
    for (int64_t i = 0; i < xp_tensor_count(dy); i++)
        xp_fill_store(dy, i, factor * xp_widen(dy->data, dy->dtype, i));
}

void xp_relation_shuffle(int64_t n, uint64_t seed, int *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = (int)i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)(xp_rng(seed, xp_rng_stream("order"), (uint64_t)i) % (uint64_t)(i + 1));
        const int kept = out[i];
        out[i] = out[j];
        out[j] = kept;
    }
}

void xp_relation_experts(const xp_chain_in *in, int *out) {
    int group[XP_RELATION_EXPERTS], member[XP_RELATION_EXPERTS];
    const int groups = in->d->group_reduce == XP_GROUP_NONE ? 1 : in->d->n_group, size = (int)in->E / groups;
    xp_relation_shuffle(groups, 1, group);
    for (int g = 0; g < groups; g++) {
        xp_relation_shuffle(size, (uint64_t)(2 + g), member);
        for (int i = 0; i < size; i++)
            out[g * size + i] = group[g] * size + member[i];
    }
    for (int64_t e = in->E; e < in->Z; e++)
        out[e] = (int)e;
}

int xp_relation_twin(const xp_chain_in *in, int64_t t, int e) {
    return e / 2 == twins_of(in, t) / 2 ? e ^ 1 : e;
}
