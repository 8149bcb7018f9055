"""The models on this machine: releases side by side, one of them current, nothing half done.

``models/NAME/<release>/`` is a package, ``models/NAME/current`` a link to one of them. Everything
new is made in ``models/.incoming`` and renamed into place, so whatever is in there while nobody
holds the lock was left by a process that died, and goes.
"""

from __future__ import annotations

import difflib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from device_runtime.apps.places import DATA_DIR_VARIABLE, data_dir
from device_runtime.apps.release import (
    RECORD_SUFFIX,
    InstallRecord,
    Release,
    digest_of,
    is_model_name,
    is_release_id,
    next_release_id,
)
from device_runtime.apps.store_lock import exclusive
from device_runtime.errors import DeviceError, UsageError
from device_runtime.package_format.archive_staging import temporary_folder
from device_runtime.package_format.durable import sync_folder, write_atomically

MODELS = "models"

_CURRENT = "current"
_PREVIOUS = "previous"
_INCOMING = ".incoming"
_LOCK = ".lock"


class Store:
    """Finds, adds, activates and removes installed models.

    Methods that only look take no lock; `add`, `activate` and the like need `locked` around them.

    Args:
        folder: what `data_dir` returns.
    """

    def __init__(self, folder: Path) -> None:
        self.models_dir = folder / MODELS

    def names(self) -> tuple[str, ...]:
        """Return the models that have a release, sorted."""
        return tuple(sorted(name for name in self._folders() if self.releases(name)))

    def releases(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a model, the current one first, then the newest."""
        if not is_model_name(name):
            return ()
        folder = self.models_dir / name
        try:
            found = [entry for entry in os.scandir(folder) if is_release_id(entry.name)]
            times = {entry.name: entry.stat().st_mtime for entry in found if entry.is_dir()}
        except OSError:
            return ()
        current, previous = self._target(name, _CURRENT), self._target(name, _PREVIOUS)
        releases = [
            Release(
                name=name,
                release_id=release_id,
                root=folder / release_id,
                is_current=release_id == current,
                is_previous=release_id == previous and previous != current,
            )
            for release_id in sorted(times, key=lambda found: (-times[found], found))
        ]
        return tuple(sorted(releases, key=lambda release: not release.is_current))

    def get(self, name: str, release_id: str | None = None) -> Release:
        """Return the current release of a model, or the one that is named.

        Raises:
            UsageError: there is no such model or release, or none is current.
        """
        releases = self.releases(name)
        if not releases:
            raise UsageError(self._unknown(name))
        for release in releases:
            if release.release_id == release_id or (release_id is None and release.is_current):
                return release
        known = ", ".join(release.release_id for release in releases)
        if release_id is None:
            raise UsageError(
                f"{name} has no current release; `turbojet rollback {name} --release ID` makes one "
                f"of these current: {known}"
            )
        raise UsageError(f"{name} has no release {release_id!r}; installed: {known}")

    def find(self, target: str, release_id: str | None) -> Release | None:
        """Return the release that a name means; None where ``target`` must be a folder.

        Raises:
            UsageError: a release is named, and there is no such model or release.
        """
        if release_id is not None or self.releases(target):
            return self.get(target, release_id)
        return None

    def release_at(self, root: Path) -> Release | None:
        """Return the release that has a folder; None for any other folder."""
        found = (entry for entry in self.releases(root.parent.name) if entry.root == root)
        return next(found, None)

    @contextmanager
    def locked(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Keep every other writer out, and clean up after those that died.

        Args:
            tell: hears a sentence when another writer makes us wait.

        Raises:
            DeviceError: the store cannot be written.
        """
        try:
            self.models_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_change(self.models_dir, error) from error
        with exclusive(self.models_dir / _LOCK, tell):
            try:
                self._clean()
                yield
            except OSError as error:
                raise _cannot_change(self.models_dir, error) from error
            finally:
                with suppress(OSError):
                    (self.models_dir / _INCOMING).rmdir()

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """Give a folder to make something in; what is not renamed out of it is deleted.

        Raises:
            DeviceError: the folder cannot be made.
        """
        with temporary_folder(self.models_dir / _INCOMING, "new-") as folder:
            yield folder

    def check_links(self, folder: Path) -> None:
        """Refuse a disk that cannot say which release is current.

        Args:
            folder: of `incoming`.

        Raises:
            DeviceError: the file system has no links, or cannot be written.
        """
        try:
            os.symlink(_CURRENT, folder / _CURRENT)
        except OSError as error:
            raise DeviceError(
                f"{self.models_dir} takes no links ({error.strerror}), as disks with FAT or exFAT "
                f"do not; choose another disk with {DATA_DIR_VARIABLE}"
            ) from error

    def add(self, name: str, digest: str, root: Path, record: InstallRecord) -> Release:
        """Move a verified and synced package from `incoming` to its place, and no further.

        Args:
            name: name of the model.
            digest: what `content_digest` says of the package.
            root: the package's folder.
            record: what to remember about it.
        """
        folder = self.models_dir / name
        folder.mkdir(exist_ok=True)
        taken = {release.release_id for release in self.releases(name)}
        release_id = next_release_id(digest, taken)
        new_record = root.parent / f"record-{release_id}{RECORD_SUFFIX}"
        write_atomically(new_record, record.to_json())
        os.replace(new_record, folder / (release_id + RECORD_SUFFIX))
        os.rename(root, folder / release_id)
        sync_folder(folder)
        sync_folder(self.models_dir)
        return self.get(name, release_id)

    def activate(self, release: Release) -> Release:
        """Make a release current, by one rename; the one before becomes the previous one.

        A damaged twin of the release does not: nobody wants to go back to it.
        """
        old = self._target(release.name, _CURRENT)
        if old != release.release_id:
            if old is not None and digest_of(old) != digest_of(release.release_id):
                self._point(release.name, _PREVIOUS, old)
            self._point(release.name, _CURRENT, release.release_id)
        return self.get(release.name, release.release_id)

    def rollback(self, name: str, release_id: str | None = None) -> Release:
        """Make the previous release current again, or the one that is named.

        Raises:
            UsageError: there is no such model or release, or no previous one.
        """
        if release_id is not None:
            return self.activate(self.get(name, release_id))
        releases = self.releases(name)
        if not releases:
            raise UsageError(self._unknown(name))
        for release in releases:
            if release.is_previous:
                return self.activate(release)
        others = [release.release_id for release in releases if not release.is_current]
        hint = (
            f"name one with --release: {', '.join(others)}" if others else "nothing to go back to"
        )
        raise UsageError(f"{name} has no previous release; {hint}")

    def remove(self, name: str) -> None:
        """Delete a model with all its releases: all at once, whatever happens meanwhile.

        Raises:
            UsageError: there is no such model.
        """
        if not self.releases(name):
            raise UsageError(self._unknown(name))
        self._discard(self.models_dir / name)

    def remove_release(self, release: Release) -> None:
        """Delete one release.

        Raises:
            UsageError: it is the current one.
        """
        if release.is_current:
            raise UsageError(
                f"{release.release_id} is the current release of {release.name}; make another one "
                f"current with `turbojet rollback {release.name}`, or remove the whole model"
            )
        self._discard(release.root)
        release.record_path.unlink(missing_ok=True)

    def _folders(self) -> list[str]:
        try:
            entries = os.listdir(self.models_dir)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DeviceError(f"cannot read {self.models_dir}: {error.strerror}") from error
        return [name for name in entries if is_model_name(name)]

    def _target(self, name: str, link: str) -> str | None:
        """Return the release that a link means, None where it means none that is there."""
        try:
            target = os.readlink(self.models_dir / name / link)
        except OSError:
            return None
        is_there = is_release_id(target) and (self.models_dir / name / target).is_dir()
        return target if is_there else None

    def _point(self, name: str, link: str, release_id: str) -> None:
        with self.incoming() as folder:
            os.symlink(release_id, folder / link)
            os.replace(folder / link, self.models_dir / name / link)
        sync_folder(self.models_dir / name)

    def _discard(self, path: Path) -> None:
        """Rename out of sight, then delete: a kill in between leaves rubbish, not half a model."""
        incoming = self.models_dir / _INCOMING
        incoming.mkdir(exist_ok=True)
        rubbish = incoming / f"old-{secrets.token_hex(8)}"
        os.rename(path, rubbish)
        sync_folder(path.parent)
        shutil.rmtree(rubbish)

    def _clean(self) -> None:
        shutil.rmtree(self.models_dir / _INCOMING, ignore_errors=True)
        for name in self._folders():
            folder = self.models_dir / name
            for record in folder.glob(f"*{RECORD_SUFFIX}"):
                release = record.with_name(record.name.removesuffix(RECORD_SUFFIX))
                if is_release_id(release.name) and not release.is_dir():
                    record.unlink()
            if not self.releases(name):
                # What a dead install began; a folder with something of a person's stays.
                with suppress(OSError):
                    folder.rmdir()

    def _unknown(self, name: str) -> str:
        installed = self.names()
        near = difflib.get_close_matches(name, installed, n=1)
        if near:
            hint = f"did you mean {near[0]}"
        elif installed:
            hint = f"installed: {', '.join(installed)}"
        else:
            hint = "none is installed, `turbojet install X.tgz` installs one"
        return f"no model is called {name[:120]!r}; {hint}"


def find_package(target: str | None, folder: Path | None = None) -> Path:
    """Return the folder of the package that a person means.

    Args:
        target: name of an installed model, or a path to a package or workspace; None means the
            only model that is installed.
        folder: data folder, None for that of `data_dir`.

    Raises:
        UsageError: nothing or more than one thing can be meant.
    """
    store = Store(data_dir() if folder is None else folder)
    if target is None:
        installed = store.names()
        if len(installed) == 1:
            return store.get(installed[0]).root
        if installed:
            raise UsageError(f"several models are installed, name one: {', '.join(installed)}")
        raise UsageError("no model is installed; `turbojet install X.tgz` installs one")
    if os.sep not in target and store.releases(target):
        return store.get(target).root
    if os.path.isdir(target):
        return Path(target)
    if os.path.isfile(target):
        raise UsageError(f"{target} is a file; `turbojet install {target}` installs an archive")
    if os.sep in target:
        raise UsageError(f"{target} is not a folder")
    return store.get(target).root


def _cannot_change(path: Path, error: OSError) -> DeviceError:
    return DeviceError(
        f"cannot change {path}: {error.strerror or error}; is it yours, and not read-only or full"
    )
