/* Files, read from anybody and written whole.
 *
 * Every open is non-blocking and checked with fstat before the first read; the size taken then is the only one used.
 * This file must not map memory, follow a link below a given folder, or leave a half-written file at its final path. */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hash.h"

static xp_status io_error(const char *folder, const char *path, const char *verb) {
    char why[128];
    if (strerror_r(errno, why, sizeof why) != 0)
        snprintf(why, sizeof why, "error %d", errno);
    return XP_FAIL(XP_E_IO, "%s%s%s: cannot %s: %s", folder, *folder ? "/" : "", path, verb, why);
}

/* Takes fd: closes it unless it is a regular file. */
static xp_status take_regular(const char *folder, const char *path, int fd, int *out_fd, int64_t *out_bytes) {
    struct stat s;
    xp_status st = XP_OK;
    if (fstat(fd, &s) != 0)
        st = io_error(folder, path, "examine");
    else if (!S_ISREG(s.st_mode))
        st = XP_FAIL(XP_E_IO, "%s%s%s: is %s, expected a regular file", folder, *folder ? "/" : "", path,
                     S_ISDIR(s.st_mode) ? "a folder" : "a FIFO, a socket or a device");
    if (st != XP_OK) {
        close(fd);
        return st;
    }
    *out_fd = fd;
    *out_bytes = (int64_t)s.st_size;
    return XP_OK;
}

xp_status xp_file_open(const char *path, int *out_fd, int64_t *out_bytes) {
    *out_fd = -1;
    *out_bytes = 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return io_error("", path, "open");
    return take_regular("", path, fd, out_fd, out_bytes);
}

int xp_file_plain(const char *path) {
    for (const char *p = path;; p++) {
        const size_t n = strspn(p, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-+");
        if (n == 0 || *p == '.')
            return 0;
        p += n;
        if (*p == '\0')
            return 1;
        if (*p != '/')
            return 0;
    }
}

/* Opens one component of a path below fd. */
static xp_status step_into(const char *folder, const char *path, int fd, const char *component, int flags,
                           int *out_fd) {
    struct stat s;
    *out_fd = openat(fd, component, flags | O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (*out_fd >= 0)
        return XP_OK;
    const int why = errno;
    if (fstatat(fd, component, &s, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(s.st_mode))
        return XP_FAIL(XP_E_FORMAT, "%s/%s: '%s' is a symbolic link, which is not followed", folder, path, component);
    errno = why;
    return io_error(folder, path, "open");
}

/* As xp_file_open(), of a path that a file of the folder names: see xp_file_load_in(). */
static xp_status open_in(const char *folder, const char *path, int *out_fd, int64_t *out_bytes) {
    *out_fd = -1;
    *out_bytes = 0;
    if (!xp_file_plain(path) || strlen(path) >= XP_PATH)
        return XP_FAIL(XP_E_FORMAT,
                       "%s: the path '%.200s' is not taken: expected one below the folder, of letters, digits and "
                       ". _ - + in parts that do not begin with a dot",
                       folder, path);
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return io_error("", folder, "open");
    char rest[XP_PATH], *component = rest;
    snprintf(rest, sizeof rest, "%s", path);
    for (;;) {
        char *end = strchr(component, '/');
        int next;
        if (end)
            *end = '\0';
        const xp_status st = step_into(folder, path, fd, component, end ? O_DIRECTORY : 0, &next);
        close(fd);
        if (st != XP_OK)
            return st;
        if (!end)
            return take_regular(folder, path, next, out_fd, out_bytes);
        fd = next;
        component = end + 1;
    }
}

xp_status xp_file_read(const char *name, int fd, int64_t at, void *buf, size_t bytes) {
    size_t got = 0;
    while (got < bytes) {
        const ssize_t n = pread(fd, (char *)buf + got, bytes - got, (off_t)at + (off_t)got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return io_error("", name, "read");
        if (n == 0)
            return XP_FAIL(XP_E_IO, "%s: ends at byte %lld: it was cut while it was read", name,
                           (long long)at + (long long)got);
        got += (size_t)n;
    }
    return XP_OK;
}

xp_status xp_file_load_in(const char *folder, const char *path, int64_t max, void **out, size_t *out_bytes) {
    int fd;
    int64_t bytes;
    *out = NULL;
    *out_bytes = 0;
    XP_TRY(open_in(folder, path, &fd, &bytes));
    xp_status st = XP_OK;
    char *buf = NULL;
    if (bytes > max)
        st = XP_FAIL(XP_E_FORMAT, "%s/%s: is %lld bytes, expected at most %lld", folder, path, (long long)bytes,
                     (long long)max);
    else if ((buf = malloc((size_t)bytes + 1)) == NULL)
        st = XP_FAIL(XP_E_NOMEM, "%s/%s: no memory for %lld bytes", folder, path, (long long)bytes);
    else
        st = xp_file_read(path, fd, 0, buf, (size_t)bytes);
    close(fd);
    if (st != XP_OK) {
        free(buf);
        return st;
    }
    buf[bytes] = '\0';
    *out = buf;
    *out_bytes = (size_t)bytes;
    return XP_OK;
}

xp_status xp_file_sha256_in(const char *folder, const char *path, char out_hex[65]) {
    unsigned char piece[16384];
    uint8_t digest[32];
    xp_sha256 sum;
    int fd;
    int64_t bytes;
    xp_status st = XP_OK;
    out_hex[0] = '\0';
    XP_TRY(open_in(folder, path, &fd, &bytes));
    xp_sha256_begin(&sum);
    for (int64_t at = 0; at < bytes && st == XP_OK;) {
        const size_t n = bytes - at < (int64_t)sizeof piece ? (size_t)(bytes - at) : sizeof piece;
        st = xp_file_read(path, fd, at, piece, n);
        if (st == XP_OK)
            xp_sha256_add(&sum, piece, n);
        at += (int64_t)n;
    }
    close(fd);
    xp_sha256_end(&sum, digest);
    if (st == XP_OK)
        xp_sha256_hex(digest, out_hex);
    return st;
}

/* ---- writing ---- */

xp_status xp_file_create(const char *path, xp_file_out *out) {
    memset(out, 0, sizeof *out);
    if (strlen(path) >= sizeof out->path)
        return XP_FAIL(XP_E_ARG, "path: %zu bytes, expected at most %zu", strlen(path), sizeof out->path - 1);
    snprintf(out->path, sizeof out->path, "%s", path);
    /* Beside the path, so that the rename stays on one file system; a name left by a killed process is passed over. */
    for (int i = 0; i < 100; i++) {
        snprintf(out->temp, sizeof out->temp, "%s.tmp%ld.%d", path, (long)getpid(), i);
        const int fd = open(out->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0 && errno == EEXIST)
            continue;
        if (fd < 0)
            return io_error("", path, "create");
        out->f = fdopen(fd, "wb");
        if (out->f)
            return XP_OK;
        const xp_status st = io_error("", path, "create");
        close(fd);
        unlink(out->temp);
        return st;
    }
    return XP_FAIL(XP_E_IO, "%s: a hundred unfinished files of this name are in the folder", path);
}

void xp_file_discard(xp_file_out *out) {
    if (out->f) {
        fclose(out->f);
        unlink(out->temp);
    }
    out->f = NULL;
}

xp_status xp_file_keep(xp_file_out *out) {
    const int bad = ferror(out->f) != 0;
    const int closed = fclose(out->f);
    xp_status st = XP_OK;
    out->f = NULL;
    if (bad || closed != 0)
        st = io_error("", out->path, "write");
    else if (rename(out->temp, out->path) != 0)
        st = io_error("", out->path, "replace");
    if (st != XP_OK)
        unlink(out->temp);
    return st;
}
