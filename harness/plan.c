/* Makes the plan: which parameters there are, who holds which part, who counts it, what may go wrong with the options.
 *
 * Everything here is arithmetic on its arguments. What a report looks like is plan_print.c. */
#include "plan.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

xp_step_options xp_step_defaults(void) {
    return (xp_step_options){
        .tokens = 512,
        .shrink = 1,
        .act = XP_BF16,
        .param = XP_BF16,
        .reduce = XP_F32,
        .grad = XP_F32,
        .router = XP_F32,
        .shared = XP_NDTYPE,
        .gate = XP_NDTYPE,
        .expert_reduce = XP_NDTYPE,
        .lr = 1e-3,
        .beta1 = 0.9,
        .beta2 = 0.999,
        .eps = 1e-8,
        .weight_decay = 0.01,
        .max_norm = 1.0,
        .clip_eps = 1e-6,
        .aux_coef = (double)NAN,
        .z_coef = (double)NAN,
        .seed = 1,
        .micro = 1,
    };
}

const char *xp_optimizer_name(xp_optimizer o) {
    return o == XP_SGD ? "sgd" : "adamw";
}

const char *xp_optim_path_name(xp_optim_path o) {
    static const char *const name[] = {"auto", "flat", "for-loop", "foreach"};
    return name[o];
}

/* ---- checks ---- */

static xp_status check_dtype(const char *field, xp_dtype d, uint32_t allowed, const char *expected) {
    if ((unsigned)d < XP_NDTYPE && (XP_BIT(d) & allowed))
        return XP_OK;
    const char *name = xp_dtype_name(d);
    return XP_FAIL(XP_E_ARG, "%s: %s, expected %s", field, name ? name : "no dtype", expected);
}

static xp_status check_real(const char *field, double v, double lo, double hi) {
    if (v >= lo && v <= hi)
        return XP_OK;
    return XP_FAIL(XP_E_ARG, "%s: %g, expected %g to %g", field, v, lo, hi);
}

static xp_status check_reduce(const char *field, xp_dtype d, const xp_step_options *o) {
    if (o->grad == XP_F64)
        return check_dtype(field, d, XP_BIT(XP_F64), "f64, because grad is f64");
    if (o->deterministic)
        return check_dtype(field, d, XP_BIT(XP_F32), "f32: deterministic mode folds block partials in f32");
    return check_dtype(field, d, XP_BIT(XP_F32) | XP_BIT(XP_BF16) | XP_BIT(XP_F16), "f32, bf16 or f16");
}

static xp_status check_dtypes(const xp_step_options *o) {
    static const char act[] = "f32, bf16, f16 or f64";
    XP_TRY(check_dtype("act", o->act, XP_DT_ACT, act));
    XP_TRY(check_dtype("param", o->param, XP_DT_ACT, act));
    XP_TRY(check_dtype("grad", o->grad, XP_DT_ACT, act));
    if (o->act != XP_F64)
        XP_TRY(check_dtype("router", o->router, XP_BIT(XP_F32), "f32: the softmax runs wide (f64 only with act f64)"));
    if (o->shared != XP_NDTYPE)
        XP_TRY(check_dtype("shared", o->shared, XP_DT_ACT, act));
    if (o->gate != XP_NDTYPE)
        XP_TRY(check_dtype("gate", o->gate, XP_DT_ACT, act));
    XP_TRY(check_reduce("reduce", o->reduce, o));
    if (o->expert_reduce != XP_NDTYPE)
        XP_TRY(check_reduce("expert_reduce", o->expert_reduce, o));
    if (!o->deterministic)
        return XP_OK;
    return check_dtype("grad", o->grad, XP_BIT(XP_F32), "f32: deterministic mode keeps block partials in f32");
}

/* In deterministic mode blocks of tokens are folded in order: a block may not lie in two micro-batches. */
static xp_status check_batch(const xp_step_options *o) {
    if (o->tokens < 1 || o->tokens > INT32_MAX)
        return XP_FAIL(XP_E_ARG, "tokens: %lld, expected 1 to %d", (long long)o->tokens, INT32_MAX);
    if (o->micro < 1 || o->tokens % o->micro != 0)
        return XP_FAIL(XP_E_ARG, "micro: %d, expected a divisor of the %lld tokens", o->micro, (long long)o->tokens);
    if (o->micro > 1 && o->deterministic && o->tokens / o->micro % XP_TOKEN_BLOCK != 0)
        return XP_FAIL(XP_E_ARG, "micro: %d of %lld tokens each, expected a multiple of %d in deterministic mode",
                       o->micro, (long long)o->tokens / o->micro, (int)XP_TOKEN_BLOCK);
    return XP_OK;
}

static xp_status check_options(const xp_step_options *o) {
    XP_TRY(check_batch(o));
    if (o->optimizer != XP_ADAMW && o->optimizer != XP_SGD)
        return XP_FAIL(XP_E_ARG, "optimizer: %d, expected adamw or sgd", (int)o->optimizer);
    if ((unsigned)o->path > XP_PATH_FOREACH)
        return XP_FAIL(XP_E_ARG, "path: %d, expected auto, flat, for-loop or foreach", (int)o->path);
    XP_TRY(check_dtypes(o));
    if (o->average && o->deterministic)
        return XP_FAIL(XP_E_ARG, "divide: world, expected once: deterministic mode gives every mesh the same bits");
    XP_TRY(check_real("lr", o->lr, 0, 1e6));
    XP_TRY(check_real("beta1", o->beta1, 0, 1 - 0x1p-53));
    XP_TRY(check_real("beta2", o->beta2, 0, 1 - 0x1p-53));
    XP_TRY(check_real("eps", o->eps, 0, 1e6));
    XP_TRY(check_real("weight_decay", o->weight_decay, 0, 1e6));
    XP_TRY(check_real("momentum", o->momentum, 0, 1));
    XP_TRY(check_real("max_norm", o->max_norm, 0, 3e38));
    XP_TRY(check_real("clip_eps", o->clip_eps, 0, 3e38));
    if (!isnan(o->aux_coef))
        XP_TRY(check_real("aux_coef", o->aux_coef, 0, 1e6));
    return isnan(o->z_coef) ? XP_OK : check_real("z_coef", o->z_coef, 0, 1e6);
}

static xp_status check_mesh(const xp_mesh_spec *s, const xp_model *m) {
    if (s->dp < 1 || s->fsdp < 1 || s->ep < 1 || s->ep_fsdp < 1 || s->ep_dp < 1 ||
        (int64_t)s->dp * s->fsdp != s->world || (int64_t)s->ep * s->ep_fsdp * s->ep_dp != s->world)
        return XP_FAIL(XP_E_ARG,
                       "mesh: dp %d x fsdp %d and ep %d x ep_fsdp %d x ep_dp %d must both make the world of %d", s->dp,
                       s->fsdp, s->ep, s->ep_fsdp, s->ep_dp, s->world);
    if (m->E % s->ep != 0)
        return XP_FAIL(XP_E_ARG, "ep: %d does not divide the %lld experts of %s", s->ep, (long long)m->E, m->name);
    return XP_OK;
}

/* ---- parameters ---- */

static xp_status add(xp_plan *p, xp_weight w, int block, int ndim, int64_t G, int64_t R, int64_t N, double std) {
    static const char *const suffix[XP_NWEIGHT] = {
        [XP_W_EMBED] = "model.embed_tokens.weight",
        [XP_W_NORM] = "post_attention_layernorm.weight",
        [XP_W_ROUTER] = "mlp.gate.weight",
        [XP_W_ROUTER_BIAS] = "mlp.gate.bias",
        [XP_W_ROUTER_DOWN] = "mlp.gate.down_proj.weight",
        [XP_W_ROUTER_DOWN_BIAS] = "mlp.gate.down_proj.bias",
        [XP_W_ROUTER_STATE] = "mlp.gate.router_states_scale",
        [XP_W_ROUTER_NORM] = "mlp.gate.router_mlp.norm.weight",
        [XP_W_ROUTER_FC1] = "mlp.gate.router_mlp.fc1.weight",
        [XP_W_ROUTER_FC1_BIAS] = "mlp.gate.router_mlp.fc1.bias",
        [XP_W_ROUTER_FC2] = "mlp.gate.router_mlp.fc2.weight",
        [XP_W_ROUTER_FC2_BIAS] = "mlp.gate.router_mlp.fc2.bias",
        [XP_W_EXPERT_SCALE] = "mlp.gate.per_expert_scale",
        [XP_W_LATENT_DOWN] = "mlp.fc1_latent_proj.weight",
        [XP_W_LATENT_UP] = "mlp.fc2_latent_proj.weight",
        [XP_W_LATENT_NORM] = "mlp.pre_expert_norm.weight",
        [XP_W_EXPERT_NORM] = "mlp.experts.post_expert_norm.weight",
        [XP_W_OUT_BIAS] = "mlp.bias",
        [XP_W_BLOCK_NORM] = "mlp.post_mlp_layernorm.weight",
        [XP_W_ROUTED_NORM] = "mlp.routed_norm.weight",
        [XP_W_SHARED_NORM] = "mlp.shared_norm.weight",
        [XP_W_SHARED_IN_NORM] = "mlp.shared_in_norm.weight",
        [XP_W_UP] = "mlp.experts.gate_up_proj",
        [XP_W_UP_BIAS] = "mlp.experts.gate_up_proj_bias",
        [XP_W_DOWN] = "mlp.experts.down_proj",
        [XP_W_DOWN_BIAS] = "mlp.experts.down_proj_bias",
        [XP_W_SHARED_UP] = "mlp.shared_expert.gate_up_proj",
        [XP_W_SHARED_DOWN] = "mlp.shared_expert.down_proj",
        [XP_W_SHARED_GATE] = "mlp.shared_expert_gate.weight",
        [XP_W_FINAL_NORM] = "model.norm.weight",
        [XP_W_HEAD] = "lm_head.weight",
    };
    const int one = w == XP_W_EXPERT_SCALE && p->model.dialect.expert_scale == XP_FACTOR_ONE;
    const int behind_mlp = w == XP_W_ROUTER && p->model.router_width;
    const int own = w == XP_W_ROUTER_NORM && !p->model.router_width;
    const char *called = one          ? "mlp.gate.global_scale"
                         : behind_mlp ? "mlp.gate.router_mlp.out_proj.weight"
                         : own        ? "mlp.gate.norm.weight"
                                      : suffix[w];
    xp_plan_param *q = &p->param[p->params++];
    q->weight = w;
    q->block = block;
    q->ndim = ndim;
    q->G = G;
    q->R = R;
    q->N = N;
    q->expert = w == XP_W_UP || w == XP_W_UP_BIAS || w == XP_W_DOWN || w == XP_W_DOWN_BIAS;
    q->gather = q->expert ? XP_EP_FSDP : XP_FSDP;
    q->reduce = q->expert ? XP_EDP : XP_WORLD;
    q->decay = ndim > 1;
    const int norm = w == XP_W_NORM || w == XP_W_FINAL_NORM || w == XP_W_LATENT_NORM || w == XP_W_EXPERT_NORM ||
                     w == XP_W_BLOCK_NORM || w == XP_W_ROUTER_NORM || w == XP_W_ROUTED_NORM || w == XP_W_SHARED_NORM ||
                     w == XP_W_SHARED_IN_NORM;
    q->mean = norm || w == XP_W_EXPERT_SCALE || w == XP_W_ROUTER_STATE ? 1.0 : 0.0;
    q->std = std;
    const int64_t size[3] = {G, R, N};
    for (int d = 0; d < ndim; d++)
        q->shape[d] = ndim == 1 ? R : N == 1 ? size[d] : size[3 - ndim + d];
    if (block < 0)
        snprintf(q->name, sizeof q->name, "%s", called);
    else
        snprintf(q->name, sizeof q->name, "model.layers.%d.%s", p->layer[block], called);
    /* G R N is at most 2^58 by the limits of a model, so the sum can't wrap before this stops it. */
    p->elements += G * R * N;
    if (p->elements > INT64_C(1) << 60)
        return XP_FAIL(XP_E_ARG, "model: %s has more than 2^60 parameters", p->model.name);
    return XP_OK;
}

/* Initial values keep every map's output near the scale of its input (std = 1/sqrt(columns)) at any --shrink. Norm
 * weights vary around 1: with all of them equal to 1 a missing multiplication would not be seen. */
#define BIAS_STD 0.25

/* Down to width R, the state, its norm and two maps. */
static xp_status add_router_mlp(xp_plan *p, int b) {
    const int64_t R = p->model.router_width, H = p->model.H;
    const double by_r = 1.0 / sqrt((double)R);
    XP_TRY(add(p, XP_W_ROUTER_DOWN, b, 2, 1, R, H, 1.0 / sqrt((double)H)));
    XP_TRY(add(p, XP_W_ROUTER_DOWN_BIAS, b, 1, 1, R, 1, BIAS_STD));
    if (b > 0)
        XP_TRY(add(p, XP_W_ROUTER_STATE, b, 1, 1, R, 1, 0.125));
    XP_TRY(add(p, XP_W_ROUTER_NORM, b, 1, 1, R, 1, 0.125));
    XP_TRY(add(p, XP_W_ROUTER_FC1, b, 2, 1, R, R, by_r));
    XP_TRY(add(p, XP_W_ROUTER_FC1_BIAS, b, 1, 1, R, 1, BIAS_STD));
    XP_TRY(add(p, XP_W_ROUTER_FC2, b, 2, 1, R, R, by_r));
    return add(p, XP_W_ROUTER_FC2_BIAS, b, 1, 1, R, 1, BIAS_STD);
}

static xp_status add_around(xp_plan *p, int b) {
    const xp_model *m = &p->model;
    const int64_t D = xp_model_expert_width(m);
    if (m->around & XP_LATENT_NORM)
        XP_TRY(add(p, XP_W_LATENT_NORM, b, 1, 1, D, 1, 0.125));
    if (m->around & XP_EXPERT_NORM)
        XP_TRY(add(p, XP_W_EXPERT_NORM, b, 1, 1, D, 1, 0.125));
    if (m->around & XP_OUT_BIAS)
        XP_TRY(add(p, XP_W_OUT_BIAS, b, 1, 1, m->H, 1, BIAS_STD));
    static const struct {
        unsigned what;
        xp_weight w;
    } norm[] = {{XP_BLOCK_NORM, XP_W_BLOCK_NORM},
                {XP_ROUTED_NORM, XP_W_ROUTED_NORM},
                {XP_SHARED_NORM, XP_W_SHARED_NORM},
                {XP_SHARED_IN_NORM, XP_W_SHARED_IN_NORM}};
    for (size_t i = 0; i < sizeof norm / sizeof *norm; i++) {
        if (m->around & norm[i].what)
            XP_TRY(add(p, norm[i].w, b, 1, 1, m->H, 1, 0.125));
    }
    return XP_OK;
}

static xp_status add_block(xp_plan *p, int b) {
    const xp_model *m = &p->model;
    const double by_h = 1.0 / sqrt((double)m->H), by_f = 1.0 / sqrt((double)m->F);
    const int64_t maps = m->dialect.gated ? 2 : 1, D = xp_model_expert_width(m), Z = xp_dialect_rows(&m->dialect, m->E);
    const double by_d = 1.0 / sqrt((double)D);
    XP_TRY(add(p, XP_W_NORM, b, 1, 1, m->H, 1, 0.125));
    if (m->router_width)
        XP_TRY(add_router_mlp(p, b));
    if (m->dialect.router_in == XP_ROUTER_RMSNORM_SCALED)
        XP_TRY(add(p, XP_W_ROUTER_NORM, b, 1, 1, m->H, 1, 0.125));
    const int64_t routed = m->router_width ? m->router_width : m->H;
    XP_TRY(add(p, XP_W_ROUTER, b, 2, 1, Z, routed, 1.0 / sqrt((double)routed)));
    if (m->dialect.router_bias)
        XP_TRY(add(p, XP_W_ROUTER_BIAS, b, 1, 1, Z, 1, BIAS_STD));
    if (m->dialect.expert_scale)
        XP_TRY(add(p, XP_W_EXPERT_SCALE, b, 1, 1, xp_dialect_factors(&m->dialect, m->E), 1, 0.125));
    if (m->latent) {
        XP_TRY(add(p, XP_W_LATENT_DOWN, b, 2, 1, D, m->H, by_h));
        XP_TRY(add(p, XP_W_LATENT_UP, b, 2, 1, m->H, D, by_d));
    }
    XP_TRY(add_around(p, b));
    XP_TRY(add(p, XP_W_UP, b, 3, m->E, maps * m->F, D, by_d));
    if (m->dialect.expert_bias)
        XP_TRY(add(p, XP_W_UP_BIAS, b, 2, m->E, maps * m->F, 1, BIAS_STD));
    XP_TRY(add(p, XP_W_DOWN, b, 3, m->E, D, m->F, by_f));
    if (m->dialect.expert_bias)
        XP_TRY(add(p, XP_W_DOWN_BIAS, b, 2, m->E, D, 1, BIAS_STD));
    if (!m->S)
        return XP_OK;
    XP_TRY(add(p, XP_W_SHARED_UP, b, 2, 1, maps * m->S, m->H, by_h));
    XP_TRY(add(p, XP_W_SHARED_DOWN, b, 2, 1, m->H, m->S, 1.0 / sqrt((double)m->S)));
    return m->dialect.shared_gate ? add(p, XP_W_SHARED_GATE, b, 2, 1, 1, m->H, by_h) : XP_OK;
}

static xp_status add_all(xp_plan *p) {
    const xp_model *m = &p->model;
    XP_TRY(add(p, XP_W_EMBED, -1, 2, 1, XP_VOCAB, m->H, 1.0));
    for (int b = 0; b < p->blocks; b++)
        XP_TRY(add_block(p, b));
    XP_TRY(add(p, XP_W_FINAL_NORM, -1, 1, 1, m->H, 1, 0.125));
    return add(p, XP_W_HEAD, -1, 2, 1, XP_VOCAB, m->H, 1.0 / sqrt((double)m->H));
}

/* An insertion sort: a few thousand names that are nearly in order already. */
static void sort_names(xp_plan *p) {
    for (int i = 0; i < p->params; i++) {
        int j = i;
        for (; j > 0 && strcmp(p->param[p->by_name[j - 1]].name, p->param[i].name) > 0; j--)
            p->by_name[j] = p->by_name[j - 1];
        p->by_name[j] = i;
    }
}

static xp_status make_params(xp_plan *p) {
    const size_t room = (size_t)p->blocks * (20 + XP_ROUTER_MLP_WEIGHTS) + 3;
    p->param = calloc(room, sizeof *p->param);
    p->by_name = calloc(room, sizeof *p->by_name);
    if (!p->param || !p->by_name)
        return XP_FAIL(XP_E_NOMEM, "plan: no memory for %zu parameters", room);
    XP_TRY(add_all(p));
    sort_names(p);
    return XP_OK;
}

static xp_status choose_blocks(xp_plan *p) {
    for (int i = 0; i < p->model.layers; i++) {
        if (xp_model_is_moe(&p->model, i))
            p->layer[p->blocks++] = i;
    }
    for (int b = 0; b < p->blocks; b++)
        p->balanced += xp_plan_is_balanced(p, b);
    if (p->blocks)
        return XP_OK;
    return XP_FAIL(XP_E_ARG, "layers: %d, and none of the first %d layers of %s is a MoE block", p->model.layers,
                   p->model.layers, p->model.name);
}

/* ---- the optimizer's path ---- */

/* A list of tensors can be fused when all lie on one mesh. Dense parameters lie on (dp copies, fsdp rows), experts on
 * (ep_dp copies, ep groups, ep_fsdp rows): one mesh exactly when ep is 1 and the other two agree. */
static void judge_foreach(xp_plan *p) {
    const xp_mesh_spec *s = &p->mesh;
    p->foreach_legal = s->ep == 1 && s->ep_fsdp == s->fsdp && s->ep_dp == s->dp;
    if (p->foreach_legal)
        snprintf(p->foreach_why, sizeof p->foreach_why,
                 "legal: dense and expert parameters lie on one mesh, %d copies x %d", s->dp, s->fsdp);
    else
        snprintf(p->foreach_why, sizeof p->foreach_why,
                 "not legal: dense lie on (dp %d, fsdp %d), experts on (ep_dp %d, ep %d, ep_fsdp %d): mixed placements "
                 "(pytorch#134551)",
                 s->dp, s->fsdp, s->ep_dp, s->ep, s->ep_fsdp);
}

static xp_status choose_path(xp_plan *p) {
    judge_foreach(p);
    if (p->opt.path == XP_PATH_AUTO)
        p->opt.path = XP_PATH_FLAT;
    if (p->opt.path == XP_PATH_FOREACH && !p->foreach_legal)
        return XP_FAIL(XP_E_ARG, "path: foreach is %s; expected flat or for-loop", p->foreach_why);
    static const char *const why[] = {
        [XP_PATH_AUTO] = "",
        [XP_PATH_FLAT] = "one pass over each rank's flat f32 shard, legal over any placement",
        [XP_PATH_FOR_LOOP] = "one parameter after another; legal over any placement",
        [XP_PATH_FOREACH] = "fused lists; legal because all parameters lie on one mesh",
    };
    snprintf(p->path_why, sizeof p->path_why, "%s", why[p->opt.path]);
    return XP_OK;
}

/* ---- the plan ---- */

const xp_dialect *xp_plan_dialect(const xp_plan *p, int block) {
    return xp_model_dialect(&p->model, p->layer[block]);
}

int xp_plan_is_balanced(const xp_plan *p, int block) {
    const xp_dialect *d = xp_plan_dialect(p, block);
    return d->select_on != XP_ON_TOKEN_TABLE && d->shared_rows == 0;
}

/* Experts that the router weighs have equal parts of the shared width, and no share of a balance loss. */
static xp_status check_shared(const xp_plan *p) {
    const xp_model *m = &p->model;
    const int n = m->dialect.shared_rows;
    if (n > 0 && (m->S < n || m->S % n != 0))
        return XP_FAIL(XP_E_ARG, "S: %lld, expected a multiple of the %d shared experts that the router of %s weighs",
                       (long long)m->S, n, m->name);
    if (n > 0 && (p->opt.aux_coef != 0 || p->opt.z_coef != 0))
        return XP_FAIL(XP_E_ARG, "%s: %g, expected 0: %s has shared_rows, and no balance loss is defined for them",
                       p->opt.aux_coef != 0 ? "aux_coef" : "z_coef",
                       p->opt.aux_coef != 0 ? p->opt.aux_coef : p->opt.z_coef, m->name);
    return XP_OK;
}

static xp_status fill(xp_plan *p) {
    XP_TRY(check_options(&p->opt));
    XP_TRY(xp_model_override(&p->model, p->opt.layers, 0, 0));
    XP_TRY(xp_model_shrink(&p->model, p->opt.shrink));
    XP_TRY(xp_model_set_around(&p->model, p->model.around));
    XP_TRY(check_mesh(&p->mesh, &p->model));
    XP_TRY(xp_model_set_router_width(&p->model, p->model.router_width));
    XP_TRY(xp_dialect_check(&p->model.dialect, p->model.E, p->model.K));
    for (int n = 0; n < p->model.others; n++)
        XP_TRY(xp_dialect_check(&p->model.other[n], p->model.E, p->model.K));
    if (p->opt.act == XP_F64)
        p->opt.router = XP_F64;
    p->opt.shared = p->opt.shared != XP_NDTYPE ? p->opt.shared : p->opt.param;
    p->opt.gate = p->opt.gate != XP_NDTYPE ? p->opt.gate : p->opt.param;
    p->opt.expert_reduce = p->opt.expert_reduce != XP_NDTYPE ? p->opt.expert_reduce : p->opt.reduce;
    if (isnan(p->opt.aux_coef))
        p->opt.aux_coef = p->model.dialect.aux_coef;
    if (isnan(p->opt.z_coef))
        p->opt.z_coef = p->model.dialect.z_coef;
    XP_TRY(check_shared(p));
    XP_TRY(choose_blocks(p));
    XP_TRY(make_params(p));
    return choose_path(p);
}

xp_status xp_plan_make(const xp_model *model, const xp_mesh_spec *mesh, const xp_step_options *opt, xp_plan *out) {
    memset(out, 0, sizeof *out);
    out->model = *model;
    out->mesh = *mesh;
    out->opt = *opt;
    const xp_status st = fill(out);
    if (st != XP_OK)
        xp_plan_close(out);
    return st;
}

void xp_plan_close(xp_plan *p) {
    free(p->param);
    free(p->by_name);
    memset(p, 0, sizeof *p);
}

int64_t xp_plan_micro_tokens(const xp_plan *p) {
    return p->opt.tokens / p->opt.micro;
}

void xp_plan_tokens(const xp_plan *p, int rank, int64_t *out_start, int64_t *out_count) {
    const int64_t unit = p->opt.deterministic ? XP_TOKEN_BLOCK : 1, tokens = xp_plan_micro_tokens(p);
    const int64_t units = (tokens + unit - 1) / unit;
    const int64_t each = units / p->mesh.world, more = units % p->mesh.world;
    const int64_t first = rank * each + (rank < more ? rank : more);
    const int64_t last = first + each + (rank < more);
    const int64_t start = first * unit < tokens ? first * unit : tokens;
    const int64_t end = last * unit < tokens ? last * unit : tokens;
    *out_start = start;
    *out_count = end - start;
}

void xp_plan_chunk(int64_t R, int P, int i, int64_t *out_start, int64_t *out_count) {
    const int64_t each = (R + P - 1) / P;
    const int64_t start = i * each < R ? i * each : R;
    *out_start = start;
    *out_count = each < R - start ? each : R - start;
}

static void shard_of(const xp_plan_param *q, const xp_mesh_spec *s, const xp_mesh_coord *c, xp_plan_shard *out) {
    out->groups = q->expert ? q->G / s->ep : q->G;
    out->g0 = q->expert ? c->ep * out->groups : 0;
    xp_plan_chunk(q->R, q->expert ? s->ep_fsdp : s->fsdp, q->expert ? c->ep_fsdp : c->fsdp, &out->r0, &out->rows);
    out->count = out->groups * out->rows * q->N;
    out->owner = q->expert ? c->ep_dp == 0 : c->dp == 0;
}

int64_t xp_plan_shards(const xp_plan *p, int rank, xp_plan_shard *out) {
    xp_mesh_coord c;
    xp_mesh_coords(&p->mesh, rank, &c);
    int64_t at = 0;
    for (int i = 0; i < p->params; i++) {
        shard_of(&p->param[i], &p->mesh, &c, &out[i]);
        out[i].offset = at;
        at += out[i].count;
    }
    return at;
}

int xp_plan_rows(const xp_plan *p, int param, xp_axis axis, int64_t *out_start, int64_t *out_rows) {
    const xp_plan_param *q = &p->param[param];
    assert(axis == q->gather || axis == q->reduce);
    const int P = xp_mesh_axis_size(&p->mesh, axis), places = xp_mesh_axis_size(&p->mesh, q->gather);
    /* Copies repeat the same rows: in both reduce axes the gather axis runs fastest. */
    for (int i = 0; i < P; i++)
        xp_plan_chunk(q->R, places, i % places, &out_start[i], &out_rows[i]);
    return P;
}

int xp_plan_find(const xp_plan *p, xp_weight w, int block) {
    for (int i = 0; i < p->params; i++) {
        if (p->param[i].weight == w && p->param[i].block == block)
            return i;
    }
    return -1;
}

/* Gradients of one parameter that some rank may bring to the reduction: one, or one a block of tokens. An expert whose
 * gradient no other rank shares is folded where it lies, unless the fold goes on in the next micro-batch. */
static int64_t partials(const xp_plan *p, const xp_plan_param *q, int64_t blocks) {
    if (q->weight == XP_W_EXPERT_NORM) /* of each expert, too: where they lie must not change the fold */
        return p->opt.deterministic ? blocks * (p->model.E / p->mesh.ep) : 1;
    const int alone = q->expert && p->mesh.ep_fsdp * p->mesh.ep_dp == 1 && p->opt.micro == 1;
    return p->opt.deterministic && !alone ? blocks : 1;
}

static int64_t blocks_of(int64_t tokens) {
    return (tokens + XP_TOKEN_BLOCK - 1) / XP_TOKEN_BLOCK;
}

int64_t xp_plan_chunk_groups(const xp_plan *p, int param) {
    const xp_plan_param *q = &p->param[param];
    const int64_t most = partials(p, q, blocks_of(xp_plan_micro_tokens(p)));
    /* 8 bytes an element whatever the dtype, so that a run in f64 takes the same steps. In double: it may not wrap. */
    const double one = 8.0 * (double)most * (double)q->R * (double)q->N;
    const double n = floor(XP_GRAD_CHUNK / one);
    return n >= (double)q->G ? q->G : n >= 1 ? (int64_t)n : 1;
}

xp_dtype xp_plan_param_dtype(const xp_plan *p, int param) {
    switch (p->param[param].weight) {
    case XP_W_ROUTER:
    case XP_W_ROUTER_BIAS:
    case XP_W_ROUTER_DOWN:
    case XP_W_ROUTER_DOWN_BIAS:
    case XP_W_ROUTER_STATE:
    case XP_W_ROUTER_NORM:
    case XP_W_ROUTER_FC1:
    case XP_W_ROUTER_FC1_BIAS:
    case XP_W_ROUTER_FC2:
    case XP_W_ROUTER_FC2_BIAS:
        return p->opt.gate;
    case XP_W_EXPERT_SCALE:
        return p->opt.act == XP_F64 ? XP_F64 : XP_F32;
    case XP_W_SHARED_UP:
    case XP_W_SHARED_DOWN:
    case XP_W_SHARED_GATE:
        return p->opt.shared;
    default:
        return p->opt.param;
    }
}

xp_dtype xp_plan_reduce_dtype(const xp_plan *p, int param) {
    return p->param[param].expert ? p->opt.expert_reduce : p->opt.reduce;
}

/* ---- cost ---- */

typedef struct {
    double tokens, rows, room;             /* of the rank; rows of its experts, balanced and at most */
    double sent, got, home;                /* rows that it sends and gets when balanced; rows at home, at most */
    int64_t blocks, group_blocks;          /* of tokens: its own, its ep group's */
    double act, param, shared, grad, wide; /* bytes of an element */
} scale;

static void scale_of(const xp_plan *p, const xp_mesh_coord *c, int64_t tokens, scale *out) {
    const xp_mesh_spec *s = &p->mesh;
    *out = (scale){.tokens = (double)tokens, .blocks = blocks_of(tokens)};
    /* Ranks of one ep group: same ep_dp and ep_fsdp, every ep. */
    const xp_dialect *d = &p->model.dialect;
    const int64_t E = p->model.E, K = p->model.K;
    int64_t group = 0, taken = 0;
    for (int e = 0; e < s->ep; e++) {
        int64_t start, count;
        xp_plan_tokens(p, (c->ep_dp * s->ep + e) * s->ep_fsdp + c->ep_fsdp, &start, &count);
        group += count;
        taken += xp_dialect_capacity(d, count, E, K);
        out->group_blocks += blocks_of(count);
    }
    /* An expert that takes so many slots and no more computes no others; one that is padded computes the pads, too. */
    const double full = (double)(E * taken) / s->ep, own = (double)(E * xp_dialect_capacity(d, tokens, E, K));
    out->room = (double)(group * K);
    out->rows = out->got = out->room / s->ep;
    out->sent = out->home = (double)(tokens * K);
    if (xp_dialect_limits(d)) {
        out->got = full < out->got ? full : out->got;
        out->rows = d->pad_to_capacity ? full : out->got;
        out->sent = own < out->sent ? own : out->sent;
    }
    if (d->pad_to_capacity) {
        out->room += full;
        out->home += own;
    }
    out->act = (double)xp_dtype_bytes(p->opt.act, 1);
    out->param = (double)xp_dtype_bytes(p->opt.param, 1);
    out->grad = (double)xp_dtype_bytes(p->opt.grad, 1);
    out->shared = (double)xp_dtype_bytes(p->opt.shared, 1);
    out->wide = p->opt.act == XP_F64 ? 8 : 4;
}

/* Bytes that the forward pass of one block keeps for the backward pass. */
static double kept_activations(const xp_model *m, const scale *n) {
    const double T = n->tokens, C = n->room, H = (double)m->H, E = (double)m->E, K = (double)m->K;
    const double F = (double)m->F, S = (double)m->S, maps = m->dialect.gated ? 3 : 2;
    const double D = (double)xp_model_expert_width(m), latent = m->latent ? 2 * T * D * n->act : 0; /* x and y in it */
    const double logits = m->dialect.logits_dtype == XP_WIDE_F32 ? n->wide : n->act;
    const double weight = m->dialect.weight_dtype == XP_WIDE_F32 ? n->wide : n->act;
    const double model = 3 * T * H * n->act + T * n->wide;      /* x, normed x, y; 1/rms */
    const double kept = xp_dialect_limits(&m->dialect) ? 4 : 0; /* what is left of idx */
    const double A = (double)m->dialect.shared_rows, Z = (double)xp_dialect_rows(&m->dialect, m->E);
    /* logits, scores; idx, w */
    const double route = T * Z * (logits + n->wide) + T * K * (4 + kept + weight) + T * A * weight;
    const double table = T * K * 4 + n->home * 12 + C * 8 + 4 * E * 8;          /* pos; tok, src; recv_tok; counts */
    const double expert = (n->home + C) * D * n->act + C * maps * F * n->param; /* returned, received; inside */
    const double shared = S > 0 ? 3 * T * H * n->act + T * maps * S * n->shared + T * n->act : 0;
    const double R = (double)m->router_width; /* the state, its norm, two maps before and after their gelu; 1/rms */
    const double router_mlp = R > 0 ? 6 * T * R * n->act + T * n->wide : 0;
    double norms = m->dialect.router_in == XP_ROUTER_RMSNORM_SCALED;
    for (unsigned bit = XP_BLOCK_NORM; bit <= XP_SHARED_IN_NORM; bit <<= 1)
        norms += (m->around & bit) != 0;
    /* the latent rows before their norm, the experts' rows before theirs, the sum before the bias and before its norm
     */
    const double around = (m->around & XP_LATENT_NORM ? T * (D * n->act + n->wide) : 0) +
                          (m->around & XP_EXPERT_NORM ? C * (D * n->act + n->wide) : 0) +
                          (m->around & XP_OUT_BIAS ? T * H * n->act : 0) + norms * T * (H * n->act + n->wide);
    return model + router_mlp + latent + route + table + expert + shared + around;
}

/* The most that lives beside the kept activations: at the top of the model, or in the backward of one block. */
static double passing_activations(const xp_model *m, const scale *n) {
    const double T = n->tokens, C = n->room, H = (double)m->H, D = (double)xp_model_expert_width(m), F = (double)m->F;
    const double top = 4 * T * H * n->act + (2 * XP_VOCAB + 3) * T * n->wide; /* 1/rms, logsumexp, loss a token */
    const double state = (double)m->router_width * T * n->act;                /* its gradient, from the block behind */
    const double weights = T * (double)(m->K + m->dialect.shared_rows) * n->wide; /* their gradients */
    const double normed = ((m->around & XP_BLOCK_NORM) != 0) + ((m->around & XP_ROUTED_NORM) != 0); /* and of sums */
    const double block = (1 + normed) * T * H * n->act + 2 * C * D * n->act +
                         (m->dialect.gated ? 2 : 1) * C * F * n->param + state + weights;
    return top > block ? top : block;
}

static double forward_flop(const xp_plan *p, const scale *n) {
    const xp_model *m = &p->model;
    const double T = n->tokens, H = (double)m->H, maps = m->dialect.gated ? 3 : 2;
    const double D = (double)xp_model_expert_width(m);
    const double R = (double)m->router_width, Z = (double)xp_dialect_rows(&m->dialect, m->E), from_x = R > 0 ? R : Z;
    const double router = 2 * T * (H * (from_x + (m->latent ? 2 * D : 0)) + (2 * R + (R > 0 ? Z : 0)) * R),
                 expert = 2 * maps * n->rows * D * (double)m->F;
    const double shared = 2 * maps * T * H * (double)m->S + (m->S && m->dialect.shared_gate ? 2 * T * H : 0);
    return p->blocks * (router + expert + shared) + 2 * T * H * XP_VOCAB;
}

/* One parameter's share of everything but tokens. out_live: bytes of its largest chunk of unsharded gradients. */
static void add_param_cost(const xp_plan *p, int i, const xp_plan_shard *sh, const scale *n, xp_plan_cost *out,
                           double *out_live) {
    const xp_plan_param *q = &p->param[i];
    const int places = xp_mesh_axis_size(&p->mesh, q->gather), sums = xp_mesh_axis_size(&p->mesh, q->reduce);
    const int64_t chunk = xp_plan_chunk_groups(p, i);
    const int of_group = q->expert || q->weight == XP_W_EXPERT_NORM;
    const double parts = (double)partials(p, q, of_group ? n->group_blocks : n->blocks);
    const double own = (double)sh->count, group = (double)q->R * (double)q->N, whole = (double)sh->groups * group;
    const double param = (double)xp_dtype_bytes(xp_plan_param_dtype(p, i), 1);
    const double reduce = (double)xp_dtype_bytes(xp_plan_reduce_dtype(p, i), 1);
    const double moments = p->opt.optimizer == XP_ADAMW ? 8 : p->opt.momentum > 0 ? 4 : 0;
    out->elements += sh->count;
    out->bytes[XP_KIND_PARAM] += 4 * own + param * whole;
    out->bytes[XP_KIND_GRAD] += (p->opt.micro > 1 ? 8 : 4) * own; /* and what the micro-batches before left */
    out->bytes[XP_KIND_OPTIM] += moments * own;
    out->bytes[XP_KIND_BUFFER] += 16 * (places + sums) + 10;
    out->sent[q->gather] += p->opt.micro * (places - 1) * own * param;
    /* Every copy is sent its rows: sums / places times the whole parameter, less what stays here. */
    out->sent[q->reduce] += p->opt.micro * (sums / places * whole - own) * parts * reduce;
    *out_live = parts * (double)(chunk < sh->groups ? chunk : sh->groups) * group * n->grad;
}

static void add_token_cost(const xp_plan *p, const scale *n, xp_plan_cost *out) {
    const xp_model *m = &p->model;
    const double T = n->tokens, H = (double)m->H, remote = 1.0 - 1.0 / p->mesh.ep;
    const double balance =
        p->opt.aux_coef > 0 || p->opt.z_coef > 0 ? T * (double)(m->E + m->dialect.null_experts) * n->wide : 0;
    out->bytes[XP_KIND_ACT] += p->blocks * kept_activations(m, n) + p->balanced * balance + passing_activations(m, n);
    out->bytes[XP_KIND_ACT] += T * (H * n->act + 9); /* position rows, tokens, targets, which are valid */
    out->bytes[XP_KIND_BUFFER] += T * 8 + 8 * (double)(n->blocks + n->group_blocks);
    out->bytes[XP_KIND_BUFFER] += m->around & XP_OUT_BIAS ? T * 4 : 0;
    if (m->around & XP_EXPERT_NORM && p->opt.deterministic) /* numbers of its sums, and of each row's */
        out->bytes[XP_KIND_BUFFER] += 8 * ((double)n->group_blocks * (double)(m->E / p->mesh.ep) + n->room);
    /* There and back, forward and backward; token numbers once. */
    out->sent[XP_EP] += p->opt.micro * p->blocks * remote *
                        (2 * (n->sent + n->got) * (double)xp_model_expert_width(m) * n->act + 8 * n->sent);
    out->flop_forward = p->opt.micro * forward_flop(p, n);
    out->flop_backward = 2 * out->flop_forward;
}

void xp_plan_cost_of(const xp_plan *p, int rank, xp_plan_cost *out) {
    *out = (xp_plan_cost){0};
    xp_mesh_coord c;
    xp_mesh_coords(&p->mesh, rank, &c);
    xp_plan_tokens(p, rank, &out->token0, &out->tokens);
    scale n;
    scale_of(p, &c, out->tokens, &n);
    out->expert_rows = n.rows;
    out->expert_room = n.room;
    double most = 0;
    for (int i = 0; i < p->params; i++) {
        xp_plan_shard sh;
        double live;
        shard_of(&p->param[i], &p->mesh, &c, &sh);
        add_param_cost(p, i, &sh, &n, out, &live);
        most = live > most ? live : most;
    }
    out->bytes[XP_KIND_GRAD] += most;
    add_token_cost(p, &n, out);
    for (int k = 0; k < XP_KIND_JUDGE; k++)
        out->total_bytes += out->bytes[k];
}
