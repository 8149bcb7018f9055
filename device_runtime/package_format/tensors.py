"""Every weight file of a package: name, element type, shape, split (spec sections 1.2-1.4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.int4 import CODES_PER_WORD, TILE
from device_runtime.package_format.kv_scale import FILE_BYTES
from device_runtime.package_format.model_config import ModelConfig

Split = Literal["none", "columns", "rows", "copy"]

FP16 = np.dtype("<f2")
BF16_BITS = np.dtype("<u2")
"""bfloat16 travels as its raw 16 bits; `bfloat16.py` widens and rounds."""
UINT32 = np.dtype("<u4")
INT8 = np.dtype("i1")
FP32 = np.dtype("<f4")


@dataclass(frozen=True)
class TensorSpec:
    """One headerless little-endian file of ``triton_models/weights``.

    Attributes:
        name: file name.
        dtype: element type; uint16 holds bf16 bits, uint32 holds W4 words or (zero, scale).
        shape: C order. W4 words are flat, in the order of section 2.4.
        split: how the ranks' files relate to the whole tensor; "copy" repeats it.
        is_optional: true for the static KV parameters, which come for all layers or none.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    split: Split
    is_optional: bool = False

    @property
    def size_bytes(self) -> int:
        """Exact size of the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def path(self) -> str:
        """Path relative to the root of the package."""
        return names.weight_path(self.name)


@dataclass(frozen=True)
class LinearShape:
    """One rank's part of a fused linear layer, as it is stored.

    Attributes:
        module: for example ``attention.w_qkv``.
        num_inputs: rows of the rank's matrix, K of section 2.
        num_outputs: columns of the rank's matrix, M of section 2.
        split: "columns" or "rows".
        has_bias: whether a bias file goes with it.
        is_quantized: whether it is stored as int4 codes.
    """

    module: str
    num_inputs: int
    num_outputs: int
    split: Split
    has_bias: bool = False
    is_quantized: bool = False


def linear_shapes(model: ModelConfig, layer: int) -> tuple[LinearShape, ...]:
    """Return the linear layers of one decoder layer with the local sizes of one rank.

    Where they are int4, gate and up are fused into w13; else w1 and w3 stay apart (spec sections
    1.2, 1.3).

    Raises:
        PackageError: a size does not split over the ranks, or an int4 layer is not made of
            32 x 32 tiles.
    """
    ranks = model.tensor_para_size
    if model.intermediate_size % ranks:
        raise PackageError(
            f"intermediate_size {model.intermediate_size} is not a multiple of "
            f"tensor_para_size {ranks}"
        )
    inner = model.intermediate_size // ranks
    hidden = model.hidden_size
    bias = model.has_attention_bias
    is_int4 = {module: model.is_quantized(layer, module) for module in names.LAYER_LINEARS}
    gate_up: tuple[LinearShape, ...]
    if is_int4[names.W13]:
        gate_up = (LinearShape(names.W13, hidden, 2 * inner, "columns", False, True),)
    else:
        gate_up = (
            LinearShape(names.W1, hidden, inner, "columns"),
            LinearShape(names.W3, hidden, inner, "columns"),
        )
    qkv = model.qkv_size // ranks
    shapes = (
        LinearShape(names.W_QKV, hidden, qkv, "columns", bias, is_int4[names.W_QKV]),
        LinearShape(names.WO, model.q_size // ranks, hidden, "rows", bias, is_int4[names.WO]),
        *gate_up,
        LinearShape(names.W2, inner, hidden, "rows", False, is_int4[names.W2]),
    )
    for shape in shapes:
        if shape.is_quantized and (shape.num_inputs % TILE or shape.num_outputs % TILE):
            raise PackageError(
                f"{shape.module} is {shape.num_inputs} x {shape.num_outputs} on each of "
                f"{ranks} ranks, int4 needs multiples of {TILE}; use fp16 or fewer ranks"
            )
    return shapes


def padded_vocab_size(model: ModelConfig) -> int:
    """Return vocab_size rounded up to a multiple of the ranks; the rows added are zero."""
    ranks = model.tensor_para_size
    return -(-model.vocab_size // ranks) * ranks


def tensor_specs(model: ModelConfig, *, has_kv_scales: bool = True) -> tuple[TensorSpec, ...]:
    """Return the spec of every weight file of all ranks, in a fixed order.

    Args:
        model: architecture, weight type and number of ranks.
        has_kv_scales: whether to include the optional static KV parameters.

    Raises:
        PackageError: the sizes of the model do not make whole files.
    """
    specs = list(_global_specs(model))
    for layer in range(model.num_hidden_layers):
        specs.extend(_norm_specs(model, layer))
        for shape in linear_shapes(model, layer):
            for rank in range(model.tensor_para_size):
                specs.extend(_linear_specs(model, shape, layer, rank))
        if has_kv_scales:
            specs.extend(
                TensorSpec(
                    names.kv_scale_tensor(layer, rank),
                    FP32,
                    (FILE_BYTES // FP32.itemsize,),
                    "columns",
                    is_optional=True,
                )
                for rank in range(model.tensor_para_size)
            )
    return tuple(specs)


def float_dtype(model: ModelConfig) -> np.dtype[Any]:
    """Return the element type of norms, biases, embeddings and float linears.

    int4 models store every float tensor as fp16.
    """
    return BF16_BITS if model.weight_type == "bf16" else FP16


def _global_specs(model: ModelConfig) -> Iterator[TensorSpec]:
    dtype = float_dtype(model)
    rows = padded_vocab_size(model)
    table = (rows, model.hidden_size)
    yield TensorSpec(names.TOK_EMBEDDINGS, dtype, table, "none")
    yield TensorSpec(names.FINAL_NORM, dtype, (model.hidden_size,), "none")
    if model.head_type == "int8":
        yield TensorSpec(names.OUTPUT_QWEIGHT, INT8, table, "none")
        yield TensorSpec(names.OUTPUT_SCALES, FP16, (rows,), "none")
    elif not model.tie_word_embeddings:
        yield TensorSpec(names.OUTPUT, dtype, table, "none")


def _norm_specs(model: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    modules = [(names.ATTENTION_NORM, model.hidden_size), (names.FFN_NORM, model.hidden_size)]
    if model.has_qk_norm:
        modules += [(names.Q_NORM, model.head_dim), (names.K_NORM, model.head_dim)]
    for module, size in modules:
        name = names.layer_tensor(layer, module, None, names.WEIGHT)
        yield TensorSpec(name, float_dtype(model), (size,), "none")


def _linear_specs(
    model: ModelConfig, shape: LinearShape, layer: int, rank: int
) -> Iterator[TensorSpec]:
    def name(kind: str) -> str:
        return names.layer_tensor(layer, shape.module, rank, kind)

    size = (shape.num_inputs, shape.num_outputs)
    if shape.is_quantized:
        words = (math.prod(size) // CODES_PER_WORD,)
        groups = (shape.num_inputs // model.group_size, shape.num_outputs)
        yield TensorSpec(name(names.QWEIGHT), UINT32, words, shape.split)
        yield TensorSpec(name(names.SCALES_ZEROS), UINT32, groups, shape.split)
    else:
        yield TensorSpec(name(names.WEIGHT), float_dtype(model), size, shape.split)
    if shape.has_bias:
        # Every rank of a row split adds the whole bias once, hence the copy (section 1.2).
        split: Split = "columns" if shape.split == "columns" else "copy"
        yield TensorSpec(name(names.BIAS), float_dtype(model), (shape.num_outputs,), split)
