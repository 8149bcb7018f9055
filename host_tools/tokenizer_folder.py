"""What a package says about its tokenizer: files, special ids, and how answers are drawn."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.manifest import SamplingDefaults
from device_runtime.package_format.sampling_ranges import sampling_fault
from device_runtime.tokenization.definition import build_tokenizer
from device_runtime.tokenization.folder import (
    MAX_TOKENIZER_BYTES,
    ORIGINAL_FILES,
    ConvertedTokenizer,
    convert_tokenizer,
    original_file,
)
from device_runtime.tokenization.settings_files import SURROGATE, read_text
from host_tools.checkpoint.config_values import MAX_NUMBER
from host_tools.checkpoint.reader import CONFIG_JSON
from host_tools.json_file import read_json

TOKENIZER_FILES = (
    names.TOKENIZER_JSON,
    names.TOKENIZER_CONFIG,
    names.SPECIAL_TOKENS_MAP,
    names.GENERATION_CONFIG,
    *ORIGINAL_FILES,
)
"""What is copied where it exists; the first is made from an original where it does not."""

_SAMPLING_OFF = SamplingDefaults(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
)
"""What null means in generation_config.json, to vLLM and to transformers before 5: that nothing is
changed or left out. transformers 5 takes its own defaults then, of which only top_k, 50, differs
(``GenerationConfig._get_default_generation_params``).
"""

_ALL_TOKENS = -1
"""vLLM's other way to say that top_k is off (``SamplingParams``)."""


@dataclass(frozen=True)
class SourceTokenizer:
    """The tokenizer of a checkpoint and the settings that lie beside it.

    Attributes:
        folder: the checkpoint.
        tokenizer: its tokenizer.json, or the same made from its original.
        converted: what was made from an original, None where there is a tokenizer.json.
        config: tokenizer_config.json, empty when there is none.
        special_map: special_tokens_map.json, likewise.
        generation: generation_config.json, empty when there is none.
        model_config: config.json.
    """

    folder: Path
    tokenizer: Tokenizer
    converted: ConvertedTokenizer | None
    config: Mapping[str, object]
    special_map: Mapping[str, object]
    generation: Mapping[str, object]
    model_config: Mapping[str, object]

    @classmethod
    def open(cls, folder: Path, vocab_size: int) -> SourceTokenizer:
        """Read tokenizer and settings.

        Args:
            folder: the checkpoint.
            vocab_size: rows of its embedding, above every token id.

        Raises:
            PackageError: there is no tokenizer.json and nothing to make it from, what there is is
                damaged, or an id has no embedding.
        """
        path = folder / names.TOKENIZER_JSON
        converted = None
        if not path.is_file():
            converted = _convert(folder, vocab_size)
            path, tokenizer = converted.path, converted.tokenizer
        else:
            text = read_text(path, MAX_TOKENIZER_BYTES)
            tokenizer = build_tokenizer(text, str(path), is_thorough=True)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest < vocab_size:
            raise PackageError(
                f"{path} has the token id {largest}, the embedding has {vocab_size} rows; "
                "tokenizer and checkpoint do not belong together"
            )

        def settings(name: str) -> Mapping[str, object]:
            return read_json(folder / name) if (folder / name).is_file() else {}

        return cls(
            folder=folder,
            tokenizer=tokenizer,
            converted=converted,
            config=settings(names.TOKENIZER_CONFIG),
            special_map=settings(names.SPECIAL_TOKENS_MAP),
            generation=settings(names.GENERATION_CONFIG),
            model_config=settings(CONFIG_JSON),
        )

    @property
    def bos_id(self) -> int | None:
        """The id that starts a text, None when the model has none."""
        found = self._ids("bos")
        return found[0] if found else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; the tokenizer's own comes first."""
        return self._ids("eos")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself starts every text with bos."""
        ids = self.tokenizer.encode("a", add_special_tokens=True).ids
        if bool(ids) and ids[0] == self.bos_id:
            return True
        return self.bos_id is not None and self.config.get("add_bos_token") is True

    def copy_to(self, folder: Path) -> list[Path]:
        """Copy the tokenizer's files, write what was converted, and return the new paths."""
        folder.mkdir(parents=True, exist_ok=True)
        found = [name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        paths = [Path(shutil.copyfile(self.folder / name, folder / name)) for name in found]
        if self.converted is not None:
            paths.append(folder / names.TOKENIZER_JSON)
            paths[-1].write_text(self.converted.text, encoding="utf-8")
        return paths

    def sampling_defaults(self, base: SamplingDefaults) -> SamplingDefaults:
        """Return ``base`` with what generation_config.json asks for.

        Raises:
            PackageError: a value there is outside its range.
        """
        given = asdict(base)
        for name, off in asdict(_SAMPLING_OFF).items():
            if name not in self.generation:
                continue
            value = self.generation[name]
            if value is None or (name == "top_k" and value == _ALL_TOKENS):
                value = off
            kind = type(off)
            # NaN is not below anything, and MAX_NUMBER is below what has no float.
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not abs(value) < MAX_NUMBER
                or kind(value) != value
            ):
                raise PackageError(
                    f"{names.GENERATION_CONFIG} in {self.folder} says {name} {str(value)[:40]}, "
                    f"expected a {'whole ' if kind is int else ''}number"
                )
            given[name] = kind(value)
        if self.generation.get("do_sample") is False:
            given["temperature"] = 0.0  # the likeliest token, whatever else is said
        if fault := sampling_fault(**given):
            raise PackageError(f"{names.GENERATION_CONFIG} in {self.folder}: {fault}")
        return SamplingDefaults(**given)

    def _ids(self, kind: str) -> tuple[int, ...]:
        """Return the ids of bos or eos from all places that name one, each once."""
        found: list[int] = []
        token = self.config.get(f"{kind}_token") or self.special_map.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is None and self.converted is not None:
            text = self.converted.bos_token if kind == "bos" else self.converted.eos_token
        if isinstance(text, str) and SURROGATE.search(text) is None:  # no token holds one
            token_id = self.tokenizer.token_to_id(text)
            if token_id is not None:
                found.append(token_id)
        for source in (self.generation, self.model_config):
            found.extend(_integers(source.get(f"{kind}_token_id")))
        known = self.tokenizer.get_vocab_size(with_added_tokens=True)
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=known)
        return tuple(dict.fromkeys(token_id for token_id in found if 0 <= token_id <= largest))


def _convert(folder: Path, vocab_size: int) -> ConvertedTokenizer:
    if original_file(folder) is None:
        raise PackageError(
            f"{folder} has no {names.TOKENIZER_JSON}, save the checkpoint with a fast "
            "tokenizer (AutoTokenizer.save_pretrained) and convert again"
        )
    return convert_tokenizer(folder, vocab_size)


def _integers(value: object) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
