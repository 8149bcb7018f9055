"""Tokens that are found in text before anything else: what the files beside a vocabulary say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.tokenization.sentencepiece_bpe import MAX_TOKENS
from device_runtime.tokenization.settings_files import SURROGATE, read_settings

ADDED_TOKENS = "added_tokens.json"

INTERNLM2_MARKERS = {
    "[UNUSED_TOKEN_141]": "<|plugin|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_146]": "<|im_start|>",
}
"""InternLM2's names for its last pieces (tokenizer_config.json of internlm2-chat)."""

_MARKER = re.compile(r"<[A-Za-z|][\w|]*>|\[UNUSED_TOKEN_\d+\]", re.ASCII)


@dataclass(frozen=True)
class MarkedToken:
    """One token that is found in text as a whole.

    Attributes:
        token_id: its id.
        content: its spelling.
        is_special: whether only markup may hold it, and decoding leaves it out.
        strips_left: whether it takes the blanks before it along.
        strips_right: whether it takes the blanks after it along.
        is_single_word: whether it is found between words only.
    """

    token_id: int
    content: str
    is_special: bool
    strips_left: bool = False
    strips_right: bool = False
    is_single_word: bool = False


@dataclass(frozen=True)
class TokenSettings:
    """What the JSON files beside a vocabulary say about tokens.

    Attributes:
        tokens: with their ids, in the order of the ids.
        special: spellings that are special wherever their ids come from.
        bos_token: starts a text, None where no file says.
        eos_token: ends one, None where no file says.
        adds_bos: whether texts start with bos, None where no file says.
    """

    tokens: tuple[MarkedToken, ...]
    special: frozenset[str]
    bos_token: str | None
    eos_token: str | None
    adds_bos: bool | None

    def within(self, num_ids: int) -> TokenSettings:
        """Return the settings without tokens that the embedding has no row for.

        Llama 2 was published with ``<pad>`` as number 32000 of 32000: no text can be given to the
        model with it.
        """
        tokens = tuple(token for token in self.tokens if token.token_id < num_ids)
        return replace(self, tokens=tokens)

    @classmethod
    def read(cls, folder: Path) -> TokenSettings:
        """Read tokenizer_config.json, added_tokens.json and special_tokens_map.json of a folder.

        Raises:
            PackageError: one of them is damaged or spells a token with half a character, or they
                give an id or a spelling twice.
        """
        config = read_settings(folder / names.TOKENIZER_CONFIG)
        special_map = read_settings(folder / names.SPECIAL_TOKENS_MAP)
        path = folder / names.TOKENIZER_CONFIG
        special = _special_spellings(special_map, folder / names.SPECIAL_TOKENS_MAP)
        special |= _special_spellings(config, path)
        found: dict[int, MarkedToken] = {}
        for content, token_id in read_settings(folder / ADDED_TOKENS).items():
            number = _token_id(token_id, folder / ADDED_TOKENS)
            _check_spelling(content, folder / ADDED_TOKENS)
            # The file of older checkpoints does not tell; what looks like markup is.
            is_special = content in special or is_marker(content)
            found[number] = MarkedToken(number, content, is_special)
        listed = config.get("added_tokens_decoder", {})
        if not isinstance(listed, dict):
            raise PackageError(f"added_tokens_decoder in {path} is not a JSON object")
        for key, value in listed.items():
            token = _read_token(key, value, path)
            is_special = token.is_special or token.content in special
            found[token.token_id] = replace(token, is_special=is_special)
        tokens = tuple(found[token_id] for token_id in sorted(found))
        spellings = {token.content for token in tokens}
        if len(spellings) != len(tokens):
            raise PackageError(
                f"{folder} adds {len(tokens)} tokens, but {len(spellings)} different ones"
            )
        adds_bos = config.get("add_bos_token")
        return cls(
            tokens=tokens,
            special=frozenset(special),
            bos_token=_spelling(config.get("bos_token", special_map.get("bos_token"))),
            eos_token=_spelling(config.get("eos_token", special_map.get("eos_token"))),
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        )


def is_marker(piece: str) -> bool:
    """Return whether a piece looks like markup, such as ``<eoa>`` or ``<|im_end|>``."""
    return _MARKER.fullmatch(piece) is not None


def rename_tokens(
    vocabulary: Sequence[str], tokens: Sequence[MarkedToken], what: str
) -> tuple[str, ...]:
    """Return the vocabulary with the spellings that added tokens give to ids inside it.

    Args:
        vocabulary: its index is the id.
        tokens: in the order of their ids; those behind the vocabulary follow it without a gap.
        what: names the file of the vocabulary in errors.

    Raises:
        PackageError: a spelling is that of another id, or ids leave a gap.
    """
    renamed = list(vocabulary)
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    size = len(vocabulary)
    for token in tokens:
        own_id = ids.get(token.content, token.token_id)
        if own_id != token.token_id:
            raise PackageError(
                f"{what} has {token.content[:60]!a} at {own_id}, an added token has it at "
                f"{token.token_id}"
            )
        if token.token_id < len(vocabulary):
            renamed[token.token_id] = token.content
        elif token.token_id == size:
            size += 1
        else:
            raise PackageError(
                f"the added token {token.content[:60]!a} has the id {token.token_id}, the "
                f"vocabulary of {what} and the tokens before it end at {size - 1}"
            )
    return tuple(renamed)


def mark_tokens(tokenizer: Tokenizer, tokens: Sequence[MarkedToken]) -> None:
    """Make a tokenizer find tokens in text before anything else is done to it.

    Args:
        tokenizer: has the vocabulary of `rename_tokens`.
        tokens: in the order of their ids.
    """
    tokenizer.add_tokens(
        [
            AddedToken(
                token.content,
                special=token.is_special,
                normalized=False,
                lstrip=token.strips_left,
                rstrip=token.strips_right,
                single_word=token.is_single_word,
            )
            for token in tokens
        ]
    )


def _read_token(key: object, value: object, path: Path) -> MarkedToken:
    text = str(key)
    token_id = _token_id(int(text) if text.isdecimal() and len(text) < 10 else None, path)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise PackageError(f"the added token {token_id} in {path} has no content")
    if not value["content"]:
        raise PackageError(f"the added token {token_id} in {path} is empty")
    _check_spelling(value["content"], path)

    def flag(name: str) -> bool:
        return value.get(name) is True

    return MarkedToken(
        token_id,
        value["content"],
        flag("special"),
        strips_left=flag("lstrip"),
        strips_right=flag("rstrip"),
        is_single_word=flag("single_word"),
    )


def _token_id(value: object, path: Path) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS:
        return value
    raise PackageError(f"{path} has an added token whose id is not 0 to {MAX_TOKENS - 1}")


def _check_spelling(spelling: str, path: Path) -> None:
    """Refuse a token that no text can hold."""
    if SURROGATE.search(spelling) is not None:
        raise PackageError(
            f"{path} has the token {spelling[:60]!a}, which holds half a character; fetch it again"
        )


def _special_spellings(settings: Mapping[str, object], path: Path) -> set[str]:
    """Return bos_token and its like, and the additional ones."""
    additional = settings.get("additional_special_tokens")
    values = list(additional) if isinstance(additional, list) else []
    values += [value for key, value in settings.items() if key.endswith("_token")]
    spellings = {spelling for spelling in map(_spelling, values) if spelling}
    for spelling in sorted(spellings):
        _check_spelling(spelling, path)
    return spellings


def _spelling(value: object) -> str | None:
    """Return the spelling of a token, given as a string or an object with a ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
