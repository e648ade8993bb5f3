/* Vector sets: folders of test inputs and expected outputs that anybody may have made, read and written.
 *
 *   DIR/manifest.json    schema expar.vectors/1, who made it, how many tests, SHA-256 of every other file
 *   DIR/groups/G.json    schema expar.group/1: tests with their case line, flags and files; a note for every flag
 *   DIR/data/...         .safetensors: in.<operand> (prompt), exp.<operand> and bound.<operand> (expected)
 *
 * Nothing of a set is believed before its SHA-256 is the manifest's; a file that the manifest does not list, or lists
 * and that is not there, a path that leaves the folder, a symbolic link, an unknown key, a flag without a note, a note
 * without a flag, a data file that no test names and a wrong count are refused (XP_E_FORMAT naming file, test and
 * rule). What a case line or a tensor means to a stage is not this file's to judge. */
#ifndef XP_VECTORS_H
#define XP_VECTORS_H

#include "safetensors.h"

#ifdef __cplusplus
extern "C" {
#endif

#define XP_VECTORS_SCHEMA "expar.vectors/1"
#define XP_VECTORS_GROUP_SCHEMA "expar.group/1"
#define XP_VECTORS_TENSORS_SCHEMA "expar.tensors/1"

enum { XP_VECTORS_MAX_JSON = 16 << 20, XP_VECTORS_WORDS = 16 };

typedef enum { XP_VECTORS_VALID = 0, XP_VECTORS_INVALID, XP_VECTORS_ACCEPTABLE } xp_vectors_result;
typedef enum { XP_VECTORS_BITS = 0, XP_VECTORS_BOUND, XP_VECTORS_CLASSES } xp_vectors_compare;
/* "valid", "invalid", "acceptable"; "bits", "bound", "classes". */
const char *xp_vectors_result_name(xp_vectors_result r);
const char *xp_vectors_compare_name(xp_vectors_compare c);

/* One test. Texts are the set's: they live until its close. */
typedef struct {
    const char *group, *source;    /* the group's name; whose answer this is */
    int64_t id;                    /* tcId: of its group, ascending from 1 */
    const char *comment, *line;    /* line: a case without data, seed and mesh */
    const char *prompt, *expected; /* paths in the set; expected is NULL for an invalid test */
    const char *refusal;           /* of an invalid test: what the error's text must contain */
    xp_vectors_result result;
    xp_vectors_compare compare; /* XP_VECTORS_BITS for an invalid test, where it means nothing */
    int flags, unchecked;
    const char *flag[XP_VECTORS_WORDS];
    const char *unchecks[XP_VECTORS_WORDS]; /* operands that expected does not hold */
} xp_vectors_test;

typedef struct {
    const char *flag, *bug_type, *description;
    const char *effect; /* NULL: none is stated */
    const char *link;   /* the first; NULL: none */
} xp_vectors_note;

typedef struct xp_vectors xp_vectors;

/* Calls fn with each folder that has a manifest.json: dir itself, or else those below it, in the order of their names.
 * Symbolic links are not followed. XP_E_IO when there is none; stops at fn's first failure. */
typedef xp_status (*xp_vectors_fn)(const char *dir, void *arg);
xp_status xp_vectors_each(const char *dir, xp_vectors_fn fn, void *arg);

/* Reads and checks the whole set but the tensors. The caller closes *out (NULL on failure). */
xp_status xp_vectors_open(const char *dir, xp_vectors **out);
/* The same, but the sum of a data file is left to xp_vectors_prompt() and xp_vectors_expected(): a damaged file spoils
 * the tests that name it, and no others. */
xp_status xp_vectors_open_loose(const char *dir, xp_vectors **out);
void xp_vectors_close(xp_vectors *v); /* NULL: nothing */
const char *xp_vectors_dir(const xp_vectors *v);
const char *xp_vectors_name(const xp_vectors *v);
/* Tests in the order of the groups' names and their ids. */
int64_t xp_vectors_count(const xp_vectors *v);
const xp_vectors_test *xp_vectors_at(const xp_vectors *v, int64_t i);
/* The note of one of the test's flags. */
xp_status xp_vectors_note_of(const xp_vectors *v, const xp_vectors_test *t, const char *flag, xp_vectors_note *out);

/* A test's tensors, hashed again as they are read. Checked: expar.schema, expar.stage (the first word of the line), no
 * other "expar." key but rank, mesh, global_shape and slice; every tensor of a prompt is in.<operand>, of an expected
 * file exp.<operand> or bound.<operand>, F64 of the shape of exp.<operand>. The caller closes *out. */
xp_status xp_vectors_prompt(const xp_vectors *v, const xp_vectors_test *t, xp_safetensors **out);
xp_status xp_vectors_expected(const xp_vectors *v, const xp_vectors_test *t, xp_safetensors **out);
/* The expected file whatever its sum, to say what is wrong in it. */
xp_status xp_vectors_expected_damaged(const xp_vectors *v, const xp_vectors_test *t, xp_safetensors **out);

/* One file's text alone, with every rule that needs no other file. name is for messages. */
xp_status xp_vectors_check_manifest(const void *text, size_t bytes, const char *name);
xp_status xp_vectors_check_group(const void *text, size_t bytes, const char *name);

/* ---- writing ---- */

typedef struct xp_vectors_writer xp_vectors_writer;

/* A new set in dir, which must not hold one yet; the folder is made when it is not there (not its parents). generator
 * and version: the manifest's; seed: at most 2^53. XP_E_ARG, XP_E_IO. */
xp_status xp_vectors_create(const char *dir, const char *name, const char *generator, int64_t version, int64_t seed,
                            xp_vectors_writer **out);
/* Writes data/<stem>.safetensors for a stage, with the metadata of the layout. path: XP_PATH bytes, the path in the
 * set, for a test to name. Tensors carry their whole names (in.x). */
xp_status xp_vectors_put(xp_vectors_writer *w, const char *stem, const char *stage, const xp_safetensors_item *item,
                         int64_t items, char *path);
/* A flag's note, in a group; before or after the tests that use it. effect and link may be NULL. */
xp_status xp_vectors_put_note(xp_vectors_writer *w, const char *group, const xp_vectors_note *note);
/* Adds a test to t->group, under t->source; its id is the next. What t names is copied. */
xp_status xp_vectors_add(xp_vectors_writer *w, const xp_vectors_test *t);
/* Writes groups and, last, the manifest; then reads the set back with xp_vectors_open. A set without tests is refused.
 */
xp_status xp_vectors_finish(xp_vectors_writer *w);
void xp_vectors_writer_close(
    xp_vectors_writer *w); /* NULL: nothing; before finish() the files stay, without manifest */

#ifdef __cplusplus
}
#endif
#endif
