"""Compares what an archive holds with what its manifest lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.manifest import FileEntry, Manifest


@dataclass(frozen=True)
class WrittenFile:
    """Size and SHA-256 (lower-case hex) of a file as it was extracted."""

    size_bytes: int
    sha256: str


def check_size(path: str, size_bytes: int, entry: FileEntry | None) -> None:
    """Check a file against its entry before its data is read.

    Raises:
        PackageError: there is no entry, or it says another size.
    """
    if entry is None:
        raise PackageError(
            f"the archive holds {path!a}, which its {names.MANIFEST} does not list; pack it again"
        )
    if entry.size_bytes != size_bytes:
        raise PackageError(
            f"{path} has {size_bytes} bytes, {names.MANIFEST} says {entry.size_bytes}; "
            "pack it again"
        )


def check_hash(path: str, sha256: str, entry: FileEntry) -> None:
    """Check a file's hash against its entry.

    Raises:
        PackageError: they differ.
    """
    if sha256 != entry.sha256:
        raise PackageError(
            f"{path} has sha256 {sha256[:16]}..., {names.MANIFEST} says {entry.sha256[:16]}...; "
            "pack it again"
        )


def check_complete(manifest: Manifest, entries: tuple[FileEntry, ...]) -> None:
    """Check all files of a package against a manifest that lists them.

    Raises:
        PackageError: a file is missing, is too much, or differs.
    """
    listed = {entry.path: entry for entry in manifest.files}
    for entry in entries:
        check_size(entry.path, entry.size_bytes, listed.get(entry.path))
        check_hash(entry.path, entry.sha256, listed.pop(entry.path))
    for path in listed:
        raise PackageError(
            f"the archive lacks {path}, which its {names.MANIFEST} lists; copy or pack it again"
        )


def find_prefix(paths: Mapping[str, WrittenFile]) -> str:
    """Return the folder that the package lies in, ``""`` or ending with a slash.

    Raises:
        PackageError: there is no package, or more than one.
    """
    config = names.weight_path(names.CONFIG_INI)
    found = [path for path in paths if path == config or path.endswith(f"/{config}")]
    if len(found) != 1:
        raise PackageError(
            f"the archive holds {len(found)} files called {config}, expected 1: "
            "it is not one package or workspace"
        )
    return found[0][: -len(config)]


def entries_below(prefix: str, written: Mapping[str, WrittenFile]) -> tuple[FileEntry, ...]:
    """Return the files of the package with paths relative to it, sorted, manifest.json left out.

    Raises:
        PackageError: a file lies outside of the package.
    """
    entries = []
    for path, file in written.items():
        if not path.startswith(prefix):
            raise PackageError(f"the archive holds {path!a} outside of the package {prefix}")
        if path != f"{prefix}{names.MANIFEST}":
            entries.append(FileEntry(path[len(prefix) :], file.size_bytes, file.sha256))
    return tuple(sorted(entries, key=lambda entry: entry.path))
