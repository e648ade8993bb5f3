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
#define V3_AT(type, before, bias)                                                                                \
    {                                                                                                            \
        .model_type = type, .prefix = before, .scope = "mlp.", .router = "mlp.gate.weight", .select_bias = bias, \
        .expert = {EACH("mlp.")}, SHARED("mlp.shared_experts")                                                   \
    }
/* The same without shared experts. */
#define V3_ALONE(type)                                                                     \
    {                                                                                      \
        .model_type = type, .prefix = PLAIN, .scope = "mlp.", .router = "mlp.gate.weight", \
        .select_bias = "mlp.gate.e_score_correction_bias", .expert = {                     \
            EACH("mlp.")                                                                   \
        }                                                                                  \
    }
#define HY_V4(type)                                                                                         \
    {                                                                                                       \
        .model_type = type, .prefix = PLAIN, .scope = "mlp.", .router = "mlp.gate.weight",                  \
        .select_bias = "mlp.gate.e_score_correction_bias", .expert = {STACKED("mlp.", XP_EOI)}, .shared = { \
            .gate = "mlp.shared_experts.linear_gate.weight",                                                \
            .up = "mlp.shared_experts.up_proj.weight",                                                      \
            .down = "mlp.shared_experts.down_proj.weight"                                                   \
        }                                                                                                   \
    }
/* pre_feedforward_layernorm_2 is the norm of the block's input, which is not read. */
#define GEMMA4(type, before)                                                                                        \
    {                                                                                                               \
        .model_type = type, .prefix = before,                                                                       \
        .scope = "router.|experts.|mlp.|pre_feedforward_layernorm.|post_feedforward_layernorm",                     \
        .router = "router.proj.weight", .expert_scale = "router.per_expert_scale",                                  \
        .router_mlp = {[3] = "router.scale"}, .routed_norm = "post_feedforward_layernorm_2.weight",                 \
        .shared_norm = "post_feedforward_layernorm_1.weight", .shared_in_norm = "pre_feedforward_layernorm.weight", \
        .block_norm = "post_feedforward_layernorm.weight", .expert = {STACKED("", XP_EOI)}, SHARED("mlp")           \
    }
#define INKLING2(type)                                                                                       \
    {                                                                                                        \
        .model_type = type, .prefix = "model.llm.layers.{L}.", .scope = "mlp.", .router = "mlp.gate.weight", \
        .select_bias = "mlp.gate.bias", .expert = {                                                          \
            {.up = "mlp.experts.w13_weight", .down = "mlp.experts.w2_weight", .rows = XP_GATE_INTERLEAVED}   \
        }                                                                                                    \
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
    {.model_type = "dbrx",
     .prefix = "transformer.blocks.{L}.",
     .scope = "ffn.",
     .router = "ffn.router.layer.weight",
     .expert = {{.gate = "ffn.experts.mlp.w1", .up = "ffn.experts.mlp.v1", .down = "ffn.experts.mlp.w2", .flat = 1}}},
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
    {.model_type = "jetmoe",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.router.layer.weight",
     .expert = {{.up = "mlp.input_linear.weight", .down = "mlp.output_linear.weight"}},
     .out_bias = "mlp.bias"},
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
     .latent_down = "mixer.fc1_latent_proj.weight",
     .latent_up = "mixer.fc2_latent_proj.weight",
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
     .unread = "mlp.experts.{E}.gate_proj.weight|mlp.experts.{E}.up_proj.weight"},
    {.model_type = "ernie4_5_moe",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .select_bias = "mlp.moe_statics.e_score_correction_bias",
     .select_row = 1,
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_experts")},
    /* Behind the text tokens' experts those of the image tokens, with a router and a bias of their own. */
    {.model_type = "ernie4_5_vl_moe",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .router_orient = XP_EIO,
     .select_bias = "mlp.moe_statics.e_score_correction_bias",
     .select_row = 2,
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_experts"),
     .unread = "mlp.gate.weight_1|mlp.experts.{E}.gate_proj.weight|mlp.experts.{E}.up_proj.weight|"
               "mlp.experts.{E}.down_proj.weight"},
    {SPARSE("phimoe")},
    {SPARSE("minimax")},
    {SOFTMAX("mellum")},
    {.model_type = "lara_mini",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .expert = {STACKED("mlp.", XP_EOI)},
     SHARED("mlp.shared_expert")},
    {.model_type = "qwen4_exp",
     .prefix = NESTED,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .expert = {EACH("mlp.")},
     QWEN_SHARED},
    {.model_type = "qwen3_omni_moe",
     .prefix = "thinker." PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .expert = {EACH("mlp.")}},
    {SOFTMAX("qwen3_omni_moe_thinker")},
    {GRANITE("granitemoehybrid"), .scope = "block_sparse_moe.|shared_mlp.",
     .shared = {.up = "shared_mlp.input_linear.weight", .down = "shared_mlp.output_linear.weight"}},
    {.model_type = "granitemoe_swa",
     .prefix = PLAIN,
     .scope = "block_sparse_moe.|shared_mlp.",
     .router = "block_sparse_moe.router.weight",
     .expert = {STACKED("block_sparse_moe.", XP_EOI)},
     .shared = {.up = "shared_mlp.input_linear.weight", .down = "shared_mlp.output_linear.weight"}},
    {.model_type = "aria",
     .prefix = INSIDE "|" PLAIN,
     .scope = "mlp.",
     .router = "mlp.router.weight",
     .expert = {{.up = "mlp.experts.fc1.weight", .down = "mlp.experts.fc2.weight", .orient = XP_EIO}},
     SHARED("mlp.shared_experts")},
    {.model_type = "openai_privacy_filter",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.router.weight",
     .router_bias = "mlp.router.bias",
     .expert = {{.up = "mlp.experts.gate_up_proj",
                 .down = "mlp.experts.down_proj",
                 .up_bias = "mlp.experts.gate_up_proj_bias",
                 .down_bias = "mlp.experts.down_proj_bias",
                 .orient = XP_EIO}}},
    {SOFTMAX("deepseek_ocr2"), SHARED("mlp.shared_experts")},
    {SOFTMAX("unlimited_ocr"), SHARED("mlp.shared_experts")},
    /* The class renames the layers of what it saves; published files call them layers. */
    V3_AT("kimi_k25", "language_model.model.blocks.{L}.|" INSIDE, "mlp.gate.e_score_correction_bias"),
    V3_AT("glm4v_moe", NESTED, "mlp.gate.e_score_correction_bias"),
    V3("sarvam_mla"),
    V3_AT("sarvam_moe", PLAIN, "mlp.gate.expert_bias"),
    V3_AT("bailing_hybrid", PLAIN, "mlp.gate.expert_bias"),
    V3("dots3_note"),
    V3_ALONE("mimo_v2_flash"),
    /* The norm lies beside the block; layers without experts have one, too, which nothing reads. */
    {.model_type = "axk1",
     .prefix = PLAIN,
     .scope = "mlp.|post_mlp_layernorm.",
     .router = "mlp.gate.weight",
     .select_bias = "mlp.gate.e_score_correction_bias",
     .expert = {EACH("mlp.")},
     .block_norm = "post_mlp_layernorm.weight",
     SHARED("mlp.shared_experts")},
    V3("axk2"),
    HY_V4("hy_v4"),
    HY_V4("hy_v4_vl"),
    V3_AT("glm5_next", NESTED, "mlp.gate.e_score_correction_bias"),
    V3_ALONE("beam"),
    {SOFTMAX("flint"), SHARED("mlp.shared_expert")},
    {SOFTMAX("laguna"), .select_bias = "mlp.experts.e_score_correction_bias", SHARED("mlp.shared_expert")},
    INKLING2("inkling2"),
    INKLING2("inkling2_loop"),
    {.model_type = "inkling_mm_model",
     .prefix = "model.llm.layers.{L}.",
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .select_bias = "mlp.gate.bias",
     .expert_scale = "mlp.gate.global_scale",
     .expert = {{.up = "mlp.experts.w13_weight", .down = "mlp.experts.w2_weight", .rows = XP_GATE_INTERLEAVED}},
     .shared = {.up = "mlp.shared_experts.shared_w13_weight",
                .down = "mlp.shared_experts.shared_w2_weight",
                .rows = XP_GATE_INTERLEAVED}},
    {.model_type = "muse_spark",
     .prefix = NESTED,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .select_bias = "mlp.gate.e_score_correction_bias",
     .latent_down = "mlp.pre_expert_proj.weight",
     .latent_up = "mlp.post_expert_proj.weight",
     .latent_norm = "mlp.pre_expert_norm.weight",
     .expert_norm = "mlp.experts.post_expert_norm.weight",
     .centered = 1,
     .expert = {STACKED("mlp.", XP_EOI)}},
    GEMMA4("gemma4", NESTED "|" PLAIN),
    GEMMA4("diffusion_gemma", "model.decoder.layers.{L}."),
    {.model_type = "mistral4",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.weight",
     .expert = {STACKED("mlp.", XP_EOI)},
     SHARED("mlp.shared_experts")},
    {.model_type = "mistral_large4",
     .prefix = "layers.{L}.",
     .scope = "experts.|gate.|shared_experts.",
     .router = "gate.weight",
     .expert = {EACH_W("")},
     .shared = {.gate = "shared_experts.w1.weight",
                .up = "shared_experts.w3.weight",
                .down = "shared_experts.w2.weight"}},
    {.model_type = "kolibri1",
     .prefix = PLAIN,
     .scope = "mlp.|moe.router.",
     .router = "mlp.gate.weight",
     .select_bias = "moe.router.expert_bias",
     .expert = {EACH("mlp.")},
     SHARED("mlp.shared_experts")},
    {.model_type = "zaya",
     .prefix = PLAIN,
     .scope = "mlp.",
     .router = "mlp.gate.router_mlp.out_proj.weight",
     .router_mlp = {"mlp.gate.down_proj.weight", "mlp.gate.down_proj.bias", "mlp.gate.router_states_scale",
                    "mlp.gate.router_mlp.norm.weight", "mlp.gate.router_mlp.fc1.weight", "mlp.gate.router_mlp.fc1.bias",
                    "mlp.gate.router_mlp.fc2.weight", "mlp.gate.router_mlp.fc2.bias"},
     .select_bias = "mlp.gate.balancing_biases",
     .expert = {STACKED("mlp.", XP_EOI)}},
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
