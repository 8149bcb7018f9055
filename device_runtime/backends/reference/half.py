"""fp16 to fp32 faster than numpy's own conversion, which goes element by element."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SIGN = np.uint32(0x8000)
_MAGNITUDE = np.uint32(0x7FFF)
_REBIAS = np.float32(2.0**112)
"""An fp16's exponent and fraction read as fp32 are too small by 2^(127 - 15)."""


def widen_finite(half: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return the same numbers as fp32; infinities and NaN do not survive.

    Exponent and fraction move up by 13 bits and are rebiased by an exact multiplication, which
    turns subnormals into normal numbers too.
    """
    bits = half.view(np.uint16).astype(np.uint32)
    sign = bits & _SIGN
    sign <<= np.uint32(16)
    bits &= _MAGNITUDE
    bits <<= np.uint32(13)
    widened = bits.view(np.float32)
    widened *= _REBIAS
    bits |= sign
    return widened
