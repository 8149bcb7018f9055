"""Where the time of a stage goes: forward, search, packing, disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from device_runtime.package_format.amounts import format_duration

if TYPE_CHECKING:  # records are read without torch
    import torch

Shares = dict[str, dict[str, float]]
"""What a stage record keeps: seconds by phase, of the stage's own thread and beside it."""

WINDOWS = "drawing windows"
READING = "reading"
FORWARD = "forward"
SEARCH = "search"
PACKING = "packing"
DISK = "disk"
HASHING = "hashing"
WAITING = "waiting"
OTHER = "other"
TOTAL = "total"


class Span:
    """One block that was timed.

    Attributes:
        seconds_s: that it took, known when it is over.
    """

    seconds_s = 0.0


class PhaseTimes:
    """Sums the seconds of named phases.

    Phases of the thread that made this one follow each other and add up to the total; those of
    other threads run beside them and are kept apart.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._started_s = clock()
        self._own: dict[str, float] = {}
        self._beside: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, device: torch.device | None = None) -> Iterator[Span]:
        """Count the block as part of ``name``, with what it started on ``device``.

        Phases do not nest.
        """
        span, started_s = Span(), self._clock()
        try:
            yield span
            if device is not None and device.type == "cuda":
                import torch

                torch.cuda.synchronize(device)
        finally:
            span.seconds_s = self._clock() - started_s
            seconds = self._own if threading.get_ident() == self._thread else self._beside
            with self._lock:
                seconds[name] = seconds.get(name, 0.0) + span.seconds_s

    def shares(self) -> Shares:
        """Return the seconds so far: of each phase, of the rest and in all."""
        with self._lock:
            total = self._clock() - self._started_s
            own = {**self._own, OTHER: total - sum(self._own.values()), TOTAL: total}
            return {
                "seconds": {name: round(value, 3) for name, value in own.items()},
                "seconds_beside": {name: round(value, 3) for name, value in self._beside.items()},
            }

    def summary(self, title: str) -> str:
        """Return one line for a person: phases with their shares, the longest first.

        ``quantize took 1 min 35 s: search 75 s (79%), forward 12 s (13%); beside it packing 9.0 s``
        """
        shares = self.shares()
        own, beside = shares["seconds"], shares["seconds_beside"]
        total = own.pop(TOTAL)
        listed = ", ".join(
            f"{name} {format_duration(value)} ({100 * value / total:.0f}%)"
            for name, value in _longest_first(own, total)
        )
        line = f"{title} took {format_duration(total)}: {listed}"
        also = ", ".join(
            f"{name} {format_duration(value)}" for name, value in _longest_first(beside, total)
        )
        return f"{line}; beside it {also}" if also else line


def _longest_first(seconds: dict[str, float], total: float) -> list[tuple[str, float]]:
    """Leave out what is below half a percent."""
    shown = [item for item in seconds.items() if item[1] >= total / 200]
    return sorted(shown, key=lambda item: -item[1])
