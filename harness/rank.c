/* One rank: opening its device and memory, finding rows, and xp_call().
 *
 * Nothing falls back: a stage that is under test runs on the backend under test or not at all, unless a judge is there
 * to write down that it did not. */
#include "rank.h"

#include <string.h>

#include "arena.h"
#include "dump.h"
#include "fault.h"
#include "judge.h"

xp_status xp_rank_open(const xp_mesh *mesh, const xp_backend *impl, const xp_backend *base, xp_rank *out) {
    xp_status st;
    memset(out, 0, sizeof *out);
    out->mesh = mesh;
    out->rank = mesh->axis[XP_WORLD]->rank;
    out->world = mesh->axis[XP_WORLD]->size;
    out->impl = impl;
    out->base = base ? base : impl;
    out->layer = -1;
    XP_TRY(impl->device->open(0, &out->dev));
    XP_GOTO(out, impl->device->queue_open(out->dev, &out->q));
    XP_GOTO(out, xp_arena_open(impl->device, out->dev, out->q, &out->arena));
    return XP_OK;
out:
    xp_rank_close(out);
    return st;
}

void xp_rank_close(xp_rank *r) {
    xp_arena_close(r->arena);
    if (r->q)
        r->impl->device->queue_close(r->q);
    if (r->dev)
        r->impl->device->close(r->dev);
    r->arena = NULL;
    r->ws = NULL;
    r->ws_bytes = 0;
    r->q = NULL;
    r->dev = NULL;
}

xp_status xp_rank_alloc(xp_rank *r, xp_kind kind, size_t bytes, void **out) {
    return xp_arena_alloc(r->arena, kind, bytes, out);
}

void xp_rank_release(xp_rank *r, void *p) {
    xp_arena_release(r->arena, p);
}

xp_status xp_rank_tensor(xp_rank *r, xp_kind kind, xp_dtype d, int ndim, const int64_t *dim, xp_tensor *out) {
    int64_t n = 1;
    void *data;
    memset(out, 0, sizeof *out);
    if (ndim < 0 || ndim > XP_MAXDIM)
        return XP_FAIL(XP_E_ARG, "tensor: %d dimensions, expected 0 to %d", ndim, XP_MAXDIM);
    for (int i = 0; i < ndim; i++) {
        if (dim[i] < 0 || (dim[i] > 0 && n > INT64_MAX / 16 / dim[i]))
            return XP_FAIL(XP_E_ARG, "tensor: dimension %d is %lld: negative, or too many elements", i,
                           (long long)dim[i]);
        n *= dim[i];
    }
    XP_TRY(xp_arena_alloc(r->arena, kind, xp_dtype_bytes(d, n), &data));
    *out = xp_tensor_of(data, d, ndim, dim);
    out->mem = r->impl->device->mem;
    return XP_OK;
}

void xp_rank_drop(xp_rank *r, xp_tensor *t) {
    xp_arena_release(r->arena, t->data);
    memset(t, 0, sizeof *t);
}

void xp_rank_memory(const xp_rank *r, size_t live[XP_NKIND], size_t peak[XP_NKIND], size_t *out_peak_total) {
    xp_arena_memory(r->arena, live, peak, out_peak_total);
}

const xp_kernel *xp_rank_row(const xp_backend *b, const xp_stage *s, const void *args, const xp_mesh *m,
                             const char **out_why) {
    *out_why = "it has no row for this stage";
    for (const xp_kernel *const *k = b->kernel; *k; k++) {
        if ((*k)->stage != s && strcmp((*k)->stage->name, s->name) != 0)
            continue;
        const char *why = (*k)->why_not ? (*k)->why_not(args, m) : NULL;
        if (!why) {
            *out_why = NULL;
            return *k;
        }
        *out_why = why;
    }
    return NULL;
}

int xp_rank_tests(const xp_rank *r, const xp_stage *stage) {
    return r->only == NULL || strcmp(r->only, stage->name) == 0;
}

xp_status xp_rank_workspace(xp_rank *r, const xp_kernel *row, const void *args, size_t *out_bytes) {
    const size_t need = row->workspace ? row->workspace(args, r->mesh) : 0;
    *out_bytes = need;
    if (need <= r->ws_bytes)
        return XP_OK;
    xp_arena_release(r->arena, r->ws);
    r->ws = NULL;
    r->ws_bytes = 0;
    XP_TRY(xp_arena_alloc(r->arena, XP_KIND_BUFFER, need, &r->ws));
    r->ws_bytes = need;
    return XP_OK;
}

xp_status xp_rank_exec(xp_rank *r, const xp_kernel *row, const void *args) {
    size_t need;
    XP_TRY(xp_rank_workspace(r, row, args, &need));
    const xp_exec x = {r->dev, r->q, r->mesh, r->ws, need};
    if (r->fault && xp_rank_tests(r, row->stage) && strcmp(r->fault->stage, row->stage->name) == 0)
        XP_TRY(r->fault->run(r->fault, row, &x, args));
    else
        XP_TRY(row->run(&x, args));
    return r->impl->device->sync(r->q);
}

xp_status xp_rank_give_up(xp_rank *r, xp_status st) {
    xp_comm *world = r->mesh->axis[XP_WORLD];
    if (st != XP_OK && world->size > 1 && world->ops->give_up)
        world->ops->give_up(world, st);
    return st;
}

static xp_status call_unjudged(xp_rank *r, const xp_stage *stage, const char *site, const void *args) {
    const xp_backend *b = xp_rank_tests(r, stage) ? r->impl : r->base;
    const char *why;
    XP_TRY(stage->check(args, r->mesh));
    const xp_kernel *row = xp_rank_row(b, stage, args, r->mesh, &why);
    if (!row)
        return XP_FAIL(XP_E_ARG, "unsupported: backend %s cannot run stage %s (%s): %s", b->name, stage->name, site,
                       why);
    if (b->device->mem != r->impl->device->mem)
        return XP_FAIL(XP_E_ARG, "unsupported: backend %s works in another memory than %s", b->name, r->impl->name);
    return xp_rank_exec(r, row, args);
}

static xp_status call(xp_rank *r, const xp_stage *stage, const char *site, void *args) {
    if (r->judge)
        return xp_judge_call(r->judge, r, stage, site, args);
    return xp_rank_give_up(r, call_unjudged(r, stage, site, args));
}

xp_status xp_call(xp_rank *r, const xp_stage *stage, const char *site, void *args) {
    if (!r->dump)
        return call(r, stage, site, args);
    XP_TRY(xp_rank_give_up(r, xp_dump_before(r->dump, r, stage, args)));
    XP_TRY(call(r, stage, site, args));
    return xp_rank_give_up(r, xp_dump_after(r->dump, r, stage, site, args));
}
