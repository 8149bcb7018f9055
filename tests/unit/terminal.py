"""A terminal small enough to read: what a stream of output leaves on the screen and above it."""

from __future__ import annotations

import re

from rich.cells import get_character_cell_size

_SEQUENCE = re.compile(
    r"\x1b\[([?>]?)([0-9;]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b[=>]|\x1b\][^\x07]*\x07"
)

_MAX_SEQUENCE = 12


class Terminal:
    """Rows of cells with wrap, scrollback and the cursor sequences that the chat uses.

    ``replies`` collects what a real terminal would answer (cursor position reports).
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.scrollback: list[str] = []
        self.cells = [[" "] * columns for _ in range(rows)]
        self.row = self.column = 0
        self.is_wrapping = True
        self.is_cursor_visible = True
        self.num_erased_rows = 0
        self.replies: list[str] = []
        self._cut = ""

    @property
    def lines(self) -> list[str]:
        """Scrollback and screen, without blanks at the ends of lines and empty lines at the end."""
        screen = ["".join(row).rstrip() for row in self.cells]
        return "\n".join([*self.scrollback, *screen]).rstrip("\n").split("\n")

    @property
    def screen(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.cells]

    def write(self, text: str) -> None:
        text = self._cut + text
        self._cut = ""
        position = 0
        while position < len(text):
            match = _SEQUENCE.match(text, position)
            if match:
                self._obey(match)
                position = match.end()
            elif text[position] == "\x1b" and len(text) - position < _MAX_SEQUENCE:
                self._cut = text[position:]  # its end comes with the next write
                return
            else:
                assert text[position] != "\x1b", f"unknown sequence {text[position:][:12]!r}"
                self._put(text[position])
                position += 1

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._line_feed()
        elif char == "\b":
            self.column = max(0, self.column - 1)
        elif char >= " ":
            self._print(char)

    def _print(self, char: str) -> None:
        size = get_character_cell_size(char)
        if self.column + size > self.columns:
            if self.is_wrapping:
                self.column = 0
                self._line_feed()
            else:
                self.column = self.columns - size
        if size:
            self.cells[self.row][self.column] = char
            for extra in range(1, size):
                self.cells[self.row][self.column + extra] = ""
            self.column += size

    def _line_feed(self) -> None:
        if self.row + 1 < self.rows:
            self.row += 1
            return
        self.scrollback.append("".join(self.cells.pop(0)).rstrip())
        self.cells.append([" "] * self.columns)

    def _obey(self, match: re.Match[str]) -> None:
        private, numbers, final = match.groups()
        if final is None or final == "m":
            return
        if private:
            if numbers == "7":
                self.is_wrapping = final == "h"
            elif numbers == "25":
                self.is_cursor_visible = final == "h"
            return
        values = [int(number) if number else 0 for number in numbers.split(";")]
        count = max(1, values[0])
        column = min(self.column, self.columns - 1)  # a pending wrap is forgotten
        if final == "A":
            self.row, self.column = max(0, self.row - count), column
        elif final == "B":
            self.row, self.column = min(self.rows - 1, self.row + count), column
        elif final == "C":
            self.column = min(self.columns - 1, self.column + count)
        elif final == "D":
            self.column = max(0, column - count)
        elif final == "H":
            self.row, self.column = values[0] - 1 if values[0] else 0, max(0, sum(values[1:]) - 1)
        elif final == "K" or final == "J":
            self._erase(final, values[0], column)
        elif final == "n":
            self.replies.append(f"\x1b[{self.row + 1};{column + 1}R")
        else:
            raise AssertionError(f"unknown sequence {match.group()!r}")

    def _erase(self, final: str, mode: int, column: int) -> None:
        first, last = (0, column + 1) if mode == 1 else (0 if mode == 2 else column, self.columns)
        self.cells[self.row][first:last] = [" "] * (last - first)
        self.num_erased_rows += 1
        if final == "J":
            rows = range(self.rows) if mode == 2 else range(self.row + 1, self.rows)
            for row in rows:
                self.cells[row] = [" "] * self.columns
