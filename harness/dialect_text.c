/* A dialect in words and formulas: see dialect_text.h. Must not know a preset by its name. */
#include "dialect_text.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void append(char *text, const char *format, ...) {
    const size_t n = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + n, XP_FORMULA_TEXT - n, format, args);
    va_end(args);
}

static int in_act(const xp_dialect *d) {
    return d->score_dtype == XP_WIDE_ACT;
}

/* q(...) of the score's dtype. */
static const char *open_of(const xp_dialect *d) {
    return in_act(d) ? "r(" : "";
}

static const char *close_of(const xp_dialect *d) {
    return in_act(d) ? ")" : "";
}

static void logits(const xp_dialect *d, char *text) {
    const int act = d->logits_dtype == XP_WIDE_ACT, mlp = d->router_in == XP_ROUTER_RECURRENT_MLP;
    if (mlp)
        append(text, "h = r(x Wd^T + bd), plus r(h e) of the h of the MoE block before; a = r(gelu(r(fc1 rmsnorm h))); "
                     "a = r(gelu(r(fc2 a))); ");
    if (d->router_in == XP_ROUTER_RMSNORM_SCALED)
        append(text, "a = r(rmsnorm(h) / sqrt(H)) of the block's input h; ");
    append(text, act ? "l = r(%s W^T)" : "l = %s W^T in f32", d->router_in == XP_ROUTER_X ? "x" : "a");
    if (d->router_bias)
        append(text, act ? "; l = r(l + b)" : "; l = l + b");
    if (d->logit_scale != 1.0)
        append(text, "; l = %g l", d->logit_scale);
    if (d->logit_softcap > 0.0)
        append(text, "; l = %g tanh(l / %g)", d->logit_softcap, d->logit_softcap);
}

static void scores(const xp_dialect *d, char *text) {
    const char *o = open_of(d), *c = close_of(d);
    if (d->score == XP_SCORE_SOFTMAX)
        append(text, "s = %ssoftmax(l)%s over all experts, in f32%s", o, c, in_act(d) ? ", rounded" : "");
    else if (d->score == XP_SCORE_SIGMOID)
        append(text, "s = %ssigmoid(l)%s", o, c);
    else if (d->score == XP_SCORE_SQRT_SOFTPLUS)
        append(text, "s = %ssqrt(%ssoftplus(l)%s)%s", o, o, c, c);
    else if (d->score == XP_SCORE_SOFTMAX_TOPK)
        append(text, "none before the choice");
    else
        append(text, "an expert is out where (m - l) / max(|l|, m) > %g, m = largest l left", 2.0 * d->sparse_eps);
}

static void choice(const xp_dialect *d, char *text) {
    if (d->select_on == XP_ON_TOKEN_TABLE) {
        append(text, "S = table[token id]");
        return;
    }
    const char *key = d->select_on == XP_ON_LOGIT ? "l" : "s";
    if (d->group_reduce != XP_GROUP_NONE && d->n_group > 1)
        append(text, "of %d groups the %d with the largest %s of %s%s stay, others count as %s; ", d->n_group,
               d->topk_group, d->group_reduce == XP_GROUP_MAX ? "member" : "sum of two members", key,
               d->select_bias ? " + c" : "", d->group_mask == XP_MASK_ZERO ? "0" : "-inf");
    if (d->select_on == XP_ON_FIRST_SCORE)
        append(text, "S = the largest s, then the largest l of the others");
    else
        append(text, "S = top-k of %s%s", key, d->select_bias ? " + c" : "");
    append(text, "%s; equal: the lower index", d->shared_rows > 0 ? " of the first E" : "");
}

static void weights(const xp_dialect *d, char *text) {
    const char *o = open_of(d), *c = close_of(d);
    if (d->shared_rows > 0)
        append(text, "S gains the last %d rows, one a shared expert; ", d->shared_rows);
    if (d->score == XP_SCORE_SOFTMAX_TOPK)
        append(text, "w = %ssoftmax(l[S])%s", o, c);
    else if (d->score == XP_SCORE_SPARSEMIXER)
        append(text, "w = %ssoftmax of the experts inside%s, slot by slot", o, c);
    else if (d->renorm != XP_RENORM_LOG_SUM)
        append(text, "w = s[S]%s", d->masked_weight ? ", 0 in a group that went" : "");
    if (d->renorm == XP_RENORM_LOG_SUM)
        append(text, "w = exp(log s[S] - log sum exp log s[S])");
    else if (d->renorm == XP_RENORM_SUM)
        append(text, "; w = %sw / %ssum w%s%s", o, o, c, c);
    else if (d->renorm == XP_RENORM_SUM_PLUS_EPS)
        append(text, "; w = %sw / %s%ssum w%s + %g%s%s", o, o, o, c, d->renorm_eps, c, c);
    else if (d->renorm == XP_RENORM_MAX_EPS)
        append(text, "; w = %sw / max(%ssum w%s, %g)%s", o, o, c, d->renorm_eps, c);
    if (d->weight_div_k)
        append(text, "; w = %sw / k%s", o, c);
    if (d->scale != 1.0 && d->scale_at == XP_SCALE_WEIGHT)
        append(text, "; w = %s%g w%s", o, d->scale, c);
    if (d->expert_scale != XP_FACTOR_NONE)
        append(text, d->expert_scale == XP_FACTOR_ONE ? "; w = %sw e%s" : "; w = %sw e[S]%s", o, c);
    append(text, d->weight_dtype == XP_WIDE_ACT ? "; r(w)" : "; left in f32");
    if (d->null_experts > 0 && d->null_kind == XP_NULL_SKIP)
        append(text, "; 0 for ids from E on");
}

static void room(const xp_dialect *d, char *text) {
    static const char *const first[] = {"lower tokens", "larger w", "first choices, then second ones, lower tokens"};
    if (!xp_dialect_limits(d)) {
        append(text, "none: an expert takes every slot that names it");
        return;
    }
    if (d->capacity > 0)
        append(text, "an expert takes %d slots of a sequence, or of the rank's tokens", d->capacity);
    else
        append(text, "an expert takes ceil(%g T k / E) slots of a sequence, or of the rank's tokens",
               d->capacity_factor);
    append(text, ", %s first; the others add nothing%s", first[d->overflow],
           d->pad_to_capacity ? "; zero rows up to that number" : "");
}

static const char *activation(const xp_dialect *d) {
    static const char *const name[] = {"silu g", "gelu_tanh g", "relu g", "relu(g)^2", "softcap"};
    return name[d->act];
}

static void experts(const xp_dialect *d, char *text) {
    const int each = d->act_rounding == XP_ROUND_EACH;
    append(text, d->gated ? "(g, u) = r(x W1^T)%s%s" : "g = r(x W1^T)%s%s", d->expert_bias ? "; r(. + b1)" : "",
           d->gated && d->gate_layout == XP_GATE_INTERLEAVED ? ", rows in turn" : "");
    if (d->limit > 0.0)
        append(text, "; u in [-%g, %g], %s at most %g", d->limit, d->limit,
               d->limit_when == XP_LIMIT_BEFORE ? "g" : activation(d), d->limit);
    if (d->act == XP_ACT_SOFTCAP)
        append(text, "; a = r(%g tanh(g / %g) sigmoid(g) %g tanh(u / %g))", d->gate_cap, d->gate_cap, d->up_cap,
               d->up_cap);
    else if (d->up_offset != 0.0 || d->act_alpha != 1.0)
        append(text, "; a = r(r(u + %g) r(g r(sigmoid(r(%g g)))))", d->up_offset, d->act_alpha);
    else if (d->gated)
        append(text, each ? "; a = r(r(%s) u)" : "; a = r(%s u)", activation(d));
    else
        append(text, "; a = r(%s)", activation(d));
    append(text, "; y = r(a W2^T)%s", d->expert_bias ? "; r(y + b2)" : "");
}

static void sum(const xp_dialect *d, char *text) {
    static const char *const how[] = {
        "y = r(sum over slots of w y_e, in f32)", "experts ascending, y = r(y + r(w y_e))",
        "experts ascending, y = y + w y_e in f32, one r", "y = r(sum over slots of r(w y_e), in f32)"};
    if (d->weight_at == XP_AT_INPUT)
        append(text, "the experts read r(w x); ");
    append(text, "%s", how[d->accumulate]);
    if (d->weight_at == XP_AT_INPUT)
        append(text, " with w = 1");
    if (d->scale_at == XP_SCALE_OUTPUT && d->scale != 1.0)
        append(text, "; y = r(%g y)", d->scale);
    if (d->weight_div_k)
        append(text, "; y = r(k y)");
    if (d->null_experts > 0)
        append(text, "; ids from E on (%d) %s", d->null_experts,
               d->null_kind == XP_NULL_IDENTITY ? "add w x" : "add nothing");
}

static void shared(const xp_dialect *d, char *text) {
    if (d->shared_rows > 0)
        append(text, "%d experts, z = r(sum in f32 of r(r(a w) W2^T)) with the same a of x, w of the expert's row",
               d->shared_rows);
    else
        append(text, "z = the same MLP of x");
    if (d->limit_shared > 0.0)
        append(text, " with limit %g", d->limit_shared);
    else if (d->limit > 0.0 && !d->shared_limit)
        append(text, " without limit");
    append(text, "%s%s", d->shared_gate ? ", z = r(r(sigmoid(r(x v))) z)" : "",
           d->shared_rows > 0 ? "" : ", where the model has one");
    append(text, d->shared_combine == XP_COMBINE_AVERAGE ? "; y = r(r(y + z) / 2)" : "; y = r(y + z)");
}

int xp_dialect_formula(const xp_dialect *d, int i, const char **out_key, char *text) {
    static const struct {
        const char *key;
        void (*say)(const xp_dialect *, char *);
    } line[] = {{"logits", logits}, {"scores", scores},   {"choice", choice}, {"weights", weights},
                {"capacity", room}, {"experts", experts}, {"sum", sum},       {"shared", shared}};
    if (i < 0 || i >= (int)(sizeof line / sizeof *line))
        return 0;
    text[0] = '\0';
    *out_key = line[i].key;
    line[i].say(d, text);
    return 1;
}

/* ---- neighbours ---- */

static int counts(const xp_dialect_field *f, int all) {
    return all ||
           (strcmp(f->name, "aux_coef") != 0 && strcmp(f->name, "z_coef") != 0 && strcmp(f->name, "orient") != 0);
}

int xp_dialect_differences(const xp_dialect *a, const xp_dialect *b, int all, char *text, size_t bytes) {
    char va[64], vb[64];
    int n = 0;
    if (bytes)
        text[0] = '\0';
    for (const xp_dialect_field *f = xp_dialect_fields; f->name; f++) {
        xp_dialect_print(a, f, va, sizeof va);
        xp_dialect_print(b, f, vb, sizeof vb);
        if (strcmp(va, vb) == 0 || !counts(f, all))
            continue;
        const size_t at = bytes ? strlen(text) : 0;
        if (bytes)
            snprintf(text + at, bytes - at, "%s%s %s, not %s", n ? "; " : "", f->name, va, vb);
        n++;
    }
    return n;
}

const xp_dialect *xp_dialect_neighbour(const xp_dialect *d, int n) {
    int taken = 0;
    for (int far = 1; far < 64; far++) {
        for (const xp_dialect *o = xp_dialects; o->name; o++) {
            if (xp_dialect_differences(d, o, 0, NULL, 0) == far && taken++ == n)
                return o;
        }
    }
    return NULL;
}

/* ---- the records of a model ---- */

void xp_model_record_text(const xp_model *m, int n, char *text, size_t bytes) {
    const xp_dialect *d = &m->other[n - 1];
    char layers[64], fields[512];
    xp_model_record_layers(m, n, layers, sizeof layers);
    (void)xp_dialect_differences(d, &m->dialect, 0, fields, sizeof fields);
    snprintf(text, bytes, "layer%s %s: %s; %s", strpbrk(layers, "-,") ? "s" : "", layers, d->name, fields);
}
