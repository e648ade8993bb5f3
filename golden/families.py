"""The families: which class, which record of expar, and where the class keeps its parts."""

from parts import E, F, H, Family

SIZES = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "silu"}
N1 = {**SIZES, "num_experts": E, "moe_intermediate_size": F}
N2 = {**SIZES, "num_local_experts": E, "intermediate_size": F}
N3 = {**SIZES, "n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
# Sizes of classes that store [in, out]: no two equal, so that a matrix the wrong way round has the wrong shape.
IN_OUT = {**N2, "intermediate_size": 3 * F}
PLAIN = {**SIZES, "num_experts": E, "intermediate_size": F}
GROUPS = {"n_group": 3, "topk_group": 2}
S = 12  # width of a shared expert that has one of its own
BIAS = "gate.e_score_correction_bias"


def family(name, block, preset, config, **more):
    return Family(name, block, "hf-5.24/" + preset, config, **more)


def sigmoid_f32(name, block, preset, config, **more):
    """DeepSeek-V3 and its kin: sigmoid of f32 logits, chosen with a bias, a shared expert."""
    more = {"score": "sigmoid", "bias": BIAS, "logits32": True, "shared": "shared_experts", **more}
    return family(name, block, preset, config, **more)


GATED_SHARED = {"shared": "shared_expert", "shared_gate": "shared_expert_gate"}
V2 = {**SIZES, "n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 1, "routed_scaling_factor": 1.5}
COHERE = {**PLAIN, "num_shared_experts": 1, "shared_expert_combination_strategy": "average", "norm_topk_prob": True}
MISTRAL = {**N3, **GROUPS, "routed_scaling_factor": 1.5}
V4 = {**SIZES, "n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 1, "swiglu_limit": 1.25,
      "routed_scaling_factor": 1.5, "vocab_size": 16}

FAMILIES = [
    # A: softmax over all experts, then the largest
    family("qwen3_moe", "Qwen3MoeSparseMoeBlock", "qwen3_moe", {**N1, "norm_topk_prob": True}, own_expert=True),
    family("qwen3_moe", "Qwen3MoeSparseMoeBlock", "qwen3_moe-raw", {**N1, "norm_topk_prob": False}),
    family("qwen2_moe", "Qwen2MoeSparseMoeBlock", "qwen2_moe",
           {**N1, "norm_topk_prob": False, "shared_expert_intermediate_size": S}, **GATED_SHARED),
    family("qwen2_moe", "Qwen2MoeSparseMoeBlock", "qwen2_moe-renorm",
           {**N1, "norm_topk_prob": True, "shared_expert_intermediate_size": S}, **GATED_SHARED, tests="f32"),
    family("qwen3_next", "Qwen3NextSparseMoeBlock", "qwen2_moe-renorm",
           {**N1, "norm_topk_prob": True, "shared_expert_intermediate_size": S}, **GATED_SHARED),
    family("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", "qwen2_moe-renorm",
           {**N1, "shared_expert_intermediate_size": S}, config_name="qwen3_5_moe_text", **GATED_SHARED),
    family("mixtral", "MixtralSparseMoeBlock", "mixtral", N2),
    family("olmoe", "OlmoeSparseMoeBlock", "olmoe", {**PLAIN, "norm_topk_prob": False}, tests="f32"),
    family("olmoe", "OlmoeSparseMoeBlock", "olmoe-renorm", {**PLAIN, "norm_topk_prob": True}, tests="f32"),
    family("hunyuan_v1_moe", "HunYuanMoEV1Moe", "hunyuan_v1_moe", {**PLAIN, "head_dim": 8}, topk="moe_topk",
           shared="shared_mlp", logits32=True, tests="f32"),
    family("lara_mini", "LaraMiniSparseMoeBlock", "lara_mini",
           {**N1, "norm_topk_prob": True, "shared_expert_intermediate_size": S, "num_key_value_heads": 2},
           shared="shared_expert", logits32=True, tests="f32"),
    family("dbrx", "DbrxFFN", "dbrx",
           {"hidden_size": H, "moe_num_experts": E, "ffn_hidden_size": F, "moe_normalize_expert_weights": 1.0},
           nested="ffn_config", topk="moe_top_k", gate="router", score="softmax_act", kernels=("eager",), eager_sum=""),
    # B: the largest logits, softmax over them
    family("gpt_oss", "GptOssMLP", "gpt_oss", {**IN_OUT, "head_dim": 8}, gate="router", router_bias=True, in_out=True,
           expert_biases=True, score="softmax_topk", own_expert=True),
    family("granitemoe", "GraniteMoeMoE", "granitemoe", N2, gate="router", score="softmax_topk"),
    family("jetmoe", "JetMoeMoE", "granitemoe", {"hidden_size": H, "num_local_experts": E, "intermediate_size": F,
                                                 "activation_function": "silu", "num_hidden_layers": 2},
           gate="router", score="softmax_topk", kernels=("eager",), eager_sum="products_act_f32", tests="f32"),
    family("cohere2_moe", "Cohere2MoeSparseMoeBlock", "cohere2_moe", {**COHERE, "expert_selection_fn": "softmax"},
           shared="shared_experts", score="softmax_topk", tests="f32"),
    family("aria", "AriaTextMoELayer", "aria",
           {**SIZES, "moe_num_experts": E, "intermediate_size": 3 * F, "moe_num_shared_experts": 1},
           config_name="aria_text", topk="moe_topk", gate="router", shared="shared_experts", in_out=True,
           score="softmax_topk", tests="f32"),
    # The loop over experts is in f32 from end to end.
    family("openai_privacy_filter", "OpenAIPrivacyFilterMLP", "openai_privacy_filter",
           {**IN_OUT, "head_dim": 8, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}, gate="router", router_bias=True,
           in_out=True, expert_biases=True, score="softmax_topk", logits32=True, kernels=("grouped_mm",),
           tests="f32"),
    # C: softmax of f32 logits, times a factor
    family("deepseek_v2", "DeepseekV2Moe", "deepseek_v2", {**V2, "topk_method": "greedy"}, shared="shared_experts",
           fields="scale=1.5", logits32=True, tests="f32"),
    family("deepseek_v2", "DeepseekV2Moe", "deepseek_v2-groups",
           {**V2, **GROUPS, "topk_method": "group_limited_greedy"}, shared="shared_experts", fields="scale=1.5",
           logits32=True),
    # D: sigmoid, groups
    sigmoid_f32("deepseek_v3", "DeepseekV3MoE", "deepseek_v3",
                {**N3, **GROUPS, "routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    sigmoid_f32("dots1", "Dots1MoE", "dots1", {**N3, "routed_scaling_factor": 1.0, "norm_topk_prob": False},
                tests="f32"),
    sigmoid_f32("glm4_moe", "Glm4MoeMoE", "glm4_moe", {**N3, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
                tests="f32"),
    sigmoid_f32("kimi_linear", "KimiLinearMoE", "kimi_linear",
                {**N1, "num_shared_experts": 1, "num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
                 "moe_renormalize": True}, topk="num_experts_per_token"),
    sigmoid_f32("nemotron_h", "NemotronHMoE", "nemotron_h",
                {"hidden_size": H, "n_routed_experts": E, "moe_intermediate_size": F, "num_attention_heads": 2,
                 "moe_shared_expert_intermediate_size": S, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
                 "norm_topk_prob": True, "layers_block_type": ["moe", "moe"]}, gated=False, eager_sum="eager_f32",
                 own_expert=True),
    # E: the experts' input is multiplied
    family("llama4", "Llama4TextMoe", "llama4", {**IN_OUT, "num_key_value_heads": 2}, config_name="llama4_text",
           gate="router", shared="shared_expert", in_out=True, score="sigmoid", kernels=("eager",), eager_sum=""),
    # F: sqrt(softplus)
    family("deepseek_v4", "DeepseekV4SparseMoeBlock", "deepseek_v4", {**V4, "mlp_layer_types": ["moe", "moe"]},
           shared="shared_experts", bias=BIAS, block_args=(1,), fields="limit=1.25", score="sqrt_softplus",
           own_expert=True),
    family("deepseek_v4", "DeepseekV4SparseMoeBlock", "deepseek_v4-hash",
           {**V4, "mlp_layer_types": ["hash_moe", "hash_moe"]}, shared="shared_experts", block_args=(1,),
           gate_takes="ids", fields="limit=1.25", score="sqrt_softplus"),
    # G: sigmoid without groups
    family("minimax_m2", "MiniMaxM2SparseMoeBlock", "minimax_m2", N2, bias="e_score_correction_bias", score="sigmoid",
           gate_takes="bias"),
    family("minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock", "minimax_m3_vl",
           {**N2, "shared_intermediate_size": S, "dense_intermediate_size": S, "routed_scaling_factor": 2.0,
            "swiglu_alpha": 1.702, "swiglu_limit": 1.25}, config_name="minimax_m3_vl_text", shared="shared_experts",
           bias=BIAS, fields="limit=1.25", score="sigmoid", own_expert=True),
    family("step3p7", "Step3p7SparseMoeBlock", "step3p7",
           {**SIZES, "n_routed_experts": E, "moe_intermediate_size": F, "share_expert_dim": S, "intermediate_size": S,
            "moe_router_scaling_factor": 3.0, "swiglu_limits": [1.25, 1.25], "swiglu_limits_shared": [1.25, 1.25],
            "mlp_layer_types": ["sparse", "sparse"]}, config_name="step3p5", shared="shared_experts",
           block_args=(1,), bias=BIAS, fields="limit=1.25", score="sigmoid", own_expert=True, tests="f32"),
    family("afmoe", "AfmoeSparseMoeBlock", "afmoe", {**N1, "num_shared_experts": 1, "route_scale": 1.0, "head_dim": 8},
           shared="shared_experts", bias="expert_bias", score="sigmoid", gate="router", gate_takes="bias", tests="f32"),
    family("hy_v3", "HYV3MoE", "hy_v3", {**N1, "num_shared_experts": 1, "router_scaling_factor": 2.826},
           shared="shared_experts", bias="e_score_correction_bias", gate_takes="bias", score="sigmoid",
           logits32=True, tests="f32"),
    family("flint", "FlintSparseMoeBlock", "flint", {**N1, "shared_expert_intermediate_size": S},
           shared="shared_expert", score="sigmoid", logits32=True, tests="f32"),
    family("lfm2_moe", "Lfm2MoeSparseMoeBlock", "lfm2_moe",
           {**N1, "norm_topk_prob": True, "use_expert_bias": True, "routed_scaling_factor": 1.0,
            "num_dense_layers": 0}, bias="expert_bias", score="sigmoid_act", gate_takes="bias"),
    # H: softmax, chosen with a bias
    family("longcat_flash", "LongcatFlashMoE", "longcat_flash",
           {"hidden_size": H, "n_routed_experts": E, "expert_ffn_hidden_size": F, "zero_expert_num": 2, "num_layers": 2,
            "routed_scaling_factor": 6.0, "num_attention_heads": 2}, topk="moe_topk", gate="router",
           bias="router.e_score_correction_bias", fields="null_experts=2", logits32=True, fixed_k=True),
    family("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", "ernie4_5_moe",
           {**SIZES, "moe_num_experts": E, "moe_intermediate_size": F, "moe_num_shared_experts": 1}, topk="moe_k",
           shared="shared_experts", bias="gate.moe_statics.e_score_correction_bias", logits32=True),
    # I: softmax, groups
    family("mistral4", "Mistral4MoE", "mistral4", MISTRAL, shared="shared_experts", fields="scale=1.5",
           score="softmax_act"),
    family("mistral_large4", "MistralLarge4TextMoE", "mistral_large4", MISTRAL, config_name="mistral_large4_text",
           shared="shared_experts", fields="scale=1.5", logits32=True, tests="f32"),
    # J: sigmoid of the largest logits
    family("cohere2_moe", "Cohere2MoeSparseMoeBlock", "cohere2_moe-sigmoid",
           {**COHERE, "expert_selection_fn": "sigmoid"}, shared="shared_experts", score="sigmoid_act", tests="f32"),
    family("kolibri1", "Kolibri1SparseMoeBlock", "kolibri1",
           {**N1, "shared_expert_intermediate_size": S, "norm_topk_prob": False}, shared="shared_experts", bias=BIAS,
           score="sigmoid", logits32=True, tests="f32"),
    family("kolibri1", "Kolibri1SparseMoeBlock", "kolibri1-renorm",
           {**N1, "shared_expert_intermediate_size": S, "norm_topk_prob": True}, shared="shared_experts", bias=BIAS,
           score="sigmoid", logits32=True, tests="f32"),
    # K: sparsemixer
    family("phimoe", "PhimoeSparseMoeBlock", "phimoe", {**N2, "router_jitter_noise": 0.2, "input_jitter_noise": 0.0},
           gate="router", fields="sparse_eps=0.2", score="sparsemixer", k=2, fixed_k=True),
    # Records that are a preset with other fields
    family("qwen3_moe", "Qwen3MoeSparseMoeBlock", "qwen3_moe",
           {**N1, "norm_topk_prob": True, "hidden_act": "gelu_pytorch_tanh"}, fields="activation=gelu_tanh",
           stages=("moe",), own_expert=True, loses_bits=True),
    family("qwen3_moe", "Qwen3MoeSparseMoeBlock", "qwen3_moe", {**N1, "norm_topk_prob": True, "hidden_act": "relu"},
           fields="activation=relu", stages=("moe",), own_expert=True, tests="f32"),
    sigmoid_f32("axk2", "AXK2MoE", "axk2",
                {**N3, **GROUPS, "routed_scaling_factor": 2.5, "norm_topk_prob": True}, tests="f32"),
    sigmoid_f32("hy_v4", "HYV4MoE", "hy_v4",
                {**N3, **GROUPS, "routed_scaling_factor": 2.827, "norm_topk_prob": True, "swiglu_limit": 1.25},
                fields="limit=1.25", tests="f32"),
    sigmoid_f32("glm5_next", "Glm5NextTextMoE", "glm5_next",
                {**N3, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "swiglu_limit": 1.25,
                 "num_key_value_heads": 2}, config_name="glm5_next_text", fields="limit=1.25", tests="f32"),
    sigmoid_f32("beam", "BeamMoE", "beam",
                {**N1, **GROUPS, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_key_value_heads": 2},
                shared="", own_expert=True, tests="f32"),
    sigmoid_f32("inkling2", "Inkling2SparseMoeBlock", "inkling2",
                {**SIZES, "n_routed_experts": E, "moe_intermediate_size": F, "routed_scaling_factor": 1.5,
                 "mlp_gate_softcap": 2.0, "mlp_up_softcap": 3.0, "scoring_func": "sigmoid"},
                config_name="inkling2_text", shared="", eager_sum="eager_f32",
                fields="scale=1.5 gate_cap=2 up_cap=3", own_expert=True),
    family("laguna", "LagunaSparseMoeBlock", "laguna",
           {**N1, "shared_expert_intermediate_size": S, "moe_router_logit_softcapping": 2.0,
            "moe_routed_scaling_factor": 2.5}, shared="shared_experts", bias=BIAS, score="sigmoid",
           stages=("route", "moe"), fields="logit_softcap=2 scale=2.5"),
    sigmoid_f32("muse_spark", "MuseSparkMoE", "muse_spark",
                {**SIZES, "num_local_experts": E, "moe_intermediate_size": F, "routed_scaling_factor": 1.5,
                 "output_multiplier": 0.5, "moe_hidden_size": H}, config_name="muse_spark_text", shared="",
                stages=("route",), fields="logit_scale=0.5 scale=1.5"),
    # Other classes with the same record
    family("minimax", "MiniMaxSparseMoeBlock", "mixtral", N2, tests="few"),
    family("jamba", "JambaSparseMoeBlock", "qwen3_moe-raw", PLAIN, gate="router", tests="few"),
    family("mellum", "MellumSparseMoeBlock", "qwen3_moe", {**N1, "norm_topk_prob": True}, tests="few"),
    family("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", "qwen3_moe", N1, config_name="qwen3_vl_moe_text",
           tests="few"),
    family("granitemoeshared", "GraniteMoeSharedMoE", "granitemoe", N2, gate="router", score="softmax_topk",
           tests="few"),
    sigmoid_f32("deepseek_v32", "DeepseekV32MoE", "deepseek_v3",
                {**N3, **GROUPS, "routed_scaling_factor": 2.5, "norm_topk_prob": True}, tests="few"),
    sigmoid_f32("exaone_moe", "ExaoneMoeSparseMoEBlock", "deepseek_v3",
                {**N1, **GROUPS, "num_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
                tests="few"),
    sigmoid_f32("glm4_moe_lite", "Glm4MoeLiteMoE", "glm4_moe",
                {**N3, "routed_scaling_factor": 1.8, "norm_topk_prob": True}, fields="scale=1.8", tests="few"),
    sigmoid_f32("glm_moe_dsa", "GlmMoeDsaMoE", "glm4_moe",
                {**N3, "routed_scaling_factor": 2.5, "norm_topk_prob": True}, fields="scale=2.5", tests="few"),
    family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock", "qwen3_moe", {**N1, "norm_topk_prob": True},
           config_name="qwen3_omni_moe_text", tests="few"),
    family("qwen4_exp", "Qwen4ExpTextSparseMoeBlock", "qwen2_moe-renorm",
           {**N1, "norm_topk_prob": True, "shared_expert_intermediate_size": S,
            "layer_types": ["linear_attention"] * 2}, config_name="qwen4_exp_text", **GATED_SHARED, tests="few"),
    family("granitemoehybrid", "GraniteMoeHybridMoE", "granitemoe", {**N2, "mamba_n_heads": 4}, gate="router",
           score="softmax_topk", tests="few"),
    family("granitemoe_swa", "GraniteMoeSWAMoE", "granitemoe", N2, gate="router", score="softmax_topk", tests="few"),
    family("deepseek_ocr2", "DeepseekOcr2TextMoe", "deepseek_v2", {**V2, "topk_method": "greedy"},
           config_name="deepseek_ocr2_text", shared="shared_experts", fields="scale=1.5", logits32=True, tests="few"),
    family("unlimited_ocr", "UnlimitedOcrTextMoe", "deepseek_v2-groups",
           {**V2, **GROUPS, "topk_method": "group_limited_greedy"}, config_name="unlimited_ocr_text",
           shared="shared_experts", fields="scale=1.5", logits32=True, tests="few"),
    sigmoid_f32("glm4v_moe", "Glm4vMoeTextMoE", "glm4_moe",
                {**N3, "routed_scaling_factor": 1.0, "norm_topk_prob": True}, config_name="glm4v_moe_text",
                tests="few"),
    sigmoid_f32("bailing_hybrid", "BailingHybridMoE", "deepseek_v3",
                {**SIZES, **GROUPS, "num_local_experts": E, "moe_intermediate_size": F, "n_shared_experts": 1,
                 "routed_scaling_factor": 2.5, "norm_topk_prob": True}, tests="few"),
    sigmoid_f32("dots3_note", "Dots3NoteTextMoE", "glm4_moe",
                {**N3, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "shared_experts_intermediate_size": S,
                 "num_key_value_heads": 2}, config_name="dots3_note_text", tests="few"),
    sigmoid_f32("mimo_v2_flash", "MiMoV2FlashMoE", "glm4_moe",
                {**{k: v for k, v in N3.items() if k != "n_shared_experts"}, "routed_scaling_factor": 1.0,
                 "norm_topk_prob": True}, shared="", tests="few"),
    sigmoid_f32("hy_v4_vl", "HYV4VLMoE", "hy_v4",
                {**N3, "routed_scaling_factor": 2.827, "norm_topk_prob": True, "swiglu_limit": 1.25},
                config_name="hy_v4_vl_text", fields="limit=1.25", tests="few"),
    sigmoid_f32("inkling2_loop", "Inkling2LoopSparseMoeBlock", "inkling2",
                {**SIZES, "n_routed_experts": E, "moe_intermediate_size": F, "routed_scaling_factor": 1.5,
                 "mlp_gate_softcap": 2.0, "mlp_up_softcap": 3.0, "scoring_func": "sigmoid"},
                config_name="inkling2_loop_text", shared="", eager_sum="eager_f32",
                fields="scale=1.5 gate_cap=2 up_cap=3", tests="few"),
    family("ernie4_5_vl_moe", "Ernie4_5_VLMoeSparseMoeBlock", "ernie4_5_moe",
           {**SIZES, "moe_num_experts": E, "moe_intermediate_size": [F, F], "moe_num_shared_experts": 0},
           config_name="ernie4_5_vl_moe_text", block_args=(F,), topk="moe_k",
           bias="gate.moe_statics.e_score_correction_bias", logits32=True, tests="few"),
    sigmoid_f32("solar_open", "SolarOpenMoE", "glm4_moe",
                {**N3, "routed_scaling_factor": 1.0, "norm_topk_prob": True}, tests="few"),
]
