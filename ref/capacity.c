/* Stage capacity: the first C slots of each expert are kept, the others dropped.
 *
 * The slots of the tokens that are counted together are sorted as the record's `overflow` says, then dealt to their
 * experts one by one. Contract: xp/capacity.h. Moves numbers of experts: bits. Must not look at a weight unless the
 * record's order is by weight. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "xp/capacity.h"

static const xp_operand operands[] = {
    XP_OPERAND(xp_capacity_args, idx, "T,K", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_capacity_args, w, "T,K", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "weight"),
    XP_OPERAND(xp_capacity_args, kept, "T,K", XP_OUT, XP_BIT(XP_I32), XP_BITS, ""),
    XP_OPERAND(xp_capacity_args, dropped, "E", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
};

static const xp_param params[] = {
    {"dialect", NULL, "hf-5.24/qwen3_moe", XP_P_DIALECT, offsetof(xp_capacity_args, dialect)},
    {"token0", NULL, "0", XP_P_I64, offsetof(xp_capacity_args, token0)},
    {"sequence", NULL, "0", XP_P_I64, offsetof(xp_capacity_args, sequence)},
};

static int64_t experts_of(const xp_capacity_args *a) {
    return a->dropped.dim[0];
}

static int64_t slots_of(const xp_capacity_args *a) {
    return a->idx.dim[1];
}

/* ---- check ---- */

static xp_status check_idx(const xp_capacity_args *a) {
    const int64_t last = experts_of(a) + a->dialect->null_experts - 1;
    for (int64_t t = 0; t < a->idx.dim[0] && xp_ref_readable(&a->idx); t++) {
        for (int64_t k = 0; k < slots_of(a); k++) {
            const int32_t e = xp_ref_i32(&a->idx, t, k);
            if (e < -1 || e > last)
                return XP_FAIL(XP_E_ARG,
                               "capacity: idx[%lld][%lld] is %d, expected -1 to %lld, the last of E = %lld and %d null "
                               "experts",
                               (long long)t, (long long)k, e, (long long)last, (long long)experts_of(a),
                               a->dialect->null_experts);
        }
    }
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_capacity_args *a = args;
    xp_ref_dims d;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_capacity, args, &d));
    if (!a->dialect)
        return XP_FAIL(XP_E_ARG, "capacity: dialect is absent, expected a record");
    if (a->token0 < 0)
        return XP_FAIL(XP_E_ARG, "capacity: token0 is %lld, expected >= 0", (long long)a->token0);
    if (a->sequence < 0)
        return XP_FAIL(XP_E_ARG, "capacity: sequence is %lld, expected 0 (all tokens are one) or more",
                       (long long)a->sequence);
    XP_TRY(xp_dialect_check(a->dialect, XP_REF_DIM(d, 'E'), XP_REF_DIM(d, 'K')));
    return check_idx(a);
}

/* idx and kept once; weights where they decide. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_capacity_args *a = args;
    const double slots = (double)(a->idx.dim[0] * slots_of(a));
    const int by_weight = a->dialect->overflow == XP_OVERFLOW_PRIORITY && xp_dialect_limits(a->dialect);
    (void)m;
    *out = (xp_cost){.flop = 0.0,
                     .mem_bytes = slots * (8.0 + (by_weight ? (double)xp_dtype_bytes(a->w.dtype, 1) : 0.0)) +
                                  8.0 * (double)experts_of(a),
                     .net_bytes = 0.0};
}

/* ---- reference ---- */

/* One past the last token that is counted together with t. */
static int64_t group_end(const xp_capacity_args *a, int64_t t) {
    const int64_t tokens = a->idx.dim[0];
    if (a->sequence == 0)
        return tokens;
    const int64_t left = a->sequence - (a->token0 + t) % a->sequence;
    return left < tokens - t ? t + left : tokens;
}

static double weight_of(const xp_capacity_args *a, int64_t slot) {
    return xp_widen(xp_tensor_at(&a->w, slot / slots_of(a), slot % slots_of(a), 0, 0), a->w.dtype, 0);
}

/* 1: slot x (t K + k) comes before y. */
static int comes_before(const xp_capacity_args *a, int64_t x, int64_t y) {
    const int64_t K = slots_of(a);
    if (a->dialect->overflow == XP_OVERFLOW_SLOTS)
        return x % K != y % K ? x % K < y % K : x < y;
    if (a->dialect->overflow == XP_OVERFLOW_PRIORITY) {
        const double wx = weight_of(a, x), wy = weight_of(a, y);
        if (isnan(wx) != isnan(wy))
            return isnan(wy);
        if (wx > wy || wx < wy)
            return wx > wy;
    }
    return x < y;
}

/* Slot `at` of a heap whose top is the last in order sinks to its place. */
static void sink(const xp_capacity_args *a, int64_t *heap, int64_t n, int64_t at) {
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && comes_before(a, heap[child], heap[child + 1]))
            child++;
        if (!comes_before(a, heap[at], heap[child]))
            return;
        const int64_t top = heap[at];
        heap[at] = heap[child];
        heap[child] = top;
    }
}

static void sort(const xp_capacity_args *a, int64_t *slot, int64_t n) {
    for (int64_t i = n / 2 - 1; i >= 0; i--)
        sink(a, slot, n, i);
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t last = slot[0];
        slot[0] = slot[i];
        slot[i] = last;
        sink(a, slot, i, 0);
    }
}

/* Tokens [t0, t1): their slots, in order, to their experts. */
static void deal(const xp_capacity_args *a, int64_t t0, int64_t t1, int64_t *slot, int64_t *taken) {
    const int64_t K = slots_of(a), n = (t1 - t0) * K;
    const int64_t room = xp_dialect_capacity(a->dialect, t1 - t0, experts_of(a), K);
    memset(taken, 0, (size_t)experts_of(a) * sizeof *taken);
    for (int64_t i = 0; i < n; i++)
        slot[i] = t0 * K + i;
    sort(a, slot, n);
    for (int64_t i = 0; i < n; i++) {
        const int32_t e = xp_ref_i32(&a->idx, slot[i] / K, slot[i] % K);
        int32_t *kept = xp_tensor_at(&a->kept, slot[i] / K, slot[i] % K, 0, 0);
        const int has_rows = e >= 0 && e < experts_of(a);
        *kept = e;
        if (!has_rows || taken[e]++ < room)
            continue;
        *kept = -1;
        ++*(int64_t *)xp_tensor_at(&a->dropped, e, 0, 0, 0);
    }
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_capacity_args *a = args;
    (void)m;
    return xp_ref_span((size_t)(a->idx.dim[0] * slots_of(a)) * sizeof(int64_t)) +
           xp_ref_span((size_t)experts_of(a) * sizeof(int64_t));
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_capacity_args *a = args;
    char *at = x->ws;
    int64_t *slot = xp_ref_carve(&at, (size_t)(a->idx.dim[0] * slots_of(a)) * sizeof *slot);
    int64_t *taken = xp_ref_carve(&at, (size_t)experts_of(a) * sizeof *taken);
    for (int64_t e = 0; e < experts_of(a); e++)
        *(int64_t *)xp_tensor_at(&a->dropped, e, 0, 0, 0) = 0;
    for (int64_t t = 0, end; t < a->idx.dim[0]; t = end) {
        end = group_end(a, t);
        deal(a, t, end, slot, taken);
    }
    return XP_OK;
}

/* ---- properties ---- */

static int64_t count(const xp_tensor *t, int64_t t0, int64_t t1, int64_t e) {
    int64_t n = 0;
    for (int64_t i = t0; i < t1; i++) {
        for (int64_t k = 0; k < t->dim[1]; k++)
            n += xp_ref_i32(t, i, k) == e;
    }
    return n;
}

/* An expert keeps as many slots as it has, or its capacity if that is less: none is above, and none drops a slot before
 * it is full. 2 for each departure. */
static xp_status keeps_capacity(const void *args, const xp_mesh *m, double *out) {
    const xp_capacity_args *a = args;
    int64_t wrong = 0;
    (void)m;
    for (int64_t t = 0, end; t < a->idx.dim[0]; t = end) {
        end = group_end(a, t);
        const int64_t room = xp_dialect_capacity(a->dialect, end - t, experts_of(a), slots_of(a));
        for (int64_t e = 0; e < experts_of(a); e++) {
            const int64_t n = count(&a->idx, t, end, e);
            wrong += count(&a->kept, t, end, e) != (n < room ? n : room);
        }
    }
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

/* A slot keeps its expert or has none; each expert's dropped slots are those that had it and lost it. */
static xp_status counts_dropped(const void *args, const xp_mesh *m, double *out) {
    const xp_capacity_args *a = args;
    int64_t wrong = 0;
    (void)m;
    for (int64_t t = 0; t < a->idx.dim[0]; t++) {
        for (int64_t k = 0; k < slots_of(a); k++) {
            const int32_t e = xp_ref_i32(&a->idx, t, k), kept = xp_ref_i32(&a->kept, t, k);
            wrong += kept != e && (kept != -1 || e >= experts_of(a));
        }
    }
    for (int64_t e = 0; e < experts_of(a); e++)
        wrong +=
            xp_ref_i64(&a->dropped, e) != count(&a->idx, 0, a->idx.dim[0], e) - count(&a->kept, 0, a->idx.dim[0], e);
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

static const xp_property properties[] = {{"capacity", keeps_capacity}, {"dropped", counts_dropped}};

/* ---- fill ---- */

/* Experts with low numbers are chosen most, some of them twice by a token, and one slot in 16 names nobody. A function
 * of the seed and the token's global number. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    const xp_capacity_args *a = args;
    const uint64_t Z = (uint64_t)(experts_of(a) + a->dialect->null_experts);
    (void)m;
    (void)data;
    for (int64_t t = 0; t < a->idx.dim[0] && Z > 0; t++) {
        for (int64_t k = 0; k < slots_of(a); k++) {
            const int64_t number = (a->token0 + t) * slots_of(a) + k;
            uint64_t h = (seed + 1) * 0x9E3779B97F4A7C15u ^ (uint64_t)(number + 1) * 0xBF58476D1CE4E5B9u;
            h = (h ^ h >> 31) * 0x94D049BB133111EBu;
            h ^= h >> 29;
            const uint64_t one = h % Z, other = h / Z % Z;
            *(int32_t *)xp_tensor_at(&a->idx, t, k, 0, 0) = h >> 60 == 0 ? -1 : (int32_t)(one < other ? one : other);
        }
    }
    return XP_OK;
}

/* ---- stage and row ---- */

const xp_stage xp_stage_capacity = {
    .name = "capacity",
    .meaning = "an expert takes so many slots and no more: which are dropped",
    .axis = XP_LOCAL,
    .args_size = sizeof(xp_capacity_args),
    .operand = operands,
    .operands = sizeof operands / sizeof *operands,
    .param = params,
    .params = sizeof params / sizeof *params,
    .check = check,
    .cost = cost,
    .fill = fill,
    .property = properties,
    .properties = sizeof properties / sizeof *properties,
};

const xp_kernel xp_ref_capacity = {
    .stage = &xp_stage_capacity,
    .name = "sort_and_deal",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
