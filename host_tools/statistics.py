"""What calibration writes down about activations, as ``lite calibrate`` does (spec section 4.1)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from device_runtime.package_format.durable import replacing
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.families import LogicalLinear, SourceLinear
from host_tools.checkpoint.linear_weights import join_qkv_rows
from host_tools.columns import column_extrema, column_norms, column_sums
from host_tools.decoder.layer import Observer

INPUTS_STATS = "inputs_stats.pth"
OUTPUTS_STATS = "outputs_stats.pth"
KEY_STATS = "key_stats.pth"
VALUE_STATS = "value_stats.pth"

CHANNEL_KEYS = ("max", "min", "mean", "absmax", "absmean")
HEAD_KEYS = ("max", "min", "absmax")

Named = dict[str, torch.Tensor]
"""One figure of several modules by module path, each fp16."""

Statistics = dict[str, dict[str, Named]]
"""File name -> figure (``absmax``) -> module path -> tensor."""


class ChannelStatistics:
    """Extrema and means of one tensor's channels over every token seen.

    All windows have the same length, so the mean over tokens is the running mean over samples
    that LMDeploy keeps.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._max = torch.empty(0)
        self._min = torch.empty(0)
        self._sum = torch.empty(0)
        self._abs_sum = torch.empty(0)

    def update(self, values: torch.Tensor) -> None:
        """Take ``[..., channels]`` fp32 into account."""
        rows = values.reshape(-1, values.shape[-1])
        low, high = column_extrema(rows)
        total, abs_total = column_sums(rows).double(), column_norms(rows).double()
        if self._num_tokens:
            high, low = torch.maximum(high, self._max), torch.minimum(low, self._min)
            total, abs_total = total + self._sum, abs_total + self._abs_sum
        self._max, self._min, self._sum, self._abs_sum = high, low, total, abs_total
        self._num_tokens += len(rows)

    def figures(self) -> Named:
        """Return the five figures, each ``[channels]`` fp16 on the CPU; fp16's range is kept."""
        figures = {
            "max": self._max,
            "min": self._min,
            "mean": self._sum / self._num_tokens,
            "absmax": torch.maximum(self._max.abs(), self._min.abs()),
            "absmean": self._abs_sum / self._num_tokens,
        }
        limit = torch.finfo(torch.float16).max
        return {
            key: value.clamp(-limit, limit).to(device="cpu", dtype=torch.float16)
            for key, value in figures.items()
        }


class LayerStatistics(Observer):
    """Watches one decoder layer and names what it saw as the checkpoint's modules are named."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._checkpoint = checkpoint
        self._layer = layer
        self._norms = {name: ChannelStatistics() for name in ("attention_norm", "ffn_norm")}
        self._inputs = {name: ChannelStatistics() for name in ("o", "down")}
        self._outputs: dict[LogicalLinear, ChannelStatistics] = {}
        self._keys = ChannelStatistics()
        self._values = ChannelStatistics()

    def norm(self, name: str, outputs: torch.Tensor) -> None:
        """See what a norm gives, which is also what the linears after it take."""
        self._norms[name].update(outputs)

    def linear(self, name: LogicalLinear, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """See inputs and outputs of a linear."""
        if name in self._inputs:
            self._inputs[name].update(inputs)
        self._outputs.setdefault(name, ChannelStatistics()).update(outputs)

    def keys_values(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See keys after the rotation and values."""
        self._keys.update(keys.transpose(1, 2).flatten(2))
        self._values.update(values.transpose(1, 2).flatten(2))

    def statistics(self) -> Statistics:
        """Return what the four files say about this layer."""
        family = self._checkpoint.family
        found: Statistics = {INPUTS_STATS: {}, OUTPUTS_STATS: {}, KEY_STATS: {}, VALUE_STATS: {}}
        for source in family.linears:
            module = family.module(self._layer, source.module)
            _file(found[INPUTS_STATS], module, self._input_of(source.parts[0]).figures())
            _file(found[OUTPUTS_STATS], module, self._outputs_of(source))
        for name, module in (
            ("attention_norm", family.attention_norm),
            ("ffn_norm", family.ffn_norm),
        ):
            module = family.module(self._layer, module)
            _file(found[OUTPUTS_STATS], module, self._norms[name].figures())
        heads = (self._checkpoint.model.num_kv_heads, self._checkpoint.model.head_dim)
        for file, seen in ((KEY_STATS, self._keys), (VALUE_STATS, self._values)):
            figures = seen.figures()
            of_heads = {key: figures[key].view(heads) for key in HEAD_KEYS}
            _file(found[file], family.layer_name(self._layer), of_heads)
        return found

    def _input_of(self, name: LogicalLinear) -> ChannelStatistics:
        if name in self._inputs:
            return self._inputs[name]
        return self._norms["attention_norm" if name in ("q", "k", "v") else "ffn_norm"]

    def _outputs_of(self, source: SourceLinear) -> Named:
        parts = [self._outputs[part].figures() for part in source.parts]
        if len(parts) == 1:
            return parts[0]
        layout, model = self._checkpoint.family.qkv_layout, self._checkpoint.model
        q, k, v = parts
        return {key: join_qkv_rows(layout, q[key], k[key], v[key], model) for key in CHANNEL_KEYS}


def final_norm_statistics(checkpoint: Checkpoint, seen: ChannelStatistics) -> Statistics:
    """Return what ``outputs_stats.pth`` says about the norm after the last layer."""
    found: Statistics = {OUTPUTS_STATS: {}}
    _file(found[OUTPUTS_STATS], checkpoint.family.final_norm, seen.figures())
    return found


def merge(parts: list[Statistics]) -> Statistics:
    """Return the statistics of several layers as one, in order."""
    merged: Statistics = {}
    for part in parts:
        for file, figures in part.items():
            for figure, named in figures.items():
                merged.setdefault(file, {}).setdefault(figure, {}).update(named)
    return merged


def write_statistics(statistics: Statistics, folder: Path) -> list[Path]:
    """Write each file whole or not at all and return their paths."""
    paths = []
    for name, content in statistics.items():
        path = folder / name
        save_whole(content, path)
        paths.append(path)
    return paths


def save_whole(content: object, path: Path) -> None:
    """Write with ``torch.save``, whole or not at all."""
    # Given a stream and not a path, torch puts no file name into what it writes.
    with replacing(path) as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _file(figures: dict[str, Named], module: str, found: Named) -> None:
    for key, value in found.items():
        figures.setdefault(key, {})[module] = value
