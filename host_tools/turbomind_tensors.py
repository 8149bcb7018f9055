"""Turns the weights of a checkpoint into the tensors of a TurboMind workspace (spec 1.2 to 1.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from device_runtime.package_format import fusion, int4, names
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.rotary import to_pairs
from device_runtime.package_format.tensors import BF16_BITS, padded_vocab_size
from host_tools.checkpoint import Checkpoint, DenseLinear, LayerWeights, Linear, QuantizedLinear

NamedTensor = tuple[str, NDArray[Any]]


def global_tensors(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[NamedTensor]:
    """Yield embedding, final norm and head; the head is left out when it is tied.

    Args:
        checkpoint: the source.
        model: the target, with its weight type and number of ranks.
    """
    yield names.TOK_EMBEDDINGS, _padded(checkpoint.embedding(), model, names.TOK_EMBEDDINGS)
    yield names.FINAL_NORM, float_array(checkpoint.final_norm(), model, names.FINAL_NORM)
    if not model.tie_word_embeddings:
        yield names.OUTPUT, _padded(checkpoint.head(), model, names.OUTPUT)


def layer_tensors(weights: LayerWeights, model: ModelConfig, layer: int) -> Iterator[NamedTensor]:
    """Yield every tensor of one decoder layer, all ranks, one linear in memory at a time.

    Args:
        weights: the layer as the checkpoint has it.
        model: the target, with its weight type and number of ranks.
        layer: its number.

    Raises:
        PackageError: a value is too large for fp16, or the layer mixes int4 and float linears.
    """
    yield from _norms(weights, model, layer)
    ranks = model.tensor_para_size
    if model.weight_type == "int4":
        yield from _int4_linears(weights, model, layer)
    else:
        yield from _float_linears(weights, model, layer)
    if model.has_attention_bias:
        q, k, v = (
            _bias(linear, model, f"layers.{layer}") for linear in (weights.q, weights.k, weights.v)
        )
        for rank, part in enumerate(fusion.fuse_qkv(_pairs(q, model), _pairs(k, model), v, ranks)):
            yield names.layer_tensor(layer, names.W_QKV, rank, names.BIAS), part
        output = _bias(weights.o, model, f"layers.{layer}")
        for rank in range(ranks):
            yield names.layer_tensor(layer, names.WO, rank, names.BIAS), output


def float_array(tensor: torch.Tensor, model: ModelConfig, name: str) -> NDArray[Any]:
    """Return a float tensor in the workspace's element type, rounded to nearest even.

    Args:
        tensor: of any shape and float dtype.
        model: the target; bf16 models get the raw bits, all others fp16.
        name: of the tensor, for the error.

    Raises:
        PackageError: a value does not fit in fp16.
    """
    if model.weight_type == "bf16":
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16)
        return cast(NDArray[Any], bits.numpy().view(BF16_BITS))
    converted = tensor.to(torch.float16)
    if tensor.dtype != torch.float16 and tensor.numel():
        low, high = torch.aminmax(converted)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise PackageError(
                f"{name} holds {float(tensor.abs().max()):g}, fp16 ends at 65504; "
                f"such a checkpoint cannot be converted"
            )
    return converted.contiguous().numpy()


def _norms(weights: LayerWeights, model: ModelConfig, layer: int) -> Iterator[NamedTensor]:
    for module, norm in (
        (names.ATTENTION_NORM, weights.attention_norm),
        (names.FFN_NORM, weights.ffn_norm),
        (names.Q_NORM, weights.q_norm),
        (names.K_NORM, weights.k_norm),
    ):
        if norm is not None:
            name = names.layer_tensor(layer, module, None, names.WEIGHT)
            array = float_array(norm, model, name)
            yield name, _pairs(array, model) if module in (names.Q_NORM, names.K_NORM) else array


def _float_linears(weights: LayerWeights, model: ModelConfig, layer: int) -> Iterator[NamedTensor]:
    ranks = model.tensor_para_size

    def columns(linear: Linear) -> NDArray[Any]:
        """Return ``[in, out]``, the transpose of what a checkpoint stores."""
        if not isinstance(linear, DenseLinear):
            raise _mixed(layer)
        return float_array(linear.weight.T, model, f"a weight of layers.{layer}")

    def parts(module: str, arrays: list[NDArray[Any]]) -> Iterator[NamedTensor]:
        for rank, array in enumerate(arrays):
            name = names.layer_tensor(layer, module, rank, names.WEIGHT)
            yield name, np.ascontiguousarray(array)

    q, k = (_pairs(columns(linear), model) for linear in (weights.q, weights.k))
    yield from parts(names.W_QKV, fusion.fuse_qkv(q, k, columns(weights.v), ranks))
    yield from parts(names.WO, fusion.split_rows(columns(weights.o), ranks))
    yield from parts(names.W1, fusion.split_columns(columns(weights.gate), ranks))
    yield from parts(names.W3, fusion.split_columns(columns(weights.up), ranks))
    yield from parts(names.W2, fusion.split_rows(columns(weights.down), ranks))


def _int4_linears(weights: LayerWeights, model: ModelConfig, layer: int) -> Iterator[NamedTensor]:
    ranks = model.tensor_para_size

    def fields(linear: Linear) -> list[NDArray[Any]]:
        """Return codes, zeros and scales, which are all arranged alike."""
        if not isinstance(linear, QuantizedLinear):
            raise _mixed(layer)
        return [linear.codes.numpy(), linear.zeros.numpy(), linear.scales.numpy()]

    def packed(module: str, *split: list[NDArray[Any]]) -> Iterator[NamedTensor]:
        for rank, (codes, zeros, scales) in enumerate(zip(*split, strict=True)):
            yield (
                names.layer_tensor(layer, module, rank, names.QWEIGHT),
                int4.pack_words(np.ascontiguousarray(codes)),
            )
            yield (
                names.layer_tensor(layer, module, rank, names.SCALES_ZEROS),
                int4.pack_scales_zeros(scales, zeros),
            )

    qkv = zip(fields(weights.q), fields(weights.k), fields(weights.v), strict=True)
    yield from packed(
        names.W_QKV,
        *(fusion.fuse_qkv(_pairs(q, model), _pairs(k, model), v, ranks) for q, k, v in qkv),
    )
    yield from packed(names.WO, *(fusion.split_rows(field, ranks) for field in fields(weights.o)))
    gate_up = zip(fields(weights.gate), fields(weights.up), strict=True)
    yield from packed(
        names.W13,
        *(fusion.split_columns(fusion.fuse_w13(gate, up), ranks) for gate, up in gate_up),
    )
    yield from packed(
        names.W2, *(fusion.split_rows(field, ranks) for field in fields(weights.down))
    )


def _pairs(columns: NDArray[Any], model: ModelConfig) -> NDArray[Any]:
    return to_pairs(columns, model.head_dim)


def _bias(linear: Linear, model: ModelConfig, name: str) -> NDArray[Any]:
    """Return the bias, or zeros where the family has none (Qwen2's output projection)."""
    if linear.bias is not None:
        return float_array(linear.bias, model, f"a bias of {name}")
    weight = linear.weight if isinstance(linear, DenseLinear) else linear.codes.T
    return float_array(torch.zeros(weight.shape[0]), model, name)


def _padded(table: torch.Tensor, model: ModelConfig, name: str) -> NDArray[Any]:
    """Return an embedding with zero rows up to a multiple of the ranks (spec section 1.2)."""
    array = float_array(table, model, name)
    missing = padded_vocab_size(model) - array.shape[0]
    return array if not missing else np.pad(array, ((0, missing), (0, 0)))


def _mixed(layer: int) -> PackageError:
    return PackageError(
        f"layers.{layer} mixes int4 and float linears, which TurboMind's files cannot; "
        f"quantize every linear of the decoder layers"
    )
