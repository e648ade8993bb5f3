"""Tiny MoE blocks of the installed transformers, and how their parameters map to expar's operands.

Every block is the library's own class, built from its own configuration class; only sizes and seeded values are ours.
A family says where its router, experts and shared expert are; everything else is read off the objects.
"""

import importlib

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class Family:
    def __init__(self, name, preset, block, config, *, experts="experts", gate="gate", shared=None, shared_gate=None,
                 bias=None, router_bias=None, fields="", module=None, hidden="hidden_size", transpose=False,
                 gate_extra=None, k=3, scores="softmax", nested=False, expert_biases=False, block_args=(), gated=True,
                 route=True, logits32=False, weights32=False):
        self.__dict__.update(locals())

    def build(self, dtype, kernels, **more):
        """The block, in eval mode, built in dtype: what the class itself makes f32 stays so."""
        kw = dict(self.config)
        kw.update(more)
        config = CONFIG_MAPPING[self.module or self.name](**kw)
        config._experts_implementation = kernels
        mod = importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}")
        torch.set_default_dtype(dtype)
        try:
            block = getattr(mod, self.block)(config, *self.block_args)
        finally:
            torch.set_default_dtype(torch.float32)
        return block.eval(), config


def attribute(obj, path):
    for part in path.split("."):
        obj = getattr(obj, part)
    return obj


E, H, F = 6, 16, 8
SIZES = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "silu"}
N1 = dict(SIZES, num_experts=E, moe_intermediate_size=F)
N2 = dict(SIZES, num_local_experts=E, intermediate_size=F)
N3 = dict(SIZES, n_routed_experts=E, moe_intermediate_size=F, n_shared_experts=1, n_group=1, topk_group=1)
SHARED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

FAMILIES = [
    Family("qwen3_moe", "hf-5.24/qwen3_moe", "Qwen3MoeSparseMoeBlock", dict(N1, norm_topk_prob=True)),
    Family("qwen3_moe", "hf-5.24/qwen3_moe-raw", "Qwen3MoeSparseMoeBlock", dict(N1, norm_topk_prob=False)),
    Family("qwen2_moe", "hf-5.24/qwen2_moe", "Qwen2MoeSparseMoeBlock",
           dict(N1, norm_topk_prob=False, shared_expert_intermediate_size=12), shared="shared_expert",
           shared_gate="shared_expert_gate"),
    Family("qwen3_next", "hf-5.24/qwen2_moe-renorm", "Qwen3NextSparseMoeBlock",
           dict(N1, norm_topk_prob=True, shared_expert_intermediate_size=12), shared="shared_expert",
           shared_gate="shared_expert_gate"),
    Family("qwen3_5_moe", "hf-5.24/qwen2_moe-renorm", "Qwen3_5MoeSparseMoeBlock",
           dict(N1, shared_expert_intermediate_size=12), shared="shared_expert", shared_gate="shared_expert_gate",
           module="qwen3_5_moe_text"),
    Family("mixtral", "hf-5.24/mixtral", "MixtralSparseMoeBlock", dict(N2), weights32=True),
    Family("olmoe", "hf-5.24/olmoe", "OlmoeSparseMoeBlock",
           dict(SIZES, num_experts=E, intermediate_size=F, norm_topk_prob=False)),
    Family("hunyuan_v1_moe", "hf-5.24/hunyuan_v1_moe", "HunYuanMoEV1Moe",
           dict(SIZES, num_experts=E, intermediate_size=F, head_dim=8), shared="shared_mlp", gate_extra="wg",
           logits32=True, weights32=True),
    Family("gpt_oss", "hf-5.24/gpt_oss", "GptOssMLP", dict(N2, head_dim=8), gate="router", router_bias="bias",
           transpose=True, expert_biases=True, scores="softmax_topk"),
    Family("granitemoe", "hf-5.24/granitemoe", "GraniteMoeMoE", dict(N2), gate="router", scores="softmax_topk"),
    Family("deepseek_v2", "hf-5.24/deepseek_v2", "DeepseekV2Moe",
           dict(SIZES, n_routed_experts=E, moe_intermediate_size=F, n_shared_experts=1, routed_scaling_factor=1.5,
                topk_method="greedy"), shared="shared_experts", fields="scale=1.5", logits32=True, weights32=True),
    Family("deepseek_v2", "hf-5.24/deepseek_v2-groups", "DeepseekV2Moe",
           dict(SIZES, n_routed_experts=E, moe_intermediate_size=F, n_shared_experts=1, routed_scaling_factor=1.5,
                topk_method="group_limited_greedy", n_group=3, topk_group=2), shared="shared_experts",
           fields="n_group=3 topk_group=2 scale=1.5", logits32=True, weights32=True),
    Family("deepseek_v3", "hf-5.24/deepseek_v3", "DeepseekV3MoE",
           dict(N3, n_group=3, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True), shared="shared_experts",
           bias="gate.e_score_correction_bias", fields="n_group=3 topk_group=2", scores="sigmoid", logits32=True,
           weights32=True),
    Family("dots1", "hf-5.24/dots1", "Dots1MoE", dict(N3, routed_scaling_factor=1.0, norm_topk_prob=False),
           shared="shared_experts", bias="gate.e_score_correction_bias", scores="sigmoid", logits32=True,
           weights32=True),
    Family("glm4_moe", "hf-5.24/glm4_moe", "Glm4MoeMoE", dict(N3, routed_scaling_factor=1.0, norm_topk_prob=True),
           shared="shared_experts", bias="gate.e_score_correction_bias", scores="sigmoid", logits32=True,
           weights32=True),
    Family("kimi_linear", "hf-5.24/kimi_linear", "KimiLinearMoE",
           dict(SIZES, num_experts=E, moe_intermediate_size=F, num_shared_experts=1, num_expert_group=1, topk_group=1,
                routed_scaling_factor=2.446, moe_renormalize=True),
           shared="shared_experts", bias="gate.e_score_correction_bias", scores="sigmoid", logits32=True,
           weights32=True),
    Family("deepseek_v4", "hf-5.24/deepseek_v4", "DeepseekV4SparseMoeBlock",
           dict(SIZES, n_routed_experts=E, moe_intermediate_size=F, n_shared_experts=1, swiglu_limit=1.25,
                routed_scaling_factor=1.5, mlp_layer_types=["moe", "moe"], num_hidden_layers=2),
           shared="shared_experts", bias="gate.e_score_correction_bias", block_args=(1,), fields="limit=1.25",
           scores="sqrt_softplus"),
    Family("minimax_m2", "hf-5.24/minimax_m2", "MiniMaxM2SparseMoeBlock", dict(N2), bias="e_score_correction_bias",
           scores="sigmoid", gate_extra="bias", weights32=True),
    Family("lfm2_moe", "hf-5.24/lfm2_moe", "Lfm2MoeSparseMoeBlock",
           dict(SIZES, num_experts=E, moe_intermediate_size=F, norm_topk_prob=True, use_expert_bias=True,
                routed_scaling_factor=1.0, num_dense_layers=0), bias="expert_bias", scores="sigmoid", gate_extra="bias"),
    Family("ernie4_5_moe", "hf-5.24/ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock",
           dict(SIZES, moe_num_experts=E, moe_intermediate_size=F, moe_num_shared_experts=1), shared="shared_experts",
           bias="gate.moe_statics.e_score_correction_bias", logits32=True),
    Family("afmoe", "hf-5.24/afmoe", "AfmoeSparseMoeBlock",
           dict(SIZES, num_experts=E, moe_intermediate_size=F, num_shared_experts=1, route_scale=1.0, head_dim=8),
           shared="shared_experts", bias="expert_bias", scores="sigmoid", gate="router", gate_extra="bias", weights32=True),
    Family("phimoe", "hf-5.24/phimoe", "PhimoeSparseMoeBlock",
           dict(N2, router_jitter_noise=0.2, input_jitter_noise=0.0), gate="router", fields="sparse_eps=0.2",
           scores="sparsemixer", k=2),
    Family("longcat_flash", "hf-5.24/longcat_flash", "LongcatFlashMoE",
           dict(hidden_size=H, n_routed_experts=E, expert_ffn_hidden_size=F, zero_expert_num=2, moe_topk=3,
                routed_scaling_factor=6.0, num_layers=2, num_attention_heads=2), gate="router",
           bias="router.e_score_correction_bias", fields="null_experts=2", logits32=True, weights32=True),
    Family("nemotron_h", "hf-5.24/nemotron_h", "NemotronHMoE",
           dict(hidden_size=H, n_routed_experts=E, moe_intermediate_size=F, moe_shared_expert_intermediate_size=12,
                n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=True, num_attention_heads=2,
                layers_block_type=["moe", "moe"]), shared="shared_experts", bias="gate.e_score_correction_bias",
           scores="sigmoid", gated=False, logits32=True, weights32=True),
    Family("olmoe", "hf-5.24/olmoe-renorm", "OlmoeSparseMoeBlock",
           dict(SIZES, num_experts=E, intermediate_size=F, norm_topk_prob=True)),
    Family("cohere2_moe", "hf-5.24/cohere2_moe", "Cohere2MoeSparseMoeBlock",
           dict(SIZES, num_experts=E, intermediate_size=F, num_shared_experts=1, expert_selection_fn="softmax",
                shared_expert_combination_strategy="average"), shared="shared_experts", scores="softmax_topk"),
    Family("cohere2_moe", "hf-5.24/cohere2_moe-sigmoid", "Cohere2MoeSparseMoeBlock",
           dict(SIZES, num_experts=E, intermediate_size=F, num_shared_experts=1, expert_selection_fn="sigmoid",
                norm_topk_prob=True, shared_expert_combination_strategy="average"), shared="shared_experts",
           scores="sigmoid"),
    Family("minimax_m3_vl", "hf-5.24/minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock",
           dict(N2, shared_intermediate_size=12, dense_intermediate_size=12, routed_scaling_factor=2.0,
                swiglu_alpha=1.702, swiglu_limit=1.25), shared="shared_experts", module="minimax_m3_vl_text",
           bias="gate.e_score_correction_bias", fields="limit=1.25", scores="sigmoid", weights32=True),
    Family("hy_v3", "hf-5.24/hy_v3", "HYV3MoE",
           dict(N1, num_shared_experts=1, router_scaling_factor=2.826), shared="shared_experts",
           bias="e_score_correction_bias", gate_extra="bias", scores="sigmoid", logits32=True, weights32=True),
    Family("flint", "hf-5.24/flint", "FlintSparseMoeBlock", dict(N1, shared_expert_intermediate_size=12),
           shared="shared_expert", scores="sigmoid", logits32=True, weights32=True),
    Family("mistral4", "hf-5.24/mistral4", "Mistral4MoE",
           dict(N3, n_group=3, topk_group=2, routed_scaling_factor=1.5), shared="shared_experts",
           fields="n_group=3 topk_group=2 scale=1.5"),
    Family("mistral_large4", "hf-5.24/mistral_large4", "MistralLarge4TextMoE",
           dict(N3, n_group=3, topk_group=2, routed_scaling_factor=1.5), shared="shared_experts",
           module="mistral_large4_text", fields="n_group=3 topk_group=2 scale=1.5", logits32=True, weights32=True),
    Family("kolibri1", "hf-5.24/kolibri1", "Kolibri1SparseMoeBlock",
           dict(N1, shared_expert_intermediate_size=12, norm_topk_prob=False), shared="shared_experts",
           bias="gate.e_score_correction_bias", scores="sigmoid", logits32=True, weights32=True),
    Family("step3p7", "hf-5.24/step3p7", "Step3p7SparseMoeBlock",
           dict(SIZES, n_routed_experts=E, moe_intermediate_size=F, share_expert_dim=12, intermediate_size=12,
                moe_router_scaling_factor=3.0, swiglu_limits=[1.25, 1.25], swiglu_limits_shared=[1.25, 1.25],
                mlp_layer_types=["sparse", "sparse"]), shared="shared_experts", module="step3p5", block_args=(1,),
           bias="gate.e_score_correction_bias", fields="limit=1.25", scores="sigmoid", weights32=True),
    Family("llama4", "hf-5.24/llama4", "Llama4TextMoe", dict(N2, num_key_value_heads=2), module="llama4_text",
           gate="router", shared="shared_expert", transpose=True, scores="sigmoid", route=False),
]
TOPK = {"hunyuan_v1_moe": "moe_topk", "kimi_linear": "num_experts_per_token", "ernie4_5_moe": "moe_k",
        "longcat_flash": "moe_topk"}


def with_k(family, k):
    return {TOPK.get(family.name, "num_experts_per_tok"): k}


def router_weight(block, family):
    gate = attribute(block, family.gate)
    for name in ("weight", "wg.weight", "classifier.weight", "gate.weight"):
        try:
            return attribute(gate, name)
        except AttributeError:
            continue
    raise AttributeError(f"{family.name}: no router weight in {[n for n, _ in gate.named_parameters()]}")


def expert_weights(block, family):
    """W1 [E,U,H], W2 [E,H,F] as parameters and whether they are stored [in,out]."""
    experts = attribute(block, family.experts)
    w1 = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    return w1, experts.down_proj
