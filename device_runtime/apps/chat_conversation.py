"""What the chat needs of a conversation; `ChatSession` of the engine is one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol

from device_runtime.engine.generation import GenerationParams, Output
from device_runtime.templates.message import Message


class Conversation(Protocol):
    """Messages in, text out."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """Questions and answers, without the system message."""

    @property
    def system(self) -> str | None:
        """System message; None for the template's own, "" for none."""

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""

    @property
    def session_len(self) -> int:
        """Most tokens of it."""

    def send(self, text: str, params: GenerationParams) -> Generator[Output, None, None]:
        """Ask, and stream the answer; closing the generator keeps what was said until then.

        Raises:
            RequestError: the conversation outgrows session_len; it is as before.
        """

    def cancel(self) -> None:
        """Stop the running answer soon; its last output says so. For signal handlers too."""

    def restore(self, system: str | None, messages: Sequence[Message]) -> None:
        """Replace the whole conversation."""

    def save(self, path: Path) -> None:
        """Write the conversation, whole or not at all.

        Raises:
            DeviceError: it cannot be written.
        """

    def load(self, path: Path) -> None:
        """Replace the conversation by one that `save` wrote.

        Raises:
            RequestError: the file is no conversation; this one stays.
        """
