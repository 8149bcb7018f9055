"""One installed release of a model, and what is remembered about its installation."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from device_runtime.errors import PackageError
from device_runtime.package_format import strict_json
from device_runtime.package_format.archive_reader import ExtractedArchive
from device_runtime.package_format.manifest import FileEntry
from device_runtime.package_format.names import PACKAGE_NAME_PATTERN

RECORD_SUFFIX = ".json"
"""Ends the name of a record, which lies beside the folder of its release."""

_MAX_RECORD_BYTES = 64 << 20
_DIGEST_DIGITS = 12
_RELEASE_ID = re.compile(r"([0-9a-f]{12})(-[2-9][0-9]{0,3})?")


@dataclass(frozen=True)
class InstallRecord:
    """What the package itself does not say.

    Attributes:
        installed_at: UTC, ISO 8601.
        source: file name of the archive, or "-".
        archive_bytes: size of the archive.
        manifest_sha256: of manifest.json, "" where there is none.
        files: sizes and hashes as they were extracted; empty when the manifest lists them.
    """

    installed_at: str
    source: str
    archive_bytes: int
    manifest_sha256: str
    files: tuple[FileEntry, ...]

    def to_json(self) -> bytes:
        """Return the file."""
        return (json.dumps(strict_json.encode(self), indent=1) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, text: bytes, what: str) -> InstallRecord:
        """Read a record.

        Raises:
            PackageError: it is damaged.
        """
        value = strict_json.parse_object(text, what, _MAX_RECORD_BYTES)
        return strict_json.decode(cls, value, what)


@dataclass(frozen=True)
class Release:
    """A package in the store.

    Attributes:
        name: name of the model, the folder all its releases share.
        release_id: says what the package holds: equal packages have equal ids.
        root: folder of the package.
        is_current: whether the model's name means this release.
        is_previous: whether ``rollback`` goes to this release.
    """

    name: str
    release_id: str
    root: Path
    is_current: bool
    is_previous: bool

    @property
    def record_path(self) -> Path:
        """Where the record of the installation is."""
        return self.root.with_name(self.release_id + RECORD_SUFFIX)

    def record(self) -> InstallRecord:
        """Read the record of the installation.

        Raises:
            PackageError: it is missing or damaged.
        """
        try:
            text = self.record_path.read_bytes()
        except OSError as error:
            raise PackageError(
                f"cannot read {self.record_path}: {error.strerror}; install the model again"
            ) from error
        return InstallRecord.from_json(text, str(self.record_path))


def is_model_name(name: str) -> bool:
    """Tell whether a folder's name can be that of a model."""
    return re.fullmatch(PACKAGE_NAME_PATTERN, name) is not None


def is_release_id(name: str) -> bool:
    """Tell whether a folder's name is that of a release."""
    return _RELEASE_ID.fullmatch(name) is not None


def digest_of(release_id: str) -> str:
    """Return the part of an id that the content decides; the rest counts repeated installs."""
    return release_id[:_DIGEST_DIGITS]


def next_release_id(digest: str, taken: set[str]) -> str:
    """Return the first id of this content that no installed release has."""
    if digest not in taken:
        return digest
    return next(
        release_id
        for release_id in (f"{digest}-{count}" for count in range(2, 10_000))
        if release_id not in taken
    )


def manifest_digest(manifest_sha256: str) -> str:
    """Return the digest of a sealed package, whose manifest lists the hash of every file."""
    return manifest_sha256[:_DIGEST_DIGITS]


def content_digest(extracted: ExtractedArchive) -> str:
    """Return the digest of a package: of its manifest when sealed, else of all its files."""
    if extracted.manifest is not None and extracted.manifest.is_sealed:
        return manifest_digest(extracted.manifest_sha256)
    digest = hashlib.sha256(extracted.manifest_sha256.encode("ascii"))
    for entry in extracted.files:
        digest.update(f"\n{entry.sha256} {entry.path}".encode())
    return digest.hexdigest()[:_DIGEST_DIGITS]
