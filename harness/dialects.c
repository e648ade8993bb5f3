/* The dialect presets. A name carries the library and the version whose classes were run, because the same family
 * computes differently in another version (the dtype of the weights did change).
 *
 * Where a config flag chooses between two records there are two presets, so that a name in a case line always means
 * one record; numbers that a configuration states (groups, factors, limits) are the class's defaults here and the
 * file's in a model. Letters group the families by what their routers do; each macro below is one of them. */
#include <string.h>

#include "xp/dialect.h"

#define HF "transformers 5.24 "

/* ---- experts: products stay wide and are summed over slots wide, one rounding: the library's grouped_mm, its default
 */

#define EXPERT(layout, stored, biases, sum)                                                           \
    .gate_layout = (layout), .orient = (stored), .expert_bias = (biases), .accumulate = XP_ACC_##sum, \
    .shared_combine = XP_COMBINE_ADD
#define PLAIN EXPERT(XP_GATE_CONCAT, XP_EOI, 0, SLOTS_F32)
/* A product is made in the wider dtype of row and weight: with weights in the activation dtype it is rounded to that.
 */
#define NARROW EXPERT(XP_GATE_CONCAT, XP_EOI, 0, PRODUCTS_ACT_F32)
/* The library has a loop over experts only, which adds into the output's dtype. */
#define LOOP EXPERT(XP_GATE_CONCAT, XP_EOI, 0, EAGER_ACT)
/* down(silu(gate x) * up x), each operation rounded. */
#define SILU .gated = 1, .act = XP_ACT_SILU, .act_alpha = 1.0, .act_rounding = XP_ROUND_EACH
/* down(relu(up x)). */
#define RELU .gated = 0, .act = XP_ACT_RELU, .act_alpha = 1.0, .act_rounding = XP_ROUND_EACH
/* (u + 1) g sigmoid(alpha g), g <= limit, |u| <= limit. */
#define CLAMPED_GLU(alpha, most)                                                             \
    .gated = 1, .act = XP_ACT_SILU, .act_alpha = (alpha), .up_offset = 1.0, .limit = (most), \
    .limit_when = XP_LIMIT_BEFORE, .act_rounding = XP_ROUND_EACH
/* silu(min(g, limit)) clamp(u). */
#define CLAMPED_SILU(most, when) SILU, .limit = (most), .limit_when = (when)

/* ---- routers */

#define NO_GROUPS .group_reduce = XP_GROUP_NONE, .n_group = 1, .topk_group = 1
#define TOP2_GROUPS(mask, groups, kept) \
    .group_reduce = XP_GROUP_TOP2SUM, .group_mask = (mask), .n_group = (groups), .topk_group = (kept)
#define DTYPES(of_logits, of_scores, of_weights) \
    .logits_dtype = XP_WIDE_##of_logits, .score_dtype = XP_WIDE_##of_scores, .weight_dtype = XP_WIDE_##of_weights
#define DIVIDED(rule, eps, factor) .renorm = XP_RENORM_##rule, .renorm_eps = (eps), .scale = (factor)
#define WEIGHT(rule, eps, factor) DIVIDED(rule, eps, factor), .logit_scale = 1.0

/* A: softmax over all experts in f32, the K largest, divided by their sum or not. */
#define DIALECT_A(rule, of_weights) \
    .letter = 'A', DTYPES(ACT, F32, of_weights), .score = XP_SCORE_SOFTMAX, NO_GROUPS, WEIGHT(rule, 0.0, 1.0)
/* B: the K largest logits, softmax over them. */
#define DIALECT_B                                                                                              \
    .letter = 'B', DTYPES(ACT, F32, ACT), .score = XP_SCORE_SOFTMAX_TOPK, .select_on = XP_ON_LOGIT, NO_GROUPS, \
    WEIGHT(NONE, 0.0, 1.0)
/* C: softmax in f32 of f32 logits, never divided; groups by their largest score, others count as 0. */
#define DIALECT_C(factor) .letter = 'C', DTYPES(F32, F32, F32), .score = XP_SCORE_SOFTMAX, WEIGHT(NONE, 0.0, factor)
/* D: sigmoid of f32 logits, chosen with a bias in groups by the sum of their two best. */
#define DIALECT_D_AS(mask, rule, eps, factor, groups, kept)                            \
    .letter = 'D', DTYPES(F32, F32, F32), .score = XP_SCORE_SIGMOID, .select_bias = 1, \
    TOP2_GROUPS(mask, groups, kept), WEIGHT(rule, eps, factor)
#define DIALECT_D(rule, eps, factor, groups, kept) DIALECT_D_AS(XP_MASK_NEGINF, rule, eps, factor, groups, kept)
/* G: as D without groups. */
#define DIALECT_G(of_logits, of_scores, of_weights, bias, rule, eps, factor)                                   \
    .letter = 'G', DTYPES(of_logits, of_scores, of_weights), .score = XP_SCORE_SIGMOID, .select_bias = (bias), \
    NO_GROUPS, WEIGHT(rule, eps, factor)
/* F: sqrt(softplus), every step in the activation dtype. */
#define DIALECT_F \
    .letter = 'F', DTYPES(ACT, ACT, ACT), .score = XP_SCORE_SQRT_SOFTPLUS, NO_GROUPS, WEIGHT(SUM_PLUS_EPS, 1e-20, 1.5)
/* H: softmax in f32 of f32 logits, chosen with a bias. */
#define DIALECT_H(of_weights, rule, eps, factor)                                                         \
    .letter = 'H', DTYPES(F32, F32, of_weights), .score = XP_SCORE_SOFTMAX, .select_bias = 1, NO_GROUPS, \
    WEIGHT(rule, eps, factor)

/* M: softmax of f32 logits, rounded to the activation dtype before the choice, so that the lowest of those that round
 * alike wins; an expert takes so many slots and no more. */
#define DIALECT_M(rule) \
    .letter = 'M', DTYPES(F32, ACT, ACT), .score = XP_SCORE_SOFTMAX, NO_GROUPS, WEIGHT(rule, 0.0, 1.0), .capacity = 64

#define AUX(coef) .aux_coef = (coef)

const xp_dialect xp_dialects[] = {
    {.name = "hf-5.24/qwen3_moe",
     .meaning = "softmax in f32, top-k, weights divided by their sum and rounded to the activation dtype",
     .source = HF "Qwen3MoeTopKRouter, Qwen3MoeExperts; norm_topk_prob true",
     DIALECT_A(SUM, ACT),
     SILU,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/qwen3_moe-raw",
     .meaning = "as hf-5.24/qwen3_moe, weights not divided by their sum",
     .source = HF "Qwen3MoeTopKRouter, Qwen3MoeExperts; norm_topk_prob false, the class default",
     DIALECT_A(NONE, ACT),
     SILU,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/qwen2_moe",
     .meaning = "softmax in f32, top-k, weights rounded to the activation dtype; shared expert times sigmoid(x . v)",
     .source = HF "Qwen2MoeTopKRouter, Qwen2MoeSparseMoeBlock; norm_topk_prob false, the class default",
     DIALECT_A(NONE, ACT),
     SILU,
     NARROW,
     .shared_gate = 1,
     AUX(0.001)},
    {.name = "hf-5.24/qwen2_moe-renorm",
     .meaning = "as hf-5.24/qwen2_moe, weights divided by their sum",
     .source = HF "Qwen2MoeTopKRouter, Qwen2MoeSparseMoeBlock; norm_topk_prob true",
     DIALECT_A(SUM, ACT),
     SILU,
     NARROW,
     .shared_gate = 1,
     AUX(0.001)},
    {.name = "hf-5.24/mixtral",
     .meaning = "softmax in f32, top-k, weights always divided by their sum and left in f32",
     .source = HF "MixtralTopKRouter, MixtralExperts",
     DIALECT_A(SUM, F32),
     SILU,
     PLAIN,
     AUX(0.001)},
    {.name = "hf-5.24/olmoe",
     .meaning = "softmax in f32, top-k, weights as they are, rounded to the activation dtype; balance loss x 0.01",
     .source = HF "OlmoeTopKRouter, OlmoeExperts; norm_topk_prob false, the class default",
     DIALECT_A(NONE, ACT),
     SILU,
     NARROW,
     AUX(0.01)},
    {.name = "hf-5.24/olmoe-renorm",
     .meaning = "as hf-5.24/olmoe, weights divided by their sum",
     .source = HF "OlmoeTopKRouter, OlmoeExperts; norm_topk_prob true",
     DIALECT_A(SUM, ACT),
     SILU,
     NARROW,
     AUX(0.01)},
    {.name = "hf-5.24/hunyuan_v1_moe",
     .meaning =
         "softmax of f32 logits, top-k, weights divided by their sum and left in f32; shared expert without gate",
     .source = HF "HunYuanMoEV1Gate, HunYuanMoEV1Moe",
     .letter = 'A',
     DTYPES(F32, F32, F32),
     .score = XP_SCORE_SOFTMAX,
     NO_GROUPS,
     WEIGHT(SUM, 0.0, 1.0),
     SILU,
     PLAIN},
    {.name = "hf-5.24/lara_mini",
     .meaning =
         "softmax of f32 logits, top-k, weights divided by their sum and rounded to the activation dtype; shared "
         "expert without gate",
     .source = HF "LaraMiniTopKRouter, LaraMiniSparseMoeBlock; norm_topk_prob true, the class default",
     .letter = 'A',
     DTYPES(F32, F32, ACT),
     .score = XP_SCORE_SOFTMAX,
     NO_GROUPS,
     WEIGHT(SUM, 0.0, 1.0),
     SILU,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/dbrx",
     .meaning = "softmax rounded to the activation dtype, top-k, weights divided by their sum in that dtype",
     .source = HF "DbrxFFN, DbrxExperts; moe_normalize_expert_weights 1: the L1 norm of positive weights is their sum",
     .letter = 'A',
     DTYPES(ACT, ACT, ACT),
     .score = XP_SCORE_SOFTMAX,
     NO_GROUPS,
     WEIGHT(SUM, 0.0, 1.0),
     SILU,
     LOOP,
     AUX(0.01)},
    {.name = "hf-5.24/gpt_oss",
     .meaning =
         "router bias, top-k on logits, softmax over the chosen; clamped (u + 1) g sigmoid(1.702 g), interleaved, "
         "biases",
     .source = HF "GptOssTopKRouter, GptOssExperts",
     DIALECT_B,
     .router_bias = 1,
     CLAMPED_GLU(1.702, 7.0),
     EXPERT(XP_GATE_INTERLEAVED, XP_EIO, 1, PRODUCTS_ACT_F32),
     AUX(0.001)},
    {.name = "hf-5.24/openai_privacy_filter",
     .meaning = "as hf-5.24/gpt_oss with f32 logits and weights, the gate's rows first; weights are divided by k, the "
                "output is multiplied by it",
     .source = HF "OpenAIPrivacyFilterTopKRouter, OpenAIPrivacyFilterExperts, OpenAIPrivacyFilterMLP",
     .letter = 'B',
     DTYPES(F32, F32, F32),
     .score = XP_SCORE_SOFTMAX_TOPK,
     .select_on = XP_ON_LOGIT,
     NO_GROUPS,
     WEIGHT(NONE, 0.0, 1.0),
     .router_bias = 1,
     .weight_div_k = 1,
     CLAMPED_GLU(1.702, 7.0),
     EXPERT(XP_GATE_CONCAT, XP_EIO, 1, SLOTS_F32),
     AUX(0.001)},
    {.name = "hf-5.24/granitemoe",
     .meaning = "top-k on logits, softmax over the chosen",
     .source = HF "GraniteMoeTopKRouter, GraniteMoeMoE",
     DIALECT_B,
     SILU,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/aria",
     .meaning = "as hf-5.24/granitemoe without a balance loss, matrices stored [in,out]; shared experts",
     .source = HF "AriaTextTopKRouter, AriaExperts, AriaTextMoELayer",
     DIALECT_B,
     SILU,
     EXPERT(XP_GATE_CONCAT, XP_EIO, 0, PRODUCTS_ACT_F32)},
    {.name = "hf-5.24/cohere2_moe",
     .meaning = "top-k on logits, softmax over the chosen; shared and routed outputs are averaged",
     .source = HF "Cohere2MoeTopKRouter; expert_selection_fn softmax, shared_expert_combination_strategy average",
     DIALECT_B,
     SILU,
     .gate_layout = XP_GATE_CONCAT,
     .orient = XP_EOI,
     .accumulate = XP_ACC_PRODUCTS_ACT_F32,
     .shared_combine = XP_COMBINE_AVERAGE},
    {.name = "hf-5.24/cohere2_moe-sigmoid",
     .meaning = "top-k on logits, sigmoid of the chosen divided by their sum; shared and routed outputs are averaged",
     .source = HF "Cohere2MoeTopKRouter; expert_selection_fn sigmoid",
     .letter = 'J',
     DTYPES(ACT, ACT, ACT),
     .score = XP_SCORE_SIGMOID,
     .select_on = XP_ON_LOGIT,
     NO_GROUPS,
     WEIGHT(SUM, 0.0, 1.0),
     SILU,
     .gate_layout = XP_GATE_CONCAT,
     .orient = XP_EOI,
     .accumulate = XP_ACC_PRODUCTS_ACT_F32,
     .shared_combine = XP_COMBINE_AVERAGE},
    {.name = "hf-5.24/deepseek_v2",
     .meaning = "softmax of f32 logits, top-k, weights times a factor, never divided; shared experts",
     .source = HF "DeepseekV2TopkRouter, DeepseekV2Moe; topk_method greedy",
     DIALECT_C(1.0),
     NO_GROUPS,
     SILU,
     PLAIN},
    {.name = "hf-5.24/deepseek_v2-groups",
     .meaning = "as hf-5.24/deepseek_v2 in the groups with the largest score; others score and weigh 0",
     .source = HF "DeepseekV2TopkRouter, DeepseekV2Moe; topk_method group_limited_greedy",
     DIALECT_C(16.0),
     .group_reduce = XP_GROUP_MAX,
     .group_mask = XP_MASK_ZERO,
     .masked_weight = 1,
     .n_group = 8,
     .topk_group = 3,
     SILU,
     PLAIN},
    {.name = "hf-5.24/deepseek_v3",
     .meaning = "sigmoid of f32 logits, choice with a bias in the best groups, weights / (sum + 1e-20) x 2.5; shared "
                "experts",
     .source = HF "DeepseekV3TopkRouter, DeepseekV3MoE",
     DIALECT_D(SUM_PLUS_EPS, 1e-20, 2.5, 8, 4),
     SILU,
     PLAIN},
    {.name = "hf-5.24/glm4_moe",
     .meaning = "as hf-5.24/deepseek_v3 with one group and no factor",
     .source = HF "Glm4MoeTopkRouter, Glm4MoeMoE",
     DIALECT_D(SUM_PLUS_EPS, 1e-20, 1.0, 1, 1),
     SILU,
     PLAIN},
    {.name = "hf-5.24/dots1",
     .meaning = "as hf-5.24/glm4_moe, weights not divided by their sum",
     .source = HF "Dots1TopkRouter, Dots1MoE; norm_topk_prob false, the class default",
     DIALECT_D(NONE, 0.0, 1.0, 1, 1),
     SILU,
     PLAIN},
    {.name = "hf-5.24/kimi_linear",
     .meaning = "as hf-5.24/deepseek_v3 with one group and a factor of 2.446",
     .source = HF "KimiLinearTopkRouter, KimiLinearMoE",
     DIALECT_D(SUM_PLUS_EPS, 1e-20, 2.446, 1, 1),
     SILU,
     PLAIN},
    {.name = "hf-5.24/axk2",
     .meaning = "as hf-5.24/deepseek_v3, experts of other groups count as 0",
     .source = HF "AXK2TopkRouter, AXK2MoE; n_group 8, topk_group 4: without the two there are no groups",
     DIALECT_D_AS(XP_MASK_ZERO, SUM_PLUS_EPS, 1e-20, 2.5, 8, 4),
     SILU,
     PLAIN},
    {.name = "hf-5.24/hy_v4",
     .meaning =
         "routes as hf-5.24/deepseek_v3 with one group and a factor of 2.827; clamped silu in the experts, not in "
         "the shared ones",
     .source = HF "HYV4TopkRouter, HYV4Experts, HYV4MoE",
     DIALECT_D(SUM_PLUS_EPS, 1e-20, 2.827, 1, 1),
     CLAMPED_SILU(10.0, XP_LIMIT_BEFORE),
     PLAIN},
    {.name = "hf-5.24/glm5_next",
     .meaning = "routes as hf-5.24/deepseek_v3 with one group; clamped silu in the experts and in the shared ones",
     .source = HF "Glm5NextTextTopkRouter, Glm5NextTextExperts, Glm5NextTextMoE",
     DIALECT_D(SUM_PLUS_EPS, 1e-20, 2.5, 1, 1),
     CLAMPED_SILU(10.0, XP_LIMIT_BEFORE),
     .shared_limit = 1,
     PLAIN,
     AUX(0.001)},
    {.name = "hf-5.24/beam",
     .meaning =
         "routes as hf-5.24/deepseek_v3, the summed output x 2.5; silu(g) u in f32, rounded once; no shared expert",
     .source = HF "BeamTopKRouter, BeamExperts, BeamMoE",
     DIALECT_D(SUM_PLUS_EPS, 1e-20, 2.5, 8, 4),
     .scale_at = XP_SCALE_OUTPUT,
     .gated = 1,
     .act = XP_ACT_SILU,
     .act_alpha = 1.0,
     .act_rounding = XP_ROUND_ONCE,
     PLAIN},
    {.name = "hf-5.24/nemotron_h",
     .meaning = "routes as hf-5.24/glm4_moe; experts are down(relu(up x)^2), without a gate",
     .source = HF "NemotronHTopkRouter, NemotronHMoE",
     DIALECT_D(SUM_PLUS_EPS, 1e-20, 1.0, 1, 1),
     .gated = 0,
     .act = XP_ACT_RELU2,
     .act_alpha = 1.0,
     .act_rounding = XP_ROUND_EACH,
     PLAIN},
    {.name = "hf-5.24/llama4",
     .meaning = "top-k on logits; the experts' input, not their output, is multiplied by the sigmoid; shared expert",
     .source = HF "Llama4Router, Llama4TextExperts, Llama4TextMoe",
     .letter = 'E',
     DTYPES(ACT, F32, ACT),
     .score = XP_SCORE_SIGMOID,
     .select_on = XP_ON_LOGIT,
     NO_GROUPS,
     WEIGHT(NONE, 0.0, 1.0),
     .weight_at = XP_AT_INPUT,
     SILU,
     EXPERT(XP_GATE_CONCAT, XP_EIO, 0, SLOTS_F32)},
    {.name = "hf-5.24/deepseek_v4",
     .meaning =
         "sqrt(softplus) in the activation dtype, choice with a bias, weights / (sum + 1e-20) x 1.5; clamped silu",
     .source = HF "DeepseekV4TopKRouter, DeepseekV4SparseMoeBlock",
     DIALECT_F,
     .select_bias = 1,
     CLAMPED_SILU(10.0, XP_LIMIT_BEFORE),
     .shared_limit = 1,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/deepseek_v4-hash",
     .meaning = "as hf-5.24/deepseek_v4, the experts chosen by a table from token id to experts",
     .source = HF "DeepseekV4HashRouter, DeepseekV4SparseMoeBlock; layers below num_hash_layers",
     DIALECT_F,
     .select_on = XP_ON_TOKEN_TABLE,
     CLAMPED_SILU(10.0, XP_LIMIT_BEFORE),
     .shared_limit = 1,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/minimax_m2",
     .meaning = "sigmoid in f32 of rounded logits, choice with a bias, weights divided by their sum, left in f32",
     .source = HF "MiniMaxM2TopKRouter, MiniMaxM2SparseMoeBlock",
     DIALECT_G(ACT, F32, F32, 1, SUM, 0.0, 1.0),
     SILU,
     PLAIN,
     AUX(0.001)},
    {.name = "hf-5.24/minimax_m3_vl",
     .meaning = "routes as hf-5.24/minimax_m2, the summed output x 2; clamped (u + 1) g sigmoid(1.702 g), gate first",
     .source = HF "MiniMaxM3VLTopKRouter, MiniMaxM3VLSparseMoeBlock",
     DIALECT_G(ACT, F32, F32, 1, SUM, 0.0, 2.0),
     .scale_at = XP_SCALE_OUTPUT,
     CLAMPED_GLU(1.702, 7.0),
     .shared_limit = 1,
     PLAIN,
     AUX(0.001)},
    {.name = "hf-5.24/step3p7",
     .meaning = "routes as hf-5.24/minimax_m3_vl; silu limited after the activation",
     .source = HF "Step3p7TopKRouter, Step3p7SparseMoeBlock; swiglu_limits of a layer",
     DIALECT_G(ACT, F32, F32, 1, SUM, 0.0, 3.0),
     .scale_at = XP_SCALE_OUTPUT,
     CLAMPED_SILU(7.0, XP_LIMIT_AFTER),
     .shared_limit = 1,
     LOOP},
    {.name = "hf-5.24/afmoe",
     .meaning = "sigmoid in f32 of rounded logits, choice with a bias, weights / (sum + 1e-20), left in f32; shared "
                "experts",
     .source = HF "AfmoeTokenChoiceRouter, AfmoeSparseMoeBlock",
     DIALECT_G(ACT, F32, F32, 1, SUM_PLUS_EPS, 1e-20, 1.0),
     SILU,
     PLAIN},
    {.name = "hf-5.24/hy_v3",
     .meaning = "sigmoid of f32 logits, choice with a bias, weights / (sum + 1e-20) x 2.826; shared expert",
     .source = HF "HYV3TopKRouter, HYV3MoE",
     DIALECT_G(F32, F32, F32, 1, SUM_PLUS_EPS, 1e-20, 2.826),
     SILU,
     PLAIN},
    {.name = "hf-5.24/flint",
     .meaning = "sigmoid of f32 logits, no bias, weights divided by their sum",
     .source = HF "FlintTopKRouter, FlintSparseMoeBlock",
     DIALECT_G(F32, F32, F32, 0, SUM, 0.0, 1.0),
     SILU,
     PLAIN,
     AUX(0.0005)},
    {.name = "hf-5.24/laguna",
     .meaning =
         "sigmoid in f32 of rounded logits with an optional soft cap, choice with a bias, weights divided by their "
         "sum and rounded to the activation dtype; the summed output x a factor; shared expert",
     .source = HF "LagunaTopKRouter, LagunaSparseMoeBlock; moe_router_logit_softcapping 0 is the class default",
     DIALECT_G(ACT, F32, ACT, 1, SUM, 0.0, 1.0),
     .scale_at = XP_SCALE_OUTPUT,
     SILU,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/inkling2",
     .meaning = "routes as hf-5.24/hy_v3 with a factor of 8; 4 tanh(g / 4) sigmoid(g) 25 tanh(u / 25) in f32, rounded "
                "once; no shared expert",
     .source = HF "Inkling2TopKRouter, Inkling2SoftcappedSwiGLU, Inkling2SparseMoeBlock; scoring_func sigmoid",
     DIALECT_G(F32, F32, F32, 1, SUM_PLUS_EPS, 1e-20, 8.0),
     .gated = 1,
     .act = XP_ACT_SOFTCAP,
     .act_alpha = 1.0,
     .gate_cap = 4.0,
     .up_cap = 25.0,
     .act_rounding = XP_ROUND_ONCE,
     PLAIN},
    {.name = "hf-5.24/muse_spark",
     .meaning = "sigmoid of f32 logits x 0.1767766952966369, choice with a bias, weights / (sum + 1e-15)",
     .source = HF "MuseSparkTopkRouter, MuseSparkExperts. The norms before and behind the experts are the model's",
     .letter = 'G',
     DTYPES(F32, F32, F32),
     .score = XP_SCORE_SIGMOID,
     .select_bias = 1,
     NO_GROUPS,
     DIVIDED(SUM_PLUS_EPS, 1e-15, 1.0),
     .logit_scale = 0.1767766952966369,
     SILU,
     PLAIN},
    {.name = "hf-5.24/lfm2_moe",
     .meaning = "sigmoid in the activation dtype, choice with a bias, weights / (sum + 1e-6), all in that dtype",
     .source = HF "Lfm2MoeTopKRouter, Lfm2MoeSparseMoeBlock; use_expert_bias true",
     DIALECT_G(ACT, ACT, ACT, 1, SUM_PLUS_EPS, 1e-6, 1.0),
     SILU,
     NARROW},
    {.name = "hf-5.24/longcat_flash",
     .meaning = "softmax of f32 logits, choice with a bias, weights x 6, never divided; ids from E return their input",
     .source = HF "LongcatFlashTopkRouter, LongcatFlashMoE",
     DIALECT_H(F32, NONE, 0.0, 6.0),
     .null_experts = 4,
     .null_kind = XP_NULL_IDENTITY,
     SILU,
     LOOP},
    {.name = "hf-5.24/ernie4_5_moe",
     .meaning =
         "softmax of f32 logits, choice with a bias, weights / max(sum, 1e-12), rounded to the activation dtype; "
         "shared experts",
     .source = HF "Ernie4_5_MoeTopKRouter, Ernie4_5_MoeSparseMoeBlock",
     DIALECT_H(ACT, MAX_EPS, 1e-12, 1.0),
     SILU,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/mistral4",
     .meaning =
         "softmax rounded to the activation dtype, groups by the sum of their two best, others count as 0 but weigh "
         "their own score / (sum + 1e-20)",
     .source = HF "Mistral4TopkRouter, Mistral4MoE",
     .letter = 'I',
     DTYPES(ACT, ACT, ACT),
     .score = XP_SCORE_SOFTMAX,
     TOP2_GROUPS(XP_MASK_ZERO, 4, 2),
     WEIGHT(SUM_PLUS_EPS, 1e-20, 1.0),
     SILU,
     NARROW},
    {.name = "hf-5.24/mistral_large4",
     .meaning = "as hf-5.24/mistral4 in f32",
     .source = HF "MistralLarge4TextTopkRouter, MistralLarge4TextMoE",
     .letter = 'I',
     DTYPES(F32, F32, F32),
     .score = XP_SCORE_SOFTMAX,
     TOP2_GROUPS(XP_MASK_ZERO, 4, 2),
     WEIGHT(SUM_PLUS_EPS, 1e-20, 1.0),
     SILU,
     PLAIN},
    {.name = "hf-5.24/kolibri1",
     .meaning = "top-k on f32 logits with a bias, sigmoid of the chosen, not divided",
     .source = HF "Kolibri1TopKRouter; norm_topk_prob false",
     .letter = 'J',
     DTYPES(F32, F32, F32),
     .score = XP_SCORE_SIGMOID,
     .select_on = XP_ON_LOGIT,
     .select_bias = 1,
     NO_GROUPS,
     WEIGHT(NONE, 0.0, 1.0),
     SILU,
     PLAIN},
    {.name = "hf-5.24/kolibri1-renorm",
     .meaning = "as hf-5.24/kolibri1, weights divided by their sum",
     .source = HF "Kolibri1TopKRouter; norm_topk_prob true",
     .letter = 'J',
     DTYPES(F32, F32, F32),
     .score = XP_SCORE_SIGMOID,
     .select_on = XP_ON_LOGIT,
     .select_bias = 1,
     NO_GROUPS,
     WEIGHT(SUM, 0.0, 1.0),
     SILU,
     PLAIN},
    {.name = "hf-5.24/inkling",
     .meaning =
         "sigmoid of f32 logits, choice with a bias; the chosen and the shared experts that the router weighs divide 8 x "
         "a trained factor by exp(log s - log sum s), rounded to the activation dtype; a shared expert's weight "
         "multiplies its hidden rows",
     .source = HF "InklingTopkRouter, InklingSharedExperts, InklingMoE; n_shared_experts 2",
     .letter = 'L',
     DTYPES(F32, F32, ACT),
     .score = XP_SCORE_SIGMOID,
     .select_bias = 1,
     NO_GROUPS,
     WEIGHT(LOG_SUM, 0.0, 8.0),
     .expert_scale = XP_FACTOR_ONE,
     .shared_rows = 2,
     SILU,
     NARROW},
    {.name = "hf-5.24/phimoe",
     .meaning = "sparsemixer in eval mode: two experts, each by the softmax of those within a margin of the best left",
     .source = HF "PhimoeTopKRouter; router_jitter_noise 0.01",
     .letter = 'K',
     DTYPES(ACT, ACT, ACT),
     .score = XP_SCORE_SPARSEMIXER,
     .sparse_eps = 0.01,
     .select_on = XP_ON_LOGIT,
     NO_GROUPS,
     WEIGHT(NONE, 0.0, 1.0),
     SILU,
     NARROW,
     AUX(0.001)},
    {.name = "hf-5.24/switch_transformers",
     .meaning =
         "softmax of f32 logits, one expert a token, its rounded probability the weight; 64 tokens of a sequence an "
         "expert, later ones get nothing; relu experts without a gate",
     .source = HF "SwitchTransformersTop1Router, SwitchTransformersSparseMLP; k is 1",
     DIALECT_M(NONE),
     .overflow = XP_OVERFLOW_ORDER,
     RELU,
     LOOP,
     AUX(0.001),
     .z_coef = 0.001},
    {.name = "hf-5.24/nllb_moe",
     .meaning = "softmax of f32 logits, two experts a token, the first by its rounded probability, the second by its "
                "logit; weights divided by their sum; 64 slots an expert, second choices after all first ones; relu "
                "experts with biases",
     .source =
         HF "NllbMoeTop2Router while training, normalize_router_prob_before_dropping true, "
            "batch_prioritized_routing false; k is 2. The class's block takes the mask of first choices for "
            "expert numbers and runs experts 0 and 1 alone: the record is what its router means. It divides by at "
            "least the eps of the dtype, which the sum of two of up to 256 experts never falls below",
     DIALECT_M(SUM),
     .select_on = XP_ON_FIRST_SCORE,
     .overflow = XP_OVERFLOW_SLOTS,
     RELU,
     EXPERT(XP_GATE_CONCAT, XP_EOI, 1, EAGER_ACT),
     AUX(0.001)},
    {.name = "hf-5.24/gemma4",
     .meaning = "softmax in f32 of a norm of the router's own, top-k, weights divided by their sum, times a factor an "
                "expert, left in f32; gelu_tanh(g) u; a dense MLP as shared expert",
     .source = HF "Gemma4TextRouter, Gemma4TextExperts, Gemma4TextDecoderLayer; enable_moe_block true",
     .letter = 'O',
     .router_in = XP_ROUTER_RMSNORM_SCALED,
     DTYPES(ACT, F32, F32),
     .score = XP_SCORE_SOFTMAX,
     NO_GROUPS,
     WEIGHT(SUM, 0.0, 1.0),
     .expert_scale = XP_FACTOR_EACH,
     .gated = 1,
     .act = XP_ACT_GELU_TANH,
     .act_alpha = 1.0,
     .act_rounding = XP_ROUND_EACH,
     PLAIN},
    {.name = "hf-5.24/zaya",
     .meaning = "logits of an MLP of the router, whose state goes on from block to block; softmax in the activation "
                "dtype over the experts and one class that skips, chosen with a bias in f32",
     .source = HF "ZayaRouter, ZayaRouterMLP, ZayaExperts; k is 1",
     .letter = 'Q',
     .router_in = XP_ROUTER_RECURRENT_MLP,
     DTYPES(ACT, ACT, ACT),
     .score = XP_SCORE_SOFTMAX,
     .select_bias = 1,
     NO_GROUPS,
     WEIGHT(NONE, 0.0, 1.0),
     .null_experts = 1,
     .null_kind = XP_NULL_SKIP,
     SILU,
     NARROW},
    {.name = NULL},
};

const xp_dialect *xp_dialect_find(const char *name) {
    for (const xp_dialect *d = xp_dialects; d->name; d++) {
        if (strcmp(d->name, name) == 0)
            return d;
    }
    return NULL;
}
