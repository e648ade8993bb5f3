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


# ---- routers over ROUTE_E experts whose matrix is the identity, so that their input is the logits; or beside it a
# second one that adds what a bf16 input cannot hold ----

FINE = 1 / 1024


def transparent(router, width: int):
    with torch.no_grad():
        router.classifier.weight.copy_(torch.cat([torch.eye(ROUTE_E), FINE * torch.eye(ROUTE_E)], 1)[:, :width])
    return router


def switch_router(capacity: int, width: int):
    """It counts each sequence by itself."""
    config = SwitchTransformersConfig(d_model=width, num_experts=ROUTE_E, expert_capacity=capacity)
    return transparent(SwitchTransformersTop1Router(config), width).eval()


def nllb_router(capacity: int, width: int):
    """Training takes the configuration's capacity (one eval call would overwrite it), and nothing here is random."""
    config = NllbMoeConfig(d_model=width, num_experts=ROUTE_E, expert_capacity=capacity,
                           normalize_router_prob_before_dropping=True)
    return transparent(NllbMoeTop2Router(config), width).train()


def crowded(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits that favour the first experts."""
    return draw.real(name, (SEQUENCES * LENGTH, ROUTE_E), dtype=dtype) - torch.arange(ROUTE_E).to(dtype) / 2


def close(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits of -1 to 1 that differ by a few FINE: probabilities that round alike in bf16."""
    shape = (SEQUENCES * LENGTH, ROUTE_E)
    return torch.cat([draw.whole(name, shape, -1, 1, dtype), draw.whole(name + ".fine", shape, -2, 2, dtype)], 1)


def switch_choice(x: torch.Tensor, capacity: int, length: int):
    """Experts [T,1] with -1 where the mask is empty, weights, and the logits."""
    mask, weight, seen = switch_router(capacity, x.shape[1])(x.reshape(-1, length, x.shape[1]))
    mask = mask.reshape(-1, ROUTE_E)
    kept = torch.where(mask.sum(1) > 0, mask.argmax(1), -1)
    return kept[:, None].to(torch.int32), weight.reshape(-1, 1), seen


def nllb_choice(x: torch.Tensor, capacity: int):
    """First choices, the weights of all experts, 0 where dropped, and the logits."""
    return nllb_router(capacity, x.shape[1])(x)


def nllb_slots(x: torch.Tensor):
    first, weights, seen = nllb_choice(x, ABOVE)
    rest = torch.where(first.bool(), torch.zeros((), dtype=weights.dtype), weights)
    idx = torch.stack([first.argmax(1), rest.argmax(1)], 1)
    return idx, weights.gather(1, idx), seen


def dropped(idx: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.bincount(idx[kept < 0].to(torch.int64), minlength=ROUTE_E)


def flags_of(kept: torch.Tensor, capacity: int, tokens: int) -> list:
    return (["FullExperts"] if (kept < 0).any() else []) + (["CapacityAboveTokens"] if capacity > tokens else [])


def add_route(out, name: str, block: str, dtype: torch.dtype, choose, inputs=crowded):
    """The class's choice and weights without a limit, and the gradient of its weights."""
    preset, tied = f"hf-5.24/{name}", inputs is close
    x = inputs(f"{preset}.{LETTER[dtype]}", dtype).requires_grad_(True)
    idx, w, seen = choose(x)
    idx = idx.to(torch.int32)
    line = f"dtype={LETTER[dtype]} dialect={preset} logits=f32"
    given = {"logits": seen.detach().reshape(-1, ROUTE_E)}
    comment = f"k {idx.shape[1]}" + (", probabilities that round alike" if tied else "")
    out.add(f"route-{name}", SOURCE + block, comment, f"route {line} weight={LETTER[dtype]}", given,
            {"idx": idx, "w": w}, compare="classes", unchecked=["scores"],
            flags=(["OneSlot"] if idx.shape[1] == 1 else []) + (["Ties"] if tied else []))
    dw = draw.real(preset + ".dw", tuple(w.shape), dtype=dtype)
    seen.retain_grad()
    w.backward(dw)
    scores = torch.softmax(given["logits"], -1).to(dtype).float()
    out.add(f"route_bwd-{name}", SOURCE + block, comment, f"route_bwd {line}",
            {"scores": scores, "idx": idx, "dw": dw.float(), **given},
            {"dlogits": seen.grad.reshape(-1, ROUTE_E)}, flags=["Ties"] if tied else [])
    return x.detach(), idx, w.detach()


def add_kept(out, name: str, block: str, line: str, idx, w, kept, capacity: int, tokens: int):
    fields = f"capacity dtype={LETTER[w.dtype]} {line} weight={LETTER[w.dtype]} capacity={capacity}"
    out.add(f"capacity-{name}", SOURCE + block, f"{int((kept < 0).sum())} of {kept.numel()} slots are dropped", fields,
            {"idx": idx, "w": w}, {"kept": kept, "dropped": dropped(idx, kept)}, compare="bits",
            flags=flags_of(kept, capacity, tokens))


def add_switch(out, dtype: torch.dtype):
    name, block = "switch_transformers", "SwitchTransformersTop1Router"
    x, idx, w = add_route(out, name, block, dtype, lambda x: switch_choice(x, ABOVE, LENGTH))
    for capacity in (1, 2, LENGTH, ABOVE) if dtype == torch.float32 else (2,):
        for length in (LENGTH, SEQUENCES * LENGTH):
            kept = switch_choice(x, capacity, length)[0]
            sequence = f"dialect={SWITCH} sequence={length}"
            add_kept(out, name, block, sequence, idx, w, kept, capacity, length)


def add_nllb(out):
    name, block = "nllb_moe", "NllbMoeTop2Router"
    add_route(out, name, block, torch.bfloat16, nllb_slots)
    x, idx, w = add_route(out, name, block, torch.float32, nllb_slots)
    for capacity in (1, 3, 6, len(x), ABOVE):
        left = nllb_choice(x, capacity)[1].detach().gather(1, idx.to(torch.int64))
        kept = torch.where(left > 0, idx, -1)
        add_kept(out, name, block, f"dialect={NLLB}", idx, w, kept, capacity, len(x))


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
    add_route(out, "switch_transformers", "SwitchTransformersTop1Router", torch.bfloat16,
              lambda x: switch_choice(x, ABOVE, LENGTH), close)
    add_route(out, "nllb_moe", "NllbMoeTop2Router", torch.bfloat16, nllb_slots, close)
    add_switch_block(out, torch.float32, False, 2)
    add_switch_block(out, torch.float32, False, ABOVE)
    add_switch_block(out, torch.bfloat16, True, 2)
