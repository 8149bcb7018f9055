"""Files that are whole or not there: written beside, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from device_runtime.errors import DeviceError

PART_SUFFIX = ".part"
"""Ends the name of a file that is still being written."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a sibling for writing that takes the name ``path`` when the block ends well.

    The content is not synced; call `sync_file` before anything relies on it after a power cut.

    Raises:
        DeviceError: the disk is full or fails; the old file is still there.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise DeviceError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; a kill at any moment leaves the old or the new content.

    Raises:
        DeviceError: the disk is full or fails.
    """
    with replacing(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Wait until renames and new names in a folder are on the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
