"""What goes into a chat template and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from device_runtime.errors import RequestError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One entry of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: plain text; text that spells a special token stays text.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        """Refuse a role that no template knows.

        Raises:
            RequestError: the role is not one of `ROLES`.
        """
        if self.role not in ROLES:
            raise RequestError(
                f"a message has the role {self.role[:40]!r}, expected one of {', '.join(ROLES)}"
            )


@dataclass(frozen=True)
class Segment:
    """A run of prompt text.

    Attributes:
        text: the characters.
        is_markup: written by the template, so special tokens in it are special tokens; in text
            that people or models wrote they are letters.
    """

    text: str
    is_markup: bool


class ChatTemplate(Protocol):
    """Turns a conversation into a prompt."""

    @property
    def name(self) -> str:
        """The built-in's name or the file the template comes from."""

    @property
    def writes_bos(self) -> bool:
        """Whether the template puts the bos token itself where the model wants one."""

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the model's eos."""

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Segment, ...]:
        """Return the prompt of a whole conversation, ready for the assistant's next words.

        Raises:
            RequestError: the order of roles is one that the template does not have.
            PackageError: the template is broken.
        """


def joined_text(segments: Iterable[Segment]) -> str:
    """Return the characters of all segments."""
    return "".join(segment.text for segment in segments)


def merged(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Return the same text without empty segments and without two alike side by side."""
    result: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if result and result[-1].is_markup == segment.is_markup:
            result[-1] = Segment(result[-1].text + segment.text, segment.is_markup)
        else:
            result.append(segment)
    return tuple(result)


def segments_after(segments: Iterable[Segment], num_characters: int) -> tuple[Segment, ...]:
    """Return what is left of the segments without their first characters."""
    left = num_characters
    result = []
    for segment in segments:
        taken = min(left, len(segment.text))
        left -= taken
        if taken < len(segment.text):
            result.append(Segment(segment.text[taken:], segment.is_markup))
    return tuple(result)
