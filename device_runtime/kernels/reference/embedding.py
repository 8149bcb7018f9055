"""The start of a step in numpy: twin of embedding.cu."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FULL_TURN = 2.0**64


def turns(frequencies: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return angles per position, in radians, as 2^-64 of a full turn.

    Args:
        frequencies: ``[num_pairs]`` fp64, as backends/rope.py inverse_frequencies has them.
    """
    return (np.mod(frequencies / (2 * math.pi), 1.0) * FULL_TURN).astype(np.uint64)


def rotation(positions: NDArray[np.int32], turned: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return (cos, sin) of each position and pair, ``[n, num_pairs, 2]``."""
    with np.errstate(over="ignore"):
        phases = positions.astype(np.uint64)[:, None] * turned[None, :]
    angles = phases.astype(np.float64) * (2 * math.pi / FULL_TURN)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def query_scales(
    positions: NDArray[np.int32], scale: float, trained: int, log_n_factor: float
) -> NDArray[np.float64]:
    """Return the factor of each token's queries, ``[n]``."""
    numbers = positions.astype(np.float64) + 1
    stretched = np.where(numbers > trained, np.log(np.maximum(numbers, 1)) * log_n_factor, 1.0)
    return scale * (stretched if log_n_factor > 0 else np.ones(len(positions)))
