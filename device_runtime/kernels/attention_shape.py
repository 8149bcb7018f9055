"""How the attention kernels are launched: splits, shared memory and workspace."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.kernels.reference.kv_pages import KvLayout

DECODE_WARPS = 4
DECODE_SLOTS = 4
"""Halves of a unit that a warp's ring holds (decode_attention.cu kSlots)."""


@dataclass(frozen=True)
class DecodeAttentionShape:
    """One launch of decode_attention.cu.

    Attributes:
        layout: of the cache.
        num_heads: query heads.
        num_kv_heads: heads of keys and values; 1 to 8 query heads share one.
        rows: sequences.
        max_pages: entries of a row's page table.
        max_splits: blocks that can share a kv head.
        split_units: units of a block before another one is worth it.
    """

    layout: KvLayout
    num_heads: int
    num_kv_heads: int
    rows: int
    max_pages: int
    max_splits: int
    split_units: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of the launch."""
        return (self.max_splits, self.num_kv_heads, self.rows)

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, as decode_attention.cu lays it out."""
        layout = self.layout
        ring = DECODE_WARPS * DECODE_SLOTS * (layout.part_bytes + layout.parameter_bytes)
        queries = 4 if self.group <= 4 else 8
        row_bytes = layout.head_dim * layout.element_bytes
        columns = 2 * queries * row_bytes
        numbers = 2 * 4 * queries + 16
        return ring + columns + 2 * row_bytes + numbers + 4 * self.max_pages

    @property
    def partials_floats(self) -> int:
        """Floats that the blocks of a head exchange."""
        per_split = self.group * (self.layout.head_dim + 2)
        return self.rows * self.num_kv_heads * self.max_splits * per_split
