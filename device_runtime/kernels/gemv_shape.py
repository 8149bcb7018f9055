"""How a W4A16 GEMV is launched: its grid, and what a block holds in shared memory at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from device_runtime.errors import InternalError
from device_runtime.kernels.shared_memory import most_of_two
from device_runtime.kernels.table import (
    GEMV_STAGES,
    GEMV_WARPS,
    PAIRED_GEMV_WARPS,
    QUANTIZE_THREADS,
)

UNIT_INPUTS = 256
"""Inputs that one warp takes at a time (w4a16.cuh kUnitInputs)."""
TILE_OUTPUTS = 32
"""Outputs that one warp computes at a time (w4a16.cuh kTileOutputs)."""
STRETCH_INPUTS = 128
"""Inputs whose activations share a scale (w4a16.cuh kStretchInputs)."""
_UNIT_STRETCHES = UNIT_INPUTS // STRETCH_INPUTS


@dataclass(frozen=True)
class GemvShape:
    """One launch of w4a16_gemv.cuh.

    Attributes:
        width: tokens that the kernel is built for, one of `GEMV_STAGES`.
        num_inputs: rows of the matrix.
        num_outputs: columns of the matrix.
        group_size: 128, 64 or 32.
        grid: blocks.
        phase_units: units whose activations are in shared memory at once.
        held_tiles: tiles whose partial sums are in shared memory at once; of several tokens all of
            a block's, or two batches.
        stages: units that a warp keeps in flight; the plain variant needs only one.
        warps: of a block.
    """

    width: int
    num_inputs: int
    num_outputs: int
    group_size: int
    grid: int
    phase_units: int
    held_tiles: int
    stages: int
    warps: int = GEMV_WARPS

    @property
    def add_kernel(self) -> str:
        """The entry point that adds to the residual."""
        paired = "paired_" if self.width == 1 and self.warps == PAIRED_GEMV_WARPS else ""
        return f"w4a16_gemv_{paired}add_{self.width}"

    @property
    def num_units(self) -> int:
        """Units of the matrix."""
        return _ceil_div(self.num_inputs, UNIT_INPUTS)

    @property
    def block_tiles(self) -> int:
        """Tiles of the block that has most."""
        return _ceil_div(self.num_outputs // TILE_OUTPUTS, self.grid)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, as w4a16_gemv.cuh lays it out."""
        groups = UNIT_INPUTS // self.group_size
        unit_bytes = UNIT_INPUTS * TILE_OUTPUTS // 2 + groups * TILE_OUTPUTS * 4
        ring = self.warps * self.stages * unit_bytes
        num_squares = self.num_units * _UNIT_STRETCHES * self.width
        norms = 16 * (_ceil_div(self.width, 4) + _ceil_div(num_squares, 4))
        activations = self.phase_units * _UNIT_STRETCHES * self._stretch_bytes
        sums = self.held_tiles * self.phase_units * TILE_OUTPUTS * self.width * 4
        barrier = 8
        return ring + norms + activations + sums + barrier

    @property
    def activation_bytes(self) -> int:
        """Global memory for quantized activations; none with one token."""
        if self.width == 1:
            return 0
        stretches = self.num_units * _UNIT_STRETCHES
        return stretches * (self._stretch_bytes + 4 * self.width)

    @property
    def quantize_grid(self) -> int:
        """Blocks of the launch that quantizes the activations."""
        return _ceil_div(self.num_units * _UNIT_STRETCHES * self.width, QUANTIZE_THREADS // 32)

    @property
    def _stretch_bytes(self) -> int:
        numbers = (1 + STRETCH_INPUTS // self.group_size) * self.width * 4
        return 16 * _ceil_div(2 * STRETCH_INPUTS * self.width + numbers, 16)

    @property
    def workspace_bytes(self) -> int:
        """Global memory for the sums between phases."""
        return 4 * self.num_outputs * self.width if self.phase_units < self.num_units else 0


def pair_gemv(shape: GemvShape, max_shared_bytes: int) -> GemvShape:
    """Return the launch of a product that is added, on a device where kernels overlap.

    Where a block of one token has one tile, and its warps one unit each, blocks of half the warps
    serve, if two fit an SM; else the shape as it is.

    Args:
        shape: as planned.
        max_shared_bytes: what one block may have.
    """
    paired = replace(shape, warps=PAIRED_GEMV_WARPS)
    is_small = shape.width == 1 and shape.block_tiles == 1 and shape.num_units <= shape.warps
    is_fitting = paired.shared_bytes <= most_of_two(max_shared_bytes)
    return paired if is_small and is_fitting else shape


@cache  # all layers ask for the same few
def plan_gemv(
    *,
    width: int,
    num_inputs: int,
    num_outputs: int,
    group_size: int,
    num_sms: int,
    max_shared_bytes: int,
) -> GemvShape:
    """Choose the shape with the fewest phases, then the most held tiles, that fits.

    Args:
        width: as in `GemvShape`, like the next three.
        num_inputs: rows of the matrix.
        num_outputs: its columns.
        group_size: 128, 64 or 32.
        num_sms: of the device.
        max_shared_bytes: what one block may have.

    Raises:
        InternalError: not even the smallest shape fits.
    """
    num_units = _ceil_div(num_inputs, UNIT_INPUTS)
    grid = min(num_outputs // TILE_OUTPUTS, num_sms)
    block_tiles = _ceil_div(num_outputs // TILE_OUTPUTS, grid)
    # Where the ring of several stages does not fit, on sm_72, the plain variant runs.
    for stages in sorted({GEMV_STAGES[width], 1}, reverse=True):
        for num_phases in range(1, num_units + 1):
            # Batches of equal size, so that no warp waits for a short last one; of several tokens
            # two of them in turn.
            for num_batches in range(1, block_tiles + 1):
                held_tiles = _ceil_div(block_tiles, num_batches)
                if width > 1:
                    held_tiles = min(block_tiles, 2 * held_tiles)
                shape = GemvShape(
                    width,
                    num_inputs,
                    num_outputs,
                    group_size,
                    grid,
                    _ceil_div(num_units, num_phases),
                    held_tiles,
                    stages,
                )
                if shape.shared_bytes <= max_shared_bytes:
                    return shape
    raise InternalError(
        f"a {num_inputs} x {num_outputs} GEMV of width {width} needs {shape.shared_bytes} bytes of "
        f"shared memory and the device has {max_shared_bytes}"
    )


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
