/* Mesh: the collectives of one rank, one communicator an axis.
 *
 * world = dp x fsdp; ep and ep_fsdp factor the same ranks again, ep_dp = world / (ep x ep_fsdp) replicas of each
 * expert: rank = dp_i * fsdp + fsdp_j = (ep_dp_i * ep + ep_i) * ep_fsdp + ep_fsdp_j. The axis edp joins every rank that
 * holds the same experts (ep_fsdp x ep_dp, in rank order): Megatron's expert-data-parallel group, over which an
 * expert's gradient is summed.
 *
 * Every rank of a communicator calls the same collectives in the same order. Counts are rows (dim[0]) and live on the
 * host. Sums of floats narrower than f32 are folded in f32 and rounded once; every fold goes left over rank 0..size-1;
 * integer sums wrap. A rank that fails still enters the vote: no collective returns on any rank until no peer can touch
 * its buffers, failed or not; the finder returns its own error, the others XP_E_PEER. */
#ifndef XP_MESH_H
#define XP_MESH_H

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { XP_SUM = 0, XP_MAX } xp_redop; /* MAX of floats: NaN wins */

typedef enum {
    XP_LOCAL = -1, /* the stage does not communicate */
    XP_DP = 0,
    XP_FSDP,
    XP_EP,
    XP_EP_FSDP,
    XP_EP_DP,
    XP_EDP,
    XP_WORLD,
    XP_NAXIS
} xp_axis;

/* What a row or a mesh promises about bits; a promise is tested. */
enum {
    XP_DET_RUN = 1, /* the same call gives the same bits twice */
    XP_DET_MESH = 2 /* the same logical operands give the same bits on every mesh */
};

typedef struct xp_comm xp_comm;

typedef struct {
    uint32_t abi, size; /* XP_ABI, sizeof(xp_mesh_ops) */
    const char *name;
    uint32_t mems, det; /* XP_BIT(xp_mem) accepted; XP_DET_* promised */
    /* dst [sum rows, ...] = every rank's src in rank order; rows[r] = rows that rank r brings (src->dim[0] here). */
    xp_status (*all_gather)(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst);
    /* src [sum rows, ...] on every rank; dst [rows[rank], ...] = this rank's part of the reduction. */
    xp_status (*reduce_scatter)(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *rows, xp_tensor *dst,
                                xp_redop op);
    xp_status (*all_reduce)(xp_comm *c, xp_queue *q, xp_tensor *buf, xp_redop op);
    /* src holds send_rows[0] rows for rank 0, then send_rows[1] for rank 1, ...; dst receives recv_rows[r] rows from
     * rank r in rank order. send_rows[j] on rank i must equal recv_rows[i] on rank j: XP_E_COMM naming both ranks and
     * counts. */
    xp_status (*all_to_all_v)(xp_comm *c, xp_queue *q, const xp_tensor *src, const int64_t *send_rows, xp_tensor *dst,
                              const int64_t *recv_rows);
    xp_status (*barrier)(xp_comm *c, xp_queue *q);
    /* A new communicator of the ranks with the same color, ordered by (key, rank). Collective over c. The mesh owns it.
     */
    xp_status (*split)(xp_comm *c, int color, int key, xp_comm **out);
    /* Outside a collective: wake every waiting peer with XP_E_PEER. */
    void (*give_up)(xp_comm *c, xp_status why);
} xp_mesh_ops;

struct xp_comm {
    const xp_mesh_ops *ops;
    int rank, size;
    void *self;
};

typedef struct {
    xp_comm *axis[XP_NAXIS]; /* this rank's ends; never NULL, size 1 when the axis is unused */
} xp_mesh;

/* "dp", "fsdp", "ep", "ep_fsdp", "ep_dp", "edp", "world", "local". */
const char *xp_axis_name(xp_axis a);

#ifdef __cplusplus
}
#endif
#endif
