/* What somebody's implementation answered to one prompt: a file named as the expected one, or one a rank with the
 * layout in its metadata, put together. */
#ifndef XP_RESPONSES_H
#define XP_RESPONSES_H

#include "safetensors.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct xp_responses xp_responses;

/* dir holds the whole file under `expected` (a path in its set) or under that path's last part; or
 * NAME.rank0.safetensors, NAME.rank1.safetensors, ... whose metadata say expar.rank, expar.global_shape ({"exp.y": [8,
 * 16]}) and expar.slice
 * ({"exp.y": [[0, 4], [0, 16]]}); a tensor without a slice is whole, and ranks that hold the same elements must hold
 * the same bits. XP_E_IO when there is no such file; XP_E_FORMAT naming file and tensor. The caller closes *out. */
xp_status xp_responses_open(const char *dir, const char *expected, xp_responses **out);
void xp_responses_close(xp_responses *r); /* NULL: nothing */
/* Tensor i, or 0 past the end. */
int xp_responses_at(const xp_responses *r, int i, const char **out_name, xp_tensor *out);

#ifdef __cplusplus
}
#endif
#endif
