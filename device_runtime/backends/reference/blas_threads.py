"""Keeps numpy's OpenBLAS from fighting with other programs for the cores.

OpenBLAS splits every product over its threads and waits for the last in a busy loop. Where another
program runs on one of the cores that wait costs up to twenty times what the split gains. So a step
that did not get the processor for most of its time is followed by steps on one thread, until a
trial with all of them goes well again.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CONTENDED_SHARE = 0.75
"""Below this share of processor time to time, a step on all threads was disturbed."""
FREE_SHARE = 0.95
"""From this share on, a step on one thread had a core to itself."""
FIRST_PAUSE = 8
LONGEST_PAUSE = 512
"""Steps on one thread before the next trial; the pause doubles with every trial that fails."""

_MAPS = Path("/proc/self/maps")
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)
_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS")


class ThreadGovernor:
    """Decides before every step how many threads BLAS uses."""

    def __init__(self, set_threads: Callable[[int], object], max_threads: int) -> None:
        self.num_threads = max_threads
        self._set_threads = set_threads
        self._max_threads = max_threads
        self._pause = FIRST_PAUSE
        self._steps_left = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch how much of its time the step inside gets the processor."""
        started, worked = time.perf_counter(), time.thread_time()
        yield
        elapsed = time.perf_counter() - started
        if elapsed > 0:
            self.learn((time.thread_time() - worked) / elapsed)

    def learn(self, share: float) -> None:
        """Choose the threads of the next step.

        Args:
            share: processor time over time of the last step, as its main thread saw them.
        """
        if self.num_threads > 1:
            if share >= CONTENDED_SHARE:
                self._pause = FIRST_PAUSE
                return
            self._use(1)
            self._steps_left = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return
        self._steps_left -= 1
        if self._steps_left <= 0 and share >= FREE_SHARE:
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
