"""Attention over the paged cache in float64: twin of decode_attention.cu."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from device_runtime.kernels.reference import kv_pages
from device_runtime.kernels.reference.kv_pages import Bytes, KvLayout, Values

LOG2_E = 1.4426950408889634
"""Scores are kept as powers of two; the query scale carries this factor."""


@dataclass(frozen=True)
class AttentionWeights:
    """What an attention layer has beside its projections.

    Attributes:
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        num_ranks: parts that a row of qkv consists of.
        q_norm: ``[head_dim]`` or None.
        k_norm: ``[head_dim]`` or None.
        eps: of the norms.
        kv_scale: ``[num_kv_heads, 4]`` of static int8: k scale, k zero point, v scale, v zero
            point; or None.
    """

    num_heads: int
    num_kv_heads: int
    num_ranks: int = 1
    q_norm: Values | None = None
    k_norm: Values | None = None
    eps: float = 1e-6
    kv_scale: Values | None = None

    def scale(self, head: int, is_value: bool) -> tuple[float, float]:
        """Return the static (scale, zero point) of a head."""
        if self.kv_scale is None:
            return 1.0, 0.0
        first = 2 * int(is_value)
        return float(self.kv_scale[head, first]), float(self.kv_scale[head, first + 1])


def split_qkv(row: Values, weights: AttentionWeights) -> tuple[Values, Values, Values]:
    """Return q ``[num_heads, D]``, k and v ``[num_kv_heads, D]`` of a row of qkv."""
    ranks = weights.num_ranks
    q, kv = weights.num_heads // ranks, weights.num_kv_heads // ranks
    parts = row.astype(np.float64).reshape(ranks, q + 2 * kv, -1)
    head_dim = parts.shape[-1]
    return (
        parts[:, :q].reshape(-1, head_dim),
        parts[:, q : q + kv].reshape(-1, head_dim),
        parts[:, q + kv :].reshape(-1, head_dim),
    )


def normalize(heads: Values, weight: Values | None, eps: float) -> Values:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` of each head; no weight, no change."""
    if weight is None:
        return heads
    normed: Values = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + eps) * weight
    return normed


def rotate(heads: Values, rotation: Values) -> Values:
    """Turn adjacent pairs of ``[n, D]`` by ``[D / 2, 2]`` (cos, sin)."""
    a, b = heads[:, 0::2], heads[:, 1::2]
    cos, sin = rotation[:, 0], rotation[:, 1]
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(heads.shape)


def prepare(
    row: Values, rotation: Values, weights: AttentionWeights
) -> tuple[Values, Values, Values]:
    """Return q, k and v of a row of qkv as attention uses them: normed and rotated."""
    q, k, v = split_qkv(row, weights)
    q = rotate(normalize(q, weights.q_norm, weights.eps), rotation)
    k = rotate(normalize(k, weights.k_norm, weights.eps), rotation)
    return q, k, v


def store(
    pages: Bytes,
    layout: KvLayout,
    page_ids: NDArray[np.int32],
    position: int,
    kv: tuple[Values, Values],
    weights: AttentionWeights,
) -> None:
    """Write keys and values ``[num_kv_heads, D]`` of one position into a layer's pages."""
    page, offset = divmod(position, layout.page_size)
    unit, token = divmod(offset, layout.unit_tokens)
    for head in range(weights.num_kv_heads):
        for is_value in (False, True):
            target = pages[page_ids[page], head, unit]
            scale = weights.scale(head, is_value)
            kv_pages.put(target, layout, token, kv[is_value][head], is_value, scale)


def load(
    pages: Bytes,
    layout: KvLayout,
    page_ids: NDArray[np.int32],
    length: int,
    weights: AttentionWeights,
) -> Values:
    """Return keys and values ``[2, num_kv_heads, length, D]`` of a sequence."""
    num_pages = -(-length // layout.page_size)
    used = pages[page_ids[:num_pages]]
    result = np.empty((2, weights.num_kv_heads, length, layout.head_dim))
    for head in range(weights.num_kv_heads):
        for is_value in (False, True):
            scale = weights.scale(head, is_value)
            vectors = kv_pages.read(used[:, head], layout, is_value, scale)
            result[int(is_value), head] = vectors.reshape(-1, layout.head_dim)[:length]
    return result


def attend(q: Values, kv: Values, query_scale: float) -> Values:
    """Return ``softmax(query_scale q k^T) v`` with 2 as base, ``[num_heads * D]``.

    Args:
        q: ``[num_heads, D]``.
        kv: ``[2, num_kv_heads, length, D]``.
        query_scale: log2(e) / sqrt(D), times what else scales the queries.
    """
    group = q.shape[0] // kv.shape[1]
    keys, values = kv.repeat(group, axis=1)
    scores = np.einsum("hd,htd->ht", q, keys) * query_scale
    weights = np.exp2(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed: Values = np.einsum("ht,htd->hd", weights, values).reshape(-1)
    return mixed
