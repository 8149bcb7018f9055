"""Rotary angles: the frequencies of a model, stretched as its config asks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from device_runtime.package_format.model_config import ModelConfig, RopeScaling


def planned_theta(model: ModelConfig, planned_tokens: int) -> float:
    """Return the rotary base of a sequence that may grow to ``planned_tokens``.

    Under dynamic NTK scaling with factor f and P trained positions it is ``theta * s^(D/(D-2))``,
    s = f L / P - (f - 1) for a planned length L above P; decided once per sequence (spec section
    3). Qwen-1's own form takes s = 2^ceil(log2(L / P) + 1) - 1 (QwenLM/Qwen-7B-Chat,
    ``modeling_qwen.py``, ``get_ntk_alpha``). Otherwise it is the model's.
    """
    scaling = model.rope_scaling
    trained = model.max_position_embeddings
    if scaling.kind not in ("dynamic", "qwen1") or planned_tokens <= trained:
        return model.rope_theta
    stretch = scaling.factor * planned_tokens / trained - (scaling.factor - 1)
    if scaling.kind == "qwen1":
        stretch = 2.0 ** math.ceil(math.log2(planned_tokens / trained) + 1) - 1
    exponent = model.head_dim / (model.head_dim - 2)
    return float(model.rope_theta * stretch**exponent)


def inverse_frequencies(model: ModelConfig, theta: float) -> NDArray[np.float64]:
    """Return the angle per position of each pair, ``[head_dim / 2]`` fp64.

    Pair i turns by ``theta^(-2i/D)``; linear scaling divides that by its factor, llama3 scaling
    the slow pairs only (Llama 3.1's config.json, ``rope_type`` llama3).
    """
    pairs = np.arange(0, model.head_dim, 2, dtype=np.float64)
    frequencies: NDArray[np.float64] = theta ** (-pairs / model.head_dim)
    if model.rope_scaling.kind == "linear":
        return frequencies / model.rope_scaling.factor
    if model.rope_scaling.kind == "llama3":
        return _llama3(frequencies, model.rope_scaling)
    return frequencies


def attention_scale(model: ModelConfig, positions: NDArray[np.int32]) -> NDArray[np.float32] | None:
    """Return the log-n factor of each query, ``[num_tokens]`` fp32, or None where none applies.

    It is log(n) / log(P) for the n-th token, n above the P trained positions (spec section 3,
    ``use_logn_attn``).
    """
    trained = model.max_position_embeddings
    if not model.use_logn_attn or trained < 2 or not np.any(positions >= trained):
        return None
    numbers = np.maximum(positions.astype(np.float64) + 1, trained)
    return (np.log(numbers) / math.log(trained)).astype(np.float32)


def _llama3(frequencies: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Divide slow frequencies by the factor, leave fast ones, blend those between."""
    trained = scaling.original_max_position_embeddings
    turns = trained * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies
