/* What the tests of single stages share: poisoned and guarded memory for each rank, calls that check first, bounds,
 * properties, and tables of refusals.
 *
 * Memory belongs to the thread that takes it, so ranks of one process do not meet here. Must hold no expected values.
 */
#ifndef XP_TESTS_STAGE_SUITE_H
#define XP_TESTS_STAGE_SUITE_H

#include "conform/mesh_suite.h"
#include "num.h"
#include "xp/backend.h"

enum { POISON = 0xA5, BLOCKS = 256 };

/* ---- memory of one rank: poisoned, with a guard behind each block ---- */

static _Thread_local struct {
    unsigned char *p[BLOCKS];
    size_t bytes[BLOCKS];
    int n;
} pool;

static inline void *take(size_t bytes) {
    void *p = NULL;
    if (pool.n == BLOCKS || posix_memalign(&p, 64, bytes + 64) != 0)
        abort();
    memset(p, POISON, bytes + 64);
    pool.p[pool.n] = p;
    pool.bytes[pool.n++] = bytes;
    return p;
}

static inline xp_status pool_close(void) {
    int broken = 0;
    for (int i = 0; i < pool.n; i++) {
        for (int j = 0; j < 64; j++)
            broken += pool.p[i][pool.bytes[i] + (size_t)j] != POISON;
        free(pool.p[i]);
    }
    pool.n = 0;
    MUST(broken == 0, "%d bytes were written behind a block", broken);
    return XP_OK;
}

/* [n0] or [n0,n1]; a gap behind each row of a matrix must keep its poison too. */
enum { GAP = 3 };
static inline xp_tensor vector(xp_dtype d, int64_t n) {
    return xp_tensor_1d(take(xp_dtype_bytes(d, n)), d, n);
}
static inline xp_tensor matrix(xp_dtype d, int64_t n0, int64_t n1) {
    xp_tensor t = xp_tensor_2d(take(xp_dtype_bytes(d, n0 * (n1 + GAP))), d, n0, n1);
    t.stride[0] = n1 + GAP;
    return t;
}
static inline xp_tensor cube(xp_dtype d, int64_t n0, int64_t n1, int64_t n2) {
    xp_tensor t = xp_tensor_3d(take(xp_dtype_bytes(d, n0 * n1 * (n2 + GAP))), d, n0, n1, n2);
    t.stride[1] = n2 + GAP;
    t.stride[0] = n1 * t.stride[1];
    return t;
}

static inline double get(const xp_tensor *t, int64_t i, int64_t j) {
    return xp_widen(xp_tensor_at(t, i, j, 0, 0), t->dtype, 0);
}
static inline int64_t get_i64(const xp_tensor *t, int64_t i) {
    return *(const int64_t *)xp_tensor_at(t, i, 0, 0, 0);
}
static inline int32_t get_i32(const xp_tensor *t, int64_t i, int64_t j) {
    return *(const int32_t *)xp_tensor_at(t, i, j, 0, 0);
}
static inline void set(const xp_tensor *t, int64_t i, int64_t j, double v) {
    void *p = xp_tensor_at(t, i, j, 0, 0);
    if (t->dtype == XP_I64)
        *(int64_t *)p = (int64_t)v;
    else if (t->dtype == XP_I32)
        *(int32_t *)p = (int32_t)v;
    else
        xp_ref_store(p, t->dtype, 0, v);
}

/* 1 when rows [lo, dim 0), and the gap behind every row, still hold their poison. */
static inline int untouched(const xp_tensor *t, int64_t lo) {
    const size_t each = xp_dtype_bytes(t->dtype, 1);
    const int64_t width = t->ndim > 1 ? t->dim[1] : 1, stride = t->stride[0];
    const unsigned char *base = t->data;
    for (int64_t i = 0; i < t->dim[0]; i++) {
        for (int64_t j = i < lo ? width : 0; j < stride; j++) {
            for (size_t b = 0; b < each; b++) {
                if (base[(size_t)(i * stride + j) * each + b] != POISON)
                    return 0;
            }
        }
    }
    return 1;
}

static inline xp_status run_unchecked(const xp_kernel *k, const xp_mesh *m, const void *args) {
    const size_t bytes = k->workspace ? k->workspace(args, m) : 0;
    const xp_exec x = {.mesh = m, .ws = take(bytes), .ws_bytes = bytes};
    return k->run(&x, args);
}

static inline xp_status run_kernel(const xp_kernel *k, const xp_mesh *m, const void *args) {
    XP_TRY(k->stage->check(args, m));
    return run_unchecked(k, m, args);
}

static inline xp_status properties_hold(const xp_stage *s, const xp_mesh *m, const void *args) {
    for (int i = 0; i < s->properties; i++) {
        double r = -1.0;
        XP_TRY(s->property[i].residual(args, m, &r));
        MUST(r >= 0.0 && r <= 1.0, "%s: property %s has residual %g", s->name, s->property[i].name, r);
    }
    return XP_OK;
}

/* Tolerance of one operand, given the judge's values. */
static inline xp_status bound_of(const xp_stage *s, const xp_mesh *m, const void *args, const char *name,
                                 const xp_tensor *ref, xp_tensor *tol) {
    return s->bound(args, m, xp_stage_operand(s, name), ref, take(s->bound_workspace(args, m)), tol);
}

/* Ranks of a mesh that never communicates: enough for check(), cost() and local stages. */
static xp_comm lone[2] = {{NULL, 0, 1, NULL}, {NULL, 0, 2, NULL}};
static inline xp_mesh lone_mesh(int size) {
    xp_mesh m;
    for (int i = 0; i < XP_NAXIS; i++)
        m.axis[i] = &lone[size - 1];
    return m;
}

static inline uint64_t mix(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    uint64_t z = a * 0x9E3779B97F4A7C15u + b * 0xBF58476D1CE4E5B9u + c * 0x94D049BB133111EBu + d + 1;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* In [-1, 1), 24 random bits. */
static inline double real(uint64_t a, uint64_t b, uint64_t c) {
    return (double)(int64_t)(mix(a, b, c, 9) >> 40) * 0x1p-23 - 1.0;
}

/* ---- refusals ---- */

/* check() must refuse args after `spoil`, with a text that holds `says`. */
typedef struct {
    void (*spoil)(void *args);
    const char *says;
} refusal;

static inline void expect_refusals(const xp_stage *s, const xp_mesh *m, const void *args, const refusal *r, int n) {
    for (int i = 0; i < n; i++) {
        union {
            int64_t aligned;
            char bytes[4096];
        } copy;
        assert_true(s->args_size <= sizeof copy);
        assert_int_equal(s->check(args, m), XP_OK);
        memcpy(&copy, args, s->args_size);
        r[i].spoil(&copy);
        if (s->check(&copy, m) != XP_E_ARG || !strstr(xp_error_text(), r[i].says))
            fail_msg("%s refusal %d: expected '%s', got '%s'", s->name, i, r[i].says, xp_error_text());
    }
}

/* A spoiler: statements on the args, called a. */
#define SPOIL(name, type, ...)     \
    static void name(void *args) { \
        type *a = args;            \
        __VA_ARGS__;               \
    }
#define REFUSE(stage, mesh, args, table) \
    expect_refusals(&(stage), &(mesh), &(args), (table), (int)(sizeof(table) / sizeof *(table)))

#endif
