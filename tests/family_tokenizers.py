"""Tokenizers of the families, tiny, in the files that their repositories have."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


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


CHATML_MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_MARKERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


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


def write_internlm(folder: Path) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {"auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]}}
    markers = (("<eoh>", 0.0, 4), ("<eoa>", 0.0, 4))
    sentencepiece(folder, config={**config, **tokens, "add_bos_token": True}, markers=markers)


INTERNLM2_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_internlm2(folder: Path) -> None:
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


def write_baichuan2(folder: Path) -> None:
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


def write_llama2(folder: Path) -> None:
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
