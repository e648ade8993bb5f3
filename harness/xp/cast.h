/* Stage cast: narrow or widen a flat array, round to nearest even (E8M0: ties go up, as in ml_dtypes).
 *
 * Judged bit for bit: the rounding is exact by definition. E2M1 always saturates (it has no NaN and no infinity).
 * Source: IEEE 754-2019 4.3.1, OCP OFP8 1.0, OCP MX 1.0. */
#ifndef XP_CAST_H
#define XP_CAST_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    xp_tensor x;  /* in  [N] any float */
    xp_tensor y;  /* out [N] any float; NaN stays NaN where the format has one */
    int saturate; /* 1: values beyond the largest finite one become it, infinities too; 0: the format's own overflow */
} xp_cast_args;
extern const xp_stage xp_stage_cast;

#ifdef __cplusplus
}
#endif
#endif
