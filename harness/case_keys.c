/* What the keys of case lines mean, for people. Whether a line takes a key is not said here again: the parser is asked,
 * with a value that is right wherever the key is. */
#include <stdio.h>
#include <string.h>

#include "case.h"

static const struct {
    xp_case_key key;
    const char *right;
} keys[] = {
    {{"T", "N", "tokens of the global batch"}, "24"},
    {{"E", "N", "experts"}, "8"},
    {{"K", "N", "slots a token (top-k)"}, "2"},
    {{"H", "N", "hidden width"}, "16"},
    {{"F", "N", "width of an expert"}, "12"},
    {{"S", "N", "width of the shared expert; 0: none"}, "8"},
    {{"D", "N", "width of the experts' rows, between two maps of the block; 0: H"}, "8"},
    {{"V", "N", "vocabulary"}, "32"},
    {{"N", "N", "elements, or columns of a parameter"}, "100"},
    {{"G", "N", "groups of a parameter: its experts"}, "1"},
    {{"R", "N", "rows of a parameter; of a layer: width of its router's MLP, where router_in says one"}, "8"},
    {{"Q", "N", "segments of a flat buffer"}, "3"},
    {{"Y", "N", "MoE layers"}, "1"},
    {{"dtype", "TYPE", "activations, and whatever follows from them"}, "f32"},
    {{"act", "TYPE", "the same"}, "f32"},
    {{"param", "TYPE", "gathered parameters and compute"}, "f32"},
    {{"shared", "TYPE", "the shared expert's parameters and compute; as param"}, "f32"},
    {{"gate", "TYPE", "the router's weights; as param"}, "f32"},
    {{"router", "TYPE", "the router's softmax"}, "f32"},
    {{"logits", "TYPE", "gate logits"}, "f32"},
    {{"weight", "TYPE", "combine weights"}, "f32"},
    {{"grad", "TYPE", "weight gradients before their reduction"}, "f32"},
    {{"reduce", "TYPE", "the reduction of gradients"}, "f32"},
    {{"expert_reduce", "TYPE", "the reduction of the experts' gradients; as reduce"}, "f32"},
    {{"code", "TYPE", "codes of a quantised matrix"}, "e4m3"},
    {{"scale", "TYPE", "scales of its blocks"}, "f32"},
    {{"master", "TYPE", "master weights"}, "f32"},
    {{"moment", "TYPE", "the optimizer's moments"}, "f32"},
    {{"model", "NAME", "sizes and dialect of a model of `expar list models`, or of a config.json"}, "x"},
    {{"dialect", "NAME", "of `expar list dialects`; each field of its record is a key, too"}, "hf-5.24/qwen3_moe"},
    {{"shrink", "N", "divides the widths"}, "1"},
    {{"layers", "N", "MoE layers, or the model's first layers"}, "1"},
    {{"steps", "N", "training steps"}, "1"},
    {{"micro", "N", "micro-batches, whose gradients are summed before the norm"}, "1"},
    {{"deterministic", "0|1", "fold by global blocks of 16 tokens: the same bits on every mesh"}, "0"},
    {{"divide", "once|world", "gradients: after the reduction by all tokens, or before it by the world, as FSDP2"},
     "once"},
    {{"order", "slot_token|token", "of an expert's rows"}, "token"},
    {{"align", "1|16|128", "rows of an expert are padded to a multiple of it"}, "1"},
    {{"around", "NAME+NAME", "of " XP_AROUND_NAMES ": norms and a bias around the experts"}, "block_norm"},
    {{"with", "NAME+NAME", "optional operands that are there"}, NULL},
    {{"data", "KIND", "of `expar list data`"}, "real"},
    {{"mesh", "SPEC", "as sim:dp=2,fsdp=4,ep=4"}, "sim:fsdp=1"},
    {{"seed", "N", "of all generated data"}, "1"},
    {{"expect", "local|zero|one_expert", "the one vacuous result that is meant"}, "zero"},
    {{"name", "WORD", "of the case, in a file"}, "x"},
};

static const char *optional_operand(const xp_stage *s) {
    for (int i = 0; s && i < s->operands; i++) {
        if (s->operand[i].optional)
            return s->operand[i].name;
    }
    return NULL;
}

static int takes(const char *head, const char *key, const char *right, const char *beside) {
    char line[160];
    snprintf(line, sizeof line, "%s %s=%s%s", head, key, right ? right : "", beside);
    return xp_case_expand(line, NULL, NULL, NULL, NULL) == XP_OK;
}

void xp_case_keys(const char *head, void (*fn)(const xp_case_key *key, void *arg), void *arg) {
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *right = keys[i].right ? keys[i].right : optional_operand(xp_stage_find(head));
        /* A layer takes R beside a router that has an MLP. */
        if (takes(head, keys[i].key.name, right, "") ||
            takes(head, keys[i].key.name, right, " router_in=recurrent_mlp"))
            fn(&keys[i].key, arg);
    }
}
