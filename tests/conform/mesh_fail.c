/* The failure suite: what a mesh does when ranks disagree, leave, fail or never come.
 *
 * The rule under test: no rank is left behind (each ends with an error), the text names both sides with axis and number
 * of the collective, and it is found at once where it can be: a test that needs the deadline says so. */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "mesh_suite.h"

static xp_mesh_report report;

/* ---- helpers ---- */

static int64_t even_rows[XP_MESH_MAX_RANKS]; /* filled with 2 */

static int fill_even_rows(void **state) {
    (void)state;
    for (int r = 0; r < XP_MESH_MAX_RANKS; r++)
        even_rows[r] = 2;
    return 0;
}

/* Two rows to and from everybody, but this rank sends `extra` more rows to rank `to` of the axis. */
static xp_status exchange(xp_comm *c, int to, int extra) {
    static _Thread_local int32_t src[XP_MESH_MAX_RANKS * 4], dst[XP_MESH_MAX_RANKS * 2];
    int64_t send[XP_MESH_MAX_RANKS];
    memcpy(send, even_rows, sizeof send);
    send[to] += extra;
    const xp_tensor from = xp_tensor_1d(src, XP_I32, 4 * c->size);
    xp_tensor into = xp_tensor_1d(dst, XP_I32, 2 * c->size);
    return c->ops->all_to_all_v(c, NULL, &from, send, &into, even_rows);
}

static xp_status gather(xp_comm *c, const int64_t *rows, int64_t mine, int64_t all) {
    static _Thread_local int32_t src[64], dst[XP_MESH_MAX_RANKS * 4];
    const xp_tensor from = xp_tensor_1d(src, XP_I32, mine);
    xp_tensor into = xp_tensor_1d(dst, XP_I32, all);
    return c->ops->all_gather(c, NULL, &from, rows, &into);
}

static xp_status reduce(xp_comm *c, xp_dtype d, int64_t n, int64_t m, xp_redop op) {
    static _Thread_local double buf[64];
    xp_tensor t = xp_tensor_2d(buf, d, n, m);
    return c->ops->all_reduce(c, NULL, &t, op);
}

static xp_status barrier(xp_comm *c) {
    return c->ops->barrier(c, NULL);
}

static void doze(double s) {
    const struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void expect_text(int rank, const char *words) {
    if (!strstr(report.end[rank].text, words))
        fail_msg("rank %d: no \"%s\" in \"%s\"", rank, words, report.end[rank].text);
}

/* Every rank ended with an error that has these words; the run as a whole with `worst`. */
static void expect_all(xp_status worst, const char *words) {
    assert_int_equal(report.status, worst);
    assert_int_equal(report.stuck, 0);
    for (int r = 0; r < report.world; r++) {
        if (report.end[r].status == XP_OK)
            fail_msg("rank %d of %d ended well", r, report.world);
        if (words)
            expect_text(r, words);
    }
}

/* Runs a case that must need no deadline: it is far longer than the test may take. */
static void run(const char *sizes, xp_rank_fn fn) {
    char text[XP_MESH_TEXT];
    const double start = now();
    snprintf(text, sizeof text, "%s,timeout=600", sizes);
    suite_run(text, fn, NULL, &report);
    assert_true(now() - start < 60.0);
}

/* ---- ranks that disagree in one collective ---- */

static xp_status counts_rank(const xp_mesh *mesh, int rank, void *arg) {
    xp_comm *ep = mesh->axis[XP_EP];
    (void)arg;
    for (int i = 0; i < 6; i++)
        XP_TRY(exchange(ep, 0, 0));
    return exchange(ep, ep->size - 1, rank == 1);
}

static void counts_that_do_not_match(void **state) {
    (void)state;
    run("fsdp=6,ep=6", counts_rank);
    expect_all(XP_E_COMM, "all_to_all_v #7 on ep: rank 1 sends 3 rows to rank 5, which expects 2");
    for (int r = 0; r < 6; r++)
        assert_int_equal(report.end[r].status, r == 1 || r == 5 ? XP_E_COMM : XP_E_PEER);
    assert_int_equal(report.first, 1);
    assert_non_null(strstr(xp_error_text(), "rank 1: all_to_all_v #7 on ep"));
    run("fsdp=2,ep=2", counts_rank); /* the last rank itself sends to itself */
    expect_all(XP_E_COMM, "rank 1 sends 3 rows to rank 1, which expects 2");
    run("fsdp=64,ep=64", counts_rank);
    expect_all(XP_E_COMM, "rank 1 sends 3 rows to rank 63, which expects 2");
}

/* World ranks are named, whatever the axis: the second group of ep is ranks 4 to 7. */
static xp_status second_group_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    XP_TRY(exchange(mesh->axis[XP_EP], 0, rank == 6));
    return barrier(mesh->axis[XP_WORLD]);
}

static void a_group_that_fails_takes_the_world_along(void **state) {
    (void)state;
    run("dp=2,fsdp=4,ep=4,ep_fsdp=1", second_group_rank);
    expect_all(XP_E_COMM, "all_to_all_v #1 on ep: rank 6 sends 3 rows to rank 4, which expects 2");
    for (int r = 0; r < 8; r++)
        assert_int_equal(report.end[r].status, r == 4 || r == 6 ? XP_E_COMM : XP_E_PEER);
    assert_int_equal(report.first, 4);
}

static xp_status operations_rank(const xp_mesh *mesh, int rank, void *arg) {
    xp_comm *w = mesh->axis[XP_WORLD];
    (void)arg;
    XP_TRY(barrier(w));
    return rank == 2 ? barrier(w) : gather(w, even_rows, 2, 2 * w->size);
}

static void operations_that_differ(void **state) {
    (void)state;
    run("fsdp=3", operations_rank);
    expect_all(XP_E_COMM, "collective #2 on world: rank 0 calls all_gather, rank 2 calls barrier");
    assert_int_equal(report.end[0].status, XP_E_COMM);
    assert_int_equal(report.end[1].status, XP_E_PEER);
    assert_int_equal(report.end[2].status, XP_E_COMM);
}

static xp_status dtype_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    return reduce(mesh->axis[XP_FSDP], rank == 1 ? XP_BF16 : XP_F32, 2, 3, XP_SUM);
}

static xp_status shape_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    return reduce(mesh->axis[XP_FSDP], XP_F32, rank == 3 ? 3 : 2, rank == 3 ? 2 : 3, XP_SUM);
}

static xp_status length_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    return reduce(mesh->axis[XP_FSDP], XP_F32, rank == 1 ? 4 : 2, 3, XP_SUM);
}

static xp_status redop_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    return reduce(mesh->axis[XP_FSDP], XP_F32, 2, 3, rank == 0 ? XP_SUM : XP_MAX);
}

static xp_status width_rank(const xp_mesh *mesh, int rank, void *arg) {
    static _Thread_local int32_t src[64], dst[64];
    xp_comm *c = mesh->axis[XP_FSDP];
    (void)arg;
    const int64_t width = rank == 2 ? 3 : 4;
    const xp_tensor from = xp_tensor_2d(src, XP_I32, 8, width);
    xp_tensor into = xp_tensor_2d(dst, XP_I32, 2, width);
    return c->ops->reduce_scatter(c, NULL, &from, even_rows, &into, XP_SUM);
}

static xp_status brought_rank(const xp_mesh *mesh, int rank, void *arg) {
    const int64_t wrong[4] = {2, 2, 2, 1};
    (void)arg;
    return rank == 1 ? gather(mesh->axis[XP_FSDP], wrong, 2, 7) : gather(mesh->axis[XP_FSDP], even_rows, 2, 8);
}

static xp_status taken_rank(const xp_mesh *mesh, int rank, void *arg) {
    static _Thread_local int32_t src[64], dst[64];
    static const int64_t wrong[4] = {3, 2, 2, 2};
    xp_comm *c = mesh->axis[XP_FSDP];
    (void)arg;
    const xp_tensor from = xp_tensor_1d(src, XP_I32, rank == 2 ? 9 : 8);
    xp_tensor into = xp_tensor_1d(dst, XP_I32, 2);
    return c->ops->reduce_scatter(c, NULL, &from, rank == 2 ? wrong : even_rows, &into, XP_SUM);
}

static void operands_that_differ(void **state) {
    (void)state;
    run("fsdp=4", dtype_rank);
    expect_all(XP_E_COMM, "all_reduce #1 on fsdp: rank 0 has f32, rank 1 has bf16");
    run("fsdp=4", shape_rank);
    expect_all(XP_E_COMM, "all_reduce #1 on fsdp: rank 0 has a buffer of [2,3], rank 3 [3,2]");
    run("fsdp=4", length_rank);
    expect_all(XP_E_COMM, "all_reduce #1 on fsdp: rank 0 has a buffer of [2,3], rank 1 [4,3]");
    run("fsdp=4", redop_rank);
    expect_all(XP_E_COMM, "all_reduce #1 on fsdp: rank 0 reduces by sum, rank 1 by max");
    run("fsdp=4", width_rank);
    expect_all(XP_E_COMM, "reduce_scatter #1 on fsdp: rank 0 has rows of [4], rank 2 [3]");
    run("fsdp=4", brought_rank);
    expect_all(XP_E_COMM, "all_gather #1 on fsdp: rank 3 brings 2 rows, but rank 1 expects 1");
    run("fsdp=4", taken_rank);
    expect_all(XP_E_COMM, "reduce_scatter #1 on fsdp: rank 0 takes 2 rows, but rank 2 gives it 3");
}

/* A vote that failed leaves the group in step: the next collective works. */
static xp_status recovering_rank(const xp_mesh *mesh, int rank, void *arg) {
    xp_comm *w = mesh->axis[XP_WORLD];
    (void)arg;
    const xp_status st = exchange(w, 0, rank == 2);
    MUST(st == (rank == 0 || rank == 2 ? XP_E_COMM : XP_E_PEER), "rank %d: %s", rank, xp_status_name(st));
    XP_TRY(exchange(w, 0, 0));
    return barrier(w);
}

static void a_failed_vote_leaves_the_group_usable(void **state) {
    (void)state;
    run("fsdp=4", recovering_rank);
    suite_expect_ok("fsdp=4", &report);
}

/* ---- a rank's own arguments ---- */

typedef enum {
    NO_ROWS,
    NEGATIVE,
    TOO_SMALL,
    NO_DATA,
    DEVICE_MEMORY,
    STRIDE,
    OVERLAP,
    OWN_ROWS,
    OTHER_DTYPE,
    PACKED,
    REFUSALS
} refusal;

static const char *const refused[REFUSALS] = {
    [NO_ROWS] = "rows: no row counts",
    [NEGATIVE] = "rows[1]: -1 rows",
    [TOO_SMALL] = "dst: 5 rows, but all ranks together bring 6",
    [NO_DATA] = "src: 8 elements but no data",
    [DEVICE_MEMORY] = "dst: memory of kind 2",
    [STRIDE] = "src: stride 1 is 2, expected 1",
    [OVERLAP] = "dst: shares memory with src",
    [OWN_ROWS] = "rows[2]: 2, but src has 1 rows",
    [OTHER_DTYPE] = "dst: f32, but src is i32",
    [PACKED] = "src: e2m1",
};

/* Rank 2 of 3 calls a gather of 2 rows of 4 wrongly. */
static xp_status refusing_rank(const xp_mesh *mesh, int rank, void *arg) {
    static _Thread_local int32_t src[64], dst[64];
    const refusal how = rank == 2 ? *(const refusal *)arg : REFUSALS;
    const int64_t negative[3] = {2, -1, 2};
    xp_comm *c = mesh->axis[XP_WORLD];
    xp_tensor from =
        xp_tensor_2d(src, how == PACKED ? XP_E2M1 : XP_I32, how == OWN_ROWS ? 1 : 2, how == PACKED ? 3 : 4);
    xp_tensor into = xp_tensor_2d(dst, how == OTHER_DTYPE ? XP_F32 : XP_I32, how == TOO_SMALL ? 5 : 6, 4);
    if (how == NO_DATA)
        from.data = NULL;
    if (how == DEVICE_MEMORY)
        into.mem = XP_CUDA;
    if (how == STRIDE)
        from.stride[1] = 2;
    if (how == OVERLAP)
        into.data = src + 1;
    return c->ops->all_gather(c, NULL, &from, how == NO_ROWS ? NULL : how == NEGATIVE ? negative : even_rows, &into);
}

static void a_rank_that_refuses_its_own_arguments_still_votes(void **state) {
    (void)state;
    for (refusal how = 0; how < REFUSALS; how++) {
        suite_run("fsdp=3,timeout=600", refusing_rank, &how, &report);
        expect_all(XP_E_ARG, "all_gather #1 on world: rank 2: ");
        for (int r = 0; r < 3; r++) {
            assert_int_equal(report.end[r].status, r == 2 ? XP_E_ARG : XP_E_PEER);
            expect_text(r, refused[how]);
        }
        assert_int_equal(report.first, 2);
    }
}

static xp_status fp8_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)rank;
    (void)arg;
    return reduce(mesh->axis[XP_WORLD], XP_E4M3, 2, 3, XP_SUM);
}

static xp_status redop_value_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)rank;
    (void)arg;
    return reduce(mesh->axis[XP_WORLD], XP_F32, 2, 3, (xp_redop)7);
}

static void reductions_that_do_not_exist(void **state) {
    (void)state;
    run("fsdp=2", fp8_rank);
    expect_all(XP_E_ARG, "dtype: e4m3 has no reductions");
    run("fsdp=1", redop_value_rank);
    expect_all(XP_E_ARG, "op: 7");
}

/* ---- order and axis ---- */

static xp_status order_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    XP_TRY(barrier(mesh->axis[XP_WORLD]));
    XP_TRY(barrier(mesh->axis[rank == 0 ? XP_FSDP : XP_WORLD]));
    return barrier(mesh->axis[rank == 0 ? XP_WORLD : XP_FSDP]);
}

static void order_that_differs(void **state) {
    (void)state;
    run("fsdp=2", order_rank);
    expect_all(XP_E_COMM, NULL);
    expect_text(0, "barrier #1 on fsdp: rank 0 waits for rank 1, which waits in barrier #2 on world");
    expect_text(1, "barrier #2 on world: rank 1 waits for rank 0, which waits in barrier #1 on fsdp");
    run("fsdp=7", order_rank);
    expect_all(XP_E_COMM, NULL);
    expect_text(0, "barrier #1 on fsdp: rank 0 waits for rank 1, which waits in barrier #2 on world; and for rank 2");
    expect_text(0, "; and for 3 more");
    expect_text(6, "barrier #2 on world: rank 6 waits for rank 0, which waits in barrier #1 on fsdp");
    assert_int_equal(report.end[6].status, XP_E_COMM);
}

static xp_status axis_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    return rank == 3 ? gather(mesh->axis[XP_EDP], even_rows, 2, 4) : exchange(mesh->axis[XP_EP], 0, 0);
}

static void axis_that_differs(void **state) {
    (void)state;
    run("dp=2,fsdp=2,ep=2", axis_rank); /* ep: {0,2} {1,3}; edp: {0,1} {2,3}. Ranks 0 and 2 finish. */
    assert_int_equal(report.status, XP_E_COMM);
    assert_int_equal(report.end[0].status, XP_OK);
    assert_int_equal(report.end[2].status, XP_OK);
    expect_text(1, "all_to_all_v #1 on ep: rank 1 waits for rank 3, which waits in all_gather #1 on edp");
    expect_text(3, "all_gather #1 on edp: rank 3 waits for rank 2, which has returned");
}

/* Three ranks, three axes of two: a cycle that no two ranks can see alone. */
static xp_status cycle_rank(const xp_mesh *mesh, int rank, void *arg) {
    xp_comm *w = mesh->axis[XP_WORLD], *first, *second;
    (void)arg;
    XP_TRY(w->ops->split(w, rank == 2, 0, &first));  /* {0,1} {2} */
    XP_TRY(w->ops->split(w, rank == 0, 0, &second)); /* {0} {1,2} */
    if (rank == 0)
        return barrier(first);
    return rank == 1 ? barrier(second) : barrier(w);
}

static void a_cycle_of_waits(void **state) {
    (void)state;
    run("fsdp=3", cycle_rank);
    expect_all(XP_E_COMM, NULL);
    expect_text(
        0, "barrier #1 on a split of world: rank 0 waits for rank 1, which waits in barrier #1 on a split of world");
    expect_text(2, "barrier #3 on world: rank 2 waits for rank 0, which waits in barrier #1 on a split of world");
}

/* ---- ranks that leave or fail outside ---- */

static xp_status leaving_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    XP_TRY(barrier(mesh->axis[XP_WORLD]));
    if (rank == 1)
        return XP_OK;
    return reduce(mesh->axis[XP_WORLD], XP_F32, 1, 1, XP_SUM);
}

static void a_rank_that_returns_early(void **state) {
    (void)state;
    static const char *const sizes[] = {"fsdp=2", "fsdp=3", "dp=2,fsdp=4,ep=4", "fsdp=64"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        run(sizes[i], leaving_rank);
        assert_int_equal(report.status, XP_E_COMM);
        assert_int_equal(report.first, 0);
        for (int r = 0; r < report.world; r++) {
            assert_int_equal(report.end[r].status, r == 1 ? XP_OK : XP_E_COMM);
            if (r != 1)
                expect_text(r, "waits for rank 1, which has returned");
        }
        expect_text(0, "all_reduce #2 on world: rank 0 waits");
    }
}

static xp_status failing_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    XP_TRY(barrier(mesh->axis[XP_WORLD]));
    if (rank == 2)
        return XP_FAIL(XP_E_FORMAT, "config.json: no such thing as 3 experts");
    XP_TRY(exchange(mesh->axis[XP_EP], 0, 0));
    XP_TRY(exchange(mesh->axis[XP_EP], 0, 0));
    return barrier(mesh->axis[XP_WORLD]);
}

static void a_rank_that_fails_outside(void **state) {
    (void)state;
    static const char *const sizes[] = {"fsdp=3", "fsdp=4,ep=2", "fsdp=64,ep=8", "dp=2,fsdp=4,ep=4,jitter=3"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        run(sizes[i], failing_rank);
        expect_all(XP_E_FORMAT, "config.json: no such thing as 3 experts");
        for (int r = 0; r < report.world; r++) {
            assert_int_equal(report.end[r].status, r == 2 ? XP_E_FORMAT : XP_E_PEER);
            if (r != 2)
                expect_text(r, "rank 2 failed (format): ");
        }
        assert_int_equal(report.first, 2);
    }
}

static xp_status silent_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    return rank == 0 ? XP_E_IO : barrier(mesh->axis[XP_WORLD]);
}

static void a_rank_that_fails_without_a_text(void **state) {
    (void)state;
    run("fsdp=2", silent_rank);
    expect_all(XP_E_IO, "failed without a text");
    run("fsdp=1", silent_rank);
    assert_int_equal(report.status, XP_E_IO);
}

static xp_status giving_up_rank(const xp_mesh *mesh, int rank, void *arg) {
    xp_comm *w = mesh->axis[XP_WORLD];
    (void)arg;
    XP_TRY(barrier(w));
    if (rank != 1)
        return exchange(w, 0, 0);
    w->ops->give_up(w, XP_FAIL(XP_E_NOMEM, "no room for 12 GiB"));
    const xp_status st = barrier(w); /* a broken mesh stays broken, for the one that broke it too */
    MUST(st == XP_E_PEER, "the barrier of a broken mesh gave %s", xp_status_name(st));
    return XP_FAIL(XP_E_NOMEM, "no room for 12 GiB");
}

static void a_rank_that_gives_up(void **state) {
    (void)state;
    run("fsdp=4", giving_up_rank);
    expect_all(XP_E_NOMEM, "no room for 12 GiB");
    assert_int_equal(report.first, 1);
    expect_text(3, "rank 1 failed (memory)");
}

/* One's own error counts for more than a peer's, whichever rank had it and however late. */
static xp_status late_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    const xp_status st = rank == 0 ? XP_FAIL(XP_E_ARG, "early and light") : barrier(mesh->axis[XP_WORLD]);
    if (rank == 2)
        return XP_FAIL(XP_E_BUG, "late and heavy");
    return st;
}

static void the_worst_status_is_agreed_on(void **state) {
    (void)state;
    run("fsdp=3", late_rank);
    assert_int_equal(report.status, XP_E_BUG);
    assert_int_equal(report.first, 2);
    assert_int_equal(report.end[0].status, XP_E_ARG);
    assert_int_equal(report.end[1].status, XP_E_PEER);
    assert_true(report.end[0].order < report.end[2].order);
    assert_string_equal(xp_error_text(), "rank 2: late and heavy");
}

/* Rank 2 fails first; rank 0 hears of it, and then fails alike. */
static xp_status second_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    if (rank == 2)
        return XP_FAIL(XP_E_ARG, "the first");
    const xp_status st = barrier(mesh->axis[XP_WORLD]);
    return rank == 0 ? XP_FAIL(XP_E_ARG, "the second") : st;
}

static void the_first_of_equals_is_the_first_in_time(void **state) {
    (void)state;
    run("fsdp=3", second_rank);
    assert_int_equal(report.status, XP_E_ARG);
    assert_int_equal(report.first, 2);
    assert_string_equal(xp_error_text(), "rank 2: the first");
}

/* ---- ranks that never come (these need a deadline) ---- */

static xp_status dozing_rank(const xp_mesh *mesh, int rank, void *arg) {
    (void)arg;
    XP_TRY(barrier(mesh->axis[XP_WORLD]));
    if (rank == 1)
        doze(1.5);
    return exchange(mesh->axis[XP_WORLD], 0, 0);
}

static void a_rank_that_comes_too_late(void **state) {
    (void)state;
    suite_run("fsdp=3,timeout=1", dozing_rank, NULL, &report);
    expect_all(XP_E_HANG, NULL);
    expect_text(0, "all_to_all_v #2 on world: rank 0 waits for rank 1, which is in no collective");
    expect_text(2, "rank 2 waits for rank 1, which is in no collective");
    assert_int_equal(report.end[0].status, XP_E_HANG);
    assert_int_equal(report.end[2].status, XP_E_HANG);
    assert_int_equal(report.end[1].status, XP_E_PEER);
    expect_text(1, "rank 0 waits for rank 1");
    suite_run("fsdp=3,timeout=20", dozing_rank, NULL, &report);
    suite_expect_ok("fsdp=3,timeout=20", &report);
}

/* A rank that does not return until the test has seen it reported as stuck. */
typedef struct {
    atomic_int release, returned;
} stuck_arg;

static xp_status stuck_rank(const xp_mesh *mesh, int rank, void *arg) {
    stuck_arg *s = arg;
    if (rank != 2)
        return barrier(mesh->axis[XP_WORLD]);
    while (!atomic_load(&s->release))
        doze(0.001);
    const xp_status st = barrier(mesh->axis[XP_WORLD]);
    atomic_store(&s->returned, st == XP_E_PEER ? 1 : 2);
    return st;
}

static void a_rank_that_never_returns_is_left_behind(void **state) {
    (void)state;
    static stuck_arg arg;
    if (strcmp(suite_kind(), "sim") != 0)
        skip(); /* the flag is shared memory */
    suite_run("fsdp=3,timeout=0.3", stuck_rank, &arg, &report);
    assert_int_equal(report.status, XP_E_HANG);
    assert_int_equal(report.stuck, 1);
    assert_int_equal(report.first, 0);
    assert_true(report.end[2].stuck);
    assert_int_equal(report.end[2].status, XP_E_HANG);
    expect_text(2, "has not returned 0.3 s after the mesh broke");
    atomic_store(&arg.release, 1);
    for (int i = 0; i < 5000 && !atomic_load(&arg.returned); i++)
        doze(0.001);
    assert_int_equal(atomic_load(&arg.returned), 1);
    doze(0.05); /* it still has to free the world: a leak checker would see it */
}

/* ---- jitter must not change what is found ---- */

static void findings_do_not_depend_on_arrival(void **state) {
    (void)state;
    static const xp_rank_fn fn[] = {counts_rank, operations_rank, order_rank, leaving_rank, failing_rank};
    static xp_mesh_report calm;
    if (strcmp(suite_kind(), "sim") != 0)
        skip();
    for (size_t f = 0; f < sizeof fn / sizeof *fn; f++) {
        run("fsdp=4,ep=4", fn[f]);
        calm = report;
        for (int seed = 1; seed <= 5; seed++) {
            char text[XP_MESH_TEXT];
            snprintf(text, sizeof text, "fsdp=4,ep=4,jitter=%d", seed);
            run(text, fn[f]);
            assert_int_equal(report.status, calm.status);
            assert_int_equal(report.first, calm.first);
            for (int r = 0; r < report.world; r++) {
                assert_int_equal(report.end[r].status, calm.end[r].status);
                assert_string_equal(report.end[r].text, calm.end[r].text);
            }
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counts_that_do_not_match),
        cmocka_unit_test(a_group_that_fails_takes_the_world_along),
        cmocka_unit_test(operations_that_differ),
        cmocka_unit_test(operands_that_differ),
        cmocka_unit_test(a_failed_vote_leaves_the_group_usable),
        cmocka_unit_test(a_rank_that_refuses_its_own_arguments_still_votes),
        cmocka_unit_test(reductions_that_do_not_exist),
        cmocka_unit_test(order_that_differs),
        cmocka_unit_test(axis_that_differs),
        cmocka_unit_test(a_cycle_of_waits),
        cmocka_unit_test(a_rank_that_returns_early),
        cmocka_unit_test(a_rank_that_fails_outside),
        cmocka_unit_test(a_rank_that_fails_without_a_text),
        cmocka_unit_test(a_rank_that_gives_up),
        cmocka_unit_test(the_worst_status_is_agreed_on),
        cmocka_unit_test(the_first_of_equals_is_the_first_in_time),
        cmocka_unit_test(a_rank_that_comes_too_late),
        cmocka_unit_test(a_rank_that_never_returns_is_left_behind),
        cmocka_unit_test(findings_do_not_depend_on_arrival),
    };
    return cmocka_run_group_tests(tests, fill_even_rows, NULL);
}
