"""SIGTERM and SIGHUP, a shutdown and a lost connection: there is time to clean up."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """Clean up on SIGTERM and on a lost connection as on Ctrl-C."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with on_end(interrupt):
        yield


@contextmanager
def on_end(act: Callable[[], None]) -> Iterator[None]:
    """Call something when SIGTERM or SIGHUP comes, while the block runs; for the main thread.

    Once only: a terminal that goes away says so itself and through its shell, and the second signal
    must not break off what the first one began.

    Args:
        act: runs inside a signal handler; what it raises is raised in the block.
    """
    is_ending = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_ending
        if not is_ending:
            is_ending = True
            act()

    before = {}
    for number in _NUMBERS:
        # nohup's choice to ignore a hang-up stands.
        if signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
