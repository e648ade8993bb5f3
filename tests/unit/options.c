/* The command line: every option of every command, and each way to get one wrong. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "options.h"

/* Splits a line at blanks and reads it; "~" stands for a blank inside a word, "@" for an empty word. */
static xp_status read_line(const char *line, xp_options *out) {
    static char text[8][400];
    static char *argv[8][64];
    static char program[] = "expar";
    static int turn;
    const int t = turn++ % 8; /* the options point into the text: the last few lines stay */
    int argc = 0;
    char *save = NULL;
    assert_true(strlen(line) < sizeof text[0]);
    strcpy(text[t], line);
    argv[t][argc++] = program;
    for (char *w = strtok_r(text[t], " ", &save); w; w = strtok_r(NULL, " ", &save)) {
        for (char *p = w; *p; p++)
            *p = *p == '~' ? ' ' : *p;
        if (strcmp(w, "@") == 0)
            *w = '\0';
        argv[t][argc++] = w;
    }
    argv[t][argc] = NULL;
    return xp_options_parse(argc, argv[t], out);
}

static xp_options good(const char *line) {
    xp_options o;
    if (read_line(line, &o) != XP_OK)
        fail_msg("'%s' is refused: %s", line, xp_error_text());
    return o;
}

static void defaults(void **state) {
    (void)state;
    static const char *const commands[] = {"check", "step", "plan", "list", "explain", "version"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        const xp_options o = good(commands[i]);
        assert_string_equal(o.command, commands[i]);
        assert_int_equal(o.words, 0);
        assert_null(o.model);
        assert_null(o.mesh);
        assert_null(o.json_file);
        assert_int_equal(o.shrink, 1);
        assert_int_equal(o.seed, 1);
        assert_int_equal(o.layers + o.tokens + o.steps + o.experts + o.topk + o.random, 0);
        assert_int_equal(o.has_tokens + o.has_seed + o.has_steps + o.has_lr + o.has_layer, 0);
        assert_null(o.weights);
        assert_int_equal(o.deterministic + o.json + o.quiet + o.verbose + o.color, 0);
    }
}

/* Both spellings of every option of check and step land in their own field, with the value given. */
static void values(void **state) {
    (void)state;
    xp_options o =
        good("check --model m --layers 3 --shrink 4 --experts 6 --topk 2 --tokens 9 --mesh sim:ep=2 --seed 7 "
             "--text t --impl i --fault f -J j --deterministic -q -v --color always");
    assert_string_equal(o.model, "m");
    assert_string_equal(o.mesh, "sim:ep=2");
    assert_string_equal(o.text, "t");
    assert_string_equal(o.impl, "i");
    assert_string_equal(o.fault, "f");
    assert_string_equal(o.json_file, "j");
    assert_int_equal(o.layers, 3);
    assert_int_equal(o.shrink, 4);
    assert_int_equal(o.experts, 6);
    assert_int_equal(o.topk, 2);
    assert_int_equal(o.tokens, 9);
    assert_true(o.seed == 7 && o.has_seed && o.has_tokens && !o.has_steps && !o.has_lr);
    assert_true(o.deterministic == 1 && o.quiet == 1 && o.verbose == 1 && o.color == 1 && !o.json && !o.random);
    assert_true(!o.has_layer && !o.weights);
    o = good("check --model m --weights dir --layer 0");
    assert_string_equal(o.weights, "dir");
    assert_true(o.has_layer && o.layer == 0 && !o.layers);
    o = good("step --model=n --steps=11 --lr=0.25 --tokens=5 --mesh=sim:dp=2,fsdp=2 --seed=0 --color=never");
    assert_string_equal(o.model, "n");
    assert_string_equal(o.mesh, "sim:dp=2,fsdp=2"); /* only the first '=' separates */
    assert_true(o.steps == 11 && o.has_steps && o.has_lr && o.seed == 0 && o.has_seed && o.color == 2);
    assert_true(o.lr >= 0.25 && o.lr <= 0.25);
    o = good("check --random 500 --color auto");
    assert_true(o.random == 500 && o.color == 0);
    assert_string_equal(good("check -J=a=b").json_file, "a=b");
    assert_int_equal(good("list --json").json, 1);
    assert_int_equal(good("plan --json --lr .5").json, 1);
    assert_int_equal(good("explain --json x").words, 1);
}

static void suffixes(void **state) {
    (void)state;
    assert_int_equal(good("step --tokens 2K").tokens, 2048);
    assert_int_equal(good("step --tokens 3M").tokens, 3 * 1024 * 1024);
    assert_int_equal(good("step --tokens 1099511627776").tokens, INT64_C(1) << 40);
    assert_int_equal(good("step --tokens 1048576M").tokens, INT64_C(1) << 40);
    assert_true(good("check --seed 18446744073709551615").seed == UINT64_MAX);
}

static void words(void **state) {
    (void)state;
    xp_options o = good("check smoke* residual~T=4 --seed 2 ./a.txt - -- --seed -q");
    assert_int_equal(o.words, 6);
    assert_string_equal(o.word[0], "smoke*");
    assert_string_equal(o.word[1], "residual T=4");
    assert_string_equal(o.word[2], "./a.txt");
    assert_string_equal(o.word[3], "-");
    assert_string_equal(o.word[4], "--seed");
    assert_string_equal(o.word[5], "-q");
    assert_true(o.seed == 2 && !o.quiet);
}

static void refusals(void **state) {
    (void)state;
    /* line, and parts of the message: the option or command, and the value or what was expected */
    static const char *const bad[][3] = {
        {"", "command: none", "check, step, plan, list, explain, gen, verify, selftest, version"},
        {"chekc", "command: 'chekc'", "check"},
        {"--seed 1", "command: '--seed'", "check"},
        {"@", "command: ''", "check"},
        /* unknown, and the nearest that this command takes */
        {"step --tokns 4", "--tokns: no such option", "nearest is --tokens"},
        {"check --tokns=4", "--tokns: no such option", "nearest is --tokens"},
        {"check --Seed 4", "--Seed: no such option", "nearest is --seed"},
        {"step --rnadom 4", "--rnadom: no such option", "nearest is --"},
        {"check --tok 4", "--tok: no such option", "nearest is --topk"},
        {"check -x", "-x: no such option", "nearest is -"},
        {"plan --fautl x", "--fautl: no such option", "nearest is --model"}, /* plan has no --fault */
        {"list --jsn", "--jsn: no such option", "nearest is --json"},
        {"check -q=1", "-q: takes no value", "'1'"},
        {"check -qv", "-qv: no such option", "nearest is -"},
        {"check --aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
         "--aaaaaaaaaa", "no such option"},
        /* of another command */
        {"plan --fault x", "--fault", "`expar plan` does not take it"},
        {"list --model x", "--model", "`expar list` does not take it"},
        {"check --steps 3", "--steps", "`expar check` does not take it"},
        {"check --json", "--json", "`expar check` does not take it"},
        {"version --seed 1", "--seed", "`expar version` does not take it"},
        /* twice, also in two spellings */
        {"check --seed 1 --seed 2", "--seed: given twice", ""},
        {"check --seed 1 --seed=1", "--seed: given twice", ""},
        {"check -q -q", "-q: given twice", ""},
        {"step --deterministic --deterministic", "--deterministic: given twice", ""},
        /* no value, and one that it does not take */
        {"check --mesh", "--mesh: the value is missing", "SPEC|KIND"},
        {"check --mesh --seed 1", "--mesh: the value is missing", "SPEC|KIND"},
        {"check --seed -q", "--seed: the value is missing", "N"},
        {"check -J", "-J: the value is missing", "FILE"},
        {"check --mesh=", "--mesh: the value is empty", "SPEC|KIND"},
        {"check --impl @", "--impl: the value is empty", "NAME"},
        {"list --json=1", "--json: takes no value", "'1'"},
        {"check --deterministic=", "--deterministic: takes no value", "''"},
        /* numbers */
        {"step --tokens 12x", "--tokens: '12x'", "from 1 to 1099511627776"},
        {"step --tokens @", "--tokens: ''", "whole number"},
        {"step --tokens ~5", "--tokens: ' 5'", "whole number"},
        {"step --tokens +5", "--tokens: '+5'", "whole number"},
        {"step --tokens -5", "--tokens: '-5'", "whole number"},
        {"step --tokens 0", "--tokens: '0'", "from 1"},
        {"step --tokens 2k", "--tokens: '2k'", "whole number"},
        {"step --tokens 2KK", "--tokens: '2KK'", "whole number"},
        {"step --tokens K", "--tokens: 'K'", "whole number"},
        {"step --tokens 1.5K", "--tokens: '1.5K'", "whole number"},
        {"step --tokens -18014398509481985K", "--tokens: '-18014398509481985K'", "whole number"},
        {"step --tokens 0x10", "--tokens: '0x10'", "whole number"},
        {"step --tokens 1099511627777", "--tokens: '1099511627777'", "to 1099511627776"},
        {"step --tokens 1048577M", "--tokens: '1048577M'", "to 1099511627776"},
        {"step --tokens 17592186044417M", "--tokens: '17592186044417M'", "to 1099511627776"}, /* 2^64 + 2^20 */
        {"step --tokens 9223372036854775807M", "--tokens: '9223372036854775807M'", "to 1099511627776"},
        {"step --tokens 99999999999999999999", "--tokens: '99999999999999999999'", "to 1099511627776"},
        {"check --layer 1024", "--layer: '1024'", "from 0 to 1023"},
        {"plan --layers 0", "--layers: '0'", "from 1 to 1024"},
        {"plan --layers 1025", "--layers: '1025'", "from 1 to 1024"},
        {"plan --shrink 5K", "--shrink: '5K'", "from 1 to 4096"},
        {"plan --experts 65537", "--experts: '65537'", "to 65536"},
        {"plan --topk 0", "--topk: '0'", "from 1"},
        {"step --steps 1000001", "--steps: '1000001'", "to 1000000"},
        {"check --random 100000001", "--random: '100000001'", "to 100000000"},
        {"check --seed -1", "--seed: '-1'", "from 0 to 2^64-1"},
        {"check --seed 1K", "--seed: '1K'", "whole number"},
        {"check --seed ~1", "--seed: ' 1'", "whole number"},
        {"check --seed 18446744073709551616", "--seed: '18446744073709551616'", "to 2^64-1"},
        {"step --lr x", "--lr: 'x'", "finite number from 0"},
        {"step --lr -1", "--lr: '-1'", "finite number from 0"},
        {"step --lr inf", "--lr: 'inf'", "finite number"},
        {"step --lr nan", "--lr: 'nan'", "finite number"},
        {"step --lr 1e999", "--lr: '1e999'", "finite number"},
        {"step --lr ~1", "--lr: ' 1'", "finite number"},
        {"step --lr 1,5", "--lr: '1,5'", "finite number"},
        {"list --color blue", "--color: 'blue'", "auto, always, never"},
        {"list --color Always", "--color: 'Always'", "auto, always, never"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        xp_options o;
        if (read_line(bad[i][0], &o) != XP_E_ARG)
            fail_msg("'%s' is accepted", bad[i][0]);
        for (int part = 1; part < 3; part++) {
            if (!strstr(xp_error_text(), bad[i][part]))
                fail_msg("'%s' is refused with '%s', which does not say '%s'", bad[i][0], xp_error_text(),
                         bad[i][part]);
        }
    }
}

static void too_many_words(void **state) {
    static char *argv[XP_MAX_WORDS + 4];
    static char program[] = "expar", command[] = "check", word[] = "x";
    xp_options o;
    (void)state;
    argv[0] = program;
    argv[1] = command;
    for (int i = 2; i < XP_MAX_WORDS + 3; i++)
        argv[i] = word;
    assert_int_equal(xp_options_parse(XP_MAX_WORDS + 2, argv, &o), XP_OK);
    assert_int_equal(o.words, XP_MAX_WORDS);
    assert_int_equal(xp_options_parse(XP_MAX_WORDS + 3, argv, &o), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "256"));
}

static const char *help_of(const char *command) {
    static char text[8192];
    FILE *f = tmpfile();
    assert_non_null(f);
    xp_options_help(command, f);
    rewind(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return text;
}

/* Help names what the command takes and nothing else. */
static void help(void **state) {
    (void)state;
    assert_non_null(strstr(help_of(NULL), "expar explain"));
    assert_non_null(strstr(help_of(NULL), "--random"));
    assert_non_null(strstr(help_of("plan"), "--topk"));
    assert_null(strstr(help_of("plan"), "--fault"));
    assert_null(strstr(help_of("plan"), "expar check"));
    assert_non_null(strstr(help_of("nosuch"), "expar check"));
    assert_non_null(strstr(help_of("list"), "exit codes"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults), cmocka_unit_test(values),   cmocka_unit_test(suffixes),
        cmocka_unit_test(words),    cmocka_unit_test(refusals), cmocka_unit_test(too_many_words),
        cmocka_unit_test(help),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
