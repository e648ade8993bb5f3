/* Stages expert and expert_bwd: grouped MLP, y = (act(x W1g^T) * (x W1u^T)) W2^T for each row with its expert's
 * weights, or act(x W1^T) W2^T without a gate.
 *
 * An expert computes in its parameters' dtype: x is cast on the way in, y to the activation dtype on the way out.
 * Rounding points (r = round to param dtype): pre = r(x W1^T), with biases r(pre + b1); y = r(act W2^T), r(y + b2).
 * Between them, R = r with act_rounding each_op; with once, and always with softcap, R leaves a value as it is.
 *
 * g, u: the gate's and the up columns of pre. Of the record's numbers limit is rounded to the parameters' dtype, the
 * others to f32 (f64 with f64 parameters).
 *
 *   limit > 0: u = clamp(u, -limit, limit); limit_when before: g = min(g, limit)
 *   silu: a = g sigmoid(g); with act_alpha != 1 or up_offset != 0: a = g R(sigmoid(R(act_alpha g)))
 *   gelu_tanh, relu, relu2 = relu(g)^2: a is one operation. act_alpha is silu's alone
 *   softcap: a = gate_cap tanh(g / gate_cap) sigmoid(g), and u = up_cap tanh(u / up_cap)
 *   s = R(a); limit_when after: s = min(s, limit). o = u; with up_offset != 0: o = R(u + up_offset)
 *   act = r(s o); without a gate act = r(a)
 *
 * Dot products are summed wide, k ascending. Pad rows are zero and stay zero. Rows at offsets[L] and
 * beyond are not touched. row0: x holds rows [row0, row0 + dim0) of the grouped order; 0 except when a judge works on a
 * slice. Source: Shazeer 2020 (SwiGLU); rounding points of transformers' experts. */
#ifndef XP_EXPERT_H
#define XP_EXPERT_H

#include "backend.h"
#include "dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;       /* in  [C,H] act */
    xp_tensor offsets; /* in  [L+1] i64 */
    xp_tensor w1;      /* in  [L,U,H] param, rows as the dialect's gate_layout says */
    xp_tensor w2;      /* in  [L,H,F] param */
    xp_tensor pre;     /* out [C,U] param, columns as the rows of w1 */
    xp_tensor act;     /* out [C,F] param */
    xp_tensor y;       /* out [C,H] act */
    const xp_dialect *dialect;
    int64_t row0;
    xp_tensor b1; /* in  [L,U] param; absent unless expert_bias */
    xp_tensor b2; /* in  [L,H] param; absent unless expert_bias */
} xp_expert_args;
extern const xp_stage xp_stage_expert;

/* Rounding points as torch's autograd has them in the parameters' dtype, names as above: da = r(dy W2); with a gate
 * ds = R(da o), du = r(da s), softcap: du = r(da s tanh'(u / up_cap)); without one ds = da.
 *   dg = r(ds a'(g)); silu written with sigmoid and each_op, q = r(sigmoid(r(act_alpha g))):
 *   dt = r(r(ds g) q (1 - q)), dg = r(r(ds q) + r(act_alpha dt))
 *   a limit passes the gradient of a value inside or at it, of no other: du by |u|, ds by s (after), dg by g (before)
 *   relu'(0) = 0
 * dx = r(dpre W1). Weight gradients are stage wgrad on (dpre, x) and (dy, act), the biases' on dpre and dy with ones.
 */
typedef struct {
    xp_tensor dy;      /* in  [C,H] act */
    xp_tensor pre;     /* in  [C,U] param */
    xp_tensor offsets; /* in  [L+1] i64 */
    xp_tensor w1;      /* in  [L,U,H] param */
    xp_tensor w2;      /* in  [L,H,F] param */
    xp_tensor dpre;    /* out [C,U] param */
    xp_tensor dx;      /* out [C,H] act */
    const xp_dialect *dialect;
    int64_t row0;
} xp_expert_bwd_args;
extern const xp_stage xp_stage_expert_bwd;

#ifdef __cplusplus
}
#endif
#endif
