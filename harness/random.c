/* Draws of random cases. Sizes are drawn first and cut until the pass is small enough; nothing is drawn that no run
 * could honour. */
#include "random.h"

#include <stdio.h>
#include <string.h>

enum { MAX_FLOP = 20000000, MAX_EXPERTS = 32, REDRAWS = 64 };

typedef struct {
    uint64_t seed, key, next;
} dice;

static uint64_t roll(dice *d, uint64_t n) {
    return xp_rng(d->seed, d->key, d->next++) % n;
}

static int64_t between(dice *d, int64_t lo, int64_t hi) {
    return lo + (int64_t)roll(d, (uint64_t)(hi - lo + 1));
}

/* Small numbers as often as large ones: half the draws fall below the cube root of the range. */
static int64_t size(dice *d, int64_t lo, int64_t hi) {
    const int64_t low = lo + (hi - lo) / 8;
    return roll(d, 2) ? between(d, lo, low > lo ? low : hi) : between(d, lo, hi);
}

/* World 1 half of the time; else 2 to 8, as dp x fsdp and with an ep that divides both the world and E. */
static void draw_mesh(dice *d, int routed, xp_case *c) {
    char text[XP_MESH_TEXT];
    const int world = roll(d, 2) ? 1 : (int)between(d, 2, 8);
    int dp = 1, ep = 1, ep_fsdp;
    for (int tries = 0; tries < 8; tries++) {
        const int t = (int)between(d, 1, world);
        if (world % t == 0)
            dp = t;
        const int e = (int)between(d, 1, world);
        if (routed && world % e == 0)
            ep = e;
    }
    ep_fsdp = world / ep;
    for (int tries = 0; tries < 4; tries++) {
        const int t = (int)between(d, 1, world / ep);
        if (world / ep % t == 0)
            ep_fsdp = t;
    }
    snprintf(text, sizeof text, "sim:dp=%d,fsdp=%d,ep=%d,ep_fsdp=%d", dp, world / dp, ep, ep_fsdp);
    if (roll(d, 4) == 0)
        snprintf(text + strlen(text), sizeof text - strlen(text), ",jitter=%d", (int)between(d, 0, 999));
    (void)xp_mesh_spec_parse(text, &c->mesh);
    if (routed && c->dim['E' - 'A'] % ep != 0) {
        const int64_t up = (c->dim['E' - 'A'] / ep + 1) * ep;
        c->dim['E' - 'A'] = up <= MAX_EXPERTS ? up : up - ep;
    }
}

static void set_dim(xp_case *c, char letter, int64_t v) {
    c->dim[letter - 'A'] = v;
    c->dim_set[letter - 'A'] = 1;
}

static int64_t dim(const xp_case *c, char letter) {
    return c->dim[letter - 'A'];
}

/* Multiply-adds of the layers' forward and backward, counted as 2. */
static int64_t layer_flop(const xp_case *c) {
    const int64_t D = dim(c, 'D') ? dim(c, 'D') : dim(c, 'H');
    const int64_t row = D * dim(c, 'F') * 3, gate = dim(c, 'H') * (dim(c, 'E') + 2 * dim(c, 'D'));
    return 6 * c->layers * dim(c, 'T') * (dim(c, 'K') * row + gate + dim(c, 'H') * 3 * dim(c, 'S') + 256 * dim(c, 'H'));
}

static void draw_sizes(dice *d, xp_case *c) {
    set_dim(c, 'T', roll(d, 8) ? size(d, 1, 96) : 0);
    set_dim(c, 'E', size(d, 1, MAX_EXPERTS));
    set_dim(c, 'H', size(d, 1, 96));
    set_dim(c, 'F', size(d, 1, 96));
    set_dim(c, 'K', between(d, 1, dim(c, 'E') < 8 ? dim(c, 'E') : 8));
}

static xp_dtype draw_act(dice *d) {
    static const xp_dtype act[] = {XP_F32, XP_BF16, XP_BF16, XP_F16, XP_F64};
    return act[roll(d, 5)];
}

static xp_data draw_data(dice *d, const xp_case *c) {
    static const xp_data layer[] = {XP_DATA_REAL, XP_DATA_REAL,     XP_DATA_EXACT, XP_DATA_TIES,
                                    XP_DATA_SKEW, XP_DATA_IDENTITY, XP_DATA_TEXT};
    static const xp_data stage[] = {XP_DATA_REAL, XP_DATA_REAL,    XP_DATA_EXACT,
                                    XP_DATA_TIES, XP_DATA_EXTREME, XP_DATA_IDENTITY};
    const int block = c->kind != XP_CASE_STAGE || c->stage->chain || strcmp(c->stage->name, "moe") == 0;
    return block ? layer[roll(d, 7)] : stage[roll(d, 6)];
}

/* Parameters, unsharded gradients and the reduction in types of their own, each a third of the time. */
static void draw_types(dice *d, xp_case *c) {
    static const xp_dtype type[] = {XP_F32, XP_BF16, XP_F16};
    if (c->dtype[XP_G_ACT] == XP_F64)
        return;
    if (roll(d, 3) == 0)
        c->dtype[XP_G_PARAM] = type[roll(d, 3)];
    if (!c->deterministic && roll(d, 3) == 0)
        c->dtype[XP_G_GRAD] = type[roll(d, 3)];
    if (!c->deterministic && roll(d, 3) == 0)
        c->dtype[XP_G_REDUCE] = type[roll(d, 3)];
}

static void set_param(xp_case *c, const char *name, const char *value) {
    strcpy(c->param[c->params].name, name);
    strcpy(c->param[c->params++].value, value);
}

static void set_number(xp_case *c, const char *name, int64_t v) {
    char text[24];
    snprintf(text, sizeof text, "%lld", (long long)v);
    set_param(c, name, text);
}

/* Any preset, with groups that divide the experts, and half of the time one field of its own. What contradicts itself
 * is refused by the case's check and drawn again. */
static void draw_dialect(dice *d, xp_case *c) {
    static const struct {
        const char *field, *value[4];
    } own[] = {{"accumulate", {"slots_f32", "eager_act", "eager_f32", "products_act_f32"}},
               {"weight_dtype", {"f32", "act", "f32", "act"}},
               {"logits_dtype", {"f32", "act", "f32", "act"}},
               {"renorm", {"none", "sum", "sum_plus_eps", "log_sum"}},
               {"scale", {"0.5", "2.5", "1.7", "-1"}},
               {"scale_at", {"weight", "output", "weight", "output"}},
               {"router_bias", {"off", "on", "on", "on"}},
               {"select_bias", {"off", "on", "on", "on"}},
               {"select_on", {"score", "logit", "token_table", "first_score"}},
               {"score_dtype", {"f32", "act", "act", "f32"}},
               {"weight_div_k", {"off", "on", "on", "on"}},
               {"expert_bias", {"off", "on", "on", "on"}},
               {"gate_layout", {"concat", "interleaved", "interleaved", "concat"}},
               {"act_rounding", {"each_op", "once", "once", "each_op"}},
               {"activation", {"silu", "gelu_tanh", "relu", "relu2"}},
               {"limit", {"0", "1", "2.5", "7"}},
               {"dx_sum", {"wide", "act", "act", "wide"}},
               {"router_in", {"recurrent_mlp", "rmsnorm_scaled", "recurrent_mlp", "rmsnorm_scaled"}},
               {"null_experts", {"0", "1", "3", "4"}},
               {"null_kind", {"identity", "skip", "identity", "skip"}},
               {"shared_rows", {"1", "2", "3", "1"}},
               {"expert_scale", {"off", "on", "one", "one"}},
               {"logit_softcap", {"0", "2", "30", "5"}},
               {"capacity", {"1", "2", "5", "64"}},
               {"capacity_factor", {"0.25", "0.5", "1", "1.5"}}},
      overflow = {"overflow", {"order", "priority", "slots", "slots"}};
    int n = 0;
    while (xp_dialects[n].name)
        n++;
    const xp_dialect *preset = &xp_dialects[roll(d, (uint64_t)n)];
    if (c->kind == XP_CASE_STAGE)
        set_param(c, "dialect", preset->name); /* one of the stage's own scalars */
    else
        strcpy(c->dialect, preset->name);
    if (c->kind != XP_CASE_STAGE && preset->router_in == XP_ROUTER_RECURRENT_MLP)
        set_dim(c, 'R', size(d, 1, 24));
    if (preset->group_reduce != XP_GROUP_NONE && preset->n_group > 1) {
        const int64_t groups = between(d, 1, 4);
        set_dim(c, 'E', groups * between(d, 2, 8));
        set_number(c, "n_group", groups);
        set_number(c, "topk_group", between(d, 1, groups));
    }
    if (preset->score == XP_SCORE_SPARSEMIXER)
        set_dim(c, 'K', 2);
    else if (dim(c, 'K') > dim(c, 'E'))
        set_dim(c, 'K', dim(c, 'E'));
    if (roll(d, 2)) {
        const size_t i = roll(d, sizeof own / sizeof *own);
        set_param(c, own[i].field, own[i].value[roll(d, 4)]);
        if (strcmp(own[i].field, "shared_rows") == 0) {
            set_param(c, "aux_coef", "0");
            set_param(c, "z_coef", "0");
        }
        if (strncmp(own[i].field, "capacity", 8) == 0) {
            /* A dense layer has no say in which weights are larger. */
            const int dense = c->kind == XP_CASE_STAGE && strcmp(c->stage->name, "moe") == 0;
            const uint64_t which = roll(d, 4);
            set_param(c, overflow.field, overflow.value[dense && which == 1 ? 0 : which]);
            set_param(c, "pad_to_capacity", roll(d, 2) ? "on" : "off");
        }
    }
}

/* Shared experts that the router weighs are equal parts of a width that is there. */
static void draw_parts(dice *d, xp_case *c) {
    xp_dialect record;
    if (xp_case_dialect(c, &record) == XP_OK && record.shared_rows > 0)
        set_dim(c, 'S', record.shared_rows * between(d, 1, 16));
}

/* A width of the experts' own, and norms and a bias around them, each a third of the time. */
static void draw_around(dice *d, xp_case *c) {
    xp_dialect record;
    const int own = xp_case_dialect(c, &record) == XP_OK && !record.null_experts;
    if (roll(d, 3) == 0 && own)
        set_dim(c, 'D', size(d, 1, 96));
    if (roll(d, 3) == 0)
        c->around = (unsigned)between(d, 1, 127) & (dim(c, 'D') ? ~0u : ~(unsigned)XP_LATENT_NORM) &
                    (dim(c, 'S') ? ~0u : ~(unsigned)(XP_SHARED_NORM | XP_SHARED_IN_NORM));
}

/* A layer or a step; deterministic half of the time where it is legal. */
static void draw_layer(dice *d, xp_case *c) {
    c->layers = roll(d, 4) ? 1 : 2;
    draw_sizes(d, c);
    if (roll(d, 3) == 0)
        set_dim(c, 'S', size(d, 1, 48));
    if (c->kind == XP_CASE_STEP || dim(c, 'T') == 0)
        set_dim(c, 'T', size(d, 1, 96));
    draw_dialect(d, c);
    draw_parts(d, c);
    draw_around(d, c);
    draw_mesh(d, 1, c);
    while (layer_flop(c) > MAX_FLOP) {
        set_dim(c, 'T', (dim(c, 'T') + 1) / 2);
        set_dim(c, 'F', (dim(c, 'F') + 1) / 2);
    }
    c->deterministic = c->dtype[XP_G_ACT] != XP_F64 && roll(d, 2) == 0;
    draw_types(d, c);
    c->order = (int)roll(d, 2);
    c->align = roll(d, 4) ? 1 : 16;
    if (c->kind == XP_CASE_STEP)
        c->steps = (int)between(d, 1, 2);
}

/* Scalars that change what is computed; the others stay at their defaults. */
static void draw_scalars(dice *d, xp_case *c) {
    static const struct {
        const char *stage, *name, *value[3];
    } scalar[] = {{"cast", "saturate", {"0", "1", "1"}},
                  {"gradnorm", "p", {"1", "2", "inf"}},
                  {"clip", "max_norm", {"0", "0.5", "1000"}},
                  {"adamw", "step", {"1", "2", "1000"}},
                  {"rmsnorm", "weight_first", {"off", "on", "on"}},
                  {"rmsnorm_bwd", "weight_first", {"off", "on", "on"}},
                  {"rmsnorm_bwd", "block", {"0", "16", "16"}},
                  {"embed_bwd", "block", {"0", "16", "16"}},
                  {"balance", "scope_world", {"0", "1", "1"}}};
    for (size_t i = 0; i < sizeof scalar / sizeof *scalar; i++) {
        if (strcmp(c->stage->name, scalar[i].stage) == 0)
            set_param(c, scalar[i].name, scalar[i].value[roll(d, 3)]);
    }
}

static void forget_size(xp_case *c, char letter) {
    xp_case plain;
    xp_case_defaults(c->kind, c->stage, &plain);
    c->dim[letter - 'A'] = plain.dim[letter - 'A'];
    c->dim_set[letter - 'A'] = 0;
}

/* A line names only the sizes that its stage has. */
static void keep_own_sizes(xp_case *c) {
    for (char letter = 'A'; letter <= 'Z'; letter++) {
        if (!xp_case_takes(c, letter))
            forget_size(c, letter);
    }
}

/* A recipe of block scaling: codes, scales, blocks and rule, the second level with most e4m3 scales. */
static void draw_blocks(dice *d, xp_case *c) {
    static const xp_dtype code[] = {XP_E4M3, XP_E5M2, XP_E4M3FNUZ, XP_E5M2FNUZ, XP_E2M1};
    static const xp_dtype scale[] = {XP_F32, XP_E8M0, XP_E4M3};
    static const char *const rows[] = {"0", "1", "1", "128"}, *const cols[] = {"0", "16", "32", "128"};
    static const char *const rule[] = {"amax", "pow2", "mx"};
    if (c->dtype[XP_G_ACT] == XP_F64)
        c->dtype[XP_G_ACT] = XP_F32; /* its arithmetic is f32 */
    c->dtype[XP_G_CODE] = code[roll(d, 5)];
    c->dtype[XP_G_SCALE] = scale[roll(d, 3)];
    set_param(c, "rows", rows[roll(d, 4)]);
    set_param(c, "cols", cols[roll(d, 4)]);
    if (c->dtype[XP_G_SCALE] == XP_E4M3 && roll(d, 4))
        strcpy(c->with, "tensor_scale");
    if (strcmp(c->stage->name, "quant") != 0)
        return;
    set_param(c, "rule", rule[c->dtype[XP_G_SCALE] == XP_E4M3 ? 0 : roll(d, 3)]);
    set_param(c, "nonfinite", roll(d, 2) ? "one" : "nan");
}

/* A dialect for a stage that has all of one, and the sizes that go with it. */
static void draw_record(dice *d, xp_case *c) {
    xp_dialect record;
    draw_dialect(d, c);
    if (xp_case_dialect(c, &record) == XP_OK && record.select_on != XP_ON_TOKEN_TABLE)
        forget_size(c, 'V'); /* of the table alone */
    if (strcmp(c->stage->name, "moe") == 0 && roll(d, 2))
        set_dim(c, 'S', size(d, 1, 48));
    draw_parts(d, c);
}

static void draw_stage(dice *d, xp_case *c) {
    draw_sizes(d, c);
    set_dim(c, 'N', size(d, 0, 6000));
    set_dim(c, 'V', size(d, 2, 256));
    set_dim(c, 'R', size(d, 1, 40));
    draw_mesh(d, 0, c);
    draw_scalars(d, c);
    if (strcmp(c->stage->name, "cast") == 0)
        c->dtype[XP_G_PARAM] = (xp_dtype)roll(d, XP_E2M1 + 1);
    if (strcmp(c->stage->name, "quant") == 0 || strcmp(c->stage->name, "dequant") == 0)
        draw_blocks(d, c);
    if (strcmp(c->stage->name, "scatter") == 0 && c->dtype[XP_G_ACT] == XP_F64)
        c->dtype[XP_G_ACT] = XP_F32; /* its reduction type is a scalar of its own, f32 unless a line says so */
    if (strcmp(c->stage->name, "moe") == 0 || strcmp(c->stage->name, "route") == 0 ||
        strcmp(c->stage->name, "route_bwd") == 0)
        draw_record(d, c);
    if (strncmp(c->stage->name, "gradnorm", 8) == 0 && c->data == XP_DATA_TIES)
        c->data = XP_DATA_REAL;
    keep_own_sizes(c);
}

static const xp_stage *draw_stage_name(dice *d) {
    int n = 0;
    while (xp_stages[n])
        n++;
    return xp_stages[roll(d, (uint64_t)n)];
}

void xp_random_case(uint64_t seed, uint64_t n, int redraw, xp_case *out) {
    dice d = {seed, xp_rng_stream("random case") + (uint64_t)redraw * 0x9e3779b97f4a7c15u, n << 16};
    for (int tries = 0; tries < REDRAWS; tries++) {
        const uint64_t what = roll(&d, 4);
        const xp_stage *s = what == 0 ? draw_stage_name(&d) : NULL;
        const xp_case_kind kind = what == 0 ? XP_CASE_STAGE : what == 1 ? XP_CASE_STEP : XP_CASE_LAYER;
        xp_case_defaults(kind, s, out);
        /* Most stages are in every layer; those with generated inputs get the other draws. */
        if (s && s->chain)
            xp_case_defaults(XP_CASE_LAYER, NULL, out);
        out->dtype[XP_G_ACT] = draw_act(&d);
        out->data = draw_data(&d, out);
        out->seed = xp_rng(seed, d.key, ~n) >> 33;
        if (out->kind == XP_CASE_STAGE)
            draw_stage(&d, out);
        else
            draw_layer(&d, out);
        snprintf(out->name, sizeof out->name, "random/%llu%s", (unsigned long long)n, redraw ? "'" : "");
        if (xp_case_check(out) == XP_OK)
            return;
    }
}
