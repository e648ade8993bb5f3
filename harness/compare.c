/* The comparator: the three judgements of one element, and the poison they rest on.
 *
 * Every test asks whether the error is within the bound and takes anything else for a failure, so that a NaN on either
 * side fails. A compiler that is told that NaNs do not exist turns such tests around; this file refuses to be compiled
 * that way. It shares no code with what it judges, not even the width of a format. */
#include "compare.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compare.c must not be compiled with fast-math: a NaN would pass"
#endif

/* ---- formats ---- */

typedef enum { OVER_INF, OVER_NAN, OVER_NONE } overflow;
typedef struct {
    int precision;   /* significant bits; 0 for integers */
    int emin, emax;  /* exponents of the smallest and largest normal number, as 1.x * 2^e */
    double largest;  /* largest finite value */
    overflow beyond; /* what a value past it becomes */
    uint64_t poison; /* one element */
} format;

static const format formats[XP_NDTYPE] = {
    [XP_F64] = {53, -1022, 1023, 0x1.fffffffffffffp1023, OVER_INF, 0xfff5a5a5a5a5a5a5u},
    [XP_F32] = {24, -126, 127, 0x1.fffffep127, OVER_INF, 0xffa5a5a5u},
    [XP_BF16] = {8, -126, 127, 0x1.fep127, OVER_INF, 0xffa5u},
    [XP_F16] = {11, -14, 15, 65504.0, OVER_INF, 0xffa5u},
    [XP_E4M3] = {4, -6, 8, 448.0, OVER_NAN, 0xffu},
    [XP_E5M2] = {3, -14, 15, 57344.0, OVER_INF, 0xfdu},
    [XP_E4M3FNUZ] = {4, -7, 7, 240.0, OVER_NAN, 0x80u},
    [XP_E5M2FNUZ] = {3, -15, 15, 57344.0, OVER_NAN, 0x80u},
    [XP_E8M0] = {1, -127, 127, 0x1p127, OVER_NAN, 0xffu},
    [XP_E2M1] = {2, 0, 2, 6.0, OVER_NONE, 0x5u},
    [XP_I64] = {0, 0, 0, 0.0, OVER_NONE, 0xa5a5a5a5a5a5a5a5u},
    [XP_I32] = {0, 0, 0, 0.0, OVER_NONE, 0xa5a5a5a5u},
    [XP_U64] = {0, 0, 0, 0.0, OVER_NONE, 0xa5a5a5a5a5a5a5a5u},
    [XP_U8] = {0, 0, 0, 0.0, OVER_NONE, 0xa5u},
};
static const uint64_t judge_poison = 0xfff5a5a5a5a5a5a5u; /* formats[XP_F64].poison */

double xp_ulp(xp_dtype d, double x) {
    const format *f = &formats[d];
    int e;
    if (f->precision == 0 || isnan(x))
        return 0.0;
    x = fabs(x);
    if (x > f->largest)
        x = f->largest;
    frexp(x, &e); /* x = m 2^e with m in [1/2, 1) */
    e = x == 0.0 || e - 1 < f->emin ? f->emin : e - 1;
    return ldexp(1.0, e - f->precision + 1);
}

static const struct {
    const char *name, *meaning;
} class_table[XP_NCLASS] = {
    [XP_C_NONE] = {"none", "nothing is wrong"},
    [XP_C_BITS] = {"bits", "bits differ where the stage moves or defines bits"},
    [XP_C_BOUND] = {"bound", "an error exceeds the bound that the stage derives from its rounding points"},
    [XP_C_NAN] = {"nan", "NaN or infinity on one side only"},
    [XP_C_BIAS] = {"bias", "inside every bound, but rounded to one side: a truncating cast"},
    [XP_C_SELECT] = {"select", "an expert was chosen although one left out scores higher by more than both bounds"},
    [XP_C_TIE] = {"tie", "two experts have equal logits and the lower index did not win"},
    [XP_C_CAP] = {"cap", "more choices inside the bounds differ from the judge's than near ties can explain"},
    [XP_C_UNWRITTEN] = {"unwritten", "an output element was never written: it still holds the poison"},
    [XP_C_POISON] = {"poison", "an element beyond those in use was written"},
    [XP_C_GUARD] = {"guard", "bytes outside an operand or the workspace were written"},
    [XP_C_INPUT] = {"input", "an input changed while the row ran"},
    [XP_C_NONDET] = {"nondet", "the row claims the same bits twice and gave others"},
    [XP_C_PROPERTY] = {"property", "an identity of the stage that needs no reference does not hold"},
    [XP_C_ARG] = {"argument", "the stage refuses its arguments"},
    [XP_C_COMM] = {"collective", "ranks entered a collective with different counts, operations or order"},
    [XP_C_HANG] = {"hang", "the peers of a collective never came"},
    [XP_C_STATUS] = {"status", "the row returned an error"},
};

const char *xp_class_name(xp_class c) {
    return (unsigned)c < XP_NCLASS ? class_table[c].name : "unknown";
}

const char *xp_class_meaning(xp_class c) {
    return (unsigned)c < XP_NCLASS ? class_table[c].meaning : "unknown";
}

/* ---- poison ---- */

uint64_t xp_poison_code(xp_dtype d) {
    return formats[d].poison;
}

int xp_poison_is_sure(xp_dtype d) {
    return xp_dtype_bits(d) >= 16;
}

static void poison_row(void *base, xp_dtype d, int64_t i0, int64_t n) {
    const size_t width = (size_t)xp_dtype_bits(d) / 8;
    const uint64_t code = formats[d].poison;
    if (d == XP_E2M1) {
        memset((char *)base + i0 / 2, 0x55, xp_dtype_bytes(d, n));
        return;
    }
    char *p = (char *)base + (size_t)i0 * width;
    if (width == 1) {
        memset(p, (int)code, (size_t)n);
        return;
    }
    const size_t bytes = (size_t)n * width;
    size_t done = bytes < width ? bytes : width;
    memcpy(p, &code, done);
    for (; done < bytes; done *= 2)
        memcpy(p + done, p, bytes - done < done ? bytes - done : done);
}

void xp_poison_fill(const xp_tensor *t) {
    const int64_t n = xp_tensor_count(t);
    const int64_t row = xp_tensor_contiguous(t) || t->ndim == 0 ? n : t->dim[t->ndim - 1];
    for (int64_t i = 0; i < n; i += row)
        poison_row(t->data, t->dtype, xp_tensor_offset(t, i), row);
}

static uint8_t ws_byte(size_t i) {
    return i & 1 ? 0xff : 0xf5;
}

void xp_poison_bytes(void *p, size_t bytes) {
    uint8_t *b = p;
    size_t done = bytes < 2 ? bytes : 2;
    for (size_t i = 0; i < done; i++)
        b[i] = ws_byte(i);
    for (; done < bytes; done *= 2) /* copies of itself: workspaces may be large */
        memcpy(b + done, b, bytes - done < done ? bytes - done : done);
}

size_t xp_poison_bytes_left(const void *p, size_t bytes) {
    const uint8_t *b = p;
    size_t i = 0;
    while (i < bytes && b[i] == ws_byte(i))
        i++;
    return i;
}

/* ---- bias ---- */

void xp_bias_close(xp_bias *b) {
    free(b->seen);
    memset(b, 0, sizeof *b);
}

double xp_bias_limit(const xp_bias *b) {
    const double n = (double)b->n, shared = 0x1p-8;
    if (b->n < XP_BIAS_LEAST)
        return (double)INFINITY;
    /* P(|mean| > t) <= 2 exp(-2 n^2 t^2 / sum of range^2), solved for 1e-12. */
    return sqrt(log(2e12) * b->sum_range2 / (2.0 * n * n)) + shared;
}

static uint64_t scatter64(uint64_t v) {
    v = (v ^ v >> 32) * 0xd6e8feb86659fd93u;
    return v ^ v >> 32;
}

/* 1: key is new and now in the set; 0: it was there. The set has room. Keys are not 0. */
static int seen_add(uint64_t *seen, int64_t room, uint64_t key) {
    uint64_t at = scatter64(key) & (uint64_t)(room - 1);
    while (seen[at] != 0) {
        if (seen[at] == key)
            return 0;
        at = (at + 1) & (uint64_t)(room - 1);
    }
    seen[at] = key;
    return 1;
}

static xp_status bias_grow(xp_bias *b) {
    const int64_t room = b->room ? 2 * b->room : 1024;
    uint64_t *seen = calloc((size_t)room, sizeof *seen);
    if (!seen)
        return XP_FAIL(XP_E_NOMEM, "bias test: %lld values", (long long)room);
    for (int64_t i = 0; i < b->room; i++) {
        if (b->seen[i] != 0)
            seen_add(seen, room, b->seen[i]);
    }
    free(b->seen);
    b->seen = seen;
    b->room = room;
    return XP_OK;
}

static xp_status bias_add(xp_bias *b, xp_dtype d, double got, double ref, double tol) {
    const double ulp = xp_ulp(d, ref);
    const double units = tol / ulp;
    uint64_t key;
    if (xp_dtype_bits(d) > 16 || !(ulp > 0.0) || !(units <= 2.0) || fabs(ref) < ulp)
        return XP_OK;
    if (2 * (b->n + 1) > b->room)
        XP_TRY(bias_grow(b));
    memcpy(&key, &ref, sizeof key);
    if (!seen_add(b->seen, b->room, key))
        return XP_OK;
    const double range = units > 0.5 ? 2.0 * units : 1.0;
    const double e = (got - ref) / ulp;
    b->n++;
    b->sum += e;
    b->sum_away += ref < 0.0 ? -e : e;
    b->sum_range2 += range * range;
    return XP_OK;
}

/* ---- wrong elements ---- */

/* The nearest whole number or unit fraction up to 64 when it is within 1 %, else q. */
static double snap(double q) {
    const double a = fabs(q);
    const double n = a >= 1.0 ? floor(a + 0.5) : floor(1.0 / a + 0.5);
    if (!(n >= 1.0 && n <= 64.0))
        return q;
    const double s = a >= 1.0 ? n : 1.0 / n;
    return fabs(a - s) <= 0.01 * s ? (q < 0.0 ? -s : s) : q;
}

/* Does this wrong element have the factor of the first one? 2^-6: bf16's rounding of got and of what was expected. */
static void pattern_add(xp_diff *d, double got, double ref, double tol) {
    if (!isfinite(got) || !isfinite(ref) || ref == 0.0 || !(tol <= fabs(ref) / 16.0))
        return;
    if (d->eligible++ == 0)
        d->factor = got == 0.0 ? 0.0 : snap(got / ref);
    const double expected = d->factor * ref;
    if (fabs(got - expected) <= (1.0 + fabs(d->factor)) * tol + 0x1p-6 * fabs(expected))
        d->same++;
}

int xp_diff_pattern(const xp_diff *d) {
    if (fabs(d->factor - 1.0) <= 0x1p-6) /* wrong, but by less than the pattern's own tolerance */
        return 0;
    return d->eligible >= 2 && d->same == d->eligible && 2 * d->eligible >= d->wrong;
}

xp_class xp_diff_class(const xp_diff *d) {
    if (d->wrong == 0)
        return XP_C_NONE;
    if (d->unwritten > 0)
        return XP_C_UNWRITTEN;
    if (d->stray > 0)
        return XP_C_POISON;
    if (d->nan > 0)
        return XP_C_NAN;
    return d->bits > 0 ? XP_C_BITS : XP_C_BOUND;
}

static void wrong_at(xp_diff *d, int64_t at) {
    if (d->wrong++ == 0 || d->first_at < -1)
        d->first_at = at;
}

static void worst_is(xp_diff *d, double ratio, int64_t at) {
    if (ratio > d->ratio) {
        d->ratio = ratio;
        d->worst_at = at;
    }
}

/* ---- by bound ---- */

typedef struct {
    xp_dtype dtype; /* of got */
    int sure;       /* got's poison cannot be a result */
    uint64_t poison;
    xp_bias *bias;
    xp_diff *d;
} context;

/* A finite ref whose interval reaches the point where rounding overflows: got may be the format's overflow, on the side
 * that the interval reaches. */
static int overflows(xp_dtype d, double got, double ref, double tol) {
    const format *f = &formats[d];
    const double edge = f->beyond == OVER_NONE ? 0 : f->largest + 0.5 * xp_ulp(d, f->largest);
    if (f->beyond == OVER_INF)
        return isinf(got) && (got > 0.0 ? ref + tol >= edge : tol - ref >= edge);
    return f->beyond != OVER_NONE && isnan(got) && fabs(ref) + tol >= edge;
}

/* Everything that the quick test of bound_row did not pass. */
static void bound_slow(const context *c, uint64_t code, double got, double ref, double tol, int64_t at) {
    xp_diff *d = c->d;
    uint64_t ref_code;
    memcpy(&ref_code, &ref, sizeof ref_code);
    if (ref_code == judge_poison) {
        if (code == c->poison) {
            d->untouched++;
            return;
        }
        wrong_at(d, at);
        d->stray++;
        return;
    }
    if (isinf(tol) && tol > 0.0 && isfinite(ref) && !(c->sure && code == c->poison)) {
        d->unbounded++; /* nothing is promised here, so nothing is shown */
        return;
    }
    d->elements++;
    if (c->sure && code == c->poison) {
        wrong_at(d, at);
        d->unwritten++;
        worst_is(d, (double)INFINITY, at);
        return;
    }
    const int same = isnan(ref) ? isnan(got) : isinf(ref) ? got == ref : overflows(c->dtype, got, ref, tol);
    /* A bound that is NaN: a factor that may round to 0 met an infinity, so the contract fixes neither the infinity nor
     * the NaN. It must still not be finite. */
    const int open = isnan(tol) && !isfinite(ref) && !isfinite(got);
    if (same || open)
        return;
    d->inexact++;
    wrong_at(d, at);
    if (isfinite(got) && isfinite(ref)) {
        const double err = fabs(got - ref);
        d->bound++;
        worst_is(d, tol > 0.0 ? err / tol : (double)INFINITY, at);
        pattern_add(d, got, ref, tol);
    } else {
        d->nan++;
        worst_is(d, (double)INFINITY, at);
    }
}

static xp_status bound_row(const context *c, const xp_tensor *got, int64_t off, int64_t n, const double *ref,
                           const double *tol, int64_t at) {
    enum { CHUNK = 128 };
    xp_diff *d = c->d;
    double g[CHUNK];
    for (int64_t lo = 0; lo < n; lo += CHUNK) {
        const int64_t m = n - lo < CHUNK ? n - lo : CHUNK;
        xp_widen_row(got->data, got->dtype, off + lo, m, g);
        for (int64_t i = 0; i < m; i++) {
            const double r = ref[lo + i], t = tol[lo + i], err = fabs(g[i] - r);
            if (!(err <= t && t <= DBL_MAX)) { /* then err is finite too */
                bound_slow(c, xp_code(got->data, got->dtype, off + lo + i), g[i], r, t, at + lo + i);
                continue;
            }
            d->elements++;
            d->zeros += r == 0.0;
            d->inexact += err != 0.0;
            if (err > d->ratio * t)
                worst_is(d, err / t, at + lo + i);
            if (c->bias && c->bias->n < XP_BIAS_MOST)
                XP_TRY(bias_add(c->bias, c->dtype, g[i], r, t));
        }
    }
    return XP_OK;
}

/* ---- bit for bit ---- */

static uint64_t load(const char *p, size_t width) {
    uint64_t c = 0;
    memcpy(&c, p, width);
    return c;
}

static void bits_slow(const context *c, uint64_t code, uint64_t ref_code, double got, double ref, int64_t at) {
    xp_diff *d = c->d;
    if (c->sure && ref_code == c->poison) {
        wrong_at(d, at);
        d->stray++;
        return;
    }
    d->elements++;
    if (c->sure && code == c->poison) {
        wrong_at(d, at);
        d->unwritten++;
    } else if (isnan(got) && isnan(ref)) {
        return;
    } else {
        wrong_at(d, at);
        if (isfinite(got) && isfinite(ref)) {
            d->bits++;
            pattern_add(d, got, ref, 0.0);
        } else {
            d->nan++;
        }
    }
    d->inexact++;
    worst_is(d, (double)INFINITY, at);
}

/* n elements of `width` bytes; called with a constant width, so that each is its own loop. */
static inline void bits_row(const context *c, const char *got, const char *ref, int64_t n, size_t width, int64_t at) {
    xp_diff *d = c->d;
    const uint64_t sign = xp_dtype_is_float(c->dtype) ? (uint64_t)1 << (8 * width - 1) : 0;
    int64_t zeros = 0, untouched = 0, equal = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint64_t a = load(got + (size_t)i * width, width), b = load(ref + (size_t)i * width, width);
        if (a != b) {
            bits_slow(c, a, b, xp_widen(got, c->dtype, i), xp_widen(ref, c->dtype, i), at + i);
            continue;
        }
        equal++;
        zeros += (b & ~sign) == 0;
        untouched += c->sure && b == c->poison;
    }
    d->elements += equal - untouched;
    d->untouched += untouched;
    d->zeros += zeros;
}

/* Packed codes of half a byte, and whatever else has no loop of its own. */
static void bits_row_codes(const context *c, const xp_tensor *got, int64_t off, const xp_tensor *ref, int64_t ref_off,
                           int64_t n, int64_t at) {
    for (int64_t i = 0; i < n; i++) {
        const uint64_t a = xp_code(got->data, c->dtype, off + i), b = xp_code(ref->data, c->dtype, ref_off + i);
        if (a != b) {
            bits_slow(c, a, b, xp_widen(got->data, c->dtype, off + i), xp_widen(ref->data, c->dtype, ref_off + i),
                      at + i);
            continue;
        }
        c->d->elements++;
        c->d->zeros += xp_widen(ref->data, c->dtype, ref_off + i) == 0.0;
    }
}

static void bits_at(const context *c, const xp_tensor *got, int64_t off, const xp_tensor *ref, int64_t ref_off,
                    int64_t n, int64_t at) {
    const size_t width = (size_t)xp_dtype_bits(c->dtype) / 8;
    const char *g = (const char *)got->data + (size_t)off * width;
    const char *r = (const char *)ref->data + (size_t)ref_off * width;
    switch (c->dtype == XP_E2M1 ? 0 : width) {
    case 1:
        bits_row(c, g, r, n, 1, at);
        break;
    case 2:
        bits_row(c, g, r, n, 2, at);
        break;
    case 4:
        bits_row(c, g, r, n, 4, at);
        break;
    case 8:
        bits_row(c, g, r, n, 8, at);
        break;
    default:
        bits_row_codes(c, got, off, ref, ref_off, n, at);
    }
}

/* ---- whole tensors ---- */

static int same_shape(const xp_tensor *a, const xp_tensor *b) {
    int same = a->ndim == b->ndim;
    for (int i = 0; same && i < a->ndim; i++)
        same = a->dim[i] == b->dim[i];
    return same;
}

static xp_status check(const xp_tensor *got, const xp_tensor *ref, const xp_tensor *tol) {
    if (!same_shape(got, ref) || (tol && !same_shape(got, tol)))
        return XP_FAIL(XP_E_BUG, "compare: the judge's tensors have another shape than the judged one");
    if (tol ? ref->dtype != XP_F64 || tol->dtype != XP_F64 : ref->dtype != got->dtype)
        return XP_FAIL(XP_E_BUG, "compare: judge's value is %s, judged one %s, %s bound", xp_dtype_name(ref->dtype),
                       xp_dtype_name(got->dtype), tol ? "with a" : "without a");
    return XP_OK;
}

xp_status xp_compare(const xp_tensor *got, const xp_tensor *ref, const xp_tensor *tol, xp_bias *bias, xp_diff *io) {
    enum { NOT_YET = -2 };
    XP_TRY(check(got, ref, tol));
    const context c = {got->dtype, xp_poison_is_sure(got->dtype), xp_poison_code(got->dtype), bias, io};
    const int64_t n = xp_tensor_count(got);
    const int flat = got->ndim == 0 ||
                     (xp_tensor_contiguous(got) && xp_tensor_contiguous(ref) && (!tol || xp_tensor_contiguous(tol)));
    const int64_t row = flat ? n : got->dim[got->ndim - 1];
    io->worst_at = -1;
    io->first_at = NOT_YET;
    for (int64_t i = 0; i < n; i += row) {
        const int64_t g = xp_tensor_offset(got, i), r = xp_tensor_offset(ref, i);
        if (tol)
            XP_TRY(bound_row(&c, got, g, row, (const double *)ref->data + r,
                             (const double *)tol->data + xp_tensor_offset(tol, i), i));
        else
            bits_at(&c, got, g, ref, r, row, i);
    }
    if (io->first_at == NOT_YET)
        io->first_at = -1;
    return XP_OK;
}
