/* Mesh strings: what parses prints back to one canonical text, and its ranks have places that fit one another. */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "mesh.h"

static int same(const xp_mesh_spec *a, const xp_mesh_spec *b) {
    return strcmp(a->kind, b->kind) == 0 && a->dp == b->dp && a->fsdp == b->fsdp && a->ep == b->ep &&
           a->ep_fsdp == b->ep_fsdp && a->ep_dp == b->ep_dp && a->world == b->world && a->jitter == b->jitter &&
           a->has_jitter == b->has_jitter && memcmp(&a->timeout_s, &b->timeout_s, sizeof a->timeout_s) == 0;
}

/* The printed text is the shortest: no shorter buffer takes it, and none is written past its end. */
static void check_buffer(const xp_mesh_spec *s, const char *canonical) {
    const size_t n = strlen(canonical);
    char *tight = malloc(n + 1);
    FUZZ_CHECK(tight != NULL, "%zu bytes", n + 1);
    FUZZ_CHECK(xp_mesh_spec_print(s, tight, n + 1) == XP_OK && strcmp(tight, canonical) == 0, "'%s'", canonical);
    fuzz_refused(xp_mesh_spec_print(s, tight, n), XP_E_ARG, "mesh", "");
    free(tight);
}

static void check_round_trip(const xp_mesh_spec *s, const char *text) {
    char first[XP_MESH_TEXT], second[XP_MESH_TEXT];
    xp_mesh_spec again;
    FUZZ_CHECK(xp_mesh_spec_print(s, first, sizeof first) == XP_OK, "'%s': %s", text, xp_error_text());
    FUZZ_CHECK(xp_mesh_spec_parse(first, &again) == XP_OK, "'%s' from '%s': %s", first, text, xp_error_text());
    FUZZ_CHECK(same(s, &again), "'%s' is not what '%s' was", first, text);
    FUZZ_CHECK(xp_mesh_spec_print(&again, second, sizeof second) == XP_OK, "'%s': %s", first, xp_error_text());
    FUZZ_CHECK(strcmp(first, second) == 0, "'%s' prints as '%s'", first, second);
    FUZZ_CHECK(xp_mesh_spec_rekind(s, s->kind, &again) == XP_OK && same(s, &again), "'%s'", text);
    check_buffer(s, first);
}

static void check_sizes(const xp_mesh_spec *s, const char *text) {
    FUZZ_CHECK(s->dp >= 1 && s->fsdp >= 1 && s->ep >= 1 && s->ep_fsdp >= 1 && s->ep_dp >= 1, "'%s'", text);
    FUZZ_CHECK(s->world >= 1 && s->world <= XP_MESH_MAX_WORLD, "'%s': world %d", text, s->world);
    FUZZ_CHECK((int64_t)s->dp * s->fsdp == s->world, "'%s': world %d", text, s->world);
    FUZZ_CHECK((int64_t)s->ep * s->ep_fsdp * s->ep_dp == s->world, "'%s': world %d", text, s->world);
    FUZZ_CHECK(s->timeout_s >= 0.001 && s->timeout_s <= 86400.0, "'%s': timeout %g", text, s->timeout_s);
    FUZZ_CHECK(s->has_jitter || s->jitter == 0, "'%s'", text);
}

/* A rank stands in each of its groups at the place that it is said to have, and every member lists the same group. */
static void check_rank(const xp_mesh_spec *s, int rank) {
    static const xp_axis axes[] = {XP_LOCAL, XP_DP, XP_FSDP, XP_EP, XP_EP_FSDP, XP_EP_DP, XP_EDP, XP_WORLD};
    int group[XP_MESH_MAX_RANKS], other[XP_MESH_MAX_RANKS];
    for (size_t a = 0; a < sizeof axes / sizeof *axes; a++) {
        const int n = xp_mesh_axis_ranks(s, axes[a], rank, group), at = xp_mesh_axis_index(s, axes[a], rank);
        FUZZ_CHECK(n == xp_mesh_axis_size(s, axes[a]), "axis %zu of rank %d: %d ranks", a, rank, n);
        FUZZ_CHECK(at >= 0 && at < n && group[at] == rank, "axis %zu of rank %d: place %d of %d", a, rank, at, n);
        for (int i = 0; i < n; i++) {
            FUZZ_CHECK(group[i] >= 0 && group[i] < s->world, "axis %zu of rank %d: rank %d", a, rank, group[i]);
            xp_mesh_axis_ranks(s, axes[a], group[i], other);
            FUZZ_CHECK(memcmp(group, other, (size_t)n * sizeof *group) == 0, "axis %zu: ranks %d and %d", a, rank,
                       group[i]);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    static const xp_mesh_spec nothing;
    xp_mesh_spec s;
    char *text = fuzz_text(data, bytes);
    memset(&s, 0xa5, sizeof s);
    const xp_status st = xp_mesh_spec_parse(text, &s);
    if (st != XP_OK) {
        fuzz_refused(st, XP_E_ARG, "mesh", text);
        FUZZ_CHECK(memcmp(&s, &nothing, sizeof s) == 0, "'%s' is refused and leaves something behind", text);
    } else {
        check_sizes(&s, text);
        check_round_trip(&s, text);
        for (int rank = 0; s.world <= XP_MESH_MAX_RANKS && rank < s.world; rank++)
            check_rank(&s, rank);
    }
    free(text);
    return 0;
}
