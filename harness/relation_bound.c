/* The stages' own bounds, for relations: see relation_bound.h. The reference's rows give the values that a bound is
 * around; nothing here has a tolerance of its own. */
#include "relation_bound.h"

#include <stdlib.h>
#include <string.h>

#include "registry.h"
#include "xp/moe.h"
#include "xp/route.h"
#include "xp/router.h"

enum { RANGES = 8, BLOCKS = 320 };

/* The block over one range of tokens, in f64 outputs. */
typedef struct {
    int64_t lo, hi;
    xp_moe_args moe;
    xp_router_args router;
    double *tol[XP_CHAIN_OUTS];
} range;

struct xp_relation_bound {
    const xp_chain_in *in;
    xp_tensor idx;
    range range[RANGES];
    int ranges;
    void *block[BLOCKS];
    int blocks;
    xp_comm alone;
    xp_mesh mesh; /* of one rank: none of these stages sends anything */
};

static xp_status take(xp_relation_bound *b, size_t bytes, void **out) {
    *out = b->blocks < BLOCKS ? aligned_alloc(64, (bytes + 64) / 64 * 64) : NULL;
    if (!*out)
        return XP_FAIL(XP_E_NOMEM, "relations: %zu bytes", bytes);
    b->block[b->blocks++] = *out;
    return XP_OK;
}

xp_status xp_relation_bound_open(const xp_chain_in *in, const xp_tensor *idx, xp_relation_bound **out) {
    *out = calloc(1, sizeof **out);
    if (!*out)
        return XP_FAIL(XP_E_NOMEM, "relations: %zu bytes", sizeof **out);
    (*out)->in = in;
    (*out)->idx = *idx;
    (*out)->alone = (xp_comm){.size = 1};
    for (int i = 0; i < XP_NAXIS; i++)
        (*out)->mesh.axis[i] = &(*out)->alone;
    return XP_OK;
}

void xp_relation_bound_close(xp_relation_bound *b) {
    for (int i = 0; b && i < b->blocks; i++)
        free(b->block[i]);
    free(b);
}

static xp_status run_row(xp_relation_bound *b, const xp_stage *s, const void *args) {
    void *ws;
    for (const xp_kernel *const *k = xp_backend_ref()->kernel; *k; k++) {
        if ((*k)->stage != s)
            continue;
        const size_t bytes = (*k)->workspace ? (*k)->workspace(args, &b->mesh) : 0;
        XP_TRY(take(b, bytes, &ws));
        const xp_exec x = {.mesh = &b->mesh, .ws = ws, .ws_bytes = bytes};
        return (*k)->run(&x, args);
    }
    return XP_FAIL(XP_E_BUG, "relations: ref has no row for %s", s->name);
}

static xp_status f64(xp_relation_bound *b, int64_t n0, int64_t n1, int64_t n2, int ndim, xp_tensor *out) {
    const int64_t dim[] = {n0, n1, n2};
    void *p;
    XP_TRY(take(b, sizeof(double) * (size_t)(n0 * n1 * n2), &p));
    *out = xp_tensor_of(p, XP_F64, ndim, dim);
    return XP_OK;
}

static xp_status open_shared(xp_relation_bound *b, xp_moe_args *a) {
    const xp_chain_in *in = b->in;
    if (in->S == 0)
        return XP_OK;
    a->sw1 = in->sw1;
    a->sw2 = in->sw2;
    a->sgate = in->sgate;
    XP_TRY(f64(b, in->sw1.dim[0], in->H, 1, 2, &a->dsw1));
    XP_TRY(f64(b, in->H, in->S, 1, 2, &a->dsw2));
    return in->sgate.data ? f64(b, 1, in->H, 1, 2, &a->dsgate) : XP_OK;
}

static xp_status open_biases(xp_relation_bound *b, xp_moe_args *a) {
    const xp_chain_in *in = b->in;
    a->rbias = in->rbias;
    a->scale_e = in->scale_e;
    if (in->d->masked_weight)
        a->bias = in->bias;
    if (in->rbias.data)
        XP_TRY(f64(b, in->Z, 1, 1, 1, &a->drbias));
    if (!in->b1.data)
        return XP_OK;
    a->b1 = in->b1;
    a->b2 = in->b2;
    XP_TRY(f64(b, in->E, in->w1.dim[1], 1, 2, &a->db1));
    return f64(b, in->E, in->H, 1, 2, &a->db2);
}

/* The block as the judge runs it: outputs in f64, everything between them as the record says. */
static xp_status open_range(xp_relation_bound *b, int64_t lo, int64_t hi, range *out) {
    const xp_chain_in *in = b->in;
    xp_moe_args *a = &out->moe;
    *out = (range){.lo = lo, .hi = hi};
    a->x = xp_tensor_rows(&in->x, 0, lo, hi);
    a->dy = xp_tensor_rows(&in->dy, 0, lo, hi);
    a->idx = xp_tensor_rows(&b->idx, 0, lo, hi);
    a->wr = in->wr;
    a->w1 = in->w1;
    a->w2 = in->w2;
    a->dialect = in->d;
    XP_TRY(f64(b, hi - lo, in->H, 1, 2, &a->y));
    XP_TRY(f64(b, hi - lo, in->H, 1, 2, &a->dx));
    XP_TRY(f64(b, in->Z, in->H, 1, 2, &a->dwr));
    XP_TRY(f64(b, in->E, in->w1.dim[1], in->H, 3, &a->dw1));
    XP_TRY(f64(b, in->E, in->H, in->F, 3, &a->dw2));
    XP_TRY(open_shared(b, a));
    XP_TRY(open_biases(b, a));
    out->router = (xp_router_args){.x = a->x, .w = in->wr, .bias = in->rbias};
    XP_TRY(f64(b, hi - lo, in->Z, 1, 2, &out->router.logits));
    XP_TRY(run_row(b, &xp_stage_router, &out->router));
    return run_row(b, &xp_stage_moe, a);
}

static xp_status find_range(xp_relation_bound *b, int64_t lo, int64_t hi, range **out) {
    for (int i = 0; i < b->ranges; i++) {
        *out = &b->range[i];
        if ((*out)->lo == lo && (*out)->hi == hi)
            return XP_OK;
    }
    if (b->ranges == RANGES)
        return XP_FAIL(XP_E_BUG, "relations: more than %d ranges of tokens", RANGES);
    *out = &b->range[b->ranges];
    XP_TRY(open_range(b, lo, hi, *out));
    b->ranges++;
    return XP_OK;
}

/* The bound asks for the operand's own dtype where it rounds: the args are those of a call, f64 only where ref is. */
static xp_status fill_tol(xp_relation_bound *b, range *r, xp_chain_out o) {
    const xp_stage *s = o == XP_CHAIN_LOGITS ? &xp_stage_router : &xp_stage_moe;
    void *args = o == XP_CHAIN_LOGITS ? (void *)&r->router : (void *)&r->moe, *ws, *p;
    const int i = xp_stage_operand(s, xp_chain_name(o));
    if (o == XP_CHAIN_IDX || o == XP_CHAIN_W || i < 0)
        return XP_FAIL(XP_E_ARG, "relations: %s has no bound", xp_chain_name(o));
    xp_tensor *mine = xp_stage_tensor(s, args, i);
    const xp_tensor ref = *mine;
    xp_tensor tol = ref;
    XP_TRY(take(b, sizeof(double) * (size_t)xp_tensor_count(&ref), &p));
    XP_TRY(take(b, s->bound_workspace(args, &b->mesh), &ws));
    tol.data = p;
    mine->dtype = o == XP_CHAIN_LOGITS && b->in->d->logits_dtype == XP_WIDE_F32 ? XP_F32 : b->in->x.dtype;
    const xp_status st = s->bound(args, &b->mesh, i, &ref, ws, &tol);
    mine->dtype = XP_F64;
    if (st == XP_OK)
        r->tol[o] = p;
    return st;
}

xp_status xp_relation_bound_of(xp_relation_bound *b, xp_chain_out o, int64_t lo, int64_t hi, const double **out,
                               int64_t *out_n) {
    range *r;
    XP_TRY(find_range(b, lo, hi, &r));
    if (!r->tol[o])
        XP_TRY(fill_tol(b, r, o));
    const xp_stage *s = o == XP_CHAIN_LOGITS ? &xp_stage_router : &xp_stage_moe;
    const void *args = o == XP_CHAIN_LOGITS ? (const void *)&r->router : (const void *)&r->moe;
    *out = r->tol[o];
    *out_n = xp_tensor_count(xp_stage_ctensor(s, args, xp_stage_operand(s, xp_chain_name(o))));
    return XP_OK;
}

static int is_chosen(const int32_t *choice, int64_t K, int64_t e) {
    for (int64_t k = 0; k < K; k++) {
        if (choice[k] == e)
            return 1;
    }
    return 0;
}

xp_status xp_relation_choice(const xp_chain_in *in, const xp_tensor *logits, int64_t t, const int32_t *choice,
                             int *out) {
    xp_relation_bound *b;
    xp_tensor key, tol, idx = {0};
    void *ws;
    xp_status st;
    XP_TRY(xp_relation_bound_open(in, &idx, &b));
    xp_route_args a = {.logits = xp_tensor_rows(logits, 0, t, t + 1),
                       .bias = in->bias,
                       .dialect = in->d,
                       .scale_e = in->scale_e,
                       .table = in->table,
                       .act = in->x.dtype};
    if (in->token.data)
        a.token = xp_tensor_rows(&in->token, 0, t, t + 1);
    const int64_t one[] = {1, in->K}, all[] = {1, in->Z};
    XP_GOTO(out, take(b, sizeof(int32_t) * (size_t)in->K, &ws));
    a.idx = xp_tensor_of(ws, XP_I32, 2, one);
    XP_GOTO(out, take(b, sizeof(double) * (size_t)in->K, &ws));
    a.w = xp_tensor_of(ws, in->d->weight_dtype == XP_WIDE_ACT ? in->x.dtype : XP_F32, 2, one);
    XP_GOTO(out, take(b, sizeof(double) * (size_t)in->Z, &ws));
    a.scores = xp_tensor_of(ws, XP_F32, 2, all);
    const int64_t weighed = in->d->shared_rows, ids = in->Z - weighed;
    if (weighed > 0)
        XP_GOTO(out, f64(b, 1, weighed, 1, 2, &a.gamma));
    XP_GOTO(out, f64(b, 1, in->Z, 1, 2, &key));
    XP_GOTO(out, f64(b, 1, in->Z, 1, 2, &tol));
    XP_GOTO(out, take(b, xp_stage_route.bound_workspace(&a, &b->mesh), &ws));
    XP_GOTO(out, xp_stage_route.keys(&a, &b->mesh, ws, &key, &tol));
    const double *k = key.data, *e = tol.data;
    *out = 1;
    for (int64_t i = 0; i < in->K; i++) {
        const int64_t mine = choice[i];
        *out &= mine >= 0 && mine < ids;
        for (int64_t z = 0; *out && z < ids; z++)
            *out = is_chosen(choice, in->K, z) || k[z] - k[mine] <= e[z] + e[mine];
    }
out:
    xp_relation_bound_close(b);
    return st;
}
