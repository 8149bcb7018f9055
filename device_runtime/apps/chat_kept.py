"""What is kept of a conversation that ends from outside, and the word about it the next time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from device_runtime.apps.chat_conversation import Conversation
from device_runtime.errors import TurbojetError

_NEW = "chat_cut_off.json"
_TOLD = "chat_cut_off_last.json"


def keep_conversation(conversation: Conversation, folder: Path) -> None:
    """Save a conversation for the next time, if anything was said; a full disk keeps nothing."""
    if not conversation.messages:
        return
    with suppress(OSError, TurbojetError):
        folder.mkdir(parents=True, exist_ok=True)
        conversation.save(folder / _NEW)
        (folder / _NEW).chmod(0o600)


def take_notice(folder: Path) -> Path | None:
    """Return where the conversation is that was cut off since the last call, if one was."""
    try:
        os.replace(folder / _NEW, folder / _TOLD)
    except OSError:
        return None
    return folder / _TOLD
