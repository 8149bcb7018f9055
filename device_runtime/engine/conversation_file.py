"""Conversations on disk: JSON that anyone may have written, so every part of it is checked."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from device_runtime.errors import PackageError, RequestError
from device_runtime.package_format import strict_json
from device_runtime.package_format.durable import write_atomically
from device_runtime.templates.message import Message

FORMAT_VERSION = 1
MAX_FILE_BYTES = 16 << 20
_FORMAT: Literal["turbojet-conversation"] = "turbojet-conversation"


@dataclass(frozen=True)
class SavedConversation:
    """The whole file; its keys are the fields, in order.

    Attributes:
        format: tells these files from others.
        version: of the format.
        system: system message; None for the template's own, "" for none.
        messages: questions and answers in turn, ending with an answer.
    """

    format: Literal["turbojet-conversation"]
    version: int
    system: str | None
    messages: tuple[Message, ...]


def save_conversation(path: Path, system: str | None, messages: Sequence[Message]) -> None:
    """Write a conversation, whole or not at all; only another conversation is replaced.

    Raises:
        RequestError: there is a file that is no conversation.
        DeviceError: the file cannot be written.
    """
    if os.path.lexists(path):
        try:
            load_conversation(path)
        except RequestError as error:
            raise RequestError(
                f"{path} exists and is no conversation, give another name"
            ) from error
    saved = SavedConversation(_FORMAT, FORMAT_VERSION, system, tuple(messages))
    text = json.dumps(strict_json.encode(saved), ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, text.encode("utf-8"))


def load_conversation(path: Path) -> SavedConversation:
    """Read a conversation that nobody vouches for.

    Raises:
        RequestError: it cannot be read or is not what `save_conversation` writes.
    """
    try:
        value = strict_json.parse_object(_read(path), "the file", MAX_FILE_BYTES)
        _check_version(value)
        saved = strict_json.decode(SavedConversation, value, "the file")
        _check_order(saved.messages)
    except (PackageError, RequestError) as error:
        raise RequestError(f"cannot load {path}: {error}") from error
    return saved


def _read(path: Path) -> bytes:
    """Return the start of a regular file; a pipe or device would never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RequestError("it is no regular file")
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(error.strerror or str(error)) from error


def _check_version(value: dict[str, object]) -> None:
    version = value.get("version")
    if type(version) is int and version > FORMAT_VERSION:
        raise RequestError(f"its version {version} is newer than {FORMAT_VERSION}, update turbojet")


def _check_order(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise RequestError(
                f"message {index + 1} is of {message.role[:40]!r}, expected {expected}"
            )
    if len(messages) % 2:
        raise RequestError("its last question has no answer")
