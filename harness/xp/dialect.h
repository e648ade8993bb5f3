/* Dialect: how a family of models routes and gates, as data. route, expert, shared and combine read the record; no
 * dialect is a code path of a caller. Field values follow what the families' own code does (transformers 5.24,
 * executed). */
#ifndef XP_DIALECT_H
#define XP_DIALECT_H

#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    XP_SCORE_SOFTMAX = 0,  /* softmax over all experts, then top-k */
    XP_SCORE_SOFTMAX_TOPK, /* top-k on logits, then softmax over the chosen */
    XP_SCORE_SIGMOID,
    XP_SCORE_SIGMOID_TOPK,
    XP_SCORE_SQRT_SOFTPLUS,
    XP_SCORE_SPARSEMIXER,
    XP_SCORE_PRODUCT_KEY
} xp_score;
typedef enum { XP_ON_SCORE = 0, XP_ON_LOGIT, XP_ON_TOKEN_TABLE } xp_select_on;
typedef enum { XP_GROUP_NONE = 0, XP_GROUP_MAX, XP_GROUP_TOP2SUM } xp_group_reduce;
typedef enum { XP_MASK_ZERO = 0, XP_MASK_NEGINF } xp_group_mask;
typedef enum { XP_RENORM_NONE = 0, XP_RENORM_SUM, XP_RENORM_SUM_PLUS_EPS, XP_RENORM_MAX_EPS, XP_RENORM_LP } xp_renorm;
typedef enum { XP_SCALE_WEIGHT = 0, XP_SCALE_OUTPUT } xp_scale_at;
typedef enum { XP_AT_OUTPUT = 0, XP_AT_INPUT, XP_AT_HIDDEN } xp_weight_at;
typedef enum { XP_ACT_SILU = 0, XP_ACT_GELU_TANH, XP_ACT_RELU, XP_ACT_RELU2, XP_ACT_SOFTCAP } xp_act;
typedef enum { XP_ROUND_EACH = 0, XP_ROUND_ONCE } xp_act_rounding;
typedef enum { XP_GATE_CONCAT = 0, XP_GATE_INTERLEAVED } xp_gate_layout;
typedef enum { XP_EOI = 0, XP_EIO } xp_orient;
typedef enum {
    XP_ACC_SLOTS_F32 = 0, /* products kept wide, summed over slots wide, one rounding (grouped_mm) */
    XP_ACC_EAGER_ACT,     /* experts ascending, y = r(y + r(p)) */
    XP_ACC_EAGER_F32,
    XP_ACC_PRODUCTS_ACT_F32
} xp_accumulate;
typedef enum { XP_COMBINE_ADD = 0, XP_COMBINE_AVERAGE } xp_shared_combine;
typedef enum { XP_WIDE_F32 = 0, XP_WIDE_ACT } xp_wide; /* a dtype rule: f32, or the activation dtype */

typedef struct {
    const char *name, *meaning, *source; /* "hf-5.24/qwen3_moe" */
    char letter;                         /* A to Q: the dialect's family */
    /* routing */
    xp_wide logits_dtype, score_dtype, weight_dtype, bias_dtype;
    int router_bias, select_bias, expert_scale, weight_div_k;
    double logit_scale, logit_softcap; /* 1 and 0: off */
    xp_score score;
    xp_select_on select_on;
    xp_group_reduce group_reduce;
    xp_group_mask group_mask;
    int n_group, topk_group;
    xp_renorm renorm;
    double renorm_eps;
    double scale;
    xp_scale_at scale_at;
    xp_weight_at weight_at;
    /* expert */
    int gated;
    xp_act act;
    double act_alpha, up_offset, limit; /* limit 0: off */
    xp_act_rounding act_rounding;
    xp_gate_layout gate_layout;
    xp_orient orient;
    int expert_bias;
    xp_accumulate accumulate;
    /* shared expert and balance */
    int shared_gate; /* sigmoid(x . v) times the shared expert's output */
    xp_shared_combine shared_combine;
    double aux_coef, z_coef;
} xp_dialect;

/* The presets, ends with a NULL name; and one by name (NULL when there is none). */
extern const xp_dialect xp_dialects[];
const xp_dialect *xp_dialect_find(const char *name);

#ifdef __cplusplus
}
#endif
#endif
