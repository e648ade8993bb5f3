/* The rows of tensor names. Names, shapes and orientations are those of the files that transformers 5.24's
 * save_pretrained wrote for small models of every class here, which are the published spellings; a layout that other
 * files of the family have is the second one, and says so. */
#include "checkpoint_names.h"

#include <stddef.h>
#include <string.h>

#define PLAIN "model.layers.{L}."
#define NESTED "model.language_model.layers.{L}."
#define INSIDE "language_model.model.layers.{L}."

/* One tensor an expert, the Llama names or Mixtral's. */
#define EACH(block)                                                                             \
    {                                                                                           \
        .gate = block "experts.{E}.gate_proj.weight", .up = block "experts.{E}.up_proj.weight", \
        .down = block "experts.{E}.down_proj.weight"                                            \
    }
#define EACH_W(block)                                                               \
    {                                                                               \
        .gate = block "experts.{E}.w1.weight", .up = block "experts.{E}.w3.weight", \
        .down = block "experts.{E}.w2.weight"                                       \
    }
/* All experts in one tensor, gate rows first. */
#define STACKED(block, stored) \
    { .up = block "experts.gate_up_proj", .down = block "experts.down_proj", .orient = (stored) }
#define SHARED(name) \
    .shared = {.gate = name ".gate_proj.weight", .up = name ".up_proj.weight", .down = name ".down_proj.weight"}

/* DeepSeek-V3 and its kin. */
#define V3(type)                                                                                                  \
    {                                                                                                             \
        .model_type = type, .prefix = PLAIN, .scope = "mlp.", .router = "mlp.gate.weight",                        \
        .select_bias = "mlp.gate.e_score_correction_bias", .expert = {EACH("mlp.")}, SHARED("mlp.shared_experts") \
    }
/* A softmax router, no selection bias. */
#define SOFTMAX(type) \
    .model_type = type, .prefix = PLAIN, .scope = "mlp.", .router = "mlp.gate.weight", .expert = {EACH("mlp.")}
#define QWEN_SHARED SHARED("mlp.shared_expert"), .shared_gate = "mlp.shared_expert_gate.weight"
#define SPARSE(type)                                                                                             \
    .model_type = type, .prefix = PLAIN, .scope = "block_sparse_moe.", .router = "block_sparse_moe.gate.weight", \
    .expert = {EACH_W("block_sparse_moe.")}
#define GRANITE(type)                                                                      \
    .model_type = type, .prefix = PLAIN, .router = "block_sparse_moe.router.layer.weight", \
    .expert = {{.up = "block_sparse_moe.input_linear.weight", .down = "block_sparse_moe.output_linear.weight"}}
#define LLAMA4(type, before)                                                                                    \
    {                                                                                                           \
        .model_type = type, .prefix = before, .scope = "feed_forward.", .router = "feed_forward.router.weight", \
        .expert = {STACKED("feed_forward.", XP_EIO)}, SHARED("feed_forward.shared_expert")                      \
    }

const xp_tensor_names xp_tensor_names_of[] = {
    {SOFTMAX("qwen3_moe")},
    {SOFTMAX("qwen2_moe"), QWEN_SHARED},
    {SPARSE("mixtral")},
    {SOFTMAX("qwen3_next"), QWEN_SHARED},
    /* Written one tensor an expert; the class reads files with its own stacked names, too. */
    {.model_type = "qwen3_5_moe",
     .prefix = NESTED "|" PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .expert = {EACH("mlp."), STACKED("mlp.", XP_EOI)},
     QWEN_SHARED},
    /* The class turns a tensor round whose shape does not fit (Transpose(1, 2, check_dims)), and writes [out,in]. */
    {.model_type = "qwen3_vl_moe",
     .prefix = NESTED,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .expert = {{.up = "mlp.experts.gate_up_proj", .down = "mlp.experts.down_proj", .either = 1}}},
    {SOFTMAX("olmoe")},
    {SOFTMAX("flex_olmo")},
    {.model_type = "jamba",
     .prefix = PLAIN,
     .scope = "feed_forward.",
     .router = "feed_forward.router.weight",
     .expert = {EACH("feed_forward.")}},
    {.model_type = "hunyuan_v1_moe",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.wg.weight",
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_mlp")},
    {.model_type = "gpt_oss",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.router.weight",
     .router_bias = "mlp.router.bias",
     .expert = {{.up = "mlp.experts.gate_up_proj",
                 .down = "mlp.experts.down_proj",
                 .up_bias = "mlp.experts.gate_up_proj_bias",
                 .down_bias = "mlp.experts.down_proj_bias",
                 .rows = XP_GATE_INTERLEAVED,
                 .orient = XP_EIO}}},
    {GRANITE("granitemoe"), .scope = "block_sparse_moe."},
    {GRANITE("granitemoeshared"), .scope = "block_sparse_moe.|shared_mlp.",
     .shared = {.up = "shared_mlp.input_linear.weight", .down = "shared_mlp.output_linear.weight"}},
    {SOFTMAX("cohere2_moe"), SHARED("mlp.shared_experts")},
    {SOFTMAX("deepseek_v2"), SHARED("mlp.shared_experts")},
    V3("deepseek_v3"),
    V3("kimi_k2"), /* DeepSeek-V3's class */
    V3("deepseek_v32"),
    V3("glm4_moe"),
    V3("glm4_moe_lite"),
    V3("glm_moe_dsa"),
    V3("dots1"),
    V3("solar_open"),
    {.model_type = "exaone_moe",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .select_bias = "mlp.e_score_correction_bias",
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_experts")},
    {SPARSE("kimi_linear"), .select_bias = "block_sparse_moe.gate.e_score_correction_bias",
     SHARED("block_sparse_moe.shared_experts")},
    {.model_type = "nemotron_h",
     .prefix = "backbone.layers.{L}.",
     .scope = "mixer.",
     .router = "mixer.gate.weight",
     .select_bias = "mixer.gate.e_score_correction_bias",
     .expert = {{.up = "mixer.experts.{E}.up_proj.weight", .down = "mixer.experts.{E}.down_proj.weight"}},
     .shared = {.up = "mixer.shared_experts.up_proj.weight", .down = "mixer.shared_experts.down_proj.weight"}},
    LLAMA4("llama4", INSIDE "|" PLAIN),
    LLAMA4("llama4_text", PLAIN),
    {.model_type = "deepseek_v4",
     .prefix = PLAIN,
     .scope = "ffn.",
     .router = "ffn.gate.weight",
     .select_bias = "ffn.gate.bias",
     .table = "ffn.gate.tid2eid",
     .expert = {EACH_W("ffn.")},
     .shared = {.gate = "ffn.shared_experts.w1.weight",
                .up = "ffn.shared_experts.w3.weight",
                .down = "ffn.shared_experts.w2.weight"}},
    {SPARSE("minimax_m2"), .select_bias = "block_sparse_moe.e_score_correction_bias"},
    {.model_type = "minimax_m3_vl",
     .prefix = INSIDE,
     .scope = "block_sparse_moe.",
     .router = "block_sparse_moe.gate.weight",
     .select_bias = "block_sparse_moe.e_score_correction_bias",
     .expert = {EACH_W("block_sparse_moe.")},
     SHARED("block_sparse_moe.shared_experts")},
    /* Stacked, gate and up apart; the shared expert lies beside the block. */
    {.model_type = "step3p7",
     .prefix = PLAIN,
     .scope = "moe.|share_expert.",
     .router = "moe.gate.weight",
     .select_bias = "moe.router_bias",
     .expert = {{.gate = "moe.gate_proj.weight", .up = "moe.up_proj.weight", .down = "moe.down_proj.weight"}},
     SHARED("share_expert")},
    {.model_type = "afmoe",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.router.gate.weight",
     .select_bias = "mlp.expert_bias",
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_experts")},
    {.model_type = "lfm2_moe",
     .prefix = PLAIN,
     .scope = "feed_forward.",
     .router = "feed_forward.gate.weight",
     .select_bias = "feed_forward.expert_bias",
     .expert = {EACH_W("feed_forward.")}},
    {.model_type = "hy_v3",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.router.gate.weight",
     .select_bias = "mlp.expert_bias",
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_mlp")},
    {.model_type = "longcat_flash",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.router.classifier.weight",
     .select_bias = "mlp.router.e_score_correction_bias",
     .expert = {EACH("mlp.")},
     .null_gate = "mlp.experts.{E}.gate_proj.weight",
     .null_up = "mlp.experts.{E}.up_proj.weight"},
    {.model_type = "ernie4_5_moe",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .select_bias = "mlp.moe_statics.e_score_correction_bias",
     .select_row = 1,
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_experts")},
    {SPARSE("phimoe")},
    {.model_type = "switch_transformers",
     .prefix = "encoder.block.{L}.",
     .scope = "layer.1.mlp.",
     .router = "layer.1.mlp.router.classifier.weight",
     .router_bias = "layer.1.mlp.router.classifier.bias",
     .expert = {{.up = "layer.1.mlp.experts.expert_{E}.wi.weight",
                 .down = "layer.1.mlp.experts.expert_{E}.wo.weight"}}},
    {.model_type = NULL},
};

const xp_tensor_names *xp_tensor_names_find(const char *model_type) {
    for (const xp_tensor_names *n = xp_tensor_names_of; n->model_type; n++) {
        if (strcmp(n->model_type, model_type) == 0)
            return n;
    }
    return NULL;
}
