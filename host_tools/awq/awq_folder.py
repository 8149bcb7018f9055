"""Writes quantized layers one by one, and at the end the Hugging Face folder made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from device_runtime.package_format import durable, int4
from device_runtime.package_format.names import BIAS, GENERATION_CONFIG, QWEIGHT, WEIGHT
from host_tools.awq.layer_solver import QuantizedLayer
from host_tools.awq.tap_solver import in_fp16
from host_tools.checkpoint import Checkpoint, DenseLinear, Linear, QuantizedLinear
from host_tools.checkpoint.awq_tensors import QZEROS, SCALES, AwqTensors, quantization_config
from host_tools.checkpoint.families import LogicalLinear, SourceLinear
from host_tools.checkpoint.linear_weights import LayerWeights, join_qkv_rows
from host_tools.checkpoint.tensor_files import SafetensorsFile, TensorFiles
from host_tools.checkpoint_names import CONFIG_JSON, PYTHON, TOKENIZER_FILES
from host_tools.shards import TensorPlan, write_shards

COPIED_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG)
"""What a folder of weights needs beside them."""

FUSED_ELSEWHERE: dict[str, tuple[LogicalLinear, ...]] = {
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
}
"""What vLLM and SGLang make one module of. SGLang (0.5.23) and older vLLM look for its name alone:
without it they expect codes where the folder has weights, which SGLang then passes over in silence.
"""

ROWS_AT_ONCE = 8192


class LayerFiles:
    """Finished layers in a folder of the run's own, each a safetensors file, whole or not there."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self._folder = folder
        self._checkpoint = checkpoint

    def unfinished(self) -> list[int]:
        """Return the layers that are not there, in order."""
        num_layers = self._checkpoint.model.num_hidden_layers
        return [layer for layer in range(num_layers) if not self._path(layer).is_file()]

    def pack(self, layer: int, quantized: QuantizedLayer) -> bytes:
        """Return a layer's file, under the names and in the fusion of its family."""
        return save(_layer_tensors(self._checkpoint, layer, quantized.weights))

    def write(self, layer: int, content: bytes) -> None:
        """Write what :func:`pack` returned."""
        durable.write_atomically(self._path(layer), content)

    def read(self, layer: int, group_size: int) -> LayerWeights:
        """Return a finished layer's weights, the very ones that were written."""
        files = TensorFiles({self._path(layer).name: self.open(layer)})
        return self._checkpoint.over(files, AwqTensors(files, group_size)).layer(layer)

    def open(self, layer: int) -> SafetensorsFile:
        """Open a finished layer."""
        return SafetensorsFile(self._path(layer))

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.safetensors"


def write_awq_folder(
    folder: Path, checkpoint: Checkpoint, layers: LayerFiles, group_size: int
) -> None:
    """Write weights, config and tokenizer into an empty folder.

    Raises:
        PackageError: an embedding is beyond fp16.
    """
    plans: list[TensorPlan] = []
    num_layers = checkpoint.model.num_hidden_layers
    for name in _global_names(checkpoint):
        shape = tuple(checkpoint.tensor(name).shape)
        plans.append(TensorPlan(name, "float16", shape))
    for layer in range(num_layers):
        file = layers.open(layer)
        for name in sorted(file.names()):
            dtype, shape = file.facts(name)
            plans.append(TensorPlan(name, str(dtype).removeprefix("torch."), shape))
    write_shards(folder, plans, _all_parts(checkpoint, layers))
    config = {
        **{key: value for key, value in checkpoint.config.items() if key != "dtype"},
        "torch_dtype": "float16",
        "quantization_config": quantization_config(group_size, _kept_modules(checkpoint, layers)),
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # Half a character, which a note may hold, is written as JSON spells it.
    (folder / CONFIG_JSON).write_text(text, encoding="utf-8", errors="backslashreplace")
    # Other engines need the Python of families that transformers has no class for; we never run it.
    code = sorted(path.name for path in checkpoint.path.glob(f"*{PYTHON}"))
    for name in (*COPIED_FILES, *code):
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)
    for path in folder.iterdir():
        durable.sync_file(path)
    durable.sync_folder(folder)


def _kept_modules(checkpoint: Checkpoint, layers: LayerFiles) -> list[str]:
    """Return the modules whose weights stay floating-point, by their names in the checkpoint.

    Where other engines fuse several of them, the name of that module follows.
    """
    family = checkpoint.family
    kept: list[str] = []
    for layer in range(checkpoint.model.num_hidden_layers):
        there = layers.open(layer).names()
        modules = {source.parts: family.module(layer, source.module) for source in family.linears}
        stored = {parts: name for parts, name in modules.items() if f"{name}.{WEIGHT}" in there}
        kept += stored.values()
        for fused, parts in FUSED_ELSEWHERE.items():
            if all((part,) in stored for part in parts):
                parent, _, _ = stored[parts[:1]].rpartition(".")
                kept.append(f"{parent}.{fused}")
    return kept


def _global_names(checkpoint: Checkpoint) -> list[str]:
    family = checkpoint.family
    modules = [family.embedding, family.final_norm]
    if not checkpoint.model.tie_word_embeddings:
        modules.append(family.head)
    return [f"{module}.{WEIGHT}" for module in modules]


def _all_parts(
    checkpoint: Checkpoint, layers: LayerFiles
) -> Iterator[Iterator[NDArray[np.generic]]]:
    for name in _global_names(checkpoint):
        yield _fp16_rows(checkpoint.tensor(name), name)
    for layer in range(checkpoint.model.num_hidden_layers):
        file = layers.open(layer)
        for name in sorted(file.names()):
            yield iter([file.tensor(name).numpy()])


def _fp16_rows(tensor: torch.Tensor, name: str) -> Iterator[NDArray[np.generic]]:
    """Give a large tensor in fp16 piece by piece."""
    for start in range(0, len(tensor), ROWS_AT_ONCE):
        yield in_fp16(tensor[start : start + ROWS_AT_ONCE], name).numpy()


def _layer_tensors(
    checkpoint: Checkpoint, layer: int, weights: LayerWeights
) -> dict[str, torch.Tensor]:
    family = checkpoint.family
    tensors = {
        f"{family.module(layer, module)}.{WEIGHT}": value
        for module, value in (
            (family.attention_norm, weights.attention_norm),
            (family.ffn_norm, weights.ffn_norm),
            (family.q_norm, weights.q_norm),
            (family.k_norm, weights.k_norm),
        )
        if value is not None
    }
    for source in family.linears:
        module = family.module(layer, source.module)
        linear = _fused(checkpoint, source, weights)
        if isinstance(linear, QuantizedLinear):
            tensors[f"{module}.{QWEIGHT}"] = _packed(linear.codes)
            tensors[f"{module}.{QZEROS}"] = _packed(linear.zeros)
            tensors[f"{module}.{SCALES}"] = linear.scales
        else:
            tensors[f"{module}.{WEIGHT}"] = linear.weight.contiguous()
        if linear.bias is not None:
            tensors[f"{module}.{BIAS}"] = linear.bias
    return tensors


def _fused(checkpoint: Checkpoint, source: SourceLinear, weights: LayerWeights) -> Linear:
    """Return one module of the checkpoint, q, k and v joined where it holds all of them."""
    parts = [weights.linear(part) for part in source.parts]
    quantized = [part for part in parts if isinstance(part, QuantizedLinear)]
    if len(parts) == 1:
        return parts[0]
    layout, model = checkpoint.family.qkv_layout, checkpoint.model

    def join(values: list[torch.Tensor]) -> torch.Tensor:
        q, k, v = values
        return join_qkv_rows(layout, q, k, v, model)

    biases = [part.bias for part in parts if part.bias is not None]
    bias = join(biases).contiguous() if biases else None
    if not quantized:
        return DenseLinear(join([part.weight for part in parts]), bias)
    return QuantizedLinear(
        codes=join([part.codes.T for part in quantized]).T,
        zeros=join([part.zeros.T for part in quantized]).T,
        scales=join([part.scales.T for part in quantized]).T.contiguous(),
        group_size=quantized[0].group_size,
        bias=bias,
    )


def _packed(codes: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(int4.pack_awq(codes.contiguous().numpy()))
