"""SIGTERM and SIGHUP, a shutdown and a lost connection: there is time to clean up."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 1.0
"""Until the same is tried again: what a handler raises inside a finalizer is lost."""

_NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Clean up on SIGTERM and on a lost connection as on Ctrl-C.

    Once: a terminal that goes away says so itself and through its shell, and the second signal must
    not break off the cleaning up.
    """
    is_ending = False

    def interrupt() -> None:
        nonlocal is_ending
        if not is_ending:
            is_ending = True
            raise KeyboardInterrupt

    with on_end(interrupt):
        yield


@contextmanager
def on_end(act: Callable[[], None]) -> Iterator[None]:
    """Call something when SIGTERM or SIGHUP comes, and again each second until the block ends.

    For the main thread.

    Args:
        act: runs inside a signal handler; what it raises is raised in the block.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        act()

    before = {}
    for number in _NUMBERS:
        # nohup's choice to ignore a hang-up stands.
        if signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
