/* A mesh as text ("sim:dp=2,fsdp=4,ep=4"), the coordinates of its ranks, and the one call that runs a function on all
 * of them.
 *
 * The text is the whole description: a case line, a repro line and a plan print it and read it back. This header must
 * not know how a kind moves bytes; that is the kind's own row in xp_mesh_kinds. */
#ifndef XP_HARNESS_MESH_H
#define XP_HARNESS_MESH_H

#include "xp/mesh.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    XP_MESH_MAX_RANKS = 64,    /* of one process: the simulated mesh, virtual ranks */
    XP_MESH_MAX_WORLD = 65536, /* of any mesh that text can name */
    XP_MESH_TEXT = 160,        /* bytes that hold every canonical spec */
    XP_MESH_ERROR = 1024       /* bytes of a rank's error text */
};

/* KIND:key=value,... with the keys dp, fsdp, ep, ep_fsdp, jitter and timeout, each at most once, no blanks.
 * Missing sizes are 1; with ep given and neither dp nor fsdp, fsdp = ep; ep_fsdp is world / ep unless given. */
typedef struct {
    char kind[8];
    int dp, fsdp, ep, ep_fsdp;
    int ep_dp, world; /* derived: world = dp * fsdp, ep_dp = world / (ep * ep_fsdp) */
    uint64_t jitter;  /* seed of random delays, when has_jitter */
    int has_jitter;
    double timeout_s; /* how long a rank waits for its peers before it calls them hung; 0.001 to 86400, default 300 */
} xp_mesh_spec;

/* XP_E_ARG naming key, value and what was expected. A kind is known by its name, whether it can run here or not. */
xp_status xp_mesh_spec_parse(const char *text, xp_mesh_spec *out);
/* The canonical text: reads back to the same spec, names only what differs from its default.
 * XP_E_ARG when buf is too small. */
xp_status xp_mesh_spec_print(const xp_mesh_spec *s, char *buf, size_t bytes);
/* The same sizes on another kind of mesh. XP_E_ARG when there is no such kind or it cannot hold the world. */
xp_status xp_mesh_spec_rekind(const xp_mesh_spec *s, const char *kind, xp_mesh_spec *out);

/* rank = dp * fsdp_size + fsdp = (ep_dp * ep_size + ep) * ep_fsdp_size + ep_fsdp;
 * edp = ep_dp * ep_fsdp_size + ep_fsdp. */
typedef struct {
    int dp, fsdp, ep, ep_fsdp, ep_dp, edp;
} xp_mesh_coord;
void xp_mesh_coords(const xp_mesh_spec *s, int rank, xp_mesh_coord *out);
/* Ranks of every group of the axis; this rank's place in its group; the group's world ranks in order of place (returns
 * their number; out holds xp_mesh_axis_size() values). XP_LOCAL is a group of one. */
int xp_mesh_axis_size(const xp_mesh_spec *s, xp_axis a);
int xp_mesh_axis_index(const xp_mesh_spec *s, xp_axis a, int rank);
int xp_mesh_axis_ranks(const xp_mesh_spec *s, xp_axis a, int rank, int *out);

/* What one rank runs. Errors are reported as everywhere: a status, and the text of the rank's own thread. */
typedef xp_status (*xp_rank_fn)(const xp_mesh *mesh, int rank, void *arg);

/* How one rank ended. */
typedef struct {
    xp_status status;
    int order;                /* of errors in time, from 1; ranks that fail in the same event share it; 0: no error */
    int stuck;                /* 1: the rank's function has not returned */
    char text[XP_MESH_ERROR]; /* "" when status is XP_OK */
} xp_mesh_end;

/* How the run ended on all ranks. status is the worst of the ranks: bug, hang, collective, memory, device, file,
 * format, argument, peer, ok. first is the rank that met that status first (the lowest of those that met it together),
 * -1 when all is well. */
typedef struct {
    xp_status status;
    int first, world;
    int stuck; /* ranks that have not returned: free nothing that fn may touch, and end the process soon */
    xp_mesh_end end[XP_MESH_MAX_RANKS];
} xp_mesh_report;

/* Runs fn once for each rank of the mesh and returns out->status when all have returned, with "rank N: ..." as text.
 * A rank that fails wakes every peer that waits; a mesh that failed other than by a vote stays broken for that run.
 * Ranks that do not return within timeout_s after that are left behind as stuck, with XP_E_HANG. (A rank that never
 * returns while no peer waits for it breaks nothing, and is waited for.)
 * XP_E_DEVICE with out->world 0: this kind of mesh is not available here and nothing ran (a SKIP).
 * XP_E_NOMEM: no memory or threads. */
xp_status xp_mesh_run(const xp_mesh_spec *s, xp_rank_fn fn, void *arg, xp_mesh_report *out);

/* A kind of mesh. */
typedef struct {
    const char *name, *meaning; /* meaning: one line for `list` */
    int max_world;
    const char *why_not; /* NULL: can run; else a short reason */
    /* Fills out->end[] and out->world; the caller agrees on the rest. Not-OK: nothing ran. NULL when why_not is set. */
    xp_status (*run)(const xp_mesh_spec *s, xp_rank_fn fn, void *arg, xp_mesh_report *out);
} xp_mesh_kind;

/* Ends with a NULL name. */
extern const xp_mesh_kind xp_mesh_kinds[];

#ifdef __cplusplus
}
#endif
#endif
