"""How a GGUF file stretches its rotary positions, in the words of config.json."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from host_tools.fetch.gguf_header import GgufHeader
from host_tools.fetch.gguf_metadata import Metadata, shortest

ROPE_FREQS = "rope_freqs.weight"
LLAMA3_CONTEXT = 8192
LLAMA3_FACTORS = (8.0, 32.0, 16.0, 64.0)
"""Factors of Llama 3.1 (8) and 3.2 (32), and of fine-tunes; the file keeps only their effect."""


def rope_scaling(
    header: GgufHeader, prefix: str, theta: float, head_dim: int
) -> dict[str, object] | None:
    """Return ``rope_scaling`` of config.json.

    Args:
        header: of the file.
        prefix: architecture, which its metadata keys start with.
        theta: base of the rotary frequencies.
        head_dim: of one head.

    Raises:
        PackageError: the file scales its positions in a way that does not run here.
    """
    metadata = Metadata(header)
    if ROPE_FREQS in header.tensors:
        return _llama3_scaling(header, theta, head_dim)
    kind = metadata.text(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        factor = shortest(metadata.number(f"{prefix}.rope.scaling.factor"))
        return {"rope_type": "linear", "factor": factor}
    raise PackageError(
        f"{metadata.file_name} scales its positions by {kind[:40]!r}, expected none, linear or "
        "llama3"
    )


def _llama3_scaling(header: GgufHeader, theta: float, head_dim: int) -> dict[str, object]:
    """Find the numbers of Llama 3.1's rule whose divisors the file holds, one per rotary pair."""
    tensor = header.tensors[ROPE_FREQS]
    if tensor.shape != (head_dim // 2,) or tensor.kind.name != "F32":
        raise PackageError(
            f"{ROPE_FREQS} of {header.path.name} is {tensor.kind.name} of shape "
            f"{list(tensor.shape)}, expected F32 of [{head_dim // 2}]"
        )
    held = np.fromfile(header.path, "<f4", head_dim // 2, offset=tensor.offset)
    for factor in LLAMA3_FACTORS:
        if np.allclose(held, llama3_divisors(theta, head_dim, factor), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            }
    raise PackageError(
        f"{ROPE_FREQS} of {header.path.name} is not Llama 3.1's rule with a factor of "
        f"{', '.join(f'{factor:g}' for factor in LLAMA3_FACTORS)}"
    )


def llama3_divisors(theta: float, head_dim: int, factor: float) -> NDArray[np.float64]:
    """Return what Llama 3.1 divides each rotary frequency by, ``[head_dim // 2]``.

    Wavelengths above the original context are stretched by ``factor``, those below a quarter of
    it stay, and in between the divisor is blended (Llama 3.1's reference model, apply_scaling).
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((LLAMA3_CONTEXT / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return np.asarray(1.0 / ((1 - blend) / factor + blend))
