"""What is kept of a conversation that ends from outside, and the word about it the next time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from device_runtime.apps.chat_conversation import Conversation
from device_runtime.errors import TurbojetError

_NEW = "chat_cut_off"
_TOLD = "chat_cut_off_told"


def keep_conversation(conversation: Conversation, folder: Path) -> None:
    """Save a conversation for the next time, if anything was said; a full disk keeps nothing."""
    if not conversation.messages:
        return
    with suppress(OSError, TurbojetError):
        folder.mkdir(parents=True, exist_ok=True)
        # What ends one chat often ends others too.
        path = folder / f"{_NEW}-{os.getpid()}.json"
        conversation.save(path)
        path.chmod(0o600)


def take_notice(folder: Path) -> list[Path]:
    """Return where the conversations are that were cut off since the last call.

    Those of earlier calls are deleted when there are new ones.
    """
    new = sorted(folder.glob(f"{_NEW}-*.json"))
    told = sorted(folder.glob(f"{_TOLD}-*.json")) if new else []
    with suppress(OSError):
        for path in told:
            path.unlink()
        return [path.replace(folder / path.name.replace(_NEW, _TOLD)) for path in new]
    return []
