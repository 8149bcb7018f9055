"""Where every weight lies in GPU memory, and which bytes of which file go there.

The words of 4-bit matrices keep TurboMind's order (SPEC.md): a matrix is rows of 32 x 32 tiles.
The ranks of a package are joined while they are copied: columns of ranks side by side, rows of
ranks one after the other, so kernels see one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.regions import aligned
from device_runtime.package_format import names
from device_runtime.package_format.int4 import TILE
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.tensors import TensorSpec, padded_vocab_size, tensor_specs

_RANK_PLACE = -2
"""Part of a split tensor's name that is its rank: layers.3.attention.w_qkv.0.qweight."""


@dataclass(frozen=True)
class Piece:
    """A file, or rank of a tensor, on its way: rows that land ``pitch`` bytes apart.

    Attributes:
        spec: of the file.
        tensor: name of the joined tensor.
        offset: where the first byte goes in the tensor.
        row_bytes: of a row; the whole file where it stays in one piece.
        pitch: from row to row in the tensor.
    """

    spec: TensorSpec
    tensor: str
    offset: int
    row_bytes: int
    pitch: int

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return self.spec.size_bytes // self.row_bytes


@dataclass(frozen=True)
class GatePair:
    """The gate and up matrices of one rank in fp16, whose columns take turns in memory.

    Attributes:
        gate: spec of w1, ``[inputs, columns]``.
        up: spec of w3.
        tensor: name of the joined tensor, that of a fused w13.
        offset: where the rank's first row starts in it.
        pitch: from row to row in the tensor.
    """

    gate: TensorSpec
    up: TensorSpec
    tensor: str
    offset: int
    pitch: int

    @property
    def row_bytes(self) -> int:
        """Of a row of the rank, both matrices together."""
        return 2 * self.gate.size_bytes // self.gate.shape[0]


@dataclass(frozen=True)
class WeightLayout:
    """Tensors in the order in which they lie, with their sizes and pieces.

    ``sizes`` has the joined size of each tensor by name. ``pairs`` are there where gate and up are
    fp16.
    """

    sizes: dict[str, int]
    pieces: tuple[Piece, ...]
    pairs: tuple[GatePair, ...]
    _order: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", tuple(self.sizes))

    @property
    def region_sizes(self) -> list[int]:
        """Bytes of each tensor, in order."""
        return list(self.sizes.values())

    @property
    def num_bytes(self) -> int:
        """Of all tensors, each aligned."""
        return sum(aligned(size) for size in self.sizes.values())

    def places(self, addresses: tuple[int, ...]) -> dict[str, int]:
        """Return the address of each tensor for the addresses of an arena."""
        return dict(zip(self._order, addresses, strict=True))


def weight_layout(model: ModelConfig) -> WeightLayout:
    """Return where a model's weights go; static KV parameters are no part of it."""
    grouped: dict[str, list[TensorSpec]] = {}
    for spec in tensor_specs(model, has_kv_scales=False):
        grouped.setdefault(joined_name(spec), []).append(spec)
    sizes: dict[str, int] = {}
    pieces: list[Piece] = []
    pairs: list[GatePair] = []
    for name, specs in grouped.items():
        if _module_of(name) == names.W3:
            continue
        if _module_of(name) == names.W1:
            ups = grouped[name.replace(names.W1, names.W3)]
            fused = name.replace(names.W1, names.W13)
            sizes[fused] = sum(spec.size_bytes for spec in (*specs, *ups))
            pitch = sizes[fused] // specs[0].shape[0]
            for rank, (gate, up) in enumerate(zip(specs, ups, strict=True)):
                offset = rank * pitch // len(specs)
                pairs.append(GatePair(gate, up, fused, offset, pitch))
            continue
        if specs[0].split == "copy":
            specs = specs[:1]  # every rank has the whole bias, which is added once
        sizes[name] = sum(spec.size_bytes for spec in specs) + _padding_bytes(model, specs[0])
        starts = accumulate((spec.size_bytes for spec in specs), initial=0)
        for rank, (spec, start) in enumerate(zip(specs, starts, strict=False)):
            row_bytes = _row_bytes(model, spec, len(specs))
            is_whole = row_bytes == spec.size_bytes
            offset = start if is_whole else rank * row_bytes
            pitch = row_bytes if is_whole else row_bytes * len(specs)
            pieces.append(Piece(spec, name, offset, row_bytes, pitch))
    return WeightLayout(sizes, tuple(pieces), tuple(pairs))


def joined_name(spec: TensorSpec) -> str:
    """Return the name of a tensor without its rank."""
    if spec.split == "none":
        return spec.name
    parts = spec.name.split(".")
    return ".".join((*parts[:_RANK_PLACE], parts[-1]))


def _module_of(joined: str) -> str:
    """Return the module of a layer's joined tensor, "" of others."""
    parts = joined.split(".")
    return ".".join(parts[2:-1]) if parts[0] == "layers" else ""


def layer_name(layer: int, module: str, kind: str) -> str:
    """Return the name of a layer's joined tensor, ``layers.3.attention.w_qkv.qweight``."""
    return names.layer_tensor(layer, module, None, kind)


def has_half_matrices(model: ModelConfig) -> bool:
    """Tell whether a model has linears in fp16."""
    return model.group_size == 0 or model.is_mixed


def static_kv_parameters(
    scales: tuple[tuple[float, float, float, float], ...], num_kv_heads: int
) -> NDArray[np.float32]:
    """Return ``[num_kv_heads, 4]`` fp32 for the attention kernels of quant_policy 4.

    Args:
        scales: (k scale, k zero point, v scale, v zero point) of each rank.
        num_kv_heads: of all ranks.
    """
    rows = np.array(scales, np.float32)
    return np.repeat(rows, num_kv_heads // len(scales), axis=0)


def padded_rows(model: ModelConfig) -> int:
    """Return the rows of logits that the head computes: the sampler takes 8 at a time.

    Rows past the vocabulary hold whatever memory holds; the sampler does not look at them.
    """
    return aligned(padded_vocab_size(model), 8)


def _padding_bytes(model: ModelConfig, spec: TensorSpec) -> int:
    if spec.name not in (
        names.TOK_EMBEDDINGS,
        names.OUTPUT,
        names.OUTPUT_QWEIGHT,
        names.OUTPUT_SCALES,
    ):
        return 0
    row_bytes = spec.size_bytes // spec.shape[0]
    return (padded_rows(model) - spec.shape[0]) * row_bytes


def _row_bytes(model: ModelConfig, spec: TensorSpec, num_ranks: int) -> int:
    """Return the bytes of one rank's row that stay together."""
    if num_ranks == 1 or spec.split != "columns" or (len(spec.shape) == 1 and not _is_words(spec)):
        return spec.size_bytes
    if _is_words(spec):
        num_inputs = model.hidden_size  # every column split has the hidden states as inputs
        return spec.size_bytes // (num_inputs // TILE)
    return spec.size_bytes // spec.shape[0]


def _is_words(spec: TensorSpec) -> bool:
    return spec.name.endswith(f".{names.QWEIGHT}") and spec.name != names.OUTPUT_QWEIGHT
