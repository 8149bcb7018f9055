"""Regions of device memory: what they take together, and where each lies in a block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

ALIGNMENT = 256


def aligned(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """Return the next multiple of the alignment."""
    return -(-num_bytes // alignment) * alignment


def region_bytes(sizes: Sequence[int]) -> int:
    """Return what regions take together, each aligned."""
    return sum(aligned(size) for size in sizes)


def region_places(base: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the address of each region in a block that starts at ``base``."""
    offsets = accumulate((aligned(size) for size in sizes), initial=0)
    return tuple(base + offset for offset, _ in zip(offsets, sizes, strict=False))


def group_regions(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Return runs of regions of at most ``limit`` bytes each; a larger region stands alone."""
    groups: list[list[int]] = []
    room = 0
    for size in sizes:
        if not groups or aligned(size) > room:
            groups.append([])
            room = limit
        groups[-1].append(size)
        room -= aligned(size)
    return groups
