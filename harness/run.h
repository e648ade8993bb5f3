/* One case, run on its mesh and judged: from a line of text to an agreed verdict. */
#ifndef XP_RUN_H
#define XP_RUN_H

#include "case.h"
#include "fault.h"
#include "step.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const xp_backend *impl;              /* under test */
    const char *impl_given, *text_given; /* as --impl and --text gave them, for the repro line; NULL: not given */
    const xp_fault *fault;               /* NULL: none */
    const uint8_t *text;                 /* for data=text; NULL: seeded bytes */
    int64_t text_bytes;
    int64_t calls;               /* judge the first so many calls of each site; 0: all */
    int64_t sample_units;        /* judge so many units of a larger stage; 0: all */
    const char *dump;            /* folder for a vector set of every call; NULL: none */
    int64_t *dumped, *dump_left; /* grow by the calls that were written, and that are no tests */
    const xp_model *model;       /* in place of the one that the case names; NULL: that one */
    const xp_weights *weights;   /* of that model's MoE blocks; NULL: seeded */
    const char *weights_given;   /* as --weights gave them; NULL: not given */
    int one_layer;               /* the case's last layer alone is run: the model has no other MoE block */
    int against_one_rank;        /* layer and step cases on several ranks: also compare every row with a one-rank run */
} xp_run_options;

typedef struct {
    xp_judgement judgement;
    xp_parity *parity;                 /* NULL: not compared */
    int64_t parity_rows, parity_wrong; /* compared; different or missing */
    xp_step_result result;             /* of the last step, for layer and step cases */
    xp_mesh_report end;
    size_t peak_bytes; /* of all ranks' guarded memory, at their peaks */
    double seconds;
} xp_run_result;

/* XP_E_ARG: the case cannot run as written (field, value). XP_E_DEVICE: this mesh is not available here (a SKIP).
 * Everything that happens inside the ranks is in the judgement, not in the status. */
xp_status xp_case_run(const xp_case *c, const xp_run_options *o, xp_run_result *out);
void xp_run_result_close(xp_run_result *r);
/* The model that a layer or step case stands for. */
xp_status xp_case_model(const xp_case *c, xp_model *out);

#ifdef __cplusplus
}
#endif
#endif
