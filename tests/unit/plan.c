/* The plan: shards that partition every parameter on every mesh of 1 to 8 ranks, sums that agree with one another, and
 * options that are refused by name. Expected shards are computed here element by element, not by the plan's formulas.
 */
#include "plan.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static xp_model model;
static xp_plan plan;

static void has(const char *part) {
    if (!strstr(xp_error_text(), part))
        fail_msg("expected '%s' in: %s", part, xp_error_text());
}

static void must(xp_status st) {
    if (st != XP_OK)
        fail_msg("%s", xp_error_text());
}

static xp_mesh_spec mesh_of(const char *text) {
    xp_mesh_spec s;
    must(xp_mesh_spec_parse(text, &s));
    return s;
}

/* Widths that no mesh divides, a shared expert with gate, E experts. */
static void odd_model(int64_t E) {
    must(xp_model_of("odd", xp_dialect_find("hf-5.24/qwen2_moe"), 2, 5, 3, E, E < 3 ? E : 3, 7, &model));
}

static void make(const char *mesh, const xp_step_options *o) {
    const xp_mesh_spec s = mesh_of(mesh);
    must(xp_plan_make(&model, &s, o, &plan));
}

/* Every mesh with a world of 1 to 8: fn(mesh) with plan made for it. */
static void each_mesh(void (*fn)(void), const xp_step_options *o) {
    int meshes = 0;
    for (int world = 1; world <= 8; world++)
        for (int dp = 1; dp <= world; dp++)
            for (int ep = 1; ep <= world; ep++)
                for (int ep_fsdp = 1; ep_fsdp <= world; ep_fsdp++) {
                    if (world % dp || world % (ep * ep_fsdp))
                        continue;
                    char text[96];
                    snprintf(text, sizeof text, "sim:dp=%d,fsdp=%d,ep=%d,ep_fsdp=%d", dp, world / dp, ep, ep_fsdp);
                    odd_model(3 * ep);
                    make(text, o);
                    fn();
                    xp_plan_close(&plan);
                    meshes++;
                }
    /* Divisors of the world times its ordered factorisations in three: 1*1 + 2*3 + 2*3 + 3*6 + 2*3 + 4*9 + 2*3 + 4*10.
     */
    assert_int_equal(meshes, 119);
}

/* ---- shards ---- */

/* Adds 1 to owner and to holder of every element that the shard covers. */
static void mark(const xp_plan_param *q, const xp_plan_shard *s, uint8_t *owner, uint8_t *holder) {
    for (int64_t g = s->g0; g < s->g0 + s->groups; g++)
        for (int64_t r = s->r0; r < s->r0 + s->rows; r++)
            for (int64_t n = 0; n < q->N; n++) {
                const int64_t at = (g * q->R + r) * q->N + n;
                assert_true(g < q->G && r < q->R);
                owner[at] = (uint8_t)(owner[at] + (s->owner != 0));
                holder[at]++;
            }
}

static void check_partition(void) {
    enum { ROOM = 8192 };
    static uint8_t owner[32][ROOM], holder[32][ROOM];
    xp_plan_shard shard[32];
    memset(owner, 0, sizeof owner);
    memset(holder, 0, sizeof holder);
    assert_true(plan.params <= 32);
    for (int rank = 0; rank < plan.mesh.world; rank++) {
        const int64_t total = xp_plan_shards(&plan, rank, shard);
        int64_t at = 0;
        for (int i = 0; i < plan.params; i++) {
            const xp_plan_param *q = &plan.param[i];
            assert_true(q->G * q->R * q->N <= ROOM);
            assert_true(shard[i].offset == at);
            assert_true(shard[i].count == shard[i].groups * shard[i].rows * q->N);
            at += shard[i].count;
            mark(q, &shard[i], owner[i], holder[i]);
        }
        assert_true(total == at);
    }
    for (int i = 0; i < plan.params; i++) {
        const xp_plan_param *q = &plan.param[i];
        const int copies = q->expert ? plan.mesh.ep_dp : plan.mesh.dp;
        for (int64_t n = 0; n < q->G * q->R * q->N; n++) {
            assert_int_equal(owner[i][n], 1);
            assert_int_equal(holder[i][n], copies);
        }
    }
}

static void every_element_has_one_owner(void **state) {
    (void)state;
    const xp_step_options o = xp_step_defaults();
    each_mesh(check_partition, &o);
}

/* torch.chunk, by its documentation: pieces of ceil(R/P) until nothing is left, and then empty ones. */
static void chunks(void **state) {
    (void)state;
    for (int64_t R = 0; R <= 40; R++)
        for (int P = 1; P <= 12; P++) {
            int64_t left = R, from = 0;
            const int64_t piece = (int64_t)ceil((double)R / P);
            for (int i = 0; i < P; i++) {
                int64_t start, count;
                const int64_t want = left < piece ? left : piece;
                xp_plan_chunk(R, P, i, &start, &count);
                assert_true(start == from && count == want);
                from += want;
                left -= want;
            }
            assert_true(left == 0);
        }
}

/* The row tables of gather and scatter are the shards, seen from the axis. */
static void check_rows(void) {
    int64_t start[8], rows[8];
    xp_plan_shard shard[32];
    for (int rank = 0; rank < plan.mesh.world; rank++) {
        xp_plan_shards(&plan, rank, shard);
        for (int i = 0; i < plan.params; i++) {
            const xp_axis axis[2] = {plan.param[i].gather, plan.param[i].reduce};
            for (int a = 0; a < 2; a++) {
                assert_int_equal(xp_plan_rows(&plan, i, axis[a], start, rows), xp_mesh_axis_size(&plan.mesh, axis[a]));
                const int place = xp_mesh_axis_index(&plan.mesh, axis[a], rank);
                assert_true(start[place] == shard[i].r0 && rows[place] == shard[i].rows);
            }
            int64_t sum = 0;
            for (int k = 0; k < xp_plan_rows(&plan, i, plan.param[i].gather, start, rows); k++) {
                assert_true(start[k] == sum);
                sum += rows[k];
            }
            assert_true(sum == plan.param[i].R);
        }
    }
}

static void row_tables_agree_with_shards(void **state) {
    (void)state;
    const xp_step_options o = xp_step_defaults();
    each_mesh(check_rows, &o);
}

/* ---- tokens ---- */

static void check_tokens(void) {
    const int64_t unit = plan.opt.deterministic ? 16 : 1;
    int64_t at = 0, before = INT64_MAX;
    for (int rank = 0; rank < plan.mesh.world; rank++) {
        int64_t start, count;
        xp_plan_tokens(&plan, rank, &start, &count);
        const int64_t units = (count + unit - 1) / unit;
        assert_true(start == at && count >= 0);
        assert_true(count == 0 || start % unit == 0);
        assert_true(units <= before); /* earlier ranks take the surplus */
        before = rank == 0 || units < before ? units : before;
        at += count;
    }
    int64_t start, first, last;
    xp_plan_tokens(&plan, 0, &start, &first);
    xp_plan_tokens(&plan, plan.mesh.world - 1, &start, &last);
    assert_true((first + unit - 1) / unit - (last + unit - 1) / unit <= 1);
    assert_true(at == plan.opt.tokens);
}

static void tokens_are_dealt_whole(void **state) {
    (void)state;
    static const int64_t tokens[] = {1, 2, 3, 7, 8, 15, 16, 17, 100, 112, 113, 512};
    xp_step_options o = xp_step_defaults();
    odd_model(4);
    for (int det = 0; det < 2; det++)
        for (size_t t = 0; t < sizeof tokens / sizeof tokens[0]; t++)
            for (int world = 1; world <= 8; world++) {
                char mesh[32];
                snprintf(mesh, sizeof mesh, "sim:fsdp=%d", world);
                o.deterministic = det;
                o.tokens = tokens[t];
                make(mesh, &o);
                check_tokens();
                xp_plan_close(&plan);
            }
    /* 113 tokens are 8 blocks, the last of one token: 3 ranks get 3, 3 and 2 blocks. */
    o.deterministic = 1;
    o.tokens = 113;
    make("sim:fsdp=3", &o);
    int64_t start, count;
    xp_plan_tokens(&plan, 1, &start, &count);
    assert_true(start == 48 && count == 48);
    xp_plan_tokens(&plan, 2, &start, &count);
    assert_true(start == 96 && count == 17);
    xp_plan_close(&plan);
}

/* ---- parameters ---- */

static void parameters_of_a_published_model(void **state) {
    (void)state;
    static const struct {
        const char *name;
        int ndim;
        int64_t shape[3];
        int expert, decay;
    } want[] = {
        {"model.embed_tokens.weight", 2, {256, 2048, 0}, 0, 1},
        {"model.layers.0.post_attention_layernorm.weight", 1, {2048, 0, 0}, 0, 0},
        {"model.layers.0.mlp.gate.weight", 2, {60, 2048, 0}, 0, 1},
        {"model.layers.0.mlp.experts.gate_up_proj", 3, {60, 2816, 2048}, 1, 1},
        {"model.layers.0.mlp.experts.down_proj", 3, {60, 2048, 1408}, 1, 1},
        {"model.layers.0.mlp.shared_expert.gate_up_proj", 2, {11264, 2048, 0}, 0, 1},
        {"model.layers.0.mlp.shared_expert.down_proj", 2, {2048, 5632, 0}, 0, 1},
        {"model.layers.0.mlp.shared_expert_gate.weight", 2, {1, 2048, 0}, 0, 1},
    };
    const xp_step_options o = xp_step_defaults();
    must(xp_model_open("qwen1.5-moe-a2.7b", &model));
    make("sim:fsdp=4,ep=4", &o);
    assert_int_equal(plan.blocks, 24);
    assert_int_equal(plan.params, 24 * 7 + 3);
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        const xp_plan_param *q = &plan.param[i];
        assert_string_equal(q->name, want[i].name);
        assert_int_equal(q->ndim, want[i].ndim);
        assert_memory_equal(q->shape, want[i].shape, sizeof q->shape);
        assert_int_equal(q->expert, want[i].expert);
        assert_int_equal(q->decay, want[i].decay);
        assert_int_equal(q->reduce, want[i].expert ? XP_EDP : XP_WORLD);
        assert_int_equal(q->gather, want[i].expert ? XP_EP_FSDP : XP_FSDP);
    }
    assert_string_equal(plan.param[plan.params - 2].name, "model.norm.weight");
    assert_string_equal(plan.param[plan.params - 1].name, "lm_head.weight");
    assert_string_equal(plan.param[1 + 23 * 7].name, "model.layers.23.post_attention_layernorm.weight");
    const double block = 2048.0 * (1 + 60 + 60 * 3 * 1408.0 + 3 * 5632.0 + 1);
    assert_true((double)plan.elements == 24 * block + 2 * 256 * 2048.0 + 2048);
    assert_int_equal(xp_plan_find(&plan, XP_W_DOWN, 2), 1 + 2 * 7 + 3);
    assert_int_equal(xp_plan_find(&plan, XP_W_HEAD, -1), plan.params - 1);
    assert_int_equal(xp_plan_find(&plan, XP_W_DOWN, 24), -1);
    for (int i = 1; i < plan.params; i++)
        assert_true(strcmp(plan.param[plan.by_name[i - 1]].name, plan.param[plan.by_name[i]].name) < 0);
    xp_plan_close(&plan);
    must(xp_model_open("qwen3-30b-a3b", &model));
    make("sim:fsdp=1", &o);
    assert_int_equal(xp_plan_find(&plan, XP_W_SHARED_UP, 0), -1);
    assert_int_equal(xp_plan_find(&plan, XP_W_SHARED_GATE, 0), -1);
    xp_plan_close(&plan);
}

static void dense_layers_are_left_out(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    odd_model(4);
    model.layers = 4;
    model.moe[0] = model.moe[2] = 0;
    model.moe[1] = model.moe[3] = 1;
    make("sim:fsdp=2", &o);
    assert_int_equal(plan.blocks, 2);
    assert_int_equal(plan.layer[1], 3);
    assert_string_equal(plan.param[1].name, "model.layers.1.post_attention_layernorm.weight");
    xp_plan_close(&plan);
    const xp_mesh_spec s = mesh_of("sim:fsdp=2");
    o.layers = 1;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("layers: 1, and none of the first 1 layers of odd is a MoE block");
    assert_null(plan.param);
}

/* ---- cost ---- */

/* What does not depend on the mesh, for the sums below. */
static double world_flop;

static void check_sums(void) {
    double elements = 0, want = 0, flop = 0, sent_ep = 0, full = 0;
    for (int i = 0; i < plan.params; i++) {
        const xp_plan_param *q = &plan.param[i];
        const double size = (double)(q->G * q->R * q->N);
        want += size * (q->expert ? plan.mesh.ep_dp : plan.mesh.dp);
        full += size * (q->expert ? 1.0 / plan.mesh.ep : 1.0);
    }
    for (int rank = 0; rank < plan.mesh.world; rank++) {
        xp_plan_cost c;
        xp_plan_shard shard[32];
        double total = 0;
        xp_plan_cost_of(&plan, rank, &c);
        assert_true(c.elements == xp_plan_shards(&plan, rank, shard));
        assert_true(c.bytes[XP_KIND_PARAM] == 4.0 * (double)c.elements + 2.0 * full); /* bf16 */
        assert_true(c.bytes[XP_KIND_OPTIM] == 8.0 * (double)c.elements);
        /* A rank without a block brings no partials in deterministic mode, and zeros otherwise. */
        const int brings = c.tokens > 0 || !plan.opt.deterministic;
        assert_true(c.bytes[XP_KIND_GRAD] >= 4.0 * (double)c.elements + (brings ? 4.0 * 256 * 5 : 0));
        for (int k = 0; k < XP_KIND_JUDGE; k++) {
            assert_true(c.bytes[k] > 0);
            total += c.bytes[k];
        }
        assert_true(total == c.total_bytes);
        assert_true(c.flop_backward == 2 * c.flop_forward);
        elements += (double)c.elements;
        flop += c.flop_forward;
        sent_ep += c.sent[XP_EP];
        if (plan.mesh.world == 1)
            for (int x = 0; x < XP_NAXIS; x++)
                assert_true(c.sent[x] == 0);
    }
    assert_true(elements == want);
    assert_true((sent_ep > 0) == (plan.mesh.ep > 1));
    /* The model has 3 ep experts here, so only the router's share of FLOPs depends on the mesh. */
    const double T = (double)plan.opt.tokens, H = 5, F = 3, S = 7, K = (double)plan.model.K;
    world_flop = 2 * (2 * T * H * 3.0 * plan.mesh.ep + T * K * 6 * H * F + T * 6 * H * S + 2 * T * H) + 2 * T * H * 256;
    assert_true(fabs(flop - world_flop) <= 1e-12 * world_flop); /* thirds and sevenths of tokens are summed */
}

static void costs_add_up_on_every_mesh(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    o.tokens = 96;
    each_mesh(check_sums, &o);
    o.deterministic = 1;
    each_mesh(check_sums, &o);
}

/* One mesh by hand: dp 2, fsdp 2, ep 2, ep_fsdp 1, so ep_dp 2; H 4, F 3, E 4, K 2, one layer, 8 tokens. */
static void costs_by_hand(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    o.tokens = 8;
    must(xp_model_of("hand", xp_dialect_find("hf-5.24/qwen3_moe"), 1, 4, 3, 4, 2, 0, &model));
    make("sim:dp=2,fsdp=2,ep=2,ep_fsdp=1", &o);
    xp_plan_cost c;
    xp_plan_cost_of(&plan, 3, &c);
    const double dense = 2 * 256 * 4 + 4 + 4 + 4 * 4, expert = 4 * (6 * 4 + 4 * 3);
    assert_int_equal(c.tokens, 2);
    assert_int_equal(c.token0, 6);
    assert_true((double)c.elements == dense / 2 + expert / 2);
    assert_true(c.sent[XP_FSDP] == dense / 2 * 2);                /* own half to one other rank, bf16 */
    assert_true(c.sent[XP_EP_FSDP] == 0);                         /* nothing to gather */
    assert_true(c.sent[XP_WORLD] == (2 * dense - dense / 2) * 4); /* two copies of both halves, less its own */
    assert_true(c.sent[XP_EDP] == expert / 2 * 4);                /* one other copy, f32 */
    /* 2 tokens x 2 slots leave, 4 rows come; half of both is remote; there and back, forward and backward; 8 bytes of
     * token number once. */
    assert_true(c.expert_rows == 4 && c.expert_room == 8);
    assert_true(c.sent[XP_EP] == 0.5 * (2 * (4 + 4) * 4 * 2 + 8 * 4));
    assert_true(c.flop_forward == 2 * 2 * 4 * 4 + 4 * 6 * 4 * 3 + 2 * 2 * 4 * 256);
    assert_true(c.bytes[XP_KIND_GRAD] == 4 * (dense / 2 + expert / 2) + 4 * 256 * 4); /* the embedding is the largest */
    xp_plan_close(&plan);
}

/* The same with 16 tokens: 2 slots an expert and rank when even. */
static void capacities_by_hand(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    xp_plan_cost none, one, three;
    o.tokens = 16;
    must(xp_model_of("hand", xp_dialect_find("hf-5.24/qwen3_moe"), 1, 4, 3, 4, 2, 0, &model));
    make("sim:dp=2,fsdp=2,ep=2,ep_fsdp=1", &o);
    xp_plan_cost_of(&plan, 3, &none);
    xp_plan_close(&plan);
    model.dialect.capacity = 1;
    make("sim:dp=2,fsdp=2,ep=2,ep_fsdp=1", &o);
    xp_plan_cost_of(&plan, 3, &one);
    xp_plan_close(&plan);
    model.dialect.capacity = 3;
    model.dialect.pad_to_capacity = 1;
    make("sim:dp=2,fsdp=2,ep=2,ep_fsdp=1", &o);
    xp_plan_cost_of(&plan, 3, &three);
    xp_plan_close(&plan);
    assert_true(none.expert_rows == 8 && none.expert_room == 16);
    assert_true(none.sent[XP_EP] == 0.5 * (2 * (8 + 8) * 4 * 2 + 8 * 8));
    assert_true(one.expert_rows == 4 && one.expert_room == 16); /* one of each of 2 ranks, for 2 experts */
    assert_true(one.sent[XP_EP] == 0.5 * (2 * (4 + 4) * 4 * 2 + 8 * 4));
    assert_true(one.bytes[XP_KIND_ACT] == none.bytes[XP_KIND_ACT] + 4 * 4 * 2); /* kept */
    assert_true(three.expert_rows == 12 && three.expert_room == 28);            /* pads are computed, */
    assert_true(three.sent[XP_EP] == none.sent[XP_EP]);                         /* and stay at home */
    assert_true(three.bytes[XP_KIND_ACT] > one.bytes[XP_KIND_ACT]);
}

/* Block partials: in deterministic mode a rank brings one gradient for each of its 16-token blocks, but an expert that
 * lies on one rank only is folded there. */
static void deterministic_mode_moves_block_partials(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    xp_plan_cost one, det;
    o.tokens = 128;
    must(xp_model_of("hand", xp_dialect_find("hf-5.24/qwen3_moe"), 1, 4, 3, 4, 2, 0, &model));
    make("sim:fsdp=4,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &one);
    xp_plan_close(&plan);
    o.deterministic = 1;
    make("sim:fsdp=4,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &det);
    xp_plan_close(&plan);
    assert_true(one.sent[XP_WORLD] > 0 && det.sent[XP_WORLD] == 2 * one.sent[XP_WORLD]); /* 32 tokens: 2 blocks */
    assert_true(one.sent[XP_EDP] > 0 && det.sent[XP_EDP] == 4 * one.sent[XP_EDP]);       /* 2 ranks' blocks */
    make("sim:fsdp=4,ep=4", &o);
    xp_plan_cost_of(&plan, 0, &det);
    assert_true(det.sent[XP_EDP] == 0);
    assert_int_equal(xp_plan_chunk_groups(&plan, xp_plan_find(&plan, XP_W_UP, 0)), 4);
    xp_plan_close(&plan);
    must(xp_model_open("qwen3-30b-a3b", &model));
    make("sim:fsdp=8,ep=8", &o); /* an expert's gate_up is 1536 x 2048 x 8 bytes = 24 MiB: two fit under 64 MiB */
    assert_int_equal(xp_plan_chunk_groups(&plan, xp_plan_find(&plan, XP_W_UP, 0)), 2);
    assert_int_equal(xp_plan_chunk_groups(&plan, xp_plan_find(&plan, XP_W_DOWN, 0)), 5);
    xp_plan_cost_of(&plan, 0, &det); /* five down projections, f32, are the largest chunk */
    assert_true(det.bytes[XP_KIND_GRAD] == 4 * (double)det.elements + 5.0 * 2048 * 768 * 4);
    xp_plan_close(&plan);
}

/* ---- choices and refusals ---- */

static void check_foreach(void) {
    const int same = plan.mesh.ep == 1 && plan.mesh.ep_fsdp == plan.mesh.fsdp;
    assert_int_equal(plan.foreach_legal, same);
    assert_int_equal(plan.opt.path, XP_PATH_FLAT);
    assert_true(*plan.path_why && *plan.foreach_why);
    xp_step_options o = plan.opt;
    xp_plan asked;
    o.path = XP_PATH_FOREACH;
    assert_int_equal(xp_plan_make(&model, &plan.mesh, &o, &asked), same ? XP_OK : XP_E_ARG);
    if (!same)
        has("path: foreach is not legal: dense lie on (dp ");
    assert_true(same == (asked.param != NULL)); /* a refused plan is cleared */
    xp_plan_close(&asked);
    o.path = XP_PATH_FOR_LOOP;
    must(xp_plan_make(&model, &plan.mesh, &o, &asked));
    assert_int_equal(asked.opt.path, XP_PATH_FOR_LOOP);
    xp_plan_close(&asked);
}

static void foreach_needs_one_placement(void **state) {
    (void)state;
    const xp_step_options o = xp_step_defaults();
    each_mesh(check_foreach, &o);
}

/* By hand: lists of tensors are fused only where every parameter has the same copies and the same rows on the same axes
 * of one mesh. Equal shard sizes (fsdp=2,ep=2), equal copies (dp=2,fsdp=2,ep=2,ep_fsdp=1) and ep 1 are not enough. */
static void mixed_placements_refuse_foreach(void **state) {
    static const struct {
        const char *mesh;
        int legal;
        const char *why;
    } row[] = {
        {"sim:fsdp=1", 1, "1 copies x 1"},
        {"sim:fsdp=3", 1, "1 copies x 3"},
        {"sim:dp=3,fsdp=1,ep=1,ep_fsdp=1", 1, "3 copies x 1"},
        {"sim:dp=2,fsdp=3,ep=1,ep_fsdp=3", 1, "2 copies x 3"},
        {"sim:dp=3,fsdp=1", 0, "(dp 3, fsdp 1), experts on (ep_dp 1, ep 1, ep_fsdp 3)"},
        {"sim:fsdp=2,ep=2", 0, "(dp 1, fsdp 2), experts on (ep_dp 1, ep 2, ep_fsdp 1)"},
        {"sim:fsdp=6,ep=2", 0, "(dp 1, fsdp 6), experts on (ep_dp 1, ep 2, ep_fsdp 3)"},
        {"sim:dp=2,fsdp=2,ep=2,ep_fsdp=1", 0, "(dp 2, fsdp 2), experts on (ep_dp 2, ep 2, ep_fsdp 1)"},
        {"sim:dp=2,fsdp=2,ep=1,ep_fsdp=1", 0, "(dp 2, fsdp 2), experts on (ep_dp 4, ep 1, ep_fsdp 1)"},
        {"sim:dp=2,fsdp=2,ep=1,ep_fsdp=4", 0, "(dp 2, fsdp 2), experts on (ep_dp 1, ep 1, ep_fsdp 4)"},
        {"sim:dp=3,fsdp=2,ep=1,ep_fsdp=3", 0, "(dp 3, fsdp 2), experts on (ep_dp 2, ep 1, ep_fsdp 3)"},
    };
    (void)state;
    for (size_t i = 0; i < 2 * (sizeof row / sizeof *row); i++) {
        const size_t r = i / 2;
        const xp_mesh_spec s = mesh_of(row[r].mesh);
        xp_step_options o = xp_step_defaults();
        o.path = XP_PATH_FOREACH;
        o.optimizer = i % 2 ? XP_SGD : XP_ADAMW;
        odd_model(6);
        const xp_status st = xp_plan_make(&model, &s, &o, &plan);
        if (st != (row[r].legal ? XP_OK : XP_E_ARG))
            fail_msg("%s: %s", row[r].mesh, xp_error_text());
        if (st == XP_OK && !strstr(plan.foreach_why, row[r].why))
            fail_msg("%s: '%s' does not say '%s'", row[r].mesh, plan.foreach_why, row[r].why);
        if (st != XP_OK)
            has(row[r].why);
        xp_plan_close(&plan);
        o.path = XP_PATH_AUTO; /* what is chosen is legal everywhere */
        must(xp_plan_make(&model, &s, &o, &plan));
        assert_true(plan.opt.path == XP_PATH_FLAT && plan.foreach_legal == row[r].legal);
        xp_plan_close(&plan);
    }
}

static void coefficients_come_from_the_model(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    must(xp_model_open("mixtral-8x7b", &model));
    make("sim:fsdp=1", &o);
    assert_true(plan.opt.aux_coef == 0.02 && plan.opt.z_coef == 0);
    xp_plan_close(&plan);
    o.aux_coef = 0;
    o.act = XP_F64;
    make("sim:fsdp=1", &o);
    assert_true(plan.opt.aux_coef == 0);
    assert_int_equal(plan.opt.router, XP_F64);
    xp_plan_close(&plan);
}

typedef struct {
    size_t at;
    char type; /* 'd'ouble, 'i'nt, 'l'ong, 't'ype */
    double value;
    const char *want;
} bad_option;

static void options_are_refused_by_name(void **state) {
    (void)state;
#define AT(field) offsetof(xp_step_options, field)
    static const bad_option bad[] = {
        {AT(tokens), 'l', 0, "tokens: 0, expected 1 to"},
        {AT(tokens), 'l', -5, "tokens: -5, expected 1 to"},
        {AT(tokens), 'l', 4e9, "tokens: 4000000000, expected 1 to"},
        {AT(layers), 'i', 3, "layers: 3, expected 1 to 2"},
        {AT(layers), 'i', -1, "layers: -1, expected 1 to 2"},
        {AT(shrink), 'i', 0, "shrink: 0, expected 1 or more"},
        {AT(shrink), 'i', 2, "shrink: 2 does not divide the hidden width H 5 of odd"},
        {AT(act), 't', XP_E4M3, "act: e4m3, expected f32, bf16, f16 or f64"},
        {AT(param), 't', XP_I32, "param: i32, expected f32, bf16, f16 or f64"},
        {AT(grad), 't', XP_NDTYPE, "grad: no dtype, expected f32"},
        {AT(reduce), 't', XP_F64, "reduce: f64, expected f32, bf16 or f16"},
        {AT(router), 't', XP_BF16, "router: bf16, expected f32"},
        {AT(router), 't', XP_F64, "router: f64, expected f32"},
        {AT(lr), 'd', -1e-3, "lr: -0.001, expected 0 to"},
        {AT(lr), 'd', (double)NAN, "lr: "},
        {AT(beta1), 'd', 1, "beta1: 1, expected 0 to"},
        {AT(beta2), 'd', -0.1, "beta2: -0.1"},
        {AT(eps), 'd', (double)INFINITY, "eps: inf"},
        {AT(weight_decay), 'd', -1, "weight_decay: -1"},
        {AT(momentum), 'd', 2, "momentum: 2, expected 0 to 1"},
        {AT(max_norm), 'd', -1, "max_norm: -1"},
        {AT(clip_eps), 'd', -1, "clip_eps: -1"},
        {AT(aux_coef), 'd', -1, "aux_coef: -1"},
        {AT(z_coef), 'd', -1, "z_coef: -1"},
        {AT(micro), 'i', 0, "micro: 0, expected a divisor of the 512 tokens"},
        {AT(micro), 'i', 3, "micro: 3, expected a divisor of the 512 tokens"},
        {AT(micro), 'i', 1024, "micro: 1024, expected a divisor"},
        {AT(optimizer), 'i', 2, "optimizer: 2, expected adamw or sgd"},
        {AT(path), 'i', 9, "path: 9, expected auto, flat, for-loop or foreach"},
    };
#undef AT
    const xp_mesh_spec s = mesh_of("sim:fsdp=2");
    odd_model(4);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        xp_step_options o = xp_step_defaults();
        void *field = (char *)&o + bad[i].at;
        if (bad[i].type == 'd')
            *(double *)field = bad[i].value;
        else if (bad[i].type == 'l')
            *(int64_t *)field = (int64_t)bad[i].value;
        else
            *(int *)field = (int)bad[i].value;
        assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
        has(bad[i].want);
        assert_null(plan.param);
    }
    xp_step_options o = xp_step_defaults();
    o.deterministic = 1;
    o.reduce = XP_BF16;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("reduce: bf16, expected f32: deterministic");
    o.reduce = XP_F32;
    o.grad = XP_BF16;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("grad: bf16, expected f32: deterministic");
    o = xp_step_defaults();
    o.deterministic = 1;
    o.micro = 64;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("micro: 64 of 8 tokens each, expected a multiple of 16 in deterministic mode");
    o.micro = 32;
    must(xp_plan_make(&model, &s, &o, &plan));
    xp_plan_close(&plan);
    o = xp_step_defaults();
    o.grad = XP_F64;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("reduce: f32, expected f64, because grad is f64");
}

static void meshes_are_refused_by_name(void **state) {
    (void)state;
    const xp_step_options o = xp_step_defaults();
    xp_mesh_spec s = mesh_of("sim:fsdp=6,ep=3");
    odd_model(4);
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("ep: 3 does not divide the 4 experts of odd");
    s = mesh_of("sim:fsdp=4,ep=2");
    s.ep_dp = 3;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("mesh: dp 1 x fsdp 4 and ep 2 x ep_fsdp 2 x ep_dp 3 must both make the world of 4");
    must(xp_model_of("huge", xp_dialect_find("hf-5.24/mixtral"), XP_MAX_LAYERS, XP_MAX_WIDTH, XP_MAX_WIDTH,
                     XP_MAX_EXPERTS, 1, 0, &model));
    s = mesh_of("sim:fsdp=1");
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("model: huge has more than 2^60 parameters");
}

/* ---- reports ---- */

static char *printed(void) {
    static char text[1 << 16];
    FILE *f = tmpfile();
    assert_non_null(f);
    must(xp_plan_print(&plan, f));
    rewind(f);
    const size_t n = fread(text, 1, sizeof text - 1, f);
    text[n] = 0;
    fclose(f);
    return text;
}

static void printed_plan_says_what_it_is(void **state) {
    (void)state;
    static const char *const part[] = {
        "model      qwen1.5-moe-a2.7b: qwen2_moe, dialect hf-5.24/qwen2_moe\n",
        "2 MoE blocks of 2 layers; H 128, F 88, E 60, k 4, shared expert 352 with gate;",
        "widths divided by 16",
        "vocabulary 256, the bytes of a text (the model's own: 151936); weights seeded, not published ones",
        "world 6 = dp 1 x fsdp 6 = ep_dp 1 x ep 2 x ep_fsdp 3",
        "model.layers.*.mlp.experts.gate_up_proj (2)",
        "divisor    valid tokens of the global batch (at most 512), for dense and expert alike",
        "foreach: not legal",
        "mlp_only_layers absent, taken as []",
        "rope_theta",
    };
    xp_step_options o = xp_step_defaults();
    o.shrink = 16;
    o.layers = 2;
    must(xp_model_open("qwen1.5-moe-a2.7b", &model));
    make("sim:fsdp=6,ep=2", &o);
    const char *text = printed();
    for (size_t i = 0; i < sizeof part / sizeof part[0]; i++) {
        if (!strstr(text, part[i]))
            fail_msg("no '%s' in:\n%s", part[i], text);
    }
    FILE *full = fopen("/dev/full", "w");
    assert_non_null(full);
    setvbuf(full, NULL, _IONBF, 0);
    assert_int_equal(xp_plan_print(&plan, full), XP_E_IO);
    fclose(full);
    xp_plan_close(&plan);
}

/* A factor of each expert's weights is a vector beside the router, in f32 and without decay. */
static void factors_of_experts(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    xp_dialect d = *xp_dialect_find("hf-5.24/mixtral");
    d.expert_scale = 1;
    d.null_experts = 2;
    d.null_kind = XP_NULL_SKIP;
    must(xp_model_of("factors", &d, 2, 4, 3, 6, 2, 0, &model));
    make("sim:fsdp=3,ep=3", &o);
    const int i = xp_plan_find(&plan, XP_W_EXPERT_SCALE, 1);
    assert_true(i > xp_plan_find(&plan, XP_W_ROUTER, 1) && i < xp_plan_find(&plan, XP_W_UP, 1));
    const xp_plan_param *p = &plan.param[i];
    assert_string_equal(p->name, "model.layers.1.mlp.gate.per_expert_scale");
    assert_true(p->G == 1 && p->R == 8 && p->N == 1 && p->ndim == 1 && p->shape[0] == 8);
    assert_true(!p->expert && !p->decay && p->mean == 1.0 && p->reduce == XP_WORLD);
    assert_int_equal(xp_plan_param_dtype(&plan, i), XP_F32);
    xp_plan_close(&plan);
    o.act = o.grad = o.reduce = XP_F64;
    make("sim:fsdp=3,ep=3", &o);
    assert_int_equal(xp_plan_param_dtype(&plan, i), XP_F64);
    xp_plan_close(&plan);
    assert_int_equal(xp_plan_find(&plan, XP_W_EXPERT_SCALE, 0), -1);
}

/* Shared experts that the router weighs: rows for them, one factor for all, no balance loss, parts of one width. */
static void weighed_experts(void **state) {
    static const struct {
        int64_t S;
        double aux, z;
        const char *says;
    } bad[] = {{0, 0, 0, "S: 0, expected a multiple of the 2 shared experts"},
               {7, 0, 0, "S: 7, expected a multiple of the 2 shared experts"},
               {6, 0.5, 0, "aux_coef: 0.5, expected 0"},
               {6, 0, 0.25, "z_coef: 0.25, expected 0"}};
    xp_step_options o = xp_step_defaults();
    xp_mesh_spec mesh;
    double all, active;
    (void)state;
    const xp_dialect *d = xp_dialect_find("hf-5.24/inkling");
    must(xp_mesh_spec_parse("sim:fsdp=3,ep=3", &mesh));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        must(xp_model_of("weighed", d, 2, 4, 3, 6, 2, bad[i].S, &model));
        o.aux_coef = bad[i].aux;
        o.z_coef = bad[i].z;
        assert_int_equal(xp_plan_make(&model, &mesh, &o, &plan), XP_E_ARG);
        if (!strstr(xp_error_text(), bad[i].says))
            fail_msg("expected '%s', got '%s'", bad[i].says, xp_error_text());
    }
    o = xp_step_defaults();
    must(xp_model_of("weighed", d, 2, 4, 3, 6, 2, 6, &model));
    xp_model_moe_params(&model, &all, &active);
    assert_true(all == 2 * (6 * 3 * 4 * 3 + 8 * 4 + 3 * 4 * 6));
    make("sim:fsdp=3,ep=3", &o);
    assert_int_equal(plan.balanced, 0);
    const xp_plan_param *router = &plan.param[xp_plan_find(&plan, XP_W_ROUTER, 1)];
    const xp_plan_param *scale = &plan.param[xp_plan_find(&plan, XP_W_EXPERT_SCALE, 1)];
    assert_true(router->R == 8 && router->N == 4 && scale->R == 1 && scale->N == 1 && scale->shape[0] == 1);
    assert_string_equal(scale->name, "model.layers.1.mlp.gate.global_scale");
    xp_plan_close(&plan);
}

/* Experts of width 6 in a block of width 4: two maps more, and the rows that are sent are wider. */
static void latent_width(void **state) {
    (void)state;
    static const struct {
        xp_weight w;
        int64_t G, R, N;
    } shape[] = {{XP_W_ROUTER, 1, 4, 4}, {XP_W_LATENT_DOWN, 1, 6, 4}, {XP_W_LATENT_UP, 1, 4, 6},
                 {XP_W_UP, 4, 3, 6},     {XP_W_DOWN, 4, 6, 3},        {XP_W_SHARED_UP, 1, 5, 4}};
    xp_step_options o = xp_step_defaults();
    xp_plan_cost with, without;
    double all, active;
    o.tokens = 8;
    must(xp_model_of("latent", xp_dialect_find("hf-5.24/nemotron_h"), 1, 4, 3, 4, 2, 5, &model));
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &without);
    assert_int_equal(xp_plan_find(&plan, XP_W_LATENT_UP, 0), -1);
    xp_plan_close(&plan);
    must(xp_model_set_latent(&model, 6));
    xp_model_moe_params(&model, &all, &active);
    assert_true(all == 4 * 2 * 6 * 3 + 4 * 4 + 2 * 6 * 4 + 2 * 5 * 4);
    make("sim:fsdp=2,ep=2", &o);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        const int n = xp_plan_find(&plan, shape[i].w, 0);
        assert_true(n >= 0);
        const xp_plan_param *p = &plan.param[n];
        assert_true(p->G == shape[i].G && p->R == shape[i].R && p->N == shape[i].N);
    }
    assert_string_equal(plan.param[xp_plan_find(&plan, XP_W_LATENT_DOWN, 0)].name,
                        "model.layers.0.mlp.fc1_latent_proj.weight");
    xp_plan_cost_of(&plan, 0, &with);
    /* 4 tokens, 8 rows, all of them both ways twice, half remote, in bf16. */
    assert_true(with.sent[XP_EP] - without.sent[XP_EP] == 0.5 * 2 * (8 + 8) * 2 * 2);
    /* Two maps of 4 x 6 for 4 tokens, and 8 rows of two matrices of 3 x 2 more. */
    assert_true(with.flop_forward - without.flop_forward == 2 * 2 * 4 * 4 * 6 + 2 * 2 * 8 * 3 * 2);
    if (!strstr(printed(), "k 2, experts' width 6, shared expert 5;"))
        fail_msg("no latent width in:\n%s", printed());
    xp_plan_close(&plan);
    assert_int_equal(xp_model_shrink(&model, 4), XP_E_ARG);
    must(xp_model_of("latent", xp_dialect_find("hf-5.24/nemotron_h"), 1, 4, 4, 4, 2, 0, &model));
    must(xp_model_set_latent(&model, 6));
    must(xp_model_shrink(&model, 2));
    assert_true(model.latent == 3 && xp_model_expert_width(&model) == 3);
    must(xp_model_set_latent(&model, 5));
    assert_int_equal(xp_model_shrink(&model, 2), XP_E_ARG);
    has("latent width D 5");
    assert_int_equal(xp_model_set_latent(&model, -1), XP_E_ARG);
    must(xp_model_of("null", xp_dialect_find("hf-5.24/longcat_flash"), 1, 4, 3, 4, 2, 0, &model));
    assert_int_equal(xp_model_set_latent(&model, 6), XP_E_ARG);
    has("latent width D: 6, expected none beside experts that return the block's input");
}

/* A router of width 6 in blocks of width 4: eight parameters more, seven in the first block, and a smaller matrix. */
static void router_width(void **state) {
    (void)state;
    static const struct {
        xp_weight w;
        int64_t R, N;
        int ndim;
        const char *name;
    } shape[] = {{XP_W_ROUTER, 5, 6, 2, "model.layers.1.mlp.gate.router_mlp.out_proj.weight"},
                 {XP_W_ROUTER_DOWN, 6, 4, 2, "model.layers.1.mlp.gate.down_proj.weight"},
                 {XP_W_ROUTER_DOWN_BIAS, 6, 1, 1, "model.layers.1.mlp.gate.down_proj.bias"},
                 {XP_W_ROUTER_STATE, 6, 1, 1, "model.layers.1.mlp.gate.router_states_scale"},
                 {XP_W_ROUTER_NORM, 6, 1, 1, "model.layers.1.mlp.gate.router_mlp.norm.weight"},
                 {XP_W_ROUTER_FC1, 6, 6, 2, "model.layers.1.mlp.gate.router_mlp.fc1.weight"},
                 {XP_W_ROUTER_FC1_BIAS, 6, 1, 1, "model.layers.1.mlp.gate.router_mlp.fc1.bias"},
                 {XP_W_ROUTER_FC2, 6, 6, 2, "model.layers.1.mlp.gate.router_mlp.fc2.weight"},
                 {XP_W_ROUTER_FC2_BIAS, 6, 1, 1, "model.layers.1.mlp.gate.router_mlp.fc2.bias"}};
    const double experts = 4 * 3 * 4 * 3,
                 mlp = 6 * 4 + 6 + 6 + 2 * (6 * 6 + 6) + 5 * 6; /* of a block but its factors */
    xp_step_options o = xp_step_defaults();
    xp_plan_cost with, without;
    double all, active;
    o.tokens = 8;
    o.gate = XP_F32;
    xp_dialect plain = *xp_dialect_find("hf-5.24/zaya");
    plain.router_in = XP_ROUTER_X;
    must(xp_model_of("plain", &plain, 2, 4, 3, 4, 1, 0, &model));
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &without);
    assert_int_equal(xp_plan_find(&plan, XP_W_ROUTER_FC2, 0), -1);
    assert_int_equal(xp_model_set_router_width(&model, 6), XP_E_ARG);
    has("router's width R: 6, expected none where router_in is not recurrent_mlp");
    xp_plan_close(&plan);
    must(xp_model_of("mlp", xp_dialect_find("hf-5.24/zaya"), 2, 4, 3, 4, 1, 0, &model));
    xp_mesh_spec one;
    must(xp_mesh_spec_parse("sim:fsdp=1", &one));
    assert_int_equal(xp_plan_make(&model, &one, &o, &plan), XP_E_ARG);
    has("router's width R: 0, expected 1 to");
    must(xp_model_set_router_width(&model, 6));
    xp_model_moe_params(&model, &all, &active);
    assert_true(all == 2 * (experts + mlp) + 6 && active == 2 * (experts / 4 + mlp) + 6);
    make("sim:fsdp=2,ep=2", &o);
    assert_int_equal(xp_plan_find(&plan, XP_W_ROUTER_STATE, 0), -1);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        const int n = xp_plan_find(&plan, shape[i].w, 1);
        assert_true(n >= 0);
        const xp_plan_param *p = &plan.param[n];
        assert_true(p->G == 1 && p->R == shape[i].R && p->N == shape[i].N && p->ndim == shape[i].ndim);
        assert_true(!p->expert && p->gather == XP_FSDP && p->reduce == XP_WORLD && p->decay == (p->ndim == 2));
        assert_true(p->mean == (shape[i].w == XP_W_ROUTER_STATE || shape[i].w == XP_W_ROUTER_NORM ? 1.0 : 0.0));
        assert_int_equal(xp_plan_param_dtype(&plan, n), XP_F32);
        assert_string_equal(p->name, shape[i].name);
    }
    xp_plan_cost_of(&plan, 0, &with);
    /* 4 tokens, two blocks: a map of 4 x 6, two of 6 x 6, the rows of 5 classes of 6 for 4. */
    assert_true(with.flop_forward - without.flop_forward == 2 * 2 * 4 * (4 * 6 + 2 * 6 * 6 + 5 * (6 - 4)));
    /* Six rows of 6 in bf16 and 1/rms in f32 that each block keeps; the top of the model needs most beside them. */
    assert_true(with.bytes[XP_KIND_ACT] - without.bytes[XP_KIND_ACT] == 2 * 4 * (6 * 6 * 2 + 4));
    if (!strstr(printed(), "k 1, router's width 6;"))
        fail_msg("no width of the router in:\n%s", printed());
    xp_plan_close(&plan);
    must(xp_model_shrink(&model, 1));
    assert_int_equal(xp_model_shrink(&model, 4), XP_E_ARG);
    must(xp_model_of("mlp", xp_dialect_find("hf-5.24/zaya"), 2, 4, 4, 4, 1, 0, &model));
    must(xp_model_set_router_width(&model, 6));
    must(xp_model_shrink(&model, 2));
    assert_true(model.router_width == 3);
    must(xp_model_set_router_width(&model, 5));
    assert_int_equal(xp_model_shrink(&model, 2), XP_E_ARG);
    has("router's width R 5");
}

static double kept(const xp_plan_cost *c) {
    return c->bytes[XP_KIND_ACT];
}

/* Norms and a bias around experts of width 6 in a block of width 4: vectors that start near 1 or 0, without decay,
 * whose gradients all ranks sum. */
static void around_the_experts(void **state) {
    (void)state;
    static const struct {
        xp_weight w;
        int64_t R;
        double mean;
        const char *name;
    } vector[] = {{XP_W_LATENT_NORM, 6, 1, "model.layers.0.mlp.pre_expert_norm.weight"},
                  {XP_W_EXPERT_NORM, 6, 1, "model.layers.0.mlp.experts.post_expert_norm.weight"},
                  {XP_W_OUT_BIAS, 4, 0, "model.layers.0.mlp.bias"},
                  {XP_W_BLOCK_NORM, 4, 1, "model.layers.0.mlp.post_mlp_layernorm.weight"}};
    xp_step_options o = xp_step_defaults();
    xp_plan_cost with, without;
    double all, active, more, more_active;
    unsigned around;
    o.tokens = 8;
    must(xp_model_of("around", xp_dialect_find("hf-5.24/nemotron_h"), 1, 4, 3, 4, 2, 5, &model));
    assert_int_equal(xp_model_set_around(&model, XP_LATENT_NORM), XP_E_ARG);
    has("around: latent_norm, expected it beside a latent width D alone");
    must(xp_model_set_latent(&model, 6));
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &without);
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++)
        assert_int_equal(xp_plan_find(&plan, vector[i].w, 0), -1);
    xp_plan_close(&plan);
    xp_model_moe_params(&model, &all, &active);
    must(xp_around_parse("block_norm+expert_norm+out_bias+latent_norm", &around));
    assert_int_equal(xp_model_set_around(&model, around | 1u << 7), XP_E_ARG);
    must(xp_model_set_around(&model, around));
    xp_model_moe_params(&model, &more, &more_active);
    assert_true(more - all == 6 + 6 + 4 + 4 && more_active - active == 6 + 6 + 4 + 4);
    make("sim:fsdp=2,ep=2", &o);
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++) {
        const int n = xp_plan_find(&plan, vector[i].w, 0);
        assert_true(n > xp_plan_find(&plan, XP_W_ROUTER, 0) && n < xp_plan_find(&plan, XP_W_UP, 0));
        const xp_plan_param *p = &plan.param[n];
        assert_string_equal(p->name, vector[i].name);
        assert_true(p->G == 1 && p->R == vector[i].R && p->N == 1 && p->ndim == 1 && p->shape[0] == p->R);
        assert_true(!p->expert && !p->decay && p->mean == vector[i].mean && p->std > 0);
        assert_true(p->gather == XP_FSDP && p->reduce == XP_WORLD);
        assert_int_equal(xp_plan_param_dtype(&plan, n), XP_BF16);
    }
    xp_plan_cost_of(&plan, 0, &with);
    assert_int_equal(with.elements - without.elements, 3 + 3 + 2 + 2);
    assert_true(with.sent[XP_FSDP] - without.sent[XP_FSDP] == (3 + 3 + 2 + 2) * 2);
    assert_true(with.sent[XP_WORLD] - without.sent[XP_WORLD] == (3 + 3 + 2 + 2) * 4);
    /* A token's row of the bias's table, and of four more parameters the row tables and the segment's border. */
    assert_true(with.bytes[XP_KIND_BUFFER] - without.bytes[XP_KIND_BUFFER] == 4 * 4 + 4 * (16 * (2 + 2) + 10));
    /* Rows of 4 tokens and of 16 slots in bf16, and a root of each row that is normed. */
    assert_true(kept(&with) - kept(&without) == 4 * (12 + 4) + 16 * (12 + 4) + 4 * 8 + 4 * (8 + 4));
    if (!strstr(printed(), ", around them latent_norm+expert_norm+out_bias+block_norm,"))
        fail_msg("nothing around in:\n%s", printed());
    xp_plan_close(&plan);
    /* Two blocks of tokens; the norm of the experts' rows brings a sum of each of its two experts for either. */
    o.tokens = 32;
    o.deterministic = 1;
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &with);
    xp_plan_close(&plan);
    must(xp_model_set_around(&model, around & ~(unsigned)XP_EXPERT_NORM));
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &without);
    xp_plan_close(&plan);
    assert_true(with.sent[XP_WORLD] - without.sent[XP_WORLD] == 3 * 4 * (2 * 2));
    assert_true(with.bytes[XP_KIND_BUFFER] - without.bytes[XP_KIND_BUFFER] == 16 * (2 + 2) + 10 + 8 * (2 * 2 + 64));
}

/* Norms of both outputs, of the shared expert's input and of the router's in a block of width 4. */
static void norms_of_both_outputs(void **state) {
    static const struct {
        xp_weight w;
        const char *name;
    } vector[] = {{XP_W_ROUTED_NORM, "model.layers.0.mlp.routed_norm.weight"},
                  {XP_W_SHARED_NORM, "model.layers.0.mlp.shared_norm.weight"},
                  {XP_W_SHARED_IN_NORM, "model.layers.0.mlp.shared_in_norm.weight"},
                  {XP_W_ROUTER_NORM, "model.layers.0.mlp.gate.norm.weight"}};
    xp_step_options o = xp_step_defaults();
    xp_plan_cost with, without;
    double all, active, more, more_active;
    (void)state;
    o.tokens = 8;
    must(xp_model_of("plain", xp_dialect_find("hf-5.24/mixtral"), 1, 4, 3, 4, 2, 0, &model));
    assert_int_equal(xp_model_set_around(&model, XP_SHARED_NORM), XP_E_ARG);
    has("around: shared_norm, expected it beside a shared expert alone");
    assert_int_equal(xp_model_set_around(&model, XP_SHARED_IN_NORM), XP_E_ARG);
    has("around: shared_in_norm, expected it beside a shared expert alone");
    must(xp_model_of("plain", xp_dialect_find("hf-5.24/mixtral"), 1, 4, 3, 4, 2, 5, &model));
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &without);
    xp_plan_close(&plan);
    xp_model_moe_params(&model, &all, &active);
    must(xp_model_set_around(&model, XP_ROUTED_NORM | XP_SHARED_NORM | XP_SHARED_IN_NORM));
    model.dialect.router_in = XP_ROUTER_RMSNORM_SCALED;
    xp_model_moe_params(&model, &more, &more_active);
    assert_true(more - all == 4 * 4 && more_active - active == 4 * 4);
    make("sim:fsdp=2,ep=2", &o);
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++) {
        const int n = xp_plan_find(&plan, vector[i].w, 0);
        assert_true(n >= 0);
        const xp_plan_param *p = &plan.param[n];
        assert_string_equal(p->name, vector[i].name);
        assert_true(p->G == 1 && p->R == 4 && p->N == 1 && p->ndim == 1 && !p->expert && !p->decay);
        assert_true(p->mean == 1 && p->std > 0 && p->gather == XP_FSDP && p->reduce == XP_WORLD);
    }
    assert_true(plan.param[xp_plan_find(&plan, XP_W_ROUTER, 0)].N == 4);
    xp_plan_cost_of(&plan, 0, &with);
    assert_int_equal(with.elements - without.elements, 4 * 2);
    /* Four normed rows of 4 tokens in bf16 with their roots: the router's over the root of H. */
    assert_true(kept(&with) - kept(&without) == 4 * 4 * (8 + 4));
    xp_plan_close(&plan);
}

/* Three blocks choose by a table, two by their scores; the parameters are the same, the balance losses see two. */
static void layers_have_records(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    xp_plan_cost some, all;
    o.shrink = 64;
    o.layers = 5;
    o.tokens = 16;
    o.act = XP_F32;
    must(xp_model_open("deepseek-v4-flash", &model));
    make("sim:fsdp=1", &o);
    assert_int_equal(plan.balanced, 2);
    for (int b = 0; b < 5; b++) {
        assert_int_equal(xp_plan_dialect(&plan, b)->select_on, b < 3 ? XP_ON_TOKEN_TABLE : XP_ON_SCORE);
        assert_int_equal(xp_plan_is_balanced(&plan, b), b >= 3);
    }
    xp_plan_cost_of(&plan, 0, &some);
    if (!strstr(printed(),
                "\n           layers 3-4: hf-5.24/deepseek_v4; select_on score, not token_table; select_bias on, "
                "not off\n"))
        fail_msg("no line of layers 3-4 in:\n%s", printed());
    json_t *j, *list;
    must(xp_plan_json(&plan, &j));
    list = json_object_get(json_object_get(j, "model"), "other_dialects");
    assert_int_equal(json_array_size(list), 1);
    assert_string_equal(json_string_value(json_object_get(json_array_get(list, 0), "layers")), "3-4");
    assert_string_equal(json_string_value(json_object_get(json_array_get(list, 0), "dialect")), "hf-5.24/deepseek_v4");
    json_decref(j);
    xp_plan_close(&plan);
    for (int i = 0; i < 3; i++)
        must(xp_model_set_dialect(&model, i, xp_model_dialect(&model, 4)));
    make("sim:fsdp=1", &o);
    assert_int_equal(plan.balanced, 5);
    xp_plan_cost_of(&plan, 0, &all);
    assert_true(all.total_bytes - some.total_bytes == 3 * 16.0 * 256 * 4); /* three layers' gradients of logits */
    xp_plan_close(&plan);
    model.other[0].topk_group = 0;
    model.other[0].group_reduce = XP_GROUP_MAX;
    const xp_mesh_spec s = mesh_of("sim:fsdp=1");
    model.record[1] = 1;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("topk_group: 0, expected 1 to");
}

/* What is gathered and reduced in which dtype, and what that costs: 4 bytes for 2. */
static void dtypes_by_parameter(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    xp_plan_cost plain, mixed;
    o.tokens = 8;
    must(xp_model_of("hand", xp_dialect_find("hf-5.24/qwen2_moe"), 1, 4, 3, 4, 2, 5, &model));
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &plain);
    assert_int_equal(plan.opt.shared, XP_BF16);
    assert_int_equal(plan.opt.gate, XP_BF16);
    assert_int_equal(plan.opt.expert_reduce, XP_F32);
    xp_plan_close(&plan);
    o.shared = o.gate = XP_F32;
    o.expert_reduce = XP_BF16;
    make("sim:fsdp=2,ep=2", &o);
    xp_plan_cost_of(&plan, 0, &mixed);
    for (int i = 0; i < plan.params; i++) {
        const xp_weight w = plan.param[i].weight;
        const int wide = w == XP_W_ROUTER || w == XP_W_SHARED_UP || w == XP_W_SHARED_DOWN || w == XP_W_SHARED_GATE;
        assert_int_equal(xp_plan_param_dtype(&plan, i), wide ? XP_F32 : XP_BF16);
        assert_int_equal(xp_plan_reduce_dtype(&plan, i), w == XP_W_UP || w == XP_W_DOWN ? XP_BF16 : XP_F32);
    }
    /* router 4 x 4; shared 10 x 4, 4 x 5, 1 x 4; inside it 3 S for each of 4 tokens */
    assert_true(mixed.bytes[XP_KIND_PARAM] == plain.bytes[XP_KIND_PARAM] + 2 * (16 + 40 + 20 + 4));
    assert_true(mixed.bytes[XP_KIND_ACT] == plain.bytes[XP_KIND_ACT] + 2 * 15 * 4);
    assert_true(mixed.sent[XP_FSDP] == plain.sent[XP_FSDP] + 2 * (8 + 20 + 10 + 4));
    xp_plan_close(&plan);
    const xp_mesh_spec s = mesh_of("sim:fsdp=2");
    o.expert_reduce = XP_E4M3;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("expert_reduce: e4m3");
    o.expert_reduce = XP_BF16;
    o.deterministic = 1;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("expert_reduce: bf16");
    o.deterministic = 0;
    o.gate = XP_E4M3;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("gate: e4m3");
    o.gate = XP_NDTYPE;
    o.average = o.deterministic = 1;
    o.expert_reduce = XP_F32;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("divide: world");
    o.average = o.deterministic = 0;
    o.shared = XP_I32;
    assert_int_equal(xp_plan_make(&model, &s, &o, &plan), XP_E_ARG);
    has("shared: i32");
}

/* Micro-batches hold a part of the tokens, move and compute as one batch would, but gather every time. */
static void micro_batches_cost(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    xp_plan_cost one, four;
    o.tokens = 512;
    must(xp_model_of("hand", xp_dialect_find("hf-5.24/qwen3_moe"), 1, 4, 3, 4, 2, 0, &model));
    make("sim:fsdp=4,ep=2", &o);
    assert_int_equal(xp_plan_micro_tokens(&plan), 512);
    xp_plan_cost_of(&plan, 1, &one);
    xp_plan_close(&plan);
    o.micro = 4;
    make("sim:fsdp=4,ep=2", &o);
    assert_int_equal(xp_plan_micro_tokens(&plan), 128);
    xp_plan_cost_of(&plan, 1, &four);
    assert_true(one.token0 == 128 && one.tokens == 128 && four.token0 == 32 && four.tokens == 32);
    assert_true(four.flop_forward == one.flop_forward && four.flop_backward == one.flop_backward);
    assert_true(four.sent[XP_FSDP] == 4 * one.sent[XP_FSDP] && four.sent[XP_WORLD] == 4 * one.sent[XP_WORLD]);
    assert_true(four.sent[XP_EDP] == 4 * one.sent[XP_EDP] && four.sent[XP_EP] == one.sent[XP_EP]);
    /* a quarter, but for the counts by expert: 4 x E x 8 bytes */
    assert_true(4 * (four.bytes[XP_KIND_ACT] - 128) == one.bytes[XP_KIND_ACT] - 128);
    assert_true(four.bytes[XP_KIND_GRAD] == one.bytes[XP_KIND_GRAD] + 4 * (double)one.elements);
    assert_non_null(strstr(printed(), "micro      4 micro-batches of 128 tokens"));
    xp_plan_close(&plan);
    /* deterministic: an expert of one rank is no longer folded where it lies; 8 blocks of its first matrix are held */
    o.deterministic = 1;
    must(xp_model_of("hand", xp_dialect_find("hf-5.24/qwen3_moe"), 1, 400, 300, 4, 2, 0, &model));
    for (o.micro = 1; o.micro <= 4; o.micro += 3) {
        make("sim:fsdp=4,ep=4", &o);
        xp_plan_cost_of(&plan, 0, &four);
        const double shards = (o.micro > 1 ? 8.0 : 4.0) * (double)four.elements, embed = 8.0 * 256 * 400 * 4;
        assert_true(four.bytes[XP_KIND_GRAD] == shards + (o.micro > 1 ? 8.0 * 600 * 400 * 4 : embed));
        xp_plan_close(&plan);
    }
}

static void json_covers_every_rank_once(void **state) {
    (void)state;
    xp_step_options o = xp_step_defaults();
    o.tokens = 13;
    odd_model(4);
    make("sim:dp=2,fsdp=3,ep=2", &o);
    json_t *a, *b;
    must(xp_plan_json(&plan, &a));
    assert_string_equal(json_string_value(json_object_get(a, "schema")), "expar.plan/1");
    assert_int_equal(json_array_size(json_object_get(a, "parameters")), plan.params);
    const json_t *ranks = json_object_get(a, "ranks");
    json_int_t next = 0, tokens = 0;
    for (size_t i = 0; i < json_array_size(ranks); i++) {
        const json_t *r = json_array_get(ranks, i);
        const json_int_t first = json_integer_value(json_object_get(r, "first"));
        const json_int_t last = json_integer_value(json_object_get(r, "last"));
        assert_true(first == next && last >= first);
        next = last + 1;
        tokens += (last - first + 1) * json_integer_value(json_object_get(r, "tokens"));
        assert_true(json_real_value(json_object_get(json_object_get(r, "bytes"), "total")) > 0);
        assert_int_equal(json_object_size(json_object_get(r, "sent")), XP_NAXIS);
    }
    assert_int_equal(next, 6);
    assert_int_equal(tokens, 13);
    xp_plan again;
    must(xp_plan_make(&model, &plan.mesh, &o, &again)); /* the same plan from the same arguments */
    must(xp_plan_json(&again, &b));
    assert_true(json_equal(a, b));
    json_decref(a);
    json_decref(b);
    xp_plan_close(&again);
    xp_plan_close(&plan);
    xp_plan_close(&plan); /* twice does no harm */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_element_has_one_owner),
        cmocka_unit_test(chunks),
        cmocka_unit_test(row_tables_agree_with_shards),
        cmocka_unit_test(tokens_are_dealt_whole),
        cmocka_unit_test(parameters_of_a_published_model),
        cmocka_unit_test(dense_layers_are_left_out),
        cmocka_unit_test(costs_add_up_on_every_mesh),
        cmocka_unit_test(costs_by_hand),
        cmocka_unit_test(capacities_by_hand),
        cmocka_unit_test(deterministic_mode_moves_block_partials),
        cmocka_unit_test(foreach_needs_one_placement),
        cmocka_unit_test(mixed_placements_refuse_foreach),
        cmocka_unit_test(micro_batches_cost),
        cmocka_unit_test(factors_of_experts),
        cmocka_unit_test(weighed_experts),
        cmocka_unit_test(latent_width),
        cmocka_unit_test(router_width),
        cmocka_unit_test(around_the_experts),
        cmocka_unit_test(norms_of_both_outputs),
        cmocka_unit_test(layers_have_records),
        cmocka_unit_test(dtypes_by_parameter),
        cmocka_unit_test(coefficients_come_from_the_model),
        cmocka_unit_test(options_are_refused_by_name),
        cmocka_unit_test(meshes_are_refused_by_name),
        cmocka_unit_test(printed_plan_says_what_it_is),
        cmocka_unit_test(json_covers_every_rank_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
