/* All 2^32 f32 inputs of every narrowing cast, against a second formulation and against committed digests.
 *
 *   cast FORMAT slice FOLDER     the first of 64 parts, and its line of FOLDER/FORMAT.txt
 *   cast FORMAT sample FOLDER    a fixed 1/61 of that part, without the digest (for slow builds)
 *   cast FORMAT all FOLDER       every part and every line, the second kernel row at every input too
 *   cast FORMAT write FOLDER     every part; writes FOLDER/FORMAT.txt
 *
 * The second formulation knows integers only: it adds half a unit to the bits of the f32 and shifts. It must not call
 * the reference, and both kernel rows, saturating and not, must give its codes to the last bit.
 *
 * A part is 2^26 inputs that are spread over the whole range: part p holds, from each multiple of 4096 on, the 64
 * inputs from 64 p - 32 on. So part 0 has every sign and exponent, and, as no format keeps more than 10 of the 23
 * significand bits, every tie of every format with 32 neighbours on each side. The digest of a part is the SHA-256 of
 * its codes in that order, not saturating, 8 bits or little-endian 16 bits each; a NaN code counts as the format's
 * positive NaN (e2m1 has none: NaN gives 0x7). The number behind it says how many saturating codes differ from those.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dense/dense.h"
#include "hash.h"
#include "ref.h"

enum { WINDOW = 64, STEP = 4096, PARTS = STEP / WINDOW, BATCH = 64 * WINDOW, SAMPLE = 61 };
static const uint32_t PART = (uint32_t)1 << 26;

/* man: significand bits kept; emin: f32 exponent field of the smallest normal; max, over, nan: codes; sign: of -0. */
typedef struct {
    const char *name;
    xp_dtype d;
    int man, emin;
    uint32_t max, over, nan, sign;
    int fnuz;
    uint32_t magnitude, top; /* a code is NaN when its magnitude bits are above top */
} format;

static const format formats[] = {
    {"bf16", XP_BF16, 7, 1, 0x7F7F, 0x7F80, 0x7FC0, 0x8000, 0, 0x7FFF, 0x7F80},
    {"f16", XP_F16, 10, 113, 0x7BFF, 0x7C00, 0x7E00, 0x8000, 0, 0x7FFF, 0x7C00},
    {"e4m3", XP_E4M3, 3, 121, 0x7E, 0x7F, 0x7F, 0x80, 0, 0x7F, 0x7E},
    {"e5m2", XP_E5M2, 2, 113, 0x7B, 0x7C, 0x7E, 0x80, 0, 0x7F, 0x7C},
    {"e4m3fnuz", XP_E4M3FNUZ, 3, 120, 0x7F, 0x80, 0x80, 0x80, 1, 0xFF, 0xFF},
    {"e5m2fnuz", XP_E5M2FNUZ, 2, 112, 0x7F, 0x80, 0x80, 0x80, 1, 0xFF, 0xFF},
    {"e8m0", XP_E8M0, 0, 0, 0xFE, 0xFF, 0xFF, 0, 0, 0xFF, 0xFF},
    {"e2m1", XP_E2M1, 1, 127, 0x7, 0x7, 0x7, 0x8, 0, 0xF, 0xF},
};
enum { FORMATS = sizeof formats / sizeof *formats };

/* ---- the second formulation ---- */

/* The magnitude a on the format's grid as if it had no end. Normal results: half a unit less one, plus the last bit
 * kept, and the carry does the rest. Subnormal ones: the same on the significand alone, which has 24 bits, so that a
 * shift by 26 or more leaves nothing. */
static inline uint32_t grid(uint32_t a, int man, int emin) {
    const int drop = 23 - man, e = (int)(a >> 23), field = e ? e : 1;
    if (field >= emin)
        return ((a + ((uint32_t)1 << (drop - 1)) - 1 + (a >> drop & 1)) >> drop) - ((uint32_t)(emin - 1) << man);
    const uint32_t m = e ? (a & 0x7FFFFF) | 0x800000 : a;
    const int far = drop + emin - field, by = far > 31 ? 31 : far;
    return (m + ((uint32_t)1 << (by - 1)) - 1 + (m >> by & 1)) >> by;
}

static inline uint32_t narrow_float(uint32_t x, const format *f, int man, int emin, int saturate) {
    const uint32_t a = x & 0x7FFFFFFF, sign = x >> 31 ? f->sign : 0;
    if (a > 0x7F800000)
        return f->fnuz || f->nan == f->max ? f->nan : f->nan | sign;
    const uint32_t c = a == 0x7F800000 ? f->max + 1 : grid(a, man, emin);
    if (c > f->max)
        return saturate ? f->max | sign : f->over | sign;
    return f->fnuz && c == 0 ? 0 : c | sign;
}

/* The exponent field is the code: 1 more from the middle on. 2^-127 is the f32 0x00400000: all above it has code 1. */
static inline uint32_t narrow_e8m0(uint32_t x, int saturate) {
    if (x == 0 || x == 0x80000000)
        return saturate ? 0x00 : 0xFF;
    if (x > 0x7F800000)
        return 0xFF;
    const uint32_t c = x < 0x00800000 ? x > 0x00400000 : (x + 0x00400000) >> 23;
    return c > 0xFE ? (saturate ? 0xFE : 0xFF) : c;
}

/* ---- a batch: the same inputs through everybody ---- */

typedef struct {
    const format *f;
    uint32_t x[BATCH];
    uint16_t want[2][BATCH];
    uint8_t code[2][2 * BATCH], got[2 * BATCH]; /* as the rows store them */
    size_t bytes;
    uint64_t differ; /* inputs of this part whose saturating code is another */
    xp_sha256 sha;
} batch;

/* Codes side by side in memory: two bytes, one, or half a one. */
static size_t pack(const format *f, const uint16_t *code, uint8_t *out) {
    const int bits = xp_dtype_bits(f->d);
    for (int i = 0; i < BATCH; i++) {
        if (bits == 16)
            out[2 * i] = (uint8_t)code[i], out[2 * i + 1] = (uint8_t)(code[i] >> 8);
        else if (bits == 8)
            out[i] = (uint8_t)code[i];
        else if (i % 2 == 0)
            out[i / 2] = (uint8_t)(code[i] | code[i + 1] << 4);
    }
    return (size_t)(BATCH * bits / 8);
}

/* One loop a width, since man and emin are constants in it. */
#define LOOP(narrow_x)                                   \
    for (int i = 0; i < BATCH; i++) {                    \
        const uint32_t x = b->x[i];                      \
        for (int saturate = 0; saturate < 2; saturate++) \
            b->want[saturate][i] = (uint16_t)(narrow_x); \
    }

static void seconds(batch *b) {
    const format *f = b->f;
    switch (f->d) {
    case XP_BF16:
        LOOP(narrow_float(x, f, 7, 1, saturate))
        break;
    case XP_F16:
        LOOP(narrow_float(x, f, 10, 113, saturate))
        break;
    case XP_E8M0:
        LOOP(narrow_e8m0(x, saturate))
        break;
    default:
        LOOP(narrow_float(x, f, f->man, f->emin, saturate))
    }
    for (int i = 0; i < BATCH; i++)
        b->differ += b->want[0][i] != b->want[1][i];
}

static int run_row(batch *b, const xp_kernel *k, int saturate) {
    const xp_cast_args a = {
        .x = xp_tensor_1d(b->x, XP_F32, BATCH), .y = xp_tensor_1d(b->got, b->f->d, BATCH), .saturate = saturate};
    const xp_exec x = {0};
    memset(b->got, 0x5A, sizeof b->got);
    if (k->run(&x, &a) != XP_OK)
        return 0;
    if (memcmp(b->got, b->code[saturate], b->bytes) == 0)
        return 1;
    for (int i = 0; i < BATCH; i++) {
        const unsigned got = (unsigned)xp_code(b->got, b->f->d, i), want = b->want[saturate][i];
        if (got != want) {
            printf("%s: %s gives 0x%X for the f32 0x%08X (saturate %d), not 0x%X\n", b->f->name, k->name, got,
                   (unsigned)b->x[i], saturate, want);
            break;
        }
    }
    return 0;
}

static void digest_add(batch *b) {
    const format *f = b->f;
    const int wide = xp_dtype_bits(f->d) == 16;
    uint8_t *out = b->got; /* no longer in use */
    for (int i = 0; i < BATCH; i++) {
        const uint32_t c = (b->want[0][i] & f->magnitude) > f->top ? f->nan : b->want[0][i];
        out[wide ? 2 * i : i] = (uint8_t)c;
        if (wide)
            out[2 * i + 1] = (uint8_t)(c >> 8);
    }
    xp_sha256_add(&b->sha, out, wide ? 2 * BATCH : BATCH);
}

/* A saturating cast is run where it differs, and everywhere when all; so is the dense row, on 1 batch in 16 else. */
static int run_batch(batch *b, uint32_t nth, int all) {
    static const xp_kernel *const row[] = {&xp_ref_cast, &xp_dense_cast};
    const uint64_t before = b->differ;
    seconds(b);
    const int rows = all || nth % 16 == 0 ? 2 : 1, last = all || b->differ > before;
    for (int saturate = 0; saturate <= last; saturate++) {
        b->bytes = pack(b->f, b->want[saturate], b->code[saturate]);
        for (int k = 0; k < rows; k++) {
            if (!run_row(b, row[k], saturate))
                return 0;
        }
    }
    return 1;
}

/* Part p, or every SAMPLE-th batch of it. line: what the table says of it. */
static int run_part(batch *b, int p, int sample, int all, char line[96]) {
    uint8_t digest[32];
    char hex[65];
    b->differ = 0;
    xp_sha256_begin(&b->sha);
    const uint32_t step = sample ? BATCH * SAMPLE : BATCH;
    for (uint32_t k = 0; k < PART; k += step) {
        for (uint32_t i = 0; i < BATCH; i++)
            b->x[i] = (k + i) / WINDOW * STEP + (uint32_t)p * WINDOW + (k + i) % WINDOW - WINDOW / 2;
        if (!run_batch(b, k / step, all))
            return 0;
        digest_add(b);
    }
    xp_sha256_end(&b->sha, digest);
    xp_sha256_hex(digest, hex);
    snprintf(line, 96, "%02d %s %llu", p, hex, (unsigned long long)b->differ);
    return 1;
}

/* ---- the tables ---- */

static FILE *table_open(const char *folder, const format *f, const char *mode) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.txt", folder, f->name);
    FILE *file = fopen(path, mode);
    if (!file)
        printf("%s: cannot be opened\n", path);
    return file;
}

/* 1 when the next line of the table is this one. */
static int table_says(FILE *table, const char *line, const char *name) {
    char want[128] = "";
    if (!fgets(want, sizeof want, table))
        want[0] = '\0';
    want[strcspn(want, "\n")] = '\0';
    if (strcmp(want, line) == 0)
        return 1;
    printf("%s: the table says\n  %s\nand the codes are\n  %s\n", name, want, line);
    return 0;
}

static int run(const format *f, const char *what, const char *folder) {
    static batch b;
    const int all = strcmp(what, "all") == 0, write = strcmp(what, "write") == 0, sample = strcmp(what, "sample") == 0;
    FILE *table = sample ? NULL : table_open(folder, f, write ? "w" : "r");
    int parts = 0, good = 1;
    if (!sample && !table)
        return 0;
    b.f = f;
    for (int p = 0; good && p < (all || write ? PARTS : 1); p++) {
        char line[96];
        good = run_part(&b, p, sample, all, line);
        if (good && write)
            fprintf(table, "%s\n", line);
        else if (good && !sample)
            good = table_says(table, line, f->name);
        parts += good;
    }
    if (table && fclose(table) != 0)
        good = 0;
    printf("%s: %s, %d parts of 2^26 inputs agree\n", f->name, what, parts);
    return good;
}

int main(int argc, char **argv) {
    static const char *const words[] = {"slice", "sample", "all", "write"};
    for (int i = 0; argc == 4 && i < FORMATS; i++) {
        for (size_t w = 0; strcmp(argv[1], formats[i].name) == 0 && w < 4; w++) {
            if (strcmp(argv[2], words[w]) == 0)
                return run(&formats[i], argv[2], argv[3]) ? EXIT_SUCCESS : EXIT_FAILURE;
        }
    }
    printf("usage: cast FORMAT slice|sample|all|write FOLDER\n");
    return EXIT_FAILURE;
}
