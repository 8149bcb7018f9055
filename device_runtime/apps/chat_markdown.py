"""Lay Markdown out as styled lines of a given width; every character of prose stays visible.

HTML and link references are shown as they were written (a model's ``vector<int>`` is no markup),
addresses of links are spelled out, and single newlines break the line, as chat models mean them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from rich import box
from rich.console import Console
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from device_runtime.apps.chat_wrap import fold, wrap

MIN_WIDTH = 10
"""Nested blocks never get fewer columns than this."""
MAX_RULE_WIDTH = 48
MAX_HIGHLIGHTED_CHARS = 20_000
"""Longer code is shown without colours, so that a repaint stays quick."""

_HEADING_STYLES = {"h1": "bold bright_cyan underline", "h2": "bold bright_cyan", "h3": "bold"}
_INLINE_STYLES = {"em": "italic", "strong": "bold", "s": "strike"}


def make_parser() -> MarkdownIt:
    """Return the parser that both the splitter and the layout use."""
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 40})
    return parser.enable(["table", "strikethrough"]).disable("reference")


@dataclass(frozen=True)
class _Room:
    """Where a block is laid out: its columns, and the source it came from line by line."""

    width: int
    source: tuple[str, ...]

    def inside(self, margin: int) -> _Room:
        return replace(self, width=max(self.width - margin, MIN_WIDTH))

    def has_gap_before(self, node: SyntaxTreeNode) -> bool:
        return node.map is not None and is_blank(self.source[node.map[0] - 1])


def is_blank(line: str) -> bool:
    """Whether a source line separates blocks, inside quotes too."""
    return not line.strip(" \t>")


class MarkdownLayout:
    """Turns Markdown source into lines.

    Args:
        console: gives colours and encoding; nothing is printed on it.
    """

    def __init__(self, console: Console) -> None:
        self.parser = make_parser()
        self._console = console
        is_unicode = console.encoding.startswith("utf")
        self._bullet, self._bar, self._dash = ("•", "│", "─") if is_unicode else ("*", "|", "-")

    def lines(self, source: str, width: int, skip_code_lines: int = 0) -> list[Text]:
        """Lay out some blocks with one empty line between them.

        Args:
            source: whole blocks; the last one may still grow.
            width: columns.
            skip_code_lines: when the first block is fenced code, leave out its title and that
                many lines of it (they are on the screen already); 0 leaves out nothing.
        """
        nodes = SyntaxTreeNode(self.parser.parse(source)).children
        room = _Room(max(width, MIN_WIDTH), tuple(source.split("\n")))
        if not skip_code_lines or not nodes or nodes[0].type != "fence":
            return self._blocks(nodes, room)
        rest = self._blocks(nodes[1:], room)
        code = self._code(nodes[0], room.width, skip_code_lines)
        return [*code, Text(), *rest] if rest else code

    def _blocks(self, nodes: Sequence[SyntaxTreeNode], room: _Room) -> list[Text]:
        lines: list[Text] = []
        for node in nodes:
            block = self._block(node, room)
            if lines and block and (node.level == 0 or room.has_gap_before(node)):
                lines.append(Text())
            lines.extend(block)
        return lines

    def _block(self, node: SyntaxTreeNode, room: _Room) -> list[Text]:
        kind = node.type
        if kind in ("fence", "code_block"):
            return self._code(node, room.width)
        if kind in ("bullet_list", "ordered_list"):
            return self._list(node, room)
        if kind == "blockquote":
            bar = (f"{self._bar} ", "dim")
            return [
                Text.assemble(bar, line) for line in self._blocks(node.children, room.inside(2))
            ]
        if kind == "hr":
            return [Text(self._dash * min(room.width, MAX_RULE_WIDTH), "dim")]
        if kind == "table":
            return self._table(node, room.width)
        text = self._inline(node.children[0])
        if kind == "heading":
            text.stylize_before(_HEADING_STYLES.get(node.tag, "bold"))
        return wrap(text, room.width)

    def _list(self, node: SyntaxTreeNode, room: _Room) -> list[Text]:
        lines: list[Text] = []
        for item in node.children:
            marker = f"{item.info}{item.markup} " if item.info else f"{self._bullet} "
            if lines and room.has_gap_before(item):
                lines.append(Text())
            body = self._blocks(item.children, room.inside(len(marker))) or [Text()]
            lines.append(Text.assemble((marker, "cyan"), body[0]))
            lines.extend(Text.assemble(" " * len(marker), line) for line in body[1:])
        return lines

    def _code(self, node: SyntaxTreeNode, width: int, skip_lines: int = 0) -> list[Text]:
        code = node.content.removesuffix("\n")
        language = (node.info.split() or [""])[0]
        text = Text(code)
        if language and len(code) <= MAX_HIGHLIGHTED_CHARS:
            coloured = Syntax("", language, theme="ansi_dark").highlight(code)
            if coloured.plain.startswith(code):  # a lexer may drop what it takes for noise
                text = coloured[: len(code)]
        lines = [] if skip_lines else [self._code_edge(language, width)]
        for line in text.split("\n", allow_blank=True)[skip_lines:]:
            lines.extend(fold(line, width))
        lines.append(self._code_edge("", width))
        return lines

    def _code_edge(self, title: str, width: int) -> Text:
        edge = Text(f"{self._dash * 2} {title} " if title else "", "dim")
        edge.truncate(width)
        edge.append(self._dash * max(0, min(width, MAX_RULE_WIDTH) - edge.cell_len))
        return edge

    def _table(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        head, *rows = (row for part in node.children for row in part.children)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, border_style="dim")
        for cell in head.children:
            is_right = cell.attrs.get("style") == "text-align:right"
            words = self._inline(cell.children[0])
            table.add_column(words, justify="right" if is_right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(self._inline(cell.children[0]) for cell in row.children))
        options = self._console.options.update(width=width, height=None)
        lines: list[Text] = []
        for segments in self._console.render_lines(table, options, pad=False):
            line = Text.assemble(*((part.text, part.style or Style()) for part in segments))
            line.rstrip()
            lines.append(line)
        return lines

    def _inline(self, node: SyntaxTreeNode) -> Text:
        """Return the running text of a block, styled, line breaks as newlines."""
        text = Text()
        for child in node.children:
            kind = child.type
            if kind == "text":
                text.append(child.content)
            elif kind in ("softbreak", "hardbreak"):
                text.append("\n")
            elif kind == "code_inline":
                text.append(child.content, "cyan")
            elif kind == "link":
                text.append_text(self._link(child))
            elif kind == "image":
                text.append(f"[image: {child.content}] ({child.attrs.get('src', '')})", "dim")
            else:
                part = self._inline(child)
                part.stylize_before(_INLINE_STYLES.get(kind, ""))
                text.append_text(part)
        return text

    def _link(self, node: SyntaxTreeNode) -> Text:
        """Return the words and the address, so that nobody opens what he cannot read."""
        address = str(node.attrs.get("href", ""))
        words = self._inline(node)
        words.stylize_before("underline")
        if address and address != words.plain:
            words.append(f" ({address})", "dim")
        return words
