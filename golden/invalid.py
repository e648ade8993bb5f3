"""Prompts that must be refused, each by the name of what is wrong with it."""

import torch

import draw

SOURCE = "expar: refused by definition"


def refuse(out, flag: str, comment: str, case: str, prompt: dict, text: str):
    out.add("invalid", SOURCE, comment, case, prompt, flags=[flag], refusal=text)


def gradient_prompt(logits, idx) -> dict:
    return {"scores": torch.softmax(logits, -1), "idx": idx, "dw": torch.zeros(idx.shape)}


def moe_prompt(idx) -> dict:
    t, h, e, f = len(idx), 4, 6, 2
    return {"x": draw.real("i.x", (t, h)), "dy": draw.real("i.dy", (t, h)), "wr": draw.real("i.wr", (e, h)),
            "w1": draw.real("i.w1", (e, 2 * f, h)), "w2": draw.real("i.w2", (e, h, f)), "idx": idx}


def ids(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def add_all(out):
    logits = draw.real("invalid", (3, 6))
    backward = "route_bwd dtype=f32 dialect=hf-5.24/mixtral"
    refuse(out, "TopkAboveExperts", "7 slots, 6 experts", backward,
           gradient_prompt(logits, torch.zeros(3, 7, dtype=torch.int32)), "K must be in 1..E")
    refuse(out, "BadId", "expert 6 of 6", backward, gradient_prompt(logits, ids([0, 1], [2, 6], [3, 4])),
           "idx element 3 is 6")
    refuse(out, "BadId", "expert -1", backward, gradient_prompt(logits, ids([0, 1], [2, 5], [-1, 4])),
           "idx element 4 is -1")
    refuse(out, "BadId", "expert 6 of 6 in a block", "moe dtype=f32 dialect=hf-5.24/mixtral",
           moe_prompt(ids([0, 1], [6, 2])), "idx")
    refuse(out, "GroupsDoNotDivide", "4 groups of 6 experts",
           "route dtype=f32 dialect=hf-5.24/deepseek_v3 n_group=4 K=2", {"logits": logits, "bias": torch.zeros(6)},
           "n_group")
    refuse(out, "GroupsAboveAll", "3 of 2 groups",
           "route dtype=f32 dialect=hf-5.24/deepseek_v3 n_group=2 topk_group=3 K=2",
           {"logits": logits, "bias": torch.zeros(6)}, "topk_group")
    refuse(out, "MissingOperand", "no selection bias", "route dtype=f32 dialect=hf-5.24/minimax_m2 K=2",
           {"logits": logits}, "bias is absent")
    line = "capacity dtype=f32 dialect=hf-5.24/mixtral E=6"
    slots = {"idx": ids([0, 1], [0, 5], [3, 0]), "w": torch.ones(3, 2)}
    refuse(out, "PolicyName", "Megatron-LM's word for another policy name", f"{line} capacity=1 overflow=probs", slots,
           "overflow: 'probs'")
    refuse(out, "TwoCapacities", "a number and a factor", f"{line} capacity=1 capacity_factor=1.5", slots,
           "capacity: 1 beside capacity_factor 1.5")
    refuse(out, "BadId", "expert 6 of 6 among the slots", f"{line} capacity=1",
           {**slots, "idx": ids([0, 1], [0, 6], [3, 0])}, "idx[1][1] is 6")
