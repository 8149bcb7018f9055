"""Looking at the files of a package folder without being led out of it."""

from __future__ import annotations

import os
from pathlib import Path

from device_runtime.errors import PackageError


def check_file(root: Path, path: str, *sizes_bytes: int) -> int:
    """Return the size of a file of a package when it is one of ``sizes_bytes``.

    Args:
        root: folder of the package.
        path: relative path.
        sizes_bytes: sizes allowed, the usual one first; none allows any.

    Raises:
        PackageError: the file is missing, not regular, outside the package or of another size.
    """
    try:
        real = (root / path).resolve(strict=True)
        size_bytes = real.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links before Python 3.13
        expected = f", expected {sizes_bytes[0]} bytes" if sizes_bytes else ""
        raise PackageError(f"{path} is missing from {root}{expected}") from error
    if not real.is_relative_to(root.resolve()):
        raise PackageError(f"{path} leads out of {root} through a link")
    if not real.is_file():
        raise PackageError(f"{path} in {root} is not a regular file")
    if sizes_bytes and size_bytes not in sizes_bytes:
        raise PackageError(
            f"{path} has {size_bytes} bytes, expected {sizes_bytes[0]}; fetch or convert again"
        )
    return size_bytes


def list_files(root: Path) -> tuple[str, ...]:
    """Return the relative paths of all files below ``root``, sorted; links count as files."""
    found = []
    for folder, folders, files in os.walk(root):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files + linked]
    return tuple(sorted(found))
