/* What the files of ref/dense/ share: the rows' names, for the list in backend.c, and what a dialect must be for them
 * to apply. Nobody outside ref/dense/ includes it. */
#ifndef XP_DENSE_H
#define XP_DENSE_H

#include "xp/adamw.h"
#include "xp/backend.h"
#include "xp/balance.h"
#include "xp/capacity.h"
#include "xp/carry.h"
#include "xp/cast.h"
#include "xp/clip.h"
#include "xp/combine.h"
#include "xp/dispatch.h"
#include "xp/embed.h"
#include "xp/expert.h"
#include "xp/gather.h"
#include "xp/gelu.h"
#include "xp/gradnorm.h"
#include "xp/head.h"
#include "xp/moe.h"
#include "xp/permute.h"
#include "xp/quant.h"
#include "xp/residual.h"
#include "xp/rmsnorm.h"
#include "xp/route.h"
#include "xp/router.h"
#include "xp/scatter.h"
#include "xp/sgd.h"
#include "xp/shared.h"
#include "xp/wgrad.h"
#include "xp/xent.h"

extern const xp_backend xp_dense_backend;

/* Rows, one a stage, in the order of the step. */
extern const xp_kernel xp_dense_cast;
extern const xp_kernel xp_dense_quant;
extern const xp_kernel xp_dense_dequant;
extern const xp_kernel xp_dense_gather;
extern const xp_kernel xp_dense_embed;
extern const xp_kernel xp_dense_embed_bwd;
extern const xp_kernel xp_dense_rmsnorm;
extern const xp_kernel xp_dense_rmsnorm_bwd;
extern const xp_kernel xp_dense_router;
extern const xp_kernel xp_dense_router_bwd;
extern const xp_kernel xp_dense_carry;
extern const xp_kernel xp_dense_carry_bwd;
extern const xp_kernel xp_dense_gelu;
extern const xp_kernel xp_dense_gelu_bwd;
extern const xp_kernel xp_dense_route;
extern const xp_kernel xp_dense_route_bwd;
extern const xp_kernel xp_dense_route_scale_bwd;
extern const xp_kernel xp_dense_balance;
extern const xp_kernel xp_dense_balance_bwd;
extern const xp_kernel xp_dense_capacity;
extern const xp_kernel xp_dense_permute;
extern const xp_kernel xp_dense_permute_bwd;
extern const xp_kernel xp_dense_dispatch;
extern const xp_kernel xp_dense_dispatch_bwd;
extern const xp_kernel xp_dense_expert;
extern const xp_kernel xp_dense_expert_bwd;
extern const xp_kernel xp_dense_wgrad;
extern const xp_kernel xp_dense_combine;
extern const xp_kernel xp_dense_combine_bwd;
extern const xp_kernel xp_dense_shared;
extern const xp_kernel xp_dense_shared_bwd;
extern const xp_kernel xp_dense_residual;
extern const xp_kernel xp_dense_moe;
extern const xp_kernel xp_dense_head;
extern const xp_kernel xp_dense_head_bwd;
extern const xp_kernel xp_dense_xent;
extern const xp_kernel xp_dense_xent_bwd;
extern const xp_kernel xp_dense_scatter;
extern const xp_kernel xp_dense_gradnorm;
extern const xp_kernel xp_dense_clip;
extern const xp_kernel xp_dense_adamw;
extern const xp_kernel xp_dense_sgd;

/* 1: expert idx[t][k] takes the slot. */
int xp_dense_capacity_keeps(const xp_capacity_args *a, int64_t t, int64_t k);
/* NULL, or why the second formulation of routing, of an expert does not cover the dialect. */
const char *xp_dense_route_why_not(const xp_dialect *d);
const char *xp_dense_mlp_why_not(const xp_dialect *d);

#endif
