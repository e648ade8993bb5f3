/* expar plan: the strategy for a model on a mesh, printed. Runs nothing. */
#include "cmd.h"

static xp_status print(const xp_options *o, const xp_plan *p) {
    json_t *root = NULL;
    if (!o->json)
        return xp_plan_print(p, stdout);
    XP_TRY(xp_plan_json(p, &root));
    const int bad = json_dumpf(root, stdout, JSON_INDENT(1)) != 0 || fputc('\n', stdout) == EOF;
    json_decref(root);
    return bad ? XP_FAIL(XP_E_IO, "standard output: the plan cannot be written") : XP_OK;
}

int xp_cmd_plan(const xp_options *o) {
    xp_model model;
    xp_mesh_spec mesh;
    xp_step_options opt;
    xp_plan plan;
    xp_status st =
        o->words ? XP_FAIL(XP_E_ARG, "plan: '%s' is no option; the model is --model NAME", o->word[0]) : XP_OK;
    if (st == XP_OK)
        st = xp_cmd_model(o, &model);
    if (st == XP_OK)
        st = xp_cmd_mesh(o, "sim:fsdp=1", &mesh);
    if (st != XP_OK)
        return xp_cmd_fail(st);
    xp_cmd_run_options(o, &opt);
    st = xp_plan_make(&model, &mesh, &opt, &plan);
    if (st != XP_OK)
        return xp_cmd_fail(st);
    st = print(o, &plan);
    xp_plan_close(&plan);
    if (st == XP_E_IO)
        return XP_EXIT_OUTPUT;
    return st == XP_OK ? XP_EXIT_OK : xp_cmd_fail(st);
}
