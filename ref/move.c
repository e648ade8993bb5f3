/* The movement of rows over ep, in both directions: see move.h.
 *
 * Rows travel by (rank, local expert, row) on both sides, so packing and unpacking are one loop over segments. Bits are
 * copied, never converted. Must not leave a collective out because a rank has no rows. */
#include "move.h"

#include <math.h>
#include <string.h>

#include "num.h"

size_t xp_ref_span(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

void *xp_ref_carve(char **at, size_t bytes) {
    void *p = *at;
    *at += xp_ref_span(bytes);
    return p;
}

int xp_ref_readable(const xp_tensor *t) {
    return t->data && (t->mem == XP_HOST || t->mem == XP_PINNED);
}

int64_t xp_ref_i64(const xp_tensor *t, int64_t i) {
    return *(const int64_t *)xp_tensor_at(t, i, 0, 0, 0);
}

int64_t xp_ref_i64_2d(const xp_tensor *t, int64_t i, int64_t j) {
    return *(const int64_t *)xp_tensor_at(t, i, j, 0, 0);
}

int32_t xp_ref_i32(const xp_tensor *t, int64_t i, int64_t j) {
    return *(const int32_t *)xp_tensor_at(t, i, j, 0, 0);
}

int xp_ref_u8(const xp_tensor *t, int64_t i) {
    return *(const uint8_t *)xp_tensor_at(t, i, 0, 0, 0);
}

int64_t xp_ref_segment_rows(int64_t n, int64_t least, int align) {
    const int64_t rows = n > least ? n : least;
    return (rows + align - 1) / align * align;
}

/* ---- the path ---- */

static xp_status home_check(const char *stage, const xp_ref_path *p, int64_t home_rows) {
    const int64_t experts = p->counts->dim[0];
    if (!xp_ref_readable(p->counts) || !xp_ref_readable(p->offsets))
        return XP_OK;
    if (xp_ref_i64(p->offsets, 0) != 0)
        return XP_FAIL(XP_E_ARG, "%s: offsets[0] is %lld, expected 0", stage, (long long)xp_ref_i64(p->offsets, 0));
    for (int64_t e = 0; e < experts; e++) {
        const int64_t n = xp_ref_i64(p->counts, e), room = xp_ref_i64(p->offsets, e + 1) - xp_ref_i64(p->offsets, e);
        if (n < 0 || n > room)
            return XP_FAIL(XP_E_ARG, "%s: counts[%lld] is %lld, expected 0 to %lld, the rows between its offsets",
                           stage, (long long)e, (long long)n, (long long)room);
    }
    if (xp_ref_i64(p->offsets, experts) > home_rows)
        return XP_FAIL(XP_E_ARG, "%s: offsets[%lld] is %lld, expected at most M = %lld rows", stage, (long long)experts,
                       (long long)xp_ref_i64(p->offsets, experts), (long long)home_rows);
    return XP_OK;
}

static xp_status away_check(const char *stage, const xp_ref_path *p, int64_t away_rows) {
    const int64_t ranks = p->recv_counts->dim[0], local = p->recv_counts->dim[1];
    if (!xp_ref_readable(p->recv_counts) || !xp_ref_readable(p->recv_offsets))
        return XP_OK;
    if (xp_ref_i64(p->recv_offsets, 0) != 0)
        return XP_FAIL(XP_E_ARG, "%s: recv_offsets[0] is %lld, expected 0", stage,
                       (long long)xp_ref_i64(p->recv_offsets, 0));
    for (int64_t l = 0; l < local; l++) {
        int64_t room = xp_ref_i64(p->recv_offsets, l + 1) - xp_ref_i64(p->recv_offsets, l);
        for (int64_t r = 0; r < ranks; r++) {
            const int64_t n = xp_ref_i64_2d(p->recv_counts, r, l);
            if (n < 0 || n > room)
                return XP_FAIL(XP_E_ARG, "%s: recv_counts[%lld][%lld] is %lld, expected 0 to %lld, the rows left in %s",
                               stage, (long long)r, (long long)l, (long long)n, (long long)room, "its segment");
            room -= n;
        }
    }
    if (xp_ref_i64(p->recv_offsets, local) > away_rows)
        return XP_FAIL(XP_E_ARG, "%s: recv_offsets[%lld] is %lld, expected at most C = %lld rows", stage,
                       (long long)local, (long long)xp_ref_i64(p->recv_offsets, local), (long long)away_rows);
    return XP_OK;
}

xp_status xp_ref_path_check(const char *stage, const xp_ref_path *p, const xp_comm *ep, int64_t home_rows,
                            int64_t away_rows) {
    const int64_t ranks = p->recv_counts->dim[0], local = p->recv_counts->dim[1], experts = p->counts->dim[0];
    if (ranks != ep->size)
        return XP_FAIL(XP_E_ARG, "%s: recv_counts dim 0 is %lld, expected P = %d, the ranks of ep", stage,
                       (long long)ranks, ep->size);
    if (ranks * local != experts)
        return XP_FAIL(XP_E_ARG, "%s: recv_counts dim 1 is %lld, expected L = E/P = %lld/%lld", stage, (long long)local,
                       (long long)experts, (long long)ranks);
    XP_TRY(home_check(stage, p, home_rows));
    return away_rows < 0 ? XP_OK : away_check(stage, p, away_rows);
}

/* The rows that rank r's side of local expert l has in a tensor. */
typedef struct {
    int64_t first, rows;
} segment;
typedef segment (*segment_of)(const xp_ref_path *p, int64_t r, int64_t l);

static segment home_segment(const xp_ref_path *p, int64_t r, int64_t l) {
    const int64_t e = r * p->recv_counts->dim[1] + l;
    return (segment){xp_ref_i64(p->offsets, e), xp_ref_i64(p->counts, e)};
}

static segment away_segment(const xp_ref_path *p, int64_t r, int64_t l) {
    segment s = {xp_ref_i64(p->recv_offsets, l), xp_ref_i64_2d(p->recv_counts, r, l)};
    for (int64_t q = 0; q < r; q++)
        s.first += xp_ref_i64_2d(p->recv_counts, q, l);
    return s;
}

static int64_t row_width(const xp_tensor *t) {
    return t->ndim > 1 ? t->dim[1] : 1;
}

static size_t row_bytes(const xp_tensor *t) {
    return xp_dtype_bytes(t->dtype, row_width(t));
}

/* One side's rows in travelling order: tensor to buffer, or buffer to tensor. */
static void segments_copy(const xp_ref_path *p, segment_of of, const xp_tensor *t, char *buffer, int to_buffer) {
    const int64_t ranks = p->recv_counts->dim[0], local = p->recv_counts->dim[1];
    const size_t bytes = row_bytes(t);
    if (bytes == 0)
        return;
    for (int64_t r = 0; r < ranks; r++) {
        for (int64_t l = 0; l < local; l++) {
            const segment s = of(p, r, l);
            for (int64_t i = 0; i < s.rows; i++, buffer += bytes) {
                void *row = xp_tensor_at(t, s.first + i, 0, 0, 0);
                memcpy(to_buffer ? buffer : row, to_buffer ? row : buffer, bytes);
            }
        }
    }
}

/* Rows that go to or come from each rank; returns their sum. */
static int64_t segments_count(const xp_ref_path *p, segment_of of, int64_t *out_rows) {
    int64_t sum = 0;
    for (int64_t r = 0; r < p->recv_counts->dim[0]; r++) {
        out_rows[r] = 0;
        for (int64_t l = 0; l < p->recv_counts->dim[1]; l++)
            out_rows[r] += of(p, r, l).rows;
        sum += out_rows[r];
    }
    return sum;
}

static void pads_fill(const xp_tensor *t, int64_t lo, int64_t hi, int pad) {
    const size_t bytes = row_bytes(t);
    for (int64_t i = lo; i < hi && bytes > 0; i++)
        memset(xp_tensor_at(t, i, 0, 0, 0), pad, bytes);
}

size_t xp_ref_path_ws(const xp_tensor *home, const xp_tensor *away, int ranks) {
    return 2 * xp_ref_span((size_t)ranks * sizeof(int64_t)) + xp_ref_span(row_bytes(home) * (size_t)home->dim[0]) +
           xp_ref_span(row_bytes(away) * (size_t)away->dim[0]);
}

/* A plain view of n travelling rows. */
static xp_tensor buffer_of(void *data, const xp_tensor *like, int64_t n) {
    const int64_t dim[2] = {n, row_width(like)};
    return xp_tensor_of(data, like->dtype, like->ndim, dim);
}

static xp_status rows_exchange(const xp_exec *x, const xp_ref_path *p, segment_of from_of, const xp_tensor *from,
                               segment_of to_of, const xp_tensor *to, void *ws) {
    xp_comm *c = x->mesh->axis[XP_EP];
    char *at = ws;
    int64_t *send_rows = xp_ref_carve(&at, (size_t)c->size * sizeof *send_rows);
    int64_t *recv_rows = xp_ref_carve(&at, (size_t)c->size * sizeof *recv_rows);
    void *sent = xp_ref_carve(&at, row_bytes(from) * (size_t)from->dim[0]);
    void *got = xp_ref_carve(&at, row_bytes(to) * (size_t)to->dim[0]);
    const xp_tensor src = buffer_of(sent, from, segments_count(p, from_of, send_rows));
    xp_tensor dst = buffer_of(got, to, segments_count(p, to_of, recv_rows));
    segments_copy(p, from_of, from, sent, 1);
    XP_TRY(c->ops->all_to_all_v(c, x->q, &src, send_rows, &dst, recv_rows));
    segments_copy(p, to_of, to, got, 0);
    return XP_OK;
}

xp_status xp_ref_path_away(const xp_exec *x, const xp_ref_path *p, const xp_tensor *home, const xp_tensor *away,
                           int pad, void *ws) {
    const int64_t ranks = p->recv_counts->dim[0], local = p->recv_counts->dim[1];
    XP_TRY(rows_exchange(x, p, home_segment, home, away_segment, away, ws));
    for (int64_t l = 0; l < local; l++) {
        const segment last = away_segment(p, ranks - 1, l);
        pads_fill(away, last.first + last.rows, xp_ref_i64(p->recv_offsets, l + 1), pad);
    }
    return XP_OK;
}

xp_status xp_ref_path_home(const xp_exec *x, const xp_ref_path *p, const xp_tensor *away, const xp_tensor *home,
                           int pad, void *ws) {
    XP_TRY(rows_exchange(x, p, away_segment, away, home_segment, home, ws));
    for (int64_t e = 0; e < p->counts->dim[0]; e++)
        pads_fill(home, xp_ref_i64(p->offsets, e) + xp_ref_i64(p->counts, e), xp_ref_i64(p->offsets, e + 1), pad);
    return XP_OK;
}

static double rows_sum(const xp_ref_path *p, int away, int64_t skip) {
    const int64_t ranks = p->recv_counts->dim[0], local = p->recv_counts->dim[1];
    const xp_tensor *counts = away ? p->recv_counts : p->counts;
    double rows = 0.0;
    for (int64_t r = 0; r < ranks && xp_ref_readable(counts); r++) {
        for (int64_t l = 0; l < local && r != skip; l++)
            rows += (double)(away ? xp_ref_i64_2d(counts, r, l) : xp_ref_i64(counts, r * local + l));
    }
    return rows;
}

double xp_ref_path_rows(const xp_ref_path *p, int away) {
    return rows_sum(p, away, -1);
}

double xp_ref_path_remote(const xp_ref_path *p, const xp_comm *ep, int away) {
    return rows_sum(p, away, ep->rank);
}

uint64_t xp_ref_hash(const void *base, xp_dtype d, int64_t n, uint64_t h) {
    h ^= 0xCBF29CE484222325u;
    for (int64_t i = 0; i < n; i++)
        h = (h ^ xp_code(base, d, i)) * 0x100000001B3u;
    return h;
}

static uint64_t segments_hash(const xp_ref_path *p, segment_of of, const xp_tensor *t) {
    uint64_t sum = 0;
    for (int64_t r = 0; r < p->recv_counts->dim[0] && row_bytes(t) > 0; r++) {
        for (int64_t l = 0; l < p->recv_counts->dim[1]; l++) {
            const segment s = of(p, r, l);
            for (int64_t i = s.first; i < s.first + s.rows; i++)
                sum += xp_ref_hash(xp_tensor_at(t, i, 0, 0, 0), t->dtype, row_width(t), 0);
        }
    }
    return sum;
}

xp_status xp_ref_path_conserved(const xp_ref_path *p, xp_comm *ep, const xp_tensor *home, const xp_tensor *away,
                                double *out) {
    uint64_t sum[4] = {(uint64_t)rows_sum(p, 0, -1), (uint64_t)rows_sum(p, 1, -1), segments_hash(p, home_segment, home),
                       segments_hash(p, away_segment, away)};
    xp_tensor buf = xp_tensor_1d(sum, XP_U64, 4);
    XP_TRY(ep->ops->all_reduce(ep, NULL, &buf, XP_SUM));
    *out = sum[0] == sum[1] && sum[2] == sum[3] ? 0.0 : 2.0;
    return XP_OK;
}

/* ---- bounds ---- */

double xp_ref_sum_err(int64_t n, xp_dtype acc, double gauge, int64_t products) {
    /* The gauge may be too small by gamma_n in double and this line has four roundings of its own: the last factor. */
    const double lost = (double)products * (xp_ref_half_ulp_err(acc, 0.0) + xp_ref_half_ulp_err(XP_F64, 0.0));
    return ((xp_ref_gamma(n, acc) + xp_ref_gamma(n, XP_F64)) * gauge + (1.0 + xp_ref_gamma(n, acc)) * lost) *
           (1.0 + 2.0 * xp_ref_gamma(n + 4, XP_F64));
}

double xp_ref_round_err(xp_dtype d, double v, double e) {
    const double most = (fabs(v) + e) * (1.0 + 0x1p-50);
    if (isinf(xp_ref_round(most, d)))
        return (double)INFINITY;
    return (e + xp_ref_half_ulp_err(d, most)) * (1.0 + 0x1p-50);
}
