/* Second formulation of stage gradnorm.
 *
 * exact, p = 1 and 2: one 128-bit counter for each exponent of f32, shown to all and added as integers; the norm is the
 * float whose two rounding borders enclose the exact sum, found by bisection over the codes. An element is M *
 * 2^(b-150) with M < 2^24 and b = max(1, its exponent field). Bin b counts M (p = 1) or M^2 (p = 2), so that the sum is
 * an integer in units of 2^-150 or 2^-300. A float's upper border is (2M+1) * 2^(b-151): its square is an integer in
 * the same unit, and nothing but integers is compared. No floating-point operation takes part. p = 0 and -inf: two more
 * words. exact, another p: each rank shows its largest magnitude and its sum over it, and all add them in rank order.
 * torch: the same lists as the contract, each summed in double from terms that were rounded to f32. */
#include <math.h>
#include <string.h>

#include "dense.h"
#include "num.h"
#include "share.h"

enum {
    BINS = 255,           /* exponent fields of finite floats */
    WORDS = 2 * BINS + 5, /* what a rank shows: (low, high) of each bin, then: NaN seen, infinity seen, largest code, */
                          /* elements that are not 0, INF_CODE less the least code */
    NAN_SEEN = 2 * BINS,  /* word numbers */
    INF_SEEN = 2 * BINS + 1,
    LARGEST = 2 * BINS + 2,
    NONZERO = 2 * BINS + 3,
    UNDER_INF = 2 * BINS + 4,
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

static uint32_t magnitude_code(const xp_tensor *grad, int64_t i) {
    return (uint32_t)xp_dense_narrow(fabs(xp_dense_get(grad, i)), XP_F32, 0);
}

static void count(const xp_gradnorm_args *a, int64_t lo, int64_t hi, uint64_t *word) {
    for (int64_t i = lo; i < hi; i++) {
        const uint32_t code = magnitude_code(&a->grad, i), under = code < INF_CODE ? INF_CODE - code : 0;
        word[NONZERO] += code != 0;
        word[UNDER_INF] = under > word[UNDER_INF] ? under : word[UNDER_INF];
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
        word[UNDER_INF] = w[UNDER_INF] > word[UNDER_INF] ? w[UNDER_INF] : word[UNDER_INF];
        word[NONZERO] += w[NONZERO];
        for (int b = 1; b < BINS; b++)
            add_at(sum, w[2 * b], w[2 * b + 1], p == 1 ? b : 2 * b);
    }
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_gradnorm_args *a = args;
    const int ranks = m->axis[XP_WORLD]->size;
    return xp_dense_room(WORDS, sizeof(uint64_t)) + xp_dense_room((int64_t)ranks * WORDS, sizeof(uint64_t)) +
           xp_dense_room(ranks, sizeof(int64_t)) + xp_dense_room(a->owner.dim[0], sizeof(double));
}

static void put_norm(const xp_gradnorm_args *a, uint32_t code) {
    if (a->norm.dtype == XP_F32)
        xp_dense_put_code(&a->norm, 0, code);
    else
        xp_dense_put(&a->norm, 0, xp_widen(&code, XP_F32, 0));
}

static xp_status rounded(const xp_exec *x, const xp_gradnorm_args *a, char *ws) {
    xp_comm *world = x->mesh->axis[XP_WORLD];
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
    memset(word, 0, WORDS * sizeof *word);
    add_ranks(all, world->size, sum, word, a->p);
    const int finite_p = !isinf(a->p);
    uint32_t code = finite_p ? root(sum, a->p) : (uint32_t)word[LARGEST];
    if (word[INF_SEEN])
        code = INF_CODE;
    if (a->p == 0)
        code = (uint32_t)xp_dense_narrow((double)word[NONZERO], XP_F32, 0);
    if (a->p < 0)
        code = INF_CODE - (uint32_t)word[UNDER_INF];
    if (word[NAN_SEEN])
        code = 0x7FC00000u;
    put_norm(a, code);
    return XP_OK;
}

/* ---- another p ---- */

/* What a rank shows: the largest magnitude (NaN when one is), and the sum of (|g| / largest)^p. */
typedef struct {
    double top, sum;
} shown;

static void add_elements(const xp_gradnorm_args *a, shown *s) {
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t q = 0; q < a->owner.dim[0]; q++) {
            const int64_t hi = xp_dense_int(&a->owner, q) ? xp_dense_int(&a->seg, q + 1) : 0;
            for (int64_t i = xp_dense_int(&a->seg, q); i < hi; i++) {
                const double g = fabs(xp_dense_get(&a->grad, i));
                if (pass == 0)
                    s->top = isnan(s->top) || g <= s->top ? s->top : g;
                else if (g > 0)
                    s->sum += pow(g / s->top, a->p);
            }
        }
    }
}

static xp_status real(const xp_exec *x, const xp_gradnorm_args *a, char *ws) {
    xp_comm *world = x->mesh->axis[XP_WORLD];
    shown mine = {0, 0}, sum = {0, 0};
    shown *all = xp_dense_carve(&ws, world->size, sizeof *all);
    int64_t *ones = xp_dense_carve(&ws, world->size, sizeof *ones);
    add_elements(a, &mine);
    XP_TRY(xp_dense_all(x, world, XP_F64, &mine, 2, all, ones));
    for (int r = 0; r < world->size; r++)
        sum.top = isnan(sum.top) || all[r].top <= sum.top ? sum.top : all[r].top;
    for (int r = 0; r < world->size; r++)
        sum.sum += all[r].top > 0 ? pow(all[r].top / sum.top, a->p) * all[r].sum : 0;
    xp_dense_put(&a->norm, 0, isfinite(sum.top) && sum.top > 0 ? sum.top * pow(sum.sum, 1 / a->p) : sum.top);
    return XP_OK;
}

/* ---- torch ---- */

static double rounded_to(double v, xp_dtype d) {
    const uint32_t code = (uint32_t)xp_dense_narrow(v, d, 0);
    return xp_widen(&code, d, 0);
}

/* One list's norm: n elements of list from lo on. */
static double list_norm(double p, xp_dtype d, const xp_tensor *list, int64_t lo, int64_t n) {
    double total = 0, best = n ? fabs(xp_dense_get(list, lo)) : 0;
    for (int64_t i = lo; i < lo + n; i++) {
        const double g = fabs(xp_dense_get(list, i));
        if (isinf(p))
            best = isnan(best) || isnan(g) ? (double)NAN : p > 0 ? fmax(best, g) : fmin(best, g);
        else
            total += p == 0 ? g != 0 : rounded_to(p == 1 ? g : p == 2 ? g * g : pow(g, p), XP_F32);
    }
    if (isinf(p))
        return rounded_to(best, d);
    const double sum = rounded_to(total, XP_F32);
    return rounded_to(rounded_to(p == 2 ? sqrt(sum) : p > 0 && p != 1 ? pow(sum, 1 / p) : sum, XP_F32), d);
}

static xp_status torch(const xp_exec *x, const xp_gradnorm_args *a, char *ws) {
    xp_comm *world = x->mesh->axis[XP_WORLD];
    double *each = xp_dense_carve(&ws, a->owner.dim[0], sizeof *each);
    double *all = xp_dense_carve(&ws, world->size, sizeof *all);
    int64_t *ones = xp_dense_carve(&ws, world->size, sizeof *ones), n = 0;
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        const int64_t lo = xp_dense_int(&a->seg, q);
        if (xp_dense_int(&a->owner, q))
            each[n++] = list_norm(a->p, a->grad.dtype, &a->grad, lo, xp_dense_int(&a->seg, q + 1) - lo);
    }
    const xp_tensor own = xp_tensor_1d(each, XP_F64, n), ranks = xp_tensor_1d(all, XP_F64, world->size);
    double norm = list_norm(a->p, a->grad.dtype, &own, 0, n);
    XP_TRY(xp_dense_all(x, world, XP_F64, &norm, 1, all, ones));
    if (world->size > 1)
        norm = list_norm(a->p == 0 ? 1 : a->p, a->grad.dtype, &ranks, 0, world->size);
    xp_dense_put(&a->norm, 0, norm);
    return XP_OK;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_gradnorm_args *a = args;
    if (a->semantics == XP_TORCH)
        return torch(x, a, x->ws);
    return a->p == 0 || a->p == 1 || a->p == 2 || isinf(a->p) ? rounded(x, a, x->ws) : real(x, a, x->ws);
}

const xp_kernel xp_dense_gradnorm = {
    .stage = &xp_stage_gradnorm,
    .name = "dense",
    .det = XP_DET_RUN,
    .workspace = workspace,
    .run = run,
};
