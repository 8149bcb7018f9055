"""How the attention kernels are launched: splits, tiles, shared memory and workspace."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from device_runtime.kernels.reference.kv_pages import KvLayout
from device_runtime.kernels.shared_memory import most_of_two

DECODE_WARPS = 8
"""Warps of a block that stream cached tokens (decode_block.cuh kStreamWarps)."""
MOST_SLOTS = 4
"""Parts of a step that the ring of a warp can hold (decode_stream.cuh kMostSlots)."""
STEP_TOKENS = 32
"""Tokens of a warp's step, whose keys and values are a part each (kStepTokens)."""
MOST_QUERIES = 8
"""Query heads of a block (decode_block.cuh kQueries)."""
WIDE_GROUP = 5
"""Query heads of a block from which on the kernels called "wide" serve."""


@dataclass(frozen=True)
class DecodeAttentionShape:
    """One launch of decode_attention.cu.

    Attributes:
        layout: of the cache.
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
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
        return (self.head_blocks, self.rows, self.max_splits)

    @property
    def head_blocks(self) -> int:
        """Blocks that share a split: one for each kv head and at most 8 of its query heads."""
        ratio = self.num_heads // self.num_kv_heads
        parts = next(
            n for n in range(1, ratio + 1) if ratio % n == 0 and ratio // n <= MOST_QUERIES
        )
        return self.num_kv_heads * parts

    @property
    def group(self) -> int:
        """Query heads of a block."""
        return self.num_heads // self.head_blocks

    def kernel(self, kind: str) -> str:
        """Return the entry point for a cache of a kind: half, static or online."""
        return f"decode_attention_{'wide_' if self.group >= WIDE_GROUP else ''}{kind}"

    def ring_slots(self, num_sms: int, max_shared_bytes: int) -> int:
        """Return how many parts of a step a warp keeps in flight.

        Where there are more heads than SMs, two blocks of decode_attention_online share one.

        Args:
            num_sms: of the device.
            max_shared_bytes: what one block may have.
        """
        is_int8 = self.layout.element_bytes == 1
        most, least = (MOST_SLOTS, 2) if is_int8 else (MOST_SLOTS // 2, 1)
        limits = [max_shared_bytes]
        is_online = self.layout.parameter_bytes > 0
        if is_online and self.group < WIDE_GROUP and self.rows * self.head_blocks > num_sms:
            limits.insert(0, most_of_two(max_shared_bytes))
        for limit in limits:
            for slots in range(most, least - 1, -1):
                if self.shared_bytes(slots) <= limit:
                    return slots
        return least

    def shared_bytes(self, ring_slots: int) -> int:
        """Return the dynamic shared memory, as decode_attention.cu lays it out."""
        layout = self.layout
        row_bytes = layout.head_dim * layout.element_bytes
        # Of keys and values, beside the keys.
        parameters = 8 if layout.parameter_bytes else 0
        ring = DECODE_WARPS * ring_slots * STEP_TOKENS * (row_bytes + parameters)
        queries = 4 if self.group < WIDE_GROUP else 8
        columns = 2 * queries * row_bytes
        numbers = 4 * (queries * layout.head_dim + layout.head_dim + 3 * queries)
        return ring + columns + numbers + 4 * self.max_pages

    @property
    def partials_floats(self) -> int:
        """Floats that the blocks of a head exchange, all 0 before and after a launch."""
        per_split = self.group * (self.layout.head_dim + 4)
        return self.rows * self.head_blocks * self.max_splits * per_split


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
