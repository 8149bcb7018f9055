"""Paint a growing answer from a thread of its own, so that the engine never waits for it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from device_runtime.apps.chat_screen import LiveScreen
from device_runtime.apps.chat_stream import AnswerStream, PlainStream

MIN_PAINT_INTERVAL_S = 0.06
MAX_PAINT_SHARE = 0.2
"""Painting takes at most this share of one core, however slow the board."""
SWITCH_INTERVAL_S = 0.5e-3
"""How long painting may keep the interpreter from the engine, whose queue of steps lasts 1.5 ms on
the fastest GPUs. Python's own 5 ms cost 2 % of 2000 tokens a second."""
DEFAULT_COLUMNS = 80
_NUM_ROWS_KEPT_FREE = 3
"""Rows of the screen that live text leaves to the status line and to the line above it."""


class AnswerView:
    """Shows one answer while it is generated; a context manager.

    Args:
        console: the terminal.
        stream: lays the answer out; this object owns it from now on.
        status: returns the status line for a width; called on the painting thread.
    """

    def __init__(
        self, console: Console, stream: AnswerStream, status: Callable[[int], Text]
    ) -> None:
        self._console = console
        self._stream = stream
        self._status = status
        self._screen = LiveScreen(self._write, lambda: console.size)
        self._lock = threading.Lock()
        self._pending: list[str] = []
        self._everything: list[str] = []
        self._is_done = threading.Event()
        self._failure: Exception | None = None
        self._switch_interval_s = sys.getswitchinterval()
        self._thread = threading.Thread(target=self._paint_until_done, name="paint", daemon=True)

    def __enter__(self) -> AnswerView:
        self._thread.start()
        sys.setswitchinterval(min(self._switch_interval_s, SWITCH_INTERVAL_S))
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the whole answer on the screen, without the status line."""
        self._is_done.set()
        try:
            self._thread.join()
        finally:
            sys.setswitchinterval(self._switch_interval_s)
        if self._failure is not None:
            self._show_plainly(self._failure)

    def feed(self, delta: str) -> None:
        """Take the next piece of text; returns at once."""
        with self._lock:
            self._pending.append(delta)

    def _paint_until_done(self) -> None:
        try:
            interval_s = MIN_PAINT_INTERVAL_S
            while not self._is_done.wait(interval_s):
                started = time.monotonic()
                self._paint()
                paint_s = time.monotonic() - started
                interval_s = max(MIN_PAINT_INTERVAL_S, paint_s / MAX_PAINT_SHARE)
            self._take_pending()
            self._show(self._stream.finish(self._console.width).permanent, ())
        except Exception as error:  # the answer goes on; it is shown without layout at its end
            self._failure = error

    def _paint(self) -> None:
        self._take_pending()
        width, height = self._console.size
        frame = self._stream.frame(width, max(1, height - _NUM_ROWS_KEPT_FREE))
        gap = (Text(),) if frame.live else ()
        self._show(frame.permanent, (*frame.live, *gap, self._status(width)))

    def _take_pending(self) -> None:
        with self._lock:
            delta = "".join(self._pending)
            self._pending.clear()
            self._everything.append(delta)
        if delta:
            self._stream.feed(delta)

    def _show(self, permanent: Sequence[Text], live: Sequence[Text]) -> None:
        self._screen.show(self._styled(permanent), self._styled(live))

    def _show_plainly(self, failure: Exception) -> None:
        """Print the whole answer again as text, and say why."""
        with self._lock:
            text = "".join((*self._everything, *self._pending))
        plain = PlainStream()
        plain.feed(text)
        note = Text(f"the answer could not be laid out ({failure}), here it is as text:", "yellow")
        self._show((note, Text(), *plain.finish(self._console.width).permanent), ())

    def _styled(self, lines: Sequence[Text]) -> list[str]:
        if not lines:
            return []
        with self._console.capture() as capture:
            self._console.print(Text("\n").join(lines), end="", soft_wrap=True)
        return capture.get().split("\n")

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class PlainView:
    """Shows one answer on a terminal that cannot move its cursor: text as it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = "\n"

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        """End the last line."""
        if not self._last.endswith("\n"):
            self.feed("\n")

    def feed(self, delta: str) -> None:
        """Print the next piece of text."""
        self._last = delta or self._last
        self._console.file.write(delta)
        self._console.file.flush()


def make_console(*, is_error: bool = False) -> Console:
    """Return a console that takes nothing it prints for markup or emoji codes."""
    console = Console(
        file=sys.stderr if is_error else sys.stdout, markup=False, emoji=False, highlight=False
    )
    if console.width < 1:  # COLUMNS=0 stands in the environment
        console.width = DEFAULT_COLUMNS
    return console
