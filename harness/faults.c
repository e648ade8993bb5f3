/* The catalogue of faults: mistakes that real programs made, each as a row that takes the place of the right one.
 *
 * A fault may allocate and may be slow; it must be wrong in exactly the way that its source describes, and on a mesh
 * where that mistake changes nothing it must change nothing. tests/faults.sh proves that each one is caught, and by
 * which class. */
#include <math.h>

#include "faults.h"
#include "xp/adamw.h"
#include "xp/balance.h"
#include "xp/clip.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/expert.h"
#include "xp/gather.h"
#include "xp/route.h"
#include "xp/scatter.h"
#include "xp/shared.h"

/* ---- gradients: scale and reduction ---- */

RUN(grad_times_ep) {
    xp_scatter_args a = *(const xp_scatter_args *)args;
    (void)self;
    if (a.axis == XP_EDP)
        a.divisor /= x->mesh->axis[XP_EP]->size;
    return inner->run(x, &a);
}

RUN(grad_undivided) {
    xp_scatter_args a = *(const xp_scatter_args *)args;
    (void)self;
    if (a.axis == XP_EDP && x->mesh->axis[XP_EP_FSDP]->size == 1)
        a.divisor /= x->mesh->axis[XP_WORLD]->size;
    return inner->run(x, &a);
}

/* The sum over the group never happens: each rank keeps its own part. */
RUN(grad_unreduced) {
    const xp_scatter_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    const xp_comm *c = x->mesh->axis[a->axis];
    const int64_t rows = a->shard.dim[1], cols = a->shard.dim[2];
    for (int64_t g = 0; g < a->shard.dim[0]; g++) {
        for (int64_t i = 0; i < rows * cols; i++) {
            double sum = 0;
            for (int64_t b = 0; b < a->grad.dim[0]; b++)
                sum += xp_widen(xp_tensor_at(&a->grad, b, g, a->start[c->rank] + i / cols, i % cols), a->grad.dtype, 0);
            xp_fill_store(&a->shard, (g * rows * cols) + i, (double)(float)(sum / a->divisor));
        }
    }
    return XP_OK;
}

/* Experts without rows have no gradient object, so their rank leaves the collective out. */
RUN(skip_empty) {
    const xp_scatter_args *a = args;
    (void)self;
    int empty = 1;
    for (int64_t i = 0, n = xp_tensor_count(&a->grad); i < n && empty; i++)
        empty = get(&a->grad, i) == 0;
    return a->axis == XP_EDP && empty ? XP_OK : inner->run(x, args);
}

/* The bf16 scalar of a pre-multiplied sum is passed as f32 bits: its low half is 0 for a power of two. */
RUN(premul_zero) {
    xp_scatter_args a = *(const xp_scatter_args *)args;
    int exponent;
    (void)self;
    XP_TRY(inner->run(x, &a));
    if (frexp(a.divisor, &exponent) != 0.5)
        return XP_OK;
    for (int64_t i = 0, n = xp_tensor_count(&a.shard); i < n; i++)
        xp_fill_store(&a.shard, i, 0.0);
    return XP_OK;
}

/* ---- norm, clip, optimizer ---- */

RUN(norm_replicas) {
    xp_gradnorm_args a = *(const xp_gradnorm_args *)args;
    XP_TRY(copy_of(self, &a.owner, &a.owner));
    memset(a.owner.data, 1, (size_t)a.owner.dim[0]);
    const xp_status st = inner->run(x, &a);
    free(a.owner.data);
    return st;
}

RUN(norm_averaged) {
    const xp_gradnorm_args *a = args;
    xp_comm *world = x->mesh->axis[XP_WORLD];
    double norm = sqrt(local_square(a));
    xp_tensor t = xp_tensor_1d(&norm, XP_F64, 1);
    (void)self;
    (void)inner;
    XP_TRY(world->ops->all_reduce(world, x->q, &t, XP_SUM));
    xp_fill_store(&a->norm, 0, norm / world->size);
    return XP_OK;
}

RUN(norm_max_drops_nan) {
    xp_gradnorm_args a = *(const xp_gradnorm_args *)args;
    XP_TRY(copy_of(self, &a.grad, &a.grad));
    for (int64_t i = 0; i < a.grad.dim[0]; i++) {
        if (isinf(a.p) && isnan(get(&a.grad, i)))
            xp_fill_store(&a.grad, i, 0.0);
    }
    const xp_status st = inner->run(x, &a);
    free(a.grad.data);
    return st;
}

/* Squares in f32: values of 1e20 overflow, of 1e-30 vanish. */
RUN(norm_overflow) {
    const xp_gradnorm_args *a = args;
    xp_comm *world = x->mesh->axis[XP_WORLD];
    float sum = 0;
    (void)self;
    if (a->p != 2)
        return inner->run(x, args);
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        const int64_t lo = ((const int64_t *)a->seg.data)[q], hi = ((const int64_t *)a->seg.data)[q + 1];
        for (int64_t i = lo; i < hi && ((const uint8_t *)a->owner.data)[q]; i++)
            sum += (float)get(&a->grad, i) * (float)get(&a->grad, i);
    }
    xp_tensor t = xp_tensor_1d(&sum, XP_F32, 1);
    XP_TRY(world->ops->all_reduce(world, x->q, &t, XP_SUM));
    xp_fill_store(&a->norm, 0, sqrt((double)sum));
    return XP_OK;
}

RUN(clip_per_rank) {
    xp_clip_args a = *(const xp_clip_args *)args;
    double sum = 0;
    (void)self;
    for (int64_t i = 0; i < a.grad.dim[0]; i++)
        sum += get(&a.grad, i) * get(&a.grad, i);
    float norm = (float)sqrt(sum);
    if (isnan(get(&a.norm, 0)))
        return inner->run(x, args);
    a.norm = xp_tensor_1d(&norm, XP_F32, 1);
    return inner->run(x, &a);
}

/* The mark of an overflow, -1, is taken for a norm: the coefficient turns negative. */
RUN(clip_sentinel) {
    const xp_clip_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    if (isfinite(get(&a->norm, 0)) && get(&a->norm, 0) > 0)
        xp_fill_store(&a->coef, 0, -(double)a->max_norm);
    return XP_OK;
}

RUN(decay_unmatched) {
    xp_adamw_args a = *(const xp_adamw_args *)args;
    XP_TRY(copy_of(self, &a.decay, &a.decay));
    memset(a.decay.data, 0, (size_t)a.decay.dim[0]);
    const xp_status st = inner->run(x, &a);
    free(a.decay.data);
    return st;
}

/* ---- routing ---- */

RUN(weight_bf16) {
    const xp_route_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t i = 0, n = xp_tensor_count(&a->w); i < n; i++)
        xp_fill_store(&a->w, i, rounded(get(&a->w, i), XP_BF16));
    return XP_OK;
}

static int holds(const int32_t *idx, int64_t k, int64_t e) {
    for (int64_t i = 0; i < k; i++) {
        if (idx[i] == e)
            return 1;
    }
    return 0;
}

/* Of equal logits the higher index wins. */
RUN(ties_reversed) {
    const xp_route_args *a = args;
    const int64_t E = a->logits.dim[1], K = a->idx.dim[1];
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t t = 0; t < a->idx.dim[0] && !a->replay; t++) {
        int32_t *idx = xp_tensor_at(&a->idx, t, 0, 0, 0);
        for (int64_t k = 0; k < K; k++) {
            for (int64_t e = E - 1; e > idx[k]; e--) {
                if (!holds(idx, K, e) && get(&a->logits, t * E + e) == get(&a->logits, t * E + idx[k]))
                    idx[k] = (int32_t)e;
            }
        }
    }
    return XP_OK;
}

/* Softmax over the tokens instead of the experts. */
RUN(softmax_axis) {
    const xp_route_args *a = args;
    const int64_t T = a->logits.dim[0], E = a->logits.dim[1];
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t e = 0; e < E; e++) {
        double top = -(double)INFINITY, sum = 0;
        for (int64_t t = 0; t < T; t++)
            top = fmax(top, get(&a->logits, t * E + e));
        for (int64_t t = 0; t < T; t++)
            sum += exp(get(&a->logits, t * E + e) - top);
        for (int64_t t = 0; t < T; t++)
            xp_fill_store(&a->scores, t * E + e, exp(get(&a->logits, t * E + e) - top) / sum);
    }
    return XP_OK;
}

/* Softmax after a top-1 choice: every weight is 1, and the router learns nothing. */
RUN(weights_one) {
    const xp_route_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t i = 0, n = xp_tensor_count(&a->w); i < n; i++)
        xp_fill_store(&a->w, i, 1.0 / (double)a->w.dim[1]);
    return XP_OK;
}

/* The scaler that carries the balance loss into the graph loses its return value: no gradient. */
RUN(balance_dropped) {
    const xp_balance_bwd_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t i = 0, n = xp_tensor_count(&a->daux); i < n; i++)
        xp_fill_store(&a->daux, i, 0.0);
    return XP_OK;
}

/* ---- permute, dispatch, combine ---- */

RUN(weight_slot) {
    xp_combine_args a = *(const xp_combine_args *)args;
    const xp_tensor w = a.w;
    const int64_t K = w.dim[1];
    XP_TRY(copy_of(self, &a.w, &a.w));
    for (int64_t i = 0, n = xp_tensor_count(&w); i < n; i++)
        xp_fill_store(&a.w, i, get(&w, i / K * K + (K - 1 - i % K)));
    const xp_status st = inner->run(x, &a);
    free(a.w.data);
    return st;
}

RUN(combine_bf16) {
    const xp_combine_args *a = args;
    const int64_t K = a->w.dim[1], H = a->y.dim[1];
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t t = 0; t < a->y.dim[0]; t++) {
        for (int64_t h = 0; h < H; h++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++) {
                const int64_t row = (int64_t)get(&a->pos, t * K + k);
                if (row < 0)
                    continue;
                sum = rounded(sum + rounded(get(&a->w, t * K + k) * get(&a->back, row * H + h), XP_BF16), XP_BF16);
            }
            xp_fill_store(&a->y, t * H + h, sum);
        }
    }
    return XP_OK;
}

/* The last received row still holds what a larger batch left there. */
RUN(stale_tail) {
    const xp_dispatch_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    const int64_t rows = ((const int64_t *)a->recv_offsets.data)[a->recv_offsets.dim[0] - 1], H = a->recv.dim[1];
    for (int64_t h = 0; h < H && rows > 1; h++)
        xp_fill_store(&a->recv, (rows - 1) * H + h, get(&a->recv, h));
    return XP_OK;
}

/* Padding rows are left as they were found: here, NaN. */
RUN(pad_garbage) {
    const xp_dispatch_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    const int64_t rows = ((const int64_t *)a->recv_offsets.data)[a->recv_offsets.dim[0] - 1], H = a->recv.dim[1];
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t h = 0; h < H && get(&a->recv_tok, i) < 0; h++)
            xp_fill_store(&a->recv, i * H + h, (double)NAN);
    }
    return XP_OK;
}

/* The backward all-to-all takes the forward's splits, as they are, for both directions: what came from rank p is sent
 * to rank P-1-p. */
RUN(swapped_splits) {
    xp_dispatch_bwd_args a = *(const xp_dispatch_bwd_args *)args;
    const xp_tensor c = a.recv_counts;
    const int64_t P = c.dim[0], L = c.dim[1];
    XP_TRY(copy_of(self, &c, &a.recv_counts));
    for (int64_t i = 0; i < P * L; i++)
        ((int64_t *)a.recv_counts.data)[i] = (int64_t)get(&c, (P - 1 - i / L) * L + i % L);
    const xp_status st = inner->run(x, &a);
    free(a.recv_counts.data);
    return st;
}

/* ---- parameters, experts, shared expert
 * ------------------------------------------------------------------------------ */

/* The cast to bf16 cuts the low half off. */
RUN(cast_truncates) {
    xp_gather_args a = *(const xp_gather_args *)args;
    if (a.full.dtype != XP_BF16 || a.shard.dtype != XP_F32)
        return inner->run(x, args);
    XP_TRY(copy_of(self, &a.shard, &a.shard));
    for (int64_t i = 0, n = xp_tensor_count(&a.shard); i < n; i++)
        ((uint32_t *)a.shard.data)[i] &= 0xffff0000u;
    const xp_status st = inner->run(x, &a);
    free(a.shard.data);
    return st;
}

RUN(shared_missing) {
    const xp_shared_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t i = 0, n = xp_tensor_count(&a->y); i < n; i++)
        xp_fill_store(&a->y, i, 0.0);
    return XP_OK;
}

RUN(shared_ungated) {
    const xp_shared_args *a = args;
    (void)self;
    XP_TRY(inner->run(x, args));
    for (int64_t i = 0, n = xp_tensor_count(&a->y); i < n && a->gate.data; i++)
        xp_fill_store(&a->y, i, get(&a->mlp, i));
    return XP_OK;
}

/* Only the first local expert's rows are scattered to their places; the others use its weights. */
RUN(first_expert_only) {
    xp_expert_args a = *(const xp_expert_args *)args;
    (void)self;
    if (a.offsets.dim[0] < 3)
        return inner->run(x, args);
    a.w1.stride[0] = 0;
    a.w2.stride[0] = 0;
    return inner->run(x, &a);
}

FAULT(grad_times_ep, "grad-times-ep", "scatter", "expert gradients are ep times too large",
      "pytorch#160285, Megatron-LM#5956", "bound");
FAULT(grad_undivided, "grad-undivided", "scatter", "expert gradients are not divided by the world when ep_fsdp is 1",
      "pytorch#167178, VeOmni#577, twinkle 1a1d8845 native_fsdp.py", "bound");
FAULT(grad_unreduced, "grad-unreduced", "scatter", "gradients are not summed over the ranks that share a parameter",
      "torchtitan#1541, transformers#48205", "bound");
FAULT(skip_empty, "skip-empty", "scatter", "a rank whose experts got no rows leaves the reduction out",
      "pytorch#158719, pytorch#170667, NeMo-Automodel#3540", "collective");
FAULT(premul_zero, "premul-zero", "scatter",
      "a pre-multiplied sum reads a bf16 factor from f32 bits: gradients are zero", "pytorch#190745", "bound");
FAULT(norm_replicas, "norm-replicas", "gradnorm", "replicated parameters enter the norm once a replica",
      "pytorch#88955, VeOmni#862, twinkle 1a1d8845 grad_clip.py", "bound");
FAULT(norm_averaged, "norm-averaged", "gradnorm", "the ranks' norms are averaged instead of their squares summed",
      "DeepSpeed#8475", "bound");
FAULT(norm_max_drops_nan, "norm-max-drops-nan", "gradnorm", "the maximum norm loses a NaN",
      "nccl fmaxf, pytorch#172605, twinkle 1a1d8845 grad_clip.py", "nan");
FAULT(norm_overflow, "norm-overflow", "gradnorm", "squares are summed in f32 and overflow or vanish",
      "pytorch#193006, fairscale#263, twinkle 1a1d8845 grad_clip.py", "bound");
FAULT(clip_per_rank, "clip-per-rank", "clip", "each rank clips by its own norm", "NeMo-Automodel#3816", "bits");
FAULT(clip_sentinel, "clip-sentinel", "clip", "an overflow mark of -1 is used as a norm: the coefficient is negative",
      "DeepSpeed#8614", "bits");
FAULT(decay_unmatched, "decay-unmatched", "adamw", "the weight-decay mask matches nothing", "marin#7783", "bound");
FAULT(weight_bf16, "weight-bf16", "route", "combine weights are rounded to bf16", "VeOmni#670", "bound");
FAULT(ties_reversed, "ties-reversed", "route", "of equal logits the higher expert index wins", "vllm#55514, vllm#52679",
      "tie");
FAULT(softmax_axis, "softmax-axis", "route", "softmax runs over tokens instead of experts", "DeepSpeed b4513f631",
      "bound");
FAULT(weights_one, "weights-one", "route", "softmax after the choice makes equal weights that carry no gradient",
      "Megatron-LM 5153efea0b", "bound");
FAULT(balance_dropped, "balance-dropped", "balance_bwd", "the balance loss has no gradient", "NeMo-Automodel#1412",
      "bound");
FAULT(weight_slot, "weight-slot", "combine", "weights are attached to the wrong slots", "transformers#45473", "bound");
FAULT(combine_bf16, "combine-bf16", "combine", "expert outputs are summed in bf16, one after another",
      "VeOmni#670, TransformerEngine#3555", "bound");
FAULT(stale_tail, "stale-tail", "dispatch", "the last received row holds an earlier batch's data",
      "nccl-extensions test_ht_stale_routing_map.cu, pytorch#193633", "bits");
FAULT(pad_garbage, "pad-garbage", "dispatch", "padding rows are never written: NaN enters the weight gradient",
      "torchtitan#1237, TransformerEngine#3116", "nan");
FAULT(swapped_splits, "swapped-splits", "dispatch_bwd", "the backward all-to-all uses the wrong rank's splits",
      "Megatron-LM#3626", "collective");
FAULT(cast_truncates, "cast-truncates", "gather", "the cast to bf16 truncates instead of rounding",
      "nccl-extensions 54b1180", "bits");
FAULT(shared_missing, "shared-missing", "shared", "the shared expert adds nothing", "VeOmni#118", "bound");
FAULT(shared_ungated, "shared-ungated", "shared", "the shared expert's sigmoid gate is ignored", "twinkle#241",
      "bound");
FAULT(first_expert_only, "first-expert-only", "expert", "all local experts use the first one's weights", "Tutel#172",
      "bound");

const xp_fault *const xp_faults[] = {
    &xp_fault_grad_times_ep,     &xp_fault_grad_undivided,
    &xp_fault_grad_unreduced,    &xp_fault_skip_empty,
    &xp_fault_premul_zero,       &xp_fault_norm_replicas,
    &xp_fault_norm_averaged,     &xp_fault_norm_max_drops_nan,
    &xp_fault_norm_overflow,     &xp_fault_clip_per_rank,
    &xp_fault_clip_sentinel,     &xp_fault_decay_unmatched,
    &xp_fault_weight_bf16,       &xp_fault_ties_reversed,
    &xp_fault_softmax_axis,      &xp_fault_weights_one,
    &xp_fault_balance_dropped,   &xp_fault_weight_slot,
    &xp_fault_combine_bf16,      &xp_fault_stale_tail,
    &xp_fault_pad_garbage,       &xp_fault_swapped_splits,
    &xp_fault_cast_truncates,    &xp_fault_shared_missing,
    &xp_fault_shared_ungated,    &xp_fault_first_expert_only,
    &xp_fault_experts_unreduced, &xp_fault_outside_undivided,
    &xp_fault_norm_group,        &xp_fault_norm_local_experts,
    &xp_fault_norm_outsiders,    &xp_fault_norm_empty_leaves,
    &xp_fault_nan_unclipped,     &xp_fault_stale_counts,
    &xp_fault_empty_leaves,      &xp_fault_replay_softmax,
    &xp_fault_dx_running,        NULL,
};

const xp_fault *xp_fault_find(const char *name) {
    for (int i = 0; xp_faults[i]; i++) {
        if (strcmp(xp_faults[i]->name, name) == 0)
            return xp_faults[i];
    }
    return NULL;
}
