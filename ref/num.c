/* Numbers of the reference: see num.h for the meaning of every function.
 *
 * Written from IEEE 754 operations and bit patterns only, so that a host's libm, its FMA units and its compiler's
 * contraction cannot change a bit of the reference. Must not call a libm transcendental, allocate, or keep state. */
#include "num.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "the reference needs IEEE arithmetic: build without -ffast-math"
#endif
#if FLT_EVAL_METHOD != 0
#error "the reference needs double arithmetic without extended precision"
#endif

#define F64_SIGN 0x8000000000000000u
#define F64_INF 0x7FF0000000000000u

static uint64_t bits_of(double v) {
    uint64_t b;
    memcpy(&b, &v, sizeof b);
    return b;
}

static double of_bits(uint64_t b) {
    double v;
    memcpy(&v, &b, sizeof v);
    return v;
}

static float f32_of_bits(uint32_t b) {
    float v;
    memcpy(&v, &b, sizeof v);
    return v;
}

/* ---- narrowing ---- */

/* man: stored significand bits; emin: exponent of the smallest normal; max: code of the largest finite magnitude;
 * over: code for a magnitude beyond max (before the sign); nan: code for NaN; sign: the sign bit, 0 when the format's
 * special codes carry none. */
typedef struct {
    int man, emin;
    uint64_t max, over, nan, sign;
} format;

static const format formats[XP_NDTYPE] = {
    [XP_F32] = {23, -126, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x80000000},
    [XP_BF16] = {7, -126, 0x7F7F, 0x7F80, 0x7FC0, 0x8000},
    [XP_F16] = {10, -14, 0x7BFF, 0x7C00, 0x7E00, 0x8000},
    [XP_E4M3] = {3, -6, 0x7E, 0x7F, 0x7F, 0x80},
    [XP_E5M2] = {2, -14, 0x7B, 0x7C, 0x7E, 0x80},
    [XP_E4M3FNUZ] = {3, -7, 0x7F, 0x80, 0x80, 0x80},
    [XP_E5M2FNUZ] = {2, -15, 0x7F, 0x80, 0x80, 0x80},
    [XP_E2M1] = {1, 0, 0x7, 0x7, 0x7, 0x8},
};

/* m / 2^shift to nearest, ties to even. */
static uint64_t shift_rne(uint64_t m, int shift) {
    if (shift <= 0)
        return m << -shift;
    if (shift > 63)
        return 0; /* m < 2^63 always here, so m / 2^64 is below one half */
    const uint64_t half = (uint64_t)1 << (shift - 1);
    const uint64_t q = m >> shift, rest = m & ((half << 1) - 1);
    return q + (rest > half || (rest == half && (q & 1)));
}

/* The code of a finite non-negative double as if the format had no largest value: the exponent field simply goes on,
 * and a significand that rounds up to the next power of two carries into it. */
static uint64_t magnitude_code(uint64_t mag, const format *f) {
    if (mag < ((uint64_t)1 << 52))
        return 0; /* a subnormal double is far below half the smallest value of every narrower format */
    const int e = (int)(mag >> 52) - 1023;
    const uint64_t m = (mag & (((uint64_t)1 << 52) - 1)) | ((uint64_t)1 << 52);
    const int step = e > f->emin ? e : f->emin; /* exponent whose last place is the rounding unit */
    return shift_rne(m, 52 - f->man + (step - e)) + ((uint64_t)(step - f->emin) << f->man);
}

/* 2^(code-127). A tie, 1.5 * 2^k, goes up: adding half carries into the exponent. num.h says what is odd at 2^-127. */
static uint64_t narrow_e8m0(double v, int saturate) {
    const uint64_t b = bits_of(v), mag = b & ~F64_SIGN;
    if (mag > F64_INF || (mag != 0 && b != mag))
        return 0xFF;
    if (mag == 0)
        return saturate ? 0x00 : 0xFF;
    if (mag <= (uint64_t)(1023 - 127) << 52)
        return 0x00;
    const uint64_t nearest = (mag - ((uint64_t)(1023 - 127) << 52) + ((uint64_t)1 << 51)) >> 52;
    const uint64_t code = nearest ? nearest : 1; /* nothing but 2^-127 and what is below it has code 0 */
    if (mag == F64_INF || code > 0xFE)
        return saturate ? 0xFE : 0xFF;
    return code;
}

uint64_t xp_ref_narrow(double v, xp_dtype d, int saturate) {
    assert(xp_dtype_is_float(d));
    const uint64_t b = bits_of(v), mag = b & ~F64_SIGN;
    const int is_nan = mag > F64_INF;
    if (d == XP_F64)
        return saturate && mag == F64_INF ? b - 1 : b; /* the code below infinity is the largest finite one */
    if (d == XP_E8M0)
        return narrow_e8m0(v, saturate);
    const format *f = &formats[d];
    const uint64_t sign = (b & F64_SIGN) ? f->sign : 0;
    if (is_nan)
        return d == XP_E2M1 ? f->nan : f->nan | sign;
    uint64_t code = mag == F64_INF ? f->max + 1 : magnitude_code(mag, f);
    if (code > f->max)
        return (saturate ? f->max : f->over) | sign;
    if (code == 0 && f->nan == f->sign)
        return 0; /* fnuz: the code of -0 is the NaN */
    return code | sign;
}

void xp_ref_put(void *base, xp_dtype d, int64_t i, uint64_t code) {
    switch (xp_dtype_bits(d)) {
    case 64:
        ((uint64_t *)base)[i] = code;
        break;
    case 32:
        ((uint32_t *)base)[i] = (uint32_t)code;
        break;
    case 16:
        ((uint16_t *)base)[i] = (uint16_t)code;
        break;
    case 8:
        ((uint8_t *)base)[i] = (uint8_t)code;
        break;
    default: {
        uint8_t *p = (uint8_t *)base + i / 2;
        const int odd = (int)(i & 1);
        *p = (uint8_t)(odd ? (*p & 0x0Fu) | (code & 0xFu) << 4 : (*p & 0xF0u) | (code & 0xFu));
    }
    }
}

/* bf16 has f32's exponents, so in its normal range the rounded code is an add and a shift. 896 is the difference of
 * the two exponent biases, 45 of the significand widths. Out of that range (zero, subnormal, NaN, 2^128 and beyond)
 * the general path decides; a sum that carries into 2^128 gives the code of infinity by itself. */
static uint16_t bf16_of(double v) {
    const uint64_t b = bits_of(v), mag = b & ~F64_SIGN;
    const uint64_t lo = (uint64_t)897 << 52, span = (uint64_t)254 << 52;
    if (mag - lo >= span)
        return mag == 0 ? (uint16_t)(b >> 48) : (uint16_t)xp_ref_narrow(v, XP_BF16, 0);
    const uint64_t even = (mag >> 45) & 1;
    const uint64_t code = (mag - ((uint64_t)896 << 52) + 0x0FFFFFFFFFFFu + even) >> 45;
    return (uint16_t)(code | (b >> 48 & 0x8000u));
}

static double bf16_value(uint16_t code) {
    return (double)f32_of_bits((uint32_t)code << 16);
}

void xp_ref_store(void *base, xp_dtype d, int64_t i, double v) {
    if (d == XP_F32)
        ((float *)base)[i] = (float)v;
    else if (d == XP_BF16)
        ((uint16_t *)base)[i] = bf16_of(v);
    else if (d == XP_F64)
        ((double *)base)[i] = v;
    else
        xp_ref_put(base, d, i, xp_ref_narrow(v, d, 0));
}

void xp_ref_store_row(void *base, xp_dtype d, int64_t i0, int64_t n, const double *v) {
    if (d == XP_F32) {
        float *out = (float *)base + i0;
        for (int64_t i = 0; i < n; i++)
            out[i] = (float)v[i];
    } else if (d == XP_BF16) {
        uint16_t *out = (uint16_t *)base + i0;
        for (int64_t i = 0; i < n; i++)
            out[i] = bf16_of(v[i]);
    } else if (d == XP_F64) {
        memmove((double *)base + i0, v, (size_t)n * sizeof *v);
    } else {
        for (int64_t i = 0; i < n; i++)
            xp_ref_put(base, d, i0 + i, xp_ref_narrow(v[i], d, 0));
    }
}

double xp_ref_round(double v, xp_dtype d) {
    if (d == XP_F64)
        return v;
    if (d == XP_F32)
        return (double)(float)v;
    if (d == XP_BF16)
        return bf16_value(bf16_of(v));
    uint64_t word = 0;
    xp_ref_put(&word, d, 0, xp_ref_narrow(v, d, 0));
    return xp_widen(&word, d, 0);
}

void xp_ref_round_row(xp_dtype d, int64_t n, double *v) {
    if (d == XP_F64)
        return;
    if (d == XP_F32) {
        for (int64_t i = 0; i < n; i++)
            v[i] = (double)(float)v[i];
    } else {
        for (int64_t i = 0; i < n; i++)
            v[i] = xp_ref_round(v[i], d);
    }
}

/* ---- elementary functions ---- */

/* ln 2 in two parts: the first has 32 significant bits, so k * LN2_HI is exact for every exponent k. */
#define LN2_HI 0x1.62e42fee00000p-1
#define LN2_LO 0x1.a39ef35793c76p-33
#define INV_LN2 0x1.71547652b82fep+0

/* x * 2^k; one rounding, and only when the result is subnormal or overflows. |x| in [2^-60, 2^60]. */
static double scale2(double x, int k) {
    if (k > 1000)
        return x * 0x1p1000 * of_bits((uint64_t)(k - 1000 + 1023) << 52);
    if (k < -900) /* the first product stays normal, so only the second one rounds */
        return x * of_bits((uint64_t)(k + 200 + 1023) << 52) * 0x1p-200;
    return x * of_bits((uint64_t)(k + 1023) << 52);
}

/* x = k ln 2 + r, |r| <= 0.35: returns k and expm1(r). |x| < 800.
 * r is kept as a sum of two doubles, since its rounding error would reach the result whole. The series runs to
 * r^14/14!, whose first dropped term is below 2^-60 of r; even and odd terms go separately, for speed. */
static double expm1_reduced(double x, int *out_k) {
    const int k = (int)(x * INV_LN2 + (x < 0.0 ? -0.5 : 0.5));
    const double kd = (double)k;
    const double hi = x - kd * LN2_HI, lo = kd * LN2_LO;
    const double r = hi - lo, tail = (hi - r) - lo;
    const double z = r * r;
    const double even =
        1.0 / 2.0 +
        z * (1.0 / 24.0 +
             z * (1.0 / 720.0 +
                  z * (1.0 / 40320.0 + z * (1.0 / 3628800.0 + z * (1.0 / 479001600.0 + z * (1.0 / 87178291200.0))))));
    const double odd =
        1.0 / 6.0 + z * (1.0 / 120.0 +
                         z * (1.0 / 5040.0 + z * (1.0 / 362880.0 + z * (1.0 / 39916800.0 + z * (1.0 / 6227020800.0)))));
    *out_k = k;
    return r + (tail + (z * even + r * z * odd));
}

double xp_ref_exp(double x) {
    int k;
    if (x != x)
        return x;
    if (x > 710.0)
        return (double)INFINITY;
    if (x < -746.0)
        return 0.0;
    const double p = expm1_reduced(x, &k);
    return scale2(1.0 + p, k);
}

double xp_ref_expm1(double x) {
    int k;
    if (x != x || fabs(x) < 0x1p-54)
        return x;
    if (x > 710.0)
        return (double)INFINITY;
    if (x < -40.0)
        return -1.0; /* e^-40 is below a quarter of 2^-53 */
    const double p = expm1_reduced(x, &k);
    if (k == 0)
        return p;
    if (k > 53)
        return scale2(1.0 + p, k); /* the 1 to subtract is below half a unit, and 1 + p is already rounded there */
    return scale2(p, k) + (scale2(1.0, k) - 1.0); /* 2^k - 1 is exact for -53 <= k <= 53 */
}

/* log(2^k (1 + f)), 1 + f in [sqrt(1/2), sqrt 2), f exact. With s = f / (2 + f):
 * log(1 + f) = 2 atanh(s) = 2 s + s R(s^2) and 2 s = f - s f, which leaves f, the largest term, unrounded. */
static double log_parts(int k, double f) {
    const double s = f / (2.0 + f), z = s * s, w = z * z;
    /* R(z) = 2 z/3 + 2 z^2/5 + ...; z < 0.0295, the first dropped term is below 2^-59 of the leading one */
    const double even = 2.0 / 5.0 + w * (2.0 / 9.0 + w * (2.0 / 13.0 + w * (2.0 / 17.0 + w * (2.0 / 21.0))));
    const double odd =
        2.0 / 3.0 + w * (2.0 / 7.0 + w * (2.0 / 11.0 + w * (2.0 / 15.0 + w * (2.0 / 19.0 + w * (2.0 / 23.0)))));
    const double rest = s * (f - (z * odd + w * even));
    const double kd = (double)k;
    return kd * LN2_HI + (f - (rest - kd * LN2_LO));
}

double xp_ref_log(double x) {
    if (x != x || x == (double)INFINITY)
        return x;
    if (x <= 0.0)
        return x == 0.0 ? -(double)INFINITY : (double)NAN;
    int k = 0;
    if (x < DBL_MIN) {
        x *= 0x1p54;
        k = -54;
    }
    /* The offset makes the exponent field step at sqrt 2 instead of at 2; 1024 keeps the difference positive. */
    const uint64_t b = bits_of(x), root = bits_of(0x1.6a09e667f3bcdp-1);
    const int step = (int)((b - root + ((uint64_t)1024 << 52)) >> 52) - 1024;
    return log_parts(k + step, of_bits(b - ((uint64_t)(int64_t)step << 52)) - 1.0);
}

double xp_ref_log1p(double x) {
    if (x != x || x == (double)INFINITY || fabs(x) < 0x1p-54)
        return x;
    if (x <= -1.0)
        return x == -1.0 ? -(double)INFINITY : (double)NAN;
    const double u = 1.0 + x;
    const double lost = fabs(x) < 1.0 ? x - (u - 1.0) : 1.0 - (u - x); /* exact: what the sum rounded away */
    return xp_ref_log(u) + lost / u;
}

double xp_ref_sigmoid(double x) {
    if (x >= 0.0)
        return 1.0 / (1.0 + xp_ref_exp(-x));
    const double e = xp_ref_exp(x);
    return e / (1.0 + e);
}

double xp_ref_silu(double x) {
    int k;
    if (!(x < -40.0) || x < -760.0)
        return x * xp_ref_sigmoid(x);
    /* 1 + e^x is 1 here, and x e^x may be normal where e^x alone is not: scale last */
    const double p = expm1_reduced(x, &k);
    return scale2(x * (1.0 + p), k);
}

double xp_ref_softplus(double x) {
    return x > 0.0 ? x + xp_ref_log1p(xp_ref_exp(-x)) : xp_ref_log1p(xp_ref_exp(x));
}

double xp_ref_tanh(double x) {
    const double a = fabs(x);
    if (x != x || a < 0x1p-28)
        return x; /* x - x^3/3 rounds to x within a third of a unit */
    if (a > 20.0)
        return x < 0.0 ? -1.0 : 1.0; /* 1 - 2 e^-40 */
    const double t = xp_ref_expm1(2.0 * a), y = t / (t + 2.0);
    return x < 0.0 ? -y : y;
}

/* exp(-a^2) with the square's rounding error carried: a = h + l with 26 bits in h, so that h h is exact. */
static double exp_minus_square(double a) {
    const double h = (double)(float)a, l = a - h;
    const double sq = a * a, err = ((h * h - sq) + 2.0 * h * l) + l * l;
    return xp_ref_exp(-sq) * (1.0 - err);
}

/* a < 1: erf(a) = 2/sqrt(pi) (a - a^3/3 + a^5/(2! 5) - ...), 20 terms, the last below 2^-65. Beyond, erfc(a) is below
 * 0.16, so the few digits that it lacks do not reach the difference 1 - erfc(a):
 * erfc(a) = exp(-a^2)/sqrt(pi) / (a + (1/2)/(a + 1/(a + (3/2)/(a + ...)))); 200 steps suffice at a = 1. */
double xp_ref_erf(double x) {
    const double a = fabs(x);
    if (x != x)
        return x;
    if (a < 1.0) {
        const double z = a * a;
        double s = 0.0;
        for (int n = 20; n >= 0; n--)
            s = 1.0 / (double)(2 * n + 1) - z * s / (double)(n + 1);
        return 0x1.20dd750429b6dp+0 * (x * s);
    }
    double y = 1.0;
    if (a < 6.0) {
        double f = a;
        for (int n = 200; n > 0; n--)
            f = a + 0.5 * (double)n / f;
        y = 1.0 - 0x1.20dd750429b6dp-1 * exp_minus_square(a) / f;
    }
    return x < 0.0 ? -y : y;
}

double xp_ref_sqrt(double x) {
    return sqrt(x);
}

/* ---- units for bounds ---- */

double xp_ref_unit(xp_dtype d) {
    if (d == XP_F64)
        return 0x1p-53;
    if (d == XP_E8M0)
        return 0x1p-1;
    return xp_dtype_is_float(d) ? ldexp(1.0, -(formats[d].man + 1)) : 0.0;
}

double xp_ref_half_ulp_err(xp_dtype d, double x) {
    if (!xp_dtype_is_float(d))
        return 0.0;
    const double rel = xp_ref_unit(d) * fabs(x);
    double least; /* half the distance of the smallest values; e8m0 has no zero: anything below 2^-127 goes up to it */
    if (d == XP_F64)
        least = 0x1p-1074; /* half of it is not a double */
    else if (d == XP_E8M0)
        least = 0x1p-127;
    else
        least = ldexp(1.0, formats[d].emin - formats[d].man - 1);
    return rel > least ? rel : least;
}

double xp_ref_gamma(int64_t n, xp_dtype acc) {
    const double nu = (double)n * xp_ref_unit(acc);
    return nu < 1.0 ? nu / (1.0 - nu) : (double)INFINITY;
}

/* ---- exact sums ---- */

/* One bin for each exponent field: significands are added there without a shift, so an element costs one product and
 * one addition. A square is below 2^48, so 2^16 of them fit in 64 bits; two banks in turn, because a run of equal
 * exponents would wait for its own store. */
enum { BINS = 256, BIN_BLOCK = 1 << 16 };
typedef struct {
    uint64_t bank[2][BINS];
} bins;

void xp_ref_exact_clear(xp_ref_exact *s) {
    memset(s, 0, sizeof *s);
}

void xp_ref_exact_carry(xp_ref_exact *s) {
    uint64_t up = 0;
    for (int i = 0; i < XP_REF_LIMBS; i++) {
        const uint64_t t = s->limb[i] + up;
        s->limb[i] = t & 0xFFFFFFFFu;
        up = t >> 32;
    }
    assert(up == 0); /* 554 bits of the largest square and 63 of the count leave room in 640 */
}

/* limbs += v * 2^shift; each limb grows by less than 2^33. */
static void add_shifted(xp_ref_exact *s, uint64_t v, int shift) {
    uint64_t *w = s->limb + shift / 32;
    const int by = shift % 32;
    const uint64_t lo = (v & 0xFFFFFFFFu) << by, hi = (v >> 32) << by;
    w[0] += lo & 0xFFFFFFFFu;
    w[1] += (lo >> 32) + (hi & 0xFFFFFFFFu);
    if (hi >> 32)
        w[2] += hi >> 32;
}

/* Exponent field e holds significands in units of 2^(e-150), field 0 as field 1. Field 255 is counted, not added:
 * its bin is told apart into NaN and infinity by the caller. */
static void flush(xp_ref_exact *s, xp_ref_power p, bins *b) {
    for (int e = 0; e < BINS - 1; e++) {
        const int unit = e > 1 ? e - 1 : 0; /* in 2^-149 */
        for (int k = 0; k < 2; k++) {
            if (b->bank[k][e])
                add_shifted(s, b->bank[k][e], p == XP_REF_SQUARE ? 2 * unit : unit);
        }
    }
    memset(b, 0, sizeof *b);
    xp_ref_exact_carry(s);
}

static uint32_t f32_magnitude(float g) {
    uint32_t u;
    memcpy(&u, &g, sizeof u);
    return u & 0x7FFFFFFFu;
}

static void count_special(xp_ref_exact *s, uint32_t mag) {
    if (mag > 0x7F800000u)
        s->nans++;
    else if (mag == 0x7F800000u)
        s->infs++;
}

static void add_block(xp_ref_exact *s, xp_ref_power p, bins *b, const float *g, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t mag = f32_magnitude(g[i]), e = mag >> 23;
        const uint64_t m = (mag & 0x7FFFFFu) | (uint32_t)(e != 0) << 23;
        if (e == 255)
            count_special(s, mag);
        b->bank[i & 1][e] += p == XP_REF_SQUARE ? m * m : m;
    }
}

static void top_block(xp_ref_exact *s, const float *g, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t mag = f32_magnitude(g[i]);
        if (mag >= 0x7F800000u)
            count_special(s, mag);
        else if (mag > s->top)
            s->top = mag;
    }
}

static void widen_chunk(const void *base, xp_dtype d, int64_t i0, int64_t n, float *out) {
    if (d == XP_BF16) {
        const uint16_t *p = (const uint16_t *)base + i0;
        for (int64_t i = 0; i < n; i++)
            out[i] = f32_of_bits((uint32_t)p[i] << 16);
    } else {
        for (int64_t i = 0; i < n; i++)
            out[i] = (float)xp_widen(base, d, i0 + i);
    }
}

void xp_ref_exact_add(xp_ref_exact *s, xp_ref_power p, const void *base, xp_dtype d, int64_t i0, int64_t n) {
    assert(xp_dtype_is_float(d) && d != XP_F64);
    enum { CHUNK = 256 };
    bins b;
    float chunk[CHUNK];
    int64_t held = 0;
    memset(&b, 0, sizeof b);
    for (int64_t at = 0; at < n;) {
        const float *g = chunk;
        int64_t take = n - at;
        if (d == XP_F32) {
            g = (const float *)base + i0 + at;
            take = take < BIN_BLOCK - held ? take : BIN_BLOCK - held;
        } else {
            take = take < CHUNK ? take : CHUNK;
            widen_chunk(base, d, i0 + at, take, chunk);
        }
        if (p == XP_REF_TOP)
            top_block(s, g, take);
        else
            add_block(s, p, &b, g, take);
        at += take;
        held += take;
        if (held == BIN_BLOCK) { /* CHUNK divides BIN_BLOCK */
            flush(s, p, &b);
            held = 0;
        }
    }
    if (p != XP_REF_TOP)
        flush(s, p, &b);
}

static int bit_length(const xp_ref_exact *s) {
    for (int i = XP_REF_LIMBS - 1; i >= 0; i--) {
        if (s->limb[i]) {
            int n = 0;
            for (uint64_t v = s->limb[i]; v; v >>= 1)
                n++;
            return 32 * i + n;
        }
    }
    return 0;
}

/* floor(sum / 2^shift), which must fit in 64 bits; *out_sticky says whether a bit was lost. shift >= 0. */
static uint64_t top_bits(const xp_ref_exact *s, int shift, int *out_sticky) {
    const int w = shift / 32, by = shift % 32;
    uint64_t v = s->limb[w] >> by, lost = s->limb[w] & (((uint64_t)1 << by) - 1);
    for (int i = 0; i < w; i++)
        lost |= s->limb[i];
    for (int i = w + 1, at = 32 - by; i < XP_REF_LIMBS && at < 64; i++, at += 32)
        v |= s->limb[i] << at;
    *out_sticky = lost != 0;
    return v;
}

/* RN32 of a real in [r, r + 1) * 2^(t - 149), equal to r's end exactly when sticky is 0. Either r has more than 25
 * bits, or t is small enough that a bit below 2^-149 is present: the rounding point always lies inside r. */
static float round_f32(uint64_t r, int t, int sticky) {
    int bits = 0;
    for (uint64_t v = r; v; v >>= 1)
        bits++;
    int drop = bits - 24;
    if (drop < -t)
        drop = -t;             /* the last place is never below 2^-149 */
    const int unit = t + drop; /* log2 of the last place, in 2^-149 */
    uint64_t m = r;
    if (drop > 0) {
        const uint64_t half = (uint64_t)1 << (drop - 1), rest = r & ((half << 1) - 1);
        m = r >> drop;
        m += rest > half || (rest == half && (sticky || (m & 1)));
    } else {
        assert(drop == 0 && !sticky);
    }
    /* m has at most 24 bits, or is 2^24; as a code, its bit 23 counts one exponent step */
    const uint64_t code = m + ((uint64_t)unit << 23);
    return f32_of_bits(code >= 0x7F800000u ? 0x7F800000u : (uint32_t)code);
}

float xp_ref_exact_norm(const xp_ref_exact *s, xp_ref_power p) {
    if (s->nans)
        return f32_of_bits(0x7FC00000u);
    if (s->infs)
        return f32_of_bits(0x7F800000u);
    if (p == XP_REF_TOP)
        return f32_of_bits((uint32_t)s->top);
    const int len = bit_length(s);
    int sticky;
    if (p == XP_REF_ABS) {
        const int t = len > 60 ? len - 60 : 0;
        const uint64_t r = top_bits(s, t, &sticky);
        return round_f32(r, t, sticky);
    }
    /* The sum is S 2^-298 and its root sqrt(S) 2^-149. With R = floor(sqrt(floor(S / 4^t))), sqrt(S) lies in
     * [R, R + 1) 2^t, at R 2^t only if nothing was dropped on the way: R of 25 or 26 bits and a sticky bit decide the
     * rounding, exact midpoints included. A small S keeps one bit below 2^-149 instead (t = -1). */
    if (len <= 50) {
        const uint64_t v = top_bits(s, 0, &sticky) << 2;
        const uint64_t r = (uint64_t)sqrt((double)v);
        return round_f32(r, -1, r * r != v);
    }
    const int t = (len - 51) / 2;
    const uint64_t v = top_bits(s, 2 * t, &sticky);
    /* v in [2^50, 2^52): its double is exact, and sqrt cannot round up to an integer at least 2^-27 away */
    const uint64_t r = (uint64_t)sqrt((double)v);
    return round_f32(r, t, sticky || r * r != v);
}
