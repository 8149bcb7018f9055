"""What a family's table says: names of tensors and config keys over the one decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

QkvLayout = Literal["separate", "grouped", "stacked"]
"""How q, k and v rows lie in the checkpoint.

``separate``: three modules. ``grouped``: one module; per kv head its query heads, then one key
head, then one value head (InternLM2, spec section 1.2). ``stacked``: one module; all of q, then
all of k, then all of v (Qwen-1's c_attn, Baichuan's W_pack).
"""

LogicalLinear = Literal["q", "k", "v", "o", "gate", "up", "down"]
LINEARS: tuple[LogicalLinear, ...] = ("q", "k", "v", "o", "gate", "up", "down")
"""The linears of every decoder layer, in the order in which a layer runs them."""


@dataclass(frozen=True)
class BiasRule:
    """Whether linears of one kind carry a bias: as a config key says, or as the family always does.

    Attributes:
        key: boolean key of config.json; empty when the family never asks.
        default: the answer without the key.
    """

    key: str = ""
    default: bool = False

    def holds(self, config: Mapping[str, object]) -> bool:
        """Tell whether a checkpoint with this config has the bias."""
        return bool(config.get(self.key, self.default)) if self.key else self.default


ALWAYS = BiasRule(default=True)
NEVER = BiasRule()


@dataclass(frozen=True)
class SourceLinear:
    """One linear module of the checkpoint and the logical linears whose rows it stacks."""

    module: str
    parts: tuple[LogicalLinear, ...]


@dataclass(frozen=True)
class Family:
    """Names of one family; everything else is the same decoder.

    Attributes:
        name: as people say it ("internlm2").
        architectures: values of ``architectures`` in config.json that mean this family.
        qkv_layout: how q, k and v are stored.
        qkv: modules of q, k, v; one module when they are fused.
        layers: prefix of the decoder layers, with a dot at the end.
        q_norm: per-head norms of q and k, empty when there are none; likewise ``k_norm``.
        keys: keys of config.json that the family spells in its own way, by Llama's spelling.
        rope_keys: likewise inside ``rope_scaling``.
        rope_factor: what a rope scaling without a factor means, None where it must have one.
        num_mlp_halves: what ``intermediate_size`` counts together: 2 where it is gate and up.
        rope_layers: ``<it>s`` is the key of a list with 0 for each layer without rope; where there
            is none, ``<it>_interval`` says that each so-many-th has none. Empty where all rotate.
        has_window: ``sliding_window`` counts without ``use_sliding_window`` (Mistral).
        has_stretch: ``use_dynamic_ntk`` and ``use_logn_attn`` count (Qwen-1); other models' code
            does not look at them.
        is_tied: what a config without ``tie_word_embeddings`` means.
        has_unit_head: the output projection's rows are divided by their length (Baichuan2).
        template: built-in chat template of the family's chat models, "" where they differ.
        refused: config keys that must be absent, null, false or 0, with what they would mean.
        fixed: config keys that must have one value where they are there, likewise.
        needed: config keys that must be there, with what a checkpoint without them is.
        ignored: last parts of tensor names that hold no weight of ours.
    """

    name: str
    architectures: tuple[str, ...]
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_layout: QkvLayout = "separate"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    q_norm: str = ""
    k_norm: str = ""
    layers: str = "model.layers."
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv_bias: BiasRule = NEVER
    o_bias: BiasRule = NEVER
    keys: Mapping[str, str] = field(default_factory=dict)
    rope_keys: Mapping[str, str] = field(default_factory=dict)
    rope_factor: float | None = None
    num_mlp_halves: int = 1
    rope_layers: str = ""
    has_window: bool = False
    has_stretch: bool = False
    is_tied: bool = False
    has_unit_head: bool = False
    template: str = ""
    refused: Mapping[str, str] = field(default_factory=lambda: {"mlp_bias": "biases in the MLP"})
    fixed: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    needed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("inv_freq", "masked_bias")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head before the rotation."""
        return bool(self.q_norm)

    @property
    def linears(self) -> tuple[SourceLinear, ...]:
        """The linear modules of one layer, in the order in which the layer runs them."""
        if self.qkv_layout == "separate":
            attention = tuple(
                SourceLinear(module, (part,))
                for module, part in zip(self.qkv, LINEARS[:3], strict=True)
            )
        else:
            attention = (SourceLinear(self.qkv[0], ("q", "k", "v")),)
        return (
            *attention,
            SourceLinear(self.o, ("o",)),
            SourceLinear(self.gate, ("gate",)),
            SourceLinear(self.up, ("up",)),
            SourceLinear(self.down, ("down",)),
        )

    def layer_name(self, layer: int) -> str:
        """Return the module path of a decoder layer (``model.layers.3``)."""
        return f"{self.layers}{layer}"

    def module(self, layer: int, module: str) -> str:
        """Return the module path of a part of a layer (``model.layers.3.self_attn.q_proj``)."""
        return f"{self.layer_name(layer)}.{module}"

    def has_bias(self, linear: LogicalLinear, config: Mapping[str, object]) -> bool:
        """Tell whether a checkpoint with this config has a bias on the linear."""
        if linear in ("q", "k", "v"):
            return self.qkv_bias.holds(config)
        return linear == "o" and self.o_bias.holds(config)
