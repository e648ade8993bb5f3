/* Relations hold on the reference for every preset, and each of them is seen to fail: on rows that look at a token's
 * place, at an expert's number, at the size of the batch, at the mesh, at the size of a gradient, or that break ties
 * the other way. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "fill.h"
#include "registry.h"
#include "relation_bound.h"
#include "relation_data.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/expert.h"
#include "xp/permute.h"
#include "xp/route.h"
#include "xp/router.h"
#include "xp/wgrad.h"

/* ---- a backend of the reference's rows but one ---- */

static const xp_kernel *ref_row(const xp_stage *s) {
    for (const xp_kernel *const *k = xp_backend_ref()->kernel; *k; k++) {
        if ((*k)->stage == s)
            return *k;
    }
    fail_msg("no row for %s", s->name);
    return NULL;
}

static xp_status by_ref(const xp_exec *x, const xp_stage *s, const void *args) {
    return ref_row(s)->run(x, args);
}

static const xp_kernel *list[64];
static xp_kernel changed[4];

/* Rows of the reference, with those of `row` (n of them, run functions only) in the place of the same stages'. */
static xp_backend backend_with(const xp_kernel *row, int n) {
    xp_backend b = *xp_backend_ref();
    int rows = 0;
    b.name = "changed";
    for (const xp_kernel *const *k = xp_backend_ref()->kernel; *k; k++) {
        list[rows] = *k;
        for (int i = 0; i < n; i++) {
            if ((*k)->stage != row[i].stage)
                continue;
            changed[i] = row[i];
            changed[i].name = "changed";
            changed[i].workspace = (*k)->workspace;
            list[rows] = &changed[i];
        }
        rows++;
    }
    list[rows] = NULL;
    b.kernel = list;
    return b;
}

static double at(const xp_tensor *t, int64_t i) {
    return xp_widen(t->data, t->dtype, xp_tensor_offset(t, i));
}

static void put(const xp_tensor *t, int64_t i, double v) {
    xp_fill_store(t, i, v); /* contiguous, as the chain's outputs are */
}

static void times(const xp_tensor *t, int64_t i, double factor) {
    put(t, i, at(t, i) * factor);
}

/* ---- rows that are wrong ---- */

/* Doubles every third row. */
static xp_status combine_by_place(const xp_exec *x, const void *args) {
    const xp_combine_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_combine, args));
    for (int64_t t = 0; t < a->y.dim[0]; t += 3) {
        for (int64_t h = 0; h < a->y.dim[1]; h++)
            times(&a->y, t * a->y.dim[1] + h, 2.0);
    }
    return XP_OK;
}

/* Expert 5 has an advantage. */
static xp_status router_by_number(const xp_exec *x, const void *args) {
    const xp_router_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_router, args));
    for (int64_t t = 0; t < a->logits.dim[0]; t++)
        put(&a->logits, t * a->logits.dim[1] + 5, at(&a->logits, t * a->logits.dim[1] + 5) + 0.125);
    return XP_OK;
}

/* A mean where a sum is due. */
static xp_status wgrad_mean(const xp_exec *x, const void *args) {
    const xp_wgrad_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_wgrad, args));
    for (int64_t i = 0; i < xp_tensor_count(&a->dw); i++)
        times(&a->dw, i, 1.0 / (double)a->dy.dim[0]);
    return XP_OK;
}

/* Loses a thousandth where the batch is small. */
static xp_status wgrad_small(const xp_exec *x, const void *args) {
    const xp_wgrad_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_wgrad, args));
    for (int64_t i = 0; a->dy.dim[0] == 12 && i < xp_tensor_count(&a->dw); i++)
        times(&a->dw, i, 1.0 - 0x1p-10);
    return XP_OK;
}

/* On a mesh the last row that arrives is lost. */
static xp_status dispatch_loses(const xp_exec *x, const void *args) {
    const xp_dispatch_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_dispatch, args));
    const int64_t L = a->recv_offsets.dim[0] - 1, rows = ((const int64_t *)a->recv_offsets.data)[L];
    for (int64_t h = 0; x->mesh->axis[XP_EP]->size > 1 && rows > 0 && h < a->recv.dim[1]; h++)
        put(&a->recv, (rows - 1) * a->recv.dim[1] + h, 0.0);
    return XP_OK;
}

/* Gradients above 1/4 are cut off. */
static xp_status expert_bwd_clamps(const xp_exec *x, const void *args) {
    const xp_expert_bwd_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_expert_bwd, args));
    const int64_t L = a->offsets.dim[0] - 1, n = ((const int64_t *)a->offsets.data)[L] * a->dx.dim[1];
    for (int64_t i = 0; i < n; i++)
        put(&a->dx, i, fmax(fmin(at(&a->dx, i), 0.25), -0.25));
    return XP_OK;
}

static int chosen(const xp_tensor *idx, int64_t t, int64_t e) {
    for (int64_t k = 0; k < idx->dim[1]; k++) {
        if (((const int32_t *)idx->data)[t * idx->dim[1] + k] == e)
            return 1;
    }
    return 0;
}

static int equal_keys(const xp_route_args *a, int64_t t, int64_t e, int64_t f) {
    const int64_t Z = a->logits.dim[1];
    return at(&a->logits, t * Z + e) == at(&a->logits, t * Z + f) &&
           (!a->bias.data || at(&a->bias, e) == at(&a->bias, f));
}

/* The highest of those that are equal, from the first slot on. */
static xp_status route_higher(const xp_exec *x, const void *args) {
    const xp_route_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_route, args));
    const int64_t K = a->idx.dim[1];
    for (int64_t t = 0; !a->replay && !a->table.data && t < a->idx.dim[0]; t++) {
        int32_t *idx = (int32_t *)a->idx.data + t * K;
        for (int64_t k = 0; k < K; k++) {
            for (int64_t e = a->logits.dim[1] - 1; e > idx[k]; e--) {
                if (!equal_keys(a, t, e, idx[k]))
                    continue;
                if (k + 1 < K && idx[k + 1] == e)
                    idx[k + 1] = idx[k];
                else if (chosen(&a->idx, t, e))
                    continue;
                idx[k] = (int32_t)e;
                break;
            }
        }
    }
    return XP_OK;
}

/* The last slot of every third token goes to an expert that nobody chose. */
static xp_status route_by_place(const xp_exec *x, const void *args) {
    const xp_route_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_route, args));
    const int64_t K = a->idx.dim[1];
    for (int64_t t = 1; !a->replay && t < a->idx.dim[0]; t += 3) {
        int32_t e = 0;
        while (chosen(&a->idx, t, e))
            e++;
        ((int32_t *)a->idx.data)[t * K + K - 1] = e;
    }
    return XP_OK;
}

/* One unit in the last place of every second row's f32, pads between experts counted. */
static xp_status expert_shakes(const xp_exec *x, const void *args) {
    const xp_expert_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_expert, args));
    const int64_t L = a->offsets.dim[0] - 1, rows = ((const int64_t *)a->offsets.data)[L], H = a->y.dim[1];
    for (int64_t i = H; a->y.dtype == XP_F32 && i < rows * H; i += i % H == H - 1 ? H + 1 : 1)
        ((float *)a->y.data)[i] = nextafterf(((float *)a->y.data)[i], INFINITY);
    return XP_OK;
}

/* The weight gradients of a mesh lean by what `lean` says. */
static double lean;
static xp_status wgrad_leans(const xp_exec *x, const void *args) {
    const xp_wgrad_args *a = args;
    XP_TRY(by_ref(x, &xp_stage_wgrad, args));
    for (int64_t i = 0; x->mesh->axis[XP_EP]->size > 1 && i < xp_tensor_count(&a->dw); i++)
        times(&a->dw, i, 1.0 + lean);
    return XP_OK;
}

/* Takes the first rank's tokens for the first of the batch, and so on. */
static xp_status permute_by_rank(const xp_exec *x, const void *args) {
    const xp_permute_args *a = args;
    const xp_comm *ep = x->mesh->axis[XP_EP];
    XP_TRY(by_ref(x, &xp_stage_permute, args));
    for (int64_t i = 0; ep->size > 1 && i < a->tok.dim[0]; i++) {
        int64_t *tok = (int64_t *)a->tok.data + i;
        if (i < ((const int64_t *)a->offsets.data)[a->offsets.dim[0] - 1] && *tok >= 0)
            *tok += ep->rank * a->x.dim[0] - a->token0;
    }
    return XP_OK;
}

static xp_status router_fails(const xp_exec *x, const void *args) {
    (void)x;
    (void)args;
    return XP_FAIL(XP_E_ARG, "out of ideas");
}

static xp_status router_rests(const xp_exec *x, const void *args) {
    (void)x;
    (void)args;
    return XP_OK;
}

static xp_status wgrad_zero(const xp_exec *x, const void *args) {
    const xp_wgrad_args *a = args;
    (void)x;
    for (int64_t i = 0; i < xp_tensor_count(&a->dw); i++)
        put(&a->dw, i, 0.0);
    return XP_OK;
}

/* ---- what each of them breaks ---- */

#define BOTH (XP_DET_RUN | XP_DET_MESH)
static xp_relations relate(const xp_stage *s, uint32_t det, xp_status (*run)(const xp_exec *, const void *),
                           const char *preset) {
    const xp_kernel row = {.stage = s, .det = det, .run = run};
    const xp_backend b = backend_with(&row, 1);
    xp_relations x;
    assert_int_equal(xp_relations_run(&b, xp_dialect_find(preset), &x), XP_OK);
    return x;
}

/* Marks of the relations on one kind of numbers, as "==F=..": F failed, n not applicable, u cannot run. */
static const char *marks(const xp_relations *x, xp_numbers n) {
    static char text[XP_RELATIONS + 1];
    for (int i = 0; i < XP_RELATIONS; i++)
        text[i] = "=<nuF"[x->on[n][i].held];
    return text;
}

/* In the order ranks, tokens, experts, ties, split, scale. */
static void each_relation_fails(void **state) {
    static const struct {
        const xp_stage *stage;
        xp_status (*run)(const xp_exec *, const void *);
        const char *exact;
    } row[] = {
        {&xp_stage_combine, combine_by_place, "FF==F="},
        {&xp_stage_router, router_by_number, "==FF=="},
        {&xp_stage_wgrad, wgrad_mean, "F===F="},
        {&xp_stage_dispatch, dispatch_loses, "F====="},
        {&xp_stage_expert_bwd, expert_bwd_clamps, "=====F"},
        {&xp_stage_route, route_higher, "===F=="},
        {&xp_stage_route, route_by_place, "FFFFF="},
    };
    (void)state;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        const xp_relations x = relate(row[i].stage, BOTH, row[i].run, "hf-5.24/flint");
        if (strcmp(marks(&x, XP_NUMBERS_EXACT), row[i].exact) != 0) {
            for (int k = 0; k < XP_RELATIONS; k++)
                print_message("%s: %s\n", xp_relation_name((xp_relation)k), x.on[0][k].text);
            fail_msg("row %zu: %s, expected %s", i, marks(&x, XP_NUMBERS_EXACT), row[i].exact);
        }
    }
}

/* The text says which output, which row, and both values. */
static void failure_says_where(void **state) {
    (void)state;
    const xp_relations x = relate(&xp_stage_combine, BOTH, combine_by_place, "hf-5.24/flint");
    assert_non_null(strstr(x.on[XP_NUMBERS_EXACT][XP_REL_TOKENS].text, "y["));
    const xp_relations z = relate(&xp_stage_wgrad, BOTH, wgrad_mean, "hf-5.24/flint");
    assert_non_null(strstr(z.on[XP_NUMBERS_EXACT][XP_REL_SPLIT].text, "dwr["));
    const xp_relations w = relate(&xp_stage_route, BOTH, route_higher, "hf-5.24/flint");
    assert_non_null(strstr(w.on[XP_NUMBERS_EXACT][XP_REL_TIES].text, "lower index"));
}

/* A row that promises bits owes them; one that does not owes the bounds. */
static void bounds_where_no_bits_are_promised(void **state) {
    (void)state;
    const xp_relations firm = relate(&xp_stage_expert, BOTH, expert_shakes, "hf-5.24/flint");
    const xp_relations loose = relate(&xp_stage_expert, XP_DET_RUN, expert_shakes, "hf-5.24/flint");
    assert_string_equal(marks(&firm, XP_NUMBERS_EXACT), "======");
    assert_string_equal(marks(&firm, XP_NUMBERS_REAL_F32), "FF=n<=");
    assert_string_equal(marks(&loose, XP_NUMBERS_REAL_F32), "<<=n<=");
    assert_true(loose.on[XP_NUMBERS_REAL_F32][XP_REL_TOKENS].by_bound > 0);
    assert_true(loose.on[XP_NUMBERS_REAL_F32][XP_REL_TOKENS].ratio > 0 &&
                loose.on[XP_NUMBERS_REAL_F32][XP_REL_TOKENS].ratio <= 1);
}

/* On a mesh: gradients by blocks of tokens, and folded, have the sum of the blocks' bounds. */
static void bounds_of_blocks(void **state) {
    (void)state;
    lean = 0x1p-23;
    const xp_relations firm = relate(&xp_stage_wgrad, BOTH, wgrad_leans, "hf-5.24/gpt_oss");
    const xp_relations loose = relate(&xp_stage_wgrad, XP_DET_RUN, wgrad_leans, "hf-5.24/gpt_oss");
    lean = 0x1p-12;
    const xp_relations wrong = relate(&xp_stage_wgrad, XP_DET_RUN, wgrad_leans, "hf-5.24/gpt_oss");
    assert_string_equal(marks(&loose, XP_NUMBERS_EXACT), "F=====");
    assert_int_equal(firm.on[XP_NUMBERS_REAL_F32][XP_REL_RANKS].held, XP_HELD_NOT);
    assert_int_equal(loose.on[XP_NUMBERS_REAL_F32][XP_REL_RANKS].held, XP_HELD_BOUND);
    assert_int_equal(wrong.on[XP_NUMBERS_REAL_F32][XP_REL_RANKS].held, XP_HELD_NOT);
    /* the fold goes by token, not by rank: the blocks are dealt in another order */
    const xp_relations rank = relate(&xp_stage_permute, BOTH, permute_by_rank, "hf-5.24/gpt_oss");
    assert_int_equal(rank.on[XP_NUMBERS_REAL_F32][XP_REL_RANKS].held, XP_HELD_NOT);
    assert_non_null(strstr(rank.on[XP_NUMBERS_REAL_F32][XP_REL_RANKS].text, "dw1["));
}

/* The bounds are narrow enough to see a thousandth in f32, and choices are judged on the stage's keys. */
static void bounds_refuse(void **state) {
    (void)state;
    const xp_relations small = relate(&xp_stage_wgrad, BOTH, wgrad_small, "hf-5.24/flint");
    assert_int_equal(small.on[XP_NUMBERS_REAL_F32][XP_REL_SPLIT].held, XP_HELD_NOT);
    assert_int_equal(small.on[XP_NUMBERS_REAL_F32][XP_REL_TOKENS].held, XP_HELD_BITS);
    const xp_relations place = relate(&xp_stage_route, XP_DET_RUN, route_by_place, "hf-5.24/flint");
    assert_int_equal(place.on[XP_NUMBERS_REAL_F32][XP_REL_TOKENS].held, XP_HELD_NOT);
    assert_non_null(strstr(place.on[XP_NUMBERS_REAL_F32][XP_REL_TOKENS].text, "idx["));
}

/* A failed row, an output that nobody wrote and one of zeros fail every relation; they do not pass for want of data. */
static void nothing_shown_is_no_pass(void **state) {
    (void)state;
    const xp_relations error = relate(&xp_stage_router, BOTH, router_fails, "hf-5.24/flint");
    const xp_relations idle = relate(&xp_stage_router, BOTH, router_rests, "hf-5.24/flint");
    const xp_relations zero = relate(&xp_stage_wgrad, BOTH, wgrad_zero, "hf-5.24/flint");
    for (int n = 0; n < XP_NUMBERS; n++) {
        assert_string_equal(marks(&error, (xp_numbers)n), "FFFFFF");
        assert_string_equal(marks(&idle, (xp_numbers)n), "FFFFFF");
        assert_string_equal(marks(&zero, (xp_numbers)n), "FFFFFF");
    }
    assert_non_null(strstr(error.on[0][0].text, "out of ideas"));
    assert_non_null(strstr(idle.on[0][0].text, "not written"));
    assert_non_null(strstr(zero.on[0][0].text, "zeros"));
}

/* ---- the reference ---- */

static void presets_keep_all(void **state) {
    (void)state;
    for (const xp_dialect *d = xp_dialects; d->name; d++) {
        xp_relations x;
        const int table = d->select_on == XP_ON_TOKEN_TABLE;
        assert_int_equal(xp_relations_run(xp_backend_ref(), d, &x), XP_OK);
        if (strcmp(marks(&x, XP_NUMBERS_EXACT), table ? "===n==" : "======") != 0)
            fail_msg("%s: %s", d->name, marks(&x, XP_NUMBERS_EXACT));
        for (int n = XP_NUMBERS_REAL; n < XP_NUMBERS; n++) {
            const char *m = marks(&x, (xp_numbers)n);
            if (m[0] != '=' || m[5] != '=' || strpbrk(m, "uF"))
                fail_msg("%s: %s: %s", d->name, xp_numbers_name((xp_numbers)n), m);
        }
    }
}

/* A record that cannot run is no pass, and the reason names its field. */
static void unsupported_says_why(void **state) {
    xp_dialect d = *xp_dialect_find("hf-5.24/deepseek_v3");
    xp_relations x;
    (void)state;
    d.n_group = 7;
    assert_int_equal(xp_relations_run(xp_backend_ref(), &d, &x), XP_OK);
    assert_string_equal(marks(&x, XP_NUMBERS_EXACT), "uuuuuu");
    assert_string_equal(marks(&x, XP_NUMBERS_REAL_F32), "uuuuuu");
    assert_non_null(strstr(x.on[0][0].text, "group"));
}

/* A backend without rows of these stages shows nothing of itself. */
static void foreign_rows_are_not_its_own(void **state) {
    static const xp_kernel *const none[] = {NULL};
    xp_backend b = *xp_backend_ref();
    xp_relations x;
    (void)state;
    b.kernel = none;
    assert_int_equal(xp_relations_run(&b, xp_dialect_find("hf-5.24/flint"), &x), XP_OK);
    assert_string_equal(marks(&x, XP_NUMBERS_EXACT), "uuuuuu");
    assert_int_equal(x.own, 0);
    assert_int_not_equal(x.lent, 0);
}

/* ---- the numbers ---- */

/* The same sums in f32 from the far end. */
static xp_status router_backwards(const xp_exec *x, const void *args) {
    const xp_router_args *a = args;
    const int64_t Z = a->w.dim[0], H = a->w.dim[1];
    (void)x;
    for (int64_t i = 0; i < a->x.dim[0] * Z; i++) {
        float sum = a->bias.data ? (float)at(&a->bias, i % Z) : 0.0f;
        for (int64_t h = H - 1; h >= 0; h--)
            sum += (float)at(&a->x, i / Z * H + h) * (float)at(&a->w, i % Z * H + h);
        put(&a->logits, i, (double)sum);
    }
    return XP_OK;
}

static xp_status router_bwd_backwards(const xp_exec *x, const void *args) {
    const xp_router_bwd_args *a = args;
    const int64_t Z = a->w.dim[0], H = a->w.dim[1];
    (void)x;
    for (int64_t i = 0; i < a->dx.dim[0] * H; i++) {
        float sum = 0.0f;
        for (int64_t e = Z - 1; e >= 0; e--)
            sum += (float)at(&a->dlogits, i / H * Z + e) * (float)at(&a->w, e * H + i % H);
        put(&a->dx, i, (double)sum);
    }
    return XP_OK;
}

static xp_status wgrad_backwards(const xp_exec *x, const void *args) {
    const xp_wgrad_args *a = args;
    const int64_t L = a->offsets.dim[0] - 1, N = a->dy.dim[1], R = a->x.dim[1], *border = a->offsets.data;
    (void)x;
    for (int64_t i = 0; i < L * N * R; i++) {
        const int64_t l = i / (N * R), n = i / R % N, c = i % R;
        float sum = 0.0f;
        for (int64_t r = border[l + 1] - 1; r >= border[l]; r--)
            sum += (float)at(&a->dy, r * N + n) * (float)at(&a->x, r * R + c);
        put(&a->dw, i, (double)sum);
    }
    return XP_OK;
}

/* Outputs whose bits differ between two backends on one rank, as a set. */
static uint32_t differing(const xp_backend *one, const xp_backend *other, const xp_dialect *d, xp_numbers n) {
    const xp_chain_how how = {.ranks = 1, .align = 1};
    xp_relation_data x;
    xp_chain_run a, b;
    uint32_t out = 0;
    assert_int_equal(xp_relation_data_open(d, n, &x), XP_OK);
    assert_int_equal(xp_chain(one, &x.in, &how, &a), XP_OK);
    assert_int_equal(xp_chain(other, &x.in, &how, &b), XP_OK);
    for (int o = 0; o < XP_CHAIN_OUTS; o++) {
        const xp_tensor *t = &a.out[o];
        for (int64_t i = 0; t->data && i < xp_tensor_count(t); i++) {
            if (at(t, i) != at(&b.out[o], i))
                out |= XP_BIT(o);
        }
    }
    xp_chain_close(&a);
    xp_chain_close(&b);
    xp_relation_data_close(&x);
    return out;
}

/* On exact numbers no order and no width of summation shows, for any preset; on real ones it does. */
static void exact_numbers_hide_every_order(void **state) {
    static const xp_kernel row[] = {
        {.stage = &xp_stage_router, .det = XP_DET_RUN, .run = router_backwards},
        {.stage = &xp_stage_router_bwd, .det = XP_DET_RUN, .run = router_bwd_backwards},
        {.stage = &xp_stage_wgrad, .det = XP_DET_RUN, .run = wgrad_backwards},
    };
    (void)state;
    const xp_backend b = backend_with(row, 3);
    for (const xp_dialect *d = xp_dialects; d->name; d++) {
        const uint32_t odd = differing(xp_backend_ref(), &b, d, XP_NUMBERS_EXACT);
        if (odd)
            fail_msg("%s: outputs %x differ", d->name, odd);
    }
    const uint32_t real = differing(xp_backend_ref(), &b, xp_dialect_find("hf-5.24/flint"), XP_NUMBERS_REAL_F32);
    assert_true(real & XP_BIT(XP_CHAIN_LOGITS) && real & XP_BIT(XP_CHAIN_DX) && real & XP_BIT(XP_CHAIN_DW1) &&
                real & XP_BIT(XP_CHAIN_DSW1));
}

/* Every expert is chosen by exact numbers, null experts too, and nobody by more than two tokens. */
static void exact_numbers_reach_every_expert(void **state) {
    static const char *const preset[] = {"hf-5.24/flint", "hf-5.24/longcat_flash", "hf-5.24/deepseek_v3"};
    const xp_chain_how how = {.ranks = 1, .align = 1, .route_only = 1};
    (void)state;
    for (size_t p = 0; p < sizeof preset / sizeof *preset; p++) {
        int64_t tokens[XP_RELATION_EXPERTS] = {0};
        xp_relation_data x;
        xp_chain_run a;
        assert_int_equal(xp_relation_data_open(xp_dialect_find(preset[p]), XP_NUMBERS_EXACT, &x), XP_OK);
        assert_int_equal(xp_chain(xp_backend_ref(), &x.in, &how, &a), XP_OK);
        for (int64_t i = 0; i < x.in.T * x.in.K; i++)
            tokens[((const int32_t *)a.out[XP_CHAIN_IDX].data)[i]]++;
        for (int64_t e = 0; e < x.in.Z; e++)
            assert_in_range(tokens[e], 1, 2);
        xp_chain_close(&a);
        xp_relation_data_close(&x);
    }
}

/* The order of experts keeps groups, and null experts at the end; neither it nor that of tokens is the old one. */
static void orders_are_orders(void **state) {
    static const char *const preset[] = {"hf-5.24/flint", "hf-5.24/longcat_flash", "hf-5.24/deepseek_v3",
                                         "hf-5.24/mistral4"};
    (void)state;
    for (size_t p = 0; p < sizeof preset / sizeof *preset; p++) {
        const xp_dialect *d = xp_dialect_find(preset[p]);
        int order[XP_RELATION_EXPERTS], seen[XP_RELATION_EXPERTS] = {0}, moved = 0, groups = 0;
        xp_relation_data x;
        assert_int_equal(xp_relation_data_open(d, XP_NUMBERS_REAL, &x), XP_OK);
        xp_relation_experts(&x.in, order);
        const int size = (int)x.in.E / (d->group_reduce == XP_GROUP_NONE ? 1 : d->n_group);
        for (int e = 0; e < (int)x.in.Z; e++) {
            seen[order[e]]++;
            moved += order[e] != e;
            groups += order[e] / size != e / size;
            if (e >= (int)x.in.E)
                assert_int_equal(order[e], e);
            else if (e % size)
                assert_int_equal(order[e] / size, order[e - 1] / size);
        }
        for (int e = 0; e < (int)x.in.Z; e++)
            assert_int_equal(seen[e], 1);
        assert_true(moved > (int)x.in.E / 2);
        assert_int_equal(groups > 0, size < (int)x.in.E);
        xp_relation_data_close(&x);
    }
}

/* A choice is open where scores are equal, and closed where they are not. */
static void choices_are_judged_by_keys(void **state) {
    const int32_t first[] = {0, 1}, other[] = {0, 2}, wrong[] = {0, 3}, none[] = {0, -1};
    int open = -1;
    (void)state;
    xp_relation_data x;
    assert_int_equal(xp_relation_data_open(xp_dialect_find("hf-5.24/flint"), XP_NUMBERS_EXACT, &x), XP_OK);
    float l[16] = {2, 1, 1, 0.5f};
    const xp_tensor logits = xp_tensor_2d(l, XP_F32, 1, 16);
    assert_int_equal(xp_relation_choice(&x.in, &logits, 0, first, &open), XP_OK);
    assert_int_equal(open, 1);
    assert_int_equal(xp_relation_choice(&x.in, &logits, 0, other, &open), XP_OK);
    assert_int_equal(open, 1);
    assert_int_equal(xp_relation_choice(&x.in, &logits, 0, wrong, &open), XP_OK);
    assert_int_equal(open, 0);
    assert_int_equal(xp_relation_choice(&x.in, &logits, 0, none, &open), XP_OK);
    assert_int_equal(open, 0);
    xp_relation_data_close(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_relation_fails),
        cmocka_unit_test(failure_says_where),
        cmocka_unit_test(bounds_where_no_bits_are_promised),
        cmocka_unit_test(bounds_of_blocks),
        cmocka_unit_test(bounds_refuse),
        cmocka_unit_test(nothing_shown_is_no_pass),
        cmocka_unit_test(presets_keep_all),
        cmocka_unit_test(unsupported_says_why),
        cmocka_unit_test(foreign_rows_are_not_its_own),
        cmocka_unit_test(exact_numbers_hide_every_order),
        cmocka_unit_test(exact_numbers_reach_every_expert),
        cmocka_unit_test(orders_are_orders),
        cmocka_unit_test(choices_are_judged_by_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
