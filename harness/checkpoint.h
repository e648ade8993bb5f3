/* Published checkpoints: the weights of one MoE block of a model, read from its safetensors files by the family's
 * tensor names (checkpoint_names.h) and given as the stages take them.
 *
 * Nothing is guessed: a tensor that is missing, has another shape or dtype than the model's fields ask for, contradicts
 * another one or the index, or that nothing asks for, is refused by name. Quantised weights are not turned back; their
 * tensors are refused like any others. A layer's norm is not read: it is no part of the block. */
#ifndef XP_CHECKPOINT_H
#define XP_CHECKPOINT_H

#include "checkpoint_names.h"
#include "model.h"
#include "xp/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    XP_PART_ROUTER = 0,  /* [Z,H], Z = E and the null experts or shared rows */
    XP_PART_ROUTER_BIAS, /* [Z] */
    XP_PART_ROUTER_DOWN, /* [R,H], R the router's width, where it has an MLP; the router is [Z,R] then */
    XP_PART_ROUTER_DOWN_BIAS,
    XP_PART_ROUTER_STATE, /* [R]; not in layer 0 */
    XP_PART_ROUTER_NORM,  /* [R]; [H] where router_in is rmsnorm_scaled */
    XP_PART_ROUTER_FC1,   /* [R,R] */
    XP_PART_ROUTER_FC1_BIAS,
    XP_PART_ROUTER_FC2, /* [R,R] */
    XP_PART_ROUTER_FC2_BIAS,
    XP_PART_SELECT_BIAS,    /* [Z]; 0 for shared rows, which files have none of */
    XP_PART_TABLE,          /* [vocabulary,K] i32 or i64, experts of a token id */
    XP_PART_EXPERT_SCALE,   /* [Z] or [1] */
    XP_PART_LATENT_DOWN,    /* [D,H], D the experts' width */
    XP_PART_LATENT_UP,      /* [H,D] */
    XP_PART_LATENT_NORM,    /* [D]; norms by which rows are multiplied: a file's weight, or where its family stores them
                               less 1, 1 + that in f32 (f64 of f64) */
    XP_PART_EXPERT_NORM,    /* [D] */
    XP_PART_OUT_BIAS,       /* [H] */
    XP_PART_BLOCK_NORM,     /* [H] */
    XP_PART_ROUTED_NORM,    /* [H] */
    XP_PART_SHARED_NORM,    /* [H] */
    XP_PART_SHARED_IN_NORM, /* [H] */
    XP_PART_UP,             /* [E,U,H]; U = 2F rows as the dialect's gate_layout says, F without a gate */
    XP_PART_UP_BIAS,
    XP_PART_DOWN, /* [E,H,F] */
    XP_PART_DOWN_BIAS,
    XP_PART_SHARED_UP,   /* [2S,H], [S,H] without a gate; of several experts each kind of rows one after another */
    XP_PART_SHARED_DOWN, /* [H,S] */
    XP_PART_SHARED_GATE, /* [1,H] */
    XP_NPART
} xp_part;
const char *xp_part_name(xp_part p); /* "router" */

/* Contiguous host tensors in the file's own dtype (f64 f32 bf16 f16, one for all tensors of a part); data NULL: the
 * dialect has no such part. */
typedef struct {
    int layer;
    xp_tensor part[XP_NPART];
} xp_layer_weights;

typedef struct xp_checkpoint xp_checkpoint;

/* A .safetensors file; a model.safetensors.index.json (any name that ends in .json); or a folder that holds one of the
 * two. Of an index's files only those are opened that a layer needs, and only from the index's own folder. XP_E_IO,
 * XP_E_FORMAT, XP_E_NOMEM. Closing NULL is fine. */
xp_status xp_checkpoint_open(const char *path, xp_checkpoint **out);
void xp_checkpoint_close(xp_checkpoint *ck);

/* Reads the MoE block of a layer (0-based). The model has its published sizes. XP_E_ARG: no MoE block, a shrunk model,
 * a model_type without a row of names. XP_E_FORMAT: file, tensor, value and what was expected. The caller closes *out,
 * which is cleared on failure. */
xp_status xp_checkpoint_read(xp_checkpoint *ck, const xp_model *m, int layer, xp_layer_weights *out);
/* The same by a row of the caller's. */
xp_status xp_checkpoint_read_as(xp_checkpoint *ck, const xp_tensor_names *names, const xp_model *m, int layer,
                                xp_layer_weights *out);
void xp_layer_weights_close(xp_layer_weights *w);

/* In some families a layer has a table from token id to experts in place of a selection bias, and only the files say
 * which: where this layer's table is there, the record becomes that of a layer with a table. */
xp_status xp_checkpoint_dialect(xp_checkpoint *ck, const xp_model *m, int layer, xp_dialect *io);

/* Every tensor that a layer's block must have, one call a name ({E}: one tensor an expert) with its shape and the part
 * that it is of. XP_E_ARG: no row of names. */
typedef void (*xp_expected_fn)(const char *name, const char *shape, const char *part, void *arg);
xp_status xp_checkpoint_expect(const xp_model *m, int layer, xp_expected_fn fn, void *arg);

/* Rows [r0, r0 + t.dim[1]) of groups [g0, g0 + t.dim[0]) of a part, rounded to nearest even in t's dtype (or, of a
 * table, as i32). t is contiguous, [g,r,N]; a part of fewer dimensions is [1,rows,N], a vector or a bias an expert has
 * N = 1, a vector is one group. */
void xp_layer_weights_copy(const xp_layer_weights *w, xp_part p, int64_t g0, int64_t r0, const xp_tensor *t);

/* Blocks of several layers, by the model's layer numbers; NULL where there is none. */
typedef struct {
    xp_layer_weights *layer[XP_MAX_LAYERS];
} xp_weights;
/* Every MoE block among the model's layers. On failure nothing is left open. */
xp_status xp_weights_load(xp_checkpoint *ck, const xp_model *m, xp_weights *out);
void xp_weights_close(xp_weights *w);

#ifdef __cplusplus
}
#endif
#endif
