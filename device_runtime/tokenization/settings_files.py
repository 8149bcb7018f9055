"""Reads the text and JSON files that lie beside a tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

from device_runtime.errors import PackageError

MAX_SETTINGS_BYTES = 64 << 20

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and UTF-8 cannot."""


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file.

    Args:
        path: of the file.
        max_bytes: most that is read.

    Raises:
        PackageError: the file cannot be read or is larger.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > max_bytes:
            raise PackageError(f"{path} has {size_bytes} bytes, expected at most {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error}") from error


def read_text(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        PackageError: the file cannot be read, is larger than ``max_bytes`` or not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{path} cannot be read: {error}") from error


def read_settings(path: Path) -> dict[str, object]:
    """Return the JSON object in a file, empty when there is no such file.

    Raises:
        PackageError: the file cannot be read or holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is not JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise PackageError(f"{path} is not a JSON object")
    return value
