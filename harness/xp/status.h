/* Status codes and the thread-local error text behind them.
 *
 * Every function that can fail returns xp_status and nothing else. The text says what was wrong, naming the field, the
 * value and what was expected; it lives until the next failure on the same thread. The library never prints or exits.
 */
#ifndef XP_STATUS_H
#define XP_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    XP_OK = 0,
    XP_E_ARG,    /* an argument is wrong: field, value and expectation are in the text */
    XP_E_NOMEM,  /* an allocation failed; the text gives the size */
    XP_E_DEVICE, /* a device or its runtime failed, or is absent */
    XP_E_COMM,   /* this rank found a collective that cannot proceed (counts, operation, order) */
    XP_E_PEER,   /* another rank failed; its own status says why */
    XP_E_IO,     /* a file could not be opened, read or written */
    XP_E_FORMAT, /* a file's content is wrong: file, place and rule are in the text */
    XP_E_HANG,   /* a collective's peers never came */
    XP_E_BUG,    /* this program is wrong */
    XP_E_PLUGIN  /* a plugin does not keep the contract */
} xp_status;

#if defined(__GNUC__)
#define XP_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define XP_PRINTF(a, b)
#endif

/* Records the text (printf style, cut at 1023 bytes) with file and line for this thread; returns st. What is kept is
 * one line of printable ASCII: any other byte is written as \xNN. */
xp_status xp_fail(xp_status st, const char *file, int line, const char *fmt, ...) XP_PRINTF(4, 5);
/* The latest text of this thread ("" when nothing failed), and where it was recorded ("file:line"). */
const char *xp_error_text(void);
const char *xp_error_where(void);
/* A short word for a status: "ok", "argument", ... never NULL. */
const char *xp_status_name(xp_status st);

#define XP_FAIL(st, ...) xp_fail((st), __FILE__, __LINE__, __VA_ARGS__)
/* Nothing owned yet: hand the error up. */
#define XP_TRY(call)            \
    do {                        \
        xp_status st_ = (call); \
        if (st_ != XP_OK)       \
            return st_;         \
    } while (0)
/* Something to release: needs a local `xp_status st` and a label. */
#define XP_GOTO(label, call)        \
    do {                            \
        if ((st = (call)) != XP_OK) \
            goto label;             \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
