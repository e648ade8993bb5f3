/* A case: one line of text that says what runs, on what sizes, types, data and mesh, and from which seed.
 *
 *   rmsnorm T=1,7,33 H=64 dtype=f32,bf16 data=real,ties mesh=sim:fsdp=1,2 seed=1
 *
 * The first word is a stage, or `layer` (every stage of a MoE layer, forward and backward) or `step` (a whole training
 * step). A comma in a value multiplies; in a mesh it also separates keys, and a bare number after one extends the key
 * before it. `name=` names one line. In a file a case is called <file stem>/<n> (n counts cases from 1) or <file
 * stem>/<name>. A key that the case's stage does not have, an unknown value, and a key given twice are errors. The
 * canonical line names every key that is not at its default. */
#ifndef XP_CASE_H
#define XP_CASE_H

#include "judge.h"
#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { XP_CASE_STAGE = 0, XP_CASE_LAYER, XP_CASE_STEP } xp_case_kind;

/* A line of XP_CASE_LINE - 1 characters holds every canonical line; a name is file stem, '/' and own name. */
enum { XP_CASE_NAME = 96, XP_CASE_OWN_NAME = 48, XP_CASE_LINE = 2048, XP_CASE_PARAMS = 24 };

/* The groups of dtypes that a line can set one by one; dtype= sets act and param (and grad, when it is f64). */
typedef enum {
    XP_G_ACT = 0,
    XP_G_PARAM,
    XP_G_ROUTER,
    XP_G_LOGITS,
    XP_G_WEIGHT,
    XP_G_GRAD,
    XP_G_REDUCE,
    XP_G_CODE,
    XP_G_SCALE,
    XP_G_MASTER,
    XP_G_MOMENT,
    XP_G_SHARED, /* of a layer or step alone: its shared expert, its router's weights, its experts' reduction */
    XP_G_GATE,
    XP_G_EXPERT_REDUCE,
    XP_NGROUP
} xp_group;
const char *xp_group_name(xp_group g);

typedef struct {
    char name[XP_CASE_NAME];
    xp_case_kind kind;
    const xp_stage *stage;     /* of XP_CASE_STAGE */
    int64_t dim[26];           /* by letter - 'A'; T is the global batch */
    int dim_set[26];           /* 1: the line says so */
    xp_dtype dtype[XP_NGROUP]; /* XP_NDTYPE: follows from the others */
    xp_data data;
    xp_mesh_spec mesh;
    uint64_t seed;
    xp_expect expect;
    char model[XP_MODEL_NAME]; /* "": the dimensions; else a model's name or path */
    char dialect[64];
    char with[64];   /* optional operands that are present: names joined by '+' */
    unsigned around; /* XP_LATENT_NORM ...: what the block has around its experts */
    int shrink, layers, steps, deterministic, order, align, micro, divide;
    int params;
    struct {
        char name[24], value[40];
    } param[XP_CASE_PARAMS]; /* the stage's own scalars, and fields of the dialect record */
} xp_case;

/* One line to its product of cases, handed to fn in order; stops at fn's first failure. XP_E_ARG naming key, value and
 * what was expected, before any case is handed on. fn NULL: only checks. from: the file stem for names, or NULL for a
 * line of its own. *number counts the cases of a file. */
typedef xp_status (*xp_case_fn)(const xp_case *c, void *arg);
xp_status xp_case_expand(const char *line, const char *from, int *number, xp_case_fn fn, void *arg);
/* Every case of a file: blank lines and lines from '#' on are skipped. XP_E_IO, XP_E_FORMAT naming file and line,
 * before the first case of the file is handed on. */
xp_status xp_case_file(const char *path, xp_case_fn fn, void *arg);
/* Every case of every .txt file of the case directory (compiled in; EXPAR_CASES overrides it), files in name order. */
xp_status xp_case_all(xp_case_fn fn, void *arg);
const char *xp_case_dir(void);
/* The canonical line; reads back to the same case but for the name. */
void xp_case_print(const xp_case *c, char *buf, size_t bytes);
/* 1 when the glob (* and ?, * also over '/') matches the name. */
int xp_glob(const char *pattern, const char *name);
/* Defaults of a kind of case: sizes small enough for a second. */
void xp_case_defaults(xp_case_kind kind, const xp_stage *stage, xp_case *out);
/* The case's dialect: its preset (or the default one of its kind) with the fields that the line sets. */
xp_status xp_case_dialect(const xp_case *c, xp_dialect *out);
/* For a case whose stage gets its inputs from a layer: XP_E_ARG when the line sets what the layer decides. */
xp_status xp_case_of_chain(const xp_case *c);
/* Every key that a line takes which begins with head ("layer", "step" or a stage), but for the stage's own scalars and
 * the fields of a dialect: its name, what a value looks like, what it means. */
typedef struct {
    const char *name, *value, *meaning;
} xp_case_key;
void xp_case_keys(const char *head, void (*fn)(const xp_case_key *key, void *arg), void *arg);
/* 1 when a line of this case may set the size of that letter. */
int xp_case_takes(const xp_case *c, char letter);
/* Refuses what no run could honour: K > E, E not a multiple of ep, ... XP_E_ARG naming field and value. */
xp_status xp_case_check(const xp_case *c);

#ifdef __cplusplus
}
#endif
#endif
