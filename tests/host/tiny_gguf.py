"""GGUF files of tiny random models, written with the gguf library as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS = 4, 2, 16, 64, 96, 2
VOCAB = 280
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"

SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
}

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_model(kind: str, **settings: object) -> PreTrainedModel:
    """A transformers model with random fp16-valued weights, norms and biases included."""
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config_class, model_class = classes[kind]
    torch.manual_seed(7)
    model = model_class(config_class(**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.3).half().float())
    return model


def byte_tokens() -> list[str]:
    """The 256 letters of byte-level BPE in the order of tokenizers' alphabet of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    table |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in table)}
    return [table[byte] for byte in range(256)]


@dataclass(frozen=True)
class Vocabulary:
    """What goes under ``tokenizer.ggml``."""

    tokens: Sequence[str] = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *byte_tokens(),
        "he",
        "ll",
        "hell",
        "hello",
        "Ġhello",
        "12",
        "ĠĠ",
    )
    types: Sequence[int] = (3, 3, 3, *([1] * 263))
    merges: Sequence[str] = ("h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "Ġ Ġ")
    model: str = "gpt2"
    pre: str | None = "smollm"
    scores: Sequence[float] | None = None
    ids: dict[str, int] = field(
        default_factory=lambda: {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
    )
    flags: dict[str, bool] = field(default_factory=lambda: {"add_bos_token": False})


def permuted(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rows of q or k as llama.cpp's converter orders them (LlamaModel.permute)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    *,
    vocabulary: Vocabulary = Vocabulary(),
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
    metadata: dict[str, object] | None = None,
    tensors: dict[str, NDArray[np.generic] | None] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Write a model; returns what was stored under each GGUF name.

    `metadata` and `tensors` override or add entries; None leaves a tensor out.
    """
    facts: dict[str, object] = {
        "block_count": LAYERS,
        "context_length": SIZES["max_position_embeddings"],
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": SIZES["rms_norm_eps"],
        "rope.freq_base": SIZES["rope_theta"],
        "rope.dimension_count": HEAD_DIM,
    }
    entries = {f"{architecture}.{key}": value for key, value in facts.items()}
    entries |= metadata or {}
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in entries.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    _add_vocabulary(writer, vocabulary)
    stored = _stored_tensors(model, permutes=architecture in ("llama", "internlm2"))
    for name, tensor in (tensors or {}).items():
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    for name, tensor in stored.items():
        if tensor.ndim == 2 and tensor.dtype == np.float32:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _stored_tensors(model: PreTrainedModel, *, permutes: bool) -> dict[str, NDArray[np.generic]]:
    stored: dict[str, NDArray[np.generic]] = {}
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if permutes and ("q_proj" in name or "k_proj" in name):
            array = permuted(array, HEADS if "q_proj" in name else KV_HEADS)
        if name in NAMES:
            stored[NAMES[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        module, end = rest.rsplit(".", 1)
        stored[f"blk.{layer}.{LAYER_NAMES[module]}.{end}"] = array
    return stored


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    for name, token_id in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    for name, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    writer.add_chat_template(CHAT_TEMPLATE)
