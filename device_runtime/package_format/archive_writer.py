"""Writes a sealed package as one archive: the same package gives the same bytes everywhere."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from device_runtime.errors import DeviceError, PackageError
from device_runtime.package_format import names
from device_runtime.package_format.archive_gzip import MEMBER_DATA_BYTES, stored_member
from device_runtime.package_format.archive_ustar import END_OF_ARCHIVE, file_header, padding_bytes
from device_runtime.package_format.durable import PART_SUFFIX, sync_folder
from device_runtime.package_format.manifest import FileEntry, Manifest

ARCHIVE_SUFFIX = ".tgz"

_MAX_THREADS = 8


@dataclass(frozen=True)
class ArchiveSummary:
    """What was written.

    Attributes:
        path: the archive.
        num_files: files in it, manifest.json included.
        data_bytes: bytes of all these files.
        archive_bytes: size of the archive.
    """

    path: Path
    num_files: int
    data_bytes: int
    archive_bytes: int


@dataclass(frozen=True)
class _Piece:
    """A run of the tar stream: bytes that are known, or a file of the package."""

    start: int
    size: int
    data: bytes
    entry: FileEntry | None

    @property
    def end(self) -> int:
        return self.start + self.size


class _Layout:
    """The whole tar stream as pieces; any range of it can be made without the rest."""

    def __init__(self, root: Path, manifest: Manifest, manifest_text: bytes) -> None:
        self.root = root
        self.pieces: list[_Piece] = []
        self._append_data(file_header(f"{manifest.name}/{names.MANIFEST}", len(manifest_text)))
        self._append_data(manifest_text + bytes(padding_bytes(len(manifest_text))))
        for entry in sorted(manifest.files, key=lambda entry: entry.path):
            self._append_data(file_header(f"{manifest.name}/{entry.path}", entry.size_bytes))
            if entry.size_bytes:
                self.pieces.append(_Piece(self.size, entry.size_bytes, b"", entry))
            self._append_data(bytes(padding_bytes(entry.size_bytes)))
        self._append_data(END_OF_ARCHIVE)
        self._starts = [piece.start for piece in self.pieces]

    @property
    def size(self) -> int:
        return self.pieces[-1].end if self.pieces else 0

    def _append_data(self, data: bytes) -> None:
        if data:
            self.pieces.append(_Piece(self.size, len(data), data, None))

    def runs(self, start: int, end: int) -> Iterator[tuple[_Piece, int, int]]:
        """Yield (piece, first, last) of the pieces that cover the range, offsets in the piece."""
        index = bisect.bisect_right(self._starts, start) - 1
        while index < len(self.pieces) and self.pieces[index].start < end:
            piece = self.pieces[index]
            yield piece, max(start, piece.start) - piece.start, min(end, piece.end) - piece.start
            index += 1

    def read(self, start: int, end: int) -> bytearray:
        """Return the bytes of a range, those of files read from disk."""
        data = bytearray(end - start)
        view = memoryview(data)
        for piece, first, last in self.runs(start, end):
            target = view[piece.start + first - start : piece.start + last - start]
            if piece.entry is None:
                target[:] = piece.data[first:last]
            else:
                self._read_file(piece.entry, first, target)
        return data

    def _read_file(self, entry: FileEntry, offset: int, target: memoryview) -> None:
        path = self.root / entry.path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise PackageError(f"cannot read {path}: {error.strerror}") from error
        with open(descriptor, "rb", buffering=0) as file:
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes != entry.size_bytes:
                raise PackageError(
                    f"{path} has {size_bytes} bytes, {names.MANIFEST} says {entry.size_bytes}; "
                    "pack again"
                )
            file.seek(offset)
            while target:
                count = file.readinto(target)
                if not count:
                    raise PackageError(f"{path} shrank while it was packed; pack again")
                target = target[count:]


def write_archive(
    package_dir: Path, output: Path, progress: Callable[[int, int], None] | None = None
) -> ArchiveSummary:
    """Write the package at ``package_dir`` as a `.tgz`, which appears whole or not at all.

    The archive holds ``NAME/manifest.json`` first and then every file it lists, sorted by path;
    each file is compared with its listed hash on the way. Owner, mode and time are fixed and the
    encoder is ours, so equal packages give equal archives on every machine.

    Args:
        package_dir: folder with a sealed manifest.json.
        output: the archive; replaced when it exists.
        progress: called with (bytes done, bytes in all) after every few MB.

    Raises:
        PackageError: there is no sealed manifest, or a file is not what it lists.
        DeviceError: the disk is full or fails.
    """
    manifest_text, manifest = _read_sealed(package_dir)
    layout = _Layout(package_dir, manifest, manifest_text)
    part = output.with_name(output.name + PART_SUFFIX)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            _write_members(layout, file, progress)
            file.flush()
            os.fsync(file.fileno())
            archive_bytes = file.tell()
        os.replace(part, output)
        sync_folder(output.parent)
    except OSError as error:
        raise DeviceError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return ArchiveSummary(
        path=output,
        num_files=len(manifest.files) + 1,
        data_bytes=manifest.size_bytes + len(manifest_text),
        archive_bytes=archive_bytes,
    )


def _read_sealed(package_dir: Path) -> tuple[bytes, Manifest]:
    path = package_dir / names.MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PackageError(
            f"cannot read {path}: {error.strerror}; `turbojet-host pack` writes it"
        ) from error
    manifest = Manifest.from_json(text)
    if not manifest.is_sealed:
        raise PackageError(f"{path} lists no files; `turbojet-host pack` writes the list")
    return text, manifest


def _write_members(
    layout: _Layout, file: BinaryIO, progress: Callable[[int, int], None] | None
) -> None:
    """Make members on several threads; hash and write them in order."""
    starts = iter(range(0, layout.size, MEMBER_DATA_BYTES))
    num_threads = max(1, min(_MAX_THREADS, os.cpu_count() or 1))
    check = _HashCheck()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="archive") as pool:
        pending: deque[tuple[int, Future[tuple[bytearray, bytearray]]]] = deque()
        try:
            while True:
                while len(pending) <= num_threads and (start := next(starts, None)) is not None:
                    pending.append((start, pool.submit(_make_member, layout, start)))
                if not pending:
                    return
                start, job = pending.popleft()
                data, member = job.result()
                file.write(member)
                check.update(layout, start, data)
                if progress:
                    progress(start + len(data), layout.size)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _make_member(layout: _Layout, start: int) -> tuple[bytearray, bytearray]:
    data = layout.read(start, min(start + MEMBER_DATA_BYTES, layout.size))
    return data, stored_member(data)


class _HashCheck:
    """Hashes the files as they pass, in order, and compares each with its entry at its end."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, layout: _Layout, start: int, data: bytearray) -> None:
        view = memoryview(data)
        for piece, first, last in layout.runs(start, start + len(data)):
            if piece.entry is None:
                continue
            at = piece.start - start
            self._digest.update(view[at + first : at + last])
            if last < piece.size:
                continue
            if self._digest.hexdigest() != piece.entry.sha256:
                raise PackageError(
                    f"{piece.entry.path} changed after it was listed in {names.MANIFEST}; "
                    "pack again"
                )
            self._digest = hashlib.sha256()
