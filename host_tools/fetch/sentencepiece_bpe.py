"""A ``tokenizers`` tokenizer from the pieces of a SentencePiece BPE model.

SentencePiece merges, at each step, the neighbours whose joined piece scores best; byte-pair
encoding merges by rank. So the merges are every way to part a piece into two pieces, ranked by
the score of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece spells a blank inside its pieces."""


@dataclass(frozen=True)
class SentencePieceRules:
    """What the model does beside merging.

    Attributes:
        unk_token: piece for what even bytes cannot spell.
        has_space_prefix: text gets a blank in front, and decoding takes it off again.
    """

    unk_token: str
    has_space_prefix: bool = True


def build_sentencepiece(
    pieces: Sequence[str],
    scores: Sequence[float],
    mergeable: Sequence[bool],
    rules: SentencePieceRules,
) -> Tokenizer:
    """Build the tokenizer: no pre-tokenizer, bytes ``<0x00>`` to ``<0xFF>`` as the fallback.

    Args:
        pieces: spelled with :data:`BLANK`, their index is their id; no two are equal.
        scores: of each piece, higher merges first.
        mergeable: whether text can become this piece by merging; false for control and byte
            pieces.
        rules: what the model does beside merging.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = _rank_merges(pieces, scores, mergeable, vocab)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            unk_token=rules.unk_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replaced = normalizers.Replace(" ", BLANK)
    back: list[decoders.Decoder] = [
        decoders.Replace(BLANK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if rules.has_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), replaced])
        back.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        tokenizer.normalizer = replaced
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _rank_merges(
    pieces: Sequence[str],
    scores: Sequence[float],
    mergeable: Sequence[bool],
    vocab: dict[str, int],
) -> list[tuple[str, str]]:
    found = [
        (-scores[index], index, left, right)
        for index, piece in enumerate(pieces)
        if mergeable[index]
        for left, right in _halves(piece, vocab, mergeable)
    ]
    # Equal scores keep the order of ids; halves of one piece go by the ids of the halves.
    found.sort(key=lambda row: (row[0], row[1], vocab[row[2]], vocab[row[3]]))
    return [(left, right) for _, _, left, right in found]


def _halves(
    piece: str, vocab: dict[str, int], mergeable: Sequence[bool]
) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in vocab and right in vocab and mergeable[vocab[left]] and mergeable[vocab[right]]:
            yield left, right
