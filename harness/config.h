/* The reader of Hugging Face config.json files.
 *
 * Every field that says how tokens are routed must be in the file: class defaults of the library differ from the
 * published checkpoints (norm_topk_prob of qwen3_moe), so a default would be a silent guess. A key whose name speaks of
 * routing and that the family's record does not know is refused. Refusals name file, field, value and expectation. */
#ifndef XP_CONFIG_H
#define XP_CONFIG_H

#include <stddef.h>

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_CONFIG_MAX_BYTES = 4 << 20 };

/* Regular files of at most XP_CONFIG_MAX_BYTES. XP_E_IO: it cannot be read (the text names it). XP_E_FORMAT: its
 * content is wrong. */
xp_status xp_config_read(const char *path, xp_model *out);
/* The same from memory; path is only for messages and the model's name. */
xp_status xp_config_parse(const char *text, size_t bytes, const char *path, xp_model *out);
/* 1 when a key's name speaks of experts, MoE, routing, gates, top-k, groups, shared, capacity or scaling. */
int xp_config_speaks(const char *key);

#ifdef __cplusplus
}
#endif
#endif
