/* The simulated mesh: ranks are threads of one process, collectives are memory copies between two meetings.
 *
 * All members of a group meet and vote (mesh_sim_meet.c). Only after a unanimous vote does each rank pull, or fold, its
 * part out of its peers' memory; then all meet again, so nobody returns while a peer can still touch its buffers.
 * Results are functions of the operands alone: every sum is a left fold over the group's ranks, whoever computes it and
 * whenever it comes. */
#include "mesh_sim.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mesh_host.h"
#include "mesh_sim_meet.h"

/* ---- the collectives ---- */

static xp_sim_member *member_of(const xp_comm *c) {
    return c->self;
}

/* Begins a call; start[] stays the member's own. */
static xp_sim_member *begin(xp_comm *c, xp_sim_kind kind, const xp_tensor *src, const xp_tensor *dst) {
    xp_sim_member *m = member_of(c);
    int64_t *start = m->call.start;
    memset(&m->call, 0, sizeof m->call);
    m->call.kind = kind;
    m->call.start = start;
    if (src)
        m->call.src = *src;
    if (dst)
        m->call.dst = *dst;
    return m;
}

static xp_status check_rows(const char *field, const int64_t *rows, int size, int64_t *out_sum) {
    *out_sum = 0;
    if (!rows)
        return XP_FAIL(XP_E_ARG, "%s: no row counts", field);
    for (int r = 0; r < size; r++) {
        if (rows[r] < 0 || rows[r] > INT64_MAX - *out_sum)
            return XP_FAIL(XP_E_ARG, "%s[%d]: %lld rows, expected 0 or more and a sum that fits", field, r,
                           (long long)rows[r]);
        *out_sum += rows[r];
    }
    return XP_OK;
}

/* Two contiguous views that share memory, other than src being that row of dst itself (in place; -1: no row). */
static int overlap(const xp_tensor *src, const xp_tensor *dst, int64_t in_place_row) {
    const uintptr_t s = (uintptr_t)src->data, d = (uintptr_t)dst->data;
    const size_t s_bytes = xp_dtype_bytes(src->dtype, xp_host_count(src));
    const size_t d_bytes = xp_dtype_bytes(dst->dtype, xp_host_count(dst));
    const size_t row_bytes = xp_dtype_bytes(dst->dtype, xp_host_row(dst));
    if (s_bytes == 0 || d_bytes == 0 || !xp_tensor_contiguous(src) || !xp_tensor_contiguous(dst))
        return 0;
    if (in_place_row >= 0 && s == d + (size_t)in_place_row * row_bytes)
        return 0;
    return s < d + d_bytes && d < s + s_bytes;
}

static xp_status check_pair(const xp_tensor *src, const xp_tensor *dst, int64_t in_place_row) {
    XP_TRY(xp_host_view("src", src, 1));
    XP_TRY(xp_host_view("dst", dst, 1));
    if (src->dtype != dst->dtype)
        return XP_FAIL(XP_E_ARG, "dst: %s, but src is %s", xp_dtype_name(dst->dtype), xp_dtype_name(src->dtype));
    if (!xp_host_same_rows(src, dst))
        return XP_FAIL(XP_E_ARG,
                       "dst: its rows have other dimensions than those of src (%d and %d dimensions, %lld and "
                       "%lld elements a row)",
                       dst->ndim, src->ndim, (long long)xp_host_row(dst), (long long)xp_host_row(src));
    if (overlap(src, dst, in_place_row))
        return XP_FAIL(XP_E_ARG, "dst: shares memory with src");
    return XP_OK;
}

static xp_status check_fold(xp_dtype d, xp_redop op) {
    if (op != XP_SUM && op != XP_MAX)
        return XP_FAIL(XP_E_ARG, "op: %d is neither sum nor max", (int)op);
    if (!xp_host_can_fold(d))
        return XP_FAIL(XP_E_ARG, "dtype: %s has no reductions (f64 f32 bf16 f16 i64 i32 u64 u8 have)",
                       xp_dtype_name(d));
    return XP_OK;
}

static int64_t rows_before(const int64_t *rows, int rank) {
    int64_t n = 0;
    for (int r = 0; r < rank; r++)
        n += rows[r];
    return n;
}

static xp_status check_all_gather(const xp_comm *c, const xp_tensor *src, const int64_t *rows, const xp_tensor *dst) {
    int64_t sum;
    XP_TRY(check_rows("rows", rows, c->size, &sum));
    XP_TRY(xp_host_view("src", src, 1));
    if (rows[c->rank] != src->dim[0])
        return XP_FAIL(XP_E_ARG, "rows[%d]: %lld, but src has %lld rows", c->rank, (long long)rows[c->rank],
                       (long long)src->dim[0]);
    XP_TRY(check_pair(src, dst, rows_before(rows, c->rank)));
    if (dst->dim[0] != sum)
        return XP_FAIL(XP_E_ARG, "dst: %lld rows, but all ranks together bring %lld", (long long)dst->dim[0],
                       (long long)sum);
    return XP_OK;
}

static xp_status sim_all_gather(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst) {
    (void)q;
    xp_sim_member *m = begin(c, XP_SIM_ALL_GATHER, src, dst);
    m->call.rows = rows;
    XP_TRY(xp_sim_vote(m, check_all_gather(c, src, rows, dst)));
    int64_t to = 0;
    for (int r = 0; r < c->size; r++) {
        xp_host_copy(&m->group->m[r].call.src, 0, rows[r], dst, to);
        to += rows[r];
    }
    xp_sim_part(m);
    return XP_OK;
}

static xp_status check_reduce_scatter(const xp_comm *c, const xp_tensor *src, const int64_t *rows, const xp_tensor *dst,
                                      xp_redop op) {
    int64_t sum;
    XP_TRY(check_rows("rows", rows, c->size, &sum));
    XP_TRY(check_pair(src, dst, -1));
    XP_TRY(check_fold(src->dtype, op));
    if (src->dim[0] != sum)
        return XP_FAIL(XP_E_ARG, "src: %lld rows, but all ranks together take %lld", (long long)src->dim[0],
                       (long long)sum);
    if (dst->dim[0] != rows[c->rank])
        return XP_FAIL(XP_E_ARG, "dst: %lld rows, but rows[%d] is %lld", (long long)dst->dim[0], c->rank,
                       (long long)rows[c->rank]);
    return XP_OK;
}

static xp_status sim_reduce_scatter(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst,
                                    xp_redop op) {
    (void)q;
    const xp_tensor *in[XP_MESH_MAX_RANKS], *out[1] = {dst};
    xp_sim_member *m = begin(c, XP_SIM_REDUCE_SCATTER, src, dst);
    m->call.rows = rows;
    m->call.op = op;
    XP_TRY(xp_sim_vote(m, check_reduce_scatter(c, src, rows, dst, op)));
    for (int r = 0; r < c->size; r++)
        in[r] = &m->group->m[r].call.src;
    const int64_t row = xp_host_row(dst);
    xp_host_fold(op, c->size, in, rows_before(rows, c->rank) * row, rows[c->rank] * row, 1, out, 0);
    xp_sim_part(m);
    return XP_OK;
}

static xp_status check_all_reduce(const xp_tensor *buf, xp_redop op) {
    XP_TRY(xp_host_view("buf", buf, 0));
    return check_fold(buf->dtype, op);
}

/* Each rank folds its share of the elements and stores it into every buffer: in place, without a second copy of
 * anything, and no element is touched by two ranks. */
static xp_status sim_all_reduce(xp_comm *c, xp_queue *q, xp_tensor *buf, xp_redop op) {
    (void)q;
    const xp_tensor *all[XP_MESH_MAX_RANKS];
    xp_sim_member *m = begin(c, XP_SIM_ALL_REDUCE, buf, buf);
    m->call.op = op;
    XP_TRY(xp_sim_vote(m, check_all_reduce(buf, op)));
    for (int r = 0; r < c->size; r++)
        all[r] = &m->group->m[r].call.src;
    const int64_t n = xp_host_count(buf), each = n / c->size, more = n % c->size;
    const int64_t from = each * c->rank + (c->rank < more ? c->rank : more);
    xp_host_fold(op, c->size, all, from, each + (c->rank < more), c->size, all, from);
    xp_sim_part(m);
    return XP_OK;
}

static xp_status check_all_to_all_v(const xp_comm *c, const xp_tensor *src, const int64_t *send_rows,
                                    const xp_tensor *dst, const int64_t *recv_rows, int64_t *start) {
    int64_t sent, received;
    XP_TRY(check_rows("send_rows", send_rows, c->size, &sent));
    XP_TRY(check_rows("recv_rows", recv_rows, c->size, &received));
    XP_TRY(check_pair(src, dst, -1));
    if (src->dim[0] < sent)
        return XP_FAIL(XP_E_ARG, "src: %lld rows, but send_rows adds up to %lld", (long long)src->dim[0],
                       (long long)sent);
    if (dst->dim[0] < received)
        return XP_FAIL(XP_E_ARG, "dst: %lld rows, but recv_rows adds up to %lld", (long long)dst->dim[0],
                       (long long)received);
    for (int r = 0; r < c->size; r++)
        start[r] = r == 0 ? 0 : start[r - 1] + send_rows[r - 1];
    return XP_OK;
}

static xp_status sim_all_to_all_v(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *send_rows,
                                  xp_tensor *dst, const int64_t *recv_rows) {
    (void)q;
    xp_sim_member *m = begin(c, XP_SIM_ALL_TO_ALL_V, src, dst);
    m->call.rows = send_rows;
    m->call.recv = recv_rows;
    XP_TRY(xp_sim_vote(m, check_all_to_all_v(c, src, send_rows, dst, recv_rows, m->call.start)));
    int64_t to = 0;
    for (int r = 0; r < c->size; r++) {
        const xp_sim_call *peer = &m->group->m[r].call;
        xp_host_copy(&peer->src, peer->start[c->rank], recv_rows[r], dst, to);
        to += recv_rows[r];
    }
    xp_sim_part(m);
    return XP_OK;
}

/* No buffers, so one meeting is enough. */
static xp_status sim_barrier(xp_comm *c, xp_queue *q) {
    (void)q;
    return xp_sim_vote(begin(c, XP_SIM_BARRIER, NULL, NULL), XP_OK);
}

static xp_status sim_split(xp_comm *c, int color, int key, xp_comm **out) {
    xp_sim_member *m = begin(c, XP_SIM_SPLIT, NULL, NULL);
    *out = NULL;
    m->call.color = color;
    m->call.key = key;
    m->call.out = out;
    return xp_sim_vote(m, XP_OK);
}

static void sim_give_up(xp_comm *c, xp_status why) {
    xp_sim_member *m = member_of(c);
    xp_sim_world *all = m->group->world;
    xp_sim_give_up(all, m->rank, why, xp_error_text());
}

static const xp_mesh_ops sim_ops = {
    .abi = XP_ABI,
    .size = sizeof(xp_mesh_ops),
    .name = "sim",
    .mems = XP_BIT(XP_HOST) | XP_BIT(XP_PINNED),
    .det = XP_DET_RUN,
    .all_gather = sim_all_gather,
    .reduce_scatter = sim_reduce_scatter,
    .all_reduce = sim_all_reduce,
    .all_to_all_v = sim_all_to_all_v,
    .barrier = sim_barrier,
    .split = sim_split,
    .give_up = sim_give_up,
};

/* ---- the world ---- */

static void world_free(xp_sim_world *all) {
    while (all->groups) {
        xp_sim_group *g = all->groups;
        all->groups = g->next;
        free(g);
    }
    for (int r = 0; r < all->size; r++)
        sem_destroy(&all->seat[r].wake);
    pthread_cond_destroy(&all->changed);
    pthread_mutex_destroy(&all->lock);
    free(all);
}

/* All groups of one axis. */
static xp_status axis_open(xp_sim_world *all, const xp_mesh_spec *s, xp_axis a) {
    int rank[XP_MESH_MAX_RANKS];
    for (int r = 0; r < all->size; r++) {
        if (xp_mesh_axis_index(s, a, r) != 0)
            continue;
        const int size = xp_mesh_axis_ranks(s, a, r, rank);
        xp_sim_group *g = xp_sim_group_new(all, xp_axis_name(a), size);
        if (!g)
            return XP_FAIL(XP_E_NOMEM, "mesh sim: no memory for a communicator of %d ranks", size);
        for (int i = 0; i < size; i++) {
            xp_sim_member_set(g, i, rank[i]);
            all->seat[rank[i]].mesh.axis[a] = &g->m[i].comm;
        }
    }
    return XP_OK;
}

static xp_status world_open(const xp_mesh_spec *s, xp_rank_fn fn, void *arg, xp_sim_world **out) {
    xp_sim_world *all = *out = calloc(1, sizeof *all + (size_t)s->world * sizeof all->seat[0]);
    pthread_condattr_t monotonic;
    xp_status st = XP_OK;
    if (!all)
        return XP_FAIL(XP_E_NOMEM, "mesh sim: no memory for %d ranks", s->world);
    pthread_mutex_init(&all->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&all->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    all->ops = &sim_ops;
    all->fn = fn;
    all->arg = arg;
    all->has_jitter = s->has_jitter;
    all->timeout_s = s->timeout_s;
    all->size = all->live = s->world;
    for (int r = 0; r < all->size; r++) {
        xp_sim_seat *t = &all->seat[r];
        t->world = all;
        t->rank = r;
        t->random = s->jitter ^ (uint64_t)(r + 1) * 0xD1B54A32D192ED03u;
        sem_init(&t->wake, 0, 0);
    }
    for (int a = 0; a < XP_NAXIS && st == XP_OK; a++)
        st = axis_open(all, s, (xp_axis)a);
    if (st != XP_OK)
        world_free(all);
    return st;
}

static void *rank_main(void *arg) {
    xp_sim_seat *s = arg;
    xp_sim_world *all = s->world;
    const xp_status st = all->fn(&s->mesh, s->rank, all->arg);
    xp_sim_rank_end(s, st, xp_error_text());
    pthread_mutex_lock(&all->lock);
    s->left = 1;
    const int free_it = ++all->left == all->size && all->orphan;
    pthread_cond_broadcast(&all->changed);
    pthread_mutex_unlock(&all->lock);
    if (free_it)
        world_free(all);
    return NULL;
}

/* Starts one thread a rank; ranks whose thread could not start have failed. */
static void start(xp_sim_world *all, int *started) {
    enum { STACK_BYTES = 8 << 20 };
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    for (int r = 0; r < all->size; r++) {
        xp_sim_seat *s = &all->seat[r];
        const int err = pthread_create(&s->thread, &attr, rank_main, s);
        started[r] = err == 0;
        if (err == 0)
            continue;
        char text[120];
        snprintf(text, sizeof text, "mesh sim: no thread for rank %d of %d: %s", r, all->size,
                 err == EAGAIN ? "the system's limit is reached" : "pthread_create failed");
        xp_sim_rank_end(s, XP_E_NOMEM, text);
        pthread_mutex_lock(&all->lock);
        s->left = 1;
        all->left++;
        pthread_mutex_unlock(&all->lock);
    }
    pthread_attr_destroy(&attr);
}

/* Waits until all ranks have left, or the world has been broken for timeout_s. Under the lock. */
static void wait_for_all(xp_sim_world *all) {
    while (all->left < all->size) {
        if (!all->broken) {
            pthread_cond_wait(&all->changed, &all->lock);
            continue;
        }
        const struct timespec t = xp_sim_timespec(all->broken_at + all->timeout_s);
        if (pthread_cond_timedwait(&all->changed, &all->lock, &t) == ETIMEDOUT)
            return;
    }
}

static void report(const xp_sim_world *all, xp_mesh_report *out) {
    out->world = all->size;
    for (int r = 0; r < all->size; r++) {
        const xp_sim_seat *s = &all->seat[r];
        xp_mesh_end *e = &out->end[r];
        *e = s->end;
        if (s->left)
            continue;
        e->status = XP_E_HANG;
        e->order = all->events + 1;
        e->stuck = 1;
        snprintf(e->text, sizeof e->text, "has not returned %g s after the mesh broke: %.900s", all->timeout_s,
                 all->why);
    }
}

xp_status xp_sim_run(const xp_mesh_spec *s, xp_rank_fn fn, void *arg, xp_mesh_report *out) {
    xp_sim_world *all;
    int started[XP_MESH_MAX_RANKS];
    pthread_t join[XP_MESH_MAX_RANKS];
    int joins = 0;
    XP_TRY(world_open(s, fn, arg, &all));
    if (all->size == 1) {
        rank_main(&all->seat[0]);
        report(all, out);
        world_free(all);
        return XP_OK;
    }
    start(all, started);
    pthread_mutex_lock(&all->lock);
    wait_for_all(all);
    report(all, out);
    all->orphan = all->left < all->size;
    for (int r = 0; r < all->size; r++) {
        if (started[r] && all->seat[r].left)
            join[joins++] = all->seat[r].thread;
        else if (started[r])
            pthread_detach(all->seat[r].thread);
    }
    const int orphan = all->orphan;
    pthread_mutex_unlock(&all->lock);
    for (int i = 0; i < joins; i++)
        pthread_join(join[i], NULL);
    if (!orphan)
        world_free(all);
    return XP_OK;
}
