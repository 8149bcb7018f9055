"""Compiles the CUDA kernels ahead of time: one cubin per source, SM, CUDA release, group size."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from device_runtime import kernels as kernels_package
from device_runtime.errors import UsageError
from device_runtime.kernels.cubins import (
    GROUP_SIZES,
    RECORD,
    SOURCES,
    Cubin,
    cubin_file,
    has_group_size,
    write_record,
)
from device_runtime.package_format import durable
from host_tools.nvrtc import Nvrtc, fetch_compiler
from host_tools.output_folder import replace_folder
from host_tools.progress import Progress

SOURCE_FOLDER = Path(kernels_package.__file__).parent
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Build:
    """One variant of all kernels.

    Attributes:
        sm: 87 for sm_87.
        cuda: release of the compiler; cubins run on drivers of the same major release or a later.
        is_plain: no mma.m16n8k16, no cp.async: what sm_72 gets.
    """

    sm: int
    cuda: str
    is_plain: bool = False

    @property
    def name(self) -> str:
        """As a person writes it: "sm_87 by CUDA 12.6"."""
        return f"sm_{self.sm} by CUDA {self.cuda}{', plain' if self.is_plain else ''}"


BUILDS = (
    Build(72, "11.8", is_plain=True),  # Xavier: JetPack 5 (CUDA 11.4)
    Build(87, "11.8"),  # Orin: JetPack 5
    Build(87, "12.6"),  # Orin: JetPack 6
    Build(87, "13.0"),  # Orin: JetPack 7
    Build(110, "13.0"),  # Thor: JetPack 7
    Build(90, "13.0"),  # H100 and H200: development
    Build(90, "13.0", is_plain=True),  # the plain variant, tested where there is no Xavier
)


@dataclass(frozen=True)
class Unit:
    """One cubin to be made; `group_size` is 0 where the source does not depend on it."""

    source: str
    build: Build
    group_size: int

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags."""
        flags = ["-std=c++17", f"-arch=sm_{self.build.sm}"]
        flags.append(f"-DTURBOJET_PLAIN={int(self.build.is_plain)}")
        if self.group_size:
            flags.append(f"-DTURBOJET_GROUP_SIZE={self.group_size}")
        return tuple(flags)

    @property
    def file(self) -> str:
        """The cubin's name."""
        build = self.build
        return cubin_file(self.source, build.sm, build.cuda, self.group_size, build.is_plain)


def units_of(builds: Iterable[Build], sources: Sequence[str] = SOURCES) -> list[Unit]:
    """Return every cubin of some builds."""
    return [
        Unit(source, build, group_size)
        for build in builds
        for source in sources
        for group_size in (GROUP_SIZES if has_group_size(source) else (0,))
    ]


def builds_for(sms: Iterable[int]) -> tuple[Build, ...]:
    """Return the builds of some SMs.

    Raises:
        UsageError: there is none for one of them.
    """
    wanted = set(sms)
    known = {build.sm for build in BUILDS}
    if unknown := sorted(wanted - known):
        raise UsageError(f"sm {unknown[0]} has no build, there are {sorted(known)}")
    return tuple(build for build in BUILDS if build.sm in wanted)


@cache
def source_files(source: str) -> dict[str, str]:
    """Return the text of a source and of all headers that it includes, by name, itself first."""
    found: dict[str, str] = {}
    waiting = [f"{source}.cu"]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = (SOURCE_FOLDER / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(found[name])
    return found


def sources_sha256(source: str) -> str:
    """Return the sha256 of a source and its headers: names, lengths and texts, sorted by name."""
    digest = hashlib.sha256()
    for name, text in sorted(source_files(source).items()):
        data = text.encode()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def compile_unit(unit: Unit, compilers: Path) -> bytes:
    """Return a cubin.

    Args:
        unit: what to make.
        compilers: folder of the compilers, see `fetch_compiler`; the release must be there.

    Raises:
        InternalError: the source does not compile.
        DeviceError: the compiler cannot be loaded.
    """
    files = dict(source_files(unit.source))
    name = f"{unit.source}.cu"
    text = files.pop(name)
    return _compiler(compilers / unit.build.cuda).compile(name, text, files, unit.flags)


def build_kernels(
    output: Path, builds: Sequence[Build], compilers: Path, progress: Progress
) -> Path:
    """Compile all kernels into a folder with a record of what is in it.

    Args:
        output: the folder; one that has a record is replaced.
        builds: the variants.
        compilers: where the compilers are kept; missing ones are fetched.
        progress: counts the cubins.

    Returns:
        ``output``.

    Raises:
        UsageError: ``output`` is something else.
        DeviceError: a compiler cannot be fetched or loaded.
        InternalError: a source does not compile.
    """
    if output.exists() and not (output / RECORD).is_file():
        raise UsageError(f"{output} exists and is no folder of kernels, name another output")
    for release in dict.fromkeys(build.cuda for build in builds):
        fetch_compiler(release, compilers)
    units = units_of(builds)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        with (
            progress.task("kernels", len(units), "cubins") as task,
            ProcessPoolExecutor(os.cpu_count()) as pool,
        ):
            running = {pool.submit(compile_unit, unit, compilers): unit for unit in units}
            cubins = []
            for done in as_completed(running):
                cubins.append(_write(part, running[done], done.result()))
                task.advance(1)
        write_record(part, cubins)
        part.chmod(0o755)
        durable.sync_folder(part)
        replace_folder(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output


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
        flags=unit.flags,
    )


@cache
def _compiler(folder: Path) -> Nvrtc:
    return Nvrtc(folder)
