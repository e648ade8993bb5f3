"""Vector sets on disk: the layout that `expar verify` reads, with canonical bytes.

A set is groups of tests; a test is a case line, a prompt and what somebody else's code answered. Equal content gives
equal files: tensors are ordered by dtype and name, metadata by key, JSON by key.
"""

import hashlib
import json
import pathlib

import ml_dtypes
import numpy as np
import torch

from flags import NOTES

# The order of the safetensors library's own list of dtypes; files are sorted from the last to the first.
ORDER = ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
         "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn": "F4", "int64": "I64", "int32": "I32", "uint64": "U64", "uint8": "U8",
}


def to_numpy(t) -> np.ndarray:
    """A tensor as a contiguous array; bf16 by way of ml_dtypes, bit for bit."""
    if not isinstance(t, torch.Tensor):
        return np.ascontiguousarray(t)
    t = t.detach().contiguous()
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def pack_e2m1(a: np.ndarray) -> bytes:
    """Two codes a byte, the even one in the low half."""
    codes = a.view(np.uint8).reshape(-1) & 15
    return (codes[0::2] | (codes[1::2] << 4)).astype(np.uint8).tobytes()


def file_bytes(tensors: dict, metadata: dict) -> bytes:
    """The canonical bytes of a safetensors file."""
    entries = []
    for name, t in tensors.items():
        a = to_numpy(t)
        dtype = NAMES[a.dtype.name]
        entries.append((name, dtype, list(a.shape), pack_e2m1(a) if dtype == "F4" else a.tobytes()))
    entries.sort(key=lambda e: (-ORDER.index(e[1]), e[0]))
    header = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, dtype, shape, data in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(e[3] for e in entries)


def metadata_of(stage: str) -> dict:
    return {"expar.schema": "expar.tensors/1", "expar.stage": stage}


class Set:
    """One vector set, written by finish()."""

    def __init__(self, root: pathlib.Path, name: str, generator: dict):
        self.root = root
        self.name = name
        self.generator = generator
        self.groups = {}  # name: {source: [test]}
        self.files = {}  # path: sha256
        self.prompts = {}  # sha256: path; tests of one prompt share its file

    def write(self, path: str, data: bytes):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        self.files[path] = hashlib.sha256(data).hexdigest()

    def write_prompt(self, path: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.prompts:
            self.write(path, data)
            self.prompts[digest] = path
        return self.prompts[digest]

    def add(self, group: str, source: str, comment: str, case: str, prompt: dict, expected: dict = None, *,
            compare: str = "bound", flags=(), unchecked=(), refusal: str = ""):
        """Adds a test; prompt and expected map operand names to tensors. A refusal makes it an invalid one."""
        sources = self.groups.setdefault(group, {})
        stem = f"data/{group}-{1 + sum(map(len, sources.values()))}"
        meta = metadata_of(case.split()[0])
        test = {"comment": comment, "flags": sorted(flags), "case": case}
        data = file_bytes({f"in.{k}": v for k, v in prompt.items()}, meta)
        test["prompt"] = self.write_prompt(f"{stem}.prompt.safetensors", data)
        if refusal:
            test |= {"result": "invalid", "refusal": refusal}
        else:
            test |= {"result": "valid", "compare": compare, "expected": f"{stem}.expected.safetensors"}
            self.write(test["expected"], file_bytes({f"exp.{k}": v for k, v in expected.items()}, meta))
        if unchecked:
            test["unchecked"] = sorted(unchecked)
        sources.setdefault(source, []).append(test)

    def write_group(self, name: str) -> int:
        tests = [t for part in self.groups[name].values() for t in part]
        for number, test in enumerate(tests, 1):
            test["tcId"] = number
        text = {"schema": "expar.group/1", "name": name,
                "notes": {flag: NOTES[flag] for t in tests for flag in t["flags"]},
                "testGroups": [{"source": s, "tests": part} for s, part in self.groups[name].items()]}
        self.write(f"groups/{name}.json", json.dumps(text, indent=1, sort_keys=True).encode() + b"\n")
        return len(tests)

    def finish(self) -> int:
        """Writes groups and manifest; the number of tests."""
        count = sum(self.write_group(name) for name in sorted(self.groups))
        manifest = {"schema": "expar.vectors/1", "name": self.name, "version": 1, "generator": self.generator,
                    "tests": count, "files": self.files}
        (self.root / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        return count
