"""Two pinned buffers that weights go through: one is filled while the other is copied."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from device_runtime.backends.cuda.driver import CudaDriver, PinnedMemory
from device_runtime.kernels.libcuda import Event, Stream


@dataclass(frozen=True)
class StagingBuffer:
    """One of the two.

    Attributes:
        memory: to be filled.
        copied: happens when what was copied from it is there.
    """

    memory: PinnedMemory
    copied: Event


class Staging:
    """The buffers in turn; a context manager that waits for the stream before it frees them."""

    def __init__(self, driver: CudaDriver, stream: Stream, num_bytes: int) -> None:
        """Allocate them.

        Args:
            driver: with a current context.
            stream: of the copies.
            num_bytes: of each buffer.
        """
        self._stream = stream
        self._exits = ExitStack()
        self._buffers: list[StagingBuffer] = []
        self._num_taken = 0
        try:
            for _ in range(2):
                memory = driver.allocate_pinned(num_bytes)
                self._exits.callback(driver.free_pinned, memory)
                self._buffers.append(StagingBuffer(memory, Event(driver)))
                self._exits.callback(self._buffers[-1].copied.close)
            self._exits.callback(stream.synchronize)
        except BaseException:
            self._exits.close()
            raise

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *details: object) -> None:
        self._exits.close()

    def take(self) -> StagingBuffer:
        """Return the buffer whose turn it is, once what it held is on the device.

        What the other one holds may still be on its way, and unsent.
        """
        buffer = self._buffers[self._num_taken % 2]
        if self._num_taken >= 2:
            buffer.copied.synchronize()
        self._num_taken += 1
        return buffer

    def sent(self, buffer: StagingBuffer) -> None:
        """Note that all copies from a buffer are enqueued."""
        buffer.copied.record(self._stream)
