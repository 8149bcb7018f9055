"""Random tiny packages for tests, and their weights for an independent oracle.

`make_package(folder, model)` writes a complete package that opens, installs and generates; what it
says makes no sense. It returns the same weights as plain matrices in Hugging Face's order, so a
test can compute what the engine should.

    made = make_package(tmp_path / "tiny")
    engine = Engine.open(made.root)
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from device_runtime.package_format import bfloat16, fusion, int4, names, rotary
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.manifest import (
    Manifest,
    Provenance,
    Quantization,
    TemplateChoice,
    TokenizerFacts,
    write_manifest,
)
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import hash_files, list_files
from device_runtime.package_format.workspace import WorkspaceWriter

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2; the 256 bytes follow, then words of two letters up to the vocabulary's size."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_KV_SCALE = KvScale(1 / 32, 0.0, 1 / 32, 0.0)


@dataclass(frozen=True)
class LayerWeights:
    """One layer as Hugging Face has it: matrices ``[out, in]`` fp32, q and k in halves order."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    q_bias: np.ndarray
    k_bias: np.ndarray
    v_bias: np.ndarray
    o_bias: np.ndarray
    attention_norm: np.ndarray
    ffn_norm: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray


@dataclass(frozen=True)
class TinyPackage:
    """What was written: folder, manifest facts and the exact values of every weight."""

    root: Path
    model: ModelConfig
    embedding: np.ndarray
    layers: tuple[LayerWeights, ...]
    norm: np.ndarray
    head: np.ndarray


def tiny_model(**changes: object) -> ModelConfig:
    """Return a W4 model of two layers, four query heads on two, head_dim 32, 320 tokens."""
    model = ModelConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=320,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=512,
        weight_type="int4",
        group_size=32,
    )
    return dataclasses.replace(model, **changes)


def make_package(
    root: Path,
    model: ModelConfig | None = None,
    *,
    seed: int = 0,
    name: str = "tiny",
    template: TemplateChoice | None = None,
    kv_scale: KvScale | None = None,
    is_sealed: bool = False,
    has_manifest: bool = True,
    **config: object,
) -> TinyPackage:
    """Write a package of random weights.

    Args:
        root: folder to make.
        model: architecture; `tiny_model()` when None.
        seed: of the weights.
        name: of the package.
        template: chat template; ChatML in jinja when None.
        kv_scale: static int8 KV parameters of every layer, or None for none.
        is_sealed: list every file with its hash, as packing does.
        has_manifest: False writes a plain LMDeploy workspace.
        config: keys of config.ini to set, such as ``session_len=256``, ``quant_policy=8``.
    """
    model = model or tiny_model()
    rng = np.random.default_rng(seed)
    writer = WorkspaceWriter(root, model)
    table = (model.vocab_size, model.hidden_size)
    embedding = _write(writer, names.TOK_EMBEDDINGS, _padded(rng.standard_normal(table), model))
    norm = _write(writer, names.FINAL_NORM, 1 + 0.1 * rng.standard_normal(model.hidden_size))
    head = embedding
    if model.head_type == "int8":
        head = _write_int8_head(writer, model, rng)
    elif not model.tie_word_embeddings:
        values = rng.standard_normal(table) / np.sqrt(model.hidden_size) * 3
        head = _write(writer, names.OUTPUT, _padded(values, model))
    layers = tuple(
        _write_layer(writer, model, layer, rng) for layer in range(model.num_hidden_layers)
    )
    for layer in range(model.num_hidden_layers if kv_scale else 0):
        for rank in range(model.tensor_para_size):
            writer.write_kv_scale(layer, rank, kv_scale)
    settings = TurboMindConfig.from_model(
        model, model_name=name, start_id=0, end_id=2, session_len=model.max_position_embeddings
    )
    defaults = {"max_batch_size": 4, "cache_block_seq_len": 64, "cache_max_entry_count": 32.0}
    writer.write_config(dataclasses.replace(settings, **(defaults | config)))
    write_tokenizer(root / names.TOKENIZER_DIR, model.vocab_size)
    writer.finish()
    if has_manifest:
        files = hash_files(root, list_files(root)) if is_sealed else ()
        choice = template or TemplateChoice("jinja", names.TOKENIZER_CONFIG, CHATML)
        has_scales = "none" if kv_scale is None else "asymmetric"
        write_manifest(
            root,
            Manifest(
                name=name,
                model=model,
                quantization=Quantization(
                    "rtn" if model.group_size else "none",
                    4 if model.group_size else 16,
                    model.group_size,
                    has_scales,
                ),
                template=choice,
                tokenizer=TokenizerFacts(0, add_bos=False, eos_ids=(2,), stop_ids=()),
                provenance=Provenance("random weights", "synthetic"),
                files=files,
            ),
        )
    return TinyPackage(
        root, model, embedding[: model.vocab_size], layers, norm, head[: model.vocab_size]
    )


def write_tokenizer(folder: Path, vocab_size: int = 320) -> None:
    """Write a byte-level tokenizer.json with ChatML markers, and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [first + second for first in letters for second in letters]
    tokens = [*SPECIAL, *alphabet, *words][:vocab_size]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(word[0], word[1]) for word in words if word in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / names.TOKENIZER_JSON))
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "chat_template": CHATML}
    (folder / names.TOKENIZER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")


def _padded(values: np.ndarray, model: ModelConfig) -> np.ndarray:
    rows = -(-values.shape[0] // model.tensor_para_size) * model.tensor_para_size
    return np.concatenate([values, np.zeros((rows - values.shape[0], values.shape[1]))])


def _write(writer: WorkspaceWriter, name: str, values: np.ndarray) -> np.ndarray:
    """Write a float tensor in the package's type; return what it rounds to."""
    stored, value = _round(values, writer.model)
    writer.write(name, stored)
    return value


def _round(values: np.ndarray, model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    if model.weight_type == "bf16":
        bits = bfloat16.from_float32(values.astype(np.float32))
        return bits, bfloat16.to_float32(bits)
    half = values.astype(np.float16)
    return half, half.astype(np.float32)


def _write_int8_head(
    writer: WorkspaceWriter, model: ModelConfig, rng: np.random.Generator
) -> np.ndarray:
    rows = -(-model.vocab_size // model.tensor_para_size) * model.tensor_para_size
    codes = rng.integers(-127, 128, (rows, model.hidden_size), np.int8)
    scales = (rng.uniform(0.5, 1.5, rows) * 3 / 73 / np.sqrt(model.hidden_size)).astype(np.float16)
    writer.write(names.OUTPUT_QWEIGHT, codes)
    writer.write(names.OUTPUT_SCALES, scales)
    return codes.astype(np.float32) * scales.astype(np.float32)[:, None]


def _write_layer(
    writer: WorkspaceWriter, model: ModelConfig, layer: int, rng: np.random.Generator
) -> LayerWeights:
    """Write one layer and return it unfused, q and k back in halves order."""
    hidden, inner, dim = model.hidden_size, model.intermediate_size, model.head_dim
    sizes = {
        names.W_QKV: {
            "q": (hidden, model.q_size),
            "k": (hidden, model.kv_size),
            "v": (hidden, model.kv_size),
        },
        names.WO: {"o": (model.q_size, hidden)},
        names.W13: {"gate": (hidden, inner), "up": (hidden, inner)},
        names.W2: {"down": (inner, hidden)},
    }
    linears = {
        key: _Linear.random(rng, model, *size, is_quantized=model.is_quantized(layer, module))
        for module, parts in sizes.items()
        for key, size in parts.items()
    }
    for module, parts in sizes.items():
        _write_linear(writer, layer, module, [linears[key] for key in parts])
    values = {key: linear.values.T for key, linear in linears.items()}
    norms = {
        key: _write(
            writer,
            names.layer_tensor(layer, module, None, names.WEIGHT),
            1 + 0.1 * rng.standard_normal(hidden),
        )
        for key, module in (("attention_norm", names.ATTENTION_NORM), ("ffn_norm", names.FFN_NORM))
    }
    q_norm, k_norm = np.ones(dim), np.ones(dim)
    if model.has_qk_norm:
        q_norm, k_norm = (1 + 0.3 * rng.standard_normal(dim) for _ in range(2))
        for module, norm in ((names.Q_NORM, q_norm), (names.K_NORM, k_norm)):
            name = names.layer_tensor(layer, module, None, names.WEIGHT)
            writer.write(name, _round(rotary.to_pairs(norm, dim), model)[0])
    return LayerWeights(
        **values,
        **_write_biases(writer, layer, rng),
        **norms,
        q_norm=_round(q_norm, model)[1],
        k_norm=_round(k_norm, model)[1],
    )


def _write_biases(
    writer: WorkspaceWriter, layer: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    model = writer.model
    sizes = {"q": model.q_size, "k": model.kv_size, "v": model.kv_size, "o": model.hidden_size}
    biases = {key: np.zeros(size) for key, size in sizes.items()}
    if model.has_attention_bias:
        biases = {key: 0.2 * rng.standard_normal(size) for key, size in sizes.items()}
        ranks = model.tensor_para_size
        q, k = (rotary.to_pairs(biases[key], model.head_dim) for key in "qk")
        for rank, fused in enumerate(fusion.fuse_qkv(q, k, biases["v"], ranks)):
            name = names.layer_tensor(layer, names.W_QKV, rank, names.BIAS)
            writer.write(name, _round(fused, model)[0])
            name = names.layer_tensor(layer, names.WO, rank, names.BIAS)
            writer.write(name, _round(biases["o"], model)[0])
    return {f"{key}_bias": _round(bias, model)[1] for key, bias in biases.items()}


@dataclass(frozen=True)
class _Linear:
    """One ``[in, out]`` matrix: its stored parts, each ``[rows, out]``, and its fp32 values."""

    parts: tuple[np.ndarray, ...]
    values: np.ndarray

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        model: ModelConfig,
        inputs: int,
        outputs: int,
        *,
        is_quantized: bool,
    ) -> _Linear:
        if not is_quantized:
            weights = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
            stored, values = _round(weights, model)
            return cls((stored,), values)
        groups = inputs // model.group_size
        codes = rng.integers(0, 16, (inputs, outputs), np.uint8)
        zeros = rng.integers(5, 11, (groups, outputs), np.uint8)
        scales = (rng.uniform(0.1, 0.3, (groups, outputs)) / np.sqrt(inputs)).astype(np.float16)
        values = int4.dequantize(codes, zeros, scales, model.group_size).astype(np.float32)
        return cls((codes, zeros, scales), values)


def _write_linear(writer: WorkspaceWriter, layer: int, module: str, linears: list[_Linear]) -> None:
    """Fuse, split over ranks and pack the parts of one fused linear, as `convert` does."""
    model = writer.model
    ranks = model.tensor_para_size
    is_quantized = model.is_quantized(layer, module)
    files: dict[str, list[list[np.ndarray]]] = {}

    def add(name: str, per_rank: list[np.ndarray]) -> None:
        files.setdefault(name, [[] for _ in range(ranks)])
        for rank, array in enumerate(per_rank):
            files[name][rank].append(np.ascontiguousarray(array))

    for parts in zip(*(linear.parts for linear in linears), strict=True):
        if module == names.W_QKV:
            q, k = (rotary.to_pairs(part, model.head_dim) for part in parts[:2])
            add(module, fusion.fuse_qkv(q, k, parts[2], ranks))
        elif module == names.W13 and is_quantized:
            add(module, fusion.split_columns(fusion.fuse_w13(*parts), ranks))
        elif module == names.W13:
            for name, part in zip((names.W1, names.W3), parts, strict=True):
                add(name, fusion.split_columns(part, ranks))
        else:
            add(module, fusion.split_rows(parts[0], ranks))
    for name, per_rank in files.items():
        for rank, arrays in enumerate(per_rank):
            if not is_quantized:
                writer.write(names.layer_tensor(layer, name, rank, names.WEIGHT), arrays[0])
                continue
            codes, zeros, scales = arrays
            words, pairs = int4.pack_words(codes), int4.pack_scales_zeros(scales, zeros)
            writer.write(names.layer_tensor(layer, name, rank, names.QWEIGHT), words)
            writer.write(names.layer_tensor(layer, name, rank, names.SCALES_ZEROS), pairs)
