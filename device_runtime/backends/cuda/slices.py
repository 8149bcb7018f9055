"""How fast the GEMV multiplies on a few SMs when its weights lie in L2: what a small board has.

Blocks are as many as the slice has SMs and take more than half of an SM's shared memory each, so
every SM has one; a probe of the same shape counts the distinct SMs. The rate is that of a launch
once it runs: what a matrix of twice the outputs takes more.
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
"""Of the smaller matrix; both stay in the L2 cache of the GPUs that kernels are developed on."""
_LAUNCHES, _ROUNDS = 20, 7
_PROBE_CLOCKS = 2_000_000
_REST_WORDS = 1 << 21


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
        DeviceError: there are no kernels for the device, blocks shared an SM, or the larger matrix
            took no longer.
    """
    group_size = package.model.group_size
    sources = ("read_bandwidth", *(f"w4a16_gemv_{width}" for width in GEMV_STAGES))
    files = find_cubins(kernel_folders(package.kernels_dir), sources, group_size, driver)
    with ExitStack() as stack:
        kernels = stack.enter_context(closing(KernelSet(driver, files)))
        stream = stack.enter_context(closing(driver.new_stream()))
        buffers = _buffers(driver, stack, group_size)
        rates = []
        for num_sms in SLICES:
            for num_tokens in GEMV_STAGES:
                small, large = (
                    plan_gemv(
                        width=num_tokens,
                        num_inputs=NUM_INPUTS,
                        num_outputs=num_outputs,
                        group_size=group_size,
                        num_sms=num_sms,
                        max_shared_bytes=kernels.max_shared_bytes,
                    )
                    for num_outputs in (NUM_OUTPUTS, 2 * NUM_OUTPUTS)
                )
                short = _time(driver, kernels, stream, small, buffers)
                long = _time(driver, kernels, stream, large, buffers)
                if long <= short:
                    raise DeviceError(
                        f"a GEMV of {large.num_outputs} outputs took {long * 1e6:.1f} us, one of "
                        f"{small.num_outputs} {short * 1e6:.1f}; measure while nothing else runs"
                    )
                hertz = _probe(driver, kernels, stream, large, buffers)
                weights = NUM_INPUTS * (large.num_outputs - small.num_outputs)
                rate = weights / ((long - short) * hertz * num_sms)
                rates.append(SliceRate(num_sms, num_tokens, rate))
        return rates


@dataclass(frozen=True)
class _Buffers:
    """Addresses of the larger matrix's codes and (zero, scale) words, and of all else."""

    codes: int
    scales: int
    rest: int


def _buffers(driver: CudaDriver, stack: ExitStack, group_size: int) -> _Buffers:
    """Return random weights and activations; ``stack`` frees them."""
    code_words = NUM_INPUTS * 2 * NUM_OUTPUTS // 8
    scale_words = NUM_INPUTS // group_size * 2 * NUM_OUTPUTS
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, code_words + scale_words + _REST_WORDS, np.uint32)
    # (zero, scale) words: fp16 64 + 8 and 0.01 (SPEC.md).
    words[code_words : code_words + scale_words] = 0x211F5480
    # Activations: zeros would take less power and so run faster than real data.
    halves = rng.standard_normal(2 * _REST_WORDS).astype(np.float16)
    words[code_words + scale_words :] = halves.view(np.uint32)
    base = driver.allocate(words.nbytes)
    stack.callback(driver.free, base)
    driver.copy_to_device(base, words.ctypes.data, words.nbytes)
    return _Buffers(base, base + 4 * code_words, base + 4 * (code_words + scale_words))


def _time(
    driver: CudaDriver, kernels: KernelSet, stream: Stream, shape: GemvShape, buffers: _Buffers
) -> float:
    """Return the seconds of one GEMV in a row of them, weights in L2."""
    sums = buffers.rest + (1 << 20)
    residual = sums + (1 << 20)
    sizes = (
        shape.width,
        shape.num_inputs,
        shape.num_outputs,
        shape.phase_units,
        shape.held_tiles,
    )
    launch = kernels.launch(
        shape.add_kernel,
        (shape.grid, 1, 1),
        (residual, sums, buffers.rest, None, buffers.codes, buffers.scales, *sizes),
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
    driver: CudaDriver, kernels: KernelSet, stream: Stream, shape: GemvShape, buffers: _Buffers
) -> float:
    """Return the SM clock in Hz, after counting the SMs that a launch of this shape gets."""
    scratch = buffers.rest
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
