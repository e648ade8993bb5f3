/* xp_dense gated MLP: no rounding between its steps. */
#include <string.h>

#include "mlp.h"
#include "num.h"

size_t xp_dense_mlp_ws(int64_t h_n, int64_t f_n) {
    return 2 * xp_dense_room(XP_DENSE_ROWS * h_n, sizeof(double)) +
           xp_dense_room(XP_DENSE_ROWS * 2 * f_n, sizeof(double)) + xp_dense_room(XP_DENSE_ROWS * f_n, sizeof(double)) +
           xp_dense_room(h_n > f_n ? h_n : f_n, sizeof(double)) + xp_dense_room(XP_DENSE_ROWS, sizeof(int64_t));
}

xp_dense_mlp xp_dense_mlp_carve(int64_t h_n, int64_t f_n, char **ws) {
    xp_dense_mlp b = {.h_n = h_n, .f_n = f_n};
    b.x = xp_dense_carve(ws, XP_DENSE_ROWS * h_n, sizeof *b.x);
    b.y = xp_dense_carve(ws, XP_DENSE_ROWS * h_n, sizeof *b.y);
    b.pre = xp_dense_carve(ws, XP_DENSE_ROWS * 2 * f_n, sizeof *b.pre);
    b.act = xp_dense_carve(ws, XP_DENSE_ROWS * f_n, sizeof *b.act);
    b.wide = xp_dense_carve(ws, h_n > f_n ? h_n : f_n, sizeof *b.wide);
    b.member = xp_dense_carve(ws, XP_DENSE_ROWS, sizeof *b.member);
    return b;
}

void xp_dense_gate(const double *pre, int64_t m, int64_t f_n, double *act) {
    for (int64_t i = 0; i < m; i++) {
        const double *g = pre + i * 2 * f_n, *u = g + f_n;
        for (int64_t f = 0; f < f_n; f++)
            act[i * f_n + f] = g[f] * xp_dense_sigmoid(g[f]) * u[f];
    }
}

/* silu'(g) = s + g s (1 - s) with s = sigmoid(g) and 1 - s = sigmoid(-g). */
void xp_dense_gate_back(const double *da, int64_t m, int64_t f_n, double *pre) {
    for (int64_t i = 0; i < m; i++) {
        double *g = pre + i * 2 * f_n, *u = g + f_n;
        for (int64_t f = 0; f < f_n; f++) {
            const double s = xp_dense_sigmoid(g[f]), d = da[i * f_n + f];
            const double slope = s + g[f] * s * xp_dense_sigmoid(-g[f]);
            const double du = d * (g[f] * s);
            g[f] = d * u[f] * slope;
            u[f] = du;
        }
    }
}

void xp_dense_mlp_run(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1, const xp_tensor *w2) {
    xp_dense_map(b->x, m, w1, b->pre, b->wide);
    xp_dense_gate(b->pre, m, b->f_n, b->act);
    xp_dense_map(b->act, m, w2, b->y, b->wide);
}

void xp_dense_mlp_back(const xp_dense_mlp *b, int64_t m, const xp_tensor *w1, const xp_tensor *w2) {
    memset(b->act, 0, (size_t)(m * b->f_n) * sizeof *b->act);
    xp_dense_map_back(b->y, m, w2, b->act, b->wide);
    xp_dense_gate_back(b->act, m, b->f_n, b->pre);
    memset(b->x, 0, (size_t)(m * b->h_n) * sizeof *b->x);
    xp_dense_map_back(b->pre, m, w1, b->x, b->wide);
}
