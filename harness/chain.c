/* The stages of one MoE block in order: see chain.h. It allocates what they write and passes it on; it computes nothing
 * but the sizes. */
#include "chain.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compare.h"
#include "fill.h"
#include "mesh.h"
#include "rank.h"
#include "registry.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/expert.h"
#include "xp/permute.h"
#include "xp/residual.h"
#include "xp/route.h"
#include "xp/router.h"
#include "xp/shared.h"
#include "xp/wgrad.h"

const xp_stage *const xp_chain_stages[] = {&xp_stage_router,
                                           &xp_stage_route,
                                           &xp_stage_permute,
                                           &xp_stage_dispatch,
                                           &xp_stage_expert,
                                           &xp_stage_combine,
                                           &xp_stage_shared,
                                           &xp_stage_residual,
                                           &xp_stage_combine_bwd,
                                           &xp_stage_expert_bwd,
                                           &xp_stage_wgrad,
                                           &xp_stage_dispatch_bwd,
                                           &xp_stage_permute_bwd,
                                           &xp_stage_route_bwd,
                                           &xp_stage_router_bwd,
                                           &xp_stage_shared_bwd,
                                           NULL};

const char *xp_chain_name(xp_chain_out o) {
    static const char *const name[] = {"logits", "idx", "w",   "y",   "dx",   "dwr",  "drbias",
                                       "dw1",    "dw2", "db1", "db2", "dsw1", "dsw2", "dsgate"};
    return name[o];
}

/* ---- one rank's part ---- */

typedef struct {
    const xp_backend *impl;
    const xp_chain_in *in;
    const xp_chain_how *how;
    xp_chain_run *whole;
    xp_chain_run part[XP_CHAIN_RANKS]; /* flags and views of one rank */
} job;

typedef struct {
    xp_rank r;
    const xp_chain_in *in;
    const xp_chain_how *how;
    xp_chain_run *run;
    int64_t T, token0, L, e0, M, C, U, X;
    xp_dtype act;
    xp_tensor x, dy, w1, w2, b1, b2; /* this rank's */
    xp_tensor span, ones, own_tok, own_block;
    xp_tensor scores, tok, pos, counts, offsets, recv, recv_tok, recv_counts, recv_offsets;
    xp_tensor pre, hidden, back, dw, dlogits, dxe, dxr, dout;
    xp_tensor spre, sact, smlp, ssig, gamma, dgamma;
} flow;

static xp_status fresh(flow *f, xp_dtype d, int ndim, int64_t n0, int64_t n1, xp_tensor *out) {
    const int64_t dim[] = {n0, n1};
    XP_TRY(xp_rank_tensor(&f->r, XP_KIND_ACT, d, ndim, dim, out));
    xp_poison_fill(out);
    return XP_OK;
}

static xp_status act2(flow *f, int64_t n0, int64_t n1, xp_tensor *out) {
    return fresh(f, f->act, 2, n0, n1, out);
}

static xp_dtype ruled(const flow *f, xp_wide rule) {
    return rule == XP_WIDE_ACT ? f->act : f->act == XP_F64 ? XP_F64 : XP_F32;
}

/* Rows whose bits for a token cannot hang on where the token lies, or whose outputs are laid out by rank. */
static int moves(const xp_stage *s) {
    return s == &xp_stage_permute || s == &xp_stage_dispatch || s == &xp_stage_dispatch_bwd ||
           s == &xp_stage_combine_bwd;
}

static void note_row(flow *f, const xp_stage *s, const xp_kernel *row, int own) {
    int number = 0;
    while (xp_chain_stages[number] != s)
        number++;
    if (own)
        f->run->own |= XP_BIT(number);
    else
        f->run->lent |= XP_BIT(number);
    const int mesh = (row->det & XP_DET_MESH) != 0;
    f->run->steady &= s == &xp_stage_wgrad || mesh || (moves(s) && row->det & XP_DET_RUN);
    f->run->steady_sums &= s != &xp_stage_wgrad || mesh;
    f->run->repeats &= (row->det & XP_DET_RUN) != 0;
}

static xp_status call(flow *f, const xp_stage *s, const void *args) {
    const char *why;
    const xp_status st = s->check(args, f->r.mesh);
    f->run->unsupported = st == XP_E_ARG;
    XP_TRY(st);
    const xp_kernel *row = xp_rank_row(f->r.impl, s, args, f->r.mesh, &why);
    const int own = row != NULL;
    if (!row)
        row = xp_rank_row(f->r.base, s, args, f->r.mesh, &why);
    if (!row) {
        f->run->unsupported = 1;
        return XP_FAIL(XP_E_ARG, "%s: %s", s->name, why);
    }
    note_row(f, s, row, own);
    return xp_rank_exec(&f->r, row, args);
}

static int has_identity(const flow *f) {
    return f->in->d->null_experts > 0 && f->in->d->null_kind == XP_NULL_IDENTITY;
}

static double shared_factor(const flow *f) {
    return f->in->S > 0 && f->in->d->shared_combine == XP_COMBINE_AVERAGE ? 0.5 : 1.0;
}

/* ---- forward ---- */

static xp_status forward_route(flow *f) {
    const xp_chain_in *in = f->in;
    const xp_router_args gate = {.x = f->x, .w = in->wr, .bias = in->rbias, .logits = f->run->out[XP_CHAIN_LOGITS]};
    XP_TRY(call(f, &xp_stage_router, &gate));
    XP_TRY(fresh(f, ruled(f, XP_WIDE_F32), 2, f->T, in->Z, &f->scores));
    xp_route_args route = {.logits = gate.logits,
                           .bias = in->bias,
                           .scores = f->scores,
                           .idx = f->run->out[XP_CHAIN_IDX],
                           .w = f->run->out[XP_CHAIN_W],
                           .dialect = in->d,
                           .replay = in->replay.data != NULL,
                           .scale_e = in->scale_e,
                           .act = f->act};
    if (in->d->shared_rows > 0) {
        XP_TRY(fresh(f, ruled(f, in->d->weight_dtype), 2, f->T, in->d->shared_rows, &f->gamma));
        route.gamma = f->gamma;
    }
    if (in->table.data) {
        route.table = in->table;
        route.token = xp_tensor_rows(&in->token, 0, f->token0, f->token0 + f->T);
    }
    for (int64_t i = 0; route.replay && i < f->T * in->K; i++)
        ((int32_t *)route.idx.data)[i] = ((const int32_t *)in->replay.data)[f->token0 * in->K + i];
    return call(f, &xp_stage_route, &route);
}

static xp_status forward_send(flow *f) {
    const xp_chain_in *in = f->in;
    xp_tensor rows, src;
    XP_TRY(act2(f, f->M, in->H, &rows));
    XP_TRY(fresh(f, XP_I64, 1, f->M, 1, &f->tok));
    XP_TRY(fresh(f, XP_I32, 1, f->M, 1, &src));
    XP_TRY(fresh(f, XP_I32, 2, f->T, in->K, &f->pos));
    XP_TRY(fresh(f, XP_I64, 1, in->E, 1, &f->counts));
    XP_TRY(fresh(f, XP_I64, 1, in->E + 1, 1, &f->offsets));
    xp_permute_args perm = {.x = f->x,
                            .idx = f->run->out[XP_CHAIN_IDX],
                            .rows = rows,
                            .tok = f->tok,
                            .src = src,
                            .pos = f->pos,
                            .counts = f->counts,
                            .offsets = f->offsets,
                            .order = XP_ORDER_SLOT_TOKEN,
                            .align = f->how->align,
                            .token0 = f->token0,
                            .dialect = in->d};
    if (in->d->weight_at == XP_AT_INPUT)
        perm.w = f->run->out[XP_CHAIN_W];
    XP_TRY(call(f, &xp_stage_permute, &perm));
    XP_TRY(act2(f, f->C, in->H, &f->recv));
    XP_TRY(fresh(f, XP_I64, 1, f->C, 1, &f->recv_tok));
    XP_TRY(fresh(f, XP_I64, 2, f->how->ranks, f->L, &f->recv_counts));
    XP_TRY(fresh(f, XP_I64, 1, f->L + 1, 1, &f->recv_offsets));
    const xp_dispatch_args send = {.rows = rows,
                                   .tok = f->tok,
                                   .counts = f->counts,
                                   .offsets = f->offsets,
                                   .recv = f->recv,
                                   .recv_tok = f->recv_tok,
                                   .recv_counts = f->recv_counts,
                                   .recv_offsets = f->recv_offsets,
                                   .align = f->how->align};
    return call(f, &xp_stage_dispatch, &send);
}

static xp_status forward_experts(flow *f, const xp_tensor *y) {
    const xp_chain_in *in = f->in;
    xp_tensor rows;
    XP_TRY(act2(f, f->C, f->U, &f->pre));
    XP_TRY(act2(f, f->C, in->F, &f->hidden));
    XP_TRY(act2(f, f->C, in->H, &rows));
    XP_TRY(act2(f, f->M, in->H, &f->back));
    const xp_expert_args ffn = {.x = f->recv,
                                .offsets = f->recv_offsets,
                                .w1 = f->w1,
                                .w2 = f->w2,
                                .pre = f->pre,
                                .act = f->hidden,
                                .y = rows,
                                .dialect = in->d,
                                .b1 = f->b1,
                                .b2 = f->b2};
    XP_TRY(call(f, &xp_stage_expert, &ffn));
    xp_combine_args sum = {.out = rows,
                           .recv_counts = f->recv_counts,
                           .recv_offsets = f->recv_offsets,
                           .counts = f->counts,
                           .offsets = f->offsets,
                           .pos = f->pos,
                           .idx = f->run->out[XP_CHAIN_IDX],
                           .w = f->run->out[XP_CHAIN_W],
                           .back = f->back,
                           .y = *y,
                           .dialect = in->d};
    if (has_identity(f))
        sum.x = f->x;
    return call(f, &xp_stage_combine, &sum);
}

/* Without a shared expert the experts' sum is the output. */
static xp_status forward(flow *f) {
    const xp_chain_in *in = f->in;
    xp_tensor routed = f->run->out[XP_CHAIN_Y], shared;
    XP_TRY(forward_send(f));
    if (in->S == 0)
        return forward_experts(f, &routed);
    XP_TRY(act2(f, f->T, in->H, &routed));
    XP_TRY(forward_experts(f, &routed));
    XP_TRY(act2(f, f->T, f->X, &f->spre));
    XP_TRY(act2(f, f->T, in->S, &f->sact));
    XP_TRY(act2(f, f->T, in->H, &f->smlp));
    XP_TRY(act2(f, f->T, in->H, &shared));
    if (in->sgate.data)
        XP_TRY(act2(f, f->T, 1, &f->ssig));
    const xp_shared_args mlp = {.x = f->x,
                                .w1 = in->sw1,
                                .w2 = in->sw2,
                                .gate = in->sgate,
                                .pre = f->spre,
                                .act = f->sact,
                                .mlp = f->smlp,
                                .sig = f->ssig,
                                .y = shared,
                                .dialect = in->d,
                                .gamma = f->gamma};
    XP_TRY(call(f, &xp_stage_shared, &mlp));
    const xp_residual_args sum = {.a = routed, .b = shared, .y = f->run->out[XP_CHAIN_Y], .factor = shared_factor(f)};
    return call(f, &xp_stage_residual, &sum);
}

/* ---- backward ---- */

static xp_status add(flow *f, const xp_tensor *a, const xp_tensor *b, xp_tensor *out) {
    if (!out->data)
        XP_TRY(act2(f, f->T, f->in->H, out));
    const xp_residual_args args = {.a = *a, .b = *b, .y = *out};
    return call(f, &xp_stage_residual, &args);
}

static xp_status wgrad_experts(flow *f, xp_chain_out o, const xp_tensor *dy, const xp_tensor *x) {
    xp_wgrad_args a = {.dy = *dy, .x = *x, .offsets = f->recv_offsets, .dw = f->run->out[o], .block = f->how->block};
    if (a.block > 0) {
        a.tok = f->recv_tok;
        a.fold = 1;
    }
    return call(f, &xp_stage_wgrad, &a);
}

static xp_status wgrad(flow *f, xp_chain_out o, const xp_tensor *dy, const xp_tensor *x) {
    xp_wgrad_args a = {.dy = *dy, .x = *x, .offsets = f->span, .dw = f->run->out[o], .block = f->how->block};
    if (a.block > 0) {
        a.tok = f->own_tok;
        a.blocks = f->own_block;
    }
    return call(f, &xp_stage_wgrad, &a);
}

static xp_status backward_expert_rows(flow *f, const xp_tensor *dout, xp_tensor *out_drecv) {
    const xp_chain_in *in = f->in;
    xp_tensor dpre;
    XP_TRY(act2(f, f->C, f->U, &dpre));
    XP_TRY(act2(f, f->C, in->H, out_drecv));
    const xp_expert_bwd_args ffn = {.dy = *dout,
                                    .pre = f->pre,
                                    .offsets = f->recv_offsets,
                                    .w1 = f->w1,
                                    .w2 = f->w2,
                                    .dpre = dpre,
                                    .dx = *out_drecv,
                                    .dialect = in->d};
    XP_TRY(call(f, &xp_stage_expert_bwd, &ffn));
    XP_TRY(wgrad_experts(f, XP_CHAIN_DW1, &dpre, &f->recv));
    XP_TRY(wgrad_experts(f, XP_CHAIN_DW2, dout, &f->hidden));
    if (!in->b1.data)
        return XP_OK;
    const xp_tensor ones = xp_tensor_rows(&f->ones, 0, 0, f->C);
    XP_TRY(wgrad_experts(f, XP_CHAIN_DB1, &dpre, &ones));
    return wgrad_experts(f, XP_CHAIN_DB2, dout, &ones);
}

static xp_status backward_experts(flow *f) {
    const xp_chain_in *in = f->in;
    xp_tensor dout, drecv, drows, dnull = {0};
    XP_TRY(fresh(f, ruled(f, XP_WIDE_F32), 2, f->T, in->K, &f->dw));
    XP_TRY(act2(f, f->C, in->H, &dout));
    xp_combine_bwd_args sum = {.dy = f->dout,
                               .back = f->back,
                               .w = f->run->out[XP_CHAIN_W],
                               .pos = f->pos,
                               .counts = f->counts,
                               .offsets = f->offsets,
                               .recv_counts = f->recv_counts,
                               .recv_offsets = f->recv_offsets,
                               .dw = f->dw,
                               .dout = dout,
                               .dialect = in->d};
    if (has_identity(f)) {
        XP_TRY(act2(f, f->T, in->H, &dnull));
        sum.x = f->x;
        sum.idx = f->run->out[XP_CHAIN_IDX];
        sum.dx = dnull;
    }
    XP_TRY(call(f, &xp_stage_combine_bwd, &sum));
    XP_TRY(backward_expert_rows(f, &dout, &drecv));
    XP_TRY(act2(f, f->M, in->H, &drows));
    const xp_dispatch_bwd_args send = {.drecv = drecv,
                                       .recv_counts = f->recv_counts,
                                       .recv_offsets = f->recv_offsets,
                                       .counts = f->counts,
                                       .offsets = f->offsets,
                                       .drows = drows};
    XP_TRY(call(f, &xp_stage_dispatch_bwd, &send));
    XP_TRY(act2(f, f->T, in->H, &f->dxe));
    xp_permute_bwd_args perm = {.drows = drows, .pos = f->pos, .dx = f->dxe, .dialect = in->d};
    if (in->d->weight_at == XP_AT_INPUT) {
        perm.w = f->run->out[XP_CHAIN_W];
        perm.x = f->x;
        perm.dw = f->dw; /* combine's was 0: the weight is not in the output */
    }
    XP_TRY(call(f, &xp_stage_permute_bwd, &perm));
    if (!dnull.data)
        return XP_OK;
    const xp_tensor dx = f->dxe;
    f->dxe.data = NULL;
    return add(f, &dx, &dnull, &f->dxe);
}

static xp_status backward_route(flow *f) {
    const xp_chain_in *in = f->in;
    XP_TRY(fresh(f, f->run->out[XP_CHAIN_LOGITS].dtype, 2, f->T, in->Z, &f->dlogits));
    xp_route_bwd_args route = {.scores = f->scores,
                               .idx = f->run->out[XP_CHAIN_IDX],
                               .dw = f->dw,
                               .dlogits = f->dlogits,
                               .dialect = in->d,
                               .logits = f->run->out[XP_CHAIN_LOGITS],
                               .scale_e = in->scale_e,
                               .dgamma = f->dgamma,
                               .act = f->act};
    if (in->d->masked_weight)
        route.bias = in->bias;
    XP_TRY(call(f, &xp_stage_route_bwd, &route));
    XP_TRY(act2(f, f->T, in->H, &f->dxr));
    const xp_router_bwd_args gate = {.dlogits = f->dlogits, .w = in->wr, .dx = f->dxr};
    XP_TRY(call(f, &xp_stage_router_bwd, &gate));
    XP_TRY(wgrad(f, XP_CHAIN_DWR, &f->dlogits, &f->x));
    if (!in->rbias.data)
        return XP_OK;
    const xp_tensor ones = xp_tensor_rows(&f->ones, 0, 0, f->T);
    return wgrad(f, XP_CHAIN_DRBIAS, &f->dlogits, &ones);
}

static xp_status backward_shared(flow *f, xp_tensor *out) {
    const xp_chain_in *in = f->in;
    xp_tensor dmlp, dpre, dz = {0};
    XP_TRY(act2(f, f->T, in->H, &dmlp));
    XP_TRY(act2(f, f->T, f->X, &dpre));
    XP_TRY(act2(f, f->T, in->H, out));
    xp_shared_bwd_args mlp = {.dy = f->dout,
                              .pre = f->spre,
                              .w1 = in->sw1,
                              .w2 = in->sw2,
                              .dmlp = dmlp,
                              .dpre = dpre,
                              .dx = *out,
                              .dialect = in->d,
                              .gamma = f->gamma};
    if (f->gamma.data) {
        XP_TRY(fresh(f, ruled(f, XP_WIDE_F32), 2, f->T, in->d->shared_rows, &f->dgamma));
        mlp.dgamma = f->dgamma;
    }
    if (in->sgate.data) {
        XP_TRY(act2(f, f->T, 1, &dz));
        mlp.mlp = f->smlp;
        mlp.sig = f->ssig;
        mlp.gate = in->sgate;
        mlp.dz = dz;
    }
    XP_TRY(call(f, &xp_stage_shared_bwd, &mlp));
    XP_TRY(wgrad(f, XP_CHAIN_DSW1, &dpre, &f->x));
    XP_TRY(wgrad(f, XP_CHAIN_DSW2, &dmlp, &f->sact));
    return in->sgate.data ? wgrad(f, XP_CHAIN_DSGATE, &dz, &f->x) : XP_OK;
}

static xp_status backward(flow *f) {
    xp_tensor dx = f->run->out[XP_CHAIN_DX], dxn = {0}, dxs;
    f->dout = f->dy;
    if (shared_factor(f) != 1.0) {
        XP_TRY(act2(f, f->T, f->in->H, &f->dout));
        const xp_residual_args half = {.a = f->dy, .y = f->dout, .factor = shared_factor(f)};
        XP_TRY(call(f, &xp_stage_residual, &half));
    }
    XP_TRY(backward_experts(f));
    if (f->in->S > 0)
        XP_TRY(backward_shared(f, &dxs));
    XP_TRY(backward_route(f));
    if (f->in->S == 0)
        return add(f, &f->dxe, &f->dxr, &dx);
    XP_TRY(add(f, &f->dxe, &f->dxr, &dxn));
    return add(f, &dxn, &dxs, &dx);
}

/* ---- a rank ---- */

static int is_token(xp_chain_out o) {
    return o <= XP_CHAIN_DX;
}

static int is_expert(xp_chain_out o) {
    return o >= XP_CHAIN_DW1 && o <= XP_CHAIN_DB2;
}

/* This rank's part of every output, as views. */
static void share_outputs(flow *f, const xp_chain_run *whole, int block) {
    for (int o = 0; o < XP_CHAIN_OUTS; o++) {
        const xp_tensor *t = &whole->out[o];
        if (!t->data)
            continue;
        if (is_token((xp_chain_out)o))
            f->run->out[o] = xp_tensor_rows(t, 0, f->token0, f->token0 + f->T);
        else if (is_expert((xp_chain_out)o))
            f->run->out[o] = xp_tensor_rows(t, 1, f->e0, f->e0 + f->L);
        else
            f->run->out[o] = f->how->ranks > 1 ? xp_tensor_rows(t, 0, block, block + 1) : *t;
    }
}

static xp_status open_tables(flow *f, int block) {
    const int64_t blocks = f->how->ranks > 1 ? 1 : f->how->block > 0 ? f->T / f->how->block : 1;
    XP_TRY(fresh(f, XP_I64, 1, 2, 1, &f->span));
    XP_TRY(fresh(f, XP_I64, 1, f->T, 1, &f->own_tok));
    XP_TRY(fresh(f, XP_I64, 1, blocks, 1, &f->own_block));
    XP_TRY(act2(f, f->C > f->T ? f->C : f->T, 1, &f->ones));
    ((int64_t *)f->span.data)[0] = 0;
    ((int64_t *)f->span.data)[1] = f->T;
    for (int64_t t = 0; t < f->T; t++)
        ((int64_t *)f->own_tok.data)[t] = f->token0 + t;
    for (int64_t b = 0; b < blocks; b++)
        ((int64_t *)f->own_block.data)[b] = block + b;
    for (int64_t i = 0; i < f->ones.dim[0]; i++)
        xp_fill_store(&f->ones, i, 1.0);
    return XP_OK;
}

static xp_status rank_run(flow *f, const xp_chain_run *whole, int rank) {
    const xp_chain_in *in = f->in;
    const int P = f->how->ranks, block = P > 1 ? f->how->deal[rank] : 0;
    f->act = in->x.dtype;
    f->T = in->T / P;
    f->token0 = block * f->T;
    f->L = in->E / P;
    f->e0 = rank * f->L;
    f->U = in->w1.dim[1];
    f->X = in->S > 0 ? in->sw1.dim[0] : 0;
    f->M = f->T * in->K + in->E * (f->how->align - 1);
    f->C = in->T * in->K + f->L * (f->how->align - 1);
    f->x = xp_tensor_rows(&in->x, 0, f->token0, f->token0 + f->T);
    f->dy = xp_tensor_rows(&in->dy, 0, f->token0, f->token0 + f->T);
    f->w1 = xp_tensor_rows(&in->w1, 0, f->e0, f->e0 + f->L);
    f->w2 = xp_tensor_rows(&in->w2, 0, f->e0, f->e0 + f->L);
    if (in->b1.data) {
        f->b1 = xp_tensor_rows(&in->b1, 0, f->e0, f->e0 + f->L);
        f->b2 = xp_tensor_rows(&in->b2, 0, f->e0, f->e0 + f->L);
    }
    share_outputs(f, whole, block);
    XP_TRY(open_tables(f, block));
    XP_TRY(forward_route(f));
    if (f->how->route_only)
        return XP_OK;
    XP_TRY(forward(f));
    return backward(f);
}

static xp_status rank_main(const xp_mesh *mesh, int rank, void *arg) {
    job *j = arg;
    flow f = {.in = j->in, .how = j->how, .run = &j->part[rank]};
    f.run->steady = f.run->steady_sums = f.run->repeats = 1;
    XP_TRY(xp_rank_open(mesh, j->impl, xp_backend_ref(), &f.r));
    const xp_status st = xp_rank_give_up(&f.r, rank_run(&f, j->whole, rank));
    xp_rank_close(&f.r);
    return st;
}

/* ---- all ranks ---- */

static xp_status open_out(xp_chain_run *r, xp_chain_out o, xp_dtype d, int ndim, int64_t n0, int64_t n1, int64_t n2,
                          int64_t n3) {
    const int64_t dim[] = {n0, n1, n2, n3};
    int64_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= dim[i];
    const size_t bytes = xp_dtype_bytes(d, n);
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (!p)
        return XP_FAIL(XP_E_NOMEM, "chain: %zu bytes", bytes);
    r->out[o] = xp_tensor_of(p, d, ndim, dim);
    xp_poison_fill(&r->out[o]);
    return XP_OK;
}

static xp_status open_outs(const xp_chain_in *in, const xp_chain_how *how, xp_chain_run *r) {
    const xp_dtype act = in->x.dtype, wide = act == XP_F64 ? XP_F64 : XP_F32;
    const int64_t B = how->block > 0 ? in->T / how->block : 1, U = in->w1.dim[1];
    XP_TRY(open_out(r, XP_CHAIN_LOGITS, in->d->logits_dtype == XP_WIDE_ACT ? act : wide, 2, in->T, in->Z, 1, 1));
    XP_TRY(open_out(r, XP_CHAIN_IDX, XP_I32, 2, in->T, in->K, 1, 1));
    XP_TRY(open_out(r, XP_CHAIN_W, in->d->weight_dtype == XP_WIDE_ACT ? act : wide, 2, in->T, in->K, 1, 1));
    XP_TRY(open_out(r, XP_CHAIN_Y, act, 2, in->T, in->H, 1, 1));
    XP_TRY(open_out(r, XP_CHAIN_DX, act, 2, in->T, in->H, 1, 1));
    XP_TRY(open_out(r, XP_CHAIN_DWR, wide, 4, B, 1, in->Z, in->H));
    if (in->rbias.data)
        XP_TRY(open_out(r, XP_CHAIN_DRBIAS, wide, 4, B, 1, in->Z, 1));
    XP_TRY(open_out(r, XP_CHAIN_DW1, wide, 4, 1, in->E, U, in->H));
    XP_TRY(open_out(r, XP_CHAIN_DW2, wide, 4, 1, in->E, in->H, in->F));
    if (in->b1.data) {
        XP_TRY(open_out(r, XP_CHAIN_DB1, wide, 4, 1, in->E, U, 1));
        XP_TRY(open_out(r, XP_CHAIN_DB2, wide, 4, 1, in->E, in->H, 1));
    }
    if (in->S > 0) {
        XP_TRY(open_out(r, XP_CHAIN_DSW1, wide, 4, B, 1, in->sw1.dim[0], in->H));
        XP_TRY(open_out(r, XP_CHAIN_DSW2, wide, 4, B, 1, in->H, in->S));
    }
    return in->sgate.data ? open_out(r, XP_CHAIN_DSGATE, wide, 4, B, 1, 1, in->H) : XP_OK;
}

/* What the ranks noted; the flag of a refusal counts only where the refusal ended the run. */
static void gather_notes(const job *j, xp_status st, xp_chain_run *out) {
    out->steady = out->steady_sums = out->repeats = 1;
    for (int r = 0; r < j->how->ranks; r++) {
        out->steady &= j->part[r].steady;
        out->steady_sums &= j->part[r].steady_sums;
        out->repeats &= j->part[r].repeats;
        out->own |= j->part[r].own;
        out->lent |= j->part[r].lent;
        out->unsupported |= st == XP_E_ARG && j->part[r].unsupported;
    }
}

xp_status xp_chain(const xp_backend *impl, const xp_chain_in *in, const xp_chain_how *how, xp_chain_run *out) {
    char text[32];
    xp_mesh_spec spec;
    xp_mesh_report end;
    job *j;
    memset(out, 0, sizeof *out);
    if (impl->device->mem != XP_HOST && impl->device->mem != XP_PINNED)
        return XP_FAIL(XP_E_DEVICE, "chain: backend %s works in memory that the host cannot read", impl->name);
    if (how->ranks < 1 || how->ranks > XP_CHAIN_RANKS || in->T % how->ranks || in->E % how->ranks)
        return XP_FAIL(XP_E_BUG, "chain: %d ranks for %lld tokens and %lld experts", how->ranks, (long long)in->T,
                       (long long)in->E);
    snprintf(text, sizeof text, "sim:ep=%d", how->ranks);
    XP_TRY(xp_mesh_spec_parse(text, &spec));
    XP_TRY(open_outs(in, how, out));
    if (!(j = calloc(1, sizeof *j)))
        return XP_FAIL(XP_E_NOMEM, "chain: %zu bytes", sizeof *j);
    *j = (job){.impl = impl, .in = in, .how = how, .whole = out};
    const xp_status st = xp_mesh_run(&spec, rank_main, j, &end);
    gather_notes(j, st, out);
    if (end.stuck > 0)
        memset(out->out, 0, sizeof out->out); /* a stuck rank may still write:
                                                 nothing of it is freed */
    else
        free(j);
    return st;
}

void xp_chain_close(xp_chain_run *r) {
    for (int o = 0; o < XP_CHAIN_OUTS; o++)
        free(r->out[o].data);
    memset(r, 0, sizeof *r);
}
