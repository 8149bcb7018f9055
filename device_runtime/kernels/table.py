"""One row for each CUDA entry point: what Python must know to compile, check and launch it."""

from __future__ import annotations

from dataclasses import dataclass

ARGUMENT_TYPES = {"P": "pointer", "i": "int32_t", "f": "float"}
"""The letters of `Kernel.arguments`."""


@dataclass(frozen=True)
class Kernel:
    """One ``extern "C"`` function.

    Attributes:
        name: the entry point.
        source: the .cu file without its suffix.
        arguments: one letter of `ARGUMENT_TYPES` per parameter.
        block: threads of a block.
        max_registers: per thread, on every target; what co-residency was planned with.
    """

    name: str
    source: str
    arguments: str
    block: int
    max_registers: int


GEMV_WARPS = 8
GEMV_STAGES = 4
UNIT_INPUTS = 128
"""Inputs that one warp takes at a time (w4a16.cuh kUnitInputs)."""

KERNELS = (
    Kernel("w4a16_gemv_norm", "w4a16_gemv", "PPPPPPiiif", 32 * GEMV_WARPS, 128),
    Kernel("w4a16_gemv_norm_silu", "w4a16_gemv", "PPPPPiiif", 32 * GEMV_WARPS, 128),
    Kernel("w4a16_gemv_add", "w4a16_gemv", "PPPPPiii", 32 * GEMV_WARPS, 128),
    Kernel("read_bandwidth", "read_bandwidth", "PPi", 512, 64),
    Kernel("sm_probe", "read_bandwidth", "PPi", 512, 64),
)


def kernel(name: str) -> Kernel:
    """Return the row of an entry point; KeyError if there is none."""
    return _BY_NAME[name]


def w4a16_gemv_shared_bytes(num_inputs: int, group_size: int) -> int:
    """Return the dynamic shared memory of w4a16_gemv's kernels: the ring, then activations."""
    num_units = -(-num_inputs // UNIT_INPUTS)
    groups = UNIT_INPUTS // group_size
    ring = GEMV_WARPS * GEMV_STAGES * (UNIT_INPUTS * 32 // 2 + groups * 128)
    activations = num_units * (2 * UNIT_INPUTS + 4 + 4 * groups)
    sums = 2 * GEMV_WARPS * 32 * 4 + GEMV_WARPS * 4
    return ring + activations + sums


_BY_NAME = {row.name: row for row in KERNELS}
