"""Seeded values that depend on nothing but their name: SplitMix64 over (seed, name, index)."""

import zlib

import numpy as np
import torch

MASK = (1 << 64) - 1


def words(name: str, n: int, seed: int = 1) -> np.ndarray:
    """n well mixed 64-bit words."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64((zlib.crc32(name.encode()) << 20 ^ seed * 0x5851F42D4C957F2D) & MASK)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def real(name: str, shape, std: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Near normal: the sum of four uniform numbers, exact in f64 on every machine."""
    n = int(np.prod(shape)) if shape else 1
    u = (words(name, 4 * n, seed) >> np.uint64(11)).astype(np.float64) * 2.0 ** -53
    v = (u.reshape(4, n).sum(0) - 2.0) * np.sqrt(3.0) * std
    return torch.tensor(v.reshape(shape)).to(dtype)


def whole(name: str, shape, low: int, high: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Integers in [low, high]."""
    n = int(np.prod(shape)) if shape else 1
    v = (words(name, n, seed) % np.uint64(high - low + 1)).astype(np.int64) + low
    return torch.tensor(v.reshape(shape)).to(dtype)


def sparse(name: str, shape, ones: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Rows with at most `ones` entries of +-1: sums of a few bf16 numbers stay exact in f32."""
    rows = int(np.prod(shape[:-1]))
    out = np.zeros((rows, shape[-1]))
    w = words(name, rows * ones * 2, seed).reshape(rows, ones, 2)
    for i in range(rows):
        for k in range(ones):
            out[i, int(w[i, k, 0] % np.uint64(shape[-1]))] = 1.0 if w[i, k, 1] & np.uint64(1) else -1.0
    return torch.tensor(out.reshape(shape)).to(dtype)
