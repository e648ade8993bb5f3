/* Safetensors files: a reader that trusts nothing, and a writer of canonical bytes.
 *
 * Every rule of the format holds (https://github.com/huggingface/safetensors, README and safetensors/src/tensor.rs):
 * 8 bytes of header length N, little-endian, at most 100,000,000; a UTF-8 JSON object from the first byte on, padded
 * with spaces; "__metadata__" of texts; tensors of dtype, shape and data_offsets that cover the rest of the file
 * without hole or overlap. It is stricter than that reader: a key given twice, an unknown key, an integer above 2^53 or
 * written with sign, leading zero, point or exponent, anything nested deeper, NUL, a name of more than 1 KiB and more
 * than 1,000,000 tensors are refused, so what is accepted here is accepted there. White space between the tokens inside
 * the object is taken. Refusals are XP_E_FORMAT and name file, tensor, field, value and rule. */
#ifndef XP_SAFETENSORS_H
#define XP_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "xp/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_SAFETENSORS_MAX_HEADER = 100000000, XP_SAFETENSORS_MAX_TENSORS = 1000000, XP_SAFETENSORS_MAX_NAME = 1024 };

typedef struct xp_safetensors xp_safetensors;

typedef struct {
    const char *name;   /* UTF-8 */
    const char *spell;  /* the dtype as the format spells it: "F32" */
    xp_dtype dtype;     /* XP_NDTYPE: a type that xp_tensor does not have (BOOL F6_E2M3 F6_E3M2 I8 I16 U16 U32 C64) */
    int64_t ndim;       /* may exceed XP_MAXDIM */
    const int64_t *dim; /* F4 counts codes */
    int64_t count;      /* elements */
    int64_t begin, end; /* bytes, from the end of the header */
} xp_safetensors_info;

/* Reads and checks the header; the data stays in the file until a tensor is asked for. Regular files only. XP_E_IO,
 * XP_E_FORMAT, XP_E_NOMEM. The caller closes *out (NULL on failure). */
xp_status xp_safetensors_open(const char *path, xp_safetensors **out);
/* The same of bytes in memory, which must stay as they are until the close. name is for messages. */
xp_status xp_safetensors_parse(const void *bytes, size_t n, const char *name, xp_safetensors **out);
/* The same of bytes that malloc gave: they are freed by the close, and here on failure. */
xp_status xp_safetensors_adopt(void *bytes, size_t n, const char *name, xp_safetensors **out);
void xp_safetensors_close(xp_safetensors *st); /* NULL: nothing */

/* Tensors are numbered in the order of their data. */
int64_t xp_safetensors_count(const xp_safetensors *st);
const xp_safetensors_info *xp_safetensors_at(const xp_safetensors *st, int64_t i);
/* The tensor's number; -1 when there is none of that name. */
int64_t xp_safetensors_find(const xp_safetensors *st, const char *name);
/* The text of a key of "__metadata__"; NULL when it is not there. */
const char *xp_safetensors_metadata(const xp_safetensors *st, const char *key);
/* Pair i of "__metadata__", by ascending key; 0 past the end. */
int xp_safetensors_pair(const xp_safetensors *st, int64_t i, const char **out_key, const char **out_value);

/* A tensor's bytes, read at the first call and aligned for every type; they live until the close and may be written.
 * Not NULL, also for no bytes. Not for two threads at a time. XP_E_IO, XP_E_NOMEM. */
xp_status xp_safetensors_data(xp_safetensors *st, int64_t i, void **out);
/* Frees a tensor's bytes before the close; asking for them again reads them again. */
void xp_safetensors_forget(xp_safetensors *st, int64_t i);
/* A contiguous view of them. XP_E_FORMAT naming the tensor when its dtype or its rank is not one of xp_tensor's. */
xp_status xp_safetensors_view(xp_safetensors *st, int64_t i, xp_tensor *out);

typedef struct {
    const char *name;
    xp_tensor tensor; /* host memory, any strides; E2M1 must be contiguous */
} xp_safetensors_item;

typedef struct {
    const char *key, *value;
} xp_safetensors_text;

/* Writes the file under another name and renames it. Equal content gives equal bytes, whatever the order of the
 * arguments: tensors by safetensors' own order (its list of dtypes from U64 down to BOOL, then the name), texts by key
 * (safetensors leaves their order to chance), the header padded with spaces to 8 bytes, no "__metadata__" when there
 * are no texts. XP_E_ARG naming what could not be read back; XP_E_IO. */
xp_status xp_safetensors_write(const char *path, const xp_safetensors_item *item, int64_t items,
                               const xp_safetensors_text *text, int64_t texts);

#ifdef __cplusplus
}
#endif
#endif
