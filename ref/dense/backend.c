/* Backend dense: the second formulation's rows. It runs on host memory through the table it is given. */
#include "dense.h"

static const xp_kernel *const rows[] = {
    &xp_dense_cast,         &xp_dense_gather,      &xp_dense_embed,      &xp_dense_embed_bwd,   &xp_dense_rmsnorm,
    &xp_dense_rmsnorm_bwd,  &xp_dense_router,      &xp_dense_router_bwd, &xp_dense_route,       &xp_dense_route_bwd,
    &xp_dense_balance,      &xp_dense_balance_bwd, &xp_dense_permute,    &xp_dense_permute_bwd, &xp_dense_dispatch,
    &xp_dense_dispatch_bwd, &xp_dense_expert,      &xp_dense_expert_bwd, &xp_dense_wgrad,       &xp_dense_combine,
    &xp_dense_combine_bwd,  &xp_dense_shared,      &xp_dense_shared_bwd, &xp_dense_residual,    &xp_dense_moe,
    &xp_dense_head,         &xp_dense_head_bwd,    &xp_dense_xent,       &xp_dense_xent_bwd,    &xp_dense_scatter,
    &xp_dense_gradnorm,     &xp_dense_clip,        &xp_dense_adamw,      &xp_dense_sgd,         NULL,
};

const xp_backend xp_dense_backend = {
    .abi = XP_ABI,
    .size = sizeof(xp_backend),
    .name = "dense",
    .meaning = "second formulation: every expert over every token, masked, in double; judges ref",
    .device = NULL, /* host memory: the registry lends the host device */
    .kernel = rows,
};
