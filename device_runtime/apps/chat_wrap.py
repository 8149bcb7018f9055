"""Break styled text into lines of a terminal, Chinese and Japanese between characters."""

from __future__ import annotations

from rich.cells import get_character_cell_size
from rich.text import Text

_NOT_FIRST = frozenset(",.;:!?%)]}'\"、。，．：；？！）】》」』〉”’…—～·％々ー")
"""Characters that do not begin a line (the common part of JIS X 4051 and GB/T 15834)."""
_NOT_LAST = frozenset("([{（【《「『〈“‘")
"""Characters that do not end a line."""
_JOINER = "\u200d"


def wrap(text: Text, width: int) -> list[Text]:
    """Break a text at its newlines, blanks and wide characters.

    Blanks at a break vanish; a word wider than a line is cut where it must be.

    Args:
        text: any number of lines; tabs count as four columns.
        width: columns, at least 2 so that a wide character fits.
    """
    text.expand_tabs(4)
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        pieces = line.divide(break_offsets(line.plain, width))
        for piece in pieces:
            piece.rstrip()
        lines.extend(pieces)
    return lines


def fold(text: Text, width: int) -> list[Text]:
    """Break a text at its newlines and wherever a line is full, keeping every blank."""
    text.expand_tabs(4)
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        offsets: list[int] = []
        column = 0
        for index, char in enumerate(line.plain):
            cells = get_character_cell_size(char)
            if column + cells > width:
                offsets.append(index)
                column = 0
            column += cells
        lines.extend(line.divide(offsets))
    return lines


def break_offsets(line: str, width: int) -> list[int]:
    """Return where a line without newlines must be cut so that no part is wider than ``width``.

    A cut comes after blanks or beside a wide character, but not before closing punctuation nor
    after an opening bracket; trailing blanks may overhang.
    """
    if sum(map(get_character_cell_size, line)) <= width:
        return []
    offsets: list[int] = []
    start, column = 0, 0
    candidate, candidate_column = 0, 0  # the newest place to break, and the column it lies at
    for index, char in enumerate(line):
        cells = get_character_cell_size(char)
        if index > start and _may_break(line[index - 1], char):
            candidate, candidate_column = index, column
        while column + cells > width and not char.isspace():
            if candidate <= start:
                candidate, candidate_column = index, column
            offsets.append(candidate)
            start = candidate
            column -= candidate_column
        column += cells
    return offsets


def _may_break(before: str, after: str) -> bool:
    if after.isspace() or after in _NOT_FIRST or before in _NOT_LAST:
        return False
    if before.isspace():
        return True
    if _JOINER in (before, after) or get_character_cell_size(after) == 0:
        return False
    return get_character_cell_size(before) == 2 or get_character_cell_size(after) == 2
