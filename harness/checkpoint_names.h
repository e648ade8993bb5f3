/* What the files of a family of models call the tensors of one MoE block, and how they lay them out: one row a
 * model_type, data only.
 *
 * A name is written from the layer on; {E} stands for an expert's number, {L} (in prefixes) for the layer's. A matrix
 * whose name has {E} is one tensor an expert, any other is one tensor for all experts, with a dimension in front.
 * Adding a family is adding a row; the reader (checkpoint.c) has no branch on a family. */
#ifndef XP_CHECKPOINT_NAMES_H
#define XP_CHECKPOINT_NAMES_H

#include "xp/dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The matrices of an expert. gate NULL: its rows are in `up`, laid out as `rows` says, where the dialect has a gate. */
typedef struct {
    const char *gate, *up, *down; /* up NULL: no such layout */
    const char *up_bias, *down_bias;
    xp_gate_layout rows;
    xp_orient orient;
    int either; /* files of both orientations exist: the shape says which one this is */
    int flat;   /* [E F,H], all experts' rows in one dimension; the second matrix is [in,out] */
} xp_matrix_names;

enum { XP_LAYOUTS = 2, XP_ROUTER_MLP_NAMES = 8 };

typedef struct {
    const char *model_type;
    const char *prefix; /* of a layer, '|' between those of the classes that save this family */
    const char *scope;  /* what the block's names begin with behind the prefix, '|' between several */
    const char *router, *router_bias, *select_bias, *table, *shared_gate, *expert_scale;
    int select_row; /* the selection bias is the first row of as many */
    xp_orient router_orient;
    xp_matrix_names expert[XP_LAYOUTS];
    xp_matrix_names shared; /* of experts that the router weighs one tensor for all, with a dimension in front */
    const char *latent_down, *latent_up;
    const char *router_mlp[XP_ROUTER_MLP_NAMES]; /* in the order of the parts, from XP_PART_ROUTER_DOWN on */
    const char *latent_norm, *expert_norm, *out_bias, *block_norm, *routed_norm, *shared_norm, *shared_in_norm;
    int centered;       /* 1: norms are stored less 1, and the class adds it */
    const char *unread; /* stored for experts that nothing reads, '|' between them; {E}: from E on */
} xp_tensor_names;

/* Ends with a NULL model_type. */
extern const xp_tensor_names xp_tensor_names_of[];
/* NULL: no such family. */
const xp_tensor_names *xp_tensor_names_find(const char *model_type);

#ifdef __cplusplus
}
#endif
#endif
