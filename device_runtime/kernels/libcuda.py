"""The CUDA driver through ctypes: graphs and launch attributes, which pycuda lacks, and the rest.

Every failing call becomes a DeviceError that names the call and CUDA's own word for the failure.
Nothing here touches the default stream.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from types import TracebackType

from device_runtime.errors import DeviceError, OutOfMemoryError

_ERROR_OUT_OF_MEMORY = 2
_ERROR_NO_DEVICE = 100
_ERRORS_OF_A_LOST_DEVICE = frozenset((214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 999))
"""ECC, link and kernel failures (cuda.h): the context takes no call after them."""
_STREAM_NON_BLOCKING = 1
_ATTRIBUTE_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

DEVICE_ATTRIBUTES = {
    "multiprocessor_count": 16,
    "integrated": 18,
    "clock_rate_khz": 13,
    "l2_cache_bytes": 38,
    "compute_capability_major": 75,
    "compute_capability_minor": 76,
    "max_shared_memory_per_multiprocessor": 81,
    "max_shared_memory_per_block": 97,  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
}
"""Names of the CUdevice_attribute values in use (cuda.h)."""

_BOARD_DEVICE = "/dev/nvmap"
"""Every process that uses the GPU of a Jetson opens it; only the group video may."""
_SOC_FAMILY = "/sys/devices/soc0/family"
"""Says Tegra, in a container too (drivers/soc/tegra of Linux)."""


class NoDeviceError(DeviceError):
    """This machine has no GPU, or no driver for one, and is no board."""


_KINDS = {_ERROR_OUT_OF_MEMORY: OutOfMemoryError, _ERROR_NO_DEVICE: NoDeviceError}


def _load() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NoDeviceError("no CUDA driver was found (libcuda.so.1); use the reference backend")


def _is_tegra() -> bool:
    try:
        with open(_SOC_FAMILY, encoding="ascii") as file:
            return file.read().strip() == "Tegra"
    except OSError:
        return False


def _check_board(error: DeviceError) -> None:
    """Say what keeps a board's GPU, which must be there, from being opened.

    Raises:
        DeviceError: this is a board.
    """
    if not os.path.exists(_BOARD_DEVICE):
        if _is_tegra():
            raise DeviceError(
                f"{error}; this is a Jetson without {_BOARD_DEVICE}: a container needs "
                "`--runtime nvidia`"
            ) from error
        return
    if os.access(_BOARD_DEVICE, os.R_OK | os.W_OK):
        raise DeviceError(str(error)) from error
    raise DeviceError(
        f"{error}; this user may not open {_BOARD_DEVICE}: "
        "`sudo usermod -aG video,render $USER`, then log in again"
    ) from error


class Driver:
    """libcuda with its primary context of one device made current; close it, or use `with`.

    Attributes:
        device_name: as the driver spells it.
        is_lost: a kernel or the device failed, and nothing more can be done in this process.
    """

    is_lost = False

    def __init__(self, device: int = 0) -> None:
        """Open the library and the device's primary context.

        Raises:
            NoDeviceError: there is no driver or no device, and none is to be expected.
            DeviceError: there is no such device, or it cannot be opened.
        """
        self._context: c_void_p | None = None
        try:
            self._lib = _load()
            self.call("cuInit", c_uint(0))
        except DeviceError as error:
            _check_board(error)
            raise
        self._device = c_int()
        self.call("cuDeviceGet", byref(self._device), c_int(device))
        name = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", name, c_int(128), self._device)
        self.device_name = name.value.decode()
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        self._context = context
        self.call("cuCtxPushCurrent_v2", context)

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the context; a second call does nothing."""
        if self._context is None:
            return
        self._context = None
        popped = c_void_p()
        self._lib.cuCtxPopCurrent_v2(byref(popped))
        self._lib.cuDevicePrimaryCtxRelease_v2(self._device)

    def has(self, function: str) -> bool:
        """Whether this driver exports a function; old JetPacks lack some."""
        return hasattr(self._lib, function)

    def call(self, function: str, *arguments: object) -> None:
        """Call a driver function.

        Raises:
            OutOfMemoryError: the driver reports that memory ran out.
            DeviceError: any other failure, or the driver has no such function.
        """
        action = getattr(self._lib, function, None)
        if action is None:
            raise DeviceError(f"the CUDA driver has no {function}; update JetPack or the driver")
        code = int(action(*arguments))
        if code:
            text = c_char_p()
            self._lib.cuGetErrorString(c_int(code), byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            kind = _KINDS.get(code, DeviceError)
            remedy = ""
            if code in _ERRORS_OF_A_LOST_DEVICE:
                self.is_lost = True
                remedy = "; start again, and if it comes back see what `turbojet selftest` says"
            raise kind(f"{function} failed: {reason} (CUDA error {code}){remedy}")

    def attribute(self, name: str) -> int:
        """Return one of `DEVICE_ATTRIBUTES` of the device."""
        value = c_int()
        attribute = c_int(DEVICE_ATTRIBUTES[name])
        self.call("cuDeviceGetAttribute", byref(value), attribute, self._device)
        return value.value

    @property
    def sm(self) -> int:
        """Compute capability as one number, 87 for 8.7."""
        major = self.attribute("compute_capability_major")
        return 10 * major + self.attribute("compute_capability_minor")

    def memory_info(self) -> tuple[int, int]:
        """Return (free, total) bytes as the driver counts them."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new device memory, aligned to 256 bytes."""
        address = c_ulonglong()
        self.call("cuMemAlloc_v2", byref(address), c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        """Free what `allocate` returned."""
        self.call("cuMemFree_v2", c_ulonglong(address))

    def copy_to_device(
        self, address: int, host: int, num_bytes: int, stream: Stream | None = None
    ) -> None:
        """Copy from a host address; on a stream the host memory must be pinned until it is done."""
        target, source, size = c_ulonglong(address), c_void_p(host), c_size_t(num_bytes)
        if stream is None:
            self.call("cuMemcpyHtoD_v2", target, source, size)
        else:
            self.call("cuMemcpyHtoDAsync_v2", target, source, size, stream.pointer)

    def copy_to_host(
        self, host: int, address: int, num_bytes: int, stream: Stream | None = None
    ) -> None:
        """Copy to a host address; on a stream the host memory must be pinned."""
        target, source, size = c_void_p(host), c_ulonglong(address), c_size_t(num_bytes)
        if stream is None:
            self.call("cuMemcpyDtoH_v2", target, source, size)
        else:
            self.call("cuMemcpyDtoHAsync_v2", target, source, size, stream.pointer)

    def fill(self, address: int, word: int, num_words: int, stream: Stream) -> None:
        """Set 32-bit words of device memory."""
        self.call(
            "cuMemsetD32Async",
            c_ulonglong(address),
            c_uint(word),
            c_size_t(num_words),
            stream.pointer,
        )

    def synchronize(self) -> None:
        """Wait for everything in the context."""
        self.call("cuCtxSynchronize")


class Stream:
    """A non-blocking stream; `handle` wraps an existing one (pycuda's) instead of making one."""

    def __init__(self, driver: Driver, handle: int | None = None) -> None:
        self._driver = driver
        self._is_owner = handle is None
        self.pointer = c_void_p(handle)
        if handle is None:
            driver.call("cuStreamCreate", byref(self.pointer), c_uint(_STREAM_NON_BLOCKING))

    def synchronize(self) -> None:
        """Wait for everything enqueued so far."""
        self._driver.call("cuStreamSynchronize", self.pointer)

    def close(self) -> None:
        """Destroy the stream if it was made here; a second call does nothing."""
        if self._is_owner:
            self._is_owner = False
            self._driver.call("cuStreamDestroy_v2", self.pointer)


class Event:
    """A point in a stream whose time is taken."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.pointer = c_void_p()
        driver.call("cuEventCreate", byref(self.pointer), c_uint(0))

    def record(self, stream: Stream) -> None:
        """Take the time when the stream gets here."""
        self._driver.call("cuEventRecord", self.pointer, stream.pointer)

    def synchronize(self) -> None:
        """Wait until the event has happened."""
        self._driver.call("cuEventSynchronize", self.pointer)

    def seconds_since(self, earlier: Event) -> float:
        """Return the time between two events that have happened."""
        milliseconds = c_float()
        self._driver.call("cuEventElapsedTime", byref(milliseconds), earlier.pointer, self.pointer)
        return milliseconds.value / 1e3

    def close(self) -> None:
        """Destroy the event."""
        self._driver.call("cuEventDestroy_v2", self.pointer)


class Module:
    """A loaded cubin."""

    def __init__(self, driver: Driver, cubin: bytes) -> None:
        self._driver = driver
        self._pointer: c_void_p | None = c_void_p()
        driver.call("cuModuleLoadData", byref(self._pointer), c_char_p(cubin))

    def function(self, name: str, max_shared_bytes: int = 0) -> c_void_p:
        """Return a kernel's handle, allowed to use that much dynamic shared memory."""
        handle = c_void_p()
        self._driver.call(
            "cuModuleGetFunction", byref(handle), self._pointer, c_char_p(name.encode())
        )
        if max_shared_bytes > 48 * 1024:
            self._driver.call(
                "cuFuncSetAttribute",
                handle,
                c_int(_ATTRIBUTE_MAX_DYNAMIC_SHARED),
                c_int(max_shared_bytes),
            )
        return handle

    def close(self) -> None:
        """Unload the module; a second call does nothing."""
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            self._driver.call("cuModuleUnload", pointer)
