"""How a stage tells a person how far it is: bars on a terminal, plain lines elsewhere, or nothing.

Everything goes to stderr: stdout belongs to results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.progress import Task as RichBar
from rich.text import Text

from device_runtime.package_format.amounts import format_bytes, format_duration

PLAIN_INTERVAL_S = 5.0
"""Seconds between the first plain lines of one task: a person sees life."""

MAX_PLAIN_INTERVAL_S = 60.0
PLAIN_LINES = 20
"""A line comes after a twentieth of the time so far: a log of hours stays readable."""

BYTES = "bytes"
"""The unit that is shown as MB and MB/s."""


def format_amount(completed: float, total: float | None, unit: str) -> str:
    """Return ``"3 of 30 layers"``, ``"1.2 MB of 98.2 MB"`` or, without a total, ``"3 layers"``."""
    if unit == BYTES:
        done = format_bytes(completed)
        return done if total is None else f"{done} of {format_bytes(total)}"
    done = f"{completed:.0f}" if total is None else f"{completed:.0f} of {total:.0f}"
    return f"{done} {unit}".rstrip()


class Task:
    """One piece of work with an end; this base counts and shows nothing.

    Attributes:
        title: what is being done, as a person would say it.
        total: units of work in all, None while unknown.
        completed: units done.
        unit: what is counted ("layers", "samples"), or :data:`BYTES`.
        found: units that were done before the task began.
    """

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        self.title = title
        self.total = total
        self.completed: float = 0
        self.unit = unit
        self.found: float = 0

    def begin_at(self, completed: float) -> None:
        """Say how much an earlier run has left done: it tells nothing about the speed."""
        self.found = completed
        self.move_to(completed)

    def advance(self, amount: float = 1) -> None:
        """Count ``amount`` more units as done."""
        self.move_to(self.completed + amount)

    def move_to(self, completed: float, total: float | None = None) -> None:
        """Say how much is done in all, and the total where it became known."""
        self.completed = completed
        if total is not None:
            self.total = total
        self._show()

    def finish(self) -> None:
        """Show the end; :meth:`Progress.task` calls it."""

    def _show(self) -> None:
        """Show the new state."""


class Progress:
    """Where stages report; this base is silent, as tests and libraries want it."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """Report one task for as long as the block runs.

        Args:
            title: what is being done ("calibrate").
            total: units of work, None while unknown.
            unit: what is counted; :data:`BYTES` is shown as MB.
        """
        task = self._start(title, total, unit)
        try:
            yield task
        finally:
            task.finish()

    def note(self, text: str) -> None:
        """Tell the person one fact that stays on the screen."""

    def _start(self, title: str, total: float | None, unit: str) -> Task:
        return Task(title, total, unit)


class PlainTask(Task):
    """Prints a line now and then, and one at the end."""

    def __init__(
        self,
        title: str,
        total: float | None,
        unit: str,
        *,
        stream: TextIO,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(title, total, unit)
        self._stream = stream
        self._clock = clock
        self._started_s = clock()
        self._shown_s = self._started_s

    def finish(self) -> None:
        """Print what was done and how long it took."""
        elapsed = format_duration(self._clock() - self._started_s)
        self._print(f"{self.title}: {self._amount()} in {elapsed}")

    def _show(self) -> None:
        now = self._clock()
        interval_s = max(PLAIN_INTERVAL_S, (now - self._started_s) / PLAIN_LINES)
        if now - self._shown_s < min(interval_s, MAX_PLAIN_INTERVAL_S):
            return
        self._shown_s = now
        line = f"{self.title}: {self._amount()}"
        if self.total and self.found < self.completed <= self.total:
            done = self.completed - self.found
            left_s = (now - self._started_s) * (self.total - self.completed) / done
            line += f", {100 * self.completed / self.total:.0f}%, {format_duration(left_s)} left"
        self._print(line)

    def _amount(self) -> str:
        return format_amount(self.completed, self.total, self.unit)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class PlainProgress(Progress):
    """Lines for a log file or a pipe."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    def note(self, text: str) -> None:
        """Print the fact as a line."""
        print(text, file=self._stream, flush=True)

    def _start(self, title: str, total: float | None, unit: str) -> Task:
        return PlainTask(title, total, unit, stream=self._stream, clock=self._clock)


class AmountColumn(ProgressColumn):
    """How much is done, in the unit of each task."""

    def render(self, task: RichBar) -> Text:
        """Return ``"3 of 30 layers"`` or ``"1.2 MB of 98.2 MB"``."""
        return Text(format_amount(task.completed, task.total, task.fields["unit"]))


class RichTask(Task):
    """One bar on a terminal."""

    def __init__(
        self,
        title: str,
        total: float | None,
        unit: str,
        *,
        bars: RichBars,
        close: Callable[[], None],
    ) -> None:
        super().__init__(title, total, unit)
        self._bars = bars
        self._close = close
        self._id: TaskID = bars.add_task(title, total=total, unit=unit)

    def finish(self) -> None:
        """Leave the bar as it is."""
        self._bars.stop_task(self._id)
        self._close()

    def _show(self) -> None:
        self._bars.update(self._id, completed=self.completed, total=self.total)


class RichProgress(Progress):
    """Bars with the time that is left, on a terminal; tasks that overlap share one display."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: RichBars | None = None
        self._num_open = 0

    def note(self, text: str) -> None:
        """Print the fact above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start(self, title: str, total: float | None, unit: str) -> Task:
        with self._lock:
            if self._bars is None:
                self._bars = RichBars(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    AmountColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=self._console,
                )
                self._bars.start()
            self._num_open += 1
            return RichTask(title, total, unit, bars=self._bars, close=self._close)

    def _close(self) -> None:
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


def make_progress(stream: TextIO | None = None) -> Progress:
    """Return bars when ``stream`` (stderr when None) is a terminal, else plain lines."""
    target = sys.stderr if stream is None else stream
    if target.isatty():
        return RichProgress(Console(file=target))
    return PlainProgress(target)
