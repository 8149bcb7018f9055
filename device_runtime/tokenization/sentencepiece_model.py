"""Reads ``tokenizer.model``: the pieces and rules of a SentencePiece model.

Fields and defaults: ``sentencepiece_model.proto`` of google/sentencepiece v0.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from device_runtime.errors import PackageError
from device_runtime.tokenization.protobuf import Field, read_fields
from device_runtime.tokenization.sentencepiece_bpe import PieceKind, check_vocabulary

_ALGORITHMS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2


@dataclass(frozen=True)
class SentencePieceModel:
    """A model that merges by score and leaves text as it is.

    Attributes:
        pieces: their index is their id; no two are equal.
        scores: of each piece, higher merges first.
        kinds: of each piece.
        has_space_prefix: text gets a blank in front.
        has_byte_fallback: what no piece spells becomes bytes instead of the unknown piece.
        unk_surface: what the unknown piece decodes to.
        bos_piece: starts a text; None when no control piece is spelled so.
        eos_piece: ends a text; None when no control piece is spelled so.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[PieceKind, ...]
    has_space_prefix: bool
    has_byte_fallback: bool
    unk_surface: str
    bos_piece: str | None
    eos_piece: str | None

    @property
    def unk_piece(self) -> str:
        """What becomes of text that nothing spells."""
        return self.pieces[self.kinds.index(PieceKind.UNKNOWN)]


@dataclass(frozen=True)
class _Trainer:
    algorithm: int = 1
    has_blank_suffix: bool = False
    has_byte_fallback: bool = False
    unk_surface: str = " \N{DOUBLE QUESTION MARK} "
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"


@dataclass(frozen=True)
class _Normalizer:
    name: str = ""
    character_map: bytes = field(default=b"", repr=False)
    has_space_prefix: bool = True
    removes_blanks: bool = True
    escapes_blanks: bool = True


def parse_sentencepiece(content: bytes, what: str) -> SentencePieceModel:
    """Read a model.

    Args:
        content: of the file, not trusted.
        what: names the file in errors.

    Raises:
        PackageError: the file is damaged, or does what `build_sentencepiece` cannot: another
            algorithm than BPE, normalisation, unused pieces.
    """
    rows: list[tuple[str, float, PieceKind]] = []
    trainer, normalizer, denormalizer = _Trainer(), _Normalizer(), _Normalizer()
    for found in read_fields(content, what):
        if found.number == 1:
            rows.append(_read_piece(found.content, f"piece {len(rows)} of {what}"))
        elif found.number == 2:
            trainer = _read_trainer(read_fields(found.content, f"the trainer part of {what}"))
        elif found.number == 3:
            normalizer = _read_normalizer(
                read_fields(found.content, f"the normalizer part of {what}")
            )
        elif found.number == 5:
            denormalizer = _read_normalizer(
                read_fields(found.content, f"the denormalizer part of {what}")
            )
    pieces = tuple(row[0] for row in rows)
    kinds = tuple(row[2] for row in rows)
    check_vocabulary(pieces, what)
    _check_rules(trainer, normalizer, denormalizer, what)
    _check_kinds(pieces, kinds, trainer, what)
    control = {piece for piece, _, kind in rows if kind is PieceKind.CONTROL}
    return SentencePieceModel(
        pieces=pieces,
        scores=tuple(row[1] for row in rows),
        kinds=kinds,
        has_space_prefix=normalizer.has_space_prefix,
        has_byte_fallback=trainer.has_byte_fallback,
        unk_surface=trainer.unk_surface,
        bos_piece=trainer.bos_piece if trainer.bos_piece in control else None,
        eos_piece=trainer.eos_piece if trainer.eos_piece in control else None,
    )


def _read_piece(content: bytes, what: str) -> tuple[str, float, PieceKind]:
    piece, score, kind = "", 0.0, 1
    for found in read_fields(content, what):
        if found.number == 1:
            piece = found.text
        elif found.number == 2:
            score = found.number_32
        elif found.number == 3:
            kind = found.integer
    if not piece:
        raise PackageError(f"{what} is empty")
    if not math.isfinite(score):
        raise PackageError(f"{what} has the score {score}, expected a finite number")
    try:
        return piece, score, PieceKind(kind)
    except ValueError as error:
        raise PackageError(f"{what} is of the unknown kind {kind}, expected 1 to 6") from error


def _read_trainer(fields: Iterable[Field]) -> _Trainer:
    trainer = _Trainer()
    for found in fields:
        if found.number == 3:
            trainer = replace(trainer, algorithm=found.integer)
        elif found.number == 24:
            trainer = replace(trainer, has_blank_suffix=bool(found.integer))
        elif found.number == 35:
            trainer = replace(trainer, has_byte_fallback=bool(found.integer))
        elif found.number == 44:
            trainer = replace(trainer, unk_surface=found.text)
        elif found.number == 46:
            trainer = replace(trainer, bos_piece=found.text)
        elif found.number == 47:
            trainer = replace(trainer, eos_piece=found.text)
    return trainer


def _read_normalizer(fields: Iterable[Field]) -> _Normalizer:
    normalizer = _Normalizer()
    for found in fields:
        if found.number == 1:
            normalizer = replace(normalizer, name=found.text)
        elif found.number == 2:
            normalizer = replace(normalizer, character_map=found.content)
        elif found.number == 3:
            normalizer = replace(normalizer, has_space_prefix=bool(found.integer))
        elif found.number == 4:
            normalizer = replace(normalizer, removes_blanks=bool(found.integer))
        elif found.number == 5:
            normalizer = replace(normalizer, escapes_blanks=bool(found.integer))
    return normalizer


def _check_rules(
    trainer: _Trainer, normalizer: _Normalizer, denormalizer: _Normalizer, what: str
) -> None:
    if trainer.algorithm != _BPE:
        name = _ALGORITHMS.get(trainer.algorithm, str(trainer.algorithm))
        raise PackageError(
            f"{what} is a SentencePiece model of the kind {name}, expected BPE; save the "
            "checkpoint with a fast tokenizer (AutoTokenizer.save_pretrained)"
        )
    rules = {
        f"the text normalisation {normalizer.name[:40]!a}": bool(normalizer.character_map),
        "a denormalisation": bool(denormalizer.character_map),
        "the removal of extra blanks": normalizer.removes_blanks,
        "blanks that are not escaped": not normalizer.escapes_blanks,
        "blanks at the end of words": trainer.has_blank_suffix,
    }
    for rule, is_asked_for in rules.items():
        if is_asked_for:
            raise PackageError(
                f"{what} asks for {rule}, which is not supported; save the checkpoint with a "
                "fast tokenizer (AutoTokenizer.save_pretrained)"
            )


def _check_kinds(
    pieces: tuple[str, ...], kinds: tuple[PieceKind, ...], trainer: _Trainer, what: str
) -> None:
    num_unknown = kinds.count(PieceKind.UNKNOWN)
    if num_unknown != 1:
        raise PackageError(f"{what} has {num_unknown} unknown pieces, expected 1")
    if PieceKind.UNUSED in kinds:
        index = kinds.index(PieceKind.UNUSED)
        raise PackageError(f"piece {index} of {what} is marked unused, which is not supported")
    found = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind is PieceKind.BYTE}
    expected = {f"<0x{byte:02X}>" for byte in range(256)} if trainer.has_byte_fallback else set()
    if found != expected:
        raise PackageError(
            f"{what} has {len(found)} pieces for bytes, expected {len(expected)}: "
            "<0x00> to <0xFF>, or none where it does not fall back to bytes"
        )
