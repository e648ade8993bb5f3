/* The stages between a sharded parameter and its whole: gather and scatter.
 *
 * Every rank computes from (rank, group, row, column) what its peers brought, and the folds again in float, so that the
 * stated order and rounding points are compared bit for bit. Ranks return MUST's error, since cmocka's asserts jump. */
#include <math.h>

#include "ref.h"
#include "unit/stage_suite.h"
#include "xp/gather.h"
#include "xp/scatter.h"

static xp_mesh_report report;

/* ---- gather ---- */

typedef struct {
    xp_axis axis;
    int64_t groups, columns;
    xp_dtype master, full;
    int64_t start[8], rows[8], rows0;
    uint64_t seed;
} gather_case;

/* Splits rows0 rows over P ranks at random places; equal places make empty ranks. */
static void ranges_deal(uint64_t seed, int ranks, int64_t rows0, int64_t *start, int64_t *rows) {
    int64_t next = 0;
    for (int r = 0; r < ranks; r++) {
        const int64_t left = rows0 - next;
        start[r] = next;
        rows[r] = r == ranks - 1 ? left : (int64_t)(mix(seed, 6, (uint64_t)r, 0) % (uint64_t)(left + 1));
        next += rows[r];
    }
}

static double master_of(const gather_case *c, int64_t g, int64_t r, int64_t n) {
    return real(c->seed, (uint64_t)(g * 100 + r), (uint64_t)n);
}

static xp_status gather_rank(const xp_mesh *m, int rank, void *arg) {
    const gather_case *c = arg;
    const int me = m->axis[c->axis]->rank;
    (void)rank;
    const xp_gather_args a = {.shard = cube(c->master, c->groups, c->rows[me], c->columns),
                              .full = cube(c->full, c->groups, c->rows0, c->columns),
                              .axis = c->axis,
                              .start = c->start,
                              .rows = c->rows};
    for (int64_t g = 0; g < c->groups; g++) {
        for (int64_t r = 0; r < c->rows[me]; r++) {
            for (int64_t n = 0; n < c->columns; n++)
                xp_ref_store(xp_tensor_at(&a.shard, g, r, n, 0), c->master, 0, master_of(c, g, c->start[me] + r, n));
        }
    }
    XP_TRY(run_kernel(&xp_ref_gather, m, &a));
    XP_TRY(properties_hold(&xp_stage_gather, m, &a));
    for (int64_t g = 0; g < c->groups; g++) {
        for (int64_t r = 0; r < c->rows0; r++) {
            for (int64_t n = 0; n < c->columns; n++) {
                const double want = xp_ref_round(xp_ref_round(master_of(c, g, r, n), c->master), c->full);
                const double got = xp_widen(xp_tensor_at(&a.full, g, r, n, 0), c->full, 0);
                MUST(got == want, "full[%d][%d][%d] is %g, not %g", (int)g, (int)r, (int)n, got, want);
            }
            const unsigned char *gap = xp_tensor_at(&a.full, g, r, c->columns, 0);
            for (size_t b = 0; b < xp_dtype_bytes(c->full, GAP); b++)
                MUST(gap[b] == POISON, "the gap behind full[%d][%d] was written", (int)g, (int)r);
        }
    }
    return pool_close();
}

static void gather_meshes(void **state) {
    static const struct {
        const char *mesh;
        xp_axis axis;
    } on[] = {{"fsdp=1", XP_FSDP},         {"fsdp=3", XP_FSDP}, {"dp=2,fsdp=2", XP_FSDP},
              {"fsdp=6,ep=2", XP_EP_FSDP}, {"fsdp=7", XP_FSDP}, {"dp=2,fsdp=4,ep=4", XP_EP_FSDP}};
    static const xp_dtype full[4] = {XP_BF16, XP_F32, XP_F16, XP_F64};
    (void)state;
    for (size_t i = 0; i < sizeof on / sizeof *on; i++) {
        for (uint64_t v = 0; v < 4; v++) {
            xp_mesh_spec s;
            gather_case c = {.axis = on[i].axis, .full = full[v], .seed = 10 * i + v};
            c.groups = (int64_t)(v % 3) + (v == 3); /* 0 1 2 1 */
            c.columns = v == 3 ? 1 : 5;
            c.rows0 = v == 1 ? 2 : 9; /* fewer rows than ranks, or more */
            c.master = v == 3 ? XP_F64 : XP_F32;
            suite_spec(on[i].mesh, &s);
            ranges_deal(c.seed, xp_mesh_axis_size(&s, c.axis), c.rows0, c.start, c.rows);
            suite_run(on[i].mesh, gather_rank, &c, &report);
            suite_expect_ok(on[i].mesh, &report);
        }
    }
}

/* ---- scatter ---- */

typedef enum { TILED, WHOLE, HYBRID, LAYOUTS } layout; /* reduce-scatter, all-reduce, HSDP */
typedef struct {
    xp_axis axis;
    int ranks;
    layout how;
    int64_t groups, rows0, columns, start[8], rows[8];
    xp_dtype grad, reduce;
    double divisor;
    int fold;
    int64_t total;       /* blocks of all ranks, fold only */
    uint64_t seed;       /* also says which rank owns a block */
    float (*digest)[64]; /* [rank][g * 16 + row * columns + n], fold only */
    double pre;
} scatter_case;

static double part_of(const scatter_case *c, int64_t part, int64_t g, int64_t r, int64_t n) {
    return xp_ref_round(real(c->seed + 70 + (uint64_t)part, (uint64_t)(g * 100 + r), (uint64_t)n), c->grad);
}
/* Which rank holds block b; rank 1 of more than two holds none. */
static int owner_of(const scatter_case *c, int64_t b) {
    const int r = (int)(mix(c->seed, 8, (uint64_t)b, 0) % (uint64_t)c->ranks);
    return c->ranks > 2 && r == 1 ? 0 : r;
}
/* Block numbers have gaps. */
static int64_t number_of(int64_t b) {
    return 3 * b + 2;
}

static void scatter_deal(scatter_case *c) {
    for (int r = 0; r < c->ranks; r++) {
        c->start[r] = 0;
        c->rows[r] = c->rows0;
    }
    if (c->how == TILED)
        ranges_deal(c->seed, c->ranks, c->rows0, c->start, c->rows);
    if (c->how == HYBRID && c->ranks % 2 == 0) { /* two replicas of a tiling */
        ranges_deal(c->seed, c->ranks / 2, c->rows0, c->start, c->rows);
        for (int r = 0; r < c->ranks / 2; r++) {
            c->start[c->ranks / 2 + r] = c->start[r];
            c->rows[c->ranks / 2 + r] = c->rows[r];
        }
    }
}

static xp_scatter_args scatter_open(const scatter_case *c, int me) {
    int64_t blocks = c->fold ? 0 : 1;
    for (int64_t b = 0; c->fold && b < c->total; b++)
        blocks += owner_of(c, b) == me;
    const int64_t dim[4] = {blocks, c->groups, c->rows0, c->columns};
    xp_scatter_args a = {.shard = cube(c->grad == XP_F64 ? XP_F64 : XP_F32, c->groups, c->rows[me], c->columns),
                         .axis = c->axis,
                         .start = c->start,
                         .rows = c->rows,
                         .reduce_dtype = c->reduce,
                         .divisor = c->divisor,
                         .fold_blocks = c->fold};
    a.grad = xp_tensor_of(take(xp_dtype_bytes(c->grad, blocks * c->groups * c->rows0 * c->columns)), c->grad, 4, dim);
    if (c->fold)
        a.blocks = vector(XP_I64, blocks);
    for (int64_t b = 0, slot = 0; b < (c->fold ? c->total : 1); b++) {
        if (c->fold && owner_of(c, b) != me)
            continue;
        if (c->fold)
            set(&a.blocks, slot, 0, (double)number_of(b));
        for (int64_t g = 0; g < c->groups; g++) {
            for (int64_t r = 0; r < c->rows0; r++) {
                for (int64_t n = 0; n < c->columns; n++)
                    xp_ref_store(xp_tensor_at(&a.grad, slot, g, r, n), c->grad, 0,
                                 part_of(c, c->fold ? b : me, g, r, n));
            }
        }
        slot++;
    }
    return a;
}

/* The contract in float arithmetic; f64 when grad is. */
static double scatter_want(const scatter_case *c, int64_t g, int64_t r, int64_t n) {
    const int64_t parts = c->fold ? c->total : c->ranks;
    float sum = 0.0f;
    double wide = 0.0;
    for (int64_t p = 0; p < parts; p++) {
        sum = p ? sum + (float)part_of(c, p, g, r, n) : (float)part_of(c, p, g, r, n);
        wide = p ? wide + part_of(c, p, g, r, n) : part_of(c, p, g, r, n);
    }
    if (c->grad == XP_F64)
        return wide / c->divisor;
    const float reduced = (float)xp_ref_round((double)sum, c->reduce);
    return (double)(c->divisor == 1.0 ? reduced : reduced / (float)c->divisor);
}

static xp_status scatter_rank(const xp_mesh *m, int rank, void *arg) {
    const scatter_case *c = arg;
    const int me = m->axis[c->axis]->rank;
    const xp_scatter_args a = scatter_open(c, me);
    XP_TRY(run_kernel(&xp_ref_scatter, m, &a));
    XP_TRY(properties_hold(&xp_stage_scatter, m, &a));
    for (int64_t g = 0; g < c->groups; g++) {
        for (int64_t r = 0; r < c->rows[me]; r++) {
            for (int64_t n = 0; n < c->columns; n++) {
                const double got = xp_widen(xp_tensor_at(&a.shard, g, r, n, 0), a.shard.dtype, 0);
                const double want = scatter_want(c, g, c->start[me] + r, n);
                MUST(got == want, "shard[%d][%d][%d] is %.9g, not %.9g", (int)g, (int)r, (int)n, got, want);
                if (c->digest)
                    c->digest[rank][g * 16 + r * c->columns + n] = (float)got;
            }
        }
    }
    return pool_close();
}

static const struct {
    const char *mesh;
    xp_axis axis;
} scatter_on[] = {{"fsdp=1", XP_WORLD},      {"fsdp=2", XP_WORLD},    {"fsdp=3", XP_WORLD},
                  {"dp=2,fsdp=2", XP_WORLD}, {"fsdp=6,ep=2", XP_EDP}, {"dp=2,fsdp=4,ep=4", XP_WORLD}};
enum { SCATTER_ON = sizeof scatter_on / sizeof *scatter_on };

static void scatter_meshes(void **state) {
    static const struct {
        xp_dtype grad, reduce;
        double divisor;
    } as[] = {
        {XP_F32, XP_F32, 3}, {XP_F32, XP_BF16, 7}, {XP_BF16, XP_F32, 1}, {XP_F16, XP_F16, 10}, {XP_F64, XP_F64, 3}};
    (void)state;
    for (int i = 0; i < SCATTER_ON; i++) {
        for (int v = 0; v < 10; v++) {
            xp_mesh_spec s;
            scatter_case c = {
                .axis = scatter_on[i].axis, .how = (layout)(v % LAYOUTS), .seed = (uint64_t)(100 * i + v)};
            c.groups = v == 4 ? 0 : 1 + v % 2;
            c.rows0 = v == 7 ? 0 : 7;
            c.columns = 1 + v % 4;
            c.grad = as[v % 5].grad;
            c.reduce = as[v % 5].reduce;
            c.divisor = as[v % 5].divisor;
            suite_spec(scatter_on[i].mesh, &s);
            c.ranks = xp_mesh_axis_size(&s, c.axis);
            scatter_deal(&c);
            suite_run(scatter_on[i].mesh, scatter_rank, &c, &report);
            suite_expect_ok(scatter_on[i].mesh, &report);
        }
    }
}

/* Whoever owns a block, and however many ranks there are, the bits are those of one rank with all blocks. */
static void scatter_blocks(void **state) {
    static float digest[XP_MESH_MAX_RANKS][64], alone[64];
    (void)state;
    for (int i = 0; i < SCATTER_ON; i++) {
        for (int v = 0; v < 4; v++) {
            xp_mesh_spec s;
            scatter_case c = {.axis = scatter_on[i].axis, .how = WHOLE, .seed = 5, .fold = 1, .divisor = 11};
            c.total = v == 3 ? 0 : 9;
            c.groups = 2;
            c.rows0 = 4;
            c.columns = 3;
            c.grad = v == 2 ? XP_F64 : XP_F32;
            c.reduce = c.grad;
            c.digest = digest;
            suite_spec(scatter_on[i].mesh, &s);
            c.ranks = xp_mesh_axis_size(&s, c.axis);
            scatter_deal(&c);
            memset(digest, 0xFF, sizeof digest);
            suite_run(scatter_on[i].mesh, scatter_rank, &c, &report);
            suite_expect_ok(scatter_on[i].mesh, &report);
            if (i == 0 && v == 0)
                memcpy(alone, digest[0], sizeof alone);
            for (int r = 0; r < s.world && v == 0; r++)
                assert_memory_equal(digest[r], alone, sizeof alone);
            for (int e = 0; e < 12 && v == 3; e++)
                assert_true(digest[0][e] == 0.0f); /* no block anywhere: zeros */
        }
    }
}

/* Two ranks bring one block: an error on both, with the number. */
static xp_status twice_rank(const xp_mesh *m, int rank, void *arg) {
    const scatter_case *c = arg;
    xp_scatter_args a = scatter_open(c, rank);
    for (int64_t b = 0; b < a.blocks.dim[0]; b++)
        set(&a.blocks, b, 0, (double)(b == 1 ? 40 : 10 * rank + b));
    for (int64_t b = 2; b < a.blocks.dim[0]; b++)
        set(&a.blocks, b, 0, (double)(50 + 10 * rank + b));
    const xp_status st = run_kernel(&xp_ref_scatter, m, &a);
    const xp_status closed = pool_close();
    return st != XP_OK ? st : closed;
}

static void scatter_block_twice(void **state) {
    scatter_case c = {.axis = XP_WORLD, .ranks = 2, .how = WHOLE, .fold = 1, .total = 12, .seed = 5, .divisor = 1};
    (void)state;
    c.groups = c.rows0 = c.columns = 2;
    c.grad = c.reduce = XP_F32;
    scatter_deal(&c);
    suite_run("fsdp=2", twice_rank, &c, &report);
    for (int r = 0; r < 2; r++) {
        assert_int_equal(report.end[r].status, XP_E_ARG);
        assert_non_null(strstr(report.end[r].text, "ranks 0 and 1 of world both bring block 40"));
    }
}

/* A judge's shard is f64: the sum is still folded in f32, the quotient is not rounded; -0 survives. */
static xp_status finish_rank(const xp_mesh *m, int rank, void *arg) {
    const scatter_case *c = arg;
    xp_scatter_args a = scatter_open(c, rank);
    a.shard = cube(XP_F64, 1, 1, 3);
    xp_ref_store(a.grad.data, XP_F32, 0, rank ? 0.5 : 0.25);
    xp_ref_store(a.grad.data, XP_F32, 1, -0.0);
    xp_ref_store(a.grad.data, XP_F32, 2, rank ? 0x1.8p-25 : 1.0);
    XP_TRY(run_unchecked(&xp_ref_scatter, m, &a));
    const double *v = a.shard.data;
    MUST(v[0] == 1.25 / c->divisor, "quotient %.17g", v[0]);
    MUST(v[1] == 0.0 && signbit(v[1]), "-0 is %g", v[1]);
    MUST(v[2] == 1.0 / c->divisor, "f32 fold: %.17g", v[2]); /* f32 loses either part; a double sum keeps both */
    return pool_close();
}

static void scatter_finish(void **state) {
    scatter_case c = {.axis = XP_WORLD, .ranks = 3, .how = WHOLE, .groups = 1, .rows0 = 1, .columns = 3, .divisor = 7};
    (void)state;
    c.grad = c.reduce = XP_F32;
    scatter_deal(&c);
    suite_run("fsdp=3", finish_rank, &c, &report);
    suite_expect_ok("fsdp=3", &report);
}

/* One block of -0: blocks are added to +0, so that one of zeros more or less changes no bit. */
static xp_status signs_rank(const xp_mesh *m, int rank, void *arg) {
    const scatter_case *c = arg;
    xp_scatter_args a = scatter_open(c, rank);
    for (int64_t n = 0; n < c->columns * a.grad.dim[0]; n++)
        xp_ref_store(a.grad.data, XP_F32, (int)n, -0.0);
    XP_TRY(run_unchecked(&xp_ref_scatter, m, &a));
    for (int64_t n = 0; n < c->columns; n++) {
        const double v = xp_widen(a.shard.data, a.shard.dtype, n);
        MUST(v == 0.0 && !signbit(v), "-0 is %g", v);
    }
    return pool_close();
}

static void scatter_blocks_begin_with_zero(void **state) {
    scatter_case c = {.axis = XP_WORLD, .ranks = 3, .how = WHOLE, .groups = 1, .rows0 = 1, .columns = 3, .divisor = 7};
    (void)state;
    c.grad = c.reduce = XP_F32;
    c.fold = 1;
    c.total = 1;
    scatter_deal(&c);
    suite_run("fsdp=3", signs_rank, &c, &report);
    suite_expect_ok("fsdp=3", &report);
}

/* A divisor on the way in: c = r(1/3) = 171/512, not 1/3, and each product is rounded before the fold. */
static xp_status first_rank(const xp_mesh *m, int rank, void *arg) {
    const scatter_case *c = arg;
    xp_scatter_args a = scatter_open(c, rank);
    a.pre = 3;
    xp_ref_store(a.grad.data, XP_F32, 0, rank ? 0.0 : 1.015625);
    xp_ref_store(a.grad.data, XP_F32, 1, 1.0390625);
    xp_ref_store(a.grad.data, XP_F32, 2, rank == 1 ? -3.0 : 0.0);
    XP_TRY(run_kernel(&xp_ref_scatter, m, &a));
    const float *v = a.shard.data;
    MUST(v[0] == 0.33984375f / 4, "%a", (double)v[0]); /* 1.015625/3 is rounded to 0.337890625 */
    MUST(v[1] == 1.046875f / 4, "%a", (double)v[1]);   /* 1.0390625 if only the sum were rounded */
    MUST(v[2] == -1.0f / 4, "%a", (double)v[2]);       /* -1.001953125 before rounding */
    return pool_close();
}

static void scatter_divides_first(void **state) {
    scatter_case c = {.axis = XP_WORLD, .ranks = 3, .how = WHOLE, .groups = 1, .rows0 = 1, .columns = 3, .divisor = 4};
    (void)state;
    c.grad = XP_F32;
    c.reduce = XP_BF16;
    scatter_deal(&c);
    suite_run("fsdp=3", first_rank, &c, &report);
    suite_expect_ok("fsdp=3", &report);
}

/* The tolerance holds another order and a reciprocal, and nothing coarser. */
static xp_status scatter_bound_rank(const xp_mesh *m, int rank, void *arg) {
    const scatter_case *c = arg;
    int lost = 0, undivided = 0;
    xp_scatter_args a = scatter_open(c, rank);
    const double first = c->pre > 0 ? xp_ref_round(1 / c->pre, c->reduce) : 1;
    a.pre = c->pre;
    a.shard = cube(XP_F64, c->groups, c->rows[rank], c->columns);
    XP_TRY(run_unchecked(&xp_ref_scatter, m, &a));
    xp_tensor tol = cube(XP_F64, c->groups, c->rows[rank], c->columns);
    XP_TRY(bound_of(&xp_stage_scatter, m, &a, "shard", &a.shard, &tol));
    for (int64_t g = 0; g < c->groups; g++) {
        for (int64_t r = 0; r < c->rows[rank]; r++) {
            for (int64_t n = 0; n < c->columns; n++) {
                float sum = 0.0f;
                for (int p = c->ranks - 1; p >= 0; p--)
                    sum += (float)(first * part_of(c, p, g, c->start[rank] + r, n));
                const double want = *(const double *)xp_tensor_at(&a.shard, g, r, n, 0);
                const double limit = *(const double *)xp_tensor_at(&tol, g, r, n, 0);
                const float inverse = 1.0f / (float)c->divisor;
                const float each = (float)xp_ref_round((double)sum, c->reduce) * inverse, none = sum * inverse;
                MUST(fabs((double)each - want) <= limit, "rounded: %g > %g", fabs((double)each - want), limit);
                MUST(fabs((double)none - want) <= limit, "unrounded: %g > %g", fabs((double)none - want), limit);
                lost += fabs(first * part_of(c, 1, g, c->start[rank] + r, n) / c->divisor) > limit;
                undivided += fabs(want * 0x1p-6) > limit; /* 1.6 % off, as a divisor rounded to few bits */
            }
        }
    }
    const int all = (int)(c->groups * c->rows[rank] * c->columns);
    MUST(lost > all - all / 8, "a rank left out is seen in %d of %d", lost, all);
    MUST(undivided > all / 2, "a wrong divisor is seen in %d of %d", undivided, all);
    return pool_close();
}

static void scatter_bounds(void **state) {
    /* the narrow rounding; exact parts; cancellation in f32 without a division; a division alone */
    static const struct {
        const char *mesh;
        int ranks;
        xp_dtype grad, reduce;
        double divisor, pre;
    } on[] = {{"fsdp=4", 4, XP_F32, XP_BF16, 13, 0},
              {"fsdp=4", 4, XP_BF16, XP_F32, 13, 0},
              {"fsdp=8", 8, XP_F32, XP_F32, 1, 0},
              {"fsdp=1", 1, XP_F32, XP_F32, 13, 0},
              {"fsdp=4", 4, XP_F32, XP_F32, 13, 3}};
    (void)state;
    for (size_t i = 0; i < sizeof on / sizeof *on; i++) {
        scatter_case c = {.axis = XP_WORLD, .ranks = on[i].ranks, .how = WHOLE, .grad = on[i].grad};
        c.groups = 2;
        c.rows0 = 6;
        c.columns = 60;
        c.reduce = on[i].reduce;
        c.divisor = on[i].divisor;
        c.pre = on[i].pre;
        scatter_deal(&c);
        suite_run(on[i].mesh, scatter_bound_rank, &c, &report);
        suite_expect_ok(on[i].mesh, &report);
    }
}

/* Groups that do not fit one exchange go in several: 3 groups of 4 MiB for each of two ranks. */
static xp_status chunks_rank(const xp_mesh *m, int rank, void *arg) {
    enum { GROUPS = 3, N = 1 << 20 };
    static const int64_t start[2] = {0, 0}, rows[2] = {1, 1};
    const int64_t dim[4] = {1, GROUPS, 1, N};
    (void)arg;
    xp_scatter_args a = {.shard = cube(XP_F32, GROUPS, 1, N), .axis = XP_WORLD, .start = start, .rows = rows};
    a.grad = xp_tensor_of(take(sizeof(float) * GROUPS * N), XP_F32, 4, dim);
    a.reduce_dtype = XP_F32;
    a.divisor = 1.0;
    float *grad = a.grad.data;
    for (int64_t i = 0; i < GROUPS * N; i++)
        grad[i] = (float)(i % 1000 * (rank + 1));
    XP_TRY(run_kernel(&xp_ref_scatter, m, &a));
    for (int64_t i = 0; i < GROUPS * N; i++) {
        const float got = *(const float *)xp_tensor_at(&a.shard, i / N, 0, i % N, 0);
        MUST(got == (float)(i % 1000 * 3), "element %d is %g", (int)i, (double)got);
    }
    return pool_close();
}

static void scatter_chunks(void **state) {
    (void)state;
    suite_run("fsdp=2", chunks_rank, NULL, &report);
    suite_expect_ok("fsdp=2", &report);
}

/* Replicas that differ in one bit are seen. */
static xp_status replicas_rank(const xp_mesh *m, int rank, void *arg) {
    double r = 0.0;
    const xp_scatter_args a = scatter_open(arg, rank);
    XP_TRY(run_kernel(&xp_ref_scatter, m, &a));
    if (rank == 1)
        *(uint32_t *)xp_tensor_at(&a.shard, 0, 1, 0, 0) ^= 1u;
    XP_TRY(xp_stage_scatter.property[0].residual(&a, m, &r));
    MUST(r > 1.0, "a replica that drifted was not seen");
    return pool_close();
}

static void replicas_see(void **state) {
    scatter_case c = {.axis = XP_WORLD, .ranks = 2, .how = WHOLE, .groups = 1, .rows0 = 2, .columns = 2, .divisor = 7};
    (void)state;
    c.grad = c.reduce = XP_F32;
    scatter_deal(&c);
    suite_run("fsdp=2", replicas_rank, &c, &report);
    suite_expect_ok("fsdp=2", &report);
}

/* ---- costs ---- */

static void shard_costs(void **state) {
    const xp_mesh two = lone_mesh(2);
    xp_cost c;
    (void)state;
    static const int64_t start[2] = {0, 3}, rows[2] = {3, 2};
    const xp_gather_args g = {
        .shard = cube(XP_F32, 2, 3, 4), .full = cube(XP_BF16, 2, 5, 4), .axis = XP_FSDP, .start = start, .rows = rows};
    xp_stage_gather.cost(&g, &two, &c);
    assert_true(c.net_bytes == 2 * 3 * 4 * 2 && c.mem_bytes == 24 * 4 + 40 * 2);
    const int64_t dim[4] = {1, 2, 5, 4};
    const xp_scatter_args s = {.grad = xp_tensor_of(take(160), XP_F32, 4, dim),
                               .shard = cube(XP_F32, 2, 3, 4),
                               .axis = XP_WORLD,
                               .start = start,
                               .rows = rows,
                               .divisor = 2};
    xp_stage_scatter.cost(&s, &two, &c);
    assert_true(c.net_bytes == 2 * 2 * 4 * 4 && c.mem_bytes == 40 * 4 + 24 * 4 && c.flop == 24 * 2);
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- refusals ---- */

static const int64_t two_start[2] = {0, 3}, two_rows[2] = {3, 2}, hole_start[2] = {0, 4}, gap_rows[2] = {3, 1};
static const int64_t minus_rows[2] = {3, -1}, far_start[2] = {0, 9}, more_rows[2] = {4, 1};
SPOIL(g_axis, xp_gather_args, a->axis = XP_LOCAL)
SPOIL(g_none, xp_gather_args, a->rows = NULL)
SPOIL(g_hole, xp_gather_args, a->start = hole_start)
SPOIL(g_sum, xp_gather_args, a->rows = gap_rows)
SPOIL(g_minus, xp_gather_args, a->rows = minus_rows)
SPOIL(g_shard, xp_gather_args, a->shard.dim[1] = 2)
SPOIL(g_columns, xp_gather_args, a->full.dim[2] = 2)
static const refusal gather_refusals[] = {
    {g_axis, "axis is -1"},
    {g_none, "rows is absent, expected 2 row numbers"},
    {g_hole, "start[1] is 4, expected 3"},
    {g_sum, "full dim 1 is 5, expected 4, the sum of rows"},
    {g_minus, "rows[1] is -1, expected >= 0"},
    {g_shard, "shard dim 1 is 2, expected rows[0] = 3"},
    {g_columns, "full dim 2 is 2, expected N = 4"},
};

static int64_t flat_blocks[2] = {4, 4};
SPOIL(s_axis, xp_scatter_args, a->axis = XP_NAXIS)
SPOIL(s_none, xp_scatter_args, a->start = NULL)
SPOIL(s_minus, xp_scatter_args, a->rows = minus_rows)
SPOIL(s_far, xp_scatter_args, a->start = far_start)
SPOIL(s_hole, xp_scatter_args, a->rows = gap_rows)
SPOIL(s_shard, xp_scatter_args, a->rows = more_rows; a->start = hole_start)
SPOIL(s_zero, xp_scatter_args, a->divisor = 0.0)
SPOIL(s_nan, xp_scatter_args, a->divisor = (double)NAN)
SPOIL(s_huge, xp_scatter_args, a->divisor = 1e300)
SPOIL(s_minus_pre, xp_scatter_args, a->pre = -1)
SPOIL(s_nan_pre, xp_scatter_args, a->pre = (double)NAN)
SPOIL(s_tiny_pre, xp_scatter_args, a->pre = 1e9; a->reduce_dtype = XP_F16)
SPOIL(s_fold_pre, xp_scatter_args, a->pre = 3; a->fold_blocks = 1; a->blocks = xp_tensor_1d(flat_blocks, XP_I64, 1))
SPOIL(s_reduce, xp_scatter_args, a->reduce_dtype = XP_E4M3)
SPOIL(s_f64, xp_scatter_args, a->grad.dtype = XP_F64)
SPOIL(s_wide, xp_scatter_args, a->shard.dtype = XP_F64)
SPOIL(s_many, xp_scatter_args, a->grad.dim[0] = 2)
SPOIL(s_word, xp_scatter_args, a->fold_blocks = 2)
SPOIL(s_spare, xp_scatter_args, a->blocks = xp_tensor_1d(flat_blocks, XP_I64, 1))
SPOIL(s_absent, xp_scatter_args, a->fold_blocks = 1)
SPOIL(s_flat, xp_scatter_args, a->fold_blocks = 1; a->grad.dim[0] = 2; a->blocks = xp_tensor_1d(flat_blocks, XP_I64, 2))
SPOIL(s_narrow, xp_scatter_args, a->fold_blocks = 1; a->reduce_dtype = XP_BF16;
      a->blocks = xp_tensor_1d(flat_blocks, XP_I64, 1))
SPOIL(s_count, xp_scatter_args, a->fold_blocks = 1; a->blocks = xp_tensor_1d(flat_blocks, XP_I64, 2))
static const refusal scatter_refusals[] = {
    {s_axis, "axis is 7"},
    {s_none, "start is absent, expected 2 row numbers"},
    {s_minus, "rows[1] is -1, expected 0 to R0 = 5"},
    {s_far, "start[1] is 9, expected 0 to R0 - rows[1] = 3"},
    {s_hole, "row 4 of grad belongs to no rank"},
    {s_shard, "shard dim 1 is 3, expected rows[0] = 4"},
    {s_zero, "divisor is 0, expected > 0"},
    {s_nan, "divisor is nan, expected > 0"},
    {s_huge, "divisor is 1e+300, expected > 0 and finite as f32"},
    {s_minus_pre, "pre is -1, expected 0, or a number"},
    {s_nan_pre, "pre is nan, expected 0"},
    {s_tiny_pre, "pre is 1e+09, expected 0, or a number whose inverse is above 0 and finite in f16"},
    {s_fold_pre, "pre is 3, expected 1 with fold_blocks"},
    {s_reduce, "reduce_dtype is e4m3, expected f32, bf16 or f16"},
    {s_f64, "reduce_dtype is f32, expected f64 with grad f64"},
    {s_wide, "shard has dtype f64, expected f32 with grad f32"},
    {s_many, "grad dim 0 is 2, expected B = 1 without fold_blocks"},
    {s_word, "fold_blocks is 2, expected 0 or 1"},
    {s_spare, "blocks is present, expected none"},
    {s_absent, "blocks is absent, expected [B] with fold_blocks"},
    {s_flat, "blocks[1] is 4, expected more than 4"},
    {s_narrow, "reduce_dtype is bf16, expected f32 with grad f32 and fold_blocks"},
    {s_count, "blocks dim 0 is 2, expected B = 1"},
};

static void shard_refusals(void **state) {
    xp_mesh two = lone_mesh(2);
    (void)state;
    const xp_gather_args g = {.shard = cube(XP_F32, 2, 3, 4),
                              .full = cube(XP_BF16, 2, 5, 4),
                              .axis = XP_FSDP,
                              .start = two_start,
                              .rows = two_rows};
    REFUSE(xp_stage_gather, two, g, gather_refusals);
    const int64_t dim[4] = {1, 2, 5, 4};
    const xp_scatter_args s = {.grad = xp_tensor_of(take(160), XP_F32, 4, dim),
                               .shard = cube(XP_F32, 2, 3, 4),
                               .axis = XP_WORLD,
                               .start = two_start,
                               .rows = two_rows,
                               .reduce_dtype = XP_F32,
                               .divisor = 2};
    REFUSE(xp_stage_scatter, two, s, scatter_refusals);
    assert_int_equal(pool_close(), XP_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gather_meshes),  cmocka_unit_test(scatter_meshes),
        cmocka_unit_test(scatter_blocks), cmocka_unit_test(scatter_block_twice),
        cmocka_unit_test(scatter_finish), cmocka_unit_test(scatter_blocks_begin_with_zero),
        cmocka_unit_test(scatter_bounds), cmocka_unit_test(scatter_chunks),
        cmocka_unit_test(replicas_see),   cmocka_unit_test(shard_costs),
        cmocka_unit_test(shard_refusals), cmocka_unit_test(scatter_divides_first),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
