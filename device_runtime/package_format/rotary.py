"""The column order of q and k heads: Hugging Face halves against TurboMind pairs (section 1.2)."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def to_pairs(columns: NDArray[Scalar], head_dim: int) -> NDArray[Scalar]:
    """Reorder each head from half-split to adjacent pairs (spec section 1.2).

    ``new[h*D + 2*i + j] = old[h*D + j*D/2 + i]`` on the last axis.

    Args:
        columns: ``[..., num_heads * head_dim]`` of any dtype: weights, biases, codes, scales.
        head_dim: columns of one head, even.

    Returns:
        A new contiguous array of the same shape.

    Raises:
        ValueError: head_dim is odd or does not divide the last axis.
    """
    return _swap(columns, head_dim, (2, head_dim // 2))


def to_halves(columns: NDArray[Scalar], head_dim: int) -> NDArray[Scalar]:
    """Undo `to_pairs`.

    Raises:
        ValueError: head_dim is odd or does not divide the last axis.
    """
    return _swap(columns, head_dim, (head_dim // 2, 2))


def _swap(columns: NDArray[Scalar], head_dim: int, old_shape: tuple[int, int]) -> NDArray[Scalar]:
    num_columns = columns.shape[-1] if columns.ndim else 0
    if head_dim < 2 or head_dim % 2 or num_columns % head_dim:
        raise ValueError(f"{num_columns} columns are not whole heads of even head_dim {head_dim}")
    heads: NDArray[Any] = columns.reshape(*columns.shape[:-1], num_columns // head_dim, *old_shape)
    swapped: NDArray[Scalar] = heads.swapaxes(-1, -2).copy().reshape(columns.shape)
    return swapped
