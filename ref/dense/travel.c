/* xp_dense_travel: every rank shows its counts and borders, and a row's place is worked out from those alone. */
#include "travel.h"
#include "num.h"

size_t xp_dense_away_ws(int ranks, int64_t e_n) {
    return xp_dense_room(e_n + 1, sizeof(int64_t)) + 2 * xp_dense_room(ranks * (e_n + 1), sizeof(int64_t)) +
           2 * xp_dense_room(ranks, sizeof(int64_t));
}

xp_status xp_dense_away_open(const xp_exec *x, const xp_tensor *counts, const xp_tensor *offsets, char **ws,
                             xp_dense_away *out) {
    xp_comm *c = x->mesh->axis[XP_EP];
    const int64_t e_n = counts->dim[0];
    int64_t *mine = xp_dense_carve(ws, e_n + 1, sizeof *mine);
    out->me = c->rank;
    out->e_n = e_n;
    out->l_n = e_n / c->size;
    out->counts = xp_dense_carve(ws, c->size * (e_n + 1), sizeof *out->counts);
    out->offsets = xp_dense_carve(ws, c->size * (e_n + 1), sizeof *out->offsets);
    out->used = xp_dense_carve(ws, c->size, sizeof *out->used);
    int64_t *ones = xp_dense_carve(ws, c->size, sizeof *ones);
    for (int64_t e = 0; e < e_n; e++)
        mine[e] = xp_dense_int(counts, e);
    XP_TRY(xp_dense_all(x, c, XP_I64, mine, e_n, out->counts, ones));
    for (int64_t e = 0; e <= e_n; e++)
        mine[e] = xp_dense_int(offsets, e);
    XP_TRY(xp_dense_all(x, c, XP_I64, mine, e_n + 1, out->offsets, ones));
    for (int r = 0; r < c->size; r++)
        out->used[r] = out->offsets[r * (e_n + 1) + e_n];
    return XP_OK;
}

int64_t xp_dense_away_place(const xp_dense_away *w, const xp_tensor *recv_offsets, int from, int64_t row) {
    for (int64_t l = 0; l < w->l_n; l++) {
        const int64_t e = w->me * w->l_n + l;
        int64_t place = row - w->offsets[from * (w->e_n + 1) + e];
        if (place < 0 || place >= w->counts[from * w->e_n + e])
            continue;
        for (int r = 0; r < from; r++)
            place += w->counts[r * w->e_n + e];
        return xp_dense_int(recv_offsets, l) + place;
    }
    return -1;
}

size_t xp_dense_home_ws(int ranks, int64_t l_n) {
    const int64_t shown = ranks * l_n > l_n + 1 ? ranks * l_n : l_n + 1;
    return xp_dense_room(shown, sizeof(int64_t)) + xp_dense_room(ranks * ranks * l_n, sizeof(int64_t)) +
           xp_dense_room(ranks * (l_n + 1), sizeof(int64_t)) + 2 * xp_dense_room(ranks, sizeof(int64_t));
}

xp_status xp_dense_home_open(const xp_exec *x, const xp_tensor *recv_counts, const xp_tensor *recv_offsets, char **ws,
                             xp_dense_home *out) {
    xp_comm *c = x->mesh->axis[XP_EP];
    const int64_t l_n = recv_counts->dim[1], ranks = c->size;
    int64_t *mine = xp_dense_carve(ws, ranks * l_n > l_n + 1 ? ranks * l_n : l_n + 1, sizeof *mine);
    out->me = c->rank;
    out->ranks = c->size;
    out->l_n = l_n;
    out->counts = xp_dense_carve(ws, ranks * ranks * l_n, sizeof *out->counts);
    out->offsets = xp_dense_carve(ws, ranks * (l_n + 1), sizeof *out->offsets);
    out->used = xp_dense_carve(ws, ranks, sizeof *out->used);
    int64_t *ones = xp_dense_carve(ws, ranks, sizeof *ones);
    for (int64_t i = 0; i < ranks * l_n; i++)
        mine[i] = xp_dense_int(recv_counts, xp_dense_at(recv_counts, i / l_n, i % l_n, 0, 0));
    XP_TRY(xp_dense_all(x, c, XP_I64, mine, ranks * l_n, out->counts, ones));
    for (int64_t l = 0; l <= l_n; l++)
        mine[l] = xp_dense_int(recv_offsets, l);
    XP_TRY(xp_dense_all(x, c, XP_I64, mine, l_n + 1, out->offsets, ones));
    for (int64_t r = 0; r < ranks; r++)
        out->used[r] = out->offsets[r * (l_n + 1) + l_n];
    return XP_OK;
}

int64_t xp_dense_home_place(const xp_dense_home *h, const xp_tensor *offsets, int from, int64_t row) {
    const int64_t *counts = h->counts + from * h->ranks * h->l_n;
    for (int64_t l = 0; l < h->l_n; l++) {
        int64_t place = row - h->offsets[from * (h->l_n + 1) + l];
        for (int r = 0; r < h->me; r++)
            place -= counts[r * h->l_n + l];
        if (place >= 0 && place < counts[h->me * h->l_n + l])
            return xp_dense_int(offsets, from * h->l_n + l) + place;
    }
    return -1;
}
