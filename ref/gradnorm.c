/* Stage gradnorm: the p-norm of the logical gradient, rounded once.
 *
 * Contract: with G the logical gradient, every element of every parameter once, holding the gradient of the one global
 * loss, norm = RN32((sum |g|^p)^(1/p)) for p = 1 and 2, max |g| for p = infinity; of an empty gradient 0. The result is
 * a function of G alone: the same bits on every rank, for every mesh, order and placement.
 *   - A segment with owner 0 is a replica that another rank counts: it adds nothing. One owner for each replica set.
 *   - A rank with no elements, or with no segments of its own, joins the reduction all the same.
 *   - A NaN anywhere makes the norm NaN on every rank, else an infinity makes it +inf. Both travel as counts: a maximum
 *     of float values would drop the NaN (NCCL's does).
 *   - A finite gradient whose norm is beyond f32 gives +inf by rounding; 4 x 1e20 gives 2e20 and 4 x 1e-30 gives 2e-30,
 *     where f32 squares would overflow or vanish.
 * Sums are integers (multiples of 2^-149 or 2^-298 in windows of 32 bits), added over the world as u64 words, so no
 * order of addition can show. Must not round anywhere but at the end.
 * Source: meaning as torch.nn.utils.get_total_norm of the full gradient; Neal 2015 for exact sums in windows. */
#include "xp/gradnorm.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "check.h"
#include "flat.h"
#include "num.h"
#include "ref.h"

static const xp_operand operands[] = {
    XP_OPERAND(xp_gradnorm_args, grad, "N", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_gradnorm_args, seg, "Q+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_gradnorm_args, owner, "Q", XP_IN, XP_BIT(XP_U8), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_gradnorm_args, norm, "1", XP_OUT, XP_BIT(XP_F32), XP_BITS, ""),
};

static const xp_param params[] = {
    {"p", NULL, "2", XP_P_F64, offsetof(xp_gradnorm_args, p)},
};

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_gradnorm_args *a = args;
    xp_ref_dims dims;
    (void)m;
    XP_TRY(xp_ref_check(&xp_stage_gradnorm, args, &dims));
    if (a->p != 1.0 && a->p != 2.0 && a->p != (double)INFINITY)
        return XP_FAIL(XP_E_ARG, "gradnorm: p is %g, expected 1, 2 or inf", a->p);
    return xp_ref_flat_check("gradnorm", &a->seg, &a->owner, "owner", a->grad.dim[0]);
}

/* Reads the gradient once; a ring would move the words twice. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_gradnorm_args *a = args;
    const double n = (double)a->grad.dim[0], ranks = (double)m->axis[XP_WORLD]->size;
    *out = (xp_cost){
        .flop = (a->p == 2.0 ? 2.0 : 1.0) * n,
        .mem_bytes = 4.0 * n + 9.0 * (double)a->owner.dim[0] + 8.0 + 4.0,
        .net_bytes = 2.0 * (ranks - 1.0) / ranks * (double)sizeof(xp_ref_exact),
    };
}

/* Every third segment is a replica over dp, every third one over ep_dp: counted where that coordinate is 0. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    xp_gradnorm_args *a = args;
    uint8_t *owner = a->owner.data;
    (void)data;
    xp_ref_flat_borders(&a->seg, a->grad.dim[0], seed);
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        const int replica = q % 3 == 1 ? m->axis[XP_DP]->rank : q % 3 == 2 ? m->axis[XP_EP_DP]->rank : 0;
        owner[q] = replica == 0;
    }
    return XP_OK;
}

static xp_ref_power power_of(double p) {
    return p == 1.0 ? XP_REF_ABS : p == 2.0 ? XP_REF_SQUARE : XP_REF_TOP;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_gradnorm_args *a = args;
    const xp_ref_power p = power_of(a->p);
    const int64_t *seg = a->seg.data;
    const uint8_t *owner = a->owner.data;
    xp_comm *world = x->mesh->axis[XP_WORLD];
    xp_ref_exact sum;
    xp_ref_exact_clear(&sum);
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        if (owner[q])
            xp_ref_exact_add(&sum, p, a->grad.data, XP_F32, seg[q], seg[q + 1] - seg[q]);
    }
    uint64_t word[XP_REF_EXACT_WORDS];
    static_assert(sizeof word == sizeof sum, "the sum is nothing but u64 words");
    memcpy(word, &sum, sizeof word);
    xp_tensor t = xp_tensor_1d(word, XP_U64, XP_REF_EXACT_WORDS);
    XP_TRY(world->ops->all_reduce(world, x->q, &t, p == XP_REF_TOP ? XP_MAX : XP_SUM));
    memcpy(&sum, word, sizeof sum);
    xp_ref_exact_carry(&sum);
    *(float *)a->norm.data = xp_ref_exact_norm(&sum, p);
    return XP_OK;
}

/* The norm is at least every magnitude that this rank counts: rounding is monotone, so this holds without a tolerance.
 */
static xp_status dominates(const void *args, const xp_mesh *m, double *out) {
    const xp_gradnorm_args *a = args;
    const float *g = a->grad.data;
    const double norm = (double)*(const float *)a->norm.data;
    (void)m;
    *out = 0.0;
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        for (int64_t i = ((const int64_t *)a->seg.data)[q]; i < ((const int64_t *)a->seg.data)[q + 1]; i++) {
            const int holds = norm >= fabs((double)g[i]) || norm != norm; /* a NaN element asks for a NaN norm */
            if (((const uint8_t *)a->owner.data)[q] && !holds)
                *out = (double)INFINITY;
        }
    }
    return XP_OK;
}

static const xp_property properties[] = {{"dominates", dominates}};

const xp_stage xp_stage_gradnorm = {
    .name = "gradnorm",
    .meaning = "correctly rounded norm of the logical gradient, each element counted once, NaN never dropped",
    .axis = XP_WORLD,
    .args_size = sizeof(xp_gradnorm_args),
    .operand = operands,
    .operands = sizeof operands / sizeof operands[0],
    .param = params,
    .params = sizeof params / sizeof params[0],
    .check = check,
    .cost = cost,
    .fill = fill,
    .property = properties,
    .properties = sizeof properties / sizeof properties[0],
};

const xp_kernel xp_ref_gradnorm = {
    .stage = &xp_stage_gradnorm,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .run = run,
};
