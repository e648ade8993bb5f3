/* What the files of ref/ share: the rows' names, for the list in backend.c. Nobody outside ref/ includes it. */
#ifndef XP_REF_H
#define XP_REF_H

#include "xp/backend.h"

extern const xp_device_ops xp_ref_device;
extern const xp_backend xp_ref_backend;

/* Rows, one a stage: extern const xp_kernel xp_ref_<stage>; in the order of the step. */
extern const xp_kernel xp_ref_cast;
extern const xp_kernel xp_ref_quant;
extern const xp_kernel xp_ref_dequant;
extern const xp_kernel xp_ref_gather;
extern const xp_kernel xp_ref_embed;
extern const xp_kernel xp_ref_rmsnorm;
extern const xp_kernel xp_ref_router;
extern const xp_kernel xp_ref_carry;
extern const xp_kernel xp_ref_gelu;
extern const xp_kernel xp_ref_route;
extern const xp_kernel xp_ref_balance;
extern const xp_kernel xp_ref_capacity;
extern const xp_kernel xp_ref_permute;
extern const xp_kernel xp_ref_dispatch;
extern const xp_kernel xp_ref_expert;
extern const xp_kernel xp_ref_combine;
extern const xp_kernel xp_ref_shared;
extern const xp_kernel xp_ref_residual;
extern const xp_kernel xp_ref_head;
extern const xp_kernel xp_ref_xent;
extern const xp_kernel xp_ref_xent_bwd;
extern const xp_kernel xp_ref_head_bwd;
extern const xp_kernel xp_ref_rmsnorm_bwd;
extern const xp_kernel xp_ref_shared_bwd;
extern const xp_kernel xp_ref_combine_bwd;
extern const xp_kernel xp_ref_expert_bwd;
extern const xp_kernel xp_ref_wgrad;
extern const xp_kernel xp_ref_dispatch_bwd;
extern const xp_kernel xp_ref_permute_bwd;
extern const xp_kernel xp_ref_balance_bwd;
extern const xp_kernel xp_ref_route_bwd;
extern const xp_kernel xp_ref_route_scale_bwd;
extern const xp_kernel xp_ref_router_bwd;
extern const xp_kernel xp_ref_gelu_bwd;
extern const xp_kernel xp_ref_carry_bwd;
extern const xp_kernel xp_ref_embed_bwd;
extern const xp_kernel xp_ref_moe;
extern const xp_kernel xp_ref_scatter;
extern const xp_kernel xp_ref_gradnorm;
extern const xp_kernel xp_ref_clip;
extern const xp_kernel xp_ref_adamw;
extern const xp_kernel xp_ref_sgd;

#endif
