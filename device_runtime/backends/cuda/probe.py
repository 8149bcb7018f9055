"""What the device is and how fast it reads its memory, measured where a package is loaded."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins, kernel_folders
from device_runtime.backends.cuda.survey import free_bytes
from device_runtime.kernels.graphs import Capture
from device_runtime.kernels.libcuda import Event
from device_runtime.package_format.package import Package

_READ_BYTES = 1 << 30
_READS = 8
_ROUNDS = 7


@dataclass(frozen=True)
class DeviceFacts:
    """What identifies a device in a report.

    Attributes:
        name: as the driver has it.
        sm: 87 for sm_87.
        num_sms: streaming multiprocessors.
        max_clock_mhz: highest SM clock that the driver names; what it runs at may be less.
        cuda: release that the driver speaks.
        driver: "pycuda" or "libcuda": who owns context and memory.
    """

    name: str
    sm: int
    num_sms: int
    max_clock_mhz: int
    cuda: str
    driver: str


def device_facts(driver: CudaDriver) -> DeviceFacts:
    """Return what the driver says."""
    major, minor = driver.version
    return DeviceFacts(
        name=driver.device_name,
        sm=driver.sm,
        num_sms=driver.attribute("multiprocessor_count"),
        max_clock_mhz=driver.attribute("clock_rate_khz") // 1000,
        cuda=f"{major}.{minor}",
        driver=driver.name,
    )


def measure_read_bandwidth(driver: CudaDriver, package: Package) -> float:
    """Return the bytes per second that a kernel reaches which only reads; the best launch shape.

    Reads a GiB, or a quarter of what is free where that is less, several times in a graph.

    Raises:
        DeviceError: there is no such kernel for the device, or no memory.
    """
    files = find_cubins(kernel_folders(package.kernels_dir), ("read_bandwidth",), 0, driver)
    size = min(_READ_BYTES, free_bytes(driver) // 4) // 4096 * 4096
    kernels = KernelSet(driver, files)
    stream = driver.new_stream()
    address = driver.allocate(size + 4096)
    try:
        driver.fill(address, 0x3C013C01, size // 4, stream)
        best = 0.0
        for blocks_per_sm in (1, 2, 4, 8):
            grid = (blocks_per_sm * kernels.num_sms, 1, 1)
            launch = kernels.launch("read_bandwidth", grid, (address + size, address, size // 16))
            with Capture(driver, stream) as capture:
                for _ in range(_READS):
                    launch.enqueue(stream)
            graph = capture.graph
            start, end = Event(driver), Event(driver)
            times = []
            for _ in range(_ROUNDS):
                start.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.synchronize()
                times.append(end.seconds_since(start))
            best = max(best, _READS * size / statistics.median(times))
            for thing in (start, end, graph):
                thing.close()
        return best
    finally:
        driver.free(address)
        stream.close()
        kernels.close()
