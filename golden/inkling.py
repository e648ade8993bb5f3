"""Tests of transformers' Inkling: a router with rows for shared experts, whose weights multiply their hidden rows."""

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.inkling.modeling_inkling import InklingMoE, InklingSharedExperts, InklingTopkRouter

import draw
from parts import E, F, H, LETTER, T

SOURCE = "transformers 5.24.0 "
ROUTE_E, K, SCALE = 11, 3, 8.0
NOT_READ = 64.0  # as the selection bias of a shared expert: it would be chosen


def config_of(shared: int, experts: int = E, hidden: int = H, k: int = K):
    return CONFIG_MAPPING["inkling_text"](
        hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=F, n_routed_experts=experts, num_experts_per_tok=k, n_shared_experts=shared,
        route_scale=SCALE, hidden_act="silu")


def built(make, config, dtype: torch.dtype, kernels: str = "eager"):
    config._experts_implementation = kernels
    torch.set_default_dtype(dtype)
    try:
        return make(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def value_of(name: str, key: str, shape, exact: bool) -> torch.Tensor:
    """As in parts.py: exact rows of a second matrix have two entries, logits more bits than bf16 has."""
    if name.endswith("global_scale"):
        return torch.full(shape, 1.25)
    if name.endswith("bias"):
        value = draw.real(key, shape, 0.25) - 0.25
        return (value * 8).round() / 8 if exact else value
    if not exact:
        return draw.real(key, shape, shape[-1] ** -0.5)
    if "gate.weight" in name:
        return draw.whole(key, shape, -96, 96) / 64
    return draw.sparse(key, shape, 2) if "down" in name else draw.whole(key, shape, -1, 1)


def fill(module, tag: str, exact: bool):
    for name, p in list(module.named_parameters()) + list(module.named_buffers()):
        with torch.no_grad():
            p.copy_(value_of(name, f"inkling.{tag}.{exact}.{name}", p.shape, exact).to(p.dtype))


# ---- choice and weights ----


def add_route(out, shared: int, dtype: torch.dtype, k: int, kind: str):
    """The identity is the router's matrix, so that its input is the logits."""
    width = ROUTE_E + shared
    gate = built(InklingTopkRouter, config_of(shared, ROUTE_E, width, k), dtype)
    fill(gate, "route", False)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(width))
    tag = f"inkling.route.{shared}.{k}.{kind}"
    if kind == "ties":
        logits = draw.whole(tag, (T, width), -1, 1, dtype)
        with torch.no_grad():
            gate.e_score_correction_bias.zero_()
    else:
        logits = draw.real(tag, (T, width), 1.5, dtype) - {"real": 0, "small": 45, "none": 3000}[kind]
    flags = {"ties": ["Ties"], "small": ["SmallSum"], "none": ["SmallSum"], "real": ["BiasSelects"]}[kind]
    x = logits.clone().requires_grad_(True)
    _, weights, index, gamma = gate(x)
    order = torch.sort(weights.detach().float(), dim=-1, descending=True, stable=True).indices
    idx, w = index.gather(1, order).to(torch.int32), weights.detach().gather(1, order)
    bias = torch.cat([gate.e_score_correction_bias, torch.full((shared,), NOT_READ)])
    given = {"logits": logits.float(), "bias": bias, "scale_e": gate.global_scale}
    words = {"ties": ", ties", "small": ", small scores", "none": ", scores that are 0 in f32", "real": ""}[kind]
    comment = f"{shared} shared, k {k}{words}"
    fields = f"dtype={LETTER[dtype]} dialect=hf-5.24/inkling shared_rows={shared} logits=f32"
    name = SOURCE + "InklingTopkRouter"
    out.add("route-inkling", name, comment, f"route {fields}", given,
            {"idx": idx, "w": w, "gamma": gamma}, compare="classes", flags=flags, unchecked=["scores"])
    if kind in ("real", "none") and k > 1:
        add_route_bwd(out, gate, x, (weights, gamma), idx, order, (name, comment, fields, flags, tag))


def add_route_bwd(out, gate, x, weights, idx, order, words):
    """Gradients by autograd: of the router's input, which is the logits, and of the factor of all weights."""
    name, comment, fields, flags, tag = words
    # The same numbers in both dtypes of a weight, so the stage's unrounded dw is what the class sees.
    dw, dgamma = (draw.real(f"{tag}.d{i}", tuple(v.shape), dtype=torch.bfloat16) for i, v in enumerate(weights))
    torch.autograd.backward(weights, [dw.to(weights[0].dtype), dgamma.to(weights[1].dtype)])
    logits = x.detach().float()
    prompt = {"scores": torch.sigmoid(logits), "idx": idx, "dw": dw.float().gather(1, order),
              "dgamma": dgamma.float(), "logits": logits}
    if x.dtype == torch.float32:
        out.add("route_bwd-inkling", name, comment, f"route_bwd {fields}",
                {**prompt, "scale_e": gate.global_scale}, {"dlogits": x.grad}, flags=flags)
    out.add("route_scale_bwd-inkling", name, comment, f"route_scale_bwd {fields} grad=f32", prompt,
            {"dscale": gate.global_scale.grad[None]}, flags=flags)


# ---- shared experts ----


def rows(t: torch.Tensor) -> torch.Tensor:
    """The first matrices of the shared experts, one under the other."""
    return t.detach().reshape(-1, H)


def columns(t: torch.Tensor) -> torch.Tensor:
    """The second ones, one beside the other."""
    return t.detach().permute(1, 0, 2).reshape(H, -1)


def add_shared(out, shared: int, dtype: torch.dtype, exact: bool):
    mlp = built(InklingSharedExperts, config_of(shared), dtype)
    fill(mlp, "shared", exact)
    tag = f"inkling.shared.{shared}"
    x = (draw.whole(tag, (T, H), -1, 1, dtype) if exact else draw.real(tag, (T, H), dtype=dtype)).requires_grad_(True)
    gamma = (4 * draw.real(tag + ".gamma", (T, shared))).to(dtype).requires_grad_(True)
    y = mlp(x, gamma)
    w1, w2 = torch.cat([rows(mlp.gate_proj), rows(mlp.up_proj)]), columns(mlp.down_proj)
    kind, name = "exact" if exact else "real", SOURCE + "InklingSharedExperts"
    words = f"dtype={LETTER[dtype]} dialect=hf-5.24/inkling shared_rows={shared} param={LETTER[dtype]}"
    out.add("shared-inkling", name, f"{shared} of them, {kind} data", f"shared {words}",
            {"x": x, "w1": w1, "w2": w2, "gamma": gamma}, {"mlp": y, "y": y}, compare="bits" if exact else "bound",
            unchecked=["pre", "act"], flags=["RoundingPoints"] if exact else [])
    if exact:
        return
    dy = draw.real(tag + ".dy", (T, H), dtype=dtype)
    y.backward(dy)
    pre = torch.nn.functional.linear(x.detach(), w1)
    out.add("shared_bwd-inkling", name, f"{shared} of them, gradients", f"shared_bwd {words}",
            {"dy": dy, "pre": pre, "w1": w1, "w2": w2, "gamma": gamma},
            {"dmlp": dy, "dx": x.grad, "dgamma": gamma.grad.float()}, unchecked=["dpre"])


# ---- the whole block ----


def operands(block, of=lambda p: p.detach()) -> dict:
    shared = block.shared_experts
    return {"wr": of(block.gate.weight), "w1": of(block.experts.gate_up_proj), "w2": of(block.experts.down_proj),
            "sw1": torch.cat([rows(of(shared.gate_proj)), rows(of(shared.up_proj))]),
            "sw2": columns(of(shared.down_proj))}


def make_hard(block, x: torch.Tensor, dy: torch.Tensor, how: str):
    """Errors that little else is as large as; routed experts are too small to hide them. far: logits near -3000, whose
    weights are off by what such a logit is. cancels: W2^T dy, and so the weights' gradients, are small differences."""
    with torch.no_grad():
        block.experts.down_proj.mul_(2.0 ** -12)
        if how == "far":
            x[:, 0] = 1
            block.gate.weight[:, 0] -= 3000
        else:
            down = block.shared_experts.down_proj
            down[:, 1::2] = down[:, 0::2] * -(1 + 2.0 ** -14)
            dy[:, 1::2] = dy[:, 0::2]


def add_block(out, shared: int, dtype: torch.dtype, exact: bool, kernels: str, how: str = ""):
    block = built(InklingMoE, config_of(shared), dtype, kernels)
    fill(block, f"block.{shared}", exact)
    tag = f"inkling.block.{shared}"
    x = draw.whole(tag, (T, H), -1, 1, dtype) if exact else draw.real(tag, (T, H), dtype=dtype)
    dy = draw.real(tag + ".dy", (T, H), dtype=dtype)
    if how:
        make_hard(block, x, dy, how)
    x.requires_grad_(True)
    y = block(x[None])[0]
    expected = {"y": y}
    if not exact:
        y.backward(dy)
        expected |= {"dx": x.grad, **{"d" + k: v for k, v in operands(block, lambda p: p.grad).items()}}
    with torch.no_grad():
        idx = block.gate(x)[2].to(torch.int32)
    prompt = {**operands(block), "x": x, "dy": dy, "idx": idx, "scale_e": block.gate.global_scale}
    line = f"moe dtype={LETTER[dtype]} dialect=hf-5.24/inkling shared_rows={shared}"
    line += " accumulate=eager_act" if kernels == "eager" else ""
    flags = (["RoundingPoints"] if exact else []) + (["EagerSum"] if exact and kernels == "eager" else [])
    unchecked = [d for d in ("dx", "dwr", "dw1", "dw2", "dsw1", "dsw2") if d not in expected]
    kind = {"far": "logits near -3000", "cancels": "gradients of weights that cancel"}.get(how, "real data")
    kind = "exact data" if exact else kind
    out.add("moe-inkling", f"{SOURCE}InklingMoE, {kernels}", f"{shared} shared, {kind}", line, prompt, expected,
            compare="bits" if exact else "bound", unchecked=unchecked, flags=flags)


def add_all(out):
    both = (torch.float32, torch.bfloat16)
    for shared in (1, 2):
        for dtype in both:
            add_route(out, shared, dtype, K, "real")
        for kind in ("small", "none"):
            add_route(out, shared, torch.float32, K, kind)
        add_shared(out, shared, torch.float32, False)
        add_shared(out, shared, torch.bfloat16, True)
        for kernels in ("eager", "grouped_mm"):
            add_block(out, shared, torch.bfloat16, True, kernels)
    add_block(out, 2, torch.float32, False, "grouped_mm")
    add_route(out, 2, torch.float32, 1, "real")
    add_route(out, 2, torch.float32, 2, "ties")
    add_block(out, 2, torch.bfloat16, False, "grouped_mm")
    add_block(out, 2, torch.float32, False, "grouped_mm", "far")
    add_block(out, 2, torch.float32, False, "grouped_mm", "cancels")
