"""Runs kernels of the folder TURBOJET_KERNELS on numpy arrays, with guard bytes around each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.driver import CudaDriver, open_driver
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins
from device_runtime.kernels.libcuda import Stream

GUARD_BYTES = 512
GUARD = 0xA5


class DeviceLaunch:
    """Called like the emulator's launch: arrays go to the device and come back changed."""

    def __init__(self, driver: CudaDriver, kernels: KernelSet, stream: Stream) -> None:
        self._driver, self._kernels, self._stream = driver, kernels, stream

    def __call__(
        self,
        name: str,
        grid: tuple[int, int, int],
        arguments: Sequence[NDArray[np.generic] | int | float | None],
        shared_bytes: int = 0,
    ) -> None:
        rooms: list[tuple[int, NDArray[np.generic]]] = []
        values: list[int | float | None] = []
        try:
            for argument in arguments:
                if not isinstance(argument, np.ndarray):
                    values.append(argument)
                    continue
                room = np.full(argument.nbytes + 2 * GUARD_BYTES, GUARD, np.uint8)
                flat = np.ascontiguousarray(argument).reshape(-1).view(np.uint8)
                room[GUARD_BYTES : GUARD_BYTES + argument.nbytes] = flat
                address = self._driver.allocate(room.nbytes)
                rooms.append((address, argument))
                self._driver.copy_to_device(address, room.ctypes.data, room.nbytes)
                values.append(address + GUARD_BYTES)
            launch = self._kernels.launch(name, grid, values, shared_bytes=shared_bytes)
            self._driver.synchronize()  # copies from pageable memory may still be on their way
            launch.enqueue(self._stream)
            self._stream.synchronize()
            for address, argument in rooms:
                room = np.empty(argument.nbytes + 2 * GUARD_BYTES, np.uint8)
                self._driver.copy_to_host(room.ctypes.data, address, room.nbytes)
                inside = room[GUARD_BYTES : GUARD_BYTES + argument.nbytes]
                assert (room[:GUARD_BYTES] == GUARD).all(), f"{name} wrote before a buffer"
                assert (room[GUARD_BYTES + argument.nbytes :] == GUARD).all(), (
                    f"{name} wrote behind a buffer"
                )
                if argument.flags.c_contiguous and argument.flags.writeable:
                    argument.reshape(-1).view(np.uint8)[:] = inside
        finally:
            for address, _ in rooms:
                self._driver.free(address)


@contextmanager
def device_launch(*sources: str, group_size: int = 0) -> Iterator[DeviceLaunch]:
    """Open the device with the kernels of some sources, and leave it clean."""
    driver = open_driver()
    try:
        folders = (Path(os.environ["TURBOJET_KERNELS"]),)
        kernels = KernelSet(driver, find_cubins(folders, sources, group_size, driver))
        stream = driver.new_stream()
        try:
            yield DeviceLaunch(driver, kernels, stream)
        finally:
            stream.close()
            kernels.close()
    finally:
        driver.close()
