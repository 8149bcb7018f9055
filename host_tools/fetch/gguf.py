"""Turns a GGUF file into a Hugging Face checkpoint in fp16, one tensor after another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import quants
from numpy.typing import NDArray

from device_runtime.errors import FetchError, PackageError
from device_runtime.package_format import names
from device_runtime.package_format.amounts import format_bytes
from device_runtime.package_format.durable import write_atomically
from device_runtime.package_format.rotary import to_halves
from host_tools.checkpoint_names import CONFIG_JSON
from host_tools.fetch.gguf_header import GgufHeader, GgufTensor, read_header
from host_tools.fetch.gguf_metadata import Metadata
from host_tools.fetch.gguf_model import GgufModel, SourceTensor, describe_model
from host_tools.fetch.gguf_tokenizer import RebuiltTokenizer, rebuild_tokenizer
from host_tools.progress import BYTES, Progress, Task
from host_tools.shards import TensorPlan, write_shards

PART_VALUES = 1 << 22
"""Values dequantized at a time: 16 MB of fp32 and as much again inside the library."""

SPARE_BYTES = 64 << 20
"""Room asked for beside the weights: tokenizer, index, the file system's own books."""


def convert_gguf(source: Path, folder: Path, progress: Progress) -> list[Path]:
    """Write the checkpoint that a GGUF file holds: weights, configs and tokenizer.

    Memory holds one part of one tensor; q and k of the families in pair order are whole.

    Args:
        source: the GGUF file.
        folder: an empty folder for the checkpoint.
        progress: told the bytes of fp16 weights.

    Returns:
        The files of the checkpoint, config.json last.

    Raises:
        PackageError: the file is damaged, hostile, or holds a model that does not run here.
        FetchError: the disk has too little room.
    """
    header = read_header(source)
    model = describe_model(header)
    tokenizer = rebuild_tokenizer(Metadata(header), model.vocab_size)
    plans = [TensorPlan(tensor.name, "float16", tensor.shape) for tensor in model.tensors]
    total = sum(plan.num_bytes for plan in plans)
    _check_room(folder, total + SPARE_BYTES, source.name)
    for tensor in model.tensors:
        _check_kind(header.tensors[tensor.source], source.name)
    with progress.task(f"dequantize {source.name}", total, BYTES) as task:
        parts = (_count(_fp16_parts(header, tensor), task) for tensor in model.tensors)
        files = write_shards(folder, plans, parts)
    return [*files, *_write_texts(folder, model, tokenizer)]


def _check_room(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FetchError(
            f"{what} needs {format_bytes(needed)} in {folder}, but {format_bytes(free)} are free"
        )


def _check_kind(tensor: GgufTensor, file_name: str) -> None:
    """Find out with one block whether the library can dequantize a tensor.

    Raises:
        PackageError: it cannot.
    """
    blank = np.zeros((1, tensor.num_bytes // _num_rows(tensor)), np.uint8)
    try:
        quants.dequantize(blank, tensor.kind)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise PackageError(
            f"tensor {tensor.name!r} of {file_name} is stored as {tensor.kind.name}, which cannot "
            "be dequantized"
        ) from error


def _num_rows(tensor: GgufTensor) -> int:
    return int(np.prod(tensor.shape[:-1], dtype=np.int64))


def _fp16_parts(header: GgufHeader, tensor: SourceTensor) -> Iterator[NDArray[np.float16]]:
    stored = header.tensors[tensor.source]
    parts = _dequantized_parts(header.path, stored)
    if not tensor.rotary_head_dim:
        yield from parts
        return
    whole = np.concatenate(list(parts))
    order = to_halves(np.arange(whole.shape[0]), tensor.rotary_head_dim)
    yield whole[order]


def _dequantized_parts(path: Path, tensor: GgufTensor) -> Iterator[NDArray[np.float16]]:
    """Yield the rows of a tensor as ``[rows, columns]`` fp16, or ``[columns]`` for a vector.

    Raises:
        PackageError: a value is not finite in fp16.
    """
    columns = tensor.shape[-1]
    num_rows = _num_rows(tensor)
    rows_at_once = max(1, PART_VALUES // columns)
    rows = np.memmap(path, np.uint8, "r", tensor.offset, (num_rows, tensor.num_bytes // num_rows))
    for start in range(0, num_rows, rows_at_once):
        stop = min(num_rows, start + rows_at_once)
        with np.errstate(all="ignore"):
            values = quants.dequantize(np.ascontiguousarray(rows[start:stop]), tensor.kind)
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise PackageError(
                f"tensor {tensor.name!r} of {path.name} holds values beyond the range of fp16 or "
                "none at all (NaN)"
            )
        yield halves if len(tensor.shape) > 1 else halves.reshape(-1)


def _count(parts: Iterator[NDArray[np.float16]], task: Task) -> Iterator[NDArray[np.float16]]:
    for part in parts:
        yield part
        task.advance(part.nbytes)


def _write_texts(folder: Path, model: GgufModel, tokenizer: RebuiltTokenizer) -> list[Path]:
    special = tokenizer.special
    stops: object = list(special.stops) if len(special.stops) > 1 else special.eos
    generation = {
        "bos_token_id": special.bos,
        "eos_token_id": stops,
        "pad_token_id": special.pad,
    }
    ids = {"bos_token_id": special.bos, "eos_token_id": special.eos}
    texts = {
        names.TOKENIZER_JSON: tokenizer.text,
        names.TOKENIZER_CONFIG: tokenizer.config,
        names.GENERATION_CONFIG: _json({k: v for k, v in generation.items() if v is not None}),
        CONFIG_JSON: _json({**model.config, **{k: v for k, v in ids.items() if v is not None}}),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in texts]


def _json(facts: dict[str, object]) -> str:
    return json.dumps(facts, indent=2)
