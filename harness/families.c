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

/* Keys that every family's file may have: logging of router logits, positions, quantised storage. None changes how a
 * MoE block computes on weights of our own. */
#define COMMON_UNREAD "output_router_logits|rope_scaling|quantization_config|quantization"

#define EVERY_LAYER "the class makes every layer a MoE block"
#define NO_DENSE_LIST "the class takes an absent list as empty"
#define NOT_NEEDED "for the output only; the step has dtypes of its own"

const xp_family xp_families[] = {
    {
        .model_type = "qwen3_moe",
        .arch = "Qwen3Moe",
        .preset = {"hf-5.24/qwen3_moe-raw", "hf-5.24/qwen3_moe"},
        .slot =
            {
                [XP_SLOT_HIDDEN] = KEY("hidden_size"),
                [XP_SLOT_LAYERS] = KEY("num_hidden_layers"),
                [XP_SLOT_EXPERTS] = KEY("num_experts|num_local_experts"),
                [XP_SLOT_TOPK] = KEY("num_experts_per_tok"),
                [XP_SLOT_WIDTH] = KEY("moe_intermediate_size"),
                [XP_SLOT_DENSE] = KEY("intermediate_size"),
                [XP_SLOT_STEP] = KEY("decoder_sparse_step"),
                [XP_SLOT_DENSE_LAYERS] = OPTIONAL("mlp_only_layers", 0, NO_DENSE_LIST),
                [XP_SLOT_NORM] = KEY("norm_topk_prob"),
                [XP_SLOT_ACT] = KEY("hidden_act"),
                [XP_SLOT_EPS] = KEY("rms_norm_eps"),
                [XP_SLOT_AUX] = KEY("router_aux_loss_coef"),
                [XP_SLOT_VOCAB] = KEY("vocab_size"),
                [XP_SLOT_DTYPE] = OPTIONAL("torch_dtype|dtype", 0, NOT_NEEDED),
            },
        .unread = COMMON_UNREAD,
    },
    {
        .model_type = "qwen2_moe",
        .arch = "Qwen2Moe",
        .preset = {"hf-5.24/qwen2_moe", "hf-5.24/qwen2_moe-renorm"},
        .slot =
            {
                [XP_SLOT_HIDDEN] = KEY("hidden_size"),
                [XP_SLOT_LAYERS] = KEY("num_hidden_layers"),
                [XP_SLOT_EXPERTS] = KEY("num_experts"),
                [XP_SLOT_TOPK] = KEY("num_experts_per_tok"),
                [XP_SLOT_WIDTH] = KEY("moe_intermediate_size"),
                [XP_SLOT_SHARED] = KEY("shared_expert_intermediate_size"),
                [XP_SLOT_DENSE] = KEY("intermediate_size"),
                [XP_SLOT_STEP] = KEY("decoder_sparse_step"),
                [XP_SLOT_DENSE_LAYERS] = OPTIONAL("mlp_only_layers", 0, NO_DENSE_LIST),
                [XP_SLOT_NORM] = KEY("norm_topk_prob"),
                [XP_SLOT_ACT] = KEY("hidden_act"),
                [XP_SLOT_EPS] = KEY("rms_norm_eps"),
                [XP_SLOT_AUX] = KEY("router_aux_loss_coef"),
                [XP_SLOT_VOCAB] = KEY("vocab_size"),
                [XP_SLOT_DTYPE] = OPTIONAL("torch_dtype|dtype", 0, NOT_NEEDED),
            },
        .unread = COMMON_UNREAD,
    },
    {
        .model_type = "mixtral",
        .arch = "Mixtral",
        .preset = {NULL, "hf-5.24/mixtral"},
        .slot =
            {
                [XP_SLOT_HIDDEN] = KEY("hidden_size"),
                [XP_SLOT_LAYERS] = KEY("num_hidden_layers"),
                [XP_SLOT_EXPERTS] = KEY("num_local_experts|num_experts"),
                [XP_SLOT_TOPK] = KEY("num_experts_per_tok"),
                [XP_SLOT_WIDTH] = KEY("intermediate_size"),
                [XP_SLOT_STEP] = FIXED(1, EVERY_LAYER),
                [XP_SLOT_NORM] = FIXED(1, "the class always divides the weights by their sum"),
                [XP_SLOT_ACT] = KEY("hidden_act"),
                [XP_SLOT_JITTER] = OPTIONAL("router_jitter_noise", 0, "files older than the field have no noise"),
                [XP_SLOT_EPS] = KEY("rms_norm_eps"),
                [XP_SLOT_AUX] = KEY("router_aux_loss_coef"),
                [XP_SLOT_VOCAB] = KEY("vocab_size"),
                [XP_SLOT_DTYPE] = OPTIONAL("torch_dtype|dtype", 0, NOT_NEEDED),
            },
        .unread = COMMON_UNREAD,
    },
    {.model_type = NULL},
};
