"""Tests of what a training step has besides MoE blocks: norms, loss, clipping and optimizers, by torch itself."""

import math

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

import draw
from parts import LETTER

TORCH = f"torch {torch.__version__.split('+')[0]}"
SHAPES = ((5, 4), (7,), (3, 3))
MATRIX = tuple(len(s) > 1 for s in SHAPES)  # matrices are decayed, vectors are not


# ---- norm and loss ----


def add_rmsnorm(out, dtype: torch.dtype):
    norm = Qwen3MoeRMSNorm(24, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + draw.real("rms.w", (24,), 0.25))
    x = draw.real("rms.x", (7, 24), dtype=dtype).requires_grad_(True)
    dy = draw.real("rms.dy", (7, 24), dtype=dtype)
    y = norm(x)
    y.backward(dy)
    name, source = LETTER[dtype], "transformers 5.24.0 Qwen3MoeRMSNorm"
    out.add("rmsnorm", source, name, f"rmsnorm dtype={name} param={name} eps=1e-6", {"x": x, "w": norm.weight},
            {"y": y}, unchecked=["rstd"])
    wide = x.detach().float()
    rstd = torch.rsqrt(wide.square().mean(-1) + 1e-6)
    after = {"dx": x.grad, "dw": norm.weight.grad[None]}
    out.add("rmsnorm", source, f"{name}, gradients", f"rmsnorm_bwd dtype={name} param={name} grad={name}",
            {"dy": dy, "x": x, "w": norm.weight, "rstd": rstd}, after)


def add_xent(out, dtype: torch.dtype, std: float, ignored: bool):
    """Logits are widened before the loss, as transformers' own loss does; sums, not means."""
    tokens, vocabulary = 9, 32
    logits = draw.real(f"xent.{std}", (tokens, vocabulary), std, dtype).requires_grad_(True)
    target = draw.whole("xent.t", (tokens,), 0, vocabulary - 1, torch.int64)
    if ignored:
        target[3::4] = -1
    loss = torch.nn.functional.cross_entropy(logits.float(), target, ignore_index=-1, reduction="none")
    total = torch.nn.functional.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum")
    total.backward()
    lse = torch.logsumexp(logits.detach().float(), -1)
    given = {"logits": logits, "target": target.to(torch.int32)}
    comment = f"{LETTER[dtype]} logits of size {std:g}" + (", ignored targets" if ignored else "")
    flags = ["IgnoredTargets"] if ignored else []
    count = (target >= 0).sum().reshape(1)
    out.add("xent", TORCH + " cross_entropy", comment, f"xent dtype={LETTER[dtype]}", given,
            {"lse": lse, "loss": loss, "total": total.reshape(1), "count": count}, flags=flags)
    out.add("xent", TORCH + " cross_entropy", comment + ", gradient", f"xent_bwd dtype={LETTER[dtype]}",
            {**given, "lse": lse}, {"dlogits": logits.grad}, flags=flags)


# ---- flat gradients and parameters ----


def tensors(name: str, std: float = 1.0, dtype: torch.dtype = torch.float32) -> list:
    return [draw.real(f"{name}.{i}", s, std, dtype) for i, s in enumerate(SHAPES)]


def flat(parts) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in parts])


def borders(parts) -> torch.Tensor:
    return torch.tensor([0] + [t.numel() for t in parts]).cumsum(0)


def with_gradients(grads) -> list:
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    return params


def add_norm(out, grads, p: float, comment: str, compare: str, semantics: str, flags=()):
    norm = torch.nn.utils.get_total_norm(grads, p)
    dtype = LETTER[grads[0].dtype]
    out.add("gradnorm", TORCH + " get_total_norm", comment, f"gradnorm p={p:g} grad={dtype} semantics={semantics}",
            {"grad": flat(grads), "seg": borders(grads), "owner": torch.ones(len(grads), dtype=torch.uint8)},
            {"norm": norm.float().reshape(1)}, compare=compare, flags=flags)


def add_norms(out):
    # Sums of these are exact, so torch's norm of norms is rounded nowhere and equals the norm of everything.
    exact = [torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([12.0]), torch.tensor([0.0, -84.0])]
    for p in (1.0, 2.0, math.inf, -math.inf):
        add_norm(out, exact, p, f"p {p:g} of small integers", "bits", "exact")
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, 1.0, 2.0, 3.0, math.inf, -math.inf):
            add_norm(out, tensors("norm", 2.0, dtype), p, f"p {p:g}, {LETTER[dtype]}", "bound", "torch")
    broken = tensors("norm", 2.0)
    broken[1][2] = math.nan
    broken[2][0] = math.inf
    for p in (1.0, 2.0, math.inf):
        add_norm(out, broken, p, f"p {p:g}, a NaN and an infinity", "bits", "exact", ["NonFinite"])


def add_clip(out, dtype: torch.dtype, max_norm: float, broken: float = 0.0):
    grads = tensors("clip", 2.0, dtype)
    if broken:
        grads[0][1, 1] = broken
    params = with_gradients(grads)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    line = f"clip max_norm={max_norm:g} eps=1e-6 grad={LETTER[dtype]} semantics=torch"
    out.add("clip", TORCH + " clip_grad_norm_", f"{LETTER[dtype]}, norm {float(norm):.3g}",
            line + (" nonfinite=propagate" if broken else ""), {"grad": flat(grads), "norm": norm.float().reshape(1)},
            {"grad": flat([p.grad for p in params])}, compare="bits", unchecked=["coef"],
            flags=["NonFinite"] if broken else ["TwoRoundings"])


def decayed_groups(params, weight_decay: float) -> list:
    return [{"params": [p for p, m in zip(params, MATRIX) if m], "weight_decay": weight_decay},
            {"params": [p for p, m in zip(params, MATRIX) if not m], "weight_decay": 0.0}]


def advance(optimizer, params, names, steps: int, dtype: torch.dtype):
    """The last of some steps: parameters and state before it, its gradients, and both after it."""
    for step in range(steps):
        grads = tensors(f"opt.g{step}", 1.0, dtype)
        before = read(optimizer, params, names)
        for p, g in zip(params, grads):
            p.grad = g.clone()
        optimizer.step()
    return before, grads, read(optimizer, params, names)


def read(optimizer, params, names) -> dict:
    out = {"param": flat(params).clone()}
    for operand, state in names.items():
        out[operand] = flat([optimizer.state[p].get(state, torch.zeros_like(p)) for p in params])
    return out


def add_step(out, name: str, code: str, optimizer, params, names, steps: int, line: str, **more):
    dtype = params[0].dtype
    before, grads, after = advance(optimizer, params, names, steps, dtype)
    decay = torch.tensor(MATRIX, dtype=torch.uint8)
    prompt = {**before, "grad": flat(grads), "seg": borders(grads), "decay": decay}
    out.add(name, f"{TORCH} {type(optimizer).__name__}", f"{LETTER[dtype]}, step {steps}, two groups, {code}",
            f"{line} step={steps}", prompt, after, **more)


def parameters(dtype: torch.dtype = torch.float32) -> list:
    return [torch.nn.Parameter(p) for p in tensors("opt.p", 1.0, dtype)]


def add_adamw(out, dtype: torch.dtype, steps: int, foreach: bool):
    params = parameters(dtype)
    adam = torch.optim.AdamW(decayed_groups(params, 0.1), lr=0.01, betas=(0.9, 0.99), eps=1e-8, foreach=foreach,
                             fused=False)
    letter = LETTER[dtype]
    add_step(out, "adamw", "foreach" if foreach else "loop", adam, params, {"m": "exp_avg", "v": "exp_avg_sq"}, steps,
             "adamw lr=0.01 beta1=0.9 beta2=0.99 eps=1e-8 weight_decay=0.1 semantics=torch "
             f"master={letter} moment={letter} grad={letter}", compare="bits", flags=["TwoRoundings"])


def add_sgd(out, momentum: float, steps: int):
    params = parameters()
    sgd = torch.optim.SGD(decayed_groups(params, 0.1), lr=0.1, momentum=momentum, foreach=False)
    names = {"buf": "momentum_buffer"} if momentum else {}
    add_step(out, "sgd", "loop", sgd, params, names, steps, f"sgd lr=0.1 momentum={momentum} weight_decay=0.1")


def add_all(out):
    both = (torch.float32, torch.bfloat16)
    for dtype in both:
        add_rmsnorm(out, dtype)
    add_xent(out, torch.float32, 2.0, True)
    add_xent(out, torch.float32, 100.0, False)
    add_xent(out, torch.bfloat16, 2.0, True)
    add_norms(out)
    for dtype in both:
        for max_norm in (0.7, 1.0, 1000.0):
            add_clip(out, dtype, max_norm)
    add_clip(out, torch.float32, 1.0, math.nan)
    add_clip(out, torch.float32, 1.0, math.inf)
    for dtype in both:
        for steps in (1, 3):
            add_adamw(out, dtype, steps, False)
    # Not in bf16: torch's foreach code rounds beta2 to bf16 there, its loop does not.
    add_adamw(out, torch.float32, 3, True)
    for momentum, steps in ((0.0, 1), (0.9, 1), (0.9, 3)):
        add_sgd(out, momentum, steps)
