"""Answers of a deliberately wrong implementation to one test of the core set, for `expar verify --responses`.

The block is transformers' own Qwen2MoeSparseMoeBlock; each wrong answer changes one thing that has been wrong in real code.
"""

import pathlib
import shutil

import torch

import draw
import layers
import vectors
from families import FAMILIES, H, attribute, router_weight, with_k

META = {"expar.schema": "expar.tensors/1", "expar.stage": "moe"}


def family():
    return next(f for f in FAMILIES if f.preset == "hf-5.24/qwen2_moe" and f.name == "qwen2_moe")


def block_and_input():
    f = family()
    block, _ = f.build(torch.float32, "grouped_mm", **with_k(f, f.k))
    layers.fill(block, f, False)
    x = draw.real(f"{f.preset}.block.{f.k}", (layers.T, H)).requires_grad_(True)
    return f, block, x


def answer(f, block, x, y):
    y.backward(draw.real(f"{f.preset}.block.{f.k}.dy", (layers.T, H)))
    _, parts = layers.block_operands(block, f)
    return {"y": y, "dx": x.grad, **layers.block_gradients(block, f, parts)}


def gradients_times_ep(ep=4):
    f, block, x = block_and_input()
    out = answer(f, block, x, block(x[None]).reshape(-1, H))
    out["dw1"] = out["dw1"] * ep
    out["dw2"] = out["dw2"] * ep
    return out


def weight_on_wrong_slot():
    f, block, x = block_and_input()
    _, w, idx = layers.call_gate(block, f, x)
    y = block.experts(x, idx, w.roll(1, 1))
    y = y + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return answer(f, block, x, y)


def missing_shared():
    f, block, x = block_and_input()
    _, w, idx = layers.call_gate(block, f, x)
    return answer(f, block, x, block.experts(x, idx, w))


def add_all(root, expected):
    """One folder a wrong answer; its file is named as the expected one."""
    shutil.rmtree(root / "wrong", ignore_errors=True)
    for name, make in (("expert-gradients-x-ep", gradients_times_ep), ("weight-on-wrong-slot", weight_on_wrong_slot),
                       ("missing-shared-expert", missing_shared)):
        folder = root / "wrong" / name
        folder.mkdir(parents=True)
        data = vectors.file_bytes({f"exp.{k}": v for k, v in make().items()}, META)
        (folder / pathlib.Path(expected).name).write_bytes(data)
