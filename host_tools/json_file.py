"""Reads the JSON files of a checkpoint, which may be anything, without torch."""

from __future__ import annotations

import json
from pathlib import Path

from device_runtime.errors import PackageError

MAX_CONFIG_BYTES = 4 << 20


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """Return the object in a JSON file of a checkpoint, with or without a byte order mark.

    Raises:
        PackageError: the file is not there, is too large or holds no JSON object.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(path)
        size = path.stat().st_size
        if size > max_bytes:
            raise PackageError(f"{path} has {size} bytes, expected at most {max_bytes}")
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PackageError(
            f"{path.parent} has no readable {path.name}, expected the folder of a checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is no JSON, fetch it again") from error
    if not isinstance(loaded, dict):
        raise PackageError(f"{path} holds no JSON object, fetch it again")
    return loaded
