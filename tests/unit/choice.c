/* Judging a choice of experts: what is right, what is undecided, what is wrong, for single tokens by hand; and the cap,
 * the replay and the vacuous case of one choice for all. */
#include "judge_suite.h"

/* ---- the stage: score = logit (0 for NaN and -inf, NaN when all are NaN), idx = the K largest, w = their scores ----
 */

enum { E = 6, K = 2, MOST = 3000 };

typedef struct {
    xp_tensor logits; /* in  [T,E] f32 */
    xp_tensor bias;   /* in  [E] f32, optional */
    xp_tensor scores; /* out [T,E] f32 */
    xp_tensor idx;    /* out [T,K] i32 */
    xp_tensor w;      /* out [T,K] f32 */
    double tol;
    int64_t row0;
    int replay;
} choose_args;

static const xp_operand choose_operand[] = {
    XP_OPERAND(choose_args, logits, "T,E", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPTIONAL(choose_args, bias, "E", XP_IN, XP_BIT(XP_F32), XP_UNCOMPARED, ""),
    XP_OPERAND(choose_args, scores, "T,E", XP_OUT, XP_BIT(XP_F32), XP_BOUND, ""),
    XP_OPERAND(choose_args, idx, "T,K", XP_OUT, XP_BIT(XP_I32), XP_SELECT, ""),
    XP_OPERAND(choose_args, w, "T,K", XP_OUT, XP_BIT(XP_F32), XP_BOUND, ""),
};

static xp_status choose_check(const void *args, const xp_mesh *m) {
    (void)args;
    (void)m;
    return XP_OK;
}

static xp_status choose_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                              xp_tensor *tol) {
    const choose_args *a = args;
    (void)m;
    (void)ws;
    if (strcmp(choose_operand[operand].name, "w") == 0 && !a->replay)
        return XP_FAIL(XP_E_BUG, "choose: the bound of w needs the choice that is judged");
    for (int64_t i = 0; i < xp_tensor_count(ref); i++)
        ((double *)tol->data)[i] = a->tol;
    return XP_OK;
}

static int64_t choose_extent(const void *args) {
    return ((const choose_args *)args)->logits.dim[0];
}

static void choose_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const choose_args *a = args;
    choose_args *o = out;
    o->logits = xp_tensor_rows(&a->logits, 0, lo, hi);
    o->scores = xp_tensor_rows(&a->scores, 0, lo, hi);
    o->idx = xp_tensor_rows(&a->idx, 0, lo, hi);
    o->w = xp_tensor_rows(&a->w, 0, lo, hi);
    o->row0 = a->row0 + lo;
}

static void choose_replay(void *args, int on) {
    ((choose_args *)args)->replay = on;
}

static const xp_stage choose = {
    .name = "choose",
    .meaning = "the largest scores",
    .axis = XP_LOCAL,
    .args_size = sizeof(choose_args),
    .operand = choose_operand,
    .operands = sizeof choose_operand / sizeof *choose_operand,
    .check = choose_check,
    .bound = choose_bound,
    .extent = choose_extent,
    .slice = choose_slice,
    .replay = choose_replay,
    .scores = "scores",
};

/* What the row under test chooses instead, when use_forced is set; indexed by token. */
static int32_t forced[MOST][K];
static int use_forced, wrong_weights;

static double score_of(float logit) {
    return isnan(logit) || isinf(logit) ? 0.0 : (double)logit;
}

/* Numbers before NaN, then larger first, then the lower index. */
static int before(const float *logit, int a, int b) {
    if (isnan(logit[a]) != isnan(logit[b]))
        return isnan(logit[b]);
    if (score_of(logit[a]) != score_of(logit[b]))
        return score_of(logit[a]) > score_of(logit[b]);
    return a < b;
}

static void choose_row(const float *logit, int32_t *idx) {
    int n = 0;
    for (int e = 0; e < E; e++) {
        int k = n < K ? n++ : K;
        for (; k > 0 && before(logit, e, idx[k - 1]); k--) {
            if (k < K)
                idx[k] = idx[k - 1];
        }
        if (k < K)
            idx[k] = e;
    }
}

static void run_token(const choose_args *a, int64_t t, int is_judge) {
    const float *logit = (const float *)a->logits.data + t * E;
    int32_t *idx = (int32_t *)a->idx.data + t * K;
    int numbers = 0;
    for (int e = 0; e < E; e++)
        numbers += !isnan(logit[e]);
    for (int e = 0; e < E; e++)
        xp_ref_store(a->scores.data, a->scores.dtype, t * E + e, numbers ? score_of(logit[e]) : (double)NAN);
    if (!a->replay && !is_judge && use_forced)
        memcpy(idx, forced[a->row0 + t], sizeof forced[0]);
    else if (!a->replay)
        choose_row(logit, idx);
    for (int k = 0; k < K; k++) {
        const int ok = idx[k] >= 0 && idx[k] < E; /* the judge must never be handed anything else */
        if (is_judge && !ok)
            abort();
        const double w = ok ? score_of(logit[idx[k]]) : 0.0;
        xp_ref_store(a->w.data, a->w.dtype, t * K + k, is_judge || !wrong_weights ? w : w + 1.0);
    }
}

static xp_status judge_run(const xp_exec *x, const void *args) {
    const choose_args *a = args;
    (void)x;
    for (int64_t t = 0; t < a->logits.dim[0]; t++)
        run_token(a, t, 1);
    return XP_OK;
}

static xp_status tested_run(const xp_exec *x, const void *args) {
    const choose_args *a = args;
    (void)x;
    for (int64_t t = 0; t < a->logits.dim[0]; t++)
        run_token(a, t, 0);
    return XP_OK;
}

static const xp_kernel judge_row = {.stage = &choose, .name = "judge", .run = judge_run};
static const xp_kernel tested_row = {.stage = &choose, .name = "k1", .det = XP_DET_RUN, .run = tested_run};

typedef struct {
    int64_t T;
    double tol;
    const float *bias;
    xp_data data;
    xp_expect expect;
    size_t slice_bytes;
    int replay;
} setup;

static void judge_choice(const setup *s, const float *logits, xp_judgement *g) {
    lone l;
    small_backend impl, ref;
    xp_rank r;
    xp_judge *j;
    choose_args a = {.tol = s->tol, .replay = s->replay};
    const int64_t te[2] = {s->T, E}, tk[2] = {s->T, K};
    lone_open(&l, 1);
    backend_of(&impl, "impl", &tested_row);
    backend_of(&ref, "ref", &judge_row);
    const xp_judge_options o = {.ref = &ref.b, .data = s->data, .twice = XP_TWICE_FIRST, .slice_bytes = s->slice_bytes};
    assert_int_equal(xp_rank_open(&l.mesh, &impl.b, &ref.b, &r), XP_OK);
    assert_int_equal(xp_judge_open(&o, &j), XP_OK);
    r.judge = j;
    r.token0 = 10;
    assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 2, te, &a.logits), XP_OK);
    assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 2, te, &a.scores), XP_OK);
    assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_I32, 2, tk, &a.idx), XP_OK);
    assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 2, tk, &a.w), XP_OK);
    memcpy(a.logits.data, logits, (size_t)s->T * E * sizeof *logits);
    memcpy(a.idx.data, forced, (size_t)s->T * sizeof *forced);
    if (s->bias) {
        assert_int_equal(xp_rank_tensor(&r, XP_KIND_ACT, XP_F32, 1, te + 1, &a.bias), XP_OK);
        memcpy(a.bias.data, s->bias, E * sizeof(float));
    }
    assert_int_equal(xp_call(&r, &choose, "choose", &a), XP_OK);
    assert_int_equal(xp_judgement_make(&j, 1, NULL, s->expect, g), XP_OK);
    xp_judge_close(j);
    xp_rank_close(&r);
}

/* ---- one token ---- */

#define NOT (float)NAN
#define LOW (-(float)INFINITY)

static const struct {
    const char *what;
    float logit[E];
    int32_t idx[K];
    double tol;
    xp_class cls;
    int undecided, reordered;
} one[] = {
    {"the judge's own", {1, 5, 3, 2, 0.5f, 4}, {1, 5}, 0.0, XP_C_NONE, 0, 0},
    {"left out is better", {1, 5, 3, 2, 0.5f, 4}, {1, 2}, 0.1, XP_C_SELECT, 0, 0},
    {"better by exactly both bounds", {1, 5, 3, 2, 0.5f, 4}, {1, 2}, 0.5, XP_C_NONE, 1, 0},
    {"better by more than both bounds", {1, 5, 3, 2, 0.5f, 4}, {1, 2}, 0.49, XP_C_SELECT, 0, 0},
    {"wrong in the first slot only", {1, 5, 3, 2, 0.5f, 4}, {5, 1}, 0.1, XP_C_SELECT, 0, 0},
    {"order inside the bounds", {1, 5, 3, 2, 0.5f, 4}, {5, 1}, 0.5, XP_C_NONE, 0, 1},
    {"chosen twice", {1, 5, 3, 2, 0.5f, 4}, {1, 1}, 10.0, XP_C_SELECT, 0, 0},
    {"no expert", {1, 5, 3, 2, 0.5f, 4}, {1, E}, 10.0, XP_C_SELECT, 0, 0},
    {"negative", {1, 5, 3, 2, 0.5f, 4}, {-1, 5}, 10.0, XP_C_SELECT, 0, 0},
    {"never written", {1, 5, 3, 2, 0.5f, 4}, {1, (int32_t)0xa5a5a5a5u}, 10.0, XP_C_UNWRITTEN, 0, 0},
    {"tie at the boundary", {1, 5, 4, 2, 0.5f, 4}, {1, 5}, 0.0, XP_C_TIE, 0, 0},
    {"tie at the boundary, wide bound", {1, 5, 4, 2, 0.5f, 4}, {1, 5}, 9.0, XP_C_TIE, 0, 0},
    {"tie, and nothing is known", {1, 5, 4, 2, 0.5f, 4}, {1, 5}, (double)INFINITY, XP_C_NONE, 1, 0},
    {"tie inside the choice", {1, 5, 5, 2, 0.5f, 4}, {2, 1}, 0.0, XP_C_TIE, 0, 0},
    {"tie kept", {1, 5, 5, 2, 0.5f, 4}, {1, 2}, 0.0, XP_C_NONE, 0, 0},
    {"all equal, last ones", {2, 2, 2, 2, 2, 2}, {4, 5}, 0.0, XP_C_TIE, 0, 0},
    {"all equal, first ones", {2, 2, 2, 2, 2, 2}, {0, 1}, 0.0, XP_C_NONE, 0, 0},
    {"minus zero equals nothing else", {0.0f, -0.0f, 5, 0.0f, 0.0f, 0.0f}, {2, 3}, 0.0, XP_C_TIE, 0, 0},
    {"NaN chosen before a number", {NOT, LOW, LOW, 5, LOW, LOW}, {3, 0}, 0.0, XP_C_SELECT, 0, 0},
    {"NaN chosen first", {NOT, 1, 2, 5, 4, 3}, {0, 3}, 0.1, XP_C_SELECT, 0, 0},
    {"NaN last, by index", {NOT, NOT, NOT, 5, NOT, NOT}, {3, 0}, 0.0, XP_C_NONE, 0, 0},
    {"NaN last, another one", {NOT, NOT, NOT, 5, NOT, NOT}, {3, 1}, 0.0, XP_C_TIE, 0, 0},
    {"only NaN", {NOT, NOT, NOT, NOT, NOT, NOT}, {0, 1}, 0.0, XP_C_NONE, 0, 0},
    {"only NaN, the other way", {NOT, NOT, NOT, NOT, NOT, NOT}, {1, 0}, 0.0, XP_C_TIE, 0, 0},
};

static void single_tokens(void **state) {
    (void)state;
    use_forced = 1;
    for (size_t i = 0; i < sizeof one / sizeof *one; i++) {
        xp_judgement g;
        const setup s = {.T = 1, .tol = one[i].tol, .data = XP_DATA_TIES};
        memcpy(forced[0], one[i].idx, sizeof forced[0]);
        judge_choice(&s, one[i].logit, &g);
        const xp_finding *f = line_of(&g, "idx");
        if (f->cls != one[i].cls || f->undecided != one[i].undecided || f->reordered != one[i].reordered)
            fail_msg("%s: %s, %d undecided, %d reordered: %s", one[i].what, xp_class_name(f->cls), (int)f->undecided,
                     (int)f->reordered, f->text);
        assert_int_equal(f->chosen, 1);
        assert_int_equal(f->experts, E);
        assert_int_equal(f->verdict == XP_V_FAIL, one[i].cls != XP_C_NONE); /* scores of 0 alone are VACUOUS */
        if (one[i].cls != XP_C_NONE) {
            assert_int_equal(f->first.token, 10);
            assert_true(f->first.slot >= 0 && f->first.slot < K);
            assert_int_equal(g.first, f - g.line);
        }
        xp_judgement_close(&g);
    }
    use_forced = 0;
}

/* Equal logits with another selection bias are not equal. */
static void bias_breaks_a_tie(void **state) {
    (void)state;
    static const float logit[1][E] = {{1, 5, 4, 2, 0.5f, 4}};
    const float bias[E] = {0, 0, 0, 0, 0, 0.25f};
    xp_judgement g;
    setup s = {.T = 1, .data = XP_DATA_TIES};
    use_forced = 1;
    forced[0][0] = 1;
    forced[0][1] = 5;
    judge_choice(&s, logit[0], &g);
    assert_int_equal(line_of(&g, "idx")->cls, XP_C_TIE);
    xp_judgement_close(&g);
    s.bias = bias;
    judge_choice(&s, logit[0], &g);
    assert_int_equal(line_of(&g, "idx")->cls, XP_C_NONE);
    xp_judgement_close(&g);
    use_forced = 0;
}

/* ---- many tokens ---- */

static float many[MOST][E];

/* Token t prefers experts t and t+1 (mod E); the next is `gap` behind. */
static void fill_many(int64_t T, float gap) {
    for (int64_t t = 0; t < T; t++) {
        for (int e = 0; e < E; e++) {
            const int64_t rank = (e - t % E + E) % E;
            many[t][e] = rank == 0 ? 3.0f : rank == 1 ? 2.0f : rank == 2 ? 2.0f - gap : 1.0f / (float)(rank + 1);
        }
        forced[t][0] = (int32_t)(t % E);
        forced[t][1] = (int32_t)((t + 2) % E);
    }
}

/* An undecided choice is replayed: weights are judged under the implementation's choice, not the judge's. */
static void undecided_is_replayed(void **state) {
    (void)state;
    for (size_t slice = 0; slice < 2; slice++) {
        xp_judgement g;
        const setup s = {.T = 40, .tol = 0x1p-8, .data = XP_DATA_TIES, .slice_bytes = slice};
        fill_many(40, 0x1p-9f);
        use_forced = 1;
        judge_choice(&s, many[0], &g);
        assert_int_equal(g.verdict, XP_V_PASS);
        assert_int_equal(g.undecided, 40);
        assert_int_equal(line_of(&g, "idx")->undecided, 40);
        assert_int_equal(line_of(&g, "idx")->diff.elements, 40 * K);
        assert_int_equal(line_of(&g, "w")->diff.elements, 40 * K);
        assert_true(line_of(&g, "w")->diff.ratio == 0.0); /* under the judge's choice it would be 1/2 */
        xp_judgement_close(&g);
        wrong_weights = 1;
        judge_choice(&s, many[0], &g);
        assert_int_equal(line_of(&g, "w")->cls, XP_C_BOUND);
        assert_int_equal(line_of(&g, "idx")->cls, XP_C_NONE);
        wrong_weights = use_forced = 0;
        xp_judgement_close(&g);
    }
}

/* Wrong ids are never handed to the judge's row (it would abort). */
static void wrong_ids_are_not_replayed(void **state) {
    (void)state;
    xp_judgement g;
    const setup s = {.T = 40, .tol = 0x1p-8, .data = XP_DATA_TIES};
    fill_many(40, 0x1p-9f);
    forced[7][0] = 1000000;
    forced[8][1] = -5;
    use_forced = 1;
    judge_choice(&s, many[0], &g);
    use_forced = 0;
    assert_int_equal(g.verdict, XP_V_FAIL);
    assert_int_equal(line_of(&g, "idx")->diff.wrong, 2);
    assert_int_equal(line_of(&g, "idx")->undecided, 38);
    assert_int_equal(line_of(&g, "idx")->first.token, 17);
    xp_judgement_close(&g);
}

/* On real data so many near ties cannot be chance; on ties they may be. */
static void cap(void **state) {
    (void)state;
    const struct {
        int64_t T, undecided;
        xp_data data;
        xp_class cls;
    } t[] = {
        {2000, 2000, XP_DATA_TIES, XP_C_NONE}, {2000, 2000, XP_DATA_REAL, XP_C_CAP},
        {2000, 2000, XP_DATA_TEXT, XP_C_CAP},  {2000, 20, XP_DATA_REAL, XP_C_CAP}, /* 0.17 % of 2000 is 3.4 */
        {2000, 10, XP_DATA_REAL, XP_C_NONE},   {16, 2, XP_DATA_REAL, XP_C_NONE},
        {16, 8, XP_DATA_REAL, XP_C_CAP},       {2, 2, XP_DATA_REAL, XP_C_NONE},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        xp_judgement g;
        const setup s = {.T = t[i].T, .tol = 0x1p-8, .data = t[i].data};
        fill_many(t[i].T, 0x1p-9f);
        for (int64_t n = t[i].undecided; n < t[i].T; n++)
            forced[n][1] = (int32_t)((n + 1) % E);
        use_forced = 1;
        judge_choice(&s, many[0], &g);
        use_forced = 0;
        if (line_of(&g, "idx")->cls != t[i].cls)
            fail_msg("%d of %d: %s", (int)t[i].undecided, (int)t[i].T, line_of(&g, "idx")->text);
        assert_int_equal(g.undecided, t[i].undecided);
        assert_int_equal(g.verdict, t[i].cls == XP_C_NONE ? XP_V_PASS : XP_V_FAIL);
        xp_judgement_close(&g);
    }
}

static void one_expert(void **state) {
    (void)state;
    const xp_expect expect[] = {XP_EXPECT_NONE, XP_EXPECT_ONE_EXPERT};
    for (int i = 0; i < 2; i++) {
        for (int same = 0; same < 2; same++) {
            xp_judgement g;
            const setup s = {.T = 12, .data = XP_DATA_SKEW, .expect = expect[i]};
            fill_many(12, 0.5f);
            for (int t = 0; same && t < 12; t++)
                memcpy(many[t], many[0], sizeof many[0]);
            judge_choice(&s, many[0], &g);
            assert_int_equal(g.one_expert, same);
            assert_int_equal(g.verdict, same == i ? XP_V_PASS : same ? XP_V_VACUOUS : XP_V_FAIL);
            xp_judgement_close(&g);
        }
    }
}

/* Under replay the choice is an input: not poisoned, not judged, and it must not change. */
static void given_choice(void **state) {
    (void)state;
    xp_judgement g;
    const setup s = {.T = 12, .data = XP_DATA_REAL, .replay = 1};
    fill_many(12, 0.5f);
    judge_choice(&s, many[0], &g);
    assert_int_equal(g.verdict, XP_V_PASS);
    assert_null(line_of(&g, "idx"));
    assert_int_equal(line_of(&g, "w")->diff.elements, 12 * K);
    xp_judgement_close(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(single_tokens),
        cmocka_unit_test(bias_breaks_a_tie),
        cmocka_unit_test(undecided_is_replayed),
        cmocka_unit_test(wrong_ids_are_not_replayed),
        cmocka_unit_test(cap),
        cmocka_unit_test(one_expert),
        cmocka_unit_test(given_choice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
