"""How a matrix product for many tokens is cut into tiles and shared out among blocks (gemm.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

FULL_WAVE = 0.85
"""Share of the blocks that must have work for a last wave of whole tiles to be left as it is."""
LEAST_STEPS = 4
"""Steps of a tile below which another block costs more than it saves."""


class GemmOutput(IntEnum):
    """What becomes of the product: `Output` of gemm.cuh, the kernels' last argument."""

    HALF = 0
    """fp16, with the bias."""
    SILU = 1
    """fp16 silu(gate) * up of neighbouring columns, half as many."""
    ADD = 2
    """Added to the fp32 residual, with the bias."""


@dataclass(frozen=True)
class GemmTile:
    """One `Tile` of gemm.cuh.

    Attributes:
        outputs: columns of a tile.
        tokens: rows of a tile.
        stage_inputs: inputs that a block takes at a time.
        stages: slots of the ring in shared memory.
        threads: of a block.
        blocks_per_sm: that its registers and shared memory allow.
    """

    outputs: int
    tokens: int
    stage_inputs: int
    stages: int
    threads: int
    blocks_per_sm: int

    @property
    def part_bytes(self) -> int:
        """Bytes of the sums of one tile."""
        return self.outputs * self.tokens * 4

    def shared_bytes(self, group_size: int) -> int:
        """Dynamic shared memory of a block for 4-bit weights; 0 for fp16 ones."""
        if group_size:
            scale_rows = max(1, self.stage_inputs // group_size)
            weights = self.stage_inputs * self.outputs // 2 + scale_rows * self.outputs * 4
        else:
            weights = self.stage_inputs * self.outputs * 2
        ring = self.stages * (self.tokens * self.stage_inputs * 2 + weights)
        return max(ring, self.tokens * (self.outputs * 2 + 16))


W4A16_TILES = {
    16: GemmTile(128, 16, 128, 4, 128, 3),
    32: GemmTile(128, 32, 128, 3, 128, 3),
    64: GemmTile(128, 64, 128, 3, 128, 2),
    128: GemmTile(128, 128, 64, 3, 128, 2),
}
"""By the number in the kernel's name; the same numbers as in w4a16_gemm_*.cu."""
F16_TILES = {
    8: GemmTile(128, 8, 64, 4, 128, 2),
    32: GemmTile(128, 32, 64, 4, 128, 2),
    64: GemmTile(128, 64, 64, 4, 128, 2),
    128: GemmTile(128, 128, 64, 3, 128, 2),
}
"""The same for f16_gemm_*.cu."""
_W4A16_LIMITS = ((16, 16), (32, 32), (64, 64), (96, 32), (192, 64))
_F16_LIMITS = ((8, 8), (32, 32), (128, 64))


def fastest_tile(num_tokens: int, *, is_quantized: bool) -> int:
    """Return the tile, by its tokens, that is fastest for a number of tokens.

    By measurement on an H200 with the four matrices of a Llama-2-7B layer (DECISIONS.md): a larger
    tile does more with what it loads, and wastes more on tokens that are not there.
    """
    limits = _W4A16_LIMITS if is_quantized else _F16_LIMITS
    return next((tile for most, tile in limits if num_tokens <= most), 128)


@dataclass(frozen=True)
class GemmShape:
    """One launch.

    Attributes:
        tile: the tile it is built of.
        num_tokens: rows of x.
        num_inputs: rows of the matrix.
        num_outputs: columns of the matrix.
        num_sms: of the device.
    """

    tile: GemmTile
    num_tokens: int
    num_inputs: int
    num_outputs: int
    num_sms: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the result."""
        tile = self.tile
        return -(-self.num_tokens // tile.tokens) * -(-self.num_outputs // tile.outputs)

    @property
    def num_steps(self) -> int:
        """Steps through the inputs of one tile."""
        return -(-self.num_inputs // self.tile.stage_inputs)

    @property
    def slots(self) -> int:
        """Blocks that run at the same time."""
        return self.num_sms * self.tile.blocks_per_sm

    @property
    def stream_tiles(self) -> int:
        """Tiles that are cut up to keep every block busy."""
        rest = self.num_tiles % self.slots
        if self.num_tiles >= self.slots:
            is_cut = rest < FULL_WAVE * self.slots and rest * self.num_steps >= self.slots
            return rest if is_cut else 0
        return self.num_tiles if self.grid > self.num_tiles else 0

    @property
    def grid(self) -> int:
        """Blocks of the launch."""
        tiles, slots = self.num_tiles, self.slots
        if tiles >= slots:
            return slots
        most = max(1, min(slots, tiles * (self.num_steps // LEAST_STEPS)))
        # Equal parts of every tile, where that leaves few blocks without work: fewer parts to add.
        even = most // tiles * tiles
        return max(tiles, even if even >= FULL_WAVE * most else most)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of sums that blocks hand to each other."""
        return 2 * self.grid * self.tile.part_bytes if self.stream_tiles else 0
