/* The collectives suite: every collective, on every axis, of meshes of 1, 2, 3, 4, 6, 7, 8 and 64 ranks, against a
 * serial formula of what each rank must hold. Data and counts are functions of (seed, rank, element), so each rank
 * computes alone what its peers had. What a mesh does when ranks disagree is in mesh_fail.c.
 *
 * A buffer is compared whole, gaps and spare rows included: they must keep their poison. */
#include <math.h>
#include <time.h>

#include "mesh_suite.h"

enum { POISON = 0xA5, LONGEST_ROW = 22 * 8, MAX_RANKS = XP_MESH_MAX_RANKS, BUFFER = LONGEST_ROW * (4 * MAX_RANKS + 4) };

static const char *const meshes[] = {
    "fsdp=1",
    "fsdp=2",
    "dp=2,ep=2",
    "fsdp=3,ep=3",
    "dp=3,ep=3,ep_fsdp=1",
    "fsdp=4,ep=2",
    "dp=2,fsdp=2,ep=2,ep_fsdp=1",
    "fsdp=6,ep=2",
    "dp=2,fsdp=3,ep=3",
    "dp=3,fsdp=2,ep=2,ep_fsdp=1",
    "fsdp=7,ep=7",
    "dp=7",
    "fsdp=8,ep=8",
    "dp=2,fsdp=4,ep=4",
    "dp=2,fsdp=4,ep=2,ep_fsdp=2",
    "dp=4,fsdp=2,ep=2,ep_fsdp=1",
    "dp=4,fsdp=16,ep=8,ep_fsdp=4",
};
enum { MESHES = sizeof meshes / sizeof *meshes };

/* One rank's memory for one collective: what it gives, what it gets, what it should have got. */
typedef struct {
    size_t used;
    uint64_t src[BUFFER / 8], dst[BUFFER / 8], want[BUFFER / 8];
} memory;
static _Thread_local memory mem;

/* What a run needs to know, and what it leaves behind (ranks of one process only). */
typedef struct {
    xp_mesh_spec spec;
    uint64_t digest[MAX_RANKS];
} suite;

static xp_mesh_report report;

/* ---- data ---- */

static uint64_t hash(uint64_t a, uint64_t b, uint64_t c) {
    uint64_t x = a * 0x9E3779B97F4A7C15u ^ (b + 1) * 0xC2B2AE3D27D4EB4Fu ^ (c + 1) * 0x165667B19E3779F9u;
    x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 32) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* Rows that a rank brings: 0 to 4; rank 1 of three or more always none. */
static int64_t rows_of(uint64_t seed, int rank) {
    return rank % 3 == 1 ? 0 : (int64_t)(hash(seed, (uint64_t)rank, 77) % 5);
}

/* Rows from rank i to rank j: 0 to 3; rank 2 sends nothing, rank 3 receives nothing, seed 0 moves nothing at all. */
static int64_t count_of(uint64_t seed, int i, int j) {
    if (seed == 0 || i == 2 || j == 3)
        return 0;
    return (int64_t)(hash(seed, (uint64_t)i, (uint64_t)j) % 4);
}

static void put(const xp_tensor *t, int64_t number, uint64_t code) {
    const int64_t at = xp_tensor_offset(t, number);
    unsigned char *p = t->data;
    if (t->dtype == XP_E2M1) {
        const unsigned shift = at & 1 ? 4 : 0;
        p[at / 2] = (unsigned char)((p[at / 2] & ~(15u << shift)) | (unsigned)(code & 15) << shift);
        return;
    }
    const size_t bytes = (size_t)xp_dtype_bits(t->dtype) / 8;
    memcpy(p + (size_t)at * bytes, &code, bytes);
}

static int64_t row_size(const xp_tensor *t) {
    int64_t n = 1;
    for (int i = 1; i < t->ndim; i++)
        n *= t->dim[i];
    return n;
}

/* Tensors of `rows` rows in the layouts that callers use. */
typedef enum { FLAT, ROWS, CUBE, PADDED, LAYOUTS } layout;

static xp_tensor view(void *data, xp_dtype d, layout l, int64_t rows) {
    if (l == FLAT)
        return xp_tensor_1d(data, d, rows);
    if (l == ROWS)
        return xp_tensor_2d(data, d, rows, 6);
    xp_tensor t = xp_tensor_3d(data, d, rows, 3, 4);
    if (l == PADDED) {
        t.stride[1] = 6;
        t.stride[0] = 22;
    }
    return t;
}

/* ---- moving rows ---- */

/* A rank's element: what identifies it, cut to the dtype's width. */
static uint64_t element(uint64_t seed, int rank, int64_t number) {
    return hash(seed ^ 0xABCD, (uint64_t)rank, (uint64_t)number);
}

/* Rows [from, from + rows) of a rank's data into t, starting at row `to`. */
static void put_rows(const xp_tensor *t, int64_t to, uint64_t seed, int rank, int64_t from, int64_t rows) {
    const int64_t row = row_size(t);
    for (int64_t i = 0; i < rows * row; i++)
        put(t, to * row + i, element(seed, rank, from * row + i));
}

static xp_status compare(const xp_comm *c, const char *what, xp_dtype d, layout l) {
    const int differ = memcmp(mem.dst, mem.want, mem.used);
    MUST(differ == 0, "%s of %s, layout %d: wrong bytes on rank %d of %d", what, xp_dtype_name(d), (int)l, c->rank,
         c->size);
    return XP_OK;
}

/* Room for that many rows of any layout, and two more. */
static void poison(int64_t rows) {
    mem.used = (size_t)(rows + 2) * LONGEST_ROW;
    memset(mem.src, POISON, mem.used);
    memset(mem.dst, POISON, mem.used);
    memset(mem.want, POISON, mem.used);
}

static xp_status gather_rows(xp_comm *c, const int *ranks, uint64_t seed, xp_dtype d, layout l) {
    int64_t rows[MAX_RANKS], sum = 0;
    for (int r = 0; r < c->size; r++)
        sum += rows[r] = rows_of(seed, ranks[r]);
    poison(sum);
    const xp_tensor src = view(mem.src, d, l, rows[c->rank]), want = view(mem.want, d, l, sum);
    xp_tensor dst = view(mem.dst, d, l, sum);
    put_rows(&src, 0, seed, ranks[c->rank], 0, rows[c->rank]);
    int64_t to = 0;
    for (int r = 0; r < c->size; r++) {
        put_rows(&want, to, seed, ranks[r], 0, rows[r]);
        to += rows[r];
    }
    XP_TRY(c->ops->all_gather(c, NULL, &src, rows, &dst));
    return compare(c, "all_gather", d, l);
}

static xp_status exchange_rows(xp_comm *c, const int *ranks, uint64_t seed, xp_dtype d, layout l) {
    int64_t send[MAX_RANKS], recv[MAX_RANKS], sent = 0, received = 0;
    const int me = ranks[c->rank];
    for (int r = 0; r < c->size; r++) {
        sent += send[r] = count_of(seed, me, ranks[r]);
        received += recv[r] = count_of(seed, ranks[r], me);
    }
    poison(sent > received ? sent : received);
    /* a spare row at the end of both: buffers have a capacity */
    const xp_tensor src = view(mem.src, d, l, sent + 1), want = view(mem.want, d, l, received + 1);
    xp_tensor dst = view(mem.dst, d, l, received + 1);
    put_rows(&src, 0, seed, me, 0, sent);
    int64_t to = 0;
    for (int r = 0; r < c->size; r++) {
        int64_t from = 0;
        for (int q = 0; q < c->rank; q++)
            from += count_of(seed, ranks[r], ranks[q]);
        put_rows(&want, to, seed, ranks[r], from, recv[r]);
        to += recv[r];
    }
    XP_TRY(c->ops->all_to_all_v(c, NULL, &src, send, &dst, recv));
    return compare(c, "all_to_all_v", d, l);
}

static xp_status move_on_axis(xp_comm *c, const int *ranks) {
    static const xp_dtype dtype[] = {XP_F32, XP_BF16, XP_U8, XP_I64, XP_E2M1};
    for (uint64_t seed = 0; seed < (c->size > 8 ? 2 : 3); seed++) {
        for (size_t d = 0; d < sizeof dtype / sizeof *dtype; d++) {
            for (int l = dtype[d] == XP_E2M1 ? ROWS : FLAT; l < LAYOUTS; l++) {
                XP_TRY(gather_rows(c, ranks, seed, dtype[d], (layout)l));
                XP_TRY(exchange_rows(c, ranks, seed, dtype[d], (layout)l));
            }
        }
        XP_TRY(c->ops->barrier(c, NULL));
    }
    return XP_OK;
}

/* Runs one check on every axis, after looking at the axis itself. */
static xp_status on_every_axis(const xp_mesh *mesh, int rank, const suite *s,
                               xp_status (*check)(xp_comm *, const int *)) {
    int ranks[MAX_RANKS];
    for (int a = 0; a < XP_NAXIS; a++) {
        xp_comm *c = mesh->axis[a];
        const int size = xp_mesh_axis_ranks(&s->spec, (xp_axis)a, rank, ranks);
        MUST(c->size == size, "axis %s: size %d, expected %d", xp_axis_name((xp_axis)a), c->size, size);
        MUST(c->rank == xp_mesh_axis_index(&s->spec, (xp_axis)a, rank), "axis %s: rank %d", xp_axis_name((xp_axis)a),
             c->rank);
        XP_TRY(check(c, ranks));
    }
    return XP_OK;
}

static xp_status moving_rank(const xp_mesh *mesh, int rank, void *arg) {
    return on_every_axis(mesh, rank, arg, move_on_axis);
}

static void rows_arrive_where_they_belong(void **state) {
    (void)state;
    for (int i = 0; i < MESHES; i++) {
        static suite s;
        suite_spec(meshes[i], &s.spec);
        suite_run(meshes[i], moving_rank, &s, &report);
        suite_expect_ok(meshes[i], &report);
        assert_int_equal(report.world, s.spec.world);
    }
}

/* ---- sums and maxima ---- */

static const xp_dtype fold_dtype[] = {XP_F64, XP_F32, XP_BF16, XP_F16, XP_I64, XP_I32, XP_U64, XP_U8};
enum { FOLDS = sizeof fold_dtype / sizeof *fold_dtype, SPECIALS = 6 };

static uint64_t code_f32(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static uint64_t code_f64(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

/* The code of a 16-bit format nearest to x, ties to even: a search over the codes, which ascend with the value. The
 * code after the largest finite value is infinity's, and stands for the power of two that would come next. */
static uint64_t code_16(xp_dtype d, double x) {
    const uint16_t inf = d == XP_BF16 ? 0x7F80 : 0x7C00;
    const uint64_t sign = signbit(x) ? 0x8000 : 0;
    const double size = fabs(x), next = d == XP_BF16 ? 0x1p128 : 0x1p16;
    uint16_t lo = 0, hi = inf;
    if (isnan(x))
        return 0x7FFF;
    if (size >= next)
        return sign | inf;
    while (hi - lo > 1) {
        const uint16_t mid = (uint16_t)((lo + hi) / 2);
        if (xp_widen(&mid, d, 0) <= size)
            lo = mid;
        else
            hi = mid;
    }
    const double below = size - xp_widen(&lo, d, 0), above = (hi == inf ? next : xp_widen(&hi, d, 0)) - size;
    return sign | (below < above || (below <= above && lo % 2 == 0) ? lo : hi);
}

static uint64_t code_of(xp_dtype d, double x) {
    return d == XP_F64 ? code_f64(x) : d == XP_F32 ? code_f32((float)x) : code_16(d, x);
}

/* A rank's element as a code. Floats: magnitudes over 2^-12 to 2^12 with signs, so that order shows; the first are
 * special. */
static uint64_t addend(xp_dtype d, uint64_t seed, int rank, int64_t n) {
    const uint64_t h = hash(seed, (uint64_t)rank, (uint64_t)n);
    if (!xp_dtype_is_float(d))
        return h;
    switch (n) {
    case 0: /* one NaN, at one rank */
        return code_of(d, rank % 4 == 1 ? (double)NAN : 1.0);
    case 1: /* infinities of both signs make a NaN of a sum, and a maximum */
        return code_of(d, rank % 2 ? (double)INFINITY : -(double)INFINITY);
    case 2:
        return code_of(d, -0.0);
    case 3: /* +0 is the maximum, wherever it is */
        return code_of(d, rank % 3 == 1 ? 0.0 : -0.0);
    case 4: /* past the largest finite value of f16 */
        return code_of(d, 50000.0);
    case 5: /* subnormal sums in f16 and bf16 */
        return code_of(d, ldexp(1.0 + (double)(h % 64) / 64, d == XP_F16 ? -20 : -130));
    default:
        return code_of(d, ldexp((double)(int64_t)h, -63 + (int)(h % 25) - 12));
    }
}

static double widened(xp_dtype d, uint64_t code) {
    return xp_widen(&code, d, 0);
}

static double max_of(double a, double b) {
    if (isnan(a) || isnan(b))
        return (double)NAN;
    if (a > b || b > a)
        return a > b ? a : b;
    return signbit(a) ? b : a;
}

static uint64_t fold_float(xp_dtype d, xp_redop op, uint64_t seed, const int *ranks, int size, int64_t n,
                           int backwards) {
    double wide = 0;
    float narrow = 0;
    for (int i = 0; i < size; i++) {
        const double x = widened(d, addend(d, seed, ranks[backwards ? size - 1 - i : i], n));
        wide = i == 0 ? x : op == XP_MAX ? max_of(wide, x) : wide + x;
        narrow = i == 0 ? (float)x : op == XP_MAX ? (float)max_of((double)narrow, x) : narrow + (float)x;
    }
    return d == XP_F64 ? code_f64(wide) : code_of(d, (double)narrow);
}

static int64_t as_signed(xp_dtype d, uint64_t code) {
    return d == XP_I32 ? (int64_t)(int32_t)(uint32_t)code : d == XP_U8 ? (int64_t)(uint8_t)code : (int64_t)code;
}

static uint64_t fold_int(xp_dtype d, xp_redop op, uint64_t seed, const int *ranks, int size, int64_t n) {
    const uint64_t mask = xp_dtype_bits(d) == 64 ? UINT64_MAX : ((uint64_t)1 << xp_dtype_bits(d)) - 1;
    uint64_t acc = addend(d, seed, ranks[0], n) & mask;
    for (int i = 1; i < size; i++) {
        const uint64_t x = addend(d, seed, ranks[i], n) & mask;
        const int larger = d == XP_U64 ? x > acc : as_signed(d, x) > as_signed(d, acc);
        acc = op == XP_SUM ? (acc + x) & mask : larger ? x : acc;
    }
    return acc;
}

static uint64_t fold(xp_dtype d, xp_redop op, uint64_t seed, const int *ranks, int size, int64_t n) {
    return xp_dtype_is_float(d) ? fold_float(d, op, seed, ranks, size, n, 0) : fold_int(d, op, seed, ranks, size, n);
}

/* Elements [from, from + n) of t against the fold of elements [at, ...): by code, or both NaN. */
static xp_status expect_folded(const xp_comm *c, const xp_tensor *t, xp_redop op, uint64_t seed, const int *ranks,
                               int64_t at, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint64_t got = xp_code(t->data, t->dtype, xp_tensor_offset(t, i));
        const uint64_t want = fold(t->dtype, op, seed, ranks, c->size, at + i);
        const int is_float = xp_dtype_is_float(t->dtype);
        const int nan = is_float && isnan(widened(t->dtype, got)) && isnan(widened(t->dtype, want));
        MUST(nan || got == want, "%s of %s, element %lld on rank %d of %d: 0x%llx, expected 0x%llx",
             op == XP_SUM ? "sum" : "max", xp_dtype_name(t->dtype), (long long)(at + i), c->rank, c->size,
             (unsigned long long)got, (unsigned long long)want);
    }
    return XP_OK;
}

/* Every byte of buf, NaNs included, is the same on all ranks: they show it to one another. */
static xp_status expect_same_bytes(xp_comm *c, const void *buf, int64_t bytes) {
    static _Thread_local char mine[1024], all[MAX_RANKS * 1024];
    int64_t rows[MAX_RANKS];
    MUST(bytes <= (int64_t)sizeof mine, "the test's buffer is too small");
    memcpy(mine, buf, (size_t)bytes);
    for (int r = 0; r < c->size; r++)
        rows[r] = bytes;
    const xp_tensor src = xp_tensor_1d(mine, XP_U8, bytes);
    xp_tensor dst = xp_tensor_1d(all, XP_U8, bytes * c->size);
    XP_TRY(c->ops->all_gather(c, NULL, &src, rows, &dst));
    for (int r = 0; r < c->size; r++)
        MUST(memcmp(all + r * bytes, mine, (size_t)bytes) == 0, "ranks %d and %d of %d hold different bits", c->rank, r,
             c->size);
    return XP_OK;
}

static xp_status reduce_all(xp_comm *c, const int *ranks, uint64_t seed, xp_dtype d, layout l, xp_redop op) {
    const int64_t rows = l == FLAT ? 29 : (int64_t)(seed % 4); /* fewer elements than ranks, more, none */
    poison(rows);
    xp_tensor buf = view(mem.dst, d, l, rows);
    const int64_t n = rows * row_size(&buf);
    const xp_tensor want = view(mem.want, d, l, rows);
    for (int64_t i = 0; i < n; i++)
        put(&buf, i, addend(d, seed, ranks[c->rank], i));
    XP_TRY(c->ops->all_reduce(c, NULL, &buf, op));
    XP_TRY(expect_folded(c, &buf, op, seed, ranks, 0, n));
    for (int64_t i = 0; i < n; i++) /* so that the comparison of all bytes is about the gaps */
        put(&want, i, xp_code(mem.dst, d, xp_tensor_offset(&buf, i)));
    XP_TRY(compare(c, "all_reduce", d, l));
    return expect_same_bytes(c, mem.dst, rows * (l == FLAT ? 8 : LONGEST_ROW));
}

static xp_status reduce_and_scatter(xp_comm *c, const int *ranks, uint64_t seed, xp_dtype d, layout l, xp_redop op) {
    int64_t rows[MAX_RANKS], sum = 0, before = 0;
    for (int r = 0; r < c->size; r++) {
        before = r == c->rank ? sum : before;
        sum += rows[r] = rows_of(seed, ranks[r]);
    }
    poison(sum);
    const xp_tensor src = view(mem.src, d, l, sum), want = view(mem.want, d, l, rows[c->rank]);
    xp_tensor dst = view(mem.dst, d, l, rows[c->rank]);
    const int64_t row = row_size(&src), n = rows[c->rank] * row;
    for (int64_t i = 0; i < sum * row; i++)
        put(&src, i, addend(d, seed, ranks[c->rank], i));
    XP_TRY(c->ops->reduce_scatter(c, NULL, &src, rows, &dst, op));
    XP_TRY(expect_folded(c, &dst, op, seed, ranks, before * row, n));
    for (int64_t i = 0; i < n; i++)
        put(&want, i, xp_code(mem.dst, d, xp_tensor_offset(&dst, i)));
    return compare(c, "reduce_scatter", d, l);
}

static xp_status fold_on_axis(xp_comm *c, const int *ranks) {
    const uint64_t seeds = c->size > 8 ? 2 : 4; /* both operations of every dtype */
    for (uint64_t seed = 0; seed < seeds; seed++) {
        for (int d = 0; d < FOLDS; d++) {
            const xp_redop op = (seed + (uint64_t)d) % 2 ? XP_MAX : XP_SUM;
            const layout l = (layout)((seed / 2 + (uint64_t)d) % LAYOUTS);
            XP_TRY(reduce_all(c, ranks, seed, fold_dtype[d], FLAT, op));
            XP_TRY(reduce_and_scatter(c, ranks, seed, fold_dtype[d], l, op));
            if (c->size > 8)
                continue; /* the serial formula of many ranks is slow, and shows nothing new */
            XP_TRY(reduce_all(c, ranks, seed, fold_dtype[d], FLAT, op == XP_SUM ? XP_MAX : XP_SUM));
            XP_TRY(reduce_all(c, ranks, seed, fold_dtype[d], l, op));
            XP_TRY(reduce_and_scatter(c, ranks, seed, fold_dtype[d], PADDED, XP_SUM));
        }
    }
    return XP_OK;
}

static xp_status folding_rank(const xp_mesh *mesh, int rank, void *arg) {
    return on_every_axis(mesh, rank, arg, fold_on_axis);
}

static void folds_go_left_over_the_ranks(void **state) {
    (void)state;
    for (int i = 0; i < MESHES; i++) {
        static suite s;
        suite_spec(meshes[i], &s.spec);
        suite_run(meshes[i], folding_rank, &s, &report);
        suite_expect_ok(meshes[i], &report);
    }
}

/* If these data gave the same bits in every order, the test above would show nothing about order. */
static void the_data_tell_orders_apart(void **state) {
    (void)state;
    static const int ranks[] = {0, 1, 2};
    for (int d = 0; d < FOLDS; d++) {
        int differ = 0;
        for (int64_t n = SPECIALS; n < 29; n++)
            differ += xp_dtype_is_float(fold_dtype[d]) && fold_float(fold_dtype[d], XP_SUM, 1, ranks, 3, n, 0) !=
                                                              fold_float(fold_dtype[d], XP_SUM, 1, ranks, 3, n, 1);
        /* f16 and bf16 sums of three mostly round to the same value in either order: their own test is the rounding */
        if (fold_dtype[d] == XP_F32 || fold_dtype[d] == XP_F64)
            assert_true(differ > 0);
    }
}

/* ---- one large buffer, so that blocks and shares end everywhere ---- */

static xp_status large_rank(const xp_mesh *mesh, int rank, void *arg) {
    enum { N = 3001 };
    static _Thread_local float x[N];
    xp_comm *c = mesh->axis[XP_WORLD];
    (void)arg;
    for (int i = 0; i < N; i++)
        x[i] = (float)widened(XP_F32, addend(XP_F32, 9, rank, i + SPECIALS));
    xp_tensor t = xp_tensor_1d(x, XP_F32, N);
    XP_TRY(c->ops->all_reduce(c, NULL, &t, XP_SUM));
    for (int i = 0; i < N; i++) {
        float want = 0;
        for (int r = 0; r < c->size; r++) {
            const float a = (float)widened(XP_F32, addend(XP_F32, 9, r, i + SPECIALS));
            want = r == 0 ? a : want + a;
        }
        MUST(code_f32(x[i]) == code_f32(want), "element %d of %d: %a, expected %a", i, N, (double)x[i], (double)want);
    }
    return XP_OK;
}

static void large_buffers_have_no_seams(void **state) {
    (void)state;
    suite_run("dp=7", large_rank, NULL, &report);
    suite_expect_ok("dp=7", &report);
}

/* ---- in place, split ---- */

static xp_status in_place_rank(const xp_mesh *mesh, int rank, void *arg) {
    xp_comm *c = mesh->axis[XP_WORLD];
    int32_t all[MAX_RANKS * 2];
    int64_t rows[MAX_RANKS];
    (void)arg;
    for (int r = 0; r < c->size; r++)
        rows[r] = 2;
    all[2 * rank] = rank;
    all[2 * rank + 1] = -rank;
    const xp_tensor src = xp_tensor_1d(all + 2 * rank, XP_I32, 2);
    xp_tensor dst = xp_tensor_1d(all, XP_I32, 2 * c->size);
    XP_TRY(c->ops->all_gather(c, NULL, &src, rows, &dst));
    for (int r = 0; r < c->size; r++)
        MUST(all[2 * r] == r && all[2 * r + 1] == -r, "rank %d has %d, %d for rank %d", rank, (int)all[2 * r],
             (int)all[2 * r + 1], r);
    return XP_OK;
}

static void gather_in_place(void **state) {
    (void)state;
    suite_run("fsdp=6,ep=3", in_place_rank, NULL, &report);
    suite_expect_ok("fsdp=6,ep=3", &report);
}

/* Odd and even ranks part, in descending order; then each half parts again, all keys equal. */
static xp_status splitting_rank(const xp_mesh *mesh, int rank, void *arg) {
    xp_comm *w = mesh->axis[XP_WORLD], *half, *same;
    int32_t mine = rank, got[MAX_RANKS];
    int64_t rows[MAX_RANKS];
    (void)arg;
    XP_TRY(w->ops->split(w, rank % 2, -rank, &half));
    const int size = (w->size + 1 - rank % 2) / 2;
    MUST(half->size == size, "a half of %d ranks, expected %d", half->size, size);
    for (int r = 0; r < size; r++)
        rows[r] = 1;
    const xp_tensor src = xp_tensor_1d(&mine, XP_I32, 1);
    xp_tensor dst = xp_tensor_1d(got, XP_I32, size);
    XP_TRY(half->ops->all_gather(half, NULL, &src, rows, &dst));
    for (int r = 0; r < size; r++)
        MUST(got[r] == 2 * (size - 1 - r) + rank % 2, "place %d of the half has rank %d", r, (int)got[r]);
    MUST(got[half->rank] == rank, "rank %d is at place %d", rank, half->rank);
    XP_TRY(half->ops->split(half, 5, 0, &same));
    MUST(same->size == size && same->rank == half->rank, "equal keys must keep the order");
    XP_TRY(same->ops->barrier(same, NULL));
    return w->ops->barrier(w, NULL);
}

static void split_orders_by_key_and_rank(void **state) {
    (void)state;
    static const char *const sizes[] = {"fsdp=1", "fsdp=2", "dp=7", "dp=2,fsdp=4,ep=4"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        suite_run(sizes[i], splitting_rank, NULL, &report);
        suite_expect_ok(sizes[i], &report);
    }
}

/* ---- arrival ---- */

static uint64_t mix(uint64_t digest, const void *p, size_t bytes) {
    const unsigned char *b = p;
    for (size_t i = 0; i < bytes; i++)
        digest = (digest ^ b[i]) * 0x100000001B3u;
    return digest;
}

/* A chain of collectives over all axes, each fed by the one before, so that one wrong bit anywhere changes the digest.
 */
static xp_status chained_rank(const xp_mesh *mesh, int rank, void *arg) {
    enum { N = 40 };
    suite *s = arg;
    float x[N], y[N * MAX_RANKS];
    int64_t rows[MAX_RANKS];
    for (int i = 0; i < N; i++)
        x[i] = (float)widened(XP_F32, addend(XP_F32, 3, rank, i + SPECIALS));
    for (int a = 0; a < XP_NAXIS; a++) {
        xp_comm *c = mesh->axis[a];
        xp_tensor buf = xp_tensor_1d(x, XP_F32, N), all = xp_tensor_1d(y, XP_F32, N * c->size);
        for (int r = 0; r < c->size; r++)
            rows[r] = N;
        XP_TRY(c->ops->all_gather(c, NULL, &buf, rows, &all));
        s->digest[rank] = mix(s->digest[rank], y, sizeof(float) * (size_t)(N * c->size));
        XP_TRY(c->ops->reduce_scatter(c, NULL, &all, rows, &buf, XP_SUM));
        for (int i = 0; i < N; i++)
            x[i] = x[i] * 0.37f + (float)rank;
        XP_TRY(c->ops->all_reduce(c, NULL, &buf, XP_SUM));
        s->digest[rank] = mix(s->digest[rank], x, sizeof x);
    }
    return XP_OK;
}

static void arrival_changes_no_bit(void **state) {
    (void)state;
    static const char *const sizes[] = {"fsdp=3,ep=3", "dp=2,fsdp=4,ep=2,ep_fsdp=2", "dp=7"};
    if (strcmp(suite_kind(), "sim") != 0)
        skip(); /* only the simulated mesh knows jitter */
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        static suite calm, shaken;
        memset(&calm, 0, sizeof calm);
        suite_run(sizes[i], chained_rank, &calm, &report);
        suite_expect_ok(sizes[i], &report);
        for (int seed = 0; seed < 6; seed++) {
            char text[XP_MESH_TEXT];
            snprintf(text, sizeof text, "%s,jitter=%d", sizes[i], seed);
            memset(&shaken, 0, sizeof shaken);
            suite_run(text, chained_rank, &shaken, &report);
            suite_expect_ok(text, &report);
            assert_memory_equal(calm.digest, shaken.digest, sizeof calm.digest);
        }
    }
}

static void jitter_reaches_every_collective(void **state) {
    (void)state;
    static suite s;
    if (strcmp(suite_kind(), "sim") != 0)
        skip();
    suite_spec("dp=2,fsdp=2,ep=2,jitter=5", &s.spec);
    suite_run("dp=2,fsdp=2,ep=2,jitter=5", splitting_rank, &s, &report);
    suite_expect_ok("dp=2,fsdp=2,ep=2,jitter=5", &report);
    suite_run("fsdp=3,ep=3,jitter=6", in_place_rank, &s, &report);
    suite_expect_ok("fsdp=3,ep=3,jitter=6", &report);
}

/* ---- time, told and never judged ---- */

enum { TIMES = 101 };

typedef struct {
    double s[TIMES];
} timing;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static xp_status timed_rank(const xp_mesh *mesh, int rank, void *arg) {
    enum { BYTES = 64 };
    static _Thread_local char src[MAX_RANKS * BYTES], dst[MAX_RANKS * BYTES];
    xp_comm *c = mesh->axis[XP_WORLD];
    timing *t = arg;
    int64_t rows[MAX_RANKS];
    for (int r = 0; r < c->size; r++)
        rows[r] = 1;
    const xp_tensor from = xp_tensor_2d(src, XP_U8, c->size, BYTES);
    xp_tensor to = xp_tensor_2d(dst, XP_U8, c->size, BYTES);
    XP_TRY(c->ops->barrier(c, NULL));
    double last = now();
    for (int i = 0; i < TIMES; i++) {
        XP_TRY(c->ops->all_to_all_v(c, NULL, &from, rows, &to, rows));
        if (rank == 0) {
            t->s[i] = now() - last;
            last += t->s[i];
        }
    }
    return XP_OK;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void time_of_a_small_exchange(void **state) {
    (void)state;
    static const char *const sizes[] = {"fsdp=8", "fsdp=64"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        static timing t;
        suite_run(sizes[i], timed_rank, &t, &report);
        suite_expect_ok(sizes[i], &report);
        qsort(t.s, TIMES, sizeof *t.s, ascending);
        print_message(
            "all_to_all_v of 64 bytes a pair on %s:%s, one after another: median %.0f us, 90%% %.0f us of %d\n",
            suite_kind(), sizes[i], t.s[TIMES / 2] * 1e6, t.s[TIMES * 9 / 10] * 1e6, TIMES);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_arrive_where_they_belong),
        cmocka_unit_test(folds_go_left_over_the_ranks),
        cmocka_unit_test(the_data_tell_orders_apart),
        cmocka_unit_test(large_buffers_have_no_seams),
        cmocka_unit_test(gather_in_place),
        cmocka_unit_test(split_orders_by_key_and_rank),
        cmocka_unit_test(arrival_changes_no_bit),
        cmocka_unit_test(jitter_reaches_every_collective),
        cmocka_unit_test(time_of_a_small_exchange),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
