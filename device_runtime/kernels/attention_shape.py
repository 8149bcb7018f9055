"""How the attention kernels are launched: splits, tiles, shared memory and workspace."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from device_runtime.kernels.reference.kv_pages import KvLayout

DECODE_WARPS = 8
"""Warps of a block that stream cached tokens (decode_block.cuh kStreamWarps)."""
DECODE_SLOTS = 4
"""Parts of a step that the ring of a warp holds; half as many when fp16 (kRingParts)."""
PLAIN_DECODE_SLOTS = 2
"""The same of the plain variant."""
STEP_TOKENS = 32
"""Tokens of a warp's step, whose keys and values are a part each (kStepTokens)."""


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
        split_units: up to so many units of 64 tokens one block takes alone.
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
        return self._shared_bytes(DECODE_SLOTS)

    def shared_bytes_within(self, max_shared_bytes: int) -> int:
        """Return `shared_bytes`, or the plain variant's where the device has less, as sm_72."""
        if self.shared_bytes <= max_shared_bytes:
            return self.shared_bytes
        return self._shared_bytes(PLAIN_DECODE_SLOTS)

    def _shared_bytes(self, parts: int) -> int:
        layout = self.layout
        row_bytes = layout.head_dim * layout.element_bytes
        parameters = 4 if layout.parameter_bytes else 0
        slots = parts // layout.element_bytes
        ring = DECODE_WARPS * slots * STEP_TOKENS * (row_bytes + parameters)
        queries = 4 if self.group <= 4 else 8
        columns = 2 * queries * row_bytes
        numbers = 4 * (queries * layout.head_dim + layout.head_dim + 3 * queries + 4)
        return ring + columns + numbers + 4 * self.max_pages

    @property
    def partials_floats(self) -> int:
        """Floats that the blocks of a head exchange."""
        per_split = self.group * (self.layout.head_dim + 2)
        return self.rows * self.num_kv_heads * self.max_splits * per_split


PREFILL_ROWS = 128
"""Rows of a block of prefill_attention.cu, a query head of a token each (kPrefillRows)."""
PREFILL_SLOTS = 2
"""Units that its ring holds (kPrefillSlots)."""
SPAN_TOKENS = 64
"""Positions of a block of store_kv.cu (kSpanTokens)."""


def prefill_shared_bytes(layout: KvLayout) -> int:
    """Return the dynamic shared memory of a block of prefill_attention.cu."""
    queries = PREFILL_ROWS * (2 * layout.head_dim + 16)
    return PREFILL_SLOTS * layout.unit_bytes + queries


def prefill_tiles(
    query_start: NDArray[np.int32], positions: NDArray[np.int32], group: int
) -> NDArray[np.int32]:
    """Return (sequence, first row) of each block of prefill_attention.cu, the longest first.

    Args:
        query_start: ``[num_sequences + 1]``, as `Batch` has it.
        positions: ``[num_tokens]``, consecutive within a sequence.
        group: query heads that share a kv head.
    """
    tiles: list[tuple[int, int, int]] = []
    for sequence, (start, end) in enumerate(pairwise(query_start)):
        num_rows = (int(end) - int(start)) * group
        for row in range(0, num_rows, PREFILL_ROWS):
            last = (min(row + PREFILL_ROWS, num_rows) - 1) // group
            tiles.append((-int(positions[start]) - last, sequence, row))
    return np.array([tile[1:] for tile in sorted(tiles)], np.int32).reshape(-1, 2)


def store_spans(query_start: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return (sequence, index) of each block of store_kv.cu.

    Args:
        query_start: ``[num_sequences + 1]``, as `Batch` has it.
        positions: ``[num_tokens]``, consecutive within a sequence.
    """
    spans = [
        (sequence, span)
        for sequence, (start, end) in enumerate(pairwise(query_start))
        if end > start
        for span in range(
            int(positions[start]) // SPAN_TOKENS, int(positions[end - 1]) // SPAN_TOKENS + 1
        )
    ]
    return np.array(spans, np.int32).reshape(-1, 2)
