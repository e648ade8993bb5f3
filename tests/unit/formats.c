/* The formats of 8 and 4 bits: every code, the edges that tables quote, block scaling by hand, and codes that travel
 * with their scales.
 *
 * Expected values are numbers worked out on paper or formulas of (rank, expert, row), never the reference's. Both the
 * reference and the second formulation must give them, since each is the other's judge. */
#include <math.h>

#include "dense/dense.h"
#include "ref.h"
#include "unit/stage_suite.h"

static const xp_kernel *const cast_rows[] = {&xp_ref_cast, &xp_dense_cast};
static const xp_kernel *const quant_rows[] = {&xp_ref_quant, &xp_dense_quant};
static const xp_kernel *const dequant_rows[] = {&xp_ref_dequant, &xp_dense_dequant};
enum { ROWS = 2 };

#define INF ((double)INFINITY)
#define NOT ((double)NAN) /* a number */

/* ---- casts ---- */

static uint64_t cast_one(const xp_kernel *k, double v, xp_dtype d, int saturate) {
    const xp_mesh m = lone_mesh(1);
    uint64_t code = 0;
    const xp_cast_args a = {.x = xp_tensor_1d(&v, XP_F64, 1), .y = xp_tensor_1d(&code, d, 1), .saturate = saturate};
    assert_int_equal(run_kernel(k, &m, &a), XP_OK);
    return xp_code(&code, d, 0);
}

/* Values of all codes from the formats' definitions: sign, exponent of the smallest normal, mantissa bits. */
static double value_of(xp_dtype d, int code) {
    static const struct {
        xp_dtype d;
        int man, low, bits;
    } shape[] = {{XP_E4M3, 3, -6, 8},
                 {XP_E5M2, 2, -14, 8},
                 {XP_E4M3FNUZ, 3, -7, 8},
                 {XP_E5M2FNUZ, 2, -15, 8},
                 {XP_E2M1, 1, 0, 4}};
    if (d == XP_E8M0)
        return code == 0xFF ? NOT : ldexp(1.0, code - 127);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        if (shape[i].d != d)
            continue;
        const int man = shape[i].man, mag = code & ((1 << (shape[i].bits - 1)) - 1), e = mag >> man;
        const int frac = mag & ((1 << man) - 1);
        const double sign = code >> (shape[i].bits - 1) ? -1.0 : 1.0;
        if ((d == XP_E4M3 && mag == 0x7F) || (d == XP_E5M2 && mag > 0x7C) ||
            ((d == XP_E4M3FNUZ || d == XP_E5M2FNUZ) && code == 0x80))
            return NOT;
        if (d == XP_E5M2 && mag == 0x7C)
            return sign * INF;
        return sign * (e ? ldexp(frac + (1 << man), shape[i].low - man + e - 1) : ldexp(frac, shape[i].low - man));
    }
    return NOT;
}

static const xp_dtype small[] = {XP_E4M3, XP_E5M2, XP_E4M3FNUZ, XP_E5M2FNUZ, XP_E8M0, XP_E2M1};
enum { SMALL = sizeof small / sizeof *small };

/* Each code widens to its value and comes back as itself, through the stage: two casts of all codes at once. */
static void every_code(void **state) {
    const xp_mesh m = lone_mesh(1);
    (void)state;
    for (int k = 0; k < ROWS * SMALL; k++) {
        const xp_dtype d = small[k / ROWS];
        const xp_kernel *row = cast_rows[k % ROWS];
        const int codes = d == XP_E2M1 ? 16 : 256;
        uint8_t code[256], back[256];
        float wide[256];
        for (int c = 0; c < codes; c++)
            xp_ref_put(code, d, c, (uint64_t)c);
        const xp_tensor from = xp_tensor_1d(code, d, codes), to = xp_tensor_1d(back, d, codes);
        const xp_tensor mid = xp_tensor_1d(wide, XP_F32, codes);
        const xp_cast_args up = {.x = from, .y = mid}, down = {.x = mid, .y = to};
        assert_int_equal(run_kernel(row, &m, &up), XP_OK);
        assert_int_equal(run_kernel(row, &m, &down), XP_OK);
        for (int c = 0; c < codes; c++) {
            const double want = value_of(d, c), got = (double)wide[c];
            const uint64_t again = xp_code(back, d, c);
            if (want != want)
                assert_true(got != got && isnan(value_of(d, (int)again)));
            else if (got != want || signbit(got) != signbit(want) || again != (uint64_t)c)
                fail_msg("%s 0x%02X: %g, back as 0x%02X by %s", xp_dtype_name(d), c, got, (unsigned)again, row->name);
        }
    }
    assert_int_equal(pool_close(), XP_OK);
}

/* Rounding edges, overflow and special values: format, value, code when not saturating, code when saturating. */
typedef struct {
    xp_dtype d;
    double v;
    int code, saturated;
} edge;

static const edge edges[] = {
    {XP_E4M3, 448, 0x7E, 0x7E},
    {XP_E4M3, 464, 0x7E, 0x7E}, /* the tie beyond the largest goes to its even code */
    {XP_E4M3, 464.0001, 0x7F, 0x7E},
    {XP_E4M3, -464.0001, 0xFF, 0xFE},
    {XP_E4M3, 0x1p-9, 0x01, 0x01},
    {XP_E4M3, 0x1p-10, 0x00, 0x00},
    {XP_E4M3, -0x1p-10, 0x80, 0x80},
    {XP_E4M3, 0x1.8p-10, 0x01, 0x01},
    {XP_E4M3, 0x1.8p-9, 0x02, 0x02},
    {XP_E4M3, -0.0, 0x80, 0x80},
    {XP_E5M2, 57344, 0x7B, 0x7B},
    {XP_E5M2, 61439, 0x7B, 0x7B},
    {XP_E5M2, 61440, 0x7C, 0x7B}, /* the tie beyond the largest goes up */
    {XP_E5M2, -61440, 0xFC, 0xFB},
    {XP_E5M2, 0x1p-16, 0x01, 0x01},
    {XP_E5M2, 0x1p-17, 0x00, 0x00},
    {XP_E5M2, 0x1.8p-16, 0x02, 0x02},
    {XP_E4M3FNUZ, 240, 0x7F, 0x7F},
    {XP_E4M3FNUZ, 247.9, 0x7F, 0x7F},
    {XP_E4M3FNUZ, 248, 0x80, 0x7F},
    {XP_E4M3FNUZ, -248, 0x80, 0xFF},
    {XP_E4M3FNUZ, 0x1p-11, 0x00, 0x00},
    {XP_E4M3FNUZ, -0x1p-11, 0x00, 0x00}, /* no -0: its code is the NaN */
    {XP_E4M3FNUZ, -0.0, 0x00, 0x00},
    {XP_E5M2FNUZ, 57344, 0x7F, 0x7F},
    {XP_E5M2FNUZ, 61440, 0x80, 0x7F},
    {XP_E5M2FNUZ, 0x1p-18, 0x00, 0x00},
    {XP_E5M2FNUZ, 0x1.8p-17, 0x02, 0x02},
    {XP_E8M0, 0x1p-127, 0x00, 0x00},
    {XP_E8M0, 0x1p-149, 0x00, 0x00},
    {XP_E8M0, 0x1.000002p-127, 0x01, 0x01}, /* as ml_dtypes: all above 2^-127 is 2^-126 */
    {XP_E8M0, 0x1.7p-126, 0x01, 0x01},      /* ties go up, whichever code is even */
    {XP_E8M0, 0x1.8p-126, 0x02, 0x02},
    {XP_E8M0, 1.5, 128, 128},
    {XP_E8M0, 3.0, 129, 129},
    {XP_E8M0, 2.9999, 128, 128},
    {XP_E8M0, 6.0, 130, 130},
    {XP_E8M0, 0x1p127, 0xFE, 0xFE},
    {XP_E8M0, 0x1.8p127, 0xFF, 0xFE},
    {XP_E8M0, 0.0, 0xFF, 0x00},
    {XP_E8M0, -1.0, 0xFF, 0xFF},
    {XP_E2M1, 0.25, 0x0, 0x0},
    {XP_E2M1, 0.75, 0x2, 0x2},
    {XP_E2M1, 1.25, 0x2, 0x2},
    {XP_E2M1, 1.75, 0x4, 0x4},
    {XP_E2M1, 2.5, 0x4, 0x4},
    {XP_E2M1, 3.5, 0x6, 0x6},
    {XP_E2M1, 5.0, 0x6, 0x6},
    {XP_E2M1, 5.0001, 0x7, 0x7},
    {XP_E2M1, -7.0, 0xF, 0xF},
    {XP_E2M1, -0.2, 0x8, 0x8},
    {XP_E4M3, INF, 0x7F, 0x7E},
    {XP_E4M3, -INF, 0xFF, 0xFE},
    {XP_E5M2, INF, 0x7C, 0x7B},
    {XP_E4M3FNUZ, INF, 0x80, 0x7F},
    {XP_E8M0, INF, 0xFF, 0xFE},
    {XP_E2M1, INF, 0x7, 0x7},
    {XP_E4M3, NOT, 0x7F, 0x7F},
    {XP_E5M2, NOT, 0x7E, 0x7E},
    {XP_E5M2FNUZ, NOT, 0x80, 0x80},
    {XP_E8M0, NOT, 0xFF, 0xFF},
    {XP_E2M1, NOT, 0x7, 0x7},
    {XP_BF16, 0x1.fep127, 0x7F7F, 0x7F7F},
    {XP_BF16, 0x1.ffp127, 0x7F80, 0x7F7F},
    {XP_BF16, 0x1.01p0, 0x3F80, 0x3F80},
    {XP_BF16, 0x1.03p0, 0x3F82, 0x3F82},
    {XP_BF16, 0x1p-133, 0x0001, 0x0001},
    {XP_BF16, 0x1p-134, 0x0000, 0x0000},
    {XP_F16, 65519, 0x7BFF, 0x7BFF},
    {XP_F16, 65520, 0x7C00, 0x7BFF},
    {XP_F16, 0x1p-24, 0x0001, 0x0001},
    {XP_F16, 0x1p-25, 0x0000, 0x0000},
    {XP_F16, 0x1.8p-24, 0x0002, 0x0002},
};

static void cast_edges(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++) {
        for (int k = 0; k < ROWS; k++) {
            const uint64_t got[2] = {cast_one(cast_rows[k], edges[i].v, edges[i].d, 0),
                                     cast_one(cast_rows[k], edges[i].v, edges[i].d, 1)};
            if (got[0] != (uint64_t)edges[i].code || got[1] != (uint64_t)edges[i].saturated)
                fail_msg("%s of %g by %s: 0x%X and 0x%X, not 0x%X and 0x%X", xp_dtype_name(edges[i].d), edges[i].v,
                         cast_rows[k]->name, (unsigned)got[0], (unsigned)got[1], (unsigned)edges[i].code,
                         (unsigned)edges[i].saturated);
        }
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* ---- quant by hand ---- */

enum { WIDE = 8 };
/* One matrix of one row: what goes in, and the codes and scales that must come out. */
typedef struct {
    const char *name;
    xp_dtype code, scale;
    int rule, nonfinite;
    float eps;
    int cols, n;
    double x[WIDE];
    int codes[WIDE];
    double scales[WIDE];
    double second; /* 0: no tensor_scale; NaN: it must be NaN */
} by_hand;

static const by_hand hands[] = {
    /* 896 / 448 = 2: the row becomes 448, -224, 1 and 0 */
    {"amax", XP_E4M3, XP_F32, XP_SCALE_AMAX, 0, 0, 4, 4, {896, -448, 2, -0.0}, {0x7E, 0xF6, 0x38, 0x80}, {2}, 0},
    {"amax, f32 quotient",
     XP_E4M3,
     XP_F32,
     XP_SCALE_AMAX,
     0,
     0,
     2,
     2,
     {3, -1.5},
     {0x7E, 0xF6},
     {(double)(3.0f / 448.0f)},
     0},
    /* two columns, then one: the last block is ragged */
    {"ragged", XP_E5M2, XP_F32, XP_SCALE_AMAX, 0, 0, 2, 3, {57344, 1, 114688}, {0x7B, 0x3C, 0x7B}, {1, 2}, 0},
    {"fnuz", XP_E4M3FNUZ, XP_F32, XP_SCALE_AMAX, 0, 0, 0, 3, {480, -2, -0.0}, {0x7F, 0xC0, 0x00}, {2}, 0},
    /* scale 1 + 2^-23: (1.1875 + 2^-23) / scale is 0.19 units below 1.1875, the tie of 0x39 and 0x3A. As f32 it is the
       tie, which goes to the even code; in one rounding it would be 0x39. */
    {"two roundings",
     XP_E4M3,
     XP_F32,
     XP_SCALE_AMAX,
     0,
     0,
     0,
     2,
     {448 * 0x1.000002p0, 1.1875 + 0x1p-23},
     {0x7E, 0x3A},
     {0x1.000002p0},
     0},
    /* below 2^-149 a scale is 2^-149: 600 / 448 rounds to 1 of those units, so 600 saturates */
    {"least scale",
     XP_E4M3,
     XP_F32,
     XP_SCALE_AMAX,
     0,
     0,
     1,
     2,
     {0x1p-149, 0x1.2cp-140},
     {0x38, 0x7E},
     {0x1p-149, 0x1p-149},
     0},
    {"pow2",
     XP_E4M3,
     XP_F32,
     XP_SCALE_POW2,
     0,
     0,
     1,
     4,
     {448, 448 * 0x1.000002p0, 224, 225},
     {0x7E, 0x76, 0x7E, 0x76},
     {1, 2, 0.5, 1},
     0},
    /* just above 448 * 2^-127: a subnormal f32 quotient would be 2^-127, and the element would saturate */
    {"pow2, small",
     XP_E4M3,
     XP_E8M0,
     XP_SCALE_POW2,
     0,
     0,
     1,
     3,
     {448 * 0x1p-127, 448 * 0x1.000002p-127, 0x1p-140},
     {0x7E, 0x76, 0x00},
     {0x1p-127, 0x1p-126, 0x1p-127},
     0},
    {"pow2, large", XP_E2M1, XP_E8M0, XP_SCALE_POW2, 0, 0, 1, 2, {0x1.fffffep127, 6}, {0x6, 0x7}, {0x1p126, 1}, 0},
    /* 2^floor(log2 amax) - 8: 511 saturates, 512 is the next power */
    {"mx e4m3",
     XP_E4M3,
     XP_E8M0,
     XP_SCALE_MX,
     0,
     0,
     1,
     4,
     {448, 511, -512, 256},
     {0x7E, 0x7E, 0xF8, 0x78},
     {1, 1, 2, 1},
     0},
    {"mx e2m1",
     XP_E2M1,
     XP_E8M0,
     XP_SCALE_MX,
     0,
     0,
     1,
     4,
     {6, 7.9, 8, -0x1p-127},
     {0x7, 0x7, 0x6, 0xA},
     {1, 1, 2, 0x1p-127},
     0},
    {"mx e5m2", XP_E5M2, XP_F32, XP_SCALE_MX, 0, 0, 2, 2, {65535, 1}, {0x7B, 0x3C}, {1}, 0},
    /* 3 * 448 / 448 = 3 is a tie of powers of two and goes to 4; 2.5 goes to 2, so 1120 saturates */
    {"nearest power", XP_E4M3, XP_E8M0, XP_SCALE_AMAX, 0, 0, 1, 2, {1344, 1120}, {0x7A, 0x7E}, {4, 2}, 0},
    {"zeros, f32", XP_E4M3, XP_F32, XP_SCALE_AMAX, 0, 0, 2, 2, {0, -0.0}, {0x00, 0x80}, {1}, 0},
    {"zeros, pow2", XP_E4M3, XP_F32, XP_SCALE_POW2, 0, 0, 2, 2, {0, -0.0}, {0x00, 0x80}, {1}, 0},
    {"zeros, e8m0", XP_E2M1, XP_E8M0, XP_SCALE_MX, 0, 0, 2, 2, {0, -0.0}, {0x0, 0x8}, {0x1p-127}, 0},
    {"zeros, e4m3", XP_E2M1, XP_E4M3, XP_SCALE_AMAX, 0, 0, 2, 2, {0, -0.0}, {0x0, 0x8}, {0}, 0},
    {"eps", XP_E4M3, XP_F32, XP_SCALE_AMAX, 0, 56.0f, 1, 3, {0, 1, 112}, {0x00, 0x50, 0x7E}, {0.125, 0.125, 0.25}, 0},
    {"nan",
     XP_E4M3,
     XP_F32,
     XP_SCALE_AMAX,
     XP_BLOCK_NAN,
     0,
     2,
     4,
     {1, NOT, 448, 1},
     {0x7F, 0x7F, 0x7E, 0x38},
     {NOT, 1},
     0},
    {"inf", XP_E2M1, XP_E8M0, XP_SCALE_MX, XP_BLOCK_NAN, 0, 2, 4, {-1, INF, 6, 1}, {0x7, 0x7, 0x7, 0x2}, {NOT, 1}, 0},
    {"nan, one",
     XP_E4M3,
     XP_F32,
     XP_SCALE_AMAX,
     XP_BLOCK_ONE,
     0,
     4,
     4,
     {1, NOT, -INF, 9999},
     {0x38, 0x7F, 0xFE, 0x7E},
     {1},
     0},
    {"nan, eps", XP_E4M3, XP_F32, XP_SCALE_AMAX, XP_BLOCK_NAN, 1, 2, 2, {NOT, 1}, {0x7F, 0x7F}, {NOT}, 0},
    /* 2688 = 6 * 448, so the tensor's scale is 1; 6 gives 1; 6 * 1.5 * 2^-10 the smallest scale, 2^-9, where it is 4.5;
       6 * 2^-10 ties to 0 and its block is lost */
    {"two levels",
     XP_E2M1,
     XP_E4M3,
     XP_SCALE_AMAX,
     0,
     0,
     1,
     5,
     {2688, -6, 9 * 0x1p-10, 6 * 0x1p-10, -6 * 0x1p-10},
     {0x7, 0xF, 0x6, 0x0, 0x8},
     {448, 1, 0x1p-9, 0, 0},
     1},
    {"two levels, half",
     XP_E2M1,
     XP_E4M3,
     XP_SCALE_AMAX,
     0,
     0,
     2,
     4,
     {1344, 224, -3, 1.5},
     {0x7, 0x2, 0xF, 0x5},
     {448, 1},
     0.5},
    {"two levels, zeros", XP_E2M1, XP_E4M3, XP_SCALE_AMAX, 0, 0, 1, 2, {0, -0.0}, {0x0, 0x8}, {0, 0}, 1},
    {"two levels, nan",
     XP_E2M1,
     XP_E4M3,
     XP_SCALE_AMAX,
     0,
     0,
     1,
     3,
     {6, NOT, 0},
     {0x7, 0x7, 0x7},
     {NOT, NOT, NOT},
     NOT},
    {"two levels, one",
     XP_E2M1,
     XP_E4M3,
     XP_SCALE_AMAX,
     XP_BLOCK_ONE,
     0,
     1,
     3,
     {12, INF, 6},
     {0x7, 0x7, 0x7},
     {2, 1, 1},
     1},
};

static int same(double got, double want) {
    return isnan(want) ? isnan(got) : got == want && signbit(got) == signbit(want);
}

static void quant_by_hand(void **state) {
    const xp_mesh m = lone_mesh(1);
    (void)state;
    for (size_t n = 0; n < ROWS * sizeof hands / sizeof *hands; n++) {
        const by_hand *h = &hands[n / ROWS];
        const int64_t blocks = h->cols == 0 ? 1 : (h->n + h->cols - 1) / h->cols;
        xp_quant_args a = {.x = matrix(XP_F32, 1, h->n),
                           .q = matrix(h->code, 1, h->n),
                           .scales = matrix(h->scale, 1, blocks),
                           .rows = 1,
                           .cols = h->cols,
                           .rule = h->rule,
                           .nonfinite = h->nonfinite,
                           .eps = h->eps};
        if (h->second != 0.0)
            a.tensor_scale = vector(XP_F32, 1);
        for (int i = 0; i < h->n; i++)
            set(&a.x, 0, i, h->x[i]);
        assert_int_equal(run_kernel(quant_rows[n % ROWS], &m, &a), XP_OK);
        for (int i = 0; i < h->n; i++) {
            const int got = (int)xp_code(a.q.data, h->code, i);
            if (got != h->codes[i] && !(isnan(value_of(h->code, got)) && isnan(value_of(h->code, h->codes[i]))))
                fail_msg("%s by %s: code %d is 0x%X, not 0x%X", h->name, quant_rows[n % ROWS]->name, i, (unsigned)got,
                         (unsigned)h->codes[i]);
        }
        for (int j = 0; j < blocks; j++) {
            if (!same(get(&a.scales, 0, j), h->scales[j]))
                fail_msg("%s by %s: scale %d is %a, not %a", h->name, quant_rows[n % ROWS]->name, j,
                         get(&a.scales, 0, j), h->scales[j]);
        }
        if (h->second != 0.0 && !same(get(&a.tensor_scale, 0, 0), h->second))
            fail_msg("%s: the tensor's scale is %a", h->name, get(&a.tensor_scale, 0, 0));
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* ---- blocks ---- */

/* 3 x 5 in blocks of 2 x 3: element (r, c) is 448 * 2^(3 r + c), so each scale names its block's last element. */
static void block_shapes(void **state) {
    static const struct {
        int64_t rows, cols, i, j;
        int last[2][2]; /* exponents by block */
    } shapes[] = {{2, 3, 2, 2, {{5, 7}, {8, 10}}},
                  {0, 0, 1, 1, {{10}}},
                  {1, 0, 3, 1, {{4}, {7}}},
                  {0, 3, 1, 2, {{8, 10}}},
                  {9, 4, 1, 2, {{9, 10}}}};
    const xp_mesh m = lone_mesh(1);
    (void)state;
    for (size_t n = 0; n < ROWS * sizeof shapes / sizeof *shapes; n++) {
        const int64_t rows = shapes[n / ROWS].rows, cols = shapes[n / ROWS].cols;
        xp_quant_args a = {.x = matrix(XP_F32, 3, 5),
                           .q = matrix(XP_E4M3, 3, 5),
                           .scales = matrix(XP_F32, shapes[n / ROWS].i, shapes[n / ROWS].j),
                           .rows = rows,
                           .cols = cols};
        for (int r = 0; r < 3; r++) {
            for (int c = 0; c < 5; c++)
                set(&a.x, r, c, ldexp(448.0, 3 * r + c));
        }
        assert_int_equal(run_kernel(quant_rows[n % ROWS], &m, &a), XP_OK);
        for (int i = 0; i < a.scales.dim[0] && i < 2; i++) {
            for (int j = 0; j < a.scales.dim[1]; j++)
                assert_true(get(&a.scales, i, j) == ldexp(1.0, shapes[n / ROWS].last[i][j]));
        }
        assert_true(untouched(&a.q, 3) && untouched(&a.scales, shapes[n / ROWS].i));
        xp_dequant_args d = {.q = a.q, .scales = a.scales, .y = matrix(XP_F32, 3, 5), .rows = rows, .cols = cols};
        assert_int_equal(run_kernel(dequant_rows[n % ROWS], &m, &d), XP_OK);
        for (int r = 0; r < 3; r++) {
            for (int c = 0; c < 5; c++)
                assert_true(get(&d.y, r, c) == ldexp(448.0, 3 * r + c)); /* 2^-10 of 448 is still a code */
        }
        assert_true(untouched(&d.y, 3));
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* Every code under every e4m3 and e8m0 scale: a product of two codes is exact in f32, or overflows, or is subnormal. */
static void every_pair(void **state) {
    static const xp_dtype scale[] = {XP_E4M3, XP_E8M0};
    const xp_mesh m = lone_mesh(1);
    int compared = 0;
    (void)state;
    for (int n = 0; n < ROWS * 2 * SMALL; n++) {
        const xp_dtype d = small[n / ROWS / 2], s = scale[n / ROWS % 2];
        const int codes = d == XP_E2M1 ? 16 : 256;
        if (d == XP_E8M0)
            continue;
        xp_dequant_args a = {
            .q = matrix(d, 256, codes), .scales = matrix(s, 256, 1), .y = matrix(XP_F32, 256, codes), .rows = 1};
        for (int r = 0; r < 256; r++) {
            xp_ref_put(a.scales.data, s, r * a.scales.stride[0], (uint64_t)r);
            for (int c = 0; c < codes; c++)
                xp_ref_put(a.q.data, d, r * a.q.stride[0] + c, (uint64_t)c);
        }
        assert_int_equal(run_kernel(dequant_rows[n % ROWS], &m, &a), XP_OK);
        for (int r = 0; r < 256; r++) {
            for (int c = 0; c < codes; c++, compared++) {
                const double want = value_of(d, c) * value_of(s, r);
                if (!same(get(&a.y, r, c), fabs(want) > 0x1.fffffep127 ? copysign(INF, want) : want) &&
                    !(fabs(want) < 0x1p-126 && fabs(get(&a.y, r, c) - want) <= 0x1p-150))
                    fail_msg("%s 0x%X times %s 0x%X: %a, not %a", xp_dtype_name(d), (unsigned)c, xp_dtype_name(s),
                             (unsigned)r, get(&a.y, r, c), want);
            }
        }
        assert_int_equal(pool_close(), XP_OK);
    }
    assert_int_equal(compared, 2 * ROWS * (4 * 65536 + 256 * 16));
}

/* dequant's roundings: scale * tensor_scale, code * scale, y. */
static void dequant_by_hand(void **state) {
    const xp_mesh m = lone_mesh(1);
    (void)state;
    for (int k = 0; k < ROWS; k++) {
        xp_dequant_args a = {.q = matrix(XP_E4M3, 1, 3),
                             .scales = matrix(XP_E4M3, 1, 3),
                             .tensor_scale = vector(XP_F32, 1),
                             .y = matrix(XP_F32, 1, 3),
                             .rows = 1,
                             .cols = 1};
        const double q[3] = {1.125, -448, 0}, s[3] = {1.125, 1, NOT};
        for (int i = 0; i < 3; i++) {
            set(&a.q, 0, i, q[i]);
            set(&a.scales, 0, i, s[i]);
        }
        set(&a.tensor_scale, 0, 0, 1.0 + 0x1.8p-22);
        assert_int_equal(run_kernel(dequant_rows[k], &m, &a), XP_OK);
        /* 9/8 (1 + 3 2^-23): 3.375 units round to 3; 9/8 of it: 3.375 again, 3. In one step 3.797 units would be 4. */
        assert_true(get(&a.y, 0, 0) == 1.265625 + 0x1.8p-22);
        assert_true(get(&a.y, 0, 1) == -(448 + 0x1.4p-13)); /* 448 * 3 2^-23 is 5.25 units of 2^-15 */
        assert_true(isnan(get(&a.y, 0, 2)));
        /* to bf16 by way of f32: 1.75 times the scale is 2^-25 above 1 + 2^-8, a tie of bf16, and on it in f32 */
        a.tensor_scale.data = NULL;
        a.scales = matrix(XP_F32, 1, 3);
        a.y = matrix(XP_BF16, 1, 3);
        set(&a.q, 0, 0, 1.75);
        set(&a.scales, 0, 0, (1.0 + 0x1p-8) / 1.75);
        set(&a.scales, 0, 1, 0.0);
        set(&a.scales, 0, 2, INF);
        assert_int_equal(run_kernel(dequant_rows[k], &m, &a), XP_OK);
        const float product = 1.75f * (float)((1.0 + 0x1p-8) / 1.75);
        assert_true((double)product == 1.0 + 0x1p-8);
        assert_true(1.75 * get(&a.scales, 0, 0) == 1.0 + 0x1p-8 + 0x1p-25);
        assert_int_equal(xp_code(a.y.data, XP_BF16, 0), 0x3F80); /* even; in one step it would be 0x3F81 */
        assert_true(get(&a.y, 0, 1) == 0.0 && signbit(get(&a.y, 0, 1)) && isnan(get(&a.y, 0, 2)));
        assert_int_equal(pool_close(), XP_OK);
    }
}

/* ---- the two formulations on everything ---- */

typedef struct {
    xp_quant_args q;
    xp_dequant_args d;
} pair;

static uint64_t roll(uint64_t seed, uint64_t what, uint64_t sides) {
    return mix(seed, what, 77, 0) % sides;
}

/* Sizes, formats and rule of case `seed`; x may hold anything: zeros, subnormals, huge, NaN. */
static pair pair_draw(uint64_t seed) {
    static const xp_dtype act[] = {XP_F32, XP_BF16, XP_F16},
                          code[] = {XP_E4M3, XP_E5M2, XP_E4M3FNUZ, XP_E5M2FNUZ, XP_E2M1};
    static const xp_dtype scale[] = {XP_F32, XP_E8M0, XP_E4M3};
    static const int64_t side[] = {0, 1, 2, 16, 32};
    const int64_t t = (int64_t)roll(seed, 1, 9), h = (int64_t)roll(seed, 2, 70);
    const int64_t rows = side[roll(seed, 3, 3)], cols = side[roll(seed, 4, 5)];
    const int64_t i = t == 0 ? 0 : rows ? (t + rows - 1) / rows : 1, j = h == 0 ? 0 : cols ? (h + cols - 1) / cols : 1;
    const xp_dtype sd = scale[roll(seed, 5, 3)];
    pair p;
    memset(&p, 0, sizeof p);
    p.q = (xp_quant_args){.x = matrix(act[roll(seed, 6, 3)], t, h),
                          .q = matrix(code[roll(seed, 7, 5)], t, h),
                          .scales = matrix(sd, i, j),
                          .rows = rows,
                          .cols = cols,
                          .rule = sd == XP_E4M3 ? XP_SCALE_AMAX : (int)roll(seed, 8, 3),
                          .nonfinite = (int)roll(seed, 9, 2),
                          .eps = roll(seed, 10, 4) ? 0.0f : 1e-4f};
    if (sd == XP_E4M3 && roll(seed, 11, 4))
        p.q.tensor_scale = vector(XP_F32, 1);
    for (int64_t r = 0; r < t; r++) {
        for (int64_t c = 0; c < h; c++) {
            const uint64_t b = mix(seed, 12, (uint64_t)r, (uint64_t)c);
            double v = real(seed, (uint64_t)r, (uint64_t)c);
            if (roll(seed, 13, 4) == 0) { /* bits at will */
                const uint32_t u = (uint32_t)b;
                float f;
                memcpy(&f, &u, sizeof f);
                v = (double)f;
            } else {
                v *= ldexp((double)(b % 5 != 0), (int)(b / 5 % 60) - 30);
            }
            set(&p.q.x, r, c, v);
        }
    }
    p.d = (xp_dequant_args){.q = p.q.q,
                            .scales = p.q.scales,
                            .tensor_scale = p.q.tensor_scale,
                            .y = matrix(p.q.x.dtype, t, h),
                            .rows = rows,
                            .cols = cols};
    return p;
}

/* Elements that differ, NaN equal to NaN. */
static int differ(const xp_tensor *a, const xp_tensor *b) {
    int n = 0;
    for (int64_t i = 0; a->data && i < xp_tensor_count(a); i++) {
        const int64_t at = xp_tensor_offset(a, i), bt = xp_tensor_offset(b, i);
        const double v = xp_widen(a->data, a->dtype, at), w = xp_widen(b->data, b->dtype, bt);
        n += xp_code(a->data, a->dtype, at) != xp_code(b->data, b->dtype, bt) && !(v != v && w != w);
    }
    return n;
}

/* A row's gap: in E2M1 it may start inside a byte, and that half must stay too. */
static int gap_kept(const xp_tensor *t) {
    uint8_t poison[2] = {POISON, POISON};
    for (int64_t r = 0; r < t->dim[0]; r++) {
        for (int64_t c = t->dim[1]; c < t->stride[0]; c++) {
            const int64_t at = r * t->stride[0] + c;
            const uint64_t want = t->dtype == XP_E2M1 ? xp_code(poison, XP_E2M1, at & 1) : POISON;
            if (xp_dtype_bits(t->dtype) <= 8 && xp_code(t->data, t->dtype, at) != want)
                return 0;
        }
    }
    return 1;
}

static void two_formulations(void **state) {
    enum { CASES = 4000 };
    const xp_mesh m = lone_mesh(1);
    int64_t elements = 0, saturated = 0;
    (void)state;
    for (uint64_t seed = 0; seed < CASES; seed++) {
        const pair a = pair_draw(seed), b = pair_draw(seed);
        assert_int_equal(run_kernel(&xp_ref_quant, &m, &a.q), XP_OK);
        assert_int_equal(run_kernel(&xp_dense_quant, &m, &b.q), XP_OK);
        assert_int_equal(run_kernel(&xp_ref_dequant, &m, &a.d), XP_OK);
        assert_int_equal(run_kernel(&xp_dense_dequant, &m, &b.d), XP_OK);
        if (differ(&a.q.q, &b.q.q) || differ(&a.q.scales, &b.q.scales) || differ(&a.d.y, &b.d.y) ||
            differ(&a.q.tensor_scale, &b.q.tensor_scale))
            fail_msg("case %d: %d codes, %d scales, %d tensor scales, %d values differ", (int)seed,
                     differ(&a.q.q, &b.q.q), differ(&a.q.scales, &b.q.scales),
                     differ(&a.q.tensor_scale, &b.q.tensor_scale), differ(&a.d.y, &b.d.y));
        assert_true(gap_kept(&a.q.q) && gap_kept(&a.q.scales) && gap_kept(&b.q.q) && gap_kept(&b.q.scales));
        if (properties_hold(&xp_stage_quant, &m, &a.q) != XP_OK)
            fail_msg("case %d: %s", (int)seed, xp_error_text());
        elements += xp_tensor_count(&a.q.x);
        for (int64_t i = 0; i < xp_tensor_count(&a.q.q); i++) {
            const double v = xp_widen(a.q.q.data, a.q.q.dtype, xp_tensor_offset(&a.q.q, i));
            saturated += v == 448.0 || v == -448.0;
        }
        assert_int_equal(pool_close(), XP_OK);
    }
    assert_true(elements > 400000 && saturated > 1000);
}

/* Row blocks one by one give what the whole gives; with a scale of the tensor, or halves of bytes, there is one unit.
 */
static void slices(void **state) {
    const xp_mesh m = lone_mesh(1);
    int cut = 0;
    (void)state;
    for (uint64_t seed = 0; seed < 400; seed++) {
        const pair a = pair_draw(seed), b = pair_draw(seed);
        const int64_t n = xp_stage_quant.extent(&b.q);
        assert_int_equal(n, xp_stage_dequant.extent(&b.d));
        if (b.q.q.dtype == XP_E2M1 || b.q.tensor_scale.data) {
            assert_int_equal(n, 1);
            assert_int_equal(pool_close(), XP_OK);
            continue;
        }
        assert_int_equal(n, b.q.scales.dim[0]);
        assert_int_equal(run_kernel(&xp_ref_quant, &m, &a.q), XP_OK);
        assert_int_equal(run_kernel(&xp_ref_dequant, &m, &a.d), XP_OK);
        for (int64_t lo = 0; lo < n; lo += 2) {
            xp_quant_args q = b.q;
            xp_dequant_args d = b.d;
            xp_stage_quant.slice(&b.q, lo, lo + 2 < n ? lo + 2 : n, &q);
            xp_stage_dequant.slice(&b.d, lo, lo + 2 < n ? lo + 2 : n, &d);
            assert_int_equal(run_kernel(&xp_ref_quant, &m, &q), XP_OK);
            assert_int_equal(run_kernel(&xp_ref_dequant, &m, &d), XP_OK);
        }
        assert_true(!differ(&a.q.q, &b.q.q) && !differ(&a.q.scales, &b.q.scales) && !differ(&a.d.y, &b.d.y));
        cut += n > 2;
        assert_int_equal(pool_close(), XP_OK);
    }
    assert_true(cut > 50);
}

/* ---- what the stages say of themselves ---- */

static void property_sees(void **state) {
    const xp_mesh m = lone_mesh(1);
    double r = 0.0;
    (void)state;
    xp_quant_args a = {.x = matrix(XP_F32, 1, 2),
                       .q = matrix(XP_E4M3, 1, 2),
                       .scales = matrix(XP_F32, 1, 1),
                       .rows = 1,
                       .rule = XP_SCALE_POW2};
    set(&a.x, 0, 0, 448);
    set(&a.x, 0, 1, 3);
    assert_int_equal(run_kernel(&xp_ref_quant, &m, &a), XP_OK);
    assert_int_equal(properties_hold(&xp_stage_quant, &m, &a), XP_OK);
    set(&a.q, 0, 1, 3.25); /* a code further */
    assert_int_equal(xp_stage_quant.property[0].residual(&a, &m, &r), XP_OK);
    assert_true(r > 1.0);
    set(&a.q, 0, 1, 6);
    set(&a.scales, 0, 0, 0.5); /* everything fits but the largest, which pow2 must not saturate */
    assert_int_equal(xp_stage_quant.property[0].residual(&a, &m, &r), XP_OK);
    assert_true(r > 1.0);
    assert_int_equal(pool_close(), XP_OK);
}

static void costs(void **state) {
    const xp_mesh m = lone_mesh(1);
    xp_cost c;
    (void)state;
    xp_quant_args q = {.x = matrix(XP_BF16, 3, 64), .q = matrix(XP_E2M1, 3, 64), .scales = matrix(XP_E4M3, 3, 4)};
    q.tensor_scale = vector(XP_F32, 1);
    xp_stage_quant.cost(&q, &m, &c);
    assert_true(c.mem_bytes == 192 * 2 + 96 + 12 + 4 && c.flop == 384 && c.net_bytes == 0);
    const xp_dequant_args d = {.q = q.q, .scales = q.scales, .y = q.x};
    xp_stage_dequant.cost(&d, &m, &c);
    assert_true(c.mem_bytes == 192 * 2 + 96 + 12 && c.flop == 192);
    assert_int_equal(pool_close(), XP_OK);
}

/* Generated blocks differ in size, some are all zero; generated codes are of every kind. */
static void fills(void **state) {
    const xp_mesh m = lone_mesh(1);
    int zero = 0, kinds = 0, nans = 0, size[20] = {0};
    uint8_t seen[256] = {0};
    (void)state;
    xp_quant_args a = {.x = matrix(XP_BF16, 100, 8), .q = matrix(XP_E4M3, 100, 8), .scales = matrix(XP_F32, 100, 2)};
    a.rows = 1;
    a.cols = 4;
    for (int r = 0; r < 100; r++) {
        for (int c = 0; c < 8; c++)
            set(&a.x, r, c, 1.0);
    }
    assert_int_equal(xp_stage_quant.fill(&a, &m, "exact", 3), XP_OK);
    assert_true(get(&a.x, 50, 0) == 1.0);
    assert_int_equal(xp_stage_quant.fill(&a, &m, "real", 3), XP_OK);
    for (int r = 0; r < 100; r++) {
        int e = 0;
        zero += get(&a.x, r, 0) == 0.0;
        (void)frexp(get(&a.x, r, 4), &e);
        size[e + 8]++;
        assert_true(get(&a.x, r, 0) == get(&a.x, r, 3));
    }
    for (int i = 0; i < 20; i++)
        kinds += size[i] > 0;
    assert_true(zero > 1 && zero < 20 && kinds > 10);
    xp_dequant_args d = {.q = a.q, .scales = matrix(XP_E8M0, 100, 2), .y = a.x, .rows = 1, .cols = 4};
    for (int extreme = 0; extreme < 2; extreme++) {
        assert_int_equal(xp_stage_dequant.fill(&d, &m, extreme ? "extreme" : "real", 4), XP_OK);
        for (int r = 0; r < 100; r++) {
            for (int c = 0; c < 8; c++) {
                nans += isnan(get(&d.q, r, c));
                seen[xp_code(xp_tensor_at(&d.q, r, c, 0, 0), XP_E4M3, 0)] = 1;
            }
            if (!extreme)
                assert_true(fabs(log2(get(&d.scales, r, 0))) <= 8.0);
        }
        assert_int_equal(nans > 0, extreme);
    }
    kinds = 0;
    for (int i = 0; i < 256; i++)
        kinds += seen[i];
    assert_true(kinds > 240);
    assert_int_equal(pool_close(), XP_OK);
}

SPOIL(q_rows, xp_quant_args, a->rows = -1)
SPOIL(q_cols, xp_quant_args, a->cols = 3)
SPOIL(q_scales, xp_quant_args, a->scales.dim[0] = 2)
SPOIL(q_rule, xp_quant_args, a->rule = 3)
SPOIL(q_pow2, xp_quant_args, a->rule = XP_SCALE_POW2; a->scales.dtype = XP_E4M3)
SPOIL(q_nonfinite, xp_quant_args, a->nonfinite = 2)
SPOIL(q_eps, xp_quant_args, a->eps = -1.0f)
SPOIL(q_eps_nan, xp_quant_args, a->eps = (float)NAN)
SPOIL(q_code, xp_quant_args, a->q.dtype = XP_E8M0)
SPOIL(q_act, xp_quant_args, a->x.dtype = XP_F64)
SPOIL(q_second, xp_quant_args, a->tensor_scale = xp_tensor_1d(a->x.data, XP_F32, 1))
SPOIL(q_width, xp_quant_args, a->q.dim[1] = 7)
static const refusal quant_refusals[] = {
    {q_rows, "rows is -1, expected 0 (the whole dimension) or more"},
    {q_cols, "scales dim 1 is 2, expected 3, the blocks of 3 in 8"},
    {q_scales, "scales dim 0 is 2, expected 3, the blocks of 1 in 3"},
    {q_rule, "rule is 3, expected 0 to 2"},
    {q_pow2, "scales has dtype e4m3, expected f32 or e8m0"},
    {q_nonfinite, "nonfinite is 2, expected 0 or 1"},
    {q_eps, "eps is -1, expected 0 or more"},
    {q_eps_nan, "eps is"},
    {q_code, "q has dtype e8m0, expected e4m3|e5m2|e4m3fnuz|e5m2fnuz|e2m1"},
    {q_act, "x has dtype f64, expected f32|bf16|f16"},
    {q_second, "scales has dtype f32, expected e4m3, as tensor_scale is present"},
    {q_width, "q dim 1 is 7, expected H = 8"},
};

SPOIL(u_cols, xp_dequant_args, a->cols = 0)
SPOIL(u_second, xp_dequant_args, a->tensor_scale = xp_tensor_1d(a->y.data, XP_F32, 1))
SPOIL(u_scale, xp_dequant_args, a->scales.dtype = XP_E5M2)
static const refusal dequant_refusals[] = {
    {u_cols, "dequant: scales dim 1 is 2, expected 1, the blocks of 0 in 8"},
    {u_second, "scales has dtype f32, expected e4m3"},
    {u_scale, "scales has dtype e5m2, expected f32|e4m3|e8m0"},
};

static void refusals(void **state) {
    const xp_mesh m = lone_mesh(1);
    (void)state;
    const xp_quant_args q = {
        .x = matrix(XP_F32, 3, 8), .q = matrix(XP_E4M3, 3, 8), .scales = matrix(XP_F32, 3, 2), .rows = 1, .cols = 4};
    REFUSE(xp_stage_quant, m, q, quant_refusals);
    const xp_dequant_args d = {.q = q.q, .scales = q.scales, .y = q.x, .rows = 1, .cols = 4};
    REFUSE(xp_stage_dequant, m, d, dequant_refusals);
    assert_int_equal(pool_close(), XP_OK);
}

/* ---- codes that travel with their scales ---- */

enum { EXPERTS = 6, HIDDEN = 5, SCALES_A_ROW = 3 }; /* 12 bytes: more than a row or its token */
typedef struct {
    xp_mesh_spec spec;
    xp_dtype code, scale;
    int align;
} travel_case;

static xp_mesh_report report;

/* Rows that a rank has for an expert: rank 2 has none at all. */
static int64_t rows_of(int rank, int64_t e) {
    return rank == 2 ? 0 : (int64_t)(mix(31, (uint64_t)rank, (uint64_t)e, 0) % 4);
}
static uint64_t code_of(int rank, int64_t e, int64_t i, int64_t h) {
    return mix(32, (uint64_t)(rank * 100 + e), (uint64_t)i, (uint64_t)h) & 0xFF;
}
/* f32 scales of any bits but NaN's; e8m0 of any code. */
static uint64_t scale_of(const travel_case *c, int rank, int64_t e, int64_t i, int64_t j) {
    const uint64_t b = mix(40, (uint64_t)(rank * 100 + e), (uint64_t)i, (uint64_t)j);
    return c->scale == XP_E8M0 ? b & 0xFF : b & 0x7F7FFFFF;
}

static xp_dispatch_args travel_open(const travel_case *c, int rank) {
    int64_t rows = 0, at = 0;
    for (int64_t e = 0; e < EXPERTS; e++)
        rows += rows_of(rank, e);
    xp_dispatch_args a = {.rows = matrix(c->code, rows + 1, HIDDEN),
                          .tok = vector(XP_I64, rows + 1),
                          .counts = vector(XP_I64, EXPERTS),
                          .offsets = vector(XP_I64, EXPERTS + 1),
                          .scales = matrix(c->scale, rows + 1, SCALES_A_ROW),
                          .align = c->align};
    for (int64_t e = 0; e < EXPERTS; e++) {
        set(&a.offsets, e, 0, (double)at);
        set(&a.counts, e, 0, (double)rows_of(rank, e));
        for (int64_t i = 0; i < rows_of(rank, e); i++, at++) {
            set(&a.tok, at, 0, (double)(1000 * rank + at));
            for (int64_t h = 0; h < HIDDEN; h++)
                xp_ref_put(xp_tensor_at(&a.rows, at, h, 0, 0), c->code, 0, code_of(rank, e, i, h));
            for (int64_t j = 0; j < SCALES_A_ROW; j++)
                xp_ref_put(xp_tensor_at(&a.scales, at, j, 0, 0), c->scale, 0, scale_of(c, rank, e, i, j));
        }
    }
    set(&a.offsets, EXPERTS, 0, (double)at);
    return a;
}

/* Row `at` is row i of (owner, e), or a pad when owner is negative. */
static xp_status row_right(const travel_case *c, const xp_dispatch_args *a, int64_t at, int owner, int64_t e,
                           int64_t i) {
    for (int64_t h = 0; h < HIDDEN; h++) {
        const uint64_t got = xp_code(xp_tensor_at(&a->recv, at, h, 0, 0), c->code, 0);
        const uint64_t want = owner < 0 ? 0 : code_of(owner, e, i, h);
        const int nans = isnan(value_of(c->code, (int)got)) && isnan(value_of(c->code, (int)want));
        MUST(got == want || nans, "recv[%d][%d] is 0x%X, not 0x%X", (int)at, (int)h, (unsigned)got, (unsigned)want);
    }
    for (int64_t j = 0; j < SCALES_A_ROW; j++) {
        const uint64_t got = xp_code(xp_tensor_at(&a->recv_scales, at, j, 0, 0), c->scale, 0);
        const uint64_t want = owner < 0 ? 0 : scale_of(c, owner, e, i, j);
        MUST(got == want, "recv_scales[%d][%d] is 0x%X, not 0x%X", (int)at, (int)j, (unsigned)got, (unsigned)want);
    }
    return XP_OK;
}

static xp_status travel_rank(const xp_mesh *m, int rank, void *arg) {
    static const xp_kernel *const rows[] = {&xp_ref_dispatch, &xp_dense_dispatch};
    const travel_case *c = arg;
    const int ep = c->spec.ep, me = xp_mesh_axis_index(&c->spec, XP_EP, rank);
    const int64_t local = EXPERTS / ep;
    int peers[XP_MESH_MAX_RANKS];
    xp_mesh_axis_ranks(&c->spec, XP_EP, rank, peers);
    for (int k = 0; k < ROWS; k++) {
        xp_dispatch_args a = travel_open(c, rank);
        int64_t room = 1, at = 0;
        double r = 0.0;
        for (int64_t e = me * local; e < (me + 1) * local; e++) {
            int64_t n = 0;
            for (int q = 0; q < ep; q++)
                n += rows_of(peers[q], e);
            room += (n + c->align - 1) / c->align * c->align;
        }
        a.recv = matrix(c->code, room, HIDDEN);
        a.recv_tok = vector(XP_I64, room);
        a.recv_counts = matrix(XP_I64, ep, local);
        a.recv_offsets = vector(XP_I64, local + 1);
        a.recv_scales = matrix(c->scale, room, SCALES_A_ROW);
        XP_TRY(run_kernel(rows[k], m, &a));
        XP_TRY(properties_hold(&xp_stage_dispatch, m, &a));
        for (int64_t e = me * local; e < (me + 1) * local; e++) {
            for (int q = 0; q < ep; q++) {
                for (int64_t i = 0; i < rows_of(peers[q], e); i++, at++)
                    XP_TRY(row_right(c, &a, at, peers[q], e, i));
            }
            for (; at % c->align != 0; at++)
                XP_TRY(row_right(c, &a, at, -1, e, 0));
        }
        MUST(at == room - 1, "%d rows in use, not %d", (int)at, (int)(room - 1));
        MUST(untouched(&a.recv, at) && untouched(&a.recv_scales, at), "a row beyond those in use was written");
        if (rank == 0 && at > 0) /* one bit of one scale */
            *(uint8_t *)xp_tensor_at(&a.recv_scales, 0, 1, 0, 0) ^= 1;
        XP_TRY(xp_stage_dispatch.property[3].residual(&a, m, &r));
        MUST(me != 0 || rank != 0 || at == 0 || r > 1.0, "a changed scale was not seen");
    }
    return pool_close();
}

static void scales_travel(void **state) {
    static const char *const meshes[] = {"fsdp=1", "fsdp=2,ep=2", "fsdp=6,ep=6", "dp=2,fsdp=3,ep=3"};
    static const xp_dtype code[] = {XP_E4M3, XP_E5M2, XP_E4M3FNUZ, XP_E5M2FNUZ};
    (void)state;
    for (int n = 0; n < 4 * 4 * 2; n++) {
        travel_case c = {.code = code[n / 4 % 4], .scale = n & 1 ? XP_E8M0 : XP_F32, .align = n / 16 ? 16 : 1};
        suite_spec(meshes[n % 4], &c.spec);
        suite_run(meshes[n % 4], travel_rank, &c, &report);
        suite_expect_ok(meshes[n % 4], &report);
    }
}

SPOIL(t_absent, xp_dispatch_args, a->recv_scales.data = NULL)
SPOIL(t_alone, xp_dispatch_args, a->scales.data = NULL)
SPOIL(t_wide, xp_dispatch_args, a->rows.dtype = a->recv.dtype = XP_BF16)
SPOIL(t_count, xp_dispatch_args, a->recv_scales.dim[1] = 1)
SPOIL(t_rows, xp_dispatch_args, a->scales.dim[0] = 1)
SPOIL(t_kind, xp_dispatch_args, a->recv_scales.dtype = XP_E8M0)
SPOIL(t_e8m0, xp_dispatch_args, a->rows.dtype = a->recv.dtype = XP_E8M0)
static const refusal travel_refusals[] = {
    {t_absent, "recv_scales is absent, expected it with scales and only then"},
    {t_alone, "recv_scales is present, expected it with scales and only then"},
    {t_wide, "rows has dtype bf16, expected 8 bits where scales are present"},
    {t_count, "recv_scales dim 1 is 1, expected J = 3"},
    {t_rows, "scales dim 0 is 1, expected M = "},
    {t_kind, "recv_scales has dtype e8m0, expected f32, as scales has"},
    {t_e8m0, "rows has dtype e8m0, expected f64|f32|bf16|f16|e4m3"},
};

static void travel_refuses(void **state) {
    const xp_mesh m = lone_mesh(1), two = lone_mesh(2);
    travel_case c = {.code = XP_E4M3, .scale = XP_F32, .align = 1};
    xp_cost with, without;
    (void)state;
    suite_spec("fsdp=1", &c.spec);
    xp_dispatch_args a = travel_open(&c, 0);
    a.recv = matrix(XP_E4M3, 40, HIDDEN);
    a.recv_tok = vector(XP_I64, 40);
    a.recv_counts = matrix(XP_I64, 1, EXPERTS);
    a.recv_offsets = vector(XP_I64, EXPERTS + 1);
    a.recv_scales = matrix(XP_F32, 40, SCALES_A_ROW);
    REFUSE(xp_stage_dispatch, m, a, travel_refusals);
    /* each row that leaves carries three f32 more */
    int64_t leave = 0, all = 0;
    for (int64_t e = 0; e < EXPERTS; e++) {
        all += rows_of(0, e);
        leave += e >= EXPERTS / 2 ? rows_of(0, e) : 0;
    }
    a.recv_counts = matrix(XP_I64, 2, EXPERTS / 2);
    xp_stage_dispatch.cost(&a, &two, &with);
    a.scales.data = a.recv_scales.data = NULL;
    xp_stage_dispatch.cost(&a, &two, &without);
    assert_true(leave > 0 && with.net_bytes - without.net_bytes == 12.0 * (double)leave);
    assert_true(with.mem_bytes - without.mem_bytes == 24.0 * (double)all);
    assert_int_equal(pool_close(), XP_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code),
        cmocka_unit_test(cast_edges),
        cmocka_unit_test(quant_by_hand),
        cmocka_unit_test(block_shapes),
        cmocka_unit_test(every_pair),
        cmocka_unit_test(dequant_by_hand),
        cmocka_unit_test(two_formulations),
        cmocka_unit_test(slices),
        cmocka_unit_test(property_sees),
        cmocka_unit_test(costs),
        cmocka_unit_test(fills),
        cmocka_unit_test(refusals),
        cmocka_unit_test(scales_travel),
        cmocka_unit_test(travel_refuses),
    };
    return cmocka_run_group_tests_name("formats", tests, NULL, NULL);
}
