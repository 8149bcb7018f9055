"""Random tiny checkpoints of every family in its published layout, and packages made of them.

    PYTHONPATH=tests python tests/families.py FOLDER

builds the packages FOLDER/NAME-fp16 and FOLDER/NAME-w4, for machines that only run them
(tests/gpu/test_families.py).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import remote_models
import tiny_sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from device_runtime.package_format import int4
from device_runtime.package_format.archive_reader import extract_archive
from host_tools.build import build
from host_tools.fetch.options import FetchOptions
from host_tools.options import CalibrateOptions
from host_tools.package_options import BuildOptions
from host_tools.progress import Progress
from host_tools.proof_strings import first_strings

VOCAB = 320
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 320, 4, 2, 64, 2
CONTEXT = 64
NUM_PROOF_STRINGS = 200
"""That a converted tokenizer is compared on here; all 21,000 are for test_tokenizer_proof.py."""

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


def byte_level(folder: Path, *, special: tuple[str, ...] = ("<s>", "</s>"), **settings) -> None:
    """Write tokenizer.json and tokenizer_config.json; the last special token is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": special[-1], **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def sentencepiece(folder: Path, *, config: dict, markers=()) -> None:
    """Write tokenizer.model and tokenizer_config.json."""
    pieces = [*tiny_sentencepiece.PIECES, *markers]
    parts = (tiny_sentencepiece.trainer(), tiny_sentencepiece.normalizer(has_prefix=True))
    tiny_sentencepiece.write_model(folder, pieces, *parts)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_qwen_ranks(folder: Path) -> None:
    """Write qwen.tiktoken and what lies beside it."""
    tiny_sentencepiece.write_ranks(folder)
    settings = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


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


@dataclass(frozen=True)
class Built:
    """Folders of one family's checkpoint, AWQ checkpoint and packages."""

    case: FamilyCase
    checkpoint: Path
    awq: Path
    fp16: Path
    w4: Path


def _internlm_tokenizer(folder: Path) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {"auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]}}
    markers = (("<eoh>", 0.0, 4), ("<eoa>", 0.0, 4))
    sentencepiece(folder, config={**config, **tokens, "add_bos_token": True}, markers=markers)


INTERNLM2_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _internlm2_tokenizer(folder: Path) -> None:
    tiny_sentencepiece.write_model(folder)
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    start = len(tiny_sentencepiece.PIECES)
    added = {0: "<unk>", 1: "<s>", 2: "</s>", start + 1: "<|im_end|>", start + 2: "<|im_start|>"}
    config = {
        "added_tokens_decoder": {
            str(index): {**token, "content": content, "special": True}
            for index, content in added.items()
        },
        "bos_token": "<s>",
        "chat_template": INTERNLM2_CHAT,
        "eos_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [2, start + 1], "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _baichuan2_tokenizer(folder: Path) -> None:
    markers = tuple((f"<reserved_{index}>", 0.0, 4) for index in (105, 106, 107))
    parts = (tiny_sentencepiece.trainer(), tiny_sentencepiece.normalizer())
    tiny_sentencepiece.write_model(folder, [*tiny_sentencepiece.PIECES, *markers], *parts)
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "single_word": True}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": {**token, "content": "<s>"},
        "eos_token": {**token, "content": "</s>"},
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {
        "user_token_id": 195,
        "assistant_token_id": 196,
        "eos_token_id": 2,
        "max_new_tokens": 2048,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "repetition_penalty": 1.05,
        "do_sample": True,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _llama2_tokenizer(folder: Path) -> None:
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {**token, "content": "<s>"},
        "eos_token": {**token, "content": "</s>"},
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    sentencepiece(folder, config=config)


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
        write_tokenizer=_internlm_tokenizer,
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
        write_tokenizer=_internlm_tokenizer,
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
        write_tokenizer=_internlm2_tokenizer,
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
        write_tokenizer=_internlm2_tokenizer,
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
            "num_key_value_heads": 2,
            "qkv_bias": False,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        write_tokenizer=_internlm2_tokenizer,
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
        write_tokenizer=_llama2_tokenizer,
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
        }
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
        }
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
        write_tokenizer=_llama2_tokenizer,
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
        write_tokenizer=_llama2_tokenizer,
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
        write_tokenizer=_baichuan2_tokenizer,
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
        }
    ),
}


def reference_model(case: FamilyCase) -> torch.nn.Module:
    """Return the model that the packages are compared with, its weights not set."""
    if case.reference is not None:
        return case.reference(case.config)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(case.config)
    kind = config.pop("model_type")
    for key in ("architectures", "auto_map"):
        config.pop(key, None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).float()


class Reference:
    """What a package must give: the published model with the weights of a checkpoint."""

    def __init__(self, case: FamilyCase, state: dict[str, torch.Tensor]) -> None:
        """Load the weights; every one has its place, and every place its weight."""
        self._model = reference_model(case).eval()
        self._is_plain = case.reference is not None
        missing, unexpected = self._model.load_state_dict(
            {name: value.float() for name, value in state.items()}, strict=False
        )
        assert [name for name in missing if not (case.is_tied and name == "lm_head.weight")] == []
        assert [name for name in unexpected if "inv_freq" not in name] == []
        if case.is_tied:
            self._model.tie_weights()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        """Return ``[tokens, vocab_size]`` fp32."""
        if self._is_plain:
            return self._model(torch.tensor(ids)).numpy()
        return self._model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Return the likeliest tokens after a prompt, one by one."""
        ids = list(prompt)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


def random_state(case: FamilyCase, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights under the published names; queries and keys point somewhere."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    shapes = {name: value.shape for name, value in reference_model(case).state_dict().items()}
    for name, shape in shapes.items():
        if "inv_freq" in name or (case.is_tied and name == "lm_head.weight"):
            continue
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = noise * 0.2 + (0 if name.endswith("bias") else 1)
        elif "emb" in name or "wte" in name:
            value = noise
        else:
            value = noise * shape[1] ** -0.5
            if any(part in name for part in ("q_proj", "k_proj", "wqkv", "c_attn", "W_pack")):
                value = value * 1.5
        state[name] = value.to(case.dtype)
    if case.extra:
        for layer in range(case.config["num_hidden_layers"]):
            for name in case.extra:
                state[f"model.layers.{layer}.{name}"] = torch.ones(HEAD_DIM // 2)
    return state


def write_checkpoint(case: FamilyCase, folder: Path) -> Path:
    """Write a repository: config, shards with their index, tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2))
    write_weights(folder, random_state(case), case.shards, is_pickled=case.is_pickled)
    case.write_tokenizer(folder)
    return folder


def dequantized_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that the codes of an AWQ folder mean, under the checkpoint's names."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    state = {name: value for name, value in stored.items() if value.is_floating_point()}
    for name in [name for name in stored if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes, zeros = (
            int4.unpack_awq(stored[f"{module}.{part}"].numpy()) for part in ("qweight", "qzeros")
        )
        scales = state.pop(f"{module}.scales").numpy()
        weight = int4.dequantize(codes, zeros, scales, len(codes) // len(scales))
        state[f"{module}.weight"] = torch.from_numpy(weight.T.copy())
    return state


def write_weights(folder: Path, state: dict, shards: int, *, is_pickled: bool) -> None:
    """Write weights under the names that transformers gives shards."""
    stem, suffix = ("pytorch_model", "bin") if is_pickled else ("model", "safetensors")
    if shards == 1:
        files = {f"{stem}.{suffix}": list(state)}
    else:
        names = list(state)
        step = -(-len(names) // shards)
        files = {
            f"{stem}-{index + 1:05d}-of-{shards:05d}.{suffix}": names[index * step :][:step]
            for index in range(shards)
        }
        total = sum(value.nbytes for value in state.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))
    for file, names in files.items():
        part = {name: state[name].contiguous() for name in names}
        if is_pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})


def build_packages(
    name: str,
    folder: Path,
    case: FamilyCase | None = None,
    fetch: FetchOptions = FetchOptions(),  # noqa: B008 - frozen
) -> Built:
    """Take one family through the whole pipeline, in fp16 and in 4 bits.

    Args:
        name: of the case; also the package's.
        folder: gets everything.
        case: another than `CASES` has.
        fetch: an adapter to go over it.
    """
    case = case or CASES[name]
    checkpoint = write_checkpoint(case, folder / name)
    text = folder / "text.txt"
    text.write_text("".join(random.Random(0).choices("helowrd \n,.", k=6000)))
    calibration = CalibrateOptions(str(text), num_samples=8, seqlen=32, device="cpu")
    roots = {}
    proof = partial(first_strings, count=NUM_PROOF_STRINGS)
    for kind, method in (("fp16", "none"), ("w4", "awq")):
        options = BuildOptions(
            fetch=fetch,
            calibrate=calibration,
            method=method,
            target="orin-nano-8gb",
            kernels="none",
        )
        archive = folder / f"{name}-{kind}.tgz"
        work = folder / f"{name}-{kind}.work"
        with patch("host_tools.tokenizer_proof.first_strings", proof):
            build(str(checkpoint), archive, work, options, Progress())
        roots[kind] = extract_archive(archive, folder / f"{name}-{kind}").root
    awq = folder / f"{name}-w4.work" / "awq"
    return Built(case, checkpoint, awq, roots["fp16"], roots["w4"])


def main(folder: Path) -> None:
    """Build every package into a folder, and keep nothing else."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name in CASES:
            built = build_packages(name, Path(scratch))
            for root in (built.fp16, built.w4):
                root.replace(folder / root.name)
            print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
