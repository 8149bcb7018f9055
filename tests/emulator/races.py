"""Launches kernels under the race checker, race_check.cpp, and says what it found."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from emulator import emulator
from numpy.typing import NDArray

from device_runtime.kernels import table

RACE_FLAG = f"-D{emulator.RACES}"
_LEVELS = ("", "", " and others of its warp", " and others of its block")
_PARAMETERS = r"\b{name}\(([^)]*)\)"


@dataclass(frozen=True)
class Access:
    """One side of a race.

    Attributes:
        kernel: entry point.
        launch: of it, counted over all.
        who: thread of the grid.
        kind: read or write, with "atomic" or "asynchronous" before it.
        line: of the source.
    """

    kernel: str
    launch: int
    who: str
    kind: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind} by {self.kernel}, launch {self.launch}, {self.who}, at {self.line}"


@dataclass(frozen=True)
class Race:
    """Two accesses to a byte that nothing orders, or another wrong of a kernel.

    Attributes:
        what: is wrong.
        array: buffer, or kind of shared memory.
        offset: of the byte.
        earlier: as the emulator came to them.
        later: the same access where there is only one.
    """

    what: str
    array: str
    offset: int
    earlier: Access
    later: Access

    def __str__(self) -> str:
        if not self.array:
            return f"{self.earlier.kernel} {self.what}"
        return f"{self.array}[byte {self.offset}] {self.what}: {self.earlier}; then {self.later}"


def launch(
    name: str,
    grid: tuple[int, int, int],
    arguments: list[NDArray[np.generic] | int | float | None],
    shared_bytes: int = 0,
    flags: tuple[str, ...] = (),
) -> None:
    """Run a kernel as `emulator.launch` does.

    Raises:
        RuntimeError: as that, or the kernel has a race.
    """
    row = table.kernel(name)
    source = emulator.KERNELS / f"{row.source}.cu"
    built = emulator.library(row.source, *flags, RACE_FLAG)
    run(built, source, row, grid, arguments, shared_bytes)
    if found := collect():
        raise RuntimeError(f"{name}: " + "\n".join(map(str, found)))


def run(
    built: ctypes.CDLL,
    source: Path,
    row: table.Kernel,
    grid: tuple[int, int, int],
    arguments: list[NDArray[np.generic] | int | float | None],
    shared_bytes: int = 0,
    *,
    is_programmatic: bool = False,
) -> None:
    """Run an entry point of a library with `RACE_FLAG`; `collect` tells what was found."""
    (parameters,) = re.findall(_PARAMETERS.format(name=row.name), source.read_text())
    names = [parameter.split()[-1].lstrip("*") for parameter in parameters.split(",")]
    around = partial(_watched, row.name, names, is_programmatic)
    emulator.run(built, row, grid, arguments, shared_bytes, around=around)


@contextmanager
def _watched(
    kernel: str,
    names: list[str],
    is_programmatic: bool,
    buffers: Mapping[int, tuple[int, int]],
) -> Iterator[None]:
    for place, (address, num_bytes) in buffers.items():
        add_global(address, num_bytes, names[place])
    try:
        with watch(kernel, is_programmatic=is_programmatic):
            yield
    finally:
        for address, _ in buffers.values():
            drop_global(address)


def collect() -> list[Race]:
    """Return what was found since the last call, but for what is meant to be so."""
    found = []
    for line in emulator.race_library().race_reports().decode().splitlines():
        what, array, offset, *sides = line.split("\t")
        found.append(Race(what, array, int(offset), _access(sides[:6]), _access(sides[6:])))
    return [race for race in found if not _is_newest_token(race)]


def _is_newest_token(race: Race) -> bool:
    """Decode attention copies whole steps of cached tokens while the newest is stored among them.

    What it gets of that one counts for nothing (decode_stream.cuh); a byte stored leaves its
    neighbours as they are.
    """
    first, second = race.earlier, race.later
    writer, reader = (first, second) if first.kind == "write" else (second, first)
    if writer.kind != "write" or reader.kind not in ("asynchronous read", "read"):
        return False
    files = tuple(Path(side.line.split(":")[0]).name for side in (writer, reader))
    return (
        first.launch == second.launch
        and "shared" not in race.array
        and files[0] in ("kv_cache.cuh", "decode_block.cuh")
        and files[1] == "decode_stream.cuh"
    )


@contextmanager
def watch(name: str, *, is_programmatic: bool = False) -> Iterator[None]:
    """What is emulated inside is one launch of a kernel."""
    checker = emulator.race_library()
    checker.race_begin_launch(name.encode(), int(is_programmatic))
    try:
        yield
    finally:
        checker.race_end_launch()


def add_global(address: int, num_bytes: int, name: str) -> None:
    """Watch a buffer of the device."""
    emulator.race_library().race_add_global(
        ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), name.encode()
    )


def drop_global(address: int) -> None:
    """Watch it no longer."""
    emulator.race_library().race_drop_global(ctypes.c_void_p(address))


def full_edge() -> None:
    """Say that what follows begins when all before it is done, as a copy or a graph does."""
    emulator.race_library().race_full_edge()


def _access(side: list[str]) -> Access:
    kernel, launch, thread, level, kind, where = side
    who = f"thread {thread} of the grid{_LEVELS[int(level)]}"
    return Access(kernel, int(launch), who, kind, _line(int(where, 16)))


@cache
def _line(address: int) -> str:
    """File and line of the code before an address: the kernel's, not the emulator's."""
    bases: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split()
        begin, end = (int(word, 16) for word in span.split("-"))
        base = bases.setdefault("".join(path), begin)
        if begin <= address < end and path:
            # The address is where a call returns to.
            command = ["addr2line", "-i", "-e", path[0], hex(address - 1 - base)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            places = [place.split(" ")[0] for place in done.stdout.splitlines()]
            inside = [place for place in places if ".cu" in place]
            return (inside or places)[0].removeprefix(f"{emulator.ROOT}/")
    return "?"
