"""A quick look at a folder: is it a checkpoint at all? The reader checks every tensor later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from device_runtime.errors import PackageError
from host_tools.checkpoint_folder import check_folder
from host_tools.checkpoint_names import (
    ADAPTER_CONFIG,
    CONFIG_JSON,
    GGUF,
    INDEX_SUFFIX,
    PICKLED,
    SAFETENSORS,
    VOCABULARY_FILES,
)
from host_tools.json_file import read_json
from host_tools.shard_index import read_index


def check_checkpoint(folder: Path) -> None:
    """Check that a folder has a config, weights, every shard of its index, and a tokenizer.

    Raises:
        PackageError: one of them is missing or unreadable, or a file is not what it seems.
    """
    check_folder(folder)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_JSON).is_file():
        raise PackageError(
            f"{folder} is an adapter without its base, name the base and give this one as --adapter"
        )
    config = read_json(folder / CONFIG_JSON)
    if "architectures" not in config and "model_type" not in config:
        raise PackageError(
            f"{CONFIG_JSON} in {folder} names no architecture, expected a language model"
        )
    weights = [path for path in sorted(folder.iterdir()) if path.suffix in (SAFETENSORS, PICKLED)]
    if not weights:
        gguf = sorted(path.name for path in folder.glob(f"*{GGUF}"))
        hint = f", pass the file {gguf[0]} instead" if gguf else ""
        raise PackageError(f"{folder} has no {SAFETENSORS} or {PICKLED} weights{hint}")
    indexed = set(_indexed_files(folder))
    missing = sorted(name for name in indexed if not (folder / name).is_file())
    if missing:
        raise PackageError(
            f"{folder} lacks {len(missing)} of the {len(indexed)} weight files that its index "
            f"names, such as {missing[0]!r}, fetch it again"
        )
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise PackageError(
            f"{folder} has no tokenizer, expected one of {', '.join(VOCABULARY_FILES)}"
        )


def _indexed_files(folder: Path) -> Iterator[str]:
    """Yield the file of every tensor in every index whose kind of weights is there."""
    for index in sorted(folder.glob(f"*{INDEX_SUFFIX}")):
        suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
        if suffix == PICKLED and any(folder.glob(f"*{SAFETENSORS}")):
            continue
        yield from read_index(index).values()
