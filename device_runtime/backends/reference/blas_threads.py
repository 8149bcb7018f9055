"""Keeps numpy's OpenBLAS from fighting with other programs for the cores.

OpenBLAS splits every product over its threads and waits for the last in a busy loop. Where another
program runs on one of the cores that wait costs up to thirty times what the split gains. So work
that did not get the processor for most of its time is followed by work on one thread, until a trial
with all of them goes well again.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

WINDOW_S = 0.005
"""Work is judged in pieces at least this long, so that a short interruption does not count."""
CONTENDED_SHARE = 0.75
"""Below this share of processor time to time, a piece on all threads was disturbed."""
FREE_SHARE = 0.95
"""From this share on, a piece on one thread had a core to itself."""
FIRST_PAUSE = 8
LONGEST_PAUSE = 512
"""Pieces on one thread before the next trial; the pause doubles with every trial that fails."""

_MAPS = Path("/proc/self/maps")
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)
_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS")


class ThreadGovernor:
    """Decides while a step runs how many threads BLAS uses."""

    def __init__(self, set_threads: Callable[[int], object], max_threads: int) -> None:
        self.num_threads = max_threads
        self._set_threads = set_threads
        self._max_threads = max_threads
        self._pause = FIRST_PAUSE
        self._pieces_left = 0
        self._started = self._worked = 0.0

    def begin(self) -> None:
        """Start to measure: what comes now is work, what came before was waiting for some."""
        self._started, self._worked = time.perf_counter(), time.thread_time()

    def mark(self) -> None:
        """Judge the work since the last time, if it was long enough; call it after each layer."""
        elapsed = time.perf_counter() - self._started
        if elapsed >= WINDOW_S:
            self.learn((time.thread_time() - self._worked) / elapsed)
            self.begin()

    def learn(self, share: float) -> None:
        """Choose the threads of what comes next.

        Args:
            share: processor time over time of a piece of work, as its main thread saw them.
        """
        if self.num_threads > 1:
            if share >= CONTENDED_SHARE:
                self._pause = FIRST_PAUSE
                return
            self._use(1)
            self._pieces_left = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return
        self._pieces_left -= 1
        if self._pieces_left <= 0 and share >= FREE_SHARE:
            self._use(self._max_threads)

    def _use(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._set_threads(num_threads)


def make_governor() -> ThreadGovernor:
    """Return a governor of numpy's OpenBLAS; one that changes nothing where there is none.

    What the user sets in ``OPENBLAS_NUM_THREADS`` or ``OMP_NUM_THREADS`` stays.
    """
    num_cores = len(os.sched_getaffinity(0))
    setter = None if any(os.environ.get(name) for name in _SETTINGS) else _find_setter()
    if setter is None or num_cores < 2:
        return ThreadGovernor(lambda _: None, 1)
    setter(num_cores)
    return ThreadGovernor(setter, num_cores)


def _find_setter() -> Callable[[int], object] | None:
    """Return the function of the OpenBLAS that numpy has loaded, under one of its names."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "openblas" in line}
    for path in sorted(paths):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for name in _SETTERS:
            function = getattr(library, name, None)
            if function is not None:
                function.argtypes, function.restype = [ctypes.c_int], None
                return lambda count, call=function: call(count)  # type: ignore[misc]
    return None
