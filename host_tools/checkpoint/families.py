"""The families of checkpoints that turbojet runs, one small table each."""

from __future__ import annotations

from device_runtime.errors import PackageError
from host_tools.checkpoint.family import (
    ALWAYS,
    LINEARS,
    BiasRule,
    Family,
    LogicalLinear,
    QkvLayout,
    SourceLinear,
)

__all__ = [
    "FAMILIES",
    "LINEARS",
    "QWEN1",
    "Family",
    "LogicalLinear",
    "QkvLayout",
    "SourceLinear",
    "find_family",
]

QWEN1 = "qwen"
"""The family whose float weights LMDeploy writes as bf16 whatever its config says."""

_ATTENTION_BIAS = BiasRule("attention_bias")
_INTERNLM_BIAS = BiasRule("bias", default=True)

FAMILIES: tuple[Family, ...] = (
    # Llama 1 to 3.3, SmolLM2, and what saves itself as one of them.
    Family(
        name="llama",
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
    ),
    Family(
        name="mistral",
        architectures=("MistralForCausalLM",),
        has_window=True,
        template="mistral-instruct",
    ),
    Family(
        name="smollm3",
        architectures=("SmolLM3ForCausalLM",),
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        rope_layers="no_rope_layer",
        is_tied=True,
        template="smollm3",
    ),
    Family(
        name="internlm",
        architectures=("InternLMForCausalLM",),
        qkv_bias=_INTERNLM_BIAS,
        o_bias=_INTERNLM_BIAS,
        keys={"rope_scaling": "rotary"},
        rope_keys={"rope_theta": "base", "factor": "scaling_factor"},
        rope_factor=1.0,
        template="internlm-chat-7b",
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
        qkv_bias=_INTERNLM_BIAS,
        o_bias=_INTERNLM_BIAS,
        template="internlm2-chat",
    ),
    Family(
        name="internlm3",
        architectures=("InternLM3ForCausalLM",),
        qkv_bias=BiasRule("qkv_bias"),
        # In InternLM3's own code ``bias`` is on the output projection and on the MLP.
        refused={"bias": "biases in the MLP", "mlp_bias": "biases in the MLP"},
        template="internlm2-chat",
    ),
    # Qwen 1; intermediate_size counts w1 (up) and w2 (gate) together.
    Family(
        name=QWEN1,
        architectures=("QWenLMHeadModel",),
        qkv=("attn.c_attn",),
        qkv_layout="stacked",
        o="attn.c_proj",
        gate="mlp.w2",
        up="mlp.w1",
        down="mlp.c_proj",
        attention_norm="ln_1",
        ffn_norm="ln_2",
        layers="transformer.h.",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        qkv_bias=ALWAYS,
        keys={
            "rms_norm_eps": "layer_norm_epsilon",
            "rope_theta": "rotary_emb_base",
            "max_position_embeddings": "seq_length",
            "head_dim": "kv_channels",
        },
        num_mlp_halves=2,
        has_stretch=True,
        template="qwen-7b",
        refused={"visual": "pictures"},
        fixed={
            "no_bias": (True, "biases of all linears"),
            "rotary_pct": (1.0, "partial rotary embeddings"),
            "scale_attn_weights": (True, "attention scores that are not scaled"),
        },
    ),
    # Qwen 1.5, 2 and 2.5.
    Family(name="qwen2", architectures=("Qwen2ForCausalLM",), qkv_bias=ALWAYS, template="qwen2d5"),
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        template="qwen3",
    ),
    # Baichuan-7B writes a capital C; the 13B models write a small one, and so does Baichuan2-7B.
    Family(
        name="baichuan",
        architectures=("BaiChuanForCausalLM",),
        qkv=("self_attn.W_pack",),
        qkv_layout="stacked",
    ),
    Family(
        name="baichuan2",
        architectures=("BaichuanForCausalLM",),
        qkv=("self_attn.W_pack",),
        qkv_layout="stacked",
        has_unit_head=True,
        template="baichuan2-7b",
        needed={"max_position_embeddings": "a Baichuan-13B, whose positions are ALiBi"},
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
    if "moe" in architecture.lower() or "mixtral" in architecture.lower():
        raise PackageError(
            f"{architecture[:80]} is a mixture of experts, turbojet runs dense models alone"
        )
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise PackageError(
        f"architecture {architecture[:80]!r} is not one that turbojet runs; it runs {known}"
    )
