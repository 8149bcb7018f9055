"""Seconds and peak anonymous memory of a piece of work, for the summary of a build.

RssAnon leaves out weights that are mapped from files, which the kernel can drop; it is what decides
whether a machine is large enough.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
INTERVAL_S = 0.02


def anonymous_bytes() -> int:
    """Return RssAnon of this process in bytes (proc_pid_status(5)), 0 where there is no /proc."""
    try:
        text = STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Meter:
    """Measures a ``with`` block.

    Attributes:
        seconds_s: wall time of the block, known when it ends.
        peak_anon_bytes: highest RssAnon seen, sampled every 20 ms.
    """

    def __init__(self) -> None:
        self.seconds_s = 0.0
        self.peak_anon_bytes = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory-meter", daemon=True)

    def __enter__(self) -> Meter:
        self._started_s = time.monotonic()
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()
        self.seconds_s = time.monotonic() - self._started_s

    def _sample(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self.peak_anon_bytes = max(self.peak_anon_bytes, anonymous_bytes())
