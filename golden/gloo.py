"""Tests of gradient reductions: FSDP2 over gloo, one process a rank: `python gloo.py RANK FOLDER`.

Each rank's parameter gets a given gradient; what FSDP2 leaves in the shards, put together, is the expected mean. The
prompt carries the ranks' gradients as blocks, whose fold in ascending order is what the stage defines.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import torch

import draw

COLUMNS = 5
# name: replicas, shards, rows, dtype of the gradients, whole numbers
CASES = {
    "2 ranks": (1, 2, 6, torch.float32, False),
    "3 ranks, uneven rows": (1, 3, 7, torch.float32, True),
    "3 ranks, bf16 gradients reduced in f32": (1, 3, 6, torch.bfloat16, False),
    "4 ranks, one without rows": (1, 4, 5, torch.float32, True),
    "2 replicas of 2 shards": (2, 2, 6, torch.float32, False),
}


def gradients(name: str) -> torch.Tensor:
    """[ranks, rows, COLUMNS]"""
    replicas, shards, rows, dtype, whole = CASES[name]
    shape = (replicas * shards, rows, COLUMNS)
    return draw.whole(name, shape, -64, 64, dtype) if whole else draw.real(name, shape, dtype=dtype)


class Weight(torch.nn.Module):
    """A parameter whose gradient is the input."""

    def __init__(self, rows: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, COLUMNS))

    def forward(self, g: torch.Tensor) -> torch.Tensor:
        return (self.weight * g).sum()


def reduce(name: str, rank: int, folder: pathlib.Path):
    """Rank 0 saves the whole reduced gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    replicas, shards, rows, dtype, _ = CASES[name]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{name}.store", rank=rank,
                                         world_size=replicas * shards)
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    model = Weight(rows)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"], mp_policy=policy)
    model(gradients(name)[rank]).backward()
    whole = model.weight.grad.full_tensor()
    if rank == 0:
        torch.save(whole, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def run_ranks() -> dict:
    """The reduced gradient of each case; a process a rank takes the cases that have such a rank."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        most = max(replicas * shards for replicas, shards, *_ in CASES.values())
        ranks = [subprocess.Popen([sys.executable, __file__, str(r), folder], env=env) for r in range(most)]
        if any([p.wait(timeout=600) for p in ranks]):
            raise RuntimeError("FSDP2 over gloo failed")
        return {name: torch.load(pathlib.Path(folder) / f"{name}.pt") for name in CASES}


def add_all(out):
    reduced = run_ranks()
    for name, (replicas, shards, rows, dtype, whole) in CASES.items():
        grads = gradients(name)
        ranks = replicas * shards
        # Two ranks' sum has one order; so have whole numbers.
        compare = "bits" if ranks == 2 or whole else "bound"
        line = f"scatter grad={'bf16' if dtype == torch.bfloat16 else 'f32'} divisor={ranks} fold_blocks=on"
        out.add("scatter", f"torch {torch.__version__.split('+')[0]} fully_shard, gloo", name, line,
                {"grad": grads[:, None], "blocks": torch.arange(ranks)}, {"shard": reduced[name][None]},
                compare=compare, flags=["UnevenRows"] if rows % shards else [])


def main():
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    for name, (replicas, shards, *_) in CASES.items():
        if rank < replicas * shards:
            reduce(name, rank, folder)


if __name__ == "__main__":
    main()
