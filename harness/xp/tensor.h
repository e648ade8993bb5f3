/* Tensors: typed views that own nothing, the dtype table, and exact widening to double.
 *
 * Dimensions are outermost first; strides count elements; the last stride is 1 (or the dimension has at most one
 * element). E2M1 packs two codes a byte, the even index in the low half: its last dimension counts codes. */
#ifndef XP_TENSOR_H
#define XP_TENSOR_H

#include <stddef.h>
#include <stdint.h>

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    XP_F64 = 0,
    XP_F32,
    XP_BF16,
    XP_F16,
    XP_E4M3,     /* OCP E4M3FN: no infinity, NaN 0x7F/0xFF, largest 448 */
    XP_E5M2,     /* OCP E5M2: IEEE-like, largest 57344 */
    XP_E4M3FNUZ, /* bias 8, one zero, NaN 0x80, largest 240 */
    XP_E5M2FNUZ, /* bias 16, one zero, NaN 0x80, largest 57344 */
    XP_E8M0,     /* a power of two, 2^(code-127); NaN 0xFF */
    XP_E2M1,     /* 4 bits, packed pairs, largest 6 */
    XP_I64,
    XP_I32,
    XP_U64,
    XP_U8,
    XP_NDTYPE
} xp_dtype;

typedef enum { XP_HOST = 0, XP_PINNED, XP_CUDA, XP_NMEM } xp_mem;

enum { XP_MAXDIM = 4 };

typedef struct {
    void *data; /* NULL: the operand is absent (only where its stage says it may be) */
    xp_dtype dtype;
    xp_mem mem;
    int ndim;
    int64_t dim[XP_MAXDIM], stride[XP_MAXDIM];
} xp_tensor;

#define XP_BIT(x) (1u << (x))
/* Sets of dtypes, for operand tables. */
#define XP_DT_WIDE (XP_BIT(XP_F64) | XP_BIT(XP_F32))
#define XP_DT_ACT (XP_DT_WIDE | XP_BIT(XP_BF16) | XP_BIT(XP_F16))
#define XP_DT_FP8 (XP_BIT(XP_E4M3) | XP_BIT(XP_E5M2))
#define XP_DT_FLOAT (XP_DT_ACT | XP_DT_FP8)

/* "f64", "f32", "bf16", "f16", "e4m3", "e5m2", ...; NULL for a value outside the enum. */
const char *xp_dtype_name(xp_dtype d);
/* XP_E_ARG naming the text when there is no such dtype. */
xp_status xp_dtype_parse(const char *text, xp_dtype *out);
/* Bits of one element (4 for E2M1). */
int xp_dtype_bits(xp_dtype d);
int xp_dtype_is_float(xp_dtype d);
/* Bytes that n elements occupy, rounded up to whole bytes. */
size_t xp_dtype_bytes(xp_dtype d, int64_t n);

/* A contiguous view of host memory; dimensions beyond ndim are ignored. */
xp_tensor xp_tensor_of(void *data, xp_dtype d, int ndim, const int64_t *dim);
xp_tensor xp_tensor_1d(void *data, xp_dtype d, int64_t n0);
xp_tensor xp_tensor_2d(void *data, xp_dtype d, int64_t n0, int64_t n1);
xp_tensor xp_tensor_3d(void *data, xp_dtype d, int64_t n0, int64_t n1, int64_t n2);
/* Elements of the view (1 for rank 0, 0 when absent). */
int64_t xp_tensor_count(const xp_tensor *t);
/* 1 when elements lie one after another in row-major order. */
int xp_tensor_contiguous(const xp_tensor *t);
/* The view of rows [lo, hi) of dimension d: same strides, moved start. Not for E2M1's last dimension. */
xp_tensor xp_tensor_rows(const xp_tensor *t, int d, int64_t lo, int64_t hi);
/* Address of element (i, j, k, l); indices beyond ndim are ignored. Not for E2M1. */
void *xp_tensor_at(const xp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l);
/* Offset in elements from data of the element with row-major number n. */
int64_t xp_tensor_offset(const xp_tensor *t, int64_t n);

/* The value of element i of a plain array of dtype d: exact for every dtype but I64/U64 above 2^53. NaN stays NaN. */
double xp_widen(const void *base, xp_dtype d, int64_t i);
/* n consecutive elements from base[i0] widened into out. */
void xp_widen_row(const void *base, xp_dtype d, int64_t i0, int64_t n, double *out);
/* The raw code of element i, zero-extended (both halves of a byte are told apart for E2M1). */
uint64_t xp_code(const void *base, xp_dtype d, int64_t i);

#ifdef __cplusplus
}
#endif
#endif
