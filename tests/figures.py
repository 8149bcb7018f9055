"""Numbers that tests come across, kept for the record of a run: errors, perplexities.

A test notes them; the plugin that writes the results of a run takes them after each test.
"""

from __future__ import annotations

_FOUND: dict[str, float] = {}


def note(name: str, value: float) -> None:
    """Keep a number under a name; of several the largest."""
    _FOUND[name] = max(_FOUND.get(name, value), float(value))


def take() -> dict[str, float]:
    """Return what was noted since the last call."""
    found = dict(_FOUND)
    _FOUND.clear()
    return found
