"""The fake driver with kernels that compute: each launch runs on the CPU emulator, in place.

Addresses are those of host memory, so the whole backend, graphs included, runs without a GPU. What
stands for a cubin holds the flags that the emulator's compiler gets for its source.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from emulator import emulator
from fake_cuda import ATTRIBUTES, FakeCuda, Launched, put_cubin

from device_runtime.kernels.cubins import GROUP_SIZES, SOURCES, has_group_size, write_record
from device_runtime.kernels.table import kernel
from host_tools.kernels import sources_sha256

# Few SMs make few blocks, which is what the emulator's time goes by.
SMALL_GPU = ATTRIBUTES | {16: 2}
_FLAG = "-DTURBOJET_"
_FIRST_PAGE = 4096


@dataclass
class EmulatedCuda(FakeCuda):
    """Stands for libcuda and the device.

    Attributes:
        group_size: that the kernels of 4-bit matrices are built for whose cubins say nothing.
        flags: more of them for the emulator's compiler.
    """

    group_size: int = 128
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.attributes = dict(SMALL_GPU)
        super().__post_init__()
        self._modules: list[tuple[str, ...]] = []
        self._flags: dict[int, tuple[str, ...]] = {}

    def do_cuModuleLoadData(self, module, cubin):
        words = cubin.value.decode("ascii", "replace").split()
        self._modules.append(tuple(word for word in words if word.startswith(_FLAG)))
        module._obj.value = len(self._modules)

    def do_cuModuleGetFunction(self, handle, module, name):
        super().do_cuModuleGetFunction(handle, module, name)
        self._flags[handle._obj.value] = self._modules[module.value - 1]

    def _run(self, launched: Launched) -> None:
        row = kernel(launched.name)
        pointers = [
            value
            for letter, value in zip(row.arguments, launched.arguments, strict=True)
            if letter == "P"
        ]
        if any(0 < pointer < _FIRST_PAGE for pointer in pointers):
            self.is_lost = True  # as after an access to an address that nobody has
            return
        self.launches.append(launched)
        flags = (*self._flags[launched.function], *self.flags)
        if has_group_size(row.source) and not any("GROUP_SIZE" in flag for flag in flags):
            flags = (group_flag(self.group_size), *flags)
        run = getattr(emulator.library(row.source, *flags), f"emulate_{row.name}")
        run.restype = ctypes.c_char_p
        values = [
            emulator.CTYPES[letter](value or None)
            if letter == "P"
            else emulator.CTYPES[letter](value)
            for letter, value in zip(row.arguments, launched.arguments, strict=True)
        ]
        message = run(
            *(ctypes.c_uint(size) for size in launched.grid),
            ctypes.c_int(row.block),
            ctypes.c_int(1),
            ctypes.c_size_t(launched.shared_bytes),
            *values,
        )
        if message:
            raise RuntimeError(f"{launched.name}: {message.decode()}")


@dataclass
class TimedCuda(FakeCuda):
    """Its clock goes on with every launch; kernels compute nothing, but the probe finds SMs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._microseconds = 0.0
        self._events: list[float] = []

    def do_cuEventCreate(self, event, flags):
        self._events.append(0.0)
        event._obj.value = len(self._events)

    def do_cuEventRecord(self, event, stream):
        self._events[event.value - 1] = self._microseconds

    def do_cuEventElapsedTime(self, milliseconds, earlier, later):
        spent = self._events[later.value - 1] - self._events[earlier.value - 1]
        milliseconds._obj.value = spent / 1e3

    def _run(self, launched: Launched) -> None:
        row, values = kernel(launched.name), launched.arguments
        numbers = [
            value for letter, value in zip(row.arguments, values, strict=True) if letter == "i"
        ]
        self._microseconds += 1 + sum(numbers) / 1e4
        super()._run(launched)
        self.launches.clear()
        if launched.name == "sm_probe":
            ids = (ctypes.c_uint32 * launched.grid[0]).from_address(int(values[0]))
            ids[:] = range(launched.grid[0])
            spins = (ctypes.c_uint64 * (2 * launched.grid[0])).from_address(int(values[1]))
            spins[:] = [2_000_000, 1_000_000] * launched.grid[0]


def write_emulated_cubins(folder: Path) -> None:
    """Write what stands for the cubins of the emulated GPU: both variants, every group size."""
    folder.mkdir(parents=True, exist_ok=True)
    cubins = []
    for source in SOURCES:
        for group_size in GROUP_SIZES if has_group_size(source) else (0,):
            for is_plain in (False, True):
                flags = [group_flag(group_size)] if group_size else []
                flags += [f"{_FLAG}PLAIN=1"] if is_plain else []
                row = put_cubin(
                    folder,
                    source,
                    group_size,
                    " ".join(["emulated", *flags]),
                    is_plain=is_plain,
                    sources_sha256=sources_sha256(source),
                    flags=tuple(flags),
                )
                cubins.append(row)
    write_record(folder, cubins)


def group_flag(group_size: int) -> str:
    """The compiler's flag for kernels of 4-bit matrices."""
    return f"{_FLAG}GROUP_SIZE={group_size}"
