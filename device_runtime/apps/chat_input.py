"""Read messages from a person at a terminal: history, line editing, several lines, Chinese."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

PROMPT = ">>> "
CONTINUATION = "... "
QUOTES = '"""'
"""A message that begins with three quotes goes on until three quotes."""

_STYLE = Style.from_dict(
    {"prompt": "bold ansigreen", "more": "ansigreen", "bottom-toolbar": "noreverse", "status": ""}
)


class MessageReader(Protocol):
    """Where messages come from."""

    is_multiline: bool

    def read(self) -> str:
        """Return the next message.

        Raises:
            EOFError: there is none any more.
            KeyboardInterrupt: Ctrl-C on an empty line.
        """


def is_unfinished(text: str) -> bool:
    """Whether a message is inside an open triple quote."""
    stripped = text.lstrip()
    return stripped.startswith(QUOTES) and not (
        len(stripped.rstrip()) >= 2 * len(QUOTES) and stripped.rstrip().endswith(QUOTES)
    )


def unquoted(text: str) -> str:
    """Return a message without its triple quotes, if it has them."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return text
    return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


def without_stray_bytes(text: str) -> str:
    """Return a message with a question mark for each byte that a terminal sent and is no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


class PromptReader:
    """Lines with history, editing keys and completion, through prompt_toolkit.

    Enter sends; Alt-Enter, a backslash before Enter or an open triple quote begin a new line. In
    multi-line mode Enter begins a new line and Alt-Enter sends. Pasted newlines never send.

    Args:
        history_path: file that keeps what was typed; unusable ones are done without.
        commands: words to complete after a slash.
        status: text of the line at the foot of the screen.
    """

    def __init__(
        self, history_path: Path, commands: Sequence[str], status: Callable[[], str]
    ) -> None:
        self.is_multiline = False
        self._status = status
        self._session: PromptSession[str] = PromptSession(
            history=open_history(history_path),
            multiline=True,
            key_bindings=self._keys(),
            completer=CommandCompleter(commands),
            complete_while_typing=True,
            prompt_continuation=_continuation,
            bottom_toolbar=self._toolbar,
            style=_STYLE,
            enable_suspend=True,
            reserve_space_for_menu=0,
        )

    def read(self) -> str:
        """Return the next message; see `MessageReader.read`."""
        return without_stray_bytes(
            unquoted(self._session.prompt(FormattedText([("class:prompt", PROMPT)])))
        )

    def _toolbar(self) -> FormattedText:
        return FormattedText([("class:status", self._status())])

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter", filter=Condition(lambda: not self.is_multiline))
        @keys.add("escape", "enter", filter=Condition(lambda: self.is_multiline))
        def send_or_continue(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            is_at_end = not buffer.document.text_after_cursor.strip()
            if is_at_end and buffer.document.text_before_cursor.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.newline(copy_margin=False)
            elif is_unfinished(buffer.text):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=Condition(lambda: not self.is_multiline))
        @keys.add("enter", filter=Condition(lambda: self.is_multiline and not self._is_command()))
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @keys.add("enter", filter=Condition(lambda: self.is_multiline and self._is_command()))
        def send_command(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("c-c")
        def clear_or_interrupt(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.app.exit(result="", style="class:aborting")
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        return keys

    def _is_command(self) -> bool:
        text = self._session.default_buffer.text
        return text.startswith("/") and "\n" not in text


class PlainReader:
    """Lines from a terminal that cannot move its cursor; no history, no editing keys."""

    def __init__(self) -> None:
        self.is_multiline = False

    def read(self) -> str:
        """Return the next message; see `MessageReader.read`.

        In multi-line mode an empty line sends.
        """
        text = input(PROMPT)
        while True:
            if text.endswith("\\"):
                text = text[:-1] + "\n" + input(CONTINUATION)
            elif is_unfinished(text):
                text += "\n" + input(CONTINUATION)
            elif self.is_multiline and text and not text.startswith("/"):
                line = input(CONTINUATION)
                if not line:
                    return without_stray_bytes(text)
                text += "\n" + line
            else:
                return without_stray_bytes(unquoted(text))


def _continuation(_width: int, _line: int, wrap_count: int) -> FormattedText:
    """Mark new lines, and indent what only wraps."""
    return FormattedText([("class:more", " " * len(CONTINUATION) if wrap_count else CONTINUATION)])


class CommandCompleter(Completer):
    """Completes the first word of a line that begins with a slash."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = tuple(commands)

    def get_completions(self, document: Document, _: CompleteEvent) -> Iterable[Completion]:
        """Yield the commands that begin as the line does."""
        text = document.text_before_cursor
        if text.startswith("/") and " " not in text and "\n" not in text:
            for command in self._commands:
                if command.startswith(text):
                    yield Completion(command, start_position=-len(text))


def open_history(path: Path) -> History:
    """Return the history in a file that only its owner reads, else one in memory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        return InMemoryHistory()
    return _PatientHistory(path)


class _PatientHistory(FileHistory):
    """Keeps what fits on the disk; a full one ends no conversation."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)
