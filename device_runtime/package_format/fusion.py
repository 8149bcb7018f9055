"""How projections are fused and split over ranks (spec sections 1.2 and 1.3).

Columns are the last axis (outputs), rows the first (inputs), so the same functions serve weights,
biases, codes, zeros and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def split_columns(array: NDArray[Scalar], ranks: int) -> list[NDArray[Scalar]]:
    """Return each rank's equal share of the last axis, as views.

    Raises:
        ValueError: the last axis is not a multiple of ``ranks``.
    """
    width = _share(array.shape[-1], ranks, "columns")
    return [array[..., rank * width : (rank + 1) * width] for rank in range(ranks)]


def join_columns(parts: Sequence[NDArray[Scalar]]) -> NDArray[Scalar]:
    """Undo `split_columns`; one part comes back as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def split_rows(array: NDArray[Scalar], ranks: int) -> list[NDArray[Scalar]]:
    """Return each rank's equal share of the first axis, as views.

    Raises:
        ValueError: the first axis is not a multiple of ``ranks``.
    """
    height = _share(array.shape[0], ranks, "rows")
    return [array[rank * height : (rank + 1) * height] for rank in range(ranks)]


def join_rows(parts: Sequence[NDArray[Scalar]]) -> NDArray[Scalar]:
    """Undo `split_rows`; one part comes back as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)


def fuse_qkv(
    q: NDArray[Scalar], k: NDArray[Scalar], v: NDArray[Scalar], ranks: int
) -> list[NDArray[Scalar]]:
    """Concatenate q, k and v columns rank by rank (spec section 1.2).

    Args:
        q: ``[..., num_heads * head_dim]``, already in pair order.
        k: ``[..., num_kv_heads * head_dim]``, already in pair order.
        v: ``[..., num_kv_heads * head_dim]``.
        ranks: files to make; must divide both numbers of heads.

    Returns:
        One ``[..., (num_heads + 2 * num_kv_heads) * head_dim / ranks]`` per rank:
        the rank's q columns, then its k columns, then its v columns.

    Raises:
        ValueError: a number of columns is not a multiple of ``ranks``.
    """
    shares = zip(*(split_columns(part, ranks) for part in (q, k, v)), strict=True)
    return [np.concatenate(share, axis=-1) for share in shares]


def split_qkv(
    parts: Sequence[NDArray[Scalar]], num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[NDArray[Scalar], NDArray[Scalar], NDArray[Scalar]]:
    """Undo `fuse_qkv`: return the q, k and v columns of all ranks.

    Raises:
        ValueError: the columns of a part are not those of these heads.
    """
    q_width = _share(num_heads * head_dim, len(parts), "query columns")
    kv_width = _share(num_kv_heads * head_dim, len(parts), "key columns")
    for rank, part in enumerate(parts):
        if part.shape[-1] != q_width + 2 * kv_width:
            raise ValueError(
                f"rank {rank} has {part.shape[-1]} fused columns, "
                f"expected {q_width} + 2 x {kv_width}"
            )
    return (
        join_columns([part[..., :q_width] for part in parts]),
        join_columns([part[..., q_width : q_width + kv_width] for part in parts]),
        join_columns([part[..., q_width + kv_width :] for part in parts]),
    )


def fuse_w13(w1: NDArray[Scalar], w3: NDArray[Scalar]) -> NDArray[Scalar]:
    """Interleave gate (w1) and up (w3) columns one by one, gate first (spec section 1.3).

    Interleaving the whole and splitting it, or splitting and interleaving each rank's share,
    give the same files.

    Raises:
        ValueError: the shapes differ.
    """
    if w1.shape != w3.shape:
        raise ValueError(f"w1 {w1.shape} and w3 {w3.shape} differ in shape")
    fused = np.empty((*w1.shape[:-1], 2 * w1.shape[-1]), w1.dtype)
    fused[..., 0::2] = w1
    fused[..., 1::2] = w3
    return fused


def split_w13(w13: NDArray[Scalar]) -> tuple[NDArray[Scalar], NDArray[Scalar]]:
    """Undo `fuse_w13`: return (w1, w3) as views.

    Raises:
        ValueError: the number of columns is odd.
    """
    _share(w13.shape[-1], 2, "columns")
    return w13[..., 0::2], w13[..., 1::2]


def _share(size: int, ranks: int, what: str) -> int:
    if ranks < 1 or size % ranks:
        raise ValueError(f"{size} {what} do not split evenly over {ranks} ranks")
    return size // ranks
