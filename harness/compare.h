/* The comparator: one output tensor of an implementation against the judge's, element by element.
 *
 * It knows dtypes, poison and bounds; it knows no stage, rank or file. Nothing it does can be switched off by a NaN:
 * every test is written so that a comparison that is not true is a failure. It never allocates but for the set of
 * distinct values of the bias test. */
#ifndef XP_COMPARE_H
#define XP_COMPARE_H

#include "xp/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a failure is called. The order is the order of `explain`. */
typedef enum {
    XP_C_NONE = 0,
    XP_C_BITS,      /* bits differ where the stage moves or defines bits */
    XP_C_BOUND,     /* |got - expected| exceeds the derived bound */
    XP_C_NAN,       /* NaN or infinity on one side only */
    XP_C_BIAS,      /* within every bound, but rounded to one side */
    XP_C_SELECT,    /* a chosen expert's score is below one left out, or ids are no choice */
    XP_C_TIE,       /* equal logits, and the lower index did not win */
    XP_C_CAP,       /* more undecided choices than near ties can explain */
    XP_C_UNWRITTEN, /* an output element still holds the poison */
    XP_C_POISON,    /* an element that must be left alone was written */
    XP_C_GUARD,     /* a write outside an operand or the workspace */
    XP_C_INPUT,     /* an input changed */
    XP_C_NONDET,    /* a row that claims the same bits twice gave others */
    XP_C_PROPERTY,  /* an identity of the stage does not hold */
    XP_C_ARG,       /* the stage's check refused the arguments */
    XP_C_COMM,      /* a collective could not proceed */
    XP_C_HANG,      /* a collective's peers never came */
    XP_C_STATUS,    /* the row returned an error */
    XP_NCLASS
} xp_class;
const char *xp_class_name(xp_class c);    /* "bits", "bound", ... */
const char *xp_class_meaning(xp_class c); /* one line */

/* What outputs hold before a run: NaN in every float type that has one, and far from any value in integers. */
uint64_t xp_poison_code(xp_dtype d);
/* 1 when the code cannot be a result (16 bits and more): an element that holds it was not written. */
int xp_poison_is_sure(xp_dtype d);
void xp_poison_fill(const xp_tensor *t);                  /* host memory, any strides */
void xp_poison_bytes(void *p, size_t bytes);              /* workspace: NaN as f64, f32, bf16 and f16 */
size_t xp_poison_bytes_left(const void *p, size_t bytes); /* leading bytes that still hold it */

/* Unit in the last place of dtype d at x: the gap between the neighbours that x is rounded to. 0 for integers. */
double xp_ulp(xp_dtype d, double x);

/* The bias test over distinct expected values: errors in units of the output's last place, as they are (towards
 * +infinity) and by magnitude (away from zero). A truncating cast leans by half a unit and stays inside every bound of
 * one unit and more; where the bound is smaller, the bound finds it.
 *
 * Errors of rounding to nearest have mean 0, the final one as well as those before it, so Hoeffding's inequality bounds
 * their mean. What can lean without a wrong rounding is an error that many elements share: a factor in f32. Therefore
 * only outputs of 16 bits and less are tested, to which a shared f32 error of 64 units is 2^-8 of a unit at most; and
 * only elements whose bound is at most 2 units, beyond which the test would see nothing. A number below the format's
 * smallest can only lose magnitude, and is left out; above it even numbers that thin out as 1/x lean by no more than
 * 0.028 units, those of the first interval. */
enum { XP_BIAS_LEAST = 4096, XP_BIAS_MOST = 16384 };
typedef struct {
    int64_t n;            /* distinct values seen, up to XP_BIAS_MOST */
    double sum, sum_away; /* of (got - ref) / ulp, and of (|got| - |ref|) / ulp */
    double sum_range2;    /* of (2 max(1/2, bound / ulp))^2 */
    uint64_t *seen;       /* hash set of ref's bits; owned, NULL until the first value */
    int64_t room;
} xp_bias;
void xp_bias_close(xp_bias *b);
/* The |mean| that right roundings exceed with a chance of at most 1e-12; +inf when n < XP_BIAS_LEAST. */
double xp_bias_limit(const xp_bias *b);

/* One compared operand; accumulates over calls of xp_compare(). Clear with memset. */
typedef struct {
    int64_t elements;  /* compared: the judge has a value for it */
    int64_t unbounded; /* not compared: the bound is infinite where the judge's value is finite (an intermediate
                          rounding may overflow), so any value is right */
    int64_t untouched; /* the judge leaves it alone, and so did the implementation */
    int64_t wrong;     /* of all kinds below */
    int64_t bits, bound, nan, unwritten, stray;
    int64_t zeros;   /* elements whose expected value is 0 */
    int64_t inexact; /* elements whose error is not 0 */
    double ratio;    /* largest |got - ref| / bound; +inf for NaN and for an error where the bound is 0 */
    /* All wrong elements with the same factor to what was expected, when same == eligible. */
    double factor;
    int64_t same, eligible;
    /* Set by the latest call: row-major number in its tensors of the worst element and of the first wrong one, or -1.
     */
    int64_t worst_at, first_at;
} xp_diff;

/* got [..] any dtype, ref of the same shape: F64, or got's dtype when tol is NULL. tol NULL: bit for bit, NaN equals
 * NaN whatever its payload; else F64 of the same shape, absolute; NaN says that any value that is not finite will do.
 * An element where ref still holds the poison of its dtype must hold the poison in got too. bias NULL: not tested.
 * XP_E_NOMEM from the bias set only; XP_E_BUG when the shapes or dtypes do not fit. */
xp_status xp_compare(const xp_tensor *got, const xp_tensor *ref, const xp_tensor *tol, xp_bias *bias, xp_diff *io);
/* 1 when the wrong elements share the factor, and it is not 1: at least two of them, and at least half of all, are far
 * enough from their bound to tell. */
int xp_diff_pattern(const xp_diff *d);
/* The class of the wrong elements, XP_C_NONE when there are none: unwritten, stray, NaN, bits, bound, in this order. */
xp_class xp_diff_class(const xp_diff *d);

#ifdef __cplusplus
}
#endif
#endif
