/* Second formulation of stage gradnorm: one 128-bit counter for each exponent of f32, shown to all and added as
 * integers; the norm is the float whose two rounding borders enclose the exact sum, found by bisection over the codes.
 *
 * An element is M * 2^(b-150) with M < 2^24 and b = max(1, its exponent field). Bin b counts M (p = 1) or M^2 (p = 2),
 * so that the sum is an integer in units of 2^-150 or 2^-300. A float's upper border is (2M+1) * 2^(b-151): its square
 * is an integer in the same unit, and nothing but integers is compared. No floating-point operation takes part. */
#include <math.h>
#include <string.h>

#include "dense.h"
#include "num.h"
#include "share.h"

enum {
    BINS = 255,           /* exponent fields of finite floats */
    WORDS = 2 * BINS + 3, /* what a rank shows: (low, high) of each bin, then: NaN seen, infinity seen, largest code */
    NAN_SEEN = 2 * BINS,  /* word numbers */
    INF_SEEN = 2 * BINS + 1,
    LARGEST = 2 * BINS + 2,
    LIMBS = 24 /* of 32 bits: 2^(508+48+64+32) and more */
};
static const uint32_t INF_CODE = 0x7F800000u;

/* acc += v * 2^shift; v is two 64-bit halves. */
static void add_at(uint32_t *acc, uint64_t low, uint64_t high, int shift) {
    const uint32_t part[4] = {(uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32)};
    for (int i = 0; i < 4; i++) {
        uint64_t carry = (uint64_t)part[i] << (shift % 32);
        for (int at = shift / 32 + i; carry && at < LIMBS; at++) {
            carry += acc[at];
            acc[at] = (uint32_t)carry;
            carry >>= 32;
        }
    }
}

static int compare(const uint32_t *a, const uint32_t *b) {
    for (int i = LIMBS - 1; i >= 0; i--) {
        if (a[i] != b[i])
            return a[i] < b[i] ? -1 : 1;
    }
    return 0;
}

static uint64_t mantissa(uint32_t code) {
    return code >> 23 ? (code & 0x7FFFFFu) | 0x800000u : code;
}

static int field(uint32_t code) {
    return code >> 23 ? (int)(code >> 23) : 1;
}

static void count(const xp_gradnorm_args *a, int64_t lo, int64_t hi, uint64_t *word) {
    for (int64_t i = lo; i < hi; i++) {
        const uint32_t code = (uint32_t)xp_code(a->grad.data, XP_F32, i) & 0x7FFFFFFFu;
        if (code >= INF_CODE) {
            word[code > INF_CODE ? NAN_SEEN : INF_SEEN] = 1;
            continue;
        }
        const uint64_t m = mantissa(code), v = a->p == 1 ? m : m * m;
        uint64_t *bin = word + 2 * field(code);
        bin[0] += v;
        bin[1] += bin[0] < v;
        word[LARGEST] = code > word[LARGEST] ? code : word[LARGEST];
    }
}

/* Whether the sum lies above the border between code and the next one, or on it with an odd code. */
static int above(const uint32_t *sum, uint32_t code, double p) {
    uint32_t border[LIMBS] = {0};
    const uint64_t m = 2 * mantissa(code) + 1;
    const int b = field(code) - 1;
    add_at(border, p == 1 ? m : m * m, 0, p == 1 ? b : 2 * b);
    const int c = compare(sum, border);
    return c > 0 || (c == 0 && (code & 1u));
}

static uint32_t root(const uint32_t *sum, double p) {
    uint32_t lo = 0, hi = INF_CODE; /* the answer is in [lo, hi] */
    while (lo < hi) {
        const uint32_t mid = lo + (hi - lo) / 2;
        if (above(sum, mid, p))
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static void add_ranks(const uint64_t *all, int ranks, uint32_t *sum, uint64_t *word, double p) {
    for (int r = 0; r < ranks; r++) {
        const uint64_t *w = all + r * WORDS;
        word[NAN_SEEN] |= w[NAN_SEEN];
        word[INF_SEEN] |= w[INF_SEEN];
        word[LARGEST] = w[LARGEST] > word[LARGEST] ? w[LARGEST] : word[LARGEST];
        for (int b = 1; b < BINS; b++)
            add_at(sum, w[2 * b], w[2 * b + 1], p == 1 ? b : 2 * b);
    }
}

static size_t workspace(const void *args, const xp_mesh *m) {
    (void)args;
    const int ranks = m->axis[XP_WORLD]->size;
    return xp_dense_room(WORDS, sizeof(uint64_t)) + xp_dense_room((int64_t)ranks * WORDS, sizeof(uint64_t)) +
           xp_dense_room(ranks, sizeof(int64_t));
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_gradnorm_args *a = args;
    xp_comm *world = x->mesh->axis[XP_WORLD];
    char *ws = x->ws;
    uint64_t *word = xp_dense_carve(&ws, WORDS, sizeof *word);
    uint64_t *all = xp_dense_carve(&ws, (int64_t)world->size * WORDS, sizeof *all);
    int64_t *ones = xp_dense_carve(&ws, world->size, sizeof *ones);
    memset(word, 0, WORDS * sizeof *word);
    for (int64_t s = 0; s < a->owner.dim[0]; s++) {
        if (xp_dense_int(&a->owner, s))
            count(a, xp_dense_int(&a->seg, s), xp_dense_int(&a->seg, s + 1), word);
    }
    XP_TRY(xp_dense_all(x, world, XP_U64, word, WORDS, all, ones));
    uint32_t sum[LIMBS] = {0};
    add_ranks(all, world->size, sum, word, a->p);
    uint32_t code = isinf(a->p) ? (uint32_t)word[LARGEST] : root(sum, a->p);
    if (word[INF_SEEN])
        code = INF_CODE;
    if (word[NAN_SEEN])
        code = 0x7FC00000u;
    if (a->norm.dtype == XP_F32)
        xp_dense_put_code(&a->norm, 0, code);
    else
        xp_dense_put(&a->norm, 0, xp_widen(&code, XP_F32, 0));
    return XP_OK;
}

const xp_kernel xp_dense_gradnorm = {
    .stage = &xp_stage_gradnorm,
    .name = "dense",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
