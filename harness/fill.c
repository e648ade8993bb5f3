/* Generated data: a counter-based generator and the fill kinds over it.
 *
 * Nothing here depends on rank, thread, chunk or host: a value is a function of (seed, name, global index) alone. */
#include "fill.h"

#include <math.h>
#include <string.h>

static const struct {
    const char *name, *meaning;
} kinds[XP_NDATA] = {
    [XP_DATA_REAL] = {"real", "well scaled values that use every bit of the format"},
    [XP_DATA_EXACT] = {"exact", "small integers: every order of summation gives the same bits"},
    [XP_DATA_IDENTITY] = {"identity", "each value encodes its row and column: kills every misplaced row"},
    [XP_DATA_TIES] = {"ties", "few distinct values, pairs of experts with equal logits: tests the tie rule"},
    [XP_DATA_EXTREME] = {"extreme", "subnormals, -0, huge values, an infinity and a NaN"},
    [XP_DATA_SKEW] = {"skew", "a few experts take nearly all rows, some take none"},
    [XP_DATA_TEXT] = {"text", "bytes of a real file through an embedding"},
};

const char *xp_data_name(xp_data k) {
    return (unsigned)k < XP_NDATA ? kinds[k].name : "?";
}

const char *xp_data_meaning(xp_data k) {
    return (unsigned)k < XP_NDATA ? kinds[k].meaning : "?";
}

xp_status xp_data_parse(const char *text, xp_data *out) {
    *out = XP_NDATA;
    for (int k = 0; k < XP_NDATA; k++) {
        if (strcmp(text, kinds[k].name) == 0) {
            *out = (xp_data)k;
            return XP_OK;
        }
    }
    return XP_FAIL(XP_E_ARG, "data: no fill kind is called '%s' (real exact identity ties extreme skew text)", text);
}

/* SplitMix64's finaliser (Steele, Lea, Flood 2014). */
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t key_of(uint64_t seed, uint64_t stream) {
    return mix(seed + 0x9e3779b97f4a7c15u) ^ mix(stream + 0x632be59bd9b4e019u);
}

static uint64_t draw(uint64_t key, uint64_t index) {
    return mix(key + index * 0x9e3779b97f4a7c15u);
}

uint64_t xp_rng(uint64_t seed, uint64_t stream, uint64_t index) {
    return draw(key_of(seed, stream), index);
}

uint64_t xp_rng_stream(const char *name) {
    uint64_t h = 0xcbf29ce484222325u;
    for (; *name; name++)
        h = (h ^ (uint8_t)*name) * 0x100000001b3u;
    return h;
}

/* Four uniforms of 16 bits: sum - 4 * 32767.5 has variance 4 (2^32 - 1) / 12; the factor makes it 1. */
static double normal_of(uint64_t u) {
    const double sum = (double)((u & 0xffffu) + (u >> 16 & 0xffffu) + (u >> 32 & 0xffffu) + (u >> 48)) - 131070.0;
    return sum * 2.6429125e-05;
}

double xp_rng_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    return normal_of(xp_rng(seed, stream, index));
}

double xp_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return (double)(xp_rng(seed, stream, index) >> 11) * 0x1p-53;
}

/* ---- storing ---- */

/* The narrow formats' shape: significand bits after the point, least exponent, largest value, code of an overflow. */
typedef struct {
    int man, bits, bias;
    double largest;
    uint64_t over, nan;
} narrow_row;

static int narrow_of(xp_dtype d, narrow_row *out) {
    switch (d) {
    case XP_BF16:
        *out = (narrow_row){7, 16, 127, 0x1.fep127, 0x7f80, 0x7fc0};
        return 1;
    case XP_F16:
        *out = (narrow_row){10, 16, 15, 65504.0, 0x7c00, 0x7e00};
        return 1;
    case XP_E4M3:
        *out = (narrow_row){3, 8, 7, 448.0, 0x7f, 0x7f};
        return 1;
    case XP_E5M2:
        *out = (narrow_row){2, 8, 15, 57344.0, 0x7c, 0x7e};
        return 1;
    default:
        return 0;
    }
}

static uint64_t narrow(double v, const narrow_row *r) {
    const uint64_t sign = signbit(v) ? UINT64_C(1) << (r->bits - 1) : 0;
    int e = 0;
    if (isnan(v))
        return r->nan;
    if (v == 0)
        return sign;
    v = fabs(v);
    (void)frexp(v < r->largest ? v : r->largest, &e);
    if (e - 1 < 1 - r->bias)
        e = 2 - r->bias;
    /* Units of the last place at this exponent, to nearest even: rint in the default rounding mode. */
    const double q = rint(ldexp(v < 2 * r->largest ? v : 2 * r->largest, r->man - (e - 1)));
    if (ldexp(q, e - 1 - r->man) > r->largest)
        return sign | r->over;
    const uint64_t units = (uint64_t)q, one = UINT64_C(1) << r->man;
    /* A carry into the next binade, or out of the subnormals, is what adding the fields gives. */
    return sign | (units < one ? units : ((uint64_t)(e - 1 + r->bias) << r->man) + (units - one));
}

void xp_fill_store(const xp_tensor *t, int64_t i, double v) {
    const int64_t at = xp_tensor_contiguous(t) ? i : xp_tensor_offset(t, i);
    narrow_row r;
    if (t->dtype == XP_F64) {
        ((double *)t->data)[at] = v;
    } else if (t->dtype == XP_F32) {
        ((float *)t->data)[at] = (float)v;
    } else if (narrow_of(t->dtype, &r)) {
        const uint64_t c = narrow(v, &r);
        memcpy((char *)t->data + (size_t)at * (size_t)(r.bits / 8), &c, (size_t)(r.bits / 8));
    }
}

/* ---- kinds ---- */

/* 4096 values that every format with 7 significand bits and 4 of exponent tells apart: sign, 7 bits, 4 bits. Columns of
 * a row differ when they lie less than 4096 apart, and so do the rows of a column, whatever the width: the factor is
 * odd. */
static double identity_of(uint64_t row, uint64_t column) {
    const uint64_t code = row * 1637u + column;
    const double v = ldexp(1.0 + (double)(code & 127u) / 128.0, (int)(code >> 7 & 15u) - 7);
    return code >> 11 & 1u ? -v : v;
}

/* Magnitudes of subnormals and of values near overflow; the normal factor is at most 3.5. */
static void extremes_of(xp_dtype d, double *out_tiny, double *out_huge) {
    const int tiny = d == XP_F64 ? -1060 : d == XP_F16 ? -20 : d == XP_E5M2 ? -15 : d == XP_E4M3 ? -8 : -130;
    const int most = d == XP_F64 ? 900 : d == XP_F16 || d == XP_E5M2 ? 14 : d == XP_E4M3 ? 7 : 120;
    *out_tiny = ldexp(1.0, tiny);
    *out_huge = ldexp(1.0, most);
}

static double extreme_of(uint64_t u, uint64_t index, uint64_t total, uint64_t key, const xp_tensor *t) {
    double tiny, most;
    if (total > 1 && index == draw(key, ~UINT64_C(0)) % total)
        return (double)NAN;
    if (total > 2 && index == draw(key, ~UINT64_C(1)) % total)
        return u & 1 ? (double)INFINITY : -(double)INFINITY;
    extremes_of(t->dtype, &tiny, &most);
    switch (u >> 60) {
    case 0:
        return tiny * normal_of(mix(u));
    case 1:
        return -0.0;
    case 2:
        return u & 0x80 ? most * normal_of(mix(u)) : 0.0;
    default:
        return normal_of(mix(u));
    }
}

/* What the elements of one fill share. width is the logical tensor's last dimension. */
typedef struct {
    const xp_tensor *t;
    xp_data kind;
    uint64_t key, width, total;
    double scale;
} filling;

static double value_of(const filling *f, uint64_t row, uint64_t column) {
    static const double tie[4] = {-1.0, 0.5, 0.5, 1.0};
    const uint64_t index = row * f->width + column, u = draw(f->key, index);
    switch (f->kind) {
    case XP_DATA_EXACT:
        return (double)((int)((u >> 33) % 5) - 2);
    case XP_DATA_IDENTITY:
        return identity_of(row, column);
    case XP_DATA_TIES:
        return tie[u >> 62];
    case XP_DATA_EXTREME:
        return extreme_of(u, index, f->total, f->key, f->t);
    default:
        return f->scale * normal_of(u);
    }
}

/* The global number of the tensor's local row: all dimensions but the last, flattened. */
static uint64_t row_of(const filling *f, int64_t local, const int64_t *base, const int64_t *full) {
    int64_t at[XP_MAXDIM] = {0};
    uint64_t row = 0;
    for (int d = f->t->ndim - 2; d >= 0; d--) {
        at[d] = local % f->t->dim[d];
        local /= f->t->dim[d];
    }
    for (int d = 0; d < f->t->ndim - 1; d++)
        row = row * (uint64_t)full[d] + (uint64_t)(base[d] + at[d]);
    return row;
}

/* Elements from local number i on. Most of what is generated is f32 masters: their rows are written straight. */
static void fill_row(const filling *f, int64_t i, uint64_t row, uint64_t column) {
    const xp_tensor *t = f->t;
    const int64_t width = t->ndim ? t->dim[t->ndim - 1] : 1;
    float *straight = t->dtype == XP_F32 ? (float *)t->data + xp_tensor_offset(t, i) : NULL;
    for (int64_t j = 0; straight && j < width; j++)
        straight[j] = (float)value_of(f, row, column + (uint64_t)j);
    for (int64_t j = 0; !straight && j < width; j++)
        xp_fill_store(t, i + j, value_of(f, row, column + (uint64_t)j));
}

xp_status xp_fill_tensor(const xp_tensor *t, xp_data kind, uint64_t seed, const char *name, const int64_t *base,
                         const int64_t *full, double scale) {
    narrow_row unused;
    if (t->dtype != XP_F64 && t->dtype != XP_F32 && !narrow_of(t->dtype, &unused))
        return XP_FAIL(XP_E_ARG,
                       "fill: '%s' has dtype %s, which the generator does not make (f64 f32 bf16 f16 e4m3 e5m2)", name,
                       xp_dtype_name(t->dtype));
    const int last = t->ndim - 1;
    filling f = {t, kind, key_of(seed, xp_rng_stream(name)), t->ndim ? (uint64_t)full[last] : 1, 1, scale};
    for (int d = 0; d < t->ndim; d++)
        f.total *= (uint64_t)full[d];
    const int64_t count = xp_tensor_count(t), width = t->ndim ? t->dim[last] : 1;
    const uint64_t column = t->ndim ? (uint64_t)base[last] : 0;
    for (int64_t i = 0; i < count; i += width)
        fill_row(&f, i, row_of(&f, i / width, base, full), column);
    return XP_OK;
}
