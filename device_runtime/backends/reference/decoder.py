"""One step of the decoder: RMSNorm, RoPE, grouped-query attention and SwiGLU in fp32."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.base import Batch
from device_runtime.backends.reference.attention import attend
from device_runtime.backends.reference.blas_threads import ThreadGovernor
from device_runtime.backends.reference.kv_cache import KvCache
from device_runtime.backends.reference.weights import LayerWeights, Weights
from device_runtime.backends.rope import attention_scale, inverse_frequencies
from device_runtime.package_format.model_config import ModelConfig

Activations = NDArray[np.float32]


class Decoder:
    """Runs batches over weights and a cache that it borrows."""

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        cache: KvCache,
        page_size: int,
        threads: ThreadGovernor,
    ) -> None:
        self._model = model
        self._weights = weights
        self._cache = cache
        self._page_size = page_size
        self._threads = threads

    def run(self, batch: Batch) -> Activations:
        """Store the batch's keys and values; return ``[num_tokens, hidden_size]`` normed states."""
        hidden = self._weights.embed(batch.token_ids)
        rotated = rotations(self._model, batch)
        scale = attention_scale(self._model, batch.positions)
        tables = [np.array(pages, np.int32) for pages in batch.pages]
        pages, offsets = self._slots(batch, tables)
        self._threads.begin()
        for index in range(self._model.num_hidden_layers):
            layer = self._weights.layer(index)
            normed = rms_norm(hidden, layer.attention_norm, self._model.rms_norm_eps)
            rotation = None if index in self._model.layers_without_rope else rotated
            queries, kv = self._project(layer, normed, rotation)
            if scale is not None:
                queries *= scale[:, None, None]
            self._cache.store(index, pages, offsets, kv)
            mixed = self._attend(index, batch, tables, queries) @ layer.wo.T
            if layer.wo_bias is not None:
                mixed += layer.wo_bias
            hidden += mixed
            normed = rms_norm(hidden, layer.ffn_norm, self._model.rms_norm_eps)
            hidden += _swiglu(normed @ layer.w_gate_up.T) @ layer.w_down.T
            self._threads.mark()
        return rms_norm(hidden, self._weights.final_norm, self._model.rms_norm_eps)

    def _slots(
        self, batch: Batch, tables: list[NDArray[np.int32]]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the page of each token and its place in it."""
        numbers, offsets = np.divmod(batch.positions, np.int32(self._page_size))
        bounds = pairwise(batch.query_start)
        pages = [
            table[numbers[start:end]] for table, (start, end) in zip(tables, bounds, strict=True)
        ]
        return np.concatenate(pages), offsets

    def _project(
        self, layer: LayerWeights, normed: Activations, rotation: NDArray[np.complex64] | None
    ) -> tuple[Activations, Activations]:
        """Return queries ``[num_tokens, heads, D]`` and k, v ``[2, num_tokens, .., D]``.

        q and k are rotated, unless there is no rotation.
        """
        model = self._model
        qkv = normed @ layer.w_qkv.T
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        heads = qkv.reshape(len(qkv), -1, model.head_dim)
        first_key, first_value = model.num_attention_heads, heads.shape[1] - model.num_kv_heads
        queries = heads[:, :first_key]
        keys, values = heads[:, first_key:first_value], heads[:, first_value:]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries = rms_norm(queries, layer.q_norm, model.rms_norm_eps)
            keys = rms_norm(keys, layer.k_norm, model.rms_norm_eps)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        return queries, np.stack([keys, values])

    def _attend(
        self, index: int, batch: Batch, tables: list[NDArray[np.int32]], queries: Activations
    ) -> Activations:
        mixed = np.empty((len(queries), self._model.q_size), np.float32)
        for row, (start, end) in enumerate(pairwise(batch.query_start)):
            num_cached = batch.num_cached[row]
            num_tokens = num_cached + end - start
            pages = tables[row][: -(-num_tokens // self._page_size)]
            kv = self._cache.load(index, pages, num_tokens)
            mixed[start:end] = attend(queries[start:end], kv, num_cached)
        return mixed


def rms_norm(values: Activations, weight: Activations, eps: float) -> Activations:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` along the last axis."""
    squares = np.einsum("...i,...i->...", values, values)[..., None]
    normed: Activations = values / np.sqrt(squares / values.shape[-1] + np.float32(eps)) * weight
    return normed


def rotations(model: ModelConfig, batch: Batch) -> NDArray[np.complex64]:
    """Return the turn of each token's pairs as ``[num_tokens, head_dim / 2]`` unit numbers."""
    counts = np.diff(batch.query_start)
    turns = np.empty((batch.num_tokens, model.head_dim // 2), np.complex64)
    token_theta = np.repeat(batch.rope_theta, counts)
    for theta in set(batch.rope_theta):
        chosen = token_theta == theta
        angles = np.outer(batch.positions[chosen], inverse_frequencies(model, theta))
        turns[chosen] = np.cos(angles) + 1j * np.sin(angles)
    return turns


def rotate(heads: Activations, rotation: NDArray[np.complex64]) -> Activations:
    """Return heads ``[num_tokens, n, head_dim]`` with adjacent pairs turned as complex numbers.

    ``(a + bi)(cos + i sin)`` is TurboMind's rotation of the pair (2i, 2i + 1) (spec section 1.2).
    """
    pairs = np.ascontiguousarray(heads).view(np.complex64)
    return (pairs * rotation[:, None, :]).view(np.float32)


def _swiglu(gate_up: Activations) -> Activations:
    """Return ``silu(gate) * up`` for ``[num_tokens, 2 * intermediate_size]``."""
    size = gate_up.shape[1] // 2
    gate, up = gate_up[:, :size], gate_up[:, size:]
    with np.errstate(over="ignore"):  # exp of a large -gate is inf, and gate / inf the right 0
        activated: Activations = gate / (1 + np.exp(-gate)) * up
    return activated
