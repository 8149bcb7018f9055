"""How many steps are queued behind the one whose tokens the host waits for.

Queued steps keep the device busy while the host is late. But what is queued comes before a sequence
that joins or the end of one that is cancelled, so that slow steps are not queued deep.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

COVERED_S = 10e-3
"""How late the host may be before the device has nothing to do: 9 ms was its longest gap between
tokens while an answer is painted, 3 ms since painting hands the interpreter over (DECISIONS.md)."""
_AT_ONCE_S = 1e-3
"""A step that is collected in less was done before the host asked for it."""
_NUM_STEPS = 8
"""Steps that count, the newest ones."""


class RunAhead:
    """Learns from the times at which steps are collected; one for an engine.

    Attributes:
        num_steps: to be outstanding beside the one that is collected next.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start as deep as the backend allows.

        Args:
            most: `Backend.max_steps_ahead`.
            clock: seconds.
        """
        self.num_steps = most
        self._most = most
        self._clock = clock
        self._steps_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._last_s: float | None = None

    def collect(
        self, collect: Callable[[], list[tuple[int, int]]], *, is_more: bool
    ) -> list[tuple[int, int]]:
        """Return what `Backend.collect` does, and learn how long the step took.

        The shortest of late counts, and one that was done before the host came counts as 0: then
        the host was late, and for a while the queue is as deep as it may be.

        Args:
            collect: of the backend.
            is_more: other steps are outstanding, so that the next one takes its own time from now
                on, not that of a queue that is empty.
        """
        asked_s = self._clock()
        drawn = collect()
        now_s = self._clock()
        if self._last_s is not None:
            is_late = now_s - asked_s < _AT_ONCE_S
            self._steps_s.append(0.0 if is_late else now_s - self._last_s)
            step_s = max(min(self._steps_s), 1e-6)
            self.num_steps = min(self._most, math.ceil(COVERED_S / step_s))
        self._last_s = now_s if is_more else None
        return drawn
