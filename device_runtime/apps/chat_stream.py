"""Lay out an answer while it grows: what can no longer change is handed out once, for good.

The screen then needs to repaint only the block that is still open, however long the answer is.
Invariant: the permanent lines of all calls, joined, hold every word of the answer once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from rich.text import Text

from device_runtime.apps.chat_markdown import MarkdownLayout, is_blank
from device_runtime.apps.chat_wrap import fold

_NUM_OPEN_CODE_LINES = 2
"""The newest lines of open code may still turn out to be its closing fence."""
_NUM_OPEN_PARAGRAPH_LINES = 2
"""An underline makes the line before it a heading, or the head of a table."""


@dataclass(frozen=True)
class Frame:
    """One state of the screen: lines to keep, and lines that the next frame replaces."""

    permanent: tuple[Text, ...]
    live: tuple[Text, ...]


class AnswerStream(Protocol):
    """Turns deltas into frames."""

    def feed(self, delta: str) -> None:
        """Take the next piece of text."""

    def frame(self, width: int, max_live_lines: int) -> Frame:
        """Return what became final since the last frame, and the part that is still open."""

    def finish(self, width: int) -> Frame:
        """Return all that is left as permanent lines."""


@dataclass(frozen=True)
class _Piece:
    """A block, or one item of a list, in lines ``start`` to ``end`` of the open source."""

    start: int
    end: int
    kind: str
    has_gap: bool


class MarkdownStream:
    """Markdown, block by block.

    Whole blocks, items of a list and lines of code become permanent as soon as what follows them
    is known. A paragraph or table taller than the screen shows its end until it is complete.
    """

    def __init__(self, layout: MarkdownLayout) -> None:
        self._layout = layout
        self._open = ""
        self._num_frozen_code_lines = 0
        self._has_gap = False  # an empty line belongs before the open source

    def feed(self, delta: str) -> None:
        """Take the next piece of text."""
        self._open += delta

    def frame(self, width: int, max_live_lines: int) -> Frame:
        """Return what became final since the last frame, and the newest lines of the rest."""
        permanent = self._take_finished_pieces(width)
        live = self._open_lines(width)
        if len(live) > max_live_lines:
            taken = self._take_code_lines(width) or self._take_paragraph_lines(width)
            if taken:
                permanent += taken
                live = self._open_lines(width)
        return Frame(tuple(permanent), tuple(live[-max_live_lines:]))

    def finish(self, width: int) -> Frame:
        """Return all that is left as permanent lines."""
        permanent = self._take_finished_pieces(width) + self._open_lines(width)
        self._open = ""
        return Frame(tuple(permanent), ())

    def _open_lines(self, width: int) -> list[Text]:
        if not self._open.strip():
            return []
        lines = self._layout.lines(self._open, width, self._num_frozen_code_lines)
        return [Text(), *lines] if self._has_gap else lines

    def _complete_lines(self) -> list[str]:
        return self._open[: self._open.rfind("\n") + 1].split("\n")[:-1]

    def _take_finished_pieces(self, width: int) -> list[Text]:
        pieces = self._pieces()
        if len(pieces) < 2:
            return []
        lines = self._complete_lines()
        permanent: list[Text] = []
        for piece, following in pairwise(pieces):
            source = "\n".join(lines[piece.start : piece.end])
            if self._has_gap:
                permanent.append(Text())
            permanent += self._layout.lines(source, width, self._num_frozen_code_lines)
            self._num_frozen_code_lines = 0
            self._has_gap = following.has_gap
        self._drop_lines(pieces[-1].start)
        return permanent

    def _pieces(self) -> list[_Piece]:
        """Split the complete lines; the last piece is the one that may still grow."""
        lines = self._complete_lines()
        pieces: list[_Piece] = []
        is_first_item = True
        for token in self._layout.parser.parse("\n".join(lines)):
            if token.map is None or token.nesting < 0:
                continue
            start, end = token.map
            if token.level == 0 and token.type.endswith("_list_open"):
                is_first_item = True
            elif token.level == 0:
                pieces.append(_Piece(start, end, token.type, has_gap=True))
            elif token.level == 1 and token.type == "list_item_open":
                has_gap = is_first_item or is_blank(lines[start - 1])
                pieces.append(_Piece(start, end, token.type, has_gap))
                is_first_item = False
        return pieces

    def _take_code_lines(self, width: int) -> list[Text]:
        """Freeze complete lines of an open code block that fills the screen."""
        pieces = self._pieces()
        if not pieces or pieces[0].kind != "fence":
            return []
        num_code_lines = len(self._complete_lines()) - 1 - pieces[0].start
        num_frozen = num_code_lines - _NUM_OPEN_CODE_LINES
        if num_frozen <= self._num_frozen_code_lines:
            return []
        everything = self._open_lines(width)
        self._has_gap = False
        self._num_frozen_code_lines = num_frozen
        return everything[: len(everything) - len(self._open_lines(width))]

    def _take_paragraph_lines(self, width: int) -> list[Text]:
        """Cut a paragraph that fills the screen at one of its newlines."""
        pieces = self._pieces()
        lines = self._complete_lines()
        num_taken = len(lines) - _NUM_OPEN_PARAGRAPH_LINES
        if len(pieces) != 1 or pieces[0].kind != "paragraph_open" or num_taken < 1:
            return []
        whole = self._layout.lines(self._open, width)
        taken = self._layout.lines("\n".join(lines[:num_taken]), width)
        rest = self._open.split("\n", num_taken)[num_taken].lstrip(" \t")
        if taken + self._layout.lines(rest, width) != whole:
            return []  # emphasis spans the cut, or the rest would read as another block
        permanent = [Text(), *taken] if self._has_gap else taken
        self._open = rest
        self._has_gap = False
        return permanent

    def _drop_lines(self, count: int) -> None:
        self._open = self._open.split("\n", count)[count]


class PlainStream:
    """Text as it comes, folded at the edge of the screen."""

    def __init__(self) -> None:
        self._open = ""

    def feed(self, delta: str) -> None:
        """Take the next piece of text."""
        self._open += delta

    def frame(self, width: int, max_live_lines: int) -> Frame:
        """Return the complete lines, and the newest rows of the open one."""
        *complete, self._open = self._open.split("\n")
        permanent = [row for line in complete for row in fold(Text(line), width)]
        return Frame(tuple(permanent), tuple(fold(Text(self._open), width)[-max_live_lines:]))

    def finish(self, width: int) -> Frame:
        """Return all that is left as permanent lines."""
        permanent = self.frame(width, 1).permanent
        rest, self._open = self._open, ""
        return Frame((*permanent, *(fold(Text(rest), width) if rest else ())), ())
