"""HTML and SVG from nested calls: every text is escaped, so a hostile name stays a name."""

from __future__ import annotations

import html
from collections.abc import Sequence

VOID_TAGS = frozenset({"meta"})
REPLACEMENT = "�"


class Markup(str):
    """Text that is markup already; only this module and what it is built from make it."""

    __slots__ = ()


Child = Markup | str | None


def visible(text: str) -> str:
    """Return text without what changes its direction, hides or cannot be written as UTF-8."""
    return "".join(letter if letter.isprintable() else REPLACEMENT for letter in text)


def element(tag: str, *children: Child, **attributes: str | float | None) -> Markup:
    """Return one element.

    Args:
        tag: its name.
        children: text, which is escaped, or elements; None is left out.
        attributes: by name, ``class_`` for ``class``, ``_`` standing for ``-``; None is left out.
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None:
            shown = number(value) if isinstance(value, (int, float)) else visible(value)
            key = name.rstrip("_").replace("_", "-")
            parts.append(f' {key}="{html.escape(shown, quote=True)}"')
    parts.append(">")
    if tag in VOID_TAGS:
        return Markup("".join(parts))
    parts.append(joined(*children))
    parts.append(f"</{tag}>")
    return Markup("".join(parts))


def joined(*children: Child) -> Markup:
    """Return children one after the other, text escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(visible(child), quote=True)
            for child in children
            if child is not None
        )
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[Child]], *, num_words: int = 1) -> Markup:
    """Return a table whose first ``num_words`` columns hold words and whose others hold numbers."""

    def kind(column: int) -> str | None:
        return None if column < num_words else "number"

    return element(
        "table",
        element(
            "thead",
            element("tr", *(element("th", h, class_=kind(i)) for i, h in enumerate(heads))),
        ),
        element(
            "tbody",
            *(
                element("tr", *(element("td", cell, class_=kind(i)) for i, cell in enumerate(row)))
                for row in rows
            ),
        ),
    )


def number(value: float) -> str:
    """Return a coordinate: at most two digits after the point."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
