"""Opens a Hugging Face folder and hands out its weights, layer by layer, in one logical scheme."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch.nn import functional

from device_runtime.errors import PackageError
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.names import BIAS, WEIGHT
from host_tools.checkpoint.adapter import Adapter
from host_tools.checkpoint.config_reader import read_family, read_model
from host_tools.checkpoint.families import Family, LogicalLinear, SourceLinear
from host_tools.checkpoint.linear_weights import (
    DenseLinear,
    LayerWeights,
    Linear,
    QuantizedLinear,
    linear_shape,
    split_qkv_rows,
)
from host_tools.checkpoint.mixed import KeptLinears, float_linears
from host_tools.checkpoint.packed_format import PackedFormat
from host_tools.checkpoint.quantization import find_packed
from host_tools.checkpoint.tensor_files import TensorFiles
from host_tools.checkpoint_folder import check_folder
from host_tools.json_file import read_json

CONFIG_JSON = "config.json"
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Checkpoint:
    """An open checkpoint: every tensor is there, of the shape that config.json means.

    Attributes:
        path: the folder.
        config: config.json as parsed.
        family: its naming table.
        model: the architecture; ``weight_type`` is int4 for 4-bit codes, else fp16.
        packed: reader of the 4-bit linears, None for a floating-point checkpoint.
        dtype: of the embedding in the files.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, object],
        family: Family,
        model: ModelConfig,
        files: TensorFiles,
        packed: PackedFormat | None = None,
    ) -> None:
        """Check every tensor against the config.

        Raises:
            PackageError: a tensor is missing, unexpected or of another dtype or shape, or a head
                that should be the embedding is not.
        """
        self.path = path
        self.config = config
        self.family = family
        self.model = model
        self.packed = packed
        self._files = files
        self._check_names(self._check_tensors())
        self._check_tied_head()
        self.dtype = files.facts(f"{family.embedding}.{WEIGHT}")[0]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder; a LoRA adapter in it is merged on the way.

        Headers alone are read, and both tables where a tied head is stored nevertheless.

        Raises:
            PackageError: the folder is no whole checkpoint of a family that we run.
        """
        if not path.is_dir():
            raise PackageError(f"{path} is no folder, name the folder of a checkpoint")
        check_folder(path)
        config = read_json(path / CONFIG_JSON)
        family = read_family(config)
        files = TensorFiles.open(path)
        if (adapter := Adapter.find(path)) is not None:
            files = adapter.merged(files)
        packed = find_packed(path, config, files)
        model = read_model(config, family, packed.group_size if packed else 0)
        if packed is not None:
            kept = _kept(family, model.num_hidden_layers, packed)
            model = replace(model, fp16_linears=kept.fp16_linears)
        return cls(path, config, family, model, files, packed)

    def over(self, files: TensorFiles, packed: PackedFormat) -> Checkpoint:
        """Return the same model with other tensors of the same names, which are not checked.

        Args:
            files: tensors of some layers, as they were written here.
            packed: reader of their 4-bit linears.
        """
        other = copy.copy(self)
        other._files, other.packed = files, packed
        return other

    @property
    def is_quantized(self) -> bool:
        """Whether the linears are 4-bit codes."""
        return self.packed is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about the checkpoint, one sentence each."""
        if self.packed is None:
            return ()
        return _kept(self.family, self.model.num_hidden_layers, self.packed).notes

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as stored, its memory the mapped file; it must not be written to.

        Raises:
            PackageError: it holds NaN or infinity.
        """
        return self._files.tensor(name)

    def embedding(self) -> torch.Tensor:
        """Return the token embedding ``[vocab_size, hidden_size]``."""
        return self.tensor(f"{self.family.embedding}.{WEIGHT}")

    def final_norm(self) -> torch.Tensor:
        """Return the weight of the last norm ``[hidden_size]``."""
        return self.tensor(f"{self.family.final_norm}.{WEIGHT}")

    def head(self) -> torch.Tensor:
        """Return the output projection ``[vocab_size, hidden_size]``; the embedding when tied."""
        if self.model.tie_word_embeddings:
            return self.embedding()
        return self._unit_head if self.family.has_unit_head else self._stored_head

    def layer(self, layer: int) -> LayerWeights:
        """Return the weights of a decoder layer; dense ones stay in the mapped file.

        Raises:
            PackageError: a tensor holds NaN or infinity.
        """
        linears: dict[LogicalLinear, Linear] = {}
        for source in self.family.linears:
            linears.update(self._read_linear(layer, source))
        family = self.family
        return LayerWeights(
            attention_norm=self._norm(layer, family.attention_norm),
            ffn_norm=self._norm(layer, family.ffn_norm),
            q_norm=self._norm(layer, family.q_norm) if family.q_norm else None,
            k_norm=self._norm(layer, family.k_norm) if family.k_norm else None,
            has_rope=layer not in self.model.layers_without_rope,
            q=linears["q"],
            k=linears["k"],
            v=linears["v"],
            o=linears["o"],
            gate=linears["gate"],
            up=linears["up"],
            down=linears["down"],
        )

    @property
    def _stored_head(self) -> torch.Tensor:
        return self.tensor(f"{self.family.head}.{WEIGHT}")

    @cached_property
    def _unit_head(self) -> torch.Tensor:
        """The head with rows of length 1, computed in its dtype as the model does (Baichuan2)."""
        return functional.normalize(self._stored_head)

    def _norm(self, layer: int, module: str) -> torch.Tensor:
        return self.tensor(f"{self.family.module(layer, module)}.{WEIGHT}")

    def _read_linear(self, layer: int, source: SourceLinear) -> dict[LogicalLinear, Linear]:
        module = self.family.module(layer, source.module)
        has_bias = self.family.has_bias(source.parts[0], self.config)
        bias = self.tensor(f"{module}.{BIAS}") if has_bias else None
        linear: Linear
        if self.packed is not None and self.packed.is_packed(module):
            linear = self.packed.read(module, bias)
        else:
            linear = DenseLinear(self.tensor(f"{module}.{WEIGHT}"), bias)
        if len(source.parts) == 1:
            return {source.parts[0]: linear}
        return dict(zip(source.parts, self._split(linear), strict=True))

    def _split(self, linear: Linear) -> list[Linear]:
        """Take a fused qkv apart; q, k and v of a dense one are copies."""

        def rows(fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return split_qkv_rows(self.family.qkv_layout, fused, self.model)

        biases = (None,) * 3 if linear.bias is None else rows(linear.bias)
        if isinstance(linear, DenseLinear):
            return [DenseLinear(*pair) for pair in zip(rows(linear.weight), biases, strict=True)]
        columns = (linear.codes, linear.zeros, linear.scales)
        parts = zip(*(rows(part.T) for part in columns), strict=True)
        return [
            QuantizedLinear(
                codes=codes.T.contiguous(),
                zeros=zeros.T.contiguous(),
                scales=scales.T.contiguous(),
                group_size=linear.group_size,
                bias=bias,
            )
            for (codes, zeros, scales), bias in zip(parts, biases, strict=True)
        ]

    def _check_tensors(self) -> set[str]:
        """Check every tensor that the config calls for and return their names."""
        model, family = self.model, self.family
        table = (model.vocab_size, model.hidden_size)
        names = {
            self._check(f"{family.embedding}.{WEIGHT}", table),
            self._check(f"{family.final_norm}.{WEIGHT}", (model.hidden_size,)),
        }
        if self.packed is not None and self.packed.is_packed(family.head):
            raise PackageError(
                f"{family.head} is quantized, turbojet runs a head of floating-point weights; "
                f"quantize the checkpoint without its head"
            )
        head = f"{family.head}.{WEIGHT}"
        if head in self._files:
            names.add(self._check(head, table))
        elif not model.tie_word_embeddings:
            raise PackageError(
                f"the output head {head} is missing in {self.path}, fetch the checkpoint again; "
                f'where the head is the embedding, config.json says "tie_word_embeddings": true'
            )
        for layer in range(model.num_hidden_layers):
            for module, size in (
                (family.attention_norm, model.hidden_size),
                (family.ffn_norm, model.hidden_size),
                (family.q_norm, model.head_dim),
                (family.k_norm, model.head_dim),
            ):
                if module:
                    name = f"{family.module(layer, module)}.{WEIGHT}"
                    names.add(self._check(name, (size,)))
            for source in family.linears:
                names.update(self._check_linear(layer, source))
        return names

    def _check_tied_head(self) -> None:
        """Refuse a stored head unlike the embedding it is tied to: libraries differ on which runs.

        transformers 4 and vLLM take the embedding, transformers 5 the stored head.
        """
        if not self.model.tie_word_embeddings or f"{self.family.head}.{WEIGHT}" not in self._files:
            return
        head, embedding = self._stored_head, self.embedding()
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise PackageError(
                f'config.json in {self.path} says "tie_word_embeddings": true, but '
                f"{self.family.head}.{WEIGHT} differs from {self.family.embedding}.{WEIGHT}; say "
                f"false to use it, or remove it"
            )

    def _check_linear(self, layer: int, source: SourceLinear) -> list[str]:
        module = self.family.module(layer, source.module)
        shapes = [linear_shape(self.model, part) for part in source.parts]
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        names = []
        bias = f"{module}.{BIAS}"
        if self.family.has_bias(source.parts[0], self.config):
            names.append(self._check(bias, (outputs,)))
        elif self.packed is not None and bias in self._files:
            # AutoGPTQ writes biases of zeros where the model has none.
            names.append(self._check(bias, (outputs,)))
            if self.tensor(bias).any():
                raise PackageError(f"tensor {bias} is not zero, a {self.family.name} has no such")
        if self.packed is not None and f"{module}.{WEIGHT}" not in self._files:
            return names + self.packed.check(module, outputs, inputs)
        return [*names, self._check(f"{module}.{WEIGHT}", (outputs, inputs))]

    def _check(self, name: str, shape: tuple[int, ...]) -> str:
        if name not in self._files:
            raise PackageError(
                f"tensor {name} is missing in {self.path}, fetch the checkpoint again"
            )
        dtype, found = self._files.facts(name)
        if dtype not in FLOAT_DTYPES or found != shape:
            raise PackageError(
                f"tensor {name} is {dtype} {list(found)}, config.json means {list(shape)} of "
                f"fp16, bf16 or fp32"
            )
        return name

    def _check_names(self, expected: set[str]) -> None:
        """Refuse tensors that the family does not have: the model would not be what it says."""
        for name in self._files:
            if name not in expected and name.rsplit(".", 1)[-1] not in self.family.ignored:
                raise PackageError(
                    f"tensor {name[:120]} has no place in a {self.family.name} model with "
                    f"{self.model.num_hidden_layers} layers, config.json and weights disagree"
                )


def _kept(family: Family, num_layers: int, packed: PackedFormat) -> KeptLinears:
    """Return the linears of a 4-bit checkpoint that are floating-point."""
    modules = {part: source.module for source in family.linears for part in source.parts}

    def is_float(layer: int, linear: LogicalLinear) -> bool:
        return not packed.is_packed(family.module(layer, modules[linear]))

    return float_linears(num_layers, is_float)
