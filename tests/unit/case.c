/* Case lines: products, names, refusals, and the round trip of printing and parsing over random cases. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "case.h"
#include "random.h"

typedef struct {
    int n;
    xp_case last, first;
} seen;

static xp_status note(const xp_case *c, void *arg) {
    seen *s = arg;
    if (s->n++ == 0)
        s->first = *c;
    s->last = *c;
    return XP_OK;
}

static int count(const char *line) {
    seen s = {0};
    assert_int_equal(xp_case_expand(line, NULL, NULL, note, &s), XP_OK);
    return s.n;
}

static void products(void **state) {
    (void)state;
    assert_int_equal(count("residual"), 1);
    assert_int_equal(count("residual T=1,2,3 H=4,5 dtype=f32,bf16"), 12);
    assert_int_equal(count("residual mesh=sim:fsdp=1,2,4"), 3);
    assert_int_equal(count("layer E=8 K=2 mesh=sim:dp=2,fsdp=4,ep=1,2,4"), 3);
    assert_int_equal(count("layer E=8 K=2 mesh=sim:fsdp=2,4,ep=1,2"), 4);
    assert_int_equal(count("layer E=8 K=2 mesh=sim:fsdp=1,2,sim:ep=4"), 3);
    assert_int_equal(count("layer E=8 K=2 mesh=sim:fsdp=8,ep=2,4,ep_fsdp=1,2"), 4);
    assert_int_equal(count("residual mesh=sim:fsdp=2,jitter=1,2,3"), 3);
    assert_int_equal(count("residual mesh=mpi:fsdp=2,sim:fsdp=1"), 2);
    assert_int_equal(count("residual \t T=1,2\tH=3  "), 2);
    assert_int_equal(count("cast N=5 saturate=0,1 param=bf16,e4m3 data=real,extreme,ties seed=1,2"), 24);
}

/* " KEY=1,1,...": n values. */
static void add_list(char *line, char key, int n) {
    sprintf(line + strlen(line), " %c=1", key);
    for (int i = 1; i < n; i++)
        strcat(line, ",1");
}

/* A line of 2^16 cases is the largest; one of 64^3 or of 30^6 is refused at once, by its longest list. */
static void product_is_bounded(void **state) {
    char line[XP_CASE_LINE] = "layer";
    (void)state;
    add_list(line, 'T', 64);
    add_list(line, 'H', 32);
    add_list(line, 'F', 32);
    assert_int_equal(count(line), 65536);
    strcpy(line, "layer");
    add_list(line, 'T', 31);
    add_list(line, 'H', 64);
    add_list(line, 'F', 34);
    assert_int_equal(xp_case_expand(line, NULL, NULL, NULL, NULL), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "H: 64 values"));
    assert_non_null(strstr(xp_error_text(), "more than 65536 cases"));
    strcpy(line, "layer");
    for (const char *key = "TEKHFS"; *key; key++)
        add_list(line, *key, 30);
    assert_int_equal(xp_case_expand(line, NULL, NULL, NULL, NULL), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "T: 30 values"));
}

/* Each mesh of a product, in the order of the line. */
typedef struct {
    int n;
    char text[16][XP_MESH_TEXT];
} meshes;

static xp_status note_mesh(const xp_case *c, void *arg) {
    meshes *m = arg;
    assert_true(m->n < 16);
    return xp_mesh_spec_print(&c->mesh, m->text[m->n++], XP_MESH_TEXT);
}

static void mesh_commas(void **state) {
    static const char *const want[] = {"sim:fsdp=2",      "sim:fsdp=2,ep=2",   "sim:fsdp=4",
                                       "sim:fsdp=4,ep=2", "sim:dp=2,jitter=9", "mpi:fsdp=8,ep=8"};
    meshes m = {0};
    (void)state;
    assert_int_equal(
        xp_case_expand("layer E=8 mesh=sim:fsdp=2,4,ep=1,2,sim:dp=2,jitter=9,mpi:ep=8", NULL, NULL, note_mesh, &m),
        XP_OK);
    assert_int_equal(m.n, sizeof want / sizeof *want);
    for (int i = 0; i < m.n; i++)
        assert_string_equal(m.text[i], want[i]);
}

static void order_and_names(void **state) {
    (void)state;
    seen s = {0};
    int number = 0;
    assert_int_equal(xp_case_expand("residual T=1,2 H=4", "file", &number, note, &s), XP_OK);
    assert_string_equal(s.first.name, "file/1");
    assert_string_equal(s.last.name, "file/2");
    assert_int_equal(s.first.dim['T' - 'A'], 1);
    assert_int_equal(s.last.dim['T' - 'A'], 2);
    assert_int_equal(xp_case_expand("residual T=3 name=mine", "file", &number, note, &s), XP_OK);
    assert_string_equal(s.last.name, "file/mine");
    assert_int_equal(number, 3);
}

static void refusals(void **state) {
    (void)state;
    /* line, and parts of the message: the key, and the value or what was expected */
    static const char *const bad[][3] = {
        {"", "case", "empty"},
        {" \t ", "case", "empty"},
        {"expret T=4", "'expret'", "`expar list stages`"},
        {"T=4 residual", "'T=4'", "stage"},
        {"residual T", "'T'", "key=value"},
        {"residual name=\xc3\xa9", "case: byte 0xc3 at column 15", "ASCII"},
        {"residual T=4\x1b[2J", "case: byte 0x1b at column 13", "ASCII"},
        {"residual =4", "'=4'", "key=value"},
        {"residual :T=4", "':T=4'", "key=value"},
        {"residual mesh:sim:fsdp=1", "'mesh:sim:fsdp=1'", "key=value"},
        {"residual abcdefghijklmnopqrstuvwxyz=4", "abcdefghijklmnopqrstuvwxyz", "key=value"},
        /* sizes */
        {"residual T=", "T: ''", "empty"},
        {"residual T=,1", "T: ',1'", "empty"},
        {"residual T=1,,2", "T: '1,,2'", "empty"},
        {"residual T=1,", "T: '1,'", "empty"},
        {"residual T=x", "T: 'x'", "whole number from 0"},
        {"residual T=-1", "T: '-1'", "whole number from 0"},
        {"residual T=+1", "T: '+1'", "whole number"},
        {"residual T=1.5", "T: '1.5'", "whole number"},
        {"residual T=0x4", "T: '0x4'", "whole number"},
        {"residual T=1K", "T: '1K'", "whole number"},
        {"residual T=1099511627777", "T: '1099511627777'", "to 1099511627776"},
        {"residual T=99999999999999999999", "T: '99999999999999999999'", "to 1099511627776"},
        {"residual T=4 T=5", "T: given twice", ""},
        {"residual zeta=1", "zeta: residual has no such key", ""},
        {"residual Z=1", "Z: residual has no such key", ""},
        {"residual E=8", "E: residual has no such key", ""},
        {"residual B=8", "B: residual has no such key", ""},
        {"layer N=8", "N: layer has no such key", ""},
        {"layer R=8", "R: 8", "router_in is not recurrent_mlp"},
        {"layer model=mixtral-8x7b R=8", "R: 8", "whose router has its own width"},
        {"layer router_in=mlp", "router_in: 'mlp'", "x|recurrent_mlp"},
        {"step V=8", "V: step has no such key", ""},
        {"expert N=8", "N: expert has no such key", ""},
        {"residual layers=2", "layers: residual has no such key", ""},
        {"step p=2", "p: step has no such key", ""},
        {"layer with=bias", "with: layer has no such key", ""},
        /* dtypes */
        {"residual dtype=bf17", "dtype: 'bf17'", "no float type"},
        {"residual dtype=i32", "dtype: 'i32'", "no float type"},
        {"rmsnorm param=u8", "param: 'u8'", "no float type"},
        {"residual param=bf16", "param: residual has no such key", ""},
        {"residual wide=f64", "wide: residual has no such key", ""},
        {"layer logits=bf16", "logits: layer has no such key", ""},
        {"rmsnorm gate=f32", "gate: rmsnorm has no such key", ""},
        {"layer shared=u8", "shared: 'u8'", "no float type"},
        {"residual dtype=f32 act=bf16", "act: 'bf16'", "dtype 'f32'"},
        {"layer around=block_norm+norm", "around: 'norm' is unknown", "latent_norm, expert_norm, out_bias, block_norm"},
        {"layer around=block_norm+block_norm", "around: 'block_norm' is given twice", ""},
        {"layer around=block_norm+", "around: '' is unknown", ""},
        {"layer around=latent_norm", "around: latent_norm", "no latent_norm without a width D="},
        {"layer around=shared_norm", "around: shared_norm", "no norm of a shared expert without a width S="},
        {"layer around=shared_in_norm S=0", "around: shared_in_norm", "without a width S="},
        {"layer around=latent_norm+out_bias D=0", "around: latent_norm+out_bias", "without a width D="},
        {"layer model=mixtral-8x7b around=out_bias", "around: out_bias", "none beside model="},
        {"residual around=out_bias", "around: residual has no such key", ""},
        /* words */
        {"residual data=rael", "data", "'rael'"},
        {"residual seed=-1", "seed: '-1'", "2^64-1"},
        {"residual seed=18446744073709551616", "seed: '18446744073709551616'", "2^64-1"},
        {"residual expect=nothing", "expect: 'nothing'", "zero"},
        {"residual name=", "name: ''", "empty"},
        {"residual name=abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz", "name: 'abcdefghij", "longer than 47"},
        {"layer order=up", "order: 'up'", "slot_token"},
        {"layer divide=ranks", "divide: 'ranks'", "once, world"},
        {"layer align=3", "align: 3", "1, 16, 128"},
        {"layer E=8 K=2 dialect=hf-5.24/inkling", "S: 0", "a multiple of shared_rows 2"},
        {"layer E=8 K=2 S=7 dialect=hf-5.24/inkling", "S: 7", "a multiple of shared_rows 2"},
        {"layer E=8 K=9 S=8 dialect=hf-5.24/inkling", "K: 9", "must not exceed E"},
        {"layer align=0", "align: '0'", "from 1"},
        {"layer shrink=0", "shrink: '0'", "from 1"},
        {"layer layers=0", "layers: '0'", "from 1"},
        {"layer model=mixtral-8x7b shrink=64 H=32", "H: 32", "model=mixtral-8x7b"},
        {"step model=mixtral-8x7b S=1", "S: 1", "model=mixtral-8x7b"},
        {"route_bwd E=13 K=1,0", "K: 0", "1 to 13"},
        {"step steps=0", "steps: '0'", "from 1"},
        {"step micro=0", "micro: '0'", "from 1"},
        {"layer micro=2", "micro", "layer"},
        {"step deterministic=2", "deterministic: '2'", "from 0 to 1"},
        {"layer shrink=4294967297", "shrink: '4294967297'", "to 4096"},
        /* a stage's own scalars and optional operands */
        {"clip max_norm=x", "max_norm: 'x'", "number"},
        {"clip max_norm=", "max_norm: ''", "empty"},
        {"clip max_norm=nan", "max_norm: 'nan'", "number"},
        {"clip max_norm=1e39", "max_norm: '1e39'", "f32"},
        {"adamw step=1.5", "step: '1.5'", "whole number"},
        {"adamw step=1e300", "step: '1e300'", "whole number"},
        {"cast saturate=9999999999", "saturate: '9999999999'", "whole number"},
        {"gather axis=up", "axis: 'up'", "fsdp"},
        {"scatter reduce_dtype=f33", "reduce_dtype: 'f33'", "dtype"},
        {"route dialect=mine", "dialect: 'mine'", "preset"},
        {"embed_bwd token0=4", "token0: '4'", "follows"},
        {"clip max_norm=0.00000000000000000000000000000000000000001", "max_norm: '0.0000", "too long"},
        {"residual with=a", "with: 'a'", "residual"},
        {"route with=bais", "with: 'bais'", "route"},
        {"route with=bias+", "with: ''", "route"},
        {"sgd with=buf+buffer", "with: 'buffer'", "sgd"},
        /* meshes */
        {"residual mesh=sim", "mesh: 'sim'", "KIND:key=value"},
        {"residual mesh=fsdp=2", "mesh: 'fsdp=2'", "KIND:key=value"},
        {"residual mesh=2,sim:fsdp=2", "mesh: '2,sim:fsdp=2'", "KIND:key=value"},
        {"residual mesh=sim:", "mesh 'sim:'", "KIND:key=value"},
        {"residual mesh=sim:=2", "'=2'", "key=value"},
        {"residual mesh=sim:2", "'2'", "key=value"},
        {"residual mesh=sim:fsdp", "'fsdp'", "key=value"},
        {"residual mesh=sim:fsdp=", "fsdp", "empty"},
        {"residual mesh=sim:fsdp=2,", "mesh: 'sim:fsdp=2,'", "empty"},
        {"residual mesh=:fsdp=2", "mesh", "KIND:key=value"},
        {"residual mesh=mehs:fsdp=2", "'mehs'", "sim"},
        {"residual mesh=sim:fsdpp=2", "'fsdpp'", "fsdp"},
        {"residual mesh=sim:abcdefghijklmnopqrstuvwxyz=2", "'abcdefghijklmnopqrstuvwxyz=2'", "key=value"},
        {"residual mesh=sim:fsdp=2,fsdp=3", "fsdp", ""},
        {"residual mesh=sim:fsdp=2,x", "fsdp", "'x'"},
        {"residual mesh=sim:fsdp=0", "fsdp", "'0'"},
        {"residual mesh=sim:fsdp=65", "65", "64"},
        {"layer mesh=sim:fsdp=6,ep=4", "ep 4", "world 6"},
        /* sizes that do not fit one another, at any place of the product */
        {"layer E=8 K=9", "K: 9", "E is 8"},
        {"layer E=8 K=2,9", "K: 9", "E is 8"},
        {"layer E=1 K=2", "K: 2", "E is 1"},
        {"route K=9 E=8", "K: 9", "E is 8"},
        {"moe K=9 E=8", "K: 9", "E is 8"},
        {"expert K=9 E=8", "K: 9", "E is 8"},
        {"layer E=9 mesh=sim:ep=2", "E: 9", "ep 2"},
        {"layer E=8,9 mesh=sim:ep=1,2", "E: 9", "ep 2"},
        {"layer E=0 K=0", "E: 0", "ep 1"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        seen s = {0};
        if (xp_case_expand(bad[i][0], NULL, NULL, note, &s) != XP_E_ARG)
            fail_msg("accepted: '%s'", bad[i][0]);
        for (int part = 1; part < 3; part++) {
            if (!strstr(xp_error_text(), bad[i][part]))
                fail_msg("'%s' is refused with '%s', which does not say '%s'", bad[i][0], xp_error_text(),
                         bad[i][part]);
        }
        assert_int_equal(s.n, 0); /* nothing of a wrong line is handed on */
    }
}

/* A line that is too long, and lists that are. */
static void limits(void **state) {
    static char line[2 * XP_CASE_LINE];
    seen s = {0};
    (void)state;
    strcpy(line, "residual T=1");
    for (int i = 2; i <= 64; i++)
        snprintf(line + strlen(line), sizeof line - strlen(line), ",%d", i);
    assert_int_equal(count(line), 64);
    strcat(line, ",65");
    assert_int_equal(xp_case_expand(line, NULL, NULL, note, &s), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "T: more than 64"));
    memset(line, ' ', XP_CASE_LINE - 1);
    memcpy(line, "residual", 8);
    line[XP_CASE_LINE - 1] = '\0';
    assert_int_equal(count(line), 1);
    line[XP_CASE_LINE - 1] = ' ';
    line[XP_CASE_LINE] = '\0';
    assert_int_equal(xp_case_expand(line, NULL, NULL, note, &s), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "longer"));
    memset(line, 'q', 300);
    memcpy(line, "residual T=", 11);
    line[300] = '\0';
    assert_int_equal(xp_case_expand(line, NULL, NULL, note, &s), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "T:"));
    memcpy(line, "layer model=", 12);
    assert_int_equal(xp_case_expand(line, NULL, NULL, note, &s), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "model:"));
    int number = 0;
    memset(line, 'f', 60);
    line[60] = '\0';
    assert_int_equal(xp_case_expand("residual", "\xff", &number, note, &s), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "name: byte 0xff at column 1"));
    assert_int_equal(xp_case_expand("residual", line, &number, note, &s), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "name: the file name 'ffff"));
    assert_int_equal(s.n, 0);
}

static void same_case(const xp_case *a, const xp_case *b, const char *line) {
    if (a->kind != b->kind || a->stage != b->stage || memcmp(a->dim, b->dim, sizeof a->dim) || a->data != b->data ||
        memcmp(a->dtype, b->dtype, sizeof a->dtype) || a->seed != b->seed || a->expect != b->expect ||
        strcmp(a->model, b->model) || strcmp(a->dialect, b->dialect) || strcmp(a->with, b->with) ||
        a->shrink != b->shrink || a->layers != b->layers || a->steps != b->steps ||
        a->deterministic != b->deterministic || a->order != b->order || a->align != b->align ||
        a->params != b->params || a->micro != b->micro || a->around != b->around)
        fail_msg("not the same case after reading '%s' back", line);
    for (int i = 0; i < a->params; i++) {
        assert_string_equal(a->param[i].name, b->param[i].name);
        assert_string_equal(a->param[i].value, b->param[i].value);
    }
    assert_int_equal(a->mesh.world, b->mesh.world);
    assert_int_equal(a->mesh.ep, b->mesh.ep);
    assert_int_equal(a->mesh.ep_fsdp, b->mesh.ep_fsdp);
    assert_int_equal(a->mesh.has_jitter, b->mesh.has_jitter);
}

static void round_trip(void **state) {
    (void)state;
    char line[XP_CASE_LINE];
    for (uint64_t n = 0; n < 3000; n++) {
        xp_case c;
        seen s = {0};
        xp_random_case(7, n, 0, &c);
        xp_case_print(&c, line, sizeof line);
        if (xp_case_expand(line, NULL, NULL, note, &s) != XP_OK)
            fail_msg("'%s': %s", line, xp_error_text());
        assert_int_equal(s.n, 1);
        same_case(&c, &s.last, line);
    }
}

/* Lines with every kind of key: what was given comes back, under the shortest names. */
static void canonical(void **state) {
    static const char *const lines[][2] = {
        {"residual", "residual data=real mesh=sim:fsdp=1 seed=1"},
        {"residual dtype=f32 H=5", "residual H=5 data=real mesh=sim:fsdp=1 seed=1"},
        {"residual seed=18446744073709551615", "residual data=real mesh=sim:fsdp=1 seed=18446744073709551615"},
        {"residual T=0 expect=zero", "residual T=0 data=real mesh=sim:fsdp=1 expect=zero seed=1"},
        {"cast saturate=1 param=e4m3 act=bf16 N=3",
         "cast N=3 act=bf16 param=e4m3 saturate=1 data=real mesh=sim:fsdp=1 seed=1"},
        {"gradnorm p=inf data=extreme mesh=sim:dp=2,fsdp=3", "gradnorm p=inf data=extreme mesh=sim:dp=2,fsdp=3 seed=1"},
        {"route with=bias dialect=hf-5.24/mixtral", "route dialect=hf-5.24/mixtral with=bias data=real "
                                                    "mesh=sim:fsdp=1 seed=1"},
        {"permute order=token align=16", "permute align=16 order=token data=real mesh=sim:fsdp=1 seed=1"},
        {"layer model=mixtral-8x7b shrink=4 layers=2 deterministic=1 order=token align=128 reduce=bf16 "
         "mesh=sim:ep=4,ep_fsdp=1,jitter=3,timeout=2.5",
         "layer model=mixtral-8x7b reduce=bf16 shrink=4 layers=2 deterministic=1 align=128 order=token data=real "
         "mesh=sim:fsdp=4,ep=4,jitter=3,timeout=2.5 seed=1"},
        {"layer around=block_norm+latent_norm D=4 align=16",
         "layer D=4 align=16 around=latent_norm+block_norm data=real mesh=sim:fsdp=1 seed=1"},
        {"wgrad D=4 around=latent_norm+expert_norm+out_bias+block_norm",
         "wgrad D=4 around=latent_norm+expert_norm+out_bias+block_norm data=real mesh=sim:fsdp=1 seed=1"},
        {"step steps=3 dialect=hf-5.24/qwen2_moe S=4 dtype=bf16",
         "step dialect=hf-5.24/qwen2_moe S=4 act=bf16 steps=3 data=real mesh=sim:fsdp=1 seed=1"},
    };
    char line[XP_CASE_LINE], again[XP_CASE_LINE];
    (void)state;
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        seen s = {0}, back = {0};
        if (xp_case_expand(lines[i][0], NULL, NULL, note, &s) != XP_OK)
            fail_msg("'%s': %s", lines[i][0], xp_error_text());
        xp_case_print(&s.last, line, sizeof line);
        assert_string_equal(line, lines[i][1]);
        assert_int_equal(xp_case_expand(line, NULL, NULL, note, &back), XP_OK);
        same_case(&s.last, &back.last, line);
        xp_case_print(&back.last, again, sizeof again);
        assert_string_equal(line, again);
    }
}

/* The longest values that a line can carry still fit and come back. */
static void longest(void **state) {
    char line[XP_CASE_LINE], model[XP_MODEL_NAME];
    xp_case c;
    seen s = {0};
    (void)state;
    xp_case_defaults(XP_CASE_LAYER, NULL, &c);
    memset(model, 'm', sizeof model - 1);
    model[sizeof model - 1] = '\0';
    strcpy(c.model, model);
    strcpy(c.dialect, "ddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd");
    for (const char *l = "TEK"; *l; l++) { /* what may stand beside a model */
        c.dim[*l - 'A'] = INT64_C(1) << 40;
        c.dim_set[*l - 'A'] = 1;
    }
    c.dim['K' - 'A'] = 1;
    c.dtype[XP_G_PARAM] = c.dtype[XP_G_GRAD] = c.dtype[XP_G_REDUCE] = c.dtype[XP_G_ROUTER] = XP_E4M3FNUZ;
    c.seed = UINT64_MAX;
    c.shrink = 4096;
    c.layers = XP_MAX_LAYERS;
    c.steps = 1000000;
    c.deterministic = c.order = 1;
    c.align = 128;
    assert_int_equal(
        xp_mesh_spec_parse("sim:dp=8,fsdp=8,ep=8,ep_fsdp=4,jitter=18446744073709551615,timeout=86399.123456", &c.mesh),
        XP_OK);
    xp_case_print(&c, line, sizeof line);
    if (xp_case_expand(line, NULL, NULL, note, &s) != XP_OK)
        fail_msg("'%s': %s", line, xp_error_text());
    same_case(&c, &s.last, line);
}

/* What the draws promise: sizes, worlds, half of them above 1, and that every kind comes up. */
static void draws(void **state) {
    (void)state;
    int above = 0, kinds[3] = {0}, data[XP_NDATA] = {0}, act[XP_NDTYPE] = {0}, cast[XP_NDTYPE] = {0};
    int stage[64] = {0};
    enum { N = 20000 };
    for (uint64_t n = 0; n < N; n++) {
        xp_case c;
        xp_random_case(3, n, 0, &c);
        assert_int_equal(xp_case_check(&c), XP_OK);
        assert_in_range(c.mesh.world, 1, 8);
        assert_true(c.dim['T' - 'A'] <= 96 && c.dim['H' - 'A'] <= 96 && c.dim['F' - 'A'] <= 96 &&
                    c.dim['K' - 'A'] <= 8);
        assert_true(c.dim['E' - 'A'] >= 1 && c.dim['E' - 'A'] <= 32);
        assert_true(c.kind != XP_CASE_STEP || c.dim['T' - 'A'] >= 1);
        above += c.mesh.world > 1;
        kinds[c.kind]++;
        data[c.data]++;
        act[c.dtype[XP_G_ACT]]++;
        if (c.kind == XP_CASE_STAGE && strcmp(c.stage->name, "cast") == 0)
            cast[c.dtype[XP_G_PARAM]]++;
        for (int i = 0; c.kind == XP_CASE_STAGE && xp_stages[i]; i++)
            stage[i] += xp_stages[i] == c.stage;
    }
    assert_in_range(above, N * 2 / 5, N * 3 / 5);
    assert_true(kinds[XP_CASE_STAGE] && kinds[XP_CASE_LAYER] && kinds[XP_CASE_STEP]);
    for (int k = 0; k < XP_NDATA; k++)
        assert_true(data[k] > 0);
    assert_true(act[XP_F32] && act[XP_BF16] && act[XP_F16] && act[XP_F64]);
    for (int i = 0; xp_stages[i]; i++) {
        if (!xp_stages[i]->chain && !stage[i])
            fail_msg("%s is never drawn", xp_stages[i]->name);
    }
    for (int d = 0; d <= XP_E2M1; d++)
        assert_true(cast[d] > 0);
}

static void globs(void **state) {
    (void)state;
    assert_true(xp_glob("smoke*", "smoke/12"));
    assert_true(xp_glob("*", ""));
    assert_true(xp_glob("s?oke/*2", "smoke/12"));
    assert_true(xp_glob("*a*b*c", "xxaxxbxxabc"));
    assert_false(xp_glob("smoke", "smoke/12"));
    assert_false(xp_glob("smoke/?", "smoke/12"));
    assert_false(xp_glob("", "x"));
    assert_false(xp_glob("*a*b*c", "xxaxxbxxab"));
}

static xp_status refuse(const xp_case *c, void *arg) {
    (void)c;
    (void)arg;
    return XP_FAIL(XP_E_ARG, "the caller's own refusal");
}

static char folder[] = "/tmp/xp-case-XXXXXX";

/* Writes a file of the test's folder and returns its path. */
static const char *file_of(const char *name, const char *text, size_t bytes) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
    return path;
}

static const char *text_of(const char *name, const char *text) {
    return file_of(name, text, strlen(text));
}

static int make_folder(void **state) {
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    static const char *const names[] = {"good.txt", "bad.txt", "zero.txt", "long.txt",
                                        "b.txt",    "a.txt",   "c.text",   ".d.txt"};
    char path[256];
    (void)state;
    unsetenv("EXPAR_CASES");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        remove(path);
    }
    return rmdir(folder);
}

static void files(void **state) {
    seen s = {0};
    (void)state;
    assert_int_equal(xp_case_file(XP_SOURCE_DIR "/tests/cases/smoke.txt", note, &s), XP_OK);
    assert_true(s.n > 20);
    assert_string_equal(s.first.name, "smoke/1");
    assert_int_equal(xp_case_file(XP_SOURCE_DIR "/tests/cases/nosuch.txt", note, &s), XP_E_IO);
    assert_non_null(strstr(xp_error_text(), "nosuch.txt"));
    assert_int_equal(xp_case_file(folder, note, &s), XP_E_IO);
    assert_non_null(strstr(xp_error_text(), folder));
    /* A caller's refusal is no fault of the file. */
    assert_int_equal(xp_case_file(XP_SOURCE_DIR "/tests/cases/smoke.txt", refuse, NULL), XP_E_ARG);
    s.n = 0;
    assert_int_equal(
        xp_case_file(text_of("good.txt", "# first\r\n\r\nresidual T=1,2 # two\r\n \t\nresidual name=x\ncast"), note,
                     &s),
        XP_OK);
    assert_int_equal(s.n, 4);
    assert_string_equal(s.first.name, "good/1");
    assert_string_equal(s.last.name, "good/4");
    assert_string_equal(s.last.stage->name, "cast");
}

static void bad_files(void **state) {
    static char line[XP_CASE_LINE + 10];
    seen s = {0};
    (void)state;
    /* Line 3 is wrong: nothing of the file is handed on. */
    assert_int_equal(xp_case_file(text_of("bad.txt", "residual T=1\n\nresidual T=q\n"), note, &s), XP_E_FORMAT);
    assert_non_null(strstr(xp_error_text(), "bad.txt:3: T: 'q'"));
    assert_int_equal(xp_case_file(text_of("bad.txt", "layer E=8 K=9\n"), note, &s), XP_E_FORMAT);
    assert_non_null(strstr(xp_error_text(), "bad.txt:1: K: 9"));
    assert_int_equal(xp_case_file(file_of("zero.txt", "residual\nresi\0dual\n", 19), note, &s), XP_E_FORMAT);
    assert_non_null(strstr(xp_error_text(), "zero.txt:2:"));
    memset(line, ' ', sizeof line - 1);
    memcpy(line, "residual", 8);
    assert_int_equal(xp_case_file(text_of("long.txt", line), note, &s), XP_E_FORMAT);
    assert_non_null(strstr(xp_error_text(), "long.txt:1: longer"));
    assert_int_equal(s.n, 0);
}

static void folders(void **state) {
    seen s = {0};
    char path[256];
    (void)state;
    text_of("b.txt", "residual T=2\n");
    text_of("a.txt", "residual T=1\n");
    text_of("c.text", "nonsense\n");
    text_of(".d.txt", "nonsense\n");
    for (const char *const *n = (const char *const[]){"good.txt", "bad.txt", "zero.txt", "long.txt", NULL}; *n; n++) {
        snprintf(path, sizeof path, "%s/%s", folder, *n);
        remove(path);
    }
    assert_int_equal(setenv("EXPAR_CASES", folder, 1), 0);
    assert_string_equal(xp_case_dir(), folder);
    assert_int_equal(xp_case_all(note, &s), XP_OK);
    assert_int_equal(s.n, 2);
    assert_string_equal(s.first.name, "a/1");
    assert_string_equal(s.last.name, "b/1");
    /* A wrong file that comes last stops the first. */
    s.n = 0;
    text_of("zero.txt", "nonsense\n");
    assert_int_equal(xp_case_all(note, &s), XP_E_FORMAT);
    assert_non_null(strstr(xp_error_text(), "zero.txt:1"));
    assert_int_equal(s.n, 0);
    assert_int_equal(setenv("EXPAR_CASES", "/nosuch/folder", 1), 0);
    assert_int_equal(xp_case_all(note, &s), XP_E_IO);
    assert_non_null(strstr(xp_error_text(), "/nosuch/folder"));
    assert_int_equal(setenv("EXPAR_CASES", "", 1), 0);
    assert_string_not_equal(xp_case_dir(), "");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products),    cmocka_unit_test(product_is_bounded),
        cmocka_unit_test(mesh_commas), cmocka_unit_test(order_and_names),
        cmocka_unit_test(refusals),    cmocka_unit_test(limits),
        cmocka_unit_test(canonical),   cmocka_unit_test(longest),
        cmocka_unit_test(round_trip),  cmocka_unit_test(draws),
        cmocka_unit_test(globs),       cmocka_unit_test(files),
        cmocka_unit_test(bad_files),   cmocka_unit_test(folders),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
