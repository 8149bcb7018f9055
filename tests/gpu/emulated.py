"""What of a run differs where the CPU emulator stands for the GPU, scripts/test-gpu --emulated."""

from __future__ import annotations

import os
from pathlib import Path

IS_ON = "TURBOJET_EMULATED" in os.environ
CLOCK = {"TURBOJET_EMULATED": "clock", "REPEATS": "1"} if IS_ON else {}
"""For benchmarks: a device that computes nothing but whose time goes on."""
SLOWER = 5 if IS_ON else 1
"""Times that the self test, which is run whole, takes longer than a GPU may."""
SMALL = {
    "test_cuda_backend.py": "prompt and online and int8-9]",
    "test_decode_attention.py": "lengths2-8-8]",
    "test_families.py": "llama",
    "test_head.py": "row_counts0 or rows_are_those_of_float64[64]",
    "test_layer_streaming.py": "not test",  # torch does not see this device
    "test_prefill_attention.py": "sequences2-8]",
    "test_process_end.py": "not memory",  # a process has a device of its own
    "test_sampling.py": "marked or True-1003-greedy]",
    "test_w4a16_gemm.py": "edges[8-add]",
    "test_w4a16_gemv.py": "edges[1-32-add]",
}
"""Of each file the tests that the emulator runs in seconds, as pytest's -k has it."""


def selection(file: str) -> list[str]:
    """Return what pytest is told beside a file's name."""
    return ["-k", SMALL[file]] if IS_ON and file in SMALL else []


def write_cubins(folder: Path) -> None:
    """Write what stands for the cubins of the emulated GPU."""
    from emulated_cuda import write_emulated_cubins  # tests/unit, which sitecustomize.py adds

    write_emulated_cubins(folder)
