"""Tests of routers whose experts take so many tokens and no more: which choices they drop, and a block that drops some.

A class shows its choice without a limit when the limit is above the tokens; the same class with a limit shows what is
left of it."""

import torch
from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (SwitchTransformersSparseMLP,
                                                                                  SwitchTransformersTop1Router)

import draw
from parts import LETTER, E, F, H, T, gradient

ROUTE_E, SEQUENCES, LENGTH = 5, 2, 8
ABOVE = 10 ** 6  # a limit that nothing reaches
SWITCH, NLLB = "hf-5.24/switch_transformers", "hf-5.24/nllb_moe"
SOURCE = "transformers 5.24.0 "


# ---- routers over ROUTE_E experts with the identity as their matrix, so that their input is the logits ----


def identity(router):
    with torch.no_grad():
        router.classifier.weight.copy_(torch.eye(ROUTE_E))
    return router


def switch_router(capacity: int):
    """It counts each sequence by itself."""
    config = SwitchTransformersConfig(d_model=ROUTE_E, num_experts=ROUTE_E, expert_capacity=capacity)
    return identity(SwitchTransformersTop1Router(config)).eval()


def nllb_router(capacity: int):
    """Training takes the configuration's capacity (one eval call would overwrite it), and nothing here is random."""
    config = NllbMoeConfig(d_model=ROUTE_E, num_experts=ROUTE_E, expert_capacity=capacity,
                           normalize_router_prob_before_dropping=True)
    return identity(NllbMoeTop2Router(config)).train()


def crowded(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits that favour the first experts."""
    return draw.real(name, (SEQUENCES * LENGTH, ROUTE_E), dtype=dtype) - torch.arange(ROUTE_E).to(dtype) / 2


def switch_choice(logits: torch.Tensor, capacity: int, length: int):
    """Experts [T,1] with -1 where the mask is empty, and weights."""
    mask, weight, _ = switch_router(capacity)(logits.reshape(-1, length, ROUTE_E))
    mask = mask.reshape(-1, ROUTE_E)
    kept = torch.where(mask.sum(1) > 0, mask.argmax(1), -1)
    return kept[:, None].to(torch.int32), weight.reshape(-1, 1)


def nllb_choice(logits: torch.Tensor, capacity: int):
    """First choices and the weights of all experts, 0 where dropped."""
    first, weights, _ = nllb_router(capacity)(logits)
    return first, weights


def nllb_slots(logits: torch.Tensor):
    first, weights = nllb_choice(logits, ABOVE)
    rest = torch.where(first.bool(), torch.zeros(()), weights)
    idx = torch.stack([first.argmax(1), rest.argmax(1)], 1)
    return idx, weights.gather(1, idx)


def dropped(idx: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.bincount(idx[kept < 0].to(torch.int64), minlength=ROUTE_E)


def flags_of(kept: torch.Tensor, capacity: int, tokens: int) -> list:
    return (["FullExperts"] if (kept < 0).any() else []) + (["CapacityAboveTokens"] if capacity > tokens else [])


def add_route(out, name: str, preset: str, block: str, dtype: torch.dtype, choose):
    """The class's choice and weights without a limit, and in f32 the gradient of its weights."""
    logits = crowded(f"{preset}.{LETTER[dtype]}", dtype).requires_grad_(True)
    idx, w = choose(logits)
    idx = idx.to(torch.int32)
    line = f"dtype={LETTER[dtype]} dialect={preset} logits=f32"
    given = {"logits": logits.detach().float()}
    out.add(f"route-{name}", SOURCE + block, f"k {idx.shape[1]}", f"route {line} weight={LETTER[dtype]}", given,
            {"idx": idx, "w": w}, compare="classes", unchecked=["scores"],
            flags=["OneSlot"] if idx.shape[1] == 1 else [])
    if dtype == torch.float32:
        dw = draw.real(preset + ".dw", tuple(w.shape))
        w.backward(dw)
        out.add(f"route_bwd-{name}", SOURCE + block, f"k {idx.shape[1]}", f"route_bwd {line}",
                {"scores": torch.softmax(logits.detach(), -1), "idx": idx, "dw": dw, **given},
                {"dlogits": logits.grad})
    return logits.detach(), idx, w.detach()


def add_kept(out, name: str, block: str, line: str, idx, w, kept, capacity: int, tokens: int):
    fields = f"capacity dtype={LETTER[w.dtype]} {line} weight={LETTER[w.dtype]} capacity={capacity}"
    out.add(f"capacity-{name}", SOURCE + block, f"{int((kept < 0).sum())} of {kept.numel()} slots are dropped", fields,
            {"idx": idx, "w": w}, {"kept": kept, "dropped": dropped(idx, kept)}, compare="bits",
            flags=flags_of(kept, capacity, tokens))


def add_switch(out, dtype: torch.dtype):
    name, block = "switch_transformers", "SwitchTransformersTop1Router"
    logits, idx, w = add_route(out, name, SWITCH, block, dtype, lambda x: switch_choice(x, ABOVE, LENGTH))
    for capacity in (1, 2, LENGTH, ABOVE) if dtype == torch.float32 else (2,):
        for length in (LENGTH, SEQUENCES * LENGTH):
            kept = switch_choice(logits, capacity, length)[0]
            sequence = f"dialect={SWITCH} sequence={length}"
            add_kept(out, name, block, sequence, idx, w, kept, capacity, length)


def add_nllb(out):
    name, block = "nllb_moe", "NllbMoeTop2Router"
    logits, idx, w = add_route(out, name, NLLB, block, torch.float32, nllb_slots)
    for capacity in (1, 3, 6, len(logits), ABOVE):
        left = nllb_choice(logits, capacity)[1].detach().gather(1, idx.to(torch.int64))
        kept = torch.where(left > 0, idx, -1)
        add_kept(out, name, block, f"dialect={NLLB}", idx, w, kept, capacity, len(logits))


# ---- a block ----


def switch_block(dtype: torch.dtype, exact: bool, capacity: int):
    config = SwitchTransformersConfig(d_model=H, d_ff=F, num_experts=E, expert_capacity=capacity, dropout_rate=0.0)
    torch.set_default_dtype(dtype)
    try:
        block = SwitchTransformersSparseMLP(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, p in block.named_parameters():
        key = f"{SWITCH}.{exact}.{name}"
        with torch.no_grad():
            if not exact:
                p.copy_(draw.real(key, p.shape, p.shape[-1] ** -0.5).to(dtype))
            elif "classifier" in name:
                p.copy_((draw.whole(key, p.shape, -96, 96) / 64).to(dtype))
            else:
                p.copy_((draw.sparse(key, p.shape, 2) if ".wo." in name else draw.whole(key, p.shape, -1, 1)).to(dtype))
    return block


def stacked(block, matrix: str, value) -> torch.Tensor:
    return torch.stack([value(getattr(block.experts[f"expert_{e}"], matrix).weight) for e in range(E)])


def add_switch_block(out, dtype: torch.dtype, exact: bool, capacity: int):
    """The choice is what the block's own router says with no limit; the experts see what the limit leaves."""
    tag = f"{SWITCH}.block"
    x = (draw.whole(tag, (T, H), -1, 1, dtype) if exact else draw.real(tag, (T, H), dtype=dtype)).requires_grad_(True)
    dy = draw.real(tag + ".dy", (T, H), dtype=dtype)
    with torch.no_grad():
        idx = switch_block(dtype, exact, ABOVE).router(x[None])[0][0].argmax(1, keepdim=True).to(torch.int32)
    block = switch_block(dtype, exact, capacity)
    y = block(x[None])[0]
    weights = {"wr": block.router.classifier.weight, "w1": stacked(block, "wi", torch.Tensor.detach),
               "w2": stacked(block, "wo", torch.Tensor.detach)}
    expected = {"y": y}
    if not exact:
        y.backward(dy)
        expected |= {"dx": x.grad, "dwr": gradient(block.router.classifier.weight),
                     "dw1": stacked(block, "wi", gradient), "dw2": stacked(block, "wo", gradient)}
    empty = int((block.router(x[None])[0][0].sum(1) == 0).sum())
    line = f"moe dtype={LETTER[dtype]} dialect={SWITCH} capacity={capacity} router=f32"
    out.add("moe-switch_transformers", SOURCE + "SwitchTransformersSparseMLP",
            f"{'exact' if exact else 'real'} data, {empty} of {T} tokens have no expert", line,
            {"x": x, "dy": dy, "idx": idx, **weights}, expected, compare="bits" if exact else "bound",
            unchecked=[] if not exact else ["dx", "dwr", "dw1", "dw2"],
            flags=["OneSlot"] + (["RoundingPoints"] if exact else []) + (["FullExperts"] if empty else []))


def add_all(out):
    add_switch(out, torch.float32)
    add_switch(out, torch.bfloat16)
    add_nllb(out)
    add_switch_block(out, torch.float32, False, 2)
    add_switch_block(out, torch.float32, False, ABOVE)
    add_switch_block(out, torch.bfloat16, True, 2)
