/* One token's way from logits to scores and to what the choice looks at, and the slopes of it. Nobody outside
 * ref/dense/ includes it. l: logits after scale and soft cap; q: the format that q(.) of xp/route.h rounds to. */
#ifndef XP_DENSE_SCORES_H
#define XP_DENSE_SCORES_H

#include "xp/dialect.h"

/* F64 (nothing is rounded) unless the record's score_dtype is act: then the dtype of logits that are in act, else act.
 */
xp_dtype xp_dense_step(const xp_dialect *d, xp_dtype logits, xp_dtype act);

/* Raw logits become l, in place; and d l / d raw. */
void xp_dense_logits(const xp_dialect *d, int64_t z_n, double *l);
double xp_dense_logit_slope(const xp_dialect *d, double raw);

/* exact [Z]: scores before their last rounding. A NaN logit scores 0, unless there is nothing else. */
void xp_dense_scores(const xp_dialect *d, xp_dtype q, const double *l, int64_t z_n, double *exact);
/* ds / dl of a score that depends on its own logit alone. */
double xp_dense_score_slope(const xp_dialect *d, double l, double s);

/* p [n] = softmax of the logits l [n]; a NaN counts as -inf, unless there is nothing else. p is not l. */
void xp_dense_share_out(const double *l, int64_t n, double *p);
/* p [Z] = softmax over the experts that are left (gone 0) and within the sparsemixer's margin. */
void xp_dense_sparse(const xp_dialect *d, xp_dtype q, const double *l, const double *gone, int64_t z_n, double *p);

/* key [Z]: what the choice looks at; kept [Z]: 0 for an expert outside the groups that stay. bias may be absent;
 * group [Z] is scratch. */
void xp_dense_keys(const xp_dialect *d, const double *l, const double *s, const xp_tensor *bias, int64_t z_n,
                   double *group, double *key, double *kept);

/* Shares of a whole that the chosen ones are, from their logits: no division by a sum of scores follows. */
int xp_dense_shares(const xp_dialect *d);
/* What the shares are a softmax of: l, or log sigmoid(l); and its slope. */
double xp_dense_share_base(const xp_dialect *d, double l);
double xp_dense_share_slope(const xp_dialect *d, double l);

/* The divisor of weights that sum up to sum, q'd; and its slope. */
double xp_dense_divisor(const xp_dialect *d, xp_dtype q, double sum);
double xp_dense_divisor_slope(const xp_dialect *d, double sum);

#endif
