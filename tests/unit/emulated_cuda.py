"""The fake driver with kernels that compute: each launch runs on the CPU emulator, in place.

Addresses are those of host memory, so the whole backend, graphs included, runs without a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from emulator import emulator
from fake_cuda import ATTRIBUTES, FakeCuda, Launched

from device_runtime.kernels.cubins import has_group_size
from device_runtime.kernels.table import kernel

# Few SMs make few blocks, which is what the emulator's time goes by.
SMALL_GPU = ATTRIBUTES | {16: 2}


@dataclass
class EmulatedCuda(FakeCuda):
    """Stands for libcuda and the device.

    Attributes:
        group_size: that the kernels of 4-bit matrices are built for.
        flags: more of them for the emulator's compiler.
    """

    group_size: int = 128
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.attributes = dict(SMALL_GPU)
        super().__post_init__()

    def _run(self, launched: Launched) -> None:
        self.launches.append(launched)
        row = kernel(launched.name)
        flags = self.flags
        if has_group_size(row.source):
            flags = (f"-DTURBOJET_GROUP_SIZE={self.group_size}", *flags)
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
