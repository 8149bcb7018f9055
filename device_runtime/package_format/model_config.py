"""The architecture of one model, as both halves see it: complete, or it does not exist."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from device_runtime.errors import PackageError

WeightType = Literal["int4", "fp16", "bf16"]
HeadType = Literal["fp16", "int8"]
RopeKind = Literal["none", "linear", "dynamic", "llama3"]

# Beyond any model there is; they keep a hostile config from making us count for hours.
_MOST = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "tensor_para_size": 64,
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles stretch beyond the trained context.

    ``dynamic`` is the NTK form of spec section 3 (``rope_scaling_factor``); ``llama3`` is the
    piecewise form of Llama 3.1's config.json and uses all four numbers.
    """

    kind: RopeKind = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        """Check what the arithmetic divides by.

        Raises:
            PackageError: a factor is not above 0, or llama3 lacks its own numbers.
        """
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise PackageError(f"rope scaling {name} is {value}, expected above 0")
        if self.kind == "llama3":
            if self.low_freq_factor >= self.high_freq_factor:
                raise PackageError(
                    f"rope scaling low_freq_factor {self.low_freq_factor} is not below "
                    f"high_freq_factor {self.high_freq_factor}"
                )
            if self.original_max_position_embeddings < 1:
                raise PackageError(
                    "rope scaling llama3 has original_max_position_embeddings "
                    f"{self.original_max_position_embeddings}, expected at least 1"
                )


@dataclass(frozen=True)
class ModelConfig:
    """Facts of a decoder-only transformer with RMSNorm, RoPE, GQA and SwiGLU.

    ``group_size`` is 0 for weights that are not int4. ``tensor_para_size`` is the number of ranks
    the files on disk are split for.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    weight_type: WeightType
    group_size: int
    rope_scaling: RopeScaling = RopeScaling()
    has_attention_bias: bool = False
    has_qk_norm: bool = False
    tie_word_embeddings: bool = False
    head_type: HeadType = "fp16"
    use_logn_attn: bool = False
    tensor_para_size: int = 1

    def __post_init__(self) -> None:
        """Check what every layout relies on.

        Raises:
            PackageError: a size is not positive, or two sizes do not divide as they must.
        """
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise PackageError(f"{name} is {getattr(self, name)}, expected 1 to {most}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise PackageError(f"{name} is {value}, expected a finite number above 0")
        if self.group_size < 0:
            raise PackageError(f"group_size is {self.group_size}, expected 0 or more")
        if self.head_dim % 2:
            raise PackageError(f"head_dim {self.head_dim} is odd, rotary pairs need an even one")
        if self.num_attention_heads % self.num_kv_heads:
            raise PackageError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )
        if self.num_kv_heads % self.tensor_para_size:
            raise PackageError(
                f"num_kv_heads {self.num_kv_heads} is not a multiple of "
                f"tensor_para_size {self.tensor_para_size}"
            )
        if (self.group_size > 0) != (self.weight_type == "int4"):
            raise PackageError(
                f"group_size {self.group_size} does not go with weight_type {self.weight_type}"
            )
        if self.group_size:
            for name, inputs in (
                ("hidden_size", self.hidden_size),
                ("attention outputs", self.q_size // self.tensor_para_size),
                ("intermediate_size", self.intermediate_size // self.tensor_para_size),
            ):
                if inputs % self.group_size:
                    raise PackageError(
                        f"{name} {inputs} is not a multiple of group_size {self.group_size}"
                    )

    @property
    def q_size(self) -> int:
        """Columns of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Columns of the fused w_qkv, all ranks together."""
        return self.q_size + 2 * self.kv_size
