"""Static int8 KV parameters of one layer and rank: formulas and file (spec sections 4.2, 4.3)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from device_runtime.errors import PackageError

FILE_BYTES = 16
SYMMETRIC_FILE_BYTES = 8
"""LMDeploy's ``--kv-sym`` wrote k and v scale alone; its engine rejects that file, we read it."""

_SMALLEST_SCALE = np.float16(2.0**-24)


@dataclass(frozen=True)
class KvScale:
    """``value = (byte - 128) * scale + zero_point`` for keys and for values (section 4.4).

    The zero point is in activation units: the centre of the range, not an integer code.
    """

    k_scale: float
    k_zero_point: float
    v_scale: float
    v_zero_point: float

    def __post_init__(self) -> None:
        """Refuse numbers that no int8 cache can use.

        Raises:
            PackageError: a number is not finite, or a scale is not positive.
        """
        for name in ("k_scale", "k_zero_point", "v_scale", "v_zero_point"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name.endswith("scale") and value <= 0.0):
                expected = "a finite number" + (" above 0" if name.endswith("scale") else "")
                raise PackageError(
                    f"past_kv_scale has {name} {value}, expected {expected}; "
                    "run kv-qparams again or use another quant_policy"
                )

    def to_bytes(self) -> bytes:
        """Return the 16 bytes of ``layers.L.past_kv_scale.R.weight``."""
        return struct.pack("<4f", self.k_scale, self.k_zero_point, self.v_scale, self.v_zero_point)

    @classmethod
    def from_bytes(cls, data: bytes) -> KvScale:
        """Read a file of 16 bytes, or the symmetric one of 8 bytes.

        Raises:
            PackageError: the size is another one, or the numbers are unusable.
        """
        if len(data) == FILE_BYTES:
            return cls(*struct.unpack("<4f", data))
        if len(data) == SYMMETRIC_FILE_BYTES:
            k_scale, v_scale = struct.unpack("<2f", data)
            return cls(k_scale, 0.0, v_scale, 0.0)
        raise PackageError(
            f"past_kv_scale has {len(data)} bytes, expected {FILE_BYTES} "
            f"(or {SYMMETRIC_FILE_BYTES} of a symmetric file)"
        )

    @classmethod
    def from_extrema(
        cls,
        k_min: ArrayLike,
        k_max: ArrayLike,
        v_min: ArrayLike,
        v_max: ArrayLike,
        *,
        bits: int = 8,
        is_symmetric: bool = False,
    ) -> KvScale:
        """Compute the parameters from observed extrema, in fp16 steps (spec section 4.2).

        A range that fp16 rounds to nothing gets the smallest positive fp16 scale, so that
        storing never divides by zero and loading returns the zero point.

        Args:
            k_min: fp16 numbers or arrays, reduced over all heads and dims of the rank.
            k_max: as ``k_min``.
            v_min: as ``k_min``.
            v_max: as ``k_min``.
            bits: of a stored code.
            is_symmetric: scale from the largest magnitude, zero points 0.

        Raises:
            PackageError: the extrema are not finite or not in order.
            ValueError: ``bits`` is outside 2 to 8.
        """
        if not 2 <= bits <= 8:
            raise ValueError(f"bits is {bits}, expected 2 to 8")
        keys = _parameters("key", k_min, k_max, bits, is_symmetric)
        values = _parameters("value", v_min, v_max, bits, is_symmetric)
        return cls(*keys, *values)


def _parameters(
    what: str, low: ArrayLike, high: ArrayLike, bits: int, is_symmetric: bool
) -> tuple[float, float]:
    least = np.min(np.asarray(low, np.float16))
    most = np.max(np.asarray(high, np.float16))
    if not (np.isfinite(least) and np.isfinite(most) and least <= most):
        raise PackageError(f"{what} statistics run from {least} to {most}, calibrate again")
    with np.errstate(over="ignore"):
        if is_symmetric:
            scale = np.maximum(np.abs(least), np.abs(most)) / np.float16(2 ** (bits - 1) - 1)
            zero_point = np.float16(0.0)
        else:
            scale = (most - least) / np.float16(2**bits - 1)
            zero_point = (most + least) / np.float16(2.0)
    return float(max(scale, _SMALLEST_SCALE)), float(zero_point)
