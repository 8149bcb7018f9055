"""Saves the activations of a long run now and then, so that a kill costs a minute, not hours."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from device_runtime.package_format.durable import replacing
from host_tools.decoder.stream import Activations

QUICK_SAVE_S = 6.0
"""A tenth of a minute; a large model's states are gigabytes, for which slow disks take longer."""

_NAME = re.compile(r"^before-(\d{5})\.states$")


class Snapshots:
    """Activations on disk, at most one set, that of the latest layer.

    The file's name says which layer comes next; it holds the states of every stream as they lie in
    memory, one after another.

    Attributes:
        folder: belongs to the run alone.
    """

    def __init__(
        self,
        folder: Path,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the folder.

        Args:
            folder: belongs to the run alone.
            interval_s: work that may be lost where the disk is fast.
            clock: for tests.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._interval_s = self._due_s = interval_s
        self._clock = clock
        self._saved_s = clock()

    def is_due(self) -> bool:
        """Tell whether enough work was done since the last time."""
        return self._clock() - self._saved_s >= self._due_s

    def save(self, next_layer: int, streams: Sequence[Activations]) -> None:
        """Save the activations that enter ``next_layer`` and drop older ones.

        Where that takes longer than `QUICK_SAVE_S` the interval grows as many times.
        """
        started_s = self._clock()
        path = self.folder / f"before-{next_layer:05d}.states"
        with replacing(path) as stream:
            for part in _parts(streams):
                for sample in part:
                    stream.write(sample.cpu().contiguous().numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        for other in self.folder.iterdir():
            if _NAME.match(other.name) and other != path:
                other.unlink()
        self._saved_s = self._clock()
        self._due_s = self._interval_s * max(1.0, (self._saved_s - started_s) / QUICK_SAVE_S)

    def load(self, streams: Sequence[Activations]) -> int:
        """Fill the activations from the latest snapshot.

        Returns:
            The layer that comes next; 0, and nothing filled, when there is no whole snapshot.
        """
        expected = sum(activations.num_bytes for activations in streams)
        for path in sorted(self.folder.iterdir(), reverse=True):
            match = _NAME.match(path.name)
            if match is None or path.stat().st_size != expected:
                continue
            saved = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
            start = 0
            for part in _parts(streams):
                values = saved[start : start + part.nbytes].view(part.dtype).view_as(part)
                for sample, value in zip(part, values, strict=True):
                    sample.copy_(value)
                start += part.nbytes
            return int(match[1])
        return 0


def _parts(streams: Sequence[Activations]) -> list[torch.Tensor]:
    return [part for activations in streams for part in activations.parts()]
