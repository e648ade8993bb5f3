/* Where an element lies in the logical tensor, and which rows came from another rank.
 *
 * Everything is read from the operand table's shape letters and from the offsets, token numbers and counts among the
 * operands; those may be an implementation's wrong output, so nothing here trusts them as an index. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "judge_call.h"

/* The dimensions of a shape as letters; 0 for a product or a sum. Returns their number. */
static int letters(const char *shape, char out[XP_MAXDIM]) {
    int n = 0;
    memset(out, 0, XP_MAXDIM);
    for (const char *p = shape; *p && n < XP_MAXDIM; n++) {
        const char *end = strchr(p, ',');
        const size_t len = end ? (size_t)(end - p) : strlen(p);
        out[n] = len == 1 ? *p : '\0';
        p += len + (end != NULL);
    }
    return n;
}

static char first_letter(const xp_operand *o) {
    char dim[XP_MAXDIM];
    return letters(o->shape, dim) > 0 ? dim[0] : '\0';
}

static const xp_tensor *host(const xp_judged *c, int i) {
    return xp_stage_ctensor(c->s, c->host, i);
}

/* The present integer operand of that name and shape, or NULL. */
static const xp_tensor *find(const xp_judged *c, const char *name, const char *shape, xp_dtype d) {
    const int i = xp_stage_operand(c->s, name);
    if (i < 0 || !c->role[i] || strcmp(c->s->operand[i].shape, shape) != 0)
        return NULL;
    const xp_tensor *t = host(c, i);
    return t->dtype == d && xp_tensor_contiguous(t) ? t : NULL;
}

static const xp_tensor *find_offsets(const xp_judged *c, const char *shape) {
    const xp_tensor *t = find(c, "recv_offsets", shape, XP_I64);
    return t ? t : find(c, "offsets", shape, XP_I64);
}

/* The group of a row, or -1. */
static int64_t group_of(const xp_tensor *offsets, int64_t row) {
    const int64_t *o = offsets->data;
    for (int64_t g = 0; g + 1 < offsets->dim[0]; g++) {
        if (row >= o[g] && row < o[g + 1])
            return g;
    }
    return -1;
}

/* ---- arrivals: which rows of the expert side came from where ---- */

/* Offsets of a stage are a run of the latest dispatch's: out is the first local expert. 0: they are something else. */
static int match_arrivals(const xp_judged *c, const xp_tensor *offsets, int64_t capacity, int64_t *out_first) {
    const xp_arrivals *a = &c->j->arrived;
    const int64_t n = offsets->dim[0];
    if (a->ranks == 0 || capacity != a->capacity)
        return 0;
    for (int64_t g = 0; g + n <= a->locals + 1; g++) {
        if (memcmp(a->offsets + g, offsets->data, (size_t)n * sizeof(int64_t)) == 0) {
            *out_first = g;
            return 1;
        }
    }
    return 0;
}

static int64_t overlap(int64_t a, int64_t b, int64_t lo, int64_t hi) {
    const int64_t from = a > lo ? a : lo, to = b < hi ? b : hi;
    return to > from ? to - from : 0;
}

/* Rows [lo, hi) of the expert side whose source is another rank. first: local expert of the offsets' first group. */
static int64_t remote_arrivals(const xp_arrivals *a, int me, int64_t first, int64_t groups, int64_t lo, int64_t hi) {
    int64_t remote = 0;
    for (int64_t l = first; l < first + groups; l++) {
        int64_t at = a->offsets[l];
        for (int64_t p = 0; p < a->ranks; p++) {
            const int64_t rows = a->counts[p * a->locals + l];
            if (p != me)
                remote += overlap(at, at + rows, lo, hi);
            at += rows;
        }
    }
    return remote;
}

static xp_status note_arrivals(xp_judged *c, const xp_tensor *counts, const xp_tensor *offsets, int64_t capacity) {
    xp_arrivals *a = &c->j->arrived;
    const int64_t n = counts->dim[0] * counts->dim[1], m = counts->dim[1] + 1;
    if (n + m > a->room) {
        int64_t *p = realloc(a->counts, (size_t)(n + m) * sizeof *p);
        if (!p)
            return XP_FAIL(XP_E_NOMEM, "judge: %lld counts of rows", (long long)(n + m));
        a->counts = p;
        a->room = n + m;
    }
    a->offsets = a->counts + n;
    memcpy(a->counts, counts->data, (size_t)n * sizeof(int64_t));
    memcpy(a->offsets, offsets->data, (size_t)m * sizeof(int64_t));
    for (int64_t i = 0; i < n; i++) /* a wrong count must not overflow a sum */
        a->counts[i] = a->counts[i] < 0 || a->counts[i] > INT32_MAX ? 0 : a->counts[i];
    for (int64_t i = 0; i < m; i++)
        a->offsets[i] = a->offsets[i] < 0 || a->offsets[i] > INT32_MAX ? 0 : a->offsets[i];
    a->ranks = counts->dim[0];
    a->locals = counts->dim[1];
    a->capacity = capacity;
    return XP_OK;
}

/* Rows at home that went to, or came from, experts of other ranks. */
static int64_t remote_at_home(const xp_judged *c) {
    const xp_tensor *counts = find(c, "counts", "E", XP_I64);
    const xp_comm *ep = c->r->mesh->axis[XP_EP];
    int64_t remote = 0;
    if (!counts || c->s->axis != XP_EP)
        return 0;
    const int64_t local = counts->dim[0] / ep->size;
    for (int64_t e = 0; e < counts->dim[0]; e++) {
        const int64_t n = ((const int64_t *)counts->data)[e];
        if (local > 0 && e / local != ep->rank && n > 0 && n <= INT32_MAX)
            remote += n;
    }
    return remote;
}

/* The capacity of the expert side in this stage, from any operand with rows "C"; -1 when there is none. */
static int64_t capacity_of(const xp_judged *c) {
    for (int i = 0; i < c->s->operands; i++) {
        if (c->role[i] && first_letter(&c->s->operand[i]) == 'C')
            return host(c, i)->dim[0];
    }
    return -1;
}

/* First row of the operand that the view holds. */
static int64_t first_row(const xp_judged *c, int operand, const xp_tensor *view) {
    const xp_tensor *t = host(c, operand);
    const size_t bits = (size_t)xp_dtype_bits(t->dtype);
    if (t->stride[0] == 0 || !view->data)
        return 0;
    return ((const char *)view->data - (const char *)t->data) * 8 / (int64_t)bits / t->stride[0];
}

int xp_judged_by_rows(const xp_judged *c, int operand) {
    return first_letter(&c->s->operand[operand]) == 'C';
}

int64_t xp_judged_remote(const xp_judged *c, int operand, const xp_tensor *view) {
    const char letter = first_letter(&c->s->operand[operand]);
    const xp_tensor *offsets = find_offsets(c, "L+1");
    int64_t first, lo = 0, hi = INT64_MAX;
    if (letter == 'M')
        return remote_at_home(c);
    if (letter == 'C') {
        lo = first_row(c, operand, view);
        hi = lo + view->dim[0];
    } else if (letter == 'T' || c->s->axis != XP_LOCAL) {
        return 0;
    }
    if (!offsets || !match_arrivals(c, offsets, capacity_of(c), &first))
        return 0;
    return remote_arrivals(&c->j->arrived, c->r->mesh->axis[XP_EP]->rank, first, offsets->dim[0] - 1, lo, hi);
}

int xp_judged_rows_in_use(const xp_judged *c, int64_t extent, int64_t *out) {
    const xp_tensor *offsets = find_offsets(c, "L+1");
    if (!offsets || extent != capacity_of(c))
        return 0;
    *out = ((const int64_t *)offsets->data)[offsets->dim[0] - 1];
    return *out >= 0 && *out <= extent;
}

/* ---- what a case can show ---- */

static int ascending(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static void see_choices(xp_judged *c, const xp_tensor *idx, int64_t experts) {
    enum { MOST = 64 };
    xp_seen *s = &c->j->seen;
    const int64_t k = idx->dim[1];
    int32_t set[MOST];
    if (experts <= k || k > MOST || k == 0)
        return;
    for (int64_t t = 0; t < idx->dim[0]; t++) {
        memcpy(set, xp_tensor_at(idx, t, 0, 0, 0), (size_t)k * sizeof *set);
        qsort(set, (size_t)k, sizeof *set, ascending);
        const uint64_t h = xp_hash_bytes(set, (size_t)k * sizeof *set, 0).lo;
        if (s->tokens++ == 0)
            s->choice = h;
        s->choices_differ |= h != s->choice;
    }
}

xp_status xp_judged_observe(xp_judged *c) {
    xp_seen *s = &c->j->seen;
    const int scores = c->s->scores ? xp_stage_operand(c->s, c->s->scores) : -1;
    const xp_tensor *counts = find(c, "recv_counts", "P,L", XP_I64), *offsets = find_offsets(c, "L+1");
    s->ep = c->r->mesh->axis[XP_EP]->size;
    if (c->select >= 0 && scores >= 0 && c->role[scores])
        see_choices(c, host(c, c->select), host(c, scores)->dim[1]);
    if (!counts || !offsets || !(c->role[xp_stage_operand(c->s, "recv_counts")] & XP_OUT))
        return XP_OK;
    const xp_tensor *sent = find(c, "counts", "E", XP_I64);
    for (int64_t e = 0; sent && e < sent->dim[0]; e++) {
        const int64_t n = ((const int64_t *)sent->data)[e];
        s->sent += n > 0 && n <= INT32_MAX ? n : 0;
    }
    s->sent_away += remote_at_home(c);
    return note_arrivals(c, counts, offsets, capacity_of(c));
}

/* ---- places ---- */

/* Index of element n of the view in the operand that it is a view of. */
static void full_index(const xp_tensor *full, const xp_tensor *view, int64_t n, int64_t out[XP_MAXDIM]) {
    int64_t off = ((const char *)view->data - (const char *)full->data) * 8 / xp_dtype_bits(full->dtype);
    for (int d = view->ndim - 1; d >= 0; d--) {
        out[d] = n % view->dim[d];
        n /= view->dim[d];
    }
    for (int d = 0; d < full->ndim; d++) {
        if (full->stride[d] <= 0)
            continue;
        out[d] += off / full->stride[d];
        off %= full->stride[d];
    }
}

/* Token and expert of row `row` of the sending or the receiving side. */
static void place_row(const xp_judged *c, char letter, int64_t row, xp_place *out) {
    const int sending = letter == 'M';
    const xp_tensor *tok = find(c, "recv_tok", sending ? "M" : "C", XP_I64);
    const xp_tensor *offsets = find_offsets(c, sending ? "E+1" : "L+1");
    if (!tok)
        tok = find(c, "tok", sending ? "M" : "C", XP_I64);
    if (tok && row < tok->dim[0])
        out->token = ((const int64_t *)tok->data)[row];
    if (!offsets)
        return;
    int64_t first = 0;
    const int64_t group = group_of(offsets, row);
    if (!sending && !match_arrivals(c, offsets, capacity_of(c), &first))
        first = -1;
    if (group >= 0 && first >= 0)
        out->expert = first + group + (sending ? 0 : c->r->mesh->axis[XP_EP]->rank * c->j->arrived.locals);
}

static void place_letters(const xp_judged *c, const char dim[XP_MAXDIM], int ndim, xp_place *out) {
    const xp_tensor *idx = find(c, "idx", "T,K", XP_I32);
    int64_t t = -1;
    for (int d = 0; d < ndim; d++) {
        const int64_t i = out->index[d];
        if (dim[d] == 'T') {
            t = i;
            out->token = c->r->token0 + i;
        } else if (dim[d] == 'E') {
            out->expert = i;
        } else if (dim[d] == 'K') {
            out->slot = i;
        } else if (d == 0 && (dim[d] == 'M' || dim[d] == 'C')) {
            place_row(c, dim[d], i, out);
        }
    }
    if (idx && t >= 0 && out->slot >= 0 && out->expert < 0 && t < idx->dim[0] && out->slot < idx->dim[1])
        out->expert = ((const int32_t *)idx->data)[t * idx->dim[1] + out->slot];
}

void xp_judged_place(const xp_judged *c, int operand, const xp_tensor *view, int64_t n, xp_place *out) {
    char dim[XP_MAXDIM];
    const xp_tensor *full = host(c, operand);
    const int64_t off = xp_tensor_offset(view, n);
    memset(out, 0, sizeof *out);
    out->set = 1;
    out->rank = c->r->rank;
    out->layer = c->r->layer;
    out->step = c->r->step;
    out->token = out->expert = out->slot = -1;
    out->ndim = full->ndim;
    out->dtype = (int)full->dtype;
    out->code = xp_code(view->data, view->dtype, off);
    out->got = xp_widen(view->data, view->dtype, off);
    full_index(full, view, n, out->index);
    letters(c->s->operand[operand].shape, dim);
    place_letters(c, dim, full->ndim, out);
    /* A weight's local expert is known only where the whole of its group dimension is here. */
    const int64_t locals = c->j->arrived.locals;
    for (int d = 0; d < full->ndim; d++) {
        if (dim[d] == 'L' && full->dim[d] == locals && out->expert < 0)
            out->expert = c->r->mesh->axis[XP_EP]->rank * locals + out->index[d];
    }
}

/* ---- text ---- */

/* snprintf onto the end of a buffer, never past it. */
static size_t append(char *buf, size_t bytes, size_t at, const char *what, int64_t value) {
    const int n = at < bytes ? snprintf(buf + at, bytes - at, "%s%s %lld", at ? " " : "", what, (long long)value) : 0;
    return at + (size_t)(n > 0 ? n : 0);
}

void xp_place_print(const xp_place *p, char *buf, size_t bytes) {
    const struct {
        const char *what;
        int64_t value;
    } part[] = {{"rank", p->rank},   {"layer", p->layer},   {"step", p->step},
                {"token", p->token}, {"expert", p->expert}, {"slot", p->slot}};
    size_t at = 0;
    if (bytes == 0)
        return;
    buf[0] = '\0';
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        if (part[i].value >= 0)
            at = append(buf, bytes, at, part[i].what, part[i].value);
    }
    for (int d = 0; d < p->ndim && at < bytes; d++)
        at += (size_t)snprintf(buf + at, bytes - at, "%s%lld%s", d ? "," : " index [", (long long)p->index[d],
                               d + 1 == p->ndim ? "]" : "");
}

void xp_place_values(const xp_place *p, char *buf, size_t bytes) {
    const xp_dtype d = (xp_dtype)p->dtype;
    const int digits = (xp_dtype_bits(d) + 3) / 4;
    if (xp_dtype_is_float(d))
        snprintf(buf, bytes, "got %a (%s 0x%0*llx) expected %a bound %a", p->got, xp_dtype_name(d), digits,
                 (unsigned long long)p->code, p->expected, p->bound);
    else
        snprintf(buf, bytes, "got %.0f (%s 0x%0*llx) expected %.0f", p->got, xp_dtype_name(d), digits,
                 (unsigned long long)p->code, p->expected);
}
