"""AWQ gemm tensors of a checkpoint: names, detection, shapes, unpacking (spec section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from device_runtime.errors import PackageError
from device_runtime.package_format import int4
from device_runtime.package_format.names import QWEIGHT
from host_tools.checkpoint.linear_weights import QuantizedLinear
from host_tools.checkpoint.packed_format import (
    BITS,
    SCALE_DTYPES,
    check_expected,
    read_scales,
)
from host_tools.checkpoint.tensor_files import TensorFiles
from host_tools.options import GROUP_SIZES

QZEROS = "qzeros"
SCALES = "scales"


def quantization_config(group_size: int, kept_modules: Sequence[str] = ()) -> dict[str, object]:
    """Return the ``quantization_config`` that transformers, vLLM and LMDeploy read.

    Args:
        group_size: of the codes.
        kept_modules: full names of linears that stay floating-point.
    """
    facts: dict[str, object] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
    }
    if kept_modules:
        facts["modules_to_not_convert"] = list(kept_modules)
    return facts


@dataclass(frozen=True)
class AwqTensors:
    """The packed linears of one AWQ gemm checkpoint.

    Attributes:
        files: its tensors.
        group_size: inputs that share a scale and a zero.
    """

    files: TensorFiles
    group_size: int
    name: str = "awq"

    def is_packed(self, module: str) -> bool:
        """Tell whether a module has codes in the place of a weight."""
        return f"{module}.{QWEIGHT}" in self.files

    def check(self, module: str, outputs: int, inputs: int) -> list[str]:
        """Check dtypes and shapes of one linear and return its tensor names.

        Raises:
            PackageError: a tensor is missing, or its dtype or shape is another one.
        """
        groups, words = inputs // self.group_size, outputs // int4.CODES_PER_WORD
        return check_expected(
            self.files,
            (
                (f"{module}.{QWEIGHT}", (torch.int32,), (inputs, words)),
                (f"{module}.{QZEROS}", (torch.int32,), (groups, words)),
                (f"{module}.{SCALES}", SCALE_DTYPES, (groups, outputs)),
            ),
        )

    def read(self, module: str, bias: torch.Tensor | None) -> QuantizedLinear:
        """Unpack one linear.

        Raises:
            PackageError: a scale is not finite in fp16.
        """
        return QuantizedLinear(
            codes=_unpack(self.files.tensor(f"{module}.{QWEIGHT}")),
            zeros=_unpack(self.files.tensor(f"{module}.{QZEROS}")),
            scales=read_scales(self.files, f"{module}.{SCALES}"),
            group_size=self.group_size,
            bias=bias,
        )


def find_awq(files: TensorFiles, section: Mapping[str, object] | None) -> AwqTensors:
    """Return the reader of an AWQ checkpoint.

    LMDeploy 0.2.3 writes AWQ tensors without a ``quantization_config``, so the tensors decide and
    a config that is there must agree.

    Raises:
        PackageError: another variant, config and tensors disagree, or no kernel runs the groups.
    """
    if section is not None:
        _check_variant(section)
    sizes = set()
    for name in files:
        if name.endswith(f".{QWEIGHT}"):
            sizes.add(_group_size_of(name.removesuffix(f".{QWEIGHT}"), files))
    if not sizes:
        raise PackageError(f"config.json says awq, no tensor is called {QWEIGHT}, fetch it again")
    if len(sizes) > 1:
        raise PackageError(f"the checkpoint mixes group sizes {sorted(sizes)}, expected one")
    found = sizes.pop()
    stated = found if section is None else section.get("group_size", section.get("q_group_size"))
    if stated != found:
        raise PackageError(
            f"config.json says group_size {str(stated)[:20]}, the tensors have {found}"
        )
    if found not in GROUP_SIZES:
        raise PackageError(
            f"the checkpoint is awq in groups of {found}, turbojet runs "
            f"{', '.join(map(str, GROUP_SIZES))}; quantize it again"
        )
    return AwqTensors(files, found)


def _group_size_of(module: str, files: TensorFiles) -> int:
    if f"{module}.{SCALES}" not in files:
        raise PackageError(
            f"tensor {module}.{SCALES} is missing beside {QWEIGHT}, quantize the checkpoint again"
        )
    _, codes = files.facts(f"{module}.{QWEIGHT}")
    _, scales = files.facts(f"{module}.{SCALES}")
    if len(codes) != 2 or len(scales) != 2 or not scales[0] or codes[0] % scales[0]:
        raise PackageError(
            f"{module} has {QWEIGHT} {list(codes)} and {SCALES} {list(scales)}, "
            f"which is no AWQ gemm pair"
        )
    return codes[0] // scales[0]


def _check_variant(section: Mapping[str, object]) -> None:
    version = str(section.get("version", "gemm")).lower()
    bits = section.get("bits", section.get("w_bit", BITS))
    if version != "gemm" or bits != BITS or section.get("zero_point", True) is not True:
        raise PackageError(
            f"the checkpoint is awq {version[:20]} with {str(bits)[:10]} bits and zero_point "
            f"{str(section.get('zero_point', True))[:10]}, turbojet reads gemm with {BITS} bits "
            f"and zero points"
        )


def _unpack(words: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(int4.unpack_awq(words.numpy()))
