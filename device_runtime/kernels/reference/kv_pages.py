"""The paged KV cache of the CUDA backend: where an element lies, and how it is quantized.

Twin of kv_cache.cuh. A layer's pages are bytes ``[num_pages, num_kv_heads, units, unit_bytes]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from device_runtime.package_format.config_ini import (
    QUANT_POLICY_ONLINE_INT8,
    QUANT_POLICY_STATIC_INT8,
)

Bytes = NDArray[np.uint8]
Values = NDArray[np.float64]
Offsets = NDArray[np.int64]


@dataclass(frozen=True)
class KvLayout:
    """How one head's keys and values are kept.

    Attributes:
        quant_policy: 0 fp16, 4 static int8, 8 online int8.
        head_dim: 64 or 128.
        page_size: tokens of a page, a multiple of 64.
    """

    quant_policy: int
    head_dim: int
    page_size: int = 64

    @property
    def element_bytes(self) -> int:
        """Bytes of a stored element."""
        return 2 if self.quant_policy == 0 else 1

    @property
    def unit_tokens(self) -> int:
        """Tokens that a warp takes at a time."""
        return 64 // self.element_bytes

    @property
    def part_bytes(self) -> int:
        """Bytes of a unit's keys, and of its values."""
        return 64 * self.head_dim

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the scales and zeros of a unit's keys, and of its values."""
        return 4 * self.unit_tokens if self.quant_policy == QUANT_POLICY_ONLINE_INT8 else 0

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return 2 * (self.part_bytes + self.parameter_bytes)

    @property
    def units_per_page(self) -> int:
        """Units of one head in a page."""
        return self.page_size // self.unit_tokens

    def shape(self, num_pages: int, num_kv_heads: int) -> tuple[int, int, int, int]:
        """Return the shape of a layer's pages as bytes."""
        return (num_pages, num_kv_heads, self.units_per_page, self.unit_bytes)

    def key_offsets(self, token: int) -> Offsets:
        """Return the byte, in a unit, of each dimension of a token's key, ``[head_dim]``.

        Keys are ``[row bytes / 64][unit tokens][64 bytes]``.
        """
        byte = np.arange(self.head_dim, dtype=np.int64) * self.element_bytes
        return (byte // 64 * self.unit_tokens + token) * 64 + byte % 64

    def value_offsets(self, token: int) -> Offsets:
        """Return the byte, in a unit, of each dimension of a token's value, ``[head_dim]``.

        Values are ``[group][head_dim / 16][32 lanes][4 words]``, the operand A of a product with
        the dimensions as rows: lane 4 (dim % 8) + row % 4, word (dim / 8) % 2 + 2 (row / 4), where
        row is token % 8, and the tokens row, row + 8, .. of a group share a word.
        """
        dim = np.arange(self.head_dim, dtype=np.int64)
        group_tokens = 32 // self.element_bytes
        group, row = token // group_tokens, token % 8
        lane = dim % 8 * 4 + row % 4
        word = dim // 8 % 2 + row // 4 * 2
        block = group * (self.head_dim // 16) + dim // 16
        place = token % group_tokens // 8 * self.element_bytes
        return self.part_bytes + (block * 32 + lane) * 16 + word * 4 + place

    def parameter_offset(self, token: int, is_value: bool) -> int:
        """Return the byte, in a unit, of a token's fp16 scale; its zero follows."""
        return 2 * self.part_bytes + int(is_value) * self.parameter_bytes + 4 * token


def quantize_online(values: Values) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Return codes ``[..., head_dim]`` and (scale, zero) ``[..., 2]`` (spec section 4.5).

    In fp32, as the kernel does; a scale of 0 stores code 0, an inverse beyond fp16 becomes the
    largest fp16.
    """
    x = values.astype(np.float32)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    scale = ((high - low) / np.float32(255.0)).astype(np.float16)
    zero = low.astype(np.float16)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = (np.float32(1.0) / scale.astype(np.float32)).astype(np.float16)
    inverse = np.minimum(inverse, np.float16(65504.0)).astype(np.float32)
    inverse[scale == 0] = 0.0
    codes = np.clip(np.rint((x - zero.astype(np.float32)) * inverse), 0, 255)
    return codes.astype(np.uint8), np.concatenate([scale, zero], axis=-1)


def quantize_static(values: Values, scale: float, zero_point: float) -> NDArray[np.uint8]:
    """Return ``round((x - zero_point) / scale + 128)`` clamped to a byte (spec section 4.4)."""
    x = (values.astype(np.float32) - np.float32(zero_point)) / np.float32(scale)
    codes: NDArray[np.uint8] = np.clip(np.rint(x + np.float32(128.0)), 0, 255).astype(np.uint8)
    return codes


def put(
    unit: Bytes,
    layout: KvLayout,
    token: int,
    values: Values,
    is_value: bool,
    scale: tuple[float, float] = (1.0, 0.0),
) -> None:
    """Write a token's key or value ``[head_dim]`` into its unit ``[unit_bytes]``.

    Args:
        unit: changed in place.
        layout: of the cache.
        token: index within the unit.
        values: what to store.
        is_value: a value, not a key.
        scale: (scale, zero point) of static int8.
    """
    offsets = layout.value_offsets(token) if is_value else layout.key_offsets(token)
    if layout.quant_policy == 0:
        halves = values.astype(np.float16).view(np.uint16)
        unit[offsets] = halves & 0xFF
        unit[offsets + 1] = halves >> 8
    elif layout.quant_policy == QUANT_POLICY_STATIC_INT8:
        unit[offsets] = quantize_static(values, *scale)
    else:
        codes, parameters = quantize_online(values)
        unit[offsets] = codes
        start = layout.parameter_offset(token, is_value)
        unit[start : start + 4] = parameters.view(np.uint8)


def read(
    units: Bytes, layout: KvLayout, is_value: bool, scale: tuple[float, float] = (1.0, 0.0)
) -> Values:
    """Return all keys or values of units, ``[..., unit_bytes]`` to ``[..., unit_tokens, D]``."""
    tokens = range(layout.unit_tokens)
    find = layout.value_offsets if is_value else layout.key_offsets
    offsets = np.stack([find(token) for token in tokens])
    if layout.quant_policy == 0:
        low, high = units[..., offsets], units[..., offsets + 1]
        halves = low.astype(np.uint16) | high.astype(np.uint16) << 8
        return halves.view(np.float16).astype(np.float64)
    codes = units[..., offsets].astype(np.float64)
    if layout.quant_policy == QUANT_POLICY_STATIC_INT8:
        step, zero_point = np.float64(np.float32(scale[0])), np.float64(np.float32(scale[1]))
        exact: Values = (codes - 128.0) * step + zero_point
        return exact
    start = layout.parameter_offset(0, is_value)
    raw = np.ascontiguousarray(units[..., start : start + layout.parameter_bytes])
    parameters = raw.view(np.float16).astype(np.float64)
    parameters = parameters.reshape(*units.shape[:-1], layout.unit_tokens, 2)
    stored: Values = codes * parameters[..., :1] + parameters[..., 1:]
    return stored
