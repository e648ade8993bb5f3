/* Stage gradnorm: the p-norm of the logical gradient, rounded once.
 *
 * Contract, semantics exact: with G the logical gradient, every element of every parameter once, holding the gradient
 * of the one global loss, norm = RN32((sum |g|^p)^(1/p)); p = inf: max |g|; p = -inf: min |g|; p = 0: how many g are
 * not 0. Of an empty gradient 0; +inf for p = -inf, whose identity it is. The result is a function of G alone: the same
 * bits on every rank, for every mesh, order and placement.
 *   - A segment with owner 0 is counted elsewhere, or is padding: it adds nothing. One owner for each set of copies.
 *     place says how the segment lies; an owner that does not follow from it, and a partial sum, are refused.
 *   - A rank with no elements, or with no segments of its own, joins the reduction all the same.
 *   - A NaN anywhere makes the norm NaN on every rank, else an infinity makes it +inf (p = 0: it is one more element; p
 *     = -inf: it is never the least). Both travel as counts: a maximum of float values would drop the NaN (NCCL's
 * does).
 *   - A finite gradient whose norm is beyond f32 gives +inf by rounding; 4 x 1e20 gives 2e20 and 4 x 1e-30 gives 2e-30,
 *     where f32 squares would overflow or vanish.
 * Sums for p = 1 and 2 are integers (multiples of 2^-149 or 2^-298 in windows of 32 bits), added over the world as u64
 * words, so no order of addition can show, and nothing is rounded but the end. Any other p: norm = M (sum
 * (|g|/M)^p)^(1/p) with M = max |g|; each power is a double, exp(p log(|g|/M)); the powers are added as integers
 * (multiples of 2^-128), so that here too no mesh can show. An implementation may add doubles in any order.
 *
 * Contract, semantics torch, with d = grad's dtype: a tensor's norm is n = RNd(RN32(S)^(1/p)), each |g|^p rounded to
 * f32 and S their sum; a rank's is the norm of its own tensors' n, likewise; the world's that of the ranks', likewise
 * (a DTensor's norm-partial placement, then full_tensor()). So the value depends on the placement; squares overflow
 * and vanish as in f32. p = 0: RNd of the non-zeros of a tensor, then of its tensors with any, summed over ranks. NaN
 * is no zero, so p = 0 hides it. A rank without tensors gives 0, whatever p; p = inf or -inf of an empty tensor is
 * refused, as torch raises. S may be summed in f32 in any order.
 *
 * Source: meaning as torch.nn.utils.get_total_norm (2.13) of the full gradient; Neal 2015 for exact sums in windows. */
#include "xp/gradnorm.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "flat.h"
#include "move.h"
#include "num.h"
#include "ref.h"

typedef enum { COUNT, LEAST, TOP, ABS, SQUARE, REAL } kind;

static kind kind_of(double p) {
    return p == 0.0 ? COUNT : p == 1.0 ? ABS : p == 2.0 ? SQUARE : !isinf(p) ? REAL : p > 0.0 ? TOP : LEAST;
}

#define FLOATS (XP_BIT(XP_F32) | XP_BIT(XP_BF16) | XP_BIT(XP_F16))

static const xp_operand operands[] = {
    XP_OPERAND(xp_gradnorm_args, grad, "N", XP_IN, FLOATS, XP_UNCOMPARED, "grad"),
    XP_OPERAND(xp_gradnorm_args, seg, "Q+1", XP_IN, XP_BIT(XP_I64), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_gradnorm_args, owner, "Q", XP_IN, XP_BIT(XP_U8), XP_UNCOMPARED, ""),
    XP_OPTIONAL(xp_gradnorm_args, place, "Q", XP_IN, XP_BIT(XP_I32), XP_UNCOMPARED, ""),
    XP_OPERAND(xp_gradnorm_args, norm, "1", XP_OUT, XP_BIT(XP_F32), XP_BOUND, ""),
};

static const xp_param params[] = {
    {"p", NULL, "2", XP_P_F64, offsetof(xp_gradnorm_args, p)},
    {"semantics", "exact|torch", "exact", XP_P_WORD, offsetof(xp_gradnorm_args, semantics)},
};

/* ---- check ---- */

int xp_place_owner(int32_t place, const xp_mesh *m) {
    if (place & XP_PLACE_UNCOUNTED)
        return 0;
    for (int a = 0; a < XP_NAXIS; a++) {
        if ((place & XP_PLACE_COPIES(a)) && m->axis[a]->rank != 0)
            return 0;
    }
    return 1;
}

static xp_status check_place(const xp_gradnorm_args *a, const xp_mesh *m, int64_t q) {
    const int32_t place = ((const int32_t *)a->place.data)[q];
    const int owner = ((const uint8_t *)a->owner.data)[q], all = XP_PLACE_COPIES(XP_NAXIS) - 1;
    if (place & ~(all | all << 8 | XP_PLACE_UNCOUNTED))
        return XP_FAIL(XP_E_ARG, "gradnorm: place[%lld] is 0x%x, which has a bit of no meaning", (long long)q,
                       (unsigned)place);
    for (int axis = 0; axis < XP_NAXIS; axis++) {
        if (place & XP_PLACE_PARTIAL(axis))
            return XP_FAIL(
                XP_E_ARG,
                "gradnorm: place[%lld] is partial over %s: parts have no norm that makes the sum's; expected "
                "a gradient that was reduced over %s first",
                (long long)q, xp_axis_name((xp_axis)axis), xp_axis_name((xp_axis)axis));
    }
    if (owner != xp_place_owner(place, m))
        return XP_FAIL(XP_E_ARG, "gradnorm: owner[%lld] is %d, expected %d, as place[%lld] = 0x%x has it on this rank",
                       (long long)q, owner, !owner, (long long)q, (unsigned)place);
    return XP_OK;
}

static xp_status check_torch(const xp_gradnorm_args *a) {
    const int64_t *seg = a->seg.data;
    const kind k = kind_of(a->p);
    if (k != TOP && k != LEAST)
        return XP_OK;
    for (int64_t q = 0; q < a->owner.dim[0] && xp_ref_readable(&a->seg) && xp_ref_readable(&a->owner); q++) {
        if (((const uint8_t *)a->owner.data)[q] && seg[q] == seg[q + 1])
            return XP_FAIL(XP_E_ARG, "gradnorm: segment %lld is empty, expected an element: torch has no norm %g of it",
                           (long long)q, a->p);
    }
    return XP_OK;
}

static xp_status check(const void *args, const xp_mesh *m) {
    const xp_gradnorm_args *a = args;
    xp_gradnorm_args shapes = *a;
    xp_ref_dims dims;
    shapes.norm = xp_ref_flat_narrow(&a->norm);
    XP_TRY(xp_ref_check(&xp_stage_gradnorm, &shapes, &dims));
    if (!(a->p >= 0.0 || a->p == -(double)INFINITY))
        return XP_FAIL(XP_E_ARG, "gradnorm: p is %g, expected 0, a number above it, inf or -inf", a->p);
    if (a->semantics != XP_EXACT && a->semantics != XP_TORCH)
        return XP_FAIL(XP_E_ARG, "gradnorm: semantics is %d, expected exact or torch", a->semantics);
    XP_TRY(xp_ref_flat_check("gradnorm", &a->seg, &a->owner, "owner", a->grad.dim[0]));
    for (int64_t q = 0; q < a->owner.dim[0] && xp_ref_readable(&a->place) && xp_ref_readable(&a->owner); q++)
        XP_TRY(check_place(a, m, q));
    return a->semantics == XP_TORCH ? check_torch(a) : XP_OK;
}

/* Reads the gradient once (a real p twice); a ring would move the words twice. */
static void cost(const void *args, const xp_mesh *m, xp_cost *out) {
    const xp_gradnorm_args *a = args;
    const double n = (double)a->grad.dim[0], ranks = (double)m->axis[XP_WORLD]->size, q = (double)a->owner.dim[0];
    const double words = a->semantics == XP_TORCH ? 4.0 * ranks : (double)sizeof(xp_ref_exact);
    *out = (xp_cost){
        .flop = (kind_of(a->p) >= SQUARE ? 2.0 : 1.0) * n,
        .mem_bytes = (double)xp_dtype_bytes(a->grad.dtype, 1) * n + (a->place.data ? 13.0 : 9.0) * q + 8.0 + 4.0,
        .net_bytes = 2.0 * (ranks - 1.0) / ranks * words,
    };
}

/* Without places: every third segment is a copy over dp, every third one over ep_dp. */
static xp_status fill(void *args, const xp_mesh *m, const char *data, uint64_t seed) {
    static const int32_t place[] = {0,
                                    XP_PLACE_COPIES(XP_DP),
                                    XP_PLACE_COPIES(XP_EP_DP),
                                    XP_PLACE_COPIES(XP_WORLD),
                                    XP_PLACE_COPIES(XP_EDP),
                                    XP_PLACE_UNCOUNTED};
    xp_gradnorm_args *a = args;
    (void)data;
    xp_ref_flat_borders(&a->seg, a->grad.dim[0], seed);
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        const int32_t at = place[q % (a->place.data ? 6 : 3)];
        if (a->place.data)
            ((int32_t *)a->place.data)[q] = at;
        ((uint8_t *)a->owner.data)[q] = (uint8_t)xp_place_owner(at, m);
    }
    return XP_OK;
}

/* ---- exact: words that every rank adds, or takes the largest of ---- */

enum { CHUNK = 256 };
static const uint32_t INF_CODE = 0x7F800000u;

static uint32_t magnitude(float g) {
    uint32_t u;
    memcpy(&u, &g, sizeof u);
    return u & 0x7FFFFFFFu;
}

static float of_code(uint32_t u) {
    float g;
    memcpy(&g, &u, sizeof g);
    return g;
}

static void read_chunk(const xp_tensor *grad, int64_t i0, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)xp_widen(grad->data, grad->dtype, i0 + i);
}

/* COUNT: limb[0] counts. LEAST: top holds INF_CODE less the least magnitude, so that a maximum finds it, and 0, the
 * identity, says +inf. */
static void add_code(xp_ref_exact *s, kind k, uint32_t code) {
    if (code > INF_CODE)
        s->nans++;
    else if (k == COUNT)
        s->limb[0] += code != 0;
    else if (INF_CODE - code > s->top)
        s->top = INF_CODE - code;
}

static void add(xp_ref_exact *s, kind k, const xp_tensor *grad, int64_t i0, int64_t n) {
    if (k != COUNT && k != LEAST) {
        const xp_ref_power p = k == ABS ? XP_REF_ABS : k == SQUARE ? XP_REF_SQUARE : XP_REF_TOP;
        xp_ref_exact_add(s, p, grad->data, grad->dtype, i0, n);
        return;
    }
    for (int64_t i = i0; i < i0 + n; i++)
        add_code(s, k, magnitude((float)xp_widen(grad->data, grad->dtype, i)));
}

static float norm_of(const xp_ref_exact *s, kind k) {
    if (s->nans)
        return NAN;
    if (k == COUNT)
        return (float)s->limb[0];
    if (k == LEAST)
        return of_code(INF_CODE - (uint32_t)s->top);
    return xp_ref_exact_norm(s, k == ABS ? XP_REF_ABS : k == SQUARE ? XP_REF_SQUARE : XP_REF_TOP);
}

static xp_status reduce(const xp_mesh *m, xp_queue *q, uint64_t *word, int n, xp_redop op) {
    xp_comm *world = m->axis[XP_WORLD];
    xp_tensor t = xp_tensor_1d(word, XP_U64, n);
    return world->ops->all_reduce(world, q, &t, op);
}

/* The words of the whole gradient on every rank, carried. */
static xp_status exact_words(const xp_gradnorm_args *a, const xp_mesh *m, xp_queue *q, kind k, xp_ref_exact *out) {
    const int64_t *seg = a->seg.data;
    uint64_t word[XP_REF_EXACT_WORDS];
    static_assert(sizeof word == sizeof *out, "the sum is nothing but u64 words");
    xp_ref_exact_clear(out);
    for (int64_t s = 0; s < a->owner.dim[0]; s++) {
        if (((const uint8_t *)a->owner.data)[s])
            add(out, k, &a->grad, seg[s], seg[s + 1] - seg[s]);
    }
    memcpy(word, out, sizeof word);
    XP_TRY(reduce(m, q, word, XP_REF_EXACT_WORDS, k == TOP || k == LEAST ? XP_MAX : XP_SUM));
    memcpy(out, word, sizeof *out);
    if (k != COUNT)
        xp_ref_exact_carry(out);
    return XP_OK;
}

/* ---- exact: a real p ---- */

/* A sum of numbers in [0, 1] as an integer multiple of 2^-128: four limbs of 32 bits below the point, two above. */
enum { FRACTION = 4, FIXED = 6 };

static void fixed_add(uint64_t *limb, double t) {
    for (int i = FRACTION; i >= 0; i--) {
        const double whole = floor(t);
        limb[i] += (uint64_t)whole;
        t = (t - whole) * 0x1p32; /* both exact */
    }
}

static void fixed_carry(uint64_t *limb) {
    for (int i = 0; i < FIXED - 1; i++) {
        limb[i + 1] += limb[i] >> 32;
        limb[i] &= 0xFFFFFFFFu;
    }
}

/* Within five roundings. */
static double fixed_value(const uint64_t *limb) {
    double sum = 0.0;
    for (int i = 0; i < FIXED; i++)
        sum += ldexp((double)limb[i], 32 * (i - FRACTION));
    return sum;
}

/* The logarithm of (|g| / top)^p: 0 for the top itself, whatever p; -inf for 0. */
static double log_power(float g, float top, double p) {
    const double r = fabs((double)g) / (double)top;
    return r == 1.0 ? 0.0 : p * xp_ref_log(r);
}

static void add_powers(uint64_t *limb, const xp_tensor *grad, int64_t i0, int64_t n, float top, double p) {
    float g[CHUNK];
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t take = n - at < CHUNK ? n - at : CHUNK;
        read_chunk(grad, i0 + at, take, g);
        for (int64_t i = 0; i < take; i++)
            fixed_add(limb, fmin(1.0, xp_ref_exp(log_power(g[i], top, p))));
        fixed_carry(limb);
    }
}

/* The norm before its rounding to f32. words: of kind TOP. */
static xp_status real_norm(const xp_gradnorm_args *a, const xp_mesh *m, xp_queue *q, double *out) {
    const int64_t *seg = a->seg.data;
    uint64_t limb[FIXED] = {0};
    xp_ref_exact words;
    XP_TRY(exact_words(a, m, q, TOP, &words));
    const float top = norm_of(&words, TOP);
    *out = (double)top;
    if (!(top > 0.0f) || isinf(top)) /* the same on every rank */
        return XP_OK;
    for (int64_t s = 0; s < a->owner.dim[0]; s++) {
        if (((const uint8_t *)a->owner.data)[s])
            add_powers(limb, &a->grad, seg[s], seg[s + 1] - seg[s], top, a->p);
    }
    XP_TRY(reduce(m, q, limb, FIXED, XP_SUM));
    fixed_carry(limb);
    *out = (double)top * xp_ref_exp(xp_ref_log(fixed_value(limb)) / a->p);
    return XP_OK;
}

/* ---- torch ---- */

/* The n'th terms of one list, rounded to f32. */
static void f32_powers(kind k, double p, float *g, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float v = fabsf(g[i]);
        g[i] = k == ABS ? v : k == SQUARE ? v * v : (float)xp_ref_exp(p * xp_ref_log((double)v));
    }
}

static float f32_root(kind k, double p, float sum) {
    if (k == ABS)
        return sum;
    return k == SQUARE ? (float)xp_ref_sqrt((double)sum) : (float)xp_ref_exp(xp_ref_log((double)sum) / p);
}

static float list_sum(kind k, double p, const xp_tensor *list, int64_t i0, int64_t n) {
    xp_ref_exact sum;
    float g[CHUNK];
    xp_ref_exact_clear(&sum);
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t take = n - at < CHUNK ? n - at : CHUNK;
        read_chunk(list, i0 + at, take, g);
        f32_powers(k, p, g, take);
        xp_ref_exact_add(&sum, XP_REF_ABS, g, XP_F32, 0, take);
    }
    return xp_ref_exact_norm(&sum, XP_REF_ABS);
}

static float list_extreme(kind k, const xp_tensor *list, int64_t i0, int64_t n) {
    float best = n > 0 ? (float)fabs(xp_widen(list->data, list->dtype, i0)) : 0.0f;
    for (int64_t i = i0; i < i0 + n; i++) {
        const float v = (float)fabs(xp_widen(list->data, list->dtype, i));
        if (v != v || (k == TOP ? v > best : v < best))
            best = v;
        if (v != v)
            break;
    }
    return best;
}

/* The norm of one list of numbers, kept in d. */
static float list_norm(kind k, double p, xp_dtype d, const xp_tensor *list, int64_t i0, int64_t n) {
    float norm;
    if (k == TOP || k == LEAST) {
        norm = list_extreme(k, list, i0, n);
    } else if (k == COUNT) {
        int64_t count = 0;
        for (int64_t i = i0; i < i0 + n; i++)
            count += xp_widen(list->data, list->dtype, i) != 0.0;
        norm = (float)count;
    } else {
        norm = f32_root(k, p, list_sum(k, p, list, i0, n));
    }
    return (float)xp_ref_round((double)norm, d);
}

typedef struct {
    float *tensor; /* [Q] norms of this rank's own tensors */
    float *rank;   /* [P] */
    int64_t *ones; /* [P] */
} room;

static room room_of(const xp_gradnorm_args *a, const xp_mesh *m, void *ws) {
    const int64_t ranks = m->axis[XP_WORLD]->size;
    room r;
    r.ones = ws;
    r.tensor = (float *)(r.ones + ranks);
    r.rank = r.tensor + a->owner.dim[0];
    return r;
}

static size_t workspace(const void *args, const xp_mesh *m) {
    const xp_gradnorm_args *a = args;
    const size_t ranks = (size_t)m->axis[XP_WORLD]->size;
    return a->semantics == XP_TORCH ? ranks * sizeof(int64_t) + (ranks + (size_t)a->owner.dim[0]) * sizeof(float) : 0;
}

static xp_status torch_norm(const xp_gradnorm_args *a, const xp_exec *x, float *out) {
    xp_comm *world = x->mesh->axis[XP_WORLD];
    const kind k = kind_of(a->p);
    const int64_t *seg = a->seg.data;
    const xp_dtype d = a->grad.dtype;
    const room r = room_of(a, x->mesh, x->ws);
    int64_t n = 0;
    for (int64_t s = 0; s < a->owner.dim[0]; s++) {
        if (((const uint8_t *)a->owner.data)[s])
            r.tensor[n++] = list_norm(k, a->p, d, &a->grad, seg[s], seg[s + 1] - seg[s]);
    }
    const xp_tensor own = xp_tensor_1d(r.tensor, XP_F32, n);
    *out = list_norm(k, a->p, d, &own, 0, n);
    if (world->size == 1)
        return XP_OK;
    const xp_tensor mine = xp_tensor_1d(out, XP_F32, 1);
    xp_tensor all = xp_tensor_1d(r.rank, XP_F32, world->size);
    for (int i = 0; i < world->size; i++)
        r.ones[i] = 1;
    XP_TRY(world->ops->all_gather(world, x->q, &mine, r.ones, &all));
    *out = list_norm(k == COUNT ? ABS : k, a->p, d, &all, 0, world->size);
    return XP_OK;
}

static xp_status run(const xp_exec *x, const void *args) {
    const xp_gradnorm_args *a = args;
    const kind k = kind_of(a->p);
    if (a->semantics == XP_TORCH) {
        float norm;
        XP_TRY(torch_norm(a, x, &norm));
        xp_ref_store(a->norm.data, a->norm.dtype, 0, (double)norm);
    } else if (k == REAL) {
        double norm;
        XP_TRY(real_norm(a, x->mesh, x->q, &norm));
        xp_ref_store(a->norm.data, a->norm.dtype, 0, norm);
    } else {
        xp_ref_exact words;
        XP_TRY(exact_words(a, x->mesh, x->q, k, &words));
        xp_ref_store(a->norm.data, a->norm.dtype, 0, (double)norm_of(&words, k));
    }
    return XP_OK;
}

/* ---- bound ----
 *
 * Exact, p in {0, 1, 2, inf, -inf}: 0, the value is rounded once.
 * Exact, a real p, in double with U = 2^-52: a power is exp(p log(|g|/M)) with 4 units of log and of exp, half a unit
 * of the quotient and of the product: relative error e = (4.5 |L| + p/2 + 4) U with L = p log(|g|/M), on both sides.
 * The sum adds gamma of as many terms as there are; the root carries the sum's relative error s as s/p, and has its
 * own 4.5 |log S|/p + 4 units on both sides, and the product with M. All is a factor exp(the sum of these). */
typedef struct {
    double sum, error, terms;
} gauge;

static xp_status real_gauge(const xp_gradnorm_args *a, const xp_mesh *m, gauge *out, int *out_finite) {
    const int64_t *seg = a->seg.data;
    xp_comm *world = m->axis[XP_WORLD];
    xp_ref_exact words;
    double all[3] = {0, 0, 0};
    XP_TRY(exact_words(a, m, NULL, TOP, &words));
    const float top = norm_of(&words, TOP);
    *out_finite = top > 0.0f && !isinf(top);
    for (int64_t s = 0; s < a->owner.dim[0] && *out_finite; s++) {
        for (int64_t i = seg[s]; i < seg[s + 1] && ((const uint8_t *)a->owner.data)[s]; i++) {
            const double l = log_power((float)xp_widen(a->grad.data, a->grad.dtype, i), top, a->p);
            const double t = isinf(l) ? 0.0 : xp_ref_exp(l);
            all[0] += t;
            all[1] += t > 0.0 ? t * (4.5 * fabs(l) + 0.5 * a->p * (l != 0.0) + 4.0) * 0x1p-52 : 0.0;
            all[2] += 1.0;
        }
    }
    xp_tensor view = xp_tensor_1d(all, XP_F64, 3);
    XP_TRY(world->ops->all_reduce(world, NULL, &view, XP_SUM));
    *out = (gauge){all[0], all[1], all[2]};
    return XP_OK;
}

static xp_status bound_real(const xp_gradnorm_args *a, const xp_mesh *m, double ref, double *out) {
    gauge g;
    int finite;
    XP_TRY(real_gauge(a, m, &g, &finite));
    *out = 0.0;
    if (!finite)
        return XP_OK;
    const double s = 2.0 * g.error / g.sum + xp_ref_gamma((int64_t)g.terms + 16, XP_F64);
    const double away = s / (1.0 - s) / a->p + (9.0 * xp_ref_log(g.sum) / a->p + 10.0) * 0x1p-52;
    const double off = ref * xp_ref_expm1(away) * (1.0 + 0x1p-40);
    *out = s < 1.0 ? off + xp_ref_room(XP_F32, ref + off) : (double)INFINITY;
    return XP_OK;
}

/* Torch: the interval of what an implementation may have, list by list; every step is monotone. Sums in f32 in any
 * order are within gamma_n, a power within 4 ulp and, with p and 1/p rounded to f32 and |log| of an f32 below 104,
 * within 104 p u and 104 u / p; each term may lose the smallest subnormal. */
typedef struct {
    double lo, hi;
} span;

static span round_span(span s, xp_dtype d) {
    const double lo = s.lo - xp_ref_half_ulp_err(d, s.lo);
    return (span){lo > 0.0 ? lo : 0.0, s.hi + xp_ref_room(d, s.hi)};
}

static double power(kind k, double p, double v) {
    return k == ABS ? v : k == SQUARE ? v * v : v > 0.0 ? xp_ref_exp(p * xp_ref_log(v)) : 0.0;
}

static double root(kind k, double p, double s) {
    return k == ABS ? s : k == SQUARE ? xp_ref_sqrt(s) : s > 0.0 ? xp_ref_exp(xp_ref_log(s) / p) : 0.0;
}

/* The sums of n powers become the span of their norm in d. */
static span norm_span(kind k, double p, int64_t n, span sum, xp_dtype d) {
    const double u = xp_ref_unit(XP_F32), extra = k == REAL ? 104.0 * p + 10.0 : 4.0;
    const double g = xp_ref_gamma(n + (int64_t)fmin(ceil(extra), 0x1p30), XP_F32) + 0x1p-40;
    const double off = k == ABS ? 0.0 : k == SQUARE ? 8.0 * u : (104.0 / p + 10.0) * u;
    const double lost = (double)n * 0x1p-149, low = sum.lo * (1.0 - g) - lost, high = sum.hi * (1.0 + g) + lost;
    span s = {low > 0.0 ? root(k, p, low) * (1.0 - off) : 0.0, root(k, p, high) * (1.0 + off)};
    if (!(high <= 0x1.fffffep127) || !(off < 1.0))
        s.hi = (double)INFINITY;
    return round_span(s, d);
}

static span list_span(kind k, double p, xp_dtype d, int64_t n, const span *v, const xp_tensor *grad, int64_t i0) {
    span s = {0, 0};
    for (int64_t i = 0; i < n; i++) {
        const double g = v ? 0.0 : fabs(xp_widen(grad->data, grad->dtype, i0 + i));
        const span e = v ? v[i] : (span){g, g};
        if (k == COUNT)
            s = (span){s.lo + (e.lo != 0.0), s.hi + (e.hi != 0.0)};
        else if (k == TOP || k == LEAST)
            s = (span){i == 0 || (k == TOP ? e.lo > s.lo : e.lo < s.lo) ? e.lo : s.lo,
                       i == 0 || (k == TOP ? e.hi > s.hi : e.hi < s.hi) ? e.hi : s.hi};
        else
            s = (span){s.lo + power(k, p, e.lo), s.hi + power(k, p, e.hi)};
    }
    if (k == TOP || k == LEAST)
        return s;
    return k == COUNT ? norm_span(ABS, 1.0, s.hi < 0x1p24 ? 0 : n, s, d) : norm_span(k, p, n, s, d);
}

static size_t bound_workspace(const void *args, const xp_mesh *m) {
    const xp_gradnorm_args *a = args;
    const size_t ranks = (size_t)m->axis[XP_WORLD]->size, tensors = (size_t)a->owner.dim[0];
    return a->semantics == XP_TORCH ? (ranks + tensors) * sizeof(span) + ranks * sizeof(int64_t) : 0;
}

static xp_status bound_torch(const xp_gradnorm_args *a, const xp_mesh *m, double ref, void *ws, double *out) {
    xp_comm *world = m->axis[XP_WORLD];
    const kind k = kind_of(a->p);
    const int64_t *seg = a->seg.data;
    const xp_dtype d = a->grad.dtype;
    span *rank = ws, *tensor = rank + world->size;
    int64_t *ones = (int64_t *)(tensor + a->owner.dim[0]), n = 0;
    for (int64_t s = 0; s < a->owner.dim[0]; s++) {
        if (((const uint8_t *)a->owner.data)[s])
            tensor[n++] = list_span(k, a->p, d, seg[s + 1] - seg[s], NULL, &a->grad, seg[s]);
    }
    span all = list_span(k, a->p, d, n, tensor, NULL, 0);
    if (world->size > 1) {
        const xp_tensor mine = xp_tensor_2d(&all, XP_F64, 1, 2);
        xp_tensor both = xp_tensor_2d(rank, XP_F64, world->size, 2);
        for (int i = 0; i < world->size; i++)
            ones[i] = 1;
        XP_TRY(world->ops->all_gather(world, NULL, &mine, ones, &both));
        all = list_span(k == COUNT ? ABS : k, k == COUNT ? 1.0 : a->p, d, world->size, rank, NULL, 0);
    }
    *out = fmax(all.hi - ref, ref - all.lo);
    return XP_OK;
}

/* Communicates: every rank of the world calls it alike. */
static xp_status bound(const void *args, const xp_mesh *m, int operand, const xp_tensor *ref, void *ws,
                       xp_tensor *tol) {
    const xp_gradnorm_args *a = args;
    const double v = xp_widen(ref->data, ref->dtype, 0);
    double *out = tol->data;
    (void)operand;
    *out = 0.0;
    if (a->semantics == XP_TORCH)
        return bound_torch(a, m, v, ws, out);
    return kind_of(a->p) == REAL ? bound_real(a, m, v, out) : XP_OK;
}

/* A norm with p >= 1 that is rounded once is at least every magnitude that this rank counts, and the one with -inf at
 * most: rounding is monotone, so this holds without a tolerance. */
static xp_status dominates(const void *args, const xp_mesh *m, double *out) {
    const xp_gradnorm_args *a = args;
    const kind k = kind_of(a->p);
    const double norm = xp_widen(a->norm.data, a->norm.dtype, 0);
    (void)m;
    *out = 0.0;
    if (a->semantics == XP_TORCH || k == COUNT || k == REAL || norm != norm) /* a NaN element asks for a NaN norm */
        return XP_OK;
    for (int64_t q = 0; q < a->owner.dim[0]; q++) {
        for (int64_t i = ((const int64_t *)a->seg.data)[q]; i < ((const int64_t *)a->seg.data)[q + 1]; i++) {
            const double g = fabs(xp_widen(a->grad.data, a->grad.dtype, i));
            if (((const uint8_t *)a->owner.data)[q] && !(k == LEAST ? norm <= g : norm >= g))
                *out = (double)INFINITY;
        }
    }
    return XP_OK;
}

static const xp_property properties[] = {{"dominates", dominates}};

const xp_stage xp_stage_gradnorm = {
    .name = "gradnorm",
    .meaning = "norm of the logical gradient, each element counted once, NaN never dropped; rounded once, or as torch",
    .axis = XP_WORLD,
    .args_size = sizeof(xp_gradnorm_args),
    .operand = operands,
    .operands = sizeof operands / sizeof operands[0],
    .param = params,
    .params = sizeof params / sizeof params[0],
    .check = check,
    .cost = cost,
    .bound = bound,
    .bound_workspace = bound_workspace,
    .fill = fill,
    .property = properties,
    .properties = sizeof properties / sizeof properties[0],
};

const xp_kernel xp_ref_gradnorm = {
    .stage = &xp_stage_gradnorm,
    .name = "ref",
    .det = XP_DET_RUN | XP_DET_MESH,
    .workspace = workspace,
    .run = run,
};
