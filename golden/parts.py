"""A MoE block of the installed transformers as expar sees it: where the class keeps its router, experts and shared
expert, and how its parameters map to operands.

Every block is the library's own class, built from its own configuration class; only sizes and seeded values are ours.
"""

import dataclasses
import importlib

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import draw

E, H, F, T = 6, 16, 8, 9
ROUTE_E, ROUTE_GROUPS = 12, 4  # of the route tests, whose data are small
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LETTER = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True)
class Family:
    name: str  # transformers.models.<name>
    block: str  # the class of the whole block
    preset: str  # expar's record of it
    config: dict
    config_name: str = ""  # of the configuration class; "": name
    topk: str = "num_experts_per_tok"  # the configuration's name for k
    k: int = 3
    fields: str = ""  # of the record, where the configuration departs from the preset
    block_args: tuple = ()
    score: str = "softmax"
    gate: str = "gate"  # paths inside the block
    bias: str = ""  # the selection bias
    shared: str = ""
    shared_gate: str = ""
    gate_takes: str = ""  # what the router's forward wants besides x: "bias" or "ids"
    router_bias: bool = False
    expert_biases: bool = False
    in_out: bool = False  # the experts' matrices are stored [in, out]
    gated: bool = True
    logits32: bool = False  # logits are f32 whatever the activation dtype
    fixed_k: bool = False
    tests: str = "all"  # "f32": block gradients in f32 only; "few": a class that computes as another one
    kernels: tuple = ("eager", "grouped_mm")
    eager_sum: str = "eager_act"  # the record's accumulate under "eager"; "": the preset's
    grouped_sum: str = ""  # and under "grouped_mm", where it is not the preset's
    own_expert: bool = False  # its experts alone are tested, too
    stages: tuple = ("router", "route", "moe")  # that the class lets us see
    # The activation is not within half a last place in f32 (1 + tanh cancels): no data make bf16 bits certain.
    loses_bits: bool = False
    nested: str = ""  # the configuration's object that holds the fields
    redraw: str = ""  # other data than the preset's, where the last bit of an f32 weight decides a bf16 rounding

    @property
    def groups(self) -> int:
        return self.config.get("n_group", 1)

    def record(self, groups: int = 0) -> str:
        """The case's dialect and the fields that differ from the preset."""
        words = [f"dialect={self.preset}"]
        if self.groups > 1:
            words += [f"n_group={groups or self.groups}", f"topk_group={self.config['topk_group']}"]
        return " ".join(words + ([self.fields] if self.fields else []))

    def build(self, dtype: torch.dtype, kernels: str, **more):
        """The block in eval mode, built in dtype: what the class itself keeps in f32 stays so."""
        fields = {**self.config, **more}
        if self.nested:
            fields = {self.nested: fields, "d_model": fields["hidden_size"]}
        config = CONFIG_MAPPING[self.config_name or self.name](**fields)
        config._experts_implementation = kernels
        module = importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}")
        torch.set_default_dtype(dtype)
        try:
            return getattr(module, self.block)(config, *self.block_args).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def attribute(obj, path: str):
    for part in path.split("."):
        obj = getattr(obj, part)
    return obj


# ---- values ----


def is_down(name: str) -> bool:
    return "down" in name or "output_linear" in name or name.endswith("mlp.w2")


def exact_value(family: Family, name: str, key: str, shape) -> torch.Tensor:
    """Small integers; rows of the second matrix have two entries, so that every dot product is exact.

    The router's are multiples of 1/64, so that logits have more bits than bf16 does."""
    if name.startswith(family.gate + "."):
        return draw.whole(key, shape, -96, 96) / 64
    if not is_down(name):
        return draw.whole(key, shape, -1, 1)
    if family.in_out and len(shape) == 3:
        return draw.sparse(key, (shape[0], shape[2], shape[1]), 2).transpose(1, 2)
    return draw.sparse(key, shape, 2)


def value_of(family: Family, name: str, shape, exact: bool) -> torch.Tensor:
    key = f"{family.block}.{family.preset}.{exact}.{name}"
    if "bias" not in name:
        return exact_value(family, name, key, shape) if exact else draw.real(key, shape, shape[-1] ** -0.5)
    if name == "bias" and not family.bias:  # a bias of the whole block, which the record does not have
        return torch.zeros(shape)
    # Selection biases are mostly negative, so that a mask of 0 differs from one of -inf.
    value = draw.real(key, shape, 0.5) - (0.9 if name == family.bias else 0.0)
    return (value * 4).round() / 4 if exact else value


def fill(block, family: Family, exact: bool):
    """Every parameter and buffer gets the values of its own name."""
    for name, p in list(block.named_parameters()) + list(block.named_buffers()):
        with torch.no_grad():
            if p.dtype.is_floating_point:
                p.copy_(value_of(family, name, p.shape, exact).to(p.dtype))
            elif name.endswith("tid2eid"):
                p.copy_(token_table(*p.shape, router_weight(block, family).shape[0]))


def token_table(tokens: int, k: int, experts: int) -> torch.Tensor:
    """k different experts for each token id."""
    first = draw.whole("table", (tokens, 1), 0, experts - 1, torch.int64)
    step = draw.whole("table.step", (tokens, 1), 1, 2, torch.int64)
    return (first + step * torch.arange(k)) % experts


def token_ids(tokens: int) -> torch.Tensor:
    return draw.whole("ids", (tokens,), 0, 15, torch.int64)


# ---- the router ----


def router_weight(block, family: Family) -> torch.nn.Parameter:
    gate = attribute(block, family.gate)
    for name in ("weight", "wg.weight", "classifier.weight", "gate.weight", "layer.weight"):
        try:
            return attribute(gate, name)
        except AttributeError:
            continue
    raise AttributeError(f"{family.name}: no router weight in {[n for n, _ in gate.named_parameters()]}")


def dense_choice(out, k: int):
    """Llama 4: scores of all experts, 0 where not chosen, and the logits."""
    scores, logits = out
    index = torch.topk(logits, k, dim=1).indices
    return logits, scores.gather(1, index), index


def sorted_choice(out, k: int):
    """JetMoe: weights of the slots sorted by expert, and how many each expert has."""
    order, _, weights, counts, logits = out
    back = torch.argsort(order)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return logits, weights[back].reshape(-1, k), expert[back].reshape(-1, k)


def call_gate(block, family: Family, x: torch.Tensor, k: int):
    """Logits [T,Z], weights [T,K] and experts [T,K] of the class's own router."""
    more = {"": (), "bias": (attribute(block, family.bias),) if family.bias else (), "ids": (token_ids(len(x)),)}
    out = attribute(block, family.gate)(x[None] if family.name == "afmoe" else x, *more[family.gate_takes])
    if family.name == "dbrx":
        out = (out, *block.route_tokens_to_experts(out))
    if family.name == "llama4":
        out = dense_choice(out, k)
    elif family.name == "jetmoe":
        out = sorted_choice(out, k)
    return tuple(t.reshape(len(x), -1) for t in out[:3])


def selection_bias(block, family: Family):
    return attribute(block, family.bias).detach().reshape(-1) if family.bias else None


def call_block(block, family: Family, x: torch.Tensor) -> torch.Tensor:
    y = block(x[None], token_ids(len(x))[None]) if family.gate_takes == "ids" else block(x[None])
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


# ---- parameters as operands ----


def expert_parameters(block, family: Family) -> dict:
    """Operand names to parameters, as the class stores them; two that lie behind one another as a list."""
    if family.name == "dbrx":
        mlp = block.experts.mlp
        return {"w1": [mlp.w1, mlp.v1], "w2": [mlp.w2]}
    if family.name == "jetmoe":
        return {"w1": block.input_linear.weight, "w2": block.output_linear.weight}
    experts = block.experts
    first = experts.gate_up_proj if family.gated else experts.up_proj
    out = {"w1": first, "w2": experts.down_proj}
    if family.expert_biases:
        out |= {"b1": experts.gate_up_proj_bias, "b2": experts.down_proj_bias}
    return out


def as_operand(family: Family, name: str, t: torch.Tensor) -> torch.Tensor:
    """[out, in], and without the rows that some classes keep for experts that compute nothing."""
    if isinstance(t, list):  # all experts' rows in one dimension, those of the second matrix [in, out]
        t = torch.cat([part.reshape(E, -1, H) for part in t], 1)
        t = t.transpose(1, 2) if name == "w2" else t
    elif name in ("w1", "w2"):
        t = t.transpose(1, 2) if family.in_out else t
    return t.detach()[:E]


def shared_parameters(block, family: Family) -> dict:
    """Operand names to the parameters whose rows they are."""
    if not family.shared:
        return {}
    mlp = attribute(block, family.shared)
    if hasattr(mlp, "gate_up_proj"):
        first = [mlp.gate_up_proj.weight]
    else:
        first = [mlp.gate_proj.weight, mlp.up_proj.weight] if family.gated else [mlp.up_proj.weight]
    out = {"sw1": first, "sw2": [mlp.down_proj.weight]}
    if family.shared_gate:
        out["sgate"] = [attribute(block, family.shared_gate).weight]
    return out


def joined(parts) -> torch.Tensor:
    return torch.cat([p.detach() for p in parts])


def block_operands(block, family: Family) -> dict:
    out = {"wr": router_weight(block, family).detach()}
    out |= {k: as_operand(family, k, p) for k, p in expert_parameters(block, family).items()}
    out |= {k: joined(p) for k, p in shared_parameters(block, family).items()}
    if family.router_bias:
        out["rbias"] = attribute(block, family.gate).bias.detach()
    return out


def gradient(p):
    if isinstance(p, list):
        return [gradient(part) for part in p]
    return torch.zeros_like(p) if p.grad is None else p.grad


def block_gradients(block, family: Family) -> dict:
    out = {"dwr": gradient(router_weight(block, family))}
    out |= {"d" + k: as_operand(family, k, gradient(p)) for k, p in expert_parameters(block, family).items()}
    out |= {"d" + k: joined(map(gradient, p)) for k, p in shared_parameters(block, family).items()}
    if family.router_bias:
        out["drbias"] = gradient(attribute(block, family.gate).bias)
    return out
