"""Take terminal control out of text that a model wrote, delta by delta."""

from __future__ import annotations

import re
from enum import Enum, auto

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ESC, _BEL, _CSI, _ST = "\x1b", "\x07", "\x9b", "\x9c"
_STRING_FINALS = frozenset("P]X^_")  # DCS OSC SOS PM APC after ESC
_STRING_STARTS = frozenset("\x90\x98\x9d\x9e\x9f")  # the same five as C1 characters

MAX_SEQUENCE_CHARS = 1024
"""A sequence that has not ended by then was none: what follows is text again."""


class _State(Enum):
    TEXT = auto()
    ESCAPE = auto()
    CSI = auto()
    STRING = auto()
    STRING_ESCAPE = auto()


class ControlFilter:
    """Removes control sequences and control characters; a sequence may span deltas.

    What the model says is untrusted: escape sequences could retitle the window, write the
    clipboard or hide text. Sequences are those of ECMA-48 section 5: ESC with one final, CSI to
    its final byte, and the string types (OSC, DCS, SOS, PM, APC) to their terminator. A newline
    ends any of them, so a broken sequence costs at most one line. Newline and tab stay, carriage
    return goes.
    """

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._num_skipped = 0

    def feed(self, text: str) -> str:
        """Return the printable part of the next delta."""
        if self._state is _State.TEXT and not _CONTROL.search(text):
            return text
        return "".join(char for char in text if self._passes(char))

    def _passes(self, char: str) -> bool:
        if self._state is _State.TEXT:
            return self._passes_as_text(char)
        self._num_skipped += 1
        if char == "\n" or self._num_skipped > MAX_SEQUENCE_CHARS:
            self._state = _State.TEXT
            return self._passes_as_text(char)
        if self._state is _State.ESCAPE:
            return self._after_escape(char)
        if self._state is _State.CSI:
            return self._inside_csi(char)
        return self._inside_string(char)

    def _passes_as_text(self, char: str) -> bool:
        if not _CONTROL.match(char):
            return True
        self._num_skipped = 0
        if char == _ESC:
            self._state = _State.ESCAPE
        elif char == _CSI:
            self._state = _State.CSI
        elif char in _STRING_STARTS:
            self._state = _State.STRING
        return False

    def _after_escape(self, char: str) -> bool:
        if char == "[":
            self._state = _State.CSI
        elif char in _STRING_FINALS:
            self._state = _State.STRING
        elif not " " <= char <= "/":  # an intermediate byte keeps the sequence open
            self._state = _State.TEXT
            return not "0" <= char <= "~" and self._passes_as_text(char)
        return False

    def _inside_csi(self, char: str) -> bool:
        if " " <= char <= "?":
            return False
        self._state = _State.TEXT
        return not "@" <= char <= "~" and self._passes_as_text(char)

    def _inside_string(self, char: str) -> bool:
        if self._state is _State.STRING_ESCAPE:
            self._state = _State.STRING
            if char == "\\":
                self._state = _State.TEXT
                return False
        if char in (_BEL, _ST):
            self._state = _State.TEXT
        elif char == _ESC:
            self._state = _State.STRING_ESCAPE
        return False


def printable(text: str) -> str:
    """Return a whole text without control sequences."""
    return ControlFilter().feed(text)
