"""Compiles a kernel source with g++ against cuda_emulator.h and launches it on numpy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_runtime.kernels import table

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "device_runtime" / "kernels"
CACHE = ROOT / ".cache" / "emulator"
HEADER = Path(__file__).with_name("cuda_emulator.h")
C_TYPES = {"P": "void*", "i": "int32_t", "f": "float"}
CTYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int32, "f": ctypes.c_float}
GUARD = 64


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


@cache
def library(source: str, *flags: str) -> ctypes.CDLL:
    """Build one .cu (cached by content) and return it as a library."""
    rows = [row for row in table.KERNELS if row.source == source]
    stubs = "struct Any { void* p; template <typename T> operator T*() const { return (T*)p; } };\n"
    stubs += "".join(_stub(row) for row in rows)
    headers = [*sorted(HEADER.parent.glob("*.h")), *sorted(KERNELS.glob("*.cuh"))]
    files = [*headers, KERNELS / f"{source}.cu"]
    digest = hashlib.sha256(repr(flags).encode() + stubs.encode())
    for file in files:
        digest.update(file.read_bytes())
    target = CACHE / f"{source}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unit = target.with_suffix(f".{os.getpid()}.cpp")  # other workers build the same
        unit.write_text(f'#include "{KERNELS / (source + ".cu")}"\n{stubs}')
        part = target.with_suffix(f".{os.getpid()}.part")
        # longjmp between fiber stacks is on purpose: no fortify. Pragmas are for CUDA compilers.
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
        command += ["-U_FORTIFY_SOURCE", "-ffp-contract=off", "-include", str(HEADER), *flags]
        done = subprocess.run(
            [*command, "-o", str(part), str(unit)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"g++ failed on {source}.cu:\n{done.stderr[:6000]}")
        part.rename(target)
        unit.unlink()
    return ctypes.CDLL(str(target))


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
    function = getattr(library(row.source, *flags), f"emulate_{name}")
    function.restype = ctypes.c_char_p
    values: list[object] = []
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
            values.append(ctypes.c_void_p(room.ctypes.data + GUARD))
    shape: list[object] = [ctypes.c_uint(size) for size in grid]
    shape += [ctypes.c_int(row.block), ctypes.c_int(cluster), ctypes.c_size_t(shared_bytes)]
    message = function(*shape, *values)
    if message:
        raise RuntimeError(f"{name}: {message.decode()}")
    for argument, room in guarded:
        if not ((room[:GUARD] == 0xA5).all() and (room[GUARD + argument.nbytes :] == 0xA5).all()):
            raise RuntimeError(f"{name} wrote outside one of its buffers")
        if argument.flags.writeable:
            argument.reshape(-1).view(np.uint8)[:] = room[GUARD : GUARD + argument.nbytes]
