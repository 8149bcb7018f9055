"""Rebuilds tokenizer.json and tokenizer_config.json from the vocabulary of a GGUF file.

A GGUF file names its pre-tokenizer instead of holding it. The splits below are those of the
original tokenizer.json files, as llama.cpp's ``llama-vocab.cpp`` lists them per name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from device_runtime.errors import PackageError
from device_runtime.tokenization.sentencepiece_bpe import (
    PieceKind,
    SentencePieceRules,
    build_sentencepiece,
    check_vocabulary,
)
from device_runtime.tokenization.tiktoken_ranks import TIKTOKEN_SPLIT
from host_tools.fetch.gguf_metadata import Metadata


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before byte-level BPE.

    Attributes:
        split: regular expression of the pieces; empty for the GPT-2 one inside ``ByteLevel``.
        has_single_digits: every digit is a piece of its own, whatever follows.
        is_nfc: text is first brought to Unicode's composed form.
        ignores_merges: a piece that is a token is taken whole, whatever the merges say.
        adds_bos: the file's default for ``tokenizer.ggml.add_bos_token``.
    """

    split: str = ""
    has_single_digits: bool = False
    is_nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


GPT2 = PreTokenizer()
SMOLLM = PreTokenizer(has_single_digits=True)
LLAMA3 = PreTokenizer(split=TIKTOKEN_SPLIT % "{1,3}", ignores_merges=True, adds_bos=True)
QWEN2 = PreTokenizer(split=TIKTOKEN_SPLIT % "", is_nfc=True)

PRE_TOKENIZERS = {
    "default": GPT2,
    "gpt-2": GPT2,
    "gpt2": GPT2,
    "smollm": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens, None where the file names none.

    Attributes:
        eot: ends a turn where that is another token than ``eos``.
    """

    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    eot: int | None

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(dict.fromkeys(i for i in (self.eos, self.eot) if i is not None))


@dataclass(frozen=True)
class RebuiltTokenizer:
    """A tokenizer and what tokenizer_config.json says about it."""

    tokenizer: Tokenizer
    special: SpecialTokens
    config: str

    @property
    def text(self) -> str:
        """The content of tokenizer.json."""
        return str(self.tokenizer.to_str(pretty=True))


def rebuild_tokenizer(metadata: Metadata, vocab_size: int) -> RebuiltTokenizer:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        metadata: of the file.
        vocab_size: rows of the embedding; ids at or above it cannot be used.

    Raises:
        PackageError: kind or pre-tokenizer are unknown, or tokens, types, merges and special ids
            do not agree.
    """
    tokens = metadata.texts("tokenizer.ggml.tokens")
    _check_tokens(metadata, tokens, vocab_size)
    types = [int(n) for n in metadata.numbers("tokenizer.ggml.token_type", len(tokens))]
    special = SpecialTokens(
        **{
            name: metadata.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
            for name, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
                ("eot", "eot"),
            )
        }
    )
    kind = metadata.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, default_bos = _build_byte_level(metadata, tokens, types)
    elif kind == "llama":
        tokenizer, default_bos = _build_sentencepiece(metadata, tokens, types, special), True
    else:
        raise PackageError(
            f"{metadata.file_name} has a tokenizer of kind {kind[:40]!r}, expected gpt2 "
            "(byte-level BPE) or llama (SentencePiece BPE)"
        )
    _add_marked_tokens(tokenizer, tokens, types)
    adds_bos = metadata.flag("tokenizer.ggml.add_bos_token", default_bos)
    if adds_bos and special.bos is not None:
        bos = tokens[special.bos]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, special.bos)],
        )
    return RebuiltTokenizer(
        tokenizer, special, _tokenizer_config(metadata, tokens, types, special, adds_bos)
    )


def _check_tokens(metadata: Metadata, tokens: Sequence[str], vocab_size: int) -> None:
    if not 1 <= len(tokens) <= vocab_size:
        raise PackageError(
            f"{metadata.file_name} has {len(tokens)} tokens for {vocab_size} rows of its "
            f"embedding, expected 1 to {vocab_size}"
        )
    check_vocabulary(tokens, metadata.file_name)


def _build_byte_level(
    metadata: Metadata, tokens: Sequence[str], types: Sequence[int]
) -> tuple[Tokenizer, bool]:
    """Build a byte-level BPE tokenizer; also return whether it begins with BOS by default."""
    name = metadata.text("tokenizer.ggml.pre", "default")
    rules = PRE_TOKENIZERS.get(name)
    if rules is None:
        raise PackageError(
            f"{metadata.file_name} has the pre-tokenizer {name[:40]!r}, expected one of "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _read_merges(metadata, vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=rules.ignores_merges))
    if rules.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.has_single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules.split:
        steps.append(pre_tokenizers.Split(Regex(rules.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rules.adds_bos


def _read_merges(metadata: Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in metadata.texts("tokenizer.ggml.merges"):
        # Byte-level tokens hold no blank, so the one in the middle parts the two.
        left, _, right = line.partition(" ")
        # An empty half would make a token of itself.
        is_whole = bool(left and right) and {left, right, left + right} <= vocab.keys()
        if not is_whole:
            raise PackageError(
                f"{metadata.file_name} merges {line[:80]!r}, which its vocabulary does not hold"
            )
        merges.append((left, right))
    return merges


def _build_sentencepiece(
    metadata: Metadata, tokens: Sequence[str], types: Sequence[int], special: SpecialTokens
) -> Tokenizer:
    scores = metadata.numbers("tokenizer.ggml.scores", len(tokens))
    if special.unk is None:
        raise PackageError(f"{metadata.file_name} names no unknown token, SentencePiece needs one")
    rules = SentencePieceRules(
        unk_token=tokens[special.unk],
        has_space_prefix=metadata.flag("tokenizer.ggml.add_space_prefix", True),
    )
    mergeable = [kind in (PieceKind.NORMAL, PieceKind.USER_DEFINED) for kind in types]
    return build_sentencepiece(tokens, scores, mergeable, rules)


def _add_marked_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark the tokens that are found in text before anything else is done to it."""
    marked = [
        AddedToken(token, normalized=False, special=kind in (PieceKind.CONTROL, PieceKind.UNKNOWN))
        for token, kind in zip(tokens, types, strict=True)
        if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED, PieceKind.UNKNOWN) and token
    ]
    # They are in the vocabulary already, so none of them gets a new id.
    tokenizer.add_tokens(marked)


def _tokenizer_config(
    metadata: Metadata,
    tokens: Sequence[str],
    types: Sequence[int],
    special: SpecialTokens,
    adds_bos: bool,
) -> str:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.size(
            f"{metadata.text('general.architecture')}.context_length"
        ),
    }
    for name in ("bos", "eos", "unk", "pad"):
        token_id = getattr(special, name)
        config[f"{name}_token"] = None if token_id is None else tokens[token_id]
    config["added_tokens_decoder"] = {
        str(index): {
            "content": token,
            "special": kind != PieceKind.USER_DEFINED,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED, PieceKind.UNKNOWN) and token
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    return json.dumps(config, indent=2, ensure_ascii=False)
