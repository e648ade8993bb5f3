/* How the ranks of the simulated mesh meet, vote and wait: shared by mesh_sim.c and mesh_sim_meet.c only. */
#ifndef XP_HARNESS_MESH_SIM_MEET_H
#define XP_HARNESS_MESH_SIM_MEET_H

#include <pthread.h>
#include <semaphore.h>

#include "mesh.h"

typedef enum {
    XP_SIM_ALL_GATHER,
    XP_SIM_REDUCE_SCATTER,
    XP_SIM_ALL_REDUCE,
    XP_SIM_ALL_TO_ALL_V,
    XP_SIM_BARRIER,
    XP_SIM_SPLIT
} xp_sim_kind;

/* What one rank calls. */
typedef struct {
    xp_sim_kind kind;
    xp_status bad; /* this rank refuses its own arguments; its seat has the text */
    xp_redop op;
    xp_tensor src, dst;         /* all_reduce: the same buffer twice */
    const int64_t *rows, *recv; /* rows: all_gather and reduce_scatter of every rank, all_to_all_v sent */
    int64_t *start;             /* all_to_all_v: first row sent to each rank */
    int color, key;
    xp_comm **out;
} xp_sim_call;

typedef struct xp_sim_world xp_sim_world;
typedef struct xp_sim_group xp_sim_group;

/* One rank's end of a group. */
typedef struct {
    xp_comm comm;
    xp_sim_group *group;
    int rank; /* of the world */
    xp_sim_call call;
} xp_sim_member;

struct xp_sim_group {
    xp_sim_group *next;
    xp_sim_world *world;
    const char *name; /* the axis, or what was split */
    int size;
    int arrived, done; /* at the first and the second meeting */
    int64_t number;    /* of collectives that were voted on */
    xp_sim_member m[];
};

/* One rank of the world. */
typedef struct {
    xp_sim_world *world;
    int rank;
    sem_t wake;
    const xp_sim_group *at; /* where it waits at a first meeting, else NULL */
    int gone, left;         /* its function has returned; its thread will touch nothing more */
    xp_status verdict;
    int event; /* of the verdict */
    char text[XP_MESH_ERROR];
    uint64_t random;
    xp_mesh mesh;
    xp_mesh_end end;
    pthread_t thread;
} xp_sim_seat;

struct xp_sim_world {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a rank has left, or the world broke */
    const xp_mesh_ops *ops;
    xp_rank_fn fn;
    void *arg;
    int has_jitter;
    double timeout_s, broken_at; /* monotonic seconds */
    int size, live, waiting, left;
    int orphan; /* the caller has gone; the last rank to leave frees the world */
    int events;
    int broken;
    char why[XP_MESH_ERROR];
    xp_sim_group *groups;
    xp_sim_seat seat[];
};

/* A group of the world with all its members unset; NULL without memory. The world owns it. */
xp_sim_group *xp_sim_group_new(xp_sim_world *all, const char *name, int size);
void xp_sim_member_set(xp_sim_group *g, int i, int rank);

/* The first meeting: enters m->call and this rank's opinion of its own arguments (not-OK: the text is this thread's),
 * returns the verdict with its text. After XP_OK every member's call may be read, and its buffers used, until
 * xp_sim_part(). */
xp_status xp_sim_vote(xp_sim_member *m, xp_status opinion);
/* The second meeting: nobody leaves before all have come. */
void xp_sim_part(xp_sim_member *m);

/* A rank has failed outside a collective: every waiting peer gets XP_E_PEER, and so does every later call. Takes the
 * lock. */
void xp_sim_give_up(xp_sim_world *all, int rank, xp_status st, const char *text);
/* A rank's function has returned st with this text. Takes the lock. */
void xp_sim_rank_end(xp_sim_seat *s, xp_status st, const char *text);

/* Seconds of a clock as clock_gettime gives them, for absolute waits. */
struct timespec xp_sim_timespec(double seconds);

#endif
