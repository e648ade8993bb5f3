/* The mesh's text and coordinates: what is accepted and derived, what is refused and in which words, every
 * factorisation.
 *
 * Groups are checked against their definition (the ranks that agree in all other coordinates), not against a second
 * copy of the formula. Nothing here starts a rank but the two tests of the dispatch. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mesh.h"

typedef struct {
    const char *text;
    int dp, fsdp, ep, ep_fsdp, ep_dp, world;
    const char *canonical;
} good_row;

static const good_row good[] = {
    {"sim:fsdp=8,ep=8", 1, 8, 8, 1, 1, 8, "sim:fsdp=8,ep=8"},
    {"sim:dp=2,fsdp=4,ep=4", 2, 4, 4, 2, 1, 8, "sim:dp=2,fsdp=4,ep=4"},
    {"sim:fsdp=1", 1, 1, 1, 1, 1, 1, "sim:fsdp=1"},
    {"sim:dp=1", 1, 1, 1, 1, 1, 1, "sim:fsdp=1"},
    {"sim:ep=4", 1, 4, 4, 1, 1, 4, "sim:fsdp=4,ep=4"},
    {"sim:ep=1", 1, 1, 1, 1, 1, 1, "sim:fsdp=1"},
    {"sim:dp=4,ep=4", 4, 1, 4, 1, 1, 4, "sim:dp=4,ep=4"},
    {"sim:dp=3", 3, 1, 1, 3, 1, 3, "sim:dp=3"},
    {"sim:ep=2,fsdp=6", 1, 6, 2, 3, 1, 6, "sim:fsdp=6,ep=2"},
    {"sim:fsdp=6,ep=2,ep_fsdp=3", 1, 6, 2, 3, 1, 6, "sim:fsdp=6,ep=2"},
    {"sim:fsdp=6,ep=2,ep_fsdp=1", 1, 6, 2, 1, 3, 6, "sim:fsdp=6,ep=2,ep_fsdp=1"},
    {"sim:dp=2,fsdp=4,ep=2,ep_fsdp=2", 2, 4, 2, 2, 2, 8, "sim:dp=2,fsdp=4,ep=2,ep_fsdp=2"},
    {"sim:dp=8,fsdp=8,ep=64", 8, 8, 64, 1, 1, 64, "sim:dp=8,fsdp=8,ep=64"},
    {"sim:fsdp=7,ep_fsdp=7", 1, 7, 1, 7, 1, 7, "sim:fsdp=7"},
    {"mpi:fsdp=128,ep=16", 1, 128, 16, 8, 1, 128, "mpi:fsdp=128,ep=16"},
    {"cuda:fsdp=2", 1, 2, 1, 2, 1, 2, "cuda:fsdp=2"},
};

static int same(const xp_mesh_spec *a, const xp_mesh_spec *b) {
    return strcmp(a->kind, b->kind) == 0 && a->dp == b->dp && a->fsdp == b->fsdp && a->ep == b->ep &&
           a->ep_fsdp == b->ep_fsdp && a->ep_dp == b->ep_dp && a->world == b->world && a->jitter == b->jitter &&
           a->has_jitter == b->has_jitter && memcmp(&a->timeout_s, &b->timeout_s, sizeof a->timeout_s) == 0;
}

/* Prints, reads back, and returns the canonical text. */
static void expect_round_trip(const xp_mesh_spec *s, char *text) {
    xp_mesh_spec back;
    assert_int_equal(xp_mesh_spec_print(s, text, XP_MESH_TEXT), XP_OK);
    if (xp_mesh_spec_parse(text, &back) != XP_OK)
        fail_msg("'%s' does not read back: %s", text, xp_error_text());
    if (!same(s, &back))
        fail_msg("'%s' reads back as something else", text);
}

static void reads_and_derives(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        const good_row *r = &good[i];
        xp_mesh_spec s;
        char text[XP_MESH_TEXT];
        if (xp_mesh_spec_parse(r->text, &s) != XP_OK)
            fail_msg("%s: %s", r->text, xp_error_text());
        assert_int_equal(s.dp, r->dp);
        assert_int_equal(s.fsdp, r->fsdp);
        assert_int_equal(s.ep, r->ep);
        assert_int_equal(s.ep_fsdp, r->ep_fsdp);
        assert_int_equal(s.ep_dp, r->ep_dp);
        assert_int_equal(s.world, r->world);
        assert_false(s.has_jitter);
        assert_true(s.timeout_s >= 300.0 && s.timeout_s <= 300.0);
        expect_round_trip(&s, text);
        assert_string_equal(text, r->canonical);
    }
}

static void reads_jitter_and_timeout(void **state) {
    (void)state;
    static const char *const text[] = {
        "sim:dp=2,jitter=0",      "sim:dp=2,jitter=18446744073709551615", "sim:dp=2,timeout=0.001",
        "sim:dp=2,timeout=86400", "sim:dp=2,jitter=7,timeout=2.5",        "sim:dp=2,timeout=0.1",
        "sim:dp=2,timeout=12345", "sim:fsdp=2,timeout=33.333333333333336"};
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
        xp_mesh_spec s;
        char back[XP_MESH_TEXT];
        assert_int_equal(xp_mesh_spec_parse(text[i], &s), XP_OK);
        expect_round_trip(&s, back);
        assert_string_equal(back, text[i]);
    }
    xp_mesh_spec s;
    assert_int_equal(xp_mesh_spec_parse("sim:jitter=18446744073709551615,timeout=.5", &s), XP_E_ARG);
    assert_int_equal(xp_mesh_spec_parse("sim:jitter=18446744073709551615,timeout=0.5", &s), XP_OK);
    assert_true(s.has_jitter && s.jitter == UINT64_MAX && s.timeout_s >= 0.5 && s.timeout_s <= 0.5);
    assert_int_equal(s.world, 1);
}

/* Every refusal must name what is wrong: all words must be in the text. */
typedef struct {
    const char *text, *words[4];
} bad_row;

static const bad_row bad[] = {
    {"sim:fsdp=6,ep=4", {"ep 4 does not divide world 6"}},
    {"sim:dp=2,fsdp=3,ep=4", {"ep 4 does not divide world 6", "dp 2", "fsdp 3"}},
    {"sim:fsdp=8,ep=2,ep_fsdp=3", {"ep 2 x ep_fsdp 3 = 6 does not divide world 8"}},
    {"sim:ep=4,ep_fsdp=2", {"ep 4 x ep_fsdp 2 = 8 does not divide world 4"}},
    {"sim:dp=8,fsdp=9", {"dp 8", "fsdp 9", "world of 72", "64"}},
    {"sim:fsdp=65", {"world of 65", "64"}},
    {"sim:dp=65536,fsdp=65536", {"world of 4294967296", "64"}},
    {"mpi:dp=65536,fsdp=2", {"world of 131072", "65536"}},
    {"cuda:fsdp=65", {"cuda", "64"}},
    {"sim:fspd=2", {"unknown key 'fspd'", "did you mean 'fsdp'", "ep_fsdp"}},
    {"sim:ep-fsdp=2", {"unknown key 'ep-fsdp'", "did you mean 'ep_fsdp'"}},
    {"sim:tokens=2", {"unknown key 'tokens'", "keys: dp, fsdp, ep, ep_fsdp, jitter, timeout"}},
    {"sim:DP=2", {"unknown key 'DP'"}},
    {"sim:=2", {"unknown key ''"}},
    {"smi:dp=2", {"'smi'", "did you mean 'sim'", "known: sim, mpi, tcp, nccl, cuda"}},
    {"Sim:dp=2", {"'Sim'", "did you mean 'sim'"}},
    {"si:dp=2", {"'si'", "sim"}},
    {"simulated:dp=2", {"'simulated'", "known: sim"}},
    {"sim:dp=2,dp=2", {"dp", "twice", "'2'"}},
    {"sim:ep=", {"ep", "empty"}},
    {"sim:ep=,dp=2", {"ep", "empty"}},
    {"sim:dp", {"'dp' is not key=value"}},
    {"sim:dp=2,", {"empty item"}},
    {"sim:,dp=2", {"empty item", "dp=2"}},
    {"sim:dp=2,,ep=1", {"empty item", "ep=1"}},
    {"sim:dp=0", {"dp", "'0'", "from 1"}},
    {"sim:ep=0", {"ep", "'0'", "from 1"}},
    {"sim:dp=-2", {"dp", "'-2'", "whole number"}},
    {"sim:dp=+2", {"dp", "'+2'", "whole number"}},
    {"sim:dp=2.0", {"dp", "'2.0'", "whole number"}},
    {"sim:dp=0x2", {"dp", "'0x2'", "whole number"}},
    {"sim:dp=two", {"dp", "'two'", "whole number"}},
    {"sim:dp=2x", {"dp", "'2x'", "whole number"}},
    {"sim:dp=2=3", {"dp", "'2=3'", "whole number"}},
    {"sim:dp=2;ep=2", {"dp", "'2;ep=2'"}},
    {"sim:dp=65537", {"dp", "'65537'", "65536"}},
    {"sim:dp=4294967298", {"dp", "'4294967298'"}},
    {"sim:dp=18446744073709551618", {"dp", "'18446744073709551618'"}},
    {"sim:dp=2,jitter=18446744073709551616", {"jitter", "18446744073709551616", "seed"}},
    {"sim:dp=2,jitter=-1", {"jitter", "'-1'", "seed"}},
    {"sim:dp=2,jitter=x", {"jitter", "'x'", "seed"}},
    {"sim:dp=2,timeout=0", {"timeout", "'0'", "seconds"}},
    {"sim:dp=2,timeout=-1", {"timeout", "'-1'", "seconds"}},
    {"sim:dp=2,timeout=1e3", {"timeout", "'1e3'", "seconds"}},
    {"sim:dp=2,timeout=nan", {"timeout", "'nan'", "seconds"}},
    {"sim:dp=2,timeout=inf", {"timeout", "'inf'", "seconds"}},
    {"sim:dp=2,timeout=1.2.3", {"timeout", "'1.2.3'", "seconds"}},
    {"sim:dp=2,timeout=3.", {"timeout", "'3.'", "seconds"}},
    {"sim:dp=2,timeout=86401", {"timeout", "'86401'", "86400"}},
    {"sim:dp=2,timeout=0.0001", {"timeout", "'0.0001'", "0.001"}},
    {" sim:dp=2", {"blank at column 1"}},
    {"sim: dp=2", {"blank at column 5"}},
    {"sim:dp=2 ", {"blank at column 9"}},
    {"sim:dp=\t2", {"blank at column 8"}},
    {"sim:dp=2\n", {"blank at column 9"}},
    {"", {"expected KIND:key=value", "sim:fsdp=8"}},
    {":", {"expected KIND:key=value"}},
    {":dp=2", {"expected KIND:key=value"}},
    {"sim", {"'sim'", "expected KIND:key=value"}},
    {"sim:", {"'sim:'", "expected KIND:key=value"}},
    {"sim,dp=2", {"expected KIND:key=value"}},
    {"dp=2", {"no mesh is called 'dp'"}},
};

static void refuses_by_name(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        xp_mesh_spec s;
        const xp_status st = xp_mesh_spec_parse(bad[i].text, &s);
        if (st != XP_E_ARG)
            fail_msg("'%s' gave %s", bad[i].text, xp_status_name(st));
        assert_int_equal(s.world, 0);
        for (int w = 0; w < 4 && bad[i].words[w]; w++) {
            if (!strstr(xp_error_text(), bad[i].words[w]))
                fail_msg("'%s': no \"%s\" in \"%s\"", bad[i].text, bad[i].words[w], xp_error_text());
        }
    }
}

static void refuses_long_text_without_overrun(void **state) {
    (void)state;
    static char text[20000];
    xp_mesh_spec s;
    memset(text, 'a', sizeof text - 1);
    assert_int_equal(xp_mesh_spec_parse(text, &s), XP_E_ARG);
    memcpy(text, "sim:", 4);
    assert_int_equal(xp_mesh_spec_parse(text, &s), XP_E_ARG);
    memcpy(text, "sim:timeout=", 12);
    memset(text + 12, '1', sizeof text - 13);
    assert_int_equal(xp_mesh_spec_parse(text, &s), XP_E_ARG);
}

static void print_needs_room_and_a_true_spec(void **state) {
    (void)state;
    xp_mesh_spec s;
    char text[XP_MESH_TEXT];
    const char *whole = "sim:dp=2,fsdp=4,ep=4";
    assert_int_equal(xp_mesh_spec_parse(whole, &s), XP_OK);
    assert_int_equal(xp_mesh_spec_print(&s, text, strlen(whole)), XP_E_ARG);
    assert_int_equal(xp_mesh_spec_print(&s, text, strlen(whole) + 1), XP_OK);
    assert_string_equal(text, whole);
    xp_mesh_spec wrong = s;
    wrong.ep_dp = 2;
    assert_int_equal(xp_mesh_spec_print(&wrong, text, sizeof text), XP_E_ARG);
    wrong = s;
    wrong.world = 16;
    assert_int_equal(xp_mesh_spec_print(&wrong, text, sizeof text), XP_E_ARG);
    wrong = s;
    wrong.ep = 0;
    assert_int_equal(xp_mesh_spec_print(&wrong, text, sizeof text), XP_E_ARG);
    wrong = s;
    memset(wrong.kind, 'x', sizeof wrong.kind); /* not even terminated */
    assert_int_equal(xp_mesh_spec_print(&wrong, text, sizeof text), XP_E_ARG);
}

static void rekind_keeps_everything_else(void **state) {
    (void)state;
    xp_mesh_spec s, t;
    char text[XP_MESH_TEXT];
    assert_int_equal(xp_mesh_spec_parse("sim:dp=2,fsdp=4,ep=4,jitter=7,timeout=5", &s), XP_OK);
    assert_int_equal(xp_mesh_spec_rekind(&s, "nccl", &t), XP_OK);
    expect_round_trip(&t, text);
    assert_string_equal(text, "nccl:dp=2,fsdp=4,ep=4,jitter=7,timeout=5");
    assert_int_equal(xp_mesh_spec_rekind(&s, "ncl", &t), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "did you mean 'nccl'"));
    assert_int_equal(xp_mesh_spec_parse("mpi:fsdp=128", &s), XP_OK);
    assert_int_equal(xp_mesh_spec_rekind(&s, "sim", &t), XP_E_ARG);
    assert_non_null(strstr(xp_error_text(), "128"));
}

/* The coordinates that are the same for all ranks of one group of the axis. */
static int same_group(const xp_mesh_coord *a, const xp_mesh_coord *b, xp_axis axis) {
    switch (axis) {
    case XP_DP:
        return a->fsdp == b->fsdp;
    case XP_FSDP:
        return a->dp == b->dp;
    case XP_EP:
        return a->ep_fsdp == b->ep_fsdp && a->ep_dp == b->ep_dp;
    case XP_EP_FSDP:
        return a->ep == b->ep && a->ep_dp == b->ep_dp;
    case XP_EP_DP:
        return a->ep == b->ep && a->ep_fsdp == b->ep_fsdp;
    case XP_EDP:
        return a->ep == b->ep;
    default:
        return 1;
    }
}

/* One axis of one mesh: each rank's group is exactly the ranks of the definition, ascending, and it finds itself in it.
 */
static void expect_groups(const xp_mesh_spec *s, const xp_mesh_coord *c, xp_axis a) {
    int out[XP_MESH_MAX_RANKS];
    const int size = xp_mesh_axis_size(s, a);
    assert_int_equal(s->world % size, 0);
    for (int r = 0; r < s->world; r++) {
        int n = 0;
        assert_int_equal(xp_mesh_axis_ranks(s, a, r, out), size);
        for (int q = 0; q < s->world; q++) {
            if (!same_group(&c[r], &c[q], a))
                continue;
            if (n >= size || out[n] != q)
                fail_msg("dp %d fsdp %d ep %d ep_fsdp %d: axis %s of rank %d has not rank %d at place %d", s->dp,
                         s->fsdp, s->ep, s->ep_fsdp, xp_axis_name(a), r, q, n);
            n++;
        }
        assert_int_equal(n, size);
        assert_int_equal(out[xp_mesh_axis_index(s, a, r)], r);
    }
}

static void expect_mesh(int dp, int fsdp, int ep, int ep_fsdp) {
    char text[XP_MESH_TEXT], canonical[XP_MESH_TEXT];
    xp_mesh_spec s;
    xp_mesh_coord c[XP_MESH_MAX_RANKS];
    snprintf(text, sizeof text, "sim:dp=%d,fsdp=%d,ep=%d,ep_fsdp=%d", dp, fsdp, ep, ep_fsdp);
    if (xp_mesh_spec_parse(text, &s) != XP_OK)
        fail_msg("%s: %s", text, xp_error_text());
    expect_round_trip(&s, canonical);
    for (int r = 0; r < s.world; r++) {
        xp_mesh_coords(&s, r, &c[r]);
        assert_int_equal(c[r].dp * fsdp + c[r].fsdp, r);
        assert_int_equal((c[r].ep_dp * ep + c[r].ep) * ep_fsdp + c[r].ep_fsdp, r);
        assert_in_range(c[r].fsdp, 0, fsdp - 1);
        assert_in_range(c[r].ep, 0, ep - 1);
        assert_in_range(c[r].ep_fsdp, 0, ep_fsdp - 1);
    }
    for (int a = 0; a < XP_NAXIS; a++)
        expect_groups(&s, c, (xp_axis)a);
    assert_int_equal(xp_mesh_axis_size(&s, XP_LOCAL), 1);
}

static void every_factorisation_up_to_64(void **state) {
    (void)state;
    int meshes = 0;
    for (int world = 1; world <= XP_MESH_MAX_RANKS; world++) {
        for (int dp = 1; dp <= world; dp++) {
            for (int ep = 1; ep <= world && world % dp == 0; ep++) {
                for (int ep_fsdp = 1; ep_fsdp <= world / ep && world % ep == 0; ep_fsdp++) {
                    if (world % (ep * ep_fsdp) != 0)
                        continue;
                    expect_mesh(dp, world / dp, ep, ep_fsdp);
                    meshes++;
                }
            }
        }
    }
    /* The sum over n <= 64 of d(n) * d3(n): divisors, and ordered triples with product n. */
    assert_int_equal(meshes, 5092);
}

/* The three examples of the mesh's definition, rank by rank where it matters. */
static void the_examples(void **state) {
    (void)state;
    xp_mesh_spec s;
    int out[XP_MESH_MAX_RANKS];
    assert_int_equal(xp_mesh_spec_parse("sim:fsdp=8,ep=8", &s), XP_OK);
    assert_int_equal(s.world, 8);
    assert_int_equal(s.ep_fsdp, 1);
    assert_int_equal(xp_mesh_spec_parse("sim:dp=2,fsdp=4,ep=4", &s), XP_OK);
    assert_int_equal(s.ep_fsdp, 2);
    assert_int_equal(s.ep_dp, 1);
    assert_int_equal(xp_mesh_axis_ranks(&s, XP_EP, 3, out), 4);
    static const int ep_of_3[] = {1, 3, 5, 7}, edp_of_3[] = {2, 3}, fsdp_of_5[] = {4, 5, 6, 7}, dp_of_6[] = {2, 6};
    assert_memory_equal(out, ep_of_3, sizeof ep_of_3);
    assert_int_equal(xp_mesh_axis_ranks(&s, XP_EDP, 3, out), 2);
    assert_memory_equal(out, edp_of_3, sizeof edp_of_3);
    assert_int_equal(xp_mesh_axis_ranks(&s, XP_FSDP, 5, out), 4);
    assert_memory_equal(out, fsdp_of_5, sizeof fsdp_of_5);
    assert_int_equal(xp_mesh_axis_ranks(&s, XP_DP, 6, out), 2);
    assert_memory_equal(out, dp_of_6, sizeof dp_of_6);
    assert_int_equal(xp_mesh_spec_parse("sim:fsdp=6,ep=4", &s), XP_E_ARG);
}

static xp_status must_not_run(const xp_mesh *mesh, int rank, void *arg) {
    (void)mesh;
    (void)rank;
    *(int *)arg = 1;
    return XP_OK;
}

static void unavailable_kinds_say_why(void **state) {
    (void)state;
    static xp_mesh_report report;
    int ran = 0, kinds = 0;
    for (const xp_mesh_kind *k = xp_mesh_kinds; k->name; k++) {
        xp_mesh_spec s;
        char text[XP_MESH_TEXT];
        snprintf(text, sizeof text, "%s:fsdp=2", k->name);
        assert_int_equal(xp_mesh_spec_parse(text, &s), XP_OK);
        assert_true(strlen(k->meaning) > 0);
        if (!k->why_not)
            continue;
        kinds++;
        assert_int_equal(xp_mesh_run(&s, must_not_run, &ran, &report), XP_E_DEVICE);
        assert_int_equal(report.status, XP_E_DEVICE);
        assert_int_equal(report.world, 0);
        assert_non_null(strstr(xp_error_text(), k->name));
        assert_non_null(strstr(xp_error_text(), k->why_not));
    }
    assert_int_equal(ran, 0);
    assert_true(kinds > 0);
}

static void run_refuses_a_false_spec(void **state) {
    (void)state;
    static xp_mesh_report report;
    xp_mesh_spec s;
    int ran = 0;
    assert_int_equal(xp_mesh_spec_parse("sim:fsdp=2", &s), XP_OK);
    s.world = 3;
    assert_int_equal(xp_mesh_run(&s, must_not_run, &ran, &report), XP_E_ARG);
    assert_int_equal(ran, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_and_derives),
        cmocka_unit_test(reads_jitter_and_timeout),
        cmocka_unit_test(refuses_by_name),
        cmocka_unit_test(refuses_long_text_without_overrun),
        cmocka_unit_test(print_needs_room_and_a_true_spec),
        cmocka_unit_test(rekind_keeps_everything_else),
        cmocka_unit_test(every_factorisation_up_to_64),
        cmocka_unit_test(the_examples),
        cmocka_unit_test(unavailable_kinds_say_why),
        cmocka_unit_test(run_refuses_a_false_spec),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
