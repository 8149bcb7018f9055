"""The tokenizer of a folder: its tokenizer.json, or the same made from the original's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.tokenization.added_tokens import (
    INTERNLM2_MARKERS,
    MarkedToken,
    TokenSettings,
    is_marker,
    mark_tokens,
    rename_tokens,
)
from device_runtime.tokenization.sentencepiece_bpe import (
    PieceKind,
    SentencePieceRules,
    build_sentencepiece,
)
from device_runtime.tokenization.sentencepiece_model import SentencePieceModel, parse_sentencepiece
from device_runtime.tokenization.settings_files import read_bytes, read_text
from device_runtime.tokenization.tiktoken_ranks import (
    QWEN_SPECIAL_TOKENS,
    QWEN_SPLIT,
    build_tiktoken,
    parse_ranks,
)

MAX_TOKENIZER_BYTES = 256 << 20
MAX_ORIGINAL_BYTES = 64 << 20

ORIGINAL_FILES = (names.TOKENIZER_MODEL, names.TOKENIZER_TIKTOKEN)
"""What a tokenizer.json can be made from; the first that exists counts (spec section 1.1)."""


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A tokenizer made from the file of another library.

    Attributes:
        path: the file it was made from.
        kind: the library.
        tokenizer: encodes and decodes like it; special tokens are found in text too.
        bos_token: starts a text, None when the model has none.
        eos_token: ends one, None when no file says.
        adds_bos: whether texts start with bos.
    """

    path: Path
    kind: Literal["sentencepiece", "tiktoken"]
    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    adds_bos: bool

    @property
    def text(self) -> str:
        """The content of tokenizer.json."""
        return str(self.tokenizer.to_str())


def original_file(folder: Path) -> Path | None:
    """Return the file from which a folder's tokenizer.json can be made, None without one."""
    found = (folder / name for name in ORIGINAL_FILES)
    return next((path for path in found if path.is_file()), None)


def tokenizer_definition(folder: Path, num_ids: int | None = None) -> str:
    """Return the text of a folder's tokenizer.json, made in memory where it has none.

    Args:
        folder: of the tokenizer.
        num_ids: as for `convert_tokenizer`.

    Raises:
        PackageError: there is neither it nor an original, or what there is is damaged.
    """
    path = folder / names.TOKENIZER_JSON
    if not path.is_file() and original_file(folder) is not None:
        return convert_tokenizer(folder, num_ids).text
    if not path.exists():
        raise PackageError(
            f"{path} is missing, and so are {' and '.join(ORIGINAL_FILES)} to make it from; "
            "convert the model again"
        )
    return read_text(path, MAX_TOKENIZER_BYTES)


def convert_tokenizer(folder: Path, num_ids: int | None = None) -> ConvertedTokenizer:
    """Make a tokenizer from ``tokenizer.model`` or ``qwen.tiktoken`` and the files beside it.

    Args:
        folder: also looked through for tokenizer_config.json, added_tokens.json and
            special_tokens_map.json; no code in it is run.
        num_ids: rows of the model's embedding; added tokens beyond are left out.

    Raises:
        PackageError: there is no such file, it is damaged, or it cannot be done exactly.
    """
    path = original_file(folder)
    if path is None:
        raise PackageError(f"{folder} has no tokenizer, expected {' or '.join(ORIGINAL_FILES)}")
    content = read_bytes(path, MAX_ORIGINAL_BYTES)
    settings = TokenSettings.read(folder)
    if num_ids is not None:
        settings = settings.within(num_ids)
    if path.name == names.TOKENIZER_MODEL:
        return _convert_sentencepiece(parse_sentencepiece(content, str(path)), settings, path)
    return _convert_tiktoken(parse_ranks(content, str(path)), settings, path)


def _convert_sentencepiece(
    model: SentencePieceModel, settings: TokenSettings, path: Path
) -> ConvertedTokenizer:
    tokens = _sentencepiece_tokens(model, settings)
    pieces = rename_tokens(model.pieces, tokens, str(path))
    found_whole = {token.token_id for token in tokens}
    # User-defined pieces of one character stay in the text, but nothing is merged with them.
    mergeable = [
        kind is PieceKind.NORMAL and index not in found_whole
        for index, kind in enumerate(model.kinds)
    ]
    rules = SentencePieceRules(
        unk_token=model.unk_piece,
        has_space_prefix=model.has_space_prefix,
        has_byte_fallback=model.has_byte_fallback,
        unk_surface=model.unk_surface,
    )
    tokenizer = build_sentencepiece(pieces, model.scores, mergeable, rules)
    mark_tokens(tokenizer, tokens)
    bos_token = settings.bos_token or model.bos_piece
    bos_id = None if bos_token is None else tokenizer.token_to_id(bos_token)
    # SentencePiece models start texts with bos unless a setting says otherwise (section 6.3).
    adds_bos = bos_id is not None and settings.adds_bos is not False
    if adds_bos and bos_token is not None and bos_id is not None:
        tokenizer.post_processor = _bos_first(bos_token, bos_id, path)
    return ConvertedTokenizer(
        path=path,
        kind="sentencepiece",
        tokenizer=tokenizer,
        bos_token=bos_token if bos_id is not None else None,
        eos_token=settings.eos_token or model.eos_piece,
        adds_bos=adds_bos,
    )


def _bos_first(bos_token: str, bos_id: int, path: Path) -> TemplateProcessing:
    try:
        return TemplateProcessing(
            single=[bos_token, "$A"],
            pair=[bos_token, "$A", f"{bos_token}:1", "$B:1"],
            special_tokens=[(bos_token, bos_id)],
        )
    except Exception as error:  # the library raises nothing narrower
        raise PackageError(
            f"the bos token {bos_token[:60]!a} of {path} cannot start a text: {str(error)[:120]}"
        ) from error


def _sentencepiece_tokens(
    model: SentencePieceModel, settings: TokenSettings
) -> tuple[MarkedToken, ...]:
    """Return what is found in text as a whole: the model's own, and what the settings add."""
    tokens = {token.token_id: token for token in settings.tokens}
    taken = {token.content for token in settings.tokens} | set(model.pieces)
    for index, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True)):
        if index in tokens:
            continue
        name = INTERNLM2_MARKERS.get(piece, piece)
        if name in taken:
            name = piece
        if kind is PieceKind.CONTROL:
            tokens[index] = MarkedToken(index, name, is_special=True)
        elif kind is PieceKind.USER_DEFINED and len(piece) > 1:
            is_special = is_marker(name) or name in settings.special
            tokens[index] = MarkedToken(index, name, is_special)
        elif kind is PieceKind.NORMAL and name in settings.special:
            tokens[index] = MarkedToken(index, name, is_special=True)
    unk_id = model.kinds.index(PieceKind.UNKNOWN)
    # No text becomes the unknown piece by spelling it.
    return tuple(tokens[index] for index in sorted(tokens) if index != unk_id)


def _convert_tiktoken(
    ranks: Sequence[bytes], settings: TokenSettings, path: Path
) -> ConvertedTokenizer:
    tokens = {
        len(ranks) + index: MarkedToken(len(ranks) + index, content, is_special=True)
        for index, content in enumerate(QWEN_SPECIAL_TOKENS)
    }
    tokens.update((token.token_id, token) for token in settings.tokens)
    marked = tuple(tokens[index] for index in sorted(tokens))
    if marked[0].token_id < len(ranks):
        raise PackageError(
            f"the added token {marked[0].content[:60]!a} has the id {marked[0].token_id}, the "
            f"ranks of {path} end at {len(ranks) - 1}"
        )
    tokenizer = build_tiktoken(tuple(ranks), QWEN_SPLIT, str(path))
    rename_tokens([""] * len(ranks), marked, str(path))
    mark_tokens(tokenizer, marked)
    return ConvertedTokenizer(
        path=path,
        kind="tiktoken",
        tokenizer=tokenizer,
        bos_token=settings.bos_token,
        eos_token=settings.eos_token or QWEN_SPECIAL_TOKENS[0],
        adds_bos=False,
    )
