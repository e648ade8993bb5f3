"""Answers of a deliberately wrong implementation to the one test of set `layer`, for `expar verify --responses`.

The block is transformers' own; each wrong answer changes one thing that has been wrong in real code.
"""

import pathlib

import torch

import blocks
from families import FAMILIES
from parts import Family, H, T, block_gradients, call_gate
import draw
import vectors

EXPECTED = "moe-qwen2_moe-1.expected.safetensors"  # of the test that is answered
README = {
    "expert-grad-x-ep": """\
The gradients of the experts' matrices are 4 times what they should be; everything else is right.
This is what an expert-parallel job of 4 ranks gets when experts' gradients are summed where the
dense parameters' are averaged. `expar verify golden/layer --responses` with this folder must fail
in dw1 and dw2, by a factor of exactly 4.
""",
    "missing-shared": """\
The shared expert's output is left out of the block's output, and so its gradients are zero. A
block like this trains, only worse. `expar verify golden/layer --responses` with this folder must
fail in y and in the shared expert's gradients.
""",
    "weight-wrong-slot": """\
Each token's weights are moved on by one slot: the expert of slot k is multiplied by the weight of
slot k - 1. The weights still have the right sum, so norms and losses look plausible. `expar verify
golden/layer --responses` with this folder must fail in y and name the slots.
""",
}


def family() -> Family:
    return next(f for f in FAMILIES if f.preset == "hf-5.24/qwen2_moe")


class Block:
    """The block and the input of the test in set `layer`."""

    def __init__(self):
        self.family = family()
        self.tag = f"{self.family.preset}.block.{self.family.k}"
        self.block = blocks.built(self.family, torch.float32, False, "grouped_mm", self.family.k)
        self.x = blocks.inputs(self.tag, False, torch.float32).requires_grad_(True)

    def routed(self, shift: int = 0) -> torch.Tensor:
        _, w, idx = call_gate(self.block, self.family, self.x, self.family.k)
        return self.block.experts(self.x, idx, w.roll(shift, 1))

    def shared(self) -> torch.Tensor:
        return torch.sigmoid(self.block.shared_expert_gate(self.x)) * self.block.shared_expert(self.x)

    def answer(self, y: torch.Tensor) -> dict:
        y.backward(draw.real(self.tag + ".dy", (T, H)))
        return {"y": y, "dx": self.x.grad, **block_gradients(self.block, self.family)}


def expert_grad_times_ep(ep: int = 4) -> dict:
    b = Block()
    out = b.answer(b.routed() + b.shared())
    return out | {"dw1": out["dw1"] * ep, "dw2": out["dw2"] * ep}


def weight_on_wrong_slot() -> dict:
    b = Block()
    return b.answer(b.routed(shift=1) + b.shared())


def missing_shared() -> dict:
    b = Block()
    return b.answer(b.routed())


def add_all(root: pathlib.Path):
    """One folder a wrong answer; its file is named as the expected one."""
    for name, make in (("expert-grad-x-ep", expert_grad_times_ep), ("weight-wrong-slot", weight_on_wrong_slot),
                       ("missing-shared", missing_shared)):
        folder = root / "wrong" / name
        folder.mkdir(parents=True)
        data = vectors.file_bytes({f"exp.{k}": v for k, v in make().items()}, vectors.metadata_of("moe"))
        (folder / EXPECTED).write_bytes(data)
        (folder / "README.md").write_text(README[name])
