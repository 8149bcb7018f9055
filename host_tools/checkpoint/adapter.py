"""Merges a LoRA adapter into the weights of its base while they are read.

The weight of a module becomes ``W + scale * B A``, computed in fp64 and rounded to the base's
dtype (LoRA, arXiv 2106.09685, section 4.1; tensor names as peft saves them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from device_runtime.errors import PackageError
from device_runtime.package_format.names import WEIGHT
from host_tools.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from host_tools.checkpoint.tensor_files import (
    PickledFile,
    SafetensorsFile,
    TensorFile,
    TensorFiles,
    is_finite,
)
from host_tools.checkpoint_names import ADAPTER_CONFIG, ADAPTER_DIR, ADAPTER_WEIGHTS, SAFETENSORS

_FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Torch finds no least and greatest of other floating-point types, such as fp8."""

MERGED_ROWS = 1024
"""Outputs that are in fp64 at once."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
_SAVED = re.compile(r"\.modules_to_save(\.default)?\.")


@dataclass(frozen=True)
class Factors:
    """Names of the two factors of one module in the adapter's file.

    Attributes:
        a: of ``[rank, inputs]``.
        b: of ``[outputs, rank]``.
    """

    a: str
    b: str


class Adapter:
    """An open adapter: pairs of factors by module, and tensors that replace the base's."""

    def __init__(self, folder: Path) -> None:
        """Open an adapter folder; nothing in it is executed.

        Raises:
            PackageError: it is no whole LoRA adapter of the kind that can be merged.
        """
        self._config: AdapterConfig = read_adapter_config(folder)
        self._files = _open_weights(folder)
        factors: dict[str, dict[str, str]] = {}
        self._replaced: dict[str, str] = {}
        for name in self._files:
            own = _SAVED.sub(".", name.removeprefix(_PREFIX))
            found = _FACTOR.fullmatch(own)
            if found is not None:
                _put(factors.setdefault(found["module"], {}), found["factor"], name)
            elif "lora_" in own or not name.startswith(_PREFIX):
                raise PackageError(
                    f"tensor {name[:120]} of the adapter is no factor of a linear, turbojet "
                    f"merges plain LoRA; save the merged checkpoint and use that"
                )
            else:
                _put(self._replaced, own, name)
        if not factors and not self._replaced:
            raise PackageError(
                f"the weights of the adapter {folder} are empty, save the adapter again"
            )
        self._factors = {
            f"{module}.{WEIGHT}": _whole_pair(module, pair) for module, pair in factors.items()
        }
        for name, pair in self._factors.items():
            if name in self._replaced:
                raise _ambiguous(self._replaced[name], pair.a)

    @classmethod
    def find(cls, folder: Path) -> Adapter | None:
        """Open the adapter that lies in a checkpoint's folder, None where there is none."""
        inside = folder / ADAPTER_DIR
        return cls(inside) if (inside / ADAPTER_CONFIG).is_file() else None

    def merged(self, base: TensorFiles) -> TensorFiles:
        """Return the base's tensors as the adapter changes them.

        Raises:
            PackageError: the adapter is for another model.
        """
        for name, pair in self._factors.items():
            self._check_place(name, base)
            outputs, inputs = base.facts(name)[1]
            rank = self._config.rank
            for factor, shape in ((pair.a, (rank, inputs)), (pair.b, (outputs, rank))):
                self._check_shape(factor, shape)
        for name, own in self._replaced.items():
            self._check_place(name, base)
            self._check_shape(own, base.facts(name)[1])
        return base.wrapped(lambda file: _MergedFile(file, self))

    def change(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base as the adapter changes it, in the base's dtype.

        Raises:
            PackageError: the dtype ends below a value that the adapter makes.
        """
        if name not in self._replaced and name not in self._factors:
            return value
        changed = self._changed(name, value)
        if not is_finite(changed) and is_finite(value):
            raise PackageError(
                f"the adapter takes {name[:120]} beyond {value.dtype}, which ends at "
                f"{torch.finfo(value.dtype).max:g}; name the checkpoint that it was trained on"
            )
        return changed

    def _changed(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name in self._replaced:
            return self._files.tensor(self._replaced[name]).to(value.dtype)
        pair = self._factors[name]
        a, b = (self._files.tensor(factor).double() for factor in (pair.a, pair.b))
        # A product in fp32 would depend on how precise the process's products are just then
        # (`tensor_cores`), and this may run in a thread beside them.
        merged = [
            torch.addmm(rows.double(), factors, a, alpha=self._config.scale).to(value.dtype)
            for rows, factors in zip(
                torch.split(value, MERGED_ROWS), torch.split(b, MERGED_ROWS), strict=True
            )
        ]
        return torch.cat(merged)

    def _check_place(self, name: str, base: TensorFiles) -> None:
        if name not in base or not base.facts(name)[0].is_floating_point:
            raise PackageError(
                f"the adapter changes {name[:120]}, which the base does not have in floating "
                f"point; name the checkpoint that it was trained on"
            )
        if name in self._factors and len(base.facts(name)[1]) != 2:
            raise PackageError(f"the adapter changes {name[:120]}, which is no linear's weight")

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        dtype, shape = self._files.facts(name)
        if dtype not in _FACTOR_DTYPES:
            raise PackageError(
                f"tensor {name[:120]} of the adapter is {dtype}, expected fp16, bf16, fp32 or "
                f"fp64; save the merged checkpoint and use that"
            )
        if shape != expected:
            raise PackageError(
                f"tensor {name[:120]} of the adapter is {dtype} {list(shape)}, the base and rank "
                f"{self._config.rank} mean {list(expected)}; name the checkpoint that it was "
                f"trained on, or merge what it adds first"
            )


class _MergedFile:
    """A weight file of the base, seen through the adapter."""

    def __init__(self, base: TensorFile, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return self._base.names()

    def facts(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor, which merging keeps."""
        return self._base.facts(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; what the adapter does not change is the mapped file."""
        return self._adapter.change(name, self._base.tensor(name))


def _open_weights(folder: Path) -> TensorFiles:
    for name in ADAPTER_WEIGHTS:
        path = folder / name
        if path.is_file():
            opener = SafetensorsFile if path.suffix == SAFETENSORS else PickledFile
            return TensorFiles({name: opener(path)})
    raise PackageError(f"{folder} has no {' or '.join(ADAPTER_WEIGHTS)}, name a LoRA adapter")


def _put(names: dict[str, str], meaning: str, name: str) -> None:
    """Note what a tensor means; one that means the same under another name is refused."""
    if meaning in names:
        raise _ambiguous(names[meaning], name)
    names[meaning] = name


def _ambiguous(one: str, other: str) -> PackageError:
    return PackageError(
        f"the adapter has {one[:120]} and {other[:120]}, which change the same weight; remove one "
        f"of them or save the adapter again"
    )


def _whole_pair(module: str, pair: Mapping[str, str]) -> Factors:
    if set(pair) != {"A", "B"}:
        raise PackageError(
            f"the adapter has one factor of {module[:120]} only, expected lora_A and lora_B"
        )
    return Factors(pair["A"], pair["B"])
