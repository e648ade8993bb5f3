/* Checkpoints: every layout of every family's files gives the stages the same weights, and what is missing, wrong,
 * contradictory or left over is refused by name. Files are made here, by the writer of safetensors.h. */
#include "checkpoint.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "checkpoint_saved.h"
#include "families.h"
#include "registry.h"
#include "run.h"
#include "safetensors.h"

enum { H = 8, F = 6, E = 3, K = 2, S = 4, R = 5, VOCAB = 300, LAYER = 1, MOST = 96 };

static char folder[] = "/tmp/expar-checkpoint-XXXXXX";
static xp_model model;
static xp_checkpoint *ck;
static xp_layer_weights got;

static const char *in_folder(const char *name) {
    static char path[8][256];
    static int turn;
    turn = (turn + 1) % 8;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static void has(const char *part) {
    if (!strstr(xp_error_text(), part))
        fail_msg("expected '%s' in: %s", part, xp_error_text());
}

/* ---- logical weights: a number for each place, exact in f32 ---- */

enum { GATE = 1, UP, DOWN, SGATE, SUP, SDOWN, ROUTER, SHARED_GATE, BIAS, UP_BIAS, DOWN_BIAS };

static double value(int what, int64_t e, int64_t o, int64_t i) {
    return (double)(what * 100000 + (int)e * 10000 + (int)o * 100 + (int)i);
}

/* ---- files ---- */

typedef struct {
    xp_safetensors_item item[MOST];
    char name[MOST][160];
    int n;
} set;

static set file;

static void start(void) {
    for (int i = 0; i < file.n; i++)
        free(file.item[i].tensor.data);
    file.n = 0;
}

static xp_tensor *add(const char *name, xp_dtype d, int ndim, const int64_t *dim) {
    assert_true(file.n < MOST);
    snprintf(file.name[file.n], sizeof file.name[0], "%s", name);
    xp_tensor t = xp_tensor_of(NULL, d, ndim, dim);
    int64_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= dim[i];
    t.data = calloc((size_t)n + 1, 8);
    assert_non_null(t.data);
    file.item[file.n] = (xp_safetensors_item){.name = file.name[file.n], .tensor = t};
    return &file.item[file.n++].tensor;
}

static void put1(const char *name, int what, int64_t n) {
    xp_tensor *t = add(name, XP_F32, 1, &n);
    for (int64_t i = 0; i < n; i++)
        xp_fill_store(t, i, value(what, 0, i, 0));
}

/* One matrix [out,in] of expert e, or [in,out]. */
static void put2(const char *name, int what, int64_t e, int64_t out, int64_t in, int turned) {
    const int64_t dim[2] = {turned ? in : out, turned ? out : in};
    xp_tensor *t = add(name, XP_F32, 2, dim);
    for (int64_t n = 0; n < out * in; n++)
        xp_fill_store(t, n, turned ? value(what, e, n % out, n / out) : value(what, e, n / in, n % in));
}

/* Gate and up in one tensor, of `groups` experts (0: no leading dimension); in 0: a bias. */
static void put_fused(const char *name, int64_t groups, int64_t width, int64_t in, int gate, int up, int in_turn,
                      int turned) {
    const int64_t out = 2 * width, dim[3] = {groups, turned ? in : out, turned ? out : in}, cols = in ? in : 1;
    const int skip = groups == 0, bias = in == 0;
    xp_tensor *t = add(name, XP_F32, (bias ? 2 : 3) - skip, dim + skip);
    for (int64_t n = 0; n < (groups ? groups : 1) * out * cols; n++) {
        const int64_t e = n / (out * cols), k = n % (out * cols);
        const int64_t row = turned ? k % out : k / cols, col = turned ? k / out : k % cols;
        const int is_up = in_turn ? row % 2 == 1 : row >= width;
        xp_fill_store(t, n, value(is_up ? up : gate, e, in_turn ? row / 2 : row % width, col));
    }
}

/* A matrix of all experts, in one tensor; in 0: a bias. */
static void put_stacked(const char *name, int what, int64_t out, int64_t in, int turned) {
    const int64_t dim[3] = {E, turned ? in : out, turned ? out : in}, cols = in ? in : 1;
    xp_tensor *t = add(name, XP_F32, in ? 3 : 2, dim);
    for (int64_t n = 0; n < E * out * cols; n++) {
        const int64_t e = n / (out * cols), k = n % (out * cols);
        xp_fill_store(t, n, value(what, e, turned ? k % out : k / cols, turned ? k / out : k % cols));
    }
}

/* A matrix of all experts, their first dimensions joined. */
static void put_flat(const char *name, int what, int64_t out, int64_t in, int turned) {
    put_stacked(name, what, out, in, turned);
    xp_tensor *t = &file.item[file.n - 1].tensor;
    const xp_tensor flat = xp_tensor_2d(t->data, XP_F32, E * t->dim[1], t->dim[2]);
    *t = flat;
}

static void put_each(const char *block, const char *gate, const char *up, const char *down, int64_t experts) {
    char name[160];
    for (int64_t e = 0; e < experts; e++) {
        if (gate) {
            snprintf(name, sizeof name, "%sexperts.%d.%s.weight", block, (int)e, gate);
            put2(name, GATE, e, F, H, 0);
        }
        snprintf(name, sizeof name, "%sexperts.%d.%s.weight", block, (int)e, up);
        put2(name, UP, e, F, H, 0);
        snprintf(name, sizeof name, "%sexperts.%d.%s.weight", block, (int)e, down);
        put2(name, DOWN, e, H, F, 0);
    }
}

static void put_shared(const char *mlp, int64_t width) {
    char name[160];
    snprintf(name, sizeof name, "%s.gate_proj.weight", mlp);
    put2(name, SGATE, 0, width, H, 0);
    snprintf(name, sizeof name, "%s.up_proj.weight", mlp);
    put2(name, SUP, 0, width, H, 0);
    snprintf(name, sizeof name, "%s.down_proj.weight", mlp);
    put2(name, SDOWN, 0, H, width, 0);
}

static void write_as(const char *name) {
    if (xp_safetensors_write(in_folder(name), file.item, file.n, NULL, 0) != XP_OK)
        fail_msg("%s", xp_error_text());
}

/* ---- models ---- */

static void make_model(const char *type, const char *preset, int64_t shared) {
    const xp_dialect *d = xp_dialect_find(preset);
    assert_non_null(d);
    assert_int_equal(xp_model_of("tiny", d, 3, H, F, E, K, shared, &model), XP_OK);
    assert_int_equal(xp_model_set_router_width(&model, d->router_in == XP_ROUTER_RECURRENT_MLP ? R : 0), XP_OK);
    snprintf(model.model_type, sizeof model.model_type, "%s", type);
    model.vocab = VOCAB;
    model.moe[0] = 0;
}

static xp_status read_layer(const char *name, int layer) {
    xp_layer_weights_close(&got);
    xp_checkpoint_close(ck);
    const xp_status st = xp_checkpoint_open(in_folder(name), &ck);
    return st == XP_OK ? xp_checkpoint_read(ck, &model, layer, &got) : st;
}

static xp_status read_file(const char *name) {
    return read_layer(name, LAYER);
}

static void taken(void) {
    write_as("f.safetensors");
    if (read_file("f.safetensors") != XP_OK)
        fail_msg("%s", xp_error_text());
}

/* Nothing stays behind, and the text names the file and what is given. */
static void refused(const char *one, const char *two) {
    write_as("f.safetensors");
    assert_int_equal(read_file("f.safetensors"), XP_E_FORMAT);
    for (int i = 0; i < XP_NPART; i++)
        assert_null(got.part[i].data);
    has("f.safetensors");
    has(one);
    has(two);
}

/* ---- what the stages get ---- */

static double at(xp_part p, int64_t n) {
    return xp_widen(got.part[p].data, got.part[p].dtype, n);
}

static void shape_is(xp_part p, int ndim, int64_t d0, int64_t d1, int64_t d2) {
    const int64_t dim[3] = {d0, d1, d2};
    assert_non_null(got.part[p].data);
    assert_int_equal(got.part[p].ndim, ndim);
    assert_true(xp_tensor_contiguous(&got.part[p]));
    for (int i = 0; i < ndim; i++)
        assert_int_equal(got.part[p].dim[i], dim[i]);
}

/* Row r of a first matrix of `width` rows of gate and of up: which, and which of them. */
static double up_value(int64_t e, int64_t r, int64_t i, int64_t width, int gate, int up) {
    const int in_turn = model.dialect.gate_layout == XP_GATE_INTERLEAVED;
    if (!model.dialect.gated)
        return value(up, e, r, i);
    return in_turn ? value(r % 2 ? up : gate, e, r / 2, i) : value(r < width ? gate : up, e, r % width, i);
}

static void experts_are_right(void) {
    const int64_t U = model.dialect.gated ? 2 * F : F;
    shape_is(XP_PART_UP, 3, E, U, H);
    shape_is(XP_PART_DOWN, 3, E, H, F);
    for (int64_t e = 0; e < E; e++) {
        for (int64_t n = 0; n < U * H; n++)
            assert_true(at(XP_PART_UP, e * U * H + n) == up_value(e, n / H, n % H, F, GATE, UP));
        for (int64_t n = 0; n < H * F; n++)
            assert_true(at(XP_PART_DOWN, e * H * F + n) == value(DOWN, e, n / F, n % F));
    }
}

static void shared_is_right(int64_t width) {
    const int64_t X = model.dialect.gated ? 2 * width : width;
    shape_is(XP_PART_SHARED_UP, 2, X, H, 0);
    shape_is(XP_PART_SHARED_DOWN, 2, H, width, 0);
    for (int64_t n = 0; n < X * H; n++)
        assert_true(at(XP_PART_SHARED_UP, n) == up_value(0, n / H, n % H, width, SGATE, SUP));
    for (int64_t n = 0; n < H * width; n++)
        assert_true(at(XP_PART_SHARED_DOWN, n) == value(SDOWN, 0, n / width, n % width));
}

static void router_is_right(int64_t rows) {
    shape_is(XP_PART_ROUTER, 2, rows, H, 0);
    for (int64_t n = 0; n < rows * H; n++)
        assert_true(at(XP_PART_ROUTER, n) == value(ROUTER, 0, n / H, n % H));
}

static void vector_is_right(xp_part p, int what, int64_t n) {
    shape_is(p, 1, n, 0, 0);
    for (int64_t i = 0; i < n; i++)
        assert_true(at(p, i) == value(what, 0, i, 0));
}

/* ---- layouts ---- */

static void one_tensor_an_expert(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    start();
    put2("model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
    put_each("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
    put1("model.layers.1.input_layernorm.weight", BIAS, H); /* no tensor of the block */
    put1("model.layers.11.mlp.gate.weight", BIAS, H);       /* nor of the layer */
    taken();
    router_is_right(E);
    experts_are_right();
    assert_null(got.part[XP_PART_SHARED_UP].data);
    assert_null(got.part[XP_PART_SELECT_BIAS].data);
    assert_int_equal(got.layer, LAYER);

    make_model("mixtral", "hf-5.24/mixtral", 0);
    start();
    put2("model.layers.1.block_sparse_moe.gate.weight", ROUTER, 0, E, H, 0);
    put_each("model.layers.1.block_sparse_moe.", "w1", "w3", "w2", E);
    taken();
    experts_are_right();

    make_model("nemotron_h", "hf-5.24/nemotron_h", S);
    start();
    put2("backbone.layers.1.mixer.gate.weight", ROUTER, 0, E, H, 0);
    put1("backbone.layers.1.mixer.gate.e_score_correction_bias", BIAS, E);
    put_each("backbone.layers.1.mixer.", NULL, "up_proj", "down_proj", E);
    put2("backbone.layers.1.mixer.shared_experts.up_proj.weight", SUP, 0, S, H, 0);
    put2("backbone.layers.1.mixer.shared_experts.down_proj.weight", SDOWN, 0, H, S, 0);
    taken();
    experts_are_right();
    shared_is_right(S);
    vector_is_right(XP_PART_SELECT_BIAS, BIAS, E);
}

static void all_experts_in_one_tensor(void **state) {
    (void)state;
    make_model("granitemoeshared", "hf-5.24/granitemoe", S);
    start();
    put2("model.layers.1.block_sparse_moe.router.layer.weight", ROUTER, 0, E, H, 0);
    put_fused("model.layers.1.block_sparse_moe.input_linear.weight", E, F, H, GATE, UP, 0, 0);
    put_stacked("model.layers.1.block_sparse_moe.output_linear.weight", DOWN, H, F, 0);
    put_fused("model.layers.1.shared_mlp.input_linear.weight", 0, S, H, SGATE, SUP, 0, 0);
    put2("model.layers.1.shared_mlp.output_linear.weight", SDOWN, 0, H, S, 0);
    taken();
    router_is_right(E);
    experts_are_right();
    shared_is_right(S);

    make_model("llama4", "hf-5.24/llama4", F);
    start();
    put2("language_model.model.layers.1.feed_forward.router.weight", ROUTER, 0, E, H, 0);
    put_fused("language_model.model.layers.1.feed_forward.experts.gate_up_proj", E, F, H, GATE, UP, 0, 1);
    put_stacked("language_model.model.layers.1.feed_forward.experts.down_proj", DOWN, H, F, 1);
    put_shared("language_model.model.layers.1.feed_forward.shared_expert", F);
    taken();
    experts_are_right();
    shared_is_right(F);
}

static void put_gpt_oss(void) {
    start();
    put2("model.layers.1.mlp.router.weight", ROUTER, 0, E, H, 0);
    put1("model.layers.1.mlp.router.bias", BIAS, E);
    put_fused("model.layers.1.mlp.experts.gate_up_proj", E, F, H, GATE, UP, 1, 1);
    put_fused("model.layers.1.mlp.experts.gate_up_proj_bias", E, F, 0, GATE, UP_BIAS, 1, 0);
    put_stacked("model.layers.1.mlp.experts.down_proj", DOWN, H, F, 1);
    put_stacked("model.layers.1.mlp.experts.down_proj_bias", DOWN_BIAS, H, 0, 0);
}

static void rows_in_turn_and_biases(void **state) {
    (void)state;
    make_model("gpt_oss", "hf-5.24/gpt_oss", 0);
    put_gpt_oss();
    taken();
    assert_int_equal(model.dialect.gate_layout, XP_GATE_INTERLEAVED);
    router_is_right(E);
    vector_is_right(XP_PART_ROUTER_BIAS, BIAS, E);
    experts_are_right();
    shape_is(XP_PART_UP_BIAS, 2, E, 2 * F, 0);
    shape_is(XP_PART_DOWN_BIAS, 2, E, H, 0);
    for (int64_t e = 0; e < E; e++) {
        for (int64_t r = 0; r < 2 * F; r++)
            assert_true(at(XP_PART_UP_BIAS, e * 2 * F + r) == up_value(e, r, 0, F, GATE, UP_BIAS));
        for (int64_t r = 0; r < H; r++)
            assert_true(at(XP_PART_DOWN_BIAS, e * H + r) == value(DOWN_BIAS, e, r, 0));
    }
    /* The same file for a record that takes gate's rows first. */
    model.dialect.gate_layout = XP_GATE_CONCAT;
    taken();
    experts_are_right();
}

/* Of relatives of gpt_oss: gate's rows first in one's files and record; in turn in another's files alone. */
static void rows_of_its_own_kind(void **state) {
    (void)state;
    make_model("openai_privacy_filter", "hf-5.24/openai_privacy_filter", 0);
    start();
    put2("model.layers.1.mlp.router.weight", ROUTER, 0, E, H, 0);
    put1("model.layers.1.mlp.router.bias", BIAS, E);
    put_fused("model.layers.1.mlp.experts.gate_up_proj", E, F, H, GATE, UP, 0, 1);
    put_fused("model.layers.1.mlp.experts.gate_up_proj_bias", E, F, 0, GATE, UP_BIAS, 0, 0);
    put_stacked("model.layers.1.mlp.experts.down_proj", DOWN, H, F, 1);
    put_stacked("model.layers.1.mlp.experts.down_proj_bias", DOWN_BIAS, H, 0, 0);
    taken();
    experts_are_right();
    make_model("inkling2", "hf-5.24/inkling2", 0);
    assert_int_equal(model.dialect.gate_layout, XP_GATE_CONCAT);
    start();
    put2("model.llm.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
    put1("model.llm.layers.1.mlp.gate.bias", BIAS, E);
    put_fused("model.llm.layers.1.mlp.experts.w13_weight", E, F, H, GATE, UP, 1, 0);
    put_stacked("model.llm.layers.1.mlp.experts.w2_weight", DOWN, H, F, 0);
    taken();
    vector_is_right(XP_PART_SELECT_BIAS, BIAS, E);
    experts_are_right();
}

/* All experts' rows in one dimension, the second matrix [in,out]. */
static void rows_of_all_experts(void **state) {
    (void)state;
    make_model("dbrx", "hf-5.24/dbrx", 0);
    start();
    put2("transformer.blocks.1.ffn.router.layer.weight", ROUTER, 0, E, H, 0);
    put_flat("transformer.blocks.1.ffn.experts.mlp.w1", GATE, F, H, 0);
    put_flat("transformer.blocks.1.ffn.experts.mlp.v1", UP, F, H, 0);
    put_flat("transformer.blocks.1.ffn.experts.mlp.w2", DOWN, H, F, 1);
    taken();
    router_is_right(E);
    experts_are_right();
    file.n--;
    free(file.item[file.n].tensor.data);
    put_stacked("transformer.blocks.1.ffn.experts.mlp.w2", DOWN, H, F, 1);
    refused("transformer.blocks.1.ffn.experts.mlp.w2", "expected [");
}

/* Two shared experts, S / 2 wide, in tensors with a dimension in front; a bias that is shorter than the router; one
 * factor. Rows apart and in turn in the record. */
static void shared_experts_are_joined(void **state) {
    enum { A = 2, WIDTH = S / A, Z = E + A };
    (void)state;
    for (int in_turn = 0; in_turn < 2; in_turn++) {
        make_model("inkling_mm_model", "hf-5.24/inkling", S);
        model.dialect.gate_layout = in_turn ? XP_GATE_INTERLEAVED : XP_GATE_CONCAT;
        start();
        put2("model.llm.layers.1.mlp.gate.weight", ROUTER, 0, Z, H, 0);
        put1("model.llm.layers.1.mlp.gate.bias", BIAS, E);
        put1("model.llm.layers.1.mlp.gate.global_scale", SHARED_GATE, 1);
        put_fused("model.llm.layers.1.mlp.experts.w13_weight", E, F, H, GATE, UP, 1, 0);
        put_stacked("model.llm.layers.1.mlp.experts.w2_weight", DOWN, H, F, 0);
        put_fused("model.llm.layers.1.mlp.shared_experts.shared_w13_weight", A, WIDTH, H, SGATE, SUP, 1, 0);
        const int64_t dim[3] = {A, H, WIDTH};
        xp_tensor *t = add("model.llm.layers.1.mlp.shared_experts.shared_w2_weight", XP_F32, 3, dim);
        for (int64_t n = 0; n < A * H * WIDTH; n++)
            xp_fill_store(t, n, value(SDOWN, n / (H * WIDTH), n / WIDTH % H, n % WIDTH));
        taken();
        router_is_right(Z);
        experts_are_right();
        shape_is(XP_PART_SELECT_BIAS, 1, Z, 0, 0);
        for (int64_t e = 0; e < Z; e++)
            assert_true(at(XP_PART_SELECT_BIAS, e) == (e < E ? value(BIAS, 0, e, 0) : 0.0));
        vector_is_right(XP_PART_EXPERT_SCALE, SHARED_GATE, 1);
        shape_is(XP_PART_SHARED_UP, 2, 2 * S, H, 0);
        shape_is(XP_PART_SHARED_DOWN, 2, H, S, 0);
        for (int64_t n = 0; n < 2 * S * H; n++) {
            const int64_t row = n / H, is_up = in_turn ? row % 2 : row / S, unit = in_turn ? row / 2 : row % S;
            assert_true(at(XP_PART_SHARED_UP, n) == value(is_up ? SUP : SGATE, unit / WIDTH, unit % WIDTH, n % H));
        }
        for (int64_t n = 0; n < H * S; n++)
            assert_true(at(XP_PART_SHARED_DOWN, n) == value(SDOWN, n % S / WIDTH, n / S, n % WIDTH));
    }
    put1("model.llm.layers.1.mlp.w13_dn.weight", BIAS, E);
    refused("mlp.w13_dn.weight", "asks for it");
}

#define MUSE "model.language_model.layers.1.mlp."

static void put_muse(xp_dtype norms) {
    const int64_t width = H;
    start();
    put2(MUSE "gate.weight", ROUTER, 0, E, H, 0);
    put1(MUSE "gate.e_score_correction_bias", BIAS, E);
    put2(MUSE "pre_expert_proj.weight", SUP, 0, H, H, 0);
    put2(MUSE "post_expert_proj.weight", SDOWN, 0, H, H, 0);
    put_fused(MUSE "experts.gate_up_proj", E, F, H, GATE, UP, 0, 0);
    put_stacked(MUSE "experts.down_proj", DOWN, H, F, 0);
    for (int which = 0; which < 2; which++) {
        xp_tensor *t =
            add(which ? MUSE "experts.post_expert_norm.weight" : MUSE "pre_expert_norm.weight", norms, 1, &width);
        for (int64_t i = 0; i < H; i++)
            xp_fill_store(t, i, (double)(which ? -i - 1 : i) / 512);
    }
}

/* Norms that are stored less 1, in the files' dtype: 1 + i / 512 has more bits than bf16, and is kept whole. */
static void norms_around_the_experts(void **state) {
    static const xp_dtype stored[] = {XP_F32, XP_BF16, XP_F64};
    (void)state;
    for (size_t n = 0; n < sizeof stored / sizeof *stored; n++) {
        make_model("muse_spark", "hf-5.24/muse_spark", 0);
        assert_int_equal(xp_model_set_latent(&model, H), XP_OK);
        assert_int_equal(xp_model_set_around(&model, XP_LATENT_NORM | XP_EXPERT_NORM), XP_OK);
        put_muse(stored[n]);
        taken();
        experts_are_right();
        shape_is(XP_PART_LATENT_NORM, 1, H, 0, 0);
        shape_is(XP_PART_EXPERT_NORM, 1, H, 0, 0);
        assert_int_equal(got.part[XP_PART_LATENT_NORM].dtype, stored[n] == XP_F64 ? XP_F64 : XP_F32);
        for (int64_t i = 0; i < H; i++) {
            assert_true(at(XP_PART_LATENT_NORM, i) == 1.0 + (double)i / 512);
            assert_true(at(XP_PART_EXPERT_NORM, i) == 1.0 - (double)(i + 1) / 512);
            assert_true(at(XP_PART_LATENT_DOWN, i) == value(SUP, 0, 0, i));
            assert_true(at(XP_PART_LATENT_UP, i) == value(SDOWN, 0, 0, i));
        }
        float narrow[H];
        const xp_tensor rows = xp_tensor_3d(narrow, XP_F32, 1, 3, 1);
        xp_layer_weights_copy(&got, XP_PART_EXPERT_NORM, 0, 2, &rows);
        assert_true(narrow[0] == 1.0f - 3.0f / 512 && narrow[2] == 1.0f - 5.0f / 512);
    }
    assert_int_equal(xp_model_set_around(&model, XP_LATENT_NORM), XP_OK);
    refused("'" MUSE "experts.post_expert_norm.weight'", "nothing of tiny");
    assert_int_equal(xp_model_set_around(&model, XP_LATENT_NORM | XP_EXPERT_NORM | XP_BLOCK_NORM), XP_OK);
    assert_int_equal(read_file("f.safetensors"), XP_E_ARG);
    has("norm of the block's output");
    assert_int_equal(xp_model_set_around(&model, XP_LATENT_NORM | XP_EXPERT_NORM), XP_OK);
    put_muse(XP_F32);
    file.item[file.n - 1].name = MUSE "experts.another_norm.weight";
    refused("no tensor '" MUSE "experts.post_expert_norm.weight' (norm of the experts' output)", "[8]");
}

/* The norms of both outputs, of their sum, of the shared expert's input and of the router's; that of the experts' input
 * is not the block's. */
static void norms_of_gemma4(void **state) {
    static const unsigned all = XP_BLOCK_NORM | XP_ROUTED_NORM | XP_SHARED_NORM | XP_SHARED_IN_NORM;
    (void)state;
    make_model("gemma4", "hf-5.24/gemma4", S);
    assert_int_equal(xp_model_set_around(&model, all), XP_OK);
    start();
    put2("model.layers.1.router.proj.weight", ROUTER, 0, E, H, 0);
    put1("model.layers.1.router.per_expert_scale", BIAS, E);
    put_fused("model.layers.1.experts.gate_up_proj", E, F, H, GATE, UP, 0, 0);
    put_stacked("model.layers.1.experts.down_proj", DOWN, H, F, 0);
    put_shared("model.layers.1.mlp", S);
    put1("model.layers.1.post_feedforward_layernorm.weight", UP_BIAS, H);
    put1("model.layers.1.post_feedforward_layernorm_1.weight", DOWN_BIAS, H);
    put1("model.layers.1.post_feedforward_layernorm_2.weight", BIAS, H);
    put1("model.layers.1.pre_feedforward_layernorm_2.weight", BIAS, H + 1);
    put1("model.layers.1.layer_scalar", BIAS, 1);
    refused("no tensor 'model.layers.1.router.scale' (norm of the router's rows)", "[8]");
    put1("model.layers.1.router.scale", UP_BIAS, H);
    refused("no tensor 'model.layers.1.pre_feedforward_layernorm.weight' (norm of the shared expert's input)", "[8]");
    put1("model.layers.1.pre_feedforward_layernorm.weight", ROUTER, H);
    taken();
    router_is_right(E);
    experts_are_right();
    shared_is_right(S);
    vector_is_right(XP_PART_ROUTER_NORM, UP_BIAS, H);
    vector_is_right(XP_PART_EXPERT_SCALE, BIAS, E);
    vector_is_right(XP_PART_BLOCK_NORM, UP_BIAS, H);
    vector_is_right(XP_PART_SHARED_NORM, DOWN_BIAS, H);
    vector_is_right(XP_PART_ROUTED_NORM, BIAS, H);
    vector_is_right(XP_PART_SHARED_IN_NORM, ROUTER, H);
    assert_int_equal(xp_model_set_around(&model, all & ~(unsigned)XP_ROUTED_NORM), XP_OK);
    refused("'model.layers.1.post_feedforward_layernorm_2.weight'", "nothing of tiny");
}

/* A norm beside the block, as it is stored, and a bias of the block. */
static void norm_and_bias_of_the_sum(void **state) {
    (void)state;
    make_model("axk1", "hf-5.24/deepseek_v3", S);
    assert_int_equal(xp_model_set_around(&model, XP_BLOCK_NORM), XP_OK);
    start();
    put2("model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
    put1("model.layers.1.mlp.gate.e_score_correction_bias", BIAS, E);
    put_each("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
    put_shared("model.layers.1.mlp.shared_experts", S);
    put1("model.layers.0.post_mlp_layernorm.weight", BIAS, H); /* of a dense layer, which has no use for it */
    refused("no tensor 'model.layers.1.post_mlp_layernorm.weight' (norm of the block's output)", "[8]");
    put1("model.layers.1.post_mlp_layernorm.weight", UP_BIAS, H);
    taken();
    experts_are_right();
    shared_is_right(S);
    vector_is_right(XP_PART_BLOCK_NORM, UP_BIAS, H);

    make_model("jetmoe", "hf-5.24/granitemoe", 0);
    assert_int_equal(xp_model_set_around(&model, XP_OUT_BIAS), XP_OK);
    start();
    put2("model.layers.1.mlp.router.layer.weight", ROUTER, 0, E, H, 0);
    put_fused("model.layers.1.mlp.input_linear.weight", E, F, H, GATE, UP, 0, 0);
    put_stacked("model.layers.1.mlp.output_linear.weight", DOWN, H, F, 0);
    put1("model.layers.1.mlp.bias", DOWN_BIAS, H);
    put2("model.layers.1.self_attention.experts.router.layer.weight", BIAS, 0, E, H, 0); /* attention's */
    taken();
    router_is_right(E);
    experts_are_right();
    vector_is_right(XP_PART_OUT_BIAS, DOWN_BIAS, H);
}

/* Rows apart in the file, in turn in the record. */
static void rows_are_put_in_turn(void **state) {
    (void)state;
    make_model("qwen2_moe", "hf-5.24/qwen2_moe", S);
    model.dialect.gate_layout = XP_GATE_INTERLEAVED;
    start();
    put2("model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
    put_each("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
    put_shared("model.layers.1.mlp.shared_expert", S);
    put2("model.layers.1.mlp.shared_expert_gate.weight", SHARED_GATE, 0, 1, H, 0);
    taken();
    experts_are_right();
    shared_is_right(S);
    shape_is(XP_PART_SHARED_GATE, 2, 1, H, 0);
    for (int64_t i = 0; i < H; i++)
        assert_true(at(XP_PART_SHARED_GATE, i) == value(SHARED_GATE, 0, 0, i));
}

/* Files of qwen3_vl_moe lie either way round; of qwen3_5_moe they have one tensor an expert, or one for all. */
static void two_layouts_give_the_same_bits(void **state) {
    (void)state;
    for (int turned = 0; turned < 2; turned++) {
        make_model("qwen3_vl_moe", "hf-5.24/qwen3_moe", 0);
        start();
        put2("model.language_model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
        put_fused("model.language_model.layers.1.mlp.experts.gate_up_proj", E, F, H, GATE, UP, 0, turned);
        put_stacked("model.language_model.layers.1.mlp.experts.down_proj", DOWN, H, F, turned);
        taken();
        experts_are_right();
    }
    for (int stacked = 0; stacked < 2; stacked++) {
        make_model("qwen3_5_moe", "hf-5.24/qwen2_moe-renorm", S);
        start();
        put2("model.language_model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
        put_shared("model.language_model.layers.1.mlp.shared_expert", S);
        put2("model.language_model.layers.1.mlp.shared_expert_gate.weight", SHARED_GATE, 0, 1, H, 0);
        if (stacked) {
            put_fused("model.language_model.layers.1.mlp.experts.gate_up_proj", E, F, H, GATE, UP, 0, 0);
            put_stacked("model.language_model.layers.1.mlp.experts.down_proj", DOWN, H, F, 0);
        } else {
            put_each("model.language_model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
        }
        taken();
        experts_are_right();
        shared_is_right(S);
    }
    /* Both in one file: the second is left over. */
    put_each("model.language_model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
    refused("'model.language_model.layers.1.mlp.experts.down_proj' and 1 more", "asks for it");
    /* A square matrix says nothing about its orientation. */
    make_model("qwen3_vl_moe", "hf-5.24/qwen3_moe", 0);
    model.F = H / 2;
    start();
    put2("model.language_model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
    put_fused("model.language_model.layers.1.mlp.experts.gate_up_proj", E, H / 2, H, GATE, UP, 0, 0);
    put_stacked("model.language_model.layers.1.mlp.experts.down_proj", DOWN, H, H / 2, 0);
    refused("gate_up_proj", "8 x 8 fits [out,in] and [in,out]");
}

static void put_table(xp_dtype d, int64_t rows, int64_t wrong) {
    const int64_t dim[2] = {rows, K};
    xp_tensor *t = add("model.layers.1.ffn.gate.tid2eid", d, 2, dim);
    for (int64_t i = 0; i < rows * K; i++) {
        const int64_t v = i == rows * K - 1 && wrong ? wrong : (i / K + i % K) % E;
        if (d == XP_I64)
            ((int64_t *)t->data)[i] = v;
        else if (d == XP_I32)
            ((int32_t *)t->data)[i] = (int32_t)v;
    }
}

static void put_v4(void) {
    start();
    put2("model.layers.1.ffn.gate.weight", ROUTER, 0, E, H, 0);
    put_each("model.layers.1.ffn.", "w1", "w3", "w2", E);
    put2("model.layers.1.ffn.shared_experts.w1.weight", SGATE, 0, F, H, 0);
    put2("model.layers.1.ffn.shared_experts.w3.weight", SUP, 0, F, H, 0);
    put2("model.layers.1.ffn.shared_experts.w2.weight", SDOWN, 0, H, F, 0);
}

static void a_table_in_place_of_a_bias(void **state) {
    (void)state;
    make_model("deepseek_v4", "hf-5.24/deepseek_v4", F);
    put_v4();
    put1("model.layers.1.ffn.gate.bias", BIAS, E);
    taken();
    experts_are_right();
    shared_is_right(F);
    vector_is_right(XP_PART_SELECT_BIAS, BIAS, E);
    xp_dialect d = model.dialect;
    assert_int_equal(xp_checkpoint_dialect(ck, &model, LAYER, &d), XP_OK);
    assert_int_equal(d.select_on, model.dialect.select_on);
    assert_int_equal(d.select_bias, 1);

    for (int i = 0; i < 2; i++) {
        make_model("deepseek_v4", "hf-5.24/deepseek_v4", F);
        put_v4();
        put_table(i ? XP_I32 : XP_I64, VOCAB, 0);
        refused("no tensor 'model.layers.1.ffn.gate.bias' (selection bias)", "[3]");
        assert_int_equal(xp_checkpoint_dialect(ck, &model, LAYER, &model.dialect), XP_OK);
        assert_int_equal(model.dialect.select_on, XP_ON_TOKEN_TABLE);
        assert_int_equal(model.dialect.select_bias, 0);
        taken();
        shape_is(XP_PART_TABLE, 2, VOCAB, K, 0);
        assert_null(got.part[XP_PART_SELECT_BIAS].data);
        for (int64_t n = 0; n < VOCAB * K; n++)
            assert_true(at(XP_PART_TABLE, n) == (double)((n / K + n % K) % E));
        int32_t rows[4 * K];
        const xp_tensor part = xp_tensor_3d(rows, XP_I32, 1, 4, K);
        xp_layer_weights_copy(&got, XP_PART_TABLE, 0, 5, &part);
        for (int n = 0; n < 4 * K; n++)
            assert_int_equal(rows[n], (5 + n / K + n % K) % E);
    }
    put_v4();
    put_table(XP_I64, VOCAB, E);
    refused("tid2eid", "token id 299, slot 1 is expert 3, expected 0 to 2");
    put_v4();
    put_table(XP_I64, VOCAB, -1);
    refused("tid2eid", "is expert -1");
    put_v4();
    put_table(XP_F32, VOCAB, 0);
    refused("dtype is F32", "expected I64 or I32");
    put_v4();
    put_table(XP_I64, VOCAB - 1, 0);
    refused("shape is [299,2]", "expected [300,2]");
}

/* Two sets of experts: the first of each pair is read, the router [in,out]; what is left over is the second set. */
static void two_sets(void **state) {
    const int64_t rows[2] = {2, E};
    const char *const second[] = {"gate_proj", "up_proj", "down_proj"};
    char name[160];
    (void)state;
    make_model("ernie4_5_vl_moe", "hf-5.24/ernie4_5_moe", 2 * F);
    start();
    put2("model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 1);
    put2("model.layers.1.mlp.gate.weight_1", ROUTER, 9, E, H, 1);
    put_each("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
    put_shared("model.layers.1.mlp.shared_experts", 2 * F);
    xp_tensor *t = add("model.layers.1.mlp.moe_statics.e_score_correction_bias", XP_F32, 2, rows);
    for (int64_t i = 0; i < 2 * E; i++)
        xp_fill_store(t, i, value(i < E ? BIAS : DOWN, 0, i % E, 0));
    for (int e = E; e < 2 * E; e++) {
        for (int i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.%s.weight", e, second[i]);
            put2(name, GATE, 9, F / 2, H, i == 2);
        }
    }
    taken();
    router_is_right(E);
    vector_is_right(XP_PART_SELECT_BIAS, BIAS, E);
    experts_are_right();
    shared_is_right(2 * F);
    snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.up_proj.weight", 2 * E);
    put2(name, UP, 9, F / 2, H, 0);
    refused(name, "");
}

static void small_differences(void **state) {
    (void)state;
    /* [1,E] */
    const int64_t row[2] = {1, E};
    make_model("ernie4_5_moe", "hf-5.24/ernie4_5_moe", 2 * F);
    for (int ndim = 2; ndim > 0; ndim--) {
        start();
        put2("model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
        put_each("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
        put_shared("model.layers.1.mlp.shared_experts", 2 * F);
        xp_tensor *t = add("model.layers.1.mlp.moe_statics.e_score_correction_bias", XP_F32, ndim, row + 2 - ndim);
        for (int64_t i = 0; i < E; i++)
            xp_fill_store(t, i, value(BIAS, 0, i, 0));
        if (ndim == 1)
            break;
        taken();
        vector_is_right(XP_PART_SELECT_BIAS, BIAS, E);
        shared_is_right(2 * F);
    }
    refused("e_score_correction_bias", "shape is [3], expected [1,3]");
    /* Experts without weights have rows of the router, and gate and up that nothing reads. */
    for (int stored = 0; stored < 2; stored++) {
        make_model("longcat_flash", "hf-5.24/longcat_flash", 0);
        model.dialect.null_experts = 2;
        start();
        put2("model.layers.1.mlp.router.classifier.weight", ROUTER, 0, E + 2, H, 0);
        put1("model.layers.1.mlp.router.e_score_correction_bias", BIAS, E + 2);
        put_each("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
        for (int e = E; e < E + 2 * stored; e++) {
            char name[160];
            snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.gate_proj.weight", e);
            put2(name, GATE, 9, F, H, 0);
            snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.up_proj.weight", e);
            put2(name, UP, 9, F, H, 0);
        }
        taken();
        router_is_right(E + 2);
        vector_is_right(XP_PART_SELECT_BIAS, BIAS, E + 2);
        experts_are_right();
    }
    put2("model.layers.1.mlp.experts.5.up_proj.weight", UP, 9, F, H, 0);
    refused("experts.5.up_proj.weight", "asks for it");
}

/* A factor an expert is in no family of the table: the caller's own row has it. */
static void a_row_of_the_callers(void **state) {
    (void)state;
    const xp_tensor_names names = {.model_type = "own",
                                   .prefix = "L{L}.",
                                   .scope = "m.",
                                   .router = "m.r",
                                   .expert_scale = "m.scale",
                                   .expert = {{.gate = "m.g", .up = "m.u", .down = "m.d{E}", .orient = XP_EIO}}};
    make_model("own", "hf-5.24/qwen3_moe", 0);
    model.dialect.expert_scale = 1;
    start();
    put2("L1.m.r", ROUTER, 0, E, H, 0);
    put1("L1.m.scale", BIAS, E);
    put_stacked("L1.m.g", GATE, F, H, 1);
    put_stacked("L1.m.u", UP, F, H, 1);
    for (int e = 0; e < E; e++) {
        char name[16];
        snprintf(name, sizeof name, "L1.m.d%d", e);
        put2(name, DOWN, e, H, F, 1);
    }
    write_as("f.safetensors");
    assert_int_equal(read_file("f.safetensors"), XP_E_ARG);
    has("no names of tensors are known for model_type 'own'");
    assert_int_equal(xp_checkpoint_read_as(ck, &names, &model, LAYER, &got), XP_OK);
    experts_are_right();
    vector_is_right(XP_PART_EXPERT_SCALE, BIAS, E);
    /* The record asks for a part that the row has no name for. */
    model.dialect.router_bias = 1;
    xp_layer_weights_close(&got);
    assert_int_equal(xp_checkpoint_read_as(ck, &names, &model, LAYER, &got), XP_E_ARG);
    has("'router bias'");
    has("names of own");
}

/* ---- every family ---- */

typedef struct {
    int n;
    char name[64][160];
} names_seen;

static void add_expected(const char *name, const char *shape, const char *part, void *arg) {
    names_seen *seen = arg;
    int64_t dim[3];
    int ndim = 0;
    assert_true(strlen(part) > 0);
    for (const char *p = shape; *p && *p != ']'; p++) {
        if (*p == '[' || *p == ',')
            dim[ndim++] = strtoll(p + 1, NULL, 10);
    }
    const char *each = strstr(name, "{E}");
    const int is_table = strstr(name, "tid2eid") != NULL;
    for (int e = 0; e < (each ? E : 1); e++) {
        char *full = seen->name[seen->n++];
        assert_true(seen->n <= 64);
        if (each)
            snprintf(full, 160, "%.*s%d%s", (int)(each - name), name, e, each + 3);
        else
            snprintf(full, 160, "%s", name);
        (void)add(full, is_table ? XP_I64 : XP_F32, ndim, dim);
    }
}

/* 0: a model_type of our own, of which nobody publishes weights. */
static int is_published(const xp_family *f) {
    return f->preset[0] != NULL || f->preset[1] != NULL;
}

/* What `explain` lists is what the reader wants: a file of just that is taken, without any one of them it is not. */
static void every_family_has_names(void **state) {
    (void)state;
    int families = 0;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        names_seen seen = {0};
        if (!is_published(f))
            continue;
        families++;
        const int shared =
            f->slot[XP_SLOT_SHARED].from != XP_SLOT_NONE || f->slot[XP_SLOT_SHARED_COUNT].from != XP_SLOT_NONE;
        assert_non_null(xp_tensor_names_find(f->model_type));
        make_model(f->model_type, f->preset[f->preset[1] != NULL], shared ? S : 0);
        start();
        assert_int_equal(xp_checkpoint_expect(&model, LAYER, add_expected, &seen), XP_OK);
        assert_true(seen.n >= 3);
        taken();
        for (int i = 0; i < file.n; i++) {
            char *name = file.name[i], first = name[0];
            name[0] = '#';
            write_as("f.safetensors");
            assert_int_equal(read_file("f.safetensors"), XP_E_FORMAT);
            has(seen.name[i]);
            name[0] = first;
        }
    }
    int rows = 0;
    for (const xp_tensor_names *n = xp_tensor_names_of; n->model_type; n++)
        rows++;
    assert_int_equal(rows, families);
}

typedef struct {
    size_t group;
    int asked;
} asking;

/* A line of the group is this name, of the first expert, and this shape, or the first of two. */
static void find_saved(const char *name, const char *shape, const char *part, void *arg) {
    asking *a = arg;
    char line[200];
    const char *each = strstr(name, "{E}");
    const int bytes = (int)strcspn(shape, " ");
    (void)part;
    if (each)
        snprintf(line, sizeof line, "%.*s0%s %.*s", (int)(each - name), name, each + 3, bytes, shape);
    else
        snprintf(line, sizeof line, "%s %.*s", name, bytes, shape);
    a->asked++;
    for (size_t i = 0; i < SAVED_LINES && saved[a->group].line[i]; i++) {
        if (strcmp(saved[a->group].line[i], line) == 0)
            return;
    }
    fail_msg("%s: '%s' is not in the file", saved[a->group].families, line);
}

/* What the reader asks for is what the families' own classes wrote, all of it. */
static void saved_names_are_asked_for(void **state) {
    (void)state;
    for (const xp_family *f = xp_families; f->model_type; f++) {
        const char *preset = f->preset[f->preset[1] != NULL];
        size_t group = 0;
        if (!is_published(f))
            continue;
        char list[256], type[40];
        /* DeepSeek-V3's class under another name, which transformers does not know. */
        snprintf(type, sizeof type, "|%s|", strcmp(f->model_type, "kimi_k2") ? f->model_type : "deepseek_v3");
        for (; group < SAVED_GROUPS; group++) {
            snprintf(list, sizeof list, "|%s|", saved[group].families);
            if (strstr(list, type))
                break;
        }
        if (group == SAVED_GROUPS)
            fail_msg("%s: no names", f->model_type);
        assert_int_equal(xp_model_of("saved", xp_dialect_find(preset), 3, 16, 24, 6, 2, saved[group].shared, &model),
                         XP_OK);
        snprintf(model.model_type, sizeof model.model_type, "%s", f->model_type);
        assert_int_equal(xp_model_set_latent(&model, f->around & XP_LATENT_NORM ? 10 : 0), XP_OK);
        assert_int_equal(xp_model_set_around(&model, f->around), XP_OK);
        model.dialect.null_experts = saved[group].nulls;
        assert_int_equal(xp_model_set_router_width(&model, model.dialect.router_in == XP_ROUTER_RECURRENT_MLP ? 10 : 0),
                         XP_OK);
        asking a = {.group = group};
        int lines = 0;
        assert_int_equal(xp_checkpoint_expect(&model, LAYER, find_saved, &a), XP_OK);
        while (lines < SAVED_LINES && saved[group].line[lines])
            lines++;
        if (a.asked != lines)
            fail_msg("%s: %d of %d names are asked for", f->model_type, a.asked, lines);
    }
}

/* As the class wrote it with moe_latent_size 10: H 16, E 6, F 24, shared 12. */
static void take_line(const char *name, const char *shape, const char *part, void *arg) {
    char *text = arg;
    const size_t used = strlen(text);
    (void)part;
    snprintf(text + used, 2000 - used, "%s %.*s\n", strstr(name, "mixer."), (int)strcspn(shape, " "), shape);
}

static void latent_names_are_asked_for(void **state) {
    (void)state;
    char text[2000] = "";
    assert_int_equal(xp_model_of("saved", xp_dialect_find("hf-5.24/nemotron_h"), 3, 16, 24, 6, 2, 12, &model), XP_OK);
    assert_int_equal(xp_model_set_latent(&model, 10), XP_OK);
    strcpy(model.model_type, "nemotron_h");
    assert_int_equal(xp_checkpoint_expect(&model, LAYER, take_line, text), XP_OK);
    assert_string_equal(text, "mixer.gate.weight [6,16]\n"
                              "mixer.gate.e_score_correction_bias [6]\n"
                              "mixer.fc1_latent_proj.weight [10,16]\n"
                              "mixer.fc2_latent_proj.weight [16,10]\n"
                              "mixer.experts.{E}.up_proj.weight [24,10]\n"
                              "mixer.experts.{E}.down_proj.weight [10,24]\n"
                              "mixer.shared_experts.up_proj.weight [12,16]\n"
                              "mixer.shared_experts.down_proj.weight [16,12]\n");
}

static const char *in_layer(int layer, const char *name) {
    static char full[160];
    snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    return full;
}

/* The router's MLP; layer 0 has no factors of a state, a later one has them even where no other block is read. */
static void router_with_an_mlp(void **state) {
    static const char *const name[] = {"down_proj.weight",       "down_proj.bias",        "router_states_scale",
                                       "router_mlp.norm.weight", "router_mlp.fc1.weight", "router_mlp.fc1.bias",
                                       "router_mlp.fc2.weight",  "router_mlp.fc2.bias"};
    (void)state;
    for (int first = 0; first < 2; first++) {
        char full[160];
        const int layer = first ? 0 : LAYER;
        make_model("zaya", "hf-5.24/zaya", 0);
        model.moe[layer] = 1;
        start();
        put2(in_layer(layer, "mlp.gate.router_mlp.out_proj.weight"), ROUTER, 0, E + 1, R, 0);
        put1(in_layer(layer, "mlp.gate.balancing_biases"), BIAS, E + 1);
        put_fused(in_layer(layer, "mlp.experts.gate_up_proj"), E, F, H, GATE, UP, 0, 0);
        put_stacked(in_layer(layer, "mlp.experts.down_proj"), DOWN, H, F, 0);
        for (int i = 0; i < XP_ROUTER_MLP_NAMES; i++) {
            snprintf(full, sizeof full, "%s", in_layer(layer, "mlp.gate."));
            strcat(full, name[i]);
            if (i == 0 || i == 4 || i == 6)
                put2(full, i, 0, R, i ? R : H, 0);
            else if (i != 2 || !first)
                put1(full, i, R);
        }
        write_as("f.safetensors");
        if (read_layer("f.safetensors", layer) != XP_OK)
            fail_msg("%s", xp_error_text());
        experts_are_right();
        vector_is_right(XP_PART_SELECT_BIAS, BIAS, E + 1);
        shape_is(XP_PART_ROUTER, 2, E + 1, R, 0);
        for (int64_t n = 0; n < (E + 1) * R; n++)
            assert_true(at(XP_PART_ROUTER, n) == value(ROUTER, 0, n / R, n % R));
        for (int i = 0; i < XP_ROUTER_MLP_NAMES; i++) {
            const xp_part p = XP_PART_ROUTER_DOWN + (xp_part)i;
            const int64_t columns = i == 0 ? H : R;
            if (i == 2 && first) {
                assert_null(got.part[p].data);
            } else if (i == 0 || i == 4 || i == 6) {
                shape_is(p, 2, R, columns, 0);
                for (int64_t n = 0; n < R * columns; n++)
                    assert_true(at(p, n) == value(i, 0, n / columns, n % columns));
            } else {
                vector_is_right(p, i, R);
            }
        }
        if (first) {
            put1("model.layers.0.mlp.gate.router_states_scale", 2, R);
            write_as("f.safetensors");
            assert_int_equal(read_layer("f.safetensors", 0), XP_E_FORMAT);
            has("'model.layers.0.mlp.gate.router_states_scale': nothing of tiny");
        }
    }
}

/* ---- refusals ---- */

static void put_qwen3(void) {
    start();
    put2("model.layers.1.mlp.gate.weight", ROUTER, 0, E, H, 0);
    put_each("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj", E);
}

static int item_of(const char *name) {
    for (int i = 0; i < file.n; i++) {
        if (strcmp(file.name[i], name) == 0)
            return i;
    }
    fail_msg("no item %s", name);
    return -1;
}

static void rename_item(const char *from, const char *to) {
    snprintf(file.name[item_of(from)], sizeof file.name[0], "%s", to);
}

/* Another dtype for an item: its values are not looked at. */
static void retype(const char *name, xp_dtype d) {
    file.item[item_of(name)].tensor.dtype = d;
}

#define UP2 "model.layers.1.mlp.experts.2.up_proj.weight"

static void missing_tensors_are_named(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    put_qwen3();
    rename_item(UP2, "model.layers.2.mlp.experts.2.up_proj.weight");
    refused("no tensor '" UP2 "' (experts' first matrix)", "expected one of shape [6,8]");
    /* A name that begins so is shown: what a quantised file has in its place. */
    put_qwen3();
    rename_item(UP2, UP2 "_blocks");
    refused("no tensor '" UP2 "'", "there is '" UP2 "_blocks'");
    put_qwen3();
    rename_item("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.router.weight");
    refused("no tensor 'model.layers.1.mlp.gate.weight' (router)", "[3,8]");
    start();
    put2("model.layers.0.mlp.gate.weight", ROUTER, 0, E, H, 0);
    refused("no tensor of layer 1's MoE block", "'model.layers.1.'");
    start();
    refused("no tensor of layer 1's MoE block", "mlp.");
}

static void wrong_tensors_are_named(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    put_qwen3();
    file.item[item_of(UP2)].tensor = xp_tensor_2d(file.item[item_of(UP2)].tensor.data, XP_F32, F, H - 1);
    refused("tensor '" UP2 "' (experts' first matrix): shape is [6,7]", "expected [6,8]");
    put_qwen3();
    file.item[item_of(UP2)].tensor = xp_tensor_2d(file.item[item_of(UP2)].tensor.data, XP_F32, H, F);
    refused("shape is [8,6]", "expected [6,8]");
    put_qwen3();
    file.item[item_of(UP2)].tensor = xp_tensor_1d(file.item[item_of(UP2)].tensor.data, XP_F32, F * H);
    refused("shape is [48]", "expected [6,8]");
    put_qwen3();
    retype(UP2, XP_E4M3);
    refused("tensor '" UP2 "'", "dtype is F8_E4M3, expected F32, BF16, F16 or F64");
    put_qwen3();
    retype("model.layers.1.mlp.gate.weight", XP_I32);
    refused("gate.weight", "dtype is I32");
    /* One expert's in another dtype than the others'; the router's may differ from theirs. */
    put_qwen3();
    retype(UP2, XP_BF16);
    refused("tensor '" UP2 "'", "dtype is BF16, but the tensors before it are f32: they contradict one another");
    put_qwen3();
    retype("model.layers.1.mlp.gate.weight", XP_F64);
    taken();
    assert_int_equal(got.part[XP_PART_ROUTER].dtype, XP_F64);
    assert_int_equal(got.part[XP_PART_UP].dtype, XP_F32);
}

static void extra_tensors_are_named(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    put_qwen3();
    put1(UP2 "_scale_inv", BIAS, 1);
    refused("tensor '" UP2 "_scale_inv'", "tiny (qwen3_moe, E 3, dialect hf-5.24/qwen3_moe) asks for it");
    put_qwen3();
    put2("model.layers.1.mlp.experts.3.up_proj.weight", UP, 3, F, H, 0);
    put2("model.layers.1.mlp.experts.3.down_proj.weight", DOWN, 3, H, F, 0);
    refused("tensor 'model.layers.1.mlp.experts.3.down_proj.weight' and 1 more", "asks for it");
    put_qwen3();
    put1("model.layers.1.mlp.gate.bias", BIAS, E);
    refused("tensor 'model.layers.1.mlp.gate.bias'", "asks for it");
    /* A number is spelled in one way. */
    put_qwen3();
    rename_item(UP2, "model.layers.1.mlp.experts.02.up_proj.weight");
    refused("no tensor '" UP2 "'", "[6,8]");
    /* Two classes' names for one layer. */
    make_model("llama4", "hf-5.24/llama4", F);
    start();
    put2("model.layers.1.feed_forward.router.weight", ROUTER, 0, E, H, 0);
    put2("language_model.model.layers.1.feed_forward.router.weight", ROUTER, 0, E, H, 0);
    refused("'language_model.model.layers.1.' and under 'model.layers.1.'", "contradict");
}

static void models_are_checked(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    put_qwen3();
    taken();
    xp_layer_weights_close(&got);
    assert_int_equal(xp_checkpoint_read(ck, &model, 0, &got), XP_E_ARG);
    has("layer: 0, expected a MoE block of tiny (3 layers)");
    assert_int_equal(xp_checkpoint_read(ck, &model, 3, &got), XP_E_ARG);
    assert_int_equal(xp_checkpoint_read(ck, &model, -1, &got), XP_E_ARG);
    assert_int_equal(xp_model_shrink(&model, 2), XP_OK);
    assert_int_equal(xp_checkpoint_read(ck, &model, LAYER, &got), XP_E_ARG);
    has("shrink: 2, expected 1");
}

/* ---- several files ---- */

static void write_text(const char *name, const char *text) {
    FILE *f = fopen(in_folder(name), "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

/* An index over the items: item i is in file i % files. swap: this one is said to be in the next file. */
static void write_index(const char *name, int files, int swap) {
    static char text[MOST * 300];
    size_t used =
        (size_t)snprintf(text, sizeof text, "{\"metadata\": {}, \"weight_map\": {\"other\": \"gone.safetensors\"");
    for (int i = 0; i < file.n; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, ", \"%s\": \"part-%d.safetensors\"", file.name[i],
                                 (i + (i == swap)) % files);
    snprintf(text + used, sizeof text - used, "}}");
    write_text(name, text);
    for (int p = 0; p < files; p++) {
        xp_safetensors_item some[MOST];
        char part[40];
        int n = 0;
        for (int i = p; i < file.n; i += files)
            some[n++] = file.item[i];
        snprintf(part, sizeof part, "part-%d.safetensors", p);
        assert_int_equal(xp_safetensors_write(in_folder(part), some, n, NULL, 0), XP_OK);
    }
}

static void an_index_over_files(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    put_qwen3();
    write_index("w.index.json", 3, -1); /* names a file that is not there and not needed */
    assert_int_equal(read_file("w.index.json"), XP_OK);
    experts_are_right();
    router_is_right(E);
    /* The index places a tensor in the wrong file. */
    const int swap = item_of(UP2);
    write_index("w.index.json", 3, swap);
    assert_int_equal(read_file("w.index.json"), XP_E_FORMAT);
    has("says that '" UP2 "' is in part-");
    has("which does not have it");
    /* A file has a tensor of the block that the index does not list, or places elsewhere. */
    write_index("w.index.json", 3, -1);
    file.item[file.n] = file.item[swap];
    snprintf(file.name[file.n], sizeof file.name[0], "model.layers.1.mlp.gate.bias");
    file.item[file.n].name = file.name[file.n];
    assert_int_equal(
        xp_safetensors_write(in_folder("part-1.safetensors"),
                             (xp_safetensors_item[]){file.item[1], file.item[4], file.item[7], file.item[file.n]}, 4,
                             NULL, 0),
        XP_OK);
    assert_int_equal(read_file("w.index.json"), XP_E_FORMAT);
    has("part-1.safetensors: has 'model.layers.1.mlp.gate.bias', which the index does not list");
    assert_int_equal(xp_safetensors_write(
                         in_folder("part-1.safetensors"),
                         (xp_safetensors_item[]){file.item[1], file.item[4], file.item[7], file.item[2]}, 4, NULL, 0),
                     XP_OK);
    assert_int_equal(read_file("w.index.json"), XP_E_FORMAT);
    has("which the index places in part-2.safetensors");
    /* A file that is needed is gone. */
    assert_int_equal(unlink(in_folder("part-1.safetensors")), 0);
    assert_int_equal(read_file("w.index.json"), XP_E_IO);
    has("part-1.safetensors");
}

static void index_is(const char *text, const char *one, const char *two) {
    write_text("bad.index.json", text);
    assert_int_equal(read_file("bad.index.json"), XP_E_FORMAT);
    has("bad.index.json");
    has(one);
    has(two);
}

static void wrong_indices_are_refused(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    index_is("", "bad.index.json:1:", "JSON");
    index_is("[]", "weight_map is missing", "expected an object");
    index_is("{}", "weight_map is missing", "expected an object");
    index_is("{\"weight_map\": 3}", "weight_map is no object", "expected an object");
    index_is("{\"weight_map\": {\"a\": 3}}", "weight_map['a'] is no text", "beside the index");
    index_is("{\"weight_map\": {\"a\": \"../f.safetensors\"}}", "weight_map['a'] is '../f.safetensors'", "beside");
    index_is("{\"weight_map\": {\"a\": \"x/f.safetensors\"}}", "'x/f.safetensors'", "beside");
    index_is("{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "'/etc/passwd'", "beside");
    index_is("{\"weight_map\": {\"a\": \"\"}}", "weight_map['a'] is ''", "beside");
    index_is("{\"weight_map\": {\"a\": \"f\", \"a\": \"f\"}}", "duplicate", "JSON");
    index_is("{\"weight_map\": {}}", "no tensor of layer 1's MoE block", "model.layers.1.");
}

static void a_folder_holds_one_of_two(void **state) {
    (void)state;
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    put_qwen3();
    assert_int_equal(mkdir(in_folder("d"), 0700), 0);
    assert_int_equal(read_file("d"), XP_E_IO);
    has("holds neither model.safetensors nor model.safetensors.index.json");
    write_as("d/model.safetensors");
    assert_int_equal(read_file("d"), XP_OK);
    experts_are_right();
    write_text("d/model.safetensors.index.json", "{\"weight_map\": {}}");
    assert_int_equal(read_file("d"), XP_E_FORMAT);
    has("holds both");
    assert_int_equal(unlink(in_folder("d/model.safetensors")), 0);
    assert_int_equal(read_file("d"), XP_E_FORMAT);
    has("no tensor of layer 1");
    assert_int_equal(read_file("none"), XP_E_IO);
    has("none: cannot open");
}

/* ---- dtypes and shards ---- */

static void codes_stay_as_they_are(void **state) {
    (void)state;
    static const xp_dtype type[] = {XP_BF16, XP_F16, XP_F64};
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    for (int k = 0; k < 3; k++) {
        put_qwen3();
        for (int i = 0; i < file.n; i++) {
            xp_tensor *t = &file.item[i].tensor;
            t->dtype = type[k];
            for (int64_t n = 0; n < xp_tensor_count(t); n++)
                xp_fill_store(t, n, (double)(i * 16 + (int)(n % 16)));
        }
        taken();
        assert_int_equal(got.part[XP_PART_UP].dtype, type[k]);
        assert_int_equal(got.part[XP_PART_ROUTER].dtype, type[k]);
        const int up1 = item_of("model.layers.1.mlp.experts.1.up_proj.weight");
        for (int64_t n = 0; n < F * H; n++)
            assert_true(at(XP_PART_UP, (2 * F + F) * H + n) == (double)(up1 * 16 + (int)(n % 16)));
    }
}

/* A rank's rows: of some experts, of some of their rows, in another dtype. */
static void shards_are_rows(void **state) {
    (void)state;
    float rows[2 * 3 * H];
    uint16_t bf[E];
    make_model("qwen3_moe", "hf-5.24/qwen3_moe", 0);
    put_qwen3();
    taken();
    const xp_tensor t = xp_tensor_3d(rows, XP_F32, 2, 3, H);
    xp_layer_weights_copy(&got, XP_PART_UP, 1, F + 2, &t);
    for (int64_t n = 0; n < 2 * 3 * H; n++)
        assert_true((double)rows[n] == value(UP, 1 + n / (3 * H), 2 + n / H % 3, n % H));
    const xp_tensor none = xp_tensor_3d(rows, XP_F32, E, 0, H);
    xp_layer_weights_copy(&got, XP_PART_UP, 0, 2 * F, &none);
    const xp_tensor r = xp_tensor_3d(rows, XP_F32, 1, 2, H);
    xp_layer_weights_copy(&got, XP_PART_ROUTER, 0, 1, &r);
    for (int64_t n = 0; n < 2 * H; n++)
        assert_true((double)rows[n] == value(ROUTER, 0, 1 + n / H, n % H));

    make_model("gpt_oss", "hf-5.24/gpt_oss", 0);
    put_gpt_oss();
    taken();
    const xp_tensor b = xp_tensor_3d(rows, XP_F32, 2, 2, 1);
    xp_layer_weights_copy(&got, XP_PART_DOWN_BIAS, 1, 3, &b);
    for (int64_t n = 0; n < 4; n++)
        assert_true((double)rows[n] == value(DOWN_BIAS, 1 + n / 2, 3 + n % 2, 0));
    const xp_tensor v = xp_tensor_3d(bf, XP_BF16, 1, E, 1);
    xp_layer_weights_copy(&got, XP_PART_ROUTER_BIAS, 0, 0, &v);
    /* 900000 to 900200 lie between 897024 and 901120: bf16 numbers are 4096 apart there */
    for (int i = 0; i < E; i++)
        assert_true(xp_widen(bf, XP_BF16, i) == 901120.0);
}

/* ---- a check with a file's weights ---- */

static xp_run_options run;
static xp_weights weights;

static void check_layer(const char *mesh, double *out_loss) {
    xp_case c;
    xp_run_result r;
    xp_case_defaults(XP_CASE_LAYER, NULL, &c);
    c.dim['T' - 'A'] = 48;
    c.layers = LAYER + 1;
    c.data = XP_DATA_TEXT;
    c.dtype[XP_G_ACT] = XP_BF16;
    c.deterministic = 1;
    assert_int_equal(xp_mesh_spec_parse(mesh, &c.mesh), XP_OK);
    if (xp_case_run(&c, &run, &r) != XP_OK)
        fail_msg("%s: %s", mesh, xp_error_text());
    if (r.judgement.verdict != XP_V_PASS)
        fail_msg("%s: %s: %s", mesh, xp_verdict_name(r.judgement.verdict), r.judgement.text);
    assert_int_equal(r.parity_wrong, 0);
    *out_loss = r.result.loss;
    xp_run_result_close(&r);
}

/* Small seeded values, so that a layer's outputs are as large as its inputs. */
static void scatter_values(void) {
    for (int i = 0; i < file.n; i++) {
        const int64_t n = xp_tensor_count(&file.item[i].tensor);
        for (int64_t k = 0; k < n && file.item[i].tensor.dtype == XP_F32; k++)
            xp_fill_store(&file.item[i].tensor, k, 0.3 * xp_rng_normal(7, (uint64_t)i, (uint64_t)k));
    }
}

static void load(void) {
    xp_weights_close(&weights);
    write_as("f.safetensors");
    xp_checkpoint_close(ck);
    assert_int_equal(xp_checkpoint_open(in_folder("f.safetensors"), &ck), XP_OK);
    if (xp_weights_load(ck, &model, &weights) != XP_OK)
        fail_msg("%s", xp_error_text());
}

/* On every mesh the ranks take their rows of the file: one rank's run is reproduced row by row, and it is another one
 * than with seeded weights or with a number of the file changed. */
static void meshes_take_their_rows(void **state) {
    (void)state;
    static const char *const mesh[] = {"sim:fsdp=1", "sim:fsdp=3,ep=3", "sim:fsdp=6,ep=3", "sim:dp=2,fsdp=2,ep=1"};
    for (int v4 = 0; v4 < 2; v4++) {
        make_model(v4 ? "deepseek_v4" : "gpt_oss", v4 ? "hf-5.24/deepseek_v4-hash" : "hf-5.24/gpt_oss", v4 ? F : 0);
        assert_int_equal(xp_model_override(&model, LAYER + 1, 0, 0), XP_OK);
        if (v4) {
            put_v4();
            put_table(XP_I64, VOCAB, 0);
        } else {
            put_gpt_oss();
        }
        scatter_values();
        load();
        run = (xp_run_options){.impl = xp_backend_ref(), .model = &model, .weights = &weights, .against_one_rank = 1};
        double loss[4], other;
        for (int i = 0; i < 4; i++) {
            check_layer(mesh[i], &loss[i]);
            assert_true(loss[i] == loss[0]);
        }
        for (int i = 0; i < file.n; i++) { /* every tensor of the file counts */
            xp_tensor *t = &file.item[i].tensor;
            const size_t bytes = xp_dtype_bytes(t->dtype, xp_tensor_count(t));
            void *kept = malloc(bytes);
            assert_non_null(kept);
            memcpy(kept, t->data, bytes);
            for (int64_t k = 0; k < xp_tensor_count(t); k++) {
                if (t->dtype == XP_I64)
                    ((int64_t *)t->data)[k] = (k / K * 2 + k % K + 1) % E; /* one token's experts are distinct */
                else
                    xp_fill_store(t, k, 0.25 - xp_widen(kept, t->dtype, k));
            }
            load();
            check_layer(mesh[0], &other);
            if (other == loss[0])
                fail_msg("%s: the loss does not depend on it", file.name[i]);
            memcpy(t->data, kept, bytes);
            free(kept);
        }
        run.weights = NULL;
        check_layer(mesh[0], &other);
        assert_true(other != loss[0]);
    }
    xp_weights_close(&weights);
    /* One of several layers is missing: nothing is left open. */
    make_model("gpt_oss", "hf-5.24/gpt_oss", 0);
    put_gpt_oss();
    write_as("f.safetensors");
    xp_checkpoint_close(ck);
    assert_int_equal(xp_checkpoint_open(in_folder("f.safetensors"), &ck), XP_OK);
    assert_int_equal(xp_weights_load(ck, &model, &weights), XP_E_FORMAT);
    has("no tensor of layer 2's MoE block");
    assert_null(weights.layer[LAYER]);
}

/* ---- the program ---- */

static int open_folder(void **state) {
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int close_folder(void **state) {
    static const char *const left[] = {
        "f.safetensors",      "w.index.json",       "bad.index.json",      "part-0.safetensors",
        "part-2.safetensors", "part-1.safetensors", "d/model.safetensors", "d/model.safetensors.index.json"};
    (void)state;
    start();
    xp_layer_weights_close(&got);
    xp_checkpoint_close(ck);
    for (size_t i = 0; i < sizeof left / sizeof *left; i++)
        (void)unlink(in_folder(left[i]));
    (void)rmdir(in_folder("d"));
    return rmdir(folder);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_tensor_an_expert),
        cmocka_unit_test(all_experts_in_one_tensor),
        cmocka_unit_test(rows_in_turn_and_biases),
        cmocka_unit_test(rows_of_its_own_kind),
        cmocka_unit_test(rows_of_all_experts),
        cmocka_unit_test(norms_around_the_experts),
        cmocka_unit_test(norms_of_gemma4),
        cmocka_unit_test(norm_and_bias_of_the_sum),
        cmocka_unit_test(shared_experts_are_joined),
        cmocka_unit_test(rows_are_put_in_turn),
        cmocka_unit_test(two_layouts_give_the_same_bits),
        cmocka_unit_test(a_table_in_place_of_a_bias),
        cmocka_unit_test(two_sets),
        cmocka_unit_test(small_differences),
        cmocka_unit_test(a_row_of_the_callers),
        cmocka_unit_test(every_family_has_names),
        cmocka_unit_test(saved_names_are_asked_for),
        cmocka_unit_test(latent_names_are_asked_for),
        cmocka_unit_test(router_with_an_mlp),
        cmocka_unit_test(missing_tensors_are_named),
        cmocka_unit_test(wrong_tensors_are_named),
        cmocka_unit_test(extra_tensors_are_named),
        cmocka_unit_test(models_are_checked),
        cmocka_unit_test(an_index_over_files),
        cmocka_unit_test(wrong_indices_are_refused),
        cmocka_unit_test(a_folder_holds_one_of_two),
        cmocka_unit_test(codes_stay_as_they_are),
        cmocka_unit_test(shards_are_rows),
        cmocka_unit_test(meshes_take_their_rows),
    };
    return cmocka_run_group_tests(tests, open_folder, close_folder);
}
