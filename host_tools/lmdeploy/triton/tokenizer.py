"""The tokenizer of a workspace for the Triton server: text to ids and back by tokenizer.json.

This file is copied into ``triton_models/tokenizer`` and imported there by the models
``preprocessing`` and ``postprocessing``; it needs the library `tokenizers` and nothing else.
"""

# Python 3.8 runs this too: the image of LMDeploy has no newer one.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer


class Tokenizer:
    """Encodes prompts and decodes answers.

    Args:
        folder: the folder of tokenizer.json.
        bos_id: id that starts a text, None when the model has none.
        eos_id: id that ends an answer.
        add_bos: whether a text starts with ``bos_id``.
    """

    def __init__(self, folder: Path, bos_id: int | None, eos_id: int, add_bos: bool) -> None:
        self._tokenizer = FastTokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._add_bos = add_bos

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; ``<BOS>`` and ``<EOS>`` are asked for by LMDeploy's client."""
        if text == "<BOS>":
            return [-1 if self.bos_id is None else self.bos_id]
        if text == "<EOS>":
            return [self.eos_id]
        ids: list[int] = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if self._add_bos and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def open_tokenizer(folder: Path, parameters: Mapping[str, Mapping[str, str]]) -> Tokenizer:
    """Open the tokenizer as the ``parameters`` of a config.pbtxt say.

    Args:
        folder: of the Triton model, the one with the link ``tokenizer``.
        parameters: the server's: key -> {"string_value": text}.
    """

    def number(key: str) -> int | None:
        text = parameters[key]["string_value"]
        return int(text) if text else None

    eos_id = number("eos_id")
    return Tokenizer(
        folder / "tokenizer",
        bos_id=number("bos_id"),
        eos_id=0 if eos_id is None else eos_id,
        add_bos=number("add_bos") == 1,
    )
