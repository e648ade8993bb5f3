"""Compares the committed digests of every narrowing cast of f32 with what ml_dtypes makes of the same 2^32 inputs.

    python golden/casts.py [FORMAT ...]        (about two minutes a format; tests/exhaustive/cast.c says what a part is)
"""

import hashlib
import pathlib
import sys

import numpy as np

from formats import FORMATS

WINDOW, STEP, PARTS = 64, 4096, 64
NAN = {"bf16": 0x7FC0, "f16": 0x7E00, "e4m3": 0x7F, "e5m2": 0x7E, "e4m3fnuz": 0x80, "e5m2fnuz": 0x80, "e8m0": 0xFF,
       "e2m1": 0x7}
DIGESTS = pathlib.Path(__file__).parent.parent / "tests" / "exhaustive"


def digest(kind: str, part: int) -> str:
    """SHA-256 of the part's codes; every NaN as the format's positive one."""
    total = hashlib.sha256()
    blocks = 1 << 14  # of 2^20
    for first in range(0, 1 << 20, blocks):
        base = (np.arange(first, first + blocks, dtype=np.uint32) * np.uint32(STEP))[:, None]
        bits = base + np.arange(WINDOW, dtype=np.uint32) + np.uint32((WINDOW * part - WINDOW // 2) % (1 << 32))
        x = bits.view(np.float32)
        y = x.astype(FORMATS[kind])
        codes = y.view(np.uint16 if y.itemsize == 2 else np.uint8).copy()
        lost = np.isnan(x) if kind == "e2m1" else np.isnan(y)
        codes[lost] = NAN[kind]
        total.update(codes.tobytes())
    return total.hexdigest()


def main():
    wrong = 0
    for kind in sys.argv[1:] or FORMATS:
        lines = [line.split() for line in (DIGESTS / f"{kind}.txt").read_text().splitlines()]
        with np.errstate(all="ignore"):
            bad = [part for part, want, _ in lines if digest(kind, int(part)) != want]
        print(f"{kind}: {len(lines) - len(bad)} of {len(lines)} parts are those of ml_dtypes", *bad, flush=True)
        wrong += len(bad)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
