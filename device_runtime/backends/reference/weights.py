"""A package's weights as fp32 matrices, all at once or one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.package_format import bfloat16, fusion, int4, names
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package
from device_runtime.package_format.tensors import BF16_BITS, LinearShape, linear_shapes

Matrix = NDArray[np.float32]

_HEAD_ROWS = 8192
"""Rows of the output head that are widened at a time when it does not stay in memory."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are ``[outputs, inputs]`` fp32, q and k in pair order.

    ``w_gate_up`` has all gate rows before all up rows. Absent biases and norms are None.
    """

    attention_norm: Matrix
    w_qkv: Matrix
    qkv_bias: Matrix | None
    q_norm: Matrix | None
    k_norm: Matrix | None
    wo: Matrix
    wo_bias: Matrix | None
    ffn_norm: Matrix
    w_gate_up: Matrix
    w_down: Matrix


def layer_weight_bytes(model: ModelConfig) -> int:
    """Return the bytes of one layer as `LayerWeights`."""
    matrices = model.hidden_size * (model.qkv_size + model.q_size + 3 * model.intermediate_size)
    vectors = 2 * model.hidden_size + 2 * model.head_dim + model.qkv_size + model.hidden_size
    return 4 * (matrices + vectors)


def head_weight_bytes(model: ModelConfig) -> int:
    """Return the bytes of the output head in fp32."""
    return 4 * model.vocab_size * model.hidden_size


class Weights:
    """Reads weights through the page cache; the first layers stay in memory as fp32.

    Args:
        package: open package.
        num_resident_layers: layers kept; the others are dequantized again in every step.
        is_head_resident: whether the output head is kept too.
    """

    def __init__(self, package: Package, num_resident_layers: int, is_head_resident: bool) -> None:
        self._package = package
        self._model = package.model
        with ThreadPoolExecutor(max_workers=2) as pool:  # numpy lets go of the interpreter
            self._resident = list(pool.map(self._read_layer, range(num_resident_layers)))
        self._embedding = package.tensor(names.TOK_EMBEDDINGS)
        self.final_norm = self._vector(names.FINAL_NORM)
        self._head = self._head_rows(0, self._model.vocab_size) if is_head_resident else None

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self._model.vocab_size

    def layer(self, index: int) -> LayerWeights:
        """Return a layer's weights."""
        if index < len(self._resident):
            return self._resident[index]
        return self._read_layer(index)

    def embed(self, token_ids: NDArray[np.int32]) -> Matrix:
        """Return the embeddings ``[num_tokens, hidden_size]`` fp32 of tokens."""
        return _widen(self._embedding[token_ids])

    def logits(self, hidden: Matrix) -> Matrix:
        """Return ``[num_tokens, vocab_size]`` fp32 for normed hidden states."""
        logits: Matrix
        if self._head is not None:
            logits = hidden @ self._head.T
            return logits
        logits = np.empty((hidden.shape[0], self._model.vocab_size), np.float32)
        for start in range(0, self._model.vocab_size, _HEAD_ROWS):
            end = min(start + _HEAD_ROWS, self._model.vocab_size)
            np.matmul(hidden, self._head_rows(start, end).T, out=logits[:, start:end])
        return logits

    def _head_rows(self, start: int, end: int) -> Matrix:
        if self._model.head_type == "int8":
            codes = self._package.tensor(names.OUTPUT_QWEIGHT)[start:end].astype(np.float32)
            codes *= self._package.tensor(names.OUTPUT_SCALES)[start:end, None].astype(np.float32)
            return codes
        name = names.TOK_EMBEDDINGS if self._model.tie_word_embeddings else names.OUTPUT
        return _widen(self._package.tensor(name)[start:end])

    def _read_layer(self, layer: int) -> LayerWeights:
        model = self._model

        def vector(module: str) -> Matrix:
            return self._vector(names.layer_tensor(layer, module, None, names.WEIGHT))

        def qkv_parts(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
            heads = (model.num_attention_heads, model.num_kv_heads, model.head_dim)
            return np.concatenate(fusion.split_qkv(parts, *heads), axis=-1)

        if model.is_quantized(layer, names.W13):
            gate, up = fusion.split_w13(fusion.join_columns(self._linear_parts(layer, names.W13)))
        else:
            gate = fusion.join_columns(self._linear_parts(layer, names.W1))
            up = fusion.join_columns(self._linear_parts(layer, names.W3))
        has_bias = model.has_attention_bias
        return LayerWeights(
            attention_norm=vector(names.ATTENTION_NORM),
            w_qkv=_transposed(qkv_parts(self._linear_parts(layer, names.W_QKV))),
            qkv_bias=self._bias(layer, names.W_QKV, qkv_parts) if has_bias else None,
            q_norm=vector(names.Q_NORM) if model.has_qk_norm else None,
            k_norm=vector(names.K_NORM) if model.has_qk_norm else None,
            wo=_transposed(fusion.join_rows(self._linear_parts(layer, names.WO))),
            # Every rank's file holds the whole bias; it is added once (section 1.2).
            wo_bias=self._bias(layer, names.WO, lambda parts: parts[0]) if has_bias else None,
            ffn_norm=vector(names.FFN_NORM),
            w_gate_up=np.concatenate([_transposed(gate), _transposed(up)]),
            w_down=_transposed(fusion.join_rows(self._linear_parts(layer, names.W2))),
        )

    def _linear_parts(self, layer: int, module: str) -> list[NDArray[Any]]:
        """Return each rank's ``[inputs, outputs]`` matrix, fp16 or fp32."""
        shapes = {shape.module: shape for shape in linear_shapes(self._model, layer)}
        ranks = range(self._model.tensor_para_size)
        return [self._linear(layer, shapes[module], rank) for rank in ranks]

    def _linear(self, layer: int, shape: LinearShape, rank: int) -> NDArray[Any]:
        def tensor(kind: str) -> NDArray[Any]:
            return self._package.tensor(names.layer_tensor(layer, shape.module, rank, kind))

        if not shape.is_quantized:
            return _widen(tensor(names.WEIGHT))
        codes = int4.unpack_words(tensor(names.QWEIGHT), shape.num_inputs, shape.num_outputs)
        scales, zeros = int4.unpack_scales_zeros(tensor(names.SCALES_ZEROS))
        return int4.dequantize(codes, zeros, scales, self._model.group_size)

    def _bias(
        self, layer: int, module: str, join: Callable[[list[NDArray[Any]]], NDArray[Any]]
    ) -> Matrix:
        ranks = range(self._model.tensor_para_size)
        return join(
            [self._vector(names.layer_tensor(layer, module, rank, names.BIAS)) for rank in ranks]
        )

    def _vector(self, name: str) -> Matrix:
        return _widen(self._package.tensor(name))


def _widen(stored: NDArray[Any]) -> Matrix:
    """Return fp16 or bf16 bits as fp32."""
    if stored.dtype == BF16_BITS:
        return bfloat16.to_float32(stored)
    return stored.astype(np.float32)


def _transposed(matrix: NDArray[Any]) -> Matrix:
    """Return ``[outputs, inputs]`` fp32, each output's weights side by side."""
    return np.ascontiguousarray(matrix.T, dtype=np.float32)
