"""Files of an archive on their way to disk: written once, hashed on the way, synced at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from device_runtime.errors import DeviceError
from device_runtime.package_format.durable import sync_file, sync_folder

_FILE_MODE = 0o644
_HASH_APART_BYTES = 64 << 10
_NUM_SYNC_THREADS = 8


class StagingTree:
    """Creates files and folders under one folder that nobody else uses.

    Never follows a link and never writes over a file. Use it as a context manager: leaving it
    ends its thread.

    Attributes:
        root: the folder; made where it does not exist.
        bytes_written: bytes of file data so far.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes_written = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def __enter__(self) -> StagingTree:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hasher.shutdown(wait=True, cancel_futures=True)

    def add_folder(self, path: str) -> None:
        """Create a folder and its parents where they do not exist.

        Raises:
            DeviceError: the file system refuses.
        """
        try:
            (self.root / path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(self.root / path, error) from error

    def add_file(self, path: str, pieces: Iterable[memoryview | bytes]) -> str:
        """Write a new file from pieces and return its SHA-256 in lower-case hex.

        Raises:
            DeviceError: the file system refuses, for instance because it is full.
        """
        self.add_folder(path.rpartition("/")[0])
        full = self.root / path
        digest = hashlib.sha256()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(full, flags, _FILE_MODE)
        except OSError as error:
            raise _cannot_write(full, error) from error
        try:
            for piece in pieces:
                if len(piece) < _HASH_APART_BYTES:
                    digest.update(piece)
                    self._write(full, descriptor, piece)
                else:
                    # Hashing takes as long as writing, and both let other threads run.
                    hashing = self._hasher.submit(digest.update, piece)
                    self._write(full, descriptor, piece)
                    hashing.result()
            with suppress(OSError):
                # Linux starts to write dirty pages back, so that the sync at the end is short.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        return digest.hexdigest()

    def sync(self) -> None:
        """Wait until every file and folder is on the disk.

        Raises:
            DeviceError: the disk reports an error.
        """
        folders: list[Path] = []
        files: list[Path] = []
        for folder, _, file_names in os.walk(self.root):
            folders.append(Path(folder))
            files += [Path(folder, name) for name in file_names]
        try:
            with ThreadPoolExecutor(_NUM_SYNC_THREADS, thread_name_prefix="sync") as pool:
                for _ in pool.map(sync_file, files):
                    pass
            for path in reversed(folders):
                sync_folder(path)
        except OSError as error:
            raise _cannot_write(self.root, error) from error

    def _write(self, path: Path, descriptor: int, piece: memoryview | bytes) -> None:
        view = memoryview(piece)
        while view:
            try:
                count = os.write(descriptor, view)
            except OSError as error:
                raise _cannot_write(path, error) from error
            self.bytes_written += count
            view = view[count:]


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder for as long as the block runs; it is deleted with all it holds.

    Raises:
        DeviceError: the folder cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise _cannot_write(parent, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> DeviceError:
    return DeviceError(
        f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
    )
