"""Tests of Gemma 4's block: its router reads a norm of its own, experts and a dense MLP read two other ones, both outputs
are normed and then their sum. The class's whole layer runs without its attention, forward and backward, and each stage
is compared with the tensors that the class handed on."""

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer

import draw
from around import Taps
from blocks import ROWS
from parts import E, F, H, LETTER, T, gradient

K, S = 3, 12
SOURCE = "transformers 5.24.0 Gemma4Text"
NORMS = {"pre_feedforward_layernorm": "shared in norm", "post_feedforward_layernorm_1": "shared norm",
         "pre_feedforward_layernorm_2": "norm", "post_feedforward_layernorm_2": "routed norm",
         "post_feedforward_layernorm": "block norm"}


class NoAttention(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


def layer_of(dtype: torch.dtype, kernels: str):
    config = CONFIG_MAPPING["gemma4_text"](
        hidden_size=H, num_experts=E, top_k_experts=K, moe_intermediate_size=F, intermediate_size=S,
        enable_moe_block=True, hidden_size_per_layer_input=0, num_hidden_layers=1, layer_types=["full_attention"])
    config._experts_implementation = kernels
    torch.set_default_dtype(dtype)
    try:
        layer = Gemma4TextDecoderLayer(config, 0).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    layer.self_attn = NoAttention()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            value = draw.real(f"gemma4.{name}", p.shape, 0.25 if p.dim() == 1 else p.shape[-1] ** -0.5)
            p.copy_((1 + value if p.dim() == 1 else value).to(dtype))
    return layer


class Tests:
    def __init__(self, out, dtype: torch.dtype):
        self.out, self.dtype, self.letter = out, dtype, LETTER[dtype]
        self.layer = layer_of(dtype, "eager")
        self.taps = Taps(self.layer, list(NORMS) + ["router.proj", "router", "mlp", "experts"])
        self.h = draw.real("gemma4.h", (T, H), dtype=dtype).requires_grad_(True)
        self.y = self.layer(self.h[None])[0]
        self.y.backward(draw.real("gemma4.dy", (T, H), dtype=dtype))

    def add(self, group: str, comment: str, line: str, prompt: dict, expected: dict, block="DecoderLayer", **more):
        self.out.add(f"{group}-gemma4", SOURCE + block, f"{comment}, {self.letter}", line, prompt, expected, **more)

    def add_norm(self, what: str, x, w, y, dy, dx, dw):
        """dx None: what it normed has other uses, whose gradients lie in the same sum."""
        types = f"dtype={self.letter} param={self.letter}"
        rstd = torch.rsqrt(x.detach().float().square().mean(-1) + 1e-6)
        self.add("around", what, f"rmsnorm {types} eps=1e-6", {"x": x, "w": w}, {"y": y}, unchecked=["rstd"])
        self.add("around", what, f"rmsnorm_bwd {types} grad={self.letter}", {"dy": dy, "x": x, "w": w, "rstd": rstd},
                 {"dw": dw[None], **({} if dx is None else {"dx": dx})}, unchecked=["dx"] if dx is None else [])

    def add_norms(self):
        for path, what in NORMS.items():
            (x, y), (dx, dy) = self.taps.rows(path), self.taps.gradients(path)
            module = getattr(self.layer, path)
            self.add_norm(what, x, module.weight, y, dy, None if path.startswith("pre") else dx, module.weight.grad)

    def add_router(self):
        """H is 16: what the class multiplies by 1/4 is four times its product, to the bit."""
        router, d = self.layer.router, self.letter
        (x, logits), (dx, dlogits) = self.taps.rows("router.proj"), self.taps.gradients("router.proj")
        self.add_norm("router's norm", self.h, router.scale, 4 * x, dx / 4, None, router.scale.grad)
        self.add("around", "router's rows", f"residual dtype={d} factor={H ** -0.5}", {"a": 4 * x}, {"y": x},
                 compare="bits")
        types = f"act={d} router={d} logits={d}"
        self.add("around", "router", f"router {types}", {"x": x, "w": router.proj.weight}, {"logits": logits})
        self.add("around", "router", f"router_bwd {types}", {"dlogits": dlogits, "w": router.proj.weight}, {"dx": dx})
        probabilities, w, idx = self.taps.y["router"][0]
        idx, line = idx.to(torch.int32), f"dtype={d} dialect=hf-5.24/gemma4 logits={d}"
        given = {"logits": logits, "scale_e": router.per_expert_scale.float()}
        self.add("route", f"k {K}", f"route {line} weight=f32", given,
                 {"scores": probabilities, "idx": idx, "w": w}, "Router", compare="classes")
        back = {"scores": probabilities, "idx": idx, "dw": w.grad}
        self.add("route_bwd", f"k {K}", f"route_bwd {line}", {**back, **given}, {"dlogits": dlogits}, "Router")
        if self.dtype == torch.float32:  # in bf16 autograd adds slot after slot in bf16
            self.add("route_scale_bwd", f"k {K}", f"route_scale_bwd {line} grad={d}", back,
                     {"dscale": router.per_expert_scale.grad[None]}, "Router")

    def add_sums(self):
        d, last = self.letter, {path: self.taps.rows(path) for path in NORMS}
        a, b = last["post_feedforward_layernorm_1"][1], last["post_feedforward_layernorm_2"][1]
        self.add("around", "both outputs", f"residual dtype={d}", {"a": b, "b": a},
                 {"y": last["post_feedforward_layernorm"][0]}, compare="bits")
        self.add("around", "residual", f"residual dtype={d}",
                 {"a": self.h, "b": last["post_feedforward_layernorm"][1]}, {"y": self.y}, compare="bits")

    def add_experts(self):
        experts, d = self.layer.experts, self.letter
        x = draw.real("gemma4.rows", (T, H), dtype=self.dtype)
        counts = torch.bincount(torch.tensor(ROWS), minlength=E)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        with torch.no_grad():
            y = experts(x, torch.tensor(ROWS)[:, None], torch.ones(T, 1, dtype=self.dtype))
        self.add("expert", "one row, one expert", f"expert dtype={d} dialect=hf-5.24/gemma4 param={d}",
                 {"x": x, "offsets": offsets, "w1": experts.gate_up_proj, "w2": experts.down_proj}, {"y": y}, "Experts",
                 unchecked=["pre", "act"])


class Identity(torch.nn.Module):
    def forward(self, x):
        return x


def add_block(out, dtype: torch.dtype, kernels: str):
    """Router and experts read the same rows: the class's router with an identity in its norm's place and 4 for a scale,
    which 1/4 undoes."""
    layer, d = layer_of(dtype, kernels), LETTER[dtype]
    router, experts = layer.router, layer.experts
    router.norm = Identity()
    with torch.no_grad():
        router.scale.fill_(4)
    x = draw.real("gemma4.block", (T, H), dtype=dtype).requires_grad_(True)
    dy = draw.real("gemma4.block.dy", (T, H), dtype=dtype)
    _, w, idx = router(x)
    y = experts(x, idx, w)
    y.backward(dy)
    accumulate = " accumulate=eager_act" if kernels == "eager" else ""
    matrices = {"dw1": experts.gate_up_proj, "dw2": experts.down_proj}
    shown = {name: gradient(p) for name, p in matrices.items()} if dtype == torch.bfloat16 else {}
    out.add("moe-gemma4", f"{SOURCE}Router, Gemma4TextExperts ({kernels})", d,
            f"moe dtype={d} dialect=hf-5.24/gemma4{accumulate}",
            {"x": x, "dy": dy, "idx": idx.to(torch.int32), "wr": router.proj.weight,
             "scale_e": router.per_expert_scale.float(), "w1": experts.gate_up_proj, "w2": experts.down_proj},
            {"y": y, "dx": x.grad, "dwr": gradient(router.proj.weight), **shown},
            unchecked=[name for name in matrices if name not in shown])


def add_all(out):
    for dtype in (torch.float32, torch.bfloat16):
        tests = Tests(out, dtype)
        tests.add_router()
        if dtype == torch.bfloat16:
            tests.add_norms()
            tests.add_sums()
            tests.add_experts()
    add_block(out, torch.float32, "grouped_mm")
    add_block(out, torch.bfloat16, "eager")
