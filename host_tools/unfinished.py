"""Keeps what a killed run has finished for one that computes alike, and for no other.

Which processor multiplies, which kernels search and which torch sends them decides the last bits
of a sum. A run that went on with layers of another kind would end with bytes that neither gives.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from device_runtime.package_format.durable import write_atomically
from host_tools.progress import Progress

COMPUTED_ON = "computed-on.txt"
"""In the folder of what is finished so far."""


def computed_on(devices: Sequence[torch.device]) -> str:
    """Return in words what computes: "NVIDIA H200, torch 2.9.1"; how many makes no difference."""
    kinds = dict.fromkeys(_kind(device) for device in devices)
    return f"{' and '.join(kinds)}, torch {torch.__version__}"


def keep_finished(scratch: Path, place: str, stage: str, progress: Progress) -> None:
    """Empty the folder of what is finished so far unless it was computed on the same ``place``.

    Args:
        scratch: belongs to the run alone.
        place: what computes, in words.
        stage: the verb.
        progress: is told what is lost.
    """
    path = scratch / COMPUTED_ON
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before == place:
        return
    if before is not None:
        progress.note(
            f"{stage}: an earlier run computed on {before}, this one computes on {place}, whose "
            f"last bits differ; it begins again"
        )
    shutil.rmtree(scratch)
    scratch.mkdir()
    write_atomically(path, place.encode())


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
