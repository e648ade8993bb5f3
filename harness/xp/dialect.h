/* Dialect: how a family of models routes and gates, as data. route, expert, shared and combine read the record; no
 * dialect is a code path of a caller. Field values follow what the families' own code does (transformers 5.24,
 * executed). */
#ifndef XP_DIALECT_H
#define XP_DIALECT_H

#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How logits become scores. r = rounding to the score's dtype (score_dtype). */
typedef enum {
    XP_SCORE_SOFTMAX = 0,   /* r(softmax over all experts) */
    XP_SCORE_SOFTMAX_TOPK,  /* weights are the softmax over the chosen experts' logits alone */
    XP_SCORE_SIGMOID,       /* r(sigmoid) */
    XP_SCORE_SQRT_SOFTPLUS, /* r(sqrt(r(softplus))) */
    XP_SCORE_SPARSEMIXER    /* slot by slot: softmax over the experts within a margin of the largest that is left */
} xp_score;
/* What the router's matrix multiplies: x, the block's normed rows; or rows of width R, a size of the model, that an MLP
 * of the router makes from a state h = r(x Wd^T + bd), to which each MoE block but the first adds the state of the
 * block before times a number a column (carry.h): gelu(fc2 gelu(fc1 rmsnorm(h))), both maps with biases; or
 * r(n / sqrt(H)) of a norm n of its own of the block's input. Only layers read this: stages get logits, or what the
 * matrix multiplies. */
typedef enum { XP_ROUTER_X = 0, XP_ROUTER_RECURRENT_MLP, XP_ROUTER_RMSNORM_SCALED } xp_router_in;
/* Scores; logits; a table from token id to experts; or the first expert on scores, which roundings make equal, and the
 * others on logits. */
typedef enum { XP_ON_SCORE = 0, XP_ON_LOGIT, XP_ON_TOKEN_TABLE, XP_ON_FIRST_SCORE } xp_select_on;
typedef enum { XP_GROUP_NONE = 0, XP_GROUP_MAX, XP_GROUP_TOP2SUM } xp_group_reduce;
typedef enum { XP_MASK_ZERO = 0, XP_MASK_NEGINF } xp_group_mask;
/* w / sum; w / (sum + eps); w / max(sum, eps); of a sigmoid exp(log s - log sum s) from the logits, which knows no
 * underflow of s. */
typedef enum {
    XP_RENORM_NONE = 0,
    XP_RENORM_SUM,
    XP_RENORM_SUM_PLUS_EPS,
    XP_RENORM_MAX_EPS,
    XP_RENORM_LOG_SUM
} xp_renorm;
/* Trained factors of the weights: a number an expert, or one number for all of them. */
typedef enum { XP_FACTOR_NONE = 0, XP_FACTOR_EACH, XP_FACTOR_ONE } xp_factors;
typedef enum { XP_SCALE_WEIGHT = 0, XP_SCALE_OUTPUT } xp_scale_at;
typedef enum { XP_AT_OUTPUT = 0, XP_AT_INPUT } xp_weight_at;
/* What an expert id of E and beyond does to its token: adds w x, or nothing, at weight 0. */
typedef enum { XP_NULL_IDENTITY = 0, XP_NULL_SKIP } xp_null_kind;
/* Which slots of one expert come first, where it cannot take all: see capacity.h. */
typedef enum { XP_OVERFLOW_ORDER = 0, XP_OVERFLOW_PRIORITY, XP_OVERFLOW_SLOTS } xp_overflow;
typedef enum {
    XP_ACT_SILU = 0,  /* g sigmoid(alpha g) */
    XP_ACT_GELU_TANH, /* 0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) */
    XP_ACT_RELU,
    XP_ACT_RELU2,  /* relu(g)^2 */
    XP_ACT_SOFTCAP /* gate_cap tanh(g / gate_cap) sigmoid(g), and u becomes up_cap tanh(u / up_cap) */
} xp_act;
typedef enum { XP_ROUND_EACH = 0, XP_ROUND_ONCE } xp_act_rounding;
/* limit > 0: u in [-limit, limit] and g <= limit, before the activation or on its result. */
typedef enum { XP_LIMIT_BEFORE = 0, XP_LIMIT_AFTER } xp_limit_when;
typedef enum { XP_GATE_CONCAT = 0, XP_GATE_INTERLEAVED } xp_gate_layout;
/* How a family's files and classes store the experts' matrices: [out,in] or [in,out]. Stages always take [out,in]. */
typedef enum { XP_EOI = 0, XP_EIO } xp_orient;
typedef enum {
    XP_ACC_SLOTS_F32 = 0,   /* p = w back wide, summed over slots wide, one rounding (grouped_mm) */
    XP_ACC_EAGER_ACT,       /* experts ascending, y = r(y + r(p)) */
    XP_ACC_EAGER_F32,       /* experts ascending, y = y + p in f32, one rounding at the end */
    XP_ACC_PRODUCTS_ACT_F32 /* r(p), summed wide, one rounding */
} xp_accumulate;
/* The gradients of a token's copies: summed wide and rounded once; or rows ascending, dx = r(dx + r(p)), as an
 * index_add of activations does it. */
typedef enum { XP_DX_WIDE = 0, XP_DX_ACT } xp_dx_sum;
typedef enum { XP_COMBINE_ADD = 0, XP_COMBINE_AVERAGE } xp_shared_combine;
typedef enum { XP_WIDE_F32 = 0, XP_WIDE_ACT } xp_wide; /* a dtype rule: f32, or the activation dtype */

typedef struct {
    const char *name, *meaning, *source; /* "hf-5.24/qwen3_moe" */
    char letter;                         /* A to Q: the dialect's family */
    /* routing; the order in which the fields act is the order below */
    xp_router_in router_in;
    xp_wide logits_dtype;
    int router_bias;                   /* the gate has a bias of its own: l = r(x W^T + b) */
    double logit_scale, logit_softcap; /* l = scale l; l = cap tanh(l / cap); 1 and 0: off */
    xp_score score;
    xp_wide score_dtype;    /* act: rounded to the activation dtype, and so is every step from here to the weight */
    double sparse_eps;      /* of the sparsemixer: an expert is out where (m - l) / max(|l|, m) > 2 eps */
    xp_select_on select_on; /* what the choice looks at */
    int select_bias;        /* added to what the choice looks at, and to nothing else */
    xp_group_reduce group_reduce; /* experts lie in n_group groups; the topk_group best groups stay */
    xp_group_mask group_mask;     /* what the choice sees of an expert of another group */
    int masked_weight;            /* 1: such an expert, chosen all the same, weighs 0; else its own score */
    int n_group, topk_group;
    xp_renorm renorm;
    double renorm_eps;
    int weight_div_k; /* 1: weights are divided by K, and the summed output is multiplied by it */
    double scale;
    xp_scale_at scale_at;
    xp_factors expert_scale; /* what w is multiplied by */
    xp_wide weight_dtype;
    xp_weight_at weight_at;
    int null_experts; /* ids E to E+n-1: the router has rows for them, no weights */
    xp_null_kind null_kind;
    int shared_rows;        /* n: the router's last n rows are those of n shared experts, which every token has beside
                               its K. They are in one sum with them and weigh the hidden rows of the shared expert,
                               whose width is n equal parts */
    int capacity;           /* slots that an expert takes of the tokens that are counted together; 0: no limit */
    double capacity_factor; /* or, of n tokens, ceil((n K / E) capacity_factor); 0: off */
    xp_overflow overflow;   /* which slots it takes */
    int pad_to_capacity;    /* an expert has that many rows of each rank, zero rows behind those it took */
    /* expert */
    int gated;
    xp_act act;
    double act_alpha, up_offset, limit; /* act = act(g) (u + up_offset); limit 0: off */
    xp_limit_when limit_when;
    double gate_cap, up_cap;
    xp_act_rounding act_rounding; /* every operation rounded, or the whole of act(g) u once */
    xp_gate_layout gate_layout;
    xp_orient orient;
    int expert_bias; /* one more rounding where it is added */
    xp_accumulate accumulate;
    xp_dx_sum dx_sum;
    /* shared expert and balance */
    int shared_gate;     /* sigmoid(x . v) times the shared expert's output */
    int shared_limit;    /* 1: the limit holds in the shared expert, too ... */
    double limit_shared; /* ... or, above 0, this one in its place */
    xp_shared_combine shared_combine;
    double aux_coef, z_coef;
} xp_dialect;

/* The presets, ends with a NULL name; and one by name (NULL when there is none). */
extern const xp_dialect xp_dialects[];
const xp_dialect *xp_dialect_find(const char *name);

/* One field of the record as text: for case lines, `explain` and vector sets. words ("a|b|c"): an int that counts the
 * words; otherwise an int or a double. */
typedef enum { XP_FIELD_INT, XP_FIELD_F64, XP_FIELD_WORD } xp_field_type;
typedef struct {
    const char *name, *words, *meaning;
    xp_field_type type;
    size_t at;
} xp_dialect_field;
/* Ends with a NULL name; in the order in which the fields act. */
extern const xp_dialect_field xp_dialect_fields[];
/* 1 when there is a field of that name. */
int xp_dialect_has(const char *name);
/* XP_E_ARG naming the field, the value and what was expected. */
xp_status xp_dialect_set(xp_dialect *d, const char *name, const char *value);
/* The field's value as xp_dialect_set takes it. */
void xp_dialect_print(const xp_dialect *d, const xp_dialect_field *f, char *buf, size_t bytes);
/* Rows of the router, and numbers in the factors of the weights. */
int64_t xp_dialect_rows(const xp_dialect *d, int64_t E);
int64_t xp_dialect_factors(const xp_dialect *d, int64_t E);
/* XP_E_ARG naming two fields that contradict each other, or one that is out of range; E and K are the model's. */
xp_status xp_dialect_check(const xp_dialect *d, int64_t E, int64_t K);
/* The limit inside the shared expert, 0: none. */
double xp_dialect_shared_limit(const xp_dialect *d);
/* What the weights of K slots are multiplied by behind their division, and what the summed output is; 1: nothing. */
double xp_dialect_weight_factor(const xp_dialect *d, int64_t K);
double xp_dialect_output_factor(const xp_dialect *d, int64_t K);
/* 1 when every field has the same value; names do not count. */
int xp_dialect_equal(const xp_dialect *a, const xp_dialect *b);
/* 1: the record limits what an expert takes. */
int xp_dialect_limits(const xp_dialect *d);
/* C of `tokens` tokens that are counted together, E and K the model's; tokens K without a limit. */
int64_t xp_dialect_capacity(const xp_dialect *d, int64_t tokens, int64_t E, int64_t K);

#ifdef __cplusplus
}
#endif
#endif
