/* The chain of stages of one MoE block, forward and backward, on numbers that the caller brings: what a backend's rows
 * make of them on one rank, or on the ranks of a simulated mesh.
 *
 * It runs what layer.c runs, without norm, balance losses, shards and masters, so that whoever knows a symmetry of the
 * block can bring numbers that have it. It judges nothing. */
#ifndef XP_CHAIN_H
#define XP_CHAIN_H

#include "xp/backend.h"
#include "xp/dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_CHAIN_RANKS = 8 };

/* Letters as in xp/stage.h; S 0: no shared expert. Host memory of the caller; absent what the record does not ask for.
 * x and dy are of the activation dtype, which is also the parameters' and the router's. */
typedef struct {
    const xp_dialect *d;
    int64_t T, H, E, Z, K, F, S;
    xp_tensor x, dy;           /* [T,H] */
    xp_tensor wr, rbias;       /* [Z,H], [Z] */
    xp_tensor bias, scale_e;   /* [Z], [W] f32 */
    xp_tensor token, table;    /* [T], [V,K] i32 */
    xp_tensor w1, w2, b1, b2;  /* [E,U,H] [E,H,F] [E,U] [E,H] */
    xp_tensor sw1, sw2, sgate; /* [X,H] [H,S] [1,H] */
    xp_tensor replay;          /* [T,K] i32; present: the choice is given */
} xp_chain_in;

/* The tensors of a run, in the order in which the stages make them. Weight gradients are f32: of experts [1,E,..], of
 * the others [B,1,..], a part for each block of tokens (B is 1 without blocks). */
typedef enum {
    XP_CHAIN_LOGITS = 0, /* [T,Z] */
    XP_CHAIN_IDX,        /* [T,K] */
    XP_CHAIN_W,          /* [T,K] */
    XP_CHAIN_Y,          /* [T,H] */
    XP_CHAIN_DX,         /* [T,H] */
    XP_CHAIN_DWR,        /* [B,1,Z,H] */
    XP_CHAIN_DRBIAS,     /* [B,1,Z,1] */
    XP_CHAIN_DW1,        /* [1,E,U,H] */
    XP_CHAIN_DW2,        /* [1,E,H,F] */
    XP_CHAIN_DB1,        /* [1,E,U,1] */
    XP_CHAIN_DB2,        /* [1,E,H,1] */
    XP_CHAIN_DSW1,       /* [B,1,X,H] */
    XP_CHAIN_DSW2,       /* [B,1,H,S] */
    XP_CHAIN_DSGATE,     /* [B,1,1,H] */
    XP_CHAIN_OUTS
} xp_chain_out;
/* "logits", "idx", ... */
const char *xp_chain_name(xp_chain_out o);

/* ranks > 1: a mesh sim:ep=ranks; rank r has experts [r E/ranks, ...) and the block of tokens deal[r], T / ranks
 * tokens. block > 0: weight gradients are summed by blocks of so many tokens, experts' are folded in the order of
 * blocks. route_only: nothing after the choice. */
typedef struct {
    int ranks, deal[XP_CHAIN_RANKS];
    int64_t block;
    int align, route_only;
} xp_chain_how;

typedef struct {
    xp_tensor out[XP_CHAIN_OUTS]; /* data NULL: absent */
    /* 1: every row that ran promises the same bits for a token wherever it lies (XP_DET_MESH; rows that move tokens or
     * dot them one by one need not); the same of the weight gradients; every row gives the same bits twice. */
    int steady, steady_sums, repeats;
    /* 1: XP_E_ARG came from what cannot run here: a record that a stage refuses, a call that nobody has a row for. */
    int unsupported;
    uint32_t own, lent; /* XP_BIT(number in xp_chain_stages) of stages run by the
                           backend's own rows, and by ref's */
} xp_chain_run;

/* The stages of the chain; ends with NULL, at most 32. */
extern const xp_stage *const xp_chain_stages[];

/* Runs the chain through impl's rows, and through ref's where impl has none. XP_E_ARG: see unsupported; XP_E_DEVICE:
 * impl's memory is not the host's; a row's own error. out is to be closed whatever comes back. */
xp_status xp_chain(const xp_backend *impl, const xp_chain_in *in, const xp_chain_how *how, xp_chain_run *out);
void xp_chain_close(xp_chain_run *r);

#ifdef __cplusplus
}
#endif
#endif
