/* xp_dense linear maps: rows widened in groups, each weight row widened once a group. */
#include <string.h>

#include "linear.h"
#include "num.h"

typedef struct {
    double *in, *out, *wide; /* [ROWS,K], [ROWS,N], [K] */
} rooms;

size_t xp_dense_linear_ws(const xp_tensor *w) {
    return xp_dense_room(XP_DENSE_ROWS * w->dim[1], sizeof(double)) +
           xp_dense_room(XP_DENSE_ROWS * w->dim[0], sizeof(double)) + xp_dense_room(w->dim[1], sizeof(double));
}

static rooms carve(const xp_tensor *w, char *ws) {
    rooms r;
    r.in = xp_dense_carve(&ws, XP_DENSE_ROWS * w->dim[1], sizeof *r.in);
    r.out = xp_dense_carve(&ws, XP_DENSE_ROWS * w->dim[0], sizeof *r.out);
    r.wide = xp_dense_carve(&ws, w->dim[1], sizeof *r.wide);
    return r;
}

void xp_dense_linear(const xp_tensor *x, const xp_tensor *w, const xp_tensor *bias, const xp_tensor *y, void *ws) {
    const rooms r = carve(w, ws);
    const int64_t t_n = x->dim[0];
    for (int64_t lo = 0; lo < t_n; lo += XP_DENSE_ROWS) {
        const int64_t m = t_n - lo < XP_DENSE_ROWS ? t_n - lo : XP_DENSE_ROWS;
        xp_dense_read_rows(x, lo, m, r.in);
        xp_dense_map(r.in, m, w, r.out, r.wide);
        for (int64_t i = 0; bias && bias->data && i < m * w->dim[0]; i++)
            r.out[i] += xp_dense_get(bias, i % w->dim[0]);
        xp_dense_write_rows(y, lo, m, r.out);
    }
}

void xp_dense_linear_back(const xp_tensor *dy, const xp_tensor *w, const xp_tensor *dx, void *ws) {
    const rooms r = carve(w, ws);
    const int64_t t_n = dy->dim[0];
    for (int64_t lo = 0; lo < t_n; lo += XP_DENSE_ROWS) {
        const int64_t m = t_n - lo < XP_DENSE_ROWS ? t_n - lo : XP_DENSE_ROWS;
        xp_dense_read_rows(dy, lo, m, r.out);
        memset(r.in, 0, (size_t)(m * w->dim[1]) * sizeof *r.in);
        xp_dense_map_back(r.out, m, w, r.in, r.wide);
        xp_dense_write_rows(dx, lo, m, r.in);
    }
}
