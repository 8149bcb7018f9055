"""bf16 weights become fp16 on their way to the device: the kernels know no bf16.

fp16 has three bits of mantissa more and a smaller range. What is below 2^-14 loses bits, at most
2^-25 of its value; what is above 65504 cannot be held and is refused.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import DeviceError
from device_runtime.package_format import bfloat16


def to_half(bits: NDArray[np.uint16], name: str) -> NDArray[np.float16]:
    """Return bf16 values as fp16, rounded to nearest; same shape.

    Args:
        bits: of a tensor or a part of it.
        name: of the tensor, for a message.

    Raises:
        DeviceError: a value is too large for fp16.
    """
    values = bfloat16.to_float32(bits)
    with np.errstate(over="ignore"):
        halves: NDArray[np.float16] = values.astype(np.float16)
    is_lost = np.isinf(halves) & np.isfinite(values)
    if is_lost.any():
        largest = float(np.abs(values[is_lost]).max())
        raise DeviceError(
            f"{name} holds {largest:.6g} in bf16, the cuda backend runs it in fp16, which ends at "
            "65504; use the reference backend"
        )
    return halves
