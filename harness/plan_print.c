/* The plan as text and as JSON. It must not derive anything that plan.c does not: a number that is printed is a number
 * that the step reads. */
#include <inttypes.h>
#include <string.h>

#include "dialect_text.h"
#include "plan.h"

/* ---- pieces ---- */

/* "1.13 GiB": three significant digits, in a buffer of the caller. */
static const char *size_text(double bytes, char *buf, size_t room) {
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    int u = 0;
    while (bytes >= 1000 && u < 5) {
        bytes /= 1024;
        u++;
    }
    snprintf(buf, room, "%.*f %s", u == 0 || bytes >= 100 ? 0 : bytes >= 10 ? 1 : 2, bytes, unit[u]);
    return buf;
}

/* "17.2 T": counts in powers of 1000. */
static const char *count_text(double n, char *buf, size_t room) {
    static const char *const unit[] = {"", " k", " M", " G", " T", " P", " E"};
    int u = 0;
    while (n >= 999.5 && u < 6) {
        n /= 1000;
        u++;
    }
    snprintf(buf, room, "%.*f%s", u == 0 || n >= 100 ? 0 : n >= 10 ? 1 : 2, n, unit[u]);
    return buf;
}

static void shape_text(const xp_plan_param *q, char *buf, size_t room) {
    if (q->ndim == 1)
        snprintf(buf, room, "[%" PRId64 "]", q->shape[0]);
    else if (q->ndim == 2)
        snprintf(buf, room, "[%" PRId64 ",%" PRId64 "]", q->shape[0], q->shape[1]);
    else
        snprintf(buf, room, "[%" PRId64 ",%" PRId64 ",%" PRId64 "]", q->shape[0], q->shape[1], q->shape[2]);
}

/* Ranks that hold, send and compute the same: [first, last] of them, with the cost of the first. */
static int same_cost(const xp_plan_cost *a, const xp_plan_cost *b) {
    int same = a->tokens == b->tokens && a->elements == b->elements && a->total_bytes == b->total_bytes &&
               a->flop_forward == b->flop_forward;
    for (int k = 0; k < XP_KIND_JUDGE; k++)
        same = same && a->bytes[k] == b->bytes[k];
    for (int x = 0; x < XP_NAXIS; x++)
        same = same && a->sent[x] == b->sent[x];
    return same;
}

static int run_of_ranks(const xp_plan *p, int first, xp_plan_cost *out) {
    xp_plan_cost_of(p, first, out);
    int last = first;
    for (xp_plan_cost next; last + 1 < p->mesh.world; last++) {
        xp_plan_cost_of(p, last + 1, &next);
        if (!same_cost(out, &next))
            break;
    }
    return last;
}

/* ---- text ---- */

static void print_model(const xp_plan *p, FILE *f) {
    const xp_model *m = &p->model;
    char a[64];
    fprintf(f, "model      %s%s%s, dialect %s\n", m->name, *m->model_type ? ": " : "", m->model_type, m->dialect.name);
    fprintf(f, "           %s\n", m->dialect.meaning);
    for (int n = 1; n <= m->others; n++) {
        char text[XP_FORMULA_TEXT];
        xp_model_record_text(m, n, text, sizeof text);
        fprintf(f, "           %s\n", text);
    }
    fprintf(f, "           %d MoE block%s of %d layer%s; H %" PRId64 ", F %" PRId64 ", E %" PRId64 ", k %" PRId64,
            p->blocks, p->blocks == 1 ? "" : "s", m->layers, m->layers == 1 ? "" : "s", m->H, m->F, m->E, m->K);
    if (m->latent)
        fprintf(f, ", experts' width %" PRId64, m->latent);
    if (m->router_width)
        fprintf(f, ", router's width %" PRId64, m->router_width);
    xp_around_print(m->around, a, sizeof a);
    if (m->around)
        fprintf(f, ", around them %s", a);
    if (m->S)
        fprintf(f, ", shared expert %" PRId64 "%s", m->S, m->dialect.shared_gate ? " with gate" : "");
    fprintf(f, "; %s parameters\n", count_text((double)p->elements, a, sizeof a));
    if (m->shrink > 1)
        fprintf(f, "           widths divided by %d\n", m->shrink);
    fprintf(f,
            "           vocabulary %d, the bytes of a text (the model's own: %" PRId64
            "); weights seeded, not published ones; no attention\n",
            XP_VOCAB, m->vocab);
}

static void print_options(const xp_plan *p, FILE *f) {
    const xp_step_options *o = &p->opt;
    const xp_mesh_spec *s = &p->mesh;
    char mesh[XP_MESH_TEXT];
    if (xp_mesh_spec_print(s, mesh, sizeof mesh) != XP_OK)
        snprintf(mesh, sizeof mesh, "%s", s->kind);
    fprintf(f, "mesh       %s: world %d = dp %d x fsdp %d = ep_dp %d x ep %d x ep_fsdp %d\n", mesh, s->world, s->dp,
            s->fsdp, s->ep_dp, s->ep, s->ep_fsdp);
    fprintf(f, "tokens     %" PRId64 " in the global batch, dealt %s; seed %" PRIu64 "\n", o->tokens,
            o->deterministic ? "in whole blocks of 16 (deterministic: the same bits on every mesh)"
                             : "as equally as possible",
            o->seed);
    fprintf(f, "dtypes     act %s, param %s, grad %s, reduce %s, router %s; master weights, moments, norm, clip f32\n",
            xp_dtype_name(o->act), xp_dtype_name(o->param), xp_dtype_name(o->grad), xp_dtype_name(o->reduce),
            xp_dtype_name(o->router));
}

static void print_params(const xp_plan *p, FILE *f) {
    fprintf(f, "\n%-56s %-18s %-7s %-6s %s\n", "parameter", "shape", "place", "decay", "initial values");
    for (int i = 0; i < p->params; i++) {
        const xp_plan_param *q = &p->param[i];
        if (q->block > 0)
            continue; /* every block is like the first one */
        char shape[64], name[96];
        shape_text(q, shape, sizeof shape);
        if (q->block == 0 && p->blocks > 1)
            snprintf(name, sizeof name, "model.layers.*.%s (%d)", strchr(q->name + 13, '.') + 1, p->blocks);
        else
            snprintf(name, sizeof name, "%s", q->name);
        fprintf(f, "%-56s %-18s %-7s %-6s %g +- %.3g\n", name, shape, q->expert ? "expert" : "dense",
                q->decay ? "yes" : "no", q->mean, q->std);
    }
}

static void print_groups(const xp_plan *p, FILE *f) {
    const xp_mesh_spec *s = &p->mesh;
    const int edp = s->ep_fsdp * s->ep_dp;
    fprintf(
        f,
        "\ndense      rows over fsdp (%d), copies over dp (%d); gathered over fsdp; gradient summed over world (%d)\n",
        s->fsdp, s->dp, s->world);
    fprintf(f,
            "expert     experts over ep (%d, %" PRId64 " each), rows over ep_fsdp (%d), copies over ep_dp (%d);\n"
            "           gathered over ep_fsdp; gradient summed over edp (%d)\n",
            s->ep, p->model.E / s->ep, s->ep_fsdp, s->ep_dp, edp);
    if (p->opt.micro > 1)
        fprintf(f,
                "micro      %d micro-batches of %" PRId64 " tokens, gradients summed in the f32 shards; what follows "
                "holds one, sends and computes all\n",
                p->opt.micro, xp_plan_micro_tokens(p));
    fprintf(f, "divisor    valid tokens of the global batch (at most %" PRId64 "), for dense and expert alike\n",
            p->opt.tokens);
    fprintf(f, "norm       exact, each logical element once: the copy at place 0 counts; clip at %g (eps %g)\n",
            p->opt.max_norm, p->opt.clip_eps);
    fprintf(f, "losses     cross-entropy; balance x %g, z x %g\n", p->opt.aux_coef, p->opt.z_coef);
    if (p->opt.optimizer == XP_ADAMW)
        fprintf(f, "optimizer  adamw, lr %g, betas %g %g, eps %g, decay %g\n", p->opt.lr, p->opt.beta1, p->opt.beta2,
                p->opt.eps, p->opt.weight_decay);
    else
        fprintf(f, "optimizer  sgd, lr %g, momentum %g, decay %g\n", p->opt.lr, p->opt.momentum, p->opt.weight_decay);
    fprintf(f, "           path %s: %s\n", xp_optim_path_name(p->opt.path), p->path_why);
    fprintf(f, "           foreach: %s\n", p->foreach_why);
}

static void print_memory(const xp_plan *p, FILE *f) {
    char t[6][24];
    fprintf(f, "\nmemory of a rank (expert rows at capacity; workspace of kernel rows and the digest not counted)\n");
    fprintf(f, "%-12s %8s %10s %10s %10s %10s %10s %10s\n", "ranks", "tokens", "param", "grad", "optim", "act",
            "buffer", "total");
    xp_plan_cost c;
    for (int first = 0, last; first < p->mesh.world; first = last + 1) {
        char ranks[32];
        last = run_of_ranks(p, first, &c);
        snprintf(ranks, sizeof ranks, first == last ? "%d" : "%d-%d", first, last);
        for (int k = 0; k < XP_KIND_JUDGE; k++)
            size_text(c.bytes[k], t[k], sizeof t[k]);
        size_text(c.total_bytes, t[5], sizeof t[5]);
        fprintf(f, "%-12s %8" PRId64 " %10s %10s %10s %10s %10s %10s\n", ranks, c.tokens, t[XP_KIND_PARAM],
                t[XP_KIND_GRAD], t[XP_KIND_OPTIM], t[XP_KIND_ACT], t[XP_KIND_BUFFER], t[5]);
    }
}

static void print_traffic(const xp_plan *p, FILE *f) {
    static const xp_axis axis[] = {XP_FSDP, XP_EP_FSDP, XP_EP, XP_WORLD, XP_EDP};
    enum { AXES = sizeof axis / sizeof axis[0] };
    char t[AXES][24], fwd[24], bwd[24];
    fprintf(f, "\nsent and computed by a rank in one step (routing taken as balanced)\n");
    fprintf(f, "%-12s %10s %10s %10s %10s %10s %12s %12s\n", "ranks", "fsdp", "ep_fsdp", "ep", "world", "edp",
            "FLOP forward", "backward");
    xp_plan_cost c;
    for (int first = 0, last; first < p->mesh.world; first = last + 1) {
        char ranks[32];
        last = run_of_ranks(p, first, &c);
        snprintf(ranks, sizeof ranks, first == last ? "%d" : "%d-%d", first, last);
        for (int x = 0; x < AXES; x++)
            size_text(c.sent[axis[x]], t[x], sizeof t[x]);
        fprintf(f, "%-12s %10s %10s %10s %10s %10s %12s %12s\n", ranks, t[0], t[1], t[2], t[3], t[4],
                count_text(c.flop_forward, fwd, sizeof fwd), count_text(c.flop_backward, bwd, sizeof bwd));
    }
}

/* '\n'-separated items: one a line, or flowing between two margins with commas between them. */
static void print_lines(const char *title, const char *text, int flow, FILE *f) {
    if (!*text)
        return;
    fprintf(f, "\n%s\n ", title);
    size_t column = 1;
    while (*text) {
        const size_t n = strcspn(text, "\n");
        if (column > 1 && (!flow || column + n > 100)) {
            fprintf(f, "\n ");
            column = 1;
        }
        fprintf(f, " %.*s%s", (int)n, text, flow && text[n] ? "," : "");
        column += n + 2;
        text += n + (text[n] == '\n');
    }
    fprintf(f, "\n");
}

xp_status xp_plan_print(const xp_plan *p, FILE *f) {
    print_model(p, f);
    print_options(p, f);
    print_params(p, f);
    print_groups(p, f);
    print_memory(p, f);
    print_traffic(p, f);
    print_lines("fields the file does not have", p->model.assumed, 0, f);
    print_lines("keys of the file that are not read", p->model.unread, 1, f);
    return ferror(f) ? XP_FAIL(XP_E_IO, "plan: cannot write the output") : XP_OK;
}

/* ---- JSON ---- */

static json_t *lines_json(const char *text) {
    json_t *list = json_array();
    while (list && *text) {
        const size_t n = strcspn(text, "\n");
        json_array_append_new(list, json_stringn(text, n));
        text += n + (text[n] == '\n');
    }
    return list;
}

static json_t *records_json(const xp_model *m) {
    json_t *list = json_array();
    for (int n = 1; n <= m->others; n++) {
        char layers[256], text[XP_FORMULA_TEXT];
        xp_model_record_layers(m, n, layers, sizeof layers);
        (void)xp_dialect_differences(&m->other[n - 1], &m->dialect, 0, text, sizeof text);
        json_array_append_new(
            list, json_pack("{s:s, s:s, s:s}", "layers", layers, "dialect", m->other[n - 1].name, "differs", text));
    }
    return list;
}

static json_t *model_json(const xp_plan *p) {
    const xp_model *m = &p->model;
    json_t *layers = json_array();
    char around[XP_AROUND_TEXT];
    xp_around_print(m->around, around, sizeof around);
    for (int b = 0; b < p->blocks; b++)
        json_array_append_new(layers, json_integer(p->layer[b]));
    return json_pack(
        "{s:s, s:s, s:s, s:i, s:o, s:I, s:I, s:I, s:I, s:I, s:b, s:I, s:i, s:f, s:i, s:s, s:I, s:o, s:o, s:o, s:I, s:I, s:s}",
        "name", m->name, "model_type", m->model_type, "dialect", m->dialect.name, "layers", m->layers, "moe_layers",
        layers, "H", (json_int_t)m->H, "F", (json_int_t)m->F, "E", (json_int_t)m->E, "k", (json_int_t)m->K, "S",
        (json_int_t)m->S, "shared_gate", m->S && m->dialect.shared_gate, "published_vocabulary", (json_int_t)m->vocab,
        "vocabulary", XP_VOCAB, "norm_eps", m->norm_eps, "shrink", m->shrink, "torch_dtype", m->torch_dtype,
        "parameters", (json_int_t)p->elements, "other_dialects", records_json(m), "unread", lines_json(m->unread),
        "assumed", lines_json(m->assumed), "latent", (json_int_t)m->latent, "router_width", (json_int_t)m->router_width,
        "around", around);
}

static json_t *mesh_json(const xp_mesh_spec *s) {
    char text[XP_MESH_TEXT];
    if (xp_mesh_spec_print(s, text, sizeof text) != XP_OK)
        return NULL;
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i}", "text", text, "world", s->world, "dp", s->dp, "fsdp",
                     s->fsdp, "ep", s->ep, "ep_fsdp", s->ep_fsdp, "ep_dp", s->ep_dp);
}

static json_t *options_json(const xp_step_options *o) {
    char seed[24]; /* as text: it may exceed what JSON integers hold */
    snprintf(seed, sizeof seed, "%" PRIu64, o->seed);
    return json_pack(
        "{s:I, s:s, s:s, s:s, s:s, s:s, s:b, s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:s, s:i}",
        "tokens", (json_int_t)o->tokens, "act", xp_dtype_name(o->act), "param", xp_dtype_name(o->param), "grad",
        xp_dtype_name(o->grad), "reduce", xp_dtype_name(o->reduce), "router", xp_dtype_name(o->router), "deterministic",
        o->deterministic != 0, "optimizer", xp_optimizer_name(o->optimizer), "lr", o->lr, "beta1", o->beta1, "beta2",
        o->beta2, "eps", o->eps, "weight_decay", o->weight_decay, "momentum", o->momentum, "max_norm", o->max_norm,
        "clip_eps", o->clip_eps, "aux_coef", o->aux_coef, "z_coef", o->z_coef, "seed", seed, "micro", o->micro);
}

static json_t *param_json(const xp_plan *p, int i) {
    const xp_plan_param *q = &p->param[i];
    const int places = xp_mesh_axis_size(&p->mesh, q->gather);
    json_t *shape = json_array(), *rows = json_array();
    for (int d = 0; d < q->ndim; d++)
        json_array_append_new(shape, json_integer(q->shape[d]));
    for (int k = 0; k < places; k++) {
        int64_t start, count;
        xp_plan_chunk(q->R, places, k, &start, &count);
        json_array_append_new(rows, json_integer(count));
    }
    return json_pack("{s:s, s:o, s:s, s:s, s:o, s:s, s:s, s:I, s:b, s:f, s:f}", "name", q->name, "shape", shape,
                     "place", q->expert ? "expert" : "dense", "rows_over", xp_axis_name(q->gather), "rows", rows,
                     "copies_over", q->expert ? "ep_dp" : "dp", "summed_over", xp_axis_name(q->reduce),
                     "experts_per_rank", (json_int_t)(q->expert ? q->G / p->mesh.ep : 0), "decay", q->decay, "mean",
                     q->mean, "std", q->std);
}

static json_t *cost_json(int first, int last, const xp_plan_cost *c) {
    json_t *bytes = json_object(), *sent = json_object();
    static const char *const kind[XP_KIND_JUDGE] = {
        [XP_KIND_PARAM] = "param", [XP_KIND_GRAD] = "grad",     [XP_KIND_OPTIM] = "optim",
        [XP_KIND_ACT] = "act",     [XP_KIND_BUFFER] = "buffer",
    };
    for (int k = 0; k < XP_KIND_JUDGE; k++)
        json_object_set_new(bytes, kind[k], json_real(c->bytes[k]));
    json_object_set_new(bytes, "total", json_real(c->total_bytes));
    for (int x = 0; x < XP_NAXIS; x++)
        json_object_set_new(sent, xp_axis_name((xp_axis)x), json_real(c->sent[x]));
    return json_pack("{s:i, s:i, s:I, s:I, s:I, s:f, s:f, s:o, s:o, s:f, s:f}", "first", first, "last", last, "token0",
                     (json_int_t)c->token0, "tokens", (json_int_t)c->tokens, "elements", (json_int_t)c->elements,
                     "expert_rows", c->expert_rows, "expert_room", c->expert_room, "bytes", bytes, "sent", sent,
                     "flop_forward", c->flop_forward, "flop_backward", c->flop_backward);
}

static json_t *params_json(const xp_plan *p) {
    json_t *list = json_array();
    for (int i = 0; i < p->params; i++)
        json_array_append_new(list, param_json(p, i));
    return list;
}

static json_t *ranks_json(const xp_plan *p) {
    json_t *list = json_array();
    xp_plan_cost c;
    for (int first = 0, last; first < p->mesh.world; first = last + 1) {
        last = run_of_ranks(p, first, &c);
        json_array_append_new(list, cost_json(first, last, &c));
    }
    return list;
}

xp_status xp_plan_json(const xp_plan *p, json_t **out) {
    /* json_pack fails as a whole when one of its parts could not be made. */
    *out = json_pack("{s:s, s:o, s:o, s:o, s:o, s:{s:s, s:s, s:b, s:s}, s:s, s:o}", "schema", "expar.plan/1", "model",
                     model_json(p), "mesh", mesh_json(&p->mesh), "options", options_json(&p->opt), "parameters",
                     params_json(p), "optimizer_path", "path", xp_optim_path_name(p->opt.path), "why", p->path_why,
                     "foreach_legal", p->foreach_legal, "foreach", p->foreach_why, "divisor", "valid tokens", "ranks",
                     ranks_json(p));
    return *out ? XP_OK : XP_FAIL(XP_E_NOMEM, "plan: no memory for the JSON object");
}
