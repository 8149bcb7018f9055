"""Causal attention of new tokens over a sequence's cached keys and values."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MAX_SCORES = 4 << 20
"""Scores held at a time; long chunks are worked off in tiles of queries."""


def attend(
    queries: NDArray[np.float32], kv: NDArray[np.float32], num_cached: int
) -> NDArray[np.float32]:
    """Return softmax(q k^T / sqrt(D)) v for one sequence, each query seeing itself and before.

    Args:
        queries: ``[num_tokens, num_heads, head_dim]`` fp32; consecutive query heads share a kv
            head.
        kv: ``[2, num_kv_heads, num_cached + num_tokens, head_dim]`` fp32.
        num_cached: tokens before the first query.

    Returns:
        ``[num_tokens, num_heads * head_dim]`` fp32.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = kv.shape[1]
    group = num_heads // num_kv_heads
    scaled = queries * np.float32(1 / math.sqrt(head_dim))
    # [num_kv_heads, num_tokens, group, head_dim]: the queries of a kv head as rows of one matrix.
    grouped = scaled.reshape(num_tokens, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    output = np.empty((num_tokens, num_kv_heads, group, head_dim), np.float32)
    tile = max(1, MAX_SCORES // (num_heads * kv.shape[2]))
    for start in range(0, num_tokens, tile):
        end = min(start + tile, num_tokens)
        seen = num_cached + end
        rows = np.ascontiguousarray(grouped[:, start:end]).reshape(num_kv_heads, -1, head_dim)
        weights = rows @ kv[0, :, :seen].transpose(0, 2, 1)
        _mask_future(weights.reshape(num_kv_heads, end - start, group, seen))
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        sums = weights.sum(axis=-1, keepdims=True)
        mixed = weights @ kv[1, :, :seen]
        mixed /= sums
        output[start:end] = mixed.reshape(num_kv_heads, end - start, group, head_dim).transpose(
            1, 0, 2, 3
        )
    return output.reshape(num_tokens, num_heads * head_dim)


def _mask_future(scores: NDArray[np.float32]) -> None:
    """Set the scores of keys after each query to minus infinity, in place.

    The last keys belong to the queries of ``scores [num_kv_heads, num_queries, group, num_keys]``.
    """
    num_queries = scores.shape[1]
    if num_queries > 1:
        future = np.triu(np.ones((num_queries, num_queries), bool), 1)[:, None, :]
        np.copyto(scores[..., -num_queries:], np.float32(-np.inf), where=future)
