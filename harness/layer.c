/* One MoE layer of the step, forward and backward, as a list of stage calls.
 *
 * It allocates what the stages write and nothing else: no arithmetic happens here. */
#include <math.h>
#include <string.h>

#include "flow.h"
#include "xp/capacity.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/embed.h"
#include "xp/expert.h"
#include "xp/permute.h"
#include "xp/residual.h"
#include "xp/rmsnorm.h"
#include "xp/route.h"
#include "xp/router.h"
#include "xp/shared.h"

static xp_status act2(xp_flow *f, int64_t n0, int64_t n1, xp_tensor *out) {
    return flow_new2(f, XP_KIND_ACT, f->act, n0, n1, out);
}

static const xp_tensor *full(const xp_flow *f, int i) {
    return &f->ps[i].full;
}

/* An expert parameter's [L,R0,1] as [L,R0]. */
static xp_tensor expert_bias(const xp_flow *f, int i) {
    const xp_tensor *t = full(f, i);
    return xp_tensor_2d(t->data, t->dtype, t->dim[0], t->dim[1]);
}

static const xp_dialect *dialect(const xp_flow *f, int y) {
    return xp_plan_dialect(f->plan, y);
}

static int has_identity(const xp_flow *f, int y) {
    return dialect(f, y)->null_experts > 0 && dialect(f, y)->null_kind == XP_NULL_IDENTITY;
}

static xp_status call(xp_flow *f, const xp_stage *s, const char *site, void *args) {
    return xp_call(f->r, s, site, args);
}

static xp_status add(xp_flow *f, const char *site, const xp_tensor *a, const xp_tensor *b, xp_tensor *out) {
    XP_TRY(act2(f, f->T, f->H, out));
    xp_residual_args args = {.a = *a, .b = *b, .y = *out};
    return call(f, &xp_stage_residual, site, &args);
}

/* *io becomes r(*io + more). */
static xp_status add_to(xp_flow *f, const char *site, const xp_tensor *more, xp_tensor *io) {
    xp_tensor part = *io;
    XP_TRY(add(f, site, &part, more, io));
    flow_drop(f, &part);
    return XP_OK;
}

enum { LAYER_PARAMS = 20 + XP_ROUTER_MLP_WEIGHTS };

/* Parameters of block y; -1: it has none of the kind. */
static void list_params(const xp_flow *f, int y, int out[LAYER_PARAMS]) {
    const layer_params *p = &f->lp[y];
    const int all[] = {p->norm,  p->router, p->rbias, p->scale, p->down,  p->up,    p->w1,
                       p->b1,    p->w2,     p->b2,    p->sw1,   p->sw2,   p->sgate, p->lnorm,
                       p->enorm, p->obias,  p->bnorm, p->ynorm, p->snorm, p->sinorm};
    memcpy(out, all, sizeof all);
    memcpy(out + sizeof all / sizeof *all, p->mlp, sizeof p->mlp);
}

static xp_status gather_layer(xp_flow *f, int y) {
    int all[LAYER_PARAMS];
    list_params(f, y, all);
    for (int i = 0; i < LAYER_PARAMS; i++) {
        if (all[i] >= 0)
            XP_TRY(params_gather(f, all[i]));
    }
    return XP_OK;
}

static void release_layer(xp_flow *f, int y) {
    int all[LAYER_PARAMS];
    list_params(f, y, all);
    for (int i = 0; i < LAYER_PARAMS; i++) {
        if (all[i] >= 0)
            params_release(f, all[i]);
    }
}

/* Data kind skew: a few experts take nearly all rows. The lift of expert e is a function of e alone, so it is the same
 * on every mesh and host; it goes onto the logits between two stages, where route sees it as its input. */
static void skew_logits(const xp_flow *f, const xp_tensor *logits) {
    for (int64_t i = 0; i < f->T * f->Z; i++) {
        double lift = 0;
        for (int64_t place = 1 + (i % f->Z * 7 + 3) % f->Z; place > 1; place /= 2)
            lift -= 2.0;
        xp_fill_store(logits, i, xp_widen(logits->data, logits->dtype, i) + lift);
    }
}

/* What the router's matrix multiplies. */
static const xp_tensor *router_input(const xp_flow *f, const layer_state *s) {
    return f->R > 0 ? &s->act2 : s->gin.data ? &s->gin : &s->xn;
}

static int router_norm(const xp_flow *f, int y) {
    return dialect(f, y)->router_in == XP_ROUTER_RMSNORM_SCALED ? f->lp[y].mlp[XP_W_ROUTER_NORM - XP_W_ROUTER_DOWN]
                                                                : -1;
}

/* out = r(x / sqrt(H)), new. */
static xp_status over_root(xp_flow *f, const char *site, const xp_tensor *x, xp_tensor *out) {
    XP_TRY(act2(f, f->T, f->H, out));
    xp_residual_args a = {.a = *x, .y = *out, .factor = 1.0 / sqrt((double)f->H)};
    return call(f, &xp_stage_residual, site, &a);
}

static xp_status forward_route(xp_flow *f, int y, layer_state *s) {
    const layer_params *p = &f->lp[y];
    XP_TRY(rows_norm(f, "rmsnorm", p->norm, &s->h, &s->xn, &s->rstd));
    if (f->R > 0)
        XP_TRY(router_mlp_forward(f, y));
    if (router_norm(f, y) >= 0) {
        xp_tensor normed;
        XP_TRY(rows_norm(f, "router rmsnorm", router_norm(f, y), &s->h, &normed, &s->gnrstd));
        XP_TRY(over_root(f, "router over root", &normed, &s->gin));
        flow_drop(f, &normed);
    }
    s->logits = xp_tensor_2d(xp_tensor_at(&f->all_logits, f->place[y], 0, 0, 0), f->logits, f->T, f->Z);
    s->idx = xp_tensor_2d(xp_tensor_at(&f->all_idx, f->place[y], 0, 0, 0), XP_I32, f->T, f->K);
    xp_router_args gate = {.x = *router_input(f, s), .w = params_matrix(f, p->router), .logits = s->logits};
    if (p->rbias >= 0)
        gate.bias = params_vector(f, p->rbias);
    XP_TRY(call(f, &xp_stage_router, "router", &gate));
    if (f->src->data == XP_DATA_SKEW)
        skew_logits(f, &s->logits);
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->wide, f->T, f->Z, &s->scores));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->weight, f->T, f->K, &s->w));
    xp_route_args route = {.logits = s->logits,
                           .bias = s->cbias,
                           .scores = s->scores,
                           .idx = s->idx,
                           .w = s->w,
                           .dialect = dialect(f, y),
                           .table = s->table,
                           .act = f->act};
    if (s->table.data)
        route.token = f->token;
    if (p->scale >= 0)
        route.scale_e = params_vector(f, p->scale);
    if (dialect(f, y)->shared_rows > 0) {
        XP_TRY(flow_new2(f, XP_KIND_ACT, f->weight, f->T, dialect(f, y)->shared_rows, &s->gamma));
        route.gamma = s->gamma;
    }
    return call(f, &xp_stage_route, "route", &route);
}

/* kept: the slots that get rows. The step's tokens are one sequence, and each rank counts its own: what a full expert
 * drops depends on the mesh, so that a run in which a slot was dropped is not compared with one rank's. */
static xp_status forward_capacity(xp_flow *f, int y, layer_state *s) {
    if (!xp_dialect_limits(dialect(f, y))) {
        s->kept = s->idx;
        return XP_OK;
    }
    xp_tensor dropped;
    XP_TRY(flow_new2(f, XP_KIND_ACT, XP_I32, f->T, f->K, &s->kept));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I64, f->E, &dropped));
    xp_capacity_args a = {
        .idx = s->idx, .w = s->w, .kept = s->kept, .dropped = dropped, .dialect = dialect(f, y), .token0 = f->token0};
    XP_TRY(call(f, &xp_stage_capacity, "capacity", &a));
    int64_t slots = 0;
    for (int64_t e = 0; e < f->E; e++)
        slots += *(const int64_t *)xp_tensor_at(&dropped, e, 0, 0, 0);
    xp_parity_dropped(f->src->parity, slots);
    flow_drop(f, &dropped);
    return flow_trace(f, "capacity kept", y, &s->kept);
}

int64_t layer_least(const xp_flow *f, int y, int of_group) {
    const xp_dialect *d = dialect(f, y);
    int ranks[XP_MESH_MAX_RANKS];
    int64_t rows = 0;
    if (!d->pad_to_capacity)
        return 0;
    if (!of_group)
        return xp_dialect_capacity(d, f->T, f->E, f->K);
    xp_mesh_axis_ranks(&f->plan->mesh, XP_EP, f->r->rank, ranks);
    for (int q = 0; q < f->r->mesh->axis[XP_EP]->size; q++) {
        int64_t t0, t;
        xp_plan_tokens(f->plan, ranks[q], &t0, &t);
        rows += xp_dialect_capacity(d, t, f->E, f->K);
    }
    return rows;
}

/* What the experts' rows are made of, and what the block adds to them: the latent width lies between two maps. */
static const xp_tensor *experts_input(const layer_state *s) {
    return s->lown.data ? &s->lown : s->low.data ? &s->low : &s->xn;
}

static const xp_tensor *experts_output(const layer_state *s) {
    return s->high.data ? &s->high : &s->y;
}

/* What it adds to the block's sum. */
static const xp_tensor *experts_part(const layer_state *s) {
    return s->yn.data ? &s->yn : experts_output(s);
}

static const xp_tensor *shared_input(const layer_state *s) {
    return s->sin.data ? &s->sin : &s->xn;
}

static xp_status forward_send(xp_flow *f, int y, layer_state *s) {
    XP_TRY(act2(f, f->M, f->D, &s->rows));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I64, f->M, &s->tok));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I32, f->M, &s->src));
    XP_TRY(flow_new2(f, XP_KIND_ACT, XP_I32, f->T, f->K, &s->pos));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I64, f->E, &s->counts));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I64, f->E + 1, &s->offsets));
    xp_permute_args perm = {.x = *experts_input(s),
                            .idx = s->kept,
                            .rows = s->rows,
                            .tok = s->tok,
                            .src = s->src,
                            .pos = s->pos,
                            .counts = s->counts,
                            .offsets = s->offsets,
                            .order = f->src->order,
                            .align = f->src->align,
                            .token0 = f->token0,
                            .dialect = dialect(f, y),
                            .least = layer_least(f, y, 0)};
    if (dialect(f, y)->weight_at == XP_AT_INPUT)
        perm.w = s->w;
    XP_TRY(call(f, &xp_stage_permute, "permute", &perm));
    XP_TRY(act2(f, f->C, f->D, &s->recv));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I64, f->C, &s->recv_tok));
    XP_TRY(flow_new2(f, XP_KIND_ACT, XP_I64, f->r->mesh->axis[XP_EP]->size, f->L, &s->recv_counts));
    XP_TRY(flow_new1(f, XP_KIND_ACT, XP_I64, f->L + 1, &s->recv_offsets));
    xp_dispatch_args send = {.rows = s->rows,
                             .tok = s->tok,
                             .counts = s->counts,
                             .offsets = s->offsets,
                             .recv = s->recv,
                             .recv_tok = s->recv_tok,
                             .recv_counts = s->recv_counts,
                             .recv_offsets = s->recv_offsets,
                             .align = f->src->align,
                             .least = layer_least(f, y, 1)};
    XP_TRY(call(f, &xp_stage_dispatch, "dispatch", &send));
    flow_drop(f, &s->rows);
    return XP_OK;
}

/* Rows [0, n) that this rank's experts computed; what lies behind them nobody wrote. */
static xp_tensor expert_rows(const xp_flow *f, const layer_state *s, const xp_tensor *t) {
    return xp_tensor_rows(t, 0, 0, *(const int64_t *)xp_tensor_at(&s->recv_offsets, f->L, 0, 0, 0));
}

static xp_status forward_expert_norm(xp_flow *f, int y, layer_state *s, xp_tensor *out) {
    XP_TRY(act2(f, f->C, f->D, out));
    XP_TRY(flow_new1(f, XP_KIND_ACT, f->wide, f->C, &s->erstd));
    xp_rmsnorm_args a = {.x = expert_rows(f, s, &s->out),
                         .w = params_vector(f, f->lp[y].enorm),
                         .y = expert_rows(f, s, out),
                         .rstd = expert_rows(f, s, &s->erstd),
                         .eps = f->plan->model.expert_eps,
                         .weight_first = 1};
    return call(f, &xp_stage_rmsnorm, "expert norm", &a);
}

/* Of each row the sum that it adds to: that of its token's block and its expert, as they lie in nblocks. */
static xp_status expert_parts(xp_flow *f, const layer_state *s, xp_tensor *out) {
    const xp_tensor tok = expert_rows(f, s, &s->recv_tok);
    const int64_t *block = f->eblocks.data, *offset = s->recv_offsets.data;
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I64, tok.dim[0], out));
    for (int64_t r = 0, l = 0; r < tok.dim[0]; r++) {
        const int64_t t = ((const int64_t *)tok.data)[r];
        int64_t b = 0;
        while (r >= offset[l + 1])
            l++;
        while (t >= 0 && block[b] != t / f->block)
            b++;
        ((int64_t *)out->data)[r] = t < 0 ? -1 : b * f->L + l;
    }
    return XP_OK;
}

/* *dy becomes the gradient of the experts' own rows. */
static xp_status backward_expert_norm(xp_flow *f, int y, const layer_state *s, xp_tensor *dy) {
    xp_tensor dx, dw;
    XP_TRY(act2(f, f->C, f->D, &dx));
    XP_TRY(flow_new2(f, XP_KIND_GRAD, f->grad, f->block ? f->nblocks.dim[0] : 1, f->D, &dw));
    xp_rmsnorm_bwd_args a = {.dy = expert_rows(f, s, dy),
                             .x = expert_rows(f, s, &s->out),
                             .w = params_vector(f, f->lp[y].enorm),
                             .rstd = expert_rows(f, s, &s->erstd),
                             .dx = expert_rows(f, s, &dx),
                             .dw = dw,
                             .weight_first = 1};
    if (f->block)
        XP_TRY(expert_parts(f, s, &a.part));
    XP_TRY(call(f, &xp_stage_rmsnorm_bwd, "expert norm", &a));
    XP_TRY(params_scatter_vector(f, f->lp[y].enorm, &dw, &(flow_made){&xp_stage_rmsnorm_bwd, &a, "dw"}));
    flow_drop(f, &a.part);
    flow_drop(f, &dw);
    flow_drop(f, dy);
    *dy = dx;
    return XP_OK;
}

static xp_status forward_experts(xp_flow *f, int y, layer_state *s) {
    const layer_params *p = &f->lp[y];
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->param, f->C, f->U, &s->pre));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->param, f->C, f->F, &s->act));
    XP_TRY(act2(f, f->C, f->D, &s->out));
    xp_expert_args ffn = {.x = s->recv,
                          .offsets = s->recv_offsets,
                          .w1 = *full(f, p->w1),
                          .w2 = *full(f, p->w2),
                          .pre = s->pre,
                          .act = s->act,
                          .y = s->out,
                          .dialect = dialect(f, y)};
    if (p->b1 >= 0) {
        ffn.b1 = expert_bias(f, p->b1);
        ffn.b2 = expert_bias(f, p->b2);
    }
    XP_TRY(call(f, &xp_stage_expert, "expert", &ffn));
    xp_tensor normed = {0};
    if (p->enorm >= 0)
        XP_TRY(forward_expert_norm(f, y, s, &normed));
    XP_TRY(act2(f, f->M, f->D, &s->back));
    XP_TRY(act2(f, f->T, f->D, &s->y));
    xp_combine_args sum = {.out = normed.data ? normed : s->out,
                           .recv_counts = s->recv_counts,
                           .recv_offsets = s->recv_offsets,
                           .counts = s->counts,
                           .offsets = s->offsets,
                           .pos = s->pos,
                           .idx = s->kept,
                           .w = s->w,
                           .back = s->back,
                           .y = s->y,
                           .dialect = dialect(f, y)};
    if (has_identity(f, y))
        sum.x = s->xn;
    XP_TRY(call(f, &xp_stage_combine, "combine", &sum));
    flow_drop(f, normed.data ? &normed : &s->out);
    return flow_trace(f, "combine y", y, &s->y);
}

static double shared_factor(const xp_flow *f, int y) {
    return dialect(f, y)->shared_combine == XP_COMBINE_AVERAGE ? 0.5 : 1.0;
}

static xp_status forward_shared(xp_flow *f, int y, layer_state *s) {
    const layer_params *p = &f->lp[y];
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->plan->opt.shared, f->T, f->X, &s->spre));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->plan->opt.shared, f->T, f->S, &s->sact));
    XP_TRY(act2(f, f->T, f->H, &s->smlp));
    XP_TRY(act2(f, f->T, f->H, &s->sy));
    if (p->sinorm >= 0)
        XP_TRY(rows_norm(f, "shared in norm", p->sinorm, &s->h, &s->sin, &s->sinrstd));
    xp_shared_args a = {.x = *shared_input(s),
                        .w1 = params_matrix(f, p->sw1),
                        .w2 = params_matrix(f, p->sw2),
                        .pre = s->spre,
                        .act = s->sact,
                        .mlp = s->smlp,
                        .y = s->sy,
                        .dialect = dialect(f, y),
                        .gamma = s->gamma};
    if (p->sgate >= 0) {
        XP_TRY(act2(f, f->T, 1, &s->ssig));
        a.gate = params_matrix(f, p->sgate);
        a.sig = s->ssig;
    }
    XP_TRY(call(f, &xp_stage_shared, "shared", &a));
    if (p->snorm >= 0)
        XP_TRY(rows_norm(f, "shared norm", p->snorm, &s->sy, &s->syn, &s->synrstd));
    XP_TRY(act2(f, f->T, f->H, &s->sum));
    xp_residual_args sum = {
        .a = *experts_part(s), .b = s->syn.data ? s->syn : s->sy, .y = s->sum, .factor = shared_factor(f, y)};
    return call(f, &xp_stage_residual, "residual shared", &sum);
}

/* The sum with its bias: embed's arithmetic on a table of one row. */
static xp_status forward_bias(xp_flow *f, int y, layer_state *s) {
    XP_TRY(act2(f, f->T, f->H, &s->biased));
    const xp_tensor bias = params_vector(f, f->lp[y].obias);
    xp_embed_args a = {
        .token = f->first, .table = xp_tensor_2d(bias.data, bias.dtype, 1, f->H), .pos = s->sum, .y = s->biased};
    return call(f, &xp_stage_embed, "out bias", &a);
}

static const xp_tensor *block_sum(const layer_state *s) {
    return s->biased.data ? &s->biased : &s->sum;
}

xp_status layer_forward(xp_flow *f, int y, const xp_tensor *h, xp_tensor *out) {
    layer_state *s = &f->ls[y];
    f->r->layer = y;
    s->h = *h;
    XP_TRY(gather_layer(f, y));
    XP_TRY(forward_route(f, y, s));
    XP_TRY(flow_trace(f, "router logits", y, &s->logits));
    XP_TRY(flow_trace(f, "route idx", y, &s->idx));
    XP_TRY(flow_trace(f, "route w", y, &s->w));
    if (s->gamma.data)
        XP_TRY(flow_trace(f, "route gamma", y, &s->gamma));
    XP_TRY(forward_capacity(f, y, s));
    if (f->lp[y].down >= 0)
        XP_TRY(rows_map(f, "latent down", f->lp[y].down, -1, &s->xn, &s->low));
    if (f->lp[y].lnorm >= 0)
        XP_TRY(rows_norm(f, "latent norm", f->lp[y].lnorm, &s->low, &s->lown, &s->lrstd));
    XP_TRY(forward_send(f, y, s));
    XP_TRY(forward_experts(f, y, s));
    if (f->lp[y].up >= 0)
        XP_TRY(rows_map(f, "latent up", f->lp[y].up, -1, &s->y, &s->high));
    if (f->lp[y].ynorm >= 0)
        XP_TRY(rows_norm(f, "routed norm", f->lp[y].ynorm, experts_output(s), &s->yn, &s->ynrstd));
    s->sum = *experts_part(s);
    if (f->S > 0)
        XP_TRY(forward_shared(f, y, s));
    if (f->lp[y].obias >= 0)
        XP_TRY(forward_bias(f, y, s));
    if (f->lp[y].bnorm >= 0)
        XP_TRY(rows_norm(f, "block norm", f->lp[y].bnorm, block_sum(s), &s->bn, &s->brstd));
    XP_TRY(add(f, "residual", h, s->bn.data ? &s->bn : block_sum(s), out));
    return flow_trace(f, "layer out", y, out);
}

/* dy [T,D] -> drecv [C,D], gradient of the rows that this rank's experts took; dw [T,K] of the weights; of x in dnull
 * where an id returns its token, absent elsewhere. */
static xp_status backward_ffn(xp_flow *f, int y, const xp_tensor *dy, xp_tensor *out_dw, xp_tensor *out_dnull,
                              xp_tensor *out_drecv) {
    const layer_params *p = &f->lp[y];
    layer_state *s = &f->ls[y];
    xp_tensor dout, dpre;
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->wide, f->T, f->K, out_dw));
    XP_TRY(act2(f, f->C, f->D, &dout));
    xp_combine_bwd_args sum = {.dy = *dy,
                               .back = s->back,
                               .w = s->w,
                               .pos = s->pos,
                               .counts = s->counts,
                               .offsets = s->offsets,
                               .recv_counts = s->recv_counts,
                               .recv_offsets = s->recv_offsets,
                               .dw = *out_dw,
                               .dout = dout,
                               .dialect = dialect(f, y)};
    if (has_identity(f, y)) {
        XP_TRY(act2(f, f->T, f->H, out_dnull));
        sum.x = s->xn;
        sum.idx = s->kept;
        sum.dx = *out_dnull;
    }
    XP_TRY(call(f, &xp_stage_combine_bwd, "combine_bwd", &sum));
    flow_drop(f, &s->back);
    if (p->enorm >= 0)
        XP_TRY(backward_expert_norm(f, y, s, &dout));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->param, f->C, f->U, &dpre));
    XP_TRY(act2(f, f->C, f->D, out_drecv));
    xp_expert_bwd_args ffn = {.dy = dout,
                              .pre = s->pre,
                              .offsets = s->recv_offsets,
                              .w1 = *full(f, p->w1),
                              .w2 = *full(f, p->w2),
                              .dpre = dpre,
                              .dx = *out_drecv,
                              .dialect = dialect(f, y)};
    XP_TRY(call(f, &xp_stage_expert_bwd, "expert_bwd", &ffn));
    XP_TRY(params_wgrad_experts(f, p->w1, "wgrad w1", &dpre, &s->recv, &s->recv_offsets, &s->recv_tok));
    XP_TRY(params_wgrad_experts(f, p->w2, "wgrad w2", &dout, &s->act, &s->recv_offsets, &s->recv_tok));
    if (p->b1 >= 0) {
        const xp_tensor ones = xp_tensor_rows(&f->ones, 0, 0, f->C);
        XP_TRY(params_wgrad_experts(f, p->b1, "wgrad b1", &dpre, &ones, &s->recv_offsets, &s->recv_tok));
        XP_TRY(params_wgrad_experts(f, p->b2, "wgrad b2", &dout, &ones, &s->recv_offsets, &s->recv_tok));
    }
    flow_drop(f, &dpre);
    flow_drop(f, &dout);
    return XP_OK;
}

/* drecv goes home and is dropped; out [T,D]: gradient of the experts' input. dw takes what an input's weight gets. */
static xp_status backward_send(xp_flow *f, int y, xp_tensor *drecv, xp_tensor *dw, xp_tensor *out) {
    const layer_state *s = &f->ls[y];
    xp_tensor drows;
    XP_TRY(act2(f, f->M, f->D, &drows));
    xp_dispatch_bwd_args send = {.drecv = *drecv,
                                 .recv_counts = s->recv_counts,
                                 .recv_offsets = s->recv_offsets,
                                 .counts = s->counts,
                                 .offsets = s->offsets,
                                 .drows = drows};
    XP_TRY(call(f, &xp_stage_dispatch_bwd, "dispatch_bwd", &send));
    flow_drop(f, drecv);
    XP_TRY(act2(f, f->T, f->D, out));
    xp_permute_bwd_args perm = {.drows = drows, .pos = s->pos, .dx = *out, .dialect = dialect(f, y)};
    if (dialect(f, y)->weight_at == XP_AT_INPUT) {
        perm.w = s->w;
        perm.x = *experts_input(s);
        perm.dw = *dw; /* combine's was 0: the weight is not in the output */
    }
    XP_TRY(call(f, &xp_stage_permute_bwd, "permute_bwd", &perm));
    flow_drop(f, &drows);
    return XP_OK;
}

/* The experts' side of the backward: out holds the gradient of the normed rows through the experts; dw of the weights.
 */
static xp_status backward_experts(xp_flow *f, int y, const xp_tensor *dh, xp_tensor *out_dw, xp_tensor *out) {
    const layer_params *p = &f->lp[y];
    const layer_state *s = &f->ls[y];
    xp_tensor drecv, dnull = {0}, dy = *dh, din;
    if (p->up >= 0)
        XP_TRY(rows_map_back(f, "latent up", "wgrad latent up", p->up, dh, &s->y, &dy));
    XP_TRY(backward_ffn(f, y, &dy, out_dw, &dnull, &drecv));
    XP_TRY(backward_send(f, y, &drecv, out_dw, out));
    if (p->up >= 0)
        flow_drop(f, &dy);
    if (p->lnorm >= 0) {
        din = *out;
        XP_TRY(rows_norm_back(f, "latent norm", p->lnorm, &din, &s->low, &s->lrstd, out));
        flow_drop(f, &din);
    }
    if (p->down >= 0) {
        din = *out;
        XP_TRY(rows_map_back(f, "latent down", "wgrad latent down", p->down, &din, &s->xn, out));
        flow_drop(f, &din);
    }
    if (!dnull.data)
        return XP_OK;
    din = *out;
    XP_TRY(add(f, "residual d null", &din, &dnull, out));
    flow_drop(f, &dnull);
    flow_drop(f, &din);
    return XP_OK;
}

static xp_status backward_scale(xp_flow *f, int y, const xp_tensor *dw, const xp_tensor *dgamma) {
    const layer_state *s = &f->ls[y];
    const int64_t n = xp_dialect_factors(dialect(f, y), f->E), b = f->block ? f->blocks.dim[0] : 1;
    xp_tensor dscale;
    XP_TRY(flow_new2(f, XP_KIND_GRAD, f->grad, b, n, &dscale));
    xp_route_scale_bwd_args a = {.scores = s->scores,
                                 .idx = s->idx,
                                 .dw = *dw,
                                 .dscale = dscale,
                                 .dialect = dialect(f, y),
                                 .logits = s->logits,
                                 .token0 = f->token0,
                                 .block = f->block,
                                 .dgamma = *dgamma,
                                 .act = f->act};
    if (dialect(f, y)->masked_weight)
        a.bias = s->cbias;
    XP_TRY(call(f, &xp_stage_route_scale_bwd, "route_scale_bwd", &a));
    XP_TRY(params_scatter_vector(f, f->lp[y].scale, &dscale, &(flow_made){&xp_stage_route_scale_bwd, &a, "dscale"}));
    flow_drop(f, &dscale);
    return XP_OK;
}

static xp_status backward_route(xp_flow *f, int y, const xp_tensor *dw, const xp_tensor *dgamma, xp_tensor *out) {
    const layer_params *p = &f->lp[y];
    layer_state *s = &f->ls[y];
    xp_tensor dlogits;
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->logits, f->T, f->Z, &dlogits));
    xp_route_bwd_args route = {.scores = s->scores,
                               .idx = s->idx,
                               .dw = *dw,
                               .dlogits = dlogits,
                               .dialect = dialect(f, y),
                               .logits = s->logits,
                               .dgamma = *dgamma,
                               .act = f->act};
    if (dialect(f, y)->masked_weight)
        route.bias = s->cbias;
    if (f->daux.data && xp_plan_is_balanced(f->plan, y))
        route.daux = xp_tensor_2d(xp_tensor_at(&f->daux, f->place[y], 0, 0, 0), f->wide, f->T, f->Z);
    if (p->scale >= 0)
        route.scale_e = params_vector(f, p->scale);
    XP_TRY(call(f, &xp_stage_route_bwd, "route_bwd", &route));
    if (p->scale >= 0)
        XP_TRY(backward_scale(f, y, dw, dgamma));
    XP_TRY(act2(f, f->T, router_input(f, s)->dim[1], out));
    xp_router_bwd_args gate = {.dlogits = dlogits, .w = params_matrix(f, p->router), .dx = *out};
    XP_TRY(call(f, &xp_stage_router_bwd, "router_bwd", &gate));
    XP_TRY(flow_trace(f, "route dlogits", y, &dlogits));
    XP_TRY(params_wgrad(f, p->router, "wgrad router", &dlogits, router_input(f, s)));
    if (p->rbias >= 0) {
        const xp_tensor ones = xp_tensor_rows(&f->ones, 0, 0, f->T);
        XP_TRY(params_wgrad(f, p->rbias, "wgrad router bias", &dlogits, &ones));
    }
    flow_drop(f, &dlogits);
    if (f->R > 0) {
        xp_tensor da = *out;
        XP_TRY(router_mlp_backward(f, y, &da, out));
        flow_drop(f, &da);
    }
    if (router_norm(f, y) >= 0) {
        xp_tensor da = *out, dn;
        XP_TRY(over_root(f, "router d over root", &da, &dn));
        XP_TRY(rows_norm_back(f, "router rmsnorm_bwd", router_norm(f, y), &dn, &s->h, &s->gnrstd, out));
        flow_drop(f, &da);
        flow_drop(f, &dn);
    }
    return XP_OK;
}

/* out: gradient of what the shared expert read, or through its own norm of the block's input; out_dgamma: of the
 * router's weights of it. */
static xp_status backward_shared(xp_flow *f, int y, const xp_tensor *dh, xp_tensor *out_dgamma, xp_tensor *out) {
    const layer_params *p = &f->lp[y];
    layer_state *s = &f->ls[y];
    xp_tensor dmlp, dpre, dz = {0}, dsy = *dh;
    if (p->snorm >= 0)
        XP_TRY(rows_norm_back(f, "shared norm", p->snorm, dh, &s->sy, &s->synrstd, &dsy));
    XP_TRY(act2(f, f->T, f->H, &dmlp));
    XP_TRY(flow_new2(f, XP_KIND_ACT, f->plan->opt.shared, f->T, f->X, &dpre));
    XP_TRY(act2(f, f->T, f->H, out));
    xp_shared_bwd_args a = {.dy = dsy,
                            .pre = s->spre,
                            .w1 = params_matrix(f, p->sw1),
                            .w2 = params_matrix(f, p->sw2),
                            .dmlp = dmlp,
                            .dpre = dpre,
                            .dx = *out,
                            .dialect = dialect(f, y),
                            .gamma = s->gamma};
    if (s->gamma.data) {
        XP_TRY(flow_new2(f, XP_KIND_ACT, f->wide, f->T, s->gamma.dim[1], out_dgamma));
        a.dgamma = *out_dgamma;
    }
    if (p->sgate >= 0) {
        XP_TRY(act2(f, f->T, 1, &dz));
        a.mlp = s->smlp;
        a.sig = s->ssig;
        a.gate = params_matrix(f, p->sgate);
        a.dz = dz;
    }
    XP_TRY(call(f, &xp_stage_shared_bwd, "shared_bwd", &a));
    XP_TRY(params_wgrad(f, p->sw1, "wgrad shared w1", &dpre, shared_input(s)));
    XP_TRY(params_wgrad(f, p->sw2, "wgrad shared w2", &dmlp, &s->sact));
    if (p->sgate >= 0)
        XP_TRY(params_wgrad(f, p->sgate, "wgrad shared gate", &dz, shared_input(s)));
    if (p->snorm >= 0)
        flow_drop(f, &dsy);
    if (p->sinorm >= 0) {
        xp_tensor din = *out;
        XP_TRY(rows_norm_back(f, "shared in norm", p->sinorm, &din, &s->h, &s->sinrstd, out));
        flow_drop(f, &din);
    }
    flow_drop(f, &dmlp);
    flow_drop(f, &dpre);
    flow_drop(f, &dz);
    return XP_OK;
}

static void drop_state(xp_flow *f, layer_state *s) {
    if (s->sum.data == experts_part(s)->data)
        s->sum.data = NULL;
    if (s->kept.data == s->idx.data)
        s->kept.data = NULL;
    xp_tensor *const all[] = {&s->xn,           &s->rstd,   &s->scores,  &s->w,      &s->tok,      &s->src,
                              &s->pos,          &s->counts, &s->offsets, &s->recv,   &s->recv_tok, &s->recv_counts,
                              &s->recv_offsets, &s->pre,    &s->act,     &s->y,      &s->low,      &s->high,
                              &s->spre,         &s->sact,   &s->smlp,    &s->ssig,   &s->sy,       &s->sum,
                              &s->kept,         &s->lown,   &s->lrstd,   &s->erstd,  &s->out,      &s->biased,
                              &s->bn,           &s->brstd,  &s->gamma,   &s->yn,     &s->ynrstd,   &s->syn,
                              &s->synrstd,      &s->sin,    &s->sinrstd, &s->gnrstd, &s->gin};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        flow_drop(f, all[i]);
}

xp_status layer_backward(xp_flow *f, int y, const xp_tensor *dh, xp_tensor *out) {
    layer_state *s = &f->ls[y];
    f->r->layer = y;
    xp_tensor dw, dxr, dxn, dx, dsum = *dh, dhalf = {0}, dbn = {0}, dyn = {0}, dgamma = {0}, dxs = {0};
    if (f->lp[y].bnorm >= 0) {
        XP_TRY(rows_norm_back(f, "block norm", f->lp[y].bnorm, dh, block_sum(s), &s->brstd, &dbn));
        dsum = dbn;
    }
    if (f->lp[y].obias >= 0) {
        const xp_tensor ones = xp_tensor_rows(&f->ones, 0, 0, f->T);
        XP_TRY(params_wgrad(f, f->lp[y].obias, "wgrad out bias", &dsum, &ones));
    }
    if (f->S > 0 && shared_factor(f, y) != 1.0) {
        XP_TRY(act2(f, f->T, f->H, &dhalf));
        xp_residual_args half = {.a = dsum, .y = dhalf, .factor = shared_factor(f, y)};
        XP_TRY(call(f, &xp_stage_residual, "residual d half", &half));
        dsum = dhalf;
    }
    if (f->lp[y].ynorm >= 0)
        XP_TRY(rows_norm_back(f, "routed norm", f->lp[y].ynorm, &dsum, experts_output(s), &s->ynrstd, &dyn));
    XP_TRY(backward_experts(f, y, dyn.data ? &dyn : &dsum, &dw, &dxn));
    if (f->S > 0)
        XP_TRY(backward_shared(f, y, &dsum, &dgamma, &dxs));
    XP_TRY(backward_route(f, y, &dw, &dgamma, &dxr));
    if (router_norm(f, y) < 0)
        XP_TRY(add_to(f, "residual d router", &dxr, &dxn));
    if (f->S > 0 && f->lp[y].sinorm < 0)
        XP_TRY(add_to(f, "residual d shared", &dxs, &dxn));
    XP_TRY(rows_norm_back(f, "rmsnorm_bwd", f->lp[y].norm, &dxn, &s->h, &s->rstd, &dx));
    XP_TRY(add(f, "residual d", dh, &dx, out));
    if (router_norm(f, y) >= 0)
        XP_TRY(add_to(f, "residual d router", &dxr, out));
    if (f->S > 0 && f->lp[y].sinorm >= 0)
        XP_TRY(add_to(f, "residual d shared", &dxs, out));
    xp_tensor *const mine[] = {&dw, &dxr, &dxn, &dx, &dhalf, &dbn, &dyn, &dgamma, &dxs};
    for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
        flow_drop(f, mine[i]);
    drop_state(f, s);
    router_mlp_drop(f, y);
    release_layer(f, y);
    return flow_trace(f, "layer d in", y, out);
}
