/* Stage: what must be true of every kernel that claims it. A stage owns meaning (check, cost, bound, properties); a
 * kernel row is only a way to compute it, so no kernel can loosen its own tolerance or count its own flops.
 *
 * Dimension letters mean one thing everywhere:
 *   T tokens on this rank   E experts           K slots a token (top-k)   H hidden width     F ffn width of an expert
 *   S shared-expert width   V vocabulary        L experts on this rank = E / ep              M rows sent (T*K and
 * padding) C rows received, as capacity                P ranks on the stage's axis                  B blocks of tokens
 *   N flat length           G groups            R rows of a parameter on this rank           Q segments of a flat
 * buffer Y MoE layers            U rows of an expert's first matrix: 2 F with a gate, F without
 *   X the shared expert's, from S   Z rows of the router: E, and the dialect's null experts or shared rows
 *   A shared experts that the router weighs         W factors of the weights: Z of them, or one
 *   I, J blocks of a quantised matrix along its rows and columns
 *
 * The letters also say where an operand lies in the logical tensor, so that generated data is a function of the global
 * index: a T dimension starts at this rank's first global token, L at its first expert, N and R at its shard; every
 * other dimension is whole on each rank. */
#ifndef XP_STAGE_H
#define XP_STAGE_H

#include "mesh.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { XP_IN = 1, XP_OUT = 2, XP_INOUT = 3 } xp_role;

typedef enum {
    XP_BITS = 0,  /* every element equal to the judge's, bit for bit (NaN equals NaN, whatever its payload) */
    XP_BOUND,     /* |got - ref| <= the stage's bound, element by element */
    XP_SELECT,    /* a top-k choice: judged on the operand named by `scores`, see xp_stage.replay */
    XP_UNCOMPARED /* an input, or scratch that a later stage of the same implementation reads */
} xp_cmp;

/* One row of an operand table. `shape` lists dimensions separated by commas; each is a product of letters and numbers
 * with an optional addend: "T,H", "L,2*F,H", "E+1". */
typedef struct {
    const char *name, *shape;
    xp_role role;
    uint32_t dtypes; /* XP_BIT(xp_dtype) allowed in a call; a judge's XP_BOUND outputs may always be F64 */
    xp_cmp cmp;
    const char
        *group;   /* the case key that sets its dtype: "act", "param", "router", "logits", "weight", "grad", "reduce";
                     "" when only one is allowed */
    int optional; /* data may be NULL */
    size_t at;    /* offset of its xp_tensor in the args struct */
} xp_operand;
#define XP_OPERAND(type, field, shape, role, dtypes, cmp, group) \
    { #field, (shape), (role), (dtypes), (cmp), (group), 0, offsetof(type, field) }
#define XP_OPTIONAL(type, field, shape, role, dtypes, cmp, group) \
    { #field, (shape), (role), (dtypes), (cmp), (group), 1, offsetof(type, field) }

/* One scalar of an args struct that a case line can set. `words` ("a|b|c") makes it an int that counts the words. */
typedef enum { XP_P_INT, XP_P_I64, XP_P_F32, XP_P_F64, XP_P_WORD, XP_P_DTYPE, XP_P_DIALECT } xp_param_type;
typedef struct {
    const char *name, *words, *dflt; /* dflt is text, as a case line would give it */
    xp_param_type type;
    size_t at;
} xp_param;

typedef struct {
    double flop, mem_bytes, net_bytes; /* per rank, of the ideal algorithm: each operand touched once */
} xp_cost;

/* An identity that needs no reference: it holds when residual <= 1 (units of its own error). */
typedef struct {
    const char *name;
    xp_status (*residual)(const void *args, const xp_mesh *m, double *out);
} xp_property;

typedef struct {
    const char *name, *meaning; /* meaning: one line for `list` */
    xp_axis axis; /* XP_LOCAL, or the axis when it is fixed; stages with an axis in their args say XP_WORLD */
    size_t args_size;
    const xp_operand *operand;
    int operands;
    const xp_param *param;
    int params;
    /* Shapes, dtypes, ranges. XP_E_ARG naming field, value and expectation. Called before every run. */
    xp_status (*check)(const void *args, const xp_mesh *m);
    void (*cost)(const void *args, const xp_mesh *m, xp_cost *out);
    /* Tolerance of output `operand` (an index into the table; cmp XP_BOUND or the scores of an XP_SELECT): tol has that
     * operand's shape, dtype F64, and is absolute. ref holds the judge's value in F64. args holds every
     * XP_INOUT operand as it was before the run. ws: bound_workspace bytes. */
    xp_status (*bound)(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws, xp_tensor *tol);
    size_t (*bound_workspace)(const void *args, const xp_mesh *m);
    /* Fills inputs that the generic generator cannot (ids, offsets, targets), after it ran. NULL: nothing to add.
     * data is the fill kind; the same seed gives the same logical tensors on every mesh. */
    xp_status (*fill)(void *args, const xp_mesh *m, const char *data, uint64_t seed);
    /* Independent units that a judge may take a few at a time (tokens, rows, elements); NULL: not divisible. */
    int64_t (*extent)(const void *args);
    /* The args of units [lo, hi) as views into args; out is a copy of args on entry. */
    void (*slice)(const void *args, int64_t lo, int64_t hi, void *out);
    /* For a stage with an XP_SELECT operand: makes args take that operand as given (routing replay) when on != 0. */
    void (*replay)(void *args, int on);
    /* What an XP_SELECT operand is judged on: key and tol are F64 of [units, candidates], from the inputs alone; tol
     * +inf where nothing is decided. ws: bound_workspace bytes. */
    xp_status (*keys)(const void *args, const xp_mesh *m, void *ws, xp_tensor *key, xp_tensor *tol);
    const char *scores; /* the operand whose shape the keys have */
    const char *chain;  /* NULL: generated inputs; else the chain whose run gives its inputs: "layer" or "step" */
    const xp_property *property;
    int properties;
    /* 1: the scalars of args (a dialect) ask for optional operand i. NULL: none is asked for. */
    int (*wants)(const void *args, int i);
} xp_stage;

/* The stage's operand of that name, or -1. */
int xp_stage_operand(const xp_stage *s, const char *name);
/* The tensor of operand i inside args. */
xp_tensor *xp_stage_tensor(const xp_stage *s, void *args, int i);
const xp_tensor *xp_stage_ctensor(const xp_stage *s, const void *args, int i);

#ifdef __cplusplus
}
#endif
#endif
