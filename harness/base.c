/* xp_base: status text, the dtype table, tensor arithmetic and exact widening to double.
 *
 * Every judge reads both sides through xp_widen, so this file is tested over every code of every narrow format.
 * It must not round: a widened value is the element's value. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "xp/backend.h"

static _Thread_local char error_text[1024];
static _Thread_local char error_where[160];

/* Names and values in a text come from files and command lines: no byte of theirs reaches a terminal or a report raw.
 */
static void put_ascii(const char *text, char *out, size_t bytes) {
    static const char hex[] = "0123456789abcdef";
    size_t at = 0;
    for (const char *p = text; *p; p++) {
        const unsigned char c = (unsigned char)*p;
        const int plain = c >= 0x20 && c < 0x7f;
        if (at + (plain ? 1 : 4) >= bytes)
            break;
        if (!plain) {
            out[at++] = '\\';
            out[at++] = 'x';
            out[at++] = hex[c >> 4];
        }
        out[at++] = plain ? *p : hex[c & 15];
    }
    out[at] = '\0';
}

xp_status xp_fail(xp_status st, const char *file, int line, const char *fmt, ...) {
    const char *base = strrchr(file, '/');
    va_list ap;
    va_start(ap, fmt);
    /* The format may print an earlier error's text, so it is composed beside the buffer it may read. */
    char text[sizeof error_text];
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    put_ascii(text, error_text, sizeof error_text);
    snprintf(error_where, sizeof error_where, "%s:%d", base ? base + 1 : file, line);
    return st;
}

const char *xp_error_text(void) {
    return error_text;
}

const char *xp_error_where(void) {
    return error_where;
}

const char *xp_status_name(xp_status st) {
    switch (st) {
    case XP_OK:
        return "ok";
    case XP_E_ARG:
        return "argument";
    case XP_E_NOMEM:
        return "memory";
    case XP_E_DEVICE:
        return "device";
    case XP_E_COMM:
        return "collective";
    case XP_E_PEER:
        return "peer";
    case XP_E_IO:
        return "file";
    case XP_E_FORMAT:
        return "format";
    case XP_E_HANG:
        return "hang";
    case XP_E_BUG:
        return "bug";
    case XP_E_PLUGIN:
        return "plugin";
    }
    return "unknown";
}

/* exponent bits, mantissa bits and bias of the narrow float formats; how infinity and NaN are coded */
typedef enum { SPECIAL_IEEE, SPECIAL_FN, SPECIAL_FNUZ, SPECIAL_NONE } special;
typedef struct {
    const char *name;
    int bits, exp_bits, man_bits, bias;
    special sp;
    int is_float;
} dtype_row;

static const dtype_row dtype_table[XP_NDTYPE] = {
    [XP_F64] = {"f64", 64, 11, 52, 1023, SPECIAL_IEEE, 1},
    [XP_F32] = {"f32", 32, 8, 23, 127, SPECIAL_IEEE, 1},
    [XP_BF16] = {"bf16", 16, 8, 7, 127, SPECIAL_IEEE, 1},
    [XP_F16] = {"f16", 16, 5, 10, 15, SPECIAL_IEEE, 1},
    [XP_E4M3] = {"e4m3", 8, 4, 3, 7, SPECIAL_FN, 1},
    [XP_E5M2] = {"e5m2", 8, 5, 2, 15, SPECIAL_IEEE, 1},
    [XP_E4M3FNUZ] = {"e4m3fnuz", 8, 4, 3, 8, SPECIAL_FNUZ, 1},
    [XP_E5M2FNUZ] = {"e5m2fnuz", 8, 5, 2, 16, SPECIAL_FNUZ, 1},
    [XP_E8M0] = {"e8m0", 8, 8, 0, 127, SPECIAL_NONE, 1},
    [XP_E2M1] = {"e2m1", 4, 2, 1, 1, SPECIAL_NONE, 1},
    [XP_I64] = {"i64", 64, 0, 0, 0, SPECIAL_NONE, 0},
    [XP_I32] = {"i32", 32, 0, 0, 0, SPECIAL_NONE, 0},
    [XP_U64] = {"u64", 64, 0, 0, 0, SPECIAL_NONE, 0},
    [XP_U8] = {"u8", 8, 0, 0, 0, SPECIAL_NONE, 0},
};

const char *xp_dtype_name(xp_dtype d) {
    return (unsigned)d < XP_NDTYPE ? dtype_table[d].name : NULL;
}

xp_status xp_dtype_parse(const char *text, xp_dtype *out) {
    *out = XP_NDTYPE;
    for (int d = 0; d < XP_NDTYPE; d++) {
        if (strcmp(text, dtype_table[d].name) == 0) {
            *out = (xp_dtype)d;
            return XP_OK;
        }
    }
    return XP_FAIL(XP_E_ARG,
                   "dtype: no type is called '%s' (f64 f32 bf16 f16 e4m3 e5m2 e4m3fnuz e5m2fnuz e8m0 e2m1 "
                   "i64 i32 u64 u8)",
                   text);
}

int xp_dtype_bits(xp_dtype d) {
    return dtype_table[d].bits;
}

int xp_dtype_is_float(xp_dtype d) {
    return dtype_table[d].is_float;
}

size_t xp_dtype_bytes(xp_dtype d, int64_t n) {
    return d == XP_E2M1 ? (size_t)(n + 1) / 2 : (size_t)n * ((size_t)dtype_table[d].bits / 8);
}

xp_tensor xp_tensor_of(void *data, xp_dtype d, int ndim, const int64_t *dim) {
    xp_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.dtype = d;
    t.mem = XP_HOST;
    t.ndim = ndim;
    int64_t step = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        t.dim[i] = dim[i];
        t.stride[i] = step;
        step *= dim[i];
    }
    return t;
}

xp_tensor xp_tensor_1d(void *data, xp_dtype d, int64_t n0) {
    return xp_tensor_of(data, d, 1, &n0);
}

xp_tensor xp_tensor_2d(void *data, xp_dtype d, int64_t n0, int64_t n1) {
    const int64_t dim[2] = {n0, n1};
    return xp_tensor_of(data, d, 2, dim);
}

xp_tensor xp_tensor_3d(void *data, xp_dtype d, int64_t n0, int64_t n1, int64_t n2) {
    const int64_t dim[3] = {n0, n1, n2};
    return xp_tensor_of(data, d, 3, dim);
}

int64_t xp_tensor_count(const xp_tensor *t) {
    if (!t->data)
        return 0;
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++)
        n *= t->dim[i];
    return n;
}

int xp_tensor_contiguous(const xp_tensor *t) {
    int64_t step = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->dim[i] > 1 && t->stride[i] != step)
            return 0;
        step *= t->dim[i];
    }
    return 1;
}

xp_tensor xp_tensor_rows(const xp_tensor *t, int d, int64_t lo, int64_t hi) {
    xp_tensor v = *t;
    v.dim[d] = hi - lo;
    if (t->data)
        v.data = (char *)t->data + (size_t)(lo * t->stride[d]) * ((size_t)dtype_table[t->dtype].bits / 8);
    return v;
}

void *xp_tensor_at(const xp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l) {
    const int64_t at[XP_MAXDIM] = {i, j, k, l};
    int64_t off = 0;
    for (int d = 0; d < t->ndim; d++)
        off += at[d] * t->stride[d];
    return (char *)t->data + (size_t)off * ((size_t)dtype_table[t->dtype].bits / 8);
}

int64_t xp_tensor_offset(const xp_tensor *t, int64_t n) {
    int64_t off = 0;
    for (int d = t->ndim - 1; d >= 0; d--) {
        off += n % t->dim[d] * t->stride[d];
        n /= t->dim[d];
    }
    return off;
}

uint64_t xp_code(const void *base, xp_dtype d, int64_t i) {
    uint64_t c = 0;
    if (d == XP_E2M1) {
        const uint8_t b = ((const uint8_t *)base)[i / 2];
        return (i & 1) ? (uint64_t)(b >> 4) : (uint64_t)(b & 15u);
    }
    const size_t n = (size_t)dtype_table[d].bits / 8;
    memcpy(&c, (const char *)base + (size_t)i * n, n);
    return c;
}

static double widen_code(uint64_t c, const dtype_row *r) {
    const uint64_t man = c & ((1u << r->man_bits) - 1u);
    const int exp = (int)(c >> r->man_bits) & ((1 << r->exp_bits) - 1);
    const int top = (1 << r->exp_bits) - 1;
    const double sign = (c >> (r->bits - 1) & 1) ? -1.0 : 1.0;
    if (r->sp == SPECIAL_IEEE && exp == top)
        return man ? (double)NAN : sign * (double)INFINITY;
    if (r->sp == SPECIAL_FN && exp == top && man == (1u << r->man_bits) - 1u)
        return (double)NAN;
    if (r->sp == SPECIAL_FNUZ && c == 1u << (r->bits - 1))
        return (double)NAN;
    if (exp == 0)
        return sign * ldexp((double)man, 1 - r->bias - r->man_bits);
    return sign * ldexp((double)(man + (1u << r->man_bits)), exp - r->bias - r->man_bits);
}

static double widen_bf16(uint16_t c) {
    const uint32_t u = (uint32_t)c << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return (double)f;
}

double xp_widen(const void *base, xp_dtype d, int64_t i) {
    switch (d) {
    case XP_F64:
        return ((const double *)base)[i];
    case XP_F32:
        return (double)((const float *)base)[i];
    case XP_BF16:
        return widen_bf16(((const uint16_t *)base)[i]);
    case XP_I64:
        return (double)((const int64_t *)base)[i];
    case XP_I32:
        return (double)((const int32_t *)base)[i];
    case XP_U64:
        return (double)((const uint64_t *)base)[i];
    case XP_U8:
        return (double)((const uint8_t *)base)[i];
    case XP_E8M0: {
        const uint64_t c = xp_code(base, d, i);
        return c == 255 ? (double)NAN : ldexp(1.0, (int)c - 127);
    }
    default:
        return widen_code(xp_code(base, d, i), &dtype_table[d]);
    }
}

void xp_widen_row(const void *base, xp_dtype d, int64_t i0, int64_t n, double *out) {
    if (d == XP_F64) {
        memcpy(out, (const double *)base + i0, (size_t)n * sizeof *out);
    } else if (d == XP_F32) {
        const float *p = (const float *)base + i0;
        for (int64_t i = 0; i < n; i++)
            out[i] = (double)p[i];
    } else if (d == XP_BF16) {
        const uint16_t *p = (const uint16_t *)base + i0;
        for (int64_t i = 0; i < n; i++)
            out[i] = widen_bf16(p[i]);
    } else {
        for (int64_t i = 0; i < n; i++)
            out[i] = xp_widen(base, d, i0 + i);
    }
}

const char *xp_axis_name(xp_axis a) {
    static const char *const name[XP_NAXIS] = {"dp", "fsdp", "ep", "ep_fsdp", "ep_dp", "edp", "world"};
    return a >= 0 && a < XP_NAXIS ? name[a] : "local";
}

int xp_stage_operand(const xp_stage *s, const char *name) {
    for (int i = 0; i < s->operands; i++) {
        if (strcmp(s->operand[i].name, name) == 0)
            return i;
    }
    return -1;
}

xp_tensor *xp_stage_tensor(const xp_stage *s, void *args, int i) {
    return (xp_tensor *)(void *)((char *)args + s->operand[i].at);
}

const xp_tensor *xp_stage_ctensor(const xp_stage *s, const void *args, int i) {
    return (const xp_tensor *)(const void *)((const char *)args + s->operand[i].at);
}
