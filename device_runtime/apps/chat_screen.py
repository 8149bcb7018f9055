"""The foot of the terminal that is repainted in place, and the state of the terminal meanwhile.

Invariant: permanent lines are written once and never touched again; only live lines, which all
fit on the screen, are. Every write leaves the terminal's modes as it found them.
"""

from __future__ import annotations

import re
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.cells import cell_len
from rich.console import ConsoleDimensions

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
# xterm control sequences (invisible-island.net/xterm/ctlseqs): synchronized output keeps half a
# repaint off the screen where it is known; autowrap is off so that an emoji which this terminal
# draws wider than we count cannot push the rest one row down.
_BEGIN = "\x1b[?2026h\x1b[?25l\x1b[?7l"
_END = "\x1b[?7h\x1b[?25h\x1b[?2026l"
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"


class LiveScreen:
    """Writes lines that stay, and below them lines that the next call replaces.

    Lines are strings with styles (SGR sequences) and nothing else that a terminal obeys.

    Args:
        write: puts a string on the terminal at once.
        size: returns columns and rows of the terminal.
    """

    def __init__(self, write: Callable[[str], None], size: Callable[[], ConsoleDimensions]) -> None:
        self._write = write
        self._size = size
        self._live: list[str] = []
        self._columns = size().width

    def show(self, permanent: Sequence[str], live: Sequence[str]) -> None:
        """Write permanent lines where the live ones stood, and new live lines below them.

        The cursor rests behind the last live line; without one, at the start of an empty line.
        """
        new = [*permanent, *live]
        is_resized = self._size().width != self._columns
        first = self._first_difference(new)
        if len(new) < len(self._live) or not live:
            first = min(first, max(0, len(new) - 1))  # the cursor has to end on a written line
        if first == len(new) == len(self._live):
            self._live = list(live)
            return
        parts = [_BEGIN]
        if first < len(self._live):
            num_rows_up = self._num_rows(first) - 1
            parts.append(f"\x1b[{num_rows_up}A\r" if num_rows_up else "\r")
            if is_resized or len(new) < len(self._live):
                parts.append(_ERASE_BELOW)
        elif self._live:
            parts.append("\r\n")
        parts.append("\r\n".join(_ERASE_LINE + line for line in new[first:]))
        parts += ["\r\n" if new and not live else "", _END]
        self._write("".join(parts))
        self._live = list(live)

    def _first_difference(self, new: Sequence[str]) -> int:
        """Return the first line to write again."""
        columns, rows = self._size()
        first = 0
        if columns == self._columns:
            shorter = min(len(new), len(self._live))
            while first < shorter and new[first] == self._live[first]:
                first += 1
        self._columns = columns
        while first < len(self._live) and self._num_rows(first) > rows:
            first += 1  # the window became lower: what left it above cannot be reached
        return min(first, len(new))

    def _num_rows(self, first: int) -> int:
        """Return the rows of the live lines from ``first`` on, folded as the terminal does."""
        cells = (cell_len(_STYLE.sub("", line)) for line in self._live[first:])
        return sum(max(1, -(-count // self._columns)) for count in cells)


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keep what is typed during an answer off the screen; it waits for the next prompt.

    Ctrl-C still raises its signal. Does nothing where standard input is no terminal.
    """
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        yield
        return
    quiet = list(before)
    quiet[3] &= ~(termios.ECHO | termios.ECHONL)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with suppress(OSError, termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
