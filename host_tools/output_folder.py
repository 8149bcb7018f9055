"""Puts a finished folder in the place of its output, and never over somebody else's work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device_runtime.errors import UsageError
from device_runtime.package_format import durable
from host_tools.stage import RECORD_DIR, Stage


def check_replaceable(output: Path, stage: Stage) -> None:
    """Refuse to replace a folder that this stage did not write.

    Raises:
        UsageError: there is a file, or a folder with something else in it.
    """
    if not os.path.lexists(output):
        return
    is_ours = output.is_dir() and (
        stage.record_path.is_file() or {path.name for path in output.iterdir()} <= {RECORD_DIR}
    )
    if not is_ours:
        raise UsageError(
            f"{output} exists and {stage.name} did not write it, name another output or remove it"
        )


def behind_link(output: Path) -> Path:
    """Return the folder that an output means: where a link leads, so that the link stays."""
    return output.resolve() if output.is_symlink() else output


def check_outside(source: Path, *places: Path) -> None:
    """Refuse to write into what is read: stages know their finished work by what is in it.

    Args:
        source: folder of a checkpoint or a workspace.
        places: what will be written.

    Raises:
        UsageError: one of the places lies in the folder, or is it.
    """
    folder = source.resolve()
    for place in places:
        if place.resolve().is_relative_to(folder):
            raise UsageError(
                f"{place} lies in {source}, which stays as it is; name a place outside of it"
            )


def replace_folder(part: Path, output: Path) -> None:
    """Put the finished folder ``part`` in place of ``output``; a kill leaves one of them whole."""
    old = output.with_name(f".{output.name}.old")
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if output.is_dir():
        output.rename(old)
    part.rename(output)
    durable.sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(work_dir: Path, stage: Stage) -> Iterator[Path]:
    """Give a folder for what this very stage has finished so far; a finished stage removes it.

    What is left of a run with other inputs or settings is removed first.
    """
    folder = work_dir / f"{stage.name}-{stage.fingerprint[:16]}"
    for other in work_dir.glob(f"{stage.name}-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)
