/* The dialect record as text: one row a field, so that case lines, `explain`, vector sets and the comparison of two
 * presets read and print it without knowing any field. */
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xp/dialect.h"

#define INT(field, meaning) \
    { #field, NULL, (meaning), XP_FIELD_INT, offsetof(xp_dialect, field) }
#define NUMBER(field, meaning) \
    { #field, NULL, (meaning), XP_FIELD_F64, offsetof(xp_dialect, field) }
#define WORD(field, words, meaning) \
    { #field, (words), (meaning), XP_FIELD_WORD, offsetof(xp_dialect, field) }
#define DTYPE_RULE "f32|act"
#define SWITCH "off|on"

const xp_dialect_field xp_dialect_fields[] = {
    WORD(router_in, "x|recurrent_mlp|rmsnorm_scaled",
         "what the router's matrix multiplies: the normed rows, an MLP of width R, or a norm of its own over sqrt(H)"),
    WORD(logits_dtype, DTYPE_RULE, "dtype that the logits are rounded to"),
    WORD(router_bias, SWITCH, "the gate has a bias"),
    NUMBER(logit_scale, "logits are multiplied by it"),
    NUMBER(logit_softcap, "logits become cap tanh(l / cap); 0: off"),
    WORD(score, "softmax|softmax_topk|sigmoid|sqrt_softplus|sparsemixer", "how logits become scores"),
    WORD(score_dtype, DTYPE_RULE, "dtype of scores and of each step from there to the weight"),
    NUMBER(sparse_eps, "margin of the sparsemixer"),
    WORD(select_on, "score|logit|token_table|first_score",
         "what the choice looks at; first_score: the first expert on scores, the others on logits"),
    WORD(select_bias, SWITCH, "a bias an expert that the choice alone sees"),
    WORD(group_reduce, "none|max|top2sum", "how a group's score is made"),
    WORD(group_mask, "0|-inf", "what the choice sees of experts outside the kept groups"),
    WORD(masked_weight, SWITCH, "a masked expert, chosen all the same, weighs 0"),
    INT(n_group, "groups of experts"),
    INT(topk_group, "groups that are kept"),
    WORD(renorm, "none|sum|sum_plus_eps|max_eps|log_sum", "what the chosen scores are divided by"),
    NUMBER(renorm_eps, "eps of the division"),
    WORD(weight_div_k, SWITCH, "weights are divided by k, the summed output is multiplied by it"),
    NUMBER(scale, "factor of the weights or of the output"),
    WORD(scale_at, "weight|output", "where the factor goes"),
    WORD(expert_scale, "off|on|one", "weights are multiplied by a number an expert, or by one for all"),
    WORD(weight_dtype, DTYPE_RULE, "dtype that the weights are rounded to"),
    WORD(weight_at, "output|input", "the weight multiplies the expert's output or its input"),
    INT(null_experts, "ids from E that have no weights"),
    WORD(null_kind, "identity|skip", "such an id adds w x, or nothing"),
    INT(shared_rows, "shared experts that the router weighs beside the chosen ones"),
    INT(capacity, "slots that an expert takes of a rank's tokens, or of each sequence; 0: no limit"),
    NUMBER(capacity_factor, "or ceil((tokens k / experts) factor) slots; 0: off"),
    WORD(overflow, "order|priority|slots", "first come by token, by larger weight, or first choices before second"),
    WORD(pad_to_capacity, SWITCH, "every expert has that many rows, the rest zero"),
    WORD(gated, SWITCH, "act(gate) up, or act alone"),
    {"activation", "silu|gelu_tanh|relu|relu2|softcap", "the activation", XP_FIELD_WORD, offsetof(xp_dialect, act)},
    NUMBER(act_alpha, "silu is g sigmoid(alpha g)"),
    NUMBER(up_offset, "added to up"),
    NUMBER(limit, "clamps gate above and up on both sides; 0: off"),
    WORD(limit_when, "before|after", "the clamp of the gate comes before or after the activation"),
    NUMBER(gate_cap, "of the softcap activation"),
    NUMBER(up_cap, "of the softcap activation"),
    WORD(act_rounding, "each_op|once", "rounding points of the activation"),
    WORD(gate_layout, "concat|interleaved", "rows of the first matrix: gate then up, or in turn"),
    WORD(orient, "EOI|EIO", "how files store the experts' matrices"),
    WORD(expert_bias, SWITCH, "both matrices of an expert have a bias, one more rounding each"),
    WORD(accumulate, "slots_f32|eager_act|eager_f32|products_act_f32", "where products and sums are rounded"),
    WORD(dx_sum, "wide|act",
         "a token's copies' gradients are summed wide, or one after another in the activation dtype"),
    WORD(shared_gate, SWITCH, "the shared expert is multiplied by sigmoid(x . v)"),
    WORD(shared_limit, SWITCH, "the limit holds in the shared expert, too"),
    NUMBER(limit_shared, "the shared expert's own limit where it has one; 0: the experts'"),
    WORD(shared_combine, "add|average", "the shared expert is added, or both are halved"),
    NUMBER(aux_coef, "coefficient of the load-balancing loss"),
    NUMBER(z_coef, "coefficient of the z loss"),
    {NULL, NULL, NULL, XP_FIELD_INT, 0},
};

static const xp_dialect_field *find(const char *name) {
    for (const xp_dialect_field *f = xp_dialect_fields; f->name; f++) {
        if (strcmp(f->name, name) == 0)
            return f;
    }
    return NULL;
}

int xp_dialect_has(const char *name) {
    return find(name) != NULL;
}

/* The number of value in "a|b|c", or -1. */
static int word_of(const char *words, const char *value) {
    const size_t n = strlen(value);
    int at = 0;
    for (const char *w = words; n > 0; w++, at++) {
        const size_t len = strcspn(w, "|");
        if (len == n && memcmp(w, value, n) == 0)
            return at;
        w += len;
        if (!*w)
            break;
    }
    return -1;
}

static xp_status set_number(const xp_dialect_field *f, const char *value, void *at) {
    char *end;
    const double v = strtod(value, &end);
    if (end == value || *end || !isfinite(v) || (f->type == XP_FIELD_INT && (v != floor(v) || v < 0 || v > 1e6)))
        return XP_FAIL(XP_E_ARG, "%s: '%s', expected a %s", f->name, value,
                       f->type == XP_FIELD_INT ? "whole number from 0 to 1000000" : "finite number");
    if (f->type == XP_FIELD_INT)
        *(int *)at = (int)v;
    else
        *(double *)at = v;
    return XP_OK;
}

xp_status xp_dialect_set(xp_dialect *d, const char *name, const char *value) {
    const xp_dialect_field *f = find(name);
    if (!f)
        return XP_FAIL(XP_E_ARG, "%s: no field of a dialect (see `expar explain` of one)", name);
    void *at = (char *)d + f->at;
    if (f->type != XP_FIELD_WORD)
        return set_number(f, value, at);
    const int word = word_of(f->words, value);
    if (word < 0)
        return XP_FAIL(XP_E_ARG, "%s: '%s', expected %s", name, value, f->words);
    *(int *)at = word; /* every enum of the record is an int: its values are not negative and few */
    return XP_OK;
}

void xp_dialect_print(const xp_dialect *d, const xp_dialect_field *f, char *buf, size_t bytes) {
    const void *at = (const char *)d + f->at;
    if (f->type == XP_FIELD_F64) {
        const double v = *(const double *)at;
        snprintf(buf, bytes, "%.15g", v);
        if (strtod(buf, NULL) != v)
            snprintf(buf, bytes, "%.17g", v);
        return;
    }
    const int v = *(const int *)at;
    if (f->type == XP_FIELD_INT) {
        snprintf(buf, bytes, "%d", v);
        return;
    }
    const char *w = f->words;
    for (int n = 0; n < v && *w; n++) {
        w += strcspn(w, "|");
        w += *w == '|';
    }
    snprintf(buf, bytes, "%.*s", (int)strcspn(w, "|"), w);
}

/* ---- contradictions ---- */

static xp_status check_groups(const xp_dialect *d, int64_t E, int64_t K) {
    if (d->group_reduce == XP_GROUP_NONE)
        return XP_OK;
    if (d->n_group < 1 || E % d->n_group != 0)
        return XP_FAIL(XP_E_ARG, "n_group: %d, expected a divisor of the %" PRId64 " experts", d->n_group, E);
    if (d->topk_group < 1 || d->topk_group > d->n_group)
        return XP_FAIL(XP_E_ARG, "topk_group: %d, expected 1 to n_group = %d", d->topk_group, d->n_group);
    if (d->group_reduce == XP_GROUP_TOP2SUM && E / d->n_group < 2)
        return XP_FAIL(XP_E_ARG, "n_group: %d, expected groups of at least 2 of the %" PRId64 " experts", d->n_group,
                       E);
    if (d->select_on == XP_ON_TOKEN_TABLE || d->score == XP_SCORE_SPARSEMIXER)
        return XP_FAIL(XP_E_ARG, "group_reduce: no groups are possible with %s",
                       d->score == XP_SCORE_SPARSEMIXER ? "score sparsemixer" : "select_on token_table");
    (void)K;
    return XP_OK;
}

static xp_status check_scores(const xp_dialect *d, int64_t K) {
    if (d->score == XP_SCORE_SPARSEMIXER && K != 2)
        return XP_FAIL(XP_E_ARG, "score: sparsemixer chooses 2 experts a token, not k = %" PRId64, K);
    if (d->score == XP_SCORE_SPARSEMIXER && (d->renorm != XP_RENORM_NONE || d->select_bias))
        return XP_FAIL(XP_E_ARG, "%s: nothing is possible with score sparsemixer",
                       d->select_bias ? "select_bias" : "renorm");
    if (d->score == XP_SCORE_SOFTMAX_TOPK &&
        (d->renorm != XP_RENORM_NONE || d->select_on == XP_ON_SCORE || d->select_on == XP_ON_FIRST_SCORE))
        return XP_FAIL(XP_E_ARG, "score: softmax_topk chooses on logits and needs no renorm");
    if (d->select_on == XP_ON_FIRST_SCORE &&
        (d->score == XP_SCORE_SPARSEMIXER || d->group_reduce != XP_GROUP_NONE || d->select_bias))
        return XP_FAIL(XP_E_ARG, "select_on: first_score, expected no %s beside it",
                       d->score == XP_SCORE_SPARSEMIXER   ? "sparsemixer"
                       : d->group_reduce != XP_GROUP_NONE ? "group_reduce"
                                                          : "select_bias");
    return XP_OK;
}

static xp_status check_factors(const xp_dialect *d) {
    if (d->weight_div_k && (d->shared_rows > 0 || (d->scale_at == XP_SCALE_OUTPUT && d->scale != 1.0)))
        return XP_FAIL(XP_E_ARG, "weight_div_k: on, expected off beside %s",
                       d->shared_rows > 0 ? "shared_rows" : "a scale of the output");
    return XP_OK;
}

static xp_status check_numbers(const xp_dialect *d) {
    const struct {
        const char *name;
        double v;
        int ok;
    } rule[] = {
        {"logit_scale", d->logit_scale, d->logit_scale != 0},
        {"logit_softcap", d->logit_softcap, d->logit_softcap >= 0},
        {"renorm_eps", d->renorm_eps, d->renorm_eps >= 0 && (d->renorm != XP_RENORM_MAX_EPS || d->renorm_eps > 0)},
        {"limit", d->limit, d->limit >= 0},
        {"limit_shared", d->limit_shared, d->limit_shared >= 0 && (d->shared_limit || d->limit_shared == 0)},
        {"gate_cap", d->gate_cap, d->act != XP_ACT_SOFTCAP || d->gate_cap > 0},
        {"up_cap", d->up_cap, d->act != XP_ACT_SOFTCAP || d->up_cap > 0},
        {"act_alpha", d->act_alpha, d->act_alpha > 0},
        {"sparse_eps", d->sparse_eps, d->sparse_eps >= 0}};
    for (size_t i = 0; i < sizeof rule / sizeof *rule; i++) {
        if (!rule[i].ok || !isfinite(rule[i].v))
            return XP_FAIL(XP_E_ARG, "%s: %g is out of range", rule[i].name, rule[i].v);
    }
    if (d->weight_at == XP_AT_INPUT && d->null_experts > 0 && d->null_kind == XP_NULL_IDENTITY)
        return XP_FAIL(XP_E_ARG,
                       "null_kind: identity, expected skip beside weight_at input: nothing comes back to weigh");
    if (!d->gated && (d->limit > 0 || d->limit_shared > 0 || d->up_offset != 0 || d->act == XP_ACT_SOFTCAP))
        return XP_FAIL(XP_E_ARG, "gated: off, but limit, up_offset and softcap need an up projection");
    return XP_OK;
}

/* What an always chosen expert cannot be: one of a group, one of two of a mixer, or an id that stands for nothing. */
static xp_status check_shared_rows(const xp_dialect *d) {
    if (d->renorm == XP_RENORM_LOG_SUM &&
        (d->score != XP_SCORE_SIGMOID || d->score_dtype != XP_WIDE_F32 || d->masked_weight))
        return XP_FAIL(XP_E_ARG, "renorm: log_sum, expected score sigmoid in f32 and no masked_weight beside it");
    if (d->shared_rows == 0)
        return XP_OK;
    if (d->shared_rows < 0)
        return XP_FAIL(XP_E_ARG, "shared_rows: %d, expected 0 (none) or more", d->shared_rows);
    if (d->null_experts > 0 || d->group_reduce != XP_GROUP_NONE || d->score == XP_SCORE_SPARSEMIXER || d->shared_gate)
        return XP_FAIL(XP_E_ARG, "shared_rows: %d, expected 0 beside %s", d->shared_rows,
                       d->null_experts > 0                ? "null_experts"
                       : d->group_reduce != XP_GROUP_NONE ? "group_reduce"
                       : d->score == XP_SCORE_SPARSEMIXER ? "score sparsemixer"
                                                          : "shared_gate");
    if (d->aux_coef != 0 || d->z_coef != 0)
        return XP_FAIL(XP_E_ARG, "shared_rows: %d, expected 0 beside a balance loss: no family has both",
                       d->shared_rows);
    return XP_OK;
}

static xp_status check_capacity(const xp_dialect *d) {
    if (d->capacity < 0)
        return XP_FAIL(XP_E_ARG, "capacity: %d, expected 0 (no limit) or more", d->capacity);
    if (!(d->capacity_factor >= 0.0 && d->capacity_factor <= 1e6))
        return XP_FAIL(XP_E_ARG, "capacity_factor: %g, expected 0 (off) to 1e6", d->capacity_factor);
    if (d->capacity > 0 && d->capacity_factor > 0.0)
        return XP_FAIL(XP_E_ARG, "capacity: %d beside capacity_factor %g, expected one of them", d->capacity,
                       d->capacity_factor);
    if ((unsigned)d->overflow > XP_OVERFLOW_SLOTS)
        return XP_FAIL(XP_E_ARG, "overflow: %d, expected 0 (order), 1 (priority) or 2 (slots)", (int)d->overflow);
    if (d->pad_to_capacity && !xp_dialect_limits(d))
        return XP_FAIL(XP_E_ARG, "pad_to_capacity: on, expected a capacity or a capacity_factor beside it");
    return XP_OK;
}

int xp_dialect_limits(const xp_dialect *d) {
    return d->capacity > 0 || d->capacity_factor > 0.0;
}

int64_t xp_dialect_capacity(const xp_dialect *d, int64_t tokens, int64_t E, int64_t K) {
    if (d->capacity_factor > 0.0)
        return (int64_t)ceil((double)(tokens * K) / (double)E * d->capacity_factor);
    return d->capacity > 0 ? d->capacity : tokens * K;
}

xp_status xp_dialect_check(const xp_dialect *d, int64_t E, int64_t K) {
    if (K < 1 || K > E + d->null_experts)
        return XP_FAIL(XP_E_ARG, "K: %" PRId64 ", expected 1 to %" PRId64 " experts", K, E + d->null_experts);
    XP_TRY(check_groups(d, E + d->null_experts, K));
    XP_TRY(check_shared_rows(d));
    XP_TRY(check_scores(d, K));
    XP_TRY(check_factors(d));
    XP_TRY(check_capacity(d));
    return check_numbers(d);
}

int64_t xp_dialect_rows(const xp_dialect *d, int64_t E) {
    return E + d->null_experts + d->shared_rows;
}

int64_t xp_dialect_factors(const xp_dialect *d, int64_t E) {
    return d->expert_scale == XP_FACTOR_ONE ? 1 : xp_dialect_rows(d, E);
}

double xp_dialect_shared_limit(const xp_dialect *d) {
    if (!d->shared_limit)
        return 0.0;
    return d->limit_shared > 0.0 ? d->limit_shared : d->limit;
}

double xp_dialect_weight_factor(const xp_dialect *d, int64_t K) {
    return (d->scale_at == XP_SCALE_WEIGHT ? d->scale : 1.0) / (d->weight_div_k ? (double)K : 1.0);
}

double xp_dialect_output_factor(const xp_dialect *d, int64_t K) {
    if (d->weight_div_k)
        return (double)K;
    return d->scale_at == XP_SCALE_OUTPUT ? d->scale : 1.0;
}

int xp_dialect_equal(const xp_dialect *a, const xp_dialect *b) {
    for (const xp_dialect_field *f = xp_dialect_fields; f->name; f++) {
        const char *at = (const char *)a + f->at, *bt = (const char *)b + f->at;
        if (f->type == XP_FIELD_F64 ? *(const double *)(const void *)at != *(const double *)(const void *)bt
                                    : *(const int *)(const void *)at != *(const int *)(const void *)bt)
            return 0;
    }
    return 1;
}
