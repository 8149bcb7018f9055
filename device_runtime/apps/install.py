"""Installs an archive: checked while it streams in, kept beside the old release, switched to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, Literal

from device_runtime.apps.places import DATA_DIR_VARIABLE
from device_runtime.apps.release import (
    InstallRecord,
    Release,
    content_digest,
    digest_of,
    is_model_name,
    manifest_digest,
)
from device_runtime.apps.store import Store
from device_runtime.apps.verify import open_release
from device_runtime.errors import DeviceError, PackageError, UsageError
from device_runtime.package_format.amounts import format_bytes
from device_runtime.package_format.archive_reader import (
    ArchiveProgress,
    ArchiveReader,
    ExtractedArchive,
    open_archive,
)
from device_runtime.package_format.package import open_package

STANDARD_INPUT = "-"
"""Stands for the archive on a command line when it comes through a pipe."""

Outcome = Literal["installed", "activated", "unchanged"]

# The file system's own needs: a block for the end of each file, folders, its journal.
_SPARE_BYTES_PER_FILE = 4096
_SPARE_BYTES = 32 << 20


@dataclass(frozen=True)
class InstallOptions:
    """What the person chose.

    Attributes:
        name: name of the model here; empty for what the package says.
        is_activated: whether the new release becomes the current one.
        is_forced: whether a release that is installed already is unpacked anew.
    """

    name: str = ""
    is_activated: bool = True
    is_forced: bool = False

    def __post_init__(self) -> None:
        """Refuse a name that cannot be a folder.

        Raises:
            UsageError: it cannot.
        """
        if self.name and not is_model_name(self.name):
            raise UsageError(
                f"model name {self.name[:120]!r} is not 1 to 96 letters, digits, '.', '_' or '-' "
                "that start with a letter or digit"
            )


@dataclass(frozen=True)
class Installation:
    """What came of it.

    Attributes:
        release: as it is now.
        outcome: "activated" when the release was there and was made current, "unchanged" when
            nothing had to be done.
        size_bytes: of the package.
        num_files: of the package.
    """

    release: Release
    outcome: Outcome
    size_bytes: int
    num_files: int


def install(
    store: Store,
    source: Path | BinaryIO,
    options: InstallOptions = InstallOptions(),
    *,
    progress: ArchiveProgress | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Installation:
    """Install an archive; the release before it works on until one rename switches to the new one.

    Args:
        store: where to.
        source: a file, or a stream.
        options: what the person chose.
        progress: called after every few MB.
        tell: hears sentences about waiting.

    Raises:
        UsageError: there is no such file.
        PackageError: the archive is damaged, hostile, or holds no package that opens.
        DeviceError: there is too little space, or the disk fails.
    """
    with store.locked(tell), open_archive(source) as archive:
        manifest = archive.manifest
        if manifest is not None and manifest.is_sealed:
            digest = manifest_digest(archive.manifest_sha256)
            name = options.name or manifest.name
            if not options.is_forced and (found := _installed(store, name, digest)):
                return _keep(store, found, options, manifest.size_bytes, len(manifest.files))
        _check_space(store, source, archive)
        with store.incoming() as folder:
            store.check_links(folder)
            extracted = archive.extract(folder / "package", progress)
            name = options.name or open_package(extracted.root).name
            if not is_model_name(name):
                raise PackageError(
                    f"the package calls itself {name[:120]!r}, which cannot be the name of a "
                    "model here; choose one with --name"
                )
            digest = content_digest(extracted)
            if not options.is_forced and (found := _installed(store, name, digest)):
                return _keep(store, found, options, extracted.size_bytes, len(extracted.files))
            release = store.add(name, digest, extracted.root, _record(source, extracted))
            return _switch(store, release, options, extracted)


def _installed(store: Store, name: str, digest: str) -> Release | None:
    """Return a release that holds the same and opens."""
    for release in store.releases(name):
        if digest_of(release.release_id) == digest:
            try:
                open_release(release)
            except PackageError:
                continue
            return release
    return None


def _keep(
    store: Store, release: Release, options: InstallOptions, size_bytes: int, num_files: int
) -> Installation:
    outcome: Outcome = "unchanged"
    if options.is_activated and not release.is_current:
        release, outcome = store.activate(release), "activated"
    return Installation(release, outcome, size_bytes, num_files)


def _switch(
    store: Store, release: Release, options: InstallOptions, extracted: ExtractedArchive
) -> Installation:
    """Make the new release current, and let go of damaged twins of it that it replaces."""
    if options.is_activated:
        release = store.activate(release)
        for other in store.releases(release.name):
            is_twin = digest_of(other.release_id) == digest_of(release.release_id)
            if is_twin and not other.is_current:
                store.remove_release(other)
    return Installation(release, "installed", extracted.size_bytes, len(extracted.files))


def _check_space(store: Store, source: Path | BinaryIO, archive: ArchiveReader) -> None:
    """Refuse before the first byte is written, as far as the archive says what it needs."""
    if archive.manifest is not None and archive.manifest.is_sealed:
        num_files = len(archive.manifest.files)
        needed_bytes = archive.manifest.size_bytes + num_files * _SPARE_BYTES_PER_FILE
    elif isinstance(source, Path):
        needed_bytes = os.stat(source).st_size
    else:
        return
    needed_bytes += _SPARE_BYTES
    free_bytes = shutil.disk_usage(store.models_dir).free
    if free_bytes < needed_bytes:
        raise DeviceError(
            f"the package needs {format_bytes(needed_bytes)}, {store.models_dir} has "
            f"{format_bytes(free_bytes)} free; remove a model or an old release with "
            f"`turbojet remove`, or choose another disk with {DATA_DIR_VARIABLE}"
        )


def _record(source: Path | BinaryIO, extracted: ExtractedArchive) -> InstallRecord:
    is_listed = extracted.manifest is not None and extracted.manifest.is_sealed
    return InstallRecord(
        installed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=source.name if isinstance(source, Path) else STANDARD_INPUT,
        archive_bytes=extracted.archive_bytes,
        manifest_sha256=extracted.manifest_sha256,
        files=() if is_listed else extracted.files,
    )
