/* Faults of expert parallelism beside FSDP: what is reduced over which ranks, and who joins a collective. The same
 * rules as in faults.c. Each was seen in a public program, most of them by running it on tiny models over gloo. */
#include <math.h>

#include "faults.h"
#include "xp/clip.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/permute.h"
#include "xp/route.h"
#include "xp/scatter.h"

/* ---- gradients ---- */

/* Experts' gradients are never summed over the ranks that hold the same experts: each keeps its own part. */
RUN(experts_unreduced) {
    const xp_scatter_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    const xp_comm *c = x->mesh->axis[XP_EDP];
    const int64_t rows = a->shard.dim[1], cols = a->shard.dim[2];
    for (int64_t g = 0; g < a->shard.dim[0] && a->axis == XP_EDP && c->size > 1; g++) {
        for (int64_t i = 0; i < rows * cols; i++) {
            double sum = 0;
            for (int64_t b = 0; b < a->grad.dim[0]; b++)
                sum += xp_widen(xp_tensor_at(&a->grad, b, g, a->start[c->rank] + i / cols, i % cols), a->grad.dtype, 0);
            xp_fill_store(&a->shard, g * rows * cols + i, (double)(float)(sum / a->divisor));
        }
    }
    return XP_OK;
}

/* Vectors stand for the parameters that the list of those to be divided left out. */
RUN(outside_undivided) {
    xp_scatter_args a = *(const xp_scatter_args *)args;
    (void)self;
    if (a.grad.dim[1] == 1 && a.grad.dim[3] == 1)
        a.divisor = 1;
    return inner->run(x, &a);
}

/* ---- norm and clip ---- */

/* A 2-norm that these faults know how to spoil. */
static int is_plain(const xp_gradnorm_args *a) {
    return a->p == 2 && a->semantics == XP_EXACT;
}

/* The sum of v over the world; the ranks' own values in all[size] where that is not NULL. */
static xp_status world_sum(const xp_exec *x, double v, double *all, double *out) {
    xp_comm *world = x->mesh->axis[XP_WORLD];
    xp_tensor t = xp_tensor_1d(all, XP_F64, world->size);
    for (int q = 0; all && q < world->size; q++)
        all[q] = q == world->rank ? v : 0.0;
    if (all)
        XP_TRY(world->ops->all_reduce(world, x->q, &t, XP_SUM));
    *out = v;
    t = xp_tensor_1d(out, XP_F64, 1);
    return world->ops->all_reduce(world, x->q, &t, XP_SUM);
}

/* The norm is summed over pairs of ranks, the shards lie on all of them. */
RUN(norm_group) {
    const xp_gradnorm_args *a = args;
    const xp_comm *world = x->mesh->axis[XP_WORLD];
    const int first = world->rank / 2 * 2;
    double sum;
    if (world->size <= 2 || !is_plain(a))
        return inner->run(x, args);
    double *all = malloc((size_t)world->size * sizeof *all);
    if (!all)
        return XP_FAIL(XP_E_NOMEM, "fault %s: no memory", self->name);
    const xp_status st = world_sum(x, local_square(a), all, &sum);
    sum = all[first] + (first + 1 < world->size ? all[first + 1] : 0.0);
    free(all);
    xp_fill_store(&a->norm, 0, sqrt(sum));
    return st;
}

static int is_expert(const xp_gradnorm_args *a, int64_t q) {
    return (((const int32_t *)a->place.data)[q] & (XP_PLACE_COPIES(XP_EP_DP) | XP_PLACE_COPIES(XP_EDP))) != 0;
}

/* Experts are plain tensors of their rank, so nobody sums their squares: as many norms as ranks. */
RUN(norm_local_experts) {
    const xp_gradnorm_args *a = args;
    double shared = 0, local = 0, sum;
    (void)self;
    if (x->mesh->axis[XP_EP]->size == 1 || !a->place.data || !is_plain(a))
        return inner->run(x, args);
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        if (is_expert(a, q))
            local += segment_square(a, q);
        else if (((const uint8_t *)a->owner.data)[q])
            shared += segment_square(a, q);
    }
    XP_TRY(world_sum(x, shared, NULL, &sum));
    xp_fill_store(&a->norm, 0, sqrt(sum + local));
    return XP_OK;
}

/* What nobody is to count is counted. */
RUN(norm_outsiders) {
    xp_gradnorm_args a = *(const xp_gradnorm_args *)args;
    if (!a.place.data)
        return inner->run(x, &a);
    XP_TRY(copy_of(self, &a.owner, &a.owner));
    for (int64_t q = 0; q < a.owner.dim[0]; q++) {
        if (((const int32_t *)a.place.data)[q] & XP_PLACE_UNCOUNTED)
            ((uint8_t *)a.owner.data)[q] = 1;
    }
    const xp_status st = inner->run(x, &a);
    free(a.owner.data);
    return st;
}

/* A rank without gradients takes 0 for the norm and leaves before the collective. */
RUN(norm_empty_leaves) {
    const xp_gradnorm_args *a = args;
    (void)self;
    if (a->grad.dim[0] > 0)
        return inner->run(x, args);
    xp_fill_store(&a->norm, 0, 0.0);
    return XP_OK;
}

/* A coefficient that is NaN is not below 1, so nothing is scaled and nobody is told. */
RUN(nan_unclipped) {
    const xp_clip_args *a = args;
    (void)self;
    if (!isnan(get(&a->norm, 0)))
        return inner->run(x, args);
    xp_fill_store(&a->coef, 0, 1.0);
    return XP_OK;
}

/* ---- dispatch, combine, route ---- */

enum { COUNTS_KEPT = 1024 };
/* What each rank's thread knows of the counts' host buffer: its content, and the call that it will be overwritten by.
 * A call that is repeated finds what it found before. */
static _Thread_local struct {
    const void *call;
    int64_t experts, old[COUNTS_KEPT], now[COUNTS_KEPT];
} host;

/* Keeps this call's counts for the next one. Returns 1 when the call before has left counts that fit this one. */
static int counts_arrive(const xp_dispatch_args *a) {
    const int64_t experts = a->counts.dim[0];
    const int follows = host.experts == experts;
    int repeated = follows && host.call == a->recv_counts.data;
    int64_t more = 0;
    for (int64_t e = 0; e < experts && repeated; e++)
        repeated = host.now[e] == (int64_t)get(&a->counts, e);
    for (int64_t e = 0; e < experts && !repeated; e++) {
        host.old[e] = follows ? host.now[e] : -1;
        host.now[e] = (int64_t)get(&a->counts, e);
    }
    host.experts = experts;
    host.call = a->recv_counts.data;
    for (int64_t e = 0; e < experts; e++)
        more += host.old[e] - host.now[e];
    return more == 0;
}

/* The counts of the call before, and the borders that follow from them. */
static xp_status old_counts(const xp_fault *self, const xp_dispatch_args *a, xp_tensor *counts, xp_tensor *offsets) {
    int64_t at = 0;
    XP_TRY(copy_of(self, &a->counts, counts));
    XP_TRY(copy_of(self, &a->offsets, offsets));
    for (int64_t e = 0; e < a->counts.dim[0]; e++) {
        ((int64_t *)counts->data)[e] = host.old[e];
        ((int64_t *)offsets->data)[e] = at;
        at += (host.old[e] + a->align - 1) / a->align * a->align;
    }
    ((int64_t *)offsets->data)[a->counts.dim[0]] = at;
    return XP_OK;
}

/* Counts are copied to the host without waiting for the copy: the all-to-all cuts its rows by those of the call before,
 * while the device goes by the right ones. What the all-to-all did not bring is zero. */
RUN(stale_counts) {
    const xp_dispatch_args *a = args;
    xp_dispatch_args b = *a;
    xp_tensor t[6] = {{0}};
    XP_TRY(inner->run(x, args));
    if (x->mesh->axis[XP_EP]->size == 1 || a->counts.dim[0] > COUNTS_KEPT || a->scales.data || !counts_arrive(a))
        return XP_OK;
    xp_status st = old_counts(self, a, &t[0], &t[1]);
    const xp_tensor *const out[] = {&a->recv, &a->recv_tok, &a->recv_counts, &a->recv_offsets};
    for (int i = 0; i < 4 && st == XP_OK; i++)
        st = copy_of(self, out[i], &t[2 + i]);
    b.counts = t[0], b.offsets = t[1], b.recv = t[2], b.recv_tok = t[3], b.recv_counts = t[4], b.recv_offsets = t[5];
    if (st == XP_OK)
        st = inner->run(x, &b);
    const int64_t L = a->recv_offsets.dim[0] - 1, H = a->recv.dim[1];
    for (int64_t i = 0; st == XP_OK && i < (int64_t)get(&a->recv_offsets, L) * H; i++)
        xp_fill_store(&a->recv, i, i < (int64_t)get(&b.recv_offsets, L) * H ? get(&b.recv, i) : 0.0);
    for (int i = 0; i < 6; i++)
        free(t[i].data);
    return st;
}

/* A rank that received no rows gives back a fresh tensor, to which no gradient flows: it does not join the all-to-all
 * of the backward pass. Its own tokens' weights get their gradient all the same. */
RUN(empty_leaves) {
    const xp_combine_bwd_args *a = args;
    const int64_t K = a->w.dim[1], H = a->dy.dim[1];
    (void)self;
    if (get(&a->recv_offsets, a->recv_offsets.dim[0] - 1) > 0 || a->dx.data || x->mesh->axis[XP_EP]->size == 1)
        return inner->run(x, args);
    for (int64_t i = 0; i < a->dy.dim[0] * K; i++) {
        const int64_t row = (int64_t)get(&a->pos, i);
        double sum = 0;
        for (int64_t h = 0; h < H && row >= 0; h++)
            sum += get(&a->dy, i / K * H + h) * get(&a->back, row * H + h);
        xp_fill_store(&a->dw, i, sum);
    }
    return XP_OK;
}

/* An index_add of activations adds the gradients of a token's copies. */
RUN(dx_running) {
    xp_permute_bwd_args a = *(const xp_permute_bwd_args *)args;
    xp_dialect d = *a.dialect;
    (void)self;
    d.dx_sum = XP_DX_ACT;
    a.dialect = &d;
    return inner->run(x, &a);
}

/* Replayed choices are weighed by a softmax, whatever the gate's own score is. */
RUN(replay_softmax) {
    xp_route_args a = *(const xp_route_args *)args;
    xp_dialect d = *a.dialect;
    (void)self;
    if (!a.replay || d.score == XP_SCORE_SPARSEMIXER || d.score == XP_SCORE_SOFTMAX_TOPK)
        return inner->run(x, args);
    d.score = XP_SCORE_SOFTMAX;
    a.dialect = &d;
    return inner->run(x, &a);
}

FAULT(experts_unreduced, "experts-unreduced", "scatter",
      "expert gradients are not summed over the ranks that hold the same experts", "twinkle 9aa55792, torchtitan#1541",
      "bound");
FAULT(outside_undivided, "outside-undivided", "scatter",
      "parameters outside the optimizer's list are not divided by the token count, and enter the norm",
      "twinkle 1a1d8845 grad_clip.py", "bound");
FAULT(norm_group, "norm-group", "gradnorm", "the norm is summed over fewer ranks than the shards lie on",
      "twinkle 1a1d8845 native_fsdp.py", "bound");
FAULT(norm_local_experts, "norm-local-experts", "gradnorm",
      "each rank's norm counts its own experts alone: as many norms as ranks", "twinkle 9aa55792 grad_clip.py",
      "bound");
FAULT(norm_outsiders, "norm-outsiders", "gradnorm", "parameters that the norm leaves out are counted",
      "twinkle 1a1d8845 grad_clip.py", "bound");
FAULT(norm_empty_leaves, "norm-empty-leaves", "gradnorm", "a rank without gradients leaves before the norm is summed",
      "twinkle 9aa55792 grad_clip.py", "collective");
FAULT(nan_unclipped, "nan-unclipped", "clip", "a NaN norm leaves the gradients as they are, and is not reported",
      "twinkle 1a1d8845 grad_clip.py", "nan");
FAULT(stale_counts, "stale-counts", "dispatch", "row counts are read before they arrive: those of the call before",
      "twinkle 1a1d8845 ep_utils.py", "bits");
FAULT(empty_leaves, "empty-leaves", "combine_bwd", "a rank that received no rows does not join the backward all-to-all",
      "twinkle 9aa55792, Megatron-LM#3626, NeMo-Automodel#3680", "collective");
FAULT(dx_running, "dx-running", "permute_bwd", "the gradients of a token's copies are summed in the activation dtype",
      "twinkle 1a1d8845 expert_parallel.py", "bound");
FAULT(replay_softmax, "replay-softmax", "route", "replayed choices are weighed by softmax under every gate",
      "twinkle 1a1d8845 expert_parallel.py", "bound");
