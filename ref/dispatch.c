/* Stages dispatch and dispatch_bwd: rows travel to the rank of their expert, and their gradients travel back.
 *
 * Counts first, then rows, their scales if they are codes, and their token numbers. The count exchange carries every
 * rank's capacity too, so that a rank whose rows would not fit is known to all ranks before any row moves, and all of
 * them leave together. Contract: xp/dispatch.h. Bits are copied. Must not write a row at recv_offsets[L] (forward) or
 * offsets[E] (backward) or behind it, and must not skip a collective on a rank without rows. */
#include <string.h>

#include "check.h"
#include "move.h"
#include "ref.h"
#include "xp/dispatch.h"

/* ---- dispatch ---- */

#define CODES (XP_DT_FP8 | XP_BIT(XP_E4M3FNUZ) | XP_BIT(XP_E5M2FNUZ))
#define SCALES (XP_BIT(XP_F32) | XP_BIT(XP_E8M0))

static const xp_operand dispatch_operand[] = {
    XP_OPERAND(xp_dispatch_args, rows, "M,H", XP_IN, XP_DT_ACT | CODES, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_dispatch_args, tok, "M", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dispatch_args, counts, "E", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dispatch_args, offsets, "E+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dispatch_args, recv, "C,H", XP_OUT, XP_DT_ACT | CODES, XP_BITS, "act"),
    XP_OPERAND(xp_dispatch_args, recv_tok, "C", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPERAND(xp_dispatch_args, recv_counts, "P,L", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPERAND(xp_dispatch_args, recv_offsets, "L+1", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPTIONAL(xp_dispatch_args, scales, "M,J", XP_IN, SCALES, XP_UNCOMPARED, "scale"),
    XP_OPTIONAL(xp_dispatch_args, recv_scales, "C,J", XP_OUT, SCALES, XP_BITS, "scale"),
};

static const xp_param dispatch_param[] = {
    {"align", NULL, "1", XP_P_INT, offsetof(xp_dispatch_args, align)},
    {"least", NULL, "0", XP_P_I64, offsetof(xp_dispatch_args, least)},
};

static xp_ref_path dispatch_path(const xp_dispatch_args *a) {
    return (xp_ref_path){&a->counts, &a->offsets, &a->recv_counts, &a->recv_offsets};
}

static int has_scales(const xp_dispatch_args *a) {
    return a->scales.data != NULL;
}

static xp_status scales_check(const xp_dispatch_args *a) {
    if (has_scales(a) != (a->recv_scales.data != NULL))
        return XP_FAIL(XP_E_ARG, "dispatch: recv_scales is %s, expected it with scales and only then",
                       has_scales(a) ? "absent" : "present");
    if (has_scales(a) && !(CODES >> a->rows.dtype & 1u))
        return XP_FAIL(XP_E_ARG, "dispatch: rows has dtype %s, expected 8 bits where scales are present",
                       xp_dtype_name(a->rows.dtype));
    return XP_OK;
}

static xp_status dispatch_check(const void *args, const xp_mesh *m) {
    const xp_dispatch_args *a = args;
    const xp_ref_path path = dispatch_path(a);
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_dispatch, args, &d));
    if (a->align != 1 && a->align != 16 && a->align != 128)
        return XP_FAIL(XP_E_ARG, "dispatch: align is %d, expected 1, 16 or 128", a->align);
    if (a->least < 0 || a->least > INT32_MAX)
        return XP_FAIL(XP_E_ARG, "dispatch: least is %lld, expected 0 to %d", (long long)a->least, INT32_MAX);
    XP_TRY(scales_check(a));
    return xp_ref_path_check("dispatch", &path, m->axis[XP_EP], XP_REF_DIM(d, 'M'), -1);
}

static void dispatch_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_dispatch_args *a = args;
    const xp_ref_path p = dispatch_path(a);
    const xp_comm *c = m->axis[XP_EP];
    const double scales = has_scales(a) ? (double)xp_dtype_bytes(a->scales.dtype, a->scales.dim[1]) : 0.0;
    const double row = (double)xp_dtype_bytes(a->rows.dtype, a->rows.dim[1]) + scales + 8.0;
    const double counts = 8.0 * (double)a->counts.dim[0];
    /* received rows are known only after the exchange: as many as sent, the mean over ranks */
    *out = (xp_cost){.flop = 0.0,
                     .mem_bytes = 2.0 * xp_ref_path_rows(&p, 0) * row + 2.0 * counts,
                     .net_bytes = xp_ref_path_remote(&p, c, 0) * row + counts * (c->size - 1) / c->size};
}

/* Row r of the table that the exchange makes: rank r's counts of all E experts, then its capacity C. */
static size_t table_bytes(const xp_dispatch_args *a, int ranks) {
    return (size_t)ranks * (size_t)(a->counts.dim[0] + 1) * sizeof(int64_t);
}

static size_t dispatch_workspace(const void *args, const xp_mesh *m) {
    const xp_dispatch_args *a = args;
    const int ranks = m->axis[XP_EP]->size;
    size_t most = xp_ref_path_ws(&a->rows, &a->recv, ranks);
    const size_t tok = xp_ref_path_ws(&a->tok, &a->recv_tok, ranks);
    const size_t scales = has_scales(a) ? xp_ref_path_ws(&a->scales, &a->recv_scales, ranks) : 0;
    most = tok > most ? tok : most;
    most = scales > most ? scales : most;
    return xp_ref_span(table_bytes(a, ranks)) + xp_ref_span(table_bytes(a, 1)) +
           xp_ref_span((size_t)ranks * sizeof(int64_t)) + most;
}

static xp_status counts_exchange(const xp_exec *x, const xp_dispatch_args *a, int64_t *mine, int64_t *each,
                                 int64_t *table) {
    xp_comm *c = x->mesh->axis[XP_EP];
    const int64_t experts = a->counts.dim[0];
    for (int64_t e = 0; e < experts; e++)
        mine[e] = xp_ref_i64(&a->counts, e);
    mine[experts] = a->recv.dim[0];
    for (int r = 0; r < c->size; r++)
        each[r] = 1;
    const xp_tensor src = xp_tensor_2d(mine, XP_I64, 1, experts + 1);
    xp_tensor dst = xp_tensor_2d(table, XP_I64, c->size, experts + 1);
    return c->ops->all_gather(c, x->q, &src, each, &dst);
}

/* Rows that rank r's experts receive from all ranks, with pads; offsets (when not NULL) gets the L+1 borders. */
static int64_t segments_measure(const xp_dispatch_args *a, const int64_t *table, int64_t r, const xp_tensor *offsets) {
    const int64_t ranks = a->recv_counts.dim[0], local = a->recv_counts.dim[1], width = a->counts.dim[0] + 1;
    int64_t row = 0;
    for (int64_t l = 0; l < local; l++) {
        int64_t n = 0;
        for (int64_t q = 0; q < ranks; q++)
            n += table[q * width + r * local + l];
        if (offsets)
            *(int64_t *)xp_tensor_at(offsets, l, 0, 0, 0) = row;
        row += xp_ref_segment_rows(n, a->least, a->align);
    }
    if (offsets)
        *(int64_t *)xp_tensor_at(offsets, local, 0, 0, 0) = row;
    return row;
}

/* All ranks see the same table, so all leave here or none. */
static xp_status capacities_check(const xp_dispatch_args *a, const xp_comm *c, const int64_t *table) {
    const int64_t width = a->counts.dim[0] + 1;
    int first = -1;
    for (int r = c->size - 1; r >= 0; r--) {
        const int64_t need = segments_measure(a, table, r, NULL), room = table[r * width + width - 1];
        if (need <= room)
            continue;
        if (r == c->rank)
            return XP_FAIL(XP_E_ARG, "dispatch: recv has C = %lld rows, expected at least %lld, which arrive with pads",
                           (long long)room, (long long)need);
        first = r;
    }
    return first < 0 ? XP_OK : XP_FAIL(XP_E_PEER, "dispatch: the rows of ep rank %d do not fit its recv", first);
}

static void counts_store(const xp_dispatch_args *a, const xp_comm *c, const int64_t *table) {
    const int64_t local = a->recv_counts.dim[1], width = a->counts.dim[0] + 1;
    for (int64_t r = 0; r < c->size; r++) {
        for (int64_t l = 0; l < local; l++)
            *(int64_t *)xp_tensor_at(&a->recv_counts, r, l, 0, 0) = table[r * width + c->rank * local + l];
    }
    segments_measure(a, table, c->rank, &a->recv_offsets);
}

static xp_status dispatch_run(const xp_exec *x, const void *args) {
    const xp_dispatch_args *a = args;
    const xp_comm *c = x->mesh->axis[XP_EP];
    const xp_ref_path path = dispatch_path(a);
    char *at = x->ws;
    int64_t *table = xp_ref_carve(&at, table_bytes(a, c->size));
    int64_t *mine = xp_ref_carve(&at, table_bytes(a, 1));
    int64_t *each = xp_ref_carve(&at, (size_t)c->size * sizeof *each);
    XP_TRY(counts_exchange(x, a, mine, each, table));
    XP_TRY(capacities_check(a, c, table));
    counts_store(a, c, table);
    XP_TRY(xp_ref_path_away(x, &path, &a->rows, &a->recv, 0, at));
    if (has_scales(a))
        XP_TRY(xp_ref_path_away(x, &path, &a->scales, &a->recv_scales, 0, at));
    return xp_ref_path_away(x, &path, &a->tok, &a->recv_tok, 0xFF, at); /* -1 in every pad */
}

/* Segments start at multiples of align, one behind the other, and their pads have token -1. 2 for each departure. */
static xp_status dispatch_segments(const void *args, const xp_mesh *m, double *out) {
    const xp_dispatch_args *a = args;
    int64_t row = 0, wrong = 0;
    (void)m;
    for (int64_t l = 0; l < a->recv_counts.dim[1]; l++) {
        int64_t n = 0;
        for (int64_t r = 0; r < a->recv_counts.dim[0]; r++)
            n += xp_ref_i64_2d(&a->recv_counts, r, l);
        const int64_t end = row + xp_ref_segment_rows(n, a->least, a->align);
        wrong += xp_ref_i64(&a->recv_offsets, l) != row || end > a->recv_tok.dim[0];
        for (int64_t i = row; i < end && i < a->recv_tok.dim[0]; i++)
            wrong += (xp_ref_i64(&a->recv_tok, i) == -1) != (i >= row + n);
        row = end;
    }
    wrong += xp_ref_i64(&a->recv_offsets, a->recv_counts.dim[1]) != row;
    *out = 2.0 * (double)wrong;
    return XP_OK;
}

static xp_status dispatch_rows_conserved(const void *args, const xp_mesh *m, double *out) {
    const xp_dispatch_args *a = args;
    const xp_ref_path p = dispatch_path(a);
    return xp_ref_path_conserved(&p, m->axis[XP_EP], &a->rows, &a->recv, out);
}

static xp_status dispatch_tok_conserved(const void *args, const xp_mesh *m, double *out) {
    const xp_dispatch_args *a = args;
    const xp_ref_path p = dispatch_path(a);
    return xp_ref_path_conserved(&p, m->axis[XP_EP], &a->tok, &a->recv_tok, out);
}

static xp_status dispatch_scales_conserved(const void *args, const xp_mesh *m, double *out) {
    const xp_dispatch_args *a = args;
    const xp_ref_path p = dispatch_path(a);
    *out = 0.0;
    return has_scales(a) ? xp_ref_path_conserved(&p, m->axis[XP_EP], &a->scales, &a->recv_scales, out) : XP_OK;
}

static const xp_property dispatch_property[] = {{"segments", dispatch_segments},
                                                {"rows_conserved", dispatch_rows_conserved},
                                                {"tok_conserved", dispatch_tok_conserved},
                                                {"scales_conserved", dispatch_scales_conserved}};

const xp_stage xp_stage_dispatch = {
    .name = "dispatch",
    .meaning = "rows and their token numbers to the ranks of their experts: all-to-all-v over ep",
    .axis = XP_EP,
    .args_size = sizeof(xp_dispatch_args),
    .operand = dispatch_operand,
    .operands = sizeof dispatch_operand / sizeof *dispatch_operand,
    .param = dispatch_param,
    .params = sizeof dispatch_param / sizeof *dispatch_param,
    .check = dispatch_check,
    .cost = dispatch_cost,
    .chain = "layer",
    .property = dispatch_property,
    .properties = sizeof dispatch_property / sizeof *dispatch_property,
};

const xp_kernel xp_ref_dispatch = {
    .stage = &xp_stage_dispatch,
    .name = "count_pack_exchange",
    .det = XP_DET_RUN,
    .workspace = dispatch_workspace,
    .run = dispatch_run,
};

/* ---- dispatch_bwd ---- */

static const xp_operand dispatch_bwd_operand[] = {
    XP_OPERAND(xp_dispatch_bwd_args, drecv, "C,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(xp_dispatch_bwd_args, recv_counts, "P,L", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dispatch_bwd_args, recv_offsets, "L+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dispatch_bwd_args, counts, "E", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dispatch_bwd_args, offsets, "E+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_dispatch_bwd_args, drows, "M,H", XP_OUT, XP_DT_ACT, XP_BITS, "act"),
};

static xp_ref_path dispatch_bwd_path(const xp_dispatch_bwd_args *a) {
    return (xp_ref_path){&a->counts, &a->offsets, &a->recv_counts, &a->recv_offsets};
}

static xp_status dispatch_bwd_check(const void *args, const xp_mesh *m) {
    const xp_dispatch_bwd_args *a = args;
    const xp_ref_path path = dispatch_bwd_path(a);
    xp_ref_dims d;
    XP_TRY(xp_ref_check(&xp_stage_dispatch_bwd, args, &d));
    return xp_ref_path_check("dispatch_bwd", &path, m->axis[XP_EP], XP_REF_DIM(d, 'M'), XP_REF_DIM(d, 'C'));
}

static void dispatch_bwd_cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_dispatch_bwd_args *a = args;
    const xp_ref_path p = dispatch_bwd_path(a);
    const double row = (double)xp_dtype_bytes(a->drecv.dtype, a->drecv.dim[1]);
    *out = (xp_cost){.flop = 0.0,
                     .mem_bytes =
                         (xp_ref_path_rows(&p, 0) + xp_ref_path_rows(&p, 1)) * row + 32.0 * (double)a->counts.dim[0],
                     .net_bytes = xp_ref_path_remote(&p, m->axis[XP_EP], 1) * row};
}

static size_t dispatch_bwd_workspace(const void *args, const xp_mesh *m) {
    const xp_dispatch_bwd_args *a = args;
    return xp_ref_path_ws(&a->drows, &a->drecv, m->axis[XP_EP]->size);
}

static xp_status dispatch_bwd_run(const xp_exec *x, const void *args) {
    const xp_dispatch_bwd_args *a = args;
    const xp_ref_path path = dispatch_bwd_path(a);
    return xp_ref_path_home(x, &path, &a->drecv, &a->drows, 0, x->ws);
}

static xp_status dispatch_bwd_conserved(const void *args, const xp_mesh *m, double *out) {
    const xp_dispatch_bwd_args *a = args;
    const xp_ref_path p = dispatch_bwd_path(a);
    return xp_ref_path_conserved(&p, m->axis[XP_EP], &a->drows, &a->drecv, out);
}

static const xp_property dispatch_bwd_property[] = {{"rows_conserved", dispatch_bwd_conserved}};

const xp_stage xp_stage_dispatch_bwd = {
    .name = "dispatch_bwd",
    .meaning = "gradients of dispatched rows back to where the rows came from",
    .axis = XP_EP,
    .args_size = sizeof(xp_dispatch_bwd_args),
    .operand = dispatch_bwd_operand,
    .operands = sizeof dispatch_bwd_operand / sizeof *dispatch_bwd_operand,
    .check = dispatch_bwd_check,
    .cost = dispatch_bwd_cost,
    .chain = "layer",
    .property = dispatch_bwd_property,
    .properties = sizeof dispatch_bwd_property / sizeof *dispatch_bwd_property,
};

const xp_kernel xp_ref_dispatch_bwd = {
    .stage = &xp_stage_dispatch_bwd,
    .name = "pack_exchange",
    .det = XP_DET_RUN,
    .workspace = dispatch_bwd_workspace,
    .run = dispatch_bwd_run,
};
