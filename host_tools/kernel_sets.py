"""Writes folders of cubins: all of them, or those that a package takes to its boards."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from pathlib import Path

from device_runtime.errors import DeviceError, PackageError, UsageError
from device_runtime.kernels.cubins import (
    RECORD,
    SOURCES,
    Cubin,
    interface_of,
    read_record,
    write_record,
)
from device_runtime.package_format import durable
from device_runtime.package_format.boards import Board
from device_runtime.package_format.model_config import ModelConfig
from host_tools.kernels import (
    BUILDS,
    Build,
    KernelCache,
    Unit,
    builds_for_boards,
    cached_unit,
    sources_sha256,
    units_of,
)
from host_tools.nvrtc import WHEELS, fetch_compiler
from host_tools.output_folder import behind_link, replace_folder
from host_tools.package_options import KERNELS_AUTO, KERNELS_NONE
from host_tools.progress import Progress
from host_tools.worker_processes import worker_processes


def build_kernels(
    output: Path, builds: Sequence[Build], cache: KernelCache, progress: Progress
) -> Path:
    """Compile all kernels into a folder with a record of what is in it.

    Args:
        output: the folder; one that has a record is replaced.
        builds: the variants.
        cache: the compilers (missing ones are fetched) and what they made before.
        progress: counts the cubins.

    Returns:
        ``output``.

    Raises:
        UsageError: ``output`` is something else.
        DeviceError: a compiler cannot be fetched or loaded.
        InternalError: a source does not compile.
    """
    output = behind_link(output)
    if output.exists() and not (output / RECORD).is_file():
        raise UsageError(f"{output} exists and is no folder of kernels, name another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        _compile_into(part, units_of(builds, SOURCES), cache, progress)
        part.chmod(0o755)
        durable.sync_folder(part)
        replace_folder(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output


def package_units(model: ModelConfig, boards: Iterable[Board]) -> list[Unit]:
    """Return the cubins that a model's package takes to its boards."""
    group_sizes = (model.group_size,) if model.group_size else ()
    return units_of(builds_for_boards(boards), SOURCES, group_sizes)


def kernels_fingerprint(source: str) -> str:
    """Return what tells one choice of kernels from another: part of a package's fingerprint.

    Args:
        source: as `PackOptions.kernels`.

    Raises:
        PackageError: the folder's record is damaged.
    """
    if source == KERNELS_NONE:
        return source
    if source == KERNELS_AUTO:
        texts = [f"{name} {sources_sha256(name)}" for name in SOURCES]
        flags = [
            f"{unit.file} {WHEELS[unit.build.cuda]} {' '.join(unit.flags)}"
            for unit in units_of(BUILDS, SOURCES)
        ]
        parts = texts + flags
    else:
        parts = [f"{cubin.file} {cubin.sha256}" for cubin in read_record(Path(source))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_kernels(source: str, model: ModelConfig, boards: Iterable[Board]) -> None:
    """Refuse a folder of kernels that a package for these boards cannot be made with.

    Args:
        source: as `PackOptions.kernels`.
        model: of the package.
        boards: that it is for.

    Raises:
        UsageError: the folder has no record, lacks a cubin, or has one of another version's
            sources.
        PackageError: its record is damaged.
    """
    if source not in (KERNELS_AUTO, KERNELS_NONE):
        _listed_units(Path(source), package_units(model, boards))


def write_package_kernels(
    folder: Path,
    model: ModelConfig,
    boards: Sequence[Board],
    source: str,
    cache: KernelCache,
    progress: Progress,
) -> None:
    """Write the cubins of a package and their record.

    Args:
        folder: is made, unless there are to be none.
        model: of the package.
        boards: that it is for.
        source: as `PackOptions.kernels`.
        cache: the compilers and what they made before.
        progress: counts the cubins.

    Raises:
        UsageError: the folder that was named has no record, lacks a cubin, or has one of another
            version's sources.
        PackageError: its record or a cubin is damaged.
        DeviceError: a compiler cannot be fetched or loaded.
        InternalError: a source does not compile.
    """
    if source == KERNELS_NONE:
        return
    folder.mkdir()
    units = package_units(model, boards)
    if source == KERNELS_AUTO:
        try:
            _compile_into(folder, units, cache, progress)
        except DeviceError as error:
            raise DeviceError(
                f"{error}; give --kernels a folder that turbojet-host kernels made where there is "
                "a network, or none for a package without a GPU's kernels"
            ) from error
        return
    _copy_units(Path(source), folder, units)


def _compile_into(
    folder: Path, units: Sequence[Unit], cache: KernelCache, progress: Progress
) -> None:
    for release in dict.fromkeys(unit.build.cuda for unit in units):
        fetch_compiler(release, cache.compilers)
    with (
        progress.task("kernels", len(units), "cubins") as task,
        worker_processes() as pool,
    ):
        running = {pool.submit(cached_unit, unit, cache): unit for unit in units}
        cubins = []
        for done in as_completed(running):
            cubins.append(_write(folder, running[done], done.result()))
            task.advance(1)
    write_record(folder, cubins)


def _write(folder: Path, unit: Unit, cubin: bytes) -> Cubin:
    durable.write_atomically(folder / unit.file, cubin)
    return Cubin(
        file=unit.file,
        source=unit.source,
        sm=unit.build.sm,
        cuda=unit.build.cuda,
        group_size=unit.group_size,
        is_plain=unit.build.is_plain,
        sha256=hashlib.sha256(cubin).hexdigest(),
        sources_sha256=sources_sha256(unit.source),
        interface=interface_of(unit.source),
        flags=unit.flags,
    )


def _listed_units(source: Path, units: Sequence[Unit]) -> list[Cubin]:
    """Return the rows of a folder's record for these units."""
    rows = {cubin.file: cubin for cubin in read_record(source)}
    if not rows:
        raise UsageError(f"{source} is no folder of kernels, turbojet-host kernels makes one")
    for unit in units:
        name = unit.file
        if name not in rows:
            raise UsageError(f"{source} has no {name}, which a target board needs; make it again")
        if rows[name].sources_sha256 != sources_sha256(unit.source):
            raise UsageError(
                f"{name} in {source} is made of other sources than those of this turbojet-host; "
                "make it again"
            )
    return [rows[unit.file] for unit in units]


def _copy_units(source: Path, folder: Path, units: Sequence[Unit]) -> None:
    cubins = _listed_units(source, units)
    for cubin in cubins:
        data = (source / cubin.file).read_bytes()
        if hashlib.sha256(data).hexdigest() != cubin.sha256:
            raise PackageError(f"{source / cubin.file} is not what its record says; make it again")
        durable.write_atomically(folder / cubin.file, data)
    write_record(folder, cubins)
