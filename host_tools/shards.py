"""Writes safetensors files one tensor after another, so that a model is never in memory whole.

Layout: https://github.com/huggingface/safetensors#format; the library itself writes a file only
from tensors that are all in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import InternalError
from device_runtime.package_format.durable import replacing
from host_tools.checkpoint_names import SAFETENSORS, SAFETENSORS_INDEX, SINGLE_SAFETENSORS

MAX_SHARD_BYTES = 4 << 30

_DTYPES = {"float16": "F16", "float32": "F32", "int32": "I32", "uint8": "U8", "int64": "I64"}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written.

    Attributes:
        name: as the checkpoint calls it.
        dtype: numpy's name ("float16").
        shape: outermost dimension first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Stored size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def split_shards(
    plans: Sequence[TensorPlan], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[tuple[str, list[TensorPlan]]]:
    """Return file names and the tensors of each, in order; one file when all fit in it."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        if groups[-1] and filled + plan.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(plan)
        filled += plan.num_bytes
    if len(groups) == 1:
        return [(SINGLE_SAFETENSORS, groups[0])]
    total = len(groups)
    return [
        (f"model-{number:05d}-of-{total:05d}{SAFETENSORS}", group)
        for number, group in enumerate(groups, 1)
    ]


def write_shards(
    folder: Path,
    plans: Sequence[TensorPlan],
    tensors: Iterable[Iterable[NDArray[np.generic]]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write all tensors into ``folder``, with an index when there are several files.

    Args:
        folder: where the files go; it must exist.
        plans: every tensor, in the order in which it comes.
        tensors: for each plan, the parts of its values, first rows first; dtype as planned.
        max_shard_bytes: a new file is begun before one grows beyond this.

    Returns:
        The files that were written, the index last.

    Raises:
        InternalError: a part has another dtype, or the parts are not as large as planned.
        DeviceError: the disk is full or fails.
    """
    source = iter(tensors)
    shards = split_shards(plans, max_shard_bytes)
    for name, group in shards:
        with replacing(folder / name) as stream:
            stream.write(_header(group))
            for plan in group:
                _write_parts(stream, plan, next(source, ()))
            stream.flush()
            os.fsync(stream.fileno())
    paths = [folder / name for name, _ in shards]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(plan.num_bytes for plan in plans)},
            "weight_map": {plan.name: name for name, group in shards for plan in group},
        }
        paths.append(folder / SAFETENSORS_INDEX)
        paths[-1].write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    return paths


def _header(plans: Sequence[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for plan, (start, end) in zip(plans, _ranges(plans), strict=True):
        entries[plan.name] = {
            "dtype": _DTYPES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _ranges(plans: Sequence[TensorPlan]) -> Iterator[tuple[int, int]]:
    start = 0
    for plan in plans:
        yield start, start + plan.num_bytes
        start += plan.num_bytes


def _write_parts(stream: BinaryIO, plan: TensorPlan, parts: Iterable[NDArray[np.generic]]) -> None:
    written = 0
    for part in parts:
        if part.dtype != np.dtype(plan.dtype):
            raise InternalError(f"tensor {plan.name} came as {part.dtype}, planned {plan.dtype}")
        contiguous = np.ascontiguousarray(part)
        stream.write(contiguous.data)
        written += contiguous.nbytes
    if written != plan.num_bytes:
        raise InternalError(
            f"tensor {plan.name} came with {written} bytes, planned {plan.num_bytes}"
        )
