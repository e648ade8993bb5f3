/* What the files of the catalogue of faults share: reading and rounding elements, copies, and the two macros. Only
 * faults.c and faults_reduce.c include this. */
#ifndef XP_FAULTS_H
#define XP_FAULTS_H

#include <stdlib.h>
#include <string.h>

#include "fault.h"
#include "fill.h"
#include "xp/gradnorm.h"

#define RUN(name) \
    static xp_status name(const xp_fault *self, const xp_kernel *inner, const xp_exec *x, const void *args)

/* variable is its run function, which becomes xp_fault_<variable>. */
#define FAULT(variable, text, on, what, from, by) \
    const xp_fault xp_fault_##variable = {        \
        .name = text, .stage = on, .meaning = what, .source = from, .caught_by = by, .run = variable}

static inline double get(const xp_tensor *t, int64_t i) {
    return xp_widen(t->data, t->dtype, xp_tensor_offset(t, i));
}

static inline double rounded(double v, xp_dtype d) {
    uint64_t cell = 0;
    const xp_tensor t = xp_tensor_1d(&cell, d, 1);
    xp_fill_store(&t, 0, v);
    return xp_widen(&cell, d, 0);
}

/* A contiguous copy in the same dtype; the caller frees out->data. */
static inline xp_status copy_of(const xp_fault *f, const xp_tensor *t, xp_tensor *out) {
    const size_t size = (size_t)xp_dtype_bits(t->dtype) / 8;
    const int64_t n = xp_tensor_count(t);
    char *mem = malloc((size_t)n * size + 1);
    if (!mem)
        return XP_FAIL(XP_E_NOMEM, "fault %s: no memory", f->name);
    for (int64_t i = 0; i < n; i++)
        memcpy(mem + (size_t)i * size, (const char *)t->data + (size_t)xp_tensor_offset(t, i) * size, size);
    *out = xp_tensor_of(mem, t->dtype, t->ndim, t->dim);
    return XP_OK;
}

/* Sum of squares of one segment of a gradient. */
static inline double segment_square(const xp_gradnorm_args *a, int64_t q) {
    const int64_t *seg = a->seg.data;
    double sum = 0;
    for (int64_t i = seg[q]; i < seg[q + 1]; i++)
        sum += get(&a->grad, i) * get(&a->grad, i);
    return sum;
}

/* Of all segments that this rank counts. */
static inline double local_square(const xp_gradnorm_args *a) {
    double sum = 0;
    for (int64_t q = 0; q < a->owner.dim[0]; q++)
        sum += ((const uint8_t *)a->owner.data)[q] ? segment_square(a, q) : 0.0;
    return sum;
}

/* Of faults_reduce.c, for the list in faults.c. */
extern const xp_fault xp_fault_experts_unreduced, xp_fault_outside_undivided, xp_fault_norm_group,
    xp_fault_norm_local_experts, xp_fault_norm_outsiders, xp_fault_norm_empty_leaves, xp_fault_nan_unclipped,
    xp_fault_stale_counts, xp_fault_empty_leaves, xp_fault_replay_softmax, xp_fault_dx_running;

#endif
