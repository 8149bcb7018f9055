"""Compares an installed package with the hashes it was installed with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from device_runtime.apps.release import InstallRecord, Release
from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.checksums import BytesProgress, hash_files
from device_runtime.package_format.files import list_files
from device_runtime.package_format.manifest import NewerFormatError
from device_runtime.package_format.package import Package, open_package, verify_package


@dataclass(frozen=True)
class Verified:
    """A release whose every file is what it was; sizes without manifest.json."""

    num_files: int
    size_bytes: int


def verify_release(release: Release, progress: BytesProgress | None = None) -> Verified:
    """Read every file of an installed release and compare it with its hash.

    A sealed package lists its hashes itself; those of a plain workspace were kept when it was
    installed.

    Raises:
        PackageError: a file is missing, is too much, or differs.
    """
    try:
        package = open_release(release)
        if package.manifest is not None and package.manifest.is_sealed:
            verify_package(release.root, progress)
            return Verified(len(package.manifest.files), package.manifest.size_bytes)
        return _verify_files(package, release.record(), progress)
    except PackageError as error:
        raise damage(release, error) from error


def damage(release: Release, error: PackageError) -> PackageError:
    """Return what is wrong with an installed release, and what repairs it on this machine."""
    if isinstance(error, NewerFormatError):
        return error
    what = str(error).partition("; ")[0]  # behind it is what helps whoever made the package
    return PackageError(
        f"{release.name} is damaged: {what}; `turbojet install --force` of its archive repairs it"
    )


def open_release(release: Release) -> Package:
    """Open an installed package, and check the one file that no manifest lists.

    Raises:
        PackageError: it does not open, or its manifest is not the one that was installed.
    """
    package = open_package(release.root)
    sha256 = ""
    if package.manifest is not None:
        sha256 = hashlib.sha256((package.root / names.MANIFEST).read_bytes()).hexdigest()
    if sha256 != release.record().manifest_sha256:
        raise PackageError(f"{names.MANIFEST} changed since it was installed")
    return package


def _verify_files(
    package: Package, record: InstallRecord, progress: BytesProgress | None
) -> Verified:
    found = {path for path in list_files(package.root) if path != names.MANIFEST}
    listed = {entry.path for entry in record.files}
    for path in sorted(found - listed):
        raise PackageError(f"{path} was not there when it was installed")
    for path in sorted(listed - found):
        raise PackageError(f"{path} is missing")
    actual = hash_files(package.root, sorted(listed), progress)
    for before, now in zip(record.files, actual, strict=True):
        if before != now:
            raise PackageError(
                f"{now.path} has {now.size_bytes} bytes and sha256 {now.sha256[:16]}..., it was "
                f"installed with {before.size_bytes} and {before.sha256[:16]}..."
            )
    return Verified(len(actual), sum(entry.size_bytes for entry in actual))
