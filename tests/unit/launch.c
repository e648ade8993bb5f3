/* The launch environment: a rank is never guessed, and variables that contradict themselves or each other are refused
 * with the variable, its value and what was expected. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "options.h"

enum { MOST = 6 };

/* NAME=value pairs; what is expected: a status, and rank and world or a part of the message. */
typedef struct {
    const char *set[MOST];
    int rank, world;         /* world 0: refused */
    const char *says, *also; /* parts of the message */
} row;

static const row rows[] = {
    /* A plain process. */
    {{NULL}, 0, 1, NULL, NULL},
    {{"WORLD_SIZE=1"}, 0, 1, NULL, NULL},
    {{"OMPI_COMM_WORLD_SIZE=1"}, 0, 1, NULL, NULL},
    {{"LOCAL_RANK=3", "MASTER_PORT=1"}, 0, 1, NULL, NULL},
    /* One family that agrees. */
    {{"RANK=0", "WORLD_SIZE=1"}, 0, 1, NULL, NULL},
    {{"RANK=3", "WORLD_SIZE=4"}, 3, 4, NULL, NULL},
    {{"OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2"}, 1, 2, NULL, NULL},
    {{"PMI_RANK=1", "PMI_SIZE=2"}, 1, 2, NULL, NULL},
    {{"SLURM_PROCID=5", "SLURM_STEP_NUM_TASKS=8"}, 5, 8, NULL, NULL},
    {{"RANK=16777215", "WORLD_SIZE=16777216"}, 16777215, 16777216, NULL, NULL},
    /* A world without a rank. */
    {{"WORLD_SIZE=2"}, 0, 0, "RANK: missing", "WORLD_SIZE is '2'"},
    {{"WORLD_SIZE=4", "LOCAL_RANK=0"}, 0, 0, "RANK: missing", "WORLD_SIZE is '4'"},
    {{"OMPI_COMM_WORLD_SIZE=2"}, 0, 0, "OMPI_COMM_WORLD_RANK: missing", "'2'"},
    {{"PMI_SIZE=2"}, 0, 0, "PMI_RANK: missing", "'2'"},
    {{"SLURM_STEP_NUM_TASKS=2"}, 0, 0, "SLURM_PROCID: missing", "'2'"},
    /* A rank without a world. */
    {{"RANK=0"}, 0, 0, "WORLD_SIZE: missing", "RANK is '0'"},
    {{"RANK=2"}, 0, 0, "WORLD_SIZE: missing", "RANK is '2'"},
    {{"OMPI_COMM_WORLD_RANK=0"}, 0, 0, "OMPI_COMM_WORLD_SIZE: missing", "'0'"},
    {{"SLURM_PROCID=2"}, 0, 0, "SLURM_STEP_NUM_TASKS: missing", "'2'"},
    /* A rank outside its world. */
    {{"RANK=4", "WORLD_SIZE=4"}, 0, 0, "RANK: '4'", "from 0 to 3"},
    {{"RANK=5", "WORLD_SIZE=4"}, 0, 0, "RANK: '5'", "from 0 to 3"},
    {{"RANK=1", "WORLD_SIZE=1"}, 0, 0, "RANK: '1'", "from 0 to 0"},
    {{"PMI_RANK=2", "PMI_SIZE=2"}, 0, 0, "PMI_RANK: '2'", "from 0 to 1"},
    /* Not a number, negative, blanks, overflow, empty. */
    {{"RANK=x", "WORLD_SIZE=4"}, 0, 0, "RANK: 'x'", "whole number"},
    {{"RANK=-1", "WORLD_SIZE=4"}, 0, 0, "RANK: '-1'", "whole number"},
    {{"RANK=+1", "WORLD_SIZE=4"}, 0, 0, "RANK: '+1'", "whole number"},
    {{"RANK=1 ", "WORLD_SIZE=4"}, 0, 0, "RANK: '1 '", "whole number"},
    {{"RANK= 1", "WORLD_SIZE=4"}, 0, 0, "RANK: ' 1'", "whole number"},
    {{"RANK=1.0", "WORLD_SIZE=4"}, 0, 0, "RANK: '1.0'", "whole number"},
    {{"RANK=0x1", "WORLD_SIZE=4"}, 0, 0, "RANK: '0x1'", "whole number"},
    {{"RANK=", "WORLD_SIZE=4"}, 0, 0, "RANK: ''", "whole number"},
    {{"RANK=4294967296", "WORLD_SIZE=4"}, 0, 0, "RANK: '4294967296'", "from 0 to 3"},
    {{"RANK=18446744073709551616", "WORLD_SIZE=4"}, 0, 0, "RANK: '18446744073709551616'", "from 0 to 3"},
    {{"RANK=0", "WORLD_SIZE=0"}, 0, 0, "WORLD_SIZE: '0'", "from 1"},
    {{"RANK=0", "WORLD_SIZE=-4"}, 0, 0, "WORLD_SIZE: '-4'", "from 1"},
    {{"RANK=0", "WORLD_SIZE="}, 0, 0, "WORLD_SIZE: ''", "from 1"},
    {{"RANK=0", "WORLD_SIZE=99999999999999999999"}, 0, 0, "WORLD_SIZE: '99999999999999999999'", "from 1"},
    {{"WORLD_SIZE=four"}, 0, 0, "WORLD_SIZE: 'four'", "from 1"},
    /* Two families. */
    {{"RANK=1", "WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2"}, 1, 2, NULL, NULL},
    {{"RANK=0", "WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2"},
     0,
     0,
     "torchrun says rank 0 of 2",
     "Open MPI says rank 1 of 2"},
    {{"RANK=1", "WORLD_SIZE=4", "PMI_RANK=1", "PMI_SIZE=2"}, 0, 0, "torchrun says rank 1 of 4", "PMI says rank 1 of 2"},
    {{"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=2", "PMI_RANK=1", "PMI_SIZE=2"},
     0,
     0,
     "Open MPI says rank 0 of 2",
     "PMI says rank 1 of 2"},
    {{"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=2", "WORLD_SIZE=2"}, 0, 0, "RANK: missing", "'2'"},
    /* A batch script is no step; mpirun and torchrun inside a step are the inner ones. */
    {{"SLURM_PROCID=0"}, 0, 1, NULL, NULL},
    {{"SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS=1"}, 0, 1, NULL, NULL},
    {{"SLURM_PROCID=1", "SLURM_STEP_NUM_TASKS=2", "OMPI_COMM_WORLD_RANK=5", "OMPI_COMM_WORLD_SIZE=16"},
     5,
     16,
     NULL,
     NULL},
    {{"SLURM_PROCID=1", "SLURM_STEP_NUM_TASKS=2", "RANK=9", "WORLD_SIZE=16"}, 9, 16, NULL, NULL},
};

static void clear(void) {
    static const char *const names[] = {"RANK",       "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                                        "PMI_RANK",   "PMI_SIZE",   "SLURM_PROCID",         "SLURM_STEP_NUM_TASKS",
                                        "LOCAL_RANK", "MASTER_PORT"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        assert_int_equal(unsetenv(names[i]), 0);
}

static void put(const char *pair) {
    char name[64];
    const size_t n = strcspn(pair, "=");
    assert_true(n < sizeof name);
    memcpy(name, pair, n);
    name[n] = '\0';
    assert_int_equal(setenv(name, pair + n + 1, 1), 0);
}

static void check_row(const row *r, size_t number) {
    int rank = -7, world = -7;
    clear();
    for (int i = 0; i < MOST && r->set[i]; i++)
        put(r->set[i]);
    const xp_status st = xp_launch_check(&rank, &world);
    if (r->world) {
        if (st != XP_OK)
            fail_msg("row %zu (%s ...) is refused: %s", number, r->set[0], xp_error_text());
        assert_int_equal(rank, r->rank);
        assert_int_equal(world, r->world);
        return;
    }
    if (st != XP_E_ARG)
        fail_msg("row %zu (%s ...) gives rank %d of %d", number, r->set[0], rank, world);
    if (!strstr(xp_error_text(), r->says) || !strstr(xp_error_text(), r->also))
        fail_msg("row %zu (%s ...): '%s' says neither '%s' nor '%s'", number, r->set[0], xp_error_text(), r->says,
                 r->also);
}

static void environments(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        check_row(&rows[i], i);
    clear();
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(environments)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
