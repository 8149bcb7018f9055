"""Ends an answer at a text, wherever tokens happen to cut it."""

from __future__ import annotations


class StopStrings:
    """Lets text pass until one of the stop strings is complete.

    Text that could be the start of a stop string waits until it is decided.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.found: str | None = None
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that is free to go; sets ``found`` when a stop string is complete.

        What follows the stop string, and the string itself, is dropped.
        """
        if self.found is not None:
            return ""
        buffer = self._held + text
        if not self._stops:
            return buffer
        complete = [
            (place + len(stop), place, stop)
            for stop in self._stops
            if (place := buffer.find(stop)) >= 0
        ]
        if complete:
            # The one that ends first: tokens that cut the text elsewhere give the same answer.
            _, place, self.found = min(complete)
            self._held = ""
            return buffer[:place]
        undecided = max((_overlap(buffer, stop) for stop in self._stops), default=0)
        free = len(buffer) - undecided
        self._held = buffer[free:]
        return buffer[:free]

    def flush(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that only starts ``stop``."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
