"""Puts a base checkpoint and a LoRA adapter into one folder that every stage reads as one model.

The base's weights are linked to, not copied; the adapter lies in a folder inside, and the reader
merges it on the fly. Whatever hashes the folder so hashes base and adapter.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.durable import write_atomically
from host_tools.checkpoint_folder import check_folder, folder_name
from host_tools.checkpoint_names import (
    ADAPTER_CONFIG,
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    PICKLED,
    SAFETENSORS,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
)
from host_tools.origin import Origin, read_origin, write_origin
from host_tools.output_folder import behind_link, check_outside, replace_folder
from host_tools.progress import Progress
from host_tools.stage import RECORD_DIR, exclusive

MARK = f"{RECORD_DIR}/adapted.json"
"""Says that a folder was made here; one without it is not replaced."""


def adapt(base: Path, adapter: Path, output: Path, progress: Progress) -> Path:
    """Make the folder of a base under an adapter.

    An adapter that brings a tokenizer brings all of it, and its chat template; else the base's
    stay.

    Args:
        base: folder of a floating-point checkpoint.
        adapter: folder of a LoRA adapter.
        output: is made, or made again.
        progress: hears of it.

    Returns:
        ``output``.

    Raises:
        UsageError: ``output`` holds something else or lies in the base.
        PackageError: the base has an adapter already, or the adapter's folder lacks its files or
            has a link that leads out of it.
    """
    output = behind_link(output)
    check_outside(base, output)
    check_folder(adapter)
    _check_adapter(adapter)
    if (base / ADAPTER_DIR / ADAPTER_CONFIG).is_file():
        raise PackageError(f"{base} has an adapter already, name the base alone")
    if output.exists() and not (output / MARK).is_file():
        raise UsageError(f"{output} exists and is no base with an adapter, name another folder")
    part = output.with_name(f".{output.name}.part")
    with exclusive(part):
        for path in part.iterdir():
            if path.name != RECORD_DIR:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _fill(base, adapter, part)
        origin = read_origin(base, is_quantized=False)
        write_origin(part, _adapted(origin, adapter))
        mark = {"base": str(base.resolve()), "adapter": str(adapter.resolve())}
        write_atomically(part / MARK, json.dumps(mark, indent=1).encode())
        replace_folder(part, output)
    progress.note(f"fetch: {output} is {base} with the adapter {adapter}")
    return output


def _check_adapter(adapter: Path) -> None:
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise PackageError(f"{adapter} has no {ADAPTER_CONFIG}, name the folder of a LoRA adapter")
    if not any((adapter / name).is_file() for name in ADAPTER_WEIGHTS):
        raise PackageError(
            f"{adapter} has no {' or '.join(ADAPTER_WEIGHTS)}, name the folder of a LoRA adapter"
        )


def _fill(base: Path, adapter: Path, folder: Path) -> None:
    brings_tokenizer = any((adapter / name).is_file() for name in VOCABULARY_FILES)
    for path in sorted(base.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix in (SAFETENSORS, PICKLED):
            (folder / path.name).symlink_to(path.resolve())
        elif not (brings_tokenizer and path.name in TOKENIZER_FILES):
            shutil.copy2(path, folder / path.name)
    if brings_tokenizer:
        for name in TOKENIZER_FILES:
            if (adapter / name).is_file():
                shutil.copy2(adapter / name, folder / name)
    inside = folder / ADAPTER_DIR
    inside.mkdir()
    shutil.copy2(adapter / ADAPTER_CONFIG, inside / ADAPTER_CONFIG)
    weights = next(name for name in ADAPTER_WEIGHTS if (adapter / name).is_file())
    (inside / weights).symlink_to((adapter / weights).resolve())


def _adapted(origin: Origin, adapter: Path) -> Origin:
    source = f"{origin.provenance.source} + {folder_name(adapter)}"
    return Origin(replace(origin.provenance, source=source), origin.method)
