/* The launch environment: which launcher started this process, and whether its variables agree.
 *
 * A rank is never defaulted: WORLD_SIZE above 1 without RANK would make every process rank 0, and all would hang or,
 * worse, pass. Source of the variable names: torchrun, Open MPI 4, PMI, Slurm documentation. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "options.h"

static const struct {
    const char *launcher, *rank, *size;
} families[] = {
    {"torchrun", "RANK", "WORLD_SIZE"},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
    {"PMI", "PMI_RANK", "PMI_SIZE"},
    {"Slurm step", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"},
};

static xp_status number(const char *name, const char *text, long lo, long hi, long *out) {
    char *end = NULL;
    errno = 0;
    *out = strtol(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || *out < lo || *out > hi)
        return XP_FAIL(XP_E_ARG, "%s: '%s' is not a whole number from %ld to %ld", name, text, lo, hi);
    return XP_OK;
}

/* One family: absent, or rank and size. */
static xp_status read_family(int i, int *out_there, long *out_rank, long *out_size) {
    const char *rank = getenv(families[i].rank), *size = getenv(families[i].size);
    *out_there = 0;
    if (!rank && !size)
        return XP_OK;
    /* A batch script sees rank 0 of Slurm, without being a step. */
    if (i > 1 && rank && !size && strcmp(rank, "0") == 0)
        return XP_OK;
    if (size) {
        XP_TRY(number(families[i].size, size, 1, 1 << 24, out_size));
        if (!rank && *out_size == 1)
            return XP_OK;
    }
    if (!rank)
        return XP_FAIL(XP_E_ARG, "%s: missing, while %s is '%s'; a rank is never guessed", families[i].rank,
                       families[i].size, size);
    if (!size)
        return XP_FAIL(XP_E_ARG, "%s: missing, while %s is '%s'", families[i].size, families[i].rank, rank);
    XP_TRY(number(families[i].rank, rank, 0, *out_size - 1, out_rank));
    *out_there = 1;
    return XP_OK;
}

xp_status xp_launch_check(int *out_rank, int *out_world) {
    int found = -1;
    long rank = 0, size = 1;
    *out_rank = 0;
    *out_world = 1;
    for (int i = 0; i < (int)(sizeof families / sizeof *families); i++) {
        int there;
        long r, s;
        XP_TRY(read_family(i, &there, &r, &s));
        if (!there)
            continue;
        /* mpirun inside an sbatch is normal: Slurm is the outer one and gives way. */
        if (found >= 0 && i < 3 && (r != rank || s != size))
            return XP_FAIL(XP_E_ARG, "%s says rank %ld of %ld, %s says rank %ld of %ld", families[found].launcher, rank,
                           size, families[i].launcher, r, s);
        if (found < 0) {
            found = i;
            rank = r;
            size = s;
        }
    }
    *out_rank = (int)rank;
    *out_world = (int)size;
    return XP_OK;
}
