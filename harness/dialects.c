/* The dialect presets. A name carries the library and the version whose classes were run, because the same family
 * computes differently in another version (the dtype of the weights did change).
 *
 * Where a config flag chooses between two dialects there are two presets, so that a name in a case line always means
 * one record. Dialect A: logits in the activation dtype; softmax over all experts in f32; the K largest; divided by
 * their sum or not; weights rounded to the activation dtype or left in f32. */
#include <string.h>

#include "xp/dialect.h"

/* The expert of all three families: down(silu(gate x) * up x), each operation rounded; gate columns first. Products
 * stay wide and are summed over slots wide, one rounding (the library's grouped_mm path, its default). */
#define PLAIN_EXPERT                                                                                                \
    .gated = 1, .act = XP_ACT_SILU, .act_alpha = 1.0, .act_rounding = XP_ROUND_EACH, .gate_layout = XP_GATE_CONCAT, \
    .orient = XP_EOI, .accumulate = XP_ACC_SLOTS_F32, .shared_combine = XP_COMBINE_ADD

#define DIALECT_A(renorm_rule, weight_rule)                                                                 \
    .letter = 'A', .logits_dtype = XP_WIDE_ACT, .score_dtype = XP_WIDE_F32, .weight_dtype = (weight_rule),  \
    .logit_scale = 1.0, .score = XP_SCORE_SOFTMAX, .select_on = XP_ON_SCORE, .group_reduce = XP_GROUP_NONE, \
    .n_group = 1, .topk_group = 1, .renorm = (renorm_rule), .scale = 1.0, .scale_at = XP_SCALE_WEIGHT,      \
    .weight_at = XP_AT_OUTPUT, .aux_coef = 0.001

const xp_dialect xp_dialects[] = {
    {.name = "hf-5.24/qwen3_moe",
     .meaning = "softmax in f32, top-k, weights divided by their sum and rounded to the activation dtype",
     .source = "transformers 5.24 Qwen3MoeTopKRouter, Qwen3MoeExperts; norm_topk_prob true",
     DIALECT_A(XP_RENORM_SUM, XP_WIDE_ACT),
     PLAIN_EXPERT},
    {.name = "hf-5.24/qwen3_moe-raw",
     .meaning = "as hf-5.24/qwen3_moe, weights not divided by their sum",
     .source = "transformers 5.24 Qwen3MoeTopKRouter, Qwen3MoeExperts; norm_topk_prob false, the class default",
     DIALECT_A(XP_RENORM_NONE, XP_WIDE_ACT),
     PLAIN_EXPERT},
    {.name = "hf-5.24/qwen2_moe",
     .meaning = "softmax in f32, top-k, weights rounded to the activation dtype; shared expert times sigmoid(x . v)",
     .source = "transformers 5.24 Qwen2MoeTopKRouter, Qwen2MoeSparseMoeBlock; norm_topk_prob false, the class default",
     DIALECT_A(XP_RENORM_NONE, XP_WIDE_ACT),
     PLAIN_EXPERT,
     .shared_gate = 1},
    {.name = "hf-5.24/qwen2_moe-renorm",
     .meaning = "as hf-5.24/qwen2_moe, weights divided by their sum",
     .source = "transformers 5.24 Qwen2MoeTopKRouter, Qwen2MoeSparseMoeBlock; norm_topk_prob true",
     DIALECT_A(XP_RENORM_SUM, XP_WIDE_ACT),
     PLAIN_EXPERT,
     .shared_gate = 1},
    {.name = "hf-5.24/mixtral",
     .meaning = "softmax in f32, top-k, weights always divided by their sum and left in f32",
     .source = "transformers 5.24 MixtralTopKRouter, MixtralExperts",
     DIALECT_A(XP_RENORM_SUM, XP_WIDE_F32),
     PLAIN_EXPERT},
    {.name = NULL},
};

const xp_dialect *xp_dialect_find(const char *name) {
    for (const xp_dialect *d = xp_dialects; d->name; d++) {
        if (strcmp(d->name, name) == 0)
            return d;
    }
    return NULL;
}
