/* Stage capacity by hand: which slots a full expert drops under each policy, what ties and NaN do, capacities of 0, of
 * more than the tokens and by the formula, sequences, and rows padded to the capacity on their way to the experts. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "registry.h"
#include "run.h"
#include "xp/capacity.h"
#include "xp/moe.h"
#include "xp/permute.h"

enum { T = 4, K = 2, E = 3, MOST = 16 };

typedef struct {
    xp_dialect d;
    int32_t idx[MOST], kept[MOST];
    double w[MOST];
    int64_t dropped[E], token0, sequence;
} bench;

static bench of(const char *fields[], int n) {
    bench b = {.d = *xp_dialect_find("hf-5.24/mixtral")};
    for (int i = 0; i < n; i += 2)
        assert_int_equal(xp_dialect_set(&b.d, fields[i], fields[i + 1]), XP_OK);
    return b;
}
#define BENCH(...) of((const char *[]){__VA_ARGS__}, (int)(sizeof(const char *[]){__VA_ARGS__} / sizeof(char *)))

static xp_capacity_args args_of(bench *b, int64_t t, int64_t k) {
    return (xp_capacity_args){.idx = xp_tensor_2d(b->idx, XP_I32, t, k),
                              .w = xp_tensor_2d(b->w, XP_F64, t, k),
                              .kept = xp_tensor_2d(b->kept, XP_I32, t, k),
                              .dropped = xp_tensor_1d(b->dropped, XP_I64, E),
                              .dialect = &b->d,
                              .token0 = b->token0,
                              .sequence = b->sequence};
}

static const xp_kernel *row_of(const xp_backend *of_backend, const xp_stage *s) {
    for (const xp_kernel *const *k = of_backend->kernel; *k; k++) {
        if ((*k)->stage == s)
            return *k;
    }
    fail_msg("%s has no row for %s", of_backend->name, s->name);
    return NULL;
}

/* Both formulations, and the stage's own properties. */
static void keeps(bench *b, int64_t t, int64_t k, const int32_t *expected) {
    const xp_backend *const all[] = {xp_backend_ref(), xp_backend_judge(xp_backend_ref())};
    int64_t dropped[E] = {0};
    const xp_capacity_args a = args_of(b, t, k);
    if (xp_stage_capacity.check(&a, NULL) != XP_OK)
        fail_msg("%s", xp_error_text());
    for (int64_t i = 0; i < t * k; i++) {
        if (b->idx[i] >= 0 && b->idx[i] < E && expected[i] < 0)
            dropped[b->idx[i]]++;
    }
    for (int i = 0; i < 2; i++) {
        const xp_kernel *row = row_of(all[i], &xp_stage_capacity);
        void *ws = malloc(row->workspace ? row->workspace(&a, NULL) + 64 : 64);
        const xp_exec x = {.ws = ws};
        memset(b->kept, 0x55, sizeof b->kept);
        memset(b->dropped, 0x55, sizeof b->dropped);
        assert_int_equal(row->run(&x, &a), XP_OK);
        free(ws);
        for (int64_t s = 0; s < t * k; s++) {
            if (b->kept[s] != expected[s])
                fail_msg("%s: slot %d keeps %d, expected %d", all[i]->name, (int)s, b->kept[s], expected[s]);
        }
        assert_memory_equal(b->dropped, dropped, sizeof dropped);
        for (int p = 0; p < xp_stage_capacity.properties; p++) {
            double residual = 1;
            assert_int_equal(xp_stage_capacity.property[p].residual(&a, NULL, &residual), XP_OK);
            assert_true(residual == 0.0);
        }
    }
}
#define KEEPS(b, t, k, ...) keeps((b), (t), (k), (const int32_t[]){__VA_ARGS__})

static void refuses(bench *b, const char *text) {
    const xp_capacity_args a = args_of(b, T, K);
    assert_int_equal(xp_stage_capacity.check(&a, NULL), XP_E_ARG);
    if (!strstr(xp_error_text(), text))
        fail_msg("'%s' does not say '%s'", xp_error_text(), text);
}

/* Expert 0: token 0 second, 1 first, 2 second, 3 first. */
static const int32_t crowd[T * K] = {1, 0, 0, 1, 2, 0, 0, 2};
static const double crowd_w[T * K] = {0.5, 0.25, 0.75, 0.25, 0.5, 0.5, 0.75, 0.25};

static bench crowded(bench b) {
    memcpy(b.idx, crowd, sizeof crowd);
    memcpy(b.w, crowd_w, sizeof crowd_w);
    return b;
}

static void policies(void **state) {
    bench order = crowded(BENCH("capacity", "2")), slots = crowded(BENCH("capacity", "2", "overflow", "slots")),
          priority = crowded(BENCH("capacity", "2", "overflow", "priority"));
    (void)state;
    KEEPS(&order, T, K, 1, 0, 0, 1, 2, -1, -1, 2);
    KEEPS(&slots, T, K, 1, -1, 0, 1, 2, -1, 0, 2);
    KEEPS(&priority, T, K, 1, -1, 0, 1, 2, -1, 0, 2); /* w 0.75 twice */
    priority.w[5] = 1.0;                              /* token 2's second choice goes first */
    KEEPS(&priority, T, K, 1, -1, 0, 1, 2, 0, -1, 2); /* and of two equal ones the lower token */
}

static void ties_and_nan(void **state) {
    bench b = BENCH("capacity", "2", "overflow", "priority");
    (void)state;
    b.w[0] = (double)NAN;
    b.w[1] = -1.0;
    b.w[2] = 0.0;
    b.w[3] = -0.0;
    KEEPS(&b, T, 1, -1, -1, 0, 0); /* zeros are equal and above -1; NaN comes last */
    b.w[2] = b.w[3] = (double)NAN;
    KEEPS(&b, T, 1, 0, 0, -1, -1); /* -1, then NaN by token */
    b.w[0] = b.w[1] = b.w[2] = b.w[3] = (double)INFINITY;
    KEEPS(&b, T, 1, 0, 0, -1, -1);
}

/* A token that names an expert twice takes two of its slots; -1 and null experts take none. */
static void odd_choices(void **state) {
    bench b = BENCH("capacity", "2", "null_experts", "2");
    const int32_t twice[T * K] = {1, 1, 1, -1, 4, 1, 3, -1};
    (void)state;
    memcpy(b.idx, twice, sizeof twice);
    KEEPS(&b, T, K, 1, 1, -1, -1, 4, -1, 3, -1);
    b.d.overflow = XP_OVERFLOW_SLOTS;
    KEEPS(&b, T, K, 1, -1, 1, -1, 4, -1, 3, -1);
}

static void limits(void **state) {
    bench none = crowded(BENCH("capacity", "0")), above = crowded(BENCH("capacity", "1000000")),
          enough = crowded(BENCH("capacity", "4")), priority = crowded(BENCH("capacity", "99", "overflow", "priority"));
    (void)state;
    KEEPS(&none, T, K, 1, 0, 0, 1, 2, 0, 0, 2);
    KEEPS(&above, T, K, 1, 0, 0, 1, 2, 0, 0, 2);
    KEEPS(&enough, T, K, 1, 0, 0, 1, 2, 0, 0, 2);
    KEEPS(&priority, T, K, 1, 0, 0, 1, 2, 0, 0, 2);
    bench empty = BENCH("capacity_factor", "1");
    KEEPS(&empty, 0, K, 0); /* of no tokens an expert takes 0 */
    assert_int_equal(xp_dialect_capacity(&empty.d, 0, E, K), 0);
    assert_int_equal(xp_dialect_capacity(&none.d, T, E, K), T * K);
    assert_int_equal(xp_dialect_limits(&none.d), 0);
}

/* 8 slots, 3 experts: 2.67 each when even. */
static void factors(void **state) {
    bench b = crowded(BENCH("capacity_factor", "1.125")); /* exactly 3 */
    (void)state;
    assert_int_equal(xp_dialect_capacity(&b.d, T, E, K), 3);
    KEEPS(&b, T, K, 1, 0, 0, 1, 2, 0, -1, 2);
    b.d.capacity_factor = 1.13; /* a little more than 3 */
    assert_int_equal(xp_dialect_capacity(&b.d, T, E, K), 4);
    KEEPS(&b, T, K, 1, 0, 0, 1, 2, 0, 0, 2);
    b.d.capacity_factor = 1e-9; /* never 0 while there are tokens */
    assert_int_equal(xp_dialect_capacity(&b.d, T, E, K), 1);
    KEEPS(&b, T, K, 1, 0, -1, -1, 2, -1, -1, -1);
}

/* Each sequence by itself, cut where the global token number says. */
static void sequences(void **state) {
    bench b = BENCH("capacity", "1");
    (void)state;
    b.sequence = 2;
    KEEPS(&b, T, 1, 0, -1, 0, -1);
    b.token0 = 3; /* tokens 3 | 4 5 | 6 */
    KEEPS(&b, T, 1, 0, 0, -1, 0);
    b.sequence = 100;
    KEEPS(&b, T, 1, 0, -1, -1, -1);
    b = BENCH("capacity_factor", "1.5"); /* of 2 tokens ceil(2/3 1.5) = 1 a sequence, of 4 ceil(4/3 1.5) = 2 */
    b.sequence = 2;
    KEEPS(&b, T, 1, 0, -1, 0, -1);
    b.sequence = 0;
    KEEPS(&b, T, 1, 0, 0, -1, -1);
}

static void refusals(void **state) {
    bench b = crowded(BENCH("capacity", "2"));
    (void)state;
    assert_int_equal(xp_dialect_set(&b.d, "overflow", "probs"), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "overflow: 'probs', expected order|priority|slots"));
    assert_int_equal(xp_dialect_set(&b.d, "overflow", "prob"), XP_E_ARG);
    assert_int_equal(xp_dialect_set(&b.d, "capacity", "-1"), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "capacity: '-1'"));
    assert_int_equal(xp_dialect_set(&b.d, "capacity", "2.5"), XP_E_ARG);
    b.d.capacity_factor = 1.0;
    refuses(&b, "capacity: 2 beside capacity_factor 1");
    b.d.capacity = 0;
    b.d.capacity_factor = -1.0;
    refuses(&b, "capacity_factor: -1");
    b.d.capacity_factor = (double)NAN;
    refuses(&b, "capacity_factor: nan");
    b.d.capacity_factor = 0.0;
    b.d.pad_to_capacity = 1;
    refuses(&b, "pad_to_capacity: on");
    b.d.pad_to_capacity = 0;
    b.d.capacity = -3;
    refuses(&b, "capacity: -3");
    b.d.capacity = 2;
    b.d.overflow = (xp_overflow)3;
    refuses(&b, "overflow: 3");
    b.d.overflow = XP_OVERFLOW_ORDER;
    b.sequence = -1;
    refuses(&b, "sequence is -1");
    b.sequence = 0;
    b.token0 = -1;
    refuses(&b, "token0 is -1");
    b.token0 = 0;
    b.idx[3] = E;
    refuses(&b, "idx[1][1] is 3, expected -1 to 2");
    b.idx[3] = -2;
    refuses(&b, "idx[1][1] is -2");
    xp_capacity_args a = args_of(&b, T, K);
    a.dialect = NULL;
    assert_int_equal(xp_stage_capacity.check(&a, NULL), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "dialect is absent"));
}

/* ---- what happens to the rows ---- */

typedef struct {
    double x[T], rows[64];
    int64_t tok[64], counts[E], offsets[E + 1];
    int32_t src[64], pos[T * K];
} placed;

static xp_permute_args permute_of(bench *b, placed *p, int64_t rows, int64_t least, int align) {
    for (int t = 0; t < T; t++)
        p->x[t] = 1.0 + t;
    return (xp_permute_args){.x = xp_tensor_2d(p->x, XP_F64, T, 1),
                             .idx = xp_tensor_2d(b->kept, XP_I32, T, K),
                             .rows = xp_tensor_2d(p->rows, XP_F64, rows, 1),
                             .tok = xp_tensor_1d(p->tok, XP_I64, rows),
                             .src = xp_tensor_1d(p->src, XP_I32, rows),
                             .pos = xp_tensor_2d(p->pos, XP_I32, T, K),
                             .counts = xp_tensor_1d(p->counts, XP_I64, E),
                             .offsets = xp_tensor_1d(p->offsets, XP_I64, E + 1),
                             .align = align,
                             .dialect = &b->d,
                             .least = least};
}

/* Expert 0 keeps tokens 0 and 1 of its four; experts have 2 rows, padded to 5. */
static void rows_are_padded(void **state) {
    const xp_backend *const all[] = {xp_backend_ref(), xp_backend_judge(xp_backend_ref())};
    bench b = crowded(BENCH("capacity", "2", "pad_to_capacity", "on"));
    (void)state;
    KEEPS(&b, T, K, 1, 0, 0, 1, 2, -1, -1, 2);
    for (int i = 0; i < 2; i++) {
        placed p;
        memset(&p, 0x55, sizeof p);
        const xp_permute_args a = permute_of(&b, &p, T * K + E * 5, 5, 1);
        if (xp_stage_permute.check(&a, NULL) != XP_OK)
            fail_msg("%s", xp_error_text());
        const xp_kernel *row = row_of(all[i], &xp_stage_permute);
        void *ws = malloc(row->workspace(&a, NULL) + 64);
        const xp_exec x = {.ws = ws};
        assert_int_equal(row->run(&x, &a), XP_OK);
        free(ws);
        const int64_t counts[E] = {2, 2, 2}, offsets[E + 1] = {0, 5, 10, 15};
        const double rows[15] = {2, 1, 0, 0, 0, 1, 2, 0, 0, 0, 3, 4, 0, 0, 0};
        assert_memory_equal(p.counts, counts, sizeof counts);
        assert_memory_equal(p.offsets, offsets, sizeof offsets);
        assert_memory_equal(p.rows, rows, sizeof rows);
        for (int r = 0; r < 15; r++)
            assert_int_equal(p.tok[r] == -1, rows[r] == 0);
        assert_int_equal(p.pos[5], -1);
        assert_int_equal(p.pos[6], -1);
        for (int q = 0; q < xp_stage_permute.properties; q++) {
            double residual = 1;
            assert_int_equal(xp_stage_permute.property[q].residual(&a, NULL, &residual), XP_OK);
            assert_true(residual == 0.0);
        }
    }
}

static void permute_refusals(void **state) {
    bench b = crowded(BENCH("capacity", "2"));
    placed p;
    (void)state;
    memcpy(b.kept, b.idx, sizeof b.kept);
    xp_permute_args a = permute_of(&b, &p, T * K + E * 5 - 1, 5, 1);
    assert_int_equal(xp_stage_permute.check(&a, NULL), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "M is 22, expected at least T*K + E*(least+align-1) = 23"));
    a.least = -1;
    assert_int_equal(xp_stage_permute.check(&a, NULL), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "least is -1"));
    a.least = (int64_t)1 << 40;
    assert_int_equal(xp_stage_permute.check(&a, NULL), XP_E_ARG);
}

/* ---- the whole block ---- */

typedef struct {
    double x[T], dy[T], wr[E], w1[E], w2[E], y[T], dx[T], dwr[E], dw1[E], dw2[E];
    int32_t idx[T];
} block;

/* One token wide, k = 1, relu without a gate: y = w e_1 e_2 x where x > 0, w = softmax(x wr)[0]. */
static void block_drops(void **state) {
    const xp_backend *const all[] = {xp_backend_ref(), xp_backend_judge(xp_backend_ref())};
    xp_dialect d = *xp_dialect_find("hf-5.24/switch_transformers");
    (void)state;
    d.capacity = 2;
    for (int i = 0; i < 2; i++) {
        block m = {.x = {1, 2, 3, 4}, .dy = {1, 1, 1, 1}, .w1 = {1, 1, 1}, .w2 = {0.5, 1, 1}};
        const xp_moe_args a = {.x = xp_tensor_2d(m.x, XP_F64, T, 1),
                               .dy = xp_tensor_2d(m.dy, XP_F64, T, 1),
                               .wr = xp_tensor_2d(m.wr, XP_F64, E, 1),
                               .w1 = xp_tensor_3d(m.w1, XP_F64, E, 1, 1),
                               .w2 = xp_tensor_3d(m.w2, XP_F64, E, 1, 1),
                               .idx = xp_tensor_2d(m.idx, XP_I32, T, 1),
                               .y = xp_tensor_2d(m.y, XP_F64, T, 1),
                               .dx = xp_tensor_2d(m.dx, XP_F64, T, 1),
                               .dwr = xp_tensor_2d(m.dwr, XP_F64, E, 1),
                               .dw1 = xp_tensor_3d(m.dw1, XP_F64, E, 1, 1),
                               .dw2 = xp_tensor_3d(m.dw2, XP_F64, E, 1, 1),
                               .dialect = &d};
        if (xp_stage_moe.check(&a, NULL) != XP_OK)
            fail_msg("%s", xp_error_text());
        const xp_kernel *row = row_of(all[i], &xp_stage_moe);
        void *ws = malloc(row->workspace(&a, NULL) + 64);
        const xp_exec x = {.ws = ws, .ws_bytes = row->workspace(&a, NULL)};
        assert_int_equal(row->run(&x, &a), XP_OK);
        free(ws);
        double tol[T];
        xp_tensor bound = xp_tensor_2d(tol, XP_F64, T, 1);
        void *bound_ws = malloc(xp_stage_moe.bound_workspace(&a, NULL) + 64);
        assert_int_equal(xp_stage_moe.bound(&a, NULL, xp_stage_operand(&xp_stage_moe, "y"), &a.y, bound_ws, &bound),
                         XP_OK);
        free(bound_ws);
        const double w = 1.0 / 3.0, dl = w * (1.0 - w); /* all logits 0 */
        for (int t = 0; t < T; t++) {
            assert_true(fabs(m.y[t] - (t < 2 ? w * 0.5 * m.x[t] : 0.0)) < 1e-15);
            assert_true(t < 2 ? tol[t] > 1e-17 && tol[t] < 1e-13 : tol[t] < 1e-300); /* nothing is nothing */
            assert_true(fabs(m.dx[t] - (t < 2 ? w * 0.5 : 0.0)) < 1e-15);            /* wr is 0 */
        }
        assert_true(fabs(m.dw2[0] - w * (1 + 2)) < 1e-14); /* tokens 0 and 1 alone */
        assert_true(fabs(m.dw1[0] - w * 0.5 * (1 + 2)) < 1e-14);
        assert_true(fabs(m.dwr[0] - dl * 0.5 * (1 + 4)) < 1e-14); /* a dropped slot's weight has no gradient */
        assert_true(fabs(m.dwr[1] + w * w * 0.5 * (1 + 4)) < 1e-14);
    }
}

static void block_refuses_priority(void **state) {
    block m = {.x = {1}};
    xp_dialect d = *xp_dialect_find("hf-5.24/switch_transformers");
    const xp_moe_args a = {.x = xp_tensor_2d(m.x, XP_F64, T, 1),
                           .dy = xp_tensor_2d(m.dy, XP_F64, T, 1),
                           .wr = xp_tensor_2d(m.wr, XP_F64, E, 1),
                           .w1 = xp_tensor_3d(m.w1, XP_F64, E, 1, 1),
                           .w2 = xp_tensor_3d(m.w2, XP_F64, E, 1, 1),
                           .idx = xp_tensor_2d(m.idx, XP_I32, T, 1),
                           .y = xp_tensor_2d(m.y, XP_F64, T, 1),
                           .dx = xp_tensor_2d(m.dx, XP_F64, T, 1),
                           .dwr = xp_tensor_2d(m.dwr, XP_F64, E, 1),
                           .dw1 = xp_tensor_3d(m.dw1, XP_F64, E, 1, 1),
                           .dw2 = xp_tensor_3d(m.dw2, XP_F64, E, 1, 1),
                           .dialect = &d};
    (void)state;
    assert_int_equal(xp_stage_moe.check(&a, NULL), XP_OK);
    d.overflow = XP_OVERFLOW_PRIORITY;
    assert_int_equal(xp_stage_moe.check(&a, NULL), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "overflow is priority, expected order or slots"));
    d.capacity = 0; /* nothing is dropped then */
    assert_int_equal(xp_stage_moe.check(&a, NULL), XP_OK);
}

/* ---- a layer on a mesh ---- */

typedef struct {
    int64_t dropped, compared, remote;
} ran;

static xp_status run_case(const xp_case *c, void *arg) {
    const xp_run_options o = {.impl = xp_backend_ref(), .against_one_rank = 1};
    ran *out = arg;
    xp_run_result r;
    XP_TRY(xp_case_run(c, &o, &r));
    if (r.judgement.verdict != XP_V_PASS)
        fail_msg("%s: %s", xp_verdict_name(r.judgement.verdict), r.judgement.text);
    assert_non_null(r.parity);
    *out = (ran){xp_parity_slots(r.parity), r.parity_rows, 0};
    for (int i = 0; i < r.judgement.lines; i++) {
        const xp_finding *f = &r.judgement.line[i];
        if (strcmp(f->stage, "dispatch") == 0 && strcmp(f->operand, "recv") == 0)
            out->remote = f->remote;
    }
    xp_run_result_close(&r);
    return XP_OK;
}

static ran run_layer(const char *fields) {
    char line[256];
    ran out = {-1, -1, -1};
    int number = 0;
    snprintf(line, sizeof line, "layer T=128 E=8 K=2 H=16 F=12 dtype=f32 mesh=sim:fsdp=2,ep=2 %s", fields);
    if (xp_case_expand(line, NULL, &number, run_case, &out) != XP_OK)
        fail_msg("%s: %s", line, xp_error_text());
    return out;
}

/* 64 tokens a rank, 16 slots an expert when even: all are full at 4. What a full expert drops takes no part in
 * dispatch, and depends on the mesh; where none was dropped every row is compared with the one-rank run. */
static void layer_drops(void **state) {
    const ran none = run_layer("capacity=0"), above = run_layer("capacity=128"), four = run_layer("capacity=4"),
              two = run_layer("capacity=2 overflow=slots"), best = run_layer("capacity=2 overflow=priority"),
              factor = run_layer("capacity_factor=0.25 pad_to_capacity=on");
    (void)state;
    assert_int_equal(none.dropped, 0);
    assert_true(none.compared > 0 && none.remote > 100);
    assert_int_equal(above.dropped, 0);
    assert_true(above.compared > none.compared); /* what is kept is compared, too */
    assert_int_equal(above.remote, none.remote);
    assert_int_equal(four.compared, 0);
    assert_int_equal(four.remote, 2 * 4 * 4);                      /* each rank sends 4 experts 4 rows */
    assert_int_equal(four.dropped, 2 * 128 * 2 - (1 + 2) * 8 * 4); /* one rank, then two */
    assert_int_equal(two.remote, 2 * 4 * 2);
    assert_int_equal(two.dropped, 2 * 128 * 2 - (1 + 2) * 8 * 2);
    assert_int_equal(best.remote, two.remote);
    assert_int_equal(factor.remote, four.remote); /* ceil(64 2 / 8 / 4) */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(policies),
        cmocka_unit_test(ties_and_nan),
        cmocka_unit_test(odd_choices),
        cmocka_unit_test(limits),
        cmocka_unit_test(factors),
        cmocka_unit_test(sequences),
        cmocka_unit_test(refusals),
        cmocka_unit_test(rows_are_padded),
        cmocka_unit_test(permute_refusals),
        cmocka_unit_test(block_drops),
        cmocka_unit_test(block_refuses_priority),
        cmocka_unit_test(layer_drops),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
