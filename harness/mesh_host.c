/* Rows and sums of tensors in host memory.
 *
 * This is the arithmetic of a mesh's reductions, so it defines bits: the fold's order is the order of the parts and
 * nothing else, and it has its own narrowing. It must not be shared with the reference, which judges what goes through
 * it. */
#ifdef __FAST_MATH__
#error "the fold's bits need IEEE arithmetic"
#endif

#include "mesh_host.h"

#include <math.h>
#include <string.h>

enum { BLOCK = 512 }; /* elements folded at a time: small enough for the stack, long enough to vectorise */

typedef union {
    double d[BLOCK];
    float f[BLOCK];
    uint64_t u[BLOCK];
} block;

/* ---- views ---- */

int64_t xp_host_row(const xp_tensor *t) {
    int64_t n = 1;
    for (int i = 1; i < t->ndim; i++)
        n *= t->dim[i];
    return n;
}

int64_t xp_host_count(const xp_tensor *t) {
    return (t->ndim > 0 ? t->dim[0] : 1) * xp_host_row(t);
}

int xp_host_same_rows(const xp_tensor *a, const xp_tensor *b) {
    if (a->dtype != b->dtype || a->ndim != b->ndim)
        return 0;
    for (int i = 1; i < a->ndim; i++) {
        if (a->dim[i] != b->dim[i])
            return 0;
    }
    return 1;
}

/* Packed pairs: a row must be whole bytes, and every row must start on one. */
static xp_status packed_view(const char *field, const xp_tensor *t) {
    for (int i = 0; i < t->ndim; i++) {
        const int64_t even = i == t->ndim - 1 ? t->dim[i] : t->stride[i];
        if (t->ndim < 2 || even % 2 != 0)
            return XP_FAIL(XP_E_ARG,
                           "%s: e2m1 moves as rows of whole bytes: 2 or more dimensions, an even last one (%lld)",
                           field, (long long)t->dim[t->ndim - 1]);
    }
    return XP_OK;
}

xp_status xp_host_view(const char *field, const xp_tensor *t, int min_ndim) {
    int64_t count = 1;
    if (!t)
        return XP_FAIL(XP_E_ARG, "%s: no tensor", field);
    if ((unsigned)t->dtype >= XP_NDTYPE)
        return XP_FAIL(XP_E_ARG, "%s: dtype %d is none of ours", field, (int)t->dtype);
    if (t->mem != XP_HOST && t->mem != XP_PINNED)
        return XP_FAIL(XP_E_ARG, "%s: memory of kind %d, expected host memory", field, (int)t->mem);
    if (t->ndim < min_ndim || t->ndim > XP_MAXDIM)
        return XP_FAIL(XP_E_ARG, "%s: %d dimensions, expected %d to %d", field, t->ndim, min_ndim, XP_MAXDIM);
    for (int i = 0; i < t->ndim; i++) {
        if (t->dim[i] < 0 || (t->dim[i] > 0 && count > (INT64_MAX >> 4) / t->dim[i]))
            return XP_FAIL(XP_E_ARG, "%s: dimension %d is %lld, expected 0 or more and a size that can be addressed",
                           field, i, (long long)t->dim[i]);
        count *= t->dim[i];
        if (t->dim[i] > 1 && (i == t->ndim - 1 ? t->stride[i] != 1 : t->stride[i] < 0))
            return XP_FAIL(XP_E_ARG, "%s: stride %d is %lld, expected %s", field, i, (long long)t->stride[i],
                           i == t->ndim - 1 ? "1 (rows are contiguous)" : "0 or more");
    }
    if (count > 0 && !t->data)
        return XP_FAIL(XP_E_ARG, "%s: %lld elements but no data", field, (long long)count);
    return t->dtype == XP_E2M1 ? packed_view(field, t) : XP_OK;
}

/* How many elements lie one after another in the innermost dimensions. */
static int64_t run_length(const xp_tensor *t) {
    int64_t n = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->dim[i] > 1 && t->stride[i] != n)
            break;
        n *= t->dim[i];
    }
    return n;
}

/* Elements from number `at` on that are contiguous, at most `want`. */
static int64_t run_at(const xp_tensor *t, int64_t at, int64_t want) {
    const int64_t length = run_length(t);
    const int64_t rest = length - at % length;
    return rest < want ? rest : want;
}

static void *address(const xp_tensor *t, int64_t number) {
    return (char *)t->data + xp_tensor_offset(t, number) * xp_dtype_bits(t->dtype) / 8;
}

void xp_host_copy(const xp_tensor *src, int64_t from, int64_t rows, const xp_tensor *dst, int64_t to) {
    const int64_t row = xp_host_row(src), n = rows * row;
    for (int64_t i = 0; i < n;) {
        const int64_t run = run_at(dst, to * row + i, run_at(src, from * row + i, n - i));
        const void *s = address(src, from * row + i);
        void *d = address(dst, to * row + i);
        if (s != d)
            memcpy(d, s, xp_dtype_bytes(src->dtype, run));
        i += run;
    }
}

/* ---- one element ---- */

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static uint16_t bf16_of(float x) {
    const uint32_t u = bits_of(x);
    if (isnan(x))
        return 0x7FC0;
    return (uint16_t)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}

static uint16_t f16_of(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
    const float size = fabsf(x);
    uint32_t u = bits_of(size);
    if (isnan(x))
        return 0x7E00;
    if (size >= 65520.0f) /* the midpoint above the largest finite value, which is odd, rounds up */
        return (uint16_t)(sign | 0x7C00u);
    if (size < 0x1p-14f) /* 0.5 has the spacing 2^-24 of f16's subnormals, so the addition rounds to it */
        return (uint16_t)(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
    u -= (127u - 15u) << 23;
    return (uint16_t)(sign | (u + 0x0FFFu + (u >> 13 & 1u)) >> 13);
}

static float max_f32(float a, float b) {
    if (isnan(a) || isnan(b))
        return NAN;
    if (a > b || b > a)
        return a > b ? a : b;
    return signbit(a) ? b : a;
}

static double max_f64(double a, double b) {
    if (isnan(a) || isnan(b))
        return (double)NAN;
    if (a > b || b > a)
        return a > b ? a : b;
    return signbit(a) ? b : a;
}

/* ---- blocks ---- */

static void load_f32(xp_dtype d, const void *p, int64_t n, float *out) {
    double wide[BLOCK];
    if (d == XP_F32) {
        memcpy(out, p, (size_t)n * sizeof *out);
        return;
    }
    xp_widen_row(p, d, 0, n, wide);
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)wide[i];
}

static void store_f32(xp_dtype d, const float *acc, int64_t n, void *p) {
    for (int64_t i = 0; i < n; i++) {
        if (d == XP_F32)
            ((float *)p)[i] = isnan(acc[i]) ? NAN : acc[i];
        else
            ((uint16_t *)p)[i] = d == XP_BF16 ? bf16_of(acc[i]) : f16_of(acc[i]);
    }
}

/* Sign-extended, so that one 64-bit sum wraps as each width does and one signed comparison serves all but u64. */
static void load_int(xp_dtype d, const void *p, int64_t n, uint64_t *out) {
    for (int64_t i = 0; i < n; i++) {
        if (d == XP_I32)
            out[i] = (uint64_t)(int64_t)((const int32_t *)p)[i];
        else
            out[i] = xp_code(p, d, i);
    }
}

static void store_int(xp_dtype d, const uint64_t *acc, int64_t n, void *p) {
    for (int64_t i = 0; i < n; i++) {
        if (d == XP_U8)
            ((uint8_t *)p)[i] = (uint8_t)acc[i];
        else if (d == XP_I32)
            ((uint32_t *)p)[i] = (uint32_t)acc[i];
        else
            ((uint64_t *)p)[i] = acc[i];
    }
}

static void load(xp_dtype d, const void *p, int64_t n, block *out) {
    if (d == XP_F64)
        memcpy(out->d, p, (size_t)n * sizeof(double));
    else if (xp_dtype_is_float(d))
        load_f32(d, p, n, out->f);
    else
        load_int(d, p, n, out->u);
}

static void store(xp_dtype d, const block *acc, int64_t n, void *p) {
    if (d == XP_F64) {
        for (int64_t i = 0; i < n; i++)
            ((double *)p)[i] = isnan(acc->d[i]) ? (double)NAN : acc->d[i];
    } else if (xp_dtype_is_float(d)) {
        store_f32(d, acc->f, n, p);
    } else {
        store_int(d, acc->u, n, p);
    }
}

static void add(xp_dtype d, const block *x, int64_t n, block *acc) {
    if (d == XP_F64) {
        for (int64_t i = 0; i < n; i++)
            acc->d[i] += x->d[i];
    } else if (xp_dtype_is_float(d)) {
        for (int64_t i = 0; i < n; i++)
            acc->f[i] += x->f[i];
    } else {
        for (int64_t i = 0; i < n; i++)
            acc->u[i] += x->u[i];
    }
}

static void maximum(xp_dtype d, const block *x, int64_t n, block *acc) {
    for (int64_t i = 0; i < n; i++) {
        if (d == XP_F64)
            acc->d[i] = max_f64(acc->d[i], x->d[i]);
        else if (xp_dtype_is_float(d))
            acc->f[i] = max_f32(acc->f[i], x->f[i]);
        else if (d == XP_U64 ? x->u[i] > acc->u[i] : (int64_t)x->u[i] > (int64_t)acc->u[i])
            acc->u[i] = x->u[i];
    }
}

int xp_host_can_fold(xp_dtype d) {
    static const uint32_t can = XP_DT_ACT | XP_BIT(XP_I64) | XP_BIT(XP_I32) | XP_BIT(XP_U64) | XP_BIT(XP_U8);
    return (unsigned)d < XP_NDTYPE && (can & XP_BIT(d)) != 0;
}

void xp_host_fold(xp_redop op, int parts, const xp_tensor *const *in, int64_t from, int64_t n, int outs,
                  const xp_tensor *const *out, int64_t to) {
    const xp_dtype d = in[0]->dtype;
    block acc, x;
    for (int64_t i = 0; i < n;) {
        int64_t run = n - i < BLOCK ? n - i : BLOCK;
        for (int p = 0; p < parts; p++)
            run = run_at(in[p], from + i, run);
        for (int o = 0; o < outs; o++)
            run = run_at(out[o], to + i, run);
        load(d, address(in[0], from + i), run, &acc);
        for (int p = 1; p < parts; p++) {
            load(d, address(in[p], from + i), run, &x);
            if (op == XP_MAX)
                maximum(d, &x, run, &acc);
            else
                add(d, &x, run, &acc);
        }
        for (int o = 0; o < outs; o++)
            store(d, &acc, run, address(out[o], to + i));
        i += run;
    }
}
