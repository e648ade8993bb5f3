/* What tells dialects apart: every field of the record, changed alone, on the bounds of the record it came from; and
 * nothing where nothing differs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "apart.h"
#include "dialect_text.h"

/* A preset with fields set from "a=1 b=2". */
static xp_dialect record(const char *preset, const char *fields) {
    const xp_dialect *from = xp_dialect_find(preset);
    char text[256], *save = NULL;
    assert_non_null(from);
    xp_dialect d = *from;
    snprintf(text, sizeof text, "%s", fields);
    for (char *w = strtok_r(text, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
        char *eq = strchr(w, '=');
        assert_non_null(eq);
        *eq = '\0';
        if (xp_dialect_set(&d, w, eq + 1) != XP_OK)
            fail_msg("%s", xp_error_text());
    }
    return d;
}

static const struct {
    const char *preset, *as, *change; /* the preset with fields `as`, and with `change` on top */
    xp_apart by;                      /* the first thing that the bounds refuse */
} row[] = {
    {"hf-5.24/mixtral", "", "logits_dtype=f32", XP_APART_WEIGHT},
    {"hf-5.24/mixtral", "", "router_bias=on", XP_APART_CHOICE},
    {"hf-5.24/mixtral", "", "logit_scale=1.25", XP_APART_WEIGHT},
    {"hf-5.24/mixtral", "", "logit_softcap=30", XP_APART_CHOICE},
    {"hf-5.24/flint", "", "score=sqrt_softplus", XP_APART_WEIGHT},
    {"hf-5.24/mixtral", "renorm=none", "score_dtype=act", XP_APART_WEIGHT},
    {"hf-5.24/phimoe", "", "sparse_eps=0.2", XP_APART_WEIGHT},
    {"hf-5.24/flint", "", "select_on=token_table", XP_APART_CHOICE},
    {"hf-5.24/flint", "", "select_bias=on", XP_APART_CHOICE},
    {"hf-5.24/mixtral", "", "weight_div_k=on", XP_APART_WEIGHT},
    {"hf-5.24/nllb_moe", "", "select_on=score", XP_APART_CHOICE},
    {"hf-5.24/deepseek_v3", "", "group_reduce=max", XP_APART_CHOICE},
    {"hf-5.24/deepseek_v3", "topk_group=1", "group_mask=0", XP_APART_CHOICE},
    {"hf-5.24/deepseek_v2-groups", "topk_group=1", "masked_weight=off", XP_APART_WEIGHT},
    {"hf-5.24/deepseek_v3", "", "n_group=4", XP_APART_CHOICE},
    {"hf-5.24/deepseek_v3", "", "topk_group=2", XP_APART_CHOICE},
    {"hf-5.24/mixtral", "", "renorm=none", XP_APART_WEIGHT},
    {"hf-5.24/minimax_m2", "", "renorm=sum_plus_eps renorm_eps=1e-20", XP_APART_WEIGHT},
    {"hf-5.24/ernie4_5_moe", "weight_dtype=f32", "renorm_eps=0.5", XP_APART_WEIGHT},
    {"hf-5.24/deepseek_v3", "", "scale=2", XP_APART_WEIGHT},
    {"hf-5.24/deepseek_v3", "", "scale_at=output", XP_APART_WEIGHT},
    {"hf-5.24/mixtral", "", "expert_scale=on", XP_APART_WEIGHT},
    {"hf-5.24/mixtral", "", "weight_dtype=act", XP_APART_WEIGHT},
    {"hf-5.24/llama4", "", "weight_at=output", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "null_experts=4", XP_APART_CHOICE},
    {"hf-5.24/longcat_flash", "", "null_kind=skip", XP_APART_WEIGHT},
    {"hf-5.24/inkling", "", "shared_rows=1", XP_APART_WEIGHT},
    {"hf-5.24/inkling", "", "shared_rows=0", XP_APART_WEIGHT},
    {"hf-5.24/inkling", "", "renorm=sum", XP_APART_WEIGHT},
    {"hf-5.24/inkling", "", "expert_scale=off", XP_APART_WEIGHT},
    {"hf-5.24/inkling", "", "expert_scale=on", XP_APART_WEIGHT},
    {"hf-5.24/mixtral", "", "capacity=2", XP_APART_PLACES},
    {"hf-5.24/mixtral", "capacity=2", "capacity=3", XP_APART_PLACES},
    {"hf-5.24/mixtral", "", "capacity_factor=0.75", XP_APART_PLACES},
    {"hf-5.24/mixtral", "capacity=3", "overflow=priority", XP_APART_PLACES},
    {"hf-5.24/mixtral", "capacity=3", "overflow=slots", XP_APART_PLACES},
    {"hf-5.24/mixtral", "capacity=3", "pad_to_capacity=on", XP_APART_PLACES},
    {"hf-5.24/mixtral", "capacity=3 overflow=priority", "gated=off", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "gated=off", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "activation=gelu_tanh", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "act_alpha=1.702", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "up_offset=1", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "limit=7", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "limit=1", "limit_when=after", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "activation=softcap gate_cap=4 up_cap=25", "gate_cap=2", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "activation=softcap gate_cap=4 up_cap=25", "up_cap=4", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "act_rounding=once", XP_APART_ROUNDING},
    {"hf-5.24/mixtral", "", "gate_layout=interleaved", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "expert_bias=on", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "accumulate=eager_act", XP_APART_ROUNDING},
    {"hf-5.24/mixtral", "", "dx_sum=act", XP_APART_ROUNDING},
    {"hf-5.24/qwen2_moe", "", "shared_gate=off", XP_APART_OUTPUT},
    {"hf-5.24/minimax_m3_vl", "", "shared_limit=off", XP_APART_OUTPUT},
    {"hf-5.24/minimax_m3_vl", "", "limit_shared=1", XP_APART_OUTPUT},
    {"hf-5.24/cohere2_moe", "", "shared_combine=add", XP_APART_OUTPUT},
    {"hf-5.24/mixtral", "", "aux_coef=0.01", XP_APART_BALANCE},
    {"hf-5.24/mixtral", "", "z_coef=0.001", XP_APART_BALANCE},
};

static void every_field_shows(void **state) {
    int off = 0;
    (void)state;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        char fields[256];
        const xp_dialect right = record(row[i].preset, row[i].as);
        snprintf(fields, sizeof fields, "%s %s", row[i].as, row[i].change);
        const xp_dialect wrong = record(row[i].preset, fields);
        xp_apart by;
        if (xp_apart_judge(&right, &wrong, &by) != XP_OK)
            fail_msg("%s, %s: %s", row[i].preset, row[i].change, xp_error_text());
        off += by != row[i].by;
        if (by != row[i].by)
            print_error("%s %s, %s: %s, expected %s\n", row[i].preset, row[i].as, row[i].change, xp_apart_name(by),
                        xp_apart_name(row[i].by));
    }
    assert_int_equal(off, 0);
}

/* Only how a file stores matrices and what makes the router's input are left out: the stages that are compared see
 * neither. */
static void no_field_is_forgotten(void **state) {
    (void)state;
    for (const xp_dialect_field *f = xp_dialect_fields; f->name; f++) {
        const size_t n = strlen(f->name);
        int listed = strcmp(f->name, "orient") == 0 || strcmp(f->name, "router_in") == 0;
        for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
            for (const char *at = row[i].change; at; at = strchr(at, ' ') ? strchr(at, ' ') + 1 : NULL)
                listed |= strncmp(at, f->name, n) == 0 && at[n] == '=';
        }
        if (!listed)
            fail_msg("%s is changed nowhere", f->name);
    }
}

static void equal_records_are_not_apart(void **state) {
    (void)state;
    for (const xp_dialect *d = xp_dialects; d->name; d++) {
        const xp_dialect same = *d;
        xp_apart by;
        assert_int_equal(xp_apart_judge(d, &same, &by), XP_OK);
        if (by != XP_APART_NOT)
            fail_msg("%s differs from itself by %s", d->name, xp_apart_name(by));
    }
    const xp_dialect a = record("hf-5.24/mixtral", ""), b = record("hf-5.24/mixtral", "orient=EIO");
    xp_apart by;
    assert_int_equal(xp_apart_judge(&a, &b, &by), XP_OK);
    assert_int_equal(by, XP_APART_NOT);
}

static void refusals(void **state) {
    const xp_dialect right = record("hf-5.24/mixtral", ""), nulls = record("hf-5.24/mixtral", "null_experts=17"),
                     limit = record("hf-5.24/mixtral", "activation=softcap");
    xp_apart by;
    (void)state;
    assert_int_equal(xp_apart_judge(&right, &nulls, &by), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "null_experts: 17"));
    assert_int_equal(xp_apart_judge(&right, &limit, &by), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "gate_cap"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_field_shows),
        cmocka_unit_test(no_field_is_forgotten),
        cmocka_unit_test(equal_records_are_not_apart),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
