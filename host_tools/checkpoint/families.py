"""What each family of checkpoints calls its tensors and config keys: tables over one decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from device_runtime.errors import PackageError

QkvLayout = Literal["separate", "grouped"]
"""How q, k and v rows lie in the checkpoint.

``separate``: three modules. ``grouped``: one module; per kv head its query heads, then one key
head, then one value head (InternLM2, spec section 1.2).
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
        refused: config keys that must be absent, null or false, with what they would mean.
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
    refused: Mapping[str, str] = field(default_factory=lambda: {"mlp_bias": "biases in the MLP"})
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


_ATTENTION_BIAS = BiasRule("attention_bias")

FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
    ),
    Family(name="mistral", architectures=("MistralForCausalLM",)),
    Family(
        name="internlm",
        architectures=("InternLMForCausalLM",),
        qkv_bias=BiasRule("bias", default=True),
        o_bias=BiasRule("bias", default=True),
    ),
    Family(
        name="internlm2",
        architectures=("InternLM2ForCausalLM",),
        qkv=("attention.wqkv",),
        qkv_layout="grouped",
        o="attention.wo",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
        attention_norm="attention_norm",
        ffn_norm="ffn_norm",
        embedding="model.tok_embeddings",
        head="output",
        qkv_bias=BiasRule("bias", default=True),
        o_bias=BiasRule("bias", default=True),
    ),
    Family(name="qwen2", architectures=("Qwen2ForCausalLM",), qkv_bias=ALWAYS),
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
    ),
)


def find_family(architecture: str) -> Family:
    """Return the table of an architecture of config.json.

    Raises:
        PackageError: no table covers it.
    """
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise PackageError(
        f"architecture {architecture[:80]!r} is not one that turbojet runs; it runs {known}"
    )
