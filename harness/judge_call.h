/* One judged call, as the judge's own files share it. Nobody else includes this.
 *
 * judge.c chooses rows and keeps the findings, judge_run.c guards the run, judge_slice.c runs the judge's row and
 * compares, judge_select.c judges a choice of experts, judge_place.c says where an element lies. */
#ifndef XP_JUDGE_CALL_H
#define XP_JUDGE_CALL_H

#include "arena.h"
#include "hash.h"
#include "judge.h"

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "the judge must not be compiled with fast-math: a NaN would pass"
#endif

enum { XP_CALL_OPERANDS = 32, XP_SITE_BYTES = 48 };

/* What this rank has seen move and choose, judged or not: whether a case shows anything beyond one rank, one choice. */
typedef struct {
    int ep;
    int64_t sent, sent_away; /* rows handed to dispatch, those for experts of other ranks */
    int64_t tokens;          /* that chose topk of experts, with experts > topk */
    uint64_t choice;         /* of the first of them, order aside */
    int choices_differ;
} xp_seen;

/* The latest dispatch, by which rows of later stages are told apart. */
typedef struct {
    int64_t ranks, locals, capacity;
    int64_t *counts;  /* [ranks][locals] rows from each rank */
    int64_t *offsets; /* [locals+1] */
    int64_t room;
} xp_arrivals;

typedef struct {
    const xp_stage *stage;
    char site[XP_SITE_BYTES];
    int64_t calls;
} xp_site_count;

struct xp_judge {
    xp_judge_options o;
    xp_device *dev; /* the judge's rows run on ref's device: host memory */
    xp_queue *q;
    xp_arena *own; /* host memory when the rank's is a device's */
    xp_finding *finding;
    xp_bias *bias; /* one a finding */
    int findings, room;
    xp_site_count *site;
    int sites, site_room;
    int calls; /* xp_call()s so far */
    int rank;
    xp_seen seen;
    xp_arrivals arrived;
};

typedef struct {
    xp_judge *j;
    xp_rank *r;
    const xp_stage *s;
    const char *site;
    void *args;     /* the caller's */
    void *host;     /* the same with every operand in host memory; what is judged */
    void *in;       /* host, with in-out operands as they were before the run */
    void *slice[3]; /* views of host, of in, and the judge's own */
    xp_arena *mem;  /* of the judge's memory */
    const xp_backend *backend;
    const xp_kernel *row, *judge;
    int judging;                    /* this call is judged, though judge may be NULL */
    int checked;                    /* the stage took the arguments */
    int64_t nth;                    /* number of the call at this (stage, site), from 0 */
    int select;                     /* the XP_SELECT operand when it is an output here, else -1 */
    int failures;                   /* recorded in this call */
    xp_role role[XP_CALL_OPERANDS]; /* 0: absent */
    xp_tensor saved[XP_CALL_OPERANDS];
    void *output[XP_CALL_OPERANDS];   /* the judge's outputs of the current slice */
    xp_hash before[XP_CALL_OPERANDS]; /* of inputs */
    xp_hash around[XP_CALL_OPERANDS]; /* of the bytes around outputs */
    xp_hash args_before;
    size_t ws_need;
} xp_judged;

/* judge.c. The finding of an operand (-1: of the call as a whole), made when it is new. NULL: out of memory. */
xp_finding *xp_judged_finding(xp_judged *c, int operand);
/* The bias set that belongs to a finding of this call's judge. */
xp_bias *xp_judged_bias(xp_judged *c, const xp_finding *f);
/* Records a failure: the first one of a finding gives it its class and text. first: where, or NULL. */
void xp_judged_fail(xp_judged *c, int operand, xp_class cls, const xp_place *first, const char *fmt, ...)
    XP_PRINTF(5, 6);
xp_status xp_judged_alloc(xp_judged *c, size_t bytes, void **out);
/* A contiguous host tensor of that dtype with the shape of t. */
xp_status xp_judged_like(xp_judged *c, const xp_tensor *t, xp_dtype d, xp_tensor *out);

/* judge_run.c. Host views of all operands. */
xp_status xp_judged_enter(xp_judged *c);
/* Poison, run, guards, inputs, twice. */
xp_status xp_judged_run(xp_judged *c);
/* Copies elements between host tensors of one shape: same dtype, or into F64. */
void xp_judged_copy(const xp_tensor *from, const xp_tensor *to);

/* judge_slice.c. The judge's row over all units or a sample, bounds, comparison. */
xp_status xp_judged_compare(xp_judged *c);

/* judge_select.c. Judges rows of idx (views of one slice): mine is the judge's choice, score and tol are its values and
 * bounds. use [T,K] I32: the choice to replay, which is idx where that is one. */
typedef struct {
    const xp_tensor *idx, *mine, *score, *tol, *logits, *bias; /* logits, bias: NULL or host inputs */
    xp_tensor *use;
} xp_choice;
void xp_judged_select(xp_judged *c, const xp_choice *v);

/* judge_place.c. Where element n (row-major) of a view of operand i lies. */
void xp_judged_place(const xp_judged *c, int operand, const xp_tensor *view, int64_t n, xp_place *out);
/* 1 when the operand's rows are those of the expert side, so that a view of it holds some of them. */
int xp_judged_by_rows(const xp_judged *c, int operand);
/* Rows whose token lives on another rank: of the view, when the operand has such rows, else those that the stage
 * reads. */
int64_t xp_judged_remote(const xp_judged *c, int operand, const xp_tensor *view);
/* 1 when the units of the stage are rows in use by groups: out is their number. */
int xp_judged_rows_in_use(const xp_judged *c, int64_t extent, int64_t *out);
/* Notes choices and moves after the run. XP_E_NOMEM. */
xp_status xp_judged_observe(xp_judged *c);

/* judge.c, for judgement.c: settles the bias test into the findings. */
const xp_seen *xp_judge_seen(const xp_judge *j);
const xp_judge_options *xp_judge_get_options(const xp_judge *j);

#endif
