"""A conversation without a model, and a chat around it that a test can run in a terminal.

`python fake_chat.py HISTORY DELAY_S` talks to it: "say FILE" answers with the file's text, "count"
with numbers until the context is full, "long" is refused, anything else is repeated.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from device_runtime.apps.chat_commands import COMMANDS
from device_runtime.apps.chat_input import PlainReader, PromptReader
from device_runtime.apps.chat_repl import Repl
from device_runtime.apps.chat_settings import ChatSettings
from device_runtime.apps.chat_view import make_console
from device_runtime.backends.kv_format import KvFormat
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.engine.conversation_file import load_conversation, save_conversation
from device_runtime.engine.generation import GenerationParams, Output
from device_runtime.errors import RequestError
from device_runtime.templates.message import Message


def make_plan() -> MemoryPlan:
    return MemoryPlan(
        backend="cuda",
        kv_format=KvFormat.FP16,
        page_size=64,
        page_bytes=1_000_000,
        num_pages=100,
        weight_bytes=600_000_000,
        workspace_bytes=50_000_000,
        context_bytes=0,
        available_bytes=1_000_000_000,
        session_len=1000,
        max_batch_size=1,
        max_tokens_per_step=512,
        notes=("session_len is cut from 2048 to 1000 tokens",),
    )


class FakeConversation:
    """Repeats what it hears, one character a token."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.session_len = 1000
        self.system: str | None = None
        self.messages: tuple[Message, ...] = ()
        self._is_cancelled = False
        self.params: list[GenerationParams] = []
        self._delay_s = delay_s

    @property
    def context_used(self) -> int:
        return sum(len(message.content) for message in self.messages)

    def send(self, text: str, params: GenerationParams) -> Generator[Output, None, None]:
        self.params.append(params)
        if text == "long":
            raise RequestError(
                "the conversation needs 1200 tokens, session_len is 1000: /reset starts anew"
            )
        return self._answer(text, params, self.context_used + len(text))

    def _answer(
        self, text: str, params: GenerationParams, prompt: int
    ) -> Generator[Output, None, None]:
        said = ""
        self._is_cancelled = False
        try:
            for number, piece in enumerate(self._pieces(text), start=1):
                time.sleep(self._delay_s)
                said += piece
                yield Output(1, piece, (5,), None, None, prompt, 0, number, 0.25, 20.0)
                room = self.session_len - prompt
                if self._is_cancelled or number in (params.max_tokens, room):
                    reason = "cancelled" if self._is_cancelled else "length"
                    yield Output(1, "", (), reason, None, prompt, 0, number, 0.25, 20.0)
                    return
            yield Output(1, "", (), "stop", 2, prompt, 0, len(said), 0.25, 20.0)
        finally:
            if said:
                self.messages += (Message("user", text), Message("assistant", said))

    def cancel(self) -> None:
        self._is_cancelled = True

    def restore(self, system: str | None, messages: Sequence[Message]) -> None:
        self.system = system
        self.messages = tuple(messages)

    def save(self, path: Path) -> None:
        save_conversation(path, self.system, self.messages)

    def load(self, path: Path) -> None:
        saved = load_conversation(path)
        self.restore(saved.system, saved.messages)

    def _pieces(self, text: str) -> Generator[str, None, None]:
        if text == "count":
            yield from (f"{number} " for number in itertools.count(1))
        elif text.startswith("say "):
            yield from Path(text[4:]).read_text(encoding="utf-8")
        else:
            yield from text


def main(history: str, delay_s: str, kind: str = "prompt") -> int:
    conversation = FakeConversation(float(delay_s))
    conversation.session_len = 100_000
    names = [command.name for command in COMMANDS]
    reader = (
        PlainReader()
        if kind == "plain"
        else PromptReader(Path(history), names, lambda: repl.prompt_status())
    )
    repl = Repl(
        conversation=conversation,
        model="toy",
        plan=make_plan(),
        settings=ChatSettings(),
        reader=reader,
        console=make_console(),
        is_markdown=True,
    )
    code = repl.run()
    for message in conversation.messages:
        print(f"{message.role}: {message.content[:40]!r}")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
