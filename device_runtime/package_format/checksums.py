"""SHA-256 of the files of a package, several at a time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from device_runtime.package_format.files import check_file
from device_runtime.package_format.manifest import FileEntry

BytesProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from one thread at a time."""

_CHUNK_BYTES = 4 << 20
_MAX_THREADS = 4


def hash_files(
    root: Path, paths: Sequence[str], progress: BytesProgress | None = None
) -> tuple[FileEntry, ...]:
    """Return the manifest's entries for ``paths`` relative to ``root``, sorted by path.

    Raises:
        PackageError: a file is missing, not regular or outside ``root``.
    """
    root = root.resolve()
    total_bytes = sum(check_file(root, path) for path in paths)
    done_bytes = 0
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += count
            if progress:
                progress(done_bytes, total_bytes)

    def hash_file(path: str) -> FileEntry:
        digest = hashlib.sha256()
        size_bytes = 0
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with open(root / path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size_bytes += count
                advance(count)
        return FileEntry(path, size_bytes, digest.hexdigest())

    # hashlib lets go of the interpreter lock, so threads use all cores.
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return tuple(pool.map(hash_file, sorted(paths)))
