"""Repainting the foot of a terminal: nothing flickers past, nothing appears twice."""

from __future__ import annotations

import os
import pty
import random
import sys
import termios

import pytest
from rich.console import ConsoleDimensions
from terminal import Terminal

from device_runtime.apps.chat_screen import LiveScreen, quiet_keyboard


class Window:
    """A terminal whose size can change, and what was written to it."""

    def __init__(self, columns: int = 20, rows: int = 6) -> None:
        self.terminal = Terminal(columns, rows)
        self.size = ConsoleDimensions(columns, rows)
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)
        self.terminal.write(text)

    def screen(self) -> LiveScreen:
        return LiveScreen(self.write, lambda: self.size)


def test_live_lines_are_replaced_and_permanent_lines_stay() -> None:
    window = Window()
    screen = window.screen()
    screen.show(["one"], ["two", "status"])
    screen.show([], ["two!", "status 2"])
    screen.show(["two!?"], ["three", "status 3"])
    assert window.terminal.lines == ["one", "two!?", "three", "status 3"]
    screen.show(["three."], [])
    window.write("next")
    assert window.terminal.lines == ["one", "two!?", "three.", "next"]


def test_only_what_changed_is_written() -> None:
    window = Window()
    screen = window.screen()
    screen.show([], ["steady", "status 1"])
    screen.show(["steady"], ["status 2"])
    assert "steady" not in window.written[1]
    screen.show([], ["status 2"])
    assert len(window.written) == 2


def test_lines_as_wide_as_the_terminal_keep_their_last_character() -> None:
    window = Window(columns=4)
    screen = window.screen()
    for live in (["abcd", "efgh"], ["abcd", "efgX", "ijkl"], ["abcd"]):
        screen.show([], live)
    assert window.terminal.lines == ["abcd"]
    screen.show(["abcd", "efgh"], ["中文"])
    assert window.terminal.lines == ["abcd", "efgh", "中文"]


def test_a_line_wider_than_counted_does_not_push_the_next_one_down() -> None:
    window = Window(columns=4)
    screen = window.screen()
    screen.show([], ["abcdefg", "x"])
    screen.show([], ["abcdefg", "y"])
    assert [line[:3] for line in window.terminal.lines] == ["abc", "y"]


def test_modes_are_as_before_after_every_write() -> None:
    window = Window()
    screen = window.screen()
    for permanent, live in ((["a"], ["b"]), ([], []), (["c"], [])):
        screen.show(permanent, live)
        assert window.terminal.is_wrapping
        assert window.terminal.is_cursor_visible


@pytest.mark.parametrize("seed", range(60))
def test_any_sequence_of_frames_leaves_every_permanent_line_once(seed: int) -> None:
    rng = random.Random(seed)
    window = Window(columns=rng.choice([4, 9, 20]), rows=rng.randint(3, 8))
    screen = window.screen()
    expected: list[str] = []
    live: list[str] = []
    for step in range(30):
        permanent = live[: rng.randint(0, len(live))] if rng.random() < 0.5 else []
        permanent = permanent + [f"p{step}"] * rng.randint(0, 4)
        live = [rng.choice("abc") * rng.randint(1, 4) for _ in range(rng.randint(0, 3))]
        screen.show(permanent, live)
        expected += permanent
        assert window.terminal.lines == ([*expected, *live] or [""])


def test_a_narrower_window_is_repainted_where_its_lines_were_folded_to() -> None:
    window = Window(columns=10, rows=6)
    screen = window.screen()
    screen.show([], ["12345678", "status"])
    # The terminal folds the first line in two: three rows are live now, the cursor on the third.
    window.terminal = Terminal(5, 6)
    window.size = ConsoleDimensions(5, 6)
    window.terminal.write("12345678\r\nstatu")
    screen.show([], ["12345", "678", "stat"])
    assert window.terminal.lines == ["12345", "678", "stat"]


def test_a_lower_window_keeps_the_lines_that_left_it() -> None:
    window = Window(columns=10, rows=6)
    screen = window.screen()
    screen.show([], ["a", "b", "c", "d", "e"])
    window.terminal = Terminal(10, 3)
    window.size = ConsoleDimensions(10, 3)
    window.terminal.write("a\r\nb\r\nc\r\nd\r\ne")
    screen.show(["a", "b", "c", "d"], ["E"])
    assert window.terminal.lines == ["a", "b", "c", "d", "E"]


def test_typing_during_an_answer_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with quiet_keyboard():
            flags = termios.tcgetattr(terminal)[3]
            assert not flags & termios.ECHO
            assert flags & termios.ISIG  # Ctrl-C works
        assert termios.tcgetattr(terminal)[3] & termios.ECHO
    os.close(controller)


def test_a_keyboard_that_is_a_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with quiet_keyboard():
            pass
