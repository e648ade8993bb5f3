/* The simulated mesh: one thread a rank, host memory. See mesh_sim.c. */
#ifndef XP_HARNESS_MESH_SIM_H
#define XP_HARNESS_MESH_SIM_H

#include "mesh.h"

/* The run of xp_mesh_kinds' row "sim". s was checked; its world is at most XP_MESH_MAX_RANKS. */
xp_status xp_sim_run(const xp_mesh_spec *s, xp_rank_fn fn, void *arg, xp_mesh_report *out);

#endif
