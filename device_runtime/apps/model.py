"""From what a person types to an open package: an installed model, a folder or an archive."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

from device_runtime.apps.end_signals import interruptible
from device_runtime.apps.install import Installation, InstallOptions, install
from device_runtime.apps.places import data_dir
from device_runtime.apps.progress_bar import byte_progress
from device_runtime.apps.store import Store, find_package
from device_runtime.apps.verify import damage
from device_runtime.errors import PackageError
from device_runtime.package_format.amounts import format_bytes, format_duration
from device_runtime.package_format.package import Package, open_package


def open_model(target: str | None) -> Package:
    """Open what `open_installed` does, or an archive, which is installed first and says so.

    Raises:
        UsageError: nothing or more than one thing can be meant.
        PackageError: the package or archive is damaged.
        DeviceError: the archive cannot be installed here.
    """
    store = Store(data_dir())
    if target is None or store.releases(target) or not os.path.isfile(target):
        return open_installed(target)
    done, seconds = install_archive(store, Path(target), InstallOptions())
    if done.outcome != "unchanged":
        tell(outcome_sentence(done, seconds))
    return open_package(done.release.root)


def open_installed(target: str | None, release_id: str | None = None) -> Package:
    """Open the package that a person means.

    Args:
        target: see `find_package`.
        release_id: a release of an installed model, None for the current one.

    Raises:
        UsageError: nothing or more than one thing can be meant.
        PackageError: it is damaged, and how to repair it.
    """
    store = Store(data_dir())
    root = store.get(target, release_id).root if target and release_id else find_package(target)
    try:
        return open_package(root)
    except PackageError as error:
        release = store.release_at(root)
        if release is None:
            raise
        raise damage(release, error) from error


def install_archive(
    store: Store, source: Path | BinaryIO, options: InstallOptions
) -> tuple[Installation, float]:
    """Install with progress on stderr; return what came of it, and the seconds it took.

    Raises:
        TurbojetError: see `install`.
    """
    start_s = time.monotonic()
    with interruptible(), byte_progress("install", sys.stderr) as report:
        done = install(store, source, options, progress=report, tell=tell)
    return done, time.monotonic() - start_s


def outcome_sentence(done: Installation, seconds: float) -> str:
    """Return what came of an installation, for people."""
    what = f"{done.release.name} release {done.release.release_id}"
    size = f"{done.num_files} files, {format_bytes(done.size_bytes)}"
    if done.outcome == "unchanged":
        return f"{what} is already installed, nothing to do"
    if done.outcome == "activated":
        return f"{what} was already installed and is current again"
    return f"installed {what}: {size}, verified, in {format_duration(seconds)}"


def tell(sentence: str) -> None:
    """Print a sentence that is no result."""
    print(sentence, file=sys.stderr, flush=True)
