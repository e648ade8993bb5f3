/* The numbers of the relations, and what changes of them look like. Only relations.c and its files include this. */
#ifndef XP_RELATION_DATA_H
#define XP_RELATION_DATA_H

#include "chain.h"
#include "relations.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_RELATION_EXPERTS = 64, XP_RELATION_TOKENS = 64 }; /* room for an order of either */

typedef struct {
    xp_chain_in in;
    void *block[20];
    int blocks;
    int ranks; /* that divide T and E */
} xp_relation_data;

/* XP_E_ARG: the record does not fit so many experts, naming the field; XP_E_NOMEM. out is to be closed. */
xp_status xp_relation_data_open(const xp_dialect *d, xp_numbers kind, xp_relation_data *out);
void xp_relation_data_close(xp_relation_data *x);

/* Row i of the copy is row token[i] of the original, i < tokens; expert e of the original is expert expert[e] of the
 * copy, e < Z. NULL: as they are. */
typedef struct {
    const int *token, *expert;
    int64_t tokens;
} xp_relation_map;
xp_status xp_relation_data_copy(const xp_relation_data *from, const xp_relation_map *m, xp_relation_data *out);

/* Multiplies dy of a copy. */
void xp_relation_data_scale(xp_relation_data *x, double factor);

/* A seeded order of n numbers; and one of the experts, null or shared ones last, that keeps groups: experts of one
 * group stay in one, whichever that is. */
void xp_relation_shuffle(int64_t n, uint64_t seed, int *out);
void xp_relation_experts(const xp_chain_in *in, int *out);
/* In XP_NUMBERS_TIES: the expert whose score for token t equals that of e; e itself when there is none. */
int xp_relation_twin(const xp_chain_in *in, int64_t t, int e);

#ifdef __cplusplus
}
#endif
#endif
