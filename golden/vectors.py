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

# The order of the safetensors library's own list of dtypes; files are sorted from the last to the first.
ORDER = ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
         "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "uint64": "U64", "uint8": "U8",
}


def to_numpy(t):
    """A tensor as a contiguous array; bf16 by way of ml_dtypes, bit for bit."""
    if isinstance(t, torch.Tensor):
        t = t.detach().contiguous()
        if t.dtype == torch.bfloat16:
            return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return t.numpy()
    return np.ascontiguousarray(t)


def pack_e2m1(a):
    """Two codes a byte, the even one in the low half."""
    codes = a.view(np.uint8).reshape(-1) & 15
    return (codes[0::2] | (codes[1::2] << 4)).astype(np.uint8).tobytes()


def file_bytes(tensors, metadata):
    """The canonical bytes of a safetensors file."""
    entries = []
    for name, t in tensors.items():
        a = to_numpy(t)
        fp4 = a.dtype.name == "float4_e2m1fn"
        entries.append((name, "F4" if fp4 else NAMES[a.dtype.name], list(a.shape), pack_e2m1(a) if fp4 else a.tobytes()))
    entries.sort(key=lambda e: (-ORDER.index(e[1]), e[0]))
    header = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, dtype, shape, data in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(e[3] for e in entries)


class Set:
    """One vector set, written by finish()."""

    def __init__(self, root, name, generator):
        self.root = pathlib.Path(root)
        self.name = name
        self.generator = generator
        self.groups = {}
        self.files = {}

    def write(self, path, data):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        self.files[path] = hashlib.sha256(data).hexdigest()

    def note(self, group, flag, bug_type, description, effect=None, links=()):
        notes = self.groups.setdefault(group, {"notes": {}, "sources": {}})["notes"]
        notes[flag] = {"bugType": bug_type, "description": description}
        if effect:
            notes[flag]["effect"] = effect
        if links:
            notes[flag]["links"] = list(links)

    def add(self, group, source, comment, case, prompt, expected=None, *, compare="bound", flags=(), unchecked=(),
            result="valid", refusal=None):
        """Adds a test; prompt and expected map operand names to tensors."""
        tests = self.groups.setdefault(group, {"notes": {}, "sources": {}})["sources"].setdefault(source, [])
        number = 1 + sum(len(v) for v in self.groups[group]["sources"].values())
        stage = case.split()[0]
        meta = {"expar.schema": "expar.tensors/1", "expar.stage": stage}
        stem = f"data/{group}-{number}"
        test = {"comment": comment, "flags": sorted(flags), "result": result, "case": case,
                "prompt": f"{stem}.prompt.safetensors"}
        self.write(test["prompt"], file_bytes({f"in.{k}": v for k, v in prompt.items()}, meta))
        if result == "invalid":
            test["refusal"] = refusal
        else:
            test["compare"] = compare
            test["expected"] = f"{stem}.expected.safetensors"
            self.write(test["expected"], file_bytes({f"exp.{k}": v for k, v in expected.items()}, meta))
            if unchecked:
                test["unchecked"] = sorted(unchecked)
        test["number"] = number
        tests.append(test)

    def finish(self):
        count = 0
        for name, group in sorted(self.groups.items()):
            listed = []
            for source, tests in group["sources"].items():
                listed.append({"source": source, "tests": tests})
            for number, test in enumerate((t for g in listed for t in g["tests"]), 1):
                test.pop("number")
                test["tcId"] = number
                count += 1
            text = json.dumps({"schema": "expar.group/1", "name": name, "notes": group["notes"], "testGroups": listed},
                              indent=1, sort_keys=True)
            self.write(f"groups/{name}.json", text.encode() + b"\n")
        manifest = {"schema": "expar.vectors/1", "name": self.name, "version": 1, "generator": self.generator,
                    "tests": count, "files": dict(sorted(self.files.items()))}
        (self.root / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        return count
