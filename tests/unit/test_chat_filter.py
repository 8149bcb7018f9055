"""What a model prints cannot steer the terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_runtime.apps.chat_filter import MAX_SEQUENCE_CHARS, ControlFilter, printable

HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x9b31mred", "red"),  # CSI as a C1 character
    ("\x1b]0;title\x07text", "text"),  # OSC with BEL
    ("\x1b]52;c;ZXZpbA==\x1b\\text", "text"),  # OSC 52 writes the clipboard; ST ends it
    ("\x9d0;title\x9ctext", "text"),  # the same as C1 characters
    ("\x1bP1$r0m\x1b\\text", "text"),  # DCS
    ("\x1b_app\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\text", "text"),
    ("\x1bctext", "text"),  # ESC c resets a terminal
    ("\x1b(0text", "text"),  # an intermediate byte
    ("\x1b[?1049hx\x1b[2Jy\x1b[Hz", "xyz"),
    ("a\rb\x08c\x07d\x7fe\x00f", "abcdef"),
    ("a\r\nb\tc", "a\nb\tc"),
    ("\x1b]never ended\nnext line", "\nnext line"),
    ("\x1b[12\nnext", "\nnext"),
    ("\x1b中", "中"),  # no final byte: what follows is text
    ("\x1b[3中", "中"),
    ("\x1b\x1b[1mx", "x"),
    ("\x1b]a\x1b\x1b\\x", "x"),
    ("plain 中文 🎉 é", "plain 中文 🎉 é"),
]


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_control_sequences_vanish_and_text_stays(text: str, expected: str) -> None:
    assert printable(text) == expected


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_a_sequence_may_span_deltas(text: str, expected: str) -> None:
    control_filter = ControlFilter()
    assert "".join(control_filter.feed(char) for char in text) == expected


def test_a_sequence_that_never_ends_does_not_swallow_the_answer() -> None:
    text = "\x1b]" + "x" * (2 * MAX_SEQUENCE_CHARS)
    # ESC opens the sequence; the next 1024 characters, "]" among them, belong to it.
    assert printable(text) == "x" * (MAX_SEQUENCE_CHARS + 1)


@given(st.text(alphabet="\x1b\x9b\x9d\x9c\x07[]\\;?0123mHJ\r\n\tab中\x80\x90", max_size=60))
def test_no_control_character_but_newline_and_tab_ever_passes(text: str) -> None:
    shown = printable(text)
    assert all(char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f") for char in shown)
    assert shown.count("\n") == text.count("\n")
