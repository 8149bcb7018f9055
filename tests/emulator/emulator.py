"""Compiles a kernel source with g++ against cuda_emulator.h and launches it on numpy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from device_runtime.kernels import table

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "device_runtime" / "kernels"
CACHE = ROOT / ".cache" / "emulator"
HEADER = Path(__file__).with_name("cuda_emulator.h")
RACE_CHECK = Path(__file__).with_name("race_check.cpp")
RACES = "TURBOJET_RACE_CHECK=1"
"""Defined for kernels that tell their accesses to the race checker."""
C_TYPES = {"P": "void*", "i": "int32_t", "f": "float"}
CTYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int32, "f": ctypes.c_float}
GUARD = 64
Around: TypeAlias = Callable[[Mapping[int, tuple[int, int]]], AbstractContextManager[None]]


def has_compiler() -> bool:
    """Whether g++ is there to build the kernels for the CPU."""
    return shutil.which("g++") is not None


def _stub(row: table.Kernel) -> str:
    parameters = "".join(f", {C_TYPES[c]} a{i}" for i, c in enumerate(row.arguments))
    # A void* becomes whatever pointer the kernel wants.
    values = ", ".join(f"Any{{a{i}}}" if c == "P" else f"a{i}" for i, c in enumerate(row.arguments))
    return (
        f'extern "C" const char* emulate_{row.name}(unsigned x, unsigned y, unsigned z, '
        f"int block, int cluster, size_t shared{parameters}) {{ "
        f"return emulator::run({{x, y, z}}, block, cluster, shared, "
        f"[=] {{ {row.name}({values}); }}); }}\n"
    )


def _built(name: str, unit: str, files: Iterable[Path], *commands: list[str]) -> Path:
    """Compile C++ text to a library, cached by the commands and what it includes.

    SOURCE, OBJECT and TARGET in a command stand for files.
    """
    digest = hashlib.sha256(repr(commands).encode() + unit.encode())
    for file in files:
        digest.update(file.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source = target.with_suffix(f".{os.getpid()}.cpp")  # other workers build the same
        compiled, part = source.with_suffix(".o"), source.with_suffix(".part")
        source.write_text(unit)
        for command in commands:
            paths = {"SOURCE": str(source), "OBJECT": str(compiled), "TARGET": str(part)}
            words = [paths.get(word, word) for word in command]
            done = subprocess.run(["g++", *words], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ failed on {name}:\n{done.stderr[:6000]}")
        part.rename(target)
        source.unlink()
        compiled.unlink(missing_ok=True)
    return target


@cache
def race_library() -> ctypes.CDLL:
    """Build the race checker (race_check.cpp) and make its functions known to other libraries."""
    unit = f'#include "{RACE_CHECK}"\n'
    path = _built(
        "race_check",
        unit,
        [RACE_CHECK, *sorted(RACE_CHECK.parent.glob("race_*.h"))],
        ["-std=c++17", "-O2", "-Wall", "-shared", "-fPIC", f"-D{RACES}", "-o", "TARGET", "SOURCE"],
    )
    found = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    found.race_reports.restype = ctypes.c_char_p
    return found


def build(source: Path, rows: Iterable[table.Kernel], flags: tuple[str, ...]) -> ctypes.CDLL:
    """Build the entry points of a .cu file (cached by content)."""
    stubs = "struct Any { void* p; template <typename T> operator T*() const { return (T*)p; } };\n"
    stubs += "".join(_stub(row) for row in rows)
    stubs += 'extern "C" void emulate_backwards(int is) { emulator::is_backwards = is; }\n'
    files = [*sorted(HEADER.parent.glob("*.h")), *sorted(KERNELS.glob("*.cuh")), source]
    # longjmp between fiber stacks is on purpose: no fortify. Pragmas are for CUDA compilers.
    words = ["-std=c++17", "-O1", "-fPIC", "-w", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    words += ["-ffp-contract=off", "-include", str(HEADER), f"-I{KERNELS}", *flags]
    if f"-D{RACES}" in flags:
        # Calls before loads and stores; what they call is in race_library, not in libtsan.
        race_library()
        words += ["-g1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
        commands = [[*words, "-c", "-o", "OBJECT", "SOURCE"], ["-shared", "-o", "TARGET", "OBJECT"]]
    else:
        commands = [[*words, "-shared", "-o", "TARGET", "SOURCE"]]
    unit = f'#include "{source}"\n{stubs}'
    return ctypes.CDLL(str(_built(source.stem, unit, files, *commands)))


@cache
def library(source: str, *flags: str) -> ctypes.CDLL:
    """Build one source of the table and return it as a library."""
    rows = [row for row in table.KERNELS if row.source == source]
    return build(KERNELS / f"{source}.cu", rows, flags)


def launch(
    name: str,
    grid: tuple[int, int, int],
    arguments: list[NDArray[np.generic] | int | float | None],
    shared_bytes: int = 0,
    flags: tuple[str, ...] = (),
    cluster: int = 1,
) -> None:
    """Run a kernel; arrays are passed with guard bytes around them, which must stay untouched.

    Raises:
        RuntimeError: the emulator stopped the launch, or a guard byte changed.
    """
    row = table.kernel(name)
    run(library(row.source, *flags), row, grid, arguments, shared_bytes, cluster)


def run(
    built: ctypes.CDLL,
    row: table.Kernel,
    grid: tuple[int, int, int],
    arguments: list[NDArray[np.generic] | int | float | None],
    shared_bytes: int = 0,
    cluster: int = 1,
    around: Around = lambda _: nullcontext(),
) -> None:
    """The same for an entry point of a library that `build` made.

    ``around`` is entered with the address and bytes of each buffer, by the argument's place.
    """
    name = row.name
    function = getattr(built, f"emulate_{name}")
    function.restype = ctypes.c_char_p
    values: list[object] = []
    buffers: dict[int, tuple[int, int]] = {}
    guarded: list[tuple[NDArray[np.generic], NDArray[np.uint8]]] = []
    for letter, argument in zip(row.arguments, arguments, strict=True):
        if letter != "P":
            values.append(CTYPES[letter](argument))
        elif argument is None:
            values.append(ctypes.c_void_p(None))
        else:
            assert isinstance(argument, np.ndarray) and argument.flags.c_contiguous
            room = np.full(argument.nbytes + 2 * GUARD + 64, 0xA5, np.uint8)
            offset = -room.ctypes.data % 64
            room = room[offset : offset + argument.nbytes + 2 * GUARD]
            room[GUARD : GUARD + argument.nbytes] = argument.reshape(-1).view(np.uint8)
            guarded.append((argument, room))
            buffers[len(values)] = (room.ctypes.data + GUARD, argument.nbytes)
            values.append(ctypes.c_void_p(room.ctypes.data + GUARD))
    shape: list[object] = [ctypes.c_uint(size) for size in grid]
    shape += [ctypes.c_int(row.block), ctypes.c_int(cluster), ctypes.c_size_t(shared_bytes)]
    with around(buffers):
        message = function(*shape, *values)
    if message:
        raise RuntimeError(f"{name}: {message.decode()}")
    for argument, room in guarded:
        if not ((room[:GUARD] == 0xA5).all() and (room[GUARD + argument.nbytes :] == 0xA5).all()):
            raise RuntimeError(f"{name} wrote outside one of its buffers")
        if argument.flags.writeable:
            argument.reshape(-1).view(np.uint8)[:] = room[GUARD : GUARD + argument.nbytes]
