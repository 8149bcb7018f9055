"""The device as the backend sees it: pycuda's context, memory and streams where it can be had.

pycuda has no aarch64 wheel, so libcuda through ctypes stands in for it, with the same surface.
Modules, launches and graphs always go through libcuda: pycuda neither shows a function's handle
nor knows graphs and launch attributes; both share the primary context and the stream's handle.
"""

from __future__ import annotations

import atexit
import ctypes
import weakref
from ctypes import byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import DeviceError, OutOfMemoryError
from device_runtime.kernels.libcuda import Driver, Stream

_HOST_ALLOC_PORTABLE_MAPPED = 3  # CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
_STREAM_NON_BLOCKING = 1
_ERROR_NOT_READY = 600
_MEMORY_TYPE_HOST = 1
_MEMORY_TYPE_DEVICE = 2


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D (cuda.h)."""

    _fields_ = (
        ("source_x", c_size_t),
        ("source_y", c_size_t),
        ("source_type", c_uint),
        ("source_host", c_void_p),
        ("source_device", c_ulonglong),
        ("source_array", c_void_p),
        ("source_pitch", c_size_t),
        ("target_x", c_size_t),
        ("target_y", c_size_t),
        ("target_type", c_uint),
        ("target_host", c_void_p),
        ("target_device", c_ulonglong),
        ("target_array", c_void_p),
        ("target_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    )


@dataclass(frozen=True)
class PinnedMemory:
    """Host memory that the device can reach.

    Attributes:
        bytes: ``[num_bytes]`` uint8 view of it; dead once the memory is freed.
        device_address: where kernels see it.
    """

    bytes: NDArray[np.uint8]
    device_address: int

    @property
    def address(self) -> int:
        """Where the host sees it."""
        return int(self.bytes.ctypes.data)


class CudaDriver(Driver):
    """libcuda alone; closes itself at exit, whatever happened before."""

    name = "libcuda"

    def __init__(self, device: int = 0) -> None:
        super().__init__(device)
        itself = weakref.ref(self)

        def close_at_exit() -> None:
            driver = itself()
            if driver is not None:
                driver.close()

        self._at_exit = close_at_exit
        atexit.register(close_at_exit)

    def close(self) -> None:
        """Free the context with all that is in it; a second call does nothing."""
        at_exit = getattr(self, "_at_exit", None)
        if at_exit is not None:
            atexit.unregister(at_exit)
        super().close()

    @property
    def device(self) -> int:
        """The driver's number of the device."""
        return self._device.value

    @property
    def version(self) -> tuple[int, int]:
        """CUDA release that the driver speaks, (12, 6) for 12.6."""
        number = c_int()
        self.call("cuDriverGetVersion", byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def new_stream(self) -> Stream:
        """Return a stream that does not wait for the default stream."""
        return Stream(self)

    def check(self, stream: Stream) -> bool:
        """Return whether everything on the stream is done.

        Raises:
            DeviceError: something on it failed.
        """
        if not self.has("cuStreamQuery"):
            return False
        code = int(self._lib.cuStreamQuery(stream.pointer))
        if code not in (0, _ERROR_NOT_READY):
            self.call("cuStreamSynchronize", stream.pointer)
        return code == 0

    def allocate_pinned(self, num_bytes: int) -> PinnedMemory:
        """Return zeroed pinned host memory."""
        pointer = c_void_p()
        self.call(
            "cuMemHostAlloc",
            byref(pointer),
            c_size_t(num_bytes),
            c_uint(_HOST_ALLOC_PORTABLE_MAPPED),
        )
        device = c_ulonglong()
        self.call("cuMemHostGetDevicePointer_v2", byref(device), pointer, c_uint(0))
        view = (ctypes.c_uint8 * num_bytes).from_address(pointer.value or 0)
        array: NDArray[np.uint8] = np.frombuffer(memoryview(view), np.uint8)
        array[:] = 0
        return PinnedMemory(array, device.value)

    def free_pinned(self, memory: PinnedMemory) -> None:
        """Free what `allocate_pinned` returned; its view must not be touched again."""
        self.call("cuMemFreeHost", c_void_p(memory.address))

    def copy_rows(
        self,
        address: int,
        pitch: int,
        host: int,
        *,
        row_bytes: int,
        num_rows: int,
        stream: Stream,
    ) -> None:
        """Copy rows that are dense in pinned host memory to rows ``pitch`` bytes apart."""
        copy = _Copy2D(
            source_type=_MEMORY_TYPE_HOST,
            source_host=host,
            source_pitch=row_bytes,
            target_type=_MEMORY_TYPE_DEVICE,
            target_device=address,
            target_pitch=pitch,
            width=row_bytes,
            height=num_rows,
        )
        self.call("cuMemcpy2DAsync_v2", byref(copy), stream.pointer)

    def copy_on_device(self, target: int, source: int, num_bytes: int, stream: Stream) -> None:
        """Copy device memory."""
        self.call(
            "cuMemcpyDtoDAsync_v2",
            c_ulonglong(target),
            c_ulonglong(source),
            c_size_t(num_bytes),
            stream.pointer,
        )


class PycudaDriver(CudaDriver):
    """The same through pycuda: its context stack, allocations and streams.

    Once the device is lost no object of pycuda's is destroyed any more: each would print a warning,
    and the driver frees everything with the process.
    """

    name = "pycuda"

    def __init__(self, module: ModuleType, device: int = 0) -> None:
        """Retain the primary context through pycuda too.

        Args:
            module: ``pycuda.driver``.
            device: ordinal.
        """
        super().__init__(device)
        self._pycuda: Any = module
        self._allocations: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._pycuda_context: Any = None
        try:
            module.init()
            context = module.Device(device).retain_primary_context()
            context.push()
            self._pycuda_context = context
        except module.Error as error:
            super().close()
            raise DeviceError(f"pycuda cannot open device {device}: {error}") from error

    def close(self) -> None:
        """See `CudaDriver.close`; pycuda aborts at exit when a context is left on its stack."""
        context, self._pycuda_context = self._pycuda_context, None
        if context is not None:
            # Their destructors need the context.
            for objects in (self._allocations, self._pinned, self._streams):
                for each in objects.values() if self.is_lost else ():
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
                objects.clear()
            context.pop()
            context.detach()
        super().close()

    def allocate(self, num_bytes: int) -> int:
        """See `Driver.allocate`."""
        try:
            allocation = self._pycuda.mem_alloc(num_bytes)
        except self._pycuda.MemoryError as error:
            raise OutOfMemoryError(f"pycuda's mem_alloc failed: {error}") from error
        except self._pycuda.Error as error:
            raise DeviceError(f"pycuda's mem_alloc failed: {error}") from error
        address = int(allocation)
        self._allocations[address] = allocation
        return address

    def free(self, address: int) -> None:
        """See `Driver.free`; of a lost device nothing is freed."""
        if self.is_lost:
            return
        allocation = self._allocations.pop(address, None)
        if allocation is None:
            super().free(address)
            return
        try:
            allocation.free()
        except self._pycuda.Error as error:
            raise DeviceError(f"pycuda's free failed: {error}") from error

    def new_stream(self) -> Stream:
        """See `CudaDriver.new_stream`."""
        try:
            stream = self._pycuda.Stream(_STREAM_NON_BLOCKING)
        except self._pycuda.Error as error:
            raise DeviceError(f"pycuda's Stream failed: {error}") from error
        self._streams[id(stream)] = stream
        return _PycudaStream(self, stream)

    def destroy_stream(self, key: int) -> None:
        """Let go of one of pycuda's streams, which nobody else holds."""
        if not self.is_lost:
            self._streams.pop(key, None)

    def allocate_pinned(self, num_bytes: int) -> PinnedMemory:
        """See `CudaDriver.allocate_pinned`."""
        flags = self._pycuda.host_alloc_flags
        try:
            array = self._pycuda.pagelocked_empty(
                num_bytes, np.uint8, mem_flags=flags.PORTABLE | flags.DEVICEMAP
            )
            base = array.base
            device = int(base.get_device_pointer())
        except self._pycuda.MemoryError as error:
            raise OutOfMemoryError(f"pycuda's pagelocked_empty failed: {error}") from error
        except self._pycuda.Error as error:
            raise DeviceError(f"pycuda's pagelocked_empty failed: {error}") from error
        array[:] = 0
        memory = PinnedMemory(array, device)
        self._pinned[memory.address] = base
        return memory

    def free_pinned(self, memory: PinnedMemory) -> None:
        """See `CudaDriver.free_pinned`; of a lost device nothing is freed."""
        if self.is_lost:
            return
        try:
            self._pinned.pop(memory.address).free()
        except self._pycuda.Error as error:
            raise DeviceError(f"pycuda's free of pinned memory failed: {error}") from error


class _PycudaStream(Stream):
    """pycuda's stream under libcuda.py's surface; the driver holds it until it is closed."""

    def __init__(self, driver: PycudaDriver, stream: Any) -> None:
        super().__init__(driver, int(stream.handle))
        self._pycuda_driver = driver
        self._key = id(stream)

    def close(self) -> None:
        self._pycuda_driver.destroy_stream(self._key)
        super().close()


def open_driver(device: int = 0) -> CudaDriver:
    """Open a device: through pycuda when it can be imported, else through libcuda alone.

    Raises:
        DeviceError: there is no CUDA driver or no such device.
    """
    try:
        import pycuda.driver as module
    except ImportError:  # also when libcuda.so.1, which it links to, is missing
        return CudaDriver(device)
    return PycudaDriver(module, device)
