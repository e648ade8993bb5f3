/* Planes of doubles in a workspace: see plane.h. */
#include "plane.h"

#include "num.h"

void *xp_ref_take(xp_ref_layout *l, size_t bytes) {
    void *p = l->base ? l->base + l->bytes : NULL;
    l->bytes += (bytes + 63) & ~(size_t)63;
    return p;
}

const double *xp_ref_take_widened(xp_ref_layout *l, const xp_tensor *t) {
    double *v = t->data ? xp_ref_take(l, (size_t)t->dim[0] * sizeof *v) : NULL;
    if (v)
        xp_widen_row(t->data, t->dtype, 0, t->dim[0], v);
    return v;
}

void xp_ref_rows_load(const xp_tensor *t, int64_t row, int64_t m, double *out) {
    const int64_t n = t->dim[1];
    for (int64_t i = 0; i < m; i++)
        xp_widen_row(t->data, t->dtype, (row + i) * t->stride[0], n, out + i * n);
}

void xp_ref_rows_store(const xp_tensor *t, int64_t row, int64_t m, const double *v) {
    const int64_t n = t->dim[1];
    for (int64_t i = 0; i < m; i++)
        xp_ref_store_row(t->data, t->dtype, (row + i) * t->stride[0], n, v + i * n);
}

xp_tensor xp_ref_matrix(const xp_tensor *t, int64_t l) {
    xp_tensor out = *t;
    out.data = xp_tensor_at(t, l, 0, 0, 0);
    out.ndim = 2;
    for (int d = 0; d < 2; d++) {
        out.dim[d] = t->dim[d + 1];
        out.stride[d] = t->stride[d + 1];
    }
    return out;
}

xp_tensor xp_ref_vector(const xp_tensor *t, int64_t l) {
    return xp_tensor_1d(xp_tensor_at(t, l, 0, 0, 0), t->dtype, t->dim[1]);
}
