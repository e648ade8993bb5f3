/* Around a run: poison, guard bands, bytes beside a view, input hashes, and the second run of a row that claims the
 * same bits twice.
 *
 * A row that returns the right numbers can still be wrong in what it touches; this file looks at everything but the
 * numbers. */
#include <stdlib.h>
#include <string.h>

#include "judge_call.h"

enum { BESIDE = 4096, PIECE = 65536, DAMAGES = 8 };

/* ---- views of host memory ---- */

static int is_host(const xp_tensor *t) {
    return t->mem == XP_HOST || t->mem == XP_PINNED;
}

/* Bytes from data to the end of the last element. */
static size_t span_bytes(const xp_tensor *t) {
    int64_t last = 0;
    if (xp_tensor_count(t) == 0)
        return 0;
    for (int d = 0; d < t->ndim; d++)
        last += (t->dim[d] - 1) * t->stride[d];
    return xp_dtype_bytes(t->dtype, last + 1);
}

static const xp_tensor *given(const xp_judged *c, int i) {
    return xp_stage_ctensor(c->s, c->args, i);
}

static xp_tensor *host(const xp_judged *c, int i) {
    return xp_stage_tensor(c->s, c->host, i);
}

/* Brings device operands of these roles (a mask of xp_role) to the host. */
static xp_status fetch(xp_judged *c, unsigned roles) {
    const xp_device_ops *d = c->r->impl->device;
    for (int i = 0; i < c->s->operands; i++) {
        const xp_tensor *t = given(c, i);
        if (!((unsigned)c->role[i] & roles) || is_host(t))
            continue;
        XP_TRY(d->copy(c->r->q, host(c, i)->data, XP_HOST, t->data, t->mem, span_bytes(t)));
    }
    return d->sync(c->r->q);
}

static xp_status send(xp_judged *c, int i) {
    const xp_device_ops *d = c->r->impl->device;
    const xp_tensor *t = given(c, i);
    if (is_host(t))
        return XP_OK;
    XP_TRY(d->copy(c->r->q, t->data, t->mem, host(c, i)->data, XP_HOST, span_bytes(t)));
    return d->sync(c->r->q);
}

xp_status xp_judged_enter(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        const xp_tensor *t = given(c, i);
        void *p;
        if (!c->role[i] || is_host(t))
            continue;
        XP_TRY(xp_judged_alloc(c, span_bytes(t), &p));
        host(c, i)->data = p;
        host(c, i)->mem = XP_HOST;
    }
    XP_TRY(fetch(c, XP_INOUT));
    memcpy(c->in, c->host, c->s->args_size);
    return XP_OK;
}

/* ---- rows of a tensor ---- */

static int64_t row_elements(const xp_tensor *t) {
    return t->ndim == 0 || xp_tensor_contiguous(t) ? xp_tensor_count(t) : t->dim[t->ndim - 1];
}

static const void *address(const xp_tensor *t, int64_t n) {
    const int64_t off = xp_tensor_offset(t, n);
    return (const char *)t->data + (size_t)off * (size_t)xp_dtype_bits(t->dtype) / 8;
}

static xp_hash hash_tensor(const xp_tensor *t) {
    const int64_t n = xp_tensor_count(t), row = row_elements(t);
    xp_hash h = {0, 0};
    for (int64_t i = 0; i < n; i += row) {
        const xp_hash next = xp_hash_bytes(address(t, i), xp_dtype_bytes(t->dtype, row), h.lo);
        h.lo = next.lo;
        h.hi = (h.hi << 1 | h.hi >> 63) ^ next.hi;
    }
    return h;
}

void xp_judged_copy(const xp_tensor *from, const xp_tensor *to) {
    const int64_t n = xp_tensor_count(from);
    int64_t row = from->ndim ? from->dim[from->ndim - 1] : 1;
    if (xp_tensor_contiguous(from) && xp_tensor_contiguous(to))
        row = n;
    for (int64_t i = 0; i < n; i += row) {
        const int64_t a = xp_tensor_offset(from, i), b = xp_tensor_offset(to, i);
        const size_t bits = (size_t)xp_dtype_bits(to->dtype);
        if (from->dtype == to->dtype)
            memcpy((char *)to->data + (size_t)b * bits / 8, (const char *)from->data + (size_t)a * bits / 8,
                   xp_dtype_bytes(to->dtype, row));
        else
            xp_widen_row(from->data, from->dtype, a, row, (double *)to->data + b);
    }
}

/* ---- before ---- */

static void hash_inputs(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        if (c->role[i] == XP_IN)
            c->before[i] = hash_tensor(host(c, i));
    }
    c->args_before = xp_hash_bytes(c->args, c->s->args_size, 0);
}

static xp_status save_inouts(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        if (c->role[i] != XP_INOUT)
            continue;
        XP_TRY(xp_judged_like(c, host(c, i), host(c, i)->dtype, &c->saved[i]));
        xp_judged_copy(host(c, i), &c->saved[i]);
        *xp_stage_tensor(c->s, c->in, i) = c->saved[i];
    }
    return XP_OK;
}

static xp_status poison_outputs(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        if (c->role[i] != XP_OUT)
            continue;
        xp_poison_fill(host(c, i));
        XP_TRY(send(c, i));
    }
    return XP_OK;
}

static xp_status poison_range(const xp_judged *c, char *at, size_t bytes) {
    static const size_t piece = 4096;
    const xp_device_ops *d = c->r->impl->device;
    unsigned char buf[4096];
    if (d->mem == XP_HOST) {
        xp_poison_bytes(at, bytes);
        return XP_OK;
    }
    xp_poison_bytes(buf, piece);
    for (size_t i = 0; i < bytes; i += piece)
        XP_TRY(d->copy(c->r->q, at + i, d->mem, buf, XP_HOST, bytes - i < piece ? bytes - i : piece));
    return d->sync(c->r->q);
}

static size_t ws_tail(const xp_judged *c) {
    const size_t tail = c->r->ws_bytes - c->ws_need;
    return tail < BESIDE ? tail : BESIDE;
}

/* The bytes behind what the row asked for are poisoned too: the buffer may have grown for another stage. */
static xp_status poison_workspace(xp_judged *c) {
    XP_TRY(xp_rank_workspace(c->r, c->row, c->args, &c->ws_need));
    if (!c->r->ws)
        return XP_OK;
    XP_TRY(poison_range(c, c->r->ws, c->ws_need));
    return poison_range(c, (char *)c->r->ws + c->ws_need, ws_tail(c));
}

/* ---- the bytes beside a view ---- */

/* Shrinks [*lo, *hi) so that it keeps clear of the other outputs of the call; `keep` is the end that stays. */
static void clip_beside(const xp_judged *c, int operand, const char **lo, const char **hi, int keep_high) {
    for (int i = 0; i < c->s->operands; i++) {
        if (i == operand || !(c->role[i] & XP_OUT))
            continue;
        const char *a = given(c, i)->data, *b = a + span_bytes(given(c, i));
        if (a >= *hi || b <= *lo)
            continue;
        if (keep_high)
            *lo = b < *hi ? b : *hi;
        else
            *hi = a > *lo ? a : *lo;
    }
}

/* Between the rows of a strided view, unless another output lies there. */
static xp_hash hash_gaps(const xp_judged *c, int operand, xp_hash h) {
    const xp_tensor *t = given(c, operand);
    const char *lo = t->data, *hi = lo + span_bytes(t), *end = NULL;
    const int64_t n = xp_tensor_count(t), row = row_elements(t);
    for (int i = 0; i < c->s->operands; i++) {
        const char *a = given(c, i)->data;
        if (i != operand && (c->role[i] & XP_OUT) && a < hi && a + span_bytes(given(c, i)) > lo)
            return h;
    }
    for (int64_t i = 0; i < n && row < n; i += row) {
        const char *at = address(t, i);
        if (end && at > end)
            h = xp_hash_bytes(end, at - end < BESIDE ? (size_t)(at - end) : BESIDE, h.lo);
        end = at + xp_dtype_bytes(t->dtype, row);
    }
    return h;
}

/* An output may be a view into a larger block, where no guard band lies beside it: its neighbours must not change. */
static xp_hash hash_around(const xp_judged *c, int operand) {
    const xp_tensor *t = given(c, operand);
    xp_hash h = {0, 0};
    xp_block b;
    if (!is_host(t) || !xp_arena_find(c->r->arena, t->data, &b))
        return h;
    const char *lo = t->data, *hi = lo + span_bytes(t), *end = b.data + b.bytes;
    const char *from = lo - b.data > BESIDE ? lo - BESIDE : b.data;
    const char *to = end - hi > BESIDE ? hi + BESIDE : end;
    clip_beside(c, operand, &from, &lo, 1);
    h = xp_hash_bytes(from, (size_t)(lo - from), 1);
    clip_beside(c, operand, &hi, &to, 0);
    h = xp_hash_bytes(hi, (size_t)(to - hi), h.lo);
    return hash_gaps(c, operand, h);
}

static void hash_surroundings(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        if (c->role[i] & XP_OUT)
            c->around[i] = hash_around(c, i);
    }
}

/* ---- after ---- */

static int operand_in(const xp_judged *c, const xp_block *b) {
    for (int pass = 0; pass < 2; pass++) { /* an output is the likelier culprit */
        for (int i = 0; i < c->s->operands; i++) {
            const char *p = given(c, i)->data;
            if (c->role[i] && (pass == 1 || (c->role[i] & XP_OUT)) && p >= b->data && p <= b->data + b->bytes)
                return i;
        }
    }
    return -1;
}

static void report_damage(xp_judged *c, const xp_damage *d) {
    const int operand = operand_in(c, &d->block);
    const int front = d->offset < 0;
    const long long off = front ? -d->offset : d->offset - (int64_t)d->block.bytes;
    const char *what = operand >= 0                              ? c->s->operand[operand].name
                       : d->block.data == (const char *)c->r->ws ? "the workspace"
                                                                 : "memory of another operand or call";
    xp_judged_fail(c, operand, XP_C_GUARD, NULL,
                   "%lld bytes %s the %s of %s were written, the nearest %lld bytes away (block of %zu bytes)",
                   (long long)d->damaged, front ? "before" : "behind", front ? "start" : "end", what,
                   front ? off - 1 : off, d->block.bytes);
}

static xp_status check_guards(xp_judged *c) {
    xp_damage d[DAMAGES];
    xp_status st;
    const int found = xp_arena_check(c->r->arena, d, DAMAGES, &st);
    for (int i = 0; i < found && i < DAMAGES; i++)
        report_damage(c, &d[i]);
    return st;
}

static xp_status check_workspace(xp_judged *c) {
    const xp_device_ops *d = c->r->impl->device;
    unsigned char buf[BESIDE];
    const size_t tail = c->r->ws ? ws_tail(c) : 0;
    if (tail == 0)
        return XP_OK;
    XP_TRY(d->copy(c->r->q, buf, XP_HOST, (char *)c->r->ws + c->ws_need, d->mem, tail));
    XP_TRY(d->sync(c->r->q));
    const size_t kept = xp_poison_bytes_left(buf, tail);
    if (kept < tail)
        xp_judged_fail(c, -1, XP_C_GUARD, NULL,
                       "a byte behind the end of the workspace was written, %zu bytes away (it has %zu bytes)", kept,
                       c->ws_need);
    return XP_OK;
}

static void check_surroundings(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        if ((c->role[i] & XP_OUT) && !xp_hash_equal(c->around[i], hash_around(c, i)))
            xp_judged_fail(c, i, XP_C_GUARD, NULL,
                           "bytes beside the elements of %s, in the block that it is a view of, were written",
                           c->s->operand[i].name);
    }
}

/* A changed input may no longer be one that the judge's row can take. */
static xp_status check_inputs(xp_judged *c) {
    int changed = 0;
    for (int i = 0; i < c->s->operands; i++) {
        if (c->role[i] != XP_IN || xp_hash_equal(c->before[i], hash_tensor(host(c, i))))
            continue;
        xp_judged_fail(c, i, XP_C_INPUT, NULL, "the input %s changed while the row ran", c->s->operand[i].name);
        changed = 1;
    }
    if (!xp_hash_equal(c->args_before, xp_hash_bytes(c->args, c->s->args_size, 0))) {
        xp_judged_fail(c, -1, XP_C_INPUT, NULL, "the row changed its arguments");
        changed = 1;
    }
    return changed ? c->s->check(c->host, c->r->mesh) : XP_OK;
}

/* ---- twice ---- */

static int64_t rows_of(const xp_tensor *t) {
    const int64_t n = xp_tensor_count(t), last = t->ndim ? t->dim[t->ndim - 1] : 1;
    return n == 0 ? 0 : n / last;
}

static uint64_t hash_row(const xp_tensor *t, int64_t row) {
    const int64_t last = t->ndim ? t->dim[t->ndim - 1] : 1;
    return xp_hash_bytes(address(t, row * last), xp_dtype_bytes(t->dtype, last), 0).lo;
}

/* Hashes of every row of every output, one after another. */
static int64_t hash_outputs(const xp_judged *c, uint64_t *out) {
    int64_t n = 0;
    for (int i = 0; i < c->s->operands; i++) {
        if (!(c->role[i] & XP_OUT))
            continue;
        const int64_t rows = rows_of(host(c, i));
        for (int64_t r = 0; r < rows && out; r++)
            out[n + r] = hash_row(host(c, i), r);
        n += rows;
    }
    return n;
}

static void compare_outputs(xp_judged *c, const uint64_t *first) {
    for (int i = 0; i < c->s->operands; i++) {
        if (!(c->role[i] & XP_OUT))
            continue;
        const xp_tensor *t = host(c, i);
        const int64_t rows = rows_of(t), last = t->ndim ? t->dim[t->ndim - 1] : 1;
        int64_t differ = 0, at = 0;
        for (int64_t r = 0; r < rows; r++) {
            if (*first++ != hash_row(t, r) && differ++ == 0)
                at = r;
        }
        if (differ == 0)
            continue;
        xp_place p;
        xp_judged_place(c, i, t, at * last, &p);
        xp_judged_fail(c, i, XP_C_NONDET, &p, "%lld of %lld rows of %s have other bits in a second run",
                       (long long)differ, (long long)rows, c->s->operand[i].name);
    }
}

static xp_status restore_inouts(xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        if (c->role[i] != XP_INOUT)
            continue;
        xp_judged_copy(&c->saved[i], host(c, i));
        XP_TRY(send(c, i));
    }
    return XP_OK;
}

static xp_status run_again(xp_judged *c) {
    xp_status st = XP_OK;
    void *first;
    XP_TRY(xp_judged_alloc(c, (size_t)hash_outputs(c, NULL) * sizeof(uint64_t), &first));
    hash_outputs(c, first);
    XP_GOTO(out, restore_inouts(c));
    XP_GOTO(out, poison_outputs(c));
    XP_GOTO(out, poison_workspace(c));
    XP_GOTO(out, xp_rank_exec(c->r, c->row, c->args));
    XP_GOTO(out, fetch(c, XP_INOUT));
    XP_GOTO(out, check_guards(c));
    compare_outputs(c, first);
out:
    xp_arena_release(c->mem, first);
    return st;
}

/* Every rank of a collective decides alike: by the number of the call, never by its data. */
static int wants_twice(const xp_judged *c) {
    const xp_twice t = c->j->o.twice;
    return (c->row->det & XP_DET_RUN) && (t == XP_TWICE_ALWAYS || (t == XP_TWICE_FIRST && c->nth == 0));
}

xp_status xp_judged_run(xp_judged *c) {
    hash_inputs(c);
    XP_TRY(save_inouts(c));
    XP_TRY(poison_outputs(c));
    XP_TRY(poison_workspace(c));
    hash_surroundings(c);
    XP_TRY(xp_rank_exec(c->r, c->row, c->args));
    XP_TRY(fetch(c, XP_INOUT));
    XP_TRY(check_guards(c));
    XP_TRY(check_workspace(c));
    check_surroundings(c);
    XP_TRY(check_inputs(c));
    return wants_twice(c) ? run_again(c) : XP_OK;
}
