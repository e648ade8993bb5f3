"""Tests of the number formats: casts as ml_dtypes makes them."""

import ml_dtypes
import numpy as np

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


def add_all(out):
    for kind, dtype in FORMATS.items():
        with np.errstate(all="ignore"):
            x = codes(kind)
            out.add("cast", SOURCE, f"codes of {kind} widened", f"cast act={kind} param=f32", {"x": x},
                    {"y": x.astype(np.float32)}, compare="bits")
            x = edges(kind)
            out.add("cast", SOURCE, f"f32 narrowed to {kind}", f"cast act=f32 param={kind} saturate=0", {"x": x},
                    {"y": x.astype(dtype)}, compare="bits", flags=["Subnormals"])
