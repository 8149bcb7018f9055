"""How the output head is launched (head.cuh)."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 8
"""Rows of logits that one launch computes."""
_WARPS = 16


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

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: HeadMemory, then the columns of activations."""
        blocks = 2 if self.is_int8 and self.num_rows > 4 else 1
        memory = _WARPS * 2 * 4 * blocks * 32 * 4 + (2 * _WARPS + 1) * MAX_ROWS * 4
        if not self.is_int8:
            return memory + self.num_rows * (2 * self.hidden_size + 64)
        pitch = self.hidden_size + (64 if self.hidden_size % 128 == 0 else 0)
        return memory + 2 * self.num_rows * pitch
