/* How a layer passes on what its router gives to shared experts: rows that run as the reference's do and keep copies of
 * what went through them. Whether a row is right is judged elsewhere; a wrong tensor between two right rows is not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "ref.h"
#include "registry.h"
#include "run.h"
#include "xp/residual.h"
#include "xp/route.h"
#include "xp/shared.h"

enum { MOST = 4096 };

typedef struct {
    float v[MOST];
    int64_t n;
} copy;

static struct {
    copy gamma, dgamma, dx;            /* as made */
    copy in, in_back, dslots, dfactor; /* as taken: by shared, its backward, the router's, the factor's */
    copy sum[2];                       /* second operands of the sums of a layer's backward, in their order */
    int sums, route, shared, back, router, factor;
} seen;

static void keep(const xp_tensor *t, copy *out) {
    assert_non_null(t->data);
    out->n = xp_tensor_count(t);
    assert_true(out->n > 0 && out->n <= MOST);
    for (int64_t i = 0; i < out->n; i++)
        out->v[i] = (float)xp_widen(t->data, t->dtype, xp_tensor_offset(t, i));
}

static xp_status route_run(const xp_exec *x, const void *args) {
    const xp_route_args *a = args;
    XP_TRY(xp_ref_route.run(x, args));
    keep(&a->gamma, &seen.gamma);
    seen.route++;
    return XP_OK;
}

static xp_status shared_run(const xp_exec *x, const void *args) {
    const xp_shared_args *a = args;
    keep(&a->gamma, &seen.in);
    seen.shared++;
    return xp_ref_shared.run(x, args);
}

static xp_status shared_back_run(const xp_exec *x, const void *args) {
    const xp_shared_bwd_args *a = args;
    keep(&a->gamma, &seen.in_back);
    XP_TRY(xp_ref_shared_bwd.run(x, args));
    keep(&a->dgamma, &seen.dgamma);
    keep(&a->dx, &seen.dx);
    seen.back++;
    return XP_OK;
}

static xp_status route_back_run(const xp_exec *x, const void *args) {
    const xp_route_bwd_args *a = args;
    keep(&a->dgamma, &seen.dslots);
    seen.router++;
    return xp_ref_route_bwd.run(x, args);
}

static xp_status factor_run(const xp_exec *x, const void *args) {
    const xp_route_scale_bwd_args *a = args;
    keep(&a->dgamma, &seen.dfactor);
    seen.factor++;
    return xp_ref_route_scale_bwd.run(x, args);
}

/* Of the backward: those after shared_bwd ran. */
static xp_status residual_run(const xp_exec *x, const void *args) {
    const xp_residual_args *a = args;
    if (seen.back > 0 && a->b.data && seen.sums < 2)
        keep(&a->b, &seen.sum[seen.sums++]);
    return xp_ref_residual.run(x, args);
}

static xp_status pass(const xp_case *c, void *arg) {
    static const xp_kernel *kernel[7];
    static xp_kernel own[6];
    const struct {
        const xp_kernel *row;
        xp_status (*run)(const xp_exec *, const void *);
    } mine[6] = {{&xp_ref_route, route_run},
                 {&xp_ref_shared, shared_run},
                 {&xp_ref_shared_bwd, shared_back_run},
                 {&xp_ref_route_bwd, route_back_run},
                 {&xp_ref_route_scale_bwd, factor_run},
                 {&xp_ref_residual, residual_run}};
    xp_backend backend = *xp_backend_ref(); /* what it has no row for, ref lends */
    xp_run_result r;
    (void)arg;
    for (int i = 0; i < 6; i++) {
        own[i] = *mine[i].row;
        own[i].run = mine[i].run;
        own[i].det = 0; /* one run is kept */
        kernel[i] = &own[i];
    }
    backend.kernel = kernel;
    backend.name = "watched";
    const xp_run_options o = {.impl = &backend};
    XP_TRY(xp_case_run(c, &o, &r));
    if (r.judgement.verdict == XP_V_FAIL || r.judgement.verdict == XP_V_ERROR) /* lent rows are no verdict here */
        fail_msg("%s: %s", xp_verdict_name(r.judgement.verdict), r.judgement.text);
    xp_run_result_close(&r);
    return XP_OK;
}

static void same(const copy *a, const copy *b, const char *what) {
    int some = 0;
    if (a->n != b->n || memcmp(a->v, b->v, (size_t)a->n * sizeof *a->v) != 0)
        fail_msg("%s: another tensor", what);
    for (int64_t i = 0; i < a->n; i++)
        some |= a->v[i] != 0.0F;
    assert_true(some);
}

static void layer_passes_weights_on(void **state) {
    (void)state;
    memset(&seen, 0, sizeof seen);
    if (xp_case_expand("layer T=24 E=6 K=3 H=8 F=6 S=8 dtype=f32 dialect=hf-5.24/inkling", NULL, NULL, pass, NULL) !=
        XP_OK)
        fail_msg("%s", xp_error_text());
    assert_true(seen.route == 1 && seen.shared == 1 && seen.back == 1 && seen.router == 1 && seen.factor == 1);
    same(&seen.gamma, &seen.in, "gamma of shared");
    same(&seen.gamma, &seen.in_back, "gamma of shared_bwd");
    same(&seen.dgamma, &seen.dslots, "dgamma of route_bwd");
    same(&seen.dgamma, &seen.dfactor, "dgamma of route_scale_bwd");
    assert_int_equal(seen.sums, 2);
    same(&seen.dx, &seen.sum[1], "the shared experts' part of dx");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(layer_passes_weights_on)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
