/* Hashes: a fast one that notices a changed byte between two looks at the same memory, and SHA-256 for digests that
 * people compare across machines.
 *
 * The fast hash is not a promise across versions: never print or store it. Neither allocates or keeps state. */
#ifndef XP_HASH_H
#define XP_HASH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    uint64_t lo, hi;
} xp_hash;

/* Hash of n bytes. A change confined to one aligned 8-byte word always changes it; any other change does but for a
 * chance of about 2^-120. seed chains hashes: pass the lo of the one before. */
xp_hash xp_hash_bytes(const void *data, size_t n, uint64_t seed);
int xp_hash_equal(xp_hash a, xp_hash b);
/* The low half of xp_hash_bytes(). */
uint64_t xp_hash64(const void *data, size_t n, uint64_t seed);

/* SHA-256 (FIPS 180-4). Messages of up to 2^61 - 1 bytes. */
typedef struct {
    uint32_t state[8];
    uint64_t bytes;
    uint8_t block[64];
} xp_sha256;
void xp_sha256_begin(xp_sha256 *s);
void xp_sha256_add(xp_sha256 *s, const void *data, size_t n);
void xp_sha256_end(xp_sha256 *s, uint8_t out[32]); /* s must begin again before more use */
/* 64 lower-case hexadecimal digits and a zero. */
void xp_sha256_hex(const uint8_t digest[32], char out[65]);

#ifdef __cplusplus
}
#endif
#endif
