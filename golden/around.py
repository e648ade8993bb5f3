"""Tests of what some classes have around their experts: maps to a width of the experts' own, norms of the latent rows,
of every expert's rows and of the block's sum, a bias of that sum. A block runs whole, forward and backward, and each
stage is compared with the tensors that the class handed on."""

import dataclasses

import torch

import draw
from families import BIAS, FAMILIES, GROUPS, N3
from parts import E, H, LETTER, T, Family, as_operand, attribute, expert_parameters, fill
from routes import source

D, K = 10, 3  # the experts' own width; slots a token
BOTH = (torch.float32, torch.bfloat16)


def by_name(name: str, **config) -> Family:
    family = next(f for f in FAMILIES if f.name == name)
    return dataclasses.replace(family, config={**family.config, **config})


MUSE = by_name("muse_spark", moe_hidden_size=D)
NEMOTRON = by_name("nemotron_h", moe_latent_size=D)
JETMOE = by_name("jetmoe")
AXK1 = Family("axk1", "AXK1MoE", "hf-5.24/deepseek_v3", {**N3, **GROUPS, "routed_scaling_factor": 2.5}, bias=BIAS,
              shared="shared_experts")


def built(family: Family, dtype: torch.dtype):
    block = family.build(dtype, "eager", **{family.topk: K})
    fill(block, family, False)
    with torch.no_grad():
        for name, p in block.named_parameters():
            value = draw.real(f"around.{family.name}.{name}", p.shape, 0.25)
            if name.endswith("layernorm.weight"):
                p.copy_(1 + value)
            elif name == "bias":
                p.copy_(value)
    return block


def rows_of(parts) -> torch.Tensor:
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in parts])


class Taps:
    """What went into modules of a block and came out, call after call, with the gradients of both."""

    def __init__(self, block, paths):
        self.x, self.y = {p: [] for p in paths}, {p: [] for p in paths}
        for path in paths:
            attribute(block, path).register_forward_hook(lambda _module, args, y, path=path: self.keep(path, args[0], y))

    def keep(self, path: str, x, y):
        for t in [x] + list(y if isinstance(y, tuple) else [y]):
            if t.requires_grad:
                t.retain_grad()
        self.x[path].append(x)
        self.y[path].append(y)

    def rows(self, path: str):
        """In and out of all calls, as rows."""
        return rows_of(self.x[path]), rows_of(self.y[path])

    def gradients(self, path: str):
        return rows_of([x.grad for x in self.x[path]]), rows_of([y.grad for y in self.y[path]])


def run(family: Family, block, dtype: torch.dtype):
    x = draw.real(f"around.{family.name}.x", (T, H), dtype=dtype).requires_grad_(True)
    dy = draw.real(f"around.{family.name}.dy", (T, H), dtype=dtype)
    y = block(x[None])
    y = (y[0] if isinstance(y, tuple) else y).reshape(T, H)
    y.backward(dy)
    return x, dy, y


class Tests:
    """Tests of one class and one dtype."""

    def __init__(self, out, family: Family, dtype: torch.dtype):
        self.out, self.family, self.dtype, self.letter = out, family, dtype, LETTER[dtype]

    def add(self, what: str, line: str, prompt: dict, expected: dict, unchecked=()):
        self.out.add(f"around-{self.family.name}", source(self.family), f"{what}, {self.letter}", line, prompt, expected,
                     unchecked=unchecked)

    def add_map(self, what: str, taps: Taps, path: str, w, inner: bool):
        """y = x W^T; with inner the gradient of x is that of no other path."""
        d, (x, y), (dx, dy) = self.letter, taps.rows(path), taps.gradients(path)
        types = f"act={d} router={d} logits={d}"
        self.add(what, f"router {types}", {"x": x, "w": w}, {"logits": y})
        if inner:
            self.add(what, f"router_bwd {types}", {"dlogits": dy, "w": w}, {"dx": dx})
        self.add(what, f"wgrad grad={d} block=0 fold=0", {"dy": dy, "x": x, "offsets": torch.tensor([0, T])},
                 {"dw": w.grad[None, None]})

    def add_norm(self, what: str, taps: Taps, path: str, module, shift: float, one_call: bool = True):
        """shift: what the class adds to its weight. Several calls add to a gradient that is rounded after each."""
        (x, y), (dx, dy), d = taps.rows(path), taps.gradients(path), self.letter
        eps = getattr(module, "variance_epsilon", None) or module.eps
        w, first = shift + module.weight.detach(), "InputScaled" in type(module).__name__
        u = (x.float() * w.float()).to(self.dtype).float() if first else x.float()
        rstd = torch.rsqrt(u.detach().square().mean(-1) + eps)
        weight = f"weight_first={'on' if first else 'off'}"
        self.add(what, f"rmsnorm dtype={d} param={d} eps={eps:g} {weight}", {"x": x, "w": w}, {"y": y},
                 unchecked=["rstd"])
        exact = one_call or self.dtype == torch.float32
        self.add(what, f"rmsnorm_bwd dtype={d} param={d} grad={d} {weight}", {"dy": dy, "x": x, "w": w, "rstd": rstd},
                 {"dx": dx, **({"dw": module.weight.grad[None]} if exact else {})}, unchecked=[] if exact else ["dw"])


# ---- blocks ----


def slots_by_expert(idx: torch.Tensor):
    """Tokens of the rows, expert by expert and slot by slot, as the loop over experts takes them; each slot's row."""
    tokens, pos = [], torch.empty_like(idx)
    for e in range(E):
        for k, t in (idx.T == e).nonzero().tolist():
            pos[t, k] = len(tokens)
            tokens.append(t)
    return torch.tensor(tokens), pos


def add_experts(tests: Tests, block, taps: Taps):
    """The experts' rows and their sum, with the gradients of what is sent home."""
    family, d = tests.family, tests.letter
    _, w, idx = taps.y["gate"][0]
    latent, total = taps.x["experts"][0], taps.y["experts"][0]
    rows, normed = taps.rows("experts.post_expert_norm")
    tokens, pos = slots_by_expert(idx)
    counts = torch.bincount(idx.flatten(), minlength=E)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    weights = {k: as_operand(family, k, p) for k, p in expert_parameters(block, family).items()}
    tests.add("experts", f"expert dtype={d} {family.record()} param={d}",
              {"x": latent[tokens], "offsets": offsets, **weights}, {"y": rows}, unchecked=["pre", "act"])
    sent = {"recv_counts": counts[None], "recv_offsets": offsets, "counts": counts, "offsets": offsets,
            "pos": pos.to(torch.int32)}
    types = f"act={d} weight=f32 {family.record()} accumulate=eager_act"
    tests.add("sum of the experts", f"combine {types}", {"out": normed, "idx": idx.to(torch.int32), "w": w, **sent},
              {"back": normed, "y": total})
    tests.add("sum of the experts", f"combine_bwd {types}", {"dy": total.grad, "back": normed, "w": w, **sent},
              {"dw": w.grad, "dout": taps.gradients("experts.post_expert_norm")[1]})


def add_muse(out, dtype: torch.dtype):
    block = built(MUSE, dtype)
    taps = Taps(block, ("gate", "pre_expert_proj", "pre_expert_norm", "experts", "experts.post_expert_norm",
                        "post_expert_proj"))
    run(MUSE, block, dtype)
    tests = Tests(out, MUSE, dtype)
    if dtype == torch.float32:  # a map's roundings are the router's
        tests.add_map("latent down", taps, "pre_expert_proj", block.pre_expert_proj.weight, False)
        tests.add_map("latent up", taps, "post_expert_proj", block.post_expert_proj.weight, True)
    tests.add_norm("latent norm", taps, "pre_expert_norm", block.pre_expert_norm, 1.0)
    add_experts(tests, block, taps)
    norm = block.experts.post_expert_norm
    tests.add_norm("expert norm", taps, "experts.post_expert_norm", norm, 1.0, one_call=False)


def add_nemotron(out, dtype: torch.dtype):
    block = built(NEMOTRON, dtype)
    taps = Taps(block, ("fc1_latent_proj", "fc2_latent_proj", "shared_experts"))
    _, _, y = run(NEMOTRON, block, dtype)
    tests = Tests(out, NEMOTRON, dtype)
    tests.add_map("latent down", taps, "fc1_latent_proj", block.fc1_latent_proj.weight, False)
    tests.add_map("latent up", taps, "fc2_latent_proj", block.fc2_latent_proj.weight, True)
    tests.add("shared", f"residual dtype={tests.letter}",
              {"a": taps.y["fc2_latent_proj"][0], "b": taps.rows("shared_experts")[1]}, {"y": y})


def add_axk1(out, dtype: torch.dtype):
    block = built(AXK1, dtype)
    taps = Taps(block, ("experts", "shared_experts", "post_mlp_layernorm"))
    run(AXK1, block, dtype)
    tests = Tests(out, AXK1, dtype)
    total = taps.rows("post_mlp_layernorm")[0]
    tests.add("shared", f"residual dtype={tests.letter}",
              {"a": taps.y["experts"][0], "b": taps.rows("shared_experts")[1]}, {"y": total})
    tests.add_norm("block norm", taps, "post_mlp_layernorm", block.post_mlp_layernorm, 0.0)


def add_jetmoe(out, dtype: torch.dtype):
    """The sum without its bias is the block's output with a bias of zeros."""
    block = built(JETMOE, dtype)
    _, dy, y = run(JETMOE, block, dtype)
    gradient, bias = block.bias.grad.clone(), block.bias.detach().clone()
    with torch.no_grad():
        block.bias.zero_()
    total = run(JETMOE, block, dtype)[2]
    tests, d = Tests(out, JETMOE, dtype), LETTER[dtype]
    tests.add("out bias", f"embed dtype={d} param={d}",
              {"token": torch.zeros(T, dtype=torch.int32), "table": bias[None], "pos": total}, {"y": y})
    tests.add("out bias", f"wgrad grad={d} block=0 fold=0",
              {"dy": dy, "x": torch.ones(T, 1, dtype=dtype), "offsets": torch.tensor([0, T])},
              {"dw": gradient[None, None, :, None]})


def add_all(out):
    for dtype in BOTH:
        add_muse(out, dtype)
    add_nemotron(out, torch.float32)
    for dtype in BOTH:
        add_axk1(out, dtype)
        add_jetmoe(out, dtype)
