"""Tests of the number formats: casts as ml_dtypes makes them, and block scaling by its casts and numpy's f32."""

import ml_dtypes
import numpy as np

import draw

SOURCE = f"ml_dtypes {ml_dtypes.__version__}"
FORMATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn,
           "e5m2": ml_dtypes.float8_e5m2, "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
           "e5m2fnuz": ml_dtypes.float8_e5m2fnuz, "e8m0": ml_dtypes.float8_e8m0fnu,
           "e2m1": ml_dtypes.float4_e2m1fn}
BITS = {"bf16": 16, "f16": 16, "e2m1": 4}
STEP = 127  # of the codes of 16 bits, which are too many; prime, so all exponents and low bits come


def codes(kind: str) -> np.ndarray:
    """Every code of a format of 8 or 4 bits, some of one of 16."""
    if BITS.get(kind, 8) == 16:
        return np.arange(0, 1 << 16, STEP, dtype=np.uint16).view(FORMATS[kind])
    return np.arange(1 << BITS.get(kind, 8), dtype=np.uint8).view(FORMATS[kind])


def edges(kind: str) -> np.ndarray:
    """Numbers around the rounding borders of a format: values, midpoints, larger ones, and the neighbours of all."""
    v = codes(kind).astype(np.float64)
    v = np.unique(v[np.isfinite(v)])
    largest = float(ml_dtypes.finfo(FORMATS[kind]).max)
    step = float(ml_dtypes.finfo(FORMATS[kind]).smallest_subnormal)
    near = np.concatenate([(v[1:] + v[:-1]) / 2, step * np.array([0.5, 1.0, 1.5]), largest * np.array([1.0, 1.5, 3.0])])
    points = np.concatenate([v, near]).astype(np.float32)
    points = points[np.isfinite(points)]
    up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    out = np.unique(np.concatenate([points, up, down]))
    if kind == "e8m0":
        out = out[out > 0]
    if kind == "e2m1":  # which has neither; and codes are packed in pairs
        return out[: len(out) // 2 * 2]
    return np.concatenate([out, np.array([np.inf, np.nan], np.float32)])


# ---- block scaling: one scale for each run of `cols` in a row ----

RECIPES = [  # what it is, codes, scales, cols, rule, a scale of the tensor above them
    ("MXFP8", "e4m3", "e8m0", 32, "mx", False), ("MXFP8", "e5m2", "e8m0", 32, "mx", False),
    ("MXFP4", "e2m1", "e8m0", 32, "mx", False), ("DeepSeek-V3 activations", "e4m3", "f32", 128, "amax", False),
    ("DeepSeek-V3 activations, powers of two", "e4m3", "f32", 128, "pow2", False),
    ("a row", "e5m2", "f32", 0, "amax", False), ("NVFP4", "e2m1", "e4m3", 16, "amax", True)]
LEAST = np.float32(2.0 ** -149)


def spread() -> np.ndarray:
    """Rows of very different sizes, a block of zeros, one of subnormal numbers, signed zeros."""
    x = draw.real("quant.x", (6, 70)).numpy() * np.float32(2) ** np.array([0, 9, -9, 40, -40, 3], np.float32)[:, None]
    x[1, :40] = 0
    x[2, 32:64] = x[2, 32:64] * np.float32(2.0 ** -120)
    x[5, ::7] = -0.0
    return x.astype(np.float32)


def saturated(v: np.ndarray, kind: str) -> np.ndarray:
    largest = np.float32(ml_dtypes.finfo(FORMATS[kind]).max)
    return np.clip(v, -largest, largest).astype(FORMATS[kind])


def block_scale(amax: np.float32, kind: str, rule: str) -> np.float32:
    """Before it is stored: amax / MAX, the next power of two, or the OCP rule on exponents."""
    largest = ml_dtypes.finfo(FORMATS[kind]).max
    exponent = np.frexp(np.float32(largest))[1] - 1
    if amax == 0:
        return np.float32(2.0 ** -127) if rule == "mx" else np.float32(1)
    if rule == "mx":
        return np.float32(2.0) ** np.clip(np.frexp(amax)[1] - 1 - exponent, -127, 127)
    if rule == "pow2":
        part, power = np.frexp(np.float64(amax) / np.float64(largest))
        return np.float32(2.0) ** np.clip(power - (part == 0.5), -127, 127)
    return max(np.float32(amax / np.float32(largest)), LEAST)


def quantised(x: np.ndarray, kind: str, scales: str, cols: int, rule: str, two: bool) -> dict:
    cols = cols or x.shape[1]
    starts = range(0, x.shape[1], cols)
    codes_of = np.zeros(x.shape, FORMATS[kind])
    stored = np.zeros((x.shape[0], len(starts)), np.float32)
    above = np.float32(1)
    if two:
        top = np.float32(ml_dtypes.finfo(FORMATS[kind]).max) * np.float32(ml_dtypes.finfo(FORMATS[scales]).max)
        above = max(np.float32(np.abs(x).max() / top), LEAST)
    for i in range(x.shape[0]):
        for j, at in enumerate(starts):
            part = x[i, at:at + cols]
            amax = np.abs(part).max()
            s = block_scale(amax, kind, rule)
            if two:
                s = saturated(np.float32(s / above), scales).astype(np.float32) if amax > 0 else np.float32(0)
            stored[i, j] = s
            by = np.float32(s * above)
            codes_of[i, at:at + cols] = saturated(part / by, kind) if by else (part * 0).astype(FORMATS[kind])
    out = {"q": codes_of, "scales": stored if scales == "f32" else stored.astype(FORMATS[scales])}
    return out | ({"tensor_scale": np.array([above], np.float32)} if two else {})


def add_blocks(out):
    x, source = spread(), f"numpy {np.__version__} in f32, {SOURCE}"
    for what, kind, scales, cols, rule, two in RECIPES:
        answer = quantised(x, kind, scales, cols, rule, two)
        shape = f"act=f32 code={kind} scale={scales} rows=1 cols={cols}"
        out.add("quant", source, what, f"quant {shape} rule={rule} nonfinite=nan eps=0", {"x": x}, answer,
                compare="bits", flags=["Subnormals"])
        by = answer["scales"].astype(np.float32) * answer.get("tensor_scale", np.float32(1))
        y = answer["q"].astype(np.float32) * np.repeat(by, cols or x.shape[1], 1)[:, :x.shape[1]]
        out.add("dequant", source, what, f"dequant {shape}", answer, {"y": y}, compare="bits")


def add_all(out):
    for kind, dtype in FORMATS.items():
        with np.errstate(all="ignore"):
            x = codes(kind)
            out.add("cast", SOURCE, f"codes of {kind} widened", f"cast act={kind} param=f32", {"x": x},
                    {"y": x.astype(np.float32)}, compare="bits")
            x = edges(kind)
            out.add("cast", SOURCE, f"f32 narrowed to {kind}", f"cast act=f32 param={kind} saturate=0", {"x": x},
                    {"y": x.astype(dtype)}, compare="bits", flags=["Subnormals"])
    with np.errstate(all="ignore"):
        add_blocks(out)
