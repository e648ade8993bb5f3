/* Tests of the flat-parameter stages: cast, gradnorm, clip, adamw, sgd. MPFR is the judge of the reference; an f32
 * implementation in torch's order of operations, and wrong optimizers, are judged by the stages' own bounds. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <mpfr.h>

#include "num.h"
#include "ref.h"
#include "xp/adamw.h"
#include "xp/cast.h"
#include "xp/clip.h"
#include "xp/gradnorm.h"
#include "xp/sgd.h"

static uint64_t rng_state;

static uint64_t rng(void) { /* splitmix64 */
    uint64_t z = (rng_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static double uniform(double lo, double hi) {
    return lo + (hi - lo) * ((double)(rng() >> 11) * 0x1p-53);
}

static uint32_t f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float f32_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* ---- a mesh of one thread: ranks run one after another, twice; the first pass only collects ---- */

enum { MAX_WORDS = 64 };
typedef struct {
    int pass, calls, count;
    xp_redop op;
    uint64_t total[MAX_WORDS];
} meeting;

static xp_status meet(xp_comm *c, xp_queue *q, xp_tensor *buf, xp_redop op) {
    meeting *t = c->self;
    uint64_t *w = buf->data;
    (void)q;
    assert_int_equal(buf->dtype, XP_U64);
    assert_true(buf->dim[0] <= MAX_WORDS);
    if (t->pass == 0 && t->calls == 0) {
        t->op = op;
        t->count = (int)buf->dim[0];
        memset(t->total, 0, sizeof t->total);
    }
    assert_true(t->op == op && t->count == buf->dim[0]); /* all ranks join alike */
    t->calls++;
    for (int i = 0; i < t->count; i++) {
        if (t->pass)
            w[i] = t->total[i];
        else if (op == XP_SUM)
            t->total[i] += w[i];
        else if (w[i] > t->total[i])
            t->total[i] = w[i];
    }
    return XP_OK;
}

static const xp_mesh_ops meet_ops = {.abi = XP_ABI, .size = sizeof(xp_mesh_ops), .name = "meet", .all_reduce = meet};

typedef struct {
    xp_comm comm[XP_NAXIS];
    xp_mesh mesh;
    xp_exec exec;
} seat;

static void seat_open(seat *s, meeting *t, int rank, int size) {
    memset(s, 0, sizeof *s);
    for (int a = 0; a < XP_NAXIS; a++) {
        s->comm[a] = (xp_comm){&meet_ops, 0, 1, t};
        s->mesh.axis[a] = &s->comm[a];
    }
    s->comm[XP_WORLD].rank = rank;
    s->comm[XP_WORLD].size = size;
    s->exec.mesh = &s->mesh;
}

static void run_ok(const xp_kernel *k, const void *args) {
    meeting t = {0};
    seat s;
    seat_open(&s, &t, 0, 1);
    const xp_status st = k->stage->check(args, &s.mesh);
    if (st != XP_OK)
        fail_msg("%s: %s", k->stage->name, xp_error_text());
    assert_int_equal(k->run(&s.exec, args), XP_OK);
}

static void expect_refused(const xp_stage *stage, const void *args, const char *word) {
    meeting t = {0};
    seat s;
    seat_open(&s, &t, 0, 1);
    assert_int_equal(stage->check(args, &s.mesh), XP_E_ARG);
    if (!strstr(xp_error_text(), word))
        fail_msg("\"%s\" does not name \"%s\"", xp_error_text(), word);
}

/* ---- gradnorm ---- */

static float norm_by_mpfr(double p, const float *g, int n) {
    mpfr_t sum, term, out;
    mpfr_init2(sum, 700);
    mpfr_init2(term, 64);
    mpfr_init2(out, 24);
    mpfr_set_zero(sum, 1);
    float top = 0.0f;
    int nan = 0, inf = 0;
    for (int i = 0; i < n; i++) {
        nan |= isnan(g[i]) != 0;
        inf |= isinf(g[i]) != 0;
        if (!isfinite(g[i]))
            continue;
        top = fmaxf(top, fabsf(g[i]));
        mpfr_set_flt(term, fabsf(g[i]), MPFR_RNDN);
        if (p == 2.0)
            mpfr_sqr(term, term, MPFR_RNDN);
        assert_int_equal(mpfr_add(sum, sum, term, MPFR_RNDN), 0);
    }
    const mpfr_exp_t emin = mpfr_get_emin(), emax = mpfr_get_emax();
    mpfr_set_emin(-148); /* f32's range, subnormals by mpfr_subnormalize */
    mpfr_set_emax(128);
    int t = p == 2.0 ? mpfr_sqrt(out, sum, MPFR_RNDN) : mpfr_set(out, sum, MPFR_RNDN);
    t = mpfr_check_range(out, t, MPFR_RNDN);
    mpfr_subnormalize(out, t, MPFR_RNDN);
    const float y = isinf(p) ? top : mpfr_get_flt(out, MPFR_RNDN);
    mpfr_set_emin(emin);
    mpfr_set_emax(emax);
    mpfr_clears(sum, term, out, (mpfr_ptr)0);
    return nan ? NAN : inf ? INFINITY : y;
}

enum { RANKS = 8, PARTS = 6, PART = 40, ROOM = PARTS * PART };
typedef struct {
    float grad[ROOM];
    int64_t seg[PARTS + 1];
    uint8_t owner[PARTS];
    float norm;
    xp_gradnorm_args args;
} norm_rank;

/* Places parameter part (n values) on the ranks: sharded over all, with empty shards, or whole on some, one owner. */
static void place(norm_rank *r, int ranks, int part, const float *g, int n) {
    const int replicated = (int)(rng() % 3) == 0, owner = (int)(rng() % (uint64_t)ranks);
    int at = 0;
    for (int k = 0; k < ranks; k++) {
        const int64_t base = r[k].seg[part];
        int take = k == ranks - 1 ? n - at : (int)(rng() % (uint64_t)(n - at + 1));
        if (replicated)
            take = k == owner || (rng() & 1) ? n : 0;
        memcpy(r[k].grad + base, replicated ? g : g + at, (size_t)take * sizeof *g);
        at += replicated ? 0 : take;
        r[k].owner[part] = !replicated || k == owner;
        r[k].seg[part + 1] = base + take;
    }
}

static float logical_value(int kind) {
    const double sign = (rng() & 1) ? -1.0 : 1.0;
    switch (kind) {
    case 0:
        return (float)(sign * uniform(0.0, 1.0));
    case 1:
        return f32_of((uint32_t)rng() & 0x807FFFFFu);
    case 2:
        return (float)(sign * 1e20 * uniform(0.5, 2.0));
    case 3:
        return (float)(sign * 1e-30 * uniform(0.5, 2.0));
    default:
        return (float)(sign * ldexp(1.0, (int)(rng() % 40) - 20));
    }
}

static void test_gradnorm(void **state) {
    (void)state;
    static norm_rank r[RANKS];
    rng_state = 3;
    int bad = 0;
    for (int round = 0; round < 2000; round++) {
        const int ranks = 1 + (int)(rng() % RANKS), parts = (int)(rng() % (PARTS + 1));
        const double p = round % 3 == 0 ? 1.0 : round % 3 == 1 ? 2.0 : (double)INFINITY;
        float logical[ROOM];
        int n = 0;
        for (int k = 0; k < ranks; k++)
            memset(&r[k], 0, sizeof r[k]);
        for (int part = 0; part < parts; part++) {
            const int len = (int)(rng() % PART), kind = (int)(rng() % 5);
            for (int i = 0; i < len; i++)
                logical[n + i] = logical_value(kind);
            if (len && round % 16 == 0)
                logical[n + len / 2] = (rng() & 1) ? NAN : INFINITY;
            place(r, ranks, part, logical + n, len);
            n += len;
        }
        meeting t = {0};
        const float want = norm_by_mpfr(p, logical, n);
        bad += !isfinite(want);
        for (t.pass = 0; t.pass < 2; t.pass++) {
            t.calls = 0;
            for (int k = 0; k < ranks; k++) {
                seat s;
                seat_open(&s, &t, k, ranks);
                r[k].args = (xp_gradnorm_args){
                    .grad = xp_tensor_1d(r[k].grad, XP_F32, r[k].seg[parts]),
                    .seg = xp_tensor_1d(r[k].seg, XP_I64, parts + 1),
                    .owner = xp_tensor_1d(r[k].owner, XP_U8, parts),
                    .norm = xp_tensor_1d(&r[k].norm, XP_F32, 1),
                    .p = p,
                };
                assert_int_equal(xp_stage_gradnorm.check(&r[k].args, &s.mesh), XP_OK);
                assert_int_equal(xp_ref_gradnorm.run(&s.exec, &r[k].args), XP_OK);
            }
            assert_int_equal(t.calls, ranks); /* a rank with nothing to add joins too */
        }
        for (int k = 0; k < ranks; k++) {
            double residual = -1.0;
            if (f32_bits(r[k].norm) != f32_bits(want) && !(isnan(want) && isnan(r[k].norm)))
                fail_msg("round %d rank %d of %d, p %g: %a, MPFR says %a", round, k, ranks, p, (double)r[k].norm,
                         (double)want);
            assert_int_equal(xp_stage_gradnorm.property[0].residual(&r[k].args, NULL, &residual), XP_OK);
            assert_true(residual <= 1.0);
        }
    }
    assert_true(bad > 60);
}

static void test_gradnorm_refuses(void **state) {
    (void)state;
    float g[4] = {3, -4, 0, 1}, norm = 0;
    int64_t seg[3] = {0, 2, 4};
    uint8_t owner[2] = {1, 0};
    double residual = 0.0;
    xp_gradnorm_args a = {
        .grad = xp_tensor_1d(g, XP_F32, 4),
        .seg = xp_tensor_1d(seg, XP_I64, 3),
        .owner = xp_tensor_1d(owner, XP_U8, 2),
        .norm = xp_tensor_1d(&norm, XP_F32, 1),
        .p = 2.0,
    };
    run_ok(&xp_ref_gradnorm, &a); /* one rank: the first pass keeps its own words */
    assert_true(norm == 5.0f);
    norm = 3.9f;
    assert_int_equal(xp_stage_gradnorm.property[0].residual(&a, NULL, &residual), XP_OK);
    assert_true(isinf(residual));
    g[0] = NAN;
    norm = 9.0f; /* a maximum of values that dropped the NaN */
    assert_int_equal(xp_stage_gradnorm.property[0].residual(&a, NULL, &residual), XP_OK);
    assert_true(isinf(residual));
    a.p = -3.0;
    expect_refused(&xp_stage_gradnorm, &a, "p is -3");
    a.p = (double)NAN;
    expect_refused(&xp_stage_gradnorm, &a, "p is");
    a.p = 1.0;
    seg[1] = 5;
    expect_refused(&xp_stage_gradnorm, &a, "seg[2] is 4");
    seg[1] = 2, seg[2] = 3;
    expect_refused(&xp_stage_gradnorm, &a, "seg[2] is 3");
    seg[2] = 4, seg[0] = 1;
    expect_refused(&xp_stage_gradnorm, &a, "seg[0] is 1");
    seg[0] = 0, owner[1] = 2;
    expect_refused(&xp_stage_gradnorm, &a, "owner[1] is 2");
    owner[1] = 1;
    a.owner.dim[0] = 1;
    expect_refused(&xp_stage_gradnorm, &a, "owner");
    a.owner.dim[0] = 2;
    a.grad.dtype = XP_E4M3;
    expect_refused(&xp_stage_gradnorm, &a, "grad");
}

/* ---- clip ---- */

/* One f32 operation by MPFR. */
static float f32_op(char op, float a, float b) {
    mpfr_t x, y, z;
    mpfr_inits2(24, x, y, z, (mpfr_ptr)0);
    mpfr_set_flt(x, a, MPFR_RNDN);
    mpfr_set_flt(y, b, MPFR_RNDN);
    const mpfr_exp_t emin = mpfr_get_emin(), emax = mpfr_get_emax();
    mpfr_set_emin(-148);
    mpfr_set_emax(128);
    int t = op == '+'   ? mpfr_add(z, x, y, MPFR_RNDN)
            : op == '/' ? mpfr_div(z, x, y, MPFR_RNDN)
                        : mpfr_mul(z, x, y, MPFR_RNDN);
    t = mpfr_check_range(z, t, MPFR_RNDN);
    mpfr_subnormalize(z, t, MPFR_RNDN);
    const float r = mpfr_get_flt(z, MPFR_RNDN);
    mpfr_set_emin(emin);
    mpfr_set_emax(emax);
    mpfr_clears(x, y, z, (mpfr_ptr)0);
    return r;
}

static void test_clip(void **state) {
    (void)state;
    enum { N = 33 };
    rng_state = 17;
    int clipped = 0, untouched = 0;
    for (int round = 0; round < 3000; round++) {
        float g[N], old[N], norm = (float)ldexp(uniform(0.5, 1.0), (int)(rng() % 24) - 12), coef = -1;
        for (int i = 0; i < N; i++)
            g[i] = round & 1 ? f32_of((uint32_t)rng()) : (float)uniform(-2.0, 2.0);
        if (round % 7 == 0)
            norm = 1.0f; /* exactly at the threshold: eps decides */
        memcpy(old, g, sizeof g);
        xp_clip_args a = {
            .grad = xp_tensor_1d(g, XP_F32, N),
            .norm = xp_tensor_1d(&norm, XP_F32, 1),
            .coef = xp_tensor_1d(&coef, XP_F32, 1),
            .max_norm = round % 5 == 0 ? 0.25f : 1.0f,
            .eps = round % 3 == 0 ? 0.0f : 1e-6f,
        };
        run_ok(&xp_ref_clip, &a);
        const float q = f32_op('/', a.max_norm, f32_op('+', norm, a.eps)), c = q < 1.0f ? q : 1.0f;
        assert_int_equal(f32_bits(coef), f32_bits(c));
        for (int i = 0; i < N; i++) {
            const float want = c == 1.0f ? old[i] : f32_op('*', old[i], c);
            if (c == 1.0f || want == want)
                assert_int_equal(f32_bits(g[i]), f32_bits(want));
            else
                assert_true(g[i] != g[i]);
        }
        double residual = -1.0;
        assert_int_equal(xp_stage_clip.property[0].residual(&a, NULL, &residual), XP_OK);
        assert_true(residual >= 0.0 && residual <= 1.0);
        coef = nextafterf(nextafterf(coef, 2.0f), 2.0f);
        assert_int_equal(xp_stage_clip.property[0].residual(&a, NULL, &residual), XP_OK);
        if (a.eps == 0.0f)
            assert_true(residual > 1.0 || c == 1.0f);
        clipped += c < 1.0f;
        untouched += c == 1.0f;
    }
    assert_true(clipped > 500 && untouched > 500);
}

static void test_clip_edges(void **state) {
    (void)state;
    const uint32_t bits[5] = {0x7F800001u, 0xFFC12345u, 0x80000000u, 0x00000001u, 0x7F7FFFFFu};
    float g[5], norm = 1.0f, coef = -1;
    xp_clip_args a = {
        .grad = xp_tensor_1d(g, XP_F32, 5),
        .norm = xp_tensor_1d(&norm, XP_F32, 1),
        .coef = xp_tensor_1d(&coef, XP_F32, 1),
        .max_norm = 2.0f,
        .eps = 1e-6f,
    };
    memcpy(g, bits, sizeof g);
    run_ok(&xp_ref_clip, &a); /* c = 1: not even a signalling NaN changes */
    assert_true(coef == 1.0f && memcmp(g, bits, sizeof g) == 0);
    const float odd[] = {NAN, INFINITY};
    for (int i = 0; i < 2; i++) {
        double residual = -1.0;
        norm = odd[i];
        run_ok(&xp_ref_clip, &a);
        assert_true(coef != coef && memcmp(g, bits, sizeof g) == 0);
        assert_int_equal(xp_stage_clip.property[0].residual(&a, NULL, &residual), XP_OK);
        assert_true(residual == 0.0);
        coef = 0.0f; /* an overflowed norm that silently zeroes everything */
        assert_int_equal(xp_stage_clip.property[0].residual(&a, NULL, &residual), XP_OK);
        assert_true(isinf(residual));
    }
    norm = 0.0f;
    a.eps = 0.0f;
    run_ok(&xp_ref_clip, &a);
    assert_true(coef == 1.0f);
    a.max_norm = 0.0f;
    run_ok(&xp_ref_clip, &a); /* 0/0 */
    assert_true(coef == 1.0f && memcmp(g, bits, sizeof g) == 0);
    norm = 3.0f;
    run_ok(&xp_ref_clip, &a);
    assert_true(coef == 0.0f && g[4] == 0.0f && f32_bits(g[2]) == 0x80000000u && isnan(g[0]));
    norm = 32.0f, a.max_norm = 1.0f, a.eps = 1e-6f;
    run_ok(&xp_ref_clip, &a); /* 1e-6 is absorbed from 32 on */
    assert_true(coef == 0.03125f);
    a.max_norm = -1.0f;
    expect_refused(&xp_stage_clip, &a, "max_norm is -1");
    a.max_norm = INFINITY;
    expect_refused(&xp_stage_clip, &a, "max_norm");
    a.max_norm = 1.0f, a.eps = NAN;
    expect_refused(&xp_stage_clip, &a, "eps");
    a.eps = 0.0f;
    xp_clip_args part = a;
    assert_int_equal(xp_stage_clip.extent(&a), 5);
    xp_stage_clip.slice(&a, 1, 3, &part);
    assert_true(part.grad.data == g + 1 && part.grad.dim[0] == 2 && part.norm.data == &norm);
}

/* ---- adamw ---- */

enum { ELEMENTS = 240, GROUPS = 4 };
typedef struct {
    float p[ELEMENTS], m[ELEMENTS], v[ELEMENTS], g[ELEMENTS];
    double wp[ELEMENTS], wm[ELEMENTS], wv[ELEMENTS]; /* the judge's f64 copies */
    double tol[ELEMENTS], ref[ELEMENTS];
    int64_t seg[GROUPS + 1];
    uint8_t decay[GROUPS];
} optim;

static int decayed(const optim *o, int i) {
    for (int q = 0; q < GROUPS; q++) {
        if (i >= o->seg[q] && i < o->seg[q + 1])
            return o->decay[q];
    }
    return -1;
}

static double gradient(int i) {
    switch (i % 6) {
    case 0:
        return 0.0;
    case 1:
        return ldexp(uniform(-1.0, 1.0), -120);
    case 2:
        return ldexp(uniform(-1.0, 1.0), 40);
    case 3:
        return ldexp(uniform(-1.0, 1.0), -30);
    default:
        return uniform(-1.0, 1.0);
    }
}

static void optim_open(optim *o) {
    static const int64_t seg[GROUPS + 1] = {0, 100, 100, 101, ELEMENTS};
    static const uint8_t decay[GROUPS] = {1, 0, 1, 0};
    memcpy(o->seg, seg, sizeof seg);
    memcpy(o->decay, decay, sizeof decay);
    for (int i = 0; i < ELEMENTS; i++) {
        o->p[i] = (float)uniform(-2.0, 2.0);
        o->m[i] = o->v[i] = 0.0f;
        o->g[i] = (float)gradient(i);
    }
}

static void widen(optim *o) {
    for (int i = 0; i < ELEMENTS; i++) {
        o->wp[i] = (double)o->p[i];
        o->wm[i] = (double)o->m[i];
        o->wv[i] = (double)o->v[i];
    }
}

static xp_adamw_args adamw_args(optim *o, int wide, int64_t step) {
    return (xp_adamw_args){
        .param = wide ? xp_tensor_1d(o->wp, XP_F64, ELEMENTS) : xp_tensor_1d(o->p, XP_F32, ELEMENTS),
        .m = wide ? xp_tensor_1d(o->wm, XP_F64, ELEMENTS) : xp_tensor_1d(o->m, XP_F32, ELEMENTS),
        .v = wide ? xp_tensor_1d(o->wv, XP_F64, ELEMENTS) : xp_tensor_1d(o->v, XP_F32, ELEMENTS),
        .grad = xp_tensor_1d(o->g, XP_F32, ELEMENTS),
        .seg = xp_tensor_1d(o->seg, XP_I64, GROUPS + 1),
        .decay = xp_tensor_1d(o->decay, XP_U8, GROUPS),
        .lr = 1e-3,
        .beta1 = 0.9,
        .beta2 = 0.999,
        .eps = 1e-8,
        .weight_decay = 0.1,
        .step = step,
    };
}

/* The three formulas in 200 bits. */
typedef struct {
    mpfr_t p, m, v, bias, t, u;
} exact;

static void exact_open(exact *x) {
    mpfr_inits2(200, x->p, x->m, x->v, x->bias, x->t, x->u, (mpfr_ptr)0);
}
static void exact_close(exact *x) {
    mpfr_clears(x->p, x->m, x->v, x->bias, x->t, x->u, (mpfr_ptr)0);
}

/* y = beta y + (1 - beta) u; t is scratch. */
static void exact_moment(exact *x, mpfr_t y, double beta) {
    mpfr_mul_d(y, y, beta, MPFR_RNDN);
    mpfr_set_d(x->t, beta, MPFR_RNDN);
    mpfr_d_sub(x->t, 1.0, x->t, MPFR_RNDN);
    mpfr_mul(x->t, x->t, x->u, MPFR_RNDN);
    mpfr_add(y, y, x->t, MPFR_RNDN);
}

static void exact_bias(exact *x, double beta, int64_t step) {
    mpfr_set_d(x->bias, beta, MPFR_RNDN);
    mpfr_pow_ui(x->bias, x->bias, (unsigned long)step, MPFR_RNDN);
    mpfr_d_sub(x->bias, 1.0, x->bias, MPFR_RNDN);
}

static void exact_adamw(exact *x, const xp_adamw_args *a, int decay, float p, float m, float v, float g) {
    mpfr_set_flt(x->m, m, MPFR_RNDN);
    mpfr_set_flt(x->v, v, MPFR_RNDN);
    mpfr_set_flt(x->u, g, MPFR_RNDN);
    exact_moment(x, x->m, a->beta1);
    mpfr_sqr(x->u, x->u, MPFR_RNDN);
    exact_moment(x, x->v, a->beta2);
    exact_bias(x, a->beta2, a->step);
    mpfr_div(x->u, x->v, x->bias, MPFR_RNDN);
    mpfr_sqrt(x->u, x->u, MPFR_RNDN);
    mpfr_add_d(x->u, x->u, a->eps, MPFR_RNDN);
    exact_bias(x, a->beta1, a->step);
    mpfr_div(x->t, x->m, x->bias, MPFR_RNDN);
    mpfr_mul_d(x->t, x->t, a->lr, MPFR_RNDN);
    mpfr_div(x->u, x->t, x->u, MPFR_RNDN);
    mpfr_set_d(x->p, a->lr, MPFR_RNDN);
    mpfr_mul_d(x->p, x->p, decay ? a->weight_decay : 0.0, MPFR_RNDN);
    mpfr_d_sub(x->p, 1.0, x->p, MPFR_RNDN);
    mpfr_mul_d(x->p, x->p, (double)p, MPFR_RNDN);
    mpfr_sub(x->p, x->p, x->u, MPFR_RNDN);
}

/* |got - exact| <= gauge * 24 * 2^-53, the double arithmetic that the bound grants. */
static void near(double got, mpfr_t want, double gauge, const char *what, int i) {
    mpfr_t d;
    mpfr_init2(d, 200);
    mpfr_sub_d(d, want, got, MPFR_RNDN);
    const double err = fabs(mpfr_get_d(d, MPFR_RNDN));
    mpfr_clear(d);
    if (!(err <= gauge * 24 * 0x1p-53 + 0x1p-1074))
        fail_msg("%s[%d]: %a, off by %g of a gauge of %g", what, i, got, err, gauge);
}

/* The reference against MPFR on its own state, step after step, in f64; then in f32 it must be that value rounded. */
static void test_adamw(void **state) {
    (void)state;
    static optim o, old;
    exact x;
    exact_open(&x);
    rng_state = 41;
    static const int64_t start[] = {1, 2000000, 1};
    for (int s = 0; s < 3; s++) {
        optim_open(&o);
        for (int64_t step = start[s]; step < start[s] + 12; step++) {
            for (int i = 0; i < ELEMENTS; i++)
                o.g[i] = (float)gradient(i);
            if (s == 2) /* nothing but the update, whose correction is close to 0 */
                memset(o.p, 0, sizeof o.p);
            xp_adamw_args a = adamw_args(&o, 1, step);
            if (s == 1)
                a.beta1 = 0.0, a.beta2 = 0.95, a.weight_decay = 0.0;
            if (s == 2)
                a.beta1 = 1.0 - 0x1p-30, a.beta2 = 0.99999;
            old = o;
            widen(&o);
            run_ok(&xp_ref_adamw, &a);
            xp_adamw_args b = adamw_args(&o, 0, step);
            b.beta1 = a.beta1, b.beta2 = a.beta2, b.weight_decay = a.weight_decay;
            run_ok(&xp_ref_adamw, &b);
            for (int i = 0; i < ELEMENTS; i++) {
                exact_adamw(&x, &a, decayed(&o, i), old.p[i], old.m[i], old.v[i], old.g[i]);
                const double gm = fabs((double)old.m[i]) + fabs((double)old.g[i]);
                const double update = fabs(mpfr_get_d(x.u, MPFR_RNDN)), m = fabs(mpfr_get_d(x.m, MPFR_RNDN));
                /* a cancelled m' carries its absolute error into the update */
                const double grown = m > 0.0 ? update * (1.0 + gm / m) : 0.0;
                near(o.wm[i], x.m, gm, "m", i);
                near(o.wv[i], x.v, mpfr_get_d(x.v, MPFR_RNDN), "v", i);
                near(o.wp[i], x.p, fabs((double)old.p[i]) + grown, "p", i);
                assert_int_equal(f32_bits(o.p[i]), f32_bits((float)o.wp[i]));
                assert_int_equal(f32_bits(o.m[i]), f32_bits((float)o.wm[i]));
                assert_int_equal(f32_bits(o.v[i]), f32_bits((float)o.wv[i]));
            }
        }
    }
    exact_close(&x);
}

/* AdamW in f32 as torch orders it, with the mistakes that a judge must see. */
typedef enum {
    RIGHT,
    THIS_ORDER,
    NO_BIAS,
    COUPLED_DECAY,
    DECAY_ALL,
    EPS_INSIDE,
    C2_FROM_F32,
    STEP_FROM_0,
    FOREIGN_EPS,
    MISTAKES
} mistake;

static void adamw_f32(optim *o, const xp_adamw_args *a, mistake k) {
    const double t = (double)(k == STEP_FROM_0 ? a->step + 1 : a->step);
    const double bias1 = k == NO_BIAS ? 1.0 : 1.0 - pow(a->beta1, t),
                 bias2 = k == NO_BIAS ? 1.0 : 1.0 - pow(a->beta2, t);
    const float b1 = (float)a->beta1, c1 = (float)(1.0 - a->beta1), b2 = (float)a->beta2;
    const float c2 = k == C2_FROM_F32 ? 1.0f - b2 : (float)(1.0 - a->beta2);
    const float eps = (float)(k == FOREIGN_EPS ? 1e-6 : a->eps), step = (float)(a->lr / bias1);
    for (int i = 0; i < ELEMENTS; i++) {
        const int decay = k == DECAY_ALL ? 1 : decayed(o, i);
        float g = o->g[i];
        if (decay && k == COUPLED_DECAY)
            g += (float)a->weight_decay * o->p[i];
        else if (decay)
            o->p[i] *= (float)(1.0 - a->lr * a->weight_decay);
        if (k == THIS_ORDER) {
            o->m[i] = b1 * o->m[i] + c1 * g;
            o->v[i] = b2 * o->v[i] + c2 * (g * g);
            const float root = sqrtf(o->v[i] / (float)bias2);
            o->p[i] -= (float)a->lr * (o->m[i] / (float)bias1) / (root + eps);
            continue;
        }
        o->m[i] += c1 * (g - o->m[i]);
        o->v[i] = b2 * o->v[i] + c2 * g * g;
        float den = sqrtf(o->v[i]) / (float)sqrt(bias2) + eps;
        if (k == EPS_INSIDE)
            den = sqrtf(o->v[i] / (float)bias2 + eps);
        o->p[i] += -step * (o->m[i] / den);
    }
}

/* Largest err / bound of one operand. */
static double worst_ratio(const xp_stage *stage, const void *before, const char *name, optim *o, const double *ref,
                          const float *got) {
    const int k = xp_stage_operand(stage, name);
    xp_tensor r = xp_tensor_1d(o->ref, XP_F64, ELEMENTS), tol = xp_tensor_1d(o->tol, XP_F64, ELEMENTS);
    memcpy(o->ref, ref, sizeof o->ref);
    assert_true(k >= 0);
    assert_int_equal(stage->bound(before, NULL, k, &r, NULL, &tol), XP_OK);
    double worst = 0.0;
    for (int i = 0; i < ELEMENTS; i++) {
        const double err = fabs((double)got[i] - ref[i]);
        if (!(err <= o->tol[i]))
            worst = fmax(worst, err == err ? err / o->tol[i] : (double)INFINITY);
        else if (err > 0.0)
            worst = fmax(worst, err / o->tol[i]);
    }
    return worst;
}

/* Forty steps of mistake k, each judged on the implementation's own state; still: p is put back to 0 before each. */
static void judge_adamw(mistake k, int still, double worst[3]) {
    static optim o, before;
    rng_state = 6;
    optim_open(&o);
    worst[0] = worst[1] = worst[2] = 0.0;
    for (int64_t step = 1; step <= 40; step++) {
        for (int i = 0; i < ELEMENTS; i++) {
            o.g[i] = (float)(k > THIS_ORDER && i % 6 != 3 ? 1e-3 * uniform(-1.0, 1.0) : gradient(i));
            o.p[i] = still ? 0.0f : o.p[i];
        }
        widen(&o);
        before = o;
        const xp_adamw_args wide = adamw_args(&o, 1, step), narrow = adamw_args(&before, 0, step);
        run_ok(&xp_ref_adamw, &wide);
        adamw_f32(&o, &narrow, k);
        worst[0] = fmax(worst[0], worst_ratio(&xp_stage_adamw, &narrow, "param", &o, o.wp, o.p));
        worst[1] = fmax(worst[1], worst_ratio(&xp_stage_adamw, &narrow, "m", &o, o.wm, o.m));
        worst[2] = fmax(worst[2], worst_ratio(&xp_stage_adamw, &narrow, "v", &o, o.wv, o.v));
    }
}

static void test_adamw_bound(void **state) {
    (void)state;
    double worst[3];
    for (int k = NO_BIAS; k < MISTAKES; k++) {
        judge_adamw((mistake)k, 0, worst);
        if (!(fmax(fmax(worst[0], worst[1]), worst[2]) > 1.0))
            fail_msg("mistake %d stays inside the bound: %g %g %g", k, worst[0], worst[1], worst[2]);
    }
    /* right ones stay inside, and the bound is not idle: some element comes near a half of it */
    for (int still = 0; still < 2; still++) {
        for (int k = RIGHT; k <= THIS_ORDER; k++) {
            judge_adamw((mistake)k, still, worst);
            for (int j = 0; j < 3; j++) {
                if (!(worst[j] <= 1.0 && worst[j] > (still && j == 0 ? 0.25 : 0.4)))
                    fail_msg("order %d, still %d, operand %d: err/bound %g", k, still, j, worst[j]);
            }
        }
    }
}

static void test_adamw_edges(void **state) {
    (void)state;
    static optim o, before;
    rng_state = 12;
    optim_open(&o);
    /* zero gradient and moments: only the decay acts, and eps keeps 0/0 away */
    memset(o.g, 0, sizeof o.g);
    before = o;
    xp_adamw_args a = adamw_args(&o, 0, 1);
    run_ok(&xp_ref_adamw, &a);
    for (int i = 0; i < ELEMENTS; i++) {
        const double keep = decayed(&o, i) ? 1.0 - 1e-3 * 0.1 : 1.0;
        assert_true(o.m[i] == 0.0f && o.v[i] == 0.0f);
        assert_int_equal(f32_bits(o.p[i]), f32_bits((float)((double)before.p[i] * keep)));
    }
    /* the first step of a lone gradient is lr, whatever its size: m / bias1 = g, sqrt(v / bias2) = |g| */
    o.g[0] = 1e10f, o.g[1] = -1e-3f, o.g[2] = NAN, o.g[3] = INFINITY;
    memset(o.p, 0, sizeof o.p);
    run_ok(&xp_ref_adamw, &a);
    assert_true(fabs((double)o.p[0] + 1e-3) < 1e-9 && fabs((double)o.p[1] - 1e-3) < 2e-8);
    assert_true(isnan(o.p[2]) && isnan(o.m[2]) && isnan(o.v[2]));
    assert_true(isnan(o.p[3]) && isinf(o.m[3]) && isinf(o.v[3]));
    /* an f32 square overflows where the moment is finite: the bound makes no statement on v, and bounds p by the update
     */
    optim_open(&o);
    for (int i = 0; i < ELEMENTS; i++)
        o.g[i] = 3e19f, o.p[i] = 1.0f;
    widen(&o);
    before = o;
    a = adamw_args(&o, 1, 1);
    run_ok(&xp_ref_adamw, &a);
    const xp_adamw_args narrow = adamw_args(&before, 0, 1);
    adamw_f32(&o, &narrow, THIS_ORDER);
    assert_true(isinf(o.v[0]));
    assert_true(worst_ratio(&xp_stage_adamw, &narrow, "param", &o, o.wp, o.p) <= 1.0 && o.tol[150] < 1.1e-3);
    /* a second moment of a few subnormal units, far from hidden by eps: the error of v' must reach the bound of p' */
    optim_open(&o);
    for (int i = 0; i < ELEMENTS; i++)
        o.g[i] = (float)uniform(1e-21, 4e-21), o.p[i] = 0.0f;
    widen(&o);
    before = o;
    xp_adamw_args small = adamw_args(&before, 0, 1);
    a = adamw_args(&o, 1, 1);
    a.eps = small.eps = 1e-22;
    run_ok(&xp_ref_adamw, &a);
    adamw_f32(&o, &small, THIS_ORDER);
    const double far = worst_ratio(&xp_stage_adamw, &small, "param", &o, o.wp, o.p);
    assert_true(far <= 1.0 && far > 0.1 && o.tol[0] > 1e-5);
    /* refusals */
    a = adamw_args(&o, 0, 0);
    expect_refused(&xp_stage_adamw, &a, "step is 0");
    a = adamw_args(&o, 0, 1);
    a.beta2 = 1.0;
    expect_refused(&xp_stage_adamw, &a, "beta2 is 1");
    a.beta2 = 0.9, a.lr = -1.0;
    expect_refused(&xp_stage_adamw, &a, "lr is -1");
    a.lr = 1.0, a.eps = (double)NAN;
    expect_refused(&xp_stage_adamw, &a, "eps");
    a.eps = 0.0, a.v.dim[0] = 3;
    expect_refused(&xp_stage_adamw, &a, "v dim 0 is 3");
    a.v.dim[0] = ELEMENTS, a.m.dtype = XP_F16;
    expect_refused(&xp_stage_adamw, &a, "m has dtype");
    double residual = -1.0;
    a = adamw_args(&o, 0, 1);
    assert_int_equal(xp_stage_adamw.property[0].residual(&a, NULL, &residual), XP_OK);
    assert_true(residual == 0.0);
    o.v[7] = -1e-30f;
    assert_int_equal(xp_stage_adamw.property[0].residual(&a, NULL, &residual), XP_OK);
    assert_true(isinf(residual));
}

/* ---- sgd ---- */

static xp_sgd_args sgd_args(optim *o, int wide, int64_t step, double momentum) {
    return (xp_sgd_args){
        .param = wide ? xp_tensor_1d(o->wp, XP_F64, ELEMENTS) : xp_tensor_1d(o->p, XP_F32, ELEMENTS),
        .buf = wide ? xp_tensor_1d(o->wm, XP_F64, ELEMENTS) : xp_tensor_1d(o->m, XP_F32, ELEMENTS),
        .grad = xp_tensor_1d(o->g, XP_F32, ELEMENTS),
        .seg = xp_tensor_1d(o->seg, XP_I64, GROUPS + 1),
        .decay = xp_tensor_1d(o->decay, XP_U8, GROUPS),
        .lr = 0.03,
        .momentum = momentum,
        .weight_decay = 0.01,
        .step = step,
    };
}

static void exact_sgd(exact *x, const xp_sgd_args *a, int decay, float p, float buf, float g) {
    mpfr_set_flt(x->p, p, MPFR_RNDN);
    mpfr_mul_d(x->m, x->p, decay ? a->weight_decay : 0.0, MPFR_RNDN);
    mpfr_add_d(x->m, x->m, (double)g, MPFR_RNDN);
    if (a->momentum != 0.0 && a->step > 1) {
        mpfr_set_flt(x->t, buf, MPFR_RNDN);
        mpfr_mul_d(x->t, x->t, a->momentum, MPFR_RNDN);
        mpfr_add(x->m, x->m, x->t, MPFR_RNDN);
    }
    mpfr_mul_d(x->t, x->m, a->lr, MPFR_RNDN);
    mpfr_sub(x->p, x->p, x->t, MPFR_RNDN);
}

static void test_sgd(void **state) {
    (void)state;
    static optim o, old;
    exact x;
    exact_open(&x);
    rng_state = 51;
    for (int k = 0; k < 2; k++) {
        const double momentum = k ? 0.0 : 0.9;
        optim_open(&o);
        for (int i = 0; i < ELEMENTS; i++)
            o.m[i] = 77.0f; /* not read on the first step, not written without momentum */
        for (int64_t step = 1; step <= 15; step++) {
            for (int i = 0; i < ELEMENTS; i++)
                o.g[i] = (float)gradient(i);
            old = o;
            widen(&o);
            const xp_sgd_args a = sgd_args(&o, 1, step, momentum), b = sgd_args(&o, 0, step, momentum);
            run_ok(&xp_ref_sgd, &a);
            run_ok(&xp_ref_sgd, &b);
            for (int i = 0; i < ELEMENTS; i++) {
                const double sum = fabs((double)old.g[i]) + fabs((double)old.p[i]) + fabs((double)old.m[i]);
                exact_sgd(&x, &a, decayed(&o, i), old.p[i], old.m[i], old.g[i]);
                near(o.wp[i], x.p, fabs((double)old.p[i]) + 0.03 * sum, "p", i);
                assert_int_equal(f32_bits(o.p[i]), f32_bits((float)o.wp[i]));
                if (momentum != 0.0) {
                    near(o.wm[i], x.m, sum, "buf", i);
                    assert_int_equal(f32_bits(o.m[i]), f32_bits((float)o.wm[i]));
                } else {
                    assert_true(o.m[i] == 77.0f && o.wm[i] == 77.0);
                }
            }
        }
    }
    exact_close(&x);
}

/* SGD in f32: right, nesterov, first step reads the buffer, decay everywhere, gradient off by a constant, dampening. */
static void sgd_f32(optim *o, const xp_sgd_args *a, int k) {
    const float mom = (float)a->momentum, wd = (float)a->weight_decay, lr = (float)a->lr;
    for (int i = 0; i < ELEMENTS; i++) {
        float d = k == 4 ? o->g[i] * 1.001f : o->g[i];
        if (decayed(o, i) || k == 3)
            d += wd * o->p[i];
        o->m[i] = a->step == 1 && k != 2 ? d : mom * o->m[i] + (k == 5 ? (1.0f - mom) * d : d);
        o->p[i] -= lr * (k == 1 ? d + mom * o->m[i] : o->m[i]);
    }
}

static void test_sgd_bound(void **state) {
    (void)state;
    static optim o, before;
    for (int k = 0; k < 6; k++) {
        double worst[2] = {0, 0};
        rng_state = 6;
        optim_open(&o);
        for (int i = 0; i < ELEMENTS; i++)
            o.m[i] = 0.5f;
        for (int64_t step = 1; step <= 40; step++) {
            for (int i = 0; i < ELEMENTS; i++)
                o.g[i] = (float)gradient(i);
            widen(&o);
            before = o;
            const xp_sgd_args wide = sgd_args(&o, 1, step, 0.9), narrow = sgd_args(&before, 0, step, 0.9);
            run_ok(&xp_ref_sgd, &wide);
            sgd_f32(&o, &narrow, k);
            worst[0] = fmax(worst[0], worst_ratio(&xp_stage_sgd, &narrow, "param", &o, o.wp, o.p));
            worst[1] = fmax(worst[1], worst_ratio(&xp_stage_sgd, &narrow, "buf", &o, o.wm, o.m));
        }
        if (k == 0)
            assert_true(worst[0] <= 1.0 && worst[1] <= 1.0 && worst[0] > 0.3 && worst[1] > 0.3);
        else
            assert_true(worst[0] > 1.0 || worst[1] > 1.0);
    }
}

static void test_sgd_edges(void **state) {
    (void)state;
    static optim o;
    rng_state = 1;
    optim_open(&o);
    xp_sgd_args a = sgd_args(&o, 0, 2, 0.0);
    a.buf.data = NULL; /* absent without momentum */
    run_ok(&xp_ref_sgd, &a);
    o.p[150] = INFINITY; /* 0 x inf of a segment without decay */
    run_ok(&xp_ref_sgd, &a);
    assert_true(isinf(o.p[150]));
    a.momentum = 0.5;
    expect_refused(&xp_stage_sgd, &a, "buf is absent");
    a = sgd_args(&o, 0, 0, 0.5);
    expect_refused(&xp_stage_sgd, &a, "step is 0");
    a.step = 1, a.momentum = -0.5;
    expect_refused(&xp_stage_sgd, &a, "momentum is -0.5");
    a.momentum = 0.5, a.lr = (double)INFINITY;
    expect_refused(&xp_stage_sgd, &a, "lr is inf");
    a.lr = 0.1, o.decay[0] = 7;
    expect_refused(&xp_stage_sgd, &a, "decay[0] is 7");
    o.decay[0] = 1;
    run_ok(&xp_ref_sgd, &a);
}

/* ---- cast ---- */

static void test_cast(void **state) {
    (void)state;
    enum { N = 601 };
    static float x[N];
    static uint8_t y[N], sat[N], nibble[(N + 1) / 2];
    double residual = -1.0;
    rng_state = 9;
    for (int i = 0; i < N; i++)
        x[i] = (float)ldexp(uniform(-1.0, 1.0), (int)(rng() % 24) - 12);
    x[0] = 1000.0f, x[1] = -INFINITY, x[2] = NAN, x[3] = -0.0f, x[4] = 464.0f, x[5] = 1.3f;
    xp_cast_args a = {.x = xp_tensor_1d(x, XP_F32, N), .y = xp_tensor_1d(y, XP_E4M3, N), .saturate = 0};
    run_ok(&xp_ref_cast, &a);
    assert_int_equal(xp_stage_cast.property[0].residual(&a, NULL, &residual), XP_OK);
    assert_true(residual > 0.5 && residual <= 1.0);
    assert_true(y[0] == 0x7F && y[1] == 0xFF && (y[2] & 0x7F) == 0x7F && y[3] == 0x80 && y[4] == 0x7E);
    xp_cast_args b = a;
    b.y.data = sat;
    b.saturate = 1;
    run_ok(&xp_ref_cast, &b);
    assert_true(sat[0] == 0x7E && sat[1] == 0xFE && (sat[2] & 0x7F) == 0x7F && sat[3] == 0x80 && sat[4] == 0x7E);
    for (int i = 5; i < N; i++) {
        const uint64_t want = xp_ref_narrow((double)x[i], XP_E4M3, 0), full = xp_ref_narrow((double)x[i], XP_E4M3, 1);
        assert_true(y[i] == want && sat[i] == full);
    }
    y[5] ^= 2; /* two units off, which is more than |x| / 16 */
    assert_int_equal(xp_stage_cast.property[0].residual(&a, NULL, &residual), XP_OK);
    assert_true(residual > 1.0);
    xp_cast_args part = a;
    assert_int_equal(xp_stage_cast.extent(&a), N);
    xp_stage_cast.slice(&a, 100, 200, &part);
    run_ok(&xp_ref_cast, &part);
    assert_true(part.x.data == x + 100 && part.y.data == y + 100 && part.x.dim[0] == 100);
    b.y = xp_tensor_1d(nibble, XP_E2M1, N);
    nibble[(N + 1) / 2 - 1] = 0xF0;
    run_ok(&xp_ref_cast, &b);
    assert_int_equal(xp_stage_cast.extent(&b), 1);
    for (int i = 0; i < N; i++)
        assert_int_equal(xp_code(nibble, XP_E2M1, i), xp_ref_narrow((double)x[i], XP_E2M1, 1));
    assert_int_equal(nibble[(N + 1) / 2 - 1] & 0xF0, 0xF0);
    b.saturate = 2;
    expect_refused(&xp_stage_cast, &b, "saturate is 2");
    b.saturate = 0, b.y.dim[0] = N - 1;
    expect_refused(&xp_stage_cast, &b, "y dim 0");
    b.y = xp_tensor_1d(nibble, XP_U8, N);
    expect_refused(&xp_stage_cast, &b, "y has dtype u8");
}

/* ---- generated data ---- */

static void test_fill(void **state) {
    (void)state;
    static optim o;
    meeting t = {0};
    seat s;
    seat_open(&s, &t, 1, 2);
    s.comm[XP_DP].rank = 1;
    s.comm[XP_DP].size = 2;
    rng_state = 2;
    optim_open(&o);
    xp_adamw_args a = adamw_args(&o, 0, 1);
    int decays = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        for (int i = 0; i < ELEMENTS; i++)
            o.v[i] = -1.0f;
        assert_int_equal(xp_stage_adamw.fill(&a, &s.mesh, "real", seed), XP_OK);
        assert_int_equal(xp_stage_adamw.check(&a, &s.mesh), XP_OK);
        assert_true(o.v[17] == 1.0f);
        for (int q = 0; q < GROUPS; q++)
            decays += o.decay[q];
    }
    assert_true(decays > 40 && decays < 120);
    uint8_t code[200] = {0}, seen[256] = {0};
    float wide[200];
    xp_cast_args k = {.x = xp_tensor_1d(code, XP_E8M0, 200), .y = xp_tensor_1d(wide, XP_F32, 200), .saturate = 0};
    assert_int_equal(xp_stage_cast.fill(&k, &s.mesh, "real", 1), XP_OK);
    int kinds = 0;
    for (int i = 0; i < 200; i++)
        kinds += !seen[code[i]]++;
    assert_true(kinds > 100);
    run_ok(&xp_ref_cast, &k);
    float norm = -3.0f, coef = 0;
    xp_gradnorm_args g = {
        .grad = a.grad, .seg = a.seg, .owner = a.decay, .norm = xp_tensor_1d(&norm, XP_F32, 1), .p = 2.0};
    assert_int_equal(xp_stage_gradnorm.fill(&g, &s.mesh, "real", 4), XP_OK);
    assert_int_equal(xp_stage_gradnorm.check(&g, &s.mesh), XP_OK);
    assert_true(o.decay[0] == 1 && o.decay[1] == 0 && o.decay[2] == 1 && o.decay[3] == 1); /* dp place 1 */
    g.grad.dim[0] = 0;                                                                     /* a rank without elements */
    assert_int_equal(xp_stage_gradnorm.fill(&g, &s.mesh, "real", 4), XP_OK);
    assert_int_equal(xp_stage_gradnorm.check(&g, &s.mesh), XP_OK);
    xp_clip_args c = {
        .grad = a.grad, .norm = g.norm, .coef = xp_tensor_1d(&coef, XP_F32, 1), .max_norm = 1.0f, .eps = 0.0f};
    assert_int_equal(xp_stage_clip.fill(&c, &s.mesh, "real", 4), XP_OK);
    assert_true(norm == 3.0f);
    xp_sgd_args d = sgd_args(&o, 0, 1, 0.9);
    assert_int_equal(xp_stage_sgd.fill(&d, &s.mesh, "real", 4), XP_OK);
    assert_int_equal(xp_stage_sgd.check(&d, &s.mesh), XP_OK);
}

/* The ideal algorithm's bytes: each array once. */
static void test_cost(void **state) {
    (void)state;
    static optim o;
    meeting t = {0};
    seat s;
    xp_cost c;
    float norm = 0;
    seat_open(&s, &t, 1, 4);
    optim_open(&o);
    const xp_adamw_args a = adamw_args(&o, 0, 1);
    xp_stage_adamw.cost(&a, &s.mesh, &c);
    assert_true(c.mem_bytes == 28.0 * ELEMENTS + 4 * 9 + 8 && c.net_bytes == 0.0 && c.flop == 15.0 * ELEMENTS);
    xp_sgd_args g = sgd_args(&o, 0, 2, 0.9);
    xp_stage_sgd.cost(&g, &s.mesh, &c);
    assert_true(c.mem_bytes == 20.0 * ELEMENTS + 4 * 9 + 8);
    const xp_gradnorm_args n = {
        .grad = a.grad, .seg = a.seg, .owner = a.decay, .norm = xp_tensor_1d(&norm, XP_F32, 1), .p = 2.0};
    xp_stage_gradnorm.cost(&n, &s.mesh, &c);
    assert_true(c.net_bytes == 2.0 * 3.0 / 4.0 * 8.0 * XP_REF_EXACT_WORDS && c.flop == 2.0 * ELEMENTS);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradnorm),    cmocka_unit_test(test_gradnorm_refuses),
        cmocka_unit_test(test_clip),        cmocka_unit_test(test_clip_edges),
        cmocka_unit_test(test_adamw),       cmocka_unit_test(test_adamw_bound),
        cmocka_unit_test(test_adamw_edges), cmocka_unit_test(test_sgd),
        cmocka_unit_test(test_sgd_bound),   cmocka_unit_test(test_sgd_edges),
        cmocka_unit_test(test_cast),        cmocka_unit_test(test_fill),
        cmocka_unit_test(test_cost),
    };
    const int failed = cmocka_run_group_tests_name("optim", tests, NULL, NULL);
    mpfr_free_cache();
    return failed;
}
