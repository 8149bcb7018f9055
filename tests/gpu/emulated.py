"""What of a run differs where the CPU emulator stands for the GPU, scripts/test-gpu --emulated."""

from __future__ import annotations

import os
from pathlib import Path

IS_ON = "TURBOJET_EMULATED" in os.environ
CLOCK = {"TURBOJET_EMULATED": "clock", "REPEATS": "1"} if IS_ON else {}
"""For benchmarks: a device that computes nothing but whose time goes on."""
SMALL = {}
"""Of each file the tests that the emulator runs in seconds, as pytest's -k has it."""


def selection(file: str) -> list[str]:
    """Return what pytest is told beside a file's name."""
    return ["-k", SMALL[file]] if IS_ON and file in SMALL else []


def write_cubins(folder: Path) -> None:
    """Write what stands for the cubins of the emulated GPU."""
    from emulated_cuda import write_emulated_cubins  # tests/unit, which sitecustomize.py adds

    write_emulated_cubins(folder)
