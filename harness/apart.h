/* Whether a case can tell two dialects apart: the reference computes with one record, and the stages' own bounds judge
 * it by the other. */
#ifndef XP_APART_H
#define XP_APART_H

#include "xp/dialect.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the two differ in, the first of these that shows. All but the last exceed a bound, or are told by bits. */
typedef enum {
    XP_APART_NOT = 0, /* no case tells them apart */
    XP_APART_CHOICE,  /* other experts, decided beyond both bounds */
    XP_APART_WEIGHT,  /* same experts, other routing weights */
    XP_APART_PLACES,  /* same experts and weights, other slots dropped, or rows elsewhere */
    XP_APART_OUTPUT,  /* same experts, another output of the whole block */
    XP_APART_BALANCE, /* another gradient of the balance losses */
    XP_APART_ROUNDING /* output or input gradient with other bits within the bounds: for vectors of exact data */
} xp_apart;
enum { XP_APART_CASES = 6 };
/* "c" for a choice, and so on; "-" for XP_APART_NOT. And a word: "choice". */
char xp_apart_letter(xp_apart a);
const char *xp_apart_name(xp_apart a);

/* Judges `wrong`, computed by the reference, by the bounds of `right` on cases of small exact numbers in bf16 (16
 * experts, 2 or 3 slots, a shared expert). XP_E_ARG when a record cannot run there, naming the field; XP_E_NOMEM. */
xp_status xp_apart_judge(const xp_dialect *right, const xp_dialect *wrong, xp_apart *out);

#ifdef __cplusplus
}
#endif
#endif
