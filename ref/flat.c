/* Segments and generated data of flat f32 buffers: see flat.h. Must not read an operand that the host cannot. */
#include "flat.h"

#include <math.h>

#include "move.h"
#include "num.h"

xp_status xp_ref_flat_check(const char *stage, const xp_tensor *seg, const xp_tensor *flag, const char *flag_name,
                            int64_t n) {
    const int64_t segments = seg->dim[0] - 1;
    if (segments < 0)
        return XP_FAIL(XP_E_ARG, "%s: seg has no element, expected Q+1 >= 1 borders", stage);
    if (xp_ref_readable(seg)) {
        const int64_t *at = seg->data;
        if (at[0] != 0)
            return XP_FAIL(XP_E_ARG, "%s: seg[0] is %lld, expected 0", stage, (long long)at[0]);
        for (int64_t q = 0; q < segments; q++) {
            if (at[q + 1] < at[q])
                return XP_FAIL(XP_E_ARG, "%s: seg[%lld] is %lld, expected at least seg[%lld] = %lld", stage,
                               (long long)(q + 1), (long long)at[q + 1], (long long)q, (long long)at[q]);
        }
        if (at[segments] != n)
            return XP_FAIL(XP_E_ARG, "%s: seg[%lld] is %lld, expected N = %lld", stage, (long long)segments,
                           (long long)at[segments], (long long)n);
    }
    for (int64_t q = 0; q < segments && xp_ref_readable(flag); q++) {
        const int f = ((const uint8_t *)flag->data)[q];
        if (f > 1)
            return XP_FAIL(XP_E_ARG, "%s: %s[%lld] is %d, expected 0 or 1", stage, flag_name, (long long)q, f);
    }
    return XP_OK;
}

uint64_t xp_ref_flat_mix(uint64_t seed, uint64_t i) {
    uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15u; /* SplitMix64 (Steele, Lea and Flood 2014) */
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

void xp_ref_flat_borders(const xp_tensor *seg, int64_t n, uint64_t seed) {
    int64_t *at = seg->data;
    const int64_t segments = seg->dim[0] - 1;
    for (int64_t q = 0; q <= segments; q++) {
        const int64_t shift = n > 0 ? (int64_t)(xp_ref_flat_mix(seed, (uint64_t)q) % (uint64_t)n) : 0;
        at[q] = q == 0 ? 0 : q == segments ? n : (n * q + shift) / segments;
    }
}

void xp_ref_flat_abs(const xp_tensor *x) {
    for (int64_t i = 0; i < xp_tensor_count(x); i++)
        xp_ref_store(x->data, x->dtype, i, fabs(xp_widen(x->data, x->dtype, i)));
}

xp_tensor xp_ref_flat_narrow(const xp_tensor *t) {
    xp_tensor v = *t;
    if (v.dtype == XP_F64)
        v.dtype = XP_F32;
    return v;
}
