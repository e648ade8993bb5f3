/* The stages that move rows between tokens and experts: permute, dispatch, combine and their gradients.
 *
 * What each rank must hold is computed here from (rank, token, slot) alone, by loops that share nothing with the
 * stages: a peer's data is a formula, not a message. Numbers are small multiples of 1/8, so sums are exact in every
 * order unless a test is about rounding. Ranks return MUST's error, since cmocka's asserts jump. */
#include <math.h>

#include "ref.h"
#include "unit/stage_suite.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/permute.h"

/* ---- permute by hand ---- */

typedef struct {
    xp_permute_args a;
    xp_mesh m;
} permute_case;

static permute_case permute_make(int64_t tokens, int64_t slots, int64_t experts, int64_t width, xp_dtype d, int align) {
    permute_case c;
    const int64_t rows = tokens * slots + experts * (align - 1) + 2; /* two rows that must never be written */
    memset(&c, 0, sizeof c);
    c.m = lone_mesh(1);
    c.a.x = matrix(d, tokens, width);
    c.a.idx = matrix(XP_I32, tokens, slots);
    c.a.rows = matrix(d, rows, width);
    c.a.tok = vector(XP_I64, rows);
    c.a.src = vector(XP_I32, rows);
    c.a.pos = matrix(XP_I32, tokens, slots);
    c.a.counts = vector(XP_I64, experts);
    c.a.offsets = vector(XP_I64, experts + 1);
    c.a.align = align;
    c.a.token0 = 100;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < width; h++)
            set(&c.a.x, t, h, (double)(10 * t + h + 1));
    }
    return c;
}

/* Three tokens, two slots, three experts; token 1 names expert 2 twice and nobody names expert 1. */
static const int32_t hand_idx[3][2] = {{0, 2}, {2, 2}, {0, 2}};

static permute_case permute_hand(int align, int order) {
    permute_case c = permute_make(3, 2, 3, 2, XP_BF16, align);
    c.a.order = order;
    for (int64_t t = 0; t < 3; t++) {
        for (int64_t k = 0; k < 2; k++)
            set(&c.a.idx, t, k, hand_idx[t][k]);
    }
    return c;
}

static void permute_orders(void **state) {
    /* src = 2 t + k: slot 0 of all tokens before slot 1, or token by token */
    static const int32_t want[2][6] = {{0, 4, 2, 1, 3, 5}, {0, 4, 1, 2, 3, 5}};
    (void)state;
    for (int order = 0; order < 2; order++) {
        permute_case c = permute_hand(1, order);
        assert_int_equal(run_kernel(&xp_ref_permute, &c.m, &c.a), XP_OK);
        const int64_t counts[3] = {2, 0, 4}, offsets[4] = {0, 2, 2, 6};
        assert_memory_equal(c.a.counts.data, counts, sizeof counts);
        assert_memory_equal(c.a.offsets.data, offsets, sizeof offsets);
        for (int r = 0; r < 6; r++) {
            const int32_t s = want[order][r];
            assert_int_equal(get_i32(&c.a.src, r, 0), s);
            assert_int_equal(get_i64(&c.a.tok, r), 100 + s / 2);
            assert_int_equal(get_i32(&c.a.pos, s / 2, s % 2), r);
            for (int h = 0; h < 2; h++)
                assert_true(get(&c.a.rows, r, h) == 10 * (s / 2) + h + 1);
        }
        assert_true(untouched(&c.a.rows, 6) && untouched(&c.a.tok, 6) && untouched(&c.a.src, 6));
        assert_int_equal(properties_hold(&xp_stage_permute, &c.m, &c.a), XP_OK);
        assert_int_equal(pool_close(), XP_OK);
    }
}

static void permute_alignment(void **state) {
    (void)state;
    permute_case c = permute_hand(16, XP_ORDER_TOKEN);
    assert_int_equal(run_kernel(&xp_ref_permute, &c.m, &c.a), XP_OK);
    const int64_t offsets[4] = {0, 16, 16, 32}; /* an expert without rows takes none */
    assert_memory_equal(c.a.offsets.data, offsets, sizeof offsets);
    for (int r = 0; r < 32; r++) {
        const int pad = r >= 2 && (r < 16 || r >= 20);
        assert_int_equal(get_i32(&c.a.src, r, 0) == -1, pad);
        assert_int_equal(get_i64(&c.a.tok, r) == -1, pad);
        if (pad)
            assert_true(xp_code(xp_tensor_at(&c.a.rows, r, 0, 0, 0), XP_BF16, 0) == 0 && get(&c.a.rows, r, 1) == 0);
    }
    assert_true(untouched(&c.a.rows, 32) && untouched(&c.a.tok, 32) && untouched(&c.a.src, 32));
    assert_int_equal(properties_hold(&xp_stage_permute, &c.m, &c.a), XP_OK);
    assert_int_equal(pool_close(), XP_OK);
}

/* The row of each slot is the number of slots before it, experts first, then the stated order. */
static void permute_random(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 40; seed++) {
        const int64_t tokens = (int64_t)(mix(seed, 1, 0, 0) % 20), slots = 1 + (int64_t)(mix(seed, 2, 0, 0) % 4);
        const int64_t experts = 1 + (int64_t)(mix(seed, 3, 0, 0) % 13), width = (int64_t)(mix(seed, 4, 0, 0) % 4);
        permute_case c = permute_make(tokens, slots, experts, width, XP_F32, seed % 2 ? 16 : 1);
        c.a.order = (int)(seed / 2 % 2);
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t k = 0; k < slots; k++)
                set(&c.a.idx, t, k, (double)(mix(seed, 5, (uint64_t)t, (uint64_t)k) % (uint64_t)experts));
        }
        assert_int_equal(run_kernel(&xp_ref_permute, &c.m, &c.a), XP_OK);
        assert_int_equal(properties_hold(&xp_stage_permute, &c.m, &c.a), XP_OK);
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t k = 0; k < slots; k++) {
                const int32_t e = get_i32(&c.a.idx, t, k);
                int64_t before = get_i64(&c.a.offsets, e);
                for (int64_t u = 0; u < tokens; u++) {
                    for (int64_t j = 0; j < slots; j++) {
                        const int earlier =
                            c.a.order == XP_ORDER_TOKEN ? u < t || (u == t && j < k) : j < k || (j == k && u < t);
                        before += earlier && get_i32(&c.a.idx, u, j) == e;
                    }
                }
                assert_int_equal(get_i32(&c.a.pos, t, k), before);
                for (int64_t h = 0; h < width; h++)
                    assert_true(get(&c.a.rows, before, h) == get(&c.a.x, t, h));
            }
        }
        assert_true(untouched(&c.a.rows, get_i64(&c.a.offsets, experts)));
        assert_int_equal(pool_close(), XP_OK);
    }
}

static void permute_properties_see(void **state) {
    double r = 0.0;
    (void)state;
    permute_case c = permute_hand(1, 0);
    assert_int_equal(run_kernel(&xp_ref_permute, &c.m, &c.a), XP_OK);
    set(&c.a.pos, 0, 0, 1);
    set(&c.a.pos, 2, 0, 0);
    assert_int_equal(xp_stage_permute.property[1].residual(&c.a, &c.m, &r), XP_OK);
    assert_true(r > 1.0);
    set(&c.a.counts, 1, 0, 1);
    assert_int_equal(xp_stage_permute.property[0].residual(&c.a, &c.m, &r), XP_OK);
    assert_true(r > 1.0);
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- permute_bwd ---- */

static xp_permute_bwd_args permute_bwd_make(int64_t tokens, int64_t slots, int64_t width, xp_dtype d, uint64_t seed) {
    xp_permute_bwd_args a = {.drows = matrix(d, tokens * slots, width),
                             .pos = matrix(XP_I32, tokens, slots),
                             .dx = matrix(d, tokens, width)};
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t k = 0; k < slots; k++)
            set(&a.pos, t, k, (double)(k * tokens + tokens - 1 - t));
    }
    for (int64_t r = 0; r < tokens * slots; r++) {
        for (int64_t h = 0; h < width; h++)
            set(&a.drows, r, h, real(seed, (uint64_t)r, (uint64_t)h));
    }
    return a;
}

static void permute_bwd_sums(void **state) {
    const xp_mesh m = lone_mesh(1);
    (void)state;
    xp_permute_bwd_args a = permute_bwd_make(1, 3, 1, XP_BF16, 0);
    const double v[3] = {256, 1, 1};
    for (int k = 0; k < 3; k++)
        set(&a.drows, get_i32(&a.pos, 0, k), 0, v[k]);
    assert_int_equal(run_kernel(&xp_ref_permute_bwd, &m, &a), XP_OK);
    assert_true(get(&a.dx, 0, 0) == 258); /* 256 if each addition were rounded */
    set(&a.drows, get_i32(&a.pos, 0, 2), 0, 0.25);
    a.dx = matrix(XP_F64, 1, 1);
    assert_int_equal(run_unchecked(&xp_ref_permute_bwd, &m, &a), XP_OK);
    assert_true(get(&a.dx, 0, 0) == 257.25);
    assert_true(untouched(&a.dx, 1));
    assert_int_equal(pool_close(), XP_OK);
}

/* With dx_sum act rows are added by number, and each sum is a bf16 number. */
static void permute_bwd_sums_in_act(void **state) {
    const xp_mesh m = lone_mesh(1);
    const xp_dialect d = {.dx_sum = XP_DX_ACT};
    static const double row[2][3] = {{256, 1, -256}, {256, -256, 1}}, dx[2] = {0, 1};
    (void)state;
    xp_permute_bwd_args a = permute_bwd_make(1, 3, 1, XP_BF16, 0);
    a.dialect = &d;
    for (int i = 0; i < 2; i++) {
        for (int r = 0; r < 3; r++) {
            set(&a.pos, 0, r, (double)((r + 2) % 3));
            set(&a.drows, r, 0, row[i][r]);
        }
        assert_int_equal(run_kernel(&xp_ref_permute_bwd, &m, &a), XP_OK);
        assert_true(get(&a.dx, 0, 0) == dx[i]);
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* An f32 sum in another order, rounded, stays inside the bound; a sum rounded to bf16 at each step does not. */
static void permute_bwd_bounds(void **state) {
    enum { T = 64, K = 6, H = 8 };
    const xp_mesh m = lone_mesh(1);
    int outside = 0;
    (void)state;
    xp_permute_bwd_args a = permute_bwd_make(T, K, H, XP_BF16, 1);
    a.dx = matrix(XP_F64, T, H);
    assert_int_equal(run_unchecked(&xp_ref_permute_bwd, &m, &a), XP_OK);
    xp_tensor tol = matrix(XP_F64, T, H);
    assert_int_equal(bound_of(&xp_stage_permute_bwd, &m, &a, "dx", &a.dx, &tol), XP_OK);
    for (int t = 0; t < T; t++) {
        for (int h = 0; h < H; h++) {
            float backward = 0.0f;
            double narrow = 0.0;
            for (int k = 0; k < K; k++) {
                backward += (float)get(&a.drows, get_i32(&a.pos, t, K - 1 - k), h);
                narrow = xp_ref_round(narrow + get(&a.drows, get_i32(&a.pos, t, k), h), XP_BF16);
            }
            const double want = get(&a.dx, t, h), limit = get(&tol, t, h);
            assert_true(fabs(xp_ref_round((double)backward, XP_BF16) - want) <= limit);
            assert_true(fabs((double)backward - want) <= limit);
            outside += fabs(narrow - want) > limit;
        }
    }
    assert_true(outside > T * H / 4);
    /* three tokens in the middle are what the whole says of them */
    xp_permute_bwd_args s = a;
    assert_int_equal(xp_stage_permute_bwd.extent(&a), T);
    xp_stage_permute_bwd.slice(&a, 5, 8, &s);
    s.dx = matrix(XP_F64, 3, H);
    assert_int_equal(run_unchecked(&xp_ref_permute_bwd, &m, &s), XP_OK);
    for (int t = 0; t < 3; t++) {
        for (int h = 0; h < H; h++)
            assert_true(get(&s.dx, t, h) == get(&a.dx, 5 + t, h));
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- the layer on meshes ---- */

enum { E_PER_RANK = 3, K = 3, H = 5 };
typedef enum { ROUTE_RANDOM, ROUTE_ONE, ROUTE_RANK0, ROUTES } routing;
typedef struct {
    xp_mesh_spec spec;
    routing route;
    xp_dtype act;
    int order, align, short_rank; /* short_rank: the world rank whose C is one row too small, -1: none */
} layer_case;

static int64_t tokens_of(int rank) {
    return (rank * 5 + 4) % 7; /* 4 2 0 5 3 1 6 4: rank 2 has none */
}
static int32_t idx_of(const layer_case *c, int rank, int64_t t, int64_t k) {
    const uint64_t h = mix(11, (uint64_t)rank, (uint64_t)t, (uint64_t)k);
    if (c->route == ROUTE_ONE)
        return 1;
    return (int32_t)(h % (uint64_t)(c->route == ROUTE_RANK0 ? E_PER_RANK : E_PER_RANK * c->spec.ep));
}
/* f32 tells every (rank, token, column) apart; bf16 and f16 hold 8 and 11 bits, so theirs are numbers of few bits. */
static double x_of(const layer_case *c, int rank, int64_t t, int64_t h) {
    if (c->act == XP_BF16 || c->act == XP_F16)
        return (double)(mix(12, (uint64_t)rank, (uint64_t)t, (uint64_t)h) % 17) - 8.0;
    return (double)(1000 * rank + 100 * t + h + 1);
}
static double w_of(int rank, int64_t t, int64_t k) {
    return (double)(1 + mix(13, (uint64_t)rank, (uint64_t)t, (uint64_t)k) % 8) / 8.0;
}
static double dy_of(int rank, int64_t t, int64_t h) {
    return (double)(mix(14, (uint64_t)rank, (uint64_t)t, (uint64_t)h) % 9) - 4.0;
}
/* What expert e does to a row. */
static double factor_of(int64_t e) {
    return (double)(1 + e % 3);
}

/* The j-th row that a rank has for expert e, as 64 t + k; -1 when there are fewer. */
static int64_t slot_of(const layer_case *c, int rank, int64_t e, int64_t j) {
    const int64_t tokens = tokens_of(rank), outer = c->order == XP_ORDER_TOKEN ? tokens : K;
    const int64_t inner = c->order == XP_ORDER_TOKEN ? K : tokens;
    for (int64_t a = 0; a < outer; a++) {
        for (int64_t b = 0; b < inner; b++) {
            const int64_t t = c->order == XP_ORDER_TOKEN ? a : b, k = c->order == XP_ORDER_TOKEN ? b : a;
            if (idx_of(c, rank, t, k) == e && j-- == 0)
                return 64 * t + k;
        }
    }
    return -1;
}

/* One rank's tensors through the layer. */
typedef struct {
    const layer_case *c;
    const xp_mesh *m;
    int rank, ep, peers[XP_MESH_MAX_RANKS]; /* peers: world ranks of its ep group */
    xp_permute_args p;
    xp_dispatch_args d;
    xp_tensor out, w, y, back, dy, dw, dout, drecv, drows, dx;
} layer;

static int64_t room_of(const layer *s) {
    int64_t rows = 0;
    for (int r = 0; r < s->c->spec.ep; r++)
        rows += tokens_of(s->peers[r]) * K;
    return rows + E_PER_RANK * (s->c->align - 1) + 1;
}

static void layer_open(layer *s, const layer_case *c, const xp_mesh *m, int rank) {
    const int64_t experts = E_PER_RANK * c->spec.ep, tokens = tokens_of(rank);
    memset(s, 0, sizeof *s);
    s->c = c;
    s->m = m;
    s->rank = rank;
    s->ep = xp_mesh_axis_index(&c->spec, XP_EP, rank);
    xp_mesh_axis_ranks(&c->spec, XP_EP, rank, s->peers);
    s->p = permute_make(tokens, K, experts, H, c->act, c->align).a;
    s->p.order = c->order;
    s->p.token0 = 1000 * rank;
    s->w = matrix(XP_F32, tokens, K);
    s->dy = matrix(c->act, tokens, H);
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t k = 0; k < K; k++) {
            set(&s->p.idx, t, k, idx_of(c, rank, t, k));
            set(&s->w, t, k, w_of(rank, t, k));
        }
        for (int64_t h = 0; h < H; h++) {
            set(&s->p.x, t, h, x_of(c, rank, t, h));
            set(&s->dy, t, h, dy_of(rank, t, h));
        }
    }
}

static xp_status layer_dispatch(layer *s) {
    const int64_t rows = s->p.rows.dim[0], room = room_of(s);
    XP_TRY(run_kernel(&xp_ref_permute, s->m, &s->p));
    s->d = (xp_dispatch_args){.rows = s->p.rows,
                              .tok = s->p.tok,
                              .counts = s->p.counts,
                              .offsets = s->p.offsets,
                              .recv = matrix(s->c->act, room, H),
                              .recv_tok = vector(XP_I64, room),
                              .recv_counts = matrix(XP_I64, s->c->spec.ep, E_PER_RANK),
                              .recv_offsets = vector(XP_I64, E_PER_RANK + 1),
                              .align = s->c->align};
    if (s->c->short_rank == s->rank)
        s->d.recv = matrix(s->c->act, 2, H), s->d.recv_tok = vector(XP_I64, 2);
    XP_TRY(run_kernel(&xp_ref_dispatch, s->m, &s->d));
    MUST(rows == s->p.rows.dim[0], "rows");
    return properties_hold(&xp_stage_dispatch, s->m, &s->d);
}

/* Walks all received rows in the stated order and gives row, owner, token and slot to see(); pads have slot -1. */
typedef xp_status (*row_seen)(const layer *s, int64_t row, int64_t e, int owner, int64_t t, int64_t k);
static xp_status received_walk(const layer *s, row_seen see) {
    int64_t row = 0;
    for (int64_t l = 0; l < E_PER_RANK; l++) {
        const int64_t e = s->ep * E_PER_RANK + l;
        MUST(get_i64(&s->d.recv_offsets, l) == row, "recv_offsets[%d] is %d, not %d", (int)l,
             (int)get_i64(&s->d.recv_offsets, l), (int)row);
        for (int r = 0; r < s->c->spec.ep; r++) {
            int64_t j = 0, slot;
            for (; (slot = slot_of(s->c, s->peers[r], e, j)) >= 0; j++)
                XP_TRY(see(s, row++, e, s->peers[r], slot / 64, slot % 64));
            MUST(*(const int64_t *)xp_tensor_at(&s->d.recv_counts, r, l, 0, 0) == j, "recv_counts[%d][%d]", r, (int)l);
        }
        for (; row % s->c->align != 0; row++)
            XP_TRY(see(s, row, e, -1, -1, -1));
    }
    MUST(get_i64(&s->d.recv_offsets, E_PER_RANK) == row, "recv_offsets end");
    return XP_OK;
}

static xp_status see_recv(const layer *s, int64_t row, int64_t e, int owner, int64_t t, int64_t k) {
    (void)e;
    MUST(get_i64(&s->d.recv_tok, row) == (k < 0 ? -1 : 1000 * owner + t), "recv_tok[%d] is %d", (int)row,
         (int)get_i64(&s->d.recv_tok, row));
    for (int64_t h = 0; h < H; h++) {
        const double want = k < 0 ? 0.0 : x_of(s->c, owner, t, h);
        MUST(get(&s->d.recv, row, h) == want, "recv[%d][%d] is %g, not %g", (int)row, (int)h, get(&s->d.recv, row, h),
             want);
    }
    return XP_OK;
}

/* The expert: out = factor * recv, pads stay zero. */
static xp_status make_out(const layer *s, int64_t row, int64_t e, int owner, int64_t t, int64_t k) {
    (void)owner;
    (void)t;
    for (int64_t h = 0; h < H; h++)
        set(&s->out, row, h, k < 0 ? 0.0 : factor_of(e) * get(&s->d.recv, row, h));
    return XP_OK;
}

static xp_status see_dout(const layer *s, int64_t row, int64_t e, int owner, int64_t t, int64_t k) {
    for (int64_t h = 0; h < H; h++) {
        const double want = k < 0 ? 0.0 : w_of(owner, t, k) * dy_of(owner, t, h);
        MUST(get(&s->dout, row, h) == want, "dout[%d][%d] is %g, not %g", (int)row, (int)h, get(&s->dout, row, h),
             want);
        set(&s->drecv, row, h, k < 0 ? 77.0 : factor_of(e) * want); /* a pad's gradient must go nowhere */
    }
    return XP_OK;
}

/* Rows at home: back, or drows, is scale(t, k) * value, pads zero, the rest untouched. */
static xp_status see_home(const layer *s, const xp_tensor *home, int gradient) {
    const int64_t experts = s->p.counts.dim[0];
    for (int64_t e = 0; e < experts; e++) {
        for (int64_t row = get_i64(&s->p.offsets, e); row < get_i64(&s->p.offsets, e + 1); row++) {
            const int64_t slot = slot_of(s->c, s->rank, e, row - get_i64(&s->p.offsets, e));
            for (int64_t h = 0; h < H; h++) {
                double want = 0.0;
                if (slot >= 0)
                    want = factor_of(e) * (gradient ? w_of(s->rank, slot / 64, slot % 64) * dy_of(s->rank, slot / 64, h)
                                                    : x_of(s->c, s->rank, slot / 64, h));
                MUST(get(home, row, h) == want, "row %d of %s is %g, not %g", (int)row, gradient ? "drows" : "back",
                     get(home, row, h), want);
            }
        }
    }
    MUST(untouched(home, get_i64(&s->p.offsets, experts)), "a row behind the last was written");
    return XP_OK;
}

static xp_status layer_combine(layer *s) {
    s->out = matrix(s->c->act, s->d.recv.dim[0], H);
    s->back = matrix(s->c->act, s->p.rows.dim[0], H);
    s->y = matrix(s->c->act, s->p.x.dim[0], H);
    XP_TRY(received_walk(s, make_out));
    static const xp_dialect plain = {.name = "plain", .scale = 1.0};
    const xp_combine_args a = {.out = s->out,
                               .recv_counts = s->d.recv_counts,
                               .recv_offsets = s->d.recv_offsets,
                               .counts = s->p.counts,
                               .offsets = s->p.offsets,
                               .pos = s->p.pos,
                               .idx = s->p.idx,
                               .w = s->w,
                               .back = s->back,
                               .y = s->y,
                               .dialect = &plain};
    XP_TRY(run_kernel(&xp_ref_combine, s->m, &a));
    XP_TRY(properties_hold(&xp_stage_combine, s->m, &a));
    XP_TRY(see_home(s, &s->back, 0));
    for (int64_t t = 0; t < s->p.x.dim[0]; t++) {
        for (int64_t h = 0; h < H; h++) {
            double want = 0.0;
            for (int64_t k = 0; k < K; k++)
                want += w_of(s->rank, t, k) * factor_of(idx_of(s->c, s->rank, t, k)) * x_of(s->c, s->rank, t, h);
            MUST(get(&s->y, t, h) == xp_ref_round(want, s->c->act), "y[%d][%d] is %g, not %g", (int)t, (int)h,
                 get(&s->y, t, h), want);
        }
    }
    MUST(untouched(&s->y, s->y.dim[0]), "a gap of y was written");
    return XP_OK;
}

static xp_status layer_combine_bwd(layer *s) {
    static const xp_dialect plain = {.name = "plain", .scale = 1.0};
    s->dw = matrix(s->c->act == XP_F64 ? XP_F64 : XP_F32, s->p.x.dim[0], K);
    s->dout = matrix(s->c->act, s->d.recv.dim[0], H);
    s->drecv = matrix(s->c->act, s->d.recv.dim[0], H);
    const xp_combine_bwd_args a = {.dy = s->dy,
                                   .back = s->back,
                                   .w = s->w,
                                   .pos = s->p.pos,
                                   .counts = s->p.counts,
                                   .offsets = s->p.offsets,
                                   .recv_counts = s->d.recv_counts,
                                   .recv_offsets = s->d.recv_offsets,
                                   .dw = s->dw,
                                   .dout = s->dout,
                                   .dialect = &plain};
    XP_TRY(run_kernel(&xp_ref_combine_bwd, s->m, &a));
    XP_TRY(received_walk(s, see_dout));
    MUST(untouched(&s->dout, get_i64(&s->d.recv_offsets, E_PER_RANK)), "a row behind dout's last was written");
    for (int64_t t = 0; t < s->p.x.dim[0]; t++) {
        for (int64_t k = 0; k < K; k++) {
            double want = 0.0;
            for (int64_t h = 0; h < H; h++)
                want += dy_of(s->rank, t, h) * factor_of(idx_of(s->c, s->rank, t, k)) * x_of(s->c, s->rank, t, h);
            MUST(get(&s->dw, t, k) == want, "dw[%d][%d] is %g, not %g", (int)t, (int)k, get(&s->dw, t, k), want);
        }
    }
    return XP_OK;
}

static xp_status layer_dispatch_bwd(layer *s) {
    s->drows = matrix(s->c->act, s->p.rows.dim[0], H);
    s->dx = matrix(s->c->act, s->p.x.dim[0], H);
    xp_dispatch_bwd_args a = {.drecv = s->drecv,
                              .recv_counts = s->d.recv_counts,
                              .recv_offsets = s->d.recv_offsets,
                              .counts = s->p.counts,
                              .offsets = s->p.offsets,
                              .drows = s->drows};
    XP_TRY(run_kernel(&xp_ref_dispatch_bwd, s->m, &a));
    XP_TRY(properties_hold(&xp_stage_dispatch_bwd, s->m, &a));
    XP_TRY(see_home(s, &s->drows, 1));
    const xp_permute_bwd_args b = {.drows = s->drows, .pos = s->p.pos, .dx = s->dx};
    XP_TRY(run_kernel(&xp_ref_permute_bwd, s->m, &b));
    for (int64_t t = 0; t < s->p.x.dim[0]; t++) {
        for (int64_t h = 0; h < H; h++) {
            double want = 0.0;
            for (int64_t k = 0; k < K; k++)
                want += factor_of(idx_of(s->c, s->rank, t, k)) * w_of(s->rank, t, k) * dy_of(s->rank, t, h);
            MUST(get(&s->dx, t, h) == xp_ref_round(want, s->c->act), "dx[%d][%d]", (int)t, (int)h);
        }
    }
    /* there and back again: the rows themselves */
    a.drecv = s->d.recv;
    a.drows = matrix(s->c->act, s->p.rows.dim[0], H);
    XP_TRY(run_kernel(&xp_ref_dispatch_bwd, s->m, &a));
    for (int64_t row = 0; row < get_i64(&s->p.offsets, s->p.counts.dim[0]); row++)
        MUST(memcmp(xp_tensor_at(&a.drows, row, 0, 0, 0), xp_tensor_at(&s->p.rows, row, 0, 0, 0),
                    xp_dtype_bytes(s->c->act, H)) == 0,
             "row %d did not come home as it left", (int)row);
    return XP_OK;
}

static xp_status layer_rank(const xp_mesh *m, int rank, void *arg) {
    const layer_case *c = arg;
    layer s;
    layer_open(&s, c, m, rank);
    XP_TRY(layer_dispatch(&s));
    XP_TRY(received_walk(&s, see_recv));
    MUST(untouched(&s.d.recv, get_i64(&s.d.recv_offsets, E_PER_RANK)), "a row behind recv's last was written");
    MUST(untouched(&s.d.recv_tok, get_i64(&s.d.recv_offsets, E_PER_RANK)), "recv_tok behind its last was written");
    XP_TRY(layer_combine(&s));
    XP_TRY(layer_combine_bwd(&s));
    XP_TRY(layer_dispatch_bwd(&s));
    return pool_close();
}

static const char *const meshes[] = {
    "fsdp=1",      "fsdp=2,ep=2",      "fsdp=3,ep=3",         "dp=2,fsdp=2,ep=2,ep_fsdp=1",
    "fsdp=6,ep=2", "dp=2,fsdp=4,ep=4", "fsdp=8,ep=8,jitter=3"};
enum { MESHES = sizeof meshes / sizeof *meshes };
static xp_mesh_report report;

static void layer_meshes(void **state) {
    static const xp_dtype acts[4] = {XP_F32, XP_BF16, XP_F64, XP_F16};
    (void)state;
    for (int i = 0; i < MESHES; i++) {
        for (int v = 0; v < 8; v++) {
            layer_case c = {.route = (routing)(v % ROUTES), .act = acts[v % 4], .short_rank = -1};
            c.order = v / 2 % 2;
            c.align = v / 4 ? 16 : 1;
            suite_spec(meshes[i], &c.spec);
            suite_run(meshes[i], layer_rank, &c, &report);
            suite_expect_ok(meshes[i], &report);
        }
    }
}

/* Only the rank whose buffer is short has an error of its own, and nobody hangs. */
static xp_status short_rank(const xp_mesh *m, int rank, void *arg) {
    layer s;
    layer_open(&s, arg, m, rank);
    const xp_status st = layer_dispatch(&s);
    for (int i = 0; i < pool.n; i++)
        free(pool.p[i]);
    pool.n = 0;
    return st;
}

static void dispatch_short_capacity(void **state) {
    layer_case c = {.route = ROUTE_RANK0, .act = XP_F32, .align = 1, .short_rank = 0};
    (void)state;
    suite_spec("fsdp=4,ep=4", &c.spec);
    suite_run("fsdp=4,ep=4", short_rank, &c, &report);
    assert_int_equal(report.end[0].status, XP_E_ARG);
    assert_non_null(strstr(report.end[0].text, "recv has C = 2 rows, expected at least 33"));
    for (int r = 1; r < 4; r++)
        assert_int_equal(report.end[r].status, XP_E_PEER);
    assert_non_null(strstr(report.end[3].text, "ep rank 0"));
}

/* ---- combine: rounding and bounds, on one rank ---- */

typedef struct {
    xp_dialect dialect;
    xp_combine_args f;
    xp_combine_bwd_args b;
} combine_case;

/* T tokens with `slots` experts each, slot k of every token at expert (k * 5 + 2) % 7; out holds one row a slot. */
static void combine_make(combine_case *c, int64_t tokens, int64_t slots, int64_t width, xp_dtype act) {
    enum { EXPERTS = 7 };
    memset(c, 0, sizeof *c);
    c->dialect = (xp_dialect){.name = "test", .scale = 1.0};
    const int64_t rows = tokens * slots;
    c->f = (xp_combine_args){.out = matrix(act, rows, width),
                             .recv_counts = matrix(XP_I64, 1, EXPERTS),
                             .recv_offsets = vector(XP_I64, EXPERTS + 1),
                             .counts = vector(XP_I64, EXPERTS),
                             .offsets = vector(XP_I64, EXPERTS + 1),
                             .pos = matrix(XP_I32, tokens, slots),
                             .idx = matrix(XP_I32, tokens, slots),
                             .w = matrix(XP_F32, tokens, slots),
                             .back = matrix(act, rows, width),
                             .y = matrix(act, tokens, width),
                             .dialect = &c->dialect};
    int64_t row = 0;
    for (int64_t e = 0; e < EXPERTS; e++) {
        set(&c->f.offsets, e, 0, (double)row);
        set(&c->f.recv_offsets, e, 0, (double)row);
        for (int64_t k = 0; k < slots; k++) {
            if ((k * 5 + 2) % EXPERTS != e)
                continue;
            for (int64_t t = 0; t < tokens; t++, row++) {
                set(&c->f.idx, t, k, (double)e);
                set(&c->f.pos, t, k, (double)row);
                set(&c->f.w, t, k, 0.5 + 0.5 * real(3, (uint64_t)t, (uint64_t)k));
                for (int64_t h = 0; h < width; h++)
                    set(&c->f.out, row, h, real(4, (uint64_t)row, (uint64_t)h));
            }
        }
        set(&c->f.counts, e, 0, (double)(row - get_i64(&c->f.offsets, e)));
        set(&c->f.recv_counts, 0, e, (double)(row - get_i64(&c->f.offsets, e)));
    }
    set(&c->f.offsets, EXPERTS, 0, (double)row);
    set(&c->f.recv_offsets, EXPERTS, 0, (double)row);
    c->b = (xp_combine_bwd_args){.dy = matrix(act, tokens, width),
                                 .back = c->f.back,
                                 .w = c->f.w,
                                 .pos = c->f.pos,
                                 .counts = c->f.counts,
                                 .offsets = c->f.offsets,
                                 .recv_counts = c->f.recv_counts,
                                 .recv_offsets = c->f.recv_offsets,
                                 .dw = matrix(act == XP_F64 ? XP_F64 : XP_F32, tokens, slots),
                                 .dout = matrix(act, rows, width),
                                 .dialect = &c->dialect};
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < width; h++)
            set(&c->b.dy, t, h, real(5, (uint64_t)t, (uint64_t)h));
    }
}

static xp_status modes_rank(const xp_mesh *m, int rank, void *arg) {
    /* slots 0, 1, 2 lie at experts 2, 0, 5 */
    static const struct {
        double row[3], slots_f32, eager_act;
    } hand[] = {
        {{1, 256, 1}, 258, 256}, /* eager: 256 first, then each 1 is lost at the tie */
        {{256, 1, 1}, 258, 256}, /* eager: 1 + 256 is a tie to 256, then + 1 again */
        {{1, 1, 256}, 258, 258}, /* eager: 2 comes together before 256 */
    };
    (void)rank;
    (void)arg;
    for (size_t i = 0; i < sizeof hand / sizeof *hand; i++) {
        combine_case c;
        combine_make(&c, 1, 3, 1, XP_BF16);
        for (int k = 0; k < 3; k++) {
            set(&c.f.out, get_i32(&c.f.pos, 0, k), 0, hand[i].row[k]);
            set(&c.f.w, 0, k, 1.0);
        }
        XP_TRY(run_kernel(&xp_ref_combine, m, &c.f));
        MUST(get(&c.f.y, 0, 0) == hand[i].slots_f32, "slots_f32: %g", get(&c.f.y, 0, 0));
        c.dialect.accumulate = XP_ACC_EAGER_ACT;
        XP_TRY(run_kernel(&xp_ref_combine, m, &c.f));
        MUST(get(&c.f.y, 0, 0) == hand[i].eager_act, "eager_act %d: %g", (int)i, get(&c.f.y, 0, 0));
        /* a product rounded before the last sum: 1.0078125 * 1.0078125 = 1.01568603515625, in bf16 1.015625 */
        set(&c.f.out, get_i32(&c.f.pos, 0, 0), 0, 0.0);
        set(&c.f.out, get_i32(&c.f.pos, 0, 1), 0, 0.0);
        set(&c.f.out, get_i32(&c.f.pos, 0, 2), 0, 1.0078125);
        set(&c.f.w, 0, 2, 1.0078125);
        c.f.y = matrix(XP_F64, 1, 1);
        XP_TRY(run_unchecked(&xp_ref_combine, m, &c.f));
        MUST(get(&c.f.y, 0, 0) == 1.015625, "eager product: %.17g", get(&c.f.y, 0, 0));
        c.dialect.accumulate = XP_ACC_SLOTS_F32;
        XP_TRY(run_unchecked(&xp_ref_combine, m, &c.f));
        MUST(get(&c.f.y, 0, 0) == 1.0078125 * 1.0078125, "wide product: %.17g", get(&c.f.y, 0, 0));
        /* weights applied before the experts count as 1, and get no gradient here */
        c.dialect.weight_at = XP_AT_INPUT;
        XP_TRY(run_unchecked(&xp_ref_combine, m, &c.f));
        MUST(get(&c.f.y, 0, 0) == 1.0078125, "input weight: %.17g", get(&c.f.y, 0, 0));
        XP_TRY(run_kernel(&xp_ref_combine_bwd, m, &c.b));
        MUST(get(&c.b.dw, 0, 0) == 0.0, "dw of an input weight");
        MUST(get(&c.b.dout, get_i32(&c.f.pos, 0, 0), 0) == get(&c.b.dy, 0, 0), "dout of an input weight");
        XP_TRY(pool_close());
    }
    return XP_OK;
}

static void combine_modes(void **state) {
    (void)state;
    suite_run("fsdp=1", modes_rank, NULL, &report);
    suite_expect_ok("fsdp=1", &report);
}

/* y by an f32 implementation, slots descending; or with every step rounded to bf16. */
static double y_other(const combine_case *c, int64_t t, int64_t h, int narrow) {
    const int64_t slots = c->f.pos.dim[1];
    float sum = 0.0f;
    double steps = 0.0;
    for (int64_t k = slots - 1; k >= 0; k--) {
        const float p = (float)get(&c->f.w, t, k) * (float)get(&c->f.back, get_i32(&c->f.pos, t, k), h);
        sum += p;
        steps = xp_ref_round(steps + xp_ref_round((double)p, XP_BF16), XP_BF16);
    }
    return narrow ? steps : xp_ref_round((double)sum, XP_BF16);
}

static xp_status y_bound_rank(const xp_mesh *m, int rank, void *arg) {
    enum { T = 40, WIDTH = 16 };
    combine_case c;
    int outside = 0, eager_outside = 0;
    (void)rank;
    (void)arg;
    combine_make(&c, T, 6, WIDTH, XP_BF16);
    c.f.y = matrix(XP_F64, T, WIDTH);
    XP_TRY(run_unchecked(&xp_ref_combine, m, &c.f));
    xp_tensor tol = matrix(XP_F64, T, WIDTH), eager_tol = matrix(XP_F64, T, WIDTH), eager_y = matrix(XP_F64, T, WIDTH);
    XP_TRY(bound_of(&xp_stage_combine, m, &c.f, "y", &c.f.y, &tol));
    combine_case e = c;
    e.f.dialect = &e.dialect;
    e.dialect.accumulate = XP_ACC_EAGER_ACT;
    e.f.y = eager_y;
    XP_TRY(run_unchecked(&xp_ref_combine, m, &e.f));
    XP_TRY(bound_of(&xp_stage_combine, m, &e.f, "y", &e.f.y, &eager_tol));
    for (int64_t t = 0; t < T; t++) {
        for (int64_t h = 0; h < WIDTH; h++) {
            const double want = get(&c.f.y, t, h), eager = get(&eager_y, t, h);
            MUST(fabs(y_other(&c, t, h, 0) - want) <= get(&tol, t, h), "f32 sum outside at %d,%d", (int)t, (int)h);
            /* eager allows rounding at each step as well as none at all */
            MUST(fabs(y_other(&c, t, h, 1) - eager) <= get(&eager_tol, t, h), "rounded steps outside");
            MUST(fabs(want - eager) <= get(&eager_tol, t, h), "unrounded sum outside");
            outside += fabs(y_other(&c, t, h, 1) - want) > get(&tol, t, h);
            /* a slot that is left out is seen in either mode */
            const double lost = get(&c.f.w, t, 1) * get(&c.f.back, get_i32(&c.f.pos, t, 1), h);
            eager_outside += fabs(lost) > get(&eager_tol, t, h);
        }
    }
    MUST(outside > T * WIDTH / 4, "bf16 sums outside the bound: %d of %d", outside, T * WIDTH);
    MUST(eager_outside > T * WIDTH / 4, "lost slots outside the eager bound: %d of %d", eager_outside, T * WIDTH);
    return pool_close();
}

static xp_status bwd_bound_rank(const xp_mesh *m, int rank, void *arg) {
    enum { T = 40, WIDTH = 64, SLOTS = 4 };
    combine_case c;
    int narrow_outside = 0, weights_outside = 0;
    (void)rank;
    (void)arg;
    combine_make(&c, T, SLOTS, WIDTH, XP_BF16);
    XP_TRY(run_kernel(&xp_ref_combine, m, &c.f));
    c.b.dw = matrix(XP_F64, T, SLOTS);
    c.b.dout = matrix(XP_F64, T * SLOTS, WIDTH);
    XP_TRY(run_unchecked(&xp_ref_combine_bwd, m, &c.b));
    xp_tensor dw_tol = matrix(XP_F64, T, SLOTS), dout_tol = matrix(XP_F64, T * SLOTS, WIDTH);
    XP_TRY(bound_of(&xp_stage_combine_bwd, m, &c.b, "dw", &c.b.dw, &dw_tol));
    XP_TRY(bound_of(&xp_stage_combine_bwd, m, &c.b, "dout", &c.b.dout, &dout_tol));
    for (int64_t t = 0; t < T; t++) {
        for (int64_t k = 0; k < SLOTS; k++) {
            const int64_t row = get_i32(&c.b.pos, t, k);
            const double w = get(&c.b.w, t, k), w16 = xp_ref_round(w, XP_BF16);
            float down = 0.0f;
            double narrow = 0.0;
            for (int64_t h = WIDTH - 1; h >= 0; h--) {
                const float p = (float)get(&c.b.dy, t, h) * (float)get(&c.b.back, row, h);
                const double want = get(&c.b.dout, row, h), dy = get(&c.b.dy, t, h), limit = get(&dout_tol, row, h);
                down += p;
                narrow = xp_ref_round(narrow + (double)p, XP_BF16);
                MUST(fabs(xp_ref_round((double)((float)w * (float)dy), XP_BF16) - want) <= limit, "dout outside");
                weights_outside += fabs(xp_ref_round(w16 * dy, XP_BF16) - want) > limit;
            }
            MUST(fabs((double)down - get(&c.b.dw, t, k)) <= get(&dw_tol, t, k), "dw outside");
            narrow_outside += fabs(narrow - get(&c.b.dw, t, k)) > get(&dw_tol, t, k);
        }
    }
    MUST(narrow_outside > T * SLOTS / 2, "bf16 dot products outside: %d", narrow_outside);
    MUST(weights_outside > 0, "a weight rounded to bf16 is never seen");
    return pool_close();
}

static void combine_bounds(void **state) {
    (void)state;
    suite_run("fsdp=1", y_bound_rank, NULL, &report);
    suite_expect_ok("fsdp=1", &report);
    suite_run("fsdp=1", bwd_bound_rank, NULL, &report);
    suite_expect_ok("fsdp=1", &report);
}

/* A wrong row, or a row in the wrong count, is seen by the properties of the movement. */
static xp_status moved_rank(const xp_mesh *m, int rank, void *arg) {
    layer s;
    double r = 0.0;
    layer_open(&s, arg, m, rank);
    XP_TRY(layer_dispatch(&s));
    if (rank == 0)
        set(&s.d.recv, 0, 1, get(&s.d.recv, 0, 1) + 1.0);
    XP_TRY(xp_stage_dispatch.property[1].residual(&s.d, m, &r));
    MUST(r > 1.0, "a changed element of recv was not seen");
    if (rank == 1)
        set(&s.d.recv_tok, 0, 0, 1.0);
    XP_TRY(xp_stage_dispatch.property[2].residual(&s.d, m, &r));
    MUST(r > 1.0, "a changed token of recv_tok was not seen");
    set(&s.d.recv_offsets, 1, 0, (double)get_i64(&s.d.recv_offsets, 1) + 1.0);
    XP_TRY(xp_stage_dispatch.property[0].residual(&s.d, m, &r));
    MUST(r > 1.0, "a shifted segment was not seen");
    return pool_close();
}

static void row_properties_see(void **state) {
    layer_case l = {.route = ROUTE_RANDOM, .act = XP_F32, .align = 1, .short_rank = -1};
    (void)state;
    suite_spec("fsdp=2,ep=2", &l.spec);
    suite_run("fsdp=2,ep=2", moved_rank, &l, &report);
    suite_expect_ok("fsdp=2,ep=2", &report);
}

/* ---- costs ---- */

static void row_costs(void **state) {
    xp_mesh two = lone_mesh(2), one = lone_mesh(1);
    xp_cost c;
    (void)state;
    permute_case p = permute_hand(1, 0);
    assert_int_equal(run_kernel(&xp_ref_permute, &p.m, &p.a), XP_OK);
    xp_stage_permute.cost(&p.a, &one, &c);
    assert_true(c.flop == 0 && c.net_bytes == 0 && c.mem_bytes == 3 * 4 + 6 * (4 + 20) + 16 * 3);
    /* rank 0 of two owns experts 0 and 1 of 4; counts 2 1 3 4: 7 rows leave, and half of the counts */
    xp_dispatch_args d = {.rows = matrix(XP_BF16, 10, 8),
                          .tok = vector(XP_I64, 10),
                          .counts = vector(XP_I64, 4),
                          .offsets = vector(XP_I64, 5),
                          .recv = matrix(XP_BF16, 10, 8),
                          .recv_counts = matrix(XP_I64, 2, 2)};
    const double counts[4] = {2, 1, 3, 4};
    for (int e = 0; e < 4; e++)
        set(&d.counts, e, 0, counts[e]);
    xp_stage_dispatch.cost(&d, &two, &c);
    assert_true(c.net_bytes == 7 * (16 + 8) + 16 && c.mem_bytes == 2 * 10 * 24 + 64);
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- refusals ---- */

static int32_t bad_index[2][2] = {{0, 3}, {0, 0}};
static int64_t bad_counts[3] = {1, 9, 0}, bad_offsets[4] = {0, 1, 2, 99}, late_offsets[4] = {1, 2, 2, 6};

SPOIL(p_ndim, xp_permute_args, a->idx.ndim = 1)
SPOIL(p_dim, xp_permute_args, a->pos.dim[1] = 7)
SPOIL(p_negative, xp_permute_args, a->x.dim[0] = -1)
SPOIL(p_dtype, xp_permute_args, a->x.dtype = XP_I32)
SPOIL(p_group, xp_permute_args, a->rows.dtype = XP_F16)
SPOIL(p_stride, xp_permute_args, a->rows.stride[1] = 2)
SPOIL(p_absent, xp_permute_args, a->tok.data = NULL)
SPOIL(p_offsets, xp_permute_args, a->offsets.dim[0] = 3)
SPOIL(p_order, xp_permute_args, a->order = 2)
SPOIL(p_align, xp_permute_args, a->align = 8)
SPOIL(p_room, xp_permute_args, a->align = 16)
SPOIL(p_token0, xp_permute_args, a->token0 = -1)
SPOIL(p_index, xp_permute_args, a->idx.data = bad_index; a->idx.stride[0] = 0)
static const refusal permute_refusals[] = {
    {p_ndim, "idx has 1 dimensions, expected [T,K]"},
    {p_dim, "pos dim 1 is 7, expected K = 2"},
    {p_negative, "x dim 0 is -1, expected T >= 0"},
    {p_dtype, "x has dtype i32, expected f64|f32|bf16|f16"},
    {p_group, "rows has dtype f16, expected bf16, as x has"},
    {p_stride, "rows has stride 2 in its last dimension, expected 1"},
    {p_absent, "tok is absent, expected [M]"},
    {p_offsets, "offsets dim 0 is 3, expected E+1 = 4"},
    {p_order, "order is 2, expected 0 (slot_token) or 1 (token)"},
    {p_align, "align is 8, expected 1, 16 or 128"},
    {p_room, "M is 8, expected at least T*K + E*(least+align-1) = 51"},
    {p_token0, "token0 is -1, expected >= 0"},
    {p_index, "idx[0][1] is 3, expected -1 to 2, the last of E = 3 and 0 null experts"},
};

SPOIL(pb_row, xp_permute_bwd_args, a->pos.data = bad_index; a->pos.stride[0] = 0; a->drows.dim[0] = 3)
SPOIL(pb_dtype, xp_permute_bwd_args, a->dx.dtype = XP_F32)
static const refusal permute_bwd_refusals[] = {
    {pb_row, "pos[0][1] is 3, expected -1 to M-1 = 2"},
    {pb_dtype, "dx has dtype f32, expected bf16, as drows has"},
};

SPOIL(d_align, xp_dispatch_args, a->align = 0)
SPOIL(d_ranks, xp_dispatch_args, a->recv_counts.dim[0] = 2)
SPOIL(d_local, xp_dispatch_args, a->recv_counts.dim[1] = 2; a->recv_offsets.dim[0] = 3)
SPOIL(d_count, xp_dispatch_args, a->counts.data = bad_counts)
SPOIL(d_offsets, xp_dispatch_args, a->offsets.data = bad_offsets)
SPOIL(d_late, xp_dispatch_args, a->offsets.data = late_offsets)
SPOIL(d_width, xp_dispatch_args, a->recv.dim[1] = 9)
static const refusal dispatch_refusals[] = {
    {d_align, "align is 0, expected 1, 16 or 128"},
    {d_ranks, "recv_counts dim 0 is 2, expected P = 1"},
    {d_local, "recv_counts dim 1 is 2, expected L = E/P = 3/1"},
    {d_count, "counts[1] is 9, expected 0 to 0"},
    {d_offsets, "counts[0] is 2, expected 0 to 1"},
    {d_late, "offsets[0] is 1, expected 0"},
    {d_width, "recv dim 1 is 9, expected H = 2"},
};

static int64_t far_offsets[8] = {0, 1, 1, 2, 2, 2, 3, 99}, lost_counts[8], wide_counts[8] = {0, 0, 2};
static const xp_dialect no_mode = {.name = "none", .scale = 1.0, .accumulate = (xp_accumulate)4};
static const xp_dialect out_scaled = {.name = "scaled", .scale = (double)INFINITY, .scale_at = XP_SCALE_OUTPUT};
SPOIL(c_mode, xp_combine_args, a->dialect = &no_mode)
SPOIL(c_scale, xp_combine_args, a->dialect = &out_scaled)
SPOIL(c_none, xp_combine_args, a->dialect = NULL)
SPOIL(c_weight, xp_combine_args, a->w.dtype = XP_F64)
SPOIL(c_counts, xp_combine_args, a->counts.data = lost_counts)
SPOIL(c_recv, xp_combine_args, a->recv_counts.data = wide_counts)
SPOIL(c_room, xp_combine_args, a->recv_offsets.data = far_offsets)
SPOIL(c_pos, xp_combine_args, a->pos.data = bad_index)
SPOIL(c_index, xp_combine_args, a->idx.data = far_offsets + 7)
static const refusal combine_refusals[] = {
    {c_mode, "dialect none has accumulate 4, expected 0 to 3"},
    {c_scale, "dialect scaled has scale inf, expected a finite number"},
    {c_none, "dialect is absent"},
    {c_weight, "w has dtype f64, expected f32 or narrower beside rows of bf16"},
    {c_counts, "counts add up to 0, expected 3, the slots whose pos is not -1"},
    {c_recv, "recv_counts[0][2] is 2, expected 0 to 1"},
    {c_room, "recv_offsets[7] is 99, expected at most C = 3 rows"},
    {c_pos, "pos[0][1] is 3, expected -1 to M-1 = 2"},
    {c_index, "idx[0][0] is 99, expected -1 to 6, the last of E = 7 and 0 null experts"},
};

SPOIL(cb_mode, xp_combine_bwd_args, a->dialect = &no_mode)
SPOIL(cb_pos, xp_combine_bwd_args, a->pos.data = bad_index)
SPOIL(cb_dw, xp_combine_bwd_args, a->dw.dtype = XP_BF16)
static const refusal combine_bwd_refusals[] = {
    {cb_mode, "combine_bwd: dialect none has accumulate 4"},
    {cb_pos, "combine_bwd: pos[0][1] is 3"},
    {cb_dw, "dw has dtype bf16, expected f64|f32"},
};

static void row_refusals(void **state) {
    xp_mesh one = lone_mesh(1);
    (void)state;
    permute_case p = permute_hand(1, 0);
    assert_int_equal(run_kernel(&xp_ref_permute, &p.m, &p.a), XP_OK);
    REFUSE(xp_stage_permute, one, p.a, permute_refusals);
    const xp_permute_bwd_args pb = {.drows = p.a.rows, .pos = p.a.pos, .dx = matrix(XP_BF16, 3, 2)};
    REFUSE(xp_stage_permute_bwd, one, pb, permute_bwd_refusals);
    const xp_dispatch_args d = {.rows = p.a.rows,
                                .tok = p.a.tok,
                                .counts = p.a.counts,
                                .offsets = p.a.offsets,
                                .recv = matrix(XP_BF16, 8, 2),
                                .recv_tok = vector(XP_I64, 8),
                                .recv_counts = matrix(XP_I64, 1, 3),
                                .recv_offsets = vector(XP_I64, 4),
                                .align = 1};
    REFUSE(xp_stage_dispatch, one, d, dispatch_refusals);
    combine_case c;
    combine_make(&c, 1, 3, 2, XP_BF16);
    REFUSE(xp_stage_combine, one, c.f, combine_refusals);
    REFUSE(xp_stage_combine_bwd, one, c.b, combine_bwd_refusals);
    assert_int_equal(pool_close(), XP_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(permute_orders),     cmocka_unit_test(permute_alignment),
        cmocka_unit_test(permute_random),     cmocka_unit_test(permute_properties_see),
        cmocka_unit_test(permute_bwd_sums),   cmocka_unit_test(permute_bwd_bounds),
        cmocka_unit_test(layer_meshes),       cmocka_unit_test(dispatch_short_capacity),
        cmocka_unit_test(row_properties_see), cmocka_unit_test(combine_modes),
        cmocka_unit_test(combine_bounds),     cmocka_unit_test(row_costs),
        cmocka_unit_test(row_refusals),       cmocka_unit_test(permute_bwd_sums_in_act),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
