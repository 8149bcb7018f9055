"""Random tiny checkpoints in the layouts of their families, made in the test that needs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from device_runtime.package_format import int4

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}


def llama_tensors(config: dict, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict:
    """Tensors of a Llama-like checkpoint; norms near 1, weights small, all seeded."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim

    def random(*shape: int, scale: float = 0.08, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale + mean).to(dtype)

    tensors = {
        "model.embed_tokens.weight": random(config["vocab_size"], hidden, scale=1.0),
        "model.norm.weight": random(hidden, scale=0.1, mean=1.0),
    }
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = random(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, outputs, inputs in (
            ("self_attn.q_proj", q_size, hidden),
            ("self_attn.k_proj", kv_size, hidden),
            ("self_attn.v_proj", kv_size, hidden),
            ("self_attn.o_proj", hidden, q_size),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"{prefix}.{name}.weight"] = random(outputs, inputs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = random(hidden, scale=0.1, mean=1.0)
    return tensors


def add_biases(tensors: dict, modules: tuple[str, ...], seed: int = 1) -> None:
    """Give the named linears of every layer a random bias."""
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        if name.split(".")[-2] in modules:
            rows = tensors[name].shape[0]
            bias = torch.randn(rows, generator=generator) * 0.1
            tensors[name.replace(".weight", ".bias")] = bias.to(tensors[name].dtype)


def write_checkpoint(folder: Path, config: dict, tensors: dict) -> Path:
    """Write config.json and one model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_llama(folder: Path, *, seed: int = 0, dtype=torch.float16, **changes: object) -> Path:
    """Write a whole tiny Llama checkpoint; ``changes`` go into config.json."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **changes}
    return write_checkpoint(folder, config, llama_tensors(config, dtype=dtype, seed=seed))


def write_shards(folder: Path, tensors: dict, num_shards: int) -> None:
    """Replace model.safetensors by shards and their index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantize_tensors(tensors: dict, group_size: int, *, scales_dtype=torch.float16) -> dict:
    """Replace every linear's weight by plain round-to-nearest AWQ gemm tensors."""
    quantized = {}
    for name, value in tensors.items():
        if "_proj.weight" not in name:
            quantized[name] = value
            continue
        weight = value.float().T.reshape(value.shape[1] // group_size, group_size, -1)
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        steps = (weight / scales.float()[:, None]).round() + zeros[:, None]
        codes = steps.clamp(0, 15).reshape(value.shape[1], -1)
        module = name.removesuffix(".weight")
        quantized[f"{module}.qweight"] = awq_words(codes.numpy())
        quantized[f"{module}.qzeros"] = awq_words(zeros.numpy())
        quantized[f"{module}.scales"] = scales.to(scales_dtype)
    return quantized


def awq_words(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(int4.pack_awq(codes.astype(np.uint8)))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose words w0 to w127 are the ids 0 to 127."""
    vocab = {f"w{token_id}": token_id for token_id in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_text(path: Path, num_words: int = 400, seed: int = 5) -> Path:
    """Write random words of that tokenizer."""
    words = np.random.default_rng(seed).integers(0, 128, num_words)
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


def read_tensors(folder: Path) -> dict:
    """All tensors of a folder's safetensors files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors
