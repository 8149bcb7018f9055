"""Random numbers that depend on a seed, a position and a vocabulary index alone.

Counter-based, so every backend draws the same number for the same place in any order. The
generator is Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11,
section 3.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 10
WORDS_PER_COUNTER = 4

UNIFORM_BITS = 23
"""Bits of a word that make a uniform: ``(word >> 9) + 0.5`` over 2^23 is exact in fp32 and never
reaches 0 or 1, so both logarithms of a Gumbel stay finite."""

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counters: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Return the four output words of each counter.

    Args:
        counters: ``[4, n]`` uint32, word 0 first.
        seed: 64 bits; the low half is key word 0.

    Returns:
        ``[4, n]`` uint32.
    """
    c0, c1, c2, c3 = counters.astype(np.uint64)
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(NUM_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0 = (product_1 >> _SHIFT) ^ c1 ^ np.uint64(key_0)
        c2 = (product_0 >> _SHIFT) ^ c3 ^ np.uint64(key_1)
        c1 = product_1 & _LOW
        c3 = product_0 & _LOW
        key_0 = (key_0 + _WEYL_0) & 0xFFFFFFFF
        key_1 = (key_1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3)).astype(np.uint32)


def uniform(seed: int, position: int, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the uniform number in (0, 1) of each vocabulary index at one position.

    Index i takes word ``i % 4`` of the counter ``(i // 4, position, 0, 0)``.

    Args:
        seed: of the sequence, 64 bits.
        position: absolute index, in the sequence, of the token being drawn.
        indices: ``[n]`` vocabulary indices in ascending order.

    Returns:
        ``[n]`` fp32, each an odd multiple of 2^-24.
    """
    blocks = indices // WORDS_PER_COUNTER
    is_first = np.ones(len(blocks), bool)
    np.not_equal(blocks[1:], blocks[:-1], out=is_first[1:])
    counters = np.zeros((4, int(is_first.sum())), np.uint32)
    counters[0] = blocks[is_first]
    counters[1] = position
    words = philox4x32(counters, seed)
    chosen = words[indices % WORDS_PER_COUNTER, np.cumsum(is_first) - 1]
    half = np.float32(0.5)
    scale = np.float32(2.0**-UNIFORM_BITS)
    bits = (chosen >> (32 - UNIFORM_BITS)).astype(np.float32)
    drawn: NDArray[np.float32] = (bits + half) * scale
    return drawn


def gumbel(seed: int, position: int, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return Gumbel noise ``-log(-log(u))``; adding it to log weights and taking the largest draws.

    Args and shapes as `uniform`. Values lie between -2.82 and 16.64.
    """
    noise: NDArray[np.float32] = -np.log(-np.log(uniform(seed, position, indices)))
    return noise
