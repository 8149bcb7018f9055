"""How the output head is launched (head.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

MAX_ROWS = 8
"""Rows of logits that one launch computes at most."""
_WARPS = 8
_STAGES = 4
_SLOT_BYTES = 16 * 128
_PART_WORDS = 2048


@dataclass(frozen=True)
class HeadShape:
    """One launch of the output head.

    Attributes:
        num_rows: 1 to `MAX_ROWS`.
        hidden_size: a multiple of 64.
        is_int8: whether the weights are int8 with a scale for each row.
    """

    num_rows: int
    hidden_size: int
    is_int8: bool

    @property
    def kernel(self) -> str:
        """Name of the entry point."""
        if not self.is_int8:
            return "head_f16"
        return "head_int8_4" if self.num_rows <= 4 else "head_int8_8"

    def grid(self, num_sms: int, max_shared_bytes: int) -> int:
        """Return the blocks of the launch: two on an SM where both fit.

        Args:
            num_sms: of the device.
            max_shared_bytes: of a block, 1 KiB less than an SM has; each block costs 1 KiB more.
        """
        is_pair = 2 * self.shared_bytes + 1024 <= max_shared_bytes
        return 2 * num_sms if is_pair else num_sms

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: HeadMemory, then the columns of activations."""
        ring = _WARPS * _STAGES * _SLOT_BYTES
        memory = ring + 2 * _PART_WORDS * 4 + (2 * _WARPS + 1) * MAX_ROWS * 4
        if not self.is_int8:
            return memory + self.num_rows * (2 * self.hidden_size + 64)
        pitch = self.hidden_size + (64 if self.hidden_size % 128 == 0 else 0)
        # A last unit of half the length reads 64 bytes past its column.
        return memory + 2 * self.num_rows * pitch + 64


def head_shapes(
    num_rows: int, hidden_size: int, *, is_int8: bool, max_shared_bytes: int
) -> list[HeadShape]:
    """Return the launches that compute rows of logits, in order: few, and alike in their rows.

    The columns of all rows of a launch lie in shared memory: 8 of 4096 fit on sm_87, 1 on sm_72.

    Args:
        num_rows: at least 1.
        hidden_size: as in `HeadShape`, like the next.
        is_int8: whether the weights are int8.
        max_shared_bytes: what one block may have; one row is tried where not even that fits.
    """
    sizes = range(MAX_ROWS, 1, -1)
    shapes = (HeadShape(rows, hidden_size, is_int8) for rows in sizes)
    most = next((s.num_rows for s in shapes if s.shared_bytes <= max_shared_bytes), 1)
    num_launches = -(-num_rows // most)
    bounds = [num_rows * index // num_launches for index in range(num_launches + 1)]
    return [HeadShape(end - start, hidden_size, is_int8) for start, end in pairwise(bounds)]
