"""The conversation at a terminal: read, answer on the screen, obey commands, leave."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from device_runtime.apps.chat_commands import run_command
from device_runtime.apps.chat_conversation import Conversation
from device_runtime.apps.chat_filter import ControlFilter, printable
from device_runtime.apps.chat_input import MessageReader
from device_runtime.apps.chat_interrupt import StopSignal
from device_runtime.apps.chat_markdown import MarkdownLayout
from device_runtime.apps.chat_once import length_note
from device_runtime.apps.chat_screen import quiet_keyboard
from device_runtime.apps.chat_settings import ChatSettings
from device_runtime.apps.chat_status import (
    AnswerFacts,
    fitting_line,
    memory_in_use,
    status_parts,
)
from device_runtime.apps.chat_stream import AnswerStream, MarkdownStream, PlainStream
from device_runtime.apps.chat_view import AnswerView, PlainView
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.errors import EXIT_INTERRUPTED, RequestError, TurbojetError
from device_runtime.package_format.amounts import format_bytes

_ROOM_HINT = (
    "/forget drops the oldest turns, /reset starts anew, /save keeps this conversation; "
    "--session-len sets how long one can be"
)
_COMMAND = re.compile(r"/[a-z]+(\s|$)")


class Repl:
    """Holds the state that commands change; see `ChatState`.

    Args:
        conversation: what is talked in.
        model: name of the package.
        plan: of the engine, for the memory it takes.
        settings: how answers are made.
        reader: where messages come from.
        console: where everything is shown.
    """

    def __init__(
        self,
        *,
        conversation: Conversation,
        model: str,
        plan: MemoryPlan,
        settings: ChatSettings,
        reader: MessageReader,
        console: Console,
        is_markdown: bool,
    ) -> None:
        self.conversation = conversation
        self.model = model
        self.settings = settings
        self.facts = AnswerFacts()
        self.is_markdown = is_markdown
        self.is_leaving = False
        self.is_cut_off = False
        self._is_talking = False
        self._is_answering = False
        self._was_interrupted = False  # by the newest thing the person did
        self._plan = plan
        self._reader = reader
        self._console = console

    def run(self) -> int:
        """Talk until the person leaves; return the exit code, 130 after Ctrl-C.

        It also ends after :meth:`cut_off`.
        """
        self._is_talking = True
        try:
            try:
                code = self._talk()
            finally:
                self._is_talking = False
        except (SystemExit, OSError):  # also from writing to a terminal that is gone
            if not self.is_cut_off:
                raise
        return EXIT_INTERRUPTED if self.is_cut_off else code

    def cut_off(self) -> None:
        """End the talk, after the step that an answer is in; for signal handlers.

        Raises:
            SystemExit: out of whatever else the talk is at; nothing when it is over.
        """
        self.is_cut_off = self.is_leaving = True
        if self._is_answering:
            self.conversation.cancel()
        elif self._is_talking:
            # Not to be taken for Ctrl-C, and nothing that an event loop keeps to itself.
            raise SystemExit(EXIT_INTERRUPTED)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        self._is_answering = True
        try:
            yield
        finally:
            self._is_answering = False

    def _talk(self) -> int:
        self._greet()
        while not self.is_leaving:
            try:
                text = self._reader.read()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if self._was_interrupted:
                    return EXIT_INTERRUPTED
                self._was_interrupted = True
                self.say("Ctrl-C again leaves, or Ctrl-D")
                continue
            self._was_interrupted = False
            self._obey(text)
        return 0

    def _obey(self, text: str) -> None:
        is_command = _COMMAND.match(text) is not None
        try:
            if is_command:
                run_command(self, text)
            elif text.strip():
                self.answer(text)
        except RequestError as error:
            self._warn(str(error))
            if self.conversation.messages and not is_command:
                self.say(_ROOM_HINT)
        except TurbojetError as error:
            self._warn(f"{error}; /save keeps the conversation")

    def answer(self, text: str) -> None:
        """Send a message and show the answer.

        Raises:
            RequestError: the conversation outgrows session_len.
        """
        params = self.settings.generation_params(self.settings.next_seed())
        control_filter = ControlFilter()
        self.facts = AnswerFacts()
        self._console.print()
        with (
            self._answering(),
            StopSignal(self.conversation.cancel) as stop,
            quiet_keyboard(),
            self._view(time.monotonic()) as view,
            closing(self.conversation.send(text, params)) as outputs,
        ):
            for output in outputs:
                self.facts = AnswerFacts.of(output)
                view.feed(control_filter.feed(output.text))
                if stop.is_set or self.is_cut_off:
                    self.conversation.cancel()  # it may have come before there was what to cancel
        self._console.print()
        self._was_interrupted = stop.is_set
        note = length_note(self.facts, self.settings, self.conversation)
        if stop.is_set:
            self._warn("(stopped)")
        elif note:
            self._warn(f"({note})")
            if self.conversation.context_used >= self.conversation.session_len - 1:
                self.say(_ROOM_HINT)

    def say(self, line: str | Text | Table) -> None:
        """Print something of our own, apart from what the model says."""
        self._console.print(Text(printable(line), "dim") if isinstance(line, str) else line)

    def toggle_multiline(self) -> bool:
        """Change what Enter does; return whether it now begins a new line."""
        self._reader.is_multiline = not self._reader.is_multiline
        return self._reader.is_multiline

    def engine_facts(self) -> list[tuple[str, str]]:
        """Return names and values about the engine for ``/stats``."""
        plan = self._plan
        return [
            ("backend", plan.backend),
            (
                "memory",
                f"{format_bytes(memory_in_use(plan))} now; at most "
                f"{format_bytes(plan.total_bytes)}: weights {format_bytes(plan.weight_bytes)}, "
                f"KV cache {format_bytes(plan.kv_bytes)} ({plan.kv_format.title}), "
                f"workspace {format_bytes(plan.workspace_bytes)}",
            ),
        ]

    def prompt_status(self) -> str:
        """Return the line under the prompt."""
        parts = [self.model, *self._status_parts(self.conversation.context_used)]
        return fitting_line(parts, self._console.width).plain

    def _status_parts(self, context_used: int) -> list[str]:
        session_len = self.conversation.session_len
        memory_bytes = memory_in_use(self._plan)
        return status_parts(self.facts, context_used, session_len, memory_bytes)

    def _live_status(self, width: int, started: float) -> Text:
        if not self.facts.num_generated:
            waiting = f"reading the question · {time.monotonic() - started:.0f} s"
            return fitting_line([waiting, "Ctrl-C stops"], width)
        parts = [f"{self.facts.num_generated} tokens", *self._status_parts(self.facts.num_tokens)]
        return fitting_line([*parts, "Ctrl-C stops"], width)

    def _view(self, started: float) -> AnswerView | PlainView:
        if self._console.is_dumb_terminal:
            return PlainView(self._console)
        stream: AnswerStream = PlainStream()
        if self.is_markdown:
            stream = MarkdownStream(MarkdownLayout(self._console))
        return AnswerView(self._console, stream, lambda width: self._live_status(width, started))

    def _greet(self) -> None:
        self.say(Text.assemble((self.model, "bold"), f" · {self._plan.backend} engine"))
        for note in self._plan.notes:
            self._warn(note)
        self.say("/help lists commands. Ctrl-C stops an answer, Ctrl-D leaves.")

    def _warn(self, message: str) -> None:
        self._console.print(Text(printable(message), "yellow"))
