"""Lines of the terminal: blanks, wide characters, punctuation."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import get_character_cell_size
from rich.text import Text

from device_runtime.apps.chat_wrap import break_offsets, fold, wrap


def wrapped(text: str, width: int) -> list[str]:
    return [line.plain for line in wrap(Text(text), width)]


def test_words_stay_whole_and_blanks_at_the_break_vanish() -> None:
    assert wrapped("one two  three four", 9) == ["one two", "three", "four"]


def test_a_word_wider_than_the_line_is_cut() -> None:
    assert wrapped("a abcdefgh", 4) == ["a", "abcd", "efgh"]


def test_chinese_breaks_between_characters() -> None:
    # Each takes two columns, so four fit on nine.
    assert wrapped("大型语言模型很快", 9) == ["大型语言", "模型很快"]


def test_closing_punctuation_does_not_begin_a_line() -> None:
    # Eight columns hold four characters; the comma would be the fifth, so 言 goes down with it.
    assert wrapped("大型语言，很快", 8) == ["大型语", "言，很快"]


def test_an_opening_bracket_does_not_end_a_line() -> None:
    assert wrapped("大型语（言模", 8) == ["大型语", "（言模"]


def test_a_latin_word_amid_chinese_moves_as_a_whole() -> None:
    assert wrapped("在NVIDIA上运行", 7) == ["在", "NVIDIA", "上运行"]


def test_newlines_and_empty_lines_stay() -> None:
    assert wrapped("a\n\nb", 10) == ["a", "", "b"]


def test_indentation_at_the_start_of_a_line_stays() -> None:
    assert wrapped("  a b", 3) == ["  a", "b"]


def test_folding_keeps_every_blank_and_counts_a_tab_as_four_columns() -> None:
    lines = [line.plain for line in fold(Text("\tab   cd\n中文字"), 5)]
    assert lines == ["    a", "b   c", "d", "中文", "字"]


@given(st.text(alphabet="ab -，。（）中文字é\u0301🎉\u200d", max_size=80), st.integers(2, 20))
def test_no_part_is_wider_than_the_line_and_no_character_is_lost(text: str, width: int) -> None:
    offsets = break_offsets(text, width)
    assert offsets == sorted(set(offsets))
    bounds = [0, *offsets, len(text)]
    parts = [text[a:b] for a, b in pairwise(bounds)]
    assert "".join(parts) == text
    for part in parts:
        assert sum(map(get_character_cell_size, part.rstrip())) <= width
