"""Tells what a SOURCE on the command line is: a hub id, an alias, a folder or a GGUF file."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from device_runtime.errors import UsageError
from host_tools.checkpoint_names import GGUF
from host_tools.fetch.aliases import ALIASES

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?modelscope\.(?:cn|ai)/models/([^/?#\s]+/[^/?#\s]+)(?:/[^?#\s]*)?/?"
)


@dataclass(frozen=True)
class HubSource:
    """A model on ModelScope.

    Attributes:
        model_id: ``owner/name``.
    """

    model_id: str


@dataclass(frozen=True)
class FolderSource:
    """A checkpoint that is on this machine already."""

    path: Path


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file on this machine."""

    path: Path


Source = HubSource | FolderSource | GgufSource


def parse_source(text: str) -> Source:
    """Tell what ``text`` names.

    An alias is an alias even where a folder of that name lies in the current one: ``./NAME`` is
    the folder. Anything else that exists on disk is that file or folder; what is left must be a
    ModelScope id or the address of its page.

    Raises:
        UsageError: it is nothing of these.
    """
    if not text:
        raise UsageError("the source is an empty text, name a folder, a GGUF file or a model id")
    if text.lower() in ALIASES:
        return HubSource(ALIASES[text.lower()])
    path = Path(text).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if path.suffix.lower() == GGUF:
        if not path.is_file():
            raise UsageError(f"there is no file {text}, name a GGUF file that exists")
        return GgufSource(path)
    if path.is_file():
        raise UsageError(
            f"{text} is a file but no {GGUF}, expected a folder, a GGUF file or a model id"
        )
    page = _HUB_PAGE.fullmatch(text)
    model_id = page.group(1) if page else text
    if _HUB_ID.fullmatch(model_id) and ".." not in model_id:
        return HubSource(model_id)
    near = difflib.get_close_matches(text.lower(), ALIASES, n=3)
    hint = f", did you mean {' or '.join(near)}" if near else ""
    raise UsageError(
        f"{text[:120]!r} is no folder, GGUF file, alias or ModelScope id (owner/name){hint}"
    )
