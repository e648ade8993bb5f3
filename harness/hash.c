/* The two hashes of hash.h.
 *
 * xp_hash_bytes keeps eight lanes so that a core hashes about as fast as it reads: inputs of every judged call pass
 * through it twice. SHA-256 is written from FIPS 180-4; its constants are the fractional parts of square and cube roots
 * of the first primes. */
#include "hash.h"

#include <stdio.h>
#include <string.h>

enum { LANES = 8, STRIPE = 64 };

static uint64_t rotl64(uint64_t v, int n) {
    return v << n | v >> (64 - n);
}

/* A bijection on 64 bits in which every input bit reaches every output bit. */
static uint64_t mix64(uint64_t v) {
    v = (v ^ v >> 31) * 0x9fb21c651e98df25u;
    v = (v ^ v >> 29) * 0xd6e8feb86659fd93u;
    return v ^ v >> 32;
}

/* A bijection of lane[i] for every value of the stripe, and of each word for every value of the lane. */
static void absorb(uint64_t lane[LANES], const unsigned char *p) {
    for (int i = 0; i < LANES; i++) {
        uint64_t w;
        memcpy(&w, p + 8 * i, sizeof w);
        lane[i] = rotl64((lane[i] ^ w) * 0xff51afd7ed558ccdu, 29);
    }
}

xp_hash xp_hash_bytes(const void *data, size_t n, uint64_t seed) {
    const unsigned char *p = data;
    uint64_t lane[LANES];
    size_t left = n;
    for (int i = 0; i < LANES; i++)
        lane[i] = mix64(seed + (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u);
    for (; left >= STRIPE; left -= STRIPE, p += STRIPE)
        absorb(lane, p);
    if (left > 0) {
        unsigned char tail[STRIPE] = {0};
        memcpy(tail, p, left);
        absorb(lane, tail);
    }
    xp_hash h = {mix64((uint64_t)n ^ seed), mix64(~(uint64_t)n)};
    for (int i = 0; i < LANES; i++) {
        h.lo = mix64(h.lo ^ lane[i]);
        h.hi = mix64(rotl64(h.hi, 17) ^ lane[LANES - 1 - i]);
    }
    return h;
}

uint64_t xp_hash64(const void *data, size_t n, uint64_t seed) {
    return xp_hash_bytes(data, n, seed).lo;
}

int xp_hash_equal(xp_hash a, xp_hash b) {
    return a.lo == b.lo && a.hi == b.hi;
}

/* ---- SHA-256 ---- */

static const uint32_t sha_start[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

static const uint32_t sha_round[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotr32(uint32_t v, int n) {
    return v >> n | v << (32 - n);
}

static void sha_schedule(const uint8_t block[64], uint32_t w[64]) {
    for (int t = 0; t < 16; t++) {
        const uint8_t *b = block + 4 * t;
        w[t] = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | (uint32_t)b[3];
    }
    for (int t = 16; t < 64; t++) {
        const uint32_t s0 = rotr32(w[t - 15], 7) ^ rotr32(w[t - 15], 18) ^ w[t - 15] >> 3;
        const uint32_t s1 = rotr32(w[t - 2], 17) ^ rotr32(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = s1 + w[t - 7] + s0 + w[t - 16];
    }
}

static void sha_block(uint32_t state[8], const uint8_t block[64]) {
    uint32_t w[64];
    sha_schedule(block, w);
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int t = 0; t < 64; t++) {
        const uint32_t s1 = rotr32(e, 6) ^ rotr32(e, 11) ^ rotr32(e, 25);
        const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + sha_round[t] + w[t];
        const uint32_t s0 = rotr32(a, 2) ^ rotr32(a, 13) ^ rotr32(a, 22);
        const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    const uint32_t out[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++)
        state[i] += out[i];
}

void xp_sha256_begin(xp_sha256 *s) {
    memset(s, 0, sizeof *s);
    memcpy(s->state, sha_start, sizeof s->state);
}

void xp_sha256_add(xp_sha256 *s, const void *data, size_t n) {
    const uint8_t *p = data;
    while (n > 0) {
        const size_t at = (size_t)(s->bytes % 64);
        const size_t take = n < 64 - at ? n : 64 - at;
        memcpy(s->block + at, p, take);
        s->bytes += take;
        p += take;
        n -= take;
        if (at + take == 64)
            sha_block(s->state, s->block);
    }
}

void xp_sha256_end(xp_sha256 *s, uint8_t out[32]) {
    static const uint8_t pad[64] = {0x80};
    const uint64_t bits = s->bytes * 8;
    const size_t at = (size_t)(s->bytes % 64);
    uint8_t length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)(bits >> (56 - 8 * i));
    xp_sha256_add(s, pad, at < 56 ? 56 - at : 120 - at);
    xp_sha256_add(s, length, sizeof length);
    for (int i = 0; i < 32; i++)
        out[i] = (uint8_t)(s->state[i / 4] >> (24 - 8 * (i % 4)));
}

void xp_sha256_hex(const uint8_t digest[32], char out[65]) {
    for (int i = 0; i < 32; i++)
        snprintf(out + 2 * i, 3, "%02x", (unsigned)digest[i]);
}
