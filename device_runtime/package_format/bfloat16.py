"""bfloat16 as its raw bits: numpy has no such type (spec section 1.2, weight_type bf16)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bf16 bits to fp32, exactly; same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round fp32 to bf16 bits, to nearest and ties to even; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Adding half of the last kept bit, less one when that bit is even, carries as rounding does.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16).astype(np.uint16) | np.uint16(0x40), rounded)
