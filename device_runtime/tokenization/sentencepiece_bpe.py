"""A ``tokenizers`` tokenizer from the pieces of a SentencePiece BPE model.

SentencePiece merges, at each step, the neighbours whose joined piece scores best; byte-pair
encoding merges by rank. So the merges are every way to part a piece into two pieces, ranked by
the score of the whole. (A piece is only ever made from the two halves that merging it alone ends
with, so how its other partings rank does not matter.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from device_runtime.errors import PackageError

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece spells a blank inside its pieces."""

MAX_TOKENS = 1 << 20
MAX_TOKEN_CHARACTERS = 4096
MAX_PARTED_CHARACTERS = 1 << 28
"""Sum of squared lengths of pieces: what finding all partings costs. InternLM has 6 million."""

_NUL = "\0"
_UNREACHABLE_NUL = "<unused NUL>"


class PieceKind(IntEnum):
    """What a piece is; the numbers of SentencePiece's files, and of GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePieceRules:
    """What the model does beside merging.

    Attributes:
        unk_token: piece for what even bytes cannot spell.
        has_space_prefix: text gets a blank in front, and decoding takes it off again.
        has_byte_fallback: what no piece spells becomes the bytes ``<0x00>`` to ``<0xFF>``.
        unk_surface: what ``unk_token`` decodes to; None for its own spelling.
    """

    unk_token: str
    has_space_prefix: bool = True
    has_byte_fallback: bool = True
    unk_surface: str | None = None


def check_vocabulary(tokens: Sequence[str], what: str, max_tokens: int = MAX_TOKENS) -> None:
    """Check that a vocabulary can be built in reasonable time and memory.

    Args:
        tokens: not trusted.
        what: names the file in errors.
        max_tokens: most that are expected.

    Raises:
        PackageError: there are none or too many, two are equal, or some are too long.
    """
    if not 1 <= len(tokens) <= max_tokens:
        raise PackageError(f"{what} has {len(tokens)} tokens, expected 1 to {max_tokens}")
    num_different = len(set(tokens))
    if num_different != len(tokens):
        raise PackageError(f"{what} has {len(tokens)} tokens, but {num_different} different ones")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_CHARACTERS:
        raise PackageError(
            f"{what} has a token of {longest} characters, expected at most {MAX_TOKEN_CHARACTERS}"
        )
    parted = sum(len(token) ** 2 for token in tokens)
    if parted > MAX_PARTED_CHARACTERS:
        raise PackageError(
            f"{what} has too many long tokens, their squared lengths add up to {parted}, "
            f"expected at most {MAX_PARTED_CHARACTERS}"
        )


def build_sentencepiece(
    pieces: Sequence[str],
    scores: Sequence[float],
    mergeable: Sequence[bool],
    rules: SentencePieceRules,
) -> Tokenizer:
    """Build the tokenizer: no pre-tokenizer, no special tokens.

    Args:
        pieces: spelled with :data:`BLANK`, their index is their id; no two are equal.
        scores: of each piece, higher merges first.
        mergeable: whether text can become this piece by merging; false for control and byte
            pieces.
        rules: what the model does beside merging.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    hides_nul = rules.has_byte_fallback and _NUL in vocab
    if hides_nul:
        # SentencePiece 0.2.1 and later take this piece for unused: NUL becomes <0x00>.
        vocab[_UNREACHABLE_NUL] = vocab.pop(_NUL)
    joinable = [index for index, can in enumerate(mergeable) if can and pieces[index] in vocab]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=rank_merges(pieces, scores, joinable),
            unk_token=rules.unk_token,
            fuse_unk=True,
            byte_fallback=rules.has_byte_fallback,
        )
    )
    back: list[decoders.Decoder] = []
    if hides_nul:
        back.append(decoders.Replace(_UNREACHABLE_NUL, _NUL))
    if rules.unk_surface is not None:
        back.append(decoders.Replace(rules.unk_token, rules.unk_surface))
    back.append(decoders.Replace(BLANK, " "))
    if rules.has_byte_fallback:
        back.append(decoders.ByteFallback())
    back.append(decoders.Fuse())
    replaced = normalizers.Replace(" ", BLANK)
    if rules.has_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), replaced])
        back.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        tokenizer.normalizer = replaced
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def rank_merges(
    tokens: Sequence[str], scores: Sequence[float], joinable: Iterable[int]
) -> list[tuple[str, str]]:
    """Return the merges that byte-pair encoding does best first.

    Args:
        tokens: their index is their id.
        scores: of each token, higher merges first; equal ones go by id.
        joinable: ids of tokens that merging makes or takes.
    """
    ids = {tokens[index]: index for index in joinable}
    # Stable: tokens of equal score stay in the order of their ids.
    best_first = sorted(ids.values(), key=lambda index: -scores[index])
    merges: list[tuple[str, str]] = []
    for index in best_first:
        token = tokens[index]
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [pair for pair in halves if pair[0] in ids and pair[1] in ids]
    return merges
