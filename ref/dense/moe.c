/* Second formulation of stage moe: y[t] = sum over every expert e of W[t][e] E_e(x[t]), with a [T,E] matrix of weights
 * that is zero where a token did not choose the expert; no slots, no permutation, no rows that travel.
 *
 * Gradients of <dy, y> on that form. With a[t] = W2^T dy[t] and h[t] the hidden row of expert e:
 *   G[t][e] = d<dy,y>/dW[t][e] = <a[t], h[t]>: the expert's output is not needed again;
 *   dW2 = sum_t W[t][e] dy[t] (x) h[t];  dh[t] = W[t][e] a[t];  dW1 and dx from dh through the gate.
 * Renormalised weights V[t][e] are a softmax over the chosen experts alone, so dV_e / dl_j = V_e (delta_ej - V_j);
 * weights as they are give V_e (delta_ej - P_j). The shared expert is one more expert that all tokens chose, with
 * weight sigmoid(x . v). Nothing is rounded between x and the outputs. */
#include <string.h>

#include "dense.h"
#include "num.h"

/* One expert over all tokens. */
typedef struct {
    int64_t t_n, h_n, f_n;
    const double *x, *dy;   /* [T,H] */
    double *y, *dx;         /* [T,H] sums over experts */
    double *chosen;         /* [T] 0: the token did not choose this expert */
    double *weight;         /* [T] */
    double *gain;           /* [T] gradient of the weight */
    double *pre, *act, *da; /* [T,2F], [T,F], [T,F] */
    double *wide, *sum;     /* [max(H,F)] */
} pass;

/* y += weight * E(x), and da = W2^T dy, both through one reading of W2. */
static void pass_forward(const pass *p, const xp_tensor *w1, const xp_tensor *w2) {
    for (int64_t n = 0; n < 2 * p->f_n; n++) {
        xp_dense_read(w1, xp_dense_at(w1, n, 0, 0, 0), p->h_n, p->wide);
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] != 0)
                p->pre[t * 2 * p->f_n + n] = xp_dense_dot(p->x + t * p->h_n, p->wide, p->h_n);
        }
    }
    for (int64_t t = 0; t < p->t_n; t++) {
        const double *g = p->pre + t * 2 * p->f_n, *u = g + p->f_n;
        for (int64_t f = 0; f < p->f_n; f++) {
            p->act[t * p->f_n + f] = p->chosen[t] != 0 ? u[f] * (g[f] * xp_dense_sigmoid(g[f])) : 0;
            p->da[t * p->f_n + f] = 0;
        }
    }
    for (int64_t h = 0; h < p->h_n; h++) {
        xp_dense_read(w2, xp_dense_at(w2, h, 0, 0, 0), p->f_n, p->wide);
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] == 0)
                continue;
            p->y[t * p->h_n + h] += p->weight[t] * xp_dense_dot(p->act + t * p->f_n, p->wide, p->f_n);
            xp_dense_axpy(p->dy[t * p->h_n + h], p->wide, p->f_n, p->da + t * p->f_n);
        }
    }
}

/* gain; then pre becomes its own gradient. */
static void pass_gate_back(const pass *p) {
    for (int64_t t = 0; t < p->t_n; t++) {
        double *g = p->pre + t * 2 * p->f_n, *u = g + p->f_n, *a = p->da + t * p->f_n;
        p->gain[t] = 0;
        if (p->chosen[t] == 0)
            continue;
        p->gain[t] = xp_dense_dot(a, p->act + t * p->f_n, p->f_n);
        for (int64_t f = 0; f < p->f_n; f++) {
            const double dh = p->weight[t] * a[f], s = xp_dense_sigmoid(g[f]);
            const double du = dh * g[f] * s;
            g[f] = dh * u[f] * (s + g[f] * (s * xp_dense_sigmoid(-g[f])));
            u[f] = du;
        }
    }
}

/* dw1, dw2 row by row, and dx. */
static void pass_weights_back(const pass *p, const xp_tensor *w1, const xp_tensor *dw1, const xp_tensor *dw2) {
    for (int64_t n = 0; n < 2 * p->f_n; n++) {
        xp_dense_read(w1, xp_dense_at(w1, n, 0, 0, 0), p->h_n, p->wide);
        memset(p->sum, 0, (size_t)p->h_n * sizeof(double));
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] == 0)
                continue;
            const double d = p->pre[t * 2 * p->f_n + n];
            xp_dense_axpy(d, p->x + t * p->h_n, p->h_n, p->sum);
            xp_dense_axpy(d, p->wide, p->h_n, p->dx + t * p->h_n);
        }
        xp_dense_write(dw1, xp_dense_at(dw1, n, 0, 0, 0), p->h_n, p->sum);
    }
    for (int64_t h = 0; h < p->h_n; h++) {
        memset(p->sum, 0, (size_t)p->f_n * sizeof(double));
        for (int64_t t = 0; t < p->t_n; t++) {
            if (p->chosen[t] != 0)
                xp_dense_axpy(p->weight[t] * p->dy[t * p->h_n + h], p->act + t * p->f_n, p->f_n, p->sum);
        }
        xp_dense_write(dw2, xp_dense_at(dw2, h, 0, 0, 0), p->f_n, p->sum);
    }
}

static void pass_run(const pass *p, const xp_tensor *w1, const xp_tensor *w2, const xp_tensor *dw1,
                     const xp_tensor *dw2) {
    pass_forward(p, w1, w2);
    pass_gate_back(p);
    pass_weights_back(p, w1, dw1, dw2);
}

/* The whole block's buffers. slots [T,E] counts a token's slots for an expert, prob and w are P and V; g takes G, then
 * the gradient of the logits in place. */
typedef struct {
    const xp_moe_args *a;
    int64_t t_n, h_n, e_n, f_n, s_n;
    double *x, *dy, *y, *dx;      /* [T,H] */
    double *slots, *prob, *w, *g; /* [T,E] */
    double *row;                  /* [max(H,E)] */
    pass p;
} block;

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static void sizes(const xp_moe_args *a, block *b) {
    memset(b, 0, sizeof *b);
    b->a = a;
    b->t_n = a->x.dim[0];
    b->h_n = a->x.dim[1];
    b->e_n = a->wr.dim[0];
    b->f_n = a->w2.dim[2];
    b->s_n = a->sw2.data ? a->sw2.dim[1] : 0;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)m;
    block b;
    sizes(args, &b);
    const int64_t f = larger(b.f_n, b.s_n);
    return 4 * xp_dense_room(b.t_n * b.h_n, sizeof(double)) + 4 * xp_dense_room(b.t_n * b.e_n, sizeof(double)) +
           xp_dense_room(larger(b.h_n, b.e_n), sizeof(double)) + 3 * xp_dense_room(b.t_n, sizeof(double)) +
           xp_dense_room(b.t_n * 2 * f, sizeof(double)) + 2 * xp_dense_room(b.t_n * f, sizeof(double)) +
           2 * xp_dense_room(larger(b.h_n, f), sizeof(double));
}

static double *zeros(char **ws, int64_t n) {
    double *v = xp_dense_carve(ws, n, sizeof *v);
    memset(v, 0, (size_t)n * sizeof *v);
    return v;
}

static void carve(block *b, char *ws) {
    const int64_t f = larger(b->f_n, b->s_n);
    b->x = zeros(&ws, b->t_n * b->h_n);
    b->dy = zeros(&ws, b->t_n * b->h_n);
    b->y = zeros(&ws, b->t_n * b->h_n);
    b->dx = zeros(&ws, b->t_n * b->h_n);
    b->slots = zeros(&ws, b->t_n * b->e_n);
    b->prob = zeros(&ws, b->t_n * b->e_n);
    b->w = zeros(&ws, b->t_n * b->e_n);
    b->g = zeros(&ws, b->t_n * b->e_n);
    b->row = zeros(&ws, larger(b->h_n, b->e_n));
    b->p = (pass){.t_n = b->t_n, .h_n = b->h_n, .f_n = b->f_n, .x = b->x, .dy = b->dy, .y = b->y, .dx = b->dx};
    b->p.chosen = zeros(&ws, b->t_n);
    b->p.weight = zeros(&ws, b->t_n);
    b->p.gain = zeros(&ws, b->t_n);
    b->p.pre = zeros(&ws, b->t_n * 2 * f);
    b->p.act = zeros(&ws, b->t_n * f);
    b->p.da = zeros(&ws, b->t_n * f);
    b->p.wide = zeros(&ws, larger(b->h_n, f));
    b->p.sum = zeros(&ws, larger(b->h_n, f));
}

/* x, dy, slots, P and V. */
static void prepare(const block *b) {
    const xp_moe_args *a = b->a;
    for (int64_t t = 0; t < b->t_n; t++) {
        xp_dense_read(&a->x, xp_dense_at(&a->x, t, 0, 0, 0), b->h_n, b->x + t * b->h_n);
        xp_dense_read(&a->dy, xp_dense_at(&a->dy, t, 0, 0, 0), b->h_n, b->dy + t * b->h_n);
        for (int64_t k = 0; k < a->idx.dim[1]; k++)
            b->slots[t * b->e_n + xp_dense_int(&a->idx, xp_dense_at(&a->idx, t, k, 0, 0))] += 1;
    }
    xp_dense_map(b->x, b->t_n, &a->wr, b->prob, b->row);
    for (int64_t t = 0; t < b->t_n; t++) {
        const double *n = b->slots + t * b->e_n;
        double *p = b->prob + t * b->e_n, *w = b->w + t * b->e_n;
        memcpy(b->row, p, (size_t)b->e_n * sizeof *p);
        xp_dense_score(b->row, b->e_n, p);
        const double sum = a->dialect->renorm == XP_RENORM_SUM ? xp_dense_dot(n, p, b->e_n) : 1;
        for (int64_t e = 0; e < b->e_n; e++)
            w[e] = n[e] != 0 ? n[e] * p[e] / sum : 0;
    }
}

static void experts(const block *b) {
    const xp_moe_args *a = b->a;
    for (int64_t e = 0; e < b->e_n; e++) {
        const xp_tensor w1 = xp_dense_plane(&a->w1, e), w2 = xp_dense_plane(&a->w2, e);
        const xp_tensor dw1 = xp_dense_plane(&a->dw1, e), dw2 = xp_dense_plane(&a->dw2, e);
        for (int64_t t = 0; t < b->t_n; t++) {
            b->p.chosen[t] = b->slots[t * b->e_n + e];
            b->p.weight[t] = a->dialect->scale * b->w[t * b->e_n + e];
        }
        pass_run(&b->p, &w1, &w2, &dw1, &dw2);
        for (int64_t t = 0; t < b->t_n; t++)
            b->g[t * b->e_n + e] = b->p.gain[t];
    }
}

/* g turns from the gradient of W into that of the logits; then dwr and the router's part of dx. */
static void router_back(const block *b) {
    const xp_moe_args *a = b->a;
    for (int64_t t = 0; t < b->t_n; t++) {
        const double *w = b->w + t * b->e_n, *out = a->dialect->renorm == XP_RENORM_SUM ? w : b->prob + t * b->e_n;
        double *g = b->g + t * b->e_n;
        for (int64_t j = 0; j < b->e_n; j++) {
            double d = 0;
            for (int64_t e = 0; e < b->e_n; e++)
                d += g[e] * (w[e] * ((e == j ? 1 : 0) - out[j]));
            b->row[j] = a->dialect->scale * d;
        }
        memcpy(g, b->row, (size_t)b->e_n * sizeof *g);
    }
    xp_dense_map_back(b->g, b->t_n, &a->wr, b->dx, b->row);
    for (int64_t e = 0; e < b->e_n; e++) {
        memset(b->row, 0, (size_t)b->h_n * sizeof *b->row);
        for (int64_t t = 0; t < b->t_n; t++)
            xp_dense_axpy(b->g[t * b->e_n + e], b->x + t * b->h_n, b->h_n, b->row);
        xp_dense_write(&a->dwr, xp_dense_at(&a->dwr, e, 0, 0, 0), b->h_n, b->row);
    }
}

static void shared_expert(block *b) {
    const xp_moe_args *a = b->a;
    pass p = b->p;
    p.f_n = b->s_n;
    if (a->sgate.data)
        xp_dense_read(&a->sgate, 0, b->h_n, b->row);
    for (int64_t t = 0; t < b->t_n; t++) {
        p.chosen[t] = 1;
        p.weight[t] = a->sgate.data ? xp_dense_sigmoid(xp_dense_dot(b->x + t * b->h_n, b->row, b->h_n)) : 1;
    }
    pass_run(&p, &a->sw1, &a->sw2, &a->dsw1, &a->dsw2);
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
    why = why ? why : xp_dense_sum_why_not(d);
    return why || d->shared_combine == XP_COMBINE_ADD ? why : "only a shared expert that is added";
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_moe_args *a = args;
    block b;
    sizes(a, &b);
    carve(&b, x->ws);
    prepare(&b);
    experts(&b);
    router_back(&b);
    if (a->sw2.data)
        shared_expert(&b);
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
