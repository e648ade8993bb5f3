/* Stage gather: FSDP's all-gather of one unevenly sharded parameter, cast to the compute dtype before it travels.
 *
 * One collective a group (an expert, or the whole of a dense parameter), so that the workspace holds one group and not
 * the parameter. Contract: xp/gather.h. Each element is rounded once, from the master copy, whether or not its rank is
 * alone on the axis. Must not skip a collective on a rank without rows. */
#include <string.h>

#include "check.h"
#include "move.h"
#include "num.h"
#include "ref.h"
#include "xp/gather.h"

static const xp_operand gather_operand[] = {
    XP_OPERAND(xp_gather_args, shard, "G,R,N", XP_IN, XP_DT_WIDE, XP_UNCOMPARED, "wide"),
    XP_OPERAND(xp_gather_args, full, "G,R0,N", XP_OUT, XP_DT_ACT, XP_BITS, "param"),
};

static const xp_param gather_param[] = {
    {"axis", "dp|fsdp|ep|ep_fsdp|ep_dp|edp|world", "fsdp", XP_P_WORD, offsetof(xp_gather_args, axis)},
};

static xp_status ranges_check(const xp_gather_args *a, const xp_comm *c, int64_t rows0) {
    int64_t next = 0;
    for (int r = 0; r < c->size; r++) {
        if (a->rows[r] < 0)
            return XP_FAIL(XP_E_ARG, "gather: rows[%d] is %lld, expected >= 0", r, (long long)a->rows[r]);
        if (a->rows[r] > 0 && a->start[r] != next)
            return XP_FAIL(XP_E_ARG, "gather: start[%d] is %lld, expected %lld, where the ranks before it end", r,
                           (long long)a->start[r], (long long)next);
        next += a->rows[r];
    }
    if (next != rows0)
        return XP_FAIL(XP_E_ARG, "gather: full dim 1 is %lld, expected %lld, the sum of rows", (long long)rows0,
                       (long long)next);
    return XP_OK;
}

static xp_status gather_check(const void *args, const xp_mesh *m) {
    const xp_gather_args *a = args;
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_gather, args, &d));
    if (a->axis < 0 || a->axis >= XP_NAXIS)
        return XP_FAIL(XP_E_ARG, "gather: axis is %d, expected an axis of the mesh (0 to %d)", (int)a->axis,
                       XP_NAXIS - 1);
    const xp_comm *c = m->axis[a->axis];
    if (!a->start || !a->rows)
        return XP_FAIL(XP_E_ARG, "gather: %s is absent, expected %d row numbers", a->start ? "rows" : "start", c->size);
    XP_TRY(ranges_check(a, c, d.r0));
    if (XP_REF_DIM(d, 'R') != a->rows[c->rank])
        return XP_FAIL(XP_E_ARG, "gather: shard dim 1 is %lld, expected rows[%d] = %lld", (long long)XP_REF_DIM(d, 'R'),
                       c->rank, (long long)a->rows[c->rank]);
    return XP_OK;
}

static void gather_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_gather_args *a = args;
    const double own = (double)(a->shard.dim[0] * a->shard.dim[1] * a->shard.dim[2]);
    const double all = (double)(a->full.dim[0] * a->full.dim[1] * a->full.dim[2]);
    const double each = (double)xp_dtype_bytes(a->full.dtype, 1);
    *out = (xp_cost){.flop = 0.0,
                     .mem_bytes = own * (double)xp_dtype_bytes(a->shard.dtype, 1) + all * each,
                     .net_bytes = own * each * (m->axis[a->axis]->size - 1)};
}

/* One group: this rank's rows cast, every rank's rows, and one row widened. */
static size_t gather_workspace(const void *args, const xp_mesh *m) {
    const xp_gather_args *a = args;
    (void)m;
    return xp_ref_span((size_t)a->full.dim[2] * sizeof(double)) +
           xp_ref_span(xp_dtype_bytes(a->full.dtype, a->shard.dim[1] * a->full.dim[2])) +
           xp_ref_span(xp_dtype_bytes(a->full.dtype, a->full.dim[1] * a->full.dim[2]));
}

static char *row_of(void *rows, xp_dtype d, int64_t r, int64_t columns) {
    return (char *)rows + xp_dtype_bytes(d, r * columns);
}

static void group_cast(const xp_gather_args *a, int64_t g, double *wide, void *sent) {
    const int64_t columns = a->full.dim[2];
    for (int64_t r = 0; r < a->shard.dim[1]; r++) {
        xp_widen_row(xp_tensor_at(&a->shard, g, r, 0, 0), a->shard.dtype, 0, columns, wide);
        xp_ref_store_row(row_of(sent, a->full.dtype, r, columns), a->full.dtype, 0, columns, wide);
    }
}

static xp_status gather_run(const xp_exec *x, const void *args) {
    const xp_gather_args *a = args;
    xp_comm *c = x->mesh->axis[a->axis];
    const int64_t rows = a->shard.dim[1], rows0 = a->full.dim[1], columns = a->full.dim[2];
    char *at = x->ws;
    double *wide = xp_ref_carve(&at, (size_t)columns * sizeof *wide);
    void *sent = xp_ref_carve(&at, xp_dtype_bytes(a->full.dtype, rows * columns));
    void *got = at;
    const xp_tensor src = xp_tensor_2d(sent, a->full.dtype, rows, columns);
    xp_tensor dst = xp_tensor_2d(got, a->full.dtype, rows0, columns);
    for (int64_t g = 0; g < a->full.dim[0]; g++) {
        if (columns > 0)
            group_cast(a, g, wide, sent);
        XP_TRY(c->ops->all_gather(c, x->q, &src, a->rows, &dst));
        for (int64_t r = 0; r < rows0 && columns > 0; r++)
            memcpy(xp_tensor_at(&a->full, g, r, 0, 0), row_of(got, a->full.dtype, r, columns),
                   xp_dtype_bytes(a->full.dtype, columns));
    }
    return XP_OK;
}

/* This rank's own rows of `full` are its shard, rounded once. 2 for each element that is not (NaN is like NaN). */
static xp_status gather_own_rows(const void *args, const xp_mesh *m, double *out) {
    const xp_gather_args *a = args;
    const int64_t start = a->start[m->axis[a->axis]->rank];
    int64_t wrong = 0;
    for (int64_t g = 0; g < a->shard.dim[0]; g++) {
        for (int64_t r = 0; r < a->shard.dim[1]; r++) {
            for (int64_t n = 0; n < a->shard.dim[2]; n++) {
                const double want =
                    xp_ref_round(xp_widen(xp_tensor_at(&a->shard, g, r, n, 0), a->shard.dtype, 0), a->full.dtype);
                const double got = xp_widen(xp_tensor_at(&a->full, g, start + r, n, 0), a->full.dtype, 0);
                wrong += !(got == want || (got != got && want != want));
            }
        }
    }
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

static const xp_property gather_property[] = {{"own_rows", gather_own_rows}};

const xp_stage xp_stage_gather = {
    .name = "gather",
    .meaning = "a sharded parameter cast to the compute dtype and all-gathered",
    .axis = XP_WORLD,
    .args_size = sizeof(xp_gather_args),
    .operand = gather_operand,
    .operands = sizeof gather_operand / sizeof *gather_operand,
    .param = gather_param,
    .params = sizeof gather_param / sizeof *gather_param,
    .check = gather_check,
    .cost = gather_cost,
    .property = gather_property,
    .properties = sizeof gather_property / sizeof *gather_property,
};

const xp_kernel xp_ref_gather = {
    .stage = &xp_stage_gather,
    .name = "cast_gather",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = gather_workspace,
    .run = gather_run,
};
