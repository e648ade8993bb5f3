/* The meetings of the simulated mesh: the vote before a collective, the parting after it, and waits that cannot end.
 *
 * A rank posts what it calls and sleeps until all members of the group have posted. The last to come compares all posts
 * and hands every member its verdict. A wait that cannot end is found by counting, not by a clock: when every rank that
 * has not returned waits, nobody can come. The deadline is only for ranks that run on outside.
 *
 * One lock guards all bookkeeping of a world; a waiting rank sleeps on its own semaphore, so a wake-up disturbs nobody
 * else. Verdicts and their texts are functions of what the ranks called: they must not depend on who came first. */
#include "mesh_sim_meet.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mesh_host.h"

static const char *const call_name[] = {"all_gather",   "reduce_scatter", "all_reduce",
                                        "all_to_all_v", "barrier",        "split"};

/* ---- text that grows up to a limit ---- */

typedef struct {
    char *at;
    size_t left;
} writer;

static void say(writer *w, const char *fmt, ...) XP_PRINTF(2, 3);
static void say(writer *w, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(w->at, w->left, fmt, ap);
    va_end(ap);
    const size_t used = n < 0 ? 0 : (size_t)n < w->left ? (size_t)n : w->left - 1;
    w->at += used;
    w->left -= used;
}

static writer write_to(char *buf, size_t bytes) {
    const writer w = {buf, bytes};
    buf[0] = '\0';
    return w;
}

static void say_rows(writer *w, const xp_tensor *t, int from) {
    say(w, "[");
    for (int i = from; i < t->ndim; i++)
        say(w, "%s%lld", i > from ? "," : "", (long long)t->dim[i]);
    say(w, "]");
}

/* ---- time ---- */

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct timespec xp_sim_timespec(double s) {
    struct timespec t;
    t.tv_sec = (time_t)s;
    t.tv_nsec = (long)((s - (double)t.tv_sec) * 1e9);
    return t;
}

/* splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* A quarter of the time nothing, a quarter a yield, else up to 200 microseconds. */
static void jitter(xp_sim_seat *s) {
    if (!s->world->has_jitter)
        return;
    const uint64_t x = next_random(&s->random);
    if ((x & 3) == 1)
        sched_yield();
    if ((x & 3) >= 2) {
        const struct timespec t = {0, (long)(x >> 8) % 200001};
        nanosleep(&t, NULL);
    }
}

/* ---- waits that cannot end (under the lock) ---- */

/* What a rank that is missed does instead. */
static void say_whereabouts(writer *w, const xp_sim_world *all, int rank) {
    const xp_sim_seat *s = &all->seat[rank];
    const xp_sim_group *g = s->at;
    if (s->gone)
        say(w, "rank %d, which has returned", rank);
    else if (!g)
        say(w, "rank %d, which is in no collective", rank);
    for (int i = 0; g && i < g->size; i++) {
        if (g->m[i].rank == rank)
            say(w, "rank %d, which waits in %s #%lld on %s", rank, call_name[g->m[i].call.kind],
                (long long)g->number + 1, g->name);
    }
}

/* "all_reduce #3 on fsdp: rank 0 waits for rank 1, which ...": where a rank waits and what its missing peers do. */
static void say_wait(const xp_sim_world *all, int rank, char *buf, size_t bytes) {
    enum { NAMED = 3 };
    const xp_sim_group *g = all->seat[rank].at;
    writer w = write_to(buf, bytes);
    int missing = 0;
    for (int i = 0; i < g->size; i++) {
        if (g->m[i].rank == rank)
            say(&w, "%s #%lld on %s: rank %d waits for ", call_name[g->m[i].call.kind], (long long)g->number + 1,
                g->name, rank);
    }
    for (int i = 0; i < g->size; i++) {
        const int peer = g->m[i].rank;
        if (all->seat[peer].at == g || ++missing > NAMED)
            continue;
        say(&w, "%s", missing > 1 ? "; and for " : "");
        say_whereabouts(&w, all, peer);
    }
    if (missing > NAMED)
        say(&w, "; and for %d more", missing - NAMED);
}

/* Ends every wait at a first meeting and refuses all later ones. why NULL: each waiting rank gets st and a text about
 * its own wait, and later callers hear of the lowest rank's; else all get XP_E_PEER and why. */
static void break_world(xp_sim_world *all, xp_status st, const char *why) {
    all->events++;
    all->broken = 1;
    all->broken_at = seconds(CLOCK_MONOTONIC);
    snprintf(all->why, sizeof all->why, "%s", why ? why : "");
    for (int r = 0; r < all->size; r++) {
        xp_sim_seat *s = &all->seat[r];
        if (!s->at)
            continue;
        s->event = all->events;
        s->verdict = why ? XP_E_PEER : st;
        if (why)
            memcpy(s->text, all->why, sizeof s->text);
        else
            say_wait(all, r, s->text, sizeof s->text);
        if (!all->why[0])
            memcpy(all->why, s->text, sizeof all->why);
    }
    for (int r = 0; r < all->size; r++) { /* only now: the texts above speak of who waits where */
        if (all->seat[r].at)
            sem_post(&all->seat[r].wake);
        all->seat[r].at = NULL;
    }
    all->waiting = 0;
    pthread_cond_broadcast(&all->changed);
}

/* Called when a rank has begun to wait, or has returned. */
static void break_if_stuck(xp_sim_world *all) {
    if (all->waiting > 0 && all->waiting == all->live)
        break_world(all, XP_E_COMM, NULL);
}

/* Sleeps until released; past the deadline, breaks the world. */
static void await(xp_sim_seat *s) {
    xp_sim_world *all = s->world;
    const double deadline = seconds(CLOCK_MONOTONIC) + all->timeout_s;
    for (;;) {
        /* sem_timedwait knows only the calendar clock, so a jump of it must not look like a hang. */
        const double rest = deadline - seconds(CLOCK_MONOTONIC);
        if (rest <= 0.0)
            break;
        const struct timespec t = xp_sim_timespec(seconds(CLOCK_REALTIME) + rest);
        if (sem_timedwait(&s->wake, &t) == 0)
            return;
    }
    pthread_mutex_lock(&all->lock);
    if (s->at)
        break_world(all, XP_E_HANG, NULL);
    pthread_mutex_unlock(&all->lock);
    while (sem_wait(&s->wake) != 0) {
    }
}

/* ---- groups ---- */

xp_sim_group *xp_sim_group_new(xp_sim_world *all, const char *name, int size) {
    xp_sim_group *g =
        calloc(1, sizeof *g + (size_t)size * sizeof g->m[0] + (size_t)size * (size_t)size * sizeof(int64_t));
    if (!g)
        return NULL;
    int64_t *start = (int64_t *)(void *)&g->m[size];
    g->next = all->groups;
    g->world = all;
    g->name = name;
    g->size = size;
    for (int i = 0; i < size; i++)
        g->m[i].call.start = start + (size_t)i * (size_t)size;
    all->groups = g;
    return g;
}

void xp_sim_member_set(xp_sim_group *g, int i, int rank) {
    xp_sim_member *m = &g->m[i];
    m->group = g;
    m->rank = rank;
    m->comm.ops = g->world->ops;
    m->comm.rank = i;
    m->comm.size = g->size;
    m->comm.self = m;
}

/* ---- the vote (under the lock, by the last to come) ---- */

/* The first disagreement found: between members a and b. */
typedef struct {
    int a, b;
    writer text;
} dispute;

static int differ(dispute *d, int a, int b) {
    d->a = a;
    d->b = b;
    return 1;
}

static int differ_in_kind(const xp_sim_group *g, dispute *d) {
    const xp_sim_member *first = &g->m[0];
    for (int i = 1; i < g->size; i++) {
        const xp_sim_member *m = &g->m[i];
        if (m->call.kind == first->call.kind)
            continue;
        say(&d->text, "collective #%lld on %s: rank %d calls %s, rank %d calls %s", (long long)g->number + 1, g->name,
            first->rank, call_name[first->call.kind], m->rank, call_name[m->call.kind]);
        return differ(d, 0, i);
    }
    return 0;
}

/* dtype, reduction, and the shape of a row (all_reduce: of the whole buffer). */
static int differ_in_shape(const xp_sim_group *g, dispute *d) {
    const xp_sim_member *first = &g->m[0];
    const int from = first->call.kind == XP_SIM_ALL_REDUCE ? 0 : 1;
    const xp_tensor *t = &first->call.src;
    for (int i = 1; i < g->size; i++) {
        const xp_sim_member *m = &g->m[i];
        const xp_tensor *u = &m->call.src;
        if (u->dtype != t->dtype) {
            say(&d->text, "rank %d has %s, rank %d has %s", first->rank, xp_dtype_name(t->dtype), m->rank,
                xp_dtype_name(u->dtype));
            return differ(d, 0, i);
        }
        if (m->call.op != first->call.op) {
            say(&d->text, "rank %d reduces by %s, rank %d by %s", first->rank, first->call.op == XP_MAX ? "max" : "sum",
                m->rank, m->call.op == XP_MAX ? "max" : "sum");
            return differ(d, 0, i);
        }
        if (!xp_host_same_rows(t, u) || (from == 0 && t->ndim > 0 && t->dim[0] != u->dim[0])) {
            say(&d->text, "rank %d has %s ", first->rank, from ? "rows of" : "a buffer of");
            say_rows(&d->text, t, from);
            say(&d->text, ", rank %d ", m->rank);
            say_rows(&d->text, u, from);
            return differ(d, 0, i);
        }
    }
    return 0;
}

/* rows[] must be one list on all ranks; each rank's own entry was checked against its tensor. */
static int differ_in_rows(const xp_sim_group *g, dispute *d) {
    const int gather = g->m[0].call.kind == XP_SIM_ALL_GATHER;
    for (int i = 0; i < g->size; i++) {
        for (int j = 0; j < g->size; j++) {
            const int64_t has = g->m[i].call.rows[i], expects = g->m[j].call.rows[i];
            if (has == expects)
                continue;
            say(&d->text, "rank %d %s %lld rows, but rank %d %s %lld", g->m[i].rank, gather ? "brings" : "takes",
                (long long)has, g->m[j].rank, gather ? "expects" : "gives it", (long long)expects);
            return differ(d, i, j);
        }
    }
    return 0;
}

static int differ_in_counts(const xp_sim_group *g, dispute *d) {
    for (int i = 0; i < g->size; i++) {
        for (int j = 0; j < g->size; j++) {
            const int64_t sends = g->m[i].call.rows[j], expects = g->m[j].call.recv[i];
            if (sends == expects)
                continue;
            say(&d->text, "rank %d sends %lld rows to rank %d, which expects %lld", g->m[i].rank, (long long)sends,
                g->m[j].rank, (long long)expects);
            return differ(d, i, j);
        }
    }
    return 0;
}

static int find_dispute(const xp_sim_group *g, dispute *d) {
    if (differ_in_kind(g, d))
        return 1;
    const xp_sim_kind kind = g->m[0].call.kind;
    say(&d->text, "%s #%lld on %s: ", call_name[kind], (long long)g->number + 1, g->name);
    if (kind == XP_SIM_BARRIER || kind == XP_SIM_SPLIT)
        return 0;
    if (differ_in_shape(g, d))
        return 1;
    if (kind == XP_SIM_ALL_TO_ALL_V)
        return differ_in_counts(g, d);
    return kind != XP_SIM_ALL_REDUCE && differ_in_rows(g, d);
}

/* Hands out the verdicts when ranks refused their own arguments: each has its own, the others hear of the first. 0:
 * none did. */
static int judge_refusals(xp_sim_group *g) {
    const xp_sim_seat *first = NULL;
    for (int i = 0; i < g->size; i++) {
        if (g->m[i].call.bad == XP_OK)
            continue;
        g->world->seat[g->m[i].rank].verdict = g->m[i].call.bad;
        first = first ? first : &g->world->seat[g->m[i].rank];
    }
    for (int i = 0; i < g->size && first; i++) {
        xp_sim_seat *s = &g->world->seat[g->m[i].rank];
        if (g->m[i].call.bad != XP_OK)
            continue;
        s->verdict = XP_E_PEER;
        memcpy(s->text, first->text, sizeof s->text);
    }
    return first != NULL;
}

static int judge_disputes(xp_sim_group *g) {
    char text[XP_MESH_ERROR];
    dispute d = {-1, -1, write_to(text, sizeof text)};
    if (!find_dispute(g, &d))
        return 0;
    for (int i = 0; i < g->size; i++) {
        xp_sim_seat *s = &g->world->seat[g->m[i].rank];
        s->verdict = i == d.a || i == d.b ? XP_E_COMM : XP_E_PEER;
        memcpy(s->text, text, sizeof text);
    }
    return 1;
}

static const char *name_of_split(const char *parent) {
    static const char *const made[XP_NAXIS] = {"a split of dp",      "a split of fsdp",  "a split of ep",
                                               "a split of ep_fsdp", "a split of ep_dp", "a split of edp",
                                               "a split of world"};
    for (int a = 0; a < XP_NAXIS; a++) {
        if (strcmp(parent, xp_axis_name((xp_axis)a)) == 0)
            return made[a];
    }
    return parent;
}

/* Makes the group of one color, its members in order of (key, rank): selection sort, the groups are small. */
static xp_status split_color(xp_sim_group *g, int color) {
    int order[XP_MESH_MAX_RANKS], n = 0;
    for (int i = 0; i < g->size; i++) {
        if (g->m[i].call.color != color)
            continue;
        int at = n++;
        for (; at > 0 && g->m[order[at - 1]].call.key > g->m[i].call.key; at--)
            order[at] = order[at - 1];
        order[at] = i;
    }
    xp_sim_group *made = xp_sim_group_new(g->world, name_of_split(g->name), n);
    if (!made)
        return XP_FAIL(XP_E_NOMEM, "split of %s: no memory for a communicator of %d ranks", g->name, n);
    for (int i = 0; i < n; i++) {
        xp_sim_member_set(made, i, g->m[order[i]].rank);
        *g->m[order[i]].call.out = &made->m[i].comm;
    }
    return XP_OK;
}

static int first_of_its_color(const xp_sim_group *g, int i) {
    for (int j = 0; j < i; j++) {
        if (g->m[j].call.color == g->m[i].call.color)
            return 0;
    }
    return 1;
}

static void split_all(xp_sim_group *g) {
    xp_status st = XP_OK;
    for (int i = 0; i < g->size && st == XP_OK; i++) {
        if (first_of_its_color(g, i))
            st = split_color(g, g->m[i].call.color);
    }
    for (int i = 0; i < g->size && st != XP_OK; i++) {
        xp_sim_seat *s = &g->world->seat[g->m[i].rank];
        *g->m[i].call.out = NULL;
        s->verdict = st;
        snprintf(s->text, sizeof s->text, "%s", xp_error_text());
    }
}

static void judge(xp_sim_group *g) {
    if (judge_refusals(g) || judge_disputes(g)) {
        g->world->events++;
        for (int i = 0; i < g->size; i++)
            g->world->seat[g->m[i].rank].event = g->world->events;
    } else if (g->m[0].call.kind == XP_SIM_SPLIT) {
        split_all(g);
    }
}

/* ---- the two meetings ---- */

static void wake_others(const xp_sim_group *g, int rank) {
    for (int i = 0; i < g->size; i++) {
        if (g->m[i].rank != rank)
            sem_post(&g->world->seat[g->m[i].rank].wake);
    }
}

/* First meeting: posts m->call and returns the verdict. */
static xp_status meet(xp_sim_member *m) {
    xp_sim_group *g = m->group;
    xp_sim_world *all = g->world;
    xp_sim_seat *s = &all->seat[m->rank];
    jitter(s);
    pthread_mutex_lock(&all->lock);
    if (all->broken) {
        pthread_mutex_unlock(&all->lock);
        return XP_FAIL(XP_E_PEER, "%s", all->why);
    }
    s->verdict = XP_OK;
    if (++g->arrived == g->size) {
        judge(g);
        g->arrived = 0;
        g->number++;
        all->waiting -= g->size - 1;
        for (int i = 0; i < g->size; i++)
            all->seat[g->m[i].rank].at = NULL;
        pthread_mutex_unlock(&all->lock);
        wake_others(g, m->rank);
    } else {
        s->at = g;
        all->waiting++;
        break_if_stuck(all);
        pthread_mutex_unlock(&all->lock);
        await(s);
    }
    jitter(s);
    return s->verdict == XP_OK ? XP_OK : XP_FAIL(s->verdict, "%s", s->text);
}

/* Enters the vote with this rank's own opinion of its arguments. */
xp_status xp_sim_vote(xp_sim_member *m, xp_status opinion) {
    const xp_sim_group *g = m->group;
    xp_sim_seat *s = &g->world->seat[m->rank];
    m->call.bad = opinion;
    if (opinion != XP_OK) /* only a vote that this rank joins can change the number, so it is safe to read here */
        snprintf(s->text, sizeof s->text, "%s #%lld on %s: rank %d: %.900s", call_name[m->call.kind],
                 (long long)g->number + 1, g->name, m->rank, xp_error_text());
    return meet(m);
}

/* Second meeting: nobody leaves before all have copied. It always ends, because copying cannot fail or wait. */
void xp_sim_part(xp_sim_member *m) {
    xp_sim_group *g = m->group;
    xp_sim_world *all = g->world;
    jitter(&all->seat[m->rank]);
    pthread_mutex_lock(&all->lock);
    const int last = ++g->done == g->size;
    if (last)
        g->done = 0;
    pthread_mutex_unlock(&all->lock);
    if (last)
        wake_others(g, m->rank);
    while (!last && sem_wait(&all->seat[m->rank].wake) != 0) {
    }
}

/* ---- ranks that fail or return ---- */

void xp_sim_give_up(xp_sim_world *all, int rank, xp_status st, const char *text) {
    char why[XP_MESH_ERROR];
    snprintf(why, sizeof why, "rank %d failed (%s): %.900s", rank, xp_status_name(st), text);
    pthread_mutex_lock(&all->lock);
    if (!all->broken)
        break_world(all, XP_E_PEER, why);
    pthread_mutex_unlock(&all->lock);
}

void xp_sim_rank_end(xp_sim_seat *s, xp_status st, const char *text) {
    xp_sim_world *all = s->world;
    char why[XP_MESH_ERROR];
    /* A verdict's text already says which ranks differ, and all its ranks have it: whoever returns first must not
     * matter. */
    const int verdict = s->event > 0 && st == s->verdict;
    pthread_mutex_lock(&all->lock);
    if (st != XP_OK) {
        s->end.status = st;
        s->end.order = verdict ? s->event : ++all->events;
        snprintf(s->end.text, sizeof s->end.text, "%s", text[0] ? text : "failed without a text");
        if (verdict)
            snprintf(why, sizeof why, "%s", s->end.text);
        else
            snprintf(why, sizeof why, "rank %d failed (%s): %.900s", s->rank, xp_status_name(st), s->end.text);
        if (!all->broken)
            break_world(all, XP_E_PEER, why);
    }
    s->gone = 1;
    all->live--;
    break_if_stuck(all);
    pthread_mutex_unlock(&all->lock);
}
