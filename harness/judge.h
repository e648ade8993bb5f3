/* Judge: what one rank finds out about the rows it runs, and the verdict of all ranks together.
 *
 * One xp_judge belongs to one rank (xp_rank.judge): nothing in it is shared between threads. xp_call() does the work;
 * a caller opens a judge for each rank, runs, and hands all of them to xp_judgement_make(). A finding is plain bytes,
 * so ranks in other processes can send theirs. A judge must never change what it judges: it writes only to memory of
 * its own, poison before a run, and nothing after it. */
#ifndef XP_JUDGE_H
#define XP_JUDGE_H

#include <stdio.h>

#include "compare.h"
#include "fill.h"
#include "mesh.h"
#include "rank.h"

#ifdef __cplusplus
extern "C" {
#endif

/* In ascending severity: a run's verdict is the largest of its lines. */
typedef enum {
    XP_V_PASS = 0,
    XP_V_SKIP,        /* could not run here, with the reason */
    XP_V_UNSUPPORTED, /* the backend has no row for it */
    XP_V_VACUOUS,     /* nothing was shown: nothing compared, all zero, all local, one expert, no judge */
    XP_V_ERROR,
    XP_V_FAIL,
    XP_V_HANG
} xp_verdict;
const char *xp_verdict_name(xp_verdict v); /* "PASS", "SKIP", ... */

/* The vacuous result that a case may declare to be what it wants. */
typedef enum { XP_EXPECT_NONE = 0, XP_EXPECT_LOCAL, XP_EXPECT_ZERO, XP_EXPECT_ONE_EXPERT } xp_expect;
const char *xp_expect_name(xp_expect e); /* "none", "local", "zero", "one_expert" */
xp_status xp_expect_parse(const char *text, xp_expect *out);

typedef enum { XP_TWICE_NEVER = 0, XP_TWICE_FIRST, XP_TWICE_ALWAYS } xp_twice;

typedef struct {
    const xp_backend *ref;   /* judges every other backend; required */
    const xp_backend *dense; /* judges the rows of ref; NULL: they stay unjudged (VACUOUS) */
    const char *stage;       /* NULL: every stage; else only this one */
    xp_data data;            /* the bias test runs on real data, the cap on undecided choices on real and text */
    int64_t calls;           /* judge only the first so many calls of each (stage, site); 0: all */
    int64_t sample_units;    /* judge only so many units of a stage that has more; 0: all */
    size_t slice_bytes;      /* memory of the judge's outputs for one slice; 0: 64 MiB */
    uint64_t seed;           /* of the sample */
    int any_tie;             /* 1: of equal scores any may be chosen: answers of code with another tie rule, or none */
    xp_twice twice;          /* when a row that claims XP_DET_RUN is run a second time */
} xp_judge_options;

/* Where something was found. Numbers that do not apply are -1. */
typedef struct {
    int set; /* 0: nothing was recorded */
    int rank, layer, step;
    int64_t token, expert, slot; /* global token and expert numbers */
    int ndim;
    int64_t index[XP_MAXDIM]; /* in the rank's own operand */
    int dtype;                /* xp_dtype of got */
    uint64_t code;            /* got's bits */
    double got, expected, bound, ratio;
} xp_place;
/* "rank 2 layer 0 token 17 expert 5 slot 1 index [17,3]". */
void xp_place_print(const xp_place *p, char *buf, size_t bytes);
/* "got 0x1.8p-3 (0x3e40) expected 0x1.8p-4 bound 0x1p-12". */
void xp_place_values(const xp_place *p, char *buf, size_t bytes);

/* What is known about one operand of one (stage, site), over all calls. */
typedef struct {
    char stage[24], site[48], operand[24]; /* operand "" for the call as a whole */
    char row[32], judge[32];               /* names of the row under test and of the judge's, "backend:row" */
    int seq;                               /* order of first appearance on its rank */
    xp_verdict verdict;
    xp_class cls;           /* of the first failure */
    uint32_t classes;       /* XP_BIT of every class seen */
    int64_t calls;          /* judged */
    int64_t total;          /* elements of the operand in those calls, judged or not */
    int64_t remote;         /* rows compared whose token lives on another rank */
    int is_float, compares; /* compares: 0 for a record of failures outside any comparison */
    xp_diff diff;
    int64_t chosen, undecided, reordered; /* XP_SELECT: tokens, other set within bounds, other order within bounds */
    int64_t experts;                      /* XP_SELECT: E */
    int bias_state;                       /* 0: not judged, 1: tested on at least one rank */
    int64_t bias_n;
    double bias_mean, bias_limit; /* the larger of the two means by |mean| / limit */
    int first_call;               /* number of the rank's call in which it appeared */
    int fail_call;                /* number of the rank's call at the first failure, -1 */
    xp_place worst;               /* largest err / bound */
    xp_place first;               /* first wrong element */
    int rank;                     /* of the first failure; -1 */
    char text[240];               /* what the first failure was, or why nothing was shown */
} xp_finding;

xp_status xp_judge_open(const xp_judge_options *o, xp_judge **out);
void xp_judge_close(xp_judge *j); /* NULL-safe */
/* The findings of this rank so far, in order of appearance; valid until the next call or close. Returns their number.
 */
int xp_judge_findings(xp_judge *j, const xp_finding **out);

/* Used by xp_call(): runs the call and judges it. Returns the row's own error; a wrong result is a finding, not an
 * error, and the run goes on. */
xp_status xp_judge_call(xp_judge *j, xp_rank *r, const xp_stage *stage, const char *site, void *args);

/* All ranks together. */
typedef struct {
    xp_verdict verdict;
    xp_finding *line; /* one a (stage, site, operand), in order of appearance on the lowest rank that has it */
    int lines;
    int first;                   /* the line of the culprit: the earliest call that failed; -1: none */
    int local, zero, one_expert; /* which vacuous results hold */
    int64_t elements, remote, wrong, undecided;
    int count[XP_V_HANG + 1]; /* lines by verdict */
    char text[320];           /* one line: why the verdict is not PASS; "" for PASS */
} xp_judgement;
/* judge[ranks], entries may be NULL. end NULL: every rank returned XP_OK; else how they ended (judges of stuck ranks
 * are not read). Deterministic: depends on the findings only, not on the order in which ranks ran. XP_E_NOMEM. */
xp_status xp_judgement_make(xp_judge *const *judge, int ranks, const xp_mesh_report *end, xp_expect expect,
                            xp_judgement *out);
void xp_judgement_close(xp_judgement *g);
/* The block of lines that explains one failed line: where, values, pattern, class. Each line starts with two blanks.
 * said: a text that stands above it; what it says already is not said again. */
void xp_finding_print(FILE *out, const xp_finding *f, const char *said);

#ifdef __cplusplus
}
#endif
#endif
