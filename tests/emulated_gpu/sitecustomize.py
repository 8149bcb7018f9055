"""Puts a GPU made of host memory in place of libcuda in every Python process with this folder.

TURBOJET_EMULATED says which: with `kernels` they compute, on the CPU emulator; with `clock` only
the sampler does anything, but launches take time, and the shapes of synthetic models are tiny.
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS.parent), str(TESTS), str(TESTS / "unit")]

from device_runtime.kernels import libcuda  # noqa: E402

_DEVICES = []


def _load():
    if not _DEVICES:
        import emulated_cuda

        kind = {"kernels": emulated_cuda.EmulatedCuda, "clock": emulated_cuda.TimedCuda}
        _DEVICES.append(kind[os.environ["TURBOJET_EMULATED"]]())
    return _DEVICES[0]


libcuda._load = _load
sys.modules["pycuda.driver"] = None
if os.environ["TURBOJET_EMULATED"] == "clock":
    from dataclasses import replace

    from device_runtime.backends.synthetic import SHAPES

    for _name, _shape in SHAPES.items():
        SHAPES[_name] = replace(
            _shape,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=4,
            head_dim=64,
            vocab_size=400,
        )
