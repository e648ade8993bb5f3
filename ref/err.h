/* Values that carry a bound: how bound() follows an error through a chain of operations.
 *
 * v is what the reference holds; an implementation that keeps the contract is within e of it. The contract lets an
 * implementation work in `op` (f64 where the parameters are f64, else f32) and, at each declared rounding point, round
 * to nearest or not at all. Sizes of errors are the exact ones of a product or the largest of a rounding; nothing is
 * dropped as small, so no factor has to be picked. An error is +inf where overflow may come in. Nothing here may depend
 * on what the judged implementation computed. */
#ifndef XP_REF_ERR_H
#define XP_REF_ERR_H

#include "num.h"

typedef struct {
    double v, e;
} xp_ref_val;

/* unit: relative error of a rounding; least: half the smallest subnormal, its absolute floor; largest: finite value. */
typedef struct {
    double unit, least, largest;
} xp_ref_format;

/* A rounding point: arithmetic in op, results in d. */
typedef struct {
    xp_dtype d;
    xp_ref_format op, to;
    double flush; /* xp_ref_least of op */
    int narrows;  /* d has fewer bits than op: two roundings follow each other */
} xp_ref_rule;

/* The arithmetic that a contract with parameters of dtype d allows. */
xp_dtype xp_ref_op(xp_dtype d);
xp_ref_format xp_ref_format_of(xp_dtype d);
/* Largest finite value; 0 for an integer type. */
double xp_ref_largest(xp_dtype d);
/* The smallest normal number of op, f32 or f64: what a hardware exponential may lose. */
double xp_ref_least(xp_dtype op);
/* gamma_n in op and in double together: two computations of one value, one in each. */
double xp_ref_both(int64_t n, xp_dtype op);
xp_ref_rule xp_ref_rule_of(xp_dtype d, xp_dtype op);
/* Largest error of one rounding to d of a value of magnitude at most mag; +inf when that may overflow. */
double xp_ref_room(xp_dtype d, double mag);

/* a * b. The implementation's own rounding of the product belongs to the rounding point that follows. */
xp_ref_val xp_ref_val_mul(xp_ref_val a, xp_ref_val b);
/* a + b, likewise. */
xp_ref_val xp_ref_val_add(xp_ref_val a, xp_ref_val b);
/* a / b, b exact. An implementation divides within 4 ulp of op, or multiplies with the reciprocal. */
xp_ref_val xp_ref_val_div(const xp_ref_rule *r, xp_ref_val a, double b);
/* The result of an operation that only the implementation's arithmetic rounds. */
xp_ref_val xp_ref_val_op(const xp_ref_rule *r, xp_ref_val a);
/* A declared rounding point: the reference rounds to d; the implementation rounds to op, and to d or not. */
xp_ref_val xp_ref_rule_round(const xp_ref_rule *r, xp_ref_val a);
/* Tolerance of an output in d whose reference is the unrounded a: the implementation rounds to op, then to d. NaN
 * (an infinity met a zero on the way) becomes +inf. Also pays for the roundings of the bound's own arithmetic. */
double xp_ref_rule_out(const xp_ref_rule *r, xp_ref_val a);
/* The same for single values: the rule of (d, op). */
xp_ref_val xp_ref_val_round(xp_ref_val a, xp_dtype d, xp_dtype op);
double xp_ref_val_out(xp_ref_val a, xp_dtype d, xp_dtype op);
/* A declared rounding point, for n values v with errors e. */
void xp_ref_round_errors(const xp_ref_rule *r, int64_t n, double *v, double *e);
/* e[i] becomes the tolerance of an output that holds v[i] within e[i]. */
void xp_ref_out_errors(const xp_ref_rule *r, int64_t n, const double *v, double *e);

/* Functions of an inexact argument. An implementation evaluates sigmoid within 4 ulp of op, or within `flush`, and the
 * operations around it with one rounding each. */
xp_ref_val xp_ref_val_sigmoid(const xp_ref_rule *r, xp_ref_val x);
xp_ref_val xp_ref_val_silu(const xp_ref_rule *r, xp_ref_val x);
xp_ref_val xp_ref_val_dsilu(const xp_ref_rule *r, xp_ref_val x); /* silu's derivative at x */
/* sigmoid(x) * (1 + x * sigmoid(-x)) in double: silu's derivative without the cancellation of 1 - sigmoid. */
double xp_ref_dsilu(double x);
/* tanh within 4 ulp or `flush`, as sigmoid; its derivative 1 - tanh^2. */
xp_ref_val xp_ref_val_tanh(const xp_ref_rule *r, xp_ref_val x);
xp_ref_val xp_ref_val_dtanh(const xp_ref_rule *r, xp_ref_val x);
double xp_ref_dtanh(double x);
/* 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as that or as x times a sigmoid; its derivative. */
xp_ref_val xp_ref_val_gelu_tanh(const xp_ref_rule *r, xp_ref_val x);
xp_ref_val xp_ref_val_dgelu_tanh(const xp_ref_rule *r, xp_ref_val x);
double xp_ref_gelu_tanh(double x);
double xp_ref_dgelu_tanh(double x);

/* Functions with a kink. A comparison is sure when no value within the errors decides otherwise; what hangs on an
 * unsure one may be there or not. */
typedef struct {
    int holds, sure;
} xp_ref_truth;
xp_ref_truth xp_ref_val_le(xp_ref_val a, xp_ref_val b); /* a <= b */
/* a where t holds (does not hold), else 0. */
xp_ref_val xp_ref_val_if(xp_ref_truth t, xp_ref_val a);
xp_ref_val xp_ref_val_unless(xp_ref_truth t, xp_ref_val a);
xp_ref_val xp_ref_val_relu(xp_ref_val x);
xp_ref_val xp_ref_val_min(xp_ref_val x, xp_ref_val limit);   /* NaN stays, as in the next */
xp_ref_val xp_ref_val_clamp(xp_ref_val x, xp_ref_val limit); /* into [-limit, limit] */

/* One dot product of n terms in op on one side, in double on the other, has error at most sum |w| t, with
 * t = e + g (|v| + e) for each input, g = gamma_n(op) + gamma_n(f64): Higham 2002, 3.1, for any order of summation.
 * xp_ref_dot_inputs turns e[] into t[]; xp_ref_dot_outputs completes the sums: underflow, and +inf where the gauge
 * itself may leave op's range. */
void xp_ref_dot_inputs(int64_t n, xp_dtype op, int64_t count, const double *v, double *e);
void xp_ref_dot_outputs(int64_t n, xp_dtype op, int64_t count, double *e);
/* For exact inputs: each gauge, sum |w| |v|, becomes the error of its sum. */
void xp_ref_dot_errors(int64_t n, xp_dtype op, int64_t count, double *gauge);

#endif
