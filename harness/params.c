/* The step's parameters on one rank: seeded generation, FSDP gather, and the scatter of their gradients.
 *
 * A parameter is [G,R0,N]; this rank owns rows [start, start+rows) of its groups. In XP_RUN_TRAIN the shards live in
 * flat f32 buffers; in the other modes a shard exists only while its collective runs, a few groups at a time, so that a
 * full-width layer fits. */
#include <stdlib.h>
#include <string.h>

#include "flow.h"
#include "hash.h"
#include "xp/gather.h"
#include "xp/scatter.h"
#include "xp/wgrad.h"

static const xp_plan_param *param(const xp_flow *f, int i) {
    return &f->plan->param[i];
}

static const xp_plan_shard *own(const xp_flow *f, int i) {
    return &f->shard[i];
}

/* Row ranges of every rank of the gather's axis, and of the reduction's. */
static xp_status rank_rows(xp_flow *f, int i) {
    param_state *p = &f->ps[i];
    const int n = f->r->mesh->axis[param(f, i)->gather]->size;
    const int m = f->r->mesh->axis[param(f, i)->reduce]->size;
    void *mem = NULL;
    XP_TRY(xp_rank_alloc(f->r, XP_KIND_BUFFER, (size_t)(2 * n + 2 * m) * sizeof(int64_t), &mem));
    p->start = mem;
    p->rows = p->start + n;
    p->gstart = p->rows + n;
    p->grows = p->gstart + m;
    xp_plan_rows(f->plan, i, param(f, i)->gather, p->start, p->rows);
    xp_plan_rows(f->plan, i, param(f, i)->reduce, p->gstart, p->grows);
    return XP_OK;
}

/* The part of a block that a parameter is in a file; XP_NPART: in none that is read. */
static xp_part part_of(xp_weight w) {
    static const xp_part part[XP_NWEIGHT] = {
        [XP_W_EMBED] = XP_NPART,
        [XP_W_NORM] = XP_NPART,
        [XP_W_ROUTER] = XP_PART_ROUTER,
        [XP_W_ROUTER_BIAS] = XP_PART_ROUTER_BIAS,
        [XP_W_ROUTER_DOWN] = XP_PART_ROUTER_DOWN,
        [XP_W_ROUTER_DOWN_BIAS] = XP_PART_ROUTER_DOWN_BIAS,
        [XP_W_ROUTER_STATE] = XP_PART_ROUTER_STATE,
        [XP_W_ROUTER_NORM] = XP_PART_ROUTER_NORM,
        [XP_W_ROUTER_FC1] = XP_PART_ROUTER_FC1,
        [XP_W_ROUTER_FC1_BIAS] = XP_PART_ROUTER_FC1_BIAS,
        [XP_W_ROUTER_FC2] = XP_PART_ROUTER_FC2,
        [XP_W_ROUTER_FC2_BIAS] = XP_PART_ROUTER_FC2_BIAS,
        [XP_W_EXPERT_SCALE] = XP_PART_EXPERT_SCALE,
        [XP_W_LATENT_DOWN] = XP_PART_LATENT_DOWN,
        [XP_W_LATENT_UP] = XP_PART_LATENT_UP,
        [XP_W_LATENT_NORM] = XP_PART_LATENT_NORM,
        [XP_W_EXPERT_NORM] = XP_PART_EXPERT_NORM,
        [XP_W_OUT_BIAS] = XP_PART_OUT_BIAS,
        [XP_W_BLOCK_NORM] = XP_PART_BLOCK_NORM,
        [XP_W_ROUTED_NORM] = XP_PART_ROUTED_NORM,
        [XP_W_SHARED_NORM] = XP_PART_SHARED_NORM,
        [XP_W_SHARED_IN_NORM] = XP_PART_SHARED_IN_NORM,
        [XP_W_UP] = XP_PART_UP,
        [XP_W_UP_BIAS] = XP_PART_UP_BIAS,
        [XP_W_DOWN] = XP_PART_DOWN,
        [XP_W_DOWN_BIAS] = XP_PART_DOWN_BIAS,
        [XP_W_SHARED_UP] = XP_PART_SHARED_UP,
        [XP_W_SHARED_DOWN] = XP_PART_SHARED_DOWN,
        [XP_W_SHARED_GATE] = XP_PART_SHARED_GATE,
        [XP_W_FINAL_NORM] = XP_NPART,
        [XP_W_HEAD] = XP_NPART,
    };
    return part[w];
}

/* Generates rows of this rank's shard, or copies them from a file's weights: groups [g0, g0+gc) of its own, [gc,R,N].
 * Data kind ties gives experts 2n and 2n+1 one router row, so that their logits are equal in every bit. */
static xp_status generate(const xp_flow *f, int i, int64_t g0, const xp_tensor *t) {
    const xp_plan_param *p = param(f, i);
    const xp_data kind = f->src->data == XP_DATA_EXACT ? XP_DATA_EXACT : XP_DATA_REAL;
    const int64_t full[3] = {p->G, p->R, p->N};
    if (f->src->weights && part_of(p->weight) != XP_NPART) {
        xp_layer_weights_copy(f->src->weights->layer[f->plan->layer[p->block]], part_of(p->weight), own(f, i)->g0 + g0,
                              own(f, i)->r0, t);
        return XP_OK;
    }
    if (p->mean != 0) {
        /* A norm's weights start near 1, and not at 1, so that a weight in the wrong column is seen. */
        for (int64_t n = 0; n < xp_tensor_count(t); n++) {
            const uint64_t row = (uint64_t)(own(f, i)->r0 + n);
            const double z = kind == XP_DATA_REAL ? xp_rng_normal(f->plan->opt.seed, xp_rng_stream(p->name), row) : 0;
            xp_fill_store(t, n, p->mean + p->std * z);
        }
        return XP_OK;
    }
    const int64_t base[3] = {own(f, i)->g0 + g0, own(f, i)->r0, 0};
    if (p->weight != XP_W_ROUTER || f->src->data != XP_DATA_TIES)
        return xp_fill_tensor(t, kind, f->plan->opt.seed, p->name, base, full, p->std);
    for (int64_t r = 0; r < t->dim[1]; r++) {
        const xp_tensor row = xp_tensor_rows(t, 1, r, r + 1);
        const int64_t at[3] = {0, (base[1] + r) / 2, 0};
        XP_TRY(xp_fill_tensor(&row, kind, f->plan->opt.seed, p->name, at, full, p->std));
    }
    return XP_OK;
}

static xp_status open_flat(xp_flow *f) {
    const int64_t n = f->elements;
    XP_TRY(flow_new1(f, XP_KIND_PARAM, XP_F32, n, &f->master));
    XP_TRY(flow_new1(f, XP_KIND_GRAD, XP_F32, n, &f->gflat));
    const xp_step_options *o = &f->plan->opt;
    if (o->micro > 1)
        XP_TRY(flow_new1(f, XP_KIND_GRAD, XP_F32, n, &f->gbase));
    if (o->optimizer == XP_ADAMW || o->momentum != 0) {
        XP_TRY(flow_new1(f, XP_KIND_OPTIM, XP_F32, n, &f->m));
        memset(f->m.data, 0, (size_t)n * sizeof(float));
    }
    if (o->optimizer == XP_ADAMW) {
        XP_TRY(flow_new1(f, XP_KIND_OPTIM, XP_F32, n, &f->v));
        memset(f->v.data, 0, (size_t)n * sizeof(float));
    }
    for (int i = 0; i < f->plan->params; i++) {
        f->ps[i].shard = xp_tensor_3d((float *)f->master.data + own(f, i)->offset, XP_F32, own(f, i)->groups,
                                      own(f, i)->rows, param(f, i)->N);
        XP_TRY(generate(f, i, 0, &f->ps[i].shard));
    }
    return XP_OK;
}

xp_tensor params_matrix(const xp_flow *f, int i) {
    const xp_tensor *t = &f->ps[i].full;
    return xp_tensor_2d(t->data, t->dtype, t->dim[1], t->dim[2]);
}

xp_tensor params_vector(const xp_flow *f, int i) {
    const xp_tensor *t = &f->ps[i].full;
    return xp_tensor_1d(t->data, t->dtype, t->dim[1] * t->dim[2]);
}

xp_status params_open(xp_flow *f) {
    void *mem = NULL;
    XP_TRY(xp_rank_alloc(f->r, XP_KIND_BUFFER, (size_t)f->plan->params * sizeof *f->ps, &mem));
    f->ps = mem;
    memset(f->ps, 0, (size_t)f->plan->params * sizeof *f->ps);
    XP_TRY(xp_rank_alloc(f->r, XP_KIND_BUFFER, (size_t)f->plan->params * sizeof *f->shard, &mem));
    f->shard = mem;
    f->elements = xp_plan_shards(f->plan, f->r->rank, f->shard);
    for (int i = 0; i < f->plan->params; i++)
        XP_TRY(rank_rows(f, i));
    return f->src->mode == XP_RUN_TRAIN ? open_flat(f) : XP_OK;
}

void params_close(xp_flow *f) {
    for (int i = 0; f->ps && i < f->plan->params; i++)
        params_release(f, i);
}

static xp_status gather_chunk(xp_flow *f, int i, int64_t g0, int64_t g1) {
    const param_state *p = &f->ps[i];
    xp_tensor shard;
    if (p->shard.data) {
        shard = xp_tensor_rows(&p->shard, 0, g0, g1);
    } else {
        const int64_t dim[3] = {g1 - g0, own(f, i)->rows, param(f, i)->N};
        XP_TRY(xp_rank_tensor(f->r, XP_KIND_PARAM, f->wide, 3, dim, &shard));
        XP_TRY(generate(f, i, g0, &shard));
    }
    xp_gather_args a = {.shard = shard,
                        .full = xp_tensor_rows(&p->full, 0, g0, g1),
                        .axis = param(f, i)->gather,
                        .start = p->start,
                        .rows = p->rows};
    XP_TRY(xp_call(f->r, &xp_stage_gather, param(f, i)->name, &a));
    if (!p->shard.data)
        xp_rank_drop(f->r, &shard);
    return XP_OK;
}

xp_status params_gather(xp_flow *f, int i) {
    const int64_t groups = own(f, i)->groups, step = xp_plan_chunk_groups(f->plan, i);
    const int64_t dim[3] = {groups, param(f, i)->R, param(f, i)->N};
    if (f->ps[i].full.data)
        return XP_OK;
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_PARAM, xp_plan_param_dtype(f->plan, i), 3, dim, &f->ps[i].full));
    for (int64_t g = 0; g < groups; g += step)
        XP_TRY(gather_chunk(f, i, g, g + step < groups ? g + step : groups));
    return XP_OK;
}

void params_release(xp_flow *f, int i) {
    xp_rank_drop(f->r, &f->ps[i].full);
}

/* A copy of t in f64: what a bound takes as the judge's value. */
static xp_status widened(const xp_flow *f, const xp_tensor *t, xp_tensor *out) {
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_JUDGE, XP_F64, t->ndim, t->dim, out));
    for (int64_t n = 0; n < xp_tensor_count(t); n++)
        ((double *)out->data)[n] = xp_widen(t->data, t->dtype, xp_tensor_offset(t, n));
    return XP_OK;
}

/* The stage's own bound of one output. */
static xp_status bound_of(const xp_flow *f, const xp_stage *s, const void *args, const char *operand, xp_tensor *out) {
    const int i = xp_stage_operand(s, operand);
    const xp_tensor *t = xp_stage_ctensor(s, args, i);
    xp_tensor ref;
    void *ws = NULL;
    XP_TRY(widened(f, t, &ref));
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_JUDGE, XP_F64, t->ndim, t->dim, out));
    XP_TRY(xp_rank_alloc(f->r, XP_KIND_JUDGE, s->bound_workspace(args, f->r->mesh), &ws));
    XP_TRY(s->bound(args, f->r->mesh, i, &ref, ws, out));
    xp_rank_release(f->r, ws);
    xp_rank_drop(f->r, &ref);
    return XP_OK;
}

/* How far the shard may be from the exact gradient: each rank's partial sum is within its stage's bound, the sum of
 * those over the axis is divided as the gradient is, and scatter adds its own bound. With pre the inverse's own
 * rounding makes the shard wrong by no more than that of each part does, which scatter's bound counts for both sides.
 * Every rank of the axis calls it.
 */
static xp_status distance(const xp_flow *f, const xp_scatter_args *a, const flow_made *by, xp_tensor *out) {
    xp_comm *c = f->r->mesh->axis[a->axis];
    xp_tensor err;
    XP_TRY(bound_of(f, by->stage, by->args, by->operand, &err));
    XP_TRY(c->ops->all_reduce(c, f->r->q, &err, XP_SUM));
    XP_TRY(bound_of(f, &xp_stage_scatter, a, "shard", out));
    const xp_tensor all = xp_tensor_of(err.data, XP_F64, 3, &a->grad.dim[1]);
    for (int64_t g = 0; g < out->dim[0]; g++) {
        for (int64_t r = 0; r < out->dim[1]; r++) {
            for (int64_t n = 0; n < out->dim[2]; n++) {
                const double *e = xp_tensor_at(&all, g, a->start[c->rank] + r, n, 0);
                double *t = xp_tensor_at(out, g, r, n, 0);
                /* up to 1024 ranks' and four more roundings; a bf16 inverse of pre is off by 2^-9 at most */
                *t = (*t + *e / f->divisor) * (1.0 + 0x1p-40) + (a->pre > 1 ? *e / f->divisor * 0x1p-8 : 0.0);
            }
        }
    }
    xp_rank_drop(f->r, &err);
    return XP_OK;
}

/* A gradient's rows go to the parity store under the parameter's name: their bits in deterministic mode, else their
 * values, which depend on who sums what. Once the parameters have moved, only deterministic mode makes them the same.
 * Of several micro-batches the last one's call leaves the sum; its bound knows that call alone, so only bits are kept.
 */
static xp_status trace_shard(const xp_flow *f, int i, int64_t g0, const xp_scatter_args *a, const flow_made *by) {
    const xp_plan_param *p = param(f, i);
    xp_tensor tol = {0};
    if (!f->src->parity || (!f->block && (f->r->step > 0 || f->plan->opt.micro > 1)) ||
        f->micro + 1 < f->plan->opt.micro)
        return XP_OK;
    if (!f->block)
        XP_TRY(distance(f, a, by, &tol));
    for (int64_t g = 0; g < a->shard.dim[0]; g++) {
        const int64_t row0 = (own(f, i)->g0 + g0 + g) * p->R + own(f, i)->r0, all = p->G * p->R;
        const int64_t *dim = a->shard.dim;
        const xp_tensor rows = xp_tensor_2d(xp_tensor_at(&a->shard, g, 0, 0, 0), a->shard.dtype, dim[1], dim[2]);
        if (f->block) {
            XP_TRY(xp_parity_rows(f->src->parity, p->name, p->block, f->r->step, f->r->rank, &rows, row0, all));
        } else {
            const xp_tensor far = xp_tensor_2d(xp_tensor_at(&tol, g, 0, 0, 0), XP_F64, dim[1], dim[2]);
            XP_TRY(xp_parity_values(f->src->parity, p->name, p->block, f->r->step, f->r->rank, &rows, &far, row0, all));
        }
    }
    xp_rank_drop(f->r, &tol);
    return XP_OK;
}

/* Groups [g0, g0+gc) of parameter i in a flat buffer. */
static xp_tensor flat_groups(const xp_flow *f, const xp_tensor *flat, int i, int64_t g0, int64_t gc) {
    const xp_tensor all = xp_tensor_3d((float *)flat->data + own(f, i)->offset, XP_F32, own(f, i)->groups,
                                       own(f, i)->rows, param(f, i)->N);
    return xp_tensor_rows(&all, 0, g0, g0 + gc);
}

xp_status params_scatter(xp_flow *f, int i, int64_t g0, const xp_tensor *dw, const flow_made *by) {
    const param_state *p = &f->ps[i];
    const int64_t gc = dw->dim[1];
    const int expert = param(f, i)->expert;
    const double pre = f->plan->opt.average ? (double)f->r->world : 1.0;
    xp_tensor shard;
    if (f->gflat.data) {
        shard = flat_groups(f, &f->gflat, i, g0, gc);
    } else {
        const int64_t dim[3] = {gc, own(f, i)->rows, param(f, i)->N};
        XP_TRY(xp_rank_tensor(f->r, XP_KIND_GRAD, f->wide, 3, dim, &shard));
    }
    xp_scatter_args a = {.grad = *dw,
                         .shard = shard,
                         .axis = param(f, i)->reduce,
                         .start = p->gstart,
                         .rows = p->grows,
                         .reduce_dtype = xp_plan_reduce_dtype(f->plan, i),
                         .divisor = f->micro + 1 < f->plan->opt.micro ? 1.0 : f->divisor / pre,
                         .pre = pre};
    if (f->micro > 0)
        a.base = flat_groups(f, &f->gbase, i, g0, gc);
    if (f->block && !(expert && f->efold)) {
        a.fold_blocks = 1;
        a.blocks = expert ? f->eblocks : param(f, i)->weight == XP_W_EXPERT_NORM ? f->nblocks : f->blocks;
    }
    XP_TRY(xp_call(f->r, &xp_stage_scatter, param(f, i)->name, &a));
    XP_TRY(trace_shard(f, i, g0, &a, by));
    if (!f->gflat.data)
        xp_rank_drop(f->r, &shard);
    return XP_OK;
}

xp_status params_scatter_vector(xp_flow *f, int i, const xp_tensor *dw, const flow_made *by) {
    const int64_t dim[4] = {dw->dim[0], 1, dw->dim[1], 1};
    const xp_tensor view = xp_tensor_of(dw->data, dw->dtype, 4, dim);
    return params_scatter(f, i, 0, &view, by);
}

static xp_status wgrad_chunk(xp_flow *f, int i, const char *site, int64_t g0, xp_wgrad_args *a) {
    const int expert = param(f, i)->expert;
    const int64_t blocks = !f->block || (expert && f->efold) ? 1 : expert ? f->eblocks.dim[0] : f->blocks.dim[0];
    const int64_t dim[4] = {blocks, a->offsets.dim[0] - 1, param(f, i)->R, param(f, i)->N};
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_GRAD, f->grad, 4, dim, &a->dw));
    if (f->block) {
        a->block = f->block;
        a->fold = expert && f->efold;
        if (!a->fold)
            a->blocks = expert ? f->eblocks : f->blocks;
    } else {
        a->tok.data = NULL;
    }
    XP_TRY(xp_call(f->r, &xp_stage_wgrad, site, a));
    XP_TRY(params_scatter(f, i, g0, &a->dw, &(flow_made){&xp_stage_wgrad, a, "dw"}));
    xp_rank_drop(f->r, &a->dw);
    return XP_OK;
}

xp_status params_wgrad(xp_flow *f, int i, const char *site, const xp_tensor *dy, const xp_tensor *x) {
    xp_wgrad_args a = {.dy = *dy, .x = *x, .offsets = f->own_span, .tok = f->own_tok};
    return wgrad_chunk(f, i, site, 0, &a);
}

xp_status params_wgrad_experts(xp_flow *f, int i, const char *site, const xp_tensor *dy, const xp_tensor *x,
                               const xp_tensor *offsets, const xp_tensor *tok) {
    const int64_t step = xp_plan_chunk_groups(f->plan, i);
    for (int64_t g = 0; g < f->L; g += step) {
        const int64_t end = g + step < f->L ? g + step : f->L;
        xp_wgrad_args a = {.dy = *dy, .x = *x, .offsets = xp_tensor_rows(offsets, 0, g, end + 1), .tok = *tok};
        XP_TRY(wgrad_chunk(f, i, site, g, &a));
    }
    return XP_OK;
}

xp_status params_segments(xp_flow *f, xp_tensor *out_seg, xp_tensor *out_owner, xp_tensor *out_decay) {
    const int n = f->plan->params;
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_I64, n + 1, out_seg));
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_U8, n, out_owner));
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_U8, n, out_decay));
    for (int i = 0; i < n; i++) {
        ((int64_t *)out_seg->data)[i] = own(f, i)->offset;
        ((uint8_t *)out_owner->data)[i] = (uint8_t)(own(f, i)->owner != 0);
        ((uint8_t *)out_decay->data)[i] = (uint8_t)(param(f, i)->decay != 0);
    }
    ((int64_t *)out_seg->data)[n] = f->elements;
    return XP_OK;
}

/* The whole logical f32 parameter on every rank: rows over the gather's axis, then groups over ep. */
static xp_status whole(xp_flow *f, int i, xp_tensor *out) {
    const int64_t dim[3] = {param(f, i)->G, param(f, i)->R, param(f, i)->N}, groups = own(f, i)->groups;
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_BUFFER, XP_F32, 3, dim, out));
    xp_tensor mine = xp_tensor_rows(out, 0, own(f, i)->g0, own(f, i)->g0 + groups);
    xp_gather_args a = {.shard = f->ps[i].shard,
                        .full = mine,
                        .axis = param(f, i)->gather,
                        .start = f->ps[i].start,
                        .rows = f->ps[i].rows};
    XP_TRY(xp_call(f->r, &xp_stage_gather, "digest", &a));
    xp_comm *ep = f->r->mesh->axis[XP_EP];
    if (!param(f, i)->expert || ep->size == 1)
        return XP_OK;
    int64_t rows[64];
    for (int q = 0; q < ep->size; q++)
        rows[q] = groups;
    xp_tensor all;
    XP_TRY(xp_rank_tensor(f->r, XP_KIND_BUFFER, XP_F32, 3, dim, &all));
    XP_TRY(ep->ops->all_gather(ep, f->r->q, &mine, rows, &all));
    xp_rank_drop(f->r, out);
    *out = all;
    return XP_OK;
}

xp_status params_digest(xp_flow *f, char out_hex[65]) {
    xp_sha256 sha;
    uint8_t sum[32];
    xp_sha256_begin(&sha);
    for (int n = 0; n < f->plan->params; n++) {
        const int i = f->plan->by_name[n];
        xp_tensor t;
        XP_TRY(whole(f, i, &t));
        if (f->r->rank == 0) {
            xp_sha256_add(&sha, param(f, i)->name, strlen(param(f, i)->name) + 1);
            xp_sha256_add(&sha, t.dim, 3 * sizeof t.dim[0]);
            xp_sha256_add(&sha, t.data, (size_t)xp_tensor_count(&t) * sizeof(float));
        }
        xp_rank_drop(f->r, &t);
    }
    xp_sha256_end(&sha, sum);
    xp_comm *world = f->r->mesh->axis[XP_WORLD];
    int64_t rows[64] = {32};
    xp_tensor src = xp_tensor_1d(sum, XP_U8, f->r->rank == 0 ? 32 : 0), dst;
    XP_TRY(flow_new1(f, XP_KIND_BUFFER, XP_U8, 32, &dst));
    XP_TRY(world->ops->all_gather(world, f->r->q, &src, rows, &dst));
    for (int i = 0; i < 32; i++) {
        static const char digit[] = "0123456789abcdef";
        out_hex[2 * i] = digit[((const uint8_t *)dst.data)[i] >> 4];
        out_hex[2 * i + 1] = digit[((const uint8_t *)dst.data)[i] & 15];
    }
    out_hex[64] = '\0';
    flow_drop(f, &dst);
    return XP_OK;
}
