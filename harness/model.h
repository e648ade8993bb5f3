/* A model as the harness needs it: the shape and the routing of its MoE blocks, in the project's own letters.
 *
 * Comes from a config.json (config.h), by name from the model directory, or from numbers. Plain data, copied by value.
 * It must not know any family's field names: those are rows of families.c. */
#ifndef XP_MODEL_H
#define XP_MODEL_H

#include "xp/dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    XP_MAX_LAYERS = 1024,
    XP_MAX_EXPERTS = 65536,
    XP_MAX_WIDTH = 1 << 20, /* hidden, expert, shared and dense widths */
    XP_MODEL_NAME = 128,
    XP_MODEL_NOTES = 4096,
    XP_MAX_RECORDS = 8, /* dialect records of one model */
    XP_VOCAB = 256      /* the step's tokens are bytes, whatever the model's own vocabulary is */
};

enum { XP_AROUND_TEXT = 96 }; /* all names of what a block has around its experts, with + between them */
#define XP_AROUND_NAMES "latent_norm, expert_norm, out_bias, block_norm, routed_norm, shared_norm, shared_in_norm"
/* What a block has around its experts, each with one vector of weights; a set of these bits. */
enum {
    XP_LATENT_NORM = 1, /* RMSNorm of the latent rows, before they are sent to the experts */
    XP_EXPERT_NORM = 2, /* RMSNorm of every expert's output row, its weight first, before the row is weighted; one
                           weight for all experts */
    XP_OUT_BIAS = 4,    /* added to the sum of the routed and the shared output */
    XP_BLOCK_NORM = 8,  /* RMSNorm of that sum, the bias included, before the residual */
    /* The two outputs before they are summed; and the shared expert's input, which is then a norm of its own of the
     * block's input, not the one that the experts read. */
    XP_ROUTED_NORM = 16,
    XP_SHARED_NORM = 32,
    XP_SHARED_IN_NORM = 64
};

typedef struct {
    char name[XP_MODEL_NAME]; /* file name without .json, or as given */
    char model_type[32];      /* "qwen3_moe"; "" for a model from numbers */
    char torch_dtype[24];     /* as given; "" when the file has none */
    int layers;
    uint8_t moe[XP_MAX_LAYERS]; /* 1: the layer's MLP is a MoE block */
    int64_t H, F, E, K;         /* hidden width, width of an expert, experts, slots a token */
    int64_t S;                  /* width of the shared expert, 0: none; its gate is dialect.shared_gate */
    int64_t latent;             /* width that the experts read and write, between two maps of the block; 0: H */
    int64_t router_width;       /* of the router's MLP where the record has one (router_in), else 0 */
    int64_t dense_F;            /* width of the layers that are no MoE blocks; 0 when the model states none */
    int64_t vocab;              /* of the published model; the step uses XP_VOCAB */
    double norm_eps;
    unsigned around;   /* XP_LATENT_NORM ... */
    double expert_eps; /* of XP_EXPERT_NORM; every other norm has norm_eps */
    int shrink;        /* the widths were divided by this */
    /* A copy of the preset with the file's numbers, the record of the most MoE blocks; and those of the other blocks,
     * which differ in how they choose or in limits, never in what parameters there are. */
    xp_dialect dialect, other[XP_MAX_RECORDS - 1];
    int others;
    uint8_t record[XP_MAX_LAYERS]; /* of a layer: 0 is dialect, n is other[n-1] */
    /* One line each, '\n' between them: names of the keys of the file that nothing reads; fields that the file does not
     * have and what the family's record says their absence means. */
    char unread[XP_MODEL_NOTES], assumed[1024];
} xp_model;

/* 1 when layer (0-based) is a MoE block; 0 outside the model too. */
int xp_model_is_moe(const xp_model *m, int layer);
/* Number of MoE blocks. */
int xp_model_moe_layers(const xp_model *m);
/* The record of a layer's block. */
const xp_dialect *xp_model_dialect(const xp_model *m, int layer);
/* Gives a layer's block a record. XP_E_ARG: the model would have more than XP_MAX_RECORDS, or the record differs from
 * `dialect` in a field that all blocks of a model share. */
xp_status xp_model_set_dialect(xp_model *m, int layer, const xp_dialect *d);
/* Forgets records that no MoE block has, after layers went; makes that of the most blocks `dialect`. */
void xp_model_settle(xp_model *m);
/* "0-2,7": the layers whose blocks have record n; at most bytes - 1 characters, cut with "...". */
void xp_model_record_layers(const xp_model *m, int n, char *buf, size_t bytes);
/* Parameters of the published architecture's MoE blocks: all, and those that one token meets. Router included. */
void xp_model_moe_params(const xp_model *m, double *out_all, double *out_active);

/* A file when the text has a '/' or ends in ".json", else <model directory>/<text>.json. The directory is compiled in
 * (golden/models); EXPAR_MODELS overrides it. XP_E_IO naming the file, XP_E_FORMAT naming file, field and value. */
xp_status xp_model_open(const char *name_or_path, xp_model *out);
/* From numbers: every layer a MoE block. XP_E_ARG naming the field and the value. */
xp_status xp_model_of(const char *name, const xp_dialect *d, int layers, int64_t H, int64_t F, int64_t E, int64_t K,
                      int64_t S, xp_model *out);

/* Width that the experts read and write. */
int64_t xp_model_expert_width(const xp_model *m);
/* Sets the latent width, 0: none. XP_E_ARG: out of range, or beside experts that return the block's input. */
xp_status xp_model_set_latent(xp_model *m, int64_t width);
/* Sets what is around the experts; after the latent width. XP_E_ARG: a norm of latent rows without a latent width, or
 * of a shared expert without one. */
xp_status xp_model_set_around(xp_model *m, unsigned around);
/* "latent_norm+expert_norm", the names in the order of the bits; "" for none. And back: XP_E_ARG naming the word. */
void xp_around_print(unsigned around, char *buf, size_t bytes);
xp_status xp_around_parse(const char *text, unsigned *out);

/* Sets the width of the router's MLP. XP_E_ARG: out of range; 0 beside a record that has one, or not 0 beside none. */
xp_status xp_model_set_router_width(xp_model *m, int64_t width);

/* Divides H, F, S, the latent and the router's width by n; leaves E, K, groups and layers. XP_E_ARG naming the width
 * that n does not divide. */
xp_status xp_model_shrink(xp_model *m, int n);
/* Replaces layers, experts and slots where the number is not 0. layers keeps the first ones and may not exceed the
 * model's. XP_E_ARG naming field and value, K > E among them. */
xp_status xp_model_override(xp_model *m, int layers, int64_t experts, int64_t topk);

/* Names (without .json) in the model directory (compiled in; EXPAR_MODELS overrides it), sorted; calls fn for each and
 * stops at the first failure. XP_E_IO when the directory cannot be read. */
xp_status xp_model_list(xp_status (*fn)(const char *name, void *arg), void *arg);

#ifdef __cplusplus
}
#endif
#endif
