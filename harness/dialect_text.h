/* A dialect in words and formulas, and against its neighbours: what `explain` and `selftest dialects` print. Everything
 * is read off the record, so that a preset cannot say one thing and do another. */
#ifndef XP_DIALECT_TEXT_H
#define XP_DIALECT_TEXT_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_FORMULA_TEXT = 320 };

/* Line i of the formula, in the order in which things happen: key ("logits") and text; 0 when there is no line i.
 * text: XP_FORMULA_TEXT bytes. */
int xp_dialect_formula(const xp_dialect *d, int i, const char **out_key, char *text);
/* Fields in which a and b differ; text (bytes may be 0) names them: "renorm none, not sum; scale 2.5, not 1" - a's
 * value first. Coefficients of losses and how files store matrices count as differences only with `all`. */
int xp_dialect_differences(const xp_dialect *a, const xp_dialect *b, int all, char *text, size_t bytes);
/* The n-th nearest other preset by the number of differing fields, presets that do not differ left out; NULL: none. */
const xp_dialect *xp_dialect_neighbour(const xp_dialect *d, int n);

/* "layers 0-2: hf-5.24/deepseek_v4-hash; select_on token_table, not score": record n (1 to others) of a model, and what
 * differs from `dialect`. */
void xp_model_record_text(const xp_model *m, int n, char *text, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
