/* What a dialect must be for the second formulation to cover it. A record outside that is named, never approximated. */
#include "dense.h"

const char *xp_dense_route_why_not(const xp_dialect *d) {
    if (!d)
        return "no dialect";
    if (d->score != XP_SCORE_SOFTMAX || d->select_on != XP_ON_SCORE || d->select_bias)
        return "only softmax over all experts, chosen by score without a bias";
    if (d->group_reduce != XP_GROUP_NONE)
        return "no groups of experts";
    if (d->renorm != XP_RENORM_NONE && d->renorm != XP_RENORM_SUM)
        return "only weights as they are or divided by their sum";
    if (d->logit_scale != 1 || d->logit_softcap != 0 || d->expert_scale)
        return "no scale of logits, experts or slots";
    return d->scale_at == XP_SCALE_WEIGHT ? NULL : "no scale of the summed output";
}

const char *xp_dense_mlp_why_not(const xp_dialect *d) {
    if (!d)
        return "no dialect";
    if (!d->gated || d->act != XP_ACT_SILU || d->act_alpha != 1 || d->up_offset != 0 || d->limit != 0)
        return "only silu(gate) * up without limits";
    return d->gate_layout == XP_GATE_CONCAT && d->orient == XP_EOI && !d->expert_bias
               ? NULL
               : "only gate rows before up rows, [out,in], no bias";
}

const char *xp_dense_sum_why_not(const xp_dialect *d) {
    if (!d)
        return "no dialect";
    return d->weight_at == XP_AT_OUTPUT && d->scale_at == XP_SCALE_WEIGHT ? NULL
                                                                          : "only weights on the experts' output";
}
