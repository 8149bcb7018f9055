"""What the repository of each family holds: config.json as published, shards, tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import remote_models
import torch
from family_tokenizers import (
    CHATML_MARKERS,
    LLAMA3_MARKERS,
    byte_level,
    write_baichuan2,
    write_internlm,
    write_internlm2,
    write_llama2,
    write_qwen_ranks,
)

VOCAB = 320
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 320, 4, 2, 64, 2
CONTEXT = 64
LLAMA_SIZES = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": CONTEXT,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
    "vocab_size": VOCAB,
}
GQA = {**LLAMA_SIZES, "num_key_value_heads": KV_HEADS}
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}


@dataclass(frozen=True)
class FamilyCase:
    """One family: what its repository holds.

    Attributes:
        config: config.json with the published keys.
        reference: class of a plain module, or None for what transformers has.
        shards: of the weights; their names and index are the published ones.
        is_pickled: ``pytorch_model*.bin`` instead of safetensors.
        dtype: of the weights.
        write_tokenizer: writes the files of its tokenizer.
        extra: names of layer tensors that older repositories carry and nobody needs.
        num_tokens: of the comparison.
    """

    config: dict
    reference: type | None = None
    shards: int = 2
    is_pickled: bool = False
    dtype: torch.dtype = torch.bfloat16
    write_tokenizer: Callable[[Path], None] = byte_level
    extra: tuple[str, ...] = ()
    num_tokens: int = 48

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding; SmolLM3's config need not say so."""
        return bool(self.config.get("tie_word_embeddings", True))


CASES: dict[str, FamilyCase] = {
    "internlm-chat-7b": FamilyCase(
        config={
            **LLAMA_SIZES,
            "architectures": ["InternLMForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "model_type": "internlm",
            "pad_token_id": 2,
            "rotary": {"base": 10000, "type": "dynamic"},
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "max_position_embeddings": 32,
        },
        reference=remote_models.InternLM,
        is_pickled=True,
        dtype=torch.float16,
        write_tokenizer=write_internlm,
        extra=("self_attn.rotary_emb.inv_freq",),
    ),
    "internlm-chat-20b": FamilyCase(
        config={
            **LLAMA_SIZES,
            "architectures": ["InternLMForCausalLM"],
            "bias": False,
            "model_type": "internlm",
            "num_hidden_layers": 3,
            "rotary": {"base": 10000, "type": "origin"},
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        reference=remote_models.InternLM,
        is_pickled=True,
        dtype=torch.float16,
        write_tokenizer=write_internlm,
    ),
    "internlm2-chat-7b": FamilyCase(
        config={
            **GQA,
            "architectures": ["InternLM2ForCausalLM"],
            "attn_implementation": "eager",
            "bias": False,
            "model_type": "internlm2",
            "rope_scaling": None,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        reference=remote_models.InternLM2,
        write_tokenizer=write_internlm2,
    ),
    "internlm2_5-7b-chat": FamilyCase(
        config={
            **GQA,
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "max_position_embeddings": 32,
            "model_type": "internlm2",
            "pretraining_tp": 1,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        reference=remote_models.InternLM2,
        write_tokenizer=write_internlm2,
    ),
    "internlm3-8b-instruct": FamilyCase(
        config={
            **LLAMA_SIZES,
            "architectures": ["InternLM3ForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
            "bias": False,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 32,
            "model_type": "internlm3",
            # As many query heads share a kv head as in the 8B model: 32 on 2.
            "num_attention_heads": 16,
            "num_key_value_heads": 1,
            "qkv_bias": False,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        write_tokenizer=write_internlm2,
    ),
    "llama-2-7b-chat": FamilyCase(
        config={
            **LLAMA_SIZES,
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "model_type": "llama",
            "num_key_value_heads": HEADS,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        dtype=torch.float16,
        write_tokenizer=write_llama2,
        extra=("self_attn.rotary_emb.inv_freq",),
    ),
    "llama-3-8b-instruct": FamilyCase(
        config={
            **GQA,
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "model_type": "llama",
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        write_tokenizer=partial(byte_level, special=LLAMA3_MARKERS),
    ),
    "llama-3.2-1b-instruct": FamilyCase(
        config={
            **GQA,
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": HEAD_DIM,
            "mlp_bias": False,
            "model_type": "llama",
            "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        shards=1,
        write_tokenizer=partial(byte_level, special=LLAMA3_MARKERS),
    ),
    "qwen-7b-chat": FamilyCase(
        config={
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
            "attn_dropout_prob": 0.0,
            "bf16": False,
            "emb_dropout_prob": 0.0,
            "fp16": False,
            "fp32": False,
            "hidden_size": HIDDEN,
            "initializer_range": 0.02,
            "intermediate_size": 2 * INNER,
            "kv_channels": HEAD_DIM,
            "layer_norm_epsilon": 1e-06,
            "max_position_embeddings": 256,
            "model_type": "qwen",
            "no_bias": True,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "onnx_safe": None,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "seq_length": 32,
            "tie_word_embeddings": False,
            "tokenizer_class": "QWenTokenizer",
            "use_cache": True,
            "use_dynamic_ntk": True,
            "use_flash_attn": "auto",
            "use_logn_attn": True,
            "vocab_size": 512,
        },
        reference=remote_models.Qwen,
        write_tokenizer=write_qwen_ranks,
        num_tokens=70,
    ),
    "qwen1.5-1.8b-chat": FamilyCase(
        config={
            **LLAMA_SIZES,
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_key_value_heads": HEADS,
            "rope_theta": 1000000.0,
            "sliding_window": 16,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
        },
        shards=1,
        write_tokenizer=partial(byte_level, special=CHATML_MARKERS),
    ),
    "qwen2.5-0.5b-instruct": FamilyCase(
        config={
            **GQA,
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
        },
        shards=1,
        write_tokenizer=partial(byte_level, special=CHATML_MARKERS),
    ),
    "qwen3-0.6b": FamilyCase(
        config={
            **GQA,
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
        },
        write_tokenizer=partial(byte_level, special=CHATML_MARKERS),
    ),
    "mistral-7b-instruct-v0.1": FamilyCase(
        config={
            **GQA,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "rope_theta": 10000.0,
            "sliding_window": 48,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        write_tokenizer=write_llama2,
        num_tokens=40,
    ),
    "mistral-7b-instruct-v0.3": FamilyCase(
        config={
            **GQA,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        shards=3,
    ),
    "baichuan-7b": FamilyCase(
        config={
            **LLAMA_SIZES,
            "architectures": ["BaiChuanForCausalLM"],
            "model_type": "baichuan",
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        reference=remote_models.Baichuan,
        shards=1,
        is_pickled=True,
        dtype=torch.float16,
        write_tokenizer=write_llama2,
    ),
    "baichuan2-7b-chat": FamilyCase(
        config={
            **LLAMA_SIZES,
            "_from_model_config": True,
            "architectures": ["BaichuanForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "model_max_length": CONTEXT,
            "model_type": "baichuan",
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "tokenizer_class": "BaichuanTokenizer",
            "torch_dtype": "bfloat16",
        },
        reference=remote_models.Baichuan2,
        shards=1,
        is_pickled=True,
        write_tokenizer=write_baichuan2,
        extra=("self_attn.rotary_emb.inv_freq",),
    ),
    "smollm2-1.7b-instruct": FamilyCase(
        config={
            **LLAMA_SIZES,
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
            "model_type": "llama",
            "num_key_value_heads": HEADS,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 130000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        shards=1,
        write_tokenizer=partial(byte_level, special=CHATML_MARKERS),
    ),
    "smollm3-3b": FamilyCase(
        config={
            **GQA,
            "architectures": ["SmolLM3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "layer_types": ["full_attention"] * 5,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0, 1],
            "num_hidden_layers": 5,
            "pad_token_id": 1,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
        },
        write_tokenizer=partial(byte_level, special=CHATML_MARKERS),
    ),
}
