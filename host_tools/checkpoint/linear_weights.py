"""Weights of one decoder layer under the names that every family shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from device_runtime.package_format import int4
from device_runtime.package_format.model_config import ModelConfig
from host_tools.checkpoint.families import LogicalLinear, QkvLayout

MIN_NORMAL = float(torch.finfo(torch.float16).smallest_normal)
"""A smaller scale counts as zero in the kernels (spec section 2.5)."""


@dataclass(frozen=True)
class DenseLinear:
    """A floating-point linear.

    Attributes:
        weight: ``[out, in]``; may be the mapped file, so it is never written to.
        bias: ``[out]`` or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the weight ``[out, in]`` in ``dtype`` on ``device``."""
        return self.weight.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class QuantizedLinear:
    """A 4-bit linear; the weight of input k and output m is fp16((code - zero) * scale).

    Attributes:
        codes: ``[in, out]`` uint8, 0..15.
        zeros: ``[in // group_size, out]`` uint8, 0..15.
        scales: ``[in // group_size, out]`` fp16.
        group_size: inputs that share a scale and a zero.
        bias: ``[out]`` or None.
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group_size: int
    bias: torch.Tensor | None = None

    @cached_property
    def weight(self) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` fp16, computed once."""
        values = int4.dequantize(
            self.codes.numpy(), self.zeros.numpy(), self.scales.numpy(), self.group_size
        )
        return torch.from_numpy(values).T.contiguous()

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the dequantized weight ``[out, in]`` in ``dtype`` on ``device``."""
        if device.type == "cpu":
            return self.weight.to(dtype)
        return self.computed_on(device).to(dtype)

    def computed_on(self, device: torch.device) -> torch.Tensor:
        """Return :attr:`weight`, bit for bit, computed by torch on ``device``: codes travel."""
        zeros, scales = self.zeros.to(device).float(), self.scales.to(device).float()
        scales = torch.where(scales.abs() < MIN_NORMAL, torch.zeros_like(scales), scales)
        codes = self.codes.to(device).view(len(zeros), self.group_size, -1)
        steps = codes - zeros.unsqueeze(1)
        return (steps * scales.unsqueeze(1)).flatten(0, 1).half().T.contiguous()


Linear = DenseLinear | QuantizedLinear


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: seven linears, two norms, and per-head norms where the family has them.

    Attributes:
        attention_norm: ``[hidden_size]``, before attention; likewise ``ffn_norm`` before the MLP.
        q_norm: ``[head_dim]`` or None; likewise ``k_norm``.
        has_rope: whether queries and keys are rotated.
    """

    attention_norm: torch.Tensor
    ffn_norm: torch.Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    has_rope: bool = True

    def linear(self, name: LogicalLinear) -> Linear:
        """Return a linear by its logical name."""
        linear: Linear = getattr(self, name)
        return linear


def linear_shape(model: ModelConfig, name: LogicalLinear) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear."""
    shapes = {
        "q": (model.q_size, model.hidden_size),
        "k": (model.kv_size, model.hidden_size),
        "v": (model.kv_size, model.hidden_size),
        "o": (model.hidden_size, model.q_size),
        "gate": (model.intermediate_size, model.hidden_size),
        "up": (model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
    }
    return shapes[name]


def split_qkv_rows(
    layout: QkvLayout, rows: torch.Tensor, model: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take a fused qkv apart along its first axis, the outputs.

    Args:
        layout: a fused layout of the family table.
        rows: ``[qkv_size, ...]``.
        model: sizes.

    Returns:
        q ``[q_size, ...]``, k and v ``[kv_size, ...]``.

    Raises:
        ValueError: the layout is not a fused one.
    """
    if layout == "stacked":
        q, k, v = torch.split(rows, [model.q_size, model.kv_size, model.kv_size])
        return q, k, v
    if layout != "grouped":
        raise ValueError(f"qkv layout {layout} is not fused")
    queries = model.num_attention_heads // model.num_kv_heads
    heads = rows.reshape(model.num_kv_heads, queries + 2, model.head_dim, *rows.shape[1:])
    q, k, v = heads[:, :queries], heads[:, queries], heads[:, queries + 1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


def join_qkv_rows(
    layout: QkvLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, model: ModelConfig
) -> torch.Tensor:
    """Fuse q, k and v along their first axis: the inverse of :func:`split_qkv_rows`.

    Raises:
        ValueError: the layout is not a fused one.
    """
    if layout == "stacked":
        return torch.cat((q, k, v))
    if layout != "grouped":
        raise ValueError(f"qkv layout {layout} is not fused")
    queries = model.num_attention_heads // model.num_kv_heads
    parts = (
        q.reshape(model.num_kv_heads, queries, model.head_dim, *q.shape[1:]),
        k.reshape(model.num_kv_heads, 1, model.head_dim, *k.shape[1:]),
        v.reshape(model.num_kv_heads, 1, model.head_dim, *v.shape[1:]),
    )
    return torch.cat(parts, dim=1).flatten(0, 2)
