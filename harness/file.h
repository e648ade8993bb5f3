/* Files: opened as regular files only, read to a size fixed at open, written beside themselves and renamed.
 *
 * What is read may come from anybody, so a FIFO, a device or a folder is refused instead of waited for, a file that
 * shrinks is an error instead of a signal (nothing is mapped), and a path that a file names is followed only below the
 * folder that it belongs to. */
#ifndef XP_FILE_H
#define XP_FILE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "xp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { XP_PATH = 4096 };

/* A regular file and its size. XP_E_IO naming the path. The caller closes *out_fd; -1 on failure. */
xp_status xp_file_open(const char *path, int *out_fd, int64_t *out_bytes);
/* 1 when every component is one or more of A-Z a-z 0-9 . _ - and + and does not begin with a dot; so no absolute path,
 * none that leaves its folder, none that a shell or a terminal would read otherwise. */
int xp_file_plain(const char *path);
/* bytes from offset at, all of them. name is for messages. XP_E_IO. */
xp_status xp_file_read(const char *name, int fd, int64_t at, void *buf, size_t bytes);
/* Of a path that a file of the folder names: relative, of plain components, through no symbolic link. The whole file in
 * memory that the caller frees: one byte more than *out_bytes is there, and is 0. XP_E_FORMAT when it is no such path
 * or has more than max bytes, XP_E_IO. */
xp_status xp_file_load_in(const char *folder, const char *path, int64_t max, void **out, size_t *out_bytes);
/* The SHA-256, in hexadecimal, of a file named in the same way; read piece by piece. */
xp_status xp_file_sha256_in(const char *folder, const char *path, char out_hex[65]);

/* A file being written: nothing is at its path, or what was there before, until it is kept. */
typedef struct {
    char path[XP_PATH], temp[XP_PATH + 32];
    FILE *f; /* write here; an error is noticed by keep() */
} xp_file_out;
xp_status xp_file_create(const char *path, xp_file_out *out);
/* Closes and renames. On failure nothing is left. */
xp_status xp_file_keep(xp_file_out *out);
void xp_file_discard(xp_file_out *out);

#ifdef __cplusplus
}
#endif
#endif
