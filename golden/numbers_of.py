"""Tests of what is no MoE block: torch's norms, losses and optimizers, and ml_dtypes' formats."""

import ml_dtypes
import numpy as np
import torch

import draw

TORCH = f"torch {torch.__version__.split('+')[0]}"


def add_rmsnorm(out):
    for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        x = draw.real("rms.x", (7, 24), dtype=dtype).requires_grad_(True)
        w = (1 + draw.real("rms.w", (24,), 0.25)).to(dtype).requires_grad_(True)
        # The norm of the families' own code: f32 inside, one rounding, then the weight.
        wide = x.float()
        y = w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
        dy = draw.real("rms.dy", (7, 24), dtype=dtype)
        y.backward(dy)
        line = f"rmsnorm dtype={name} param={name} eps=1e-6"
        out.add("rmsnorm", TORCH, f"{name}", line, {"x": x, "w": w}, {"y": y}, unchecked=["rstd"])
        if dtype == torch.float32:
            rstd = torch.rsqrt(x.detach().pow(2).mean(-1) + 1e-6)
            out.add("rmsnorm_bwd", TORCH, "gradients", "rmsnorm_bwd dtype=f32 param=f32 grad=f32",
                    {"dy": dy, "x": x, "w": w, "rstd": rstd}, {"dx": x.grad, "dw": w.grad.reshape(1, -1)})


def add_xent(out):
    logits = draw.real("xent", (9, 32), 2.0).requires_grad_(True)
    target = draw.whole("xent.t", (9,), 0, 31, torch.int64)
    target[3] = -1
    loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="none")
    loss.sum().backward()
    lse = torch.logsumexp(logits.detach(), -1)
    out.add("xent", TORCH + " cross_entropy", "one ignored target", "xent dtype=f32 V=32",
            {"logits": logits, "target": target.to(torch.int32)},
            {"lse": lse, "loss": loss, "total": loss.sum().reshape(1), "count": torch.tensor([8])})
    out.add("xent", TORCH + " cross_entropy", "gradient", "xent_bwd dtype=f32 V=32",
            {"logits": logits, "target": target.to(torch.int32), "lse": lse}, {"dlogits": logits.grad})


def flat(name, shapes, std=1.0):
    return [draw.real(f"{name}.{i}", s, std) for i, s in enumerate(shapes)]


SHAPES = [(5, 4), (7,), (3, 3)]


def segments():
    sizes = [int(np.prod(s)) for s in SHAPES]
    return torch.tensor(np.concatenate([[0], np.cumsum(sizes)]))


def joined(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def add_clip(out):
    for p in (1.0, 2.0, float("inf")):
        grads = flat("clip", SHAPES, 2.0)
        params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
        for q, g in zip(params, grads):
            q.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0, norm_type=p)
        ones = torch.ones(len(SHAPES), dtype=torch.uint8)
        # torch's norm of norms rounds several times; ours is correctly rounded: only exact data give equal bits.
        out.add("gradnorm", TORCH + " clip_grad_norm_", f"p {p:g} of small integers",
                f"gradnorm p={p:g}", exact_norm(p, ones), exact_norm_of(p), compare="bits")
        if p == 2.0:
            out.add("clip", TORCH + " clip_grad_norm_", "scaled by max_norm / (norm + 1e-6)", "clip max_norm=1 eps=1e-6",
                    {"grad": joined(grads), "norm": norm.reshape(1)}, {"grad": joined([q.grad for q in params])},
                    unchecked=["coef"])


def exact_grads():
    return [torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([12.0]), torch.tensor([0.0, -84.0])]


def exact_norm(p, ones):
    g = exact_grads()
    sizes = np.cumsum([0] + [t.numel() for t in g])
    return {"grad": torch.cat(g), "seg": torch.tensor(sizes), "owner": ones}


def exact_norm_of(p):
    params = [torch.nn.Parameter(torch.zeros(t.shape)) for t in exact_grads()]
    for q, t in zip(params, exact_grads()):
        q.grad = t.clone()
    return {"norm": torch.nn.utils.clip_grad_norm_(params, 1e9, norm_type=p).reshape(1)}


def add_optimizers(out):
    for steps in (1, 3):
        params = [torch.nn.Parameter(p) for p in flat("opt.p", SHAPES)]
        decays = [{"params": [q for q in params if q.dim() > 1], "weight_decay": 0.1},
                  {"params": [q for q in params if q.dim() == 1], "weight_decay": 0.0}]
        adam = torch.optim.AdamW(decays, lr=0.01, betas=(0.9, 0.99), eps=1e-8, foreach=False, fused=False)
        before = None
        for s in range(steps):
            if s == steps - 1:
                state = [adam.state.get(q, {}) for q in params]
                before = (joined(params), [s_.get("exp_avg", torch.zeros_like(q)).clone() for s_, q in zip(state, params)],
                          [s_.get("exp_avg_sq", torch.zeros_like(q)).clone() for s_, q in zip(state, params)])
            grads = flat(f"opt.g{s}", SHAPES)
            for q, g in zip(params, grads):
                q.grad = g.clone()
            adam.step()
        prompt = {"param": before[0], "m": joined(before[1]), "v": joined(before[2]), "grad": joined(grads),
                  "seg": segments(), "decay": torch.tensor([1, 0, 1], dtype=torch.uint8)}
        after = {"param": joined(params), "m": joined([adam.state[q]["exp_avg"] for q in params]),
                 "v": joined([adam.state[q]["exp_avg_sq"] for q in params])}
        out.add("adamw", TORCH + " AdamW", f"step {steps}, two groups",
                f"adamw lr=0.01 beta1=0.9 beta2=0.99 eps=1e-8 weight_decay=0.1 step={steps}", prompt, after)
    params = [torch.nn.Parameter(p) for p in flat("sgd.p", SHAPES)]
    sgd = torch.optim.SGD([{"params": [q], "weight_decay": 0.1 if q.dim() > 1 else 0.0} for q in params], lr=0.1,
                          momentum=0.9, foreach=False)
    for s in range(2):
        grads = flat(f"sgd.g{s}", SHAPES)
        before = joined(params)
        buf = [sgd.state[q].get("momentum_buffer", torch.zeros_like(q)).clone() if q in sgd.state else torch.zeros_like(q)
               for q in params]
        for q, g in zip(params, grads):
            q.grad = g.clone()
        sgd.step()
    out.add("sgd", TORCH + " SGD", "step 2, momentum", "sgd lr=0.1 momentum=0.9 weight_decay=0.1 step=2 with=buf",
            {"param": before, "buf": joined(buf), "grad": joined(grads), "seg": segments(),
             "decay": torch.tensor([1, 0, 1], dtype=torch.uint8)},
            {"param": joined(params), "buf": joined([sgd.state[q]["momentum_buffer"] for q in params])})


FORMATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
           "e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
           "e8m0": ml_dtypes.float8_e8m0fnu, "e2m1": ml_dtypes.float4_e2m1fn}


def edges(kind):
    """Numbers around every rounding border of a format: each code's value, the midpoints, and their neighbours."""
    bits = {"bf16": 16, "f16": 16, "e2m1": 4}.get(kind, 8)
    step = 37 if bits == 16 else 1
    codes = np.arange(0, 1 << bits, step, dtype=np.uint16 if bits == 16 else np.uint8)
    with np.errstate(all="ignore"):
        v = codes.view(FORMATS[kind]).astype(np.float64)
        v = np.unique(v[np.isfinite(v)])
        mid = (v[1:] + v[:-1]) / 2
        points = np.concatenate([v, mid, v * 2.5]).astype(np.float32)
        points = points[np.isfinite(points)]
        near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])
    if kind == "e8m0":
        near = near[near > 0]
    near = np.unique(near)
    return near if kind == "e2m1" else np.concatenate([near, np.array([np.inf, np.nan], np.float32)])


def add_casts(out):
    name = f"ml_dtypes {ml_dtypes.__version__}"
    for kind, dtype in FORMATS.items():
        if kind == "e2m1":
            codes = np.arange(16, dtype=np.uint8).view(dtype)
        elif kind in ("bf16", "f16"):
            codes = np.arange(0, 1 << 16, 61, dtype=np.uint16).view(dtype)
        else:
            codes = np.arange(256, dtype=np.uint8).view(dtype)
        with np.errstate(all="ignore"):
            out.add("cast", name, f"codes of {kind} widened", f"cast act={kind} param=f32", {"x": codes},
                    {"y": codes.astype(np.float32)}, compare="bits")
            x = edges(kind)
            x = x[: len(x) // 2 * 2]
            out.add("cast", name, f"f32 narrowed to {kind}", f"cast act=f32 param={kind} saturate=0", {"x": x},
                    {"y": x.astype(dtype)}, compare="bits")


def add_all(out):
    add_rmsnorm(out)
    add_xent(out)
    add_clip(out)
    add_optimizers(out)
    add_casts(out)
