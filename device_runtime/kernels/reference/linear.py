"""Linear layers and the output head in float64: twins of the GEMM, GEMV and head kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def weights_of(
    codes: NDArray[np.uint8], zeros: NDArray[np.uint8], scales: NDArray[np.float16]
) -> Values:
    """Return ``(code - zero) * scale`` without rounding, ``[num_inputs, num_outputs]``.

    Args:
        codes: ``[num_inputs, num_outputs]``.
        zeros: ``[num_groups, num_outputs]``.
        scales: ``[num_groups, num_outputs]``.
    """
    group_size = len(codes) // len(zeros)
    steps = codes.astype(np.float64) - np.repeat(zeros.astype(np.float64), group_size, axis=0)
    return steps * np.repeat(scales.astype(np.float64), group_size, axis=0)


def linear(x: NDArray[np.float16], weights: Values, bias: NDArray[np.float16] | None) -> Values:
    """Return ``x @ weights + bias``, ``[num_tokens, num_outputs]``."""
    product = x.astype(np.float64) @ weights
    return product if bias is None else product + bias.astype(np.float64)


def silu_product(interleaved: Values) -> Values:
    """Return silu(gate) * up of columns gate, up, gate, up ..., half as wide."""
    gate, up = interleaved[:, 0::2], interleaved[:, 1::2]
    return gate / (1.0 + np.exp(-gate)) * up


def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float16], eps: float) -> Values:
    """Return ``x * weight / sqrt(mean(x^2) + eps)`` of each row."""
    rows = x.astype(np.float64)
    mean = (rows * rows).mean(axis=-1, keepdims=True)
    normed: Values = rows * weight.astype(np.float64) / np.sqrt(mean + eps)
    return normed


def head(
    normed: Values, weights: NDArray[np.generic], row_scales: NDArray[np.float16] | None = None
) -> Values:
    """Return logits ``[num_rows, vocab_size]``.

    Args:
        normed: ``[num_rows, hidden_size]``, what the last norm gives.
        weights: ``[vocab_size, hidden_size]`` fp16, or int8 with ``row_scales``.
        row_scales: ``[vocab_size]`` or None.
    """
    logits: Values = normed @ weights.astype(np.float64).T
    return logits if row_scales is None else logits * row_scales.astype(np.float64)
