"""Compares a converted tokenizer with the library whose file it was made from, string by string."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer

from device_runtime.errors import PackageError, UsageError
from device_runtime.tokenization.folder import ConvertedTokenizer
from device_runtime.tokenization.protobuf import read_fields
from device_runtime.tokenization.sentencepiece_bpe import BLANK, PieceKind
from device_runtime.tokenization.sentencepiece_model import parse_sentencepiece
from device_runtime.tokenization.tiktoken_ranks import QWEN_SPLIT, parse_ranks
from host_tools.progress import Progress
from host_tools.proof_strings import first_strings

_BATCH = 1000


class Original(Protocol):
    """The library that a tokenizer was converted from."""

    def knows(self, token_id: int, content: str) -> bool:
        """Return whether the library itself finds this token in text."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a user's text, in which nothing is special."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids that `encode` gave."""


class SentencePieceOriginal:
    """sentencepiece itself, on the model's own file."""

    def __init__(self, path: Path, special: frozenset[int]) -> None:
        """Load the model.

        Args:
            path: of the model.
            special: ids that no text of a user becomes, though the model may find them in text.

        Raises:
            UsageError: the library is not installed.
            PackageError: it does not load the model.
        """
        library = _import("sentencepiece")
        library.set_min_log_level(2)  # errors; it warns of every model with a piece for NUL
        content = path.read_bytes()
        model = parse_sentencepiece(content, str(path))
        self._pieces, self._kinds = model.pieces, model.kinds
        retyped = frozenset(i for i in special if i < len(self._kinds) and self._defines(i))
        self._spellings = tuple(self._pieces[index] for index in retyped)
        try:
            self._own = library.SentencePieceProcessor(model_proto=content)
            self._without_special = library.SentencePieceProcessor(
                model_proto=_as_control(content, retyped)
            )
        except (RuntimeError, ValueError) as error:
            raise PackageError(f"sentencepiece does not load {path}: {error}") from error

    def _defines(self, token_id: int) -> bool:
        return self._kinds[token_id] is PieceKind.USER_DEFINED

    def knows(self, token_id: int, content: str) -> bool:
        """Return whether the model itself finds this token in text."""
        is_own = token_id < len(self._pieces) and self._pieces[token_id] == content
        return is_own and self._defines(token_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a user's text, in which nothing is special."""
        escaped = text.replace(" ", BLANK)
        spells_special = any(one in text or one in escaped for one in self._spellings)
        processor = self._without_special if spells_special else self._own
        return list(processor.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids that `encode` gave."""
        return str(self._own.decode(list(token_ids)))


class TiktokenOriginal:
    """tiktoken itself, on the file's ranks, with what Qwen's code does around it.

    Source: QwenLM/Qwen, ``tokenization_qwen.py``: text is brought to NFC, undecodable bytes are
    replaced.
    """

    def __init__(self, path: Path) -> None:
        """Load the ranks.

        Raises:
            UsageError: the library is not installed.
        """
        ranks = parse_ranks(path.read_bytes(), str(path))
        self._encoding = _import("tiktoken").Encoding(
            "qwen",
            pat_str=QWEN_SPLIT,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={},
        )

    def knows(self, token_id: int, content: str) -> bool:
        """Return False: ranks alone mark no token."""
        del token_id, content
        return False

    def encode(self, text: str) -> list[int]:
        """Return the ids of a user's text, in which nothing is special."""
        return list(self._encoding.encode_ordinary(unicodedata.normalize("NFC", text)))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids that `encode` gave."""
        return str(self._encoding.decode(list(token_ids), errors="replace"))


@dataclass(frozen=True)
class Difference:
    """A string on which the two do not agree.

    Attributes:
        text: the string.
        what: ``"encodes to"`` or ``"decodes to"``.
        ours: of the converted tokenizer.
        original: of the original library.
    """

    text: str
    what: str
    ours: object
    original: object


class Comparison:
    """One converted tokenizer beside its original."""

    def __init__(self, converted: ConvertedTokenizer) -> None:
        """Load the original library.

        Raises:
            UsageError: the library is not installed.
            PackageError: it does not load the file.
        """
        self._ours = Tokenizer.from_str(converted.text)
        self._added: dict[int, AddedToken] = self._ours.get_added_tokens_decoder()
        special = frozenset(i for i, token in self._added.items() if token.special)
        self._original: Original = (
            TiktokenOriginal(converted.path)
            if converted.kind == "tiktoken"
            else SentencePieceOriginal(converted.path, special)
        )

    @cached_property
    def strings(self) -> list[str]:
        """What is compared."""
        added = set(self._added)
        size = self._ours.get_vocab_size(with_added_tokens=True)
        vocabulary = [self._ours.decode([index]) for index in range(size) if index not in added]
        markers = [token.content for _, token in sorted(self._added.items()) if token.special]
        return first_strings([text for text in vocabulary if text], markers)

    def differences(self, strings: Sequence[str]) -> Iterable[Difference]:
        """Yield where the two differ, special tokens taken for letters and then for themselves."""
        plain = {i: t for i, t in self._added.items() if not t.special}
        unknown = {i: t for i, t in plain.items() if not self._original.knows(i, t.content)}
        yield from self._encode_differences(strings, unknown, finds_special=False)
        yield from self._encode_differences(strings, self._added, finds_special=True)

    def _encode_differences(
        self, strings: Sequence[str], found: dict[int, AddedToken], *, finds_special: bool
    ) -> Iterable[Difference]:
        split = _splitter(found.values())
        chosen = [text for text in strings if split.search(text)] if finds_special else strings
        self._ours.encode_special_tokens = not finds_special
        encodings = self._ours.encode_batch(list(chosen), add_special_tokens=False)
        for text, encoding in zip(chosen, encodings, strict=True):
            parts = self._split(text, split, found)
            expected = [i for part in parts for i in self._ids(part)]
            if encoding.ids != expected:
                yield Difference(text, "encodes to", encoding.ids, expected)
            elif not finds_special and len(parts) == 1:
                # Around an added token blanks may be dropped or doubled, by the models' own rules.
                ours = self._ours.decode(encoding.ids, skip_special_tokens=True)
                original = self._original.decode(expected)
                if ours != original:
                    yield Difference(text, "decodes to", ours, original)

    def _ids(self, part: str | int) -> list[int]:
        return [part] if isinstance(part, int) else self._original.encode(part)

    def _split(
        self, text: str, split: re.Pattern[str], found: dict[int, AddedToken]
    ) -> list[str | int]:
        """Return the ids of the tokens that are found in a text, and the text between them."""
        ids = {token.content: token_id for token_id, token in found.items()}
        parts: list[str | int] = []
        for piece in split.split(text) if found else [text]:
            if piece not in ids:
                parts.append(piece)
                continue
            token = found[ids[piece]]
            if token.lstrip and parts and isinstance(parts[-1], str):
                parts[-1] = parts[-1].rstrip()
            parts.append(ids[piece])
        for index, part in enumerate(parts[1:], start=1):
            before = parts[index - 1]
            if isinstance(before, int) and isinstance(part, str) and found[before].rstrip:
                parts[index] = part.lstrip()
        return [part for part in parts if part != ""] or [""]


def prove_tokenizer(converted: ConvertedTokenizer, progress: Progress) -> int:
    """Compare a converted tokenizer with its original, and return on how many strings.

    Args:
        converted: what `convert_tokenizer` made.
        progress: hears of every thousand strings.

    Raises:
        UsageError: the original library is not installed.
        PackageError: the two differ on a string, which is named.
    """
    comparison = Comparison(converted)
    strings = comparison.strings
    title = f"compare with {converted.kind}"
    with progress.task(title, total=len(strings), unit="strings") as task:
        for start in range(0, len(strings), _BATCH):
            batch = strings[start : start + _BATCH]
            for found in comparison.differences(batch):
                raise PackageError(
                    f"{converted.path} is not converted exactly: {found.text[:200]!a} "
                    f"{found.what} {_shown(found.ours)}, with {converted.kind} to "
                    f"{_shown(found.original)}; save the checkpoint with a fast tokenizer"
                )
            task.advance(len(batch))
    return len(strings)


def _splitter(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    longest_first = sorted((token.content for token in tokens), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _as_control(content: bytes, token_ids: frozenset[int]) -> bytes:
    """Return a SentencePiece model in which some pieces are control ones, never found in text."""
    result = bytearray()
    index = 0
    for field in read_fields(content, "the model"):
        message = field.content
        if field.number == 1:
            if index in token_ids:
                # A later value of a field takes the place of an earlier one.
                message += b"\x18" + _varint(PieceKind.CONTROL)
            index += 1
        result += _varint(field.number << 3 | 2) + _varint(len(message)) + message
    return bytes(result)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _import(name: str) -> Any:
    try:
        library = __import__(name)
    except ImportError as error:
        raise UsageError(
            f"a checkpoint without tokenizer.json needs {name} to compare with, install it with "
            "pip install 'turbojet-llm[host]'"
        ) from error
    return library


def _shown(value: object) -> str:
    return (ascii(value) if isinstance(value, str) else str(value))[:200]
