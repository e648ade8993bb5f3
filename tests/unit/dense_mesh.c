/* Tests of the second formulation, stages that communicate: on simulated meshes with uneven and empty ranks, against
 * what follows from the data's own numbers. It compares nothing with the reference. */
#include "dense_suite.h"
#include "mesh.h"

/* Every rank's function reports by status: an assertion belongs to the main thread. */
#define CHECK(cond)                                                                          \
    do {                                                                                     \
        if (!(cond))                                                                         \
            return XP_FAIL(XP_E_BUG, "rank %d, line %d: not so: %s", rank, __LINE__, #cond); \
    } while (0)

static void on_mesh(const char *text, xp_rank_fn fn, void *arg) {
    static xp_mesh_report report;
    xp_mesh_spec spec;
    if (xp_mesh_spec_parse(text, &spec) != XP_OK || xp_mesh_run(&spec, fn, arg, &report) != XP_OK)
        fail_msg("%s: %s", text, xp_error_text());
}

/* ---- gather and scatter ---- */

enum { G = 2, R0 = 70, N = 3 };

/* Ranges of the ranks: uneven, the second one empty. */
static void ranges(int ranks, int64_t *start, int64_t *rows) {
    int64_t at = 0;
    for (int r = 0; r < ranks; r++) {
        rows[r] = r == 1 ? 0 : (r == ranks - 1 ? R0 - at : R0 / ranks + r);
        start[r] = at;
        at += rows[r];
    }
}

static double element(int64_t g, int64_t r, int64_t n) {
    return (double)((g * R0 + r) * N + n) + 0x1p-9; /* 0x1p-9 is lost in bf16 from 2 on */
}

static xp_status gather_rank(const xp_mesh *m, int rank, void *arg) {
    (void)arg;
    const int ranks = m->axis[XP_FSDP]->size;
    static _Thread_local float shard[G * R0 * N];
    static _Thread_local uint16_t full[G * R0 * N];
    int64_t start[8], rows[8];
    ranges(ranks, start, rows);
    const int64_t mine = rows[rank];
    for (int64_t i = 0; i < G * mine * N; i++)
        shard[i] = (float)element(i / N / (mine ? mine : 1), start[rank] + i / N % (mine ? mine : 1), i % N);
    const xp_gather_args a = {.shard = xp_tensor_3d(shard, XP_F32, G, mine, N),
                              .full = xp_tensor_3d(full, XP_BF16, G, R0, N),
                              .axis = XP_FSDP,
                              .start = start,
                              .rows = rows};
    XP_TRY(dense_call(&xp_dense_gather, m, &a));
    for (int64_t i = 0; i < G * R0 * N; i++) {
        const double v = element(i / N / R0, i / N % R0, i % N);
        int e;
        const double unit = (frexp(v, &e), ldexp(1, e - 8)); /* bf16 keeps 8 bits; no value here is a tie */
        CHECK(xp_widen(full, XP_BF16, i) == nearbyint(v / unit) * unit);
    }
    return XP_OK;
}

static void test_gather(void **state) {
    (void)state;
    on_mesh("sim:fsdp=3", gather_rank, NULL);
    on_mesh("sim:fsdp=7", gather_rank, NULL);
    on_mesh("sim:fsdp=1", gather_rank, NULL);
}

/* Rank r brings r blocks in fold mode (rank 0 none), one otherwise; block j of rank r counts (r+1) (j+1). Small
 * integers: every order of summation gives the same. */
typedef struct {
    int fold, twice;
} scatter_mode;

static xp_status scatter_rank(const xp_mesh *m, int rank, void *arg) {
    const scatter_mode *mode = arg;
    const int ranks = m->axis[XP_WORLD]->size;
    static _Thread_local float grad[8 * G * R0 * N];
    static _Thread_local double shard[G * R0 * N];
    int64_t start[8], rows[8], blocks[8], b_n = mode->fold ? rank : 1;
    double all = 0;
    ranges(ranks, start, rows);
    start[0] = 0;
    rows[0] = R0; /* rank 0 holds everything: ranges may overlap */
    for (int r = 0; r < ranks; r++) {
        for (int j = 0; j < (mode->fold ? r : 1); j++)
            all += (r + 1) * (j + 1);
    }
    for (int64_t i = 0; i < COUNT(grad); i++)
        grad[i] = 1e9f; /* nobody may read behind this rank's blocks */
    for (int64_t j = 0; j < b_n; j++) {
        blocks[j] = 10 * j + (mode->twice ? 0 : rank);
        for (int64_t i = 0; i < G * R0 * N; i++)
            grad[j * G * R0 * N + i] = (float)((rank + 1) * (j + 1) * (i % 97));
    }
    xp_scatter_args a = {.shard = xp_tensor_3d(shard, XP_F64, G, rows[rank], N),
                         .axis = XP_WORLD,
                         .start = start,
                         .rows = rows,
                         .reduce_dtype = XP_F32,
                         .divisor = 4,
                         .fold_blocks = mode->fold};
    a.grad = xp_tensor_of(grad, XP_F32, 4, (const int64_t[4]){b_n, G, R0, N});
    if (mode->fold)
        a.blocks = xp_tensor_1d(blocks, XP_I64, b_n);
    const xp_status st = dense_call(&xp_dense_scatter, m, &a);
    if (mode->twice) {
        CHECK(st == XP_E_ARG && strstr(xp_error_text(), "number 0") != NULL);
        return XP_OK;
    }
    XP_TRY(st);
    for (int64_t i = 0; i < G * rows[rank] * N; i++) {
        const int64_t g = i / N / rows[rank], r = i / N % rows[rank], n = i % N;
        CHECK(shard[i] == all * (double)(((g * R0 + start[rank] + r) * N + n) % 97) / 4);
    }
    return XP_OK;
}

static void test_scatter(void **state) {
    (void)state;
    scatter_mode plain = {0, 0}, fold = {1, 0}, twice = {1, 1};
    on_mesh("sim:fsdp=3", scatter_rank, &plain);
    on_mesh("sim:dp=2,fsdp=2", scatter_rank, &plain);
    on_mesh("sim:fsdp=4", scatter_rank, &fold);
    on_mesh("sim:fsdp=4", scatter_rank, &twice);
    on_mesh("sim:fsdp=1", scatter_rank, &plain);
}

/* ---- rows to their experts and back ---- */

enum { TMAX = 9, K = 3, E = 12, H = 2, M = TMAX * K + E * 3, C = 1024 };

static int64_t tokens_of(int rank) {
    return rank == 1 ? 0 : 3 + 2 * (rank % 4);
}
static int expert_of(int rank, int64_t t, int64_t k) {
    return (int)((rank * 5 + t * t + 3 * k) % 11); /* some twice in a token, expert 11 never */
}
static double x_of(int rank, int64_t t, int64_t h) {
    return (double)(1000 * rank + 10 * t + h + 1);
}
static double w_of(int rank, int64_t t, int64_t k) {
    return (double)(rank + t + 2 * k + 1) / 8;
}

typedef struct {
    double rows[M * H], recv[C * H], out[C * H], back[M * H], y[TMAX * H], dw[TMAX * K], dout[C * H], drows[M * H];
    double x[TMAX * H], w[TMAX * K];
    int32_t idx[TMAX * K], src[M], pos[TMAX * K];
    int64_t tok[M], counts[E], offsets[E + 1], recv_tok[C], recv_counts[E * 8], recv_offsets[E + 1];
} travel;

static xp_status permute_and_dispatch(const xp_mesh *m, int rank, int align, travel *v) {
    const int64_t t_n = tokens_of(rank), l_n = E / m->axis[XP_EP]->size;
    for (int64_t t = 0; t < t_n; t++) {
        for (int64_t h = 0; h < H; h++)
            v->x[t * H + h] = x_of(rank, t, h);
        for (int64_t k = 0; k < K; k++) {
            v->idx[t * K + k] = expert_of(rank, t, k);
            v->w[t * K + k] = w_of(rank, t, k);
        }
    }
    const xp_permute_args p = {.x = xp_tensor_2d(v->x, XP_F64, t_n, H),
                               .idx = xp_tensor_2d(v->idx, XP_I32, t_n, K),
                               .rows = D2(v->rows, M),
                               .tok = L1(v->tok),
                               .src = I1(v->src),
                               .pos = xp_tensor_2d(v->pos, XP_I32, t_n, K),
                               .counts = L1(v->counts),
                               .offsets = L1(v->offsets),
                               .align = align,
                               .token0 = 100 * rank};
    XP_TRY(dense_call(&xp_dense_permute, m, &p));
    const xp_dispatch_args d = {.rows = D2(v->rows, M),
                                .tok = L1(v->tok),
                                .counts = L1(v->counts),
                                .offsets = L1(v->offsets),
                                .recv = D2(v->recv, C),
                                .recv_tok = L1(v->recv_tok),
                                .recv_counts = xp_tensor_2d(v->recv_counts, XP_I64, E / l_n, l_n),
                                .recv_offsets = xp_tensor_1d(v->recv_offsets, XP_I64, l_n + 1),
                                .align = align};
    return dense_call(&xp_dense_dispatch, m, &d);
}

/* Every copy for every local expert, by (expert, source rank, slot, token); then nothing but pads. */
static xp_status check_received(const xp_mesh *m, int rank, int align, const travel *v) {
    const int ranks = m->axis[XP_EP]->size;
    int64_t at = 0;
    for (int64_t l = 0; l < E / ranks; l++) {
        CHECK(v->recv_offsets[l] == at);
        for (int r = 0; r < ranks; r++) {
            int64_t n = 0;
            for (int64_t i = 0; i < K * tokens_of(r); i++) {
                const int64_t k = i / tokens_of(r), t = i % tokens_of(r);
                if (expert_of(r, t, k) != rank * (E / ranks) + l)
                    continue;
                CHECK(v->recv_tok[at] == 100 * r + t);
                CHECK(v->recv[at * H] == x_of(r, t, 0) && v->recv[at * H + 1] == x_of(r, t, 1));
                at++;
                n++;
            }
            CHECK(v->recv_counts[r * (E / ranks) + l] == n);
        }
        for (; at % align; at++)
            CHECK(v->recv_tok[at] == -1 && v->recv[at * H] == 0 && v->recv[at * H + 1] == 0);
    }
    CHECK(v->recv_offsets[E / ranks] == at && v->recv_tok[at] == 77 && v->recv[at * H] == 77);
    return XP_OK;
}

/* Expert e multiplies its rows by e + 1. */
static xp_status combine_and_check(const xp_mesh *m, int rank, travel *v) {
    const int64_t t_n = tokens_of(rank), l_n = E / m->axis[XP_EP]->size;
    for (int64_t l = 0; l < l_n; l++) {
        for (int64_t i = v->recv_offsets[l] * H; i < v->recv_offsets[l + 1] * H; i++)
            v->out[i] = v->recv[i] * (double)(rank * l_n + l + 1);
    }
    const xp_combine_args c = {.out = D2(v->out, C),
                               .recv_counts = xp_tensor_2d(v->recv_counts, XP_I64, E / l_n, l_n),
                               .recv_offsets = xp_tensor_1d(v->recv_offsets, XP_I64, l_n + 1),
                               .counts = L1(v->counts),
                               .offsets = L1(v->offsets),
                               .pos = xp_tensor_2d(v->pos, XP_I32, t_n, K),
                               .idx = xp_tensor_2d(v->idx, XP_I32, t_n, K),
                               .w = xp_tensor_2d(v->w, XP_F64, t_n, K),
                               .back = D2(v->back, M),
                               .y = xp_tensor_2d(v->y, XP_F64, t_n, H),
                               .dialect = &RAW};
    XP_TRY(dense_call(&xp_dense_combine, m, &c));
    for (int64_t i = 0; i < t_n * H; i++) {
        const int64_t t = i / H;
        double want = 0; /* multiples of 1/8 below 2^50: exact */
        for (int64_t k = 0; k < K; k++)
            want += w_of(rank, t, k) * (expert_of(rank, t, k) + 1) * x_of(rank, t, i % H);
        CHECK(v->y[i] == want);
    }
    for (int64_t row = 0; row < v->offsets[E]; row++)
        CHECK(v->src[row] >= 0 || v->back[row * H] == 0);
    return XP_OK;
}

/* dout, from dy = x: at the expert's rank the row is w x; home again it is in its old place. */
static xp_status backward_and_check(const xp_mesh *m, int rank, travel *v) {
    const int64_t t_n = tokens_of(rank), l_n = E / m->axis[XP_EP]->size;
    const xp_tensor recv_counts = xp_tensor_2d(v->recv_counts, XP_I64, E / l_n, l_n);
    const xp_tensor recv_offsets = xp_tensor_1d(v->recv_offsets, XP_I64, l_n + 1);
    const xp_combine_bwd_args c = {.dy = xp_tensor_2d(v->x, XP_F64, t_n, H),
                                   .back = D2(v->back, M),
                                   .w = xp_tensor_2d(v->w, XP_F64, t_n, K),
                                   .pos = xp_tensor_2d(v->pos, XP_I32, t_n, K),
                                   .counts = L1(v->counts),
                                   .offsets = L1(v->offsets),
                                   .recv_counts = recv_counts,
                                   .recv_offsets = recv_offsets,
                                   .dw = xp_tensor_2d(v->dw, XP_F64, t_n, K),
                                   .dout = D2(v->dout, C),
                                   .dialect = &RAW};
    XP_TRY(dense_call(&xp_dense_combine_bwd, m, &c));
    for (int64_t i = 0; i < v->recv_offsets[l_n]; i++) {
        /* the token tells rank and t, the row tells nothing of the slot: w is one of the slots with this expert */
        const int64_t from = v->recv_tok[i] / 100, t = v->recv_tok[i] % 100;
        int found = v->recv_tok[i] < 0 && v->dout[i * H] == 0;
        for (int64_t k = 0; v->recv_tok[i] >= 0 && k < K; k++)
            found |= v->dout[i * H + 1] == w_of((int)from, t, k) * x_of((int)from, t, 1);
        CHECK(found);
    }
    const xp_dispatch_bwd_args d = {.drecv = D2(v->dout, C),
                                    .recv_counts = recv_counts,
                                    .recv_offsets = recv_offsets,
                                    .counts = L1(v->counts),
                                    .offsets = L1(v->offsets),
                                    .drows = D2(v->drows, M)};
    XP_TRY(dense_call(&xp_dense_dispatch_bwd, m, &d));
    for (int64_t row = 0; row < v->offsets[E]; row++)
        CHECK(v->src[row] >= 0 || v->drows[row * H + 1] == 0);
    for (int64_t i = 0; i < t_n * K; i++) {
        const int64_t t = i / K, k = i % K;
        const double a = x_of(rank, t, 0), b = x_of(rank, t, 1);
        CHECK(v->drows[v->pos[i] * H + 1] == w_of(rank, t, k) * b);
        CHECK(v->dw[i] == (expert_of(rank, t, k) + 1) * (a * a + b * b));
    }
    CHECK(v->dout[v->recv_offsets[l_n] * H] == 77 && v->drows[v->offsets[E] * H] == 77);
    return XP_OK;
}

static xp_status travel_rank(const xp_mesh *m, int rank, void *arg) {
    const int align = *(const int *)arg;
    travel *v = malloc(sizeof *v);
    CHECK(v);
    for (int64_t i = 0; i < C * H; i++)
        v->recv[i] = v->dout[i] = v->out[i] = 77;
    for (int64_t i = 0; i < C; i++)
        v->recv_tok[i] = 77;
    for (int64_t i = 0; i < M * H; i++)
        v->drows[i] = v->back[i] = 77;
    xp_status st = permute_and_dispatch(m, rank, align, v);
    st = st ? st : check_received(m, rank, align, v);
    st = st ? st : combine_and_check(m, rank, v);
    st = st ? st : backward_and_check(m, rank, v);
    free(v);
    return st;
}

static void test_travel(void **state) {
    (void)state;
    int one = 1, four = 4;
    on_mesh("sim:ep=3", travel_rank, &four);
    on_mesh("sim:ep=6", travel_rank, &one);
    on_mesh("sim:ep=1", travel_rank, &four);
    on_mesh("sim:ep=4", travel_rank, &four);
}

/* ---- sums over the world ---- */

enum { V = 5, ALL = 12 };

/* The world's 12 tokens, dealt unevenly: the last rank of more than one has none. */
static void deal(int ranks, int rank, int64_t *out_lo, int64_t *out_n) {
    const int64_t dealt = ranks > 1 ? ranks - 1 : 1, each = ALL / dealt;
    *out_lo = rank < dealt ? rank * each : ALL;
    *out_n = rank >= dealt ? 0 : (rank == dealt - 1 ? ALL - *out_lo : each);
}

typedef struct {
    double loss, balance, z, prob;
} world_sums;

static xp_status sums_rank(const xp_mesh *m, int rank, void *arg) {
    const world_sums *want = arg; /* loss 0: rank 0 fills it in */
    double logits[ALL * V], lse[ALL], loss[ALL], total[1], freq[V], prob[V], bal[2];
    int32_t target[ALL], idx[ALL * 2];
    int64_t count[1], n[1], lo, t_n;
    uint8_t valid[ALL];
    draw_all(logits, ALL * V, 17);
    deal(m->axis[XP_WORLD]->size, rank, &lo, &t_n);
    for (int t = 0; t < ALL; t++) {
        target[t] = t % 5 == 4 ? -1 : t % V;
        valid[t] = t % 5 != 4;
        idx[2 * t] = t % V;
        idx[2 * t + 1] = (t + 2) % V;
    }
    const xp_xent_args x = {.logits = xp_tensor_2d(logits + lo * V, XP_F64, t_n, V),
                            .target = xp_tensor_1d(target + lo, XP_I32, t_n),
                            .lse = xp_tensor_1d(lse, XP_F64, t_n),
                            .loss = xp_tensor_1d(loss, XP_F64, t_n),
                            .total = D1(total),
                            .count = L1(count)};
    XP_TRY(dense_call(&xp_dense_xent, m, &x));
    const xp_balance_args b = {.logits = xp_tensor_3d(logits + lo * V, XP_F64, 1, t_n, V),
                               .idx = xp_tensor_3d(idx + 2 * lo, XP_I32, 1, t_n, 2),
                               .valid = xp_tensor_1d(valid + lo, XP_U8, t_n),
                               .freq = D1(freq),
                               .prob = D1(prob),
                               .loss = D1(bal),
                               .count = L1(n),
                               .scope_world = 1};
    XP_TRY(dense_call(&xp_dense_balance, m, &b));
    CHECK(count[0] == 10 && n[0] == 10);
    if (m->axis[XP_WORLD]->size == 1) {
        *(world_sums *)arg = (world_sums){total[0], bal[0], bal[1], prob[3]};
        return XP_OK;
    }
    /* the same terms in another order: 12 of them below 4 */
    CHECK(fabs(total[0] - want->loss) <= 48 * 0x1p-52 && fabs(bal[0] - want->balance) <= 48 * 0x1p-52);
    CHECK(fabs(bal[1] - want->z) <= 48 * 0x1p-52 && fabs(prob[3] - want->prob) <= 48 * 0x1p-52);
    return XP_OK;
}

static void test_world_sums(void **state) {
    (void)state;
    world_sums want = {0};
    on_mesh("sim:fsdp=1", sums_rank, &want);
    assert_true(want.loss > 0);
    on_mesh("sim:fsdp=3", sums_rank, &want);
    on_mesh("sim:dp=2,fsdp=2", sums_rank, &want);
}

/* ---- norm ---- */

/* 1000 values over all magnitudes, dealt unevenly; each rank also holds a replica that it does not own. */
static xp_status norm_rank(const xp_mesh *m, int rank, void *arg) {
    float *want = arg, grad[1001], norm[1];
    const int ranks = m->axis[XP_WORLD]->size;
    uint64_t s = 3;
    int64_t seg[3] = {0, 0, 0};
    uint8_t owner[2] = {1, 0};
    for (int i = 0; i < 1000; i++) {
        const float v = (float)ldexp(draw(&s), (int)(60 * draw(&s)));
        if ((i * i) % ranks == rank)
            grad[seg[1]++] = v;
    }
    grad[seg[1]] = 1e30f;
    seg[2] = seg[1] + 1;
    const xp_gradnorm_args a = {
        .grad = xp_tensor_1d(grad, XP_F32, seg[2]), .seg = L1(seg), .owner = B1(owner), .norm = F1(norm), .p = 2};
    XP_TRY(dense_call(&xp_dense_gradnorm, m, &a));
    if (ranks == 1)
        *want = norm[0];
    CHECK(norm[0] == *want && norm[0] < 1e20f);
    return XP_OK;
}

static void test_norm_on_every_mesh(void **state) {
    (void)state;
    float want = 0;
    on_mesh("sim:fsdp=1", norm_rank, &want);
    assert_true(want > 0);
    on_mesh("sim:fsdp=3", norm_rank, &want); /* squares mod 3: rank 2 owns nothing */
    on_mesh("sim:dp=2,fsdp=4,ep=4", norm_rank, &want);
    on_mesh("sim:fsdp=7", norm_rank, &want);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gather),
        cmocka_unit_test(test_scatter),
        cmocka_unit_test(test_travel),
        cmocka_unit_test(test_world_sums),
        cmocka_unit_test(test_norm_on_every_mesh),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
