"""Makes the vector sets of this folder: expected outputs come from the installed transformers, torch and ml_dtypes.

    python golden/generate.py [DIR]        (DIR: this folder; packages: requirements.txt)

One thread and portable kernels, so that a second run gives the same bytes. Values are drawn by a generator of our own
(SplitMix64), so they do not depend on torch's.
"""

import os
import sys

ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE",
               "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.update(ENVIRONMENT)

# pylint: disable=wrong-import-position
import pathlib
import platform
import shutil
import warnings

import ml_dtypes
import numpy as np
import safetensors
import torch
import transformers

import around
import blocks
import capacity
import formats
import gemma4
import gloo
import inkling
import invalid
import routes
import training
import vectors
import wrong
from families import FAMILIES

SEED = 1


def generator() -> dict:
    packages = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
                "ml_dtypes": ml_dtypes.__version__, "safetensors": safetensors.__version__, "numpy": np.__version__}
    return {"name": "golden/generate.py", "version": 1, "packages": packages,
            "python": ".".join(platform.python_version_tuple()[:2]), "environment": ENVIRONMENT, "seed": SEED}


def add_core(out: vectors.Set):
    for family in FAMILIES:
        routes.add_family(out, family)
        blocks.add_family(out, family)
    gemma4.add_all(out)
    inkling.add_all(out)
    routes.add_zaya(out)
    routes.add_zaya_routers(out)
    routes.add_balance(out)
    around.add_all(out)
    capacity.add_all(out)
    training.add_all(out)
    gloo.add_all(out)
    formats.add_all(out)
    invalid.add_all(out)


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent
    for name in ("core", "layer", "wrong"):
        shutil.rmtree(root / name, ignore_errors=True)
    core = vectors.Set(root / "core", "core", generator())
    add_core(core)
    # The test that the wrong answers are answers to; a set of its own, so that one response answers all of it.
    layer = vectors.Set(root / "layer", "layer", generator())
    blocks.add_block(layer, wrong.family(), torch.float32, False, "grouped_mm", wrong.family().k)
    print("core:", core.finish(), "tests; layer:", layer.finish())
    wrong.add_all(root)


if __name__ == "__main__":
    main()
