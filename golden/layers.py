"""Tests of the families' routers, experts and whole blocks."""

import torch

import draw
from families import E, F, H, attribute, expert_weights, router_weight, with_k

T = 9
LETTER = {torch.float32: "f32", torch.bfloat16: "bf16"}


def source(family, kernels=None):
    text = f"transformers 5.24.0 {family.block}"
    return text + (f", {kernels}" if kernels else "")


def fill(block, family, exact):
    """Every parameter and buffer of the block gets values of its own name."""
    tag = f"{family.preset}.{exact}"
    for name, p in list(block.named_parameters()) + list(block.named_buffers()):
        key = f"{tag}.{name}"
        bias = "bias" in name
        if not p.dtype.is_floating_point:
            continue
        if exact and not bias:
            value = draw.sparse(key, p.shape, 2) if "down" in name else draw.whole(key, p.shape, -1, 1)
            if family.transpose and "down" in name and p.dim() == 3:
                value = draw.sparse(key, (p.shape[0], p.shape[2], p.shape[1]), 2).transpose(1, 2)
            if name.startswith(family.gate):
                value = draw.whole(key, p.shape, -2, 2)
        elif bias:
            # Selection biases are mostly negative, so that a mask of 0 differs from one of -inf.
            value = draw.real(key, p.shape, 0.5) - (0.4 if family.bias and name.endswith(family.bias) else 0.0)
            if exact:
                value = (value * 4).round() / 4
        else:
            value = draw.real(key, p.shape, 1.0 / p.shape[-1] ** 0.5)
        with torch.no_grad():
            p.copy_(value.to(p.dtype))


def gate_arguments(block, family):
    if family.gate_extra == "bias":
        return (attribute(block, family.bias),)
    return ()


def call_gate(block, family, x):
    """logits, weights [T,K], indices [T,K] of the class's own router."""
    given = x[None] if family.name in ("afmoe",) else x
    out = attribute(block, family.gate)(given, *gate_arguments(block, family))
    rows = x.shape[0]
    return tuple(t.reshape(rows, -1) for t in out[:3])


def selection_bias(block, family):
    return attribute(block, family.bias).detach().reshape(-1) if family.bias else None


def case_of(stage, family, dtype, *, dtypes="", accumulate=None):
    line = f"{stage} dtype={LETTER[dtype]} dialect={family.preset}"
    line += f" {family.fields}" if family.fields else ""
    line += f" accumulate={accumulate}" if accumulate else ""
    return line + (f" {dtypes}" if dtypes else "")


def slot_order(family, weights):
    """Slots by descending weight, since topk(sorted=False) leaves the order open; a sparsemixer's slots are in order."""
    if family.scores == "sparsemixer":
        return torch.arange(weights.shape[1]).expand(weights.shape[0], -1)
    return torch.sort(weights.float(), dim=-1, descending=True, stable=True).indices


# ---- routers ----


def add_router(out, family, dtype, exact):
    block, _ = family.build(dtype, "eager", **with_k(family, family.k))
    fill(block, family, exact)
    w = router_weight(block, family)
    x = draw.whole(f"{family.preset}.x", (T, H), -2, 2, dtype) if exact else draw.real(f"{family.preset}.x", (T, H),
                                                                                      dtype=dtype)
    logits = call_gate(block, family, x)[0]
    prompt = {"x": x, "w": w.float() if family.logits32 else w}
    if family.router_bias:
        prompt["bias"] = attribute(block, family.gate).bias
    wide = "f32" if family.logits32 else LETTER[dtype]
    line = f"router act={LETTER[dtype]} router={LETTER[prompt['w'].dtype]} logits={wide}"
    out.add(f"router-{family.name}", source(family), f"{family.preset}, {'exact' if exact else 'real'} data", line, prompt,
            {"logits": logits.to(torch.float32 if family.logits32 else dtype)}, compare="bits" if exact else "bound")


def scores_of(family, logits):
    """The scores that the class's formula starts from, by torch's own functions."""
    wide = logits.float()
    if family.scores == "sigmoid":
        return torch.sigmoid(logits if family.name == "lfm2_moe" else wide).float()
    if family.scores == "sqrt_softplus":
        return torch.nn.functional.softplus(logits).sqrt().float()
    return torch.softmax(wide, dim=-1)


def identity_router(family, dtype, k):
    """The block with as wide an input as it has logits, and the identity as its router's matrix: input = logits."""
    extra = 2 if family.name == "longcat_flash" else 0
    block, _ = family.build(dtype, "eager", hidden_size=E + extra, **with_k(family, k))
    fill(block, family, False)
    w = router_weight(block, family)
    with torch.no_grad():
        w.copy_(torch.eye(E + extra))
        if family.router_bias:
            attribute(block, family.gate).bias.zero_()
    return block, E + extra


def add_route(out, family, dtype, k, ties):
    block, width = identity_router(family, dtype, k)
    tag = f"{family.preset}.route.{k}.{ties}"
    logits = draw.whole(tag, (T, width), -1, 1, dtype) if ties else draw.real(tag, (T, width), 1.5, dtype)
    x = logits.clone().requires_grad_(True)
    seen, weights, index = call_gate(block, family, x)
    wide = torch.float32 if family.logits32 else dtype
    prompt = {"logits": logits.to(wide)}
    bias = selection_bias(block, family)
    if bias is not None:
        prompt["bias"] = bias
    order = slot_order(family, weights.detach())
    w, idx = weights.detach().gather(1, order), index.gather(1, order)
    dtypes = f"logits={LETTER[wide]} weight={LETTER[w.dtype]}"
    flags = ["Ties"] if ties else []
    group = f"route-{family.name}"
    if ties:
        out.note(group, "Ties", "KNOWN_ORDER", "equal scores at the border of the choice: any of them is right",
                 "another tie rule is no error; compared as classes")
    out.add(group, source(family), f"{family.preset}, k {k}{', ties' if ties else ''}",
            case_of("route", family, dtype, dtypes=dtypes), prompt, {"idx": idx.to(torch.int32), "w": w},
            compare="classes", flags=flags, unchecked=["scores"])
    if ties or k == 1 or dtype != torch.float32:
        return
    dw = draw.real(tag + ".dw", tuple(weights.shape))
    (weights.float() * dw).sum().backward()
    back = {"scores": scores_of(family, seen.detach().reshape(T, -1)), "idx": idx.to(torch.int32),
            "dw": dw.gather(1, order), "logits": logits.to(wide)}
    if bias is not None:
        back["bias"] = bias
    out.add(f"route_bwd-{family.name}", source(family), f"{family.preset}, k {k}",
            case_of("route_bwd", family, dtype, dtypes=f"logits={LETTER[wide]}"), back, {"dlogits": x.grad.to(wide)})


# ---- experts ----


def stored(family, w):
    return w.transpose(1, 2) if family.transpose else w


def add_expert(out, family, dtype, exact):
    """Each row goes to one expert with weight 1, so the class returns the expert's own output."""
    block, _ = family.build(dtype, "eager", **with_k(family, family.k))
    fill(block, family, exact)
    w1, w2 = expert_weights(block, family)
    index = torch.tensor([[0], [0], [0], [2], [2], [3], [5], [5], [5]])
    x = draw.whole(f"{family.preset}.ex", (T, H), -1, 1, dtype) if exact else draw.real(f"{family.preset}.ex", (T, H),
                                                                                       dtype=dtype)
    x.requires_grad_(True)
    experts = attribute(block, family.experts)
    y = experts(x, index, torch.ones(T, 1, dtype=dtype))
    counts = torch.bincount(index.reshape(-1), minlength=E)
    prompt = {"x": x, "w1": stored(family, w1)[:E], "w2": stored(family, w2)[:E],
              "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])}
    if family.expert_biases:
        prompt["b1"] = experts.gate_up_proj_bias
        prompt["b2"] = experts.down_proj_bias
    line = case_of("expert", family, dtype, dtypes=f"param={LETTER[dtype]}")
    out.add(f"expert-{family.name}", source(family), f"{family.preset}, {'exact' if exact else 'real'} data", line, prompt,
            {"y": y}, compare="bits" if exact else "bound", unchecked=["pre", "act"])


# ---- whole blocks ----


def shared_operands(block, family):
    if not family.shared:
        return {}, {}
    mlp = attribute(block, family.shared)
    if hasattr(mlp, "gate_up_proj"):
        parts = {"sw1": [mlp.gate_up_proj.weight], "sw2": [mlp.down_proj.weight]}
    elif family.gated:
        parts = {"sw1": [mlp.gate_proj.weight, mlp.up_proj.weight], "sw2": [mlp.down_proj.weight]}
    else:
        parts = {"sw1": [mlp.up_proj.weight], "sw2": [mlp.down_proj.weight]}
    if family.shared_gate:
        parts["sgate"] = [attribute(block, family.shared_gate).weight]
    return {k: torch.cat([p.detach() for p in v]) for k, v in parts.items()}, parts


def block_operands(block, family):
    """Inputs by operand name, and the parameters that gradients are read from."""
    w1, w2 = expert_weights(block, family)
    experts = attribute(block, family.experts)
    shared, shared_parts = shared_operands(block, family)
    prompt = {"wr": router_weight(block, family).detach(), "w1": stored(family, w1.detach())[:E],
              "w2": stored(family, w2.detach())[:E], **shared}
    if family.router_bias:
        prompt["rbias"] = attribute(block, family.gate).bias.detach()
    if family.expert_biases:
        prompt["b1"] = experts.gate_up_proj_bias.detach()
        prompt["b2"] = experts.down_proj_bias.detach()
    return prompt, shared_parts


def gradient(p):
    return torch.zeros_like(p) if p.grad is None else p.grad


def block_gradients(block, family, shared_parts):
    w1, w2 = expert_weights(block, family)
    experts = attribute(block, family.experts)
    out = {"dwr": gradient(router_weight(block, family)), "dw1": stored(family, gradient(w1))[:E],
           "dw2": stored(family, gradient(w2))[:E]}
    for name, parts in shared_parts.items():
        out["d" + name] = torch.cat([gradient(p) for p in parts])
    if family.router_bias:
        out["drbias"] = gradient(attribute(block, family.gate).bias)
    if family.expert_biases:
        out["db1"] = gradient(experts.gate_up_proj_bias)
        out["db2"] = gradient(experts.down_proj_bias)
    return out


def chosen(block, family, x):
    if family.name == "llama4":
        logits = attribute(block, family.gate)(x)[1]
        return torch.topk(logits, family.k, dim=1).indices
    return call_gate(block, family, x)[2]


ALL_GRADIENTS = ("dx", "dwr", "dw1", "dw2", "dsw1", "dsw2", "dsgate", "drbias", "db1", "db2")


def add_block(out, family, dtype, exact, kernels, k):
    block, _ = family.build(dtype, kernels, **with_k(family, k))
    fill(block, family, exact)
    tag = f"{family.preset}.block.{k}"
    x = draw.whole(tag, (T, H), -1, 1, dtype) if exact else draw.real(tag, (T, H), dtype=dtype)
    x.requires_grad_(True)
    y = block(x[None])
    y = (y[0] if isinstance(y, tuple) else y).reshape(T, H)
    prompt, shared_parts = block_operands(block, family)
    dy = draw.real(tag + ".dy", (T, H), dtype=dtype)
    prompt.update(x=x, dy=dy, idx=chosen(block, family, x.detach()).to(torch.int32))
    bias = selection_bias(block, family)
    if bias is not None and "groups" in family.preset:  # masked weights depend on it
        prompt["bias"] = bias
    accumulate = {"eager": "eager_f32" if family.name == "nemotron_h" else "eager_act", "grouped_mm": None}[kernels]
    line = case_of("moe", family, dtype, accumulate=accumulate)
    expected = {"y": y}
    unchecked = list(ALL_GRADIENTS)
    if not exact:
        y.backward(dy)
        expected.update(dx=x.grad, **block_gradients(block, family, shared_parts))
        unchecked = [g for g in ALL_GRADIENTS if g not in expected]
    out.add(f"moe-{family.name}", source(family, kernels), f"{family.preset}, {'exact' if exact else 'real'} data, k {k}",
            line, prompt, expected, compare="bits" if exact else "bound", unchecked=unchecked)


def add_family(out, family):
    alone = family.route and family.name != "longcat_flash"  # its experts raise with one slot a token
    for dtype in (torch.float32, torch.bfloat16):
        if family.route:
            add_router(out, family, dtype, False)
            if dtype == torch.bfloat16:
                add_router(out, family, dtype, True)
            add_route(out, family, dtype, family.k, False)
        if alone:
            add_expert(out, family, dtype, False)
    if family.route and family.name != "phimoe":
        add_route(out, family, torch.float32, 1, False)
        add_route(out, family, torch.float32, 2, True)
    if alone:
        add_expert(out, family, torch.bfloat16, True)
    kernels = ["eager"] if family.name == "llama4" else ["eager", "grouped_mm"]
    for name in kernels:
        add_block(out, family, torch.bfloat16, True, name, family.k)
    add_block(out, family, torch.float32, False, kernels[-1], family.k)


def add_invalid(out):
    """Prompts that must be refused, by the name of what is wrong."""
    group = "invalid"
    out.note(group, "TopkAboveExperts", "MISSING_CHECK", "k is larger than the number of experts",
             "reads past the scores", ["https://github.com/NVIDIA/Megatron-LM/pull/2214"])
    out.note(group, "GroupsDoNotDivide", "MISSING_CHECK", "n_group does not divide the experts")
    out.note(group, "MissingBias", "MISSING_CHECK", "the dialect chooses with a bias and there is none")
    out.note(group, "BadId", "MISSING_CHECK", "a chosen expert that does not exist", "rows of another expert",
             ["https://github.com/huggingface/transformers/issues/45621"])
    logits = draw.real("invalid", (3, 6))
    ours = "expar: refused by definition"
    out.add(group, ours, "7 slots, 6 experts", "route_bwd dtype=f32 dialect=hf-5.24/mixtral",
            {"scores": torch.softmax(logits, -1), "idx": torch.zeros(3, 7, dtype=torch.int32),
             "dw": torch.zeros(3, 7)}, flags=["TopkAboveExperts"], result="invalid", refusal="K must be in 1..E")
    out.add(group, ours, "4 groups of 6 experts", "route dtype=f32 dialect=hf-5.24/deepseek_v3 n_group=4 K=2",
            {"logits": logits, "bias": torch.zeros(6)}, flags=["GroupsDoNotDivide"], result="invalid", refusal="n_group")
    out.add(group, ours, "no selection bias", "route dtype=f32 dialect=hf-5.24/minimax_m2 K=2", {"logits": logits},
            flags=["MissingBias"], result="invalid", refusal="bias is absent")
    out.add(group, ours, "expert 6 of 6", "route_bwd dtype=f32 dialect=hf-5.24/mixtral",
            {"scores": torch.softmax(logits, -1), "idx": torch.full((3, 2), 6, dtype=torch.int32),
             "dw": torch.zeros(3, 2)}, flags=["BadId"], result="invalid", refusal="idx element 0 is 6")
