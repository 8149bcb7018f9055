"""Reads ``qwen.tiktoken`` and builds the byte-level tokenizer that merges by its ranks.

A line is a token's bytes in base64, a blank and its rank, which is also its id. tiktoken merges,
at each step, the neighbours whose joined bytes rank lowest, as SentencePiece does by score.
"""

from __future__ import annotations

import base64
import binascii

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from device_runtime.errors import PackageError
from device_runtime.tokenization.sentencepiece_bpe import MAX_TOKENS, check_vocabulary, rank_merges

TIKTOKEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before merging; ``%s`` counts digits, ``""`` for one by one."""

QWEN_SPLIT = TIKTOKEN_SPLIT % ""
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{index}|>" for index in range(205)),
)
"""Qwen-1's, at the ids after the ranks (QwenLM/Qwen, tokenization_note.md)."""


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def parse_ranks(content: bytes, what: str) -> tuple[bytes, ...]:
    """Return the tokens of a ranks file; their index is their rank and id.

    Args:
        content: of the file, not trusted.
        what: names the file in errors.

    Raises:
        PackageError: a line is damaged, ranks do not count from 0, or a byte has no token.
    """
    tokens: list[bytes] = []
    lines = content.splitlines()
    if len(lines) > MAX_TOKENS:
        raise PackageError(f"{what} has {len(lines)} lines, expected at most {MAX_TOKENS}")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            text, rank = line.split(b" ")
            token = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error) as error:
            raise PackageError(
                f"line {number} of {what} is not a token in base64 and its rank"
            ) from error
        if rank != b"%d" % len(tokens) or not token:
            raise PackageError(
                f"line {number} of {what} has the rank {ascii(rank[:20])[2:-1]} for "
                f"{len(token)} bytes, expected {len(tokens)} for at least 1"
            )
        tokens.append(token)
    missing = {bytes([byte]) for byte in range(256)} - set(tokens)
    if missing:
        raise PackageError(f"{what} has tokens for {256 - len(missing)} bytes, expected all 256")
    return tuple(tokens)


def build_tiktoken(tokens: tuple[bytes, ...], split: str, what: str) -> Tokenizer:
    """Build the tokenizer without special tokens; text is brought to Unicode's composed form.

    Args:
        tokens: their index is their rank and id; every byte is one.
        split: regular expression of what is merged apart.
        what: names the file in errors.

    Raises:
        PackageError: tokens are equal, too many or too long.
    """
    letters = byte_letters()
    spelled = ["".join([letters[byte] for byte in token]) for token in tokens]
    check_vocabulary(spelled, what)
    scores = [-float(rank) for rank in range(len(spelled))]
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(spelled)},
            merges=rank_merges(spelled, scores, range(len(spelled))),
            # tiktoken looks a whole piece up before it merges.
            ignore_merges=True,
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
