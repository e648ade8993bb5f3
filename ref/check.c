/* Table-driven check of operands: see check.h.
 *
 * One reading of the shape texts for all stages, so that a shape is stated once, in the operand table. Must not read an
 * operand's data. */
#include "check.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

/* One dimension's text: coef * (product of the sizes that are known) * (at most one that is not) + addend. */
typedef struct {
    int64_t known, addend;
    int64_t *unknown;
} expression;

/* Reads up to the next comma or the end, and returns the place behind it. */
static const char *expression_read(const char *p, xp_ref_dims *dims, expression *out) {
    int adding = 0;
    *out = (expression){.known = 1, .addend = 0, .unknown = NULL};
    while (*p && *p != ',') {
        if (*p >= '0' && *p <= '9') {
            int64_t n = 0;
            for (; *p >= '0' && *p <= '9'; p++)
                n = 10 * n + (*p - '0');
            if (adding)
                out->addend = n;
            else
                out->known *= n;
        } else if (*p >= 'A' && *p <= 'Z') {
            int64_t *size = p[1] == '0' ? &dims->r0 : &dims->letter[*p - 'A'];
            assert((p[1] != '0' || *p == 'R') && !adding);
            p += p[1] == '0' ? 2 : 1;
            if (*size < 0) {
                assert(!out->unknown);
                out->unknown = size;
            } else {
                out->known *= *size;
            }
        } else {
            assert(*p == '*' || *p == '+' || *p == ' ');
            adding |= *p == '+';
            p++;
        }
    }
    return *p ? p + 1 : p;
}

/* Length of the first dimension's text. */
static int text_length(const char *p) {
    const char *end = strchr(p, ',');
    return (int)(end ? end - p : (ptrdiff_t)strlen(p));
}

static int shape_dims(const char *shape) {
    int n = 1;
    for (const char *p = shape; (p = strchr(p, ',')) != NULL; p++)
        n++;
    return n;
}

static xp_status shape_check(const xp_stage *s, const xp_operand *o, const xp_tensor *t, xp_ref_dims *dims) {
    const char *p = o->shape;
    const int ndim = shape_dims(p);
    if (t->ndim != ndim)
        return XP_FAIL(XP_E_ARG, "%s: %s has %d dimensions, expected [%s]", s->name, o->name, t->ndim, o->shape);
    for (int d = 0; d < ndim; d++) {
        const char *text = p;
        expression e;
        p = expression_read(p, dims, &e);
        const int64_t n = t->dim[d], rest = n - e.addend;
        const int len = text_length(text);
        if (n < 0)
            return XP_FAIL(XP_E_ARG, "%s: %s dim %d is %lld, expected %.*s >= 0", s->name, o->name, d, (long long)n,
                           len, text);
        if (e.unknown) {
            if (rest < 0 || e.known == 0 || rest % e.known != 0)
                return XP_FAIL(XP_E_ARG, "%s: %s dim %d is %lld, which is no value of %.*s", s->name, o->name, d,
                               (long long)n, len, text);
            *e.unknown = rest / e.known;
        } else if (rest != e.known) {
            return XP_FAIL(XP_E_ARG, "%s: %s dim %d is %lld, expected %.*s = %lld", s->name, o->name, d, (long long)n,
                           len, text, (long long)(e.known + e.addend));
        }
    }
    if (t->dim[ndim - 1] > 1 && t->stride[ndim - 1] != 1)
        return XP_FAIL(XP_E_ARG, "%s: %s has stride %lld in its last dimension, expected 1", s->name, o->name,
                       (long long)t->stride[ndim - 1]);
    return XP_OK;
}

static xp_status dtype_check(const xp_stage *s, const void *args, int i) {
    const xp_operand *o = &s->operand[i];
    const xp_dtype d = xp_stage_ctensor(s, args, i)->dtype;
    const char *name = xp_dtype_name(d);
    if (!name || !(o->dtypes >> d & 1u)) {
        char list[128] = "";
        for (int k = 0; k < XP_NDTYPE; k++) {
            const size_t used = strlen(list);
            if (o->dtypes >> k & 1u)
                snprintf(list + used, sizeof list - used, "%s%s", used ? "|" : "", xp_dtype_name((xp_dtype)k));
        }
        return XP_FAIL(XP_E_ARG, "%s: %s has dtype %s, expected %s", s->name, o->name, name ? name : "?", list);
    }
    for (int j = 0; j < i && o->group[0]; j++) {
        const xp_tensor *other = xp_stage_ctensor(s, args, j);
        if (strcmp(s->operand[j].group, o->group) == 0 && other->data && other->dtype != d)
            return XP_FAIL(XP_E_ARG, "%s: %s has dtype %s, expected %s, as %s has", s->name, o->name, name,
                           xp_dtype_name(other->dtype), s->operand[j].name);
    }
    return XP_OK;
}

/* 1 when the view holds no element, whatever its pointer. */
static int is_empty(const xp_tensor *t) {
    for (int d = 0; d < t->ndim && d < XP_MAXDIM; d++) {
        if (t->dim[d] == 0)
            return 1;
    }
    return 0;
}

xp_status xp_ref_check(const xp_stage *s, const void *args, xp_ref_dims *out) {
    for (int i = 0; i < 26; i++)
        out->letter[i] = -1;
    out->r0 = -1;
    for (int i = 0; i < s->operands; i++) {
        const xp_operand *o = &s->operand[i];
        const xp_tensor *t = xp_stage_ctensor(s, args, i);
        if (!t->data && o->optional)
            continue;
        if (!t->data && !is_empty(t))
            return XP_FAIL(XP_E_ARG, "%s: %s is absent, expected [%s]", s->name, o->name, o->shape);
        XP_TRY(shape_check(s, o, t, out));
        XP_TRY(dtype_check(s, args, i));
    }
    return XP_OK;
}

/* 1 when the tensor is there: one without elements may be without memory. */
static int is_given(const xp_tensor *t) {
    return t->data || (t->ndim > 0 && is_empty(t));
}

xp_status xp_ref_wanted_check(const xp_stage *s, const void *args, const xp_dialect *dialect, uint32_t free) {
    const char *name = dialect ? dialect->name : "none";
    for (int i = 0; i < s->operands; i++) {
        const int there = is_given(xp_stage_ctensor(s, args, i)), want = s->wants(args, i);
        if (!s->operand[i].optional || there == want || (there && free & XP_BIT(i)))
            continue;
        return XP_FAIL(XP_E_ARG, "%s: %s is %s, expected %s: dialect %s", s->name, s->operand[i].name,
                       there ? "present" : "absent", want ? "it" : "none", name ? name : "?");
    }
    return XP_OK;
}
