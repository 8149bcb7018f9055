"""Markdown as lines: what is styled, what stays as it was written."""

from __future__ import annotations

import io
import re

from rich.console import Console

from device_runtime.apps.chat_markdown import MarkdownLayout


def make_layout(
    encoding: str = "utf-8", color: str | None = None
) -> tuple[MarkdownLayout, Console]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=40, force_terminal=True, color_system=color)
    return MarkdownLayout(console), console


def plain(source: str, width: int = 40, encoding: str = "utf-8") -> list[str]:
    layout, _ = make_layout(encoding)
    return [line.plain.rstrip() for line in layout.lines(source, width)]


def styled(source: str) -> str:
    layout, console = make_layout(color="standard")
    with console.capture() as capture:
        for line in layout.lines(source, 40):
            console.print(line, markup=False, highlight=False)
    return capture.get()


def test_blocks_stand_apart_and_single_newlines_break_the_line() -> None:
    assert plain("# Title\nroses\nviolets\n\nend") == ["Title", "", "roses", "violets", "", "end"]


def test_html_is_text() -> None:
    assert plain("a vector<int> b\n\n<div>x</div>\n\n<!-- c -->") == [
        "a vector<int> b",
        "",
        "<div>x</div>",
        "",
        "<!-- c -->",
    ]


def test_link_references_are_text() -> None:
    assert plain("[ref]: http://example.org") == ["[ref]: http://example.org"]


def test_links_and_images_show_their_address() -> None:
    assert plain("[bank](http://evil.example)") == ["bank (http://evil.example)"]
    assert plain("<http://a.example>") == ["http://a.example"]
    assert plain("![cat](c.png)") == ["[image: cat] (c.png)"]


def test_no_hyperlink_sequence_is_ever_printed() -> None:
    assert "\x1b]8" not in styled("[bank](http://evil.example) <http://a.example>")


def test_entities_cannot_write_control_characters() -> None:
    shown = styled("a&#27;[2J b&#x9b;2J c&#13;d &#8; [x](y&#13;z) &#x1b;]0;t&#7;")
    shown = re.sub("\x1b\\[[0-9;]*m", "", shown)  # our own styles
    assert all(char >= " " or char == "\n" for char in shown)
    assert not any("\x7f" <= char <= "\x9f" for char in shown)


def test_markup_of_rich_is_text() -> None:
    assert plain("[bold]x[/bold] :smile: [red]") == ["[bold]x[/bold] :smile: [red]"]
    assert "[bold]x[/bold] :smile:" in styled("[bold]x[/bold] :smile:")


def test_emphasis_and_code_become_styles() -> None:
    # SGR 1 bold, 3 italic, 9 strike, 36 cyan
    assert styled("**b** *i* ~~s~~ `c`") == (
        "\x1b[1mb\x1b[0m \x1b[3mi\x1b[0m \x1b[9ms\x1b[0m \x1b[36mc\x1b[0m\n"
    )


def test_emphasis_nests() -> None:
    assert styled("**a *b***") == "\x1b[1ma \x1b[0m\x1b[1;3mb\x1b[0m\n"


def test_lists_keep_their_numbers_and_their_gaps() -> None:
    assert plain("3. a\n4. b\n   - c\n\n5) d\n\n\n6) e") == [
        "3. a",
        "4. b",
        "   • c",
        "",
        "5) d",
        "",
        "6) e",
    ]


def test_list_items_wrap_under_their_text() -> None:
    assert plain("- one two three four", 12) == ["• one two", "  three four"]


def test_quotes_nest() -> None:
    assert plain("> a\n> > b") == ["│ a", "│ │ b"]


def test_code_keeps_its_blanks_and_is_folded_at_the_edge() -> None:
    assert plain("```py\nif x:\n    return   12345\n```", 12) == [
        "── py ──────",
        "if x:",
        "    return",  # three blanks fold: two at the end here, one below
        " 12345",
        "────────────",
    ]


def test_code_of_an_unknown_language_is_shown_without_colours() -> None:
    assert plain("```no-such-language\n\tx\n```", 30)[1] == "    x"


def test_code_can_start_at_a_later_line() -> None:
    layout, _ = make_layout()
    lines = layout.lines("```\na\nb\nc\n```\nend", 12, skip_code_lines=2)
    assert [line.plain for line in lines] == ["c", "─" * 12, "", "end"]


def test_code_longer_than_the_limit_is_shown_whole() -> None:
    code = "x = 1\n" * 4000
    assert len(plain(f"```python\n{code}```")) == 4002


def test_a_table_aligns_wide_characters() -> None:
    # Two columns of text, three between, six of text: the rule has eleven.
    assert plain("| a | 数 |\n|---|--:|\n| bb | 一二三 |") == [
        "a        数",
        "─" * 11,
        "bb   一二三",
    ]


def test_a_table_row_with_missing_cells_is_filled() -> None:
    assert plain("| a | b |\n|---|---|\n| 1 |")[2] == "1"


def test_terminals_without_unicode_get_ascii() -> None:
    assert plain("- a\n\n> b\n\n---", encoding="ascii") == ["* a", "", "| b", "", "-" * 40]


def test_deep_nesting_neither_crashes_nor_runs_out_of_columns() -> None:
    assert "x" in plain("> " * 30 + "x", 20)[0]
    assert plain("- " * 30 + "x", 20)
    assert plain("[" * 500 + "x") != []
    assert plain("*a **b " * 200) != []
