/* Judging a choice of K out of E experts, where two right answers may differ.
 *
 * The judge's scores have a bound, so two experts whose scores differ by less than both bounds may come in either
 * order. A set is right when no expert left out scores higher than a chosen one by more than both bounds; a right set
 * that is not the judge's is undecided, counted, and replayed by the judge for everything after it. Equal logits leave
 * nothing undecided: the lower index must win. */
#include <math.h>
#include <string.h>

#include "judge_call.h"

/* One token's row of everything. */
typedef struct {
    int64_t t, E, K;
    const int32_t *idx, *mine;
    const double *s, *b; /* judge's scores and their bounds */
} row;

static int finite_id(const row *w, int32_t e) {
    return e >= 0 && e < w->E;
}

/* Slot of expert e in a choice, K when it is not chosen. */
static int64_t slot_of(const int32_t *choice, int64_t K, int64_t e) {
    int64_t k = 0;
    while (k < K && choice[k] != e)
        k++;
    return k;
}

static int has_repeats(const int32_t *choice, int64_t K) {
    for (int64_t k = 1; k < K; k++) {
        if (slot_of(choice, k, choice[k]) < k)
            return 1;
    }
    return 0;
}

static void fail_at(xp_judged *c, const row *w, int64_t slot, xp_class cls, const char *what, int64_t other) {
    const xp_tensor *idx = xp_stage_ctensor(c->s, c->slice[0], c->select);
    const int32_t e = w->idx[slot];
    xp_finding *f = xp_judged_finding(c, c->select);
    xp_place p;
    xp_judged_place(c, c->select, idx, w->t * w->K + slot, &p);
    p.expected = (double)w->mine[slot];
    p.ratio = (double)INFINITY;
    p.expert = e;
    if (f) {
        if (f->diff.wrong++ == 0)
            f->first = p;
    }
    if (other < 0 || !finite_id(w, e))
        xp_judged_fail(c, c->select, cls, &p, "token %lld slot %lld: %s (expert %d of %lld)", (long long)p.token,
                       (long long)slot, what, (int)e, (long long)w->E);
    else
        xp_judged_fail(c, c->select, cls, &p,
                       "token %lld slot %lld: %s: expert %d scores %.9g +- %.2g, expert %lld scores %.9g +- %.2g",
                       (long long)p.token, (long long)slot, what, (int)e, w->s[e], w->b[e], (long long)other,
                       w->s[other], w->b[other]);
}

/* Ids in range and distinct, unless the judge's own choice repeats one as well. */
static int check_ids(xp_judged *c, const row *w) {
    for (int64_t k = 0; k < w->K; k++) {
        if (!finite_id(w, w->idx[k])) {
            const int unwritten = (uint32_t)w->idx[k] == (uint32_t)xp_poison_code(XP_I32);
            fail_at(c, w, k, unwritten ? XP_C_UNWRITTEN : XP_C_SELECT,
                    unwritten ? "the choice was never written" : "the id is no expert", -1);
            return 0;
        }
        if (slot_of(w->idx, k, w->idx[k]) < k && !has_repeats(w->mine, w->K)) {
            fail_at(c, w, k, XP_C_SELECT, "the expert is chosen twice", -1);
            return 0;
        }
    }
    return 1;
}

/* A NaN score ranks below every number; an infinite error leaves every order open. */
static int beats(const row *w, int64_t a, int64_t b) {
    if (isnan(w->s[a]) || isinf(w->b[a]) || isinf(w->b[b]))
        return 0;
    if (isinf(w->s[a]) && w->s[a] == w->s[b])
        return 0;
    return isnan(w->s[b]) || !(w->s[a] - w->b[a] <= w->s[b] + w->b[b]);
}

/* No expert left out beats a chosen one, and no slot beats the one before it. */
static int check_scores(xp_judged *c, const row *w) {
    for (int64_t k = 0; k < w->K; k++) {
        for (int64_t m = 0; m < k; m++) {
            if (beats(w, w->idx[k], w->idx[m])) {
                fail_at(c, w, m, XP_C_SELECT, "slots do not descend", w->idx[k]);
                return 0;
            }
        }
        for (int64_t e = 0; e < w->E; e++) {
            if (beats(w, e, w->idx[k]) && slot_of(w->idx, w->K, e) == w->K) {
                fail_at(c, w, k, XP_C_SELECT, "an expert left out scores higher", e);
                return 0;
            }
        }
    }
    return 1;
}

static int equal_inputs(const xp_choice *v, int64_t t, int64_t a, int64_t b) {
    const xp_tensor *x = v->logits, *y = v->bias;
    const int64_t i = xp_tensor_offset(x, t * x->dim[1] + a), j = xp_tensor_offset(x, t * x->dim[1] + b);
    const int same = xp_code(x->data, x->dtype, i) == xp_code(x->data, x->dtype, j) ||
                     (isnan(xp_widen(x->data, x->dtype, i)) && isnan(xp_widen(x->data, x->dtype, j)));
    return same && (!y || xp_code(y->data, y->dtype, a) == xp_code(y->data, y->dtype, b));
}

/* Equal inputs: the lower index comes first, and NaN comes last, wherever the judge's own choice keeps to it too (under
 * a mask of groups it need not, and it may be open which groups stay). */
static int check_ties(xp_judged *c, const xp_choice *v, const row *w) {
    if (!v->logits)
        return 1;
    for (int64_t k = 0; k < w->K; k++) {
        const int64_t e = w->idx[k];
        const xp_tensor *x = v->logits;
        const int nan = isnan(xp_widen(x->data, x->dtype, xp_tensor_offset(x, w->t * x->dim[1] + e)));
        for (int64_t a = 0; a < w->E; a++) {
            if (a == e || slot_of(w->idx, k, a) < k || slot_of(w->mine, w->K, a) > slot_of(w->mine, w->K, e) ||
                isinf(w->b[a]) || isinf(w->b[e]))
                continue;
            if (a < e && equal_inputs(v, w->t, a, e)) {
                fail_at(c, w, k, XP_C_TIE, "equal logits, the lower index must come first", a);
                return 0;
            }
            if (nan && !isnan(xp_widen(x->data, x->dtype, xp_tensor_offset(x, w->t * x->dim[1] + a)))) {
                fail_at(c, w, k, XP_C_SELECT, "a NaN logit was chosen before a number", a);
                return 0;
            }
        }
    }
    return 1;
}

static int same_set(const row *w) {
    for (int64_t k = 0; k < w->K; k++) {
        if (slot_of(w->idx, w->K, w->mine[k]) == w->K)
            return 0;
    }
    return 1;
}

/* 1: no expert left out beats one of the choice. */
static int justified(const row *w, const int32_t *choice) {
    for (int64_t e = 0; e < w->E; e++) {
        if (slot_of(choice, w->K, e) < w->K)
            continue;
        for (int64_t k = 0; k < w->K; k++) {
            if (beats(w, e, choice[k]))
                return 0;
        }
    }
    return 1;
}

static void judge_row(xp_judged *c, const xp_choice *v, const row *w, int32_t *use) {
    xp_finding *f = xp_judged_finding(c, c->select);
    const size_t bytes = (size_t)w->K * sizeof(int32_t);
    memcpy(use, w->mine, bytes);
    if (!f)
        return;
    f->chosen++;
    f->experts = w->E;
    f->diff.elements += w->K;
    if (memcmp(w->idx, w->mine, bytes) == 0)
        return;
    f->diff.inexact++;
    if (!check_ids(c, w))
        return;
    memcpy(use, w->idx, bytes);
    if (!check_scores(c, w) || (!xp_judge_get_options(c->j)->any_tie && !check_ties(c, v, w)))
        return;
    if (same_set(w))
        f->reordered++;
    else if (justified(w, w->mine))
        f->undecided++;
    else /* what the choice was judged on is not what the judge chose by */
        fail_at(c, w, 0, XP_C_SELECT, "the judge's own choice does not follow from the stage's keys", -1);
}

void xp_judged_select(xp_judged *c, const xp_choice *v) {
    for (int64_t t = 0; t < v->idx->dim[0]; t++) {
        const row w = {.t = t,
                       .E = v->score->dim[1],
                       .K = v->idx->dim[1],
                       .idx = xp_tensor_at(v->idx, t, 0, 0, 0),
                       .mine = xp_tensor_at(v->mine, t, 0, 0, 0),
                       .s = xp_tensor_at(v->score, t, 0, 0, 0),
                       .b = xp_tensor_at(v->tol, t, 0, 0, 0)};
        judge_row(c, v, &w, xp_tensor_at(v->use, t, 0, 0, 0));
    }
}
