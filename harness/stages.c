/* The list of stages, in the order of the step. A stage exists because it is named here. */
#include <string.h>

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

const xp_stage *const xp_stages[] = {
    &xp_stage_cast,
    &xp_stage_quant,
    &xp_stage_dequant,
    &xp_stage_gather,
    &xp_stage_embed,
    &xp_stage_rmsnorm,
    &xp_stage_carry,
    &xp_stage_gelu,
    &xp_stage_router,
    &xp_stage_route,
    &xp_stage_balance,
    &xp_stage_capacity,
    &xp_stage_permute,
    &xp_stage_dispatch,
    &xp_stage_expert,
    &xp_stage_combine,
    &xp_stage_shared,
    &xp_stage_residual,
    &xp_stage_head,
    &xp_stage_xent,
    &xp_stage_xent_bwd,
    &xp_stage_head_bwd,
    &xp_stage_rmsnorm_bwd,
    &xp_stage_shared_bwd,
    &xp_stage_combine_bwd,
    &xp_stage_expert_bwd,
    &xp_stage_wgrad,
    &xp_stage_dispatch_bwd,
    &xp_stage_permute_bwd,
    &xp_stage_balance_bwd,
    &xp_stage_route_bwd,
    &xp_stage_route_scale_bwd,
    &xp_stage_router_bwd,
    &xp_stage_gelu_bwd,
    &xp_stage_carry_bwd,
    &xp_stage_embed_bwd,
    &xp_stage_moe,
    &xp_stage_scatter,
    &xp_stage_gradnorm,
    &xp_stage_clip,
    &xp_stage_adamw,
    &xp_stage_sgd,
    NULL,
};

const xp_stage *xp_stage_find(const char *name) {
    for (int i = 0; xp_stages[i]; i++) {
        if (strcmp(xp_stages[i]->name, name) == 0)
            return xp_stages[i];
    }
    return NULL;
}
