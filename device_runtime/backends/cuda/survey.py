"""What the device has, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.backends.cuda.driver import CudaDriver, open_driver
from device_runtime.backends.cuda.nvml import device_used_bytes
from device_runtime.backends.reference.backend import available_memory_bytes
from device_runtime.errors import DeviceError

CONTEXT_GUESS_BYTES = 384 << 20
"""Taken for the context where nothing can be compared before and after."""


@dataclass(frozen=True)
class OpenDevice:
    """A driver and what its context took.

    Attributes:
        driver: open.
        context_bytes: of the context, measured or guessed.
        free_bytes: what can be allocated now.
    """

    driver: CudaDriver
    context_bytes: int
    free_bytes: int


def open_device() -> OpenDevice:
    """Open the first device and measure what its context takes.

    Raises:
        DeviceError: there is no CUDA driver or no device.
    """
    used_before = device_used_bytes()
    available_before = _host_available()
    driver = open_driver()
    try:
        free = free_bytes(driver)
        if driver.attribute("integrated"):
            return OpenDevice(driver, max(0, available_before - free), free)
        used_after = device_used_bytes()
        taken = CONTEXT_GUESS_BYTES
        if used_before is not None and used_after is not None:
            taken = max(0, used_after - used_before)
        return OpenDevice(driver, taken, free)
    except BaseException:
        driver.close()
        raise


def free_bytes(driver: CudaDriver) -> int:
    """Return what can be allocated now.

    Where host and GPU share one memory it is what the host calls available: cuMemGetInfo counts
    the page cache as taken (jetson facts D.1).
    """
    if driver.attribute("integrated"):
        return available_memory_bytes()
    return driver.memory_info()[0]


def _host_available() -> int:
    try:
        return available_memory_bytes()
    except DeviceError:
        return 0
