"""What the CUDA kernels are compiled to: one cubin per source, SM, CUDA release, group size."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from device_runtime import kernels as kernels_package
from device_runtime.errors import UsageError
from device_runtime.kernels.cubins import (
    GROUP_SIZES,
    SOURCES,
    build_name,
    cubin_file,
    has_group_size,
)
from device_runtime.package_format import durable
from device_runtime.package_format.boards import Board
from host_tools.nvrtc import WHEELS, Nvrtc

SOURCE_FOLDER = Path(kernels_package.__file__).parent
SWITCHES = {
    # Whole units take more registers than there are.
    ("w4a16_gemv_8", 110): ("-DTURBOJET_GEMV_PARTS=2",),
}
"""What the sources of some SMs are compiled with beside the rest, by source and SM."""
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
        return build_name(self.sm, self.cuda, self.is_plain)


BUILDS = (
    Build(72, "11.8", is_plain=True),  # Xavier: JetPack 5 (CUDA 11.4)
    Build(87, "11.8"),  # Orin: JetPack 5
    Build(87, "12.6"),  # Orin: JetPack 6
    Build(87, "13.0"),  # Orin: JetPack 7
    Build(110, "13.0"),  # Thor: JetPack 7
    Build(90, "13.0"),  # H100 and H200: development
    Build(90, "13.0", is_plain=True),  # the plain variant, tested where there is no Xavier
)


CUDA_OF_JETPACK = {5: "11.8", 6: "12.6", 7: "13.0"}
"""The release whose cubins a JetPack's driver runs; a driver of 11.4 takes those of 11.8."""


@dataclass(frozen=True)
class KernelCache:
    """Where what compiling needs and gives is kept; all of it can be deleted.

    Attributes:
        compilers: NVIDIA's compilers, a folder per release.
        cubins: what they made, by the hash of sources, flags and compiler.
    """

    compilers: Path
    cubins: Path

    @classmethod
    def default(cls) -> KernelCache:
        """Return the folders under TURBOJET_CACHE_DIR, else under the user's cache."""
        folder = os.environ.get("TURBOJET_CACHE_DIR")
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(folder) if folder else Path(user) / "turbojet"
        return cls(root / "nvrtc", root / "cubins")


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
        return (*flags, *SWITCHES.get((self.source, self.build.sm), ()))

    @property
    def file(self) -> str:
        """The cubin's name."""
        build = self.build
        return cubin_file(self.source, build.sm, build.cuda, self.group_size, build.is_plain)


def units_of(
    builds: Iterable[Build],
    sources: Sequence[str] = SOURCES,
    group_sizes: Sequence[int] = GROUP_SIZES,
) -> list[Unit]:
    """Return every cubin of some builds."""
    return [
        Unit(source, build, group_size)
        for build in builds
        for source in sources
        for group_size in (group_sizes if has_group_size(source) else (0,))
    ]


def builds_for_boards(boards: Iterable[Board]) -> tuple[Build, ...]:
    """Return the builds that cover every JetPack of some boards."""
    wanted = {
        (board.sm, CUDA_OF_JETPACK[jetpack]) for board in boards for jetpack in board.jetpacks
    }
    return tuple(build for build in BUILDS if (build.sm, build.cuda) in wanted)


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


def cached_unit(unit: Unit, cache: KernelCache) -> bytes:
    """Return a cubin, compiled unless the same sources, flags and compiler gave one before.

    Args:
        unit: what to make.
        cache: the compilers, and where cubins are kept.

    Raises:
        InternalError: the source does not compile.
        DeviceError: the compiler cannot be loaded.
    """
    recipe = "\0".join((sources_sha256(unit.source), WHEELS[unit.build.cuda], *unit.flags))
    kept = cache.cubins / f"{hashlib.sha256(recipe.encode()).hexdigest()}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    cubin = compile_unit(unit, cache.compilers)
    cache.cubins.mkdir(parents=True, exist_ok=True)
    durable.write_atomically(kept, cubin)
    return cubin


@cache
def _compiler(folder: Path) -> Nvrtc:
    return Nvrtc(folder)
