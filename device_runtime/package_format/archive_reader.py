"""Reads an archive in one pass: every member is checked, written beside, hashed and renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import names
from device_runtime.package_format.archive_check import (
    WrittenFile,
    check_complete,
    check_hash,
    check_size,
    entries_below,
    find_prefix,
)
from device_runtime.package_format.archive_gzip import GzipReader
from device_runtime.package_format.archive_names import MemberNames, is_lmdeploy_link
from device_runtime.package_format.archive_staging import StagingTree, temporary_folder
from device_runtime.package_format.archive_tar import TarMember, TarReader
from device_runtime.package_format.durable import sync_folder
from device_runtime.package_format.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    read_manifest,
)

ArchiveProgress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all), the latter None where a stream does not say."""

PARTIAL_SUFFIX = ".partial-"
"""Follows the name of a folder that is still being filled; a random part comes last."""

_MAX_THREADS = 4


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may cost before it is refused.

    Real packages hold under 2,000 files and unpack to at most 3 times their size.

    Attributes:
        max_members: files and folders.
        max_total_bytes: unpacked size.
        max_ratio: unpacked bytes for each byte of the archive,
        ratio_from_bytes: counted once so much is unpacked.
    """

    max_members: int = 100_000
    max_total_bytes: int = 1 << 42
    max_ratio: int = 50
    ratio_from_bytes: int = 64 << 20


@dataclass(frozen=True)
class ExtractedArchive:
    """What an archive held, all of it verified and synced.

    Attributes:
        root: folder of the package.
        manifest: None for a plain workspace.
        manifest_sha256: of manifest.json, "" where there is none.
        files: every file but manifest.json, paths relative to ``root``, sorted.
        archive_bytes: size of the archive itself.
    """

    root: Path
    manifest: Manifest | None
    manifest_sha256: str
    files: tuple[FileEntry, ...]
    archive_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but manifest.json."""
        return sum(entry.size_bytes for entry in self.files)


class ArchiveReader:
    """An archive whose first file has been looked at; `open_archive` makes it.

    Attributes:
        manifest: where manifest.json is the first file, as in every archive we write; else None,
            and the archive says what it is when it has been extracted.
        manifest_sha256: of that file, else "".
    """

    def __init__(self, gzip: GzipReader, total_bytes: int | None, limits: ArchiveLimits) -> None:
        self.manifest: Manifest | None = None
        self.manifest_sha256 = ""
        self._gzip = gzip
        self._total_bytes = total_bytes
        self._limits = limits
        self._tar = TarReader(self._bounded(gzip.chunks()))
        self._names = MemberNames(limits.max_members)
        self._prefix = ""
        self._manifest_text = b""
        self._folders: list[str] = []
        self._first_path, self._first = self._find_first_file()
        self._look_at_first_file()

    def extract(self, folder: Path, progress: ArchiveProgress | None = None) -> ExtractedArchive:
        """Unpack into a new folder, verify and sync; call it once.

        Args:
            folder: does not exist; the caller deletes it when this fails.
            progress: called after every few MB.

        Raises:
            PackageError: the archive is damaged, hostile, not a package, or not what its manifest
                says.
            DeviceError: the disk is full or fails.
        """
        with StagingTree(folder) as tree:
            for path in self._folders:
                tree.add_folder(path)
            written = dict(self._write_files(tree, progress))
            manifest, manifest_sha256 = self.manifest, self.manifest_sha256
            prefix = self._prefix if manifest else find_prefix(written)
            own = written.get(f"{prefix}{names.MANIFEST}")
            if manifest is None and own is not None:
                manifest, manifest_sha256 = read_manifest(folder / prefix), own.sha256
            entries = entries_below(prefix, written)
            if manifest is not None and manifest.is_sealed:
                check_complete(manifest, entries)
            tree.sync()
        return ExtractedArchive(
            root=folder / prefix,
            manifest=manifest,
            manifest_sha256=manifest_sha256,
            files=entries,
            archive_bytes=self._gzip.bytes_read,
        )

    def _find_first_file(self) -> tuple[str, TarMember]:
        while (member := self._tar.next_member()) is not None:
            path = self._names.claim(member)
            if member.kind == "folder":
                self._folders.append(path)
            elif _is_wanted(path, member):
                return path, member
        raise PackageError("the archive holds no file, expected a package or a workspace")

    def _look_at_first_file(self) -> None:
        """When it is the manifest, know it before anything is written."""
        prefix, _, name = self._first_path.rpartition("/")
        if name != names.MANIFEST or names.TRITON_MODELS in prefix.split("/"):
            return
        if self._first.size > MAX_MANIFEST_BYTES:
            raise PackageError(
                f"{self._first_path} has {self._first.size} bytes, "
                f"expected at most {MAX_MANIFEST_BYTES}"
            )
        self._manifest_text = b"".join(self._tar.data())
        self.manifest = Manifest.from_json(self._manifest_text)
        self.manifest_sha256 = hashlib.sha256(self._manifest_text).hexdigest()
        self._prefix = f"{prefix}/" if prefix else ""

    def _write_files(
        self, tree: StagingTree, progress: ArchiveProgress | None
    ) -> Iterator[tuple[str, WrittenFile]]:
        """Write every file, and check it as soon as the manifest is known to list it."""
        listed: dict[str, FileEntry] | None = None
        first_data: Iterable[memoryview | bytes] = self._tar.data()
        if self.manifest is not None:
            first_data = [self._manifest_text]
            if self.manifest.is_sealed:
                listed = {self._prefix + entry.path: entry for entry in self.manifest.files}
        sha256 = tree.add_file(self._first_path, self._reporting(first_data, tree, progress))
        yield self._first_path, WrittenFile(self._first.size, sha256)
        while (member := self._tar.next_member()) is not None:
            path = self._names.claim(member)
            if member.kind == "folder":
                tree.add_folder(path)
            elif _is_wanted(path, member):
                if listed is not None:
                    check_size(path, member.size, listed.get(path))
                sha256 = tree.add_file(path, self._reporting(self._tar.data(), tree, progress))
                if listed is not None:
                    check_hash(path, sha256, listed[path])
                yield path, WrittenFile(member.size, sha256)

    def _reporting(
        self,
        pieces: Iterable[memoryview | bytes],
        tree: StagingTree,
        progress: ArchiveProgress | None,
    ) -> Iterator[memoryview | bytes]:
        total_bytes = self._total_bytes
        if total_bytes is None and self.manifest is not None and self.manifest.is_sealed:
            total_bytes = self.manifest.size_bytes + len(self._manifest_text)
        for piece in pieces:
            yield piece
            if progress is not None:
                is_file = self._total_bytes is not None
                progress(self._gzip.bytes_read if is_file else tree.bytes_written, total_bytes)

    def _bounded(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass the unpacked stream on for as long as it stays within the limits."""
        limits = self._limits
        num_bytes = 0
        for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > limits.max_total_bytes:
                raise PackageError(
                    f"the archive unpacks to more than {limits.max_total_bytes} bytes"
                )
            if num_bytes > max(limits.ratio_from_bytes, limits.max_ratio * self._gzip.bytes_read):
                raise PackageError(
                    f"the archive unpacks {self._gzip.bytes_read} bytes to {num_bytes} and more, "
                    f"over {limits.max_ratio} times its size"
                )
            yield chunk


@contextmanager
def open_archive(
    source: Path | BinaryIO, limits: ArchiveLimits = ArchiveLimits()
) -> Iterator[ArchiveReader]:
    """Open an archive for reading once, front to back.

    Args:
        source: a file, or a stream that need not be seekable and stays open.
        limits: what it may cost.

    Raises:
        UsageError: there is no such file.
        PackageError: its first file cannot be read, or is a manifest that cannot be used.
    """
    total_bytes: int | None = None
    stream = _open_file(source) if isinstance(source, Path) else source
    if isinstance(source, Path):
        # A named pipe has a path and no size.
        total_bytes = os.fstat(stream.fileno()).st_size or None
    try:
        with GzipReader(stream, max(1, min(_MAX_THREADS, os.cpu_count() or 1))) as gzip:
            yield ArchiveReader(gzip, total_bytes, limits)
    finally:
        if stream is not source:
            stream.close()


def extract_archive(
    source: Path | BinaryIO,
    destination: Path,
    progress: ArchiveProgress | None = None,
    limits: ArchiveLimits = ArchiveLimits(),
) -> ExtractedArchive:
    """Unpack an archive into a new folder, which appears whole and verified, or not at all.

    Raises:
        UsageError: there is no such archive, or ``destination`` exists.
        PackageError: as `ArchiveReader.extract`.
        DeviceError: the disk is full or fails.
    """
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists; choose a folder that does not")
    partial = f".{destination.name}{PARTIAL_SUFFIX}"
    with (
        open_archive(source, limits) as archive,
        temporary_folder(destination.parent, partial) as folder,
    ):
        extracted = archive.extract(folder / destination.name, progress)
        os.rename(extracted.root, destination)
        sync_folder(destination.parent)
    return replace(extracted, root=destination)


def _open_file(path: Path) -> BinaryIO:
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected a .tgz; `turbojet chat` opens it as it is")
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _is_wanted(path: str, member: TarMember) -> bool:
    """Tell whether a member that is no folder becomes a file.

    Raises:
        PackageError: it is a link that nobody expects.
    """
    if member.kind == "file":
        return True
    if is_lmdeploy_link(path, member.link_target):
        return False
    raise PackageError(
        f"archive member {path!a} is a symbolic link, "
        "a package holds regular files and folders only"
    )
