/* The family records. Field names and aliases are those of the transformers 5.24 configuration classes.
 *
 * An alias is listed only where the class itself takes it (its attribute_map): num_local_experts is another name of
 * num_experts in qwen3_moe and mixtral, and is no name at all in qwen2_moe, where the reader refuses it. */
#include "families.h"

#include <stddef.h>

#define KEY(names) \
    { XP_SLOT_KEY, (names), 0.0, NULL }
#define OPTIONAL(names, value, why) \
    { XP_SLOT_OPTIONAL, (names), (value), (why) }
#define FIXED(value, why) \
    { XP_SLOT_FIXED, NULL, (value), (why) }

/* Keys that every family's file may have: logging of router logits, positions, quantised storage, heads that predict
 * further tokens. None changes how a MoE block computes on weights of our own. */
#define COMMON_UNREAD "output_router_logits|rope_scaling|quantization_config|quantization|rope_parameters"
/* Of the files of DeepSeek-V3 and its relatives: the class routes as it does whatever they say. */
#define V3_UNREAD COMMON_UNREAD "|ep_size|moe_layer_freq|topk_method|scoring_func|aux_loss_alpha|seq_aux"

#define EVERY_LAYER "the class makes every layer a MoE block"
#define NO_DENSE_LIST "the class takes an absent list as empty"
#define NOT_NEEDED "for the output only; the step has dtypes of its own"
#define ALWAYS "the class always divides the weights by their sum"
#define NEVER "the class never divides the weights by their sum"
#define NO_AUX "the class has no balance loss"
#define CLASS_DEFAULT "the class's default"

#define SHAPE(experts, topk, width)                                                             \
    [XP_SLOT_HIDDEN] = KEY("hidden_size"), [XP_SLOT_LAYERS] = KEY("num_hidden_layers"),         \
    [XP_SLOT_EXPERTS] = KEY(experts), [XP_SLOT_TOPK] = KEY(topk), [XP_SLOT_WIDTH] = KEY(width), \
    [XP_SLOT_VOCAB] = KEY("vocab_size"), [XP_SLOT_DTYPE] = OPTIONAL("torch_dtype|dtype", 0, NOT_NEEDED)
#define USUAL [XP_SLOT_ACT] = KEY("hidden_act"), [XP_SLOT_EPS] = KEY("rms_norm_eps")
#define AUX(name) [XP_SLOT_AUX] = KEY(name)
#define WITHOUT_AUX [XP_SLOT_AUX] = FIXED(0, NO_AUX)
#define DENSE [XP_SLOT_DENSE] = KEY("intermediate_size")
#define ALL_LAYERS [XP_SLOT_STEP] = FIXED(1, EVERY_LAYER)
#define SPARSE_STEP \
    [XP_SLOT_STEP] = KEY("decoder_sparse_step"), [XP_SLOT_DENSE_LAYERS] = OPTIONAL("mlp_only_layers", 0, NO_DENSE_LIST)
#define FIRST_DENSE [XP_SLOT_FIRST] = KEY("first_k_dense_replace")
#define LAYER_TYPES(first, why)                                                             \
    [XP_SLOT_TYPES] = OPTIONAL("mlp_layer_types", 0, "the first layers are dense instead"), \
    [XP_SLOT_FIRST] = OPTIONAL("first_k_dense_replace", first, why)
#define NORM_FLAG [XP_SLOT_NORM] = KEY("norm_topk_prob")
#define NORM(value, why) [XP_SLOT_NORM] = FIXED(value, why)
#define JITTER [XP_SLOT_JITTER] = OPTIONAL("router_jitter_noise", 0, "files older than the field have no noise")
/* DeepSeek-V3's own names. */
#define V3_ROUTE                                                                  \
    [XP_SLOT_GROUPS] = KEY("n_group"), [XP_SLOT_TOPK_GROUPS] = KEY("topk_group"), \
    [XP_SLOT_SCALE] = KEY("routed_scaling_factor"), [XP_SLOT_SHARED_COUNT] = KEY("n_shared_experts"), NORM_FLAG
#define V3_SHAPE(experts) SHAPE(experts, "num_experts_per_tok", "moe_intermediate_size"), DENSE, USUAL, WITHOUT_AUX

const xp_family xp_families[] = {
    /* ---- dialect A */
    {.model_type = "qwen3_moe",
     .arch = "Qwen3Moe",
     .preset = {"hf-5.24/qwen3_moe-raw", "hf-5.24/qwen3_moe"},
     .slot = {SHAPE("num_experts|num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE, USUAL,
              SPARSE_STEP, NORM_FLAG, AUX("router_aux_loss_coef")},
     .unread = COMMON_UNREAD},
    {.model_type = "qwen2_moe",
     .arch = "Qwen2Moe",
     .preset = {"hf-5.24/qwen2_moe", "hf-5.24/qwen2_moe-renorm"},
     .slot = {SHAPE("num_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE, USUAL, SPARSE_STEP,
              NORM_FLAG, AUX("router_aux_loss_coef"), [XP_SLOT_SHARED] = KEY("shared_expert_intermediate_size")},
     .unread = COMMON_UNREAD},
    {.model_type = "mixtral",
     .arch = "Mixtral",
     .preset = {NULL, "hf-5.24/mixtral"},
     .slot = {SHAPE("num_local_experts|num_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM(1, ALWAYS), JITTER, AUX("router_aux_loss_coef")},
     .unread = COMMON_UNREAD},
    {.model_type = "qwen3_next",
     .arch = "Qwen3Next",
     .preset = {"hf-5.24/qwen2_moe", "hf-5.24/qwen2_moe-renorm"},
     .slot = {SHAPE("num_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE, USUAL, SPARSE_STEP,
              NORM_FLAG, AUX("router_aux_loss_coef"), [XP_SLOT_SHARED] = KEY("shared_expert_intermediate_size")},
     .unread = COMMON_UNREAD "|attn_output_gate"},
    {.model_type = "qwen3_5_moe",
     .arch = "Qwen3_5Moe",
     .preset = {NULL, "hf-5.24/qwen2_moe-renorm"},
     .inside = "text_config",
     .slot = {SHAPE("num_experts", "num_experts_per_tok", "moe_intermediate_size"), USUAL, ALL_LAYERS, NORM(1, ALWAYS),
              AUX("router_aux_loss_coef"), [XP_SLOT_SHARED] = KEY("shared_expert_intermediate_size")},
     .unread = COMMON_UNREAD "|attn_output_gate"},
    {.model_type = "qwen3_vl_moe",
     .arch = "Qwen3VLMoe",
     .preset = {NULL, "hf-5.24/qwen3_moe"},
     .inside = "text_config",
     .slot = {SHAPE("num_experts|num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE, USUAL,
              SPARSE_STEP, NORM(1, ALWAYS), [XP_SLOT_AUX] = OPTIONAL("router_aux_loss_coef", 0.001, CLASS_DEFAULT)},
     .unread = COMMON_UNREAD "|norm_topk_prob"},
    {.model_type = "olmoe",
     .arch = "Olmoe",
     .preset = {"hf-5.24/olmoe", "hf-5.24/olmoe-renorm"},
     .slot = {SHAPE("num_experts|num_local_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM_FLAG, AUX("router_aux_loss_coef")},
     .unread = COMMON_UNREAD},
    {.model_type = "flex_olmo",
     .arch = "FlexOlmo",
     .preset = {"hf-5.24/olmoe", "hf-5.24/olmoe-renorm"},
     .note = "the class normalises the block's output instead of its input",
     .slot = {SHAPE("num_experts|num_local_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM_FLAG, AUX("router_aux_loss_coef")},
     .unread = COMMON_UNREAD},
    {.model_type = "jamba",
     .arch = "Jamba",
     .preset = {"hf-5.24/qwen3_moe-raw", NULL},
     .slot = {SHAPE("num_experts|num_local_experts", "num_experts_per_tok", "intermediate_size"),
              USUAL, [XP_SLOT_STEP] = FIXED(1, "a period and an offset say which layers"),
              [XP_SLOT_PERIOD] = KEY("expert_layer_period"), [XP_SLOT_OFFSET] = KEY("expert_layer_offset"),
              NORM(0, NEVER), AUX("router_aux_loss_coef")},
     .unread = COMMON_UNREAD},
    {.model_type = "hunyuan_v1_moe",
     .arch = "HunYuanMoEV1",
     .preset = {NULL, "hf-5.24/hunyuan_v1_moe"},
     .slot = {SHAPE("num_experts|num_local_experts", "moe_topk|num_experts_per_tok", "intermediate_size"), USUAL,
              ALL_LAYERS, NORM(1, ALWAYS),
              WITHOUT_AUX, [XP_SLOT_SHARED_COUNT] = FIXED(1, "one shared expert, as wide as the others")},
     .unread =
         COMMON_UNREAD "|use_mixed_mlp_moe|num_shared_expert|moe_layer_num_skipped|norm_topk_prob|group_limited_greedy|"
                       "n_group|topk_group|routed_scaling_factor|moe_drop_tokens|moe_random_routing_dropped_token|"
                       "moe_intermediate_size|cla_share_factor"},
    /* ---- dialect B */
    {.model_type = "gpt_oss",
     .arch = "GptOss",
     .preset = {NULL, "hf-5.24/gpt_oss"},
     .slot = {SHAPE("num_local_experts|num_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM(1, "the softmax runs over the chosen"), AUX("router_aux_loss_coef"),
              [XP_SLOT_LIMIT] = KEY("swiglu_limit"), [XP_SLOT_ALPHA] = OPTIONAL("swiglu_alpha", 1.702, CLASS_DEFAULT)},
     .unread = COMMON_UNREAD "|experts_per_token"},
    {.model_type = "granitemoe",
     .arch = "GraniteMoe",
     .preset = {NULL, "hf-5.24/granitemoe"},
     .note = "the class multiplies embeddings, residuals and logits by factors of its own",
     .slot = {SHAPE("num_local_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM(1, "the softmax runs over the chosen"), AUX("router_aux_loss_coef")},
     .unread = COMMON_UNREAD "|logits_scaling"},
    {.model_type = "granitemoeshared",
     .arch = "GraniteMoeShared",
     .preset = {NULL, "hf-5.24/granitemoe"},
     .note = "the class multiplies embeddings, residuals and logits by factors of its own",
     .slot = {SHAPE("num_local_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM(1, "the softmax runs over the chosen"),
              AUX("router_aux_loss_coef"), [XP_SLOT_SHARED] = KEY("shared_intermediate_size")},
     .unread = COMMON_UNREAD "|logits_scaling"},
    {.model_type = "cohere2_moe",
     .arch = "Cohere2Moe",
     .preset = {"hf-5.24/cohere2_moe", "hf-5.24/cohere2_moe-sigmoid"},
     .methods = "softmax|sigmoid",
     .slot = {SHAPE("num_experts", "num_experts_per_tok", "intermediate_size"), [XP_SLOT_ACT] = KEY("hidden_act"),
              [XP_SLOT_EPS] = KEY("layer_norm_eps"),
              LAYER_TYPES(0, CLASS_DEFAULT), [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers"),
              [XP_SLOT_METHOD] = KEY("expert_selection_fn"), [XP_SLOT_SHARED_COUNT] = KEY("num_shared_experts"),
              WITHOUT_AUX},
     .sparse = "sparse",
     .unread = COMMON_UNREAD "|logit_scale|norm_topk_prob|shared_expert_combination_strategy"},
    /* ---- dialect C */
    {.model_type = "deepseek_v2",
     .arch = "DeepseekV2",
     .preset = {"hf-5.24/deepseek_v2", "hf-5.24/deepseek_v2-groups"},
     .methods = "greedy|group_limited_greedy",
     .slot = {SHAPE("n_routed_experts|num_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE, USUAL,
              FIRST_DENSE, [XP_SLOT_STEP] = FIXED(1, "the first layers are dense"),
              [XP_SLOT_METHOD] = KEY("topk_method"), [XP_SLOT_GROUPS] = OPTIONAL("n_group", 1, "greedy has no groups"),
              [XP_SLOT_TOPK_GROUPS] = OPTIONAL("topk_group", 1, "greedy has no groups"),
              [XP_SLOT_SCALE] = KEY("routed_scaling_factor"), [XP_SLOT_SHARED_COUNT] = KEY("n_shared_experts"),
              WITHOUT_AUX},
     .unread = COMMON_UNREAD "|ep_size|moe_layer_freq|scoring_func|aux_loss_alpha|seq_aux|norm_topk_prob"},
    /* ---- dialect D */
    {.model_type = "deepseek_v3",
     .arch = "DeepseekV3",
     .preset = {"hf-5.24/dots1", "hf-5.24/deepseek_v3"},
     .slot = {V3_SHAPE("n_routed_experts|num_local_experts"), V3_ROUTE,
              FIRST_DENSE, [XP_SLOT_STEP] = FIXED(1, "the first layers are dense")},
     .unread = V3_UNREAD},
    {.model_type = "kimi_k2",
     .arch = "DeepseekV3",
     .preset = {"hf-5.24/dots1", "hf-5.24/deepseek_v3"},
     .slot = {V3_SHAPE("n_routed_experts|num_local_experts"), V3_ROUTE,
              FIRST_DENSE, [XP_SLOT_STEP] = FIXED(1, "the first layers are dense")},
     .unread = V3_UNREAD},
    {.model_type = "deepseek_v32",
     .arch = "DeepseekV32",
     .preset = {"hf-5.24/dots1", "hf-5.24/deepseek_v3"},
     .slot = {V3_SHAPE("n_routed_experts|num_local_experts|num_experts"), V3_ROUTE,
              LAYER_TYPES(3, CLASS_DEFAULT), [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers")},
     .sparse = "sparse",
     .unread = V3_UNREAD "|index_topk"},
    {.model_type = "glm4_moe",
     .arch = "Glm4Moe",
     .preset = {"hf-5.24/dots1", "hf-5.24/glm4_moe"},
     .slot = {V3_SHAPE("n_routed_experts|num_local_experts"), V3_ROUTE,
              FIRST_DENSE, [XP_SLOT_STEP] = FIXED(1, "the first layers are dense")},
     .unread = V3_UNREAD},
    {.model_type = "glm4_moe_lite",
     .arch = "Glm4MoeLite",
     .preset = {"hf-5.24/dots1", "hf-5.24/glm4_moe"},
     .slot = {V3_SHAPE("n_routed_experts|num_local_experts"),
              V3_ROUTE, [XP_SLOT_TYPES] = OPTIONAL("mlp_layer_types", 0, "the first layer is dense instead"),
              [XP_SLOT_FIRST] = FIXED(1, "the class's default for absent layer types"),
              [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers")},
     .sparse = "sparse",
     .unread = V3_UNREAD "|first_k_dense_replace"},
    {.model_type = "glm_moe_dsa",
     .arch = "GlmMoeDsa",
     .preset = {"hf-5.24/dots1", "hf-5.24/glm4_moe"},
     .slot = {V3_SHAPE("n_routed_experts|num_local_experts|num_experts"), V3_ROUTE,
              LAYER_TYPES(3, CLASS_DEFAULT), [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers")},
     .sparse = "sparse",
     .unread = V3_UNREAD "|index_topk|index_share_for_mtp_iteration"},
    {.model_type = "dots1",
     .arch = "Dots1",
     .preset = {"hf-5.24/dots1", "hf-5.24/glm4_moe"},
     .slot = {V3_SHAPE("n_routed_experts|num_local_experts"), [XP_SLOT_GROUPS] = OPTIONAL("n_group", 1, CLASS_DEFAULT),
              [XP_SLOT_TOPK_GROUPS] = OPTIONAL("topk_group", 1, CLASS_DEFAULT),
              [XP_SLOT_SCALE] = KEY("routed_scaling_factor"), [XP_SLOT_SHARED_COUNT] = KEY("n_shared_experts"),
              NORM_FLAG, FIRST_DENSE, [XP_SLOT_STEP] = FIXED(1, "the first layers are dense")},
     .unread = V3_UNREAD},
    {.model_type = "solar_open",
     .arch = "SolarOpen",
     .preset = {"hf-5.24/dots1", "hf-5.24/glm4_moe"},
     .slot = {SHAPE("n_routed_experts|num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), USUAL,
              V3_ROUTE, ALL_LAYERS, WITHOUT_AUX},
     .unread = V3_UNREAD "|first_k_dense_replace|intermediate_size"},
    {.model_type = "exaone_moe",
     .arch = "ExaoneMoE|ExaoneMoe",
     .preset = {"hf-5.24/dots1", "hf-5.24/glm4_moe"},
     .slot = {SHAPE("num_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE,
              USUAL, [XP_SLOT_GROUPS] = KEY("n_group"), [XP_SLOT_TOPK_GROUPS] = KEY("topk_group"),
              [XP_SLOT_SCALE] = KEY("routed_scaling_factor"), [XP_SLOT_SHARED_COUNT] = KEY("num_shared_experts"),
              NORM_FLAG, LAYER_TYPES(1, CLASS_DEFAULT), [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers"),
              WITHOUT_AUX},
     .sparse = "sparse",
     .unread = V3_UNREAD "|is_moe_layer|last_layer_full_attention"},
    {.model_type = "kimi_linear",
     .arch = "KimiLinear",
     .preset = {"hf-5.24/dots1", "hf-5.24/kimi_linear"},
     .slot = {SHAPE("num_experts|num_local_experts", "num_experts_per_token|num_experts_per_tok",
                    "moe_intermediate_size"),
              DENSE, USUAL, [XP_SLOT_GROUPS] = KEY("num_expert_group|n_group"),
              [XP_SLOT_TOPK_GROUPS] = KEY("topk_group"), [XP_SLOT_SCALE] = KEY("routed_scaling_factor"),
              [XP_SLOT_SHARED_COUNT] = KEY("num_shared_experts|n_shared_experts"),
              [XP_SLOT_NORM] = KEY("moe_renormalize|norm_topk_prob"),
              LAYER_TYPES(1, CLASS_DEFAULT), [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers"),
              WITHOUT_AUX},
     .sparse = "sparse",
     .unread = V3_UNREAD "|moe_router_activation_func|use_grouped_topk"},
    {.model_type = "nemotron_h",
     .arch = "NemotronH",
     .preset = {"hf-5.24/nemotron_h", "hf-5.24/nemotron_h"},
     .act = "relu2",
     .note = "an expert layer of its own; a latent width (moe_latent_size) is not built",
     .slot = {SHAPE("n_routed_experts|num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
              [XP_SLOT_ACT] = KEY("mlp_hidden_act"), [XP_SLOT_EPS] = KEY("layer_norm_epsilon|norm_eps"),
              [XP_SLOT_GROUPS] = KEY("n_group"), [XP_SLOT_TOPK_GROUPS] = KEY("topk_group"),
              [XP_SLOT_SCALE] = KEY("routed_scaling_factor"), NORM_FLAG,
              [XP_SLOT_SHARED] = KEY("moe_shared_expert_intermediate_size"), [XP_SLOT_DENSE] = KEY("intermediate_size"),
              [XP_SLOT_TYPES] = KEY("layers_block_type|hybrid_override_pattern"),
              [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers"), WITHOUT_AUX},
     .sparse = "moe|E",
     .unread =
         COMMON_UNREAD "|n_groups|n_shared_experts|moe_shared_expert_overlap|moe_latent_size|rescale_prenorm_residual"},
    /* ---- dialect E */
    {.model_type = "llama4",
     .arch = "Llama4",
     .preset = {"hf-5.24/llama4", NULL},
     .inside = "text_config",
     .slot = {SHAPE("num_local_experts", "num_experts_per_tok", "intermediate_size"),
              USUAL, [XP_SLOT_DENSE] = KEY("intermediate_size_mlp"), [XP_SLOT_STEP] = KEY("interleave_moe_layer_step"),
              [XP_SLOT_LIST] = OPTIONAL("moe_layers", 0, "the step says which layers"), NORM(0, NEVER),
              JITTER, [XP_SLOT_SHARED_COUNT] = FIXED(1, "one shared expert, as wide as the others"), WITHOUT_AUX},
     .unread = COMMON_UNREAD "|router_aux_loss_coef|floor_scale|attn_scale|for_llm_compressor"},
    {.model_type = "llama4_text",
     .arch = "Llama4",
     .preset = {"hf-5.24/llama4", NULL},
     .slot = {SHAPE("num_local_experts", "num_experts_per_tok", "intermediate_size"),
              USUAL, [XP_SLOT_DENSE] = KEY("intermediate_size_mlp"), [XP_SLOT_STEP] = KEY("interleave_moe_layer_step"),
              [XP_SLOT_LIST] = OPTIONAL("moe_layers", 0, "the step says which layers"), NORM(0, NEVER),
              JITTER, [XP_SLOT_SHARED_COUNT] = FIXED(1, "one shared expert, as wide as the others"), WITHOUT_AUX},
     .unread = COMMON_UNREAD "|router_aux_loss_coef|floor_scale|attn_scale|for_llm_compressor"},
    /* ---- dialect F */
    {.model_type = "deepseek_v4",
     .arch = "DeepseekV4",
     .preset = {NULL, "hf-5.24/deepseek_v4"},
     .note =
         "layers of type hash_moe (the first num_hash_layers) are built as the others; preset hf-5.24/deepseek_v4-hash "
         "has their choice",
     .slot = {SHAPE("n_routed_experts|num_local_experts", "num_experts_per_tok",
                    "moe_intermediate_size|intermediate_size"),
              USUAL, ALL_LAYERS, NORM(1, ALWAYS), [XP_SLOT_SCALE] = KEY("routed_scaling_factor"),
              [XP_SLOT_LIMIT] = KEY("swiglu_limit"), [XP_SLOT_SHARED_COUNT] = FIXED(1, "the class builds one"),
              [XP_SLOT_AUX] = OPTIONAL("router_aux_loss_coef", 0.001, CLASS_DEFAULT), JITTER},
     .unread = COMMON_UNREAD "|n_shared_experts|norm_topk_prob|scoring_func|topk_method|index_topk|o_groups|"
                             "num_hash_layers|mlp_layer_types|expert_dtype|moe_layer_freq|scale_fmt"},
    /* ---- dialect G */
    {.model_type = "minimax_m2",
     .arch = "MiniMaxM2",
     .preset = {NULL, "hf-5.24/minimax_m2"},
     .slot = {SHAPE("num_local_experts|num_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM(1, ALWAYS), JITTER, [XP_SLOT_AUX] = OPTIONAL("router_aux_loss_coef", 0.001, CLASS_DEFAULT)},
     .unread = COMMON_UNREAD "|scoring_func|use_routing_bias|shared_intermediate_size|shared_moe_mode"},
    {.model_type = "minimax_m3_vl",
     .arch = "MiniMaxM3",
     .preset = {NULL, "hf-5.24/minimax_m3_vl"},
     .inside = "text_config",
     .act = "swigluoai|silu",
     .slot =
         {SHAPE("num_local_experts|num_experts", "num_experts_per_tok", "intermediate_size"),
          USUAL, [XP_SLOT_DENSE] = KEY("dense_intermediate_size"), [XP_SLOT_SHARED] = KEY("shared_intermediate_size"),
          [XP_SLOT_TYPES] = OPTIONAL("mlp_layer_types|moe_layer_freq", 0, "every layer is a MoE block then"),
          [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers"), NORM(1, ALWAYS),
          JITTER, [XP_SLOT_SCALE] = KEY("routed_scaling_factor"), [XP_SLOT_LIMIT] = KEY("swiglu_limit"),
          [XP_SLOT_ALPHA] = KEY("swiglu_alpha"),
          [XP_SLOT_AUX] = OPTIONAL("router_aux_loss_coef", 0.001, CLASS_DEFAULT)},
     .sparse = "sparse|1",
     .unread =
         COMMON_UNREAD "|scoring_func|use_routing_bias|n_shared_experts|index_topk_blocks|sparse_attention_config"},
    {.model_type = "afmoe",
     .arch = "Afmoe",
     .preset = {NULL, "hf-5.24/afmoe"},
     .note = "the class normalises around the block on both sides",
     .slot = {SHAPE("num_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE,
              USUAL, [XP_SLOT_FIRST] = KEY("num_dense_layers"), [XP_SLOT_STEP] = FIXED(1, "the first layers are dense"),
              [XP_SLOT_SHARED_COUNT] = KEY("num_shared_experts"), [XP_SLOT_SCALE] = KEY("route_scale"), NORM(1, ALWAYS),
              WITHOUT_AUX},
     .unread = COMMON_UNREAD
     "|score_func|route_norm|load_balance_coeff|num_expert_groups|num_limited_groups|n_group|topk_group|"
     "use_grouped_mm"},
    {.model_type = "lfm2_moe",
     .arch = "Lfm2Moe",
     .preset = {NULL, "hf-5.24/lfm2_moe"},
     .slot = {SHAPE("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
              DENSE, [XP_SLOT_EPS] = KEY("norm_eps"), [XP_SLOT_FIRST] = KEY("num_dense_layers"),
              [XP_SLOT_STEP] = FIXED(1, "the first layers are dense"), [XP_SLOT_SCALE] = KEY("routed_scaling_factor"),
              [XP_SLOT_NORM] = KEY("norm_topk_prob"), [XP_SLOT_SELECT_BIAS] = KEY("use_expert_bias"), WITHOUT_AUX},
     .unread = COMMON_UNREAD},
    {.model_type = "hy_v3",
     .arch = "HYV3",
     .preset = {NULL, "hf-5.24/hy_v3"},
     .slot = {SHAPE("num_experts|num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), DENSE, USUAL,
              [XP_SLOT_TYPES] = KEY("mlp_layer_types"), [XP_SLOT_STEP] = FIXED(1, "a word a layer says which layers"),
              [XP_SLOT_SHARED_COUNT] = KEY("num_shared_experts"), [XP_SLOT_SCALE] = KEY("router_scaling_factor"),
              NORM(1, ALWAYS), WITHOUT_AUX},
     .sparse = "sparse",
     .unread = COMMON_UNREAD "|first_k_dense_replace|enable_moe_fp32_combine|moe_router_enable_expert_bias|route_norm|"
                             "moe_router_use_sigmoid|expert_hidden_dim"},
    /* ---- dialect H */
    {.model_type = "longcat_flash",
     .arch = "LongcatFlash",
     .preset = {"hf-5.24/longcat_flash", NULL},
     .note = "two attention blocks and dense MLPs beside each MoE block",
     .slot = {[XP_SLOT_HIDDEN] = KEY("hidden_size"),
              [XP_SLOT_LAYERS] = KEY("num_layers|num_hidden_layers"),
              [XP_SLOT_EXPERTS] = KEY("n_routed_experts|num_local_experts"),
              [XP_SLOT_TOPK] = KEY("moe_topk|num_experts_per_tok"),
              [XP_SLOT_WIDTH] = KEY("expert_ffn_hidden_size|moe_intermediate_size"),
              [XP_SLOT_DENSE] = KEY("ffn_hidden_size|intermediate_size"),
              [XP_SLOT_VOCAB] = KEY("vocab_size"),
              [XP_SLOT_DTYPE] = OPTIONAL("torch_dtype|dtype", 0, NOT_NEEDED),
              [XP_SLOT_EPS] = KEY("rms_norm_eps"),
              ALL_LAYERS,
              NORM(0, NEVER),
              [XP_SLOT_SCALE] = KEY("routed_scaling_factor"),
              [XP_SLOT_NULLS] = KEY("zero_expert_num"),
              WITHOUT_AUX},
     .unread = COMMON_UNREAD "|router_bias|zero_expert_type|norm_topk_prob|mla_scale_q_lora|mla_scale_kv_lora"},
    {.model_type = "ernie4_5_moe",
     .arch = "Ernie4_5_Moe",
     .preset = {NULL, "hf-5.24/ernie4_5_moe"},
     .slot = {SHAPE("moe_num_experts|num_experts", "moe_k|num_experts_per_tok", "moe_intermediate_size"), DENSE,
              USUAL, [XP_SLOT_STEP] = KEY("moe_layer_interval"), [XP_SLOT_FIRST] = KEY("moe_layer_start_index"),
              [XP_SLOT_LAST] = OPTIONAL("moe_layer_end_index", -1, CLASS_DEFAULT),
              [XP_SLOT_SHARED_COUNT] = KEY("moe_num_shared_experts"),
              [XP_SLOT_SUM_EPS] = OPTIONAL("moe_norm_min", 1e-12, CLASS_DEFAULT),
              NORM(1, ALWAYS), [XP_SLOT_AUX] = OPTIONAL("router_aux_loss_coef", 0.001, CLASS_DEFAULT)},
     .unread = COMMON_UNREAD "|moe_capacity|moe_gate|moe_use_aux_free"},
    /* ---- dialect K */
    {.model_type = "phimoe",
     .arch = "Phimoe|PhiMoE",
     .preset = {"hf-5.24/phimoe", NULL},
     .note = "in training the class multiplies the block's input by noise (input_jitter_noise) and draws its choice at "
             "random; the step does neither",
     .slot = {SHAPE("num_local_experts", "num_experts_per_tok", "intermediate_size"), USUAL, ALL_LAYERS,
              NORM(0, NEVER), [XP_SLOT_MARGIN] = KEY("router_jitter_noise"), AUX("router_aux_loss_coef")},
     .unread = COMMON_UNREAD "|input_jitter_noise"},
    {.model_type = NULL},
};
