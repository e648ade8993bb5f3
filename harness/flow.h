/* What the files of the step share: the flow of one rank (sizes, dtypes, blocks), its parameters, and the layers.
 * Only step.c, layer.c and params.c include this. */
#ifndef XP_FLOW_H
#define XP_FLOW_H

#include "step.h"

/* Plan indices of one layer's parameters; -1 where the model has none. */
typedef struct {
    int norm, router, rbias, scale, down, up, w1, b1, w2, b2, sw1, sw2, sgate;
    int mlp[XP_ROUTER_MLP_WEIGHTS];                       /* of the router, from XP_W_ROUTER_DOWN on */
    int lnorm, enorm, obias, bnorm, ynorm, snorm, sinorm; /* what is around the experts: XP_LATENT_NORM ... */
} layer_params;

/* What a layer's forward leaves for its backward. */
typedef struct {
    xp_tensor h, xn, rstd, logits, scores, idx, w;
    xp_tensor rows, tok, src, pos, counts, offsets;
    xp_tensor recv, recv_tok, recv_counts, recv_offsets;
    xp_tensor pre, act, out, back, y;
    xp_tensor low, high; /* [T,D] the experts' input, [T,H] their output on the way out; absent without latent width */
    xp_tensor lown, lrstd;              /* the normed latent rows, with 1/rms */
    xp_tensor erstd;                    /* [C] of the experts' rows; out stays for the backward then */
    xp_tensor biased, bn, brstd;        /* [T,H] the sum with its bias, normed; 1/rms */
    xp_tensor yn, ynrstd, syn, synrstd; /* [T,H] the routed and the shared output, normed before they are summed */
    xp_tensor sin, sinrstd;             /* [T,H] what the shared expert reads, where that is not xn */
    xp_tensor gin, gnrstd;              /* [T,H] the router's own norm over sqrt(H); 1/rms */
    xp_tensor spre, sact, smlp, ssig, sy, sum;
    xp_tensor gamma;                /* [T,A] the router's weights of shared experts; absent where it has none */
    xp_tensor state, mnorm, mrstd;  /* [T,R] the router's state; its normed rows and [T] 1/rms */
    xp_tensor fc1, act1, fc2, act2; /* [T,R] the maps of the router's MLP, before and after the gelu */
    xp_tensor kept;                 /* idx, or with a capacity what is left of it */
    xp_tensor cbias, table;         /* [Z], [V,K]: of the router, neither trained nor sharded */
} layer_state;

typedef struct {
    xp_tensor full;          /* gathered, [G,R0,N] in its compute dtype; data NULL when not gathered */
    xp_tensor shard;         /* a view into the flat master buffer, [G,R,N]; data NULL in XP_RUN_GRADS */
    int64_t *start, *rows;   /* [P] of the gather's axis */
    int64_t *gstart, *grows; /* [P] of the reduction's axis */
} param_state;

typedef struct {
    xp_rank *r;
    const xp_plan *plan;
    const xp_step_source *src;
    int64_t T, token0,
        N;     /* this rank's tokens of a micro-batch, the first one's number in the global batch, that batch */
    int micro; /* the micro-batch under way, from 0 */
    int64_t H, F, E, K, S, L, Y, V;
    int64_t R;        /* width of the router's MLP, 0: none */
    xp_tensor dstate; /* [T,R] gradient of the state that the block behind took over; absent where none did */
    int64_t D;        /* width of the experts' rows: H, or the latent width */
    int64_t Z, U, X;  /* router rows; rows of an expert's and of the shared expert's first matrix */
    xp_dtype act, param, logits, weight, wide, grad;
    int64_t block;                 /* tokens a block, 0 outside deterministic mode */
    int efold;                     /* an expert's blocks are all on its rank: they are folded where they are made */
    xp_tensor blocks;              /* [B] numbers of the blocks of this rank's own tokens */
    xp_tensor eblocks;             /* [B] numbers of the blocks whose rows this rank's experts may get */
    xp_tensor nblocks;             /* [B*L] numbers of the sums of the norm of experts' rows: block * E + expert */
    xp_tensor own_tok;             /* [T] global token numbers */
    xp_tensor ones;                /* [rows,1] of 1: a bias's gradient is the weight gradient of this input */
    xp_tensor token;               /* [T] i32 token ids */
    xp_tensor first;               /* [T] i32 of 0: the row of a bias, as a table of one; absent without one */
    xp_tensor own_span;            /* [2] i64: 0, T - the one group of a dense weight gradient */
    int64_t M, C;                  /* rows that there is memory for */
    xp_tensor all_logits, all_idx; /* [Y,T,Z], [Y,T,K]; the balance losses see the first layers of both, and */
    xp_tensor daux;                /* [balanced,T,Z] is their gradient */
    int *place;                    /* [Y] where a layer lies in these: those that the balance losses see come first */
    xp_tensor count;               /* [1] i64: valid tokens in the world */
    double divisor;
    layer_params *lp;              /* [Y] */
    layer_state *ls;               /* [Y] */
    param_state *ps;               /* [params] */
    xp_plan_shard *shard;          /* [params] what this rank holds */
    int64_t elements;              /* of its flat buffers */
    xp_tensor master, m, v, gflat; /* flat f32 shards; absent in XP_RUN_GRADS and XP_RUN_LAYER */
    xp_tensor gbase;               /* what the micro-batches before left in gflat; absent with one micro-batch */
} xp_flow;

/* Memory of the rank; the rank's arena frees what an error leaves behind. */
xp_status flow_new1(xp_flow *f, xp_kind k, xp_dtype d, int64_t n0, xp_tensor *out);
xp_status flow_new2(xp_flow *f, xp_kind k, xp_dtype d, int64_t n0, int64_t n1, xp_tensor *out);
void flow_drop(xp_flow *f, xp_tensor *t);

/* params.c: generates, gathers, scatters. */
xp_status params_open(xp_flow *f);
void params_close(xp_flow *f);
xp_status params_gather(xp_flow *f, int i);
void params_release(xp_flow *f, int i);
/* The call that made a gradient: its output `operand`, for its error bound. */
typedef struct {
    const xp_stage *stage;
    const void *args;
    const char *operand;
} flow_made;
/* Scatters dw [B,gc,R0,N], the gradient of groups [g0, g0+gc) of parameter i, into its shard. */
xp_status params_scatter(xp_flow *f, int i, int64_t g0, const xp_tensor *dw, const flow_made *by);
/* The same for a vector's gradient, [B,R0]. */
xp_status params_scatter_vector(xp_flow *f, int i, const xp_tensor *dw, const flow_made *by);
/* The weight gradient of parameter i from dy [C,R0] and x [C,N] over the groups of offsets, scattered as it is made. */
xp_status params_wgrad(xp_flow *f, int i, const char *site, const xp_tensor *dy, const xp_tensor *x);
xp_status params_wgrad_experts(xp_flow *f, int i, const char *site, const xp_tensor *dy, const xp_tensor *x,
                               const xp_tensor *offsets, const xp_tensor *tok);
/* Flat borders and flags for the norm and the optimizer. */
xp_status params_segments(xp_flow *f, xp_tensor *out_seg, xp_tensor *out_owner, xp_tensor *out_decay);
/* A gathered parameter's [1,R0,N] as the matrix or vector that stages want. */
xp_tensor params_matrix(const xp_flow *f, int i);
xp_tensor params_vector(const xp_flow *f, int i);
xp_status params_digest(xp_flow *f, char out_hex[65]);

/* rows.c. The norm of rows of tokens by parameter i, with the model's eps: out like x and out_rstd [T], both new. */
xp_status rows_norm(xp_flow *f, const char *site, int i, const xp_tensor *x, xp_tensor *out, xp_tensor *out_rstd);
/* out: gradient of x, new; the weight's is scattered. */
xp_status rows_norm_back(xp_flow *f, const char *site, int i, const xp_tensor *dy, const xp_tensor *x,
                         const xp_tensor *rstd, xp_tensor *out);
/* out [T,R0] = r(x W^T + b), new: the router's arithmetic. bias: a parameter, -1 for none. */
xp_status rows_map(xp_flow *f, const char *site, int i, int bias, const xp_tensor *x, xp_tensor *out);
/* out: gradient of x, new; the matrix's is made at wsite and scattered, the bias's is not. */
xp_status rows_map_back(xp_flow *f, const char *site, const char *wsite, int i, const xp_tensor *dy, const xp_tensor *x,
                        xp_tensor *out);

/* layer.c. Rows that every expert of block y has, pads among them: of this rank's tokens, or with of_group of the ep
 * group's; 0 where experts are not padded to their capacity. */
int64_t layer_least(const xp_flow *f, int y, int of_group);
/* h [T,H] belongs to the caller and must live until the backward; out is new. */
xp_status layer_forward(xp_flow *f, int y, const xp_tensor *h, xp_tensor *out);
/* dh: gradient of the layer's output, [T,H]; out: of its input, new. */
xp_status layer_backward(xp_flow *f, int y, const xp_tensor *dh, xp_tensor *out);
/* router_mlp.c. What the router's matrix multiplies, from the block's normed rows: [T,R] of ls[y]. */
xp_status router_mlp_forward(xp_flow *f, int y);
/* da: gradient of that; out: of the normed rows, new. Takes f->dstate and leaves the next one. */
xp_status router_mlp_backward(xp_flow *f, int y, const xp_tensor *da, xp_tensor *out);
void router_mlp_drop(xp_flow *f, int y);
/* The rows of a tensor of tokens go to the parity store, when there is one. */
xp_status flow_trace(xp_flow *f, const char *site, int y, const xp_tensor *t);

#endif
