/* Test data as a pure function of (seed, name, global index): the same logical tensors exist on every mesh. */
#ifndef XP_FILL_H
#define XP_FILL_H

#include "xp/stage.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    XP_DATA_REAL = 0, /* well scaled, all bits in use */
    XP_DATA_EXACT,    /* small integers and powers of two: every order of summation gives the same bits */
    XP_DATA_IDENTITY, /* the value encodes its row and column: a misplaced row cannot hide */
    XP_DATA_TIES,     /* many equal values: tie rules */
    XP_DATA_EXTREME,  /* subnormals, -0, huge values; inf and NaN in single elements */
    XP_DATA_SKEW,     /* a few experts take nearly all rows, some none */
    XP_DATA_TEXT,     /* bytes of a real file through an embedding */
    XP_NDATA
} xp_data;

const char *xp_data_name(xp_data k);
const char *xp_data_meaning(xp_data k); /* one line for `list` */
xp_status xp_data_parse(const char *text, xp_data *out);

/* Counter-based generator: the index-th value of stream `stream` under `seed` (SplitMix64 finaliser over mixed keys).
 */
uint64_t xp_rng(uint64_t seed, uint64_t stream, uint64_t index);
/* A stream's number from its name (FNV-1a, 64 bit). */
uint64_t xp_rng_stream(const char *name);
/* Mean 0, variance 1, |value| <= 3.5: the sum of four 16-bit uniforms, exact in double and the same on every host. */
double xp_rng_normal(uint64_t seed, uint64_t stream, uint64_t index);
double xp_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index); /* [0, 1) */

/* Fills a float tensor of host memory; integer tensors are left to their stage. The element at local index i has the
 * global index base[d] + i[d] in dimension d of a logical tensor of size full[d]. scale multiplies `real` values (1:
 * variance 1). Values are rounded to nearest even in the tensor's dtype. */
xp_status xp_fill_tensor(const xp_tensor *t, xp_data kind, uint64_t seed, const char *name, const int64_t *base,
                         const int64_t *full, double scale);

/* Element number i (row-major) of t becomes v, rounded to nearest even. f64 f32 bf16 f16 e4m3 e5m2. */
void xp_fill_store(const xp_tensor *t, int64_t i, double v);

#ifdef __cplusplus
}
#endif
#endif
