/* Every activation that a dialect can ask for, through the stages that contain it: rounding points, gradients, bounds.
 *
 * The rounding points' numbers are of torch 2.13's autograd in bf16, chosen so that every point that can be seen in a
 * result is: leaving out any of them changes act, dg or du. Gradients are held against finite differences of the
 * forward row, bounds against plain formulas that are evaluated in float, in another order. */
#include <math.h>

#include "err.h"
#include "ref.h"
#include "unit/glu_suite.h"
#include "xp/expert.h"
#include "xp/shared.h"

#define RECORD_OF(act_, gated_, round_, alpha_, offset_, limit_, when_, gcap_, ucap_)                     \
    {                                                                                                     \
        .name = "test", .gated = (gated_), .act = XP_ACT_##act_, .act_rounding = XP_ROUND_##round_,       \
        .act_alpha = (alpha_), .up_offset = (offset_), .limit = (limit_), .limit_when = XP_LIMIT_##when_, \
        .gate_cap = (gcap_), .up_cap = (ucap_)                                                            \
    }

/* ---- cases ---- */

typedef struct {
    xp_expert_args f;
    xp_expert_bwd_args b;
} expert_case;

/* C rows of one expert. */
static expert_case expert_of(const xp_dialect *d, xp_dtype act, xp_dtype param, int64_t H, int64_t F, int64_t C) {
    const int64_t U = d->gated ? 2 * F : F, border[] = {0, C};
    expert_case c;
    memset(&c, 0, sizeof c);
    c.f.x = matrix(act, C, H);
    c.f.offsets = offsets_of(border, 2);
    c.f.w1 = cube(param, 1, U, H);
    c.f.w2 = cube(param, 1, H, F);
    c.f.pre = matrix(param, C, U);
    c.f.act = matrix(param, C, F);
    c.f.y = matrix(act, C, H);
    c.f.dialect = d;
    if (d->expert_bias) {
        c.f.b1 = matrix(param, 1, U);
        c.f.b2 = matrix(param, 1, H);
    }
    c.b = (xp_expert_bwd_args){.dy = matrix(act, C, H),
                               .pre = c.f.pre,
                               .offsets = c.f.offsets,
                               .w1 = c.f.w1,
                               .w2 = c.f.w2,
                               .dpre = matrix(param, C, U),
                               .dx = matrix(act, C, H),
                               .dialect = d};
    return c;
}

static void expert_random(const expert_case *c, uint64_t seed) {
    randomise(&c->f.x, seed, 1.0);
    randomise(&c->f.w1, seed + 1, 1.0);
    randomise(&c->f.w2, seed + 2, 1.0);
    randomise(&c->b.dy, seed + 3, 1.0);
    if (c->f.b1.data) {
        randomise(&c->f.b1, seed + 4, 1.0);
        randomise(&c->f.b2, seed + 5, 1.0);
    }
}

static void run_expert(const expert_case *c) {
    assert_int_equal(run_kernel(&xp_ref_expert, NULL, &c->f), XP_OK);
    assert_int_equal(run_kernel(&xp_ref_expert_bwd, NULL, &c->b), XP_OK);
}

static void fill(const xp_tensor *t, double v) {
    for (int64_t n = 0; n < xp_tensor_count(t); n++)
        xp_ref_store(t->data, t->dtype, xp_tensor_offset(t, n), v);
}

/* ---- rounding points ---- */

typedef struct {
    const char *name;
    xp_dialect d;
    double g, u, da, act, dg, du; /* du 0 without a gate */
} point;

static const point points[] = {
    {"silu", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), -2.90625, -0.70703125, -0.9375, 0.1064453125,
     -0.060546875, 0.140625},
    {"silu once", RECORD_OF(SILU, 1, ONCE, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), -3.21875, 4.375, 0.58984375, -0.54296875,
     -0.2080078125, -0.0732421875},
    {"written out", RECORD_OF(SILU, 1, EACH, 1.702, 1.0, 7.0, BEFORE, 0.0, 0.0), -3.109375, 0.71484375, -1.46875,
     -0.027099609375, 0.05517578125, 0.0230712890625},
    {"written out, once", RECORD_OF(SILU, 1, ONCE, 1.702, 1.0, 0.0, BEFORE, 0.0, 0.0), -2.359375, -11.5, -1.859375,
     0.439453125, -1.015625, 0.07763671875},
    {"alpha", RECORD_OF(SILU, 1, EACH, 1.702, 0.0, 0.0, BEFORE, 0.0, 0.0), -1.859375, -2.390625, 1.171875, 0.1787109375,
     0.2265625, -0.08740234375},
    {"offset", RECORD_OF(SILU, 1, EACH, 1.0, 1.0, 0.0, BEFORE, 0.0, 0.0), -1.25, 3.953125, -1.4140625, -1.3671875,
     -0.0546875, 0.392578125},
    {"no gate, alpha", RECORD_OF(SILU, 0, EACH, 1.702, 0.0, 0.0, BEFORE, 0.0, 0.0), -2.671875, -0.69921875, -1.546875,
     -0.027587890625, 0.05517578125, 0.0},
    {"no gate, silu", RECORD_OF(SILU, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 1.125, -0.86328125, 1.3359375,
     0.84765625, 1.2890625, 0.0},
    {"gelu_tanh", RECORD_OF(GELU_TANH, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 1.8359375, 2.984375, 1.34375, 5.28125,
     4.40625, 2.390625},
    {"no gate, gelu_tanh", RECORD_OF(GELU_TANH, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 0.9140625, 3.640625,
     -0.5390625, 0.75, -0.5703125, 0.0},
    {"gelu_tanh, offset", RECORD_OF(GELU_TANH, 1, EACH, 1.0, 0.3, 0.0, BEFORE, 0.0, 0.0), 0.69921875, -10.75,
     -1.4453125, -5.53125, 14.6875, -0.76953125},
    {"relu", RECORD_OF(RELU, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 3.484375, 4.78125, 1.828125, 16.625, 8.75,
     6.375},
    {"relu below 0", RECORD_OF(RELU, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), -2.125, -3.046875, 1.6328125, -0.0, 0.0,
     0.0},
    {"no gate, relu", RECORD_OF(RELU, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 6.65625, 1.25, -1.125, 6.65625, -1.125,
     0.0},
    {"relu2", RECORD_OF(RELU2, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 10.1875, 3.65625, 1.2109375, 380.0, 90.5,
     126.0},
    {"relu2 once", RECORD_OF(RELU2, 1, ONCE, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 2.734375, -3.59375, -1.5546875, -26.875,
     30.5, -11.625},
    {"no gate, relu2", RECORD_OF(RELU2, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), 8.6875, 2.125, -1.2734375, 75.5,
     -22.125, 0.0},
    {"no gate, relu2 below 0", RECORD_OF(RELU2, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0.0, 0.0), -3.8125, -3.8125, 0.85546875,
     0.0, 0.0, 0.0},
    {"softcap", RECORD_OF(SOFTCAP, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 4.0, 25.0), 9.1875, 2.140625, 1.0703125, 8.375,
     0.09130859375, 4.15625},
    {"softcap, small caps", RECORD_OF(SOFTCAP, 1, ONCE, 1.0, 0.0, 0.0, BEFORE, 0.5, 0.75), -8.0625, 0.80859375,
     -1.65625, -9.34600830078125e-05, 0.00015544891357421875, 9.679794311523438e-05},
    {"g beyond a limit before", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 2.0, BEFORE, 0.0, 0.0), 2.75, 1.5, -1.453125,
     2.640625, 0.0, -2.546875},
    {"u beyond a limit", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 2.0, BEFORE, 0.0, 0.0), 1.359375, 8.125, 1.34375, 2.15625,
     2.734375, 0.0},
    {"u below a limit", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 2.0, BEFORE, 0.0, 0.0), -2.25, -2.734375, -1.875, 0.4296875,
     -0.37109375, 0.0},
    {"both at a limit", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 2.0, BEFORE, 0.0, 0.0), 2.0, -2.0, -1.90625, -3.515625,
     4.15625, -3.34375},
    {"a limit that is rounded", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 2.005, BEFORE, 0.0, 0.0), 2.0, 2.015625, 1.9609375,
     3.515625, 4.28125, 0.0},
    {"s beyond a limit after", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 1.0, AFTER, 0.0, 0.0), 2.46875, 0.765625, 0.8515625,
     0.765625, 0.0, 0.8515625},
    {"s below a limit after, g beyond", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 1.0, AFTER, 0.0, 0.0), 1.1015625, 0.4921875,
     -1.390625, 0.408203125, -0.65234375, -1.1484375},
    {"u beyond a limit after", RECORD_OF(SILU, 1, EACH, 1.0, 0.0, 1.0, AFTER, 0.0, 0.0), -6.5625, -7.0, -1.8046875,
     0.00927734375, -0.01416015625, 0.0},
    {"written out, beyond", RECORD_OF(SILU, 1, EACH, 1.702, 1.0, 7.0, BEFORE, 0.0, 0.0), 8.0625, -7.59375, 0.9453125,
     -42.0, 0.0, 0.0},
    {"gelu_tanh, once, after", RECORD_OF(GELU_TANH, 1, ONCE, 1.0, 0.0, 1.005, AFTER, 0.0, 0.0), 2.53125, 10.6875,
     -1.765625, 1.015625, 0.0, 0.0},
};

static void expect(const char *name, const char *what, double got, double expected) {
    if (got != expected || signbit(got) != signbit(expected))
        fail_msg("%s: %s is %.17g, expected %.17g", name, what, got, expected);
}

/* The matrices are 1 where gate, up and output meet and 0 elsewhere, so that the activation stands alone. */
static void point_check(const point *p, xp_gate_layout layout) {
    xp_dialect d = p->d;
    d.gate_layout = layout;
    const expert_case c = expert_of(&d, XP_BF16, XP_BF16, 2, 1, 1);
    fill(&c.f.w1, 0.0);
    for (int64_t j = 0; j < c.f.w1.dim[1]; j++)
        xp_ref_store(xp_tensor_at(&c.f.w1, 0, j, j, 0), XP_BF16, 0, 1.0);
    fill(&c.f.w2, 0.0);
    xp_ref_store(c.f.w2.data, XP_BF16, 0, 1.0);
    set(&c.f.x, 0, 0, p->g);
    set(&c.f.x, 0, 1, p->u);
    set(&c.b.dy, 0, 0, p->da);
    set(&c.b.dy, 0, 1, 0.0);
    run_expert(&c);
    assert_true(value(&c.f.x, 0) == p->g && value(&c.f.x, 1) == p->u && value(&c.b.dy, 0) == p->da);
    expect(p->name, "pre", value(&c.f.pre, 0), p->g);
    expect(p->name, "act", value(&c.f.act, 0), p->act);
    expect(p->name, "y", value(&c.f.y, 0), p->act == 0.0 ? 0.0 : p->act);
    expect(p->name, "dg", value(&c.b.dpre, 0), p->dg);
    if (d.gated)
        expect(p->name, "du", value(&c.b.dpre, 1), p->du);
    assert_true(value(&c.b.dx, 0) == p->dg && value(&c.b.dx, 1) == p->du);
    assert_int_equal(pool_close(), XP_OK);
}

static void rounding_points(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof points / sizeof *points; i++) {
        point_check(&points[i], XP_GATE_CONCAT);
        point_check(&points[i], XP_GATE_INTERLEAVED);
    }
}

/* An output in f64 shows the value before its rounding, and nothing before that is left out. */
static void last_rounding(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof points / sizeof *points; i++) {
        const point *p = &points[i];
        int finer = 0;
        expert_case c = expert_of(&p->d, XP_BF16, XP_BF16, 8, 9, 5), wide = c;
        expert_random(&c, 40 + i);
        run_expert(&c);
        wide.f.act = matrix(XP_F64, 5, 9);
        wide.f.y = matrix(XP_F64, 5, 8);
        wide.b.dpre = matrix(XP_F64, 5, c.f.w1.dim[1]);
        assert_int_equal(run_unchecked(&xp_ref_expert, NULL, &wide.f), XP_OK);
        assert_int_equal(run_unchecked(&xp_ref_expert_bwd, NULL, &wide.b), XP_OK);
        for (int64_t n = 0; n < 45; n++) {
            assert_true(xp_ref_round(value(&wide.f.act, n), XP_BF16) == value(&c.f.act, n));
            finer += value(&wide.f.act, n) != value(&c.f.act, n);
        }
        assert_true(finer > 0 || (p->d.act == XP_ACT_RELU && !p->d.gated)); /* relu rounds nothing */
        for (int64_t n = 0; n < xp_tensor_count(&c.b.dpre); n++)
            assert_true(xp_ref_round(value(&wide.b.dpre, n), XP_BF16) == value(&c.b.dpre, n));
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* pre = r(r(x w1) + b1): 1.0078125^2 = 1.015625 + 2^-14 -> 1.015625, and 2^-8 more is a tie that goes down; without the
 * first rounding it would go up. y: 1.015625 * 1.0078125 -> 1.0234375, and 2^-8 less is a tie, too. */
static void biases_round_again(void **state) {
    static const xp_dialect d = {.name = "test", .act = XP_ACT_RELU, .expert_bias = 1};
    (void)state;
    expert_case c = expert_of(&d, XP_BF16, XP_BF16, 1, 1, 1);
    fill(&c.f.x, 1.0078125);
    fill(&c.f.w1, 1.0078125);
    fill(&c.f.w2, 1.0078125);
    fill(&c.f.b1, 0x1p-8);
    fill(&c.f.b2, -0x1p-8);
    assert_int_equal(run_kernel(&xp_ref_expert, NULL, &c.f), XP_OK);
    assert_true(value(&c.f.pre, 0) == 1.015625 && value(&c.f.act, 0) == 1.015625 && value(&c.f.y, 0) == 1.015625);
    c.f.pre = matrix(XP_F64, 1, 1);
    c.f.y = matrix(XP_F64, 1, 1);
    assert_int_equal(run_unchecked(&xp_ref_expert, NULL, &c.f), XP_OK);
    assert_true(value(&c.f.pre, 0) == 1.015625 + 0x1p-8 && value(&c.f.y, 0) == 1.0234375 - 0x1p-8);
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- the shared expert has no biases, and the limit only where the record says so ---- */

static void copy(const xp_tensor *from, const xp_tensor *to) {
    for (int64_t n = 0; n < xp_tensor_count(to); n++)
        xp_ref_store(to->data, to->dtype, xp_tensor_offset(to, n), value(from, n));
}

static void shared_like_expert(const xp_dialect *d, const xp_dialect *of_expert, int same) {
    const expert_case e = expert_of(of_expert, XP_BF16, XP_F32, 9, 6, 67);
    const int64_t X = e.f.w1.dim[1];
    expert_random(&e, 7);
    const xp_shared_args f = {.x = e.f.x,
                              .w1 = matrix(XP_F32, X, 9),
                              .w2 = matrix(XP_F32, 9, 6),
                              .pre = matrix(XP_F32, 67, X),
                              .act = matrix(XP_F32, 67, 6),
                              .mlp = matrix(XP_BF16, 67, 9),
                              .y = matrix(XP_BF16, 67, 9),
                              .dialect = d};
    const xp_shared_bwd_args b = {.dy = e.b.dy,
                                  .pre = f.pre,
                                  .w1 = f.w1,
                                  .w2 = f.w2,
                                  .dmlp = matrix(XP_BF16, 67, 9),
                                  .dpre = matrix(XP_F32, 67, X),
                                  .dx = matrix(XP_BF16, 67, 9),
                                  .dialect = d};
    copy(&e.f.w1, &f.w1);
    copy(&e.f.w2, &f.w2);
    run_expert(&e);
    assert_int_equal(run_kernel(&xp_ref_shared, NULL, &f), XP_OK);
    assert_int_equal(run_kernel(&xp_ref_shared_bwd, NULL, &b), XP_OK);
    assert_true(same_bits(&f.pre, &e.f.pre));
    assert_int_equal(same_bits(&f.act, &e.f.act), same);
    assert_int_equal(same_bits(&f.y, &e.f.y), same);
    assert_int_equal(same_bits(&b.dpre, &e.b.dpre), same);
    assert_int_equal(same_bits(&b.dx, &e.b.dx), same);
    assert_int_equal(pool_close(), XP_OK);
}

static void shared_limits(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof points / sizeof *points; i++) {
        const int limited = points[i].d.limit > 0.0;
        xp_dialect on = points[i].d, off = points[i].d, none = points[i].d;
        on.shared_limit = on.expert_bias = 1; /* the biases are the experts' own */
        on.limit = off.limit = limited ? 0.75 : 0.0;
        none.limit = 0.0;
        xp_dialect expert = off;
        shared_like_expert(&on, &expert, 1);
        shared_like_expert(&off, &none, 1);
        shared_like_expert(&off, &expert, !limited);
    }
}

/* ---- gradients ---- */

typedef struct {
    expert_case *c;
    xp_exec x;
    void *bound_ws;
    xp_tensor tol;
} objective;

static double objective_value(void *ctx, double *out_err) {
    objective *o = ctx;
    const xp_expert_args *f = &o->c->f;
    assert_int_equal(xp_ref_expert.run(&o->x, f), XP_OK);
    assert_int_equal(
        xp_stage_expert.bound(f, NULL, xp_stage_operand(&xp_stage_expert, "y"), &f->y, o->bound_ws, &o->tol), XP_OK);
    return weighted(&o->c->b.dy, &f->y, &o->tol, out_err);
}

/* A step moves an element of pre by less than this: 4 h sum |x| |direction| with H = 3, h = 2^-7, sizes below 1; an
 * activation's slope is below 1.2. */
#define REACH 0.12

static int clear_of(double v, double kink) {
    return fabs(v - kink) > REACH;
}

/* 1 when no step meets a kink, every clamp and relu holds some elements and lets some pass, and a gradient of gate and
 * of up is left. */
static int away_from_kinks(const expert_case *c) {
    const xp_dialect *d = c->f.dialect;
    const plain_glu o = plain_of(d, XP_F64, 0);
    const int relu = d->act == XP_ACT_RELU || d->act == XP_ACT_RELU2;
    int held[3] = {0, 0, 0}, passed[3] = {0, 0, 0}, ok = 1, gates = 0, ups = 0;
    for (int64_t i = 0; i < c->f.pre.dim[0]; i++) {
        for (int64_t j = 0; j < c->f.act.dim[1]; j++) {
            const double g = get(&c->f.pre, i, gate_column(d, j)), u = get(&c->f.pre, i, up_column(d, 2, j));
            const double top = d->limit_when == XP_LIMIT_AFTER ? plain_gate(&o, g) : g;
            const int h[3] = {g<0.0, top> d->limit, fabs(u) > d->limit};
            gates += get(&c->b.dpre, i, gate_column(d, j)) != 0.0;
            ups += get(&c->b.dpre, i, up_column(d, 2, j)) != 0.0;
            ok &= !relu || clear_of(g, 0.0);
            ok &= d->limit == 0.0 || (clear_of(top, d->limit) && clear_of(fabs(u), d->limit));
            for (int k = 0; k < 3; k++) {
                held[k] += h[k];
                passed[k] += !h[k];
            }
        }
    }
    return ok && gates && ups && (!relu || (held[0] && passed[0])) &&
           (d->limit == 0.0 || (held[1] && passed[1] && held[2] && passed[2]));
}

/* Sums over rows of dpre and dy: the biases' gradients; sums of products: the matrices'. */
static void gradients(const expert_case *c, const xp_tensor *dw1, const xp_tensor *dw2, const xp_tensor *db1,
                      const xp_tensor *db2) {
    const struct {
        const xp_tensor *dy, *x, *dw, *db;
    } part[] = {{&c->b.dpre, &c->f.x, dw1, db1}, {&c->b.dy, &c->f.act, dw2, db2}};
    for (int k = 0; k < 2; k++) {
        for (int64_t n = 0; n < part[k].dy->dim[1]; n++) {
            double sum = 0.0;
            for (int64_t i = 0; i < part[k].dy->dim[0]; i++)
                sum += get(part[k].dy, i, n);
            set(part[k].db, 0, n, sum);
            for (int64_t j = 0; j < part[k].x->dim[1]; j++) {
                double s = 0.0;
                for (int64_t i = 0; i < part[k].dy->dim[0]; i++)
                    s += get(part[k].dy, i, n) * get(part[k].x, i, j);
                *(double *)xp_tensor_at(part[k].dw, 0, n, j, 0) = s;
            }
        }
    }
}

static void slopes_of(const xp_dialect *d) {
    enum { H = 3, F = 2, C = 3 };
    expert_case c = expert_of(d, XP_F64, XP_F64, H, F, C);
    const int64_t U = c.f.w1.dim[1];
    objective o = {&c, slope_exec(&xp_ref_expert, NULL, &c.f), take(xp_stage_expert.bound_workspace(&c.f, NULL)),
                   matrix(XP_F64, C, H)};
    const xp_exec back = slope_exec(&xp_ref_expert_bwd, NULL, &c.b);
    uint64_t seed = 0;
    do {
        seed += 10;
        assert_true(seed < 1000000);
        expert_random(&c, seed);
        assert_int_equal(xp_ref_expert.run(&o.x, &c.f), XP_OK);
        assert_int_equal(xp_ref_expert_bwd.run(&back, &c.b), XP_OK);
    } while (!away_from_kinks(&c));
    const xp_tensor dw1 = cube(XP_F64, 1, U, H), dw2 = cube(XP_F64, 1, H, F);
    const xp_tensor db1 = matrix(XP_F64, 1, U), db2 = matrix(XP_F64, 1, H);
    assert_int_equal(xp_stage_expert.check(&c.f, NULL), XP_OK);
    assert_int_equal(xp_stage_expert_bwd.check(&c.b, NULL), XP_OK);
    gradients(&c, &dw1, &dw2, &db1, &db2);
    slope_expect("x", &c.f.x, &c.b.dx, 1, objective_value, &o);
    slope_expect("w1", &c.f.w1, &dw1, 2, objective_value, &o);
    slope_expect("w2", &c.f.w2, &dw2, 3, objective_value, &o);
    if (d->expert_bias) {
        slope_expect("b1", &c.f.b1, &db1, 4, objective_value, &o);
        slope_expect("b2", &c.f.b2, &db2, 5, objective_value, &o);
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* Every combination that a record can hold. */
static void slopes(void **state) {
    int n = 0;
    (void)state;
    for (int act = XP_ACT_SILU; act <= XP_ACT_SOFTCAP; act++) {
        for (int bits = 0; bits < 128; bits++) {
            xp_dialect d = {.name = "test",
                            .act = (xp_act)act,
                            .gated = bits & 1,
                            .act_alpha = bits & 2 ? 1.702 : 1.0,
                            .up_offset = bits & 4 ? 0.75 : 0.0,
                            .limit = bits & 8 ? 0.25 : 0.0,
                            .limit_when = bits & 16 ? XP_LIMIT_AFTER : XP_LIMIT_BEFORE,
                            .act_rounding = bits & 32 ? XP_ROUND_ONCE : XP_ROUND_EACH,
                            .gate_layout = bits & 64 ? XP_GATE_INTERLEAVED : XP_GATE_CONCAT,
                            .expert_bias = bits >> 6,
                            .gate_cap = 2.0,
                            .up_cap = 3.0};
            if ((!d.gated && (bits & 12 || act == XP_ACT_SOFTCAP)) || (bits & 16 && !(bits & 8)))
                continue;
            if ((bits & 2 && act != XP_ACT_SILU) || (bits & 64 && !d.gated && bits & 32))
                continue; /* alpha is silu's alone; without a gate the layout means nothing */
            slopes_of(&d);
            n++;
        }
    }
    print_message("%d combinations\n", n);
    assert_int_equal(n, 159);
}

/* ---- bounds ---- */

/* A record and a neighbour that must not pass for it. */
typedef struct {
    xp_dialect d, other;
} neighbours;

#define FORM(...) RECORD_OF(__VA_ARGS__)
static const neighbours forms[] = {
    {FORM(SILU, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0), FORM(GELU_TANH, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(SILU, 1, ONCE, 1.0, 0.0, 0.0, BEFORE, 0, 0), FORM(SILU, 1, ONCE, 1.0, 0.0, 4.0, BEFORE, 0, 0)},
    {FORM(SILU, 1, EACH, 1.702, 1.0, 4.0, BEFORE, 0, 0), FORM(SILU, 1, EACH, 1.702, 0.0, 4.0, BEFORE, 0, 0)},
    {FORM(SILU, 1, ONCE, 1.702, 1.0, 4.0, BEFORE, 0, 0), FORM(SILU, 1, ONCE, 1.0, 1.0, 4.0, BEFORE, 0, 0)},
    {FORM(SILU, 1, EACH, 1.702, 0.0, 0.0, BEFORE, 0, 0), FORM(SILU, 1, EACH, 1.5, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(SILU, 0, EACH, 1.702, 0.0, 0.0, BEFORE, 0, 0), FORM(SILU, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(SILU, 1, EACH, 1.0, 0.0, 3.0, BEFORE, 0, 0), FORM(SILU, 1, EACH, 1.0, 0.0, 3.0, AFTER, 0, 0)},
    {FORM(SILU, 1, EACH, 1.0, 0.0, 3.0, AFTER, 0, 0), FORM(SILU, 1, EACH, 1.0, 0.0, 3.0, BEFORE, 0, 0)},
    {FORM(SILU, 1, EACH, 1.0, 0.0, 2.005, AFTER, 0, 0), FORM(SILU, 1, EACH, 1.0, 0.0, 0.0, AFTER, 0, 0)},
    {FORM(GELU_TANH, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0), FORM(SILU, 1, EACH, 1.702, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(GELU_TANH, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0), FORM(SILU, 0, EACH, 1.702, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(GELU_TANH, 1, ONCE, 1.0, 0.5, 2.0, AFTER, 0, 0), FORM(GELU_TANH, 1, ONCE, 1.0, 0.0, 2.0, AFTER, 0, 0)},
    {FORM(RELU, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0), FORM(RELU2, 1, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(RELU, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0), FORM(SILU, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(RELU2, 1, EACH, 1.0, 0.0, 2.0, AFTER, 0, 0), FORM(RELU, 1, EACH, 1.0, 0.0, 2.0, AFTER, 0, 0)},
    {FORM(RELU2, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0), FORM(RELU, 0, EACH, 1.0, 0.0, 0.0, BEFORE, 0, 0)},
    {FORM(SOFTCAP, 1, ONCE, 1.0, 0.0, 0.0, BEFORE, 4.0, 25.0), FORM(SOFTCAP, 1, ONCE, 1.0, 0.0, 0.0, BEFORE, 4.0, 4.0)},
    {FORM(SOFTCAP, 1, EACH, 1.0, 0.25, 3.0, AFTER, 8.0, 5.0), FORM(SOFTCAP, 1, EACH, 1.0, 0.25, 3.0, AFTER, 4.0, 5.0)},
};

enum { ROWS = 64, WIDTH = 24, HIDDEN = 40 };
static const char *const output_name[] = {"pre", "act", "y", "dpre", "dx"};

static const xp_tensor *output_of(const expert_case *c, int i) {
    const xp_tensor *const t[] = {&c->f.pre, &c->f.act, &c->f.y, &c->b.dpre, &c->b.dx};
    return t[i];
}

/* The case with outputs in f64. */
static expert_case widened(const expert_case *c) {
    expert_case out = *c;
    xp_tensor *const t[] = {&out.f.pre, &out.f.act, &out.f.y, &out.b.dpre, &out.b.dx};
    for (size_t i = 0; i < sizeof t / sizeof *t; i++)
        *t[i] = matrix(XP_F64, ROWS, t[i]->dim[1]);
    return out;
}

static expert_case judged(const expert_case *c) {
    expert_case out = widened(c);
    assert_int_equal(run_unchecked(&xp_ref_expert, NULL, &out.f), XP_OK);
    assert_int_equal(run_unchecked(&xp_ref_expert_bwd, NULL, &out.b), XP_OK);
    return out;
}

static expert_case plain(const expert_case *c, const xp_dialect *d, int narrow) {
    const plain_glu o = plain_of(d, c->f.w1.dtype, narrow);
    const xp_tensor w1 = plane(&c->f.w1, 0), w2 = plane(&c->f.w2, 0);
    const int64_t U = w1.dim[0];
    expert_case out = widened(c);
    double x[HIDDEN], dy[HIDDEN], pre[2 * WIDTH], b1[2 * WIDTH], b2[HIDDEN];
    if (c->f.b1.data) {
        xp_widen_row(c->f.b1.data, c->f.b1.dtype, 0, U, b1);
        xp_widen_row(c->f.b2.data, c->f.b2.dtype, 0, HIDDEN, b2);
    }
    for (int64_t i = 0; i < ROWS; i++) {
        xp_widen_row(c->f.x.data, c->f.x.dtype, i * c->f.x.stride[0], HIDDEN, x);
        xp_widen_row(c->b.dy.data, c->b.dy.dtype, i * c->b.dy.stride[0], HIDDEN, dy);
        xp_widen_row(c->b.pre.data, c->b.pre.dtype, i * c->b.pre.stride[0], U, pre);
        plain_forward(&o, &w1, &w2, c->f.b1.data ? b1 : NULL, c->f.b1.data ? b2 : NULL, x,
                      xp_tensor_at(&out.f.pre, i, 0, 0, 0), xp_tensor_at(&out.f.act, i, 0, 0, 0),
                      xp_tensor_at(&out.f.y, i, 0, 0, 0));
        plain_backward(&o, &w1, &w2, dy, pre, xp_tensor_at(&out.b.dpre, i, 0, 0, 0),
                       xp_tensor_at(&out.b.dx, i, 0, 0, 0));
    }
    return out;
}

/* most[i]: the largest error of output i in its tolerance. */
static void bounds_one(const neighbours *n, int layout, xp_dtype act, xp_dtype param, uint64_t seed, double *most) {
    xp_dialect d = n->d, other = n->other;
    d.gate_layout = other.gate_layout = layout ? XP_GATE_INTERLEAVED : XP_GATE_CONCAT;
    d.expert_bias = other.expert_bias = layout;
    const expert_case c = expert_of(&d, act, param, HIDDEN, WIDTH, ROWS);
    expert_random(&c, seed);
    run_expert(&c);
    const expert_case judge = judged(&c), exact = plain(&c, &d, 0), low = plain(&c, &d, param != XP_F64);
    const expert_case wrong = plain(&c, &other, 0);
    for (int i = 0; i < 5; i++) {
        const xp_stage *s = i < 3 ? &xp_stage_expert : &xp_stage_expert_bwd;
        const xp_tensor *ref = output_of(&judge, i);
        xp_tensor tol = matrix(XP_F64, ROWS, ref->dim[1]);
        assert_int_equal(bound_of(s, NULL, i < 3 ? (const void *)&c.f : &c.b, output_name[i], ref, &tol), XP_OK);
        const expert_case *const got[] = {&c, &exact, &low};
        for (int k = 0; k < 3; k++) {
            const verdict v = compare(output_of(got[k], i), ref, &tol, ROWS);
            if (v.over)
                fail_msg("act %d %s %s: way %d is beyond the bound %lld times, by up to %g", (int)d.act,
                         xp_dtype_name(param), output_name[i], k, (long long)v.over, v.most);
            most[i] = v.most > most[i] ? v.most : most[i];
        }
        const verdict bad = compare(output_of(&wrong, i), ref, &tol, ROWS);
        if ((i == 1 || i == 3) && !bad.over)
            fail_msg("act %d %s %s: a neighbour passes", (int)d.act, xp_dtype_name(param), output_name[i]);
    }
    assert_int_equal(pool_close(), XP_OK);
}

static void bounds(void **state) {
    static const xp_dtype dtype[][2] = {{XP_F64, XP_F64}, {XP_F32, XP_F32}, {XP_BF16, XP_BF16}, {XP_F32, XP_F16}};
    (void)state;
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        for (size_t k = 0; k < sizeof dtype / sizeof *dtype; k++) {
            double most[5] = {0.0, 0.0, 0.0, 0.0, 0.0};
            for (int layout = 0; layout < 2; layout++)
                bounds_one(&forms[i], layout, dtype[k][0], dtype[k][1], 100 * i + 10, most);
            print_message("form %2zu %-4s err/bound: pre %.3f, act %.3f, y %.3f, dpre %.3f, dx %.3f\n", i,
                          xp_dtype_name(dtype[k][1]), most[0], most[1], most[2], most[3], most[4]);
            if (dtype[k][1] == XP_BF16)
                assert_true(most[0] > 0.05 && most[1] > 0.05 && most[3] > 0.05);
        }
    }
}

/* ---- functions of inexact arguments ---- */

static const plain_glu in_double = {NULL, 0.0, 0, 1}, in_float = {NULL, 0.0, 1, 0};

static double gelu_way(const plain_glu *o, double x, int slope) {
    static const xp_dialect d = {.act = XP_ACT_GELU_TANH, .act_alpha = 1.0, .gate_cap = 1.0};
    const plain_glu p = {&d, 0.0, o->narrow, o->wide};
    return slope ? plain_slope(&p, x) : plain_gate(&p, x);
}
static double gelu_exact(double x) {
    return gelu_way(&in_double, x, 0);
}
static double gelu_float(double x) {
    return gelu_way(&in_float, x, 0);
}
static double dgelu_exact(double x) {
    return gelu_way(&in_double, x, 1);
}
static double dgelu_float(double x) {
    return gelu_way(&in_float, x, 1);
}
static double dtanh_exact(double x) {
    return 1.0 / (cosh(x) * cosh(x));
}
static double dtanh_float(double x) {
    const float t = tanhf((float)x);
    return (double)(1.0F - t * t);
}
static double tanh_float(double x) {
    return (double)tanhf((float)x);
}
static double relu_exact(double x) {
    return x > 0.0 ? x : 0.0;
}
static double min_exact(double x) {
    return x < 2.0 ? x : 2.0;
}
static double clamp_exact(double x) {
    return fmin(fmax(x, -2.0), 2.0);
}
static double above_exact(double x) {
    return x <= 2.0 ? 3.0 : 0.0;
}
static double below_exact(double x) {
    return x <= 2.0 ? 0.0 : 3.0;
}
static xp_ref_val val_relu(const xp_ref_rule *r, xp_ref_val x) {
    (void)r;
    return xp_ref_val_relu(x);
}
static xp_ref_val val_min(const xp_ref_rule *r, xp_ref_val x) {
    (void)r;
    return xp_ref_val_min(x, (xp_ref_val){2.0, 0.0});
}
static xp_ref_val val_clamp(const xp_ref_rule *r, xp_ref_val x) {
    (void)r;
    return xp_ref_val_clamp(x, (xp_ref_val){2.0, 0.0});
}
static xp_ref_val val_if(const xp_ref_rule *r, xp_ref_val x) {
    (void)r;
    return xp_ref_val_if(xp_ref_val_le(x, (xp_ref_val){2.0, 0.0}), (xp_ref_val){3.0, 0.0});
}
static xp_ref_val val_unless(const xp_ref_rule *r, xp_ref_val x) {
    (void)r;
    return xp_ref_val_unless(xp_ref_val_le(x, (xp_ref_val){2.0, 0.0}), (xp_ref_val){3.0, 0.0});
}
static double third_exact(double x) {
    return x / 3.0;
}
static double third_float(double x) {
    return (double)((float)x * (1.0F / 3.0F));
}
static xp_ref_val val_third(const xp_ref_rule *r, xp_ref_val x) {
    return xp_ref_val_div(r, x, 3.0);
}

static const struct {
    const char *name;
    xp_ref_val (*val)(const xp_ref_rule *r, xp_ref_val x);
    double (*exact)(double x), (*narrow)(double x); /* narrow NULL: nothing rounds */
} functions[] = {
    {"tanh", xp_ref_val_tanh, tanh, tanh_float},
    {"tanh'", xp_ref_val_dtanh, dtanh_exact, dtanh_float},
    {"gelu_tanh", xp_ref_val_gelu_tanh, gelu_exact, gelu_float},
    {"gelu_tanh'", xp_ref_val_dgelu_tanh, dgelu_exact, dgelu_float},
    {"x / 3", val_third, third_exact, third_float},
    {"relu", val_relu, relu_exact, NULL},
    {"min", val_min, min_exact, NULL},
    {"clamp", val_clamp, clamp_exact, NULL},
    {"if", val_if, above_exact, NULL},
    {"unless", val_unless, below_exact, NULL},
};

static double ratio(xp_ref_val v, double got) {
    const double err = fabs(got - v.v);
    return err == 0.0 ? 0.0 : err / v.e;
}

/* Wherever the true argument lies, the true value is within the bound, and some value fills a good part of it. */
static void functions_move(void **state) {
    const xp_ref_rule r = xp_ref_rule_of(XP_F64, XP_F64);
    (void)state;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        double most = 0.0;
        for (uint64_t n = 0; n < 20000; n++) {
            const double size = ldexp(1.0, -(int)(n % 12)), at = (n % 3 ? 1.0 : 0.05) * 8.0 * real(61, i, n);
            const xp_ref_val x = {n % 7 ? at : 2.0 + size * real(62, i, n), size};
            const xp_ref_val v = functions[i].val(&r, x);
            for (int k = -4; k <= 4; k++) {
                const double q = ratio(v, functions[i].exact(x.v + x.e * (double)k / 4.0));
                most = q > most ? q : most;
            }
        }
        print_message("%-10s moved: err/bound %.3f\n", functions[i].name, most);
        assert_true(most <= 1.0 + 0x1p-40 && most > 0.5);
    }
}

/* In float, of an exact argument. */
static void functions_round(void **state) {
    const xp_ref_rule r = xp_ref_rule_of(XP_F32, XP_F32);
    (void)state;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        double most = 0.0;
        for (uint64_t n = 0; n < 50000 && functions[i].narrow; n++) {
            const double x = (double)(float)(ldexp(12.0, -(int)(n % 8)) * real(63, i, n));
            const double q = ratio(functions[i].val(&r, (xp_ref_val){x, 0.0}), functions[i].narrow(x));
            most = q > most ? q : most;
        }
        if (functions[i].narrow) {
            print_message("%-10s in float: err/bound %.3f\n", functions[i].name, most);
            assert_true(most <= 1.0 && most > 0.05);
        }
    }
}

/* What is far from a kink pays nothing for it; what is at a kink or an overflow, everything. */
static void functions_edges(void **state) {
    const xp_ref_rule r = xp_ref_rule_of(XP_F32, XP_F32);
    const xp_ref_val two = {2.0, 0.0}, d = {-5.0, 0.125};
    (void)state;
    assert_true(xp_ref_val_relu((xp_ref_val){-1.0, 0.5}).e == 0.0 && xp_ref_val_relu((xp_ref_val){-1.0, 1.5}).e == 0.5);
    assert_true(xp_ref_val_min((xp_ref_val){3.0, 0.5}, two).e == 0.0);
    assert_true(xp_ref_val_min((xp_ref_val){1.0, 0.5}, (xp_ref_val){2.0, 0.25}).e == 0.5);
    assert_true(xp_ref_val_min((xp_ref_val){3.0, 0.5}, (xp_ref_val){2.0, 0.25}).e == 0.25);
    assert_true(xp_ref_val_clamp((xp_ref_val){-3.0, 0.5}, two).v == -2.0);
    const xp_ref_val in = xp_ref_val_if(xp_ref_val_le(two, two), d); /* at the limit it passes, surely */
    const xp_ref_val out = xp_ref_val_if(xp_ref_val_le((xp_ref_val){2.5, 0.25}, two), d);
    assert_true(in.v == -5.0 && in.e == 0.125 && out.v == 0.0 && out.e == 0.0);
    const xp_ref_val either = xp_ref_val_if(xp_ref_val_le((xp_ref_val){2.5, 0.5}, two), d);
    const xp_ref_val maybe = xp_ref_val_if(xp_ref_val_le((xp_ref_val){1.5, 0.5}, two), d);
    assert_true(either.v == 0.0 && either.e == 5.125 && maybe.v == -5.0 && maybe.e == 5.0);
    assert_true(isinf(xp_ref_val_dgelu_tanh(&r, (xp_ref_val){1e20, 0.0}).e));
    assert_true(isfinite(xp_ref_val_dgelu_tanh(&r, (xp_ref_val){1e10, 0.0}).e));
    assert_true(xp_ref_dgelu_tanh(1e200) == 1.0 && xp_ref_dgelu_tanh(-1e200) == 0.0 && xp_ref_gelu_tanh(-9e9) == 0.0);
}

/* NaN goes through every activation; a limit does not stop it, and its own gradient stops at a limit. */
static void nan_stays(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof points / sizeof *points; i++) {
        const xp_dialect *d = &points[i].d;
        const expert_case c = expert_of(d, XP_F32, XP_F32, 2, 1, 1);
        expert_random(&c, 3);
        set(&c.f.x, 0, 0, (double)NAN);
        run_expert(&c);
        assert_true(isnan(value(&c.f.act, 0)) && isnan(value(&c.f.y, 0)));
        if (d->limit > 0.0)
            assert_true(value(&c.b.dpre, 1) == 0.0 && (value(&c.b.dpre, 0) == 0.0 || d->limit_when == XP_LIMIT_AFTER));
        else
            assert_true(isnan(value(&c.b.dpre, 0)) || d->act == XP_ACT_RELU);
        assert_int_equal(pool_close(), XP_OK);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rounding_points), cmocka_unit_test(last_rounding),   cmocka_unit_test(biases_round_again),
        cmocka_unit_test(shared_limits),   cmocka_unit_test(slopes),          cmocka_unit_test(bounds),
        cmocka_unit_test(functions_move),  cmocka_unit_test(functions_round), cmocka_unit_test(functions_edges),
        cmocka_unit_test(nan_stays),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
