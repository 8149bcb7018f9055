"""Text that others wrote, on its way to a terminal: shown, never obeyed."""

from __future__ import annotations

import json
import sys


def one_line(text: str) -> str:
    r"""Return text with escapes such as ``\x1b`` in place of all that is not printable."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def json_text(value: object, indent: int | None = None) -> str:
    """Return JSON that is readable and that a terminal can be shown."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=indent, ensure_ascii=not is_unicode)
    return "".join(
        char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text
    )
