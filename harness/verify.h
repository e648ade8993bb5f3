/* One test of a vector set, verified: other people's expected outputs against the reference, and a backend's own
 * outputs, or somebody's responses, against both. */
#ifndef XP_VERIFY_H
#define XP_VERIFY_H

#include "judge.h"
#include "vectors.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const xp_backend *impl; /* run on the prompts, unless there are responses */
    const char *responses;  /* folder of files named as the expected ones; NULL: none */
} xp_verify_options;

typedef struct {
    xp_verdict verdict;
    xp_judgement judged[2]; /* [0]: expected or response under the reference's bounds; [1]: the backend's outputs */
    int judgements;         /* how many of them are there */
    int64_t elements;       /* compared, bits and bounds together */
    int64_t bits;           /* of them, with the expected bits */
    char diagnosis[160];    /* a known mistake that explains a wrong response; "": none */
    char text[640];         /* why the verdict is not PASS */
    xp_finding first;       /* of a comparison of bits: the operand's diff and the first wrong element */
} xp_verify_result;

/* The caller closes *out. Everything that a test can get wrong is in the verdict: FAIL, or ERROR for files that do not
 * fit the stage; the status is for what stops the whole run (XP_E_NOMEM, XP_E_BUG). */
xp_status xp_verify_run(const xp_vectors *v, const xp_vectors_test *t, const xp_verify_options *o,
                        xp_verify_result *out);
void xp_verify_close(xp_verify_result *r);

#ifdef __cplusplus
}
#endif
#endif
