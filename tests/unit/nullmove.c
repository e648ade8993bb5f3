/* permute, combine and residual where a dialect does more than move and add rows: slots without a row, null experts,
 * weights on the experts' input, the four ways to accumulate, factors of the output.
 *
 * Results are worked out by hand where a rounding decides; gradients are slopes of the forward in f64; and the two
 * formulations, which share no code, are held against each other, each mode also against arithmetic that rounds less.
 */
#include <math.h>

#include "dense/dense.h"
#include "ref.h"
#include "unit/slope.h"
#include "unit/stage_suite.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/permute.h"
#include "xp/residual.h"

/* ---- a layer of one rank or many ---- */

typedef struct {
    const xp_kernel *permute, *dispatch, *combine, *combine_bwd, *dispatch_bwd, *permute_bwd;
} rows_of;
static const rows_of REF = {&xp_ref_permute,     &xp_ref_dispatch,     &xp_ref_combine,
                            &xp_ref_combine_bwd, &xp_ref_dispatch_bwd, &xp_ref_permute_bwd};
static const rows_of DENSE = {&xp_dense_permute,     &xp_dense_dispatch,     &xp_dense_combine,
                              &xp_dense_combine_bwd, &xp_dense_dispatch_bwd, &xp_dense_permute_bwd};

typedef struct {
    xp_dialect dialect;
    const xp_mesh *m;
    xp_permute_args p;
    xp_dispatch_args s;
    xp_combine_args c;
    xp_combine_bwd_args cb;
    xp_dispatch_bwd_args sb;
    xp_permute_bwd_args pb;
} layer;

typedef struct {
    int64_t T, K, E, H;
    xp_dtype act, weight;
    int align;
} sizes;

static int identity(const xp_dialect *d) {
    return d->null_experts > 0 && d->null_kind == XP_NULL_IDENTITY;
}

/* Tensors of all stages; idx, x, w and dy are the caller's to fill. */
static void layer_open(layer *v, const sizes *z, const xp_dialect *d, const xp_mesh *m) {
    const int64_t P = m->axis[XP_EP]->size, L = z->E / P, M = z->T * z->K + z->E * (z->align - 1) + 1;
    const int64_t C = P * z->T * z->K + L * (z->align - 1) + 1;
    const xp_dtype wide = z->act == XP_F64 ? XP_F64 : XP_F32;
    memset(v, 0, sizeof *v);
    v->dialect = *d;
    v->m = m;
    v->p = (xp_permute_args){.x = matrix(z->act, z->T, z->H),
                             .idx = matrix(XP_I32, z->T, z->K),
                             .rows = matrix(z->act, M, z->H),
                             .tok = vector(XP_I64, M),
                             .src = vector(XP_I32, M),
                             .pos = matrix(XP_I32, z->T, z->K),
                             .counts = vector(XP_I64, z->E),
                             .offsets = vector(XP_I64, z->E + 1),
                             .align = z->align,
                             .dialect = &v->dialect};
    v->s = (xp_dispatch_args){.rows = v->p.rows,
                              .tok = v->p.tok,
                              .counts = v->p.counts,
                              .offsets = v->p.offsets,
                              .recv = matrix(z->act, C, z->H),
                              .recv_tok = vector(XP_I64, C),
                              .recv_counts = matrix(XP_I64, P, L),
                              .recv_offsets = vector(XP_I64, L + 1),
                              .align = z->align};
    v->c = (xp_combine_args){.out = matrix(z->act, C, z->H),
                             .recv_counts = v->s.recv_counts,
                             .recv_offsets = v->s.recv_offsets,
                             .counts = v->p.counts,
                             .offsets = v->p.offsets,
                             .pos = v->p.pos,
                             .idx = v->p.idx,
                             .w = matrix(z->weight, z->T, z->K),
                             .back = matrix(z->act, M, z->H),
                             .y = matrix(z->act, z->T, z->H),
                             .dialect = &v->dialect};
    v->cb = (xp_combine_bwd_args){.dy = matrix(z->act, z->T, z->H),
                                  .back = v->c.back,
                                  .w = v->c.w,
                                  .pos = v->p.pos,
                                  .counts = v->p.counts,
                                  .offsets = v->p.offsets,
                                  .recv_counts = v->s.recv_counts,
                                  .recv_offsets = v->s.recv_offsets,
                                  .dw = matrix(wide, z->T, z->K),
                                  .dout = matrix(z->act, C, z->H),
                                  .dialect = &v->dialect};
    v->sb = (xp_dispatch_bwd_args){.drecv = matrix(z->act, C, z->H),
                                   .recv_counts = v->s.recv_counts,
                                   .recv_offsets = v->s.recv_offsets,
                                   .counts = v->p.counts,
                                   .offsets = v->p.offsets,
                                   .drows = matrix(z->act, M, z->H)};
    v->pb = (xp_permute_bwd_args){
        .drows = v->sb.drows, .pos = v->p.pos, .dx = matrix(z->act, z->T, z->H), .dialect = &v->dialect};
    if (identity(d)) {
        v->c.x = v->cb.x = v->p.x;
        v->cb.idx = v->p.idx;
        v->cb.dx = matrix(z->act, z->T, z->H);
    }
    if (d->weight_at == XP_AT_INPUT) {
        v->p.w = v->pb.w = v->c.w;
        v->pb.x = v->p.x;
        v->pb.dw = matrix(wide, z->T, z->K);
    }
}

/* Expert l of this rank multiplies its rows, or their gradients, by 1.5 - l/4. */
static void experts(const layer *v, const xp_tensor *in, const xp_tensor *out) {
    for (int64_t l = 0; l < v->s.recv_counts.dim[1]; l++) {
        for (int64_t i = get_i64(&v->s.recv_offsets, l); i < get_i64(&v->s.recv_offsets, l + 1); i++) {
            for (int64_t h = 0; h < out->dim[1]; h++)
                set(out, i, h, (1.5 - 0.25 * (double)l) * get(in, i, h));
        }
    }
}

static xp_status layer_forward(layer *v, const rows_of *k) {
    XP_TRY(run_kernel(k->permute, v->m, &v->p));
    XP_TRY(properties_hold(&xp_stage_permute, v->m, &v->p));
    XP_TRY(run_kernel(k->dispatch, v->m, &v->s));
    XP_TRY(properties_hold(&xp_stage_dispatch, v->m, &v->s));
    experts(v, &v->s.recv, &v->c.out);
    XP_TRY(run_kernel(k->combine, v->m, &v->c));
    return properties_hold(&xp_stage_combine, v->m, &v->c);
}

static xp_status layer_backward(layer *v, const rows_of *k) {
    XP_TRY(run_kernel(k->combine_bwd, v->m, &v->cb));
    experts(v, &v->cb.dout, &v->sb.drecv);
    XP_TRY(run_kernel(k->dispatch_bwd, v->m, &v->sb));
    return run_kernel(k->permute_bwd, v->m, &v->pb);
}

/* ---- a world of one, in this thread ---- */

static xp_status own_gather(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst) {
    (void)c;
    (void)q;
    (void)rows;
    memcpy(dst->data, src->data, xp_dtype_bytes(src->dtype, xp_tensor_count(src)));
    return XP_OK;
}
static xp_status own_exchange(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *send, xp_tensor *dst,
                              const int64_t *recv) {
    MUST(send[0] == recv[0] && src->dim[0] == send[0], "%d rows leave, %d arrive", (int)send[0], (int)recv[0]);
    return own_gather(c, q, src, send, dst);
}
static xp_status own_reduce(xp_comm *c, xp_queue *q, xp_tensor *t, xp_redop op) {
    (void)c;
    (void)q;
    (void)t;
    (void)op;
    return XP_OK;
}
static const xp_mesh *own_mesh(void) {
    static const xp_mesh_ops ops = {.abi = XP_ABI,
                                    .size = sizeof(xp_mesh_ops),
                                    .name = "own",
                                    .all_gather = own_gather,
                                    .all_reduce = own_reduce,
                                    .all_to_all_v = own_exchange};
    static xp_comm c = {&ops, 0, 1, NULL};
    static xp_mesh m;
    for (int i = 0; i < XP_NAXIS; i++)
        m.axis[i] = &c;
    return &m;
}

static void ok(xp_status st) {
    if (st != XP_OK)
        fail_msg("%s: %s", xp_status_name(st), xp_error_text());
}

/* ---- modes of the sum, by hand ---- */

/* One token of one column. idx names expert and null ids; out[k] is what comes back for slot k, w its weight. */
typedef struct {
    int K, E;
    int32_t idx[4];
    double w[4], out[4], x;
} token;

static layer token_open(const token *t, const xp_dialect *d, xp_dtype act) {
    layer v;
    const sizes z = {1, t->K, t->E, 1, act, act == XP_F64 ? XP_F64 : XP_F32, 1};
    layer_open(&v, &z, d, own_mesh());
    v.p.dialect = v.c.dialect = v.cb.dialect = v.pb.dialect = d;
    for (int k = 0; k < t->K; k++) {
        set(&v.p.idx, 0, k, t->idx[k]);
        set(&v.c.w, 0, k, t->w[k]);
    }
    set(&v.p.x, 0, 0, t->x);
    set(&v.cb.dy, 0, 0, 2.0);
    return v;
}

static double token_sum(const token *t, const xp_dialect *d, const rows_of *rows, xp_dtype act, xp_dtype y) {
    layer v = token_open(t, d, act);
    ok(run_kernel(rows->permute, v.m, &v.p));
    ok(run_kernel(rows->dispatch, v.m, &v.s));
    for (int k = 0; k < t->K; k++) {
        if (get_i32(&v.p.pos, 0, k) >= 0)
            set(&v.c.out, get_i32(&v.p.pos, 0, k), 0, t->out[k]);
    }
    ok(xp_stage_combine.check(&v.c, v.m));
    v.c.y = matrix(y, 1, 1);
    ok(run_unchecked(rows->combine, v.m, &v.c));
    const double got = get(&v.c.y, 0, 0);
    ok(pool_close());
    return got;
}

static void expect_sum(const token *t, const xp_dialect *d, xp_dtype act, xp_dtype y, double want) {
    const double ref = token_sum(t, d, &REF, act, y), dense = token_sum(t, d, &DENSE, act, y);
    if (ref != want || dense != want)
        fail_msg("accumulate %d: ref %.17g, dense %.17g, expected %.17g", (int)d->accumulate, ref, dense, want);
}

static xp_dialect mode(xp_accumulate how) {
    return (xp_dialect){.name = "test", .scale = 1.0, .accumulate = how};
}

/* p = (1 + 2^-7)^2 = 1 + 2^-6 + 2^-14 at expert 2, then 2^18, -2^18 and 2^-8 at experts 0, 5 and 3. The sum is
 * 1 + 2^-6 + 2^-8 + 2^-14: just above the middle of two bf16 numbers, r(p) + 2^-8 is the middle and goes down. In f32
 * 2^18 + p has steps of 2^-5 and becomes 2^18 + 1 + 2^-5, and 2^-8 is lost; in bf16 2^18 has steps of 2^11. */
static void sums_by_hand(void **state) {
    const double most = 0x1p18, near1 = 1.0 + 0x1p-7;
    const token t = {4, 7, {2, 0, 5, 3}, {near1, 1, 1, 1}, {near1, most, -most, 0x1p-8}, 0};
    static const double bf16[4] = {1.0 + 3 * 0x1p-7, 0.0, 1.0 + 4 * 0x1p-7, 1.0 + 2 * 0x1p-7};
    static const double wide[4] = {1.0 + 0x1p-6 + 0x1p-8 + 0x1p-14, 0.0, 1.0 + 0x1p-5, 1.0 + 0x1p-6 + 0x1p-8};
    (void)state;
    for (int how = 0; how < 4; how++) {
        const xp_dialect d = mode((xp_accumulate)how);
        expect_sum(&t, &d, XP_BF16, XP_BF16, bf16[how]);
        expect_sum(&t, &d, XP_BF16, XP_F64, wide[how]);
        /* f64 has room for all of it, in any mode */
        expect_sum(&t, &d, XP_F64, XP_F64, wide[0]);
    }
}

/* A product is a number of f32 before it is one of bf16: w is the f32 number above (1 + 2^-8) / (1 + 2^-7), the product
 * lies above the middle of 1 and 1 + 2^-7 by less than half a step of f32, and so goes to the middle, then down. */
static double tie_weight(void) {
    double w = (double)(float)((1.0 + 0x1p-8) / (1.0 + 0x1p-7));
    if (w * (1.0 + 0x1p-7) <= 1.0 + 0x1p-8)
        w += 0x1p-24;
    assert_true(w * (1.0 + 0x1p-7) > 1.0 + 0x1p-8 && w * (1.0 + 0x1p-7) < 1.0 + 0x1p-8 + 0x1p-24);
    return w;
}

static void products_by_hand(void **state) {
    const double w = tie_weight(), v = 1.0 + 0x1p-7;
    const token t = {1, 1, {0}, {w}, {v}, 0};
    (void)state;
    for (int how = 0; how < 4; how++) {
        const xp_dialect d = mode((xp_accumulate)how);
        expect_sum(&t, &d, XP_BF16, XP_BF16, how == XP_ACC_SLOTS_F32 ? v : 1.0);
    }
    /* the same number as a factor of the output, where every mode has the product last */
    const token one = {1, 1, {0}, {1}, {v}, 0};
    for (int how = 0; how < 4; how++) {
        xp_dialect d = mode((xp_accumulate)how);
        d.scale_at = XP_SCALE_OUTPUT;
        d.scale = w;
        expect_sum(&one, &d, XP_BF16, XP_BF16, 1.0);
        /* a factor is a number of f32: what f32 cannot tell from 1 is none */
        d.scale = 1.0 + 0x1p-30;
        expect_sum(&one, &d, XP_BF16, XP_F64, v);
        expect_sum(&one, &d, XP_F64, XP_F64, v * d.scale);
        /* of the weights it is no business of combine's */
        d.scale_at = XP_SCALE_WEIGHT;
        d.scale = 7.0;
        expect_sum(&one, &d, XP_BF16, XP_BF16, v);
    }
}

/* ids 2 and 3 are null; slot 1 is dropped. x is 1, so p is 1 (id 3), nothing, 1 (expert 0), 256 (id 2). Experts
 * ascending bf16 meets 1 + 256, a tie down to 256, then 256 + 1 again; slot by slot 1 + 1 + 256 would be 258. */
static void null_experts_by_hand(void **state) {
    const token t = {4, 2, {3, -1, 0, 2}, {1, 77, 1, 256}, {0, 0, 1, 0}, 1};
    static const double added[4] = {258, 256, 258, 258}, tripled[4] = {776, 768, 776, 776};
    (void)state;
    for (int how = 0; how < 4; how++) {
        xp_dialect d = mode((xp_accumulate)how);
        d.null_experts = 2;
        d.null_kind = XP_NULL_SKIP;
        expect_sum(&t, &d, XP_BF16, XP_BF16, 1);
        d.null_kind = XP_NULL_IDENTITY;
        expect_sum(&t, &d, XP_BF16, XP_BF16, added[how]);
        d.scale_at = XP_SCALE_OUTPUT;
        d.scale = 3.0; /* of r(y): 774 is a tie up to 776, but 3 * 258 unrounded and 3 * 256 are far from one */
        expect_sum(&t, &d, XP_BF16, XP_BF16, tripled[how]);
    }
    /* 257 = 1 + 256 rounds down before the factor, 771 without that up to 772 */
    const token odd = {2, 2, {0, 2}, {1, 256}, {1, 0}, 1};
    xp_dialect d = mode(XP_ACC_SLOTS_F32);
    d.null_experts = 1;
    d.scale_at = XP_SCALE_OUTPUT;
    d.scale = 3.0;
    expect_sum(&odd, &d, XP_BF16, XP_BF16, 768);
    expect_sum(&odd, &d, XP_BF16, XP_F64, 768);
}

/* A slot without a row that names an expert (dropped by a capacity) adds nothing, and nothing at all is 0. */
static void dropped_by_hand(void **state) {
    const token none = {3, 2, {-1, -1, -1}, {5, 5, 5}, {0, 0, 0}, 3};
    (void)state;
    for (int how = 0; how < 4; how++) {
        const xp_dialect d = mode((xp_accumulate)how);
        expect_sum(&none, &d, XP_BF16, XP_F64, 0.0);
    }
    const token two = {2, 2, {-1, 1}, {5, 2}, {0, 3}, 3};
    xp_dialect d = mode(XP_ACC_SLOTS_F32);
    d.null_experts = 1;
    layer v = token_open(&two, &d, XP_F32);
    ok(run_kernel(&xp_ref_permute, v.m, &v.p));
    ok(run_kernel(&xp_ref_dispatch, v.m, &v.s));
    set(&v.c.out, 0, 0, 3.0);
    set(&v.c.idx, 0, 0, 0.0); /* the expert it lost its place at */
    ok(run_kernel(&xp_ref_combine, v.m, &v.c));
    assert_true(get(&v.c.y, 0, 0) == 6.0);
    ok(run_kernel(&xp_ref_combine_bwd, v.m, &v.cb));
    assert_true(get(&v.cb.dw, 0, 0) == 0.0 && get(&v.cb.dw, 0, 1) == 6.0 && get(&v.cb.dx, 0, 0) == 0.0);
    ok(pool_close());
}

static void gradients_by_hand(void **state) {
    const token t = {4, 2, {3, -1, 0, 2}, {1, 77, 5, 256}, {0, 0, 7, 0}, 3};
    const rows_of *const all[] = {&REF, &DENSE};
    (void)state;
    for (int i = 0; i < 2; i++) {
        xp_dialect d = mode(XP_ACC_SLOTS_F32);
        d.null_experts = 2;
        d.scale_at = XP_SCALE_OUTPUT;
        d.scale = 3.0;
        layer v = token_open(&t, &d, XP_BF16);
        ok(run_kernel(all[i]->permute, v.m, &v.p));
        ok(run_kernel(all[i]->dispatch, v.m, &v.s));
        set(&v.c.out, 0, 0, 7.0);
        ok(run_kernel(all[i]->combine, v.m, &v.c));
        set(&v.cb.dy, 0, 0, 1.0 + 0x1p-7); /* g = r(3 + 3 * 2^-7) = 3 + 2 * 2^-6 - a tie, up to the even code */
        ok(run_kernel(all[i]->combine_bwd, v.m, &v.cb));
        const double g = 3.03125;
        const double dw[4] = {3 * g, 0, 7 * g, 3 * g};
        for (int k = 0; k < 4; k++)
            assert_true(get(&v.cb.dw, 0, k) == dw[k]);
        assert_true(get(&v.cb.dout, 0, 0) == xp_ref_round(5 * g, XP_BF16));
        assert_true(get(&v.cb.dx, 0, 0) == xp_ref_round(257 * g, XP_BF16));
        assert_true(untouched(&v.cb.dout, 1) && untouched(&v.cb.dx, 1) && untouched(&v.cb.dw, 1));
        ok(pool_close());
    }
}

/* ---- permute by hand ---- */

/* Three tokens of two experts, a null id and dropped slots; rows weighed on their way in. */
static void permute_by_hand(void **state) {
    static const int32_t idx[3][2] = {{1, -1}, {2, 0}, {1, 1}}, pos[3][2] = {{16, -1}, {-1, 0}, {17, 18}};
    static const int64_t counts[2] = {1, 3}, offsets[3] = {0, 16, 32};
    const rows_of *const all[] = {&REF, &DENSE};
    const sizes z = {3, 2, 2, 1, XP_BF16, XP_F32, 16};
    xp_dialect d = {.name = "in", .scale = 1.0, .weight_at = XP_AT_INPUT, .null_experts = 1, .null_kind = XP_NULL_SKIP};
    const double w = tie_weight(), x = 1.0 + 0x1p-7;
    (void)state;
    for (int i = 0; i < 4; i++) {
        const rows_of *rows = all[i % 2];
        d.weight_at = i < 2 ? XP_AT_INPUT : XP_AT_OUTPUT;
        layer v;
        layer_open(&v, &z, &d, own_mesh());
        v.p.order = XP_ORDER_TOKEN;
        v.p.token0 = 50;
        for (int n = 0; n < 6; n++) {
            set(&v.p.idx, n / 2, n % 2, idx[n / 2][n % 2]);
            set(&v.c.w, n / 2, n % 2, n == 0 ? w : (double)n);
        }
        for (int t = 0; t < 3; t++)
            set(&v.p.x, t, 0, t == 0 ? x : (double)(10 * t));
        ok(run_kernel(rows->permute, v.m, &v.p));
        ok(properties_hold(&xp_stage_permute, v.m, &v.p));
        assert_memory_equal(v.p.counts.data, counts, sizeof counts);
        assert_memory_equal(v.p.offsets.data, offsets, sizeof offsets);
        for (int n = 0; n < 6; n++)
            assert_int_equal(get_i32(&v.p.pos, n / 2, n % 2), pos[n / 2][n % 2]);
        for (int r = 0; r < 32; r++) {
            const int s = r == 0 ? 3 : r == 16 ? 0 : r == 17 ? 4 : r == 18 ? 5 : -1;
            const double in = s == 0 ? 1.0 : s < 0 ? 0.0 : s * 10.0 * (s / 2), out = s == 0 ? x : 10.0 * (s / 2);
            assert_int_equal(get_i32(&v.p.src, r, 0), s);
            assert_int_equal(get_i64(&v.p.tok, r), s < 0 ? -1 : 50 + s / 2);
            assert_true(get(&v.p.rows, r, 0) == (i < 2 ? in : s < 0 ? 0.0 : out));
        }
        assert_true(untouched(&v.p.rows, 32) && untouched(&v.p.src, 32));
        ok(pool_close());
    }
}

/* dx = r(sum of w drows), unrounded products; dw = <drows, x>; nothing comes from a slot without a row. */
static void permute_bwd_by_hand(void **state) {
    const rows_of *const all[] = {&REF, &DENSE};
    const sizes z = {2, 3, 2, 2, XP_BF16, XP_F32, 1};
    const xp_dialect d = {.name = "in", .scale = 1.0, .weight_at = XP_AT_INPUT};
    static const int32_t pos[2][3] = {{1, -1, 0}, {-1, -1, -1}};
    (void)state;
    for (int i = 0; i < 2; i++) {
        layer v;
        layer_open(&v, &z, &d, own_mesh());
        for (int n = 0; n < 6; n++) {
            set(&v.pb.pos, n / 3, n % 3, pos[n / 3][n % 3]);
            set(&v.pb.w, n / 3, n % 3, n == 0 ? 1.0078125 : n == 2 ? 0x1p-8 : 9.0);
        }
        for (int n = 0; n < 4; n++) {
            set(&v.pb.x, n / 2, n % 2, n + 2.0);
            set(&v.pb.drows, n / 2, n % 2, n == 0 ? 1.0 : n == 2 ? 1.0078125 : 0.5);
        }
        ok(run_kernel(all[i]->permute_bwd, v.m, &v.pb));
        /* 1.0078125^2 + 2^-8 = 1 + 2^-6 + 2^-8 + 2^-14, as in the sums above */
        assert_true(get(&v.pb.dx, 0, 0) == 1.0 + 3 * 0x1p-7 && get(&v.pb.dx, 1, 0) == 0 && get(&v.pb.dx, 1, 1) == 0);
        const double dw[6] = {1.0078125 * 2 + 0.5 * 3, 0, 1.0 * 2 + 0.5 * 3, 0, 0, 0};
        for (int n = 0; n < 6; n++)
            assert_true(get(&v.pb.dw, n / 3, n % 3) == dw[n]);
        assert_true(untouched(&v.pb.dx, 2) && untouched(&v.pb.dw, 2));
        ok(pool_close());
    }
}

static void properties_see(void **state) {
    const sizes z = {2, 2, 2, 1, XP_F32, XP_F32, 1};
    const xp_dialect d = {.name = "t", .scale = 1.0, .null_experts = 1, .null_kind = XP_NULL_SKIP};
    layer v;
    double r = 0.0;
    (void)state;
    layer_open(&v, &z, &d, own_mesh());
    for (int n = 0; n < 4; n++)
        set(&v.p.idx, n / 2, n % 2, n - 1); /* -1 0 1 2 */
    set(&v.p.x, 0, 0, 1);
    set(&v.p.x, 1, 0, 2);
    ok(run_kernel(&xp_ref_permute, v.m, &v.p));
    ok(properties_hold(&xp_stage_permute, v.m, &v.p));
    set(&v.p.pos, 0, 0, 1);
    ok(xp_stage_permute.property[1].residual(&v.p, v.m, &r));
    assert_true(r > 1.0);
    set(&v.p.pos, 0, 0, -1);
    set(&v.p.pos, 1, 1, 0);
    ok(xp_stage_permute.property[1].residual(&v.p, v.m, &r));
    assert_true(r > 1.0);
    set(&v.p.pos, 1, 1, -1);
    set(&v.p.idx, 0, 0, 1); /* two rows of expert 1 are named now, one is there */
    ok(xp_stage_permute.property[0].residual(&v.p, v.m, &r));
    assert_true(r > 1.0);
    ok(pool_close());
}

/* ---- random layers ---- */

static void layer_fill(layer *v, const sizes *z, uint64_t seed, uint64_t rank) {
    const int64_t ids = z->E + v->dialect.null_experts + 1; /* and -1 */
    for (int64_t t = 0; t < z->T; t++) {
        const uint64_t at = rank * 64 + (uint64_t)t;
        for (int64_t k = 0; k < z->K; k++) {
            set(&v->p.idx, t, k, (double)(mix(seed, 1, at, (uint64_t)k) % (uint64_t)ids) - 1.0);
            set(&v->c.w, t, k, real(seed + 2, at, (uint64_t)k));
        }
        for (int64_t h = 0; h < z->H; h++) {
            set(&v->p.x, t, h, real(seed + 3, at, (uint64_t)h));
            set(&v->cb.dy, t, h, real(seed + 4, at, (uint64_t)h));
        }
    }
}

static xp_dialect dialect_of(uint64_t n) {
    static const double scale[] = {2.826, 0.3, -6.0, 1.0};
    xp_dialect d = {.name = "random", .scale = scale[n / 24 % 4], .accumulate = (xp_accumulate)(n % 4)};
    const uint64_t kind = n / 4 % 6;
    d.scale_at = n / 24 % 2 || kind == 5 ? XP_SCALE_OUTPUT : XP_SCALE_WEIGHT;
    d.weight_at = kind == 3 || kind == 4 ? XP_AT_INPUT : XP_AT_OUTPUT;
    d.null_experts = kind == 0 || kind == 3 ? 0 : 2;
    d.null_kind = kind == 2 || kind == 4 ? XP_NULL_SKIP : XP_NULL_IDENTITY;
    return d;
}

/* The tensor again, with room of its own, zeros all over. */
static xp_tensor twin(const xp_tensor *t, xp_dtype d) {
    xp_tensor n = t->ndim == 1 ? vector(d, t->dim[0]) : matrix(d, t->dim[0], t->dim[1]);
    memset(n.data, 0, pool.bytes[pool.n - 1]);
    return n;
}

typedef union {
    int64_t aligned;
    char bytes[4096];
} any_args;

/* A copy of args with outputs of its own; in f64 those that are judged by bound, when it is a judge's. */
static any_args with_outputs(const xp_stage *s, const void *args, int judge) {
    any_args a;
    memcpy(&a, args, s->args_size);
    for (int i = 0; i < s->operands; i++) {
        xp_tensor *t = xp_stage_tensor(s, &a, i);
        if (s->operand[i].role == XP_OUT && t->ndim > 0)
            *t = twin(t, judge && s->operand[i].cmp == XP_BOUND ? XP_F64 : t->dtype);
    }
    return a;
}

static int64_t elements(const xp_tensor *t) {
    return t->ndim == 1 ? t->dim[0] : t->dim[0] * t->dim[1];
}
static const void *element(const xp_tensor *t, int64_t n) {
    return t->ndim == 1 ? xp_tensor_at(t, n, 0, 0, 0) : xp_tensor_at(t, n / t->dim[1], n % t->dim[1], 0, 0);
}

/* got, by another row, against the judge's values: bits, or inside the bound. out_far: how many elements are not. */
static xp_status compare(const xp_stage *s, const xp_mesh *m, const void *args, any_args *judge, any_args *got,
                         int *out_far) {
    *out_far = 0;
    for (int i = 0; i < s->operands; i++) {
        const xp_tensor *a = xp_stage_tensor(s, judge, i), *b = xp_stage_tensor(s, got, i);
        if (s->operand[i].role != XP_OUT || a->ndim == 0)
            continue;
        xp_tensor tol = {0};
        if (s->operand[i].cmp == XP_BOUND) {
            tol = twin(a, XP_F64);
            void *ws = take(s->bound_workspace ? s->bound_workspace(args, m) : 0);
            XP_TRY(s->bound(args, m, i, a, ws, &tol));
        }
        for (int64_t n = 0; n < elements(a); n++) {
            const double x = xp_widen(element(a, n), a->dtype, 0), y = xp_widen(element(b, n), b->dtype, 0);
            if (tol.ndim == 0)
                *out_far += xp_code(element(a, n), a->dtype, 0) != xp_code(element(b, n), b->dtype, 0);
            else
                *out_far += !(fabs(x - y) <= *(const double *)element(&tol, n));
        }
    }
    return XP_OK;
}

/* The reference's row as the judge of the other formulation's: args hold what the reference put out. */
static xp_status agree(const xp_kernel *ref, const xp_kernel *dense, const xp_mesh *m, const void *args) {
    any_args judge = with_outputs(ref->stage, args, 1), got = with_outputs(ref->stage, args, 0);
    int far;
    XP_TRY(run_unchecked(ref, m, &judge));
    XP_TRY(run_unchecked(dense, m, &got));
    XP_TRY(compare(ref->stage, m, args, &judge, &got, &far));
    MUST(far == 0, "%s: %d elements differ", ref->stage->name, far);
    return XP_OK;
}

/* Sums of one and the same order and rounding have the same bits. */
static xp_status eager_bits(const layer *v) {
    any_args got = with_outputs(&xp_stage_combine, &v->c, 0);
    const xp_tensor *y = &((xp_combine_args *)(void *)&got)->y;
    if (v->dialect.accumulate != XP_ACC_EAGER_ACT && v->dialect.accumulate != XP_ACC_EAGER_F32)
        return XP_OK;
    XP_TRY(run_unchecked(&xp_dense_combine, v->m, &got));
    for (int64_t n = 0; n < elements(y); n++)
        MUST(xp_code(element(y, n), y->dtype, 0) == xp_code(element(&v->c.y, n), y->dtype, 0), "bits of y");
    return XP_OK;
}

/* arg: the number of the draw. */
static xp_status draw_rank(const xp_mesh *m, int rank, void *arg) {
    static const xp_dtype acts[] = {XP_BF16, XP_F32, XP_F16, XP_F64};
    const uint64_t n = *(const uint64_t *)arg;
    const xp_dialect d = dialect_of(n);
    const xp_dtype act = acts[mix(n, 0, 0, 1) % 4];
    const sizes z = {.T = (int64_t)(n % 7) + (rank == 1 ? 0 : 1),
                     .K = 1 + (int64_t)(mix(n, 0, 0, 5) % 5),
                     .E = 4,
                     .H = (int64_t)(n % 3) * 4 + 1,
                     .act = act,
                     .weight = act == XP_F64         ? XP_F64
                               : mix(n, 0, 0, 2) % 2 ? XP_F32
                                                     : act,
                     .align = mix(n, 0, 0, 3) % 2 ? 16 : 1};
    layer v;
    layer_open(&v, &z, &d, m);
    v.s.recv = matrix(act, 256, z.H); /* ranks differ in tokens: room for all */
    v.s.recv_tok = vector(XP_I64, 256);
    v.c.out = matrix(act, 256, z.H);
    v.cb.dout = matrix(act, 256, z.H);
    v.sb.drecv = matrix(act, 256, z.H);
    v.p.order = (int)(mix(n, 0, 0, 4) % 2);
    layer_fill(&v, &z, n * 16, (uint64_t)rank);
    XP_TRY(layer_forward(&v, &REF));
    XP_TRY(layer_backward(&v, &REF));
    XP_TRY(agree(&xp_ref_permute, &xp_dense_permute, m, &v.p));
    XP_TRY(agree(&xp_ref_combine, &xp_dense_combine, m, &v.c));
    XP_TRY(agree(&xp_ref_combine_bwd, &xp_dense_combine_bwd, m, &v.cb));
    XP_TRY(agree(&xp_ref_permute_bwd, &xp_dense_permute_bwd, m, &v.pb));
    XP_TRY(eager_bits(&v));
    return pool_close();
}

static xp_mesh_report report;

static void random_layers(void **state) {
    static const char *const meshes[] = {"fsdp=1", "fsdp=2,ep=2", "fsdp=4,ep=4"};
    (void)state;
    for (uint64_t n = 0; n < 192; n++) {
        suite_run(meshes[n % 3], draw_rank, &n, &report);
        if (report.status != XP_OK)
            fail_msg("draw %d: rank %d: %s", (int)n, report.first, report.end[report.first].text);
    }
}

/* ---- bounds: what rounds less is inside, what is wrong is not ---- */

/* combine and its backward without any rounding but the last; lose: slot 0 of each token is left out. */
static void unrounded(const layer *v, int lose, any_args *fwd, any_args *bwd) {
    const xp_combine_args *c = (const xp_combine_args *)(void *)fwd;
    const xp_combine_bwd_args *b = (const xp_combine_bwd_args *)(void *)bwd;
    const double scale = v->dialect.scale_at == XP_SCALE_OUTPUT ? v->dialect.scale : 1.0;
    for (int64_t t = 0; t < c->y.dim[0]; t++) {
        for (int64_t h = 0; h < c->y.dim[1]; h++) {
            const double g = get(&b->dy, t, h) * (double)(float)scale;
            float sum = 0.0f;
            double dx = 0.0;
            for (int64_t k = c->pos.dim[1] - 1; k >= lose; k--) {
                const int32_t row = get_i32(&c->pos, t, k);
                const int own = row < 0 && get_i32(&c->idx, t, k) >= c->counts.dim[0];
                const double w = get(&c->w, t, k);
                if (row >= 0) {
                    sum += (float)(w * get(&c->back, row, h));
                    set(&b->dout, row, h, w * g);
                } else if (own) {
                    sum += (float)(w * get(&c->x, t, h));
                    dx += w * g;
                }
            }
            set(&c->y, t, h, (double)(sum * (float)scale));
            set(&b->dx, t, h, dx);
        }
        for (int64_t k = 0; k < c->pos.dim[1]; k++) {
            const int32_t row = get_i32(&c->pos, t, k);
            float dw = 0.0f;
            for (int64_t h = c->y.dim[1] - 1; h >= 0; h--) {
                const float g = (float)get(&b->dy, t, h) * (float)scale;
                if (row >= 0)
                    dw += g * (float)get(&c->back, row, h);
                else if (get_i32(&c->idx, t, k) >= c->counts.dim[0])
                    dw += g * (float)get(&c->x, t, h);
            }
            set(&b->dw, t, k, (double)dw);
        }
    }
}

static void bounds_by_mode(void **state) {
    const sizes z = {24, 4, 3, 8, XP_BF16, XP_F32, 1};
    (void)state;
    for (uint64_t n = 0; n < 16; n++) {
        xp_dialect d = mode((xp_accumulate)(n % 4));
        d.null_experts = 2;
        d.scale_at = n / 4 % 2 ? XP_SCALE_OUTPUT : XP_SCALE_WEIGHT;
        d.scale = 2.826;
        const xp_dtype act = n / 8 ? XP_F16 : XP_BF16;
        sizes s = z;
        layer v;
        int far;
        s.act = act;
        layer_open(&v, &s, &d, own_mesh());
        layer_fill(&v, &s, n, 0);
        for (int64_t i = 0; i < 8 && act == XP_F16; i++) /* gradients among f16's smallest numbers */
            set(&v.cb.dy, 1, i, 0x1p-24 * (double)(i + 1));
        ok(layer_forward(&v, &REF));
        ok(layer_backward(&v, &REF));
        any_args fwd = with_outputs(&xp_stage_combine, &v.c, 1), bwd = with_outputs(&xp_stage_combine_bwd, &v.cb, 1);
        ok(run_unchecked(&xp_ref_combine, v.m, &fwd));
        ok(run_unchecked(&xp_ref_combine_bwd, v.m, &bwd));
        any_args fwd2 = with_outputs(&xp_stage_combine, &v.c, 0), bwd2 = with_outputs(&xp_stage_combine_bwd, &v.cb, 0);
        xp_combine_args *f = (xp_combine_args *)(void *)&fwd2;
        f->back = v.c.back;
        unrounded(&v, 0, &fwd2, &bwd2);
        /* the copy of back is compared, too */
        ((xp_combine_args *)(void *)&fwd)->back = v.c.back;
        ok(compare(&xp_stage_combine, v.m, &v.c, &fwd, &fwd2, &far));
        assert_int_equal(far, 0);
        ok(compare(&xp_stage_combine_bwd, v.m, &v.cb, &bwd, &bwd2, &far));
        assert_int_equal(far, 0);
        unrounded(&v, 1, &fwd2, &bwd2);
        ok(compare(&xp_stage_combine, v.m, &v.c, &fwd, &fwd2, &far));
        assert_true(far > 24 * 8 / 3);
        /* a factor that is left out of the gradient */
        if (d.scale_at == XP_SCALE_OUTPUT) {
            for (int64_t t = 0; t < 24; t++) {
                for (int64_t k = 0; k < 4; k++)
                    set(&((xp_combine_bwd_args *)(void *)&bwd2)->dw, t, k,
                        get(&((xp_combine_bwd_args *)(void *)&bwd)->dw, t, k) / 2.826);
            }
            ok(compare(&xp_stage_combine_bwd, v.m, &v.cb, &bwd, &bwd2, &far));
            assert_true(far > 24);
        }
        ok(pool_close());
    }
}

/* The sum 1 + 2^-8 + 2^-30 lies above the middle of 1 and 1 + 2^-7, where f32 sees the middle: y is 1 + 2^-7 here, 1
 * there, a whole step apart. Times 1 + 2^-8 - 2^-23 the second becomes 1, half a step down from the product. */
static void scaled_bound(void **state) {
    const token t = {3, 3, {0, 1, 2}, {1, 1, 1}, {0, 0, 0}, 0};
    static const double out[] = {1, 0x1p-8, 0x1p-30};
    xp_dialect d = mode(XP_ACC_SLOTS_F32);
    (void)state;
    d.scale_at = XP_SCALE_OUTPUT;
    d.scale = 1.0 + 0x1p-8 - 0x1p-23;
    layer v = token_open(&t, &d, XP_BF16);
    ok(run_kernel(&xp_ref_permute, v.m, &v.p));
    ok(run_kernel(&xp_ref_dispatch, v.m, &v.s));
    for (int k = 0; k < 3; k++)
        set(&v.c.out, k, 0, out[k]);
    ok(run_kernel(&xp_ref_combine, v.m, &v.c));
    any_args judge = with_outputs(&xp_stage_combine, &v.c, 1);
    const xp_tensor *y = &((xp_combine_args *)(void *)&judge)->y;
    ok(run_unchecked(&xp_ref_combine, v.m, &judge));
    assert_true(get(y, 0, 0) == (double)(1.0078125f * (float)d.scale));
    xp_tensor tol = twin(y, XP_F64);
    ok(bound_of(&xp_stage_combine, v.m, &v.c, "y", y, &tol));
    assert_true(get(y, 0, 0) - 1.0 <= get(&tol, 0, 0));
    assert_true(get(&tol, 0, 0) < 3.125 * 0x1p-8);
    ok(pool_close());
}

/* Whatever the factor may lose, a pad row's gradient is 0: its tolerance is below the smallest bf16 number. */
static void pads_stay_exact(void **state) {
    const sizes z = {3, 2, 2, 4, XP_BF16, XP_F32, 16};
    xp_dialect d = mode(XP_ACC_SLOTS_F32);
    int pads = 0;
    layer v;
    (void)state;
    d.scale_at = XP_SCALE_OUTPUT;
    d.scale = 0.3;
    layer_open(&v, &z, &d, own_mesh());
    layer_fill(&v, &z, 1, 0);
    ok(layer_forward(&v, &REF));
    any_args judge = with_outputs(&xp_stage_combine_bwd, &v.cb, 1);
    const xp_tensor *dout = &((xp_combine_bwd_args *)(void *)&judge)->dout;
    ok(run_unchecked(&xp_ref_combine_bwd, v.m, &judge));
    xp_tensor tol = twin(dout, XP_F64);
    ok(bound_of(&xp_stage_combine_bwd, v.m, &v.cb, "dout", dout, &tol));
    for (int64_t i = 0; i < get_i64(&v.s.recv_offsets, 2); i++) {
        const int pad = get_i64(&v.s.recv_tok, i) < 0;
        assert_true(pad ? get(&tol, i, 1) < 0x1p-133 : get(&tol, i, 1) > 0x1p-133);
        pads += pad;
    }
    assert_true(pads >= 16);
    ok(pool_close());
}

/* Weights on the input: an f32 sum in another order is inside, one of bf16 steps is not. */
static void permute_bwd_bounds(void **state) {
    const sizes z = {40, 4, 2, 64, XP_BF16, XP_F32, 1};
    const xp_dialect d = {.name = "in", .scale = 1.0, .weight_at = XP_AT_INPUT};
    layer v;
    int far_dx = 0, far_dw = 0;
    (void)state;
    layer_open(&v, &z, &d, own_mesh());
    layer_fill(&v, &z, 3, 0);
    for (int64_t n = 0; n < 160; n++) {
        set(&v.pb.pos, n / 4, n % 4, n % 7 == 3 ? -1.0 : (double)(159 - n));
        for (int64_t h = 0; h < 64; h++)
            set(&v.pb.drows, 159 - n, h, real(5, (uint64_t)n, (uint64_t)h));
    }
    any_args judge = with_outputs(&xp_stage_permute_bwd, &v.pb, 1);
    const xp_permute_bwd_args *j = (const xp_permute_bwd_args *)(void *)&judge;
    ok(run_unchecked(&xp_ref_permute_bwd, v.m, &judge));
    xp_tensor dx = twin(&j->dx, XP_F64), dw = twin(&j->dw, XP_F64);
    ok(bound_of(&xp_stage_permute_bwd, v.m, &v.pb, "dx", &j->dx, &dx));
    ok(bound_of(&xp_stage_permute_bwd, v.m, &v.pb, "dw", &j->dw, &dw));
    for (int64_t t = 0; t < 40; t++) {
        for (int64_t h = 0; h < 64; h++) {
            float sum = 0.0f;
            double steps = 0.0;
            for (int64_t k = 3; k >= 0; k--) {
                const int32_t row = get_i32(&v.pb.pos, t, k);
                const float p = row < 0 ? 0.0f : (float)get(&v.pb.w, t, k) * (float)get(&v.pb.drows, row, h);
                sum += p;
                steps = xp_ref_round(steps + (double)p, XP_BF16);
            }
            assert_true(fabs(xp_ref_round((double)sum, XP_BF16) - get(&j->dx, t, h)) <= get(&dx, t, h));
            far_dx += fabs(steps - get(&j->dx, t, h)) > get(&dx, t, h);
        }
        for (int64_t k = 0; k < 4; k++) {
            const int32_t row = get_i32(&v.pb.pos, t, k);
            float sum = 0.0f;
            double steps = 0.0;
            for (int64_t h = 63; h >= 0 && row >= 0; h--) {
                sum += (float)get(&v.pb.x, t, h) * (float)get(&v.pb.drows, row, h);
                steps = xp_ref_round(steps + get(&v.pb.x, t, h) * get(&v.pb.drows, row, h), XP_BF16);
            }
            assert_true(fabs((double)sum - get(&j->dw, t, k)) <= get(&dw, t, k));
            far_dw += fabs(steps - get(&j->dw, t, k)) > get(&dw, t, k);
        }
    }
    assert_true(far_dx > 40 * 64 / 8 && far_dw > 40);
    /* three tokens in the middle are what the whole says of them */
    xp_permute_bwd_args s = *j;
    xp_stage_permute_bwd.slice(j, 5, 8, &s);
    assert_true(s.dx.dim[0] == 3 && s.dw.dim[0] == 3);
    s.dx = matrix(XP_F64, 3, 64);
    s.dw = matrix(XP_F64, 3, 4);
    ok(run_unchecked(&xp_ref_permute_bwd, v.m, &s));
    for (int64_t n = 0; n < 12; n++)
        assert_true(get(&s.dw, n / 4, n % 4) == get(&j->dw, 5 + n / 4, n % 4));
    for (int64_t n = 0; n < 192; n++)
        assert_true(get(&s.dx, n / 64, n % 64) == get(&j->dx, 5 + n / 64, n % 64));
    ok(pool_close());
}

/* ---- slopes ---- */

/* <dy, y>. In y each of K terms w f x is below 1.5 * |scale| <= 9 in magnitude and sees fewer than 16 roundings, the
 * sum of T*H = 20 terms fewer than 32 more: 48 gamma of 20 * 5 * 9, below 2^-53 * 2^16. */
static double objective(void *ctx, double *out_err) {
    layer *v = ctx;
    double sum = 0.0;
    ok(layer_forward(v, &REF));
    for (int64_t t = 0; t < v->c.y.dim[0]; t++) {
        for (int64_t h = 0; h < v->c.y.dim[1]; h++)
            sum += get(&v->cb.dy, t, h) * get(&v->c.y, t, h);
    }
    *out_err = 0x1p-37;
    while (pool.n > 60) /* the workspaces of this call */
        free(pool.p[--pool.n]);
    return sum;
}

static void slopes(void **state) {
    const sizes z = {5, 5, 3, 4, XP_F64, XP_F64, 1};
    (void)state;
    for (uint64_t n = 0; n < 48; n++) {
        const xp_dialect d = dialect_of(n * 5);
        layer c;
        layer_open(&c, &z, &d, own_mesh());
        layer_fill(&c, &z, 1000 + n, 0);
        ok(layer_forward(&c, &REF));
        ok(layer_backward(&c, &REF));
        /* the token's whole gradient: through its rows, and through identity experts */
        xp_tensor dx = c.pb.dx;
        for (int64_t i = 0; i < 20 && identity(&d); i++)
            set(&dx, i / 4, i % 4, get(&dx, i / 4, i % 4) + get(&c.cb.dx, i / 4, i % 4));
        while (pool.n < 60)
            take(1);
        slope_expect("dx", &c.p.x, &dx, n, objective, &c);
        slope_expect("dw", &c.c.w, d.weight_at == XP_AT_INPUT ? &c.pb.dw : &c.cb.dw, n + 99, objective, &c);
        for (int64_t i = 0; i < 25 && d.weight_at == XP_AT_INPUT; i++)
            assert_true(get(&c.cb.dw, i / 5, i % 5) == 0.0);
        ok(pool_close());
    }
}

/* ---- residual ---- */

static xp_residual_args residual_make(xp_dtype act, int64_t n, double a, double b, double factor) {
    xp_residual_args r = {.a = matrix(act, 1, n), .b = matrix(act, 1, n), .y = matrix(act, 1, n), .factor = factor};
    for (int64_t i = 0; i < n; i++) {
        set(&r.a, 0, i, a);
        set(&r.b, 0, i, b);
    }
    return r;
}

static void expect_residual(const xp_residual_args *r, double want) {
    const xp_kernel *const all[] = {&xp_ref_residual, &xp_dense_residual};
    for (int i = 0; i < 2; i++) {
        ok(run_kernel(all[i], own_mesh(), r));
        if (get(&r->y, 0, 0) != want)
            fail_msg("residual %d: %.17g, expected %.17g", i, get(&r->y, 0, 0), want);
        assert_true(untouched(&r->y, 1));
    }
}

static void residual_by_hand(void **state) {
    (void)state;
    xp_residual_args r = residual_make(XP_BF16, 1, 256, 1, 3.0);
    expect_residual(&r, 768); /* 257 is a tie down to 256; 771 would go up to 772 */
    r.factor = 0.0;
    expect_residual(&r, 256);
    r.factor = 1.0;
    expect_residual(&r, 256);
    r.factor = 0.5;
    expect_residual(&r, 128);
    r.b = (xp_tensor){0};
    r.factor = 3.0;
    expect_residual(&r, 768);
    r.factor = 1.0;
    expect_residual(&r, 256);
    set(&r.a, 0, 0, 1.0 + 0x1p-7);
    r.factor = tie_weight();
    expect_residual(&r, 1.0); /* the product goes to f32 first */
    r.y = matrix(XP_F64, 1, 1);
    ok(run_unchecked(&xp_ref_residual, own_mesh(), &r));
    assert_true(get(&r.y, 0, 0) == 1.0 + 0x1p-8);
    /* 0.1 is a number of f32 in f32, of f64 in f64 */
    r = residual_make(XP_F32, 1, 5, 4, 0.1);
    expect_residual(&r, (double)(9.0f * 0.1f));
    assert_true((double)(9.0f * 0.1f) != (double)(float)(9 * 0.1));
    r = residual_make(XP_F64, 1, 3, 0x1p-40, 0.1);
    expect_residual(&r, (3 + 0x1p-40) * 0.1);
    ok(pool_close());
}

static void residual_bounds(void **state) {
    enum { N = 200 };
    static const double factors[] = {1.0, 0.5, 2.826, -0.3};
    static const xp_dtype acts[] = {XP_BF16, XP_F16, XP_F32, XP_F64};
    int sums = 0;
    (void)state;
    for (int n = 0; n < 32; n++) {
        const xp_dtype act = acts[n % 4];
        xp_residual_args r = residual_make(act, N, 0, 0, factors[n / 4 % 4]);
        int far, wrong = 0;
        for (int i = 0; i < N; i++) {
            set(&r.a, 0, i, real(7, (uint64_t)n, (uint64_t)i));
            set(&r.b, 0, i, real(8, (uint64_t)n, (uint64_t)i));
        }
        if (n / 16)
            r.b = (xp_tensor){0};
        any_args judge = with_outputs(&xp_stage_residual, &r, 1), got = with_outputs(&xp_stage_residual, &r, 0);
        const xp_tensor *y = &((xp_residual_args *)(void *)&got)->y;
        ok(run_unchecked(&xp_ref_residual, own_mesh(), &judge));
        ok(run_unchecked(&xp_dense_residual, own_mesh(), &got));
        xp_tensor tol = twin(&r.y, XP_F64);
        const xp_tensor *value = &((xp_residual_args *)(void *)&judge)->y;
        ok(xp_stage_residual.bound(&r, own_mesh(), 2, value, NULL, &tol));
        for (int i = 0; i < N; i++) {
            const double a = get(&r.a, 0, i), b = r.b.data ? get(&r.b, 0, i) : 0.0;
            const double f = act == XP_F64 ? r.factor : (double)(float)r.factor, one = xp_ref_round((a + b) * f, act);
            const double want = get(value, 0, i), limit = get(&tol, 0, i);
            assert_true(fabs(get(y, 0, i) - want) <= limit);
            assert_true(fabs(one - want) <= limit); /* without the rounding of the sum */
            wrong += fabs(xp_ref_round(a * f, act) - want) > limit;
            assert_true(limit <= 3.0 * xp_ref_unit(act) * 3.0 * (fabs(a) + fabs(b)) + 0x1p-24);
            set(y, 0, i, want * (1.0 + 4.0 * xp_ref_unit(act)) + 0x1p-20);
        }
        ok(compare(&xp_stage_residual, own_mesh(), &r, &judge, &got, &far));
        assert_true(far > N / 2);
        assert_true(r.b.data ? wrong > N / 2 : wrong == 0);
        xp_residual_args part = r;
        xp_stage_residual.slice(&r, 0, 0, &part);
        assert_true(part.a.dim[0] == 0 && part.y.dim[0] == 0 && part.b.dim[0] == 0 && part.b.data == r.b.data);
        sums += r.b.data != NULL;
        ok(pool_close());
    }
    assert_int_equal(sums, 16);
}

/* ---- refusals ---- */

static const xp_dialect in_dialect = {.name = "in", .scale = 1.0, .weight_at = XP_AT_INPUT};
static const xp_dialect own_dialect = {.name = "own", .scale = 1.0, .null_experts = 2};
static const xp_dialect both_dialect = {.name = "both", .scale = 1.0, .null_experts = 2, .weight_at = XP_AT_INPUT};
static int32_t far_index[4] = {4, 5, 5, 5}, low_index[4] = {-2, 0, 0, 0}, rowless[4] = {4, 4, 4, 4};
static xp_tensor spare;

SPOIL(p_no_w, xp_permute_args, a->dialect = &in_dialect)
SPOIL(p_extra_w, xp_permute_args, a->w = spare)
SPOIL(p_no_record, xp_permute_args, a->dialect = NULL)
SPOIL(p_far, xp_permute_args, a->idx.data = far_index; a->idx.stride[0] = 0)
SPOIL(p_low, xp_permute_args, a->idx.data = low_index; a->idx.stride[0] = 0)
static const refusal permute_refusals[] = {
    {p_no_w, "permute: w is absent, expected it: dialect in"},
    {p_extra_w, "permute: w is present, expected none: dialect own"},
    {p_no_record, "is 3, expected -1 to 2, the last of E = 3 and 0 null experts"},
    {p_far, "idx[0][1] is 5, expected -1 to 4, the last of E = 3 and 2 null experts"},
    {p_low, "idx[0][0] is -2, expected -1 to 4"},
};

SPOIL(pb_no_x, xp_permute_bwd_args, a->x = (xp_tensor){0})
SPOIL(pb_no_w, xp_permute_bwd_args, a->w = (xp_tensor){0})
SPOIL(pb_no_dw, xp_permute_bwd_args, a->dw = (xp_tensor){0})
SPOIL(pb_extra, xp_permute_bwd_args, a->dialect = NULL)
SPOIL(pb_wide, xp_permute_bwd_args, a->w.dtype = XP_F64)
SPOIL(pb_low, xp_permute_bwd_args, a->pos.data = low_index; a->pos.stride[0] = 0)
static const refusal permute_bwd_refusals[] = {
    {pb_no_x, "permute_bwd: x is absent, expected it: dialect in"},
    {pb_no_w, "permute_bwd: w is absent, expected it"},
    {pb_no_dw, "permute_bwd: dw is absent, expected it"},
    {pb_extra, "permute_bwd: w is present, expected none: dialect none"},
    {pb_wide, "w has dtype f64, expected f32 or narrower beside rows of bf16"},
    {pb_low, "pos[0][0] is -2, expected -1 to M-1"},
};

SPOIL(c_no_x, xp_combine_args, a->x = (xp_tensor){0})
SPOIL(c_extra_x, xp_combine_args, a->dialect = &in_dialect)
SPOIL(c_both, xp_combine_args, a->dialect = &both_dialect)
SPOIL(c_far, xp_combine_args, a->idx.data = far_index; a->idx.stride[0] = 0)
SPOIL(c_rowless, xp_combine_args, a->idx.data = rowless; a->idx.stride[0] = 0)
SPOIL(c_pos, xp_combine_args, a->pos.data = low_index; a->pos.stride[0] = 0)
static const refusal combine_refusals[] = {
    {c_no_x, "combine: x is absent, expected it: dialect own"},
    {c_extra_x, "combine: x is present, expected none: dialect in"},
    {c_both, "combine: dialect both has weight_at input and null_kind identity"},
    {c_far, "idx[0][1] is 5, expected -1 to 4, the last of E = 3 and 2 null experts"},
    {c_rowless, "expected -1 beside idx 4, which has no row"},
    {c_pos, "pos[0][0] is -2, expected -1 to M-1"},
};

SPOIL(cb_no_x, xp_combine_bwd_args, a->x = (xp_tensor){0})
SPOIL(cb_no_idx, xp_combine_bwd_args, a->idx = (xp_tensor){0})
SPOIL(cb_no_dx, xp_combine_bwd_args, a->dx = (xp_tensor){0})
SPOIL(cb_extra, xp_combine_bwd_args, a->dialect = &in_dialect)
SPOIL(cb_both, xp_combine_bwd_args, a->dialect = &both_dialect)
SPOIL(cb_far, xp_combine_bwd_args, a->idx.data = far_index; a->idx.stride[0] = 0)
static const refusal combine_bwd_refusals[] = {
    {cb_no_x, "combine_bwd: x is absent, expected it: dialect own"},
    {cb_no_idx, "combine_bwd: idx is absent, expected it"},
    {cb_no_dx, "combine_bwd: dx is absent, expected it"},
    {cb_extra, "combine_bwd: x is present, expected none: dialect in"},
    {cb_both, "combine_bwd: dialect both has weight_at input and null_kind identity"},
    {cb_far, "combine_bwd: idx[0][1] is 5, expected -1 to 4"},
};

SPOIL(r_factor, xp_residual_args, a->factor = (double)NAN)
SPOIL(r_a, xp_residual_args, a->a = (xp_tensor){0})
static const refusal residual_refusals[] = {
    {r_factor, "residual: factor is nan, expected a finite number (0 counts as 1)"},
    {r_a, "residual: a is absent, expected [T,H]"},
};

static void refusals(void **state) {
    const sizes z = {2, 2, 3, 2, XP_BF16, XP_F32, 1};
    layer own, in;
    (void)state;
    layer_open(&own, &z, &own_dialect, own_mesh());
    layer_open(&in, &z, &in_dialect, own_mesh());
    layer_fill(&own, &z, 1, 0);
    layer_fill(&in, &z, 2, 0);
    for (int n = 0; n < 4; n++)
        set(&own.p.idx, n / 2, n % 2, n == 0 ? 3 : n - 1); /* 3 0 1 2 */
    ok(layer_forward(&own, &REF));
    ok(layer_forward(&in, &REF));
    spare = own.c.w;
    REFUSE(xp_stage_permute, *own.m, own.p, permute_refusals);
    REFUSE(xp_stage_permute_bwd, *in.m, in.pb, permute_bwd_refusals);
    REFUSE(xp_stage_combine, *own.m, own.c, combine_refusals);
    REFUSE(xp_stage_combine_bwd, *own.m, own.cb, combine_bwd_refusals);
    const xp_residual_args r = residual_make(XP_BF16, 2, 1, 1, 0.5);
    REFUSE(xp_stage_residual, *own.m, r, residual_refusals);
    ok(pool_close());
}

static void costs(void **state) {
    const token t = {4, 2, {3, -1, 0, 2}, {1, 1, 1, 1}, {0, 0, 1, 0}, 1};
    xp_dialect d = mode(XP_ACC_SLOTS_F32);
    xp_cost c;
    (void)state;
    d.null_experts = 2;
    d.scale_at = XP_SCALE_OUTPUT;
    d.scale = 2.0;
    layer v = token_open(&t, &d, XP_BF16);
    ok(layer_forward(&v, &REF));
    /* one row of two bytes; four slots with idx and pos; two experts */
    xp_stage_permute.cost(&v.p, v.m, &c);
    assert_true(c.flop == 0 && c.mem_bytes == 2 + 4 * 8 + (2 + 12) + 16 * 2);
    /* three terms of two operations and the factor; out, back, y and x; four slots with pos, idx and w */
    xp_stage_combine.cost(&v.c, v.m, &c);
    assert_true(c.flop == 7 && c.mem_bytes == 4 * 2 + 4 * 12 && c.net_bytes == 0);
    /* the row: 2 + 1; each identity 2 + 2; the factor; dy, back, dout, x and dx; pos, idx, w and dw */
    xp_stage_combine_bwd.cost(&v.cb, v.m, &c);
    assert_true(c.flop == 3 + 8 + 1 && c.mem_bytes == 5 * 2 + 4 * 16);
    xp_residual_args r = residual_make(XP_BF16, 8, 1, 1, 0.5);
    xp_stage_residual.cost(&r, v.m, &c);
    assert_true(c.flop == 16 && c.mem_bytes == 48);
    r.b = (xp_tensor){0};
    xp_stage_residual.cost(&r, v.m, &c);
    assert_true(c.flop == 8 && c.mem_bytes == 32);
    ok(pool_close());
}

/* What a test that failed left in the pool. */
static int fresh(void **state) {
    (void)state;
    while (pool.n > 0)
        free(pool.p[--pool.n]);
    return 0;
}

#define TEST(name) cmocka_unit_test_setup(name, fresh)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(sums_by_hand),
        TEST(products_by_hand),
        TEST(null_experts_by_hand),
        TEST(dropped_by_hand),
        TEST(gradients_by_hand),
        TEST(permute_by_hand),
        TEST(permute_bwd_by_hand),
        TEST(properties_see),
        TEST(random_layers),
        TEST(bounds_by_mode),
        TEST(scaled_bound),
        TEST(pads_stay_exact),
        TEST(permute_bwd_bounds),
        TEST(slopes),
        TEST(residual_by_hand),
        TEST(residual_bounds),
        TEST(refusals),
        TEST(costs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
