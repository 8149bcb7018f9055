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
_NUM_INTERVALS = 8


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
        self._intervals_s: deque[float] = deque(maxlen=_NUM_INTERVALS)
        self._last_s: float | None = None

    def collected(self, *, is_more: bool) -> None:
        """Note that a step was collected.

        The shortest interval of late counts. After a delay of the host, steps that were done
        meanwhile are collected at once: whenever the queue was not deep enough it gets deeper.

        Args:
            is_more: other steps were outstanding meanwhile, so that the next one takes its own
                time from now on, not that of a queue that was empty.
        """
        now_s = self._clock()
        if self._last_s is not None:
            self._intervals_s.append(now_s - self._last_s)
            step_s = max(min(self._intervals_s), 1e-6)
            self.num_steps = min(self._most, math.ceil(COVERED_S / step_s))
        self._last_s = now_s if is_more else None
