#include "ref.h"
#include "xp/rmsnorm.h"
#include "xp/xent.h"
#include "xp/route.h"
#include "xp/balance.h"
extern int xp_pending;
int xp_pending;
#ifndef HAVE_rmsnorm
static xp_status ok_rmsnorm(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_rmsnorm = {.name = "rmsnorm", .meaning = "pending", .args_size = 512, .check = ok_rmsnorm};
const xp_kernel xp_ref_rmsnorm = {.stage = &xp_stage_rmsnorm, .name = "pending"};
static xp_status ok_rmsnorm_bwd(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_rmsnorm_bwd = {.name = "rmsnorm_bwd", .meaning = "pending", .args_size = 512, .check = ok_rmsnorm_bwd};
const xp_kernel xp_ref_rmsnorm_bwd = {.stage = &xp_stage_rmsnorm_bwd, .name = "pending"};
#endif
#ifndef HAVE_xent
static xp_status ok_xent(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_xent = {.name = "xent", .meaning = "pending", .args_size = 512, .check = ok_xent};
const xp_kernel xp_ref_xent = {.stage = &xp_stage_xent, .name = "pending"};
static xp_status ok_xent_bwd(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_xent_bwd = {.name = "xent_bwd", .meaning = "pending", .args_size = 512, .check = ok_xent_bwd};
const xp_kernel xp_ref_xent_bwd = {.stage = &xp_stage_xent_bwd, .name = "pending"};
#endif
#ifndef HAVE_route
static xp_status ok_route(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_route = {.name = "route", .meaning = "pending", .args_size = 512, .check = ok_route};
const xp_kernel xp_ref_route = {.stage = &xp_stage_route, .name = "pending"};
static xp_status ok_route_bwd(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_route_bwd = {.name = "route_bwd", .meaning = "pending", .args_size = 512, .check = ok_route_bwd};
const xp_kernel xp_ref_route_bwd = {.stage = &xp_stage_route_bwd, .name = "pending"};
#endif
#ifndef HAVE_balance
static xp_status ok_balance(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_balance = {.name = "balance", .meaning = "pending", .args_size = 512, .check = ok_balance};
const xp_kernel xp_ref_balance = {.stage = &xp_stage_balance, .name = "pending"};
static xp_status ok_balance_bwd(const void *a, const xp_mesh *m) { (void)a; (void)m; return XP_FAIL(XP_E_BUG, "pending"); }
const xp_stage xp_stage_balance_bwd = {.name = "balance_bwd", .meaning = "pending", .args_size = 512, .check = ok_balance_bwd};
const xp_kernel xp_ref_balance_bwd = {.stage = &xp_stage_balance_bwd, .name = "pending"};
#endif
