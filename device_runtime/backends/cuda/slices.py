"""How fast the GEMV multiplies on a few SMs when its weights lie in L2: what a small board has.

Blocks are as many as the slice has SMs and take more than half of an SM's shared memory each, so
every SM has one; a probe of the same shape counts the distinct SMs.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins, kernel_folders
from device_runtime.errors import DeviceError
from device_runtime.kernels.gemv_shape import GemvShape, plan_gemv
from device_runtime.kernels.graphs import Capture
from device_runtime.kernels.libcuda import Event, Stream
from device_runtime.kernels.table import GEMV_STAGES
from device_runtime.package_format.package import Package

SLICES = (8, 14, 16)
"""SMs of Orin NX and Nano, of AGX Orin 32 GB and of AGX Orin 64 GB."""
NUM_INPUTS, NUM_OUTPUTS = 4096, 4096
_LAUNCHES, _ROUNDS = 20, 7
_PROBE_CLOCKS = 2_000_000


@dataclass(frozen=True)
class SliceRate:
    """What one slice reached.

    Attributes:
        num_sms: of the slice, distinct ones counted.
        num_tokens: at once.
        weights_per_clock: 4-bit weights per SM clock and SM.
    """

    num_sms: int
    num_tokens: int
    weights_per_clock: float


def measure_slices(driver: CudaDriver, package: Package) -> list[SliceRate]:
    """Measure the GEMV of a package's group size on slices of the device.

    Raises:
        DeviceError: there are no kernels for the device, or blocks shared an SM.
    """
    group_size = package.model.group_size
    sources = ("read_bandwidth", *(f"w4a16_gemv_{width}" for width in (1, 8)))
    files = find_cubins(kernel_folders(package.kernels_dir), sources, group_size, driver)
    with ExitStack() as stack:
        kernels = stack.enter_context(closing(KernelSet(driver, files)))
        stream = stack.enter_context(closing(driver.new_stream()))
        groups = NUM_INPUTS // group_size
        room = NUM_INPUTS * NUM_OUTPUTS // 2 + 4 * groups * NUM_OUTPUTS + (8 << 20)
        base = driver.allocate(room)
        stack.callback(driver.free, base)
        rng = np.random.default_rng(0)
        words = rng.integers(0, 1 << 32, room // 4, np.uint32)
        # (zero, scale) words: fp16 64 + 8 and 0.01 (SPEC.md); the rest is any bits.
        first = NUM_INPUTS * NUM_OUTPUTS // 8
        words[first : first + groups * NUM_OUTPUTS] = 0x211F5480
        # Activations: zeros would take less power and so run faster than real data.
        rest = len(words) - first - groups * NUM_OUTPUTS
        halves = rng.standard_normal(2 * rest).astype(np.float16)
        words[first + groups * NUM_OUTPUTS :] = halves.view(np.uint32)
        driver.copy_to_device(base, words.ctypes.data, words.nbytes)
        rates = []
        for num_sms in SLICES:
            for num_tokens in (1, max(GEMV_STAGES)):
                shape = plan_gemv(
                    width=num_tokens,
                    num_inputs=NUM_INPUTS,
                    num_outputs=NUM_OUTPUTS,
                    group_size=group_size,
                    num_sms=num_sms,
                    max_shared_bytes=kernels.max_shared_bytes,
                )
                seconds = _time(driver, kernels, stream, shape, base)
                hertz = _probe(driver, kernels, stream, shape, base)
                clocks = seconds * hertz * num_sms
                rates.append(SliceRate(num_sms, num_tokens, NUM_INPUTS * NUM_OUTPUTS / clocks))
        return rates


def _time(
    driver: CudaDriver, kernels: KernelSet, stream: Stream, shape: GemvShape, base: int
) -> float:
    """Return the seconds of one GEMV in a row of them, weights in L2."""
    codes = base
    scales = codes + shape.num_inputs * shape.num_outputs // 2
    scratch = scales + 4 * shape.num_inputs // shape.group_size * shape.num_outputs
    sums = scratch + (1 << 20)
    residual = sums + (1 << 20)
    sizes = (
        shape.width,
        shape.num_inputs,
        shape.num_outputs,
        shape.phase_units,
        shape.held_tiles,
    )
    launch = kernels.launch(
        f"w4a16_gemv_add_{shape.width}",
        (shape.grid, 1, 1),
        (residual, sums, scratch, None, codes, scales, *sizes),
        shared_bytes=shape.shared_bytes,
    )
    with Capture(driver, stream) as capture:
        for _ in range(_LAUNCHES):
            launch.enqueue(stream)
    times = []
    with (
        closing(capture.graph) as graph,
        closing(Event(driver)) as start,
        closing(Event(driver)) as end,
    ):
        for _ in range(_ROUNDS):
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(end.seconds_since(start) / _LAUNCHES)
    return statistics.median(times[1:])


def _probe(
    driver: CudaDriver, kernels: KernelSet, stream: Stream, shape: GemvShape, base: int
) -> float:
    """Return the SM clock in Hz, after counting the SMs that a launch of this shape gets."""
    scratch = base + shape.num_inputs * shape.num_outputs // 2
    scratch += 4 * shape.num_inputs // shape.group_size * shape.num_outputs
    launch = kernels.launch(
        "sm_probe",
        (shape.grid, 1, 1),
        (scratch, scratch + 4096, _PROBE_CLOCKS),
        shared_bytes=shape.shared_bytes,
    )
    launch.enqueue(stream)
    driver.synchronize()
    ids = np.empty(shape.grid, np.uint32)
    spins = np.empty((shape.grid, 2), np.uint64)
    driver.copy_to_host(ids.ctypes.data, scratch, ids.nbytes)
    driver.copy_to_host(spins.ctypes.data, scratch + 4096, spins.nbytes)
    if len(set(ids.tolist())) != shape.grid:
        raise DeviceError(
            f"{shape.grid} blocks ran on {len(set(ids.tolist()))} SMs, expected one on each"
        )
    return float(np.median(spins[:, 0] / spins[:, 1])) * 1e9
