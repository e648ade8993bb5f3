/* Second formulation of stage moe: y[t] = sum over every expert e of C[t][e] E_e(a[t][e] x[t]), with a matrix C [T,Z]
 * that is zero where a token did not choose the expert; no permutation, no rows that travel. With w the weight of one
 * slot and n the slots that name e: C = n w and a = 1, or C = n and a = w where weights are at the input. An identity
 * expert is E(x) = x. With a capacity n in C, and in the gradient of w, counts the slots that the expert takes; the
 * divisor D keeps all that were chosen.
 *
 * Gradients of <dy, y> on that form. With b[t] = W2^T dy[t] and h[t] the hidden row of expert e:
 *   d<dy,y>/dw = n (<b[t], h[t]> + <dy[t], b2>): the expert's output is not needed again; at the input n <dx, x>;
 *   dW2 = sum_t C dy[t] (x) h[t];  dh[t] = C b[t];  dW1 and dx from dh through the activation.
 * Scores s, divided by D(S), S = sum n s: w = f s / D with f what else is multiplied, so
 *   dL/ds_j = (g_j - n_j D' sum_e g_e w_e) / D, g = f dL/dw;
 * where D = S, softmax over all experts and over the chosen are one thing, with w its own slope:
 *   dL/dl_j = w_j (g_j - n_j sum_e g_e w_e).
 * where w is a softmax of log sigmoid(l), times sigmoid(-l). The shared expert is one more expert that all tokens
 * chose, with weight sigmoid(x . v); those that the router weighs are n more. Nothing is rounded between x
 * and the outputs. */
#include <math.h>
#include <string.h>

#include "dense.h"
#include "mlp.h"
#include "num.h"
#include "scores.h"

/* One expert over all tokens. */
typedef struct {
    xp_dense_unit unit;
    int64_t t_n, h_n, f_n, u_n;
    int at_input, at_hidden;
    double factor;          /* of all that this expert adds to y */
    const double *x, *dy;   /* [T,H] */
    double *y, *dx;         /* [T,H] sums over experts */
    double *chosen;         /* [T] slots that name this expert; 0: the token did not choose it */
    double *weight;         /* [T] of one slot */
    double *gain;           /* [T] gradient of the weight */
    double *pre, *act, *da; /* [T,U], [T,F], [T,F]; act with the weight that is there */
    double *wide, *sum;     /* [max(H,F)] */
} pass;

/* jump: rows of w1 from `half` on lie so many rows further down; 0 but where an expert's gate and up rows do. */
typedef struct {
    xp_tensor w1, w2, b1, b2, dw1, dw2, db1, db2;
    int64_t half, jump;
} weights;

static int64_t row_at(const weights *w, const xp_tensor *t, int64_t n) {
    return xp_dense_at(t, n + (w->jump && n >= w->half ? w->jump : 0), 0, 0, 0);
}

static double into(const pass *p, int64_t t) {
    return p->at_input ? p->weight[t] : 1;
}

static double out_of(const pass *p, int64_t t) {
    return p->factor * p->chosen[t] * (p->at_input || p->at_hidden ? 1 : p->weight[t]);
}

static double inside(const pass *p, int64_t t) {
    return p->at_hidden ? p->weight[t] : 1;
}

static double unit_at(const pass *p, int64_t t, int64_t f) {
    const int64_t up = xp_dense_up_at(p->unit.d, p->f_n, f);
    const double *row = p->pre + t * p->u_n;
    return xp_dense_unit_run(&p->unit, row[xp_dense_gate_at(p->unit.d, f)], up < 0 ? 0 : row[up]);
}

static double bias_at(const xp_tensor *b, int64_t i) {
    return b->data ? xp_dense_get(b, xp_dense_at(b, i, 0, 0, 0)) : 0;
}

static void pass_hidden(const pass *p, const weights *w) {
    for (int64_t n = 0; n < p->u_n; n++) {
        xp_dense_read(&w->w1, row_at(w, &w->w1, n), p->h_n, p->wide);
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] != 0)
                p->pre[t * p->u_n + n] =
                    into(p, t) * xp_dense_dot(p->x + t * p->h_n, p->wide, p->h_n) + bias_at(&w->b1, n);
        }
    }
    for (int64_t i = 0; i < p->t_n * p->f_n; i++) {
        const int64_t t = i / p->f_n;
        p->da[i] = 0;
        p->act[i] = p->chosen[t] == 0 ? 0 : unit_at(p, t, i % p->f_n) * inside(p, t);
    }
}

/* y += C E(x), da = W2^T dy and gain, all through one reading of W2. */
static void pass_forward(const pass *p, const weights *w) {
    pass_hidden(p, w);
    memset(p->gain, 0, (size_t)p->t_n * sizeof *p->gain);
    for (int64_t h = 0; h < p->h_n; h++) {
        const double bias = bias_at(&w->b2, h);
        xp_dense_read(&w->w2, xp_dense_at(&w->w2, h, 0, 0, 0), p->f_n, p->wide);
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] == 0)
                continue;
            const double dy = p->dy[t * p->h_n + h];
            p->y[t * p->h_n + h] += out_of(p, t) * (xp_dense_dot(p->act + t * p->f_n, p->wide, p->f_n) + bias);
            p->gain[t] += dy * bias;
            xp_dense_axpy(dy, p->wide, p->f_n, p->da + t * p->f_n);
        }
    }
}

/* gain; then pre becomes its own gradient. */
static void pass_gate_back(const pass *p) {
    for (int64_t t = 0; t < p->t_n; t++) {
        double *row = p->pre + t * p->u_n, none = 0;
        if (p->chosen[t] == 0)
            continue;
        for (int64_t f = 0; f < p->f_n; f++)
            p->gain[t] += p->da[t * p->f_n + f] * (p->at_hidden ? unit_at(p, t, f) : p->act[t * p->f_n + f]);
        p->gain[t] *= p->at_input ? 0 : p->factor * p->chosen[t];
        for (int64_t f = 0; f < p->f_n; f++) {
            const int64_t up = xp_dense_up_at(p->unit.d, p->f_n, f);
            xp_dense_unit_back(&p->unit, out_of(p, t) * p->da[t * p->f_n + f] * inside(p, t),
                               row + xp_dense_gate_at(p->unit.d, f), up < 0 ? &none : row + up);
        }
    }
}

/* dw1, db1 row by row, dx, and the gain of weights at the input. */
static void pass_in_back(const pass *p, const weights *w) {
    for (int64_t n = 0; n < p->u_n; n++) {
        double bias = 0;
        xp_dense_read(&w->w1, row_at(w, &w->w1, n), p->h_n, p->wide);
        memset(p->sum, 0, (size_t)p->h_n * sizeof(double));
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] == 0)
                continue;
            const double d = p->pre[t * p->u_n + n], *x = p->x + t * p->h_n;
            xp_dense_axpy(into(p, t) * d, x, p->h_n, p->sum);
            xp_dense_axpy(into(p, t) * d, p->wide, p->h_n, p->dx + t * p->h_n);
            bias += d;
            p->gain[t] += p->at_input ? d * xp_dense_dot(x, p->wide, p->h_n) : 0;
        }
        xp_dense_write(&w->dw1, row_at(w, &w->dw1, n), p->h_n, p->sum);
        if (w->db1.data)
            xp_dense_put(&w->db1, xp_dense_at(&w->db1, n, 0, 0, 0), bias);
    }
}

static void pass_out_back(const pass *p, const weights *w) {
    for (int64_t h = 0; h < p->h_n; h++) {
        double bias = 0;
        memset(p->sum, 0, (size_t)p->f_n * sizeof(double));
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] == 0)
                continue;
            const double d = out_of(p, t) * p->dy[t * p->h_n + h];
            xp_dense_axpy(d, p->act + t * p->f_n, p->f_n, p->sum);
            bias += d;
        }
        xp_dense_write(&w->dw2, xp_dense_at(&w->dw2, h, 0, 0, 0), p->f_n, p->sum);
        if (w->db2.data)
            xp_dense_put(&w->db2, xp_dense_at(&w->db2, h, 0, 0, 0), bias);
    }
}

static void pass_run(const pass *p, const weights *w) {
    pass_forward(p, w);
    pass_gate_back(p);
    pass_in_back(p, w);
    pass_out_back(p, w);
}

/* ---- the block ---- */

/* The whole block's buffers. l takes the raw logits, then their gradient in place; s the scores, w the weight of one
 * slot, n the slots, held those of them that the expert takes, kept 0 where masked_weight makes a score 0, g the
 * gradient of w. */
typedef struct {
    const xp_moe_args *a;
    const xp_dialect *d;
    int64_t t_n, h_n, z_n, e_n, f_n, u_n, s_n, x_n;
    double factor, share;                          /* of the routed and of the shared experts in y */
    double *x, *dy, *y, *dx;                       /* [T,H] */
    double *raw, *l, *s, *kept, *n, *held, *w, *g; /* [T,Z] */
    double *row, *key, *gone;                      /* [max(H,Z)], [Z], [Z] */
    pass p;
} block;

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static void sizes(const xp_moe_args *a, block *b) {
    memset(b, 0, sizeof *b);
    b->a = a;
    b->d = a->dialect;
    b->t_n = a->x.dim[0];
    b->h_n = a->x.dim[1];
    b->z_n = a->wr.dim[0];
    b->e_n = a->w1.dim[0];
    b->u_n = a->w1.dim[1];
    b->f_n = a->w2.dim[2];
    b->s_n = a->sw2.data ? a->sw2.dim[1] : 0;
    b->x_n = a->sw2.data ? a->sw1.dim[0] : 0;
    b->share = a->sw2.data && b->d->shared_combine == XP_COMBINE_AVERAGE ? 0.5 : 1;
    b->factor = b->share * xp_dialect_output_factor(b->d, a->idx.dim[1]);
}

typedef struct {
    double **at;
    int64_t n;
} room;
enum { ROOMS = 23 };

static void rooms(block *b, room out[ROOMS]) {
    const int64_t th = b->t_n * b->h_n, tz = b->t_n * b->z_n, f = larger(b->f_n, b->s_n);
    const room all[ROOMS] = {{&b->x, th},
                             {&b->dy, th},
                             {&b->y, th},
                             {&b->dx, th},
                             {&b->raw, tz},
                             {&b->l, tz},
                             {&b->s, tz},
                             {&b->kept, tz},
                             {&b->n, tz},
                             {&b->held, tz},
                             {&b->w, tz},
                             {&b->g, tz},
                             {&b->row, larger(b->h_n, b->z_n)},
                             {&b->key, b->z_n},
                             {&b->gone, b->z_n},
                             {&b->p.chosen, b->t_n},
                             {&b->p.weight, b->t_n},
                             {&b->p.gain, b->t_n},
                             {&b->p.pre, b->t_n * larger(b->u_n, b->x_n)},
                             {&b->p.act, b->t_n * f},
                             {&b->p.da, b->t_n * f},
                             {&b->p.wide, larger(b->h_n, f)},
                             {&b->p.sum, larger(b->h_n, f)}};
    memcpy(out, all, sizeof all);
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    block b;
    room r[ROOMS];
    size_t bytes = 0;
    sizes(args, &b);
    rooms(&b, r);
    for (int i = 0; i < ROOMS; i++)
        bytes += xp_dense_room(r[i].n, sizeof(double));
    return bytes;
}

static void carve(block *b, char *ws) {
    room r[ROOMS];
    rooms(b, r);
    for (int i = 0; i < ROOMS; i++) {
        *r[i].at = xp_dense_carve(&ws, r[i].n, sizeof(double));
        memset(*r[i].at, 0, (size_t)r[i].n * sizeof(double));
    }
    b->p.unit = (xp_dense_unit){.d = b->d, .r = XP_F64, .limit = b->d->limit};
    b->p.t_n = b->t_n;
    b->p.h_n = b->h_n;
    b->p.f_n = b->f_n;
    b->p.u_n = b->u_n;
    b->p.at_input = b->d->weight_at == XP_AT_INPUT;
    b->p.factor = b->factor;
    b->p.x = b->x;
    b->p.dy = b->dy;
    b->p.y = b->y;
    b->p.dx = b->dx;
}

/* ---- router ---- */

/* -1: the slot is empty. */
static int64_t slot_of(const block *b, int64_t t, int64_t k) {
    return xp_dense_int(&b->a->idx, xp_dense_at(&b->a->idx, t, k, 0, 0));
}

/* What multiplies an expert's share of its token: f of the text above. */
static double multiplier(const block *b, int64_t e) {
    const double scale = xp_dialect_weight_factor(b->d, b->a->idx.dim[1]);
    return b->d->expert_scale ? scale * bias_at(&b->a->scale_e, b->d->expert_scale == XP_FACTOR_ONE ? 0 : e) : scale;
}

/* Slot by slot, each softmax over what the slots before it left: weights, or with back the gradient of l in row. */
static void sparse_slots(const block *b, int64_t t, int back) {
    const int64_t z_n = b->z_n;
    double *p = b->key;
    memset(b->gone, 0, (size_t)z_n * sizeof *b->gone);
    for (int64_t k = 0; k < b->a->idx.dim[1]; k++) {
        const int64_t e = slot_of(b, t, k);
        if (e < 0)
            continue;
        xp_dense_sparse(b->d, XP_F64, b->l + t * z_n, b->gone, z_n, p);
        b->n[t * z_n + e] = 1; /* named again, its weight is 0 */
        b->w[t * z_n + e] += back ? 0 : p[e] * multiplier(b, e);
        b->gone[e] = 1;
        for (int64_t j = 0; j < z_n && back; j++)
            b->row[j] += multiplier(b, e) * b->g[t * z_n + e] * p[e] * ((j == e) - p[j]);
    }
}

static double slots_sum(const block *b, int64_t t) {
    double sum = 0;
    for (int64_t i = t * b->z_n; i < (t + 1) * b->z_n; i++)
        sum += b->n[i] != 0 ? b->n[i] * (b->kept[i] * b->s[i]) : 0;
    return sum;
}

/* A softmax over the chosen is one over all experts divided by the sum of the chosen. */
static int divides_by_sum(const xp_dialect *d) {
    return xp_dense_shares(d) || (d->score == XP_SCORE_SOFTMAX && d->renorm == XP_RENORM_SUM);
}

static double divisor(const block *b, int64_t t) {
    const double sum = slots_sum(b, t);
    return xp_dense_shares(b->d) ? sum : xp_dense_divisor(b->d, XP_F64, sum);
}

static void token_weights(const block *b, int64_t t) {
    const int64_t z_n = b->z_n;
    double *l = b->l + t * z_n, *s = b->s + t * z_n, *kept = b->kept + t * z_n;
    memcpy(l, b->raw + t * z_n, (size_t)z_n * sizeof *l);
    xp_dense_logits(b->d, z_n, l);
    if (b->d->score == XP_SCORE_SPARSEMIXER) {
        sparse_slots(b, t, 0);
        return;
    }
    for (int64_t k = 0; k < b->a->idx.dim[1]; k++) {
        if (slot_of(b, t, k) >= 0)
            b->n[t * z_n + slot_of(b, t, k)] += 1;
    }
    for (int64_t e = b->e_n; e < z_n && b->d->shared_rows > 0; e++)
        b->n[t * z_n + e] = 1;
    for (int64_t e = 0; e < z_n; e++) { /* of the others such a score knows nothing */
        const int among = !xp_dense_shares(b->d) || b->n[t * z_n + e] != 0;
        b->key[e] = among ? xp_dense_share_base(b->d, l[e]) : -HUGE_VAL;
    }
    if (xp_dense_shares(b->d))
        xp_dense_share_out(b->key, z_n, s);
    else
        xp_dense_scores(b->d, XP_F64, b->key, z_n, s);
    xp_dense_keys(b->d, l, s, &b->a->bias, z_n, b->gone, b->key, kept);
    for (int64_t e = 0; e < z_n && (!b->d->masked_weight || xp_dense_shares(b->d)); e++)
        kept[e] = 1;
    const double by = divisor(b, t);
    for (int64_t e = 0; e < z_n; e++)
        b->w[t * z_n + e] = b->n[t * z_n + e] != 0 ? multiplier(b, e) * (kept[e] * s[e] / by) : 0;
}

/* x, dy, logits and weights. */
static void prepare(const block *b) {
    const xp_moe_args *a = b->a;
    for (int64_t t = 0; t < b->t_n; t++) {
        xp_dense_read(&a->x, xp_dense_at(&a->x, t, 0, 0, 0), b->h_n, b->x + t * b->h_n);
        xp_dense_read(&a->dy, xp_dense_at(&a->dy, t, 0, 0, 0), b->h_n, b->dy + t * b->h_n);
    }
    xp_dense_map(b->x, b->t_n, &a->wr, b->raw, b->row);
    for (int64_t i = 0; i < b->t_n * b->z_n; i++)
        b->raw[i] += bias_at(&a->rbias, i % b->z_n);
    for (int64_t t = 0; t < b->t_n; t++)
        token_weights(b, t);
}

/* g turns from the gradient of w into that of s or, where that has a form of its own, of l; into row. */
static void through_weights(const block *b, int64_t t) {
    const int64_t z_n = b->z_n;
    const double *n = b->n + t * z_n, *s = b->s + t * z_n, *g = b->g + t * z_n;
    const double sum = slots_sum(b, t), by = divisor(b, t), slope = xp_dense_divisor_slope(b->d, sum);
    double along = 0;
    for (int64_t e = 0; e < z_n; e++) /* not g w: a multiplier near 0 leaves w few bits */
        along += n[e] != 0 ? g[e] * multiplier(b, e) * (b->kept[t * z_n + e] * s[e] / by) : 0;
    for (int64_t j = 0; j < z_n; j++) {
        const double gj = n[j] != 0 ? g[j] * multiplier(b, j) : 0, kept = b->kept[t * z_n + j];
        if (n[j] == 0)
            b->row[j] = 0;
        else if (divides_by_sum(b->d))
            b->row[j] = kept * s[j] / by * (gj - n[j] * along);
        else
            b->row[j] = kept * (gj - slope * n[j] * along) / by;
    }
}

/* row: from the gradient of s to that of l. */
static void through_scores(const block *b, int64_t t) {
    const double *s = b->s + t * b->z_n, *l = b->l + t * b->z_n;
    const double mean = xp_dense_dot(b->row, s, b->z_n);
    for (int64_t j = 0; j < b->z_n; j++) {
        if (b->d->score == XP_SCORE_SOFTMAX)
            b->row[j] = s[j] * (b->row[j] - mean);
        else if (b->row[j] != 0)
            b->row[j] *= xp_dense_score_slope(b->d, l[j], s[j]);
    }
}

/* Of what shares are a softmax of, by l. */
static double own_slope(const block *b, int64_t t, int64_t j) {
    return xp_dense_shares(b->d) ? xp_dense_share_slope(b->d, b->l[t * b->z_n + j]) : 1;
}

/* raw turns from the logits into their gradient; then dwr, drbias and the router's part of dx. */
static void router_back(const block *b) {
    const xp_moe_args *a = b->a;
    const int64_t z_n = b->z_n;
    for (int64_t t = 0; t < b->t_n; t++) {
        memset(b->row, 0, (size_t)z_n * sizeof *b->row);
        if (b->d->score == XP_SCORE_SPARSEMIXER) {
            sparse_slots(b, t, 1);
        } else {
            through_weights(b, t);
            if (!divides_by_sum(b->d))
                through_scores(b, t);
        }
        for (int64_t j = 0; j < z_n; j++)
            b->raw[t * z_n + j] =
                b->row[j] == 0 ? 0 : b->row[j] * own_slope(b, t, j) * xp_dense_logit_slope(b->d, b->raw[t * z_n + j]);
    }
    xp_dense_map_back(b->raw, b->t_n, &a->wr, b->dx, b->row);
    for (int64_t e = 0; e < z_n; e++) {
        double sum = 0;
        memset(b->row, 0, (size_t)b->h_n * sizeof *b->row);
        for (int64_t t = 0; t < b->t_n; t++) {
            xp_dense_axpy(b->raw[t * z_n + e], b->x + t * b->h_n, b->h_n, b->row);
            sum += b->raw[t * z_n + e];
        }
        xp_dense_write(&a->dwr, xp_dense_at(&a->dwr, e, 0, 0, 0), b->h_n, b->row);
        if (a->drbias.data)
            xp_dense_put(&a->drbias, xp_dense_at(&a->drbias, e, 0, 0, 0), sum);
    }
}

/* ---- experts ---- */

/* Without a capacity an expert takes all slots. */
static void take_slots(const block *b) {
    const xp_moe_args *a = b->a;
    const xp_capacity_args all = {
        .idx = a->idx, .dropped = {.ndim = 1, .dim = {b->e_n}}, .dialect = b->d}; /* overflow never priority here */
    if (!xp_dialect_limits(b->d)) {
        memcpy(b->held, b->n, (size_t)(b->t_n * b->z_n) * sizeof *b->held);
        return;
    }
    for (int64_t t = 0; t < b->t_n; t++) {
        for (int64_t k = 0; k < a->idx.dim[1]; k++) {
            if (slot_of(b, t, k) >= 0)
                b->held[t * b->z_n + slot_of(b, t, k)] += xp_dense_capacity_keeps(&all, t, k);
        }
    }
}

static xp_tensor plane(const xp_tensor *t, int64_t e) {
    return t->data ? xp_dense_plane(t, e) : (xp_tensor){.data = NULL};
}

static void experts(const block *b) {
    const xp_moe_args *a = b->a;
    for (int64_t e = 0; e < b->e_n; e++) {
        const weights w = {.w1 = plane(&a->w1, e),
                           .w2 = plane(&a->w2, e),
                           .b1 = plane(&a->b1, e),
                           .b2 = plane(&a->b2, e),
                           .dw1 = plane(&a->dw1, e),
                           .dw2 = plane(&a->dw2, e),
                           .db1 = plane(&a->db1, e),
                           .db2 = plane(&a->db2, e)};
        for (int64_t t = 0; t < b->t_n; t++) {
            b->p.chosen[t] = b->held[t * b->z_n + e];
            b->p.weight[t] = b->w[t * b->z_n + e];
        }
        pass_run(&b->p, &w);
        for (int64_t t = 0; t < b->t_n; t++)
            b->g[t * b->z_n + e] = b->p.chosen[t] != 0 ? b->p.gain[t] : 0;
    }
}

/* E(x) = x, or nothing. */
static void null_experts(const block *b) {
    const int some = b->d->null_experts > 0 && b->d->null_kind == XP_NULL_IDENTITY;
    for (int64_t i = 0; i < b->t_n * b->z_n && some; i++) {
        const int64_t t = i / b->z_n;
        if (i % b->z_n < b->e_n || b->n[i] == 0)
            continue;
        const double *x = b->x + t * b->h_n, *dy = b->dy + t * b->h_n;
        xp_dense_axpy(b->factor * b->n[i] * b->w[i], x, b->h_n, b->y + t * b->h_n);
        xp_dense_axpy(b->factor * b->n[i] * b->w[i], dy, b->h_n, b->dx + t * b->h_n);
        b->g[i] = b->factor * b->n[i] * xp_dense_dot(dy, x, b->h_n);
    }
}

static xp_tensor rows_from(const xp_tensor *t, int64_t row, int64_t column) {
    xp_tensor out = *t;
    out.data = (char *)out.data + xp_dtype_bytes(out.dtype, xp_dense_at(t, row, column, 0, 0));
    return out;
}

/* One expert after another, each with the weight that the router gave it: behind the activation, which is before the
 * second matrix. */
static void weighed_experts(block *b) {
    const xp_moe_args *a = b->a;
    const int64_t n = b->d->shared_rows, width = b->s_n / n, rows = b->x_n / n;
    const int apart = b->d->gated && b->d->gate_layout == XP_GATE_CONCAT;
    pass p = b->p;
    p.f_n = width;
    p.u_n = rows;
    p.at_input = 0;
    p.at_hidden = 1;
    p.factor = b->share;
    p.unit.limit = xp_dialect_shared_limit(b->d);
    for (int64_t j = 0; j < n; j++) {
        const int64_t first = j * (apart ? width : rows), row = b->e_n + j;
        const weights w = {.w1 = rows_from(&a->sw1, first, 0),
                           .w2 = rows_from(&a->sw2, 0, j * width),
                           .dw1 = rows_from(&a->dsw1, first, 0),
                           .dw2 = rows_from(&a->dsw2, 0, j * width),
                           .half = width,
                           .jump = apart ? b->s_n - width : 0};
        for (int64_t t = 0; t < b->t_n; t++) {
            p.chosen[t] = 1;
            p.weight[t] = b->w[t * b->z_n + row];
        }
        pass_run(&p, &w);
        for (int64_t t = 0; t < b->t_n; t++)
            b->g[t * b->z_n + row] = p.gain[t];
    }
}

static void shared_expert(block *b) {
    const xp_moe_args *a = b->a;
    const weights w = {.w1 = a->sw1, .w2 = a->sw2, .dw1 = a->dsw1, .dw2 = a->dsw2};
    pass p = b->p;
    p.f_n = b->s_n;
    p.u_n = b->x_n;
    p.at_input = 0;
    p.factor = b->share;
    p.unit.limit = xp_dialect_shared_limit(b->d);
    if (a->sgate.data)
        xp_dense_read(&a->sgate, 0, b->h_n, b->row);
    for (int64_t t = 0; t < b->t_n; t++) {
        p.chosen[t] = 1;
        p.weight[t] = a->sgate.data ? xp_dense_sigmoid(xp_dense_dot(b->x + t * b->h_n, b->row, b->h_n)) : 1;
    }
    pass_run(&p, &w);
    if (!a->sgate.data)
        return;
    memset(p.sum, 0, (size_t)b->h_n * sizeof *p.sum);
    for (int64_t t = 0; t < b->t_n; t++) {
        const double dz = p.gain[t] * p.weight[t] * (1 - p.weight[t]);
        xp_dense_axpy(dz, b->row, b->h_n, b->dx + t * b->h_n);
        xp_dense_axpy(dz, b->x + t * b->h_n, b->h_n, p.sum);
    }
    xp_dense_write(&a->dsgate, 0, b->h_n, p.sum);
}

static const char *why_not(const void *args, const xp_mesh *m) {
    (void)m;
    const xp_dialect *d = ((const xp_moe_args *)args)->dialect;
    const char *why = xp_dense_route_why_not(d);
    why = why ? why : xp_dense_mlp_why_not(d);
    if (why)
        return why;
    const int by_slots = d->score == XP_SCORE_SPARSEMIXER || d->score == XP_SCORE_SOFTMAX_TOPK;
    if (by_slots && d->renorm != XP_RENORM_NONE)
        return "no division after the sparsemixer or a softmax over the chosen";
    if (d->score == XP_SCORE_SPARSEMIXER && xp_dialect_limits(d))
        return "no sparsemixer with a capacity";
    if (d->weight_at == XP_AT_INPUT && d->score == XP_SCORE_SPARSEMIXER)
        return "no sparsemixer with weights at the experts' input";
    return d->weight_at == XP_AT_INPUT && d->null_experts > 0 && d->null_kind == XP_NULL_IDENTITY
               ? "no identity experts with weights at the experts' input"
               : NULL;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_moe_args *a = args;
    block b;
    sizes(a, &b);
    carve(&b, x->ws);
    prepare(&b);
    take_slots(&b);
    experts(&b);
    null_experts(&b);
    if (b.d->shared_rows > 0)
        weighed_experts(&b);
    else if (a->sw2.data)
        shared_expert(&b);
    router_back(&b);
    for (int64_t t = 0; t < b.t_n; t++) {
        xp_dense_write(&a->y, xp_dense_at(&a->y, t, 0, 0, 0), b.h_n, b.y + t * b.h_n);
        xp_dense_write(&a->dx, xp_dense_at(&a->dx, t, 0, 0, 0), b.h_n, b.dx + t * b.h_n);
    }
    return XP_OK;
}

const xp_kernel xp_dense_moe = {
    .stage = &xp_stage_moe,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .why_not = why_not,
    .workspace = workspace,
    .run = run,
};
