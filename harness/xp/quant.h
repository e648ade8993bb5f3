/* Stages quant and dequant: a matrix to codes of 8 or 4 bits with one scale for each block, and back.
 *
 * The matrix [T,H] is cut into blocks of rows x cols from its first element on; the last blocks of a row or column of
 * blocks may be smaller. What a recipe fixes is data here: block, code format, scale format, rule, and a second level:
 *
 *   a tensor               rows=0 cols=0     f32                 a row          rows=1 cols=0
 *   DeepSeek activations   rows=1 cols=128   f32 or pow2         its weights    rows=128 cols=128
 *   MXFP8, MXFP4           rows=1 cols=32    e8m0, mx            NVFP4          rows=1 cols=16, e4m3 with tensor_scale
 *
 * Every operation is one IEEE f32 operation, round to nearest even, subnormals kept, and every rounding is named, so
 * both stages are judged bit for bit. With MAX the largest finite value of the codes' format (448, 240, 57344, 6), EMAX
 * its exponent (8, 7, 15, 2) and |x| taken exactly:
 *
 *   amax  = max |x| over the block, at least eps                                     exact
 *   s     = amax / MAX, at least 2^-149                       rule amax              rounded (1)
 *         = the smallest 2^k >= amax / MAX                    rule pow2              exact
 *         = 2^(floor(log2 amax) - EMAX)                       rule mx (OCP MX 1.0)   exact
 *   scale = s in the scales' format                           as stage cast, saturating: (2)
 *   code  = (x / scale) in the codes' format                  f32 division (3), then as stage cast, saturating (4)
 *
 * k is held in [-127, 127], whatever the scales' format. (2) does nothing for f32, nor for e8m0 under pow2 and mx; rule
 * amax with e8m0 is rounding to the nearest power of two. Elements above MAX * scale saturate: some do under mx, and
 * under amax with rounded scales; none does under pow2.
 *
 * Two levels (tensor_scale present; scales are e4m3, rule amax), with X the largest finite e4m3, 448:
 *
 *   tensor_scale = max |x| over the tensor, at least eps, / (MAX * X), at least 2^-149   rounded (5)
 *   scale        = (s / tensor_scale) in e4m3                 f32 division (6), then (2)
 *   code         = x / (scale * tensor_scale) as above        f32 product (7), then (3), (4)
 *
 * Where no number follows from that, s and scale are, before eps was looked at:
 *   amax = 0 (and eps = 0)      f32: 1. e8m0: 2^-127, code 0x00. e4m3: 0. tensor_scale: 1.
 *   a NaN or an infinity in it  nonfinite=nan: NaN, all codes of the block NaN (e2m1 has none: 0x7, as in cast), and
 *                               the tensor_scale with every block. nonfinite=one: 1; then NaN codes as NaN, an
 *                               infinity saturates.
 *   scale * tensor_scale = 0    codes are zeros with the sign of x (an e4m3 scale that underflowed: the block is lost)
 * A matrix without elements has no blocks; a whole dimension counts as one block when it is not empty.
 *
 * dequant: y = code * scale in f32 (8), then in y's format (9), overflow as the format says; with tensor_scale the
 * scale is scale * tensor_scale as in (7). NaN scales and codes give NaN, 0 * infinity too.
 *
 * Source: OCP MX 1.0 6.3; DeepSeek-V3 (arXiv 2412.19437) 3.3; NVFP4 as in TransformerEngine's recipe (two scales, 448 *
 * 6).
 */
#ifndef XP_QUANT_H
#define XP_QUANT_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { XP_SCALE_AMAX = 0, XP_SCALE_POW2, XP_SCALE_MX } xp_scale_rule;
typedef enum { XP_BLOCK_NAN = 0, XP_BLOCK_ONE } xp_block_nonfinite;

typedef struct {
    xp_tensor x;            /* in  [T,H] f32|bf16|f16 */
    xp_tensor q;            /* out [T,H] e4m3|e4m3fnuz|e5m2|e5m2fnuz|e2m1 */
    xp_tensor scales;       /* out [I,J] f32|e8m0|e4m3, one for each block; code * scale gives x back */
    xp_tensor tensor_scale; /* out, optional [1] f32 */
    int64_t rows, cols;     /* of a block; 0: the whole dimension */
    int rule;               /* xp_scale_rule; pow2 and mx: scales f32 or e8m0 */
    int nonfinite;          /* xp_block_nonfinite */
    float eps;              /* least amax, 0 or more; DeepEP has 1e-4 */
} xp_quant_args;
extern const xp_stage xp_stage_quant;

typedef struct {
    xp_tensor q;            /* in  [T,H] as above */
    xp_tensor scales;       /* in  [I,J] */
    xp_tensor tensor_scale; /* in, optional [1] f32 */
    xp_tensor y;            /* out [T,H] f32|bf16|f16 */
    int64_t rows, cols;
} xp_dequant_args;
extern const xp_stage xp_stage_dequant;

#ifdef __cplusplus
}
#endif
#endif
