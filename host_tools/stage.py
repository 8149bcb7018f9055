"""Records of finished stages: work whose inputs and settings are unchanged is not done again."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from device_runtime.errors import UsageError
from device_runtime.package_format.durable import write_atomically
from host_tools.content_hash import ContentHasher, content_files
from host_tools.phase_times import HASHING, PhaseTimes

RECORD_DIR = ".turbojet"
"""Folder inside a stage's own folder that holds its record; no part of any result."""

Setting = str | int | float | bool | None | tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One run of one stage, known by what it reads and by what shapes its result.

    Attributes:
        name: the verb ("quantize").
        folder: the stage's own folder, where the record is kept (its output or the work folder).
        inputs: files and folders it reads, in a fixed order; their paths do not matter, their
            contents do.
        settings: every setting that changes the result, and nothing else (not the device).
        version: counted up when the stage's code starts to give another result.
    """

    name: str
    folder: Path
    inputs: tuple[Path, ...]
    settings: Mapping[str, Setting]
    version: int = 1

    @property
    def record_path(self) -> Path:
        """The record of this stage."""
        return self.folder / RECORD_DIR / f"{self.name}.json"

    @cached_property
    def input_hashes(self) -> list[str]:
        """Sha256 of names and contents of each input, in hex.

        Raises:
            PackageError: an input is not there.
        """
        hasher = _hasher(self.folder)
        return [hasher.hash_tree(path) for path in self.inputs]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of name, version, settings and contents of the inputs, in hex.

        Raises:
            PackageError: an input is not there.
        """
        facts = {
            "stage": self.name,
            "version": self.version,
            "settings": dict(self.settings),
            "inputs": self.input_hashes,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def is_finished(self) -> bool:
        """Tell whether the record names this fingerprint and every output is as it was left."""
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
            fingerprint, outputs = record["fingerprint"], dict(record["outputs"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if fingerprint != self.fingerprint:
            return False
        paths = [self.folder / name for name in outputs]
        if not all(path.is_file() for path in paths):
            return False
        return _hasher(self.folder).hash_files(paths) == list(outputs.values())

    def record(
        self,
        outputs: Sequence[Path],
        folder: Path | None = None,
        times: PhaseTimes | None = None,
    ) -> None:
        """Write down that the stage is finished; call it when every output is whole.

        Args:
            outputs: files and folders the stage wrote. A file that a later stage may change is
                left out.
            folder: where they are now, when that is not yet the stage's folder: the record then
                lies beside them and takes its place together with them, in one rename.
            times: of the stage, to be kept in the record; hears of the hashing.
        """
        place = self.folder if folder is None else folder
        paths = [path for output in outputs for _, path in content_files(output)]
        with nullcontext() if times is None else times.phase(HASHING):
            hashes = _hasher(place).hash_files(paths)
        facts: dict[str, object] = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "outputs": {
                _output_name(path, place): content
                for path, content in zip(paths, hashes, strict=True)
            },
        }
        if times is not None:
            facts["times"] = times.shares()
        record_path = place / RECORD_DIR / self.record_path.name
        record_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record_path, json.dumps(facts, indent=2, sort_keys=True).encode())

    def forget(self) -> None:
        """Drop the record before outputs are replaced, so that a kill leaves no false claim."""
        self.record_path.unlink(missing_ok=True)


def content_sha256(folder: Path, path: Path) -> str:
    """Return the sha256 of a file, or of the names and contents in a folder, in hex.

    Args:
        folder: whose stages remember the hashes of files.
        path: file or folder.

    Raises:
        PackageError: nothing is there.
    """
    hasher = _hasher(folder)
    return hasher.hash_files([path])[0] if path.is_file() else hasher.hash_tree(path)


def _hasher(folder: Path) -> ContentHasher:
    return ContentHasher(folder / RECORD_DIR / "hashes.json")


def _output_name(path: Path, folder: Path) -> str:
    if path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    return path.absolute().as_posix()


@dataclass(frozen=True)
class StageRecord:
    """What a record says, for reports.

    Attributes:
        changed_ns: when it was written.
        size_bytes: of all outputs that are there.
        hashes: sha256 of each output in hex, in the order of their names.
    """

    changed_ns: int
    size_bytes: int
    hashes: tuple[str, ...]


def read_record(folder: Path, name: str) -> StageRecord | None:
    """Return what the record of a stage says, None when there is none."""
    path = folder / RECORD_DIR / f"{name}.json"
    try:
        outputs = json.loads(path.read_text(encoding="utf-8"))["outputs"]
        changed_ns = path.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = [folder / output for output in outputs]
    size_bytes = sum(path.stat().st_size for path in found if path.is_file())
    return StageRecord(changed_ns, size_bytes, tuple(str(value) for value in outputs.values()))


@contextmanager
def exclusive(folder: Path, name: str = "lock") -> Iterator[None]:
    """Hold a folder for this process alone; the kernel lets go of it when the process dies.

    Args:
        folder: made when it is not there.
        name: of the lock; ``build`` holds another one than the stages that it runs.

    Raises:
        UsageError: another process holds it.
    """
    (folder / RECORD_DIR).mkdir(parents=True, exist_ok=True)
    with (folder / RECORD_DIR / name).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another turbojet-host is at work in {folder}, wait for it or name another folder"
            ) from error
        yield
