"""The architecture of one model, as both halves see it: complete, or it does not exist."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from device_runtime.errors import PackageError
from device_runtime.package_format import names

WeightType = Literal["int4", "fp16", "bf16"]
HeadType = Literal["fp16", "int8"]
RopeKind = Literal["none", "linear", "dynamic", "llama3", "qwen1"]

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
_LINEAR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z0-9_.]{1,40})")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles stretch beyond the trained context.

    ``dynamic`` is the NTK form of spec section 3 (``rope_scaling_factor``); ``llama3`` is the
    piecewise form of Llama 3.1's config.json and uses all four numbers; ``qwen1`` is Qwen-1's own
    NTK form (``use_dynamic_ntk``) and uses none.
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
    the files on disk are split for. ``fp16_linears`` names linears of an int4 model that are stored
    in fp16 all the same, ``layers.3.attention.w_qkv``, in the order of layers and of
    `names.LAYER_LINEARS`. ``layers_without_rope`` are the numbers of layers that do not rotate
    queries and keys (SmolLM3), in order. ``sliding_window`` is how many tokens layers look back,
    0 for all; no engine here runs a sequence longer than it.
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
    fp16_linears: tuple[str, ...] = ()
    layers_without_rope: tuple[int, ...] = ()
    sliding_window: int = 0

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
        self._check_fp16_linears()
        self._check_layers_without_rope()
        if not 0 <= self.sliding_window <= _MOST["max_position_embeddings"]:
            raise PackageError(
                f"sliding_window is {self.sliding_window}, expected 0 to "
                f"{_MOST['max_position_embeddings']}"
            )

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest sequence that the model was made for and that runs here."""
        trained = self.max_position_embeddings
        return min(trained, self.sliding_window or trained)

    @property
    def is_mixed(self) -> bool:
        """Whether some linears are int4 and some fp16, which LMDeploy does not run."""
        return bool(self.fp16_linears)

    def is_quantized(self, layer: int, module: str) -> bool:
        """Tell whether a linear is stored as int4.

        Args:
            layer: its number.
            module: one of `names.LAYER_LINEARS`; w13 stands for w1 and w3.
        """
        if self.weight_type != "int4":
            return False
        return names.layer_linear(layer, module) not in self._fp16_names

    @cached_property
    def _fp16_names(self) -> frozenset[str]:
        return frozenset(self.fp16_linears)

    def _check_fp16_linears(self) -> None:
        if not self.fp16_linears:
            return
        if self.weight_type != "int4":
            raise PackageError(
                f"fp16_linears has {len(self.fp16_linears)} names in a model of weight_type "
                f"{self.weight_type}, expected none"
            )
        places = [self._place(name) for name in self.fp16_linears]
        if any(first >= second for first, second in pairwise(places)):
            raise PackageError("fp16_linears is not in the order of layers and linears")
        if len(places) == self.num_hidden_layers * len(names.LAYER_LINEARS):
            raise PackageError("fp16_linears names every linear, such a model has weight_type fp16")

    def _check_layers_without_rope(self) -> None:
        layers = self.layers_without_rope
        is_ordered = all(first < second for first, second in pairwise(layers))
        if not is_ordered or (layers and not 0 <= layers[0] <= layers[-1] < self.num_hidden_layers):
            raise PackageError(
                f"layers_without_rope has {len(layers)} numbers, expected different ones in order, "
                f"from 0 to {self.num_hidden_layers - 1}"
            )

    def _place(self, name: str) -> tuple[int, int]:
        match = _LINEAR_NAME.fullmatch(name)
        if match is None or match[2] not in names.LAYER_LINEARS:
            raise PackageError(
                f"fp16_linears has {name[:60]!a}, expected layers.N. and one of "
                f"{', '.join(names.LAYER_LINEARS)}"
            )
        if int(match[1]) >= self.num_hidden_layers:
            raise PackageError(
                f"fp16_linears has {name!a}, the model has {self.num_hidden_layers} layers"
            )
        return int(match[1]), names.LAYER_LINEARS.index(match[2])

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
