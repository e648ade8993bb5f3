/* One rank of a run: its mesh end, the backend under test, guarded memory, and the call through which every stage goes.
 *
 * xp_call() looks the row up, checks the arguments, runs the row (through the fault that is switched on, if any) and,
 * when a judge is present, poisons the outputs and the workspace before, and hashes inputs, checks guards and compares
 * after. The step and every case use this one function. */
#ifndef XP_RANK_H
#define XP_RANK_H

#include "xp/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct xp_judge xp_judge; /* judge.h: one rank's judge and its findings */
typedef struct xp_fault xp_fault; /* fault.h: a row wrapped on purpose */
typedef struct xp_arena xp_arena; /* guarded allocations with accounting */
typedef struct xp_dump xp_dump;   /* dump.h: writes calls as tests */

/* What the memory is for, for the plan's comparison. */
typedef enum {
    XP_KIND_PARAM = 0,
    XP_KIND_GRAD,
    XP_KIND_OPTIM,
    XP_KIND_ACT,
    XP_KIND_BUFFER,
    XP_KIND_JUDGE,
    XP_NKIND
} xp_kind;
const char *xp_kind_name(xp_kind k);

typedef struct {
    const xp_mesh *mesh;
    int rank, world;
    const xp_backend *impl; /* under test */
    const xp_backend *base; /* "ref": runs the stages that are not under test; may equal impl */
    const char *only;       /* NULL: every stage is under test; else the one stage that is */
    const xp_fault *fault;  /* NULL: none */
    xp_judge *judge;        /* NULL: not judged */
    xp_dump *dump;          /* NULL: calls are not written */
    xp_arena *arena;
    xp_device *dev;
    xp_queue *q;
    void *ws; /* grows on demand, owned by the rank */
    size_t ws_bytes;
    int layer;      /* for reports: -1 outside the layers */
    int step;       /* for reports */
    int64_t token0; /* global number of this rank's first token, for reports */
} xp_rank;

xp_status xp_rank_open(const xp_mesh *mesh, const xp_backend *impl, const xp_backend *base, xp_rank *out);
void xp_rank_close(xp_rank *r);

/* Guarded memory: 64-byte aligned, at least 64 guard bytes on both sides, contents undefined. NULL-safe release. */
xp_status xp_rank_alloc(xp_rank *r, xp_kind kind, size_t bytes, void **out);
void xp_rank_release(xp_rank *r, void *p);
/* A new contiguous tensor of the rank's memory. */
xp_status xp_rank_tensor(xp_rank *r, xp_kind kind, xp_dtype d, int ndim, const int64_t *dim, xp_tensor *out);
void xp_rank_drop(xp_rank *r, xp_tensor *t); /* releases t->data and clears t */
/* Bytes live now and at the peak, by kind and in all, of this rank. */
void xp_rank_memory(const xp_rank *r, size_t live[XP_NKIND], size_t peak[XP_NKIND], size_t *out_peak_total);

/* The row of backend b for a stage that can run these args, or NULL with a reason. */
const xp_kernel *xp_rank_row(const xp_backend *b, const xp_stage *s, const void *args, const xp_mesh *m,
                             const char **out_why);

/* The parts of xp_call(), for the judge. 1 when the stage is under test here. */
int xp_rank_tests(const xp_rank *r, const xp_stage *stage);
/* Makes r->ws hold what the row asks for; its contents are lost when it grows. */
xp_status xp_rank_workspace(xp_rank *r, const xp_kernel *row, const void *args, size_t *out_bytes);
/* Runs the row, through the fault when it is this stage's and the stage is under test, and waits for it. */
xp_status xp_rank_exec(xp_rank *r, const xp_kernel *row, const void *args);
/* Wakes every waiting peer when st is an error; returns st. */
xp_status xp_rank_give_up(xp_rank *r, xp_status st);

/* Runs one stage on this rank. site names the call in reports ("expert", "wgrad w1", "residual moe"): unique within a
 * layer and a step's phase. args is the stage's own args struct. All ranks of the stage's axis call it alike. */
xp_status xp_call(xp_rank *r, const xp_stage *stage, const char *site, void *args);

#ifdef __cplusplus
}
#endif
#endif
