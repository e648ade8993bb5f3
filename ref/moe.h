/* What the two files of stage moe share: its operands' places, and the bound that moe_bound.c derives. */
#ifndef XP_REF_MOE_H
#define XP_REF_MOE_H

#include "xp/moe.h"

/* Places in the operand table. */
enum {
    XP_REF_MOE_SW1 = 5,
    XP_REF_MOE_SW2,
    XP_REF_MOE_SGATE,
    XP_REF_MOE_Y = 9,
    XP_REF_MOE_DX,
    XP_REF_MOE_DWR,
    XP_REF_MOE_DW1,
    XP_REF_MOE_DW2,
    XP_REF_MOE_DSW1,
    XP_REF_MOE_DSW2,
    XP_REF_MOE_DSGATE,
    XP_REF_MOE_RBIAS,
    XP_REF_MOE_BIAS,
    XP_REF_MOE_B1,
    XP_REF_MOE_B2,
    XP_REF_MOE_SCALE_E,
    XP_REF_MOE_DRBIAS,
    XP_REF_MOE_DB1,
    XP_REF_MOE_DB2
};

size_t xp_ref_moe_bound_ws(const xp_moe_args *a);
/* As xp_stage.bound. */
void xp_ref_moe_bound(const xp_moe_args *a, int operand, const xp_tensor *ref, void *ws, xp_tensor *tol);

#endif
