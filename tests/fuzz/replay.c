/* Runs a fuzz target without libFuzzer: over every committed seed, every beginning of it, and it with one byte changed.
 *
 *   replay_<target> FOLDER...
 *
 * So each seed is a regression test in every build, by every compiler. Deterministic: the same inputs in the same order
 * on every host. It must not find a folder without seeds to be well. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

enum {
    MAX_SEEDS = 1024,
    MAX_PATH = 1024,
    MAX_BYTES = 1 << 20,
    CUTS = 256,   /* beginnings of one seed: all of a short one, spread over a long one */
    CHANGES = 256 /* changed copies of one seed */
};

static char seed[MAX_SEEDS][MAX_PATH];
static int seeds;
static unsigned long long runs;

static int by_name(const void *a, const void *b) {
    return strcmp(a, b);
}

static int add_folder(const char *folder) {
    DIR *d = opendir(folder);
    const int before = seeds;
    if (!d) {
        fprintf(stderr, "replay: cannot open %s\n", folder);
        return 0;
    }
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.' || seeds == MAX_SEEDS)
            continue;
        if (snprintf(seed[seeds], MAX_PATH, "%s/%s", folder, e->d_name) < MAX_PATH)
            seeds++;
    }
    closedir(d);
    if (seeds == before)
        fprintf(stderr, "replay: %s holds no seeds\n", folder);
    return seeds > before;
}

/* The target gets a block of exactly the input's size. */
static void run(const uint8_t *data, size_t bytes) {
    uint8_t *block = malloc(bytes ? bytes : 1);
    FUZZ_CHECK(block != NULL, "%zu bytes", bytes);
    memcpy(block, data, bytes);
    LLVMFuzzerTestOneInput(block, bytes);
    free(block);
    runs++;
}

/* The 64-bit mixer of splitmix64. */
static uint64_t mix(uint64_t x) {
    x += UINT64_C(0x9E3779B97F4A7C15);
    x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
    return x ^ (x >> 31);
}

/* One byte replaced by what breaks parsers, by the byte's neighbour, by another place's byte, or left out. */
static void run_changed(uint8_t *data, size_t bytes, uint64_t n) {
    static const uint8_t nasty[] = {0,   '\t', '\n', ' ', '"', '#',  '%', ',', '-', '.',  '/',  '0',  '9',
                                    ':', '=',  'E',  'K', '[', '\\', 'e', '{', '}', 0x7f, 0x80, 0xc3, 0xff};
    const uint64_t r = mix(n);
    const size_t at = (size_t)(r >> 8) % bytes;
    const uint8_t was = data[at];
    switch (r & 3) {
    case 0:
        data[at] = nasty[(r >> 40) % sizeof nasty];
        break;
    case 1:
        data[at] = (uint8_t)(was + 1);
        break;
    case 2:
        data[at] = data[(size_t)(r >> 24) % bytes];
        break;
    default:
        memmove(data + at, data + at + 1, bytes - at - 1);
        run(data, bytes - 1);
        memmove(data + at + 1, data + at, bytes - at - 1);
        data[at] = was;
        return;
    }
    run(data, bytes);
    data[at] = was;
}

static int run_seed(const char *path) {
    static uint8_t data[MAX_BYTES];
    FILE *f = fopen(path, "rb");
    if (!f) {
        fprintf(stderr, "replay: cannot read %s\n", path);
        return 0;
    }
    const size_t bytes = fread(data, 1, sizeof data, f);
    const int whole = feof(f) && !ferror(f);
    fclose(f);
    if (!whole) {
        fprintf(stderr, "replay: %s cannot be read, or is larger than %d bytes\n", path, MAX_BYTES - 1);
        return 0;
    }
    /* Said before it runs: after a crash the last line names the seed. */
    printf("%s, %zu bytes\n", path, bytes);
    fflush(stdout);
    run(data, bytes);
    for (size_t i = 0; i < CUTS && i < bytes; i++)
        run(data, bytes <= CUTS ? i : i * (bytes / CUTS));
    for (uint64_t i = 0; i < CHANGES && bytes > 0; i++)
        run_changed(data, bytes, i);
    return 1;
}

int main(int argc, char **argv) {
    int good = argc > 1;
    for (int i = 1; i < argc; i++)
        good = add_folder(argv[i]) && good;
    qsort(seed, (size_t)seeds, sizeof *seed, by_name);
    for (int i = 0; i < seeds; i++)
        good = run_seed(seed[i]) && good;
    printf("%d seeds, %llu inputs\n", seeds, runs);
    return good && seeds > 0 ? 0 : 1;
}
