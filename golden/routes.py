"""Tests of the families' routers, of their choice and weights, and of the balance loss."""

from unittest import mock

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.models.zaya.modeling_zaya import ZayaRouter

import draw
from parts import (COUNT_KEYS, H, LETTER, ROUTE_E, ROUTE_GROUPS, T, Family, attribute, call_gate, fill, router_weight,
                   selection_bias, token_ids)

def source(family: Family, kernels: str = "") -> str:
    return f"transformers 5.24.0 {family.block}" + (f", {kernels}" if kernels else "")


# ---- router ----


def add_router(out, family: Family, dtype: torch.dtype, exact: bool):
    block = family.build(dtype, "eager", **{family.topk: family.k})
    fill(block, family, exact)
    w = router_weight(block, family)
    name = f"{family.preset}.x"
    x = draw.whole(name, (T, H), -2, 2, dtype) if exact else draw.real(name, (T, H), dtype=dtype)
    logits = call_gate(block, family, x, family.k)[0]
    wide = torch.float32 if family.logits32 else dtype
    prompt = {"x": x, "w": w.float() if family.logits32 else w}
    if family.router_bias:
        prompt["bias"] = attribute(block, family.gate).bias.detach().to(prompt["w"].dtype)
    group = f"router-{family.name}"
    out.add(group, source(family), f"{family.preset}, {'exact' if exact else 'real'} data",
            f"router act={LETTER[dtype]} router={LETTER[prompt['w'].dtype]} logits={LETTER[wide]}", prompt,
            {"logits": logits.to(wide)}, compare="bits" if exact else "bound",
            flags=["RoundedLogits"] if dtype == torch.bfloat16 else [])


# ---- choice and weights ----


def scores_of(family: Family, logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scores that the class's formula starts from, by torch's own functions; dtype is the activation's."""
    wide, narrow = logits.float(), logits.to(dtype)
    return {"sigmoid": lambda: torch.sigmoid(wide), "sigmoid_act": lambda: torch.sigmoid(narrow),
            "sqrt_softplus": lambda: torch.nn.functional.softplus(narrow).sqrt(),
            "softmax_act": lambda: torch.softmax(wide, -1).to(dtype)
            }.get(family.score, lambda: torch.softmax(wide, -1))().float()


class Router:
    """The class's router over ROUTE_E experts with the identity as its matrix, so that its input is the logits."""

    def __init__(self, family: Family, dtype: torch.dtype, k: int):
        width = ROUTE_E + family.config.get("zero_expert_num", 0)
        more = {key: ROUTE_E for key in COUNT_KEYS if key in family.config}
        if family.groups > 1:
            more["n_group"] = ROUTE_GROUPS
        self.family, self.dtype, self.k, self.width = family, dtype, k, width
        self.block = family.build(dtype, "eager", hidden_size=width, **more, **{family.topk: k})
        fill(self.block, family, False)
        with torch.no_grad():
            router_weight(self.block, family).copy_(torch.eye(width))
            if family.router_bias:
                attribute(self.block, family.gate).bias.zero_()

    def logits_dtype(self) -> torch.dtype:
        return torch.float32 if self.family.logits32 else self.dtype

    def given(self, logits: torch.Tensor) -> dict:
        """The inputs of stage route."""
        out = {"logits": logits.to(self.logits_dtype())}
        bias = selection_bias(self.block, self.family)
        if bias is not None:
            out["bias"] = bias
        if self.family.gate_takes == "ids":
            out |= {"token": token_ids(T).to(torch.int32),
                    "table": attribute(self.block, self.family.gate).tid2eid.to(torch.int32)}
        return out

    def slots(self, weights: torch.Tensor) -> torch.Tensor:
        """By descending weight, since topk(sorted=False) leaves the order open; where the class has one, its own."""
        if self.family.score == "sparsemixer" or self.family.gate_takes == "ids":
            return torch.arange(self.k).expand(T, -1)
        return torch.sort(weights.float(), dim=-1, descending=True, stable=True).indices

    def case(self, stage: str, weight: torch.dtype = None) -> str:
        line = f"{stage} dtype={LETTER[self.dtype]} {self.family.record(ROUTE_GROUPS)}"
        return line + f" logits={LETTER[self.logits_dtype()]}" + (f" weight={LETTER[weight]}" if weight else "")


def add_route(out, family: Family, dtype: torch.dtype, k: int, kind: str):
    router = Router(family, dtype, k)
    tag = f"{family.block}.{family.preset}.route.{k}.{kind}"
    shape = (T, router.width)
    flags = ["OneSlot"] if k == 1 else []
    if kind == "ties":
        logits = draw.whole(tag, shape, -1, 1, dtype)
        flags.append("Ties")
    elif kind == "small":
        logits = draw.real(tag, shape, 1.5, dtype) - 45
        flags.append("SmallSum")
    else:
        logits = draw.real(tag, shape, 1.5, dtype)
        flags += ["MaskedGroups"] if family.groups > 1 else []
        flags += ["BiasSelects"] if family.bias else []
    x = logits.clone().requires_grad_(True)
    seen, weights, index = call_gate(router.block, family, x, k)
    order = router.slots(weights.detach())
    idx, w = index.gather(1, order).to(torch.int32), weights.detach().gather(1, order)
    group = f"route-{family.name}"
    comment = f"{family.preset}, k {k}" + {"ties": ", ties", "small": ", small scores", "real": ""}[kind]
    out.add(group, source(family), comment, router.case("route", w.dtype), router.given(logits), {"idx": idx, "w": w},
            compare="classes", flags=flags, unchecked=["scores"])
    if kind == "real" and k > 1 and (dtype == torch.float32 or not family.logits32):
        add_route_bwd(out, router, x, seen, weights, idx, order, tag)


def add_route_bwd(out, router: Router, x, seen, weights, idx, order, tag: str):
    """Gradients by torch's autograd through the class's router: that of its input is that of the logits."""
    family = router.family
    # The same numbers in both dtypes of a weight, so the stage's unrounded dw is what the class sees.
    dw = draw.real(tag + ".dw", tuple(weights.shape), dtype=torch.bfloat16)
    weights.backward(dw.to(weights.dtype))
    given = {k: v for k, v in router.given(x).items() if k in ("logits", "bias")}
    prompt = {"scores": scores_of(family, seen.detach(), router.dtype), "idx": idx, "dw": dw.float().gather(1, order),
              **given}
    group = f"route_bwd-{family.name}"
    flags = ["BiasSelects"] if family.bias else []
    out.add(group, source(family), f"{family.preset}, k {router.k}", router.case("route_bwd"), prompt,
            {"dlogits": x.grad.to(router.logits_dtype())}, flags=flags)


def add_family(out, family: Family):
    both = (torch.float32, torch.bfloat16)
    if "router" in family.stages and family.tests != "few":
        for dtype in both:
            add_router(out, family, dtype, False)
        add_router(out, family, torch.bfloat16, True)
    for dtype in both if "route" in family.stages else ():
        add_route(out, family, dtype, family.k, "real")
    if "route" not in family.stages or family.tests == "few":
        return
    if not family.fixed_k:
        add_route(out, family, torch.float32, 1, "real")
        if family.gate_takes != "ids":
            add_route(out, family, torch.float32, 2, "ties")
    if family.score.startswith("sigmoid"):
        add_route(out, family, torch.float32, family.k, "small")


class Seen:
    """Results of a torch function while the block runs, for what a class overwrites before it returns."""

    def __init__(self, name: str):
        self.name, self.function, self.results = name, getattr(torch, name), []

    def __call__(self, *args, **more):
        self.results.append(self.function(*args, **more))
        return self.results[-1]

    def watch(self):
        return mock.patch.object(torch, self.name, self)


def zaya_router(dtype: torch.dtype, layer: int, width: int) -> ZayaRouter:
    """A router of ROUTE_E experts and the class that skips, which some tokens choose."""
    config = CONFIG_MAPPING["zaya"](hidden_size=H, num_experts=ROUTE_E, router_hidden_size=width)
    torch.set_default_dtype(dtype)
    try:
        router = ZayaRouter(config, layer)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, p in router.named_parameters():
            key = f"zaya.{name}"
            vector = 1 + draw.real(key, p.shape, 0.25) if "norm" in name or "scale" in name else draw.real(key, p.shape)
            p.copy_(vector if p.ndim == 1 else draw.real(key, p.shape, 1.5 * p.shape[-1] ** -0.5))
        router.balancing_biases.copy_(draw.real("zaya.balancing_biases", (ROUTE_E + 1,), 0.03))
        router.balancing_biases[-1] += 0.06
    return router


def add_zaya(out):
    """The choice alone, of logits that the router's MLP made. The class hands on expert 0 at weight 0 where a token
    skips: its choice is read before that."""
    source_name = "transformers 5.24.0 ZayaRouter"
    for dtype in (torch.float32, torch.bfloat16):
        router, logits = zaya_router(dtype, 0, 8), []
        router.router_mlp.out_proj.register_forward_hook(lambda _module, _args, y, to=logits: to.append(y))
        top = Seen("topk")
        with top.watch():
            _, w, _, _ = router(draw.real("zaya.x", (1, T, H), dtype=dtype))
        logits[0].retain_grad()
        dw = draw.real("zaya.dw", (T, 1), dtype=dtype)
        w.backward(dw)
        idx = top.results[0].indices.reshape(T, 1)
        assert 0 < int((idx == ROUTE_E).sum()) < T and bool((w[idx == ROUTE_E] == 0).all())
        l = logits[0].detach().reshape(T, -1)
        fields = f"dtype={LETTER[dtype]} dialect=hf-5.24/zaya logits={LETTER[dtype]}"
        idx32 = idx.to(torch.int32)
        out.add("route-zaya", source_name, "some tokens skip", f"route {fields} weight={LETTER[dtype]}",
                {"logits": l, "bias": router.balancing_biases}, {"idx": idx32, "w": w}, compare="classes",
                flags=["BiasSelects"], unchecked=["scores"])
        out.add("route_bwd-zaya", source_name, "some tokens skip", f"route_bwd {fields}",
                {"scores": torch.softmax(l, -1).float(), "idx": idx32, "dw": dw.float(), "logits": l},
                {"dlogits": logits[0].grad.reshape(T, -1)}, flags=["BiasSelects"])


class Recurrent:
    """Two routers of zaya, the second reading the state of the first; every tensor on the way keeps its gradient."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.seen, self.x, self.state, state = dtype, [], [], [], None
        self.router = [zaya_router(dtype, layer, R) for layer in (0, 1)]
        loss = 0
        for layer, router in enumerate(self.router):
            seen = {}
            self.watch(router, seen)
            x = draw.real(f"zaya.{layer}.x", (1, T, H), dtype=dtype).requires_grad_(True)
            _, w, _, state = router(x, state)
            state.retain_grad()
            self.seen.append(seen)
            self.x.append(x)
            self.state.append(state)
            loss = loss + (draw.real(f"zaya.{layer}.dw", (T, 1), dtype=dtype) * w).float().sum()
            if layer == 0:  # what comes back to the first state through its own logits alone
                self.alone, = torch.autograd.grad(loss, seen["state"], retain_graph=True)
                for t in seen.values():  # torch keeps gradients of this call, too
                    t.grad = None
        loss.backward()

    @staticmethod
    def watch(router: ZayaRouter, seen: dict):
        def keep(name, t):
            t.retain_grad()
            seen[name] = t

        mlp = router.router_mlp
        router.down_proj.register_forward_hook(lambda _module, _args, y: keep("down", y))
        mlp.register_forward_pre_hook(lambda _module, args: keep("state", args[0]))
        mlp.act_fn.register_forward_hook(lambda _module, _args, y: keep("act2" if "act1" in seen else "act1", y))
        for name in ("norm", "fc1", "fc2", "out_proj"):
            getattr(mlp, name).register_forward_hook(lambda _module, _args, y, as_=name: keep(as_, y))

    def value(self, layer: int, name: str) -> torch.Tensor:
        t = self.x[layer] if name == "x" else self.seen[layer][name]
        return t.detach().reshape(T, -1)

    def grad(self, layer: int, name: str) -> torch.Tensor:
        t = self.x[layer] if name == "x" else self.seen[layer][name]
        return t.grad.reshape(T, -1)


R = 6  # width of zaya's router in these tests
ZAYA = "transformers 5.24.0 ZayaRouter"


def add_zaya_map(out, run: Recurrent, layer: int, name: str, module: torch.nn.Linear, source: str):
    """A linear map of the router, from the tensor called source to that called name."""
    d = LETTER[run.dtype]
    comment, group = f"layer {layer}, {name}, {d}", "router-zaya"
    given = {"x": run.value(layer, source), "w": module.weight}
    if module.bias is not None:
        given["bias"] = module.bias
    out.add(group, ZAYA, comment, f"router act={d} router={d} logits={d}", given, {"logits": run.value(layer, name)})
    dy, span = run.grad(layer, name), torch.tensor([0, T])
    out.add(group, ZAYA, comment, f"router_bwd act={d} router={d} logits={d}", {"dlogits": dy, "w": module.weight},
            {"dx": run.grad(layer, source)})
    line = f"wgrad act={d} param={d} grad={d}"
    out.add(group, ZAYA, comment, line, {"dy": dy, "x": run.value(layer, source), "offsets": span},
            {"dw": module.weight.grad[None, None]})
    if module.bias is not None:
        ones = torch.ones(T, 1, dtype=run.dtype)
        out.add(group, ZAYA, comment + " bias", line, {"dy": dy, "x": ones, "offsets": span},
                {"dw": module.bias.grad[None, None, :, None]})


def add_zaya_gelu(out, run: Recurrent, source: str, name: str):
    d = LETTER[run.dtype]
    out.add("gelu-zaya", ZAYA, f"{name}, {d}", f"gelu dtype={d}", {"x": run.value(1, source)},
            {"y": run.value(1, name)})
    out.add("gelu-zaya", ZAYA, f"{name}, {d}, gradient", f"gelu_bwd dtype={d}",
            {"dy": run.grad(1, name), "x": run.value(1, source)}, {"dx": run.grad(1, source)})


def add_zaya_norm(out, run: Recurrent):
    """The second layer's: no layer behind it gives its state a gradient."""
    d, x, norm = LETTER[run.dtype], run.value(1, "state"), run.router[1].router_mlp.norm
    eps = norm.variance_epsilon
    out.add("rmsnorm-zaya", ZAYA, d, f"rmsnorm dtype={d} param={d} eps={eps:g}", {"x": x, "w": norm.weight},
            {"y": run.value(1, "norm")}, unchecked=["rstd"])
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    out.add("rmsnorm-zaya", ZAYA, d + ", gradients", f"rmsnorm_bwd dtype={d} param={d} grad={d}",
            {"dy": run.grad(1, "norm"), "x": x, "w": norm.weight, "rstd": rstd},
            {"dx": run.grad(1, "state"), "dw": norm.weight.grad[None]})


def add_zaya_state(out, run: Recurrent):
    d, scale, before = LETTER[run.dtype], run.router[1].router_states_scale, run.state[0].detach().reshape(T, R)
    back = run.state[0].grad.reshape(T, R)
    out.add("carry-zaya", ZAYA, d, f"carry dtype={d} param={d}", {"a": run.value(1, "down"), "b": before, "scale": scale},
            {"y": run.value(1, "state")}, compare="bits", flags=["RoundingPoints"])
    given = {"dy": run.grad(1, "state"), "b": before, "scale": scale}
    line = f"carry_bwd dtype={d} param={d} grad={d}"
    out.add("carry-zaya", ZAYA, d + ", gradient of the state before", line, given, {"db": back}, compare="bits",
            unchecked=["dscale"], flags=["RoundingPoints"])
    out.add("carry-zaya", ZAYA, d + ", gradient of the factors", line, given, {"dscale": scale.grad[None]},
            unchecked=["db"])
    out.add("carry-zaya", ZAYA, d + ", gradients of the first layer's state", f"residual dtype={d}",
            {"a": run.alone.reshape(T, R), "b": back}, {"y": run.grad(0, "state")}, compare="bits")


def add_zaya_routers(out):
    """Stage by stage, from what the class itself made: all of the second layer, of the first what is not alike."""
    for dtype in (torch.float32, torch.bfloat16):
        run = Recurrent(dtype)
        mlp = run.router[1].router_mlp
        for layer in (0, 1):
            add_zaya_map(out, run, layer, "down", run.router[layer].down_proj, "x")
        add_zaya_state(out, run)
        add_zaya_norm(out, run)
        for name, module, source in (("fc1", mlp.fc1, "norm"), ("fc2", mlp.fc2, "act1"),
                                     ("out_proj", mlp.out_proj, "act2")):
            add_zaya_map(out, run, 1, name, module, source)
        add_zaya_gelu(out, run, "fc1", "act1")
        add_zaya_gelu(out, run, "fc2", "act2")


# ---- balance loss ----


def add_balance(out):
    """transformers' pooled loss over two layers, with and without padding; the z-loss is ST-MoE's, by torch."""
    layers, experts, k, aux, z = 2, 6, 2, 0.25, 0.125
    for valid in (torch.ones(T), torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 1, 1])):
        logits = draw.real(f"balance.{int(valid.sum())}", (layers, T, experts), 1.5).requires_grad_(True)
        mask = None if valid.all() else valid[None]
        loss = load_balancing_loss_func(tuple(logits), experts, k, mask)
        n = int(valid.sum()) * layers
        z_loss = (torch.logsumexp(logits, -1).square() * valid).sum() / n
        idx = torch.topk(logits.detach(), k, dim=-1).indices
        chosen = torch.nn.functional.one_hot(idx, experts).sum(2) * valid.to(torch.int64)[:, None]
        given = {"logits": logits, "valid": valid.to(torch.uint8)}
        comment = f"{int(valid.sum())} of {T} tokens count"
        name = "transformers 5.24.0 load_balancing_loss_func"
        count = torch.tensor([n])
        out.add("balance", name, comment, "balance dtype=f32", {**given, "idx": idx.to(torch.int32)},
                {"loss": torch.stack([loss, z_loss]), "count": count}, unchecked=["freq", "prob"])
        (aux * loss + z * z_loss).backward()
        freq = chosen.sum((0, 1)).float() / n
        out.add("balance", name, comment, f"balance_bwd dtype=f32 aux_coef={aux} z_coef={z}",
                {**given, "freq": freq, "count": count}, {"daux": logits.grad})
