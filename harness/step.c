/* The training step: what runs in which order. Shapes come from the plan, arithmetic from the stages. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "flow.h"
#include "xp/adamw.h"
#include "xp/balance.h"
#include "xp/clip.h"
#include "xp/embed.h"
#include "xp/gradnorm.h"
#include "xp/head.h"
#include "xp/sgd.h"
#include "xp/xent.h"

struct xp_step {
    xp_flow f;
    int embed, norm, head; /* plan indices */
    xp_tensor target, pos, valid, freq, prob, bloss, bcount;
    xp_tensor seg, owner, decay;
    xp_tensor h_last, xn, rstd, logits, lse, tloss; /* the top of the model, forward to backward */
};

xp_status flow_new1(xp_flow *f, xp_kind k, xp_dtype d, int64_t n0, xp_tensor *out) {
    return xp_rank_tensor(f->r, k, d, 1, &n0, out);
}

xp_status flow_new2(xp_flow *f, xp_kind k, xp_dtype d, int64_t n0, int64_t n1, xp_tensor *out) {
    const int64_t dim[2] = {n0, n1};
    return xp_rank_tensor(f->r, k, d, 2, dim, out);
}

void flow_drop(xp_flow *f, xp_tensor *t) {
    xp_rank_drop(f->r, t);
}

xp_status flow_trace(xp_flow *f, const char *site, int y, const xp_tensor *t) {
    /* Once the parameters have moved, they hold what the mesh summed; only deterministic mode makes that the same. */
    if (!f->src->parity || (!f->block && f->r->step > 0))
        return XP_OK;
    return xp_parity_rows(f->src->parity, site, y, f->r->step, f->r->rank, t, f->token0, f->N);
}

/* ---- opening: sizes, dtypes, blocks ---- */

static void take_sizes(xp_flow *f) {
    const xp_model *m = &f->plan->model;
    const xp_step_options *o = &f->plan->opt;
    xp_plan_tokens(f->plan, f->r->rank, &f->token0, &f->T);
    f->N = o->tokens;
    f->H = m->H;
    f->D = xp_model_expert_width(m);
    f->R = m->router_width;
    f->F = m->F;
    f->E = m->E;
    f->K = m->K;
    f->S = m->S;
    f->V = XP_VOCAB;
    f->Y = f->plan->blocks;
    f->Z = xp_dialect_rows(&m->dialect, m->E);
    f->U = (m->dialect.gated ? 2 : 1) * m->F;
    f->X = (m->dialect.gated ? 2 : 1) * m->S;
    f->L = m->E / f->r->mesh->axis[XP_EP]->size;
    f->act = o->act;
    f->param = o->param;
    f->wide = o->act == XP_F64 ? XP_F64 : XP_F32;
    f->logits = m->dialect.logits_dtype == XP_WIDE_ACT ? f->act : f->wide;
    f->weight = m->dialect.weight_dtype == XP_WIDE_ACT ? f->act : f->wide;
    f->grad = o->grad;
    f->block = o->deterministic ? XP_TOKEN_BLOCK : 0;
    f->efold = f->r->mesh->axis[XP_EDP]->size == 1 && o->micro == 1;
    f->divisor = (double)f->N;
    f->r->token0 = f->token0;
}

/* Rows that the ranks of this rank's ep group can send here, and the blocks that their tokens lie in. */
static xp_status take_capacity(xp_flow *f) {
    const xp_comm *ep = f->r->mesh->axis[XP_EP];
    const int pad = f->src->align - 1;
    int ranks[XP_MESH_MAX_RANKS];
    int64_t tokens = 0, blocks = 0, least = 0, recv_least = 0;
    xp_mesh_axis_ranks(&f->plan->mesh, XP_EP, f->r->rank, ranks);
    for (int q = 0; q < ep->size; q++) {
        int64_t t0, t;
        xp_plan_tokens(f->plan, ranks[q], &t0, &t);
        tokens += t;
        blocks += f->block ? (t + f->block - 1) / f->block : 0;
    }
    for (int y = 0; y < f->Y; y++) {
        const int64_t m = layer_least(f, y, 0), c = layer_least(f, y, 1);
        least = m > least ? m : least;
        recv_least = c > recv_least ? c : recv_least;
    }
    f->M = f->T * f->K + f->E * (least + pad);
    f->C = tokens * f->K + f->L * (recv_least + pad);
    if (!f->block)
        return XP_OK;
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I64, blocks, &f->eblocks));
    if (f->plan->model.around & XP_EXPERT_NORM)
        XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I64, blocks * f->L, &f->nblocks));
    const int64_t own = (f->T + f->block - 1) / f->block;
    return flow_new1(f, XP_KIND_BUFFER, XP_I64, own, &f->blocks);
}

/* The numbers of micro-batch i: its tokens follow those of the one before. */
static void enter_micro(xp_flow *f, int i) {
    const xp_comm *ep = f->r->mesh->axis[XP_EP];
    const int64_t first = i * xp_plan_micro_tokens(f->plan);
    int ranks[XP_MESH_MAX_RANKS];
    int64_t t0, t, at = 0;
    xp_mesh_axis_ranks(&f->plan->mesh, XP_EP, f->r->rank, ranks);
    xp_plan_tokens(f->plan, f->r->rank, &t0, &t);
    f->micro = i;
    f->token0 = f->r->token0 = first + t0;
    for (int64_t n = 0; n < f->T; n++)
        ((int64_t *)f->own_tok.data)[n] = f->token0 + n;
    for (int64_t b = 0; f->block && b < f->blocks.dim[0]; b++)
        ((int64_t *)f->blocks.data)[b] = f->token0 / f->block + b;
    for (int q = 0; q < ep->size && f->block; q++) {
        xp_plan_tokens(f->plan, ranks[q], &t0, &t);
        for (int64_t b = 0; b < (t + f->block - 1) / f->block; b++)
            ((int64_t *)f->eblocks.data)[at++] = (first + t0) / f->block + b;
    }
    for (int64_t n = 0; f->nblocks.data && n < at * f->L; n++)
        ((int64_t *)f->nblocks.data)[n] = ((int64_t *)f->eblocks.data)[n / f->L] * f->E + ep->rank * f->L + n % f->L;
}

/* As many as the most rows of any bias's gradient: the router's tokens, the experts' rows. */
static xp_status take_ones(xp_flow *f) {
    const xp_dialect *d = &f->plan->model.dialect;
    const int64_t n = d->expert_bias ? f->C : d->router_bias ? f->T : 0;
    XP_TRY(flow_new2(f, XP_KIND_BUFFER, f->act, n > f->T ? n : f->T, 1, &f->ones));
    for (int64_t i = 0; i < f->ones.dim[0]; i++)
        xp_fill_store(&f->ones, i, 1.0);
    return XP_OK;
}

static xp_status take_places(xp_flow *f) {
    int seen = 0, unseen = f->plan->balanced;
    void *mem = NULL;
    XP_TRY(xp_rank_alloc(f->r, XP_KIND_BUFFER, (size_t)f->Y * sizeof *f->place, &mem));
    f->place = mem;
    for (int y = 0; y < f->Y; y++)
        f->place[y] = xp_plan_is_balanced(f->plan, y) ? seen++ : unseen++;
    return XP_OK;
}

static xp_status take_own(xp_flow *f) {
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I64, f->T, &f->own_tok));
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I64, 2, &f->own_span));
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I64, 1, &f->count));
    ((int64_t *)f->own_span.data)[0] = 0;
    ((int64_t *)f->own_span.data)[1] = f->T;
    XP_TRY(take_ones(f));
    if (f->plan->model.around & XP_OUT_BIAS) {
        XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I32, f->T, &f->first));
        memset(f->first.data, 0, (size_t)f->T * sizeof(int32_t));
    }
    XP_TRY(take_places(f));
    const int64_t scores[3] = {f->Y, f->T, f->Z}, picks[3] = {f->Y, f->T, f->K};
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_ACT, f->logits, 3, scores, &f->all_logits));
    return xp_rank_tensor(f->r, XP_KIND_ACT, XP_I32, 3, picks, &f->all_idx);
}

/* A buffer of the router as a file has it: a vector of Z, or the first rows of a table [n,K]. */
static void copy_buffer(const xp_flow *f, int y, xp_part part, const xp_tensor *t) {
    const int64_t rows = t->dim[0], n = t->ndim == 2 ? t->dim[1] : 1;
    const xp_tensor view = xp_tensor_3d(t->data, t->dtype, 1, rows, n);
    xp_layer_weights_copy(f->src->weights->layer[f->plan->layer[y]], part, 0, 0, &view);
}

/* The routers' buffers: the same on every rank, so nobody gathers them. A selection bias is as wide as the numbers that
 * it is added to are apart; a token's experts are distinct. */
static xp_status take_routers(xp_flow *f) {
    const xp_data kind = f->src->data == XP_DATA_EXACT ? XP_DATA_EXACT : XP_DATA_REAL;
    const int64_t base = 0;
    char name[64];
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I32, f->T, &f->token));
    for (int y = 0; y < f->Y; y++) {
        layer_state *s = &f->ls[y];
        const xp_dialect *d = xp_plan_dialect(f->plan, y);
        const double std = d->select_on == XP_ON_LOGIT    ? 0.5
                           : d->score == XP_SCORE_SOFTMAX ? 0.5 / (double)f->Z
                                                          : 0.125;
        if (d->select_bias) {
            snprintf(name, sizeof name, "model.layers.%d.mlp.gate.e_score_correction_bias", f->plan->layer[y]);
            XP_TRY(flow_new1(f, XP_KIND_BUFFER, f->wide, f->Z, &s->cbias));
            if (f->src->weights)
                copy_buffer(f, y, XP_PART_SELECT_BIAS, &s->cbias);
            else
                XP_TRY(xp_fill_tensor(&s->cbias, kind, f->plan->opt.seed, name, &base, &f->Z, std));
        }
        if (d->select_on != XP_ON_TOKEN_TABLE)
            continue;
        snprintf(name, sizeof name, "model.layers.%d.mlp.gate.tid2eid", f->plan->layer[y]);
        XP_TRY(flow_new2(f, XP_KIND_BUFFER, XP_I32, f->V, f->K, &s->table));
        if (f->src->weights) {
            copy_buffer(f, y, XP_PART_TABLE, &s->table);
            continue;
        }
        const uint64_t ids = (uint64_t)(f->Z - d->shared_rows);
        for (int64_t i = 0; i < f->V * f->K; i++) {
            const uint64_t word = xp_rng(f->plan->opt.seed, xp_rng_stream(name), (uint64_t)(i / f->K));
            ((int32_t *)s->table.data)[i] = (int32_t)((word % ids + (uint64_t)(i % f->K)) % ids);
        }
    }
    return XP_OK;
}

static xp_status find_params(xp_step *st) {
    xp_flow *f = &st->f;
    void *mem = NULL;
    XP_TRY(xp_rank_alloc(f->r, XP_KIND_BUFFER, (size_t)f->Y * sizeof *f->lp, &mem));
    f->lp = mem;
    XP_TRY(xp_rank_alloc(f->r, XP_KIND_BUFFER, (size_t)f->Y * sizeof *f->ls, &mem));
    f->ls = mem;
    memset(f->ls, 0, (size_t)f->Y * sizeof *f->ls);
    for (int y = 0; y < f->Y; y++)
        f->lp[y] = (layer_params){.norm = xp_plan_find(f->plan, XP_W_NORM, y),
                                  .router = xp_plan_find(f->plan, XP_W_ROUTER, y),
                                  .rbias = xp_plan_find(f->plan, XP_W_ROUTER_BIAS, y),
                                  .down = xp_plan_find(f->plan, XP_W_LATENT_DOWN, y),
                                  .up = xp_plan_find(f->plan, XP_W_LATENT_UP, y),
                                  .lnorm = xp_plan_find(f->plan, XP_W_LATENT_NORM, y),
                                  .enorm = xp_plan_find(f->plan, XP_W_EXPERT_NORM, y),
                                  .obias = xp_plan_find(f->plan, XP_W_OUT_BIAS, y),
                                  .bnorm = xp_plan_find(f->plan, XP_W_BLOCK_NORM, y),
                                  .ynorm = xp_plan_find(f->plan, XP_W_ROUTED_NORM, y),
                                  .snorm = xp_plan_find(f->plan, XP_W_SHARED_NORM, y),
                                  .sinorm = xp_plan_find(f->plan, XP_W_SHARED_IN_NORM, y),
                                  .scale = xp_plan_find(f->plan, XP_W_EXPERT_SCALE, y),
                                  .b1 = xp_plan_find(f->plan, XP_W_UP_BIAS, y),
                                  .b2 = xp_plan_find(f->plan, XP_W_DOWN_BIAS, y),
                                  .w1 = xp_plan_find(f->plan, XP_W_UP, y),
                                  .w2 = xp_plan_find(f->plan, XP_W_DOWN, y),
                                  .sw1 = xp_plan_find(f->plan, XP_W_SHARED_UP, y),
                                  .sw2 = xp_plan_find(f->plan, XP_W_SHARED_DOWN, y),
                                  .sgate = xp_plan_find(f->plan, XP_W_SHARED_GATE, y)};
    for (int i = 0; i < f->Y * XP_ROUTER_MLP_WEIGHTS; i++) {
        const int y = i / XP_ROUTER_MLP_WEIGHTS, w = i % XP_ROUTER_MLP_WEIGHTS;
        f->lp[y].mlp[w] = xp_plan_find(f->plan, XP_W_ROUTER_DOWN + (xp_weight)w, y);
    }
    st->embed = xp_plan_find(f->plan, XP_W_EMBED, -1);
    st->norm = xp_plan_find(f->plan, XP_W_FINAL_NORM, -1);
    st->head = xp_plan_find(f->plan, XP_W_HEAD, -1);
    return XP_OK;
}

static xp_status open_top(xp_step *st) {
    xp_flow *f = &st->f;
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I32, f->T, &st->target));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, f->H, &st->pos));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_U8, f->T, &st->valid));
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, f->Z, &st->freq));
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, f->Z, &st->prob));
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, 2, &st->bloss));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I64, 1, &st->bcount));
    memset(st->valid.data, 1, (size_t)f->T);
    return XP_OK;
}

xp_status xp_step_open(xp_rank *r, const xp_plan *plan, const xp_step_source *src, xp_step **out) {
    void *mem = NULL;
    *out = NULL;
    XP_TRY(xp_rank_alloc(r, XP_KIND_BUFFER, sizeof **out, &mem));
    xp_step *st = mem;
    memset(st, 0, sizeof *st);
    st->f.r = r;
    st->f.plan = plan;
    st->f.src = src;
    if (plan->opt.micro > 1 && src->mode != XP_RUN_TRAIN)
        return XP_FAIL(XP_E_ARG, "micro: %d, expected 1: only a training run keeps gradients", plan->opt.micro);
    take_sizes(&st->f);
    XP_TRY(take_capacity(&st->f));
    XP_TRY(take_own(&st->f));
    enter_micro(&st->f, 0);
    XP_TRY(find_params(st));
    XP_TRY(take_routers(&st->f));
    XP_TRY(open_top(st));
    XP_TRY(params_open(&st->f));
    if (src->mode == XP_RUN_TRAIN)
        XP_TRY(params_segments(&st->f, &st->seg, &st->owner, &st->decay));
    *out = st;
    return XP_OK;
}

/* The rank's arena owns every allocation; closing the rank frees what is left. */
void xp_step_close(xp_step *st) {
    if (st)
        params_close(&st->f);
}

/* ---- one step ---- */

/* Byte number i of the stream: the text, wrapping, or seeded bytes. */
static uint8_t stream_byte(const xp_flow *f, int64_t i) {
    const xp_step_source *s = f->src;
    return s->text ? s->text[i % s->text_bytes]
                   : (uint8_t)(xp_rng(f->plan->opt.seed, xp_rng_stream("tokens"), (uint64_t)i) & 255u);
}

static xp_status take_tokens(xp_step *st, int64_t s) {
    xp_flow *f = &st->f;
    const int64_t first = s * f->N + f->token0;
    for (int64_t t = 0; t < f->T; t++) {
        ((int32_t *)f->token.data)[t] = stream_byte(f, first + t);
        ((int32_t *)st->target.data)[t] = stream_byte(f, first + t + 1);
    }
    /* The row added to equal bytes' equal embeddings is keyed by the position in the batch, whatever the step. */
    const int64_t base[2] = {f->token0, 0}, full[2] = {f->N, f->H};
    return xp_fill_tensor(&st->pos, f->src->data == XP_DATA_EXACT ? XP_DATA_EXACT : XP_DATA_REAL, f->plan->opt.seed,
                          "position", base, full, 0.5);
}

static xp_status forward_embed(xp_step *st, xp_tensor *out) {
    xp_flow *f = &st->f;
    XP_TRY(params_gather(f, st->embed));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, f->H, out));
    xp_embed_args a = {.token = f->token, .table = params_matrix(f, st->embed), .pos = st->pos, .y = *out};
    XP_TRY(xp_call(f->r, &xp_stage_embed, "embed", &a));
    params_release(f, st->embed);
    return flow_trace(f, "embed", -1, out);
}

static xp_status forward_top(xp_step *st, const xp_tensor *h, xp_step_result *res) {
    xp_flow *f = &st->f;
    XP_TRY(params_gather(f, st->norm));
    XP_TRY(params_gather(f, st->head));
    st->h_last = *h;
    XP_TRY(rows_norm(f, "rmsnorm", st->norm, h, &st->xn, &st->rstd));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->wide, f->T, f->V, &st->logits));
    xp_head_args head = {.x = st->xn, .w = params_matrix(f, st->head), .logits = st->logits};
    XP_TRY(xp_call(f->r, &xp_stage_head, "head", &head));
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, f->T, &st->lse));
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, f->T, &st->tloss));
    xp_tensor total;
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, 1, &total));
    xp_xent_args x = {.logits = st->logits,
                      .target = st->target,
                      .lse = st->lse,
                      .loss = st->tloss,
                      .total = total,
                      .count = f->count,
                      .token0 = f->token0,
                      .block = f->block};
    XP_TRY(xp_call(f->r, &xp_stage_xent, "xent", &x));
    const int64_t valid = ((const int64_t *)f->count.data)[0];
    res->tokens += valid;
    res->loss += xp_widen(total.data, total.dtype, 0);
    if (valid == 0)
        return XP_FAIL(XP_E_BUG, "tokens: none of the batch has a target, so its gradients have no divisor");
    /* Known before the other micro-batches ran, because every token has a target. */
    f->divisor = f->plan->opt.micro > 1 ? (double)f->N : (double)valid;
    flow_drop(f, &total);
    return flow_trace(f, "xent loss", -1, &st->tloss);
}

static xp_status balance(xp_step *st, xp_step_result *res) {
    xp_flow *f = &st->f;
    const xp_step_options *o = &f->plan->opt;
    f->r->layer = -1;
    if (f->plan->balanced == 0)
        return XP_OK;
    const xp_tensor logits = xp_tensor_rows(&f->all_logits, 0, 0, f->plan->balanced);
    xp_balance_args a = {.logits = logits,
                         .idx = xp_tensor_rows(&f->all_idx, 0, 0, f->plan->balanced),
                         .valid = st->valid,
                         .freq = st->freq,
                         .prob = st->prob,
                         .loss = st->bloss,
                         .count = st->bcount,
                         .token0 = f->token0,
                         .block = f->block,
                         .scope_world = 1};
    XP_TRY(xp_call(f->r, &xp_stage_balance, "balance", &a));
    res->balance += xp_widen(st->bloss.data, st->bloss.dtype, 0) / o->micro;
    res->zloss += xp_widen(st->bloss.data, st->bloss.dtype, 1) / o->micro;
    if (o->aux_coef == 0 && o->z_coef == 0)
        return XP_OK;
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_ACT, f->wide, 3, logits.dim, &f->daux));
    xp_balance_bwd_args b = {.logits = logits,
                             .valid = st->valid,
                             .freq = st->freq,
                             .count = st->bcount,
                             .daux = f->daux,
                             .aux_coef = o->aux_coef,
                             .z_coef = o->z_coef,
                             .scale = f->divisor / o->micro};
    return xp_call(f->r, &xp_stage_balance_bwd, "balance_bwd", &b);
}

static xp_status backward_top(xp_step *st, xp_tensor *out) {
    xp_flow *f = &st->f;
    xp_tensor dlogits, dx;
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->wide, f->T, f->V, &dlogits));
    xp_xent_bwd_args x = {.logits = st->logits, .target = st->target, .lse = st->lse, .dlogits = dlogits};
    XP_TRY(xp_call(f->r, &xp_stage_xent_bwd, "xent_bwd", &x));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, f->H, &dx));
    xp_head_bwd_args h = {.dlogits = dlogits, .w = params_matrix(f, st->head), .dx = dx};
    XP_TRY(xp_call(f->r, &xp_stage_head_bwd, "head_bwd", &h));
    XP_TRY(params_wgrad(f, st->head, "wgrad head", &dlogits, &st->xn));
    XP_TRY(rows_norm_back(f, "rmsnorm_bwd", st->norm, &dx, &st->h_last, &st->rstd, out));
    xp_tensor *const mine[] = {&dlogits, &dx, &st->xn, &st->rstd, &st->logits, &st->lse, &st->tloss};
    for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
        flow_drop(f, mine[i]);
    params_release(f, st->norm);
    params_release(f, st->head);
    return XP_OK;
}

static xp_status backward_embed(xp_step *st, const xp_tensor *dh) {
    xp_flow *f = &st->f;
    const int64_t b = f->block ? f->blocks.dim[0] : 1, flat[3] = {b, f->V, f->H}, dim[4] = {b, 1, f->V, f->H};
    xp_tensor dtable;
    f->r->layer = -1;
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_GRAD, f->grad, 3, flat, &dtable));
    xp_embed_bwd_args a = {.token = f->token, .dy = *dh, .dtable = dtable, .token0 = f->token0, .block = f->block};
    XP_TRY(xp_call(f->r, &xp_stage_embed_bwd, "embed_bwd", &a));
    xp_tensor view = xp_tensor_of(dtable.data, f->grad, 4, dim);
    XP_TRY(params_scatter(f, st->embed, 0, &view, &(flow_made){&xp_stage_embed_bwd, &a, "dtable"}));
    flow_drop(f, &dtable);
    return XP_OK;
}

static xp_status update(xp_step *st, int64_t s, xp_step_result *res) {
    xp_flow *f = &st->f;
    const xp_step_options *o = &f->plan->opt;
    xp_tensor norm, coef;
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_F32, 1, &norm));
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_F32, 1, &coef));
    xp_gradnorm_args n = {.grad = f->gflat, .seg = st->seg, .owner = st->owner, .norm = norm, .p = 2};
    XP_TRY(xp_call(f->r, &xp_stage_gradnorm, "gradnorm", &n));
    xp_clip_args c = {
        .grad = f->gflat, .norm = norm, .coef = coef, .max_norm = (float)o->max_norm, .eps = (float)o->clip_eps};
    XP_TRY(xp_call(f->r, &xp_stage_clip, "clip", &c));
    res->norm = ((const float *)norm.data)[0];
    res->coef = ((const float *)coef.data)[0];
    if (isnan(res->coef)) {
        /* A gradient that is not finite changes no parameter; every rank sees the same norm and skips alike. */
    } else if (o->optimizer == XP_ADAMW) {
        xp_adamw_args a = {.param = f->master,
                           .m = f->m,
                           .v = f->v,
                           .grad = f->gflat,
                           .seg = st->seg,
                           .decay = st->decay,
                           .lr = o->lr,
                           .beta1 = o->beta1,
                           .beta2 = o->beta2,
                           .eps = o->eps,
                           .weight_decay = o->weight_decay,
                           .step = s + 1};
        XP_TRY(xp_call(f->r, &xp_stage_adamw, "adamw", &a));
    } else {
        xp_sgd_args a = {.param = f->master,
                         .buf = f->m,
                         .grad = f->gflat,
                         .seg = st->seg,
                         .decay = st->decay,
                         .lr = o->lr,
                         .momentum = o->momentum,
                         .weight_decay = o->weight_decay,
                         .step = s + 1};
        XP_TRY(xp_call(f->r, &xp_stage_sgd, "sgd", &a));
    }
    flow_drop(f, &norm);
    flow_drop(f, &coef);
    return XP_OK;
}

static xp_status run_layers_forward(xp_step *st, xp_tensor *h) {
    for (int y = 0; y < st->f.Y; y++) {
        xp_tensor next;
        XP_TRY(layer_forward(&st->f, y, h, &next));
        *h = next;
    }
    st->f.r->layer = -1;
    return XP_OK;
}

/* dh is dropped and replaced, layer by layer; the layers' inputs are dropped once used. */
static xp_status run_layers_backward(xp_step *st, xp_tensor *dh) {
    for (int y = (int)st->f.Y - 1; y >= 0; y--) {
        xp_tensor next;
        XP_TRY(layer_backward(&st->f, y, dh, &next));
        flow_drop(&st->f, dh);
        flow_drop(&st->f, &st->f.ls[y].h);
        *dh = next;
    }
    st->f.r->layer = -1;
    flow_drop(&st->f, &st->f.daux);
    return XP_OK;
}

static xp_status run_micro(xp_step *st, int64_t s, xp_step_result *res) {
    xp_tensor h, dh;
    XP_TRY(take_tokens(st, s));
    XP_TRY(forward_embed(st, &h));
    XP_TRY(run_layers_forward(st, &h));
    XP_TRY(forward_top(st, &h, res));
    XP_TRY(balance(st, res));
    XP_TRY(backward_top(st, &dh));
    flow_drop(&st->f, &st->h_last);
    XP_TRY(run_layers_backward(st, &dh));
    XP_TRY(backward_embed(st, &dh));
    flow_drop(&st->f, &dh);
    return XP_OK;
}

/* The balance losses are those of each micro-batch, averaged: they are not linear in the batch. */
static xp_status run_model(xp_step *st, int64_t s, xp_step_result *res) {
    xp_flow *f = &st->f;
    for (int i = 0; i < f->plan->opt.micro; i++) {
        enter_micro(f, i);
        if (i > 0)
            memcpy(f->gbase.data, f->gflat.data, (size_t)f->elements * sizeof(float));
        XP_TRY(run_micro(st, s, res));
    }
    res->loss = res->tokens ? res->loss / (double)res->tokens : 0;
    return f->src->mode == XP_RUN_TRAIN ? update(st, s, res) : XP_OK;
}

/* The layers alone: rows and output gradients are generated, everything between them is the step's own code. */
static xp_status run_bare(xp_step *st, xp_step_result *res) {
    xp_flow *f = &st->f;
    const int64_t base[2] = {f->token0, 0}, full[2] = {f->N, f->H};
    xp_tensor h, dh;
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, f->H, &h));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->act, f->T, f->H, &dh));
    const xp_data kind = f->src->data == XP_DATA_TIES || f->src->data == XP_DATA_SKEW ? XP_DATA_REAL : f->src->data;
    XP_TRY(xp_fill_tensor(&h, kind, f->plan->opt.seed, "layer x", base, full, 1.0));
    XP_TRY(xp_fill_tensor(&dh, kind, f->plan->opt.seed, "layer dy", base, full, 1.0));
    for (int64_t t = 0; t < f->T; t++)
        ((int32_t *)f->token.data)[t] = stream_byte(f, f->token0 + t);
    XP_TRY(run_layers_forward(st, &h));
    flow_drop(f, &h);
    res->tokens = f->N;
    XP_TRY(balance(st, res));
    XP_TRY(run_layers_backward(st, &dh));
    flow_drop(f, &dh);
    return XP_OK;
}

xp_status xp_step_run(xp_step *st, int64_t s, xp_step_result *out) {
    struct timespec t0, t1;
    memset(out, 0, sizeof *out);
    clock_gettime(CLOCK_MONOTONIC, &t0);
    st->f.r->step = (int)s;
    st->f.r->layer = -1;
    XP_TRY(st->f.src->mode == XP_RUN_LAYER ? run_bare(st, out) : run_model(st, s, out));
    clock_gettime(CLOCK_MONOTONIC, &t1);
    out->seconds = (double)(t1.tv_sec - t0.tv_sec) + 1e-9 * (double)(t1.tv_nsec - t0.tv_nsec);
    return XP_OK;
}

xp_status xp_step_digest(xp_step *st, char out_hex[65]) {
    if (st->f.src->mode != XP_RUN_TRAIN)
        return XP_FAIL(XP_E_ARG, "digest: only a training run keeps its parameters");
    return params_digest(&st->f, out_hex);
}
