"""How long work with bytes tells a person how far it is: a bar on a terminal, else plain lines.

Everything goes to stderr: stdout belongs to results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from device_runtime.package_format.amounts import format_bytes, format_duration

PLAIN_INTERVAL_S = 5.0
"""Seconds between two plain lines: a log stays readable, a person sees life."""

Report = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all), the latter None while unknown."""


@contextmanager
def byte_progress(title: str, stream: TextIO) -> Iterator[Report]:
    """Show progress for as long as the block runs.

    Args:
        title: what is being done ("install").
        stream: stderr.
    """
    if stream.isatty():
        with _bar(title, stream) as report:
            yield report
    else:
        yield PlainReport(title, stream)


class PlainReport:
    """Prints a line when an interval has passed: short work stays silent."""

    def __init__(
        self, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._start_s = self._shown_s = clock()

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        """Hear how far the work is."""
        now_s = self._clock()
        if now_s - self._shown_s < PLAIN_INTERVAL_S:
            return
        self._shown_s = now_s
        line = f"{self._title}: {format_bytes(done_bytes)}"
        if total_bytes and 0 < done_bytes <= total_bytes:
            left_s = (now_s - self._start_s) * (total_bytes / done_bytes - 1)
            line += f" of {format_bytes(total_bytes)}, {100 * done_bytes / total_bytes:.0f}%"
            line += f", {format_duration(left_s)} left"
        print(line, file=self._stream, flush=True)


@contextmanager
def _bar(title: str, stream: TextIO) -> Iterator[Report]:
    # rich takes a tenth of a second to import; what prints no bar does not wait for it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bars:
        task = bars.add_task(title, total=None)

        def report(done_bytes: int, total_bytes: int | None) -> None:
            bars.update(task, completed=done_bytes, total=total_bytes)

        yield report
