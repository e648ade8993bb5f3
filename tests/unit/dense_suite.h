/* What the tests of the second formulation share: a call with poisoned workspace, a world of one, gradients by finite
 * differences. Must hold no expected values. */
#ifndef XP_TESTS_DENSE_SUITE_H
#define XP_TESTS_DENSE_SUITE_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "dense/dense.h"

/* Runs the row with exactly the workspace that it asks for, full of NaN. */
static inline xp_status dense_call(const xp_kernel *k, const xp_mesh *m, const void *args) {
    xp_exec x = {.mesh = m};
    x.ws_bytes = k->workspace ? k->workspace(args, m) : 0;
    if (posix_memalign(&x.ws, 64, x.ws_bytes + 1) != 0)
        return XP_FAIL(XP_E_NOMEM, "%zu bytes", x.ws_bytes);
    memset(x.ws, 0xFF, x.ws_bytes);
    const xp_status st = k->run(&x, args);
    free(x.ws);
    return st;
}

/* ---- a world of one ---- */

static inline xp_status one_gather(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst) {
    (void)c;
    (void)q;
    if (rows[0] != src->dim[0] || dst->dim[0] != src->dim[0])
        return XP_FAIL(XP_E_COMM, "all_gather: rows differ");
    if (xp_tensor_count(src) > 0)
        memcpy(dst->data, src->data, xp_dtype_bytes(src->dtype, xp_tensor_count(src)));
    return XP_OK;
}

static inline const xp_mesh *one_rank(void) {
    static const xp_mesh_ops ops = {
        .abi = XP_ABI, .size = sizeof(xp_mesh_ops), .name = "one", .all_gather = one_gather};
    static xp_comm comm = {.ops = &ops, .rank = 0, .size = 1};
    static const xp_mesh mesh = {.axis = {&comm, &comm, &comm, &comm, &comm, &comm, &comm}};
    return &mesh;
}

static inline void dense_ok(const xp_kernel *k, const void *args) {
    const xp_status st = dense_call(k, one_rank(), args);
    if (st != XP_OK)
        fail_msg("%s: %s", xp_status_name(st), xp_error_text());
}

/* ---- numbers ---- */

static inline void near(double got, double want, double tol, const char *what, int64_t at) {
    if (!(fabs(got - want) <= tol) && !(isnan(got) && isnan(want)))
        fail_msg("%s[%lld] is %.17g, expected %.17g within %.3g", what, (long long)at, got, want, tol);
}

/* Doubles in [-1, 1], 24 bits, the same on every host. */
static inline double draw(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(*state >> 40) / 8388608.0 - 1.0;
}

static inline void draw_all(double *v, int64_t n, uint64_t seed) {
    for (int64_t i = 0; i < n; i++)
        v[i] = draw(&seed);
}

/* d loss / d v[i] by the five-point rule with h = 2^-9. Truncation is h^4 M / 30 with M the fifth derivative: below
 * 5e-13 M; rounding is 1.5 * 2^-53 |loss| * steps / h with loss computed in some 1e3 operations: below 1e-10. The
 * functions differentiated here (silu, softmax, rsqrt on values of order 1) have M below 1e3: 1e-9 covers both. */
static const double FD_TOL = 1e-9;

typedef double (*loss_fn)(void *ctx);

static inline void check_gradient(loss_fn loss, void *ctx, double *v, int64_t n, const double *grad, const char *what) {
    const double h = 0x1p-9;
    for (int64_t i = 0; i < n; i++) {
        const double keep = v[i];
        double f[4];
        for (int s = 0; s < 4; s++) {
            v[i] = keep + h * (s < 2 ? s - 2 : s - 1);
            f[s] = loss(ctx);
        }
        v[i] = keep;
        const double d = (8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * h);
        near(grad[i], d, FD_TOL, what, i);
    }
    loss(ctx); /* outputs as before */
}

static inline double inner(const double *a, const double *b, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++)
        s += a[i] * b[i];
    return s;
}

/* The plain dialects of the tests. */
static const xp_dialect RAW = {.name = "raw", .logit_scale = 1, .scale = 1, .gated = 1, .act_alpha = 1};
static const xp_dialect RENORM = {
    .name = "renorm", .logit_scale = 1, .scale = 1.5, .gated = 1, .act_alpha = 1, .renorm = XP_RENORM_SUM};

#define COUNT(a) ((int64_t)(sizeof(a) / sizeof((a)[0])))
#define D1(a) xp_tensor_1d((a), XP_F64, COUNT(a))
#define D2(a, n0) xp_tensor_2d((a), XP_F64, (n0), COUNT(a) / (n0))
#define D3(a, n0, n1) xp_tensor_3d((a), XP_F64, (n0), (n1), COUNT(a) / ((n0) * (n1)))
#define F1(a) xp_tensor_1d((a), XP_F32, COUNT(a))
#define L1(a) xp_tensor_1d((a), XP_I64, COUNT(a))
#define I1(a) xp_tensor_1d((a), XP_I32, COUNT(a))
#define I2(a, n0) xp_tensor_2d((a), XP_I32, (n0), COUNT(a) / (n0))
#define B1(a) xp_tensor_1d((a), XP_U8, COUNT(a))

#endif
