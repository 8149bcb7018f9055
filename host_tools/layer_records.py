"""What quantize notes about every layer for the report of a build: errors, clipping, seconds.

One small JSON file lies beside each finished layer, so that a run that goes on after a kill keeps
what it noted; at the end they become one file of the work folder. Nothing here shapes a result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from device_runtime.errors import PackageError
from device_runtime.package_format import strict_json
from device_runtime.package_format.durable import write_atomically

LAYER_RECORDS = "layer_records.json"
"""In the work folder, beside the statistics."""
MAX_RECORD_BYTES = 64 << 20
CLIP_STEPS = 40
"""Kept shares of a group's range are counted to the nearest 1/40, from 0 to 1."""

Record = TypeVar("Record")
LinearName = Literal["q", "k", "v", "o", "gate", "up", "down"]
LINEARS: tuple[LinearName, ...] = get_args(LinearName)


@dataclass(frozen=True)
class LinearRecord:
    """How one linear came out.

    Errors are means over the calibration's tokens of ``|W' x - W x|^2``, summed over outputs, in
    units of the linear's own output before any scaling (a producer's row scales undone); None for
    a step that was not taken. Here ``x`` comes from the layers that are quantized already, and
    ``W`` is what the linear aims at then. A linear that stays fp16 has none of them.

    Attributes:
        linear: q, k, v, o, gate, up or down.
        num_outputs: rows of the checkpoint's weight.
        num_inputs: columns of it.
        w_bits: 4, or 16 for one that stays fp16.
        signal: mean of ``|W x|^2``; an error divided by it is relative.
        rounded: error when plainly rounded to nearest.
        scaled: with the chosen channel scales, ranges unclipped.
        clipped: with clipped ranges as well.
        compensated: of the codes that are stored, where they are not the nearest ones.
        scale_ratio: exponent of the activations in the channel scales.
        clip_counts: groups by the kept share of their range, `CLIP_STEPS` + 1 counts: number i
            counts shares nearest to i / `CLIP_STEPS`; empty when ranges were not searched.
    """

    linear: LinearName
    num_outputs: int
    num_inputs: int
    w_bits: int
    signal: float | None = None
    rounded: float | None = None
    scaled: float | None = None
    clipped: float | None = None
    compensated: float | None = None
    scale_ratio: float | None = None
    clip_counts: tuple[int, ...] = ()

    @property
    def final(self) -> float | None:
        """Error of what is stored, None where nothing was measured."""
        errors = (self.compensated, self.clipped, self.scaled, self.rounded)
        return next((error for error in errors if error is not None), None)


@dataclass(frozen=True)
class LayerSeconds:
    """Where the time of one layer went.

    Attributes:
        forward_s: running the layer over the calibration's tokens.
        search_s: scales, clipping and compensation.
        packing_s: codes into words.
        disk_s: reading weights and writing results.
    """

    forward_s: float = 0.0
    search_s: float = 0.0
    packing_s: float = 0.0
    disk_s: float = 0.0


@dataclass(frozen=True)
class LayerRecord:
    """One decoder layer.

    Attributes:
        layer: its number.
        linears: in the order q, k, v, o, gate, up, down.
        seconds: that it took.
    """

    layer: int
    linears: tuple[LinearRecord, ...]
    seconds: LayerSeconds = LayerSeconds()


@dataclass(frozen=True)
class QuantizeRecord:
    """One quantization.

    Attributes:
        fingerprint: of the stage; tells whether the record is that of the folder in use.
        method: awq, rtn and the like.
        group_size: of the codes.
        device: what computed, in words ("NVIDIA H200, torch 2.9.1, searched by Triton kernels").
        layers: in order.
    """

    fingerprint: str
    method: str
    group_size: int
    device: str
    layers: tuple[LayerRecord, ...]


def clip_counts(kept_shares: Iterable[float]) -> tuple[int, ...]:
    """Return how many groups kept which share of their range.

    Args:
        kept_shares: each from 0 to 1; ``tensor.flatten().tolist()`` does.
    """
    counts = [0] * (CLIP_STEPS + 1)
    for share in kept_shares:
        counts[min(CLIP_STEPS, max(0, round(share * CLIP_STEPS)))] += 1
    return tuple(counts)


def write_layer_record(path: Path, record: LayerRecord) -> None:
    """Write one layer's record, whole or not at all."""
    write_atomically(path, _to_json(record))


def read_layer_record(path: Path) -> LayerRecord:
    """Read one layer's record.

    Raises:
        PackageError: it is not there, or is none.
    """
    return _from_json(LayerRecord, path)


def write_quantize_record(work_dir: Path, record: QuantizeRecord) -> Path:
    """Write the record of a whole quantization into the work folder."""
    path = work_dir / LAYER_RECORDS
    write_atomically(path, _to_json(record))
    return path


def read_quantize_record(work_dir: Path) -> QuantizeRecord | None:
    """Read what :func:`write_quantize_record` wrote, None when it is not there.

    Raises:
        PackageError: the file is damaged.
    """
    path = work_dir / LAYER_RECORDS
    return _from_json(QuantizeRecord, path) if path.is_file() else None


def _to_json(record: object) -> bytes:
    return json.dumps(strict_json.encode(record), separators=(",", ":")).encode("ascii")


def _from_json(kind: type[Record], path: Path) -> Record:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}") from error
    value = strict_json.parse_object(text, path.name, MAX_RECORD_BYTES)
    return strict_json.decode(kind, value, path.name)
