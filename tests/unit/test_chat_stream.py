"""A growing answer: every word becomes permanent once, in order, however it is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from rich.console import Console
from rich.text import Text

from device_runtime.apps.chat_markdown import MarkdownLayout
from device_runtime.apps.chat_stream import AnswerStream, MarkdownStream, PlainStream

LAYOUT = MarkdownLayout(Console(width=40, force_terminal=True, color_system=None))
_FRAGMENTS = (
    "# h\n|one two three four five six seven eight nine ten eleven\n|line\n|\n|\n|- a\n|- b\n|"
    "  - c\n|1. x\n|2. y\n|   cont\n|```py\n|x=1\n|```\n|> q\n|> - z\n|¦ a ¦ b ¦\n|"
    "¦---¦---¦\n|¦ 1 ¦ 2 ¦\n|---\n|===\n|**bold\nmore**\n|中文中文，中文。\n|    code\n|"
    "* * *\n|<div>\n|`a|*|#|[x](y)\n|tail"
)
FRAGMENTS = [fragment.replace("¦", "|") for fragment in _FRAGMENTS.split("|")]


def plain(lines: Sequence[Text]) -> list[str]:
    return [line.plain.rstrip() for line in lines]


def stream_through(
    stream: AnswerStream, deltas: Sequence[str], max_live_lines: int, width: int = 40
) -> list[str]:
    """All permanent lines; the live ones are checked against their limit."""
    permanent: list[str] = []
    for delta in deltas:
        stream.feed(delta)
        frame = stream.frame(width, max_live_lines)
        assert len(frame.live) <= max_live_lines
        permanent += plain(frame.permanent)
    last = stream.finish(width)
    assert last.live == ()
    return permanent + plain(last.permanent)


def random_answer(seed: int, num_fragments: int) -> tuple[str, list[str]]:
    rng = random.Random(seed)
    source = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, num_fragments)))
    deltas, position = [], 0
    while position < len(source):
        size = rng.randint(1, 12)
        deltas.append(source[position : position + size])
        position += size
    return source, deltas


@pytest.mark.parametrize("seeds", [range(400), range(400, 800)], ids=["first", "second"])
def test_a_streamed_answer_ends_as_the_whole_answer_would_be_laid_out(seeds: range) -> None:
    for seed in seeds:
        source, deltas = random_answer(seed, 14)
        expected = plain(LAYOUT.lines(source, 40))
        assert stream_through(MarkdownStream(LAYOUT), deltas, 1000) == expected, source


def test_no_word_is_lost_or_repeated_when_the_screen_is_tiny() -> None:
    # Only markup may differ: a cut paragraph shows markers whose partner came later.
    for seed in range(120):
        source, deltas = random_answer(seed, 30)
        lines = stream_through(MarkdownStream(LAYOUT), deltas, 3)
        expected = plain(LAYOUT.lines(source, 40))
        assert words(lines) == words(expected), source


def words(lines: list[str]) -> str:
    return "".join(char for line in lines for char in line if char.isalpha())


def test_finished_blocks_and_items_become_permanent_while_the_answer_grows() -> None:
    stream = MarkdownStream(LAYOUT)
    stream.feed("intro\n\n- one\n- two\n- thr")
    frame = stream.frame(40, 10)
    assert plain(frame.permanent) == ["intro", "", "• one"]
    assert plain(frame.live) == ["• two", "• thr"]


def test_open_code_taller_than_the_screen_becomes_permanent_line_by_line() -> None:
    stream = MarkdownStream(LAYOUT)
    stream.feed("```\n" + "".join(f"{i}\n" for i in range(10)))
    frame = stream.frame(20, 5)
    # Ten lines are there; the two newest may still be the closing fence.
    assert plain(frame.permanent) == ["─" * 20, "0", "1", "2", "3", "4", "5", "6", "7"]
    assert plain(frame.live) == ["8", "9", "─" * 20]


def test_an_open_paragraph_taller_than_the_screen_is_cut_at_a_newline() -> None:
    stream = MarkdownStream(LAYOUT)
    stream.feed("a\nb\nc\nd\ne")
    frame = stream.frame(20, 3)
    assert (plain(frame.permanent), plain(frame.live)) == (["a", "b"], ["c", "d", "e"])


def test_a_paragraph_is_not_cut_inside_emphasis() -> None:
    stream = MarkdownStream(LAYOUT)
    stream.feed("**a\nb\nc\nd** e")
    frame = stream.frame(20, 3)
    assert (frame.permanent, plain(frame.live)) == ((), ["b", "c", "d e"])
    assert plain(stream.finish(20).permanent) == ["a", "b", "c", "d e"]


def test_a_heading_underlined_after_its_text_is_one_block() -> None:
    assert stream_through(MarkdownStream(LAYOUT), ["Title\n", "=", "==\n", "x"], 10) == [
        "Title",
        "",
        "x",
    ]


def test_frames_before_any_text_are_empty() -> None:
    stream = MarkdownStream(LAYOUT)
    stream.feed("\n\n")
    frame = stream.frame(40, 5)
    assert (frame.permanent, frame.live) == ((), ())
    assert stream.finish(40).permanent == ()


def test_plain_text_keeps_every_character() -> None:
    text = "# no *markup*\n\n    indented\nend of it"
    for size in (1, 3, 100):
        deltas = [text[i : i + size] for i in range(0, len(text), size)]
        assert stream_through(PlainStream(), deltas, 5) == text.split("\n")


def test_plain_text_is_folded_at_the_edge() -> None:
    assert stream_through(PlainStream(), ["abc", "def"], 5, width=4) == ["abcd", "ef"]


def test_a_resize_in_the_middle_of_code_loses_nothing() -> None:
    stream = MarkdownStream(LAYOUT)
    code = [f"{i:02d} " + "x" * 30 for i in range(20)]
    shown: list[str] = []
    stream.feed("```\n" + "\n".join(code[:12]) + "\n")
    shown += plain(stream.frame(80, 6).permanent)
    stream.feed("\n".join(code[12:]) + "\n```\n")
    shown += plain(stream.frame(17, 6).permanent) + plain(stream.finish(17).permanent)
    numbers = [line[:2] for line in shown if line[:2].isdigit()]
    assert numbers == [line[:2] for line in code]
