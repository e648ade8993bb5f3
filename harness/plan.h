/* The strategy: a pure function from model, mesh and options to what every rank holds, sends and computes.
 *
 * The step reads its shards, groups, token ranges and optimizer path from here; `plan` prints the same record, so that
 * what is printed is what runs. It must not look at the machine, the environment or any rank's state: all ranks derive
 * the same plan.
 *
 * The model of the step is embedding -> MoE blocks (x -> RMSNorm -> MoE -> + x) -> RMSNorm -> head; attention and
 * layers without experts are left out. A parameter is [G,R,N]: G groups (the experts, else 1), R rows, N columns; a
 * vector is [1,R,1]. Rows are cut as torch.chunk does: ceil(R/P) rows a place, the last places short or empty. */
#ifndef XP_PLAN_H
#define XP_PLAN_H

#include <jansson.h>
#include <stdio.h>

#include "mesh.h"
#include "model.h"
#include "rank.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    XP_TOKEN_BLOCK = 16, /* tokens of a block: what deterministic mode deals and folds */
    XP_GRAD_CHUNK =
        64 << 20 /* bytes that a rank's unsharded weight gradients are kept under, a few experts at a time */
};

typedef enum { XP_ADAMW = 0, XP_SGD } xp_optimizer;
/* flat: one fused pass over each rank's flat shard. The other two are torch's names for a loop over tensors and for
 * fused lists of tensors. */
typedef enum { XP_PATH_AUTO = 0, XP_PATH_FLAT, XP_PATH_FOR_LOOP, XP_PATH_FOREACH } xp_optim_path;

typedef struct {
    int64_t tokens;    /* of the global batch, >= 1 */
    int layers;        /* the model's first layers; 0: all */
    int shrink;        /* divides the widths; 1: as published */
    xp_dtype act;      /* activations: f32 bf16 f16 f64 */
    xp_dtype param;    /* of gathered parameters and compute: f32 bf16 f16 f64 */
    xp_dtype reduce;   /* of the gradient reduction: f32 bf16 f16; f64 when grad is f64 */
    xp_dtype grad;     /* of unsharded weight gradients: f32 bf16 f16 f64 */
    xp_dtype router;   /* of the router's softmax: f32; f64 when act is f64 (set so by the plan) */
    int deterministic; /* fold by global token block: the same bits on every mesh, unless full experts drop slots: each
                          rank counts its own tokens */
    xp_optimizer optimizer;
    xp_optim_path path;
    double lr, beta1, beta2, eps, weight_decay; /* of AdamW; lr and weight_decay of SGD too */
    double momentum;                            /* of SGD */
    double max_norm, clip_eps;
    double aux_coef, z_coef; /* NaN: the model's */
    uint64_t seed;
    xp_dtype shared;        /* of the shared expert's gathered parameters and compute: f32 bf16 f16 f64 */
    xp_dtype gate;          /* of the router's gathered weights: f32 bf16 f16 f64 */
    xp_dtype expert_reduce; /* of the experts' gradient reduction, as reduce. XP_NDTYPE in these three: param, param,
                               reduce (set so by the plan) */
    int average; /* 1: as FSDP2, gradients are divided by the world on the way into each reduction, in its dtype, and
                    after it by the tokens of an average rank; 0: once, after it, by all tokens */
    int micro;   /* micro-batches that the global batch is cut into: equal runs of tokens, one after another, whose
                    gradients are summed in the f32 shards before the one norm, clip and update. 1: none */
} xp_step_options;

/* tokens 512; act and param bf16, the rest f32; AdamW with torch's defaults (lr 1e-3, 0.9, 0.999, 1e-8, decay 0.01);
 * max_norm 1, clip_eps 1e-6; seed 1; one micro-batch. */
xp_step_options xp_step_defaults(void);

/* What a parameter is to the step. */
typedef enum {
    XP_W_EMBED = 0,   /* [V,H] */
    XP_W_NORM,        /* [H] of a block */
    XP_W_ROUTER,      /* [Z,H], Z = E and the null experts or shared rows */
    XP_W_ROUTER_BIAS, /* [Z] */
    XP_W_ROUTER_DOWN, /* [R,H] into the router's width R, where it has an MLP; its matrix is [Z,R] then */
    XP_W_ROUTER_DOWN_BIAS,
    XP_W_ROUTER_STATE, /* [R] factors of the state of the block before; the first block has none */
    XP_W_ROUTER_NORM,  /* [R]; [H] where router_in is rmsnorm_scaled */
    XP_W_ROUTER_FC1,   /* [R,R] */
    XP_W_ROUTER_FC1_BIAS,
    XP_W_ROUTER_FC2, /* [R,R] */
    XP_W_ROUTER_FC2_BIAS,
    XP_W_EXPERT_SCALE, /* [W], Z of them or one: factors of the experts' weights; f32 wherever it is used, f64 when act
                          is f64 */
    XP_W_LATENT_DOWN,  /* [D,H] into the experts' width D, where it is not H */
    XP_W_LATENT_UP,    /* [H,D] and back */
    XP_W_LATENT_NORM,  /* [D] of the rows that the experts read */
    XP_W_EXPERT_NORM,  /* [D] of the rows that all experts write: each rank's are those of its experts */
    XP_W_OUT_BIAS,     /* [H] added to the block's sum */
    XP_W_BLOCK_NORM,   /* [H] of that sum */
    XP_W_ROUTED_NORM,  /* [H] of what the experts add to it */
    XP_W_SHARED_NORM,  /* [H] of what the shared expert adds */
    XP_W_SHARED_IN_NORM, /* [H] of what the shared expert reads */
    XP_W_UP,             /* [E,2F,H] rows as the dialect lays them out; [E,F,H] without a gate */
    XP_W_UP_BIAS,        /* [E,2F] or [E,F] */
    XP_W_DOWN,           /* [E,H,F] */
    XP_W_DOWN_BIAS,      /* [E,H] */
    XP_W_SHARED_UP,      /* [2S,H] */
    XP_W_SHARED_DOWN,    /* [H,S] */
    XP_W_SHARED_GATE,    /* [1,H] */
    XP_W_FINAL_NORM,     /* [H] */
    XP_W_HEAD,           /* [V,H] */
    XP_NWEIGHT
} xp_weight;
enum { XP_ROUTER_MLP_WEIGHTS = XP_W_ROUTER_FC2_BIAS + 1 - XP_W_ROUTER_DOWN };

typedef struct {
    char name[80]; /* as transformers has it in memory: "model.layers.0.mlp.experts.gate_up_proj" */
    xp_weight weight;
    int block;        /* which of the plan's blocks, from 0; -1 outside them */
    int ndim;         /* of the named tensor: 1, 2 or 3 */
    int64_t shape[3]; /* its sizes */
    int64_t G, R, N;
    int expert; /* 1: groups split over ep, rows over ep_fsdp, copies over ep_dp; 0: rows over fsdp, copies over dp */
    xp_axis gather;   /* XP_FSDP or XP_EP_FSDP: over which the rows are gathered */
    xp_axis reduce;   /* XP_WORLD or XP_EDP: over which the gradient is summed */
    int decay;        /* 1: weight decay applies (two dimensions and more) */
    double mean, std; /* of the seeded initial values */
} xp_plan_param;

/* What one rank holds of one parameter. */
typedef struct {
    int64_t g0, groups; /* groups [g0, g0+groups) */
    int64_t r0, rows;   /* of each of them, rows [r0, r0+rows) */
    int64_t offset;     /* of the first element in the rank's flat f32 buffer */
    int64_t count;      /* groups * rows * N */
    int owner;          /* 1: place 0 on every axis of copies: this rank counts it in the norm and in the digest */
} xp_plan_shard;

/* What one rank holds, sends and computes in one step. bytes[] is by XP_KIND_*:
 *   PARAM   f32 shards, and every parameter of the rank gathered in param dtype;
 *   GRAD    f32 shards, and the largest chunk of unsharded gradients (deterministic: of their block partials);
 *   OPTIM   f32 moments;
 *   ACT     what the forward keeps for the backward, all blocks, and the larger of what the top of the model and the
 *           backward of one block need beside it. Expert rows are held at capacity: all rows of the ep group;
 *   BUFFER  token numbers, row tables, segment borders. Not the workspace that kernel rows ask for, which is the
 *           backend's choice, nor the whole parameters that the digest gathers.
 * Rows sent and FLOPs take routing as balanced: an expert gets tokens * K / E rows of its ep group,
 * or with a capacity that many of each rank if it is less; with pad_to_capacity it computes that many in any case. */
typedef struct {
    int64_t token0, tokens;
    int64_t elements;   /* of the flat f32 buffer */
    double expert_rows; /* that this rank's experts compute in one block, when balanced */
    double expert_room; /* for which memory is held */
    double bytes[XP_KIND_JUDGE];
    double total_bytes;
    double sent[XP_NAXIS]; /* bytes to other ranks: parameters, gradients, rows and their token numbers; no counts */
    double flop_forward, flop_backward; /* of matrix products, a multiply-add is 2 */
} xp_plan_cost;

typedef struct {
    xp_model model; /* after layers and shrink */
    xp_mesh_spec mesh;
    xp_step_options opt;      /* path and coefficients resolved */
    int blocks;               /* MoE blocks built */
    int layer[XP_MAX_LAYERS]; /* the model's layer number of each block */
    int balanced;             /* blocks that the balance losses look at: those that do not choose by a table */
    int params;
    xp_plan_param *param; /* in the order of the forward pass, which is the order of the flat buffers */
    int *by_name;         /* params numbers in strcmp order of their names */
    int64_t elements;     /* of the logical model */
    int foreach_legal;
    char path_why[160], foreach_why[320];
} xp_plan;

/* XP_E_ARG naming option, value and expectation; XP_E_NOMEM. Closing a cleared plan is fine. */
xp_status xp_plan_make(const xp_model *model, const xp_mesh_spec *mesh, const xp_step_options *opt, xp_plan *out);
void xp_plan_close(xp_plan *p);

/* Tokens [start, start+count) of the first micro-batch are the rank's; those of the next ones follow at distances of
 * xp_plan_micro_tokens(), which is the global batch when there is one micro-batch. As equal as possible, earlier ranks
 * take the surplus; in deterministic mode whole blocks of 16 are dealt so. A rank may get none. */
void xp_plan_tokens(const xp_plan *p, int rank, int64_t *out_start, int64_t *out_count);

int64_t xp_plan_micro_tokens(const xp_plan *p);

/* torch.chunk: rows [start, start+count) of R are at place i of P. */
void xp_plan_chunk(int64_t R, int P, int i, int64_t *out_start, int64_t *out_count);
/* Every parameter's shard on a rank: out holds p->params records. Returns the elements of the rank's flat buffer. */
int64_t xp_plan_shards(const xp_plan *p, int rank, xp_plan_shard *out);
/* The rows of every place of an axis (the parameter's gather or reduce axis), as the stages gather and scatter want
 * them: start and rows hold xp_mesh_axis_size() values. Returns that size. */
int xp_plan_rows(const xp_plan *p, int param, xp_axis axis, int64_t *out_start, int64_t *out_rows);
/* How many groups of a parameter's gradient a rank makes and scatters at a time, under XP_GRAD_CHUNK but at least one.
 * The same on every rank, because it counts collectives. */
int64_t xp_plan_chunk_groups(const xp_plan *p, int param);
/* The dtypes in which a parameter is gathered and its gradient reduced. */
xp_dtype xp_plan_param_dtype(const xp_plan *p, int param);
xp_dtype xp_plan_reduce_dtype(const xp_plan *p, int param);
/* The record of a block. */
const xp_dialect *xp_plan_dialect(const xp_plan *p, int block);
/* 1 when the balance losses look at a block: its choice is its router's. */
int xp_plan_is_balanced(const xp_plan *p, int block);
/* The number of a block's parameter (block -1 for those outside the blocks), or -1 when the model has none. */
int xp_plan_find(const xp_plan *p, xp_weight w, int block);

void xp_plan_cost_of(const xp_plan *p, int rank, xp_plan_cost *out);

/* Readable tables, ranks with equal rows folded into one. XP_E_IO. */
xp_status xp_plan_print(const xp_plan *p, FILE *f);
/* The same as an object with schema "expar.plan/1"; the caller decrefs it. XP_E_NOMEM. */
xp_status xp_plan_json(const xp_plan *p, json_t **out);

const char *xp_optimizer_name(xp_optimizer o);
const char *xp_optim_path_name(xp_optim_path o);

#ifdef __cplusplus
}
#endif
#endif
