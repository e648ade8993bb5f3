/* The reader of config.json: published files give published values, and every wrong file is refused by name. */
#include "config.h"

#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static xp_model model; /* too large for a frame of a test among many */

/* ---- valid files to change ---- */

static const char qwen3[] = "{\"model_type\": \"qwen3_moe\", \"architectures\": [\"Qwen3MoeForCausalLM\"],"
                            " \"hidden_size\": 64, \"num_hidden_layers\": 6, \"num_experts\": 16,"
                            " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"intermediate_size\": 96,"
                            " \"decoder_sparse_step\": 1, \"mlp_only_layers\": [], \"norm_topk_prob\": true,"
                            " \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-06, \"router_aux_loss_coef\": 0.001,"
                            " \"vocab_size\": 1000, \"torch_dtype\": \"bfloat16\"}";
static const char qwen2[] = "{\"model_type\": \"qwen2_moe\","
                            " \"hidden_size\": 64, \"num_hidden_layers\": 6, \"num_experts\": 16,"
                            " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"intermediate_size\": 96,"
                            " \"shared_expert_intermediate_size\": 80, \"decoder_sparse_step\": 1,"
                            " \"norm_topk_prob\": false, \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-06,"
                            " \"router_aux_loss_coef\": 0.001, \"vocab_size\": 1000}";
static const char mixtral[] = "{\"model_type\": \"mixtral\", \"hidden_size\": 64, \"num_hidden_layers\": 6,"
                              " \"num_local_experts\": 8, \"num_experts_per_tok\": 2, \"intermediate_size\": 48,"
                              " \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-05, \"router_aux_loss_coef\": 0.02,"
                              " \"vocab_size\": 1000}";

/* The file with one key set to a JSON value, or removed when value is NULL. */
static xp_status parse_with(const char *base, const char *key, const char *value) {
    json_t *root = json_loads(base, 0, NULL);
    assert_non_null(root);
    if (value) {
        json_t *v = json_loads(value, JSON_DECODE_ANY, NULL);
        assert_non_null(v);
        assert_int_equal(json_object_set_new(root, key, v), 0);
    } else {
        assert_int_equal(json_object_del(root, key), 0);
    }
    char *text = json_dumps(root, 0);
    assert_non_null(text);
    const xp_status st = xp_config_parse(text, strlen(text), "dir/file.json", &model);
    free(text);
    json_decref(root);
    return st;
}

static void has(const char *part) {
    if (!strstr(xp_error_text(), part))
        fail_msg("expected '%s' in: %s", part, xp_error_text());
}

/* ---- values ---- */

static void valid_file_gives_its_values(void **state) {
    (void)state;
    assert_int_equal(xp_config_parse(qwen3, strlen(qwen3), "dir/file.json", &model), XP_OK);
    assert_string_equal(model.name, "file");
    assert_string_equal(model.model_type, "qwen3_moe");
    assert_string_equal(model.torch_dtype, "bfloat16");
    assert_int_equal(model.layers, 6);
    assert_int_equal(model.H, 64);
    assert_int_equal(model.F, 48);
    assert_int_equal(model.E, 16);
    assert_int_equal(model.K, 4);
    assert_int_equal(model.S, 0);
    assert_int_equal(model.dense_F, 96);
    assert_int_equal(model.vocab, 1000);
    assert_true(model.norm_eps == 1e-6);
    assert_true(model.dialect.aux_coef == 0.001);
    assert_string_equal(model.dialect.name, "hf-5.24/qwen3_moe");
    assert_int_equal(model.dialect.renorm, XP_RENORM_SUM);
    assert_string_equal(model.unread, "");
    assert_string_equal(model.assumed, "");
}

static void published_qwen3(void **state) {
    (void)state;
    assert_int_equal(xp_model_open("qwen3-30b-a3b", &model), XP_OK);
    assert_string_equal(model.name, "qwen3-30b-a3b");
    assert_int_equal(model.layers, 48);
    assert_int_equal(xp_model_moe_layers(&model), 48);
    assert_int_equal(model.H, 2048);
    assert_int_equal(model.F, 768);
    assert_int_equal(model.E, 128);
    assert_int_equal(model.K, 8);
    assert_int_equal(model.S, 0);
    assert_int_equal(model.dense_F, 6144);
    assert_int_equal(model.vocab, 151936);
    assert_true(model.norm_eps == 1e-6);
    assert_true(model.dialect.aux_coef == 0.001);
    assert_int_equal(model.dialect.renorm, XP_RENORM_SUM);
    assert_int_equal(model.dialect.weight_dtype, XP_WIDE_ACT);
    assert_int_equal(model.dialect.shared_gate, 0);
    double all, active;
    xp_model_moe_params(&model, &all, &active);
    /* 48 (128 * 3 * 2048 * 768 + 128 * 2048) and 48 (8 * 3 * 2048 * 768 + 128 * 2048) */
    assert_true(all == 29003612160.0);
    assert_true(active == 1824522240.0);
    assert_non_null(strstr(model.unread, "rope_theta\n"));
    assert_non_null(strstr(model.unread, "output_router_logits"));
    assert_null(strstr(model.unread, "num_experts"));
}

static void published_qwen2(void **state) {
    (void)state;
    assert_int_equal(xp_model_open("qwen1.5-moe-a2.7b", &model), XP_OK);
    assert_int_equal(model.layers, 24);
    assert_int_equal(xp_model_moe_layers(&model), 24);
    assert_int_equal(model.H, 2048);
    assert_int_equal(model.F, 1408);
    assert_int_equal(model.E, 60);
    assert_int_equal(model.K, 4);
    assert_int_equal(model.S, 5632);
    assert_int_equal(model.dense_F, 5632);
    assert_int_equal(model.vocab, 151936);
    assert_true(model.norm_eps == 1e-6);
    assert_int_equal(model.dialect.renorm, XP_RENORM_NONE);
    assert_int_equal(model.dialect.weight_dtype, XP_WIDE_ACT);
    assert_int_equal(model.dialect.shared_gate, 1);
    assert_non_null(strstr(model.assumed, "mlp_only_layers absent"));
}

static void published_mixtral(void **state) {
    (void)state;
    assert_int_equal(xp_model_open("mixtral-8x7b", &model), XP_OK);
    assert_int_equal(model.layers, 32);
    assert_int_equal(xp_model_moe_layers(&model), 32);
    assert_int_equal(model.H, 4096);
    assert_int_equal(model.F, 14336);
    assert_int_equal(model.E, 8);
    assert_int_equal(model.K, 2);
    assert_int_equal(model.S, 0);
    assert_int_equal(model.dense_F, 0);
    assert_int_equal(model.vocab, 32000);
    assert_true(model.norm_eps == 1e-5);
    assert_true(model.dialect.aux_coef == 0.02);
    assert_int_equal(model.dialect.renorm, XP_RENORM_SUM);
    assert_int_equal(model.dialect.weight_dtype, XP_WIDE_F32);
    assert_non_null(strstr(model.assumed, "router_jitter_noise absent"));
}

/* Billions of parameters of the whole models, counted by building each class without weights, as their names and cards
 * say them. Blocks with experts are most of a model and never more than it: a wrong width, count or layer rule shows.
 */
static xp_status count_name(const char *name, void *arg) {
    (void)name;
    ++*(int *)arg;
    return XP_OK;
}

static void published_files_have_their_sizes(void **state) {
    (void)state;
    static const struct {
        const char *name;
        int moe, E, K, S;
        double scale, billions;
    } file[] = {
        {"deepseek-v2", 59, 160, 6, 3072, 16, 235.7},
        {"deepseek-v2-lite", 26, 64, 6, 2816, 1, 15.7},
        {"deepseek-v3", 58, 256, 8, 2048, 2.5, 671},
        {"deepseek-v4-flash", 43, 256, 6, 2048, 1.5, 284},
        {"dots.llm1", 61, 128, 6, 2816, 2.5, 142.8},
        {"ernie-4.5-21b-a3b", 27, 64, 6, 3072, 1, 21.8},
        {"gemma-4-26b-a4b", 30, 128, 8, 2112, 1, 25.2},
        {"glm-4.5", 89, 160, 8, 1536, 2.5, 352.8},
        {"glm-4.5-air", 45, 128, 8, 1408, 1, 106.9},
        {"glm-4.7-flash", 46, 64, 4, 1536, 1.8, 29.9},
        {"gpt-oss-120b", 36, 128, 4, 0, 1, 116.8},
        {"gpt-oss-20b", 24, 32, 4, 0, 1, 20.9},
        {"granite-3.1-1b-a400m", 24, 32, 8, 0, 1, 1.33},
        {"dbrx-instruct", 40, 16, 4, 0, 1, 131.6},
        {"jamba-1.5-mini", 16, 16, 2, 0, 1, 51.6},
        {"k-exaone-236b-a23b", 47, 128, 8, 2048, 2.5, 236},
        {"kimi-k2-thinking", 60, 384, 8, 2048, 2.827, 1026},
        {"kimi-linear-48b-a3b", 26, 256, 8, 1024, 2.446, 49.1},
        {"lfm2-8b-a1b", 22, 32, 4, 0, 1, 8.34},
        {"llama-4-maverick", 24, 128, 1, 8192, 1, 400.7},
        {"llama-4-scout", 48, 16, 1, 8192, 1, 107.8},
        {"longcat-flash", 28, 512, 12, 0, 6, 561},
        {"minimax-m2", 62, 256, 8, 0, 1, 228.7},
        {"minimax-m3", 57, 128, 4, 3072, 2, 426},
        {"mixtral-8x22b", 56, 8, 2, 0, 1, 140.6},
        {"mixtral-8x7b", 32, 8, 2, 0, 1, 46.7},
        {"moonlight-16b-a3b", 26, 64, 6, 2816, 2.446, 15.96},
        {"nemotron-3-nano-30b-a3b", 23, 128, 6, 3712, 2.5, 31.6},
        {"olmoe-1b-7b", 16, 64, 8, 0, 1, 6.92},
        {"phi-3.5-moe", 32, 16, 2, 0, 1, 41.9},
        {"qwen1.5-moe-a2.7b", 24, 60, 4, 5632, 1, 14.3},
        {"qwen3-235b-a22b", 94, 128, 8, 0, 1, 235.1},
        {"qwen3-30b-a3b", 48, 128, 8, 0, 1, 30.5},
        {"qwen3-next-80b-a3b", 48, 512, 10, 512, 1, 79.7},
        {"qwen3.5-35b-a3b", 40, 256, 8, 512, 1, 34.7},
        {"trinity-mini", 30, 128, 8, 1024, 2.826, 26.1},
    };
    const int files = (int)(sizeof file / sizeof file[0]);
    for (int i = 0; i < files; i++) {
        if (xp_model_open(file[i].name, &model) != XP_OK)
            fail_msg("%s", xp_error_text());
        assert_int_equal(xp_model_moe_layers(&model), file[i].moe);
        assert_int_equal(model.E, file[i].E);
        assert_int_equal(model.K, file[i].K);
        assert_int_equal(model.S, file[i].S);
        assert_true(fabs(model.dialect.scale - file[i].scale) < 1e-12);
        double all, active;
        xp_model_moe_params(&model, &all, &active);
        if (!(all < 1e9 * file[i].billions && all > 0.86e9 * file[i].billions))
            fail_msg("%s: %.4g parameters in MoE blocks, %.4g in all", file[i].name, all, 1e9 * file[i].billions);
        assert_true(active > 0 && active < all);
    }
    int found = 0;
    assert_int_equal(xp_model_list(count_name, &found), XP_OK);
    assert_int_equal(found, files);
    assert_true(files >= 24);
}

static void norm_flag_chooses_the_dialect(void **state) {
    (void)state;
    assert_int_equal(parse_with(qwen3, "norm_topk_prob", "false"), XP_OK);
    assert_string_equal(model.dialect.name, "hf-5.24/qwen3_moe-raw");
    assert_int_equal(model.dialect.renorm, XP_RENORM_NONE);
    assert_int_equal(parse_with(qwen2, "norm_topk_prob", "true"), XP_OK);
    assert_string_equal(model.dialect.name, "hf-5.24/qwen2_moe-renorm");
    assert_int_equal(model.dialect.renorm, XP_RENORM_SUM);
    assert_int_equal(model.dialect.shared_gate, 1);
}

static void presets_are_found_by_name(void **state) {
    (void)state;
    int n = 0;
    for (const xp_dialect *d = xp_dialects; d->name; d++, n++) {
        assert_ptr_equal(xp_dialect_find(d->name), d);
        assert_true(d->meaning && *d->meaning && d->source && *d->source);
        assert_int_equal(xp_dialect_check(d, 48, d->score == XP_SCORE_SPARSEMIXER ? 2 : 4), XP_OK);
        for (const xp_dialect *o = xp_dialects; o != d; o++)
            assert_string_not_equal(o->name, d->name);
    }
    assert_true(n >= 35);
    assert_null(xp_dialect_find("hf-5.24/qwen3"));
    assert_null(xp_dialect_find(""));
}

/* ---- other families ---- */

static const char v3[] = "{\"model_type\": \"deepseek_v3\", \"hidden_size\": 64, \"num_hidden_layers\": 6,"
                         " \"n_routed_experts\": 16, \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48,"
                         " \"intermediate_size\": 96, \"n_shared_experts\": 2, \"n_group\": 4, \"topk_group\": 2,"
                         " \"routed_scaling_factor\": 2.5, \"norm_topk_prob\": true, \"first_k_dense_replace\": 3,"
                         " \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-06, \"vocab_size\": 1000,"
                         " \"moe_layer_freq\": 1, \"scoring_func\": \"sigmoid\"}";

static void deepseek_v3(void **state) {
    (void)state;
    assert_int_equal(xp_config_parse(v3, strlen(v3), "f.json", &model), XP_OK);
    assert_string_equal(model.dialect.name, "hf-5.24/deepseek_v3");
    assert_int_equal(model.S, 96);
    assert_int_equal(model.dialect.n_group, 4);
    assert_int_equal(model.dialect.topk_group, 2);
    assert_true(model.dialect.scale == 2.5 && model.dialect.renorm == XP_RENORM_SUM_PLUS_EPS);
    for (int i = 0; i < 6; i++)
        assert_int_equal(xp_model_is_moe(&model, i), i >= 3);
    assert_int_equal(parse_with(v3, "norm_topk_prob", "false"), XP_OK);
    assert_int_equal(model.dialect.renorm, XP_RENORM_NONE);
    assert_int_equal(parse_with(v3, "n_group", "3"), XP_E_FORMAT);
    has("n_group: 3, expected a divisor of the 16 experts");
    assert_int_equal(parse_with(v3, "topk_group", "5"), XP_E_FORMAT);
    has("topk_group: 5, expected 1 to n_group = 4");
    assert_int_equal(parse_with(v3, "n_group", "null"), XP_E_FORMAT);
    has("n_group is null, expected an integer");
    /* num_experts is no name of the class's: the reader does not guess. */
    assert_int_equal(parse_with(v3, "num_experts", "16"), XP_E_FORMAT);
    has("key 'num_experts' (16) speaks of experts");
    assert_int_equal(parse_with(v3, "n_shared_experts", NULL), XP_E_FORMAT);
    has("no field 'n_shared_experts'");
}

/* One key, two meanings: intermediate_size is an expert's width in mixtral, the dense layers' in qwen3_moe. */
static void one_name_two_meanings(void **state) {
    (void)state;
    assert_int_equal(parse_with(mixtral, "intermediate_size", "56"), XP_OK);
    assert_int_equal(model.F, 56);
    assert_int_equal(model.dense_F, 0);
    assert_int_equal(parse_with(qwen3, "intermediate_size", "56"), XP_OK);
    assert_int_equal(model.F, 48);
    assert_int_equal(model.dense_F, 56);
}

static void nested_fields(void **state) {
    (void)state;
    static const char inside[] =
        "{\"model_type\": \"qwen3_5_moe\", \"architectures\": [\"Qwen3_5MoeForConditionalGeneration\"],"
        " \"text_config\": {\"hidden_size\": 64, \"num_hidden_layers\": 2, \"num_experts\": 16,"
        " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"shared_expert_intermediate_size\": 40,"
        " \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-06, \"router_aux_loss_coef\": 0.001,"
        " \"vocab_size\": 1000, \"attn_output_gate\": true}, \"vision_config\": {\"hidden_size\": 7}}";
    assert_int_equal(xp_config_parse(inside, strlen(inside), "f.json", &model), XP_OK);
    assert_int_equal(model.H, 64);
    assert_int_equal(model.S, 40);
    assert_string_equal(model.dialect.name, "hf-5.24/qwen2_moe-renorm");
    assert_int_equal(parse_with(inside, "text_config", NULL), XP_E_FORMAT);
    has("no field 'text_config': a qwen3_5_moe has its fields inside it");
    assert_int_equal(parse_with(inside, "text_config", "[]"), XP_E_FORMAT);
    has("text_config is [], expected an object");
    assert_int_equal(parse_with(inside, "text_config", "{\"hidden_size\": 64, \"moe_gate\": 1}"), XP_E_FORMAT);
}

/* What lies beside the object that a family reads is looked at by the same rules. */
static void beside_nested_fields(void **state) {
    (void)state;
    static const char inside[] =
        "{\"model_type\": \"qwen3_5_moe\", \"torch_dtype\": \"bfloat16\", \"image_token_id\": 3,"
        " \"text_config\": {\"hidden_size\": 64, \"num_hidden_layers\": 2, \"num_experts\": 16,"
        " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"shared_expert_intermediate_size\": 40,"
        " \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-06, \"router_aux_loss_coef\": 0.001,"
        " \"vocab_size\": 1000, \"dtype\": \"bfloat16\"},"
        " \"vision_config\": {\"hidden_size\": 7, \"layer_scale\": 1}}";
    assert_int_equal(xp_config_parse(inside, strlen(inside), "f.json", &model), XP_OK);
    assert_non_null(strstr(model.unread, "image_token_id\nvision_config"));
    assert_int_equal(parse_with(inside, "num_experts", "7"), XP_E_FORMAT);
    has("key 'num_experts' (7) lies beside 'text_config', where a qwen3_5_moe reads it; there it is another value");
    assert_int_equal(parse_with(inside, "num_experts", "16"), XP_OK); /* said twice */
    assert_int_equal(parse_with(inside, "hidden_size", "32"), XP_E_FORMAT);
    has("key 'hidden_size' (32) lies beside 'text_config'");
    assert_int_equal(parse_with(inside, "norm_topk_prob", "true"), XP_E_FORMAT);
    has("key 'norm_topk_prob' (true) speaks of experts or routing");
    assert_int_equal(parse_with(inside, "extra", "{\"deep\": [{\"n_group\": 4}]}"), XP_E_FORMAT);
    has("key 'extra' holds 'n_group'");
    assert_int_equal(parse_with(inside, "", "1"), XP_E_FORMAT);
    has("a key has an empty name");
    static const char llama[] =
        "{\"model_type\": \"llama4\", \"text_config\": {\"hidden_size\": 64, \"num_hidden_layers\": 2,"
        " \"num_local_experts\": 16, \"num_experts_per_tok\": 1, \"intermediate_size\": 48,"
        " \"intermediate_size_mlp\": 96, \"interleave_moe_layer_step\": 1, \"hidden_act\": \"silu\","
        " \"rms_norm_eps\": 1e-05, \"vocab_size\": 1000, \"moe_layers\": [1]}}";
    assert_int_equal(xp_config_parse(llama, strlen(llama), "f.json", &model), XP_OK);
    assert_int_equal(parse_with(llama, "num_experts_per_tok", "2"), XP_E_FORMAT);
    has("key 'num_experts_per_tok' (2) lies beside 'text_config'");
    assert_int_equal(parse_with(llama, "moe_layers", "[0]"), XP_E_FORMAT);
    has("key 'moe_layers'");
}

/* ---- layers that differ ---- */

static const char v4[] =
    "{\"model_type\": \"deepseek_v4\", \"hidden_size\": 64, \"num_hidden_layers\": 5, \"n_routed_experts\": 16,"
    " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"routed_scaling_factor\": 1.25,"
    " \"swiglu_limit\": 6, \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-06, \"router_aux_loss_coef\": 0.002,"
    " \"vocab_size\": 1000}";

/* Whether layer i chooses by the table, one character a layer. */
static void hash_layers_are(const char *expected) {
    assert_int_equal(model.layers, strlen(expected));
    for (int i = 0; i < model.layers; i++) {
        const xp_dialect *d = xp_model_dialect(&model, i);
        const int hash = d->select_on == XP_ON_TOKEN_TABLE;
        assert_int_equal(hash, expected[i] == 'h');
        assert_string_equal(d->name, hash ? "hf-5.24/deepseek_v4-hash" : "hf-5.24/deepseek_v4");
        assert_int_equal(d->select_bias, !hash);
        assert_true(d->scale == 1.25 && d->limit == 6 && d->aux_coef == 0.002 && d->shared_limit == 1);
    }
}

static void layers_that_choose_by_a_table(void **state) {
    (void)state;
    assert_int_equal(xp_config_parse(v4, strlen(v4), "f.json", &model), XP_OK);
    hash_layers_are("hhhtt"); /* the class's default */
    assert_non_null(strstr(model.assumed, "num_hash_layers absent, taken as 3"));
    assert_string_equal(model.dialect.name, "hf-5.24/deepseek_v4-hash"); /* that of the most blocks */
    assert_int_equal(model.others, 1);
    assert_int_equal(parse_with(v4, "num_hash_layers", "1"), XP_OK);
    hash_layers_are("htttt");
    assert_string_equal(model.dialect.name, "hf-5.24/deepseek_v4");
    char layers[16];
    xp_model_record_layers(&model, 0, layers, sizeof layers);
    assert_string_equal(layers, "1-4");
    xp_model_record_layers(&model, 1, layers, sizeof layers);
    assert_string_equal(layers, "0");
    assert_int_equal(parse_with(v4, "num_hash_layers", "0"), XP_OK);
    hash_layers_are("ttttt");
    assert_int_equal(model.others, 0);
    assert_int_equal(parse_with(v4, "num_hash_layers", "9"), XP_OK);
    hash_layers_are("hhhhh");
    assert_int_equal(parse_with(v4, "num_hash_layers", "-1"), XP_E_FORMAT);
    has("num_hash_layers is -1, expected an integer from 0");
    assert_int_equal(parse_with(v4, "mlp_layer_types", "[\"moe\", \"hash_moe\", \"moe\", \"hash_moe\", \"hash_moe\"]"),
                     XP_OK);
    hash_layers_are("ththh");
    xp_model_record_layers(&model, 0, layers, sizeof layers);
    assert_string_equal(layers, "1,3-4");
    xp_model_record_layers(&model, 0, layers, 6);
    assert_string_equal(layers, "1...");
    assert_int_equal(xp_model_override(&model, 1, 0, 0), XP_OK); /* the one layer that is left has the only record */
    assert_string_equal(model.dialect.name, "hf-5.24/deepseek_v4");
    assert_int_equal(model.others, 0);
    assert_int_equal(xp_model_open("deepseek-v4-flash", &model), XP_OK);
    for (int i = 0; i < 43; i++)
        assert_int_equal(xp_model_dialect(&model, i)->select_on == XP_ON_TOKEN_TABLE, i < 3);
}

static void two_ways_to_say_hash(void **state) {
    (void)state;
    json_t *root = json_loads(v4, 0, NULL);
    json_object_set_new(root, "num_hash_layers", json_integer(2));
    json_object_set_new(root, "mlp_layer_types", json_pack("[sssss]", "hash_moe", "moe", "moe", "moe", "moe"));
    char *text = json_dumps(root, 0);
    assert_int_equal(xp_config_parse(text, strlen(text), "f.json", &model), XP_E_FORMAT);
    has("num_hash_layers 2 and mlp_layer_types[1] \"moe\" contradict one another");
    free(text);
    json_decref(root);
}

static const char step3[] =
    "{\"model_type\": \"step3p7\", \"text_config\": {\"model_type\": \"step3p5\", \"hidden_size\": 64,"
    " \"num_hidden_layers\": 6, \"n_routed_experts\": 16, \"num_experts_per_tok\": 4,"
    " \"moe_intermediate_size\": 48, \"intermediate_size\": 96, \"share_expert_dim\": 40,"
    " \"rms_norm_eps\": 1e-05, \"vocab_size\": 1000, \"num_nextn_predict_layers\": 1%s}}";

static xp_status parse_step3(const char *more) {
    char text[1600];
    assert_true((size_t)snprintf(text, sizeof text, step3, more) < sizeof text);
    return xp_config_parse(text, strlen(text), "f.json", &model);
}

static void limits_of_layer(int layer, double limit, double shared) {
    const xp_dialect *d = xp_model_dialect(&model, layer);
    assert_true(d->limit == limit);
    assert_true(xp_dialect_shared_limit(d) == shared);
}

static void limits_a_layer(void **state) {
    (void)state;
    assert_int_equal(parse_step3(""), XP_OK);
    assert_int_equal(xp_model_moe_layers(&model), 3); /* 3 to 5 */
    assert_int_equal(model.S, 40);
    assert_true(model.dialect.scale == 1.0 && model.dialect.aux_coef == 0);
    assert_int_equal(model.others, 0);
    limits_of_layer(4, 0, 0);
    /* One entry more than layers, of the layer that predicts further tokens; 0 and null alike. */
    assert_int_equal(parse_step3(", \"moe_layers_enum\": \"2,3,4,5\", \"moe_router_scaling_factor\": 3.0,"
                                 " \"swiglu_limits\": [9, 9, 0.0, 7, 7.0, null, 8],"
                                 " \"swiglu_limits_shared\": [9, 9, 0.0, 0, 7, 16.0]"),
                     XP_OK);
    assert_int_equal(xp_model_moe_layers(&model), 4);
    assert_true(model.dialect.scale == 3.0);
    limits_of_layer(2, 0, 0);
    limits_of_layer(3, 7, 0);
    limits_of_layer(4, 7, 7);
    limits_of_layer(5, 0, 16);
    assert_int_equal(model.others, 3);
    assert_int_equal(parse_step3(", \"moe_layers_enum\": [1, 2]"), XP_OK);
    assert_int_equal(xp_model_is_moe(&model, 3), 0);
    assert_int_equal(xp_model_is_moe(&model, 1), 1);
    assert_int_equal(parse_step3(", \"moe_layers_enum\": \"1,6\""), XP_E_FORMAT);
    has("moe_layers_enum is \"1,6\", expected layer numbers from 0 to 5 with commas between them");
    assert_int_equal(parse_step3(", \"moe_layers_enum\": \"1, 2\""), XP_E_FORMAT);
    assert_int_equal(parse_step3(", \"moe_layers_enum\": \"\""), XP_E_FORMAT);
    assert_int_equal(parse_step3(", \"mlp_layer_types\": [\"dense\", \"sparse\", \"dense\", \"dense\", \"dense\","
                                 " \"dense\", \"sparse\"]"),
                     XP_OK);
    assert_int_equal(xp_model_moe_layers(&model), 1);
    assert_int_equal(parse_step3(", \"swiglu_limits\": [1, 2]"), XP_E_FORMAT);
    has("swiglu_limits has 2 numbers, expected one for each of the 6 layers");
    assert_int_equal(parse_step3(", \"swiglu_limits\": [1, 2, 3, 4, -5, 6]"), XP_E_FORMAT);
    has("swiglu_limits[4] is -5, expected null or a number from 0 to");
    assert_int_equal(parse_step3(", \"swiglu_limits\": [1, 2, 3, 4, \"5\", 6]"), XP_E_FORMAT);
    has("swiglu_limits[4] is \"5\"");
    assert_int_equal(parse_step3(", \"swiglu_limits\": 7"), XP_E_FORMAT);
    has("swiglu_limits is 7, expected a list of numbers");
    assert_int_equal(parse_step3(", \"num_experts\": 16"), XP_E_FORMAT); /* no alias here */
    has("num_experts");
    assert_int_equal(parse_step3(", \"moe_num_experts\": 16, \"moe_top_k\": 4"), XP_OK);
    /* Another family's list may not be a text. */
    assert_int_equal(parse_with("{\"model_type\": \"llama4_text\", \"hidden_size\": 64, \"num_hidden_layers\": 2,"
                                " \"num_local_experts\": 16, \"num_experts_per_tok\": 1, \"intermediate_size\": 48,"
                                " \"intermediate_size_mlp\": 96, \"interleave_moe_layer_step\": 1,"
                                " \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-05, \"vocab_size\": 1000}",
                                "moe_layers", "\"1\""),
                     XP_E_FORMAT);
    has("moe_layers is \"1\", expected a list of layer numbers");
}

static void latent_width(void **state) {
    (void)state;
    assert_int_equal(xp_model_open("nemotron-3-nano-30b-a3b", &model), XP_OK);
    assert_int_equal(model.latent, 0);
    assert_int_equal(xp_model_expert_width(&model), model.H);
    static const char own[] = "{\"model_type\": \"nemotron_h\", \"hidden_size\": 64, \"n_routed_experts\": 12,"
                              " \"num_hidden_layers\": 2, \"num_experts_per_tok\": 3, \"moe_intermediate_size\": 48,"
                              " \"intermediate_size\": 96, \"moe_shared_expert_intermediate_size\": 40,"
                              " \"mlp_hidden_act\": \"relu2\", \"layer_norm_epsilon\": 1e-05, \"n_group\": 1,"
                              " \"topk_group\": 1, \"routed_scaling_factor\": 2.5, \"norm_topk_prob\": true,"
                              " \"layers_block_type\": [\"mamba\", \"moe\"], \"vocab_size\": 1000}";
    assert_int_equal(parse_with(own, "moe_latent_size", "20"), XP_OK);
    assert_int_equal(model.latent, 20);
    assert_int_equal(parse_with(own, "moe_latent_size", "null"), XP_OK);
    assert_int_equal(model.latent, 0);
    assert_int_equal(parse_with(own, "moe_latent_size", "0"), XP_E_FORMAT);
    has("moe_latent_size is 0, expected an integer from 1");
    assert_int_equal(parse_with(mixtral, "moe_latent_size", "20"), XP_E_FORMAT); /* means nothing there */
}

static void records_are_few_and_alike(void **state) {
    (void)state;
    xp_dialect d = *xp_dialect_find("hf-5.24/step3p7");
    assert_int_equal(xp_model_of("n", &d, 10, 8, 8, 8, 2, 0, &model), XP_OK);
    for (int i = 0; i < 10; i++) {
        d.limit = 7 + i;
        assert_int_equal(xp_model_set_dialect(&model, i, &d), i < XP_MAX_RECORDS ? XP_OK : XP_E_ARG);
    }
    has("layer 9 of n: its dialect record would be the 9th, expected at most 8");
    d = model.dialect;
    assert_int_equal(xp_model_set_dialect(&model, 3, &d), XP_OK); /* found, not added */
    assert_int_equal(model.record[3], 0);
    d.router_bias = 1;
    assert_int_equal(xp_model_set_dialect(&model, 3, &d), XP_E_ARG);
    has("router_bias: on in layer 3 of n, expected off as in its other MoE blocks");
    assert_ptr_equal(xp_model_dialect(&model, 5), &model.other[4]);
    assert_ptr_equal(xp_model_dialect(&model, 99), &model.dialect);
}

/* A word a layer, and what chooses a preset by a word. */
static void words_choose(void **state) {
    (void)state;
    static const char v2[] =
        "{\"model_type\": \"deepseek_v2\", \"hidden_size\": 64, \"num_hidden_layers\": 3, \"n_routed_experts\": 16,"
        " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"intermediate_size\": 96,"
        " \"n_shared_experts\": 2, \"n_group\": null, \"topk_group\": null, \"topk_method\": \"greedy\","
        " \"routed_scaling_factor\": 16, \"first_k_dense_replace\": 1, \"hidden_act\": \"silu\","
        " \"rms_norm_eps\": 1e-06, \"vocab_size\": 1000, \"norm_topk_prob\": true}";
    static const char v2_groups[] =
        "{\"model_type\": \"deepseek_v2\", \"hidden_size\": 64, \"num_hidden_layers\": 3, \"n_routed_experts\": 16,"
        " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"intermediate_size\": 96,"
        " \"n_shared_experts\": 2, \"topk_group\": 2, \"topk_method\": \"group_limited_greedy\","
        " \"routed_scaling_factor\": 16, \"first_k_dense_replace\": 1, \"hidden_act\": \"silu\","
        " \"rms_norm_eps\": 1e-06, \"vocab_size\": 1000}";
    assert_int_equal(xp_config_parse(v2, strlen(v2), "f.json", &model), XP_OK);
    assert_string_equal(model.dialect.name, "hf-5.24/deepseek_v2");
    /* norm_topk_prob is read by nobody in this family, whatever it says. */
    assert_int_equal(model.dialect.renorm, XP_RENORM_NONE);
    assert_true(model.dialect.scale == 16.0);
    assert_int_equal(parse_with(v2, "topk_method", "\"noaux_tc\""), XP_E_FORMAT);
    has("topk_method is \"noaux_tc\", expected one of greedy|group_limited_greedy");
    assert_int_equal(parse_with(v2, "topk_method", "\"group_limited_greedy\""), XP_E_FORMAT);
    has("no field 'n_group': topk_method is \"group_limited_greedy\", which needs it");
    assert_int_equal(parse_with(v2, "n_group", "4"), XP_E_FORMAT);
    has("n_group is given and 'topk_group' is not: a deepseek_v2 has groups by both or by neither");
    assert_int_equal(parse_with(v2_groups, "n_group", "4"), XP_OK);
    assert_string_equal(model.dialect.name, "hf-5.24/deepseek_v2-groups");
    assert_int_equal(model.dialect.n_group, 4);
    assert_int_equal(model.dialect.masked_weight, 1);
    assert_int_equal(parse_with(v3, "model_type", "\"exaone_moe\""), XP_E_FORMAT);
    static const char lite[] = "{\"model_type\": \"glm4_moe_lite\", \"hidden_size\": 64, \"num_hidden_layers\": 3,"
                               " \"n_routed_experts\": 16, \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48,"
                               " \"intermediate_size\": 96, \"n_shared_experts\": 1, \"n_group\": 1, \"topk_group\": 1,"
                               " \"routed_scaling_factor\": 1.8, \"norm_topk_prob\": true, \"hidden_act\": \"silu\","
                               " \"rms_norm_eps\": 1e-06, \"vocab_size\": 1000, \"first_k_dense_replace\": 3}";
    assert_int_equal(xp_config_parse(lite, strlen(lite), "f.json", &model), XP_OK);
    assert_int_equal(xp_model_moe_layers(&model), 2); /* first_k_dense_replace is unread here */
    assert_int_equal(parse_with(lite, "mlp_layer_types", "[\"sparse\", \"dense\", \"sparse\"]"), XP_OK);
    assert_int_equal(xp_model_is_moe(&model, 0), 1);
    assert_int_equal(xp_model_is_moe(&model, 1), 0);
    assert_int_equal(parse_with(lite, "mlp_layer_types", "[\"sparse\", \"dense\"]"), XP_E_FORMAT);
    has("mlp_layer_types has 2 words, expected one for each of the 3 layers");
    assert_int_equal(parse_with(lite, "mlp_layer_types", "[\"sparse\", \"dense\", 3]"), XP_E_FORMAT);
    has("mlp_layer_types[2] is 3, expected a word");
    assert_int_equal(parse_with(lite, "mlp_layer_types", "[\"sparse\", \"dense\", 1]"), XP_E_FORMAT);
    has("mlp_layer_types[2] is 1, expected a word");
    assert_int_equal(parse_with(lite, "mlp_layer_types", "\"sds\""), XP_E_FORMAT);
    has("mlp_layer_types is \"sds\", expected a list of words");
}

/* Published files of two families tell a layer's kind in an older way: a letter a layer, a list of 0 and 1. */
/* A family without a row of its own names its dialect, and gets that record as it is. */
static void any_dialect(void **state) {
    static const char own[] = "{\"model_type\": \"expar\", \"dialect\": \"hf-5.24/flint\", \"hidden_size\": 64,"
                              " \"num_hidden_layers\": 6, \"num_experts\": 12, \"num_experts_per_tok\": 3,"
                              " \"moe_intermediate_size\": 48, \"rms_norm_eps\": 1e-06, \"vocab_size\": 1000}";
    (void)state;
    for (const xp_dialect *d = xp_dialects; d->name; d++) {
        char name[96];
        if (d->score == XP_SCORE_SPARSEMIXER || d->n_group > 1 || d->shared_rows > 0)
            continue; /* of another k, another E, or a shared width */
        if (d->router_in != XP_ROUTER_X)
            continue; /* wants one field more */
        snprintf(name, sizeof name, "\"%s\"", d->name);
        assert_int_equal(parse_with(own, "dialect", name), XP_OK);
        assert_memory_equal(&model.dialect, d, sizeof *d);
        assert_true(model.E == 12 && model.K == 3 && model.F == 48 && model.S == 0 && xp_model_moe_layers(&model) == 6);
    }
    assert_int_equal(parse_with(own, "dialect", "\"hf-5.24/inkling\""), XP_E_FORMAT);
    has("the shared width is 0, expected a multiple of the 2 experts that hf-5.24/inkling weighs");
    assert_int_equal(parse_with(own, "first_k_dense_replace", "2"), XP_OK);
    assert_int_equal(xp_model_moe_layers(&model), 4);
    assert_int_equal(parse_with(own, "dialect", "\"hf-5.24/zaya\""), XP_E_FORMAT);
    has("file.json: router's width R: 0, expected 1 to ");
    assert_int_equal(parse_with(own, "router_hidden_size", "40"), XP_E_FORMAT);
    has("file.json: router's width R: 40, expected none where router_in is not recurrent_mlp");
    static const char mlp[] = "{\"model_type\": \"expar\", \"dialect\": \"hf-5.24/zaya\", \"hidden_size\": 64,"
                              " \"num_hidden_layers\": 6, \"num_experts\": 12, \"num_experts_per_tok\": 1,"
                              " \"moe_intermediate_size\": 48, \"rms_norm_eps\": 1e-06, \"vocab_size\": 1000}";
    assert_int_equal(parse_with(mlp, "router_hidden_size", "40"), XP_OK);
    assert_int_equal(model.router_width, 40);
    assert_int_equal(parse_with(own, "shared_expert_intermediate_size", "40"), XP_OK);
    assert_int_equal(model.S, 40);
    assert_int_equal(parse_with(own, "dialect", "\"hf-5.24/flynt\""), XP_E_FORMAT);
    has("dialect is \"hf-5.24/flynt\", expected a name of `expar list dialects`");
    assert_int_equal(parse_with(own, "dialect", NULL), XP_E_FORMAT);
    has("'dialect'");
    assert_int_equal(parse_with(own, "norm_topk_prob", "true"), XP_E_FORMAT);
    has("norm_topk_prob");
}

static void letters_and_numbers_a_layer(void **state) {
    (void)state;
    static const char nemotron[] =
        "{\"model_type\": \"nemotron_h\", \"hidden_size\": 64, \"num_hidden_layers\": 4, \"n_routed_experts\": 16,"
        " \"num_experts_per_tok\": 4, \"moe_intermediate_size\": 48, \"intermediate_size\": 96, \"n_group\": 1,"
        " \"topk_group\": 1, \"moe_shared_expert_intermediate_size\": 80, \"routed_scaling_factor\": 2.5,"
        " \"norm_topk_prob\": true, \"mlp_hidden_act\": \"relu2\", \"layer_norm_epsilon\": 1e-05,"
        " \"vocab_size\": 1000, \"hybrid_override_pattern\": \"ME*E\"}";
    assert_int_equal(xp_config_parse(nemotron, strlen(nemotron), "f.json", &model), XP_OK);
    for (int i = 0; i < 4; i++)
        assert_int_equal(xp_model_is_moe(&model, i), i % 2);
    assert_int_equal(parse_with(nemotron, "hybrid_override_pattern", "\"ME*\""), XP_E_FORMAT);
    has("hybrid_override_pattern has 3 letters, expected one for each of the 4 layers");
    assert_int_equal(parse_with(nemotron, "hybrid_override_pattern", "\"M*M*\""), XP_E_FORMAT);
    has("none of the 4 layers is a MoE block");
    assert_int_equal(parse_with(nemotron, "hybrid_override_pattern", NULL), XP_E_FORMAT);
    has("names tried: layers_block_type, hybrid_override_pattern");
    /* The class looks at the pattern only when there are no words. */
    assert_int_equal(parse_with(nemotron, "layers_block_type", "[\"moe\", \"mamba\", \"mlp\", \"mamba\"]"), XP_OK);
    for (int i = 0; i < 4; i++)
        assert_int_equal(xp_model_is_moe(&model, i), i == 0);
    assert_int_equal(parse_with(nemotron, "layers_block_type", "null"), XP_OK);
    assert_int_equal(xp_model_is_moe(&model, 3), 1);

    static const char m3[] =
        "{\"model_type\": \"minimax_m3_vl\", \"text_config\": {\"hidden_size\": 64, \"num_hidden_layers\": 3,"
        " \"num_local_experts\": 16, \"num_experts_per_tok\": 4, \"intermediate_size\": 48,"
        " \"dense_intermediate_size\": 96, \"shared_intermediate_size\": 40, \"hidden_act\": \"%s\","
        " \"rms_norm_eps\": 1e-06, \"routed_scaling_factor\": 2.0, \"swiglu_alpha\": 1.702, \"swiglu_limit\": 7.0,"
        " \"vocab_size\": 1000, \"moe_layer_freq\": %s, \"sparse_attention_config\": {\"sparse_topk_blocks\": 16}}}";
    static const struct {
        const char *act, *layers, *want;
    } file[] = {
        {"swigluoai", "[0, 1, 1]", NULL},
        {"silu", "[0, 1, 1]", NULL},
        {"gelu", "[0, 1, 1]", "hidden_act is \"gelu\", expected one of swigluoai|silu"},
        {"silu", "[0, 1, 2]", "moe_layer_freq[2] is 2, expected a word, 0 or 1"},
        {"silu", "[0, 1]", "moe_layer_freq has 2 words, expected one for each of the 3 layers"},
        {"silu", "\"011\"", "moe_layer_freq is \"011\", expected a list of words"},
        {"silu", "1", "moe_layer_freq is 1, expected a list of words"},
    };
    for (size_t i = 0; i < sizeof file / sizeof file[0]; i++) {
        char text[1024];
        snprintf(text, sizeof text, m3, file[i].act, file[i].layers);
        assert_int_equal(xp_config_parse(text, strlen(text), "f.json", &model), file[i].want ? XP_E_FORMAT : XP_OK);
        if (file[i].want)
            has(file[i].want);
        else
            assert_int_equal(xp_model_moe_layers(&model), 2);
    }
}

/* Layer i is a MoE block when (i + 1) % step == 0 and it is not listed. */
static void layer_rule(void **state) {
    (void)state;
    static const int want2[6] = {0, 1, 0, 1, 0, 1}, want3[6] = {0, 0, 1, 0, 0, 1}, listed[6] = {0, 1, 1, 0, 1, 1};
    assert_int_equal(parse_with(qwen3, "decoder_sparse_step", "2"), XP_OK);
    for (int i = 0; i < 6; i++)
        assert_int_equal(xp_model_is_moe(&model, i), want2[i]);
    assert_int_equal(parse_with(qwen3, "decoder_sparse_step", "3"), XP_OK);
    for (int i = 0; i < 6; i++)
        assert_int_equal(xp_model_is_moe(&model, i), want3[i]);
    assert_int_equal(parse_with(qwen3, "mlp_only_layers", "[3, 0]"), XP_OK);
    for (int i = 0; i < 6; i++)
        assert_int_equal(xp_model_is_moe(&model, i), listed[i]);
    assert_int_equal(xp_model_moe_layers(&model), 4);
    assert_int_equal(xp_model_is_moe(&model, -1), 0);
    assert_int_equal(xp_model_is_moe(&model, 6), 0);
    assert_int_equal(parse_with(qwen3, "mlp_only_layers", "null"), XP_OK);
    assert_non_null(strstr(model.assumed, "mlp_only_layers"));
}

static void aliases(void **state) {
    (void)state;
    assert_int_equal(parse_with(qwen3, "num_local_experts", "16"), XP_OK); /* both, equal */
    assert_int_equal(model.E, 16);
    assert_int_equal(parse_with(qwen3, "num_local_experts", "8"), XP_E_FORMAT);
    has("dir/file.json: num_experts 16 and num_local_experts 8 contradict");
    assert_int_equal(parse_with(mixtral, "num_experts", "9"), XP_E_FORMAT);
    has("num_local_experts 8 and num_experts 9 contradict");
    assert_int_equal(parse_with(qwen2, "num_local_experts", "16"), XP_E_FORMAT); /* no alias in this family */
    has("key 'num_local_experts' (16) speaks of experts or routing and a qwen2_moe has no such field");
    assert_int_equal(parse_with(qwen2, "dtype", "\"float32\""), XP_OK);
    assert_string_equal(model.torch_dtype, "float32");
}

/* ---- wrong files ---- */

static void required_fields_have_no_default(void **state) {
    (void)state;
    static const struct {
        const char *base, *keys[16];
    } family[] = {
        {qwen3,
         {"hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
          "intermediate_size", "decoder_sparse_step", "norm_topk_prob", "hidden_act", "rms_norm_eps",
          "router_aux_loss_coef", "vocab_size"}},
        {qwen2,
         {"hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
          "intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step", "norm_topk_prob", "hidden_act",
          "rms_norm_eps", "router_aux_loss_coef", "vocab_size"}},
        {mixtral,
         {"hidden_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "intermediate_size",
          "hidden_act", "rms_norm_eps", "router_aux_loss_coef", "vocab_size"}},
    };
    for (size_t f = 0; f < sizeof family / sizeof family[0]; f++) {
        for (int k = 0; family[f].keys[k]; k++) {
            char want[96];
            assert_int_equal(parse_with(family[f].base, family[f].keys[k], NULL), XP_E_FORMAT);
            snprintf(want, sizeof want, "dir/file.json: no field '%s'", family[f].keys[k]);
            has(want);
            has("names tried: ");
            assert_int_equal(parse_with(family[f].base, family[f].keys[k], "null"), XP_E_FORMAT);
            snprintf(want, sizeof want, "dir/file.json: %s is null, expected", family[f].keys[k]);
            has(want);
        }
    }
    assert_int_equal(parse_with(qwen3, "num_experts", NULL), XP_E_FORMAT);
    has("names tried: num_experts, num_local_experts");
    assert_int_equal(parse_with(qwen3, "model_type", NULL), XP_E_FORMAT);
    has("no field 'model_type'; expected one of qwen3_moe, qwen2_moe, mixtral");
}

static void integers(void **state) {
    (void)state;
    static const char *const key[] = {"hidden_size",         "num_hidden_layers",     "num_experts",
                                      "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
                                      "vocab_size"};
    static const char *const value[] = {"\"8\"", "8.0", "0.5", "-1", "0", "true", "[8]", "{}", "9223372036854775807",
                                        "1e3"};
    static const char *const shown[] = {"\"8\"", "8.0", "0.5", "-1", "0", "true", "[8]", "{}", "9223372036854775807",
                                        "1000.0"};
    for (size_t k = 0; k < sizeof key / sizeof key[0]; k++) {
        for (size_t v = 0; v < sizeof value / sizeof value[0]; v++) {
            char want[96];
            assert_int_equal(parse_with(qwen3, key[k], value[v]), XP_E_FORMAT);
            snprintf(want, sizeof want, "dir/file.json: %s is %s, expected an integer from 1 to", key[k], shown[v]);
            has(want);
        }
    }
}

typedef struct {
    const char *base, *key, *value, *want;
} wrong_value;

static void values(void **state) {
    (void)state;
    static const wrong_value bad[] = {
        {qwen3, "model_type", "\"qwen3\"", "model_type is \"qwen3\", expected one of qwen3_moe, qwen2_moe, mixtral"},
        {qwen3, "model_type", "7", "model_type is 7, expected one of"},
        {qwen3, "model_type", "\"mixtral\"", "architectures is [\"Qwen3MoeForCausalLM\"] and model_type \"mixtral\""},
        {qwen3, "architectures", "\"Qwen3MoeForCausalLM\"",
         "architectures is \"Qwen3MoeForCausalLM\", expected a list"},
        {qwen3, "architectures", "[\"Qwen2MoeForCausalLM\"]", "expected names that begin with Qwen3Moe"},
        {qwen3, "architectures", "[3]", "architectures is [3]"},
        {qwen3, "num_experts_per_tok", "17", "num_experts_per_tok is 17, more than num_experts 16: k > E"},
        {mixtral, "num_experts_per_tok", "9", "num_experts_per_tok is 9, more than num_local_experts 8: k > E"},
        {qwen3, "num_experts", "65537", "num_experts is 65537, expected an integer from 1 to 65536"},
        {qwen3, "num_hidden_layers", "1025", "num_hidden_layers is 1025, expected an integer from 1 to 1024"},
        {qwen3, "hidden_size", "1048577", "hidden_size is 1048577, expected an integer from 1 to 1048576"},
        {qwen3, "norm_topk_prob", "1", "norm_topk_prob is 1, expected true or false"},
        {qwen3, "norm_topk_prob", "\"true\"", "norm_topk_prob is \"true\", expected true or false"},
        {qwen3, "hidden_act", "\"gelu\"", "hidden_act is \"gelu\", expected \"silu\""},
        {qwen3, "hidden_act", "true", "hidden_act is true, expected \"silu\""},
        {qwen3, "torch_dtype", "16", "torch_dtype is 16, expected a text"},
        {qwen3, "torch_dtype", "\"\\u001b[2J\"", "torch_dtype is \"\\u001B[2J\", expected a text"},
        {qwen3, "rms_norm_eps", "0", "rms_norm_eps is 0, expected a number from 1e-30 to 1"},
        {qwen3, "rms_norm_eps", "-1e-6", "rms_norm_eps is -1e-6, expected a number"},
        {qwen3, "rms_norm_eps", "\"1e-6\"", "rms_norm_eps is \"1e-6\", expected a number"},
        {qwen3, "rms_norm_eps", "2", "rms_norm_eps is 2, expected a number"},
        {qwen3, "router_aux_loss_coef", "-0.5", "router_aux_loss_coef is -0.5, expected a number from 0 to 1000000"},
        {qwen3, "router_aux_loss_coef", "false", "router_aux_loss_coef is false, expected a number"},
        {qwen3, "mlp_only_layers", "[6]", "mlp_only_layers[0] is 6, expected a layer number from 0 to 5"},
        {qwen3, "mlp_only_layers", "[0, -1]", "mlp_only_layers[1] is -1"},
        {qwen3, "mlp_only_layers", "[1.0]", "mlp_only_layers[0] is 1.0"},
        {qwen3, "mlp_only_layers", "[\"1\"]", "mlp_only_layers[0] is \"1\""},
        {qwen3, "mlp_only_layers", "3", "mlp_only_layers is 3, expected a list of layer numbers"},
        {qwen3, "mlp_only_layers", "[0,1,2,3,4,5]", "mlp_only_layers leaves none of the 6 layers a MoE block"},
        {qwen3, "decoder_sparse_step", "7", "decoder_sparse_step is 7 with 6 layers: no layer is a MoE block"},
        {mixtral, "router_jitter_noise", "0.01", "router_jitter_noise is 0.01, expected 0, anything else is not built"},
        {mixtral, "hidden_size", "\"64\"", "hidden_size is \"64\", expected an integer"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(parse_with(bad[i].base, bad[i].key, bad[i].value), XP_E_FORMAT);
        has("dir/file.json: ");
        has(bad[i].want);
        assert_int_equal(model.layers, 0); /* nothing half read is left behind */
    }
}

static void keys_that_nobody_reads(void **state) {
    (void)state;
    static const wrong_value bad[] = {
        {qwen3, "shared_expert_intermediate_size", "80", "key 'shared_expert_intermediate_size' (80)"},
        {qwen3, "n_group", "4", "key 'n_group' (4) speaks of experts or routing and a qwen3_moe has no such field"},
        {qwen3, "topk_method", "\"greedy\"", "key 'topk_method' (\"greedy\")"},
        {qwen3, "top_k", "2", "key 'top_k'"},
        {qwen3, "routed_scaling_factor", "2.5", "key 'routed_scaling_factor'"},
        {qwen3, "expert_capacity", "64", "key 'expert_capacity'"},
        {qwen3, "capacity_factor", "1.25", "key 'capacity_factor'"},
        {qwen3, "gate_bias", "true", "key 'gate_bias'"},
        {qwen3, "moe_layer_freq", "1", "key 'moe_layer_freq'"},
        {qwen3, "numExperts", "16", "key 'numExperts'"},
        {qwen3, "TopK", "2", "key 'TopK'"},
        {qwen3, "router_jitter_noise", "0", "key 'router_jitter_noise'"},
        {qwen3, "text_config", "{\"a\": [{\"num_experts\": 8}]}", "key 'text_config' holds 'num_experts'"},
        {mixtral, "norm_topk_prob", "true", "key 'norm_topk_prob' (true) speaks of experts or routing and a mixtral"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(parse_with(bad[i].base, bad[i].key, bad[i].value), XP_E_FORMAT);
        has(bad[i].want);
    }
    assert_int_equal(parse_with(qwen3, "a\nb", "1"), XP_E_FORMAT);
    has("control characters in it: 'a\\x0ab'");
    assert_int_equal(parse_with(qwen3, "", "1"), XP_E_FORMAT);
    has("an empty name");
    /* A name deep inside is quoted without the bytes that would steer a terminal. */
    assert_int_equal(parse_with(qwen3, "extra", "[{\"expert\\u001b[2J\\u00e9\": 1}]"), XP_E_FORMAT);
    has("key 'extra' holds 'expert\\x1b[2J\\xc3\\xa9'");
    assert_int_equal(parse_with(qwen3, "rope_scaling", "{\"factor\": 4.0, \"scaling\": 1}"), XP_OK);
    assert_string_equal(model.unread, "rope_scaling");
    assert_int_equal(parse_with(qwen3, "quantization_config", "{\"group_size\": 128}"), XP_OK);
    assert_int_equal(parse_with(qwen3, "use_cache", "true"), XP_OK);
    assert_string_equal(model.unread, "use_cache");
}

static void too_many_unread_keys_are_not_cut(void **state) {
    (void)state;
    json_t *root = json_loads(qwen3, 0, NULL);
    for (int i = 0; i < 200; i++) {
        char key[64];
        snprintf(key, sizeof key, "a_key_that_nobody_reads_number_%d", i);
        json_object_set_new(root, key, json_true());
    }
    char *text = json_dumps(root, 0);
    assert_int_equal(xp_config_parse(text, strlen(text), "f", &model), XP_E_FORMAT);
    has("exceed 4096 bytes");
    free(text);
    json_decref(root);
}

static void words(void **state) {
    (void)state;
    static const char *const yes[] = {"num_experts", "moe_k", "Router_x",     "gate",          "gating",
                                      "topk",        "top_k", "top-k",        "n_group",       "shared",
                                      "capacity",    "scale", "rope_scaling", "weight_sharing"};
    static const char *const no[] = {"hidden_size",         "vocab_size",        "use_cache",
                                     "rope_theta",          "attention_dropout", "mlp_only_layers",
                                     "decoder_sparse_step", "initializer_range", "head_dim"};
    for (size_t i = 0; i < sizeof yes / sizeof yes[0]; i++) {
        if (!xp_config_speaks(yes[i]))
            fail_msg("%s does not speak", yes[i]);
    }
    for (size_t i = 0; i < sizeof no / sizeof no[0]; i++) {
        if (xp_config_speaks(no[i]))
            fail_msg("%s speaks", no[i]);
    }
}

static void not_json(void **state) {
    (void)state;
    static const struct {
        const char *text, *want;
    } bad[] = {
        {"", "f:1:0: "},
        {"{", "f:1:1: "},
        {"[1]", "f: the file holds a list, expected one JSON object"},
        {"7", "f:1:1: "},
        {"{\"num_experts\": NaN}", "(at field 'num_experts')"},
        {"{\"num_experts\": Infinity}", "(at field 'num_experts')"},
        {"{\"a\": 1, \"rms_norm_eps\": -Infinity}", "(at field 'rms_norm_eps')"},
        {"{\"rms_norm_eps\": 1e999}", "(at field 'rms_norm_eps')"},
        {"{\"num_experts\": 99999999999999999999}", "(at field 'num_experts')"},
        {"{\"num_experts\": 8, \"num_experts\": 16}", "duplicate object key near '\"num_experts\"'"},
        {"{\"a\": {\"b\": 1, \"b\": 1}}", "duplicate object key"},
        {"{} {}", "end of file expected"},
        {"{} x", "end of file expected"},
        {"{\"a\": 1,}", "f:1:"},
        {"{\"a\": 01}", "f:1:"},
        {"{'a': 1}", "f:1:"},
        {"{\"a\": \"\xff\"}", "f:1:"},
        {"\xef\xbb\xbf{}", "f:1:"},
        {"{\"a\": \"\\u0000\"}", "f:1:"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(xp_config_parse(bad[i].text, strlen(bad[i].text), "f", &model), XP_E_FORMAT);
        has(bad[i].want);
    }
    assert_int_equal(xp_config_parse("{}\0{}", 5, "f", &model), XP_E_FORMAT); /* a NUL byte ends no file */
}

/* Every prefix of a valid file is refused, every byte turned over is answered, and neither reads outside the text. */
static void damaged_files(void **state) {
    (void)state;
    const size_t n = strlen(qwen3);
    for (size_t cut = 0; cut < n; cut++) {
        char *text = malloc(cut + 1); /* of exactly that size, for the sanitizers */
        assert_non_null(text);
        memcpy(text, qwen3, cut);
        assert_int_equal(xp_config_parse(text, cut, "f", &model), XP_E_FORMAT);
        free(text);
    }
    char text[sizeof qwen3];
    for (size_t i = 0; i < n; i++) {
        memcpy(text, qwen3, sizeof text);
        text[i] ^= 0x15;
        const xp_status st = xp_config_parse(text, n, "f", &model);
        assert_true(st == XP_OK || st == XP_E_FORMAT);
        assert_true(st == XP_OK || *xp_error_text());
    }
}

/* ---- files and names ---- */

static char folder[] = "/tmp/expar-config-XXXXXX";

static const char *in_folder(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void put(const char *name, const char *text) {
    FILE *f = fopen(in_folder(name), "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static int open_folder(void **state) {
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int close_folder(void **state) {
    (void)state;
    static const char *const made[] = {"good.json", "b.json",     "a.json", "fifo.json",
                                       "big.json",  "empty.json", "x.txt",  "sub/config.json"};
    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++)
        unlink(in_folder(made[i]));
    rmdir(in_folder("sub"));
    return rmdir(folder);
}

static void files(void **state) {
    (void)state;
    put("good.json", qwen3);
    assert_int_equal(xp_model_open(in_folder("good.json"), &model), XP_OK);
    assert_string_equal(model.name, "good");
    assert_int_equal(mkdir(in_folder("sub"), 0700), 0);
    put("sub/config.json", qwen2);
    assert_int_equal(xp_model_open(in_folder("sub/config.json"), &model), XP_OK);
    assert_string_equal(model.name, "sub");
    assert_int_equal(xp_model_open(in_folder("sub/"), &model), XP_E_IO);
    has("is a folder");
    assert_int_equal(xp_model_open(in_folder("none.json"), &model), XP_E_IO);
    has("none.json: cannot open: ");
    assert_int_equal(xp_model_open("nosuch.json", &model), XP_E_IO);
    has("nosuch.json: cannot open: ");
    assert_int_equal(mkfifo(in_folder("fifo.json"), 0600), 0);
    assert_int_equal(xp_model_open(in_folder("fifo.json"), &model), XP_E_IO);
    has("is not a regular file");
    assert_int_equal(xp_config_read("/dev/null", &model), XP_E_IO);
    put("empty.json", "");
    assert_int_equal(xp_model_open(in_folder("empty.json"), &model), XP_E_FORMAT);
    put("big.json", "{}");
    assert_int_equal(truncate(in_folder("big.json"), XP_CONFIG_MAX_BYTES + 1), 0);
    assert_int_equal(xp_model_open(in_folder("big.json"), &model), XP_E_FORMAT);
    has("is 4194305 bytes, expected at most 4194304");
}

/* arg: the previous name and how many of the published three came. */
typedef struct {
    char last[XP_MODEL_NAME];
    int sorted, published;
} name_check;

static xp_status collect(const char *name, void *arg) {
    name_check *c = arg;
    c->sorted = c->sorted && strcmp(c->last, name) < 0;
    c->published +=
        !strcmp(name, "mixtral-8x7b") || !strcmp(name, "qwen1.5-moe-a2.7b") || !strcmp(name, "qwen3-30b-a3b");
    snprintf(c->last, sizeof c->last, "%s", name);
    return XP_OK;
}

static xp_status stop(const char *name, void *arg) {
    snprintf(((name_check *)arg)->last, XP_MODEL_NAME, "%s", name);
    return XP_FAIL(XP_E_IO, "stopped");
}

static void names(void **state) {
    (void)state;
    name_check seen = {"", 1, 0};
    assert_int_equal(xp_model_list(collect, &seen), XP_OK);
    assert_int_equal(seen.published, 3);
    assert_int_equal(seen.sorted, 1);
    assert_int_equal(xp_model_open("nosuch", &model), XP_E_IO);
    has("model 'nosuch': ");
    has("nosuch.json: cannot open");
    assert_int_equal(xp_model_open("", &model), XP_E_ARG);
    put("b.json", qwen2);
    put("a.json", mixtral);
    put("x.txt", "");
    assert_int_equal(setenv("EXPAR_MODELS", folder, 1), 0);
    assert_int_equal(xp_model_open("b", &model), XP_OK);
    assert_string_equal(model.model_type, "qwen2_moe");
    assert_int_equal(xp_model_open("qwen3-30b-a3b", &model), XP_E_IO);
    assert_int_equal(xp_model_list(stop, &seen), XP_E_IO);
    assert_string_equal(seen.last, "a");
    assert_int_equal(setenv("EXPAR_MODELS", "/nosuch", 1), 0);
    assert_int_equal(xp_model_list(collect, &seen), XP_E_IO);
    has("/nosuch");
    assert_int_equal(unsetenv("EXPAR_MODELS"), 0);
}

/* ---- changes ---- */

static void shrink(void **state) {
    (void)state;
    assert_int_equal(xp_model_open("qwen1.5-moe-a2.7b", &model), XP_OK);
    assert_int_equal(xp_model_shrink(&model, 16), XP_OK);
    assert_int_equal(model.H, 128);
    assert_int_equal(model.F, 88);
    assert_int_equal(model.S, 352);
    assert_int_equal(model.E, 60);
    assert_int_equal(model.K, 4);
    assert_int_equal(model.layers, 24);
    assert_int_equal(model.shrink, 16);
    const xp_model before = model;
    assert_int_equal(xp_model_shrink(&model, 0), XP_E_ARG);
    has("shrink: 0");
    assert_int_equal(xp_model_shrink(&model, 3), XP_E_ARG);
    has("shrink: 3 does not divide the hidden width H 128 of qwen1.5-moe-a2.7b");
    assert_int_equal(xp_model_shrink(&model, 16), XP_E_ARG);
    has("shrink: 16 does not divide the expert width F 88");
    assert_memory_equal(&before, &model, sizeof model);
    assert_int_equal(xp_model_of("m", &xp_dialects[0], 1, 8, 8, 2, 1, 6, &model), XP_OK);
    assert_int_equal(xp_model_shrink(&model, 4), XP_E_ARG);
    has("shrink: 4 does not divide the shared expert's width S 6 of m");
}

static void overrides(void **state) {
    (void)state;
    assert_int_equal(xp_model_open("qwen3-30b-a3b", &model), XP_OK);
    assert_int_equal(xp_model_override(&model, 2, 0, 0), XP_OK);
    assert_int_equal(model.layers, 2);
    assert_int_equal(xp_model_moe_layers(&model), 2);
    assert_int_equal(xp_model_override(&model, 3, 0, 0), XP_E_ARG);
    has("layers: 3, expected 1 to 2");
    assert_int_equal(xp_model_override(&model, 0, 0, 200), XP_E_ARG);
    has("k: 200 slots a token, more than E 128 experts");
    assert_int_equal(xp_model_override(&model, 0, 256, 200), XP_OK);
    assert_int_equal(model.E, 256);
    assert_int_equal(model.K, 200);
}

static void from_numbers(void **state) {
    (void)state;
    const xp_dialect *d = &xp_dialects[0];
    assert_int_equal(xp_model_of("m", d, 2, 3, 5, 4, 4, 0, &model), XP_OK);
    assert_int_equal(xp_model_moe_layers(&model), 2);
    assert_int_equal(xp_model_of("m", d, 2, 3, 5, 4, 5, 0, &model), XP_E_ARG);
    has("k: 5 slots a token, more than E 4 experts");
    assert_int_equal(xp_model_of("m", d, 0, 3, 5, 4, 1, 0, &model), XP_E_ARG);
    has("layers: 0");
    assert_int_equal(xp_model_of("m", d, 1, 0, 5, 4, 1, 0, &model), XP_E_ARG);
    has("H: 0");
    assert_int_equal(xp_model_of("m", d, 1, 1, XP_MAX_WIDTH + 1, 4, 1, 0, &model), XP_E_ARG);
    has("F: 1048577");
    assert_int_equal(xp_model_of("m", d, 1, 1, 1, 0, 1, 0, &model), XP_E_ARG);
    has("E: 0");
    assert_int_equal(xp_model_of("m", d, 1, 1, 1, 1, 0, 0, &model), XP_E_ARG);
    has("k: 0");
    assert_int_equal(xp_model_of("m", d, 1, 1, 1, 1, 1, -1, &model), XP_E_ARG);
    has("S: -1");
}

/* ---- an expert's capacity ---- */

/* What transformers 5.24 writes for its default configuration, with fewer layers. */
static const char switch_base[] =
    "{\"model_type\": \"switch_transformers\", \"architectures\": [\"SwitchTransformersForConditionalGeneration\"],"
    " \"d_model\": 768, \"d_kv\": 64, \"d_ff\": 2048, \"expert_capacity\": 64, \"num_layers\": 8,"
    " \"num_sparse_encoder_layers\": 2, \"encoder_sparse_step\": 4, \"num_decoder_layers\": 8,"
    " \"num_sparse_decoder_layers\": 4, \"decoder_sparse_step\": 2, \"num_heads\": 12, \"num_experts\": 8,"
    " \"router_bias\": false, \"router_jitter_noise\": 0.01, \"router_dtype\": \"float32\","
    " \"router_ignore_padding_tokens\": false, \"layer_norm_epsilon\": 1e-06, \"router_z_loss_coef\": 0.001,"
    " \"router_aux_loss_coef\": 0.001, \"dense_act_fn\": \"relu\", \"add_router_probs\": false,"
    " \"vocab_size\": 32128, \"is_encoder_decoder\": true}";

static void switch_transformers(void **state) {
    (void)state;
    assert_int_equal(parse_with(switch_base, "expert_capacity", "96"), XP_OK);
    assert_string_equal(model.dialect.name, "hf-5.24/switch_transformers");
    assert_true(model.H == 768 && model.F == 2048 && model.E == 8 && model.K == 1 && model.S == 0);
    assert_int_equal(model.dialect.capacity, 96);
    assert_true(model.dialect.aux_coef == 0.001 && model.dialect.z_coef == 0.001 && !model.dialect.router_bias);
    for (int i = 0; i < 8; i++)
        assert_int_equal(model.moe[i], i == 1 || i == 5); /* not 3 and 7, where (i + 1) % 4 is 0 */
    assert_int_equal(parse_with(switch_base, "encoder_sparse_step", "1"), XP_OK);
    assert_int_equal(xp_model_moe_layers(&model), 8);
    assert_int_equal(parse_with(switch_base, "router_bias", "true"), XP_OK);
    assert_int_equal(model.dialect.router_bias, 1);
    assert_int_equal(parse_with(switch_base, "router_z_loss_coef", "0.5"), XP_OK);
    assert_true(model.dialect.z_coef == 0.5);
    static const struct {
        const char *key, *value, *text;
    } wrong[] = {
        {"expert_capacity", "0", "expert_capacity is 0"},    {"expert_capacity", "2.5", "expert_capacity is 2.5"},
        {"expert_capacity", NULL, "expert_capacity"},        {"router_dtype", "\"bfloat16\"", "router_dtype"},
        {"dense_act_fn", "\"gated-gelu\"", "dense_act_fn"},  {"encoder_sparse_step", "0", "encoder_sparse_step is 0"},
        {"num_experts_per_tok", "2", "num_experts_per_tok"}, {"capacity_factor", "1.25", "capacity_factor"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(parse_with(switch_base, wrong[i].key, wrong[i].value), XP_E_FORMAT);
        has(wrong[i].text);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(valid_file_gives_its_values),
        cmocka_unit_test(published_qwen3),
        cmocka_unit_test(published_qwen2),
        cmocka_unit_test(published_mixtral),
        cmocka_unit_test(published_files_have_their_sizes),
        cmocka_unit_test(norm_flag_chooses_the_dialect),
        cmocka_unit_test(presets_are_found_by_name),
        cmocka_unit_test(deepseek_v3),
        cmocka_unit_test(one_name_two_meanings),
        cmocka_unit_test(nested_fields),
        cmocka_unit_test(beside_nested_fields),
        cmocka_unit_test(layers_that_choose_by_a_table),
        cmocka_unit_test(two_ways_to_say_hash),
        cmocka_unit_test(limits_a_layer),
        cmocka_unit_test(latent_width),
        cmocka_unit_test(records_are_few_and_alike),
        cmocka_unit_test(words_choose),
        cmocka_unit_test(any_dialect),
        cmocka_unit_test(letters_and_numbers_a_layer),
        cmocka_unit_test(layer_rule),
        cmocka_unit_test(aliases),
        cmocka_unit_test(required_fields_have_no_default),
        cmocka_unit_test(integers),
        cmocka_unit_test(values),
        cmocka_unit_test(keys_that_nobody_reads),
        cmocka_unit_test(too_many_unread_keys_are_not_cut),
        cmocka_unit_test(words),
        cmocka_unit_test(not_json),
        cmocka_unit_test(damaged_files),
        cmocka_unit_test(files),
        cmocka_unit_test(names),
        cmocka_unit_test(shrink),
        cmocka_unit_test(overrides),
        cmocka_unit_test(from_numbers),
        cmocka_unit_test(switch_transformers),
    };
    unsetenv("EXPAR_MODELS");
    return cmocka_run_group_tests(tests, open_folder, close_folder);
}
