"""The paged KV cache in numpy: what is stored, and what attention reads back.

Every format keeps its codes as ``[num_pages, num_layers, 2 (K, V), num_kv_heads, page_size,
head_dim]``: a page is one run of memory. All of it is reserved at once, but the system gives it
only when it is first written, 2 MB at a time, so what one of our pages takes must lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.kv_format import KvFormat
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.backends.reference.half import widen_finite
from device_runtime.errors import PackageError
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package

Vectors = NDArray[np.float32]
_MAX_HALF = 65504.0


class KvCache(Protocol):
    """Keys and values of all layers in one format."""

    def store(
        self, layer: int, pages: NDArray[np.int32], offsets: NDArray[np.int32], kv: Vectors
    ) -> None:
        """Write new tokens.

        Args:
            layer: index.
            pages: ``[num_tokens]`` page of each token.
            offsets: ``[num_tokens]`` its place in the page.
            kv: ``[2, num_tokens, num_kv_heads, head_dim]`` fp32, keys then values, rotated.
        """

    def load(self, layer: int, pages: NDArray[np.int32], num_tokens: int) -> Vectors:
        """Return the first tokens of a sequence, ``[2, num_kv_heads, num_tokens, head_dim]`` fp32.

        Args:
            layer: index.
            pages: of the sequence, in order, enough for the tokens.
            num_tokens: how many.
        """


def make_kv_cache(package: Package, plan: MemoryPlan) -> KvCache:
    """Reserve the pages of a plan.

    Raises:
        PackageError: static int8 is asked for and the package has no parameters for it.
    """
    if plan.kv_format is KvFormat.FP16:
        return Fp16Cache(package.model, plan)
    if plan.kv_format is KvFormat.INT8_ONLINE:
        return OnlineInt8Cache(package.model, plan)
    return StaticInt8Cache(package.model, plan, read_kv_scales(package))


def read_kv_scales(package: Package) -> tuple[tuple[KvScale, ...], ...]:
    """Return the static int8 parameters of each layer, and in it of each rank.

    Raises:
        PackageError: the package has none.
    """
    scales = []
    for layer in range(package.model.num_hidden_layers):
        ranks = [package.kv_scale(layer, r) for r in range(package.model.tensor_para_size)]
        found = tuple(scale for scale in ranks if scale is not None)
        if len(found) != len(ranks):
            raise PackageError(
                f"quant_policy {KvFormat.INT8_STATIC.value} (static int8 KV cache) needs "
                f"past_kv_scale files, package {package.name} has none; "
                "run kv-qparams before packing, or use 0 or 8"
            )
        scales.append(found)
    return tuple(scales)


class Fp16Cache:
    """Keys and values rounded to fp16."""

    def __init__(self, model: ModelConfig, plan: MemoryPlan) -> None:
        self._halves = _pages(model, plan, np.float16, model.head_dim)

    def store(
        self, layer: int, pages: NDArray[np.int32], offsets: NDArray[np.int32], kv: Vectors
    ) -> None:
        """See `KvCache`.

        Raises:
            PackageError: a key or value is not finite in fp16.
        """
        largest = np.abs(kv).max(initial=0.0)
        if not largest <= _MAX_HALF:
            raise PackageError(
                f"a key or value of layer {layer} is {largest}, the fp16 KV cache holds up to "
                f"{_MAX_HALF:g}; verify the package or use quant_policy 8"
            )
        self._halves[pages, layer, :, :, offsets] = kv.transpose(1, 0, 2, 3)

    def load(self, layer: int, pages: NDArray[np.int32], num_tokens: int) -> Vectors:
        """See `KvCache`."""
        return widen_finite(_gather(self._halves, layer, pages, num_tokens))


class StaticInt8Cache:
    """One scale and zero point per layer and rank, for keys and for values (spec section 4.4)."""

    def __init__(
        self, model: ModelConfig, plan: MemoryPlan, scales: Sequence[Sequence[KvScale]]
    ) -> None:
        self._codes = _pages(model, plan, np.uint8, model.head_dim)
        heads = model.num_kv_heads // model.tensor_para_size
        # [layers, 2, num_kv_heads]: the heads of a rank share its numbers.
        self._scales = np.array(
            [[[s.k_scale for s in r], [s.v_scale for s in r]] for r in scales], np.float32
        ).repeat(heads, axis=2)
        self._zero_points = np.array(
            [[[s.k_zero_point for s in r], [s.v_zero_point for s in r]] for r in scales], np.float32
        ).repeat(heads, axis=2)

    def store(
        self, layer: int, pages: NDArray[np.int32], offsets: NDArray[np.int32], kv: Vectors
    ) -> None:
        """Store ``round((x - zp) / scale + 128)``, half to even, clamped to 0..255."""
        scale = self._scales[layer][:, None, :, None]
        zero_point = self._zero_points[layer][:, None, :, None]
        codes = np.rint((kv - zero_point) / scale + np.float32(128.0))
        np.clip(codes, 0, 255, out=codes)
        self._codes[pages, layer, :, :, offsets] = codes.transpose(1, 0, 2, 3)

    def load(self, layer: int, pages: NDArray[np.int32], num_tokens: int) -> Vectors:
        """Return ``(byte - 128) * scale + zp``."""
        values = _gather(self._codes, layer, pages, num_tokens, np.float32)
        values -= np.float32(128.0)
        values *= self._scales[layer][:, :, None, None]
        values += self._zero_points[layer][:, :, None, None]
        return values


class OnlineInt8Cache:
    """A scale and a zero per token and head, found when it is stored (spec section 4.5)."""

    def __init__(self, model: ModelConfig, plan: MemoryPlan) -> None:
        self._codes = _pages(model, plan, np.uint8, model.head_dim)
        self._parameters = _pages(model, plan, np.float16, 2)

    def store(
        self, layer: int, pages: NDArray[np.int32], offsets: NDArray[np.int32], kv: Vectors
    ) -> None:
        """Store ``round((x - zero) * fp16(1 / scale))``, half to even, clamped to 0..255.

        zero is fp16(min), scale fp16((max - min) / 255); a scale of 0 stores code 0. Where the
        inverse is beyond fp16 the largest fp16 stands for it.

        Raises:
            PackageError: a key or value is not finite in fp16.
        """
        codes, parameters = quantize_online(kv)
        if not np.isfinite(parameters).all():
            raise PackageError(
                f"a key or value of layer {layer} is {np.abs(kv).max()}, the int8 KV cache holds "
                f"up to {_MAX_HALF:g}; verify the package"
            )
        self._codes[pages, layer, :, :, offsets] = codes.transpose(1, 0, 2, 3)
        self._parameters[pages, layer, :, :, offsets] = parameters.transpose(1, 0, 2, 3)

    def load(self, layer: int, pages: NDArray[np.int32], num_tokens: int) -> Vectors:
        """Return ``code * scale + zero``."""
        values = _gather(self._codes, layer, pages, num_tokens, np.float32)
        parameters = widen_finite(_gather(self._parameters, layer, pages, num_tokens))
        values *= parameters[..., :1]
        values += parameters[..., 1:]
        return values


def quantize_online(kv: Vectors) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Return codes and (scale, zero) of vectors along the last axis (spec section 4.5).

    Args:
        kv: ``[..., head_dim]`` fp32.

    Returns:
        ``[..., head_dim]`` uint8 and ``[..., 2]`` fp16.
    """
    low = kv.min(axis=-1, keepdims=True)
    high = kv.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scale = ((high - low) / np.float32(255.0)).astype(np.float16)
        zero = low.astype(np.float16)
        inverse = (np.float32(1.0) / scale.astype(np.float32)).astype(np.float16)
        inverse = np.minimum(inverse, np.float16(_MAX_HALF)).astype(np.float32)
        inverse[scale == 0] = 0.0
        codes = np.rint((kv - zero.astype(np.float32)) * inverse)
        np.clip(codes, 0, 255, out=codes)
        return codes.astype(np.uint8), np.concatenate([scale, zero], axis=-1)


def _pages(model: ModelConfig, plan: MemoryPlan, dtype: Any, width: int) -> NDArray[Any]:
    layers, heads = model.num_hidden_layers, model.num_kv_heads
    return np.zeros((plan.num_pages, layers, 2, heads, plan.page_size, width), dtype)


def _gather(
    stored: NDArray[Any],
    layer: int,
    pages: NDArray[np.int32],
    num_tokens: int,
    dtype: Any = None,
) -> NDArray[Any]:
    """Return ``[2, num_kv_heads, num_tokens, width]``: a sequence's pages one after the other."""
    taken = stored[pages, layer]
    num_pages, _, heads, page_size, width = taken.shape
    joined = np.empty((2, heads, num_pages, page_size, width), dtype or stored.dtype)
    joined[...] = taken.transpose(1, 2, 0, 3, 4)
    return joined.reshape(2, heads, num_pages * page_size, width)[:, :, :num_tokens]
