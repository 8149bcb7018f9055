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


GEMV_WARPS = 16
GEMV_STAGES = 3
GEMV_WIDTHS = (1, 4, 8)
"""Numbers of tokens that a GEMV is built for; one with fewer runs in the next wider."""
UNIT_INPUTS = 128
"""Inputs that one warp takes at a time (w4a16.cuh kUnitInputs)."""
TILE_OUTPUTS = 32
"""Outputs that one warp computes at a time (w4a16.cuh kTileOutputs)."""


def _gemv_rows(width: int) -> tuple[Kernel, ...]:
    source, block = f"w4a16_gemv_{width}", 32 * GEMV_WARPS
    return (
        Kernel(f"w4a16_gemv_norm_{width}", source, "PPPPPPPiiiif", block, 128),
        Kernel(f"w4a16_gemv_norm_silu_{width}", source, "PPPPPPiiiif", block, 128),
        Kernel(f"w4a16_gemv_add_{width}", source, "PPPPPPiiii", block, 128),
    )


KERNELS = (
    *(row for width in GEMV_WIDTHS for row in _gemv_rows(width)),
    Kernel("decode_attention_half", "decode_attention", "P" * 11 + "iiiiiiif", 128, 216),
    Kernel("decode_attention_static", "decode_attention", "P" * 12 + "iiiiiiif", 128, 168),
    Kernel("decode_attention_online", "decode_attention", "P" * 11 + "iiiiiiif", 128, 168),
    Kernel("store_kv_half", "store_kv", "P" * 8 + "iiiiiif", 256, 80),
    Kernel("store_kv_static", "store_kv", "P" * 9 + "iiiiiif", 256, 80),
    Kernel("store_kv_online", "store_kv", "P" * 8 + "iiiiiif", 256, 80),
    Kernel("prefill_attention_half", "prefill_attention", "P" * 10 + "iiiiiif", 128, 255),
    Kernel("prefill_attention_static", "prefill_attention", "P" * 11 + "iiiiiif", 128, 255),
    Kernel("prefill_attention_online", "prefill_attention", "P" * 10 + "iiiiiif", 128, 255),
    Kernel("embed_f16", "embedding", "PPPPPPPPiiiff", 256, 40),
    Kernel("embed_bf16", "embedding", "PPPPPPPPiiiff", 256, 40),
    Kernel("mark_seen", "mark_seen", "PPPii", 256, 32),
    Kernel("sample_top_f32", "sample_top", "P" * 12 + "iiii", 256, 64),
    Kernel("sample_top_f16", "sample_top", "P" * 12 + "iiii", 256, 64),
    Kernel("sample_draw_f32", "sample_draw", "P" * 10 + "iiii", 1024, 64),
    Kernel("sample_draw_f16", "sample_draw", "P" * 10 + "iiii", 1024, 64),
    Kernel("read_bandwidth", "read_bandwidth", "PPi", 512, 64),
    Kernel("sm_probe", "read_bandwidth", "PPi", 512, 64),
)


def kernel(name: str) -> Kernel:
    """Return the row of an entry point; KeyError if there is none."""
    return _BY_NAME[name]


@dataclass(frozen=True)
class GemvShape:
    """How one W4A16 GEMV is launched (w4a16_gemv.cuh).

    Attributes:
        width: one of `GEMV_WIDTHS`.
        num_inputs: rows of the matrix.
        num_outputs: columns of the matrix.
        group_size: 128, 64 or 32.
        grid: blocks, a multiple of ``cluster``.
        splits: parts that the inputs are taken in.
        cluster: blocks that take a part each: ``splits``, or 1 where there are no clusters.
    """

    width: int
    num_inputs: int
    num_outputs: int
    group_size: int
    grid: int
    splits: int = 1
    cluster: int = 1

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, as w4a16_gemv.cuh lays it out."""
        groups = UNIT_INPUTS // self.group_size
        ring = GEMV_WARPS * GEMV_STAGES * (UNIT_INPUTS * TILE_OUTPUTS // 2 + groups * 128)
        plan = 32 + 16 * _ceil_div(self.width, 4)
        num_units = _ceil_div(_ceil_div(self.num_inputs, UNIT_INPUTS), self.splits)
        numbers = (2 + groups) * self.width * 4
        activations = 16 * _ceil_div(2 * UNIT_INPUTS * self.width + numbers, 16)
        run = 32 * 4 * (1 if self.width == 1 else self.width)
        return ring + plan + num_units * activations + GEMV_WARPS * self._held_runs(num_units) * run

    def _held_runs(self, num_units: int) -> int:
        if self.splits == 1:
            return 1
        if self.cluster == 1:
            return 2
        num_tiles = _ceil_div(self.num_outputs // TILE_OUTPUTS, self.grid // self.cluster)
        longest = _ceil_div(num_tiles * num_units, GEMV_WARPS)
        return _ceil_div(longest - 1, num_units)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


_BY_NAME = {row.name: row for row in KERNELS}
