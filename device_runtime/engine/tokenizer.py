"""The package's tokenizer.json: text to ids, with special tokens only where markup says so."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from device_runtime.package_format import names
from device_runtime.package_format.files import check_file
from device_runtime.package_format.manifest import TokenizerFacts
from device_runtime.package_format.package import Package
from device_runtime.templates.message import Segment, joined_text
from device_runtime.tokenization.definition import build_tokenizer
from device_runtime.tokenization.folder import ORIGINAL_FILES, tokenizer_definition


class Tokenizer:
    """Encodes and decodes for one engine; not thread-safe."""

    def __init__(
        self, definition: str, facts: TokenizerFacts, built: FastTokenizer | None = None
    ) -> None:
        """Build a tokenizer.

        Args:
            definition: the JSON text.
            facts: special tokens as the package records them.
            built: what the text gives, where that is known: a large one takes a second to build.

        Raises:
            PackageError: the text is no tokenizer.
        """
        self.facts = facts
        self._definition = definition
        self._fast = _build(definition) if built is None else built
        added = self._fast.get_added_tokens_decoder()
        self._special = {added[i].content: i for i in sorted(added) if added[i].special}
        self._special_ids = frozenset(self._special.values())
        self._continuing: FastTokenizer | None = None

    @classmethod
    def open(cls, package: Package) -> Tokenizer:
        """Open the tokenizer of a package or workspace.

        Raises:
            PackageError: there is no tokenizer.json, nor what it is made from, or it is none.
        """
        definition = package_definition(package)
        if package.manifest is not None:
            return cls(definition, package.manifest.tokenizer)
        # A plain workspace says no more than this; whether bos is added its tokenizer shows.
        config = package.config
        built = _build(definition)
        starts = built.encode("", add_special_tokens=True).ids
        facts = TokenizerFacts(
            bos_id=config.start_id,
            add_bos=starts[:1] == [config.start_id],
            eos_ids=(config.end_id,),
        )
        return cls(definition, facts, built)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Spellings of the special tokens."""
        return tuple(self._special)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token spelled ``text``, or None."""
        return self._special.get(text)

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Return the ids of plain text; what spells a special token stays letters.

        Args:
            text: any.
            add_bos: put bos first where the model wants one.
        """
        ids = self.encode_segments((Segment(text, is_markup=False),))
        return self._bos(add_bos) + ids

    def encode_prompt(self, segments: Sequence[Segment], *, writes_bos: bool) -> list[int]:
        """Return the ids of a whole prompt.

        Args:
            segments: of a chat template.
            writes_bos: whether bos, if any, is among the markup already.
        """
        return self._bos(not writes_bos) + self.encode_segments(segments)

    def encode_segments(self, segments: Sequence[Segment], *, is_start: bool = True) -> list[int]:
        """Return the ids of segments, encoded as one text so that words may cross from one to next.

        Special tokens are recognised in markup only.

        Args:
            segments: of a chat template.
            is_start: whether the text starts a sequence; some tokenizers put a blank there.
        """
        fast = self._fast if is_start else self._continuation()
        encoding = fast.encode(joined_text(segments), add_special_tokens=False)
        if self._has_stray_special(segments, encoding):
            return self._encode_in_runs(segments, is_start)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens; U+FFFD for bytes that are no character."""
        return str(self._fast.decode(list(token_ids), skip_special_tokens=True))

    def token_id(self, text: str) -> int | None:
        """Return the id of the one token that ``text`` is, or None."""
        found = self._fast.token_to_id(text)
        if found is not None:
            return int(found)
        ids = self._fast.encode(text, add_special_tokens=False).ids
        return int(ids[0]) if len(ids) == 1 else None

    def _bos(self, is_wanted: bool) -> list[int]:
        if is_wanted and self.facts.add_bos and self.facts.bos_id is not None:
            return [self.facts.bos_id]
        return []

    def _has_stray_special(self, segments: Sequence[Segment], encoding: Any) -> bool:
        """Return whether a special token covers anything but characters of one markup segment."""
        spans = []
        start = 0
        for segment in segments:
            end = start + len(segment.text)
            if segment.is_markup:
                spans.append((start, end))
            start = end
        return any(
            token_id in self._special_ids
            and not any(low <= begin and finish <= high for low, high in spans)
            for token_id, (begin, finish) in zip(encoding.ids, encoding.offsets, strict=True)
        )

    def _encode_in_runs(self, segments: Sequence[Segment], is_start: bool) -> list[int]:
        """Encode the text between true special tokens with all special tokens switched off."""
        ids: list[int] = []
        for run in self._runs(segments):
            if isinstance(run, int):
                ids.append(run)
            else:
                fast = self._fast if is_start and not ids else self._continuation()
                fast.encode_special_tokens = True
                try:
                    ids.extend(fast.encode(run, add_special_tokens=False).ids)
                finally:
                    fast.encode_special_tokens = False
        return ids

    def _runs(self, segments: Sequence[Segment]) -> Iterator[int | str]:
        """Yield the special tokens of the markup, and the text between them in one piece each."""
        text = ""
        for segment in segments:
            if not segment.is_markup:
                text += segment.text
                continue
            encoding = self._fast.encode(segment.text, add_special_tokens=False)
            done = 0
            for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token_id not in self._special_ids:
                    continue
                text += segment.text[done:begin]
                if text:
                    yield text
                yield token_id
                text, done = "", end
            text += segment.text[done:]
        if text:
            yield text

    def _continuation(self) -> FastTokenizer:
        """Return the tokenizer for text that does not start a sequence."""
        if self._continuing is None:
            changed = self._definition.replace(
                '"prepend_scheme":"first"', '"prepend_scheme":"never"'
            ).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
            is_same = changed == self._definition
            self._continuing = self._fast if is_same else _build(changed)
        return self._continuing


def package_definition(package: Package) -> str:
    """Return the text of a package's tokenizer.json, made in memory for a plain workspace.

    Raises:
        PackageError: there is neither it nor an original, or what there is is damaged.
    """
    for name in (names.TOKENIZER_JSON, *ORIGINAL_FILES):
        if os.path.lexists(package.tokenizer_dir / name):
            check_file(package.root, names.tokenizer_path(name))
    return tokenizer_definition(package.tokenizer_dir, package.model.vocab_size)


def _build(definition: str) -> FastTokenizer:
    return build_tokenizer(definition, names.TOKENIZER_JSON, is_thorough=False)
