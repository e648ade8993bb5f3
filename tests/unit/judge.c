/* The judge on a toy stage: a right row passes, and every kind of wrong one is caught under its own class, with the
 * operand and the place. */
#include "judge_suite.h"

/* ---- the stage: y = r(x w), z = x for the rows in use, acc += 1.5 ---- */

typedef struct {
    xp_tensor x;    /* in  [T,H] act */
    xp_tensor w;    /* in  [H] act */
    xp_tensor used; /* in  [1] i64 rows in use */
    xp_tensor y;    /* out [T,H] act */
    xp_tensor z;    /* out [T,H] act */
    xp_tensor gate; /* out [T,1] act, optional; 1 */
    xp_tensor acc;  /* inout [T] f32 */
    int64_t row0;
    double slack; /* bound of y in units of its last place */
} toy_args;

static const xp_operand toy_operand[] = {
    XP_OPERAND(toy_args, x, "T,H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(toy_args, w, "H", XP_IN, XP_DT_ACT, XP_UNCOMPARED, "act"),
    XP_OPERAND(toy_args, used, "1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(toy_args, y, "T,H", XP_OUT, XP_DT_ACT, XP_BOUND, "act"),
    XP_OPERAND(toy_args, z, "T,H", XP_OUT, XP_DT_ACT, XP_BITS, "act"),
    XP_OPTIONAL(toy_args, gate, "T,1", XP_OUT, XP_DT_ACT, XP_BITS, "act"),
    XP_OPERAND(toy_args, acc, "T", XP_INOUT, XP_BIT(XP_F32), XP_BOUND, ""),
};
enum { ACC = 6 };

static double property_residual;

static xp_status toy_check(const void *args, const xp_mesh *m) {
    const toy_args *a = args;
    (void)m;
    if (a->w.dim[0] != a->x.dim[1])
        return XP_FAIL(XP_E_ARG, "toy: w has %lld elements, expected H = %lld", (long long)a->w.dim[0],
                       (long long)a->x.dim[1]);
    if (*(const int64_t *)a->used.data > a->x.dim[0])
        return XP_FAIL(XP_E_ARG, "toy: used is %lld, expected at most T", (long long)*(const int64_t *)a->used.data);
    return XP_OK;
}

static xp_status toy_bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    const toy_args *a = args;
    (void)m;
    (void)ws;
    for (int64_t i = 0; i < xp_tensor_count(ref); i++) {
        const double r = ((const double *)ref->data)[i];
        ((double *)tol->data)[i] = operand == ACC ? xp_ref_half_ulp_err(XP_F32, r) : a->slack * xp_ulp(a->x.dtype, r);
    }
    return XP_OK;
}

static int64_t toy_extent(const void *args) {
    return ((const toy_args *)args)->x.dim[0];
}

static void toy_slice(const void *args, int64_t lo, int64_t hi, void *out) {
    const toy_args *a = args;
    toy_args *o = out;
    o->x = xp_tensor_rows(&a->x, 0, lo, hi);
    o->y = xp_tensor_rows(&a->y, 0, lo, hi);
    o->z = xp_tensor_rows(&a->z, 0, lo, hi);
    o->gate = xp_tensor_rows(&a->gate, 0, lo, hi);
    o->acc = xp_tensor_rows(&a->acc, 0, lo, hi);
    o->row0 = a->row0 + lo;
}

static xp_status toy_property(const void *args, const xp_mesh *m, double *out) {
    (void)args;
    (void)m;
    *out = property_residual;
    return XP_OK;
}
static const xp_property toy_properties[] = {{"made up", toy_property}};

static const xp_stage toy = {
    .name = "toy",
    .meaning = "a product, a copy and a running sum",
    .axis = XP_LOCAL,
    .args_size = sizeof(toy_args),
    .operand = toy_operand,
    .operands = sizeof toy_operand / sizeof *toy_operand,
    .check = toy_check,
    .bound = toy_bound,
    .extent = toy_extent,
    .slice = toy_slice,
    .property = toy_properties,
    .properties = 1,
};

static void at_put(const xp_tensor *t, int64_t i, int64_t j, double v) {
    xp_ref_store(t->data, t->dtype, i * t->stride[0] + j, v);
}

static double at(const xp_tensor *t, int64_t i, int64_t j) {
    return xp_widen(t->data, t->dtype, i * t->stride[0] + j);
}

static void toy_row(const toy_args *a, int64_t t) {
    for (int64_t h = 0; h < a->x.dim[1]; h++) {
        at_put(&a->y, t, h, at(&a->x, t, h) * at(&a->w, 0, h));
        at_put(&a->z, t, h, at(&a->x, t, h));
    }
}

static xp_status toy_run(const xp_exec *x, const void *args) {
    const toy_args *a = args;
    const int64_t used = *(const int64_t *)a->used.data;
    (void)x;
    for (int64_t t = 0; t < a->x.dim[0]; t++) {
        if (a->row0 + t < used)
            toy_row(a, t);
        if (a->gate.data)
            at_put(&a->gate, t, 0, 1.0);
        at_put(&a->acc, t, 0, at(&a->acc, t, 0) + 1.5);
    }
    return XP_OK;
}

/* ---- the mistakes ---- */

typedef enum {
    RIGHT,
    VALUE,
    JUST_OVER,
    NOT_A_NUMBER,
    SWAPPED_Y,
    SWAPPED_Z,
    ZEROS,
    FACTOR,
    TRUNCATES,
    BEHIND,
    BEFORE,
    WORKSPACE,
    WORKSPACE_READ,
    INPUT,
    INPUT_REFUSED,
    ARGS,
    UNWRITTEN,
    ONE_UNWRITTEN,
    STRAY,
    DIFFERS,
    DIFFERS_UNCLAIMED,
    REFUSES,
    TWICE_ADDED,
    ONLY_ONCE,
    NEIGHBOUR,
    NEIGHBOUR_BEFORE,
    GAP
} mistake;

static mistake making;
static int runs;

static void swap_rows(const xp_tensor *t, int64_t i, int64_t k) {
    for (int64_t h = 0; h < t->dim[1]; h++) {
        const double v = at(t, i, h);
        at_put(t, i, h, at(t, k, h));
        at_put(t, k, h, v);
    }
}

/* Writes through a pointer that the row was given as const. */
static void spoil(const void *p) {
    unsigned char *q = (unsigned char *)(uintptr_t)p;
    *q ^= 0x40;
}

static void scale(const toy_args *a, double by) {
    for (int64_t t = 0; t < *(const int64_t *)a->used.data; t++) {
        for (int64_t h = 0; h < a->x.dim[1]; h++)
            at_put(&a->y, t, h, at(&a->x, t, h) * at(&a->w, 0, h) * by);
    }
}

static void truncate_all(const toy_args *a) {
    for (int64_t t = 0; t < *(const int64_t *)a->used.data; t++) {
        for (int64_t h = 0; h < a->x.dim[1]; h++) {
            const double v = at(&a->x, t, h) * at(&a->w, 0, h), u = xp_ulp(a->y.dtype, v);
            at_put(&a->y, t, h, trunc(v / u) * u);
        }
    }
}

static size_t bytes_of(const xp_tensor *t) {
    return xp_dtype_bytes(t->dtype, xp_tensor_count(t));
}

static void make_value_mistake(const toy_args *a) {
    const double y = at(&a->y, 3, 5);
    if (making == VALUE)
        at_put(&a->y, 3, 5, 3.0 * y + 1.0);
    else if (making == JUST_OVER)
        at_put(&a->y, 3, 5, y + xp_ulp(a->y.dtype, y));
    else if (making == NOT_A_NUMBER)
        at_put(&a->y, 3, 5, (double)NAN);
    else if (making == SWAPPED_Y)
        swap_rows(&a->y, 1, 2);
    else if (making == SWAPPED_Z)
        swap_rows(&a->z, 1, 2);
    else if (making == ZEROS)
        memset(a->z.data, 0, bytes_of(&a->z) / 4);
    else if (making == FACTOR)
        scale(a, 4.0);
    else if (making == TRUNCATES)
        truncate_all(a);
    else if (making == TWICE_ADDED)
        at_put(&a->acc, 2, 0, at(&a->acc, 2, 0) + 1.5);
}

static void make_memory_mistake(const xp_exec *x, const toy_args *a) {
    const int64_t T = a->y.dim[0], H = a->y.dim[1];
    if (making == BEHIND)
        spoil((char *)a->y.data + bytes_of(&a->y) + 3);
    else if (making == BEFORE)
        spoil((char *)a->y.data - 1);
    else if (making == WORKSPACE)
        spoil((char *)x->ws + x->ws_bytes);
    else if (making == WORKSPACE_READ)
        at_put(&a->y, 3, 5, (double)((const float *)x->ws)[1]);
    else if (making == INPUT)
        spoil(a->x.data);
    else if (making == INPUT_REFUSED)
        *(int64_t *)a->used.data = 1000000;
    else if (making == ARGS)
        spoil(&a->slack);
    else if (making == UNWRITTEN)
        xp_poison_fill(&a->y);
    else if (making == ONE_UNWRITTEN)
        memcpy((char *)a->z.data + (size_t)(3 * H + 5) * 2, &(uint16_t){(uint16_t)xp_poison_code(XP_BF16)}, 2);
    else if (making == STRAY)
        at_put(&a->y, T - 1, 4, 0.0);
    else if ((making == DIFFERS || making == DIFFERS_UNCLAIMED) && runs % 2 == 0)
        at_put(&a->y, 3, 5, at(&a->y, 3, 5) + xp_ulp(a->y.dtype, at(&a->y, 3, 5)));
    else if (making == NEIGHBOUR)
        at_put(&a->y, T, 0, 7.0);
    else if (making == NEIGHBOUR_BEFORE)
        at_put(&a->y, -1, 0, 7.0);
    else if (making == GAP)
        spoil((char *)a->y.data + (size_t)(H + 1) * 2);
}

static xp_status wrong_run(const xp_exec *x, const void *args) {
    const toy_args *a = args;
    runs++;
    if (making == REFUSES)
        return XP_FAIL(XP_E_DEVICE, "toy: the machine is on fire");
    unsigned char before[512];
    const size_t kept = making == ONLY_ONCE && runs > 1 ? bytes_of(&a->y) : 0;
    memcpy(before, a->y.data, kept);
    XP_TRY(toy_run(x, args));
    memcpy(a->y.data, before, kept); /* as if it had not been written */
    make_value_mistake(a);
    make_memory_mistake(x, a);
    return XP_OK;
}

static size_t wrong_workspace(const void *args, const xp_mesh *m) {
    (void)args;
    (void)m;
    return 40;
}

static const xp_kernel judge_row = {.stage = &toy, .name = "judge", .det = XP_DET_RUN, .run = toy_run};
static const xp_kernel row = {
    .stage = &toy, .name = "k1", .det = XP_DET_RUN, .workspace = wrong_workspace, .run = wrong_run};
static const xp_kernel row_unclaimed = {.stage = &toy, .name = "k2", .workspace = wrong_workspace, .run = wrong_run};
static const char *never(const void *args, const xp_mesh *m) {
    (void)args;
    (void)m;
    return "not on a Wednesday";
}
static const xp_kernel row_refusing = {.stage = &toy, .name = "k3", .why_not = never, .run = wrong_run};

/* ---- one judged call ---- */

typedef struct {
    int64_t T, H, used;
    double slack, value; /* value: of every x; 0 is drawn instead */
    size_t slice_bytes;
    int64_t sample;
    int calls, most_calls, view, gate, fill_zero, bad_width;
    xp_data data;
    xp_expect expect;
    const xp_kernel *tested;
    const xp_backend *ref, *dense; /* NULL: a backend of the judge's row */
    int impl_is_ref;
    const char *stage;
    xp_twice twice;
} setup;

static setup usual(void) {
    return (setup){.T = 6, .H = 32, .used = 5, .slack = 0.5, .calls = 1, .tested = &row, .twice = XP_TWICE_FIRST};
}

/* y and z side by side in one block: neither is a stray write of the other. */
static xp_status share_block(xp_rank *r, const setup *s, toy_args *a) {
    const int64_t dim[2] = {2 * s->T, s->H};
    xp_tensor t;
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_BF16, 2, dim, &t));
    a->y = xp_tensor_rows(&t, 0, 0, s->T);
    a->z = xp_tensor_rows(&t, 0, s->T, 2 * s->T);
    return XP_OK;
}

/* y as rows 2.. of a larger block, with a gap behind each row. */
static xp_status view_of(xp_rank *r, const setup *s, xp_tensor *out) {
    const int64_t dim[2] = {s->T + 4, s->H + 3};
    xp_tensor t;
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_BF16, 2, dim, &t));
    xp_poison_fill(&t);
    *out = xp_tensor_rows(&t, 0, 2, 2 + s->T);
    out->dim[1] = s->H;
    return XP_OK;
}

static xp_status make_args(xp_rank *r, const setup *s, toy_args *a) {
    const int64_t th[2] = {s->T, s->H}, h = s->H + s->bad_width, one = 1;
    uint64_t seed = 99;
    memset(a, 0, sizeof *a);
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_BF16, 2, th, &a->x));
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_BF16, 1, &h, &a->w));
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_I64, 1, &one, &a->used));
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_BF16, 2, th, &a->y));
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_BF16, 2, th, &a->z));
    XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_F32, 1, th, &a->acc));
    const int64_t t1[2] = {s->T, 1};
    if (s->gate)
        XP_TRY(xp_rank_tensor(r, XP_KIND_ACT, XP_BF16, 2, t1, &a->gate));
    if (s->view == 1)
        XP_TRY(view_of(r, s, &a->y));
    if (s->view == 2)
        XP_TRY(share_block(r, s, a));
    for (int64_t i = 0; i < s->T * s->H + h; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const double v = s->fill_zero ? 0.0 : ((double)(seed >> 40) * 0x1p-24 + 0.5) * (seed >> 33 & 1 ? -1.0 : 1.0);
        if (i < s->T * s->H)
            xp_ref_store(a->x.data, XP_BF16, i, v);
        else
            xp_ref_store(a->w.data, XP_BF16, i - s->T * s->H, v);
    }
    for (int64_t t = 0; t < s->T; t++)
        xp_ref_store(a->acc.data, XP_F32, t, s->fill_zero ? -1.5 : 0.1 * (double)t);
    *(int64_t *)a->used.data = s->used;
    a->slack = s->slack;
    return XP_OK;
}

/* Runs the call; the status of the last xp_call is out_status. */
static void judge_toy(const setup *s, xp_judgement *g, xp_status *out_status) {
    lone l;
    small_backend impl, judge, dense;
    xp_rank r;
    xp_judge *j;
    toy_args a;
    lone_open(&l, 1);
    backend_of(&impl, "impl", s->tested);
    backend_of(&judge, "ref", &judge_row);
    backend_of(&dense, "dense", &judge_row);
    const xp_judge_options o = {.ref = s->ref           ? s->ref
                                       : s->impl_is_ref ? &impl.b
                                                        : &judge.b,
                                .dense = s->impl_is_ref == 1 ? &dense.b : NULL,
                                .stage = s->stage,
                                .data = s->data,
                                .calls = s->most_calls,
                                .sample_units = s->sample,
                                .slice_bytes = s->slice_bytes,
                                .twice = s->twice,
                                .seed = 7};
    assert_int_equal(xp_rank_open(&l.mesh, &impl.b, &judge.b, &r), XP_OK);
    assert_int_equal(xp_judge_open(&o, &j), XP_OK);
    r.judge = j;
    r.layer = 4;
    r.token0 = 100;
    assert_int_equal(make_args(&r, s, &a), XP_OK);
    for (int i = 0; i < s->calls; i++)
        *out_status = xp_call(&r, &toy, "toy", &a);
    assert_int_equal(xp_judgement_make(&j, 1, NULL, s->expect, g), XP_OK);
    size_t live[XP_NKIND], peak[XP_NKIND], total;
    xp_rank_memory(&r, live, peak, &total);
    assert_int_equal(live[XP_KIND_JUDGE], 0); /* the judge keeps nothing */
    xp_judge_close(j);
    xp_rank_close(&r);
}

typedef struct {
    mistake m;
    const char *operand;
    xp_class cls;
    double slack;
    int64_t T, H;
    int view;
    const char *text; /* part of the finding's text */
} expectation;

static const expectation wrong[] = {
    {VALUE, "y", XP_C_BOUND, 0.5, 6, 32, 0, "1 of 160 elements are out of bounds"},
    {JUST_OVER, "y", XP_C_BOUND, 0.5, 6, 32, 0, "1 of 160"},
    {NOT_A_NUMBER, "y", XP_C_NAN, 0.5, 6, 32, 0, "1 of 160"},
    {SWAPPED_Y, "y", XP_C_BOUND, 0.5, 6, 32, 0, "out of bounds"},
    {SWAPPED_Z, "z", XP_C_BITS, 0.5, 6, 32, 0, "have other bits"},
    {ZEROS, "z", XP_C_BITS, 0.5, 6, 32, 0, "48 of 160"},
    {FACTOR, "y", XP_C_BOUND, 0.5, 6, 32, 0, "got = 4 x expected on 160 of 160"},
    {TRUNCATES, "y", XP_C_BIAS, 1.0, 200, 64, 0, "towards zero"},
    {BEHIND, "y", XP_C_GUARD, 0.5, 6, 32, 0, "1 bytes behind the end of y were written, the nearest 3 bytes away"},
    {BEFORE, "y", XP_C_GUARD, 0.5, 6, 32, 0, "1 bytes before the start of y were written, the nearest 0 bytes away"},
    {WORKSPACE, "", XP_C_GUARD, 0.5, 6, 32, 0, "workspace"},
    {WORKSPACE_READ, "y", XP_C_NAN, 0.5, 6, 32, 0, "NaN"},
    {INPUT, "x", XP_C_INPUT, 0.5, 6, 32, 0, "the input x changed"},
    {ARGS, "", XP_C_INPUT, 0.5, 6, 32, 0, "changed its arguments"},
    {UNWRITTEN, "y", XP_C_UNWRITTEN, 0.5, 6, 32, 0, "160 of 160 elements were never written"},
    {ONE_UNWRITTEN, "z", XP_C_UNWRITTEN, 0.5, 6, 32, 0, "1 of 160"},
    {STRAY, "y", XP_C_POISON, 0.5, 6, 32, 0, "1 elements beyond those in use"},
    {DIFFERS, "y", XP_C_NONDET, 2.0, 6, 32, 0, "1 of 6 rows of y have other bits"},
    {TWICE_ADDED, "acc", XP_C_BOUND, 0.5, 6, 32, 0, "1 of 6"},
    {ONLY_ONCE, "y", XP_C_NONDET, 0.5, 6, 32, 0, "5 of 6 rows of y have other bits"},
    {NEIGHBOUR_BEFORE, "y", XP_C_GUARD, 0.5, 6, 32, 1, "beside the elements of y"},
    {NEIGHBOUR, "y", XP_C_GUARD, 0.5, 6, 32, 1, "beside the elements of y"},
    {GAP, "y", XP_C_GUARD, 0.5, 6, 32, 1, "beside the elements of y"},
};

static void each_mistake(void **state) {
    const size_t slice = *state ? 1 : 0; /* one unit a slice, or all in one */
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const expectation *e = &wrong[i];
        xp_judgement g;
        xp_status st;
        setup s = usual();
        s.T = e->T;
        s.H = e->H;
        s.used = e->T - 1;
        s.slack = e->slack;
        s.view = e->view;
        s.slice_bytes = slice;
        making = e->m;
        runs = 0;
        judge_toy(&s, &g, &st);
        assert_int_equal(st, XP_OK); /* a wrong result is a finding; the run goes on */
        assert_int_equal(g.verdict, XP_V_FAIL);
        const xp_finding *f = line_of(&g, e->operand);
        assert_non_null(f);
        assert_string_equal(xp_class_name(f->cls), xp_class_name(e->cls));
        assert_int_equal(f->verdict, XP_V_FAIL);
        assert_int_equal(f->rank, 0);
        if (!strstr(f->text, e->text))
            fail_msg("mistake %d: '%s' does not contain '%s'", (int)e->m, f->text, e->text);
        assert_ptr_equal(&g.line[g.first], f);
        assert_non_null(strstr(g.text, xp_class_name(e->cls)));
        xp_judgement_close(&g);
    }
}

/* The place of an element, whole and in slices: token number, index, values. */
static void places(void **state) {
    (void)state;
    for (size_t slice = 0; slice < 2; slice++) {
        xp_judgement g;
        xp_status st;
        char text[128];
        setup s = usual();
        s.slice_bytes = slice;
        making = VALUE;
        judge_toy(&s, &g, &st);
        const xp_finding *f = line_of(&g, "y");
        assert_true(f->first.set);
        assert_int_equal(f->first.token, 103);
        assert_int_equal(f->first.layer, 4);
        assert_int_equal(f->first.index[0], 3);
        assert_int_equal(f->first.index[1], 5);
        assert_int_equal(f->worst.index[0], 3);
        assert_true(f->first.got == xp_ref_round(3.0 * xp_ref_round(f->first.expected, XP_BF16) + 1.0, XP_BF16));
        assert_true(f->first.bound == 0.5 * xp_ulp(XP_BF16, f->first.expected));
        xp_place_print(&f->first, text, sizeof text);
        assert_string_equal(text, "rank 0 layer 4 step 0 token 103 index [3,5]");
        xp_place_values(&f->first, text, sizeof text);
        assert_non_null(strstr(text, "bf16 0x"));
        assert_true(f->diff.ratio > 1.0 && f->diff.ratio == f->worst.ratio);
        xp_judgement_close(&g);
    }
}

static void right_passes(void **state) {
    (void)state;
    making = RIGHT;
    for (int i = 0; i < 12; i++) {
        xp_judgement g;
        xp_status st;
        setup s = usual();
        s.T = i & 4 ? 200 : 6;
        s.H = i & 4 ? 64 : 32;
        s.used = s.T - 1;
        s.slice_bytes = (size_t)(i & 1) * 4000;
        s.view = i / 8 ? 2 : i >> 1 & 1;
        s.calls = 2;
        judge_toy(&s, &g, &st);
        assert_int_equal(st, XP_OK);
        assert_int_equal(g.verdict, XP_V_PASS);
        assert_string_equal(g.text, "");
        assert_int_equal(g.first, -1);
        const xp_finding *y = line_of(&g, "y"), *z = line_of(&g, "z"), *acc = line_of(&g, "acc");
        assert_int_equal(y->diff.elements, 2 * s.used * s.H);
        assert_int_equal(y->diff.untouched, 2 * s.H);
        assert_int_equal(z->diff.elements, 2 * s.used * s.H);
        assert_int_equal(acc->diff.elements, 2 * s.T);
        assert_int_equal(y->total, 2 * s.T * s.H);
        assert_int_equal(y->calls, 2);
        assert_true(y->diff.ratio > 0.0 && y->diff.ratio <= 1.0);
        assert_int_equal(y->bias_state, (i & 4) != 0);
        assert_string_equal(y->row, "impl:k1");
        assert_string_equal(y->judge, "ref:judge");
        assert_null(line_of(&g, "x"));
        xp_judgement_close(&g);
    }
}

/* The bias test belongs to real data: others make errors that are not rounding errors of independent values. */
static void bias_on_real_data_only(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    s.T = 200;
    s.H = 64;
    s.slack = 1.0;
    s.used = 200;
    s.data = XP_DATA_SKEW;
    making = TRUNCATES;
    judge_toy(&s, &g, &st);
    assert_int_equal(g.verdict, XP_V_PASS);
    assert_int_equal(line_of(&g, "y")->bias_state, 0);
    xp_judgement_close(&g);
}

/* A rounded gate is shared by the elements of a row: they are not independent. */
static void bias_not_under_a_gate(void **state) {
    (void)state;
    for (int gate = 0; gate < 2; gate++) {
        xp_judgement g;
        xp_status st;
        setup s = usual();
        s.T = 200;
        s.H = 64;
        s.used = 200;
        s.slack = 1.0;
        s.gate = gate;
        making = TRUNCATES;
        judge_toy(&s, &g, &st);
        assert_int_equal(g.verdict, gate ? XP_V_PASS : XP_V_FAIL);
        assert_int_equal(line_of(&g, "y")->bias_state, !gate);
        xp_judgement_close(&g);
    }
}

static void first_calls_only(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    s.calls = 5;
    s.most_calls = 2;
    making = RIGHT;
    runs = 0;
    judge_toy(&s, &g, &st);
    assert_int_equal(line_of(&g, "y")->calls, 2);
    assert_int_equal(runs, 6); /* five, and the first one twice */
    xp_judgement_close(&g);
}

/* An input that changed may be one that no row can take: then the judge's row is not called. */
static void input_that_is_refused(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    making = INPUT_REFUSED;
    judge_toy(&s, &g, &st);
    assert_int_equal(st, XP_E_ARG);
    assert_int_equal(g.verdict, XP_V_FAIL);
    assert_int_equal(line_of(&g, "used")->cls, XP_C_INPUT);
    assert_null(line_of(&g, "y"));
    xp_judgement_close(&g);
}

static void twice_is_for_claims(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    s.slack = 2.0;
    making = DIFFERS_UNCLAIMED;
    s.tested = &row_unclaimed;
    runs = 0;
    judge_toy(&s, &g, &st);
    assert_int_equal(g.verdict, XP_V_PASS);
    assert_int_equal(runs, 1);
    xp_judgement_close(&g);
    making = RIGHT;
    s.tested = &row;
    const xp_twice how[] = {XP_TWICE_NEVER, XP_TWICE_FIRST, XP_TWICE_ALWAYS};
    const int expected[] = {3, 4, 6};
    for (int i = 0; i < 3; i++) {
        s.twice = how[i];
        s.calls = 3;
        runs = 0;
        judge_toy(&s, &g, &st);
        assert_int_equal(g.verdict, XP_V_PASS);
        assert_int_equal(runs, expected[i]);
        xp_judgement_close(&g);
    }
}

static void sampling(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    s.T = 50;
    s.H = 64;
    s.used = 50;
    s.sample = 16;
    making = RIGHT;
    judge_toy(&s, &g, &st);
    assert_int_equal(g.verdict, XP_V_PASS);
    assert_int_equal(line_of(&g, "y")->diff.elements, 16 * s.H);
    assert_int_equal(line_of(&g, "y")->total, 50 * s.H);
    xp_judgement_close(&g);
    making = FACTOR; /* wrong everywhere: every sample sees it */
    judge_toy(&s, &g, &st);
    assert_int_equal(g.verdict, XP_V_FAIL);
    assert_int_equal(line_of(&g, "y")->diff.wrong, 16 * s.H);
    xp_judgement_close(&g);
    s.sample = 50;
    making = VALUE; /* wrong in one token: all of them are looked at */
    judge_toy(&s, &g, &st);
    assert_int_equal(line_of(&g, "y")->diff.elements, 50 * s.H);
    assert_int_equal(line_of(&g, "y")->diff.wrong, 1);
    xp_judgement_close(&g);
}

/* Where a unit is a single number, a sample of a few units would be none. */
static void sample_of_numbers(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    s.T = 3000;
    s.H = 1;
    s.used = 3000;
    s.sample = 16;
    making = RIGHT;
    judge_toy(&s, &g, &st);
    assert_int_equal(g.verdict, XP_V_PASS);
    assert_int_equal(line_of(&g, "y")->diff.elements, 1024);
    xp_judgement_close(&g);
}

static void properties(void **state) {
    (void)state;
    const struct {
        double residual;
        xp_data data;
        xp_verdict v;
    } t[] = {{0.0, XP_DATA_REAL, XP_V_PASS},
             {1.0, XP_DATA_REAL, XP_V_PASS},
             {1.0001, XP_DATA_REAL, XP_V_FAIL},
             {(double)NAN, XP_DATA_REAL, XP_V_FAIL},
             {(double)NAN, XP_DATA_EXTREME, XP_V_PASS}};
    for (int i = 0; i < 5; i++) {
        xp_judgement g;
        xp_status st;
        setup s = usual();
        s.data = t[i].data;
        making = RIGHT;
        property_residual = t[i].residual;
        judge_toy(&s, &g, &st);
        property_residual = 0.0;
        assert_int_equal(g.verdict, t[i].v);
        if (t[i].v == XP_V_FAIL)
            assert_int_equal(line_of(&g, "")->cls, XP_C_PROPERTY);
        xp_judgement_close(&g);
    }
}

/* A property may use outputs as indices, so it is not evaluated on wrong ones. */
static void properties_of_right_outputs(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    making = VALUE;
    property_residual = 5.0;
    judge_toy(&s, &g, &st);
    property_residual = 0.0;
    assert_int_equal(line_of(&g, "y")->cls, XP_C_BOUND);
    assert_null(line_of(&g, ""));
    xp_judgement_close(&g);
}

/* ---- verdicts that are neither right nor wrong ---- */

static xp_judgement judged(const setup *s, xp_status expected) {
    xp_judgement g;
    xp_status st;
    making = RIGHT;
    judge_toy(s, &g, &st);
    assert_int_equal(st, expected);
    return g;
}

static void vacuous(void **state) {
    (void)state;
    setup s = usual();
    s.T = s.used = 0; /* no tokens */
    xp_judgement g = judged(&s, XP_OK);
    assert_int_equal(g.verdict, XP_V_VACUOUS);
    assert_non_null(strstr(g.text, "nothing was compared"));
    xp_judgement_close(&g);
    s = usual();
    s.impl_is_ref = 2; /* the row under test is the reference's and nobody judges that */
    g = judged(&s, XP_OK);
    assert_int_equal(g.verdict, XP_V_VACUOUS);
    assert_non_null(strstr(g.text, "nothing judges"));
    xp_judgement_close(&g);
    s = usual();
    s.tested = &judge_row; /* the judge is the judged */
    g = judged(&s, XP_OK);
    assert_int_equal(g.verdict, XP_V_VACUOUS);
    xp_judgement_close(&g);
    s = usual();
    s.stage = "another";
    g = judged(&s, XP_OK);
    assert_int_equal(g.verdict, XP_V_VACUOUS);
    assert_int_equal(g.lines, 0);
    xp_judgement_close(&g);
    s = usual();
    s.impl_is_ref = 1; /* dense judges ref */
    g = judged(&s, XP_OK);
    assert_int_equal(g.verdict, XP_V_PASS);
    assert_string_equal(line_of(&g, "y")->judge, "dense:judge");
    xp_judgement_close(&g);
}

static void expectations(void **state) {
    (void)state;
    const struct {
        int zero;
        xp_expect e;
        xp_verdict v;
    } t[] = {{0, XP_EXPECT_NONE, XP_V_PASS}, {1, XP_EXPECT_NONE, XP_V_VACUOUS}, {1, XP_EXPECT_ZERO, XP_V_PASS},
             {0, XP_EXPECT_ZERO, XP_V_FAIL}, {0, XP_EXPECT_LOCAL, XP_V_FAIL},   {0, XP_EXPECT_ONE_EXPERT, XP_V_FAIL},
             {1, XP_EXPECT_LOCAL, XP_V_FAIL}};
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        setup s = usual();
        s.fill_zero = t[i].zero;
        s.expect = t[i].e;
        xp_judgement g = judged(&s, XP_OK);
        assert_int_equal(g.verdict, t[i].v);
        assert_int_equal(g.zero, t[i].zero);
        xp_judgement_close(&g);
    }
    xp_expect e;
    for (int i = 0; i <= XP_EXPECT_ONE_EXPERT; i++) {
        assert_int_equal(xp_expect_parse(xp_expect_name((xp_expect)i), &e), XP_OK);
        assert_int_equal(e, i);
    }
    assert_int_equal(xp_expect_parse("zeros", &e), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "zeros"));
}

static void errors(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    setup s = usual();
    s.bad_width = 1; /* the stage's check refuses it */
    g = judged(&s, XP_E_ARG);
    assert_int_equal(g.verdict, XP_V_ERROR);
    assert_int_equal(line_of(&g, "")->cls, XP_C_ARG);
    assert_non_null(strstr(g.text, "w has 33 elements, expected H = 32"));
    assert_non_null(strstr(xp_error_text(), "w has 33"));
    xp_judgement_close(&g);
    s = usual();
    making = REFUSES;
    judge_toy(&s, &g, &st);
    assert_int_equal(st, XP_E_DEVICE);
    assert_int_equal(g.verdict, XP_V_ERROR);
    assert_int_equal(line_of(&g, "")->cls, XP_C_STATUS);
    assert_non_null(strstr(g.text, "on fire"));
    xp_judgement_close(&g);
}

/* A row that is missing is written down, and the reference's runs in its place so that what follows has inputs. */
static void unsupported(void **state) {
    (void)state;
    const xp_kernel *const none[] = {NULL, &row_refusing};
    for (int i = 0; i < 2; i++) {
        setup s = usual();
        s.tested = none[i];
        xp_judgement g = judged(&s, XP_OK);
        assert_int_equal(g.verdict, XP_V_UNSUPPORTED);
        assert_non_null(strstr(g.text, i ? "not on a Wednesday" : "no row"));
        assert_int_equal(g.elements, 0);
        xp_judgement_close(&g);
    }
}

/* Without a judge nothing is written down, so nothing else may run. */
static void unjudged(void **state) {
    (void)state;
    lone l;
    small_backend impl, judge, empty;
    xp_rank r;
    toy_args a;
    const setup s = usual();
    lone_open(&l, 1);
    backend_of(&impl, "impl", &row);
    backend_of(&judge, "ref", &judge_row);
    backend_of(&empty, "empty", NULL);
    making = RIGHT;
    assert_int_equal(xp_rank_open(&l.mesh, &impl.b, &judge.b, &r), XP_OK);
    assert_int_equal(make_args(&r, &s, &a), XP_OK);
    runs = 0;
    assert_int_equal(xp_call(&r, &toy, "toy", &a), XP_OK);
    assert_int_equal(runs, 1);
    assert_true(at(&a.y, 3, 5) == xp_ref_round(at(&a.x, 3, 5) * at(&a.w, 0, 5), XP_BF16));
    r.only = "another"; /* then the base runs it */
    assert_int_equal(xp_call(&r, &toy, "toy", &a), XP_OK);
    assert_int_equal(runs, 1);
    r.only = NULL;
    r.impl = &empty.b;
    assert_int_equal(xp_call(&r, &toy, "toy", &a), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "unsupported: backend empty"));
    r.impl = &impl.b;
    xp_rank_close(&r);
}

/* Opens a judge and calls the stage once at each site. */
static xp_judge *judge_of(const setup *s, int n, const char *const *site, mistake m, int rank) {
    static small_backend tested, judge; /* outlive the judges */
    lone l;
    xp_rank r;
    xp_judge *j;
    lone_open(&l, 1);
    l.one.rank = rank;
    backend_of(&tested, "impl", &row);
    backend_of(&judge, "ref", &judge_row);
    const xp_judge_options o = {.ref = &judge.b};
    assert_int_equal(xp_rank_open(&l.mesh, &tested.b, &judge.b, &r), XP_OK);
    assert_int_equal(xp_judge_open(&o, &j), XP_OK);
    r.judge = j;
    making = m;
    for (int i = 0; i < n; i++) {
        toy_args a;
        assert_int_equal(make_args(&r, &s[i], &a), XP_OK);
        assert_int_equal(xp_call(&r, &toy, site[i], &a), XP_OK);
    }
    xp_rank_close(&r);
    return j;
}

/* A stage that compared nothing is vacuous, though another one did. */
static void one_site_compares_nothing(void **state) {
    (void)state;
    const char *const site[] = {"one", "two"};
    setup s[2] = {usual(), usual()};
    xp_judgement g;
    s[1].T = s[1].used = 0;
    xp_judge *j = judge_of(s, 2, site, RIGHT, 0);
    assert_int_equal(xp_judgement_make(&j, 1, NULL, XP_EXPECT_NONE, &g), XP_OK);
    assert_int_equal(g.lines, 6);
    assert_int_equal(g.line[0].verdict, XP_V_PASS);
    assert_int_equal(g.line[3].verdict, XP_V_VACUOUS);
    assert_string_equal(g.line[3].site, "two");
    assert_int_equal(g.verdict, XP_V_VACUOUS);
    xp_judgement_close(&g);
    xp_judge_close(j);
}

/* Lines that only one rank has come where that rank has them; numbers add up. */
static void ranks_are_merged(void **state) {
    (void)state;
    const char *const site = "one", *const order[] = {"x", "y", "z", "acc"};
    const setup s = usual();
    xp_judgement g;
    xp_judge *j[3] = {judge_of(&s, 1, &site, RIGHT, 0), NULL, judge_of(&s, 1, &site, INPUT, 2)};
    assert_int_equal(xp_judgement_make(j, 3, NULL, XP_EXPECT_NONE, &g), XP_OK);
    assert_int_equal(g.lines, 4);
    for (int i = 0; i < 4; i++)
        assert_string_equal(g.line[i].operand, order[i]);
    assert_int_equal(g.line[1].diff.elements, 2 * s.used * s.H);
    assert_int_equal(g.line[1].total, 2 * s.T * s.H);
    assert_int_equal(g.line[0].rank, 2);
    assert_int_equal(g.verdict, XP_V_FAIL);
    assert_int_equal(g.first, 0);
    xp_judgement_close(&g);
    /* A judge of a rank that has not returned is not looked at. */
    static xp_mesh_report end;
    end.status = XP_E_HANG;
    end.world = 3;
    end.first = 2;
    end.end[2].stuck = 1;
    snprintf(end.end[2].text, sizeof end.end[2].text, "still waiting");
    assert_int_equal(xp_judgement_make(j, 3, &end, XP_EXPECT_NONE, &g), XP_OK);
    assert_int_equal(g.lines, 3);
    assert_int_equal(g.elements, 2 * s.used * s.H + s.T);
    assert_int_equal(g.verdict, XP_V_HANG);
    assert_non_null(strstr(g.text, "rank 2: still waiting"));
    xp_judgement_close(&g);
    xp_judge_close(j[0]);
    xp_judge_close(j[2]);
}

/* The text block of a failed line names everything a reader needs. */
static void block(void **state) {
    (void)state;
    xp_judgement g;
    xp_status st;
    char *text = NULL;
    size_t bytes = 0;
    setup s = usual();
    making = FACTOR;
    judge_toy(&s, &g, &st);
    FILE *f = open_memstream(&text, &bytes);
    assert_non_null(f);
    xp_finding_print(f, &g.line[g.first], "");
    fclose(f);
    const char *const part[] = {"toy, operand y",       "impl:k1 judged by ref:judge", "rank 0 layer 4",
                                "expected -0x1.dbep-1", "4 x expected on 160 of 160",  "bound: an error exceeds"};
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        if (!strstr(text, part[i]))
            fail_msg("'%s' is not in:\n%s", part[i], text);
    }
    free(text);
    xp_judgement_close(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(right_passes),
        cmocka_unit_test_prestate(each_mistake, NULL),
        {"each_mistake_in_slices", each_mistake, NULL, NULL, &(int){1}},
        cmocka_unit_test(places),
        cmocka_unit_test(bias_on_real_data_only),
        cmocka_unit_test(twice_is_for_claims),
        cmocka_unit_test(sampling),
        cmocka_unit_test(sample_of_numbers),
        cmocka_unit_test(properties),
        cmocka_unit_test(vacuous),
        cmocka_unit_test(expectations),
        cmocka_unit_test(errors),
        cmocka_unit_test(unsupported),
        cmocka_unit_test(unjudged),
        cmocka_unit_test(bias_not_under_a_gate),
        cmocka_unit_test(first_calls_only),
        cmocka_unit_test(input_that_is_refused),
        cmocka_unit_test(properties_of_right_outputs),
        cmocka_unit_test(one_site_compares_nothing),
        cmocka_unit_test(ranks_are_merged),
        cmocka_unit_test(block),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
