"""How the shared memory of an SM is divided among blocks."""

from __future__ import annotations

RESERVED_BYTES = 1024
"""Of each block's, which the device takes (CUDA C++ programming guide, sm_80 on)."""


def most_of_two(max_block_bytes: int) -> int:
    """Return the bytes of dynamic shared memory with which two blocks fit an SM.

    Args:
        max_block_bytes: what one block may have, all but `RESERVED_BYTES` of an SM's.
    """
    return max_block_bytes // 2 - RESERVED_BYTES


def share_of(num_blocks: int, block_bytes: int, sm_bytes: int) -> int:
    """Return what so many blocks take of an SM's shared memory, in per cent rounded up."""
    return min(100, -(-100 * num_blocks * (block_bytes + RESERVED_BYTES) // sm_bytes))
