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
from host_tools.checkpoint.mixed import FUSED
from host_tools.int8_head import quantize_rows

NamedTensor = tuple[str, NDArray[Any]]


def global_tensors(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[NamedTensor]:
    """Yield embedding, final norm and head; a tied head is left out, unless it is int8.

    Args:
        checkpoint: the source.
        model: the target, with its weight type and number of ranks.
    """
    yield names.TOK_EMBEDDINGS, _padded(checkpoint.embedding(), model, names.TOK_EMBEDDINGS)
    yield names.FINAL_NORM, float_array(checkpoint.final_norm(), model, names.FINAL_NORM)
    if model.head_type == "int8":
        codes, scales = quantize_rows(checkpoint.head())
        missing = padded_vocab_size(model) - len(codes)
        yield names.OUTPUT_QWEIGHT, np.pad(codes.numpy(), ((0, missing), (0, 0)))
        yield names.OUTPUT_SCALES, np.pad(scales.numpy(), (0, missing))
    elif not model.tie_word_embeddings:
        yield names.OUTPUT, _padded(checkpoint.head(), model, names.OUTPUT)


def layer_tensors(weights: LayerWeights, model: ModelConfig, layer: int) -> Iterator[NamedTensor]:
    """Yield every tensor of one decoder layer, all ranks, one linear in memory at a time.

    Args:
        weights: the layer as the checkpoint has it.
        model: the target, with its weight type, fp16 linears and number of ranks.
        layer: its number.

    Raises:
        PackageError: a value is too large for fp16 or bf16, or an int4 linear is floating-point.
    """
    yield from _norms(weights, model, layer)
    ranks = model.tensor_para_size
    for module in names.LAYER_LINEARS:
        if model.is_quantized(layer, module):
            yield from _int4_linear(weights, model, layer, module)
        else:
            yield from _float_linear(weights, model, layer, module)
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
        PackageError: a value does not fit in the element type.
    """
    is_bf16 = model.weight_type == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float16
    converted = tensor.to(dtype).contiguous()
    if tensor.dtype != dtype and tensor.numel():
        low, high = torch.aminmax(converted)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise PackageError(
                f"{name} holds {float(tensor.abs().max()):g}, {'bf16' if is_bf16 else 'fp16'} ends "
                f"at {torch.finfo(dtype).max:g}; such a checkpoint cannot be converted"
            )
    if is_bf16:
        return cast(NDArray[Any], converted.view(torch.int16).numpy().view(BF16_BITS))
    return converted.numpy()


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


def _float_linear(
    weights: LayerWeights, model: ModelConfig, layer: int, module: str
) -> Iterator[NamedTensor]:
    """Yield a linear as LMDeploy writes floating-point ones; gate and up stay apart."""
    if module == names.W13:
        parts = {names.W1: [weights.gate], names.W3: [weights.up]}
    else:
        parts = {module: [weights.linear(name) for name in FUSED[module]]}
    for name, linears in parts.items():
        arrays = [_columns(linear, model, layer) for linear in linears]
        for rank, array in enumerate(_of_ranks(name, arrays, model)):
            tensor = names.layer_tensor(layer, name, rank, names.WEIGHT)
            yield tensor, np.ascontiguousarray(array)


def _int4_linear(
    weights: LayerWeights, model: ModelConfig, layer: int, module: str
) -> Iterator[NamedTensor]:
    """Yield words and scales of a 4-bit linear; codes, zeros and scales are arranged alike."""
    fields = zip(*(_fields(weights.linear(name), layer) for name in FUSED[module]), strict=True)
    split = [_of_ranks(module, list(field), model) for field in fields]
    for rank, (codes, zeros, scales) in enumerate(zip(*split, strict=True)):
        yield (
            names.layer_tensor(layer, module, rank, names.QWEIGHT),
            int4.pack_words(np.ascontiguousarray(codes)),
        )
        yield (
            names.layer_tensor(layer, module, rank, names.SCALES_ZEROS),
            int4.pack_scales_zeros(scales, zeros),
        )


def _of_ranks(module: str, arrays: list[NDArray[Any]], model: ModelConfig) -> list[NDArray[Any]]:
    """Return each rank's ``[rows, columns]`` of the arrays that a module fuses."""
    ranks = model.tensor_para_size
    if module == names.W_QKV:
        q, k, v = arrays
        return fusion.fuse_qkv(_pairs(q, model), _pairs(k, model), v, ranks)
    if module == names.W13:
        return fusion.split_columns(fusion.fuse_w13(*arrays), ranks)
    (array,) = arrays
    if module in (names.W1, names.W3):
        return fusion.split_columns(array, ranks)
    return fusion.split_rows(array, ranks)


def _columns(linear: Linear, model: ModelConfig, layer: int) -> NDArray[Any]:
    """Return ``[in, out]``, the transpose of what a checkpoint stores; codes dequantized."""
    return float_array(linear.weight.T, model, f"a weight of layers.{layer}")


def _fields(linear: Linear, layer: int) -> list[NDArray[Any]]:
    """Return codes, zeros and scales.

    Raises:
        PackageError: the linear is floating-point.
    """
    if not isinstance(linear, QuantizedLinear):
        raise PackageError(
            f"layers.{layer} has a floating-point linear where the package has 4-bit ones; "
            f"quantize every linear of the decoder layers, or keep it with --keep-fp16"
        )
    return [linear.codes.numpy(), linear.zeros.numpy(), linear.scales.numpy()]


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
