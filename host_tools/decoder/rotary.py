"""Rotary position embeddings and the ways their angles are stretched, in half-split order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from device_runtime.package_format.model_config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Rotary:
    """Angles of one run of positions.

    Attributes:
        cos: ``[num_positions, head_dim]`` fp32; the second half repeats the first.
        sin: ``[num_positions, head_dim]`` fp32; the first half is negated, so that
            ``x * cos + swap_halves(x) * sin`` is the rotation.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, model: ModelConfig, num_positions: int, device: torch.device) -> Rotary:
        """Return the angles of positions 0 to ``num_positions - 1``.

        A dynamic scaling is decided by ``num_positions``, once for the sequence (spec section 3).
        """
        frequencies = rotary_frequencies(model, num_positions).to(device)
        positions = torch.arange(num_positions, dtype=torch.float32, device=device)
        if model.rope_scaling.kind == "linear":
            positions = positions / model.rope_scaling.factor
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def rotate(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate ``[..., num_positions, head_dim]`` queries or keys."""
        first, second = states.chunk(2, dim=-1)
        if states.is_cuda:
            # Half the reading and writing; a CPU keeps the bits that it always had.
            rotated = states * self.cos
            first_sin, second_sin = self.sin.chunk(2, dim=-1)
            rotated.narrow(-1, 0, first.shape[-1]).addcmul_(second, first_sin)
            rotated.narrow(-1, first.shape[-1], first.shape[-1]).addcmul_(first, second_sin)
            return rotated
        return states * self.cos + torch.cat((second, first), dim=-1) * self.sin


def rotary_frequencies(model: ModelConfig, num_positions: int) -> torch.Tensor:
    """Return the angle per position of each pair, ``[head_dim // 2]`` fp32."""
    scaling = model.rope_scaling
    theta = model.rope_theta
    if scaling.kind in ("dynamic", "qwen1"):
        theta *= _ntk_stretch(scaling, model, num_positions)
    pairs = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    frequencies = 1.0 / theta**pairs
    return _llama3(frequencies, scaling) if scaling.kind == "llama3" else frequencies


def _ntk_stretch(scaling: RopeScaling, model: ModelConfig, num_positions: int) -> float:
    """Return the factor on theta of dynamic NTK (spec section 3), or of Qwen-1's form.

    Source of the latter: QwenLM/Qwen-7B-Chat, ``modeling_qwen.py``, ``get_ntk_alpha``.
    """
    trained = model.max_position_embeddings
    if num_positions <= trained:
        return 1.0
    stretch = scaling.factor * num_positions / trained - (scaling.factor - 1.0)
    if scaling.kind == "qwen1":
        stretch = 2.0 ** math.ceil(math.log2(num_positions / trained) + 1) - 1
    return float(stretch ** (model.head_dim / (model.head_dim - 2)))


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow long waves down and keep short ones, with a ramp between.

    Source: Llama 3.1's reference code, ``apply_scaling`` in meta-llama/llama-models
    ``models/llama3/reference_impl/model.py``.
    """
    trained = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    ramp = (trained / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = ramp.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
