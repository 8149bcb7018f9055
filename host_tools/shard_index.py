"""Which files make up a checkpoint: the index of shards and the numbers in their names."""

from __future__ import annotations

import re
from pathlib import Path

from device_runtime.errors import PackageError
from host_tools.checkpoint_names import MAX_INDEX_BYTES
from host_tools.json_file import read_json

_NUMBERED = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.(safetensors|bin)$")

MAX_NAME_BYTES = 255
"""No file has a longer name (Linux, NAME_MAX in linux/limits.h)."""


def read_index(path: Path) -> dict[str, str]:
    """Return the shard of each tensor as an index file states it.

    Raises:
        PackageError: the file is too large, unreadable, empty, or points outside of its folder or
            to what is no name of a file.
    """
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise PackageError(f"{path} has no weight_map, fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise PackageError(
                f"{path} says that tensor {name[:80]!r} is in {repr(file)[:60]}, expected the "
                f"name of a file; fetch it again"
            )
    entries: dict[str, str] = weight_map
    for file in set(entries.values()):
        length = len(file.encode(errors="surrogatepass"))
        if length > MAX_NAME_BYTES:
            raise PackageError(
                f"{path} points to {file[:80]!r} and on, a name of {length} bytes, expected at "
                f"most {MAX_NAME_BYTES}; fetch it again"
            )
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise PackageError(
                f"{path} points to {file[:80]!r}, outside of the checkpoint's folder"
            )
    if not entries:
        raise PackageError(f"{path} lists no tensors, fetch it again")
    return entries


def check_shards(folder: Path, shards: list[str]) -> None:
    """Check that numbered shards are all there and that no shard of another count is about.

    Raises:
        PackageError: a shard is missing, or one lies there that does not belong.
    """
    for name in shards:
        if not (folder / name).is_file():
            raise PackageError(f"{name} is missing in {folder}, fetch the checkpoint again")
    numbered = [match for name in shards if (match := _NUMBERED.match(name))]
    for match in numbered:
        total = int(match["total"])
        if total != len(numbered) or not 1 <= int(match["part"]) <= total:
            raise PackageError(
                f"{match[0]} is one of {total} shards, {len(numbered)} belong to the checkpoint; "
                f"fetch it again"
            )
    for stem in {(match["stem"], match[4]) for match in numbered}:
        for path in sorted(folder.glob("*-of-*")):
            other = _NUMBERED.match(path.name)
            if other and (other["stem"], other[4]) == stem and path.name not in shards:
                raise PackageError(
                    f"{path.name} lies beside the {len(numbered)} shards of the checkpoint and "
                    f"is none of them, remove it"
                )
