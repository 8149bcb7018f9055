"""Hashes of files and folders, remembered by size and time so that a second look costs nothing.

A remembered hash is used only when size, modification time and inode are those of the file that
was hashed, and the file had been at rest for a while then: an edit within the clock's granularity
must not go unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from device_runtime.errors import PackageError
from device_runtime.package_format.durable import write_atomically

SETTLE_S = 2.0
"""A file changed less than this before it was hashed is hashed again next time (FAT counts 2 s)."""

CHUNK_BYTES = 1 << 22
MAX_THREADS = 4


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def content_files(root: Path) -> list[tuple[str, Path]]:
    """List the content of a file or folder as (relative name, path), sorted by name.

    Names that start with a dot are bookkeeping (stage records, a hub's caches), not content; a
    link counts as what it points to, for hub caches are made of links.

    Raises:
        PackageError: there is nothing at ``root``.
    """
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise PackageError(f"{root} is not there, run the stage that makes it first")
    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


class ContentHasher:
    """Hashes files with a memory kept in one JSON file."""

    def __init__(self, memory: Path) -> None:
        """Read the memory; one that is damaged or absent is an empty one.

        Args:
            memory: the JSON file, made when first needed; the folder above its own may move
                together with the files in it.
        """
        self._memory = memory
        self._known: dict[str, list[object]] = {}
        try:
            loaded = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(loaded, dict):
            self._known = {str(key): value for key, value in loaded.items()}

    def hash_files(self, paths: Iterable[Path]) -> list[str]:
        """Return the sha256 of each file, in hex, in order."""
        targets = list(paths)
        stamps = [_stamp(path) for path in targets]
        digests: list[str | None] = []
        for path, stamp in zip(targets, stamps, strict=True):
            known = self._known.get(self._key(path))
            digests.append(str(known[-1]) if known is not None and known[:-1] == stamp else None)
        missing = [index for index, digest in enumerate(digests) if digest is None]
        if missing:
            started_ns = time.time_ns()
            with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
                fresh = list(pool.map(file_sha256, [targets[index] for index in missing]))
            for index, digest in zip(missing, fresh, strict=True):
                digests[index] = digest
                self._remember(targets[index], stamps[index], digest, started_ns)
            text = json.dumps(self._known, indent=0, sort_keys=True)
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._memory, text.encode())
        return [str(digest) for digest in digests]

    def hash_tree(self, root: Path) -> str:
        """Return one sha256 of the names and contents below ``root``, in hex."""
        files = content_files(root)
        digest = hashlib.sha256()
        hashes = self.hash_files(path for _, path in files)
        for (name, _), content in zip(files, hashes, strict=True):
            # A name is bytes to the system, and need not be UTF-8.
            digest.update(f"{content}  ".encode() + os.fsencode(name) + b"\n")
        return digest.hexdigest()

    def _key(self, path: Path) -> str:
        """Return a name that stays when the folder of the memory moves with its files."""
        home = self._memory.parent.parent.absolute()
        place = path.absolute()
        return place.relative_to(home).as_posix() if place.is_relative_to(home) else str(place)

    def _remember(self, path: Path, stamp: list[object], digest: str, started_ns: int) -> None:
        changed_ns = int(str(stamp[1]))
        if started_ns - changed_ns > SETTLE_S * 1e9 and stamp == _stamp(path):
            self._known[self._key(path)] = [*stamp, digest]
        else:
            self._known.pop(self._key(path), None)


def _stamp(path: Path) -> list[object]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]
