/* What the stages on tokens share: see token.h.
 *
 * Sums are double chains over ascending indices; only the fold of block sums rounds each addition, since that is what
 * makes its bits independent of who folds. Must not allocate or leave a collective out because a rank has no tokens. */
#include "token.h"

#include <math.h>
#include <string.h>

#include "linear.h"
#include "mlp.h"
#include "move.h"

/* ---- operands ---- */

double xp_ref_bytes(const xp_stage *s, const void *args) {
    double sum = 0.0;
    for (int i = 0; i < s->operands; i++) {
        const xp_tensor *t = xp_stage_ctensor(s, args, i);
        if (t->data)
            sum += (double)xp_dtype_bytes(t->dtype, xp_tensor_count(t));
    }
    return sum;
}

xp_dtype xp_ref_op_of(const xp_tensor *const *t, int n) {
    for (int i = 0; i < n; i++) {
        if (t[i]->data && t[i]->dtype != XP_F64)
            return XP_F32;
    }
    return XP_F64;
}

xp_status xp_ref_ids_check(const char *stage, const char *name, const xp_tensor *t, int64_t lo, int64_t hi,
                           const char *below) {
    const int64_t n = xp_ref_readable(t) ? xp_tensor_count(t) : 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = xp_tensor_offset(t, i);
        const int64_t id = t->dtype == XP_U8 ? ((const uint8_t *)t->data)[at] : ((const int32_t *)t->data)[at];
        if (id < lo || id >= hi)
            return XP_FAIL(XP_E_ARG, "%s: %s element %lld is %lld, expected %lld to %lld (below %s)", stage, name,
                           (long long)i, (long long)id, (long long)lo, (long long)hi - 1, below);
    }
    return XP_OK;
}

uint64_t xp_ref_row_word(const void *row, xp_dtype d, int64_t n, uint64_t seed) {
    uint64_t z = xp_ref_hash(row, d, n, seed);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u; /* SplitMix64's finaliser */
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* ---- blocks of tokens ---- */

xp_status xp_ref_blocks_check(const char *stage, int64_t token0, int64_t block, int64_t T) {
    if (token0 < 0 || token0 > INT64_MAX - T)
        return XP_FAIL(XP_E_ARG, "%s: token0 is %lld, expected 0 or more and room for T = %lld", stage,
                       (long long)token0, (long long)T);
    if (block < 0)
        return XP_FAIL(XP_E_ARG, "%s: block is %lld, expected 0 (one sum) or the tokens of a block", stage,
                       (long long)block);
    return XP_OK;
}

int64_t xp_ref_blocks(int64_t token0, int64_t block, int64_t T) {
    if (block == 0)
        return 1;
    return T > 0 ? (token0 + T - 1) / block - token0 / block + 1 : 0;
}

void xp_ref_block_tokens(int64_t token0, int64_t block, int64_t T, int64_t b, int64_t *out_lo, int64_t *out_hi) {
    *out_lo = 0;
    *out_hi = T;
    if (block == 0)
        return;
    const int64_t into = token0 % block, before = b * block - into; /* tokens of this rank ahead of the block */
    if (before > 0)
        *out_lo = before;
    if (T - before > block)
        *out_hi = before + block;
}

enum { FOLD_ROWS = 64 }; /* rows that travel at once: bounds the workspace whatever the number of blocks */

size_t xp_ref_fold_ws(const xp_comm *c, int64_t width, xp_dtype d) {
    const size_t ranks = c ? (size_t)c->size * sizeof(int64_t) : 0;
    return xp_ref_span(2 * ranks) + xp_ref_span(ranks) + xp_ref_span((size_t)width * sizeof(double)) +
           xp_ref_span(xp_dtype_bytes(d, FOLD_ROWS * width));
}

static void fold_rows(const void *rows, xp_dtype d, int64_t n, int64_t width, double *row, double *out) {
    for (int64_t i = 0; i < n; i++) {
        xp_widen_row(rows, d, i * width, width, row);
        for (int64_t j = 0; j < width; j++)
            out[j] += row[j];
        xp_ref_round_row(d, width, out);
    }
}

/* place[2r], place[2r+1] = rows and first block of rank r. */
static xp_status places_exchange(const char *stage, xp_comm *c, xp_queue *q, int64_t rows, int64_t first,
                                 int64_t *place, int64_t *each) {
    int64_t mine[2] = {rows, first}, end = 0;
    const xp_tensor src = xp_tensor_2d(mine, XP_I64, 1, 2);
    xp_tensor dst = xp_tensor_2d(place, XP_I64, c->size, 2);
    for (int r = 0; r < c->size; r++)
        each[r] = 1;
    XP_TRY(c->ops->all_gather(c, q, &src, each, &dst));
    for (int r = 0; r < c->size; r++) {
        if (place[2 * r] == 0)
            continue;
        if (place[2 * r + 1] < end)
            return XP_FAIL(XP_E_ARG,
                           "%s: rank %d starts at block %lld, expected %lld or later, as lower ranks end there", stage,
                           r, (long long)place[2 * r + 1], (long long)end);
        end = place[2 * r + 1] + place[2 * r] - 1;
    }
    return XP_OK;
}

/* All ranks' rows are one list; a window of it travels at a time. */
xp_status xp_ref_fold(const char *stage, xp_comm *c, xp_queue *q, const xp_tensor *sums, int64_t first, void *ws,
                      double *out) {
    const int64_t width = sums->dim[1], mine = sums->dim[0];
    const size_t ranks = c ? (size_t)c->size * sizeof(int64_t) : 0;
    char *at = ws;
    int64_t *place = xp_ref_carve(&at, 2 * ranks), *each = xp_ref_carve(&at, ranks);
    double *row = xp_ref_carve(&at, (size_t)width * sizeof *row);
    memset(out, 0, (size_t)width * sizeof *out);
    if (!c) {
        fold_rows(sums->data, sums->dtype, mine, width, row, out);
        return XP_OK;
    }
    XP_TRY(places_exchange(stage, c, q, mine, first, place, each));
    int64_t total = 0;
    for (int r = 0; r < c->size; r++)
        total += place[2 * r];
    for (int64_t w = 0; w < total; w += FOLD_ROWS) {
        int64_t begin = 0, got = 0, from = 0;
        for (int r = 0; r < c->size; r++) {
            const int64_t lo = begin > w ? begin : w, stop = begin + place[2 * r];
            const int64_t hi = stop < w + FOLD_ROWS ? stop : w + FOLD_ROWS;
            each[r] = hi > lo ? hi - lo : 0;
            if (r == c->rank && hi > lo)
                from = lo - begin;
            got += each[r];
            begin = stop;
        }
        const xp_tensor src = xp_tensor_rows(sums, 0, from, from + each[c->rank]);
        xp_tensor dst = xp_tensor_2d(at, sums->dtype, got, width);
        XP_TRY(c->ops->all_gather(c, q, &src, each, &dst));
        fold_rows(dst.data, dst.dtype, got, width, row, out);
    }
    return XP_OK;
}

/* ---- softmax ---- */

static double row_max(const double *v, int64_t n) {
    double m = v[0];
    for (int64_t i = 1; i < n; i++) {
        if (v[i] > m || m != m)
            m = v[i];
    }
    return m;
}

double xp_ref_softmax(const double *v, int64_t n, double *p) {
    const double m = row_max(v, n);
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        p[i] = xp_ref_exp(v[i] - m);
        sum += p[i];
    }
    for (int64_t i = 0; i < n; i++)
        p[i] /= sum;
    return m + xp_ref_log(sum);
}

/* exp(d + err) - exp(d) = exp(d) expm1(err) on the high side, less on the low side unless the high side is cut off at
 * `most`. 8 units (4 ulp) of the moved value for the function itself. */
double xp_ref_exp_error(double d, double err, double most, xp_dtype op) {
    const double unit = xp_ref_unit(op) + xp_ref_unit(XP_F64), rise = most - d < err ? most - d : err;
    if (d == -(double)INFINITY || d + rise < -800.0) /* exp is 0, or below the smallest double on both sides */
        return xp_ref_least(op);
    const double at = xp_ref_exp(d), high = xp_ref_exp(d + rise);
    const double up = rise < 1.0 ? at * xp_ref_expm1(rise) : high - at;
    const double down = rise < err ? -at * xp_ref_expm1(-err) : 0.0;
    return (up > down ? up : down) + 8.0 * unit * high + xp_ref_least(op);
}

/* num[i]: error of exp(v - max) from one rounding of the difference. S = sum of exp, s = sum num / S, g = gamma_n.
 * p'  <= (exp + num) (1 + 8u) / (S (1 - s) (1 - g)): with A = (1 + 8u) / ((1 - s)(1 - g)) - 1 = (8u + s + g - s g) /
 * ((1 - s)(1 - g)),  |p' - p| <= p A + num / S (1 + A), and the smallest normal number. Arguments within ve move p
 * itself to p / (p + (1 - p) exp(-+2 ve)) at most, and what was said of p then holds of up to p exp(2 ve). lse: log
 * moves by -log(1 - b) <= b / (1 - b), b = s + g + s g; log within 8u; one rounding of the last sum. */
double xp_ref_softmax_error(const double *v, double ve, const double *p, int64_t n, xp_dtype op, double *e) {
    const double u = xp_ref_unit(op) + xp_ref_unit(XP_F64), g = xp_ref_both(n, op), m = row_max(v, n);
    const double wider = xp_ref_exp(2.0 * ve), fewer = -xp_ref_expm1(-2.0 * ve);
    double sum = 0.0, off = 0.0;
    for (int64_t i = 0; i < n; i++) {
        const double d = v[i] - m;
        e[i] = xp_ref_exp_error(d, u * (fabs(d) + 2.0 * ve), 0.0, op);
        sum += xp_ref_exp(d);
        off += e[i];
    }
    const double s = off / sum, b = s + g + s * g;
    const double rest = b < 1.0 ? (1.0 - s) * (1.0 - g) : 0.0, A = (8.0 * u + s + g) / rest;
    for (int64_t i = 0; i < n; i++) {
        const double moved = ve > 0.0 ? p[i] * (1.0 - p[i]) * fewer / (p[i] + (1.0 - p[i]) * (1.0 - fewer)) : 0.0;
        e[i] = ((p[i] * A + e[i] / sum * (1.0 + A)) * wider + moved + xp_ref_least(op)) * (1.0 + 0x1p-45);
    }
    const double moved = b < 1.0 ? b / (1.0 - b) : (double)INFINITY, log_sum = xp_ref_log(sum);
    const double late = moved + 8.0 * u * (fabs(log_sum) + moved);
    return (ve + late + u * (fabs(m + log_sum) + ve + late)) * (1.0 + 0x1p-45);
}

/* Sum of s_i |d_i| = entropy - log S <= log n: the rounded differences move the sum by u log n, exp by 8u, n
 * additions. */
static int64_t softmax_sum_units(int64_t n) {
    int64_t log_n = 1;
    for (int64_t k = n; k > 1; k /= 2)
        log_n++;
    return 8 + log_n + n;
}

/* Above the smallest normal number, 2^-126 = e^-87.4 or 2^-1022 = e^-708.4, the difference is no larger. */
int64_t xp_ref_softmax_units(int64_t n, xp_dtype op) {
    return softmax_sum_units(n) + 8 + 8 + (op == XP_F64 ? 709 : 88);
}

/* ---- linear maps ---- */

enum { MAP_ROWS = XP_REF_MLP_ROWS };

size_t xp_ref_map_ws(const xp_tensor *w) {
    return xp_ref_span((size_t)(MAP_ROWS * w->dim[1]) * sizeof(double)) * 2 +
           xp_ref_span((size_t)(MAP_ROWS * w->dim[0]) * sizeof(double)) * 2 +
           xp_ref_span((size_t)w->dim[0] * sizeof(double)) + xp_ref_linear_ws();
}

typedef struct {
    double *in, *in_error, *out, *out_error, *bias;
    void *tile;
} map_work;

static map_work map_plan(const xp_tensor *w, void *ws) {
    const size_t in = (size_t)(MAP_ROWS * w->dim[1]) * sizeof(double);
    const size_t out = (size_t)(MAP_ROWS * w->dim[0]) * sizeof(double);
    char *at = ws;
    map_work p;
    p.in = xp_ref_carve(&at, in);
    p.in_error = xp_ref_carve(&at, in);
    p.out = xp_ref_carve(&at, out);
    p.out_error = xp_ref_carve(&at, out);
    p.bias = xp_ref_carve(&at, (size_t)w->dim[0] * sizeof(double));
    p.tile = at;
    return p;
}

static int has_bias(const xp_ref_map *f) {
    return f->bias && f->bias->data;
}

void xp_ref_map_run(const xp_ref_map *f, void *ws) {
    const int64_t T = f->x->dim[0], in = f->w->dim[1], outs = f->w->dim[0];
    const map_work p = map_plan(f->w, ws);
    if (has_bias(f))
        xp_widen_row(f->bias->data, f->bias->dtype, 0, outs, p.bias);
    for (int64_t t = 0; t < T; t += MAP_ROWS) {
        const int64_t m = T - t < MAP_ROWS ? T - t : MAP_ROWS;
        xp_ref_rows_load(f->x, t, m, p.in);
        if (f->cast)
            xp_ref_round_row(f->w->dtype, m * in, p.in);
        xp_ref_linear_nt(p.in, m, in, f->w, 0, p.out, outs, p.tile);
        for (int64_t i = 0; i < m * outs && has_bias(f); i++)
            p.out[i] += p.bias[i % outs];
        xp_ref_rows_store(f->y, t, m, p.out);
    }
}

void xp_ref_map_bound(const xp_ref_map *f, const xp_tensor *ref, void *ws, xp_tensor *tol) {
    const int64_t T = f->x->dim[0], in = f->w->dim[1], outs = f->w->dim[0];
    const xp_tensor none = {.data = NULL}, *const all[] = {f->x, f->w, f->bias ? f->bias : &none, f->y};
    const xp_dtype op = xp_ref_op_of(all, 4);
    const int64_t terms = in + has_bias(f);
    const map_work p = map_plan(f->w, ws);
    if (has_bias(f))
        xp_widen_row(f->bias->data, f->bias->dtype, 0, outs, p.bias);
    for (int64_t t = 0; t < T; t += MAP_ROWS) {
        const int64_t m = T - t < MAP_ROWS ? T - t : MAP_ROWS;
        xp_ref_rows_load(f->x, t, m, p.in);
        xp_ref_rows_load(ref, t, m, p.out);
        int lost[MAP_ROWS] = {0}; /* a cast makes one of the row's numbers infinite: NaN is then as right as inf */
        for (int64_t i = 0; i < m * in; i++) { /* one side may not cast */
            const double x = p.in[i];
            p.in[i] = f->cast ? xp_ref_round(x, f->w->dtype) : x;
            p.in_error[i] = f->cast ? fabs(x - p.in[i]) : 0.0;
            lost[i / in] |= isfinite(x) && isinf(p.in[i]);
        }
        xp_ref_dot_inputs(terms, op, m * in, p.in, p.in_error);
        xp_ref_linear_nt(p.in_error, m, in, f->w, 1, p.out_error, outs, p.tile);
        xp_ref_dot_outputs(terms, op, m * outs, p.out_error);
        for (int64_t i = 0; i < m * outs; i++) {
            const double add = has_bias(f) ? xp_ref_both(terms, op) * fabs(p.bias[i % outs]) : 0.0;
            p.out_error[i] = xp_ref_val_out((xp_ref_val){p.out[i], p.out_error[i] + add}, f->y->dtype, op);
            if (lost[i / outs] && isinf(p.out_error[i]) && !isfinite(p.out[i]))
                p.out_error[i] = (double)NAN;
        }
        xp_ref_rows_store(tol, t, m, p.out_error);
    }
}

void xp_ref_map_back_run(const xp_tensor *dy, const xp_tensor *w, const xp_tensor *dx, void *ws) {
    const int64_t T = dy->dim[0], in = w->dim[1], outs = w->dim[0];
    const map_work p = map_plan(w, ws);
    for (int64_t t = 0; t < T; t += MAP_ROWS) {
        const int64_t m = T - t < MAP_ROWS ? T - t : MAP_ROWS;
        xp_ref_rows_load(dy, t, m, p.out);
        xp_ref_linear_nn(p.out, m, outs, w, 0, p.in, in, p.tile);
        xp_ref_rows_store(dx, t, m, p.in);
    }
}

void xp_ref_map_back_bound(const xp_tensor *dy, const xp_tensor *w, const xp_tensor *dx, const xp_tensor *ref, void *ws,
                           xp_tensor *tol) {
    const int64_t T = dy->dim[0], in = w->dim[1], outs = w->dim[0];
    const xp_tensor *const all[] = {dy, w, dx};
    const xp_dtype op = xp_ref_op_of(all, 3);
    const map_work p = map_plan(w, ws);
    for (int64_t t = 0; t < T; t += MAP_ROWS) {
        const int64_t m = T - t < MAP_ROWS ? T - t : MAP_ROWS;
        xp_ref_rows_load(dy, t, m, p.out);
        xp_ref_rows_load(ref, t, m, p.in);
        memset(p.out_error, 0, (size_t)(m * outs) * sizeof(double));
        xp_ref_dot_inputs(outs, op, m * outs, p.out, p.out_error);
        xp_ref_linear_nn(p.out_error, m, outs, w, 1, p.in_error, in, p.tile);
        xp_ref_dot_outputs(outs, op, m * in, p.in_error);
        for (int64_t i = 0; i < m * in; i++)
            p.in_error[i] = xp_ref_val_out((xp_ref_val){p.in[i], p.in_error[i]}, dx->dtype, op);
        xp_ref_rows_store(tol, t, m, p.in_error);
    }
}
