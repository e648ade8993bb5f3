"""Tests of the families' experts, shared experts and whole blocks."""

import torch

import draw
from parts import (E, H, LETTER, T, Family, as_operand, attribute, block_gradients, block_operands, call_block,
                   call_gate, expert_parameters, fill, selection_bias, shared_parameters, joined)
from routes import source

ROWS = (0, 0, 0, 2, 2, 3, 5, 5, 5)  # each row's expert: two experts have none
SHARED_STAGE = ("qwen2_moe", "deepseek_v3", "deepseek_v4", "nemotron_h", "minimax_m3_vl")
GRADIENTS = ("dx", "dwr", "dw1", "dw2", "dsw1", "dsw2", "dsgate", "drbias", "db1", "db2")


def kind(exact: bool) -> str:
    return "exact" if exact else "real"


def compared(family: Family, exact: bool) -> str:
    return "bits" if exact and not family.loses_bits else "bound"


def built(family: Family, dtype: torch.dtype, exact: bool, kernels: str, k: int):
    block = family.build(dtype, kernels, **{family.topk: k})
    fill(block, family, exact)
    return block


def inputs(name: str, exact: bool, dtype: torch.dtype) -> torch.Tensor:
    return draw.whole(name, (T, H), -1, 1, dtype) if exact else draw.real(name, (T, H), dtype=dtype)


def add_expert(out, family: Family, dtype: torch.dtype, exact: bool):
    """Each row goes to one expert with weight 1, so the class returns the expert's own output."""
    block = built(family, dtype, exact, "eager", family.k)
    x = inputs(f"{family.preset}.rows", exact, dtype)
    y = block.experts(x, torch.tensor(ROWS)[:, None], torch.ones(T, 1, dtype=dtype))
    counts = torch.bincount(torch.tensor(ROWS), minlength=E)
    prompt = {"x": x, "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
              **{k: as_operand(family, k, p) for k, p in expert_parameters(block, family).items()}}
    group = f"expert-{family.name}"
    out.add(group, source(family), f"{family.preset}, {kind(exact)} data",
            f"expert dtype={LETTER[dtype]} {family.record()} param={LETTER[dtype]}", prompt, {"y": y},
            compare=compared(family, exact), unchecked=["pre", "act"],
            flags=["RoundingPoints"] if exact and not family.loses_bits else [])


def add_shared(out, family: Family, dtype: torch.dtype, exact: bool):
    block = built(family, dtype, exact, "eager", family.k)
    x = inputs(f"{family.preset}.shared", exact, dtype)
    mlp = attribute(block, family.shared)(x)
    operands = {k: joined(p) for k, p in shared_parameters(block, family).items()}
    prompt = {"x": x, "w1": operands["sw1"], "w2": operands["sw2"]}
    expected = {"mlp": mlp, "y": mlp}
    if family.shared_gate:
        gate = torch.sigmoid(attribute(block, family.shared_gate)(x))
        prompt["gate"] = operands["sgate"]
        expected |= {"sig": gate, "y": gate * mlp}
    group = f"shared-{family.name}"
    out.add(group, source(family), f"{family.preset}, {kind(exact)} data",
            f"shared dtype={LETTER[dtype]} {family.record()} param={LETTER[dtype]}", prompt, expected,
            compare="bits" if exact else "bound", unchecked=["pre", "act"],
            flags=["RoundingPoints"] if exact else [])


def block_flags(exact: bool, kernels: str, k: int) -> list:
    flags = ["RoundingPoints"] if exact else []
    flags += ["EagerSum"] if exact and kernels == "eager" else []
    return flags + (["OneSlot"] if k == 1 else [])


def run_block(block, family: Family, tag: str, exact: bool, dtype: torch.dtype, k: int):
    """x, dy, y and the choice; real data leave gradients behind."""
    x = inputs(tag, exact, dtype).requires_grad_(True)
    dy = draw.real(tag + ".dy", (T, H), dtype=dtype)
    y = call_block(block, family, x)
    if not exact:
        y.backward(dy)
    with torch.no_grad():
        index = call_gate(block, family, x, k)[2]
    return x, dy, y, index.to(torch.int32)


def add_block(out, family: Family, dtype: torch.dtype, exact: bool, kernels: str, k: int):
    block = built(family, dtype, exact, kernels, k)
    x, dy, y, idx = run_block(block, family, f"{family.preset}.block.{k}{family.redraw}", exact, dtype, k)
    prompt = {**block_operands(block, family), "x": x, "dy": dy, "idx": idx}
    if family.bias and "groups" in family.preset:
        prompt["bias"] = selection_bias(block, family)
    expected = {"y": y} if exact else {"y": y, "dx": x.grad, **block_gradients(block, family)}
    line = f"moe dtype={LETTER[dtype]} {family.record()}"
    accumulate = family.eager_sum if kernels == "eager" else family.grouped_sum
    line += f" accumulate={accumulate}" if accumulate else ""
    group = f"moe-{family.name}"
    out.add(group, source(family, kernels), f"{family.preset}, {kind(exact)} data, k {k}", line, prompt, expected,
            compare=compared(family, exact), unchecked=[g for g in GRADIENTS if g not in expected],
            flags=block_flags(exact and not family.loses_bits, kernels, k))


def add_blocks(out, family: Family):
    last = family.kernels[-1]
    for kernels in family.kernels:
        add_block(out, family, torch.bfloat16, True, kernels, family.k)
    if family.tests != "few":
        add_block(out, family, torch.float32, False, last, family.k)
    if family.tests == "all":
        add_block(out, family, torch.bfloat16, False, last, family.k)
        if not family.fixed_k:
            add_block(out, family, torch.bfloat16, False, "eager", 1)


def add_family(out, family: Family):
    if family.own_expert:
        add_expert(out, family, torch.float32, False)
        add_expert(out, family, torch.bfloat16, True)
    if family.name in SHARED_STAGE and family.preset == f"hf-5.24/{family.name}":
        add_shared(out, family, torch.float32, False)
        add_shared(out, family, torch.bfloat16, True)
    if "moe" in family.stages:
        add_blocks(out, family)
