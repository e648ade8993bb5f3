/* Ranks: guarded memory and its account, and judging where ranks communicate, differ and fail alone. */
#include "arena.h"
#include "judge_suite.h"

/* ---- memory ---- */

static void with_rank(lone *l, small_backend *b, xp_rank *r) {
    lone_open(l, 1);
    backend_of(b, "ref", NULL);
    assert_int_equal(xp_rank_open(&l->mesh, &b->b, NULL, r), XP_OK);
}

static void memory_is_counted(void **state) {
    (void)state;
    lone l;
    small_backend b;
    xp_rank r;
    size_t live[XP_NKIND], peak[XP_NKIND], total;
    void *p, *q;
    with_rank(&l, &b, &r);
    assert_int_equal(xp_rank_alloc(&r, XP_KIND_PARAM, 1000, &p), XP_OK);
    assert_int_equal(xp_rank_alloc(&r, XP_KIND_GRAD, 300, &q), XP_OK);
    xp_rank_release(&r, p);
    assert_int_equal(xp_rank_alloc(&r, XP_KIND_GRAD, 100, &p), XP_OK);
    xp_rank_memory(&r, live, peak, &total);
    assert_int_equal(live[XP_KIND_PARAM], 0);
    assert_int_equal(peak[XP_KIND_PARAM], 1000);
    assert_int_equal(live[XP_KIND_GRAD], 400);
    assert_int_equal(peak[XP_KIND_GRAD], 400);
    assert_int_equal(total, 1300); /* not 1400: the parts peaked at different times */
    xp_rank_release(&r, NULL);
    xp_rank_close(&r); /* frees what is left */
}

static void tensors_are_aligned(void **state) {
    (void)state;
    lone l;
    small_backend b;
    xp_rank r;
    with_rank(&l, &b, &r);
    for (int64_t n = 0; n < 40; n++) {
        const int64_t dim[2] = {n, 7}, bad[2] = {n, -1}, huge[2] = {INT64_MAX / 8, 4};
        xp_tensor t;
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_BF16, 2, dim, &t), XP_OK);
        assert_int_equal((uintptr_t)t.data % 64, 0);
        assert_int_equal(xp_tensor_count(&t), 7 * n);
        memset(t.data, 0, (size_t)n * 14);
        xp_rank_drop(&r, &t);
        assert_null(t.data);
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_BF16, 2, bad, &t), XP_E_ARG);
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_BF16, 2, huge, &t), XP_E_ARG);
    }
    void *p;
    assert_int_equal(xp_rank_alloc(&r, XP_KIND_ACT, SIZE_MAX - 10, &p), XP_E_NOMEM);
    assert_null(p);
    xp_rank_close(&r);
}

/* Every byte of both bands, for sizes around every threshold. */
static void guards(void **state) {
    (void)state;
    lone l;
    small_backend b;
    xp_rank r;
    const size_t size[] = {0, 1, 63, 64, 65, 4095, 4096, 65536 + 3};
    with_rank(&l, &b, &r);
    for (size_t i = 0; i < sizeof size / sizeof *size; i++) {
        void *p;
        xp_damage d[2];
        xp_status st;
        assert_int_equal(xp_rank_alloc(&r, XP_KIND_ACT, size[i], &p), XP_OK);
        unsigned char *c = p;
        memset(c, 0xff, size[i]);
        assert_int_equal(xp_arena_check(r.arena, d, 2, &st), 0);
        for (int k = 1; k <= 64; k++) {
            c[-k] ^= 1;
            c[size[i] + (size_t)k - 1] ^= 1;
            assert_int_equal(xp_arena_check(r.arena, d, 2, &st), 2);
            assert_int_equal(d[0].offset, (int64_t)size[i] + k - 1);
            assert_int_equal(d[1].offset, -k);
            assert_int_equal(d[0].damaged, 1);
            assert_ptr_equal(d[0].block.data, p);
            assert_int_equal(xp_arena_check(r.arena, d, 2, &st), 0); /* repaired */
        }
        memset(c - 9, 0, 9);
        assert_int_equal(xp_arena_check(r.arena, d, 2, &st), 1);
        assert_int_equal(d[0].offset, -1);
        assert_true(d[0].damaged >= 8);
        xp_rank_release(&r, p);
    }
    xp_rank_close(&r);
}

/* ---- a stage of the whole world: y = sum of x over the ranks ---- */

typedef struct {
    xp_tensor x; /* in  [N] f32 */
    xp_tensor y; /* out [N] f32 */
    int64_t declared;
} sum_args;

static const xp_operand sum_operand[] = {
    XP_OPERAND(sum_args, x, "N", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(sum_args, y, "N", XP_OUT, XP_BIT(XP_F32), XP_BOUND, ""),
};

static xp_status sum_check(const void *args, const xp_mesh *m) {
    const sum_args *a = args;
    (void)m;
    return a->declared == a->x.dim[0] ? XP_OK : XP_FAIL(XP_E_ARG, "sum: declared is %d", (int)a->declared);
}

static xp_status sum_into(const xp_exec *x, const xp_tensor *from, xp_tensor *to, int magnitude) {
    for (int64_t i = 0; i < xp_tensor_count(from); i++) {
        const double v = xp_widen(from->data, from->dtype, i);
        xp_ref_store(to->data, to->dtype, i, magnitude ? fabs(v) : v);
    }
    xp_comm *w = x->mesh->axis[XP_WORLD];
    return w->ops->all_reduce(w, x->q, to, XP_SUM);
}

/* The bound communicates: a rank that passed over it would hang its peers. */
static xp_status sum_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    const sum_args *a = args;
    const xp_exec x = {.mesh = m};
    (void)operand;
    (void)ref;
    (void)ws;
    XP_TRY(sum_into(&x, &a->x, tol, 1));
    for (int64_t i = 0; i < xp_tensor_count(tol); i++)
        ((double *)tol->data)[i] *= xp_ref_gamma(m->axis[XP_WORLD]->size, XP_F32);
    return XP_OK;
}

static const xp_stage sum_stage = {
    .name = "sum",
    .meaning = "sum over the world",
    .axis = XP_WORLD,
    .args_size = sizeof(sum_args),
    .operand = sum_operand,
    .operands = 2,
    .check = sum_check,
    .bound = sum_bound,
};

typedef enum {
    RIGHT,
    WRONG_ON_2,
    LATE_ON_1,
    REFUSED_ON_1,
    CHECK_ON_1,
    COUNTS_ON_1,
    MISSING_ON_1,
    NONDET_ON_0,
    FIRST_ON_2
} plan;
static plan planned; /* written before the ranks start */
static _Thread_local int calls;

static xp_status sum_right(const xp_exec *x, const void *args) {
    const sum_args *a = args;
    xp_tensor y = a->y;
    return sum_into(x, &a->x, &y, 0);
}

static xp_status sum_tested(const xp_exec *x, const void *args) {
    const sum_args *a = args;
    const int rank = x->mesh->axis[XP_WORLD]->rank;
    calls++;
    if (planned == REFUSED_ON_1 && rank == 1)
        return XP_FAIL(XP_E_DEVICE, "sum: rank 1 is out of order");
    if (planned == COUNTS_ON_1 && rank == 1) {
        xp_tensor y = xp_tensor_rows(&a->y, 0, 0, 1);
        xp_comm *w = x->mesh->axis[XP_WORLD];
        return w->ops->all_reduce(w, x->q, &y, XP_SUM);
    }
    XP_TRY(sum_right(x, args));
    if (planned == WRONG_ON_2 && rank == 2)
        ((float *)a->y.data)[4] *= 2.0f;
    if (planned == FIRST_ON_2 && ((rank == 0 && calls > 2) || (rank == 2 && calls <= 2)))
        ((float *)a->y.data)[4] *= 2.0f;
    if (planned == NONDET_ON_0 && rank == 0 && calls == 2)
        ((float *)a->y.data)[4] = nextafterf(((float *)a->y.data)[4], 1e30f);
    return planned == LATE_ON_1 && rank == 1 ? XP_FAIL(XP_E_DEVICE, "sum: too late") : XP_OK;
}

static const char *sum_why_not(const void *args, const xp_mesh *m) {
    (void)args;
    return planned == MISSING_ON_1 && m->axis[XP_WORLD]->rank == 1 ? "rank 1 has no such unit" : NULL;
}

static const xp_kernel sum_judge = {.stage = &sum_stage, .name = "judge", .run = sum_right};
static const xp_kernel sum_row = {
    .stage = &sum_stage, .name = "k1", .det = XP_DET_RUN, .why_not = sum_why_not, .run = sum_tested};

static small_backend impl, ref; /* filled before the ranks start */

typedef struct {
    xp_judge *judge[8];
    xp_status ended[8];
} world;

static xp_status sum_rank(const xp_mesh *mesh, int rank, void *arg) {
    world *w = arg;
    const int64_t n = 8;
    xp_rank r;
    sum_args a = {.declared = planned == CHECK_ON_1 && rank == 1 ? 9 : 8};
    calls = 0;
    const xp_judge_options o = {.ref = &ref.b, .twice = XP_TWICE_FIRST};
    XP_TRY(xp_rank_open(mesh, &impl.b, &ref.b, &r));
    XP_TRY(xp_judge_open(&o, &w->judge[rank]));
    r.judge = w->judge[rank];
    XP_TRY(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 1, &n, &a.x));
    XP_TRY(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 1, &n, &a.y));
    for (int64_t i = 0; i < n; i++)
        ((float *)a.x.data)[i] = 0.1f * (float)(i + 1) * (float)(rank + 1);
    xp_status st = XP_OK;
    for (int i = 0; i < 2 && st == XP_OK; i++)
        st = xp_call(&r, &sum_stage, "sum", &a);
    w->ended[rank] = st;
    if (st != XP_OK) /* its peers have been woken: this meets nobody, and makes no quarrel of another kind */
        mesh->axis[XP_WORLD]->ops->barrier(mesh->axis[XP_WORLD], r.q);
    xp_rank_close(&r);
    return st;
}

static void judge_world(plan p, int ranks, xp_judgement *g, world *w) {
    char text[32];
    xp_mesh_spec s;
    xp_mesh_report end;
    memset(w, 0, sizeof *w);
    planned = p;
    backend_of(&impl, "impl", &sum_row);
    backend_of(&ref, "ref", &sum_judge);
    snprintf(text, sizeof text, "sim:fsdp=%d", ranks);
    assert_int_equal(xp_mesh_spec_parse(text, &s), XP_OK);
    xp_mesh_run(&s, sum_rank, w, &end);
    assert_int_equal(end.stuck, 0);
    assert_int_equal(xp_judgement_make(w->judge, ranks, &end, XP_EXPECT_NONE, g), XP_OK);
}

static void close_world(xp_judgement *g, world *w) {
    xp_judgement_close(g);
    for (int i = 0; i < 8; i++)
        xp_judge_close(w->judge[i]);
}

static void world_agrees(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= 8; ranks++) {
        xp_judgement g;
        world w;
        judge_world(RIGHT, ranks, &g, &w);
        assert_int_equal(g.verdict, XP_V_PASS);
        assert_int_equal(g.elements, 2 * 8 * ranks);
        assert_int_equal(g.lines, 1);
        close_world(&g, &w);
    }
}

static void wrong_on_one_rank(void **state) {
    (void)state;
    xp_judgement g;
    world w;
    judge_world(WRONG_ON_2, 4, &g, &w);
    assert_int_equal(g.verdict, XP_V_FAIL);
    const xp_finding *f = line_of(&g, "y");
    assert_int_equal(f->cls, XP_C_BOUND);
    assert_int_equal(f->rank, 2);
    assert_int_equal(f->first.rank, 2);
    assert_int_equal(f->worst.rank, 2);
    assert_int_equal(f->first.index[0], 4);
    assert_int_equal(f->diff.wrong, 2);
    assert_non_null(strstr(g.text, "rank 2: sum y bound"));
    for (int i = 0; i < 4; i++)
        assert_int_equal(w.ended[i], XP_OK); /* a finding stops nobody */
    close_world(&g, &w);
    judge_world(NONDET_ON_0, 3, &g, &w);
    assert_int_equal(line_of(&g, "y")->cls, XP_C_NONDET);
    assert_int_equal(line_of(&g, "y")->rank, 0);
    close_world(&g, &w);
}

/* The earliest call that failed on any rank is the one that is told. */
static void earliest_failure(void **state) {
    (void)state;
    xp_judgement g;
    world w;
    judge_world(FIRST_ON_2, 3, &g, &w);
    assert_int_equal(line_of(&g, "y")->rank, 2);
    assert_int_equal(line_of(&g, "y")->fail_call, 1);
    assert_int_equal(line_of(&g, "y")->diff.wrong, 2);
    close_world(&g, &w);
}

/* A rank that cannot go on wakes the others; nobody hangs, and its own reason is the one that is told. */
static void error_on_one_rank(void **state) {
    (void)state;
    const struct {
        plan p;
        xp_status own;
        xp_class cls;
        const char *text;
    } t[] = {{REFUSED_ON_1, XP_E_DEVICE, XP_C_STATUS, "out of order"},
             {LATE_ON_1, XP_E_DEVICE, XP_C_STATUS, "too late"},
             {CHECK_ON_1, XP_E_ARG, XP_C_ARG, "declared is 9"}};
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        xp_judgement g;
        world w;
        judge_world(t[i].p, 4, &g, &w);
        assert_int_equal(g.verdict, XP_V_ERROR);
        assert_int_equal(line_of(&g, "")->cls, t[i].cls);
        assert_int_equal(line_of(&g, "")->rank, 1);
        assert_non_null(strstr(g.text, t[i].text));
        for (int k = 0; k < 4; k++)
            assert_int_equal(w.ended[k], k == 1 ? t[i].own : XP_E_PEER);
        close_world(&g, &w);
    }
}

static void collective_that_differs(void **state) {
    (void)state;
    xp_judgement g;
    world w;
    judge_world(COUNTS_ON_1, 3, &g, &w);
    assert_int_equal(g.verdict, XP_V_ERROR);
    assert_int_equal(line_of(&g, "")->cls, XP_C_COMM);
    close_world(&g, &w);
}

/* Ranks of one collective run the same backend: when one lacks the row, all take the base's, and say so. */
static void row_missing_on_one_rank(void **state) {
    (void)state;
    xp_judgement g;
    world w;
    judge_world(MISSING_ON_1, 3, &g, &w);
    assert_int_equal(g.verdict, XP_V_UNSUPPORTED);
    assert_non_null(strstr(line_of(&g, "")->text, "cannot"));
    for (int k = 0; k < 3; k++)
        assert_int_equal(w.ended[k], XP_OK);
    close_world(&g, &w);
}

/* ---- rows that move ---- */

typedef struct {
    xp_tensor counts;       /* in  [E] i64 */
    xp_tensor recv;         /* out [C,H] f32 */
    xp_tensor recv_counts;  /* out [P,L] i64 */
    xp_tensor recv_offsets; /* out [L+1] i64 */
} send_args;

static const xp_operand send_operand[] = {
    XP_OPERAND(send_args, counts, "E", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(send_args, recv, "C,H", XP_OUT, XP_BIT(XP_F32), XP_BITS, ""),
    XP_OPERAND(send_args, recv_counts, "P,L", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
    XP_OPERAND(send_args, recv_offsets, "L+1", XP_OUT, XP_BIT(XP_I64), XP_BITS, ""),
};

enum { WIDE = 128 };
static float move_value;  /* of every element; 0 in a vacuous case */
static int64_t from_peer; /* rows that arrive from the other rank, for each local expert */

static xp_status send_check(const void *args, const xp_mesh *m) {
    (void)args;
    (void)m;
    return XP_OK;
}

/* Two ranks, two local experts; three rows of its own for each, then the peer's. */
static xp_status send_run(const xp_exec *x, const void *args) {
    const send_args *a = args;
    int64_t *o = a->recv_offsets.data, *c = a->recv_counts.data;
    (void)x;
    o[0] = 0;
    for (int l = 0; l < 2; l++) {
        c[l] = 3;
        c[2 + l] = from_peer;
        o[l + 1] = o[l] + 3 + from_peer;
    }
    for (int64_t i = 0; i < o[2] * WIDE; i++)
        ((float *)a->recv.data)[i] = move_value * (float)(i + 1);
    return XP_OK;
}

static const xp_stage send_stage = {
    .name = "send",
    .meaning = "rows arrive",
    .axis = XP_EP,
    .args_size = sizeof(send_args),
    .operand = send_operand,
    .operands = 4,
    .check = send_check,
};

/* A local stage on the rows that arrived. */
typedef struct {
    xp_tensor x;       /* in  [C,H] f32 */
    xp_tensor offsets; /* in  [L+1] i64 */
    xp_tensor y;       /* out [C,H] f32 */
} local_args;

static const xp_operand local_operand[] = {
    XP_OPERAND(local_args, x, "C,H", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(local_args, offsets, "L+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(local_args, y, "C,H", XP_OUT, XP_BIT(XP_F32), XP_BITS, ""),
};

static int64_t local_extent(const void *args) {
    return ((const local_args *)args)->x.dim[0];
}

static void local_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const local_args *a = args;
    local_args *o = out;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
}

/* Copies every row that was written by send: the others hold its poison, which is copied too, and so stays poison. */
static xp_status local_run(const xp_exec *x, const void *args) {
    const local_args *a = args;
    (void)x;
    memcpy(a->y.data, a->x.data, (size_t)xp_tensor_count(&a->x) * sizeof(float));
    return XP_OK;
}

static const xp_stage local_stage = {
    .name = "local",
    .meaning = "a copy",
    .axis = XP_LOCAL,
    .args_size = sizeof(local_args),
    .operand = local_operand,
    .operands = 3,
    .check = send_check,
    .extent = local_extent,
    .slice = local_slice,
};

static const xp_kernel send_judge = {.stage = &send_stage, .name = "judge", .run = send_run};
static const xp_kernel send_row = {.stage = &send_stage, .name = "k1", .run = send_run};
static const xp_kernel local_judge = {.stage = &local_stage, .name = "judge", .run = local_run};
static const xp_kernel local_row = {.stage = &local_stage, .name = "k1", .run = local_run};

typedef struct {
    int64_t peer, away; /* rows that come, and that go */
    int64_t sample;
    size_t slice;
    xp_expect expect;
    int ranks;
} moves;

static void judge_moves(const moves *mv, xp_judgement *g) {
    const xp_kernel *const mine[] = {&send_row, &local_row, NULL}, *const judges[] = {&send_judge, &local_judge, NULL};
    const xp_backend tested = {.name = "impl", .device = &xp_ref_device, .kernel = mine};
    const xp_backend judging = {.name = "ref", .device = &xp_ref_device, .kernel = judges};
    const int64_t e = 4, ch[2] = {40, WIDE}, pl[2] = {2, 2}, lp = 3, counts[4] = {3, 3, mv->away, 0};
    const xp_judge_options o = {.ref = &judging, .sample_units = mv->sample, .slice_bytes = mv->slice};
    xp_judge *j[2] = {NULL, NULL};
    from_peer = mv->peer;
    for (int i = 0; i < mv->ranks; i++) {
        lone l;
        xp_rank r;
        send_args a = {0};
        local_args b = {0};
        lone_open(&l, 2);
        assert_int_equal(xp_rank_open(&l.mesh, &tested, &judging, &r), XP_OK);
        assert_int_equal(xp_judge_open(&o, &j[i]), XP_OK);
        r.judge = j[i];
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_I64, 1, &e, &a.counts), XP_OK);
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 2, ch, &a.recv), XP_OK);
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_I64, 2, pl, &a.recv_counts), XP_OK);
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_I64, 1, &lp, &a.recv_offsets), XP_OK);
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 2, ch, &b.y), XP_OK);
        memcpy(a.counts.data, counts, sizeof counts);
        assert_int_equal(xp_call(&r, &send_stage, "send", &a), XP_OK);
        b.x = a.recv;
        b.offsets = a.recv_offsets;
        assert_int_equal(xp_call(&r, &local_stage, "local", &b), XP_OK);
        xp_rank_close(&r);
    }
    assert_int_equal(xp_judgement_make(j, mv->ranks, NULL, mv->expect, g), XP_OK);
    xp_judge_close(j[0]);
    xp_judge_close(j[1]);
}

/* Rows of other ranks are counted where they arrive and where they are used, whole, in slices and in a sample. */
static void remote_rows(void **state) {
    (void)state;
    move_value = 1.0f;
    for (int i = 0; i < 4; i++) {
        const int ranks = 1 + i / 2;
        const moves m = {.peer = 5, .away = 2, .slice = (size_t)i & 1, .ranks = ranks};
        xp_judgement g;
        judge_moves(&m, &g);
        assert_int_equal(g.verdict, XP_V_PASS);
        assert_int_equal(line_of(&g, "recv")->remote, 10 * ranks);
        assert_int_equal(line_of(&g, "recv")->diff.elements, 16 * WIDE * ranks);
        assert_int_equal(line_of(&g, "recv")->diff.untouched, 24 * WIDE * ranks);
        assert_int_equal(line_of(&g, "y")->remote, 10 * ranks);
        assert_int_equal(line_of(&g, "recv_counts")->remote, 0);
        assert_int_equal(g.remote, 20 * ranks);
        xp_judgement_close(&g);
    }
}

static void remote_rows_of_a_sample(void **state) {
    (void)state;
    xp_judgement g;
    /* All 16 rows in use are drawn, and none of the 24 that are not. */
    moves m = {.peer = 5, .away = 2, .sample = 16, .ranks = 1};
    move_value = 1.0f;
    judge_moves(&m, &g);
    assert_int_equal(line_of(&g, "y")->diff.elements, 16 * WIDE);
    assert_int_equal(line_of(&g, "y")->remote, 10);
    xp_judgement_close(&g);
    m.sample = 8;
    judge_moves(&m, &g);
    assert_int_equal(line_of(&g, "y")->diff.elements, 8 * WIDE);
    assert_true(line_of(&g, "y")->remote >= 3 && line_of(&g, "y")->remote <= 8);
    xp_judgement_close(&g);
}

static void nothing_left_its_rank(void **state) {
    (void)state;
    xp_judgement g;
    moves m = {.ranks = 1};
    move_value = 1.0f;
    judge_moves(&m, &g);
    assert_int_equal(g.local, 1);
    assert_int_equal(g.verdict, XP_V_VACUOUS);
    assert_non_null(strstr(g.text, "no row left its rank"));
    xp_judgement_close(&g);
    m.expect = XP_EXPECT_LOCAL;
    judge_moves(&m, &g);
    assert_int_equal(g.verdict, XP_V_PASS);
    xp_judgement_close(&g);
    m.peer = 5;
    m.away = 2;
    judge_moves(&m, &g);
    assert_int_equal(g.verdict, XP_V_FAIL);
    xp_judgement_close(&g);
}

/* Counts that are right show nothing about rows that are all zero. */
static void zero_rows_with_counts(void **state) {
    (void)state;
    xp_judgement g;
    const moves m = {.peer = 5, .away = 2, .ranks = 1};
    move_value = 0.0f;
    judge_moves(&m, &g);
    assert_int_equal(line_of(&g, "recv")->verdict, XP_V_VACUOUS);
    assert_int_equal(g.zero, 1);
    assert_int_equal(g.verdict, XP_V_VACUOUS);
    xp_judgement_close(&g);
}

/* ---- memory that the host cannot read ---- */

/* Addresses of this device trap when the host uses them: only its own calls know the tag. */
static const uintptr_t tag = (uintptr_t)1 << 60;

static void *tagged(void *p) {
    return (void *)((uintptr_t)p + tag);
}
static void *real(const void *p) {
    return (void *)((uintptr_t)p - tag);
}

static xp_status far_alloc(xp_device *dev, size_t bytes, size_t align, void **out) {
    XP_TRY(xp_ref_device.alloc(dev, bytes, align, out));
    *out = tagged(*out);
    return XP_OK;
}
static void far_release(xp_device *dev, void *p) {
    xp_ref_device.release(dev, real(p));
}
static xp_status far_copy(xp_queue *q, void *dst, xp_mem to, const void *src, xp_mem from, size_t bytes) {
    (void)q;
    memcpy(to == XP_CUDA ? real(dst) : dst, from == XP_CUDA ? real(src) : src, bytes);
    return XP_OK;
}

static plan far_plan;

static xp_status far_sum(const xp_exec *x, const void *args) {
    const sum_args *a = args;
    const float *from = real(a->x.data);
    float *to = real(a->y.data);
    (void)x;
    for (int64_t i = 0; i < a->x.dim[0]; i++)
        to[i] = from[i];
    if (far_plan == WRONG_ON_2)
        to[3] += 1.0f;
    if (far_plan == LATE_ON_1)
        to[a->x.dim[0]] = 1.0f;
    if (far_plan == REFUSED_ON_1)
        ((float *)real(a->x.data))[2] = 77.0f;
    return XP_OK;
}

static size_t far_workspace(const void *args, const xp_mesh *m) {
    (void)args;
    (void)m;
    return 10000;
}

static const xp_kernel far_row = {
    .stage = &sum_stage, .name = "far", .det = XP_DET_RUN, .workspace = far_workspace, .run = far_sum};

static xp_status alone_reduce(xp_comm *c, xp_queue *q, xp_tensor *buf, xp_redop op) {
    (void)c;
    (void)q;
    (void)buf;
    (void)op;
    return XP_OK;
}

static void device_memory(void **state) {
    (void)state;
    const xp_mesh_ops alone = {.all_reduce = alone_reduce};
    xp_device_ops far = xp_ref_device;
    far.name = "far";
    far.mem = XP_CUDA;
    far.alloc = far_alloc;
    far.release = far_release;
    far.copy = far_copy;
    const struct {
        plan p;
        const char *operand;
        xp_class cls;
    } t[] = {{RIGHT, "y", XP_C_NONE},
             {WRONG_ON_2, "y", XP_C_BOUND},
             {LATE_ON_1, "y", XP_C_GUARD},
             {REFUSED_ON_1, "x", XP_C_INPUT}};
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        lone l;
        xp_rank r;
        xp_judge *j;
        xp_judgement g;
        sum_args a = {.declared = 9};
        const int64_t n = 9;
        float values[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
        lone_open(&l, 1);
        l.one.ops = &alone;
        backend_of(&impl, "far", &far_row);
        impl.b.device = &far;
        backend_of(&ref, "ref", &sum_judge);
        const xp_judge_options o = {.ref = &ref.b, .twice = XP_TWICE_FIRST};
        far_plan = t[i].p;
        assert_int_equal(xp_rank_open(&l.mesh, &impl.b, &ref.b, &r), XP_OK);
        assert_int_equal(xp_judge_open(&o, &j), XP_OK);
        r.judge = j;
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 1, &n, &a.x), XP_OK);
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 1, &n, &a.y), XP_OK);
        assert_int_equal(a.x.mem, XP_CUDA);
        assert_int_equal(far.copy(r.q, a.x.data, XP_CUDA, values, XP_HOST, sizeof values), XP_OK);
        assert_int_equal(xp_call(&r, &sum_stage, "sum", &a), XP_OK);
        assert_int_equal(xp_judgement_make(&j, 1, NULL, XP_EXPECT_NONE, &g), XP_OK);
        assert_int_equal(g.verdict, t[i].cls ? XP_V_FAIL : XP_V_PASS);
        assert_int_equal(line_of(&g, t[i].operand)->cls, t[i].cls);
        assert_int_equal(line_of(&g, "y")->diff.elements, 9);
        xp_judgement_close(&g);
        xp_judge_close(j);
        xp_rank_close(&r);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_is_counted),
        cmocka_unit_test(tensors_are_aligned),
        cmocka_unit_test(guards),
        cmocka_unit_test(world_agrees),
        cmocka_unit_test(wrong_on_one_rank),
        cmocka_unit_test(earliest_failure),
        cmocka_unit_test(error_on_one_rank),
        cmocka_unit_test(collective_that_differs),
        cmocka_unit_test(row_missing_on_one_rank),
        cmocka_unit_test(remote_rows),
        cmocka_unit_test(remote_rows_of_a_sample),
        cmocka_unit_test(nothing_left_its_rank),
        cmocka_unit_test(zero_rows_with_counts),
        cmocka_unit_test(device_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
