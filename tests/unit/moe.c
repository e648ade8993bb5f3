/* Stage moe: the whole block against plain loops, finite differences and wrong formulas, and its composite bound.
 *
 * The plain layer below goes token by token and slot by slot: no permutation, no groups, gradients by the chain rule as
 * one would write it on paper. Its mistakes are the ones that real code has made. */
#include <math.h>

#include "ref.h"
#include "unit/expert_suite.h"
#include "xp/moe.h"

/* ---- cases ---- */

typedef struct {
    int64_t T, E, K, H, F, S;
    const char *dialect;
    xp_dtype d;
} shape;

static const char *const outputs[] = {"y", "dx", "dwr", "dw1", "dw2", "dsw1", "dsw2", "dsgate"};
enum { OUTPUTS = 8 };

static xp_tensor *out_of(xp_moe_args *a, int i) {
    return xp_stage_tensor(&xp_stage_moe, a, xp_stage_operand(&xp_stage_moe, outputs[i]));
}

static void outputs_make(xp_moe_args *a, const shape *s, xp_dtype d) {
    a->y = matrix(d, s->T, s->H);
    a->dx = matrix(d, s->T, s->H);
    a->dwr = matrix(d, s->E, s->H);
    a->dw1 = cube(d, s->E, 2 * s->F, s->H);
    a->dw2 = cube(d, s->E, s->H, s->F);
    if (s->S > 0) {
        a->dsw1 = matrix(d, 2 * s->S, s->H);
        a->dsw2 = matrix(d, s->H, s->S);
    }
    if (a->sgate.data)
        a->dsgate = matrix(d, 1, s->H);
}

static xp_moe_args moe_make(const shape *s, uint64_t seed) {
    xp_moe_args a;
    memset(&a, 0, sizeof a);
    a.dialect = xp_dialect_find(s->dialect);
    a.x = matrix(s->d, s->T, s->H);
    a.dy = matrix(s->d, s->T, s->H);
    a.wr = matrix(s->d, s->E, s->H);
    a.w1 = cube(s->d, s->E, 2 * s->F, s->H);
    a.w2 = cube(s->d, s->E, s->H, s->F);
    if (s->S > 0) {
        a.sw1 = matrix(s->d, 2 * s->S, s->H);
        a.sw2 = matrix(s->d, s->H, s->S);
        if (a.dialect->shared_gate)
            a.sgate = matrix(s->d, 1, s->H);
    }
    a.idx = matrix(XP_I32, s->T, s->K);
    const xp_tensor *const in[] = {&a.x, &a.dy, &a.wr, &a.w1, &a.w2, &a.sw1, &a.sw2, &a.sgate};
    for (size_t i = 0; i < sizeof in / sizeof *in; i++) {
        if (in[i]->data)
            randomise(in[i], seed + i, 1.0);
    }
    outputs_make(&a, s, s->d);
    assert_int_equal(xp_stage_moe.fill(&a, NULL, "exact", seed), XP_OK);
    return a;
}

/* ---- the layer in plain loops ---- */

/* Mistakes of real code, one at a time. */
typedef enum {
    RIGHT = 0,
    FIXED_SUM,      /* the gradient takes the renormalising sum for a constant */
    SLOTS_SWAPPED,  /* weights of the first two slots change places */
    ROUTER_DROPPED, /* no gradient through the routing weights into x */
    SHARED_DROPPED  /* the shared expert's gradient into x is forgotten */
} mistake;

enum { MANY = 40 };
typedef struct {
    const xp_moe_args *a;
    xp_moe_args *out; /* f64 */
    way o;
    mistake wrong;
    int64_t T, E, K, H, F, S;
    double x[WIDEST], dy[WIDEST], p[MANY], w[MANY], dw[MANY], dl[MANY];
} plain;

static double *cell(const xp_tensor *t, int64_t i, int64_t j, int64_t k) {
    return xp_tensor_at(t, i, j, k, 0);
}

static int64_t chosen(const plain *p, int64_t t, int64_t k) {
    return get_i32(&p->a->idx, t, k);
}

static void plain_route(plain *p, int64_t t) {
    double most = -HUGE_VAL, sum = 0.0, kept = 0.0;
    for (int64_t e = 0; e < p->E; e++) {
        p->p[e] = dot_of(&p->a->wr, e, p->x, p->H, p->o.narrow);
        most = fmax(most, p->p[e]);
    }
    for (int64_t e = 0; e < p->E; e++)
        sum = op(sum + (p->p[e] = op(exp(p->p[e] - most), p->o.narrow)), p->o.narrow);
    for (int64_t e = 0; e < p->E; e++)
        p->p[e] = op(p->p[e] / sum, p->o.narrow);
    for (int64_t k = 0; k < p->K; k++)
        kept += p->w[k] = p->p[chosen(p, t, k)];
    for (int64_t k = 0; k < p->K && p->a->dialect->renorm == XP_RENORM_SUM; k++)
        p->w[k] = op(p->w[k] / kept, p->o.narrow);
    if (p->wrong == SLOTS_SWAPPED) {
        const double w = p->w[0];
        p->w[0] = p->w[1];
        p->w[1] = w;
    }
}

/* The expert of slot k: its part of y, the gradient of its weights, its part of dx, and dw. */
static void plain_expert(plain *p, int64_t t, int64_t k) {
    const int64_t e = chosen(p, t, k);
    const xp_tensor w1 = plane(&p->a->w1, e), w2 = plane(&p->a->w2, e);
    double pre[WIDEST], act[WIDEST], y[WIDEST], dout[WIDEST], dpre[WIDEST], dx[WIDEST];
    plain_row(&w1, &w2, p->x, p->o, pre, act, y);
    p->dw[k] = 0.0;
    for (int64_t h = 0; h < p->H; h++) {
        *cell(&p->out->y, t, h, 0) += p->w[k] * y[h];
        p->dw[k] += p->dy[h] * y[h];
        dout[h] = op(p->w[k] * p->dy[h], p->o.narrow);
    }
    plain_back(&w1, &w2, dout, pre, p->o, dpre, dx);
    for (int64_t h = 0; h < p->H; h++) {
        *cell(&p->out->dx, t, h, 0) += dx[h];
        for (int64_t j = 0; j < 2 * p->F; j++)
            *cell(&p->out->dw1, e, j, h) += dpre[j] * p->x[h];
        for (int64_t f = 0; f < p->F; f++)
            *cell(&p->out->dw2, e, h, f) += dout[h] * act[f];
    }
}

static void plain_router_back(plain *p, int64_t t) {
    double dp[MANY] = {0}, sum = 0.0, mean = 0.0;
    for (int64_t k = 0; k < p->K; k++) {
        sum += p->p[chosen(p, t, k)];
        mean += p->dw[k] * p->w[k];
    }
    for (int64_t k = 0; k < p->K; k++) {
        if (p->a->dialect->renorm == XP_RENORM_SUM)
            dp[chosen(p, t, k)] += (p->dw[k] - (p->wrong == FIXED_SUM ? 0.0 : mean)) / sum;
        else
            dp[chosen(p, t, k)] += p->dw[k];
    }
    mean = 0.0;
    for (int64_t e = 0; e < p->E; e++)
        mean += dp[e] * p->p[e];
    for (int64_t e = 0; e < p->E; e++)
        p->dl[e] = op(p->p[e] * (dp[e] - mean), p->o.narrow);
    for (int64_t h = 0; h < p->H; h++) {
        if (p->wrong != ROUTER_DROPPED)
            *cell(&p->out->dx, t, h, 0) += column_dot(&p->a->wr, h, p->dl, p->E, p->o.narrow);
        for (int64_t e = 0; e < p->E; e++)
            *cell(&p->out->dwr, e, h, 0) += p->dl[e] * p->x[h];
    }
}

static void plain_shared(plain *p, int64_t t) {
    double pre[WIDEST], act[WIDEST], mlp[WIDEST], dmlp[WIDEST], dpre[WIDEST], dx[WIDEST], sig = 1.0, dz = 0.0;
    const xp_tensor *gate = &p->a->sgate;
    plain_row(&p->a->sw1, &p->a->sw2, p->x, p->o, pre, act, mlp);
    if (gate->data)
        sig = op(sigmoid(dot_of(gate, 0, p->x, p->H, p->o.narrow)), p->o.narrow);
    for (int64_t h = 0; h < p->H; h++) {
        *cell(&p->out->y, t, h, 0) += sig * mlp[h];
        dmlp[h] = op(sig * p->dy[h], p->o.narrow);
        dz += p->dy[h] * mlp[h];
    }
    dz *= sig * (1.0 - sig);
    plain_back(&p->a->sw1, &p->a->sw2, dmlp, pre, p->o, dpre, dx);
    for (int64_t h = 0; h < p->H; h++) {
        if (p->wrong != SHARED_DROPPED)
            *cell(&p->out->dx, t, h, 0) += dx[h] + (gate->data ? dz * get(gate, 0, h) : 0.0);
        if (gate->data)
            *cell(&p->out->dsgate, 0, h, 0) += dz * p->x[h];
        for (int64_t j = 0; j < 2 * p->S; j++)
            *cell(&p->out->dsw1, j, h, 0) += dpre[j] * p->x[h];
        for (int64_t f = 0; f < p->S; f++)
            *cell(&p->out->dsw2, h, f, 0) += dmlp[h] * act[f];
    }
}

static void plain_layer(const xp_moe_args *a, const shape *s, way o, mistake wrong, xp_moe_args *out) {
    plain p = {
        .a = a, .out = out, .o = o, .wrong = wrong, .T = s->T, .E = s->E, .K = s->K, .H = s->H, .F = s->F, .S = s->S};
    assert_true(s->E <= MANY && s->K <= MANY && s->H <= WIDEST && 2 * s->F <= WIDEST && 2 * s->S <= WIDEST);
    *out = *a;
    outputs_make(out, s, XP_F64);
    for (int i = 0; i < OUTPUTS; i++) {
        for (int64_t n = 0; out_of(out, i)->data && n < xp_tensor_count(out_of(out, i)); n++)
            *slope_at(out_of(out, i), n) = 0.0;
    }
    for (int64_t t = 0; t < s->T; t++) {
        xp_widen_row(a->x.data, a->x.dtype, t * a->x.stride[0], s->H, p.x);
        xp_widen_row(a->dy.data, a->dy.dtype, t * a->dy.stride[0], s->H, p.dy);
        plain_route(&p, t);
        for (int64_t k = 0; k < s->K; k++)
            plain_expert(&p, t, k);
        plain_router_back(&p, t);
        if (s->S > 0)
            plain_shared(&p, t);
    }
}

/* ---- comparisons ---- */

static void run_moe(const xp_moe_args *a) {
    assert_int_equal(run_kernel(&xp_ref_moe, NULL, a), XP_OK);
}

static void moe_judge(const xp_moe_args *a, const shape *s, xp_moe_args *out) {
    *out = *a;
    outputs_make(out, s, XP_F64);
    assert_int_equal(run_unchecked(&xp_ref_moe, NULL, out), XP_OK);
}

static int64_t rows_in(const xp_tensor *t) {
    return t->ndim == 3 ? t->dim[0] * t->dim[1] : t->dim[0];
}

static verdict against(xp_moe_args *got, xp_moe_args *judge, const xp_tensor *tol, int i) {
    return compare(out_of(got, i), out_of(judge, i), tol, rows_in(out_of(judge, i)));
}

static xp_tensor like(const xp_tensor *t) {
    return t->ndim == 3 ? cube(XP_F64, t->dim[0], t->dim[1], t->dim[2]) : matrix(XP_F64, t->dim[0], t->dim[1]);
}

static const shape shapes[] = {
    {70, 8, 3, 40, 12, 0, "hf-5.24/qwen3_moe", XP_F64},
    {70, 8, 3, 40, 12, 0, "hf-5.24/qwen3_moe-raw", XP_F64},
    {66, 6, 2, 33, 9, 11, "hf-5.24/qwen2_moe", XP_F64},
    {5, 32, 8, 24, 5, 7, "hf-5.24/qwen2_moe-renorm", XP_F64},
    {9, 4, 4, 17, 6, 3, "hf-5.24/mixtral", XP_F64},
    {12, 5, 1, 96, 60, 0, "hf-5.24/qwen3_moe", XP_F64},
    {70, 8, 3, 40, 12, 9, "hf-5.24/qwen2_moe-renorm", XP_F32},
    {40, 9, 2, 64, 20, 0, "hf-5.24/qwen3_moe-raw", XP_F32},
};

/* Every output is within its bound of the plain layer, in f64 and in f32 arithmetic. */
static void layer_agrees(void **state) {
    (void)state;
    for (size_t c = 0; c < sizeof shapes / sizeof *shapes; c++) {
        const shape *s = &shapes[c];
        xp_moe_args a = moe_make(s, c), judge, exact, narrow;
        run_moe(&a);
        moe_judge(&a, s, &judge);
        plain_layer(&a, s, (way){0, 0}, RIGHT, &exact);
        plain_layer(&a, s, (way){s->d == XP_F32, 0}, RIGHT, &narrow);
        for (int i = 0; i < OUTPUTS; i++) {
            if (!out_of(&a, i)->data)
                continue;
            xp_tensor tol = like(out_of(&judge, i));
            assert_int_equal(bound_of(&xp_stage_moe, NULL, &a, outputs[i], out_of(&judge, i), &tol), XP_OK);
            const verdict own = against(&a, &judge, &tol, i), e = against(&exact, &judge, &tol, i);
            const verdict n = against(&narrow, &judge, &tol, i);
            print_message("moe %zu %s %-6s err/bound: rounded %.5f, plain %.5f, plain in op %.5f of %lld\n", c,
                          xp_dtype_name(s->d), outputs[i], own.most, e.most, n.most, (long long)own.n);
            assert_true(own.over == 0 && e.over == 0 && n.over == 0);
            /* one weight of one renormalised slot is 1 whatever the router says: no gradient, no error */
            assert_true(e.most > 0.0 || (s->K == 1 && strcmp(outputs[i], "dwr") == 0));
        }
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* The bound is tight enough to see each mistake in the outputs that it touches, nearly everywhere, also in f32. */
static void mistakes_are_seen(void **state) {
    static const struct {
        mistake wrong;
        const char *at[4];
    } row[] = {{FIXED_SUM, {"dx", "dwr"}},
               {SLOTS_SWAPPED, {"y", "dx", "dw1", "dw2"}},
               {ROUTER_DROPPED, {"dx"}},
               {SHARED_DROPPED, {"dx"}}};
    (void)state;
    for (int d = 0; d < 2; d++) {
        const shape s = {30, 6, 2, 40, 12, 9, "hf-5.24/qwen2_moe-renorm", d ? XP_F32 : XP_F64};
        for (size_t r = 0; r < sizeof row / sizeof *row; r++) {
            xp_moe_args a = moe_make(&s, 50 + r), judge, wrong;
            moe_judge(&a, &s, &judge);
            plain_layer(&a, &s, (way){0, 0}, row[r].wrong, &wrong);
            for (int j = 0; j < 4 && row[r].at[j]; j++) {
                for (int i = 0; i < OUTPUTS; i++) {
                    if (strcmp(outputs[i], row[r].at[j]) != 0)
                        continue;
                    xp_tensor tol = like(out_of(&judge, i));
                    assert_int_equal(bound_of(&xp_stage_moe, NULL, &a, outputs[i], out_of(&judge, i), &tol), XP_OK);
                    const verdict v = against(&wrong, &judge, &tol, i);
                    if (10 * v.over < 9 * v.n)
                        fail_msg("mistake %d: %s is wrong in %lld of %lld", (int)row[r].wrong, outputs[i],
                                 (long long)v.over, (long long)v.n);
                }
            }
            assert_int_equal(pool_close(), XP_OK);
        }
    }
}

/* An f32 sum that drops 127 terms of nearly half a last place, all of one sign, moves expert 0's logit by 0.03: the
 * worst that gamma allows. The bound must cover what follows from it, and it is hardly larger. */
static void worst_logit_is_covered(void **state) {
    static const char *const dialect[] = {"hf-5.24/qwen3_moe", "hf-5.24/qwen3_moe-raw"};
    (void)state;
    for (int d = 0; d < 2; d++) {
        const shape s = {3, 4, 2, 128, 5, 0, dialect[d], XP_F32};
        xp_moe_args a = moe_make(&s, 70), judge, narrow;
        for (int64_t h = 0; h < s.H; h++) {
            for (int64_t t = 0; t < s.T; t++) {
                set(&a.x, t, h, h ? 0.98 * 0x1p-12 : 4096.0);
                set(&a.idx, t, 0, 0.0);
                set(&a.idx, t, 1, (double)(t + 1));
            }
            for (int64_t e = 0; e < s.E; e++)
                set(&a.wr, e, h, h == 0 || e == 0 ? 1.0 : 0.0);
        }
        for (int64_t e = 0; e < s.E; e++) {
            for (int64_t j = 0; j < 2 * s.F; j++)
                *(float *)xp_tensor_at(&a.w1, e, j, 0, 0) = 0.0F; /* the large element is the router's alone */
        }
        moe_judge(&a, &s, &judge);
        plain_layer(&a, &s, (way){1, 0}, RIGHT, &narrow);
        for (int i = 0; i < 5; i++) {
            xp_tensor tol = like(out_of(&judge, i));
            assert_int_equal(bound_of(&xp_stage_moe, NULL, &a, outputs[i], out_of(&judge, i), &tol), XP_OK);
            const verdict v = against(&narrow, &judge, &tol, i);
            print_message("moe worst logit, %s %s err/bound %.3f\n", dialect[d], outputs[i], v.most);
            assert_true(v.over == 0);
            assert_true(i > 0 || v.most > 0.2);
        }
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* ---- gradients ---- */

typedef struct {
    xp_moe_args *a;
    xp_exec x;
    void *bound_ws;
    xp_tensor tol;
} objective;

static double objective_value(void *ctx, double *out_err) {
    objective *o = ctx;
    const int at = xp_stage_operand(&xp_stage_moe, "y");
    assert_int_equal(xp_ref_moe.run(&o->x, o->a), XP_OK);
    assert_int_equal(xp_stage_moe.bound(o->a, NULL, at, &o->a->y, o->bound_ws, &o->tol), XP_OK);
    return weighted(&o->a->dy, &o->a->y, &o->tol, out_err);
}

static void layer_slopes(void **state) {
    static const shape some[] = {{4, 5, 2, 6, 3, 4, "hf-5.24/qwen2_moe", XP_F64},
                                 {4, 5, 3, 6, 3, 4, "hf-5.24/qwen2_moe-renorm", XP_F64},
                                 {4, 6, 2, 7, 2, 0, "hf-5.24/mixtral", XP_F64}};
    (void)state;
    for (size_t c = 0; c < sizeof some / sizeof *some; c++) {
        const shape *s = &some[c];
        xp_moe_args a = moe_make(s, 20 + c), grad = a;
        const objective o = {&a, slope_exec(&xp_ref_moe, NULL, &a), take(xp_stage_moe.bound_workspace(&a, NULL)),
                             matrix(XP_F64, s->T, s->H)};
        objective copy = o;
        outputs_make(&grad, s, XP_F64); /* a's own outputs move with the objective */
        run_moe(&grad);
        slope_expect("x", &a.x, &grad.dx, 1, objective_value, &copy);
        slope_expect("wr", &a.wr, &grad.dwr, 2, objective_value, &copy);
        slope_expect("w1", &a.w1, &grad.dw1, 3, objective_value, &copy);
        slope_expect("w2", &a.w2, &grad.dw2, 4, objective_value, &copy);
        if (s->S > 0) {
            slope_expect("sw1", &a.sw1, &grad.dsw1, 5, objective_value, &copy);
            slope_expect("sw2", &a.sw2, &grad.dsw2, 6, objective_value, &copy);
        }
        if (a.sgate.data)
            slope_expect("sgate", &a.sgate, &grad.dsgate, 7, objective_value, &copy);
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* ---- edges ---- */

/* A token may name an expert twice, an expert may have no token, a batch may be empty. */
static void layer_edges(void **state) {
    const shape s = {6, 4, 2, 5, 3, 0, "hf-5.24/qwen3_moe", XP_F64},
                none = {0, 4, 2, 5, 3, 2, "hf-5.24/qwen2_moe", XP_F64};
    (void)state;
    xp_moe_args a = moe_make(&s, 31), judge, plain_out;
    for (int64_t t = 0; t < s.T; t++) {
        for (int64_t k = 0; k < s.K; k++)
            set(&a.idx, t, k, (double)(t % 2 ? 3 * k : 3)); /* nobody takes experts 1 and 2 */
    }
    run_moe(&a);
    moe_judge(&a, &s, &judge);
    plain_layer(&a, &s, (way){0, 0}, RIGHT, &plain_out);
    for (int i = 0; i < 5; i++) {
        xp_tensor tol = like(out_of(&judge, i));
        assert_int_equal(bound_of(&xp_stage_moe, NULL, &a, outputs[i], out_of(&judge, i), &tol), XP_OK);
        assert_true(against(&plain_out, &judge, &tol, i).over == 0);
        assert_true(i > 1 || untouched(out_of(&a, i), s.T));
    }
    for (int64_t j = 0; j < 2 * s.F; j++)
        assert_true(*cell(&a.dw1, 1, j, 0) == 0.0 && *cell(&a.dw1, 2, j, 4) == 0.0 && *cell(&a.dw1, 3, j, 0) != 0.0);
    xp_moe_args empty = moe_make(&none, 32);
    run_moe(&empty);
    for (int i = 2; i < OUTPUTS; i++) {
        for (int64_t n = 0; n < xp_tensor_count(out_of(&empty, i)); n++)
            assert_true(value(out_of(&empty, i), n) == 0.0);
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* The choice is the K largest logits in order, and follows the row wherever it lies. */
static void fill_chooses(void **state) {
    const shape s = {9, 7, 3, 5, 2, 0, "hf-5.24/qwen3_moe", XP_F64};
    (void)state;
    xp_moe_args a = moe_make(&s, 40), b = a;
    for (int64_t t = 0; t < s.T; t++) {
        double before = HUGE_VAL;
        int taken[7] = {0};
        for (int64_t k = 0; k < s.K; k++) {
            double l = 0.0;
            for (int64_t h = 0; h < s.H; h++)
                l += get(&a.x, t, h) * get(&a.wr, get_i32(&a.idx, t, k), h);
            assert_true(l <= before && !taken[get_i32(&a.idx, t, k)]++);
            before = l;
        }
        for (int64_t e = 0; e < s.E; e++) {
            double l = 0.0;
            for (int64_t h = 0; h < s.H; h++)
                l += get(&a.x, t, h) * get(&a.wr, e, h);
            assert_true(taken[e] || l <= before);
        }
    }
    b.x = xp_tensor_rows(&a.x, 0, 4, 9);
    b.idx = matrix(XP_I32, 5, s.K);
    assert_int_equal(xp_stage_moe.fill(&b, NULL, "ties", 1), XP_OK);
    for (int64_t t = 0; t < 5; t++)
        assert_int_equal(get_i32(&b.idx, t, 2), get_i32(&a.idx, t + 4, 2));
    const double w = get(&a.wr, 3, 2);
    assert_int_equal(xp_stage_moe.fill(&a, NULL, "real", 1), XP_OK);
    assert_true(get(&a.wr, 3, 2) == 0.5 * w); /* 1/sqrt(5) */
    assert_int_equal(pool_close(), XP_OK);
}

/* Extremes are cut to what keeps the block finite; the outputs still agree with the plain layer. */
static void fill_tames(void **state) {
    static const double wild[] = {(double)NAN, -HUGE_VAL, 0x1.8p100, -0x1p-140, -0.0, 0x1p-149};
    static const double tamed[] = {0x1p8, -0x1p8, 0x1.8p7, -0x1p-140, -0.0, 0x1p-149};
    const shape s = {6, 4, 2, 8, 3, 2, "hf-5.24/qwen2_moe", XP_F32};
    (void)state;
    xp_moe_args a = moe_make(&s, 41), judge, plain_out;
    for (int64_t i = 0; i < 6; i++) {
        set(&a.x, i, i, wild[i]);
        set(&a.wr, 1, i, wild[i]);
        set(&a.sgate, 0, i, wild[i]);
        *(float *)xp_tensor_at(&a.w1, 2, i, 3, 0) = (float)wild[i];
    }
    assert_int_equal(xp_stage_moe.fill(&a, NULL, "extreme", 1), XP_OK);
    for (int64_t i = 0; i < 6; i++)
        assert_true(get(&a.x, i, i) == tamed[i] && get(&a.wr, 1, i) == tamed[i]);
    assert_true(signbit(get(&a.x, 4, 4)) != 0);
    run_moe(&a);
    moe_judge(&a, &s, &judge);
    plain_layer(&a, &s, (way){0, 0}, RIGHT, &plain_out);
    for (int i = 0; i < OUTPUTS; i++) {
        xp_tensor tol = like(out_of(&judge, i));
        assert_int_equal(bound_of(&xp_stage_moe, NULL, &a, outputs[i], out_of(&judge, i), &tol), XP_OK);
        assert_true(against(&plain_out, &judge, &tol, i).over == 0 && against(&a, &judge, &tol, i).over == 0);
        assert_true(isfinite(value(&tol, 0)));
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- refusals ---- */

static xp_dialect changed;
#define RECORD(name, field, value_) \
    SPOIL(name, xp_moe_args, changed = *a->dialect; changed.field = value_; a->dialect = &changed)

RECORD(no_eps, renorm, XP_RENORM_MAX_EPS)
RECORD(odd_groups, group_reduce = XP_GROUP_MAX; changed.n_group, 3)
RECORD(no_rbias, router_bias, 1)
RECORD(no_b1, expert_bias, 1)
RECORD(no_scale_e, expert_scale, 1)
RECORD(no_bias, select_bias = changed.masked_weight, 1)
RECORD(nulls, null_experts, 2)
RECORD(parts, shared_rows, 3)
RECORD(rows, shared_gate = 0; a->sgate.data = a->dsgate.data = NULL; changed.shared_rows, 2)
RECORD(other_gate, shared_gate, 0)
RECORD(no_up, gated, 0)
SPOIL(low_sw1, xp_moe_args, a->sw1.dim[0] = a->dsw1.dim[0] = 2)
SPOIL(no_record, xp_moe_args, a->dialect = NULL)
SPOIL(no_sw2, xp_moe_args, a->sw2.data = NULL)
SPOIL(no_dsw1, xp_moe_args, a->dsw1.data = NULL)
SPOIL(no_gate, xp_moe_args, a->sgate.data = NULL)
SPOIL(no_shared, xp_moe_args, a->sw1.data = NULL)
SPOIL(mixed, xp_moe_args, a->w1.dtype = XP_F32)
SPOIL(narrow_dtype, xp_moe_args, a->x.dtype = XP_BF16)
SPOIL(wide_idx, xp_moe_args, a->idx.dim[1] = 5)
SPOIL(far_idx, xp_moe_args, set(&a->idx, 1, 1, 4))
static const refusal table[] = {
    {no_eps, "renorm_eps: 0 is out of range"},
    {odd_groups, "n_group: 3, expected a divisor of the 4 experts"},
    {no_rbias, "moe: rbias is absent, expected it"},
    {no_b1, "moe: b1 is absent, expected it"},
    {no_scale_e, "moe: scale_e is absent, expected it"},
    {no_bias, "moe: bias is absent, expected it"},
    {nulls, "moe: wr dim 0 is 4, expected E + null_experts = 6"},
    {parts, "moe: S is 2, expected a multiple of the dialect's shared_rows 3"},
    {rows, "moe: wr dim 0 is 4, expected E + shared_rows = 6"},
    {other_gate, "sgate is present, expected none: dialect hf-5.24/qwen2_moe"},
    {no_up, "moe: w1 has 6 rows, expected F = 3: dialect hf-5.24/qwen2_moe has gated 0"},
    {low_sw1, "moe: sw1 has 2 rows, expected 2 S = 4"},
    {no_record, "dialect is absent"},
    {no_sw2, "sw2 is absent, expected it"},
    {no_dsw1, "dsw1 is absent, expected it"},
    {no_gate, "sgate is absent, expected it"},
    {no_shared, "sw2 is present, expected none"},
    {mixed, "w1 has dtype f32, expected f64, as x has"},
    {narrow_dtype, "dy has dtype f64, expected bf16, as x has"},
    {wide_idx, "idx dim 1 is 5, expected 1 to E = 4"},
    {far_idx, "idx[1][1] is 4, expected 0 to E-1 = 3"},
};

static void layer_refusals(void **state) {
    const shape s = {3, 4, 2, 5, 3, 2, "hf-5.24/qwen2_moe", XP_F64};
    const xp_mesh m = lone_mesh(1);
    (void)state;
    const xp_moe_args a = moe_make(&s, 60);
    REFUSE(xp_stage_moe, m, a, table);
    xp_cost c;
    xp_stage_moe.cost(&a, &m, &c);
    assert_true(c.flop == 18.0 * 3 * 5 * (2 * 3 + 2) + 6.0 * 3 * 5 * 4 && c.net_bytes == 0.0);
    xp_moe_args ungated = a; /* without a gate an expert has two matrices of width F, not three */
    ungated.w1.dim[1] = 3;
    ungated.sw1.dim[0] = 2;
    xp_stage_moe.cost(&ungated, &m, &c);
    assert_true(c.flop == 12.0 * 3 * 5 * (2 * 3 + 2) + 6.0 * 3 * 5 * 4);
    assert_int_equal(pool_close(), XP_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layer_agrees), cmocka_unit_test(mistakes_are_seen), cmocka_unit_test(worst_logit_is_covered),
        cmocka_unit_test(layer_slopes), cmocka_unit_test(layer_edges),       cmocka_unit_test(fill_chooses),
        cmocka_unit_test(fill_tames),   cmocka_unit_test(layer_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
