/* Tests of the second formulation, stages of one rank: formats by enumerating neighbours, results worked out by hand,
 * gradients by finite differences, the whole block against its own parts. It compares nothing with the reference. */
#include <mpfr.h>

#include "dense/num.h"
#include "dense_suite.h"

/* ---- formats ---- */

/* Codes 0..max are the finite values that are not negative, in order. ends: what lies behind the largest. */
typedef struct {
    xp_dtype d;
    uint64_t max, sign, over;
    int step; /* codes tried: every step-th */
} walk;

static double value(xp_dtype d, uint64_t code) {
    return d == XP_E2M1 ? xp_widen(&(uint8_t){(uint8_t)code}, d, 0) : xp_widen(&code, d, 0);
}

static void expect_code(xp_dtype d, double v, int saturate, uint64_t want) {
    const uint64_t got = xp_dense_narrow(v, d, saturate);
    if (got != want)
        fail_msg("%s of %.17g is 0x%llx, expected 0x%llx", xp_dtype_name(d), v, (unsigned long long)got,
                 (unsigned long long)want);
}

/* Between two neighbours: below, at and above the middle, on both sides of zero. */
static void expect_between(const walk *w, uint64_t code, double next) {
    const double lo = value(w->d, code), mid = lo / 2 + next / 2;
    const uint64_t up = code == w->max ? w->over : code + 1, tie = (code & 1) ? up : code;
    const uint64_t minus_up = code == w->max && w->over == w->sign ? w->over : up | w->sign;
    expect_code(w->d, lo, 0, code);
    expect_code(w->d, nextafter(mid, 0), 0, code);
    expect_code(w->d, mid, 0, tie);
    expect_code(w->d, nextafter(mid, HUGE_VAL), 0, up);
    if (code > 0)
        expect_code(w->d, -nextafter(mid, 0), 0, code | w->sign);
    expect_code(w->d, -nextafter(mid, HUGE_VAL), 0, minus_up);
}

static void test_narrow_every_neighbour(void **state) {
    (void)state;
    static const walk walks[] = {{XP_BF16, 0x7F7F, 0x8000, 0x7F80, 1},
                                 {XP_F16, 0x7BFF, 0x8000, 0x7C00, 1},
                                 {XP_E4M3, 0x7E, 0x80, 0x7F, 1},
                                 {XP_E5M2, 0x7B, 0x80, 0x7C, 1},
                                 {XP_E4M3FNUZ, 0x7F, 0x80, 0x80, 1},
                                 {XP_E5M2FNUZ, 0x7F, 0x80, 0x80, 1},
                                 {XP_E2M1, 7, 8, 7, 1},
                                 {XP_F32, 0x7F7FFFFF, 0x80000000u, 0x7F800000, 104729}};
    for (size_t i = 0; i < sizeof walks / sizeof walks[0]; i++) {
        const walk *w = &walks[i];
        for (uint64_t c = 0; c <= w->max; c += (uint64_t)w->step) {
            /* behind the largest value the grid goes on by the last step */
            const double top = value(w->d, w->max), below = value(w->d, w->max - 1);
            expect_between(w, c, c == w->max ? top + (top - below) : value(w->d, c + 1));
        }
        const double top = value(w->d, w->max);
        expect_between(w, w->max, top + (top - value(w->d, w->max - 1)));
        expect_code(w->d, top * 4, 1, w->max);
        expect_code(w->d, -HUGE_VAL, 1, w->max | w->sign);
        expect_code(w->d, 0x1p-1074, 0, 0);
    }
}

static void test_narrow_special(void **state) {
    (void)state;
    expect_code(XP_BF16, -0.0, 0, 0x8000);
    expect_code(XP_E4M3FNUZ, -0.0, 0, 0);
    expect_code(XP_E4M3FNUZ, -0x1p-20, 0, 0);
    expect_code(XP_E4M3, HUGE_VAL, 0, 0x7F);
    expect_code(XP_E5M2, HUGE_VAL, 0, 0x7C);
    expect_code(XP_E4M3, 464, 0, 0x7E);
    expect_code(XP_E4M3, 465, 0, 0x7F);
    expect_code(XP_E5M2, 61439, 0, 0x7B);
    expect_code(XP_E5M2, 61440, 0, 0x7C);
    expect_code(XP_E8M0, 1.5, 0, 128);
    expect_code(XP_E8M0, 1.4999, 0, 127);
    expect_code(XP_E8M0, 3, 0, 129); /* a tie, up; 128 is even */
    expect_code(XP_E8M0, nextafter(3, 0), 0, 128);
    expect_code(XP_E8M0, 0x1.8p127, 0, 255);
    expect_code(XP_E8M0, nextafter(0x1p-127, 1), 0, 1);
    expect_code(XP_E8M0, nextafter(0x1p-127, 0), 0, 0);
    expect_code(XP_E8M0, 0x1.7p-126, 0, 1);
    expect_code(XP_E8M0, 0, 0, 255);
    expect_code(XP_E8M0, 0, 1, 0);
    expect_code(XP_E2M1, -(double)NAN, 0, 7);
    expect_code(XP_E8M0, -1, 0, 255);
    expect_code(XP_E8M0, HUGE_VAL, 1, 254);
    expect_code(XP_F64, -HUGE_VAL, 1, 0xFFEFFFFFFFFFFFFF);
    expect_code(XP_F64, -HUGE_VAL, 0, 0xFFF0000000000000);
    static const xp_dtype with_nan[] = {XP_F32, XP_BF16, XP_F16, XP_E4M3, XP_E5M2, XP_E4M3FNUZ, XP_E5M2FNUZ, XP_E8M0};
    for (size_t i = 0; i < sizeof with_nan / sizeof with_nan[0]; i++) {
        const uint64_t c = xp_dense_narrow((double)NAN, with_nan[i], 1);
        assert_true(isnan(value(with_nan[i], c)));
    }
}

static void test_cast(void **state) {
    (void)state;
    double x[5] = {1.0, 0x1.01p0, 0x1.03p0, 1e39, -0.3};
    uint16_t y[5];
    xp_cast_args a = {.x = D1(x), .y = xp_tensor_1d(y, XP_BF16, 5)};
    dense_ok(&xp_dense_cast, &a);
    const uint16_t want[5] = {0x3F80, 0x3F80, 0x3F82, 0x7F80, 0xBE9A};
    assert_memory_equal(y, want, sizeof y);
    a.saturate = 1;
    dense_ok(&xp_dense_cast, &a);
    assert_int_equal(y[3], 0x7F7F);
    uint8_t packed[3] = {0xFF, 0xFF, 0xFF};
    double z[5] = {0.5, -6, 2.5, 100, 1.25};
    a = (xp_cast_args){.x = D1(z), .y = xp_tensor_1d(packed, XP_E2M1, 5)};
    dense_ok(&xp_dense_cast, &a);
    const uint8_t codes[3] = {0xF1, 0x74, 0xF2}; /* the half behind the end is left alone */
    assert_memory_equal(packed, codes, sizeof packed);
}

/* ---- token stages ---- */

static void test_sum_rounds_once(void **state) {
    (void)state;
    /* 0x1.01p0 is the middle of two bf16; the tiny term decides, and is lost in a sum rounded to double. */
    float a[2] = {0x1.01p0f, 0x1.01p0f}, b[2] = {0x1p-80f, -0x1p-80f};
    uint16_t y[2];
    const xp_residual_args r = {
        .a = xp_tensor_2d(a, XP_F32, 1, 2), .b = xp_tensor_2d(b, XP_F32, 1, 2), .y = xp_tensor_2d(y, XP_BF16, 1, 2)};
    dense_ok(&xp_dense_residual, &r);
    assert_int_equal(y[0], 0x3F81);
    assert_int_equal(y[1], 0x3F80);
}

static void test_residual_strides(void **state) {
    (void)state;
    double a[6] = {1, 2, 99, 3, 4, 99}, b[4] = {10, 20, 30, 40}, y[6] = {0, 0, 7, 0, 0, 7};
    xp_residual_args r = {.a = xp_tensor_2d(a, XP_F64, 2, 2), .b = D2(b, 2), .y = xp_tensor_2d(y, XP_F64, 2, 2)};
    r.a.stride[0] = r.y.stride[0] = 3;
    dense_ok(&xp_dense_residual, &r);
    const double want[6] = {11, 22, 7, 33, 44, 7};
    assert_memory_equal(y, want, sizeof y);
    r.a.dim[0] = r.b.dim[0] = r.y.dim[0] = 0;
    dense_ok(&xp_dense_residual, &r);
}

static void test_embed(void **state) {
    (void)state;
    double table[6] = {1, 2, 3, 4, 5, 6}, pos[8] = {.1, .2, .3, .4, .5, .6, .7, .8}, y[8];
    int32_t token[4] = {2, 0, 2, 1};
    const xp_embed_args a = {.token = I1(token), .table = D2(table, 3), .pos = D2(pos, 4), .y = D2(y, 4)};
    dense_ok(&xp_dense_embed, &a);
    const double want[8] = {5 + .1, 6 + .2, 1 + .3, 2 + .4, 5 + .5, 6 + .6, 3 + .7, 4 + .8};
    assert_memory_equal(y, want, sizeof y);
    /* tokens 3, 4, 5, 6 in blocks of 2: {3}, {4, 5}, {6} */
    double dy[8] = {1, 2, 10, 20, 100, 200, 1000, 2000}, d[18];
    xp_embed_bwd_args b = {.token = I1(token), .dy = D2(dy, 4), .dtable = D3(d, 3, 3), .token0 = 3, .block = 2};
    dense_ok(&xp_dense_embed_bwd, &b);
    const double blocks[18] = {0, 0, 0, 0, 1, 2, 10, 20, 0, 0, 100, 200, 0, 0, 1000, 2000, 0, 0};
    assert_memory_equal(d, blocks, sizeof d);
    b.block = 0;
    b.dtable = xp_tensor_3d(d, XP_F64, 1, 3, 2);
    dense_ok(&xp_dense_embed_bwd, &b);
    const double whole[6] = {10, 20, 1000, 2000, 101, 202};
    assert_memory_equal(d, whole, sizeof whole);
}

typedef struct {
    xp_rmsnorm_args a;
    const double *dy;
} rms_case;

static double rms_loss(void *ctx) {
    const rms_case *c = ctx;
    dense_ok(&xp_dense_rmsnorm, &c->a);
    return inner(c->a.y.data, c->dy, c->a.y.dim[0] * c->a.y.dim[1]);
}

static void test_rmsnorm(void **state) {
    (void)state;
    double x[2] = {3, 4}, w[2] = {1, 2}, y[2], rstd[1];
    xp_rmsnorm_args a = {.x = D2(x, 1), .w = D1(w), .y = D2(y, 1), .rstd = D1(rstd), .eps = 12.5};
    dense_ok(&xp_dense_rmsnorm, &a); /* mean square 12.5, plus eps 25: divided by 5 */
    near(y[0], 0.6, 0x1p-52, "y", 0);
    near(y[1], 1.6, 0x1p-51, "y", 1);
    near(rstd[0], 0.2, 0x1p-54, "rstd", 0);
    double bx[15], bw[5], bdy[15], by[15], br[3], dx[15], dw[10], sum[5];
    draw_all(bx, 15, 1);
    draw_all(bw, 5, 2);
    draw_all(bdy, 15, 3);
    rms_case c = {.a = {.x = D2(bx, 3), .w = D1(bw), .y = D2(by, 3), .rstd = D1(br), .eps = 0.25}, .dy = bdy};
    rms_loss(&c);
    const xp_rmsnorm_bwd_args b = {.dy = D2(bdy, 3),
                                   .x = D2(bx, 3),
                                   .w = D1(bw),
                                   .rstd = D1(br),
                                   .dx = D2(dx, 3),
                                   .dw = D2(dw, 2),
                                   .token0 = 5,
                                   .block = 2};
    dense_ok(&xp_dense_rmsnorm_bwd, &b);
    for (int h = 0; h < 5; h++)
        sum[h] = dw[h] + dw[5 + h]; /* blocks {5}, {6, 7} */
    check_gradient(rms_loss, &c, bx, 15, dx, "dx");
    check_gradient(rms_loss, &c, bw, 5, sum, "dw");
    double one[5];
    for (int h = 0; h < 5; h++)
        one[h] = bdy[h] * bx[h] * br[0];
    for (int h = 0; h < 5; h++)
        near(dw[h], one[h], 0x1p-51, "dw of block 0", h);
}

static void test_linear(void **state) {
    (void)state;
    double x[4] = {1, 2, 3, 4}, w[6] = {1, 0, 0, 1, 10, 100}, bias[3] = {.5, 0, -.5}, y[6], dx[4];
    const xp_router_args r = {.x = D2(x, 2), .w = D2(w, 3), .bias = D1(bias), .logits = D2(y, 2)};
    dense_ok(&xp_dense_router, &r);
    const double want[6] = {1.5, 2, 209.5, 3.5, 4, 429.5};
    assert_memory_equal(y, want, sizeof y);
    const xp_head_args h = {.x = D2(x, 2), .w = D2(w, 3), .logits = D2(y, 2)};
    dense_ok(&xp_dense_head, &h);
    const double plain[6] = {1, 2, 210, 3, 4, 430};
    assert_memory_equal(y, plain, sizeof y);
    double dy[6] = {1, 2, 3, -1, 0, 1};
    const xp_head_bwd_args hb = {.dlogits = D2(dy, 2), .w = D2(w, 3), .dx = D2(dx, 2)};
    dense_ok(&xp_dense_head_bwd, &hb);
    const double back[4] = {31, 302, 9, 100};
    assert_memory_equal(dx, back, sizeof dx);
    memset(dx, 0, sizeof dx);
    const xp_router_bwd_args rb = {.dlogits = D2(dy, 2), .w = D2(w, 3), .dx = D2(dx, 2)};
    dense_ok(&xp_dense_router_bwd, &rb);
    assert_memory_equal(dx, back, sizeof dx);
}

/* More rows than share one pass over the weight, and a width that the lanes of a dot product do not divide. */
static void test_linear_many_rows(void **state) {
    (void)state;
    enum { T = 37, H = 19, V = 3 };
    static double x[T * H], w[V * H], y[T * V];
    for (int i = 0; i < T * H; i++)
        x[i] = i % 7 - 3;
    for (int i = 0; i < V * H; i++)
        w[i] = i % 5 - 2;
    const xp_head_args h = {.x = D2(x, T), .w = D2(w, V), .logits = D2(y, T)};
    dense_ok(&xp_dense_head, &h);
    for (int t = 0; t < T; t++) {
        for (int v = 0; v < V; v++) {
            double s = 0; /* small integers: exact in any order */
            for (int k = 0; k < H; k++)
                s += x[t * H + k] * w[v * H + k];
            near(y[t * V + v], s, 0, "logits", t * V + v);
        }
    }
    static double dx[T * H];
    const xp_head_bwd_args b = {.dlogits = D2(y, T), .w = D2(w, V), .dx = D2(dx, T)};
    dense_ok(&xp_dense_head_bwd, &b);
    for (int i = 0; i < T * H; i++) {
        double s = 0;
        for (int v = 0; v < V; v++)
            s += y[i / H * V + v] * w[v * H + i % H];
        near(dx[i], s, 0, "dx", i);
    }
}

/* ---- routing ---- */

static void test_route(void **state) {
    (void)state;
    const double nan = (double)NAN, third = 1.0 / 3;
    double l[12] = {0, log(2), log(2), 0, nan, 0, -HUGE_VAL, nan, nan, nan, nan, nan}, s[12], w[6];
    int32_t idx[6];
    xp_route_args a = {.logits = D2(l, 3), .scores = D2(s, 3), .idx = I2(idx, 3), .w = D2(w, 3), .dialect = &RAW};
    dense_ok(&xp_dense_route, &a);
    const int32_t want[6] = {1, 2, 1, 2, 0, 1};
    assert_memory_equal(idx, want, sizeof idx);
    const double scores[8] = {third / 2, third, third, third / 2, 0, 1, 0, 0};
    for (int i = 0; i < 8; i++)
        near(s[i], scores[i], 4 * 0x1p-53, "scores", i);
    for (int i = 8; i < 12; i++)
        assert_true(isnan(s[i]));
    near(w[0], third, 4 * 0x1p-53, "w", 0);
    l[7] = HUGE_VAL; /* inf - inf: no number but for the NaN logit, which counts as -inf */
    dense_ok(&xp_dense_route, &a);
    assert_true(idx[2] == 3 && isnan(s[5]) && isnan(s[7]) && s[4] == 0);
    l[7] = nan;
    a.dialect = &RENORM;
    dense_ok(&xp_dense_route, &a);
    near(w[0], 0.75, 8 * 0x1p-53, "renormalised", 0); /* 1.5 times one half */
    near(w[2], 1.5, 8 * 0x1p-53, "renormalised", 2);
    a.replay = 1;
    idx[0] = 3;
    dense_ok(&xp_dense_route, &a);
    assert_int_equal(idx[0], 3);
    near(w[0], 0.5, 8 * 0x1p-53, "replayed", 0); /* 1.5 * (1/6) / (1/6 + 1/3) */
}

static double route_loss(void *ctx) {
    const void *const *c = ctx;
    const xp_route_args *a = c[0];
    dense_ok(&xp_dense_route, a);
    return inner(a->w.data, c[1], a->w.dim[0] * a->w.dim[1]);
}

static void test_route_bwd(void **state) {
    (void)state;
    double l[15], s[15], w[9], dw[9], dl[15], with[15], daux[15];
    int32_t idx[9] = {0, 3, 1, 4, 4, 2, 1, 2, 3}; /* the second token names expert 4 twice */
    draw_all(l, 15, 7);
    draw_all(dw, 9, 8);
    draw_all(daux, 15, 9);
    const xp_dialect *const both[2] = {&RAW, &RENORM};
    for (int d = 0; d < 2; d++) {
        const xp_route_args a = {
            .logits = D2(l, 3), .scores = D2(s, 3), .idx = I2(idx, 3), .w = D2(w, 3), .dialect = both[d], .replay = 1};
        const void *ctx[2] = {&a, dw};
        route_loss(ctx);
        xp_route_bwd_args b = {
            .scores = D2(s, 3), .idx = I2(idx, 3), .dw = D2(dw, 3), .dlogits = D2(dl, 3), .dialect = both[d]};
        dense_ok(&xp_dense_route_bwd, &b);
        check_gradient(route_loss, ctx, l, 15, dl, "dlogits");
        b.daux = D2(daux, 3);
        b.dlogits = D2(with, 3);
        dense_ok(&xp_dense_route_bwd, &b);
        for (int i = 0; i < 15; i++)
            near(with[i], dl[i] + daux[i], 8 * 0x1p-53, "with daux", i);
    }
}

/* The record that the cases below start from. */
static xp_dialect record(xp_score score, xp_select_on on) {
    xp_dialect d = RAW;
    d.score = score;
    d.select_on = on;
    return d;
}

/* One token of f64 logits. */
typedef struct {
    double l[8], s[8], w[4], bias[8], scale[8];
    int32_t idx[4];
    xp_route_args a;
} one_token;

static void open_token(one_token *c, const xp_dialect *d, const double *l, int64_t z, int64_t k) {
    memset(c, 0, sizeof *c);
    memcpy(c->l, l, (size_t)z * sizeof *l);
    c->a = (xp_route_args){.logits = xp_tensor_2d(c->l, XP_F64, 1, z),
                           .scores = xp_tensor_2d(c->s, XP_F64, 1, z),
                           .idx = xp_tensor_2d(c->idx, XP_I32, 1, k),
                           .w = xp_tensor_2d(c->w, XP_F64, 1, k),
                           .dialect = d};
}

static void expect_choice(one_token *c, int k0, int k1, int k2) {
    const int want[3] = {k0, k1, k2};
    dense_ok(&xp_dense_route, &c->a);
    for (int64_t k = 0; k < c->a.idx.dim[1]; k++) {
        if (c->idx[k] != want[k])
            fail_msg("slot %d is %d, expected %d", (int)k, c->idx[k], want[k]);
    }
}

static void expect_weights(one_token *c, double w0, double w1) {
    dense_ok(&xp_dense_route, &c->a);
    near(c->w[0], w0, 8 * 0x1p-53 * fabs(w0), "w", 0);
    near(c->w[1], w1, 8 * 0x1p-53 * fabs(w1), "w", 1);
}

static void test_route_scores(void **state) {
    (void)state;
    const double l[4] = {0, log(3), -log(3), 0}, bias[4] = {0, -.5, .45, .1}, scale[4] = {1, 1, 4, .5};
    xp_dialect d = record(XP_SCORE_SIGMOID, XP_ON_SCORE);
    one_token c;
    open_token(&c, &d, l, 4, 2); /* scores 1/2 3/4 1/4 1/2 */
    memcpy(c.bias, bias, sizeof bias);
    memcpy(c.scale, scale, sizeof scale);
    expect_choice(&c, 1, 0, 0);
    near(c.s[2], .25, 0x1p-53, "sigmoid", 2);
    d.select_bias = 1;
    c.a.bias = xp_tensor_1d(c.bias, XP_F64, 4);
    expect_choice(&c, 2, 3, 0); /* 0.5 0.25 0.7 0.6 */
    expect_weights(&c, .25, .5);
    d.renorm = XP_RENORM_SUM;
    expect_weights(&c, 1.0 / 3, 2.0 / 3);
    d.renorm = XP_RENORM_SUM_PLUS_EPS;
    d.renorm_eps = .25;
    expect_weights(&c, .25, .5);
    d.renorm = XP_RENORM_MAX_EPS;
    expect_weights(&c, 1.0 / 3, 2.0 / 3);
    d.renorm_eps = 2;
    expect_weights(&c, .125, .25);
    d.scale = 2;
    d.expert_scale = 1;
    c.a.scale_e = xp_tensor_1d(c.scale, XP_F64, 4);
    expect_weights(&c, 1, .25);
    d.scale_at = XP_SCALE_OUTPUT;
    expect_weights(&c, .5, .125);
    d.select_on = XP_ON_LOGIT;
    expect_choice(&c, 1, 3, 0); /* 0 0.6 -0.65 0.1 */
    d = record(XP_SCORE_SOFTMAX_TOPK, XP_ON_LOGIT);
    expect_choice(&c, 1, 0, 0);
    expect_weights(&c, .75, .25);
    near(c.s[1], 9.0 / 16, 4 * 0x1p-53, "softmax of all", 1);
    d = record(XP_SCORE_SQRT_SOFTPLUS, XP_ON_SCORE);
    expect_weights(&c, sqrt(log(4)), sqrt(log(2)));
    d = record(XP_SCORE_SIGMOID, XP_ON_SCORE);
    d.logit_scale = 2;
    d.logit_softcap = 3;
    expect_weights(&c, 1 / (1 + exp(-3 * tanh(2 * log(3) / 3))), .5);
}

/* Probabilities 0.30997, 0.06916, 0.31028, 0.31059: three of them are 159/512 in bf16. */
static void test_route_first_score(void **state) {
    (void)state;
    const double l[4] = {2, .5, 2.001, 2.002};
    xp_dialect d = record(XP_SCORE_SOFTMAX, XP_ON_FIRST_SCORE);
    one_token c;
    open_token(&c, &d, l, 4, 3);
    expect_choice(&c, 3, 2, 0);
    d.score_dtype = XP_WIDE_ACT;
    c.a.act = XP_BF16;
    expect_choice(&c, 0, 3, 2);
    d.select_on = XP_ON_SCORE;
    expect_choice(&c, 0, 2, 3);
    d.weight_div_k = 1;
    dense_ok(&xp_dense_route, &c.a);
    near(c.w[0], 159.0 / 512 / 3, 0x1p-53, "a third of the score", 0);
}

static void test_route_table(void **state) {
    (void)state;
    const double l[4] = {0, log(3), -log(3), 0};
    int32_t id[1] = {1}, table[4] = {0, 1, 3, 2};
    const xp_dialect d = record(XP_SCORE_SIGMOID, XP_ON_TOKEN_TABLE);
    one_token c;
    open_token(&c, &d, l, 4, 2);
    c.a.token = I1(id);
    c.a.table = I2(table, 2);
    expect_choice(&c, 3, 2, 0);
    expect_weights(&c, .5, .25);
}

static double logit(double p) {
    return log(p / (1 - p));
}

static void test_route_groups(void **state) {
    (void)state;
    const double l[6] = {logit(.9), logit(.1), logit(.6), logit(.5), logit(.8), logit(.05)};
    xp_dialect d = record(XP_SCORE_SIGMOID, XP_ON_SCORE);
    d.group_reduce = XP_GROUP_TOP2SUM; /* 1.0, 1.1, 0.85 */
    d.n_group = 3;
    d.topk_group = 1;
    one_token c;
    open_token(&c, &d, l, 6, 3);
    expect_choice(&c, 2, 3, 0);
    near(c.w[2], .9, 4 * 0x1p-53, "its own score", 2);
    d.masked_weight = 1;
    expect_choice(&c, 2, 3, 0);
    assert_true(c.w[2] == 0 && c.w[0] > .5);
    d.topk_group = 2;
    expect_choice(&c, 0, 2, 3);
    d.topk_group = 1;
    d.group_reduce = XP_GROUP_MAX;
    expect_choice(&c, 0, 1, 2);
    /* all keys negative: zeros of other groups beat those that stay */
    d.select_bias = 1;
    c.a.bias = xp_tensor_1d(c.bias, XP_F64, 6);
    for (int i = 0; i < 6; i++)
        c.bias[i] = -1;
    expect_choice(&c, 2, 3, 4);
    assert_true(c.w[0] == 0 && c.w[1] == 0 && c.w[2] == 0);
    d.group_mask = XP_MASK_NEGINF;
    expect_choice(&c, 0, 1, 2);
    c.l[0] = (double)NAN; /* scores 0, ranks last even behind what is masked */
    c.bias[0] = c.bias[1] = 1;
    expect_choice(&c, 1, 2, 3);
    for (int i = 0; i < 6; i++)
        c.l[i] = 0;
    c.a.bias.data = NULL;
    expect_choice(&c, 0, 1, 2); /* equal groups: the first */
}

static void test_route_sparsemixer(void **state) {
    (void)state;
    const double l[4] = {1, .99, .5, .97}, zero[4] = {-1, 0, 0, -2};
    xp_dialect d = record(XP_SCORE_SPARSEMIXER, XP_ON_LOGIT);
    d.sparse_eps = .01;
    one_token c;
    open_token(&c, &d, l, 4, 2);
    expect_choice(&c, 0, 1, 0);
    expect_weights(&c, 1 / (1 + exp(-.01)), 1); /* 0.03 and 0.02 / 0.99 are out */
    d.sparse_eps = .0102;
    expect_weights(&c, 1 / (1 + exp(-.01)), 1 / (1 + exp(-.02)));
    const double two[4] = {2, 1.95, -9, -9};
    d.sparse_eps = .0125 + 0x1p-40;
    open_token(&c, &d, two, 4, 2);
    expect_weights(&c, 1 / (1 + exp(-.05)), 1); /* 0.05 / 2 is in */
    open_token(&c, &d, zero, 4, 2);
    expect_choice(&c, 1, 2, 0);
    expect_weights(&c, .5, 1); /* 0 / 0 is in */
}

/* bf16 logits, every step in bf16. sigmoid(1) = 0.7311 is 187/256, and 187/256 + 1/2 lies in the middle of 157/128 and
 * 158/128; softplus(0) = 0.6931 is 177/256, and its root 0.83151 is 213/256. */
static void test_route_rounding(void **state) {
    (void)state;
    uint16_t l[3] = {0x3F80, 0, 0xC2C8}; /* 1, 0, -100 */
    float s[3], w[2];
    double exact[3];
    int32_t idx[2];
    xp_dialect d = record(XP_SCORE_SIGMOID, XP_ON_SCORE);
    d.logits_dtype = d.score_dtype = XP_WIDE_ACT;
    d.renorm = XP_RENORM_SUM;
    xp_route_args a = {.logits = xp_tensor_2d(l, XP_BF16, 1, 3),
                       .scores = xp_tensor_2d(s, XP_F32, 1, 3),
                       .idx = I2(idx, 1),
                       .w = xp_tensor_2d(w, XP_F32, 1, 2),
                       .dialect = &d};
    dense_ok(&xp_dense_route, &a);
    assert_true(s[0] == 187.f / 256 && w[0] == 151.f / 256 && w[1] == 207.f / 512);
    d.scale = 1.5;
    dense_ok(&xp_dense_route, &a);
    assert_true(w[0] == 113.f / 128 && w[1] == 155.f / 256); /* 226.5/256 to even, 310.5/512 to even */
    d.score_dtype = XP_WIDE_F32;
    dense_ok(&xp_dense_route, &a);
    near((double)s[0], 1 / (1 + exp(-1)), 0x1p-25, "f32", 0);
    d = record(XP_SCORE_SQRT_SOFTPLUS, XP_ON_SCORE);
    d.logits_dtype = d.score_dtype = XP_WIDE_ACT;
    dense_ok(&xp_dense_route, &a);
    assert_true(s[1] == 213.f / 256);
    a.scores = xp_tensor_2d(exact, XP_F64, 1, 3);
    dense_ok(&xp_dense_route, &a);
    near(exact[1], sqrt(177.0 / 256), 0x1p-53, "before the last rounding", 1);
    /* (3/2 - 230/256) / (3/2) = 0.40104 is 205/512, and so is 0.4: in, with weight 1 / (1 + exp(-154/256)) = 165.4/256
     */
    uint16_t edge[3] = {0x3FC0, 0x3F66, 0xC100};
    float dw[2] = {1, 0}, dl[3];
    d = record(XP_SCORE_SPARSEMIXER, XP_ON_LOGIT);
    d.logits_dtype = d.score_dtype = XP_WIDE_ACT;
    d.sparse_eps = .2;
    a.logits = xp_tensor_2d(edge, XP_BF16, 1, 3);
    dense_ok(&xp_dense_route, &a);
    assert_true(w[0] == 165.f / 256 && w[1] == 1);
    const xp_route_bwd_args b = {.scores = a.scores,
                                 .idx = a.idx,
                                 .dw = xp_tensor_2d(dw, XP_F32, 1, 2),
                                 .logits = a.logits,
                                 .dlogits = xp_tensor_2d(dl, XP_F32, 1, 3),
                                 .dialect = &d};
    dense_ok(&xp_dense_route_bwd, &b);
    assert_true(dl[0] > .2f && dl[1] == -dl[0] && dl[2] == 0);
}

/* dl = -dw s p of an expert that was not chosen: s p is 1e-315, where doubles have few bits left, and dw s p is not. */
static void test_route_bwd_small(void **state) {
    (void)state;
    double s[3] = {1, 1e-200, 1e-115}, dw[1] = {1e10}, dl[3];
    int32_t idx[1] = {1};
    const xp_dialect d = record(XP_SCORE_SOFTMAX, XP_ON_SCORE);
    const xp_route_bwd_args b = {.scores = xp_tensor_2d(s, XP_F64, 1, 3),
                                 .idx = I2(idx, 1),
                                 .dw = D2(dw, 1),
                                 .dlogits = D2(dl, 1),
                                 .dialect = &d};
    dense_ok(&xp_dense_route_bwd, &b);
    near(dl[2], -1e-305, 4e-16 * 1e-305, "dlogits", 2);
    near(dl[1], 1e-190, 4e-16 * 1e-190, "dlogits", 1);
}

/* Every score, division, factor and mask: J^T dw is the slope of <dw, w>. */
static void test_route_bwd_dialects(void **state) {
    (void)state;
    double l[24], s[24], w[9], dw[9], dl[24], bias[8], scale[8];
    for (int i = 0; i < 40; i++) {
        const xp_score score = (xp_score)(i % 5);
        xp_dialect d =
            record(score, score == XP_SCORE_SOFTMAX_TOPK || score == XP_SCORE_SPARSEMIXER ? XP_ON_LOGIT : XP_ON_SCORE);
        const int free = score != XP_SCORE_SPARSEMIXER && score != XP_SCORE_SOFTMAX_TOPK;
        d.sparse_eps = .3;
        d.renorm = free ? (xp_renorm)(i / 5 % 4) : XP_RENORM_NONE;
        d.renorm_eps = .25;
        d.scale = 1.5;
        d.expert_scale = i / 5 % 2 ? XP_FACTOR_EACH : XP_FACTOR_NONE;
        d.logit_softcap = i / 10 % 2 ? 1.25 : 0;
        d.logit_scale = i / 10 % 2 ? .75 : 1;
        if (i >= 20 && free) {
            d.group_reduce = i & 1 ? XP_GROUP_MAX : XP_GROUP_TOP2SUM;
            d.n_group = 4;
            d.topk_group = 2;
            d.masked_weight = d.select_bias = 1;
            d.renorm = d.renorm == XP_RENORM_SUM ? XP_RENORM_SUM_PLUS_EPS : d.renorm; /* 0 / 0 */
        }
        d.null_experts = i % 2 ? 3 : 0;
        d.null_kind = XP_NULL_SKIP;
        const int64_t k = score == XP_SCORE_SPARSEMIXER ? 2 : 1 + i % 3;
        int32_t idx[9] = {0, 3, 1, 4, 7, 2, 1, 5, 6};
        draw_all(l, 24, (uint64_t)i);
        draw_all(dw, 9, 100);
        draw_all(scale, 8, 102);
        for (int j = 0; j < 24; j++) { /* no step changes who is out or which groups stay */
            static const double apart[8] = {1, .9, .7, .2, -.3, .8, .6, -1};
            l[j] = score == XP_SCORE_SPARSEMIXER ? apart[(j * 3 + j / 8) % 8] : l[j];
            bias[j % 8] = j / 2 % 2 ? -1 : 1;
        }
        const xp_route_args a = {.logits = D2(l, 3),
                                 .scores = D2(s, 3),
                                 .idx = xp_tensor_2d(idx, XP_I32, 3, k),
                                 .w = xp_tensor_2d(w, XP_F64, 3, k),
                                 .bias = D1(bias),
                                 .scale_e = D1(scale),
                                 .dialect = &d,
                                 .replay = 1};
        const void *ctx[2] = {&a, dw};
        route_loss(ctx);
        const xp_route_bwd_args b = {.scores = D2(s, 3),
                                     .idx = a.idx,
                                     .dw = xp_tensor_2d(dw, XP_F64, 3, k),
                                     .dlogits = D2(dl, 3),
                                     .logits = a.logits,
                                     .bias = a.bias,
                                     .scale_e = a.scale_e,
                                     .dialect = &d};
        dense_ok(&xp_dense_route_bwd, &b);
        check_gradient(route_loss, ctx, l, 24, dl, "dlogits");
        if (d.expert_scale) {
            double ds[8];
            const xp_route_scale_bwd_args by = {.scores = D2(s, 3),
                                                .idx = a.idx,
                                                .dw = b.dw,
                                                .dscale = D2(ds, 1),
                                                .dialect = &d,
                                                .logits = a.logits,
                                                .bias = a.bias};
            dense_ok(&xp_dense_route_scale_bwd, &by);
            check_gradient(route_loss, ctx, scale, 8, ds, "dscale");
        }
        double size = 0;
        for (int j = 0; j < 24; j++)
            size += fabs(dl[j]);
        assert_true(size > 0 || k == 1 || d.masked_weight); /* one weight divided by itself has no slope */
    }
}

typedef struct {
    xp_balance_args a;
    double aux, z, scale;
    const double *freq; /* held fixed: it carries no gradient */
} balance_case;

static double balance_loss(void *ctx) {
    const balance_case *c = ctx;
    dense_ok(&xp_dense_balance, &c->a);
    const int64_t e = c->a.prob.dim[0];
    const double *loss = c->a.loss.data;
    return c->scale * (c->aux * (double)e * inner(c->freq, c->a.prob.data, e) + c->z * loss[1]);
}

static void test_balance(void **state) {
    (void)state;
    double l[24] = {0}, freq[3], prob[3], loss[2], kept[3], d[24];
    int32_t idx[16];
    int64_t count[1];
    uint8_t valid[4] = {1, 1, 0, 1};
    for (int i = 0; i < 16; i++)
        idx[i] = (i / 2 + i) % 3;
    balance_case c = {.a = {.logits = D3(l, 2, 4),
                            .idx = xp_tensor_3d(idx, XP_I32, 2, 4, 2),
                            .valid = B1(valid),
                            .freq = D1(freq),
                            .prob = D1(prob),
                            .loss = D1(loss),
                            .count = L1(count),
                            .scope_world = 1},
                      .aux = 0.7,
                      .z = 0.3,
                      .scale = 11};
    dense_ok(&xp_dense_balance, &c.a); /* equal logits: P = 1/3, loss = 3 * K * 1/3 = K */
    assert_int_equal(count[0], 6);
    near(loss[0], 2, 8 * 0x1p-53, "balance", 0);
    near(loss[1], log(3) * log(3), 8 * 0x1p-53, "z", 0);
    near(freq[0] + freq[1] + freq[2], 2, 4 * 0x1p-53, "choices a token", 0);
    draw_all(l, 24, 4);
    dense_ok(&xp_dense_balance, &c.a);
    memcpy(kept, freq, sizeof kept);
    c.freq = kept;
    const xp_balance_bwd_args b = {.logits = D3(l, 2, 4),
                                   .valid = B1(valid),
                                   .freq = D1(kept),
                                   .count = L1(count),
                                   .daux = D3(d, 2, 4),
                                   .aux_coef = c.aux,
                                   .z_coef = c.z,
                                   .scale = c.scale};
    dense_ok(&xp_dense_balance_bwd, &b);
    check_gradient(balance_loss, &c, l, 24, d, "daux");
    assert_true(d[6] == 0 && d[0] != 0);
    memset(valid, 0, sizeof valid);
    dense_ok(&xp_dense_balance, &c.a);
    dense_ok(&xp_dense_balance_bwd, &b);
    assert_true(count[0] == 0 && loss[0] == 0 && loss[1] == 0 && freq[0] == 0 && prob[1] == 0 && d[0] == 0);
}

/* ---- rows and experts ---- */

static void test_permute(void **state) {
    (void)state;
    double x[3] = {10, 20, 30}, rows[16], dx[3];
    int32_t idx[6] = {1, 0, 1, 1, 2, 1}, src[16], pos[6];
    int64_t tok[16], counts[4], offsets[5];
    xp_permute_args a = {.x = D2(x, 3),
                         .idx = I2(idx, 3),
                         .rows = D2(rows, 16),
                         .tok = L1(tok),
                         .src = I1(src),
                         .pos = I2(pos, 3),
                         .counts = L1(counts),
                         .offsets = L1(offsets),
                         .align = 1,
                         .token0 = 100};
    for (int i = 0; i < 16; i++) {
        rows[i] = -7;
        tok[i] = -7;
    }
    dense_ok(&xp_dense_permute, &a);
    /* expert 1 by (slot, token): (t0,k0) (t1,k0) (t1,k1) (t2,k1) */
    const int32_t want_src[6] = {1, 0, 2, 3, 5, 4}, want_pos[6] = {1, 0, 2, 3, 5, 4};
    const int64_t want_offsets[5] = {0, 1, 5, 6, 6}, want_counts[4] = {1, 4, 1, 0};
    const double want_rows[7] = {10, 10, 20, 20, 30, 30, -7};
    assert_memory_equal(src, want_src, sizeof want_src);
    assert_memory_equal(pos, want_pos, sizeof pos);
    assert_memory_equal(offsets, want_offsets, sizeof offsets);
    assert_memory_equal(counts, want_counts, sizeof counts);
    assert_memory_equal(rows, want_rows, sizeof want_rows);
    assert_true(tok[2] == 101 && tok[4] == 102 && tok[6] == -7);
    int32_t other[4] = {0, 1, 1, 0}; /* two tokens with the slots crossed tell the orders apart */
    a.idx = xp_tensor_2d(other, XP_I32, 2, 2);
    a.x.dim[0] = 2;
    a.pos = xp_tensor_2d(pos, XP_I32, 2, 2);
    a.align = 4;
    dense_ok(&xp_dense_permute, &a);
    const int32_t slots[8] = {0, 3, -1, -1, 2, 1, -1, -1};
    assert_memory_equal(src, slots, sizeof slots);
    assert_true(offsets[1] == 4 && offsets[2] == 8 && offsets[4] == 8 && tok[2] == -1 && rows[3] == 0 && rows[5] == 10);
    a.order = XP_ORDER_TOKEN;
    dense_ok(&xp_dense_permute, &a);
    const int32_t tokens[8] = {0, 3, -1, -1, 1, 2, -1, -1};
    assert_memory_equal(src, tokens, sizeof tokens);
    for (int i = 0; i < 8; i++)
        rows[i] = 1 << i;
    const xp_permute_bwd_args b = {.drows = D2(rows, 16), .pos = a.pos, .dx = xp_tensor_2d(dx, XP_F64, 2, 1)};
    dense_ok(&xp_dense_permute_bwd, &b);
    assert_true(dx[0] == 1 + 16 && dx[1] == 32 + 2);
}

typedef struct {
    xp_expert_args a;
    const double *dy;
} expert_case;

static double expert_loss(void *ctx) {
    const expert_case *c = ctx;
    dense_ok(&xp_dense_expert, &c->a);
    return inner(c->a.y.data, c->dy, c->a.y.dim[0] * c->a.y.dim[1]);
}

static void test_expert(void **state) {
    (void)state;
    enum { C = 6, L = 3, H = 3, F = 2 };
    double x[C * H], w1[L * 2 * F * H], w2[L * H * F], pre[C * 2 * F], act[C * F], y[C * H], dy[C * H];
    double dpre[C * 2 * F], dx[C * H], dw1[L * 2 * F * H], dw2[L * H * F];
    int64_t offsets[L + 1] = {0, 2, 2, 5}; /* expert 1 has no rows; row 5 is behind the last border */
    draw_all(x, C * H, 1);
    draw_all(w1, L * 2 * F * H, 2);
    draw_all(w2, L * H * F, 3);
    draw_all(dy, C * H, 4);
    for (int h = 0; h < H; h++)
        y[5 * H + h] = dy[5 * H + h] = 0;
    expert_case c = {.a = {.x = D2(x, C),
                           .offsets = L1(offsets),
                           .w1 = D3(w1, L, 2 * F),
                           .w2 = D3(w2, L, H),
                           .pre = D2(pre, C),
                           .act = D2(act, C),
                           .y = D2(y, C),
                           .dialect = &RAW},
                     .dy = dy};
    expert_loss(&c);
    const double g = inner(x, w1, H), u = inner(x, w1 + F * H, H);
    near(act[0], g / (1 + exp(-g)) * u, 8 * 0x1p-53, "act", 0);
    const xp_expert_bwd_args b = {.dy = D2(dy, C),
                                  .pre = D2(pre, C),
                                  .offsets = L1(offsets),
                                  .w1 = D3(w1, L, 2 * F),
                                  .w2 = D3(w2, L, H),
                                  .dpre = D2(dpre, C),
                                  .dx = D2(dx, C),
                                  .dialect = &RAW};
    dense_ok(&xp_dense_expert_bwd, &b);
    check_gradient(expert_loss, &c, x, 5 * H, dx, "dx");
    xp_wgrad_args g1 = {.dy = D2(dpre, C), .x = D2(x, C), .offsets = L1(offsets)};
    g1.dw = xp_tensor_of(dw1, XP_F64, 4, (const int64_t[4]){1, L, 2 * F, H});
    dense_ok(&xp_dense_wgrad, &g1);
    check_gradient(expert_loss, &c, w1, L * 2 * F * H, dw1, "dw1");
    g1.dy = D2(dy, C);
    g1.x = D2(act, C);
    g1.dw = xp_tensor_of(dw2, XP_F64, 4, (const int64_t[4]){1, L, H, F});
    dense_ok(&xp_dense_wgrad, &g1);
    check_gradient(expert_loss, &c, w2, L * H * F, dw2, "dw2");
    assert_true(dw2[H * F] == 0 && dw1[2 * F * H] == 0);
    /* rows [1, 4) alone give the same bits, and what is behind the last border is not touched */
    double part[3 * H];
    xp_expert_args s = c.a;
    s.x = xp_tensor_rows(&c.a.x, 0, 1, 4);
    s.pre = xp_tensor_rows(&c.a.pre, 0, 1, 4);
    s.act = xp_tensor_rows(&c.a.act, 0, 1, 4);
    s.y = xp_tensor_2d(part, XP_F64, 3, H);
    s.row0 = 1;
    y[5 * H] = 77;
    expert_loss(&c);
    dense_ok(&xp_dense_expert, &s);
    assert_memory_equal(part, y + H, sizeof part);
    assert_true(y[5 * H] == 77);
}

/* x 1, first matrix (g, u), second 1: act and y of one unit. */
static double unit_of(const xp_dialect *d, double g, double u) {
    double x[1] = {1}, w1[2] = {g, u}, w2[1] = {1}, pre[2], act[1], y[1];
    int64_t offsets[2] = {0, 1};
    const int64_t rows = d->gated ? 2 : 1;
    const xp_expert_args a = {.x = D2(x, 1),
                              .offsets = L1(offsets),
                              .w1 = xp_tensor_3d(w1, XP_F64, 1, rows, 1),
                              .w2 = D3(w2, 1, 1),
                              .pre = xp_tensor_2d(pre, XP_F64, 1, rows),
                              .act = D2(act, 1),
                              .y = D2(y, 1),
                              .dialect = d};
    dense_ok(&xp_dense_expert, &a);
    assert_true(y[0] == act[0]);
    return act[0];
}

static void expect_unit(const xp_dialect *d, double g, double u, double want) {
    near(unit_of(d, g, u), want, 8 * 0x1p-53 * fabs(want), "unit", (int64_t)(g * 100));
}

static double sigmoid(double v) {
    return 1 / (1 + exp(-v));
}

static void test_activations(void **state) {
    (void)state;
    xp_dialect d = RAW;
    d.act_alpha = 2;
    expect_unit(&d, 1.5, 2, 1.5 * sigmoid(3) * 2);
    d.up_offset = 1;
    expect_unit(&d, 1.5, 2, 1.5 * sigmoid(3) * 3);
    d.limit = 1;
    expect_unit(&d, 1.5, 2, sigmoid(2) * 2);
    expect_unit(&d, -3, -2, 0);
    expect_unit(&d, -3, -.5, -3 * sigmoid(-6) * .5);
    d = RAW;
    d.limit = 1;
    d.limit_when = XP_LIMIT_AFTER;
    expect_unit(&d, 1.2, .5, 1.2 * sigmoid(1.2) * .5);
    expect_unit(&d, 2, -3, -1); /* silu(2) = 1.76 */
    d = RAW;
    d.act = XP_ACT_GELU_TANH;
    expect_unit(&d, 1, 2, 1 + tanh(sqrt(2 / acos(-1)) * 1.044715));
    d.act = XP_ACT_RELU;
    expect_unit(&d, 1.5, -2, -3);
    expect_unit(&d, -1.5, -2, 0);
    d.gated = 0;
    expect_unit(&d, 1.5, 0, 1.5);
    d.act = XP_ACT_RELU2;
    expect_unit(&d, 1.5, 0, 2.25);
    expect_unit(&d, -1.5, 0, 0);
    d.gated = 1;
    expect_unit(&d, 1.5, 2, 4.5);
    d.act = XP_ACT_SOFTCAP;
    d.gate_cap = 4;
    d.up_cap = 2;
    expect_unit(&d, 1, 3, 4 * tanh(.25) * sigmoid(1) * 2 * tanh(1.5));
}

/* Two units, rows in turn, both biases. */
static void test_expert_bias_and_layout(void **state) {
    (void)state;
    double x[1] = {2}, w1[4] = {1, 10, 2, 20}, b1[4] = {-1, .5, -5, .25}, w2[2] = {3, 5}, b2[1] = {.125};
    double pre[4], act[2], y[1];
    int64_t offsets[2] = {0, 1};
    xp_dialect d = RAW;
    d.act = XP_ACT_RELU;
    d.gate_layout = XP_GATE_INTERLEAVED;
    d.expert_bias = 1;
    const xp_expert_args a = {.x = D2(x, 1),
                              .offsets = L1(offsets),
                              .w1 = D3(w1, 1, 4),
                              .w2 = D3(w2, 1, 1),
                              .b1 = D2(b1, 1),
                              .b2 = D2(b2, 1),
                              .pre = D2(pre, 1),
                              .act = D2(act, 1),
                              .y = D2(y, 1),
                              .dialect = &d};
    dense_ok(&xp_dense_expert, &a);
    const double want[4] = {1, 20.5, -1, 40.25};
    assert_memory_equal(pre, want, sizeof pre);
    assert_true(act[0] == 20.5 && act[1] == 0 && y[0] == 61.625);
    d.gate_layout = XP_GATE_CONCAT;
    dense_ok(&xp_dense_expert, &a);
    assert_true(act[0] == -1 && act[1] == 20.5 * 40.25 && y[0] == 5 * 20.5 * 40.25 - 3 + .125);
}

/* bf16: silu(1) = 0.7311 is 187/256; times u = 142/128 that is 207.45/256, but 207.62/256 when rounded once. */
static void test_expert_rounding(void **state) {
    (void)state;
    uint16_t x[1] = {0x3F80}, w1[2] = {0x3F80, 0x3F8E}, w2[1] = {0x3F80}, pre[2], act[1], y[1], dpre[2], dx[1];
    double exact[2];
    int64_t offsets[2] = {0, 1};
    xp_dialect d = RAW;
    xp_expert_args a = {.x = xp_tensor_2d(x, XP_BF16, 1, 1),
                        .offsets = L1(offsets),
                        .w1 = xp_tensor_3d(w1, XP_BF16, 1, 2, 1),
                        .w2 = xp_tensor_3d(w2, XP_BF16, 1, 1, 1),
                        .pre = xp_tensor_2d(pre, XP_BF16, 1, 2),
                        .act = xp_tensor_2d(act, XP_BF16, 1, 1),
                        .y = xp_tensor_2d(y, XP_BF16, 1, 1),
                        .dialect = &d};
    dense_ok(&xp_dense_expert, &a);
    assert_true(xp_widen(act, XP_BF16, 0) == 207.0 / 256 && y[0] == act[0]);
    a.act = xp_tensor_2d(exact, XP_F64, 1, 1);
    dense_ok(&xp_dense_expert, &a);
    assert_true(exact[0] == 187.0 / 256 * (142.0 / 128) && xp_widen(y, XP_BF16, 0) == 207.0 / 256);
    a.act = xp_tensor_2d(act, XP_BF16, 1, 1);
    d.act_rounding = XP_ROUND_ONCE;
    dense_ok(&xp_dense_expert, &a);
    assert_true(xp_widen(act, XP_BF16, 0) == 208.0 / 256);
    /* 1.702 is 218/128, sigmoid(218/128) = 0.84594 is 217/256 */
    d.act_rounding = XP_ROUND_EACH;
    d.act_alpha = 1.702;
    d.up_offset = 1;
    w1[1] = 0x3F00; /* 1/2 */
    dense_ok(&xp_dense_expert, &a);
    assert_true(xp_widen(act, XP_BF16, 0) == 163.0 / 128); /* 162.75 */
    /* g = 3/8: 1.702 g is 163/256, its sigmoid 0.65401 is 167/256, times g in the middle of 250/1024 and 251/1024 */
    w1[0] = 0x3EC0;
    w1[1] = 0;
    dense_ok(&xp_dense_expert, &a);
    assert_true(xp_widen(act, XP_BF16, 0) == 250.0 / 1024);
    /* softcap of 5/32 and 3/2 is 218.98/2048; rounded in between it would be 218 */
    d.act = XP_ACT_SOFTCAP;
    d.up_offset = 0;
    d.gate_cap = 4;
    d.up_cap = 2;
    w1[0] = 0x3E20;
    w1[1] = 0x3FC0;
    dense_ok(&xp_dense_expert, &a);
    assert_true(xp_widen(act, XP_BF16, 0) == 219.0 / 2048);
    d = RAW;
    w1[0] = 0x3F80;
    w1[1] = 0x3F8E;
    w2[0] = 0x4040; /* 3 times 207/256, not times 207.45/256: 155.25/64, not 155.59/64 */
    dense_ok(&xp_dense_expert, &a);
    assert_true(xp_widen(y, XP_BF16, 0) == 155.0 / 64);
    w2[0] = 0x3F80;
    xp_expert_bwd_args b = {.dy = a.x,
                            .pre = a.pre,
                            .offsets = L1(offsets),
                            .w1 = a.w1,
                            .w2 = a.w2,
                            .dpre = xp_tensor_2d(dpre, XP_BF16, 1, 2),
                            .dx = xp_tensor_2d(dx, XP_BF16, 1, 1),
                            .dialect = &d};
    dense_ok(&xp_dense_expert_bwd, &b);
    assert_true(xp_widen(dpre, XP_BF16, 1) == 187.0 / 256); /* du = s, rounded */
    const double s = sigmoid(1), dg = 142.0 / 128 * (s + s * (1 - s));
    near(xp_widen(dpre, XP_BF16, 0), dg, 0x1p-8, "dg", 0);
    near(xp_widen(dx, XP_BF16, 0), xp_widen(dpre, XP_BF16, 0) + 187.0 / 256 * (142.0 / 128), 0x1p-8, "dx", 0);
    b.dpre = xp_tensor_2d(exact, XP_F64, 1, 2);
    dense_ok(&xp_dense_expert_bwd, &b);
    near(exact[0], dg, 4 * 0x1p-53, "unrounded dg", 0);
    assert_true(exact[1] == 187.0 / 256);
    uint16_t dy[1] = {0x3F8E}; /* da u is (142/128)^2, 157.53/128 */
    b.dy = xp_tensor_2d(dy, XP_BF16, 1, 1);
    dense_ok(&xp_dense_expert_bwd, &b);
    near(exact[0], 158.0 / 128 * (s + s * (1 - s)), 4 * 0x1p-53, "ds rounded", 0);
    d.act_rounding = XP_ROUND_ONCE;
    dense_ok(&xp_dense_expert_bwd, &b);
    near(exact[0], 142.0 / 128 * dg, 4 * 0x1p-53, "ds as it is", 0);
    near(exact[1], 142.0 / 128 * s, 4 * 0x1p-53, "s as it is", 1);
    w2[0] = 0x3F8E; /* da is 157.53/128 */
    dense_ok(&xp_dense_expert_bwd, &b);
    near(exact[1], 158.0 / 128 * s, 4 * 0x1p-53, "da rounded", 1);
}

/* Parameters in bf16 under activations in f32: x is cast on the way in, y on the way out. */
static void test_expert_casts(void **state) {
    (void)state;
    float x[1] = {0x1.01p0f}, y[1]; /* 1 + 2^-8: in the middle, to 1 */
    uint16_t w1[1] = {0x4040}, w2[1] = {0x3F8E}, pre[1], act[1];
    int64_t offsets[2] = {0, 1};
    xp_dialect d = RAW;
    d.gated = 0;
    d.act = XP_ACT_RELU;
    const xp_expert_args a = {.x = xp_tensor_2d(x, XP_F32, 1, 1),
                              .offsets = L1(offsets),
                              .w1 = xp_tensor_3d(w1, XP_BF16, 1, 1, 1),
                              .w2 = xp_tensor_3d(w2, XP_BF16, 1, 1, 1),
                              .pre = xp_tensor_2d(pre, XP_BF16, 1, 1),
                              .act = xp_tensor_2d(act, XP_BF16, 1, 1),
                              .y = xp_tensor_2d(y, XP_F32, 1, 1),
                              .dialect = &d};
    dense_ok(&xp_dense_expert, &a);
    assert_true(pre[0] == 0x4040 && y[0] == 213.f / 64); /* 3 * 142/128 = 3.328125, which bf16 holds */
    w1[0] = 0x3F8E;
    dense_ok(&xp_dense_expert, &a);
    assert_true(y[0] == 158.f / 128); /* (142/128)^2 is 157.53/128 */
}

static void test_wgrad_blocks(void **state) {
    (void)state;
    double dy[5] = {1, 2, 3, 4, 5}, x[10] = {1, 10, 1, 10, 1, 10, 1, 10, 1, 10}, dw[8];
    int64_t offsets[3] = {0, 3, 5}, tok[5] = {9, 4, -1, 5, 8}, blocks[2] = {2, 4};
    xp_wgrad_args a = {
        .dy = D2(dy, 5), .x = D2(x, 5), .offsets = L1(offsets), .tok = L1(tok), .blocks = L1(blocks), .block = 2};
    a.dw = xp_tensor_of(dw, XP_F64, 4, (const int64_t[4]){2, 2, 1, 2});
    dense_ok(&xp_dense_wgrad, &a);
    const double want[8] = {2, 20, 4, 40, 1, 10, 5, 50};
    assert_memory_equal(dw, want, sizeof dw);
    a.fold = 1;
    a.dw.dim[0] = 1;
    dense_ok(&xp_dense_wgrad, &a);
    const double fold[4] = {3, 30, 9, 90};
    assert_memory_equal(dw, fold, sizeof fold);
    a.fold = 0;
    a.block = 0;
    dense_ok(&xp_dense_wgrad, &a);
    assert_true(dw[0] == 6 && dw[3] == 90);
}

typedef struct {
    xp_shared_args a;
    const double *dy;
} shared_case;

static double shared_loss(void *ctx) {
    const shared_case *c = ctx;
    dense_ok(&xp_dense_shared, &c->a);
    return inner(c->a.y.data, c->dy, c->a.y.dim[0] * c->a.y.dim[1]);
}

static void test_shared(void **state) {
    (void)state;
    enum { T = 19, H = 3, S = 2 };
    double x[T * H], w1[2 * S * H], w2[H * S], v[H], pre[T * 2 * S], act[T * S], mlp[T * H], sig[T], y[T * H],
        dy[T * H];
    double dmlp[T * H], dpre[T * 2 * S], dz[T], dx[T * H], dv[H];
    draw_all(x, T * H, 1);
    draw_all(w1, 2 * S * H, 2);
    draw_all(w2, H * S, 3);
    draw_all(v, H, 4);
    draw_all(dy, T * H, 5);
    for (int gated = 0; gated < 2; gated++) {
        shared_case c = {.a = {.x = D2(x, T),
                               .w1 = D2(w1, 2 * S),
                               .w2 = D2(w2, H),
                               .pre = D2(pre, T),
                               .act = D2(act, T),
                               .mlp = D2(mlp, T),
                               .y = D2(y, T),
                               .dialect = &RAW},
                         .dy = dy};
        xp_shared_bwd_args b = {.dy = D2(dy, T),
                                .pre = D2(pre, T),
                                .w1 = D2(w1, 2 * S),
                                .w2 = D2(w2, H),
                                .dmlp = D2(dmlp, T),
                                .dpre = D2(dpre, T),
                                .dx = D2(dx, T),
                                .dialect = &RAW};
        if (gated) {
            c.a.gate = b.gate = D2(v, 1);
            c.a.sig = b.sig = D2(sig, T);
            b.mlp = D2(mlp, T);
            b.dz = D2(dz, T);
        }
        shared_loss(&c);
        near(y[0], gated ? mlp[0] / (1 + exp(-inner(x, v, H))) : mlp[0], 0x1p-50, "y", 0);
        dense_ok(&xp_dense_shared_bwd, &b);
        check_gradient(shared_loss, &c, x, T * H, dx, "dx");
        if (!gated)
            continue;
        for (int h = 0; h < H; h++) {
            dv[h] = 0;
            for (int t = 0; t < T; t++)
                dv[h] += dz[t] * x[t * H + h];
        }
        check_gradient(shared_loss, &c, v, H, dv, "dgate");
    }
}

/* bf16, relu(x w1) = 142/128: sigmoid(1) is 187/256, times that 207.45/256; from the unrounded sigmoid it is 207.62. */
static void test_shared_rounding(void **state) {
    (void)state;
    uint16_t one[1] = {0x3F80}, w1[1] = {0x3F8E}, pre[1], act[1], mlp[1], sig[1], y[1], dmlp[1], dpre[1], dz[1];
    double exact[1];
    xp_dialect d = RAW;
    d.gated = 0;
    d.act = XP_ACT_RELU;
    const xp_tensor of_one = xp_tensor_2d(one, XP_BF16, 1, 1);
    const xp_shared_args a = {.x = of_one,
                              .w1 = xp_tensor_2d(w1, XP_BF16, 1, 1),
                              .w2 = of_one,
                              .gate = of_one,
                              .pre = xp_tensor_2d(pre, XP_BF16, 1, 1),
                              .act = xp_tensor_2d(act, XP_BF16, 1, 1),
                              .mlp = xp_tensor_2d(mlp, XP_BF16, 1, 1),
                              .sig = xp_tensor_2d(sig, XP_BF16, 1, 1),
                              .y = xp_tensor_2d(y, XP_BF16, 1, 1),
                              .dialect = &d};
    dense_ok(&xp_dense_shared, &a);
    assert_true(xp_widen(sig, XP_BF16, 0) == 187.0 / 256 && xp_widen(y, XP_BF16, 0) == 207.0 / 256);
    /* dy = 142/128: dmlp is 207/256 again, dz (142/128)^2 sig (1 - sig) = 248.12/1024, both rounded before dx */
    const xp_shared_bwd_args b = {.dy = a.w1,
                                  .pre = a.pre,
                                  .mlp = a.mlp,
                                  .sig = a.sig,
                                  .w1 = a.w1,
                                  .w2 = of_one,
                                  .gate = of_one,
                                  .dmlp = xp_tensor_2d(dmlp, XP_BF16, 1, 1),
                                  .dpre = xp_tensor_2d(dpre, XP_BF16, 1, 1),
                                  .dz = xp_tensor_2d(dz, XP_BF16, 1, 1),
                                  .dx = xp_tensor_2d(exact, XP_F64, 1, 1),
                                  .dialect = &d};
    dense_ok(&xp_dense_shared_bwd, &b);
    assert_true(dmlp[0] == y[0] && dpre[0] == y[0] && xp_widen(dz, XP_BF16, 0) == 248.0 / 1024);
    assert_true(exact[0] == 207.0 / 256 * (142.0 / 128) + 248.0 / 1024);
    /* everything is 142/128: pre and x v are 157.53/128, mlp 158/128 times 142/128, 175.28/128 */
    double exact_act[1], exact_sig[1];
    xp_shared_args all = a;
    all.x = all.w2 = all.gate = a.w1;
    all.act = D2(exact_act, 1);
    all.sig = D2(exact_sig, 1);
    all.y = D2(exact, 1);
    dense_ok(&xp_dense_shared, &all);
    assert_true(exact_act[0] == 158.0 / 128 && exact[0] == 198.0 / 256 * (175.0 / 128));
    near(exact_sig[0], sigmoid(158.0 / 128), 2 * 0x1p-53, "sigmoid of the rounded product", 0);
    /* parameters in f32: dmlp is bf16 all the same */
    float wide_one[1] = {1}, wide_pre[1] = {142.f / 128}, wide_dpre[1];
    xp_shared_bwd_args wide = b;
    wide.w1 = wide.w2 = wide.gate = xp_tensor_2d(wide_one, XP_F32, 1, 1);
    wide.pre = xp_tensor_2d(wide_pre, XP_F32, 1, 1);
    wide.dpre = xp_tensor_2d(wide_dpre, XP_F32, 1, 1);
    wide.mlp = a.w1;
    wide.sig = xp_tensor_2d(&(uint16_t){0x3F3B}, XP_BF16, 1, 1); /* 187/256 */
    dense_ok(&xp_dense_shared_bwd, &wide);
    assert_true(wide_dpre[0] == 207.f / 256);
}

/* Slopes of every activation, limit and offset, through the shared expert with and without its limit. */
static void test_activation_slopes(void **state) {
    (void)state;
    enum { T = 7, H = 2, S = 3 };
    double x[T * H], w1[2 * S * H], w2[H * S], pre[T * 2 * S], act[T * S], mlp[T * H], y[T * H], dy[T * H], dmlp[T * H];
    double dpre[T * 2 * S], dx[T * H];
    draw_all(x, T * H, 1011);
    draw_all(w1, 2 * S * H, 12);
    draw_all(w2, H * S, 13);
    draw_all(dy, T * H, 14);
    for (int i = 0; i < 80; i++) {
        xp_dialect d = RAW;
        d.act = (xp_act)(i % 5);
        d.gated = i / 5 % 2 || d.act == XP_ACT_SOFTCAP;
        d.limit = d.gated && i / 10 % 2 ? .375 : 0;
        d.limit_when = i / 20 % 2 ? XP_LIMIT_AFTER : XP_LIMIT_BEFORE;
        d.shared_limit = i / 20 % 3 != 0;
        d.act_alpha = i / 40 % 2 ? 1.5 : 1;
        d.up_offset = i / 40 % 2 && d.gated && d.act != XP_ACT_SOFTCAP ? 1 : 0;
        d.gate_cap = .75;
        d.up_cap = .5;
        d.gate_layout = i & 1 ? XP_GATE_INTERLEAVED : XP_GATE_CONCAT;
        const int64_t rows = d.gated ? 2 * S : S;
        shared_case c = {.a = {.x = D2(x, T),
                               .w1 = xp_tensor_2d(w1, XP_F64, rows, H),
                               .w2 = D2(w2, H),
                               .pre = xp_tensor_2d(pre, XP_F64, T, rows),
                               .act = D2(act, T),
                               .mlp = D2(mlp, T),
                               .y = D2(y, T),
                               .dialect = &d},
                         .dy = dy};
        const xp_shared_bwd_args b = {.dy = D2(dy, T),
                                      .pre = c.a.pre,
                                      .w1 = c.a.w1,
                                      .w2 = D2(w2, H),
                                      .dmlp = D2(dmlp, T),
                                      .dpre = xp_tensor_2d(dpre, XP_F64, T, rows),
                                      .dx = D2(dx, T),
                                      .dialect = &d};
        shared_loss(&c);
        dense_ok(&xp_dense_shared_bwd, &b);
        check_gradient(shared_loss, &c, x, T * H, dx, "dx");
        int beyond = 0, moved = 0;
        for (int j = 0; j < T * S && d.limit > 0; j++) {
            const double u = pre[j / S * 2 * S + (i & 1 ? 2 * (j % S) + 1 : S + j % S)];
            beyond += fabs(u) > d.limit;
            moved += fabs(u) > d.limit && dpre[j / S * 2 * S + (i & 1 ? 2 * (j % S) + 1 : S + j % S)] != 0;
        }
        assert_true(d.limit == 0 || (beyond > 0 && (moved == 0) == d.shared_limit));
    }
}

/* ---- the whole block ---- */

enum { T = 5, E = 4, K = 2, H = 3, F = 3, S = 2, Z = E + 2 };
static struct {
    double x[T * H], dy[T * H], wr[Z * H], w1[E * 2 * F * H], w2[E * H * F], sw1[2 * S * H], sw2[H * S], sg[H];
    double rb[Z], bias[Z], scale[Z], b1[E * 2 * F], b2[E * H], drb[Z], db1[E * 2 * F], db2[E * H];
    double y[T * H], dx[T * H], dwr[Z * H], dw1[E * 2 * F * H], dw2[E * H * F], dsw1[2 * S * H], dsw2[H * S], dsg[H];
    int32_t idx[T * K];
} B;

static xp_moe_args moe_case(const xp_dialect *d, int shared, int gate) {
    const int32_t idx[T * K] = {0, 1, 2, 0, 2, 2, 1, 0, 0, 2}; /* expert 3 has no token, token 2 names one twice */
    memcpy(B.idx, idx, sizeof idx);
    draw_all(B.x, COUNT(B.x), 1);
    draw_all(B.dy, COUNT(B.dy), 2);
    draw_all(B.wr, COUNT(B.wr), 3);
    draw_all(B.w1, COUNT(B.w1), 4);
    draw_all(B.w2, COUNT(B.w2), 5);
    draw_all(B.sw1, COUNT(B.sw1), 6);
    draw_all(B.sw2, COUNT(B.sw2), 7);
    draw_all(B.sg, COUNT(B.sg), 8);
    xp_moe_args a = {.x = D2(B.x, T),
                     .dy = D2(B.dy, T),
                     .wr = xp_tensor_2d(B.wr, XP_F64, E, H),
                     .w1 = D3(B.w1, E, 2 * F),
                     .w2 = D3(B.w2, E, H),
                     .idx = I2(B.idx, T),
                     .y = D2(B.y, T),
                     .dx = D2(B.dx, T),
                     .dwr = xp_tensor_2d(B.dwr, XP_F64, E, H),
                     .dw1 = D3(B.dw1, E, 2 * F),
                     .dw2 = D3(B.dw2, E, H),
                     .dialect = d};
    if (shared) {
        a.sw1 = D2(B.sw1, 2 * S);
        a.sw2 = D2(B.sw2, H);
        a.dsw1 = D2(B.dsw1, 2 * S);
        a.dsw2 = D2(B.dsw2, H);
    }
    if (gate) {
        a.sgate = D2(B.sg, 1);
        a.dsgate = D2(B.dsg, 1);
    }
    return a;
}

static double moe_loss(void *ctx) {
    dense_ok(&xp_dense_moe, ctx);
    return inner(B.y, B.dy, T * H);
}

/* The row writes gradients on every call, so they are copied before the inputs move. */
#define CHECK_MOE(a, v, d) CHECK_SOME(a, v, d, COUNT(d))
#define CHECK_SOME(a, v, d, n)                             \
    do {                                                   \
        double kept[COUNT(d)];                             \
        dense_ok(&xp_dense_moe, (a));                      \
        memcpy(kept, (d), sizeof kept);                    \
        check_gradient(moe_loss, (a), (v), (n), kept, #d); \
    } while (0)

static void test_moe_gradients(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) {
        xp_moe_args a = moe_case(i & 1 ? &RENORM : &RAW, i > 0, i > 1);
        assert_null(xp_dense_moe.why_not(&a, one_rank()));
        CHECK_MOE(&a, B.x, B.dx);
        CHECK_MOE(&a, B.wr, B.dwr);
        CHECK_MOE(&a, B.w1, B.dw1);
        CHECK_MOE(&a, B.w2, B.dw2);
        if (i > 0) {
            CHECK_MOE(&a, B.sw1, B.dsw1);
            CHECK_MOE(&a, B.sw2, B.dsw2);
        }
        if (i > 1)
            CHECK_MOE(&a, B.sg, B.dsg);
        for (int64_t j = 3 * H * F; j < COUNT(B.dw2); j++)
            assert_true(B.dw2[j] == 0); /* no token: zeros, not poison */
    }
}

/* The same numbers by the stages one after another: two formulations within the second one. Values of order 1 through a
 * hundred operations: 1e-14 is 90 rounding units. */
static void test_moe_is_its_parts(void **state) {
    (void)state;
    xp_moe_args a = moe_case(&RENORM, 1, 1);
    dense_ok(&xp_dense_moe, &a);
    double l[T * E], s[T * E], w[T * K], rows[T * K * H], recv[T * K * H], pre[T * K * 2 * F], act[T * K * F];
    double out[T * K * H], back[T * K * H], y[T * H], spre[T * 2 * S], sact[T * S], mlp[T * H], sig[T], sy[T * H],
        sum[T * H];
    int64_t tok[T * K], rtok[T * K], counts[E], offsets[E + 1], rcounts[E], roffsets[E + 1];
    int32_t src[T * K], pos[T * K];
    const xp_router_args ro = {.x = D2(B.x, T), .w = a.wr, .logits = D2(l, T)};
    dense_ok(&xp_dense_router, &ro);
    const xp_route_args rt = {
        .logits = D2(l, T), .scores = D2(s, T), .idx = I2(B.idx, T), .w = D2(w, T), .dialect = &RENORM, .replay = 1};
    dense_ok(&xp_dense_route, &rt);
    const xp_permute_args pe = {.x = D2(B.x, T),
                                .idx = I2(B.idx, T),
                                .rows = D2(rows, T * K),
                                .tok = L1(tok),
                                .src = I1(src),
                                .pos = I2(pos, T),
                                .counts = L1(counts),
                                .offsets = L1(offsets),
                                .align = 1};
    dense_ok(&xp_dense_permute, &pe);
    const xp_dispatch_args di = {.rows = D2(rows, T * K),
                                 .tok = L1(tok),
                                 .counts = L1(counts),
                                 .offsets = L1(offsets),
                                 .recv = D2(recv, T * K),
                                 .recv_tok = L1(rtok),
                                 .recv_counts = xp_tensor_2d(rcounts, XP_I64, 1, E),
                                 .recv_offsets = L1(roffsets),
                                 .align = 1};
    dense_ok(&xp_dense_dispatch, &di);
    const xp_expert_args ex = {.x = D2(recv, T * K),
                               .offsets = L1(roffsets),
                               .w1 = D3(B.w1, E, 2 * F),
                               .w2 = D3(B.w2, E, H),
                               .pre = D2(pre, T * K),
                               .act = D2(act, T * K),
                               .y = D2(out, T * K),
                               .dialect = &RENORM};
    dense_ok(&xp_dense_expert, &ex);
    const xp_combine_args co = {.out = D2(out, T * K),
                                .recv_counts = di.recv_counts,
                                .recv_offsets = L1(roffsets),
                                .counts = L1(counts),
                                .offsets = L1(offsets),
                                .pos = I2(pos, T),
                                .idx = I2(B.idx, T),
                                .w = D2(w, T),
                                .back = D2(back, T * K),
                                .y = D2(y, T),
                                .dialect = &RENORM};
    dense_ok(&xp_dense_combine, &co);
    const xp_shared_args sh = {.x = D2(B.x, T),
                               .w1 = D2(B.sw1, 2 * S),
                               .w2 = D2(B.sw2, H),
                               .gate = D2(B.sg, 1),
                               .pre = D2(spre, T),
                               .act = D2(sact, T),
                               .mlp = D2(mlp, T),
                               .sig = D2(sig, T),
                               .y = D2(sy, T),
                               .dialect = &RENORM};
    dense_ok(&xp_dense_shared, &sh);
    const xp_residual_args re = {.a = D2(y, T), .b = D2(sy, T), .y = D2(sum, T)};
    dense_ok(&xp_dense_residual, &re);
    for (int i = 0; i < T * H; i++)
        near(B.y[i], sum[i], 1e-14, "y", i);
}

/* The block of a record of any kind: null experts 4 and 5 in the places of 1 and 2 for some tokens. */
static xp_moe_args moe_of(const xp_dialect *d, int shared) {
    xp_moe_args a = moe_case(d, shared > 0, shared > 1);
    const int64_t z = xp_dialect_rows(d, E), rows = d->gated ? 2 * F : F, srows = d->gated ? 2 * S : S;
    draw_all(B.rb, Z, 9);
    draw_all(B.bias, Z, 10);
    draw_all(B.scale, Z, 11);
    draw_all(B.b1, COUNT(B.b1), 12);
    draw_all(B.b2, COUNT(B.b2), 13);
    a.wr = xp_tensor_2d(B.wr, XP_F64, z, H);
    a.dwr = xp_tensor_2d(B.dwr, XP_F64, z, H);
    a.w1 = xp_tensor_3d(B.w1, XP_F64, E, rows, H);
    a.dw1 = xp_tensor_3d(B.dw1, XP_F64, E, rows, H);
    if (shared) {
        a.sw1 = xp_tensor_2d(B.sw1, XP_F64, srows, H);
        a.dsw1 = xp_tensor_2d(B.dsw1, XP_F64, srows, H);
    }
    if (d->router_bias) {
        a.rbias = xp_tensor_1d(B.rb, XP_F64, z);
        a.drbias = xp_tensor_1d(B.drb, XP_F64, z);
    }
    if (d->select_bias)
        a.bias = xp_tensor_1d(B.bias, XP_F64, z);
    if (d->expert_scale)
        a.scale_e = xp_tensor_1d(B.scale, XP_F64, xp_dialect_factors(d, E));
    if (d->expert_bias) {
        a.b1 = xp_tensor_2d(B.b1, XP_F64, E, rows);
        a.b2 = D2(B.b2, E);
        a.db1 = xp_tensor_2d(B.db1, XP_F64, E, rows);
        a.db2 = D2(B.db2, E);
    }
    if (d->null_experts > 0) {
        B.idx[1] = E;
        B.idx[6] = E + 1;
        B.idx[8] = B.idx[9] = E; /* the last token's both slots are one null expert */
    }
    return a;
}

static const struct {
    const char *preset, *change; /* "field=value field=value": on top of the preset */
} BLOCKS[] = {{"qwen2_moe-renorm", "expert_scale=on"},
              {"mixtral", "null_experts=2 null_kind=skip scale=1.5 gate_layout=interleaved"},
              {"gpt_oss", "limit=0.375"},
              {"cohere2_moe", "shared_gate=on"},
              {"deepseek_v2-groups", "n_group=2 topk_group=1"},
              {"deepseek_v3", "n_group=2 topk_group=1 masked_weight=on renorm_eps=0.25"},
              {"nemotron_h", "expert_bias=on"},
              {"llama4", "expert_bias=on router_bias=on"},
              {"deepseek_v4", "limit=0.4"},
              {"minimax_m3_vl", "limit=0.5"},
              {"step3p7", "limit=0.25 shared_limit=off"},
              {"step3p7", "limit=0.5 limit_shared=0.25"},
              {"longcat_flash", "null_experts=2"},
              {"longcat_flash", "null_experts=2 renorm=sum scale_at=output"},
              {"ernie4_5_moe", "renorm_eps=0.75"},
              {"mistral4", "n_group=2 topk_group=1 logit_softcap=0.75 logit_scale=1.5"},
              {"kolibri1", "activation=softcap gate_cap=0.75 up_cap=0.5"},
              {"cohere2_moe-sigmoid", "activation=gelu_tanh"},
              {"phimoe", "sparse_eps=0.375 router_bias=on"},
              {"inkling", "scale=2"},
              {"cohere2_moe", "shared_gate=on limit=0.5"},
              {"flint", "aux_coef=0"},
              {"inkling", "renorm=sum shared_rows=1 gate_layout=interleaved expert_scale=on shared_combine=average"},
              {"openai_privacy_filter", "limit=0.5"},
              {"mixtral", "weight_div_k=on scale=1.5 expert_scale=on"}};

static xp_dialect changed(const char *preset, const char *change) {
    char name[64] = "hf-5.24/", text[128], *save;
    const xp_dialect *found = xp_dialect_find(strcat(name, preset));
    assert_non_null(found);
    xp_dialect d = *found;
    assert_true(strlen(change) < sizeof text);
    strcpy(text, change);
    for (char *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        char *value = strchr(word, '=');
        *value++ = '\0';
        if (xp_dialect_set(&d, word, value) != XP_OK)
            fail_msg("%s", xp_error_text());
    }
    return d;
}

static void test_moe_gradients_of_dialects(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof BLOCKS / sizeof *BLOCKS; i++) {
        const xp_dialect d = changed(BLOCKS[i].preset, BLOCKS[i].change);
        xp_moe_args a = moe_of(&d, (int)(i % 3));
        assert_null(xp_dense_moe.why_not(&a, one_rank()));
        CHECK_MOE(&a, B.x, B.dx);
        CHECK_SOME(&a, B.wr, B.dwr, xp_tensor_count(&a.wr));
        CHECK_SOME(&a, B.w1, B.dw1, xp_tensor_count(&a.w1));
        CHECK_MOE(&a, B.w2, B.dw2);
        if (a.rbias.data)
            CHECK_SOME(&a, B.rb, B.drb, xp_tensor_count(&a.rbias));
        if (a.b1.data) {
            CHECK_SOME(&a, B.b1, B.db1, xp_tensor_count(&a.b1));
            CHECK_MOE(&a, B.b2, B.db2);
        }
        if (a.sw1.data)
            CHECK_SOME(&a, B.sw1, B.dsw1, xp_tensor_count(&a.sw1));
        if (a.sgate.data)
            CHECK_MOE(&a, B.sg, B.dsg);
    }
}

/* y += what slot k of token t adds, by the row of stage expert. */
static void add_slot(const xp_moe_args *a, int64_t t, int64_t e, double w, double *y) {
    const xp_dialect *d = a->dialect;
    const int at_input = d->weight_at == XP_AT_INPUT;
    double x[H], pre[2 * F], act[F], out[H];
    int64_t offsets[2] = {0, 1};
    for (int h = 0; h < H; h++)
        x[h] = B.x[t * H + h] * (at_input ? w : 1);
    if (e < E) {
        xp_expert_args ex = {.x = D2(x, 1),
                             .offsets = L1(offsets),
                             .w1 = xp_tensor_rows(&a->w1, 0, e, e + 1),
                             .w2 = xp_tensor_rows(&a->w2, 0, e, e + 1),
                             .pre = xp_tensor_2d(pre, XP_F64, 1, a->w1.dim[1]),
                             .act = D2(act, 1),
                             .y = D2(out, 1),
                             .dialect = d};
        if (d->expert_bias) {
            ex.b1 = xp_tensor_rows(&a->b1, 0, e, e + 1);
            ex.b2 = xp_tensor_rows(&a->b2, 0, e, e + 1);
        }
        dense_ok(&xp_dense_expert, &ex);
    }
    for (int h = 0; h < H; h++) {
        if (e < E)
            y[h] += (at_input ? 1 : w) * out[h];
        else if (d->null_kind == XP_NULL_IDENTITY)
            y[h] += w * x[h];
    }
}

/* The output by the rows of route, expert and shared, slot by slot. Values below 10 through a hundred operations: 1e-13
 * is 90 of their rounding units. */
static void test_moe_of_dialects_is_its_parts(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof BLOCKS / sizeof *BLOCKS; i++) {
        const xp_dialect d = changed(BLOCKS[i].preset, BLOCKS[i].change);
        const int shared = (int)(i % 3);
        const xp_moe_args a = moe_of(&d, shared);
        double gamma[T * Z], l[T * Z], s[T * Z], w[T * K], spre[T * 2 * S], sact[T * S], mlp[T * H], sig[T], sy[T * H];
        const xp_router_args ro = {
            .x = a.x, .w = a.wr, .bias = a.rbias, .logits = xp_tensor_2d(l, XP_F64, T, a.wr.dim[0])};
        dense_ok(&xp_dense_router, &ro);
        xp_route_args rt = {.logits = ro.logits,
                            .scores = xp_tensor_2d(s, XP_F64, T, a.wr.dim[0]),
                            .idx = a.idx,
                            .w = D2(w, T),
                            .bias = a.bias,
                            .scale_e = a.scale_e,
                            .dialect = &d,
                            .replay = 1};
        if (d.shared_rows > 0)
            rt.gamma = xp_tensor_2d(gamma, XP_F64, T, d.shared_rows);
        dense_ok(&xp_dense_route, &rt);
        xp_shared_args sh = {.x = a.x,
                             .w1 = a.sw1,
                             .w2 = a.sw2,
                             .gate = a.sgate,
                             .act = D2(sact, T),
                             .mlp = D2(mlp, T),
                             .sig = D2(sig, T),
                             .y = D2(sy, T),
                             .dialect = &d,
                             .gamma = rt.gamma};
        if (shared) {
            sh.pre = xp_tensor_2d(spre, XP_F64, T, a.sw1.dim[0]);
            dense_ok(&xp_dense_shared, &sh);
        }
        dense_ok(&xp_dense_moe, &a);
        for (int t = 0; t < T; t++) {
            double y[H] = {0};
            for (int k = 0; k < K; k++)
                add_slot(&a, t, B.idx[t * K + k], w[t * K + k], y);
            for (int h = 0; h < H; h++) {
                y[h] *= d.weight_div_k ? K : d.scale_at == XP_SCALE_OUTPUT ? d.scale : 1;
                if (shared)
                    y[h] = (y[h] + sy[t * H + h]) / (d.shared_combine == XP_COMBINE_AVERAGE ? 2 : 1);
                near(B.y[t * H + h], y[h], 1e-13, BLOCKS[i].preset, t * H + h);
            }
        }
    }
}

/* Expert 3 has no token: its NaN logit counts as -inf, and renormalised weights do not see it. */
static void test_moe_nan_logit(void **state) {
    (void)state;
    double y[T * H];
    xp_moe_args a = moe_case(&RENORM, 0, 0);
    dense_ok(&xp_dense_moe, &a);
    memcpy(y, B.y, sizeof y);
    B.wr[3 * H] = (double)NAN;
    dense_ok(&xp_dense_moe, &a);
    for (int i = 0; i < T * H; i++) {
        assert_true(isfinite(B.y[i]));
        near(B.y[i], y[i], 1e-14, "y", i);
    }
}

static void test_moe_no_tokens(void **state) {
    (void)state;
    xp_moe_args a = moe_case(&RENORM, 1, 1);
    a.x.dim[0] = a.dy.dim[0] = a.idx.dim[0] = a.y.dim[0] = a.dx.dim[0] = 0;
    memset(B.dw1, 0xFF, sizeof B.dw1);
    memset(B.dsg, 0xFF, sizeof B.dsg);
    dense_ok(&xp_dense_moe, &a);
    assert_true(B.dw1[0] == 0 && B.dw1[COUNT(B.dw1) - 1] == 0 && B.dsg[0] == 0);
}

static void test_refused_dialects(void **state) {
    (void)state;
    xp_dialect d = RAW;
    xp_moe_args a = moe_case(&d, 0, 0);
    assert_null(xp_dense_route_why_not(&d));
    assert_null(xp_dense_mlp_why_not(&d));
    assert_null(xp_dense_moe.why_not(&a, one_rank()));
    d.score = XP_SCORE_SPARSEMIXER;
    d.group_reduce = XP_GROUP_MAX;
    d.n_group = 2;
    d.act = XP_ACT_SOFTCAP;
    d.up_offset = 1;
    assert_non_null(xp_dense_route_why_not(&d));
    assert_non_null(xp_dense_mlp_why_not(&d));
    d = RAW;
    d.gated = 0;
    d.limit = 7;
    assert_non_null(xp_dense_mlp_why_not(&d));
    d = RENORM;
    d.score = XP_SCORE_SOFTMAX_TOPK;
    assert_non_null(xp_dense_moe.why_not(&a, one_rank()));
    d = RAW;
    d.weight_at = XP_AT_INPUT;
    assert_null(xp_dense_moe.why_not(&a, one_rank()));
    d.null_experts = 1;
    assert_non_null(xp_dense_moe.why_not(&a, one_rank()));
    double s[4], dw[2], dl[4];
    int32_t idx[2] = {0, 1};
    xp_route_bwd_args b = {
        .scores = D2(s, 1), .idx = I2(idx, 1), .dw = D2(dw, 1), .dlogits = D2(dl, 1), .dialect = &RAW};
    assert_null(xp_dense_route_bwd.why_not(&b, one_rank()));
    d = RAW;
    d.logit_softcap = 30;
    b.dialect = &d;
    assert_non_null(xp_dense_route_bwd.why_not(&b, one_rank()));
}

/* ---- loss ---- */

static double xent_loss(void *ctx) {
    const xp_xent_args *a = ctx;
    dense_ok(&xp_dense_xent, a);
    return *(const double *)a->total.data;
}

static void test_xent(void **state) {
    (void)state;
    double l[9] = {0, 0, 0, 1000, 1000, 0, 5, 6, 7}, lse[3], loss[3], total[1], d[9];
    int32_t target[3] = {1, 2, -1};
    int64_t count[1];
    xp_xent_args a = {.logits = D2(l, 3),
                      .target = I1(target),
                      .lse = D1(lse),
                      .loss = D1(loss),
                      .total = D1(total),
                      .count = L1(count)};
    dense_ok(&xp_dense_xent, &a);
    near(loss[0], log(3), 2 * 0x1p-53, "loss", 0);
    near(loss[1], 1000 + log(2), 1000 * 0x1p-52, "loss", 1);
    near(lse[2], 7 + log1p(exp(-1) + exp(-2)), 8 * 0x1p-53, "lse", 2);
    assert_true(loss[2] == 0 && count[0] == 2 && total[0] == loss[0] + loss[1]);
    draw_all(l, 9, 3);
    dense_ok(&xp_dense_xent, &a);
    const xp_xent_bwd_args b = {.logits = D2(l, 3), .target = I1(target), .lse = D1(lse), .dlogits = D2(d, 3)};
    dense_ok(&xp_dense_xent_bwd, &b);
    check_gradient(xent_loss, &a, l, 9, d, "dlogits");
    assert_true(d[6] == 0 && d[1] < 0);
}

/* ---- optimizer ---- */

static float norm_of(const float *g, int64_t n, double p) {
    int64_t seg[2] = {0, n};
    uint8_t owner[1] = {1};
    float norm[1], copy[64];
    memcpy(copy, g, (size_t)n * sizeof *g);
    const xp_gradnorm_args a = {
        .grad = xp_tensor_1d(copy, XP_F32, n), .seg = L1(seg), .owner = B1(owner), .norm = F1(norm), .p = p};
    dense_ok(&xp_dense_gradnorm, &a);
    return norm[0];
}

static void test_gradnorm_by_hand(void **state) {
    (void)state;
    const float pyth[2] = {3, -4}, huge[4] = {1e20f, 1e20f, -1e20f, 1e20f}, tiny[4] = {1e-30f, 1e-30f, 1e-30f, -1e-30f};
    const float least[2] = {0x1p-149f, 0}, most[2] = {0x1.fffffep127f, 0x1.fffffep127f}, none[1] = {-0.0f};
    assert_true(norm_of(pyth, 2, 2) == 5 && norm_of(pyth, 2, 1) == 7 && norm_of(pyth, 2, HUGE_VAL) == 4);
    assert_true(norm_of(huge, 4, 2) == 2e20f && norm_of(tiny, 4, 2) == 2e-30f);
    assert_true(norm_of(least, 2, 2) == 0x1p-149f && norm_of(least, 2, 1) == 0x1p-149f);
    assert_true(isinf(norm_of(most, 2, 2)) && norm_of(most, 1, 2) == 0x1.fffffep127f);
    assert_true(norm_of(none, 1, 2) == 0 && norm_of(none, 0, 1) == 0);
    /* 2^24 + 1 and 2^24 + 3 lie in the middle of two floats: to the even one; one unit of the least float decides */
    const float down[3] = {0x1p24f, 1, 0x1p-149f}, up[3] = {0x1p24f, 3, -0x1p-149f};
    assert_true(norm_of(down, 2, 1) == 0x1p24f && norm_of(down, 3, 1) == 0x1.000002p24f);
    assert_true(norm_of(up, 2, 1) == 0x1.000004p24f);
    const float inf[3] = {1, -HUGE_VALF, 2}, nan[3] = {1, HUGE_VALF, NAN};
    assert_true(isinf(norm_of(inf, 3, 2)) && isinf(norm_of(inf, 3, HUGE_VAL)) && isnan(norm_of(nan, 3, 2)) &&
                isnan(norm_of(nan, 3, HUGE_VAL)));
}

/* 4000 bits hold every square sum of 64 floats exactly; the root is rounded once by MPFR at a float's precision. */
static void test_gradnorm_against_mpfr(void **state) {
    (void)state;
    mpfr_t sum, term, root;
    mpfr_init2(sum, 4000);
    mpfr_init2(term, 4000);
    mpfr_init2(root, 24);
    mpfr_set_emin(-148); /* the least float is 0.5 * 2^-148 */
    mpfr_set_emax(128);
    uint64_t s = 5;
    for (int round = 0; round < 2000; round++) {
        float g[64];
        const int n = 1 + round % 64;
        for (int i = 0; i < n; i++) {
            const double scale = round % 3 == 0 ? 0 : draw(&s) * (round % 3 == 1 ? 20 : 120);
            g[i] = (float)ldexp(draw(&s), (int)scale - (round % 7 == 0 ? 140 : 0));
        }
        mpfr_set_emin(-4000);
        mpfr_set_emax(4000);
        mpfr_set_zero(sum, 1);
        for (int i = 0; i < n; i++) {
            mpfr_set_flt(term, g[i], MPFR_RNDN);
            mpfr_sqr(term, term, MPFR_RNDN);
            mpfr_add(sum, sum, term, MPFR_RNDN);
        }
        mpfr_set_emin(-148);
        mpfr_set_emax(128);
        const int inexact = mpfr_sqrt(root, sum, MPFR_RNDN);
        mpfr_subnormalize(root, inexact, MPFR_RNDN);
        const float want = mpfr_get_flt(root, MPFR_RNDN), got = norm_of(g, n, 2);
        if (memcmp(&want, &got, sizeof got) != 0)
            fail_msg("round %d: norm %a, expected %a", round, (double)got, (double)want);
    }
    mpfr_clears(sum, term, root, (mpfr_ptr)0);
}

/* 2^18 squares of 48 bits: more than 64 bits hold; the norm is 2^9 times the value. */
static void test_gradnorm_many(void **state) {
    (void)state;
    enum { MANY = 1 << 18 };
    static float g[MANY];
    float norm[1];
    int64_t seg[2] = {0, MANY};
    uint8_t owner[1] = {1};
    for (int i = 0; i < MANY; i++)
        g[i] = 0x1.fffffep0f;
    const xp_gradnorm_args a = {.grad = F1(g), .seg = L1(seg), .owner = B1(owner), .norm = F1(norm), .p = 2};
    dense_ok(&xp_dense_gradnorm, &a);
    assert_true(norm[0] == 0x1.fffffep9f);
}

static void test_gradnorm_owner(void **state) {
    (void)state;
    float g[5] = {3, 100, NAN, 4, 1000}, norm[1];
    int64_t seg[5] = {0, 1, 3, 4, 5};
    uint8_t owner[4] = {1, 0, 1, 0};
    const xp_gradnorm_args a = {.grad = F1(g), .seg = L1(seg), .owner = B1(owner), .norm = F1(norm), .p = 2};
    dense_ok(&xp_dense_gradnorm, &a);
    assert_true(norm[0] == 5);
}

static void test_clip(void **state) {
    (void)state;
    float g[2] = {3, -4}, norm[1] = {5}, coef[1];
    xp_clip_args a = {.grad = F1(g), .norm = F1(norm), .coef = F1(coef), .max_norm = 2.5f};
    dense_ok(&xp_dense_clip, &a);
    assert_true(coef[0] == 0.5f && g[0] == 1.5f && g[1] == -2);
    norm[0] = 2;
    dense_ok(&xp_dense_clip, &a);
    assert_true(coef[0] == 1 && g[0] == 1.5f);
    norm[0] = NAN;
    dense_ok(&xp_dense_clip, &a);
    assert_true(isnan(coef[0]) && g[0] == 1.5f);
    norm[0] = HUGE_VALF;
    dense_ok(&xp_dense_clip, &a);
    assert_true(isnan(coef[0]) && g[1] == -2);
    norm[0] = 0;
    a.max_norm = 0;
    dense_ok(&xp_dense_clip, &a); /* 0/0 */
    assert_true(coef[0] == 1 && g[1] == -2);
    /* both roundings of the coefficient: 1 + 1e-6 is 1 + 8 units of f32 */
    norm[0] = 1;
    a.eps = 1e-6f;
    a.max_norm = 0.7f;
    dense_ok(&xp_dense_clip, &a);
    volatile float sum = 1.0f + 1e-6f, c = 0.7f / sum, product = 1.5f * c;
    assert_true(coef[0] == c && g[0] == product);
}

/* The definition at 200 bits. The row works in double: a handful of operations, each 2^-53 of a value below 2. */
static void test_adamw_against_mpfr(void **state) {
    (void)state;
    double p[3] = {0.5, -1.25, 2}, m[3] = {0, 0.125, -0.5}, v[3] = {0, 0.25, 1}, g[3] = {0.1, -0.7, 0.3};
    int64_t seg[3] = {0, 2, 3};
    uint8_t decay[2] = {1, 0};
    double want[3];
    const xp_adamw_args a = {.param = D1(p),
                             .m = D1(m),
                             .v = D1(v),
                             .grad = D1(g),
                             .seg = L1(seg),
                             .decay = B1(decay),
                             .lr = 0.01,
                             .beta1 = 0.9,
                             .beta2 = 0.999,
                             .eps = 1e-8,
                             .weight_decay = 0.1,
                             .step = 7};
    mpfr_set_emin(-4000);
    mpfr_set_emax(4000);
    mpfr_t x, y, z, w;
    mpfr_inits2(200, x, y, z, w, (mpfr_ptr)0);
    for (int i = 0; i < 3; i++) {
        mpfr_set_d(z, a.beta1, MPFR_RNDN); /* x = m / (1 - b1^t) */
        mpfr_mul_d(x, z, m[i], MPFR_RNDN);
        mpfr_d_sub(y, 1, z, MPFR_RNDN);
        mpfr_mul_d(y, y, g[i], MPFR_RNDN);
        mpfr_add(x, x, y, MPFR_RNDN);
        mpfr_pow_ui(z, z, 7, MPFR_RNDN);
        mpfr_d_sub(z, 1, z, MPFR_RNDN);
        mpfr_div(x, x, z, MPFR_RNDN);
        mpfr_set_d(z, a.beta2, MPFR_RNDN); /* y = sqrt(v / (1 - b2^t)) + eps */
        mpfr_mul_d(y, z, v[i], MPFR_RNDN);
        mpfr_d_sub(w, 1, z, MPFR_RNDN);
        mpfr_mul_d(w, w, g[i], MPFR_RNDN);
        mpfr_mul_d(w, w, g[i], MPFR_RNDN);
        mpfr_add(y, y, w, MPFR_RNDN);
        mpfr_pow_ui(z, z, 7, MPFR_RNDN);
        mpfr_d_sub(z, 1, z, MPFR_RNDN);
        mpfr_div(y, y, z, MPFR_RNDN);
        mpfr_sqrt(y, y, MPFR_RNDN);
        mpfr_add_d(y, y, a.eps, MPFR_RNDN);
        mpfr_div(x, x, y, MPFR_RNDN);
        mpfr_mul_d(x, x, a.lr, MPFR_RNDN);
        mpfr_set_d(z, a.lr, MPFR_RNDN);
        mpfr_mul_d(z, z, i < 2 ? a.weight_decay : 0, MPFR_RNDN);
        mpfr_d_sub(z, 1, z, MPFR_RNDN);
        mpfr_mul_d(z, z, p[i], MPFR_RNDN);
        mpfr_sub(z, z, x, MPFR_RNDN);
        want[i] = mpfr_get_d(z, MPFR_RNDN);
    }
    mpfr_clears(x, y, z, w, (mpfr_ptr)0);
    dense_ok(&xp_dense_adamw, &a);
    for (int i = 0; i < 3; i++)
        near(p[i], want[i], 16 * 0x1p-53 * 2, "param", i);
    near(m[1], 0.9 * 0.125 - 0.1 * 0.7, 4 * 0x1p-53, "m", 1);
    near(v[2], 0.999 + 0.001 * 0.09, 4 * 0x1p-53, "v", 2);
}

static void test_sgd(void **state) {
    (void)state;
    double p[2] = {1, 1}, buf[2] = {100, 100}, g[2] = {0.5, 0.5};
    int64_t seg[3] = {0, 1, 2};
    uint8_t decay[2] = {1, 0};
    xp_sgd_args a = {.param = D1(p),
                     .buf = D1(buf),
                     .grad = D1(g),
                     .seg = L1(seg),
                     .decay = B1(decay),
                     .lr = 0.5,
                     .momentum = 0.5,
                     .weight_decay = 0.25,
                     .step = 1};
    dense_ok(&xp_dense_sgd, &a);
    assert_true(buf[0] == 0.75 && buf[1] == 0.5 && p[0] == 0.625 && p[1] == 0.75);
    a.step = 2;
    dense_ok(&xp_dense_sgd, &a);
    assert_true(buf[1] == 0.75 && p[1] == 0.375 && buf[0] == 0.5 + 0.25 * 0.625 + 0.375);
    a.momentum = 0;
    a.buf.data = NULL;
    a.weight_decay = 0;
    p[0] = HUGE_VAL; /* not decayed: 0 * inf is not added */
    dense_ok(&xp_dense_sgd, &a);
    assert_true(p[1] == 0.125 && buf[1] == 0.75 && isinf(p[0]));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_narrow_every_neighbour),
        cmocka_unit_test(test_narrow_special),
        cmocka_unit_test(test_cast),
        cmocka_unit_test(test_sum_rounds_once),
        cmocka_unit_test(test_residual_strides),
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_many_rows),
        cmocka_unit_test(test_route),
        cmocka_unit_test(test_route_bwd),
        cmocka_unit_test(test_route_scores),
        cmocka_unit_test(test_route_table),
        cmocka_unit_test(test_route_first_score),
        cmocka_unit_test(test_route_groups),
        cmocka_unit_test(test_route_sparsemixer),
        cmocka_unit_test(test_route_rounding),
        cmocka_unit_test(test_route_bwd_small),
        cmocka_unit_test(test_route_bwd_dialects),
        cmocka_unit_test(test_balance),
        cmocka_unit_test(test_permute),
        cmocka_unit_test(test_expert),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_expert_bias_and_layout),
        cmocka_unit_test(test_expert_rounding),
        cmocka_unit_test(test_expert_casts),
        cmocka_unit_test(test_wgrad_blocks),
        cmocka_unit_test(test_shared),
        cmocka_unit_test(test_shared_rounding),
        cmocka_unit_test(test_activation_slopes),
        cmocka_unit_test(test_moe_gradients),
        cmocka_unit_test(test_moe_is_its_parts),
        cmocka_unit_test(test_moe_gradients_of_dialects),
        cmocka_unit_test(test_moe_of_dialects_is_its_parts),
        cmocka_unit_test(test_moe_no_tokens),
        cmocka_unit_test(test_moe_nan_logit),
        cmocka_unit_test(test_refused_dialects),
        cmocka_unit_test(test_xent),
        cmocka_unit_test(test_gradnorm_by_hand),
        cmocka_unit_test(test_gradnorm_against_mpfr),
        cmocka_unit_test(test_gradnorm_owner),
        cmocka_unit_test(test_gradnorm_many),
        cmocka_unit_test(test_clip),
        cmocka_unit_test(test_adamw_against_mpfr),
        cmocka_unit_test(test_sgd),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
