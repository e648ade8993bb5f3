/* The dialect record: its text, its contradictions, and the routing of each kind of record by hand and by finite
 * differences in f64. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "ref.h"
#include "stage_suite.h"
#include "xp/route.h"

enum { E = 8, K = 3, T = 3 };

/* A preset with fields set from "a=1 b=2". */
static xp_dialect record(const char *fields) {
    xp_dialect d = *xp_dialect_find("hf-5.24/qwen3_moe");
    char text[256], *save = NULL;
    snprintf(text, sizeof text, "%s", fields);
    for (char *w = strtok_r(text, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
        char *eq = strchr(w, '=');
        assert_non_null(eq);
        *eq = '\0';
        assert_int_equal(xp_dialect_set(&d, w, eq + 1), XP_OK);
    }
    return d;
}

static void fields_round_trip(void **state) {
    (void)state;
    for (const xp_dialect *d = xp_dialects; d->name; d++) {
        xp_dialect back = *d;
        for (const xp_dialect_field *f = xp_dialect_fields; f->name; f++) {
            char text[64], again[64];
            xp_dialect_print(d, f, text, sizeof text);
            /* Something else first, so that setting must do its work. */
            memset((char *)&back + f->at, 0, f->type == XP_FIELD_F64 ? sizeof(double) : sizeof(int));
            assert_int_equal(xp_dialect_set(&back, f->name, text), XP_OK);
            xp_dialect_print(&back, f, again, sizeof again);
            assert_string_equal(again, text);
        }
        assert_memory_equal(&back, d, sizeof back);
    }
}

static void fields_refused(void **state) {
    static const struct {
        const char *name, *value, *message;
    } bad[] = {{"renorm", "su", "renorm: 'su', expected none|sum|"},
               {"renorm", "sum|none", "renorm: 'sum|none', expected"},
               {"renorm", "", "renorm: '', expected"},
               {"scale", "two", "scale: 'two', expected a finite number"},
               {"scale", "inf", "scale: 'inf', expected a finite number"},
               {"scale", "2.5x", "scale: '2.5x', expected a finite number"},
               {"n_group", "1.5", "n_group: '1.5', expected a whole number"},
               {"n_group", "-1", "n_group: '-1', expected a whole number"},
               {"grops", "1", "grops: no field of a dialect"}};
    xp_dialect d = xp_dialects[0];
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(xp_dialect_set(&d, bad[i].name, bad[i].value), XP_E_ARG);
        assert_non_null(strstr(xp_error_text(), bad[i].message));
    }
    assert_memory_equal(&d, &xp_dialects[0], sizeof d);
}

/* Fields that are right one by one and wrong together; E = 12, K = 3. */
static void contradictions(void **state) {
    static const struct {
        const char *fields, *message;
    } bad[] = {{"group_reduce=max n_group=5 topk_group=1", "n_group: 5, expected a divisor of the 12 experts"},
               {"group_reduce=max n_group=5 topk_group=1 null_experts=1", "n_group: 5, expected a divisor of the 13"},
               {"group_reduce=max n_group=4 topk_group=5", "topk_group: 5, expected 1 to n_group = 4"},
               {"group_reduce=max n_group=4 topk_group=0", "topk_group: 0, expected 1 to n_group = 4"},
               {"group_reduce=top2sum n_group=12 topk_group=2", "n_group: 12, expected groups of at least 2"},
               {"group_reduce=max n_group=4 topk_group=2 select_on=token_table", "group_reduce: no groups"},
               {"select_on=first_score select_bias=on", "select_on: first_score, expected no select_bias beside it"},
               {"select_on=first_score group_reduce=max n_group=4 topk_group=2",
                "select_on: first_score, expected no group_reduce beside it"},
               {"score=softmax_topk renorm=none select_on=first_score", "score: softmax_topk chooses on logits"},
               {"weight_div_k=on scale=2 scale_at=output",
                "weight_div_k: on, expected off beside a scale of the output"},
               {"weight_div_k=on shared_rows=2 aux_coef=0", "weight_div_k: on, expected off beside shared_rows"},
               {"score=sparsemixer renorm=none", "score: sparsemixer chooses 2 experts a token, not k = 3"},
               {"score=softmax_topk renorm=sum select_on=logit", "score: softmax_topk chooses on logits"},
               {"score=softmax_topk renorm=none", "score: softmax_topk chooses on logits"},
               {"logit_scale=0", "logit_scale: 0 is out of range"},
               {"logit_softcap=-1", "logit_softcap: -1 is out of range"},
               {"renorm=max_eps renorm_eps=0", "renorm_eps: 0 is out of range"},
               {"limit=-1", "limit: -1 is out of range"},
               {"activation=softcap up_cap=1", "gate_cap: 0 is out of range"},
               {"activation=softcap gate_cap=1", "up_cap: 0 is out of range"},
               {"act_alpha=0", "act_alpha: 0 is out of range"},
               {"sparse_eps=-1", "sparse_eps: -1 is out of range"},
               {"gated=off limit=1", "gated: off, but limit"},
               {"gated=off up_offset=1", "gated: off, but limit"},
               {"weight_at=input null_experts=2", "null_kind: identity, expected skip beside weight_at input"},
               {"renorm=log_sum", "renorm: log_sum, expected score sigmoid in f32"},
               {"score=sigmoid score_dtype=act renorm=log_sum", "renorm: log_sum, expected score sigmoid in f32"},
               {"score=sigmoid renorm=log_sum masked_weight=on", "renorm: log_sum, expected score sigmoid in f32"},
               {"shared_rows=2 null_experts=1", "shared_rows: 2, expected 0 beside null_experts"},
               {"shared_rows=2 group_reduce=max n_group=4 topk_group=2",
                "shared_rows: 2, expected 0 beside group_reduce"},
               {"shared_rows=1 shared_gate=on", "shared_rows: 1, expected 0 beside shared_gate"},
               {"shared_rows=1 aux_coef=0.01", "shared_rows: 1, expected 0 beside a balance loss"},
               {"shared_rows=1 z_coef=0.01", "shared_rows: 1, expected 0 beside a balance loss"}},
      good[] = {{"group_reduce=max n_group=4 topk_group=4", ""},
                {"group_reduce=top2sum n_group=6 topk_group=1", ""},
                {"score_dtype=act", ""},
                {"score_dtype=act logits_dtype=f32", ""},
                {"select_on=first_score", ""},
                {"weight_div_k=on scale=2", ""},
                {"weight_div_k=on scale_at=output", ""},
                {"weight_at=input null_experts=2 null_kind=skip", ""},
                {"weight_at=input null_kind=identity", ""},
                {"gated=off", ""},
                {"score=sigmoid renorm=log_sum shared_rows=3 expert_scale=one aux_coef=0", ""},
                {"activation=softcap gate_cap=1 up_cap=2", ""}};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const xp_dialect d = record(bad[i].fields);
        if (xp_dialect_check(&d, 12, 3) != XP_E_ARG)
            fail_msg("%s: taken", bad[i].fields);
        if (!strstr(xp_error_text(), bad[i].message))
            fail_msg("%s: %s, expected %s", bad[i].fields, xp_error_text(), bad[i].message);
    }
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        const xp_dialect d = record(good[i].fields);
        if (xp_dialect_check(&d, 12, 3) != XP_OK)
            fail_msg("%s: %s", good[i].fields, xp_error_text());
    }
    const xp_dialect any = record("");
    assert_int_equal(xp_dialect_check(&any, 12, 13), XP_E_ARG);
    assert_int_equal(xp_dialect_check(&any, 12, 0), XP_E_ARG);
}

/* ---- one call of the reference rows ---- */

typedef struct {
    double logits[T * E], bias[E], scale_e[E], scores[T * E], w[T * K], dw[T * K], dlogits[T * E];
    double gamma[T * E], dgamma[T * E], dscale[E];
    int32_t idx[T * K], token[T], table[4 * K];
} numbers;

static int64_t factors(const xp_dialect *d) {
    return xp_dialect_factors(d, E - d->shared_rows - d->null_experts);
}

static xp_route_args forward_args(numbers *n, const xp_dialect *d, int replay) {
    xp_route_args a = {.logits = xp_tensor_2d(n->logits, XP_F64, T, E),
                       .scores = xp_tensor_2d(n->scores, XP_F64, T, E),
                       .idx = xp_tensor_2d(n->idx, XP_I32, T, d->score == XP_SCORE_SPARSEMIXER ? 2 : K),
                       .dialect = d,
                       .replay = replay};
    a.w = xp_tensor_2d(n->w, XP_F64, T, a.idx.dim[1]);
    if (d->select_bias)
        a.bias = xp_tensor_1d(n->bias, XP_F64, E);
    if (d->expert_scale)
        a.scale_e = xp_tensor_1d(n->scale_e, XP_F64, factors(d));
    if (d->shared_rows)
        a.gamma = xp_tensor_2d(n->gamma, XP_F64, T, d->shared_rows);
    if (d->select_on == XP_ON_TOKEN_TABLE) {
        a.token = xp_tensor_1d(n->token, XP_I32, T);
        a.table = xp_tensor_2d(n->table, XP_I32, 4, K);
    }
    return a;
}

static void call(const xp_stage *s, const xp_kernel *k, const void *args) {
    const xp_mesh m = lone_mesh(1);
    if (s->check(args, &m) != XP_OK)
        fail_msg("%s", xp_error_text());
    const size_t bytes = k->workspace(args, &m);
    void *ws = aligned_alloc(64, (bytes + 64) / 64 * 64);
    const xp_exec x = {.mesh = &m, .ws = ws, .ws_bytes = bytes};
    assert_non_null(ws);
    assert_int_equal(k->run(&x, args), XP_OK);
    free(ws);
}

static void forward(numbers *n, const xp_dialect *d, int replay) {
    const xp_route_args a = forward_args(n, d, replay);
    call(&xp_stage_route, &xp_ref_route, &a);
}

static double loss(numbers *n, const xp_dialect *d) {
    const int64_t slots = T * (d->score == XP_SCORE_SPARSEMIXER ? 2 : K);
    double sum = 0;
    forward(n, d, 1);
    for (int64_t i = 0; i < slots; i++)
        sum += n->dw[i] * n->w[i];
    for (int64_t i = 0; i < T * d->shared_rows; i++)
        sum += n->dgamma[i] * n->gamma[i];
    return sum;
}

static void draw(numbers *n, unsigned seed) {
    srand(seed);
    memset(n, 0, sizeof *n);
    for (int i = 0; i < T * E; i++)
        n->logits[i] = 3.0 * rand() / RAND_MAX - 1.5;
    for (int i = 0; i < E; i++) {
        n->bias[i] = 2.0 * rand() / RAND_MAX - 1.0;
        n->scale_e[i] = 0.5 + 1.0 * rand() / RAND_MAX;
    }
    for (int i = 0; i < T * K; i++)
        n->dw[i] = 2.0 * rand() / RAND_MAX - 1.0;
    for (int i = 0; i < T; i++)
        n->token[i] = rand() % 4;
    for (int i = 0; i < 4 * K; i++)
        n->table[i] = (i * 3 + i / K) % E;
    for (int i = 0; i < T * E; i++)
        n->dgamma[i] = 2.0 * rand() / RAND_MAX - 1.0;
}

/* The factors' gradient, by differences of the same objective. */
static void factor_differences(const char *fields, const xp_dialect *d, numbers *n) {
    const double h = 0x1p-17;
    xp_route_scale_bwd_args a = {.scores = xp_tensor_2d(n->scores, XP_F64, T, E),
                                 .idx = xp_tensor_2d(n->idx, XP_I32, T, K),
                                 .dw = xp_tensor_2d(n->dw, XP_F64, T, K),
                                 .dscale = xp_tensor_2d(n->dscale, XP_F64, 1, factors(d)),
                                 .dialect = d,
                                 .logits = xp_tensor_2d(n->logits, XP_F64, T, E)};
    if (d->shared_rows)
        a.dgamma = xp_tensor_2d(n->dgamma, XP_F64, T, d->shared_rows);
    forward(n, d, 1); /* the logits have moved */
    call(&xp_stage_route_scale_bwd, &xp_ref_route_scale_bwd, &a);
    for (int64_t i = 0; i < factors(d); i++) {
        const double at = n->scale_e[i];
        n->scale_e[i] = at + h;
        const double up = loss(n, d);
        n->scale_e[i] = at - h;
        const double want = (up - loss(n, d)) / (2 * h);
        n->scale_e[i] = at;
        if (!(fabs(n->dscale[i] - want) <= 1e-8))
            fail_msg("%s: dscale[%d] is %.12g, differences give %.12g", fields, (int)i, n->dscale[i], want);
    }
}

/* Central differences, h = 2^-17: truncation h^2 and rounding 2^-53 / h are both near 6e-11 of numbers near 1; the
 * third derivatives of these functions are below 100. */
static void differences(const char *fields, unsigned seed) {
    const double h = 0x1p-17;
    const xp_dialect d = record(fields);
    numbers n;
    draw(&n, seed);
    forward(&n, &d, 0);
    xp_route_bwd_args b = {.scores = xp_tensor_2d(n.scores, XP_F64, T, E),
                           .idx = xp_tensor_2d(n.idx, XP_I32, T, d.score == XP_SCORE_SPARSEMIXER ? 2 : K),
                           .dlogits = xp_tensor_2d(n.dlogits, XP_F64, T, E),
                           .dialect = &d,
                           .logits = xp_tensor_2d(n.logits, XP_F64, T, E)};
    b.dw = xp_tensor_2d(n.dw, XP_F64, T, b.idx.dim[1]);
    if (d.expert_scale)
        b.scale_e = xp_tensor_1d(n.scale_e, XP_F64, factors(&d));
    if (d.shared_rows)
        b.dgamma = xp_tensor_2d(n.dgamma, XP_F64, T, d.shared_rows);
    if (d.masked_weight && d.select_bias)
        b.bias = xp_tensor_1d(n.bias, XP_F64, E);
    call(&xp_stage_route_bwd, &xp_ref_route_bwd, &b);
    double most = 0;
    for (int i = 0; i < T * E; i++) {
        const double at = n.logits[i];
        n.logits[i] = at + h;
        const double up = loss(&n, &d);
        n.logits[i] = at - h;
        const double down = loss(&n, &d);
        n.logits[i] = at;
        const double want = (up - down) / (2 * h);
        most = fabs(want) > most ? fabs(want) : most;
        if (!(fabs(n.dlogits[i] - want) <= 1e-8))
            fail_msg("%s: dlogits[%d] is %.12g, differences give %.12g", fields, i, n.dlogits[i], want);
    }
    assert_true(most > 1e-4); /* there was something to see */
    if (d.expert_scale)
        factor_differences(fields, &d, &n);
}

static void gradients(void **state) {
    static const char *const table[] = {
        "renorm=none",
        "renorm=sum",
        "renorm=sum_plus_eps renorm_eps=0.25",
        "renorm=max_eps renorm_eps=0.001",
        "renorm=max_eps renorm_eps=5",
        "score=sigmoid renorm=sum scale=2.5 select_bias=on",
        "score=sigmoid renorm=none",
        "score=sigmoid select_on=logit renorm=sum",
        "score=sqrt_softplus renorm=sum_plus_eps renorm_eps=0.125 scale=1.5",
        "score=softmax_topk select_on=logit renorm=none",
        "score=sparsemixer select_on=logit renorm=none sparse_eps=0.3",
        "renorm=none group_reduce=max n_group=4 topk_group=2 masked_weight=on scale=16",
        "renorm=none group_reduce=max n_group=4 topk_group=1 masked_weight=on",
        "score=sigmoid group_reduce=top2sum n_group=2 topk_group=1 group_mask=-inf select_bias=on",
        "renorm=sum_plus_eps renorm_eps=1e-20 group_reduce=top2sum n_group=4 topk_group=1",
        "renorm=sum logit_softcap=2",
        "renorm=none logit_scale=0.5 logit_softcap=1",
        "score=sigmoid logit_scale=-1.5 renorm=sum",
        "renorm=sum expert_scale=on",
        "score=sqrt_softplus select_on=token_table renorm=sum",
        "renorm=sum weight_div_k=on select_on=first_score",
        "score=softmax_topk select_on=logit renorm=none weight_div_k=on expert_scale=on",
        "score=sparsemixer select_on=logit renorm=none sparse_eps=0.3 weight_div_k=on",
        "score=sigmoid renorm=log_sum",
        "score=sigmoid renorm=log_sum shared_rows=2 select_bias=on scale=8 expert_scale=one aux_coef=0",
        "score=sigmoid renorm=log_sum shared_rows=1 logit_softcap=2 expert_scale=on aux_coef=0",
        "score=sigmoid renorm=sum shared_rows=3 expert_scale=one aux_coef=0",
        "renorm=none shared_rows=2 aux_coef=0",
        "renorm=sum_plus_eps renorm_eps=0.25 shared_rows=1 aux_coef=0",
        "score=softmax_topk select_on=logit renorm=none shared_rows=2 aux_coef=0",
        "renorm=none null_experts=5 null_kind=skip",
        "renorm=sum null_experts=5 null_kind=skip scale=1.5 expert_scale=on",
        "score=sigmoid renorm=sum_plus_eps renorm_eps=0.25 null_experts=5 null_kind=skip",
        "score=softmax_topk select_on=logit renorm=none null_experts=5 null_kind=skip",
        "score=sparsemixer select_on=logit renorm=none sparse_eps=0.3 null_experts=5 null_kind=skip",
    };
    (void)state;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        for (unsigned seed = 1; seed <= 3; seed++)
            differences(table[i], seed);
    }
}

/* ---- choices by hand ---- */

static void chosen(const char *fields, const double *logits, const double *bias, int a, int b, int c) {
    const xp_dialect d = record(fields);
    numbers n;
    draw(&n, 1);
    memcpy(n.logits, logits, E * sizeof *logits);
    if (bias)
        memcpy(n.bias, bias, E * sizeof *bias);
    forward(&n, &d, 0);
    const int32_t want[3] = {a, b, c};
    for (int k = 0; k < K; k++) {
        if (n.idx[k] != want[k])
            fail_msg("%s: slot %d is expert %d, expected %d", fields, k, (int)n.idx[k], (int)want[k]);
    }
}

static void choices(void **state) {
    static const double up[E] = {0, 1, 2, 3, 4, 5, 6, 7}, down[E] = {-8, -8, -8, 8, -8, -8, -8, -8};
    static const double mixed[E] = {4, -9, 3, 2, 1, 1, 0, 0}, low[E] = {-3, -3, -1, -2, -3, -3, -3, -3};
    (void)state;
    chosen("score=sigmoid", up, NULL, 7, 6, 5);
    /* The bias chooses: sigmoid(3) = 0.9526 + 0 against 0.5 + 1, and so on. */
    chosen("score=sigmoid select_bias=on", up, down, 3, 7, 6);
    /* Groups of two. Largest: {4,3} and {2,1}; sums: 5 would be {3,2}, -5 {4,-9}. */
    chosen("score=sigmoid select_on=logit group_reduce=max n_group=4 topk_group=2 group_mask=-inf", mixed, NULL, 0, 2,
           3);
    chosen("score=sigmoid select_on=logit group_reduce=top2sum n_group=4 topk_group=2 group_mask=-inf", mixed, NULL, 2,
           3, 4);
    /* All keys are negative: a mask of 0 puts every expert of another group first, -inf last. */
    chosen("score=sigmoid select_on=logit group_reduce=max n_group=4 topk_group=1 group_mask=0", low, NULL, 0, 1, 4);
    chosen("score=sigmoid select_on=logit group_reduce=max n_group=4 topk_group=1 group_mask=-inf", low, NULL, 2, 3, 0);
}

/* Six experts and two shared ones, whose logits and biases are the largest and are never chosen. */
static void shared_rows(void **state) {
    static const double logits[E] = {0, 1, 2, 3, 4, 5, 9, 8}, bias[E] = {0, 0, 0, 0, 0, 0, 50, 60};
    (void)state;
    chosen("score=sigmoid shared_rows=2 aux_coef=0", logits, NULL, 5, 4, 3);
    chosen("score=sigmoid shared_rows=2 select_bias=on aux_coef=0", logits, bias, 5, 4, 3);
    /* Logits that are no numbers still come before a shared expert. */
    static const double few[E] = {1, (double)NAN, (double)NAN, (double)NAN, (double)NAN, (double)NAN, 9, 8};
    chosen("score=sigmoid shared_rows=2 aux_coef=0", few, NULL, 0, 1, 2);
}

/* Logits a, a, a of the chosen and a - log 2 twice of the shared ones, a = -800, where exp(a) is 0 in f64: log sigmoid
 * is a, so that the weights are 1/4, 1/4, 1/4 and 1/8, 1/8, times 8 and 1.5. */
static void log_sum(void **state) {
    const xp_dialect d = record("score=sigmoid renorm=log_sum shared_rows=2 scale=8 expert_scale=one aux_coef=0");
    numbers n;
    (void)state;
    draw(&n, 1);
    for (int e = 0; e < E; e++)
        n.logits[e] = e < 3 ? -800.0 : e < 6 ? -900.0 : -800.0 - log(2.0);
    n.scale_e[0] = 1.5;
    forward(&n, &d, 0);
    for (int k = 0; k < K; k++)
        assert_true(fabs(n.w[k] - 3.0) < 1e-12);
    assert_true(fabs(n.gamma[0] - 1.5) < 1e-12 && fabs(n.gamma[1] - 1.5) < 1e-12);
    assert_true(n.scores[0] == 0.0);
}

static void by_table(void **state) {
    const xp_dialect d = record("score=sqrt_softplus select_on=token_table");
    numbers n;
    (void)state;
    draw(&n, 2);
    forward(&n, &d, 0);
    for (int t = 0; t < T; t++)
        assert_memory_equal(n.idx + t * K, n.table + n.token[t] * K, K * sizeof *n.idx);
}

/* Logits 2, 1.5 and -1, margin 2 * 0.3: (2 - 1.5) / 2 = 0.25 stays, 3 / 2 goes. Slot 2 leaves expert 0 out: 1.5, then
 * (1.5 + 1) / 1.5 goes, so that its weight is 1. */
static void mixer(void **state) {
    const xp_dialect d = record("score=sparsemixer select_on=logit renorm=none sparse_eps=0.3");
    numbers n;
    (void)state;
    draw(&n, 1);
    for (int e = 0; e < E; e++)
        n.logits[e] = e == 0 ? 2.0 : e == 5 ? 1.5 : -1.0;
    forward(&n, &d, 0);
    assert_int_equal(n.idx[0], 0);
    assert_int_equal(n.idx[1], 5);
    assert_true(fabs(n.w[0] - 1.0 / (1.0 + exp(-0.5))) < 1e-15);
    assert_true(n.w[1] == 1.0);
}

/* Of logits 0, ln 2, ln 4 the largest is an id that adds nothing: it weighs 0, and its score stays in the sum of the
 * others. An id that returns the block's input keeps its weight. */
static void skipped_ids(void **state) {
    (void)state;
    for (int skip = 0; skip < 2; skip++) {
        const xp_dialect d = record(skip ? "renorm=sum null_experts=1 null_kind=skip" : "renorm=sum null_experts=1");
        numbers n;
        draw(&n, 1);
        for (int e = 0; e < E; e++)
            n.logits[e] = e == 7 ? log(4.0) : e == 2 ? log(2.0) : e == 5 ? 0.0 : -30.0;
        forward(&n, &d, 0);
        assert_true(n.idx[0] == 7 && n.idx[1] == 2 && n.idx[2] == 5);
        assert_true(fabs(n.w[0] - (skip ? 0.0 : 4.0 / 7.0)) <= (skip ? 0.0 : 1e-15));
        assert_true(fabs(n.w[1] - 2.0 / 7.0) < 1e-15 && fabs(n.w[2] - 1.0 / 7.0) < 1e-15);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fields_round_trip), cmocka_unit_test(fields_refused), cmocka_unit_test(contradictions),
        cmocka_unit_test(gradients),         cmocka_unit_test(choices),        cmocka_unit_test(shared_rows),
        cmocka_unit_test(log_sum),           cmocka_unit_test(by_table),       cmocka_unit_test(mixer),
        cmocka_unit_test(skipped_ids),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
