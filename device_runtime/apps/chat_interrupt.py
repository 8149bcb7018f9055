"""Ctrl-C as a wish that is looked at between tokens, not as an exception inside the engine."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class StopSignal:
    """While entered, the first Ctrl-C asks politely; the second raises KeyboardInterrupt.

    For the main thread.

    Args:
        ask: called by the first; runs inside a signal handler.

    Attributes:
        is_set: whether it was called.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self.is_set = False
        self._ask = ask

    def __enter__(self) -> StopSignal:
        """Take over SIGINT."""
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        self._ask()
