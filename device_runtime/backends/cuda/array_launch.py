"""Kernels on numpy arrays, one launch at a time: for tests of kernels, never for steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import KernelSet
from device_runtime.errors import DeviceError
from device_runtime.kernels.libcuda import Stream

GUARD_BYTES = 512
_GUARD = 0xA5

ArrayArgument = NDArray[Any] | int | float | None


class ArrayLaunch:
    """Copies arrays to the device, launches, copies back what may have changed."""

    def __init__(self, driver: CudaDriver, kernels: KernelSet, stream: Stream) -> None:
        self._driver = driver
        self._kernels = kernels
        self._stream = stream

    @property
    def num_sms(self) -> int:
        """Multiprocessors of the device."""
        return self._kernels.num_sms

    @property
    def max_shared_bytes(self) -> int:
        """Dynamic shared memory that a block may have."""
        return self._kernels.max_shared_bytes

    def __call__(
        self,
        name: str,
        grid: tuple[int, int, int],
        arguments: Sequence[ArrayArgument],
        shared_bytes: int = 0,
    ) -> None:
        """Launch one kernel and wait for it; writable arrays change in place.

        Args:
            name: of the entry point.
            grid: blocks.
            arguments: C-contiguous arrays, None for null, numbers.
            shared_bytes: dynamic shared memory.

        Raises:
            DeviceError: the launch failed or wrote beside an array.
        """
        rooms: list[tuple[int, NDArray[Any]]] = []
        values: list[int | float | None] = []
        try:
            for argument in arguments:
                if not isinstance(argument, np.ndarray):
                    values.append(argument)
                    continue
                room = np.full(argument.nbytes + 2 * GUARD_BYTES, _GUARD, np.uint8)
                room[GUARD_BYTES:-GUARD_BYTES] = argument.reshape(-1).view(np.uint8)
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
                guards = np.concatenate([room[:GUARD_BYTES], room[-GUARD_BYTES:]])
                if (guards != _GUARD).any():
                    raise DeviceError(f"{name} wrote beside one of its arrays; report it")
                if argument.flags.writeable:
                    argument.reshape(-1).view(np.uint8)[:] = room[GUARD_BYTES:-GUARD_BYTES]
        finally:
            for address, _ in rooms:
                self._driver.free(address)
