"""Small host arrays on their way to the device: pinned memory, one part for each step in flight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.errors import InternalError
from device_runtime.kernels.libcuda import Event, Stream


class Uploads:
    """A ring of pinned parts. A part is used again once its step's event has happened."""

    def __init__(self, driver: CudaDriver, stream: Stream, num_parts: int, part_bytes: int) -> None:
        self._driver = driver
        self._stream = stream
        self._part_bytes = part_bytes
        self._memory = driver.allocate_pinned(num_parts * part_bytes)
        self._events = [Event(driver) for _ in range(num_parts)]
        self._is_recorded = [False] * num_parts
        self._part = 0
        self._used = 0

    def begin(self) -> None:
        """Go to the next part for a new step; waits for the step that used it last."""
        self._part = (self._part + 1) % len(self._events)
        self._used = 0
        if self._is_recorded[self._part]:
            self._events[self._part].synchronize()
            self._is_recorded[self._part] = False

    def put(self, address: int, values: NDArray[Any]) -> None:
        """Enqueue the copy of an array to the device.

        Raises:
            InternalError: the array is larger than a part.
        """
        size = values.nbytes
        if size == 0:
            return
        if size > self._part_bytes:
            raise InternalError(f"{size} bytes go up at once, planned were {self._part_bytes}")
        if self._used + size > self._part_bytes:
            self._stream.synchronize()  # more than planned in one step: rare, and only slower
            self._used = 0
        start = self._part * self._part_bytes + self._used
        self._memory.bytes[start : start + size] = (
            np.ascontiguousarray(values).view(np.uint8).ravel()
        )
        self._driver.copy_to_device(address, self._memory.address + start, size, self._stream)
        self._used += -(-size // 16) * 16

    def end(self) -> None:
        """Mark the end of a step that has put something."""
        if self._used:
            self._events[self._part].record(self._stream)
            self._is_recorded[self._part] = True

    def close(self) -> None:
        """Free the pinned memory; the stream must be idle."""
        for event in self._events:
            event.close()
        self._driver.free_pinned(self._memory)
