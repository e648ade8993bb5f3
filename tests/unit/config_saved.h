/* The config.json that save_pretrained of transformers 5.24.0 writes for a small model of each family (H 64, 4 layers),
 * without keys of attention, positions and tokens; and what the class built from it has, counted in its modules. Facts,
 * made by running each class; to be compared with what the reader makes of the file. */
#ifndef XP_CONFIG_SAVED_H
#define XP_CONFIG_SAVED_H

static const struct {
    char letter;         /* of the dialect */
    int moe, E, K, F, S; /* layers with experts; widths of an expert and of the shared one */
    double scale, aux;
    const char *json; /* ' for " */
} saved_config[] = {
    {'A', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'decoder_sparse_step': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 6144, "
     "'mlp_only_layers': [], 'model_type': 'qwen3_moe', 'moe_intermediate_size': 48, 'norm_topk_prob': false, "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'decoder_sparse_step': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 5632, "
     "'mlp_only_layers': [], 'model_type': 'qwen2_moe', 'moe_intermediate_size': 48, 'norm_topk_prob': false, "
     "'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'shared_expert_intermediate_size': 40, 'vocab_size': "
     "1000}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.01,
     "{'attn_config': {'attn_pdrop': 0.0, 'clip_qkv': null, 'kv_n_heads': 2, 'model_type': ''}, 'd_model': 64, "
     "'emb_pdrop': 0.0, 'ffn_config': {'dtype': null, 'ffn_act_fn': {'name': 'silu'}, 'ffn_hidden_size': 48, "
     "'hidden_size': 64, 'model_type': '', 'moe_jitter_eps': null, 'moe_loss_weight': 0.01, "
     "'moe_normalize_expert_weights': 1.0, 'moe_num_experts': 16, 'moe_top_k': 4, 'return_dict': true}, 'model_type': "
     "'dbrx', 'n_heads': 2, 'n_layers': 4, 'output_router_logits': false, 'resid_pdrop': 0.0, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'mixtral', "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-05, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.0, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'decoder_sparse_step': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 5632, "
     "'mlp_only_layers': [], 'model_type': 'qwen3_next', 'moe_intermediate_size': 48, 'norm_topk_prob': true, "
     "'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'shared_expert_intermediate_size': 40, 'vocab_size': "
     "1000}"},
    {'A', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'model_type': 'qwen3_5_moe', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'model_type': "
     "'qwen3_5_moe_text', 'moe_intermediate_size': 48, 'num_experts': 16, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, "
     "'shared_expert_intermediate_size': 40, 'vocab_size': 1000}}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'model_type': 'qwen3_vl_moe', 'text_config': {'decoder_sparse_step': 1, 'hidden_act': 'silu', "
     "'hidden_size': 64, 'intermediate_size': 5632, 'mlp_only_layers': [], 'model_type': 'qwen3_vl_moe_text', "
     "'moe_intermediate_size': 48, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'vocab_size': 1000}}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.01,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'olmoe', 'norm_topk_prob': "
     "false, 'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-05, 'router_aux_loss_coef': 0.01, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.01,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'flex_olmo', "
     "'norm_topk_prob': false, 'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.01, 'vocab_size': 1000}"},
    {'A', 2, 16, 4, 48, 0, 1.0, 0.001,
     "{'expert_layer_offset': 1, 'expert_layer_period': 2, 'hidden_act': 'silu', 'hidden_size': 64, "
     "'intermediate_size': 48, 'model_type': 'jamba', 'num_experts': 16, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, "
     "'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 48, 1.0, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'hunyuan_v1_moe', "
     "'moe_topk': 4, 'num_experts': 16, 'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': "
     "1e-05, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'minimax', "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-05, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.0, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'mlp_layer_types': ['sparse', 'sparse', "
     "'sparse', 'sparse'], 'model_type': 'mellum', 'moe_intermediate_size': 48, 'norm_topk_prob': true, "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, 'num_nextn_predict_layers': null, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'model_type': 'lara_mini', 'moe_intermediate_size': 48, "
     "'norm_topk_prob': true, 'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, "
     "'shared_expert_intermediate_size': 40, 'vocab_size': 1000}"},
    {'A', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'model_type': 'qwen4_exp', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'model_type': "
     "'qwen4_exp_text', 'moe_intermediate_size': 48, 'norm_topk_prob': true, 'num_experts': 16, "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_gate_type': null, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'shared_expert_intermediate_size': 40, 'vocab_size': "
     "1000}}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'model_type': 'qwen3_omni_moe_thinker', 'text_config': {'decoder_sparse_step': 1, 'hidden_act': 'silu', "
     "'hidden_size': 64, 'intermediate_size': 18944, 'mlp_only_layers': [], 'model_type': 'qwen3_omni_moe_text', "
     "'moe_intermediate_size': 48, 'norm_topk_prob': true, 'num_experts': 16, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, "
     "'vocab_size': 1000}}"},
    {'A', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'model_type': 'qwen3_omni_moe', 'thinker_config': {'model_type': 'qwen3_omni_moe_thinker', 'text_config': "
     "{'decoder_sparse_step': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 18944, "
     "'mlp_only_layers': [], 'model_type': 'qwen3_omni_moe_text', 'moe_intermediate_size': 48, 'norm_topk_prob': "
     "true, 'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'vocab_size': 1000}}}"},
    {'B', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'gpt_oss', "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-05, 'router_aux_loss_coef': 0.001, 'swiglu_alpha': 1.702, 'swiglu_limit': 7.0, "
     "'vocab_size': 1000}"},
    {'B', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'logits_scaling': 1.0, 'model_type': "
     "'granitemoe', 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'vocab_size': 1000}"},
    {'B', 4, 16, 4, 48, 0, 1.0, 0.01,
     "{'activation_function': 'silu', 'aux_loss_coef': 0.01, 'hidden_size': 64, 'intermediate_size': 48, "
     "'model_type': 'jetmoe', 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'vocab_size': 1000}"},
    {'G', 4, 16, 4, 48, 0, 1.0, 0.0,
     "{'model_type': 'muse_spark', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': "
     "16384, 'mlp_layer_types': ['sparse', 'sparse', 'sparse', 'sparse'], 'model_type': 'muse_spark_text', "
     "'moe_hidden_size': 40, 'moe_intermediate_size': 48, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'num_local_experts': 16, 'output_multiplier': 0.1767766952966369, 'output_router_logits': false, "
     "'post_norm_eps': 1e-08, 'residual_gate_temperature': 0.3, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': "
     "1.0, 'vocab_size': 1000}}"},
    {'B', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'logits_scaling': 1.0, 'model_type': "
     "'granitemoeshared', 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, "
     "'shared_intermediate_size': 40, 'vocab_size': 1000}"},
    {'B', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'logits_scaling': 1.0, 'mamba_n_groups': "
     "1, 'model_type': 'granitemoehybrid', 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': "
     "16, 'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, "
     "'shared_intermediate_size': 40, 'vocab_size': 1000}"},
    {'B', 4, 16, 4, 48, 40, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'logits_scaling': 1.0, 'model_type': "
     "'granitemoe_swa', 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, "
     "'shared_intermediate_size': 40, 'vocab_size': 1000}"},
    {'B', 4, 16, 4, 48, 96, 1.0, 0.0,
     "{'model_type': 'aria', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, "
     "'mlp_bias': false, 'model_type': 'aria_text', 'moe_num_experts': 16, 'moe_num_shared_experts': 2, "
     "'moe_topk': 4, 'num_hidden_layers': 4, 'rms_norm_eps': 1e-06, 'vocab_size': 1000}}"},
    {'B', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'openai_privacy_filter', 'num_experts_per_tok': "
     "4, 'num_hidden_layers': 4, 'num_local_experts': 16, 'output_router_logits': false, 'rms_norm_eps': 1e-05, "
     "'router_aux_loss_coef': 0.001, 'swiglu_alpha': 1.702, 'swiglu_limit': 7.0, 'vocab_size': 1000}"},
    {'B', 4, 16, 4, 48, 96, 1.0, 0.0,
     "{'expert_selection_fn': 'softmax', 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, "
     "'layer_norm_eps': 1e-05, 'logit_scale': 0.0625, 'mlp_layer_types': ['sparse', 'sparse', 'sparse', 'sparse'], "
     "'model_type': 'cohere2_moe', 'norm_topk_prob': true, 'num_experts': 16, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'num_shared_experts': 2, 'output_router_logits': false, 'rms_norm_eps': null, "
     "'rope_scaling': null, 'shared_expert_combination_strategy': 'average', 'vocab_size': 1000}"},
    {'C', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'mlp_bias': "
     "false, 'model_type': 'deepseek_v2', 'moe_intermediate_size': 48, 'n_group': null, 'n_routed_experts': 16, "
     "'n_shared_experts': 2, 'norm_topk_prob': false, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 1.0, 'topk_group': null, "
     "'topk_method': 'greedy', 'vocab_size': 1000}"},
    {'C', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'model_type': 'deepseek_ocr2', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, "
     "'intermediate_size': 96, 'mlp_bias': false, 'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], "
     "'model_type': 'deepseek_ocr2_text', 'moe_intermediate_size': 48, 'n_group': null, 'n_routed_experts': 16, "
     "'n_shared_experts': 2, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'routed_scaling_factor': 1.0, 'topk_group': null, 'topk_method': 'greedy', "
     "'vocab_size': 1000}}"},
    {'C', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'model_type': 'unlimited_ocr', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, "
     "'intermediate_size': 96, 'mlp_bias': false, 'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], "
     "'model_type': 'unlimited_ocr_text', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, "
     "'n_shared_experts': 2, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'routed_scaling_factor': 1.0, 'topk_group': 1, 'topk_method': 'greedy', 'vocab_size': "
     "1000}}"},
    {'D', 1, 16, 4, 48, 96, 2.5, 0.0,
     "{'first_k_dense_replace': 3, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'model_type': "
     "'deepseek_v3', 'moe_intermediate_size': 48, 'n_group': 4, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_nextn_predict_layers': 1, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 2, "
     "'vocab_size': 1000}"},
    {'D', 1, 16, 4, 48, 96, 2.5, 0.0,
     "{'first_k_dense_replace': 3, 'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 2048, "
     "'intermediate_size': 96, 'mlp_bias': false, 'mlp_layer_types': ['dense', 'dense', 'dense', 'sparse'], "
     "'model_type': 'deepseek_v32', 'moe_intermediate_size': 48, 'n_group': 4, 'n_routed_experts': 16, "
     "'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 2, "
     "'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'model_type': "
     "'glm4_moe', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_nextn_predict_layers': 1, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': 1.0, 'topk_group': 1, "
     "'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 1.8, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'mlp_layer_types': ['dense', 'sparse', "
     "'sparse', 'sparse'], 'model_type': 'glm4_moe_lite', 'moe_intermediate_size': 48, 'n_group': 1, "
     "'n_routed_experts': 16, 'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': 1.8, "
     "'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 1, 16, 4, 48, 96, 2.5, 0.0,
     "{'first_k_dense_replace': 3, 'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 2048, "
     "'intermediate_size': 96, 'mlp_bias': false, 'mlp_layer_types': ['dense', 'dense', 'dense', 'sparse'], "
     "'model_type': 'glm_moe_dsa', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, "
     "'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': 2.5, 'topk_group': 1, "
     "'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'model_type': "
     "'dots1', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': false, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'routed_scaling_factor': 1.0, 'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 4, 16, 4, 48, 96, 1.0, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'model_type': 'solar_open', "
     "'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'n_shared_experts': 2, 'norm_topk_prob': "
     "true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': "
     "1e-05, 'routed_scaling_factor': 1.0, 'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 2.5, 0.0,
     "{'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 16384, "
     "'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], 'model_type': 'exaone_moe', "
     "'moe_intermediate_size': 48, 'n_group': 1, 'norm_topk_prob': true, 'num_experts': 16, 'num_experts_per_tok': "
     "4, 'num_hidden_layers': 4, 'num_shared_experts': 2, 'output_router_logits': false, 'rms_norm_eps': 1e-05, "
     "'routed_scaling_factor': 2.5, 'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 2.446, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 9216, 'mlp_layer_types': ['dense', 'sparse', "
     "'sparse', 'sparse'], 'model_type': 'kimi_linear', 'moe_intermediate_size': 48, 'moe_renormalize': true, "
     "'num_expert_group': 1, 'num_experts': 16, 'num_experts_per_token': 4, 'num_hidden_layers': 4, "
     "'num_shared_experts': 2, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': "
     "2.446, 'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 2, 16, 4, 48, 40, 1.0, 0.0,
     "{'hidden_size': 64, 'intermediate_size': 96, 'layer_norm_epsilon': 1e-05, 'layers_block_type': "
     "['linear_attention', 'moe', 'full_attention', 'moe'], 'mlp_bias': false, 'mlp_hidden_act': 'relu2', "
     "'model_type': 'nemotron_h', 'moe_intermediate_size': 48, 'moe_latent_size': null, "
     "'moe_shared_expert_intermediate_size': 40, 'moe_shared_expert_overlap': true, 'n_group': 1, 'n_groups': 8, "
     "'n_routed_experts': 16, 'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, "
     "'num_nextn_predict_layers': 0, 'output_router_logits': false, 'rescale_prenorm_residual': true, "
     "'routed_scaling_factor': 1.0, 'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 1, 16, 4, 48, 96, 2.5, 0.0,
     "{'model_type': 'kimi_k25', 'text_config': {'first_k_dense_replace': 3, 'hidden_act': 'silu', 'hidden_size': "
     "64, 'intermediate_size': 96, 'model_type': 'deepseek_v3', 'moe_intermediate_size': 48, 'n_group': 4, "
     "'n_routed_experts': 16, 'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'num_nextn_predict_layers': 1, 'output_router_logits': false, 'rms_norm_eps': 1e-06, "
     "'routed_scaling_factor': 2.5, 'topk_group': 2, 'vocab_size': 1000}}"},
    {'D', 3, 16, 4, 48, 96, 1.0, 0.0001,
     "{'model_type': 'glm4v_moe', 'text_config': {'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': "
     "64, 'intermediate_size': 96, 'model_type': 'glm4v_moe_text', 'moe_intermediate_size': 48, 'n_group': 1, "
     "'n_routed_experts': 16, 'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': 1.0, "
     "'router_aux_loss_coef': 0.0001, 'topk_group': 1, 'vocab_size': 1000}}"},
    {'D', 3, 16, 4, 48, 96, 2.5, 0.0,
     "{'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'model_type': "
     "'sarvam_mla', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_nextn_predict_layers': 0, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 1, "
     "'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 2.5, 0.0,
     "{'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'model_type': "
     "'sarvam_moe', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_nextn_predict_layers': 0, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 1, "
     "'vocab_size': 1000}"},
    {'D', 2, 16, 4, 48, 96, 2.5, 0.0,
     "{'first_k_dense_replace': 2, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 6144, "
     "'kda_safe_gate': true, 'layer_group_size': 6, 'mlp_layer_types': ['dense', 'dense', 'sparse', 'sparse'], "
     "'model_type': 'bailing_hybrid', 'moe_intermediate_size': 48, 'moe_renormalize': true, "
     "'mtp_loss_scaling_factor': 0.0, 'num_expert_group': 4, 'num_experts': 16, 'num_experts_per_token': 4, "
     "'num_hidden_layers': 4, 'num_nextn_predict_layers': 1, 'num_shared_experts': 2, 'output_router_logits': "
     "false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 2, 'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 80, 1.0, 0.0,
     "{'model_type': 'dots3_note', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 2048, "
     "'intermediate_size': 96, 'mlp_bias': false, 'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], "
     "'model_type': 'dots3_note_text', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, "
     "'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': 1.0, "
     "'shared_experts_intermediate_size': 40, 'topk_group': 1, 'vocab_size': 1000}}"},
    {'D', 3, 16, 4, 48, 0, 1.0, 0.0,
     "{'attention_value_scale': 0.707, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, "
     "'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], 'model_type': 'mimo_v2_flash', "
     "'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'norm_topk_prob': true, "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-05, "
     "'routed_scaling_factor': 1.0, 'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 2.5, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'mlp_layer_types': ['dense', 'sparse', "
     "'sparse', 'sparse'], 'model_type': 'axk1', 'moe_intermediate_size': 48, 'n_group': 4, 'n_routed_experts': "
     "16, 'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 2, "
     "'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 2.5, 0.0,
     "{'gated_norm_rank': 16, 'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 2048, 'intermediate_size': "
     "96, 'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], 'model_type': 'axk2', "
     "'moe_intermediate_size': 48, 'n_group': 4, 'n_routed_experts': 16, 'n_shared_experts': 2, 'norm_topk_prob': "
     "true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': "
     "1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 2, 'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 2.827, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 2048, 'intermediate_size': 96, 'mlp_layer_types': "
     "['dense', 'sparse', 'sparse', 'sparse'], 'model_type': 'hy_v4', 'moe_intermediate_size': 48, 'n_group': 1, "
     "'n_routed_experts': 16, 'n_shared_experts': 2, 'norm_topk_prob': true, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': "
     "2.827, 'swiglu_limit': 10.0, 'topk_group': 1, 'vocab_size': 1000}"},
    {'D', 3, 16, 4, 48, 96, 2.827, 0.0,
     "{'model_type': 'hy_v4_vl', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 2048, "
     "'intermediate_size': 96, 'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], 'model_type': "
     "'hy_v4_vl_text', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-05, 'routed_scaling_factor': 2.827, 'swiglu_limit': 10.0, 'topk_group': 1, 'vocab_size': "
     "1000}}"},
    {'D', 1, 16, 4, 48, 96, 2.5, 0.001,
     "{'model_type': 'glm5_next', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 2048, "
     "'intermediate_size': 96, 'mlp_layer_types': ['dense', 'dense', 'dense', 'sparse'], 'model_type': "
     "'glm5_next_text', 'moe_intermediate_size': 48, 'n_group': 1, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-05, 'routed_scaling_factor': 2.5, 'router_aux_loss_coef': 0.001, 'swiglu_limit': 10.0, "
     "'topk_group': 1, 'vocab_size': 1000}}"},
    {'D', 1, 16, 4, 48, 0, 2.5, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'mlp_layer_types': ['dense', 'dense', "
     "'dense', 'sparse'], 'model_type': 'beam', 'moe_intermediate_size': 48, 'n_group': 4, 'norm_topk_prob': true, "
     "'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.5, 'topk_group': 2, 'vocab_size': 1000}"},
    {'E', 2, 16, 1, 48, 48, 1.0, 0.0,
     "{'model_type': 'llama4', 'text_config': {'attn_scale': 0.1, 'floor_scale': 8192, 'hidden_act': 'silu', "
     "'hidden_size': 64, 'interleave_moe_layer_step': 2, 'intermediate_size': 48, 'intermediate_size_mlp': 16384, "
     "'model_type': 'llama4_text', 'moe_layers': [1, 3], 'num_experts_per_tok': 1, 'num_hidden_layers': 4, "
     "'num_local_experts': 16, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'router_aux_loss_coef': "
     "0.001, 'router_jitter_noise': 0.0, 'vocab_size': 1000}}"},
    {'E', 2, 16, 1, 48, 48, 1.0, 0.0,
     "{'attn_scale': 0.1, 'floor_scale': 8192, 'hidden_act': 'silu', 'hidden_size': 64, "
     "'interleave_moe_layer_step': 2, 'intermediate_size': 48, 'intermediate_size_mlp': 16384, 'model_type': "
     "'llama4_text', 'moe_layers': [1, 3], 'num_experts_per_tok': 1, 'num_hidden_layers': 4, 'num_local_experts': "
     "16, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'router_aux_loss_coef': 0.001, "
     "'router_jitter_noise': 0.0, 'vocab_size': 1000}"},
    {'F', 4, 16, 4, 48, 48, 1.5, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'index_topk': 512, 'mlp_bias': false, 'mlp_layer_types': "
     "['hash_moe', 'hash_moe', 'hash_moe', 'moe'], 'model_type': 'deepseek_v4', 'moe_intermediate_size': 48, "
     "'n_routed_experts': 16, 'n_shared_experts': 1, 'norm_topk_prob': true, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'num_nextn_predict_layers': 1, 'o_groups': 8, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'routed_scaling_factor': 1.5, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': "
     "0.0, 'scoring_func': 'sqrtsoftplus', 'swiglu_limit': 10.0, 'vocab_size': 1000}"},
    {'G', 4, 16, 4, 48, 0, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'minimax_m2', "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.0, 'vocab_size': 1000}"},
    {'G', 4, 16, 4, 48, 40, 2.0, 0.001,
     "{'model_type': 'minimax_m3_vl', 'text_config': {'dense_intermediate_size': 12288, 'hidden_act': 'silu', "
     "'hidden_size': 64, 'index_topk_blocks': 16, 'intermediate_size': 48, 'mlp_layer_types': ['sparse', 'sparse', "
     "'sparse', 'sparse'], 'model_type': 'minimax_m3_vl_text', 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'num_local_experts': 16, 'output_router_logits': false, 'rms_norm_eps': 1e-06, 'routed_scaling_factor': 2.0, "
     "'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.0, 'shared_intermediate_size': 40, 'swiglu_alpha': "
     "1.702, 'swiglu_limit': 7.0, 'vocab_size': 1000}}"},
    {'G', 1, 16, 4, 48, 40, 1.0, 0.0,
     "{'model_type': 'step3p7', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, "
     "'mlp_bias': false, 'mlp_layer_types': ['dense', 'dense', 'dense', 'sparse'], 'model_type': 'step3p5', "
     "'moe_intermediate_size': 48, 'moe_router_scaling_factor': 1.0, 'n_routed_experts': 16, "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_nextn_predict_layers': 0, 'output_router_logits': "
     "false, 'query_pre_attn_scalar': 128, 'rms_norm_eps': 1e-05, 'share_expert_dim': 40, 'swiglu_limits': null, "
     "'swiglu_limits_shared': null, 'vocab_size': 1000}}"},
    {'G', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 6144, 'model_type': 'afmoe', "
     "'moe_intermediate_size': 48, 'num_dense_layers': 1, 'num_experts': 16, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'num_shared_experts': 2, 'output_router_logits': false, 'rms_norm_eps': 1e-05, "
     "'route_scale': 1.0, 'vocab_size': 1000}"},
    {'G', 2, 16, 4, 48, 40, 1.0, 0.0005,
     "{'decoder_sparse_step': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 6144, "
     "'mlp_only_layers': [0, 1], 'model_type': 'flint', 'moe_intermediate_size': 48, 'norm_topk_prob': true, "
     "'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.0005, 'shared_expert_intermediate_size': 40, 'vocab_size': "
     "1000}"},
    {'G', 3, 16, 4, 48, 96, 2.826, 0.0,
     "{'enable_moe_fp32_combine': true, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 13312, "
     "'mlp_bias': false, 'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], 'model_type': 'hy_v3', "
     "'moe_intermediate_size': 48, 'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'num_shared_experts': 2, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'router_scaling_factor': "
     "2.826, 'vocab_size': 1000}"},
    {'G', 3, 16, 4, 48, 0, 1.0, 0.0,
     "{'hidden_size': 64, 'intermediate_size': 7168, 'model_type': 'lfm2_moe', 'moe_intermediate_size': 48, "
     "'norm_eps': 1e-05, 'norm_topk_prob': true, 'num_dense_layers': 1, 'num_experts': 16, 'num_experts_per_tok': "
     "4, 'num_hidden_layers': 4, 'output_router_logits': false, 'routed_scaling_factor': 1.0, 'use_expert_bias': "
     "true, 'vocab_size': 1000}"},
    {'G', 3, 16, 4, 48, 40, 2.5, 0.001,
     "{'gating': true, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 8192, 'mlp_layer_types': "
     "['dense', 'sparse', 'sparse', 'sparse'], 'model_type': 'laguna', 'moe_apply_router_weight_on_input': false, "
     "'moe_intermediate_size': 48, 'moe_routed_scaling_factor': 2.5, 'moe_router_logit_softcapping': 30.0, "
     "'num_experts': 16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'router_aux_loss_coef': 0.001, 'shared_expert_intermediate_size': 40, 'vocab_size': "
     "1000}"},
    {'G', 4, 16, 4, 48, 0, 8.0, 0.0,
     "{'model_type': 'inkling2', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, 'log_scaling_alpha': "
     "0.1, 'log_scaling_n_floor': 128000, 'mlp_gate_softcap': 4.0, 'mlp_up_softcap': 25.0, 'model_type': "
     "'inkling2_text', 'moe_intermediate_size': 48, 'n_routed_experts': 16, 'num_experts_per_tok': 4, "
     "'num_hidden_layers': 4, 'rms_norm_eps': 1e-06, 'route_scale': 8.0, 'scoring_func': 'sigmoid', 'vocab_size': "
     "1000}}"},
    {'G', 4, 16, 4, 48, 0, 8.0, 0.0,
     "{'model_type': 'inkling2_loop', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, "
     "'log_scaling_alpha': 0.1, 'log_scaling_n_floor': 8192, 'loop_gate_rank': 64, 'mlp_gate_softcap': 4.0, "
     "'mlp_up_softcap': 25.0, 'model_type': 'inkling2_loop_text', 'moe_intermediate_size': 48, 'n_routed_experts': "
     "16, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'rms_norm_eps': 1e-06, 'route_scale': 8.0, "
     "'scoring_func': 'sigmoid', 'vocab_size': 1000}}"},
    {'L', 4, 16, 4, 48, 96, 8.0, 0.0,
     "{'model_type': 'inkling_mm_model', 'text_config': {'hidden_act': 'silu', 'hidden_size': 64, "
     "'intermediate_size': 24576, 'log_scaling_alpha': 0.1, 'log_scaling_n_floor': null, "
     "'logits_mup_width_multiplier': 24.0, 'mlp_layer_types': ['sparse', 'sparse', 'sparse', 'sparse'], "
     "'model_type': 'inkling_text', 'moe_intermediate_size': 48, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_mtp_layers': null, 'rms_norm_eps': 1e-06, "
     "'rms_norm_eps_moe_gate': 1e-06, 'route_scale': 8.0, 'shared_expert_sink': true, 'vocab_size': 1000}}"},
    {'H', 4, 16, 4, 48, 0, 6.0, 0.0,
     "{'expert_ffn_hidden_size': 48, 'ffn_hidden_size': 12288, 'hidden_act': 'silu', 'hidden_size': 64, "
     "'model_type': 'longcat_flash', 'moe_topk': 4, 'n_routed_experts': 16, 'num_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': 6.0, 'vocab_size': 1000, "
     "'zero_expert_num': 8}"},
    {'H', 3, 16, 4, 48, 96, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 12288, 'model_type': 'ernie4_5_moe', "
     "'moe_intermediate_size': 48, 'moe_k': 4, 'moe_layer_end_index': 3, 'moe_layer_interval': 1, "
     "'moe_layer_start_index': 1, 'moe_norm_min': 1e-12, 'moe_num_experts': 16, 'moe_num_shared_experts': 2, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'router_aux_loss_coef': 0.001, "
     "'vocab_size': 1000}"},
    {'H', 3, 16, 4, 48, 96, 1.0, 0.001,
     "{'image_token_id': 100295, 'model_type': 'ernie4_5_vl_moe', 'text_config': {'hidden_act': 'silu', 'hidden_size': "
     "64, 'intermediate_size': 96, 'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'], 'model_type': "
     "'ernie4_5_vl_moe_text', 'moe_intermediate_size': [48, 24], 'moe_k': 4, 'moe_norm_min': 1e-12, 'moe_num_experts': "
     "16, 'moe_num_shared_experts': 2, 'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-05, "
     "'router_aux_loss_coef': 0.001, 'use_bias': false, 'vocab_size': 1000}, 'tie_word_embeddings': true}"},
    {'I', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'first_k_dense_replace': 1, 'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 96, 'model_type': "
     "'mistral4', 'moe_intermediate_size': 48, 'n_group': 4, 'n_routed_experts': 16, 'n_shared_experts': 2, "
     "'norm_topk_prob': true, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-06, 'routed_scaling_factor': 1.0, 'topk_group': 2, 'vocab_size': 1000}"},
    {'I', 3, 16, 4, 48, 96, 1.0, 0.0,
     "{'model_type': 'mistral_large4', 'text_config': {'first_k_dense_replace': 1, 'hidden_act': 'silu', "
     "'hidden_size': 64, 'index_topk': 2048, 'intermediate_size': 96, 'mlp_layer_types': ['dense', 'sparse', "
     "'sparse', 'sparse'], 'model_type': 'mistral_large4_text', 'moe_intermediate_size': 48, 'n_group': 4, "
     "'n_routed_experts': 16, 'n_shared_experts': 2, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-05, 'routed_scaling_factor': 1.0, 'topk_group': 2, "
     "'vocab_size': 1000}}"},
    {'J', 4, 16, 4, 48, 40, 1.0, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'model_type': 'kolibri1', 'moe_intermediate_size': 48, "
     "'norm_topk_prob': false, 'num_experts_per_tok': 4, 'num_hidden_layers': 4, 'num_local_experts': 16, "
     "'output_router_logits': false, 'rms_norm_eps': 1e-06, 'shared_expert_intermediate_size': 40, 'vocab_size': "
     "1000}"},
    {'K', 4, 16, 2, 48, 0, 1.0, 0.001,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'intermediate_size': 48, 'model_type': 'phimoe', "
     "'num_experts_per_tok': 2, 'num_hidden_layers': 4, 'num_local_experts': 16, 'output_router_logits': false, "
     "'rms_norm_eps': 1e-05, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.01, 'vocab_size': 1000}"},
    {'O', 4, 16, 4, 48, 40, 1.0, 0.0,
     "{'model_type': 'gemma4', 'text_config': {'enable_moe_block': true, 'hidden_activation': 'gelu_pytorch_tanh', "
     "'hidden_size': 64, 'hidden_size_per_layer_input': 0, 'intermediate_size': 40, 'model_type': 'gemma4_text', "
     "'moe_intermediate_size': 48, 'num_experts': 16, 'num_hidden_layers': 4, 'num_kv_shared_layers': 0, "
     "'rms_norm_eps': 1e-06, 'top_k_experts': 4, 'use_double_wide_mlp': false, 'vocab_size': 1000}}"},
    {'O', 4, 16, 4, 48, 40, 1.0, 0.0,
     "{'model_type': 'diffusion_gemma', 'text_config': {'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': "
     "64, 'intermediate_size': 40, 'model_type': 'diffusion_gemma_text', 'moe_intermediate_size': 48, "
     "'num_experts': 16, 'num_hidden_layers': 4, 'rms_norm_eps': 1e-06, 'top_k_experts': 4, 'vocab_size': 1000}}"},
    {'Q', 4, 16, 1, 48, 0, 1.0, 0.0,
     "{'hidden_act': 'silu', 'hidden_size': 64, 'layer_types': ['hybrid', 'hybrid', 'hybrid', 'hybrid'], "
     "'model_type': 'zaya', 'moe_intermediate_size': 48, 'num_experts': 16, 'num_experts_per_tok': 1, "
     "'num_hidden_layers': 4, 'output_router_logits': false, 'rms_norm_eps': 1e-05, 'router_hidden_size': 256, "
     "'vocab_size': 1000}"},
};
enum { SAVED_CONFIGS = sizeof saved_config / sizeof *saved_config };

#endif
