/* Numbers of the reference: narrowing from double to every float format, elementary functions, rounding units for the
 * bounds, and exact sums.
 *
 * Every result is a fixed sequence of IEEE 754 double operations, so it has the same bits on every host: no libm
 * transcendental, no contraction, no extended precision (num.c refuses to compile otherwise). sqrt, which IEEE defines
 * to the last bit, is the one library function. Nothing here allocates or keeps state. */
#ifndef XP_REF_NUM_H
#define XP_REF_NUM_H

#include "xp/tensor.h"

/* ---- narrowing: round to nearest, ties to the even code (e8m0: up), in one rounding from double ------------------ */

/* The code of v in d, in the low bits. d is a float format.
 *
 *              largest    beyond it, saturate 0      saturate 1          NaN
 *   f32        (2-2^-23)2^127  infinity              largest             sign | quiet bit
 *   bf16       0x7F7F     0x7F80 (infinity)          0x7F7F              sign | 0x7FC0
 *   f16        65504      0x7C00 (infinity)          0x7BFF              sign | 0x7E00
 *   e5m2       57344      0x7C (infinity), from 61440  0x7B              sign | 0x7E
 *   e4m3       448        0x7F (NaN), beyond 464     0x7E                sign | 0x7F
 *   e4m3fnuz   240        0x80 (NaN), from 248       0x7F                0x80
 *   e5m2fnuz   57344      0x80 (NaN), from 61440     0x7F                0x80
 *   e8m0       2^127      0xFF (NaN), from 1.5 * 2^127  0xFE             0xFF
 *   e2m1       6          0x7 (it always saturates)  0x7                 0x7, sign dropped (PTX cvt: NaN gives +6)
 *
 * The sign is kept in every column but where a code is the format's only NaN. Infinity counts as "beyond". -0 keeps its
 * sign, except in fnuz (one zero). e8m0 has neither zero nor sign: a positive value below 2^-127 gives 2^-127; zero
 * gives 0x00 when saturating and NaN when not; a negative value gives NaN. A tie of e8m0, 1.5 * 2^k, goes up to
 * 2^(k+1), as ml_dtypes 0.6.0 has it (a power of two has no last digit that could be even), and so does all that lies
 * between 2^-127 and 2^-126: there ml_dtypes takes code 0 for the zero of other formats and rounds away from it. NaN
 * payloads are not defined by any stage.
 * Source: OCP OFP8 1.0, OCP MX 1.0, ml_dtypes (fnuz, e8m0), PTX ISA 8.7 cvt (satfinite, e2m1). */
uint64_t xp_ref_narrow(double v, xp_dtype d, int saturate);
/* The value of v after rounding to d, not saturating (e2m1 saturates). */
double xp_ref_round(double v, xp_dtype d);
/* base[i] = code; for e2m1 the other half of the byte is kept. */
void xp_ref_put(void *base, xp_dtype d, int64_t i, uint64_t code);
/* base[i] = v rounded to d, not saturating. */
void xp_ref_store(void *base, xp_dtype d, int64_t i, double v);
/* base[i0 + j] = v[j] rounded to d, for j < n. */
void xp_ref_store_row(void *base, xp_dtype d, int64_t i0, int64_t n, const double *v);
/* v[j] = v[j] rounded to d, in place. */
void xp_ref_round_row(xp_dtype d, int64_t n, double *v);

/* ---- elementary functions in double ----------------------------------------------------------------------------- */

/* Every function below is within XP_REF_FN_ULP units in the last place of the exact value where that value is a normal
 * double (2^-52 relative bounds one such unit), and within one smallest subnormal, 2^-1074, where it is not. NaN gives
 * NaN. tests/unit/num.c measures them against MPFR. */
#define XP_REF_FN_ULP 3.0
#define XP_REF_FN_REL (XP_REF_FN_ULP * 0x1p-52)

double xp_ref_exp(double x);
double xp_ref_expm1(double x);
double xp_ref_log(double x);   /* log(0) = -inf, log(x < 0) = NaN */
double xp_ref_log1p(double x); /* log1p(-1) = -inf, log1p(x < -1) = NaN */
double xp_ref_sigmoid(double x);
double xp_ref_silu(double x); /* x * sigmoid(x), so silu(-inf) is -inf * 0 = NaN, as in torch */
double xp_ref_softplus(double x);
double xp_ref_tanh(double x);
double xp_ref_erf(double x);
double xp_ref_sqrt(double x); /* correctly rounded */

/* ---- units for bounds ------------------------------------------------------------------------------------------- */

/* Unit roundoff 2^-p of a format with p significant bits (f32: 2^-24, bf16: 2^-8); 0 for an integer type. */
double xp_ref_unit(xp_dtype d);
/* Largest error of rounding to d a value of magnitude at most |x| that does not overflow: the unit times |x|, at least
 * half the smallest subnormal. */
double xp_ref_half_ulp_err(xp_dtype d, double x);
/* Higham's gamma_n = n u / (1 - n u) of n roundings in acc; +inf when n u >= 1. */
double xp_ref_gamma(int64_t n, xp_dtype acc);

/* ---- exact sums of |g| and g^2 over f32 values ------------------------------------------------------------------ */

/* A sum as an integer multiple of a fixed unit (2^-149 for p = 1, 2^-298 for p = 2) in windows of 32 bits, lowest
 * first, each with 32 bits of room. All words are u64 so that a mesh can add the struct as one integer tensor; after
 * xp_ref_exact_carry every limb is below 2^32 and up to 2^31 ranks may be added before the next carry. p = infinity
 * keeps the bits of the largest finite magnitude in `top`, which a mesh must reduce by integer maximum instead. */
enum { XP_REF_LIMBS = 20, XP_REF_EXACT_WORDS = XP_REF_LIMBS + 3 };
typedef struct {
    uint64_t nans, infs; /* how many were seen; neither enters the limbs */
    uint64_t top;        /* f32 bits of the largest finite |g| */
    uint64_t limb[XP_REF_LIMBS];
} xp_ref_exact;
typedef enum { XP_REF_ABS = 1, XP_REF_SQUARE = 2, XP_REF_TOP = 3 } xp_ref_power;

void xp_ref_exact_clear(xp_ref_exact *s);
/* Adds base[i0 .. i0+n): d is f32, bf16, f16 or an 8-bit format. Up to 2^62 values in all. Leaves s carried. */
void xp_ref_exact_add(xp_ref_exact *s, xp_ref_power p, const void *base, xp_dtype d, int64_t i0, int64_t n);
void xp_ref_exact_carry(xp_ref_exact *s);
/* The sum, its root or the largest magnitude, rounded once to f32 (RNE, overflow to infinity). NaN when a NaN was seen,
 * else +inf when an infinity was. s must be carried. */
float xp_ref_exact_norm(const xp_ref_exact *s, xp_ref_power p);

#endif
