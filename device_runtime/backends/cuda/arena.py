"""Device memory for a list of regions, taken at once: three ways, tried one after the other.

One cuMemAlloc is best. Where NvMap refuses large blocks (L4T 36.4.7 and later, fragmented memory)
chunks of half a GiB may still be had, and where those are counted against a limit cuMemCreate may
go further (design facts of Jetson boards: llama.cpp PR 23732, audio.cpp 12).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import byref, c_int, c_size_t, c_ulonglong
from dataclasses import dataclass

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.regions import (
    ALIGNMENT,
    aligned,
    group_regions,
    region_bytes,
    region_places,
)
from device_runtime.backends.cuda.survey import free_bytes
from device_runtime.errors import DeviceError, OutOfMemoryError
from device_runtime.package_format.amounts import MIB

CHUNK_BYTES = 512 << 20
_ALLOCATION_TYPE_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_LOCATION_TYPE_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_ACCESS_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp (cuda.h)."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("windows_meta_data", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _AccessDescription(ctypes.Structure):
    """CUmemAccessDesc (cuda.h)."""

    _fields_ = (("location", _Location), ("flags", c_int))


@dataclass(frozen=True)
class Arena:
    """Regions of device memory.

    Attributes:
        addresses: of each region, aligned to `ALIGNMENT`.
        num_bytes: taken from the device.
        how: "one block", "chunks" or "mapped chunks".
    """

    addresses: tuple[int, ...]
    num_bytes: int
    how: str
    _free: Callable[[], None]

    def free(self) -> None:
        """Give everything back; call it once."""
        self._free()


def allocate_arena(driver: CudaDriver, sizes: Sequence[int], what: str) -> Arena:
    """Allocate regions.

    Args:
        driver: with a current context.
        sizes: bytes of each region.
        what: for a message, such as "weights".

    Raises:
        OutOfMemoryError: no way leads to so much memory.
    """
    total = region_bytes(sizes)
    failures: list[DeviceError] = []
    for attempt in (_one_block, _chunks, _mapped_chunks):
        try:
            return attempt(driver, sizes)
        except OutOfMemoryError as error:
            failures.append(error)
        except DeviceError as error:
            if attempt is not _mapped_chunks:
                raise
            failures.append(error)  # no virtual memory management here
    free = free_bytes(driver)
    raise OutOfMemoryError(
        f"{what} need {total // MIB} MiB of GPU memory and {free // MIB} MiB are free, but "
        "neither one block nor chunks could be had; close other programs, raise the CMA size or "
        "reboot a board whose memory is fragmented"
    ) from failures[0]


def _one_block(driver: CudaDriver, sizes: Sequence[int]) -> Arena:
    total = region_bytes(sizes)
    base = driver.allocate(max(total, ALIGNMENT))
    return Arena(region_places(base, sizes), total, "one block", lambda: driver.free(base))


def _chunks(driver: CudaDriver, sizes: Sequence[int]) -> Arena:
    addresses: list[int] = []
    blocks: list[int] = []

    def free() -> None:
        while blocks:
            driver.free(blocks.pop())

    try:
        for group in group_regions(sizes, CHUNK_BYTES):
            blocks.append(driver.allocate(region_bytes(group)))
            addresses.extend(region_places(blocks[-1], group))
    except OutOfMemoryError:
        free()
        raise
    return Arena(tuple(addresses), region_bytes(sizes), "chunks", free)


def _mapped_chunks(driver: CudaDriver, sizes: Sequence[int]) -> Arena:
    location = _Location(_LOCATION_TYPE_DEVICE, driver.device)
    properties = _AllocationProperties(type=_ALLOCATION_TYPE_PINNED, location=location)
    granularity = c_size_t()
    driver.call("cuMemGetAllocationGranularity", byref(granularity), byref(properties), c_int(0))
    total = aligned(max(1, region_bytes(sizes)), granularity.value)
    chunk = aligned(CHUNK_BYTES, granularity.value)
    base = c_ulonglong()
    driver.call(
        "cuMemAddressReserve",
        byref(base),
        c_size_t(total),
        c_size_t(0),
        c_ulonglong(0),
        c_ulonglong(0),
    )
    mapped: list[tuple[int, int]] = []

    def free() -> None:
        while mapped:
            address, size = mapped.pop()
            driver.call("cuMemUnmap", c_ulonglong(address), c_size_t(size))
        driver.call("cuMemAddressFree", base, c_size_t(total))

    access = _AccessDescription(location, _ACCESS_READ_WRITE)
    try:
        for start in range(0, total, chunk):
            size = min(chunk, total - start)
            handle = c_ulonglong()
            driver.call(
                "cuMemCreate", byref(handle), c_size_t(size), byref(properties), c_ulonglong(0)
            )
            try:
                driver.call(
                    "cuMemMap",
                    c_ulonglong(base.value + start),
                    c_size_t(size),
                    c_size_t(0),
                    handle,
                    c_ulonglong(0),
                )
                mapped.append((base.value + start, size))
            finally:
                driver.call("cuMemRelease", handle)  # the mapping keeps the memory
        driver.call("cuMemSetAccess", base, c_size_t(total), byref(access), c_size_t(1))
    except DeviceError:
        with suppress(DeviceError):
            free()
        raise
    return Arena(region_places(base.value, sizes), total, "mapped chunks", free)
