/* The store of row hashes behind parity.h: one array of 64-bit hashes for each (site, layer, step), filled by one run
 * and compared by the next. One lock guards the list of arrays; rows of an array belong to the rank that brings them.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"
#include "parity.h"

typedef struct {
    xp_parity_line line;
    int64_t total;
    uint64_t *hash; /* [total], 0: never recorded */
    uint8_t *seen;  /* [total], 1: compared */
} row_set;

struct xp_parity {
    pthread_mutex_t lock;
    row_set *set;
    int sets, room;
    int comparing;
};

xp_status xp_parity_open(xp_parity **out) {
    *out = calloc(1, sizeof **out);
    if (!*out)
        return XP_FAIL(XP_E_NOMEM, "parity: %zu bytes", sizeof **out);
    if (pthread_mutex_init(&(*out)->lock, NULL) != 0) {
        free(*out);
        *out = NULL;
        return XP_FAIL(XP_E_BUG, "parity: no mutex");
    }
    return XP_OK;
}

void xp_parity_close(xp_parity *p) {
    if (!p)
        return;
    for (int i = 0; i < p->sets; i++) {
        free(p->set[i].hash);
        free(p->set[i].seen);
    }
    free(p->set);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

void xp_parity_compare(xp_parity *p) {
    p->comparing = 1;
}

/* The set of (site, layer, step), made when it is new; NULL without memory. Called under the lock. */
static row_set *set_of(xp_parity *p, const char *site, int layer, int step, int64_t total) {
    for (int i = 0; i < p->sets; i++) {
        if (p->set[i].line.layer == layer && p->set[i].line.step == step && strcmp(p->set[i].line.site, site) == 0)
            return &p->set[i];
    }
    if (p->sets == p->room) {
        const int room = p->room ? 2 * p->room : 64;
        row_set *more = realloc(p->set, (size_t)room * sizeof *more);
        if (!more)
            return NULL;
        p->set = more;
        p->room = room;
    }
    row_set *s = &p->set[p->sets];
    memset(s, 0, sizeof *s);
    s->hash = calloc((size_t)total + 1, sizeof *s->hash);
    s->seen = calloc((size_t)total + 1, 1);
    if (!s->hash || !s->seen) {
        free(s->hash);
        free(s->seen);
        return NULL;
    }
    strcpy(s->line.site, site);
    s->line.layer = layer;
    s->line.step = step;
    s->line.first = -1;
    s->line.rank = -1;
    s->total = total;
    p->sets++;
    return s;
}

static int64_t row_elements(const xp_tensor *t) {
    int64_t n = 1;
    for (int d = 1; d < t->ndim; d++)
        n *= t->dim[d];
    return n;
}

static uint64_t row_hash(const xp_tensor *t, int64_t row) {
    const size_t bytes = xp_dtype_bytes(t->dtype, row_elements(t));
    const uint64_t h = xp_hash64(xp_tensor_at(t, row, 0, 0, 0), bytes, (uint64_t)t->dtype);
    return h ? h : 1;
}

/* A row is hashed as one run of bytes. */
static int rows_contiguous(const xp_tensor *t) {
    const xp_tensor row = xp_tensor_rows(t, 0, 0, 1);
    return xp_tensor_contiguous(&row);
}

static void compare_row(row_set *s, int64_t row, uint64_t h, int rank) {
    s->line.rows++;
    s->seen[row] = 1;
    if (s->hash[row] == h)
        return;
    s->line.different++;
    if (s->line.first < 0 || row < s->line.first) {
        s->line.first = row;
        s->line.rank = rank;
    }
}

xp_status xp_parity_rows(xp_parity *p, const char *site, int layer, int step, int rank, const xp_tensor *t,
                         int64_t row0, int64_t rows_total) {
    if (!p || t->dim[0] == 0)
        return XP_OK;
    if (strlen(site) >= sizeof p->set->line.site || !rows_contiguous(t))
        return XP_FAIL(XP_E_BUG, "parity: '%s' is longer than %zu characters, or its rows are not contiguous", site,
                       sizeof p->set->line.site - 1);
    if (row0 < 0 || row0 + t->dim[0] > rows_total)
        return XP_FAIL(XP_E_BUG, "parity: rows %lld to %lld of '%s', which has %lld", (long long)row0,
                       (long long)(row0 + t->dim[0]), site, (long long)rows_total);
    pthread_mutex_lock(&p->lock);
    const row_set *known = set_of(p, site, layer, step, rows_total);
    const int64_t total = known ? known->total : -1;
    pthread_mutex_unlock(&p->lock);
    if (total != rows_total)
        return total < 0 ? XP_FAIL(XP_E_NOMEM, "parity: %lld row hashes", (long long)rows_total)
                         : XP_FAIL(XP_E_BUG, "parity: '%s' has %lld rows here and had %lld", site,
                                   (long long)rows_total, (long long)total);
    for (int64_t i = 0; i < t->dim[0]; i++) {
        const uint64_t h = row_hash(t, i);
        pthread_mutex_lock(&p->lock);
        row_set *s = set_of(p, site, layer, step, rows_total);
        if (p->comparing)
            compare_row(s, row0 + i, h, rank);
        else
            s->hash[row0 + i] = h;
        s->line.elements += p->comparing ? row_elements(t) : 0;
        pthread_mutex_unlock(&p->lock);
    }
    return XP_OK;
}

int xp_parity_result(const xp_parity *p, int i, xp_parity_line *out) {
    if (i < 0 || i >= p->sets)
        return 0;
    *out = p->set[i].line;
    for (int64_t r = 0; r < p->set[i].total; r++)
        out->missing += p->set[i].hash[r] != 0 && !p->set[i].seen[r];
    return 1;
}
