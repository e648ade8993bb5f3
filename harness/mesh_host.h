/* Rows and sums of tensors in host memory, as meshes whose ranks can read one another's memory need them.
 *
 * Views may have any leading strides; the last dimension is contiguous. Nothing here waits or allocates. */
#ifndef XP_HARNESS_MESH_HOST_H
#define XP_HARNESS_MESH_HOST_H

#include "xp/mesh.h"

#ifdef __cplusplus
extern "C" {
#endif

/* XP_E_ARG, naming the field, unless t is a host view with at least min_ndim dimensions that can be moved row by row:
 * known dtype, dimensions that are not negative, last stride 1, data where there are elements, rows of whole bytes. */
xp_status xp_host_view(const char *field, const xp_tensor *t, int min_ndim);
/* Elements of the view, and of one row (the product of the dimensions behind the first). A view without dimensions is
 * one row of one element. */
int64_t xp_host_count(const xp_tensor *t);
int64_t xp_host_row(const xp_tensor *t);
/* 1 when both have rows of the same dtype and dimensions. */
int xp_host_same_rows(const xp_tensor *a, const xp_tensor *b);

/* Copies rows [from, from + rows) of src to rows [to, ...) of dst, which has the same rows. An element that would be
 * copied onto itself is left alone; any other overlap is the caller's error. */
void xp_host_copy(const xp_tensor *src, int64_t from, int64_t rows, const xp_tensor *dst, int64_t to);

/* 1 when sums and maxima of the dtype exist: f64 f32 bf16 f16 i64 i32 u64 u8. */
int xp_host_can_fold(xp_dtype d);
/* Left fold over in[0..parts-1] of n elements from row-major number `from`, stored to every out[] from number `to`.
 * f64 folds in f64, narrower floats in f32 and are rounded once (nearest even); integer sums wrap. MAX: NaN wins, +0
 * above -0. A NaN result has one code whatever the inputs' payloads, so that no bit depends on how the range was cut.
 * in may equal out. */
void xp_host_fold(xp_redop op, int parts, const xp_tensor *const *in, int64_t from, int64_t n, int outs,
                  const xp_tensor *const *out, int64_t to);

#ifdef __cplusplus
}
#endif
#endif
