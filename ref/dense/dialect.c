/* What a dialect must be for the second formulation to cover it. A record outside that is named, never approximated;
 * the whole block has rules of its own in moe.c. */
#include "dense.h"

const char *xp_dense_route_why_not(const xp_dialect *d) {
    if (!d)
        return "no dialect";
    if (d->score == XP_SCORE_SPARSEMIXER && d->group_reduce != XP_GROUP_NONE)
        return "no groups beside the sparsemixer";
    return d->group_reduce == XP_GROUP_NONE || d->n_group > 0 ? NULL : "no groups without their number";
}

const char *xp_dense_mlp_why_not(const xp_dialect *d) {
    if (!d)
        return "no dialect";
    if (!d->gated && (d->act == XP_ACT_SOFTCAP || d->up_offset != 0 || d->limit != 0 || d->limit_shared != 0))
        return "no softcap, limit or offset of the up projection without a gate";
    return d->act != XP_ACT_SOFTCAP || d->up_offset == 0 ? NULL : "no offset beside softcap";
}
