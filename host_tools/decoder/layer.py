"""One decoder layer as pure functions: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from device_runtime.package_format.model_config import ModelConfig
from host_tools.checkpoint.families import LINEARS, LogicalLinear
from host_tools.checkpoint.linear_weights import DenseLinear, LayerWeights
from host_tools.decoder.rotary import Rotary

Block = Literal["attention", "ffn"]
"""A half of a layer: its norm, its linears, and the sum with what entered."""

BLOCKS: tuple[Block, ...] = ("attention", "ffn")


class Observer:
    """Sees what flows through a layer; this base looks at nothing. Tensors must not be changed."""

    def norm(self, name: str, outputs: torch.Tensor) -> None:
        """See ``attention_norm`` or ``ffn_norm`` give ``[batch, tokens, hidden_size]``."""

    def linear(self, name: LogicalLinear, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """See a linear take ``[batch, tokens, in]`` and give ``[batch, tokens, out]``."""

    def keys_values(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See what the cache would hold, both ``[batch, num_kv_heads, tokens, head_dim]``."""

    def cached(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as attention reads them back; here as they are."""
        return keys, values


SILENT = Observer()

HALF_LIMIT = 2.0**15
"""Greatest query, key or value that is taken in fp16."""


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``states * rsqrt(mean(states^2) + eps) * weight`` over the last axis."""
    return functional.rms_norm(states, (states.shape[-1],), weight, eps)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer whose weights lie ready on the device that computes.

    The four ``*_input`` methods give what the linears take; :meth:`forward` is their composition.
    ``hidden`` is the residual stream ``[batch, tokens, hidden_size]`` throughout.

    Attributes:
        weights: dense, all of one dtype.
        model: sizes and facts.
    """

    weights: LayerWeights
    model: ModelConfig

    @classmethod
    def ready(
        cls,
        weights: LayerWeights,
        model: ModelConfig,
        device: torch.device,
        linears: Sequence[LogicalLinear] = LINEARS,
    ) -> DecoderLayer:
        """Bring a layer of a checkpoint to ``device`` in fp32, codes dequantized.

        Args:
            weights: dense or quantized, anywhere.
            model: sizes and facts.
            device: that computes.
            linears: those that will be run; the others stay as they are.
        """

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=torch.float32)

        changes: dict[str, object] = {
            name: moved(getattr(weights, name))
            for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")
        }
        for name in linears:
            linear = weights.linear(name)
            changes[name] = DenseLinear(linear.dense(torch.float32, device), moved(linear.bias))
        return cls(replace(weights, **changes), model)  # type: ignore[arg-type]

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what q, k and v take."""
        return rms_norm(hidden, self.weights.attention_norm, self.model.rms_norm_eps)

    def o_input(
        self, attention_input: torch.Tensor, rotary: Rotary, observer: Observer = SILENT
    ) -> torch.Tensor:
        """Return what o takes, the attention's ``[batch, tokens, q_size]``."""
        weights, model = self.weights, self.model
        queries = self._heads("q", attention_input, model.num_attention_heads, observer)
        keys = self._heads("k", attention_input, model.num_kv_heads, observer)
        values = self._heads("v", attention_input, model.num_kv_heads, observer)
        if weights.q_norm is not None:
            queries = rms_norm(queries, weights.q_norm, model.rms_norm_eps)
        if weights.k_norm is not None:
            keys = rms_norm(keys, weights.k_norm, model.rms_norm_eps)
        if weights.has_rope:
            queries, keys = rotary.rotate(queries), rotary.rotate(keys)
        observer.keys_values(keys, values)
        keys, values = observer.cached(keys, values)
        attend = gpu_attention if queries.is_cuda else plain_attention
        mixed = attend(queries, keys, values)
        return mixed.transpose(1, 2).flatten(2)

    def ffn_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what gate and up take."""
        return rms_norm(hidden, self.weights.ffn_norm, self.model.rms_norm_eps)

    def down_input(self, ffn_input: torch.Tensor, observer: Observer = SILENT) -> torch.Tensor:
        """Return what down takes, ``[batch, tokens, intermediate_size]``."""
        gate = self.linear("gate", ffn_input, observer)
        return functional.silu(gate).mul_(self.linear("up", ffn_input, observer))

    def forward(
        self, hidden: torch.Tensor, rotary: Rotary, observer: Observer = SILENT
    ) -> torch.Tensor:
        """Return the residual stream after this layer, a new tensor."""
        hidden = self.block("attention", hidden, rotary, observer)
        return self.block("ffn", hidden, rotary, observer)

    def block(
        self, block: Block, hidden: torch.Tensor, rotary: Rotary, observer: Observer = SILENT
    ) -> torch.Tensor:
        """Return the residual stream after one half of this layer, a new tensor."""
        if block == "attention":
            normed = self.attention_input(hidden)
            observer.norm("attention_norm", normed)
            mixed = self.o_input(normed, rotary, observer)
            return hidden + self.linear("o", mixed, observer)
        normed = self.ffn_input(hidden)
        observer.norm("ffn_norm", normed)
        inner = self.down_input(normed, observer)
        return hidden + self.linear("down", inner, observer)

    def linear(
        self, name: LogicalLinear, inputs: torch.Tensor, observer: Observer = SILENT
    ) -> torch.Tensor:
        """Return ``inputs`` through one linear."""
        linear = self.weights.linear(name)
        outputs = functional.linear(inputs, linear.weight, linear.bias)
        observer.linear(name, inputs, outputs)
        return outputs

    def _heads(
        self, name: LogicalLinear, inputs: torch.Tensor, num_heads: int, observer: Observer
    ) -> torch.Tensor:
        """Return ``[batch, num_heads, tokens, head_dim]``."""
        outputs = self.linear(name, inputs, observer)
        return outputs.view(*outputs.shape[:2], num_heads, self.model.head_dim).transpose(1, 2)


def plain_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Return causal attention ``[batch, num_attention_heads, tokens, head_dim]``.

    Keys and values have ``num_kv_heads``, which groups of query heads share.
    """
    return functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, enable_gqa=True
    )


def gpu_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Do what :func:`plain_attention` does with the kernels that hold no matrix of scores.

    Where products may be rounded to TF32 (`tensor_cores`) its factors are fp16, which has as many
    bits: the fastest kernel takes no fp32. A model whose values are beyond fp16 keeps fp32.
    """
    if torch.get_float32_matmul_precision() != "highest":
        halves = [part.half() for part in (queries, keys, values)]
        ends = torch.stack([end for half in halves for end in torch.aminmax(half)])
        if float(ends.abs().amax()) < HALF_LIMIT:
            return plain_attention(*halves).float()
        del halves
    # The fp32 kernel knows no shared heads.
    num_shared = queries.shape[1] // keys.shape[1]
    keys, values = (heads.repeat_interleave(num_shared, dim=1) for heads in (keys, values))
    return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
